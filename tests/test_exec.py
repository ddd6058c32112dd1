"""Commands that a client runs in a workspace and waits for: what they see, what they print, how they end."""
import base64
import contextlib
import json
import os
import signal
import socket
import time

import pytest
import requests
import websocket
from agents import running, seconds_until, served_agents
from conftest import concurrently
from streaming import connect, read_head

from _agentbackend.execs import RUN


@pytest.fixture(scope='module')
def server(tmp_path_factory, agents_template, docker_client):
    with served_agents(tmp_path_factory.mktemp('exec'), agents_template[0], docker_client,
                       DEFAULT_TEMPLATE='agents', EXEC_MAX_OUTPUT='100k', EXEC_MAX_COMMANDS='50') as served:
        yield served


def execute(server, command, *, workspace='work', **fields):
    """Return the answer to a command."""
    return server.call('POST', f'/api/workspaces/{workspace}/exec', {'command': command, **fields})


def done(server, command, **fields):
    """Run a command, and return its result."""
    answer = execute(server, command, **fields)
    assert answer.status_code == 200, answer.text
    return answer.json()['data']


def streamed(server, command, *, query='', accept='text/event-stream', **fields):
    """Return the open answer of a streamed command."""
    return requests.post(f'http://127.0.0.1:{server.port}/api/workspaces/work/exec{query}',
                         json={'command': command, **fields}, headers={'Accept': accept}, stream=True,
                         timeout=60)


def events(answer):
    """Return the events of a streamed command."""
    return [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith(b'data: ')]


@contextlib.contextmanager
def sent(server, command, path='/api/workspaces/work/exec', **headers):
    """A connection on which a command has been sent."""
    body = json.dumps({'command': command}).encode()
    lines = [f'POST {path} HTTP/1.1', f'Host: localhost:{server.port}', 'Content-Type: application/json',
             f'Content-Length: {len(body)}', *(f'{name}: {value}' for name, value in headers.items())]
    with contextlib.closing(connect(server, 30)) as sock:
        sock.sendall('\r\n'.join(lines).encode() + b'\r\n\r\n' + body)
        yield sock


def until_running(server, docker_client, *words):
    server.until(lambda: running(docker_client, server.container, *words))


def until_gone(server, docker_client, *words):
    server.until(lambda: not running(docker_client, server.container, *words))


def kill(docker_client, container, words):
    """End what runs in a container by its command line."""
    rows = docker_client.api.top(container, 'axo pid,args')['Processes']
    for number in [int(row[0]) for row in rows if row[-1] == words]:
        os.kill(number, signal.SIGKILL)


def test_a_text_is_read_by_a_login_shell_of_the_workspaces_user(server):
    result = done(server, 'id -un; pwd; echo "$HOME $PROJECT_DIR $USER"; shopt login_shell; echo oops >&2; '
                          'exit 7')
    assert result['stdout'] == ('dev\n/workspace/work\n/home/dev /workspace/work dev\n'
                                'login_shell    \ton\n')
    assert result['stderr'] == 'oops\n' and result['exitCode'] == 7
    assert result['encoding'] == 'utf-8' and not result['truncated'] and not result['timedOut']
    assert 0 <= result['durationMs'] < 60_000


def test_a_list_is_a_program_with_its_arguments(server):
    result = done(server, ['printf', '%s|', 'a b', '$HOME', '', "it's", '*', 'naïve'])
    assert (result['stdout'], result['exitCode']) == ("a b|$HOME||it's|*|naïve|", 0)
    assert done(server, ['no-such-program'])['exitCode'] == 127


def test_it_has_the_environment_of_the_workspace_over_which_its_own_wins(server):
    server.call('PATCH', '/api/workspaces/work', {'env': {'FROM': 'workspace', 'OTHER': 'kept'}})
    result = done(server, 'echo "$FROM $OTHER $NEW"', env={'FROM': 'command', 'NEW': 'a "b" $c\nd'})
    assert result['stdout'] == 'command kept a "b" $c\nd\n'


