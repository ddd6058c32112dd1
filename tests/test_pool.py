"""Workspaces that are made ahead: how they are given away, what is never given away, and what a crash at any
moment leaves."""
import contextlib
import json
import random
import subprocess
import time

import docker
import pytest
from conftest import (
    Served,
    concurrently,
    objects_of,
    port_ranges,
    program_with,
    remove_objects,
    write_template,
)
from helpers import (
    PUBLIC_KEY,
    OwnEngine,
    delete,
    in_container,
    inspect,
    left_of,
    lose,
    lose_all,
    patch,
    state_path,
    verb,
)

# As the entrypoint of templates/base: it takes its settings over stdin, once, and sshd comes last.
HEARING_ENTRY = """\
#!/bin/busybox sh
trap 'exit 0' TERM
settings=/etc/agentbackend
mkdir -p $settings /www /tmp
echo '{"status":"alive","lastHeartbeat":0}' >/www/healthz
httpd -p 8443 -h /www
if [ "$WORKSPACE_SETTINGS" = stdin ] && [ ! -e $settings/owned ]; then
    [ ! -e $settings/taken ] || exit 1
    echo "workspace: waits for its owner"
    read -r word length
    echo "$word" >$settings/taken
    sleep 0
    head -c "$length" | tar -x -C /
    echo "$word" >$settings/owned
    echo "workspace: owned $word"
fi
. $settings/env
tr '\\000' '\\n' <$settings/workspace >/tmp/told
export PROJECT_DIR=$(sed -n 's/^PROJECT_DIR=//p' /tmp/told)
url=$(sed -n 's/^GIT_URL=//p' /tmp/told)
mkdir -p "$PROJECT_DIR"
if [ -n "$FORWARDS" ] && [ ! -e "$PROJECT_DIR/cloned" ]; then
    touch "$PROJECT_DIR/cloned"
    echo "workspace: forward $FORWARDS"
    exit 66
fi
[ -z "$PREPARES" ] || sleep "$PREPARES"
[ -z "$url" ] || { echo "fatal: repository $url not found" >&2; exit 65; }
nc -ll -p 2222 -e /bin/banner &
echo "workspace: started in $PROJECT_DIR"
while :; do sleep 1000 & wait $!; done
"""
# Pauses of a pool that is in no hurry.
HASTY = {'pool.FIRST_RETRY': 1, 'pool.LOOK_PAUSE': 1, 'workspaces.QUIET': 0.1, 'keeper.TEND_PAUSE': 0.1}
# A server in which somebody renames a workspace while it is given its member.
RENAMING = """
import gevent
from _agentbackend.engine import Engine
from _agentbackend.workspaces import Workspaces
create, create_volume, found = Workspaces.create, Engine.create_volume, []
def creating(self, body):
    found.append(self)
    return create(self, body)
def renaming(self, name, labels):
    if name.endswith('-hold'):
        gevent.spawn(found[0].change, 'old', {'name': 'new'}).join(1)
    return create_volume(self, name, labels)
Workspaces.create, Engine.create_volume = creating, renaming
"""
# A server that is killed as soon as it has done a step of a claim.
KILLED = """
import os, signal, sys
from _agentbackend.engine import Engine
from _agentbackend.probes import Probes
from _agentbackend.state import State
from _agentbackend.workspaces import Workspaces
OWNERS = {'Engine': Engine, 'Probes': Probes, 'State': State, 'Workspaces': Workspaces}
step, words = sys.argv[1], sys.argv[2:]
owner, _, name = step.partition('.')
done = getattr(OWNERS[owner], name)
def killing(*arguments, **options):
    result = done(*arguments, **options)
    if all(word in f'{arguments} {options}' for word in words):
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(OWNERS[owner], name, killing)
"""
# Each step of a claim, and whether a server that has lost its state file can know that there was one.
STEPS = {'reserved': (['State.reserve'], False), 'written': (['State.try_flush'], False),
         'held': (['Engine.create_volume', '-hold'], False), 'renamed': (['Engine.rename'], False),
         'told': (['Engine.tell'], True), 'up': (['Probes.meter'], True),
         'running': (['Workspaces._set_status', "'running'"], True), 'kept': (['Engine.keep_running'], True)}


