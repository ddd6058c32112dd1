"""What happened, told to readers who are positions: a ring of batches per topic, and behind it an archive
that has the rest."""
import collections
import contextlib
import functools
import time
from dataclasses import dataclass

import gevent

from _agentbackend.positions import LAST_LINE, Cursor, event_id_of
from _agentbackend.records import DELETING
from _agentbackend.views import to_json, view_event, view_frames, view_lines, view_sse, view_steps

RING_BYTES = 4 * 2**20  # of what a topic holds, as it is sent
OVERHEAD = 300  # bytes of an event on the wire, beside what it says
LINGER = 10  # seconds for which what nobody reads any more is kept: who was cut off comes back at once
MANY = 50  # readers, for whom what comes is collected for a while
BREATH, MAX_BREATH = 5e-5, 0.1  # seconds: for each of them, and for all
EVERYTHING = '*'  # the topic of every workspace's status
DELETED = {'status': DELETING, 'deleted': True}  # data of a workspace's last event


@dataclass(slots=True)
class Event:
    """One thing that happened. `timestamp` is seconds since the epoch; `session_id` is None outside of agent
    tasks.

    `id` is a position in its topic: who has seen it has seen everything before it.
    """

    type: str
    workspace_id: str
    id: str
    timestamp: float
    data: dict
    session_id: str = None


class Batch:
    """What came together: encoded once for all its readers, when the first of them wants it.

    `last_id` is the id of the last event in it: the position of whoever has read it.
    """

    def __init__(self, *events):
        self.events = events
        self.workspace_id, self.last_id = events[-1].workspace_id, events[-1].id
        self.size = sum(OVERHEAD + len(str(event.data)) for event in events)

    def rows(self):
        """Return (id, JSON) of each event."""
        return [(event.id, view_event(event)) for event in self.events]

    @functools.cached_property
    def sse(self):
        """All of it as SSE text."""
        return view_sse(self.rows())

    @functools.cached_property
    def frames(self):
        """All of it as WebSocket frames."""
        return view_frames(self.rows())

    @property
    def text(self):
        """The lines of a log in it, as plain text."""
        return ''.join(f"{event.data['message']}\n" for event in self.events if event.type == 'log')

    @property
    def is_end(self):
        """Whether it holds the last event of a workspace."""
        return any(event.type == 'status' and event.data.get('deleted') for event in self.events)


class Lines(Batch):
    """Lines of a log, (position, stream, stamp, text), of which none is made an event; they come behind the
    position `before`."""

    is_end = False

    def __init__(self, workspace_id, lines, cursor, before=None):
        self.workspace_id, self.lines, self.before = workspace_id, lines, before
        self.head, self.tail = cursor.head, cursor.tail
        self.last_id = f'{self.head}{lines[-1][0]}{self.tail}'
        self.size = sum([len(line[3]) for line in lines]) + OVERHEAD * len(lines)

    def rows(self):
        """Yield (id, JSON) of each event."""
        return view_lines(self.workspace_id, self.lines, self.head, self.tail)

    @property
    def text(self):
        """The lines as plain text."""
        return plain(self.lines)


class Steps(Batch):
    """Events of a task, (place, type, data, seconds); `id_of` gives their ids from their places, and
    `shown` is what `view_steps` makes of them, or comes with the size from a batch `like` this one."""

    is_end, text = False, ''

    def __init__(self, run, steps, id_of, shown=None, *, like=None):
        self.workspace_id, self.last_id = run.workspace_id, id_of(steps[-1][0])
        self.run, self.steps, self.id_of = run, steps, id_of
        if like is not None:
            self.shown, self.size = like.shown, like.size
            return
        self.shown = shown or view_steps(run, steps)
        # A small number or list takes some ten times the room of its text.
        self.size = OVERHEAD * len(steps) + sum([
            len(value) if isinstance(value, str) else 10 * len(repr(value))
            for _, _, data, _ in steps for value in data.values()])

    def rows(self):
        """Yield (id, JSON) of each event."""
        for place, start, end in self.shown:
            event_id = self.id_of(place)
            yield event_id, f'{start}{event_id}{end}'


def plain(lines):
    """Return lines of a log, whose last part is what they say, as plain text."""
    return '\n'.join([line[-1] for line in lines] + ['']) if lines else ''


