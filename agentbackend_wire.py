"""What goes over the wire, and knows nothing of workspaces.

Turns        how a greenlet that is never without work lets others work too
WebSockets   gevent-websocket with real close codes, limits and one lock for all who send
Connections  pywsgi with the time limits that it lacks
Log lines    the format in which the engine sends the output of a container
"""
import base64
import binascii
import contextlib
import functools
import re
import struct
import time
from datetime import datetime

import gevent
import gevent.lock
import gevent.pywsgi
from gevent import socket
from geventwebsocket.exceptions import ProtocolError, WebSocketError
from geventwebsocket.handler import WebSocketHandler
from geventwebsocket.websocket import Header, Stream, WebSocket

# ---------------------------------------------------------------------------------------------
# Turns
# ---------------------------------------------------------------------------------------------

TURN = 0.005  # seconds of work before others are let on


class Turn:
    """The time that a greenlet takes for its work before others are let on: while there is data, gevent never switches by itself."""

    __slots__ = ('_begun',)

    def __init__(self):
        self._begun = time.monotonic()

    def pass_on(self):
        """Let others have theirs if this one is over."""
        if time.monotonic() - self._begun > TURN:
            gevent.sleep(0)
            self._begun = time.monotonic()


def politely(items):
    """Yield what an iterator gives, and let others have their turn now and then."""
    turn = Turn()
    for item in items:
        yield item
        turn.pass_on()


# ---------------------------------------------------------------------------------------------
# WebSockets
# ---------------------------------------------------------------------------------------------

SEND_PATIENCE = 10  # seconds a peer may take to accept a piece of what is sent
PIECE = 65536  # bytes
CLOSE_PATIENCE = 2  # seconds we wait for the other side's close frame
NORMAL, GOING_AWAY, PROTOCOL_ERROR, BAD_DATA, POLICY, TOO_BIG = 1000, 1001, 1002, 1007, 1008, 1009


class MessageTooBig(Exception):
    """A message is larger than the server takes."""


def text_frame(data):
    """Return UTF-8 bytes as one WebSocket text frame, as a server sends it; the same for every client."""
    size = len(data)
    if size < 126:
        return b'\x81' + bytes((size,)) + data
    if size < 65536:
        return b'\x81\x7e' + struct.pack('!H', size) + data
    return b'\x81\x7f' + struct.pack('!Q', size) + data


def unmask(data, mask):
    """Return the payload of a masked frame: one XOR of two large numbers, 15 times as fast as byte after byte."""
    size = len(data)
    repeated = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(data, 'big') ^ int.from_bytes(repeated, 'big')).to_bytes(size, 'big')


