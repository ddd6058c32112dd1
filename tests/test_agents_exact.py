"""A task of at least ten thousand events, each told once and in order to everybody who comes back, whatever
dies in between."""
import contextlib
import random
import subprocess

import gevent
import pytest
import requests
from agents import begin, ended
from conftest import Network, Served, remove_objects
from helpers import OwnEngine
from streaming import Sse

COUNT = 10_000
ENOUGH = '/workspace/enough'  # until it is there, the task goes on: a slow machine disturbs less in a second
# 50 events every tenth of a second or so, and every second once there are enough.
STEP = ('{\\"type\\":\\"progress\\",'
        '\\"data\\":{\\"step\\":$n,\\"total\\":null,\\"message\\":\\"step $n\\"}}')
AGENT = (f"""sh -c 'n=0; pause=0.08; while [ $n -lt {COUNT} ] || [ ! -e {ENOUGH} ]; do m=0; """
         f"""while [ $m -lt 50 ]; do n=$((n+1)); m=$((m+1)); echo "{STEP}"; done; """
         f"""[ $n -lt {COUNT} ] || pause=1; sleep $pause; done'""")


class Follower:
    """A client that is cut off again and again, and comes back with the id of the last event that it has
    seen."""

    def __init__(self, server, path, seed):
        self.server, self.path, self.dice = server, path, random.Random(seed)
        self.events, self.last_id, self.stream, self.cuts, self.done = [], None, None, 0, False

    def run(self):
        while not self.done:
            try:
                with Sse(self.server, self.path, after=self.last_id, timeout=30) as self.stream:
                    for event in self.stream:
                        self.last_id = event['id'] or self.last_id
                        if 'sessionId' not in event:
                            continue
                        self.events.append((event['type'], event['data']))
                        if event['type'] in ('result', 'error'):
                            self.done = True
                            return
            except (OSError, ValueError):
                gevent.sleep(0.02)

    def cut(self, times):
        before, in_vain = 0, 0
        while not self.done and self.cuts < times:
            gevent.sleep(self.dice.uniform(0.02, 0.2))
            in_vain = in_vain + 1 if len(self.events) == before else 0
            before = len(self.events)
            if in_vain == 10:
                self._wait_for_more()
                in_vain = 0
            if self.stream is not None:
                self.stream.cut()
                self.cuts += 1

    def _wait_for_more(self):
        """Wait until something has come: to answer may take a busy machine longer than from cut to cut."""
        before = len(self.events)
        for _ in range(500):
            if self.done or len(self.events) > before:
                return
            gevent.sleep(0.01)

    @property
    def steps(self):
        return [data['step'] for kind, data in self.events if kind == 'progress']


def settings_of(folder):
    return {'TEMPLATES_DIR': str(folder), 'DEFAULT_TEMPLATE': 'agents', 'AGENT_COMMAND': AGENT,
            'DEFAULT_AGENT': 'command', 'LOG_LEVEL': 'info'}


def die_and_come_back(served, die, until_done, *, times):
    """Let it die so many times while the task runs; return how often it did."""
    count, dice = 0, random.Random(7)
    while count < times and not until_done():
        gevent.sleep(dice.uniform(0.6, 1.4))
        die(count)
        count += 1
    return count


def follow(served, engine, die, *, times, cuts):
    """Run the task with a client of its session and one of its workspace until something died so many times,
    and each client was cut off so often; return both, and how often something died."""
    workspace = served.running('work')
    served.settings['PORT'] = str(served.port)  # clients come back to where they were
    session = 'exact'
    followers = [Follower(served, f'/agent/sse/{session}', 1),
                 Follower(served, f"/api/workspaces/{workspace['id']}/events", 2)]
    jobs = [gevent.spawn(one.run) for one in followers]
    gevent.sleep(0.3)  # the one of the workspace is there before the task
    begin(served, 'count', sessionId=session)
    jobs += [gevent.spawn(one.cut, cuts) for one in followers]
    deaths = die_and_come_back(served, die, lambda: followers[0].done, times=times)
    with contextlib.suppress(AssertionError):
        served.until(lambda: all(one.cuts == cuts for one in followers), 120)
    engine.containers.get(workspace['containerId']).exec_run(['touch', ENOUGH])
    with contextlib.suppress(AssertionError):
        served.until(lambda: all(one.done for one in followers), 60)
    gevent.killall(jobs)
    print(f'{deaths} deaths', [(one.cuts, len(one.events)) for one in followers])
    return *followers, deaths


