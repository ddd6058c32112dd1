"""The command line: the API's verbs for people and scripts, and the ways to start the server and the MCP one.

It is a client over HTTP. `click` reads the words, since it also completes them in three shells; `rich` would
triple the time of an `ls`, and lines are enough.
"""
import contextlib
import datetime
import os
import re
import shlex
import sys
import time

import click
from click.shell_completion import get_completion_class

from _agentbackend import VERSION
from _agentbackend.console import (
    DEFAULT_URL,
    FAILED,
    INTERRUPTED,
    Talk,
    Verb,
    facts,
    named,
    pairs,
    since_of,
    summary,
    table,
    terminal_of,
    told,
    told_progress,
)
from _agentbackend.remote import RemoteError, Unreachable, path_of, quoted

CODES = '''\b
Exit codes:
  0    done; for run and follow: the task has ended well
  1    it failed
  2    wrong use, or something that the API does not take
  3    there is no such workspace, session, file or command
  4    no server answers
  130  interrupted
exec, shell and output end as their command does.'''


# ---------------------------------------------------------------------------------------------
# What all verbs share
# ---------------------------------------------------------------------------------------------


@click.group(epilog=CODES, context_settings={'help_option_names': ['-h', '--help'], 'max_content_width': 100})
@click.version_option(VERSION, prog_name='agentbackend', message='%(prog)s %(version)s')
@click.option('--url', envvar='AGENTBACKEND_URL', default=DEFAULT_URL, show_default=True, show_envvar=True,
              help='Where the server is.')
@click.option('--token-file', metavar='FILE', help='File with the API token, in the place of API_TOKEN.')
@click.pass_context
def cli(context, url, token_file):
    """Development workspaces for people and agents, on a machine of your own.

    Without a verb it starts the server.
    """
    context.obj = Talk()
    context.obj.url = url or DEFAULT_URL
    if token_file:
        try:
            with open(token_file) as file:
                context.obj.token = file.read().strip()
        except (OSError, ValueError) as error:
            raise click.BadParameter(f'{token_file}: {getattr(error, "strerror", None) or error}', context,
                                     param_hint='--token-file') from error


def verb(example, **options):
    """Return the decorator that makes a function a verb, whose first argument is the Talk."""
    def decorate(function):
        return cli.command(cls=Verb, example=example, **options)(click.pass_obj(function))
    return decorate


NAMES = named('/api/workspaces', 'name')
WORKSPACE = click.argument('workspace', shell_complete=NAMES)
WORKSPACES = click.argument('workspaces', nargs=-1, required=True, metavar='WORKSPACE...',
                            shell_complete=NAMES)
SESSION = click.argument('session', shell_complete=named('/api/agent/sessions', 'id'))
WAIT = click.option('--wait', is_flag=True, help='Wait until it is so.')
COMMAND = click.argument('command', nargs=-1, type=click.UNPROCESSED)
AS_IS = {'context_settings': {'ignore_unknown_options': True, 'allow_interspersed_args': False}}


# ---------------------------------------------------------------------------------------------
# Workspaces
# ---------------------------------------------------------------------------------------------


@verb('agentbackend create myproject --template python --wait\n'
      'agentbackend create shop --git https://example.org/shop.git --ssh-key ~/.ssh/id_ed25519.pub --wait')
