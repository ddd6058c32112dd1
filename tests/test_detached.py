"""Detached commands: whatever becomes of client, server and workspace, what they print is whole."""
import hashlib
import time

import pytest
import requests
from agents import running, seconds_until, served_agents, shell
from streaming import connect, read_head


@pytest.fixture(scope='module')
def server(tmp_path_factory, agents_template, docker_client):
    with served_agents(tmp_path_factory.mktemp('detached'), agents_template[0], docker_client,
                       DEFAULT_TEMPLATE='agents', EXEC_MAX_COMMANDS='20') as served:
        yield served


def begin(server, command, *, workspace='work', **fields):
    """Begin a detached command, and return what describes it."""
    answer = server.call('POST', f'/api/workspaces/{workspace}/exec',
                         {'command': command, 'detach': True, **fields})
    assert answer.status_code == 202, answer.text
    assert answer.headers['Location'].endswith(answer.json()['data']['execId'])
    return answer.json()['data']


def path(begun, rest='', workspace='work'):
    return f"/api/workspaces/{workspace}/exec/{begun['execId']}{rest}"


def ended(server, begun, workspace='work'):
    """Wait until a command has ended, and return what describes it."""
    def look():
        found = server.get(path(begun, workspace=workspace))
        return found if found['state'] != 'running' else None
    return server.until(look)