def test_it_begins_in_the_folder_that_is_asked_for(server):
    done(server, 'mkdir -p "deep/er folder"')
    assert done(server, 'pwd', cwd='deep/er folder')['stdout'] == '/workspace/work/deep/er folder\n'
    assert done(server, 'pwd', cwd='/tmp')['stdout'] == '/tmp\n'
    answer = execute(server, 'pwd', cwd='nowhere')
    assert answer.status_code == 400 and answer.json()['details'][0]['path'] == 'cwd'
    done(server, 'mv work hidden', cwd='/workspace')
    answer = execute(server, 'pwd')
    done(server, 'mv hidden work', cwd='/workspace')
    assert answer.status_code == 400 and "project's folder" in answer.json()['error']


def test_it_is_given_its_input_whole_and_an_end_of_it(server):
    text = 'ä line\n' * 100_000
    assert done(server, ['md5sum'], stdin=text)['stdout'].split()[0] == done(
        server, 'printf "ä line\\n%.0s" $(seq 100000) | md5sum')['stdout'].split()[0]
    assert done(server, 'cat; echo end')['stdout'] == 'end\n'
    assert done(server, ['true'], stdin=text)['exitCode'] == 0  # it reads none of it


def test_nothing_is_left_of_an_input(server, docker_client):
    def left():
        return done(server, 'find /tmp -maxdepth 1 -type f -name "tmp.*"')['stdout']
    before = left()
    body = json.dumps({'command': 'cat >/dev/null; sleep 7501', 'stdin': 'x' * 5_000_000}).encode()
    with contextlib.closing(connect(server, 30)) as sock:
        sock.sendall(b'POST /api/workspaces/work/exec HTTP/1.1\r\nHost: localhost\r\nContent-Type: '
                     b'application/json\r\nContent-Length: %d\r\n\r\n%s' % (len(body), body))
        until_running(server, docker_client, 'sleep 7501')
        assert left() == before
    # A sender that ends in the middle of it.
    engine, words = docker_client.api, ['sh', 'word', '1000', '/', '', '-c', 'true']
    made = engine.exec_create(server.container, ['sh', '-c', RUN, *words], stdin=True, user='dev')
    sock = engine.exec_start(made['Id'], socket=True)
    sock._sock.sendall(b'x' * 10)
    server.until(lambda: running(docker_client, server.container, 'head -c 1000'))
    assert left() == before
    sock._sock.shutdown(socket.SHUT_RDWR)
    sock.close()
    until_gone(server, docker_client, 'head -c 1000')


def test_what_is_no_text_comes_as_base64(server):
    result = done(server, r"printf '\377\000a'; echo fine >&2")
    assert result['encoding'] == 'base64'
    assert base64.b64decode(result['stdout']) == b'\xff\0a'
    assert base64.b64decode(result['stderr']) == b'fine\n'


def test_what_is_too_much_is_cut_and_the_command_goes_on(server):
    result = done(server, 'yes ä | head -c 300000; echo small >&2; exit 3')
    assert result['truncated'] and result['exitCode'] == 3 and result['stderr'] == 'small\n'
    assert result['encoding'] == 'utf-8'
    assert len(result['stdout'].encode()) == 102_399 and set(result['stdout']) == {'ä', '\n'}


def test_what_looks_like_the_end_is_output(server):
    text = '\\000' * 9 + '0123456789abcdef 7\\n' + '\\000'
    assert done(server, f"printf '{text}' >&2; exit 4") | {'durationMs': 0} == {
        'exitCode': 4, 'stdout': '', 'stderr': '\0' * 9 + '0123456789abcdef 7\n\0', 'encoding': 'utf-8',
        'durationMs': 0, 'truncated': False, 'timedOut': False}


def test_a_timeout_ends_the_whole_process_group(server, docker_client):
    result = done(server, 'trap "" TERM; sleep 7101 & echo begun; sleep 7102', timeout=1)
    assert result['timedOut'] and result['exitCode'] == 137 and result['stdout'] == 'begun\n'
    until_gone(server, docker_client, 'sleep 7101', 'sleep 7102')


