"""Terminals of workspaces, and the WebSocket clients that look at them."""
import contextlib
import json
import logging
import struct
import time
from pathlib import Path

import gevent

from _agentbackend.access import not_running
from _agentbackend.dockerlog import STDERR
from _agentbackend.engine import USER
from _agentbackend.errors import (
    BackendError,
    DockerError,
    TerminalNotFound,
    TooMany,
    ValidationError,
    refusal,
)
from _agentbackend.records import RUNNING
from _agentbackend.schemas import parse_json
from _agentbackend.timing import view_time
from _agentbackend.views import encode
from _agentbackend.wire import BAD_DATA, GOING_AWAY, SERVER_ERROR, WebSocketError

log = logging.getLogger('agentbackend')

PROGRAM = (Path(__file__).parent / 'inside' / 'terminal.py').read_bytes()
# Reads no more than the program from stdin, of which the rest is for the program.
LOADER = '''import os, sys
text = b""
while len(text) < int(sys.argv[1]):
    data = os.read(0, int(sys.argv[1]) - len(text))
    if not data: sys.exit(1)
    text += data
exec(compile(text, "terminal", "exec"))
'''
MAX_MESSAGE = 2**20  # bytes that are typed at once, as when something is pasted
MAX_FRAME = 2**20  # bytes; the scrollback is the longest
MAX_LISTED = 2**20
PING_PAUSE = 20  # seconds without a word until a client is asked for a sign of life
CODES = {'TOO_MANY': TooMany}


class Terminals:
    """Finds, makes, lists and ends the terminals of workspaces, which are held inside them."""

    def __init__(self, config, engine, access, activity):
        self._config = config
        self._engine = engine
        self._access = access
        self._activity = activity

    def list(self, workspace):
        """Return what describes the terminals of a workspace."""
        if workspace.status != RUNNING:
            return []
        _, printed = self._run(workspace, 'list')
        return [{**item, 'startedAt': view_time(item['startedAt'])}
                for item in map(json.loads, printed.decode('utf-8', 'replace').splitlines())]

    def end(self, workspace, name):
        """End a terminal with all that runs in it; raise TerminalNotFound."""
        if workspace.status != RUNNING or self._run(workspace, 'end', name)[0] != 0:
            raise TerminalNotFound(name)

    @contextlib.contextmanager
    def attached(self, workspace, name, *, cols, rows, command):
        """Join a terminal for the length of a block, which is given a dockerclient.Attached."""
        if workspace.status != RUNNING:
            raise not_running(workspace)
        folder = f'{self._config.workspace_base_path}/{workspace.folder}'
        words = ['attach', name, str(cols), str(rows), folder, str(self._config.max_terminals), command]
        with self._activity.during(workspace.id, 'terminal', name), \
                self._access.container(workspace) as container_id, \
                self._engine.attached(container_id, self._words(words), user=USER) as attached:
            attached.sendall(PROGRAM)
            yield attached

    def _run(self, workspace, *words):
        with self._access.container(workspace) as container_id:
            return self._engine.run(container_id, self._words(words), user=USER, stdin=PROGRAM,
                                    limit=MAX_LISTED)

    @staticmethod
    def _words(words):
        return ['python3', '-I', '-S', '-c', LOADER, str(len(PROGRAM)), *words]


def frame(letter, data=b''):
    """Return a frame for the program inside."""
    return letter + struct.pack('!I', len(data)) + data


def frames_of(attached):
    """Yield the frames (letter, bytes) that the program inside sends."""
    buffer, said = bytearray(), b''
    for stream, data in attached:
        if stream == STDERR:
            said = (said + data)[-1000:]
            continue
        buffer += data
        while len(buffer) >= 5:
            size = struct.unpack('!I', buffer[1:5])[0]
            if size > MAX_FRAME:
                break
            if len(buffer) < 5 + size:
                break
            yield bytes(buffer[:1]), bytes(buffer[5:5 + size])
            del buffer[:5 + size]
    text = (bytes(buffer[:500]) + said).decode('utf-8', 'replace').strip()
    if 'executable file not found' in text or 'unable to find user' in text:
        raise refusal('terminal', 'needs python3 and the user dev, which the image of this workspace has not')
    if text:
        raise DockerError(f'The terminal has ended: {text[-500:]}')


class TerminalClient:
    """A WebSocket client of a terminal: its greenlet reads what is typed, another one writes what is
    printed."""

    def __init__(self, backend, socket, workspace, *, name, cols, rows, command):
        self._backend = backend
        self._socket = socket
        self._workspace = workspace
        self._name = name
        self._how = {'cols': cols, 'rows': rows, 'command': command}
        socket.take_up_to(MAX_MESSAGE)

    def run(self):
        """Serve the client until it leaves, or the terminal ends."""
        with self._backend.streams.opened(self):
            try:
                with self._backend.terminals.attached(self._workspace, self._name, **self._how) as attached:
                    writing = gevent.spawn(self._write, attached)
                    try:
                        self._read(attached)
                    finally:
                        attached.cut()
                        writing.join(5)
            except BackendError as error:
                self._refuse(error)
            finally:
                self._socket.close()

    def close(self):
        """Tell the client that the server goes away; the terminal stays."""
        self._socket.close(GOING_AWAY, 'the server is stopping')

    def check(self):
        """Drop a client that has not been heard of for long; ask one that is silent for a sign of life."""
        silent = time.monotonic() - self._socket.last_heard
        if silent > 3 * PING_PAUSE:
            self._socket.abort()
        elif silent > PING_PAUSE:
            gevent.spawn(self._ping)

    def _ping(self):
        with contextlib.suppress(WebSocketError):
            self._socket.ping()

    def _read(self, attached):
        """Pass on what is typed."""
        while (message := self._socket.receive()) is not None:
            try:
                if isinstance(message, str):
                    self._obey(attached, parse_json(message.encode()))
                elif message:
                    attached.sendall(frame(b'd', bytes(message)))
            except ValidationError as error:
                self._refuse(error)
                self._socket.close(BAD_DATA, 'a text is {"type": "resize", "cols", "rows"}')
                return
            except OSError:
                return  # it has ended, and its end is told

    def _obey(self, attached, message):
        self._backend.schemas.check('terminal-message', message, where='message')
        attached.sendall(frame(b'r', struct.pack('!HH', message['cols'], message['rows'])))

    def _write(self, attached):
        """Pass on what is printed, and tell the end."""
        try:
            code, reason = SERVER_ERROR, 'the terminal was cut off'
            self._say(type='ready', name=self._name)
            for letter, data in frames_of(attached):
                if letter == b'd':
                    self._socket.send_frame(data, self._socket.OPCODE_BINARY)
                elif letter == b'x':
                    self._say(type='exit', exitCode=int(data))
                    code, reason = 1000, 'the program has ended'
                elif letter == b'e':
                    raise TooMany(f'MAX_TERMINALS={self._backend.config.max_terminals} terminals are open in '
                                  'this workspace already; end one.')
            self._socket.close(code, reason)
        except BackendError as error:
            self._refuse(error)
            self._socket.close(SERVER_ERROR, 'there is no terminal')
        except WebSocketError as error:
            log.debug('A client of a terminal is gone: %s', error)

    def _refuse(self, error):
        with contextlib.suppress(WebSocketError):
            self._say(type='error', code=error.code, message=str(error))

    def _say(self, **message):
        self._socket.send_frame(encode(message)[:-1], self._socket.OPCODE_TEXT)
