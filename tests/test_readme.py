"""What the README tells a new user to do, done word for word."""
import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import requests
import websocket
from browsing import CHROMIUM, create, opened_browser, pages_of, visit
from conftest import ROOT, Served, remove_objects
from fake_anthropic import FakeAnthropic, bridge_address
from helpers import free_port
from playwright.sync_api import expect

from _agentbackend.config import Config
from _agentbackend.pages import every_error
from agentbackend import ROUTES

README = (ROOT / 'README.md').read_text()


def section(title):
    """Return the text of a section."""
    return README.partition(f'\n## {title}\n')[2].partition('\n## ')[0]


def blocks(text, language):
    """Return the code blocks of a language."""
    return re.findall(rf'```{language}\n(.*?)```', text, re.DOTALL)


def exchange():
    """Return the commands of the exchange, in their order."""
    return re.findall(r'<!-- exchange -->\n```sh\n(.*?)```', README, re.DOTALL)


@pytest.fixture
def on_port_3100(port_3100, tmp_path, docker_client, base_image):
    """A server as the README has it, with Claude's API played by a fake."""
    with FakeAnthropic(bridge_address(docker_client)) as fake:
        served = Served(tmp_path, ROOT / 'templates', PORT=str(port_3100), DEFAULT_TEMPLATE='bun-typescript',
                        ANTHROPIC_API_KEY='key-of-a-new-user', ANTHROPIC_BASE_URL=fake.url).start()
        yield served
        served.stop()
    print(served.log.read_text()[-5000:])
    remove_objects(docker_client, served.instance)


def test_the_whole_exchange_with_curl_works_as_it_stands(on_port_3100, tmp_path, docker_client):
    script = '\n'.join(f'echo "--- {number}"\n{command}\necho' for number, command in enumerate(exchange()))
    done = subprocess.run(['bash', '-euo', 'pipefail', '-c', script],
                          env={**os.environ, 'HOME': str(tmp_path)}, cwd=tmp_path,
                          capture_output=True, text=True, timeout=1500, stdin=subprocess.DEVNULL)
    said = dict(re.findall(r'--- (\d+)\n(.*?)(?=\n--- |\Z)', done.stdout, re.DOTALL))
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"status":"healthy"' in said['0'] and '"status":"creating"' in said['1']
    assert '"status":"running"' in said['2']
    assert said['3'].startswith('1.4.5\n')
    assert said['5'].rstrip().endswith('hello')
    assert '"type":"progress"' in said['6']
    assert '{"step":1,"total":3,"message":"Creating index.ts..."}' in said['6']
    assert '"type":"result"' in said['6']
    assert '"deleted":true' in said['7']


