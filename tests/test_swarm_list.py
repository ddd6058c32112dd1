"""Which nodes there are, as a swarm or a plain list says."""
import contextlib
import time

import docker
import gevent
import pytest
import requests
from helpers import all_ready, nodes, refusal, verb
from machines import AWAY, NO_TLS


@pytest.fixture(scope='module')
def swarm(machines):
    machines.swarm()
    return machines


def through_swarm(serve, swarm, **settings):
    managers = ','.join(machine.address for machine in swarm.all)
    server = serve(DOCKER_HOST=f'swarm://{managers}', NODE_ENGINES='tcp://{address}:2376', **settings)
    server.until(lambda: set(nodes(server)) == {'n1', 'n2', 'n3'} and all_ready(server))
    return server


def set_node(machine, name, **changes):
    """Change a node of the swarm, as docker node update does."""
    node = next(node for node in machine.client.nodes.list() if node.attrs['Description']['Hostname'] == name)
    node.update(node.attrs['Spec'] | changes)


def test_a_swarm_names_the_nodes_and_says_which_take_something_new(serve, swarm, own_templates):
    own_templates[1]('apart')
    set_node(swarm[1], 'n1', Labels={'agentbackend': 'no'})
    set_node(swarm[1], 'n3', Labels={'disk': 'ssd', 'agentbackend.host': 'n3.example.org'})
    server = through_swarm(serve, swarm, TEMPLATES_DIR=str(own_templates[0]))
    fast = server.running('fast', template='apart', constraints={'disk': 'ssd'})
    assert {name for name, node in nodes(server).items() if 'apart' in str(node['images'])} == {'n2', 'n3'}
    set_node(swarm[1], 'n1', Labels={})
    assert fast['node'] == 'n3' and '//n3.example.org:' in fast['codeServerUrl']
    others = [server.running(kind, type=kind, node='n3') for kind in ('temporary', 'agent')]
    status, code, error = refusal(server, name='slow', constraints={'disk': 'hdd'})
    assert (status, code) == (503, 'NO_ROOM') and 'n1 is not disk=hdd' in error
    set_node(swarm[1], 'n3', Availability='drain')
    status, code, error = refusal(server, name='more', constraints={'disk': 'ssd'})
    assert (status, code) == (503, 'NO_ROOM') and 'n3 is set to drain' in error
    time.sleep(AWAY)
    verb(server, 'fast', 'restart')  # it keeps what it has
    for workspace in (fast, *others):
        found = server.wait_status(workspace['id'], 'running')
        assert (found['containerId'], found['error']) == (workspace['containerId'], None)
    set_node(swarm[1], 'n3', Availability='active')
    set_node(swarm[1], 'n2', Labels={'agentbackend': 'no'})
    status, code, error = refusal(server, name='unwanted', node='n2')
    assert (status, code) == (503, 'NO_ROOM') and 'agentbackend=no' in error
    set_node(swarm[1], 'n2', Labels={})


def has_leader(machine):
    """Return whether a manager has one."""
    with contextlib.suppress(docker.errors.APIError, requests.RequestException):
        return machine.client.api.nodes(filters={'role': 'manager'})