def write_hearing(folder, name, test, pause=0):
    """Write a tiny template that waits for its owner as that of templates/base does, and takes its time for
    what it is told."""
    write_template(folder, name, test)
    (folder / name / 'entry').write_text(HEARING_ENTRY.replace('sleep 0', f'sleep {pause}'))


@pytest.fixture(scope='module')
def hearing(tmp_path_factory, layers):
    """A folder with the templates `mute` and `hears`, whose images are built once."""
    folder = tmp_path_factory.mktemp('hearing')
    write_template(folder, 'mute', layers, ['LABEL agentbackend.settings='])
    write_hearing(folder, 'hears', layers)
    return folder


@pytest.fixture
def pooled(hearing, make_server):
    """A function that starts a server with a pool."""
    def make(pool='hears:2', **settings):
        return make_server(**{'TEMPLATES_DIR': str(hearing), 'PREBUILD': 'hears', 'constants': HASTY,
                              'DEFAULT_TEMPLATE': 'hears', 'WARM_POOL': pool, **settings})
    return make


def pool_of(server, kind='hears'):
    return server.get('/health')['pool'][kind]


def wait_ready(server, count=2, kind='hears', timeout=60):
    """Wait until so many members wait."""
    def look():
        found = pool_of(server, kind)
        return found['ready'] == count and not found['making']
    server.until(look, timeout)


def members(client, server):
    """Return the names of the containers that wait."""
    return [name.lstrip('/') for name in objects_of(client, server.instance) if '.pool.' in name]


def test_a_create_is_given_what_waits(pooled, docker_client):
    server = pooled()
    wait_ready(server)
    waiting = {name.rpartition('.')[2] for name in members(docker_client, server)}
    made = server.create('first', sshPublicKeys=[PUBLIC_KEY], env={'HELLO': 'you and me'}, labels={'a': 'b'},
                         ttl=5000, memory='512m', cpus=0.5)
    assert made['warm'] and made['id'] in waiting
    found = server.wait_status('first', 'running')
    assert found['warm'] and found['codeServerPort'] == made['codeServerPort']
    assert found['labels'] == {'a': 'b'}
    inspected = inspect(docker_client, server, 'first')
    assert inspected['HostConfig']['Memory'] == 2**29 and inspected['HostConfig']['NanoCpus'] == 5 * 10**8
    server.until(lambda: inspect(docker_client, server, 'first')
                 ['HostConfig']['RestartPolicy']['Name'] == 'unless-stopped')
    assert in_container(docker_client, server, 'first', 'echo $HELLO') == 'you and me'
    assert in_container(docker_client, server, 'first', 'ls -d /workspace/first') == '/workspace/first'
    keys = in_container(docker_client, server, 'first', 'cat /etc/agentbackend/authorized_keys')
    assert keys == PUBLIC_KEY
    assert pool_of(server)['claimed'] == 1
    wait_ready(server)  # it is made up for
    # It lives as any other does.
    patch(server, 'first', name='second', env={'HELLO': 'me'})
    verb(server, 'second', 'stop')
    server.wait_status('second', 'stopped')
    verb(server, 'second', 'start')
    server.wait_status('second', 'running')
    assert in_container(docker_client, server, 'second', 'echo $HELLO') == 'me'
    patch(server, 'second', ports=[3000])
    verb(server, 'second', 'restart')
    server.until(lambda: server.get('/api/workspaces/second')['ports'].get('3000'))
    server.wait_status('second', 'running')
    delete(server, 'second')
    assert left_of(docker_client, server, made) == ([], [])


def test_members_show_nowhere_but_in_health(pooled, docker_client):
    server = pooled()
    wait_ready(server)
    health = server.get('/health')
    assert health['workspaces']['total'] == 0 and server.get('/api/workspaces') == []
    assert health['ports']['ssh'] == {'used': 2, 'total': 28, 'pool': 2}
    assert health['pool'] == {'hears': {'wanted': 2, 'ready': 2, 'making': 0, 'claimed': 0, 'missed': 0,
                                        'error': None}}
    for name in members(docker_client, server):
        environment = docker_client.api.inspect_container(name)['Config']['Env']
        assert not any('password' in line.lower() or 'GIT' in line for line in environment)