class Socket(WebSocket):
    """A WebSocket. Reading belongs to one greenlet; any may send."""

    def __init__(self, environ, stream, handler):
        super().__init__(environ, stream, handler)
        self._lock = gevent.lock.RLock()  # two greenlets in one sendall end with ConcurrentObjectUseError
        self._connection = handler.socket
        self._max_message = handler.max_message
        self._left = self._max_message
        self._turn, self.last_heard = Turn(), time.monotonic()
        self.close_code = None  # what the other side or we gave as the reason of the end

    def read_message(self):
        """Read one message of at most max_message bytes, fragments included."""
        self._left = self._max_message
        return super().read_message()

    def read_frame(self):
        """Read one frame, refusing an unmasked or an oversized one before its payload is read."""
        self._turn.pass_on()
        header = Header.decode_header(self.stream)
        self.last_heard = time.monotonic()
        if header.flags:
            raise ProtocolError('reserved bits are set')
        if not header.mask:
            raise ProtocolError('a frame of a client must be masked')
        if header.opcode < 8:
            self._left -= header.length
            if self._left < 0:
                raise MessageTooBig
        payload = self.raw_read(header.length) if header.length else b''
        if len(payload) != header.length:
            raise WebSocketError('the connection ended within a frame')
        return header, unmask(payload, header.mask)

    def validate_utf8(self, payload):
        """Leave it to the decoding of the whole message: the library looks at each byte in Python, twice."""

    def _decode_bytes(self, bytestring):
        return bytestring.decode('utf-8')

    def receive(self):
        """Return the next message, or None when the connection has ended, for whatever reason."""
        try:
            return self.read_message()
        except UnicodeError:
            self.close(BAD_DATA, 'the text is not UTF-8')
        except ProtocolError as error:
            self.close(PROTOCOL_ERROR, str(error)[:100])
        except MessageTooBig:
            self.close(TOO_BIG, f'a message has at most {self._max_message} bytes')
        except (WebSocketError, OSError, AttributeError):  # AttributeError: another greenlet has closed it meanwhile
            self.abort()
        return None

    def send_frame(self, message, opcode):
        """Send one frame of bytes or text; raise WebSocketError when the peer is gone or does not take it in time."""
        data = message.encode() if isinstance(message, str) else bytes(message or b'')
        self.send_encoded(Header.encode_header(True, opcode, b'', len(data), 0) + data)

    def send_encoded(self, frames):
        """Send whole frames, any number of them, in one write."""
        with self._lock:
            if self.closed:
                raise WebSocketError('the connection is closed')
            try:
                for start in range(0, len(frames), PIECE):
                    with gevent.Timeout(SEND_PATIENCE, TimeoutError('the peer does not read')):
                        self.raw_write(frames[start:start + PIECE])
            except OSError as error:
                # Part of a frame may be on its way; nothing sensible can follow it.
                self.abort()
                raise WebSocketError(str(error)) from error

    def ping(self):
        """Ask the other side for a sign of life."""
        self.send_frame(b'', self.OPCODE_PING)

    def handle_close(self, header, payload):
        """Check the code and reason of a close frame, and answer with the same."""
        if len(payload) == 1:
            raise ProtocolError('a close frame has no payload, or a code of two bytes')
        if not payload:
            self.close_code = 1005
            self._goodbye(b'')
            return
        code, reason = struct.unpack('!H', payload[:2])[0], payload[2:].decode('utf-8')
        if not self._is_valid_close_code(code) or code > 4999:
            raise ProtocolError(f'invalid close code {code}')
        self.close_code = code
        self._goodbye(struct.pack('!H', code) + reason.encode())

    def close(self, code=NORMAL, message=''):
        """Send a close frame with its code, and wait a moment for the other side's."""
        if self.closed:
            return
        self.close_code = code
        reason = (message.decode('utf-8', 'ignore') if isinstance(message, bytes) else message or '').encode()[:123]
        self._goodbye(struct.pack('!H', code) + reason)
        # A connection that is closed with bytes unread is reset, and the peer may never see the frame.
        with contextlib.suppress(Exception), gevent.Timeout(CLOSE_PATIENCE, TimeoutError()):
            self._connection.shutdown(socket.SHUT_WR)
            while self._connection.recv(65536):
                pass
        self.abort()  # else who reads here waits for a peer that does not answer

    def abort(self):
        """End the connection without a word."""
        self.closed = True
        with contextlib.suppress(OSError, AttributeError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def _goodbye(self, payload):
        with contextlib.suppress(WebSocketError):
            self.send_frame(payload, self.OPCODE_CLOSE)
        self.closed = True

    def __del__(self):
        """Do nothing: the library would send a close frame from the garbage collector."""


# ---------------------------------------------------------------------------------------------
# Connections
# ---------------------------------------------------------------------------------------------

IDLE_PATIENCE = 75  # seconds a connection may be kept without a request
DISCARD_LIMIT = 16 * 2**20  # bytes of a refused body that are still read, so that its sender sees the answer
DISCARD_PATIENCE = 2  # seconds that this may take
READ_BUFFER = 1024  # bytes of each connection, in the place of 8 KB
# A peer that vanished without a word is found within about 15 s, whether we send to it or not.
KEEPALIVE = ((socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5),
             (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 3), (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
             (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 15_000))


def read_up_to(stream, count):
    """Return at most `count` bytes of a stream, all of them unless it ends before."""
    parts = []
    while count > 0:
        part = stream.read(min(count, 65536))
        if not part:
            break
        parts.append(part)
        count -= len(part)
    return b''.join(parts)


class Remainder:
    """What is left of a request's body after the answer, which pywsgi reads away however long it is."""

    def __init__(self, handler, stream):
        self._handler = handler
        self._stream = stream

    def _discard(self):
        # As much as its sender needs in order to see the answer, and not for long. Who still waits for a 100 sends nothing,
        # and after broken chunks nothing makes sense.
        left = 0 if self._stream.socket is not None or self._stream._chunked_input_error else DISCARD_LIMIT
        with contextlib.suppress(OSError), gevent.Timeout(DISCARD_PATIENCE, False):
            while left > 0:
                part = self._stream.read(65536)
                if not part:
                    return
                left -= len(part)
        self._handler.close_connection = True


class Handler(WebSocketHandler):
    """A connection. The server that uses it sets the class attributes.

    `request_timeout` is in seconds; `refusal(status, text)` makes the body of what is refused before the application sees it;
    `may_upgrade(environ)` tells whether a request for a WebSocket is granted. One that is not goes to the application, to be told why.
    """

    request_timeout = 10
    max_message = 2**16  # bytes

    def __init__(self, sock, address, server):
        super().__init__(sock, address, server, sock.makefile('rb', READ_BUFFER))

    @staticmethod
    def refusal(status, text):
        """Return the body that tells why a request is refused."""
        raise NotImplementedError

    @staticmethod
    def may_upgrade(environ):
        """Tell whether a WebSocket is granted."""
        raise NotImplementedError

    def read_requestline(self):
        """Read the request line; a connection on which none comes is closed."""
        if self.server.stopping:
            return ''
        self.server.idle.add(self)
        try:
            with gevent.Timeout(IDLE_PATIENCE, False):
                return super().read_requestline()
            return ''
        finally:
            self.server.idle.discard(self)

    def read_request(self, raw_requestline):
        """Read the headers, within their time."""
        with gevent.Timeout(self.request_timeout, ValueError('the headers did not come in time')):
            return super().read_request(raw_requestline)

    def get_environ(self):
        """Make the environment, and see to it that a refused body is not read to its end."""
        environ = super().get_environ()
        environ['agentbackend.socket'] = self.socket
        self.wsgi_input = Remainder(self, self.wsgi_input)
        return environ

    def handle_one_request(self):
        """Answer one request; pywsgi gives (status, raw answer) for those that it refuses."""
        result = super().handle_one_request()
        if not isinstance(result, tuple):
            return result
        reason = {'414': 'URI Too Long'}.get(result[0], 'Bad Request')
        text = {'414': 'The request line is too long.'}.get(
            result[0], 'The request is no valid HTTP, or its headers are too many or came too slowly.')
        body = self.refusal(int(result[0]), text)
        head = f'HTTP/1.1 {result[0]} {reason}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n'
        return result[0], head.encode() + body

    def upgrade_websocket(self):
        """Answer 101 only to a request that is in order, and whose path and origin are allowed."""
        if self.request_version != 'HTTP/1.1' or not is_upgrade(self.environ) or not self.may_upgrade(self.environ):
            return None
        return super().upgrade_websocket()

    def upgrade_connection(self):
        """Put a socket of ours in place of the library's."""
        result = super().upgrade_connection()
        if getattr(self, 'websocket', None) is not None:
            library = self.websocket
            self.websocket = Socket(self.environ, Stream(self), self)
            self.environ['wsgi.websocket'] = self.websocket
            self.headers = None  # which the environment has, too
            library.closed = True  # it says goodbye when it is collected
            library.raw_write = lambda data: None
        return result

    def log_request(self):
        """Log as pywsgi does, not as gevent-websocket does."""
        gevent.pywsgi.WSGIHandler.log_request(self)


def is_upgrade(environ):
    """Tell whether a request asks for a WebSocket, version 13, with a proper key."""
    if environ.get('HTTP_UPGRADE', '').lower() != 'websocket' or 'upgrade' not in environ.get('HTTP_CONNECTION', '').lower():
        return False
    try:
        key = base64.b64decode(environ.get('HTTP_SEC_WEBSOCKET_KEY', '').strip(), validate=True)
    except (binascii.Error, ValueError):
        return False
    return len(key) == 16 and environ.get('HTTP_SEC_WEBSOCKET_VERSION') == '13' and environ['REQUEST_METHOD'] == 'GET'


class WSGIServer(gevent.pywsgi.WSGIServer):
    """pywsgi on a socket that sends at once, and that finds out about peers that are gone; each connection inherits both."""

    stopping = False

    def __init__(self, *args, **options):
        self.idle = set()  # handlers that wait for a request
        super().__init__(*args, **options)

    def init_socket(self):
        """Make the listening socket with options that its connections inherit."""
        super().init_socket()
        # Headers and body are two writes, and without this the second waits 40 ms for the first to be acknowledged.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option in KEEPALIVE:
            self.socket.setsockopt(*option)

    def close(self):
        """Take no more connections, and end those that only wait for a next request: a browser keeps some for minutes."""
        super().close()
        self.stopping = True
        for handler in list(self.idle):
            with contextlib.suppress(OSError):
                handler.socket.shutdown(socket.SHUT_RD)


class Departure:
    """Calls back when the other side of a connection closes it, at no cost of a greenlet: a write alone would notice late."""

    def __init__(self, sock, callback):
        self._socket = sock
        self._callback = callback
        self._watcher = gevent.get_hub().loop.io(sock.fileno(), 1)
        self._watcher.start(self._readable)

    def _readable(self):
        try:
            left = not self._socket._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            left = True
        self.close()  # a byte is a next request on this connection, and would only be seen again and again
        if left:
            self._callback()

    def close(self):
        """Stop watching."""
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher.close()
            self._watcher = None


# ---------------------------------------------------------------------------------------------
# Log lines
# ---------------------------------------------------------------------------------------------

STDOUT, STDERR = 1, 2
STREAM_NAMES = {0: 'stdout', STDOUT: 'stdout', STDERR: 'stderr'}
MAX_LINE = 2**20  # bytes of one line; the rest of a longer one is left out


@functools.lru_cache(maxsize=4)
def parse_second(text):
    """Return the seconds since the epoch of a stamp without its fraction; lines of a log mostly share one."""
    return int(datetime.fromisoformat(text + '+00:00').timestamp())


def parse_stamp(stamp):
    """Return the nanoseconds since the epoch of one of the engine's stamps, as 2026-11-23T20:56:17.502392174Z."""
    return parse_second(stamp[:19]) * 1_000_000_000 + int(stamp[20:29])


class LogDamaged(Exception):
    """The engine says, in the midst of a log, that it can not read on; the text is what it says."""


class LogLines:
    """Takes the bytes of a log stream with stamps, and gives lines as (stream, stamp, text).

    Without a TTY the engine frames its output: one byte for the stream, three of nothing, four of length. A line over 16 KB comes
    in several frames, each with the stamp of the first. With a TTY there are no frames, and the stamps stand within the line.
    """

    def __init__(self, tty):
        self._tty = tty
        self._buffer = bytearray()
        self._parts = {}  # stream -> [stamp, bytes of the line so far]

    def feed(self, data):
        """Return the lines that are complete with these bytes."""
        self._buffer += data
        if self._tty and b'\n' not in data:
            del self._buffer[MAX_LINE + 100:]  # of a line without an end, as a progress bar makes it; the stamp stands before it
            return []
        return self._feed_tty() if self._tty else self._feed_frames()

    def end(self):
        """Return what was printed last without a line end; a container's output may end so."""
        if self._tty and self._buffer:
            self._buffer += b'\n'
            return self._feed_tty()
        return [self._line(stream, *self._parts.pop(stream)) for stream in list(self._parts)]

    def _feed_frames(self):
        lines, start, buffer = [], 0, self._buffer
        while len(buffer) - start >= 8:
            size = int.from_bytes(buffer[start + 4:start + 8], 'big')
            if len(buffer) - start - 8 < size:
                break
            self._frame(buffer[start], bytes(buffer[start + 8:start + 8 + size]), lines)
            start += 8 + size
        del buffer[:start]
        return lines

    def _frame(self, stream, payload, lines):
        if stream not in STREAM_NAMES:
            raise LogDamaged(payload.decode('utf-8', 'replace').strip())
        stamp, _, content = payload.partition(b' ')
        held = self._parts.get(stream)
        if held is not None and held[0] != stamp:
            lines.append(self._line(stream, *self._parts.pop(stream)))
            held = None
        if content.endswith(b'\n'):
            if held is not None:
                content = held[1] + content
                del self._parts[stream]
            lines.append(self._line(stream, stamp, content))
        elif held is None:
            self._parts[stream] = [stamp, bytearray(content)]
        elif len(held[1]) <= MAX_LINE:
            held[1] += content

    def _feed_tty(self):
        *complete, rest = bytes(self._buffer).split(b'\n')
        self._buffer = bytearray(rest)
        lines = []
        for line in complete:
            stamp, _, content = line.partition(b' ')
            lines.append(self._line(0, stamp, content.replace(stamp + b' ', b'')))
        return lines

    @staticmethod
    def _line(stream, stamp, content):
        try:
            at = parse_stamp(stamp.decode('ascii'))
        except ValueError as error:
            raise LogDamaged(bytes(stamp + b' ' + content)[:300].decode('utf-8', 'replace')) from error
        return (stream or STDOUT), at, bytes(content[:MAX_LINE]).decode('utf-8', 'replace').rstrip('\r\n')


def read_frames(stream):
    """Yield (stream, bytes) of what a command prints, as the engine frames it, until the connection ends."""
    while True:
        header = stream.read(8)
        if len(header) < 8:
            return
        left = int.from_bytes(header[4:], 'big')
        while left:
            data = stream.read1(min(left, 65536))
            if not data:
                return
            left -= len(data)
            yield header[0], data


class LogPosition:
    """How far a log has been read: for each stream the last stamp, and how many lines had it.

    The engine writes the two streams in any order, but each of them in the order of its stamps.
    """

    def __init__(self, stdout=(0, 0), stderr=(0, 0)):
        self._last = {STDOUT: stdout, STDERR: stderr}
        self._skip = {STDOUT: stdout[1], STDERR: stderr[1]}

    @classmethod
    def parse(cls, text):
        """Return the position that `str()` wrote; raise ValueError for anything else."""
        match = re.fullmatch(r'([0-9a-f]{1,16})(?:\+([0-9a-f]{1,8}))?-([0-9a-f]{1,16})(?:\+([0-9a-f]{1,8}))?', text)
        if not match:
            raise ValueError(f'{text!r} is no position in a log')
        stdout, stdout_count, stderr, stderr_count = (int(part or '1', 16) for part in match.groups())
        return cls((stdout, stdout_count), (stderr, stderr_count))

    def __str__(self):
        return '-'.join(f'{stamp:x}+{count:x}' if count > 1 else f'{stamp:x}' for stamp, count in (self._last[STDOUT], self._last[STDERR]))

    def copy(self):
        """Return the same position, from which reading begins again."""
        return LogPosition(self._last[STDOUT], self._last[STDERR])

    def since(self):
        """Return from where the engine must be asked to go on, in nanoseconds: a stream that was silent may come a little late."""
        stamps = sorted(stamp for stamp, _ in self._last.values())
        return stamps[0] or max(0, stamps[1] - 1_000_000_000)

    def advance(self, stream, stamp):
        """Tell whether a line is new, and count it if so. Reading again from `since()` gives each line once."""
        last, count = self._last[stream]
        if stamp > last:
            self._last[stream] = (stamp, 1)
            self._skip[stream] = 0
            return True
        if stamp < last:
            # The engine repeats lines when a log file is rotated while it is followed.
            self._skip[stream] = count
            return False
        if self._skip[stream] > 0:
            self._skip[stream] -= 1
            return False
        self._last[stream] = (last, count + 1)
        return True

    def covers(self, stream, stamp):
        """Tell whether a line of this stamp has been read."""
        return stamp <= self._last[stream][0]
