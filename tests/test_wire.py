"""What goes over the wire, byte for byte: lines of logs, frames of WebSockets, and what a client may not
do."""
import base64
import contextlib
import json
import os
import random
import signal
import socket
import struct
import time

import gevent
import pytest
import websockets.exceptions
import websockets.sync.client
from conftest import Served
from helpers import check_fairness, memory_of, reset_peak, seconds_of
from streaming import BINARY, CLOSE, PING, PONG, TEXT, Connection, Ws, connect, frame, read_head

from _agentbackend import wire
from _agentbackend.dockerlog import MAX_LINE, STDERR, STDOUT, LogDamaged, LogLines, parse_stamp, stamp_of
from _agentbackend.positions import Cursor, LogPosition
from _agentbackend.wire import text_frame, unmask

LARGEST = wire.Handler.max_message  # bytes
STAMP = '2026-11-23T20:56:17.{:09d}Z'
SECOND = 1795467377 * 10**9  # of STAMP


def stamp(nanoseconds):
    return STAMP.format(nanoseconds).encode()


def framed(stream, nanoseconds, content):
    """Return one frame of the engine's log format."""
    payload = stamp(nanoseconds) + b' ' + content
    return bytes([stream, 0, 0, 0]) + len(payload).to_bytes(4, 'big') + payload


def long_line(stream, nanoseconds, content):
    """Return the frames of a line as the engine cuts it: 16 KB each, and the stamp of the first in all of
    them."""
    return b''.join(framed(stream, nanoseconds, content[start:start + 16384])
                    for start in range(0, len(content), 16384))


def lines_of(data, *, tty=False, step=None):
    """Return the lines of a stream that comes in parts of `step` bytes."""
    parser, found = LogLines(tty), []
    for start in range(0, len(data), step or max(1, len(data))):
        found += parser.feed(data[start:start + (step or len(data))])
    return in_nanoseconds(found + parser.end())


def in_nanoseconds(lines):
    return [(stream, parse_stamp(at), text) for stream, at, text in lines]


def test_the_stamp_is_read_to_the_nanosecond():
    assert parse_stamp(STAMP.format(502392174)) == SECOND + 502392174


# Log lines


def test_frames_may_be_cut_anywhere():
    data = framed(1, 1, b'one\n') + framed(2, 2, b'two\n') + framed(1, 3, '€ 😀\n'.encode())
    data += framed(1, 4, b'\n') + framed(2, 5, b'last')
    wanted = [(STDOUT, SECOND + 1, 'one'), (STDERR, SECOND + 2, 'two'), (STDOUT, SECOND + 3, '€ 😀'),
              (STDOUT, SECOND + 4, ''), (STDERR, SECOND + 5, 'last')]
    for cut in range(len(data) + 1):
        parser = LogLines(False)
        assert in_nanoseconds(parser.feed(data[:cut]) + parser.feed(data[cut:]) + parser.end()) == wanted, cut
    assert lines_of(data, step=1) == wanted


@pytest.mark.parametrize('size', [16383, 16384, 16385, 32768, 32769, 100_000, MAX_LINE])
def test_a_long_line_in_several_frames_is_one(size):
    content = random.Random(size).randbytes(size).hex()[:size].encode() + b'\n'
    data = framed(1, 1, b'before\n') + long_line(1, 2, content) + framed(1, 3, b'after\n')
    for step in (None, 1000, 16384):
        assert lines_of(data, step=step) == [
            (1, SECOND + 1, 'before'), (1, SECOND + 2, content[:-1].decode()), (1, SECOND + 3, 'after')]


def test_long_lines_of_both_streams_may_be_mixed():
    out, err = b'o' * 40_000 + b'\n', b'e' * 40_000 + b'\n'
    parts = [(1, 1, out), (2, 2, err)]
    data = b''.join(framed(stream, number, content[start:start + 16384]) for start in range(0, 40_001, 16384)
                    for stream, number, content in parts)
    assert lines_of(data) == [(1, SECOND + 1, 'o' * 40_000), (2, SECOND + 2, 'e' * 40_000)]