@click.argument('name')
@click.option('--template', shell_complete=named('/api/templates', 'name'), help='What it is made from.')
@click.option('--type', type=click.Choice(['persistent', 'temporary', 'agent']), help='How long it lives.')
@click.option('--git', metavar='URL', help='Repository to clone.')
@click.option('--branch', metavar='REF', help='Branch, tag or commit of it.')
@click.option('--env', multiple=True, metavar='NAME=VALUE', help='Variable of its environment.')
@click.option('--port', 'ports', multiple=True, type=int, help='Port of its to publish.')
@click.option('--ttl', type=int, metavar='SECONDS', help='When it is deleted.')
@click.option('--ssh-key', 'keys', multiple=True, type=click.File(), help='Public key that may log in.')
@click.option('--setup', metavar='COMMAND', help='Command line to run in the new project.')
@click.option('--cpus', type=float, help='Cores it may use.')
@click.option('--memory', help='Memory it may use, as 4g.')
@click.option('--label', 'labels', multiple=True, metavar='NAME=VALUE', help='Label for lists.')
@WAIT
def create(talk, name, git, branch, env, ports, keys, labels, wait, **fields):
    """Make a workspace."""
    body = {'name': name, **fields, 'gitUrl': git, 'gitBranch': branch, 'env': pairs(env, '--env'),
            'labels': pairs(labels, '--label'), 'ports': list(ports),
            'sshPublicKeys': [file.read() for file in keys]}
    body = {key: value for key, value in body.items() if value not in (None, {}, [])}
    made = talk.remote.call('POST', '/api/workspaces', body,
                            headers={'Idempotency-Key': os.urandom(16).hex()})
    if not wait:
        talk.say(made, f"{made['name']} ({made['id']}) is {made['status']}; "
                       f"`agentbackend events {made['name']}` shows how far.")
        return
    talk.remote.until_running(made['id'], lambda data: talk.step(told_progress(data)))
    talk.clear()
    found = talk.remote.call('GET', path_of(made['id']))
    talk.say(found, summary(found))


@verb('agentbackend ls --status running')
@click.option('--status', multiple=True, help='Only such, as running.')
@click.option('--type', multiple=True, help='Only such, as agent.')
@click.option('--label', multiple=True, help='Only such, as team=web.')
def ls(talk, **query):
    """List the workspaces."""
    found = talk.remote.call('GET', '/api/workspaces', query=query)
    talk.say(found, table(found, NAME='name', STATUS='status', TYPE='type', TEMPLATE='template',
                          EDITOR='codeServerPort', SSH='sshPort',
                          PORTS=lambda item: ', '.join(
                              f'{port}:{host}' for port, host in item['ports'].items()),
                          CREATED=lambda item: item['createdAt'][:16]))


@verb('agentbackend show myproject')
@WORKSPACE
def show(talk, workspace):
    """Show a workspace."""
    found = talk.remote.call('GET', path_of(workspace))
    talk.say(found, summary(found))


def change(name, becomes, text):
    """Make a verb that changes the status of workspaces."""
    @verb(f'agentbackend {name} myproject --wait', name=name, help=text)
    @WORKSPACES
    @WAIT
    def changed(talk, workspaces, wait):
        for workspace in workspaces:
            found = talk.remote.call('POST', path_of(workspace, name), timeout=None,
                                     query={'wait': becomes if wait else None})
            talk.say(found, f"{found['name']} is {found['status']}")


change('start', 'running', 'Start workspaces.')
change('stop', 'stopped', 'Stop workspaces. A temporary one is deleted by that.')
change('restart', 'running', 'Stop workspaces and start them again.')


@verb('agentbackend rm myproject')
@WORKSPACES
def rm(talk, workspaces):
    """Delete workspaces, with all their data."""
    for workspace in workspaces:
        found = talk.remote.call('DELETE', path_of(workspace))
        talk.say(found, f"{found['name']} is {'deleted' if found['deleted'] else 'being deleted'}")


