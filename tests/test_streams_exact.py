"""Ten thousand lines, each told once and in order to everybody who follows them, whatever dies in between."""
import collections
import itertools
import json
import random
import time

import gevent
import pytest
from conftest import Network, Served, remove_objects
from helpers import OwnEngine
from streaming import Sse, Ws

COUNT = 5000  # lines of each stream
# 20 lines of each stream, every 90 ms or so.
PRINT = (f"n=0; while [ $n -lt {COUNT} ]; do m=0; while [ $m -lt 20 ]; do echo out $n; echo err $n >&2; "
         "n=$((n+1)); m=$((m+1)); done; "
         "usleep 85000; done; echo done; echo done >&2")
ENDS = {('stdout', 'done'), ('stderr', 'done')}
LIMIT = 90  # seconds


class Follower:
    """A client that is cut off again and again, and goes on after the last id that it has seen."""

    def __init__(self, server, workspace_id, kind, seed):
        self.server, self.workspace_id, self.kind, self.dice = server, workspace_id, kind, random.Random(seed)
        self.lines = []  # (stream, text)
        self.errors = []
        self.connections = 0
        self.last_id = None
        self.stream = None
        self.done = False
        self.naps = 3 if kind == 'stalled' else 0  # for which it takes nothing, whatever comes

    def run(self):
        while not self.done:
            try:
                with self.open() as self.stream:
                    self.connections += 1
                    self.read()
            except OSError:
                gevent.sleep(0.1)

    def open(self):
        if self.kind != 'ws':
            return Sse(self.server, f'/api/workspaces/{self.workspace_id}/events?tail=100000',
                       after=self.last_id, timeout=30,
                       receive_buffer=4096 if self.kind == 'stalled' else None)
        stream = Ws(self.server, timeout=30)
        after = {} if self.last_id is None else {'after': self.last_id}
        stream.send(type='subscribe', workspaceId=self.workspace_id, tail=100000, **after)
        return stream

    def read(self):
        assert self.stream.status == (101 if self.kind == 'ws' else 200), self.stream.status
        for message in self.stream:
            if self.naps and len(self.lines) > 2000:
                self.naps -= 1
                gevent.sleep(1.5)
            self.last_id = message['id'] or self.last_id
            if message['type'] == 'error':
                self.errors.append(message['data'])
            elif message['type'] == 'log':
                self.lines.append((message['data']['stream'], message['data']['message']))
                # The engine reads each stream for itself, so one may end long after the other.
                if self.lines[-1] in ENDS and set(self.lines) >= ENDS:
                    self.done = True
                    return

    def cut(self):
        if self.stream is not None:
            self.stream.cut()


def text_of(server, engine, workspace):
    """Return what the engine itself says was printed: {stream: lines}."""
    api = engine.client.api
    return {name: api.logs(workspace['containerId'], stdout=name == 'stdout',
                           stderr=name == 'stderr').decode().splitlines() for name in ('stdout', 'stderr')}


def until(condition, deadline):
    while not condition() and time.monotonic() < deadline:
        gevent.sleep(0.05)


def annoy(followers, stop):
    """Cut off a client now and then."""
    dice = random.Random(1)
    while not stop.is_set():
        gevent.sleep(dice.uniform(0.05, 0.6))
        dice.choice(followers).cut()


@pytest.fixture(scope='module')
def followed(tmp_path_factory, templates_dir, docker_client):
    """Clients that have followed the lines through the deaths of their connections, of the server and of the
    engine; and the truth."""
    folder, network = tmp_path_factory.mktemp('exact'), Network()
    engine = OwnEngine(folder, network, '--live-restore').start()
    served = Served(folder, templates_dir, network=network, DOCKER_HOST=f'unix://{engine.socket}')
    try:
        served.start()
        served.running('warm')  # the image is there
        workspace_id = served.create('flood', env={'PRINT': PRINT})['id']
        followers = [Follower(served, workspace_id, kind, seed)
                     for seed, kind in enumerate(['sse', 'sse', 'ws', 'ws', 'stalled'])]
        jobs, stop = [gevent.spawn(follower.run) for follower in followers], gevent.event.Event()
        jobs.append(gevent.spawn(annoy, followers, stop))
        deadline = time.monotonic() + LIMIT
        # The port must stay: clients come back to where they were.
        served.wait_status('flood', 'running')
        served.settings['PORT'] = str(served.port)
        for turn in itertools.count():
            gevent.sleep(1.5)
            if turn >= 10 or all(follower.done for follower in followers):
                break
            if turn % 2 == 0:
                served.kill()
                gevent.sleep(0.3)
                served.start(connected=False)
            else:
                engine.end(9 if turn % 4 == 1 else 15)
                gevent.sleep(0.5)
                engine.start()
        until(lambda: all(follower.done for follower in followers), deadline)
        stop.set()
        workspace = served.wait_status('flood', 'running')
        truth = text_of(served, engine, workspace)
        gevent.killall(jobs)
        print(f'{turn} deaths', [(follower.kind, follower.connections, len(follower.lines))
                                 for follower in followers])
        yield followers, truth, served
    finally:
        served.stop()
        print(served.log.read_text()[-6000:])
        remove_objects(engine.client, served.instance)
        engine.close()
        network.close()


def test_the_container_printed_all_that_it_should(followed):
    """What an engine loses by dying is not ours to tell; it must be next to nothing for the other tests to
    mean something."""
    _, truth, _ = followed
    assert truth['stdout'][0] == 'workspace: started in tiny'
    assert truth['stdout'][-1] == truth['stderr'][-1] == 'done'
    for name in ('stdout', 'stderr'):
        numbers = [int(line.split()[1]) for line in truth[name] if line.startswith(name[3:])]
        assert numbers == sorted(set(numbers)) and len(numbers) > COUNT * 0.99


@pytest.mark.parametrize('number', range(5), ids=['sse-1', 'sse-2', 'websocket-1', 'websocket-2', 'stalled'])
def test_every_line_is_told_once_and_in_order(followed, number):
    followers, truth, served = followed
    follower = followers[number]
    assert follower.connections > 8, 'it was not cut off often enough'
    told = {name: [text for stream, text in follower.lines if stream == name]
            for name in ('stdout', 'stderr')}
    for name in ('stdout', 'stderr'):
        counted = collections.Counter(told[name])
        assert [line for line in truth[name] if not counted[line]][:5] == [], 'missing'
        assert [line for line, count in counted.items() if count > 1][:5] == [], 'repeated'
        assert told[name] == truth[name]
    assert follower.errors == []


def test_the_server_had_nothing_to_say_about_it(followed):
    _, _, served = followed
    assert 'Traceback' not in served.log.read_text(), json.dumps(served.log.read_text()[-3000:])
