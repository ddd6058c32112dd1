"""What others make of the OpenAPI document: clients that work, and linters that find nothing new."""
import json
import os
import re
import shutil
import subprocess
import sys

import javascript
import pytest
from conftest import ROOT
from contract import DOCUMENT

GENERATORS = javascript.TESTS / 'generators'
README = (ROOT / 'README.md').read_text().partition('\n### Generated clients\n')[2].partition('\n### ')[0]
# 101 is how a WebSocket succeeds, which linters do not know; nor do they look for what is said over it. What
# the licence is the project has yet to say.
SPECTRAL_FINDS = {('operation-success-response', 'paths./agent/ws.get.responses'),
                  ('operation-success-response', 'paths./api/workspaces/{id}/exec/ws.get.responses'),
                  ('operation-success-response', 'paths./api/workspaces/{id}/terminal.get.responses')}
REDOCLY_FINDS = {('operation-2xx-response', '#/paths/~1agent~1ws/get/responses'),
                 ('operation-2xx-response', '#/paths/~1api~1workspaces~1{id}~1exec~1ws/get/responses'),
                 ('operation-2xx-response', '#/paths/~1api~1workspaces~1{id}~1terminal/get/responses'),
                 ('no-unused-components', '#/components/schemas/ExecTalk'),
                 ('no-unused-components', '#/components/schemas/TerminalEvent'),
                 ('no-unused-components', '#/components/schemas/TerminalMessage'),
                 ('no-unused-components', '#/components/schemas/WebSocketMessage'),
                 ('info-license', '#/info')}


@pytest.fixture(scope='module')
def packages():
    return javascript.installed(GENERATORS / 'package.json')


@pytest.fixture(scope='module')
def python():
    """The interpreter that has openapi-python-client, apart from ours: a part of it would have ssl imported
    before gevent is patched."""
    def install(folder):
        subprocess.run([sys.executable, '-m', 'venv', 'venv'], cwd=folder, check=True)
        subprocess.run(['venv/bin/pip', 'install', '-qq', '--disable-pip-version-check', '-r',
                        'requirements.txt'], cwd=folder, check=True, timeout=240)
    return javascript.cached(GENERATORS / 'requirements.txt', install) / 'venv' / 'bin' / 'python'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with the document, and what programs do with what is made of it."""
    made = tmp_path_factory.mktemp('generated')
    (made / 'openapi.json').write_text(json.dumps(DOCUMENT))
    for name in ('watch.py', 'use.ts'):
        shutil.copy(GENERATORS / name, made)
    return made


@pytest.fixture
def run(packages, folder):
    """A function that runs a tool of the packages in the folder, and returns what it prints."""
    def call(tool, *arguments, codes=(0,)):
        env = {**os.environ, 'REDOCLY_TELEMETRY': 'off', 'REDOCLY_SUPPRESS_UPDATE_NOTICE': 'true'}
        done = subprocess.run([packages / 'node_modules' / '.bin' / tool, *arguments], cwd=folder, env=env,
                              capture_output=True, text=True, timeout=60)
        assert done.returncode in codes, done.stdout + done.stderr
        return done.stdout
    return call


@pytest.fixture(scope='module')
def client(python, folder):
    """The interpreter that has the Python client beside the document."""
    done = subprocess.run([python.with_name('openapi-python-client'), 'generate', '--path', 'openapi.json',
                           '--output-path', 'client', '--meta', 'none', '--fail-on-warning'], cwd=folder,
                          capture_output=True, text=True, timeout=60,
                          env={**os.environ, 'PATH': f"{python.parent}:{os.environ['PATH']}"})
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    return python


def ask(client, folder, *arguments):
    """Return what a Python program with the client prints."""
    done = subprocess.run([client, *arguments], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_python_client_has_every_call_and_every_type(client, folder):
    known = ask(client, folder, '-c', 'from client import models; print(*models.__all__)').split()
    assert {'Workspace', 'WorkspaceDetails', 'WorkspaceAnswer', 'Event', 'StatusEvent', 'Run',
            'SessionDetails', 'Transcript', 'Error'} <= set(known)
    objects = {name for name, schema in DOCUMENT['components']['schemas'].items()
               if schema.get('type') == 'object' and 'properties' in schema and 'oneOf' not in schema}
    assert objects <= set(known), objects - set(known)
    calls = {path.stem.replace('_', '') for path in (folder / 'client' / 'api').glob('*/*.py')}
    assert {told['operationId'].lower() for methods in DOCUMENT['paths'].values()
            for told in methods.values()} <= calls


def test_the_python_client_tells_events_apart(client, folder):
    example = DOCUMENT['components']['schemas']['Transcript']['examples'][0]
    told = ask(client, folder, '-c', 'import json, sys; from client import models\n'
               'event = models.Transcript.from_dict(json.loads(sys.argv[1])).events[0]\n'
               'print(type(event).__name__, event.data.step)', json.dumps(example))
    assert told == 'ProgressEvent 1\n'


def test_a_program_with_the_python_client_makes_watches_and_deletes_a_workspace(client, folder, server):
    told = ask(client, folder, 'watch.py', f'http://127.0.0.1:{server.port}')
    assert told == 'generated creating\nrunning 3600 True\nTrue\nWORKSPACE_NOT_FOUND\n'


def shown(language, server):
    """Return the README's script in a language, with the address of a server in the place of its own."""
    script = re.search(rf'```{language}\n(.*?)```', README, re.DOTALL)[1]
    assert script.count('http://localhost:3100') == 1
    return script.replace('http://localhost:3100', f'http://127.0.0.1:{server.port}')


def test_the_script_of_the_readme_for_python_works_as_it_stands(client, folder, server):
    (folder / 'readme.py').write_text(shown('python', server))
    told = ask(client, folder, 'readme.py').splitlines()
    assert told[-1] == 'deleted: True'
    assert server.call('GET', '/api/workspaces/from-python').status_code == 404


def test_the_script_of_the_readme_for_typescript_works_as_it_stands(run, packages, tmp_path, folder, server):
    run('openapi-typescript', 'openapi.json', '-o', tmp_path / 'types.d.ts')
    (tmp_path / 'node_modules').symlink_to(packages / 'node_modules')
    (tmp_path / 'watch.mts').write_text(shown('ts', server))
    run('tsc', '--strict', '--target', 'es2022', '--module', 'esnext', '--moduleResolution', 'bundler',
        tmp_path / 'watch.mts')
    done = subprocess.run(['node', 'watch.mjs'], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == 'deleted: true'
    assert server.call('GET', '/api/workspaces/from-typescript').status_code == 404


def test_the_types_for_typescript_compile_and_tell_events_apart(run):
    run('openapi-typescript', 'openapi.json', '--output', 'types.ts')
    run('tsc', '--noEmit', '--strict', '--lib', 'es2022', 'use.ts')


def test_spectral_finds_nothing_new(run, folder):
    (folder / 'rules.json').write_text('{"extends": ["spectral:oas"]}')
    found = json.loads(run('spectral', 'lint', 'openapi.json', '--ruleset', 'rules.json', '--format', 'json',
                           '--quiet', codes=(0, 1)))
    assert {(item['code'], '.'.join(item['path'])) for item in found} == SPECTRAL_FINDS, found


def test_redocly_finds_nothing_new(run):
    found = json.loads(run('redocly', 'lint', 'openapi.json', '--extends', 'recommended', '--format', 'json',
                           codes=(0, 1)))['problems']
    assert {(item['ruleId'], item['location'][0]['pointer']) for item in found} == REDOCLY_FINDS, found
