"""The API shows itself: its document fits the standard, the routes and what is really answered."""
import json
import re

import contract
import jsonschema
import pytest
from conftest import ROOT
from contract import DOCUMENT, FRAME, check_answer
from openapi_spec_validator import OpenAPIV31SpecValidator

from _agentbackend import pages
from _agentbackend.errors import BackendError
from _agentbackend.pages import Pages, every_error, failures
from _agentbackend.schemas import Schemas
from agentbackend import ROUTES

SCHEMAS, PARAMETERS = DOCUMENT['components']['schemas'], DOCUMENT['components']['parameters']
OPERATIONS = [(method, path, told) for path, methods in DOCUMENT['paths'].items()
              for method, told in methods.items()]
every_operation = pytest.mark.parametrize(('method', 'path', 'told'), OPERATIONS,
                                          ids=[f'{method} {path}' for method, path, _ in OPERATIONS])


def test_the_document_is_valid_openapi():
    assert DOCUMENT['openapi'].startswith('3.1.')
    assert [error.message for error in OpenAPIV31SpecValidator(DOCUMENT).iter_errors()] == []


def test_the_server_gives_the_document_that_the_routes_make(server):
    answer = server.call('GET', '/openapi.json')
    assert answer.status_code == 200 and answer.headers['Content-Type'] == 'application/json'
    assert answer.json() == DOCUMENT


def test_every_route_but_those_of_pages_is_in_the_document_and_nothing_else():
    routes = {(route.method.lower(), re.sub('<([^>:]+)(:[^>]*)?>', r'{\1}', route.path)) for route in ROUTES}
    pages = {('get', path) for path in ('/', '/openapi', '/terminal', '/static/{name}')}
    assert pages < routes and routes - pages == {(method, path) for method, path, _ in OPERATIONS}


@every_operation
def test_an_operation_is_described(method, path, told):
    assert told['summary'] and told['description'] and told['operationId'].isidentifier()
    assert len(told['summary']) <= 60 and not re.search(r'[.:;]', told['summary'])
    assert len(told['tags']) == 1 and told['tags'][0] in {tag['name'] for tag in FRAME['tags']}
    good = [status for status in told['responses'] if int(status) < 400]
    assert good and all('description' in response for response in told['responses'].values())
    for status in good:
        content = told['responses'][status].get('content', {})
        assert content or status == '101'
    known = {resolve(parameter)['name'] for parameter in told.get('parameters', ())}
    assert set(re.findall(r'{(\w+)}', path)) <= known


def test_operations_have_names_of_their_own():
    names = [told['operationId'] for _, _, told in OPERATIONS]
    assert len(set(names)) == len(names)


@every_operation
def test_every_error_has_an_example_of_its_code(method, path, told):
    for status, response in told['responses'].items():
        if int(status) < 400:
            continue
        examples = response['content']['application/json']['examples']
        assert examples
        for code, example in examples.items():
            assert resolve(example)['value']['code'] == code


def test_every_code_that_there_is_has_an_example():
    codes = {error.code for error in every_error()}
    assert BackendError.code in codes
    assert codes == {example['code'] for example in SCHEMAS['Error']['examples']}
    assert SCHEMAS['Error']['properties']['code']['examples'] == sorted(codes)


def test_the_parts_of_the_document_are_named_and_used():
    refs = set(re.findall(r'"\$ref": "([^"]+)"', json.dumps(DOCUMENT)))
    assert not [ref for ref in refs if not re.fullmatch(r'#/components/[a-z]+/[\w-]+', ref)]
    for kind, parts in DOCUMENT['components'].items():
        unused = {name for name in parts if f'#/components/{kind}/{name}' not in refs}
        assert kind == 'securitySchemes' or not unused, unused


def test_every_property_is_described():
    for name, schema in SCHEMAS.items():
        assert resolve(schema).get('description'), name
        for where, told in properties_of(schema, name):
            assert told.get('description') or resolve(told).get('description'), where


def properties_of(node, where):
    """Yield (where, schema) of every property in a schema."""
    if isinstance(node, list):
        node = dict(enumerate(node))
    for key, value in node.items() if isinstance(node, dict) else ():
        if key == 'properties':
            yield from ((f'{where}.{name}', told) for name, told in value.items())
        if key not in ('examples', 'mapping'):
            yield from properties_of(value, f'{where}.{key}')