def test_many_creates_at_once_each_have_a_member_of_their_own(pooled, docker_client):
    server = pooled('hears:3')
    wait_ready(server, 3)
    made = concurrently(*(lambda n=n: server.create(f'w{n}') for n in range(6)))
    assert len({item['id'] for item in made}) == 6
    assert sum(item['warm'] for item in made) == 3 and pool_of(server)['missed'] == 3
    for n in range(6):
        server.wait_status(f'w{n}', 'running')
        assert in_container(docker_client, server, f'w{n}', f'ls -d /workspace/w{n}')


@pytest.mark.parametrize('fields', [{'ports': [3000]}, {'ssh': False}, {'type': 'agent'},
                                    {'template': 'mute'},
                                    {'env': {'ONE': 'x' * 30_000, 'TWO': 'x' * 30_000}}],
                         ids=lambda fields: '-'.join(fields))
def test_what_no_member_can_be_is_made_the_cold_way(fields, pooled, docker_client):
    server = pooled('hears:1')
    wait_ready(server, 1)
    made = server.create('cold', **fields)
    assert made['warm'] is ('env' in fields)  # which is only then seen to be too much to say
    assert not server.wait_status('cold', 'running')['warm']
    assert pool_of(server)['claimed'] == int('env' in fields)
    delete(server, 'cold')
    assert left_of(docker_client, server, made) == ([], [])


def test_agents_have_a_pool_of_their_own(pooled, docker_client):
    server = pooled('hears/agent:1')
    wait_ready(server, 1, 'hears/agent')
    assert not server.create('plain')['warm']
    assert server.create('agent', type='agent')['warm']
    server.wait_status('agent', 'running')
    assert inspect(docker_client, server, 'agent')['HostConfig']['SecurityOpt'] == ['no-new-privileges']
    assert 'WORKSPACE_TYPE=agent' in in_container(docker_client, server, 'agent',
                                                  "tr '\\000' '\\n' </etc/agentbackend/workspace")


def test_a_clone_that_fails_takes_its_member_along(pooled, docker_client):
    server = pooled('hears:1')
    wait_ready(server, 1)
    made = server.create('cloned', gitUrl='https://git.invalid/x.git')
    assert made['warm']
    assert 'repository https://git.invalid/x.git not found' in server.wait_status('cloned', 'error')['error']
    server.until(lambda: left_of(docker_client, server, made) == ([], []))
    assert server.create('next')['id'] != made['id']


def test_an_edited_template_is_never_served_stale(own_templates, layers, pooled, docker_client):
    folder, _ = own_templates
    write_hearing(folder, 'hears', layers)
    server = pooled('hears:1', TEMPLATES_DIR=str(folder))
    wait_ready(server, 1)
    old = members(docker_client, server)
    with open(folder / 'hears' / 'entry', 'a') as entry:
        entry.write('# edited\n')
    made = server.create('fresh')
    assert not made['warm']
    server.wait_status('fresh', 'running')
    server.until(lambda: members(docker_client, server) not in (old, []), 60)
    wait_ready(server, 1)
    assert server.create('again')['warm']


@pytest.mark.parametrize('pool', ['', 'hears:1'], ids=['cold', 'warm'])
def test_a_change_while_a_container_takes_its_settings_is_not_lost(pool, own_templates, layers, pooled,
                                                                   docker_client):
    folder, _ = own_templates
    write_hearing(folder, 'hears', layers, pause=2)
    server = pooled(pool, TEMPLATES_DIR=str(folder))
    if pool:
        wait_ready(server, 1)
    server.create('mine', env={'MY': 'old'})

    def is_taken():
        with contextlib.suppress(docker.errors.APIError):
            found = docker_client.containers.get(f'{server.instance}-mine')
            return found.exec_run(['test', '-e', '/etc/agentbackend/taken'])[0] == 0
    server.until(is_taken)
    patch(server, 'mine', env={'MY': 'new'})
    assert server.get('/api/workspaces/mine')['status'] == 'creating'
    server.wait_status('mine', 'running')
    assert in_container(docker_client, server, 'mine', 'echo $MY') == 'new'


