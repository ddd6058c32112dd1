"""How soon an agent's first word reaches its reader, and how many events a second: each against the same
without this server.

Real Claude Code in a real workspace, with a fake of its API; figures of one run on one machine, of which the
ratios can be compared.
"""
from gevent import monkey; monkey.patch_all()  # noqa: E702, I001 - before anything imports ssl

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import docker  # noqa: E402
from agents import Execution, put, served_agents  # noqa: E402
from fake_anthropic import FakeAnthropic, bridge_address  # noqa: E402

TURNS = 5
EVENTS = 50_000
MESSAGE = {'type': 'progress',
           'data': {'step': 1, 'total': EVENTS, 'message': 'Creating one more of many files...'}}
FLOOD = f"""
const line = JSON.stringify({json.dumps(MESSAGE)}) + '\\n';
require('fs').writeSync(1, line);
setTimeout(() => {{
    for (let n = 0; n < {EVENTS}; n += 100) require('fs').writeSync(1, line.repeat(100));
}}, 500);
"""


def first_word(server):
    """Return the seconds from execute to the agent's first own event."""
    begun = time.perf_counter()
    with Execution(server, 'work', 'Say something [script:talk]') as stream:
        found = None
        for event in stream:
            if found is None and event['id'].split('-')[1] not in ('0', 'end'):
                found = time.perf_counter() - begun
    return found


def first_line(server, fake):
    """Return the seconds until the CLI prints its first line when `docker exec` starts it in the same
    workspace."""
    env = {'ANTHROPIC_BASE_URL': fake.url, 'ANTHROPIC_API_KEY': 'key', 'HOME': '/home/dev'}
    command = ['docker', 'exec', '-i', '-u', 'dev', '-w', '/workspace/work',
               *(word for item in env.items() for word in ('-e', '='.join(item))), server.container,
               'claude', '-p', '--output-format', 'stream-json', '--verbose',
               '--dangerously-skip-permissions', '--session-id', str(uuid.uuid4())]
    begun = time.perf_counter()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        running.stdin.write(b'Say something [script:talk]')
        running.stdin.close()
        running.stdout.readline()
        found = time.perf_counter() - begun
        running.stdout.read()
    return found


def events_per_second(server):
    """Return events per second from an agent's flood to a reader, live and told again, and lines per second
    of `docker exec cat`."""
    with Execution(server, 'work', 'flood', agent='command', timeout=120) as stream:
        chunks, begun, rest = stream.chunks(), None, b''
        for data in chunks:
            if begun is None and data.count(b'\nid: ') + rest.count(b'\nid: ') > 3:
                begun = time.perf_counter()
            rest = rest[-40:] + data
            if b'"type":"result"' in rest:
                break
        live = EVENTS / (time.perf_counter() - begun)
        session = stream.headers['x-session-id']
    run = server.get(f'/api/agent/sessions/{session}')['runs'][0]['id']
    begun = time.perf_counter()
    subprocess.run(['docker', 'exec', server.container, 'cat', f'/workspace/.agentbackend/runs/{run}/log'],
                   stdout=subprocess.DEVNULL, check=True)
    cat = EVENTS / (time.perf_counter() - begun)
    return live, cat


def main():
    client, folder = docker.from_env(timeout=60), Path(tempfile.mkdtemp())
    (folder / 'templates').mkdir()
    try:
        with (FakeAnthropic(bridge_address(client)) as fake,
              served_agents(folder, folder / 'templates', client, ANTHROPIC_BASE_URL=fake.url,
                            ANTHROPIC_API_KEY='key', AGENT_COMMAND='node /workspace/flood.js',
                            LOG_LEVEL='info') as server):
            put(client, server.container, 'flood.js', FLOOD)
            first_word(server), first_line(server, fake)  # the binary is in the page cache then
            ours = statistics.median(first_word(server) for _ in range(TURNS))
            theirs = statistics.median(first_line(server, fake) for _ in range(TURNS))
            live, cat = events_per_second(server)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for row in (('execute to first event', f'{ours * 1000:.0f} ms',
                 f'{ours / theirs:.2f} x docker exec claude'),
                ('docker exec claude to first line', f'{theirs * 1000:.0f} ms', '1'),
                ('one task to one reader', f'{live:,.0f} events/s', f'{live / cat:.2f} x docker exec cat'),
                ('docker exec cat of the same', f'{cat:,.0f} lines/s', '1')):
        print('| {:<34} | {:>16} | {:<26} |'.format(*row))


if __name__ == '__main__':
    main()
