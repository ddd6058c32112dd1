"""What speaks with Docker; knows nothing of HTTP, and of a workspace only its id, which its containers and volumes bear as a label.

Engine      everything that docker-py is needed for; our errors come out
Templates   folders with a Dockerfile, and the images built from them
"""
import collections
import contextlib
import hashlib
import io
import json
import logging
import os
import re
import signal
import subprocess
import tarfile
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import docker
import gevent
import gevent.event
import gevent.lock
import requests.exceptions
import urllib3.exceptions

from agentbackend_config import (
    BackendError,
    ConflictOnEngine,
    DockerError,
    EngineUnavailable,
    MissingOnEngine,
    PortTaken,
    Superseded,
    UnreadableLog,
    UnreadableTemplate,
    ValidationError,
)
from agentbackend_wire import LogDamaged, LogLines, politely, read_frames

log = logging.getLogger('agentbackend')


# ---------------------------------------------------------------------------------------------
# Engine
# ---------------------------------------------------------------------------------------------

PREFIX = 'agentbackend'  # of our labels and images
CODE_SERVER_PORT, SSH_PORT = 8443, 2222  # inside every workspace
USER = 'dev'
# What sshd, sudo and apt need of root; the rest is dropped. No new privileges besides for agent workspaces.
CAPABILITIES = ('CHOWN', 'DAC_OVERRIDE', 'FOWNER', 'FSETID', 'KILL', 'SETGID', 'SETUID', 'SYS_CHROOT', 'AUDIT_WRITE')
# The engine's words for a port that is taken, of old and new versions, by a container or by another program.
PORT_CONFLICT = re.compile(r'port is already allocated|address already in use')
CONFLICTING_PORT = re.compile(r':(\d+)(?: failed|: bind|/tcp)')
RUN_PATIENCE = 60  # seconds that a short command may take
MAX_PRINTED = 2**16  # bytes that are taken of what it prints, or of a small file
BATCH = 200  # lines of a log that are given together when they are not waited for
MAX_IN_MEMORY = 2**20  # bytes of a file that is read; a larger one goes over the disk
PULL_PATIENCE = 30  # seconds without a word from the registry: a machine without one may swallow packets
GONE_ERRORS = (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, OSError, tarfile.TarError)


@contextlib.contextmanager
def translated(doing):
    """Turn the exceptions of docker-py and below into ours, saying what was being done."""
    try:
        yield
    except docker.errors.APIError as error:
        text = (error.explanation or str(error)).strip()
        if PORT_CONFLICT.search(text):
            port = CONFLICTING_PORT.search(text)
            raise PortTaken(f'{doing}: {text}', port=int(port[1]) if port else None) from error
        kind = {404: MissingOnEngine, 409: ConflictOnEngine}.get(error.status_code, DockerError)
        raise kind(f'{doing}: {text}') from error
    except LogDamaged as error:
        raise UnreadableLog(f'{doing}: the engine can not read on: {error}') from error
    except (docker.errors.DockerException, *GONE_ERRORS) as error:
        raise EngineUnavailable(f'{doing}: the Docker engine does not answer ({short_reason(error)}). '
                                'Start it, or point DOCKER_HOST at one that runs.') from error


def impatiently(items, patience, error):
    """Yield what an iterator gives; raise `error` when the next item takes more than `patience` seconds."""
    items, end = iter(items), object()
    while True:
        with gevent.Timeout(patience, error):
            item = next(items, end)
        if item is end:
            return
        yield item


def short_reason(error):
    """Return the innermost reason of a chain of connection errors: the outer ones only wrap it."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error) or type(error).__name__


@dataclass(frozen=True)
class Container:
    """What an inspect says of a workspace's container."""

    id: str
    name: str
    labels: dict
    state: str  # created, running, paused, restarting, removing, exited, dead
    started_at: str
    exit_code: int
    out_of_memory: bool
    tty: bool
    started: bool
    created_at: float
    memory: int
    cpus: float

    @property
    def up(self):
        """Tell whether it has processes."""
        return self.state in ('running', 'paused', 'restarting')


