"""Bodies and queries: what fits, what does not, and how that is told."""
import ast
import collections
import io
import itertools
import json
import re

import jsonschema
import pytest
from conftest import ROOT

from _agentbackend.config import parse_size
from _agentbackend.errors import UnsupportedMediaType, ValidationError
from _agentbackend.giturls import split_credentials
from _agentbackend.pages import every_error
from _agentbackend.positions import Cursor, event_id_of, place_of
from _agentbackend.routing import read_body, read_query
from _agentbackend.schemas import SENTENCES, Schemas, parse_json
from _agentbackend.timing import parse_since
from agentbackend import ROUTES

SCHEMAS = Schemas(ROOT / 'schemas')
KEY = 'ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOWdkBuJ4ZU+4ICuFKqaXRycPME1NMzSslm6ULIsn8e+ me@box'

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
    'memory': [1, 16777215, 2**47, -1, 16777216.5, None, True, ['4g'], '4x', 'g', '', '0', '0g', '1.5g',
               '-4g', '4g\n', '4gg', '4 \ng', '9' * 21],
    'ttl': [0, -1, 1.5, '60', 315360001, True], 'ssh': ['yes', 1, None],
    'env': [[], 'A=B', {'A': 1}, {'A': None}, {'A': 'x' * 32769}],
    'labels': [[], {'a': 1}, {'a': None}, {'a': 'x' * 1025}, {f'l{number}': '' for number in range(101)}],
    'sshPublicKeys': ['x', [5], ['x\0'], [KEY] * 101],
    'template': ['', '../base', 'a/b', '.a', '-a', 'a\n', 'a' * 64, 5, None],
}
FULL = {
    'name': 'full', 'template': 'bun-typescript', 'type': 'agent', 'gitUrl': 'git@github.com:a/b.git',
    'gitBranch': 'main', 'gitDepth': 1, 'gitFilter': 'blob:none', 'gitToken': 'token', 'gitSshKey': 'key',
    'gitCredentials': 'keep', 'gitUserName': 'Ada', 'gitUserEmail': 'ada@example.org', 'setup': 'npm ci',
    'env': {'A': 'b', '_x1': ''},
    'ports': [3000, 65535, 1], 'cpus': 1.5, 'memory': 536870912, 'ttl': 3600, 'ssh': False,
    'sshPublicKeys': [KEY], 'labels': {'team.example/x': 'y', 'plain': ''},
    'node': 'n1', 'constraints': {'disk': 'ssd'},
}

NAME = ("a name has only letters, digits, '_', '.' and '-', begins with a letter or digit, has at most 63 "
        'characters, and does not look like an id (ws-...)')
KNOWN = ('name, template, type, gitUrl, gitBranch, gitDepth, gitFilter, gitToken, gitSshKey, gitCredentials, '
         'gitUserName, gitUserEmail, setup, env, ports, cpus, memory, ttl, ssh, sshPublicKeys, labels, '
         'node, constraints')
