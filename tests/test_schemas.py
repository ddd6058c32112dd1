"""Bodies and queries: what fits, what does not, and how that is told."""
import ast
import itertools
import json
import re

import jsonschema
import pytest
from conftest import ROOT

from _agentbackend.errors import UnsupportedMediaType, ValidationError
from _agentbackend.positions import Cursor, event_id_of, place_of
from _agentbackend.schemas import Schemas, parse_json
from agentbackend import ROUTES, read_body, read_query

SCHEMAS = Schemas(ROOT / 'schemas')
KEY = 'ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJqfHD5e me@box'

BAD_NAMES = {
    'empty': '', 'a space': 'a b', 'a slash': 'a/b', 'up': '../etc', 'only up': '..',
    'trailing newline': 'a\n', '64 characters': 'a' * 64,
    'like an id': 'ws-abc123', 'like a long id': 'ws-abcdef123456', 'leading -': '-a', 'leading .': '.a',
    'leading _': '_a', 'not ASCII': 'ä',
    'NUL': 'a\0', 'a colon': 'a:b', 'a number': 5, 'null': None, 'a list': ['a'], 'true': True,
}
GOOD_NAMES = ['a', 'A', '0', 'my.project_2-x', 'a' * 63, 'ws-abc', 'ws-ABC123', 'ws-abc123.x', 'ws', 'a..b']

BAD_URLS = {
    'empty': '', 'not a URL': 'repo', 'local path': '/srv/repo.git', 'relative path': './repo',
    'file': 'file:///etc', 'FILE': 'FILE:///etc',
    'ext': 'ext::sh -c touch% /tmp/x', 'fd': 'fd::7', 'option': '--upload-pack=x', 'short option': '-x',
    'option as host': 'ssh://-oProxyCommand=x/y',
    'option as http host': 'https://-x/y', 'option as path': 'git@host:-x',
    'option as scp host': 'git@-oProxyCommand=x:y', 'a space': 'https://a.example/b c',
    'leading space': ' https://a.example/b', 'trailing newline': 'https://a.example/b\n',
    'newline inside': 'https://a.example/b\n-x',
    'no host': 'https:///b', 'windows': 'C:\\repo', 'javascript': 'javascript:alert(1)',
    'ftp': 'ftp://a.example/b', 'too long': 'https://a.example/' + 'b' * 2048,
    'host without user': 'host:path', 'a number': 5, 'null': None,
}
GOOD_URLS = [
    'https://github.com/oven-sh/bun.git', 'http://git.lan:8080/a/b', 'https://user:token@a.example/b.git',
    'https://token@a.example/b', 'https://[::1]:8443/b',
    'ssh://git@a.example:2222/b.git', 'ssh://a.example/~me/b', 'git://a.example/b',
    'git@github.com:oven-sh/bun.git', 'git@a.example:~/b', 'me_2@10.0.0.1:/srv/b.git',
]
BAD_BRANCHES = {
    'empty': '', 'two dots': 'a..b', 'leading -': '-x', 'an option': '--upload-pack=x', 'a space': 'a b',
    'tilde': 'a~1', 'caret': 'a^', 'colon': 'a:b', 'question': 'a?',
    'star': 'a*', 'bracket': 'a[b', 'backslash': 'a\\b', 'trailing /': 'a/', 'leading /': '/a',
    'double /': 'a//b', 'trailing .': 'a.', 'leading .': '.a', 'dot part': 'a/.b',
    'at brace': 'a@{1}', 'control': 'a\x07', 'trailing newline': 'a\n', 'too long': 'a' * 256, 'a number': 1,
    'null': None,
}
GOOD_BRANCHES = ['main', 'feature/login', 'v1.0.2', 'fix-#12', 'ä', 'a@b', 'x' * 255]
BAD_PORTS = {'0': [0], '65536': [65536], 'negative': [-1], 'duplicates': [80, 80], 'editor': [8443],
             'ssh': [2222], 'text': ['80'], 'fraction': [80.5],
             'true': [True], 'no list': 80, 'too many': list(range(1, 102))}
BAD_VARIABLES = ['', '1A', 'A-B', 'A=B', 'A B', 'A\n', 'Ä', 'WORKSPACE_ID', 'WORKSPACE_BASE_PATH',
                 'PROJECT_DIR', 'GIT_URL', 'GIT_BRANCH', 'SSH_ENABLED',
                 'AGENTBACKEND_X']
