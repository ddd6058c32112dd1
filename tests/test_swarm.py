"""Workspaces on three machines, of which one may be cut off, crash, or lose its power."""
import base64
import collections
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import gevent
import pytest
from agents import begin, ended, transcript
from browsing import open_dashboard
from conftest import objects_of
from helpers import all_ready, delete, make_certificates, nodes, refusal, verb, wait_gone
from machines import AWAY, NO_TLS, REGISTRY, SSHD, Machines, Registry, make_ssh
from playwright.sync_api import expect
from streaming import Sse, receive, send

from _agentbackend.dockerclient import DockerClient
from _agentbackend.errors import EngineUnavailable

LOSSES = {'cut': lambda machine: machine.link('down'), 'crash': lambda machine: machine.crash(),
          'off': lambda machine: machine.off()}
# A program that is none of ours, on a port.
LISTEN = ("import socket, sys, time; taken = socket.create_server((sys.argv[1], int(sys.argv[2]))); "
          "print('there', flush=True); time.sleep(60)")


@pytest.fixture(scope='module')
def machines(tmp_path_factory):
    trusting = ['--insecure-registry', REGISTRY]  # n3 does not
    made = Machines(tmp_path_factory.mktemp('machines'), 3, n1=trusting, n2=trusting)
    yield made
    made.close()


def create_at_once(server, *bodies):
    """Ask for workspaces all at once, and return their objects or errors."""
    calls = [send(server, 'POST', '/api/workspaces', body) for body in bodies]
    return [answer.get('data', answer) for _, answer in map(receive, calls)]


def test_six_at_once_are_two_on_each(serve, machines):
    server = serve()
    server.until(lambda: all_ready(server))
    create_at_once(server, *({'name': f'w{number}', 'ports': [3000]} for number in range(6)))
    made = [server.wait_status(f'w{number}', 'running') for number in range(6)]
    assert collections.Counter(item['node'] for item in made) == dict.fromkeys(nodes(server), 2)
    assert len({port for item in made for port in (item['codeServerPort'], item['sshPort'],
                                                   *item['ports'].values())}) == 18
    for item in made:
        machine = next(one for one in machines.all if one.address == item['node'])
        assert f"//{machine.address}:{item['codeServerPort']}/" in item['codeServerUrl']
        assert item['sshCommand'].endswith(f'dev@{machine.address}')
        container = machine.client.api.inspect_container(item['containerId'])
        bound = container['HostConfig']['PortBindings']['8443/tcp'][0]
        assert bound == {'HostIp': machine.address, 'HostPort': str(item['codeServerPort'])}
        assert server.until(lambda item=item: server.get(f"/api/workspaces/{item['id']}")['resources'])
        assert server.call('GET', f"/api/workspaces/{item['id']}/logs").text == 'workspace: started in tiny\n'
    for node in nodes(server).values():
        assert node['workspaces'] == 2 and node['memory']['promised'] == 2 * 4 * 2**30
        assert [name.partition(':')[0] for name in node['images']] == ['agentbackend/tiny']
    assert server.get('/health')['nodes'] == {'total': 3, 'ready': 3}
    for item in made:
        delete(server, item['id'])
    assert [objects_of(machine.client, server.instance) for machine in machines.all] == [[]] * 3
    assert not any(machine.client.api.networks(filters={'label': f'agentbackend.instance={server.instance}'})
                   for machine in machines.all)


