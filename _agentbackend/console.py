"""What the verbs of the command line share: what they say, how they fail, what they read and show."""
import contextlib
import json
import os
import re
import select
import shutil
import signal
import sys
import termios
import time
import tty

import click
from click.shell_completion import CompletionItem

from _agentbackend.remote import PIECE, Remote, RemoteError, Unreachable, amount, path_of

DEFAULT_URL = 'http://127.0.0.1:3100'
FAILED, WRONG_USE, NOT_FOUND, UNREACHABLE, INTERRUPTED = 1, 2, 3, 4, 130
HINTS = {
    'WORKSPACE_NOT_FOUND': '`agentbackend ls` lists what there is.',
    'SESSION_NOT_FOUND': '`agentbackend sessions` lists what there is.',
    'WORKSPACE_NOT_RUNNING': '`agentbackend start NAME --wait` starts it.',
    'UNAUTHORIZED': 'Set API_TOKEN, or name a file that holds the token with --token-file.',
    'FORBIDDEN': 'AGENTBACKEND_URL has to have a name that the server knows (its ALLOWED_HOSTS).',
    '': 'Start a server with `agentbackend serve`, or say where it is: AGENTBACKEND_URL (now %s).',
}
LEAVE = b'\x1d'  # Ctrl-]


# ---------------------------------------------------------------------------------------------
# Verbs
# ---------------------------------------------------------------------------------------------


class Talk:
    """What a verb says and asks, and with whom."""

    def __init__(self):
        self.url = os.environ.get('AGENTBACKEND_URL') or DEFAULT_URL
        self.token = os.environ.get('API_TOKEN')
        self.json = self.quiet = False
        self._told = None

    @property
    def remote(self):
        """The server; a new one for each use, since nothing is kept between calls."""
        return Remote(self.url, self.token, self.note)

    def say(self, value, shown=None):
        """Print an answer: as JSON where that is asked for, else as it is shown."""
        if self.json:
            click.echo(json.dumps(value, ensure_ascii=False))
        elif shown is not None:
            click.echo(shown)

    def note(self, text):
        """Tell what goes on, on stderr."""
        if not self.quiet:
            self.clear()
            click.echo(f'agentbackend: {text}', err=True)

    def step(self, text):
        """Tell how far it is: in one line of a terminal, else in a line for each text that differs."""
        if self.quiet or self.json or text == self._told:
            return
        self._told = text
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            click.echo(f'\r\x1b[K{text[:max(width, 1)]}', err=True, nl=False)
        else:
            click.echo(text, err=True)

    def clear(self):
        """Take away what `step` has left in its line."""
        if self._told is not None and sys.stderr.isatty():
            click.echo('\r\x1b[K', err=True, nl=False)
        self._told = None


def fail(talk, error):
    """Print an error, and return the exit code that stands for it."""
    talk.clear()
    hint = HINTS.get(error.code, '').replace('%s', talk.url)
    click.echo('\n  '.join([f'agentbackend: {error}', *error.about, *filter(None, [hint])]), err=True)
    if isinstance(error, Unreachable):
        return UNREACHABLE
    if error.code.endswith('_NOT_FOUND'):
        return NOT_FOUND
    return WRONG_USE if error.code in ('VALIDATION_ERROR', 'WRONG_USE') else FAILED


class Verb(click.Command):
    """A command with the options of all, an example in its help, and the exit codes of the table."""

    def __init__(self, *args, example='', **options):
        epilog = '\b\nExample:\n' + '\n'.join(f'  {line}' for line in example.splitlines())
        super().__init__(*args, epilog=epilog, **options)
        self.params += [
            click.Option([*names], is_flag=True, expose_value=False, callback=keep, help=text)
            for *names, text in (('--json', 'Print JSON: one object, or one in each line of a stream.'),
                                 ('-q', '--quiet', 'Say nothing of what goes on.'))]

    def invoke(self, context):
        """Do what the verb does, and end with the right code."""
        talk = context.find_object(Talk)
        try:
            context.exit(super().invoke(context) or 0)
        except RemoteError as error:
            context.exit(fail(talk, error))
        except KeyboardInterrupt:
            talk.clear()
            context.exit(INTERRUPTED)
        finally:
            talk.clear()


def keep(context, parameter, value):
    """Keep an option of all verbs where `Talk` has it."""
    setattr(context.find_object(Talk), parameter.name, value)


def named(path, field):
    """Return a function that completes the names which a list of the API has."""
    def complete(context, parameter, incomplete):
        try:
            talk = context.find_object(Talk) or Talk()
            return [CompletionItem(item[field]) for item in talk.remote.call('GET', path, timeout=3)
                    if item[field].startswith(incomplete)]
        except RemoteError:
            return []
    return complete


# ---------------------------------------------------------------------------------------------
# Words and tables
# ---------------------------------------------------------------------------------------------


def pairs(values, option):
    """Return options of the form NAME=VALUE as a dict."""
    wrong = [value for value in values if '=' not in value]
    if wrong:
        raise click.BadParameter(f'{wrong[0]!r} is not of the form NAME=VALUE.', param_hint=option)
    return dict(value.split('=', 1) for value in values)


