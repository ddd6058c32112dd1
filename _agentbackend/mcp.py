"""The MCP server: workspaces as tools of an agent that runs somewhere else, in a process of its own.

It is a client over HTTP like the command line, and asyncio, as the official package `mcp` wants it; each call
of a tool talks with the API in a thread of its own, whose connections are cut when the call is cancelled.
"""
import contextlib
import functools
import hmac
import inspect
import time
from typing import Any, Literal

import anyio
import anyio.from_thread
import anyio.to_thread
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.transport_security import TransportSecuritySettings
from mcp.types import ToolAnnotations

from _agentbackend import VERSION
from _agentbackend.remote import RemoteError, files_path, path_of, quoted
from _agentbackend.shapes import (
    ADDS,
    AGAIN,
    DESTROYS,
    HINTS,
    MAX_TEXT,
    READS,
    RUNS,
    Background,
    CommandLine,
    Cwd,
    Entry,
    Env,
    ExecId,
    FilePath,
    Lines,
    Name,
    Output,
    SessionId,
    Task,
    Transcript,
    Workspace,
    Written,
    capped,
    line_of,
    said,
    workspace_of,
)
from _agentbackend.transfer import is_folder

INSTRUCTIONS = '''Workspaces are Linux containers with git and the tools of a template, in which you run \
commands and edit files. Start with list_workspaces; to make a new one, list_templates, then \
create_workspace. A workspace is named by its name or id. Its project is the folder $PROJECT_DIR, into \
which a repository is cloned directly; paths and cwd are relative to it unless they begin with a slash. \
Commands and tasks need a running workspace; files can be read and written in a stopped one too. Delete \
files with run_command. Deletion is permanent.'''
OPEN = ('starting', 'running', 'cancelling')  # states of a task that is at work
MAX_EDIT = 2**21  # bytes of a file that is edited
HOSTS = [f'{host}:*' for host in ('127.0.0.1', 'localhost', '[::1]')]
SEARCH = r'''
if command -v rg >/dev/null; then exec rg -n --no-heading -m 100 ${3:+-g "$3"} -e "$1" -- "$2"; fi
exec grep -rnIE -m 100 ${3:+--include="$3"} -e "$1" -- "$2"
'''


