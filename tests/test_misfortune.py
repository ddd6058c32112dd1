"""What happens when something comes at the worst moment: calls in between, and workspaces that answer what
they should not.

Such moments can't be waited for, so here the real backend runs in this process, and a step of its engine is
made to do more.
"""
import contextlib
import itertools
import json
import time
import uuid

import gevent
import pytest
from agents import begin, ended, is_end, progress
from conftest import Served, objects_of, remove_objects
from helpers import check_fairness, in_container, seconds_of
from streaming import Sse, Ws, has_text, messages_until, statuses

import agentbackend
from _agentbackend import engine as engine_module
from _agentbackend.clients import WebSocketClient
from _agentbackend.errors import DockerError, EngineUnavailable, UnreadableLog, ValidationError
from _agentbackend.feeds import SessionFeed, WorkspaceFeed
from _agentbackend.positions import BEGINNING, Cursor
from _agentbackend.records import CREATING, DELETING

# It prints as many steps as its task says; `wait` is a task that does not end.
COUNTER = ("""sh -c 'read n rest; case $n in wait) sleep 1000;; """
           """*) seq -f "{\\"type\\":\\"progress\\",\\"data\\":{\\"step\\":%.0f}}" $n;; esac'""")


@contextlib.contextmanager
def opened(folder, docker_client, **settings):
    """A backend in this process; all that it made is removed in the end."""
    instance = 'test-' + uuid.uuid4().hex[:8]
    made = agentbackend.make_backend(agentbackend.Config.from_env({
        'INSTANCE': instance, 'STATE_DIR': str(folder), 'PREBUILD': 'none',
        'CODE_SERVER_PORTS': '11000-11099', 'SSH_PORTS': '11100-11199',
        'CUSTOM_PORTS': '11200-11299', **settings})).open()
    yield made
    made.close()
    remove_objects(docker_client, instance)


@pytest.fixture
def backend(tmp_path, templates_dir, docker_client):
    """A backend with the template `tiny`."""
    with opened(tmp_path, docker_client, TEMPLATES_DIR=str(templates_dir), DEFAULT_TEMPLATE='tiny') as made:
        yield made


@pytest.fixture
def working(tmp_path, agents_template, docker_client):
    """A backend with one running workspace, `work`, in which an agent counts."""
    with opened(tmp_path, docker_client, TEMPLATES_DIR=str(agents_template[0]), DEFAULT_TEMPLATE='agents',
                AGENT_COMMAND=COUNTER, DEFAULT_AGENT='command') as made:
        made.workspaces.create({'name': 'work'})
        until_no_job(made)
        yield made


@pytest.fixture(scope='module')
def counting(tmp_path_factory, agents_template, docker_client):
    """A server with one running workspace, `work`, in which an agent counts."""
    served = Served(tmp_path_factory.mktemp('counting'), agents_template[0], DEFAULT_TEMPLATE='agents',
                    AGENT_COMMAND=COUNTER, DEFAULT_AGENT='command')
    served.start().running('work')
    yield served
    served.stop()
    print(served.log.read_text()[-5000:])
    remove_objects(docker_client, served.instance)


def meddle(monkeypatch, engine, step, before):
    """Let `before()` happen, once, before a step of the engine."""
    real, left = getattr(engine, step), [before]

    def meddling(*args, **options):
        if left:
            left.pop()()
        return real(*args, **options)
    monkeypatch.setattr(engine, step, meddling)


def until_no_job(backend):
    while backend.workspaces._jobs:
        next(iter(backend.workspaces._jobs.values())).join(30)


def refuse():
    raise DockerError('as told')


def test_a_deletion_that_meets_a_failure_is_done(backend, monkeypatch, docker_client):
    def delete_and_fail():
        workspace, gone = backend.workspaces.remove('doomed')
        assert (workspace.status, gone) == (DELETING, False)
        refuse()
    meddle(monkeypatch, backend.engine, 'start', delete_and_fail)
    backend.workspaces.create({'name': 'doomed'})
    until_no_job(backend)
    assert backend.state.all() == [] and objects_of(docker_client, backend.config.instance) == []
    assert backend.state.ports_in_use()['codeServer'][0] == 0