class Engine:
    """The Docker engine. Every method may raise DockerError, and EngineUnavailable when nothing answers."""

    def __init__(self, *, host='', tls_verify='', cert_path='', instance='default'):
        self._settings = {key: value for key, value in {
            'DOCKER_HOST': host, 'DOCKER_TLS_VERIFY': tls_verify, 'DOCKER_CERT_PATH': cert_path}.items() if value}
        self.instance = instance
        self._client = None
        self._starts = gevent.lock.BoundedSemaphore(8)  # more at once only queue up inside the engine

    @property
    def api(self):
        """The client, made when it is first needed: docker-py's constructor asks the engine for its version."""
        if self._client is None:
            # The pool is a keep limit, not a cap; below it urllib3 warns about every stream that ends.
            self._client = docker.APIClient(version='auto', timeout=60, max_pool_size=100,
                                            **docker.utils.kwargs_from_env(environment=self._settings))
        return self._client

    def close(self):
        """Close the connections that are kept."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def info(self):
        """Return {cpus, memory, time} of the engine; `time` is its own clock in seconds since the epoch."""
        with translated('Ask the engine for its state'), gevent.Timeout(10, EngineUnavailable('The Docker engine does not answer within 10 s.')):
            info = self.api.info()
        return {'cpus': info.get('NCPU') or 1, 'memory': info.get('MemTotal') or 0, 'time': parse_time(info.get('SystemTime'))}

    def ping(self):
        """Raise EngineUnavailable unless the engine answers."""
        with translated('Reach the engine'), gevent.Timeout(5, EngineUnavailable('The Docker engine does not answer within 5 s.')):
            self.api.ping()

    def is_leaving(self):
        """Tell whether the engine takes no new connections: one that shuts down ends containers and still answers on the old ones."""
        try:
            self.api.close()  # those that are kept
            self.ping()
        except EngineUnavailable:
            return True
        return False

    # Images

    def has_image(self, tag):
        """Tell whether an image is on the engine."""
        with translated(f'Look for image {tag}'):
            try:
                self.api.inspect_image(tag)
            except docker.errors.ImageNotFound:
                return False
        return True

    def build(self, tag, context, *, buildargs, labels, on_line):
        """Build an image from a tar file object; each line of output goes to `on_line`. Raise DockerError with the last ones."""
        last = collections.deque(maxlen=12)
        with translated(f'Build image {tag}'):
            for item in self.api.build(fileobj=context, custom_context=True, tag=tag, buildargs=buildargs, labels=labels,
                                       rm=True, forcerm=True, decode=True):
                for line in (item.get('stream') or item.get('error') or '').splitlines():
                    if line.strip():
                        last.append(line)
                        on_line(line)
                if 'error' in item:
                    raise DockerError(f'The build of image {tag} failed:\n' + '\n'.join(last))
            self.api.inspect_image(tag)

    def pull(self, image, on_line):
        """Pull an image; give up when the registry says nothing for half a minute."""
        repository, tag = docker.utils.parse_repository_tag(image)
        silent = DockerError(f'Pull image {image}: the registry says nothing.')
        with translated(f'Pull image {image}'):
            with gevent.Timeout(PULL_PATIENCE, silent):
                progress = self.api.pull(repository, tag=tag or 'latest', stream=True, decode=True)
            for item in impatiently(progress, PULL_PATIENCE, silent):
                if 'error' in item:
                    raise DockerError(f"Pull image {image}: {item['error']}")
                if 'progress' not in item:
                    on_line(f"{item.get('id', '')} {item.get('status', '')}".strip())

    def import_image(self, tag, stream):
        """Make an image of one layer from a tar stream."""
        repository, name = docker.utils.parse_repository_tag(tag)
        with translated(f'Import image {tag}'):
            answer = self.api.import_image_from_stream(stream, repository=repository, tag=name)
        if '"error"' in answer:
            raise DockerError(f'Import image {tag}: {answer.strip()[-300:]}')

    # Volumes and containers

    def taken(self):
        """Return (names, host ports) of every container on the engine, ours or not, running or not."""
        with translated('List containers'):
            found = self.api.containers(all=True)
        names = {name.lstrip('/') for item in found for name in item.get('Names') or ()}
        ports = {port['PublicPort'] for item in found for port in item.get('Ports') or () if 'PublicPort' in port}
        for item in found:
            # A stopped container publishes nothing, but its ports are wanted back when it starts.
            with contextlib.suppress(ValueError, AttributeError):
                ports.update(json.loads((item.get('Labels') or {}).get(f'{PREFIX}.ports', '{}')).values())
        return names, ports

    def volumes(self):
        """Return {workspace id: labels} of this instance's volumes."""
        with translated('List volumes'):
            found = self.api.volumes(filters={'label': f'{PREFIX}.instance={self.instance}'})['Volumes'] or ()
        return {item['Labels'][f'{PREFIX}.id']: item['Labels'] for item in found if f'{PREFIX}.id' in (item['Labels'] or {})}

    def containers(self):
        """Return {workspace id: Container} of this instance."""
        with translated('List containers'):
            found = self.api.containers(all=True, filters={'label': f'{PREFIX}.instance={self.instance}'})
        inspected = [self.inspect(item['Id']) for item in found]  # api.containers tells neither exit code nor out-of-memory
        return {item.labels[f'{PREFIX}.id']: item for item in inspected if item and f'{PREFIX}.id' in item.labels}

    def find(self, workspace_id):
        """Return the Container of a workspace, or None."""
        with translated('List containers'):
            found = self.api.containers(all=True, filters={'label': [f'{PREFIX}.id={workspace_id}',
                                                                     f'{PREFIX}.instance={self.instance}']})
        return self.inspect(found[0]['Id']) if found else None

    def inspect(self, container_id):
        """Return the Container with this id, or None."""
        with translated('Inspect a container'):
            try:
                found = self.api.inspect_container(container_id)
            except docker.errors.NotFound:
                return None
        state, limits = found['State'], found['HostConfig']
        return Container(
            id=found['Id'], name=found['Name'].lstrip('/'), labels=found['Config']['Labels'] or {}, state=state['Status'], started_at=state.get('StartedAt', ''),
            exit_code=state.get('ExitCode', 0), out_of_memory=bool(state.get('OOMKilled')), tty=bool(found['Config'].get('Tty')),
            started=not state.get('StartedAt', '0001').startswith('0001'), created_at=parse_time(found['Created']),
            memory=limits.get('Memory') or 0, cpus=(limits.get('NanoCpus') or 0) / 1e9)

    def create_volume(self, name, labels):
        """Make a volume; one of that name may exist already."""
        with translated(f'Create volume {name}'):
            self.api.create_volume(name, labels=labels)

    def create_container(self, name, image, *, env, labels, volume, mount, ports, bind_address, memory, cpus, pids, new_privileges):
        """Create a container and return its id. `ports` is {container port: host port}. It restarts only after `keep_running`."""
        with translated(f'Create container {name}'), self._starts:
            host_config = self.api.create_host_config(
                mounts=[docker.types.Mount(target=mount, source=volume, type='volume')],
                port_bindings={f'{inside}/tcp': (bind_address, outside) for inside, outside in ports.items()},
                init=True, mem_limit=memory, nano_cpus=int(cpus * 1e9), pids_limit=pids, cap_drop=['ALL'], cap_add=list(CAPABILITIES),
                security_opt=[] if new_privileges else ['no-new-privileges'],
                log_config=docker.types.LogConfig(type='json-file', config={'max-size': '16m', 'max-file': '3'}))
            return self.api.create_container(image, name=name, hostname=name[:63], environment=env, labels=labels,
                                             ports=[(inside, 'tcp') for inside in ports], host_config=host_config)['Id']

    def put_files(self, container_id, files):
        """Write {absolute path: (bytes, mode)} as root into a container, started or not."""
        archive = make_tar({path.lstrip('/'): content for path, content in files.items()})
        with translated('Write files into a container'):
            self.api.put_archive(container_id, '/', archive.getvalue())

    def get_file(self, container_id, path):
        """Return the first 64 KB of a file in a container, started or not; None when there is none, or nothing in it."""
        return next(self.read_file(container_id, path, limit=MAX_PRINTED), None)

    def start(self, container_id):
        """Start a container; one that runs is left alone. Raise PortTaken when a port of it is in use."""
        with translated('Start a container'), self._starts:
            self.api.start(container_id)

    def keep_running(self, container_id):
        """Let the engine start a container again after a crash or a reboot, unless it was stopped on purpose."""
        with translated('Set the restart policy of a container'):
            self.api.update_container(container_id, restart_policy={'Name': 'unless-stopped'})

    def stop(self, container_id, timeout):
        """Stop a container; one that is stopped or gone is left alone."""
        with translated('Stop a container'), contextlib.suppress(docker.errors.NotFound):
            self.api.stop(container_id, timeout=timeout)

    def remove_container(self, container_id):
        """Remove a container, running or not; one that is gone is fine."""
        with translated('Remove a container'), contextlib.suppress(docker.errors.NotFound):
            self._until_gone(self.api.remove_container, self.api.inspect_container, container_id, force=True, v=True)

    def rename(self, container_id, name):
        """Rename a container, which may have the name already; raise ConflictOnEngine when another has it."""
        container = self.inspect(container_id)
        if container is not None and container.name != name:
            with translated(f'Rename a container to {name}'):
                self.api.rename(container_id, name)

    def remove(self, workspace_id):
        """Remove every container and volume of a workspace, running or not; what is gone already is fine."""
        filters = {'label': [f'{PREFIX}.id={workspace_id}', f'{PREFIX}.instance={self.instance}']}
        with translated('Remove a workspace'):
            for item in self.api.containers(all=True, filters=filters):
                self._until_gone(self.api.remove_container, self.api.inspect_container, item['Id'], force=True, v=True)
            for item in self.api.volumes(filters=filters)['Volumes'] or ():
                self._until_gone(self.api.remove_volume, self.api.inspect_volume, item['Name'], force=True)

    @staticmethod
    def _until_gone(remove, inspect, name, **options):
        """Remove and wait for it: the engine answers 409 while another call removes the same, or a container lets go of a volume."""
        deadline = time.monotonic() + 30
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

    # What goes on in a container

    def output(self, container_id, lines):
        """Return the last lines that a container printed, as text."""
        with translated('Read the output of a container'):
            return self.api.logs(container_id, tail=lines).decode('utf-8', 'replace')

    def log_lines(self, container, *, since=0, tail=None, follow=False):
        """Yield lists of lines, (stream, stamp in nanoseconds, text), of a container's output.

        From `since` (nanoseconds, inclusive) on, or the last `tail` lines; with `follow` until the container ends.
        """
        # docker-py's own logs() takes no nanoseconds, and decodes a TTY byte by byte.
        params = {'stdout': 1, 'stderr': 1, 'timestamps': 1, 'follow': int(follow), 'tail': 'all' if tail is None else tail}
        if since:
            params['since'] = f'{since // 1_000_000_000}.{since % 1_000_000_000:09d}'
        lines = LogLines(container.tty)
        with translated('Read the log of a container'):
            url = self.api._url('/containers/{0}/logs', container.id)
            with contextlib.closing(self.api._get(url, params=params, stream=True, timeout=None)) as answer:
                self.api._raise_for_status(answer)
                batch, enough = [], 1 if follow else BATCH
                for data in politely(answer.raw.stream(65536)):
                    try:
                        batch += lines.feed(data)  # the engine sends line by line
                    except LogDamaged:
                        yield batch
                        raise
                    if len(batch) >= enough:
                        yield batch
                        batch = []
        now = self.inspect(container.id) if follow else None
        batch += [] if now and now.up else lines.end()  # while it runs, only the stream was cut off, maybe within a line
        if batch:
            yield batch

    def run(self, container_id, command, *, user='', env=None):
        """Run a short command in a container; return (exit code, the first 64 KB that it printed). Its environment shows nowhere, its arguments do."""
        late, printed = DockerError(f'The command {command[0]} in the container did not end within {RUN_PATIENCE} s.'), bytearray()
        with translated('Run a command in a container'), gevent.Timeout(RUN_PATIENCE, late):
            running = self.api.exec_create(container_id, command, stderr=False, user=user, environment=env)
            for _, data in self._output(running):
                printed += data[:MAX_PRINTED - len(printed)]
            return self.api.exec_inspect(running['Id'])['ExitCode'], bytes(printed)

    def run_detached(self, container_id, command, *, user, env, workdir):
        """Start a command in a container that needs nobody from then on."""
        with translated('Start a command in a container'):
            running = self.api.exec_create(container_id, command, stdout=False, stderr=False, user=user, environment=env, workdir=workdir)
            self.api.exec_start(running['Id'], detach=True)

    def follow(self, container_id, command, *, user):
        """Run a command in a container and yield (stream, bytes) of what it prints. Its stdin ends when the reader goes, or is killed."""
        with translated('Follow a command in a container'):
            yield from self._output(self.api.exec_create(container_id, command, stdin=True, user=user))

    def _output(self, running):
        """Start a command that was created, and yield (stream, bytes) of what it prints."""
        # docker-py's own exec_start() may lose what came in one packet with the answer's headers.
        answer = self.api._post_json(self.api._url('/exec/{0}/start', running['Id']), data={'Tty': False, 'Detach': False},
                                     headers={'Connection': 'Upgrade', 'Upgrade': 'tcp'}, stream=True, timeout=None)  # it may be silent for long
        with contextlib.closing(answer):
            self.api._raise_for_status(answer)
            yield from read_frames(answer.raw._fp.fp)

    def read_file(self, container_id, path, *, limit=None):
        """Yield the bytes of a file in a container, started or not, piece by piece, at most `limit`; nothing when there is none."""
        with tempfile.SpooledTemporaryFile(MAX_IN_MEMORY) as copied:
            # The engine locks the container as long as it is read from, even against an inspect, so nobody may read slowly.
            for data in politely(self._pieces(container_id, path)):
                copied.write(data)
                if limit is not None and copied.tell() >= limit:
                    break
            copied.seek(0)
            yield from iter(lambda: copied.read(65536), b'')

    def _pieces(self, container_id, path):
        with translated(f'Read {path} of a container'), contextlib.suppress(docker.errors.NotFound):
            # docker-py's own get_archive() can not be closed before its end.
            url = self.api._url('/containers/{0}/archive', container_id)
            with contextlib.closing(self.api._get(url, params={'path': path}, headers={'Accept-Encoding': 'identity'}, stream=True)) as answer:
                self.api._raise_for_status(answer)
                with tarfile.open(fileobj=answer.raw, mode='r|') as archive:
                    member = archive.next()
                    if member is not None and member.isfile():
                        content = archive.extractfile(member)
                        yield from iter(lambda: content.read(65536), b'')

    def usage(self, container_id):
        """Yield {cpuPercent, memoryUsage, memoryLimit} once a second until the container ends; CPU in percent of one core."""
        with translated('Measure a container'):
            for sample in self.api.stats(container_id, decode=True, stream=True):
                usage = measure(sample)
                if usage:
                    yield usage

    def own_env(self, container):
        """Return the environment that a container was given, beside that of its image."""
        with translated('Inspect a container'):
            found, inherited = self.api.inspect_container(container.id), set()
            with contextlib.suppress(docker.errors.ImageNotFound):  # an image can be removed while a stopped container needs it
                inherited.update(self.api.inspect_image(found['Image'])['Config'].get('Env') or ())
        return dict(item.partition('=')[::2] for item in found['Config'].get('Env') or () if item not in inherited)

    def changes(self, since):
        """Yield the id of a workspace whenever its container changed, beginning at `since` (the engine's clock)."""
        with translated('Follow the events of the engine'):
            stream = self.api.events(since=int(since), decode=True,
                                     filters={'type': 'container', 'label': f'{PREFIX}.instance={self.instance}'})
            with contextlib.closing(stream):
                for item in stream:
                    if item.get('Action', '').split(':')[0] in ('start', 'die', 'oom', 'destroy', 'pause', 'unpause', 'rename'):
                        yield item['Actor']['Attributes'].get(f'{PREFIX}.id', '')


