"""How fast lines reach their readers: latency, one SSE reader against `docker logs -f`, and a thousand
readers of each kind.

Figures of one run on one machine; what can be compared between machines are the ratios.
"""
from gevent import monkey; monkey.patch_all()  # noqa: E702, I001 - before anything imports ssl

import contextlib
import datetime
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
import gevent  # noqa: E402
from conftest import Served, remove_images, remove_objects, write_template  # noqa: E402
from streaming import Sse, Ws  # noqa: E402

READERS = 1000
LINES = 100_000  # of the race against `docker logs`
TICK = 'while :; do echo tick; usleep 10000; done &'
LISTEN = 'mkfifo /say; while :; do cat /say; done &'


def percentile(values, share):
    return sorted(values)[int(len(values) * share)]


def latency(server, seconds=5):
    """Return (p50, p99) in milliseconds from the engine's stamp of a line to its reader."""
    server.running('ticker', env={'PRINT': TICK})
    found, end = [], time.monotonic() + seconds
    with Sse(server, '/api/workspaces/ticker/events?tail=0') as stream:
        for message in stream:
            now = time.time()
            if message['type'] == 'log':
                stamp = datetime.datetime.fromisoformat(message['timestamp'].replace('Z', '+00:00'))
                found.append((now - stamp.timestamp()) * 1000)
            if time.monotonic() > end:
                break
    server.call('DELETE', '/api/workspaces/ticker')
    return percentile(found, 0.5), percentile(found, 0.99)


def lines_per_second(server, client):
    """Return lines per second of a whole log through SSE, and through `docker logs -f` of the same
    container."""
    line = 'a line of a hundred bytes or so, as the lines of a build or of a test run are, mostly, 123'
    workspace = server.running('race', env={'PRINT': f'yes "{line}" | head -n {LINES}; echo end'})
    server.until(lambda: server.call('GET', '/api/workspaces/race/logs?tail=1').text == 'end\n', 60)
    begun = time.perf_counter()
    with Sse(server, '/api/workspaces/race/events?tail=100000', timeout=60) as stream:
        # The bytes are read and not understood: what is measured is the server.
        while b'"message":"end"' not in stream.read_chunk():
            pass
    ours = LINES / (time.perf_counter() - begun)
    begun = time.perf_counter()
    process = subprocess.Popen(['docker', 'logs', '-f', '-t', workspace['containerId']],
                               stdout=subprocess.PIPE)
    while not process.stdout.read1(65536).endswith(b' end\n'):
        pass
    theirs = LINES / (time.perf_counter() - begun)
    process.kill()
    process.wait()
    server.call('DELETE', '/api/workspaces/race')
    return ours, theirs


def fan_out(server, client, kind, rate, seconds=4):
    """Return messages per second to a thousand readers, and the share of what was printed that they got in
    that time."""
    name = f'fan-{kind}'
    workspace = server.running(name, env={'PRINT': LISTEN})
    counts = [0]

    def read(stream):
        with stream, contextlib.suppress(OSError):  # it is cut off in the end
            while True:
                data = stream.socket.recv(262144)
                if not data:
                    return
                counts[0] += data.count(b'"type":"log"')

    streams = []
    for _ in range(READERS):
        if kind == 'sse':
            stream = Sse(server, f'/api/workspaces/{name}/events?tail=0', timeout=60)
        else:
            stream = Ws(server, timeout=60)
            stream.send(type='subscribe', workspaceId=name, tail=0)
        streams.append(stream)
    jobs = [gevent.spawn(read, stream) for stream in streams]
    gevent.sleep(2)
    pause = 1_000_000 // rate
    running = client.api.exec_create(workspace['containerId'],
                                     ['sh', '-c',
                                      f'n=0; while [ $n -lt {rate * seconds} ]; do echo "line $n of a test '
                                      f'run"; n=$((n+1)); usleep {pause}; done >/say'])
    counts[0], begun = 0, time.perf_counter()
    client.api.exec_start(running['Id'])
    wanted = rate * seconds * READERS
    while counts[0] < wanted and time.perf_counter() - begun < seconds * 2:
        gevent.sleep(0.02)
    took = time.perf_counter() - begun
    for stream in streams:
        stream.cut()
    gevent.killall(jobs)
    server.call('DELETE', f'/api/workspaces/{name}')
    return counts[0] / took, counts[0] / wanted


def main():
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    client, folder = docker.from_env(timeout=60), Path(tempfile.mkdtemp())
    (folder / 'templates').mkdir()
    write_template(folder / 'templates', 'tiny', test := folder.name)
    server = Served(folder, folder / 'templates', LOG_LEVEL='info')
    try:
        server.start()
        p50, p99 = latency(server)
        ours, theirs = lines_per_second(server, client)
        rows = [('stamp to SSE client, p50', f'{p50:.1f} ms', ''),
                ('stamp to SSE client, p99', f'{p99:.1f} ms', f'{p99 / p50:.1f} x p50'),
                ('one SSE reader', f'{ours:,.0f} lines/s', f'{ours / theirs:.2f} x docker logs -f'),
                ('docker logs -f', f'{theirs:,.0f} lines/s', '1')]
        for kind in ('ws', 'sse'):
            rate, share = fan_out(server, client, kind, 50)
            rows.append((f'{READERS} {kind.upper()} readers', f'{rate:,.0f} messages/s',
                         f'{share:.0%} of 50 lines/s to each'))
        for row in rows:
            print('| {:<26} | {:>18} | {:<28} |'.format(*row))
    finally:
        server.stop()
        remove_objects(client, server.instance)
        remove_images(client, test)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == '__main__':
    main()
