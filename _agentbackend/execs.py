"""Commands that clients run in workspaces while they wait for them."""
import base64
import codecs
import contextlib
import json
import re
import secrets
import time

import gevent
import gevent.lock

from _agentbackend.access import not_running
from _agentbackend.dockerlog import STDERR, STDOUT, STREAM_NAMES
from _agentbackend.engine import USER
from _agentbackend.errors import (
    ClientLeft,
    ConflictOnEngine,
    DockerError,
    Forbidden,
    MissingOnEngine,
    TooMany,
    refusal,
)
from _agentbackend.records import AGENT, RUNNING
from _agentbackend.timing import cooperatively, with_pauses

STARTS_AT_ONCE = 16  # more only queue up inside the engine, and let others wait
LINGER = 1  # seconds that what a command left running may hold its output open
KILLED = 137  # exit status of what was killed
BEGUN, NO_FOLDER, NO_PYTHON = b'\x06', b'\x05', b'\x04'
SENT = 'sent'  # in the place of the size of a stdin that comes bit by bit
MARKED = re.compile(rb'(\+?)(\d{1,9})')  # what stands behind the word
SHORT = 65536  # bytes of output that are short
SHORT_TIME = 1  # seconds within which a command has to end for its output to be short
HEARTBEAT = 15  # seconds
HOMES = {USER: f'/home/{USER}', 'root': '/root'}
# Runs a command with the environment that a shell of dev has, in the process group that the engine gave this
# shell. When stdin ends, its reader is gone, or has had enough: then the whole group is killed, and so it is
# when the server is. At the end the status is told on stderr behind a word that nobody else knows, so that
# what the command left running keeps nobody waiting. What it is given on stdin comes first, so many bytes, or
# as it is sent, by way of PUMP.
RUN = r'''
word=$1 size=$2 folder=$3 pump=$4; shift 4
exec 3<&0
if [ "$size" = 0 ]; then exec 4</dev/null; elif [ "$size" != sent ]; then
  input=$(mktemp -p "${TMPDIR:-/tmp}") && exec 4<"$input" && rm -f "$input" || exit
  head -c "$size" <&3 >/proc/self/fd/4 && [ "$(wc -c </proc/self/fd/4)" -eq "$size" ] || exit
fi
cd "$folder" 2>/dev/null || { printf '\005'; exit 126; }
if [ "$size" = sent ]; then
  command -v python3 >/dev/null || { printf '\004'; exit 127; }
  pipe=$(mktemp -u -p "${TMPDIR:-/tmp}") && mkfifo -m 600 "$pipe" || exit
  python3 -I -S -c "$pump" "$word" "$pipe" <&3 >/dev/null & watch=$!
else
  { read -r _ <&3; kill -s KILL -- "-$$"; } >/dev/null 2>&1 4<&- & watch=$!
fi
printf '\006'
shell=/usr/local/lib/agentbackend/bash; [ -x "$shell" ] || shell=sh
if [ "$size" = sent ]; then
  (rm -f "$pipe"; exec "$shell" "$@") <"$pipe" 3<&-
else
  "$shell" "$@" <&4 3<&- 4<&-
fi
status=$?
kill "$watch"
printf '\000%s %s\n' "$word" "$status" >&2
'''
# Passes what is sent on to a pipe. It comes in pieces behind their lengths, the last one empty, and is always
# taken in, so that an end without that piece is seen at once and kills the group. How much has been passed on
# is told on stderr behind the word: so the sender never has more than a WINDOW under way.
PUMP = r'''
import os, select, signal, sys
def pump(word, pipe):
    out = os.open(pipe, os.O_WRONLY)
    os.set_blocking(out, False)
    poll, came, waiting, ended = select.poll(), bytearray(), bytearray(), False
    poll.register(0, select.POLLIN)
    while True:
        if out is not None:
            poll.register(out, select.POLLOUT if waiting else 0)
        for file, event in poll.poll():
            if file == 0:
                part = os.read(0, 65536)
                if not part:
                    return
                came += part
                while len(came) >= 4 and len(came) - 4 >= (size := int.from_bytes(came[:4], "big")):
                    waiting += came[4:4 + size]
                    del came[:4 + size]
                    ended = ended or not size
            elif event & select.POLLERR:
                poll.unregister(out)
                out = os.close(out)
            else:
                size = os.write(out, waiting[:65536])
                del waiting[:size]
                os.write(2, b"\0%s +%d\n" % (word, size))
        if out is None and waiting:
            os.write(2, b"\0%s +%d\n" % (word, len(waiting)))
            waiting.clear()
        if ended and not waiting and out is not None:
            poll.unregister(out)
            out = os.close(out)
try:
    pump(sys.argv[1].encode(), sys.argv[2])
finally:
    os.killpg(0, signal.SIGKILL)
'''


