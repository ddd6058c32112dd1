"""An agent that is a script: whatever it does, its task ends honestly, is told to all who listen, and leaves
nothing behind."""
import itertools
import json
import time
from pathlib import Path

import pytest
from agents import (
    Execution,
    begin,
    cancel,
    do,
    end_of,
    ended,
    messages,
    progress,
    put,
    refused,
    restarted,
    running,
    seconds_until,
    served_agents,
    shell,
    told,
    transcript,
)
from streaming import Sse, Ws, messages_until

from _agentbackend.timing import parse_time

SCRIPT = (Path(__file__).parent / 'scripted_agent.js').read_text()
numbers = itertools.count(1)


@pytest.fixture(scope='module')
def server(tmp_path_factory, templates_dir, docker_client, base_image):
    with served_agents(tmp_path_factory.mktemp('command'), templates_dir, docker_client,
                       AGENT_COMMAND='node /workspace/agent.js', DEFAULT_AGENT='command',
                       AGENT_MAX_TASKS='3', STOP_TIMEOUT='3') as served:
        put(docker_client, served.container, 'agent.js', SCRIPT)
        yield served


def fresh():
    return f'session-{next(numbers)}'


def until_started(server, session):
    server.until(lambda: 'started' in messages(transcript(server, session)))


def followed(server, path, **options):
    """Return the events of a session's stream up to the end of a task."""
    with Sse(server, path, **options) as stream:
        return messages_until(stream, lambda event: event['type'] in ('result', 'error'))


def test_a_session_is_called_as_its_first_task_begins(server):
    session = fresh()
    do(server, '\n  say hello  \nand more', sessionId=session)
    do(server, 'say something else', sessionId=session)
    assert server.get(f'/api/agent/sessions/{session}')['title'] == 'say hello'
    assert 'say hello' in [item['title'] for item in server.get('/api/agent/sessions')]
    long = fresh()
    do(server, 'say ' + 'x' * 200, sessionId=long)
    assert server.get(f'/api/agent/sessions/{long}')['title'] == 'say ' + 'x' * 95 + '…'


# What it prints

def test_what_it_prints_become_events(server):
    events = do(server, 'say hello there')
    assert told(events)[1:3] == [('progress', {'step': 1, 'total': 2, 'message': 'hello there'}),
                                 ('message', {'message': 'said'})]
    assert end_of(events)[0] == 'result' and end_of(events)[1]['message'] == 'ok'


def test_a_line_of_ten_megabytes_becomes_a_shortened_event_and_the_next_one_is_whole(server):
    events = do(server, 'long')
    first, second = messages(events)
    assert len(first) < 9000 and first.endswith('more characters)') and second == 'after'
    assert end_of(events)[0] == 'result'


def test_garbage_is_told_as_text_and_harms_nobody(server):
    with Sse(server, '/api/workspaces/work/events?tail=0') as workspace:
        next(iter(workspace))
        events = do(server, 'garbage')
        assert end_of(events)[0] == 'result' and '{"type": []}' in messages(events)
        assert '\u2028 strange' in messages(events)
        seen = messages_until(workspace, lambda event: event['type'] in ('result', 'error'))
    assert told(seen)[-len(events):] == told(events)
    assert 'NaN' not in json.dumps([event['data'] for event in events if event['type'] == 'progress'])
    assert end_of(do(server, 'say still here'))[0] == 'result'


def test_half_a_line_and_a_crash_is_a_failure_that_quotes_the_last_words(server):
    events = do(server, 'half')
    kind, data = end_of(events)
    assert kind == 'error' and data['code'] == 'AGENT_FAILED' and '139' in data['message']
    assert 'it broke' in data['message']
    assert messages(events) == ['whole', '{"type":"message","data":{"mess']


@pytest.mark.parametrize('task, code, words', [
    ('exit 3', 'AGENT_FAILED', 'sorry'), ('fail', 'MY_CODE', 'as told')])
def test_a_failure_is_told_with_its_reason(server, task, code, words):
    kind, data = end_of(do(server, task))
    assert kind == 'error' and data['code'] == code and words in data['message']


def test_an_exit_code_of_zero_is_enough_for_a_script(server):
    assert end_of(do(server, 'exit 0'))[0] == 'result'


# Who does not end

def test_a_child_is_left_alone_after_success_and_killed_after_a_cancel(server, docker_client):
    assert end_of(do(server, 'leave'))[1]['message'] == 'left one'
    session = begin(server, 'child')['sessionId']
    until_started(server, session)
    cancel(server, session)
    assert ended(server, session)['state'] == 'cancelled'
    server.until(lambda: not running(docker_client, server.container, 'sleep 72.5'), 5)
    assert running(docker_client, server.container, 'sleep 71.5')
    shell(docker_client, server.container, 'pkill -f "sleep 71.5"')


