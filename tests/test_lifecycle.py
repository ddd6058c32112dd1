"""The life of workspaces on the real engine, with a small image."""
import contextlib
import json
import os
import shutil
import time
import urllib.request

from conftest import concurrently, objects_of
from helpers import (
    CLONE_FAILS,
    PUBLIC_KEY,
    delete,
    in_container,
    inspect,
    left_of,
    patch,
    seconds_left,
    state_path,
    verb,
    wait_gone,
)
from streaming import Sse, has_text, messages_until

CAPABILITIES = {'CHOWN', 'DAC_OVERRIDE', 'FOWNER', 'FSETID', 'KILL', 'SETGID', 'SETUID', 'SYS_CHROOT',
                'AUDIT_WRITE'}
SLOW_END = {'PRINT': "trap 'sleep 2; exit 0' TERM"}  # SIGTERM ends it after two seconds


@contextlib.contextmanager
def foreign_container(client, server, name):
    """A container that is none of ours, under the name that a workspace of ours would have."""
    image = next(iter(client.api.images(filters={'label': 'agentbackend.template=tiny'})))['Id']
    made = client.api.create_container(image, name=f'{server.instance}-{name}')
    try:
        yield
    finally:
        client.api.remove_container(made['Id'], force=True)


def test_a_workspace_is_created_stopped_started_and_deleted(server, docker_client):
    created = server.create('life')
    assert created['status'] == 'creating' and created['codeServerPort']
    running = server.wait_status('life', 'running')
    assert running['id'] == created['id'] and running['containerId']
    assert server.call('POST', '/api/workspaces/life/stop').status_code == 202
    server.wait_status('life', 'stopped')
    assert server.call('POST', '/api/workspaces/life/start').status_code == 202
    again = server.wait_status('life', 'running')
    assert again['codeServerPort'] == created['codeServerPort']
    assert again['containerId'] == running['containerId']
    answer = server.call('DELETE', '/api/workspaces/life')
    assert answer.status_code == 200 and answer.json()['data']['deleted']
    assert not [name for name in objects_of(docker_client, server.instance) if created['id'] in name
                or 'life' in name]
    gone = server.call('GET', '/api/workspaces/life').json()
    assert gone | {'details': None} == {'success': False, 'error': 'Workspace not found',
                                        'code': 'WORKSPACE_NOT_FOUND', 'details': None}


# What a workspace is

def test_create_answers_at_once_with_the_place_where_the_workspace_is_found(server):
    answer = server.call('POST', '/api/workspaces', {'name': 'place', 'labels': {'a': 'b'}})
    assert answer.status_code == 201
    created = answer.json()['data']
    assert answer.headers['Location'] == f"/api/workspaces/{created['id']}"
    found = server.call('GET', answer.headers['Location']).json()['data']
    assert found == server.get('/api/workspaces/place') | {'status': found['status']}
    assert created.items() <= (found | {'status': 'creating'}).items()
    assert found['labels'] == {'a': 'b'} and found['expiresAt'] is None
    assert abs(seconds_left(found['createdAt'])) < 30
    running = server.wait_status('place', 'running')
    port, ssh = running['codeServerPort'], running['sshPort']
    assert running['codeServerUrl'] == f'http://127.0.0.1:{port}/?folder=/workspace/place'
    assert running['sshCommand'].startswith(f'ssh -p {ssh} ')
    assert running['sshCommand'].endswith(' dev@127.0.0.1')
    with urllib.request.urlopen(f'http://127.0.0.1:{port}/healthz') as answer:
        assert answer.status == 200
    delete(server, created['id'])


def test_list_filters_by_type_status_and_label(server):
    wanted = {'one': {'labels': {'team': 'a', 'x': ''}},
              'two': {'labels': {'team': 'b', 'x': ''}, 'type': 'agent'},
              'three': {'labels': {'team': 'a=b'}, 'type': 'temporary', 'env': {'SLOW': '60'}}}
    for name, fields in wanted.items():
        server.create(name, **fields)

    def names(query):
        return [item['name'] for item in server.get(f'/api/workspaces?{query}')]
    for name in ('one', 'two'):
        server.wait_status(name, 'running')
    assert names('label=team') == ['one', 'two', 'three']
    assert names('label=team=a') == ['one'] and names('label=team=a%3Db') == ['three']
    assert names('label=x=') == ['one', 'two']
    assert names('label=team=b&label=x') == ['two'] and names('label=team=a&label=team=b') == []
    assert names('label=team&type=agent') == ['two']
    assert names('label=team&type=agent&type=temporary') == ['two', 'three']
    assert names('label=team&status=running') == ['one', 'two']
    assert names('label=team&status=creating') == ['three']
    assert names('label=team&status=stopped') == [] and names('label=tea') == []
    concurrently(*(lambda name=name: delete(server, name) for name in wanted))
    assert names('label=team') == []


