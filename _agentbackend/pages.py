"""What the API shows of itself: the OpenAPI document, the dashboard and the reference."""
import copy
import hashlib
import html
import http
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path

from _agentbackend import VERSION
from _agentbackend.errors import (
    BackendError,
    ExecNotFound,
    Forbidden,
    IdempotencyConflict,
    KeyReused,
    NotFound,
    PayloadTooLarge,
    RequestTimeout,
    SessionNotFound,
    StateNotWritten,
    Unauthorized,
    UnsupportedMediaType,
    UpgradeRequired,
    UriTooLong,
    ValidationError,
    WaitTimeout,
    WorkspaceNotFound,
)
from _agentbackend.views import SSE_RETRY

# ---------------------------------------------------------------------------------------------
# OpenAPI
# ---------------------------------------------------------------------------------------------

EVENT_STREAM, PLAIN_TEXT, JSON_TYPE = 'text/event-stream', 'text/plain', 'application/json'
OCTETS, ANY_TYPE = 'application/octet-stream', '*/*'
EVERYWHERE = (ValidationError, UriTooLong, Forbidden, BackendError)  # errors that each route has
WITH_A_BODY = (RequestTimeout, PayloadTooLarge, UnsupportedMediaType)
MISSING = {'/workspaces/<id>': WorkspaceNotFound, '/sessions/<id>': SessionNotFound,
           '<exec_id>': ExecNotFound}  # part of a path -> the error when there is no such thing
HEADERS_OF_ERRORS = {401: 'WWW-Authenticate', 429: 'Retry-After'}


@dataclass(frozen=True)
class StreamOf:
    """A stream of server-sent events that are not the workspaces', by the name of their schema."""

    schema: str


def kinds_of(route, status=None):
    """Return what a route may answer with, at all or with one status: schemas and media types."""
    wanted = route.answers.values() if status is None else [route.answers[status]]
    return [kind for kinds in wanted for kind in (kinds if isinstance(kinds, tuple) else (kinds,))]


def openapi_document(routes, schemas, frame):
    """Return the OpenAPI document of those routes that have a tag; `frame` is what does not come from
    them."""
    routes, titles = [route for route in routes if route.tag], titles_of(schemas)
    document = copy.deepcopy({key: value for key, value in frame.items() if key != 'examples'})
    document['info']['version'] = VERSION
    parts, told = document['components'], {error.code for route in routes for error in errors_of(route)}
    parts['schemas'] = components(schemas, titles) | envelopes(routes, titles)
    codes = sorted({error.code for error in every_error()})
    parts['schemas']['Error']['properties']['code']['examples'] = codes
    parts['examples'] = {example['code']: {'value': example}
                         for example in schemas.documents['error']['examples'] if example['code'] in told}
    document['paths'] = {}
    for route in routes:
        path = re.sub('<([^>:]+)(:[^>]*)?>', r'{\1}', route.path)
        operations = document['paths'].setdefault(path, {})
        operations[route.method.lower()] = operation(route, schemas, titles, frame)
    return document


def every_error(above=BackendError):
    """Yield the classes of all errors that a client may be told."""
    yield above
    for error in above.__subclasses__():
        yield from every_error(error)


def titles_of(schemas):
    """Return the titles of the schema files that are components, by the names of the files."""
    return {name: schema['title'] for name, schema in schemas.documents.items()
            if 'title' in schema and not name.endswith('-query')}


def components(schemas, titles):
    """Return the schema files, and the parts that they define for each other, as components."""
    found = {}
    for name, schema in schemas.documents.items():
        parts = {titles[name]: schema} if name in titles else {}
        found |= {title: referring(part, titles, name)
                  for title, part in (parts | schema.get('$defs', {})).items()}
    return found


def referring(node, titles, name):
    """Return a part of the schema file of that name as the document has it: it refers to components."""
    def target(ref):
        file, _, pointer = ref.partition('#')
        return schema_ref(pointer.rpartition('/')[2] or titles[file.removesuffix('.json') or name])['$ref']

    if isinstance(node, list):
        return [referring(item, titles, name) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: referring(value, titles, name) for key, value in node.items()
            if key not in ('$schema', '$defs')}
    if '$ref' in node:
        node['$ref'] = target(node['$ref'])
    if 'mapping' in node:
        node['mapping'] = {value: target(ref) for value, ref in node['mapping'].items()}
    return node


def envelopes(routes, titles):
    """Return the envelopes in which the routes put their data, as components."""
    wanted = {titles[name] for route in routes if not route.bare
              for name in kinds_of(route) if name in titles}
    return {f'{title}Answer': {
        'type': 'object', 'description': f'{title}, in the envelope of all answers.',
        'required': ['success', 'data'],
        'properties': {'success': {'const': True, 'description': 'always true'}, 'data': schema_ref(title)}}
        for title in sorted(wanted)}


def schema_ref(title):
    """Return a reference to a schema of the document."""
    return {'$ref': f'#/components/schemas/{title}'}


