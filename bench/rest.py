"""Requests per second over one kept connection and over 16, against bare pywsgi that answers two bytes."""
import contextlib
import socket
import subprocess
import sys
import time

import gevent

from . import ROOT
from .common import Http, turn_about

TITLE = 'Requests'
SECONDS = 0.5  # for which each is asked in a turn
TURNS = 6
BARE = """
from gevent import monkey; monkey.patch_all()
import socket, gevent.pywsgi
listener = socket.create_server(('127.0.0.1', 0), backlog=256)
listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, {no_delay})
print(listener.getsockname()[1], flush=True)
def answer(environ, start_response):
    start_response('200 OK', [('Content-Type', 'text/plain'), ('Content-Length', '2')])
    return [b'ok']
gevent.pywsgi.WSGIServer(listener, answer, log=None, error_log=None).serve_forever()
"""


def measure(bench, section):
    with bench.served() as server, bare() as port, bare(no_delay=False) as slow_port:
        Http(server.port).running('work', template='tiny')
        cases = {'bare': (port, '/'), 'without': (slow_port, '/'),
                 'GET /api/workspaces': (server.port, '/api/workspaces'),
                 'GET /api/workspaces/work': (server.port, '/api/workspaces/work'),
                 'GET /health': (server.port, '/health')}
        for connections in (1, 16):
            found = dict(zip(cases, turn_about(TURNS, *(
                lambda case=case, connections=connections: rate(*case, connections)
                for case in cases.values())), strict=True))
            on = f"{connections} connection{'s' * (connections > 1)}"
            for name, rates in list(found.items())[2:]:
                section.compare(f'{name}, {on}', rates, 'bare pywsgi', found['bare'], unit='/s',
                                head=connections == 16 and name != 'GET /health')
            section.compare(f'bare pywsgi without TCP_NODELAY, {on}', found['without'], 'bare pywsgi',
                            found['bare'], unit='/s')


@contextlib.contextmanager
def bare(*, no_delay=True):
    """Give the port of a server that answers as little as WSGI allows, in a process of its own."""
    with subprocess.Popen([sys.executable, '-c', BARE.format(no_delay=int(no_delay))], cwd=ROOT,
                          stdout=subprocess.PIPE, text=True) as process:
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


def rate(port, path, connections=1, seconds=SECONDS):
    """Return requests per second."""
    until = time.monotonic() + seconds
    clients = [gevent.spawn(ask, port, path, until) for _ in range(connections)]
    return sum(one.get() for one in clients) / seconds


def ask(port, path, until):
    """Ask one request after another on one connection; return how many were answered."""
    count, request = 0, f'GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n'.encode()
    with socket.create_connection(('127.0.0.1', port), 30) as sock:
        while time.monotonic() < until:
            sock.sendall(request)
            received = b''
            while b'\r\n\r\n' not in received:
                received += sock.recv(65536)
            head, _, body = received.partition(b'\r\n\r\n')
            assert b' 200 ' in head[:20], head
            left = int(head.lower().partition(b'content-length: ')[2].split()[0]) - len(body)
            while left > 0:
                left -= len(sock.recv(65536))
            count += 1
    return count
