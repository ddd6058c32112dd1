"""The warm pool: workspaces that are made ahead, and wait for whoever they will belong to.

A member is what a create makes but for its owner: container, volumes, ports, project, and an editor that
listens. It has the id that its workspace will have. Its container's name has `.pool.` in it, which no
workspace's has, and its labels say what it was made of. Its entrypoint waits for settings, takes them once,
and says so to whoever gave them: it is the arbiter, so nobody is given a member that another one has.
"""
import hashlib
import json
import logging
import time
from dataclasses import dataclass, field

import gevent
import gevent.event

from _agentbackend.dockerclient import Container
from _agentbackend.engine import MEMBER, PREFIX
from _agentbackend.errors import BackendError, DockerError, EngineUnavailable, MissingOnEngine
from _agentbackend.probes import Start
from _agentbackend.recipe import SETTINGS_FOLDER
from _agentbackend.records import AGENT, PERSISTENT, Workspace

log = logging.getLogger('agentbackend')

LOOK_PAUSE = 10  # seconds between looks whether the members are well
FIRST_RETRY, LAST_RETRY = 10, 300  # seconds after a member could not be made, doubled each time
READY_PAUSE = 0.05  # seconds between looks at one that is made
MAX_SICK = 2  # looks in a row at which an editor does not answer
ROOM = 128 * 2**20  # bytes of memory that each container on the engine is counted with
SPARE_PORTS = 0.1  # of each range, which are left to workspaces
PROTOCOL = 1  # of what an entrypoint is told; members of another one are not used


@dataclass
class Kind:
    """What is wanted of one template, and how that goes."""

    name: str  # TEMPLATE, or TEMPLATE/agent
    wanted: int
    making: bool = False
    claimed: int = 0
    missed: int = 0  # creates that would have had a member if there had been one
    error: str = None
    failures: int = 0
    retry_at: float = 0

    @property
    def template(self):
        """The name of its template."""
        return self.name.partition('/')[0]

    @property
    def type(self):
        """The type that its workspaces have, or may have."""
        return AGENT if self.name.endswith(f'/{AGENT}') else PERSISTENT


@dataclass
class Member:
    """A workspace without an owner."""

    id: str
    kind: str
    made_of: str
    container: Container
    ports: dict = field(default_factory=dict)
    node: str = ''
    sick: int = 0