BAD_LABELS = ['', '-a', '.a', '/a', 'a b', 'a\n', 'a=b', 'a' * 129]
OTHER_NONSENSE = {
    'type': ['ephemeral', '', 5, None], 'cpus': [0, -1, 1025, '2', True],
    'memory': [1, 16777215, 2**47, '4g', -1, 16777216.5],
    'ttl': [0, -1, 1.5, '60', 315360001, True], 'ssh': ['yes', 1, None],
    'env': [[], 'A=B', {'A': 1}, {'A': None}, {'A': 'x' * 32769}],
    'labels': [[], {'a': 1}, {'a': None}, {'a': 'x' * 1025}, {f'l{number}': '' for number in range(101)}],
    'sshPublicKeys': ['x', [5], ['not a key'], [KEY + '\n'], [KEY + '\n' + KEY], ['ssh-ed25519'],
                      ['command="x" ' + KEY]],
    'template': ['', '../base', 'a/b', '.a', '-a', 'a\n', 'a' * 64, 5, None],
}
FULL = {
    'name': 'full', 'template': 'bun-typescript', 'type': 'agent', 'gitUrl': 'git@github.com:a/b.git',
    'gitBranch': 'main', 'env': {'A': 'b', '_x1': ''},
    'ports': [3000, 65535, 1], 'cpus': 1.5, 'memory': 536870912, 'ttl': 3600, 'ssh': False,
    'sshPublicKeys': [KEY], 'labels': {'team.example/x': 'y', 'plain': ''},
}


def details(name, value, **options):
    """Return {path: message} of every error, after a look at the text that goes with them."""
    with pytest.raises(ValidationError) as caught:
        SCHEMAS.check(name, value, **options)
    error = caught.value
    assert (error.status, error.code) == (400, 'VALIDATION_ERROR')
    assert all(set(item) == {'path', 'message'} for item in error.details)
    assert error.details[0]['message'] in str(error) and len(str(error)) < 500
    return {item['path']: item['message'] for item in error.details}


def refuse_create(**fields):
    return details('workspace-create', {'name': 'fine', **fields})


def labelled(cases):
    return pytest.mark.parametrize('value', cases.values(), ids=cases.keys())


def refs(document):
    """Yield every $ref of a schema."""
    if isinstance(document, dict):
        if isinstance(document.get('$ref'), str):
            yield document['$ref']
        document = list(document.values())
    if isinstance(document, list):
        yield from itertools.chain.from_iterable(map(refs, document))


def test_every_file_is_a_schema_with_local_refs_only():
    files = {path.stem for path in (ROOT / 'schemas').glob('*.json')}
    assert files and files == set(SCHEMAS.documents)
    for name, document in SCHEMAS.documents.items():
        jsonschema.Draft202012Validator.check_schema(document)
        for ref in refs(document):
            file, _, pointer = ref.partition('#')
            target = SCHEMAS.documents[file.removesuffix('.json') if file else name]
            for part in pointer.strip('/').split('/') if pointer.strip('/') else ():
                target = target[part]


@pytest.mark.parametrize('name',
                         sorted({name for route in ROUTES for name in (route.body, route.query) if name}))
def test_every_body_and_query_refuses_unknown_fields(name):
    value = {field: None for field in SCHEMAS.documents[name].get('required', ())} | {'surprise': 1}
    assert "'surprise'" in details(name, value)['']


@labelled(BAD_NAMES)
def test_a_bad_name_is_refused(value):
    assert list(details('workspace-create', {'name': value})) == ['name']
    assert list(details('workspace-update', {'name': value})) == ['name']


@pytest.mark.parametrize('value', GOOD_NAMES)
def test_a_good_name_is_taken(value):
    SCHEMAS.check('workspace-create', {'name': value})
    SCHEMAS.check('workspace-update', {'name': value})


def test_a_name_is_needed_to_create():
    assert "'name'" in details('workspace-create', {})['']


@pytest.mark.parametrize('value', [[], 'text', 5, None, True])
def test_a_body_is_an_object(value):
    assert 'object' in details('workspace-create', value)['']
    assert 'object' in details('workspace-update', value)['']


def test_an_unknown_field_is_named_with_those_that_are_known():
    message = details('workspace-create', {'name': 'a', 'tmeplate': 'blank'})['']
    assert "'tmeplate'" in message and 'template' in message.partition('known')[2]
    assert "'type'" in details('workspace-update', {'type': 'agent'})['']


@labelled(BAD_URLS)
def test_a_bad_git_url_is_refused(value):
    assert list(refuse_create(gitUrl=value)) == ['gitUrl']


