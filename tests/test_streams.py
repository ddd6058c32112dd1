"""SSE and WebSocket clients of workspaces on the real engine."""
import contextlib
import json
import os
import re
import time

import gevent
import pytest
import requests
from conftest import Served, remove_objects
from helpers import give_records, in_container, kept, memory_of, same_mounts, state_path
from readers import Readers
from streaming import PING, Sse, Ws, has_text, messages_until, statuses, texts

TOKEN = 'hush-0123456789-hush'
PATIENCE = 4  # seconds, on two cores
# With these a process gives back what it needs no more, so that its size tells what it needs.
EXACT_SIZE = {'PYTHONMALLOC': 'malloc', 'MALLOC_TRIM_THRESHOLD_': '65536', 'MALLOC_TOP_PAD_': '0',
              'MALLOC_ARENA_MAX': '1'}
# A workspace prints what is put into this file, and goes on when it is put there again.
LISTEN = 'mkfifo /say; while :; do cat /say; done &'


def listening(server, name, **fields):
    """Make a workspace that prints what `say` tells it to."""
    workspace = server.running(name, env={'PRINT': LISTEN})
    return workspace['id']


def say(client, server, name, command):
    """Let a workspace print what a shell command prints."""
    in_container(client, server, name,
                 f'while [ ! -p /say ]; do usleep 10000; done; {{ {command}\n}} >/say')


def events(server, workspace, query='', **options):
    return Sse(server, f'/api/workspaces/{workspace}/events{query}', **options)


def subscribed(server, workspace, *, buffer=None, timeout=10, **fields):
    """Return a WebSocket that has asked for a workspace."""
    stream = Ws(server, timeout=timeout, receive_buffer=buffer)
    stream.send(type='subscribe', workspaceId=workspace, **fields)
    return stream


def follow(server, kind, workspace, *, after=None, tail=None, **options):
    """Follow a workspace over SSE or WebSocket."""
    if kind == 'sse':
        return events(server, workspace, '' if tail is None else f'?tail={tail}', after=after, **options)
    return subscribed(server, workspace, **({'after': after} if after else {}),
                      **({} if tail is None else {'tail': tail}), **options)


both = pytest.mark.parametrize('kind', ['sse', 'ws'])


def is_status(status):
    return lambda message: message['type'] == 'status' and message['data']['status'] == status


def both_of(stream, status):
    """Return what comes until a container has said that it is up, and its workspace has a status, whichever
    is first."""
    found = []
    while 'workspace: started in tiny' not in texts(found) or status not in statuses(found):
        found.append(next_of(stream))
    return found


def next_of(stream, count=1):
    found = [message for _, message in zip(range(count), stream, strict=False)]
    assert len(found) == count, 'the stream has ended'
    return found[0] if count == 1 else found


def streams_of(server):
    """Return how many sockets the server has open."""
    def is_socket(number):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            return os.readlink(f'/proc/{server.process.pid}/fd/{number}').startswith('socket:')
    return sum(is_socket(number) is True for number in os.listdir(f'/proc/{server.process.pid}/fd'))


@pytest.fixture(scope='module')
def printer(server):
    """A workspace that has printed 250 numbered lines and prints no more."""
    workspace = server.running('printer',
                               env={'PRINT': 'n=0; while [ $n -lt 250 ]; do echo line $n; n=$((n+1)); done'})
    server.until(lambda: 'line 249' in server.call('GET', '/api/workspaces/printer/logs').text)
    return workspace['id']


@pytest.fixture(scope='module')
def talker(server):
    """A workspace that prints what it is told."""
    return listening(server, 'talker')


@pytest.fixture(scope='module', autouse=True)
def quiet(server, printer):
    """How long it takes until something comes over quiet streams; watched while the other tests run, since it
    takes its time."""
    def beat(path):
        with Sse(server, path, timeout=80) as stream:
            begun = time.monotonic()
            next(line for line in stream.lines() if line.startswith(b': still here'))
            return time.monotonic() - begun

    def ping():
        with subscribed(server, printer, timeout=80, tail=0) as stream:
            begun = time.monotonic()
            while stream.read_frame()[0] != PING:
                pass
            return time.monotonic() - begun

    def busy():
        server.running('ticker', env={'PRINT': 'while :; do echo tick; usleep 200000; done &'})
        with subscribed(server, 'ticker', timeout=80, tail=0) as stream:
            begun = time.monotonic()
            while stream.read_frame()[0] != PING:
                pass
            return time.monotonic() - begun

    def mute():
        with subscribed(server, printer, timeout=80, tail=0) as stream:
            begun = time.monotonic()
            with contextlib.suppress(ConnectionError):
                while True:
                    stream.read_frame()
            return time.monotonic() - begun

    return {'events': gevent.spawn(beat, f'/api/workspaces/{printer}/events?tail=0'),
            'session': gevent.spawn(beat, '/agent/sse/quiet'),
            'ping': gevent.spawn(ping), 'busy': gevent.spawn(busy), 'mute': gevent.spawn(mute)}


