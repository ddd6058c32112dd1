"""A workspace whose node does not answer is not one that is gone. The engine here is one that is silent about
some of its workspaces, as one of several would be that was cut off; at the end, several that are played."""
import contextlib
import json
import socket
import time
from types import SimpleNamespace

import docker
import gevent
import gevent.event
import gevent.pywsgi
import gevent.server
import pytest
from conftest import objects_of, port_ranges, remove_objects

import agentbackend
from _agentbackend import dockerclient, swarm
from _agentbackend import nodes as swarm_nodes
from _agentbackend.dockerclient import DockerClient
from _agentbackend.engine import Engine
from _agentbackend.errors import EngineUnavailable
from _agentbackend.images import Templates
from _agentbackend.keeper import Keeper
from _agentbackend.nodes import Member, Swarm
from _agentbackend.probes import Probes
from _agentbackend.state import State
from bench import double

AWAY = 'Node far does not answer since noon.'


class Split(Engine):
    """An engine whose workspaces named far-... stand on a node of their own, which may be cut off."""

    cut = False

    def away(self, node):
        return AWAY if node == 'far' and self.cut else ''

    def inspect(self, container_id):
        found = super().inspect(container_id)
        if found and '-far' in found.name:
            object.__setattr__(found, 'node', 'far')
            self._see('far')
        return found

    def containers(self):
        with self._without_far():
            return super().containers()

    def members(self):
        with self._without_far():
            return super().members()

    def volumes(self):
        return {key: labels for key, labels in super().volumes().items()
                if not (self.cut and 'far' in labels['agentbackend.name'])}

    def has_volume(self, workspace_id):
        self._see(self.nodes_of.get(workspace_id, ''))
        return super().has_volume(workspace_id)

    def remove(self, workspace_id):
        self._see(self.nodes_of.get(workspace_id, ''))
        super().remove(workspace_id)

    def ping(self, node=''):
        self._see(node)
        super().ping()

    def _see(self, node):
        if self.away(node):
            raise EngineUnavailable(AWAY, node=node)

    @property
    def nodes_of(self):
        return {item.id: item.node for item in self.backend.state.all()}

    @contextlib.contextmanager
    def _without_far(self):
        """A list lacks what is on a node that does not answer, and is none the worse for it."""
        see, self._see = self._see, lambda node: None
        ours, self._ours = self._ours, lambda *labels: [
            item for item in Engine._ours(self, *labels) if not self.away(item.node)]
        try:
            yield
        finally:
            self._see, self._ours = see, ours


def until(condition, timeout=60):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        gevent.sleep(0.05)


@pytest.fixture
def backend(tmp_path, templates_dir, docker_client, monkeypatch):
    monkeypatch.setattr(swarm, 'Engine', Split)
    instance = f'test-split-{time.time_ns() % 10**9}'
    made = agentbackend.make_backend(agentbackend.Config.from_env(
        {'INSTANCE': instance, 'STATE_DIR': str(tmp_path), 'TEMPLATES_DIR': str(templates_dir),
         'PREBUILD': 'none', **port_ranges()}))
    made.engine.backend = made
    made.open()
    until(lambda: made.keeper.connected)
    yield made
    made.engine.cut = False
    made.close()
    remove_objects(docker_client, instance)


def status_of(backend, name):
    with contextlib.suppress(agentbackend.errors.WorkspaceNotFound):
        return backend.state.get(name).status


def make(backend, **types):
    for name, fields in types.items():
        backend.workspaces.create({'name': name.replace('_', '-'), 'template': 'tiny', **fields})
    until(lambda: {item.status for item in backend.state.all()} == {'running'})

    def are_found():  # a job that has just ended may not be over
        backend.keeper.reconcile()
        return all(item.node == ('far' if 'far' in item.name else '') for item in backend.state.all())
    until(are_found)


