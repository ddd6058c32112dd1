"""The API as a program calls it over HTTP. It knows nothing of the server but its address and its token.

The standard library's `http.client` does it: what else there is costs a command four times as long to import.
Even that, a third of what a command imports, comes only with the first call: one that runs over a WebSocket
makes none.
"""
import contextlib
import json
import os
import socket
import sys
import threading
import time
import urllib.parse

from _agentbackend import VERSION

CONNECT_TIMEOUT = 10  # seconds
CALL_TIMEOUT = 120  # seconds that an answer may take which waits for nothing
STREAM_TIMEOUT = 45  # seconds; a stream says something every 15
GIVE_UP = 600  # seconds that a stream looks for its server
PIECE = 2**16  # bytes
WINDOW = 2**21  # bytes of a command's stdin that are under way; the server takes twice that
KEEPALIVE = ((socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1))


class RemoteError(Exception):
    """What the API refuses, in its own words; `code` and `details` are the API's."""

    def __init__(self, text, code='', details=()):
        super().__init__(text)
        self.code = code
        self.details = details or ()

    @property
    def about(self):
        """What is wrong, field by field, where the text does not say it."""
        return [f"{item['path']}: {item['message']}" for item in self.details
                if 'message' in item and item['message'] not in str(self)]


class Unreachable(RemoteError):
    """No server of ours answers there."""