@pytest.mark.parametrize('value', GOOD_URLS)
def test_a_good_git_url_is_taken(value):
    SCHEMAS.check('workspace-create', {'name': 'a', 'gitUrl': value})


@labelled(BAD_BRANCHES)
def test_a_bad_branch_is_refused(value):
    assert list(refuse_create(gitBranch=value)) == ['gitBranch']


@pytest.mark.parametrize('value', GOOD_BRANCHES)
def test_a_good_branch_is_taken(value):
    SCHEMAS.check('workspace-create', {'name': 'a', 'gitBranch': value})


@labelled(BAD_PORTS)
def test_bad_ports_are_refused(value):
    assert {path.partition('.')[0] for path in refuse_create(ports=value)} == {'ports'}


@pytest.mark.parametrize('name', BAD_VARIABLES)
def test_a_bad_name_of_a_variable_is_refused(name):
    assert 'variable' in refuse_create(env={name: 'x'})['env']


@pytest.mark.parametrize('name', BAD_LABELS)
def test_a_bad_name_of_a_label_is_refused(name):
    assert 'label' in refuse_create(labels={name: 'x'})['labels']
    assert 'label' in details('workspace-update', {'labels': {name: 'x'}})['labels']


@pytest.mark.parametrize(('name', 'value'), [(name, value) for name, values in OTHER_NONSENSE.items()
                                             for value in values],
                         ids=lambda item: repr(item)[:40])
def test_other_nonsense_is_told_by_its_path(name, value):
    assert {path.partition('.')[0] for path in refuse_create(**{name: value})} == {name}


def test_a_body_with_every_field_is_taken():
    assert set(FULL) == set(SCHEMAS.documents['workspace-create']['properties'])
    SCHEMAS.check('workspace-create', FULL)
    SCHEMAS.check('workspace-create', {'name': 'a', 'type': 'persistent', 'ttl': None})


def test_an_update_changes_something():
    SCHEMAS.check('workspace-update', {'name': 'b', 'ttl': None, 'labels': {'a': 'b', 'gone': None}})
    assert details('workspace-update', {})
    assert set(details('workspace-update', {'ttl': 0, 'labels': {'a': 5}})) == {'ttl', 'labels.a'}


def test_all_errors_are_told_at_once():
    told = refuse_create(name='a b', type='odd', ports=[0, 80, 70000], ttl=0, env={'A': 5}, extra=1)
    assert set(told) == {'', 'name', 'type', 'ports.0', 'ports.2', 'ttl', 'env.A'}


def test_the_number_of_errors_is_bounded():
    assert len(refuse_create(ports=[-number for number in range(100)])) == 10


@pytest.mark.parametrize('fields', [
    {'name': 'x' * 1_000_000}, {'gitUrl': 'x' * 1_000_000}, {'gitBranch': ' ' * 1_000_000},
    {'x' * 1_000_000: 1}, {'type': 'x' * 1_000_000},
    {'env': {'x-' * 500_000: ''}}, {'env': {'A': 'x' * 1_000_000}}, {'labels': {'a': ['x' * 1_000_000]}},
    {'ports': ['x' * 1_000_000]},
    {'sshPublicKeys': ['x' * 1_000_000]}, {'env': 'x' * 1_000_000},
    {f'unknown{number}': 1 for number in range(50_000)},
], ids=lambda fields: next(iter(fields))[:20])
def test_huge_input_gives_short_messages(fields):
    for path, message in refuse_create(**fields).items():
        assert len(message) <= 600 and len(path) <= 300


def test_the_message_for_a_pattern_says_what_is_wanted_not_the_pattern():
    message = refuse_create(name='a b')['name']
    assert "'a b'" in message and 'letters, digits' in message and '^' not in message


# JSON


@pytest.mark.parametrize('data', [b'', b'{', b'{"name": "a",}', b"{'name': 'a'}", b'NaN', b'{"cpus": NaN}',
                                  b'{"cpus": Infinity}', b'{"cpus": -Infinity}',
                                  b'\xff\xfe', b'{"name": "\xff"}', b'[' * 100_000, b'{"a":' * 100_000,
                                  b'{} {}', b'nul', b'1' * 10_000],
                         ids=lambda data: repr(data[:16]))
def test_what_is_not_strictly_json_is_refused(data):
    with pytest.raises(ValidationError, match='not valid JSON') as caught:
        parse_json(data)
    assert len(str(caught.value)) < 300