@verb('agentbackend logs -f --tail 20 myproject\nagentbackend logs --since 10m myproject')
@WORKSPACE
@click.option('-f', '--follow', is_flag=True, help='Go on with what comes.')
@click.option('--tail', type=click.IntRange(0), help='Only the last lines, so many.')
@click.option('--since', help='Only lines from then on: a time, or 10m for ten minutes ago.')
def logs(talk, workspace, follow, tail, since):
    """Print the log of a workspace."""
    query = {'tail': tail, 'since': since_of(since)}
    if not follow:
        with talk.remote.open('GET', path_of(workspace, 'logs'), query=query, timeout=None) as answer:
            for line in iter(answer.readline, b''):
                if talk.json:
                    talk.say({'message': line.decode().rstrip('\n')})
                else:
                    sys.stdout.buffer.write(line)
        return
    query['tail'] = 100_000 if tail is None and since is None else tail
    for event in talk.remote.events(path_of(workspace, 'events'), query=query):
        if event['type'] == 'log' and 'sessionId' not in event:
            talk.say(event, event['data']['message'])
            sys.stdout.flush()
        elif event['data'].get('deleted'):
            return


@verb('agentbackend events myproject')
@WORKSPACE
@click.option('--tail', type=click.IntRange(0), default=0, help='How many old lines of its log come first.')
def events(talk, workspace, tail):
    """Follow what happens in a workspace: its status, its log, its tasks."""
    for event in talk.remote.events(path_of(workspace, 'events'), query={'tail': tail}):
        talk.say(event, f"{event['timestamp'][11:19]}  {told(event)}")
        if event['data'].get('deleted'):
            return


# ---------------------------------------------------------------------------------------------
# In a workspace
# ---------------------------------------------------------------------------------------------


def command_of(words):
    """Return words as the API takes a command: one is a line for the shell, several are a program and its
    arguments."""
    words = list(words[1:] if words[:1] == ('--',) else words)
    if not words:
        raise click.UsageError("Missing argument 'COMMAND...'.")
    return words[0] if len(words) == 1 else words


@verb('agentbackend exec myproject bun test\n'
      "agentbackend exec myproject 'bun test | tail -3'\n"
      'tar c . | agentbackend exec myproject -- tar x', name='exec', **AS_IS)
@click.option('-t', '--terminal', is_flag=True, help='Give it a terminal, as for an editor or a pager.')
@click.option('-d', '--detach', is_flag=True, help='Let it outlive this command, and print its id.')
@click.option('--cwd', help='Folder to begin in, relative to the project.')
@click.option('-e', '--env', multiple=True, metavar='NAME=VALUE', help='Variable of its environment.')
@click.option('--user', type=click.Choice(['dev', 'root']), help='As whom it runs.')
@click.option('--timeout', type=float, metavar='SECONDS', help='After which it is ended.')
@WORKSPACE
@COMMAND
def execute(talk, workspace, command, terminal, detach, env, **fields):
    """Run a command in a workspace.

    One word is a line for the shell, several are a program and its arguments. Its stdin is what this one is
    given, unless that is a terminal. It ends when this one does.
    """
    command = command_of(command)
    if terminal:
        line = command if isinstance(command, str) else shlex.join(command)
        name = f'exec-{os.urandom(4).hex()}'
        try:
            return terminal_of(talk, workspace, name, line)
        finally:
            with contextlib.suppress(RemoteError):
                talk.remote.call('DELETE', path_of(workspace, 'terminals', name))
    body = {key: value for key, value in fields.items() if value is not None}
    body |= {'command': command, **({'env': pairs(env, '--env')} if env else {})}
    if detach:
        begun = talk.remote.call('POST', path_of(workspace, 'exec'), {**body, 'detach': True})
        talk.say(begun, begun['execId'])
        return 0
    outputs = {1: sys.stdout.buffer, 2: sys.stderr.buffer}

    def print_output(stream, data):
        if talk.json:
            told = {'stream': {1: 'stdout', 2: 'stderr'}[stream], 'text': data.decode('utf-8', 'replace')}
            talk.say({'type': 'output', 'data': told})
        else:
            outputs[stream].write(data)
            outputs[stream].flush()
    code = talk.remote.run(workspace, body, stdin_file(), print_output)
    if talk.json:
        talk.say({'type': 'exit', 'data': {'exitCode': code}})
    return code