def test_a_client_that_leaves_ends_the_whole_process_group(server, docker_client):
    with sent(server, 'sleep 7201 & sleep 7202'):
        until_running(server, docker_client, 'sleep 7202')
    until_gone(server, docker_client, 'sleep 7201', 'sleep 7202')
    with sent(server, 'echo hi; sleep 7301 & sleep 7302', Accept='text/event-stream'):
        until_running(server, docker_client, 'sleep 7302')
    until_gone(server, docker_client, 'sleep 7301', 'sleep 7302')
    with sent(server, 'yes & yes', path='/api/workspaces/work/exec?output=raw'):
        until_running(server, docker_client, 'yes')
    until_gone(server, docker_client, 'yes')


def test_what_it_leaves_running_goes_on_and_keeps_nobody_waiting(server, docker_client):
    begun = time.monotonic()
    assert done(server, 'sleep 7401 & echo started')['stdout'] == 'started\n'
    assert time.monotonic() - begun < 30
    assert running(docker_client, server.container, 'sleep 7401')
    kill(docker_client, server.container, 'sleep 7401')


def test_its_children_can_be_interrupted(server):
    result = done(server, 'sleep 50 & kill -INT $!; wait $!; sh -c "kill -INT \\$\\$"; echo $?')
    assert result['stdout'] == '130\n'


def test_events_tell_its_output_as_it_comes_and_how_it_ended(server):
    with streamed(server, 'echo one; sleep 1; echo two >&2; exit 5') as answer:
        assert answer.headers['Content-Type'].startswith('text/event-stream')
        lines = answer.iter_lines()
        first = next(line for line in lines if line.startswith(b'data: '))
        assert json.loads(first[6:]) == {'type': 'output', 'data': {'stream': 'stdout', 'text': 'one\n'}}
        rest = [json.loads(line[6:]) for line in lines if line.startswith(b'data: ')]
    assert rest[0] == {'type': 'output', 'data': {'stream': 'stderr', 'text': 'two\n'}}
    assert rest[1]['type'] == 'exit' and rest[1]['data']['exitCode'] == 5 and len(rest) == 2
    assert rest[1]['data']['durationMs'] >= 1000 and rest[1]['data']['timedOut'] is False


def test_events_never_cut_a_character_in_two(server):
    with streamed(server, r"printf 'a\303'; sleep 0.3; printf '\244b\303'") as answer:
        found = events(answer)
    assert ''.join(event['data'].get('text', '') for event in found) == 'aäb\ufffd'


def test_events_have_no_limit(server):
    with streamed(server, 'yes | head -c 3000000') as answer:
        found = events(answer)
    assert sum(len(event['data'].get('text', '')) for event in found) == 3_000_000
    assert found[-1]['data']['exitCode'] == 0


def test_raw_output_is_the_body_and_a_header_tells_the_end_of_a_short_one(server):
    with streamed(server, r"printf '\377\000x'; echo no >&2; exit 9", query='?output=raw',
                  accept='*/*') as answer:
        assert answer.content == b'\xff\0x' and answer.headers['X-Exit-Code'] == '9'
        assert answer.headers['Content-Type'] == 'application/octet-stream'


def test_raw_output_ends_with_the_exit_status_as_a_trailer(server):
    with sent(server, 'yes | head -c 1000000; sleep 2; echo end; exit 6',
              path='/api/workspaces/work/exec?output=raw') as sock, sock.makefile('rb') as file:
        status, headers = read_head(file)
        assert status == 200 and headers['trailer'] == 'X-Exit-Code' and 'x-exit-code' not in headers
        body = b''
        while size := int(file.readline(), 16):
            body += file.read(size + 2)[:-2]
        assert len(body) == 1_000_004 and body.endswith(b'y\nend\n')
        assert file.readline() == b'X-Exit-Code: 6\r\n' and file.readline() == b'\r\n'
        sock.sendall(f'GET /health HTTP/1.1\r\nHost: localhost:{server.port}\r\n\r\n'.encode())
        assert read_head(file)[0] == 200  # the connection can be used again


def test_root_is_there_but_not_in_a_workspace_of_an_agent(server):
    assert done(server, 'id -un; echo $HOME', user='root')['stdout'] == 'root\n/root\n'
    server.running('locked', type='agent')
    answer = execute(server, 'id', workspace='locked', user='root')
    assert answer.status_code == 403 and answer.json()['code'] == 'FORBIDDEN'
    assert done(server, 'id -un', workspace='locked')['stdout'] == 'dev\n'


