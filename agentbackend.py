"""Agent Backend: development workspaces on your own Docker engine, behind a REST API.

The module reads from top to bottom; a section uses names of its own and of those above it. Errors, settings and schemas, the engine with
the images, the pages, what agents print and what goes over the wire have modules of their own, which know nothing of this one.

State       workspaces and ports in one locked dict, mirrored to one file
Events      what happened, kept in a ring per topic, handed to bounded subscriptions
Logs        what containers print, followed once for all who read it
Workspaces  create, start, stop, remove, adopt, sweep
Agents      tasks that agents do in workspaces
Views       records as the objects of the API
Streams     SSE and WebSocket clients
Routes      the table of routes and their handlers
Server      the gate before the routes, the WSGI server, the command line
"""
from gevent import monkey; monkey.patch_all()  # noqa: E702, I001 - first: bottle and docker keep what they find at import

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import http.client
import io
import itertools
import json
import logging
import os
import re
import resource
import secrets
import signal
import socket
import string
import sys
import threading
import time
import urllib.parse
import uuid
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import bottle
import gevent
import gevent.event
import gevent.lock
import gevent.pool
from geventwebsocket.exceptions import WebSocketError

from agentbackend_agents import ClaudeLines, CommandLines, RunReader, shorten
from agentbackend_config import (
    BackendError,
    Config,
    ConfigError,
    ConflictOnEngine,
    DockerError,
    EngineUnavailable,
    Forbidden,
    MethodNotAllowed,
    MissingOnEngine,
    NotFound,
    PayloadTooLarge,
    PortExhausted,
    PortTaken,
    RequestTimeout,
    Schemas,
    SessionBusy,
    SessionNotFound,
    Superseded,
    TooMany,
    Unauthorized,
    UnreadableLog,
    UnsupportedMediaType,
    UpgradeRequired,
    ValidationError,
    WorkspaceAlreadyExists,
    WorkspaceNotFound,
    WorkspaceNotRunning,
    internal_error,
    is_loopback,
    parse_json,
    same_secret,
)
from agentbackend_engine import (
    BASE,
    CODE_SERVER_PORT,
    PREFIX,
    SSH_PORT,
    USER,
    Engine,
    Templates,
    parse_time,
    view_time,
)
from agentbackend_pages import (
    EVENT_STREAM,
    HTML_PAGE,
    PLAIN_TEXT,
    RETRY,
    VERSION,
    Pages,
    openapi_document,
)
from agentbackend_wire import (
    GOING_AWAY,
    POLICY,
    STDERR,
    STREAM_NAMES,
    Departure,
    Handler,
    LogPosition,
    Turn,
    WSGIServer,
    politely,
    read_up_to,
    text_frame,
)

HERE = Path(__file__).resolve().parent
DATA = HERE if (HERE / 'schemas').is_dir() else HERE / 'agentbackend_data'
log = logging.getLogger('agentbackend')


# ---------------------------------------------------------------------------------------------
# State
# ---------------------------------------------------------------------------------------------

CREATING, RUNNING, STOPPING, STOPPED, ERROR, DELETING = 'creating', 'running', 'stopping', 'stopped', 'error', 'deleting'
STATUSES = (CREATING, RUNNING, STOPPING, STOPPED, ERROR, DELETING)
SETTLED = frozenset((RUNNING, STOPPED, ERROR))  # no job is at work on it
PERSISTENT, TEMPORARY, AGENT = 'persistent', 'temporary', 'agent'
PORT_KINDS = {'codeServer': 'CODE_SERVER_PORTS', 'ssh': 'SSH_PORTS', 'custom': 'CUSTOM_PORTS'}
ID_LETTERS = string.ascii_lowercase + string.digits


@dataclass
class Workspace:
    """What is known of one workspace. Times are seconds since the epoch, sizes bytes.

    `folder` is the name it was created with, and names the project folder: a rename does not move files under an open editor.
    `born` is true once it has answered: from then on a failure never removes its data.
    """

    id: str
    name: str
    folder: str
    type: str
    template: str
    created_at: float
    status: str = CREATING
    ports: dict = field(default_factory=dict)  # 'codeServer', 'ssh' or a container port as text -> host port
    wanted_ports: list = field(default_factory=list)
    ssh: bool = True
    git_url: str = ''
    git_branch: str = ''
    has_credentials: bool = False
    env: dict = field(default_factory=dict)
    cpus: float = 0
    memory: int = 0
    labels: dict = field(default_factory=dict)
    ssh_public_keys: list = field(default_factory=list)
    ttl: float = None
    ttl_from: float = 0
    last_activity_at: float = 0
    password: str = ''
    container_id: str = ''
    born: bool = False
    error: str = ''

    @property
    def expires_at(self):
        """When it is deleted, or None: an agent workspace counts from its last activity, the others from when ttl was set."""
        if self.ttl is None:
            return None
        return (self.last_activity_at if self.type == AGENT else self.ttl_from) + self.ttl

    def copy(self):
        """Return a copy that shares nothing with this one."""
        return dataclasses.replace(self, ports=dict(self.ports), wanted_ports=list(self.wanted_ports), env=dict(self.env),
                                   labels=dict(self.labels), ssh_public_keys=list(self.ssh_public_keys))


@dataclass
class Run:
    """One task of a session. `boot` is when its container was started: a run does not outlive that.

    `stop` is [code, message] once it is to be ended, `end` {'type', 'data'} of its last event once it has. Then `length` is how many
    bytes of its output belong to it: what it has left running may write on.
    """

    number: int
    id: str
    task: str
    started_at: float
    timeout: float
    boot: str
    state: str = RUNNING  # then completed, failed or cancelled
    stop: list = None
    end: dict = None
    length: int = None
    ended_at: float = None


@dataclass
class Session:
    """A conversation with an agent in one workspace. The agent has an id of its own for it, and counts its cost from the beginning."""

    id: str
    workspace_id: str
    agent: str
    created_at: float
    agent_session_id: str = ''
    conversed: bool = False  # the agent has something to resume
    total_cost_usd: float = 0
    runs: list = field(default_factory=list)


class State:
    """Workspaces with their ports, and sessions, in one locked dict each, mirrored to a JSON file.

    What it returns are copies. A change returns when the file holds it; changes that come together are written together.
    """

    def __init__(self, path, ranges):
        self.path = Path(path) if path else None
        self.ranges = ranges  # kind of PORT_KINDS -> (first, last)
        # Protects _workspaces, _sessions and _version. Nothing that can block is done under it: no file, no engine, no event.
        self._lock = threading.RLock()
        self._workspaces = {}
        self._sessions = {}
        self._version = self._saved = 0
        self._changed = gevent.event.Event()
        self._written = gevent.event.Event()
        self._writer = None

    def open(self):
        """Read the file and begin to mirror to it. A damaged file is put aside, and the engine's labels tell the rest."""
        if not self.path:
            return
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            document = json.loads(self.path.read_text())
            loaded = {item['id']: Workspace(**item) for item in document['workspaces']}
            sessions = {item['id']: Session(**{**item, 'runs': [Run(**run) for run in item['runs']]}) for item in document.get('sessions', ())}
        except FileNotFoundError:
            loaded, sessions = {}, {}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            aside = self.path.with_suffix(f'.damaged-{int(time.time())}')
            self.path.rename(aside)
            log.error('The state file %s is damaged (%s); it is kept as %s, and what the engine knows is adopted.',
                      self.path, error, aside)
            loaded, sessions = {}, {}
        with self._lock:
            self._workspaces.update(loaded)
            self._sessions.update(sessions)
        self._writer = gevent.spawn(self._write_for_ever)

    def close(self):
        """Write what is not yet written, and stop."""
        while self._writer and self._saved < self._version:
            self.flush()  # the write at work in its thread must not meet another one
        if self._writer:
            self._writer.kill()
            self._writer = None
            self._write()
            self._written.set()

    def get(self, id_or_name):
        """Return a copy of the workspace with this id or name; raise WorkspaceNotFound."""
        with self._lock:
            return self._find(id_or_name).copy()

    def all(self):
        """Return copies of all workspaces, oldest first."""
        with self._lock:
            found = [item.copy() for item in self._workspaces.values()]
        return sorted(found, key=lambda item: (item.created_at, item.id))

    def reserve(self, draft, *, taken_names=(), taken_ports=(), is_free=lambda port: True, flush=True):
        """Add a workspace under a new id with ports of its own, and return its copy.

        Raises WorkspaceAlreadyExists and PortExhausted; then nothing is kept.
        """
        with self._lock:
            self._refuse_taken(draft.name, taken_names)
            draft.id = self._new_id()
            draft.ports = self._claim(draft, {}, set(taken_ports), is_free)
            self._workspaces[draft.id] = draft.copy()
            self._touch_file()
        if flush:
            self.flush()
        return draft

    def adopt(self, workspace):
        """Add a workspace as the engine knows it."""
        with self._lock:
            self._workspaces[workspace.id] = workspace.copy()
            self._touch_file()
        self.flush()

    def update(self, workspace_id, *, when=None, flush=True, **changes):
        """Change fields and return the copy; with `when` (a set of statuses) only from one of those, else raise Superseded."""
        with self._lock:
            found = self._workspaces.get(workspace_id)
            if found is None or (when is not None and found.status not in when):
                raise Superseded(workspace_id)
            result = dataclasses.replace(found, **changes)
            self._workspaces[workspace_id] = result.copy()
            if changes:
                self._touch_file()
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
            self._touch_file()
        self.flush()

    def claim_ports(self, workspace_id, *, avoid=frozenset(), is_free=lambda port: True):
        """Give the workspace the ports that it lacks, and others for those to `avoid`; return the copy."""
        with self._lock:
            found = self._find(workspace_id)
            kept = {key: port for key, port in found.ports.items() if port not in avoid}
            found.ports = self._claim(found, kept, set(avoid), is_free)
            result = found.copy()
            self._touch_file()
        self.flush()
        return result

    def expire(self, now):
        """Mark those whose time has come as deleting, and return their ids."""
        with self._lock:
            at_work = {item.workspace_id for item in self._sessions.values() if item.runs[-1].state == RUNNING}
            due = [item for item in self._workspaces.values()
                   if item.status in SETTLED and item.expires_at is not None and item.expires_at <= now
                   and not (item.type == AGENT and item.id in at_work)]
            for item in due:
                item.status = DELETING
                self._touch_file()
        return [item.id for item in due]

    def remove(self, workspace_id):
        """Forget a workspace with its sessions, and give its ports back."""
        with self._lock:
            self._workspaces.pop(workspace_id, None)
            self._sessions = {key: item for key, item in self._sessions.items() if item.workspace_id != workspace_id}
            self._touch_file()
        self.flush()

    def session(self, session_id):
        """Return a copy of a session; raise SessionNotFound."""
        with self._lock:
            return self._copy(self._session(session_id))

    def sessions(self):
        """Return copies of all sessions, oldest first."""
        with self._lock:
            found = [self._copy(item) for item in self._sessions.values()]
        return sorted(found, key=lambda item: (item.created_at, item.id))

    def begin_run(self, session, run, *, limit):
        """Add a run to a session, which is added if it is new; return its copy. Raise SessionBusy while another runs, and TooMany.

        It does not wait for the file: `flush` does.
        """
        with self._lock:
            running = sum(item.runs[-1].state == RUNNING for item in self._sessions.values())
            found = self._sessions.get(session.id)
            if found is not None and found.runs[-1].state == RUNNING:
                raise SessionBusy(f'Session {session.id} has a task that runs; wait for its end, or cancel it.')
            if running >= limit:
                raise TooMany(f'AGENT_MAX_TASKS={limit} tasks run already; wait for the end of one.', headers={'Retry-After': '10'})
            found = self._sessions.setdefault(session.id, session) if found is None else found
            if not found.conversed:
                found.agent_session_id = str(uuid.uuid4())  # an id that was begun with is refused a second time
            run.number = len(found.runs) + 1
            found.runs.append(run)
            result = self._copy(found)
            self._touch_file()
        return result

    def update_run(self, session_id, number, **changes):
        """Change fields of a run."""
        with self._lock:
            run = self._session(session_id).runs[number - 1]
            for name, value in changes.items():
                setattr(run, name, value)
            self._touch_file()
        self.flush()

    def end_run(self, session_id, number, *, state, end, total_cost_usd, conversed, length=None):
        """Write down the end of a run; a session that is gone with its workspace is fine."""
        with self._lock:
            session = self._sessions.get(session_id)
            if session is None:
                return
            session.conversed = conversed
            if total_cost_usd is not None:
                session.total_cost_usd = total_cost_usd
            run = session.runs[number - 1]
            run.state, run.end, run.length, run.ended_at = state, end, length, time.time()
            self._touch_file()
        self.flush()

    def remove_session(self, session_id):
        """Forget a session and return it; raise SessionBusy while a task of it runs."""
        with self._lock:
            session = self._session(session_id)
            if session.runs[-1].state == RUNNING:
                raise SessionBusy(f'Session {session_id} has a task that runs; cancel it first.')
            del self._sessions[session_id]
            self._touch_file()
        self.flush()
        return session

    def _session(self, session_id):
        if session_id not in self._sessions:
            raise SessionNotFound('Session not found')
        return self._sessions[session_id]

    @staticmethod
    def _copy(session):
        return dataclasses.replace(session, runs=[dataclasses.replace(run) for run in session.runs])

    def ports_in_use(self):
        """Return how many ports of each kind are taken, and of how many: {kind: (used, total)}."""
        with self._lock:
            ports = self._taken_ports()
        return {kind: (sum(first <= port <= last for port in ports), last - first + 1)
                for kind, (first, last) in self.ranges.items()}

    def flush(self):
        """Wait until the file holds everything up to now."""
        target = self._version
        while self._writer and self._saved < target:
            self._written.wait()

    def _find(self, id_or_name):
        found = self._workspaces.get(id_or_name)
        if found is None:
            found = next((item for item in self._workspaces.values() if item.name == id_or_name), None)
        if found is None:
            raise WorkspaceNotFound('Workspace not found')
        return found

    def _refuse_taken(self, name, taken_names):
        if name in taken_names or any(item.name == name for item in self._workspaces.values()):
            raise WorkspaceAlreadyExists(f'A workspace named {name!r} exists already; choose another name or delete that one.')

    def _new_id(self):
        while True:
            new = 'ws-' + ''.join(secrets.choice(ID_LETTERS) for _ in range(8))
            if new not in self._workspaces:
                return new

    def _taken_ports(self):
        return {port for item in self._workspaces.values() for port in item.ports.values()}

    def _claim(self, workspace, kept, avoid, is_free):
        """Return `kept` with the ports added that `workspace` lacks. `is_free` binds for a moment: quick, and never blocks."""
        wanted = {'codeServer': 'codeServer'} | ({'ssh': 'ssh'} if workspace.ssh else {})
        wanted |= {str(port): 'custom' for port in workspace.wanted_ports}
        result, taken = dict(kept), self._taken_ports() | avoid
        for key, kind in wanted.items():
            if key in result:
                continue
            first, last = self.ranges[kind]
            result[key] = next((port for port in range(first, last + 1) if port not in taken and is_free(port)), None)
            if result[key] is None:
                raise PortExhausted(f'No free port in {PORT_KINDS[kind]}={first}-{last}: delete a workspace, or widen the range.')
            taken.add(result[key])
        return result

    def _touch_file(self):
        self._version += 1
        self._changed.set()

    def _write_for_ever(self):
        while True:
            self._changed.wait()
            self._write()
            done, self._written = self._written, gevent.event.Event()
            done.set()

    def _write(self):
        self._changed.clear()
        with self._lock:
            version = self._version
            text = json.dumps({'version': 1, 'workspaces': [dataclasses.asdict(item) for item in self._workspaces.values()],
                               'sessions': [dataclasses.asdict(item) for item in self._sessions.values()]})
        try:
            # A disk may take its time; in a thread, other greenlets go on meanwhile.
            gevent.get_hub().threadpool.apply(write_atomically, (self.path, text))
        except OSError:
            log.exception('The state file %s could not be written; what changed is known to this process only.', self.path)
        self._saved = version


def write_atomically(path, text):
    """Replace a file so that a crash leaves the old content or the new, never a part; only its owner can read it."""
    temporary = path.with_suffix('.new')
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 'w') as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# ---------------------------------------------------------------------------------------------
# Events
# ---------------------------------------------------------------------------------------------

RING_SIZE = 5000  # events kept per topic
RING_BYTES = 4 * 2**20  # and how large they may be together
QUEUE_SIZE = 1000  # events that wait for one reader
QUEUE_BYTES = 4 * 2**20  # and how large they may be together
EVERYTHING = '*'  # the topic of every workspace's status
DELETED = {'status': DELETING, 'deleted': True}  # data of a workspace's last event


@dataclass(slots=True)
class Event:
    """One thing that happened. `timestamp` is seconds since the epoch; `session_id` is None outside of agent tasks.

    `id` is a position in its topic: who has seen it has seen everything before it. `json` keeps what it was encoded to, so that
    it is encoded once for all its readers.
    """

    type: str
    workspace_id: str
    id: str
    timestamp: float
    data: dict
    session_id: str = None
    place: str = None  # its id in its session
    size: int = 200  # bytes, roughly
    json: bytes = None


LAST_LINE = 10**12  # in the place of a run's last event, which is not made from a line
BEGINNING = (0, LAST_LINE, 0)  # the place before the first event of a session


def event_id_of(place):
    """Return the id of a session's event from its place, (run, line, number of the event in the line)."""
    run, line, number = place
    return f"{run}-{'end' if line == LAST_LINE else line}-{number}"


def place_of(event_id):
    """Return the place of a session's event from its id; raise ValidationError for anything else."""
    match = re.fullmatch(r'(\d{1,9})-(\d{1,12}|end)-(\d{1,9})', event_id)
    if not match:
        raise ValidationError(f'after: {event_id[:80]!r} is no id of an event of a session')
    return int(match[1]), LAST_LINE if match[2] == 'end' else int(match[2]), int(match[3])