def stdin_file():
    """Return the file descriptor of what this command is given, None where that is a terminal or nothing."""
    try:
        file = sys.stdin.fileno()
        return None if os.isatty(file) or os.path.samestat(os.fstat(file), os.stat(os.devnull)) else file
    except (OSError, ValueError, AttributeError):
        return None


@verb('agentbackend output myproject\nagentbackend output -f myproject exec-0123456789abcdef')
@WORKSPACE
@click.argument('exec_id', required=False)
@click.option('-f', '--follow', is_flag=True, help='Go on with what comes, to the end of the command.')
def output(talk, workspace, exec_id, follow):
    """Print what a detached command has printed; without its id, list those there are."""
    if exec_id is None:
        found = talk.remote.call('GET', path_of(workspace, 'exec'))
        talk.say(found, table(found, ID='execId', STATE='state', EXIT='exitCode', STARTED='startedAt',
                              COMMAND=lambda item: item['command'][:60]))
        return 0
    path, read = path_of(workspace, 'exec', quoted(exec_id)), 0
    while True:
        try:
            query = {'follow': str(follow).lower(), 'after': read}
            with talk.remote.open('GET', f'{path}/output', query=query, timeout=None) as answer:
                for data in answer.pieces():
                    sys.stdout.buffer.write(data)
                    sys.stdout.flush()
                    read += len(data)
            found = talk.remote.call('GET', path)
            if not follow or found['state'] != 'running':
                return found['exitCode'] or 0
        except Unreachable:
            if not follow or not read:
                raise
            talk.step('connection lost; trying again')
            time.sleep(1)


@verb('agentbackend shell myproject\nagentbackend shell myproject --name build -- make watch')
@click.option('--name', default='main', show_default=True, help='By which it is found again.')
@WORKSPACE
@COMMAND
def shell(talk, workspace, command, name):
    """Open a terminal in a workspace. It goes on when you leave, with Ctrl-] or by closing the window; `exit`
    ends it."""
    return terminal_of(talk, workspace, name, shlex.join(command))


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


@verb('agentbackend cp report.txt myproject:\n'
      'agentbackend cp -  myproject:data/rows.csv < rows.csv\n'
      'agentbackend cp myproject:dist ./dist')
@click.argument('source')
@click.argument('target')
def cp(talk, source, target):
    """Copy a file or a folder into a workspace (NAME:PATH), or out of it.

    `-` is stdin or stdout; a folder is a tar there, also for a target that ends with a slash. Paths in the
    workspace are relative to the project, unless they begin with a slash.
    """
    sides = [re.fullmatch(r'([A-Za-z0-9][^:/]*):(.*)', text, re.DOTALL) for text in (source, target)]
    if bool(sides[0]) == bool(sides[1]):
        raise click.UsageError('One of the two has to be in a workspace, as NAME:PATH, the other one here.')
    from _agentbackend.transfer import Counter, download, upload
    counter = Counter(talk.step)
    if sides[1]:
        upload(talk.remote, source, *sides[1].groups(), counter)
    else:
        download(talk.remote, *sides[0].groups(), target, counter)
    if sys.stderr.isatty():
        talk.note(counter.told())
    if target != '-':
        talk.say({'bytes': counter.size})


# ---------------------------------------------------------------------------------------------
# Tasks
# ---------------------------------------------------------------------------------------------


