"""What agents, clients, pages, disks and clocks may do, and what they must not achieve. All of it over the
API, on the real engine."""
import base64
import concurrent.futures
import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path

import pytest
import requests
from agents import begin, cancel, do, end_of, ended, put, running, shell, transcript
from conftest import Served, objects_of, remove_objects
from helpers import check_fairness, lose_all, run_second, seconds_left, seconds_of
from streaming import Sse, Ws, connect, messages_until, read_head

from _agentbackend.errors import ValidationError
from _agentbackend.records import Run, Session, Workspace
from _agentbackend.sshkeys import parse_private_key
from _agentbackend.state import State
from _agentbackend.translators import ClaudeLines, CommandLines, RunReader

# What it does is its task: lines of JSON to print as they are, or a command line after an exclamation mark.
PRINTER = """#!/bin/sh
read -r first
case $first in !*) exec sh -c "${first#!}" ;; esac
printf '%s\\n' "$first"; cat
"""
LAST_WORD = '{"type":"result","subtype":"success","result":"done","num_turns":1,"duration_ms":5}'


@contextlib.contextmanager
def starting_agents(place, agents_template, docker_client):
    """Give a function that starts servers whose workspaces have an agent `claude` which does what its task
    says."""
    servers = []

    def start(*names, **settings):
        folder = place / f'agents{len(servers)}'
        folder.mkdir()
        server = Served(folder, agents_template[0],
                        **{'DEFAULT_TEMPLATE': 'agents', 'AGENT_COMMAND': 'claude', **settings})
        servers.append(server)
        server.start()
        for name in names:
            container = server.running(name)['containerId']
            put(docker_client, container, 'claude', PRINTER, folder='/usr/local/bin')
            server.container = container
        return server

    try:
        yield start
    finally:
        for server in servers:
            server.stop()
            print(f'--- log of {server.instance}\n' + server.log.read_text()[-8000:])
            remove_objects(docker_client, server.instance)


@pytest.fixture
def start_agents(tmp_path, agents_template, docker_client):
    with starting_agents(tmp_path, agents_template, docker_client) as start:
        yield start


@pytest.fixture(scope='module')
def printing(tmp_path_factory, agents_template, docker_client):
    """A server of that kind which some tests share, with a key."""
    with starting_agents(tmp_path_factory.mktemp('printing'), agents_template, docker_client) as start:
        yield start('work', ANTHROPIC_API_KEY='canary-0123456789')


def restart(server):
    """Kill a server and start it again."""
    server.kill()
    server.start()


# State

def test_no_number_of_an_agent_ends_the_writing_of_the_state(start_agents):
    server = start_agents('work')
    huge = '{"type":"result","subtype":"success","result":"x","num_turns":' + '9' * 4300 + '}'
    large = '{"type":"result","subtype":"success","result":"x","duration_ms":1e308}'
    for number, line in enumerate((huge, large)):
        events = do(server, f'{line}\n{line}', sessionId=f's{number}')
        assert end_of(events)[0] == 'result'
    server.call('PATCH', '/api/workspaces/work', {'labels': {'kept': 'yes'}})
    for number in range(2):
        found = server.get(f'/api/agent/sessions/s{number}')
        assert found['state'] == 'completed' and found['runs'][0]['durationMs'] < 1e9
    restart(server)
    assert server.get('/api/workspaces/work')['labels'] == {'kept': 'yes'}
    assert [item['id'] for item in server.get('/api/agent/sessions')] == ['s0', 's1']


def test_a_change_that_a_full_disk_refuses_is_not_answered_with_200_and_written_later(
        small_disk, make_server):
    server = make_server(STATE_DIR=str(small_disk))
    server.running('work')
    filler = small_disk / 'filler'
    with open(filler, 'wb', buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(4096))
    for number in range(10):  # what SQLite has of its log has room for some still
        answer = server.call('PATCH', '/api/workspaces/work', {'labels': {'number': str(number) * 1000}})
        if answer.status_code != 200:
            break
    assert answer.status_code == 503 and answer.json()['code'] == 'STATE_NOT_WRITTEN'
    health = server.get('/health')
    assert health['status'] == 'degraded' and 'state file' in health['problems'][0]
    created = server.call('POST', '/api/workspaces', {'name': 'other'})
    assert created.status_code == 503 and [item['name'] for item in server.get('/api/workspaces')] == ['work']
    filler.unlink()
    server.until(lambda: server.get('/health')['status'] == 'healthy', 10)
    restart(server)
    assert server.get('/api/workspaces/work')['labels'] == {'number': str(number) * 1000}
    assert server.running('other')['status'] == 'running'


def test_a_second_server_of_an_instance_is_found_out_on_the_engine(make_server, tmp_path):
    server = make_server()
    workspace = server.running('work', type='agent', ttl=2000)
    second = run_second(server, STATE_DIR=str(tmp_path / 'elsewhere'))
    assert second.returncode == 2, second.stderr
    assert f"INSTANCE='{server.instance}': another server" in second.stderr
    assert server.get('/health')['status'] == 'healthy'
    assert server.get('/api/workspaces/work')['id'] == workspace['id']
    # The claim of a server that is dead stands in nobody's way for long.
    server.kill()
    server.settings['STATE_DIR'] = str(tmp_path / 'elsewhere')
    server.start()
    assert [item['id'] for item in server.get('/api/workspaces')] == [workspace['id']]


