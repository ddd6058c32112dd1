"""What is left of workspaces after a crash of the server, of the engine, or the loss of the state file: all
of them."""
import contextlib
import functools
import gc
import os
import random
import time

import gevent
import greenlet
import pytest
import requests
from conftest import concurrently, objects_of, remove_objects
from helpers import (
    OwnEngine,
    delete,
    in_container,
    inspect,
    kept,
    left_of,
    lose_all,
    patch,
    same_mounts,
    seconds_left,
    state_path,
    verb,
    wait_gone,
)

import agentbackend

KEPT = ('id', 'name', 'type', 'template', 'codeServerPort', 'sshPort', 'ports', 'createdAt',
        'codeServerPassword', 'gitUrl', 'gitBranch', 'labels',
        'ttl', 'containerId', 'expiresAt')


def kept_of(workspace, *without):
    return {key: workspace[key] for key in KEPT if key not in without}


def is_settled(server):
    return all(item['status'] in ('running', 'stopped', 'error') for item in server.get('/api/workspaces'))


# A crash of the server

def test_after_a_crash_everything_is_as_it_was(make_server, docker_client):
    server = make_server()
    wishes = {'plain': {'labels': {'a': 'b'}}, 'agent': {'type': 'agent', 'ttl': 500},
              'temp': {'type': 'temporary', 'ports': [3000]},
              'idle': {'gitUrl': 'https://git.invalid/x.git', 'gitBranch': 'main'}}
    concurrently(*(lambda name=name: server.running(name, **wishes[name]) for name in wishes))
    patch(server, 'plain', ttl=1000, labels={'c': 'd'}, name='renamed')
    verb(server, 'idle', 'stop')
    server.wait_status('idle', 'stopped')
    before = {item['id']: server.get(f"/api/workspaces/{item['id']}")
              for item in server.get('/api/workspaces')}
    started = {name: inspect(docker_client, server, name)['State']['StartedAt']
               for name in ('renamed', 'agent', 'temp', 'idle')}
    server.kill()
    server.start()
    time.sleep(1.2)  # a sweep
    after = {item['id']: server.get(f"/api/workspaces/{item['id']}")
             for item in server.get('/api/workspaces')}
    assert list(after) == list(before)
    for found, was in zip(after.values(), before.values(), strict=True):
        assert kept_of(found) == kept_of(was) and found['status'] == was['status'] and found['error'] is None
    assert started == {name: inspect(docker_client, server, name)['State']['StartedAt'] for name in started}
    assert server.until(lambda: server.get('/api/workspaces/renamed')['resources'], 6)


def test_sigterm_leaves_workspaces_running(make_server, docker_client):
    server = make_server()
    workspace = server.running('survivor', type='temporary')
    started = inspect(docker_client, server, 'survivor')['State']['StartedAt']
    begun = time.monotonic()
    assert server.stop() == 0 and time.monotonic() - begun < 5
    state = inspect(docker_client, server, 'survivor')['State']
    assert state['Running'] and state['StartedAt'] == started
    server.start()
    assert kept_of(server.get('/api/workspaces/survivor')) == kept_of(workspace)


def test_kills_at_random_moments_leak_nothing(make_server, docker_client):
    server = make_server()
    dice = random.Random(20)
    server.running('w0')

    def attempt():
        name = f'w{dice.randrange(5)}'
        action = dice.choice(('create', 'create', 'stop', 'start', 'restart', 'delete'))
        with contextlib.suppress(requests.exceptions.RequestException):
            if action == 'create':
                server.call('POST', '/api/workspaces',
                            {'name': name, 'type': dice.choice(('persistent', 'agent', 'temporary'))})
            elif action == 'delete':
                server.call('DELETE', f'/api/workspaces/{name}')
            else:
                server.call('POST', f'/api/workspaces/{name}/{action}')

    for turn in range(20):
        jobs = [gevent.spawn(attempt) for _ in range(3)]
        time.sleep(dice.random() ** 2 * 1.2)
        server.kill()
        gevent.joinall(jobs, timeout=5)
        server.start()
        server.until(lambda: is_settled(server), 30)
        found = server.get('/api/workspaces')
        assert not [item for item in found if item['status'] == 'error'], (turn, found)
        filters = {'label': f'agentbackend.instance={server.instance}'}
        containers = {item['Labels']['agentbackend.id']: item['State']
                      for item in docker_client.api.containers(all=True, filters=filters)}
        volumes = {item['Labels']['agentbackend.id']
                   for item in docker_client.api.volumes(filters=filters)['Volumes'] or ()}
        assert volumes == containers.keys() == {item['id'] for item in found}, turn
        for item in found:
            wanted = {'running': 'running', 'stopped': 'exited'}[item['status']]
            assert containers[item['id']] == wanted, (turn, item)
    for item in server.get('/api/workspaces'):
        delete(server, item['id'])
    assert objects_of(docker_client, server.instance) == []
    assert [count['used'] for count in server.get('/health')['ports'].values()] == [0, 0, 0]


