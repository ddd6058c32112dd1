"""The locked dict and its file."""
import copy
import dataclasses
import functools
import json
import os
import subprocess
import sys
import time

import gevent
import gevent.monkey
import gevent.pool
import pytest
from conftest import ROOT

import agentbackend
from agentbackend import (
    AGENT,
    CREATING,
    DELETING,
    ERROR,
    PERSISTENT,
    RUNNING,
    STOPPED,
    STOPPING,
    TEMPORARY,
    PortExhausted,
    State,
    Superseded,
    Workspace,
    WorkspaceAlreadyExists,
    WorkspaceNotFound,
)

RANGES = {'codeServer': (8443, 8550), 'ssh': (2223, 2250), 'custom': (10000, 10999)}

# Changes state in a loop until it is killed; the file is large, so that a write takes a while.
CHANGER = """\
import sys, time
sys.path.insert(0, sys.argv[2])
import agentbackend
state = agentbackend.State(sys.argv[1], {'codeServer': (1, 1000), 'ssh': (1001, 2000), 'custom': (2001, 3000)})
state.open()
for number in range(60):
    state.adopt(agentbackend.Workspace(id=f'ws-{number:08d}', name=f'w{number}', folder='f', type='persistent', template='t',
                                       created_at=number, labels={'filler': 'x' * 3000}, status='running'))
print('ready', flush=True)
while True:
    state.update('ws-00000000', labels={'now': repr(time.time())})
"""


def draft(name='a', **fields):
    return Workspace(**{'id': '', 'name': name, 'folder': name, 'type': PERSISTENT, 'template': 'blank', 'created_at': 1000.0, **fields})


def kept(path):
    """Return {id: record} of a state file as it is on disk."""
    return {item['id']: item for item in json.loads(path.read_text())['workspaces']}


@pytest.fixture
def state():
    return State(None, RANGES)


@pytest.fixture
def open_state(tmp_path):
    """A function that opens a state on one file; all are closed in the end."""
    opened = []

    def open_it(ranges=RANGES):
        state = State(tmp_path / 'folder' / 'state.json', ranges)
        state.open()
        opened.append(state)
        return state

    yield open_it
    for state in opened:
        state.close()


# Names and ports


def test_reserve_gives_an_id_and_ports_of_their_ranges(state):
    workspace = state.reserve(draft(wanted_ports=[3000, 5173]))
    assert workspace.id.startswith('ws-') and len(workspace.id) >= 9 and workspace.id[3:].isalnum() and workspace.id.islower()
    assert workspace.ports == {'codeServer': 8443, 'ssh': 2223, '3000': 10000, '5173': 10001}
    assert state.get(workspace.id) == state.get('a') == workspace
    assert workspace.status == CREATING


def test_a_workspace_without_ssh_takes_no_ssh_port(state):
    assert state.reserve(draft(ssh=False)).ports == {'codeServer': 8443}
    assert state.ports_in_use() == {'codeServer': (1, 108), 'ssh': (0, 28), 'custom': (0, 1000)}


def test_a_port_is_free_again_after_remove(state):
    first, second = state.reserve(draft('a')), state.reserve(draft('b'))
    assert second.ports == {'codeServer': 8444, 'ssh': 2224}
    state.remove(first.id)
    state.remove(first.id)  # twice is fine
    assert state.reserve(draft('c')).ports == first.ports
    with pytest.raises(WorkspaceNotFound, match='^Workspace not found$'):
        state.get(first.id)


def test_ports_that_others_have_are_passed_over(state):
    taken = state.reserve(draft(), taken_ports={8443, 2223}, is_free=lambda port: port not in (8444, 2224))
    assert taken.ports == {'codeServer': 8445, 'ssh': 2225}


def test_a_taken_name_is_refused_and_nothing_is_kept(state):
    state.reserve(draft('a'))
    with pytest.raises(WorkspaceAlreadyExists, match="'a'") as caught:
        state.reserve(draft('a'))
    assert (caught.value.status, caught.value.code) == (409, 'WORKSPACE_ALREADY_EXISTS')
    with pytest.raises(WorkspaceAlreadyExists):
        state.reserve(draft('b'), taken_names={'b'})
    assert [item.name for item in state.all()] == ['a'] and state.ports_in_use()['codeServer'][0] == 1


