"""WebSockets with real close codes and limits, and pywsgi with the time limits that it lacks."""
import base64
import binascii
import contextlib
import io
import re
import struct
import time

import gevent
import gevent.lock
import gevent.pywsgi
from gevent import socket
from geventwebsocket.exceptions import ProtocolError, WebSocketError
from geventwebsocket.handler import WebSocketHandler
from geventwebsocket.websocket import Header, Stream, WebSocket

from _agentbackend.timing import Turn

# ---------------------------------------------------------------------------------------------
# WebSockets
# ---------------------------------------------------------------------------------------------

SEND_TIMEOUT = 10  # seconds a peer may take to accept a piece of what is sent
PIECE = 65536  # bytes
CLOSE_TIMEOUT = 2  # seconds we wait for the other side's close frame
NORMAL, GOING_AWAY, PROTOCOL_ERROR, BAD_DATA, POLICY, TOO_BIG = 1000, 1001, 1002, 1007, 1008, 1009
SERVER_ERROR = 1011


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
    """Return the payload of a masked frame: one XOR of two large numbers, 15 times as fast as byte after
    byte."""
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

    def take_up_to(self, size):
        """Let messages have so many bytes."""
        self._max_message = size

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
        # AttributeError: another greenlet has closed it meanwhile.
        except (WebSocketError, OSError, AttributeError):
            self.abort()
        return None

    def send_frame(self, message, opcode):
        """Send one frame of bytes or text; raise WebSocketError when the peer is gone or does not take it in
        time."""
        data = message.encode() if isinstance(message, str) else bytes(message or b'')
        self.send_encoded(Header.encode_header(True, opcode, b'', len(data), 0) + data)

    def send_encoded(self, frames):
        """Send whole frames, any number of them, in one write."""
        with self._lock:
            if self.closed:
                raise WebSocketError('the connection is closed')
            try:
                for start in range(0, len(frames), PIECE):
                    with gevent.Timeout(SEND_TIMEOUT, TimeoutError('the peer does not read')):
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
            self._goodbye(b'')
            return
        code, reason = struct.unpack('!H', payload[:2])[0], payload[2:].decode('utf-8')
        if not self._is_valid_close_code(code) or code > 4999:
            raise ProtocolError(f'invalid close code {code}')
        self._goodbye(struct.pack('!H', code) + reason.encode())

    def close(self, code=NORMAL, message=''):
        """Send a close frame with its code, and wait a moment for the other side's."""
        if self.closed:
            return
        reason = (message.decode('utf-8', 'ignore') if isinstance(message, bytes) else message
                  or '').encode()[:123]
        self._goodbye(struct.pack('!H', code) + reason)
        # A connection that is closed with bytes unread is reset, and the peer may never see the frame.
        with contextlib.suppress(Exception), gevent.Timeout(CLOSE_TIMEOUT, TimeoutError()):
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

IDLE_TIMEOUT = 75  # seconds a connection may be kept without a request
DISCARD_LIMIT = 16 * 2**20  # bytes of a refused body that are still read, so that its sender sees the answer
DISCARD_TIMEOUT = 2  # seconds that this may take
READ_BUFFER = 1024  # bytes of each connection, in the place of 8 KB
# A silent peer that vanished without a word is found within about 15 s. One to which something is under way
# is given up by the kernel after some 15 minutes (tcp_retries2). A limit on that (TCP_USER_TIMEOUT) would
# also end one that lives and only pauses to read.
KEEPALIVE = ((socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5),
             (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 3), (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3))
LOOK_PAUSE = 1  # seconds between looks at a connection on which a next request waits
ESTABLISHED = 1  # state of a connection that neither side has ended, in TCP_INFO
MAX_HEADER = 65536  # bytes of all header lines together
MAX_HEADERS = 100
MAX_CHUNK_HEAD = 4096  # bytes of the line before a chunk
SPARE_CONNECTIONS = 20  # that are kept free by ending those that only wait for a next request
REQUEST_LINE = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+ [!-~\x80-\xff]+ HTTP/1\.[01]\r?\n")
HEADER_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\0]*\r?\n")
LENGTH = re.compile(rb'content-length:[ \t]*[0-9]{1,18}[ \t]*\r?\n|transfer-encoding:[ \t]*chunked[ '
                    rb'\t]*\r?\n', re.IGNORECASE)
ABSOLUTE = re.compile(r'https?://([^/?#]*)([/?].*)?', re.IGNORECASE)


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


class MalformedBody(OSError):
    """The body ends too early, or its chunks are none."""


