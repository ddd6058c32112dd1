"""The MCP server: workspaces as tools of an agent that runs somewhere else, in a process of its own.

It is a client over HTTP like the command line, and asyncio, as the official package `mcp` wants it; each call
of a tool talks with the API in a thread of its own, whose connections are cut when the call is cancelled.
"""
import contextlib
import functools
import hmac
from dataclasses import dataclass, field
from typing import Annotated, Any

import anyio
import anyio.from_thread
import anyio.to_thread
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.transport_security import TransportSecuritySettings
from mcp.types import ToolAnnotations
from pydantic import Field

from _agentbackend import VERSION
from _agentbackend.remote import RemoteError, files_path, path_of, quoted
from _agentbackend.transfer import is_folder

INSTRUCTIONS = '''Workspaces are Linux containers with an editor, git and the tools of a template, in which \
you run commands and edit files. A workspace is named by its name or id; paths are relative to its project \
unless they begin with a slash. Begin with list_workspaces or create_workspace. What is deleted is gone for \
ever.'''
MAX_TEXT = 30_000  # characters of one output that an answer holds
MAX_EDIT = 2**21  # bytes of a file that is edited
MAX_LINES = 1000
HOSTS = [f'{host}:*' for host in ('127.0.0.1', 'localhost', '[::1]')]
READS = ToolAnnotations(readOnlyHint=True, openWorldHint=False)
CHANGES = ToolAnnotations(readOnlyHint=False, destructiveHint=False, openWorldHint=False)
AGAIN = ToolAnnotations(readOnlyHint=False, destructiveHint=False, idempotentHint=True, openWorldHint=False)
DESTROYS = ToolAnnotations(readOnlyHint=False, destructiveHint=True, idempotentHint=True,
                           openWorldHint=False)
RUNS = ToolAnnotations(readOnlyHint=False, destructiveHint=True, openWorldHint=True)
SEARCH = r'''
if command -v rg >/dev/null; then exec rg -n --no-heading -m 100 ${3:+-g "$3"} -e "$1" -- "$2"; fi
exec grep -rnIE -m 100 ${3:+--include="$3"} -e "$1" -- "$2"
'''



def said(kind, description, **limits):
    """Return the type of an argument, with what a model is told of it."""
    return Annotated[kind, Field(description=description, **limits)]


Name = said(str, 'Name or id of the workspace.')
FilePath = said(str, 'Path, relative to the project unless it begins with a slash.')
ExecId = said(str, 'exec_id of a command that was started in the background.')
SessionId = said(str, 'Id of the session, as start_task gives it.')


@dataclass
class Workspace:
    """A workspace."""

    name: str
    id: str
    status: str
    type: str
    template: str
    ports: dict[str, int] = field(default_factory=dict)
    editor_url: str | None = None
    editor_password: str | None = None
    ssh_command: str | None = None
    git_url: str | None = None
    expires_at: str | None = None
    error: str | None = None
    warnings: list[str] = field(default_factory=list)


@dataclass
class Output:
    """What a command has printed. `note` says what is missing, and how to get it."""

    exit_code: int | None
    stdout: str
    stderr: str
    note: str = ''


@dataclass
class Background:
    """A command in the background. `next` is what `after` has to be for what follows."""

    exec_id: str
    state: str
    exit_code: int | None = None
    output: str = ''
    next: int = 0


@dataclass
class Entry:
    """A file or folder; size in bytes."""

    name: str
    type: str
    size: int


@dataclass
class Lines:
    """Lines of a file. `next_line` is where what follows begins, null at the end."""

    content: str
    first_line: int
    last_line: int
    next_line: int | None


@dataclass
class Written:
    """A file that was written; size in bytes."""

    path: str
    size: int


@dataclass
class Task:
    """A task of an agent, and what it has said."""

    session: str
    state: str
    result: str = ''
    error: str = ''


