"""HTTP over real sockets, on a server whose Docker engine is not there."""
import contextlib
import functools
import io
import json
import re
import signal
import socket
import time
import urllib.parse

import gevent
import gevent.select
import pytest
import requests
import webtest
from conftest import Served
from helpers import memory_of, reset_peak, run_second, seconds_of, usual
from streaming import connect

import agentbackend
from _agentbackend.errors import InstanceTaken, ValidationError

TOKEN = 'hush-0123456789-hush'
JSON = {'Content-Type': 'application/json'}
JSON_TYPE = {'Content_Type': 'application/json'}  # for request()
SERVING = ' serves http://'


def make_served(folder, **settings):
    """Return a server, not yet started, under whose DOCKER_HOST nothing is."""
    templates = folder / 'templates'
    (templates / 'tiny').mkdir(parents=True)
    (templates / 'tiny' / 'Dockerfile').write_text('# A template for tests.\nFROM scratch\n')
    return Served(folder, templates, **{'DOCKER_HOST': f'unix://{folder}/no.sock', 'REQUEST_TIMEOUT': '0.5',
                                        **settings})


@pytest.fixture
def make_server(tmp_path):
    """A function that starts servers without an engine."""
    servers = []

    def make(**settings):
        folder = tmp_path / f'server{len(servers)}'
        folder.mkdir()
        servers.append(make_served(folder, **settings))
        return servers[-1].start(connected=False)

    yield make
    for server in servers:
        if server.process.poll() is None:
            server.kill()
        print(f'--- log of {server.instance}\n' + server.log.read_text()[-8000:])


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    """An open server with a host and an origin of its own that are allowed."""
    served = make_served(tmp_path_factory.mktemp('served'), MAX_BODY='1m', ALLOWED_HOSTS='dev.example',
                         ALLOWED_ORIGINS='https://app.example/ https://Other.Example:8443')
    yield served.start(connected=False)
    served.stop()


@pytest.fixture(scope='module')
def guarded(tmp_path_factory):
    """A server with an API token."""
    served = make_served(tmp_path_factory.mktemp('guarded'), API_TOKEN=TOKEN,
                         ALLOWED_ORIGINS='https://app.example')
    yield served.start(connected=False)
    served.stop()


def read_all(sock):
    """Return what comes until the other side closes."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(65536):
            parts.append(part)
    return b''.join(parts)


def raw(server, data, timeout=5):
    """Send bytes and return all that comes until the server closes, which it must do within `timeout`."""
    with connect(server, timeout) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(data)
        return read_all(sock)


def request(method, path, *, host='localhost', body=b'', close=True, **headers):
    """Return the bytes of a request; an underscore in a header's name is a dash, and None leaves one out."""
    headers = {'Host': host, 'Connection': 'close' if close else None,
               'Content-Length': len(body) if body else None, **headers}
    lines = [f'{method} {path} HTTP/1.1', *(f"{name.replace('_', '-')}: {value}"
                                            for name, value in headers.items() if value is not None)]
    return '\r\n'.join(lines).encode('latin-1') + b'\r\n\r\n' + body


def split(answer):
    """Return (status, headers in small letters, body) of the bytes of one answer."""
    head, _, body = answer.partition(b'\r\n\r\n')
    status, *lines = head.decode('latin-1').split('\r\n')
    return int(status.split()[1]), {name.lower(): value
                                    for name, _, value in (line.partition(': ') for line in lines)}, body


def ask(server, *args, **options):
    return split(raw(server, request(*args, **options)))


def check_error(body, code):
    """See that bytes are an error in the contract's shape, and return its text."""
    error = json.loads(body)
    assert body.endswith(b'}\n')
    assert (error['success'], error['code']) == (False, code)
    assert set(error) <= {'success', 'error', 'code', 'details'}
    assert error['error'] and 'Traceback' not in error['error']
    return error['error']


def refused(answer, status, code):
    """See that a response of requests is an error in the contract's shape, and return its text."""
    assert answer.status_code == status and answer.headers['Content-Type'] == 'application/json'
    return check_error(answer.content, code)


def post(server, data, **headers):
    return server.call('POST', '/api/workspaces', data=data, headers={**JSON, **headers})


def chunked(*parts):
    return b''.join(b'%x\r\n%s\r\n' % (len(part), part) for part in (*parts, b''))


def at_once(call, *arguments):
    """Call a function with each argument, all at the same time, since each of the calls only waits."""
    gevent.joinall([gevent.spawn(call, argument) for argument in arguments], raise_error=True)


# Without an engine


