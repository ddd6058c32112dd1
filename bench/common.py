"""What the sections share: real servers, plain containers to compare with, probes, and a table with
pictures."""
import contextlib
import http.client
import json
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import docker
import gevent
from conftest import Served, first_port, remove_images, remove_objects, write_template
from helpers import free_port

from _agentbackend.engine import CAPABILITIES

from . import ROOT

PICTURES = ROOT / 'bench' / 'pictures'
ATTEMPT = 0.1  # seconds that one attempt of a probe may take: a lost SYN costs it that, not TCP's second
IDLE = 5  # seconds after which the server may have closed a connection that nobody used
EDITOR = (b'GET /healthz HTTP/1.0\r\n\r\n', b' 200 ')  # what is sent, and what shows that it answers
SSH = (b'', b'SSH-')
COLUMNS = ('what', 'n', 'p50', 'p95', 'p99', 'against', 'its p50', 'its p99', 'ratio')
HEAD = ('| ' + ' | '.join(COLUMNS) + ' |\n'
        '| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: |\n')
# Asks for /health 5 times a second, in a process of its own, until its stdin ends; prints the ms of each.
WATCH = """
import http.client, json, select, sys, time
connection, waits = http.client.HTTPConnection('127.0.0.1', int(sys.argv[1]), timeout=60), []
while not select.select([sys.stdin], [], [], 0.2)[0]:
    begun, answer = time.perf_counter(), None
    while answer is None:
        try:
            connection.request('GET', '/health')
            answer = connection.getresponse().read()
        except ConnectionError:  # one that rests is closed to make room for others
            connection.close()
    waits.append((time.perf_counter() - begun) * 1000)
print(json.dumps(waits))
"""


class Bench:
    """Gives sections their servers and the engine; what they made is removed in the end.

    `templates` is a folder with the template `tiny`; without one it is made.
    """

    def __init__(self, templates=None):
        self.client = docker.from_env(timeout=120)
        self.folder = Path(tempfile.mkdtemp(prefix='agentbackend-bench-'))
        self.label = uuid.uuid4().hex
        self.prefix = f'bench-{self.label[:8]}'  # of what is made without the server
        self.templates = templates or self.folder
        if not templates:
            write_template(self.folder, 'tiny', self.label)

    @contextlib.contextmanager
    def served(self, **settings):
        """Give a server for the length of a block. It has the built-in templates and `tiny`: a static shell
        that answers as a workspace does."""
        folder = Path(tempfile.mkdtemp())
        start = first_port()
        served = Served(folder, self.templates, **{
            'LOG_LEVEL': 'info', 'CODE_SERVER_PORTS': f'{start}-{start + 399}',
            'SSH_PORTS': f'{start + 400}-{start + 799}', 'CUSTOM_PORTS': f'{start + 800}-{start + 1199}',
            **settings})
        try:
            yield served.start()
        except BaseException:
            print(served.log.read_text()[-2000:], file=sys.stderr)
            raise
        finally:
            served.stop()
            self.remove_plain()
            remove_objects(self.client, served.instance)
            shutil.rmtree(folder, ignore_errors=True)

    def remove_plain(self):
        """Remove what was made without the server."""
        mine = {'name': self.prefix}  # volumes that `docker run` makes have no label
        for item in self.client.api.containers(all=True, filters=mine):
            self.client.api.remove_container(item['Id'], force=True, v=True)
        for item in self.client.api.volumes(filters=mine)['Volumes'] or ():
            self.client.api.remove_volume(item['Name'], force=True)

    def close(self):
        remove_images(self.client, self.label)
        self.client.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class Http:
    """One kept connection to a server; calling it returns the data of an answer."""

    def __init__(self, port):
        self._connection = http.client.HTTPConnection('127.0.0.1', port, timeout=120)
        self._used = 0

    def __call__(self, method, path, body=None, **headers):
        content = self.raw(method, path, json.dumps(body) if body is not None else None,
                           **({'Content-Type': 'application/json'} if body is not None else {}), **headers)
        answer = json.loads(content)
        return answer.get('data', answer)

    def raw(self, method, path, body=None, **headers):
        """Return the bytes of an answer, which has to be a good one."""
        if time.monotonic() - self._used > IDLE:
            self._connection.close()  # and it is opened again
        self._connection.request(method, path, body, headers)
        answer = self._connection.getresponse()
        content = answer.read()
        self._used = time.monotonic()
        assert answer.status < 300, (method, path, answer.status, content[:500])
        return content

    def wait_running(self, name, *, pause=0.01, timeout=1500):
        """Wait until a workspace runs, and return its details."""
        deadline = time.monotonic() + timeout
        while (found := self('GET', f'/api/workspaces/{name}'))['status'] != 'running':
            assert found['status'] == 'creating' and time.monotonic() < deadline, found
            gevent.sleep(pause)
        return found

    def running(self, name, **fields):
        """Create a workspace, and wait until it runs."""
        self('POST', '/api/workspaces', {'name': name, **fields})
        return self.wait_running(name)


