"""Repositories as people have them, cloned into the real image: by git's own server, over HTTP and SSH."""
import contextlib
import json
import os
import re
import subprocess

import pytest
from conftest import ROOT, Served, concurrently, remove_objects
from fake_anthropic import bridge_address
from gitserver import GitServer, begin, commit, git, pointer, publish
from helpers import state_path, verb
from streaming import Sse, messages_until

from _agentbackend.timing import parse_time

LARGE, LOST = os.urandom(100_000), os.urandom(1000)
DEVCONTAINER = """{
  // as people write it
  "name": "full", /* with "comments" */ "image": "debian:12", "features": {"x": {}},
  "onCreateCommand": "echo create >> order.txt",
  "updateContentCommand": ["sh", "-c", "echo 'update content' >> order.txt"],
  "postCreateCommand": {"one": "echo \\"$IN_ALL, $IN_TOOLS\\" > variables.txt",
                        "two": "echo post >> order.txt"},
  "postStartCommand": "echo started >> ~/starts.txt",
  "containerEnv": {"IN_ALL": "http://no-comment /* none */", "IN_IT": "it's \\"$HOME\\" `id`"},
  "remoteEnv": {"IN_TOOLS": "${containerWorkspaceFolder}:${localEnv:USER}:${localEnv:NONE:it's so}",
                "GONE": null},
  "forwardPorts": [4711, "localhost:4712", "db:5432", 8443],
}
"""
PULL, DEEP, BIG = 'refs/pull/7/head', 20, 4_000_000