def test_one_that_ignores_every_signal_is_killed_within_seconds(server, docker_client):
    session = begin(server, 'stubborn')['sessionId']
    until_started(server, session)
    begun = time.monotonic()
    cancel(server, session)
    assert ended(server, session)['state'] == 'cancelled' and time.monotonic() - begun < 8
    assert 'no' in messages(transcript(server, session)), 'it was not interrupted before'
    server.until(lambda: not running(docker_client, server.container, 'agent.js', 'agent-run'), 5)


def test_one_that_lives_on_after_its_result_is_ended_and_has_succeeded(server, docker_client):
    kind, data = end_of(do(server, 'linger'))
    assert kind == 'result' and data['message'] == 'done, but here'
    server.until(lambda: not running(docker_client, server.container, 'agent.js'), 5)


def flood(server):
    server.until(lambda: len([item for item in server.get('/api/agent/sessions?state=running')]) < 3)
    return begin(server, 'flood')['sessionId']


def test_limits_of_silence_of_time_and_of_output(server, docker_client):
    with restarted(server, AGENT_IDLE_TIMEOUT='1.5', AGENT_TIMEOUT='4', AGENT_MAX_OUTPUT='1m'):
        silent, chatter = begin(server, 'silent')['sessionId'], begin(server, 'chatter')['sessionId']
        own = begin(server, 'chatter', timeout=1)['sessionId']
        for session, code in ((silent, 'AGENT_IDLE_TIMEOUT'), (chatter, 'AGENT_TIMEOUT'),
                              (own, 'AGENT_TIMEOUT'), (flood(server), 'AGENT_MAX_OUTPUT')):
            ended(server, session)
            assert end_of(transcript(server, session))[1]['code'] == code
    server.until(lambda: not running(docker_client, server.container, 'agent.js'), 5)


# Its output goes through a buffer of Python's own, if nobody tells it otherwise.
PYTHON_AGENT = """
import json, sys, time
task = sys.stdin.read()
for step in range(1, 7):
    print(json.dumps({'type': 'progress', 'data': {'step': step, 'total': 6, 'message': task}}))
    time.sleep(1)
"""


def test_an_agent_in_python_is_heard_as_it_speaks(server, docker_client):
    put(docker_client, server.container, 'agent.py', PYTHON_AGENT)
    with restarted(server, AGENT_COMMAND='python3 /workspace/agent.py', AGENT_IDLE_TIMEOUT='3'):
        events = do(server, 'count')
    assert end_of(events)[0] == 'result' and [data['step'] for data in progress(events)] == [1, 2, 3, 4, 5, 6]


def test_what_an_agent_says_on_stderr_is_told_and_a_sign_of_life(server):
    with restarted(server, AGENT_IDLE_TIMEOUT='4'):
        events = do(server, 'mutter 12')
    assert end_of(events)[1]['message'] == 'muttered'
    assert [event['data']['message'] for event in events if event['data'].get('stream') == 'stderr'] == [
        f'at {number}' for number in range(1, 13)]


def test_a_transcript_has_the_times_at_which_things_were_said(server):
    events = do(server, 'paced')
    again = transcript(server, events[0]['sessionId'])
    assert [(event['id'], event['timestamp']) for event in again] == [(event['id'], event['timestamp'])
                                                                      for event in events]
    times = [parse_time(event['timestamp']) for event in events]
    assert times == sorted(times)
    said = [at for at, event in zip(times, events, strict=True) if event['type'] == 'message']
    assert all(later - earlier > 0.3 for earlier, later in itertools.pairwise(said))


def test_a_task_of_megabytes_arrives_whole_and_a_larger_one_is_told_the_limit(server):
    events = do(server, f"size {'x' * 3_700_000} ünd")
    assert messages(events) == ['3700004'] and end_of(events)[1]['message'] == 'ünd'
    status, code, error = refused(server, 'x' * 4_000_001)
    assert (status, code) == (400, 'VALIDATION_ERROR') and '4,000,001' in error and '4,000,000' in error
    status, code, error = refused(server, 'x' * 9_000_000)
    assert (status, code) == (413, 'PAYLOAD_TOO_LARGE') and 'MAX_BODY' in error