@pytest.mark.parametrize('name', [name for name in SCHEMAS if 'examples' in SCHEMAS[name]])
def test_the_examples_of_a_schema_fit_it(name):
    check = contract.validator_of(('schema', name), {'$ref': f'#/components/schemas/{name}'})
    assert SCHEMAS[name]['examples']
    for example in SCHEMAS[name]['examples']:
        assert [error.message for error in check.iter_errors(example)] == []


@every_operation
def test_every_body_and_answer_has_examples_that_fit(method, path, told):
    given = [((status, kind), content) for status, response in told['responses'].items()
             for kind, content in response.get('content', {}).items()]
    given += [('body', content) for content in told.get('requestBody', {}).get('content', {}).values()]
    for status, content in given:
        examples = [content['example']] if 'example' in content else [
            resolve(item)['value'] for item in content['examples'].values()]
        check = contract.validator_of((status, method, path), content['schema'])
        assert examples and [error.message for example in examples
                             for error in check.iter_errors(example)] == []


def test_the_bodies_are_taken_as_they_are_shown(make_server, own_templates):
    """In the order in which somebody tries them: change and execute are about what create makes."""
    folder, add_template = own_templates
    add_template('bun-typescript')
    server = make_server(TEMPLATES_DIR=str(folder), DEFAULT_TEMPLATE='bun-typescript')
    path = PARAMETERS['workspaces']['example']
    for body in bodies('post', '/api/workspaces'):
        assert server.call('POST', '/api/workspaces', body).status_code == 201
    for body in bodies('patch', '/api/workspaces/{id}'):
        assert server.call('PATCH', f'/api/workspaces/{path}', body).status_code == 200
    for body in bodies('post', '/api/agent/execute'):  # its image is being built, so that no agent can work
        assert server.call('POST', '/api/agent/execute', body).json()['code'] == 'WORKSPACE_NOT_RUNNING'


def bodies(method, path):
    content = DOCUMENT['paths'][path][method]['requestBody']['content']['application/json']
    return [example['value'] for example in content['examples'].values()]


def test_a_query_is_described_as_it_is_checked():
    documents = Schemas(ROOT / 'schemas').documents
    for route in [route for route in ROUTES if route.tag]:
        path = re.sub('<([^>:]+)(:[^>]*)?>', r'{\1}', route.path)
        parameters = [resolve(item)
                      for item in DOCUMENT['paths'][path][route.method.lower()].get('parameters', ())]
        shown = {item['name'] for item in parameters if item['in'] == 'query'} - {'ticket'}
        assert shown == set(documents[route.query]['properties'])


def test_streams_and_the_websocket_are_described_by_events():
    execute = DOCUMENT['paths']['/api/agent/execute']['post']['responses']['200']
    stream = execute['content']['text/event-stream']
    assert stream['schema'] == {'$ref': '#/components/schemas/EventStream'}
    data = SCHEMAS['ServerSentEvent']['properties']['data']
    assert data['contentSchema'] == {'$ref': '#/components/schemas/AnyEvent'}
    data = [json.loads(line[6:]) for line in stream['example'].splitlines() if line.startswith('data: ')]
    check = contract.validator_of('event', {'$ref': '#/components/schemas/AnyEvent'})
    assert data and all(check.is_valid(event) for event in data)
    assert set(execute['headers']) == {'X-Session-Id', 'X-Run-Id', 'Location'}
    socket = DOCUMENT['paths']['/agent/ws']['get']
    assert socket['x-websocket']['receive'] == {'$ref': '#/components/schemas/AnyEvent'}
    assert '101' in socket['responses']