def test_health_has_the_fields_of_the_contract(server):
    answer = server.call('GET', '/health')
    health = answer.json()
    assert answer.status_code == 200 and 'success' not in health
    assert (health['status'], health['docker']) == ('degraded', 'disconnected')
    assert health['version'] == agentbackend.VERSION
    assert type(health['uptime']) is int and 0 <= health['uptime'] < 600
    assert health['workspaces']['total'] == 0 and health['templates']['tiny']['state'] == 'missing'
    assert health['ports']['codeServer'] == {'used': 0, 'total': 108}


def test_create_without_an_engine_says_what_to_do_and_keeps_nothing(server):
    text = refused(server.call('POST', '/api/workspaces', {'name': 'a', 'ports': [80]}), 503, 'DOCKER_ERROR')
    assert text.startswith(f'Docker does not answer at unix://{server.folder}/no.sock (No such file')
    assert text.endswith('Start Docker, or set DOCKER_HOST.')
    assert server.call('GET', '/api/workspaces').json() == {'success': True, 'data': []}
    assert {ports['used'] for ports in server.get('/health')['ports'].values()} == {0}
    assert 'Traceback' not in server.log.read_text()


def test_the_log_says_once_that_the_engine_is_away(server):
    server.wait_for_log('Docker does not answer')
    time.sleep(2.5)  # it has looked again meanwhile
    assert server.log.read_text().count('WARNING Docker does not answer') == 1


def test_templates_are_listed_without_an_engine(server):
    listed = {item['name']: item for item in server.get('/api/templates')}
    assert listed['tiny']['default'] and listed['tiny']['description'] == 'A template for tests.'
    assert 'base' not in listed
    assert {'bun-typescript', 'node-typescript', 'python', 'blank'} <= set(listed)


# Errors in the contract's shape


def test_an_unknown_route_is_404(server):
    for path in ('/api', '/api/nothing', '/api/workspaces/', '/api/workspaces/a/nothing',
                 '/api/workspaces/a%2Fb', '/%ff', '/api/workspaces/a/../../..'):
        status, headers, body = ask(server, 'GET', path)
        assert (status, headers['content-type']) == (404, 'application/json'), path
        check_error(body, 'NOT_FOUND')


def test_an_unknown_workspace_is_404_in_the_contracts_words(server):
    for method, path in (('GET', ''), ('DELETE', ''), ('POST', '/start'), ('POST', '/stop'),
                         ('POST', '/restart')):
        for name in ('ws-abc123', 'name', '%00', "'"):
            answer = server.call(method, f'/api/workspaces/{name}{path}')
            assert answer.status_code == 404
            told = answer.json()
            given = urllib.parse.unquote(name)
            message = f"there is no workspace '{given}'; GET /api/workspaces lists them"
            assert told.pop('details') == [{'path': 'id', 'message': message}]
            assert told == {'success': False, 'error': 'Workspace not found', 'code': 'WORKSPACE_NOT_FOUND'}
    told = server.call('GET', '/api/agent/sessions/nope').json()
    assert (told['error'], told['details'][0]['message']) == (
        'Session not found', "there is no session 'nope'; GET /api/agent/sessions lists them")
    assert len(server.call('GET', f"/api/workspaces/{'x' * 5000}").text) < 300
    assert server.call('PATCH', '/api/workspaces/ws-abc123',
                       {'ttl': 5}).json()['code'] == 'WORKSPACE_NOT_FOUND'


@pytest.mark.parametrize(('method', 'path', 'allowed'),
                         [('DELETE', '/api/workspaces', {'GET', 'POST'}), ('POST', '/health', {'GET'}),
                          ('PUT', '/api/workspaces/a', {'GET', 'PATCH', 'DELETE'}),
                          ('BREW', '/health', {'GET'})])
def test_another_method_is_405_and_says_which_are_possible(server, method, path, allowed):
    answer = server.call(method, path)
    refused(answer, 405, 'METHOD_NOT_ALLOWED')
    assert allowed <= set(re.split(', ?', answer.headers['Allow']))


@pytest.mark.parametrize('media_type', ['text/plain', 'application/x-www-form-urlencoded',
                                        'multipart/form-data; boundary=x', '', None])
def test_another_media_type_is_415(server, media_type):
    headers = {} if media_type is None else {'Content_Type': media_type}
    status, _, body = ask(server, 'POST', '/api/workspaces', body=b'{"name": "a"}', **headers)
    assert status == 415 and 'application/json' in check_error(body, 'VALIDATION_ERROR')


@pytest.mark.parametrize('media_type', ['application/json; charset=utf-8', 'Application/JSON',
                                        'application/merge-patch+json'])
