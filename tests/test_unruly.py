"""Whatever runs in a workspace may write anything where the server reads, and costs nobody else anything."""
import json
import socket
import time

import pytest
from agents import put, running, seconds_until, served_agents, shell
from streaming import connect, read_head

RUNS = '/workspace/.agentbackend/runs'
EXEC_ID = 'exec-0123456789abcdef'


@pytest.fixture(scope='module')
def server(tmp_path_factory, agents_template, docker_client):
    with served_agents(tmp_path_factory.mktemp('unruly'), agents_template[0], docker_client,
                       DEFAULT_TEMPLATE='agents', AGENT_TTL='600', REQUEST_TIMEOUT='2') as served:
        yield served


def planted(server, docker_client, text, container=None):
    """Run a command line in the folder of a detached command that nobody has begun."""
    code, said = shell(docker_client, container or server.container,
                       f'mkdir -p {RUNS}/{EXEC_ID} && cd {RUNS}/{EXEC_ID} && rm -rf * && {text}')
    assert code == 0, said


META = json.dumps({'command': 'x', 'cwd': 'y', 'startedAt': 1, 'boot': ''})


@pytest.mark.parametrize('text', (
    'echo \'{"command": "x", "cwd": "y", "startedAt": 1e300, "boot": ""}\' >meta',
    'echo \'{"command": "x", "cwd": "y", "startedAt": NaN, "boot": ""}\' >meta',
    f"echo '{META}' >meta; echo 0 a b c >exit",
    f"echo '{META}' >meta; echo 0 >exit; touch -d @9000000000 exit",
    f"echo '{META}' >meta; mkfifo keeper", f"echo '{META}' >meta; truncate -s 100G exit",
    'truncate -s 100G meta', 'mkfifo meta', 'ln -s /dev/zero meta', 'echo "[[[" >meta; mkdir exit keeper'))
def test_commands_are_listed_whatever_their_files_are(server, docker_client, text):
    planted(server, docker_client, text)
    begun = time.monotonic()
    found = [item for item in server.get('/api/workspaces/work/exec') if item['execId'] != EXEC_ID]
    assert not found and server.call('GET', '/api/workspaces/work/activity').status_code == 200
    done = server.call('POST', '/api/workspaces/work/exec', {'command': 'true', 'detach': True})
    assert done.status_code == 202 and time.monotonic() - begun < 30
    server.call('DELETE', f"/api/workspaces/work/exec/{done.json()['data']['execId']}")
    planted(server, docker_client, 'true')
    server.until(lambda: not running(docker_client, server.container, EXEC_ID))


def test_one_workspace_does_not_keep_others_from_expiring(server, docker_client):
    for name in ('first', 'second', 'third'):
        server.create(name, type='agent', ttl=8)
    ids = {name: server.wait_status(name, 'running')['containerId'] for name in ('first', 'second', 'third')}
    planted(server, docker_client, "mkfifo keeper; mkfifo exit; echo '{' >meta", ids['first'])
    put(docker_client, ids['second'], 'liar', LIAR, folder='/tmp')
    shell(docker_client, ids['second'], 'python3 /tmp/liar >/dev/null 2>&1 &')
    seconds_until(lambda: server.call('GET', '/api/workspaces/third').status_code == 404, timeout=30)
    seconds_until(lambda: all(server.call('GET', f'/api/workspaces/{name}').status_code == 404
                              for name in ids), timeout=30)
    assert server.get('/health')['problems'] == []


# A program that says what it likes where terminals are asked.
LIAR = '''
import os, socket, struct, threading
folder = f"/tmp/.agentbackend-terminals-{os.getuid()}"
os.makedirs(folder, 0o700, exist_ok=True)
listener = socket.socket(socket.AF_UNIX)
listener.bind(folder + "/liar")
listener.listen(10)
def answer(client):
    try:
        client.sendall(b"x" + struct.pack("!I", 3) + b"abc" + b'{"a": 1}\\n' * 3)
        client.recv(1000)
    finally:
        client.close()
while True:
    threading.Thread(target=answer, args=(listener.accept()[0],)).start()
'''


def test_terminals_are_listed_whatever_answers_in_their_place(server, docker_client):
    put(docker_client, server.container, 'liar', LIAR, folder='/tmp')
    docker_client.containers.get(server.container).exec_run(['python3', '/tmp/liar'], user='dev', detach=True)
    seconds_until(lambda: shell(docker_client, server.container,
                                'ls /tmp/.agentbackend-terminals-*/liar')[0] == 0)
    assert server.call('GET', '/api/workspaces/work/terminals').status_code == 200
    assert server.call('DELETE', '/api/workspaces/work/terminals/liar').status_code in (200, 404)


def test_a_command_that_knows_the_word_fools_only_itself(server):
    text = ('word=$(tr "\\0" "\\n" </proc/$PPID/cmdline | grep -xE "[0-9a-f]{16}" | head -1); '
            'for what in zz +zz "" 99999999999 "+7"; do printf "\\0%s %s\\n" "$word" "$what" >&2; done; '
            'printf "\\0%s 5\\n" "$word" >&2; echo on')
    done = server.call('POST', '/api/workspaces/work/exec', {'command': ['sh', '-c', text]})
    assert done.status_code == 200 and done.json()['data']['exitCode'] in (0, 5)


