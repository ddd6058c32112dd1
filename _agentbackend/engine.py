"""Containers, volumes and networks on a Docker engine.

Knows nothing of HTTP; knows a workspace only by its id, a label on its containers and volumes.
"""
import collections
import contextlib
import json
import secrets
import socket
import tarfile
import tempfile
import time

import docker
import gevent
import gevent.lock

from _agentbackend.alone import Alone
from _agentbackend.dockerclient import container_of, make_tar, measure
from _agentbackend.dockerlog import LogDamaged, LogLines, parse_stamp
from _agentbackend.errors import DockerError, EngineUnavailable, UnreadableLog
from _agentbackend.positions import MARGIN
from _agentbackend.timing import cooperatively, parse_time

PREFIX = 'agentbackend'  # of our labels and images
CODE_SERVER_PORT, SSH_PORT = 8443, 2222  # inside every workspace
USER, USER_ID = 'dev', 1000
HEARS = f'{PREFIX}.settings'  # label of an image whose entrypoint takes its settings over stdin
MEMBER = f'{PREFIX}.pool'  # label of what was made ahead: for what, and of what
# What sshd, sudo and apt need of root; the rest is dropped. No new privileges besides for agent workspaces.
CAPABILITIES = ('CHOWN', 'DAC_OVERRIDE', 'FOWNER', 'FSETID', 'KILL', 'SETGID', 'SETUID', 'SYS_CHROOT',
                'AUDIT_WRITE')
# Events of the engine that matter here.
CHANGES = ('start', 'die', 'oom', 'destroy', 'pause', 'unpause', 'rename')
MIN_SHARED = 64 * 2**20  # bytes of shared memory, of which a browser needs more than the engine's own default
INFO_TIMEOUT = 10  # seconds
RUN_TIMEOUT = 60  # seconds that a short command may take
REMOVE_TIMEOUT = 30  # seconds that a removal may be waited for
HELPER_LIFE = 6 * 3600  # seconds
MAX_PRINTED = 2**16  # bytes that are taken of what a short command prints
LINES_AT_ONCE = 200  # of a log, when they are not waited for
MAX_TAIL = 100_000  # last lines that are counted; of more, the pieces that the engine counts
MAX_IN_MEMORY = 2**20  # bytes of a file that is read; a larger one goes over the disk
PIECE = 65536  # bytes


def labelled_ports(labels):
    """Return the host ports that a container's labels name; anybody may write such labels."""
    try:
        ports = json.loads(labels.get(f'{PREFIX}.ports', '{}')).values()
    except (ValueError, AttributeError, RecursionError):
        return set()
    return {port for port in ports if isinstance(port, int)}