@pytest.mark.parametrize(('kind', 'setting', 'wanted'), [('codeServer', 'CODE_SERVER_PORTS', []), ('ssh', 'SSH_PORTS', []), ('custom', 'CUSTOM_PORTS', [80, 81, 82])])
def test_running_out_of_ports_names_the_range_and_its_variable_and_keeps_nothing(kind, setting, wanted):
    state = State(None, RANGES | {kind: (30000, 30001)})
    for name in ('a', 'b')[:0 if wanted else 2]:
        state.reserve(draft(name))
    before = state.ports_in_use()
    with pytest.raises(PortExhausted, match=f'{setting}=30000-30001') as caught:
        state.reserve(draft('c', wanted_ports=wanted))
    assert (caught.value.status, caught.value.code) == (503, 'PORT_EXHAUSTED')
    assert state.ports_in_use() == before and 'c' not in [item.name for item in state.all()]


def test_ports_are_never_given_twice_to_200_greenlets():
    state = State(None, {'codeServer': (1, 200), 'ssh': (201, 400), 'custom': (401, 800)})

    def is_free(port):
        gevent.sleep(0)  # far from what is allowed here: without the lock, each greenlet would find the same port free
        return True

    def reserve(number):
        return state.reserve(draft(f'w{number}', wanted_ports=[80, 443]), is_free=is_free)

    made = gevent.pool.Pool(200).map(reserve, range(200))
    ports = [port for workspace in made for port in workspace.ports.values()]
    assert len(set(ports)) == len(ports) == 800
    assert {kind: used for kind, (used, _) in state.ports_in_use().items()} == {'codeServer': 200, 'ssh': 200, 'custom': 400}
    assert len({workspace.id for workspace in made}) == 200


def test_one_of_200_greenlets_gets_a_name(state):
    def reserve(number):
        try:
            return state.reserve(draft('same'), is_free=lambda port: gevent.sleep(0) is None)
        except WorkspaceAlreadyExists:
            return None

    assert len([made for made in gevent.pool.Pool(200).map(reserve, range(200)) if made]) == 1
    assert len(state.all()) == 1


def test_claim_ports_changes_only_those_to_avoid(state):
    workspace = state.reserve(draft(wanted_ports=[3000]))
    again = state.claim_ports(workspace.id, avoid={8443})
    assert again.ports == {'codeServer': 8444, 'ssh': 2223, '3000': 10000}
    assert state.get('a').ports == again.ports
    assert state.claim_ports(workspace.id, avoid={8444}, is_free=lambda port: port > 8445).ports['codeServer'] == 8446


def test_claim_ports_gives_what_is_missing(state):
    workspace = state.reserve(draft())
    state.update(workspace.id, ports={})
    assert state.claim_ports(workspace.id).ports == {'codeServer': 8443, 'ssh': 2223}


def test_claim_ports_keeps_what_it_has_when_there_is_no_other():
    state = State(None, RANGES | {'codeServer': (8443, 8443)})
    workspace = state.reserve(draft())
    with pytest.raises(PortExhausted):
        state.claim_ports(workspace.id, avoid={8443})
    assert state.get('a').ports == {'codeServer': 8443, 'ssh': 2223}


# Records


def test_what_is_returned_is_a_copy_and_no_live_object(state):
    made = state.reserve(draft(labels={'a': 'b'}, env={'A': 'b'}, wanted_ports=[80], ssh_public_keys=['k']))
    before = copy.deepcopy(state.get('a'))
    for look in (lambda: made, lambda: state.get('a'), lambda: state.all()[0], lambda: state.update(made.id, error=''), lambda: state.claim_ports(made.id)):
        given = look()
        for field in dataclasses.fields(Workspace):
            value = getattr(given, field.name)
            if isinstance(value, dict):
                value['added'] = 1
            elif isinstance(value, list):
                value.append('added')
        given.status = ERROR
        assert state.get('a') == before


def test_what_is_given_is_copied_too(state):
    given = draft(labels={'a': 'b'}, id='ws-given1')
    state.adopt(given)
    labels = {'c': 'd'}
    state.update('ws-given1', labels=labels)
    given.name, labels['e'] = 'other', 'f'
    assert (state.get('ws-given1').name, state.get('ws-given1').labels) == ('a', {'c': 'd'})