def measure(sample):
    """Return a stats record of the engine as {cpuPercent, memoryUsage, memoryLimit}, or None for its first, which has no past.

    Memory is counted as `docker stats` does, without the page cache that the kernel can take back at once.
    """
    cpu, before = sample.get('cpu_stats') or {}, sample.get('precpu_stats') or {}
    memory = sample.get('memory_stats') or {}
    if 'system_cpu_usage' not in cpu or 'system_cpu_usage' not in before or 'usage' not in memory:
        return None
    used = cpu['cpu_usage']['total_usage'] - before['cpu_usage']['total_usage']
    passed = cpu['system_cpu_usage'] - before['system_cpu_usage']
    cores = cpu.get('online_cpus') or len(cpu['cpu_usage'].get('percpu_usage') or ()) or 1
    details = memory.get('stats') or {}
    cache = details.get('inactive_file', details.get('total_inactive_file', 0))
    return {'cpuPercent': round(max(0.0, used / passed * cores * 100), 2) if passed > 0 else 0.0,
            'memoryUsage': max(0, memory['usage'] - cache), 'memoryLimit': memory.get('limit', 0)}


def parse_time(text):
    """Return the seconds since the epoch of the engine's RFC 3339 times, whose nanoseconds Python can't read."""
    match = re.match(r'(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d)?', text or '')
    if not match:
        return time.time()
    return datetime.fromisoformat(match[1] + (match[3] or 'Z').replace('Z', '+00:00')).timestamp() + float(match[2] or 0)