class Engine(Alone):
    """One Docker engine. Every method may raise DockerError, and EngineUnavailable when nothing answers.

    A `node` names the machine of one that is several; this one takes no note of it.

    `recorded(workspace_id)` gives the id of the container that was made for a workspace, as far as it is
    known.
    """

    def __init__(self, client, *, instance='default', recorded=lambda workspace_id: None):
        self._client = client
        self._errors = client.errors
        self._recorded = recorded
        self.instance = instance
        self._cpus = self._network = None  # as far as they are known
        self._starts = gevent.lock.BoundedSemaphore(8)  # more at once only queue up inside the engine

    @property
    def _api(self):
        return self._client.api

    def info(self):
        """Return {cpus, memory, time} of the engine; `time` is its own clock in seconds since the epoch."""
        with self._errors(), gevent.Timeout(INFO_TIMEOUT, self._client.silence(INFO_TIMEOUT)):
            info = self._api.info()
        return {'cpus': info.get('NCPU') or 1, 'memory': info.get('MemTotal') or 0,
                'time': parse_time(info.get('SystemTime'))}

    def cpus(self, node=''):
        """Return how many cores there are."""
        if self._cpus is None:
            self._cpus = self.info()['cpus']
        return self._cpus

    def ping(self, node=''):
        """Raise EngineUnavailable unless the engine answers."""
        self._client.ping()

    def is_leaving(self, node=''):
        """Return whether the engine takes no new connections: one that shuts down still answers on the old
        ones."""
        try:
            self._client.close()  # those that are kept
            self.ping()
        except EngineUnavailable:
            return True
        return False

    def is_free(self, address, port):
        """Return whether nothing listens on a port that is to be published, as far as that is known here."""
        return not self._client.is_local or is_bindable(address, port)

    def image_names(self):
        """Return the names of the images of templates that are there."""
        with self._errors():
            found = self._api.images(filters={'label': f'{PREFIX}.template'})
        return sorted(tag for item in found for tag in item['RepoTags'] or () if tag.startswith(PREFIX))

    # What there is

    def taken(self):
        """Return (names, host ports) of every container on the engine, ours or not, running or not."""
        with self._errors():
            found = self._api.containers(all=True)
        names = {name.lstrip('/') for item in found for name in item.get('Names') or ()}
        ports = {port['PublicPort'] for item in found for port in item.get('Ports') or ()
                 if 'PublicPort' in port}
        # A stopped container publishes nothing, but its ports are wanted back when it starts.
        return names, ports.union(*[labelled_ports(item.get('Labels') or {}) for item in found])

    def volume_of(self, workspace_id):
        """Return the name of a workspace's volume, by which it is known."""
        return f'{self.instance}-{workspace_id}'

    def home_of(self, workspace_id):
        """Return the name of the volume with a workspace's home folder."""
        return f'{self.volume_of(workspace_id)}-home'

    def hold_of(self, workspace_id):
        """Return the name of the empty volume whose labels tell what has become of a member of the pool."""
        return f'{self.volume_of(workspace_id)}-hold'

    def member_name(self, workspace_id):
        """Return the name of the container of a member of the pool; none of a workspace is like it."""
        return f'{self.instance}.pool.{workspace_id}'

    def volumes(self):
        """Return {workspace id: labels} of this instance's volumes."""
        labels = {item['Name']: item['Labels']
                  for item in self._volumes(f'{PREFIX}.instance={self.instance}')}
        ids = {item.get(f'{PREFIX}.id') for item in labels.values()}
        # What was made ahead and is a workspace now has the labels of that on a volume of their own.
        return {key: labels.get(self.hold_of(key), labels[self.volume_of(key)]) for key in ids
                if self.volume_of(key) in labels
                and (MEMBER not in labels[self.volume_of(key)] or self.hold_of(key) in labels)}

    def has_volume(self, workspace_id):
        """Return whether a workspace's volume is there, by asking for it and not by a list that may lack
        something."""
        return self._is_volume(self.volume_of(workspace_id), workspace_id)

    def _is_volume(self, name, workspace_id):
        with self._errors():
            try:
                found = self._api.inspect_volume(name)
            except docker.errors.NotFound:
                return False
        return (found['Labels'] or {}).get(f'{PREFIX}.id') == workspace_id

    def containers(self):
        """Return {workspace id: Container} of this instance."""
        return {item.labels[f'{PREFIX}.id']: item for item in reversed(self._ours())
                if not self._waits(item) or item.id == self._recorded(item.labels[f'{PREFIX}.id'])}

    def members(self):
        """Return {id: (Container or None, whether it was given away)} of what was made ahead and is no
        workspace, or not for sure."""
        volumes = {item['Name']: item['Labels'] for item in self._volumes(MEMBER)
                   if item['Labels'].get(f'{PREFIX}.instance') == self.instance}
        ids = {item[f'{PREFIX}.id'] for name, item in volumes.items()
               if name == self.volume_of(item.get(f'{PREFIX}.id'))}
        containers = {item.labels[f'{PREFIX}.id']: item for item in self._ours(MEMBER)}
        found = {key: (item, self._is_volume(self.hold_of(key), key)) for key, item in containers.items()
                 if self._waits(item)}
        # What was given away has a hold, or else a container that knows nothing of the pool any more.
        return found | {key: (None, False) for key in ids - containers.keys()
                        if not self._is_volume(self.hold_of(key), key) and self.find(key) is None}

    def _waits(self, container):
        return container.name == self.member_name(container.labels.get(f'{PREFIX}.id'))

    def find(self, workspace_id):
        """Return the Container of a workspace, or None."""
        return next(iter(self._ours(f'{PREFIX}.id={workspace_id}')), None)

    def inspect(self, container_id):
        """Return the Container with this id, or None."""
        with self._errors():
            try:
                found = self._api.inspect_container(container_id)
            except docker.errors.NotFound:
                return None
        return container_of(found, self._client.node)

    def changes(self, since):
        """Yield the id of a workspace whenever its container changed, beginning at `since` (the engine's
        clock)."""
        filters = {'type': 'container', 'label': f'{PREFIX}.instance={self.instance}'}
        with self._errors(), contextlib.closing(
                self._api.events(since=int(since), decode=True, filters=filters)) as stream:
            for item in stream:
                if item.get('Action', '').split(':')[0] in CHANGES:
                    yield item['Actor']['Attributes'].get(f'{PREFIX}.id', '')

    def _volumes(self, label):
        with self._errors():
            found = self._api.volumes(filters={'label': label})['Volumes'] or ()
        return [item for item in found if item['Labels']]

    def _ours(self, *labels):
        """Return the containers of workspaces, oldest first.

        Labels prove nothing, since an image that was made of a workspace bears them too, and with it each
        container of that image: ours mount the workspace's volume, and have an id that was recorded or the
        instance in their name.
        """
        with self._errors():
            found = self._api.containers(all=True,
                                         filters={'label': [*labels, f'{PREFIX}.instance={self.instance}']})
        # A list tells neither exit code nor out-of-memory.
        inspected = [self.inspect(item['Id']) for item in found]
        return sorted((item for item in inspected if item and self._is_ours(item)),
                      key=lambda item: item.created_at)

    def _is_ours(self, container):
        workspace_id = container.labels.get(f'{PREFIX}.id')
        if self.volume_of(workspace_id) not in container.volumes:
            return False
        return (container.name.startswith(f'{self.instance}-') or self._waits(container)
                or container.id == self._recorded(workspace_id))

    # Making and removing

    def create_network(self, *, isolated, node=''):
        """Make the network of this instance unless it is there, and return its name.

        On an isolated one containers don't reach each other.
        """
        name = f'{PREFIX}-{self.instance}'
        with self._errors():
            if self._network:  # a manager without a leader answers by the id alone, since it asks nobody else
                with contextlib.suppress(docker.errors.NotFound):
                    self._api.inspect_network(self._network)
                    return name
            found = [item for item in self._api.networks(names=[name]) if item['Name'] == name]
            options = {'com.docker.network.bridge.enable_icc': 'false'} if isolated else {}
            self._network = (found[0] if found else self._api.create_network(
                name, driver='bridge', options=options, check_duplicate=True,
                labels={f'{PREFIX}.instance': self.instance}))['Id']
        return name

    def remove_network(self):
        """Remove the network of this instance; one that is gone, or in use, is left alone."""
        with self._errors():
            try:
                self._api.remove_network(f'{PREFIX}-{self.instance}')
            except docker.errors.APIError as error:
                if error.status_code not in (403, 404, 409):
                    raise

    def create_volume(self, name, labels):
        """Make a volume; one of that name may exist already."""
        with self._errors():
            self._api.create_volume(name, labels=labels)

    def create_container(self, *, name, image, env, labels, volumes, network, ports, bind_address, memory,
                         cpus,
                         pids, new_privileges, stdin=False, hostname=''):
        """Create a container and return its id. `volumes` is {where: name}, `ports` {container port: host
        port}; with `stdin` that of its first process stays open, for `tell`.

        It restarts by itself only after `keep_running`. The host is `host.docker.internal` in it.
        """
        with self._errors(), self._starts:
            host_config = self._api.create_host_config(
                mounts=[docker.types.Mount(target=where, source=volume, type='volume')
                        for where, volume in volumes.items()],
                port_bindings={f'{inside}/tcp': (bind_address, outside) for inside, outside in ports.items()},
                network_mode=network, init=True, mem_limit=memory, nano_cpus=int(cpus * 1e9), pids_limit=pids,
                shm_size=max(MIN_SHARED, memory // 4), extra_hosts={'host.docker.internal': 'host-gateway'},
                cap_drop=['ALL'], cap_add=list(CAPABILITIES),
                security_opt=[] if new_privileges else ['no-new-privileges'],
                log_config=docker.types.LogConfig(
                    type='json-file', config={'max-size': '16m', 'max-file': '3'}))
            made = self._api.create_container(
                image, name=name, hostname=hostname or name[:63], environment=env, labels=labels, detach=True,
                ports=[(inside, 'tcp') for inside in ports], host_config=host_config, stdin_open=stdin)
            return made['Id']

    def start(self, container_id, network):
        """Start a container, on a network that is there; one that runs is left alone.

        Raises PortTaken when a port of it is in use.
        """
        with self._errors(), self._starts:
            try:
                self._api.start(container_id)
            except docker.errors.NotFound as error:
                # While it was stopped, somebody tidied its network away; one of that name is another one.
                if 'network' not in (error.explanation or ''):
                    raise
                self._api.disconnect_container_from_network(container_id, network, force=True)
                self._api.connect_container_to_network(container_id, network)
                self._api.start(container_id)

    def limit(self, container_id, *, memory, cpus):
        """Give a container, running or not, other limits; raise DockerError when it uses more memory
        already."""
        # The engine takes no other kind of CPU limit once it has this one.
        limits = {'Memory': memory, 'MemorySwap': 2 * memory, 'NanoCpus': int(cpus * 1e9)}
        with self._errors():
            self._client.update(container_id, limits)

    def keep_running(self, container_id):
        """Let the engine start a container again after a crash or a reboot, unless it was stopped on
        purpose."""
        with self._errors():
            self._api.update_container(container_id, restart_policy={'Name': 'unless-stopped'})

    def stop(self, container_id, timeout):
        """Stop a container; one that is stopped or gone is left alone."""
        with self._errors(), contextlib.suppress(docker.errors.NotFound):
            self._api.stop(container_id, timeout=timeout)

    def rename(self, container, name):
        """Rename a Container, which may have the name already; raise ConflictOnEngine when another has it."""
        if container.name != name:
            with self._errors():
                self._api.rename(container.id, name)

    def remove_container(self, container_id):
        """Remove a container, running or not; one that is gone is fine."""
        with self._errors():
            self._until_gone(self._api.remove_container, self._api.inspect_container, container_id,
                             force=True, v=True)

    def remove(self, workspace_id):
        """Remove every container and volume of a workspace, running or not; what is gone already is fine.

        The volume by which it is known goes last: what a crash leaves is removed by the next try.
        """
        self.remove_helpers(workspace_id)
        for container in self._ours(f'{PREFIX}.id={workspace_id}'):
            self.remove_container(container.id)
        for name in (self.home_of(workspace_id), self.hold_of(workspace_id), self.volume_of(workspace_id)):
            if self._is_volume(name, workspace_id):
                with self._errors():
                    self._until_gone(self._api.remove_volume, self._api.inspect_volume, name, force=True)

    # Helpers: containers that live for moments, beside one that is stopped

    @contextlib.contextmanager
    def helper(self, container, workspace_id):
        """Give the id of a container that runs for the length of a block, with image and volumes of another.

        It ends by itself, so that a server that was killed leaves none for long.
        """
        with self._errors(), self._starts:
            found = self._api.inspect_container(container.id)
            mounts = [docker.types.Mount(target=mount['Destination'], source=mount['Name'], type='volume')
                      for mount in found['Mounts'] if mount.get('Type') == 'volume']
            limits = found['HostConfig']  # what is in the project may run in it, as a filter of git does
            host_config = self._api.create_host_config(
                mounts=mounts, network_mode='none', init=True, auto_remove=True, cap_drop=['ALL'],
                security_opt=['no-new-privileges'], mem_limit=limits['Memory'],
                memswap_limit=limits['MemorySwap'], pids_limit=limits['PidsLimit'],
                nano_cpus=limits['NanoCpus'])
            helper = self._api.create_container(
                container.image, entrypoint=['sleep', str(HELPER_LIFE)], host_config=host_config,
                name=f'{PREFIX}-helper-{secrets.token_hex(8)}', environment=found['Config']['Env'] or [],
                labels={f'{PREFIX}.instance': self.instance, f'{PREFIX}.helper': workspace_id})['Id']
        try:
            with self._errors(), self._starts:
                self._api.start(helper)
            yield helper
        finally:
            with contextlib.suppress(DockerError):
                self.remove_container(helper)

    def remove_helpers(self, workspace_id=None):
        """Remove the helpers of a workspace, or all of this instance."""
        label = f'{PREFIX}.helper' + (f'={workspace_id}' if workspace_id else '')
        with self._errors():
            found = self._api.containers(all=True, filters={'label': [
                label, f'{PREFIX}.instance={self.instance}']})
        for item in found:
            self.remove_container(item['Id'])

    @staticmethod
    def _until_gone(remove, inspect, name, **options):
        """Remove and wait for it: the engine answers 409 while another call removes the same, or lets go of a
        volume."""
        deadline = time.monotonic() + REMOVE_TIMEOUT
        while True:
            try:
                remove(name, **options)
                inspect(name)
            except docker.errors.NotFound:
                return
            except docker.errors.APIError as error:
                if error.status_code != 409 or time.monotonic() > deadline:
                    raise
            gevent.sleep(0.1)

    # Claims to the instance

    def claims(self):
        """Return the owners who claim this instance."""
        found = self._volumes(f'{PREFIX}.claim={self.instance}')
        return {item['Labels'][f'{PREFIX}.owner'] for item in found if f'{PREFIX}.owner' in item['Labels']}

    def stake_claim(self, owner):
        """Write down on the engine that an owner claims this instance."""
        labels = {f'{PREFIX}.claim': self.instance, f'{PREFIX}.owner': owner}
        self.create_volume(self._claim_of(owner), labels)

    def withdraw_claim(self, owner):
        """Take the claim of an owner away; one that is gone is fine."""
        with self._errors(), contextlib.suppress(docker.errors.NotFound):
            self._api.remove_volume(self._claim_of(owner))

    def _claim_of(self, owner):
        return f'{PREFIX}-{self.instance}-claim-{owner}'

    # Inside a container

    def tell(self, container_id, data, answers=()):
        """Write to the stdin of a container's first process, started or not; return what it prints until the
        last of the answers, (text, seconds that it may take)."""
        said = b''
        with self._errors(), self._client.attached_to(container_id) as attached:
            attached.sendall(data)
            printed = iter(attached)
            for text, seconds in answers:
                with gevent.Timeout(seconds, False):
                    while text not in said and (more := next(printed, None)):
                        said += more[1]
        return said

    def put_files(self, container_id, files):
        """Write {absolute path: (bytes, mode, owner)} into a container, started or not."""
        with self._errors():
            self._api.put_archive(container_id, '/', make_tar(files))

    def read_file(self, container_id, path, *, limit=None):
        """Yield the bytes of a file in a container, started or not, at most `limit`; nothing when there is
        none."""
        with tempfile.SpooledTemporaryFile(MAX_IN_MEMORY) as copied:
            # The engine locks the container as long as it is read from, even against an inspect, so nobody
            # may read slowly.
            for data in cooperatively(self._pieces(container_id, path)):
                copied.write(data)
                if limit is not None and copied.tell() >= limit:
                    copied.truncate(limit)
                    break
            copied.seek(0)
            yield from iter(lambda: copied.read(PIECE), b'')

    def get_file(self, container_id, path):
        """Return the first 64 KB of a file in a container, started or not; nothing when there is none."""
        return b''.join(self.read_file(container_id, path, limit=MAX_PRINTED))

    def log_lines(self, container, *, since=0, tail=None, follow=False):
        """Yield lists of lines, (stream, stamp, text), of a container's output.

        From `since` (nanoseconds, inclusive) on, or the last `tail` lines; with `follow` until the container
        ends.
        """
        if tail and tail <= MAX_TAIL and not follow:
            yield from self._last_lines(container, since, tail)
        else:
            yield from self._read_log(container, LogLines(container.tty), since, tail, follow)

    def _last_lines(self, container, since, count):
        """Yield the last lines, so many. The engine counts pieces, of which a long line has several, and may
        begin with one from the midst of a line."""
        pieces = count + 1  # the first line may lack its beginning
        while True:
            lines, found, firsts = LogLines(container.tty), collections.deque(maxlen=count), {}
            try:
                for batch in self._read_log(container, lines, since, pieces):
                    for line in batch:
                        firsts.setdefault(line[0], line)
                        found.append(line)
            except UnreadableLog:
                yield list(found)
                raise
            # A piece has the stamp of its line's first one: what is cut came before all that is not.
            begun = min((parse_stamp(stamp) for _, stamp, _ in firsts.values()), default=0) + MARGIN
            cut = [line for line in firsts.values() if parse_stamp(line[1]) <= begun]
            enough = len(found) == count and not any(line is one for line in found for one in cut)
            if enough or lines.pieces < pieces:
                yield list(found)
                return
            pieces *= 4

    def _read_log(self, container, lines, since, tail, follow=False):
        """Yield lists of the lines that `lines` makes of a log; of `tail` the engine counts pieces."""
        params = {'stdout': 1, 'stderr': 1, 'timestamps': 1, 'follow': int(follow),
                  'tail': 'all' if tail is None else tail}
        if since:
            params['since'] = f'{since // 1_000_000_000}.{since % 1_000_000_000:09d}'
        batch, enough = [], 1 if follow else LINES_AT_ONCE
        with self._errors(), self._client.get('/containers/{0}/logs', container.id, params,
                                              timeout=None) as answer:
            for data in cooperatively(self._client.pieces(answer)):
                try:
                    batch += lines.feed(data)
                except LogDamaged:
                    yield batch
                    raise
                if len(batch) >= enough:
                    yield batch
                    batch = []
        now = self.inspect(container.id) if follow else None
        # While it runs, only the stream was cut off, maybe within a line.
        batch += [] if now and now.up else lines.end()
        if batch:
            yield batch

    def run(self, container_id, command, *, user='', stdin=b'', timeout=None, limit=MAX_PRINTED):
        """Run a short command in a container; return (exit code, the first `limit` bytes on its stdout).

        What it is given on stdin shows nowhere, its arguments do. Its stdin stays open behind that.
        """
        timeout = timeout or RUN_TIMEOUT
        late, printed = DockerError(f'The command {command[0]} in the container did not end within {timeout} '
                                    's.'), bytearray()
        with self._errors(), gevent.Timeout(timeout, late):
            running = self._api.exec_create(container_id, command, stdin=bool(stdin), stderr=False, user=user)
            for _, data in self._client.attach(running['Id'], stdin):
                printed += data[:limit - len(printed)]
            return self._api.exec_inspect(running['Id'])['ExitCode'], bytes(printed)

    def run_detached(self, container_id, command, *, user, env, workdir):
        """Start a command in a container that needs nobody from then on."""
        with self._errors():
            running = self._api.exec_create(container_id, command, stdout=False, stderr=False, user=user,
                                            environment=env,
                                            workdir=workdir)
            self._api.exec_start(running['Id'], detach=True)

    def follow(self, container_id, command, *, user, env=None):
        """Run a command in a container and yield (stream, bytes) of what it prints.

        Its stdin ends when the reader goes, or is killed.
        """
        with self._errors():
            running = self._api.exec_create(container_id, command, stdin=True, user=user, environment=env)
            yield from self._client.attach(running['Id'])

    @contextlib.contextmanager
    def attached(self, container_id, command, *, user, env=None):
        """Run a command in a container for the length of a block, which is given its dockerclient.Attached.

        Raises MissingOnEngine and ConflictOnEngine when the container is gone, or does not run.
        """
        with self._errors():
            running = self._api.exec_create(container_id, command, stdin=True, user=user, environment=env)
            with self._client.attached(running['Id']) as attached:
                yield attached

    def usage(self, container_id):
        """Yield {cpu_percent, memory, memory_limit} once a second until the container ends; CPU in percent
        of one core."""
        with self._errors():
            for sample in self._api.stats(container_id, decode=True, stream=True):
                usage = measure(sample)
                if usage:
                    yield usage

    def _pieces(self, container_id, path):
        with self._errors(), contextlib.suppress(docker.errors.NotFound), \
                self._client.get('/containers/{0}/archive', container_id, {'path': path}) as answer, \
                tarfile.open(fileobj=answer, mode='r|') as archive:
            member = archive.next()
            if member is not None and member.isfile():
                content = archive.extractfile(member)
                yield from iter(lambda: content.read(PIECE), b'')


def is_bindable(address, port):
    """Return whether nothing listens on a host port. An address that is not this machine's tells nothing, so
    it passes."""
    family = socket.AF_INET6 if ':' in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # A connection in TIME_WAIT is no listener.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            return error.errno not in (98, 13)  # EADDRINUSE, EACCES
    return True
