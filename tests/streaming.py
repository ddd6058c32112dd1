"""Clients of the streams on plain sockets, which may be cut at any byte, and which see all that came."""
import base64
import collections
import contextlib
import json
import os
import socket
import struct

from _agentbackend.wire import unmask

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


def connect(server, timeout=10, receive_buffer=None):
    """Return a connection to the server, in whichever network that is."""
    with server.network.entered() if server.network else contextlib.nullcontext():
        sock = socket.socket()  # the network is decided here
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(timeout)
    try:
        sock.connect(('127.0.0.1', server.port))
    except OSError:
        sock.close()
        raise
    return sock


def read_head(file):
    """Return (status, headers in small letters) of an answer."""
    line = file.readline()
    if not line:
        raise ConnectionError('no answer')
    headers = {}
    while (header := file.readline()) not in (b'\r\n', b''):
        name, _, value = header.decode('latin-1').partition(':')
        headers[name.lower()] = value.strip()
    return int(line.split()[1]), headers


def send(server, method, path, body=None):
    """Begin a call, and return the connection on which its answer will come: of calls that are made at once,
    or to a server that may die meanwhile."""
    call, data = connect(server, 30), json.dumps(body or {}).encode()
    call.sendall(f'{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
                 f'Content-Length: {len(data)}\r\n\r\n'.encode() + data)
    return call


def receive(call):
    """Return (status, JSON) of the answer to a call that was begun; raise OSError where there is none."""
    with call, call.makefile('rb') as file:
        status, headers = read_head(file)
        content = file.read(int(headers['content-length']))
        if len(content) < int(headers['content-length']):
            raise ConnectionError('half an answer')
        return status, json.loads(content)


class Connection:
    """What both kinds of clients share: an HTTP request on a socket, and its answer's head."""

    def __init__(self, server, path, headers, timeout, receive_buffer=None):
        self.socket = connect(server, timeout, receive_buffer)
        headers = {'Host': f'localhost:{server.port}', **headers}
        lines = [f'GET {path} HTTP/1.1', *(f'{name}: {value}' for name, value in headers.items()
                                           if value is not None)]
        self.file = self.socket.makefile('rb')
        try:
            self.socket.sendall('\r\n'.join(lines).encode() + b'\r\n\r\n')
            self.status, self.headers = read_head(self.file)
        except OSError:
            self.close()
            raise

    def cut(self):
        """End the connection at once, also while another greenlet reads from it; the server gets a reset."""
        with contextlib.suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self):
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.file.close()
        self.socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Sse(Connection):
    """An SSE stream: a browser's EventSource, less its patience."""

    def __init__(self, server, path, *, after=None, timeout=10, receive_buffer=None, **headers):
        super().__init__(server, path, {'Accept': 'text/event-stream', 'Last-Event-ID': after,
                                        **server.headers, **headers}, timeout, receive_buffer)
        self.comments, self.retry, self.names, self.last_id = [], None, set(), after
        # Bytes and lines that came and were not yet asked for.
        self._rest, self._waiting = b'', collections.deque()

    def __iter__(self):
        """Yield the messages until the stream ends."""
        fields = {}
        for line in self.lines():
            name, _, value = line.partition(b':')
            value = value.removeprefix(b' ').decode()
            if not line:
                self.last_id = fields.get('id', self.last_id)
                if 'data' in fields:
                    yield json.loads(fields['data'])
                fields = {}
            elif not name:
                self.comments.append(value)
            elif name == b'retry':
                self.retry = int(value)
            else:
                self.names.add(name.decode())
                fields[name.decode()] = value

    def lines(self):
        """Yield the lines of the body, without their ends."""
        while True:
            while self._waiting:
                yield self._waiting.popleft()
            data = self.read_chunk()
            if not data:
                return
            *lines, self._rest = (self._rest + data).split(b'\n')
            self._waiting.extend(lines)

    def read_chunk(self):
        """Return the next part of the body as it was sent, empty at the end; raise ConnectionError if it is
        cut off."""
        size = self.file.readline()
        if not size.endswith(b'\r\n'):
            raise ConnectionError('the stream was cut off')
        return self.file.read(int(size, 16) + 2)[:-2]


class Ws(Connection):
    """A WebSocket whose every byte is ours to choose."""

    def __init__(self, server, path='/agent/ws', *, timeout=10, receive_buffer=None, **headers):
        key = base64.b64encode(os.urandom(16)).decode()
        super().__init__(server, path, {'Upgrade': 'websocket', 'Connection': 'Upgrade',
                                        'Sec-WebSocket-Version': '13', 'Sec-WebSocket-Key': key,
                                        **{name.replace('_', '-'): value for name, value in headers.items()}},
                                        timeout, receive_buffer)
        self.last_id = None

    def send(self, **message):
        self.send_frame(json.dumps(message).encode())

    def send_frame(self, payload=b'', opcode=TEXT, *, fin=True, flags=0, masked=True, length=None):
        self.socket.sendall(frame(payload, opcode, fin=fin, flags=flags, masked=masked, length=length))

    def read_frame(self):
        """Return (opcode, payload) of the next frame; raise ConnectionError when there is none."""
        head = self._read(2)
        assert head[0] & 0xf0 == 0x80 and head[1] < 128, 'a server sends whole frames without mask'
        size = head[1]
        if size > 125:
            size = int.from_bytes(self._read(2 if size == 126 else 8), 'big')
        return head[0] & 15, self._read(size)

    def __iter__(self):
        """Yield the messages until the server closes; answer its pings."""
        while True:
            opcode, payload = self.read_frame()
            if opcode == TEXT:
                message = json.loads(payload)
                self.last_id = message['id'] or self.last_id
                yield message
            elif opcode == PING:
                self.send_frame(payload, PONG)
            elif opcode == CLOSE:
                return

    def closing(self):
        """Return (code, reason) of the close frame, whatever comes before it."""
        while True:
            opcode, payload = self.read_frame()
            if opcode == CLOSE:
                return (int.from_bytes(payload[:2], 'big'), payload[2:].decode()) if payload else (None, '')

    def _read(self, size):
        data = self.file.read(size)
        if len(data) < size:
            raise ConnectionError('the connection has ended')
        return data


def frame(payload=b'', opcode=TEXT, *, fin=True, flags=0, masked=True, length=None):
    """Return a frame as a client sends it, or should not."""
    size, bit = len(payload) if length is None else length, 128 if masked else 0
    head = bytes([fin << 7 | flags << 4 | opcode])
    if size < 126:
        head += bytes([bit | size])
    elif size < 65536:
        head += bytes([bit | 126]) + struct.pack('!H', size)
    else:
        head += bytes([bit | 127]) + struct.pack('!Q', size)
    mask = os.urandom(4)
    return head + mask + unmask(payload, mask) if masked else head + payload


def messages_until(stream, condition):
    """Return what comes up to the first message that is wanted."""
    found = []
    for message in stream:
        found.append(message)
        if condition(message):
            return found
    raise AssertionError(f'the stream ended with {found[-3:]}')


def texts(messages):
    """Return what the log messages say."""
    return [message['data']['message'] for message in messages if message['type'] == 'log']


def has_text(text):
    return lambda message: message['type'] == 'log' and message['data']['message'] == text


def statuses(messages):
    return [message['data']['status'] for message in messages if message['type'] == 'status']
