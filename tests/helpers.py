"""What test modules share and is no fixture: calls of the API, looks at the engine and into the state file,
and an engine that may die."""
import contextlib
import json
import os
import re
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import docker
from conftest import ROOT

NEW_KEY = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes']
CLONE_FAILS = {'CLONE_FAILS': 'repository https://git.invalid/x.git not found'}


# Workspaces

def verb(server, name, action, status=202):
    """Call start, stop or restart, and return the answer's data or error."""
    answer = server.call('POST', f'/api/workspaces/{name}/{action}')
    assert answer.status_code == status, answer.text
    return answer.json().get('data') or answer.json()
PUBLIC_KEY = ('ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIG/jrSXluj6XeMdoyGzdDfi+'
              'ShehmCOwO318jfrIA01d me@laptop')


def delete(server, name, status=200):
    """Delete a workspace."""
    answer = server.call('DELETE', f'/api/workspaces/{name}')
    assert answer.status_code == status, answer.text


def patch(server, workspace, **fields):
    """Change a workspace, and return it."""
    answer = server.call('PATCH', f'/api/workspaces/{workspace}', fields)
    assert answer.status_code == 200, answer.text
    return answer.json()['data']


def wait_gone(server, name, timeout=15):
    """Wait until there is no such workspace."""
    server.until(lambda: server.call('GET', f'/api/workspaces/{name}').status_code == 404, timeout)


def left_of(client, server, workspace):
    """Return what the engine still has of a workspace."""
    filters = {'label': f"agentbackend.id={workspace['id']}"}
    return (client.api.containers(all=True, filters=filters),
            client.api.volumes(filters=filters)['Volumes'] or [])


def inspect(client, server, name):
    """Return what the engine says of a workspace's container."""
    return client.api.inspect_container(f'{server.instance}-{name}')


def in_container(client, server, name, command):
    """Run a shell line in a workspace, with the environment of its shells, and return what it printed."""
    command = f'[ ! -f /etc/agentbackend/env ] || . /etc/agentbackend/env; {command}'
    code, printed = client.containers.get(f'{server.instance}-{name}').exec_run(['sh', '-c', command])
    assert code == 0, printed
    return printed.decode().strip()


def seconds_left(text):
    """Return how many seconds from now a time of the API is."""
    return (datetime.fromisoformat(text.replace('Z', '+00:00')) - datetime.now(timezone.utc)).total_seconds()


# Nodes

def nodes(server):
    """Return {name: what is told of it} of each node."""
    return {node['name']: node for node in server.get('/api/nodes')}


def all_ready(server):
    """Return whether every node answers."""
    return all(node['state'] == 'ready' for node in nodes(server).values())


def refusal(server, **body):
    """Return (status, code, error) of a workspace that is not made."""
    answer = server.call('POST', '/api/workspaces', body)
    return answer.status_code, answer.json().get('code'), answer.json().get('error')


# The state file

def state_path(server):
    """Return the path of a server's state file."""
    return server.folder / 'state' / f'{server.instance}.sqlite'


def kept(path, table='workspaces'):
    """Return the records of a table of a state file as they are on disk; those of workspaces and sessions by
    their ids."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        records = [json.loads(text) for text, in connection.execute(f'SELECT record FROM {table}')]
    return records if table == 'runs' else {record['id']: record for record in records}


def lose(path):
    """Remove a state file with what SQLite keeps beside it."""
    for end in ('', '-wal', '-shm'):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + end).unlink()


def lose_all(client, server):
    """Remove the state file of a server that was killed, and its claim to the instance: the next one, whose
    state has another name, would wait for its owner to answer."""
    lose(state_path(server))
    filters = {'label': f'agentbackend.claim={server.instance}'}
    for item in client.api.volumes(filters=filters)['Volumes'] or ():
        client.api.remove_volume(item['Name'])


def give_records(server, *workspaces):
    """Let a server that is stopped know workspaces when it starts: those of the file that earlier versions
    kept are taken over."""
    lose(state_path(server))
    state_path(server).with_suffix('.json').write_text(json.dumps({'version': 1, 'workspaces': workspaces}))


# The engine

def same_mounts(client, inspected, **options):
    """Return a host config with the mounts of a container: the volume is a part of what makes it a
    workspace's."""
    mounts = [docker.types.Mount(target=mount['Destination'], source=mount['Name'], type='volume')
              for mount in inspected['Mounts']]
    return client.api.create_host_config(mounts=mounts, **options)