class Command:
    """A command at work. Iterate over it to read (stream, bytes) to its end, when `exit_code` is known."""

    def __init__(self, stack, attached, word, *, timeout=None, on_taken=None):
        self._stack = stack
        self._attached = attached
        self._on_taken = on_taken
        self._mark = b'\0' + word.encode() + b' '
        self._begun_at = time.monotonic()
        self._timers = [gevent.spawn_later(timeout, self._end_in_time)] if timeout else []
        self.exit_code = KILLED  # until it says otherwise
        self._ended = False
        self.timed_out = False
        self.duration_ms = 0
        self._pieces, self._early, self.first = self._split(iter(attached)), [], b''
        # The first bytes on stdout tell whether it has begun; an engine that could not run it says why. What
        # is printed on stderr may come before them.
        for stream, data in self._pieces:
            if stream != STDERR:
                self.first = data
                break
            self._early.append((stream, data))

    def __iter__(self):
        """Yield (stream, bytes) of what it prints until it has ended."""
        yield from self._early
        if self.first[1:]:
            yield STDOUT, self.first[1:]
        yield from cooperatively(self._pieces)
        self.duration_ms = int((time.monotonic() - self._begun_at) * 1000)

    def send(self, data):
        """Give it some bytes of a stdin that comes bit by bit; none are its end. Raises OSError when it has
        ended."""
        self._attached.sendall(len(data).to_bytes(4, 'big') + data)

    def cut(self):
        """End the command with its process group; from whichever greenlet."""
        self._attached.cut()

    def close(self):
        """End it if it still runs, and put everything away; twice is fine."""
        for timer in self._timers:
            timer.kill(block=False)
        self._attached.cut()
        self._stack.close()

    def _end_in_time(self):
        self.timed_out = True
        self.cut()

    def _split(self, pieces):
        """Yield the pieces without the marks, and take note of what stands behind them: how much of stdin was
        taken, and at last the status."""
        held = b''
        for stream, data in pieces:
            if stream != STDERR:
                yield stream, data
                continue
            said, held = self._apart(held + data)
            if said:
                yield stream, said
            if self._ended:
                self._timers.append(gevent.spawn_later(LINGER, self.cut))
                break
        yield from ((stream, data) for stream, data in pieces if stream != STDERR)
        if held and not held.startswith(self._mark):
            yield STDERR, held

    def _apart(self, data):
        """Return (what the command said, what may be the beginning of a mark), and obey the marks between."""
        said = b''
        while not self._ended:
            before, mark, rest = data.partition(self._mark)
            said += before
            line, newline, data = rest.partition(b'\n')
            if not mark:
                kept = self._beginning(said)
                return said[:len(said) - kept], said[len(said) - kept:]
            if not newline:
                return said, mark + rest
            match = MARKED.fullmatch(line)  # the command may know the word, and tell nonsense
            if match and match[1] and self._on_taken:
                self._on_taken(int(match[2]))
            elif match and not match[1]:
                self.exit_code, self._ended = int(match[2][:3]), True
        return said, b''

    def _beginning(self, data):
        """Return how many bytes at the end of `data` may be the beginning of the mark."""
        return next((size for size in range(min(len(data), len(self._mark) - 1), 0, -1)
                     if self._mark.startswith(data[-size:])), 0)


