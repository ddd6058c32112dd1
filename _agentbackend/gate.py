"""What comes before the routes: who may call, from where, and with how large a body."""
import hashlib
import hmac
import io
import re
import secrets
import time
import urllib.parse

import bottle
import gevent

from _agentbackend.config import is_loopback
from _agentbackend.errors import (
    BackendError,
    Forbidden,
    NotFound,
    PayloadTooLarge,
    RequestTimeout,
    Unauthorized,
    ValidationError,
    quoted,
)
from _agentbackend.views import encode, view_error
from _agentbackend.wire import read_up_to

METHODS = ('GET', 'HEAD', 'POST', 'PUT', 'PATCH', 'DELETE')
CORS_HEADERS = ('Authorization, Content-Type, Last-Event-ID, Idempotency-Key, Prefer, If-Match, '
                'If-None-Match, If-Range, Range')
CORS_EXPOSED = ('Location, X-Session-Id, X-Run-Id, X-Exit-Code, Allow, WWW-Authenticate, Retry-After, ETag, '
                'Content-Range, Content-Disposition, Idempotent-Replayed, Preference-Applied')
TICKET_LIFE = 30  # seconds
PIECE = 2**17  # bytes of a body that is taken piece by piece
CLOSE = {'Connection': 'close'}
MALFORMED = 'The request body was truncated, or its chunked encoding is malformed.'
WRONG_TOKEN = "This token is not the server's API_TOKEN."
HOST = re.compile(r'(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d{1,5})?', re.ASCII)


def same_secret(given, wanted):
    """Compare in constant time, whatever the lengths."""
    return hmac.compare_digest(hashlib.sha256(given.encode('utf-8', 'surrogateescape')).digest(),
                               hashlib.sha256(wanted.encode()).digest())


class Tickets:
    """Words that open one stream within seconds: an EventSource can send no header, and URLs end up in
    logs."""

    def __init__(self):
        self._ends = {}  # digest -> when it expires

    def issue(self):
        """Return a new ticket."""
        now = time.monotonic()
        self._ends = {key: end for key, end in self._ends.items() if end > now}
        ticket = secrets.token_urlsafe(24)
        self._ends[self._digest(ticket)] = now + TICKET_LIFE
        return ticket

    def redeem(self, ticket):
        """Tell whether a ticket is valid, and make it invalid."""
        return self._ends.pop(self._digest(ticket), 0) > time.monotonic()

    @staticmethod
    def _digest(ticket):
        return hashlib.sha256(ticket.encode('utf-8', 'replace')).digest()


