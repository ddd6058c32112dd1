from gevent import monkey; monkey.patch_all()  # noqa: E702, I001 - before anything imports ssl

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import docker
import gevent
import pytest
import requests

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from contract import check_answer

from _agentbackend.images import OWN_BASE_IMAGE

# A few megabytes that answer as a workspace does: /healthz on 8443, an SSH banner on 2222.
# CLONE_FAILS, SLOW, CRASH and PRINT in its environment make it misbehave as the tests need it.
TINY_DOCKERFILE = """\
# A static shell that answers as a workspace does.
FROM scratch
LABEL agentbackend.test={test}
COPY busybox /bin/busybox
COPY entry banner /bin/
RUN ["/bin/busybox", "--install", "-s", "/bin"]
{steps}ENTRYPOINT ["/bin/entry"]
"""
TINY_ENTRY = """\
#!/bin/busybox sh
trap 'exit 0' TERM
mkdir -p /www "$PROJECT_DIR"
[ -z "$CLONE_FAILS" ] || { echo "fatal: $CLONE_FAILS" >&2; exit 65; }
[ -z "$CRASH" ] || { echo "crashing as told" >&2; exit "$CRASH"; }
[ -z "$SLOW" ] || sleep "$SLOW"
echo '{"status":"alive","lastHeartbeat":0}' >/www/healthz
httpd -p 8443 -h /www
nc -ll -p 2222 -e /bin/banner &
echo "tiny is up"
[ -z "$PRINT" ] || eval "$PRINT"
while :; do sleep 1000 & wait $!; done
"""
TINY_BANNER = """\
#!/bin/busybox sh
echo SSH-2.0-tiny
"""

AGENTS_DOCKERFILE = """\
# Debian with what agents need of templates/base, that answers as a workspace does.
FROM {base}
LABEL agentbackend.test={test}
COPY busybox entry banner agent-run agent-sweep /usr/local/bin/
RUN useradd --uid 1000 --user-group --create-home dev && ln -s /usr/local/bin/busybox /bin/busybox
ENTRYPOINT ["/usr/local/bin/entry"]
"""
AGENTS_ENTRY = """\
#!/bin/sh
mkdir -p /www "$PROJECT_DIR" && chown -R dev "$WORKSPACE_BASE_PATH"
echo '{"status":"alive","lastHeartbeat":0}' >/www/healthz
busybox httpd -p 8443 -h /www
busybox nc -ll -p 2222 -e /usr/local/bin/banner &
trap 'exit 0' TERM
while :; do sleep 1000 & wait $!; done
"""
AGENTS_BANNER = '#!/bin/sh\necho SSH-2.0-tiny\n'


@pytest.fixture(scope='session')
def docker_client():
    """The real engine; tests fail rather than skip without one."""
    client = docker.from_env(timeout=60)
    client.ping()
    yield client
    client.close()


@pytest.fixture(scope='session')
def templates_dir(tmp_path_factory, docker_client):
    """A folder with the template `tiny`; its images are removed in the end."""
    folder, test = tmp_path_factory.mktemp('templates'), uuid.uuid4().hex
    write_template(folder, 'tiny', test)
    yield folder
    remove_images(docker_client, test)


@pytest.fixture(scope='session')
def agents_template(tmp_path_factory, docker_client):
    """A folder with the small template `agents`, in which agents can work, and the image that it stands
    on."""
    folder, test = tmp_path_factory.mktemp('agents-templates'), uuid.uuid4().hex
    base = debian()
    target = folder / 'agents'
    target.mkdir()
    shutil.copy(shutil.which('busybox'), target / 'busybox')
    for name in ('agent-run', 'agent-sweep'):
        shutil.copy(ROOT / 'templates' / 'base' / 'bin' / name, target / name)
    for name, text in (('Dockerfile', AGENTS_DOCKERFILE.format(base=base, test=test)),
                       ('entry', AGENTS_ENTRY), ('banner', AGENTS_BANNER)):
        (target / name).write_text(text)
    yield folder, base
    remove_images(docker_client, test)


def debian():
    """Return the name of a Debian image, made if the engine has none."""
    with contextlib.closing(docker.from_env()) as client:
        there = {tag for image in client.images.list() for tag in image.tags}
    found = [image for image in ('debian:bookworm-slim', OWN_BASE_IMAGE) if image in there]
    if not found:
        subprocess.run([ROOT / 'templates' / 'make-debian-image'], check=True)
    return found[0] if found else OWN_BASE_IMAGE


