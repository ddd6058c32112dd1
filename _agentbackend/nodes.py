"""Machines with an engine each: which there are, how they are reached, and whether they answer."""
import collections
import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.parse
from dataclasses import dataclass, field

import gevent
import gevent.event
import gevent.lock

from _agentbackend.engine import PREFIX, Engine
from _agentbackend.errors import DockerError, EngineUnavailable, MissingOnEngine
from _agentbackend.timing import view_time

ANSWER_TIME = 4  # seconds that a node has to answer
HERE_TIME = 1  # that one on this machine has to say which it is
ENGINES_SOCKET = '/var/run/docker.sock'


@dataclass(frozen=True)
class Member:
    """A machine as the list of nodes has it."""

    name: str
    url: str  # of its engine
    address: str = ''  # IP, to which ports are bound; '' is this machine
    labels: dict = field(default_factory=dict)
    availability: str = 'active'  # pause or drain takes nothing new
    state: str = 'ready'  # what the swarm says of it

    @property
    def host(self):
        """Where its published ports are reached."""
        return self.labels.get(f'{PREFIX}.host', self.address)


class Tunnel:
    """An engine's socket brought here by the user's own ssh, with its settings, keys and known hosts."""

    def __init__(self, url):
        self._folder, self._process, asked = None, None, urllib.parse.urlsplit(url)
        user = f'{asked.username}@' if asked.username else ''
        self._there = asked.path if len(asked.path) > 1 else ENGINES_SOCKET
        self._words = [*(['-p', str(asked.port)] if asked.port else []), '--', f'{user}{asked.hostname}']

    def open(self):
        """Return the URL of the socket here; raise EngineUnavailable with what ssh says."""
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._folder = tempfile.mkdtemp(prefix='agentbackend-ssh-')
            options = ('BatchMode=yes', f'ConnectTimeout={ANSWER_TIME}', 'ExitOnForwardFailure=yes',
                       'ServerAliveInterval=5', 'ServerAliveCountMax=3', 'ControlPath=none')
            with open(f'{self._folder}/said', 'wb') as said:
                self._process = subprocess.Popen(
                    # It ends with this process, however that ends.
                    ['setpriv', '--pdeathsig', 'TERM', 'ssh', '-NT',
                     *(word for option in options for word in ('-o', option)),
                     '-L', f'{self._folder}/sock:{self._there}', *self._words],
                    stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        while not os.path.exists(f'{self._folder}/sock'):
            if self._process.poll() is not None:
                with open(f'{self._folder}/said', errors='replace') as said:
                    lines = [line.strip() for line in said if line.strip(' \r\n@')]
                raise EngineUnavailable(f'ssh: {" ".join(lines)[-1000:] or "it ended without a word"}')
            gevent.sleep(0.05)
        return f'unix://{self._folder}/sock'

    def close(self):
        """End it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            shutil.rmtree(self._folder, ignore_errors=True)
            self._process = None


class Link:
    """The way to an engine, which may be one through ssh."""

    def __init__(self, url, connect, name=''):
        self._connect, self._url, self._name = connect, url, name
        self._tunnel = Tunnel(url) if url.startswith('ssh://') else None
        self.client = connect(url, name)

    def open(self):
        """See that there is a way; raise EngineUnavailable where there is none."""
        if self._tunnel is not None:
            here = self._tunnel.open()
            if here != self.client.address:
                self.client.move(here)

    def info(self):
        """Return what the engine says of itself."""
        with self.client.errors(), gevent.Timeout(ANSWER_TIME, self.client.silence(ANSWER_TIME)):
            self.open()
            return self.client.api.info()

    def close(self):
        """End it."""
        self.client.close()
        if self._tunnel is not None:
            self._tunnel.close()


class PlainList:
    """Nodes that the settings name."""

    def __init__(self, urls):
        self._members, names = [], set()
        for url in urls:
            host = urllib.parse.urlsplit(url).hostname or ''
            name = host or 'local'
            name = name if name not in names else url.partition('://')[2]
            names.add(name)
            self._members.append(Member(name, url, ip_of(alias_of(host) if url.startswith('ssh:') else host)))

    def members(self):
        """Return all Members."""
        return self._members

    def close(self):
        """There is nothing to end."""


class Swarm:
    """Nodes that the managers of a swarm name."""

    def __init__(self, managers, template, connect):
        self._template = template
        urls = [url if '://' in url else template.format(address=url, name=url) for url in managers]
        self._links = collections.deque((url, Link(url, connect)) for url in urls)
        self._sockets = {}  # id of a node -> URL of its engine's socket on this machine
        self._known = {}  # id of a node -> Member, as it was last told

    def members(self):
        """Return all Members, as the first manager says that knows them; raise EngineUnavailable when none
        does."""
        said = []
        for _ in range(len(self._links)):
            try:
                return self._ask(*self._links[0])
            except DockerError as error:
                said.append(str(error))
                self._links[0][1].client.close()
                self._links.rotate(-1)
        raise EngineUnavailable(f'No manager names the nodes of the swarm: {" ".join(dict.fromkeys(said))}')

    def close(self):
        """End the ways to the managers."""
        for _, link in self._links:
            link.close()

    def _ask(self, url, link):
        swarm = link.info().get('Swarm') or {}
        if not swarm.get('ControlAvailable'):
            state = swarm.get('LocalNodeState')
            raise DockerError(f'The engine at {url} is no manager of a swarm ({state}): '
                              'docker swarm init makes one, docker node promote another.')
        with link.client.errors(), gevent.Timeout(ANSWER_TIME, link.client.silence(ANSWER_TIME)):
            found = link.client.api.nodes()
        self._find_sockets(found)
        # One that left and joined again is listed twice: the dead one has lost its name, and is left out.
        members, found = {}, sorted(found, key=lambda node: node['Status']['State'] != 'ready')
        for node in found:
            name, address = (node.get('Description') or {}).get('Hostname'), address_of(node)
            # A leader that is new has not heard from every node yet: that one is as it was.
            if name and address:
                name = name if name not in members else f"{name}-{node['ID'][:6]}"
                self._known[node['ID']] = self._member(name, address, node)
            member = self._known.get(node['ID'])
            if member is not None and member.url not in {other.url for other in members.values()}:
                members[member.name] = member
        return list(members.values())

    def _find_sockets(self, found):
        """See which nodes have their engine on this machine, whoever names them; one that is late is not
        waited for."""
        known = {self._sockets.get(node['ID']) for node in found if node['Status']['State'] == 'ready'}
        for url, link in self._links:
            if url.startswith('unix://') and url not in known:
                late = link.client.silence(HERE_TIME)
                with contextlib.suppress(DockerError), gevent.Timeout(HERE_TIME, late):
                    key = (link.info().get('Swarm') or {}).get('NodeID')
                    self._sockets |= {key: url} if key else {}

    def _member(self, name, address, node):
        spec = node['Spec']
        url = self._sockets.get(node['ID']) or self._template.format(address=address, name=name)
        return Member(name, url, address, spec.get('Labels') or {}, spec['Availability'],
                      node['Status']['State'])


class Node:
    """A machine with its engine, and whether that answers."""

    def __init__(self, member, connect, **settings):
        self.member, self.name = member, member.name
        self.link = Link(member.url, connect, member.name)
        self.client = self.link.client
        self.engine = Engine(self.client, **settings)
        self.remark = ''  # what is wrong with it though it answers, in words
        self.facts = {}  # what it said of itself when it last joined
        self.since, self.why = time.time(), 'it was not asked yet'  # while it does not answer; else None, ''
        self.lost, self.tried, self.doubt = (gevent.event.Event() for _ in range(3))
        self.lost.set()
        self.bringing = gevent.lock.BoundedSemaphore(1)
        self.greenlet = None

    @property
    def away(self):
        """Since when and why it does not answer, in words; '' when it does."""
        return '' if self.since is None else (
            f'Node {self.name} does not answer since {view_time(self.since)}: {self.why}')

    @property
    def is_open(self):
        """Whether it takes something new."""
        return self.member.availability == 'active' and self.member.labels.get(PREFIX) != 'no'

    @property
    def memory(self):
        """Bytes that it has."""
        return self.facts.get('MemTotal') or 0

    @property
    def platform(self):
        """What runs on it."""
        return f"{self.facts.get('OSType')}/{self.facts.get('Architecture')}"

    def check(self):
        """Raise EngineUnavailable while it does not answer."""
        if self.away:
            raise EngineUnavailable(self.away, node=self.name)

    def call(self, function):
        """Return what a function returns that asks the engine; raise EngineUnavailable as soon as the node is
        lost, whatever the function waits for then."""
        def attempt():
            try:
                return function(), None
            except BaseException as error:
                return None, error
        self.check()
        asking = gevent.spawn(attempt)
        try:
            gevent.wait([asking, self.lost], count=1)
            if not asking.ready():
                said = self.away or f'Node {self.name} was away for a moment.'
                raise EngineUnavailable(said, node=self.name)
        finally:
            asking.kill(block=False)
        value, error = asking.value
        if isinstance(error, EngineUnavailable):
            self.doubt.set()
        if error is not None:
            raise error
        return value

    def each(self, items):
        """Yield what a generator gives that asks the engine, as `call` does."""
        end = object()
        try:
            while (item := self.call(lambda: next(items, end))) is not end:
                yield item
        finally:
            with contextlib.suppress(ValueError):  # it is at work yet, and ends with the greenlet that asks
                items.close()

    @contextlib.contextmanager
    def entered(self, manager):
        """Enter a context manager that asks the engine, as `call` does."""
        with contextlib.ExitStack() as stack:
            yield self.call(lambda: stack.enter_context(manager))

    def has_image(self, image):
        """Return whether its engine has an image."""
        with contextlib.suppress(MissingOnEngine), self.client.errors():
            self.client.api.inspect_image(image)
            return True
        return False

    def lose(self, why):
        """Note that it does not answer; return whether that is new."""
        is_new = self.since is None or not self.tried.is_set()
        self.since, self.why = self.since or time.time(), why
        self.lost.set()
        self.tried.set()
        self.client.close()
        return is_new

    def join(self, info):
        """Note that it answers, and what it says of itself."""
        self.facts, self.since, self.why, self.remark = info, None, '', ''
        self.lost.clear()
        self.tried.set()


def alias_of(host):
    """Return the host that ssh's own settings have behind a name."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run(['ssh', '-G', '--', host], capture_output=True, text=True, timeout=ANSWER_TIME,
                              check=True).stdout
        return dict(line.partition(' ')[::2] for line in said.splitlines()).get('hostname', host)
    return host


def ip_of(host):
    """Return the IP address of a host, '' for none; the engine binds ports to no names."""
    with contextlib.suppress(OSError):
        return socket.gethostbyname(host) if host else ''
    return host


def address_of(node):
    """Return the IP address of a node of a swarm, as far as it is told."""
    address = node['Status'].get('Addr', '')
    if address in ('', '0.0.0.0', '127.0.0.1'):  # a manager may say so of itself
        address = node.get('ManagerStatus', {}).get('Addr', address).rpartition(':')[0]
    return address
