"""The locked dict and its file."""
import contextlib
import copy
import dataclasses
import functools
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time

import gevent
import gevent.monkey
import gevent.pool
import pytest
from conftest import ROOT
from helpers import kept

from _agentbackend import mirror
from _agentbackend import state as state_module
from _agentbackend.errors import (
    ConfigError,
    PortExhausted,
    SessionBusy,
    SessionNotFound,
    StateNotWritten,
    Superseded,
    TooMany,
    WorkspaceAlreadyExists,
    WorkspaceNotFound,
)
from _agentbackend.records import (
    AGENT,
    CREATING,
    DELETING,
    ERROR,
    PERSISTENT,
    RUNNING,
    STOPPED,
    STOPPING,
    TEMPORARY,
    Run,
    Session,
    Workspace,
)
from _agentbackend.state import State
from _agentbackend.store import Store

RANGES = {'codeServer': (8443, 8550), 'ssh': (2223, 2250), 'custom': (10000, 10999)}

# Changes state in a loop until it is killed.
CHANGER = """\
from gevent import monkey; monkey.patch_all()
import sys, time
sys.path.insert(0, sys.argv[2])
from _agentbackend.records import Workspace
from _agentbackend.state import State
state = State(sys.argv[1], {'codeServer': (1, 1000), 'ssh': (1001, 2000), 'custom': (2001, 3000)})
state.open()
for number in range(60):
    state.adopt(Workspace(id=f'ws-{number:08d}', name=f'w{number}', folder='f', type='persistent',
                          template='t', created_at=number, labels={'filler': 'x' * 3000}, status='running'))
print('ready', flush=True)
while True:
    state.update('ws-00000000', labels={'now': repr(time.time())})
"""


def draft(name='a', **fields):
    return Workspace(**{'id': '', 'name': name, 'folder': name, 'type': PERSISTENT, 'template': 'blank',
                        'created_at': 1000.0, **fields})


@pytest.fixture
def state():
    return State(None, RANGES)


@pytest.fixture
def open_state(tmp_path):
    """A function that opens a state on one file; all are closed in the end."""
    opened = []

    def open_it(ranges=RANGES):
        state = State(tmp_path / 'folder' / 'state.sqlite', ranges)
        state.open()
        opened.append(state)
        return state

    yield open_it
    for state in opened:
        state.close()


def run_of(session='s', **fields):
    return Run(**{'id': f'run-{os.urandom(6).hex()}', 'task': 'do it', 'started_at': 1000.0, 'timeout': 60,
                  'boot': 'b', **fields})


def begin(state, workspace, session='s', limit=100, **fields):
    """Begin a run and return its session."""
    return state.begin_run(Session(id=session, workspace_id=workspace.id, agent='a', created_at=1.0),
                           run_of(**fields), limit=limit)


def end(state, session, *, state_of_it='completed', **fields):
    """End the last run of a session."""
    state.end_run(session.id, session.last.number,
                  **{'state': state_of_it, 'end': {'type': 'result', 'data': {'message': 'done'}},
                     'total_cost_usd': None, 'conversed': True, 'length': 5, **fields})


@contextlib.contextmanager
def written_by(monkeypatch):
    """Give a list that grows by the rows of each transaction that reaches the file."""
    written, write = [], Store._write
    monkeypatch.setattr(Store, '_write', lambda self, rows: (written.append(rows), write(self, rows)))
    yield written
    monkeypatch.setattr(Store, '_write', write)


# Names and ports


def test_reserve_gives_an_id_and_ports_of_their_ranges(state):
    workspace = state.reserve(draft(wanted_ports=[3000, 5173]))
    assert workspace.id.startswith('ws-') and len(workspace.id) >= 9 and workspace.id[3:].isalnum()
    assert workspace.id.islower()
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
    with pytest.raises(WorkspaceAlreadyExists):  # whose id it is would be found by it, and not this one
        state.reserve(draft(name=state.all()[0].id))
    with pytest.raises(WorkspaceAlreadyExists):
        state.reserve(draft('b'), taken_names={'b'})
    assert [item.name for item in state.all()] == ['a'] and state.ports_in_use()['codeServer'][0] == 1