def test_a_crash_during_the_build_builds_again(own_templates, make_server):
    folder, add_template = own_templates
    add_template('slow', 'RUN ["/bin/sleep", "1"]')
    server = make_server(TEMPLATES_DIR=str(folder))
    before = server.create('patient', template='slow')
    time.sleep(0.7)
    server.kill()
    server.start()
    after = server.wait_status('patient', 'running')
    assert after['id'] == before['id'] and after['codeServerPort'] == before['codeServerPort']


def test_credentials_that_a_crash_lost_are_an_error_that_says_so(own_templates, make_server, docker_client):
    folder, add_template = own_templates
    add_template('slow', 'RUN ["/bin/sleep", "1"]')
    server = make_server(TEMPLATES_DIR=str(folder))
    server.create('cloned', template='slow', gitUrl='https://token@git.invalid/x.git')
    time.sleep(0.7)
    server.kill()
    server.start()
    failed = server.wait_status('cloned', 'error')
    assert 'does not keep credentials' in failed['error'] and failed['codeServerPort'] is None
    assert objects_of(docker_client, server.instance) == []
    delete(server, 'cloned')


def make_half(server, client, name, *, container):
    """Kill the server while it makes a workspace, and leave a volume and no container, or one that never
    started."""
    server.create(name, env={'SLOW': '3'}, gitBranch='main', gitUrl='https://git.invalid/x.git')
    name_of_container = f'{server.instance}-{name}'
    found, = server.until(lambda: client.api.containers(filters={'name': name_of_container}))
    server.kill()
    found = client.api.inspect_container(found['Id'])
    client.api.remove_container(found['Id'], force=True)
    if container:
        client.api.create_container(found['Image'], name=name_of_container, labels=found['Config']['Labels'],
                                    environment=found['Config']['Env'],
                                    host_config=same_mounts(client, found))


@pytest.mark.parametrize('container', [False, True], ids=['volume', 'container'])
def test_a_half_made_workspace_is_finished(make_server, docker_client, container):
    server = make_server()
    make_half(server, docker_client, 'half', container=container)
    server.start()
    workspace = server.wait_status('half', 'running')
    told = in_container(docker_client, server, 'half', 'cat /etc/agentbackend/password; echo $SLOW').split()
    assert told == [workspace['codeServerPassword'], '3']
    delete(server, 'half')
    assert objects_of(docker_client, server.instance) == []


@pytest.mark.parametrize('container', [False, True], ids=['volume', 'container'])
def test_a_half_made_workspace_without_a_record_is_adopted(make_server, docker_client, container):
    server = make_server()
    make_half(server, docker_client, 'half', container=container)
    lose_all(docker_client, server)
    server.start()
    found = server.wait_status('half', 'stopped')
    assert found['gitUrl'] == 'https://git.invalid/x.git' and found['codeServerPort']
    verb(server, 'half', 'start')
    workspace = server.wait_status('half', 'running')
    assert in_container(docker_client, server, 'half',
                        'cat /etc/agentbackend/password') == workspace['codeServerPassword']
    delete(server, 'half')
    assert objects_of(docker_client, server.instance) == []


# The state file

def damage(client, server):
    lose_all(client, server)
    state_path(server).write_text('{"version": 1, "workspaces": [{"id": "ws-')


