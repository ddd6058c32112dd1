"""What a route is, and what stands between Bottle and its handler."""
import contextlib
import io
import re
import urllib.parse
from dataclasses import dataclass, field

import bottle

from _agentbackend.config import parse_size
from _agentbackend.errors import (
    BackendError,
    MethodNotAllowed,
    NotFound,
    UnsupportedMediaType,
    UpgradeRequired,
    ValidationError,
    internal_error,
    quoted,
)
from _agentbackend.gate import split_host
from _agentbackend.pages import EVENT_STREAM, PLAIN_TEXT, kinds_of
from _agentbackend.schemas import parse_json
from _agentbackend.views import encode, view_error, view_workspace
from _agentbackend.waits import wait_until
from _agentbackend.wire import DisconnectWatcher

WAIT_TIMEOUT = 600  # seconds that a client waits who names no timeout


@dataclass(frozen=True)
class Call:
    """What a handler is given: the parts of the path, the checked query and body, and whether a token was
    shown if one is needed.

    `last_event_id` is where a stream is to go on, `watch_disconnect(callback)` watches for the client to
    leave, `websocket` is the connection of a WebSocket client, `host` the name by which it calls us.
    """

    path: dict
    query: dict
    body: object
    trusted: bool
    last_event_id: str
    watch_disconnect: object = None
    websocket: object = None
    accept: str = ''
    if_none_match: str = ''
    method: str = 'GET'
    headers: object = None  # those of the request, by their names
    upload: object = None  # the body in pieces, of a route that takes it so
    trailers: dict = None  # what is put here goes out behind the answer, where a header would come too early
    host: str = ''


@dataclass(frozen=True)
class Reply:
    """What a handler returns. A `stream` yields bytes, and is sent in the place of the data."""

    data: object = None
    status: int = 200
    headers: dict = field(default_factory=dict)
    stream: object = None


@dataclass(frozen=True)
class Route:
    """One line of the API. `body` and `query` name schemas; an `upload` route takes its body piece by piece,
    and may change that of others; an `open` one needs no token; a `bare` one answers without the envelope.

    One by which a workspace `becomes` something may be asked to wait for that, also when its reply is given
    again for a request that is repeated.

    The rest is for the OpenAPI document: under which `tag` it stands, if it does; its `answers`, from status
    to the schema of the data, to a media type, or to None; of a WebSocket the schemas of what is said on it,
    `talk`, there and back; and the `errors` and `headers` that it has beside those of all routes.
    """

    method: str
    path: str
    handler: object
    body: str = None
    query: str = 'no-query'
    upload: bool = False
    open: bool = False
    bare: bool = False
    tag: str = None
    answers: dict = field(default_factory=dict)
    talk: tuple = ()
    becomes: str = None
    errors: tuple = ()
    headers: tuple = ()

    @property
    def websocket(self):
        """Whether it answers by turning the connection into a WebSocket."""
        return 101 in self.answers

    @property
    def takes_tickets(self):
        """Whether it is a stream, which a browser can't ask for with a token."""
        return bool({EVENT_STREAM, PLAIN_TEXT} & set(kinds_of(self))) or (self.websocket and not self.open)


class Application(bottle.Bottle):
    """Routes as a WSGI application whose every answer is JSON."""

    def __init__(self, backend, routes):
        super().__init__()
        # A name may have any character, also a line end, which Bottle's own filter leaves out.
        self.router.add_filter('path', lambda config: (r'[\s\S]+?', None, None))
        for route in routes:
            self.route(route.path, route.method, endpoint(backend, route), spec=route)

    def find(self, method, path):
        """Return the Route that answers a request, or None."""
        try:
            return self.match({'REQUEST_METHOD': method, 'PATH_INFO': path})[0].config['spec']
        except bottle.HTTPError:
            return None

    def default_error_handler(self, error):
        """Put Bottle's own errors into the contract's shape."""
        if error.status_code == 404:
            return self._json(NotFound(f'There is no {bottle.request.path[:200]} here; GET /openapi.json '
                                       'lists what there is.'))
        if error.status_code == 405:
            *others, last = error.headers['Allow'].split(',')
            allowed = f"{', '.join(others)} and {last}" if others else last
            path, method = bottle.request.path[:200], bottle.request.method
            return self._json(MethodNotAllowed(f'{path} takes {allowed}, not {method}.'))
        return self._json(internal_error(error.exception) if error.status_code >= 500
                          else ValidationError(str(error.body)))

    @staticmethod
    def _json(error):
        bottle.response.content_type = 'application/json'
        return encode(view_error(error))


class Streamed:
    """What Bottle sends part by part as a file's: of any other iterable it waits for the first part before it
    sends the headers."""

    def __init__(self, parts):
        self._parts = iter(parts)
        self.close = getattr(parts, 'close', lambda: None)

    def read(self, _=None):
        """Return the next part that is not empty, and nothing at the end."""
        return next(filter(None, self._parts), b'')


def answer_once(backend, environ, answer):
    """Return the Reply to a request that bears an Idempotency-Key: that of the first one, if it was sent
    before."""
    replies, body = [], environ['wsgi.input'].getvalue()

    def make():
        reply = answer()
        replies.append(reply)
        return reply.status, reply.headers, None if reply.stream is not None else reply.data
    target = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}?{environ.get('QUERY_STRING', '')}\n"
    status, headers, data = backend.repeats.once(environ['HTTP_IDEMPOTENCY_KEY'], target.encode() + body,
                                                 make)
    return replies[0] if replies else Reply(data, status, headers)