def comes_next(place, after):
    """Tell whether nothing lies between two places in a session: the first is not beyond the second, or begins the run that follows."""
    return place <= after or (place[1:] == (0, 0) and after >= (place[0] - 1, LAST_LINE, 0))


class Cursor:
    """A position in a workspace's topic, as an event's id holds it.

    It says what was published, and when; how far the log was read; and how far each running task was told: {session id: event id}.
    All but the first hold beyond the end of this process.
    """

    def __init__(self, boot, count, seen_at, position=None, marks=None):
        self.boot, self.count, self.seen_at, self.position, self.marks = boot, count, seen_at, position, marks or {}

    @classmethod
    def parse(cls, text):
        """Return the cursor of an event's id; raise ValidationError for anything else."""
        match = re.fullmatch(r'([0-9a-f]{1,16})\.(\d{1,18})\.([0-9a-f]{1,16})\.([0-9a-f+-]*)((~[\w.-]{1,100}/[\w-]{1,40})*)', text)
        with contextlib.suppress(ValueError, ValidationError):
            if match:
                marks = dict(mark.split('/') for mark in match[5].split('~')[1:])
                for mark in marks.values():
                    place_of(mark)
                return cls(match[1], int(match[2]), int(match[3], 16) / 1000, LogPosition.parse(match[4]) if match[4] else None, marks)
        raise ValidationError(f'after: {text[:80]!r} is no id of an event')

    def has_seen(self, event):
        """Tell whether an event of a task, told again by another process, was seen already."""
        mark = self.marks.get(event.session_id)
        return mark is not None and event.place is not None and place_of(event.place) <= place_of(mark)


def place_id(boot, count, seen_at, position, marks):
    """Return the id of an event from what a cursor holds."""
    marks = ''.join(f'~{session}/{event_id}' for session, event_id in marks.items())
    return f'{boot}.{count}.{int(seen_at * 1000):x}.{position}{marks}'


class Ring:
    """The last events of a topic, as many as may be kept."""

    def __init__(self):
        self._events = collections.deque()  # (count, event)
        self._bytes = 0
        self._dropped = collections.deque(maxlen=10_000)  # counts of those that are kept nowhere else
        self.end_of_dropped = 0  # count of the last that was dropped

    def append(self, count, event):
        """Keep an event, and drop the oldest for it if need be."""
        self._events.append((count, event))
        self._bytes += event.size
        while len(self._events) > RING_SIZE or (self._bytes > RING_BYTES and len(self._events) > 1):
            self.end_of_dropped, dropped = self._events.popleft()
            self._bytes -= dropped.size
            if dropped.place is None:
                self._dropped.append(self.end_of_dropped)

    def after(self, count):
        """Return (count, event) of what came after a count, oldest first."""
        return [(number, event) for number, event in self._events if number > count]

    def lost_after(self, count):
        """Return how many events that came after a count are kept nowhere any more; those of a task are in its file."""
        return sum(number > count for number in self._dropped)


class Subscription:
    """A reader's bounded queue. When it is full the oldest events are lost and counted.

    `on_put`, if given, is called after each event; it must not block.
    """

    def __init__(self, size=QUEUE_SIZE, on_put=None):
        self._queue = collections.deque()
        self._size = size
        self._bytes = 0
        self._wake = gevent.event.Event()
        self._on_put = on_put
        self.lost = 0
        self.closed = False

    def __len__(self):
        return len(self._queue)

    @property
    def has_room(self):
        """Tell whether there is room for events that can wait."""
        return len(self._queue) < self._size // 2 and self._bytes < QUEUE_BYTES // 2

    def put(self, event):
        """Hand over an event; never blocks."""
        self._queue.append(event)
        self._bytes += event.size
        while len(self._queue) > self._size or (self._bytes > QUEUE_BYTES and len(self._queue) > 1):
            self._bytes -= self._queue.popleft().size
            self.lost += 1
        self._wake.set()
        if self._on_put is not None:
            self._on_put()

    def take(self, timeout=None):
        """Return (how many were lost, the events that wait), at the latest after `timeout` seconds."""
        self._wake.wait(timeout)
        return self.drain()

    def drain(self):
        """Return the same without waiting, and without a switch to another greenlet."""
        if not self.closed:
            self._wake.clear()
        lost, events = self.lost, list(self._queue)
        self.lost = self._bytes = 0
        self._queue.clear()
        return lost, events

    def close(self):
        """Let the reader go on to its end."""
        self.closed = True
        self._wake.set()


class Events:
    """Topics, each a ring of its last events and a set of subscriptions.

    Everything here is done without a switch between greenlets, so that it needs no lock and a reader can't delay a publisher.
    """

    def __init__(self, secrets=()):
        self._secrets = [secret for secret in secrets if len(secret) >= 6]
        self._marks = {}  # workspace id -> {session id: id of the last event}
        self._rings = {}  # topic -> Ring
        self._readers = collections.defaultdict(set)
        self.boot = f'{int(time.time() * 1000):x}'  # ids of another process mean nothing here
        self.count = 0
        self.positions = {}  # workspace id -> how far its log has been published, as text

    def publish(self, event_type, workspace_id, data, *, session_id=None, session_event_id=None, timestamp=None, last=False):
        """Publish an event to the topics of its workspace and session, and return it. In a session it has an id of its own."""
        self.count += 1
        data = self.strike(data)
        if session_event_id is not None:
            self._marks.setdefault(workspace_id, {})[session_id] = session_event_id
        event = Event(event_type, workspace_id, self.place(workspace_id), timestamp or time.time(), data, session_id, session_event_id)
        event.size += sum(len(value) if isinstance(value, str) else 100 for value in data.values())
        self._deliver(workspace_id, event)
        if session_id is not None:
            self._deliver(session_id, dataclasses.replace(event, id=session_event_id or event.id))
        if event_type == 'status':
            self._deliver(EVERYTHING, event, told=self._readers.get(workspace_id, ()))
        if last:
            self.unmark(workspace_id, session_id)
        return event

    def mark(self, workspace_id, session_id, event_id):
        """Note that a task begins after an event: from now on the ids of its workspace say how far it was told."""
        self._marks.setdefault(workspace_id, {})[session_id] = event_id

    def unmark(self, workspace_id, session_id):
        """Take that back."""
        self._marks.get(workspace_id, {}).pop(session_id, None)

    def cursor(self, workspace_id):
        """Return where the topic of a workspace is now."""
        return Cursor(self.boot, self.count, time.time(), marks=dict(self._marks.get(workspace_id, {})))

    def place(self, workspace_id):
        """Return where the topic of a workspace is now, as the id of an event."""
        return place_id(self.boot, self.count, time.time(), self.positions.get(workspace_id, ''), self._marks.get(workspace_id, {}))

    def strike(self, value):
        """Return a value with every known secret struck out of its texts."""
        if not self._secrets:
            return value
        if isinstance(value, str):
            for secret in self._secrets:
                value = value.replace(secret, '***')
            return value
        if isinstance(value, dict):
            return {key: self.strike(item) for key, item in value.items()}
        return [self.strike(item) for item in value] if isinstance(value, list) else value

    def publish_lines(self, workspace_id, lines, position):
        """Publish lines of a log, (stream, stamp, text), as far as `position` has not seen them.

        They are kept by the engine, so not in the ring too.
        """
        for event in self.log_events(workspace_id, lines, position, lambda: place_id(self.boot, self.count, time.time(), position, self._marks.get(workspace_id, {}))):
            for reader in self._readers.get(workspace_id, ()):
                reader.put(event)
        self.positions[workspace_id] = str(position)

    def log_events(self, workspace_id, lines, position, place):
        """Yield an event for each line that `position` has not seen, and move it on; `place()` gives its id."""
        for stream, stamp, text in lines:
            if position.advance(stream, stamp):
                yield Event('log', workspace_id, place(), stamp / 1e9,
                            {'stream': STREAM_NAMES[stream], 'message': self.strike(text)}, size=200 + len(text))

    def recent(self, topic):
        """Return the events that the ring of a topic holds, oldest first."""
        return [event for _, event in self.ring(topic).after(-1)]

    def ring(self, topic):
        """Return the ring of a topic, an empty one if nothing was published."""
        return self._rings.get(topic) or Ring()

    def attach(self, topic, reader):
        """Let a subscription have what is published to a topic from now on."""
        self._readers[topic].add(reader)

    def detach(self, topic, reader):
        """End that; twice is fine."""
        readers = self._readers.get(topic)
        if readers is not None:
            readers.discard(reader)
            if not readers:
                del self._readers[topic]

    @contextlib.contextmanager
    def subscribed(self, topic, size=QUEUE_SIZE):
        """Give a Subscription to a topic for the length of a block."""
        reader = Subscription(size)
        self.attach(topic, reader)
        try:
            yield reader
        finally:
            self.detach(topic, reader)

    def forget(self, topic):
        """Drop the ring of a topic that is no more."""
        self._rings.pop(topic, None)
        self.positions.pop(topic, None)
        self._marks.pop(topic, None)

    def _deliver(self, topic, event, told=()):
        if topic not in self._rings:
            self._rings[topic] = Ring()
        self._rings[topic].append(self.count, event)
        for reader in [reader for reader in self._readers.get(topic, ()) if reader not in told]:
            reader.put(event)


# ---------------------------------------------------------------------------------------------
# Logs
# ---------------------------------------------------------------------------------------------

LINGER = 10  # seconds a log is followed after its last reader left: a page that is loaded again comes back at once
MARGIN = 1_000_000_000  # nanoseconds: the engine writes a line of one stream a little after a later one of the other
READY_PATIENCE = 2  # seconds: the last line may have been rotated away before it was reached
LOG_POLL = 5  # seconds between looks at a container that does not run, if nobody said that it changed


class Pump:
    """One stream that follows the container of a workspace for all its readers."""

    def __init__(self, workspace_id):
        self.workspace_id = workspace_id
        self.position = None  # how far it has published; None until the container was seen
        self.ready = gevent.event.Event()
        self.changed = gevent.event.Event()
        self.readers = 0
        self.target = None  # the line with which it has come to the end of what there was, as (stream, stamp)
        self.finished = None  # id of a container that was read to its end
        self.damaged = None  # id of a container whose log the engine can't read: only what it prints from then on can be told
        self.greenlet = None


class Logs:
    """The logs of containers, as events while somebody reads them. A pump is shared, begins with its first reader and ends after its last."""

    def __init__(self, events, engine):
        self._events = events
        self._engine = engine
        self._pumps = {}

    @contextlib.contextmanager
    def watched(self, workspace_id):
        """Keep the pump of a workspace going for the length of a block, and give it."""
        pump = self.watch(workspace_id)
        try:
            yield pump
        finally:
            self.unwatch(pump)

    def watch(self, workspace_id):
        """Keep the pump of a workspace going until `unwatch`, and return it."""
        pump = self._pumps.get(workspace_id)
        if pump is None:
            pump = self._pumps[workspace_id] = Pump(workspace_id)
            pump.greenlet = gevent.spawn(self._run, pump)
        pump.readers += 1
        return pump

    def unwatch(self, pump):
        """Let a pump go."""
        pump.readers -= 1
        if not pump.readers:
            gevent.spawn_later(LINGER, self._drop, pump)

    def changed(self, workspace_id):
        """Note that a container of a workspace has started, ended or come anew."""
        if workspace_id in self._pumps:
            self._pumps[workspace_id].finished = None
            self._pumps[workspace_id].changed.set()

    def read(self, workspace_id, *, position=None, tail=None):
        """Yield lists of lines that the engine holds now, from a position on or the last `tail`; nothing without a container."""
        container = self._engine.find(workspace_id)
        if container is None or tail == 0:
            return
        with contextlib.suppress(MissingOnEngine, ConflictOnEngine):  # removed meanwhile
            yield from self._engine.log_lines(container, since=position.since() if position else 0, tail=tail)

    def close(self):
        """End all pumps."""
        gevent.killall([pump.greenlet for pump in self._pumps.values()], timeout=5)
        self._pumps.clear()

    def _drop(self, pump):
        if not pump.readers and self._pumps.get(pump.workspace_id) is pump:
            del self._pumps[pump.workspace_id]
            self._events.positions.pop(pump.workspace_id, None)
            pump.greenlet.kill(block=False)

    def _run(self, pump):
        while True:
            try:
                self._follow(pump)
                pump.changed.wait(LOG_POLL)
            except EngineUnavailable as error:
                log.debug('The log of %s waits for the engine: %s', pump.workspace_id, error)
                pump.changed.wait(0.3)
            except Exception:
                log.exception('Following the log of %s failed; trying again.', pump.workspace_id)
                pump.changed.wait(1)
            pump.changed.clear()

    def _follow(self, pump):
        """Publish what the container prints until it ends; read again from the last line when only the stream ended."""
        while True:
            container = self._engine.find(pump.workspace_id)
            try:
                if pump.position is None:
                    self._begin(pump, container)
                if container is None or not container.started or (pump.finished == container.id and not container.up):
                    return
                self._publish(pump, container)
            except UnreadableLog as error:
                self._go_on_behind(pump, container, error)
            after = self._engine.inspect(container.id)
            if after is None or not after.up:
                pump.finished = container.id
                return
            gevent.sleep(0.05)

    def _publish(self, pump, container):
        pump.position = pump.position.copy()
        tail = 0 if pump.damaged == container.id else None
        with contextlib.suppress(MissingOnEngine, ConflictOnEngine):  # a conflict: it is being removed
            for lines in self._engine.log_lines(container, since=pump.position.since(), tail=tail, follow=True):
                self._events.publish_lines(pump.workspace_id, lines, pump.position)
                if pump.target is not None and pump.position.covers(*pump.target):
                    pump.ready.set()

    def _go_on_behind(self, pump, container, error):
        """Leave out what is damaged: after a power failure or on a full disk, an engine has written what it can't read."""
        if pump.damaged != container.id:
            log.warning('The log of workspace %s is damaged: %s', pump.workspace_id, error)
            self._events.publish('error', pump.workspace_id, {'code': error.code, 'message': f'Lines are missing here. {error}'})
        pump.damaged = container.id
        now = time.time_ns()
        pump.position = pump.position or LogPosition((now, 0), (now, 0))
        pump.ready.set()
        gevent.sleep(1)

    def _begin(self, pump, container):
        """Begin a little before the last line that there is; the pump is ready when it has come to that line.

        Readers attach only then, and take what is older from the engine.
        """
        lines = [line for batch in self._engine.log_lines(container, tail=1) for line in batch] if container and container.started else []
        start = lines[-1][1] - MARGIN if lines else 0
        pump.position = LogPosition((start, 0), (start, 0))
        self._events.positions[pump.workspace_id] = str(pump.position)
        if lines:
            pump.target = lines[-1][:2]
            gevent.spawn_later(READY_PATIENCE, pump.ready.set)
        else:
            pump.ready.set()


# ---------------------------------------------------------------------------------------------
# Workspaces
# ---------------------------------------------------------------------------------------------

PORT_ATTEMPTS = 5
EXIT_CLONE_FAILED = 65  # of the entrypoint
LAST_WORDS = 6  # lines of a container's output that an error quotes
PROBE_PATIENCE = 3  # seconds that a workspace has to say that it is well
GRACE = 2  # seconds: `docker restart` ends a container for a moment, and a temporary one must not be deleted for that
SWEEP_PAUSE = 1  # seconds
CLOCK_SKEW = 60  # seconds by which the clock of a remote engine may be ahead
SETTINGS_FOLDER = '/etc/agentbackend'  # in the container: what the entrypoint reads


def split_credentials(url):
    """Return (url without secrets, line for git's credential store or '').

    All of the user part of an http URL is taken for a secret, since tokens are given as user names; of an ssh URL only a password.
    """
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:  # which would quote it
        raise ValidationError('gitUrl: its host makes no sense', details=[{'path': 'gitUrl', 'message': 'its host makes no sense'}]) from None
    if '@' not in parts.netloc or not parts.scheme:
        return url, ''
    user, _, host = parts.netloc.rpartition('@')
    if parts.scheme in ('http', 'https'):
        user = user if ':' in user else f'{user}:'
        return parts._replace(netloc=host).geturl(), f'{parts.scheme}://{user}@{host}\n'
    return parts._replace(netloc=f"{user.partition(':')[0]}@{host}").geturl(), ''


def is_bindable(address, port):
    """Tell whether nothing listens on a host port. An address that is not this machine's tells nothing, so it passes."""
    family = socket.AF_INET6 if ':' in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection in TIME_WAIT is no listener
        try:
            probe.bind((address, port))
        except OSError as error:
            return error.errno not in (98, 13)  # EADDRINUSE, EACCES
    return True


