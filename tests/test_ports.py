"""Ports, with other programs, other servers and fifty workspaces that all want them at once."""
import contextlib
import json
import socket
import time

import pytest
from conftest import concurrently, objects_of
from test_lifecycle import CLONE_FAILS, delete, in_container, inspect, verb

FIFTY = 240  # seconds, on two cores


def ranges(first, count, *, ssh=None):
    """Return settings with `count` ports of each kind, beginning at `first`."""
    return {'CODE_SERVER_PORTS': f'{first}-{first + count - 1}', 'SSH_PORTS': f'{first + 200}-{first + 199 + (ssh or count)}',
            'CUSTOM_PORTS': f'{first + 400}-{first + 399 + count}'}


@contextlib.contextmanager
def listening(*ports, host='127.0.0.1'):
    """A program that is none of ours, on these ports."""
    with contextlib.ExitStack() as stack:
        for port in ports:
            stack.enter_context(socket.create_server((host, port)))
        yield


def used(server):
    return {kind: count['used'] for kind, count in server.get('/health')['ports'].items()}


def test_fifty_creates_at_once_get_ports_of_their_own_or_are_told_that_there_are_none(make_server, docker_client):
    server = make_server(**ranges(20000, 47, ssh=60))
    server.running('warm')  # the image is there
    delete(server, 'warm')
    begun = time.monotonic()
    answers = concurrently(*(lambda number=number: server.call('POST', '/api/workspaces', {'name': f'many-{number}', 'ports': [3000]})
                             for number in range(50)))
    made = [answer.json()['data'] for answer in answers if answer.status_code == 201]
    refused = [answer.json() for answer in answers if answer.status_code != 201]
    assert len(made) == 47 and len(refused) == 3
    for answer in refused:
        assert answer['code'] == 'PORT_EXHAUSTED' and 'CODE_SERVER_PORTS=20000-20046' in answer['error'], answer
    assert used(server) == {'codeServer': 47, 'ssh': 47, 'custom': 47}
    answered = time.monotonic()
    server.until(lambda: [item['status'] for item in server.get('/api/workspaces')] == ['running'] * 47, FIFTY)
    ran = time.monotonic()
    found = server.get('/api/workspaces')
    ports = [port for item in found for port in (item['codeServerPort'], item['sshPort'], item['ports']['3000'])]
    assert len(set(ports)) == 3 * 47
    assert sorted(item['codeServerPort'] for item in found) == list(range(20000, 20047))
    answers = concurrently(*(lambda item=item: server.call('DELETE', f"/api/workspaces/{item['id']}").status_code for item in made))
    assert set(answers) <= {200, 202}
    server.until(lambda: server.get('/api/workspaces') == [], 60)
    print(f'fifty at once: answered after {answered - begun:.1f} s, 47 ran after {ran - begun:.1f} s, deleted in {time.monotonic() - ran:.1f} s')
    assert objects_of(docker_client, server.instance) == [] and used(server) == {'codeServer': 0, 'ssh': 0, 'custom': 0}


def test_an_exhausted_range_is_named_and_nothing_stays_reserved(make_server):
    server = make_server(**ranges(20000, 3, ssh=1))
    server.create('first')
    answer = server.call('POST', '/api/workspaces', {'name': 'second'})
    assert answer.status_code == 503 and answer.json()['code'] == 'PORT_EXHAUSTED' and 'SSH_PORTS=20200-20200' in answer.json()['error']
    assert used(server) == {'codeServer': 1, 'ssh': 1, 'custom': 0}
    answer = server.call('POST', '/api/workspaces', {'name': 'second', 'ssh': False, 'ports': [1, 2, 3, 4]})
    assert answer.status_code == 503 and 'CUSTOM_PORTS=20400-20402' in answer.json()['error']
    assert used(server) == {'codeServer': 1, 'ssh': 1, 'custom': 0}
    server.create('second', ssh=False)


def test_ports_on_which_others_listen_are_passed_over(make_server):
    server = make_server(**ranges(20000, 5))
    with listening(20000, 20200), listening(20001, host='0.0.0.0'):
        workspace = server.running('polite')
    assert workspace['codeServerPort'] == 20002 and workspace['sshPort'] == 20201
    assert 'already in use' not in server.log.read_text()  # it looked, and did not run into them


