"""How fast lines reach their readers: latency, one reader against the engine's own command, and how many
messages a second reach 1 to 4,000 readers until less than 99 % of them arrive within a second.

    python bench/streams.py [FOLDER [KIND READERS...]]

Prints tables, and puts a plot of each figure into FOLDER, if matplotlib is there. Figures of one run on one
machine; what can be compared between machines are the ratios.
"""
from gevent import monkey; monkey.patch_all()  # noqa: E702, I001 - before anything imports ssl

import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import docker  # noqa: E402
import gevent.pool  # noqa: E402
from conftest import Served, remove_images, remove_objects, write_template  # noqa: E402
from streaming import Sse, Ws  # noqa: E402

from _agentbackend.positions import Cursor  # noqa: E402

READERS = (1, 10, 100, 1000, 4000)
LINES = 400_000  # of the race against the engine's own command
SECONDS = 2  # for which each rate is printed
BURST = 0.02  # seconds between what is printed at once
SETTINGS = {'LOG_LEVEL': 'info', 'MAX_STREAMS': '5000'}
LISTEN = 'mkfifo /say; while :; do cat /say; done &'
READABLE = 1  # of epoll
MARK = b'"type":"log"'
TEXT = 'a line of a hundred bytes or so, as the lines of a build or of a test run are, most of the time, 1234'
FIGURES = ('messages/s', 'server CPU %', 'p50 ms', 'p99 ms', 'KB per reader')


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
        command = [sys.executable, __file__, '--read', str(server.port), kind, str(count), *workspaces]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
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


def percentile(values, share):
    return sorted(values)[int(len(values) * share)] if values else float('nan')


def cpu_of(server):
    """Return the seconds of CPU that the server has used."""
    fields = Path(f'/proc/{server.process.pid}/stat').read_text().rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def memory_of(server):
    """Return the KB of memory that the server uses."""
    return int(re.search(r'VmRSS:\s+(\d+)', Path(f'/proc/{server.process.pid}/status').read_text())[1])


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
    gevent.joinall(jobs, raise_error=True)
    return burst * bursts