# Time


def ms(function, *arguments):
    """Return how many milliseconds a call takes."""
    begun = time.perf_counter()
    function(*arguments)
    return (time.perf_counter() - begun) * 1000


def turn_about(turns, *functions, rest=0.0):
    """Call functions in turn, every second time the other way round; return a list per function of what it
    returned."""
    found = [[] for _ in functions]
    for turn in range(turns):
        for number in sorted(range(len(functions)), reverse=turn % 2 == 1):
            found[number].append(functions[number]())
            gevent.sleep(rest)
    return found


def percentile(values, share):
    """Return the value below which a share of them lies; of few values, high shares are the longest one."""
    return sorted(values)[min(int(len(values) * share), len(values) - 1)] if values else float('nan')


def answers(port, question, sign):
    """Return whether one attempt gets an answer."""
    try:
        with socket.create_connection(('127.0.0.1', port), ATTEMPT) as sock:
            sock.settimeout(ATTEMPT)
            sock.sendall(question)
            return sign in sock.recv(200)
    except OSError:
        return False


def wait_ready(*ports, pause=0.005, timeout=120):
    """Wait until an editor and an SSH server both answer; `ports` are theirs."""
    def look(port, question, sign):
        deadline = time.monotonic() + timeout
        while not answers(port, question, sign):
            assert time.monotonic() < deadline, f'port {port} does not answer'
            gevent.sleep(pause)
    gevent.joinall([gevent.spawn(look, port, *what) for port, what in zip(ports, (EDITOR, SSH), strict=True)],
                   raise_error=True)


# Plain containers


class Plain:
    """Makes the container that a workspace stands in without the server: the same image, volumes, ports,
    limits, network, password and keys."""

    def __init__(self, bench, server, template):
        self._bench, self._network = bench, f'agentbackend-{server.instance}'
        self.image = next(item['image'] for item in server.get('/api/templates')
                          if item['name'] == template)
        self._cpus, self._given = min(2, bench.client.info()['NCPU']), set()
        self._files = bench.folder / f'files-of-{template}'
        self._files.mkdir(exist_ok=True)
        for name, text in (('password', 'secret\n'), ('authorized_keys', ''), ('env', ''),
                           ('gitconfig', '[user]\n')):
            (self._files / name).write_text(text)

    def docker_run(self):
        """Return the ms from the call of `docker run` until editor and SSH answer, probed once it has
        returned."""
        name, ports = self._name(), (self._port(), self._port())
        command = ['docker', 'run', '--detach', '--name', name, '--init', '--network', self._network,
                   '--volume', f'{name}:/workspace', '--volume', f'{name}-home:/home/dev', '--memory', '4g',
                   '--cpus', str(self._cpus), '--pids-limit', '4096', '--shm-size', '1g',
                   '--add-host', 'host.docker.internal:host-gateway', '--cap-drop', 'ALL']
        command += [word for capability in CAPABILITIES for word in ('--cap-add', capability)]
        command += [word for file in self._files.iterdir()
                    for word in ('--volume', f'{file}:/etc/agentbackend/{file.name}:ro')]
        command += [word for port, inside in zip(ports, (8443, 2222), strict=True)
                    for word in ('--publish', f'127.0.0.1:{port}:{inside}')]
        command += [word for item in self._environment(name).items() for word in ('--env', '='.join(item))]
        begun = time.perf_counter()
        subprocess.run([*command, self.image], stdout=subprocess.DEVNULL, check=True)
        wait_ready(*ports)
        return (time.perf_counter() - begun) * 1000

    def docker_py(self, pause=0.005):
        """Return the same by raw calls of docker-py, without `docker run` around them."""
        api, name, ports = self._bench.client.api, self._name(), (self._port(), self._port())
        begun = time.perf_counter()
        host_config = api.create_host_config(
            binds=[f'{name}:/workspace', f'{name}-home:/home/dev'], network_mode=self._network, init=True,
            port_bindings={inside: ('127.0.0.1', port)
                           for inside, port in zip((8443, 2222), ports, strict=True)},
            mem_limit='4g', nano_cpus=int(self._cpus * 1e9), pids_limit=4096, shm_size='1g',
            cap_drop=['ALL'], cap_add=list(CAPABILITIES),
            extra_hosts={'host.docker.internal': 'host-gateway'})
        made = api.create_container(self.image, name=name, ports=[8443, 2222], host_config=host_config,
                                    environment=self._environment(name))
        api.start(made['Id'])
        wait_ready(*ports, pause=pause)
        return (time.perf_counter() - begun) * 1000

    def _port(self):
        """Return a free port that no other container of ours will have: many are started at once."""
        while (port := free_port()) in self._given:
            pass
        self._given.add(port)
        return port

    def _name(self):
        return f'{self._bench.prefix}-{uuid.uuid4().hex[:8]}'

    @staticmethod
    def _environment(name):
        return {'WORKSPACE_ID': name, 'WORKSPACE_NAME': 'work', 'WORKSPACE_TYPE': 'persistent',
                'WORKSPACE_PORTS': '', 'WORKSPACE_BASE_PATH': '/workspace', 'PROJECT_DIR': '/workspace/work',
                'SSH_ENABLED': '1', 'GIT_URL': '', 'GIT_BRANCH': '', 'GIT_DEPTH': '', 'GIT_FILTER': ''}