def test_a_deletion_that_comes_while_a_failure_is_cleaned_up_is_done(backend, monkeypatch, docker_client):
    meddle(monkeypatch, backend.engine, 'start', refuse)
    meddle(monkeypatch, backend.engine, 'remove', lambda: backend.workspaces.remove('doomed'))
    backend.workspaces.create({'name': 'doomed'})
    until_no_job(backend)
    assert backend.state.all() == [] and objects_of(docker_client, backend.config.instance) == []


@pytest.mark.parametrize('step', ['create_volume', 'create_container', 'tell', 'start'])
def test_a_rename_while_a_workspace_is_made_takes_the_container_along(
        backend, monkeypatch, docker_client, step):
    renaming = []

    def rename():
        renaming.append(gevent.spawn(backend.workspaces.change, 'old', {'name': 'new'}))
        gevent.sleep(0.1)
    meddle(monkeypatch, backend.engine, step, rename)
    backend.workspaces.create({'name': 'old'})
    until_no_job(backend)
    renaming[0].get(timeout=30)
    assert [item.name for item in backend.state.all()] == ['new']
    assert backend.state.get('new').status == 'running'
    assert f'/{backend.config.instance}-new' in objects_of(docker_client, backend.config.instance)


@pytest.mark.parametrize('url', ['https://[foo/x.git', 'https://[foo]/x.git',
                                 'https://me:canary@ho\u2100st/x.git'])
def test_a_url_that_cannot_be_taken_apart_is_refused_and_not_quoted(backend, url):
    with pytest.raises(ValidationError) as caught:
        backend.workspaces.create({'name': 'cloned', 'gitUrl': url})
    assert caught.value.details[0]['path'] == 'gitUrl' and 'canary' not in str(caught.value)
    assert backend.state.all() == []


BEATS = {'far': '{"lastHeartbeat": 1e18}', 'large': '{"lastHeartbeat": ' + '9' * 401 + '}',
         'deep': '[' * 9000, 'odd': '{"lastHeartbeat": [1]}', 'none': 'nonsense'}


def test_what_a_workspace_says_of_itself_keeps_no_other_one_from_its_end(make_server):
    """Whatever runs in an agent's workspace may answer in the place of its editor."""
    server = make_server()
    for name, beat in BEATS.items():
        server.create(name, type='agent', ttl=3600, env={'PRINT': f"echo '{beat}' >/www/healthz"})
    server.create('slow', type='agent', ttl=3600, env={
        'PRINT': r"printf '#!/bin/sh\necho HTTP/1.1 200 OK; while :; do printf x; usleep 400000; done\n' "
                 r">/bin/drip; chmod +x /bin/drip; "
                 '(sleep 2; killall httpd; nc -ll -p 8443 -e /bin/drip) &'})
    for name in (*BEATS, 'slow'):
        server.wait_status(name, 'running')
    server.until(lambda: server.get('/api/workspaces/slow')['status'] == 'running')
    for name in (*BEATS, 'slow'):
        server.call('PATCH', f'/api/workspaces/{name}', {'ttl': 3})
    server.until(lambda: server.get('/api/workspaces') == [], 30)
    assert 'Traceback' not in server.log.read_text()


def test_a_folder_that_is_no_template_harms_nobody(own_templates, make_server):
    folder, add = own_templates
    for name in ('.devcontainer', 'my template', 'foo..bar', 'foo-'):
        (folder / name).mkdir()
        (folder / name / 'Dockerfile').write_text('FROM scratch\n')
    add('odd')
    (folder / 'odd' / 'Dockerfile').write_bytes(b'# \xff\xfe\nFROM scratch\n')
    (folder / 'odd' / 'broken').symlink_to('/nowhere')
    server = make_server(TEMPLATES_DIR=str(folder))
    names = [item['name'] for item in server.get('/api/templates')]
    assert 'odd' in names and 'tiny' in names
    assert not [name for name in names if name.startswith(('.', 'my', 'foo'))]
    answer = server.call('POST', '/api/workspaces', {'name': 'a', 'template': 'foo..bar'})
    assert answer.json()['code'] == 'VALIDATION_ERROR'
    assert server.running('usual')['status'] == 'running'