def test_rename_takes_the_container_along_and_refuses_a_taken_name(server, docker_client):
    concurrently(*(lambda name=name: server.running(name) for name in ('before', 'other')))
    before = server.get('/api/workspaces/before')
    assert server.call('PATCH', '/api/workspaces/before', {'name': 'other'}).status_code == 409
    with foreign_container(docker_client, server, 'foreign'):
        answer = server.call('PATCH', '/api/workspaces/before', {'name': 'foreign'})
    assert answer.status_code == 409 and answer.json()['code'] == 'WORKSPACE_ALREADY_EXISTS'
    assert server.get('/api/workspaces/before')['name'] == 'before'
    assert patch(server, 'before', name='before')['name'] == 'before'
    after = patch(server, 'before', name='after')
    assert after == before | {'name': 'after', 'lastActivityAt': after['lastActivityAt'],
                              'resources': after['resources']}
    assert inspect(docker_client, server, 'after')['Id'].startswith(before['containerId'])
    assert server.call('GET', '/api/workspaces/before').status_code == 404
    verb(server, 'after', 'restart')
    server.wait_status('after', 'running')
    server.create('before')
    concurrently(*(lambda name=name: delete(server, name) for name in ('before', 'after', 'other')))


def test_patch_sets_and_clears_ttl_and_merges_labels(server):
    server.create('patched', labels={'keep': '1', 'change': '1', 'drop': '1'})
    changed = patch(server, 'patched', ttl=1000, labels={'change': '2', 'drop': None, 'add': '3'})
    assert changed['ttl'] == 1000 and 995 < seconds_left(changed['expiresAt']) <= 1000
    assert changed['labels'] == {'keep': '1', 'change': '2', 'add': '3'}
    assert patch(server, 'patched', labels={'keep': None})['ttl'] == 1000
    cleared = patch(server, 'patched', ttl=None)
    assert cleared['ttl'] is None and cleared['expiresAt'] is None
    assert cleared['labels'] == {'change': '2', 'add': '3'}
    delete(server, 'patched')


def test_what_all_use_is_told_in_one_answer(server):
    identity = server.running('metered')['id']
    other = server.running('unmetered')['id']
    server.until(lambda: server.get('/api/usage')[identity]['memoryUsage'] > 0)
    server.call('POST', '/api/workspaces/unmetered/stop')
    server.wait_status('unmetered', 'stopped')
    usage = server.get('/api/usage')
    assert other not in usage
    assert usage[identity].keys() == {'cpuPercent', 'memoryUsage', 'memoryLimit'}


def test_resources_are_numbers_as_soon_as_it_runs(server):
    found = server.running('measured', memory='64m')['resources']
    assert found['memoryLimit'] == 64 * 2**20 and found['cpuPercent'] >= 0
    found = server.until(lambda: server.get('/api/workspaces/measured')['resources'], 6)
    server.until(lambda: server.get('/api/workspaces/measured')['resources']['memoryUsage'] > 0, 6)
    found = server.get('/api/workspaces/measured')['resources']
    assert found['memoryLimit'] == 64 * 2**20 and 0 < found['memoryUsage'] < found['memoryLimit']
    assert 0 <= found['cpuPercent'] < 200
    verb(server, 'measured', 'stop')
    assert server.wait_status('measured', 'stopped')['resources'] is None
    delete(server, 'measured')