class Workspaces:
    """The life of workspaces: each verb changes the record at once and goes on in a job, at most one per workspace."""

    def __init__(self, config, state, events, engine, templates, logs):
        self.config, self.state, self.events, self.engine, self.templates, self.logs = config, state, events, engine, templates, logs
        self.connected = False
        self._jobs = {}  # id -> greenlet of its last job
        self._given_up = {}  # id -> event that is set when the job at work has lost its purpose
        self._credentials = {}  # id -> line for git's credential store, only here and only until the container has it
        self._usage = {}  # id -> its last measurement
        self._meters = {}  # id -> greenlet
        self._loops = []
        self._checks = gevent.pool.Group()
        self._to_check = set()
        self.on_connected = []  # called when the engine answers, after `reconcile`
        self._first_try = True
        self._cpus = None  # how many the engine has

    # Verbs

    def create(self, wish):
        """Reserve a workspace for a checked body of POST /api/workspaces and begin to make it; return its record."""
        template = wish.get('template', self.config.default_template)
        self.templates.tag(template)
        if 'gitBranch' in wish and 'gitUrl' not in wish:
            raise ValidationError('gitBranch: it needs a gitUrl', details=[{'path': 'gitBranch', 'message': 'it needs a gitUrl'}])
        names, ports = self.engine.taken()
        url, credentials = split_credentials(wish.get('gitUrl', ''))
        now, kind = time.time(), wish.get('type', PERSISTENT)
        draft = Workspace(
            id='', name=wish['name'], folder=wish['name'], type=kind, template=template, created_at=now,
            wanted_ports=wish.get('ports', []), ssh=wish.get('ssh', True), git_url=url, git_branch=wish.get('gitBranch', ''),
            has_credentials=bool(credentials), env=wish.get('env', {}), cpus=wish.get('cpus') or 0,
            memory=wish.get('memory') or self.config.workspace_memory, labels=wish.get('labels', {}),
            ssh_public_keys=wish.get('sshPublicKeys', []), ttl=wish.get('ttl', self.config.agent_ttl if kind == AGENT else None),
            ttl_from=now, last_activity_at=now, password=secrets.token_urlsafe(12))
        workspace = self.state.reserve(draft, taken_names=self._names_of(names), taken_ports=ports, is_free=self._is_free, flush=False)
        if credentials:
            self._credentials[workspace.id] = credentials
        self._announce(workspace)
        self._begin(workspace.id, self._bring_up)
        self.state.flush()
        return workspace

    def start(self, id_or_name):
        """Start a stopped workspace, or try again one that failed after it had run; one that runs is left alone."""
        workspace = self._reachable(id_or_name)
        if workspace.status in (RUNNING, CREATING):
            return workspace
        if workspace.status == ERROR and not workspace.born:
            raise WorkspaceNotRunning(f'Workspace {workspace.name} was never made ({workspace.error}). Delete it and create it again.')
        self._refuse_unless(workspace, {STOPPED, ERROR}, 'started')
        return self._set_out(workspace.id, CREATING, self._bring_up, last_activity_at=time.time())

    def stop(self, id_or_name):
        """Stop a running workspace: a temporary one is deleted by that. One that is stopped is left alone."""
        workspace = self._reachable(id_or_name)
        if workspace.status in (STOPPED, STOPPING):
            return workspace
        self._refuse_unless(workspace, {RUNNING, ERROR} if workspace.born else {RUNNING}, 'stopped')
        if workspace.type == TEMPORARY:
            return self.remove(workspace.id)[0]
        return self._set_out(workspace.id, STOPPING, self._bring_down, last_activity_at=time.time())

    def restart(self, id_or_name):
        """Stop a running workspace and start it again, with the same data, ports and container."""
        workspace = self._reachable(id_or_name)
        self._refuse_unless(workspace, {RUNNING}, 'restarted')
        return self._set_out(workspace.id, CREATING, self._bring_down_and_up, last_activity_at=time.time())

    def remove(self, id_or_name, *, wait=0):
        """Delete a workspace with its container and data, whatever it does just now.

        Waits up to `wait` seconds for the end; returns (record, whether it is gone). With the engine away it is deleted later.
        """
        workspace = self.state.get(id_or_name)
        job = self._jobs.get(workspace.id) if workspace.status == DELETING else None
        if job is None:
            workspace = self._set_status(workspace.id, DELETING, flush=False)
            job = self._begin(workspace.id, self._tear_down)
            self.state.flush()
        job.join(wait)
        with contextlib.suppress(WorkspaceNotFound):
            return self.state.get(workspace.id), False
        return workspace, True

    def change(self, id_or_name, wish):
        """Apply a checked body of PATCH /api/workspaces/:id and return the record."""
        workspace = self.state.get(id_or_name)
        if 'name' in wish and wish['name'] != workspace.name:
            self._rename(workspace, wish['name'])
        changes, now = {'last_activity_at': time.time()}, time.time()
        if 'ttl' in wish:
            changes |= {'ttl': wish['ttl'], 'ttl_from': now}
        if 'labels' in wish:
            labels = workspace.labels | wish['labels']
            changes['labels'] = {key: value for key, value in labels.items() if value is not None}
        try:
            return self.state.update(workspace.id, **changes)
        except Superseded:
            raise WorkspaceNotFound('Workspace not found') from None

    def usage(self, workspace_id):
        """Return the last measurement of a workspace, {cpuPercent, memoryUsage, memoryLimit}, or None; never waits."""
        return self._usage.get(workspace_id)

    def touch(self, workspace_id):
        """Note that a workspace is being used."""
        with contextlib.suppress(Superseded):
            self.state.update(workspace_id, flush=False, last_activity_at=time.time())

    # Jobs

    def _reachable(self, id_or_name):
        """Return the record once the engine has answered: so no other call comes between looking at it and changing it."""
        self.state.get(id_or_name)
        self.engine.ping()
        return self.state.get(id_or_name)

    def _set_out(self, workspace_id, status, steps, **changes):
        """Change the status and begin its job with nothing in between: a record without a job passes for one left half-done."""
        workspace = self._set_status(workspace_id, status, flush=False, error='', **changes)
        self._begin(workspace_id, steps)
        self.state.flush()
        return workspace

    def _begin(self, workspace_id, steps):
        """Run `steps(id)` after the job that is still at work on the workspace, which is told to give up."""
        before = self._jobs.get(workspace_id)
        if workspace_id in self._given_up:
            self._given_up[workspace_id].set()
        given_up = self._given_up[workspace_id] = gevent.event.Event()
        job = self._jobs[workspace_id] = gevent.spawn(self._job, workspace_id, steps, before, given_up)
        return job

    def _job(self, workspace_id, steps, before, given_up):
        if before is not None:
            before.join()
        try:
            self.state.flush()  # nothing is done that a crash could make forget
            if not given_up.is_set():
                steps(workspace_id, given_up)
        except Superseded:
            log.debug('A job on %s was overtaken.', workspace_id)
        except BackendError as error:
            if isinstance(error, EngineUnavailable) or (isinstance(error, DockerError) and self.engine.is_leaving()):
                # The status stays as it is; once the engine is back, `reconcile` goes on from there.
                log.warning('Workspace %s waits for the engine: %s', workspace_id, error)
            else:
                self._fail(workspace_id, str(error), error.code, given_up)
        except Exception:
            log.exception('A job on workspace %s failed.', workspace_id)
            self._fail(workspace_id, 'Internal error; the log of the server has the traceback.', BackendError.code, given_up)
        finally:
            if self._jobs.get(workspace_id) is gevent.getcurrent():
                del self._jobs[workspace_id]
                self._given_up.pop(workspace_id, None)

    def _bring_up(self, workspace_id, given_up):
        """Make what is missing, start it, and wait until it answers. Goes on from wherever an earlier try ended."""
        workspace = self._still(workspace_id, CREATING, given_up)
        container = self.engine.find(workspace_id)
        if container is not None and not container.started:
            # A crash may have come before its files were in it.
            self.engine.remove_container(container.id)
            container = None
        if container is None:
            image = self.templates.image(workspace.template, lambda line: self._build_output(workspace_id, line), given_up)
            container_id = self._make_container(self._still(workspace_id, CREATING, given_up), image, given_up)
        else:
            container_id = container.id
            self.engine.start(container_id)
        self.state.update(workspace_id, when={CREATING}, container_id=container_id)
        self._wait_until_ready(workspace_id, container_id, given_up)
        if workspace.type == PERSISTENT:
            # Only now: until then a crash is an answer, not something to repeat.
            self.engine.keep_running(container_id)
        self._credentials.pop(workspace_id, None)
        self._set_status(workspace_id, RUNNING, when={CREATING}, born=True, has_credentials=False, error='', last_activity_at=time.time())
        self._meter(workspace_id, container_id)

    def _make_container(self, workspace, image, given_up):
        """Create the volume and a started container, on other ports if those reserved turn out to be taken."""
        if workspace.has_credentials and workspace.id not in self._credentials:
            raise BackendError('The server ended before the clone began, and it does not keep credentials. Delete the workspace and create it again.')
        if workspace.born and workspace.id not in self.engine.volumes():
            raise DockerError('Its volume was removed by someone else, and its files with it. Delete it.')
        self.engine.create_volume(self._engine_name(workspace.id), self._volume_labels(workspace))
        avoid = set()
        for attempt in range(1, PORT_ATTEMPTS + 1):
            container_id = self._create_container(workspace, image)
            now = self._still(workspace.id, CREATING, given_up)
            if now.name != workspace.name:  # by a PATCH that found no container yet
                self.engine.rename(container_id, self._engine_name(now.name))
                workspace = now
            try:
                self.engine.start(container_id)
                return container_id
            except PortTaken as error:
                log.info('Workspace %s: %s', workspace.id, error)
                self.engine.remove_container(container_id)
                if attempt == PORT_ATTEMPTS:
                    raise
                avoid |= ({error.port} if error.port else set(workspace.ports.values())) | self.engine.taken()[1]
                workspace = self.state.claim_ports(workspace.id, avoid=avoid, is_free=self._is_free)

    def _create_container(self, workspace, image):
        inside = {'codeServer': CODE_SERVER_PORT, 'ssh': SSH_PORT}
        container_id = self.engine.create_container(
            self._engine_name(workspace.name), image, env=self._environment(workspace),
            labels=self._volume_labels(workspace) | {f'{PREFIX}.ports': json.dumps(workspace.ports)},
            volume=self._engine_name(workspace.id), mount=self.config.workspace_base_path,
            ports={inside.get(key) or int(key): port for key, port in workspace.ports.items()},
            bind_address=self.config.workspace_bind_address, memory=workspace.memory, cpus=workspace.cpus or self._default_cpus(),
            pids=self.config.workspace_pids, new_privileges=workspace.type != AGENT)
        keys = [key.strip() for key in self._shared_keys() + workspace.ssh_public_keys if key.strip()]
        files = {'password': (f'{workspace.password}\n'.encode(), 0o600),
                 'authorized_keys': (''.join(f'{key}\n' for key in keys).encode(), 0o644)}
        if workspace.id in self._credentials:
            files['git-credentials'] = (self._credentials[workspace.id].encode(), 0o600)
        self.engine.put_files(container_id, {f'{SETTINGS_FOLDER}/{name}': content for name, content in files.items()})
        return container_id

    def _wait_until_ready(self, workspace_id, container_id, given_up):
        """Wait until what the user will use answers; raise DockerError when the container ends first, or never answers."""
        deadline = time.monotonic() + self.config.ready_timeout
        while True:
            workspace = self._still(workspace_id, CREATING, given_up)
            container = self.engine.inspect(container_id)
            if container is None:
                raise DockerError('The container was removed by someone else while it started.')
            if container.state not in ('running', 'paused'):
                raise DockerError(self._why_it_ended(container))
            if self._health(workspace, container_id) is not None and self._ssh_answers(workspace, container_id):
                return
            if time.monotonic() > deadline:
                raise DockerError(f'The workspace did not answer within READY_TIMEOUT={self.config.ready_timeout} s. It printed last: '
                                  + self._last_words(container))
            given_up.wait(0.1)

    def _bring_down(self, workspace_id, given_up):
        """Stop the container and keep everything."""
        self._still(workspace_id, STOPPING, given_up)
        container = self.engine.find(workspace_id)
        if container is not None:
            self.engine.stop(container.id, self.config.stop_timeout)
        self._no_meter(workspace_id)
        self._set_status(workspace_id, STOPPED, when={STOPPING}, error='')

    def _bring_down_and_up(self, workspace_id, given_up):
        self._still(workspace_id, CREATING, given_up)
        container = self.engine.find(workspace_id)
        if container is not None:
            self.engine.stop(container.id, self.config.stop_timeout)
        self._bring_up(workspace_id, given_up)

    def _tear_down(self, workspace_id, given_up):
        """Remove everything of a workspace from the engine, and then its record: so a crash in between loses no trace of it."""
        self._still(workspace_id, DELETING, given_up)
        self._no_meter(workspace_id)
        self.engine.remove(workspace_id)
        self._forget(workspace_id)

    def _forget(self, workspace_id):
        self._credentials.pop(workspace_id, None)
        self.state.remove(workspace_id)
        self.events.publish('status', workspace_id, DELETED)
        self.events.forget(workspace_id)

    def _fail(self, workspace_id, text, code, given_up):
        """Leave `error` with the reason, unless it has been given another fate. What never ran is removed and its ports given back; what did keeps its data."""
        with contextlib.suppress(WorkspaceNotFound, Superseded):
            workspace = self.state.get(workspace_id)
            log.warning('Workspace %s (%s): %s', workspace_id, workspace.name, text)
            changes = {'error': text}
            if workspace.status == CREATING and not workspace.born:
                with contextlib.suppress(DockerError):  # if it stays, `reconcile` removes it
                    self.engine.remove(workspace_id)
                self._credentials.pop(workspace_id, None)
                changes |= {'ports': {}, 'container_id': ''}
            if given_up.is_set():
                raise Superseded(workspace_id)
            self._set_status(workspace_id, ERROR, when={workspace.status}, **changes)
            self.events.publish('error', workspace_id, {'code': code, 'message': text})

    def _still(self, workspace_id, status, given_up):
        """Return the record if the job still has its purpose; else raise Superseded."""
        if given_up.is_set():
            raise Superseded(workspace_id)
        return self.state.update(workspace_id, when={status}, flush=False)

    def _set_status(self, workspace_id, status, *, when=None, flush=True, **changes):
        try:
            workspace = self.state.update(workspace_id, when=when, flush=flush, status=status, **changes)
        except Superseded:
            if when is None:
                raise WorkspaceNotFound('Workspace not found') from None
            raise
        self._announce(workspace)
        return workspace

    def _announce(self, workspace):
        log.info('Workspace %s (%s) is %s.', workspace.id, workspace.name, workspace.status)
        self.events.publish('status', workspace.id, {'status': workspace.status, 'name': workspace.name,
                                                     **({'error': workspace.error} if workspace.error else {})})

    @staticmethod
    def _refuse_unless(workspace, statuses, done):
        if workspace.status not in statuses:
            raise WorkspaceNotRunning(f'Workspace {workspace.name} is {workspace.status} and cannot be {done} now; '
                                      f"it can be when it is {' or '.join(sorted(statuses))}.")

    def _rename(self, workspace, name):
        self.state.rename(workspace.id, name, taken_names=self._names_of(self.engine.taken()[0]))
        try:
            container = self.engine.find(workspace.id)
            if container is not None:
                self.engine.rename(container.id, self._engine_name(name))
        except ConflictOnEngine as error:
            self.state.rename(workspace.id, workspace.name)
            raise WorkspaceAlreadyExists(str(error)) from error
        except DockerError:
            self.state.rename(workspace.id, workspace.name)
            raise

    # What a container is made of

    def _engine_name(self, name):
        return f'{self.config.instance}-{name}'

    def _names_of(self, engine_names):
        prefix = self._engine_name('')
        return {name[len(prefix):] for name in engine_names if name.startswith(prefix)}

    def _is_free(self, port):
        return is_bindable(self.config.workspace_bind_address, port)

    def _default_cpus(self):
        if self._cpus is None:
            self._cpus = self.engine.info()['cpus']
        return min(self.config.workspace_cpus, self._cpus)

    def _shared_keys(self):
        path = self.config.ssh_authorized_keys
        return Path(path).read_text().splitlines() if path else []

    def _environment(self, workspace):
        base = self.config.workspace_base_path
        return workspace.env | {
            'WORKSPACE_ID': workspace.id, 'WORKSPACE_NAME': workspace.folder, 'WORKSPACE_TYPE': workspace.type,
            'WORKSPACE_BASE_PATH': base, 'PROJECT_DIR': f'{base}/{workspace.folder}', 'GIT_URL': workspace.git_url,
            'GIT_BRANCH': workspace.git_branch, 'SSH_ENABLED': '1' if workspace.ssh else '0'}

    def _volume_labels(self, workspace):
        """Return what is known of a workspace when the state file is lost; no environment, no keys, no password."""
        spec = {'folder': workspace.folder, 'ssh': workspace.ssh, 'ttl': workspace.ttl, 'labels': workspace.labels,
                'wanted_ports': workspace.wanted_ports}
        values = {'id': workspace.id, 'instance': self.config.instance, 'name': workspace.name, 'type': workspace.type,
                  'template': workspace.template, 'createdAt': repr(workspace.created_at), 'ports': json.dumps(workspace.ports),
                  'gitUrl': workspace.git_url, 'gitBranch': workspace.git_branch, 'spec': json.dumps(spec)}
        return {f'{PREFIX}.{key}': value for key, value in values.items()}

    def _build_output(self, workspace_id, line):
        self.events.publish('log', workspace_id, {'stream': 'build', 'message': line})

    # Readiness and health

    def _address(self):
        """Return where published ports are reached from here."""
        return {'0.0.0.0': '127.0.0.1', '::': '::1'}.get(self.config.workspace_bind_address, self.config.workspace_bind_address)

    def _health(self, workspace, container_id):
        """Return the body of code-server's /healthz, or None when it does not answer."""
        if self.config.workspace_host:
            return self._ask_inside(container_id, ['curl', '--noproxy', '*', '-fsS', '-m', '2', f'http://127.0.0.1:{CODE_SERVER_PORT}/healthz'])
        connection = http.client.HTTPConnection(self._address(), workspace.ports['codeServer'], timeout=2)
        try:
            # Whatever runs in there may answer in its place, and a byte at a time at that.
            with gevent.Timeout(PROBE_PATIENCE, TimeoutError()):
                connection.request('GET', '/healthz')
                answer = connection.getresponse()
                return answer.read(10_000) if answer.status == 200 else None
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def _ask_inside(self, container_id, command):
        """Return what a command in a container prints, or None when it fails, or the container is paused or ends meanwhile."""
        with contextlib.suppress(MissingOnEngine, ConflictOnEngine):
            code, printed = self.engine.run(container_id, command)
            return printed if code == 0 else None

    def _ssh_answers(self, workspace, container_id):
        if not workspace.ssh:
            return True
        if self.config.workspace_host:
            command = f'exec 3<>/dev/tcp/127.0.0.1/{SSH_PORT} && read -t 2 -r -n 4 banner <&3 && [ "$banner" = SSH- ]'
            return self._ask_inside(container_id, ['bash', '-c', command]) is not None
        try:
            with socket.create_connection((self._address(), workspace.ports['ssh']), timeout=2) as connection:
                return connection.recv(4) == b'SSH-'
        except OSError:
            return False

    def _why_it_ended(self, container):
        if container.out_of_memory:
            return f'The container ran out of its {container.memory} bytes of memory. Give it more, or ask less of it.'
        words = self._last_words(container)
        if container.exit_code == EXIT_CLONE_FAILED:
            return f'The clone failed: {words}'
        return f'The container ended with exit code {container.exit_code}. It printed last: {words}'

    def _last_words(self, container):
        try:
            lines = [line.strip() for line in self.engine.output(container.id, LAST_WORDS).splitlines() if line.strip()]
        except (MissingOnEngine, ConflictOnEngine):  # somebody removes it just now
            lines = []
        return '\n'.join(lines) or '(nothing)'

    def _meter(self, workspace_id, container_id):
        """Measure a container from now on: a stream per running one costs the engine about 0.1 % of a core."""
        self._no_meter(workspace_id)
        self._meters[workspace_id] = gevent.spawn(self._measure, workspace_id, container_id)

    def _measure(self, workspace_id, container_id):
        try:
            for usage in self.engine.usage(container_id):
                self._usage[workspace_id] = usage
        except DockerError as error:
            log.debug('Workspace %s is not measured any more: %s', workspace_id, error)
        finally:
            if self._meters.get(workspace_id) is gevent.getcurrent():
                del self._meters[workspace_id]
                self._usage.pop(workspace_id, None)

    def _no_meter(self, workspace_id):
        meter = self._meters.pop(workspace_id, None)
        if meter is not None:
            self._usage.pop(workspace_id, None)
            meter.kill(block=False)

    # Keeping up with the engine and the clock

    def open(self):
        """Begin to follow the engine and to sweep."""
        self._loops = [gevent.spawn(self._follow_engine), gevent.spawn(self._sweep_for_ever)]

    def close(self):
        """End everything that goes on; the next `open` goes on from there."""
        gevent.killall([*self._loops, *self._jobs.values(), *self._meters.values(), *self._checks], timeout=10)
        self.templates.stop()
        self.logs.close()

    def _follow_engine(self):
        while True:
            try:
                self._follow_once()
            except EngineUnavailable as error:
                log.log(logging.WARNING if self.connected or self._first_try else logging.DEBUG, '%s', error)
            except Exception:
                log.exception('Following the engine failed; trying again.')
            self.connected = self._first_try = False
            gevent.sleep(1)

    def _follow_once(self):
        info = self.engine.info()
        self._cpus = info['cpus']
        self.connected = True
        log.info('The Docker engine answers: %d cores, %.1f GB.', info['cpus'], info['memory'] / 1e9)
        self.templates.look()
        self.reconcile()
        for listener in self.on_connected:
            self._checks.start(gevent.Greenlet(listener))
        for name in self.config.prebuild:
            self._checks.start(gevent.Greenlet(self._prebuild, name))
        # From the time before the list on, so that nothing in between is missed; what comes twice does no harm.
        for workspace_id in self.engine.changes(info['time']):
            self._look_at(workspace_id)

    def _prebuild(self, name):
        try:
            self.templates.image(name, lambda line: None, gevent.event.Event())
        except BackendError as error:
            log.error('Template %s was not built: %s', name, error)

    def reconcile(self):
        """Compare the records with what the engine has: adopt what is unknown, go on with what was left half-done."""
        before, busy = {workspace.id for workspace in self.state.all()}, set(self._jobs)
        containers, volumes = self.engine.containers(), self.engine.volumes()
        known = before | {workspace.id for workspace in self.state.all()}
        for workspace_id in (containers.keys() | volumes.keys()) - known:
            self._adopt(workspace_id, containers.get(workspace_id), volumes.get(workspace_id))
        for workspace in self.state.all():
            # Of one that was made or worked on meanwhile the lists tell an old state.
            if workspace.id not in (known - before) | busy | self._jobs.keys():
                self._resume(workspace, containers.get(workspace.id), workspace.id in volumes)

    def _adopt(self, workspace_id, container, labels):
        """Make a record of what the engine's labels tell, when the state file does not know of it."""
        labels = container.labels if container else labels
        value = {key.removeprefix(f'{PREFIX}.'): text for key, text in labels.items() if key.startswith(f'{PREFIX}.')}
        if container is None and value['type'] == TEMPORARY:
            log.info('Removing the volume of temporary workspace %s, whose container is gone.', workspace_id)
            self.engine.remove(workspace_id)
            return
        spec, now = json.loads(value['spec']), time.time()
        password = self.engine.get_file(container.id, f'{SETTINGS_FOLDER}/password') if container else None
        reserved = self._environment(Workspace(id='', name='', folder='', type='', template='', created_at=0))
        env = {key: text for key, text in (self.engine.own_env(container) if container else {}).items() if key not in reserved}
        self.state.adopt(Workspace(
            id=workspace_id, name=container.name.removeprefix(self._engine_name('')) if container else value['name'],
            type=value['type'], template=value['template'], created_at=float(value['createdAt']), ports=json.loads(value['ports']),
            git_url=value['gitUrl'], git_branch=value['gitBranch'], env=env, cpus=container.cpus if container else 0,
            memory=container.memory if container else self.config.workspace_memory,
            ttl_from=now, last_activity_at=now, password=(password or b'').decode().strip() or secrets.token_urlsafe(12),
            container_id=container.id if container else '', born=True, status=RUNNING if container else STOPPED, **spec))
        log.info('Adopted workspace %s (%s) from the engine.', workspace_id, value['name'])

    def _resume(self, workspace, container, has_volume):
        """Go on with a workspace on which no job is at work."""
        steps = {CREATING: self._bring_up, STOPPING: self._bring_down, DELETING: self._tear_down}.get(workspace.status)
        if steps:
            log.info('Going on with workspace %s, which is %s.', workspace.id, workspace.status)
            self._begin(workspace.id, steps)
        elif workspace.status == ERROR and not workspace.born:
            if container or has_volume:
                self.engine.remove(workspace.id)
        else:
            self._compare(workspace, container, has_volume)

    def _look_at(self, workspace_id):
        """See to a workspace whose container changed, once the job at work on it is done."""
        self.logs.changed(workspace_id)
        if workspace_id and workspace_id not in self._to_check:
            self._to_check.add(workspace_id)
            self._checks.start(gevent.Greenlet(self._check, workspace_id))

    def _check(self, workspace_id):
        job = self._jobs.get(workspace_id)
        if job is not None:
            job.join()
        self._to_check.discard(workspace_id)
        with contextlib.suppress(WorkspaceNotFound, EngineUnavailable, Superseded):
            workspace = self.state.get(workspace_id)
            container = self.engine.find(workspace_id)
            if workspace.type == TEMPORARY and not (container and container.up) and workspace.status == RUNNING:
                gevent.sleep(GRACE)
                container = self.engine.find(workspace_id)
            workspace = self.state.get(workspace_id)
            if workspace_id not in self._jobs and workspace.status in SETTLED:
                self._compare(workspace, container, container is not None or workspace_id in self.engine.volumes())

    def _compare(self, workspace, container, has_volume):
        """Bring a settled record in line with the engine."""
        if container is not None and container.state in ('removing', 'dead'):
            container = None  # as good as gone: somebody removes it just now
        if container is not None and container.up:
            if workspace.status == RUNNING:
                if workspace.container_id != container.id or workspace.id not in self._meters:
                    self.state.update(workspace.id, flush=False, container_id=container.id)
                    self._meter(workspace.id, container.id)
            elif workspace.born:
                self._set_out(workspace.id, CREATING, self._bring_up)
            return
        if workspace.status == RUNNING and workspace.type == TEMPORARY:
            self.remove(workspace.id)
        elif container is None and not has_volume and workspace.born and workspace.status != ERROR:
            self._gone(workspace, ERROR, 'Its container and its volume were removed by someone else, and its files with them. Delete it.')
        elif workspace.status == RUNNING and container is None:
            self._gone(workspace, STOPPED, 'Its container was removed by someone else. Its files are there; start makes a new container.')
        elif workspace.status == RUNNING:
            quiet = container.exit_code in (0, 143) and not container.out_of_memory  # 143: somebody's `docker stop`
            self._gone(workspace, STOPPED, '' if quiet else self._why_it_ended(container))

    def _gone(self, workspace, status, reason):
        self._no_meter(workspace.id)
        self._set_status(workspace.id, status, when=SETTLED, error=reason)
        if reason:
            self.events.publish('error', workspace.id, {'code': DockerError.code, 'message': reason})

    def _sweep_for_ever(self):
        while True:
            gevent.sleep(SWEEP_PAUSE)
            try:
                self.sweep(time.time())
            except Exception:
                log.exception('A sweep failed; the next one comes.')

    def sweep(self, now):
        """Do one turn: delete what has expired, and go on with what waited for the engine."""
        if not self.connected:
            return
        for workspace in self.state.all():
            if workspace.type == AGENT and workspace.status == RUNNING and workspace.expires_at is not None and workspace.expires_at <= now:
                self._note_editor(workspace)
        for workspace_id in self.state.expire(now):
            log.info('Workspace %s has expired.', workspace_id)
            self._announce(self.state.get(workspace_id))
            self._begin(workspace_id, self._tear_down)
        for workspace in self.state.all():
            if workspace.status not in SETTLED and workspace.id not in self._jobs:
                self._resume(workspace, None, False)

    def _note_editor(self, workspace):
        """Count an open editor as activity: code-server notes its heartbeat, in milliseconds since the epoch."""
        # Whatever runs in there may answer in its place.
        with contextlib.suppress(ValueError, TypeError, KeyError, ArithmeticError, RecursionError, Superseded, DockerError):
            beat, now = json.loads(self._health(workspace, workspace.container_id))['lastHeartbeat'] / 1000, time.time()
            if workspace.last_activity_at < beat < now + CLOCK_SKEW:
                self.state.update(workspace.id, flush=False, last_activity_at=min(beat, now))