def test_what_is_on_a_node_that_does_not_answer_is_left_as_it_is(backend, docker_client):
    make(backend, near={}, far_kept={}, far_temp={'type': 'temporary'},
         far_agent={'type': 'agent', 'ttl': 3600}, far_gone={})
    before = {item.name: item for item in backend.state.all()}
    assert {name: item.node for name, item in before.items()} == {
        'near': '', 'far-kept': 'far', 'far-temp': 'far', 'far-agent': 'far', 'far-gone': 'far'}
    backend.engine.cut = True
    backend.keeper.reconcile()
    backend.state.update(before['far-agent'].id, last_activity_at=time.time() - 4000)  # its time is over
    gone, done = backend.workspaces.remove('far-gone', wait=5)
    assert not done and gone.status == 'deleting'
    for verb in (backend.workspaces.stop, backend.workspaces.restart, backend.workspaces.start):
        with pytest.raises(EngineUnavailable, match='far does not answer') as told:
            verb('far-kept')
        assert told.value.status == 503
    gevent.sleep(2.5)  # two sweeps
    assert [status_of(backend, name) for name in before] == ['running'] * 4 + ['deleting']
    shown = agentbackend.view_workspace_details(backend.state.get('far-kept'), None, backend.config, '',
                                                backend.engine)
    assert shown['error'] == AWAY and shown['status'] == 'running' and shown['node'] == 'far'
    backend.workspaces.stop('near')  # the others notice nothing
    until(lambda: status_of(backend, 'near') == 'stopped')
    backend.engine.cut = False
    backend.state.update(before['far-agent'].id, last_activity_at=time.time())
    until(lambda: status_of(backend, 'far-gone') is None)
    backend.keeper.reconcile()
    for name in ('far-kept', 'far-temp', 'far-agent'):
        now = backend.state.get(name)
        assert (now.status, now.container_id, now.error) == ('running', before[name].container_id, '')
    backend.workspaces.stop('far-temp')
    until(lambda: status_of(backend, 'far-temp') is None)
    instance = backend.config.instance
    assert not [name for name in objects_of(docker_client, instance) if 'temp' in name or 'gone' in name]


def test_a_port_is_free_as_far_as_is_known_of_the_engines_machine():
    far, near = Engine(DockerClient(host='tcp://192.0.2.1:2376')), Engine(DockerClient())
    with socket.create_server(('127.0.0.1', 0)) as listener:
        port = listener.getsockname()[1]
        assert far.is_free('127.0.0.1', port) and not near.is_free('127.0.0.1', port)


# Engines that are played

FACTS = {'NCPU': 4, 'MemTotal': 2**33, 'OSType': 'linux', 'Architecture': 'x86_64'}


def played(docker_host='tcp://192.0.2.1:2376,tcp://192.0.2.2:2376'):
    """Return Nodes of engines that all answer, and that nobody asks."""
    config = agentbackend.Config.from_env({'DOCKER_HOST': docker_host, 'WORKSPACE_BIND_ADDRESS': '{node}'})
    state = SimpleNamespace(id='ours', container_of=lambda workspace_id: None, all=list)
    found = swarm.engine_of(config, state)[1]
    found._listing = gevent.spawn(lambda: None)
    found._listed.set()
    found._keep_up = lambda node: None
    found._take(found._source.members())
    for node in found._nodes.values():
        node.join(dict(FACTS, ID=node.name, Name=node.name))
    return found


@pytest.fixture
def editor():
    """The port of an editor on 127.0.0.1."""
    def greet(connection, _):
        connection.recv(1000)
        connection.sendall(b'HTTP/1.0 200 OK\r\n\r\nalive')
        connection.close()
    server = gevent.server.StreamServer(('127.0.0.1', 0), greet)
    server.start()
    yield server.server_port
    server.stop()