@pytest.fixture
def own_templates(tmp_path, templates_dir, docker_client):
    """A folder with `tiny`, and a function (name, *more steps) that adds templates to it; their images are
    removed in the end."""
    folder, test = tmp_path / 'templates', uuid.uuid4().hex
    shutil.copytree(templates_dir, folder)
    yield folder, lambda name, *steps: write_template(folder, name, test, steps)
    remove_images(docker_client, test)


def write_template(folder, name, test, steps=()):
    """Write a template like tiny with more steps; every layer of it bears the label of its test."""
    target = folder / name
    target.mkdir(exist_ok=True)
    shutil.copy(shutil.which('busybox'), target / 'busybox')
    (target / 'Dockerfile').write_text(TINY_DOCKERFILE.format(test=test,
                                                              steps=''.join(f'{step}\n' for step in steps)))
    (target / 'entry').write_text(TINY_ENTRY)
    (target / 'banner').write_text(TINY_BANNER)


def remove_images(client, test):
    """Remove the images and layers of a test; a build that went on without its server may hold one for a
    moment."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found = client.api.images(all=True, filters={'label': f'agentbackend.test={test}'})
        if not found:
            return
        for image in found:
            with contextlib.suppress(docker.errors.APIError):
                client.api.remove_image(image['Id'], force=True)
        time.sleep(0.1)


class Served:
    """A server in a process of its own, under an instance of its own, with its settings, its log and a small
    client."""

    def __init__(self, folder, templates_dir, *, network=None, **settings):
        self.folder = folder
        self.network = network
        self.instance = 'test-' + uuid.uuid4().hex[:8]
        self.log = folder / 'log'
        self.settings = {'INSTANCE': self.instance, 'STATE_DIR': str(folder / 'state'), 'PORT': '0',
                         'PREBUILD': 'none',
                         'TEMPLATES_DIR': str(templates_dir), 'DEFAULT_TEMPLATE': 'tiny',
                         'LOG_LEVEL': 'debug', **settings}
        self.headers = {}
        self.process = None
        self.port = None

    def start(self, *, connected=True):
        """Start the server, and wait until it answers and (unless told otherwise) has found its engine."""
        env = {key: value for key, value in os.environ.items()
               if key not in ('API_TOKEN', 'HOST')} | self.settings
        self.log.open('a').close()
        already = self.log.stat().st_size
        with self.log.open('a') as log:
            prefix = self.network.prefix if self.network else []
            self.process = subprocess.Popen([*prefix, sys.executable, str(ROOT / 'agentbackend.py')], env=env,
                                            stdout=log, stderr=log,
                                            stdin=subprocess.DEVNULL, start_new_session=True)
        self.port = int(self.wait_for_log(' serves http://', already).rpartition(':')[2].split()[0])
        if connected:
            self.until(lambda: self.get('/health')['docker'] == 'connected', 30)
        return self

    def wait_for_log(self, text, already=0, timeout=20):
        def find():
            content = self.log.read_text()[already:]
            return next((line for line in content.splitlines() if text in line), None)
        return self.until(find, timeout)

    def until(self, condition, timeout=30):
        """Return what `condition` gives as soon as it is true; fail with the server's log when it never
        is."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            value = condition()
            if value:
                return value
            if self.process.poll() is not None:
                break
            time.sleep(0.03)
        raise AssertionError(f'not within {timeout} s (server ended: {self.process.poll()}); its log:\n'
                             + self.log.read_text()[-6000:])

    def call(self, method, path, json=None, **options):
        """Return the response of the server, whatever its status."""
        headers = {**self.headers, **options.pop('headers', {})}
        with self.network.entered() if self.network else contextlib.nullcontext():
            answer = requests.request(method, f'http://127.0.0.1:{self.port}{path}', json=json,
                                      headers=headers, timeout=60, **options)
        check_answer(method, path, answer.status_code, answer.headers, lambda: answer.text)
        return answer

    def get(self, path, **options):
        """Return the JSON of a GET, without its envelope if it has one."""
        answer = self.call('GET', path, **options).json()
        return answer['data'] if 'success' in answer and 'data' in answer else answer

    def create(self, name, **fields):
        """Create a workspace and return its object."""
        answer = self.call('POST', '/api/workspaces', {'name': name, **fields})
        assert answer.status_code == 201, answer.text
        return answer.json()['data']

    def wait_status(self, name, *statuses, timeout=60):
        """Wait until a workspace has one of the statuses, and return its details."""
        def look():
            found = self.get(f'/api/workspaces/{name}')
            return found if found.get('status') in statuses else None
        return self.until(look, timeout)

    def running(self, name, **fields):
        """Create a workspace and wait until it runs."""
        self.create(name, **fields)
        return self.wait_status(name, 'running')

    def kill(self):
        """End the server as a crash would."""
        self.process.kill()
        self.process.wait()

    def stop(self):
        """End the server as a service manager would; return its exit code."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(30)
        return self.process.returncode if self.process else None


class Network:
    """A network namespace with nothing but a loopback of its own, for a server or an engine that must not
    share ours."""

    def __init__(self):
        self._holder = subprocess.Popen(['unshare', '--net', 'sh', '-c',
                                         'ip link set lo up && echo up && exec sleep infinity'],
                                        stdout=subprocess.PIPE, start_new_session=True)
        self._holder.stdout.readline()
        self._file = f'/proc/{self._holder.pid}/ns/net'
        self.prefix = ['nsenter', f'--net={self._file}', '--']

    @contextlib.contextmanager
    def entered(self):
        """Let this process make its sockets there for the length of a block, in which no other greenlet may
        make one."""
        with open('/proc/self/ns/net') as ours, open(self._file) as theirs:
            self._move_to(theirs)
            try:
                yield
            finally:
                self._move_to(ours)

    @staticmethod
    def _move_to(file):
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(file.fileno(), 0x40000000):  # CLONE_NEWNET; os.setns is there from Python 3.12 on
            raise OSError(ctypes.get_errno(), 'setns')

    def close(self):
        self._holder.kill()
        self._holder.wait()
        self._holder.stdout.close()


@pytest.fixture
def network():
    made = Network()
    yield made
    made.close()


def concurrently(*functions):
    """Call the functions at once, and return what they return, in their order."""
    jobs = [gevent.spawn(function) for function in functions]
    gevent.joinall(jobs, raise_error=True)
    return [job.value for job in jobs]


def objects_of(client, instance):
    """Return the names of every container and volume that bear an instance's label."""
    filters = {'label': f'agentbackend.instance={instance}'}
    return ([item['Names'][0] for item in client.api.containers(all=True, filters=filters)]
            + [item['Name'] for item in client.api.volumes(filters=filters)['Volumes'] or ()])


