"""What a reader of a workspace or a session is given: what was missed, then what comes."""
import dataclasses
import logging
import time

import gevent

from _agentbackend.errors import DockerError, SessionNotFound, UnreadableLog, WorkspaceNotFound
from _agentbackend.events import DELETED, Event, Subscription
from _agentbackend.positions import (
    BEGINNING,
    LAST_LINE,
    NOT_BEGUN,
    Cursor,
    LogPosition,
    comes_next,
    event_id_of,
    place_of,
)
from _agentbackend.records import CREATING, ERROR, RUNNING
from _agentbackend.tasks import INTERRUPTED

log = logging.getLogger('agentbackend')

HEARTBEAT = 15  # seconds
DEFAULT_TAIL = 100  # lines
CATCH_UP_ROUNDS = 20  # against a container that prints faster than its log is read, there is no end to it


class CatchUp:
    """Brings a reader of a workspace up to now, and then attaches it, so that nothing is lost or repeated in
    between.

    First comes the current status; then, from a cursor on, all that was missed, or without one the last
    `tail` lines. Old lines come from the engine, which has them all; the pump has the new ones. What the
    reader has seen so far is in every id that it is given.
    """

    def __init__(self, backend, workspace_id, reader, pump, *, cursor=None, tail=DEFAULT_TAIL):
        self._backend, self._events = backend, backend.events
        self._workspace_id, self._reader, self._pump, self._tail = workspace_id, reader, pump, tail
        self._fresh = cursor is None
        now = self._events.cursor(workspace_id)
        self._cursor = cursor or now
        self._cursor.begun = min(self._cursor.begun, now.begun)  # an adopted workspace counts its tasks anew
        self._count = self._cursor.count if self._cursor.boot == self._events.boot else 0
        self._position = self._cursor.position.copy() if self._cursor.position else None

    def batches(self):
        """Yield lists of events; an empty one means that there is nothing yet, because the engine is away."""
        if self._fresh and self._pump.ready.wait(0.2) and (
                not self._tail or str(self._pump.position) == str(LogPosition())):
            # No old line tells it, and who comes back with this id must miss nothing.
            self._position = self._pump.position.copy()
        try:
            workspace, told = self._backend.state.get(self._workspace_id), []
        except WorkspaceNotFound:
            yield [self._deletion()]
            return
        if self._fresh:
            self._cursor = self._events.cursor(self._workspace_id)
            self._count = self._cursor.count
            if workspace.status in (CREATING, ERROR) and self._tail:
                told = [event for event in self._events.recent(self._workspace_id)
                        if event.type == 'log'][-self._tail:]
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
        while not self._backend.tasks.wait_until_published(self._workspace_id, timeout=1):
            yield []
        while not self._pump.ready.wait(1):
            yield from self._missed()
            yield []

    def _round(self, live):
        """Give what was missed up to now, while `live` takes what comes; the two meet where the pump is now.
        Then give what `live` took.

        Returns (how many `live` lost, what it has then): nothing of either, unless it comes faster than the
        reader takes it.
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
                yield [event for event in waiting if event.place is None
                       or not self._cursor.has_seen(event.place)]
                self._move_to(Cursor.parse(waiting[-1].id))
                lost, waiting = live.drain()
        finally:
            self._events.detach(self._workspace_id, live)
        return lost, waiting

    def _move_to(self, seen):
        self._count, self._cursor, self._position = seen.count, seen, seen.position or self._position

    def _old_lines(self):
        """Give what the engine holds from the position on, or the last lines; an empty list while it is
        away."""
        while True:
            self._position = self._position and self._position.copy()  # reading begins again
            try:
                tail = self._tail if self._position is None else None
                yield from self._backend.logs.read(self._workspace_id, position=self._position, tail=tail)
                return
            except UnreadableLog as error:
                log.debug('A reader of %s goes on behind what is damaged: %s', self._workspace_id, error)
                return
            except DockerError as error:
                log.debug('A reader of %s waits for the engine: %s', self._workspace_id, error)
            yield []
            gevent.sleep(1)

    def _missed(self):
        """Give what was published since the reader's cursor; of a task that was told of before, only what
        came after."""
        ring, now = self._events.ring(self._workspace_id), self._events.cursor(self._workspace_id)
        held, lost = ring.after(self._count), ring.lost_after(self._count)
        if ring.end_of_dropped > self._count or (self._count == 0 and not self._fresh):
            yield from self._missed_of_tasks()
        batch = [dropped_event(self._workspace_id, lost, self._place())] if lost else []
        for number, event in held:
            self._count = number
            if event.place is not None:
                if self._cursor.has_seen(event.place):
                    continue
                self._cursor.tell(event.place)
            batch.append(self._told(event))
        self._cursor.begin(now.begun)  # nothing was told yet of a task that has only just begun
        yield batch

    def _missed_of_tasks(self):
        """Give what the ring has no more of tasks, or an earlier process published: the files of their runs
        have all of it.

        A task that began after what the reader has seen is told from its beginning; one that was not told to
        its end has a mark.
        """
        cursor = self._cursor
        begun = self._backend.state.runs_begun(self._workspace_id, min([cursor.begun + 1, *cursor.marks]))
        missed = [run for run in begun if run.serial > cursor.begun or run.serial in cursor.marks]
        # The others were deleted.
        cursor.marks = {run.serial: cursor.marks[run.serial] for run in missed if run.serial in cursor.marks}
        for run in missed:
            after = (run.number, *cursor.marks.get(run.serial, NOT_BEGUN))
            for told in replay_with_retry(self._backend, run.session_id, after, run):
                batch = []
                for place, event in told:
                    cursor.tell((run.serial, *place[1:]))
                    batch.append(self._told(event))
                yield batch

    def _told(self, event):
        """Return an event with the id that it has for this reader."""
        return dataclasses.replace(event, id=self._place(), json=None)

    def _deletion(self):
        return Event('status', self._workspace_id, self._place(), time.time(), DELETED)

    def _place(self):
        return str(Cursor(self._events.boot, self._count, self._cursor.begun, self._position,
                          self._cursor.marks))


def status_event(workspace, place):
    """Return the event that tells a new reader the status of a workspace."""
    data = {'status': workspace.status, 'name': workspace.name}
    if workspace.error:
        data['error'] = workspace.error
    return Event('status', workspace.id, place, time.time(), data)


def dropped_event(workspace_id, lost, place):
    """Return the event that tells a slow reader how much it has missed."""
    return Event('error', workspace_id, place, time.time(),
                 {'code': 'EVENTS_DROPPED', 'count': lost,
                  'message': f'{lost} events were dropped, because this reader is slower than they came.'})


def is_end(batch):
    """Tell whether events hold the last one of a workspace; what an agent says is not meant."""
    return any(event.type == 'status' and event.data.get('deleted') for event in batch)


def workspace_events(backend, workspace_id, *, cursor, tail, watch_disconnect):
    """Yield lists of events of a workspace for ever, an empty one as a sign of life; ends with the workspace
    or the reader.

    `watch_disconnect(callback)` gives an object that calls back when the client leaves, and that is closed in
    the end.
    """
    reader, place = Subscription(), ''
    watch = watch_disconnect(reader.close)
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


def session_events(backend, session_id, *, after, watch_disconnect, task=None):
    """Yield lists of events of a session for ever, or to the end of `task` (session, run); an empty one as a
    sign of life.

    The session may be yet to come. What this process did not see, or a slow reader missed, comes from the
    files of the runs.
    """
    reader = Subscription()
    watch = watch_disconnect(reader.close)
    try:
        with backend.streams.opened(reader):
            while not backend.tasks.wait_until_published(session_id, timeout=1):
                yield []
                if reader.closed:
                    return
            batches = session_batches(backend, session_id, reader, after)
            yield from ([event for _, event in batch]
                        for batch in (up_to_the_end(backend, batches, *task) if task else batches))
    finally:
        watch.close()
        backend.events.detach(session_id, reader)


def session_batches(backend, session_id, reader, after):
    """Yield lists of (place, event) of a session after a place, until the reader is closed."""
    after, lost = backend.tasks.place_in(session_id, after), True
    while not reader.closed:
        if lost:
            reader.drain()
            backend.events.attach(session_id, reader)
            for batch in replay_since(backend, session_id, after):
                if reader.closed:
                    return
                after = batch[-1][0] if batch else after
                yield batch
        lost, waiting = reader.take(HEARTBEAT)
        # A workspace's id in the place of a session's gives that one's events, which have other ids.
        batch = [(place_of(event.id), event) for event in waiting
                 if event.session_id == session_id] if not lost else []
        if batch and batch[0][0] == (1, 0, 0) and after >= (1, LAST_LINE, 0):
            after = BEGINNING  # a session that was deleted begins anew
        batch = [(place, event) for place, event in batch if place > after]
        after = batch[-1][0] if batch else after
        yield batch


def up_to_the_end(backend, batches, session, run):
    """Yield lists of (place, event) as they come, up to the last event of a run; one whose session was
    deleted meanwhile is given an end."""
    end = (run.number, LAST_LINE, 0)
    for batch in batches:
        if not batch and not backend.tasks.knows(session):
            yield [(end, Event('error', session.workspace_id, event_id_of(end), time.time(),
                               {'runId': run.id, 'code': INTERRUPTED.code, 'message': INTERRUPTED.message},
                               session.id))]
            return
        batch = [(place, event) for place, event in batch if place <= end]
        yield batch
        if batch and batch[-1][0] == end:
            return


def replay_since(backend, session_id, after):
    """Yield lists of (place, event) of what has been published of a session after a place: from the ring if
    that goes back far enough."""
    held = [(place_of(event.id), event) for event in backend.events.recent(session_id)
            if event.session_id == session_id]
    if held and comes_next(held[0][0], after):
        yield [(place, event) for place, event in held if place > after]
    else:
        yield from replay_with_retry(backend, session_id, after)


def replay_with_retry(backend, session_id, after, run=None):
    """Yield the same from the files of the runs, or of one run, also when the engine goes away; then empty
    lists until it is back."""
    while True:
        try:
            for batch in replay_once(backend, session_id, after, run):
                after = batch[-1][0] if batch else after
                yield batch
            return
        except DockerError as error:
            log.debug('A reader of session %s waits for the engine: %s', session_id, error)
        yield []
        gevent.sleep(1)


def replay_once(backend, session_id, after, run=None):
    """Yield the same as long as the engine answers; an empty list of a session that there is not."""
    try:
        session = backend.state.session(session_id)
    except SessionNotFound:
        yield []
        return
    barrier = backend.tasks.published.get(session_id, BEGINNING)
    running = session.last.number if session.last.state == RUNNING else None
    for batch in backend.tasks.replay(session, after, [run] if run is not None else None):
        published = [(place, event) for place, event in batch if place[0] != running or place <= barrier]
        yield published
        if len(published) < len(batch):
            return
