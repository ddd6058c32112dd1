"""What the API shows of itself: the OpenAPI document, the dashboard and the reference."""
import copy
import hashlib
import html
import http
import importlib.util
import json
import re
from pathlib import Path

from _agentbackend import VERSION
from _agentbackend.errors import (
    BackendError,
    Forbidden,
    NotFound,
    PayloadTooLarge,
    RequestTimeout,
    StateNotWritten,
    Unauthorized,
    UnsupportedMediaType,
    UriTooLong,
    ValidationError,
)
from _agentbackend.views import RETRY

# ---------------------------------------------------------------------------------------------
# OpenAPI
# ---------------------------------------------------------------------------------------------

EVENT_STREAM, PLAIN_TEXT = 'text/event-stream', 'text/plain'
HTML_PAGE, JSON_TYPE = 'text/html', 'application/json'
EVERYWHERE = (ValidationError, UriTooLong, Forbidden, BackendError)  # errors that each route has
WITH_A_BODY = (RequestTimeout, PayloadTooLarge, UnsupportedMediaType)
HEADERS_OF_ERRORS = {401: 'WWW-Authenticate', 429: 'Retry-After'}


def openapi_document(routes, schemas, frame):
    """Return the OpenAPI document of a table of routes; `frame` is what does not come from them."""
    document = copy.deepcopy(frame)
    document['info']['version'] = VERSION
    named = {name: schema for name, schema in schemas.documents.items() if not name.endswith('-query')}
    titles = {name: schema['title'] for name, schema in named.items()}
    document['components']['schemas'] = {titles[name]: component(schema, titles)
                                         for name, schema in named.items()}
    codes = sorted({error.code for error in every_error()})
    document['components']['schemas']['Error']['properties']['code']['examples'] = codes
    document['components']['examples'] = {example['code']: {'value': example}
                                          for example in schemas.documents['error']['examples']}
    document['paths'], known = {}, frame['components']['parameters']
    for route in routes:
        path = re.sub('<([^>:]+)(:[^>]*)?>', r'{\1}', route.path)
        operations = document['paths'].setdefault(path, {})
        operations[route.method.lower()] = operation(route, schemas, titles, known)
    return document


def every_error(above=BackendError):
    """Yield the classes of all errors that a client may be told."""
    yield above
    for error in above.__subclasses__():
        yield from every_error(error)


def component(schema, titles):
    """Return a schema file as a component: it names the others as the document does."""
    own = titles[next(name for name, title in titles.items() if title == schema['title'])]

    def renamed(node):
        if isinstance(node, list):
            return [renamed(item) for item in node]
        if not isinstance(node, dict):
            return node
        node = {key: renamed(value) for key, value in node.items() if key != '$schema'}
        if isinstance(node.get('$ref'), str):
            file, _, pointer = node['$ref'].partition('#')
            title = titles[file.removesuffix('.json')] if file else own
            node['$ref'] = f'#/components/schemas/{title}{pointer}'
        return node
    return renamed(schema)


def operation(route, schemas, titles, known):
    """Return what the document says of one route."""
    words = ' '.join(route.handler.__doc__.split())
    summary = re.split(r'(?<=[.:]) ', words)[0].rstrip('.:')
    name = re.sub('_([a-z])', lambda match: match[1].upper(), route.handler.__name__)
    shown = {'operationId': name, 'summary': summary, 'description': words,
             'tags': [route.tag] if route.tag else []}
    shown |= {'security': []} if route.open else {}
    parameters = list(parameters_of(route, schemas, known))
    shown |= {'parameters': parameters} if parameters else {}
    if route.body:
        shown['requestBody'] = {'required': True,
                                'content': {JSON_TYPE: {'schema': schema_ref(titles[route.body])}}}
    if 101 in route.answers:
        shown['x-websocket'] = {'send': schema_ref(titles['websocket-message']),
                                'receive': schema_ref(titles['event'])}
    shown['responses'] = {str(status): answer(route, status, schemas, titles)
                          for status in route.answers} | failures(route)
    return shown


def schema_ref(title):
    """Return a reference to a schema of the document."""
    return {'$ref': f'#/components/schemas/{title}'}


def parameters_of(route, schemas, known):
    """Yield the parameters of a route: of its path, its query, and for a stream what an EventSource sends."""
    parts = route.path.split('/')
    for before, part in zip(parts, parts[1:], strict=False):
        if part.startswith('<'):
            key = next(key for key in (before, part.strip('<>').partition(':')[0]) if key in known)
            yield {'$ref': f'#/components/parameters/{key}'}
    document = schemas.documents[route.query]
    for name, schema in document['properties'].items():
        words = {key: value for key, value in schema.items() if key != 'description'}
        yield {'name': name, 'in': 'query', 'required': name in document.get('required', ()),
               'description': schema.get('description', ''), 'schema': words}
    if route.method == 'GET' and EVENT_STREAM in route.answers.values():
        yield {'$ref': '#/components/parameters/Last-Event-ID'}
        yield {'$ref': '#/components/parameters/ticket'}


