"""Workspaces with their ports, and sessions with their runs, in one locked dict each, mirrored to one
file."""
import dataclasses
import json
import secrets
import string
import time
import uuid

from _agentbackend.errors import (
    PortExhausted,
    SessionBusy,
    SessionNotFound,
    Superseded,
    TooMany,
    WorkspaceAlreadyExists,
    WorkspaceNotFound,
)
from _agentbackend.mirror import Mirror
from _agentbackend.records import (
    AGENT,
    DELETING,
    RUNNING,
    SETTLED,
    Run,
    Session,
    Workspace,
    encode_record,
    record_of,
)
from _agentbackend.store import BEGUN, OUTDATED, RUNS
from _agentbackend.timing import boot_id, clock_offset

PORT_KINDS = {'codeServer': 'CODE_SERVER_PORTS', 'ssh': 'SSH_PORTS', 'custom': 'CUSTOM_PORTS'}
ID_LETTERS = string.ascii_lowercase + string.digits
CLOCK_STEP = 2  # seconds by which a clock has to jump to count as set anew
EVENTS_KEPT = 1000  # of each workspace's own
# By which the numbers of events go on at a start: what was told at the last may not have been written.
EVENTS_GAP = 1000


class State(Mirror):
    """Workspaces with their ports, and sessions, in one locked dict each, mirrored to a SQLite file.

    The dicts are the truth while the server runs. Of the runs they hold the last of each session and those
    that are not settled yet; the others are read from the file. Workspaces are returned as copies. A change
    returns when the file holds it, and raises StateNotWritten when that failed; the change stands, and is
    written as soon as the disk allows it.
    """

    def __init__(self, path, ranges):
        super().__init__(path)
        self.ranges = ranges  # kind of PORT_KINDS -> (first, last)
        # Of the file, so that one server can be told from another of the same instance.
        self.id = secrets.token_hex(16)
        self._workspaces = {}
        self._sessions = {}
        self._open_runs = {}  # (session id, number) -> Run: at work, unswept, or not in the file yet
        # Workspace id -> {number: [workspace id, number, type, seconds, data]} of its own last events.
        self._events = {}
        self._told = {}  # workspace id -> number of its last event
        self._offset = clock_offset()

    def get(self, id_or_name):
        """Return a copy of the workspace with this id or name; raise WorkspaceNotFound."""
        with self._lock:
            return self._find(id_or_name).copy()

    def container_of(self, workspace_id):
        """Return the id of the container that was made for a workspace, or '' if there is none."""
        with self._lock:
            found = self._workspaces.get(workspace_id)
            return found.container_id if found is not None else ''

    def node_of(self, workspace_id):
        """Return the name of the node that a workspace is on, or '' if there is none."""
        with self._lock:
            found = self._workspaces.get(workspace_id)
            return found.node if found is not None else ''

    def all(self):
        """Return copies of all workspaces, oldest first."""
        with self._lock:
            found = [item.copy() for item in self._workspaces.values()]
        return sorted(found, key=lambda item: (item.created_at, item.id))

    def reserve(self, draft, *, taken_names=(), taken_ports=(), is_free=lambda port: True, flush=True,
                place=lambda draft, workspaces: ''):
        """Add a workspace under a new id with ports of its own, or those that it has already, and return its
        copy.

        `place(draft, workspaces)` gives its node. Raises WorkspaceAlreadyExists, PortExhausted and what
        `place` raises; then nothing is kept.
        """
        with self._lock:
            self._refuse_taken(draft.name, taken_names)
            draft.node = place(draft, self._workspaces.values())
            draft.id = draft.id or self._new_id()
            draft.ports = draft.ports or self._claim(draft, {}, set(taken_ports), is_free)
            self._workspaces[draft.id] = draft.copy()
            self._touch('workspace', draft.id)
        if flush:
            self.flush()
        return draft

    def propose(self, draft, *, taken_ports, is_free, spare):
        """Give a workspace that may come to be an id and ports that are free now; keep nothing.

        Raises PortExhausted, also when less than `spare` of a range would be left for others.
        """
        with self._lock:
            draft.id = self._new_id()
            draft.ports = self._claim(draft, {}, set(taken_ports), is_free)
            taken = self._taken_ports() | set(taken_ports)
        for kind in draft.ports:
            first, last = self.ranges[kind]
            left = sum(port not in taken for port in range(first, last + 1)) - 1
            if left < spare * (last - first + 1):
                raise PortExhausted(f'Of {PORT_KINDS[kind]}={first}-{last} only {left + 1} are free, which '
                                    'are left to creates that ask for them; widen the range.', kind)

    def has(self, workspace_id):
        """Return whether there is a record of this id."""
        with self._lock:
            return workspace_id in self._workspaces

    def adopt(self, workspace):
        """Add a workspace as the engine knows it."""
        with self._lock:
            self._workspaces[workspace.id] = workspace.copy()
            self._touch('workspace', workspace.id)
        self.try_flush()

    def update(self, workspace_id, *, when=None, flush=True, **changes):
        """Change fields and return the copy; with `when` (a set of statuses) only from one of those, else
        raise Superseded."""
        with self._lock:
            found = self._workspaces.get(workspace_id)
            if found is None or (when is not None and found.status not in when):
                raise Superseded(workspace_id)
            result = dataclasses.replace(found, **changes)
            self._workspaces[workspace_id] = result.copy()
            if changes:
                self._touch('workspace', workspace_id)
        if flush:
            self.flush()
        return result

    def rename(self, workspace_id, name, *, taken_names=()):
        """Give a workspace another name; raise WorkspaceAlreadyExists."""
        with self._lock:
            found = self._find(workspace_id)
            if found.name != name:
                self._refuse_taken(name, taken_names)
                found.name = name
            self._touch('workspace', workspace_id)
        self.flush()

    def claim_ports(self, workspace_id, *, avoid=frozenset(), is_free=lambda port: True):
        """Give the workspace the ports that it wants and lacks, and others for those to `avoid`; return the
        copy.

        Raises PortExhausted; then nothing has changed.
        """
        with self._lock:
            found = self._find(workspace_id)
            kept = {key: port for key, port in found.ports.items() if port not in avoid}
            found.ports = self._claim(found, kept, set(avoid), is_free)
            result = found.copy()
            self._touch('workspace', workspace_id)
        self.try_flush()
        return result

    def expire(self, now, *, may_end=lambda workspace: True):
        """Mark those whose time has come, and that may end now, as deleting, and return their ids."""
        with self._lock:
            at_work = {run.workspace_id for run in self._open_runs.values() if run.state == RUNNING}
            due = [item for item in self._workspaces.values()
                   if item.status in SETTLED and item.expires_at is not None and item.expires_at <= now
                   and may_end(item)
                   and not (item.type == AGENT and item.id in at_work)]
            for item in due:
                item.status = DELETING
                self._touch('workspace', item.id)
        return [item.id for item in due]

    def follow_the_clock(self):
        """Move the times that expiry counts from along with a clock that was set; return by how many seconds,
        mostly 0.

        A machine may start in 1970 and learn the time later: that is no idle time. The time in which it
        sleeps is none either.
        """
        offset = clock_offset()
        step, self._offset = offset - self._offset, offset
        return self._shift(step) if abs(step) >= CLOCK_STEP else 0

    def remove(self, workspace_id):
        """Forget a workspace with its sessions, and give its ports back. It does not wait for the file."""
        with self._lock:
            self._workspaces.pop(workspace_id, None)
            self._drop_sessions({key for key, item in self._sessions.items()
                                 if item.workspace_id == workspace_id})
            self._told.pop(workspace_id, None)
            for number in self._events.pop(workspace_id, ()):
                self._dirty.pop(('event', workspace_id, number), None)
            self._touch('workspace', workspace_id, drop=True)

    def keep_event(self, workspace_id, kind, timestamp, data):
        """Keep an event of a workspace's own as one of its last, and return its number. It does not wait for
        the file."""
        with self._lock:
            number = self._told.get(workspace_id, 0) + 1
            if workspace_id in self._workspaces:
                self._told[workspace_id] = number
                events = self._events.setdefault(workspace_id, {})
                events[number] = [workspace_id, number, kind, timestamp, data]
                self._touch('event', workspace_id, number)
                if len(events) > EVENTS_KEPT:
                    first = next(iter(events))
                    del events[first]
                    self._touch('event', workspace_id, first, drop=True)
        return number

    def told(self, workspace_id):
        """Return the number of the last event of a workspace's own."""
        return self._told.get(workspace_id, 0)

    def events(self, workspace_id, *, after=0):
        """Return (how many events behind a number are kept no more, those that are: [..., number, type,
        seconds, data])."""
        with self._lock:
            kept = list(self._events.get(workspace_id, {}).values())
        found = [event for event in kept if event[1] > after]
        lost = found[0][1] - after - 1 if found and len(found) == len(kept) == EVENTS_KEPT else 0
        return lost, found

    def session(self, session_id):
        """Return a session; raise SessionNotFound."""
        with self._lock:
            if session_id not in self._sessions:
                raise SessionNotFound(session_id)
            return self._sessions[session_id]

    def sessions(self):
        """Return all sessions, oldest first."""
        with self._lock:
            found = list(self._sessions.values())
        return sorted(found, key=lambda item: (item.created_at, item.id))

    def open_runs(self):
        """Return the runs that are at work, or have left processes that are still to be ended."""
        with self._lock:
            return [run for run in self._open_runs.values() if run.state == RUNNING or run.unswept]

    def run(self, session_id, number):
        """Return a run that is at work or that ended just now, else None."""
        with self._lock:
            session = self._sessions.get(session_id)
            last = session.last if session is not None else None
            if last is not None and last.number == number:
                return last
            return self._open_runs.get((session_id, number))

    def runs(self, session_id, *, after=0, limit=-1):
        """Return the runs of a session that are kept, from the one behind number `after` on, at most `limit`
        (-1 is all)."""
        session = self.session(session_id)
        held = {run.number: run for run in self._unsettled() if run.session_id == session_id
                and run.number > after}
        found = {run.number: run for run in self._read(RUNS, session_id, after, limit)
                 if run.started_at >= session.created_at}
        found = held | {number: run for number, run in found.items() if number not in held
                        or run.ended_at is not None}
        return [found[number] for number in sorted(found)][:None if limit < 0 else limit]

    def runs_begun(self, workspace_id, serial):
        """Return the runs of a workspace from a serial number on, in the order in which they began."""
        held = [run for run in self._unsettled() if run.workspace_id == workspace_id and run.serial >= serial]
        found = {run.id: run for run in (*held, *self._read(BEGUN, workspace_id, serial))}
        with self._lock:
            known = [run for run in found.values() if run.session_id in self._sessions]
        return sorted(known, key=lambda run: run.serial)

    def outdated_runs(self, keep, before):
        """Return some of the ended runs that are more than `keep` in all, or ended before a time."""
        return self._read(OUTDATED, keep, before)

    def begin_run(self, session, run, *, limit):
        """Add a run to a session, which is added if it is new; return the session. Raise SessionBusy while
        another runs, and TooMany.

        It does not wait for the file: `flush` does.
        """
        with self._lock:
            found = self._sessions.get(session.id, session)
            if found.last is not None and found.last.state == RUNNING:
                raise SessionBusy(f'Session {session.id} has a task that runs; wait for its end, or cancel '
                                  'it.')
            if sum(item.state == RUNNING for item in self._open_runs.values()) >= limit:
                raise TooMany(f'AGENT_MAX_TASKS={limit} tasks are already running; wait for one to finish.',
                              headers={'Retry-After': '10'})
            workspace = self._find(found.workspace_id)
            workspace.runs_begun += 1
            run = dataclasses.replace(run, session_id=session.id, workspace_id=workspace.id,
                                      number=found.count + 1, serial=workspace.runs_begun)
            # An id that was begun with is refused a second time.
            agents_id = found.agent_session_id if found.conversed else str(uuid.uuid4())
            self._touch('workspace', workspace.id)
            return self._put_run(dataclasses.replace(found, agent_session_id=agents_id, count=run.number),
                                 run)

    def update_run(self, session_id, number, *, flush=True, **changes):
        """Change fields of a run that is at work, or unswept; raise SessionNotFound when there is none."""
        with self._lock:
            run = self._open_runs.get((session_id, number))
            if run is None:
                raise SessionNotFound(session_id)
            self._put_run(self._sessions[session_id], dataclasses.replace(run, **changes))
        if flush:
            self.flush()

    def end_run(self, session_id, number, *, state, end, total_cost_usd, conversed, length=None,
                unswept=False):
        """Write down the end of a run; a session that is gone with its workspace is fine."""
        with self._lock:
            session, run = self._sessions.get(session_id), self._open_runs.get((session_id, number))
            if session is None or run is None:
                return
            total = session.total_cost_usd if total_cost_usd is None else total_cost_usd
            ended = dataclasses.replace(run, state=state, end=end, length=length, unswept=unswept,
                                        ended_at=max(time.time(), run.started_at))
            self._put_run(dataclasses.replace(session, conversed=conversed, total_cost_usd=total), ended)
        self.try_flush()

    def remove_session(self, session_id):
        """Forget a session with its runs; raise SessionBusy while one of them is at work."""
        with self._lock:
            session = self.session(session_id)
            if session.last.state == RUNNING:
                raise SessionBusy(f'Session {session_id} has a task that runs; cancel it first.')
            self._drop_sessions({session_id})
        self.flush()

    def forget_runs(self, runs):
        """Forget ended runs, and sessions that have none left."""
        with self._lock:
            runs = [run for run in runs if run.session_id in self._sessions]
            over = {run.session_id for run in runs if run.number == self._sessions[run.session_id].count}
            for run in runs:
                if run.session_id not in over:
                    self._touch('run', run.session_id, run.number, drop=True)
            self._drop_sessions(over)
        self.try_flush()

    def ports_in_use(self):
        """Return how many ports of each kind are taken, and of how many: {kind: (used, total)}."""
        with self._lock:
            ports = self._taken_ports()
        return {kind: (sum(first <= port <= last for port in ports), last - first + 1)
                for kind, (first, last) in self.ranges.items()}

    # Records

    def _find(self, id_or_name):
        found = self._workspaces.get(id_or_name)
        if found is None:
            found = next((item for item in self._workspaces.values() if item.name == id_or_name), None)
        if found is None:
            raise WorkspaceNotFound(id_or_name)
        return found

    def _refuse_taken(self, name, taken_names):
        if name in taken_names or any(name in (item.name, item.id) for item in self._workspaces.values()):
            raise WorkspaceAlreadyExists(f'A workspace named {name!r} exists already; choose another name or '
                                         'delete that one.')

    def _new_id(self):
        while True:
            new = 'ws-' + ''.join(secrets.choice(ID_LETTERS) for _ in range(8))
            if new not in self._workspaces:
                return new

    def _taken_ports(self):
        return {port for item in self._workspaces.values() for port in item.ports.values()}

    def _claim(self, workspace, kept, avoid, is_free):
        """Return a port for each that `workspace` wants, those of `kept` where it can. `is_free` binds for a
        moment: quick, and never blocks."""
        wanted = {'codeServer': 'codeServer'} | ({'ssh': 'ssh'} if workspace.ssh else {})
        wanted |= {str(port): 'custom' for port in workspace.wanted_ports}
        result = {key: port for key, port in kept.items() if key in wanted}
        taken = self._taken_ports() | avoid
        for key, kind in [item for item in wanted.items() if item[0] not in result]:
            first, last = self.ranges[kind]
            free = (port for port in range(first, last + 1) if port not in taken and is_free(port))
            result[key] = next(free, None)
            if result[key] is None:
                raise PortExhausted(f'No free port in {PORT_KINDS[kind]}={first}-{last}: delete a workspace, '
                                    'or widen the range.', kind)
            taken.add(result[key])
        return result

    def _shift(self, step):
        now = time.time()
        with self._lock:
            for item in self._workspaces.values():
                if item.ttl is not None:
                    item.last_activity_at = min(item.last_activity_at + step, now)
                    item.ttl_from = min(item.ttl_from + step, now)
                    self._touch('workspace', item.id)
        return step

    def _put_run(self, session, run):
        if session.last is None or run.number >= session.last.number:
            session = dataclasses.replace(session, last=run)
        self._sessions[session.id] = session
        self._open_runs[run.session_id, run.number] = run
        self._touch('session', session.id)
        self._touch('run', run.session_id, run.number)
        return session

    def _drop_sessions(self, session_ids):
        """Forget sessions with their runs, however many there are, in one pass."""
        self._open_runs = {key: run for key, run in self._open_runs.items() if key[0] not in session_ids}
        self._take_back(session_ids)
        for session_id in session_ids:
            self._sessions.pop(session_id, None)
            self._touch('session', session_id, drop=True)

    def _unsettled(self):
        with self._lock:
            return list(self._open_runs.values())

    def _read(self, query, *parameters):
        rows = self.store.read(query, *parameters) if self.store else ()
        return [record_of(Run, values) for values in rows]

    # The file

    def _load(self, content):
        """Take the records of the file; raise ValueError for what makes no sense."""
        def by_id(kind, records):
            return {item.id: item for item in (record_of(kind, values) for values in records)}
        workspaces, sessions = by_id(Workspace, content['workspaces']), by_id(Session, content['sessions'])
        runs = sorted((record_of(Run, values) for values in content['runs']), key=lambda run: run.number)
        for run in runs:
            if run.session_id in sessions:
                sessions[run.session_id] = dataclasses.replace(sessions[run.session_id], last=run)
        kept = {key: item for key, item in sessions.items() if item.last is not None
                and item.workspace_id in workspaces}
        meta = content['meta']
        boot, offset = meta.get('clock', ('', 0))
        with self._lock:
            self._workspaces, self._sessions, self.id = workspaces, kept, meta.get('id', self.id)
            self._open_runs = {(run.session_id, run.number): run for run in runs
                               if run.session_id in kept and (run.state == RUNNING or run.unswept)}
            self._events = {}
            for event in content['events']:
                workspace_id, number, *_ = event
                if workspace_id in workspaces:
                    self._events.setdefault(workspace_id, {})[number] = event
            self._told = {key: max(self._events.get(key, [0])) + EVENTS_GAP for key in workspaces}
            self._touch('meta', 'id')
        if boot == boot_id():
            self._offset = offset

    def _take_over(self, workspaces, sessions):
        """Take what the file of earlier versions has, and this one has not."""
        with self._lock:
            for workspace in workspaces:
                self._workspaces.setdefault(workspace.id, workspace)
                self._touch('workspace', workspace.id)
            for session, runs in sessions:
                self._take_over_session(session, runs)

    def _take_over_session(self, session, runs):
        workspace = self._workspaces.get(session.workspace_id)
        if workspace is None or session.id in self._sessions:
            return
        for run in runs:
            workspace.runs_begun += 1
            run = dataclasses.replace(run, session_id=session.id, workspace_id=workspace.id,
                                      serial=workspace.runs_begun)
            session = self._put_run(dataclasses.replace(session, count=run.number), run)

    def _settle(self):
        """Let go of the runs that the file holds by now."""
        self._open_runs = {key: run for key, run in self._open_runs.items()
                           if run.state == RUNNING or run.unswept or ('run', *key) in self._dirty}

    def _values(self, kind, key):
        if kind == 'meta':
            return json.dumps([boot_id(), self._offset] if key == ['clock'] else self.id),
        if kind == 'workspace':
            return encode_record(self._workspaces[key[0]]),
        if kind == 'event':
            event = self._events.get(key[0], {}).get(key[1])
            return event and (json.dumps(event),)
        if kind == 'session':
            return encode_record(self._sessions[key[0]], without='last'),
        run = self._open_runs[tuple(key)]
        open_or_unswept = int(run.state == RUNNING or run.unswept)
        return run.workspace_id, run.serial, run.ended_at, open_or_unswept, encode_record(run)