# ---------------------------------------------------------------------------------------------
# Agents
# ---------------------------------------------------------------------------------------------

CANCEL_PATIENCE = 5  # seconds an interrupted agent has for its last record
BACKLOG_PATIENCE = 10  # seconds for which what it printed is told after it was interrupted
LINGER_PATIENCE = 5  # seconds an agent may live on after that record
WATCH_PAUSE = 0.25  # seconds
ACTIVITY_PAUSE = 10  # seconds between notes that a running task keeps its workspace alive
FOLLOW_MARK = b'\x06'  # is printed first: an engine that could not run the command says so in its place, on stdout too
# Prints what the run has written from a byte on, as it comes; ends with the run, and then prints its status on stderr. The reader
# is known to be gone when stdin ends, so that a server that was killed leaves no `tail` behind.
FOLLOW = '''
exec 4>&2 2>/dev/null; printf '\\006'
n=0; while [ ! -e "$1/pid" ] && [ ! -e "$1/exit" ] && [ $n -lt 200 ]; do sleep 0.05; n=$((n+1)); done
if [ -e "$1/exit" ]; then tail -c "+$2" "$1/out"; else
  exec 3<&0
  tail -c "+$2" -f -s 0.1 --pid="$(cat "$1/pid")" "$1/out" & t=$!
  { read -r _ <&3; kill "$t"; } & w=$!
  wait "$t" || true; kill "$w"
fi
n=0; while [ ! -e "$1/exit" ] && [ $n -lt 100 ]; do sleep 0.05; n=$((n+1)); done
[ -e "$1/exit" ] || kill -0 "$(cat "$1/pid")" || echo 137 >"$1/exit" || echo 137 >&4
[ ! -e "$1/exit" ] || head -c 100 "$1/exit" >&4
'''
# The task comes in the environment, in parts: an argument would show in the engine's events, and the kernel limits one string.
PREPARE = '''
command -v agent-run >/dev/null || { echo "agent-run"; exit 127; }
command -v "$2" >/dev/null || { echo "$2"; exit 127; }
umask 077; mkdir -p "$1" && printf %s "$TASK_0$TASK_1$TASK_2$TASK_3$TASK_4$TASK_5$TASK_6$TASK_7" >"$1/task"
'''
TASK_PART = 100_000 // 8 + 1  # characters, of at most four bytes each
INTERRUPTED_ERROR = {'code': 'AGENT_INTERRUPTED', 'message': 'The workspace was stopped or deleted while the task ran.'}
INTERRUPTED = {'ok': False, **INTERRUPTED_ERROR}


@dataclass(frozen=True)
class Agent:
    """An agent is data: a command, its environment, and what translates its lines."""

    name: str
    command: tuple
    lines: object
    env: dict = field(default_factory=dict)


class Follower:
    """A run that is going on, as this process follows it."""

    def __init__(self, session, run, reader, *, fresh):
        self.session, self.run, self.reader = session, run, reader
        self.caught_up = gevent.event.Event()  # what an earlier process may have told is in the ring; of a fresh one none has told anything
        if fresh:
            self.caught_up.set()
        self.attached = False  # it is read where it is written, so that it is known whether it has ended
        self.heard_at = time.monotonic()
        self.stopped_at = None  # when it was first told to end
        self.greenlet = self.watchdog = None