@pytest.mark.parametrize(('tty', 'data'), [
    (False, b'\3\0\0\0\0\0\0\x26Error grabbing logs: invalid character'),
    (True, b'Error grabbing logs: invalid character\n')])
def test_what_the_engine_says_of_a_damaged_log_is_no_line(tty, data):
    parser = LogLines(tty)
    with pytest.raises(LogDamaged, match='Error grabbing logs: invalid character'):
        parser.feed(data)


def test_a_line_of_a_terminal_without_an_end_takes_no_memory():
    parser = LogLines(True)
    parser.feed(STAMP.format(1).encode() + b' ')
    for _ in range(200):
        parser.feed(b'12 %\r' * 20_000)
        assert len(parser._buffer) < MAX_LINE + 200
    (_, stamp, text), = in_nanoseconds(parser.feed(b'done\n'))
    assert stamp == SECOND + 1 and len(text) == MAX_LINE


def test_a_character_may_be_cut_between_two_frames():
    content = ('x' * 16383 + '😀' + 'y' * 16380 + '€').encode() + b'\n'
    assert lines_of(long_line(1, 1, content)) == [(1, SECOND + 1, content[:-1].decode())]


def test_a_line_over_the_limit_is_cut_and_costs_no_more():
    content = b'x' * (3 * MAX_LINE) + b'\n'
    parser = LogLines(False)
    found = in_nanoseconds(parser.feed(long_line(1, 1, content)))
    assert [(number, len(text)) for _, number, text in found] == [(SECOND + 1, MAX_LINE)]
    parser.feed(long_line(1, 2, content[:-1]))
    assert len(parser._parts[1][1]) <= MAX_LINE + 16384
    assert lines_of(framed(1, 3, b'next\n')) == [(1, SECOND + 3, 'next')]


def test_what_is_no_utf_8_is_replaced_and_everything_else_left_alone():
    contents = (b'bad \xff\xfe\n', b'\x1b[31mred\x1b[0m\n', b'a\0b\n', b'10%\r20%\r\n', b' two  spaces \n')
    data = b''.join(framed(1, number, content) for number, content in enumerate(contents))
    assert [text for _, _, text in lines_of(data)] == [
        'bad \ufffd\ufffd', '\x1b[31mred\x1b[0m', 'a\0b', '10%\r20%', ' two  spaces ']


def test_a_line_without_an_end_is_told_at_the_end_or_before_the_next():
    assert lines_of(framed(1, 1, b'no end')) == [(1, SECOND + 1, 'no end')]
    found = lines_of(framed(1, 1, b'no end') + framed(1, 2, b'next\n'))
    assert found == [(1, SECOND + 1, 'no end'), (1, SECOND + 2, 'next')]
    assert LogLines(False).end() == LogLines(True).end() == []


def test_a_frame_that_is_cut_off_is_not_told():
    assert lines_of(framed(1, 1, b'whole\n') + framed(1, 2, b'cut off\n')[:-3]) == [(1, SECOND + 1, 'whole')]


def test_with_a_terminal_there_are_no_frames():
    lines = (b' one\r\n', ' \x1b[1m€\x1b[0m\rover\r\n'.encode(), b' \r\n', b' > ')
    data = b''.join(stamp(number) + line for number, line in enumerate(lines, 1))
    wanted = [(1, SECOND + 1, 'one'), (1, SECOND + 2, '\x1b[1m€\x1b[0m\rover'), (1, SECOND + 3, ''),
              (1, SECOND + 4, '> ')]
    for step in (None, 1, 7):
        assert lines_of(data, tty=True, step=step) == wanted


def test_with_a_terminal_the_stamps_within_a_long_line_are_taken_out():
    content = b'x' * 16384 + stamp(1) + b' ' + b'y' * 16384 + stamp(1) + b' ' + b'z\r\n'
    assert lines_of(stamp(1) + b' ' + content, tty=True,
                    step=1000) == [(1, SECOND + 1, 'x' * 16384 + 'y' * 16384 + 'z')]


# Positions


