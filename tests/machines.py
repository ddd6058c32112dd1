"""Machines with a Docker engine each, all on this one: processes with PID, mount, network and host name
spaces of their own, joined by a bridge that nobody else sees. Nothing of them is left, neither mount nor
interface."""
import concurrent.futures
import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from pathlib import Path

import docker
import gevent
import gevent.server
from helpers import make_certificates

LAN = '192.168.1'  # as the README has it, in a network that nobody else sees
PORT = 2376  # of each engine, with TLS
REGISTRY = f'{LAN}.1:5000'
WAIT = 30  # seconds
# Settings for engines that are reached from this machine.
NO_TLS = {'DOCKER_TLS_VERIFY': '', 'DOCKER_CERT_PATH': '', 'WORKSPACE_BIND_ADDRESS': '127.0.0.1'}
# Seconds that a node is away at least; a minute is more than any connection lives through.
AWAY = float(os.environ.get('AWAY', '0'))
# docker-init ends with all that runs beside it. Nothing of this machine's own engine must be found: /run has
# its sockets, /etc/docker its identity.
BOOT = """\
hostname {name} && ip link set lo up
mount -t tmpfs tmpfs /run
mkdir -p /etc/docker && mount --bind {folder}/etc /etc/docker
exec docker-init -s -- sleep infinity
"""
SSHD = """mkdir -p /run/sshd ~/.ssh
umask 077 && echo "$KEY" >~/.ssh/authorized_keys && echo "$HOST_KEY" >/host
exec /usr/sbin/sshd -D -e -f /dev/null -p "$PORT" -h /host"""


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

    def join(self):
        """Lay a cable to this machine, and return its address at our end; it goes with the namespace."""
        number = uuid.uuid4().int
        ours, theirs = [f'198.{18 + number % 2}.{number // 2 % 256}.{number // 512 % 64 * 4 + end}'
                        for end in (1, 2)]
        cable = f'cable{number % 10**9}'
        for command in (['ip', 'link', 'add', cable, 'type', 'veth', 'peer', 'eth0', 'netns',
                         str(self._holder.pid)],
                        ['ip', 'addr', 'add', f'{ours}/30', 'dev', cable], ['ip', 'link', 'set', cable, 'up'],
                        [*self.prefix, 'ip', 'addr', 'add', f'{theirs}/30', 'dev', 'eth0'],
                        [*self.prefix, 'ip', 'link', 'set', 'eth0', 'up']):
            subprocess.run(command, check=True)
        return ours

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


def until(condition, what):
    """Return what a condition gives as soon as it is true."""
    deadline = time.monotonic() + WAIT
    while not (value := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.03)
    return value


def child_of(process, name):
    """Return the number of the program that unshare or nsenter has started in its name spaces."""
    def find():
        with contextlib.suppress(OSError, IndexError):
            number = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()[0]
            return number if Path(f'/proc/{number}/comm').read_text().strip() == name else None
    return int(until(find, f'{name} does not start'))


def make_ssh(folder):
    """Make the ssh of a user whose keys, settings (`config`) and known hosts (`known`) are in a folder;
    return the PATH on which it is found, and the environment of an sshd that takes the key."""
    for key in ('id', 'host'):
        subprocess.run(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', folder / key], check=True)
    (folder / 'config').touch()
    (folder / 'ssh').write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/config -i {folder}/id '
                                f'-o UserKnownHostsFile={folder}/known "$@"\n')
    (folder / 'ssh').chmod(0o755)
    return f"{folder}:{os.environ['PATH']}", {'HOST_KEY': (folder / 'host').read_text(),
                                              'KEY': (folder / 'id.pub').read_text()}