@dataclass
class Transcript:
    """What a session has said and done. `next` is what `after` has to be for the rest, null at the end."""

    lines: list[str]
    next: str | None


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
            about = [f"{item['path']}: {item['message']}" for item in error.details
                     if 'message' in item and item['message'] not in str(error)]
            raise ToolError('; '.join([str(error), *about])) from error
        finally:
            remote.cut()

    async def _call(self, *args, **options):
        return await self._talk(lambda remote: remote.call(*args, **options))

    def confined(self, tool):
        """Return a tool that refuses what belongs to another workspace than the one it is confined to."""
        @functools.wraps(tool)
        async def checked(*args, **options):
            wanted = options.get('workspace')
            if 'session' in options and options['session'] is not None:
                found = await self._call('GET', f"/api/agent/sessions/{quoted(options['session'])}")
                wanted = found['workspaceId']
            if wanted is not None:
                only = await self._call('GET', path_of(self._only))
                if wanted not in (only['id'], only['name']):
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
            template: said(str | None, 'As list_templates has it.') = None,
            type: said(str | None, 'persistent, temporary (is deleted when it stops) or agent (is deleted '
                       'when nobody uses it).') = None,
            git_url: said(str | None, 'Repository to clone.') = None,
            git_branch: said(str | None, 'Branch, tag or commit of it.') = None,
            env: said(dict[str, str] | None, 'Environment variables.') = None,
            ports: said(list[int] | None, 'Ports of its to publish on the host.') = None,
            setup: said(str | None, 'Command line to run in the new project.') = None,
            ttl: said(int | None, 'Seconds after which it is deleted.') = None) -> Workspace:
        """Make a workspace, and wait until it runs. The first one of a template may take minutes."""
        body = without_none({
            'name': name, 'template': template, 'type': type, 'gitUrl': git_url, 'gitBranch': git_branch,
            'env': env, 'ports': ports, 'setup': setup, 'ttl': ttl})

        def work(remote):
            made = remote.call('POST', '/api/workspaces', body)
            remote.until_running(made['id'], progress_to(ctx))
            return workspace_of(remote.call('GET', path_of(made['id'])))
        return await self._talk(work)

    async def show_workspace(self, workspace: Name) -> Workspace:
        """Show a workspace: its status, and where its editor, SSH and ports are."""
        return workspace_of(await self._call('GET', path_of(workspace)))

    async def start_workspace(self, workspace: Name) -> Workspace:
        """Start a stopped workspace, and wait until it runs."""
        return await self._become(workspace, 'start', 'running')

    async def stop_workspace(self, workspace: Name) -> Workspace:
        """Stop a workspace; its files are kept, unless it is temporary."""
        return await self._become(workspace, 'stop', 'stopped')

    async def _become(self, workspace, verb, status):
        return workspace_of(await self._call('POST', path_of(workspace, verb), query={'wait': status},
                                             timeout=None))

    async def delete_workspace(self, workspace: Name) -> str:
        """Delete a workspace with all its files, for ever."""
        found = await self._call('DELETE', path_of(workspace))
        return f"{found['name']} is deleted."

    async def read_log(self, workspace: Name,
                       tail: said(int, 'How many lines.', ge=1, le=1000) = 100) -> str:
        """Read the last lines of what a workspace has logged since its start: its set-up, editor and SSH."""

        def work(remote):
            with remote.open('GET', path_of(workspace, 'logs'), query={'tail': tail}) as answer:
                return answer.read().decode('utf-8', 'replace')
        return await self._talk(work)

    # Commands

    async def run_command(
            self, workspace: Name,
            command: said(str, 'Command line for bash.'),
            cwd: said(str | None, 'Folder to begin in.') = None,
            env: said(dict[str, str] | None, 'Environment variables.') = None,
            stdin: said(str | None, 'What it is given to read.') = None,
            timeout: said(float, 'Seconds it may take.', gt=0, le=3600) = 120) -> Output:
        """Run a command in a workspace, and wait for its end. For servers and whatever takes long, use
        start_command."""
        body = {'command': command, 'cwd': cwd, 'env': env, 'stdin': stdin, 'timeout': timeout}
        done = await self._call('POST', path_of(workspace, 'exec'), without_none(body), timeout=None)
        stdout, stderr = (capped(done[name], done['encoding']) for name in ('stdout', 'stderr'))
        notes = [f'It was ended after {timeout:g} s.'] if done['timedOut'] else []
        if done['truncated'] or len(done['stdout']) + len(done['stderr']) > len(stdout) + len(stderr):
            notes.append('Some of what it printed is left out: let it print to a file, and read that with '
                         'read_file, or use start_command and read_command.')
        return Output(done['exitCode'], stdout, stderr, ' '.join(notes))

    async def start_command(
            self, workspace: Name, command: said(str, 'Command line for bash.'),
            cwd: said(str | None, 'Folder to begin in.') = None) -> Background:
        """Start a command in the background of a workspace. It goes on until it ends, or is ended by
        stop_command."""
        begun = await self._call('POST', path_of(workspace, 'exec'),
                                 without_none({'command': command, 'cwd': cwd, 'detach': True}))
        return Background(begun['execId'], begun['state'])

    async def read_command(
            self, workspace: Name, exec_id: ExecId,
            after: said(int, 'Bytes that were read: the `next` of the last answer.', ge=0) = 0) -> Background:
        """Read what a command in the background has printed, and whether it has ended."""
        path = path_of(workspace, 'exec', quoted(exec_id))

        def work(remote):
            found, data = remote.call('GET', path), b''
            with remote.open('GET', f'{path}/output', query={'after': after}) as answer:
                for piece in answer.pieces():
                    data += piece
                    if len(data) > MAX_TEXT:
                        break
            data = data[:MAX_TEXT]
            return Background(exec_id, found['state'], found['exitCode'], data.decode('utf-8', 'replace'),
                              after + len(data))
        return await self._talk(work)

    async def stop_command(self, workspace: Name, exec_id: ExecId) -> str:
        """End a command in the background, with all that it has started."""
        await self._call('POST', path_of(workspace, 'exec', quoted(exec_id), 'signal'), {'signal': 'TERM'})
        return f'{exec_id} was told to end.'

    # Files

    async def list_files(self, workspace: Name, path: FilePath = '') -> list[Entry]:
        """List what is in a folder of a workspace."""
        if await self._talk(is_folder, workspace, path) is False:
            raise ToolError(f'{path} is a file; read_file reads it.')
        found = await self._call('GET', files_path(workspace, path))
        return [Entry(item['name'], item['type'], item['size']) for item in found]

    async def read_file(
            self, workspace: Name, path: FilePath,
            first_line: said(int, 'Line to begin with.', ge=1) = 1,
            lines: said(int, 'How many lines.', ge=1, le=MAX_LINES) = 500) -> Lines:
        """Read lines of a text file in a workspace."""

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
            old: said(str, 'Text that is there, exactly, with enough around it to stand there only once.',
                      min_length=1),
            new: said(str, 'What stands in its place then.'),
            everywhere: said(bool, 'Replace it wherever it stands.') = False) -> Written:
        """Replace a text in a file of a workspace. Nothing is written when somebody has changed the file
        meanwhile."""

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
            self, workspace: Name, pattern: said(str, 'Regular expression.'), path: FilePath = '.',
            glob: said(str | None, 'Only files of such names, as *.py.') = None) -> str:
        """Search the files of a workspace; answers with lines FILE:LINE:TEXT."""
        body = {'command': ['sh', '-c', SEARCH, 'sh', pattern, path, glob or ''], 'timeout': 60}
        done = await self._call('POST', path_of(workspace, 'exec'), body, timeout=None)
        if done['exitCode'] > 1:
            raise ToolError(done['stderr'].strip()[:500] or f"The search ended with {done['exitCode']}.")
        return capped(done['stdout'], done['encoding'])

    # Git

    async def git_status(self, workspace: Name) -> dict[str, Any]:
        """Tell what git knows of a project: branch, changed files, and commits that are on no remote."""
        return await self._call('GET', path_of(workspace, 'git'))

    async def git_diff(
            self, workspace: Name,
            base: said(str | None, 'Commit to compare with; the last one otherwise.') = None,
            path: said(str | None, 'Only this file or folder.') = None) -> str:
        """Show as a patch what has changed in a project, new files included."""

        def work(remote):
            with remote.open('GET', path_of(workspace, 'git', 'diff'), query={'base': base, 'path': path},
                             headers={'Accept': 'text/plain'}) as answer:
                return capped(answer.read().decode('utf-8', 'replace'))
        return await self._talk(work)

    # Tasks of agents

    async def start_task(
            self, workspace: Name, task: said(str, 'What the agent is to do, in words.'),
            session: said(str | None, 'Session to go on with; a new one otherwise.') = None) -> Task:
        """Give a coding agent in a workspace a task. It works by itself; wait_for_task waits for its end."""
        begun = await self._call('POST', '/api/agent/execute',
                                 without_none({'workspaceId': workspace, 'task': task, 'sessionId': session}))
        return Task(begun['sessionId'], 'running')

    async def wait_for_task(
            self, ctx: Context, session: SessionId,
            timeout: said(float, 'Seconds to wait.', gt=0, le=3600) = 300) -> Task:
        """Wait for the end of a task, and return its result. A state of running means that it still works."""
        def work(remote):
            report = progress_to(ctx)
            for event in remote.events(f'/agent/sse/{quoted(session)}') if is_open(remote, session) else ():
                if event['type'] == 'progress':
                    report(event['data'])
                elif event['type'] in ('result', 'error') and not is_open(remote, session):
                    return
        with anyio.move_on_after(timeout):
            await self._talk(work)
        found = await self._call('GET', f'/api/agent/sessions/{quoted(session)}')
        last = found['runs'][-1]
        return Task(session, found['state'], last.get('result') or '', last.get('error') or '')

    async def read_transcript(
            self, session: SessionId,
            after: said(str | None, 'The `next` of the last answer.') = None) -> Transcript:
        """Read what an agent said and did in a session, from the beginning on."""
        found = await self._call('GET', f'/api/agent/sessions/{quoted(session)}/events',
                                 query={'after': after, 'limit': 200})
        return Transcript([line_of(event) for event in found['events']], found['next'])

    async def cancel_task(self, session: SessionId) -> Task:
        """Cancel the task of a session. What the agent has done so far stays."""
        found = await self._call('POST', f'/api/agent/sessions/{quoted(session)}/cancel')
        return Task(session, found['state'])

    # Resources

    async def log_resource(self, workspace: str) -> str:
        """The log of a workspace."""
        return await self.read_log(workspace, 1000)

    async def transcript_resource(self, session: str) -> str:
        """What an agent said and did in a session."""
        lines, after = [], None
        while True:
            found = await self.read_transcript(session, after)
            lines, after = lines + found.lines, found.next
            if after is None:
                return '\n'.join(lines)