class Agents:
    """Agents at work in workspaces. One greenlet follows each run by the file that it writes; the run itself needs nobody."""

    def __init__(self, config, state, events, engine):
        self.config, self.state, self.events, self.engine = config, state, events, engine
        self._followers = {}  # session id -> Follower
        self._launching = set()  # ids of runs that are being begun by this process
        self.published = {}  # session id -> place of the last event that this process has published
        self.resumed = gevent.event.Event()  # set when the runs of an earlier process have been taken up
        common = config.agent_keys() | {'HOME': f'/home/{USER}', 'CLAUDE_CONFIG_DIR': self._folder('claude')}
        claude = {'CLAUDE_CODE_ENABLE_TODO_TOOLS': '1', 'CLAUDE_CODE_ENABLE_TASKS': '0', 'CLAUDE_CODE_MAX_RETRIES': '4',
                  'CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC': '1', 'DISABLE_AUTOUPDATER': '1'}
        self.agents = {'claude': Agent('claude', ('claude',), ClaudeLines, common | claude)}
        if config.agent_command:
            self.agents['command'] = Agent('command', config.agent_command, CommandLines, common)

    # Verbs

    def execute(self, wish):
        """Begin a task for a checked body of POST /api/agent/execute; return (session, its new run). The task has begun then."""
        workspace = self.state.get(wish['workspaceId'])
        if workspace.status != RUNNING:
            raise WorkspaceNotRunning(f'Workspace {workspace.name} is {workspace.status}; start it, and wait until it is running.')
        session = self._session_for(wish, workspace)
        agent = self._agent(wish.get('agent') or session.agent)
        container = self.engine.find(workspace.id)
        if container is None or not container.up:
            raise WorkspaceNotRunning(f'The container of workspace {workspace.name} does not run.')
        run = Run(number=len(session.runs) + 1, id='run-' + secrets.token_hex(8), task=shorten(wish['task'], 1000), started_at=time.time(),
                  timeout=min(wish.get('timeout') or self.config.agent_timeout, self.config.agent_timeout), boot=container.started_at)
        self._launching.add(run.id)
        try:
            session = self.state.begin_run(session, run, limit=self.config.agent_max_tasks)
            run = session.runs[-1]
            # No event may come in between: its id would tell that the run was over before it.
            self.events.mark(workspace.id, session.id, event_id_of((run.number - 1, LAST_LINE, 0)))
            self.state.flush()
            self._launch(workspace, container, session, run, agent, wish)
            return session, run
        finally:
            self._launching.discard(run.id)

    def cancel(self, session_id):
        """Interrupt the run of a session. It ends with an error event, within seconds."""
        session = self.state.session(session_id)
        run = session.runs[-1]
        if run.state == RUNNING and not run.stop:
            self.state.update_run(session_id, run.number, stop=['AGENT_CANCELLED', 'The task was cancelled.'])
        return self.state.session(session_id)

    def remove(self, session_id):
        """Forget a session and delete its transcript; raise SessionBusy while it runs."""
        session = self.state.remove_session(session_id)
        self.events.forget(session_id)
        self.published.pop(session_id, None)
        container = self.engine.find(session.workspace_id)
        if container is not None and container.up:
            self.engine.run(container.id, ['rm', '-rf', *[self._run_folder(run) for run in session.runs]], user=USER)

    def resume(self):
        """Take up the runs that an earlier process has begun; called when the engine answers."""
        for session in self.state.sessions():
            run = session.runs[-1]
            if run.state == RUNNING and session.id not in self._followers and run.id not in self._launching:
                self._follow(session, run, fresh=False)
        self.resumed.set()

    def close(self):
        """End all followers; the runs go on."""
        greenlets = [greenlet for follower in self._followers.values() for greenlet in (follower.greenlet, follower.watchdog)]
        gevent.killall(greenlets, timeout=5)
        self._followers.clear()

    def open(self):
        """Note which runs an earlier process has begun."""
        for session in self.state.sessions():
            if session.runs[-1].state == RUNNING:
                self.events.mark(session.workspace_id, session.id, event_id_of((session.runs[-1].number - 1, LAST_LINE, 0)))

    def wait_until_told(self, topic, *, timeout):
        """Wait until what earlier processes may have told of a workspace or session is published here; tell whether it is."""
        if not self.resumed.wait(timeout):
            return False
        behind = [item.caught_up for item in self._followers.values() if topic in (item.session.id, item.session.workspace_id)]
        return len(gevent.wait(behind, timeout)) == len(behind)

    def place_in(self, session_id, after):
        """Return a place from which a session is to be told on; one beyond its runs is of another session that had the same id."""
        with contextlib.suppress(SessionNotFound):
            if after[0] <= len(self.state.session(session_id).runs):
                return after
        return BEGINNING

    def knows(self, session, run):
        """Tell whether a run was not deleted meanwhile."""
        with contextlib.suppress(SessionNotFound, IndexError):
            return self.state.session(session.id).runs[run.number - 1].id == run.id
        return False

    def replay(self, session, after=BEGINNING):
        """Yield lists of (place, event) of a session after a place, made anew from what its runs have written; empty ones too, on the way there."""
        for run in session.runs:
            if (run.number, LAST_LINE, 0) <= after:
                continue
            for batch in politely(self._events_of(session, run, skip=after[1] - 1 if after[0] == run.number else 0)):
                yield [(place, Event(kind, session.workspace_id, event_id_of(place), parse_time(stamp) if stamp else run.ended_at or run.started_at,
                                     self.events.strike(data), session.id)) for place, kind, data, stamp in batch if place > after]

    # Runs

    def _session_for(self, wish, workspace):
        session_id = wish.get('sessionId') or 'session-' + secrets.token_hex(6)
        try:
            session = self.state.session(session_id)
        except SessionNotFound:
            return Session(id=session_id, workspace_id=workspace.id, agent=self._agent(wish.get('agent') or self.config.default_agent).name,
                           created_at=time.time())
        if session.workspace_id != workspace.id:
            raise ValidationError(f'sessionId: session {session_id} belongs to another workspace, {session.workspace_id}; choose another id')
        if wish.get('agent', session.agent) != session.agent:
            raise ValidationError(f'agent: session {session_id} belongs to agent {session.agent}; choose another session')
        return session

    def _agent(self, name):
        if name not in self.agents:
            hint = '; set AGENT_COMMAND for it' if name == 'command' else ''
            raise ValidationError(f"agent: there is no agent {name[:80]!r}{hint}; known are {', '.join(self.agents)}")
        return self.agents[name]

    def _folder(self, name):
        return f'{self.config.workspace_base_path}/.agentbackend/{name}'

    def _run_folder(self, run):
        return self._folder(f'runs/{run.id}')

    def _launch(self, workspace, container, session, run, agent, wish):
        """Write the task, start the agent, detached from everybody, and follow it."""
        command = ['agent-run', self._run_folder(run), *self._command(session, agent, wish)]
        try:
            self._prepare(container, run, agent, wish)
            try:
                self.engine.run_detached(container.id, command, user=USER, env=agent.env | {'AGENT_RUN_ID': run.id},
                                         workdir=f'{self.config.workspace_base_path}/{workspace.folder}')
            except EngineUnavailable as error:
                log.warning('Whether run %s has begun is seen when the engine is back: %s', run.id, error)
        except BaseException as error:
            self._end(session, run, {'ok': False, 'code': getattr(error, 'code', BackendError.code), 'message': str(error)}, None)
            raise
        self._follow(session, run, fresh=True)

    def _prepare(self, container, run, agent, wish):
        parts = {f'TASK_{number}': wish['task'][number * TASK_PART:(number + 1) * TASK_PART] for number in range(8)}
        code, missing = self.engine.run(container.id, ['sh', '-c', PREPARE, 'sh', self._run_folder(run), agent.command[0]], user=USER, env=parts)
        if code == 127:
            raise ValidationError(f'agent: the image of this workspace has no {missing.decode().strip()!r}, which agent {agent.name} needs')
        if code != 0:
            raise DockerError(f'The run could not be prepared in the workspace: {missing.decode().strip()[-500:]}')

    @staticmethod
    def _command(session, agent, wish):
        if agent.name != 'claude':
            return agent.command
        command = [*agent.command, '-p', '--output-format', 'stream-json', '--verbose', '--dangerously-skip-permissions',
                   '--resume' if session.conversed else '--session-id', session.agent_session_id]
        for option, key in (('--max-turns', 'maxTurns'), ('--max-budget-usd', 'maxBudgetUsd'), ('--model', 'model')):
            command += [option, str(wish[key])] if key in wish else []
        return command

    def _follow(self, session, run, *, fresh):
        follower = Follower(session, run, self._reader(session, run), fresh=fresh)
        self._followers[session.id] = follower
        follower.greenlet = gevent.spawn(self._follow_to_the_end, follower)
        follower.watchdog = gevent.spawn(self._watch, follower)

    def _reader(self, session, run, *, skip=0):
        """Return what makes events of a run, also of an agent that is not configured any more."""
        lines = self.agents[session.agent].lines() if session.agent in self.agents else CommandLines()
        return RunReader(run.number, lines, self.events.strike, skip=skip)

    def _follow_to_the_end(self, follower):
        """Publish the events of a run until it has ended, whatever happens to the engine meanwhile."""
        session, run = follower.session, follower.run
        try:
            self._publish(follower, [self._first_event(session, run)])
            outcome = None
            while outcome is None:
                try:
                    outcome = self._follow_once(follower)
                except DockerError as error:  # it is away, or refuses because the container is about to end
                    log.debug('Run %s waits for the engine: %s', run.id, error)
                    follower.heard_at = time.monotonic()  # this silence is not the agent's
                if outcome is None:
                    gevent.sleep(0.2)
            self._end(session, run, outcome, follower)
        except Exception as error:
            self._end(session, run, {'ok': False, 'code': BackendError.code, 'message': str(internal_error(error))}, follower)
        finally:
            follower.caught_up.set()
            if self._followers.get(session.id) is follower:
                del self._followers[session.id]
            follower.watchdog.kill(block=False)

    def _follow_once(self, follower):
        """Read what the run has written, and what it writes; return its outcome, or None to come again."""
        run, reader = follower.run, follower.reader
        container = self.engine.find(follower.session.workspace_id)
        alive = container is not None and container.up and container.started_at == run.boot
        if not alive or not follower.caught_up.is_set():
            self._read_file(follower, container, ended=not alive)
            follower.caught_up.set()
        if not alive:
            status = self.engine.get_file(container.id, f'{self._run_folder(run)}/exit') if container else None
            if status is not None and status.strip().isdigit():
                reader.lines.end(int(status))  # it had ended before its container did
            return reader.lines.outcome or INTERRUPTED
        status, begun = b'', False
        for stream, data in politely(self.engine.follow(container.id, ['sh', '-c', FOLLOW, 'sh', self._run_folder(run), str(reader.offset + 1)], user=USER)):
            if stream == STDERR:
                status = (status + data)[:100]
            elif not begun and data[:1] != FOLLOW_MARK:
                log.debug('Run %s is not followed yet: %s', run.id, data)
                return None
            else:
                data, begun = data if begun else data[1:], True
                follower.attached = True
                follower.heard_at = time.monotonic() if data else follower.heard_at
                self._publish(follower, reader.take(data))
                if reader.offset > self.config.agent_max_output:
                    return {'ok': False, 'code': 'AGENT_MAX_OUTPUT',
                            'message': f'The agent printed more than AGENT_MAX_OUTPUT={self.config.agent_max_output} bytes, and was ended.'}
                if follower.stopped_at is not None and time.monotonic() - follower.stopped_at > BACKLOG_PATIENCE:
                    return INTERRUPTED  # it had printed faster than that can be told
        if not status.strip().isdigit():
            return None
        if reader.lines.outcome is None and int(status) > 128 and not run.stop and self._is_going(container):
            return None  # it was ended along with its workspace
        self._publish(follower, reader.take(b'', ended=True))
        reader.lines.end(int(status))
        return reader.lines.outcome or self._silent_end(run, container, int(status))

    def _is_going(self, container):
        """Tell whether a container is about to end: its processes, which are told to, may be a moment ahead of it."""
        gevent.sleep(1)
        found = self.engine.inspect(container.id)
        return found is None or not found.up or found.started_at != container.started_at

    def _read_file(self, follower, container, *, ended):
        """Take what a run has written so far, of a container that may be stopped."""
        if container is not None:
            skip = follower.reader.offset
            for data in politely(self.engine.read_file(container.id, f'{self._run_folder(follower.run)}/out')):
                new, skip = data[skip:], max(0, skip - len(data))
                self._publish(follower, follower.reader.take(new))
        if ended:
            self._publish(follower, follower.reader.take(b'', ended=True))

    def _silent_end(self, run, container, status):
        said = self.engine.run(container.id, ['tail', '-c', '8000', f'{self._run_folder(run)}/err'], user=USER)[1].decode('utf-8', 'replace')
        said = self.events.strike(said)[-2000:].strip()  # so that no part of a secret is where it was cut
        return {'ok': False, 'code': 'AGENT_FAILED',
                'message': f"The agent ended with exit code {status} and without a result. It said last: {said or '(nothing)'}"}

    @staticmethod
    def _first_event(session, run):
        return (run.number, 0, 0), 'log', {'stream': 'agent', 'message': f'Task {run.number} of session {session.id} is with {session.agent}.',
                                           'runId': run.id, 'agent': session.agent}, view_time(run.started_at)

    def _events_of(self, session, run, *, skip):
        """Yield lists of (place, type, data, time or None) of a run, from its beginning on; those of `skip` lines may be left out."""
        yield [self._first_event(session, run)]
        reader = self._reader(session, run, skip=skip)
        container = self.engine.find(session.workspace_id)
        for data in self.engine.read_file(container.id, f'{self._run_folder(run)}/out') if container else ():
            yield reader.take(data if run.length is None else data[:max(0, run.length - reader.offset)])
        if run.state != RUNNING:
            yield reader.take(b'', ended=True)
            yield [((run.number, LAST_LINE, 0), run.end['type'], run.end['data'], view_time(run.ended_at))]

    def _publish(self, follower, events):
        for place, kind, data, stamp in politely(events):
            self.events.publish(kind, follower.session.workspace_id, data, session_id=follower.session.id, session_event_id=event_id_of(place),
                                timestamp=parse_time(stamp) if stamp else None)
            self.published[follower.session.id] = place

    def _end(self, session, run, outcome, follower):
        """Write down how a run ended, sweep up if it was ended, and tell: one result or one error event is the last."""
        run = self.state.session(session.id).runs[run.number - 1] if self.knows(session, run) else run
        if run.stop and not outcome['ok']:
            outcome = outcome | {'code': run.stop[0], 'message': run.stop[1]}
        if run.stop or not outcome['ok']:
            self._sweep(session, run)
        total = outcome.get('total_cost_usd')
        figures = {'runId': run.id, 'durationMs': outcome.get('durationMs') or int((time.time() - run.started_at) * 1000), 'turns': outcome.get('turns'),
                   'costUsd': None if total is None else round(max(0, total - session.total_cost_usd), 6)}
        kind = 'result' if outcome['ok'] else 'error'
        data = figures | (outcome['data'] if outcome['ok'] else {'code': outcome['code'], 'message': outcome['message']}) | {'runId': run.id}
        state = 'completed' if outcome['ok'] else 'cancelled' if outcome['code'] == 'AGENT_CANCELLED' else 'failed'
        conversed = follower is not None and follower.reader.lines.conversed and outcome.get('code') != 'AGENT_UNKNOWN_CONVERSATION'
        with contextlib.suppress(Superseded):  # its ttl counts from here
            self.state.update(session.workspace_id, flush=False, last_activity_at=time.time())
        self.state.end_run(session.id, run.number, state=state, end={'type': kind, 'data': self.events.strike(data)}, total_cost_usd=total,
                           length=follower.reader.offset if follower is not None else None,
                           conversed=(session.conversed or conversed) and outcome.get('code') != 'AGENT_UNKNOWN_CONVERSATION')
        log.info('Run %s of session %s %s%s.', run.id, session.id, state, '' if outcome['ok'] else f": {outcome['code']}")
        place = (run.number, LAST_LINE, 0)
        self.events.publish(kind, session.workspace_id, data, session_id=session.id, session_event_id=event_id_of(place), last=True)
        self.published[session.id] = place
        self.events.forget(session.id)  # it is told from its files

    def _watch(self, follower):
        """Keep the workspace of a run alive, and end a run that is cancelled, silent, too long, or lives on after its last word."""
        interrupted_at, noted_at = None, 0
        while True:
            gevent.sleep(WATCH_PAUSE)
            now = time.monotonic()
            try:
                run = self.state.session(follower.session.id).runs[follower.run.number - 1]
                if now - noted_at > ACTIVITY_PAUSE:
                    self.state.update(follower.session.workspace_id, flush=False, last_activity_at=time.time())
                    noted_at = now
                if run.stop and interrupted_at is None:
                    interrupted_at = follower.stopped_at = now
                    self._signal(follower.session, run, 'INT')
                elif run.stop and now - interrupted_at > CANCEL_PATIENCE:
                    self._sweep(follower.session, run)
                    interrupted_at = now
                elif not run.stop and follower.reader.lines.has_ended:
                    if now - follower.heard_at > LINGER_PATIENCE:
                        self._signal(follower.session, run, 'KILL')
                elif not run.stop and follower.attached:
                    self._check_limits(follower, run, now)
            except (Superseded, SessionNotFound):
                log.debug('The workspace of run %s is gone.', follower.run.id)
                return
            except DockerError as error:
                log.debug('Run %s: %s', follower.run.id, error)

    def _check_limits(self, follower, run, now):
        if now - follower.heard_at > self.config.agent_idle_timeout:
            stop = ['AGENT_IDLE_TIMEOUT', f'The agent said nothing for AGENT_IDLE_TIMEOUT={self.config.agent_idle_timeout} s, and was ended.']
        elif time.time() - run.started_at > run.timeout:
            stop = ['AGENT_TIMEOUT', f'The task took more than its {run.timeout} s, and was ended.']
        else:
            return
        self.state.update_run(follower.session.id, run.number, stop=stop)

    def _signal(self, session, run, name):
        """Send a signal to the agent itself: its children would take an interrupt for their own."""
        self._in_container(session, run, ['sh', '-c', f'[ -e "$1/exit" ] || kill -s {name} "$(cat "$1/pid")"', 'sh', self._run_folder(run)])

    def _sweep(self, session, run):
        """Kill everything that carries the run's id in its environment."""
        with contextlib.suppress(DockerError):
            self._in_container(session, run, ['agent-sweep', run.id])

    def _in_container(self, session, run, command):
        container = self.engine.find(session.workspace_id)
        if container is not None and container.state == 'running' and container.started_at == run.boot:  # else its number is another's
            self.engine.run(container.id, command, user=USER)


# ---------------------------------------------------------------------------------------------
# Views
# ---------------------------------------------------------------------------------------------

def view_workspace(workspace):
    """Return a workspace as a list shows it."""
    custom = {key: port for key, port in workspace.ports.items() if key.isdigit()}
    return {'id': workspace.id, 'name': workspace.name, 'status': workspace.status, 'type': workspace.type,
            'template': workspace.template, 'codeServerPort': workspace.ports.get('codeServer'), 'sshPort': workspace.ports.get('ssh'),
            'ports': custom, 'createdAt': view_time(workspace.created_at), 'expiresAt': view_time(workspace.expires_at)}


def view_workspace_details(workspace, usage, config):
    """Return a workspace with everything that is known of it; `usage` is its last measurement or None."""
    host = config.workspace_host or {'0.0.0.0': 'localhost', '::': 'localhost'}.get(config.workspace_bind_address, config.workspace_bind_address)
    project = f'{config.workspace_base_path}/{workspace.folder}'
    editor, ssh = workspace.ports.get('codeServer'), workspace.ports.get('ssh')
    return view_workspace(workspace) | {
        'containerId': workspace.container_id[:12] or None,
        'codeServerUrl': f"http://{f'[{host}]' if ':' in host else host}:{editor}/?folder={project}" if editor else None,
        'codeServerPassword': workspace.password,
        # Each workspace has host keys of its own, and ports are used again: without the alias, ssh would cry wolf.
        'sshCommand': f'ssh -p {ssh} -o HostKeyAlias={workspace.id} {USER}@{host}' if ssh else None,
        'gitUrl': workspace.git_url or None, 'gitBranch': workspace.git_branch or None, 'labels': workspace.labels,
        'error': workspace.error or None, 'ttl': workspace.ttl, 'lastActivityAt': view_time(workspace.last_activity_at),
        'resources': usage}


def view_session(session):
    """Return a session as a list shows it."""
    last = session.runs[-1]
    return {'id': session.id, 'workspaceId': session.workspace_id, 'agent': session.agent, 'state': last.state,
            'createdAt': view_time(session.created_at), 'lastActivityAt': view_time(last.ended_at or last.started_at), 'runs': len(session.runs)}


def view_session_details(session):
    """Return a session with its runs."""
    return view_session(session) | {'agentSessionId': session.agent_session_id, 'totalCostUsd': session.total_cost_usd,
                                    'runs': [view_run(run) for run in session.runs]}


def view_run(run):
    """Return a run: its task and times, and how it ended."""
    end = run.end['data'] if run.end else {}
    return {'id': run.id, 'number': run.number, 'state': run.state, 'task': run.task, 'startedAt': view_time(run.started_at),
            'endedAt': view_time(run.ended_at), 'timeout': run.timeout, 'turns': end.get('turns'), 'durationMs': end.get('durationMs'),
            'costUsd': end.get('costUsd'), 'result': end.get('message') if run.state == 'completed' else None,
            'error': {'code': end.get('code'), 'message': end.get('message')} if run.state in ('failed', 'cancelled') else None}


def view_image(state):
    """Return the state of a template's image."""
    shown = {'image': state['image'], 'state': state['state']}
    if state['error']:
        shown['error'] = state['error']
    if state['building_since']:
        shown['buildingSince'] = view_time(state['building_since'])
    return shown


def view_event(event):
    """Return an event as JSON bytes, encoded once for all its readers."""
    if event.json is None:
        shown = {'type': event.type, 'workspaceId': event.workspace_id, 'id': event.id or None, 'timestamp': view_time(event.timestamp), 'data': event.data}
        if event.session_id is not None:
            shown['sessionId'] = event.session_id
        event.json = encode(shown)[:-1]
    return event.json


def view_sse(event):
    """Return an event as SSE text. It has no name: a browser's `onmessage` sees only those without."""
    return b'id: %s\ndata: %s\n\n' % (event.id.encode(), view_event(event))


def view_frame(event):
    """Return an event as a WebSocket frame."""
    return text_frame(view_event(event))