class Execs:
    """Begins commands, and gives what they print in the form that a client asks for."""

    def __init__(self, config, state, engine, activity):
        self._config = config
        self._state = state
        self._engine = engine
        self._activity = activity
        self._starts = gevent.lock.BoundedSemaphore(STARTS_AT_ONCE)
        self._commands = {}  # of each that was admitted, its Attached once it is at work

    def close(self):
        """End all that somebody waits for: the server is stopping."""
        for attached in list(self._commands.values()):
            if attached is not None:
                attached.cut()

    def run(self, workspace, body, watch_disconnect):
        """Run a command to its end, and return {exitCode, stdout, stderr, ...}; when the client leaves, it is
        ended."""
        limit, kept, total, left = self._config.exec_max_output, {}, {}, []
        with contextlib.closing(self.begin(workspace, body)) as command, \
                contextlib.closing(watch_disconnect(lambda: left.append(command.cut()))):
            for stream, data in command:
                held = kept.setdefault(STREAM_NAMES[stream], bytearray())
                held += data[:limit - len(held)]
                total[stream] = total.get(stream, 0) + len(data)
        if left:
            raise ClientLeft('The command was ended, since its client had left.')
        truncated = any(size > limit for size in total.values())
        return {'exitCode': command.exit_code, **texts(kept, truncated), 'durationMs': command.duration_ms,
                'truncated': truncated, 'timedOut': command.timed_out}

    def begin(self, workspace, body, on_taken=None):
        """Begin a command for a checked body of POST .../exec, and return its Command.

        With `on_taken(bytes)` its stdin comes by `Command.send`, and this is told how much it took.
        """
        if workspace.status != RUNNING:
            raise not_running(workspace)
        user = body.get('user', USER)
        if user == 'root' and workspace.type == AGENT:
            raise Forbidden('A workspace of type agent runs nothing as root.')
        if len(self._commands) >= self._config.exec_max_commands:
            raise TooMany(f'EXEC_MAX_COMMANDS={self._config.exec_max_commands} commands are already running; '
                          'wait for one to finish.', headers={'Retry-After': '1'})
        data, word = stdin_of(body), secrets.token_hex(8)
        words = ['sh', '-c', RUN, 'sh', word, SENT if on_taken else str(len(data)),
                 self.folder(workspace, body), PUMP if on_taken else '', *words_of(body)]
        stack, key = contextlib.ExitStack(), object()
        self._commands[key] = None
        stack.callback(self._commands.pop, key)
        try:
            stack.enter_context(self._activity.during(workspace.id, 'exec', told(body)))
            with self._starts:
                attached = stack.enter_context(self._engine.attached(
                    self._state.container_of(workspace.id), words, user=user, env=environment(user, body)))
                sending = gevent.spawn(attached.sendall, data) if data else None
                stack.callback(lambda: sending and sending.kill())
                self._commands[key] = attached
                command = Command(stack, attached, word, timeout=body.get('timeout'), on_taken=on_taken)
            self._check_begun(command, workspace, body)
            return command
        except (MissingOnEngine, ConflictOnEngine) as error:
            stack.close()
            raise not_running(workspace, error) from error
        except BaseException:
            stack.close()
            raise

    def folder(self, workspace, body):
        """Return the folder that a command begins in: that of the project, or one relative to it."""
        project = f'{self._config.workspace_base_path}/{workspace.folder}'
        wanted = body.get('cwd', '')
        return wanted if wanted.startswith('/') else f'{project}/{wanted}'.rstrip('/')

    @staticmethod
    def _check_begun(command, workspace, body):
        if command.first[:1] == BEGUN:
            return
        rest = b''.join(data for _, data in command)
        said = (command.first + rest).decode('utf-8', 'replace').strip()
        command.close()
        if command.first[:1] == NO_FOLDER and not body.get('cwd'):
            raise refusal('cwd', "is not given, and the project's folder, in which commands begin then, is "
                                 f'missing: {workspace.folder}')
        if command.first[:1] == NO_FOLDER:
            raise refusal('cwd', f"is {json.dumps(body.get('cwd', ''))}, but there is no such folder in the "
                                 'workspace')
        if command.first[:1] == NO_PYTHON:
            raise refusal('stdin', 'comes bit by bit, which needs python3 in the image of the workspace; '
                                   'give it with the command')
        if 'unable to find user' in said:
            raise refusal('user', f"is {body.get('user', USER)}, whom the image of this workspace has not")
        if command.timed_out:
            raise DockerError('The command could not be started within its time.')
        if 'is not running' in said or not said:
            raise not_running(workspace)
        raise DockerError(said[-500:])


def words_of(body):
    """Return what the shell of the workspace is given: a text as a login shell reads it, or a program with
    its arguments."""
    command = body['command']
    return ['-lc', command] if isinstance(command, str) else ['-c', 'exec "$@"', 'sh', *command]


def stdin_of(body):
    """Return the bytes that a command is given."""
    return body.get('stdin', '').encode('utf-8', 'surrogatepass')


def told(body):
    """Return the beginning of a command, for people."""
    command = body['command']
    return (command if isinstance(command, str) else ' '.join(command))[:200]


def environment(user, body):
    """Return the variables of a command, which win over those that the workspace has."""
    env = {'HOME': HOMES[user], 'USER': user, 'LOGNAME': user, **body.get('env', {})}
    return env | {'WORKSPACE_KEEP': ' '.join(env)}


def texts(kept, truncated):
    """Return {stdout, stderr, encoding} of what was kept of a command's output."""
    found = {name: bytes(kept.get(name, b'')) for name in ('stdout', 'stderr')}
    try:
        # What was cut off may have been cut within a character.
        return {name: codecs.getincrementaldecoder('utf-8')().decode(data, not truncated)
                for name, data in found.items()} | {'encoding': 'utf-8'}
    except UnicodeError:
        return {name: base64.b64encode(data).decode() for name, data in found.items()} | {
            'encoding': 'base64'}


def events(command):
    """Yield what a command prints as events, {type, data}, and its end as the last; None when it says nothing
    for a while."""
    decoders = {name: codecs.getincrementaldecoder('utf-8')('replace') for name in STREAM_NAMES.values()}
    for item in with_pauses(command, HEARTBEAT):
        name = STREAM_NAMES[item[0]] if item else None
        text = decoders[name].decode(item[1]) if item else None
        if text or item is None:
            yield item and {'type': 'output', 'data': {'stream': name, 'text': text}}
    for name, decoder in decoders.items():
        rest = decoder.decode(b'', True)
        if rest:
            yield {'type': 'output', 'data': {'stream': name, 'text': rest}}
    yield {'type': 'exit', 'data': {'exitCode': command.exit_code, 'durationMs': command.duration_ms,
                                    'timedOut': command.timed_out}}


def short_output(command):
    """Read what a command prints on stdout while that is little and quick; return (bytes, pieces that follow,
    None when it has ended)."""
    pieces, data, deadline = with_pauses(command, SHORT_TIME / 10), b'', time.monotonic() + SHORT_TIME
    for item in pieces:
        if item and item[0] != STDERR:
            data += item[1]
        if len(data) > SHORT or time.monotonic() > deadline:
            return data, (item[1] for item in pieces if item and item[0] != STDERR)
    return data, None