TOOLS = {
    'list_workspaces': READS, 'list_templates': READS, 'create_workspace': CHANGES, 'show_workspace': READS,
    'start_workspace': AGAIN, 'stop_workspace': AGAIN, 'delete_workspace': DESTROYS, 'read_log': READS,
    'run_command': RUNS, 'start_command': RUNS, 'read_command': READS, 'stop_command': DESTROYS,
    'list_files': READS, 'read_file': READS, 'write_file': DESTROYS, 'edit_file': CHANGES,
    'search_files': READS, 'git_status': READS, 'git_diff': READS, 'start_task': RUNS,
    'wait_for_task': READS, 'read_transcript': READS, 'cancel_task': DESTROYS,
}
OF_ALL = ('list_workspaces', 'list_templates', 'create_workspace', 'delete_workspace')  # not for the confined


def workspace_of(found):
    """Return a workspace of the API as the tools show it."""
    return Workspace(
        found['name'], found['id'], found['status'], found['type'], found['template'], found['ports'],
        found.get('codeServerUrl'), found.get('codeServerPassword'), found.get('sshCommand'),
        found.get('gitUrl'), found.get('expiresAt'), found.get('error'), found.get('warnings') or [])


def without_none(body):
    """Return a body without what is not given."""
    return {key: value for key, value in body.items() if value is not None}