@pytest.mark.parametrize(('kind', 'setting', 'wanted'),
                         [('codeServer', 'CODE_SERVER_PORTS', []), ('ssh', 'SSH_PORTS', []),
                          ('custom', 'CUSTOM_PORTS', [80, 81, 82])])
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
        # Far from what is allowed here: without the lock, each greenlet would find the same port free.
        gevent.sleep(0)
        return True

    def reserve(number):
        return state.reserve(draft(f'w{number}', wanted_ports=[80, 443]), is_free=is_free)

    made = gevent.pool.Pool(200).map(reserve, range(200))
    ports = [port for workspace in made for port in workspace.ports.values()]
    assert len(set(ports)) == len(ports) == 800
    used = {kind: count for kind, (count, _) in state.ports_in_use().items()}
    assert used == {'codeServer': 200, 'ssh': 200, 'custom': 400}
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
    assert state.claim_ports(workspace.id, avoid={8444},
                             is_free=lambda port: port > 8445).ports['codeServer'] == 8446


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
    for look in (lambda: made, lambda: state.get('a'), lambda: state.all()[0],
                 lambda: state.update(made.id, error=''), lambda: state.claim_ports(made.id)):
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
    (AGENT, 60, 5060), (PERSISTENT, 60, 3060), (TEMPORARY, 60, 3060), (AGENT, None, None),
    (PERSISTENT, None, None)])
def test_an_agents_time_counts_from_its_last_activity_and_the_others_from_when_it_was_set(kind, ttl, expires):
    assert draft(type=kind, ttl=ttl, ttl_from=3000, last_activity_at=5000).expires_at == expires


def test_expire_marks_what_is_due_and_settled(state):
    def add(name, status, **fields):
        return state.update(state.reserve(draft(name, ttl_from=0, **fields)).id, status=status).id

    due = {add('due', RUNNING, ttl=10), add('stopped', STOPPED, ttl=10), add('failed', ERROR, ttl=9)}
    spared = {add('later', RUNNING, ttl=11), add('never', RUNNING), add('busy', CREATING, ttl=1),
              add('stopping', STOPPING, ttl=1),
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
    state.flush()
    assert list(kept(state.path)) == ['ws-adopted']


def test_everything_survives_a_reopening(open_state):
    state = open_state()
    workspace = state.reserve(draft('ä\N{GRINNING FACE}', labels={'a': '\u2028'}, env={'B': 'c'},
                                    wanted_ports=[80], ttl=1.5, git_url='https://x/y'))
    state.update(state.reserve(draft('b')).id, status=STOPPED, error='no\nway', ever_ran=True)
    end(state, begin(state, workspace))
    begin(state, workspace)
    end(state, begin(state, workspace, 'other', task='half of a surrogate pair \ud800'), unswept=True)
    state.flush()
    again = open_state()
    assert again.all() == state.all() and again.sessions() == state.sessions() and again.id == state.id
    assert again.runs('s') == state.runs('s') and [run.number for run in again.runs('s')] == [1, 2]
    assert {run.id for run in again.open_runs()} == {run.id for run in state.open_runs()}
    assert len(again.open_runs()) == 2
    assert again.get(workspace.id).runs_begun == 3


def test_close_writes_what_was_not_waited_for(open_state):
    state = open_state()
    workspace = state.reserve(draft())
    state.update(workspace.id, flush=False, last_activity_at=77.0)
    state.close()
    assert kept(state.path)[workspace.id]['last_activity_at'] == 77.0
    state.close()


def test_close_leaves_nobody_waiting_and_the_newest_on_disk(open_state, monkeypatch):
    state, write = open_state(), Store._write
    workspace = state.reserve(draft())

    def slowly(self, rows):
        gevent.monkey.get_original('time', 'sleep')(0.05)
        write(self, rows)

    monkeypatch.setattr(Store, '_write', slowly)
    waiting = [gevent.spawn(state.update, workspace.id, error=str(number)) for number in range(3)]
    gevent.sleep(0.02)
    late = gevent.spawn(state.update, workspace.id, error='late')
    gevent.sleep(0)
    state.close()
    assert len(gevent.joinall([*waiting, late], timeout=2)) == 4
    assert kept(state.path)[workspace.id]['error'] == 'late'


def test_only_the_owner_can_read_the_file(open_state):
    mask = os.umask(0)
    try:
        state = open_state()
        state.reserve(draft())
    finally:
        os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in state.path.parent.iterdir()} == {0o600}
    assert state.path.parent.stat().st_mode & 0o777 == 0o700


