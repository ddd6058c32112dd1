"""Holds the answers that the tests provoke to the OpenAPI document, which is stricter here: no field may come
that it does not name."""
import copy
import functools
import json
import re
import urllib.parse
from pathlib import Path

import jsonschema
import referencing
import referencing.jsonschema

from _agentbackend.pages import openapi_document
from _agentbackend.schemas import Schemas
from agentbackend import ROUTES

ROOT = Path(__file__).resolve().parent.parent
FRAME = json.loads((ROOT / 'static' / 'openapi-frame.json').read_text())
DOCUMENT = openapi_document(ROUTES, Schemas(ROOT / 'schemas'), FRAME)
# Clients that are made from the document would have to take every new workspace for a text as well.
UNTOLD = ('createWorkspace', 'text/plain')
ANYWHERE = {400, 401, 403, 408, 413, 500}  # what is said before a route is looked for, or of any


def closed(node, *, is_open=False, root=False):
    """Return a schema that refuses the fields it does not name. Parts of an allOf stay open, since they know
    only some."""
    if isinstance(node, list):
        return [closed(item, is_open=is_open) for item in node]
    if not isinstance(node, dict):
        return node
    made = {key: {name: closed(item) for name, item in value.items()} if key == 'properties'
            else closed(value, is_open=key == 'allOf')
            for key, value in node.items() if key not in ('example', 'examples')}
    is_object = node.get('type') == 'object' and 'properties' in node
    inline = is_object and 'additionalProperties' not in node and not root
    if ('$ref' in node or inline) and not is_open:
        made['unevaluatedProperties'] = False
    return made


def make_registry():
    document = copy.deepcopy(DOCUMENT)
    schemas = document['components']['schemas']
    parts = {name: closed(schema, root=True) for name, schema in schemas.items()}
    resource = referencing.Resource(contents={'components': {'schemas': parts}},
                                    specification=referencing.jsonschema.DRAFT202012)
    return referencing.Registry().with_resource('urn:api', resource)


REGISTRY = make_registry()
VALIDATORS = {}


def validator_of(key, schema):
    """Return the compiled validator of an answer; each is made once."""
    if key not in VALIDATORS:
        absolute = json.loads(json.dumps(closed(schema)).replace('"#/components/', '"urn:api#/components/'))
        VALIDATORS[key] = jsonschema.Draft202012Validator(absolute, registry=REGISTRY)
    return VALIDATORS[key]


@functools.lru_cache(100)
def errors_of(key, text):
    """Return what is wrong with an answer; what is asked for again and again is mostly the same."""
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:500]}"
            for error in VALIDATORS[key].iter_errors(json.loads(text))]


def fits(route, path):
    """Tell whether a path is one of a route's."""
    return re.fullmatch(re.sub(r'<\w+(:path)?>', lambda match: '.+' if match[1] else '[^/]+', route.path),
                        path, re.DOTALL) is not None


def route_of(method, url):
    """Return the route that a call takes, or None."""
    path = urllib.parse.unquote(urllib.parse.urlsplit(url).path)
    return next((route for route in ROUTES if route.method == method and fits(route, path)), None)


def operation_of(route):
    """Return what the document says of a route."""
    return DOCUMENT['paths'][re.sub(r'<(\w+)(:path)?>', r'{\1}', route.path)][route.method.lower()]


def check_answer(method, url, status, headers, read):
    """Fail unless an answer is one that the document promises; `read()` gives the body as text."""
    route = route_of(method, url)
    if method in ('HEAD', 'OPTIONS') or status == 304 or (route and not route.tag):  # what browsers show
        return
    operation = operation_of(route) if route else None
    media_type = headers.get('Content-Type', '').partition(';')[0]
    told = f'{method} {url[:200]} gave {status} {media_type}'
    promised = operation['responses'] if operation else {}
    assert str(status) in promised or status in ANYWHERE or (operation is None and status in (404, 405)), \
        f'{told}, and the OpenAPI document knows only {sorted(promised)}'
    content = promised.get(str(status), {}).get('content', {})
    if operation and (operation['operationId'], media_type) == UNTOLD:
        return
    media_type = media_type if media_type in content or '*/*' not in content else '*/*'
    assert media_type in content or not content or (status >= 400 and media_type == 'application/json'), \
        f'{told}, and the OpenAPI document knows only {sorted(content)}'
    if media_type != 'application/json':
        return
    if status >= 400:
        key, schema = 'error', {'$ref': '#/components/schemas/Error'}
    else:
        key, schema = (operation['operationId'], status), content[media_type]['schema']
    text = read()
    validator_of(key, schema)
    errors = errors_of(key, text)
    assert not errors, f'{told}, and that is not as the OpenAPI document says:\n' + '\n'.join(errors[:5])
    if status >= 400 and str(status) in promised:
        codes, code = content[media_type]['examples'], json.loads(text)['code']
        assert code in codes, \
            f"{told} with {code}, and the OpenAPI document knows only {sorted(codes)}"
