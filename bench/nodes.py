"""What a server over three nodes takes as workspaces add up: first on three real engines, each in name spaces
of its own on this machine, as far as this holds them; then on three that bench/double.py plays, and what is
told is the server's share."""
import contextlib
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import docker
import gevent
import gevent.pool
from conftest import first_port
from machines import Machines
from streaming import Sse, connect

from . import ROOT
from .common import IDLE, Http, cpu_of, memory_of, ms, percentile

TITLE = 'Over three nodes, as workspaces add up'
REAL = (1, 10, 60)
PLAYED = (1, 10, 100, 1000)
EACH = '64m'  # of memory, so that all find room
AT_ONCE = 8  # creates, while workspaces are added
TURNS = 5
ASKED = 30  # times the list
WATCHED = 5  # seconds for which the idle server is looked at
SETTLE = 3  # seconds after creates


class There(Http):
    """One kept connection to a server in whichever network."""

    def __init__(self, server):
        super().__init__(server.port)
        self._server = server

    def raw(self, *arguments, **named):
        if time.monotonic() - self._used > IDLE:
            self._connection.close()
            self._used = time.monotonic()
        if self._connection.sock is None:
            self._connection.sock = connect(self._server, 120)
            self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return super().raw(*arguments, **named)

    def restart(self):
        """Kill the server, and return the ms from its start until it has found everything again."""
        self._server.kill()
        self._connection.close()
        return ms(self._server.start)


def measure(bench, section, *, real=REAL, played=PLAYED):
    grown = {}
    for name, counts, engines in (('three engines', real, real_engines), ('three doubles', played, doubles)):
        with engines(bench) as (server, clients):
            grown[name] = grow(section, server, clients, counts, name)
    for what, up in (('create', 'ms, p50'), ('list', 'ms, p50'), ('event', 'ms, p50'),
                     ('found after a restart', 'ms'), ('CPU while idle', '% of a core'), ('RSS', 'MB')):
        section.picture(f"nodes-{what.replace(' ', '-').lower()}", f'Over three nodes: {what}',
                        'running workspaces', up, {name: found[what] for name, found in grown.items()})
    section.remark('Three engines: dockerd of three nodes in name spaces of their own on this machine. Three '
                   'doubles: bench/double.py answers the calls of the API and runs nothing, so that what is '
                   "told is the server's share.")
    section.remark('CPU while idle is the sweep of each second, the looks at the nodes, and the measurements '
                   'of each running workspace.')


@contextlib.contextmanager
def real_engines(bench):
    """Give a server over three machines, and {node: client of its engine}."""
    with contextlib.ExitStack() as stack:
        machines = Machines(Path(tempfile.mkdtemp()), 3)
        stack.callback(machines.close)
        server = stack.enter_context(bench.served(
            network=machines.lan, WORKSPACE_BIND_ADDRESS='{node}', **machines.settings, WORKSPACE_MEMORY=EACH,
            DOCKER_HOST=','.join(machine.url for machine in machines.all)))
        yield server, {machine.address: machine.client for machine in machines.all}


@contextlib.contextmanager
def doubles(bench):
    """Give the same over three engines that are played."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        sockets = [f'{folder}/n{number}' for number in (1, 2, 3)]
        played = stack.enter_context(subprocess.Popen(
            [sys.executable, '-m', 'bench.double', *sockets], cwd=ROOT, stdout=subprocess.PIPE))
        stack.callback(played.terminate)
        played.stdout.readline()
        start = first_port()
        server = stack.enter_context(bench.served(
            DOCKER_HOST=','.join(sockets), MAX_WORKSPACES='2000', WORKSPACE_MEMORY=EACH,
            CODE_SERVER_PORTS=f'{start}-{start + 1099}', SSH_PORTS=f'{start + 1100}-{start + 1139}',
            CUSTOM_PORTS=f'{start + 1140}-{start + 1199}'))
        names = [node['name'] for node in server.get('/api/nodes')]
        yield server, {name: docker.DockerClient(f'unix://{path}', version='1.41', timeout=60)
                       for name, path in zip(names, sockets, strict=True)}


def grow(section, server, clients, counts, on):
    """Add workspaces, tell what each of the numbers takes, and return {what: {number: value}}."""
    server.until(lambda: server.get('/health')['nodes']['ready'] == len(clients))
    http, grown, first = There(server), {}, {}
    create(http, 'first', type='agent')
    memory = 0
    for count in counts:
        gevent.pool.Pool(AT_ONCE).map(lambda number: create(There(server), f'w{number}'),
                                      range(len(http('GET', '/api/workspaces')), count))
        gevent.sleep(SETTLE)
        found = figures(server, http, clients)
        memory = memory or found['RSS'][0][0]
        if count > 1:
            found['memory of each'] = ([(found['RSS'][0][0] - memory) * 1024 / (count - 1)], 'KB')
        for what, (values, unit) in found.items():
            grown.setdefault(what, {})[count] = percentile(values, 0.5)
            theirs = first.setdefault(what, values)
            section.compare(f'{what}, {count:,} running on {on}', values, 'the first row of it', theirs,
                            unit=unit, head=count == counts[-1] and what in ('create', 'list'))
    return grown


def figures(server, http, clients):
    """Return {what: (values, unit)} beside the workspaces that there are."""
    used = cpu_of(server)
    gevent.sleep(WATCHED)
    used = (cpu_of(server) - used) / WATCHED * 100
    made = []
    for number in range(TURNS):
        made.append(ms(create, http, f'more-{number}'))
        gevent.sleep(0.3)
    for number in range(TURNS):
        http('DELETE', f'/api/workspaces/more-{number}')
    listed = [ms(http, 'GET', '/api/workspaces') for _ in range(ASKED)]
    events = [told(server, http, clients) for _ in range(TURNS)]
    memory = memory_of(server)
    return {'create': (made, 'ms'), 'list': (listed, 'ms'), 'event': (events, 'ms'),
            'found after a restart': ([http.restart()], 'ms'),
            'CPU while idle': ([used], '% of a core'), 'RSS': ([memory], 'MB')}


def create(http, name, **fields):
    """Create a workspace, and wait until it runs."""
    http('POST', '/api/workspaces?wait=running', {'name': name, 'template': 'tiny', 'ssh': False, **fields})


def told(server, http, clients):
    """Return the ms from the end of a container, which its engine was told to kill, until a reader knows."""
    first = http('GET', '/api/workspaces/first')
    with Sse(server, '/api/workspaces/first/events') as events:
        begun = time.perf_counter()
        clients[first['node']].api.kill(first['containerId'])
        next(event for event in events if event['data'].get('status') == 'stopped')
        waited = (time.perf_counter() - begun) * 1000
        events.cut()
    http('POST', '/api/workspaces/first/start')
    http.wait_running('first')
    return waited