def test_all_is_sorted_by_age(state):
    for name, created_at in (('b', 3), ('c', 1), ('a', 2)):
        state.reserve(draft(name, created_at=created_at))
    assert [item.name for item in state.all()] == ['c', 'a', 'b']


def test_update_changes_only_in_one_of_the_states_asked_for(state):
    workspace = state.reserve(draft())
    assert state.update(workspace.id, when={CREATING}, status=RUNNING).status == RUNNING
    with pytest.raises(Superseded):
        state.update(workspace.id, when={CREATING, STOPPING}, status=STOPPED)
    assert state.get('a').status == RUNNING
    with pytest.raises(Superseded):
        state.update('ws-nothing', status=STOPPED)
    with pytest.raises(Superseded):
        state.update(workspace.id, when=set(), status=STOPPED)


def test_rename_frees_the_old_name_and_refuses_a_taken_one(state):
    first = state.reserve(draft('a'))
    state.reserve(draft('b'))
    with pytest.raises(WorkspaceAlreadyExists):
        state.rename(first.id, 'b')
    with pytest.raises(WorkspaceAlreadyExists):
        state.rename(first.id, 'c', taken_names={'c'})
    state.rename(first.id, 'a', taken_names={'a'})  # its own name is no conflict
    state.rename(first.id, 'c')
    assert state.get('c').id == first.id and state.get('c').folder == 'a'
    state.reserve(draft('a'))
    with pytest.raises(WorkspaceNotFound):
        state.rename('ws-nothing', 'x')


@pytest.mark.parametrize(('kind', 'ttl', 'expires'), [
    (AGENT, 60, 5060), (PERSISTENT, 60, 3060), (TEMPORARY, 60, 3060), (AGENT, None, None), (PERSISTENT, None, None)])
def test_an_agents_time_counts_from_its_last_activity_and_the_others_from_when_it_was_set(kind, ttl, expires):
    assert draft(type=kind, ttl=ttl, ttl_from=3000, last_activity_at=5000).expires_at == expires


def test_expire_marks_what_is_due_and_settled(state):
    def add(name, status, **fields):
        return state.update(state.reserve(draft(name, ttl_from=0, **fields)).id, status=status).id

    due = {add('due', RUNNING, ttl=10), add('stopped', STOPPED, ttl=10), add('failed', ERROR, ttl=9)}
    spared = {add('later', RUNNING, ttl=11), add('never', RUNNING), add('busy', CREATING, ttl=1), add('stopping', STOPPING, ttl=1),
              add('used', RUNNING, type=AGENT, ttl=5, last_activity_at=6)}
    assert set(state.expire(now=10)) == due
    assert {item.id for item in state.all() if item.status == DELETING} == due
    assert state.expire(now=10) == []
    assert {item.id for item in state.all() if item.status != DELETING} == spared


# The file


def test_a_change_is_on_disk_when_the_call_returns(open_state):
    state = open_state()
    workspace = state.reserve(draft())
    assert kept(state.path)[workspace.id]['ports'] == workspace.ports
    state.update(workspace.id, status=RUNNING)
    assert kept(state.path)[workspace.id]['status'] == RUNNING
    state.rename(workspace.id, 'b')
    assert kept(state.path)[workspace.id]['name'] == 'b'
    state.claim_ports(workspace.id, avoid={8443})
    assert kept(state.path)[workspace.id]['ports']['codeServer'] == 8444
    state.adopt(draft('c', id='ws-adopted'))
    assert 'ws-adopted' in kept(state.path)
    state.remove(workspace.id)
    assert list(kept(state.path)) == ['ws-adopted']


def test_everything_survives_a_reopening(open_state):
    state = open_state()
    state.reserve(draft('ä\N{GRINNING FACE}', labels={'a': '\u2028'}, env={'B': 'c'}, wanted_ports=[80], ttl=1.5, git_url='https://x/y'))
    state.update(state.reserve(draft('b')).id, status=STOPPED, error='no\nway', born=True)
    assert open_state().all() == state.all()