def test_the_editor_of_a_node_without_an_address_is_asked_where_its_ports_are_bound(editor):
    nodes = played('/run/no/docker.sock,tcp://192.0.2.2:2376')
    assert nodes._bound(nodes._node('local'), '{node}') == '127.0.0.1'
    probes = Probes(SimpleNamespace(workspace_bind_address='{node}', workspace_host=''), nodes)
    asked = SimpleNamespace(node='local', ports={'codeServer': editor})
    assert probes.health(asked, 'its container', timeout=5) == b'alive'


def test_an_editor_is_asked_at_the_address_of_its_node_whatever_users_call_that(editor):
    nodes = played()
    nodes._take([Member('n3', 'tcp://192.0.2.3:2376', '127.0.0.1', {'agentbackend.host': 'n3.invalid'})])
    node, asked = nodes._node('n3'), SimpleNamespace(node='n3', ports={'codeServer': editor})
    node.join(FACTS)
    probes = Probes(SimpleNamespace(workspace_bind_address='{node}', workspace_host=''), nodes)
    assert nodes.address('n3') == 'n3.invalid'
    assert probes.health(asked, 'its container', timeout=5) == b'alive'
    node.lose('its cable is out')
    assert probes.health(asked, 'its container') is None, 'nobody is asked any more'


def test_of_two_nodes_that_are_one_engine_one_joins():
    nodes = played()
    for node in nodes._nodes.values():
        node.lose('the test has begun')
        node.link = SimpleNamespace(info=lambda: dict(FACTS, ID='one', Name='n1'))
        node.engine = SimpleNamespace(remove_helpers=lambda: gevent.sleep(0.01))
    nodes._claims_it = False
    joining = [gevent.spawn(nodes._join, node) for node in nodes._nodes.values()]
    gevent.joinall(joining)
    first, second = sorted(nodes._nodes.values(), key=lambda node: node.away)
    assert second.away and not first.away
    assert {str(task.exception) for task in joining} == {
        'None', f'It is the same engine as that of node {first.name}.'}


def listed(key, state, name, address='192.0.2.3'):
    """Return a node as a manager lists it."""
    return {'ID': key, 'Description': {'Hostname': name}, 'Spec': {'Availability': 'active'},
            'Status': {'State': state, 'Addr': address}}


@pytest.fixture
def ask_swarm(monkeypatch):
    """A function that returns a Swarm of managers that say what is asked of them: {url: [what the engine says
    of its swarm, the nodes]}."""
    def make(managers):
        def link(url, connect):
            def info():
                said = managers[url][0]
                return {'Swarm': said() if callable(said) else said}
            client = DockerClient()
            client._api = SimpleNamespace(nodes=lambda: managers[url][1])
            client.close = lambda: None
            return SimpleNamespace(info=info, client=client)
        monkeypatch.setattr(swarm_nodes, 'Link', link)
        return Swarm(list(managers), 'ssh://{address}', None)
    return make


MANAGER = {'ControlAvailable': True, 'NodeID': 'id2'}


def no_answer():
    raise EngineUnavailable('It is late.')


def test_an_engine_on_this_machine_that_was_late_is_reached_by_its_socket(ask_swarm):
    here, listing = 'unix:///run/no/docker.sock', [listed('id1', 'ready', 'n1', '192.0.2.1'),
                                                   listed('id2', 'ready', 'n2', '192.0.2.2')]
    said = {here: [no_answer, listing], 'ssh://192.0.2.2': [MANAGER, listing]}
    found = ask_swarm(said)

    def urls():
        with gevent.Timeout(10):
            return {member.name: member.url for member in found.members()}
    away = {'n1': 'ssh://192.0.2.1', 'n2': 'ssh://192.0.2.2'}
    for answer in (no_answer, None, {'NodeID': '', 'ControlAvailable': False}, lambda: gevent.sleep(60)):
        said[here][0] = answer
        assert urls() == away
    said[here][0] = {'NodeID': 'id1', 'ControlAvailable': True}
    assert urls() == away | {'n1': here}
    said[here][0] = no_answer  # what is known is not asked for again
    assert urls() == away | {'n1': here}
    listing[0]['Status']['State'] = 'down'  # it left, and joined again
    listing.append(listed('id3', 'ready', 'n1', '192.0.2.1'))
    said[here][0] = {'NodeID': 'id3', 'ControlAvailable': True}
    assert urls() == away | {'n1': here}