class Gate:
    """A WSGI callable in front of the application. The route that a request asks for decides what is taken
    from whom.

    `app.find(method, path)` gives the route or None; `talk(route, environ, trusted)` serves a WebSocket until
    it ends.
    """

    def __init__(self, config, app, tickets, talk):
        self._config = config
        self._app = app
        self._tickets = tickets
        self._talk = talk
        self._hosts = {host.lower() for host in (config.host, *config.allowed_hosts)
                       if host not in ('0.0.0.0', '::')}
        self._origins = {origin.lower().rstrip('/') for origin in config.allowed_origins}
        self._published = (config.code_server_ports, config.ssh_ports, config.custom_ports)

    def __call__(self, environ, start_response):
        origin = environ.get('HTTP_ORIGIN')

        def start(status, headers, exc_info=None):
            write = start_response(status, headers + self._cors(origin if allowed else None), exc_info)
            if environ.get('agentbackend.streams'):
                write(b'')  # its headers go out at once, although the first part may be long in coming
            return write

        allowed = False
        try:
            self.check_host_and_origin(environ)
            allowed = True
            path = decoded_path(environ)
            if environ['REQUEST_METHOD'] == 'OPTIONS':
                return self._options(environ, path, start)
            route = self._app.find(environ['REQUEST_METHOD'], path)
            trusted = self._is_trusted(environ, route)
            if not trusted and not (route and route.open):
                shown = environ.get('HTTP_AUTHORIZATION', '').partition(' ')
                raise Unauthorized(WRONG_TOKEN if shown[0].lower() == 'bearer' and shown[2].strip() else
                                   "This server needs its API token: send 'Authorization: Bearer "
                                   "<API_TOKEN>'.",
                                   headers={'WWW-Authenticate': 'Bearer'})
            if environ.get('wsgi.websocket') is not None:
                # Not by way of Bottle: as long as it lasted, it would hold what Bottle keeps of a request.
                self._talk(route, environ, trusted)
                return []
            if route is not None and route.upload:
                environ['agentbackend.upload'] = self._pieces(environ['wsgi.input'], length_of(environ))
            else:
                self._take_body(environ)
        except BackendError as error:
            return self._refuse(environ, start, error)
        return self._app(environ, start)

    def may_upgrade(self, environ):
        """Tell whether a WebSocket is granted; if not, the request goes on as any other, and is told why
        not."""
        try:
            self.check_host_and_origin(environ)
            route = self._app.find('GET', decoded_path(environ))
        except (Forbidden, NotFound):
            return False
        # A stranger is told so by an answer, unless it is over the WebSocket that he says who he is.
        return route is not None and route.websocket and (route.open or self._is_trusted(environ, route))

    def check_host_and_origin(self, environ):
        """Raise Forbidden for a Host that is not ours (DNS rebinding) or a web page of an Origin that is not
        allowed.

        No Origin means that no browser page is behind the call.
        """
        host = split_host(environ.get('HTTP_HOST', ''))
        if not (is_loopback(host or '-') or host in self._hosts):
            raise Forbidden(f"Host {environ.get('HTTP_HOST', '')[:100]!r} is not allowed here; add it to "
                            "ALLOWED_HOSTS if it is this server.")
        origin = environ.get('HTTP_ORIGIN')
        if origin is not None and not self._is_allowed_origin(origin.lower(), environ):
            raise Forbidden(f'Origin {origin[:100]!r} is not allowed here; add it to ALLOWED_ORIGINS if you '
                            'trust its pages.')

    def _is_allowed_origin(self, origin, environ):
        """The server's own pages may call it, those that are named, and those on localhost, but not what
        workspaces publish there."""
        try:
            parts = urllib.parse.urlsplit(origin)
            port = parts.port or {'http': 80, 'https': 443}.get(parts.scheme)
        except ValueError:  # as for http://[
            return False
        if origin in self._origins:
            return True
        scheme = environ.get('HTTP_X_FORWARDED_PROTO', parts.scheme).partition(',')[0].strip().lower()
        if parts.scheme in ('http', 'https') and origin == f"{scheme}://{environ['HTTP_HOST'].lower()}":
            return True
        is_published = any(first <= port <= last for first, last in self._published) if port else True
        return parts.scheme in ('http', 'https') and is_loopback(parts.hostname or '-') and not is_published

    def _is_trusted(self, environ, route):
        """Tell whether the token was shown, or a ticket for a stream, which is taken out of the query in any
        case."""
        if 'agentbackend.trusted' in environ:  # decided before it became a WebSocket
            return environ['agentbackend.trusted']
        scheme, _, token = environ.get('HTTP_AUTHORIZATION', '').partition(' ')
        trusted = not self._config.api_token or (
            scheme.lower() == 'bearer' and same_secret(token.strip(), self._config.api_token))
        query = urllib.parse.parse_qsl(environ.get('QUERY_STRING', ''), keep_blank_values=True)
        tickets = [value for key, value in query if key == 'ticket']
        if tickets:
            others = [(key, value) for key, value in query if key != 'ticket']
            environ['QUERY_STRING'] = urllib.parse.urlencode(others)
            if route is not None and route.takes_tickets and environ['REQUEST_METHOD'] == 'GET':
                trusted = any([self._tickets.redeem(ticket) for ticket in tickets]) or trusted
        environ['agentbackend.trusted'] = trusted
        return trusted

    def _options(self, environ, path, start):
        methods = [method for method in METHODS if self._app.find(method, path)]
        if not methods:
            return self._refuse(environ, start, NotFound(f'There is no {path[:200]} here.'))
        headers = [('Allow', ', '.join([*methods, 'OPTIONS']))]
        if 'HTTP_ACCESS_CONTROL_REQUEST_METHOD' in environ:
            headers += [('Access-Control-Allow-Methods', ', '.join(METHODS)),
                        ('Access-Control-Max-Age', '600'),
                        ('Access-Control-Allow-Headers', CORS_HEADERS)]
        start('204 No Content', headers)
        return []

    @staticmethod
    def _cors(origin):
        if origin is None:
            return [('Vary', 'Origin')]
        return [('Vary', 'Origin'), ('Access-Control-Allow-Origin', origin),
                ('Access-Control-Expose-Headers', CORS_EXPOSED)]

    def _take_body(self, environ):
        """Read the body, chunked or not, within its limits of size and time."""
        length, limit, body = length_of(environ), self._config.max_body, b''
        if length is None or 0 < length <= limit:
            body = self._in_time('The body did not come', read_up_to, environ['wsgi.input'],
                                 limit + 1 if length is None else length)
        if max(length or 0, len(body)) > limit:
            raise PayloadTooLarge(f'The body is larger than MAX_BODY={limit} bytes.', headers=CLOSE)
        environ['wsgi.input'] = io.BytesIO(body)
        environ['CONTENT_LENGTH'] = str(len(body))
        environ.pop('HTTP_TRANSFER_ENCODING', None)  # Bottle would take the chunks apart a second time

    def _pieces(self, body, left):
        """Yield the body piece by piece, as fast as it is taken; each has to come in time."""
        while left is None or left > 0:
            data = self._in_time('Nothing of the body came', body.read,
                                 PIECE if left is None else min(PIECE, left))
            if not data and left:
                raise ValidationError(MALFORMED, headers=CLOSE)
            if not data:
                return
            left = None if left is None else left - len(data)
            yield data

    def _in_time(self, late, read, *args):
        """Return what `read` returns of a body; raise RequestTimeout, or ValidationError for a broken one."""
        slow = RequestTimeout(f'{late} within REQUEST_TIMEOUT={self._config.request_timeout} s.',
                              headers=CLOSE)
        try:
            with gevent.Timeout(self._config.request_timeout, slow):
                return read(*args)
        except OSError as error:
            raise ValidationError(MALFORMED, headers=CLOSE) from error

    @staticmethod
    def _refuse(environ, start, error):
        body = encode(view_error(error))
        start(f'{error.status} {bottle.HTTP_CODES.get(error.status, "")}',
              [*error.headers.items(), ('Content-Type', 'application/json'),
               ('Content-Length', str(len(body)))])
        return [b'' if environ['REQUEST_METHOD'] == 'HEAD' else body]


def length_of(environ):
    """Return how long the body of a request is, None for one in chunks; raise ValidationError."""
    if 'HTTP_TRANSFER_ENCODING' in environ:
        return None
    text = environ.get('CONTENT_LENGTH') or '0'
    if not re.fullmatch('[0-9]{1,999}', text):
        raise ValidationError(f'The Content-Length is {quoted(text)}, and has to be a number.', headers=CLOSE)
    return int(text)


def decoded_path(environ):
    """Return the path of a request; raise NotFound for one that is no UTF-8, of which Bottle would leave out
    what it can't read."""
    try:
        return environ['PATH_INFO'].encode('latin-1').decode()
    except UnicodeError as error:
        raise NotFound('There is nothing here; a path is written in UTF-8.') from error


def split_host(text):
    """Return the host of a Host header without its port, in small letters; None for one that is none."""
    match = HOST.fullmatch(text.lower())
    return match[1].strip('[]') if match else None
