"""Files of a workspace: what goes in comes out, whole or not at all, and no path leads out."""
import base64
import contextlib
import gzip
import hashlib
import http.client
import io
import json
import os
import select
import signal
import subprocess
import sys
import tarfile
import time

import gevent
import pytest
import requests
from agents import running, served_agents, shell
from conftest import concurrently
from streaming import connect, read_head

from _agentbackend.files import PROGRAM

CHUNK = os.urandom(2**20)


@pytest.fixture(scope='module')
def server(tmp_path_factory, agents_template, docker_client):
    with served_agents(tmp_path_factory.mktemp('files'), agents_template[0], docker_client,
                       DEFAULT_TEMPLATE='agents', REQUEST_TIMEOUT='3') as served:
        yield served


def files(server, method, path, *, workspace='work', **options):
    """Return the answer of a call."""
    return server.call(method, f'/api/workspaces/{workspace}/files{path}', **options)


def put(server, path, data=b'', *, workspace='work', **options):
    """Write a file, and return what describes it."""
    answer = files(server, 'PUT', path, workspace=workspace, data=data, **options)
    assert answer.status_code in (200, 201), answer.text
    return answer.json()['data']


def content(server, path, **options):
    """Return the bytes of a file."""
    answer = files(server, 'GET', path, **options)
    assert answer.status_code in (200, 206), answer.text
    return answer.content


def names(server, path='', **options):
    """Return {name: type} of what is in a folder."""
    answer = files(server, 'GET', path, **options)
    assert answer.status_code == 200, answer.text
    return {item['name']: item['type'] for item in answer.json()['data']}


def change(server, path, operation, **fields):
    return files(server, 'POST', path, json={'operation': operation, **fields})


def refusal(answer):
    return answer.status_code, answer.json()['code']


def inside(server, docker_client, command):
    code, printed = shell(docker_client, server.container, f'cd /workspace/work && {command}')
    assert code == 0, printed
    return printed