class Body:
    """The body of a request, by its length or in chunks, as RFC 9112 has them: what a proxy might read
    otherwise is refused."""

    CHUNK = re.compile(rb'([0-9A-Fa-f]{1,16})[ \t]*(;[^\r\n\0]*)?\r\n')

    def __init__(self, handler, length, *, chunked):
        self._handler = handler
        self._left = 0 if chunked else length  # bytes of the body, or of the chunk that is being read
        self._chunked = chunked
        self._expected = handler.headers.get('Expect', '').lower() == '100-continue'
        self._broken = False

    def read(self, size):
        """Return some bytes, at most `size`; nothing at the end. Raises MalformedBody, an OSError."""
        if self._expected:
            self._expected = False
            self._handler.socket.sendall(b'HTTP/1.1 100 Continue\r\n\r\n')
        if not self._left and self._chunked:
            self._begin_chunk()
        data = self._handler.rfile.read1(min(size, self._left)) if self._left else b''
        if not data and size and self._left:
            raise self._malformed()
        self._left -= len(data)
        if self._chunked and data and not self._left and self._handler.rfile.readline(3) != b'\r\n':
            raise self._malformed()
        return data

    def _begin_chunk(self):
        match = self.CHUNK.fullmatch(self._handler.rfile.readline(MAX_CHUNK_HEAD))
        if not match:
            raise self._malformed()
        self._left = int(match[1], 16)
        if not self._left:
            self._chunked = False
            try:
                self._handler.read_head_lines()  # trailers: nothing here asks for them
            except ValueError as error:
                raise self._malformed() from error

    def _malformed(self):
        self._broken, self._left, self._chunked = True, 0, False
        return MalformedBody('the body ends too early, or its chunks are malformed')

    def _discard(self):
        """Read away what is left, as pywsgi wants it: as much as its sender needs in order to see the answer,
        and not for long."""
        # Who still waits for a 100 sends nothing.
        left = 0 if self._expected or self._broken else DISCARD_LIMIT
        with contextlib.suppress(OSError), gevent.Timeout(DISCARD_TIMEOUT, False):
            while left > 0:
                part = self.read(65536)
                if not part:
                    return
                left -= len(part)
        self._handler.close_connection = True


class Handler(WebSocketHandler):
    """A connection. The server that uses it sets the class attributes.

    `request_timeout` is in seconds; `refusal(status, text)` makes the body of what is refused before the
    application sees it; `may_upgrade(environ)` tells whether a request for a WebSocket is granted. One that
    is not goes to the application, to be told why.
    """

    request_timeout = 10
    max_message = 2**16  # bytes

    def __init__(self, sock, address, server):
        super().__init__(sock, address, server, sock.makefile('rb', READ_BUFFER))
        self._used = False

    @staticmethod
    def refusal(status, text):
        """Return the body that tells why a request is refused."""
        raise NotImplementedError

    @staticmethod
    def may_upgrade(environ):
        """Tell whether a WebSocket is granted."""
        raise NotImplementedError

    def read_requestline(self):
        """Read the request line; a connection on which none comes is closed, a new one earlier than one that
        was used before."""
        if self.server.stopping:
            return ''
        self.server.make_room()
        self.server.idle[self] = True
        try:
            with gevent.Timeout(IDLE_TIMEOUT if self._used else self.request_timeout, False):
                return super().read_requestline()
            return ''
        finally:
            self.server.idle.pop(self, None)
            self._used = True

    def read_request(self, raw_requestline):
        """Read the headers, within their time, and refuse what RFC 9112 does not allow, or what a proxy might
        understand otherwise."""
        if not REQUEST_LINE.fullmatch(raw_requestline):
            raise ValueError('the request line is malformed')
        with gevent.Timeout(self.request_timeout, ValueError('the headers did not come in time')):
            lines = self.read_head_lines()
        names = [line.partition(b':')[0].lower() for line in lines]
        lengths = [line for line, name in zip(lines, names, strict=True)
                   if name in (b'content-length', b'transfer-encoding')]
        if len(lengths) > 1 or names.count(b'host') > 1 or not all(map(LENGTH.fullmatch, lengths)):
            raise ValueError('it is not clear how long the body is, or for which host')
        rest, self.rfile = self.rfile, io.BytesIO(b''.join(lines) + b'\r\n')
        try:
            result = super().read_request(raw_requestline)
        finally:
            self.rfile = rest
        connection = {word.strip().lower() for word in self.headers.get('Connection', '').split(',')}
        self.close_connection = self.close_connection or 'close' in connection
        return result

    def read_head_lines(self):
        """Return the header or trailer lines up to the empty one; raise ValueError for one that is malformed,
        or too many."""
        lines, size = [], 0
        while True:
            line = self.rfile.readline(MAX_HEADER)
            size += len(line)
            if line in (b'\r\n', b'\n'):
                return lines
            if not HEADER_LINE.fullmatch(line) or size > MAX_HEADER or len(lines) >= MAX_HEADERS:
                raise ValueError('a header is malformed, or there are too many')
            lines.append(line)

    def get_environ(self):
        """Make the environment; of a target in the absolute form, which RFC 9112 demands to be taken, the
        host counts."""
        absolute = ABSOLUTE.fullmatch(self.path)
        if absolute:
            self.path = absolute[2] or '/'
        environ = super().get_environ()
        if absolute:
            environ['HTTP_HOST'] = absolute[1]
        environ['agentbackend.socket'] = self.socket
        chunked = 'HTTP_TRANSFER_ENCODING' in environ
        self.wsgi_input = Body(self, self.content_length or 0, chunked=chunked)
        if environ['wsgi.input'] is not self.rfile:  # else it is to be a WebSocket
            environ['wsgi.input'] = self.wsgi_input
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
        head = (f'HTTP/1.1 {result[0]} {reason}\r\nContent-Type: application/json\r\n'
                f'Content-Length: {len(body)}\r\nConnection: close\r\n\r\n')
        return result[0], head.encode() + body

    def process_result(self):
        """Send the answer as pywsgi does, and behind one in chunks the trailers that the application has
        left."""
        trailers = self.environ.get('agentbackend.trailers')
        if trailers is None:
            super().process_result()
            return
        for data in self.result:
            if data:
                self.write(data)
        if not self.headers_sent:
            self.write(b'')
        if self.response_use_chunked:
            lines = ''.join(f'{name}: {value}\r\n' for name, value in trailers.items())
            self._sendall(f'0\r\n{lines}\r\n'.encode('latin-1'))

    def upgrade_websocket(self):
        """Answer 101 only to a request that is in order, and whose path and origin are allowed."""
        granted = is_upgrade(self.environ) and self.may_upgrade(self.environ)
        if granted and self.request_version == 'HTTP/1.1':
            return super().upgrade_websocket()
        return None

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
    if environ.get('HTTP_UPGRADE',
                   '').lower() != 'websocket' or 'upgrade' not in environ.get('HTTP_CONNECTION', '').lower():
        return False
    try:
        key = base64.b64decode(environ.get('HTTP_SEC_WEBSOCKET_KEY', '').strip(), validate=True)
    except (binascii.Error, ValueError):
        return False
    has_version = environ.get('HTTP_SEC_WEBSOCKET_VERSION') == '13'
    return len(key) == 16 and has_version and environ['REQUEST_METHOD'] == 'GET'


