"""Terminals: what is typed and printed passes both ways, and they outlive client and server."""
import json
import time

import pytest
import websocket
from agents import running, seconds_until, served_agents


@pytest.fixture(scope='module')
def server(tmp_path_factory, agents_template, docker_client):
    with served_agents(tmp_path_factory.mktemp('terminal'), agents_template[0], docker_client,
                       DEFAULT_TEMPLATE='agents', MAX_TERMINALS='6') as served:
        yield served


class Client:
    """A terminal as a program has it that is not a browser."""

    def __init__(self, server, query='', *, workspace='work', **options):
        self.socket = websocket.create_connection(
            f'ws://127.0.0.1:{server.port}/api/workspaces/{workspace}/terminal{query}', timeout=20, **options)
        self.seen, self.told = b'', []

    def take(self):
        """Take a message; return whether there was one."""
        opcode, data = self.socket.recv_data()
        if opcode == websocket.ABNF.OPCODE_BINARY:
            self.seen += data
        elif opcode == websocket.ABNF.OPCODE_TEXT:
            self.told.append(json.loads(data))
        elif opcode == websocket.ABNF.OPCODE_CLOSE:
            self.closed = int.from_bytes(data[:2], 'big')
            return False
        return True

    def until(self, text):
        """Wait until something is printed; return all that was."""
        while text not in self.seen:
            assert self.take(), (self.seen[-500:], self.told)
        return self.seen

    def until_end(self):
        """Wait for the end, and return what was told."""
        while self.take():
            pass
        return self.told

    def type(self, text):
        self.socket.send_binary(text)

    def resize(self, cols, rows):
        self.socket.send(json.dumps({'type': 'resize', 'cols': cols, 'rows': rows}))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.shutdown()


def names(server):
    return [item['name'] for item in server.get('/api/workspaces/work/terminals')]


def end(server, name):
    return server.call('DELETE', f'/api/workspaces/work/terminals/{name}')


def test_it_is_a_shell_of_the_workspaces_user(server):
    with Client(server, '?name=shell&cols=100&rows=30') as client:
        client.type(b'echo "$(id -un) $PWD $TERM $(tty)"; stty size\n')
        client.until(b'dev /workspace/work xterm-256color /dev/pts/')
        client.until(b'30 100\r\n')
        assert client.told == [{'type': 'ready', 'name': 'shell'}]
        client.resize(120, 40)
        client.type(b'stty size\n')
        client.until(b'40 120\r\n')
        client.type(b'exit 7\n')
        assert client.until_end()[1:] == [{'type': 'exit', 'exitCode': 7}] and client.closed == 1000
    assert 'shell' not in names(server)


def test_control_keys_reach_the_program(server, docker_client):
    with Client(server, '?name=keys') as client:
        client.type(b'sleep 9101; echo "it was $?"\n')
        seconds_until(lambda: running(docker_client, server.container, 'sleep 9101'))
        client.type(b'\x03')
        client.type(b'echo "then $?"\n')
        client.until(b'then 130')
        client.type('echo grüezi\n'.encode())
        client.until('\rgrüezi\r\n'.encode())
    assert end(server, 'keys').json()['data'] == {'name': 'keys', 'deleted': True}


def test_the_same_name_finds_it_again_with_what_it_has_printed(server, docker_client):
    with Client(server, '?name=again') as client:
        client.type(b'for n in $(seq 5); do echo "number $n"; done; sleep 9201\n')
        client.until(b'number 5\r\n')
    seconds_until(lambda: running(docker_client, server.container, 'sleep 9201'))
    server.kill()
    server.start()
    found = server.get('/api/workspaces/work/terminals')
    assert [item['clients'] for item in found if item['name'] == 'again'] == [0]
    with Client(server, '?name=again') as client, Client(server, '?name=again') as other:
        assert b'number 1\r\n' in client.until(b'number 5\r\n')
        client.type(b'\x03')
        client.type(b'echo still $((40 + 2))\n')
        client.until(b'still 42')
        other.until(b'still 42')
        assert [item['clients'] for item in server.get('/api/workspaces/work/terminals')
                if item['name'] == 'again'] == [2]
    assert end(server, 'again').status_code == 200
    assert not running(docker_client, server.container, 'sleep 9201')