def test_close_writes_what_was_not_waited_for(open_state):
    state = open_state()
    workspace = state.reserve(draft())
    state.update(workspace.id, flush=False, last_activity_at=77.0)
    state.close()
    assert kept(state.path)[workspace.id]['last_activity_at'] == 77.0
    state.close()


def test_close_waits_for_the_write_at_work_and_leaves_the_newest_on_disk(open_state, monkeypatch):
    """Two writes at once would share one temporary file."""
    state, at_work, most = open_state(), [], []
    workspace = state.reserve(draft())
    write = agentbackend.write_atomically

    def slowly(path, text):
        at_work.append(path)
        most.append(len(at_work))
        gevent.monkey.get_original('time', 'sleep')(0.05)
        write(path, text)
        at_work.pop()

    monkeypatch.setattr(agentbackend, 'write_atomically', slowly)
    waiting = [gevent.spawn(state.update, workspace.id, error=str(number)) for number in range(3)]
    gevent.sleep(0.02)
    late = gevent.spawn(state.update, workspace.id, error='late')
    gevent.sleep(0)
    state.close()
    assert len(gevent.joinall([*waiting, late], timeout=2)) == 4
    assert kept(state.path)[workspace.id]['error'] == 'late' and max(most) == 1


def test_close_leaves_nobody_waiting(open_state):
    state = open_state()
    workspace = state.reserve(draft())
    last = gevent.spawn(state.update, workspace.id, error='last')  # comes while the writer is being ended
    state.close()
    assert last.get(timeout=2).error == 'last'
    assert kept(state.path)[workspace.id]['error'] == 'last'


def test_only_the_owner_can_read_the_file(open_state):
    mask = os.umask(0)
    try:
        state = open_state()
        state.reserve(draft())
    finally:
        os.umask(mask)
    assert state.path.stat().st_mode & 0o777 == 0o600
    assert state.path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize('content', ['', '{', 'null', '[]', '{}', '{"workspaces": [{}]}', '{"workspaces": {"a": 1}}', '{"workspaces": [{"id": "ws-aaaaaa", "surprise": 1}]}',
                                     b'\xff\xfe\x00'], ids=repr)
def test_a_damaged_file_is_put_aside_and_kept(open_state, content, tmp_path, caplog):
    path = tmp_path / 'folder' / 'state.json'
    path.parent.mkdir()
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(data)
    state = open_state()
    assert state.all() == []
    aside, = path.parent.glob('*damaged*')
    assert aside.read_bytes() == data
    assert str(aside) in caplog.text and 'damaged' in caplog.text
    workspace = state.reserve(draft())
    assert workspace.id in kept(path)


def test_a_half_written_file_beside_it_does_no_harm(open_state):
    state = open_state()
    state.reserve(draft('a'))
    state.path.with_suffix('.new').write_text('{"workspa')
    again = open_state()
    assert [item.name for item in again.all()] == ['a']
    again.reserve(draft('b'))
    assert {item['name'] for item in kept(state.path).values()} == {'a', 'b'}


def test_a_killed_process_leaves_a_whole_file_every_time(tmp_path):
    paths = [tmp_path / f'state{number}.json' for number in range(3)]
    children = [subprocess.Popen([sys.executable, '-c', CHANGER, str(path), str(ROOT)], stdout=subprocess.PIPE) for path in paths]
    try:
        for number, (path, child) in enumerate(zip(paths, children, strict=True)):
            assert child.stdout.readline() == b'ready\n'
            seen, deadline = set(), time.monotonic() + 5
            while len(seen) < 10 + 3 * number:  # it is never seen half, neither while it lives nor after
                seen.add(kept(path)['ws-00000000']['labels'].get('now'))
                assert time.monotonic() < deadline
            child.kill()
            child.wait()
            assert len(kept(path)) == 60
            state = State(path, RANGES)
            state.open()
            assert len(state.all()) == 60
            state.close()
    finally:
        for child in children:
            child.kill()
            child.wait()
            child.stdout.close()


def test_a_disk_that_refuses_is_logged_and_holds_nobody_up(open_state, caplog):
    state = open_state()
    state.path.with_suffix('.new').mkdir()
    workspace = state.reserve(draft())
    assert state.get('a') == workspace and 'could not be written' in caplog.text
    state.path.with_suffix('.new').rmdir()
    state.update(workspace.id, status=RUNNING)
    assert kept(state.path)[workspace.id]['status'] == RUNNING


