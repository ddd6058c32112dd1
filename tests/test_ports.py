"""Ports, with other programs, other servers and thirty workspaces that all want them at once."""
import contextlib
import functools
import json
import random
import socket
import time

import pytest
from conftest import concurrently, objects_of
from helpers import CLONE_FAILS, delete, in_container, inspect, verb

THIRTY = 150  # seconds, on two cores


def free_base():
    """Return the first of 600 ports on which nobody listens, so that the tests of several people don't
    meet."""
    while True:
        base = random.randrange(12000, 32000, 600)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(base, base + 600):
                stack.enter_context(socket.create_server(('0.0.0.0', port)))
            return base


EDITOR = free_base()
SSH, CUSTOM = EDITOR + 200, EDITOR + 400


def ranges(count, *, ssh=None):
    """Return settings with `count` ports of each kind."""
    return {'CODE_SERVER_PORTS': f'{EDITOR}-{EDITOR + count - 1}',
            'SSH_PORTS': f'{SSH}-{SSH + (ssh or count) - 1}',
            'CUSTOM_PORTS': f'{CUSTOM}-{CUSTOM + count - 1}'}


@contextlib.contextmanager
def listening(*ports, host='127.0.0.1'):
    """A program that is none of ours, on these ports."""
    with contextlib.ExitStack() as stack:
        for port in ports:
            stack.enter_context(socket.create_server((host, port)))
        yield


def used(server):
    return {kind: count['used'] for kind, count in server.get('/health')['ports'].items()}


def ports_of(workspace):
    return workspace['codeServerPort'], workspace['sshPort'], workspace['ports']


def test_thirty_creates_at_once_get_ports_of_their_own_or_are_told_that_there_are_none(
        make_server, docker_client):
    server = make_server(**ranges(27, ssh=40))
    server.running('warm')  # the image is there
    delete(server, 'warm')
    begun = time.monotonic()

    def create(number):
        return server.call('POST', '/api/workspaces', {'name': f'many-{number}', 'ports': [3000]})
    answers = concurrently(*(functools.partial(create, number) for number in range(30)))
    made = [answer.json()['data'] for answer in answers if answer.status_code == 201]
    refused = [answer.json() for answer in answers if answer.status_code != 201]
    assert len(made) == 27 and len(refused) == 3
    for error in refused:
        assert error['code'] == 'PORT_EXHAUSTED', error
        assert f'CODE_SERVER_PORTS={EDITOR}-{EDITOR + 26}' in error['error']
    assert used(server) == {'codeServer': 27, 'ssh': 27, 'custom': 27}
    answered = time.monotonic()
    server.until(lambda: [item['status'] for item in server.get('/api/workspaces')] == ['running'] * 27,
                 THIRTY)
    ran = time.monotonic()
    found = server.get('/api/workspaces')
    ports = [port for item in found
             for port in (item['codeServerPort'], item['sshPort'], item['ports']['3000'])]
    assert len(set(ports)) == 3 * 27
    assert sorted(item['codeServerPort'] for item in found) == list(range(EDITOR, EDITOR + 27))
    paths = [f"/api/workspaces/{item['id']}" for item in made]
    answers = concurrently(*(functools.partial(server.call, 'DELETE', path) for path in paths))
    statuses = {answer.status_code for answer in answers}
    assert statuses <= {200, 202}  # 202 where it took longer than a call may wait
    server.until(lambda: server.get('/api/workspaces') == [], 60)
    print(f'thirty at once: answered after {answered - begun:.1f} s, 27 ran after {ran - begun:.1f} s, '
          f'deleted in {time.monotonic() - ran:.1f} s')
    assert objects_of(docker_client, server.instance) == []
    assert used(server) == {'codeServer': 0, 'ssh': 0, 'custom': 0}


def test_an_exhausted_range_is_named_and_nothing_stays_reserved(make_server):
    server = make_server(**ranges(3, ssh=1))
    server.create('first')
    answer = server.call('POST', '/api/workspaces', {'name': 'second'})
    assert answer.status_code == 503 and answer.json()['code'] == 'PORT_EXHAUSTED'
    assert f'SSH_PORTS={SSH}-{SSH}' in answer.json()['error']
    assert used(server) == {'codeServer': 1, 'ssh': 1, 'custom': 0}
    answer = server.call('POST', '/api/workspaces', {'name': 'second', 'ssh': False, 'ports': [1, 2, 3, 4]})
    assert answer.status_code == 503 and f'CUSTOM_PORTS={CUSTOM}-{CUSTOM + 2}' in answer.json()['error']
    assert used(server) == {'codeServer': 1, 'ssh': 1, 'custom': 0}
    server.create('second', ssh=False)


def test_ports_on_which_others_listen_are_passed_over(make_server):
    server = make_server(**ranges(5))
    with listening(EDITOR, SSH), listening(EDITOR + 1, host='0.0.0.0'):
        workspace = server.running('polite')
    assert workspace['codeServerPort'] == EDITOR + 2 and workspace['sshPort'] == SSH + 1
    assert 'already in use' not in server.log.read_text()  # it looked, and did not run into them