class Pool:
    """Keeps the members that WARM_POOL wants, and gives them away."""

    def __init__(self, config, state, engine, templates, recipe, probes):
        self._config = config
        self._state = state
        self._engine = engine
        self._templates = templates
        self._recipe = recipe
        self._probes = probes
        self._kinds = {name: Kind(name, count) for name, count in config.warm_pool.items()}
        self._members = {}  # id -> Member; one that is taken is in it no more
        self._made_now, self._ports_now = None, set()  # id and ports of the one that is made just now
        self._looked_at = 0

    # What a create uses

    def take(self, draft, tag):
        """Give away a member that fits a workspace that is to be, or None. It never waits, so nobody else
        takes the same."""
        kind = self._kinds.get(f'{draft.template}/{AGENT}' if draft.type == AGENT else draft.template)
        if kind is None or not draft.ssh or draft.wanted_ports:
            return None
        made_of = self._made_of(kind, tag)
        found = next((item for item in self._members.values()
                      if item.kind == kind.name and item.made_of == made_of), None)
        if found is None:
            kind.missed += 1
            return None
        kind.claimed += 1
        return self._members.pop(found.id)

    def give_back(self, member):
        """Take back a member that was given to nobody in the end."""
        self._members[member.id] = member
        self._kinds[member.kind].claimed -= 1

    def give_up_one(self, kind):
        """Remove a member, so that its port of a kind is free; return False when there is none."""
        if not self.used_ports()[kind]:
            return False
        self._remove(next(iter(self._members)))
        return True

    def ports(self):
        """Return the host ports that members hold."""
        return self._ports_now.union(*(item.ports.values() for item in self._members.values()))

    def view(self):
        """Return how each kind does, {name: {wanted, ready, making, claimed, missed, error}}."""
        return {kind.name: {'wanted': kind.wanted, 'ready': self._count(kind), 'making': int(kind.making),
                            'claimed': kind.claimed, 'missed': kind.missed, 'error': kind.error}
                for kind in self._kinds.values()}

    def used_ports(self):
        """Return how many ports of each kind members hold, {kind: number}."""
        return {'codeServer': len(self._members), 'ssh': len(self._members), 'custom': 0}

    # What keeps it in step

    def look(self):
        """Compare with the engine: free is only what says so itself in every way; all else of the pool that
        has no record is removed."""
        found = self._engine.members()
        for member_id in self._members.keys() - found.keys():
            self._members.pop(member_id, None)
        for member_id, (container, given_away) in found.items():
            if member_id in {*self._members, self._made_now} or self._state.has(member_id):
                continue
            member = None if given_away else self._member_of(container)
            if member is None or self._engine.get_file(container.id, f'{SETTINGS_FOLDER}/taken'):
                self._remove(member_id)
            elif not self._state.has(member_id):  # asked again, since reading took its time
                self._members[member_id] = member

    def tend(self, is_quiet):
        """Remove what is stale or sick, and make one that lacks if nobody else works just now."""
        if time.monotonic() - self._looked_at >= LOOK_PAUSE:
            self.look()
            self._look_after()
            self._looked_at = time.monotonic()
        for kind in self._kinds.values():
            if self._count(kind) < kind.wanted and time.monotonic() >= kind.retry_at and is_quiet():
                self._make(kind)
                return

    def _look_after(self):
        for member in list(self._members.values()):
            kind, container = self._kinds.get(member.kind), self._engine.inspect(member.container.id)
            if kind is None or container is None or not container.up or not self._is_current(kind, member):
                self._drop(member)
                continue
            answers = self._probes.health(member, container.id) is not None
            member.sick = 0 if answers else member.sick + 1
            if member.sick >= MAX_SICK:
                log.warning('A %s that waits in the pool answers no more and is made anew.', member.kind)
                self._drop(member)
        for kind in self._kinds.values():  # what is too many, after WARM_POOL was made smaller
            for member in [item for item in self._members.values() if item.kind == kind.name][kind.wanted:]:
                self._drop(member)

    def _drop(self, member):
        if self._members.get(member.id) is member:  # nobody was given it meanwhile
            self._remove(member.id)

    def _remove(self, member_id):
        self._members.pop(member_id, None)
        self._engine.remove(member_id)

    def _is_current(self, kind, member):
        try:
            return member.made_of == self._made_of(kind, self._templates.tag(kind.template))
        except BackendError:  # there is no such template any more, or it cannot be read
            return False

    def _count(self, kind):
        return sum(item.kind == kind.name for item in self._members.values())

    def _made_of(self, kind, tag):
        config = self._config
        parts = [PROTOCOL, tag, kind.type, config.workspace_base_path, config.workspace_bind_address,
                 config.workspace_network, config.workspace_memory, config.workspace_cpus,
                 config.workspace_pids]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def _member_of(self, container):
        """Return a free member as the engine tells of it, or None for what is none."""
        if container is None or not container.up:
            return None
        try:
            kind, made_of = container.labels[MEMBER].split()
            ports = json.loads(container.labels[f'{PREFIX}.ports'])
            member = Member(container.labels[f'{PREFIX}.id'], kind, made_of, container, ports, container.node)
            is_free = container.ports == set(ports.values()) and kind in self._kinds
        except (KeyError, ValueError, AttributeError):
            return None
        return member if is_free and self._is_current(self._kinds[kind], member) else None

    # Making one

    def _make(self, kind):
        kind.making = True
        try:
            member = self._made(kind)
            self._members[member.id] = member
            kind.error, kind.failures = None, 0
            log.info('A %s waits in the pool: %d of %d.', kind.name, self._count(kind), kind.wanted)
        except EngineUnavailable:
            raise
        except BackendError as error:
            pause = min(FIRST_RETRY * 2**kind.failures, LAST_RETRY)
            is_told = kind.error == str(error)
            kind.error, kind.retry_at = str(error), time.monotonic() + pause
            kind.failures += not isinstance(error, MissingOnEngine)  # which will come by itself
            log.log(logging.DEBUG if is_told else logging.WARNING,
                    'No %s could be made for the pool; the next try comes in %d s: %s', kind.name, pause,
                    error)
        finally:
            kind.making, self._made_now, self._ports_now = False, None, set()

    def _made(self, kind):
        """Make a member and wait until it waits; return it. It builds no image: who needs one does."""
        tag = self._templates.tag(kind.template)
        if not self._templates.hears(tag) and not self._templates.is_there(tag):
            raise MissingOnEngine('Its image is not there yet; the first create builds it, or PREBUILD does.')
        if not self._templates.hears(tag):
            raise DockerError('The entrypoint of its image does not take its settings over stdin, as that '
                              'of templates/base does; see templates/README.md.')
        names, taken = self._engine.taken()
        if len(names) * ROOM + ROOM > self._engine.info()['memory']:
            raise DockerError(f"The engine's memory holds no more than {len(names)} containers, counted with "
                              f'{ROOM // 2**20} MB each.')
        draft = Workspace(id='', name='', folder='', created_at=time.time(), template=kind.template,
                          type=kind.type, memory=self._config.workspace_memory)
        self._state.propose(draft, taken_ports=taken | self.ports(), is_free=self._recipe.is_free,
                            spare=SPARE_PORTS)
        self._made_now, self._ports_now = draft.id, set(draft.ports.values())
        made_of = self._made_of(kind, tag)
        try:
            container_id = self._start(draft, tag, f'{kind.name} {made_of}')
            container = self._wait_until_it_waits(draft, container_id)
            return Member(draft.id, kind.name, made_of, container, draft.ports, draft.node)
        except BaseException:
            self._engine.remove(draft.id)
            raise

    def _start(self, draft, tag, made_of):
        network = self._recipe.network(draft)
        labels = {f'{PREFIX}.id': draft.id, f'{PREFIX}.instance': self._engine.instance, MEMBER: made_of}
        for volume in (self._engine.volume_of(draft.id), self._engine.home_of(draft.id)):
            self._engine.create_volume(volume, labels)
        arguments = self._recipe.container(draft, tag, network, stdin=True)
        told = ('WORKSPACE_ID', 'WORKSPACE_TYPE', 'WORKSPACE_BASE_PATH', 'WORKSPACE_SETTINGS')
        arguments |= {'name': self._engine.member_name(draft.id), 'hostname': draft.id,
                      'labels': labels | {f'{PREFIX}.ports': json.dumps(draft.ports)},
                      'env': {name: arguments['env'][name] for name in told}}
        container_id = self._engine.create_container(**arguments)
        self._engine.start(container_id, network)
        return container_id

    def _wait_until_it_waits(self, draft, container_id):
        """Wait until a new member waits for its owner, and return its Container."""
        start, until = Start(container_id), time.monotonic() + self._config.ready_timeout
        while True:
            container = self._engine.inspect(container_id)
            if container is None or not container.up:
                raise DockerError(self._probes.why_it_ended(container) if container else 'It was removed.')
            self._probes.listen(start, container)
            if start.is_late:
                raise DockerError('The code-server of its image is another one inside than that of '
                                  'templates/base, and cannot wait for an owner.')
            if start.waits and self._probes.health(draft, container_id) is not None:
                return container
            if time.monotonic() > until:
                raise DockerError('It did not come to wait for an owner within '
                                  f'READY_TIMEOUT={self._config.ready_timeout} s.')
            gevent.sleep(READY_PAUSE)