def read_again(log, position, dice):
    """Give the lines of a log as the engine does when it is asked from a position on: inclusive, and some of
    them twice after a rotation."""
    found = [line for line in log if line[1] >= position.since()]
    start, end = sorted(dice.randrange(len(found) + 1) for _ in range(2))
    repeated = found[start:end]
    # A rotation repeats lines that were read, and goes on. One that began with the last line of a stream
    # could not be told from a second line of the same nanosecond; a file has more lines than one.
    if dice.random() < 0.5 and all(min(stamps) < max(stamps) for stream in (STDOUT, STDERR)
                                   if (stamps := [line[1] for line in repeated if line[0] == stream])):
        found = found[:end] + found[start:]
    return found


@pytest.mark.parametrize('seed', range(40))
def test_reading_again_from_any_position_gives_each_line_once(seed):
    """Two streams, mixed in any order, each in the order of its stamps, of which some are equal; cut off
    again and again."""
    for turn in range(10):
        dice = random.Random(seed * 1000 + turn)
        now, streams = {STDOUT: 5 * 10**9, STDERR: 5 * 10**9}, {STDOUT: [], STDERR: []}
        log = []
        for number in range(dice.randrange(1, 120)):
            stream = dice.choice((STDOUT, STDOUT, STDERR)) if turn % 3 else STDOUT
            now[stream] += dice.choice((0, 1, 1, 1000)) if streams[stream] else 1
            streams[stream].append(number)
            log.append((stream, now[stream], number))
        log.sort(key=lambda line: line[1] + dice.randrange(500))
        for stream, numbers in streams.items():  # within a stream the order is that of the stamps
            order = iter(sorted((line for line in log if line[0] == stream),
                                key=lambda line: (line[1], line[2])))
            log = [next(order) if line[0] == stream else line for line in log]
            assert [line[2] for line in log if line[0] == stream] == numbers
        position, told, size = LogPosition(), [], 0
        while size < len(log) or len(told) < len(log):
            size = min(len(log), size + dice.randrange(1, 40))  # the log grows
            lines = read_again(log[:size], position, dice)
            taken = dice.randrange(len(lines) + 1) if size < len(log) else len(lines)
            told += [line[1:] for line in position.advance([(stream, stamp_of(at), number)
                                                            for stream, at, number in lines[:taken]])]
            position = LogPosition.parse(str(position)) if dice.random() < 0.7 else position.copy()
        for stream, numbers in streams.items():
            assert [line[2] for line in told if line[0] == stream] == numbers, (seed, turn)


def test_a_position_survives_being_written_down():
    dice = random.Random(3)
    for _ in range(500):
        one = LogPosition((stamp_of(dice.randrange(2**62)), dice.choice((1, 1, 2, 500))),
                          dice.choice((('', 0), (stamp_of(dice.randrange(2**62)), 1))))
        assert str(LogPosition.parse(str(one))) == str(one) and LogPosition.parse(str(one))._last == one._last


@pytest.mark.parametrize('text', ['', '1', '1-', '-1', '1-2-3', '1+-2', 'g-1', '1-2+', '1--2', ' 1-2',
                                  '1-2\n', '1' * 18 + '-1', '1-2+123456789', '0x1-2'])
def test_nonsense_is_no_position(text):
    with pytest.raises(ValueError, match='is no position'):
        LogPosition.parse(text)


def test_an_id_of_a_quiet_workspace_has_at_most_forty_bytes():
    log = LogPosition((STAMP.format(1), 1), (STAMP.format(2), 1))
    assert len(str(Cursor(own=99_999, begun=999, log=log))) <= 40


def test_a_silent_stream_is_asked_for_a_little_earlier():
    assert LogPosition().since() == 0
    assert LogPosition((stamp_of(5 * 10**9), 1)).since() == 4 * 10**9
    assert LogPosition((stamp_of(5 * 10**9), 1), (stamp_of(6 * 10**9), 1)).since() == 5 * 10**9


# Frames