@pytest.mark.parametrize('body', [
    {}, {'command': ''}, {'command': []}, {'command': [1]}, {'command': 'a\0b'}, {'command': ['a\0b']},
    {'command': 'x', 'env': {'A=B': 'c'}}, {'command': 'x', 'env': {'A': 1}}, {'command': 'x', 'timeout': 0},
    {'command': 'x', 'user': 'nobody'}, {'command': 'x', 'cwd': 'a\0'}, {'command': 'x', 'surprise': 1},
    {'command': 5}])
def test_what_makes_no_sense_is_refused(server, body):
    answer = server.call('POST', '/api/workspaces/work/exec', body)
    assert answer.status_code == 400 and answer.json()['code'] == 'VALIDATION_ERROR', answer.text


def test_nothing_runs_in_a_workspace_that_is_stopped_or_not_there(server):
    assert execute(server, 'id', workspace='nowhere').json()['code'] == 'WORKSPACE_NOT_FOUND'
    server.running('resting')
    server.call('POST', '/api/workspaces/resting/stop')
    server.wait_status('resting', 'stopped')
    answer = execute(server, 'id', workspace='resting')
    assert answer.status_code == 409 and answer.json()['code'] == 'WORKSPACE_NOT_RUNNING'


def test_nothing_runs_in_a_workspace_that_is_paused(server, docker_client):
    server.running('paused')
    container = docker_client.containers.get(f'{server.instance}-paused')
    container.pause()
    answer = execute(server, 'id', workspace='paused')
    container.unpause()
    assert answer.status_code == 409 and 'paused' in answer.json()['error'], answer.text


def test_a_workspace_that_stops_meanwhile_ends_its_commands(server):
    server.running('ending')
    results = concurrently(lambda: execute(server, 'sleep 7501', workspace='ending'),
                           lambda: (time.sleep(1), server.call('POST', '/api/workspaces/ending/stop')))
    assert results[0].status_code == 200 and results[0].json()['data']['exitCode'] == 137


def test_more_commands_than_are_allowed_are_refused_and_many_at_once_answer(server):
    answers = concurrently(*[lambda number=number: execute(server, f'sleep 3; echo {number}')
                             for number in range(60)])
    assert sorted({answer.status_code for answer in answers}) == [200, 429]
    good = [answer.json()['data']['stdout'] for answer in answers if answer.status_code == 200]
    assert len(good) == len(set(good)) == 50
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.json()['code'] == 'TOO_MANY' and 'Retry-After' in refused.headers


def test_a_server_that_is_killed_takes_its_commands_along(server, docker_client):
    with sent(server, 'sleep 7601 & sleep 7602') as sock:
        until_running(server, docker_client, 'sleep 7602')
        server.kill()
        sock.settimeout(10)
        with contextlib.suppress(OSError):
            assert not sock.recv(1)
    server.start()
    until_gone(server, docker_client, 'sleep 7601', 'sleep 7602')


def test_a_server_that_stops_does_not_wait_for_commands(server, docker_client):
    with sent(server, 'sleep 7701') as sock:
        until_running(server, docker_client, 'sleep 7701')
        assert server.stop() == 0
        with contextlib.suppress(socket.timeout, OSError):
            sock.recv(1)
    server.start()
    until_gone(server, docker_client, 'sleep 7701')


# Over a WebSocket