def view_time(seconds):
    """Return seconds since the epoch as RFC 3339 in UTC, with milliseconds; None stays None."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec='milliseconds').replace('+00:00', 'Z')


def make_tar(files):
    """Return a tar file object of {relative path: (bytes, mode)}, the same bytes for the same files."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode='w') as archive:
        for path, (content, mode) in sorted(files.items()):
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode = len(content), mode
            archive.addfile(entry, io.BytesIO(content))
    target.seek(0)
    return target


# ---------------------------------------------------------------------------------------------
# Templates
# ---------------------------------------------------------------------------------------------

BASE = 'base'
TEMPLATE_NAME = re.compile(r'[A-Za-z0-9]+((\.|__?|-+)[A-Za-z0-9]+)*')  # what the engine takes in the name of an image
OWN_BASE_IMAGE = 'agentbackend-debian:bookworm'
DEBIAN_RELEASE = 'bookworm'
DEBOOTSTRAP_PATIENCE = 120  # seconds without a word: a mirror that is not reached may swallow packets


class Build:
    """An image that is being made, and who listens to its output."""

    def __init__(self, greenlet):
        self.greenlet = greenlet
        self.listeners = []
        self.started_at = time.time()

    def say(self, line):
        """Hand a line of output to all who listen."""
        for listener in list(self.listeners):
            listener(line)


