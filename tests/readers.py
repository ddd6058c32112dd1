"""Many clients of one workspace in a process of their own: it may be killed with all its connections, and
takes no time from the test's.

    python tests/readers.py PORT WORKSPACE COUNT KIND...

Opens COUNT streams, of the kinds by turns (sse, ws), and prints `ready` once each has had its first event.
Then, when each has heard a line that says `end`, it prints as a JSON list how many lines each of them heard.
"""
from gevent import monkey; monkey.patch_all()  # noqa: E702, I001 - before anything imports ssl

import json
import resource
import subprocess
import sys
from pathlib import Path

import gevent.pool

ROOT = Path(__file__).resolve().parent.parent


class Readers:
    """The process, as a test has it."""

    def __init__(self, server, workspace, count, *kinds):
        self._process = subprocess.Popen([sys.executable, __file__, str(server.port), workspace, str(count),
                                          *kinds], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout.readline() == 'ready\n'

    def counts(self):
        """Return how many lines each has heard, once all have heard the end."""
        return json.loads(self._process.stdout.readline())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()


def count_lines(stream):
    """Return how many lines come up to the one that says end. They are counted as bytes: to understand them
    all takes too long."""
    mark, count, rest = b'"type":"log"', 0, b''
    while b'"message":"end"' not in rest:
        data = stream.socket.recv(262144)
        assert data, 'it was cut off'
        count += (rest[-len(mark) + 1:] + data).count(mark)
        rest = rest[-40:] + data
    return count


def main(port, workspace, count, *kinds):
    """Open the streams and read them."""
    sys.path[:0] = [str(ROOT)]
    from streaming import Sse, Ws
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    server = type('Server', (), {'port': int(port), 'network': None, 'headers': {}})

    def open_one(number):
        if kinds[number % len(kinds)] == 'sse':
            stream = Sse(server, f'/api/workspaces/{workspace}/events?tail=0', timeout=60)
        else:
            stream = Ws(server, timeout=60)
            stream.send(type='subscribe', workspaceId=workspace, tail=0)
        next(iter(stream))
        return stream
    streams = gevent.pool.Pool(50).map(open_one, range(int(count)))
    for stream in streams:
        stream.socket.settimeout(None)
    print('ready', flush=True)
    print(json.dumps(gevent.pool.Group().map(count_lines, streams)), flush=True)


if __name__ == '__main__':
    main(*sys.argv[1:])