class Tools:
    """The tools, of one server, maybe confined to one workspace."""

    def __init__(self, remote, only=None):
        self._remote = remote
        self._only = only

    async def _talk(self, work, *args):
        """Do what talks with the API in a thread; when the call is cancelled, its connections are cut."""
        remote = self._remote.another()
        try:
            return await anyio.to_thread.run_sync(work, remote, *args, abandon_on_cancel=True)
        except RemoteError as error:
            raise ToolError('; '.join([str(error), *error.about])) from error
        finally:
            remote.cut()

    async def _call(self, *args, **options):
        return await self._talk(lambda remote: remote.call(*args, **options))

    async def _text(self, path, query):
        def work(remote):
            with remote.open('GET', path, query=query, headers={'Accept': 'text/plain'}) as answer:
                return answer.read().decode('utf-8', 'replace')
        return await self._talk(work)

    def confined(self, tool):
        """Return a tool that refuses what belongs to another workspace than the one it is confined to."""
        @functools.wraps(tool)
        async def checked(*args, **options):
            wanted, only = [options.get('workspace')], await self._call('GET', path_of(self._only))
            if options.get('session') is not None:
                found = await self._call('GET', f"/api/agent/sessions/{quoted(options['session'])}")
                wanted.append(found['workspaceId'])
            if any(name not in (None, only['id'], only['name']) for name in wanted):
                raise ToolError(f"This server is confined to the workspace {only['name']}.")
            return await tool(*args, **options)
        return checked if self._only else tool

    # Workspaces

    async def list_workspaces(self) -> list[Workspace]:
        """List the workspaces, with their status."""
        found = await self._call('GET', '/api/workspaces')
        return [workspace_of(item) for item in found]

    async def list_templates(self) -> list[dict[str, str]]:
        """List the templates that a workspace can be made from, with what they hold."""
        found = await self._call('GET', '/api/templates')
        return [{key: str(item.get(key) or '') for key in ('name', 'description', 'holds', 'default')}
                for item in found]

    async def create_workspace(
            self, ctx: Context,
            name: said(str, 'Letters, digits, "_", "." and "-".'),
            template: said(str | None, 'A name from list_templates; omit for the default one.') = None,
            type: said(Literal['persistent', 'temporary', 'agent'], 'persistent: kept until deleted; '
                       'temporary: deleted when it stops; agent: deleted after a day without use.'
                       ) = 'persistent',
            git_url: said(str | None, 'Repository to clone into the project.') = None,
            git_branch: said(str | None, 'Branch, tag or commit of it.') = None,
            env: said(dict[str, str] | None, 'Environment variables for all that runs in it.') = None,
            ports: said(list[int] | None, 'Container ports to publish on the host.') = None,
            setup: said(str | None, 'Command line to run in the new project.') = None,
            ttl: said(int | None, 'Seconds after which it is deleted; omit for never.') = None) -> Workspace:
        """Create a workspace, clone `git_url`, run `setup`, and return when it is ready. The first one of a
        template may take minutes. A clone that fails is an error; `warnings` tells of a setup that did."""
        body = without_none({
            'name': name, 'template': template, 'type': type, 'gitUrl': git_url, 'gitBranch': git_branch,
            'env': env, 'ports': ports, 'setup': setup, 'ttl': ttl})

        def work(remote):
            made = remote.call('POST', '/api/workspaces', body)
            remote.until_running(made['id'], progress_to(ctx))
            return workspace_of(remote.call('GET', path_of(made['id'])))
        return await self._talk(work)

    async def show_workspace(self, workspace: Name) -> Workspace:
        """Show a workspace: its status, where its editor, SSH and ports are, and in `error` why it failed."""
        return workspace_of(await self._call('GET', path_of(workspace)))

    async def start_workspace(self, workspace: Name) -> Workspace:
        """Start a stopped workspace, and wait until it runs; read_workspace_log tells why that failed."""
        return await self._become(workspace, 'start', 'running')

    async def stop_workspace(self, workspace: Name) -> Workspace:
        """Stop a workspace, with all that runs in it. It keeps its files and can be started again, but a
        temporary one is deleted by this."""
        return await self._become(workspace, 'stop', 'stopped')

    async def _become(self, workspace, verb, status):
        return workspace_of(await self._call('POST', path_of(workspace, verb), query={'wait': status},
                                             timeout=None))

    async def delete_workspace(self, workspace: Name) -> str:
        """Permanently delete a workspace, running or not, and all its files. See git_status for unpushed work
        first."""
        return f"{(await self._call('DELETE', path_of(workspace)))['name']} is deleted."

    async def read_workspace_log(self, workspace: Name,
                                 tail: said(int, 'How many lines.', ge=1, le=1000) = 100) -> str:
        """Read the last lines of a workspace's own log (set-up, editor, SSH), also of one that failed. For
        log files use read_file, for what a command prints read_command."""
        return await self._text(path_of(workspace, 'logs'), {'tail': tail})

    # Commands

    async def run_command(
            self, workspace: Name,
            command: CommandLine, cwd: Cwd = None, env: Env = None,
            stdin: said(str | None, 'Text for its standard input.') = None,
            timeout: said(float, 'Seconds after which it is killed, with all it started.', gt=0,
                          le=3600) = 120) -> Output:
        """Run a command in a workspace, and wait for its end. Of very long output the middle is left out. For
        servers, and for what takes more than two minutes, use start_command."""
        body = {'command': command, 'cwd': cwd, 'env': env, 'stdin': stdin, 'timeout': timeout}
        done = await self._call('POST', path_of(workspace, 'exec'), without_none(body), timeout=None)
        stdout, stderr = (capped(done[name], done['encoding']) for name in ('stdout', 'stderr'))
        notes = [f'It was ended after {timeout:g} s.'] if done['timedOut'] else []
        if done['truncated'] or len(done['stdout']) + len(done['stderr']) > len(stdout) + len(stderr):
            notes.append('Some of what it printed is left out: let it print to a file, and read that with '
                         'read_file, or use start_command and read_command.')
        return Output(done['exitCode'], stdout, stderr, ' '.join(notes))

    async def start_command(self, workspace: Name, command: CommandLine, cwd: Cwd = None,
                            env: Env = None) -> Background:
        """Start a command in the background of a workspace, and return its exec_id at once. read_command
        reads what it prints, stop_command ends it."""
        begun = await self._call('POST', path_of(workspace, 'exec'),
                                 without_none({'command': command, 'cwd': cwd, 'env': env,
                                               'detach': True}))
        return Background(begun['execId'], begun['state'])

    async def list_commands(self, workspace: Name) -> list[Background]:
        """List the background commands of a workspace, also those that have ended."""
        found = await self._call('GET', path_of(workspace, 'exec'))
        return [Background(item['execId'], item['state'], item['exitCode'], command=item['command'])
                for item in found]

    async def read_command(
            self, workspace: Name, exec_id: ExecId,
            after: said(int, 'The `next` of the last answer; 0 reads from the beginning.', ge=0) = 0,
            wait: said(float, 'Seconds to wait for new output or the end.', ge=0, le=600) = 5) -> Background:
        """Read what a background command has printed since `after`, stdout and stderr as they came, and
        whether it runs or has ended. At most 30,000 bytes at a time."""
        path, until = path_of(workspace, 'exec', quoted(exec_id)), time.monotonic() + wait

        def work(remote):
            while True:
                found, data = remote.call('GET', path), b''
                with remote.open('GET', f'{path}/output', query={'after': after}) as answer:
                    for piece in answer.pieces():
                        data += piece
                        if len(data) > MAX_TEXT:
                            break
                if data or found['state'] != 'running' or time.monotonic() > until:
                    text = data[:MAX_TEXT]
                    return Background(exec_id, found['state'], found['exitCode'],
                                      text.decode('utf-8', 'replace'), after + len(text))
                time.sleep(0.3)
        return await self._talk(work)

    async def stop_command(self, workspace: Name, exec_id: ExecId) -> str:
        """Tell a background command, and all it has started, to end. What it printed can still be read."""
        await self._call('POST', path_of(workspace, 'exec', quoted(exec_id), 'signal'), {'signal': 'TERM'})
        return f'{exec_id} was told to end.'

    # Files

    async def list_files(self, workspace: Name, path: FilePath = '') -> list[Entry]:
        """List what is in a folder of a workspace, hidden files too, but not what is in folders below it."""
        if await self._talk(is_folder, workspace, path) is False:
            raise ToolError(f'{path} is a file; read_file reads it.')
        found = await self._call('GET', files_path(workspace, path))
        return [Entry(item['name'], item['type'], item['size']) for item in found]

    async def read_file(
            self, workspace: Name, path: FilePath,
            first_line: said(int, 'Line to begin with.', ge=1) = 1,
            lines: said(int, 'How many lines at most.', ge=1, le=1000) = 500) -> Lines:
        """Read lines of a text file in a workspace, without line numbers. `next_line` says where to go on;
        it is null at the end of the file."""

        def work(remote):
            kept, number, size = [], 0, 0
            with remote.open('GET', files_path(workspace, path), headers={'Accept': '*/*'}) as answer:
                if 'ETag' not in answer.headers:
                    raise RemoteError(f'{path or "The project"} is a folder; list_files lists it.')
                while line := answer.readline():
                    number += 1
                    if b'\0' in line:
                        raise RemoteError(f'{path} is no text; run_command can look into it.')
                    if number >= first_line + lines or size + len(line) > 10 * MAX_TEXT:
                        return Lines(''.join(kept), first_line, number - 1, number)
                    if number >= first_line:
                        kept.append(line.decode('utf-8', 'replace'))
                        size += len(line)
            return Lines(''.join(kept), first_line, number, None)
        return await self._talk(work)

    async def write_file(self, workspace: Name, path: FilePath, content: str) -> Written:
        """Write a text file in a workspace, whole; folders above it are made, what was there is replaced."""
        data = content.encode()
        await self._call('PUT', files_path(workspace, path), [data])
        return Written(path, len(data))

    async def edit_file(
            self, workspace: Name, path: FilePath,
            old: said(str, 'Exact text to replace, with its white space; it must stand there only once, '
                      'unless everywhere is true.', min_length=1),
            new: said(str, 'Text in its place; empty deletes it.'),
            everywhere: said(bool, 'Replace it wherever it stands.') = False) -> Written:
        """Replace text in a file of a workspace. Fails, writing nothing, if `old` is missing or stands there
        several times."""

        def work(remote):
            with remote.open('GET', files_path(workspace, path), headers={'Accept': '*/*'}) as answer:
                tag, size = answer.headers.get('ETag'), int(answer.headers.get('Content-Length') or 0)
                if tag is None or size > MAX_EDIT:
                    raise RemoteError(f'{path} is a folder.' if tag is None else
                                      f'{path} is too long for this; run_command can change it.')
                text = answer.read().decode('utf-8', 'surrogateescape')
            count = text.count(old)
            if count == 0 or (count > 1 and not everywhere):
                raise RemoteError(f'The old text stands in {path} {count} times, so nothing was written: '
                                  + ('give more of what is around it.' if count else 'read the file again.'))
            data = text.replace(old, new).encode('utf-8', 'surrogateescape')
            remote.call('PUT', files_path(workspace, path), [data], headers={'If-Match': tag})
            return Written(path, len(data))
        return await self._talk(work)

    async def search_files(
            self, workspace: Name, pattern: said(str, 'Extended regular expression.'), path: FilePath = '.',
            glob: said(str | None, 'Only files matching this, as *.py.') = None) -> str:
        """Search the files of a workspace for lines. Returns FILE:LINE:TEXT, at most 100 lines of a file;
        what git ignores and hidden files are left out where ripgrep is installed."""
        body = {'command': ['sh', '-c', SEARCH, 'sh', pattern, path, glob or ''], 'timeout': 60}
        done = await self._call('POST', path_of(workspace, 'exec'), body, timeout=None)
        if done['exitCode'] > 1:
            raise ToolError(done['stderr'].strip()[:500] or f"The search ended with {done['exitCode']}.")
        return capped(done['stdout'], done['encoding'])

    # Git

    async def git_status(self, workspace: Name) -> dict[str, Any]:
        """Show the branch, changed files, and how many commits are on no remote (`unpushed`)."""
        return await self._call('GET', path_of(workspace, 'git'))

    async def git_diff(
            self, workspace: Name,
            base: said(str | None, 'Commit or branch to compare with; default: the last commit.') = None,
            path: said(str | None, 'Only this file or folder.') = None) -> str:
        """Show a patch from `base` to the files as they are, new ones included. To see commits that were made
        since, give the commit before them."""
        return capped(await self._text(path_of(workspace, 'git', 'diff'), {'base': base, 'path': path}))

    # Tasks of agents

    async def start_task(
            self, workspace: Name, task: said(str, 'What the agent is to do, in words.'),
            session: said(str | None, 'Earlier session to go on with, keeping its context; omit for a new '
                          'one. Fails while that is still at work.') = None) -> Task:
        """Start a coding agent inside a workspace on a task, and return its session at once. It edits files
        and runs commands without asking. read_transcript follows it, wait_for_task waits, cancel_task ends
        it."""
        begun = await self._call('POST', '/api/agent/execute',
                                 without_none({'workspaceId': workspace, 'task': task, 'sessionId': session}))
        return Task(begun['sessionId'], 'running')

    async def list_tasks(self, workspace: Name) -> list[Task]:
        """List the sessions of agents in a workspace, with the state of the last task of each."""
        found = await self._call('GET', '/api/agent/sessions', query={'workspaceId': workspace})
        return [Task(item['id'], item['state'], title=item['title']) for item in found]

    async def wait_for_task(
            self, ctx: Context, session: SessionId,
            timeout: said(float, 'Seconds to wait at most.', gt=0, le=3600) = 50) -> Task:
        """Wait for the end of a task, and return its state and result. If it is still running nothing is
        cancelled: call again, or see its progress with read_transcript."""
        path = f'/api/agent/sessions/{quoted(session)}'

        def work(remote):
            report, is_open = progress_to(ctx), remote.call('GET', path)['state'] in OPEN
            for event in remote.events(f'/agent/sse/{quoted(session)}') if is_open else ():
                if event['type'] == 'progress':
                    report(event['data'])
                elif event['type'] in ('result', 'error') and remote.call('GET', path)['state'] not in OPEN:
                    return
        with anyio.move_on_after(timeout):
            await self._talk(work)
        found = await self._call('GET', path)
        last = found['runs'][-1]
        return Task(session, found['state'], last.get('result') or '', last.get('error') or '')

    async def read_transcript(
            self, session: SessionId,
            after: said(str | None, 'The `next` of the last answer, for what is new.') = None) -> Transcript:
        """Read what an agent said and did, oldest first, 200 lines at a time; also while it works."""
        path = f'/api/agent/sessions/{quoted(session)}'

        def work(remote):
            state = remote.call('GET', path)['state']
            found = remote.call('GET', f'{path}/events', query={'after': after, 'limit': 200})
            events = found['events']
            return Transcript([line_of(event) for event in events], state,
                              events[-1]['id'] if events else after, found['next'] is not None)
        return await self._talk(work)

    async def cancel_task(self, session: SessionId) -> Task:
        """Cancel the task of a session, with all it runs; it ends within seconds. Its changes stay."""
        found = await self._call('POST', f'/api/agent/sessions/{quoted(session)}/cancel')
        return Task(session, found['state'])

    # Resources

    async def log_resource(self, workspace: str) -> str:
        """The log of a workspace."""
        return await self.read_workspace_log(workspace, 1000)

    async def transcript_resource(self, session: str) -> str:
        """What an agent said and did in a session, its first 9,999 lines."""
        told = await self._call('GET', f'/api/agent/sessions/{quoted(session)}/events', query={'limit': 9999})
        return '\n'.join(map(line_of, told['events']))