def test_a_container_has_what_was_asked_for_and_no_more_rights_than_it_needs(server, docker_client):
    fields = {'env': {'ONE': '1', 'TWO': 'a=b c'}, 'cpus': 0.5, 'memory': 96 * 2**20, 'ports': [3000, 5173],
              'gitBranch': 'main',
              'gitUrl': 'https://git.invalid/x.git'}
    concurrently(*(lambda kind=kind: server.running(f'is-{kind}', type=kind, **fields)
                   for kind in ('persistent', 'temporary', 'agent')))
    for kind in ('persistent', 'temporary', 'agent'):
        workspace = server.get(f'/api/workspaces/is-{kind}')
        found = inspect(docker_client, server, f'is-{kind}')
        host = found['HostConfig']
        assert {f'WORKSPACE_NAME=is-{kind}', f'PROJECT_DIR=/workspace/is-{kind}',
                'GIT_URL=https://git.invalid/x.git',
                'GIT_BRANCH=main', 'SSH_ENABLED=1', f"WORKSPACE_ID={workspace['id']}",
                f'WORKSPACE_TYPE={kind}'} <= set(found['Config']['Env'])
        # What a user asks for is for the shells of its user, not for what root starts.
        assert not {'ONE=1', 'TWO=a=b c'} & set(found['Config']['Env'])
        assert in_container(docker_client, server, f'is-{kind}', 'echo "$ONE $TWO"') == '1 a=b c'
        assert host['NanoCpus'] == 500_000_000 and host['Memory'] == 96 * 2**20 and host['PidsLimit'] == 4096
        assert host['CapDrop'] == ['ALL'] and set(host['CapAdd']) == CAPABILITIES
        assert len(host['CapAdd']) == len(CAPABILITIES)
        assert not host['Privileged'] and host['Init'] is True
        assert host['NetworkMode'] == f'agentbackend-{server.instance}'
        assert (host['SecurityOpt'] or []) == (['no-new-privileges'] if kind == 'agent' else [])
        assert host['RestartPolicy']['Name'] == ('unless-stopped' if kind == 'persistent' else '')
        volume = f"{server.instance}-{workspace['id']}"
        mounts = {(mount['Type'], mount['Name'], mount['Destination']) for mount in found['Mounts']}
        assert mounts == {('volume', volume, '/workspace'), ('volume', f'{volume}-home', '/home/dev')}
        ports = {'8443/tcp': workspace['codeServerPort'], '2222/tcp': workspace['sshPort'],
                 '3000/tcp': workspace['ports']['3000'], '5173/tcp': workspace['ports']['5173']}
        published = {inside: [{'HostIp': '127.0.0.1', 'HostPort': str(port)}]
                     for inside, port in ports.items()}
        assert found['NetworkSettings']['Ports'] == published
        effective = int(in_container(docker_client, server, f'is-{kind}',
                                     'grep CapBnd /proc/1/status | cut -f2'), 16)
        assert bin(effective).count('1') == len(CAPABILITIES)
    concurrently(*(lambda kind=kind: delete(server, f'is-{kind}')
                   for kind in ('persistent', 'temporary', 'agent')))


def test_limits_have_defaults_and_never_ask_for_more_cores_than_there_are(make_server, docker_client):
    server = make_server(WORKSPACE_MEMORY='128m', WORKSPACE_CPUS='64', WORKSPACE_PIDS='99')
    server.running('limited')
    host = inspect(docker_client, server, 'limited')['HostConfig']
    assert host['NanoCpus'] == docker_client.info()['NCPU'] * 10**9 and host['Memory'] == 128 * 2**20
    assert host['PidsLimit'] == 99


def test_a_custom_port_is_reached_from_the_host(server):
    page = "mkdir /srv; echo 'hello from inside' >/srv/index.html; httpd -p 3000 -h /srv"
    workspace = server.running('served', ports=[3000], env={'PRINT': page})

    url = f"http://127.0.0.1:{workspace['ports']['3000']}/"

    def read():
        with contextlib.suppress(OSError), urllib.request.urlopen(url) as answer:
            return answer.read().decode()
        return None
    assert server.until(read, 5) == 'hello from inside\n'
    delete(server, 'served')


def test_without_ssh_no_port_is_taken_or_published(server, docker_client):
    used = server.get('/health')['ports']['ssh']['used']
    workspace = server.running('no-ssh', ssh=False)
    assert workspace['sshPort'] is None and workspace['sshCommand'] is None
    assert server.get('/health')['ports']['ssh']['used'] == used
    found = inspect(docker_client, server, 'no-ssh')
    assert list(found['NetworkSettings']['Ports']) == ['8443/tcp']
    assert 'SSH_ENABLED=0' in found['Config']['Env']
    delete(server, 'no-ssh')


def test_secrets_stay_where_they_are_needed(server, docker_client):
    token, value, key = 'hunter2credential', 'hunter2value', PUBLIC_KEY
    server.create('secret', gitUrl=f'https://me:{token}@git.invalid/x.git', env={'TOKEN': value},
                  sshPublicKeys=[key])
    workspace = server.wait_status('secret', 'running')
    server.create('secret-clone', env=CLONE_FAILS | {'TOKEN': value},
                  gitUrl=f'https://{token}@git.invalid/x.git')
    failed = server.wait_status('secret-clone', 'error')
    password = workspace['codeServerPassword']
    assert workspace['gitUrl'] == 'https://git.invalid/x.git' and len(password) >= 16
    found = inspect(docker_client, server, 'secret')
    volume = docker_client.api.inspect_volume(f"{server.instance}-{workspace['id']}")
    details = {key: text for key, text in workspace.items() if key != 'codeServerPassword'}
    argv = in_container(docker_client, server, 'secret', 'cat /proc/[0-9]*/cmdline | tr "\\0" " "')
    places = {'inspect': found, 'volume': volume, 'list': server.get('/api/workspaces'), 'details': details,
              'failed': failed, 'health': server.get('/health'), 'argv': argv}
    for place, content in places.items():
        for secret in (token, value, password, key.split()[1]):
            assert secret not in json.dumps(content), f'{secret} in {place}'
    files = list(state_path(server).parent.glob(f'{server.instance}.sqlite*'))
    assert state_path(server) in files
    for path in files:
        assert path.stat().st_mode & 0o777 == 0o600 and token.encode() not in path.read_bytes()
    log = server.log.read_text()
    assert 'DEBUG' in log and not [secret for secret in (token, value, password, key.split()[1])
                                   if secret in log]
    # And they are where the workspace needs them.
    settings = in_container(docker_client, server, 'secret',
                            'cd /etc/agentbackend; cat git-credentials-once password; '
                            'stat -c "%a %u %n" *; cat authorized_keys')
    assert settings.splitlines() == [
        f'https://me:{token}@git.invalid', password, '644 0 authorized_keys', '644 0 env',
        '600 1000 git-credentials', '600 1000 git-credentials-once', '600 1000 git-key', '644 0 gitconfig',
        '644 0 owned', '600 0 password', '644 0 taken', '644 0 workspace', key]
    concurrently(lambda: delete(server, 'secret'), lambda: delete(server, 'secret-clone'))