@verb('agentbackend run myproject "Write a test for index.ts, and make it pass"')
@WORKSPACE
@click.argument('task', nargs=-1, required=True)
@click.option('--session', 'sessionId', help='Session to go on with.')
@click.option('--agent', help='Which agent.')
@click.option('--model', help='Which model of its.')
@click.option('--timeout', type=int, metavar='SECONDS', help='How long it may take.')
@click.option('--max-turns', 'maxTurns', type=int, help='How many turns it may take.')
@click.option('-d', '--detach', is_flag=True, help='Do not follow it; print the id of its session.')
def run(talk, workspace, task, detach, **fields):
    """Give an agent a task, and follow it to its end. `-` reads the task from stdin.

    ^C asks whether to cancel the task or to leave it running.
    """
    text = sys.stdin.read() if task == ('-',) else ' '.join(task)
    body = {'workspaceId': workspace, 'task': text, **{key: value for key, value in fields.items() if value}}
    begun = talk.remote.call('POST', '/api/agent/execute', body,
                             headers={'Idempotency-Key': os.urandom(16).hex()})
    if detach:
        talk.say(begun, begun['sessionId'])
        return 0
    return follow_task(talk, begun['sessionId'], after=begun['after'])


@verb('agentbackend follow session-xyz')
@SESSION
def follow(talk, session):
    """Follow a session, from its first task to the end of its last."""
    talk.remote.call('GET', f'/api/agent/sessions/{quoted(session)}')
    return follow_task(talk, session)


def follow_task(talk, session, after=None):
    """Print what a session does until none of its tasks runs; return 0 if the last one ended well."""
    path = f'/api/agent/sessions/{quoted(session)}'
    stream = talk.remote.events(f'/agent/sse/{quoted(session)}', after=after)
    while True:
        try:
            for event in stream:
                print_step(talk, event)
                if event['type'] in ('result', 'error'):
                    state = talk.remote.call('GET', path)['state']
                    if state not in ('starting', 'running', 'cancelling'):
                        return 0 if event['type'] == 'result' else FAILED
        except KeyboardInterrupt:
            talk.clear()
            ask = sys.stdin.isatty() and sys.stderr.isatty()
            if not ask or click.prompt('Cancel the task, or leave it running?', default='leave', err=True,
                                       type=click.Choice(['cancel', 'leave'])) == 'leave':
                talk.note(f'The task goes on; `agentbackend follow {session}` shows it, `agentbackend cancel '
                          f'{session}` ends it.')
                return INTERRUPTED
            talk.remote.call('POST', f'{path}/cancel')
            stream = talk.remote.events(f'/agent/sse/{quoted(session)}', after=talk.last or after)


def print_step(talk, event):
    """Print an event of a task."""
    talk.last, data = event.get('id'), event['data']
    if talk.json:
        talk.say(event)
    elif event['type'] == 'progress':
        click.echo(click.style(told_progress(data), bold=True))
    elif event['type'] in ('message', 'result'):
        click.echo(data.get('message') or '')
    elif event['type'] == 'error':
        click.echo(f"agentbackend: {data.get('message') or 'The task failed.'}", err=True)
    elif event['type'] == 'log' and not talk.quiet:
        words = (data[key] for key in ('tool', 'message') if data.get(key))
        click.echo(click.style(f"  {' '.join(words)}", dim=True))
    sys.stdout.flush()


@verb('agentbackend sessions --workspace myproject')
@click.option('--workspace', 'workspaceId', shell_complete=NAMES, help='Only of this one.')
@click.option('--state', help='Only such, as running.')
def sessions(talk, **query):
    """List the sessions of agents."""
    found = talk.remote.call('GET', '/api/agent/sessions', query=query)
    talk.say(found, table(found, ID='id', STATE='state', AGENT='agent', TASKS='runs', LAST='lastActivityAt',
                          TITLE=lambda item: item['title'][:60]))


@verb('agentbackend cancel session-xyz')
@SESSION
def cancel(talk, session):
    """Cancel the task of a session."""
    found = talk.remote.call('POST', f'/api/agent/sessions/{quoted(session)}/cancel')
    talk.say(found, f"{found['id']} is {found['state']}")