@pytest.mark.parametrize(('size', 'head'), [
    (0, b'\x81\0'), (1, b'\x81\1'), (125, b'\x81\x7d'), (126, b'\x81\x7e\0\x7e'), (127, b'\x81\x7e\0\x7f'),
    (65535, b'\x81\x7e\xff\xff'), (65536, b'\x81\x7f\0\0\0\0\0\1\0\0'),
    (200_000, b'\x81\x7f\0\0\0\0\0\3\x0d\x40')])
def test_frames_have_the_right_length(size, head):
    data = os.urandom(size)
    assert text_frame(data) == head + data


@pytest.mark.parametrize('size', [0, 1, 2, 3, 4, 5, 1000, 65537])
def test_unmasking_is_xor(size):
    data, mask = os.urandom(size), os.urandom(4)
    assert unmask(data, mask) == bytes(byte ^ mask[number % 4] for number, byte in enumerate(data))
    assert unmask(unmask(data, mask), mask) == data


# WebSockets, on a server whose engine is not there


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp('wire')
    (folder / 'templates' / 'tiny').mkdir(parents=True)
    (folder / 'templates' / 'tiny' / 'Dockerfile').write_text('FROM scratch\n')
    served = Served(folder, folder / 'templates', DOCKER_HOST=f'unix://{folder}/no.sock',
                    ALLOWED_ORIGINS='https://app.example', ALLOWED_HOSTS='dev.example')
    yield served.start(connected=False)
    assert served.stop() == 0
    assert 'Traceback' not in served.log.read_text(), served.log.read_text()[-3000:]


@pytest.fixture
def ws(server):
    with Ws(server) as stream:
        assert stream.status == 101
        yield stream


def is_alive(stream):
    """Tell whether the connection still answers."""
    stream.send(type='ping')
    opcode, payload = stream.read_frame()
    return opcode == TEXT and json.loads(payload)['type'] == 'pong'


def ends(stream, code):
    """See that the server closes with a code, and then really ends the connection."""
    found = stream.closing()
    assert found[0] == code, found
    stream.send_frame(struct.pack('!H', code), CLOSE)
    assert stream.file.read() == b''


def test_the_handshake_is_that_of_the_rfc(server):
    with Connection(server, '/agent/ws', {'Upgrade': 'WebSocket', 'Connection': 'keep-alive, Upgrade',
                                          'Sec-WebSocket-Version': '13',
                                          'Sec-WebSocket-Key': 'dGhlIHNhbXBsZSBub25jZQ=='}, 5) as stream:
        assert stream.status == 101
        assert stream.headers['sec-websocket-accept'] == 's3pPLMBiTxaQ9kYGzzhZRbK+xOo='
        assert stream.headers['upgrade'].lower() == 'websocket'
        assert stream.headers['connection'].lower() == 'upgrade'


@pytest.mark.parametrize(('path', 'headers', 'status', 'code'), [
    ('/agent/other', {}, 404, 'NOT_FOUND'), ('/agent/ws/', {}, 404, 'NOT_FOUND'),
    ('/api/workspaces', {}, 200, None),
    ('/agent/ws', {'Origin': 'https://evil.example'}, 403, 'FORBIDDEN'),
    ('/agent/ws', {'Origin': 'null'}, 403, 'FORBIDDEN'),
    ('/agent/ws', {'Host': 'evil.example'}, 403, 'FORBIDDEN'),
    ('/agent/ws', {'Sec_WebSocket_Key': 'short'}, 426, 'VALIDATION_ERROR'),
    ('/agent/ws', {'Sec_WebSocket_Key': None}, 426, 'VALIDATION_ERROR'),
    ('/agent/ws', {'Sec_WebSocket_Key': '!' * 24}, 426, 'VALIDATION_ERROR'),
    ('/agent/ws', {'Sec_WebSocket_Version': '8'}, 426, 'VALIDATION_ERROR'),
    ('/agent/ws', {'Sec_WebSocket_Version': None}, 426, 'VALIDATION_ERROR'),
    ('/agent/ws', {'Upgrade': 'h2c'}, 426, 'VALIDATION_ERROR'),
    ('/agent/ws', {'Connection': 'keep-alive'}, 426, 'VALIDATION_ERROR')], ids=repr)