def answer(route, status, schemas, titles):
    """Return what the document says of one way in which a route succeeds."""
    wanted = route.answers[status]
    shown = {'description': http.HTTPStatus(status).phrase}
    if route.headers:
        shown['headers'] = {name: {'$ref': f'#/components/headers/{name}'} for name in route.headers}
    if wanted == EVENT_STREAM:
        lines = ''.join(f"id: {example['id']}\ndata: {json.dumps(example)}\n\n"
                        for example in schemas.documents['event']['examples'])
        text = {'type': 'string',
                'description': 'The data of each event is an Event as JSON. Lines that begin with a colon '
                               'are signs of life.',
                'contentMediaType': JSON_TYPE, 'contentSchema': schema_ref(titles['event'])}
        shown['content'] = {EVENT_STREAM: {'schema': text, 'example': f': events\n\nretry: {RETRY}\n{lines}'}}
    elif wanted and '/' in wanted:
        shown['content'] = {wanted: {'schema': {'type': 'object' if wanted == JSON_TYPE else 'string'}}}
    elif wanted:
        data = schema_ref(titles[wanted])
        envelope = {'type': 'object', 'required': ['success', 'data'],
                    'properties': {'success': {'const': True}, 'data': data}}
        shown['content'] = {JSON_TYPE: {'schema': data if route.bare else envelope}
                            | example_of(wanted, schemas, bare=route.bare)}
    return shown


def example_of(name, schemas, *, bare):
    """Return the example of an answer as a media type has it: that of its schema, in the envelope unless it
    is bare."""
    schema = schemas.documents[name]
    if schema.get('type') == 'array':
        examples = [schemas.documents[schema['items']['$ref'].removesuffix('.json')]['examples']]
    else:
        examples = schema.get('examples', [])
    return {'example': examples[0] if bare else {'success': True, 'data': examples[0]}} if examples else {}


def failures(route):
    """Return what the document says of the ways in which a route fails, by their status."""
    errors = {*EVERYWHERE, *route.errors, *(() if route.open else (Unauthorized,)),
              *(WITH_A_BODY if route.body else ()),
              *(() if route.method == 'GET' else (StateNotWritten,))}
    shown = {}
    for status in sorted({error.status for error in errors}):
        codes = sorted({error.code for error in errors if error.status == status})
        shown[str(status)] = {'description': ' or '.join(codes), 'content': {JSON_TYPE: {
            'schema': schema_ref('Error'), 'examples': {code: {'$ref': f'#/components/examples/{code}'}
                                                        for code in codes}}}}
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
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}
# Scalar writes its styles into the page, and compiles templates of its own making.
REFERENCE_POLICY = SAFE_HEADERS['Content-Security-Policy'].replace(
    "style-src 'self'", "style-src 'self' 'unsafe-inline'").replace('img-src', 'font-src data:; img-src')
SCALAR = 'flask_openapi3_scalar'  # a package from PyPI, of which only the script is used


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
        if name == 'openapi.html':
            return self._reference()
        path = self._scalar() if name == 'scalar.js' else self._folder / name
        if path is None or len(name) > 100 or path.name.startswith(('.', 'openapi-')) or not path.is_file():
            raise NotFound(f'There is no file {name[:100]!r} here.')
        return Page(name, path)

    def _reference(self):
        if self._scalar() is not None:
            return Page('openapi.html', self._folder / 'openapi-scalar.html',
                        **{'Content-Security-Policy': REFERENCE_POLICY})
        paths = self._document['paths']
        rows = [(method.upper(), path, shown['summary']) for path in paths
                for method, shown in paths[path].items()]
        cells = [''.join(f'<td>{html.escape(cell)}</td>' for cell in row) for row in rows]
        text = ''.join(f'<tr>{row}</tr>\n' for row in cells)
        return Page('openapi.html',
                    text=(self._folder / 'openapi-plain.html').read_text().replace('<!-- routes -->', text))

    @staticmethod
    def _scalar():
        """Return where Scalar's script is, or None; the package itself is not imported, since it would want
        Flask."""
        spec = importlib.util.find_spec(SCALAR)
        if not spec or not spec.origin:
            return None
        path = Path(spec.origin).parent / 'templates' / 'scalar' / 'js' / 'scalar.standalone.js'
        return path if path.is_file() else None