def test_a_port_that_was_taken_after_its_reservation_is_changed_for_the_next(
        own_templates, make_server, docker_client):
    folder, add_template = own_templates
    add_template('slow', 'RUN ["/bin/sleep", "2"]')
    server = make_server(**ranges(6), TEMPLATES_DIR=str(folder))
    created = server.create('late', template='slow', ports=[3000])
    assert ports_of(created) == (EDITOR, SSH, {'3000': CUSTOM})
    with listening(EDITOR, EDITOR + 1, SSH):
        workspace = server.wait_status('late', 'running')
    assert ports_of(workspace) == (EDITOR + 2, SSH + 1, {'3000': CUSTOM})
    labels = inspect(docker_client, server, 'late')['Config']['Labels']
    ports = {'codeServer': EDITOR + 2, 'ssh': SSH + 1, '3000': CUSTOM}
    assert json.loads(labels['agentbackend.ports']) == ports
    assert used(server) == {'codeServer': 1, 'ssh': 1, 'custom': 1}


def test_five_ports_are_tried_and_no_more(make_server, network, docker_client):
    # The server can't see who listens here, as it can't where the engine is on another machine.
    server = make_server(network=network, **ranges(9))
    with listening(EDITOR, EDITOR + 1, EDITOR + 2, EDITOR + 3, EDITOR + 4):
        server.create('unlucky', ssh=False)
        failed = server.wait_status('unlucky', 'error')
    assert 'address already in use' in failed['error'] and failed['codeServerPort'] is None
    assert objects_of(docker_client, server.instance) == []
    assert used(server) == {'codeServer': 0, 'ssh': 0, 'custom': 0}
    delete(server, 'unlucky')
    with listening(EDITOR, EDITOR + 1, EDITOR + 2, EDITOR + 3):
        server.create('luckier', ssh=False)
        server.until(lambda: server.get('/api/workspaces/luckier')['containerId'])
        published = inspect(docker_client, server, 'luckier')['NetworkSettings']['Ports']
        assert published['8443/tcp'][0]['HostPort'] == str(EDITOR + 4)
    delete(server, 'luckier')


def test_ports_of_another_servers_stopped_workspace_are_not_taken(make_server):
    one, two = make_server(**ranges(4)), make_server(**ranges(4))
    first = one.running('sleeper')
    verb(one, 'sleeper', 'stop')
    one.wait_status('sleeper', 'stopped')
    second = two.running('neighbour')
    assert not {*ports_of(first)[:2]} & {*ports_of(second)[:2]}
    verb(one, 'sleeper', 'start')
    assert ports_of(one.wait_status('sleeper', 'running')) == ports_of(first)


def test_two_servers_that_create_at_once_neither_collide_nor_see_each_other(make_server):
    servers = [make_server(**ranges(30)) for _ in range(2)]
    for server in servers:
        server.running('warm')
    names = [f'same-{number}' for number in range(8)]
    concurrently(*(lambda server=server, name=name: server.running(name) for name in names
                   for server in servers))
    found = [server.get('/api/workspaces') for server in servers]
    assert [sorted(item['name'] for item in items) for items in found] == [[*names, 'warm']] * 2
    ports = [port for items in found for item in items for port in (item['codeServerPort'], item['sshPort'])]
    assert len(set(ports)) == len(ports) == 36
    assert servers[1].call('GET', f"/api/workspaces/{found[0][0]['id']}").status_code == 404
    concurrently(*(lambda item=item: delete(servers[0], item['id']) for item in found[0]))
    assert servers[0].get('/api/workspaces') == []
    assert {item['status'] for item in servers[1].get('/api/workspaces')} == {'running'}


@pytest.mark.parametrize('env', [CLONE_FAILS, {'CRASH': '1'}], ids=['clone', 'crash'])
def test_ports_are_free_again_after_a_failed_create(make_server, env):
    server = make_server(**ranges(1))
    server.create('failed', env=env, ports=[3000])
    server.wait_status('failed', 'error')
    assert used(server) == {'codeServer': 0, 'ssh': 0, 'custom': 0}
    assert server.running('next', ports=[3000])['ports'] == {'3000': CUSTOM}


def test_a_stopped_workspace_whose_port_was_taken_starts_when_it_is_free_again(make_server, docker_client):
    server = make_server(**ranges(4))
    before = server.running('patient')
    in_container(docker_client, server, 'patient', 'echo kept >/workspace/patient/file')
    verb(server, 'patient', 'stop')
    server.wait_status('patient', 'stopped')
    with listening(EDITOR):
        verb(server, 'patient', 'start')
        failed = server.wait_status('patient', 'error')
        assert str(EDITOR) in failed['error'] and 'address already in use' in failed['error']
        assert failed['codeServerPort'] == EDITOR and len(objects_of(docker_client, server.instance)) == 3
        verb(server, 'patient', 'start')  # still taken
        time.sleep(0.5)
        server.wait_status('patient', 'error')
    verb(server, 'patient', 'start')
    after = server.wait_status('patient', 'running')
    assert after['error'] is None and after['containerId'] == before['containerId']
    assert after['codeServerPort'] == EDITOR
    assert in_container(docker_client, server, 'patient', 'cat /workspace/patient/file') == 'kept'