TOOLS = {
    READS: ('list_workspaces', 'list_templates', 'show_workspace', 'read_workspace_log', 'list_commands',
            'read_command', 'list_files', 'read_file', 'search_files', 'git_status', 'git_diff', 'list_tasks',
            'wait_for_task', 'read_transcript'),
    ADDS: ('create_workspace',), AGAIN: ('start_workspace',),
    RUNS: ('run_command', 'start_command', 'start_task'), DESTROYS: (
        'stop_workspace', 'delete_workspace', 'stop_command', 'write_file', 'edit_file', 'cancel_task'),
}
OF_ALL = ('list_workspaces', 'list_templates', 'create_workspace', 'delete_workspace')  # not for the confined


def without_none(body):
    """Return a body without what is not given."""
    return {key: value for key, value in body.items() if value is not None}


def progress_to(ctx):
    """Return a function for a thread that reports an event of progress."""
    def report(data):
        told = data.get('message') or data.get('phase') or ''
        with contextlib.suppress(RuntimeError):  # nobody waits any more
            anyio.from_thread.run(ctx.report_progress, data.get('step', 0), data.get('total'), told)
    return report


def make_server(remote, only=None, *, read_only=False):
    """Return the MCPServer with the tools that a client may have."""
    tools = Tools(remote, only)
    server = MCPServer('agentbackend', instructions=INSTRUCTIONS, version=VERSION, log_level='WARNING')
    for kind, name in [(kind, name) for kind, names in TOOLS.items() for name in names]:
        if not (only and name in OF_ALL) and (kind == READS or not read_only):
            tool = getattr(tools, name)
            server.tool(annotations=ToolAnnotations(**HINTS[kind]), description=inspect.getdoc(tool))(
                tools.confined(tool))
    for uri, name, resource in (('workspaces/{workspace}/log', 'log', tools.log_resource),
                                ('sessions/{session}/transcript', 'transcript', tools.transcript_resource)):
        server.resource(f'agentbackend://{uri}', name=name, mime_type='text/plain')(tools.confined(resource))
    return server


