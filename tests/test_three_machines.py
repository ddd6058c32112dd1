"""A server over three machines that is killed again and again while these come and go; and the way from one
machine to three, as the README has it word for word."""
import collections
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import time

import pytest
from conftest import ROOT, objects_of
from helpers import delete
from machines import child_of, make_ssh, until
from streaming import receive, send

KILLS = int(os.environ.get('KILLS', '4'))  # of the server over three machines; each takes some 5 seconds
# Says whose volume it is, as far as it was written down, and writes it down.
MARK = 'cat /workspace/mark; echo $WORKSPACE_ID >/workspace/mark'


class Crowd:
    """Users who create, stop, start and delete, and what they know: what was promised to be there, and what
    they wanted gone."""

    def __init__(self, server, dice):
        self._server, self._dice, self._calls = server, dice, []
        self.made, self._nodes = {}, {}  # id -> type, node; of creates that were answered
        self.doomed, self.gone = set(), set()  # ids that somebody ended, and whose deletion was answered

    def act(self, lost=None):
        """Begin a call, or delete what is on a node that is lost, if there is anything."""
        action = self._dice.choice(('create', 'create', 'create', 'stop', 'start', 'restart', 'delete'))
        alive = sorted(self.made.keys() - self.doomed)
        on_it = [key for key in alive if self._nodes[key] == lost]
        if on_it:
            action, alive = 'delete', on_it
        if action == 'create' or not alive:
            kind = self._dice.choice(('persistent', 'persistent', 'agent', 'temporary'))
            body = {'name': f'w{self._dice.randrange(9)}', 'type': kind}
            self._calls.append((kind, '', send(self._server, 'POST', '/api/workspaces', body)))
            return
        chosen = self._dice.choice(alive)
        if action == 'delete' or (self.made[chosen], action) == ('temporary', 'stop'):
            self.doomed.add(chosen)
        method, end = ('DELETE', '') if action == 'delete' else ('POST', f'/{action}')
        self._calls.append(('', chosen if action == 'delete' else '',
                            send(self._server, method, f'/api/workspaces/{chosen}{end}')))

    def hear(self):
        """Take the answers that came before the server was killed."""
        for kind, deleted, call in self._calls:
            with contextlib.suppress(OSError, ValueError):
                status, answer = receive(call)
                if kind and status == 201:
                    made = answer['data']
                    self.made[made['id']], self._nodes[made['id']] = kind, made['node']
                if deleted and status < 300:
                    self.gone.add(deleted)
        self._calls.clear()


def come_back(machine):
    """Plug its cable in, and switch it on."""
    machine.link('up')
    machine.start()


def by_node(server, machines):
    """Return [(machine, {id: its container}, ids of its volumes)] of what an instance has on each."""
    filters = {'label': f'agentbackend.instance={server.instance}'}
    for machine in machines.all:
        api = machine.client.api
        yield machine, {item['Labels']['agentbackend.id']: item for item in
                        api.containers(all=True, filters=filters)}, {
            item['Labels']['agentbackend.id'] for item in api.volumes(filters=filters)['Volumes'] or ()}


def check_truth(server, machines, crowd, marked):
    """See that each record is true, and that nothing is there without one; write down in each volume whose it
    is, and see that those are there that were written down before."""
    found = {item['id']: item for item in server.get('/api/workspaces')}
    assert crowd.made.keys() - crowd.doomed <= found.keys(), 'one is lost'
    assert not crowd.gone & found.keys(), 'one has come back'
    assert not [item for item in found.values() if item['status'] not in ('running', 'stopped')], found
    for machine, containers, volumes in by_node(server, machines):
        assert volumes == containers.keys() == {
            key for key, item in found.items() if item['node'] == machine.address}
        for key, container in containers.items():
            assert container['State'] == {'running': 'running', 'stopped': 'exited'}[found[key]['status']]
            if container['State'] == 'running':
                _, said = machine.client.containers.get(container['Id']).exec_run(['sh', '-c', MARK])
                assert said.decode().endswith(f'{key}\n' if key in marked else '')
                marked.add(key)
    used = collections.Counter()
    for item in found.values():
        used.update(codeServer=1, ssh=1, custom=len(item['ports']))
    assert {name: count['used'] for name, count in server.get('/health')['ports'].items()} == {
        name: used[name] for name in ('codeServer', 'ssh', 'custom')}


