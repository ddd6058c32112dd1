"""The real Claude Code in a real workspace; only what the model would say is made up."""
import json
import subprocess
import time
import uuid

import gevent
import pytest
from agents import (
    PROJECT,
    Execution,
    begin,
    cancel,
    do,
    end_of,
    ended,
    messages,
    processes,
    progress,
    refused,
    restarted,
    running,
    seconds_until,
    served_agents,
    shell,
    transcript,
)
from conftest import concurrently
from fake_anthropic import SERVER, FakeAnthropic, bridge_address, heard
from streaming import Sse, Ws

from _agentbackend.timing import parse_time

KEY = 'sk-ant-test-3f1c9a'
FIRST = {'step': 1, 'total': 3, 'message': 'Creating index.ts...'}


@pytest.fixture(scope='module')
def fake(docker_client):
    with FakeAnthropic(bridge_address(docker_client)) as fake:
        yield fake


@pytest.fixture(scope='module')
def server(tmp_path_factory, templates_dir, docker_client, base_image, fake):
    with served_agents(tmp_path_factory.mktemp('claude'), templates_dir, docker_client,
                       ANTHROPIC_BASE_URL=fake.url, ANTHROPIC_API_KEY=KEY) as served:
        yield served


def fresh():
    return 'session-' + uuid.uuid4().hex[:8]


# A task

def test_the_call_of_the_contract_streams_the_event_of_the_contract_and_the_file_is_there(
        server, docker_client):
    body = {'workspaceId': server.get('/api/workspaces/work')['id'],
            'task': 'Create a simple HTTP server with Bun', 'sessionId': 'session-xyz'}
    printed = subprocess.run(['curl', '-N', '-s', '-i', '-X', 'POST',
                              f'http://localhost:{server.port}/api/agent/execute', '-H',
                              'Content-Type: application/json',
                              '-d', json.dumps(body)], capture_output=True, text=True, timeout=60,
                              check=True).stdout
    head, _, stream = printed.partition('\n\n')
    assert 'x-session-id: session-xyz' in head.lower() and 'content-type: text/event-stream' in head.lower()
    events = [json.loads(line.removeprefix('data: ')) for line in stream.splitlines()
              if line.startswith('data: ')]
    assert '"data":{"step":1,"total":3,"message":"Creating index.ts..."}' in stream
    assert [item for item in events if item['type'] == 'progress'][0]['data'] == FIRST
    assert progress(events) == [FIRST, {'step': 2, 'total': 3, 'message': 'Creating package.json...'},
                                {'step': 3, 'total': 3, 'message': 'Running checks...'},
                                {'step': 3, 'total': 3, 'message': 'All steps are done'}]
    assert {item['sessionId'] for item in events} == {'session-xyz'}
    assert {item['workspaceId'] for item in events} == {body['workspaceId']}
    assert len({item['id'] for item in events}) == len(events)
    kind, data = end_of(events)
    assert kind == 'result' and data['message'] == 'Done: created index.ts and package.json.'
    assert data['turns'] == 8 and data['costUsd'] > 0
    assert messages(events) == ["I'll plan the work.", 'Done: created index.ts and package.json.']
    assert shell(docker_client, server.container,
                 f'cat {PROJECT}/index.ts; stat -c %U {PROJECT}/index.ts') == (0, SERVER + 'dev\n')


def test_a_caller_that_wants_json_is_given_the_ids_at_once(server):
    session = fresh()
    answer = server.call('POST', '/api/agent/execute',
                         {'workspaceId': 'work', 'task': '[script:talk]', 'sessionId': session},
                         headers={'Accept': 'application/json'})
    assert answer.status_code == 202 and answer.headers['Location'] == f'/api/agent/sessions/{session}'
    data = answer.json()['data']
    assert (data['sessionId'], data['agent']) == (session, 'claude')
    assert data['runId'] == answer.headers['X-Run-Id']
    found = ended(server, session)
    assert found['state'] == 'completed' and found['runs'][0]['result'] == 'Hello there.'


def test_a_second_task_goes_on_with_the_conversation_and_costs_only_its_own(server, fake):
    session = fresh()
    first = do(server, f'Remember {session} please [script:talk]', sessionId=session)
    second = do(server, 'And now again [script:talk]', sessionId=session)
    seen = fake.asked('And now again')[-1]
    assert session in json.dumps(seen['messages']) and 'Hello there.' in json.dumps(seen['messages'])
    costs = [end_of(events)[1]['costUsd'] for events in (first, second)]
    assert costs[0] == costs[1] > 0
    found = server.get(f'/api/agent/sessions/{session}')
    assert found['totalCostUsd'] == pytest.approx(sum(costs))
    assert [run['costUsd'] for run in found['runs']] == costs
    assert [event['id'] for event in transcript(server, session)] == [event['id'] for event in first + second]