def test_half_a_surrogate_pair_is_refused_and_a_whole_one_taken():
    with pytest.raises(ValidationError, match='not valid JSON'):
        parse_json(b'{"labels": {"a": "\\ud83d"}}')
    assert parse_json(b'{"a": "\\ud83d\\ude00 \\u00e4"}') == {'a': '\N{GRINNING FACE} ä'}


def test_a_whole_number_written_as_a_fraction_is_a_whole_number():
    """JSON knows one kind of number: 80.0 fits the schema, and the engine must not be given a float for
    it."""
    value = parse_json(b'{"name": "a", "ports": [80.0], "memory": 5.36870912e8, "cpus": 1.5}')
    SCHEMAS.check('workspace-create', value)
    assert type(value['ports'][0]) is int and type(value['memory']) is int and value['cpus'] == 1.5


@pytest.mark.parametrize('shape', [('{"name": ', '[', ']', '}'),
                                   ('{"name": "a", "ports": [1, ', '[', ']', ']}'),
                                   ('{"name": "a", "env": {"A": ', '{"a":', '1}' , '}}'),
                                   ('', '[', ']', ''), ('{"name": "a", "ports": [', '[', ']', ', 2]}')],
                                   ids=['name', 'ports', 'env', 'top', 'first port'])
def test_deep_nesting_is_an_error_of_the_client_at_every_depth(shape):
    start, opening, closing, end = shape
    for depth in [*range(1, 100, 24), *range(100, 1100, 12), 3000, 9000]:
        data = (start + opening * depth + ('1' if '1' not in closing else '') + closing * depth
                + end).encode()
        with pytest.raises(ValidationError):
            SCHEMAS.check('workspace-create', parse_json(data))


def test_deep_nesting_in_equal_ports_is_an_error_of_the_client():
    for depth in range(1, 1100, 24):
        nested = '[' * depth + '1' + ']' * depth
        with pytest.raises(ValidationError):
            SCHEMAS.check('workspace-create',
                          parse_json(f'{{"name": "a", "ports": [{nested}, {nested}]}}'.encode()))


@pytest.mark.parametrize('media_type', ['', 'text/plain', 'application/x-www-form-urlencoded',
                                        'multipart/form-data', 'application/jsonp'])
def test_another_media_type_is_refused(media_type):
    with pytest.raises(UnsupportedMediaType, match='application/json') as caught:
        read_body(SCHEMAS, 'workspace-create', {'CONTENT_TYPE': media_type})
    assert caught.value.status == 415


# Queries


def test_a_query_becomes_lists():
    assert read_query(SCHEMAS, 'workspace-list-query',
                      'type=agent&type=temporary&status=running&label=a%3Db') == {
'type': ['agent', 'temporary'], 'status': ['running'], 'label': ['a=b']}
    assert read_query(SCHEMAS, 'workspace-list-query', '') == {}


@pytest.mark.parametrize(('text', 'path'), [('type=odd', 'type.0'), ('status=running&status=', 'status.1'),
                                            ('label=', 'label.0'), ('typ=agent', ''),
                                            ('label=' + 'x' * 1201, 'label.0')])
def test_a_bad_query_is_told_by_its_path(text, path):
    with pytest.raises(ValidationError, match='^Invalid query') as caught:
        read_query(SCHEMAS, 'workspace-list-query', text)
    assert [item['path'] for item in caught.value.details] == [path]
    assert len(json.dumps(caught.value.details)) < 800


# The examples that are shown to people

def test_the_ids_of_the_examples_are_taken_by_the_server():
    for example in SCHEMAS.documents['event']['examples']:
        if 'sessionId' in example:
            assert event_id_of(place_of(example['id'])) == example['id']
        else:
            assert str(Cursor.parse(example['id'])) == example['id']


def test_the_examples_of_errors_are_what_the_code_says():
    """Each is some text of the code, with something in the places that are filled in."""
    source = ''.join(path.read_text() for path in [ROOT / 'agentbackend.py',
                                                   *(ROOT / '_agentbackend').glob('*.py')])
    said = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            said.append(''.join(re.escape(part.value) if isinstance(part, ast.Constant) else '.*'
                                for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            said.append(re.escape(node.value))
    for example in SCHEMAS.documents['error']['examples']:
        # Whose words are the engine's and the validator's.
        if example['code'] not in ('DOCKER_ERROR', 'VALIDATION_ERROR'):
            assert any(len(pattern) > 12 and re.fullmatch(pattern, example['error'])
                       for pattern in said), example['error']