def test_what_is_not_granted_gets_an_http_answer(server, path, headers, status, code):
    with connect(server) as sock, sock.makefile('rb') as file:
        fields = {'Host': 'localhost', 'Upgrade': 'websocket', 'Connection': 'Upgrade',
                  'Sec-WebSocket-Version': '13',
                  'Sec-WebSocket-Key': base64.b64encode(os.urandom(16)).decode(),
                  **{name.replace('_', '-'): value for name, value in headers.items()}}
        sock.sendall(f'GET {path} HTTP/1.1\r\n'.encode()
                     + b''.join(f'{name}: {value}\r\n'.encode() for name, value in fields.items()
                                if value is not None) + b'\r\n')
        found, answered = read_head(file)
        assert found == status and answered['content-type'] == 'application/json'
        body = json.loads(file.read(int(answered['content-length'])))
        assert body.get('code') == code


def test_http_1_0_is_no_websocket(server):
    with connect(server) as sock, sock.makefile('rb') as file:
        sock.sendall(b'GET /agent/ws HTTP/1.0\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: '
                     b'Upgrade\r\nSec-WebSocket-Version: 13\r\n'
                     b'Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n')
        assert read_head(file)[0] == 426
    assert 'Traceback' not in server.log.read_text()


@pytest.mark.parametrize('headers', [{'Origin': 'https://app.example'}, {'Origin': 'http://localhost:5173'},
                                     {'Origin': 'http://127.0.0.1:1'}, {'Host': 'dev.example'}], ids=repr)
def test_who_is_allowed_comes_in(server, headers):
    with Ws(server, **headers) as stream:
        assert stream.status == 101 and is_alive(stream)


BROKEN = {
    'unmasked': (frame(b'{"type":"ping"}', masked=False), 1002),
    'reserved-bit-1': (frame(b'x', flags=4), 1002), 'reserved-bit-3': (frame(b'x', flags=1), 1002),
    'reserved-opcode-3': (frame(b'x', 3), 1002), 'reserved-opcode-11': (frame(b'x', 11), 1002),
    'fragmented-ping': (frame(b'x', PING, fin=False), 1002),
    'fragmented-close': (frame(b'', CLOSE, fin=False), 1002), 'long-ping': (frame(b'x' * 126, PING), 1002),
    'long-close': (frame(b'\3\xe8' + b'x' * 124, CLOSE), 1002),
    'stray-continuation': (frame(b'x', 0), 1002),
    'text-within-text': (frame(b'x', fin=False) + frame(b'y'), 1002),
    'not-utf-8': (frame(b'"\xff"'), 1007),
    'not-utf-8-in-a-fragment': (frame(b'"', fin=False) + frame(b'\xc0\xaf"', 0), 1007),
    'half-a-character': (frame('€'.encode()[:2]), 1007), 'surrogate': (frame(b'\xed\xa0\x80'), 1007),
    'close-reason-not-utf-8': (frame(b'\3\xe8\xff', CLOSE), 1007),
    '4-gib': (frame(b'', length=2**32), 1009), 'all-of-64-bits': (frame(b'', length=2**63 - 1), 1009),
    'one-byte-too-many': (frame(b'', length=LARGEST + 1), 1009),
    'close-of-one-byte': (frame(b'\3', CLOSE), 1002),
    **{f'close-{code}': (frame(struct.pack('!H', code), CLOSE), 1002)
       for code in (0, 999, 1004, 1005, 1006, 1015, 1016, 2000, 2999, 5000, 65535)}}


@pytest.mark.parametrize(('sent', 'code'), BROKEN.values(), ids=BROKEN.keys())
def test_what_breaks_the_protocol_is_closed_with_its_code(ws, sent, code):
    ws.socket.sendall(sent)
    ends(ws, code)


@pytest.mark.parametrize(('payload', 'code', 'reason'),
                         [(b'\3\xe8', 1000, ''), (b'\x0f\xa1bye', 4001, 'bye'), (b'', None, ''),
                          (b'\3\xe9' + '€'.encode() * 41, 1001, '€' * 41),
                          (b'\x0b\xb8', 3000, ''), (b'\3\xf3', 1011, '')])