def test_what_serves_a_stopped_workspace_has_its_limits(server, docker_client):
    server.create('small', memory='512m', cpus=0.5)
    server.wait_status('small', 'running')
    server.call('POST', '/api/workspaces/small/exec', {'command': 'head -c 200000000 /dev/urandom >large'})
    server.call('POST', '/api/workspaces/small/stop')
    identity = server.wait_status('small', 'stopped')['id']
    sock = connect(server, 30)
    sock.sendall('GET /api/workspaces/small/files/large HTTP/1.1\r\n'
                 f'Host: localhost:{server.port}\r\n\r\n'.encode())
    try:
        helpers = server.until(lambda: docker_client.containers.list(
            filters={'label': f'agentbackend.helper={identity}'}))
        limits = helpers[0].attrs['HostConfig']
        assert (limits['Memory'], limits['PidsLimit'], limits['NanoCpus']) == (2**29, 4096, 5 * 10**8)
    finally:
        sock.close()


# Requests that are sent again, or come slowly, or whose client leaves

def posted(server, path, body, *more, **headers):
    """Return a connection on which a request was sent, and `more` behind it."""
    data = json.dumps(body).encode()
    lines = [f'POST {path} HTTP/1.1', f'Host: localhost:{server.port}', 'Content-Type: application/json',
             f'Content-Length: {len(data)}', *(f'{name}: {value}' for name, value in headers.items())]
    sock = connect(server, 30)
    sock.sendall('\r\n'.join(lines).encode() + b'\r\n\r\n' + data)
    return sock


def test_a_client_that_left_is_given_what_it_waited_for_when_it_asks_again(server):
    key, body = {'Idempotency-Key': 'left-1'}, {'name': 'patient', 'setup': 'sleep 2'}
    sock = posted(server, '/api/workspaces?wait=running', body, **key)
    server.until(lambda: server.call('GET', '/api/workspaces/patient').status_code == 200)
    sock.close()
    time.sleep(0.5)
    again = server.call('POST', '/api/workspaces?wait=running', body, headers=key)
    assert again.status_code == 201 and again.json()['data']['status'] == 'running'
    assert again.headers['Idempotent-Replayed'] == 'true'
    plain = server.call('POST', '/api/workspaces?wait=running', body, headers={**key, 'Accept': 'text/plain'})
    assert plain.text.strip() == again.json()['data']['id']
    # A command that was ended because its client had left has not been done.
    key = {'Idempotency-Key': 'left-2'}
    sock = posted(server, '/api/workspaces/work/exec', {'command': 'sleep 2; echo done'}, **key)
    time.sleep(1)
    sock.close()
    time.sleep(0.5)
    again = server.call('POST', '/api/workspaces/work/exec', {'command': 'sleep 2; echo done'}, headers=key)
    assert again.json()['data']['stdout'] == 'done\n'


def test_long_answers_are_not_kept_for_a_repeat(server):
    key, body = {'Idempotency-Key': 'long-1'}, {'command': 'head -c 100000 /dev/zero | tr "\\0" a'}
    first = server.call('POST', '/api/workspaces/work/exec', body, headers=key)
    assert len(first.json()['data']['stdout']) == 100_000
    again = server.call('POST', '/api/workspaces/work/exec', body, headers=key)
    assert again.status_code == 409 and 'too long' in again.json()['error']


def test_a_client_that_leaves_behind_a_next_request_is_noticed(server, docker_client):
    sock = posted(server, '/api/workspaces/work/exec', {'command': 'sleep 4101'})
    server.until(lambda: running(docker_client, server.container, 'sleep 4101'))
    sock.sendall(b'GET / HTTP/1.1\r\n')
    time.sleep(0.5)
    assert running(docker_client, server.container, 'sleep 4101')
    sock.close()
    seconds_until(lambda: not running(docker_client, server.container, 'sleep 4101'), timeout=10)


def test_a_slow_upload_is_taken_as_long_as_something_comes(server):
    sock = connect(server, 30)
    sock.sendall(f'PUT /api/workspaces/work/files/slow HTTP/1.1\r\nHost: localhost:{server.port}\r\n'
                 'Content-Length: 40\r\n\r\n'.encode())
    for _ in range(8):
        sock.sendall(b'slow!')
        time.sleep(0.5)
    with sock.makefile('rb') as answer:
        assert read_head(answer)[0] == 201
    sock.shutdown(socket.SHUT_RDWR)


def test_many_who_wait_cost_nothing(server):
    path = '/api/workspaces/patient?wait=stopped&timeout=60'
    sockets = [posted(server, path.replace('?', '/start?'), {}) for _ in range(300)]
    time.sleep(1)
    before = cpu_seconds(server)
    time.sleep(3)
    assert cpu_seconds(server) - before < 1  # 300 who look twenty times a second take it all
    for sock in sockets:
        sock.close()


def cpu_seconds(server):
    """Return how long the server's process was at work."""
    with open(f'/proc/{server.process.pid}/stat') as file:
        return sum(map(int, file.read().rpartition(')')[2].split()[11:13])) / 100
