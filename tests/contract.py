"""Holds the answers that the tests provoke to the OpenAPI document, which is stricter here: no field may come
that it does not name."""
import copy
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
ANYWHERE = {400, 401, 403, 408, 413, 500}  # what is said before a route is looked for, or of any


def closed(node, *, ref_is_open=False, root=False):
    """Return a schema that refuses the fields it does not name. Parts of an allOf stay open, since they know
    only some."""
    if isinstance(node, list):
        return [closed(item, ref_is_open=ref_is_open) for item in node]
    if not isinstance(node, dict):
        return node
    made = {key: {name: closed(item) for name, item in value.items()} if key == 'properties'
            else closed(value, ref_is_open=key == 'allOf')
            for key, value in node.items() if key not in ('example', 'examples')}
    inline = node.get('type') == 'object' and 'properties' in node and 'additionalProperties' not in node and not root  # noqa: E501
    if ('$ref' in node and '/properties/' not in node['$ref'] and not ref_is_open) or inline:
        made['unevaluatedProperties'] = False
    return made


def make_registry():
    document = copy.deepcopy(DOCUMENT)
    schemas = document['components']['schemas']
    document = {'components': {'schemas': {name: closed(schema, root=True)
                                           for name, schema in schemas.items()}}}
    return referencing.Registry().with_resource('urn:api',
                                                referencing.Resource(contents=document,
                                                                     specification=referencing.jsonschema.DRAFT202012))


REGISTRY = make_registry()
VALIDATORS = {}


def validator_of(key, schema):
    """Return the compiled validator of an answer; each is made once."""
    if key not in VALIDATORS:
        absolute = json.loads(json.dumps(closed(schema)).replace('"#/components/', '"urn:api#/components/'))
        VALIDATORS[key] = jsonschema.Draft202012Validator(absolute, registry=REGISTRY)
    return VALIDATORS[key]


def fits(route, path):
    """Tell whether a path is one of a route's."""
    return re.fullmatch(re.sub(r'<\w+(:path)?>', lambda match: '.+' if match[1] else '[^/]+', route.path),
                        path) is not None


def operation_of(method, url):
    """Return (path of the document, its operation) of a call, or None for each where there is none."""
    path = urllib.parse.unquote(urllib.parse.urlsplit(url).path)
    route = next((route for route in ROUTES if route.method == method and fits(route, path)), None)
    if route is None:
        return None
    return DOCUMENT['paths'][route.path.replace('<', '{').replace(':path>', '}').replace('>',
                                                                                         '}')][route.method.lower()]


def check_answer(method, url, status, headers, read):
    """Fail unless an answer is one that the document promises; `read()` gives the body as text."""
    if method in ('HEAD', 'OPTIONS') or status == 304:
        return
    operation = operation_of(method, url)
    media_type = headers.get('Content-Type', '').partition(';')[0]
    told = f'{method} {url[:200]} gave {status} {media_type}'
    promised = operation['responses'] if operation else {}
    assert str(status) in promised or status in ANYWHERE or (operation is None and status in (404, 405)), \
        f'{told}, and the OpenAPI document knows only {sorted(promised)}'
    content = promised.get(str(status), {}).get('content', {})
    assert media_type in content or '*/*' in content or (status >= 400
                                                         and media_type == 'application/json') or not content, \
        f'{told}, and the OpenAPI document knows only {sorted(content)}'  # noqa: E501
    if media_type != 'application/json' or '*/*' in content:
        return
    if status >= 400:
        key, schema = 'error', {'$ref': '#/components/schemas/Error'}
    else:
        key, schema = (operation['operationId'], status), content[media_type]['schema']
    value = json.loads(read())
    errors = [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:500]}"
              for error in validator_of(key, schema).iter_errors(value)]
    assert not errors, f'{told}, and that is not as the OpenAPI document says:\n' + '\n'.join(errors[:5])
    if status >= 400 and str(status) in promised:
        codes = content[media_type]['examples']
        assert value['code'] in codes, f"{told} with {value['code']}, and the OpenAPI document knows only {sorted(codes)}"  # noqa: E501