def remove_objects(client, instance):
    """Remove every container and volume of an instance; a server that was stopped meanwhile may be at it
    too."""
    filters = {'label': f'agentbackend.instance={instance}'}
    deadline = time.monotonic() + 20
    for item in client.api.volumes(filters={'label': f'agentbackend.claim={instance}'})['Volumes'] or ():
        client.api.remove_volume(item['Name'], force=True)
    while objects_of(client, instance) and time.monotonic() < deadline:
        for item in client.api.containers(all=True, filters=filters):
            with contextlib.suppress(docker.errors.APIError):
                client.api.remove_container(item['Id'], force=True, v=True)
        for item in client.api.volumes(filters=filters)['Volumes'] or ():
            with contextlib.suppress(docker.errors.APIError):
                client.api.remove_volume(item['Name'], force=True)
    for item in client.api.networks(filters=filters):
        with contextlib.suppress(docker.errors.APIError):
            client.api.remove_network(item['Id'])


@pytest.fixture
def make_server(tmp_path, templates_dir, docker_client):
    """A function that starts servers; all that they made is removed in the end, and on a failure their logs
    are shown."""
    servers = []

    def make(*, connected=True, network=None, **settings):
        folder = tmp_path / f'server{len(servers)}'
        folder.mkdir()
        servers.append(Served(folder, templates_dir, network=network, **settings))
        return servers[-1].start(connected=connected)

    yield make
    for server in servers:
        server.stop()
        print(f'--- log of {server.instance}\n' + server.log.read_text()[-8000:])
        remove_objects(docker_client, server.instance)


@pytest.fixture(scope='module')
def server(tmp_path_factory, templates_dir, docker_client):
    """One server that the tests of a module share."""
    served = Served(tmp_path_factory.mktemp('served'), templates_dir).start()
    yield served
    served.stop()
    remove_objects(docker_client, served.instance)
