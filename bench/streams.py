"""How fast lines reach their readers: latency, one reader against the engine's own command, and how many
messages a second reach 1 to 5,000 readers until less than 99 % of them arrive within a second.

    python -m bench.streams --read PORT KIND COUNT WORKSPACE...    the readers' own process
"""
import contextlib
import json
import os
import re
import resource
import subprocess
import sys
import time

import gevent
import gevent.pool
from gevent import monkey
from streaming import Sse, Ws

from _agentbackend.positions import Cursor

from . import ROOT
from .common import Http, cpu_of, memory_of, percentile, turn_about

TITLE = 'Logs and streams'
READERS = (1, 100, 1000, 5000)
LINES = 400_000  # of the race against the engine's own command
SECONDS = 1  # for which each rate is printed
BURST = 0.02  # seconds between what is printed at once
WORKSPACES = 28
LISTEN = 'mkfifo /say; while :; do cat /say; done &'
READABLE = 1  # of epoll
MARK = b'"type":"log"'
TEXT = 'a line of a hundred bytes or so, as the lines of a build or of a test run are, most of the time, 1234'
FIGURES = ('messages/s', 'server CPU %', 'p50 ms', 'p99 ms', 'KB per reader')


def measure(bench, section):
    with bench.served(MAX_STREAMS='7000') as server:
        http = Http(server.port)
        names = [f'talker-{number}' for number in range(WORKSPACES)]
        for name in ('idle', *names):
            http('POST', '/api/workspaces', {'name': name, 'template': 'tiny', 'env': {'PRINT': LISTEN},
                                             'ssh': False})
        for name in ('idle', *names):
            http.wait_running(name)
        for idle in (0, 1000):
            section.tell(f'from the engine to a reader, beside {idle:,} idle ones',
                         latency(server, bench.client, names[0], idle), head=idle == 1000)
        race(section, server, http, bench.client)
        with section.watching(server, f'1,000 readers of {WORKSPACES} workspaces'):
            best = saturate(server, bench.client, 'ws', 1000, names)
        section.tell(f'messages to 1,000 WebSockets of {WORKSPACES} workspaces', best['messages/s'],
                     unit='/s')
        found = {kind: {} for kind in ('ws', 'sse')}
        for kind, figures in found.items():
            with section.watching(server, f'{kind.upper()} readers, at their limit'):
                for count in READERS:
                    figures[count] = best = saturate(server, bench.client, kind, count, names[:1])
                    told = ', '.join(f'{figure} {best[figure]:.0f}' for figure in FIGURES[1:])
                    section.tell(f'messages to {count:,} {kind.upper()}: {told}', best['messages/s'],
                                 unit='/s', head=count == 1000)
        for figure in FIGURES:
            section.picture('streams-' + re.sub('[^a-zA-Z0-9]+', '-', figure).strip('-'), figure, 'readers',
                            figure, {kind.upper(): {count: best[figure] for count, best in figures.items()}
                                     for kind, figures in found.items()})


# The readers, in a process of their own: they count bytes, since to understand them would take longer than to
# send them.