def test_a_close_is_answered_with_its_own_code(ws, payload, code, reason):
    ws.send_frame(payload, CLOSE)
    assert ws.closing() == (code, reason)
    assert ws.file.read() == b''


@pytest.mark.parametrize('payload', [b'', b'x', os.urandom(125)], ids=len)
def test_a_ping_is_answered_with_its_own_payload(ws, payload):
    ws.send_frame(payload, PING)
    assert ws.read_frame() == (PONG, payload)
    ws.send_frame(payload, PONG)  # one that nobody asked for
    assert is_alive(ws)


def test_a_message_may_come_in_fragments_with_pings_between_them(ws):
    text = json.dumps({'type': 'subscribe', 'workspaceId': '€😀'}, ensure_ascii=False).encode()
    for number in range(len(text)):
        ws.send_frame(text[number:number + 1], 0 if number else TEXT, fin=number == len(text) - 1)
        if number % 7 == 0:
            ws.send_frame(bytes([number]), PING)
            assert ws.read_frame() == (PONG, bytes([number]))
    assert json.loads(ws.read_frame()[1])['workspaceId'] == '€😀'
    assert is_alive(ws)


def test_a_binary_message_is_taken_as_text(ws):
    ws.send_frame(b'{"type": "ping"}', BINARY)
    assert json.loads(ws.read_frame()[1])['type'] == 'pong'


def test_many_messages_in_one_packet_and_one_message_in_many(ws):
    ws.socket.sendall(frame(b'{"type": "ping"}') * 200)
    assert [json.loads(ws.read_frame()[1])['type'] for _ in range(200)] == ['pong'] * 200
    for byte in frame(b'{"type": "ping"}'):
        ws.socket.sendall(bytes([byte]))
    assert json.loads(ws.read_frame()[1])['type'] == 'pong'


def test_a_message_of_the_largest_size_is_taken(ws):
    ws.send_frame(b' ' * (LARGEST - 16) + b'{"type": "ping"}')
    assert json.loads(ws.read_frame()[1])['type'] == 'pong'


def test_bombs_take_no_memory(server):
    reset_peak(server)
    before = memory_of(server, 'VmHWM')
    for start, rest in ((frame(b'', length=2**32), b'x' * 65536), (b'', frame(b'x' * 60_000, 0, fin=False))):
        with Ws(server) as stream, contextlib.suppress(OSError):  # it may be thrown out before the end
            stream.socket.sendall(start or frame(b'x', fin=False))
            for _ in range(500):
                stream.socket.sendall(rest)
    assert memory_of(server, 'VmHWM') - before < 8 * 2**20
    with Ws(server) as stream:
        stream.socket.sendall(frame(b'x', fin=False) + frame(b'x' * 60_000, 0, fin=False) * 20)
        assert stream.closing()[0] == 1009


def test_who_leaves_without_a_word_is_no_trouble(server):
    for sent in (b'', b'\x81', frame(b'{"type": "ping"}')[:9], frame(b'x', fin=False)):
        with Ws(server) as stream:
            stream.socket.sendall(sent)
            stream.cut()
    with Ws(server) as stream:
        assert is_alive(stream)


def test_sigterm_says_1001(tmp_path, server):
    (tmp_path / 'templates' / 'tiny').mkdir(parents=True)
    (tmp_path / 'templates' / 'tiny' / 'Dockerfile').write_text('FROM scratch\n')
    served = Served(tmp_path, tmp_path / 'templates',
                    DOCKER_HOST=f'unix://{tmp_path}/no.sock').start(connected=False)
    try:
        with Ws(served) as stream:
            assert is_alive(stream)
            served.process.send_signal(signal.SIGTERM)
            assert stream.closing() == (1001, 'the server is stopping')
        assert served.process.wait(5) == 0
    finally:
        served.stop()


# Sockets of ours, on a pair of them


