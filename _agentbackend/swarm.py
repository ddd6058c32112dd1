"""Several machines with an engine each, as one engine: a workspace is a plain container on one of them."""
import collections
import contextlib
import logging
import time
from dataclasses import dataclass

import gevent
import gevent.event
import gevent.lock

from _agentbackend.claim import Claim
from _agentbackend.config import NODE_ADDRESS
from _agentbackend.distribution import Distribution
from _agentbackend.dockerclient import DockerClient
from _agentbackend.engine import PREFIX, Engine
from _agentbackend.errors import (
    DockerError,
    EngineUnavailable,
    MissingOnEngine,
    NoRoom,
    either,
    quoted,
    refusal,
)
from _agentbackend.nodes import ANSWER_TIME, Node, PlainList, Swarm
from _agentbackend.records import ERROR, STOPPED
from _agentbackend.timing import parse_time

log = logging.getLogger('agentbackend')

PING_PAUSE = 1  # seconds between looks at a node
RETRY_PAUSE = 1  # seconds until one that did not answer is asked again
LIST_PAUSE = 2  # seconds between looks at the list of nodes
LOOK_TIME = 1  # seconds that one waits for it who asks for a workspace
JOIN_TIME = 15  # seconds; the claim of a server that is gone is waited for


@dataclass(frozen=True)
class Change:
    """Told among the ids of workspaces: a node answers, and what is on it is to be looked at anew, or it does
    not any more."""

    node: str


class Builder:
    """The client of a node on which images are built, which is the same one as long as it answers and most
    are like it."""

    def __init__(self, nodes):
        self._nodes, self._node = nodes, None

    @property
    def node(self):
        """The node: one that takes something new, of the platform that most have."""
        ready = self._nodes.ready()
        count = collections.Counter(node.platform for node in ready)
        # The first that answers, or one that is not in the list any more, says nothing of the others.
        if self._node not in ready or count[self._node.platform] < max(count.values()):
            self._node = min(ready, key=lambda node: (not node.is_open, -count[node.platform], node.name))
        return self._node

    @property
    def api(self):
        """The APIClient of docker-py."""
        return self.node.client.api

    def errors(self):
        """Turn exceptions into ours, as DockerClient does."""
        return self.node.client.errors()

    def progress(self, *arguments):
        """Yield what the engine says of a push or a pull, as DockerClient does."""
        return self.node.client.progress(*arguments)

    def fetch(self, image, on_line):
        """Bring an image from another node, unless none has it; return whether it is there."""
        with contextlib.suppress(DockerError):
            self._nodes.bring(image, self.node.name, on_line)
            return True
        return False

    def close(self):
        """End the ways to all nodes."""
        self._nodes.close()


def routed(verb):
    """Return the method of Engine with that name, which is asked of the node that a container is on."""
    def ask(self, container_id, *arguments, **named):
        node = self._of(container_id)
        return node.call(lambda: getattr(node.engine, verb)(container_id, *arguments, **named))
    ask.__doc__ = getattr(Engine, verb).__doc__
    return ask


def streamed(verb):
    """The same of one that goes on and on: its reader is told by the connection when a node is lost for
    longer than a moment."""
    def ask(self, container_id, *arguments, **named):
        node = self._of(container_id)
        node.check()
        return getattr(node.engine, verb)(container_id, *arguments, **named)
    ask.__doc__ = getattr(Engine, verb).__doc__
    return ask