def test_a_server_that_was_replaced_while_it_stood_still_does_nothing_any_more(
        make_server, tmp_path, docker_client):
    server = make_server()
    server.running('work')
    os.kill(server.process.pid, signal.SIGSTOP)
    other = Served(tmp_path, server.settings['TEMPLATES_DIR'], constants={'claim.ANSWER_TIME': 2})
    other.instance = other.settings['INSTANCE'] = server.instance
    try:
        other.start()
        os.kill(server.process.pid, signal.SIGCONT)
        server.until(lambda: server.get('/health')['status'] == 'degraded', 20)
        assert 'another server of that name' in server.get('/health')['problems'][0]
        assert server.call('DELETE', '/api/workspaces/work').status_code == 503
        assert other.get('/health')['status'] == 'healthy'
        assert other.get('/api/workspaces/work')['status'] == 'running'
        other.stop()
        server.until(lambda: server.get('/health')['status'] == 'healthy', 20)
    finally:
        other.stop()


# What the engine has

def test_a_container_of_an_image_made_from_a_workspace_is_not_taken_for_it(start_agents, docker_client):
    server = start_agents('work', DEFAULT_AGENT='command')
    real = server.container
    image = docker_client.api.commit(real)['Id']
    double = docker_client.containers.run(image, name=f'{server.instance}-double', detach=True,
                                          entrypoint=['sleep', '1000'])
    try:
        time.sleep(3)
        assert server.get('/api/workspaces/work')['containerId'] == real
        do(server, '!hostname >/workspace/where', sessionId='s')
        assert shell(docker_client, real, 'cat /workspace/where')[0] == 0
        server.call('POST', '/api/workspaces/work/stop')
        server.wait_status('work', 'stopped')
        double.reload()
        assert double.status == 'running'
        server.kill()
        lose_all(docker_client, server)
        server.start()
        assert [item['name'] for item in server.get('/api/workspaces')] == ['work']
        assert server.call('DELETE', '/api/workspaces/work').status_code == 200
        double.reload()
        assert double.status == 'running'
    finally:
        double.remove(force=True)
        docker_client.api.remove_image(image, force=True)


def test_what_can_not_be_adopted_is_left_out_and_told(make_server, docker_client):
    server = make_server()
    for name in ('odd', 'good'):
        server.running(name)
    container = docker_client.containers.get(f'{server.instance}-odd')
    container.exec_run(['sh', '-c', r"printf '\377\376\n' >/etc/agentbackend/password"])
    server.kill()
    lose_all(docker_client, server)

    def volume(called, identity, **more):
        labels = {'id': identity, 'instance': server.instance, **more}
        return docker_client.volumes.create(f'{server.instance}-{called}', labels={
            f'agentbackend.{key}': value for key, value in labels.items()})
    # What the last one tells would make the state file one that is refused as damaged.
    made = [volume('ws-junk0001', 'ws-junk0001'), volume('foreign', 'ws-other001'), volume(
        'ws-junk0002', 'ws-junk0002', name='junk', type='persistent', template='tiny', createdAt='1',
        ports='{}', gitUrl='', gitBranch='', spec='{"folder": "junk", "ssh": "yes"}')]
    try:
        for _ in range(2):
            server.start()
            assert sorted(item['name'] for item in server.get('/api/workspaces')) == ['good', 'odd']
            health = server.get('/health')
            assert health['status'] == 'healthy' and len(health['problems']) == 2
            assert all(name in str(health['problems']) for name in ('ws-junk0001', 'ws-junk0002'))
            server.kill()
        assert 'damaged' not in server.log.read_text()
    finally:
        for item in made:
            item.remove()


def test_ports_that_a_container_of_somebody_else_claims_stop_no_workspace(server, docker_client):
    image = docker_client.containers.get(server.running('first')['containerId']).image.id
    made = []
    try:
        for ports in ('[' * 9000, '{"3000": [1]}', '{"3000": {}}', '5', '{"a": "b"}', 'null', 'x'):
            made.append(docker_client.containers.create(image, labels={'agentbackend.ports': ports}))
        server.running('second')
    finally:
        for container in made:
            container.remove()


def test_a_workspace_that_was_renamed_and_paused_behind_our_back_is_still_ours(start_agents, docker_client):
    server = start_agents('work', DEFAULT_AGENT='command')
    container = docker_client.containers.get(server.container)
    container.rename(f'renamed-{server.instance}')
    assert end_of(do(server, '!echo hello', sessionId='s'))[0] == 'result'
    container.pause()
    time.sleep(2)
    assert server.get('/api/workspaces/work')['status'] == 'running'
    container.unpause()
    restart(server)
    assert server.get('/api/workspaces/work')['containerId'] == server.container
    server.call('DELETE', '/api/workspaces/work')
    assert objects_of(docker_client, server.instance) == []


def test_a_network_that_was_tidied_away_while_a_workspace_was_stopped_is_made_again(
        make_server, docker_client):
    server = make_server()
    server.running('work')
    server.call('POST', '/api/workspaces/work/stop')
    server.wait_status('work', 'stopped')
    docker_client.networks.get(f'agentbackend-{server.instance}').remove()
    server.call('POST', '/api/workspaces/work/start')
    assert server.wait_status('work', 'running', 'error')['status'] == 'running'
    server.call('DELETE', '/api/workspaces/work')
    # The last one takes it along.
    assert not docker_client.networks.list(names=[f'agentbackend-{server.instance}'])


# Tasks