# What a client is told first, and then


@both
def test_the_first_message_is_the_status_at_once(server, printer, kind):
    with follow(server, kind, printer) as stream:
        first = next_of(stream)
        assert (first['type'], first['workspaceId']) == ('status', printer)
        assert first['data'] == {'status': 'running', 'name': 'printer'}
        assert first['id'] and 'sessionId' not in first
        assert re.fullmatch(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z', first['timestamp'])


@both
def test_then_come_the_last_lines_and_as_many_as_were_wanted(server, printer, kind):
    for tail, wanted in ((None, 100), (7, 7), (1, 1), (100000, 251)):
        with follow(server, kind, printer, tail=tail) as stream:
            told = texts(next_of(stream, wanted + 1))
            assert told[-min(wanted, 250):] == [f'line {number}' for number in range(250)][-wanted:], tail
            assert len(told) == wanted
    with follow(server, 'sse', printer, tail=3) as stream:
        assert {message['data']['stream'] for message in next_of(stream, 4)[1:]} == {'stdout'}


@both
def test_what_is_printed_comes_live_and_in_order(server, docker_client, talker, kind):
    with follow(server, kind, talker, tail=0) as stream:
        assert statuses([next_of(stream)]) == ['running']
        say(docker_client, server, 'talker', 'for n in 1 2 3 4 5; do echo live $n; done; echo end')
        told = texts(messages_until(stream, has_text('end')))
        assert told == [*(f'live {number}' for number in range(1, 6)), 'end']


@both
def test_both_streams_are_told_apart(server, docker_client, kind):
    server.running(f'apart-{kind}', env={'PRINT': 'echo to err >&2; echo last'})
    with follow(server, kind, f'apart-{kind}') as stream:
        lines = {message['data']['message']: message['data']['stream'] for message in next_of(stream, 4)
                 if message['type'] == 'log'}
    assert lines == {'workspace: started in tiny': 'stdout', 'to err': 'stderr', 'last': 'stdout'}


def test_a_name_will_do_and_the_messages_have_the_id(server, printer):
    with subscribed(server, 'printer') as stream:
        assert next_of(stream)['workspaceId'] == printer


# Coming back


@both
def test_who_comes_back_with_an_id_has_what_was_missed_and_nothing_twice(server, docker_client, talker, kind):
    with follow(server, kind, talker, tail=0) as stream:
        next_of(stream)
        say(docker_client, server, 'talker', f'echo {kind} a; echo {kind} b')
        seen = messages_until(stream, has_text(f'{kind} b'))[-1]['id']
    say(docker_client, server, 'talker', f'for n in $(seq 300); do echo {kind} $n; done; echo {kind} z')
    for _ in range(2):
        with follow(server, kind, talker, after=seen) as stream:
            told = messages_until(stream, has_text(f'{kind} z'))
            assert statuses(told) == ['running'] and told[0]['type'] == 'status'
            assert texts(told) == [f'{kind} {number}' for number in range(1, 301)] + [f'{kind} z']


@both
def test_the_first_id_of_a_silent_workspace_is_enough_to_miss_nothing(make_server, docker_client, kind):
    server, name = make_server(), 'silent'
    listening(server, name)
    with follow(server, kind, name, tail=0) as stream:
        seen = next_of(stream)['id']
    say(docker_client, server, name, 'for n in $(seq 150); do echo $n; done')
    server.kill()
    server.start()
    with follow(server, kind, name, after=seen) as stream:
        assert texts(messages_until(stream, has_text('150'))) == [str(number) for number in range(1, 151)]


def test_the_query_goes_before_the_header(server, printer):
    with events(server, printer, '?tail=3') as stream:
        ids = [message['id'] for message in next_of(stream, 4)]
    with events(server, printer, f'?after={ids[2].replace("+", "%2B")}', after=ids[1]) as stream:
        assert texts(next_of(stream, 2)) == ['line 249']


@pytest.mark.parametrize('after', ['nonsense', '1.2', '-1.0.', '1.2.3-', 'Z.1.', '19b5e3a1c2f.7.0.'])
def test_an_id_that_is_none_is_refused(server, printer, after):
    with events(server, printer, after=after) as stream:
        assert stream.status == 400
    with subscribed(server, printer, after=after) as stream:
        assert next_of(stream)['data']['code'] == 'VALIDATION_ERROR'


@both
def test_statuses_that_were_missed_come_too(server, kind):
    server.running(f'missed-{kind}')
    with follow(server, kind, f'missed-{kind}') as stream:
        seen = next_of(stream)['id']
    server.call('POST', f'/api/workspaces/missed-{kind}/stop')
    server.wait_status(f'missed-{kind}', 'stopped')
    with follow(server, kind, f'missed-{kind}', after=seen) as stream:
        told = [next_of(stream)] + both_of(stream, 'stopped')
    assert statuses(told) == ['stopped', 'stopping', 'stopped']


# What a WebSocket client can say


def test_unsubscribe_ends_it(server, docker_client, talker):
    with subscribed(server, talker, tail=0) as stream:
        next_of(stream)
        stream.send(type='unsubscribe', workspaceId='talker')
        stream.send(type='ping')
        assert next_of(stream)['type'] == 'pong'
        say(docker_client, server, 'talker', 'echo unheard')
        time.sleep(0.3)
        stream.send(type='ping')
        assert next_of(stream)['type'] == 'pong'
        stream.send(type='unsubscribe', workspaceId='talker')  # twice is fine
        stream.send(type='ping')
        assert next_of(stream)['type'] == 'pong'


def test_subscribing_again_begins_again(server, printer):
    with subscribed(server, printer, tail=2) as stream:
        assert texts(next_of(stream, 3)) == ['line 248', 'line 249']
        stream.send(type='subscribe', workspaceId=printer, tail=1)
        assert texts(next_of(stream, 2)) == ['line 249']


def test_one_connection_follows_several(server, printer, talker):
    with subscribed(server, printer, tail=1) as stream:
        stream.send(type='subscribe', workspaceId=talker, tail=0)
        told = next_of(stream, 3)
        kinds = {(message['type'], message['workspaceId']) for message in told}
        assert kinds == {('status', printer), ('log', printer), ('status', talker)}


def test_everything_is_the_status_of_all_and_nothing_else(server, docker_client, printer, talker):
    with subscribed(server, '*') as stream:
        stream.send(type='ping')
        now = messages_until(stream, lambda message: message['type'] == 'pong')[:-1]
        assert {message['workspaceId'] for message in now} >= {printer, talker}
        assert {message['type'] for message in now} == {'status'}
        say(docker_client, server, 'talker', 'echo unheard')
        made = server.running('noticed')
        found = messages_until(stream, is_status('running'))
        assert {message['workspaceId']
                for message in found} == {made['id']} and statuses(found) == ['creating', 'running']
        server.call('DELETE', '/api/workspaces/noticed')
        last = messages_until(stream, lambda message: message['data'].get('deleted'))[-1]
        assert last['data'] == {'status': 'deleting', 'deleted': True}


def test_who_follows_everything_and_one_is_told_each_status_once(server):
    server.running('once')
    with subscribed(server, '*') as stream:
        stream.send(type='subscribe', workspaceId='once', tail=1)
        messages_until(stream, has_text('workspace: started in tiny'))
        server.call('POST', '/api/workspaces/once/stop')
        found = messages_until(stream, is_status('stopped'))
        stream.send(type='ping')
        found += messages_until(stream, lambda message: message['type'] == 'pong')
    assert statuses(found) == ['stopping', 'stopped']


@pytest.mark.parametrize(('sent', 'code'), [
    (b'{"type": "subscribe", "workspaceId": "ws-nothing"}', 'WORKSPACE_NOT_FOUND'),
    (b'{"type": "unsubscribe", "workspaceId": "ws-nothing"}', 'WORKSPACE_NOT_FOUND'),
    (b'{"type": "subscribe"}', 'VALIDATION_ERROR'),
    (b'{"type": "subscribe", "workspaceId": ""}', 'VALIDATION_ERROR'), (b'nonsense', 'VALIDATION_ERROR'),
    (b'', 'VALIDATION_ERROR'), (b'[]', 'VALIDATION_ERROR'), (b'null', 'VALIDATION_ERROR'),
    (b'{}', 'VALIDATION_ERROR'), (b'{"type": "dance"}', 'VALIDATION_ERROR'),
    (b'{"type": "ping", "extra": 1}', 'VALIDATION_ERROR'),
    (b'{"type": "subscribe", "workspaceId": "printer", "tail": -1}', 'VALIDATION_ERROR'),
    (b'{"type": "subscribe", "workspaceId": {}}', 'VALIDATION_ERROR'), (b'{"type": {}}', 'VALIDATION_ERROR'),
    (b'[' * 50_000, 'VALIDATION_ERROR')], ids=lambda value: repr(value)[:44])
def test_what_makes_no_sense_is_told_and_the_connection_stays(server, sent, code):
    with Ws(server) as stream:
        stream.send_frame(sent)
        told = next_of(stream)
        assert told['type'] == 'error' and told['data']['code'] == code and told['data']['message']
        stream.send(type='ping')
        assert next_of(stream)['type'] == 'pong'
    assert 'Internal error' not in server.log.read_text()


def test_a_connection_has_a_limit_of_subscriptions(make_server):
    """A hundred workspaces would be slow to make: their records are enough, and need no container."""
    server = make_server()
    server.stop()
    made = [{'id': f'ws-fake{number:04}', 'name': f'f{number}', 'folder': 'f', 'type': 'persistent',
             'template': 'tiny', 'created_at': 1.0, 'status': 'error',
             'error': 'made up'} for number in range(101)]
    give_records(server, *made)
    server.start()
    with Ws(server) as stream:
        for item in made:
            stream.send(type='subscribe', workspaceId=item['id'])
        refused = messages_until(stream, lambda message: message['type'] == 'error')[-1]
        assert refused['data']['code'] == 'TOO_MANY' and refused['workspaceId'] == made[100]['id']
        stream.send(type='unsubscribe', workspaceId='f0')
        stream.send(type='subscribe', workspaceId='f100')
        messages_until(stream, lambda message: message['workspaceId'] == made[100]['id']
                       and message['type'] == 'status')
        # One that was deleted counts no more.
        assert server.call('DELETE', '/api/workspaces/f1').status_code == 200
        messages_until(stream, lambda message: message['data'].get('deleted'))
        time.sleep(0.1)
        stream.send(type='subscribe', workspaceId='f0')
        assert next_of(stream)['data'] == {'status': 'error', 'name': 'f0', 'error': 'made up'}


# What an SSE client sees


def test_sse_is_as_a_browser_wants_it(server, printer):
    with events(server, printer) as stream:
        assert stream.status == 200 and stream.headers['content-type'] == 'text/event-stream; charset=utf-8'
        assert stream.headers['cache-control'] == 'no-cache' and stream.headers['x-accel-buffering'] == 'no'
        lines = stream.lines()
        assert next(lines) == b': events' and next(lines) == b'' and next(lines) == b'retry: 2000'
        for _ in range(100):
            assert next(lines).startswith(b'id: ') and next(lines).startswith(b'data: {')
            assert next(lines) == b''


def test_head_has_the_headers_and_no_body(server, printer):
    for path in (f'/api/workspaces/{printer}/events', '/agent/sse/session-yet-to-come'):
        answer = server.call('HEAD', path)
        assert answer.status_code == 200 and answer.headers['Content-Type'].startswith('text/event-stream')
        assert answer.content == b''
    assert server.call('HEAD', '/api/workspaces/nothing/events').status_code == 404


def test_a_stream_of_an_unknown_workspace_is_404(server):
    for path in ('events', 'logs', 'logs?follow=1'):
        answer = server.call('GET', f'/api/workspaces/ws-nothing/{path}')
        assert (answer.status_code, answer.json()['code']) == (404, 'WORKSPACE_NOT_FOUND')
    assert server.call('GET', '/api/workspaces/printer/events?tail=-1').status_code == 400


def test_a_session_may_be_followed_before_it_exists(server):
    with Sse(server, '/agent/sse/session-yet-to-come') as stream:
        assert stream.status == 200 and stream.headers['content-type'].startswith('text/event-stream')
        lines = stream.lines()
        assert next(lines) == b': events' and next(lines) == b''
        with pytest.raises(TimeoutError):
            stream.socket.settimeout(0.5)
            next(line for line in lines if line)


# Logs as plain text


def test_the_log_as_plain_text(server, printer):
    path = '/api/workspaces/printer/logs'
    answer = server.call('GET', path)
    assert answer.headers['Content-Type'] == 'text/plain; charset=utf-8'
    lines = [f'line {number}' for number in range(250)]
    assert answer.text.splitlines() == ['workspace: started in tiny', *lines]
    assert server.call('GET', f'{path}?tail=2').text == 'line 248\nline 249\n'
    assert server.call('GET', f'{path}?tail=0').text == ''
    with events(server, printer, '?tail=2') as stream:
        stamp = next_of(stream, 3)[1]['timestamp']
    assert server.call('GET', path, params={'since': stamp}).text.endswith('line 248\nline 249\n')
    with events(server, printer, f'?since={stamp}') as stream:
        assert next_of(stream, 2)[1]['timestamp'] == stamp
    assert server.call('GET', path, params={'since': '2100-01-01T00:00:00Z'}).text == ''
    assert server.call('GET', path, params={'since': '0'}).text.count('\n') == 251
    for since in ('nonsense', '-5', '2026-13-01T00:00:00Z'):
        assert server.call('GET', path, params={'since': since}).json()['code'] == 'VALIDATION_ERROR'


def test_the_log_can_be_followed_as_plain_text(server, docker_client, talker):
    say(docker_client, server, 'talker', 'echo before')
    with contextlib.closing(server.call('GET', '/api/workspaces/talker/logs?follow=1&tail=1',
                                        stream=True)) as answer:
        lines = answer.iter_lines()
        assert next(lines) == b'before'
        say(docker_client, server, 'talker', 'echo after')
        assert next(lines) == b'after'


def test_the_log_of_an_engine_that_is_away_is_503(server, printer, make_server):
    other = make_server()
    other.kill()
    give_records(other, kept(state_path(server))[printer])
    other.settings['DOCKER_HOST'] = f'unix://{other.folder}/no.sock'
    other.start(connected=False)
    answer = other.call('GET', f'/api/workspaces/{printer}/logs')
    assert (answer.status_code, answer.json()['code']) == (503, 'DOCKER_ERROR')
    with events(other, printer) as stream:
        assert statuses([next_of(stream)]) == ['running']
        with pytest.raises(TimeoutError):
            stream.socket.settimeout(1.5)
            next_of(stream)


def test_the_build_is_told_line_by_line(own_templates, make_server):
    folder, add_template = own_templates
    add_template('built', 'RUN echo hello from the build && sleep 1')
    server = make_server(TEMPLATES_DIR=str(folder))
    server.create('built', template='built')
    with events(server, 'built') as early, subscribed(server, 'built') as socket:
        told = [messages_until(stream, is_status('running')) for stream in (early, socket)]
    for found in told:
        assert 'hello from the build' in [message['data']['message'] for message in found
                                          if message['type'] == 'log'
                                          and message['data']['stream'] == 'build']
        assert statuses(found) == ['creating', 'running']
        assert len({(message['id'], json.dumps(message['data'])) for message in found}) == len(found)


def test_each_event_of_a_build_that_goes_on_has_an_id_behind_which_all_that_follows_comes(own_templates,
                                                                                          make_server):
    folder, add_template = own_templates
    add_template('built', 'RUN seq 101 108 && sleep 4')
    server = make_server(TEMPLATES_DIR=str(folder))
    server.create('built', template='built')
    server.until(lambda: '108' in server.call('GET', '/api/templates/built/log').text.split())
    with events(server, 'built', timeout=30) as stream:
        told = both_of(stream, 'running')
    assert [str(number) for number in range(101, 109)] == [text for text in texts(told) if len(text) == 3]
    backlog = [message for message in told if message['data'].get('stream') == 'build']
    assert len({message['id'] for message in [told[0], *backlog]}) == 1 + len(backlog)
    for number, message in enumerate(told[:len(backlog)]):
        with events(server, 'built', after=message['id']) as stream:
            assert texts(both_of(stream, 'running')) == texts(told[number + 1:]), message


# The life of a container, in one subscription


@both
def test_one_subscription_goes_on_through_restarts_and_new_containers(server, docker_client, kind):
    name = f'reborn-{kind}'
    made = server.running(name)
    with follow(server, kind, name, tail=100) as stream:
        assert texts(next_of(stream, 2)) == ['workspace: started in tiny']
        server.call('POST', f'/api/workspaces/{name}/restart')
        first = both_of(stream, 'running')
        server.call('POST', f'/api/workspaces/{name}/stop')
        second = messages_until(stream, is_status('stopped'))
        server.call('POST', f'/api/workspaces/{name}/start')
        second += both_of(stream, 'running')
        docker_client.api.restart(made['containerId'], timeout=1)
        third = messages_until(stream, has_text('workspace: started in tiny'))
        server.wait_status(name, 'running')
        docker_client.api.remove_container(made['containerId'], force=True)
        third += messages_until(stream, is_status('stopped'))
        server.call('POST', f'/api/workspaces/{name}/start')
        fourth = both_of(stream, 'running')
    assert texts(first) == ['workspace: started in tiny'] and statuses(first) == ['creating', 'running']
    assert texts(second) == ['workspace: started in tiny']
    assert statuses(second) == ['stopping', 'stopped', 'creating', 'running']
    assert texts(third) == ['workspace: started in tiny']
    assert statuses(fourth)[0] == 'creating' and statuses(fourth)[-1] == 'running'


@both
def test_deletion_is_the_last_that_is_told(server, kind):
    server.running(f'gone-{kind}')
    with follow(server, kind, f'gone-{kind}') as stream:
        messages_until(stream, has_text('workspace: started in tiny'))
        server.call('DELETE', f'/api/workspaces/gone-{kind}')
        last = messages_until(stream, lambda message: message['data'].get('deleted'))
        assert [message['data'] for message in last
                if message['type'] == 'status'][-1] == {'status': 'deleting', 'deleted': True}
        if kind == 'sse':
            assert list(stream) == []


def test_a_server_that_stops_ends_its_streams_and_they_go_on_at_the_next(make_server, docker_client):
    server = make_server()
    name = listening(server, 'talker')
    server.settings['PORT'] = str(server.port)
    with (events(server, name, '?tail=0') as sse, subscribed(server, name, tail=0) as ws,
          Sse(server, '/agent/sse/none') as session):
        next_of(sse), next_of(ws)
        say(docker_client, server, 'talker', 'echo one')
        ids = [messages_until(stream, has_text('one'))[-1]['id'] for stream in (sse, ws)]
        begun = time.monotonic()
        assert server.stop() == 0 and time.monotonic() - begun < 4
        assert list(sse) == [] and list(session) == [] and ws.closing() == (1001, 'the server is stopping')
    say(docker_client, server, 'talker', 'echo two')
    server.start()
    for kind, seen in zip(('sse', 'ws'), ids, strict=True):
        with follow(server, kind, name, after=seen) as stream:
            assert texts(messages_until(stream, has_text('two'))) == ['two']


# What is printed is what is told


@both
def test_bytes_of_all_kinds_come_through(server, docker_client, talker, kind):
    with follow(server, kind, talker, tail=0) as stream:
        next_of(stream)
        say(docker_client, server, 'talker',
            r"printf 'bad \377\376 utf\n\n \342\202\254 "
            r"\360\237\230\200\n\033[31mred\033[0m\rover\n\000nul\nid: 5\ndata: 6\n\nend\n'")
        told = texts(messages_until(stream, has_text('end')))
    assert told == ['bad \ufffd\ufffd utf', '', ' € 😀', '\x1b[31mred\x1b[0m\rover', '\0nul', 'id: 5',
                    'data: 6', '', 'end']


@both
def test_long_lines_stay_whole(server, docker_client, talker, kind):
    sizes = [16383, 16384, 16385, 32768, 100_000, 1_000_000]
    with follow(server, kind, talker, tail=0) as stream:
        next_of(stream)
        lines = ''.join(f'head -c {size} /dev/zero | tr "\\0" x; echo; ' for size in sizes)
        say(docker_client, server, 'talker',
            f'{lines} head -c 3000000 /dev/zero | tr "\\0" y; echo; echo end')
        seen, told = '', []
        for message in stream:
            told.append(message['data']['message'])
            seen = seen or message['id']
            if told[-1] == 'end':
                break
        assert [len(text) for text in told] == [*sizes, 2**20, 3]
    with follow(server, kind, talker, after=seen) as stream:
        again = texts(messages_until(stream, has_text('end')))
        assert [len(text) for text in again] == [*sizes[1:], 2**20, 3]


@both
def test_a_line_is_told_whole_though_its_reader_comes_while_it_is_written(server, docker_client, kind):
    name = f'slow-{kind}'
    listening(server, name)
    say(docker_client, server, name,
        "head -c 20000 /dev/zero | tr '\\0' a; { sleep 1.5; head -c 20000 /dev/zero | tr '\\0' b; echo; echo "
        "end; } &")
    time.sleep(0.3)
    # The engine counts the parts of a long line as lines.
    with follow(server, kind, name, tail=100) as stream:
        told = texts(messages_until(stream, has_text('end')))
    assert [(line.count('a'), line.count('b')) for line in told if line.startswith('aa')] == [(20000, 20000)]


def test_a_container_with_a_terminal_is_followed_too(server, docker_client):
    made = server.running('tty')
    inspected = docker_client.api.inspect_container(made['containerId'])
    server.call('POST', '/api/workspaces/tty/stop')
    server.wait_status('tty', 'stopped')
    docker_client.api.remove_container(made['containerId'])
    printing = "PRINT=echo one; printf 'two\\rover\\n'; echo three >&2; sleep 1; echo four"
    published = {'8443/tcp': ('127.0.0.1', made['codeServerPort']),
                 '2222/tcp': ('127.0.0.1', made['sshPort'])}
    environment = set(inspected['Config']['Env']) - {'WORKSPACE_SETTINGS=stdin'}  # nobody will say them
    own = docker_client.api.create_container(
        inspected['Image'], name=f'{server.instance}-tty', labels=inspected['Config']['Labels'], tty=True,
        environment=[*environment, printing], ports=[8443, 2222],
        host_config=same_mounts(docker_client, inspected, port_bindings=published))
    docker_client.api.start(own['Id'])
    for kind in ('sse', 'ws'):
        with follow(server, kind, 'tty', tail=100) as stream:
            told = messages_until(stream, has_text('four'))
        assert texts(told) == ['workspace: started in tiny', 'one', 'two\rover', 'three', 'four']
        with follow(server, kind, 'tty', after=told[-2]['id']) as stream:
            assert texts(messages_until(stream, has_text('four'))) == ['four']


LONG_LINES = ("text=$(head -c 40000 /dev/zero | tr '\\0' x); echo first >&2; for n in 1 2 3 4 5 6; do "
              'echo "$n $text"; done; echo between; echo "7 $text"; sleep 1; echo warning >&2; sleep 1; '
              'echo "8 $text"; echo end')


def test_tail_counts_lines_however_long_they_are_and_gives_none_without_its_beginning(server):
    workspace = server.running('wordy', env={'PRINT': LONG_LINES})

    def lines(query=''):
        return server.call('GET', f'/api/workspaces/wordy/logs{query}').text.splitlines()
    server.until(lambda: 'end' in lines())
    whole = lines()
    assert [len(line) for line in whole if line[0].isdigit()] == [40002] * 8
    assert {count: lines(f'?tail={count}') for count in range(1, len(whole) + 2)} == {
        count: whole[-count:] for count in range(1, len(whole) + 2)}
    for kind in ('sse', 'ws'):
        with follow(server, kind, workspace['id'], tail=4) as stream:
            assert texts(messages_until(stream, has_text('end'))) == whole[-4:]


SEPARATORS = '\x85 \u2028 \u2029 \x0b \x0c \x1c \x1d \x1e'


def test_readers_that_take_more_than_line_ends_for_one_get_every_event_whole(server, docker_client, talker):
    say(docker_client, server, 'talker', f"printf '%s\\n' 'odd {SEPARATORS} text' 'after it'")
    with requests.get(f'http://127.0.0.1:{server.port}/api/workspaces/{talker}/events?tail=2', stream=True,
                      timeout=10) as answer:
        answer.encoding = 'utf-8'
        told = []
        for line in answer.iter_lines(decode_unicode=True):
            if line.startswith('data: '):
                told.append(json.loads(line[6:]))
                if told[-1]['data'].get('message') == 'after it':
                    break
    assert texts(told) == [f'odd {SEPARATORS} text', 'after it']


# Slow readers, dead readers, many readers

@both
def test_a_stalled_reader_delays_nobody_and_costs_little_and_loses_nothing(make_server, docker_client, kind):
    server = make_server(constants={'wire.SEND_TIMEOUT': 120}, **EXACT_SIZE)
    talker = listening(server, 'talker')

    def flood(bursts):
        """Print lines of 1 kB in bursts; return how many."""
        burst = 'n=0; while [ $n -lt 1000 ]; do echo $text; n=$((n+1)); done; sleep 1; '
        say(docker_client, server, 'talker', f"text={'x' * 1000}; {burst * bursts}echo end")
        return 1000 * bursts + 1

    with Readers(server, talker, 99, kind) as others:
        begun = time.monotonic()
        assert [flood(2)] * 99 == others.counts()
        alone = time.monotonic() - begun
        time.sleep(1)
        before = memory_of(server)
    stalled = events(server, talker, '?tail=0', receive_buffer=4096) if kind == 'sse' else subscribed(
        server, talker, tail=0, buffer=4096)
    next_of(stalled)
    with Readers(server, talker, 99, kind) as others:
        begun = time.monotonic()
        count = flood(8)  # more than the kernel and the ring hold
        assert others.counts() == [count] * 99
        took = time.monotonic() - begun
        time.sleep(1)
        grown = memory_of(server) - before
    assert took < 4 * 2 * alone + PATIENCE, (took, alone)  # four times as much
    told = messages_until(stalled, has_text('end'))
    assert [len(text) for text in texts(told)] == [1000] * (count - 1) + [3] and len(told) == count
    say(docker_client, server, 'talker', 'echo goes on')
    messages_until(stalled, has_text('goes on'))
    stalled.close()
    assert grown < 10 * 2**20, grown


@both
def test_a_thousand_idle_clients_cost_little_and_are_forgotten_when_they_die(make_server, kind):
    server = make_server()
    server.running('idle')
    with follow(server, 'sse', 'idle', tail=1) as stream:
        next_of(stream, 2)
        sockets = streams_of(server)
    with Readers(server, 'idle', 100, kind):
        pass  # what the process needs once
    server.until(lambda: streams_of(server) < sockets + 2, 5)
    before = memory_of(server)
    with Readers(server, 'idle', 1000, kind):
        assert streams_of(server) - sockets > 990
        time.sleep(2.5)  # a writer that has nothing to write waits for a second
        each = (memory_of(server) - before) / 1000
        assert each < 30 * 1024, each
        begun = time.monotonic()
        assert server.call('GET', '/health').status_code == 200 and time.monotonic() - begun < 2
    server.until(lambda: streams_of(server) < sockets + 2, 5)


def test_one_stream_too_many_is_429(make_server):
    server = make_server(MAX_STREAMS='3')
    server.running('few')
    with (events(server, 'few') as first, subscribed(server, 'few') as second,
          Sse(server, '/agent/sse/any') as third):
        next_of(first), next_of(second), next(third.lines())
        server.until(lambda: server.call('GET', '/agent/sse/more', stream=True).status_code == 429)
        for path in ('/api/workspaces/few/events', '/api/workspaces/few/logs', '/agent/sse/more'):
            answer = server.call('GET', path)
            assert (answer.status_code, answer.json()['code']) == (429, 'TOO_MANY'), path
            assert answer.headers['Retry-After'] == '10'
            assert 'MAX_STREAMS=3' in answer.json()['error']
        with Ws(server) as refused:
            assert refused.status == 101 and refused.closing()[0] == 1013
        assert next_of(second)['type'] == 'log'
    server.until(lambda: server.call('GET', '/api/workspaces/few/logs').status_code == 200)


# Who may listen


@pytest.fixture(scope='module')
def guarded(tmp_path_factory, templates_dir, docker_client):
    """A server with an API token, and a workspace on it."""
    served = Served(tmp_path_factory.mktemp('guarded'), templates_dir, API_TOKEN=TOKEN)
    served.headers = {'Authorization': f'Bearer {TOKEN}'}
    served.start().running('secret')
    yield served
    served.stop()
    remove_objects(docker_client, served.instance)


def without_token(server):
    class Stranger:
        port, network, headers = server.port, None, {}
    return Stranger


def test_a_websocket_says_the_token_first(guarded):
    with Ws(without_token(guarded)) as stream:
        stream.send(type='auth', token=TOKEN)
        stream.send(type='subscribe', workspaceId='secret')
        assert statuses([next_of(stream)]) == ['running']


@pytest.mark.parametrize('message', [{'type': 'subscribe', 'workspaceId': 'secret'},
                                     {'type': 'subscribe', 'workspaceId': '*'}, {'type': 'ping'},
                                     {'type': 'auth', 'token': 'wrong'}, {'type': 'auth', 'token': ''}],
                                     ids=lambda message: '-'.join(message.values()))
def test_a_websocket_without_the_token_is_told_so_and_closed(guarded, message):
    with Ws(without_token(guarded)) as stream:
        stream.send(**message)
        told = next_of(stream)
        assert told['type'] == 'error' and told['data']['code'] == 'UNAUTHORIZED'
        assert TOKEN not in json.dumps(told)
        is_wrong = told['data']['message'] == "This token is not the server's API_TOKEN."
        assert is_wrong == ('token' in message)
        assert stream.closing() == (1008, 'unauthorized')


def test_a_websocket_may_show_the_token_in_its_header(guarded):
    with Ws(without_token(guarded), Authorization=f'Bearer {TOKEN}') as stream:
        stream.send(type='subscribe', workspaceId='secret')
        assert statuses([next_of(stream)]) == ['running']


def test_a_ticket_opens_one_stream(guarded):
    stranger = without_token(guarded)
    for path in ('/api/workspaces/secret/events', '/agent/sse/any', '/api/workspaces/secret/logs?tail=1'):
        with Sse(stranger, path) as stream:
            assert stream.status == 401
        answer = guarded.call('POST', '/api/tickets')
        assert answer.status_code == 201 and answer.json()['data']['expiresIn'] == 30
        path += f"{'&' if '?' in path else '?'}ticket={answer.json()['data']['ticket']}"
        with Sse(stranger, path) as stream:
            assert stream.status == 200
        with Sse(stranger, path) as stream:
            assert stream.status == 401, 'a ticket is used once'
    for ticket in ('', 'nonsense', TOKEN):
        with Sse(stranger, f'/agent/sse/any?ticket={ticket}') as stream:
            assert stream.status == 401
    assert requests.post(f'http://127.0.0.1:{guarded.port}/api/tickets', timeout=5).status_code == 401
    assert TOKEN not in guarded.log.read_text()


def test_a_ticket_opens_a_stream_and_nothing_else(guarded):
    ticket = guarded.call('POST', '/api/tickets').json()['data']['ticket']
    answer = requests.delete(f'http://127.0.0.1:{guarded.port}/api/workspaces/secret?ticket={ticket}',
                             timeout=5)
    assert answer.status_code == 401 and guarded.get('/api/workspaces/secret')['status'] == 'running'


@pytest.mark.parametrize(('headers', 'status'), [
    ({'Origin': 'https://evil.example'}, 403), ({'Origin': 'null'}, 403),
    ({'Origin': 'http://localhost:5173'}, 200), ({'Origin': 'http://127.0.0.1.evil.example'}, 403),
    ({}, 200)], ids=repr)
def test_pages_of_other_sites_hear_nothing(server, printer, headers, status):
    with events(server, printer, **headers) as stream:
        assert stream.status == status
        allowed = headers.get('Origin') if status == 200 else None
        assert stream.headers.get('access-control-allow-origin') == allowed


# What takes its time


def test_quiet_streams_have_a_heartbeat_or_a_ping(quiet):
    for name, shortest, longest in (('events', 13, 17), ('session', 13, 17), ('ping', 19, 27),
                                    ('busy', 19, 27)):
        assert shortest < quiet[name].get(timeout=30) < longest, name


def test_a_client_that_answers_no_ping_is_dropped(quiet):
    assert 58 < quiet['mute'].get(timeout=75) < 72