def wait_for_truth(server, machines, crowd, marked):
    """Wait until `check_truth` is content: a node that answers is looked at in the next moment."""
    deadline = time.monotonic() + 15
    while True:
        try:
            return check_truth(server, machines, crowd, marked)
        except AssertionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def test_kills_while_machines_come_and_go_lose_nothing(serve, machines):
    server, dice, marked = serve(), random.Random(KILLS), set()
    crowd = Crowd(server, dice)

    def is_settled():
        return server.get('/health')['nodes']['ready'] == 3 and not [
            item for item in server.get('/api/workspaces')
            if item['status'] in ('creating', 'stopping', 'deleting') or item.get('error')]
    server.until(lambda: server.get('/health')['nodes']['ready'] == 3)
    for turn in range(KILLS):
        away = dice.choice(machines.all) if turn % 4 else None
        is_off = turn % 4 == 3
        print(f'--- {turn}: {away and away.address} {"off" if is_off else "cut"}, {len(crowd.made)} made')
        moments = sorted(dice.random() * 1.5 for _ in range(5))
        begun = time.monotonic()
        for number, moment in enumerate(moments):
            time.sleep(max(0, begun + moment - time.monotonic()))
            if away and number == 2:
                away.off() if is_off else away.link('down')
            crowd.act(lost=away and number == 2 and away.address)
        time.sleep(dice.random() ** 2)
        server.kill()
        crowd.hear()
        if is_off:  # a temporary one ends with its container
            crowd.doomed |= {key for key, kind in crowd.made.items() if kind == 'temporary'}
        is_back_first = dice.random() < 0.4
        if away and is_back_first:
            come_back(away)
        server.start()
        if away and not is_back_first:
            found = {item['id'] for item in server.get('/api/workspaces')}
            assert crowd.made.keys() - crowd.doomed <= found, 'one is lost'
            come_back(away)
        server.until(is_settled, 60)
        wait_for_truth(server, machines, crowd, marked)
    for item in server.get('/api/workspaces'):
        delete(server, item['id'])
    for machine in machines.all:
        assert objects_of(machine.client, server.instance) == []
    assert [count['used'] for count in server.get('/health')['ports'].values()] == [0, 0, 0]


# The README

SECTION = (ROOT / 'README.md').read_text().partition('\n## From one machine to three\n')[2].partition(
    '\n## ')[0]
INIT, SERVE, CALLS = re.findall(r'```sh\n(.*?)```', SECTION, re.DOTALL)


def told(command):
    """Return a command that stands between the lines of the README."""
    assert f'`{command}`' in SECTION
    return command


class First:
    """The first machine, on which the server runs and all is typed."""

    def __init__(self, machine, folder, **environment):
        self.machine, self.log = machine, folder / 'log'
        self._process = None
        self._environment = {'STATE_DIR': str(folder), 'INSTANCE': 'test-three', 'PREBUILD': 'none',
                             'DEFAULT_TEMPLATE': 'tiny', 'LOG_LEVEL': 'debug', **environment}

    def type(self, line):
        """Return what a line prints, as JSON where it is an answer of the server."""
        said = self.machine.run(line, **self._environment)
        return json.loads(said) if line.startswith('curl') else said

    def serve(self, line):
        """Start a server by a line, and wait until it has found its engines."""
        with open(self.log, 'a') as log:
            self._process = subprocess.Popen(
                [*self.machine.inside(), 'env', f'--chdir={ROOT}', 'bash', '-c', line],
                env={**os.environ, **self._environment}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True)

        def is_ready():
            assert self._process.poll() is None, self.log.read_text()[-3000:]
            with contextlib.suppress(AssertionError):  # nobody listens yet
                health = self.type('curl -s localhost:3100/health')
                counts = (health.get('nodes') or {'total': 1, 'ready': 1}).values()
                return health['docker'] == 'connected' and len(set(counts)) == 1
        until(is_ready, 'the server does not connect')

    def stop(self):
        """End the server, as a service manager would."""
        if self._process and self._process.poll() is None:
            os.kill(child_of(self._process, 'python3'), signal.SIGTERM)
            self._process.wait(30)

    def get(self, name):
        """Return a workspace, or an error."""
        answer = self.type(f'curl -s localhost:3100/api/workspaces/{name}')
        return answer.get('data', answer)

    def until(self, name, **fields):
        """Wait until a workspace has these values, and return it."""
        def found():
            workspace = self.get(name)
            return workspace if workspace | fields == workspace else None
        return until(found, (name, fields))

    def create(self, **body):
        """Ask for a workspace, and return it or the error."""
        return self.post('', body)

    def post(self, path, body=None):
        """Call what changes a workspace."""
        said = self.type(f'curl -s localhost:3100/api/workspaces{path} -H "Content-Type: application/json" '
                         f"-d '{json.dumps(body or {})}'")
        return said.get('data', said)

    def delete(self, name):
        """Delete a workspace."""
        return self.type(f'curl -s -X DELETE localhost:3100/api/workspaces/{name}')['data']