# For how long is waited for what an agent that was ended has still to say.
IMPATIENCE = {'tasks.CANCEL_TIMEOUT': 2, 'tasks.BACKLOG_TIMEOUT': 3, 'tasks.OVERDUE': 5}
STOP_THE_READER = ("!for p in /proc/[0-9]*; do case $(tr '\\0' ' ' <$p/cmdline) in "
                   "*'exec 4>&2'* | *tail*) kill -STOP ${p#/proc/};; esac; done; sleep 1234")


@pytest.mark.parametrize('task', [STOP_THE_READER, '!kill -STOP -1; sleep 1234'],
                         ids=['its reader', 'everything'])
def test_a_task_that_stops_what_reads_it_ends_when_it_is_told_to(start_agents, docker_client, task):
    server = start_agents('work', constants=IMPATIENCE)
    begin(server, task, sessionId='late', timeout=2)
    assert ended(server, 'late')['runs'][0]['error']['code'] == 'AGENT_TIMEOUT'
    begin(server, task, sessionId='cancelled')
    time.sleep(1)
    cancel(server, 'cancelled')
    assert ended(server, 'cancelled')['state'] == 'cancelled'
    server.until(lambda: not running(docker_client, server.container, 'agent-run', 'sleep 1234', 'tail'), 20)
    assert server.call('DELETE', '/api/agent/sessions/late').status_code == 200


def test_a_task_in_a_paused_workspace_ends_when_it_is_told_to_and_is_swept_up_later(
        start_agents, docker_client):
    server = start_agents('work', constants=IMPATIENCE)
    begin(server, '!sleep 1234', sessionId='s')
    server.until(lambda: running(docker_client, server.container, 'sleep 1234'))
    container = docker_client.containers.get(server.container)
    container.pause()
    cancel(server, 's')
    assert ended(server, 's')['state'] == 'cancelled'
    restart(server)
    container.unpause()
    server.until(lambda: [line for line in running(docker_client, server.container, 'sleep 1234')] == [], 20)


def test_tasks_that_were_ended_leave_their_places_to_others(start_agents):
    server = start_agents('work', AGENT_MAX_TASKS='2', AGENT_TIMEOUT='2', constants=IMPATIENCE)
    for number in range(2):
        begin(server, STOP_THE_READER, sessionId=f's{number}')
    for number in range(2):
        ended(server, f's{number}')
    assert end_of(do(server, LAST_WORD, sessionId='free'))[0] == 'result'


def test_a_sparse_file_of_a_workspace_takes_no_room_here(start_agents, docker_client, small_disk):
    server = start_agents('work', AGENT_MAX_OUTPUT='64k')
    server.settings['TMPDIR'] = str(small_disk)
    restart(server)
    do(server, LAST_WORD, sessionId='s')
    events = transcript(server, 's')
    folder = shell(docker_client, server.container, 'echo /workspace/.agentbackend/runs/*')[1].strip()
    for name in ('log', 'exit', 'pid', 'keeper'):
        assert shell(docker_client, server.container, f'truncate -s 3G {folder}/{name}')[0] == 0
    assert transcript(server, 's') == events
    with Sse(server, '/agent/sse/s') as stream:
        assert messages_until(stream, lambda event: event['type'] == 'result') == events
    # And of one that goes on while it grows.
    begin(server, '!truncate -s 3G /workspace/.agentbackend/runs/*/log; sleep 1234', sessionId='t')
    assert ended(server, 't')['runs'][0]['error']['code'] == 'AGENT_MAX_OUTPUT'
    assert transcript(server, 't')[-1]['type'] == 'error'


STAMPS = ('2026-01-01T00:00:00+99:99', '\uff12\uff10\uff12\uff16-01-01T00:00:00', '0001-01-01T00:00:00+23:59',
          '9999-12-31T23:59:59-23:59',
          '2026-01-01T00:00:00Z', '1969-12-31T23:59:59Z', '2026-02-30T00:00:00Z', 'nonsense', 7, None, {},
          '9' * 5000)


def test_no_stamp_of_an_agent_breaks_its_session(printing):
    server = printing
    lines = [json.dumps({'type': 'assistant', 'timestamp': stamp,
                         'message': {'content': [{'type': 'text', 'text': f'word {number}'}]}})
             for number, stamp in enumerate(STAMPS)]
    begun = datetime.now(timezone.utc).isoformat(timespec='milliseconds').replace('+00:00', 'Z')
    events = do(server, '\n'.join([*lines, LAST_WORD]), sessionId='s')
    assert end_of(events)[0] == 'result'
    words = [event['data']['message'] for event in transcript(server, 's') if event['type'] == 'message']
    assert words == [f'word {number}' for number in range(len(STAMPS))]
    # What counts is when it was said.
    stamps = [event['timestamp'] for event in events]
    assert begun <= stamps[0] and stamps == sorted(stamps) and seconds_left(stamps[-1]) <= 0