def test_without_its_leader_the_swarm_is_as_it_was(serve, swarm):
    server = through_swarm(serve, swarm)
    leader = next(machine for machine in swarm.all if any(
        node.attrs['Description']['Hostname'] == machine.name and node.attrs['ManagerStatus'].get('Leader')
        for node in swarm[1].client.nodes.list()))
    others = [machine for machine in swarm.all if machine is not leader]
    made = [server.running(f'on-{machine.name}', node=machine.name) for machine in swarm.all]
    leader.off()
    server.until(lambda: nodes(server)[leader.name]['state'] == 'down')
    for workspace, machine in zip(made, swarm.all, strict=True):
        verb(server, workspace['id'], 'restart', 503 if machine is leader else 202)
    begun = time.monotonic()
    assert server.running('meanwhile')['node'] in [machine.name for machine in others]
    assert time.monotonic() - begun < 15, 'it waited for a new leader'
    # One of three managers is too few.
    last, gone = others
    gone.off()
    server.until(lambda: 'No manager names the nodes' in str(server.get('/health')['problems']), 60)
    assert {name: node['state'] for name, node in nodes(server).items()} == {
        leader.name: 'down', gone.name: 'down', last.name: 'ready'}
    living = f'on-{last.name}'
    said = server.call('GET', f'/api/workspaces/{living}/logs')
    assert said.text.startswith('workspace: started in tiny\n')
    verb(server, living, 'restart')
    server.wait_status(living, 'running')
    begun = time.monotonic()
    assert server.running('alone')['node'] == last.name
    assert time.monotonic() - begun < 15, 'it waited for a manager'
    assert refusal(server, name='away', node=gone.name)[:2] == (503, 'NO_ROOM')
    gevent.joinall([gevent.spawn(machine.start) for machine in (leader, gone)], raise_error=True)
    server.until(lambda: has_leader(last), 60)
    begun = time.monotonic()
    server.until(lambda: all_ready(server) and not server.get('/health').get('problems'))
    again = [server.create(f'again-{machine.name}', node=machine.name) for machine in swarm.all]
    assert time.monotonic() - begun < 10
    for workspace in again:
        server.wait_status(workspace['id'], 'running')
    for workspace in made:
        if server.get(f"/api/workspaces/{workspace['id']}")['status'] == 'stopped':
            verb(server, workspace['id'], 'start')
        server.wait_status(workspace['id'], 'running')
    assert 'Traceback' not in server.log.read_text()


def test_a_manager_that_is_none_is_told(serve):
    server = serve(DOCKER_HOST='swarm:///var/run/docker.sock', connected=False)
    [problem] = server.until(lambda: server.get('/health')['problems'])
    assert 'is no manager of a swarm' in problem and server.get('/health')['docker'] == 'disconnected'
    assert server.get('/api/nodes') == []


def test_a_swarm_without_a_leader_is_told_at_the_start_and_waited_for(serve, swarm, make_relay):
    # One that has lost most of its managers takes a minute to come back: only its words are real here.
    relay = make_relay(swarm[1], '127.0.0.2')
    relay.refused['nodes'] = 'The swarm does not have a leader. Make sure more than half are online.'
    server = serve(network=None, connected=False, DOCKER_HOST=f'swarm://{relay.url},{relay.url}',
                   NODE_ENGINES=f'unix://{swarm.folder}/{{name}}/docker.sock', **NO_TLS)
    [problem] = server.until(lambda: server.get('/health')['problems'])
    assert problem == f'No manager names the nodes of the swarm: {relay.refused["nodes"]}'
    assert server.get('/health')['docker'] == 'disconnected' and server.get('/api/nodes') == []
    for wish in ({}, {'node': 'n1'}):
        status, code, error = refusal(server, name='early', **wish)
        assert (status, code) == (503, 'DOCKER_ERROR') and 'does not have a leader' in error
    relay.refused.clear()
    server.until(lambda: set(nodes(server)) == {'n1', 'n2', 'n3'} and all_ready(server))
    server.until(lambda: server.get('/health')['docker'] == 'connected')
    assert server.get('/health')['problems'] == []


def test_an_engine_that_is_listed_twice_and_one_without_our_certificate_are_states_of_that_node(
        serve, machines):
    urls = f'{machines[1].url},{machines[1].socket},tcp://{machines[2].address}:2377,{machines[3].url}'
    server = serve(DOCKER_HOST=urls)
    found = nodes(server)
    states = [node['state'] for node in found.values()]
    assert sorted(states) == ['down', 'down', 'ready', 'ready'] and len(found) == 4
    errors = ' '.join(node['error'] or '' for node in found.values())
    assert 'It is the same engine as that of node' in errors and ':2377' in errors
    server.running('anyway')