class Talk:
    """A command over a WebSocket, as a program has it."""

    def __init__(self, server, command, **fields):
        self.socket = websocket.create_connection(
            f'ws://127.0.0.1:{server.port}/api/workspaces/work/exec/ws', timeout=30)
        self.printed, self.told, self.taken, self.sent = {1: b'', 2: b''}, [], 0, 0
        self.socket.send(json.dumps({'command': command, **fields}))

    def take(self):
        """Take a message; return whether there was one."""
        opcode, data = self.socket.recv_data()
        if opcode == websocket.ABNF.OPCODE_BINARY:
            self.printed[data[0]] += data[1:]
        elif opcode == websocket.ABNF.OPCODE_TEXT:
            self.told.append(json.loads(data))
            self.taken += self.told[-1].get('bytes', 0)
        else:
            self.closed = int.from_bytes(data[:2], 'big')
        return opcode != websocket.ABNF.OPCODE_CLOSE

    def until(self, condition):
        """Take messages until it is so."""
        while not condition():
            assert self.take(), self.told

    def send(self, data):
        """Send some of its stdin, when there is room for it."""
        self.until(lambda: self.sent - self.taken <= 2**19)
        self.socket.send_binary(data)
        self.sent += len(data)

    def end(self):
        """Return what was told at the end."""
        while self.take():
            pass
        return self.told[-1]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.shutdown()


def test_bytes_pass_both_ways_over_a_websocket(server):
    data = bytes(range(256)) * 256
    with Talk(server, 'cat; echo fine >&2; exit 7') as talk:
        for _ in range(40):
            talk.send(data)
        talk.send(b'')
        assert {**talk.end(), 'durationMs': 0} == {'type': 'exit', 'exitCode': 7, 'durationMs': 0,
                                                   'timedOut': False}
        assert talk.printed[1] == data * 40 and talk.printed[2] == b'fine\n'
        assert talk.taken == len(data) * 40 and talk.told[0] == {'type': 'ready'} and talk.closed == 1000


def test_what_is_given_with_the_command_is_all_of_its_stdin(server):
    with Talk(server, ['tr', 'a', 'b'], stdin='banana') as talk:
        assert talk.end()['exitCode'] == 0 and talk.printed[1] == b'bbnbnb'
    with Talk(server, 'cat; sleep 60', stdin='') as talk:
        talk.socket.send_binary(b'more')
        assert talk.end()['code'] == 'VALIDATION_ERROR' and talk.closed == 1007


def test_a_command_that_reads_nothing_ends_when_its_client_leaves(server, docker_client):
    with Talk(server, 'sleep 4321') as talk:
        for _ in range(30):
            talk.socket.send_binary(bytes(2**17))
        until_running(server, docker_client, 'sleep 4321')
    until_gone(server, docker_client, 'sleep 4321')
    with Talk(server, 'sleep 4322') as talk:
        until_running(server, docker_client, 'sleep 4322')
        for _ in range(33):
            talk.socket.send_binary(bytes(2**17))
        talk.end()
        assert talk.closed == 1008
    until_gone(server, docker_client, 'sleep 4322')


def test_one_that_closes_its_stdin_goes_on_and_one_that_ends_early_says_so(server):
    with Talk(server, 'exec <&-; sleep 3; echo on') as talk:
        for _ in range(60):
            talk.send(bytes(2**17))
        assert talk.end()['exitCode'] == 0 and talk.printed[1] == b'on\n'
    with Talk(server, 'head -c 5; exit 3') as talk:
        talk.socket.send_binary(b'more than that')
        assert talk.end()['exitCode'] == 3 and talk.printed[1] == b'more '


def test_what_cannot_begin_over_a_websocket_is_told(server):
    wrong = {'cwd': 'nowhere', 'detach': True, 'user': 'nobody'}
    for field, value in wrong.items():
        with Talk(server, 'true', **{field: value}) as talk:
            told = talk.end()
            assert told['code'] == 'VALIDATION_ERROR' and told['details'][0]['path'] == field, told


def test_a_server_that_dies_in_mid_stdin_leaves_nothing_and_ends_no_input(tmp_path, agents_template,
                                                                         docker_client):
    with served_agents(tmp_path, agents_template[0], docker_client, DEFAULT_TEMPLATE='agents') as own:
        with Talk(own, 'cat >partial; touch ended; sleep 4323') as talk:
            talk.send(bytes(2**17))
            talk.until(lambda: talk.taken)
            own.kill()
            assert seconds_until(lambda: not running(docker_client, own.container, 'partial')) < 10
        container = docker_client.containers.get(own.container)
        # A busy engine may lose what is printed.
        seconds_until(lambda: container.exec_run(['ls', '/workspace/work/partial']).output)
        assert b'ended' not in container.exec_run(['ls', '/workspace/work']).output.split()