# What the comments on the lock promise


class Guarded(dict):
    """A dict that may only be touched by the greenlet that holds the lock."""

    def __init__(self, lock, content=()):
        super().__init__(content)
        self.lock = lock
        self.touched = 0

    def check(self):
        assert self.lock._is_owned(), 'touched without the lock'
        self.touched += 1


def guard(name):
    method = getattr(dict, name)

    @functools.wraps(method)
    def guarded(self, *args, **options):
        self.check()
        return method(self, *args, **options)
    return guarded


for name in ('__getitem__', '__setitem__', '__delitem__', '__contains__', '__iter__', '__len__', 'get', 'values', 'items', 'keys', 'pop', 'setdefault', 'update'):
    setattr(Guarded, name, guard(name))


@pytest.fixture
def guarded_state(open_state):
    state = open_state()
    state._workspaces = Guarded(state._lock)
    return state


def use_every_verb(state, is_free=lambda port: True):
    workspace = state.reserve(draft(ttl=1), is_free=is_free)
    state.adopt(draft('b', id='ws-adopted'))
    state.get('b'), state.all(), state.ports_in_use()
    state.update(workspace.id, when={CREATING}, status=RUNNING)
    state.rename(workspace.id, 'c')
    state.claim_ports(workspace.id, avoid=set(workspace.ports.values()), is_free=is_free)
    state.expire(time.time())
    state.remove(workspace.id)


def test_the_dict_is_touched_under_the_lock_only(guarded_state):
    use_every_verb(guarded_state)
    guarded_state.close()
    assert guarded_state._workspaces.touched > 20
    assert guarded_state._writer is None


def test_this_guard_would_notice(guarded_state):
    with pytest.raises(AssertionError, match='without the lock'):
        guarded_state._workspaces.get('a')


def test_a_port_is_tried_under_the_lock_and_a_file_written_without_it(open_state, monkeypatch):
    state, tried, written = open_state(), [], []
    write, ident = agentbackend.write_atomically, gevent.monkey.get_original('threading', 'get_ident')
    here = ident()

    def watched(path, text):
        written.append((state._lock._count, ident() != here))
        write(path, text)

    def is_free(port):
        tried.append(state._lock._is_owned())
        return True

    monkeypatch.setattr(agentbackend, 'write_atomically', watched)
    use_every_verb(state, is_free)
    assert tried and all(tried)
    assert written and set(written) == {(0, True)}  # nobody holds the lock, and a thread does the work


def test_others_go_on_while_a_slow_disk_writes(open_state, monkeypatch):
    state = open_state()
    state.reserve(draft('a'))
    write, release = agentbackend.write_atomically, gevent.monkey.get_original('threading', 'Event')()

    def slowly(path, text):
        release.wait(5)
        write(path, text)

    monkeypatch.setattr(agentbackend, 'write_atomically', slowly)
    waiting = gevent.spawn(state.reserve, draft('b'))
    gevent.sleep(0.01)
    assert {item.name for item in state.all()} == {'a', 'b'} and not waiting.ready()
    assert state.ports_in_use()['ssh'][0] == 2
    release.set()
    assert waiting.get(timeout=2).name == 'b'


def test_changes_that_come_together_are_written_together(open_state, monkeypatch):
    state, written, write = open_state(), [], agentbackend.write_atomically
    monkeypatch.setattr(agentbackend, 'write_atomically', lambda path, text: (written.append(text), write(path, text)))
    made = gevent.pool.Pool(28).map(lambda number: state.reserve(draft(f'w{number}')), range(28))
    assert set(kept(state.path)) == {item.id for item in made}
    assert 1 <= len(written) <= 5


def test_a_look_at_the_status_writes_nothing(open_state, monkeypatch):
    """A job asks ten times a second whether it still has its purpose."""
    state, written = open_state(), []
    workspace = state.reserve(draft())
    monkeypatch.setattr(agentbackend, 'write_atomically', lambda path, text: written.append(text))
    for _ in range(5):
        state.update(workspace.id, when={CREATING}, flush=False)
        gevent.sleep(0.005)
    assert not written
