"""The real images: what they bring, how they clone, and what they may not do."""
import base64
import http.server
import subprocess
import threading

import pytest
import requests
from conftest import ROOT, Served, objects_of, remove_objects
from fake_anthropic import bridge_address
from helpers import state_path

SKELETON_TESTS = {'bun-typescript': 'bun test', 'node-typescript': 'npm test',
                  'python': 'python -m pytest -q', 'blank': 'test -f README.md'}
USER_AND_PASSWORD = 'ann:s3cret-canary'


@pytest.fixture(scope='module')
def real(tmp_path_factory, docker_client, base_image):
    """A server with the real templates only."""
    served = Served(tmp_path_factory.mktemp('real'), ROOT / 'templates',
                    DEFAULT_TEMPLATE='bun-typescript').start()
    yield served
    served.stop()
    print(served.log.read_text()[-5000:])
    remove_objects(docker_client, served.instance)


@pytest.fixture(scope='module')
def key(tmp_path_factory):
    path = tmp_path_factory.mktemp('key') / 'id'
    subprocess.run(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', path], check=True)
    return path


def ssh(workspace, key, command, *, user='dev'):
    """Run a command over SSH, on the published port, with the key."""
    return subprocess.run(
        ['ssh', '-i', str(key), '-p', str(workspace['sshPort']), '-o', 'StrictHostKeyChecking=no', '-o',
         'UserKnownHostsFile=/dev/null',
         '-o', 'BatchMode=yes', '-o', 'IdentitiesOnly=yes', '-o', 'LogLevel=ERROR', f'{user}@127.0.0.1',
         command],
        capture_output=True, text=True, timeout=60)


def inside(docker_client, server, name, command):
    """Run a shell command as dev in the project folder of a workspace; return (exit code, output)."""
    container = docker_client.containers.get(f'{server.instance}-{name}')
    code, output = container.exec_run(['bash', '-c', command], user='dev', workdir=f'/workspace/{name}')
    return code, output.decode('utf-8', 'replace')


def made(server, name, **fields):
    server.create(name, **fields)
    return server.wait_status(name, 'running', 'error', timeout=1500)


STOCK = """\
# An editor whose inside is not as expected.
ARG BASE_IMAGE
FROM ${BASE_IMAGE}
RUN sed -i "s/typeof used !== 'function'/true/" /usr/local/lib/agentbackend/editor.js
"""


@pytest.mark.parametrize('template', ['blank', 'stock'])
def test_what_was_made_ahead_is_its_owners(template, key, tmp_path, docker_client, base_image):
    (tmp_path / 'stock').mkdir()
    (tmp_path / 'stock' / 'Dockerfile').write_text(STOCK)
    server = Served(tmp_path, tmp_path, PREBUILD=template, WARM_POOL=f'{template}:1').start()
    try:
        def pool():
            return server.get('/health')['pool'][template]
        server.until(lambda: pool()['ready'] or 'cannot wait' in (pool()['error'] or ''), 120)
        workspace = server.create('mine', template=template, env={'HELLO': 'there'}, gitUserName='Ann',
                                  sshPublicKeys=[key.with_suffix('.pub').read_text().strip()])
        assert workspace['warm'] is (template == 'blank')
        workspace = server.wait_status('mine', 'running')
        said = ssh(workspace, key, 'echo $HELLO $WORKSPACE_NAME; git -C $PROJECT_DIR log --format=%an')
        assert said.stdout.splitlines() == ['there mine', *(['Ann'] if template == 'blank' else [])]
        answer = server.call('POST', '/api/workspaces/mine/exec',
                             {'command': 'pwd; echo $PROJECT_DIR'}).json()
        assert answer['data']['stdout'] == '/workspace/mine\n/workspace/mine\n'
        editor = f"http://127.0.0.1:{workspace['codeServerPort']}"
        session = requests.Session()
        session.post(f'{editor}/login', data={'password': workspace['codeServerPassword']}, timeout=20)
        opened = session.get(editor, timeout=20)
        assert 'workbench' in opened.text and opened.url.endswith('/?folder=/workspace/mine')
        _, processes = inside(docker_client, server, 'mine', 'pgrep -af "code-[s]erver"')
        assert ('/out/node/entry' in processes) is (template == 'stock'), processes
    finally:
        server.stop()
        print(server.log.read_text()[-5000:])
        remove_objects(docker_client, server.instance)
        if template == 'stock':
            for image in docker_client.images.list('agentbackend/stock'):
                docker_client.images.remove(image.id, force=True)


def test_a_workspace_has_an_editor_ssh_bun_and_keeps_its_files(real, key, docker_client):
    workspace = made(real, 'main', sshPublicKeys=[key.with_suffix('.pub').read_text().strip()])
    assert workspace['status'] == 'running', workspace
    assert ssh(workspace, key, 'bun --version').stdout.strip() == '1.4.5'
    assert ssh(workspace, key, 'echo kept > $PROJECT_DIR/note.txt').returncode == 0
    login = requests.get(f"http://127.0.0.1:{workspace['codeServerPort']}/", timeout=10)
    assert login.status_code == 200 and 'password' in login.text.lower()
    session = requests.Session()
    entered = session.post(f"http://127.0.0.1:{workspace['codeServerPort']}/login",
                           data={'password': workspace['codeServerPassword']}, timeout=20)
    assert 'workbench' in entered.text
    refused = requests.post(f"http://127.0.0.1:{workspace['codeServerPort']}/login",
                            data={'password': 'wrong'}, timeout=20)
    assert 'Incorrect password' in refused.text
    slow = 'trap "sleep 2; echo saved >saved.txt; exit" TERM; touch ready; while :; do sleep 0.1; done'
    real.call('POST', '/api/workspaces/main/exec', {'command': slow, 'detach': True})
    real.until(lambda: real.call('GET', '/api/workspaces/main/files/ready').status_code == 200)
    real.call('POST', '/api/workspaces/main/stop')
    real.wait_status('main', 'stopped')
    real.call('POST', '/api/workspaces/main/start')
    again = real.wait_status('main', 'running')
    assert again['sshPort'] == workspace['sshPort']
    # A program that takes its time to end had it.
    assert ssh(again, key, 'cat $PROJECT_DIR/note.txt $PROJECT_DIR/saved.txt').stdout == 'kept\nsaved\n'
    real.until(lambda: real.get('/api/workspaces/main')['resources']['memoryUsage'] > 10_000_000, 10)
    assert real.call('DELETE', '/api/workspaces/main').status_code == 200
    assert not objects_of(docker_client, real.instance)


def test_only_the_key_opens_ssh_and_only_for_dev(real, key, tmp_path):
    workspace = made(real, 'keys', sshPublicKeys=[key.with_suffix('.pub').read_text().strip()])
    subprocess.run(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', tmp_path / 'other'], check=True)
    assert ssh(workspace, key, 'id -un').stdout == 'dev\n'
    assert 'Permission denied' in ssh(workspace, tmp_path / 'other', 'true').stderr
    assert 'Permission denied' in ssh(workspace, key, 'true', user='root').stderr
    assert ssh(workspace, key, 'sudo -n id -un').stdout == 'root\n'
    real.call('DELETE', '/api/workspaces/keys')


@pytest.mark.parametrize('template', SKELETON_TESTS)
def test_the_skeleton_of_a_template_passes_its_own_tests(real, docker_client, template):
    name = f'skeleton-{template}'
    workspace = made(real, name, template=template, ssh=False)
    assert workspace['status'] == 'running', workspace
    code, output = inside(docker_client, real, name, SKELETON_TESTS[template])
    assert code == 0, output
    assert inside(docker_client, real, name, 'git log --oneline | wc -l')[1].strip() == '1'
    real.call('DELETE', f'/api/workspaces/{name}')


def test_bun_run_dev_serves_on_a_published_port(real, docker_client):
    workspace = made(real, 'dev-server', ports=[3000], ssh=False)
    container = docker_client.containers.get(f'{real.instance}-dev-server')
    container.exec_run(['bash', '-c', 'bun run dev'], user='dev', workdir='/workspace/dev-server',
                       detach=True)

    def answers():
        try:
            return requests.get(f"http://127.0.0.1:{workspace['ports']['3000']}/", timeout=2)
        except requests.ConnectionError:
            return None
    assert real.until(answers, 20).status_code == 200
    real.call('DELETE', '/api/workspaces/dev-server')


def test_an_agent_workspace_gains_no_privileges(real, docker_client):
    made(real, 'caged', type='agent', template='blank', ssh=False)
    code, output = inside(docker_client, real, 'caged', 'sudo -n id')
    assert code != 0, output
    assert inside(docker_client, real, 'caged', 'grep NoNewPrivs /proc/self/status')[1].split()[1] == '1'
    assert inside(docker_client, real, 'caged', 'ls /var/run/docker.sock')[0] != 0
    real.call('DELETE', '/api/workspaces/caged')


@pytest.fixture(scope='module')
def git_server(tmp_path_factory, docker_client):
    """A repository over HTTP, open under /open and with a password under /closed, on the address that
    containers reach."""
    folder = tmp_path_factory.mktemp('git')
    work, git = folder / 'work', ['git', '-c', 'user.name=t', '-c', 'user.email=t@example.org']
    subprocess.run(['git', 'init', '-q', '-b', 'main', work], check=True)
    (work / 'hello.txt').write_text('hello\n')
    subprocess.run(['git', '-C', work, 'add', '.'], check=True)
    subprocess.run([*git, '-C', work, 'commit', '-qm', 'one'], check=True)
    subprocess.run(['git', '-C', work, 'branch', 'feature/x'], check=True)
    for name in ('open', 'closed'):
        subprocess.run(['git', 'clone', '-q', '--bare', work, folder / name / 'repo.git'], check=True)
        subprocess.run(['git', '-C', folder / name / 'repo.git', 'update-server-info'], check=True)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def do_GET(self):
            wanted = 'Basic ' + base64.b64encode(USER_AND_PASSWORD.encode()).decode()
            if self.path.startswith('/closed') and self.headers.get('Authorization') != wanted:
                self.send_response(401)
                self.send_header('WWW-Authenticate', 'Basic realm="git"')
                self.end_headers()
            else:
                super().do_GET()

        def log_message(self, *args):
            pass

    gateway = bridge_address(docker_client)
    server = http.server.ThreadingHTTPServer((gateway, 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'{gateway}:{server.server_port}'
    server.shutdown()


def test_a_repository_is_cloned_with_its_branch_and_without_its_credentials(real, docker_client, git_server):
    workspace = made(real, 'cloned', template='blank', ssh=False, gitBranch='feature/x',
                     gitUrl=f'http://{USER_AND_PASSWORD}@{git_server}/closed/repo.git')
    assert workspace['status'] == 'running', workspace
    assert workspace['gitUrl'] == f'http://{git_server}/closed/repo.git'
    assert inside(docker_client, real, 'cloned',
                  'cat hello.txt; git rev-parse --abbrev-ref HEAD')[1] == 'hello\nfeature/x\n'
    container = docker_client.containers.get(f'{real.instance}-cloned')
    volume = docker_client.volumes.get(f"{real.instance}-{workspace['id']}")
    secret, state = USER_AND_PASSWORD.partition(':')[2], state_path(real)
    journal = state.with_name(f'{state.name}-wal')

    def printed(*command):
        return container.exec_run(command)[1].decode('utf-8', 'replace')
    places = {'inspect': str(container.attrs), 'volume': str(volume.attrs),
              'container log': container.logs().decode(), 'server log': real.log.read_text(),
              'state file': (state.read_bytes() + journal.read_bytes()).decode('latin-1'),
              'api': real.call('GET', '/api/workspaces/cloned').text,
              'files': printed('grep', '-rlsF', secret, '/workspace', '/etc', '/home', '/run', '/tmp',
                               '/root'),
              'processes': printed('bash', '-c', 'cat /proc/[0-9]*/{cmdline,environ} 2>/dev/null')}
    assert not [place for place, text in places.items() if secret in text]
    assert not places['files']
    real.call('DELETE', '/api/workspaces/cloned')


@pytest.mark.parametrize(('path', 'branch', 'words'), [
    ('open/missing.git', None, 'not found'), ('open/repo.git', 'no-such-branch', 'no-such-branch'),
    ('closed/repo.git', None, 'could not read Username')])
def test_a_failed_clone_is_told_in_gits_own_words_and_leaves_nothing(
        real, docker_client, git_server, path, branch, words):
    fields = {'gitUrl': f'http://{git_server}/{path}'} | ({'gitBranch': branch} if branch else {})
    workspace = made(real, 'broken', template='blank', ssh=False, **fields)
    assert workspace['status'] == 'error' and words in workspace['error'], workspace
    assert workspace['codeServerPort'] is None
    assert not objects_of(docker_client, real.instance)
    assert real.call('DELETE', '/api/workspaces/broken').status_code == 200


def test_extra_certificates_are_trusted_inside(real, docker_client):
    made(real, 'trusting', template='blank', ssh=False)
    code, output = inside(docker_client, real, 'trusting',
                          'echo $NODE_EXTRA_CA_CERTS; test -s /etc/ssl/certs/ca-certificates.crt')
    assert code == 0 and output.strip() == '/etc/ssl/certs/ca-certificates.crt'
    real.call('DELETE', '/api/workspaces/trusting')


def test_readiness_is_asked_for_inside_where_ports_are_out_of_reach(tmp_path, docker_client, base_image, key):
    served = Served(tmp_path, ROOT / 'templates', DEFAULT_TEMPLATE='blank',
                    WORKSPACE_HOST='dev.example.org').start()
    try:
        workspace = made(served, 'elsewhere', sshPublicKeys=[key.with_suffix('.pub').read_text().strip()])
        assert workspace['status'] == 'running', workspace
        assert workspace['codeServerUrl'].startswith('http://dev.example.org:')
        assert workspace['sshCommand'].endswith('dev@dev.example.org')
    finally:
        served.call('DELETE', '/api/workspaces/elsewhere')
        served.stop()
        remove_objects(docker_client, served.instance)