@pytest.mark.parametrize('order', [1, -1])
def test_a_node_that_left_the_swarm_and_joined_again_is_one(ask_swarm, order):
    old, new = [listed('old', 'ready', 'n3')], [listed('old', 'down', 'n3'), listed('new', 'ready', 'n3')]
    said = {'ssh://192.0.2.2': [MANAGER, old]}
    found = ask_swarm(said)
    assert [member.name for member in found.members()] == ['n3']
    # A leader that is new has not heard of the dead one.
    for item in (new, [dict(new[0], Description={}), new[1]]):
        said['ssh://192.0.2.2'][1] = item[::order]
        assert [(member.name, member.state) for member in found.members()] == [('n3', 'ready')]
    new[0]['Status']['Addr'] = '192.0.2.4'  # it is another machine
    said['ssh://192.0.2.2'][1] = new
    assert {member.name: member.state for member in found.members()} == {'n3': 'ready', 'n3-old': 'down'}


def test_what_comes_back_under_a_name_that_was_given_away_gets_another(tmp_path, caplog):
    state = State(tmp_path / 'never', {'codeServer': (1, 9), 'ssh': (10, 19), 'custom': (20, 29)})
    config = SimpleNamespace(workspace_memory=2**30)
    keeper = Keeper(config, state, *[None] * 6)
    spec = {'folder': 'here', 'ssh': True, 'ttl': None, 'labels': {}, 'wanted_ports': []}
    values = {'name': 'here', 'type': 'persistent', 'template': 'tiny', 'createdAt': '1.0', 'ports': '{}',
              'gitUrl': '', 'gitBranch': '', 'spec': json.dumps(spec)}
    for key, node in (('ws-aaaaaaaa', 'n2'), ('ws-bbbbbbbb', 'n3')):
        values['node'] = node
        keeper._adopt(key, None, {f'agentbackend.{name}': text for name, text in values.items()})
    assert {item.id: (item.name, item.node) for item in state.all()} == {
        'ws-aaaaaaaa': ('here', 'n2'), 'ws-bbbbbbbb': ('here-bbbbbbbb', 'n3')}
    assert 'ws-bbbbbbbb is called here-bbbbbbbb from now on: another one is called here.' in caplog.text


def test_a_node_that_is_lost_while_something_is_read_is_told_as_such():
    node, done = played()._node('192.0.2.1'), []

    def items():
        try:
            yield 'first'
            gevent.sleep(60)
        finally:
            done.append('all')
    reading = node.each(items())
    assert next(reading) == 'first'
    gevent.spawn_later(0.01, node.lose, 'its cable is out')
    with pytest.raises(EngineUnavailable, match='its cable is out'):
        next(reading)
    until(lambda: done == ['all'])
    node.join(FACTS)
    reading = node.each(items())  # whose reader leaves early
    next(reading)
    reading.close()
    assert done == ['all'] * 2


def test_images_are_built_on_the_platform_that_most_have_whoever_answered_first():
    nodes = played('tcp://192.0.2.1:2376,tcp://192.0.2.2:2376,tcp://192.0.2.3:2376,tcp://192.0.2.4:2376')
    *others, slow, odd = nodes._nodes.values()
    for node in (*others, slow):
        node.lose('the test has begun')
    odd.join(dict(FACTS, Architecture='aarch64'))
    assert nodes.builder.node is odd
    for node in others:
        node.join(FACTS)
    assert nodes.builder.node is others[0]
    others[0].lose('it is off')
    slow.join(FACTS)
    assert nodes.builder.node is others[1]
    others[0].join(FACTS)
    assert nodes.builder.node is others[1], 'it has the images'
    nodes._take([node.member for node in (others[0], slow, odd)])
    assert nodes.builder.node is others[0], 'the other one is no more in the list'