def whole_transcript(served):
    """Return (type, data) of all events of the session, page by page. That each has the form which the API
    promises is seen where there are fewer: it would take a minute here."""
    found, after = [], ''
    while after is not None:
        answer = requests.get(f'http://127.0.0.1:{served.port}/api/agent/sessions/exact/events?limit=1000{after}')
        found += answer.json()['data']['events']
        after = answer.json()['data']['next'] and f"&after={answer.json()['data']['next']}"
    return [(event['type'], event['data']) for event in found]


def restart(served):
    served.kill()
    gevent.sleep(0.1)
    served.start(connected=False)


@pytest.fixture(scope='module')
def killed(tmp_path_factory, agents_template, docker_client):
    """A task during which the server was killed ten times, and its clients more than a hundred times."""
    folder, _ = agents_template
    served = Served(tmp_path_factory.mktemp('killed'), folder, **settings_of(folder)).start()
    try:
        yield served, *follow(served, docker_client, lambda number: restart(served), times=10, cuts=100)
    finally:
        served.stop()
        print(served.log.read_text()[-6000:])
        remove_objects(docker_client, served.instance)


def test_each_event_of_a_session_comes_once_and_in_order_over_ten_kills_of_the_server(killed):
    served, session, _, deaths = killed
    assert deaths == 10 and session.cuts == 100, 'it was not disturbed enough to mean something'
    assert session.steps == list(range(1, len(session.steps) + 1)) and len(session.steps) >= COUNT
    assert session.events[0][0] == 'log' and session.events[-1][0] == 'result'
    assert len(session.events) == len(session.steps) + 2
    assert session.events == whole_transcript(served)


def test_a_reader_of_the_workspace_sees_each_event_of_the_task_once_and_in_order(killed):
    _, session, workspace, _ = killed
    assert workspace.done and workspace.cuts == 100
    assert len(set(workspace.steps)) == len(workspace.steps), 'repeated'
    assert workspace.steps == session.steps


def test_the_end_is_told_again_in_the_same_words_by_a_new_server(killed):
    served, session, *_ = killed
    restart(served)
    served.until(lambda: served.get('/health')['docker'] == 'connected')
    with Sse(served, '/agent/sse/exact', after=f'1-{len(session.steps)}-0') as stream:
        event = next(iter(stream))
    assert (event['id'], event['type'], event['data']) == ('1-end-0', *session.events[-1])
    assert ended(served, 'exact')['state'] == 'completed'
    assert 'Traceback' not in served.log.read_text()


def test_each_event_comes_once_and_in_order_over_deaths_of_the_engine(tmp_path_factory, agents_template):
    folder, base = agents_template
    place, network = tmp_path_factory.mktemp('engine'), Network()
    engine = OwnEngine(place, network, '--live-restore').start()
    served = Served(place, folder, network=network, DOCKER_HOST=f'unix://{engine.socket}',
                    **settings_of(folder))
    try:
        with subprocess.Popen(['docker', 'save', base], stdout=subprocess.PIPE) as saved:
            engine.client.images.load(saved.stdout)
        served.start()

        def die(number):
            engine.end(9 if number % 2 == 0 else 15)
            gevent.sleep(0.3)
            engine.start()
            if number == 2:
                restart(served)

        session, workspace, deaths = follow(served, engine.client, die, times=4, cuts=50)
        assert deaths == 4 and session.cuts == 50
        assert len(session.steps) >= COUNT and session.events[-1][0] == 'result'
        assert session.steps == list(range(1, len(session.steps) + 1))
        assert workspace.steps == session.steps
    finally:
        served.stop()
        print(served.log.read_text()[-6000:])
        with contextlib.suppress(requests.RequestException):
            remove_objects(engine.client, served.instance)
        engine.close()
        network.close()
        subprocess.run(['umount', '-q', str(place / 'data')], check=False)