TEXTS = [
    ('workspace-create', None, 'the body is null, but has to be an object'),
    ('workspace-create', [], 'the body is a list, but has to be an object'),
    ('workspace-create', 'name=a', 'the body is a text, but has to be an object'),
    ('workspace-create', {}, 'name is missing'),
    ('workspace-create', {'name': ''}, f'name is "", but {NAME}'),
    ('workspace-create', {'name': 'a b'}, f'name is "a b", but {NAME}'),
    ('workspace-create', {'name': 'ws-abc123'}, f'name is "ws-abc123", but {NAME}'),
    ('workspace-create', {'name': 'a' * 64}, 'name has 64 characters, but at most 63 are taken'),
    ('workspace-create', {'name': None}, 'name is null, but has to be a text, such as "myproject"'),
    ('workspace-create', {'name': True}, 'name is true, but has to be a text, such as "myproject"'),
    ('workspace-create', {'name': ['a']}, 'name is a list, but has to be a text, such as "myproject"'),
    ('workspace-create', {'name': 'a', 'tmeplate': 'blank'}, f'tmeplate is unknown here (known: {KNOWN})'),
    ('workspace-create', {'name': 'a', 'x': 1, 'y': 2},
     f'x is unknown here (known: {KNOWN}); y is unknown here'),
    ('workspace-create', {'name': 'a', 'template': '../base'},
     'template is "../base", but a template is named as its folder is; GET /api/templates lists them'),
    ('workspace-create', {'name': 'a', 'type': 'ephemeral'},
     'type is "ephemeral", but has to be persistent, temporary or agent'),
    ('workspace-create', {'name': 'a', 'type': 5},
     'type is 5, but has to be persistent, temporary or agent'),
    ('workspace-create', {'name': 'a', 'gitUrl': './repo'},
     'gitUrl does not fit: a repository is named by an http, https, ssh or git URL, or as user@host:path; '
     'files of this machine are not seen from a workspace'),
    ('workspace-create', {'name': 'a', 'gitUrl': None},
     'gitUrl is null, but has to be a text, such as "https://github.com/oven-sh/bun.git"'),
    ('workspace-create', {'name': 'a', 'gitBranch': 'a..b'},
     "gitBranch is \"a..b\", but a branch, a tag, a commit, a pull request (pull/7/head) or any other "
     "reference (refs/...) is named as git allows it: no spaces, no '..', none of ~^:?*[\\, and no '-', '/' "
     "or '.' at the beginning nor '/' or '.' at the end"),
    ('workspace-create', {'name': 'a', 'env': 'A=b'},
     'env is a text, but has to be an object, such as {"NODE_ENV": "development"}'),
    ('workspace-create', {'name': 'a', 'env': {'A': 1, 'B': None}},
     'env.A is a number, but has to be a text; env.B is null, but has to be a text'),
    ('workspace-create', {'name': 'a', 'env': {'1A': ''}},
     'a name in env is "1A", but a variable\'s name has only letters, digits and \'_\', does not begin with '
     'a digit, and is none that the workspace itself is given (WORKSPACE_*, PROJECT_DIR, GIT_URL, '
     'GIT_BRANCH, GIT_DEPTH, GIT_FILTER, SSH_ENABLED) or that bash keeps for itself (UID, PWD, SHELLOPTS and '
     'the like)'),
    ('workspace-create', {'name': 'a', 'ports': 80}, 'ports is 80, but has to be a list, such as [3000]'),
    ('workspace-create', {'name': 'a', 'ports': ['80']},
     'ports.0 is "80", but has to be a whole number, such as 3000'),
    ('workspace-create', {'name': 'a', 'ports': [80, 70000]},
     'ports.1 is 70000, but has to be from 1 up to 65,535'),
    ('workspace-create', {'name': 'a', 'ports': [80, 80]}, 'ports has the same entry twice'),
    ('workspace-create', {'name': 'a', 'ports': [8443]},
     'ports.0 is 8443, but a port inside the workspace is from 1 to 65535; 8443 and 2222 belong to its '
     'editor and SSH and are published anyway'),
    ('workspace-create', {'name': 'a', 'ports': list(range(3000, 3101))},
     'ports has 101 entries, but at most 100 are taken'),
    ('workspace-create', {'name': 'a', 'cpus': '2'}, 'cpus is "2", but has to be a number, such as 1.5'),
    ('workspace-create', {'name': 'a', 'cpus': 0}, 'cpus is 0, but has to be from 0.01 up to 1,024'),
    ('workspace-create', {'name': 'a', 'memory': None},
     'memory is null, but has to be a whole number of bytes or a text, such as "4g"'),
    ('workspace-create', {'name': 'a', 'memory': '4x'},
     'memory is "4x", but a memory limit is a number of bytes, or one with k, m, g or t behind it; without '
     'one it is WORKSPACE_MEMORY'),
    ('workspace-create', {'name': 'a', 'memory': 4096},
     'memory is 4096, but has to be from 16,777,216 up to 70,368,744,177,664 bytes'),
    ('workspace-create', {'name': 'a', 'ttl': '60'},
     'ttl is "60", but has to be a whole number of seconds or null, such as 3600'),
    ('workspace-create', {'name': 'a', 'ttl': 0},
     'ttl is 0, but has to be from 1 up to 315,360,000 seconds'),
    ('workspace-create', {'name': 'a', 'ssh': 'yes'}, 'ssh is "yes", but has to be true or false'),
    ('workspace-create', {'name': 'a', 'labels': {'a b': ''}},
     'a name in labels is "a b", but a label\'s name has only letters, digits and \'_./-\', and begins with '
     'a letter or digit'),
    ('workspace-create', {'name': 'a', 'labels': {'a': None}}, 'labels.a is null, but has to be a text'),
    ('workspace-update', {}, 'the body is empty, but needs name, ttl, labels, env, cpus, memory, ports, '
     'sshPublicKeys, gitToken, gitSshKey, gitUserName or gitUserEmail'),
    ('workspace-update', {'labels': {'a': 5}}, 'labels.a is 5, but has to be a text or null'),
    ('agent-execute', {'workspaceId': 'a', 'task': ''}, 'task is empty'),
    ('agent-execute', {'workspaceId': 'a', 'task': 'x' * 4_000_001},
     'task has 4,000,001 characters, but at most 4,000,000 are taken'),
    ('agent-execute', {'workspaceId': 'a', 'task': 'a\0'},
     'task is "a\\u0000", but a task says in your words what the agent is to do, without a NUL character'),
    ('agent-execute', {'timeout': None},
     'task is missing; timeout is null, but has to be a whole number of seconds, such as 300; workspaceId is '
     'missing'),
    ('agent-execute', {'workspaceId': 'a', 'task': 'x', 'maxBudgetUsd': 0},
     'maxBudgetUsd is 0, but has to be above 0 up to 100,000 dollars'),
    ('agent-execute', {'workspaceId': 'a', 'task': 'x', 'model': '-x' * 100},
     f'model is "{"-x" * 30}...", but a model is named as the agent\'s own --model takes it'),
    ('agent-execute', {'workspaceId': 'a', 'task': 'x', 'sessionId': 'a b'},
     'sessionId is "a b", but a session\'s id has only letters, digits, \'_\', \'.\' and \'-\', begins with '
     'a letter or digit, has at most 100 characters, and does not look like a workspace\'s'),
    ('websocket-message', {}, 'type is missing'),
    ('websocket-message', [], 'the message is a list, but has to be an object'),
    ('websocket-message', {'type': 'sub'},
     'type is "sub", but has to be subscribe, unsubscribe, ping or auth'),
    ('websocket-message', {'type': 'subscribe', 'tail': -1},
     'tail is -1, but has to be from 0 up to 100,000; workspaceId is missing'),
    ('websocket-message', {'type': 'ping', 'x': 1}, 'x is unknown here (known: type)'),
    ('websocket-message', {'type': 'auth', 'token': 5}, 'token is a number, but has to be a text'),
    ('workspace-list-query', {'status': ['runing']},
     'status.0 is "runing", but has to be creating, running, stopping, stopped, error or deleting'),
    ('logs-query', {'tail': 'all', 'follow': 'maybe'},
     'follow is "maybe", but has to be true or false; tail is "all", but has to be a whole number'),
    ('no-query', {'x': '1'}, 'x is unknown here'),
]