def guarded(app, token):
    """Return an ASGI application that asks for the API's token."""
    async def answer(scope, receive, send):
        shown = dict(scope.get('headers', ())).get(b'authorization', b'')
        if scope['type'] != 'http' or hmac.compare_digest(shown, f'Bearer {token}'.encode()):
            await app(scope, receive, send)
            return
        await send({'type': 'http.response.start', 'status': 401,
                    'headers': [(b'content-type', b'text/plain'), (b'www-authenticate', b'Bearer')]})
        await send({'type': 'http.response.body', 'body': b'Send the API token as Authorization: Bearer.\n'})
    return answer


def serve(remote, *, token=None, port=None, workspace=None, read_only=False):
    """Serve over stdio, or HTTP on a port of loopback. Raises RemoteError when the API can't be reached."""
    remote.call('GET', path_of(workspace) if workspace else '/api/workspaces')
    server = make_server(remote, workspace, read_only=read_only)
    if port is None:
        server.run('stdio')
        return
    import uvicorn
    app = server.streamable_http_app(transport_security=TransportSecuritySettings(
        allowed_hosts=HOSTS, allowed_origins=[f'http://{host}' for host in HOSTS]))
    uvicorn.run(guarded(app, token) if token else app, host='127.0.0.1', port=port, log_level='warning')