def test_json_by_its_other_names_is_taken(server, media_type):
    status, _, body = ask(server, 'POST', '/api/workspaces', body=b'{"name": "a b"}', Content_Type=media_type)
    assert status == 400 and json.loads(body)['details'][0]['path'] == 'name'


@pytest.mark.parametrize('data', [b'', b'{', b'nonsense', b'{"cpus": NaN}', b'\xff\xfe{}',
                                  b'{"name": "\xff"}', b'[' * 50_000, b'{"a":' * 50_000,
                                  b'"\\ud800"', b'9' * 5000], ids=lambda data: repr(data[:14]))
def test_broken_json_is_400(server, data):
    assert 'not valid JSON' in refused(post(server, data), 400, 'VALIDATION_ERROR')


@pytest.mark.parametrize('data', [b'[]', b'[{"name": "a"}]', b'null', b'"text"', b'5', b'{}',
                                  b'{"name": null}', b'{"name": "a", "extra": 1}'])
def test_json_that_does_not_fit_is_400_with_details(server, data):
    answer = post(server, data)
    text = refused(answer, 400, 'VALIDATION_ERROR')
    details = answer.json()['details']
    assert details and all(set(item) == {'path', 'message'} for item in details)
    assert details[0]['message'] in text


def test_a_bad_query_is_400(server):
    refused(server.call('GET', '/api/workspaces?status=odd'), 400, 'VALIDATION_ERROR')
    refused(server.call('GET', '/api/workspaces/a?surprise=1'), 400, 'VALIDATION_ERROR')
    refused(server.call('GET', '/health?%ff=%00'), 400, 'VALIDATION_ERROR')
    assert server.get('/api/workspaces?status=running&status=error&type=agent&label=a%3Db') == []


def test_an_unknown_template_is_400_and_lists_those_there_are(server):
    assert 'tiny' in refused(server.call('POST', '/api/workspaces', {'name': 'a', 'template': 'nope'}), 400,
                             'VALIDATION_ERROR')
    refused(server.call('POST', '/api/workspaces', {'name': 'a', 'gitBranch': 'main'}), 400,
            'VALIDATION_ERROR')


# Bodies


@pytest.mark.parametrize('how', ['length', 'chunked'])
def test_a_body_of_10_mb_is_413_and_takes_no_memory(server, how):
    post(server, b'x' * 900_000)  # what a body that is taken needs is not what is measured
    reset_peak(server)
    before = memory_of(server, 'VmHWM')
    data = b'x' * 10_000_000
    head = {'Content_Type': 'application/json', 'close': False}
    sent = request('POST', '/api/workspaces', body=data, **head) if how == 'length' else (
        request('POST', '/api/workspaces', Transfer_Encoding='chunked', **head)
        + chunked(*(data[start:start + 100_000] for start in range(0, len(data), 100_000))))
    status, headers, body = split(raw(server, sent))
    assert status == 413 and 'MAX_BODY=1048576' in check_error(body, 'PAYLOAD_TOO_LARGE')
    assert headers['connection'] == 'close'  # and raw() has seen that it was closed
    assert memory_of(server, 'VmHWM') - before < 5_000_000


def test_a_body_of_the_largest_size_is_taken(server):
    head, tail = b'{"name": "a b", "gitUrl": "', b'"}'
    assert post(server, head + b'x' * (2**20 - len(head) - len(tail)) + tail).status_code == 400
    assert post(server, head + b'x' * (2**20 - len(head) - len(tail) + 1) + tail).status_code == 413


def test_a_large_body_of_a_refused_call_is_not_waited_for(server):
    """Neither an endless body nor one that never comes keeps the connection of who is turned away."""
    def refuse(options):
        begun = time.monotonic()
        head = request('POST', '/api/workspaces', host='evil.example', close=False, **options)
        status, _, body = split(raw(server, head + b'5\r\nhello\r\n'))
        assert status == 403 and time.monotonic() - begun < 4
        check_error(body, 'FORBIDDEN')

    at_once(refuse, {'Content_Length': 5_000_000}, {'Transfer_Encoding': 'chunked'})


def test_who_waits_for_100_continue_gets_it_or_the_refusal(server):
    with connect(server) as sock:
        sock.sendall(request('POST', '/api/workspaces', Content_Type='application/json', Content_Length=15,
                             Expect='100-continue'))
        assert sock.recv(1000) == b'HTTP/1.1 100 Continue\r\n\r\n'
        sock.sendall(b'{"name": "a b"}')
        assert split(read_all(sock))[0] == 400
    answer = raw(server, request('POST', '/api/workspaces', Content_Length=99_000_000, Expect='100-continue'))
    assert split(answer)[0] == 413 and answer.count(b'HTTP/1.1') == 1