def test_a_port_that_was_taken_after_its_reservation_is_changed_for_the_next(own_templates, make_server, docker_client):
    folder, add_template = own_templates
    add_template('slow', 'RUN ["/bin/sleep", "2"]')
    server = make_server(**ranges(20000, 6), TEMPLATES_DIR=str(folder))
    created = server.create('late', template='slow', ports=[3000])
    assert [created['codeServerPort'], created['sshPort'], created['ports']] == [20000, 20200, {'3000': 20400}]
    with listening(20000, 20001, 20200):
        workspace = server.wait_status('late', 'running')
    assert [workspace['codeServerPort'], workspace['sshPort'], workspace['ports']] == [20002, 20201, {'3000': 20400}]
    found = inspect(docker_client, server, 'late')
    assert json.loads(found['Config']['Labels']['agentbackend.ports']) == {'codeServer': 20002, 'ssh': 20201, '3000': 20400}
    assert used(server) == {'codeServer': 1, 'ssh': 1, 'custom': 1}


def test_five_ports_are_tried_and_no_more(make_server, network, docker_client):
    # The server can't see who listens here, as it can't where the engine is on another machine.
    server = make_server(network=network, **ranges(20000, 9))
    with listening(20000, 20001, 20002, 20003, 20004):
        server.create('unlucky', ssh=False)
        failed = server.wait_status('unlucky', 'error')
    assert 'address already in use' in failed['error'] and failed['codeServerPort'] is None
    assert objects_of(docker_client, server.instance) == [] and used(server) == {'codeServer': 0, 'ssh': 0, 'custom': 0}
    delete(server, 'unlucky')
    with listening(20000, 20001, 20002, 20003):
        server.create('luckier', ssh=False)
        server.until(lambda: server.get('/api/workspaces/luckier')['containerId'])
        assert inspect(docker_client, server, 'luckier')['NetworkSettings']['Ports']['8443/tcp'][0]['HostPort'] == '20004'
    delete(server, 'luckier')


def test_ports_of_another_servers_stopped_workspace_are_not_taken(make_server):
    one, two = make_server(**ranges(20000, 4)), make_server(**ranges(20000, 4))
    first = one.running('sleeper')
    verb(one, 'sleeper', 'stop')
    one.wait_status('sleeper', 'stopped')
    second = two.running('neighbour')
    assert (first['codeServerPort'], first['sshPort']) == (20000, 20200) and (second['codeServerPort'], second['sshPort']) == (20001, 20201)
    verb(one, 'sleeper', 'start')
    assert one.wait_status('sleeper', 'running')['codeServerPort'] == 20000


def test_two_servers_that_create_at_once_neither_collide_nor_see_each_other(make_server):
    servers = [make_server(**ranges(20000, 30)) for _ in range(2)]
    for server in servers:
        server.running('warm')
    names = [f'same-{number}' for number in range(8)]
    concurrently(*(lambda server=server, name=name: server.running(name) for name in names for server in servers))
    found = [server.get('/api/workspaces') for server in servers]
    assert [sorted(item['name'] for item in items) for items in found] == [[*names, 'warm']] * 2
    ports = [port for items in found for item in items for port in (item['codeServerPort'], item['sshPort'])]
    assert len(set(ports)) == len(ports) == 36
    assert servers[1].call('GET', f"/api/workspaces/{found[0][0]['id']}").status_code == 404
    concurrently(*(lambda item=item: delete(servers[0], item['id']) for item in found[0]))
    assert servers[0].get('/api/workspaces') == [] and {item['status'] for item in servers[1].get('/api/workspaces')} == {'running'}


@pytest.mark.parametrize('env', [CLONE_FAILS, {'CRASH': '1'}], ids=['clone', 'crash'])
def test_ports_are_free_again_after_a_failed_create(make_server, env):
    server = make_server(**ranges(20000, 1))
    server.create('failed', env=env, ports=[3000])
    server.wait_status('failed', 'error')
    assert used(server) == {'codeServer': 0, 'ssh': 0, 'custom': 0}
    assert server.running('next', ports=[3000])['ports'] == {'3000': 20400}


def test_a_stopped_workspace_whose_port_was_taken_starts_when_it_is_free_again(make_server, docker_client):
    server = make_server(**ranges(20000, 4))
    before = server.running('patient')
    in_container(docker_client, server, 'patient', 'echo kept >/workspace/patient/file')
    verb(server, 'patient', 'stop')
    server.wait_status('patient', 'stopped')
    with listening(20000):
        verb(server, 'patient', 'start')
        failed = server.wait_status('patient', 'error')
        assert '20000' in failed['error'] and 'address already in use' in failed['error']
        assert failed['codeServerPort'] == 20000 and len(objects_of(docker_client, server.instance)) == 2
        verb(server, 'patient', 'start')  # still taken
        time.sleep(0.5)
        server.wait_status('patient', 'error')
    verb(server, 'patient', 'start')
    after = server.wait_status('patient', 'running')
    assert after['error'] is None and after['containerId'] == before['containerId'] and after['codeServerPort'] == 20000
    assert in_container(docker_client, server, 'patient', 'cat /workspace/patient/file') == 'kept'