def test_the_exchange_on_the_command_line_works_as_it_stands(on_port_3100, tmp_path):
    script = re.search(r'<!-- command line -->\n```sh\n(.*?)```', README, re.DOTALL)[1]
    keygen = f'mkdir -p {tmp_path}/.ssh && ssh-keygen -q -t ed25519 -N "" -f {tmp_path}/.ssh/id_ed25519\n'
    script = script.replace('$PWD/.venv/bin', str(Path(sys.executable).parent))
    done = subprocess.run(['bash', '-euo', 'pipefail', '-c', keygen + script], cwd=tmp_path,
                          env={**os.environ, 'HOME': str(tmp_path)}, capture_output=True, text=True,
                          timeout=1500, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout
    for part in ('healthy', 'codeServerUrl', 'sshCommand', '1.4.5\n', 'hello\n', '[1/3] Creating index.ts...',
                 '+export default { port: 3000', 'myproject is deleted'):
        assert part in said, (part, said, done.stderr)


def test_the_script_makes_uploads_tests_and_cleans_up(tmp_path, docker_client, base_image):
    """With a repository in the first workspace, since there may be no other."""
    served = Served(tmp_path, ROOT / 'templates', DEFAULT_TEMPLATE='blank',
                    WORKSPACE_NETWORK='bridge').start()
    try:
        served.create('origin', ssh=False)
        served.wait_status('origin', 'running', timeout=1500)
        made = served.call('POST', '/api/workspaces/origin/exec', {'command': (
            'printf \'#!/bin/sh\\nls "$1" | wc -l; echo failing; exit 3\\n\' >test.sh; chmod +x test.sh; '
            'git add .; git commit -qm test; git daemon --base-path=/workspace --export-all --detach '
            '--reuseaddr /workspace; hostname -i')}).json()['data']
        assert made['exitCode'] == 0, made
        tree = tmp_path / 'tree'
        tree.mkdir()
        for number in range(1000):
            (tree / f'file {number}').write_text(f'{number}\n')
        script = re.search(r'<!-- script -->\n```sh\n(.*?)```', README, re.DOTALL)[1]
        assert len(script.splitlines()) <= 22
        done = subprocess.run(['sh', '-c', script, 'sh', f'git://{made["stdout"].strip()}/origin', str(tree)],
                              cwd=tmp_path, env={**os.environ, 'API': f'http://127.0.0.1:{served.port}'},
                              capture_output=True, text=True, timeout=300)
        assert (done.returncode, done.stdout) == (0, 'the test ended with 3\n'), done.stdout + done.stderr
        assert (tmp_path / 'report.txt').read_text() == '1000\nfailing\n'
        assert [item['name'] for item in served.get('/api/workspaces')] == ['origin']
    finally:
        served.stop()
        print(served.log.read_text()[-5000:])
        remove_objects(docker_client, served.instance)


def test_every_setting_that_the_readme_names_exists():
    known = {name.upper() for name in Config.__dataclass_fields__}
    named = set(re.findall(r'\b([A-Z]+(?:_[A-Z]+)+)=', README)) | set(re.findall(r'-e ([A-Z_]+)=', README))
    assert named <= known, named - known


def test_the_table_of_errors_knows_every_code_with_its_status():
    statuses = {}
    for error in every_error():
        statuses.setdefault(error.code, set()).add(error.status)
    table = section('The API at a glance').partition('### Errors')[2]
    named = []
    for first, second in re.findall(r'^\| (`[A-Z_`, ]+) \| ([\d, ]+) \|', table, re.MULTILINE):
        codes = re.findall(r'[A-Z_]+', first)
        told = {int(status) for status in second.split(', ')}
        assert told == set().union(*(statuses.get(code, ()) for code in codes)), codes
        named += codes
    assert sorted(named) == sorted(statuses)


def test_the_table_of_calls_names_every_route_and_no_other():
    table = section('The API at a glance').partition('\n### ')[0]
    named = [(method, re.sub(r':\w+', ':', path), query)
             for method, path, query in re.findall(r'`([A-Z]+) (/[^?`]*)(?:\?([^`]*))?`', table)]
    routes = {(route.method, re.sub(r'<\w+(:path)?>', ':', route.path)): route
              for route in ROUTES if route.tag}
    assert sorted((method, path) for method, path, _ in named) == sorted(routes)
    for method, path, query in [item for item in named if item[2]]:
        schema = json.loads((ROOT / 'schemas' / f'{routes[method, path].query}.json').read_text())
        assert set(re.findall(r'(\w+)=', query)) == set(schema['properties']), path


def test_the_embedding_example_serves_both_programs(tmp_path):
    port = free_port()
    code = blocks(section('Embedding'), 'python')[0]
    assert '8000' in code
    (tmp_path / 'program.py').write_text(code.replace('8000', str(port)))
    env = {**os.environ, 'STATE_DIR': str(tmp_path), 'INSTANCE': 'embedded', 'PREBUILD': 'none',
           'PYTHONPATH': str(ROOT)}
    with subprocess.Popen([sys.executable, str(tmp_path / 'program.py')], env=env,
                          stdin=subprocess.DEVNULL) as running:
        try:
            def get(path):
                for _ in range(100):
                    try:
                        return requests.get(f'http://127.0.0.1:{port}{path}', timeout=5)
                    except requests.ConnectionError:
                        assert running.poll() is None
                        subprocess.run(['sleep', '0.1'], check=True)
                raise AssertionError('it does not answer')
            assert get('/health').json()['version'] and get('/').text == 'my own program\n'
            assert get('/api/workspaces').json() == {'success': True, 'data': []}
            for page in ('/openapi', '/openapi?plain'):
                needed = re.findall(r'(?:src|href)="(static/[^"]+)"', get(page).text)
                answers = {path: get(f'/{path}') for path in needed}
                assert answers and all(answer.status_code == 200 for answer in answers.values()), page
                assert not [path for path in needed if b'my own' in answers[path].content[:100]], page
        finally:
            running.kill()


def test_the_lua_template_is_built_and_its_skeleton_is_there(tmp_path, docker_client, base_image):
    folder = tmp_path / 'templates' / 'lua'
    (folder / 'skeleton').mkdir(parents=True)
    (folder / 'skeleton' / 'main.lua').write_text('print("hello")\n')
    (folder / 'Dockerfile').write_text(blocks(section('Writing a template'), 'dockerfile')[0])
    served = Served(tmp_path, tmp_path / 'templates', DEFAULT_TEMPLATE='lua').start()
    try:
        served.create('mine', ssh=False)
        workspace = served.wait_status('mine', 'running', 'error', timeout=1500)
        assert workspace['status'] == 'running', workspace
        container = docker_client.containers.get(f'{served.instance}-mine')
        code, output = container.exec_run(['lua5.4', 'main.lua'], user='dev', workdir='/workspace/mine')
        assert (code, output) == (0, b'hello\n')
        assert any(item['name'] == 'lua' and item['description'] == 'Lua, with what all workspaces share.'
                   for item in served.get('/api/templates'))
    finally:
        served.call('DELETE', '/api/workspaces/mine')
        served.stop()
        remove_objects(docker_client, served.instance)
        for image in docker_client.images.list(filters={'label': 'agentbackend.template=lua'}):
            docker_client.images.remove(image.id, force=True)


def test_the_example_of_an_agent_does_its_task(tmp_path, docker_client, base_image):
    served = Served(tmp_path, ROOT / 'templates', DEFAULT_TEMPLATE='blank',
                    AGENT_COMMAND='node /workspace/agent.mjs').start()
    try:
        served.create('worker', ssh=False)
        served.wait_status('worker', 'running', timeout=1500)
        container = docker_client.containers.get(f'{served.instance}-worker')
        script = next(block for block in blocks(section('Writing an agent'), 'js') if 'agent.mjs' in block)
        container.exec_run(['sh', '-c', 'printf %s "$SCRIPT" >/workspace/agent.mjs'], user='dev',
                           environment={'SCRIPT': script})
        answer = served.call('POST', '/api/agent/execute',
                             {'workspaceId': 'worker', 'task': 'write this', 'agent': 'command'},
                             headers={'Accept': 'application/json'})
        session = answer.json()['data']['sessionId']
        served.until(lambda: served.get(f'/api/agent/sessions/{session}')['state'] != 'running')
        told = [(event['type'], event['data'].get('message'))
                for event in served.get(f'/api/agent/sessions/{session}/events')['events'][1:]]
        assert told == [('progress', 'Reading the task'), ('message', 'I was asked: write this'),
                        ('progress', 'Writing it down'), ('result', 'It is in task.txt.')]
        assert container.exec_run(['cat', '/workspace/worker/task.txt'])[1] == b'write this'
    finally:
        served.call('DELETE', '/api/workspaces/worker')
        served.stop()
        remove_objects(docker_client, served.instance)


def with_nginx(folder, port, target):
    """Return the command that runs nginx with the README's block."""
    location = blocks(section('Homelab'), 'nginx')[0].replace('127.0.0.1:3100', target)
    mapping = re.search(r'`(map \$http_upgrade.*?)`', section('Homelab'))[1]
    config = folder / 'nginx.conf'
    config.write_text(f'daemon off; pid {folder}/pid; error_log {folder}/error.log; events {{}}\nhttp '
                      f'{{ access_log off; {mapping}\n'
                      f'client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path '
                      f'{folder}/f; uwsgi_temp_path {folder}/u; '
                      f'scgi_temp_path {folder}/s;\nserver {{ listen 127.0.0.1:{port}; {location} }} }}\n')
    return [shutil.which('nginx', path=os.environ['PATH'] + ':/usr/sbin'), '-c', str(config)]


def caddyfile(target):
    """Return the README's block for Caddy, in front of a server that may have another port."""
    block = re.search(r'```\n(# /etc/caddy/Caddyfile\n.*?)```', section('Homelab'), re.DOTALL)[1]
    assert '127.0.0.1:3100' in block
    return block.replace('127.0.0.1:3100', target)


def with_caddy(folder, port, target):
    """Return the command that runs Caddy with the README's block, but without a certificate, which takes a
    name that the world knows."""
    config = folder / 'Caddyfile'
    block = caddyfile(target)
    block = block.replace('dev.example.org {', f'http://dev.example.org:{port} {{')
    config.write_text('{\nadmin off\n}\n' + block)
    return ['caddy', 'run', '--config', str(config), '--adapter', 'caddyfile']


@pytest.mark.parametrize('proxy', [with_nginx, with_caddy])
def test_behind_a_proxy_streams_and_websockets_pass(make_server, tmp_path, proxy):
    server = make_server(ALLOWED_HOSTS='dev.example.org')
    port = free_port()
    env = {**os.environ, 'XDG_DATA_HOME': str(tmp_path), 'XDG_CONFIG_HOME': str(tmp_path)}
    with subprocess.Popen(proxy(tmp_path, port, f'127.0.0.1:{server.port}'), stdin=subprocess.DEVNULL,
                          env=env) as running:
        try:
            headers = {'Host': f'dev.example.org:{port}', 'Origin': f'http://dev.example.org:{port}'}
            look = ['bash', '-c', f'exec 3<>/dev/tcp/127.0.0.1/{port}']
            server.until(lambda: not subprocess.run(look, stderr=subprocess.DEVNULL).returncode, 10)
            assert requests.get(f'http://127.0.0.1:{port}/health', headers=headers,
                                timeout=5).json()['docker'] == 'connected'
            with requests.get(f'http://127.0.0.1:{port}/agent/sse/some-session', headers=headers, stream=True,
                              timeout=5) as stream:
                assert next(stream.iter_lines()) == b': events'
            client = websocket.create_connection(f'ws://127.0.0.1:{port}/agent/ws', timeout=5,
                                                 host=headers['Host'], origin=headers['Origin'])
            client.send('{"type":"ping"}')
            assert '"pong"' in client.recv()
            client.close()
        finally:
            running.terminate()


@contextlib.contextmanager
def another_machine(network):
    """Give (our address, a browser) of another machine, which knows this one as dev.example.org."""
    address = network.join()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'chromium'
        path.write_text(f'#!/bin/sh\nexec {shlex.join([*network.prefix, CHROMIUM])} "$@"\n')
        path.chmod(0o755)
        with opened_browser(f'--host-resolver-rules=MAP dev.example.org {address}', path=path) as browser:
            yield address, browser


def test_another_machine_in_the_house_finds_all_of_it(make_server, network, tmp_path):
    unit = blocks(section('Homelab'), 'ini')[0]
    settings = dict(word.split('=', 1) for line in re.findall(r'^Environment=(.*)$', unit, re.MULTILINE)
                    for word in shlex.split(line))
    told = re.search(r'^EnvironmentFile=(.*)$', unit, re.MULTILINE)[1]
    secrets = dict(re.findall(r'^([A-Z_]+)=(.*)$', section('Homelab').partition(f'cat >{told} <<EOF\n')[2]
                              .partition('\nEOF\n')[0], re.MULTILINE))
    assert secrets.keys() == {'API_TOKEN', 'ANTHROPIC_API_KEY'}
    settings |= secrets
    server = make_server(**settings)
    server.headers['Authorization'] = f"Bearer {settings['API_TOKEN']}"
    ports = [free_port(), free_port()]
    config = tmp_path / 'Caddyfile'  # the authority of all names is Caddy's own here
    config.write_text(f'{{\nadmin off\nlocal_certs\nskip_install_trust\nhttp_port {ports[0]}\nhttps_port '
                      f'{ports[1]}\n}}\n' + caddyfile(f'127.0.0.1:{server.port}'))
    env = {**os.environ, 'XDG_DATA_HOME': str(tmp_path), 'XDG_CONFIG_HOME': str(tmp_path)}
    caddy = subprocess.Popen(['caddy', 'run', '--config', str(config), '--adapter', 'caddyfile'], env=env,
                             stdin=subprocess.DEVNULL)
    subprocess.run(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', tmp_path / 'key'], check=True)
    try:
        with another_machine(network) as (address, browser), pages_of(browser) as make_page:
            look = ['bash', '-c', f'exec 3<>/dev/tcp/127.0.0.1/{ports[1]}']
            server.until(lambda: not subprocess.run(look, stderr=subprocess.DEVNULL).returncode, 20)
            page = make_page(ignore_https_errors=True, viewport={'width': 390, 'height': 844},
                             expected='status of 401')
            visit(page, f'https://dev.example.org:{ports[1]}/')
            page.fill('#token-form [name=token]', settings['API_TOKEN'])
            page.click('#token-submit')
            expect(page.locator('#link')).to_have_text('live')
            page.click('#new-button')
            page.click('#create-form summary')
            page.fill('#create-form [name=sshPublicKeys]', (tmp_path / 'key.pub').read_text())
            page.fill('#create-form [name=ports]', '8080')
            page.fill('#create-form [name=env]', 'PRINT=httpd -p 8080 -h /www')
            create(page, 'shared')
            expect(page.locator('#ws-status')).to_have_text('running')
            made = server.get('/api/workspaces/shared')
            expect(page.locator('#ws-editor')).to_have_attribute(
                'href', f"http://dev.example.org:{made['codeServerPort']}/?folder=/workspace/shared")
            expect(page.locator('#facts')).to_contain_text('dev@dev.example.org')
            expect(page.locator('#facts a', has_text='8080')).to_have_attribute(
                'href', f"http://dev.example.org:{made['ports']['8080']}/")
            with network.entered():
                for port in (made['codeServerPort'], made['ports']['8080']):
                    assert requests.get(f'http://{address}:{port}/healthz', timeout=10).status_code == 200
                with socket.create_connection((address, made['sshPort']), timeout=10) as connection:
                    assert connection.recv(4) == b'SSH-'
    finally:
        caddy.terminate()
        caddy.wait()


def test_the_server_works_in_a_container_of_its_own(tmp_path, docker_client, templates_dir, base_image):
    """As the README has it, but for the base image, which is one that this engine has: nothing can be pulled
    everywhere."""
    builder = Served(tmp_path, ROOT / 'templates', DEFAULT_TEMPLATE='python').start()
    builder.create('first', ssh=False)
    builder.wait_status('first', 'running', timeout=1500)
    image = docker_client.containers.get(f'{builder.instance}-first').image.id
    builder.call('DELETE', '/api/workspaces/first')
    builder.stop()
    dockerfile = blocks(section('Homelab'), 'dockerfile')[0]
    assert 'FROM python:3.12-slim\n' in dockerfile
    source = tmp_path / 'source'
    source.mkdir()
    for name in subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'],
                               cwd=ROOT, capture_output=True, text=True, check=True).stdout.split('\0'):
        if name and (ROOT / name).exists() and not name.startswith('tests/'):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    own_base = f'FROM {image}\nENTRYPOINT []\n'
    (source / 'Dockerfile').write_text(dockerfile.replace('FROM python:3.12-slim\n', own_base))
    tag = f'agentbackend-test:{builder.instance}'
    docker_client.images.build(path=str(source), tag=tag, rm=True, forcerm=True)
    environment = {'API_TOKEN': 'change-me', 'WORKSPACE_HOST': 'localhost', 'INSTANCE': builder.instance,
                   'PREBUILD': 'none'}
    engine = {'/var/run/docker.sock': {'bind': '/var/run/docker.sock'}}
    container = docker_client.containers.run(tag, detach=True, environment=environment, volumes=engine,
                                             ports={'3100/tcp': ('127.0.0.1', None)})
    try:
        container.reload()
        builder.port = int(container.ports['3100/tcp'][0]['HostPort'])
        builder.headers = {'Authorization': 'Bearer change-me'}

        def connected():
            try:
                return builder.get('/health')['docker'] == 'connected'
            except requests.ConnectionError:
                return False
        for _ in range(300):
            if connected():
                break
            subprocess.run(['sleep', '0.1'], check=True)
        builder.create('inner', template='blank', ssh=False)
        for _ in range(600):
            workspace = builder.get('/api/workspaces/inner')
            if workspace['status'] != 'creating':
                break
            subprocess.run(['sleep', '0.2'], check=True)
        assert workspace['status'] == 'running', (workspace, container.logs()[-3000:])
        assert workspace['codeServerUrl'].startswith('http://localhost:')
        assert builder.call('DELETE', '/api/workspaces/inner').json()['data']['deleted']
    finally:
        container.remove(force=True, v=True)
        docker_client.images.remove(tag, force=True)
        remove_objects(docker_client, builder.instance)