def test_a_long_name_of_a_file_is_404(make_server):
    assert make_server().call('GET', '/static/' + 'x' * 300).status_code == 404


def test_a_command_that_prints_without_end_takes_no_memory(backend, monkeypatch, docker_client):
    backend.workspaces.create({'name': 'chatty'})
    until_no_job(backend)
    container = backend.engine.find(backend.state.get('chatty').id)
    _, printed = backend.engine.run(container.id, ['sh', '-c', 'yes | head -c 3000000; echo end'])
    assert printed == b'y\n' * 2**15
    monkeypatch.setattr(engine_module, 'RUN_TIMEOUT', 1)
    with pytest.raises(DockerError, match='sleep .* within 1 s'):
        backend.engine.run(container.id, ['sleep', '5'])
    backend.engine.put_files(container.id, {'/tmp/large': (b'0' * 3_000_000, 0o644, 0)})
    assert len(backend.engine.get_file(container.id, '/tmp/large')) == 2**16
    assert backend.engine.get_file(container.id, '/tmp/none') == b''
    with contextlib.closing(backend.engine.read_file(container.id, '/tmp/large')) as pieces:
        assert sum(map(len, pieces)) == 3_000_000
    assert backend.state.get('chatty').status != CREATING


# Tasks


def rows(feed):
    """Yield the events that a reader is given, as JSON objects."""
    for batches in feed.batches():
        for batch in batches:
            yield from (json.loads(text) for _, text in batch.rows())


def told(backend, session, count):
    """Return the ids of the first events that a reader of a session is given."""
    events = rows(SessionFeed(backend, session, after=BEGINNING))
    return [event['id'] for event in itertools.islice(events, count)]


def test_a_task_is_followed_once_though_the_engine_comes_back_while_it_is_begun(working, monkeypatch):
    workspace = working.state.get('work')
    meddle(monkeypatch, working.engine, 'run_detached', working.tasks.resume)
    found = []
    reader = gevent.spawn(lambda: [found.append(event['id'])
                                   for event in rows(SessionFeed(working, 'one', after=BEGINNING))])
    gevent.sleep(0)
    working.tasks.execute({'workspaceId': workspace.id, 'task': '3', 'sessionId': 'one'})
    with gevent.Timeout(10):
        while '1-end-0' not in found:
            gevent.sleep(0.05)
    gevent.sleep(0.5)
    reader.kill()
    assert found == ['1-0-0', '1-1-0', '1-2-0', '1-3-0', '1-end-0']


def test_a_task_that_runs_holds_no_reader_up_when_the_engine_is_found(working):
    working.tasks.execute({'workspaceId': 'work', 'task': 'wait', 'sessionId': 'long'})
    working.tasks.resumed.clear()
    working.tasks.resume()
    assert working.tasks.wait_until_published('long', timeout=5)
    assert told(working, 'long', 1) == ['1-0-0']


def test_a_start_whose_answer_was_lost_is_a_start(working, monkeypatch):
    real = working.engine.run_detached

    def lose_the_answer(*args, **options):
        real(*args, **options)
        raise EngineUnavailable('as told')
    monkeypatch.setattr(working.engine, 'run_detached', lose_the_answer)
    working.tasks.execute({'workspaceId': 'work', 'task': '2', 'sessionId': 'lost'})
    assert told(working, 'lost', 4) == ['1-0-0', '1-1-0', '1-2-0', '1-end-0']
    assert working.state.session('lost').last.state == 'completed'


def test_a_stream_of_a_task_ends_with_it_though_another_has_begun(working):
    session, run = working.tasks.execute({'workspaceId': 'work', 'task': '2', 'sessionId': 'twice'})
    events = rows(SessionFeed(working, 'twice', after=BEGINNING, task=(session, run)))
    # It listens from here on, and has nothing of what follows taken when both tasks have ended.
    found = [next(events)]
    until_ended(working, 'twice')
    working.tasks.execute({'workspaceId': 'work', 'task': '3', 'sessionId': 'twice'})
    until_ended(working, 'twice')
    with gevent.Timeout(10):
        found += events
    assert [event['id'] for event in found] == ['1-0-0', '1-1-0', '1-2-0', '1-end-0']