def test_ids_do_not_grow_with_the_tasks_that_a_reader_has_missed(start_agents):
    server = start_agents('work', DEFAULT_AGENT='command')
    with Sse(server, '/api/workspaces/work/events?tail=0') as stream:
        next(iter(stream))
        after = stream.last_id
    names = [f's-{number}-{"x" * 40}' for number in range(25)]
    for name in names:
        begin(server, '{"type":"progress","data":{"step":1}}', sessionId=name)
        ended(server, name)
    running_ones = [f'long-{number}-{"y" * 40}' for number in range(3)]
    for name in running_ones:
        begin(server, '!echo begun; sleep 1234', sessionId=name)
    restart(server)  # what is missed comes from the files
    seen, left = [], {*names, *running_ones}
    with Sse(server, '/api/workspaces/work/events', after=after, timeout=20) as stream:
        for event in stream:
            seen.append(event)
            left -= {event.get('sessionId')} if event['type'] in ('result', 'message') else set()
            if not left:
                break
    assert max(len(event['id']) for event in seen) <= 200
    told = [(event['sessionId'], event['data'].get('message'), event['type']) for event in seen
            if 'sessionId' in event]
    assert len(told) == len(set(told))
    assert len([kind for _, _, kind in told if kind == 'result']) == len(names)
    with Sse(server, '/api/workspaces/work/events', after=seen[-1]['id'], timeout=3) as stream:
        assert next(iter(stream))['type'] == 'status'
        with pytest.raises(OSError):  # nothing comes twice
            next(iter(stream))


def test_a_server_that_stood_still_ends_no_agent_for_its_own_silence(start_agents):
    server = start_agents('work', AGENT_IDLE_TIMEOUT='3')
    begin(server, '!for n in 1 2 3 4 5 6 7 8 9 10 11 12; do echo $n; sleep 0.6; done; echo \'' + LAST_WORD
          + "'", sessionId='s')
    time.sleep(1)
    os.kill(server.process.pid, signal.SIGSTOP)
    time.sleep(5)
    os.kill(server.process.pid, signal.SIGCONT)
    assert ended(server, 's')['state'] == 'completed'


def test_an_image_without_the_user_of_agents_is_told(make_server):
    server = make_server(AGENT_COMMAND='true', DEFAULT_AGENT='command')
    server.running('work')
    answer = server.call('POST', '/api/agent/execute', {'workspaceId': 'work', 'task': 'x'},
                         headers={'Accept': 'application/json'})
    assert answer.status_code == 400 and 'needs the user dev' in answer.json()['error'], answer.text


def test_a_session_whose_transcript_can_not_be_deleted_now_is_not_forgotten(printing, docker_client):
    server = printing
    do(server, LAST_WORD, sessionId='lasting')
    shell(docker_client, server.container,
          'chattr +i /workspace/.agentbackend/runs/*/out || { mv /bin/rm /bin/rm-away; }', user='root')
    answer = server.call('DELETE', '/api/agent/sessions/lasting')
    assert (answer.status_code, answer.json()['code']) == (502, 'DOCKER_ERROR')
    assert server.get('/api/agent/sessions/lasting')['id'] == 'lasting'
    shell(docker_client, server.container,
          'mv /bin/rm-away /bin/rm; chattr -i /workspace/.agentbackend/runs/*/out', user='root')
    before = runs_of(docker_client, server)
    assert server.call('DELETE', '/api/agent/sessions/lasting').status_code == 200
    assert len(runs_of(docker_client, server)) == len(before) - 1


def test_no_secret_is_shown_as_the_name_of_a_field_either(printing):
    server = printing
    secret = '\\u0063anary-0123456789'
    data = f'{{"canary-0123456789":1,"{secret}":{{"{secret}":2}}}}'
    live = do(server, f'{{"type":"progress","data":{data}}}', sessionId='secret', agent='command')
    for told in (json.dumps(live), json.dumps(transcript(server, 'secret'))):
        assert '"progress"' in told and 'canary' not in told


def test_ended_tasks_beyond_the_limit_are_forgotten_with_their_files(start_agents, docker_client):
    server = start_agents('work', KEEP_RUNS='3', constants={'tasks.TIDY_PAUSE': 3})
    for number in range(5):
        do(server, LAST_WORD, sessionId=f's{number}')
    server.until(lambda: len(server.get('/api/agent/sessions')) == 3)
    assert [item['id'] for item in server.get('/api/agent/sessions')] == ['s2', 's3', 's4']
    assert len(runs_of(docker_client, server)) == 3


def runs_of(docker_client, server):
    return shell(docker_client, server.container, 'ls /workspace/.agentbackend/runs')[1].split()


# Who may call

def test_pages_that_workspaces_publish_are_no_pages_of_ours(server):
    workspace = server.running('publishing', ports=[3000])
    ends = [int(server.settings[name].partition('-')[2])
            for name in ('CODE_SERVER_PORTS', 'SSH_PORTS', 'CUSTOM_PORTS')]
    published = [workspace['codeServerPort'], workspace['sshPort'], workspace['ports']['3000'], *ends]
    for port in published:
        for host in ('127.0.0.1', 'localhost', '[::1]'):
            headers = {'Origin': f'http://{host}:{port}'}
            assert server.call('GET', '/api/workspaces', headers=headers).status_code == 403
            assert server.call('POST', '/api/workspaces', {'name': 'x'}, headers=headers).status_code == 403
            preflight = server.call('OPTIONS', '/api/workspaces',
                                    headers={**headers, 'Access-Control-Request-Method': 'POST'})
            assert preflight.status_code == 403 and 'Access-Control-Allow-Origin' not in preflight.headers
    with Ws(server, Origin=f'http://127.0.0.1:{workspace["ports"]["3000"]}') as stream:
        assert stream.status == 403
    for origin in ('http://localhost:3000', 'http://127.0.0.1:5173', f'http://127.0.0.1:{server.port}'):
        assert server.call('GET', '/api/workspaces', headers={'Origin': origin}).status_code == 200