def test_a_node_is_chosen_by_name_and_by_room(serve, machines):
    server = serve()
    server.until(lambda: all_ready(server))
    first, second, third = (machine.address for machine in machines.all)
    assert server.create('there', node=second)['node'] == second
    assert server.create('beside')['node'] == first
    total = nodes(server)[first]['memory']['total']
    assert server.create('large', memory=total // 2)['node'] == third
    status, code, error = refusal(server, name='huge', memory=total)
    assert (status, code) == (503, 'NO_ROOM'), error
    assert error.count('GB of memory that are not promised') == 3
    assert refusal(server, name='lost', node='n9')[:2] == (400, 'VALIDATION_ERROR')
    status, code, error = refusal(server, name='lost', constraints={'disk': 'ssd'})
    assert (status, code) == (400, 'VALIDATION_ERROR') and '"disk"' in error
    assert refusal(server, name='there', node=third)[:2] == (409, 'WORKSPACE_ALREADY_EXISTS')


def read(stream, field, found):
    """Take a field of the events, of those of type status the error, until the workspace is gone."""
    for event in stream:
        if event['data'].get('deleted'):
            return
        if field == 'message' or event['type'] == 'status':
            found.append(event['data'].get(field, ''))


@pytest.mark.parametrize('loss', LOSSES)
def test_a_node_is_lost_and_comes_back(serve, machines, loss):
    server = serve()
    server.until(lambda: all_ready(server))
    types = {'kept': 'persistent', 'idle': 'persistent', 'temp': 'temporary', 'agent': 'agent',
             'doomed': 'persistent'}
    lost, other = machines[2], machines[1]
    for name, kind in types.items():
        server.create(name, type=kind, node=lost.address)
    server.create('near', node=other.address, env={'PRINT': 'n=0; while :; do echo line $n; n=$((n+1)); '
                                                   'sleep 0.2; done & n='})
    made = {name: server.wait_status(name, 'running') for name in (*types, 'near')}
    verb(server, 'idle', 'stop')
    server.wait_status('idle', 'stopped')
    with Sse(server, '/api/workspaces/near/events', timeout=30 + AWAY) as near, \
            Sse(server, '/api/workspaces/kept/events', timeout=30 + AWAY) as kept:
        said, statuses = [], []
        reading = [gevent.spawn(read, near, 'message', said), gevent.spawn(read, kept, 'error', statuses)]
        server.until(lambda: statuses and any(text.startswith('line') for text in said))
        time.sleep(0.5)  # both have what was there before
        LOSSES[loss](lost)
        begun = time.monotonic()
        server.until(lambda: nodes(server)[lost.address]['state'] == 'down')
        assert time.monotonic() - begun < 10
        check_lost(server, made, lost)
        server.until(lambda: [text.partition(' since ')[0] for text in statuses] == [
            '', f'Node {lost.address} does not answer'])
        time.sleep(max(0, begun + AWAY - time.monotonic()))
        machines[2].link('up')
        machines[2].start()
        server.until(lambda: all_ready(server))
        server.until(lambda: statuses[-1] == '')
        check_back(server, made, lost, loss)
        near.cut()
        kept.cut()
        gevent.joinall(reading)  # a file that is read is not to be closed
    lines = [text for text in said if text.startswith('line')]
    first = int(lines[0].split()[1])
    assert lines == [f'line {first + at}' for at in range(len(lines))] and len(lines) > 10


def check_lost(server, made, lost):
    """Everything is as it was, and told; what is elsewhere goes on, and new ones come there."""
    for name in ('kept', 'idle', 'temp', 'agent'):
        found = server.get(f'/api/workspaces/{name}')
        assert found['status'] == ('stopped' if name == 'idle' else 'running')
        assert f'Node {lost.address} does not answer since' in found['error']
        begun = time.monotonic()
        for action in ('stop', 'restart', 'start'):
            error = verb(server, name, action, 503)
            assert error['code'] == 'DOCKER_ERROR' and 'does not answer' in error['error']
        answer = server.call('POST', f'/api/workspaces/{name}/exec', {'command': 'true'})
        assert answer.status_code in (503, 409), answer.text
        assert time.monotonic() - begun < 5
    deletion = server.call('DELETE', '/api/workspaces/doomed').json()['data']
    assert deletion['deleted'] is False and deletion['status'] == 'deleting'
    assert refusal(server, name='doomed')[:2] == refusal(server, name='kept')[:2] == (
        409, 'WORKSPACE_ALREADY_EXISTS')
    status, code, error = refusal(server, name='elsewhere', node=lost.address)
    assert (status, code) == (503, 'NO_ROOM') and 'does not answer' in error
    assert server.running('new')['node'] != lost.address
    verb(server, 'new', 'stop')
    server.wait_status('new', 'stopped')
    health = server.get('/health')
    assert health['docker'] == 'connected' and health['nodes'] == {'total': 3, 'ready': 2}
    assert any(lost.address in problem for problem in health['problems'])


def check_back(server, made, lost, loss):
    """What lived is taken up again, what ended is told so, what was deleted is gone."""
    wait_gone(server, 'doomed')
    assert server.wait_status('idle', 'stopped')['error'] is None
    if loss == 'cut':
        for name in ('kept', 'temp', 'agent'):
            found = server.wait_status(name, 'running')
            assert found['containerId'] == made[name]['containerId'] and found['error'] is None
    else:
        wait_gone(server, 'temp')
        server.wait_status('agent', 'stopped')
        container = made['kept']['containerId']
        server.until(lambda: lost.client.api.inspect_container(container)['State']['Running']
                     == (server.get('/api/workspaces/kept')['status'] == 'running'))
    for name in ('kept', 'idle'):
        if server.get(f'/api/workspaces/{name}')['status'] != 'running':
            verb(server, name, 'start')
        assert server.wait_status(name, 'running')['codeServerPort'] == made[name]['codeServerPort']
    for item in server.get('/api/workspaces'):
        assert item['name'] in made or item['name'] == 'new'
        delete(server, item['id'])
    assert objects_of(lost.client, server.instance) == []


# What is wrong with a node

def test_what_keeps_certificates_from_fitting_is_told(serve, machines, tmp_path):
    ours, others = machines.keys, make_certificates(tmp_path / 'others')
    mixed, lame = tmp_path / 'mixed', tmp_path / 'lame'
    shutil.copytree(others, mixed)
    shutil.copy(ours / 'ca.pem', mixed)
    shutil.copytree(ours, lame)
    (lame / 'key.pem').write_text('none')
    url, socket_of = machines[1].url, f'unix://{machines[1].folder}/docker.sock'
    for address, folder, words in (
            (url, others, r'certificate verify failed.*See that ca\.pem in DOCKER_CERT_PATH'),
            (url, mixed, r'does not take cert\.pem in DOCKER_CERT_PATH'),
            (url, lame, r'DOCKER_CERT_PATH has to be a folder with ca\.pem, cert\.pem and key\.pem'),
            (url, tmp_path, r'DOCKER_CERT_PATH has to be a folder'),
            (url, '', r'sent an HTTP request to an HTTPS server.*set DOCKER_TLS_VERIFY=1')):
        client = DockerClient(host=address, tls_verify='1' if folder else '', cert_path=str(folder))
        with machines.lan.entered(), pytest.raises(EngineUnavailable, match=words):
            client.ping()
        client.close()
    # With another authority's, whoever needs none goes on.
    server = serve(DOCKER_HOST=f'{socket_of},{machines[2].url}', DOCKER_CERT_PATH=str(others))
    error = nodes(server)[machines[2].address]['error']
    assert f'Node {machines[2].address} does not answer since' in error and 'verify failed' in error
    assert server.create('anyway')['node'] == 'local'


def test_an_engine_that_is_too_old_and_one_of_another_platform_are_states_of_that_node(serve, machines,
                                                                                     make_relay):
    # There are none of those here: what another one says of itself is altered on its way.
    old, other = make_relay(machines[3], '127.0.0.2'), make_relay(machines[3], '127.0.0.3')
    old.changes[b'"ApiVersion":"1.41"'] = b'"ApiVersion":"1.40"'
    other.changes[b'"Architecture":"x86_64"'] = b'"Architecture":"armv7l"'
    server = serve(network=None, **NO_TLS, DOCKER_HOST=','.join(
        [machines[1].socket, machines[2].socket, old.url, other.url]))
    server.until(lambda: [node['state'] for node in nodes(server).values()].count('ready') == 3)
    error = nodes(server)['127.0.0.2']['error']
    assert f'Docker at {old.url} is too old: its API is 1.40, and 1.41 is needed' in error
    status, code, error = refusal(server, name='there', node='127.0.0.3')
    assert (status, code) == (503, 'NO_ROOM') and '127.0.0.3 runs linux/armv7l, not linux/x86_64' in error
    assert server.create('here')['node'] in ('local', machines[2].socket.partition('://')[2])
    del old.changes[b'"ApiVersion":"1.41"']  # it was updated
    server.until(lambda: 'It is the same engine' in nodes(server)['127.0.0.2']['error'])


def test_the_dashboard_names_the_node(serve, machines, make_page):
    # A browser reaches no other network, and what is on those machines is not ready for one here.
    server = serve(network=None, DOCKER_HOST=f'{machines[1].socket},{machines[2].socket}',
                   WORKSPACE_BIND_ADDRESS='127.0.0.1')
    workspace = server.create('shown', node='local')
    page = make_page()
    open_dashboard(page, server, f"#/w/{workspace['id']}")
    expect(page.locator('#workspaces .about')).to_contain_text(' · local')
    expect(page.locator('#facts')).to_contain_text('Nodelocal')


# Images by way of a registry

@pytest.fixture
def make_registry(machines, tmp_path):
    made = []

    def make(**settings):
        (tmp_path / 'registry').mkdir()
        made.append(Registry(tmp_path / 'registry', machines.lan, REGISTRY, **settings))
        return made[-1]
    yield make
    for registry in made:
        registry.close()


def names_of(machine):
    """Return all names that images have on a machine, {id: names}."""
    return {image['Id']: (image['RepoTags'] or []) + (image['RepoDigests'] or [])
            for image in machine.client.api.images()}


def test_layers_that_are_there_are_not_sent_again(serve, machines, make_registry, own_templates):
    registry, (folder, add) = make_registry(), own_templates
    add('one')
    add('two', 'COPY entry /two')
    first, second, third = machines.all
    server = serve(TEMPLATES_DIR=str(folder), REGISTRY=f'{REGISTRY}/dev')
    server.until(lambda: all_ready(server))
    sent = []
    for name in ('one', 'two'):
        item = server.create(name, template=name, node=second.address)
        said = build_output(server, item)
        assert f'by way of {REGISTRY}/dev' in said and ' MB so far' in said
        tag = server.get('/health')['templates'][name]['image']
        image = first.client.api.inspect_image(tag)
        assert names_of(second)[image['Id']] == names_of(first)[image['Id']] == [tag]
        sent.append((len(image['RootFS']['Layers']), registry.count('GET', '/blobs/', asked_by=second),
                     registry.count('PUT', '/blobs/', asked_by=first)))
    (layers, got, put), (more, got_more, put_more) = sent
    assert more == layers + 1 > 2 and got == put == layers + 1  # the last is the configuration
    assert got_more == got + 2 and put_more == put + 2
    # A node that does not trust it gets the whole image, and says so until it is seen to.
    item = server.create('whole', template='two', node=third.address)
    said = build_output(server, item)
    error = nodes(server)[third.address]['error']
    assert error in said and error in server.get('/health')['problems']
    assert f'Node {third.address} can not pull an image from REGISTRY={REGISTRY}/dev' in error
    assert f'name {REGISTRY} in "insecure-registries" of /etc/docker/daemon.json on {third.address}' in error
    assert names_of(third)[image['Id']] == [tag]
    assert [node['error'] for node in nodes(server).values()].count(None) == 2
    assert nodes(server)[third.address]['state'] == 'ready'


def build_output(server, workspace):
    """Return what is said of a workspace until it runs."""
    said = []
    with Sse(server, f"/api/workspaces/{workspace['id']}/events", timeout=30) as stream:
        for event in stream:
            said.append(event['data'].get('message') or '')
            if event['data'].get('status') == 'running':
                return '\n'.join(said)


def test_a_registry_that_does_not_take_an_image_is_told(serve, machines, make_registry, own_templates,
                                                        tmp_path):
    registry, (folder, add), first = make_registry(locked=True), own_templates, machines[1].address
    for name in ('shut', 'open', 'gone'):
        add(name, f'LABEL is={name}')
    server = serve(TEMPLATES_DIR=str(folder), REGISTRY=REGISTRY, DOCKER_CONFIG=str(tmp_path))
    server.until(lambda: all_ready(server))
    server.running('shut', template='shut', node=machines[2].address)
    error = nodes(server)[first]['error']
    assert f'Node {first} can not push an image to REGISTRY={REGISTRY}' in error
    assert f'docker login {REGISTRY}' in error
    login = {'auths': {REGISTRY: {'auth': base64.b64encode(b'ada:word').decode()}}}
    (tmp_path / 'config.json').write_text(json.dumps(login))
    server.running('open', template='open', node=machines[2].address)
    assert [node['error'] for node in nodes(server).values()] == [None] * 3
    assert registry.count('PUT', '/manifests/', asked_by=machines[1]) == 1
    registry.close()
    server.running('gone', template='gone', node=machines[2].address)
    error = nodes(server)[first]['error']
    assert 'connection refused' in error and f'that {first} reaches it' in error


# Names and ports

def test_names_and_ports_are_one_for_all_nodes_whoever_has_them(serve, machines):
    server = serve()
    warm = server.running('warm', node=machines[3].address)
    image = machines[3].client.api.inspect_container(warm['containerId'])['Config']['Image']
    first = int(server.settings['CODE_SERVER_PORTS'].partition('-')[0])
    strange = machines[3].client.api
    strange.create_container(image, name=f'{server.instance}-hers', labels={
        'agentbackend.instance': server.instance, 'agentbackend.ports': json.dumps({'x': first + 1})})
    status, code, _ = refusal(server, name='hers', node=machines[1].address)
    assert (status, code) == (409, 'WORKSPACE_ALREADY_EXISTS')
    # A program on another machine is not seen from here; the engine there says so when it starts.
    with subprocess.Popen([*machines[1].inside(), sys.executable, '-c', LISTEN, machines[1].address,
                           str(first + 2)], stdout=subprocess.PIPE) as listener:
        listener.stdout.readline()
        found = server.running('other', node=machines[1].address)
        listener.kill()
    assert found['codeServerPort'] == first + 3


# The server

def test_a_server_that_is_killed_knows_the_same_though_a_node_is_away(serve, machines):
    server = serve()
    server.until(lambda: all_ready(server))
    for machine in machines.all:
        server.create(f'on-{machine.address}', node=machine.address, type='temporary')
    made = {item['id']: server.wait_status(item['id'], 'running') for item in server.get('/api/workspaces')}
    lost = machines[3]
    lost.link('down')
    server.kill()
    gone = next(item for item in made.values() if item['node'] == lost.address)
    server.start()
    server.until(lambda: [node['state'] for node in nodes(server).values()].count('ready') == 2)
    for _ in range(3):
        assert {item['id']: item['status'] for item in server.get('/api/workspaces')} == dict.fromkeys(
            made, 'running')
        time.sleep(0.7)  # a sweep
    answer = server.call('DELETE', f"/api/workspaces/{gone['id']}")
    assert answer.status_code == 202
    # It is taken off the list: then nothing is waited for.
    server.kill()
    server.settings['DOCKER_HOST'] = f'{machines[1].url},{machines[2].url}'
    server.start()
    wait_gone(server, gone['id'])
    assert {item['status'] for item in server.get('/api/workspaces')} == {'running'}


# A task

def test_a_task_goes_on_though_its_node_is_cut_off_and_ends_with_its_engine(serve, machines, agents_template):
    folder, base = agents_template
    count = int(60 + 5 * AWAY)
    step = '{\\"type\\":\\"message\\",\\"data\\":{\\"message\\":\\"$n\\"}}'
    agent = f"""sh -c 'n=0; while [ $n -lt {count} ]; do n=$((n+1)); echo "{step}"; sleep 0.2; done'"""
    server = serve(TEMPLATES_DIR=str(folder), DEFAULT_TEMPLATE='agents', AGENT_COMMAND=agent,
                   DEFAULT_AGENT='command', LOG_LEVEL='info')
    with subprocess.Popen(['docker', 'save', base], stdout=subprocess.PIPE) as saved:
        machines[1].client.images.load(saved.stdout)
    server.create('work', node=machines[1].address)
    server.wait_status('work', 'running', timeout=120)
    begin(server, 'count', sessionId='counted')
    time.sleep(2)
    machines[1].link('down')
    server.until(lambda: nodes(server)[machines[1].address]['state'] == 'down')
    assert server.get('/api/agent/sessions/counted')['state'] == 'running'
    server.kill()
    server.start()
    server.until(lambda: nodes(server)[machines[1].address]['state'] == 'down')
    assert server.get('/api/agent/sessions/counted')['state'] == 'running'
    time.sleep(AWAY)
    machines[1].link('up')
    assert ended(server, 'counted')['state'] == 'completed'
    events = transcript(server, 'counted')
    numbers = [event['data']['message'] for event in events if event['type'] == 'message']
    assert numbers == [str(number + 1) for number in range(count)]
    for loss in ('crash', 'off'):  # without live-restore, an engine that comes back ends what ran before
        begin(server, 'count', sessionId=loss)
        LOSSES[loss](machines[1])
        server.until(lambda: nodes(server)[machines[1].address]['state'] == 'down')
        assert server.get(f'/api/agent/sessions/{loss}')['state'] == 'running'
        time.sleep(AWAY)
        machines[1].start()
        assert ended(server, loss)['state'] == 'failed'
        assert [event['type'] for event in transcript(server, loss)].count('error') == 1
        if loss == 'crash':
            server.until(lambda: all_ready(server))
            time.sleep(2)  # a sweep
            if server.wait_status('work', 'running', 'stopped')['status'] == 'stopped':
                verb(server, 'work', 'start')
            server.wait_status('work', 'running')


# An engine behind ssh

def test_an_engine_is_reached_by_ssh(make_server, docker_client, base_image, tmp_path):
    home = tmp_path / 'home'
    home.mkdir()
    path, keys = make_ssh(home)
    sshd = docker_client.containers.run(
        base_image, entrypoint=['sh', '-c', SSHD], detach=True, user='root', remove=True,
        environment={'PORT': '2200', **keys},
        volumes={'/var/run/docker.sock': {'bind': '/var/run/docker.sock'}})
    try:
        sshd.reload()
        address = sshd.attrs['NetworkSettings']['IPAddress']
        (home / 'config').write_text(f'Host near\n  HostName {address}\n  Port 2200\n  User root\n')
        server = make_server(DOCKER_HOST='ssh://near', PATH=path, connected=False)
        server.until(lambda: 'Host key verification failed' in str(nodes(server)))
        (home / 'known').write_text(f"[{address}]:2200 {(home / 'host.pub').read_text()}")
        server.until(lambda: server.get('/health')['docker'] == 'connected')
        workspace = server.running('behind', template='blank')
        assert workspace['node'] == 'near' and nodes(server)['near']['address'] == address
        said = server.call('POST', '/api/workspaces/behind/exec', {'command': 'wc -c', 'stdin': 'over ssh'})
        assert said.json()['data']['stdout'] == '8\n'
        tunnels = tunnels_to('near')
        assert len(tunnels) == 1
        os.kill(tunnels[0], signal.SIGKILL)  # it comes anew
        server.until(lambda: tunnels_to('near') not in ([], tunnels))
        server.until(lambda: all_ready(server))
        (home / 'known').write_text(f"[{address}]:2200 {(home / 'id.pub').read_text()}")
        os.kill(tunnels_to('near')[0], signal.SIGKILL)
        server.until(lambda: 'HOST IDENTIFICATION HAS CHANGED' in str(nodes(server)))
        assert 'ssh-keygen -f' in nodes(server)['near']['error']  # the way out, as ssh tells it
        warned = [line for line in server.log.read_text().splitlines() if ' WARNING Node near: ' in line]
        assert 'IDENTIFICATION HAS CHANGED' in warned[-1] and not any('/sock' in line for line in warned)
        (home / 'known').write_text(f'[{address}]:2200 {(home / "host.pub").read_text()}')
        server.until(lambda: all_ready(server))
        verb(server, 'behind', 'restart')
        server.wait_status('behind', 'running')
        delete(server, 'behind')
        server.kill()
        deadline = time.monotonic() + 10
        while tunnels_to('near'):
            assert time.monotonic() < deadline, 'a tunnel outlives its server'
            time.sleep(0.1)
    finally:
        sshd.kill()


def tunnels_to(host):
    """Return the numbers of the processes that are tunnels to a host."""
    found = subprocess.run(['pgrep', '-f', f'^[^ ]*ssh .*-L .* -- {host}$'], capture_output=True, text=True,
                           check=False)
    return [int(number) for number in found.stdout.split()]