def test_what_waits_is_looked_after(pooled, docker_client):
    server = pooled()
    wait_ready(server)
    dead, mute = members(docker_client, server)
    docker_client.api.kill(dead)
    code, _ = docker_client.containers.get(mute).exec_run(['killall', 'httpd'])
    assert code == 0
    server.until(lambda: pool_of(server)['ready'] < 2, 40)
    server.until(lambda: not {dead, mute} & set(members(docker_client, server)), 60)
    wait_ready(server)


def test_a_member_that_dies_unseen_costs_nobody_a_workspace(pooled, docker_client):
    server = pooled('hears:1', constants={**HASTY, 'pool.LOOK_PAUSE': 10_000})
    wait_ready(server, 1)
    docker_client.api.kill(members(docker_client, server)[0])
    assert server.create('mine')['warm']
    assert not server.wait_status('mine', 'running')['warm']  # it was made the cold way in the end


def test_full_ranges_give_members_up_before_a_user_is_refused(pooled, docker_client):
    first = int(port_ranges()['SSH_PORTS'].partition('-')[0])
    server = pooled('hears:2', SSH_PORTS=f'{first}-{first + 2}')
    wait_ready(server)
    assert not server.create('one', type='agent')['warm']
    server.wait_status('one', 'running')
    assert not server.create('two', type='agent')['warm']  # with a port of a member
    server.wait_status('two', 'running')
    server.until(lambda: 'widen the range' in (pool_of(server)['error'] or ''), 30)
    server.create('three', type='agent')
    answer = server.call('POST', '/api/workspaces', {'name': 'four', 'type': 'agent'})
    assert answer.status_code == 503 and answer.json()['code'] == 'PORT_EXHAUSTED'
    assert members(docker_client, server) == []


def test_a_create_that_members_have_no_port_for_costs_none_of_them(pooled, docker_client):
    first = port_ranges()['CUSTOM_PORTS'].partition('-')[0]
    server = pooled('hears:1', CUSTOM_PORTS=f'{first}-{first}')
    wait_ready(server, 1)
    waiting = members(docker_client, server)
    server.running('one', ports=[3000])
    answer = server.call('POST', '/api/workspaces', {'name': 'two', 'ports': [3000]})
    assert answer.status_code == 503 and answer.json()['code'] == 'PORT_EXHAUSTED'
    assert members(docker_client, server) == waiting


def test_ports_that_a_clone_forwards_come_to_a_member_too(pooled):
    server = pooled('hears:1')
    wait_ready(server, 1)
    assert server.create('first', env={'FORWARDS': '3000'})['warm']
    found = server.wait_status('first', 'running', 'error')
    assert (found['status'], [*found['ports']]) == ('running', ['3000'])


def test_a_given_member_that_ends_before_it_runs_is_started_again(pooled, docker_client):
    server = pooled('hears:1')
    wait_ready(server, 1)
    assert server.create('first', env={'PREPARES': '3'})['warm']
    made = server.get('/api/workspaces/first')
    server.until(lambda: b'owned' in docker_client.containers.get(made['containerId']).logs())
    server.kill()
    docker_client.api.kill(made['containerId'])
    server.start()
    found = server.wait_status('first', 'running', 'error')
    assert (found['status'], found['containerId']) == ('running', made['containerId'])


def test_a_rename_beside_a_claim_takes_the_container_along(pooled, docker_client):
    server = pooled('hears:1')
    server.stop()
    server.program[1] = server.program[1].replace('agentbackend.main()', f'{RENAMING}\nagentbackend.main()')
    server.start()
    wait_ready(server, 1)
    made = server.create('old')
    container = docker_client.containers.get(server.wait_status('new', 'running')['containerId'])
    assert made['warm'] and container.name == f'{server.instance}-new'


@pytest.mark.parametrize(('kind', 'said'), [('nothing', 'template is "nothing", but known are'),
                                            ('mute', 'does not take its settings over stdin'),
                                            ('hears', 'memory holds no more')])