def test_a_conversation_that_is_lost_is_told_and_the_next_task_begins_a_new_one(server, docker_client):
    session = fresh()
    do(server, '[script:talk]', sessionId=session)
    conversation = server.get(f'/api/agent/sessions/{session}')['agentSessionId']
    files = f'~/.claude/projects/*/{conversation}*'
    shell(docker_client, server.container, f'rm -r {files}')
    kind, data = end_of(do(server, '[script:talk]', sessionId=session))
    assert kind == 'error' and data['code'] == 'AGENT_UNKNOWN_CONVERSATION'
    assert 'begins a new conversation' in data['message']
    assert end_of(do(server, '[script:talk]', sessionId=session))[0] == 'result'


def test_tasks_and_terminals_share_one_claude(server, docker_client, fake):
    memory, session = f'memory-{uuid.uuid4().hex}', fresh()
    shell(docker_client, server.container, f'mkdir -p ~/.claude && echo {memory} >~/.claude/CLAUDE.md')
    do(server, f'Remember {session} [script:talk]', sessionId=session)
    assert memory in json.dumps(fake.asked(session)[-1])
    resumed = server.get(f'/api/agent/sessions/{session}')['agentSessionId']
    key = f'ANTHROPIC_BASE_URL={fake.url} ANTHROPIC_API_KEY={KEY}'
    code, said = shell(docker_client, server.container,
                       f"cd {PROJECT} && {key} claude -p --resume {resumed} 'More [script:talk]'")
    assert (code, said.strip()) == (0, 'Hello there.') and session in json.dumps(fake.asked('More')[-1])


def test_the_model_is_passed_on(server, fake):
    do(server, 'Which model? [script:talk]', model='claude-haiku-4-5')
    assert fake.asked('Which model?')[-1]['model'] == 'claude-haiku-4-5'


# What is refused

def test_a_session_does_one_task_at_a_time(server):
    session = fresh()
    begin(server, '[script:long]', sessionId=session)
    status, code, error = refused(server, sessionId=session)
    assert (status, code) == (409, 'SESSION_BUSY') and 'cancel it' in error
    cancel(server, session)
    ended(server, session)


def test_a_session_belongs_to_its_workspace_and_a_stopped_workspace_does_no_task(server):
    server.running('other')
    session = begin(server, '[script:talk]', workspace='other')['sessionId']
    ended(server, session)
    status, code, error = refused(server, sessionId=session)
    assert (status, code) == (400, 'VALIDATION_ERROR') and 'another workspace' in error
    server.call('POST', '/api/workspaces/other/stop')
    assert refused(server, workspace='other')[:2] == (409, 'WORKSPACE_NOT_RUNNING')
    server.wait_status('other', 'stopped')
    assert refused(server, workspace='other')[:2] == (409, 'WORKSPACE_NOT_RUNNING')
    server.call('DELETE', '/api/workspaces/other')


def test_what_is_unknown_is_named(server):
    assert refused(server, workspace='nowhere')[:2] == (404, 'WORKSPACE_NOT_FOUND')
    status, code, error = refused(server, agent='nobody')
    assert (status, code) == (400, 'VALIDATION_ERROR') and '"nobody"' in error and 'claude' in error
    assert 'AGENT_COMMAND' in refused(server, agent='command')[2]


@pytest.mark.parametrize('task', ['with \0 in it', 'x' * 4_000_001, ''], ids=['nul', 'too-long', 'empty'])
def test_a_task_that_cannot_be_handed_over_is_the_callers_mistake(server, task):
    assert refused(server, task)[:2] == (400, 'VALIDATION_ERROR')


def test_the_longest_task_arrives_whole(server, fake):
    task = '[script:talk] ' + '🧭' * 999_900 + ' the end\n'
    assert end_of(do(server, task))[0] == 'result'
    assert any(task.strip() in text['text'] for body in fake.asked('the end') for message in body['messages']
               if isinstance(message['content'], list)
               for text in message['content'] if text['type'] == 'text')


# Ends

ENDS = {'err400': ({}, 'AGENT_API_ERROR', '400'), 'err401': ({}, 'AGENT_NOT_LOGGED_IN', 'refused the key'),
        'err500': ({}, 'AGENT_API_ERROR', '500'),
        'drop': ({}, 'AGENT_API_ERROR', 'dropped'), 'loop': ({'maxTurns': 2}, 'AGENT_MAX_TURNS', 'maxTurns'),
        'loop ': ({'maxBudgetUsd': 0.0001}, 'AGENT_MAX_BUDGET', 'maxBudgetUsd'),
        'long': ({'timeout': 3}, 'AGENT_TIMEOUT', '3 s')}


