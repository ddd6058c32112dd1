"""What git knows of a project, and the patch of it; in the real image, since it takes a real git."""
import pytest
from agents import running, served_agents, shell
from conftest import ROOT
from streaming import connect


@pytest.fixture(scope='module')
def server(tmp_path_factory, base_image, docker_client):
    with served_agents(tmp_path_factory.mktemp('git'), ROOT / 'templates', docker_client) as served:
        yield served


@pytest.fixture
def git(server, docker_client):
    """A function that runs a line of shell in the project, which is a fresh repository."""
    def run(line):
        code, said = shell(docker_client, server.container, f'cd /workspace/work && {line}')
        assert code == 0, said
        return said
    run('find . -mindepth 1 -delete; git init -qb main .; rm -rf /tmp/origin*')
    return run


def state(server):
    return server.get('/api/workspaces/work/git')


def diff(server, query=''):
    answer = server.call('GET', f'/api/workspaces/work/git/diff{query}')
    assert answer.status_code == 200, answer.text
    return answer.text


def test_a_repository_without_a_commit(server, git):
    git('echo new >file')
    assert state(server) | {'remote': None} == {
        'repository': True, 'branch': 'main', 'commit': None, 'upstream': None, 'remote': None, 'ahead': 0,
        'behind': 0, 'unpushed': 0, 'changes': [{'path': 'file', 'status': 'untracked'}], 'truncated': False}
    assert '+new' in diff(server)


def test_changes_and_what_is_nowhere_else_are_told(server, git):
    git('seq 50 >moved; seq 60 >changed; echo x >gone; git add .; git commit -qm one;'
        'git clone -q --bare . /tmp/origin; git remote add origin /tmp/origin;'
        'git fetch -q; git branch -qu origin/main')
    assert state(server)['changes'] == [] and state(server)['unpushed'] == 0 and diff(server) == ''
    git('git commit -q --allow-empty -m two; git mv moved renamed; echo more >>changed; rm gone;'
        'mkdir -p "a b"; echo odd >"a b/n\nl"; echo staged >staged; git add staged; echo skip >.gitignore;'
        'echo no >skip')
    told = state(server)
    assert (told['branch'], told['upstream'], told['remote']) == ('main', 'origin/main', '/tmp/origin')
    assert (told['ahead'], told['behind'], told['unpushed']) == (1, 0, 1)
    assert told['commit'] == git('git rev-parse HEAD').strip()
    assert {item['path']: item['status'] for item in told['changes']} == {
        'renamed': 'renamed', 'changed': 'modified', 'gone': 'deleted', 'a b/n\nl': 'untracked',
        'staged': 'added', '.gitignore': 'untracked'}
    before = git('git status --porcelain')
    patch = diff(server)
    assert '+more' in patch and '+staged' in patch and '+odd' in patch and '-x' in patch
    assert git('git status --porcelain') == before  # the index is as it was
    assert '+more' in diff(server, '?path=changed') and '+odd' not in diff(server, '?path=changed')
    assert '+more' in diff(server, '?base=origin/main')


def test_a_patch_can_be_applied(server, git):
    git('seq 20 >file; git add .; git commit -qm one; sed -i 5d file; echo new >other')
    patch = diff(server)
    server.call('PUT', '/api/workspaces/work/files//workspace/patch', data=patch.encode())
    git('git stash -qu; git apply /workspace/patch')
    assert diff(server) == patch


def test_what_is_no_repository_and_no_commit(server, git):
    answer = server.call('GET', '/api/workspaces/work/git/diff?base=nope')
    assert answer.status_code == 400 and 'nope' in answer.json()['error']
    assert server.call('GET', '/api/workspaces/work/git/diff?base=--output=x').status_code == 400
    git('rm -rf .git')
    assert state(server)['repository'] is False
    assert server.call('GET', '/api/workspaces/work/git/diff').status_code == 400


def test_nothing_that_the_project_names_is_run(server, git):
    git('echo one >file; git add .; git commit -qm one; rm -f /tmp/ran; printf "#!/bin/sh\ntouch /tmp/ran\n" '
        '>/tmp/plant; chmod +x /tmp/plant; git config core.fsmonitor /tmp/plant; '
        'cp /tmp/plant .git/hooks/post-index-change; echo two >>file; echo new >other')
    assert {item['path'] for item in state(server)['changes']} == {'file', 'other'}
    assert '+two' in diff(server) and '+new' in diff(server)
    git('! [ -e /tmp/ran ]')


def test_a_name_that_looks_like_a_header_is_a_name(server, git):
    git('seq 50 >"# x"; git add .; git commit -qm one; git mv "# x" y; echo new >z')
    assert {item['path']: item['status'] for item in state(server)['changes']} == {
        'y': 'renamed', 'z': 'untracked'}


def test_a_remote_that_is_no_address_is_cut(server, git):
    git('git remote add origin x; { printf \'[remote "origin"]\\nurl = \'; head -c 2000000 /dev/zero | '
        'tr "\\0" x; } >.git/config2; git config --unset remote.origin.url; cat .git/config2 >>.git/config')
    assert state(server)['remote'] == 'x' * 4096 and state(server)['branch'] == 'main'


def test_a_client_that_leaves_a_patch_leaves_nothing(server, git, docker_client):
    git('seq 3000000 >big; git add .; git commit -qm one; seq 3000000 -1 1 >big')
    before = git('ls /tmp')
    for busy in ('git add', 'git diff', 'diff --no-color'):
        with connect(server) as sock:
            sock.sendall(b'GET /api/workspaces/work/git/diff HTTP/1.1\r\nHost: localhost\r\n\r\n')
            server.until(lambda busy=busy: running(docker_client, server.container, busy))
        server.until(lambda: not running(docker_client, server.container, 'git'))
    server.until(lambda: git('ls /tmp') == before)


def test_a_stopped_workspace_tells_its_state_too(server, git):
    git('echo x >file; git add .; git commit -qm one')
    server.call('POST', '/api/workspaces/work/stop?wait=stopped')
    assert state(server)['unpushed'] == 1
    server.call('POST', '/api/workspaces/work/start?wait=running')