def test_what_keeps_a_pool_empty_is_said(kind, said, pooled):
    room = 2**50 if kind == 'hears' else 2**20  # what a container is counted with: more than any machine has
    server = pooled(f'{kind}:1', PREBUILD='mute' if kind == 'mute' else 'hears',
                    constants={**HASTY, 'pool.ROOM': room})
    server.until(lambda: said in (pool_of(server, kind)['error'] or ''), 40)
    assert server.get('/health')['status'] == 'healthy'
    server.create('works', template='mute')
    server.wait_status('works', 'running')


def test_without_the_setting_nothing_is_left_of_a_pool(pooled, docker_client):
    server = pooled()
    wait_ready(server)
    server.stop()
    assert len(members(docker_client, server)) == 2  # a server's end leaves them running
    server.start()
    assert pool_of(server)['ready'] == 2
    server.stop()
    server.settings['WARM_POOL'] = ''
    server.start()
    server.until(lambda: objects_of(docker_client, server.instance) == [])
    assert 'pool' not in server.get('/health')


@pytest.mark.parametrize('options', [[], ['--live-restore']], ids=['plain', 'live-restore'])
def test_the_engine_may_die_while_members_wait(options, pooled, network, tmp_path):
    engine = OwnEngine(tmp_path, network, *options).start()
    try:
        server = pooled('hears:1', network=network, DOCKER_HOST=f'unix://{engine.socket}')
        wait_ready(server, 1)
        assert server.create('before', env={'MY': 'own'})['warm']
        made = server.wait_status('before', 'running')
        wait_ready(server, 1)
        waiting, = members(engine.client, server)
        engine.end(9)
        server.until(lambda: server.get('/health')['docker'] == 'disconnected', 15)
        assert server.call('POST', '/api/workspaces', {'name': 'between'}).status_code == 503
        engine.start()
        server.until(lambda: server.get('/health')['docker'] == 'connected', 20)
        if not options:  # those that waited have ended, and others take their place
            server.until(lambda: members(engine.client, server) not in ([], [waiting]))
        wait_ready(server, 1)
        assert server.create('after', env={'MY': 'new'})['warm']
        server.wait_status('after', 'running')
        if server.get('/api/workspaces/before')['status'] == 'stopped':
            verb(server, 'before', 'start')
        assert server.wait_status('before', 'running')['id'] == made['id']
        for name, value in (('before', 'own'), ('after', 'new')):
            assert in_container(engine.client, server, name, 'echo $MY') == value
        wait_ready(server, 1)
        assert len([name for name in objects_of(engine.client, server.instance) if name.startswith('/')]) == 3
    finally:
        engine.close()


def claim_and_die(server, step):
    """Have the server killed at a step of a claim."""
    option, text = program_with(HASTY)
    server.program = [option, text.replace('agentbackend.main()', f'{KILLED}\nagentbackend.main()'), *step]
    server.start()
    wait_ready(server)
    answer = subprocess.run(
        ['curl', '-s', '-H', 'Content-Type: application/json', '-d',
         json.dumps({'name': 'claimed', 'sshPublicKeys': [PUBLIC_KEY], 'env': {'MY': 'own'}}),
         f'http://127.0.0.1:{server.port}/api/workspaces'], capture_output=True, check=False).stdout
    server.process.wait(30)
    return json.loads(answer)['data'] if answer else None


def check_survivors(client, server):
    """See that nothing is lost, double, mixed up or left over; return the workspace if there is one."""
    wait_ready(server)
    found = server.get('/api/workspaces')
    waiting = members(client, server)
    assert len(found) <= 1 and len(waiting) == 2
    if found:
        server.wait_status('claimed', 'running')
        assert in_container(client, server, 'claimed', 'echo $MY; ls -d /workspace/claimed') \
            == 'own\n/workspace/claimed'
        keys = in_container(client, server, 'claimed', 'cat /etc/agentbackend/authorized_keys')
        assert keys == PUBLIC_KEY
    for name in waiting:
        code, _ = client.containers.get(name).exec_run(['test', '-e', '/etc/agentbackend/taken'])
        assert code == 1
    ids = {name.rpartition('.')[2] for name in waiting} | {item['id'] for item in found}
    for name in objects_of(client, server.instance):
        assert name.startswith('/') or any(item in name for item in ids), name
    assert sum(name.startswith('/') for name in objects_of(client, server.instance)) == len(ids)
    return found[0] if found else None