@pytest.fixture
def first(machines, base_image, templates_dir, tmp_path):
    """The first of three machines, which reaches the others by ssh."""
    home = tmp_path / 'home'
    home.mkdir()
    path, keys = make_ssh(home)
    (home / 'known').write_text(''.join(f"{machine.address} {(home / 'host.pub').read_text()}"
                                        for machine in machines.all))
    found = First(machines[1], tmp_path, PATH=path, TEMPLATES_DIR=str(templates_dir))
    with machines[2].reached_by_ssh(base_image, keys), machines[3].reached_by_ssh(base_image, keys):
        yield found
        found.stop()
    print(found.log.read_text()[-12000:])


def test_from_one_machine_to_three_works_as_it_stands(first, machines):
    first.serve('exec .venv/bin/agentbackend')
    first.create(name='before')
    before = first.until('before', status='running')
    first.stop()
    said = first.type(INIT)
    for machine in machines.all[1:]:
        machine.run(re.search(r'docker swarm join --token .*', said)[0])
    first.type(told('docker node promote n2 n3'))
    first.type('docker swarm update --dispatcher-heartbeat 1s')  # so that a lost machine is soon noticed
    assert 'Server:' in first.type(told('ssh 192.168.1.12 docker version'))
    first.serve(SERVE)

    asked, here, label, fast, drain, no = CALLS.splitlines()
    nodes = first.type(asked)['data']
    assert {node['name']: node['address'] for node in nodes} == {
        machine.name: machine.address for machine in machines.all}
    kept = ('id', 'status', 'containerId', 'codeServerPort', 'createdAt')
    assert {key: first.get('before')[key] for key in kept} == {key: before[key] for key in kept}
    assert first.get('before')['node'] == 'n1'
    first.post('/before/restart')
    assert first.until('before', status='running')['codeServerPort'] == before['codeServerPort']
    machines[2].run(f"curl -fsS 192.168.1.11:{before['codeServerPort']}/healthz")
    assert first.type(here)['data']['node'] == 'n2'
    assert first.until('here', status='running')['codeServerUrl'].startswith('http://192.168.1.12:')
    first.type(label)
    made = first.type(fast)['data']
    assert made['node'] == 'n3'
    made = first.until('fast', status='running')
    assert made['sshCommand'].endswith('@192.168.1.13')
    first.type(drain)
    assert first.create(name='more')['node'] in ('n1', 'n2')
    first.type(no)
    assert first.create(name='again')['node'] == 'n2'
    refused = first.create(name='refused', constraints={'disk': 'ssd'})
    assert refused['code'] == 'NO_ROOM'
    for part in ('n1 has the label agentbackend=no', 'n2 is not disk=ssd', 'n3 is set to drain'):
        assert part in refused['error']
    refused = first.create(name='refused', memory=10**12)
    assert refused['code'] == 'NO_ROOM' and 'n2 has ' in refused['error'], refused
    assert 'GB of memory that are not promised' in refused['error']
    first.post('/fast/restart')
    first.until('fast', status='running', containerId=made['containerId'])

    # A machine that never comes back.
    machines[2].link('down')
    until(lambda: first.get('here')['error'], 'nothing is told of the lost node')
    assert 'Node n2 does not answer since' in first.get('here')['error']
    assert first.get('here')['status'] == 'running'
    assert first.delete('here') | {'deleted': False, 'status': 'deleting'} == first.delete('here')
    until(lambda: 'n2 Down' in first.type('docker node ls --format "{{.Hostname}} {{.Status}}"'),
          'the swarm does not notice')
    first.type(told('docker node demote n2'))
    first.type(told('docker node rm n2'))
    until(lambda: first.get('here').get('code') == 'WORKSPACE_NOT_FOUND', 'it is not forgotten')
    assert first.delete('again')['deleted'] and first.get('before')['status'] == 'running'