def test_its_own_pages_may_call_it_under_every_name_that_it_has(make_server):
    server = make_server(ALLOWED_HOSTS='dev.example.org', API_TOKEN='t' * 20)
    server.headers = {'Authorization': 'Bearer ' + 't' * 20}

    def status(origin, host, **headers):
        return server.call('GET', '/api/workspaces',
                           headers={'Origin': origin, 'Host': host, **headers}).status_code
    assert status('https://dev.example.org', 'dev.example.org') == 200
    assert status('http://dev.example.org:8080', 'dev.example.org:8080') == 200
    assert status('https://dev.example.org', 'dev.example.org', **{'X-Forwarded-Proto': 'https'}) == 200
    assert status('http://dev.example.org', 'dev.example.org', **{'X-Forwarded-Proto': 'https'}) == 403
    assert status('https://dev.example.org:444', 'dev.example.org') == 403
    assert status('https://evil.example', 'dev.example.org') == 403
    assert status('https://evil.example', 'evil.example') == 403


def test_those_who_never_show_the_token_take_no_place_of_others(make_server):
    token = 'hush-0123456789-hush'
    # They have a moment to show it.
    server = make_server(API_TOKEN=token, MAX_STREAMS='5',
                         constants={'clients.AUTH_TIMEOUT': 4, 'clients.CHECK_PAUSE': 1})
    server.headers = {'Authorization': f'Bearer {token}'}
    server.running('work')
    strangers = []
    try:
        for _ in range(110):
            strangers.append(Ws(server, timeout=20, Authorization=None))
        with Sse(server, '/api/workspaces/work/events') as stream:
            assert stream.status == 200 and next(iter(stream))['type'] == 'status'
            with Ws(server) as friend:  # one who shows it has a place among the others
                friend.send(type='auth', token=token)
                friend.send(type='ping')
                assert messages_until(friend, lambda message: message['type'] == 'pong')
        assert strangers[0].closing()[0] in (1001, 1008) and strangers[-1].closing()[0] == 1008
    finally:
        for stranger in strangers:
            stranger.close()


def test_a_ticket_opens_streams_and_nothing_else(make_server):
    token = 'hush-0123456789-hush'
    server = make_server(API_TOKEN=token)
    server.headers = {'Authorization': f'Bearer {token}'}
    server.running('work')

    def ticket():
        return server.call('POST', '/api/tickets').json()['data']['ticket']
    for path in ('/api/workspaces', '/api/workspaces/work', '/api/agent/sessions'):
        assert server.call('GET', f'{path}?ticket={ticket()}',
                           headers={'Authorization': ''}).status_code == 401
    for path in ('/api/workspaces/work/events', '/agent/sse/yet-to-come'):
        with Sse(server, f'{path}?ticket={ticket()}', Authorization=None) as stream:
            assert stream.status == 200


@pytest.mark.parametrize('network', [None, 'bridge'], ids=['own', 'shared'])
def test_workspaces_do_not_reach_each_other(start_agents, docker_client, network):
    server = start_agents('one', 'two', **({'WORKSPACE_NETWORK': network} if network else {}))
    one, two = (docker_client.containers.get(f'{server.instance}-{name}') for name in ('one', 'two'))
    shell(docker_client, one.id, '(while :; do echo secret | busybox nc -l -p 5432; done) >/dev/null 2>&1 &')
    address = next(iter(one.attrs['NetworkSettings']['Networks'].values()))['IPAddress']
    reached = [shell(docker_client, two.id, f'busybox nc -w 2 {address} {port} </dev/null')[1]
               for port in (5432, 2222)]
    assert ['secret' in reached[0], 'SSH-2.0-tiny' in reached[1]] == [bool(network)] * 2, reached


@pytest.mark.parametrize('url', ['http://user:pass@host.invalid/x.git?private_token=canary',
                                 'http://user:canary#x@host.invalid/x.git',
                                 'http://user:canary/x@host.invalid/x.git',
                                 'http://user:canary?x@host.invalid/x.git'])
def test_a_secret_at_an_odd_place_of_a_url_is_refused_and_not_kept(server, url):
    answer = server.call('POST', '/api/workspaces', {'name': 'secret', 'gitUrl': url})
    assert answer.status_code == 400 and answer.json()['details'][0]['path'] == 'gitUrl'
    assert 'canary' not in answer.text
    assert 'canary' not in server.log.read_text()


def test_labels_do_not_add_up_without_end(server):
    server.running('labelled')
    for part in range(2):
        last = server.call('PATCH', '/api/workspaces/labelled',
                           {'labels': {f'l{part}-{number}': 'x' for number in range(60)}})
    assert last.status_code == 400 and last.json()['details'][0]['path'] == 'labels'
    assert len(server.get('/api/workspaces/labelled')['labels']) == 60


# HTTP, as a proxy in front may read it otherwise

BODY = b'{"name": "x", "nonsense": 1}'
PIPELINED = b'GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n'


def raw(server, data, timeout=5):
    """Send bytes and return all that comes back until the server closes."""
    with connect(server, timeout) as sock:
        sock.sendall(data)
        answer = b''
        while (part := sock.recv(65536)):
            answer += part
        return answer


def post(*headers, body=b''):
    return b'\r\n'.join([b'POST /api/workspaces HTTP/1.1', b'Content-Type: application/json', *headers, b'',
                         b'']) + body