LARGE = b'layer' * 100_000


class Packing(double.Engine):
    """An engine that takes its time to pack an image, and keeps what it is given."""

    def __init__(self, name, *images):
        super().__init__(name)
        self.images, self.given = set(images), []

    def __call__(self, environ, start_response):
        said = LARGE
        if environ['PATH_INFO'].endswith('/large:1/get'):
            gevent.sleep(2.4)
        elif environ['PATH_INFO'].endswith('/images/load'):
            self.given.append(environ['wsgi.input'].read())
            said = b'{"stream": "Loaded"}'
        else:
            return super().__call__(environ, start_response)
        start_response('200 OK', [])
        return [said]

    def image(self, name):
        if name not in self.images:
            raise double.Refused(404, f'No such image: {name}')
        return super().image(name)


def test_an_image_may_be_packed_for_longer_than_an_engine_has_to_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(dockerclient, 'CALL_TIMEOUT', 2)
    engines, servers = [Packing('n1'), Packing('n2', 'large:1')], []
    for engine in engines:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / engine.name))
        listener.listen()
        servers.append(gevent.pywsgi.WSGIServer(listener, engine, log=None))
        servers[-1].start()
    nodes = played(f'{tmp_path}/n1,{tmp_path}/n2')
    nodes.bring('large:1', 'local', lambda line: None)
    assert engines[0].given == [LARGE]
    for server in servers:
        server.stop()


def test_an_image_that_is_there_does_not_wait_for_another_that_is_brought():
    nodes = played()
    nodes._node('192.0.2.1').has_image = lambda image: image == 'there:1'
    nodes._node('192.0.2.2').has_image = lambda image: True
    nodes._distribution = SimpleNamespace(bring=lambda *arguments: gevent.sleep(60))
    bringing = gevent.spawn(nodes.bring, 'large:1', '192.0.2.1', None)
    until(nodes._node('192.0.2.1').bringing.locked)
    with gevent.Timeout(10):
        nodes.bring('there:1', '192.0.2.1', None)
    nodes._node('192.0.2.2').lose('it is off')
    with pytest.raises(EngineUnavailable, match='it is off'):
        bringing.get(timeout=10)


def test_an_image_that_went_with_its_node_is_waited_for_until_it_is_built_anew():
    nodes = played()
    for node in nodes._nodes.values():
        node.has_image = lambda image: False
    with pytest.raises(EngineUnavailable, match='No node that answers has the image'):
        nodes.bring('lost:1', '192.0.2.1', None)


@pytest.mark.parametrize('platform', ['x86_64', 'aarch64'])
def test_an_image_that_another_node_of_that_platform_has_is_not_built_again(tmp_path, platform):
    nodes, built = played(), []
    first, second = nodes._nodes.values()
    second.join(dict(FACTS, Architecture=platform))
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'Dockerfile').write_text('FROM scratch\n')
    templates = Templates(nodes.builder, [tmp_path], base_image='debian', base_image_timeout=0, ca_certs='',
                          timeout=60)
    tag, image = templates.tag('mine'), {'Config': {'Labels': {'agentbackend.settings': 'stdin'}}}
    for node, images in (first, {}), (second, {tag: image}):
        def inspect(name, images=images):
            if name not in images:
                raise docker.errors.ImageNotFound(name, SimpleNamespace(status_code=404), 'No such image')
            return images[name]

        def build(images=images, **arguments):
            built.append(arguments['tag'])
            images[tag] = image
            return iter(())
        node.client._api = SimpleNamespace(inspect_image=inspect, build=build, images=images)
    nodes._distribution = SimpleNamespace(
        bring=lambda name, source, node, on_line: node.client.api.images.update({name: image}))
    assert nodes.builder.node is first
    assert templates.image('mine', lambda line: None, gevent.event.Event()) == tag
    assert built == ([] if platform == 'x86_64' else [tag]) and templates.hears(tag)