def test_a_chunked_body_is_taken(server):
    parts = b'{"name"', b': "a', b' b"}'
    head = request('POST', '/api/workspaces', Transfer_Encoding='chunked', **JSON_TYPE)
    status, _, body = split(raw(server, head + chunked(*parts)))
    assert status == 400 and '"a b"' in check_error(body, 'VALIDATION_ERROR')


@pytest.mark.parametrize('data', [b'zz\r\nhello\r\n0\r\n\r\n', b'-5\r\nhello', b'fffffffffffffffffffff\r\n',
                                  b'5\r\nhelloXX0\r\n\r\n'], ids=repr)
def test_broken_chunks_are_400(server, data):
    head = request('POST', '/api/workspaces', close=False, Transfer_Encoding='chunked', **JSON_TYPE)
    status, headers, body = split(raw(server, head + data))
    assert (status, headers['content-type'], headers['connection']) == (400, 'application/json', 'close')
    check_error(body, 'VALIDATION_ERROR')


def test_a_body_that_is_cut_off_leaves_no_traceback(server):
    already = server.log.stat().st_size
    for data in (request('POST', '/api/workspaces', Content_Type='application/json', Content_Length=100)
                 + b'{"na',
                 request('POST', '/api/workspaces', Content_Type='application/json',
                         Transfer_Encoding='chunked') + b'5\r\nhe'):
        with connect(server) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            read_all(sock)
    assert 'Traceback' not in server.log.read_text()[already:]


@pytest.mark.parametrize('length', ['-1', 'abc', '+5', '1_0', '5, 5', '\xb2'])
def test_a_bad_content_length_is_refused(server, length):
    head = request('POST', '/api/workspaces', close=False, Content_Length=length, **JSON_TYPE)
    status, headers, body = split(raw(server, head + b'{"name"}  '))
    assert status == 400 and headers['connection'] == 'close'
    check_error(body, 'VALIDATION_ERROR')


def test_a_request_cannot_be_smuggled_in_a_body(server):
    """A proxy that takes the rest for the body of the first request must not be contradicted."""
    inner = request('GET', '/health')
    for encoding in ('gzip, chunked', 'xchunked', 'identity', 'chunked, identity',
                     'chunked\r\nTransfer-Encoding: gzip'):
        for length in (None, len(inner)):
            answers = raw(server, request('POST', '/api/workspaces', close=False,
                                          Content_Type='application/json', Transfer_Encoding=encoding,
                                          Content_Length=length) + inner)
            assert b'"uptime"' not in answers and split(answers)[0] == 400, encoding
            check_error(split(answers)[2], 'VALIDATION_ERROR')


# Slow, long and broken requests


def test_slow_headers_time_out(server):
    begun = time.monotonic()
    status, headers, body = split(raw(server, b'GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: '))
    assert status == 400 and headers['connection'] == 'close'
    assert 'slowly' in check_error(body, 'VALIDATION_ERROR') and time.monotonic() - begun > 0.4


def test_headers_that_trickle_time_out_all_the_same(server):
    begun = time.monotonic()
    with connect(server) as sock:
        sock.sendall(b'GET /health HTTP/1.1\r\n')
        with contextlib.suppress(OSError):
            while time.monotonic() - begun < 5 and not gevent.select.select([sock], [], [], 0.05)[0]:
                sock.sendall(b'X-Slow: 1\r\n')
        assert split(read_all(sock))[0] == 400
    assert time.monotonic() - begun < 2.5


def test_a_slow_body_times_out(server):
    def send_slowly(headers):
        begun = time.monotonic()
        head = request('POST', '/api/workspaces', close=False, **JSON_TYPE, **headers)
        status, answered, body = split(raw(server, head + b'5\r\n{"na'))
        assert status == 408 and answered['connection'] == 'close'
        assert 'REQUEST_TIMEOUT=0.5' in check_error(body, 'VALIDATION_ERROR')
        assert time.monotonic() - begun > 0.4

    at_once(send_slowly, {'Content_Length': 100}, {'Transfer_Encoding': 'chunked'})


def test_others_are_served_while_one_is_slow(server):
    with connect(server) as sock:
        sock.sendall(b'GET /health HTTP/1.1\r\n')
        assert server.call('GET', '/health').status_code == 200


def test_a_long_request_line_is_414(server):
    status, headers, body = split(raw(server, request('GET', '/health?' + 'x' * 10_000)))
    assert status == 414 and headers['content-type'] == 'application/json'
    check_error(body, 'VALIDATION_ERROR')


@pytest.mark.parametrize('headers', [{'X_Long': 'x' * 100_000},
                                     {f'X_{number}': 'x' for number in range(150)}], ids=['long', 'many'])
