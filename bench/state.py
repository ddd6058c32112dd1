"""What a change costs as ended tasks pile up: a PATCH and an execute at 0, 1,000, 10,000 and 50,000 of them,
and the longest time that the server stood still meanwhile, each against none.

    python bench/state.py [turns]
"""
from gevent import monkey; monkey.patch_all()  # noqa: E702, I001 - before anything imports ssl

import contextlib
import json
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import docker  # noqa: E402
import requests  # noqa: E402
from agents import served_agents  # noqa: E402

COUNTS = (0, 1_000, 10_000, 50_000)
# Asks for /health without a pause, in a process of its own; prints the longest time in ms that it took.
WATCH = """
import http.client, sys, time
connection, longest = http.client.HTTPConnection('127.0.0.1', int(sys.argv[1])), 0
until = time.perf_counter() + float(sys.argv[2])
while time.perf_counter() < until:
    begun = time.perf_counter()
    connection.request('GET', '/health')
    connection.getresponse().read()
    longest = max(longest, time.perf_counter() - begun)
    time.sleep(0.001)
print(longest * 1000)
"""


def fill(server, count):
    """Give the state file of a stopped server so many ended tasks like the one that it has, each of a session
    of its own."""
    path = Path(server.settings['STATE_DIR']) / f'{server.instance}.sqlite'
    with contextlib.closing(sqlite3.connect(path)) as file:
        session, run = [json.loads(file.execute(f'SELECT record FROM {table}').fetchone()[0])
                        for table in ('sessions', 'runs')]
        have = file.execute('SELECT count(*) FROM runs').fetchone()[0]
        for number in range(have, count):
            name, serial = f'filled-{number}', number + 1
            session |= {'id': name}
            run |= {'session_id': name, 'id': f'run-{number}', 'serial': serial}
            file.execute('INSERT INTO sessions VALUES (?, ?)', (name, json.dumps(session)))
            file.execute('INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?)',
                         (name, 1, run['workspace_id'], serial, run['ended_at'], 0, json.dumps(run)))
        file.commit()


def measure(server, turns):
    """Return the medians in ms of a PATCH and of an execute to its first byte, and the longest /health
    meanwhile."""
    patches, executes = [], []
    with requests.Session() as client:
        def timed(method, path, body, **options):
            begun = time.perf_counter()
            answer = client.request(method, f'http://127.0.0.1:{server.port}{path}', json=body, **options)
            assert answer.status_code < 300, answer.text
            next(answer.iter_content(64)) if options else answer.content
            found = (time.perf_counter() - begun) * 1000
            for _ in answer.iter_content(65536) if options else ():
                pass
            return found
        timed('PATCH', '/api/workspaces/work', {'labels': {'turn': 'warm'}})
        with subprocess.Popen([sys.executable, '-c', WATCH, str(server.port), str(turns * 0.6)],
                              stdout=subprocess.PIPE) as watch:
            for turn in range(turns):
                patches.append(timed('PATCH', '/api/workspaces/work', {'labels': {'turn': str(turn)}}))
                executes.append(timed('POST', '/api/agent/execute',
                                      {'workspaceId': 'work', 'task': 'x', 'agent': 'command'}, stream=True))
            longest = float(watch.stdout.read())
    return statistics.median(patches), statistics.median(executes), longest


def main():
    turns = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    client, folder = docker.from_env(timeout=60), Path(tempfile.mkdtemp())
    (folder / 'templates').mkdir()
    first = None
    print('| ended tasks | start | PATCH | execute to first byte | longest /health |')
    print('| ---: | ---: | ---: | ---: | ---: |')
    try:
        with served_agents(folder, folder / 'templates', client, AGENT_COMMAND='cat', LOG_LEVEL='info',
                           KEEP_RUNS='1000000') as server:
            measure(server, 1)
            for count in COUNTS:
                server.stop()
                fill(server, count)
                begun = time.perf_counter()
                server.start()
                start = time.perf_counter() - begun
                patch, execute, longest = measure(server, turns)
                first = first or (patch, execute)
                print(f'| {count:,} | {start:.2f} s | {patch:.1f} ms, {patch / first[0]:.2f} x '
                      f'| {execute:.0f} ms, {execute / first[1]:.2f} x | {longest:.0f} ms |', flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == '__main__':
    main()