class WSGIServer(gevent.pywsgi.WSGIServer):
    """pywsgi on a socket that sends at once, and that finds out about peers that are gone; each connection
    inherits both."""

    stopping = False

    def __init__(self, *args, **options):
        self.idle = {}  # handlers that wait for a request, longest first
        super().__init__(*args, **options)

    def init_socket(self):
        """Make the listening socket with options that its connections inherit."""
        super().init_socket()
        # Headers and body are two writes, and without this the second waits 40 ms for the first to be
        # acknowledged.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option in KEEPALIVE:
            self.socket.setsockopt(*option)

    def make_room(self):
        """End the connection that waits longest for a request, if there is room for few others: the pool
        takes no new ones when it is full."""
        if self.idle and self.pool is not None and self.pool.free_count() < SPARE_CONNECTIONS:
            handler = next(iter(self.idle))
            del self.idle[handler]
            with contextlib.suppress(OSError):
                handler.socket.shutdown(socket.SHUT_RD)

    def close(self):
        """Take no more connections, and end those that only wait for a next request: a browser keeps some for
        minutes."""
        super().close()
        self.stopping = True
        for handler in list(self.idle):
            with contextlib.suppress(OSError):
                handler.socket.shutdown(socket.SHUT_RD)


class DisconnectWatcher:
    """Calls back when the other side of a connection closes it, at no cost of a greenlet: a write alone would
    notice late."""

    def __init__(self, sock, callback):
        self._socket = sock
        self._callback = callback
        self._watch(gevent.get_hub().loop.io(sock.fileno(), 1), self._readable)

    def _watch(self, watcher, look):
        self._watcher = watcher
        watcher.start(look)

    def _readable(self):
        try:
            left = not self._socket._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            left = True
        self.close()
        if left:
            self._callback()
        else:  # a byte of a next request would be seen again and again, and hides an end behind it
            self._watch(gevent.get_hub().loop.timer(LOOK_PAUSE, LOOK_PAUSE), self._look)

    def _look(self):
        try:
            state = self._socket._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        except OSError:
            state = None
        if state != ESTABLISHED:
            self.close()
            self._callback()

    def close(self):
        """Stop watching."""
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher.close()
            self._watcher = None