def test_credentials_for_one_clone_are_asked_for_again_by_another_try(server):
    server.create('secret', gitUrl='https://git.invalid/x.git', gitToken='hunter2', env=CLONE_FAILS)
    server.wait_status('secret', 'error')

    def retry(**body):
        return server.call('POST', '/api/workspaces/secret/retry', body)
    answer = retry()
    assert answer.status_code == 400 and 'gitToken is needed again' in answer.json()['error']
    for body in ({'gitToken': 'hunter3'}, {'gitUrl': 'https://git.invalid/open.git'}):
        assert retry(**body).status_code == 202
        assert CLONE_FAILS['CLONE_FAILS'] in server.wait_status('secret', 'error')['error']
    assert retry().status_code == 202, 'the last one needed none'
    delete(server, 'secret')


# Verbs, twice and at the wrong time

def test_start_stop_and_restart_may_be_called_twice(server):
    server.running('twice')
    assert verb(server, 'twice', 'start')['status'] == 'running'
    assert verb(server, 'twice', 'stop')['status'] == 'stopping'
    assert verb(server, 'twice', 'stop')['status'] in ('stopping', 'stopped')
    server.wait_status('twice', 'stopped')
    assert verb(server, 'twice', 'stop')['status'] == 'stopped'
    assert verb(server, 'twice', 'start')['status'] == 'creating'
    assert verb(server, 'twice', 'start')['status'] in ('creating', 'running')
    first = server.wait_status('twice', 'running')
    for _ in range(2):
        assert verb(server, 'twice', 'restart')['status'] == 'creating'
        assert server.wait_status('twice', 'running')['containerId'] == first['containerId']
    delete(server, 'twice')


def test_a_restart_really_restarts(server, docker_client):
    server.running('restarted')
    before = inspect(docker_client, server, 'restarted')['State']
    verb(server, 'restarted', 'restart')
    server.wait_status('restarted', 'running')
    after = inspect(docker_client, server, 'restarted')['State']
    assert after['StartedAt'] > before['StartedAt'] and after['Pid'] != before['Pid']
    delete(server, 'restarted')


def test_the_same_call_many_times_at_once_is_no_error(server):
    server.running('crowd')
    for action, status in (('stop', 'stopped'), ('start', 'running')):
        concurrently(*[lambda action=action: verb(server, 'crowd', action)] * 12)
        server.wait_status('crowd', status)
    answers = concurrently(*[lambda: server.call('POST', '/api/workspaces/crowd/restart').status_code] * 12)
    assert set(answers) == {202, 409} and answers.count(202) == 1
    server.wait_status('crowd', 'running')
    answers = concurrently(*[lambda: server.call('DELETE', '/api/workspaces/crowd').status_code] * 12)
    assert 200 in answers and set(answers) <= {200, 404}


def test_one_name_is_given_once_however_many_ask_at_once(server):
    def create():
        return server.call('POST', '/api/workspaces', {'name': 'wanted'}).status_code
    assert sorted(concurrently(*[create] * 8)) == [201] + [409] * 7
    delete(server, 'wanted')


def test_verbs_are_refused_in_the_wrong_status(server):
    server.create('slow', env={'SLOW': '60'})
    server.create('failed', env=CLONE_FAILS)
    server.running('halted')
    verb(server, 'halted', 'stop')
    server.wait_status('halted', 'stopped')
    server.wait_status('failed', 'error')
    for name, action in (('slow', 'stop'), ('slow', 'restart'), ('halted', 'restart'),
                         ('failed', 'start'), ('failed', 'stop'), ('failed', 'restart')):
        answer = verb(server, name, action, 409)
        assert answer['code'] == 'WORKSPACE_NOT_RUNNING' and name in answer['error'], answer
    for action in ('start', 'stop', 'restart'):
        assert verb(server, 'nobody', action, 404)['code'] == 'WORKSPACE_NOT_FOUND'
    assert server.get('/api/workspaces/slow')['status'] == 'creating'
    concurrently(*(lambda name=name: delete(server, name) for name in ('slow', 'halted', 'failed')))


