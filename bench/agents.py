"""How soon an agent's first word reaches its reader, and how many events a second, against the agent's own
command line: real Claude Code in a real workspace, with a fake of its API."""
import json
import subprocess
import time
import uuid

from agents import Execution, put
from fake_anthropic import FakeAnthropic, bridge_address

from .common import Http, turn_about

TITLE = 'Agents'
TURNS = 8
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


def measure(bench, section):
    with (FakeAnthropic(bridge_address(bench.client)) as fake,
          bench.served(ANTHROPIC_BASE_URL=fake.url, ANTHROPIC_API_KEY='key',
                       AGENT_COMMAND='node /workspace/flood.js') as server):
        container = Http(server.port).running('work', template='blank')['containerId']
        put(bench.client, container, 'flood.js', FLOOD)
        first_word(server), first_line(container, fake)  # the binary is in the page cache then
        with section.watching(server, 'tasks of Claude'):
            ours, theirs = turn_about(TURNS, lambda: first_word(server), lambda: first_line(container, fake))
        section.compare('execute to the first event', ours, 'docker exec claude, to its first line', theirs,
                        head=True)
        with section.watching(server, 'a flood of events'):
            live, cat = events_per_second(server, container)
        section.compare('events of one task to one reader', [live], 'docker exec cat of the same', [cat],
                        unit='/s')


def first_word(server):
    """Return the ms from execute to the agent's first own event."""
    begun, found = time.perf_counter(), None
    with Execution(server, 'work', 'Say something [script:talk]') as stream:
        for event in stream:
            if found is None and event['id'].split('-')[1] not in ('0', 'end'):
                found = (time.perf_counter() - begun) * 1000
    return found


def first_line(container, fake):
    """Return the ms until the CLI prints its first line when `docker exec` starts it in the same
    workspace."""
    env = {'ANTHROPIC_BASE_URL': fake.url, 'ANTHROPIC_API_KEY': 'key', 'HOME': '/home/dev'}
    command = ['docker', 'exec', '-i', '-u', 'dev', '-w', '/workspace/work',
               *(word for item in env.items() for word in ('-e', '='.join(item))), container,
               'claude', '-p', '--output-format', 'stream-json', '--verbose',
               '--dangerously-skip-permissions', '--session-id', str(uuid.uuid4())]
    begun = time.perf_counter()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        running.stdin.write(b'Say something [script:talk]')
        running.stdin.close()
        running.stdout.readline()
        found = (time.perf_counter() - begun) * 1000
        running.stdout.read()
    return found


def events_per_second(server, container):
    """Return events per second from an agent's flood to a reader, and lines per second of `docker exec
    cat`."""
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
    subprocess.run(['docker', 'exec', container, 'cat', f'/workspace/.agentbackend/runs/{run}/log'],
                   stdout=subprocess.DEVNULL, check=True)
    return live, EVENTS / (time.perf_counter() - begun)