def output(server, begun, query='', workspace='work'):
    answer = requests.get(f'http://127.0.0.1:{server.port}{path(begun, "/output", workspace)}{query}',
                          timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.content


def test_it_answers_at_once_and_tells_later_how_it_ended(server):
    begun = begin(server, 'echo out; echo err >&2; cat; exit 3', stdin='given', env={'A': 'b'}, cwd='/tmp')
    assert begun['state'] == 'running' and begun['exitCode'] is None and begun['cwd'] == '/tmp'
    found = ended(server, begun)
    assert found['state'] == 'ended' and found['exitCode'] == 3 and found['endedAt']
    assert found['command'] == 'echo out; echo err >&2; cat; exit 3'
    assert output(server, begun, '?stream=stdout') == b'out\ngiven'
    assert output(server, begun, '?stream=stderr') == b'err\n'
    assert sorted(output(server, begun)) == sorted(b'out\nerr\ngiven')
    assert output(server, begun, '?stream=stdout&after=4') == b'given'
    assert begun['execId'] in [item['execId'] for item in server.get('/api/workspaces/work/exec')]


def test_its_output_is_what_it_printed_byte_by_byte(server):
    script = r"printf 'a\nb'; printf '\377\000\n\n'; head -c 200000 /dev/zero; printf 'end'"
    begun = begin(server, script)
    ended(server, begun)
    assert output(server, begun, '?stream=stdout') == b'a\nb\xff\0\n\n' + bytes(200_000) + b'end'


def test_a_list_of_words_and_the_environment_reach_it(server):
    begun = begin(server, ['sh', '-c', 'printf "%s|" "$@" "$NEW" "$PWD" "$(id -un)"', 'sh', 'a b', ''],
                  env={'NEW': 'x'})
    ended(server, begun)
    assert output(server, begun) == b'a b||x|/workspace/work|dev|'


def test_it_is_followed_as_it_comes(server):
    begun = begin(server, 'for n in 1 2 3; do echo line $n; sleep 1; done')
    with requests.get(f'http://127.0.0.1:{server.port}{path(begun, "/output")}?follow', stream=True,
                      timeout=30) as answer:
        lines = answer.iter_lines(chunk_size=1)
        assert next(lines) == b'line 1'
        assert server.get(path(begun))['state'] == 'running'
        assert list(lines) == [b'line 2', b'line 3']
    assert ended(server, begun)['exitCode'] == 0


def test_a_follower_that_leaves_costs_nothing(server, docker_client):
    begun = begin(server, 'echo begun; sleep 8101')
    with connect(server) as sock, sock.makefile('rb') as file:
        sock.sendall(f'GET {path(begun, "/output")}?follow=true HTTP/1.1\r\nHost: localhost:{server.port}\r\n'
                     '\r\n'.encode())
        assert read_head(file)[0] == 200
        seconds_until(lambda: running(docker_client, server.container, 'tail -c'))
    seconds_until(lambda: not running(docker_client, server.container, 'tail -c'))
    assert server.get(path(begun))['state'] == 'running'
    server.call('DELETE', path(begun))


def test_a_signal_reaches_all_that_it_has_started(server, docker_client):
    begun = begin(server, 'trap "echo caught; exit 9" USR1; sleep 8201 & while :; do wait; done')
    seconds_until(lambda: running(docker_client, server.container, 'sleep 8201'))
    assert server.call('POST', path(begun, '/signal'), {'signal': 'USR1'}).status_code == 200
    assert ended(server, begun)['exitCode'] == 9
    assert output(server, begun) == b'caught\n'
    assert not running(docker_client, server.container, 'sleep 8201')
    assert server.call('POST', path(begun, '/signal'), {'signal': 'TERM'}).status_code == 200
    assert server.call('POST', path(begun, '/signal'), {'signal': 'NOPE'}).status_code == 400


def test_deleting_it_ends_it_and_leaves_nothing(server, docker_client):
    begun = begin(server, 'sleep 8301 & sleep 8302')
    seconds_until(lambda: running(docker_client, server.container, 'sleep 8302'))
    assert server.call('DELETE', path(begun)).json()['data'] == {'execId': begun['execId'], 'deleted': True}
    assert not running(docker_client, server.container, 'sleep 8301', 'sleep 8302')
    for method, rest in (('GET', ''), ('GET', '/output'), ('DELETE', '')):
        answer = server.call(method, path(begun, rest))
        assert answer.status_code == 404 and answer.json()['code'] == 'EXEC_NOT_FOUND'
    assert shell(docker_client, server.container, f"ls -d /workspace/.agentbackend/runs/{begun['execId']}")[0]


def test_a_timeout_ends_it(server):
    begun = begin(server, 'echo begun; sleep 8401', timeout=1)
    assert ended(server, begun)['exitCode'] == 124
    assert output(server, begun) == b'begun\n'


@pytest.mark.parametrize('name', ['...', 'exec-*', 'exec-0', 'run-0000000000000000', 'exec-0000000000000000'])
def test_what_is_no_command_is_not_found(server, name):
    answer = server.call('GET', f'/api/workspaces/work/exec/{name}')
    assert answer.status_code == 404, answer.text


def test_its_output_is_whole_after_ten_kills_of_the_server(server):
    begun = begin(server, 'for n in $(seq 1 3000); do echo "line $n of many"; '
                          '[ $((n % 50)) != 0 ] || sleep 0.2; done')
    for _ in range(10):
        server.kill()
        server.start()
    assert ended(server, begun)['exitCode'] == 0
    wanted = b''.join(b'line %d of many\n' % number for number in range(1, 3001))
    for query in ('', '?follow', f'?after={len(wanted) - 10}'):
        found = output(server, begun, query)
        assert hashlib.sha256(found).digest() == hashlib.sha256(
            wanted[-10:] if 'after' in query else wanted).digest()


def test_it_is_there_when_its_workspace_is_stopped_and_says_that_it_was_interrupted(server, docker_client):
    server.running('halted')
    done = begin(server, 'echo whole', workspace='halted')
    ended(server, done, workspace='halted')
    cut = begin(server, 'echo begun; sleep 8501', workspace='halted')
    server.until(lambda: output(server, cut, workspace='halted') == b'begun\n')
    server.call('POST', '/api/workspaces/halted/stop')
    server.wait_status('halted', 'stopped')
    found = {item['execId']: item for item in server.get('/api/workspaces/halted/exec')}
    assert found[done['execId']]['exitCode'] == 0 and found[cut['execId']]['state'] == 'interrupted'
    assert output(server, done, workspace='halted') == b'whole\n'
    assert output(server, cut, '?follow', workspace='halted') == b'begun\n'
    assert server.call('DELETE', path(done, workspace='halted')).status_code == 200
    assert [item['execId'] for item in server.get('/api/workspaces/halted/exec')] == [cut['execId']]
    refused = server.call('POST', '/api/workspaces/halted/exec', {'command': 'id', 'detach': True})
    assert refused.status_code == 409
    helpers = docker_client.api.containers(all=True, filters={'label': [
        'agentbackend.helper', f'agentbackend.instance={server.instance}']})
    assert not helpers
    server.call('DELETE', '/api/workspaces/halted')


def test_what_makes_no_sense_is_refused(server):
    for fields in ({'user': 'root'}, {'timeout': -1}):
        answer = server.call('POST', '/api/workspaces/work/exec', {'command': 'id', 'detach': True, **fields})
        assert answer.status_code == 400, answer.text
    begun = begin(server, 'pwd', cwd='nowhere')
    assert ended(server, begun)['exitCode'] == 126
    assert b'nowhere' in output(server, begun, '?stream=stderr')


def test_there_may_be_only_so_many(server):
    begun = [begin(server, f'sleep 86{number}') for number in range(20)]
    time.sleep(1)
    answer = server.call('POST', '/api/workspaces/work/exec', {'command': 'id', 'detach': True})
    assert answer.status_code == 429 and answer.json()['code'] == 'TOO_MANY', answer.text
    for item in begun:
        server.call('DELETE', path(item))