def test_delete_ends_a_workspace_that_is_being_made(server, docker_client):
    created = server.create('unborn', env={'SLOW': '60'})
    server.until(lambda: any(left_of(docker_client, server, created)))
    begun = time.monotonic()
    delete(server, 'unborn')
    assert time.monotonic() - begun < 5
    assert not any(left_of(docker_client, server, created))
    delete(server, 'unborn', 404)


def test_delete_ends_a_workspace_that_is_stopping(server, docker_client):
    created = server.running('ending', env=SLOW_END)
    verb(server, 'ending', 'stop')
    time.sleep(0.3)
    assert server.get('/api/workspaces/ending')['status'] == 'stopping'
    delete(server, 'ending')
    assert not any(left_of(docker_client, server, created))
    assert server.call('GET', '/api/workspaces/ending').status_code == 404


# Creation that fails

def test_a_failed_clone_is_told_in_gits_words_and_leaves_nothing(make_server, docker_client):
    server = make_server(CODE_SERVER_PORTS='11500-11599', SSH_PORTS='11600-11699')
    port = server.create('cloned', env=CLONE_FAILS)['codeServerPort']
    failed = server.wait_status('cloned', 'error')
    assert failed['error'] == 'The clone failed: fatal: repository https://git.invalid/x.git not found'
    assert objects_of(docker_client, server.instance) == []
    assert failed['codeServerPort'] is None and failed['sshPort'] is None and failed['containerId'] is None
    assert server.get('/health')['ports']['codeServer'] == {'used': 0, 'total': 100}
    assert server.call('POST', '/api/workspaces', {'name': 'cloned'}).status_code == 409
    delete(server, 'cloned')
    assert server.get('/api/workspaces') == []
    assert server.running('cloned')['codeServerPort'] == port  # name and ports are free again


def test_a_container_that_ends_at_once_is_an_error_with_its_last_words(server, docker_client):
    created = server.create('crash', env={'CRASH': '7'})
    failed = server.wait_status('crash', 'error')
    assert 'exit code 7' in failed['error'] and 'crashing as told' in failed['error']
    assert not any(left_of(docker_client, server, created))
    delete(server, 'crash')


def test_a_workspace_that_never_answers_is_an_error(make_server, docker_client):
    server = make_server(READY_TIMEOUT='2')
    server.create('mute', env={'SLOW': '60'})
    failed = server.wait_status('mute', 'error', timeout=10)
    assert 'READY_TIMEOUT=2' in failed['error'] and objects_of(docker_client, server.instance) == []


def test_a_start_that_fails_is_not_begun_again_by_itself(make_server):
    server = make_server(READY_TIMEOUT='4')
    server.running('slow')
    patch(server, 'slow', env={'SLOW': '60'})
    verb(server, 'slow', 'restart')
    assert 'READY_TIMEOUT=4' in server.wait_status('slow', 'error')['error']
    time.sleep(1)
    assert server.log.read_text().count('(slow) is creating') == 2  # the create and the restart


def test_a_clone_that_makes_progress_may_take_longer_than_the_limit_and_tells_it(make_server):
    server = make_server(READY_TIMEOUT='4')
    server.create('long', env={'CLONES': '0 10 20 30 40 50 60 70 80 90 100'})
    assert server.wait_status('long', 'running', 'error', timeout=90)['status'] == 'running'
    with Sse(server, '/api/workspaces/long/events') as stream:
        told = messages_until(stream, has_text('workspace: started in tiny'))
    assert [event['data'] for event in told if event['type'] == 'progress'] == [
        {'phase': 'clone', 'step': percent, 'total': 100, 'message': f'Receiving objects: {percent}%'}
        for percent in range(0, 101, 10)]


def test_an_unknown_template_is_refused_and_reserves_nothing(server):
    answer = server.call('POST', '/api/workspaces', {'name': 'strange', 'template': 'nothing-like-it'})
    assert answer.status_code == 400 and answer.json()['code'] == 'VALIDATION_ERROR'
    assert 'tiny' in answer.json()['error']
    assert server.call('GET', '/api/workspaces/strange').status_code == 404


def test_a_name_that_a_foreign_container_has_is_refused(server, docker_client):
    server.running('any')  # the image is there
    with foreign_container(docker_client, server, 'stranger'):
        answer = server.call('POST', '/api/workspaces', {'name': 'stranger'})
        assert answer.status_code == 409 and answer.json()['code'] == 'WORKSPACE_ALREADY_EXISTS'
        assert docker_client.api.inspect_container(f'{server.instance}-stranger')
    delete(server, 'any')


# The three types