def saturate(server, client, kind, count, names):
    """Return the figures of the highest rate at which 99 % reach their readers within a second."""
    before, best, rate = memory_of(server), None, max(50, 20_000 // count)
    with Readers(server, kind, count, names) as readers:
        gevent.sleep(3)  # a writer that has nothing to write waits for a second
        each = (memory_of(server) - before) / count
        while rate <= 100_000:
            readers.take()
            cpu, begun = cpu_of(server), time.perf_counter()
            wanted = say(client, server, names, rate) * count
            took = time.perf_counter() - begun
            gevent.sleep(1)
            told, waits = readers.take()
            if told < 0.99 * wanted:
                break
            used = (cpu_of(server) - cpu) / took * 100
            best = dict(zip(FIGURES, (told / took, used, percentile(waits, 0.5), percentile(waits, 0.99),
                                      each), strict=True))
            rate = rate * 3 // 2
    return best or dict.fromkeys(FIGURES, float('nan'))


def latency(server, client, name, idle):
    """Return (p50, p99) in milliseconds from the engine's stamp to a reader at 100 lines a second, beside
    idle readers."""
    with contextlib.ExitStack() as stack:
        if idle:
            stack.enter_context(Readers(server, 'ws', idle, ['idle']))
        reader = stack.enter_context(Readers(server, 'sse', 1, [name]))
        running = client.api.exec_create(f'{server.instance}-{name}',
                                         ['sh', '-c', 'n=0; while [ $n -lt 300 ]; do echo tick; n=$((n+1)); '
                                                      'usleep 10000; done >/say'])
        client.api.exec_start(running['Id'])
        _, waits = reader.take()
    return percentile(waits, 0.5), percentile(waits, 0.99)


def lines_per_second(server, client):
    """Return [(what, lines per second)] of a whole log: through SSE, `docker logs -f`, as plain text, and as
    the engine itself sends it."""
    workspace = server.running('race', env={'PRINT': f'yes "{TEXT}" | head -n {LINES}; echo end'})
    server.until(lambda: server.call('GET', '/api/workspaces/race/logs?tail=1').text == 'end\n', 120)
    text = server.call('GET', '/api/workspaces/race/logs', stream=True)
    kept = sum(data.count(b'\n') for data in text.iter_content(2**16))  # the engine keeps the last 48 MB

    def through_sse():
        with Sse(server, '/api/workspaces/race/events?since=0', timeout=60) as stream:
            data = b''
            while b'"message":"end"' not in data:
                data = data[-20:] + stream.socket.recv(2**18)
        return kept

    def through_docker():
        with subprocess.Popen(['docker', 'logs', '-f', '-t', workspace['containerId']],
                              stdout=subprocess.PIPE) as process:
            while not process.stdout.read1(65536).endswith(b' end\n'):
                pass
            process.kill()
        return kept

    def as_text():
        for _ in server.call('GET', '/api/workspaces/race/logs', stream=True).iter_content(2**16):
            pass
        return kept

    def of_the_engine():
        address = client.api._url('/containers/{0}/logs', workspace['containerId'])
        answer = client.api._get(address, stream=True, params={'stdout': 1, 'stderr': 1, 'timestamps': 1})
        with contextlib.closing(answer):
            while answer.raw._fp.fp.read1(2**16)[-5:] != b'0\r\n\r\n':
                pass
        return kept

    found = []
    # The first reader of a workspace also waits until the engine has found where its log ends.
    for name, function in (('the first SSE reader', through_sse), ('one SSE reader', through_sse),
                           ('docker logs -f', through_docker),
                           ('GET /logs', as_text), ("the engine's raw stream", of_the_engine)):
        begun = time.perf_counter()
        found.append((name, function() / (time.perf_counter() - begun)))
    server.call('DELETE', '/api/workspaces/race')
    return found


def show(rows):
    for row in rows:
        print('| {:<34} | {:>18} | {:<30} |'.format(*row), flush=True)


def plot(folder, kinds, found):
    """Put a picture of each figure into a folder."""
    try:
        import matplotlib
        matplotlib.use('Agg')
        from matplotlib import pyplot
    except ImportError:
        print('matplotlib is not there, so there are no plots: pip install .[bench]')
        return
    for figure in FIGURES:
        pyplot.figure(figsize=(6, 4))
        for kind in kinds:
            counts = [count for of, count in found if of == kind]
            pyplot.plot(counts, [found[kind, count][figure] for count in counts], marker='o',
                        label=kind.upper())
        pyplot.xscale('log')
        pyplot.xlabel('readers')
        pyplot.ylabel(figure)
        pyplot.ylim(bottom=0)
        pyplot.legend()
        pyplot.tight_layout()
        pyplot.savefig(folder / f"streams-{re.sub('[^a-zA-Z0-9]+', '-', figure)}.png")


def main(folder=None, kind=None, *counts):
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    client, place = docker.from_env(timeout=60), Path(tempfile.mkdtemp())
    (place / 'templates').mkdir()
    write_template(place / 'templates', 'tiny', test := place.name)
    server = Served(place, place / 'templates', **SETTINGS)
    kinds, counts = [kind] if kind else ['ws', 'sse'], [int(count) for count in counts] or READERS
    try:
        server.start()
        names = [f'talker-{number}' for number in range(1 if kind else 28)]
        for name in ('idle', *names):
            server.running(name, env={'PRINT': LISTEN}, ssh=False)
        if not kind:
            for idle in (0, 1000):
                p50, p99 = latency(server, client, names[0], idle)
                show([(f'stamp to reader beside {idle:,}', f'p50 {p50:.1f} ms', f'p99 {p99:.1f} ms')])
            found = lines_per_second(server, client)
            show([(name, f'{rate:,.0f} lines/s', f'{rate / group[-1][1]:.2f} x {group[-1][0]}')
                  for group in (found[:3], found[3:]) for name, rate in group])
            for one in kinds:
                best = saturate(server, client, one, 1000, names)
                show([(f'1,000 {one.upper()} of {len(names)} workspaces',
                       f"{best['messages/s']:,.0f} messages/s", f"{best['server CPU %']:.0f} % CPU")])
        print('| readers | ' + ' | '.join(FIGURES) + ' |')
        found = {}
        for one in kinds:
            for count in counts:
                best = found[one, count] = saturate(server, client, one, count, names[:1])
                figures = ' | '.join(f'{best[figure]:,.1f}' for figure in FIGURES)
                print(f'| {count:,} {one.upper()} | {figures} |', flush=True)
        plot(Path(folder or '.'), kinds, found)
    finally:
        server.stop()
        remove_objects(client, server.instance)
        remove_images(client, test)
        shutil.rmtree(place, ignore_errors=True)


if __name__ == '__main__':
    if sys.argv[1:2] == ['--read']:
        read(sys.argv[2], sys.argv[3], sys.argv[4], sys.argv[5:])
    else:
        main(*sys.argv[1:])