def until_ended(backend, session):
    with gevent.Timeout(20):
        while backend.state.session(session).last.state == 'running':
            gevent.sleep(0.05)


def test_a_stream_of_a_task_whose_session_is_gone_has_an_end(working):
    session, run = working.tasks.execute({'workspaceId': 'work', 'task': '2', 'sessionId': 'short'})
    told(working, 'short', 4)
    working.tasks.remove('short')
    found = list(rows(SessionFeed(working, 'short', after=BEGINNING, task=(session, run))))
    assert [(event['type'], event['id'], event['data']['code'])
            for event in found] == [('error', '1-end-0', 'AGENT_INTERRUPTED')]


def test_a_session_that_begins_anew_is_told_to_those_who_knew_the_old_one(counting):
    for _ in range(2):
        begin(counting, '1', sessionId='again')
        ended(counting, 'again')
    with (Sse(counting, '/agent/sse/again', after='2-end-0') as old,
          Sse(counting, '/agent/sse/again') as open_one):
        assert len(messages_until(open_one, lambda event: event['id'] == '2-end-0')) == 6
        assert counting.call('DELETE', '/api/agent/sessions/again').status_code == 200
        with Sse(counting, '/agent/sse/again', after='2-end-0') as late:
            begin(counting, '1', sessionId='again')
            for stream in (old, open_one, late):
                ids = [event['id'] for event in messages_until(stream, is_end)]
                assert ids == ['1-0-0', '1-1-0', '1-end-0']


@pytest.mark.parametrize('crash', [False, True], ids=['away', 'crash'])
def test_a_whole_task_that_was_missed_is_told_to_a_reader_of_the_workspace(counting, crash):
    """One of more events than are held in memory, another one, and what is known of them after a crash:
    nothing but their files."""
    with Sse(counting, '/api/workspaces/work/events?tail=0') as stream:
        seen = next(iter(stream))['id']
    for number, task in enumerate(('6000', '3')):
        session = f'missed-{crash}-{number}'
        begin(counting, task, sessionId=session)
        ended(counting, session)
    if crash:
        counting.settings['PORT'] = str(counting.port)
        counting.kill()
        counting.start()
    with Sse(counting, '/api/workspaces/work/events?tail=0', after=seen) as stream:
        found = messages_until(stream, lambda event: is_end(event)
                               and event['sessionId'] == f'missed-{crash}-1')
    steps = [event['data']['step'] for event in found if event['type'] == 'progress']
    assert steps == [*range(1, 6001), 1, 2, 3]
    assert len([event for event in found if is_end(event)]) == 2
    with Sse(counting, '/api/workspaces/work/events?tail=0', after=found[3000]['id']) as stream:
        rest = messages_until(stream, lambda event: is_end(event)
                              and event['sessionId'] == f'missed-{crash}-1')
    assert progress(rest) == progress(found[3001:])


def test_a_flood_of_an_agent_leaves_the_others_their_turn(counting):
    def call():
        assert counting.call('GET', '/health').status_code == 200
    alone, waits = [seconds_of(call) for _ in range(20)], []
    begin(counting, '200000', sessionId='flood')
    while not waits or counting.get('/api/agent/sessions/flood')['state'] == 'running':
        waits.append(seconds_of(call))
    assert len(waits) > 5
    check_fairness(waits, alone)


def test_a_task_that_died_while_nobody_looked_was_interrupted_and_took_not_too_long(counting, docker_client):
    counting.settings['PORT'] = str(counting.port)
    begin(counting, 'wait', sessionId='overdue', timeout=1)
    counting.kill()
    container = docker_client.containers.get(f"{counting.instance}-work")
    container.restart(timeout=1)
    time.sleep(1)
    counting.start()
    session = ended(counting, 'overdue')
    assert session['runs'][0]['error']['code'] == 'AGENT_INTERRUPTED'
    counting.wait_status('work', 'running')