def details(name, value, **options):
    """Return {path: message} of every error, after a look at the text that goes with them."""
    with pytest.raises(ValidationError) as caught:
        SCHEMAS.check(name, value, **options)
    error = caught.value
    assert (error.status, error.code) == (400, 'VALIDATION_ERROR')
    assert all(set(item) == {'path', 'message'} for item in error.details)
    assert error.details[0]['message'] in str(error) and len(str(error)) < 1200
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
    assert details(name, value)['surprise'].startswith('surprise is unknown here')


@labelled(BAD_NAMES)
def test_a_bad_name_is_refused(value):
    assert list(details('workspace-create', {'name': value})) == ['name']
    assert list(details('workspace-update', {'name': value})) == ['name']


@pytest.mark.parametrize('value', GOOD_NAMES)
def test_a_good_name_is_taken(value):
    SCHEMAS.check('workspace-create', {'name': value})
    SCHEMAS.check('workspace-update', {'name': value})


def test_a_name_is_needed_to_create():
    assert details('workspace-create', {}) == {'name': 'name is missing'}


@pytest.mark.parametrize('value', [[], 'text', 5, None, True])
def test_a_body_is_an_object(value):
    assert 'object' in details('workspace-create', value)['']
    assert 'object' in details('workspace-update', value)['']


def test_an_unknown_field_is_named_with_those_that_are_known():
    message = details('workspace-create', {'name': 'a', 'tmeplate': 'blank'})['tmeplate']
    assert message.startswith('tmeplate is') and 'template' in message.partition('known: ')[2]
    assert 'type' in details('workspace-update', {'type': 'agent'})


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