def kill_at_each_step(client, server, state):
    """Have a server killed at each step of a claim, and look at what the next one has."""
    for step, (words, is_known) in STEPS.items():
        claim_and_die(server, words)
        if state == 'lost':
            lose_all(client, server)
        server.program = program_with(HASTY)
        server.start()
        found = check_survivors(client, server)
        if state == 'kept':
            assert found or step == 'reserved', step
        else:
            assert bool(found) == is_known, step
        if found:
            delete(server, 'claimed')
        server.stop()


def test_a_kill_at_any_step_of_a_claim_loses_and_leaves_nothing(hearing, tmp_path, docker_client):
    first, servers = int(port_ranges()['SSH_PORTS'].partition('-')[0]), {}
    for at, state in enumerate(('kept', 'lost')):
        (tmp_path / state).mkdir()
        servers[state] = Served(tmp_path / state, hearing, WARM_POOL='hears:2', DEFAULT_TEMPLATE='hears',
                                PREBUILD='hears', SSH_PORTS=f'{first + 14 * at}-{first + 14 * at + 13}')
    try:
        concurrently(*(lambda state=state: kill_at_each_step(docker_client, servers[state], state)
                       for state in servers))
    finally:
        for server in servers.values():
            server.stop()
            print(server.log.read_text()[-8000:])
            remove_objects(docker_client, server.instance)


@pytest.mark.parametrize('state', ['kept', 'lost'])
def test_kills_at_random_moments_of_a_claim(state, pooled, docker_client):
    server = pooled()
    for _ in range(2):
        wait_ready(server)
        with subprocess.Popen(
                ['curl', '-s', '-H', 'Content-Type: application/json', '-d',
                 json.dumps({'name': 'claimed', 'sshPublicKeys': [PUBLIC_KEY], 'env': {'MY': 'own'}}),
                 f'http://127.0.0.1:{server.port}/api/workspaces'], stdout=subprocess.PIPE) as create:
            time.sleep(random.uniform(0, 0.15))
            server.kill()
            answered = create.stdout.read()
        if state == 'lost':
            lose_all(docker_client, server)
        server.start()
        found = check_survivors(docker_client, server)
        assert found or not answered or state == 'lost'
        if found:
            delete(server, 'claimed')


@pytest.mark.parametrize('is_remade', [False, True], ids=['as it was', 'remade'])
def test_a_tidied_hold_costs_an_adopted_workspace_nothing(is_remade, pooled, docker_client):
    server = pooled('hears:1')
    wait_ready(server, 1)
    made = server.create('mine', type='temporary', env={'MY': 'own'})
    server.wait_status('mine', 'running')
    if is_remade:  # and knows nothing of the pool any more
        server.call('PATCH', '/api/workspaces/mine', {'ports': [3000]})
        verb(server, 'mine', 'restart')
        assert server.wait_status('mine', 'running')['ports']
    server.stop()
    docker_client.api.remove_volume(f"{server.instance}-{made['id']}-hold")
    lose(state_path(server))
    server.start()
    found = server.wait_status('mine', 'running')
    assert (found['id'], found['type'], found['template']) == (made['id'], 'temporary', 'hears')
    assert in_container(docker_client, server, 'mine', 'echo $MY') == 'own'
    delete(server, 'mine')
    assert left_of(docker_client, server, made) == ([], [])


def test_a_lost_container_of_a_given_member_is_known_by_its_hold(pooled, docker_client):
    server = pooled('hears:1')
    wait_ready(server, 1)
    made = server.create('mine', labels={'a': 'b'})
    server.wait_status('mine', 'running')
    server.stop()
    docker_client.api.remove_container(f'{server.instance}-mine', force=True)
    lose(state_path(server))
    server.start()
    found = server.wait_status('mine', 'stopped')
    assert found['id'] == made['id'] and found['labels'] == {'a': 'b'}
    verb(server, 'mine', 'start')
    server.wait_status('mine', 'running')
    assert in_container(docker_client, server, 'mine', 'ls -d /workspace/mine')
