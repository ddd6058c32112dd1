from gevent import monkey; monkey.patch_all()  # noqa: E702, I001 - before anything imports ssl

import contextlib
import fcntl
import functools
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import docker
import gevent
import gevent.event
import gevent.pool
import pytest
import requests

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from browsing import browser, make_page  # noqa: F401 - fixtures
from contract import check_answer
from machines import Machines, Network, Relay

import agentbackend
from _agentbackend.images import BASE, OWN_BASE_IMAGE

LIMIT = 900  # seconds that one test may take, with the build of an image
BASE_IMAGE = pytest.StashKey()  # the greenlet that has it built
# Test runs beside each other must not take each other's ports; below those that the kernel gives away.
PORT_SLOTS, PORT_SLOT = (12_000, 32_000), 1_200
# Files that take longer than their size tells.
LONG = ('test_adoption.py', 'test_agents_exact.py', 'test_accessibility.py', 'test_streams_exact.py',
        'test_reference.py', 'test_pool.py', 'test_swarm.py', 'test_swarm_list.py',
        'test_templates.py', 'test_shells.py', 'test_three_machines.py')
LOCKS = []  # files that are locked as long as this run goes on
# A few megabytes that answer as a workspace does: /healthz on 8443, an SSH banner on 2222.
# CLONE_FAILS, SLOW, CLONES, CRASH and PRINT in its environment make it behave as the tests need it.
TINY_DOCKERFILE = """\
# A static shell that answers as a workspace does.
FROM scratch
LABEL agentbackend.test={test} agentbackend.settings=stdin
COPY busybox /bin/busybox
COPY entry banner /bin/
RUN ["/bin/busybox", "--install", "-s", "/bin"]
ENTRYPOINT ["/bin/entry"]
{steps}"""
TINY_ENTRY = """\
#!/bin/busybox sh
trap 'exit 0' TERM
settings=/etc/agentbackend
mkdir -p $settings /www
if [ "$WORKSPACE_SETTINGS" = stdin ] && [ ! -e $settings/owned ] && read -r word length; then
    echo "$word" >$settings/taken
    head -c "$length" | tar -x -C /
    echo "$word" >$settings/owned
fi
exec </dev/null
[ ! -f $settings/env ] || . $settings/env
mkdir -p "$PROJECT_DIR"
[ -z "$CLONE_FAILS" ] || { echo "fatal: $CLONE_FAILS" >&2; exit 65; }
[ -z "$CRASH" ] || { echo "crashing as told" >&2; exit "$CRASH"; }
[ -z "$SLOW" ] || sleep "$SLOW"
for n in $CLONES; do echo "workspace: clone: Receiving objects: $n%"; sleep 1; done
echo '{"status":"alive","lastHeartbeat":0}' >/www/healthz
httpd -p 8443 -h /www
nc -ll -p 2222 -e /bin/banner &
until grep -q ':08AE [0-9A-F]*:0000 0A' /proc/net/tcp /proc/net/tcp6 2>/dev/null; do usleep 10000; done
echo "workspace: started in tiny"
[ -z "$PRINT" ] || eval "$PRINT"
while :; do sleep 1000 & wait $!; done
"""
TINY_BANNER = """\
#!/bin/busybox sh
echo SSH-2.0-tiny
"""