@pytest.fixture(scope='module')
def host(tmp_path_factory, docker_client):
    """A git server with some repositories."""
    folder = tmp_path_factory.mktemp('git')
    lib = begin(folder, 'lib', {'lib.txt': 'the library\n'})
    publish(folder, lib)
    with GitServer(folder, bridge_address(docker_client)) as host:
        full = begin(folder, 'full',
                     {'hello.txt': 'hello\n', '.devcontainer/devcontainer.json': DEVCONTAINER,
                      '.gitattributes': '*.bin filter=lfs diff=lfs merge=lfs -text\n'})
        submodule(full, 'vendor/lib', '../lib.git', git(lib, 'rev-parse', 'HEAD'))
        for name, content in (('there.bin', LARGE), ('lost.bin', LOST)):
            oid, text = pointer(content)
            blob = git(full, 'hash-object', '-w', '--stdin', data=text)
            git(full, 'update-index', '--add', '--cacheinfo', f'100644,{blob},{name}')
            host.large |= {oid: content} if content is LARGE else {}
        git(full, 'commit', '-qm', 'what a clone leaves out')
        git(full, 'branch', 'git-annex')
        publish(folder, full)
        make_refs(folder)
        broken = begin(folder, 'broken',
                       {'.devcontainer/devcontainer.json': json.dumps(
                           {'postCreateCommand': 'echo no such thing >&2; exit 7',
                            'postStartCommand': 'touch ~/started'})})
        submodule(broken, 'gone for good', '../gone.git', git(lib, 'rev-parse', 'HEAD'))
        submodule(broken, 'here', '../lib.git', git(lib, 'rev-parse', 'HEAD'))
        git(broken, 'commit', '-qm', 'with a submodule that is not there')
        publish(folder, broken)
        publish(folder, begin(folder, 'big', {f'{number}.bin': os.urandom(BIG // 100)
                                              for number in range(100)}))
        yield host


def submodule(work, path, url, commit_id):
    with open(work / '.gitmodules', 'a') as modules:
        modules.write(f'[submodule "{path}"]\n\tpath = {path}\n\turl = {url}\n')
    git(work, 'add', '.gitmodules')
    git(work, 'update-index', '--add', '--cacheinfo', f'160000,{commit_id},{path}')


def make_refs(folder):
    """Make the repositories `refs`, with all kinds of references, `headless` and `empty`."""
    refs = begin(folder, 'refs', {'file.txt': 'one\n'})
    for number in range(DEEP):
        commit(refs, {'file.txt': f'{number}\n'})
    git(refs, 'tag', 'v1.0', 'HEAD~5')
    git(refs, 'branch', 'feature/#1-ünï', 'HEAD~6')
    git(refs, 'branch', 'abcdef1', 'HEAD~7')  # it looks like a commit
    git(refs, 'checkout', '-q', '--detach')
    git(refs, 'update-ref', PULL, commit(refs, {'file.txt': 'pulled\n'}))
    git(refs, 'update-ref', 'refs/hidden/x', commit(refs, {'file.txt': 'behind it\n'}))
    git(refs, 'checkout', '-q', 'main')
    publish(folder, refs)
    headless = begin(folder, 'headless', {'file.txt': 'there\n'})
    publish(folder, headless)
    git(folder / 'headless.git', 'symbolic-ref', 'HEAD', 'refs/heads/nowhere')
    git(folder, 'init', '-q', '--bare', '-b', 'main', 'empty.git')


@pytest.fixture(scope='module')
def key(tmp_path_factory):
    """A pair of keys, to log in to workspaces and to reach repositories."""
    return make_key(tmp_path_factory.mktemp('key') / 'id')


def make_key(path, *options):
    subprocess.run(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-C', 'me', '-f', path, *options],
                   check=True)
    return path


def public(key):
    return key.with_suffix('.pub').read_text()


@pytest.fixture(scope='module')
def server(tmp_path_factory, docker_client, base_image, host, key):
    """A server, and workspaces that are made at once: those that clone, one that clones slowly, and `keys`,
    which serves a repository over SSH."""
    served = Served(tmp_path_factory.mktemp('repositories'), ROOT / 'templates', DEFAULT_TEMPLATE='blank',
                    WORKSPACE_BIND_ADDRESS=bridge_address(docker_client)).start()
    host.accounts |= {'john@example.com': 'p@ss/wo#rd?', 'x-access-token': 'tok-canary-1'}
    try:
        login = {'sshPublicKeys': [public(key)]}
        served.create('slow', gitUrl=host.url('slow', 'big'), ssh=False)
        served.create('keys', **login)
        pasted = host.url('closed', 'full', 'john%40example.com:p@ss%2Fwo%23rd%3F').replace('http', 'HTTP', 1)
        served.create('full', gitUrl=f'\n {pasted} \n', gitCredentials='keep',
                      setup='cat order.txt > setup.txt', gitUserName='Jöhn "J" Doe',
                      gitUserEmail=' john@example.com ', **login)
        served.create('once', gitUrl=host.url('closed', 'refs'), gitToken=' tok-canary-1\n',
                      gitBranch='pull/7/head', **login)
        served.create('broken', gitUrl=host.url('open', 'broken'), setup='touch never', **login)
        yield served
    finally:
        served.stop()
        print(served.log.read_text()[-8000:])
        remove_objects(docker_client, served.instance)


def ready(server, name, timeout=180):
    """Return the details of a workspace once it runs."""
    workspace = server.wait_status(name, 'running', 'error', timeout=timeout)
    assert workspace['status'] == 'running', (workspace['error'], log_of(server, name)[-3000:])
    return workspace


def log_of(server, name):
    return server.call('GET', f'/api/workspaces/{name}/logs').text


def ssh(server, name, key, command, *options, **more):
    """Return (exit code, what was printed) of a command over SSH."""
    workspace = ready(server, name)
    done = subprocess.run([*workspace['sshCommand'].split(), '-i', key, '-o', 'StrictHostKeyChecking=no',
                           '-o', 'UserKnownHostsFile=/dev/null', '-o', 'BatchMode=yes', '-o',
                           'LogLevel=ERROR', *options, f'cd $PROJECT_DIR; {command}'], capture_output=True,
                          timeout=120, **more)
    return done.returncode, (done.stdout + done.stderr).decode()


# What a clone brings

def test_submodules_large_files_and_the_rest_are_there_or_told(server, host, key):
    code, said = ssh(server, 'full', key,
                     'cat vendor/lib/lib.txt hello.txt; sha256sum there.bin; head -c 8 lost.bin; '
                     'git submodule status; git config remote.origin.url')
    lines = said.splitlines()
    assert code == 0 and lines[:2] == ['the library', 'hello'], said
    assert lines[2].split()[0] in host.large and lines[3].startswith('version')
    assert re.fullmatch(r'version  ?[0-9a-f]{40} vendor/lib .*', lines[3]), 'no minus: it is checked out'
    assert lines[4] == host.url('closed', 'full')
    warnings = ready(server, 'full')['warnings']
    assert [text for text in warnings if 'large files' in text] and [text for text in warnings
                                                                     if 'git-annex' in text]
    assert ('GET', '/closed/lib.git/info/refs', 'john@example.com') in host.requests


def test_a_submodule_that_cannot_be_had_is_told_and_undoes_nothing(server, key):
    assert ssh(server, 'broken', key, 'ls -A; ls here; git status --short')[1].splitlines() == [
        '.devcontainer', '.git', '.gitmodules', 'gone for good', 'here', 'lib.txt']
    warnings = ready(server, 'broken')['warnings']
    assert any('submodules are there (gone for good);' in text for text in warnings)
    status = [event for event in events_of(server, 'broken') if event['type'] == 'status'][-1]
    assert status['data']['status'] == 'running'


def events_of(server, name):
    """Return the events of a workspace up to now."""
    with Sse(server, f'/api/workspaces/{name}/events?tail=100000', timeout=20) as stream:
        return messages_until(stream,
                              lambda event: event['type'] == 'log'
                              and event['data']['message'].startswith('workspace: started in'))


REFERENCES = {'main': ('main', '19'), 'refs/heads/main': ('main', '19'), 'origin/main': ('main', '19'),
              'v1.0': ('HEAD', '14'), 'refs/tags/v1.0': ('HEAD', '14'),
              'feature/#1-ünï': ('feature/#1-ünï', '13'), 'abcdef1': ('abcdef1', '12'),
              'pull/7/head': ('pull/7/head', 'pulled'), PULL: ('pull/7/head', 'pulled'),
              'refs/hidden/x': ('hidden/x', 'behind it'), 'COMMIT~3': ('HEAD', '16'),
              'SHORT~3': ('HEAD', '16'), 'COMMIT-PULL': ('HEAD', 'pulled')}


def prepare(docker_client, server, number, **environment):
    """Run what clones for a workspace, in a workspace that is there; return (exit code, what it printed, what
    a look at the project gives)."""
    base, project = f'/home/dev/clones/{number}', f'/home/dev/clones/{number}/project'
    container = docker_client.containers.get(ready(server, 'keys')['containerId'])
    environment |= {'WORKSPACE_BASE_PATH': base, 'PROJECT_DIR': project, 'HOME': '/home/dev'}
    code, said = container.exec_run(['/usr/local/lib/agentbackend/prepare-project'], user='dev',
                                    environment=environment)
    look = 'git rev-parse --abbrev-ref HEAD; cat file.txt; git log --oneline | wc -l'
    found = b''
    while not found:  # a busy engine may lose what a short command prints, and this one always prints
        _, found = container.exec_run(['sh', '-c', look], user='dev', workdir=project if code == 0 else '/')
    return code, said.decode(), found.decode().splitlines()


@pytest.fixture(scope='module')
def references(server, host, docker_client):
    """What a clone of each reference gives."""
    commit_id, pulled = host.git('refs', 'rev-parse', 'main~3'), host.git('refs', 'rev-parse', PULL)
    words = {'COMMIT~3': commit_id, 'SHORT~3': commit_id[:7], 'COMMIT-PULL': pulled}
    wanted = [words.get(name, name) for name in REFERENCES]
    found = concurrently(*[lambda number=number, name=name: prepare(
        docker_client, server, number, GIT_URL=host.url('open', 'refs'), GIT_BRANCH=name)
        for number, name in enumerate(wanted)])
    return dict(zip(REFERENCES, found, strict=True))


@pytest.mark.parametrize('name', REFERENCES)
def test_a_branch_may_be_whatever_names_a_commit(references, name):
    code, said, (head, content, *_) = references[name]
    assert code == 0 and (head, content) == REFERENCES[name], said


def test_what_is_no_reference_is_told_in_words(server, host, docker_client):
    code, said, _ = prepare(docker_client, server, 'none', GIT_URL=host.url('open', 'refs'),
                            GIT_BRANCH='nothing')
    assert code == 65 and 'has no branch, tag, pull request or commit nothing' in said.splitlines()[-1]
    code, said, _ = prepare(docker_client, server, 'no-commit', GIT_URL=host.url('open', 'refs'),
                            GIT_BRANCH='f' * 40)
    assert code == 65 and 'f' * 40 in said


def test_a_repository_without_a_head_gives_what_there_is_and_says_so(server, host, docker_client):
    code, said, found = prepare(docker_client, server, 'headless', GIT_URL=host.url('open', 'headless'))
    assert (code == 0 and found[:2] == ['main', 'there']
            and 'warning: the HEAD of the repository points nowhere' in said)
    code, said, _ = prepare(docker_client, server, 'empty', GIT_URL=host.url('open', 'empty'))
    assert code == 0 and 'workspace: warning' not in said


def test_a_history_may_be_cut_and_a_clone_be_partial(server, host, docker_client):
    url = host.url('open', 'refs')
    assert prepare(docker_client, server, 'shallow', GIT_URL=url, GIT_DEPTH='3')[2][:3] == ['main', '19', '3']
    old = host.git('refs', 'rev-parse', 'main~9')
    code, said, found = prepare(docker_client, server, 'shallow-old', GIT_URL=url, GIT_DEPTH='1',
                                GIT_BRANCH=old)
    assert code == 0 and found[:3] == ['HEAD', '10', '1'], said
    assert (prepare(docker_client, server, 'pull', GIT_URL=url, GIT_DEPTH='2',
                    GIT_BRANCH='pull/7/head')[2][1] == 'pulled')
    code, said, found = prepare(docker_client, server, 'partial', GIT_URL=url, GIT_FILTER='tree:0')
    assert code == 0 and found[:3] == ['main', '19', str(DEEP + 1)], said


# Credentials

@pytest.mark.parametrize('user',
                         ['ann:pa#canary', 'ann:pa/canary', 'ann:pa?canary', 'ann@there.org:pa/canary',
                          'ann:12/canary'])
def test_a_secret_that_would_be_kept_and_shown_is_refused_and_not_quoted(server, host, user):
    answer = server.call('POST', '/api/workspaces',
                         {'name': 'leaky', 'gitUrl': host.url('closed', 'full', user)})
    assert answer.status_code == 400 and '%23' in answer.text, answer.text
    assert 'canary' not in answer.text and 'pa' not in answer.json()['details'][0]['message'].split()
    assert 'canary' not in server.log.read_text()


def test_credentials_show_nowhere_and_what_was_for_once_is_gone(server, docker_client, key):
    secrets = {'full': ('p@ss', 'p%40ss'), 'once': ('tok-canary-1',)}
    for name, words in secrets.items():
        workspace = ready(server, name)
        container = docker_client.containers.get(workspace['containerId'])
        kept = [path.read_bytes().decode('latin-1')
                for path in state_path(server).parent.glob('*.sqlite*')] if name == 'once' else []
        folders = ['/workspace', '/home', '/run', '/tmp', '/root', '/var', *(['/etc'] if kept else [])]
        look = 'cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ'
        places = {'details': json.dumps(server.get(f'/api/workspaces/{name}')), 'log': log_of(server, name),
                  'events': json.dumps(events_of(server, name)), 'server log': server.log.read_text(),
                  'inspect': json.dumps(docker_client.api.inspect_container(container.id)),
                  'processes': container.exec_run(['sh', '-c', look])[1].decode('utf-8', 'replace'),
                  'state': ''.join(kept)}
        assert not [place for place, text in places.items() for word in words if word in text]
        assert not [word for word in words if container.exec_run(['grep', '-rlsF', word, *folders])[1]]
        assert workspace['gitCredentials'] == ('kept' if name == 'full' else None)


def test_after_a_clone_with_credentials_for_once_the_log_says_how_to_push(server, key):
    assert ssh(server, 'once', key, 'git rev-parse --abbrev-ref HEAD')[1] == 'pull/7/head\n'
    told = [line for line in log_of(server, 'once').splitlines() if 'push' in line]
    assert told and 'gitToken' in told[0], log_of(server, 'once')[-2000:]
    code, said = ssh(server, 'once', key, 'git fetch')
    assert code != 0 and 'could not read Username' in said


def push(server, name, key, branch):
    return ssh(server, name, key,
               f'git commit -q --allow-empty -m "{branch}" && git push origin HEAD:refs/heads/{branch}')


def test_kept_credentials_push_and_commits_have_the_identity_that_was_given(server, host, key):
    code, said = push(server, 'full', key, 'pushed')
    assert code == 0, said
    assert (host.git('full', 'log', '-1', '--format=%an|%ae|%cn',
                     'pushed') == 'Jöhn "J" Doe|john@example.com|Jöhn "J" Doe')
    assert host.requests[-1][2] == 'john@example.com'


def patch(server, name, **fields):
    answer = server.call('PATCH', f'/api/workspaces/{name}', fields)
    assert answer.status_code == 200, answer.text
    return server.get(f'/api/workspaces/{name}')


def test_a_token_is_given_later_replaced_and_taken_back(server, host, key):
    ready(server, 'once')
    assert patch(server, 'once', gitToken='tok-canary-1')['gitCredentials'] == 'kept'
    assert push(server, 'once', key, 'later')[0] == 0
    host.accounts['x-access-token'] = 'tok-canary-2'
    assert push(server, 'once', key, 'stale')[0] != 0
    patch(server, 'once', gitToken='tok-canary-2')
    assert push(server, 'once', key, 'replaced')[0] == 0
    assert patch(server, 'once', gitToken=None)['gitCredentials'] is None
    code, said = push(server, 'once', key, 'revoked')
    assert code != 0 and 'could not read Username' in said
    pushed = host.git('refs', 'branch', '--list', 'later', 'stale', 'replaced', 'revoked').split()
    assert pushed == ['later', 'replaced']


def test_a_commit_works_for_everybody_and_a_users_own_identity_wins(server, key):
    who = 'git log -1 --format="%an <%ae>"'
    commit_one = 'git commit -q --allow-empty -m x'
    merging = f'git checkout -q -b side && {commit_one} && git checkout -q main && git merge -q --no-ff side'
    assert ssh(server, 'keys', key, f'{merging} && {who}') == (0, 'dev <dev@localhost>\n')
    patch(server, 'keys', gitUserName='Ada', gitUserEmail='ada@example.org')
    assert ssh(server, 'keys', key, f'{commit_one}; {who}')[1] == 'Ada <ada@example.org>\n'
    own = f'git config --global user.name Own; {commit_one}; git config --global --unset user.name; {who}'
    assert ssh(server, 'keys', key, own)[1] == 'Own <ada@example.org>\n'


# Keys

@pytest.fixture(scope='module')
def keyed(server, key):
    """The address of a repository over SSH; `keyed` failed to clone it and was tried again with a key."""
    code, said = ssh(server, 'keys', key, 'git clone -q --bare . ~/r.git')
    assert code == 0, said
    port, address = ready(server, 'keys')['sshPort'], 'host.docker.internal'
    url = f'ssh://dev@{address}:{port}/home/dev/r.git'
    server.create('keyed', gitUrl=url, sshPublicKeys=[public(key)])
    failed = server.wait_status('keyed', 'running', 'error', timeout=60)
    assert failed['status'] == 'error' and 'Permission denied' in failed['error'], failed
    answer = server.call('POST', '/api/workspaces/keyed/start')
    assert answer.status_code == 409 and 'Retry' in answer.json()['error']
    crooked = key.read_text().replace('\n', ' \r\n')
    answer = server.call('POST', '/api/workspaces/keyed/retry',
                         {'gitSshKey': f'\n{crooked}\n', 'gitCredentials': 'keep'})
    assert answer.status_code == 202, answer.text
    ready(server, 'keyed')
    return url


def test_a_failed_first_start_is_tried_again_with_a_key_which_pushes_too(server, keyed, key):
    assert "Permanently added" in log_of(server, 'keyed'), 'the first key of a host is told'
    code, said = push(server, 'keyed', key, 'pushed')
    assert code == 0, said
    assert ssh(server, 'keys', key, 'git -C ~/r.git branch --list pushed')[1].split() == ['pushed']
    answer = server.call('POST', '/api/workspaces/keyed/retry', {})
    assert answer.status_code == 409 and 'first start' in answer.json()['error']


def test_a_host_whose_key_has_changed_is_refused(server, keyed, key):
    code, said = ssh(server, 'keyed', key,
                     'cp ~/.ssh/known_hosts ~/known; ssh-keygen -q -t ed25519 -N "" -f ~/other <<<y >&2; '
                     r'sed -i "s#ssh-ed25519 .*#$(cut -d" " -f1,2 ~/other.pub)#" ~/.ssh/known_hosts; '
                     'git fetch; code=$?; mv ~/known ~/.ssh/known_hosts; exit $code')
    assert code != 0 and 'REMOTE HOST IDENTIFICATION HAS CHANGED' in said, said


def test_a_key_is_taken_back(server, keyed, key):
    assert ssh(server, 'keyed', key, 'git fetch')[0] == 0
    assert patch(server, 'keyed', gitSshKey=None)['gitCredentials'] is None
    code, said = ssh(server, 'keyed', key, 'git fetch')
    assert code != 0 and 'Permission denied' in said and 'Load key' not in said


def test_a_key_that_cannot_be_used_is_refused_and_not_quoted(server, key, tmp_path):
    locked = make_key(tmp_path / 'locked')
    subprocess.run(['ssh-keygen', '-q', '-p', '-N', 'secret', '-f', locked], check=True)
    texts = {'passphrase': locked.read_text(),
             'damaged': key.read_text()[:200] + '\n-----END OPENSSH PRIVATE KEY-----',
             'no private key': public(key)}
    for words, text in texts.items():
        answer = server.call('POST', '/api/workspaces',
                             {'name': 'locked', 'gitUrl': 'git@example.org:a/b.git', 'gitSshKey': text})
        assert answer.status_code == 400 and words in answer.json()['error'], answer.text
        assert text.splitlines()[0][40:] not in answer.text or len(text.splitlines()[0]) < 41


# Set-up

def test_a_devcontainer_is_honoured_as_far_as_it_can_be_and_the_rest_is_told(server, key):
    workspace = ready(server, 'full')
    assert ssh(server, 'full', key, 'cat order.txt setup.txt')[1] == 'create\nupdate content\npost\n' * 2
    assert (ssh(server, 'full', key,
                'cat variables.txt')[1] == "http://no-comment /* none */, /workspace/full:dev:it's so\n")
    assert ssh(server, 'full', key,
               'printenv IN_IT IN_TOOLS')[1] == ('it\'s "$HOME" `id`\n/workspace/full:dev:it\'s so\n')
    server.until(lambda: ssh(server, 'full', key, 'cat ~/starts.txt')[1] == 'started\n', 20)
    assert set(workspace['ports']) == {'4711', '4712'}
    assert any('features' in text and 'image' in text and 'template' in text
               for text in workspace['warnings'])
    steps = [event['data'] for event in events_of(server, 'full') if event['type'] == 'progress'
             and event['data']['phase'] == 'setup']
    assert [(item['step'], item['total']) for item in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert 'setup: cat order.txt' in steps[-1]['message']


def test_a_set_up_that_fails_leaves_the_workspace_running_and_says_so(server, key):
    warnings = ready(server, 'broken')['warnings']
    assert any('postCreateCommand ended with status 7' in text for text in warnings)
    assert 'no such thing' in log_of(server, 'broken')
    assert ssh(server, 'broken', key, 'test -e never')[0] == 1, 'what comes behind it was left out'


# Long clones

def test_a_slow_clone_tells_its_progress(server):
    workspace = ready(server, 'slow', 240)
    events = events_of(server, 'slow')
    steps = [event['data'] for event in events if event['type'] == 'progress'
             and event['data']['phase'] == 'clone']
    assert len(steps) > 5 and {'Receiving objects'} <= {step['message'].partition(':')[0] for step in steps}
    receiving = [step['step'] for step in steps if step['message'].startswith('Receiving')]
    assert (receiving == sorted(receiving) and receiving[-1] > receiving[0]
            and {step['total'] for step in steps} == {100})
    first, *_, last = (parse_time(event['timestamp']) for event in events if event['type'] == 'progress')
    assert last - first > 10 and not workspace['warnings']


def test_a_first_start_that_failed_is_tried_again_elsewhere(server, host):
    server.create('again', gitUrl=host.url('open', 'refs'), gitBranch='nothing', ssh=False)
    failed = server.wait_status('again', 'running', 'error', timeout=60)
    assert failed['status'] == 'error' and 'has no branch' in failed['error']
    answer = server.call('POST', '/api/workspaces/again/retry', {'gitBranch': 'v1.0', 'gitDepth': 1})
    assert answer.status_code == 202, answer.text
    assert ready(server, 'again')['gitBranch'] == 'v1.0'
    assert server.call('DELETE', '/api/workspaces/again').status_code == 200
    with contextlib.suppress(AssertionError):
        assert server.call('GET', '/api/workspaces/again').status_code == 404


def test_what_a_start_warned_of_is_told_after_the_next_one_too(server):
    before = ready(server, 'broken')['warnings']
    verb(server, 'broken', 'stop')
    server.wait_status('broken', 'stopped')
    verb(server, 'broken', 'start')
    assert server.wait_status('broken', 'running')['warnings'] == before != []