def test_an_id_of_the_server_is_taken_by_the_server(counting):
    names = [f'{letter * 90}-{uuid.uuid4().hex[:6]}' for letter in 'abcdef']
    for name in names:
        begin(counting, 'wait', sessionId=name)
    try:
        with Ws(counting) as stream:
            stream.send(type='subscribe', workspaceId='work', tail=0)
            seen = next(iter(stream))['id']
            assert len(seen) <= 200 and seen.count('~') == len(names)
            stream.send(type='subscribe', workspaceId='work', after=seen)
            assert next(iter(stream))['type'] == 'status'
        assert counting.call('GET', '/api/workspaces/work/events', params={'after': seen},
                             stream=True).status_code == 200
    finally:
        for name in names:
            counting.call('POST', f'/api/agent/sessions/{name}/cancel')
        for name in names:
            ended(counting, name)
    for bad in (seen.partition('~')[0] + '~x/1-abc-0', seen + '~1.2', seen.replace('.', '', 1)):
        assert counting.call('GET', '/api/workspaces/work/events',
                             headers={'Last-Event-ID': bad}).status_code == 400


# Streams


def test_a_ticket_that_is_not_needed_does_no_harm(counting):
    ticket = counting.call('POST', '/api/tickets').json()['data']['ticket']
    with Sse(counting, f'/agent/sse/any?ticket={ticket}') as stream:
        assert stream.status == 200


def test_what_a_stranger_sends_is_not_sent_back_at_length(counting):
    with Ws(counting) as stream:
        for about in ('x' * 50_000, 5, None):
            stream.send(type='subscribe', workspaceId=about)
            assert next(iter(stream))['workspaceId'] is None


def test_the_status_of_all_is_the_last_one_though_a_reader_is_slow(make_server, docker_client):
    """What a workspace was when the reader asked must not come after what it has become since."""
    server = make_server()
    server.running('talker', env={'PRINT': 'mkfifo /say; while :; do cat /say; done &'})
    server.create('busy', env={'SLOW': '600'})
    server.running('last')
    flood = 'yes $(head -c 8000 /dev/zero | tr "\\0" x) | head -n 1500; echo end'
    with (Ws(server, timeout=20, receive_buffer=4096) as slow,
          Sse(server, '/api/workspaces/talker/events?tail=0', timeout=20) as quick):
        slow.send(type='subscribe', workspaceId='talker', tail=0)
        assert statuses([next(iter(slow))]) == statuses([next(iter(quick))]) == ['running']
        in_container(docker_client, server, 'talker', f'{{ {flood}; }} >/say')
        messages_until(quick, has_text('end'))  # so much waits for the other that there is no room for more
        slow.send(type='subscribe', workspaceId='*')
        assert server.get('/api/workspaces/busy')['status'] == 'creating'
        in_container(docker_client, server, 'busy', 'killall sleep')
        server.wait_status('busy', 'running')
        ids = {item['name']: item['id'] for item in server.get('/api/workspaces')}
        found = messages_until(slow, lambda message: message['workspaceId'] == ids['last'])
    assert statuses([message for message in found if message['workspaceId'] == ids['busy']])[-1] == 'running'


def test_who_comes_back_at_once_costs_the_engine_nothing(backend, monkeypatch):
    workspace = backend.workspaces.create({'name': 'lively', 'env': {'PRINT': 'sleep 1; seq 100; echo end'}})
    until_no_job(backend)
    texts, ids = [], []
    with contextlib.closing(WorkspaceFeed(backend, workspace.id)) as feed, gevent.Timeout(20):
        for event in rows(feed):
            texts.append(event['data'].get('message'))
            ids.append(event['id'])
            if texts[-1] == 'end':
                break
        monkeypatch.setattr(backend.engine, 'log_lines', lambda *_, **__: pytest.fail('the engine was asked'))
        for number in (texts.index('50'), texts.index('100')):
            told = []
            for event in rows(WorkspaceFeed(backend, workspace.id, cursor=Cursor.parse(ids[number]))):
                told.append(event['data'].get('message'))
                if told[-1] == 'end':
                    break
            assert told == [None, *texts[number + 1:]]