AMBIGUOUS = {
    'two lengths': post(b'Host: localhost', b'Content-Length: 0', b'Content-Length: %d' % len(PIPELINED),
                        body=PIPELINED),
    'two equal lengths': post(b'Host: localhost', b'Content-Length: 0', b'Content-Length: 0') + PIPELINED,
    'length and chunks': post(b'Host: localhost', b'Content-Length: 4', b'Transfer-Encoding: chunked',
                              body=b'0\r\n\r\n' + PIPELINED),
    'bare CR': post(b'Host: localhost', b'X: a\rTransfer-Encoding: chunked', b'Content-Length: 0')
    + PIPELINED,
    'bare CR for a host': b'GET /health HTTP/1.1\r\nX: a\rHost: localhost\r\n\r\n',
    'no colon': b'GET /health HTTP/1.1\r\nHost: localhost\r\nfoo\r\nOrigin: http://evil.com\r\n\r\n',
    'space before colon': post(b'Host: localhost', b'Transfer-Encoding : chunked', body=b'0\r\n\r\n'),
    'NUL': b'GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\0b\r\n\r\n',
    'folded': b'GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\r\n b\r\n\r\n',
    'LF in an extension': post(b'Host: localhost', b'Transfer-Encoding: chunked',
                               body=b'3;a\nb\r\nabc\r\n0\r\n\r\n'),
    'no CR behind a chunk': post(b'Host: localhost', b'Transfer-Encoding: chunked',
                                 body=b'3\r\nabc\n0\r\n\r\n'),
    'chunked twice': post(b'Host: localhost', b'Transfer-Encoding: chunked, chunked', body=b'0\r\n\r\n'),
    'plus in a length': post(b'Host: localhost', b'Content-Length: +4', body=b'abcd'),
    'two hosts': b'GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n',
    'HTTP/0.9': b'GET /health\r\n\r\n',
    'tab in the request line': b'GET\t/health\tHTTP/1.1\r\nHost: localhost\r\n\r\n',
}


@pytest.fixture(scope='module')
def bare(tmp_path_factory):
    """A server without an engine, which is all that HTTP needs."""
    folder = tmp_path_factory.mktemp('bare')
    (folder / 'templates').mkdir()
    served = Served(folder, folder / 'templates', DOCKER_HOST=f'unix://{folder}/no.sock',
                    DEFAULT_TEMPLATE='blank')
    yield served.start(connected=False)
    served.kill()