def capped(text, encoding='utf-8'):
    """Return a text, or of a long one the beginning and the end."""
    if encoding == 'base64':
        return 'It is no text; base64 of it can be printed by a command.' if text else ''
    if len(text) <= MAX_TEXT:
        return text
    third = MAX_TEXT // 3
    return f'{text[:third]}\n[... {len(text) - 3 * third} characters left out ...]\n{text[-2 * third:]}'


def progress_to(ctx):
    """Return a function for a thread that reports an event of progress."""
    def report(data):
        told = data.get('message') or data.get('phase') or ''
        with contextlib.suppress(RuntimeError):  # nobody waits any more
            anyio.from_thread.run(ctx.report_progress, data.get('step', 0), data.get('total'), told)
    return report


def is_open(remote, session):
    """Tell whether a task of a session is still at work."""
    state = remote.call('GET', f'/api/agent/sessions/{quoted(session)}')['state']
    return state in ('starting', 'running', 'cancelling')


def line_of(event):
    """Return an event of a session as a line."""
    data = event['data']
    words = ' '.join(str(data[key]) for key in ('tool', 'message', 'status') if data.get(key))
    return f"{event['type']}: {words}"[:2000]


def make_server(remote, only=None, *, read_only=False):
    """Return the MCPServer with the tools that a client may have."""
    tools = Tools(remote, only)
    server = MCPServer('agentbackend', instructions=INSTRUCTIONS, version=VERSION, log_level='WARNING')
    for name, annotations in TOOLS.items():
        if not (only and name in OF_ALL) and (annotations is READS or not read_only):
            server.tool(annotations=annotations)(tools.confined(getattr(tools, name)))
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
    """Serve over stdio, or over HTTP on a port of loopback, until the client leaves. Raises RemoteError when
    the API can't be reached."""
    remote.call('GET', path_of(workspace) if workspace else '/api/workspaces')
    server = make_server(remote, workspace, read_only=read_only)
    if port is None:
        server.run('stdio')
        return
    import uvicorn
    app = server.streamable_http_app(transport_security=TransportSecuritySettings(
        allowed_hosts=HOSTS, allowed_origins=[f'http://{host}' for host in HOSTS]))
    uvicorn.run(guarded(app, token) if token else app, host='127.0.0.1', port=port, log_level='warning')