def test_what_a_child_prints_after_the_end_changes_nothing_that_was_told(server):
    events = do(server, 'late')
    session = events[0]['sessionId']
    time.sleep(2.5)
    assert told(transcript(server, session)) == told(events) and messages(events) == ['half a line']


def test_no_more_tasks_than_allowed_run_at_once(server):
    sessions = [begin(server, 'silent')['sessionId'] for _ in range(3)]
    try:
        status, code, error = refused(server, 'say no')
        assert (status, code) == (429, 'TOO_MANY') and 'AGENT_MAX_TASKS=3' in error
    finally:
        for session in sessions:
            cancel(server, session)
        for session in sessions:
            ended(server, session)
    assert end_of(do(server, 'say yes'))[0] == 'result'


# Who listens

def test_a_stream_begins_before_its_session_goes_on_after_an_id_and_holds_every_run(server):
    session = fresh()
    with Sse(server, f'/agent/sse/{session}') as stream:
        first = begin(server, 'count 5', sessionId=session)
        events = messages_until(stream, lambda event: event['type'] == 'result')
    assert stream.headers['content-type'].startswith('text/event-stream') and stream.retry and stream.comments
    assert stream.names <= {'id', 'data'}
    assert [event['id'] for event in events] == [*(f'1-{n}-0' for n in range(6)), '1-end-0']
    assert events[0]['data']['runId'] == first['runId']
    rest = followed(server, f'/agent/sse/{session}', after='1-3-0')
    assert [event['id'] for event in rest] == ['1-4-0', '1-5-0', '1-end-0']
    assert [event['id'] for event in followed(server, f'/agent/sse/{session}?after=1-5-0')] == ['1-end-0']
    with Sse(server, f'/agent/sse/{session}', after='1-end-0') as stream:
        begin(server, 'say more', sessionId=session)
        more = messages_until(stream, lambda event: event['type'] == 'result')
    assert [event['id'] for event in more] == ['2-0-0', '2-1-0', '2-2-0', '2-end-0']
    assert server.call('GET', f'/agent/sse/{session}?after=nonsense').status_code == 400


def test_a_client_that_leaves_ends_nothing(server):
    session = fresh()
    with Execution(server, 'work', 'wait 1.5', sessionId=session) as stream:
        next(iter(stream))
    assert ended(server, session)['runs'][0]['result'] == 'waited'


def test_readers_of_the_workspace_see_the_same_events(server):
    session = fresh()
    with Sse(server, '/api/workspaces/work/events') as stream, Ws(server) as socket:
        socket.send(type='subscribe', workspaceId='work')
        assert next(iter(stream))['type'] == next(iter(socket))['type'] == 'status'
        begin(server, 'count 20', sessionId=session)
        seen = [[event for event in messages_until(one, lambda event: event['type'] == 'result')
                 if event.get('sessionId') == session] for one in (stream, socket)]
    whole = transcript(server, session)
    assert len(whole) == 22 and told(seen[0]) == told(seen[1]) == told(whole)


def test_a_transcript_is_given_in_pages(server):
    session = fresh()
    do(server, 'count 25', sessionId=session)
    path = f'/api/agent/sessions/{session}/events'
    page = server.get(f'{path}?limit=10')
    assert len(page['events']) == 10 and page['next'] == page['events'][-1]['id'] == '1-9-0'
    assert [event['data'].get('step')
            for event in server.get(f"{path}?limit=10&after={page['next']}")['events']] == list(range(10, 20))
    assert server.get(f'{path}?limit=27')['next'] is None
    found = progress_events(transcript(server, session, limit=4))
    assert [event['data']['step'] for event in found] == list(range(1, 26))
    assert server.call('GET', '/api/agent/sessions/nobody/events').json()['code'] == 'SESSION_NOT_FOUND'


def progress_events(events):
    assert len(progress(events)) == 25
    return [event for event in events if event['type'] == 'progress']