@pytest.mark.parametrize('sent', AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_a_request_that_can_be_read_in_two_ways_is_refused_and_the_connection_closed(bare, sent):
    answer = raw(bare, sent)
    assert answer.startswith(b'HTTP/1.1 400 ') and answer.count(b'HTTP/1.1 ') == 1, answer
    assert json.loads(answer.partition(b'\r\n\r\n')[2])['code'] == 'VALIDATION_ERROR'


@pytest.mark.parametrize('host', ['[::1].evil.com', '[::1]evil.com', 'localhost:80@evil.com', 'localhost:',
                                  'local host', 'localhost:99999999', ''])
def test_a_host_that_is_none_is_forbidden(bare, host):
    answer = raw(bare, f'GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n'.encode())
    assert answer.startswith(b'HTTP/1.1 403 ')


@pytest.mark.parametrize('connection', ['close, keep-alive', 'keep-alive, close', 'Close'])
def test_close_closes_whatever_stands_beside_it(bare, connection):
    request = f'GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: {connection}\r\n\r\n'
    answer = raw(bare, request.encode())
    assert answer.startswith(b'HTTP/1.1 200 ')


@pytest.mark.parametrize(('target', 'host', 'status'), [
    ('http://localhost/health', 'evil.com', b'200'), ('http://evil.com/health', 'localhost', b'403'),
    ('http://localhost', 'evil.com', b'200')])
def test_a_target_in_the_absolute_form_is_taken_and_its_host_counts(bare, target, host, status):
    answer = raw(bare, f'GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n'.encode())
    assert answer.startswith(b'HTTP/1.1 ' + status)


def test_chunks_with_extensions_and_trailers_are_taken(bare):
    answer = raw(bare, post(b'Host: localhost', b'Transfer-Encoding: Chunked', b'Connection: close',
                            body=b'5;a=b\r\n' + BODY[:5] + b'\r\n%X \r\n' % len(BODY[5:]) + BODY[5:]
                            + b'\r\n0\r\nX-Trailer: y\r\n\r\n'))
    assert answer.startswith(b'HTTP/1.1 400 ') and b'nonsense' in answer


# The time of all

LARGE_BODIES = {
    'ports': {'name': 'x', 'ports': [99999] * 160_000},
    'env': {'name': 'x', 'env': {f'bad name {number}': '' for number in range(40_000)}},
    'labels': {'name': 'x', 'labels': {f'bad name {number}': '' for number in range(40_000)}},
    'fields': {'name': 'x', **{f'field{number}': 1 for number in range(70_000)}},
}


@pytest.mark.parametrize('body', LARGE_BODIES.values(), ids=LARGE_BODIES)
def test_a_body_full_of_errors_takes_nobody_elses_turn(bare, body):
    """It took others 2.6 to 5.7 s when each error was looked for."""
    def call():
        assert bare.get('/health')['version']
    alone, waits = [seconds_of(call) for _ in range(10)], []
    data = json.dumps(body, separators=(',', ':')).encode()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        headers, url = {'Content-Type': 'application/json'}, f'http://127.0.0.1:{bare.port}/api/workspaces'
        job = pool.submit(lambda: requests.post(url, data=data, headers=headers))
        while not job.done():
            waits.append(seconds_of(call))
        answer = job.result()
    assert answer.status_code == 400 and 1 <= len(answer.json()['details']) <= 10
    check_fairness(waits, alone)


def test_a_reader_that_pauses_loses_nothing(server):
    line = 'line " n ", which is long enough to fill what lies between'
    flood = f"""awk 'BEGIN {{for (n = 1; n <= 100000; n++) print "{line}"}}'; echo end"""
    server.running('flooding', env={'PRINT': flood})
    server.until(lambda: server.call('GET', '/api/workspaces/flooding/logs?tail=1').text == 'end\n', 60)
    with connect(server, 30, receive_buffer=4096) as sock:
        head = f'GET /api/workspaces/flooding/logs HTTP/1.1\r\nHost: localhost:{server.port}\r\n\r\n'
        sock.sendall(head.encode())
        file = sock.makefile('rb')
        assert read_head(file)[0] == 200
        text = file.read(1000)
        time.sleep(18)  # longer than a peer that is gone is waited for
        while not text.endswith(b'0\r\n\r\n'):
            part = file.read1(65536)
            assert part, 'it was cut off'
            text += part
    assert b'line 1,' in text and b'line 100000,' in text and b'\nend\n' in text


def test_a_log_that_is_followed_answers_before_there_is_a_line(server):
    server.running('silent')
    with connect(server, 5) as sock:
        sock.sendall('GET /api/workspaces/silent/logs?follow=true&tail=0 HTTP/1.1\r\nHost: '
                     f'localhost:{server.port}\r\n\r\n'.encode())
        status, headers = read_head(sock.makefile('rb'))
        assert (status, headers['content-type']) == (200, 'text/plain; charset=utf-8')


def test_connections_that_wait_for_nothing_keep_nobody_out(bare):
    """As many as the server takes at all; those that never asked for anything make room for one that does."""
    idle = []
    try:
        for _ in range(5100):
            idle.append(socket.create_connection(('127.0.0.1', bare.port), timeout=5))
        assert raw(bare, b'GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n',
                   timeout=8).startswith(b'HTTP/1.1 200 ')
    finally:
        for sock in idle:
            sock.close()


def test_the_files_of_a_template_are_read_once(own_templates, make_server):
    folder, add = own_templates
    add('heavy', 'COPY blob /blob')
    (folder / 'heavy' / 'blob').write_bytes(os.urandom(30 * 2**20))
    server = make_server(TEMPLATES_DIR=str(folder))

    def bytes_read():
        with open(f'/proc/{server.process.pid}/io') as file:
            return int(file.readline().split()[1])
    server.get('/api/templates')
    before = bytes_read()
    for _ in range(10):
        server.get('/health')
        server.get('/api/templates')
    assert bytes_read() - before < 10 * 2**20

    def tag():
        return next(item['image'] for item in server.get('/api/templates') if item['name'] == 'heavy')
    old = tag()
    (folder / 'heavy' / 'blob').write_bytes(base64.b64encode(os.urandom(1000)))
    server.until(lambda: tag() != old)


def test_a_large_template_takes_no_memory(own_templates, make_server):
    folder, add = own_templates
    add('heavy', 'COPY blob /blob')
    subprocess.run(['truncate', '-s', '300M', folder / 'heavy' / 'blob'], check=True)
    server = make_server(TEMPLATES_DIR=str(folder))
    assert server.running('work', template='heavy')['status'] == 'running'
    with open(f'/proc/{server.process.pid}/status') as file:
        peak = next(int(line.split()[1]) for line in file if line.startswith('VmHWM'))
    assert peak < 200_000  # kB


def test_a_clock_that_is_set_ends_no_task_and_deletes_nothing(start_agents, tmp_path):
    """The clock of the server alone is set, by a library that stands between it and the system."""
    clock = tmp_path / 'clock'
    clock.write_text('+0')
    library = next(Path('/usr/lib').glob('*/faketime/libfaketime.so.1'))
    server = start_agents('work', LD_PRELOAD=str(library), FAKETIME_TIMESTAMP_FILE=str(clock),
                          FAKETIME_NO_CACHE='1', FAKETIME_DONT_FAKE_MONOTONIC='1',
                          DONT_FAKE_MONOTONIC='1')
    server.running('agent', type='agent', ttl=60)
    begin(server, '!sleep 4; echo \'' + LAST_WORD + "'", sessionId='s', timeout=20)
    clock.write_text('+10d')
    time.sleep(2.5)  # two sweeps
    clock.write_text('-10d')
    assert ended(server, 's')['state'] == 'completed'
    assert server.get('/api/agent/sessions/s')['runs'][0]['durationMs'] < 60_000
    clock.write_text('+10d')
    time.sleep(2.5)
    assert [item['name'] for item in server.get('/api/workspaces')] == ['work', 'agent']
    assert 'The clock was set' in server.log.read_text()


# What a program prints, or a body holds, to cost much

def seconds(call):
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


@pytest.mark.parametrize('make', [
    lambda size: '-----BEGIN PRIVATE KEY-----' + '\n' * size,
    lambda size: '-----BEGIN PRIVATE KEY----- ' * (size // 28),
    lambda size: '-----BEGIN ' + 'A ' * (size // 2) + 'PRIVATE KEY-----'],
    ids=['lines', 'beginnings', 'words'])
def test_a_key_that_is_none_costs_no_more_than_its_length(make):
    def parse(size):
        with pytest.raises(ValidationError):
            parse_private_key(make(size))
    assert seconds(lambda: parse(60_000)) < 100 * max(seconds(lambda: parse(6_000)), 0.001)


def test_a_line_in_many_pieces_costs_no_more_than_its_length():
    def read(count):
        RunReader(1, CommandLines()).take(b'1 O \n' * count)
    assert seconds(lambda: read(100_000)) < 50 * seconds(lambda: read(10_000))


def test_a_plan_of_many_steps_costs_no_more_than_its_length():
    def plan(count):
        lines = ClaudeLines()
        for number in range(count):
            call = {'type': 'tool_use', 'id': f'c{number}', 'name': 'TaskCreate', 'input': {'subject': 'x'}}
            lines.line(json.dumps({'type': 'assistant', 'message': {'content': [call]}}))
            answer = {'type': 'tool_result', 'tool_use_id': f'c{number}'}
            lines.line(json.dumps({'type': 'user', 'message': {'content': [answer]},
                                   'tool_use_result': {'task': {'id': number}}}))
    plan(500)
    assert seconds(lambda: plan(8000)) < 40 * seconds(lambda: plan(1000))


def test_nothing_that_claude_names_is_longer_than_a_message():
    long, lines = 'x' * 100_000, ClaudeLines()
    said = [{'type': 'system', 'subtype': 'init', 'model': long},
            {'type': 'system', 'subtype': 'api_retry', 'error': long},
            {'type': 'assistant', 'message': {'content': [
                {'type': 'tool_use', 'id': '1', 'name': long, 'input': {}},
                {'type': 'tool_use', 'id': '2', 'name': {'x': [long] * 10}, 'input': {'command': long}}]}},
            {'type': 'result', 'is_error': True, 'subtype': 'x', 'errors': [f'No conversation found {long}']}]
    told = [event for record in said for event in lines.line(json.dumps(record))]
    assert len(told) == 4 and len(json.dumps(told)) < 50_000 and len(lines.outcome.message) < 10_000


@pytest.mark.parametrize('line', [
    'workspace: setup: ' + '9' * 5000 + '/1 x', 'workspace: clone: ' + '9' * 5000 + '%',
    'workspace: setup: \u00b2/\u00b3 x', 'workspace: forward \u00b2 99999999 8443 2222'],
    ids=['step', 'percent', 'digits', 'ports'])
def test_no_line_of_a_project_breaks_its_workspace_or_its_readers(request, server, line):
    name = f'prints-{request.node.callspec.id}'
    workspace = server.running(name, env={'PRINT': f"echo '{line}'; echo the end"})
    text = server.until(lambda: 'the end' in server.call('GET', f'/api/workspaces/{name}/logs').text
                        and server.call('GET', f'/api/workspaces/{name}/logs').text, 30)
    assert line[11:40] in text and workspace['ports'] == {}
    with Sse(server, f'/api/workspaces/{name}/events') as stream:
        messages_until(stream, lambda event: event['data'].get('message') == 'the end')


def test_changes_at_once_lose_nothing_and_revoke_what_they_revoke(server, docker_client):
    server.running('changed', gitUrl='https://git.invalid/x.git', gitToken='canary', gitCredentials='keep')
    bodies = [{'env': {f'V{number}': 'x'}} for number in range(8)] + [{'gitToken': None}]
    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        answers = list(pool.map(lambda body: server.call('PATCH', '/api/workspaces/changed', body), bodies))
    assert {answer.status_code for answer in answers} == {200}
    assert server.get('/api/workspaces/changed')['env'] == [f'V{number}' for number in range(8)]
    container = server.get('/api/workspaces/changed')['containerId']
    files = 'cd /etc/agentbackend && cat git-credentials env'
    code, content = shell(docker_client, container, files, user='0')
    assert code == 0 and 'canary' not in content and content.count('export') == 8


def test_a_change_that_comes_while_the_container_is_made_is_in_it(server, docker_client):
    server.running('image')  # there is one now

    def change(number):
        server.create(f'work{number}', env={'WHEN': 'before'})
        time.sleep(number / 20)
        answer = server.call('PATCH', f'/api/workspaces/work{number}',
                             {'name': f'renamed{number}', 'env': {'WHEN': 'after'}})
        assert answer.status_code == 200
        return server.wait_status(f'renamed{number}', 'running')
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        for number, made in enumerate(pool.map(change, range(10))):
            container = docker_client.containers.get(f'{server.instance}-renamed{number}')
            assert container.id.startswith(made['containerId'])
            assert 'after' in shell(docker_client, container.id, 'cat /etc/agentbackend/env', user='0')[1]


def test_a_workspace_of_many_sessions_is_forgotten_in_one_pass(tmp_path):
    def forget(count):
        state = State(None, {'codeServer': (1, 9), 'ssh': (10, 19), 'custom': (20, 29)})
        workspace = state.reserve(Workspace(id='', name='a', folder='a', type='persistent', template='t',
                                            created_at=1, wanted_ports=[], ssh=True))
        for number in range(count):
            session = Session(id=f's{number}', workspace_id=workspace.id, agent='command', created_at=1)
            state.begin_run(session, Run(id=f'r{number}', task='x', started_at=1, timeout=1, boot=''),
                            limit=count + 1)
        return seconds(lambda: state.remove(workspace.id))
    assert forget(4000) < 40 * max(forget(400), 0.001)
