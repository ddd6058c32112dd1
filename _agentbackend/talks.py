"""WebSocket clients that each talk with one program in a workspace: a terminal, or a command."""
import contextlib
import logging
import re
import struct
import time

import gevent

from _agentbackend.dockerlog import STDERR
from _agentbackend.errors import BackendError, TooMany, ValidationError, refusal
from _agentbackend.schemas import parse_json
from _agentbackend.terminals import frame, frames_of
from _agentbackend.views import encode, view_failure
from _agentbackend.wire import BAD_DATA, GOING_AWAY, POLICY, SERVER_ERROR, WebSocketError

log = logging.getLogger('agentbackend')

MAX_MESSAGE = 2**20  # bytes that come at once, as when something is pasted
PING_PAUSE = 20  # seconds without a word until a client is asked for a sign of life
WINDOW = 2**22  # bytes of stdin that may be under way


class Listener:
    """A WebSocket client, counted among the streams: it is asked for a sign of life, and told of the end."""

    def __init__(self, backend, socket):
        self._backend = backend
        self._socket = socket

    def close(self):
        """Tell the client that the server goes away."""
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


class Talk(Listener):
    """A WebSocket client of one program: its greenlet reads what comes, another one writes what is printed.

    A subclass has `begun()`, a context manager that gives the program, anything with `cut()`;
    `take(program, message)`; and `pass_on(program)`, which ends with the program and returns the code and the
    reason of the close.
    """

    def __init__(self, backend, socket, workspace):
        super().__init__(backend, socket)
        self._workspace = workspace
        socket.take_up_to(MAX_MESSAGE)

    def run(self):
        """Serve the client until it leaves, or the program ends."""
        with self._backend.streams.opened(self):
            try:
                with self.begun() as program:
                    writing = gevent.spawn(self._write, program)
                    try:
                        self._read(program)
                    finally:
                        program.cut()
                        writing.join(5)
            except BackendError as error:
                self._refuse(error)
            finally:
                self._socket.close()

    def say(self, **message):
        """Send a message as JSON text."""
        self._socket.send_frame(encode(message)[:-1], self._socket.OPCODE_TEXT)

    def show(self, data):
        """Send what was printed."""
        self._socket.send_frame(data, self._socket.OPCODE_BINARY)

    def _read(self, program):
        while (message := self._socket.receive()) is not None:
            try:
                self.take(program, message if isinstance(message, str) else bytes(message))
            except ValidationError as error:
                self._refuse(error)
                self._socket.close(BAD_DATA, 'that is no message for this')
                return
            except OSError:
                return  # it has ended, and its end is told

    def _write(self, program):
        try:
            self._socket.close(*self.pass_on(program))
        except BackendError as error:
            self._refuse(error)
            self._socket.close(SERVER_ERROR, 'it did not begin')
        except WebSocketError as error:
            log.debug('A client of a program is gone: %s', error)

    def _refuse(self, error):
        with contextlib.suppress(WebSocketError):
            self.say(type='error', **view_failure(error))


class TerminalClient(Talk):
    """A client of a terminal, which stays when the client leaves."""

    def __init__(self, backend, socket, workspace, *, name, cols, rows, command):
        super().__init__(backend, socket, workspace)
        self._name = name
        self._how = {'cols': cols, 'rows': rows, 'command': command}

    def begun(self):
        """Join the terminal."""
        return self._backend.terminals.attached(self._workspace, self._name, **self._how)

    def take(self, attached, message):
        """Pass on what is typed, or the size of the screen."""
        if isinstance(message, str):
            size = parse_json(message.encode())
            self._backend.schemas.check('terminal-message', size, where='message')
            attached.sendall(frame(b'r', struct.pack('!HH', size['cols'], size['rows'])))
        elif message:
            attached.sendall(frame(b'd', message))

    def pass_on(self, attached):
        """Pass on what is printed, and tell the end."""
        end = SERVER_ERROR, 'the terminal was cut off'
        self.say(type='ready', name=self._name)
        for letter, data in frames_of(attached):
            if letter == b'd':
                self.show(data)
            elif letter == b'x' and re.fullmatch(rb'\d{1,3}', data):
                self.say(type='exit', exitCode=int(data))
                end = 1000, 'the program has ended'
            elif letter == b'e':
                raise TooMany(f'MAX_TERMINALS={self._backend.config.max_terminals} terminals are open in '
                              'this workspace already; end one.')
        return end


class CommandClient(Talk):
    """A client of a command, which ends when the client leaves. The first message is the command itself."""

    def __init__(self, backend, socket, workspace):
        super().__init__(backend, socket, workspace)
        self._under_way = 0  # bytes of stdin that it has not yet taken
        self._ended = False  # whether stdin is

    @contextlib.contextmanager
    def begun(self):
        """Begin the command that the client asks for."""
        message = self._socket.receive()
        if message is None:
            raise refusal('command', 'is missing: the client has left')
        body = parse_json(message.encode() if isinstance(message, str) else bytes(message))
        self._backend.schemas.check('exec', body, where='message')
        if 'detach' in body:
            raise refusal('detach', 'is for POST: a command whose client waits for it is not detached')
        self._ended = 'stdin' in body
        with contextlib.closing(self._backend.execs.begin(
                self._workspace, body, None if self._ended else self._taken)) as command:
            self.say(type='ready')
            yield command

    def take(self, command, message):
        """Give the command what it reads; an empty message is the end of that."""
        if isinstance(message, str) or self._ended:
            raise refusal('message', 'is none that a command takes: its stdin comes in binary messages, of '
                                     'which an empty one is the last')
        self._under_way += len(message)
        if self._under_way > WINDOW:
            self._socket.close(POLICY, f'more than {WINDOW} bytes are under way')
            return
        self._ended = not message
        command.send(message)

    def pass_on(self, command):
        """Pass on what it prints, behind the number of the stream, and tell the end."""
        for stream, data in command:
            self.show((b'\2' if stream == STDERR else b'\1') + data)
        self.say(type='exit', exitCode=command.exit_code, durationMs=command.duration_ms,
                 timedOut=command.timed_out)
        return 1000, 'the command has ended'

    def _taken(self, count):
        self._under_way -= count
        self.say(type='taken', bytes=count)