def encode(value):
    """Return a value as JSON bytes with a line end, which a shell is grateful for."""
    return json.dumps(value, ensure_ascii=False, separators=(',', ':')).encode('utf-8', 'replace') + b'\n'


def view_error(error):
    """Return the one shape in which every failure is told."""
    shown = {'success': False, 'error': str(error), 'code': error.code}
    return shown | ({'details': error.details} if error.details else {})


# ---------------------------------------------------------------------------------------------
# Streams
# ---------------------------------------------------------------------------------------------

HEARTBEAT = 15  # seconds
PING_PAUSE = 20  # seconds without a word from a WebSocket client until it is asked for a sign of life
DEFAULT_TAIL = 100  # lines
MAX_SUBSCRIPTIONS = 100  # of one WebSocket
CATCH_UP_ROUNDS = 20  # against a container that prints faster than its log is read, there is no end to it
BATCH = 200  # events
TICKET_LIFE = 30  # seconds
SSE_HEADERS = {'Content-Type': 'text/event-stream; charset=utf-8', 'Cache-Control': 'no-cache', 'X-Accel-Buffering': 'no'}


class Streams:
    """The streams that are open, so that there are not too many, and they end properly with the server."""

    def __init__(self, limit):
        self._limit = limit
        self._open = set()
        self._tickets = {}  # digest -> when it expires
        self._pinger = None

    def admit(self):
        """Raise TooMany when no further stream is taken."""
        if len(self._open) >= self._limit:
            raise TooMany(f'MAX_STREAMS={self._limit} streams are open already; close one, or come again later.', headers={'Retry-After': '10'})

    @contextlib.contextmanager
    def opened(self, stream):
        """Count a stream, anything with `close()`, for the length of a block."""
        self._open.add(stream)
        if self._pinger is None:
            self._pinger = gevent.spawn(self._ping_for_ever)
        try:
            yield stream
        finally:
            self._open.discard(stream)

    def close(self):
        """End all streams."""
        if self._pinger is not None:
            self._pinger.kill()
            self._pinger = None
        gevent.joinall([gevent.spawn(stream.close) for stream in list(self._open)], timeout=5)

    def issue_ticket(self):
        """Return a word that opens one stream within seconds: an EventSource can send no header, and URLs end up in logs."""
        now = time.monotonic()
        self._tickets = {key: end for key, end in self._tickets.items() if end > now}
        ticket = secrets.token_urlsafe(24)
        self._tickets[hashlib.sha256(ticket.encode()).digest()] = now + TICKET_LIFE
        return ticket

    def redeem_ticket(self, ticket):
        """Tell whether a ticket is valid, and make it invalid."""
        return self._tickets.pop(hashlib.sha256(ticket.encode('utf-8', 'replace')).digest(), 0) > time.monotonic()

    def _ping_for_ever(self):
        while True:
            gevent.sleep(5)
            for stream in list(self._open):
                if isinstance(stream, WebSocketClient):
                    stream.check()


class CatchUp:
    """Brings a reader of a workspace up to now, and then attaches it, so that nothing is lost or repeated in between.

    First comes the current status; then, from a cursor on, all that was missed, or without one the last `tail` lines. Old lines come
    from the engine, which has them all; the pump has the new ones. What the reader has seen so far is in every id that it is given.
    """

    def __init__(self, backend, workspace_id, reader, pump, *, cursor=None, tail=DEFAULT_TAIL):
        self._backend, self._events = backend, backend.events
        self._workspace_id, self._reader, self._pump, self._tail = workspace_id, reader, pump, tail
        self._fresh = cursor is None
        self._cursor = cursor or self._events.cursor(workspace_id)
        self._count = self._cursor.count if self._cursor.boot == self._events.boot else 0
        self._marks = self._cursor.marks  # they grow with what is told here
        self._position = self._cursor.position.copy() if self._cursor.position else None

    def batches(self):
        """Yield lists of events; an empty one means that there is nothing yet, because the engine is away."""
        if self._fresh and self._pump.ready.wait(0.2) and (not self._tail or str(self._pump.position) == str(LogPosition())):
            self._position = self._pump.position.copy()  # no old line tells it, and who comes back with this id must miss nothing
        try:
            workspace, told = self._backend.state.get(self._workspace_id), []
        except WorkspaceNotFound:
            yield [self._deletion()]
            return
        if self._fresh:
            self._cursor = self._events.cursor(self._workspace_id)
            self._count, self._marks = self._cursor.count, self._cursor.marks
            if workspace.status in (CREATING, ERROR) and self._tail:
                told = [event for event in self._events.recent(self._workspace_id) if event.type == 'log'][-self._tail:]
        yield [status_event(workspace, self._place())]
        yield told
        yield from self._until_ready()
        live = Subscription()
        for _ in range(CATCH_UP_ROUNDS):
            lost, waiting = yield from self._round(live)
            if not lost:
                break
        # From the end of the round to here there was no switch between greenlets.
        self._reader.lost += lost
        for event in waiting:
            self._reader.put(event)
        self._events.attach(self._workspace_id, self._reader)
        if not waiting and all(item.id != self._workspace_id for item in self._backend.state.all()):
            self._reader.put(self._deletion())  # it came before there was anything attached

    def _until_ready(self):
        while not self._backend.agents.wait_until_told(self._workspace_id, timeout=1):
            yield []
        while not self._pump.ready.wait(1):
            yield from self._missed()
            yield []

    def _round(self, live):
        """Give what was missed up to now, while `live` takes what comes; the two meet where the pump is now. Then give what `live` took.

        Returns (how many `live` lost, what it has then): nothing of either, unless it comes faster than the reader takes it.
        """
        barrier = self._pump.position.copy()
        self._events.attach(self._workspace_id, live)
        try:
            yield from self._missed()
            # For lines after a stamp the engine reads all of a log; often there are none.
            for lines in self._old_lines() if str(self._position) != str(barrier) else ():
                if not lines:
                    yield []
                    continue
                if self._position is None:
                    before = min(stamp for _, stamp, _ in lines) - 1
                    self._position = LogPosition((before, 0), (before, 0))
                covered = [line for line in lines if barrier.covers(line[0], line[1])]
                yield list(self._events.log_events(self._workspace_id, covered, self._position, self._place))
            self._position = self._position or barrier
            lost, waiting = live.drain()
            while waiting and not lost:
                yield [event for event in waiting if not self._cursor.has_seen(event)]
                self._move_to(Cursor.parse(waiting[-1].id))
                lost, waiting = live.drain()
        finally:
            self._events.detach(self._workspace_id, live)
        return lost, waiting

    def _move_to(self, seen):
        self._count, self._cursor.seen_at, self._position = seen.count, seen.seen_at, seen.position or self._position
        self._marks.update(seen.marks)

    def _old_lines(self):
        """Give what the engine holds from the position on, or the last lines; an empty list while it is away."""
        while True:
            self._position = self._position and self._position.copy()  # reading begins again
            try:
                yield from self._backend.logs.read(self._workspace_id, position=self._position, tail=self._tail if self._position is None else None)
                return
            except UnreadableLog as error:
                log.debug('A reader of %s goes on behind what is damaged: %s', self._workspace_id, error)
                return
            except DockerError as error:
                log.debug('A reader of %s waits for the engine: %s', self._workspace_id, error)
            yield []
            gevent.sleep(1)

    def _missed(self):
        """Give what was published since the reader's cursor; of a task that was told of before, only what came after."""
        ring, now = self._events.ring(self._workspace_id), self._events.cursor(self._workspace_id)
        held, lost = ring.after(self._count), ring.lost_after(self._count)
        if ring.end_of_dropped > self._count or (self._count == 0 and not self._fresh):
            yield from self._missed_of_tasks()
        batch = [dropped_event(self._workspace_id, lost, self._place())] if lost else []
        for number, event in held:
            self._count = number
            if self._cursor.has_seen(event):
                continue
            if event.place is not None:
                self._marks[event.session_id] = event.place
            batch.append(self._told(event))
        self._cursor.seen_at = now.seen_at
        for session_id, mark in now.marks.items():
            self._marks.setdefault(session_id, mark)  # it has begun, and nothing of it was told yet
        yield batch

    def _missed_of_tasks(self):
        """Give what the ring has no more of tasks, or an earlier process published: the files of their runs have all of it.

        A task that began after what the reader has seen is told from its beginning; one that ran then has a mark.
        """
        begun = {item.id: next((run.number for run in item.runs if run.started_at > self._cursor.seen_at), None)
                 for item in self._backend.state.sessions() if item.workspace_id == self._workspace_id}
        after = {key: (number - 1, LAST_LINE, 0) for key, number in begun.items() if number is not None}
        for session_id, start in (after | {key: place_of(mark) for key, mark in self._marks.items()}).items():
            for told in told_for_sure(self._backend, session_id, start):
                batch = []
                for place, event in told:
                    self._marks[session_id] = event_id_of(place)
                    batch.append(self._told(event, place=event_id_of(place)))
                yield batch

    def _told(self, event, **changes):
        """Return an event with the id that it has for this reader."""
        return dataclasses.replace(event, id=self._place(), json=None, **changes)

    def _deletion(self):
        return Event('status', self._workspace_id, self._place(), time.time(), DELETED)

    def _place(self):
        return place_id(self._events.boot, self._count, self._cursor.seen_at, self._position or '', self._marks)


def status_event(workspace, place):
    """Return the event that tells a new reader the status of a workspace."""
    data = {'status': workspace.status, 'name': workspace.name} | ({'error': workspace.error} if workspace.error else {})
    return Event('status', workspace.id, place, time.time(), data)


def dropped_event(workspace_id, lost, place):
    """Return the event that tells a slow reader how much it has missed."""
    return Event('error', workspace_id, place, time.time(),
                 {'code': 'EVENTS_DROPPED', 'count': lost, 'message': f'{lost} events were dropped, because this reader is slower than they came.'})


def is_end(batch):
    """Tell whether events hold the last one of a workspace; what an agent says is not meant."""
    return any(event.type == 'status' and event.data.get('deleted') for event in batch)


def workspace_events(backend, workspace_id, *, cursor, tail, departure):
    """Yield lists of events of a workspace for ever, an empty one as a sign of life; ends with the workspace or the reader.

    `departure(callback)` gives an object that calls back when the client leaves, and that is closed in the end.
    """
    reader, place = Subscription(), ''
    watch = departure(reader.close)
    try:
        with backend.streams.opened(reader), backend.logs.watched(workspace_id) as pump:
            for batch in CatchUp(backend, workspace_id, reader, pump, cursor=cursor, tail=tail).batches():
                if reader.closed:
                    return
                place = batch[-1].id if batch else place
                yield batch
                if is_end(batch):
                    return
            while True:
                lost, batch = reader.take(HEARTBEAT)
                if lost:
                    yield [dropped_event(workspace_id, lost, place)]
                if reader.closed:
                    return
                place = batch[-1].id if batch else place
                yield batch
                if is_end(batch):
                    return
    finally:
        watch.close()
        backend.events.detach(workspace_id, reader)


def session_events(backend, session_id, *, after, departure, task=None):
    """Yield lists of events of a session for ever, or to the end of `task` (session, run); an empty one as a sign of life.

    The session may be yet to come. What this process did not see, or a slow reader missed, comes from the files of the runs.
    """
    reader = Subscription()
    watch = departure(reader.close)
    try:
        with backend.streams.opened(reader):
            while not backend.agents.wait_until_told(session_id, timeout=1):
                yield []
                if reader.closed:
                    return
            batches = session_batches(backend, session_id, reader, after)
            yield from ([event for _, event in batch] for batch in (up_to_the_end(backend, batches, *task) if task else batches))
    finally:
        watch.close()
        backend.events.detach(session_id, reader)


def session_batches(backend, session_id, reader, after):
    """Yield lists of (place, event) of a session after a place, until the reader is closed."""
    after, lost = backend.agents.place_in(session_id, after), True
    while not reader.closed:
        if lost:
            reader.drain()
            backend.events.attach(session_id, reader)
            for batch in told_since(backend, session_id, after):
                if reader.closed:
                    return
                after = batch[-1][0] if batch else after
                yield batch
        lost, waiting = reader.take(HEARTBEAT)
        # A workspace's id in the place of a session's gives that one's events, which have other ids.
        batch = [(place_of(event.id), event) for event in waiting if event.session_id == session_id] if not lost else []
        if batch and batch[0][0] == (1, 0, 0) and after >= (1, LAST_LINE, 0):
            after = BEGINNING  # a session that was deleted begins anew
        batch = [(place, event) for place, event in batch if place > after]
        after = batch[-1][0] if batch else after
        yield batch


def up_to_the_end(backend, batches, session, run):
    """Yield lists of (place, event) as they come, up to the last event of a run; one whose session was deleted meanwhile is given an end."""
    end = (run.number, LAST_LINE, 0)
    for batch in batches:
        if not batch and not backend.agents.knows(session, run):
            yield [(end, Event('error', session.workspace_id, event_id_of(end), time.time(), {'runId': run.id, **INTERRUPTED_ERROR}, session.id))]
            return
        batch = [(place, event) for place, event in batch if place <= end]
        yield batch
        if batch and batch[-1][0] == end:
            return


def told_since(backend, session_id, after):
    """Yield lists of (place, event) of what has been published of a session after a place: from the ring if that goes back far enough."""
    held = [(place_of(event.id), event) for event in backend.events.recent(session_id) if event.session_id == session_id]
    if held and comes_next(held[0][0], after):
        yield [(place, event) for place, event in held if place > after]
    else:
        yield from told_for_sure(backend, session_id, after)


def told_for_sure(backend, session_id, after):
    """Yield the same from the files of the runs, also when the engine goes away meanwhile; then empty lists until it is back."""
    while True:
        try:
            for batch in told(backend, session_id, after):
                after = batch[-1][0] if batch else after
                yield batch
            return
        except DockerError as error:
            log.debug('A reader of session %s waits for the engine: %s', session_id, error)
        yield []
        gevent.sleep(1)


def told(backend, session_id, after):
    """Yield the same as long as the engine answers; an empty list of a session that there is not."""
    try:
        session = backend.state.session(session_id)
    except SessionNotFound:
        yield []
        return
    barrier = backend.agents.published.get(session_id, BEGINNING)
    running = session.runs[-1].number if session.runs[-1].state == RUNNING else None
    for batch in backend.agents.replay(session, after):
        published = [(place, event) for place, event in batch if place[0] != running or place <= barrier]
        yield published
        if len(published) < len(batch):
            return


def sse_stream(batches):
    """Yield the text of an SSE stream; a heartbeat when nothing comes for a while, since only a write finds some of the dead."""
    yield b': events\nretry: %d\n\n' % RETRY
    written, turn = time.monotonic(), Turn()
    for batch in batches:
        for start in range(0, len(batch), BATCH):
            yield b''.join(map(view_sse, batch[start:start + BATCH]))
            turn.pass_on()
        if batch:
            written = time.monotonic()
        elif time.monotonic() - written >= HEARTBEAT - 1:
            yield b': still here\n\n'
            written = time.monotonic()


def text_stream(batches):
    """Yield the lines of a log as plain text."""
    for batch in batches:
        text = ''.join(f"{event.data['message']}\n" for event in batch if event.type == 'log')
        if text:
            yield text.encode('utf-8', 'replace')