@pytest.fixture
def pair():
    """One end of a connection as the server has it, and the other as a client that reads frames."""
    theirs, ours = socket.socketpair()

    class Reader(Ws):
        def __init__(self):
            self.socket, self.file = theirs, theirs.makefile('rb')

    class handler:  # noqa: N801
        socket, max_message, server, rfile = ours, LARGEST, None, ours.makefile('rb')

    theirs.settimeout(15)
    yield wire.Socket({}, wire.Stream(handler), handler), Reader()
    theirs.close()
    ours.close()


def test_many_senders_never_tear_a_frame(pair):
    sender, reader = pair
    def send(letter):
        for _ in range(10):
            sender.send_frame(letter * 300_000, TEXT)
    jobs = [gevent.spawn(send, letter) for letter in 'abcd']
    found = [reader.read_frame()[1] for _ in range(40)]
    gevent.joinall(jobs, raise_error=True)
    assert all(len(set(payload)) == 1 and len(payload) == 300_000 for payload in found)
    assert sorted(payload[:1] for payload in found) == sorted([b'a', b'b', b'c', b'd'] * 10)


def test_a_peer_that_does_not_read_is_dropped_after_a_while(pair, monkeypatch):
    sender, _ = pair
    monkeypatch.setattr(wire, 'SEND_TIMEOUT', 0.3)
    begun = time.monotonic()
    with pytest.raises(wire.WebSocketError):
        sender.send_frame('x' * 10_000_000, TEXT)
    assert 0.2 < time.monotonic() - begun < 8 and sender.closed  # ten seconds are the default


def test_a_peer_that_reads_slowly_is_not(pair, monkeypatch):
    sender, reader = pair
    monkeypatch.setattr(wire, 'SEND_TIMEOUT', 0.5)
    reader.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    job = gevent.spawn(sender.send_frame, 'x' * 3_000_000, TEXT)
    got = 0
    begun = time.monotonic()
    while got < 3_000_010:
        got += len(reader.socket.recv(65536))
        gevent.sleep(0.025)
    job.get()
    assert time.monotonic() - begun > 0.6 and not sender.closed


# Floods


@pytest.mark.parametrize(('first', 'flood'), [
    (b'', frame(b'', PONG)), (frame(b'', fin=False), frame(b'', 0, fin=False)), (b'', frame(b'nonsense')),
    (b'', frame(b' ' * (LARGEST - 16) + b'{"type": "ping"}'))],
    ids=['pongs', 'fragments', 'nonsense', 'large'])
def test_a_flood_of_one_client_leaves_the_others_their_turn(server, first, flood):
    def call():
        assert server.call('GET', '/api/workspaces').status_code == 200
    alone, waits, rest = [seconds_of(call) for _ in range(20)], [], b''
    with Ws(server) as stream:
        stream.socket.sendall(first)
        stream.socket.setblocking(False)
        for _ in range(8):
            for _ in range(200):  # as much as there is room for
                with contextlib.suppress(BlockingIOError):
                    rest = rest or flood * (65536 // len(flood) + 1)
                    rest = rest[stream.socket.send(rest):]
            waits.append(seconds_of(call))
    check_fairness(waits, alone)


# As others see it


def test_the_websockets_package_sees_the_real_close_codes(server):
    uri = f'ws://localhost:{server.port}/agent/ws'
    with websockets.sync.client.connect(uri) as client:
        client.send('{"type": "ping"}')
        assert json.loads(client.recv(5))['type'] == 'pong'
        client.ping(b'mark').wait(5)
        client.close(4001, 'bye')
        assert (client.protocol.close_rcvd.code, client.protocol.close_rcvd.reason) == (4001, 'bye')
    for sent, code in (('x' * (LARGEST + 1), 1009), (b'"\xff"', 1007)):
        with websockets.sync.client.connect(uri) as client:
            client.send(sent, text=True)
            with pytest.raises(websockets.exceptions.ConnectionClosedError) as caught:
                client.recv(5)
            assert caught.value.rcvd.code == code
    with pytest.raises(websockets.exceptions.InvalidStatus) as caught:
        websockets.sync.client.connect(uri, origin='https://evil.example').__enter__()
    assert caught.value.response.status_code == 403
