"""What containers print, followed once for all who read it."""
import contextlib
import logging
import time

import gevent
import gevent.event

from _agentbackend.dockerlog import parse_stamp
from _agentbackend.errors import ConflictOnEngine, EngineUnavailable, MissingOnEngine, UnreadableLog
from _agentbackend.positions import MARGIN, LogPosition

log = logging.getLogger('agentbackend')

# Seconds a log is followed after its last reader left: a page that is loaded again comes back at once.
LINGER = 10
READY_TIMEOUT = 2  # seconds: the last line may have been rotated away before it was reached
LOG_POLL = 5  # seconds between looks at a container that does not run, if nobody said that it changed


class Pump:
    """One stream that follows the container of a workspace for all its readers."""

    def __init__(self, workspace_id, topic):
        self.workspace_id, self.topic = workspace_id, topic
        self.position = None  # how far it has read; None until the container was seen
        # It has come to the end of what there was: from here on its topic has all that is printed.
        self.ready = gevent.event.Event()
        self.changed = gevent.event.Event()
        self.readers = 0
        self.target = None  # the line with which it has come to the end of what there was, as (stream, stamp)
        self.finished = None  # id of a container that was read to its end
        # Id of a container whose log the engine can't read: only what it prints from then on can be told.
        self.damaged = None
        self.greenlet = None


class Logs:
    """The logs of containers, as events while somebody reads them. A pump is shared, begins with its first
    reader and ends after its last."""

    def __init__(self, events, engine):
        self._events = events
        self._engine = engine
        self._pumps = {}

    def watch(self, workspace_id):
        """Keep the pump of a workspace going until `unwatch`, and return it."""
        pump = self._pumps.get(workspace_id)
        if pump is None:
            pump = self._pumps[workspace_id] = Pump(workspace_id, self._events.topic(workspace_id))
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
        """Yield lists of lines that the engine holds now, from a position on or the last `tail`; nothing
        without a container."""
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
            pump.topic.cursor.log = None
            pump.topic.begin_anew()
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
        """Publish what the container prints until it ends; read again from the last line when only the stream
        ended."""
        while True:
            container = self._engine.find(pump.workspace_id)
            try:
                if pump.position is None:
                    self._begin(pump, container)
                if container is None or not container.started or (
                        pump.finished == container.id and not container.up):
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
        if pump.ready.is_set():
            pump.topic.cursor.log = pump.position
        tail = 0 if pump.damaged == container.id else None
        with contextlib.suppress(MissingOnEngine, ConflictOnEngine):  # a conflict: it is being removed
            for lines in self._engine.log_lines(container, since=pump.position.since(), tail=tail,
                                                follow=True):
                if pump.ready.is_set():
                    self._events.publish_lines(pump.workspace_id, pump.topic, lines)
                    pump.topic.breathe()
                elif pump.position.advance(lines) and pump.position.covers(*pump.target):
                    self._begin_to_publish(pump)

    def _begin_to_publish(self, pump):
        """From now on, what comes goes into the ring; what came before is in the archive."""
        if not pump.ready.is_set():
            pump.topic.cursor.log = pump.position
            pump.ready.set()
            pump.topic.begin_anew()

    def _go_on_behind(self, pump, container, error):
        """Leave out what is damaged: after a power failure or on a full disk, an engine has written what it
        can't read."""
        if pump.damaged != container.id:
            log.warning('The log of workspace %s is damaged: %s', pump.workspace_id, error)
            self._events.publish('error', pump.workspace_id,
                                 {'code': error.code, 'message': f'Lines are missing here. {error}'})
        pump.damaged = container.id
        pump.position = pump.position or LogPosition.at(time.time_ns())
        self._begin_to_publish(pump)
        gevent.sleep(1)

    def _begin(self, pump, container):
        """Begin a little before the last line that there is; the pump is ready when it has come to that line.

        Readers attach only then, and take what is older from the engine.
        """
        lines = [line for batch in self._engine.log_lines(container, tail=1)
                 for line in batch] if container and container.started else []
        if lines:
            pump.position, pump.target = LogPosition.at(parse_stamp(lines[-1][1]) - MARGIN), lines[-1][:2]
            gevent.spawn_later(READY_TIMEOUT, self._begin_to_publish, pump)
        else:
            pump.position = LogPosition()
            self._begin_to_publish(pump)