class Topic:
    """A ring of the last batches; what is no more in it is in the archive.

    A reader is anything with `wake()`; where it is in the ring, it knows by itself. Nothing but `breathe`
    switches to another greenlet, so that it needs no lock and a reader can't delay a publisher.
    """

    def __init__(self):
        self.cursor = Cursor()  # of a workspace's: where it is now
        self.end = 0  # how many batches were put
        self.forgotten = False  # it is to go with its last reader
        self._batches, self._bytes, self._readers = collections.deque(), 0, set()

    @property
    def is_read(self):
        """Whether anybody reads it."""
        return bool(self._readers)

    def put(self, batch):
        """Let all readers have a batch."""
        self._batches.append(batch)
        self.end += 1
        self._bytes += batch.size
        while self._bytes > RING_BYTES and len(self._batches) > 1:
            self._bytes -= self._batches.popleft().size
        self._wake()

    def breathe(self):
        """Let its readers take what was put before more is read for them: so they have much at once, and each
        write costs as much as many lines."""
        gevent.sleep(min(MAX_BREATH, len(self._readers) * BREATH) if len(self._readers) > MANY else 0)

    def after(self, position):
        """Return the batches from a position to the end; None when some of them are held no more."""
        count = self.end - position
        return [self._batches[index] for index in range(-count, 0)] if count <= len(self._batches) else None

    def held(self):
        """Return all batches that are in it."""
        return list(self._batches)

    def begin_anew(self):
        """Send all readers to the archive, since another source has come or gone."""
        self._batches.clear()
        self.end, self._bytes = self.end + 1, 0
        self._wake()

    def attach(self, reader):
        """Wake a reader from now on when there is something."""
        self._readers.add(reader)

    def detach(self, reader):
        """End that; twice is fine."""
        self._readers.discard(reader)

    def _wake(self):
        for reader in self._readers:
            reader.wake()


class Events:
    """The topics: one of each workspace, one of each session, and one of every workspace's status.

    What workspaces say of themselves is kept by `state`, their logs by the engine, and what tasks do in files
    of their own: these are the archive.
    """

    def __init__(self, state, secrets=()):
        self._state = state
        self._secrets = [secret for secret in secrets if len(secret) >= 6]
        self._in_json = [to_json(secret)[1:-1] for secret in self._secrets]
        self._topics = {}

    def topic(self, name):
        """Return a topic: of the id of a workspace, of ('session', id), or of EVERYTHING."""
        if name not in self._topics:
            self._topics[name] = topic = Topic()
            topic.cursor.own = self._state.told(name)
            topic.forgotten = isinstance(name, tuple)  # a session without a task is told from its files
        return self._topics[name]

    def held(self, name):
        """Return the batches that the ring of a topic holds."""
        return self._topics[name].held() if name in self._topics else []

    def publish(self, kind, workspace_id, data):
        """Publish an event of a workspace's own."""
        timestamp, data, topic = time.time(), self.redact(data), self.topic(workspace_id)
        topic.cursor.own = self._state.keep_event(workspace_id, kind, timestamp, data)
        batch = Batch(Event(kind, workspace_id, str(topic.cursor), timestamp, data))
        topic.put(batch)
        if kind == 'status':
            self.topic(EVERYTHING).put(batch)

    def publish_lines(self, workspace_id, topic, lines):
        """Publish those lines of a log, (stream, stamp, text), that the cursor of its topic has not seen."""
        before = topic.cursor.log.copy()
        lines = topic.cursor.log.advance(lines)
        if lines:
            topic.put(Lines(workspace_id, self.redact_lines(lines), topic.cursor, before))

    def publish_steps(self, run, steps):
        """Publish events of a task, (place, type, data, seconds or None), to its workspace and to its
        session."""
        cursor = self.topic(run.workspace_id).cursor
        now, session = time.time(), self.topic(('session', run.session_id))
        steps = [(place, kind, data, at or now) for place, kind, data, at in steps]
        shown = view_steps(run, steps)
        if self._is_secret(''.join([end for _, _, end in shown])):  # JSON may have hidden it in its line
            steps = [(place, kind, self.redact(data), at) for place, kind, data, at in steps]
            shown = view_steps(run, steps)
        batch = Steps(run, steps, cursor.ids_of(run.serial), shown)
        self.topic(run.workspace_id).put(batch)
        session.put(Steps(run, steps, event_id_of, like=batch))
        session.forgotten = steps[-1][0][1] == LAST_LINE
        cursor.tell(run.serial, *steps[-1][0][1:])
        if session.forgotten:
            gevent.spawn_later(LINGER, self._let_go, ('session', run.session_id))

    def _is_secret(self, text):
        return any(secret in text for secret in self._in_json)

    def redact(self, value):
        """Return a value with every known secret struck out of its texts."""
        if not self._secrets:
            return value
        if isinstance(value, str):
            for secret in self._secrets:
                value = value.replace(secret, '***')
            return value
        if isinstance(value, dict):
            return {self.redact(key): self.redact(item) for key, item in value.items()}
        return [self.redact(item) for item in value] if isinstance(value, list) else value

    def redact_lines(self, lines):
        """Return the same of lines of a log."""
        return [(*line[:-1], self.redact(line[-1])) for line in lines] if self._secrets else lines

    @contextlib.contextmanager
    def attached(self, name, reader):
        """Wake a reader of a topic for the length of a block."""
        self.topic(name).attach(reader)
        try:
            yield
        finally:
            self.detach(name, reader)

    def detach(self, name, reader):
        """Let a reader go, and after a while, in which it may come back, a topic of which nothing has to be
        known."""
        topic = self._topics.get(name)
        if topic is not None:
            topic.detach(reader)
            if topic.forgotten and not topic.is_read:
                gevent.spawn_later(LINGER, self._let_go, name)

    def forget(self, name):
        """Drop a topic that is no more, as soon as nobody reads it."""
        self.topic(name).forgotten = True
        self._let_go(name)

    def _let_go(self, name):
        topic = self._topics.get(name)
        if topic is not None and topic.forgotten and not topic.is_read:
            del self._topics[name]