def table(found, **columns):
    """Return objects as columns, each of which is a field or a function of the object, under their heads."""
    def cell(item, column):
        value = column(item) if callable(column) else item[column]
        return '-' if value in (None, '') else str(value)
    rows = [[*columns], *([cell(item, column) for column in columns.values()] for item in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return '\n'.join('  '.join(map(str.ljust, row, widths)).rstrip() for row in rows)


def facts(value):
    """Return an object as lines of names and values, without what is empty."""
    shown = {key: item for key, item in value.items() if item not in (None, '', {}, [])}
    width = max(map(len, shown), default=0)
    return '\n'.join(f'{key.ljust(width)}  {item if isinstance(item, str) else json.dumps(item)}'
                     for key, item in shown.items())


def since_of(text):
    """Return a point in time as the API takes it; `10m` is ten minutes ago."""
    match = re.fullmatch(r'(\d+)([smhd])', text or '')
    seconds = {'s': 1, 'm': 60, 'h': 3600, 'd': 86400}
    return str(int(time.time()) - int(match[1]) * seconds[match[2]]) if match else text


def told_progress(data):
    """Return an event of progress, or a line of a log, as a line."""
    of = f"[{data['step']}/{data['total']}] " if 'step' in data else ''
    return of + click.unstyle(data.get('message') or data.get('phase') or '')


def summary(workspace):
    """Return what a person needs of a workspace."""
    shown = {key: workspace.get(key) for key in (
        'name', 'id', 'status', 'type', 'template', 'codeServerUrl', 'codeServerPassword', 'sshCommand',
        'ports', 'gitUrl', 'gitBranch', 'labels', 'error', 'warnings', 'pending', 'expiresAt')}
    used = workspace.get('resources') or {}
    if used:
        shown['uses'] = (f"{used['cpuPercent']:.0f} % CPU, {amount(used['memoryUsage'])} of "
                         f"{amount(used['memoryLimit'])}")
    return facts(shown)


def told(event):
    """Return an event as a line."""
    data = event['data']
    text = {'status': lambda: ' '.join(filter(None, [data['status'], data.get('error')])),
            'progress': lambda: told_progress(data),
            'log': lambda: ' '.join(data[key] for key in ('tool', 'message', 'status') if data.get(key)),
            }.get(event['type'], lambda: data.get('message', ''))()
    return f"{event['type']:<8}  {event.get('sessionId', '')}{': ' if 'sessionId' in event else ''}{text}"


# ---------------------------------------------------------------------------------------------
# Terminals
# ---------------------------------------------------------------------------------------------


def terminal_of(talk, workspace, name, command):
    """Look at a terminal in this terminal until it ends, and return its exit status; a lost connection comes
    back by itself."""
    if not sys.stdin.isatty() or not sys.stdout.isatty():
        raise click.UsageError('This needs a terminal; `agentbackend exec` without -t needs none.')
    before, seen, typed = termios.tcgetattr(0), False, b''
    resized = os.pipe()
    old = signal.signal(signal.SIGWINCH, lambda *_: os.write(resized[1], b'w'))
    try:
        tty.setraw(0, termios.TCSADRAIN)  # what is typed ahead is kept
        while True:
            try:
                with contextlib.closing(talk.remote.websocket(path_of(workspace, 'terminal'), {
                        'name': name, 'command': command or None, **screen()})) as sock:
                    seen, waiting, typed = True, typed, b''
                    return look(sock, resized[0], waiting)
            except Unreachable as error:
                if not seen:
                    raise
                if error.code == 'LOST':
                    click.echo('\r\n[connection lost; trying again, Ctrl-] leaves]\r\n', err=True, nl=False)
                typed += os.read(0, PIECE) if select.select([0], [], [], 1)[0] else b''
                if LEAVE in typed:
                    return 0
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)
        signal.signal(signal.SIGWINCH, old)
        for file in resized:
            os.close(file)


def screen():
    """Return the size of this terminal, as the API takes it."""
    columns, rows = shutil.get_terminal_size()
    return {'cols': min(max(columns, 1), 1000), 'rows': min(max(rows, 1), 1000)}


def look(sock, resized, typed):
    """Pass on what is typed and printed until the program ends, or Ctrl-] leaves it; return the exit status.
    `resized` is a file that can be read when this terminal has another size; `typed` was typed before."""
    if typed:
        sock.send(typed)
    while True:
        for file in select.select([0, resized, sock], [], [])[0]:
            if file == 0:
                typed = os.read(0, PIECE)
                if not typed or LEAVE in typed:
                    return 0
                sock.send(typed)
            elif file == resized:
                os.read(resized, 100)
                sock.send(json.dumps({'type': 'resize', **screen()}))
            else:
                ended = show_printed(sock)
                if ended is not None:
                    return ended


def show_printed(sock):
    """Print what a terminal sends; return the exit status when it has ended."""
    while True:
        message = sock.receive()
        if isinstance(message, bytes):
            sys.stdout.buffer.write(message)
            sys.stdout.flush()
        elif (said := json.loads(message))['type'] == 'exit':
            return said['exitCode']
        elif said['type'] == 'error':
            raise RemoteError(said['message'], said['code'])
        if not sock.waiting:
            return None