AGENTS_BASE_DOCKERFILE = """\
# Debian with what agents need of the base of all workspaces, without what takes room.
FROM {base} AS base
FROM {debian}
LABEL agentbackend.test={test}
COPY --from=base /usr/bin/python3.11 /usr/bin/python3
COPY --from=base /usr/lib/python3.11/ /usr/lib/python3.11/
COPY --from=base /usr/lib/x86_64-linux-gnu/libexpat.so.1 /usr/lib/
COPY --from=base /usr/local/bin/agent-run /usr/local/bin/agent-sweep /usr/local/bin/
COPY --from=base /usr/local/lib/agentbackend/ /usr/local/lib/agentbackend/
RUN useradd --uid 1000 --user-group --create-home dev
"""
AGENTS_DOCKERFILE = """\
# It answers as a workspace does.
FROM {image}
LABEL agentbackend.test={test} agentbackend.settings=stdin
COPY busybox entry banner /usr/local/bin/
RUN ln -s /usr/local/bin/busybox /bin/busybox
ENTRYPOINT ["/usr/local/bin/entry"]
"""
AGENTS_ENTRY = """\
#!/bin/sh
if [ "$WORKSPACE_SETTINGS" = stdin ] && [ ! -e /etc/agentbackend/owned ] && read -r word length; then
    busybox head -c "$length" | busybox tar -x -C /
    echo "$word" >/etc/agentbackend/owned
fi
exec </dev/null
mkdir -p /www "$PROJECT_DIR" && chown -R dev "$WORKSPACE_BASE_PATH"
echo '{"status":"alive","lastHeartbeat":0}' >/www/healthz
busybox httpd -p 8443 -h /www
busybox nc -ll -p 2222 -e /usr/local/bin/banner &
echo "workspace: started in $PROJECT_DIR"
trap 'exit 0' TERM
while :; do sleep 1000 & wait $!; done
"""
AGENTS_BANNER = '#!/bin/sh\necho SSH-2.0-tiny\n'


class Share:
    """Lets a run do only the files that no other run beside it has taken; each leaves word in a folder that
    they share."""

    def __init__(self, folder):
        self._folder, self._ours = Path(folder), set()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item):
        """Pass over a test of a file that another run does."""
        name = item.path.name
        if name not in self._ours:
            with contextlib.suppress(FileExistsError):
                (self._folder / name).mkdir()
                self._ours.add(name)
        return None if name in self._ours else True


def pytest_addoption(parser):
    """Take the option with which `run.sh test` starts runs beside each other: most tests wait for the
    engine."""
    parser.addoption('--share', metavar='FOLDER')


def pytest_configure(config):
    """Share the files with another run if there is one."""
    if config.getoption('share'):
        config.pluginmanager.register(Share(config.getoption('share')))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark what needs a Docker engine: what uses the fixture `docker_client`, itself or through others. Files
    that need the base image of all workspaces come last."""
    for item in items:
        if 'docker_client' in item.fixturenames:
            item.add_marker('engine')
    later = {item.path for item in items if 'base_image' in item.fixturenames}
    # The longest files first, so that runs beside each other end at about the same time.
    items.sort(key=lambda item: (item.path in later, item.path.name not in LONG, -item.path.stat().st_size))


def lock(what):
    """Return an open file that is locked, or None while another run of tests on this machine has it."""
    file = open(Path(tempfile.gettempdir()) / f'agentbackend-tests-{what}.lock', 'w')
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


@contextlib.contextmanager
def alone(what):
    """Wait until no other run of tests on this machine does the same, for the length of a block."""
    while (held := lock(what)) is None:
        gevent.sleep(0.5)
    with held:
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session):
    """Have the base image of all workspaces built, which takes minutes, while what needs none is tested."""
    if any('base_image' in item.fixturenames for item in session.items):
        folder = tempfile.mkdtemp()
        backend = agentbackend.make_backend(agentbackend.Config.from_env(
            {'DOCKER_HOST': 'unix:///var/run/docker.sock', **os.environ, 'STATE_DIR': folder,
             'INSTANCE': 'test-base'}))
        session.config.stash[BASE_IMAGE] = gevent.spawn(build_base, backend)
        session.config.add_cleanup(functools.partial(shutil.rmtree, folder, ignore_errors=True))
    return (yield)


def build_base(backend):
    """Return the base image of all workspaces."""
    with alone('base'):
        image = backend.templates.image(BASE, lambda text: None, gevent.event.Event())
    backend.client.close()
    return image


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Let no other test reach an engine, so that one that lacks the mark fails wherever it is run; and none
    keep the others waiting for ever."""
    with pytest.MonkeyPatch.context() as patched, gevent.Timeout(LIMIT, Stuck):
        if item.get_closest_marker('engine') is None:
            patched.setenv('DOCKER_HOST', 'unix:///nowhere/docker.sock')
        return (yield)


