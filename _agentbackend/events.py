"""What happened, kept in a ring per topic, handed to bounded subscriptions."""
import collections
import dataclasses
import re
import time
from dataclasses import dataclass

import gevent
import gevent.event

from _agentbackend.dockerlog import STREAM_NAMES
from _agentbackend.positions import NOT_BEGUN, Cursor, event_id_of
from _agentbackend.records import DELETING

RING_SIZE = 5000  # events kept per topic
RING_BYTES = 4 * 2**20  # and how large they may be together
QUEUE_SIZE = 1000  # events that wait for one reader
QUEUE_BYTES = 4 * 2**20  # and how large they may be together
EVERYTHING = '*'  # the topic of every workspace's status
DELETED = {'status': DELETING, 'deleted': True}  # data of a workspace's last event
# What the entrypoint of a workspace says of its way to readiness, which is told as `progress`.
PROGRESS = re.compile(r'workspace: (clone|submodules|large files|setup): (.*)')
STEPS = re.compile(r'(?:(\d{1,9})/(\d{1,9}) |.*?(?<!\d)(\d{1,3})%)', re.A)


@dataclass(slots=True)
class Event:
    """One thing that happened. `timestamp` is seconds since the epoch; `session_id` is None outside of agent
    tasks.

    `id` is a position in its topic: who has seen it has seen everything before it. `json` keeps what it was
    encoded to, so that it is encoded once for all its readers.
    """

    type: str
    workspace_id: str
    id: str
    timestamp: float
    data: dict
    session_id: str = None
    place: tuple = None  # of a task's: (serial number of the run, line, number in the line)
    size: int = 200  # bytes, roughly
    json: bytes = None


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
        """Return how many events that came after a count are kept nowhere any more; those of a task are in
        its file."""
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

    Everything here is done without a switch between greenlets, so that it needs no lock and a reader can't
    delay a publisher.
    """

    def __init__(self, secrets=()):
        self._secrets = [secret for secret in secrets if len(secret) >= 6]
        self._cursors = {}  # workspace id -> Cursor, of which count is not kept: all topics share one
        self._rings = {}  # topic -> Ring
        self._readers = collections.defaultdict(set)
        self.boot = f'{int(time.time() * 1000):x}'  # ids of another process mean nothing here
        self.count = 0
        self.positions = {}  # workspace id -> how far its log has been published, as text

    def publish(self, event_type, workspace_id, data, *, run=None, place=None, timestamp=None):
        """Publish an event to the topic of its workspace, and return it.

        One of a run, at a place of its session, goes to the topic of the session too, where it has an id of
        its own.
        """
        self.count += 1
        data = self.redact(data)
        event = Event(event_type, workspace_id, '', timestamp or time.time(), data)
        # A small number or list takes some ten times the room of its text.
        event.size += sum(len(value) if isinstance(value, str) else 10 * len(repr(value))
                          for value in data.values())
        if run is not None:
            event.session_id, event.place = run.session_id, (run.serial, *place[1:])
            self._cursor(workspace_id).tell(event.place)
        event.id = self.place(workspace_id)
        self._deliver(workspace_id, event)
        if run is not None:
            self._deliver(run.session_id, dataclasses.replace(event, id=event_id_of(place)))
        if event_type == 'status':
            self._deliver(EVERYTHING, event, told=self._readers.get(workspace_id, ()))
        return event

    def begin(self, workspace_id, serial):
        """Note that a task has begun: from now on the ids of its workspace say how far it was told."""
        self._cursor(workspace_id).begin(serial)

    def restore(self, workspace_id, begun, serials):
        """Note how many tasks had begun when this process did; those of `serials` had not ended."""
        self._cursors[workspace_id] = Cursor(self.boot, 0, begun, marks=dict.fromkeys(serials, NOT_BEGUN))

    def cursor(self, workspace_id):
        """Return where the topic of a workspace is now, without its log."""
        cursor = self._cursor(workspace_id)
        return Cursor(self.boot, self.count, cursor.begun, marks=dict(cursor.marks))

    def place(self, workspace_id):
        """Return where the topic of a workspace is now, as the id of an event."""
        cursor = self._cursor(workspace_id)
        cursor.count, cursor.position = self.count, self.positions.get(workspace_id, '')
        return str(cursor)

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

    def publish_lines(self, workspace_id, lines, position):
        """Publish lines of a log, (stream, stamp, text), as far as `position` has not seen them.

        They are kept by the engine, so not in the ring too.
        """
        cursor = self._cursor(workspace_id)
        cursor.count, cursor.position = self.count, position
        for event in self.log_events(workspace_id, lines, position, cursor.__str__):
            for reader in self._readers.get(workspace_id, ()):
                reader.put(event)
        self.positions[workspace_id] = str(position)

    def log_events(self, workspace_id, lines, position, place):
        """Yield an event for each line that `position` has not seen, and move it on; `place()` gives its
        id."""
        for stream, stamp, text in lines:
            if position.advance(stream, stamp):
                progress = PROGRESS.match(text)
                kind, data = ('progress', progress_of(*progress.groups())) if progress else (
                    'log', {'stream': STREAM_NAMES[stream], 'message': self.redact(text)})
                yield Event(kind, workspace_id, place(), stamp / 1e9, data, size=200 + len(text))

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

    def forget(self, topic):
        """Drop the ring of a topic that is no more."""
        self._rings.pop(topic, None)
        self.positions.pop(topic, None)
        self._cursors.pop(topic, None)

    def _cursor(self, workspace_id):
        if workspace_id not in self._cursors:
            self._cursors[workspace_id] = Cursor(self.boot, 0, 0)
        return self._cursors[workspace_id]

    def _deliver(self, topic, event, told=()):
        if topic not in self._rings:
            self._rings[topic] = Ring()
        self._rings[topic].append(self.count, event)
        for reader in [reader for reader in self._readers.get(topic, ()) if reader not in told]:
            reader.put(event)


def progress_of(phase, message):
    """Return the data of the progress event for a word of the entrypoint: `2/3 npm ci`, or something in
    percent."""
    found = STEPS.match(message)
    step, total, percent = found.groups() if found else (None, None, None)
    return {'phase': phase, 'step': int(step or percent or 0), 'total': int(total or 100) if found else None,
            'message': message}