class WebSocketClient:
    """One client of /agent/ws: its greenlet reads, and another one writes as long as there is something to write."""

    def __init__(self, backend, socket, trusted):
        self._backend = backend
        self._socket = socket
        self._trusted = trusted
        self._outbox = Subscription(on_put=self._wake)
        self._room = gevent.event.Event()
        self._feeds = {}  # topic -> (pump, greenlet that catches up), each of them or None
        self._writer = None
        self._ping_is_due = False
        self._place = ''

    def run(self):
        """Serve the client until it leaves."""
        with self._backend.streams.opened(self):
            try:
                while True:
                    text = self._socket.receive()
                    if text is None:
                        break
                    self._handle(text)
            finally:
                for topic in list(self._feeds):
                    self._unsubscribe(topic)
                if self._writer is not None:
                    self._writer.kill(block=False)
                self._socket.close()

    def close(self):
        """Tell the client that the server goes away."""
        self._socket.close(GOING_AWAY, 'the server is stopping')

    def check(self):
        """Drop a client that has not been heard of for long, and ask one that is silent for a sign of life."""
        silent = time.monotonic() - self._socket.last_heard
        if silent > 3 * PING_PAUSE:
            self._socket.abort()
        elif silent > PING_PAUSE:
            self._ping_is_due = True
            self._wake()

    # What the client says

    def _handle(self, text):
        message = {}
        try:
            message = parse_json(text.encode() if isinstance(text, str) else bytes(text))
            self._backend.schemas.check('websocket-message', message, where='message')
            self._obey(message)
        except BackendError as error:
            self._refuse(message, error)
        except Exception as error:
            self._refuse(message, internal_error(error))

    def _refuse(self, message, error):
        """Say what was wrong; the connection stays, but for a client that is not allowed here."""
        about = message.get('workspaceId') if isinstance(message, dict) else None
        about = about if isinstance(about, str) and len(about) <= 100 else None
        self._say('error', about, {'code': error.code, 'message': str(error)} | ({'details': error.details} if error.details else {}))
        if isinstance(error, Unauthorized):
            self._flush()
            self._socket.close(POLICY, 'unauthorized')

    def _obey(self, message):
        kind = message['type']
        if kind == 'auth':
            self._trusted = self._trusted or same_secret(message['token'], self._backend.config.api_token)
        if not self._trusted:
            raise Unauthorized('This server needs its API token: send {"type": "auth", "token": "<API_TOKEN>"} first.')
        if kind == 'ping':
            self._say('pong', None, {})
        elif kind == 'subscribe':
            self._subscribe(message)
        elif kind == 'unsubscribe':
            self._unsubscribe(self._topic(message['workspaceId']))

    def _topic(self, name):
        return EVERYTHING if name == EVERYTHING else self._backend.state.get(name).id

    def _subscribe(self, message):
        cursor = Cursor.parse(message['after']) if 'after' in message else None
        topic = self._topic(message['workspaceId'])
        self._unsubscribe(topic)
        if len(self._feeds) >= MAX_SUBSCRIPTIONS:
            raise TooMany(f'This connection has {MAX_SUBSCRIPTIONS} subscriptions already; unsubscribe from one, or open another.')
        if topic == EVERYTHING:
            self._feeds[topic] = None, gevent.spawn(self._feed_everything)
        else:
            pump = self._backend.logs.watch(topic)
            self._feeds[topic] = pump, gevent.spawn(self._feed, topic, pump, cursor, message.get('tail', DEFAULT_TAIL))

    def _unsubscribe(self, topic):
        pump, greenlet = self._feeds.pop(topic, (None, None))
        if greenlet is not None:
            greenlet.kill()
        self._backend.events.detach(topic, self._outbox)
        if pump is not None:
            self._backend.logs.unwatch(pump)

    def _feed(self, workspace_id, pump, cursor, tail):
        try:
            for batch in CatchUp(self._backend, workspace_id, self._outbox, pump, cursor=cursor, tail=tail).batches():
                self._offer(batch)
            self._feeds[workspace_id] = pump, None  # a greenlet that is done is not worth its memory
        except BackendError as error:
            self._say('error', workspace_id, {'code': error.code, 'message': str(error)})

    def _feed_everything(self):
        """Tell the status of each workspace; what it was before `after` is of no use."""
        events = self._backend.events
        events.attach(EVERYTHING, self._outbox)
        place = events.place(EVERYTHING)
        for workspace in self._backend.state.all():
            self._wait_for_room()
            with contextlib.suppress(WorkspaceNotFound):  # deleted meanwhile; what changed meanwhile has been told already
                self._outbox.put(status_event(self._backend.state.get(workspace.id), place))

    def _offer(self, batch):
        """Put old events into the outbox when there is room: unlike the live ones, they can wait."""
        for event in batch:
            self._wait_for_room()
            self._outbox.put(event)

    def _wait_for_room(self):
        while not self._outbox.has_room:
            self._room.clear()
            self._room.wait(1)

    def _say(self, kind, workspace_id, data):
        self._outbox.put(Event(kind, workspace_id, '', time.time(), data))

    # What the client is sent

    def _wake(self):
        if self._writer is None:
            self._writer = gevent.spawn(self._write)

    def _write(self):
        """Write what waits, all of it at once, until nothing comes for a second."""
        try:
            while not self._socket.closed:
                if self._ping_is_due:
                    self._ping_is_due = False
                    self._socket.ping()
                lost, events = self._outbox.take(1)
                if not events and not len(self._outbox) and not self._ping_is_due:
                    return
                self._send(lost, events)
        except WebSocketError as error:
            log.debug('A WebSocket client is gone: %s', error)
        finally:
            self._writer = None

    def _send(self, lost, events):
        frames = [view_frame(dropped_event(None, lost, self._place))] if lost else []
        frames += map(view_frame, events)
        self._room.set()
        if frames:
            self._socket.send_encoded(b''.join(frames))
        self._place = next((event.id for event in reversed(events) if event.id), self._place)
        for event in events:
            if is_end([event]):
                self._unsubscribe(event.workspace_id)

    def _flush(self):
        with contextlib.suppress(WebSocketError):
            self._send(*self._outbox.drain())


# ---------------------------------------------------------------------------------------------
# Routes
# ---------------------------------------------------------------------------------------------

DELETE_PATIENCE = 30  # seconds that DELETE waits for the end before it answers 202


@dataclass(frozen=True)
class Call:
    """What a handler is given: the parts of the path, the checked query and body, and whether a token was shown if one is needed.

    `last_event_id` is where a stream is to go on, `departure(callback)` watches for the client to leave, `websocket` is the
    connection of a WebSocket client.
    """

    path: dict
    query: dict
    body: object
    trusted: bool
    last_event_id: str
    departure: object = None
    websocket: object = None
    accept: str = ''
    if_none_match: str = ''


@dataclass(frozen=True)
class Reply:
    """What a handler returns. A `stream` yields bytes, and is sent in the place of the data."""

    data: object = None
    status: int = 200
    headers: dict = field(default_factory=dict)
    stream: object = None


@dataclass(frozen=True)
class Route:
    """One line of the API. `body` and `query` name schemas; an `open` route needs no token; a `bare` one answers without the envelope.

    The rest is for the OpenAPI document: under which `tag` it stands; its `answers`, from status to the schema of the data, to a media
    type, or to None; and the `errors` and `headers` that it has beside those of all routes.
    """

    method: str
    path: str
    handler: object
    body: str = None
    query: str = 'no-query'
    open: bool = False
    bare: bool = False
    tag: str = None
    answers: dict = field(default_factory=dict)
    errors: tuple = ()
    headers: tuple = ()

    def fits(self, path):
        """Tell whether a path is one of this route's."""
        pattern = re.sub('<[^>]*?(:path)?>', lambda match: '.+' if match[1] else '[^/]+', re.escape(self.path))
        return re.fullmatch(pattern, path) is not None


def list_workspaces(backend, call):
    """List workspaces, oldest first."""
    found = backend.state.all()
    for key in ('type', 'status'):
        if key in call.query:
            found = [item for item in found if getattr(item, key) in call.query[key]]
    for label in call.query.get('label', ()):
        name, given, value = label.partition('=')
        found = [item for item in found if name in item.labels and (not given or item.labels[name] == value)]
    return Reply([view_workspace(item) for item in found])


def create_workspace(backend, call):
    """Create a workspace. It answers at once with status `creating`; what goes on is told by its events."""
    workspace = backend.workspaces.create(call.body)
    return Reply(view_workspace(workspace), 201, {'Location': f'/api/workspaces/{workspace.id}'})


def get_workspace(backend, call):
    """Get a workspace by its id or name."""
    return show_workspace(backend, backend.state.get(call.path['id']))


def update_workspace(backend, call):
    """Change the name, the ttl or labels of a workspace."""
    return show_workspace(backend, backend.workspaces.change(call.path['id'], call.body))


def delete_workspace(backend, call):
    """Delete a workspace with its container and all its data."""
    workspace, gone = backend.workspaces.remove(call.path['id'], wait=DELETE_PATIENCE)
    return Reply({'id': workspace.id, 'name': workspace.name, 'status': workspace.status, 'deleted': gone}, 200 if gone else 202)


def start_workspace(backend, call):
    """Start a stopped workspace."""
    return Reply(view_workspace(backend.workspaces.start(call.path['id'])), 202)


def stop_workspace(backend, call):
    """Stop a workspace. A temporary one is deleted by that."""
    return Reply(view_workspace(backend.workspaces.stop(call.path['id'])), 202)


def restart_workspace(backend, call):
    """Stop a running workspace and start it again."""
    return Reply(view_workspace(backend.workspaces.restart(call.path['id'])), 202)


def follow_workspace(backend, call):
    """Stream the events of a workspace: its status at once, the last lines of its log, and then what comes, as SSE."""
    workspace = backend.state.get(call.path['id'])
    backend.streams.admit()
    batches = workspace_events(backend, workspace.id, cursor=call_cursor(call), tail=call.query.get('tail', DEFAULT_TAIL), departure=call.departure)
    return Reply(stream=sse_stream(batches), headers=SSE_HEADERS)


def read_log(backend, call):
    """Get the log of a workspace as plain text: the last `tail` lines or those from `since` on; with `follow` also what comes."""
    workspace = backend.state.get(call.path['id'])
    position = LogPosition(*[(parse_since(call.query['since']), 0)] * 2) if 'since' in call.query else None
    tail = call.query.get('tail')
    backend.streams.admit()
    if call.query.get('follow'):
        cursor = Cursor(backend.events.boot, backend.events.count, time.time(), position) if position else None
        batches = workspace_events(backend, workspace.id, cursor=cursor, tail=10_000_000 if tail is None else tail, departure=call.departure)
    else:
        lines = backend.logs.read(workspace.id, position=position, tail=tail)
        first = next(lines, [])  # here an engine that is away can still be told
        batches = (list(backend.events.log_events(workspace.id, batch, position or LogPosition(), str)) for batch in itertools.chain([first], lines))
    return Reply(stream=text_stream(batches), headers={**SSE_HEADERS, 'Content-Type': 'text/plain; charset=utf-8'})


def execute_task(backend, call):
    """Give an agent a task, and stream what it does as SSE to its end. The task goes on when the stream is left.

    With `Accept: application/json` it answers 202 with the ids at once.
    """
    if 'application/json' not in call.accept:
        backend.streams.admit()
    session, run = backend.agents.execute(call.body)
    headers = {'X-Session-Id': session.id, 'X-Run-Id': run.id, 'Location': f'/api/agent/sessions/{session.id}'}
    if 'application/json' in call.accept:
        return Reply({'sessionId': session.id, 'runId': run.id, 'workspaceId': session.workspace_id, 'agent': session.agent}, 202, headers)
    batches = session_events(backend, session.id, after=(run.number - 1, LAST_LINE, 0), departure=call.departure, task=(session, run))
    return Reply(stream=sse_stream(batches), headers=SSE_HEADERS | headers)


def follow_session(backend, call):
    """Stream the events of an agent session as SSE. The session may be yet to come."""
    after = call.query.get('after', call.last_event_id)
    after = place_of(after) if after else BEGINNING
    backend.streams.admit()
    batches = session_events(backend, call.path['session_id'], after=after, departure=call.departure)
    return Reply(stream=sse_stream(batches), headers=SSE_HEADERS)


def list_sessions(backend, call):
    """List agent sessions, oldest first."""
    found = backend.state.sessions()
    if 'workspaceId' in call.query:
        workspace = backend.state.get(call.query['workspaceId'])
        found = [item for item in found if item.workspace_id == workspace.id]
    found = [item for item in found if call.query.get('agent', item.agent) == item.agent]
    found = [item for item in found if call.query.get('state', item.runs[-1].state) == item.runs[-1].state]
    return Reply([view_session(item) for item in found])


def get_session(backend, call):
    """Get an agent session with its runs."""
    return Reply(view_session_details(backend.state.session(call.path['id'])))


def get_transcript(backend, call):
    """Get the events of a session as JSON, `limit` at a time; `next` is what `after` must be for the ones that follow."""
    session = backend.state.session(call.path['id'])
    after = place_of(call.query['after']) if call.query.get('after') else BEGINNING
    limit, found = call.query.get('limit', 1000), []
    for batch in told(backend, session.id, after):
        found += [event for _, event in batch]
        if len(found) > limit:
            break
    shown = found[:limit]
    return Reply({'events': [json.loads(view_event(event)) for event in shown], 'next': shown[-1].id if len(found) > limit else None})


def cancel_session(backend, call):
    """Interrupt the task of a session. It ends with an error event, AGENT_CANCELLED, within seconds."""
    return Reply(view_session_details(backend.agents.cancel(call.path['id'])), 202)


def delete_session(backend, call):
    """Forget a session and delete its transcript."""
    backend.agents.remove(call.path['id'])
    return Reply({'id': call.path['id'], 'deleted': True})


def open_websocket(backend, call):
    """Talk over a WebSocket: subscribe to workspaces, and receive their events."""
    if call.websocket is None:
        raise UpgradeRequired('This is a WebSocket: connect with Upgrade: websocket, Sec-WebSocket-Version: 13 and a proper key.',
                              headers={'Upgrade': 'websocket', 'Sec-WebSocket-Version': '13'})
    try:
        backend.streams.admit()
    except TooMany as error:
        call.websocket.close(1013, str(error))
        return Reply({})
    WebSocketClient(backend, call.websocket, call.trusted).run()
    return Reply({})


def issue_ticket(backend, call):
    """Get a ticket that opens one stream, for a browser's EventSource, which can send no token: add it as `?ticket=`."""
    return Reply({'ticket': backend.streams.issue_ticket(), 'expiresIn': TICKET_LIFE}, 201)


def list_templates(backend, call):
    """List the templates that a workspace can be made from."""
    return Reply([{'name': name, 'description': backend.templates.describe(name), 'default': name == backend.config.default_template}
                  | view_image(backend.templates.state(name)) for name in backend.templates.names()])


def get_health(backend, call):
    """Tell how the server is. Without the token, when one is set, only the first four fields."""
    shown = {'status': 'healthy' if backend.workspaces.connected else 'degraded', 'version': VERSION,
             'uptime': int(time.monotonic() - backend.started_at), 'docker': 'connected' if backend.workspaces.connected else 'disconnected'}
    if call.trusted:
        statuses = collections.Counter(item.status for item in backend.state.all())
        shown['templates'] = {name: view_image(backend.templates.state(name)) for name in [BASE, *backend.templates.names()]}
        shown['workspaces'] = {'total': sum(statuses.values()), **{status: statuses[status] for status in STATUSES}}
        shown['ports'] = {kind: {'used': used, 'total': total} for kind, (used, total) in backend.state.ports_in_use().items()}
    return Reply(shown)


def show_dashboard(backend, call):
    """Show the dashboard."""
    return show_page(backend, call, 'index.html')


def show_reference(backend, call):
    """Show this document as pages to read and to try."""
    return show_page(backend, call, 'openapi.html')


def show_document(backend, call):
    """Get this document."""
    return show_page(backend, call, 'openapi.json')


def show_file(backend, call):
    """Get a file that the pages need."""
    return show_page(backend, call, call.path['name'])


def show_page(backend, call, name):
    """Return the reply that sends a page, or says that the browser has it already."""
    page = backend.pages.find(name)
    if page.etag in call.if_none_match:
        return Reply(status=304, headers=page.headers, stream=())
    return Reply(stream=[page.read()], headers=page.headers)


def call_cursor(call):
    """Return from where a stream is to go on: what the client says, else what its browser remembers."""
    text = call.query.get('after', call.last_event_id)
    return Cursor.parse(text) if text else None


def parse_since(text):
    """Return the nanoseconds since the epoch of an RFC 3339 time, or of a number of seconds."""
    if re.fullmatch(r'\d{1,12}(\.\d{1,9})?', text):
        seconds, _, fraction = text.partition('.')
        return int(seconds) * 1_000_000_000 + int(fraction.ljust(9, '0'))
    try:
        return int(datetime.fromisoformat(text.replace('Z', '+00:00')).timestamp() * 1e9)
    except ValueError as error:
        raise ValidationError(f'since: {text[:80]!r} is neither a time as 2026-01-31T12:00:00Z nor a number of seconds') from error


def show_workspace(backend, workspace):
    """Return the reply that shows all of a workspace."""
    return Reply(view_workspace_details(workspace, backend.workspaces.usage(workspace.id), backend.config))


ENGINE_TROUBLE = (DockerError, EngineUnavailable)
CHANGE = {'tag': 'Workspaces', 'answers': {202: 'workspace'}, 'errors': (WorkspaceNotFound, WorkspaceNotRunning, *ENGINE_TROUBLE)}
TASK_ANSWERS = {200: EVENT_STREAM, 202: 'task-accepted'}
TASK_ERRORS = (WorkspaceNotFound, WorkspaceNotRunning, SessionBusy, TooMany, *ENGINE_TROUBLE)
PAGE = {'tag': 'Pages', 'open': True, 'bare': True, 'headers': ('ETag',)}
ROUTES = (
    Route('GET', '/api/workspaces', list_workspaces, query='workspace-list-query', tag='Workspaces', answers={200: 'workspace-list'}),
    Route('POST', '/api/workspaces', create_workspace, body='workspace-create', tag='Workspaces', answers={201: 'workspace'}, headers=('Location',),
          errors=(WorkspaceAlreadyExists, PortExhausted, *ENGINE_TROUBLE)),
    Route('GET', '/api/workspaces/<id>', get_workspace, tag='Workspaces', answers={200: 'workspace-details'}, errors=(WorkspaceNotFound,)),
    Route('PATCH', '/api/workspaces/<id>', update_workspace, body='workspace-update', tag='Workspaces', answers={200: 'workspace-details'},
          errors=(WorkspaceNotFound, WorkspaceAlreadyExists, WorkspaceNotRunning, *ENGINE_TROUBLE)),
    Route('DELETE', '/api/workspaces/<id>', delete_workspace, tag='Workspaces', answers={200: 'workspace-deleted', 202: 'workspace-deleted'},
          errors=(WorkspaceNotFound, *ENGINE_TROUBLE)),
    Route('POST', '/api/workspaces/<id>/start', start_workspace, **CHANGE),
    Route('POST', '/api/workspaces/<id>/stop', stop_workspace, **CHANGE),
    Route('POST', '/api/workspaces/<id>/restart', restart_workspace, **CHANGE),
    Route('GET', '/api/workspaces/<id>/events', follow_workspace, query='events-query', tag='Workspaces', answers={200: EVENT_STREAM},
          errors=(WorkspaceNotFound, TooMany)),
    Route('GET', '/api/workspaces/<id>/logs', read_log, query='logs-query', tag='Workspaces', answers={200: PLAIN_TEXT},
          errors=(WorkspaceNotFound, TooMany, *ENGINE_TROUBLE)),
    Route('POST', '/api/agent/execute', execute_task, body='agent-execute', tag='Agents', answers=TASK_ANSWERS, errors=TASK_ERRORS,
          headers=('X-Session-Id', 'X-Run-Id', 'Location')),
    Route('GET', '/api/agent/sessions', list_sessions, query='session-list-query', tag='Agents', answers={200: 'session-list'}, errors=(WorkspaceNotFound,)),
    Route('GET', '/api/agent/sessions/<id>', get_session, tag='Agents', answers={200: 'session-details'}, errors=(SessionNotFound,)),
    Route('GET', '/api/agent/sessions/<id>/events', get_transcript, query='transcript-query', tag='Agents', answers={200: 'transcript'},
          errors=(SessionNotFound, *ENGINE_TROUBLE)),
    Route('POST', '/api/agent/sessions/<id>/cancel', cancel_session, tag='Agents', answers={202: 'session-details'}, errors=(SessionNotFound,)),
    Route('DELETE', '/api/agent/sessions/<id>', delete_session, tag='Agents', answers={200: 'session-deleted'},
          errors=(SessionNotFound, SessionBusy, *ENGINE_TROUBLE)),
    Route('GET', '/agent/sse/<session_id>', follow_session, query='session-events-query', tag='Agents', answers={200: EVENT_STREAM}, errors=(TooMany,)),
    Route('GET', '/agent/ws', open_websocket, open=True, tag='Streams', answers={101: None}, errors=(UpgradeRequired,)),
    Route('POST', '/api/tickets', issue_ticket, tag='Streams', answers={201: 'ticket'}),
    Route('GET', '/api/templates', list_templates, tag='Server', answers={200: 'template-list'}),
    Route('GET', '/health', get_health, open=True, bare=True, tag='Server', answers={200: 'health'}),
    Route('GET', '/', show_dashboard, answers={200: HTML_PAGE}, **PAGE),
    Route('GET', '/openapi', show_reference, answers={200: HTML_PAGE}, **PAGE),
    Route('GET', '/openapi.json', show_document, answers={200: 'application/json'}, **PAGE),
    Route('GET', '/static/<name>', show_file, answers={200: '*/*'}, errors=(NotFound,), **PAGE),
)