def endpoint(backend, route):
    """Return the function that Bottle calls: it checks what came, calls the handler, and puts what it returns
    into JSON."""
    def asked(environ, path, trailers):
        query = read_query(backend.schemas, route.query, environ.get('QUERY_STRING', ''))
        body = read_body(backend.schemas, route.body, environ) if route.body else None
        return Call(
            path, query, body, environ.get('agentbackend.trusted', True), environ.get('HTTP_LAST_EVENT_ID'),
            watcher_of(environ), accept=environ.get('HTTP_ACCEPT', ''), method=environ['REQUEST_METHOD'],
            if_none_match=environ.get('HTTP_IF_NONE_MATCH', ''), headers=bottle.request.headers,
            upload=environ.get('agentbackend.upload'), trailers=trailers,
            host=split_host(environ.get('HTTP_HOST', '')) or '')

    def called(**path):
        environ, trailers = bottle.request.environ, {}
        try:
            call = asked(environ, path, trailers)
            if route.websocket:  # and this is none, since those do not come by here
                raise UpgradeRequired('This is a WebSocket: connect with Upgrade: websocket, '
                                      'Sec-WebSocket-Version: 13 and a proper key.',
                                      headers={'Upgrade': 'websocket', 'Sec-WebSocket-Version': '13'})
            if route.method == 'POST' and 'HTTP_IDEMPOTENCY_KEY' in environ:
                reply = answer_once(backend, environ, lambda: route.handler(backend, call))
            else:
                reply = route.handler(backend, call)
            reply = after_waiting(backend, call, reply, route.becomes) if route.becomes else reply
            if reply.stream is not None:
                environ['agentbackend.streams'] = True
                environ['agentbackend.trailers'] = trailers
                return bottle.HTTPResponse(Streamed(reply.stream), reply.status, reply.headers)
            return respond(reply.data if route.bare else {'success': True, 'data': reply.data}, reply.status,
                           reply.headers)
        except BackendError as error:
            return respond(view_error(error), error.status, error.headers)
        except Exception as error:
            error = internal_error(error)
            return respond(view_error(error), error.status, {})
    return called


def waited(backend, call, workspace):
    """Return a workspace once it has one of the statuses that the query waits for."""
    return wait_until(backend.state, backend.events, workspace, call.query['wait'].split(','),
                      call.query.get('timeout', WAIT_TIMEOUT), call.watch_disconnect)


def after_waiting(backend, call, reply, wanted):
    """Return the reply that shows a workspace, once what the query or a preference waits for has come."""
    preferred = re.search(r'\bwait\s*=\s*"?(\d{1,5})', call.headers.get('Prefer', ''))
    headers, workspace = dict(reply.headers), None
    if 'wait' in call.query:
        workspace = waited(backend, call, backend.state.get(reply.data['id']))
    elif preferred:
        workspace = wait_until(backend.state, backend.events, backend.state.get(reply.data['id']), [wanted],
                               int(preferred[1]), call.watch_disconnect, strict=False)
        headers['Preference-Applied'] = f'wait={preferred[1]}'
    if PLAIN_TEXT in call.accept and reply.status == 201:
        return Reply(stream=[f"{reply.data['id']}\n".encode()], status=201,
                     headers=headers | {'Content-Type': 'text/plain; charset=utf-8'})
    return Reply(view_workspace(workspace) if workspace else reply.data, reply.status, headers)


def watcher_of(environ):
    """Return what watches for a client to leave. Under another program's server nothing does, and a heartbeat
    finds it out."""
    connection = environ.get('agentbackend.socket')
    if connection is None:
        return lambda callback: io.BytesIO()  # has a close()
    return lambda callback: DisconnectWatcher(connection, callback)


def respond(value, status, headers):
    """Return a value as Bottle's JSON response."""
    return bottle.HTTPResponse(encode(value), status,
                               {**headers, 'Content-Type': 'application/json', 'Cache-Control': 'no-store'})


def read_query(schemas, name, text):
    """Return the query as a checked dict: lists, integers and booleans where the schema has them."""
    properties = schemas.documents[name]['properties']
    query = {}
    if not text and 'required' not in schemas.documents[name]:  # as most are, and to check takes its time
        return query
    for key, values in urllib.parse.parse_qs(text, keep_blank_values=True).items():
        kind = properties.get(key, {}).get('type')
        last = values[-1]
        if kind == 'array':
            query[key] = values
        elif kind == 'integer' and re.fullmatch(r'-?\d{1,15}', last):
            query[key] = int(last)
        elif kind == 'boolean' and last in ('true', 'false', '1', '0', ''):
            query[key] = last in ('true', '1', '')
        else:
            query[key] = last
    schemas.check(name, query, where='query')
    return query


def read_body(schemas, name, environ):
    """Return the JSON body, checked, with sizes in bytes; raise ValidationError, or UnsupportedMediaType when
    it says that it is something else."""
    media_type = environ.get('CONTENT_TYPE', '').partition(';')[0].strip().lower()
    if media_type != 'application/json' and not media_type.endswith('+json'):
        raise UnsupportedMediaType(f"The Content-Type is {quoted(media_type) if media_type else 'missing'}, "
                                   'but has to be application/json.')
    value = parse_json(environ['wsgi.input'].read())
    for key, schema in schemas.properties(name) if isinstance(value, dict) else ():
        if schema.get('x-trim') and isinstance(value.get(key), str):
            value[key] = value[key].strip()
        if schema.get('format') == 'bytes' and isinstance(value.get(key), str):
            with contextlib.suppress(ValueError):  # what is no size the schema refuses, too
                value[key] = parse_size(value[key])
    schemas.check(name, value)
    return value