def test_much_is_printed_whole_and_its_last_part_is_kept(server):
    with Client(server, '?name=much') as client:
        client.type(b'stty -echo; seq 200000; echo e""nd\n')
        seen = client.until(b'\r\nend\r\n')
        lines = seen.replace(b'\r', b'').split(b'\n')
        wanted = b'\n'.join(b'%d' % number for number in range(1, 200_001))
        assert wanted in b'\n'.join(lines)
    with Client(server, '?name=much') as client:
        seen = client.until(b'\r\nend\r\n')
        assert 200_000 < len(seen) < 300_000 and b'\r\n199999\r\n' in seen
    end(server, 'much')


def test_a_long_text_can_be_pasted(server):
    with Client(server, '?name=paste') as client:
        client.type(b'stty -echo; cat >pasted\n')
        time.sleep(1)
        client.type(b'x' * 70 + b'\n' + b'0123456789' * 3 + b'\n' + (b'y' * 99 + b'\n') * 2000)
        client.type(b'\x04')
        client.type(b'wc -c <pasted\n')
        client.until(b'200102')
    end(server, 'paste')


def test_a_command_takes_the_place_of_the_shell_and_a_slow_reader_costs_nobody_else(server):
    with Client(server, '?name=flood&command=yes') as client:
        client.until(b'y\r\n')
        assert server.get('/health')['docker'] == 'connected'  # although nobody reads on here
        found = server.get('/api/workspaces/work/terminals')
        assert [item['command'] for item in found if item['name'] == 'flood'] == ['yes']
        assert end(server, 'flood').status_code == 200
    assert 'flood' not in names(server)


def test_what_makes_no_sense_is_refused(server):
    answer = server.call('GET', '/api/workspaces/work/terminal')
    assert answer.status_code == 426
    assert end(server, 'nope').json()['code'] == 'TERMINAL_NOT_FOUND'
    for query, code in (('?name=a/b', 'VALIDATION_ERROR'), ('?cols=0', 'VALIDATION_ERROR'),
                        ('?surprise=1', 'VALIDATION_ERROR')):
        with Client(server, query) as client:
            assert client.until_end()[-1]['code'] == code and client.closed == 1008
    with Client(server, workspace='nowhere') as client:
        assert client.until_end()[-1]['code'] == 'WORKSPACE_NOT_FOUND'
    with Client(server, '?name=wrong') as client:
        client.socket.send('{"type": "nonsense"}')
        assert client.until_end()[-1]['code'] == 'VALIDATION_ERROR' and client.closed == 1007
    end(server, 'wrong')


def test_there_may_be_only_so_many(server):
    for item in names(server):
        end(server, item)
    clients = [Client(server, f'?name=t{number}') for number in range(6)]
    for number, client in enumerate(clients):
        client.type(b'echo h""i\n')
        client.until(b'hi\r\n')
        assert f't{number}' in names(server)
    with Client(server, '?name=t6') as client:
        assert client.until_end()[-1]['code'] == 'TOO_MANY'
    kinds = [item['kind'] for item in server.get('/api/workspaces/work/activity')['reasons']]
    assert kinds == ['terminal'] * 6
    for number, client in enumerate(clients):
        client.socket.shutdown()
        assert end(server, f't{number}').status_code == 200
    assert names(server) == []


def test_a_stranger_gets_no_terminal_and_a_ticket_opens_one(make_server, agents_template):
    server = make_server(API_TOKEN='secret', TEMPLATES_DIR=str(agents_template[0]), DEFAULT_TEMPLATE='agents',
                         connected=False)
    server.headers = {'Authorization': 'Bearer secret'}
    server.until(lambda: server.get('/health')['docker'] == 'connected')
    server.running('work')
    for query, options in (('', {}), ('?ticket=wrong', {}), ('', {'header': ['Authorization: Bearer no']})):
        with pytest.raises(websocket.WebSocketBadStatusException) as refused:
            Client(server, query, **options)
        assert refused.value.status_code == 401
    with pytest.raises(websocket.WebSocketBadStatusException) as refused:
        Client(server, header=['Authorization: Bearer secret'], origin='https://evil.example')
    assert refused.value.status_code == 403
    with Client(server, header=['Authorization: Bearer secret']) as client:
        client.type(b'echo o""k\n')
        client.until(b'ok\r\n')
    ticket = server.call('POST', '/api/tickets').json()['data']['ticket']
    with Client(server, f'?ticket={ticket}') as client:
        client.until(b'ok\r\n')
    with pytest.raises(websocket.WebSocketBadStatusException):
        Client(server, f'?ticket={ticket}')