# Memory and CPU


def memory_of(server, kind='Rss'):
    """Return the MB that a server uses: Rss, or Pss, in which what others share counts in part."""
    text = Path(f'/proc/{server.process.pid}/smaps_rollup').read_text()
    return int(re.search(rf'^{kind}:\s+(\d+)', text, re.MULTILINE)[1]) / 1024


def cpu_of(server):
    """Return the seconds of CPU that a server has used."""
    fields = Path(f'/proc/{server.process.pid}/stat').read_text().rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def container_memory(client, container):
    """Return the MB that a container uses, less the files that the kernel would give back."""
    found = client.api.stats(container, stream=False)['memory_stats']
    inactive = found['stats'].get('total_inactive_file', found['stats'].get('inactive_file', 0))
    return (found['usage'] - inactive) / 2**20


# What is told


class Section:
    """What one section found, as rows, remarks and pictures."""

    def __init__(self, name, title):
        self.name, self.title = name, title
        self._rows, self._remarks, self._pictures = [], [], []

    def compare(self, what, ours, against, theirs, *, unit='ms', head=False):
        """Add a row: values of ours, and of what they are compared with, unless that is themselves. `head`
        rows stand in the README too."""
        against, theirs = (against, theirs) if theirs is not ours else ('', [])
        self._row(what, ours, unit, against, theirs, head)

    def tell(self, what, values, *, unit='ms', head=False):
        """Add a row of values that stand for themselves; one value is a list of one, or a number."""
        self._row(what, values if isinstance(values, list) else [values], unit, '', [], head)

    def _row(self, what, ours, unit, against, theirs, head):
        below = statistics.median(theirs) if theirs else 0
        ratio = f'{statistics.median(ours) / below:.2f}' if below else ''
        row = [f'**{what}**' if head else what, f'{len(ours):,}', *spread(ours, unit, (0.5, 0.95, 0.99)),
               against, *(spread(theirs, unit, (0.5, 0.99)) if theirs else ('', '')), ratio]
        self._rows.append(row)
        print('  ' + ' | '.join(row), flush=True)

    def remark(self, text):
        """Add a sentence below the table, as of what could not be measured."""
        self._remarks.append(text)
        print(f'  {text}', flush=True)

    @contextlib.contextmanager
    def watching(self, server, what):
        """Tell in a row how long /health took beside what the block does."""
        with subprocess.Popen([sys.executable, '-c', WATCH, str(server.port)], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE) as watch:
            try:
                yield
            finally:
                waits = json.loads(watch.communicate()[0] or '[]')
        if waits:
            self.tell(f'GET /health beside {what}', waits)

    def picture(self, name, title, across, up, lines, *, log=True):
        """Draw how a figure grows; `lines` is {name: {x: y}}."""
        import matplotlib
        matplotlib.use('Agg')
        # Text as text, and the same figures give the same file.
        matplotlib.rcParams.update({'svg.fonttype': 'none', 'svg.hashsalt': 'agentbackend'})
        from matplotlib import pyplot
        figure, axes = pyplot.subplots(figsize=(6, 3.5))
        for label, points in lines.items():
            axes.plot(list(points), list(points.values()), marker='o', label=label)
        if log:
            axes.set_xscale('symlog')
        axes.set(title=title, xlabel=across, ylabel=up)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.tight_layout()
        PICTURES.mkdir(exist_ok=True)
        figure.savefig(PICTURES / f'{name}.svg', metadata={'Date': None})
        pyplot.close(figure)
        self._pictures.append(f'![{title}](pictures/{name}.svg)')

    def text(self, measured):
        """Return the section as Markdown; `measured` says when."""
        rows = ''.join('| ' + ' | '.join(row) + ' |\n' for row in self._rows)
        blocks = [f'## {self.title}', measured, HEAD + rows if rows else '',
                  '\n'.join(f'- {text}' for text in self._remarks), '\n'.join(self._pictures)]
        return '\n\n'.join(block.rstrip() for block in blocks if block) + '\n'


def spread(values, unit, shares):
    """Return percentiles as text; of a single value there is one. With rates, the low ones are the bad
    ones."""
    sign = -1 if unit.endswith('/s') else 1
    signed, (_, *others) = [sign * value for value in values], shares
    rest = [with_unit(sign * percentile(signed, share), unit) if len(values) > 1 else '' for share in others]
    return [with_unit(statistics.median(values), unit), *rest]


def with_unit(value, unit):
    """Return a figure with three digits that mean something."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f'{value:,.{digits}f} {unit}'
