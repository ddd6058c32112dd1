"""What a change costs as ended tasks pile up: a start, a PATCH and an execute at 0 to 50,000 of them, each
against none."""
import contextlib
import json
import sqlite3
import time
from pathlib import Path

import requests

from .common import Http, percentile

TITLE = 'As ended tasks pile up'
COUNTS = (0, 1_000, 10_000, 50_000)
TURNS = 12


def measure(bench, section):
    grown = {'PATCH': {}, 'execute to its first byte': {}}
    with bench.served(AGENT_COMMAND='cat', KEEP_RUNS='1000000') as server:
        Http(server.port).running('work', template='blank')
        changes(server, 2)  # leaves the task that the others are like
        first = None
        for count in COUNTS:
            server.stop()
            fill(server, count)
            begun = time.perf_counter()
            server.start()
            start = (time.perf_counter() - begun) * 1000
            changes(server, 1)
            with section.watching(server, f'both, {count:,} ended tasks'):
                found = [[start], *changes(server, TURNS)]
            first = first or found
            for what, ours, theirs in zip(('start', *grown), found, first, strict=True):
                section.compare(f'{what}, {count:,} ended tasks', ours, 'none', theirs,
                                head=count == COUNTS[-1] and what == 'PATCH')
                if what in grown:
                    grown[what][count] = percentile(ours, 0.5)
    section.picture('runs', 'Changes as ended tasks pile up', 'ended tasks', 'ms, p50', grown)


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


def changes(server, turns):
    """Return the ms of each PATCH, and of each execute to its first byte."""
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
        for turn in range(turns):
            patches.append(timed('PATCH', '/api/workspaces/work', {'labels': {'turn': str(turn)}}))
            executes.append(timed('POST', '/api/agent/execute',
                                  {'workspaceId': 'work', 'task': 'x', 'agent': 'command'}, stream=True))
    return patches, executes