def test_a_temporary_workspace_is_deleted_by_its_end_but_not_by_a_restart(server, docker_client):
    names = ('by-stop', 'by-hand', 'by-kill', 'by-itself', 'not-by-restart')
    made = dict(zip(names,
                    concurrently(*(lambda name=name: server.running(name, type='temporary')
                                   for name in names)), strict=True))
    verb(server, 'by-stop', 'stop')
    verb(server, 'not-by-restart', 'restart')
    docker_client.api.stop(made['by-hand']['containerId'])
    docker_client.api.kill(made['by-kill']['containerId'])
    os.kill(inspect(docker_client, server, 'by-itself')['State']['Pid'], 9)
    server.wait_status('not-by-restart', 'running')
    docker_client.api.stop(made['not-by-restart']['containerId'])
    ended = time.monotonic()
    docker_client.api.start(made['not-by-restart']['containerId'])
    time.sleep(max(0, ended + 3 - time.monotonic()))
    docker_client.api.restart(made['not-by-restart']['containerId'])
    docker_client.api.stop(made['not-by-restart']['containerId'])
    time.sleep(1.5)  # a restart that takes its time, and is under way when the first one's is over
    docker_client.api.start(made['not-by-restart']['containerId'])
    for name in names[:-1]:
        wait_gone(server, name)
        assert not any(left_of(docker_client, server, made[name]))
    time.sleep(3)  # longer than its end is given
    assert server.get('/api/workspaces/not-by-restart')['status'] == 'running'
    assert inspect(docker_client, server, 'not-by-restart')['State']['Running']
    delete(server, 'not-by-restart')


def test_a_persistent_workspace_comes_back_after_a_crash(server, docker_client):
    workspace = server.running('sturdy')
    os.kill(inspect(docker_client, server, 'sturdy')['State']['Pid'], 9)
    server.until(lambda: inspect(docker_client, server, 'sturdy')['RestartCount'] == 1)
    server.wait_status('sturdy', 'running')
    time.sleep(1)
    again = server.get('/api/workspaces/sturdy')
    assert again['status'] == 'running' and again['containerId'] == workspace['containerId']
    assert again['error'] is None
    delete(server, 'sturdy')


def test_what_is_done_by_hand_is_seen(server, docker_client):
    container = server.running('hand')['containerId']
    docker_client.api.stop(container)
    assert server.wait_status('hand', 'stopped')['error'] is None
    docker_client.api.start(container)
    server.wait_status('hand', 'running')
    docker_client.api.restart(container)
    server.wait_status('hand', 'running')
    # The engine takes that for a stop on purpose, so its restart policy does nothing.
    docker_client.api.kill(container)
    assert '137' in server.wait_status('hand', 'stopped')['error']
    verb(server, 'hand', 'start')
    assert server.wait_status('hand', 'running')['error'] is None
    delete(server, 'hand')


def test_ttl_counts_from_the_last_activity_for_agents_and_from_when_it_was_set_for_others(
        server, docker_client):
    # As if an editor was used in four seconds.
    beat = 'echo "{\\"lastHeartbeat\\": $(($(date +%s) + 4))000}" >/www/healthz'
    fields = {'idle': {'type': 'agent'}, 'busy': {'type': 'agent'},
              'edited': {'type': 'agent', 'env': {'PRINT': beat}}, 'kept': {}}
    made = dict(zip(fields,
                    concurrently(*(lambda name=name: server.running(name, ttl=3, **fields[name])
                                   for name in fields)), strict=True))
    begun = time.monotonic()
    gone = {}
    while time.monotonic() - begun < 12 and len(gone) < 4:
        if time.monotonic() - begun < 5 and 'busy' not in gone:
            server.call('PATCH', '/api/workspaces/busy', {'labels': {'seen': 'yes'}})
            server.call('PATCH', '/api/workspaces/kept', {'labels': {'seen': 'yes'}})
        left = {item['name'] for item in server.get('/api/workspaces')}
        gone |= {name: time.monotonic() - begun for name in fields if name not in left and name not in gone}
        time.sleep(0.2)
    assert gone['idle'] < 6 and gone['kept'] < 6, gone
    assert gone['busy'] > 7.5 and gone['edited'] > 6, gone
    assert not any(any(left_of(docker_client, server, workspace)) for workspace in made.values())


def test_an_agent_without_a_ttl_of_its_own_gets_the_default(server):
    server.create('plain-agent', type='agent')
    server.create('eternal-agent', type='agent', ttl=None)
    found = server.get('/api/workspaces/plain-agent')
    assert found['ttl'] == 86400 and 86300 < seconds_left(found['expiresAt']) <= 86400
    assert server.get('/api/workspaces/eternal-agent')['expiresAt'] is None
    concurrently(lambda: delete(server, 'plain-agent'), lambda: delete(server, 'eternal-agent'))