class Templates:
    """Folders with a Dockerfile. An image's tag holds a hash of what it is made of, so an edit rebuilds and nothing else does."""

    def __init__(self, engine, folders, *, base_image, debian_mirror, ca_certs, timeout):
        self._engine = engine
        self._folders = [Path(folder) for folder in folders]  # later ones win
        self._base_image = base_image
        self._debian_mirror = debian_mirror
        self._ca_certs = ca_certs
        self._timeout = timeout
        self._builds = {}
        self._errors = {}
        self._ready = {}  # name -> the tag that was last seen on the engine

    def names(self):
        """Return the names that a workspace can ask for."""
        found = {path.parent.name for folder in self._folders for path in folder.glob('*/Dockerfile')}
        return sorted(name for name in found - {BASE} if TEMPLATE_NAME.fullmatch(name))

    def describe(self, name):
        """Return the first sentence of the comment at the head of a template's Dockerfile."""
        first = (self._folder(name) / 'Dockerfile').read_text(errors='replace').partition('\n')[0]
        return first.lstrip('# ').partition('. ')[0].rstrip('.') + '.' if first.startswith('#') else ''

    def state(self, name):
        """Return {image, state, error, buildingSince}: state is ready, building, failed or missing, as last seen."""
        try:
            tag = self.tag(name)
        except UnreadableTemplate as error:
            return {'image': f'{PREFIX}/{name.lower()}', 'state': 'failed', 'error': str(error), 'building_since': None}
        build = self._builds.get(name)
        state = 'building' if build else 'failed' if name in self._errors else 'ready' if self._ready.get(name) == tag else 'missing'
        return {'image': tag, 'state': state, 'error': self._errors.get(name), 'building_since': build.started_at if build else None}

    def tag(self, name):
        """Return the name of the image that a template's folder, as it is now, makes."""
        content = hashlib.sha256()
        for path, (data, _) in sorted(self._context(name).items()):
            content.update(f'{path}\0{len(data)}\0'.encode() + data)
        content.update((self.tag(BASE) if name != BASE and self._stands_on_base(name) else self._base_image).encode())
        return f'{PREFIX}/{name.lower()}:{content.hexdigest()[:12]}'

    def look(self):
        """See which images the engine has."""
        for name in [BASE, *self.names()]:
            with contextlib.suppress(UnreadableTemplate):  # its state says so
                tag = self.tag(name)
                if self._engine.has_image(tag):
                    self._ready[name] = tag
                else:
                    self._ready.pop(name, None)

    def image(self, name, on_line, given_up):
        """Return the tag of a template's image, built if need be. Everybody who asks meanwhile shares one build.

        `on_line` gets its output; when the event `given_up` is set, the caller leaves with Superseded and the build goes on.
        """
        build = self._builds.get(name)
        if build is None:
            tag = self.tag(name)
            if self._engine.has_image(tag):
                self._ready[name] = tag
                self._errors.pop(name, None)
                return tag
            build = self._builds.get(name) or self._start(name, tag)
        build.listeners.append(on_line)
        try:
            gevent.wait([build.greenlet, given_up], count=1)
        finally:
            build.listeners.remove(on_line)
        if not build.greenlet.ready():
            raise Superseded(name)
        return build.greenlet.get()

    def stop(self):
        """End the builds that go on."""
        gevent.killall([build.greenlet for build in self._builds.values()], block=True, timeout=5)

    def _start(self, name, tag):
        build = self._builds[name] = Build(None)
        build.greenlet = gevent.Greenlet(self._make, name, tag, build)
        build.greenlet.start()
        return build

    def _make(self, name, tag, build):
        try:
            build.say(f'Building image {tag} of template {name}.')
            log.info('Building image %s of template %s; this can take some minutes.', tag, name)
            with gevent.Timeout(self._timeout, DockerError(f'The build of image {tag} took more than BUILD_TIMEOUT={self._timeout} s.')):
                if name == BASE:
                    below = self._debian(build.say)
                else:
                    below = self.image(BASE, build.say, gevent.event.Event()) if self._stands_on_base(name) else ''
                self._engine.build(tag, make_tar(self._context(name)), buildargs={'BASE_IMAGE': below} if below else {},
                                   labels={f'{PREFIX}.template': name}, on_line=lambda line: self._said(build, name, line))
            self._errors.pop(name, None)
            self._ready[name] = tag
            log.info('Image %s is ready after %.0f s.', tag, time.time() - build.started_at)
            return tag
        except BackendError as error:
            self._errors[name] = str(error)
            log.error('No image for template %s: %s', name, error)
            raise
        finally:
            del self._builds[name]

    @staticmethod
    def _said(build, name, line):
        log.log(logging.INFO if line.startswith('Step ') else logging.DEBUG, 'build %s: %s', name, line)
        build.say(line)

    def _folder(self, name):
        for folder in reversed(self._folders):
            if TEMPLATE_NAME.fullmatch(name) and (folder / name / 'Dockerfile').is_file():
                return folder / name
        raise ValidationError(f"template: there is no template {name!r}; known are {', '.join(self.names())}",
                              details=[{'path': 'template', 'message': f'unknown template {name!r}'}])

    def _context(self, name):
        folder = self._folder(name)
        files = {}
        for path in sorted(folder.rglob('*')):
            if path.is_file() and not {'.git', '__pycache__'} & set(path.relative_to(folder).parts):
                try:
                    files[str(path.relative_to(folder))] = (path.read_bytes(), 0o755)
                except FileNotFoundError:  # an editor's temporary file, say
                    continue
                except OSError as error:
                    raise UnreadableTemplate(f'The file {path} of template {name} can not be read: {error.strerror}.') from error
        if name == BASE:
            files['extra-ca-certs.crt'] = (Path(self._ca_certs).read_bytes() if self._ca_certs else b'', 0o644)
        return files

    def _stands_on_base(self, name):
        return 'BASE_IMAGE' in (self._folder(name) / 'Dockerfile').read_text(errors='replace')

    def _debian(self, on_line):
        """Return the name of a Debian image: the one that was asked for, else one of our own making."""
        for image in (self._base_image, OWN_BASE_IMAGE):
            if self._engine.has_image(image):
                return image
        try:
            on_line(f'Pulling {self._base_image}.')
            self._engine.pull(self._base_image, on_line)
            return self._base_image
        except EngineUnavailable:
            raise
        except DockerError as error:
            log.info('%s; making a Debian image with debootstrap instead.', str(error).splitlines()[0][:200])
            on_line(f'{error}; making a Debian image with debootstrap instead.')
            self._debootstrap(error, on_line)
            return OWN_BASE_IMAGE

    def _debootstrap(self, reason, on_line):
        if os.geteuid() != 0 or not any(os.access(os.path.join(folder, 'debootstrap'), os.X_OK) for folder in ('/usr/sbin', '/usr/bin')):
            raise DockerError(f'No base image: {self._base_image} is not on the engine and could not be pulled ({reason}), and debootstrap, '
                              f'which would make one, needs root and the package of that name. Do one of: docker pull {self._base_image}; '
                              'apt-get install debootstrap and run as root; BASE_IMAGE=<a Debian image that the engine has>.')
        with tempfile.TemporaryDirectory(prefix='agentbackend-debian-') as folder:
            root = os.path.join(folder, 'root')
            # Its own tools are in sbin, which the PATH of a user or a service may lack.
            command = ['env', 'PATH=/usr/sbin:/usr/bin:/sbin:/bin', 'debootstrap', '--variant=minbase', DEBIAN_RELEASE, root,
                       *filter(None, [self._debian_mirror])]
            self._run(command, on_line)
            with subprocess.Popen(['tar', '-C', root, '-c', '.'], stdout=subprocess.PIPE) as packing:
                self._engine.import_image(OWN_BASE_IMAGE, packing.stdout)

    @staticmethod
    def _run(command, on_line):
        last = ''
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True, errors='replace', start_new_session=True) as running:
            try:
                silent = DockerError(f"{' '.join(command)} said nothing for {DEBOOTSTRAP_PATIENCE} s; is its mirror reached?")
                for line in impatiently(running.stdout, DEBOOTSTRAP_PATIENCE, silent):
                    last = line.strip() or last
                    on_line(line.rstrip())
            except BaseException:
                os.killpg(running.pid, signal.SIGKILL)
                raise
        if running.returncode:
            raise DockerError(f"{' '.join(command)} failed with {running.returncode}: {last}")