def read(port, kind, count, workspaces):
    """Open the streams and say `ready`; then answer each line of stdin with what came since the one
    before."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    server = type('Server', (), {'port': int(port), 'network': None, 'headers': {}})

    def opened(number):
        name = workspaces[number % len(workspaces)]
        if kind == 'sse':
            stream = Sse(server, f'/api/workspaces/{name}/events?tail=0', timeout=60)
        else:
            stream = Ws(server, timeout=60)
            stream.send(type='subscribe', workspaceId=name, tail=0)
        next(iter(stream))
        return stream
    streams = gevent.pool.Pool(50).map(opened, range(int(count)))
    chooser = monkey.get_original('select', 'epoll')()
    for stream in streams:
        chooser.register(stream.socket.fileno(), READABLE)
    chooser.register(0, READABLE)
    print('ready', flush=True)
    watched, told, waits, rests = streams[0].socket.fileno(), 0, [], {}
    while True:
        for fd, _ in chooser.poll():
            data = os.read(fd, 2**18)
            if fd == 0:
                if not data:
                    return
                print(json.dumps([told, waits]), flush=True)
                told, waits = 0, []
                continue
            if not data:
                chooser.unregister(fd)
                continue
            data = rests.get(fd, b'') + data
            told += data.count(MARK)
            rests[fd] = data[-len(MARK) + 1:]
            if fd == watched:
                waits += [(time.time() - stamp) * 1000 for stamp in stamps_of(data)]


def stamps_of(data):
    """Return when the engine had the lines of which some bytes tell."""
    for found in re.findall(rb'"id":"([^"]+)","timestamp"', data)[-20:]:
        stamps = [stamp for stamp, _ in Cursor.parse(found.decode()).log._last.values() if stamp]
        second, fraction = max(stamps)[:19], max(stamps)[20:29]
        yield time.mktime(time.strptime(second, '%Y-%m-%dT%H:%M:%S')) - time.timezone + int(fraction) / 1e9


class Readers:
    """That process, as the bench has it."""

    def __init__(self, server, kind, count, workspaces):
        command = [sys.executable, '-m', 'bench.streams', '--read', str(server.port), kind, str(count)]
        self._process = subprocess.Popen([*command, *workspaces], cwd=ROOT, text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout.readline() == 'ready\n'

    def take(self):
        """Return (how many lines came since the last time, milliseconds that some of them took)."""
        self._process.stdin.write('\n')
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()


# What is measured


def say(client, server, names, rate):
    """Let workspaces print together so many lines a second; return how many each has."""
    burst = max(1, round(rate / len(names) * BURST))
    bursts = max(1, round(rate / len(names) * SECONDS / burst))
    pause = round(SECONDS / bursts * 1e6)
    command = (f'b=$(n=0; while [ $n -lt {burst} ]; do echo "line $n of a test run"; n=$((n+1)); done); '
               f'n=0; while [ $n -lt {bursts} ]; do echo "$b"; n=$((n+1)); usleep {pause}; done >/say')
    jobs = []
    for name in names:
        running = client.api.exec_create(f'{server.instance}-{name}', ['sh', '-c', command])
        jobs.append(gevent.spawn(client.api.exec_start, running['Id']))
    gevent.joinall(jobs, timeout=20, raise_error=True)
    gevent.killall(jobs)
    return burst * bursts


def saturate(server, client, kind, count, names):
    """Return the figures of the highest rate at which 99 % reach their readers within a second."""
    before, best, rate = memory_of(server), None, max(20, 50_000 // count)
    with Readers(server, kind, count, names) as readers:
        gevent.sleep(3)  # a writer that has nothing to write waits for a second
        each = (memory_of(server) - before) * 1024 / count
        while rate <= 100_000:
            readers.take()
            cpu, begun = cpu_of(server), time.perf_counter()
            wanted = say(client, server, names, rate) * count
            took = time.perf_counter() - begun
            gevent.sleep(1)
            told, waits = readers.take()
            if told < 0.99 * wanted or took > 3 * SECONDS:  # they came late, or were printed late
                break
            used = (cpu_of(server) - cpu) / took * 100
            best = dict(zip(FIGURES, (told / took, used, percentile(waits, 0.5), percentile(waits, 0.99),
                                      each), strict=True))
            rate = rate * 3 // 2
    return best or dict.fromkeys(FIGURES, float('nan'))


def latency(server, client, name, idle):
    """Return the milliseconds from the engine's stamp to a reader at 100 lines a second, beside idle
    readers."""
    with contextlib.ExitStack() as stack:
        if idle:
            stack.enter_context(Readers(server, 'ws', idle, ['idle']))
        reader = stack.enter_context(Readers(server, 'sse', 1, [name]))
        running = client.api.exec_create(f'{server.instance}-{name}',
                                         ['sh', '-c', 'n=0; while [ $n -lt 300 ]; do echo tick; n=$((n+1)); '
                                                      'usleep 10000; done >/say'])
        client.api.exec_start(running['Id'])
        return reader.take()[1]


def race(section, server, http, client):
    """Tell how many lines per second of a whole log come through SSE against `docker logs -f`, and as plain
    text against what the engine itself sends."""
    container = http.running('race', template='tiny', ssh=False, env={
        'PRINT': f'yes "{TEXT}" | head -n {LINES}; echo end'})['containerId']
    server.until(lambda: http.raw('GET', '/api/workspaces/race/logs?tail=1') == b'end\n', 120)
    kept = http.raw('GET', '/api/workspaces/race/logs').count(b'\n')  # the engine keeps the last 48 MB

    def through_sse():
        with Sse(server, '/api/workspaces/race/events?since=0', timeout=60) as stream:
            data = b''
            while b'"message":"end"' not in data:
                data = data[-20:] + stream.socket.recv(2**18)

    def through_docker():
        with subprocess.Popen(['docker', 'logs', '-f', '-t', container], stdout=subprocess.PIPE) as process:
            while not process.stdout.read1(65536).endswith(b' end\n'):
                pass
            process.kill()

    def as_text():
        answer = server.call('GET', '/api/workspaces/race/logs', stream=True)
        for _ in answer.iter_content(2**16):
            pass

    def of_the_engine():
        address = client.api._url('/containers/{0}/logs', container)
        answer = client.api._get(address, stream=True, params={'stdout': 1, 'stderr': 1, 'timestamps': 1})
        with contextlib.closing(answer):
            while answer.raw._fp.fp.read1(2**16)[-5:] != b'0\r\n\r\n':
                pass

    def timed(function):
        begun = time.perf_counter()
        function()
        return kept / (time.perf_counter() - begun)
    # The first reader of a workspace also waits until the engine has found where its log ends.
    section.tell('a whole log, the first SSE reader', timed(through_sse), unit='lines/s')
    with section.watching(server, 'readers of whole logs'):
        for what, ours, against, theirs in (
                ('one SSE reader', through_sse, 'docker logs -f', through_docker),
                ('GET /logs', as_text, "the engine's raw stream", of_the_engine)):
            one, two = turn_about(3, lambda ours=ours: timed(ours), lambda theirs=theirs: timed(theirs))
            section.compare(f'a whole log, {what}', one, against, two, unit='lines/s',
                            head=ours is through_sse)
    http('DELETE', '/api/workspaces/race')


if __name__ == '__main__':
    read(sys.argv[2], sys.argv[3], sys.argv[4], sys.argv[5:])