def test_sessions_are_listed_filtered_and_deleted_with_what_their_runs_left(server, docker_client):
    session = fresh()
    do(server, 'exit 4', sessionId=session)
    do(server, 'say twice', sessionId=session)
    found = server.get(f'/api/agent/sessions/{session}')
    runs = [(run['number'], run['state'], run['task']) for run in found['runs']]
    assert runs == [(1, 'failed', 'exit 4'), (2, 'completed', 'say twice')]
    assert found['state'] == 'completed' and found['agent'] == 'command'
    for query, there in (('', True), ('?workspaceId=work', True), ('?agent=command', True),
                         ('?state=completed', True), ('?agent=claude', False), ('?state=failed', False)):
        assert (session in [item['id'] for item in server.get(f'/api/agent/sessions{query}')]) is there, query
    folders = ' '.join(f"/workspace/.agentbackend/runs/{run['id']}" for run in found['runs'])
    assert shell(docker_client, server.container, f'ls {folders}')[0] == 0
    busy = begin(server, 'silent')['sessionId']
    assert server.call('DELETE', f'/api/agent/sessions/{busy}').json()['code'] == 'SESSION_BUSY'
    cancel(server, busy)
    assert server.call('DELETE', f'/api/agent/sessions/{session}').status_code == 200
    assert shell(docker_client, server.container, f'ls -d {folders} 2>/dev/null') == (2, '')
    assert server.call('GET', f'/api/agent/sessions/{session}').json()['code'] == 'SESSION_NOT_FOUND'
    ended(server, busy)


def test_a_workspaces_id_is_no_session(server):
    workspace = server.get('/api/workspaces/work')['id']
    assert refused(server, 'say no', sessionId=workspace)[:2] == (400, 'VALIDATION_ERROR')


# What dies meanwhile

def test_a_server_that_was_killed_leaves_nobody_reading_and_its_agent_may_be_unknown_to_the_next(
        server, docker_client):
    session = fresh()
    begin(server, 'wait 4', sessionId=session)
    until_started(server, session)
    server.kill()
    seconds_until(lambda: not running(docker_client, server.container, 'tail -c'), 5)
    command = server.settings.pop('AGENT_COMMAND')
    try:
        server.start()
        assert ended(server, session)['runs'][0]['result'] == 'waited'
    finally:
        server.settings['AGENT_COMMAND'] = command
        server.stop()
        server.start()


def test_a_run_that_ended_before_its_container_did_has_its_own_end(server, docker_client):
    session = fresh()
    begin(server, 'say quick', sessionId=session)
    ended(server, session)
    session = fresh()
    begin(server, 'count 3', sessionId=session)
    server.kill()
    seconds_until(lambda: not running(docker_client, server.container, 'agent.js', 'agent-run'))
    docker_client.containers.get(server.container).restart(timeout=1)
    server.start()
    assert ended(server, session)['state'] == 'completed'
    assert [data['step'] for data in progress(transcript(server, session))] == [1, 2, 3]
    server.wait_status('work', 'running')


DEATHS = {'stopped': lambda server, container: server.call('POST', '/api/workspaces/dying/stop'),
          'restarted': lambda server, container: server.call('POST', '/api/workspaces/dying/restart'),
          'killed': lambda server, container: container.kill(), 'restarted-outside': lambda server,
          container: container.restart(timeout=1),
          'deleted': lambda server, container: server.call('DELETE', '/api/workspaces/dying')}


def test_a_workspace_that_goes_away_interrupts_its_task_and_says_so_last(server, docker_client):
    server.running('dying')
    for death, die in DEATHS.items():
        if server.get('/api/workspaces/dying')['status'] != 'running':
            server.call('POST', '/api/workspaces/dying/start')
        workspace = server.wait_status('dying', 'running')
        put(docker_client, workspace['containerId'], 'agent.js', SCRIPT)
        session = fresh()
        with Sse(server, f'/agent/sse/{session}', timeout=30) as stream:
            begin(server, 'wait 100', workspace='dying', sessionId=session)
            events = messages_until(stream, lambda event: event['data'].get('message') == 'started')
            die(server, docker_client.containers.get(workspace['containerId']))
            events += messages_until(stream, lambda event: event['type'] in ('result', 'error'))
        kind, data = end_of(events)
        assert (kind, data['code']) == ('error', 'AGENT_INTERRUPTED'), (death, data)
        if death != 'deleted':
            assert ended(server, session)['state'] == 'failed'
            assert told(transcript(server, session)) == told(events), death
    path = f'/api/agent/sessions/{session}'
    server.until(lambda: server.call('GET', path).json().get('code') == 'SESSION_NOT_FOUND')


def test_an_agent_workspace_lives_as_long_as_its_task_and_its_ttl_after_that(server, docker_client):
    workspace = server.running('brief', type='agent', ttl=60)
    put(docker_client, workspace['containerId'], 'agent.js', SCRIPT)
    session = begin(server, 'wait 6', workspace='brief')['sessionId']
    server.call('PATCH', '/api/workspaces/brief', {'ttl': 3})
    assert ended(server, session)['runs'][0]['result'] == 'waited'
    over = time.monotonic()
    seconds_until(lambda: server.get('/api/workspaces/brief').get('status') != 'running', 15)
    assert 1.5 < time.monotonic() - over < 8
