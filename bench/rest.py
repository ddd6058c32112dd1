"""Requests per second over one kept connection and over 16, in ratios: this machine's own numbers mean little
elsewhere.

    python bench/rest.py [seconds per cell]

Bare pywsgi answers two bytes; the backend answers GET /api/workspaces. Each is served with TCP_NODELAY and
without.
"""
from gevent import monkey; monkey.patch_all()  # noqa: E702, I001 - before anything imports ssl

import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gevent  # noqa: E402
import gevent.pywsgi  # noqa: E402

import agentbackend  # noqa: E402

REQUEST = b'GET /api/workspaces HTTP/1.1\r\nHost: localhost\r\n\r\n'


def bare(environ, start_response):
    """Answer as little as WSGI allows."""
    start_response('200 OK', [('Content-Type', 'text/plain'), ('Content-Length', '2')])
    return [b'ok']


def start(name, no_delay):
    """Serve one of the two applications in a process of its own; return its number and port."""
    listener = socket.create_server(('127.0.0.1', 0), backlog=256)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, int(no_delay))
    process = gevent.fork()
    if process:
        port = listener.getsockname()[1]
        listener.close()
        return process, port
    app = bare
    if name == 'backend':
        config = agentbackend.Config.from_env({'STATE_DIR': tempfile.gettempdir()})
        app = agentbackend.make_app(agentbackend.make_backend(config))
    gevent.pywsgi.WSGIServer(listener, app, log=None, error_log=None).serve_forever()


def client(port, until):
    """Ask one request after another on one connection; return how many were answered."""
    count = 0
    with socket.create_connection(('127.0.0.1', port)) as sock:
        while time.monotonic() < until:
            sock.sendall(REQUEST)
            received = b''
            while b'\r\n\r\n' not in received:
                received += sock.recv(65536)
            head, _, body = received.partition(b'\r\n\r\n')
            left = int(head.lower().partition(b'content-length: ')[2].split()[0]) - len(body)
            while left > 0:
                left -= len(sock.recv(65536))
            count += 1
    return count


def measure(name, no_delay, seconds):
    """Return requests per second with 1 and with 16 connections."""
    process, port = start(name, no_delay)
    client(port, time.monotonic() + 0.2)  # until it is warm
    rates = []
    for connections in (1, 16):
        until = time.monotonic() + seconds
        clients = [gevent.spawn(client, port, until) for _ in range(connections)]
        rates.append(sum(one.get() for one in clients) / seconds)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return rates


def main():
    """Measure the four servers and print their rates, and each as a ratio to bare pywsgi with TCP_NODELAY."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 2
    cells = {(name, no_delay): measure(name, no_delay, seconds) for name in ('bare', 'backend')
             for no_delay in (True, False)}
    best = cells['bare', True]
    print('| server | TCP_NODELAY | 1 connection | ratio | 16 connections | ratio |')
    print('| --- | --- | --- | --- | --- | --- |')
    for (name, no_delay), (one, many) in cells.items():
        print(f"| {name} | {'yes' if no_delay else 'no'} | {one:.0f}/s | {one / best[0]:.3f} | {many:.0f}/s "
              f"| {many / best[1]:.3f} |")


if __name__ == '__main__':
    main()
