"""A git host for tests: git's own http-backend, with accounts, a throttle and a store of large files, and a
few repositories to be cloned from it."""
import base64
import contextlib
import hashlib
import json
import os
import subprocess
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

AUTHOR = {'GIT_AUTHOR_NAME': 't', 'GIT_AUTHOR_EMAIL': 't@example.org', 'GIT_COMMITTER_NAME': 't',
          'GIT_COMMITTER_EMAIL': 't@example.org', 'GIT_CONFIG_GLOBAL': '/dev/null'}
THROTTLE = 200_000  # bytes a second


class GitServer:
    """Serves the bare repositories of a folder: anybody those below /open, with an account those below
    /closed, slowly those below /slow.

    `accounts` is {user: password}, `large` the large files by their hash, `requests` [(method, path, user)].
    """

    def __init__(self, folder, address):
        self.folder, self.accounts, self.large, self.requests = folder, {}, {}, []
        self._server = ThreadingHTTPServer((address, 0), Handler)
        self._server.daemon_threads = True
        self._server.host = self
        self.port = self._server.server_port
        # As workspaces reach it.
        self.netloc = f'host.docker.internal:{self.port}'

    def url(self, kind, name, user=''):
        """Return the address of a repository."""
        return f"http://{user}{'@' if user else ''}{self.netloc}/{kind}/{name}.git"

    def git(self, name, *arguments):
        """Return what git prints of a repository."""
        return git(self.folder / f'{name}.git', *arguments)

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={'poll_interval': 0.05},
                         daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        host, (path, _, query) = self.server.host, self.path.partition('?')
        _, kind, *rest = path.split('/')
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        given = self.headers.get('Authorization', '').removeprefix('Basic ')
        user, _, password = base64.b64decode(given).decode().partition(':')
        host.requests.append((self.command, path, user))
        if kind == 'closed' and host.accounts.get(user, object()) != password:
            self._answer(401, {'WWW-Authenticate': 'Basic realm="git"'}, b'who are you?')
        elif path.endswith('/info/lfs/objects/batch'):
            self._tell_large(json.loads(body))
        elif kind == 'large':
            self._answer(200, {}, host.large[rest[0]])
        else:
            self._run(kind, '/' + '/'.join(rest), query, user, body)

    do_POST = do_GET

    def _tell_large(self, wanted):
        store, missing = f"http://{self.headers['Host']}/large/", {'code': 404, 'message': 'it is not there'}
        objects = [item | ({'actions': {'download': {'href': store + item['oid']}}}
                           if item['oid'] in self.server.host.large else {'error': missing})
                   for item in wanted['objects']]
        self._answer(200, {'Content-Type': 'application/vnd.git-lfs+json'},
                     json.dumps({'transfer': 'basic', 'objects': objects}).encode())

    def _run(self, kind, path, query, user, body):
        names = {'CONTENT_TYPE': 'Content-Type', 'HTTP_CONTENT_ENCODING': 'Content-Encoding',
                 'HTTP_GIT_PROTOCOL': 'Git-Protocol'}
        env = {**os.environ, 'GIT_PROJECT_ROOT': str(self.server.host.folder), 'GIT_HTTP_EXPORT_ALL': '1',
               'PATH_INFO': path, 'QUERY_STRING': query, 'REQUEST_METHOD': self.command,
               'REMOTE_USER': user, 'REMOTE_ADDR': 'there', 'CONTENT_LENGTH': str(len(body)),
               'GIT_CONFIG_COUNT': '1', 'GIT_CONFIG_KEY_0': 'safe.directory', 'GIT_CONFIG_VALUE_0': '*',
               **{name: self.headers[header] for name, header in names.items() if header in self.headers}}
        with tempfile.TemporaryFile() as given:
            given.write(body)
            given.seek(0)
            with subprocess.Popen(['git', 'http-backend'], stdin=given, stdout=subprocess.PIPE,
                                  env=env) as process, contextlib.suppress(ConnectionError):
                headers = {}
                while (line := process.stdout.readline().strip()):
                    name, _, value = line.decode().partition(': ')
                    headers[name] = value
                self.send_response(int(headers.pop('Status', '200').split()[0]))
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                while (data := process.stdout.read(THROTTLE // 10)):
                    self.wfile.write(data)
                    time.sleep(0.1 if kind == 'slow' else 0)

    def _answer(self, status, headers, body):
        self.send_response(status)
        for name, value in {**headers, 'Content-Length': str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def git(folder, *arguments, data=None):
    """Return what git prints in a folder."""
    return subprocess.run(['git', '-C', str(folder), *arguments], input=data, capture_output=True, check=True,
                          text=True, env={**os.environ, **AUTHOR}).stdout.strip()


def commit(folder, files, message='more'):
    """Write files, commit, and return the commit."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    git(folder, 'add', '--all')
    git(folder, 'commit', '-qm', message)
    return git(folder, 'rev-parse', 'HEAD')


def begin(folder, name, files):
    """Return the folder of a repository with one commit; `publish` makes it one of a server."""
    work = folder / 'work' / name
    work.mkdir(parents=True)
    git(work, 'init', '-q', '-b', 'main')
    commit(work, files, 'one')
    return work


def publish(folder, work):
    """Make the bare repository that is served of one with files."""
    git(folder, 'clone', '-q', '--mirror', str(work), str(folder / f'{work.name}.git'))
    git(folder / f'{work.name}.git', 'config', 'http.receivepack', 'true')
    git(folder / f'{work.name}.git', 'config', 'uploadpack.allowFilter', 'true')


def pointer(content):
    """Return (hash, text that stands in a repository in the place of a large file)."""
    oid = hashlib.sha256(content).hexdigest()
    return oid, f'version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n'
