"""docker-py as it is used here: errors in our words, the few calls for which we go below its surface, and its
formats."""
import contextlib
import grp
import io
import logging
import os
import pwd
import re
import socket
import tarfile
from dataclasses import dataclass

import docker
import gevent
import requests.adapters
import requests.exceptions
import urllib3.exceptions

from _agentbackend.dockerlog import LogDamaged, read_frames
from _agentbackend.errors import (
    ConflictOnEngine,
    DockerError,
    EngineUnavailable,
    MissingOnEngine,
    PortTaken,
    UnreadableLog,
)
from _agentbackend.timing import parse_time, with_deadline

log = logging.getLogger('agentbackend')

CALL_TIMEOUT = 60  # seconds until the headers of an answer
PING_TIMEOUT = 5  # seconds
OLDEST_API, OLDEST = '1.41', '20.10'  # of an engine that knows all that is asked of it, and its release
SILENCE = 20  # seconds without a sign of life of the other machine until a connection to it is given up
PIECE = 65536  # bytes
# The engine's words for a port that is taken, of old and new versions, by a container or by another program.
PORT_CONFLICT = re.compile(r'port is already allocated|address already in use')
CONFLICTING_PORT = re.compile(r':(\d+)(?: failed|: bind|/tcp)')
# What is heard of an engine that can't be talked with, and what to do then; the last holds for all else.
REMEDIES = (
    ('CERTIFICATE_VERIFY_FAILED',
     'See that ca.pem in DOCKER_CERT_PATH is that of its authority, and its certificate for this address.'),
    ('EOF occurred in violation|alert',
     'If it is up, it does not take cert.pem in DOCKER_CERT_PATH, which has to be of its authority.'),
    ('HTTP request to an HTTPS server', 'It wants TLS: set DOCKER_TLS_VERIFY=1 and DOCKER_CERT_PATH.'),
    ('WRONG_VERSION_NUMBER', 'It has no TLS there: leave DOCKER_TLS_VERIFY out, or give it a certificate.'),
    ('Path to a certificate|PEM lib|X509',
     'DOCKER_CERT_PATH has to be a folder with ca.pem, cert.pem and key.pem.'),
    ('', 'Start Docker, or set DOCKER_HOST.'))
GONE_ERRORS = (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, OSError, tarfile.TarError)


class Client(docker.APIClient):
    """docker-py's client, which takes certificates, proxies and passwords from our settings alone, never from
    the environment."""

    trust_env = property(lambda self: False, lambda self, value: None)