def test_headers_without_measure_are_400(server, headers):
    status, answered, body = split(raw(server, request('GET', '/health', **headers)))
    assert status == 400 and answered['content-type'] == 'application/json'
    check_error(body, 'VALIDATION_ERROR')


@pytest.mark.parametrize('data', [b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n', b'GARBAGE\r\n\r\n',
                                  b'GET / HTTP/9.9\r\n\r\n', b'\xff' * 100 + b'\r\n\r\n',
                                  b'GET /health HTTP/x.y\r\n\r\n',
                                  b'GET /health HTTP/1\r\nHost: localhost\r\n\r\n',
                                  b' / HTTP/1.1\r\nHost: localhost\r\n\r\n'],
                         ids=lambda data: repr(data[:12]))
def test_garbage_is_400(server, data):
    already = server.log.stat().st_size
    status, headers, body = split(raw(server, data))
    assert status == 400 and headers['content-type'] == 'application/json'
    check_error(body, 'VALIDATION_ERROR')
    assert 'Traceback' not in server.log.read_text()[already:]


def test_a_header_without_a_colon_brings_nobody_down(server):
    answer = raw(server, b'GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nnonsense\r\n\r\n')
    assert split(answer)[0] == 400
    check_error(split(answer)[2], 'VALIDATION_ERROR')
    assert server.call('GET', '/health').status_code == 200


# HEAD, OPTIONS, connections


@pytest.mark.parametrize(('path', 'status'), [
    ('/health', 200), ('/api/workspaces', 200), ('/api/workspaces/a', 404), ('/nothing', 404)])
def test_head_is_get_without_a_body(server, path, status):
    found, headers, body = ask(server, 'HEAD', path)
    wanted = ask(server, 'GET', path)
    assert found == wanted[0] == status and body == b''
    assert headers['content-type'] == 'application/json'
    assert abs(int(headers['content-length']) - len(wanted[2])) <= 3  # the uptime may have another digit


def test_head_of_a_refused_host_has_no_body(server):
    status, headers, body = ask(server, 'HEAD', '/health', host='evil.example')
    assert status == 403 and body == b'' and int(headers['content-length']) > 0


@pytest.mark.parametrize(('path', 'methods'), [
    ('/api/workspaces', {'GET', 'HEAD', 'POST', 'OPTIONS'}), ('/health', {'GET', 'HEAD', 'OPTIONS'}),
    ('/api/workspaces/any', {'GET', 'HEAD', 'PATCH', 'DELETE', 'OPTIONS'})])
def test_options_tells_the_methods(server, path, methods):
    status, headers, body = ask(server, 'OPTIONS', path)
    assert status == 204 and body == b'' and methods == set(headers['allow'].split(', '))


def test_options_of_an_unknown_route_is_404(server):
    status, _, body = ask(server, 'OPTIONS', '/nothing')
    assert status == 404
    check_error(body, 'NOT_FOUND')


def test_a_kept_connection_answers_at_once(server):
    """Without TCP_NODELAY each answer on a kept connection waits 40 ms, and none on a new one."""
    url = f'http://127.0.0.1:{server.port}/health'
    with requests.Session() as session:
        kept = [seconds_of(lambda: session.get(url)) for _ in range(50)]
    new = [seconds_of(lambda: requests.get(url)) for _ in range(20)]
    assert usual(kept) < usual(new) + 0.02


def test_pipelined_requests_are_answered_in_order(server):
    answers = raw(server, request('GET', '/health', close=False)
                  + request('POST', '/api/workspaces', close=False, body=b'{"name": "a b"}',
                            Content_Type='application/json')
                  + request('GET', '/nothing', close=False) + request('GET', '/health'))
    assert re.findall(rb'HTTP/1\.1 (\d+)', answers) == [b'200', b'400', b'404', b'200']


def test_an_answer_is_json_with_a_length_and_is_not_cached(server):
    for path in ('/health', '/api/workspaces', '/api/workspaces/a'):
        _, headers, body = ask(server, 'GET', path)
        assert headers['content-type'] == 'application/json' and int(headers['content-length']) == len(body)
        assert headers['cache-control'] == 'no-store' and body.endswith(b'\n')


def test_http_1_0_is_answered_and_closed(server):
    answer = raw(server, b'GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n')
    assert split(answer)[0] == 200


# Host and Origin


@pytest.mark.parametrize('host', ['localhost', 'LOCALHOST:3100', '127.0.0.1:3100', '127.9.9.9', '[::1]:3100',
                                  '[::1]', 'dev.example', 'Dev.Example:443'])
def test_a_host_of_this_machine_or_of_the_list_is_allowed(server, host):
    assert ask(server, 'GET', '/health', host=host)[0] == 200