@pytest.mark.parametrize('harm', [lose_all, damage])
def test_without_the_state_file_everything_is_adopted_from_the_engine(make_server, docker_client, harm):
    server = make_server()
    wishes = {'plain': {'env': {'KEPT': 'a=b'}, 'ports': [3000], 'labels': {'team': 'a'}, 'cpus': 0.5,
                        'memory': 96 * 2**20,
                        'gitUrl': 'https://git.invalid/x.git', 'gitBranch': 'main'},
              'agent': {'type': 'agent', 'ttl': 500, 'ssh': False}, 'temp': {'type': 'temporary'}, 'idle': {}}
    concurrently(*(lambda name=name: server.running(name, **wishes[name]) for name in wishes))
    in_container(docker_client, server, 'plain', 'echo kept >/workspace/plain/file')
    patch(server, 'plain', name='renamed')
    verb(server, 'idle', 'stop')
    server.wait_status('idle', 'stopped')
    before = {item['id']: server.get(f"/api/workspaces/{item['id']}")
              for item in server.get('/api/workspaces')}
    server.kill()
    harm(docker_client, server)
    server.start()
    server.until(lambda: len(server.get('/api/workspaces')) == 4)
    after = {item['id']: server.get(f"/api/workspaces/{item['id']}")
             for item in server.get('/api/workspaces')}
    assert list(after) == list(before)
    for found, was in zip(after.values(), before.values(), strict=True):
        assert kept_of(found, 'expiresAt') == kept_of(was, 'expiresAt') and found['status'] == was['status']
    assert 490 < seconds_left(server.get('/api/workspaces/agent')['expiresAt']) <= 500
    aside = list(state_path(server).parent.glob('*.damaged-*'))
    assert len(aside) == (harm is damage) and all(path.read_text().endswith('"ws-') for path in aside)
    # A new container of an adopted workspace is as the old one was.
    docker_client.api.remove_container(before[server.get('/api/workspaces/renamed')['id']]['containerId'],
                                       force=True)
    server.wait_status('renamed', 'stopped')
    verb(server, 'renamed', 'start')
    server.wait_status('renamed', 'running')
    assert in_container(docker_client, server, 'renamed',
                        'cat /workspace/plain/file; echo $KEPT').split() == ['kept', 'a=b']
    host = inspect(docker_client, server, 'renamed')['HostConfig']
    assert host['NanoCpus'] == 500_000_000 and host['Memory'] == 96 * 2**20
    settings = kept(state_path(server)).values()
    assert next(item['env'] for item in settings if item['name'] == 'renamed') == {'KEPT': 'a=b'}


def test_a_workspace_is_adopted_though_its_image_was_removed(own_templates, make_server, docker_client):
    folder, add_template = own_templates
    add_template('pruned')
    server = make_server(TEMPLATES_DIR=str(folder))
    server.running('old', template='pruned', env={'KEPT': 'yes'})
    verb(server, 'old', 'stop')
    server.wait_status('old', 'stopped')
    server.kill()
    lose_all(docker_client, server)
    docker_client.api.remove_image(inspect(docker_client, server, 'old')['Image'], force=True)
    server.start()
    assert server.wait_status('old', 'stopped')['type'] == 'persistent'


def test_what_ended_or_vanished_while_the_server_was_away_is_seen(make_server, docker_client):
    server = make_server()
    names = {'temp': 'temporary', 'agent': 'agent', 'bare': 'persistent', 'robbed': 'persistent',
             'asleep': 'persistent'}
    made = dict(zip(names,
                    concurrently(*(lambda name=name: server.running(name, type=names[name])
                                   for name in names)), strict=True))
    verb(server, 'asleep', 'stop')
    server.wait_status('asleep', 'stopped')
    server.kill()
    for name in ('temp', 'agent'):
        docker_client.api.kill(made[name]['containerId'])
    for name in ('bare', 'robbed'):
        docker_client.api.remove_container(made[name]['containerId'], force=True)
    docker_client.api.remove_volume(f"{server.instance}-{made['robbed']['id']}")
    docker_client.api.start(made['asleep']['containerId'])
    server.start()
    wait_gone(server, 'temp')
    assert not any(left_of(docker_client, server, made['temp']))
    assert '137' in server.wait_status('agent', 'stopped')['error']
    assert 'removed outside Agent Backend' in server.wait_status('bare', 'stopped')['error']
    assert 'volume' in server.wait_status('robbed', 'error')['error']
    server.wait_status('asleep', 'running')


def test_the_volume_of_a_temporary_workspace_without_container_and_record_is_removed(
        make_server, docker_client):
    server = make_server()
    workspace = server.running('temp', type='temporary')
    server.kill()
    lose_all(docker_client, server)
    docker_client.api.remove_container(workspace['containerId'], force=True)
    server.start()
    server.until(lambda: objects_of(docker_client, server.instance) == [])
    assert server.get('/api/workspaces') == []


# The engine

@pytest.mark.parametrize('number, options', [(9, []), (9, ['--live-restore']), (15, [])],
                         ids=['SIGKILL-plain', 'SIGKILL-live-restore', 'SIGTERM-plain'])
def test_the_engine_may_die_and_come_back(make_server, network, tmp_path, number, options):
    engine = OwnEngine(tmp_path, network, *options).start()
    try:
        check_engine_outage(make_server, network, engine, number, survives=bool(options))
    finally:
        engine.close()