class DockerClient:
    """One client for everybody. It is made when it is first needed, since docker-py asks the engine for its
    version."""

    def __init__(self, *, host='', tls_verify='', cert_path='', node=''):
        settings = {'DOCKER_TLS_VERIFY': tls_verify, 'DOCKER_CERT_PATH': cert_path}
        self._settings = {key: value for key, value in settings.items() if value}
        self.address = host or 'unix:///var/run/docker.sock'
        self._named = self.address  # in what is said of it, though a tunnel leads there
        self.is_local = self.address.startswith('unix:')  # the engine is on this machine
        self.node = node  # that of several on which the engine is
        self._api = None

    @property
    def api(self):
        """The APIClient of docker-py."""
        if self._api is None:
            # The pool is a keep limit, not a cap; below it urllib3 warns about every stream that ends.
            api = Client(version='auto', timeout=CALL_TIMEOUT, max_pool_size=100,
                         **docker.utils.kwargs_from_env(
                             environment={'DOCKER_HOST': self.address, **self._settings}))
            if docker.utils.version_lt(api.api_version, OLDEST_API):
                api.close()
                raise EngineUnavailable(
                    f'Docker at {self._named} is too old: its API is {api.api_version}, and {OLDEST_API} is '
                    f'needed. Install Docker {OLDEST} or later there.', node=self.node)
            self._api = api
            self._notice_silence()
        return self._api

    def _notice_silence(self):
        """Let a stream end whose engine lost its power or its cable: nobody would say so else."""
        adapter = self._api.get_adapter(self._api.base_url)
        if isinstance(adapter, requests.adapters.HTTPAdapter) and not self.address.startswith('unix:'):
            adapter.poolmanager.connection_pool_kw['socket_options'] = [
                (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
                (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5), (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
                (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
                (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE * 1000)]

    def move(self, address):
        """Reach the engine at another address from now on, through a tunnel that has come anew."""
        self.address, self.is_local = address, False
        self.close()

    def close(self):
        """Close the connections that are kept."""
        if self._api is not None:
            self._api.close()
            self._api = None

    def ping(self):
        """Raise EngineUnavailable unless the engine answers on a connection of its own."""
        with self.errors(), gevent.Timeout(PING_TIMEOUT, self.silence(PING_TIMEOUT)):
            self.api.ping()

    def silence(self, seconds):
        """Return the error of an engine that takes a connection and says nothing."""
        return EngineUnavailable(f'Docker at {self._named} does not answer within {seconds} s.',
                                 node=self.node)

    @contextlib.contextmanager
    def errors(self):
        """Turn the exceptions of docker-py and below into ours; the engine's own words stay."""
        try:
            yield
        except docker.errors.APIError as error:
            text = (error.explanation or str(error)).strip()
            if PORT_CONFLICT.search(text):
                port = CONFLICTING_PORT.search(text)
                raise PortTaken(text, port=int(port[1]) if port else None) from error
            kind = {404: MissingOnEngine, 409: ConflictOnEngine}.get(error.status_code, DockerError)
            raise kind(text) from error
        except LogDamaged as error:
            raise UnreadableLog(f'The engine cannot read on in this log: {error}') from error
        except (docker.errors.DockerException, *GONE_ERRORS) as error:
            log.debug('The engine does not answer: %r', error)
            raise EngineUnavailable(self._why_unavailable(error), node=self.node) from error

    def _why_unavailable(self, error):
        said = getattr(error, 'explanation', None)
        while error.__context__ is not None:  # the outer ones only wrap the reason
            error = error.__context__
            said = said or getattr(error, 'explanation', None)
        if isinstance(error, PermissionError):
            return why_refused(self.address)
        reason = said or getattr(error, 'strerror', None) or str(error) or type(error).__name__
        remedy = next(text for words, text in REMEDIES if re.search(words, reason))
        return f'Docker does not answer at {self._named} ({reason.strip().rstrip(".")}). {remedy}'

    def fetch(self, image, on_line):
        """Return whether an image came from another engine; there is none here."""
        return False

    def progress(self, begin, seconds, late):
        """Yield what the engine says of a push or a pull, which a function begins; raise DockerError with its
        error, and `late` when it says nothing for so many seconds."""
        with self.errors():
            with gevent.Timeout(seconds, late):
                said = begin()
            for item in with_deadline(said, seconds, late):
                if 'error' in item:
                    raise DockerError(item['error'])
                yield item

    # Below docker-py's surface (7.2): its own calls can't be closed early, take no nanoseconds, or read byte
    # by byte.

    @contextlib.contextmanager
    def get(self, url, name, params, *, timeout=CALL_TIMEOUT):
        """Give the raw answer of a GET, of /containers/<name>/... say, for the length of a block, to be read
        at leisure."""
        answer = self.api._get(self.api._url(url, name), params=params,
                               headers={'Accept-Encoding': 'identity'},
                               stream=True, timeout=timeout)
        with contextlib.closing(answer):
            self.api._raise_for_status(answer)
            yield answer.raw

    def update(self, container_id, settings):
        """Give a container other settings, as POST /containers/<id>/update has them; docker-py's own call has
        no NanoCpus."""
        answer = self.api._post_json(self.api._url('/containers/{0}/update', container_id), data=settings)
        self.api._raise_for_status(answer)

    @staticmethod
    def pieces(raw):
        """Yield the bytes of a raw answer, each time all that has come, at most PIECE: urllib3 gives each
        chunk by itself, and the engine makes one of each line."""
        if not raw.chunked:
            yield from raw.stream(PIECE)
            return
        held, ended = b'', False
        while not ended:
            data = raw._fp.fp.read1(PIECE)
            if not data:
                raise urllib3.exceptions.ProtocolError('the answer ended within a chunk')
            content, held, ended = dechunk(held + data)
            if content:
                yield content

    def attached(self, exec_id):
        """Start a command that was created, and give the Attached to it for the length of a block; its stdin
        ends with that."""
        # docker-py's own exec_start() may lose what came in one packet with the answer's headers.
        return self._upgraded(self.api._url('/exec/{0}/start', exec_id), {'Tty': False, 'Detach': False})

    def attached_to(self, container_id):
        """Give the Attached to the first process of a container, started or not, for the length of a block;
        its stdin stays open behind that."""
        return self._upgraded(self.api._url('/containers/{0}/attach?stream=1&stdin=1&stdout=1', container_id))

    @contextlib.contextmanager
    def _upgraded(self, url, body=None):
        answer = self.api._post(url, json=body, headers={'Connection': 'Upgrade', 'Upgrade': 'tcp'},
                                stream=True, timeout=None)
        with contextlib.closing(answer):
            self.api._raise_for_status(answer)
            yield Attached(answer.raw._fp.fp)

    def attach(self, exec_id, data=b''):
        """Start a command that was created, give it data on stdin, and yield (stream, bytes) of what it
        prints until it ends.

        Its stdin is not closed: it has to know how much it will be given.
        """
        with self.attached(exec_id) as attached:
            sending = gevent.spawn(send, attached, data) if data else None
            try:
                yield from attached
            finally:
                if sending is not None:
                    sending.kill()


def why_refused(address):
    """Return in words why this user may not use an engine that is there, and what would change that."""
    user, group = str(os.geteuid()), ''
    with contextlib.suppress(KeyError):
        user = pwd.getpwuid(os.geteuid()).pw_name
    with contextlib.suppress(KeyError, OSError):
        group = grp.getgrgid(os.stat(address.removeprefix('unix://')).st_gid).gr_name
    if group in ('', 'root'):
        return f'Docker is there, but user {user} may not use {address}. Start this server as one who may.'
    return (f'Docker is there, but user {user} is not in the group {group}, whose members may use {address}. '
            f'As root: usermod -aG {group} {user}, then log in again and start this server.')


def dechunk(data):
    """Return (content, rest, whether it was the last) of the chunks that bytes begin with."""
    parts, start = [], 0
    while (end := data.find(b'\r\n', start)) >= 0:
        size = int(data[start:end].partition(b';')[0], 16)
        if size == 0:
            return b''.join(parts), b'', True
        if len(data) < end + size + 4:
            break
        parts.append(data[end + 2:end + 2 + size])
        start = end + size + 4
    return b''.join(parts), data[start:], False


class Attached:
    """A command that runs in a container, with its stdin and what it prints."""

    def __init__(self, file):
        self._file = file
        self._socket = file.raw._sock

    def __iter__(self):
        """Yield (stream, bytes) of what it prints until it ends, or the connection is cut."""
        with contextlib.suppress(OSError):
            yield from read_frames(self._file)

    def sendall(self, data):
        """Write to its stdin; waits until it is taken. Raises OSError when the command has ended."""
        self._socket.sendall(data)

    def cut(self):
        """End the connection, from whichever greenlet: its stdin ends, and so does who reads here."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)


def send(target, data):
    """Send all of it, unless the other side goes away first."""
    with contextlib.suppress(OSError):
        target.sendall(data)


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
    created_at: float
    memory: int
    cpus: float
    image: str = ''
    volumes: tuple = ()  # names of those that are mounted
    ports: frozenset = frozenset()  # of the host, on which something of it is published
    node: str = ''  # on which it is, where there are several
    restarts: bool = False  # by itself, after a crash
    ended_at: str = ''  # the last time that it did
    addresses: frozenset = frozenset()  # of the host, at which its ports are published

    @property
    def up(self):
        """Whether it has processes."""
        return self.state in ('running', 'paused', 'restarting')

    @property
    def going(self):
        """Whether it is as good as gone: somebody removes it just now."""
        return self.state in ('removing', 'dead')

    @property
    def started(self):
        """Whether it was ever started."""
        return not (self.started_at or '0001').startswith('0001')


def container_of(found, node):
    """Return what an inspect says as a Container."""
    state, limits, config = found['State'], found['HostConfig'], found['Config']
    published = [item for items in (limits.get('PortBindings') or {}).values() for item in items or ()]
    return Container(
        id=found['Id'], name=found['Name'].lstrip('/'), labels=config['Labels'] or {}, state=state['Status'],
        started_at=state.get('StartedAt', ''), ended_at=state.get('FinishedAt', ''),
        exit_code=state.get('ExitCode', 0), out_of_memory=bool(state.get('OOMKilled')),
        tty=bool(config.get('Tty')), created_at=parse_time(found['Created']),
        memory=limits.get('Memory') or 0, cpus=(limits.get('NanoCpus') or 0) / 1e9,
        image=found.get('Image', ''), node=node,
        restarts=(limits.get('RestartPolicy') or {}).get('Name') not in (None, '', 'no'),
        volumes=tuple(mount['Name'] for mount in found.get('Mounts') or () if mount.get('Type') == 'volume'),
        ports=frozenset(int(item['HostPort']) for item in published if item.get('HostPort')),
        addresses=frozenset(item.get('HostIp', '') for item in published))


def measure(sample):
    """Return a stats record of the engine as {cpu_percent, memory, memory_limit}; None when it has no
    memory.

    The first of a stream has no past, and so no CPU yet.

    Memory is counted as `docker stats` does, without the page cache that the kernel can take back at once.
    """
    cpu, before = sample.get('cpu_stats') or {}, sample.get('precpu_stats') or {}
    memory = sample.get('memory_stats') or {}
    if 'usage' not in memory:
        return None
    percent = 0.0
    passed = cpu.get('system_cpu_usage', 0) - before.get('system_cpu_usage', cpu.get('system_cpu_usage', 0))
    if passed > 0:
        used = cpu['cpu_usage']['total_usage'] - before['cpu_usage']['total_usage']
        cores = cpu.get('online_cpus') or len(cpu['cpu_usage'].get('percpu_usage') or ()) or 1
        percent = round(max(0.0, used / passed * cores * 100), 2)
    details = memory.get('stats') or {}
    cache = details.get('inactive_file', details.get('total_inactive_file', 0))
    return {'cpu_percent': percent, 'memory': max(0, memory['usage'] - cache),
            'memory_limit': memory.get('limit', 0)}


def make_tar(files):
    """Return {absolute path: (bytes, mode, number of the owner)} as the bytes of a tar."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode='w') as archive:
        for path, (content, mode, owner) in sorted(files.items()):
            entry = tarfile.TarInfo(path.lstrip('/'))
            entry.size, entry.mode, entry.uid, entry.gid = len(content), mode, owner, owner
            archive.addfile(entry, io.BytesIO(content))
    return target.getvalue()