@pytest.mark.parametrize('host', ['evil.example', 'evil.example:3100', 'localhost.evil.example',
                                  '127.0.0.1.evil.example', 'evil.example#localhost', 'sub.dev.example',
                                  '192.168.1.5',
                                  '0.0.0.0', '[::]', '', None, 'localhost@evil.example', '[::1',
                                  'evil.example,localhost', 'user:pw@localhost'])
def test_another_host_is_forbidden(server, host):
    status, _, body = ask(server, 'GET', '/health', host=host)
    assert status == 403 and 'ALLOWED_HOSTS' in check_error(body, 'FORBIDDEN')


@pytest.mark.parametrize('origin', ['http://localhost:5173', 'https://localhost', 'http://127.0.0.1:3000',
                                    'http://[::1]:3000', 'https://app.example', 'https://other.example:8443'])
def test_an_origin_of_this_machine_or_of_the_list_is_allowed_and_named(server, origin):
    for method, path, status in (('GET', '/health', 200), ('GET', '/nothing', 404),
                                 ('POST', '/api/workspaces', 415), ('DELETE', '/health', 405)):
        found, headers, _ = ask(server, method, path, Origin=origin)
        assert found == status and headers['access-control-allow-origin'] == origin
        assert headers['vary'] == 'Origin'
        assert {'Location', 'Allow',
                'WWW-Authenticate'} <= set(headers['access-control-expose-headers'].split(', '))
        assert 'access-control-allow-credentials' not in headers


@pytest.mark.parametrize('origin', ['https://evil.example', 'null', '', 'http://app.example',
                                    'https://app.example:444', 'https://app.example.evil.example',
                                    'http://localhost.evil.example',
                                    'file://', 'http://[', 'http://[::1', 'chrome-extension://localhost',
                                    '//localhost', 'localhost', 'http://', 'http://192.168.1.5',
                                    'http://localhost:x@evil.example', '*'])
def test_another_origin_is_forbidden_and_gets_no_cors_headers(server, origin):
    for method, path in (('GET', '/health'), ('POST', '/api/workspaces'), ('OPTIONS', '/api/workspaces')):
        status, headers, body = ask(server, method, path, Origin=origin, Access_Control_Request_Method='POST')
        assert status == 403 and 'ALLOWED_ORIGINS' in check_error(body, 'FORBIDDEN')
        assert not [name for name in headers if name.startswith('access-control')]
        assert headers['vary'] == 'Origin'


def test_a_forbidden_page_changes_nothing(server):
    post(server, b'{"name": "a"}', Origin='https://evil.example')
    assert server.get('/api/workspaces') == []


def test_no_origin_gets_no_cors_headers_but_vary(server):
    _, headers, _ = ask(server, 'GET', '/health')
    assert not [name for name in headers if name.startswith('access-control')] and headers['vary'] == 'Origin'


def test_a_preflight_is_told_what_is_allowed(server):
    status, headers, body = ask(server, 'OPTIONS', '/api/workspaces', Origin='http://localhost:5173',
                                Access_Control_Request_Method='POST',
                                Access_Control_Request_Headers='content-type,authorization')
    assert status == 204 and body == b''
    assert headers['access-control-allow-origin'] == 'http://localhost:5173' and headers['vary'] == 'Origin'
    assert {'authorization', 'content-type',
            'last-event-id'} <= set(headers['access-control-allow-headers'].lower().split(', '))
    assert {'GET', 'POST', 'PATCH', 'DELETE'} <= set(headers['access-control-allow-methods'].split(', '))
    assert int(headers['access-control-max-age']) > 0 and 'access-control-allow-credentials' not in headers


# The token


def test_without_the_token_nothing_is_told(guarded):
    for method, path, body in (('GET', '/api/workspaces', None), ('POST', '/api/workspaces', {'name': 'a'}),
                               ('GET', '/nothing', None), ('DELETE', '/api/workspaces/a', None),
                               ('POST', '/health', None), ('GET', '/health/', None),
                               ('GET', '/api/templates', None)):
        answer = guarded.call(method, path, body)
        assert 'API_TOKEN' in refused(answer, 401, 'UNAUTHORIZED')
        assert answer.headers['WWW-Authenticate'] == 'Bearer'


@pytest.mark.parametrize('shown', ['Bearer wrong', f'Bearer {TOKEN}x', f'Bearer {TOKEN[:-1]}', 'Bearer',
                                   'Bearer ', f'Basic {TOKEN}', TOKEN, '', 'Bearer \xff\xe4',
                                   f'Bearer {TOKEN},{TOKEN}'])