class OwnEngine:
    """A Docker engine of our own, in a network of its own, that may die and come back."""

    def __init__(self, folder, network, *options):
        self.network, self.socket = network, folder / 'docker.sock'
        self._log, self._data = open(folder / 'dockerd.log', 'a'), folder / 'data'
        self._command = [*network.prefix, 'dockerd', '--data-root', str(self._data), '--exec-root',
                         str(folder / 'exec'),
                         '--host', f'unix://{self.socket}', '--pidfile', str(folder / 'pid'), *options]
        self._containerd = folder / 'exec' / 'containerd' / 'containerd.pid'
        self._process = None
        self.client = None

    def start(self):
        # A containerd that was killed along with its dockerd passes for a living one where nobody reaps it.
        self._containerd.unlink(missing_ok=True)
        self._process = subprocess.Popen(self._command, stdout=self._log, stderr=self._log,
                                         stdin=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + 30
        while True:
            try:
                self.client = docker.DockerClient(f'unix://{self.socket}', timeout=30)
                return self
            except docker.errors.DockerException:
                log = Path(self._log.name).read_text()[-3000:]
                assert time.monotonic() < deadline and self._process.poll() is None, log
                time.sleep(0.1)

    def end(self, number):
        self.client.close()
        self._process.send_signal(number)
        self._process.wait(60)

    def close(self):
        if self._process.poll() is not None:
            self.start()
        for item in self.client.api.containers(all=True):
            with contextlib.suppress(docker.errors.NotFound):
                self.client.api.remove_container(item['Id'], force=True, v=True)
        self.end(15)
        self._log.close()
        # A dockerd mounts its folder onto itself, and one that was killed leaves that behind.
        subprocess.run(['umount', '--recursive', self._data], stderr=subprocess.DEVNULL, check=False)
        shutil.rmtree(self._data)


def openssl(folder, *arguments):
    subprocess.run(['openssl', *arguments], cwd=folder, check=True, capture_output=True)


def make_certificates(folder, addresses='IP:127.0.0.1'):
    """Make an authority with the certificates of an engine at these addresses and of a client, these as
    DOCKER_CERT_PATH has them."""
    folder.mkdir()
    openssl(folder, 'req', '-x509', *NEW_KEY, '-subj', '/CN=authority', '-keyout', 'ca-key.pem',
            '-out', 'ca.pem')
    for name, use in (('server', f'subjectAltName={addresses}\nextendedKeyUsage=serverAuth\n'),
                      ('client', 'extendedKeyUsage=clientAuth\n')):
        (folder / 'extensions').write_text(use)
        openssl(folder, 'req', *NEW_KEY, '-subj', f'/CN={name}', '-keyout', f'{name}-key.pem',
                '-out', 'asked')
        openssl(folder, 'x509', '-req', '-in', 'asked', '-CA', 'ca.pem', '-CAkey', 'ca-key.pem',
                '-CAcreateserial', '-extfile', 'extensions', '-out', f'{name}.pem')
    for name, wanted in (('client.pem', 'cert.pem'), ('client-key.pem', 'key.pem')):
        (folder / name).rename(folder / wanted)
    return folder


# Processes

def run_second(first, **settings):
    """Run a server that can't start, with the settings of another one but for those named; return how it
    ended."""
    env = {key: value for key, value in os.environ.items()
           if key not in ('API_TOKEN', 'HOST')} | first.settings | {'LOG_LEVEL': 'info'} | settings
    return subprocess.run([sys.executable, str(ROOT / 'agentbackend.py')], env=env, capture_output=True,
                          text=True, timeout=60, stdin=subprocess.DEVNULL)


def memory_of(server, kind='VmRSS'):
    """Return how many bytes of memory a server has, or has had at most (VmHWM) since `reset_peak`."""
    status = Path(f'/proc/{server.process.pid}/status').read_text()
    return int(re.search(rf'{kind}:\s+(\d+)', status)[1]) * 1024


def reset_peak(server):
    """Forget how much memory a server has had at most."""
    Path(f'/proc/{server.process.pid}/clear_refs').write_text('5')


def free_port():
    """Return a port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


# Fairness

def seconds_of(call):
    """Return how long a call takes."""
    begun = time.monotonic()
    call()
    return time.monotonic() - begun


def usual(waits):
    """Return what a call takes usually, whatever a busy machine did to some of them."""
    return statistics.median(waits)


def check_fairness(waits, alone, *, times=40):
    """See that calls which came while somebody else kept the server busy took at most so many times as long
    as the same calls alone.

    A promise of fairness is no promise of speed: both are measured in one run, on a machine as busy as it is.
    Whoever waits until a flood has ended waits seconds, or for ever.
    """
    assert usual(waits) < times * usual(alone) + 0.5, (usual(waits), usual(alone))
    assert max(waits) < times * max(alone) + 5, (sorted(waits)[-3:], sorted(alone)[-3:])