@pytest.mark.parametrize('name', ['AnyEvent', 'WebSocketMessage'])
def test_what_is_of_several_types_is_told_apart_by_a_type_that_each_needs(name):
    mapping = SCHEMAS[name]['discriminator']['mapping']
    assert SCHEMAS[name]['discriminator']['propertyName'] == 'type'
    assert list(mapping.values()) == [item['$ref'] for item in SCHEMAS[name]['oneOf']]
    for value, ref in mapping.items():
        found = resolve({'$ref': ref})
        own = found['allOf'][1] if 'allOf' in found else found
        assert 'type' in own['required']
        assert own['properties']['type'].get('enum') == [value] or own['properties']['type']['const'] == value
    if name == 'AnyEvent':
        assert SCHEMAS['Event']['discriminator']['mapping'] == mapping
        assert list(SCHEMAS['EventType']['enum']) and set(SCHEMAS['EventType']['enum']) == set(mapping)


def test_a_plain_list_is_there_with_and_without_scalar(server, monkeypatch):
    plain = server.call('GET', '/openapi?plain')
    assert plain.status_code == 200 and plain.headers['Content-Type'].startswith('text/html')
    assert all(f'<td>{told["summary"]}</td>' in plain.text for _, _, told in OPERATIONS)
    assert '<script' not in plain.text and 'scalar.js' in server.call('GET', '/openapi').text
    monkeypatch.setattr(pages, 'foreign', lambda name: None)
    assert Pages(ROOT / 'static', DOCUMENT).find('openapi.html').read().decode() == plain.text


def test_a_limit_says_when_to_come_again():
    assert failures(next(route for route in ROUTES
                         if route.path == '/api/agent/execute'))['429']['headers'].keys() == {'Retry-After'}


@pytest.mark.parametrize('answer', [
    ('GET', '/api/workspaces', 299, '{"success": true, "data": []}'), ('GET', '/api/workspaces', 200, '[]'),
    ('GET', '/api/workspaces', 200, '{"success": true, "data": [], "more": 1}'),
    ('GET', '/health', 200, '{"status": "healthy"}'),
    ('GET', '/api/workspaces/a', 404, '{"success": false, "error": "x", "code": "SESSION_NOT_FOUND"}'),
    ('GET', '/api/workspaces/a', 409, '{"success": false, "error": "x", "code": "SESSION_BUSY"}'),
    ('GET', '/nowhere', 200, '{}'),
    ('POST', '/api/tickets', 201,
     '{"success": true, "data": {"ticket": "x", "expiresIn": 30, "surprise": 1}}'),
    ('GET', '/api/templates', 200,
     '{"success": true, "data": [{"name": "x", "description": "", "default": true, "image": "x", "state": '
     '"ready", "odd": 1}]}'),
], ids=lambda answer: f'{answer[0]} {answer[1]} {answer[2]}')
def test_the_check_of_all_answers_finds_what_is_not_promised(answer):
    method, path, status, body = answer
    with pytest.raises(AssertionError, match='OpenAPI'):
        check_answer(method, path, status, {'Content-Type': 'application/json'}, lambda: body)


def test_a_new_workspace_has_one_form_and_every_choice_a_name():
    """So that what is generated has the workspace's type, and none like `GitCredentialsType2Type1`."""
    assert set(DOCUMENT['paths']['/api/workspaces']['post']['responses']['201']['content']) == {
        'application/json'}
    nameless = re.findall(r'"enum": \[[^\]]*null', json.dumps(SCHEMAS))
    assert nameless == [] and SCHEMAS['KeptCredentials']['enum'] == ['kept']


def test_the_check_of_all_answers_lets_pass_what_is_promised():
    workspaces = SCHEMAS['Workspace']['examples']
    check_answer('GET', '/api/workspaces?type=agent', 200, {'Content-Type': 'application/json'},
                 lambda: json.dumps({'success': True, 'data': workspaces}))
    check_answer('GET', '/nowhere', 404, {'Content-Type': 'application/json'},
                 lambda: '{"success": false, "error": "x", "code": "NOT_FOUND"}')


def test_the_frame_names_what_the_operations_refer_to():
    jsonschema.Draft202012Validator.check_schema(SCHEMAS['Workspace'])
    for ref in set(re.findall(r'"\$ref": "(#[^"]+)"', json.dumps(DOCUMENT))):
        assert resolve({'$ref': ref})


def resolve(node):
    while '$ref' in node:
        target = DOCUMENT
        for part in node['$ref'].lstrip('#/').split('/'):
            target = target[int(part)] if isinstance(target, list) else target[part]
        node = target
    return node