def test_a_wrong_token_is_401(guarded, shown):
    status, headers, body = ask(guarded, 'GET', '/api/workspaces', Authorization=shown)
    assert status == 401 and headers['www-authenticate'] == 'Bearer'
    assert check_error(body, 'UNAUTHORIZED') == (
        "This token is not the server's API_TOKEN." if re.match('Bearer .', shown) else
        "This server needs its API token: send 'Authorization: Bearer <API_TOKEN>'.")


@pytest.mark.parametrize('shown', [f'Bearer {TOKEN}', f'bearer {TOKEN}', f'Bearer  {TOKEN}'])
def test_the_token_opens_everything(guarded, shown):
    status, _, body = ask(guarded, 'GET', '/api/workspaces', Authorization=shown)
    assert status == 200 and json.loads(body) == {'success': True, 'data': []}
    assert 'workspaces' in json.loads(ask(guarded, 'GET', '/health', Authorization=shown)[2])


def test_health_without_the_token_has_only_the_contracts_fields(guarded):
    assert set(guarded.call('GET', '/health').json()) == {'status', 'version', 'uptime', 'docker'}
    assert ask(guarded, 'HEAD', '/health')[0] == 200


def test_host_and_origin_come_before_the_token(guarded):
    for headers in ({'host': 'evil.example'}, {'Origin': 'https://evil.example'}):
        assert ask(guarded, 'GET', '/api/workspaces', **headers)[0] == 403
        assert ask(guarded, 'GET', '/api/workspaces', Authorization=f'Bearer {TOKEN}', **headers)[0] == 403
        assert ask(guarded, 'GET', '/health', **headers)[0] == 403


def test_the_token_comes_before_the_body(guarded):
    status, _, body = ask(guarded, 'POST', '/api/workspaces', body=b'nonsense', Content_Type='text/plain')
    assert status == 401
    check_error(body, 'UNAUTHORIZED')


def test_a_page_can_read_that_it_needs_a_token(guarded):
    status, headers, _ = ask(guarded, 'GET', '/api/workspaces', Origin='https://app.example')
    assert status == 401 and headers['access-control-allow-origin'] == 'https://app.example'
    assert ask(guarded, 'OPTIONS', '/api/workspaces', Origin='https://app.example',
               Access_Control_Request_Method='POST')[0] == 204


def test_the_token_is_never_in_the_log(guarded):
    guarded.call('GET', '/api/workspaces', headers={'Authorization': f'Bearer {TOKEN}'})
    guarded.call('POST', '/api/workspaces', {'name': 'a'}, headers={'Authorization': f'Bearer {TOKEN}'})
    raw(guarded, request('POST', '/api/workspaces', Authorization=f'Bearer {TOKEN}',
                         Content_Length='nonsense'))
    raw(guarded, request('GET', '/health', Authorization=f'Bearer {TOKEN}', X_Long='x' * 100_000))
    raw(guarded, request('GET', '/health', Authorization=f'Bearer {TOKEN}').replace(b'HTTP/1.1', b'HTTP/9.9'))
    assert guarded.log.read_text() and TOKEN not in guarded.log.read_text()


# A bug of ours


@pytest.fixture
def backend(tmp_path):
    settings = {'STATE_DIR': str(tmp_path), 'DOCKER_HOST': f'{tmp_path}/no.sock'}
    return agentbackend.make_backend(agentbackend.Config.from_env(settings))


def get_explode(backend, monkeypatch, handler, **options):
    """Return the answer of a route that fails."""
    route = agentbackend.Route('GET', '/explode', handler)
    monkeypatch.setattr(agentbackend, 'ROUTES', (*agentbackend.ROUTES, route))
    return webtest.TestApp(agentbackend.make_app(backend)).get('/explode', status=500, **options)


def test_an_unexpected_exception_is_500_with_a_number_that_the_log_has(backend, monkeypatch, caplog):
    def explode(backend, call):
        raise ZeroDivisionError('a secret detail')

    answer = get_explode(backend, monkeypatch, explode, headers={'Origin': 'http://localhost:1'})
    text = check_error(answer.body, 'INTERNAL_ERROR')
    number = re.search(r'\b[0-9a-f]{8}\b', text)[0]
    assert 'secret' not in text and answer.headers['Access-Control-Allow-Origin'] == 'http://localhost:1'
    record, = [record for record in caplog.records if number in record.getMessage()]
    assert 'ZeroDivisionError: a secret detail' in caplog.text and record.exc_info


def test_an_answer_that_cannot_be_sent_is_500_too(backend, monkeypatch, caplog):
    answer = get_explode(backend, monkeypatch, lambda backend, call: agentbackend.Reply({1, 2}))
    number = re.search(r'\b[0-9a-f]{8}\b', check_error(answer.body, 'INTERNAL_ERROR'))[0]
    assert number in caplog.text