def test_a_log_that_the_engine_cannot_read_is_told_and_left_behind(backend, monkeypatch, docker_client):
    """After a power failure or on a full disk some engines end the stream at what they can't read, whenever
    it is read from before that."""
    workspace = backend.workspaces.create({'name': 'damaged',
                                           'env': {'PRINT': 'mkfifo /say; while :; do cat /say; done &'}})
    until_no_job(backend)
    real = backend.engine.log_lines

    def unreadable(container, *, since=0, tail=None, follow=False):
        if tail is None:
            raise UnreadableLog('as told')
        return real(container, since=since, tail=tail, follow=follow)
    found = []
    feed = WorkspaceFeed(backend, workspace.id)
    reader = gevent.spawn(lambda: [found.append(event) for event in rows(feed)])
    with gevent.Timeout(20):
        while not any(event['type'] == 'log' for event in found):
            gevent.sleep(0.1)
        monkeypatch.setattr(backend.engine, 'log_lines', unreadable)
        # Its log is read on from where it was.
        docker_client.containers.get(backend.state.get('damaged').container_id).restart(timeout=1)
        while not any(event['type'] == 'error' and 'Lines are missing here' in event['data']['message']
                      for event in found):
            gevent.sleep(0.1)
        while not any(event['type'] == 'log' and event['data']['message'] == 'after' for event in found):
            docker_client.containers.get(backend.state.get('damaged').container_id).exec_run(['sh', '-c',
                                                                                              'echo after >/say'])  # noqa: E501
            gevent.sleep(0.5)
    reader.kill()
    assert [event['type'] for event in found].count('error') == 1
    assert backend.state.get('damaged').status == 'running'


def test_a_log_with_garbage_in_it_is_followed_all_the_same(make_server, docker_client):
    server = make_server()
    workspace = server.running('garbled',
                               env={'PRINT': 'echo before; mkfifo /say; while :; do cat /say; done &'})
    container = docker_client.containers.get(workspace['containerId'])
    server.until(lambda: 'before' in server.call('GET', '/api/workspaces/garbled/logs').text)
    with open(container.attrs['LogPath'], 'ab') as file:
        file.write(b'\0' * 100 + b'{"log": "half')
    with (Sse(server, '/api/workspaces/garbled/events', timeout=20) as stream,
          Ws(server, timeout=20) as socket):
        socket.send(type='subscribe', workspaceId='garbled')
        for one in (stream, socket):
            assert next(iter(one))['type'] == 'status'
        gevent.sleep(1)
        container.exec_run(['sh', '-c', 'echo after >/say'])
        for one in (stream, socket):
            with gevent.Timeout(20):
                messages_until(one, lambda message: message['type'] == 'log'
                               and message['data']['message'] == 'after')
    assert 'Traceback' not in server.log.read_text()


class Recorder:
    """Takes what a client is sent."""

    closed = False

    def __init__(self):
        self.sent = b''

    def send_encoded(self, data):
        self.sent += data


def test_who_lets_go_of_a_workspace_before_it_was_told_all_is_told_with_those_of_all(backend):
    """The moment in which a reader catches up is short, so here it does not end."""
    workspace = backend.workspaces.create({'name': 'let-go', 'env': {'SLOW': '60'}})
    socket = Recorder()
    client = WebSocketClient(backend, socket, True)
    for topic in ('*', workspace.id):
        client._obey({'type': 'subscribe', 'workspaceId': topic})
    gevent.sleep(1)
    client._catching_up.add(client._feeds[workspace.id])
    backend.events.publish('status', workspace.id, {'status': 'paused for a test'})
    gevent.sleep(0.2)
    assert b'paused for a test' not in socket.sent
    client._obey({'type': 'unsubscribe', 'workspaceId': workspace.id})
    gevent.sleep(0.2)
    assert socket.sent.count(b'paused for a test') == 1