class Stuck(Exception):
    """A test is not over in time."""


@pytest.fixture(scope='session')
def docker_client():
    """The real engine; tests fail rather than skip without one."""
    client = docker.from_env(timeout=60)
    client.ping()
    yield client
    client.close()


@pytest.fixture(scope='session')
def layers(docker_client):
    """The name of this run of tests, as a label of all layers of `tiny`; they are removed in the end."""
    name = uuid.uuid4().hex
    yield name
    remove_images(docker_client, name)


@pytest.fixture(scope='session')
def templates_dir(tmp_path_factory, layers):
    """A folder with the template `tiny`."""
    folder = tmp_path_factory.mktemp('templates')
    write_template(folder, 'tiny', layers)
    return folder


@pytest.fixture(scope='session')
def base_image(request, docker_client):
    """The base image of all workspaces."""
    return request.config.stash[BASE_IMAGE].get()


@pytest.fixture(scope='session')
def agents_template(tmp_path_factory, docker_client, base_image):
    """A folder with the small template `agents`, in which agents can work, and the image that it stands
    on."""
    folder, test = tmp_path_factory.mktemp('agents-templates'), uuid.uuid4().hex
    image = f'agentbackend-test-agents:{test}'
    text = AGENTS_BASE_DOCKERFILE.format(base=base_image, debian=debian(), test=test)
    docker_client.images.build(fileobj=io.BytesIO(text.encode()), tag=image, rm=True)
    target = folder / 'agents'
    target.mkdir()
    shutil.copy(shutil.which('busybox'), target / 'busybox')
    for name, text in (('Dockerfile', AGENTS_DOCKERFILE.format(image=image, test=test)),
                       ('entry', AGENTS_ENTRY), ('banner', AGENTS_BANNER)):
        (target / name).write_text(text)
    yield folder, image
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
def own_templates(tmp_path, templates_dir, layers, docker_client):
    """A folder with `tiny`, and a function (name, *more steps) that adds templates to it; their images are
    removed in the end."""
    folder, test = tmp_path / 'templates', uuid.uuid4().hex
    shutil.copytree(templates_dir, folder)
    yield folder, lambda name, *steps: write_template(folder, name, layers,
                                                      [f'LABEL agentbackend.test={test}', *steps])
    remove_images(docker_client, test)


def write_template(folder, name, test, steps=()):
    """Write a template like tiny with more steps; every layer bears the label of its test, and those of tiny
    are built once."""
    target = folder / name
    target.mkdir(exist_ok=True)
    shutil.copy(shutil.which('busybox'), target / 'busybox')
    text = TINY_DOCKERFILE.format(test=test, steps=''.join(f'{step}\n' for step in steps))
    (target / 'Dockerfile').write_text(text)
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


@pytest.fixture
def port_3100():
    """The port that the contract's code and the README have."""
    with alone('port-3100'):
        yield 3100


@functools.cache
def first_port():
    """Return where the ports of this run of tests begin; no other run on this machine has them."""
    for start in range(*PORT_SLOTS, PORT_SLOT):
        if held := lock(f'ports-{start}'):
            LOCKS.append(held)
            return start
    raise AssertionError('too many runs of tests at once')


def port_ranges():
    """Return settings with the port ranges of this run of tests."""
    start = first_port()
    return {'CODE_SERVER_PORTS': f'{start}-{start + 107}', 'SSH_PORTS': f'{start + 108}-{start + 135}',
            'CUSTOM_PORTS': f'{start + 136}-{start + PORT_SLOT - 1}'}


def program_with(constants):
    """Return the arguments of a Python that runs the server with other values of constants of its modules."""
    lines = ['import agentbackend', 'import importlib']
    for name, value in constants.items():
        module, _, constant = name.rpartition('.')
        lines += [f"module = importlib.import_module('_agentbackend.{module}')",
                  f'assert hasattr(module, {constant!r})', f'module.{constant} = {value!r}']
    return ['-c', '\n'.join([*lines, 'agentbackend.main()'])]