def operation(route, schemas, titles, frame):
    """Return what the document says of one route."""
    words = ' '.join(route.handler.__doc__.split())
    summary = re.split(r'(?<=[.:]) ', words)[0].rstrip('.:')
    name = re.sub('_([a-z])', lambda match: match[1].upper(), route.handler.__name__)
    shown = {'operationId': name, 'summary': summary, 'description': words, 'tags': [route.tag]}
    shown |= {'security': []} if route.open else {}
    parameters = list(parameters_of(route, schemas, titles, frame['components']['parameters']))
    shown |= {'parameters': parameters} if parameters else {}
    if route.body:
        shown['requestBody'] = {'required': True, 'content': {JSON_TYPE: {
            'schema': schema_ref(titles[route.body]), 'examples': frame['examples'][route.body]}}}
    if route.upload:
        shown['requestBody'] = {'required': True, 'content': {OCTETS: {
            'schema': {'type': 'string', 'format': 'binary'}, 'example': frame['examples'][OCTETS]}}}
    if route.websocket:
        send, receive = (schema_ref(titles[name]) for name in route.talk)
        shown['x-websocket'] = {'send': send, 'receive': receive}
    shown['responses'] = {str(status): answer(route, status, schemas, titles, frame['examples'])
                          for status in route.answers} | failures(route)
    return shown


def parameters_of(route, schemas, titles, known):
    """Yield the parameters of a route: of its path, its query, and for a stream what an EventSource sends."""
    parts = route.path.split('/')
    for before, part in zip(parts, parts[1:], strict=False):
        if part.startswith('<'):
            key = next(key for key in (before, part.strip('<>').partition(':')[0]) if key in known)
            yield {'$ref': f'#/components/parameters/{key}'}
    document = referring(schemas.documents[route.query], titles, route.query)
    for name, schema in document['properties'].items():
        words = {key: value for key, value in schema.items() if key != 'description'}
        yield {'name': name, 'in': 'query', 'required': name in document.get('required', ()),
               'description': schema.get('description', ''), 'schema': words}
    if route.method == 'POST':
        yield {'$ref': '#/components/parameters/Idempotency-Key'}
    if route.query == 'wait-query' and route.method == 'POST':
        yield {'$ref': '#/components/parameters/Prefer'}
    if route.method == 'GET' and EVENT_STREAM in kinds_of(route):
        yield {'$ref': '#/components/parameters/Last-Event-ID'}
        yield {'$ref': '#/components/parameters/ticket'}


def answer(route, status, schemas, titles, examples):
    """Return what the document says of one way in which a route succeeds."""
    shown = {'description': http.HTTPStatus(status).phrase}
    if route.headers:
        shown['headers'] = {name: {'$ref': f'#/components/headers/{name}'} for name in route.headers}
    content = {}
    for kind in filter(None, kinds_of(route, status)):
        content |= content_of(kind, route, schemas, titles, examples)
    return shown | ({'content': content} if content else {})


def content_of(kind, route, schemas, titles, examples):
    """Return what the document says of one form of an answer, by its media type."""
    if kind == EVENT_STREAM:
        lines = ''.join(f"id: {example['id']}\ndata: {json.dumps(example)}\n\n"
                        for example in schemas.documents['event']['examples'])
        return {EVENT_STREAM: {'schema': schema_ref(titles['event-stream']),
                               'example': f': events\n\nretry: {SSE_RETRY}\n{lines}'}}
    if isinstance(kind, StreamOf):
        lines = ''.join(f'data: {json.dumps(example)}\n\n'
                        for example in schemas.documents[kind.schema]['examples'])
        return {EVENT_STREAM: {'schema': {'type': 'string', 'contentMediaType': EVENT_STREAM,
                                          'contentSchema': schema_ref(titles[kind.schema])},
                               'example': f': events\n\n{lines}'}}
    if kind in titles:
        title = titles[kind] if route.bare else f'{titles[kind]}Answer'
        example = example_of(schemas.documents, kind)
        return {JSON_TYPE: {'schema': schema_ref(title),
                            'example': example if route.bare else {'success': True, 'data': example}}}
    binary = {'format': 'binary'} if kind not in (JSON_TYPE, PLAIN_TEXT) else {}
    return {kind: {'schema': {'type': 'object' if kind == JSON_TYPE else 'string', **binary},
                   'example': examples[kind]}}


def example_of(documents, name):
    """Return the first example of a schema file; that of a list is one of its items."""
    if documents[name].get('type') == 'array':
        return [example_of(documents, documents[name]['items']['$ref'].removesuffix('.json'))]
    return documents[name]['examples'][0]


def errors_of(route):
    """Return the errors that a route may answer with."""
    return {*EVERYWHERE, *route.errors, *(error for part, error in MISSING.items() if part in route.path),
            *((UpgradeRequired,) if route.websocket else ()),
            *((WaitTimeout,) if route.query == 'wait-query' else ()),
            *(() if route.open else (Unauthorized,)),
            *(WITH_A_BODY if route.body else ()), *((RequestTimeout,) if route.upload else ()),
            *(() if route.method == 'GET' else (StateNotWritten,)),
            *((IdempotencyConflict, KeyReused) if route.method == 'POST' else ())}