def make_tar(*entries, mode='w'):
    """Return a tar of (name, content, kind, target) as bytes."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode=mode) as archive:
        for name, data, kind, target in entries:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname, entry.size, entry.mode = kind, target, len(data), 0o755
            archive.addfile(entry, io.BytesIO(data))
    return made.getvalue()


def file_entry(name, data=b'x'):
    return name, data, tarfile.REGTYPE, ''


def test_what_is_written_is_read_again_with_all_that_is_known_of_it(server, docker_client):
    made = put(server, '/notes/deep/today.txt', 'grüezi\n'.encode())
    assert made['name'] == 'today.txt' and made['size'] == 8 and made['type'] == 'file'
    answer = files(server, 'GET', '/notes/deep/today.txt')
    assert answer.content.decode() == 'grüezi\n'
    assert answer.headers['Content-Type'] == 'text/plain; charset=utf-8'
    assert answer.headers['Content-Length'] == '8' and answer.headers['Accept-Ranges'] == 'bytes'
    assert answer.headers['X-Content-Type-Options'] == 'nosniff'
    assert answer.headers['Content-Security-Policy'] == 'sandbox'
    assert inside(server, docker_client, 'stat -c "%U %a" notes/deep/today.txt notes') == 'dev 644\ndev 755\n'
    head = files(server, 'HEAD', '/notes/deep/today.txt')
    assert head.status_code == 200 and not head.content
    assert {name: head.headers[name] for name in ('ETag', 'Content-Length', 'Last-Modified')} == {
        name: answer.headers[name] for name in ('ETag', 'Content-Length', 'Last-Modified')}
    assert content(server, '//workspace/work/notes/deep/today.txt') == answer.content
    assert 'attachment' in files(server, 'GET', '/notes/deep/today.txt?download').headers[
        'Content-Disposition']


def test_a_folder_is_a_list(server, docker_client):
    inside(server, docker_client, 'mkdir -p list/sub && cd list && echo hello >file && ln -s file link && '
                                  'mkfifo pipe && chmod 600 file')
    found = {item['name']: item for item in files(server, 'GET', '/list').json()['data']}
    assert {name: item['type'] for name, item in found.items()} == {
        'sub': 'folder', 'file': 'file', 'link': 'link', 'pipe': 'other'}
    assert found['file']['size'] == 6 and found['file']['mode'] == '0600'
    assert found['link']['target'] == 'file' and 'list' in names(server)
    assert names(server, '//workspace')['work'] == 'folder'


def test_an_executable_stays_one_and_a_mode_can_be_given(server, docker_client):
    put(server, '/run.sh?mode=755', b'#!/bin/sh\necho ran\n')
    put(server, '/run.sh', b'#!/bin/sh\necho again\n')
    assert inside(server, docker_client, './run.sh') == 'again\n'
    assert refusal(files(server, 'PUT', '/run.sh?mode=9', data=b'')) == (400, 'VALIDATION_ERROR')


def test_ranges_are_parts_of_a_file(server):
    put(server, '/numbers', bytes(range(100)))
    for header, wanted, told in (('bytes=10-19', bytes(range(10, 20)), 'bytes 10-19/100'),
                                 ('bytes=90-', bytes(range(90, 100)), 'bytes 90-99/100'),
                                 ('bytes=-3', bytes(range(97, 100)), 'bytes 97-99/100'),
                                 ('bytes=98-500', bytes(range(98, 100)), 'bytes 98-99/100')):
        answer = files(server, 'GET', '/numbers', headers={'Range': header})
        assert (answer.status_code, answer.content) == (206, wanted)
        assert answer.headers['Content-Range'] == told
    for header in ('bytes=a-b', 'lines=1-2', 'bytes=1-2,5-6', 'bytes=5-2'):
        assert files(server, 'GET', '/numbers', headers={'Range': header}).status_code == 200
    answer = files(server, 'GET', '/numbers', headers={'Range': 'bytes=100-'})
    assert answer.status_code == 416 and answer.headers['Content-Range'] == 'bytes */100'
    for header, wanted in (('bytes=90-' + '9' * 5000, 10), (f'bytes={"0" * 5000}-4', 5),
                           ('bytes=-' + '9' * 5000, 100)):
        assert len(content(server, '/numbers', headers={'Range': header})) == wanted
    old = {'Range': 'bytes=0-0', 'If-Range': '"other"'}
    assert files(server, 'GET', '/numbers', headers=old).status_code == 200


def test_etags_guard_against_the_work_of_others(server):
    put(server, '/guarded', b'one')
    tag = files(server, 'GET', '/guarded').headers['ETag']
    assert files(server, 'GET', '/guarded', headers={'If-None-Match': tag}).status_code == 304
    written = files(server, 'PUT', '/guarded', data=b'two', headers={'If-Match': tag})
    assert written.status_code == 200
    assert files(server, 'GET', '/guarded').headers['ETag'] == written.headers['ETag'] != tag
    for method, headers in (('PUT', {'If-Match': tag}), ('PUT', {'If-None-Match': '*'}),
                            ('DELETE', {'If-Match': tag})):
        answer = files(server, method, '/guarded', data=b'three', headers=headers)
        assert refusal(answer) == (412, 'PRECONDITION_FAILED')
    assert content(server, '/guarded') == b'two'
    assert files(server, 'PUT', '/guarded-new', data=b'x', headers={'If-None-Match': '*'}).status_code == 201


def test_files_are_moved_copied_and_deleted(server, docker_client):
    put(server, '/tree/a/file', b'content')
    inside(server, docker_client, 'ln -s file tree/a/link')
    assert change(server, '/tree/a', 'copy', to='tree/b/c').status_code == 201
    assert content(server, '/tree/b/c/link') == b'content' and names(server, '/tree/b/c')['link'] == 'link'
    assert change(server, '/tree/a/file', 'move', to='/workspace/work/tree/moved').status_code == 201
    assert names(server, '/tree') == {'a': 'folder', 'b': 'folder', 'moved': 'file'}
    assert change(server, '/tree/made/by', 'mkdir').json()['data']['type'] == 'folder'
    for answer in (change(server, '/tree/moved', 'copy', to='tree/b'), change(server, '/tree/b', 'mkdir'),
                   files(server, 'DELETE', '/tree/b'), files(server, 'PUT', '/tree/b', data=b'')):
        assert refusal(answer) == (409, 'FILE_EXISTS')
    assert refusal(files(server, 'GET', '/tree/moved/more')) == (409, 'NOT_A_FOLDER')
    assert refusal(change(server, '/tree/moved', 'move')) == (400, 'VALIDATION_ERROR')
    assert files(server, 'DELETE', '/tree/b?recursive').json()['data'] == {'path': 'tree/b', 'deleted': True}
    assert refusal(files(server, 'DELETE', '/tree/b')) == (404, 'FILE_NOT_FOUND')
    inside(server, docker_client, 'ln -sfn .. up')
    for path in ('/.', '//workspace/work', '//workspace', '/tree/..', '/tree/../../work', '/up/work',
                 '//workspace/work/../work'):
        # Not by way of requests, which takes `..` away.
        with contextlib.closing(http.client.HTTPConnection('127.0.0.1', server.port, timeout=20)) as client:
            client.request('DELETE', f'/api/workspaces/work/files{path}?recursive')
            assert client.getresponse().status in (400, 404), path
    assert refusal(change(server, '/up/work', 'move', to='/workspace/other')) == (400, 'VALIDATION_ERROR')
    assert names(server)['tree'] == 'folder'


def test_what_comes_to_a_target_meanwhile_is_kept(server, docker_client):
    inside(server, docker_client, 'mkdir -p slow && head -c 400000000 /dev/zero >slow/zeros')
    copying = gevent.spawn(change, server, '/slow', 'copy', to='taken')
    pid = server.until(lambda: held_copy(server, docker_client))
    inside(server, docker_client, 'echo precious >taken')
    os.kill(pid, signal.SIGCONT)
    assert refusal(copying.get()) == (409, 'FILE_EXISTS')
    assert content(server, '/taken') == b'precious\n'
    assert not hidden(server, docker_client)
    files(server, 'DELETE', '/slow?recursive')


def answer_of(folder, prelude, body=b'', **request):
    """Return the last answer of the program inside, which runs here, behind a line of Python."""
    line = json.dumps({'base': str(folder), 'kept': [''], **request}).encode() + b'\n'
    done = subprocess.run([sys.executable, '-c', f'{prelude}\n{PROGRAM.decode()}'], input=line + body,
                          stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_a_file_that_comes_at_the_last_moment_is_kept(tmp_path):
    (tmp_path / 'from').write_text('other')
    for request, wanted in (
            ({'work': 'write', 'path': 'file', 'noneMatch': ['*']}, 'PRECONDITION_FAILED'),
            ({'work': 'move', 'path': 'from', 'to': 'file'}, 'FILE_EXISTS')):
        # It comes when a file that was written is given its mode, or when ctypes is asked for.
        late = f"open({str(tmp_path / 'file')!r}, 'w').write('precious')"
        prelude = ('import ctypes, os; set_mode = os.fchmod; '
                   f'os.fchmod = lambda *given: ({late}, set_mode(*given)); load = ctypes.CDLL; '
                   f'ctypes.CDLL = lambda *given, **more: ({late}, load(*given, **more))[1]')
        assert answer_of(tmp_path, prelude, (3).to_bytes(4, 'big') + b'new' + bytes(4), **request)[
            'code'] == wanted
        assert (tmp_path / 'file').read_text() == 'precious'
        (tmp_path / 'file').unlink()
    assert [path.name for path in tmp_path.iterdir()] == ['from']


def test_things_are_moved_where_the_c_library_cannot_keep_them_apart(tmp_path):
    for name, make in (('file', lambda path: path.write_text('x')), ('folder', lambda path: path.mkdir()),
                       ('link', lambda path: path.symlink_to('nowhere'))):
        make(tmp_path / name)
        answer = answer_of(tmp_path, 'import sys; sys.modules["ctypes"] = None', work='move', path=name,
                           to=f'moved/{name}')
        assert answer['ok'], answer
        assert os.path.lexists(tmp_path / 'moved' / name) and not os.path.lexists(tmp_path / name)


def test_nothing_is_moved_or_copied_into_itself(server, docker_client):
    inside(server, docker_client, 'mkdir -p round/sub && ln -s round/sub way')
    for operation in ('move', 'copy'):
        for target in ('round/new/deep', 'round/sub/../new', 'way/new', 'round/sub/x'):
            answer = change(server, '/round', operation, to=target)
            assert answer.status_code == 400 and 'within itself' in answer.json()['error'], answer.text
    assert inside(server, docker_client, 'find round').split() == ['round', 'round/sub']
    assert change(server, '/round', 'move', to='round/sub/../../square').status_code == 201


def test_a_tree_goes_in_and_out_as_a_tar(server, docker_client):
    entries = [('t/folder', b'', tarfile.DIRTYPE, ''), file_entry('t/folder/a', b'aa'),
               file_entry('t/b c', b'b'), ('t/link', b'', tarfile.SYMTYPE, 'folder/a'),
               ('t/hard', b'', tarfile.LNKTYPE, 't/b c'), file_entry('t/caf\udce9', b'odd')]
    for form, mode in (('tar', 'w'), ('tar.gz', 'w:gz')):
        data = make_tar(*entries, mode=mode)
        answer = files(server, 'PUT', f'/in {form}?extract={form}', data=data)
        assert answer.status_code == 200 and answer.json()['data']['entries'] == 6, answer.text
        answer = files(server, 'GET', f'/in {form}/t?archive={form}')
        with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
            found = {member.name.removeprefix('./'): member for member in archive}
            assert {'folder', 'folder/a', 'b c', 'link', 'hard', 'caf\udce9'} <= set(found)
            assert archive.extractfile(found['folder/a']).read() == b'aa'
            assert found['link'].linkname == 'folder/a' and found['b c'].mode == 0o755
    assert 'caf\ufffd' in names(server, '/in tar/t')
    assert files(server, 'GET', '/in tar/t/folder/a?archive=tar').status_code == 200
    assert refusal(files(server, 'PUT', '/broken?extract=tar', data=b'no tar' * 1000)) == (
        400, 'VALIDATION_ERROR')
    assert refusal(files(server, 'PUT', '/broken?extract=tar.gz', data=make_tar(file_entry('a')))) == (
        400, 'VALIDATION_ERROR')
    assert refusal(files(server, 'PUT', '', data=b'')) == (400, 'VALIDATION_ERROR')


def test_a_tar_that_is_not_whole_is_refused(server):
    whole, one = make_tar(*[file_entry(f'f{number}', bytes(600)) for number in range(5)]), 1536
    damaged = bytearray(whole)
    damaged[2 * one + 10] ^= 255
    packed = gzip.compress(whole)
    for form, data in (('tar', damaged), ('tar', whole[:2 * one]), ('tar', whole[:2 * one + 100]),
                       ('tar', whole[:2 * one + 600]), ('tar', whole[:5 * one]),
                       ('tar', whole[:2 * one] + bytes(512) + whole[3 * one:]),
                       ('tar.gz', gzip.compress(damaged)), ('tar.gz', gzip.compress(whole[:2 * one])),
                       ('tar.gz', packed[:-12]), ('tar.gz', packed[:-8] + b'nosum123')):
        answer = files(server, 'PUT', f'/not-whole?extract={form}', data=bytes(data))
        assert answer.status_code == 400 and 'not a tar' in answer.json()['error'], answer.text


def test_tars_of_all_programs_are_taken(server, docker_client):
    inside(server, docker_client, 'mkdir -p made/sub && echo 1 >made/sub/a && echo 2 >made/b && '
                                  f'touch "made/{"long" * 30}"')
    made = [inside(server, docker_client, f'cd made && {{ {command}; }} | base64')
            for command in ('tar c .', 'tar c --format=gnu .', 'tar c --format=v7 sub b', 'tar c -b1 .',
                            'tar c --format=posix .', 'busybox tar c . 2>/dev/null || tar c .',
                            '(tar c b; tar c sub)', 'tar c b | head -c 1536')]
    tars = [base64.b64decode(text) for text in made]
    tars.append(b''.join(docker_client.containers.get(server.container).get_archive(
        '/workspace/work/made')[0]))
    tars.append(make_tar())
    for data in tars:
        for form, body in (('tar', data), ('tar.gz', gzip.compress(data)),
                           ('tar.gz', gzip.compress(data[:700]) + gzip.compress(data[700:]))):
            answer = files(server, 'PUT', f'/taken-in?extract={form}', data=body)
            assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(('kind', 'headers'), [
    (tarfile.REGTYPE, {'mtime': 'nan'}), (tarfile.REGTYPE, {'mtime': '1e300'}),
    (tarfile.DIRTYPE, {'mtime': '1e300'}), (tarfile.SYMTYPE, {'linkpath': 'a\0b'}),
    (tarfile.LNKTYPE, {'linkpath': 'a\0b'}), (tarfile.REGTYPE, {'GNU.sparse.map': '0,x'}),
    (tarfile.REGTYPE, {'GNU.sparse.major': '1', 'GNU.sparse.minor': '0'})])
def test_a_tar_that_is_nonsense_is_refused(server, docker_client, kind, headers):
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode='w', format=tarfile.PAX_FORMAT) as archive:
        entry = tarfile.TarInfo('odd')
        entry.type, entry.linkname, entry.pax_headers = kind, 'x', headers
        entry.size = 3 if kind == tarfile.REGTYPE else 0
        archive.addfile(entry, io.BytesIO(b'abc'))
    inside(server, docker_client, 'rm -rf nonsense')
    answer = files(server, 'PUT', '/nonsense?extract=tar', data=made.getvalue())
    assert refusal(answer) == (400, 'VALIDATION_ERROR') and 'not a tar' in answer.json()['error']


def test_what_is_refused_is_told_before_the_end_of_the_body(server):
    with uploading(server, '/early?extract=tar', 10**9) as sock:
        sock.sendall(make_tar(file_entry('../x')))
        for _ in range(500):
            if select.select([sock], [], [], 0.01)[0]:
                break
            sock.sendall(CHUNK[:2**18])
        assert b' 400 ' in sock.recv(1000)


def test_a_thousand_files_go_in_at_once(server, docker_client):
    data = make_tar(*[file_entry(f'many/{number % 10}/{number}', b'%d' % number) for number in range(1000)])
    assert files(server, 'PUT', '?extract=tar', data=data).json()['data']['entries'] == 1000
    assert inside(server, docker_client, 'find many -type f | wc -l').strip() == '1000'
    assert content(server, '/many/7/997') == b'997'


def test_of_a_tar_with_many_deep_files_none_is_kept_open(server, docker_client):
    limit = int(inside(server, docker_client, 'ulimit -n'))
    data = make_tar(*[file_entry(f'open/{"d/" * 400}{number}') for number in range(limit // 400 + 2)])
    answer = files(server, 'PUT', '?extract=tar', data=data)
    assert answer.status_code == 200 and answer.json()['data']['entries'] == limit // 400 + 2, answer.text


def test_a_tree_of_any_depth_is_deleted(server, docker_client):
    put(server, f'/{"b/" * 1500}c')
    assert files(server, 'DELETE', '/b?recursive').status_code == 200
    inside(server, docker_client, 'mkdir -p locked/in && touch locked/in/file && chmod 555 locked/in')
    answer = files(server, 'DELETE', '/locked?recursive')
    assert refusal(answer) == (403, 'FORBIDDEN')
    assert answer.json()['error'] == 'locked: Permission denied'


def memory(server):
    """Return the memory that the server uses, in bytes."""
    status = open(f'/proc/{server.process.pid}/status').read()
    return int(status.partition('VmRSS:')[2].split()[0]) * 1024


def test_a_large_file_passes_through_without_being_held(server):
    megabytes, digest = 200, hashlib.sha256()
    before, most, delays = memory(server), [0], []

    def pieces():
        for _ in range(megabytes):
            digest.update(CHUNK)
            most[0] = max(most[0], memory(server))
            yield CHUNK
    assert put(server, '/large', pieces())['size'] == megabytes * 2**20
    found = hashlib.sha256()
    with requests.get(f'http://127.0.0.1:{server.port}/api/workspaces/work/files/large', stream=True,
                      timeout=60) as answer:
        for data in answer.iter_content(2**20):
            found.update(data)
            most[0] = max(most[0], memory(server))
            if len(delays) < 20:
                begun = time.monotonic()
                assert server.get('/health')['docker'] == 'connected'
                delays.append(time.monotonic() - begun)
    assert found.digest() == digest.digest()
    assert most[0] - before < 20 * 2**20, f'{(most[0] - before) >> 20} MB more'
    assert max(delays) < 5, delays  # it is not kept from answering
    files(server, 'DELETE', '/large')


@contextlib.contextmanager
def uploading(server, path, length, **headers):
    """A connection on which an upload has begun."""
    sock = connect(server, 20)
    lines = [f'PUT /api/workspaces/work/files{path} HTTP/1.1', f'Host: localhost:{server.port}',
             f'Content-Length: {length}', *(f'{name}: {value}' for name, value in headers.items())]
    sock.sendall('\r\n'.join(lines).encode() + b'\r\n\r\n')
    try:
        yield sock
    finally:
        sock.close()


def hidden(server, docker_client, folder='.'):
    """Return what is left of uploads in a folder."""
    return [name for name in inside(server, docker_client, f'ls -A {folder}').split('\n')
            if name.startswith('.agentbackend')]


def held_copy(server, docker_client):
    """Let a copy that has begun stand still, and return its number; None when there is none."""
    for number, command in docker_client.api.top(server.container, 'axo pid,args')['Processes']:
        if command.startswith('cp -a'):
            os.kill(int(number), signal.SIGSTOP)
            if hidden(server, docker_client):
                return int(number)
            os.kill(int(number), signal.SIGCONT)
    return None


def until_no_work(server, docker_client):
    server.until(lambda: not running(docker_client, server.container, 'python3 -I -S'))


def test_a_client_that_leaves_in_the_middle_leaves_nothing(server, docker_client):
    put(server, '/partial/kept', b'before')
    for path in ('/partial/new', '/partial/kept'):
        with uploading(server, path, 10**7) as sock:
            sock.sendall(bytes(10**6))
            server.until(lambda: running(docker_client, server.container, 'python3 -I -S'))
        until_no_work(server, docker_client)
    assert names(server, '/partial') == {'kept': 'file'} and content(server, '/partial/kept') == b'before'
    with uploading(server, '/partial/slow', 1000) as sock:
        assert b' 408 ' in sock.recv(1000)
    with uploading(server, '/partial/killed', 10**7) as sock:
        sock.sendall(bytes(10**6))
        server.until(lambda: running(docker_client, server.container, 'python3 -I -S'))
        server.kill()
    server.start()
    until_no_work(server, docker_client)
    assert names(server, '/partial') == {'kept': 'file'}
    assert not hidden(server, docker_client, 'partial')


def test_a_server_that_is_killed_leaves_nothing_of_a_copy(server, docker_client):
    inside(server, docker_client, 'mkdir -p heavy && head -c 400000000 /dev/zero >heavy/zeros')
    body = b'{"operation": "copy", "to": "copied"}'
    with connect(server) as sock:
        sock.sendall(b'POST /api/workspaces/work/files/heavy HTTP/1.1\r\nHost: localhost\r\nContent-Type: '
                     b'application/json\r\nContent-Length: %d\r\n\r\n%s' % (len(body), body))
        server.until(lambda: held_copy(server, docker_client))
        server.kill()
    server.start()
    until_no_work(server, docker_client)
    assert not hidden(server, docker_client) and 'copied' not in names(server)
    files(server, 'DELETE', '/heavy?recursive')


def test_a_client_that_leaves_a_download_leaves_nothing_running(server, docker_client):
    inside(server, docker_client, 'head -c 100000000 /dev/zero >zeros')
    for path in ('/zeros', '/?archive=tar'.replace('/?', '?')):
        with connect(server) as sock, sock.makefile('rb') as file:
            sock.sendall(f'GET /api/workspaces/work/files{path} HTTP/1.1\r\nHost: localhost:{server.port}'
                         '\r\n\r\n'.encode())
            assert read_head(file)[0] == 200
        until_no_work(server, docker_client)
    assert not running(docker_client, server.container, 'tar --create')
    files(server, 'DELETE', '/zeros')


def test_an_upload_in_chunks_and_one_that_waits_for_100_are_taken(server):
    put(server, '/chunked', (part for part in (b'one ', b'two ', b'', b'three')))
    assert content(server, '/chunked') == b'one two three'
    with uploading(server, '/expected', 5, Expect='100-continue') as sock, sock.makefile('rb') as file:
        assert read_head(file)[0] == 100
        sock.sendall(b'hello')
        assert read_head(file)[0] == 201


def test_the_container_is_not_locked_while_somebody_reads_slowly(server, docker_client):
    inside(server, docker_client, 'head -c 50000000 /dev/zero >slow')
    with connect(server) as sock, sock.makefile('rb') as file:
        sock.sendall(f'GET /api/workspaces/work/files/slow HTTP/1.1\r\nHost: localhost:{server.port}'
                     '\r\n\r\n'.encode())
        assert read_head(file)[0] == 200
        assert docker_client.api.inspect_container(server.container)['State']['Running']
        assert content(server, '/slow', headers={'Range': 'bytes=0-9'}) == bytes(10)
    files(server, 'DELETE', '/slow')


@pytest.mark.parametrize('path', [
    '../../etc/passwd', '..%2f..%2fetc/passwd', '%2e%2e/%2e%2e/etc/passwd', '/etc/passwd', '%2fetc%2fpasswd',
    'a/../../../etc/passwd', './../../etc/passwd', '/workspace/../etc/passwd', '..//..//etc//passwd',
    '/workspace/work/../../etc/passwd', '%2e%2e%2f%2e%2e%2f%2e%2e%2fetc%2fpasswd', '/workspacex/y',
    'a%00/../../etc/passwd', 'out/passwd', 'chain/passwd', 'relative/passwd', 'file-out',
    'proc/self/environ'])
def test_no_path_leads_out(server, docker_client, path):
    inside(server, docker_client, 'mkdir -p a; ln -sfn /etc out; ln -sfn out chain; '
                                  'ln -sfn ../../etc relative; ln -sfn /etc/passwd file-out; '
                                  'ln -sfn /proc proc')
    before = shell(docker_client, server.container, 'md5sum /etc/passwd; ls /etc', user='root')
    with connect(server) as sock:
        for method, query, body in (('GET', '', b''), ('HEAD', '', b''), ('GET', '?archive=tar', b''),
                                    ('PUT', '', b'evil'), ('PUT', '?extract=tar', make_tar(file_entry('e'))),
                                    ('DELETE', '?recursive', b'')):
            if method == 'DELETE' and path == 'file-out':
                continue  # which takes the link away
            sock.sendall(f'{method} /api/workspaces/work/files/{path}{query} HTTP/1.1\r\nHost: '
                         f'localhost:{server.port}\r\nContent-Length: {len(body)}\r\n\r\n'.encode() + body)
            with sock.makefile('rb') as file:
                status, headers = read_head(file)
                told = file.read(int(headers['content-length'])) if method != 'HEAD' else b''
            assert status in (400, 404) and b'root:' not in told, (method, path, status, told)
    assert shell(docker_client, server.container, 'md5sum /etc/passwd; ls /etc', user='root') == before
    answer = files(server, 'POST', '/a', json={'operation': 'copy', 'to': '/tmp/stolen'})
    assert refusal(answer) == (400, 'VALIDATION_ERROR')


def test_links_inside_are_followed(server, docker_client):
    inside(server, docker_client, 'mkdir -p real && echo yes >real/file && '
                                  'ln -sfn /workspace/work/real absolute && '
                                  'ln -sfn ../work/./real/../real around && ln -sfn loop loop')
    assert content(server, '/absolute/file') == content(server, '/around/file') == b'yes\n'
    put(server, '/around/file', b'new')
    assert content(server, '/real/file') == b'new'
    assert refusal(files(server, 'GET', '/loop/file')) == (400, 'VALIDATION_ERROR')


@pytest.mark.parametrize(('entries', 'wanted'), [
    ([file_entry('../../escaped')], 400), ([file_entry('a/../../escaped')], 400),
    ([('link', b'', tarfile.SYMTYPE, '/tmp'), file_entry('link/escaped')], 400),
    ([('link', b'', tarfile.SYMTYPE, '../../../tmp'), file_entry('link/escaped')], 400),
    ([('hard', b'', tarfile.LNKTYPE, '../../../etc/passwd')], 400),
    ([('hard', b'', tarfile.LNKTYPE, '/etc/passwd')], 404),
    ([('pipe', b'', tarfile.FIFOTYPE, '')], 409), ([('device', b'', tarfile.CHRTYPE, '')], 409),
    ([file_entry('/tmp/escaped')], 200)])
def test_no_tar_writes_outside(server, docker_client, entries, wanted):
    answer = files(server, 'PUT', f'/tar-{wanted}?extract=tar', data=make_tar(*entries))
    assert answer.status_code == wanted, answer.text
    assert shell(docker_client, server.container, 'ls /tmp/escaped /workspace/escaped /escaped',
                 user='root')[0] != 0


def test_a_tar_does_not_write_through_a_link_that_was_there(server, docker_client):
    inside(server, docker_client, 'mkdir -p target && ln -sfn /tmp target/way')
    answer = files(server, 'PUT', '/target?extract=tar', data=make_tar(file_entry('way/escaped')))
    assert refusal(answer) == (400, 'VALIDATION_ERROR')
    assert shell(docker_client, server.container, 'ls /tmp/escaped')[0] != 0


def test_nothing_hangs_at_what_is_no_file(server, docker_client):
    inside(server, docker_client, 'mkdir -p odd && mkfifo odd/pipe && python3 -c "import socket; '
                                  "socket.socket(socket.AF_UNIX).bind('odd/socket')\"")
    for name in ('pipe', 'socket'):
        assert refusal(files(server, 'GET', f'/odd/{name}')) == (409, 'NOT_A_FILE')
        assert refusal(files(server, 'PUT', f'/odd/{name}', data=b'x')) == (409, 'FILE_EXISTS')
        assert refusal(change(server, f'/odd/{name}', 'copy', to='odd/copy')) == (409, 'NOT_A_FILE')
    assert files(server, 'GET', '/odd?archive=tar').status_code == 200
    assert change(server, '/odd', 'copy', to='odd-copy').status_code == 201
    assert files(server, 'DELETE', '/odd?recursive').status_code == 200


def test_odd_names_are_names(server, docker_client):
    for name in ('new%0Aline', 'tab%09', '%20', 'quote"\'', 'q%3Fm', '%23', 'ä', '%25', '-rf', '*', 'a%5Cb'):
        put(server, f'/names/{name}', name.encode())
        assert content(server, f'/names/{name}') == name.encode()
    assert {'new\nline', 'tab\t', ' ', 'q?m', '#', '%', '-rf', '*', 'a\\b'} <= set(names(server, '/names'))
    odd = f'http://127.0.0.1:{server.port}/api/workspaces/work/files/names/%FF'
    assert requests.get(odd, timeout=10).status_code == 404
    assert refusal(files(server, 'PUT', '/' + 'x' * 300, data=b'')) == (404, 'FILE_NOT_FOUND')
    for name in ('new%0Aline', '-rf', '*'):
        assert change(server, f'/names/{name}', 'copy', to='names/copied').status_code == 201
        assert files(server, 'DELETE', '/names/copied').status_code == 200


def test_many_writers_of_one_file_leave_one_of_their_texts(server):
    bodies = [bytes([65 + number]) * 100_000 for number in range(8)]
    concurrently(*[lambda body=body: put(server, '/contested', body) for body in bodies])
    assert content(server, '/contested') in bodies


def test_a_folder_with_many_names_is_listed_whole(server, docker_client):
    inside(server, docker_client, 'mkdir -p crowd && cd crowd && seq 20000 | xargs touch')
    assert len(names(server, '/crowd')) == 20_000
    files(server, 'DELETE', '/crowd?recursive')


def test_it_all_works_on_a_stopped_workspace(server, docker_client):
    server.running('halted')
    put(server, '/before', b'here', workspace='halted')
    server.call('POST', '/api/workspaces/halted/stop')
    server.wait_status('halted', 'stopped')
    assert content(server, '/before', workspace='halted') == b'here'
    put(server, '/meanwhile', b'new', workspace='halted')
    assert {'before', 'meanwhile'} <= set(names(server, workspace='halted'))
    assert files(server, 'GET', '?archive=tar', workspace='halted').status_code == 200
    with requests.get(f'http://127.0.0.1:{server.port}/api/workspaces/halted/files/before', stream=True,
                      timeout=30):
        assert server.call('POST', '/api/workspaces/halted/start').status_code == 202
        server.wait_status('halted', 'running')
    assert content(server, '/meanwhile', workspace='halted') == b'new'
    assert not docker_client.api.containers(all=True, filters={'label': [
        'agentbackend.helper', f'agentbackend.instance={server.instance}']})
    assert server.call('DELETE', '/api/workspaces/halted').json()['data']['deleted']


def test_what_is_not_there_is_not_found(server):
    assert refusal(files(server, 'GET', '/nowhere')) == (404, 'FILE_NOT_FOUND')
    assert refusal(files(server, 'GET', '', workspace='nowhere')) == (404, 'WORKSPACE_NOT_FOUND')
    assert refusal(change(server, '/nowhere', 'move', to='x')) == (404, 'FILE_NOT_FOUND')