@verb('agentbackend diff myproject --base main')
@WORKSPACE
@click.option('--base', help='A commit to compare with, in the place of the last one.')
@click.argument('path', required=False)
def diff(talk, workspace, base, path):
    """Print what has changed in a project, as a patch."""
    with talk.remote.open('GET', path_of(workspace, 'git', 'diff'), query={'base': base, 'path': path},
                          headers={'Accept': 'text/plain'}) as answer:
        for data in answer.pieces():
            sys.stdout.buffer.write(data)


# ---------------------------------------------------------------------------------------------
# The server
# ---------------------------------------------------------------------------------------------


@verb('agentbackend templates')
def templates(talk):
    """List the templates that workspaces are made from."""
    found = talk.remote.call('GET', '/api/templates')
    talk.say(found, table(found, NAME='name', IMAGE='state', WHAT='description',
                          DEFAULT=lambda item: '*' if item['default'] else ' '))


@verb('agentbackend health')
def health(talk):
    """Tell how the server is; the exit code is 1 when it is not well."""
    found = talk.remote.health()
    lines = {key: found[key] for key in ('status', 'version', 'docker')}
    lines['up'] = str(datetime.timedelta(seconds=found['uptime']))
    lines['workspaces'] = found.get('workspaces', {}).get('total')
    agents = found.get('agents', {}).items()
    lines |= {f'agent {name}': agent.get('reason', 'ready') for name, agent in agents}
    lines['problems'] = '\n'.join(found.get('problems', []))
    talk.say(found, facts(lines))
    return 0 if found['status'] == 'healthy' else FAILED


@verb('agentbackend open myproject', name='open')
@click.argument('workspace', required=False, shell_complete=NAMES)
def open_page(talk, workspace):
    """Open the editor of a workspace in the browser, or the dashboard."""
    if workspace is None:
        talk.remote.health()
        shown, password = f'{talk.url}/', None
    else:
        found = talk.remote.call('GET', path_of(workspace))
        if found['status'] != 'running':
            raise RemoteError(f"{found['name']} is {found['status']}.", 'WORKSPACE_NOT_RUNNING')
        shown, password = found['codeServerUrl'], found['codeServerPassword']
    talk.say({'url': shown, **({'password': password} if password else {})},
             shown + (f'\nIts password: {password}' if password else ''))
    if not talk.json:
        import webbrowser
        webbrowser.open(shown)


@verb('eval "$(agentbackend completion bash)"')
@click.argument('which', type=click.Choice(['bash', 'zsh', 'fish']), metavar='[bash|zsh|fish]')
def completion(talk, which):
    """Print the script that completes verbs, options and names of workspaces in a shell."""
    click.echo(get_completion_class(which)(cli, {}, 'agentbackend', '_AGENTBACKEND_COMPLETE').source())


@verb('API_TOKEN=secret HOST=0.0.0.0 agentbackend serve')
def serve(talk):
    """Start the server. Environment variables are its settings; the README lists them."""
    from importlib.util import find_spec
    door = find_spec('agentbackend').origin
    os.execv(sys.executable, [sys.executable, door])  # gevent has to be the first that it imports


@verb('agentbackend mcp --workspace myproject\nagentbackend mcp --http 3200')
@click.option('--http', type=click.IntRange(1, 65535), metavar='PORT', help='Serve HTTP on it.')
@click.option('--workspace', shell_complete=NAMES, help='Confine the client to this one.')
@click.option('--read-only', is_flag=True, help='Offer only what changes nothing.')
def mcp(talk, http, workspace, read_only):
    """Serve workspaces to an agent of yours, over the Model Context Protocol."""
    from importlib.util import find_spec
    if find_spec('mcp') is None:
        raise RemoteError("This needs the package mcp: pip install 'agentbackend[mcp]'.", 'WRONG_USE')
    from _agentbackend.mcp import serve as serve_mcp
    serve_mcp(talk.remote, token=talk.token, port=http, workspace=workspace, read_only=read_only)


def main():
    """Run a verb; without one, the server."""
    cli.main(sys.argv[1:] or ['serve'], prog_name='agentbackend')