def failures(route):
    """Return what the document says of the ways in which a route fails, by their status."""
    shown, errors = {}, errors_of(route)
    for status in sorted({error.status for error in errors}):
        codes = sorted({error.code for error in errors if error.status == status})
        examples = {code: {'$ref': f'#/components/examples/{code}'} for code in codes}
        content = {JSON_TYPE: {'schema': schema_ref('Error'), 'examples': examples}}
        shown[str(status)] = {'description': ' or '.join(codes), 'content': content}
        if status in HEADERS_OF_ERRORS:
            name = HEADERS_OF_ERRORS[status]
            shown[str(status)]['headers'] = {name: {'$ref': f'#/components/headers/{name}'}}
    return shown


# ---------------------------------------------------------------------------------------------
# Pages
# ---------------------------------------------------------------------------------------------

MEDIA_TYPES = {'.html': 'text/html; charset=utf-8', '.js': 'text/javascript; charset=utf-8',
               '.css': 'text/css; charset=utf-8',
               '.svg': 'image/svg+xml', '.json': JSON_TYPE}
SAFE_HEADERS = {
    'Cache-Control': 'no-cache', 'X-Content-Type-Options': 'nosniff', 'Referrer-Policy': 'no-referrer',
    'Cross-Origin-Resource-Policy': 'same-origin',
    'Content-Security-Policy':
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}
# Scalar writes its styles into the page, and compiles templates of its own making.
REFERENCE_POLICY = SAFE_HEADERS['Content-Security-Policy'].replace(
    "style-src 'self'", "style-src 'self' 'unsafe-inline'").replace('img-src', 'font-src data:; img-src')
# xterm.js writes its styles into the page, which the dashboard shows in a frame.
TERMINAL_POLICY = SAFE_HEADERS['Content-Security-Policy'].replace(
    "style-src 'self'", "style-src 'self' 'unsafe-inline'").replace("ancestors 'none'", "ancestors 'self'")
# Files of packages from PyPI, which are not imported: they would want Flask and more.
SCALAR, XTERM, XTERM_STYLE = 'scalar.js', 'xterm.js', 'xterm.css'
FOREIGN = {SCALAR: ('flask_openapi3_scalar', 'templates/scalar/js/scalar.standalone.js'),
           XTERM: ('nicegui', 'elements/xterm/dist/index.js'),
           XTERM_STYLE: ('nicegui', 'elements/xterm/dist/xterm.css')}


class Page:
    """A file that a browser is sent, or a text that was made in its place; read when it is asked for."""

    def __init__(self, name, path=None, text=None, **headers):
        self._path = path
        self._text = text
        self.headers = {'Content-Type': MEDIA_TYPES.get(Path(name).suffix, 'application/octet-stream'),
                        **SAFE_HEADERS, **headers, 'ETag': self.etag}

    @property
    def etag(self):
        """What tells this version from another."""
        if self._path is None:
            return f'"{hashlib.sha256(self._text.encode()).hexdigest()[:20]}"'
        found = self._path.stat()
        return f'"{found.st_mtime_ns:x}-{found.st_size:x}"'

    def read(self):
        """Return its bytes."""
        return self._text.encode() if self._path is None else self._path.read_bytes()


class Pages:
    """What people see in a browser: the dashboard, the reference of the API, and what these load. None of it
    needs the internet."""

    def __init__(self, folder, document):
        self._folder = folder
        self._text = json.dumps(document, ensure_ascii=False, indent=1)
        self._document = document

    def find(self, name):
        """Return a page by its name; raise NotFound."""
        if name == 'openapi.json':
            return Page(name, text=self._text)
        if name in ('openapi.html', 'openapi-plain.html'):
            return self._plain() if foreign(SCALAR) is None or 'plain' in name else self._reference()
        if name == 'terminal.html':
            found = foreign(XTERM) and self._folder / name
            return Page(name, found or self._folder / 'terminal-plain.html',
                        **{'Content-Security-Policy': TERMINAL_POLICY})
        path = foreign(name) if name in FOREIGN else self._folder / name
        if path is None or len(name) > 100 or not path.is_file() or path.name.startswith(
                ('.', 'openapi-', 'terminal-')):
            raise NotFound(f'There is no file {name[:100]!r} here.')
        return Page(name, path)

    def _reference(self):
        return Page('openapi.html', self._folder / 'openapi-scalar.html',
                    **{'Content-Security-Policy': REFERENCE_POLICY})

    def _plain(self):
        paths = self._document['paths']
        rows = [(method.upper(), path, shown['summary']) for path in paths
                for method, shown in paths[path].items()]
        cells = [''.join(f'<td>{html.escape(cell)}</td>' for cell in row) for row in rows]
        text = ''.join(f'<tr>{row}</tr>\n' for row in cells)
        return Page('openapi.html',
                    text=(self._folder / 'openapi-plain.html').read_text().replace('<!-- routes -->', text))


def foreign(name):
    """Return where a file of a package is, or None."""
    package, path = FOREIGN[name]
    spec = importlib.util.find_spec(package)
    found = Path(spec.origin).parent / path if spec and spec.origin else None
    return found if found and found.is_file() else None