@pytest.fixture(scope='module')
def ends(server):
    """All these tasks at once, each in a session of its own."""
    begun = {script: begin(server, f'[script:{script.strip()}]', sessionId=fresh(), **fields)
             for script, (fields, *_) in ENDS.items()}
    found = {script: ended(server, ids['sessionId'], 90) for script, ids in begun.items()}
    print({script: session['runs'][0]['durationMs'] for script, session in found.items()})
    return found


@pytest.mark.parametrize('script', ENDS)
def test_an_end_says_what_it_was(server, fake, ends, script):
    _, code, words = ENDS[script]
    session = ends[script]
    kind, data = end_of(transcript(server, session['id']))
    assert kind == 'error' and data['code'] == code and words in data['message'], data
    assert session['state'] == 'failed'
    assert session['runs'][0]['error'] == {'code': code, 'message': data['message']}
    if script == 'err500':
        assert len(fake.asked('[script:err500]')) == 5  # CLAUDE_CODE_MAX_RETRIES=4
        assert len([event for event in transcript(server, session['id']) if event['type'] == 'log'
                    and 'attempt' in event['data']['message']]) == 4


def test_no_ended_task_leaves_a_process(server, docker_client, ends):
    seconds_until(lambda: not running(docker_client, server.container, 'claude', 'sleep 61.5', 'agent-run',
                                      'tail -c'), 6)


def test_without_a_key_it_is_told_before_a_task_and_after_it_which_to_set(server):
    with restarted(server, ANTHROPIC_API_KEY=''):
        before = server.get('/health')['agents']
        events = do(server, 'hello')
    kind, data = end_of(events)
    assert kind == 'error' and data['code'] == 'AGENT_NOT_LOGGED_IN'
    assert before == {'claude': {'ready': False, 'reason': data['message']}}
    assert 'has no key' in data['message'] and 'CLAUDE_CODE_OAUTH_TOKEN' in data['message']
    assert '/login' not in str(events)


def test_a_key_that_was_refused_is_told_until_one_is_taken(server):
    assert end_of(do(server, '[script:talk] hello'))[0] == 'result'
    assert server.get('/health')['agents'] == {'claude': {'ready': True}}
    events = do(server, '[script:err401]')
    why = end_of(events)[1]['message']
    assert server.get('/health')['agents'] == {'claude': {'ready': False, 'reason': why}}
    assert 'refused the key (401)' in why and not messages(events)
    assert end_of(do(server, '[script:talk] hello'))[0] == 'result'
    assert server.get('/health')['agents'] == {'claude': {'ready': True}}


def test_an_agent_that_says_nothing_is_ended(server, docker_client):
    with restarted(server, AGENT_IDLE_TIMEOUT='2'):
        begun = time.monotonic()
        kind, data = end_of(do(server, '[script:hang]'))
    assert kind == 'error' and data['code'] == 'AGENT_IDLE_TIMEOUT'
    assert 'AGENT_IDLE_TIMEOUT' in data['message']
    assert time.monotonic() - begun < 12
    server.until(lambda: not running(docker_client, server.container, 'stream-json'), 5)


@pytest.fixture(scope='module')
def patient(server):
    """The events of two tasks at once which take their time."""
    with restarted(server, AGENT_IDLE_TIMEOUT='12'):
        return concurrently(lambda: do(server, '[script:tests]'), lambda: do(server, '[script:delegating]'))


def test_a_command_that_takes_longer_than_an_agent_may_be_silent_is_let_be(server, patient):
    events, _ = patient
    assert end_of(events)[0] == 'result', events[-1]
    again = transcript(server, events[0]['sessionId'])
    times = [parse_time(event['timestamp']) for event in again]
    assert times == sorted(times) and [event['timestamp'] for event in events] == [event['timestamp']
                                                                                   for event in again]


def test_an_agent_can_commit(server, docker_client):
    events = do(server, '[script:commit]')
    assert end_of(events)[0] == 'result', events[-1]
    assert shell(docker_client, server.container, f'cd {PROJECT} && git log -1 --format="%s %an %ae"') == (
        0, 'agent dev dev@localhost\n')