class Served:
    """A server in a process of its own, under an instance of its own, with its settings, its log and a small
    client.

    Times that no setting has may be shorter for a test: `constants` are {'tasks.TIDY_PAUSE': seconds}.
    """

    def __init__(self, folder, templates_dir, *, network=None, constants=None, **settings):
        self.program = program_with(constants) if constants else ['-m', 'agentbackend']
        self.folder = folder
        self.network = network
        self.instance = 'test-' + uuid.uuid4().hex[:8]
        self.log = folder / 'log'
        self.settings = {'INSTANCE': self.instance, 'STATE_DIR': str(folder / 'state'), 'PORT': '0',
                         'PREBUILD': 'none',
                         'TEMPLATES_DIR': str(templates_dir), 'DEFAULT_TEMPLATE': 'tiny',
                         'LOG_LEVEL': 'debug', **port_ranges(), **settings}
        self.headers = {}
        self.command = ['-m', 'agentbackend']
        self.process = None
        self.port = None

    def start(self, *, connected=True):
        """Start the server, and wait until it answers and (unless told otherwise) has found its engine."""
        env = {key: value for key, value in os.environ.items()
               if key not in ('API_TOKEN', 'HOST', 'PYTHONDONTWRITEBYTECODE')} | self.settings
        self.log.open('a').close()
        already = self.log.stat().st_size
        with self.log.open('a') as log:
            prefix = self.network.prefix if self.network else []
            self.process = subprocess.Popen([*prefix, sys.executable, *self.program], cwd=ROOT,
                                            env=env, stdout=log, stderr=log,
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
        deadline, pause = time.monotonic() + timeout, 0.02
        while time.monotonic() < deadline:
            value = condition()
            if value:
                return value
            if self.process.poll() is not None:
                break
            time.sleep(pause)
            pause = min(pause * 1.3, 0.1)  # to ask takes its time as well
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


@pytest.fixture
def guarded(make_server):
    """A server with a token, which its client here has."""
    server = make_server(API_TOKEN='open sesame')
    server.headers['Authorization'] = 'Bearer open sesame'
    return server


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own of half a megabyte."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=512k', 'tmpfs', folder], check=True)
    yield folder
    subprocess.run(['umount', '--lazy', folder], check=True)


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

    def remove(container):
        with contextlib.suppress(docker.errors.APIError):
            client.api.remove_container(container['Id'], force=True, v=True)
    while objects_of(client, instance) and time.monotonic() < deadline:
        gevent.pool.Pool(8).map(remove, client.api.containers(all=True, filters=filters))
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

    def make(*, connected=True, **settings):
        folder = tmp_path / f'server{len(servers)}'
        folder.mkdir()
        servers.append(Served(folder, templates_dir, **settings))
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


@pytest.fixture(scope='module')
def machines(tmp_path_factory):
    made = Machines(tmp_path_factory.mktemp('machines'), 3)
    yield made
    made.close()


@pytest.fixture
def make_relay():
    """A function that makes a Relay to a machine's engine, at an address of loopback."""
    made = []

    def make(machine, address):
        made.append(Relay(machine, address))
        return made[-1]
    yield make
    for relay in made:
        relay.close()


@pytest.fixture
def serve(machines, tmp_path, templates_dir):
    """A function that starts a server over the machines; all that it made is removed in the end, and its log
    shown on a failure."""
    servers = []

    def start(*, connected=True, network=machines.lan, **settings):
        folder = tmp_path / f'server{len(servers)}'
        folder.mkdir()
        settings = {'DOCKER_HOST': ','.join(machine.url for machine in machines.all),
                    'WORKSPACE_BIND_ADDRESS': '{node}', **machines.settings, **settings}
        servers.append(Served(folder, templates_dir, network=network, **settings))
        return servers[-1].start(connected=connected)
    yield start
    for server in servers:
        server.stop()
        print(f'--- log of {server.instance}\n' + server.log.read_text()[-12000:])
    for machine in machines.all:
        machine.link('up')
        machine.start()
        for server in servers:
            remove_objects(machine.client, server.instance)