def test_the_application_can_be_mounted_in_another(backend):
    app = webtest.TestApp(agentbackend.make_app(backend))
    assert app.get('/health').json['docker'] == 'disconnected'
    assert app.post_json('/api/workspaces', {'name': 'a b'}, status=400).json['code'] == 'VALIDATION_ERROR'


@pytest.mark.parametrize('length', ['x', '-1', '²', '1 2'])
def test_a_length_that_is_no_number_is_refused_under_any_server(backend, length):
    app, answered = agentbackend.make_app(backend), []
    for method, path in (('POST', '/api/workspaces'), ('PUT', '/api/workspaces/a/files/b')):
        environ = {'REQUEST_METHOD': method, 'PATH_INFO': path, 'CONTENT_LENGTH': length,
                   'QUERY_STRING': '', 'HTTP_HOST': 'localhost', 'wsgi.input': io.BytesIO(b'{}')}
        answer = b''.join(app(environ, lambda status, headers, error=None: answered.append(status)))
        assert 'Content-Length' in check_error(answer, 'VALIDATION_ERROR')
    assert [status[:3] for status in answered] == ['400', '400']


def test_an_upload_that_ends_early_is_not_taken_for_a_whole_one(backend):
    pieces = agentbackend.make_app(backend)._pieces(io.BytesIO(b'abc'), 5)
    assert next(pieces) == b'abc'
    with pytest.raises(ValidationError, match='truncated'):
        next(pieces)


def test_the_engine_is_looked_for_on_whenever_the_instance_is_found_taken(backend):
    backend.open()
    try:
        gevent.sleep(0.5)  # it looked once, and pauses
        follower = backend.keeper._loops[0]
        follower.kill(InstanceTaken('Another server is at work.'), block=False)  # as a sweep does
        gevent.sleep(0.5)
        assert not follower.dead
    finally:
        backend.close()


# Start and end


def test_sigterm_ends_the_server_with_0_and_a_request_that_goes_on_is_answered(make_server):
    server = make_server(REQUEST_TIMEOUT='5')
    with connect(server) as sock:
        sock.sendall(request('POST', '/api/workspaces', Content_Type='application/json', Content_Length=15)
                     + b'{"name":')
        server.call('GET', '/health')  # so that it has been seen
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_log('Stopping.')
        server.until(functools.partial(is_refused, server), 5)
        sock.sendall(b' "a b"}')
        assert split(read_all(sock))[0] == 400
    assert server.process.wait(5) == 0


def is_refused(server):
    try:
        connect(server).close()
    except ConnectionRefusedError:
        return True
    return False


def test_sigterm_is_not_held_up_by_connections_that_only_wait(make_server):
    server = make_server()
    with connect(server) as kept, connect(server):
        kept.sendall(request('GET', '/health', close=False))
        assert kept.recv(65536)
        begun = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - begun < 3


def test_sigint_ends_it_too_and_the_instance_can_start_again(make_server):
    server = make_server()
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(5) == 0
    assert 'Traceback' not in server.log.read_text()
    server.start(connected=False)
    assert server.call('GET', '/health').status_code == 200


def test_a_port_in_use_is_told_in_one_line(server, tmp_path):
    ended = run_second(server, PORT=str(server.port), STATE_DIR=str(tmp_path))
    assert ended.returncode == 2 and ended.stdout == ''
    assert re.fullmatch(rf'agentbackend: PORT={server.port}: .*[Aa]ddress already in use.*\.\n',
                        ended.stderr), ended.stderr


def test_the_same_instance_twice_is_told_in_one_line(server):
    ended = run_second(server)
    assert ended.returncode == 2 and ended.stdout == ''
    assert re.fullmatch(rf"agentbackend: INSTANCE='{server.instance}': another server .*\.\n",
                        ended.stderr), ended.stderr


def test_a_state_file_that_cannot_be_read_is_told_in_one_line(server, tmp_path):
    (tmp_path / f'{server.instance}.sqlite').mkdir()
    ended = run_second(server, STATE_DIR=str(tmp_path))
    assert ended.returncode == 2
    assert re.fullmatch(r'agentbackend: STATE_DIR=.*\.\n', ended.stderr), ended.stderr


def test_it_listens_on_ipv6_loopback(make_server):
    server = make_server(HOST='::1')
    with socket.create_connection(('::1', server.port), timeout=5) as sock:
        sock.sendall(request('GET', '/health', host=f'[::1]:{server.port}'))
        assert split(read_all(sock))[0] == 200
    assert f'{SERVING}[::1]:' in server.log.read_text()