def make_damaged(path, kind):
    """Write a file in the place of the state that is none, or not a whole one."""
    path.parent.mkdir()
    if kind == 'text':
        path.write_text('{"version": 1, "workspaces": []}')
    elif kind == 'bytes':
        path.write_bytes(os.urandom(50_000))
    elif kind == 'foreign':
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.executescript('CREATE TABLE workspaces (a, b); PRAGMA user_version = 1')
    else:
        state = State(path, RANGES)
        state.open()
        for number in range(100):
            state.adopt(draft(f'w{number}', id=f'ws-{number:08}', labels={'filler': 'x' * 900}))
        state.close()
        if kind == 'truncated':
            os.truncate(path, path.stat().st_size // 2)
        elif kind == 'overwritten':
            with open(path, 'r+b') as file:
                file.seek(3 * 4096)
                file.write(os.urandom(8 * 4096))
        else:
            with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
                record = kept(path)['ws-00000007']
                text = {'deep': '[' * 100_000, 'no json': '{"id', 'list': '[]',
                        'null': 'null'}.get(kind) or json.dumps(record | json.loads(kind))
                connection.execute('UPDATE workspaces SET record = ? WHERE id = ?', (text, record['id']))


@pytest.mark.parametrize('kind', ['text', 'bytes', 'foreign', 'truncated', 'overwritten', 'deep', 'no json',
                                  'list', 'null', '{"ports": 7}',
                                  '{"surprise": 1}', '{"created_at": "now"}', '{"ever_ran": 1}',
                                  '{"name": null}', '{"env": []}'])
def test_a_damaged_file_is_put_aside_and_kept(open_state, kind, tmp_path, caplog):
    path = tmp_path / 'folder' / 'state.sqlite'
    make_damaged(path, kind)
    data = path.read_bytes()
    state = open_state()
    assert state.all() == []
    aside, = path.parent.glob('*damaged-*[0-9]')
    assert aside.read_bytes() == data
    assert str(aside) in caplog.text and 'damaged' in caplog.text
    workspace = state.reserve(draft())
    assert workspace.id in kept(path)


def test_an_empty_file_is_a_new_one(open_state, tmp_path):
    path = tmp_path / 'folder' / 'state.sqlite'
    path.parent.mkdir()
    path.touch()
    state = open_state()
    assert state.all() == [] and not list(path.parent.glob('*damaged*'))


def test_a_file_of_a_newer_version_is_refused_and_left_as_it_is(open_state, tmp_path):
    state = open_state()
    state.reserve(draft())
    state.close()
    with contextlib.closing(sqlite3.connect(state.path)) as connection:
        connection.execute('PRAGMA user_version = 2')
    before = {path.name: path.read_bytes() for path in state.path.parent.iterdir()}
    with pytest.raises(ConfigError, match='newer version of Agent Backend'):
        open_state()
    assert {path.name: path.read_bytes() for path in state.path.parent.iterdir()} == before


def old_file(tmp_path, document):
    path = tmp_path / 'folder' / 'state.json'
    path.parent.mkdir(exist_ok=True)
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


OLD_RUN = {'number': 1, 'id': 'run-1', 'task': 't', 'started_at': 5.0, 'timeout': 60, 'boot': 'b',
           'state': 'completed', 'stop': None,
           'end': {'type': 'result', 'data': {}}, 'length': 3, 'ended_at': 6.0}
NEXT_RUN = {**OLD_RUN, 'number': 2, 'id': 'run-2', 'state': 'running', 'end': None, 'ended_at': None}
OLD = {'version': 1,
       'workspaces': [{'id': 'ws-old00001', 'name': 'old', 'folder': 'old', 'type': 'persistent',
                       'template': 't', 'created_at': 1.0, 'status': 'running',
                       'ports': {'codeServer': 8443}, 'wanted_ports': [], 'ssh': False}],
       'sessions': [{'id': 's', 'workspace_id': 'ws-old00001', 'agent': 'claude', 'created_at': 2.0,
                     'agent_session_id': 'x', 'conversed': True, 'total_cost_usd': 1.5,
                     'runs': [OLD_RUN, NEXT_RUN]}]}


def test_the_json_file_of_earlier_versions_is_taken_over_once(open_state, tmp_path):
    path = old_file(tmp_path, OLD)
    state = open_state()
    assert [item.name for item in state.all()] == ['old'] and state.get('old').runs_begun == 2
    runs = [(run.number, run.serial, run.state) for run in state.runs('s')]
    assert runs == [(1, 1, 'completed'), (2, 2, 'running')]
    assert state.session('s').total_cost_usd == 1.5 and [run.id for run in state.open_runs()] == ['run-2']
    state.update('ws-old00001', labels={'a': 'b'})
    state.close()
    assert not path.exists() and json.loads(path.with_suffix('.json.taken-over').read_text()) == OLD
    again = open_state()
    assert again.get('old').labels == {'a': 'b'} and len(again.runs('s')) == 2


def test_a_take_over_that_was_cut_off_is_repeated_without_harm(open_state, tmp_path):
    old_file(tmp_path, OLD)
    state = open_state()
    state.update('ws-old00001', labels={'a': 'b'})
    state.close()
    old_file(tmp_path, OLD)
    again = open_state()
    assert again.get('old').labels == {'a': 'b'} and again.get('old').runs_begun == 2
    assert len(again.runs('s')) == 2


@pytest.mark.parametrize('content', ['', '{', 'null', '[]', '{}', '{"version": 1, "workspaces": [{}]}',
                                     '{"version": 1, "workspaces": {"a": 1}}',
                                     '[' * 50_000,
                                     json.dumps(OLD | {'sessions': [OLD['sessions'][0] | {'runs': 7}]})],
                                     ids=lambda text: text[:40])
def test_a_damaged_json_file_is_put_aside_too(open_state, tmp_path, content, caplog):
    path = old_file(tmp_path, content)
    state = open_state()
    assert state.all() == [] and 'damaged' in caplog.text
    aside, = path.parent.glob('*damaged*')
    assert aside.read_text() == content and not path.exists()


def test_two_damaged_files_are_both_kept(open_state, tmp_path):
    make_damaged(tmp_path / 'folder' / 'state.sqlite', 'text')
    old_file(tmp_path, '{')
    texts = {path.read_bytes() for path in (tmp_path / 'folder').iterdir()}
    open_state()
    assert {path.read_bytes() for path in (tmp_path / 'folder').glob('*damaged-*[0-9]')} == texts


def test_a_json_file_of_a_newer_version_is_refused(open_state, tmp_path):
    path = old_file(tmp_path, OLD | {'version': 2})
    with pytest.raises(ConfigError, match='newer version'):
        open_state()
    assert json.loads(path.read_text()) == OLD | {'version': 2}


def test_a_killed_process_leaves_a_whole_file_every_time(tmp_path):
    paths = [tmp_path / f'state{number}.sqlite' for number in range(3)]
    children = [subprocess.Popen([sys.executable, '-c', CHANGER, str(path), str(ROOT)],
                                 stdout=subprocess.PIPE) for path in paths]
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


# A disk that refuses


def fill(folder):
    with contextlib.suppress(OSError), open(folder / 'filler', 'wb', buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.fixture
def hasty(monkeypatch):
    """What could not be written is soon tried again."""
    monkeypatch.setattr(mirror, 'RETRY_PAUSE', 0.1)


def test_a_full_disk_is_told_and_everything_is_written_when_there_is_room_again(small_disk, hasty):
    state = State(small_disk / 'state.sqlite', RANGES)
    state.open()
    workspace = state.reserve(draft(labels={'small': 'x'}))
    fill(small_disk)
    with pytest.raises(StateNotWritten, match='state.sqlite.*full'):
        for number in range(200):  # what was written to the log of changes before has room still
            state.update(workspace.id, labels={'large': str(number) * 2000})
    assert 'full' in state.failure and state.get('a').labels == {'large': str(number) * 2000}
    assert state.try_flush() is False
    with pytest.raises(StateNotWritten):
        state.update(workspace.id, ttl=100)
    (small_disk / 'filler').unlink()
    deadline = time.monotonic() + 5
    while state.failure:
        gevent.sleep(0.05)
        assert time.monotonic() < deadline
    state.flush()
    shutil.copytree(small_disk, small_disk.parent / 'as a crash would leave it')
    record = kept(small_disk.parent / 'as a crash would leave it' / 'state.sqlite')[workspace.id]
    assert (record['ttl'], record['labels']) == (100, {'large': str(number) * 2000})
    state.close()


def test_a_record_that_can_not_be_written_keeps_no_other_from_the_file(open_state, caplog, hasty):
    state = open_state()
    good, bad = state.reserve(draft('good')), state.reserve(draft('bad'))
    for value in ({1, 2}, 10**5000, float('inf')):
        state.update(bad.id, flush=False, labels={'a': value})
        state.update(good.id, labels={'a': 'b'}, flush=False)
        state.try_flush()
        assert kept(state.path)[good.id]['labels'] == {'a': 'b'} and bad.id in state.failure
        state.update(good.id, labels={}, flush=False)
        assert state.try_flush() and bad.id in state.failure  # it is still not in the file
        state.update(bad.id, labels={}, flush=False)
        assert state.try_flush() and state.failure == ''
    assert 'can not be written' in caplog.text


def test_the_writer_outlives_whatever_happens_to_it(open_state, monkeypatch, hasty):
    state, rows = open_state(), State._rows
    workspace = state.reserve(draft())
    other = state.reserve(draft(name='other'))
    monkeypatch.setattr(State, '_rows', lambda self, dirty: 1 / 0)
    with pytest.raises(StateNotWritten, match='division by zero'):
        state.update(workspace.id, status=RUNNING)
    monkeypatch.setattr(State, '_rows', rows)
    state.update(other.id, error='later', flush=False)
    gevent.sleep(0.2)
    assert state.try_flush() and kept(state.path)[other.id]['error'] == 'later'
    assert kept(state.path)[workspace.id]['status'] == RUNNING


# Sessions and runs


@pytest.fixture(params=[False, True], ids=['memory', 'file'])
def any_state(request, state, open_state):
    """A state without a file, and one with."""
    return open_state() if request.param else state


def test_runs_are_counted_in_their_session_and_in_their_workspace(any_state):
    workspace = any_state.reserve(draft())
    for session, serial in (('s', 1), ('other', 2), ('s', 3)):
        begun = begin(any_state, workspace, session)
        assert begun.last.serial == serial and begun.last.state == RUNNING
        end(any_state, begun)
    assert [(run.number, run.serial) for run in any_state.runs('s')] == [(1, 1), (2, 3)]
    assert any_state.session('s').count == 2 and any_state.session('s').last.state == 'completed'
    assert [run.serial for run in any_state.runs_begun(workspace.id, 2)] == [2, 3]
    assert [run.number for run in any_state.runs('s', after=1)] == [2]
    assert [run.number for run in any_state.runs('s', limit=1)] == [1]


def test_a_session_has_one_run_at_a_time_and_all_together_a_limit(any_state):
    workspace = any_state.reserve(draft())
    begin(any_state, workspace)
    with pytest.raises(SessionBusy):
        begin(any_state, workspace)
    with pytest.raises(TooMany, match='AGENT_MAX_TASKS=1 '):
        begin(any_state, workspace, 'other', limit=1)
    with pytest.raises(SessionBusy):
        any_state.remove_session('s')
    assert [item.id for item in any_state.sessions()] == ['s'] and any_state.get('a').runs_begun == 1


def test_a_session_that_was_removed_begins_anew(any_state):
    workspace = any_state.reserve(draft())
    end(any_state, begin(any_state, workspace))
    any_state.remove_session('s')
    with pytest.raises(SessionNotFound):
        any_state.runs('s')
    again = begin(any_state, workspace, started_at=3000.0)
    assert (again.count, again.last.number, again.last.serial) == (1, 1, 2)
    assert [run.serial for run in any_state.runs('s')] == [2]


def test_sessions_and_runs_go_with_their_workspace(open_state):
    state = open_state()
    workspace, other = state.reserve(draft()), state.reserve(draft('b'))
    end(state, begin(state, workspace))
    begin(state, workspace)
    begin(state, other, 'spared')
    state.remove(workspace.id)
    # Whose follower comes too late.
    end(state, Session(id='s', workspace_id=workspace.id, agent='a', created_at=1.0, last=run_of()))
    state.flush()
    assert list(kept(state.path, 'sessions')) == ['spared']
    assert [run['session_id'] for run in kept(state.path, 'runs')] == ['spared']


def test_ended_runs_are_not_held_in_memory(open_state):
    state = open_state()
    workspace = state.reserve(draft())
    for _ in range(50):
        end(state, begin(state, workspace))
    assert state._open_runs == {} and len(state.runs('s')) == 50


def test_a_change_writes_its_own_rows_only(open_state, monkeypatch):
    state = open_state()
    workspace = state.reserve(draft())
    for number in range(300):
        end(state, begin(state, workspace, f's{number}'))
    with written_by(monkeypatch) as written:
        state.update(workspace.id, labels={'a': 'b'})
        session = begin(state, workspace)
        state.flush()
        end(state, session)
    assert sum(len(rows) for rows in written) <= 2 + 4 + 3, written  # and each time that of the clock


def test_outdated_runs_are_those_beyond_a_number_or_an_age(open_state):
    state = open_state()
    workspace = state.reserve(draft())
    for number in range(6):
        end(state, begin(state, workspace, f's{number % 2}'))
    begin(state, workspace, 'running', started_at=1.0)
    assert state.outdated_runs(6, 0) == []
    assert sorted(run.serial for run in state.outdated_runs(4, 0)) == [1, 2]
    outdated = state.outdated_runs(0, time.time() + 1)
    assert sorted(run.serial for run in outdated) == [1, 2, 3, 4, 5, 6]
    state.forget_runs([run for run in outdated if run.serial < 6])
    assert {item.id for item in state.sessions()} == {'s1', 'running'}
    assert [run.serial for run in state.runs('s1')] == [6]
    assert sorted(run['serial'] for run in kept(state.path, 'runs')) == [6, 7]


def test_many_outdated_runs_that_have_to_stay_do_not_hide_the_others(open_state):
    state = open_state()
    for name in 'ab':
        workspace = state.reserve(draft(name), flush=False)
        for number in range(501):
            end(state, begin(state, workspace, name, id=f'run-{name}-{number}'))
    for name in 'ab':
        wanted, asked = state.get(name).id, range(20)
        assert any(run.workspace_id == wanted for _ in asked for run in state.outdated_runs(0, 0))


def test_what_a_run_changes_is_in_its_session_too(any_state):
    workspace = any_state.reserve(draft())
    session = begin(any_state, workspace)
    any_state.update_run('s', 1, stop=['CODE', 'words'])
    assert any_state.session('s').last.stop == any_state.run('s', 1).stop == ['CODE', 'words']
    end(any_state, session, state_of_it='failed', unswept=True)
    assert [run.unswept for run in any_state.open_runs()] == [True]
    any_state.update_run('s', 1, unswept=False)
    assert any_state.open_runs() == [] and any_state.session('s').last.state == 'failed'


# The clock


def test_a_clock_that_is_set_moves_what_expiry_counts_from(open_state, monkeypatch):
    now, offset = time.time(), state_module.clock_offset()
    state = open_state()
    workspace = state.reserve(draft(type=AGENT, ttl=100, last_activity_at=now - 40, ttl_from=now - 50))
    other = state.reserve(draft('b', last_activity_at=now - 40))
    assert state.follow_the_clock() == 0
    monkeypatch.setattr(state_module, 'clock_offset', lambda: offset + 1e6)
    monkeypatch.setattr(state_module.time, 'time', lambda: now + 1e6)
    assert state.follow_the_clock() == pytest.approx(1e6, abs=1)
    assert state.get(workspace.id).expires_at == pytest.approx(now + 60 + 1e6, abs=1)
    assert state.expire(now + 1e6) == []
    assert state.get(other.id).last_activity_at == now - 40
    monkeypatch.setattr(state_module, 'clock_offset', lambda: offset)
    monkeypatch.setattr(state_module.time, 'time', lambda: now)
    state.follow_the_clock()
    assert state.get(workspace.id).expires_at == pytest.approx(now + 60, abs=1)


def test_a_machine_that_starts_in_1970_deletes_nothing_when_it_learns_the_time(open_state, monkeypatch):
    now, offset = time.time(), state_module.clock_offset()
    state = open_state()
    workspace = state.reserve(draft(type=AGENT, ttl=100, last_activity_at=now - 40))
    state.close()
    monkeypatch.setattr(state_module, 'boot_id', lambda: 'another')
    monkeypatch.setattr(state_module, 'clock_offset', lambda: offset - now)
    again = open_state()
    assert again.follow_the_clock() == 0
    monkeypatch.setattr(state_module, 'clock_offset', lambda: offset)
    assert again.follow_the_clock() == pytest.approx(now, abs=5)
    assert again.get(workspace.id).expires_at == pytest.approx(time.time() + 100, abs=5)


def test_a_clock_that_is_set_while_the_server_is_away_is_noticed(open_state, monkeypatch):
    offset = state_module.clock_offset()
    state = open_state()
    workspace = state.reserve(draft(type=AGENT, ttl=100, last_activity_at=1000.0))
    state.close()
    monkeypatch.setattr(state_module, 'clock_offset', lambda: offset + 500)
    again = open_state()
    assert again.follow_the_clock() == pytest.approx(500, abs=1)
    assert again.get(workspace.id).expires_at == pytest.approx(1600, abs=1)


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


for name in ('__getitem__', '__setitem__', '__delitem__', '__contains__', '__iter__', '__len__', 'get',
             'values', 'items', 'keys', 'pop', 'setdefault', 'update'):
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
    write, ident = Store._write, gevent.monkey.get_original('threading', 'get_ident')
    here = ident()

    def watched(self, rows):
        written.append((state._lock._count, ident() != here))
        write(self, rows)

    def is_free(port):
        tried.append(state._lock._is_owned())
        return True

    monkeypatch.setattr(Store, '_write', watched)
    use_every_verb(state, is_free)
    assert tried and all(tried)
    assert written and set(written) == {(0, True)}  # nobody holds the lock, and a thread does the work


def test_others_go_on_while_a_slow_disk_writes(open_state, monkeypatch):
    state = open_state()
    state.reserve(draft('a'))
    write, release = Store._write, gevent.monkey.get_original('threading', 'Event')()

    def slowly(self, rows):
        release.wait(5)
        write(self, rows)

    monkeypatch.setattr(Store, '_write', slowly)
    waiting = gevent.spawn(state.reserve, draft('b'))
    gevent.sleep(0.01)
    assert {item.name for item in state.all()} == {'a', 'b'} and not waiting.ready()
    assert state.ports_in_use()['ssh'][0] == 2
    release.set()
    assert waiting.get(timeout=2).name == 'b'


def test_changes_that_come_together_are_written_together(open_state, monkeypatch):
    state = open_state()
    with written_by(monkeypatch) as written:
        made = gevent.pool.Pool(28).map(lambda number: state.reserve(draft(f'w{number}')), range(28))
    assert set(kept(state.path)) == {item.id for item in made}
    assert 1 <= len(written) <= 5


def test_a_look_at_the_status_writes_nothing(open_state, monkeypatch):
    """A job asks ten times a second whether it still has its purpose."""
    state = open_state()
    workspace = state.reserve(draft())
    with written_by(monkeypatch) as written:
        for _ in range(5):
            state.update(workspace.id, when={CREATING}, flush=False)
            gevent.sleep(0.005)
    assert not written