def test_an_agent_workspace_that_is_stopped_keeps_its_files(server, docker_client):
    server.running('paused-agent', type='agent')
    in_container(docker_client, server, 'paused-agent', 'echo kept >/workspace/paused-agent/file')
    verb(server, 'paused-agent', 'stop')
    server.wait_status('paused-agent', 'stopped')
    verb(server, 'paused-agent', 'start')
    server.wait_status('paused-agent', 'running')
    assert in_container(docker_client, server, 'paused-agent', 'cat /workspace/paused-agent/file') == 'kept'
    delete(server, 'paused-agent')


# What others do to it

def test_start_makes_a_new_container_on_the_same_volume_when_the_old_was_removed(server, docker_client):
    before = server.running('orphan', ports=[3000], env={'KEPT': 'yes'})
    in_container(docker_client, server, 'orphan', 'echo kept >/workspace/orphan/file')
    docker_client.api.remove_container(before['containerId'], force=True)
    stopped = server.wait_status('orphan', 'stopped')
    assert 'removed outside Agent Backend' in stopped['error']
    assert stopped['codeServerPort'] == before['codeServerPort']
    verb(server, 'orphan', 'start')
    after = server.wait_status('orphan', 'running')
    assert after['containerId'] != before['containerId'] and after['error'] is None
    lasting = ('codeServerPort', 'sshPort', 'ports', 'codeServerPassword', 'createdAt')
    assert [after[key] for key in lasting] == [before[key] for key in lasting]
    assert in_container(docker_client, server, 'orphan',
                        'cat /workspace/orphan/file; echo $KEPT').split() == ['kept', 'yes']
    delete(server, 'orphan')


def test_a_workspace_whose_volume_is_gone_is_an_error_and_never_silently_empty(server, docker_client):
    workspace = server.running('robbed')
    docker_client.api.remove_container(workspace['containerId'], force=True)
    docker_client.api.remove_volume(f"{server.instance}-{workspace['id']}")
    if server.wait_status('robbed', 'error', 'stopped')['status'] == 'stopped':
        verb(server, 'robbed', 'start')
    found = server.wait_status('robbed', 'error')
    assert 'removed outside Agent Backend' in found['error'] and 'files' in found['error']
    verb(server, 'robbed', 'start')
    time.sleep(0.5)
    assert server.wait_status('robbed', 'error')['error']
    containers, volumes = left_of(docker_client, server, workspace)
    home = f"{server.instance}-{workspace['id']}-home"
    assert not containers and [volume['Name'] for volume in volumes] == [home]
    delete(server, 'robbed')
    wait_gone(server, 'robbed')
    assert not any(left_of(docker_client, server, workspace))


def test_out_of_memory_is_told(server):
    eat = "(sleep 1; kill -USR1 $$) & trap 'x=$(cat /dev/zero | tr \"\\\\0\" x)' USR1"
    server.running('hungry', type='agent', memory=20 * 2**20, env={'PRINT': eat})
    stopped = server.wait_status('hungry', 'stopped', timeout=20)
    assert 'ran out of its 20971520 bytes of memory' in stopped['error']
    delete(server, 'hungry')


# Images

def test_workspaces_that_need_one_image_share_its_build(own_templates, make_server, docker_client):
    folder, add_template = own_templates
    add_template('built', 'RUN ["/bin/sh", "-c", "echo a line of the build; sleep 4"]')
    server = make_server(TEMPLATES_DIR=str(folder))

    def template():
        return next(item for item in server.get('/api/templates') if item['name'] == 'built')
    assert template()['state'] == 'missing'
    assert template()['description'] == 'A static shell that answers as a workspace does.'
    for name in ('first', 'second', 'third'):
        server.create(name, template='built')
    server.until(lambda: template()['state'] == 'building', 5)
    assert abs(seconds_left(template()['buildingSince'])) < 5
    assert server.get('/health')['templates']['built']['state'] == 'building'
    delete(server, 'third')  # while its image is being built, for others too
    assert template()['state'] == 'building'
    concurrently(lambda: server.wait_status('first', 'running'),
                 lambda: server.wait_status('second', 'running'))
    assert template()['state'] == 'ready' and 'buildingSince' not in template()
    assert template()['image'] == inspect(docker_client, server, 'first')['Config']['Image']
    log = server.log.read_text()
    assert log.count('Building image agentbackend/built:') == 1
    assert log.count('build built: a line of the build') == 1
    assert len(objects_of(docker_client, server.instance)) == 6  # a container and two volumes each


def test_a_build_goes_on_when_the_only_workspace_that_waits_for_it_is_deleted(
        own_templates, make_server, docker_client):
    folder, add_template = own_templates
    add_template('wanted', 'RUN ["/bin/sleep", "2"]')
    server = make_server(TEMPLATES_DIR=str(folder))
    server.create('waiting', template='wanted')
    server.until(lambda: server.get('/health')['templates']['wanted']['state'] == 'building', 5)
    delete(server, 'waiting')
    assert objects_of(docker_client, server.instance) == [] and server.get('/api/workspaces') == []
    server.until(lambda: server.get('/health')['templates']['wanted']['state'] == 'ready', 10)