@pytest.mark.parametrize(('name', 'value'), [
    (name, value) for name, values in OTHER_NONSENSE.items() for value in values],
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
    assert set(told) == {'extra', 'name', 'type', 'ports.0', 'ports.2', 'ttl', 'env.A'}


def test_the_headline_names_every_field_that_is_wrong():
    with pytest.raises(ValidationError) as caught:
        SCHEMAS.check('workspace-create', {'ports': [0, 70000, 'x' * 500], 'gitBranch': 'a b', 'cpus': 0,
                                           'ttl': 0, 'template': 'a b', 'type': 'odd', 'surprise': 1})
    fields = [item['path'] for item in caught.value.details]
    assert fields == ['cpus', 'gitBranch', 'name', 'ports.0', 'ports.1', 'ports.2', 'surprise', 'template',
                      'ttl', 'type']
    assert str(caught.value).startswith('Invalid body: cpus is 0, but has to be from 0.01 up to 1,024; git')
    assert all(field in str(caught.value) for field in fields) and len(str(caught.value)) < 700


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
    told = refuse_create(**fields)
    assert told
    for path, message in told.items():
        assert len(message) <= 600 and len(path) <= 300


def test_the_message_for_a_pattern_says_what_is_wanted_not_the_pattern():
    message = refuse_create(name='a b')['name']
    assert '"a b"' in message and 'letters, digits' in message and '^' not in message


@pytest.mark.parametrize(('name', 'value', 'text'), TEXTS, ids=[text[:60] for *_, text in TEXTS])
def test_what_is_wrong_is_said_in_plain_words(name, value, text):
    where = {'websocket-message': 'message'}.get(name, 'query' if name.endswith('query') else 'body')
    with pytest.raises(ValidationError) as caught:
        SCHEMAS.check(name, value, where=where)
    assert str(caught.value) == f'Invalid {where}: {text}'
    assert '; '.join(item['message'] for item in caught.value.details) == text


def body_of(media_type, data=b'{}'):
    environ = {'CONTENT_TYPE': media_type, 'wsgi.input': io.BytesIO(data)}
    return read_body(SCHEMAS, 'workspace-create', environ)


@pytest.mark.parametrize(('memory', 'size'), [
    ('4g', 4 << 30), ('512m', 512 << 20), ('512M', 512 << 20), ('16384k', 16 << 20), ('1t', 1 << 40),
    ('2gb', 2 << 30), ('2 GB', 2 << 30), ('16777216', 16 << 20), (16777216, 16 << 20), ('64t', 64 << 40)])
def test_a_size_is_taken_as_the_settings_take_it_and_given_on_in_bytes(memory, size):
    data = json.dumps({'name': 'a', 'memory': memory})
    SCHEMAS.check('workspace-create', json.loads(data))
    assert body_of('application/json', data.encode()) == {'name': 'a', 'memory': size}
    assert parse_size(str(memory)) == size


@pytest.mark.parametrize('memory', ['16383k', '65t', '9' * 20, '9' * 5000 + 'g', '0', '4x', 'x'])
def test_a_size_out_of_bounds_is_refused_however_it_is_written(memory):
    with pytest.raises(ValidationError, match='memory'):
        body_of('application/json', json.dumps({'name': 'a', 'memory': memory}).encode())


def test_a_bare_at_sign_belongs_to_the_user_or_the_password():
    """As people paste them; the last one stands before the host."""
    for user in ('john@example.com:tok', 'ann:p@ss', 'john@example.com:p@ss'):
        name, _, password = user.replace('@', '%40').partition(':')
        assert split_credentials(f'https://{user}@host.example/r.git') == (
            'https://host.example/r.git', f'https://{name}:{password}@host.example\n')


@pytest.mark.parametrize(('call', 'given', 'text'), [
    (parse_json, b' ', 'This is not valid JSON: it is empty.'),
    (parse_json, b'{"name" "a"}', "This is not valid JSON: expecting ':' delimiter (line 1, column 9)."),
    (parse_json, b'{"cpus": NaN}', 'This is not valid JSON: NaN is no JSON value.'),
    (parse_json, b'{"name": "\xff"}', 'This is not valid JSON: a character of it is not valid in UTF-8.'),
    (parse_json, b'{"a": "\\ud83d"}', 'This is not valid JSON: a character of it is not valid in UTF-8.'),
    (parse_json, b'[' * 9000, 'This is not valid JSON: it is nested too deeply.'),
    (parse_json, b'1' * 401, 'This is not valid JSON: a number has more than 400 digits.'),
    (body_of, '', 'The Content-Type is missing, but has to be application/json.'),
    (body_of, 'text/plain', 'The Content-Type is "text/plain", but has to be application/json.'),
    (parse_since, 'yesterday',
     'since is "yesterday", but has to be a time, such as 2026-01-31T12:00:00Z, or a number of seconds'),
    (place_of, '7', 'after is "7", which is no id of an event of a session'),
    (Cursor.parse, 'x' * 100, f'after is "{"x" * 60}...", which is no id of an event'),
    (split_credentials, 'https://[', 'gitUrl has no valid host'),
    (split_credentials, 'https://u:p#1@a.example/b',
     'gitUrl has a ?, # or @ where the address of a repository has none; in a user name or password write # '
     'as %23, ? as %3F and / as %2F'),
], ids=lambda item: str(item)[:30])
def test_what_no_schema_finds_is_said_as_plainly(call, given, text):
    with pytest.raises(ValidationError) as caught:
        call(given)
    assert str(caught.value) == text


@pytest.mark.parametrize('fields', [
    {'gitUrl': 'hush'}, {'gitUrl': 'https://u:hush@a.example/x y'}, {'gitUrl': ['hush']},
    {'gitUrl': 'hush' * 600}, {'env': 'A=hush'}, {'env': {'A': ['hush']}}, {'env': {'A': {'hush': 'hush'}}},
    {'env': ['A=hush']}, {'env': {'A': 'hush' * 10_000}},
    {'sshPublicKeys': [{'hush': 1}]},
], ids=lambda fields: str(fields)[:40])
def test_a_secret_is_never_quoted(fields):
    assert 'hush' not in str(refuse_create(**fields))
    for whole in (json.dumps({'name': 'a', **fields}), [fields]):  # as who encodes it twice sends it
        assert 'hush' not in str(details('workspace-create', whole))
    assert 'hush' not in str(details('websocket-message', {'type': 'auth', 'token': ['hush']}))


def taken():
    """Yield (name of the file, schema) of every part of what clients send."""
    names = {route.body for route in ROUTES if route.body} | {route.query for route in ROUTES}
    for name in names | {'websocket-message', 'shared'}:
        todo = [SCHEMAS.documents[name]]
        while todo:
            node = todo.pop()
            if isinstance(node, dict):
                yield name, node
            todo += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()


def test_there_are_words_for_all_that_can_be_wrong():
    keywords = set(jsonschema.Draft202012Validator.VALIDATORS) - {
        '$ref', 'properties', 'items', 'propertyNames', 'additionalProperties', 'required', 'const', 'format',
        'oneOf'}  # which look into their parts, have sentences of their own, or only belong to a type
    for name, schema in taken():
        assert not {keyword for keyword in keywords & set(schema) if keyword not in SENTENCES}, name
        assert schema.get('minLength', 1) == schema.get('minProperties', 1) == 1, name
        assert 'oneOf' not in schema or schema['discriminator']['propertyName'] == 'type', name
        if isinstance(schema.get('pattern'), str) or 'not' in schema:  # is told behind a 'but'
            assert re.match('an? ', schema['description']), schema


def test_a_field_with_a_strange_name_is_told_as_json_has_it():
    assert details('workspace-create', {'name': 'a', 'a\nb': 1})['a\nb'].startswith('"a\\nb" is unknown here')


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
                                            ('label=', 'label.0'), ('typ=agent', 'typ'),
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


def texts_in(node):
    """Yield a pattern of each text that a piece of code may make, and how much of it is fixed."""
    inner = set()
    for item in ast.walk(node):
        if isinstance(item, ast.JoinedStr):
            inner |= set(item.values)
            parts = [part.value if isinstance(part, ast.Constant) else None for part in item.values]
            yield (''.join('.*' if part is None else re.escape(part) for part in parts),
                   sum(len(part or '') for part in parts))
        elif isinstance(item, ast.Constant) and isinstance(item.value, str) and item not in inner:
            yield re.escape(item.value), len(item.value)


def texts_of_errors():
    """Return {code: the same of the texts with which its errors are raised}."""
    codes, found = {error.__name__: error.code for error in every_error()}, collections.defaultdict(list)
    for path in [ROOT / 'agentbackend.py', *(ROOT / '_agentbackend').rglob('*.py')]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, (ast.ClassDef, ast.Call)):
                continue
            name = node.name if isinstance(node, ast.ClassDef) else ast.unparse(getattr(node, 'func', node))
            if name in codes:
                found[codes[name]] += texts_in(node)
            elif name == 'Refused' and isinstance(node, ast.Call):  # in a workspace; a path is put before it
                code, text = node.args
                found[code.value] += [(f'.*: {pattern}', fixed) for pattern, fixed in texts_in(text)]
    return found


def test_every_code_has_an_example_in_the_words_of_the_code():
    """Each is a text with which an error of that code is raised, with something in the places that are filled
    in."""
    examples, texts = SCHEMAS.documents['error']['examples'], texts_of_errors()
    assert sorted(example['code'] for example in examples) == sorted({error.code for error in every_error()})
    for example in examples:
        if example['code'] == 'VALIDATION_ERROR':
            with pytest.raises(ValidationError, match=re.escape(example['error']) + '$') as caught:
                SCHEMAS.check('workspace-create', {'ports': [70000]})
            assert caught.value.details == example['details']
        elif example['code'] != 'DOCKER_ERROR':  # whose words are the engine's
            said = example['error']
            assert any(fixed > len(said) / 4 and re.fullmatch(pattern, said)
                       for pattern, fixed in texts[example['code']]), f'no error says: {said}'