def check_engine_outage(make_server, network, engine, number, *, survives):
    server = make_server(network=network, DOCKER_HOST=f'unix://{engine.socket}')
    types = {'kept': 'persistent', 'idle': 'persistent', 'temp': 'temporary', 'agent': 'agent',
             'unwanted': 'persistent'}
    for name, kind in types.items():
        server.create(name, type=kind)
    made = {name: server.wait_status(name, 'running') for name in types}
    verb(server, 'idle', 'stop')
    server.wait_status('idle', 'stopped')
    server.create('slow', env={'SLOW': '3'})
    server.until(lambda: engine.client.api.containers(filters={'name': f'{server.instance}-slow'}))
    engine.end(number)
    server.until(lambda: server.get('/health')['docker'] == 'disconnected', 15)
    assert server.get('/health')['status'] == 'degraded'
    assert [item['name'] for item in server.get('/api/workspaces')][:2] == ['kept', 'idle']
    for path, body in (('', {'name': 'new'}), ('/idle/start', None), ('/kept/stop', None)):
        answer = server.call('POST', f'/api/workspaces{path}', body)
        error = answer.json()
        assert (answer.status_code, error['code']) == (503, 'DOCKER_ERROR'), error
        assert 'does not answer' in error['error']
    deletion = server.call('DELETE', '/api/workspaces/unwanted')
    assert deletion.status_code == 202 and deletion.json()['data']['deleted'] is False
    time.sleep(0.5)  # so that each job has seen it
    engine.start()
    server.until(lambda: server.get('/health')['docker'] == 'connected', 20)
    wait_gone(server, 'unwanted')
    server.wait_status('slow', 'running')
    # After a SIGKILL, 20.10 takes what it ends itself for stopped on purpose, and its restart policy does
    # nothing.
    server.until(lambda: engine.client.api.inspect_container(made['kept']['containerId'])['State']['Running']
                 == (server.get('/api/workspaces/kept')['status'] == 'running'))
    if number == 9 and server.get('/api/workspaces/kept')['status'] == 'stopped':
        verb(server, 'kept', 'start')
    assert kept_of(server.wait_status('kept', 'running')) == kept_of(made['kept'])
    assert server.wait_status('idle', 'stopped')['error'] is None
    if survives:
        assert {server.wait_status(name, 'running')['containerId']
                for name in ('temp', 'agent')} == {made[name]['containerId'] for name in ('temp', 'agent')}
        time.sleep(3)
        assert server.get('/api/workspaces/temp')['status'] == 'running'
    else:
        wait_gone(server, 'temp')
        server.wait_status('agent', 'stopped')
        assert not left_of(engine.client, server, made['temp'])[1]
    verb(server, 'idle', 'start')
    server.wait_status('idle', 'running')
    server.running('new')
    remove_objects(engine.client, server.instance)


def test_a_server_that_starts_before_its_engine_finds_it_later(make_server, network, tmp_path):
    engine = OwnEngine(tmp_path, network)
    server = make_server(network=network, connected=False, DOCKER_HOST=f'unix://{engine.socket}')
    assert server.get('/health')['docker'] == 'disconnected' and server.get('/api/workspaces') == []
    answer = server.call('POST', '/api/workspaces', {'name': 'early'})
    assert answer.status_code == 503 and answer.json()['code'] == 'DOCKER_ERROR'
    engine.start()
    try:
        server.until(lambda: server.get('/health')['docker'] == 'connected', 20)
        server.running('early')
    finally:
        engine.close()


# What grows

def open_files():
    return len(os.listdir('/proc/self/fd'))


def test_workspaces_that_come_and_go_leave_no_greenlet_and_no_open_file(
        tmp_path, templates_dir, docker_client):
    instance = f'test-greenlets-{os.getpid()}'
    config = agentbackend.Config.from_env({'INSTANCE': instance, 'STATE_DIR': str(tmp_path),
                                           'TEMPLATES_DIR': str(templates_dir), 'PREBUILD': 'none'})
    backend = agentbackend.make_backend(config).open()

    def living():
        gc.collect()
        return sum(isinstance(item, greenlet.greenlet) and bool(item) for item in gc.get_objects())

    def rounds(count):
        for _ in range(count):
            made = [backend.workspaces.create({'name': f'g{number}', 'template': 'tiny'}).id
                    for number in range(5)]
            deadline = time.monotonic() + 30
            while {item.status for item in backend.state.all()} != {'running'}:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            removals = [functools.partial(backend.workspaces.remove, id, wait=20) for id in made]
            assert all(gone for _, gone in concurrently(*removals))
    try:
        while not backend.keeper.connected:
            time.sleep(0.05)
        rounds(1)
        time.sleep(1)
        before = living(), open_files()
        rounds(3)
        deadline = time.monotonic() + 5
        while living() > before[0] + 1 or open_files() > before[1] + 2:
            assert time.monotonic() < deadline, (before, living(), open_files())
            time.sleep(0.2)
    finally:
        backend.close()
        remove_objects(docker_client, instance)