def test_a_build_that_fails_tells_its_last_lines_and_an_edit_mends_it(
        own_templates, make_server, docker_client):
    folder, add_template = own_templates
    add_template('broken', 'RUN ["/bin/sh", "-c", "echo the compiler is missing; exit 3"]')
    server = make_server(TEMPLATES_DIR=str(folder))
    server.create('built', template='broken')
    failed = server.wait_status('built', 'error')
    assert 'the compiler is missing' in failed['error'] and 'returned a non-zero code: 3' in failed['error']
    assert objects_of(docker_client, server.instance) == []
    template = server.get('/health')['templates']['broken']
    assert template['state'] == 'failed' and 'the compiler is missing' in template['error']
    delete(server, 'built')
    add_template('broken')
    server.running('built', template='broken')
    template = server.get('/health')['templates']['broken']
    assert template['state'] == 'ready' and 'error' not in template


def test_a_build_that_fails_costs_no_container(own_templates, make_server):
    folder, add = own_templates
    add('fresh')
    server = make_server(TEMPLATES_DIR=str(folder), DEFAULT_TEMPLATE='fresh')
    made = server.running('old')
    add('fresh', 'RUN exit 3')
    patch(server, 'old', ports=[3000])
    verb(server, 'old', 'restart')
    assert 'non-zero code: 3' in server.wait_status('old', 'error')['error']
    patch(server, 'old', ports=[])
    verb(server, 'old', 'start')
    assert server.wait_status('old', 'running')['containerId'] == made['containerId']


def test_an_image_that_does_not_take_its_settings_over_stdin_does_as_well(
        own_templates, make_server, docker_client):
    folder, add_template = own_templates
    add_template('mute', 'LABEL agentbackend.settings=')
    server = make_server(TEMPLATES_DIR=str(folder))
    made = server.create('mine', template='mute', env={'MY': 'own'}, sshPublicKeys=[PUBLIC_KEY])
    server.wait_status('mine', 'running')
    assert 'WORKSPACE_SETTINGS=stdin' not in inspect(docker_client, server, 'mine')['Config']['Env']
    assert in_container(docker_client, server, 'mine', 'echo $MY') == 'own'
    keys = in_container(docker_client, server, 'mine', 'cat /etc/agentbackend/authorized_keys')
    assert keys == PUBLIC_KEY
    patch(server, 'mine', env={'MY': 'other'})
    verb(server, 'mine', 'restart')
    server.wait_status('mine', 'running')
    assert in_container(docker_client, server, 'mine', 'echo $MY') == 'other'
    server.create('deaf', template='mute', env={'CRASH': '3'})
    assert 'crashing as told' in server.wait_status('deaf', 'error')['error']
    delete(server, 'mine')
    assert left_of(docker_client, server, made) == ([], [])


def test_a_workspace_runs_when_its_editor_answers_whatever_its_log_says(own_templates, make_server):
    folder, add_template = own_templates
    add_template('slow')
    entry = folder / 'slow' / 'entry'
    entry.write_text(entry.read_text().replace('httpd -p', '{ sleep 6; exec httpd -f -p').replace(
        '-h /www', '-h /www; } &'))
    server = make_server(TEMPLATES_DIR=str(folder))
    made = server.running('late', template='slow')
    url = f"http://127.0.0.1:{made['codeServerPort']}/healthz"
    assert urllib.request.urlopen(url, timeout=2).status == 200


def test_an_edit_of_a_template_makes_a_new_image_and_leaves_old_workspaces_alone(
        own_templates, make_server, docker_client):
    folder, add_template = own_templates
    add_template('edited')
    server = make_server(TEMPLATES_DIR=str(folder))
    server.running('old', template='edited')
    (folder / 'edited' / 'banner').write_text('#!/bin/busybox sh\necho SSH-2.0-edited\n')
    assert server.get('/health')['templates']['edited']['state'] == 'missing'
    server.running('new', template='edited')
    images = [inspect(docker_client, server, name)['Image'] for name in ('old', 'new')]
    assert images[0] != images[1]
    assert 'edited' in in_container(docker_client, server, 'new', 'cat /bin/banner')
    verb(server, 'old', 'restart')
    server.wait_status('old', 'running')
    assert inspect(docker_client, server, 'old')['Image'] == images[0]
    shutil.rmtree(folder / 'edited')
    verb(server, 'old', 'restart')  # a container needs its template no more
    server.wait_status('old', 'running')


def test_the_image_of_a_template_is_built_again_when_it_was_removed(
        own_templates, make_server, docker_client):
    folder, add_template = own_templates
    add_template('pruned')
    server = make_server(TEMPLATES_DIR=str(folder))
    server.running('one', template='pruned')
    delete(server, 'one')
    docker_client.api.remove_image(server.get('/health')['templates']['pruned']['image'], force=True)
    server.running('two', template='pruned')