class Machine:
    """One of them."""

    def __init__(self, machines, number):
        self.name, self.address = f'n{number}', f'{LAN}.{10 + number}'
        self.folder, self._machines = machines.folder / self.name, machines
        self.socket, self.url = f'unix://{self.folder}/docker.sock', f'tcp://{self.address}:{PORT}'
        self._host = self._engine = self._root = None
        self.client = docker.DockerClient(self.socket, version='1.41', timeout=60)
        for name in ('data', 'exec', 'etc'):
            (self.folder / name).mkdir(parents=True)

    def start(self):
        """Switch it on, with the disk that it has."""
        if self._host is None:
            for path in (self.folder / 'exec').iterdir():
                shutil.rmtree(path, ignore_errors=True)
            self._host = subprocess.Popen(
                ['unshare', '--net', '--mount', '--propagation', 'slave', '--uts', '--pid', '--fork',
                 '--kill-child', '--mount-proc', 'sh', '-c', BOOT.format(name=self.name, folder=self.folder)],
                stdin=subprocess.DEVNULL, start_new_session=True)
            self._root = child_of(self._host, 'docker-init')
            lan = self._machines.lan.prefix
            # The kernel may not be done with the last one of that name.
            subprocess.run([*lan, 'ip', 'link', 'del', self.name], stderr=subprocess.DEVNULL, check=False)
            # Its card is the same one, as that of a machine is that comes back.
            card = f"02:00:00:00:00:{int(self.address.rpartition('.')[2]):02x}"
            subprocess.run([*lan, 'sh', '-c', f'ip link add {self.name} type veth peer name eth0 '
                            f'address {card} netns {self._root} && ip link set {self.name} master br0 up'],
                           check=True)
            subprocess.run([*self.inside(), 'sh', '-c', f'ip addr add {self.address}/24 dev eth0 && '
                            f'ip link set eth0 up && ip route add default via {LAN}.1'], check=True)
        if self._engine is None:
            self._start_engine()
        return self

    def inside(self):
        """Return the words before a command that is to run in it."""
        return ['nsenter', f'--target={self._root}', '--net', '--mount', '--uts', '--pid', '--']

    def _start_engine(self):
        for name in ('dockerd.pid', 'exec/containerd/containerd.pid', 'docker.sock'):
            (self.folder / name).unlink(missing_ok=True)
        keys = self._machines.keys
        with open(self.folder / 'log', 'a') as log:
            self._engine = subprocess.Popen(
                [*self.inside(), 'env', f'TMPDIR={self.folder}', 'NO_PROXY=*', 'dockerd', '--data-root',
                 self.folder / 'data', '--exec-root', self.folder / 'exec', '--pidfile',
                 self.folder / 'dockerd.pid', '-H', self.socket, '-H', 'unix:///run/docker.sock',
                 '-H', f'tcp://0.0.0.0:{PORT}', '--tlsverify',
                 '--tlscacert', keys / 'ca.pem', '--tlscert', keys / 'server.pem',
                 '--tlskey', keys / 'server-key.pem',
                 *self._machines.options.get(self.name, ()),
                 '--exec-opt', 'native.cgroupdriver=cgroupfs', '--cgroup-parent', f'/{self._machines.group}'],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

        def answers():
            with contextlib.suppress(docker.errors.DockerException, OSError):
                return self.client.ping()
            assert self._engine.poll() is None, (self.folder / 'log').read_text()[-2000:]
        until(answers, 'the engine does not answer')

    @contextlib.contextmanager
    def reached_by_ssh(self, image, settings):
        """Let an sshd be there for the length of a block, with the programs of an image and the engine of
        this machine; `settings` is what `make_ssh` gives."""
        with contextlib.closing(docker.from_env()) as client:
            container = client.containers.run(
                image, entrypoint=['sleep', 'infinity'], detach=True, user='root', remove=True,
                network_mode='none', volumes={
                    f'{self.folder}/docker.sock': {'bind': '/var/run/docker.sock'},
                    shutil.which('docker'): {'bind': '/usr/bin/docker', 'mode': 'ro'}})
            root = client.api.inspect_container(container.id)['State']['Pid']
            sshd = subprocess.Popen(
                ['nsenter', f'--target={root}', '--mount', '--pid', '--root', '--wd',
                 f'--net=/proc/{self._root}/ns/net', '--', 'env', 'HOME=/root', 'PORT=22',
                 *(f'{name}={value}' for name, value in settings.items()), 'sh', '-c', SSHD],
                stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                yield
            finally:
                container.kill()
                sshd.wait()

    def run(self, command, **environment):
        """Run a shell line in it, and return what it prints."""
        done = subprocess.run([*self.inside(), 'bash', '-euo', 'pipefail', '-c', command], check=False,
                              env={**os.environ, **environment}, capture_output=True, text=True, timeout=60,
                              stdin=subprocess.DEVNULL)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def crash(self):
        """Kill its engine alone; its containers go on."""
        os.kill(child_of(self._engine, 'dockerd'), signal.SIGKILL)
        self._engine.wait()
        self._engine = None

    def off(self):
        """Cut its power: everything in it dies at once."""
        if self._host is not None:
            os.kill(self._root, signal.SIGKILL)
            self._host.wait()
            self._engine.wait()
            self._host = self._engine = None

    def link(self, state):
        """Take its network cable out (down), or plug it in (up); one that is off has none."""
        if self._host is not None:
            subprocess.run([*self._machines.lan.prefix, 'ip', 'link', 'set', self.name, state], check=True)


class Registry:
    """A registry in the network between machines, without TLS; its log says who asked for what. One that is
    locked takes nobody but the user ada with the password word."""

    def __init__(self, folder, network, address, *, locked=False):
        self.address, self.log, settings = address, folder / 'log', {
            'REGISTRY_VERSION': '0.1', 'REGISTRY_HTTP_ADDR': address, 'REGISTRY_LOG_LEVEL': 'error',
            'REGISTRY_STORAGE_FILESYSTEM_ROOTDIRECTORY': str(folder / 'data')}
        if locked:
            users = folder / 'users'
            users.write_text('ada:$2y$04$abcdefghijklmnopqrstuuB/GrfUOm5dtrEiT8lcouu5XB5ftbWLi\n')
            settings |= {'REGISTRY_AUTH_HTPASSWD_REALM': 'here', 'REGISTRY_AUTH_HTPASSWD_PATH': str(users)}
        (folder / 'config').write_text('version: 0.1\nstorage: {filesystem: {}}\n')
        with self.log.open('w') as log:
            self._process = subprocess.Popen([*network.prefix, 'docker-registry', 'serve', folder / 'config'],
                                             env=os.environ | settings, stdin=subprocess.DEVNULL, stdout=log,
                                             stderr=log)
        host, _, port = address.partition(':')

        def answers():
            with contextlib.suppress(OSError), network.entered():
                socket.create_connection((host, int(port))).close()
                return True
            assert self._process.poll() is None, self.log.read_text()
        until(answers, 'the registry does not answer')

    def count(self, method, path, *, asked_by):
        """Return how many requests it answered well whose path has a word in it."""
        lines = self.log.read_text().splitlines()
        return sum(line.startswith(asked_by.address + ' ') and f'"{method} ' in line and path in line
                   and ' 20' in line.rpartition('HTTP/1.1"')[2][:4] for line in lines)

    def close(self):
        self._process.kill()
        self._process.wait()


class Relay:
    """A door to the engine of a machine, which alters what comes through it: `changes` are {bytes: as many
    others} of what the engine says, `refused` {last word of a path: what is answered with a 500}."""

    def __init__(self, machine, address):
        self.changes, self.refused, self._machine = {}, {}, machine
        self._server = gevent.server.StreamServer((address, 0), self._serve)
        self._server.start()
        self.url = f'tcp://{address}:{self._server.server_port}'

    def _serve(self, client, _):
        with client, socket.socket(socket.AF_UNIX) as engine:
            engine.connect(self._machine.socket.removeprefix('unix://'))
            answering = gevent.spawn(self._answer, engine, client)
            with contextlib.suppress(OSError):
                while data := client.recv(65536):
                    path = data.partition(b' HTTP/1.1')[0].rpartition(b'/')[2].decode()
                    if path in self.refused:
                        text = json.dumps({'message': self.refused[path]})
                        client.sendall(f'HTTP/1.1 500 \r\nContent-Length: {len(text)}\r\n\r\n{text}'.encode())
                    else:
                        engine.sendall(data)
            answering.kill()

    def _answer(self, engine, client):
        with contextlib.suppress(OSError):
            while data := engine.recv(65536):
                for said, heard in self.changes.items():
                    data = data.replace(said, heard)
                client.sendall(data)
            client.shutdown(socket.SHUT_RDWR)

    def close(self):
        self._server.stop()


class Machines:
    """All of them; a server reaches them from the network between them, `lan`."""

    def __init__(self, folder, count, **options):
        self.folder, self.group = folder, f'machines-{os.getpid()}'
        self.options = options  # name of a machine -> words for its engine
        self.lan = Network()
        subprocess.run([*self.lan.prefix, 'sh', '-c', 'ip link add br0 type bridge && ip addr add '
                        f'{LAN}.1/24 dev br0 && ip link set br0 up'], check=True)
        addresses = ','.join(f'IP:{LAN}.{10 + number}' for number in range(1, count + 1))
        self.keys = make_certificates(folder / 'keys', addresses)
        self.settings = {'DOCKER_TLS_VERIFY': '1', 'DOCKER_CERT_PATH': str(self.keys)}
        self.all = [Machine(self, number) for number in range(1, count + 1)]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(pool.map(Machine.start, self.all))

    def __getitem__(self, number):
        return self.all[number - 1]

    def swarm(self):
        """Make them a swarm of managers, which notices within seconds when one is gone."""
        first, *others = self.all
        first.client.swarm.init(advertise_addr=first.address, dispatcher_heartbeat_period=1_000_000_000)
        token = first.client.swarm.attrs['JoinTokens']['Manager']
        for machine in others:
            machine.client.swarm.join([f'{first.address}:2377'], token, advertise_addr=machine.address)

    def close(self):
        for machine in self.all:
            machine.client.close()
            machine.off()
        self.lan.close()
        for path in sorted(Path('/sys/fs/cgroup').rglob(f'{self.group}*'), reverse=True):
            for inner in sorted(path.rglob('*'), reverse=True):
                with contextlib.suppress(OSError):
                    inner.rmdir()
            with contextlib.suppress(OSError):
                path.rmdir()
        for _ in range(50):  # its mounts go a moment after its last process
            shutil.rmtree(self.folder, ignore_errors=True)
            if not self.folder.exists():
                return
            time.sleep(0.1)
        raise AssertionError(f'{self.folder} can not be removed')