class Application(bottle.Bottle):
    """The routes as a WSGI application whose every answer is JSON."""

    def __init__(self, backend):
        super().__init__()
        for route in ROUTES:
            self.route(route.path, route.method, endpoint(backend, route))

    def default_error_handler(self, error):
        """Put Bottle's own errors into the contract's shape."""
        if error.status_code == 404:
            return self._json(NotFound(f'There is no {bottle.request.path[:200]} here; GET /openapi.json lists what there is.'))
        if error.status_code == 405:
            return self._json(MethodNotAllowed(f"{bottle.request.method} is not possible here; {error.headers.get('Allow', 'nothing')} is."))
        return self._json(internal_error(error.exception) if error.status_code >= 500 else ValidationError(str(error.body)))

    @staticmethod
    def _json(error):
        bottle.response.content_type = 'application/json'
        return encode(view_error(error))


def endpoint(backend, route):
    """Return the function that Bottle calls: it checks what came, calls the handler, and puts what it returns into JSON."""
    def called(**path):
        environ = bottle.request.environ
        try:
            query = read_query(backend.schemas, route.query, environ.get('QUERY_STRING', ''))
            body = read_body(backend.schemas, route.body, environ) if route.body else None
            reply = route.handler(backend, Call(path, query, body, environ.get('agentbackend.trusted', True), environ.get('HTTP_LAST_EVENT_ID'),
                                                departure_of(environ), accept=environ.get('HTTP_ACCEPT', ''), if_none_match=environ.get('HTTP_IF_NONE_MATCH', '')))
            if reply.stream is not None:
                return bottle.HTTPResponse(reply.stream, reply.status, reply.headers)
            return respond(reply.data if route.bare else {'success': True, 'data': reply.data}, reply.status, reply.headers)
        except BackendError as error:
            return respond(view_error(error), error.status, error.headers)
        except Exception as error:
            error = internal_error(error)
            return respond(view_error(error), error.status, {})
    return called


def departure_of(environ):
    """Return what watches for a client to leave. Under another program's server nothing does, and a heartbeat finds it out."""
    connection = environ.get('agentbackend.socket')
    if connection is None:
        return lambda callback: io.BytesIO()  # has a close()
    return lambda callback: Departure(connection, callback)


def respond(value, status, headers):
    """Return a value as Bottle's JSON response."""
    return bottle.HTTPResponse(encode(value), status, {**headers, 'Content-Type': 'application/json', 'Cache-Control': 'no-store'})


def read_query(schemas, name, text):
    """Return the query as a checked dict: lists, integers and booleans where the schema has them."""
    properties = schemas.documents[name]['properties']
    query = {}
    for key, values in urllib.parse.parse_qs(text, keep_blank_values=True).items():
        kind = properties.get(key, {}).get('type')
        last = values[-1]
        if kind == 'array':
            query[key] = values
        elif kind == 'integer' and re.fullmatch(r'-?\d{1,15}', last):
            query[key] = int(last)
        elif kind == 'boolean' and last in ('true', 'false', '1', '0', ''):
            query[key] = last in ('true', '1', '')
        else:
            query[key] = last
    schemas.check(name, query, where='query')
    return query


def read_body(schemas, name, environ):
    """Return the JSON body, checked; raise ValidationError, or UnsupportedMediaType when it says that it is something else."""
    media_type = environ.get('CONTENT_TYPE', '').partition(';')[0].strip().lower()
    if media_type != 'application/json' and not media_type.endswith('+json'):
        raise UnsupportedMediaType(f"The body must be JSON and say so: send 'Content-Type: application/json' instead of {media_type[:80]!r}.")
    value = parse_json(environ['wsgi.input'].read())
    schemas.check(name, value)
    return value


# ---------------------------------------------------------------------------------------------
# Server
# ---------------------------------------------------------------------------------------------

MAX_CONNECTIONS = 5000
CORS_METHODS = 'GET, HEAD, POST, PUT, PATCH, DELETE'
CORS_EXPOSED = 'Location, X-Session-Id, X-Run-Id, Allow, WWW-Authenticate, Retry-After'


@dataclass
class Backend:
    """The parts, put together. `open` begins what goes on in the background, `close` ends it."""

    config: Config
    schemas: Schemas
    state: State
    events: Events
    engine: Engine
    templates: Templates
    logs: Logs
    workspaces: Workspaces
    agents: Agents
    streams: Streams
    pages: Pages
    started_at: float = field(default_factory=time.monotonic)

    def open(self):
        """Read what is known, and begin to keep up with the engine."""
        self.state.open()
        self.agents.open()
        self.workspaces.open()
        return self

    def close(self):
        """End what goes on here, and write what is known; workspaces and their tasks go on."""
        self.workspaces.close()
        self.agents.close()
        self.state.close()
        self.engine.close()


def make_backend(config):
    """Put the parts together; nothing goes on until `open` is called."""
    state = State(Path(config.state_dir) / f'{config.instance}.json',
                  {'codeServer': config.code_server_ports, 'ssh': config.ssh_ports, 'custom': config.custom_ports})
    events = Events(config.secrets())
    engine = Engine(host=config.docker_host, tls_verify=config.docker_tls_verify, cert_path=config.docker_cert_path, instance=config.instance)
    templates = Templates(engine, [DATA / 'templates', *filter(None, [config.templates_dir])], base_image=config.base_image,
                          debian_mirror=config.debian_mirror, ca_certs=config.extra_ca_certs, timeout=config.build_timeout)
    logs = Logs(events, engine)
    workspaces, agents = Workspaces(config, state, events, engine, templates, logs), Agents(config, state, events, engine)
    workspaces.on_connected.append(agents.resume)
    schemas = Schemas(DATA / 'schemas')
    frame = json.loads((DATA / 'static' / 'openapi-frame.json').read_text())
    pages = Pages(DATA / 'static', openapi_document(ROUTES, schemas, frame))
    return Backend(config, schemas, state, events, engine, templates, logs, workspaces, agents, Streams(config.max_streams), pages)


def make_app(backend):
    """Return the WSGI callable, to be served here or mounted in another program."""
    def talk(websocket, trusted):
        open_websocket(backend, Call({}, {}, None, trusted, None, websocket=websocket))
    return Gate(backend.config, Application(backend), backend.streams, talk)


class Gate:
    """What comes before the routes: who may call, from where, and with how large a body."""

    def __init__(self, config, app, streams, talk):
        self._config = config
        self._app = app
        self._streams = streams
        self._talk = talk  # serves a WebSocket until it ends
        self._hosts = {host.lower() for host in (config.host, *config.allowed_hosts) if host not in ('0.0.0.0', '::')}
        self._origins = {origin.lower().rstrip('/') for origin in config.allowed_origins}
        self._open = [route for route in ROUTES if route.open]

    def __call__(self, environ, start_response):
        origin = environ.get('HTTP_ORIGIN')

        def start(status, headers, exc_info=None):
            return start_response(status, headers + self._cors(origin if allowed else None), exc_info)

        allowed = False
        try:
            self.check_host_and_origin(environ)
            allowed = True
            self._check_path(environ)
            if environ['REQUEST_METHOD'] == 'OPTIONS':
                return self._options(environ, start)
            has_ticket = self._has_ticket(environ)  # which is taken out of the query also when it is not needed
            environ['agentbackend.trusted'] = self._has_token(environ) or has_ticket
            if not environ['agentbackend.trusted'] and not self._is_open(environ['REQUEST_METHOD'].replace('HEAD', 'GET'), environ['PATH_INFO']):
                raise Unauthorized("This server needs its API token: send 'Authorization: Bearer <API_TOKEN>'.",
                                   headers={'WWW-Authenticate': 'Bearer'})
            if environ.get('wsgi.websocket') is not None:
                # Not by way of Bottle: as long as it lasted, it would hold what Bottle keeps of a request.
                self._talk(environ['wsgi.websocket'], environ['agentbackend.trusted'])
                return []
            self._take_body(environ)
        except BackendError as error:
            return self._refuse(environ, start, error)
        return self._app(environ, start)

    def check_host_and_origin(self, environ):
        """Raise Forbidden for a Host that is not ours (DNS rebinding) or a web page of an Origin that is not allowed.

        No Origin means that no browser page is behind the call.
        """
        host = split_host(environ.get('HTTP_HOST', ''))
        if not (is_loopback(host) or host in self._hosts):
            raise Forbidden(f'Host {host[:100]!r} is not allowed here; add it to ALLOWED_HOSTS if it is this server.')
        origin = environ.get('HTTP_ORIGIN')
        if origin is not None and not self._is_allowed_origin(origin.lower()):
            raise Forbidden(f'Origin {origin[:100]!r} is not allowed here; add it to ALLOWED_ORIGINS if you trust its pages.')

    def _is_allowed_origin(self, origin):
        try:
            parts = urllib.parse.urlsplit(origin)
        except ValueError:  # as for http://[
            return False
        return origin in self._origins or (parts.scheme in ('http', 'https') and is_loopback(parts.hostname or '-'))

    @staticmethod
    def _check_path(environ):
        """Refuse a path that is no UTF-8: Bottle would leave out what it can't read, and find another route."""
        try:
            environ['PATH_INFO'].encode('latin-1').decode()
        except UnicodeDecodeError as error:
            raise NotFound('There is nothing here; a path is written in UTF-8.') from error

    def _is_open(self, method, path):
        return any(route.method == method and route.fits(path) for route in self._open)

    def _has_token(self, environ):
        if not self._config.api_token:
            return True
        scheme, _, token = environ.get('HTTP_AUTHORIZATION', '').partition(' ')
        return scheme.lower() == 'bearer' and same_secret(token.strip(), self._config.api_token)

    def _has_ticket(self, environ):
        """Tell whether a stream is asked for with a ticket, and take the ticket out of the query."""
        query = urllib.parse.parse_qsl(environ.get('QUERY_STRING', ''), keep_blank_values=True)
        tickets = [value for key, value in query if key == 'ticket']
        environ['QUERY_STRING'] = urllib.parse.urlencode([(key, value) for key, value in query if key != 'ticket']) if tickets else environ.get('QUERY_STRING', '')
        return environ['REQUEST_METHOD'] == 'GET' and any([self._streams.redeem_ticket(ticket) for ticket in tickets])

    def may_upgrade(self, environ):
        """Tell whether a WebSocket is granted; if not, the request goes on as any other, and is told why not."""
        try:
            self.check_host_and_origin(environ)
        except Forbidden:
            return False
        return environ['PATH_INFO'] == '/agent/ws'

    def _options(self, environ, start):
        methods = [route.method for route in ROUTES if route.fits(environ['PATH_INFO'])]
        if not methods:
            return self._refuse(environ, start, NotFound(f"There is no {environ['PATH_INFO'][:200]} here."))
        headers = [('Allow', ', '.join(dict.fromkeys([*methods, *(['HEAD'] if 'GET' in methods else []), 'OPTIONS'])))]
        if 'HTTP_ACCESS_CONTROL_REQUEST_METHOD' in environ:
            headers += [('Access-Control-Allow-Methods', CORS_METHODS), ('Access-Control-Max-Age', '600'),
                        ('Access-Control-Allow-Headers', 'Authorization, Content-Type, Last-Event-ID')]
        start('204 No Content', headers)
        return []

    @staticmethod
    def _cors(origin):
        if origin is None:
            return [('Vary', 'Origin')]
        return [('Vary', 'Origin'), ('Access-Control-Allow-Origin', origin), ('Access-Control-Expose-Headers', CORS_EXPOSED)]

    def _take_body(self, environ):
        """Read the body, chunked or not, within its limits of size and time."""
        length, chunked = environ.get('CONTENT_LENGTH') or '0', 'HTTP_TRANSFER_ENCODING' in environ
        limit = self._config.max_body
        if chunked and environ['HTTP_TRANSFER_ENCODING'].lower() != 'chunked':  # pywsgi would take such a body for the next request
            raise ValidationError("The only Transfer-Encoding known here is 'chunked'.", headers={'Connection': 'close'})
        if not chunked and (not length.isdigit() or int(length) > limit):
            raise self._too_large(limit)
        body = b''
        if chunked or int(length):
            slow = RequestTimeout(f'The body did not come within REQUEST_TIMEOUT={self._config.request_timeout} s.', headers={'Connection': 'close'})
            try:
                with gevent.Timeout(self._config.request_timeout, slow):
                    body = read_up_to(environ['wsgi.input'], limit + 1 if chunked else int(length))
            except OSError as error:
                raise ValidationError('The body ended too early, or its chunks are no chunks.', headers={'Connection': 'close'}) from error
            if len(body) > limit:
                raise self._too_large(limit)
        environ['wsgi.input'] = io.BytesIO(body)
        environ['CONTENT_LENGTH'] = str(len(body))
        environ.pop('HTTP_TRANSFER_ENCODING', None)  # Bottle would take the chunks apart a second time

    @staticmethod
    def _too_large(limit):
        return PayloadTooLarge(f'The body is larger than MAX_BODY={limit} bytes.', headers={'Connection': 'close'})

    @staticmethod
    def _refuse(environ, start, error):
        body = encode(view_error(error))
        start(f'{error.status} {bottle.HTTP_CODES.get(error.status, "")}',
              [*error.headers.items(), ('Content-Type', 'application/json'), ('Content-Length', str(len(body)))])
        return [b'' if environ['REQUEST_METHOD'] == 'HEAD' else body]


def split_host(text):
    """Return the host of a Host header without its port, in small letters."""
    if text.startswith('['):
        return text[1:].partition(']')[0].lower()
    return text.partition(':')[0].lower()


class Server:
    """The backend behind a port."""

    def __init__(self, backend):
        self.backend = backend
        config = backend.config
        app = make_app(backend)
        handler = type('Connection', (Handler,), {'request_timeout': config.request_timeout, 'may_upgrade': staticmethod(app.may_upgrade),
                                                  'refusal': staticmethod(lambda status, text: encode(view_error(ValidationError(text))))})
        self._server = WSGIServer((config.host, config.port), app, handler_class=handler, spawn=gevent.pool.Pool(MAX_CONNECTIONS),
                                  log=None, error_log=logging.getLogger('agentbackend.http'))
        self._stopping = gevent.event.Event()
        self._lock_file = None

    def open(self):
        """Take the instance's lock and the port, and begin; raise ConfigError when another has one of them."""
        self._lock_instance()
        try:
            self._server.start()
        except OSError as error:
            raise ConfigError(f'PORT={self.backend.config.port}: the server can not listen on HOST={self.backend.config.host}: {error.strerror}.') from error
        try:
            self.backend.open()
        except OSError as error:
            raise ConfigError(f'STATE_DIR={self.backend.config.state_dir!r} cannot be used: {error.strerror}.') from error
        return self

    @property
    def port(self):
        """The port that it listens on, which PORT=0 leaves to the system."""
        return self._server.server_port

    def wait(self):
        """Serve until SIGTERM or SIGINT comes."""
        for number in (signal.SIGTERM, signal.SIGINT):
            gevent.signal_handler(number, self._stopping.set)
        self._stopping.wait()

    def close(self):
        """Take no more calls, let those that go on end, and put everything away."""
        self._server.close()
        self.backend.streams.close()
        self._server.stop(timeout=8)
        self.backend.close()
        if self._lock_file:
            self._lock_file.close()

    def _lock_instance(self):
        """Two servers of one instance would remove each other's half-made workspaces."""
        path = Path(self.backend.config.state_dir) / f'{self.backend.config.instance}.lock'
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock_file = open(path, 'a')
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f'INSTANCE={self.backend.config.instance!r}: another server of that name runs on this STATE_DIR; '
                              'stop it, or choose another INSTANCE and PORT.') from error
        except OSError as error:
            raise ConfigError(f'STATE_DIR={self.backend.config.state_dir!r} cannot be used: {error.strerror}.') from error


def serve(config):
    """Run a server until it is told to stop."""
    server = Server(make_backend(config)).open()
    log.info('Agent Backend %s serves http://%s:%d', VERSION, f'[{config.host}]' if ':' in config.host else config.host, server.port)
    try:
        server.wait()
        log.info('Stopping.')
    finally:
        server.close()


def main():
    """Run the server as the environment says; end with 2 and one line when it says nonsense."""
    try:
        config = Config.from_env(os.environ)
        logging.basicConfig(level=config.log_level, format='%(asctime)s %(levelname)s %(message)s', stream=sys.stderr)
        for chatty in ('urllib3', 'geventwebsocket'):
            logging.getLogger(chatty).setLevel(max(logging.INFO, logging.getLogger().level))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # each stream is an open file, and 1024 is a common limit
        serve(config)
    except ConfigError as error:
        print(f'agentbackend: {error}', file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__':
    main()