class Nodes:
    """The verbs of Engine over several nodes. Lists are of those that answer; what is asked of one that does
    not raises EngineUnavailable with its name, at once if that is known."""

    volume_of, home_of, hold_of = Engine.volume_of, Engine.home_of, Engine.hold_of
    member_name = Engine.member_name
    start, limit, keep_running = routed('start'), routed('limit'), routed('keep_running')
    stop, rename, put_files = routed('stop'), routed('rename'), routed('put_files')
    get_file, run, run_detached = routed('get_file'), routed('run'), routed('run_detached')
    tell = routed('tell')
    follow, usage = streamed('follow'), streamed('usage')

    def __init__(self, config, state, connect):
        self.instance = config.instance
        self._config, self._state, self._connect = config, state, connect
        self._source = Swarm(config.docker_host.removeprefix('swarm://').split(','), config.node_engines,
                             connect) if config.docker_host.startswith('swarm://') else PlainList(
                                 config.docker_host.split(','))
        self.builder = Builder(self)
        self._distribution = Distribution(config.registry)
        self._nodes = {}  # name -> Node
        self._where = {}  # id of a container -> name of its node
        self._news, self._told = gevent.event.Event(), {}  # what changed, in its order
        self._is_followed = False  # somebody has asked what there is, and will ask what changes
        self._listed = gevent.event.Event()  # the list was asked for, and its nodes too
        self._listing, self._why, self._claims_it = None, '', True
        self._looking = gevent.lock.BoundedSemaphore(1)  # the managers are asked in turn

    # Nodes

    def ready(self):
        """Return the nodes that answer; raise EngineUnavailable when none does."""
        if self._listing is None:
            self._listing = gevent.spawn(self._follow_list)
        self._listed.wait(2 * ANSWER_TIME)
        found = [node for node in self._nodes.values() if not node.away]
        if not found:
            raise EngineUnavailable(' '.join(filter(None, self.health()[1])) or 'No node answers yet.')
        return found

    def away(self, node):
        """Return since when and why a node does not answer, in words, or ''; never waits."""
        if node in self._nodes or not node:
            return self._nodes[node].away if node else ''
        return f'Node {node} is not among the nodes that DOCKER_HOST names.'

    def address(self, node):
        """Return where users reach the published ports of a node, '' for where the settings say."""
        return self._nodes[node].member.host if node in self._nodes else ''

    def reached(self, node):
        """Return the IP address to which the ports of a node are bound, which users may know by another, ''
        for where the settings say."""
        return self._nodes[node].member.address if node in self._nodes else ''

    def is_free(self, address, port):
        """Return whether nothing listens on a port that is to be published, as far as that is known here."""
        return all(node.engine.is_free(self._bound(node, address), port) for node in self._nodes.values())

    def is_bound(self, container, address):
        """Return whether the ports of a container are published where those of a new one would be: one that
        is older than the second node may publish them where no other machine reaches them."""
        return container.addresses <= {self._bound(self._node(container.node), address)}

    def health(self):
        """Return ({total, ready} of the nodes, what is wrong with them in words); never waits."""
        away = [node.away for node in self._nodes.values() if node.away]
        remarks = [node.remark for node in self._nodes.values() if node.remark and not node.away]
        return {'total': len(self._nodes), 'ready': len(self._nodes) - len(away)}, [
            *([self._why] if self._why else []), *away, *remarks]

    def nodes(self):
        """Return what is known of each node: {node, name, state, availability, address, memory, images,
        error}."""
        with contextlib.suppress(EngineUnavailable):
            self.ready()
        images = {}
        with contextlib.suppress(EngineUnavailable):
            images = self._each('image_names')
        return [{'node': name, 'name': name, 'state': 'down' if node.away else 'ready',
                 'availability': node.member.availability, 'address': node.member.host, 'memory': node.memory,
                 'images': images.get(name, []), 'error': node.away or node.remark}
                for name, node in self._nodes.items()]

    def place(self, draft, workspaces, *, node, constraints):
        """Return the name of the node for a new workspace: of those that take it the one with the most memory
        that is not promised. Raises NoRoom with what each lacks. It never waits."""
        if not self._nodes:
            raise EngineUnavailable(self._why or 'No node answers yet.')
        if node and node not in self._nodes:
            raise refusal('node', f'is {quoted(node)}, but there are {either(sorted(self._nodes))}')
        for label in constraints:
            known = {key for item in self._nodes.values() for key in item.member.labels}
            if label not in known:
                raise refusal('constraints', f'names the label {quoted(label)}, which no node has; '
                                             f'there are {", ".join(sorted(known)) or "none"}')
        promised, count = collections.Counter(), collections.Counter()
        for item in workspaces:
            count[item.node] += 1
            promised[item.node] += item.memory if item.status not in (STOPPED, ERROR) else 0
        free = {name: item.memory - promised[name] for name, item in self._nodes.items()
                if node in ('', name)}
        lacks = {name: self._lack(self._nodes[name], free[name], draft, constraints) for name in free}
        fit = [name for name, lack in lacks.items() if not lack]
        if not fit:
            listed = '; '.join(f'{name} {lack}' for name, lack in sorted(lacks.items()))
            raise NoRoom(f'No node has room for it: {listed}.')
        return min(fit, key=lambda name: (-free[name], count[name], name))

    def _lack(self, node, free, draft, constraints):
        """Return what keeps a node from taking a workspace, in words, or ''."""
        labels, member = node.member.labels, node.member
        unfit = [f'{key}={value}' for key, value in constraints.items() if labels.get(key) != value]
        reasons = {
            'does not answer': node.away, f'is {member.state} in the swarm': member.state == 'down',
            f'is set to {member.availability}': member.availability != 'active',
            f'has the label {PREFIX}=no': labels.get(PREFIX) == 'no', f'is not {", ".join(unfit)}': unfit,
            f'runs {node.platform}, not {self.builder.node.platform} as the images': (
                not node.away and node.platform != self.builder.node.platform),
            f"has {node.facts.get('NCPU')} cores": draft.cpus > (node.facts.get('NCPU') or 0),
            f'has {max(0, free) / 1e9:.1f} GB of memory that are not promised': draft.memory > free}
        return next((reason for reason, holds in reasons.items() if holds), '')

    def _node(self, name):
        if name not in self._nodes:
            raise EngineUnavailable(self.away(name), node=name)
        return self._nodes[name]

    def _home(self, workspace_id):
        """Return the node of a workspace; one of earlier days, when there was one engine, is looked for."""
        name = self._state.node_of(workspace_id)
        if name:
            return self._node(name)
        found = self._each('has_volume', workspace_id)
        return self._node(next((name for name, is_there in found.items() if is_there), min(found)))

    def _of(self, container_id):
        """Return the node of a container; raise MissingOnEngine when none has it, EngineUnavailable when one
        may have it that does not answer."""
        if container_id not in self._where:
            self._where.update({item.container_id: item.node for item in self._state.all() if item.node})
        if container_id not in self._where:
            found = self._each('inspect', container_id)
            self._where |= {item.id: item.node for item in found.values() if item}
        if container_id in self._where:
            return self._node(self._where[container_id])
        for node in self._nodes.values():
            node.check()
        raise MissingOnEngine(f'No node has a container {container_id[:12]}.')

    def _each(self, verb, *arguments):
        """Return {name: what the engine of each node that answers returns}, asked all at once."""
        found, failed = {}, []

        def ask(node):
            try:
                found[node.name] = node.call(lambda: getattr(node.engine, verb)(*arguments))
            except DockerError as error:
                failed.append(error)
        gevent.joinall([gevent.spawn(ask, node) for node in self.ready()], raise_error=True)
        if not found:
            raise failed[0]
        return found

    def _bound(self, node, address):
        return node.member.address or '127.0.0.1' if address == NODE_ADDRESS else address

    # Following nodes

    def _follow_list(self):
        while True:
            self._look()
            if not self._listed.is_set():
                gevent.wait([node.tried for node in self._nodes.values()], timeout=ANSWER_TIME)
            self._listed.set()
            gevent.sleep(LIST_PAUSE)

    def _look(self, *, unless_in_vain=False):
        """Read the list; while it can't be read the last one holds."""
        with self._looking:
            if unless_in_vain and self._why:
                return
            try:
                self._take(self._source.members())
                self._why = ''
            except DockerError as error:
                if str(error) != self._why:
                    log.warning('%s', error)
                self._why = str(error)
            except Exception:
                log.exception('The list of nodes could not be read; trying again.')

    def _take(self, members):
        """Begin to follow nodes that are new, and end that of those that are no more."""
        wanted = {member.name: member for member in members}
        for name, node in list(self._nodes.items()):
            if name not in wanted or wanted[name].url != node.member.url:
                self._nodes.pop(name).greenlet.kill()
                node.lose('it is no more in the list')
                node.link.close()
                self._tell(Change(name))
        for name, member in wanted.items():
            if name in self._nodes:
                self._nodes[name].member = member
                continue
            node = self._nodes[name] = Node(member, self._connect, instance=self.instance,
                                            recorded=self._state.container_of)
            node.greenlet = gevent.spawn(self._keep_up, node)

    def _keep_up(self, node):
        """Follow a node for ever: join it, tell what changes on it, notice when it does not answer."""
        while True:
            try:
                with gevent.Timeout(JOIN_TIME, node.client.silence(JOIN_TIME)):
                    since = self._join(node)
                self._tell(Change(node.name))
                self._listen(node, since)
            except DockerError as error:
                if str(error) != node.why:  # the first reason may be no more than a tunnel that ended
                    log.warning('Node %s: %s', node.name, error)
                if node.lose(str(error)):
                    self._tell(Change(node.name))
            except Exception as error:
                log.exception('Following node %s failed; trying again.', node.name)
                node.lose(repr(error))
            gevent.sleep(RETRY_PAUSE)

    def _join(self, node):
        """See that a node is what it should be, and that no other server has this instance there; return the
        time of its own clock."""
        info = node.link.info()
        self._refuse_twin(node, info)  # before it is asked for anything
        if self._claims_it:
            Claim(node.engine, lambda: self._state.id).take()
        node.engine.remove_helpers()
        self._refuse_twin(node, info)  # which may have joined meanwhile
        node.join(info)
        log.info('Node %s answers: %d cores, %.1f GB.', node.name, info['NCPU'], info['MemTotal'] / 1e9)
        return parse_time(info.get('SystemTime'))

    def _refuse_twin(self, node, info):
        for other in self._nodes.values():
            if other is not node and not other.away and (
                    [other.facts.get(key) for key in ('ID', 'Name')] == [info['ID'], info['Name']]):
                raise DockerError(f'It is the same engine as that of node {other.name}.')

    def _listen(self, node, since):
        """Tell what changes on a node until its stream of events ends, or it does not answer."""
        def listen():
            with contextlib.suppress(DockerError):
                for workspace_id in node.engine.changes(since):
                    self._tell(workspace_id)
        listening = gevent.spawn(listen)
        try:
            while not listening.ready():
                gevent.wait([listening, node.doubt], timeout=PING_PAUSE, count=1)
                node.doubt.clear()
                with gevent.Timeout(ANSWER_TIME, node.client.silence(ANSWER_TIME)):
                    node.engine.ping()
        finally:
            listening.kill(block=False)

    def _tell(self, change):
        self._told[change] = None
        self._news.set()

    # The verbs of Engine

    def info(self):
        """Return {cpus, memory, time} of all nodes; each has a clock of its own."""
        ready = self.ready()
        if not self._is_followed:  # what is listed next is newer than what was told so far
            self._is_followed = True
            self._told.clear()
        return {'cpus': sum(node.facts['NCPU'] for node in ready),
                'memory': sum(node.memory for node in ready), 'time': 0}

    def cpus(self, node=''):
        """Return how many cores a node has, or the most that one has."""
        asked = [self._node(node)] if node else self.ready()
        return max(item.facts.get('NCPU') or 1 for item in asked)

    def ping(self, node=''):
        """Raise EngineUnavailable unless the node, or any, answers."""
        if node:
            self._node(node).call(self._node(node).engine.ping)
        else:
            self.ready()

    def is_leaving(self, node=''):
        """Return whether a node takes no new connections."""
        return bool(node) and (bool(self.away(node)) or self._nodes[node].engine.is_leaving())

    def taken(self):
        """Return (names, host ports) of every container on all nodes that answer, as the list has them now:
        what an operator has just changed holds for the workspace that is asked for next."""
        if self._listed.is_set():
            gevent.spawn(self._look, unless_in_vain=True).join(LOOK_TIME)
        found = self._each('taken').values()
        return set().union(*(names for names, _ in found)), set().union(*(ports for _, ports in found))

    def volumes(self):
        """Return {workspace id: labels} of this instance's volumes on all nodes that answer, with the node as
        one more label."""
        found = [(workspace_id, name, labels) for name, volumes in self._each('volumes').items()
                 for workspace_id, labels in volumes.items()]
        found.sort(key=lambda item: item[1] == self._state.node_of(item[0]))  # of two copies that one counts
        return {workspace_id: labels | {f'{PREFIX}.node': name} for workspace_id, name, labels in found}

    def has_volume(self, workspace_id):
        """Return whether a workspace's volume is there."""
        node = self._home(workspace_id)
        return node.call(lambda: node.engine.has_volume(workspace_id))

    def containers(self):
        """Return {workspace id: Container} of this instance on all nodes that answer."""
        found = [container for containers in self._each('containers').values()
                 for container in containers.values()]
        self._where = {item.id: item.node for item in found} | {
            item.container_id: item.node for item in self._state.all() if item.node}
        found.sort(key=lambda item: item.node == self._state.node_of(item.labels[f'{PREFIX}.id']))
        return {item.labels[f'{PREFIX}.id']: item for item in found}

    def members(self):
        """Return what was made ahead by a server of one engine; one of several makes nothing ahead."""
        return {key: member for members in self._each('members').values() for key, member in members.items()}

    def find(self, workspace_id):
        """Return the Container of a workspace, or None."""
        node = self._home(workspace_id)
        found = node.call(lambda: node.engine.find(workspace_id))
        if found is not None:
            self._where[found.id] = node.name
        return found

    def inspect(self, container_id):
        """Return the Container with this id, or None."""
        try:
            node = self._of(container_id)
        except MissingOnEngine:
            return None
        return node.call(lambda: node.engine.inspect(container_id))

    def changes(self, since):
        """Yield the id of a workspace whenever its container changed, and a Change of a node; raise
        EngineUnavailable when no node answers any more."""
        while True:
            self._news.wait()
            self._news.clear()
            told, self._told = self._told, {}
            yield from told
            self.ready()

    def create_network(self, *, isolated, node=''):
        """Make the network of this instance on a node unless it is there, and return its name."""
        asked = self._node(node)
        return asked.call(lambda: asked.engine.create_network(isolated=isolated))

    def remove_network(self):
        """Remove the network of this instance; where it is gone, or in use, it is left alone."""
        self._each('remove_network')

    def create_volume(self, name, labels):
        """Make a volume on the node of the workspace that its labels name."""
        node = self._home(labels[f'{PREFIX}.id'])
        node.call(lambda: node.engine.create_volume(name, labels))

    def create_container(self, *, labels, bind_address, **arguments):
        """Create a container on the node of the workspace that its labels name, and return its id."""
        node = self._home(labels[f'{PREFIX}.id'])
        made = node.call(lambda: node.engine.create_container(
            labels=labels, bind_address=self._bound(node, bind_address), **arguments))
        self._where[made] = node.name
        return made

    def remove_container(self, container_id):
        """Remove a container, running or not; one that is gone is fine."""
        with contextlib.suppress(MissingOnEngine):
            node = self._of(container_id)
            node.call(lambda: node.engine.remove_container(container_id))
            self._where.pop(container_id, None)

    def remove(self, workspace_id):
        """Remove every container and volume of a workspace, running or not. On a node that is no more among
        them there is nothing to remove; one that does not answer is asked again when it does."""
        name = self._state.node_of(workspace_id)
        if name and name not in self._nodes and self._nodes:
            log.warning('What workspace %s has on node %s is left there: it is none of the nodes any more.',
                        workspace_id, name)
            return
        node = self._home(workspace_id)
        node.call(lambda: node.engine.remove(workspace_id))

    def remove_helpers(self, workspace_id=None):
        """Those that an earlier server has left were removed when their node joined."""

    @contextlib.contextmanager
    def helper(self, container, workspace_id):
        """Give the id of a container that runs for the length of a block, beside another one."""
        node = self._node(container.node)
        with node.entered(node.engine.helper(container, workspace_id)) as helper:
            self._where[helper] = node.name
            try:
                yield helper
            finally:
                self._where.pop(helper, None)

    @contextlib.contextmanager
    def attached(self, container_id, *arguments, **named):
        """Run a command in a container for the length of a block, which is given its Attached."""
        node = self._of(container_id)
        with node.entered(node.engine.attached(container_id, *arguments, **named)) as attached:
            yield attached

    def log_lines(self, container, **options):
        """Yield lists of lines, (stream, stamp, text), of a container's output."""
        node = self._node(container.node)
        node.check()
        lines = node.engine.log_lines(container, **options)
        return lines if options.get('follow') else node.each(lines)

    def read_file(self, container_id, path, *, limit=None):
        """Yield the bytes of a file in a container, started or not, at most `limit`."""
        node = self._of(container_id)
        return node.each(node.engine.read_file(container_id, path, limit=limit))

    def claims(self):
        """Return the owners who claim this instance on any node."""
        return set().union(*self._each('claims').values())

    def stake_claim(self, owner):
        """Write down on every node that an owner claims this instance."""
        self._each('stake_claim', owner)

    def withdraw_claim(self, owner):
        """Take the claim of an owner away from every node."""
        self._claims_it = self._claims_it and owner != self._state.id
        self._each('withdraw_claim', owner)

    # Images

    def bring(self, image, name, on_line):
        """See that a node has an image: it is brought from one that has it."""
        node = self._node(name)
        if node.call(lambda: node.has_image(image)):  # whatever else is on its way there
            return
        with node.bringing:
            if node.call(lambda: node.has_image(image)):
                return
            source = next((other for other in self.ready() if other is not node
                           and other.platform == node.platform
                           and other.call(lambda other=other: other.has_image(image))), None)
            if source is None:  # it went with its node; the next turn builds it anew
                raise EngineUnavailable(f'No node that answers has the image {image} any more.')
            begun = time.monotonic()
            node.call(lambda: source.call(lambda: self._distribution.bring(image, source, node, on_line)))
            log.info('Image %s was brought from node %s to %s in %.0f s.', image, source.name, name,
                     time.monotonic() - begun)

    def close(self):
        """Follow no node any more."""
        nodes = list(self._nodes.values())
        gevent.killall([item for item in [self._listing, *(node.greenlet for node in nodes)] if item])
        for node in nodes:
            node.link.close()
        self._source.close()


def engine_of(config, state):
    """Return the client that builds images, and the one engine or the nodes that DOCKER_HOST names."""
    def connect(host, node=''):
        return DockerClient(host=host, tls_verify=config.docker_tls_verify, cert_path=config.docker_cert_path,
                            node=node)
    if config.has_nodes:
        nodes = Nodes(config, state, connect)
        return nodes.builder, nodes
    client = connect(config.docker_host)
    return client, Engine(client, instance=config.instance, recorded=state.container_of)