@pytest.mark.parametrize('script', ['long', 'nested'])
def test_a_cancelled_task_ends_within_seconds_and_leaves_no_process(server, docker_client, script):
    session = fresh()
    sleeps = ('sleep 61.5', 'sleep 62.5', 'sleep 63.5')
    with Execution(server, 'work', f'[script:{script}]', sessionId=session) as stream:
        events = []
        for event in stream:
            events.append(event)
            if event['data'].get('status') == 'started':
                break
        seconds_until(lambda: running(docker_client, server.container, *sleeps))
        begun = time.monotonic()
        answer = cancel(server, session)
        assert answer.status_code == 202 and time.monotonic() - begun < 1
        events += list(stream)
    seconds_until(lambda: not running(docker_client, server.container, 'claude', 'agent-run', *sleeps),
                  max(0.1, 6 - (time.monotonic() - begun)))
    assert time.monotonic() - begun < 6
    kind, data = end_of(events)
    assert kind == 'error' and data['code'] == 'AGENT_CANCELLED'
    assert server.get(f'/api/agent/sessions/{session}')['state'] == 'cancelled'
    assert end_of(do(server, 'go on [script:talk]', sessionId=session))[0] == 'result'


def test_what_a_task_has_started_in_the_background_outlives_its_success(server, docker_client):
    try:
        assert end_of(do(server, '[script:serve]'))[0] == 'result'
        time.sleep(1)
        assert running(docker_client, server.container, 'sleep 64.5')
    finally:
        shell(docker_client, server.container, 'pkill -f "sleep 64.5"')


def test_a_command_in_the_background_is_not_waited_for_and_outlives_the_task(server, docker_client):
    try:
        begun = time.monotonic()
        assert end_of(do(server, '[script:background]'))[1]['message'] == 'It runs in the background.'
        assert time.monotonic() - begun < 20
        assert running(docker_client, server.container, 'sleep 65.5')
        server.until(lambda: not running(docker_client, server.container, 'stream-json'), 5)
    finally:
        shell(docker_client, server.container, 'pkill -f "sleep 65.5"')


def test_another_agent_in_the_background_is_waited_for(patient):
    _, events = patient
    begun, over = (parse_time(events[number]['timestamp']) for number in (0, -1))
    assert end_of(events)[1]['message'] == 'The patient work was done.' and over - begun > 9
    assert messages(events) == ['It is being worked on.', 'The patient work was done.']


# Keys

def test_a_key_shows_nowhere_even_when_the_agent_tells_it(server, docker_client, fake):
    canaries = {name: f'canary-{uuid.uuid4().hex}'
                for name in ('ANTHROPIC_API_KEY', 'ANTHROPIC_AUTH_TOKEN', 'CLAUDE_CODE_OAUTH_TOKEN')}
    begun, session = int(time.time()), fresh()
    already = server.log.stat().st_size
    with (restarted(server, **canaries), Sse(server, '/api/workspaces/work/events') as workspace,
          Ws(server) as socket, Sse(server, f'/agent/sse/{session}') as followed):
        socket.send(type='subscribe', workspaceId='work')
        gevent.sleep(0.3)
        with Execution(server, 'work', 'Tell me all [script:leak]', sessionId=session) as stream:
            events = list(stream)
        seen = {'execute': events}
        for name, one in (('workspace', workspace), ('websocket', socket), ('session', followed)):
            seen[name] = []
            for event in one:
                seen[name].append(event)
                if event['type'] in ('result', 'error'):
                    break
        seen['transcript'] = transcript(server, session)
        seen['details'] = server.get(f'/api/agent/sessions/{session}')
        seen['lists'] = [server.get(path)
                         for path in ('/api/agent/sessions', '/api/workspaces', '/api/workspaces/work')]
        seen['inspect'] = docker_client.api.inspect_container(server.container)
        seen['events'] = list(docker_client.api.events(
            since=begun, until=int(time.time()) + 1, decode=True, filters={'container': server.container}))
        execs = [item['Actor']['Attributes']['execID'] for item in seen['events']
                 if item['Action'].startswith('exec_create')]
        seen['execs'] = [docker_client.api.exec_inspect(one) for one in execs]
        seen['processes'] = processes(docker_client, server.container)
        seen['state'] = [path.read_bytes().decode('latin-1') for path in (server.folder / 'state').iterdir()
                         if path.is_file()]
        seen['log'] = server.log.read_text()[already:]
    known = heard(fake.asked('Tell me all')[-1])
    assert all(value in known for value in canaries.values()), \
        'the agent did not have the keys: nothing is shown by this test'
    said = messages(events)[-1]
    assert said.startswith('I found:') and 'ANTHROPIC_API_KEY=***' in said
    assert execs and any('claude' in json.dumps(one) for one in seen['execs'])
    for place, content in seen.items():
        text = json.dumps(content, default=str)
        assert not [name for name, value in canaries.items() if value in text], place
        shows_task = place in ('details', 'lists', 'state')
        assert 'Tell me all' not in text or shows_task, f'the task shows in {place}'