class Remote:
    """A server at an address. `note(text)` is told what its user should know while it goes on."""

    def __init__(self, url, token=None, note=lambda text: None):
        self.url = url.rstrip('/')
        self._token = token
        self._note = note
        self._open = set()  # connections; None when it was cut
        parts = urllib.parse.urlsplit(self.url)
        try:
            self._host, self._port = parts.hostname, parts.port
        except ValueError:
            self._host = None
        if parts.scheme not in ('http', 'https') or not self._host:
            raise RemoteError(f'{url!r} is no address of a server, as http://127.0.0.1:3100 is.', 'WRONG_USE')
        self._secure, self._base = parts.scheme == 'https', parts.path

    def another(self):
        """Return the same server, with connections of its own."""
        return Remote(self.url, self._token, self._note)

    def cut(self):
        """End all that is under way, from whichever thread: it raises Unreachable."""
        connections, self._open = self._open, None
        for connection in connections or ():
            with contextlib.suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    def call(self, method, path, body=None, *, query=None, headers=None, timeout=CALL_TIMEOUT):
        """Return the `data` of an answer. Raises RemoteError, Unreachable."""
        with self.open(method, path, body, query=query, headers=headers, timeout=timeout) as answer:
            return self._parsed(answer)['data']

    @contextlib.contextmanager
    def open(self, method, path, body=None, *, query=None, headers=None, timeout=CALL_TIMEOUT):
        """Send a request, and give its Answer for the length of a block.

        A `body` that is a dict is sent as JSON, any other is an iterable of bytes. Raises RemoteError for
        what is refused, Unreachable where nobody answers or the connection breaks.
        """
        import http.client
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=CONNECT_TIMEOUT)
        headers = {'Accept': 'application/json', **self._headers(), **(headers or {})}
        if isinstance(body, dict):
            body, headers['Content-Type'] = json.dumps(body).encode(), 'application/json'
        with contextlib.closing(connection):
            with self._reaching():
                if self._open is None:
                    raise OSError('it was cut')
                self._open.add(connection)
                connection.connect()
                for option in KEEPALIVE:
                    connection.sock.setsockopt(*option)
                connection.sock.settimeout(timeout)
                # It may refuse what it is sent before it has all of it, and says why.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    connection.request(method, self._target(path, query), body, headers)
                answer = Answer(connection.getresponse(), self._reaching)
            if answer.status >= 400:
                raise self._refused(answer.status, answer.read())
            yield answer

    def events(self, path, *, query=None, after=None):
        """Yield the events of a stream, from behind the id `after`; after a lost connection it goes on where
        it was, until who reads has enough. Raises RemoteError, Unreachable."""
        lost, pause = None, 0.2
        while True:
            headers = {'Accept': 'text/event-stream', **({'Last-Event-ID': after} if after else {})}
            try:
                with self.open('GET', path, query=query, headers=headers, timeout=STREAM_TIMEOUT) as answer:
                    if lost:
                        self._note('connected again')
                    lost, pause = None, 0.2
                    for event in messages(answer):
                        after = event.get('id') or after
                        yield event
                raise Unreachable('the stream has ended')
            except Unreachable as error:
                if self._open is None or (lost is None and after is None):
                    raise
                if lost is None:
                    self._note(f'connection lost ({error}); trying again')
                lost = lost or time.monotonic()
                if time.monotonic() - lost > GIVE_UP:
                    raise
            time.sleep(pause)
            pause = min(pause * 1.5, 3)

    def until_running(self, workspace_id, report):
        """Wait until a workspace runs, and report its events meanwhile: `report(data)`. Raises RemoteError
        when it doesn't come to that."""
        for event in self.events(path_of(workspace_id, 'events'), query={'tail': 0}):
            data = event['data']
            if event['type'] == 'status' and data['status'] == 'running':
                return
            if event['type'] == 'status' and (data['status'] == 'error' or data.get('deleted')):
                raise RemoteError(data.get('error') or 'The workspace was deleted meanwhile.', 'FAILED')
            if event['type'] == 'progress' or data.get('stream') == 'build':
                report(data)

    def websocket(self, path, query=None):
        """Return an open Socket. Raises RemoteError, Unreachable."""
        import websocket  # a tenth of a second, which few commands need
        address = 'ws' + self.url.removeprefix('http') + self._target(path, query)[len(self._base):]
        with self._reaching():
            try:
                return Socket(websocket.create_connection(
                    address, timeout=CONNECT_TIMEOUT, sockopt=KEEPALIVE, header=self._headers(),
                    suppress_origin=True))
            except websocket.WebSocketBadStatusException as error:
                raise self._refused(error.status_code, error.resp_body or b'') from error
            except websocket.WebSocketException as error:
                raise OSError(str(error)) from error

    def run(self, workspace, body, stdin, on_output):
        """Run a command in a workspace, and return its exit status.

        `stdin` is a file descriptor, or None; `on_output(stream, bytes)` is told what it prints on stream 1
        or 2. The command ends when this is interrupted. Raises RemoteError, Unreachable.
        """
        with contextlib.closing(self.websocket(path_of(workspace, 'exec', 'ws'))) as sock:
            sock.send(json.dumps(body if stdin is not None else {**body, 'stdin': ''}))
            room, taken = threading.Semaphore(WINDOW // PIECE), 0
            if stdin is not None:
                threading.Thread(target=pass_on, args=(stdin, sock, room), daemon=True).start()
            while True:
                message = sock.receive()
                if isinstance(message, bytes):
                    on_output(message[0], message[1:])
                    continue
                told = json.loads(message)
                if told['type'] == 'exit':
                    return told['exitCode']
                if told['type'] == 'error':
                    raise RemoteError(told['message'], told['code'], told.get('details'))
                taken += told.get('bytes', 0)
                while taken >= PIECE:
                    taken -= PIECE
                    room.release()

    def health(self):
        """Return what /health tells. Raises Unreachable."""
        with self.open('GET', '/health') as answer:
            try:
                found = json.loads(answer.read())
                return found | {key: found[key] for key in ('status', 'version', 'docker', 'uptime')}
            except (ValueError, KeyError, TypeError) as error:
                raise self._stranger() from error

    # Requests

    def _headers(self):
        agent = {'User-Agent': f'agentbackend/{VERSION}'}
        return agent | ({'Authorization': f'Bearer {self._token}'} if self._token else {})

    def _target(self, path, query):
        given = {key: value for key, value in (query or {}).items() if value is not None}
        return f'{self._base}{path}' + (f'?{urllib.parse.urlencode(given, doseq=True)}' if given else '')

    @contextlib.contextmanager
    def _reaching(self):
        try:
            yield
        except (OSError, *http_errors()) as error:
            raise Unreachable(self._away(error)) from error

    def _away(self, error):
        why = getattr(error, 'strerror', None) or str(error) or type(error).__name__
        return f'{self.url} does not answer ({why[:200]}).'

    # Answers

    def _parsed(self, answer):
        try:
            value = json.loads(answer.read())
            return value | {'data': value['data']}
        except (ValueError, KeyError, TypeError) as error:
            raise self._stranger() from error

    def _refused(self, status, body):
        try:
            told = json.loads(body)
            text, code, details = told['error'], told['code'], told.get('details')
        except (ValueError, KeyError, TypeError):
            return self._stranger()
        if code in ('NOT_FOUND', 'METHOD_NOT_ALLOWED'):
            with contextlib.suppress(RemoteError):
                if (version := self.health()['version']) != VERSION:
                    text = f'{self.url} does not know this call: its version is {version}, this is {VERSION}.'
        return RemoteError(text, code, details)

    def _stranger(self):
        return Unreachable(f'What answers at {self.url} is no Agent Backend; is the address right?')


def http_errors():
    """Return the errors of http.client, if it was needed."""
    module = sys.modules.get('http.client')
    return (module.HTTPException,) if module else ()


class Answer:
    """An answer whose reading raises Unreachable where the connection breaks."""

    def __init__(self, response, reaching):
        self._response = response
        self._reaching = reaching
        self.status, self.headers = response.status, response.headers

    def read(self):
        """Return all that is left."""
        with self._reaching():
            return self._response.read()

    def readline(self):
        """Return the next line; nothing at the end."""
        with self._reaching():
            return self._response.readline()

    def pieces(self):
        """Yield what comes, as it comes."""
        length = self.headers.get('Content-Length')
        left = int(length) if length else None
        while True:
            with self._reaching():
                data = self._response.read1(PIECE)
                if not data and left:
                    raise OSError(f'{left} bytes of the answer did not come')
            if not data:
                return
            left = left and left - len(data)
            yield data


def quoted(name):
    """Return a name as a part of a path."""
    return urllib.parse.quote(name, safe='')


def path_of(workspace, *rest):
    """Return the path of a workspace's call."""
    return '/'.join(['/api/workspaces', quoted(workspace), *rest])


def amount(size):
    """Return bytes for people."""
    unit = next(unit for unit in (10**9, 10**6, 1000, 1) if size >= unit or unit == 1)
    return f"{size / unit:.{1 if unit > 1000 else 0}f} {({1: 'B', 1000: 'kB', 10**6: 'MB'}).get(unit, 'GB')}"


def messages(answer):
    """Yield the events of an open SSE answer, as they come."""
    data = []
    while line := answer.readline():
        if line == b'\n' and data:
            yield json.loads(b'\n'.join(data))
            data = []
        elif line.startswith(b'data:'):
            data.append(line[5:].strip())


def files_path(workspace, path):
    """Return the path of a call about a file."""
    parts = path.split('/') if path else []
    return path_of(workspace, 'files', *(quoted(os.fsencode(part)) for part in parts))


class Socket:
    """A WebSocket whose bytes are messages of bytes, and whose text is text. When the connection breaks,
    Unreachable is raised, with the code LOST."""

    def __init__(self, sock):
        sock.settimeout(None)
        self._sock = sock

    def fileno(self):
        """Return what `select` needs."""
        return self._sock.fileno()

    @property
    def waiting(self):
        """Whether something has come that `select` does not see."""
        return bool(getattr(self._sock.sock, 'pending', lambda: 0)())

    def send(self, message):
        """Send bytes or text."""
        with self._lost():
            (self._sock.send_binary if isinstance(message, bytes) else self._sock.send)(message)

    def receive(self):
        """Return the next message, bytes or text."""
        with self._lost():
            opcode, data = self._sock.recv_data()
        if opcode not in (1, 2):
            raise Unreachable('The server has ended the connection.', 'LOST')
        return data if opcode == 2 else data.decode()

    def close(self):
        """End the connection."""
        self._sock.shutdown()

    @contextlib.contextmanager
    def _lost(self):
        import websocket
        try:
            yield
        except (OSError, websocket.WebSocketException) as error:
            raise Unreachable(f'The connection to the server was lost ({error}).', 'LOST') from error


def pass_on(file, sock, room):
    """Send what is read from a file to a command, in pieces for which there is room; its end is an empty
    one."""
    rest = 0  # bytes of the piece for which room was made
    with contextlib.suppress(OSError, Unreachable):
        while data := os.read(file, rest or PIECE):
            if not rest:
                room.acquire()
                rest = PIECE
            rest -= len(data)
            sock.send(data)
        sock.send(b'')
