"""What the tests of agents share: tasks given over plain sockets, and looks into the workspace behind the
server's back."""
import contextlib
import io
import json
import socket
import tarfile
import time

from conftest import Served, remove_objects
from streaming import connect, read_head

PROJECT = '/workspace/work'


class Execution:
    """POST /api/agent/execute as curl sends it, and the events that answer."""

    def __init__(self, server, workspace, task, *, timeout=60, **fields):
        body = json.dumps({'workspaceId': workspace, 'task': task, **fields}, ensure_ascii=False).encode()
        self.socket = connect(server, timeout)
        self._file = self.socket.makefile('rb')
        self.socket.sendall('POST /api/agent/execute HTTP/1.1\r\nHost: '
                            f'localhost:{server.port}\r\nContent-Type: application/json\r\n'
                            f'Content-Length: {len(body)}\r\n\r\n'.encode() + body)
        self.status, self.headers = read_head(self._file)
        assert self.status == 200, self._file.read(int(self.headers['content-length']))

    def __iter__(self):
        rest = b''
        for data in self.chunks():
            *lines, rest = (rest + data).split(b'\n')
            yield from (json.loads(line[6:]) for line in lines if line.startswith(b'data: '))

    def chunks(self):
        while (size := int(self._file.readline(), 16)):
            yield self._file.read(size + 2)[:-2]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self._file.close()
        self.socket.close()


@contextlib.contextmanager
def served_agents(folder, templates_dir, docker_client, **settings):
    """A server with one running workspace, `work`, whose container's id is its `container`; all is removed in
    the end."""
    served = Served(folder, templates_dir, **{'DEFAULT_TEMPLATE': 'blank', **settings})
    try:
        served.start()
        served.create('work')
        served.container = served.wait_status('work', 'running', timeout=1500)['containerId']
        yield served
    finally:
        served.stop()
        print(f'--- log of {served.instance}\n' + served.log.read_text()[-8000:])
        remove_objects(docker_client, served.instance)


@contextlib.contextmanager
def restarted(server, **settings):
    """Let the server have other settings for the length of a block."""
    before = dict(server.settings)
    server.stop()
    server.settings.update(settings)
    server.start()
    try:
        yield server
    finally:
        server.stop()
        server.settings = before
        server.start()


def begin(server, task, *, workspace='work', **fields):
    """Give a task without waiting for anything; return the ids."""
    answer = server.call('POST', '/api/agent/execute', {'workspaceId': workspace, 'task': task, **fields},
                         headers={'Accept': 'application/json'})
    assert answer.status_code == 202, answer.text
    return answer.json()['data']


def refused(server, task='anything', *, workspace='work', **fields):
    """Return (status, code, error) of a task that is not taken."""
    answer = server.call('POST', '/api/agent/execute', {'workspaceId': workspace, 'task': task, **fields},
                         headers={'Accept': 'application/json'})
    return answer.status_code, answer.json().get('code'), answer.json().get('error')


def is_end(event):
    return event['type'] == 'result' or (event['type'] == 'error' and 'sessionId' in event)


def do(server, task, *, timeout=60, **fields):
    """Give a task and return its events to the end."""
    with Execution(server, 'work', task, timeout=timeout, **fields) as stream:
        return list(stream)


def ended(server, session_id, timeout=40):
    """Wait until no task of a session runs, and return the session."""
    def look():
        found = server.get(f'/api/agent/sessions/{session_id}')
        return found if found['state'] != 'running' else None
    return server.until(look, timeout)


def cancel(server, session_id):
    return server.call('POST', f'/api/agent/sessions/{session_id}/cancel')


def transcript(server, session_id, limit=1000):
    """Return all events of a session, page by page."""
    found, after = [], ''
    while True:
        page = server.get(f'/api/agent/sessions/{session_id}/events?limit={limit}'
                          + (f'&after={after}' if after else ''))
        found += page['events']
        after = page['next']
        if after is None:
            return found


def told(events):
    """Return events as a session tells them, without the time and without their ids in another stream."""
    return [(event['type'], event['data']) for event in events]


def progress(events):
    return [event['data'] for event in events if event['type'] == 'progress']


def messages(events):
    return [event['data']['message'] for event in events if event['type'] == 'message']


def end_of(events):
    """Return (type, data) of the last event, of which there is one."""
    ends = [event for event in events if is_end(event)]
    assert len(ends) == 1 and events[-1] is ends[0], events[-3:]
    return ends[0]['type'], ends[0]['data']


def processes(docker_client, container):
    """Return the command lines of all that runs in a container."""
    return [row[-1] for row in docker_client.api.top(container, 'axo pid,args')['Processes']]


def running(docker_client, container, *words):
    return [line for line in processes(docker_client, container) if any(word in line for word in words)]


def shell(docker_client, container, command, user='dev'):
    """Return (exit code, what was printed) of a command line in a container."""
    code, printed = docker_client.containers.get(container).exec_run(['sh', '-c', command], user=user)
    return code, printed.decode()


def put(docker_client, container, name, text, folder='/workspace'):
    """Write a file into a workspace."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode='w') as tar:
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode = len(text.encode()), 0o755
        tar.addfile(entry, io.BytesIO(text.encode()))
    docker_client.api.put_archive(container, folder, archive.getvalue())


def seconds_until(condition, timeout=20):
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < timeout, f'not within {timeout} s'
        time.sleep(0.05)
    return time.monotonic() - begun
