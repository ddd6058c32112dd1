"""What a reader of a workspace or a session is given: what was missed, from the archives, and then what
comes."""
import contextlib
import json
import logging
import time

import gevent
import gevent.event

from _agentbackend.dockerlog import parse_stamp
from _agentbackend.errors import DockerError, SessionNotFound, UnreadableLog, WorkspaceNotFound
from _agentbackend.events import DELETED, EVERYTHING, Batch, Event, Lines, Steps
from _agentbackend.positions import (
    LAST_LINE,
    NOT_BEGUN,
    Cursor,
    LogPosition,
    comes_next,
    event_id_of,
    place_of,
)
from _agentbackend.records import CREATING, ERROR
from _agentbackend.tasks import INTERRUPTED
from _agentbackend.timing import cooperatively, parse_since

log = logging.getLogger('agentbackend')

HEARTBEAT = 15  # seconds
DEFAULT_TAIL = 100  # lines
READY_TIMEOUT = 0.2  # seconds for which a log is waited for before the first word


class Feed:
    """A reader of a topic, which is no more than a position: in its ring, or, when it is behind that, in the
    archive.

    `on_wake`, if given, is called when there may be something to take; it must not block.
    """

    def __init__(self, backend, name, on_wake=None):
        self._backend, self.name, self._on_wake = backend, name, on_wake
        self._topic = backend.events.topic(name)
        self._topic.attach(self)
        self._woken = gevent.event.Event()
        self._index = 0  # in the ring, unless it is behind
        self.last_id = ''
        self.behind, self.closed = True, False

    def wake(self):
        """Let the reader look again."""
        self._woken.set()
        if self._on_wake is not None:
            self._on_wake()

    def take(self):
        """Return the batches of the ring that the reader has not had; it may turn out to be behind."""
        found = self._topic.after(self._index)
        if found is None:
            self.behind = True
            return []
        if found:
            self._index += len(found)
            self.last_id = found[-1].last_id
        return found

    def catch_up(self):
        """Yield the batches that the archive has, up to where the ring is, where the reader then is too; None
        is a sign of life."""
        raise NotImplementedError

    def batches(self):
        """Yield lists of batches until it is closed; an empty one is a sign of life."""
        while not self.closed:
            for batch in self.catch_up() if self.behind else ():
                yield [batch] if batch is not None else []
                if self.closed:
                    return
            self._woken.clear()
            found = self.take()
            if not found and not self.behind and not self.closed:
                self._woken.wait(HEARTBEAT)
                found = self.take()
            yield found

    def close(self):
        """Let the reader go on to its end."""
        self.closed = True
        self.wake()

    def release(self):
        """Give back what it holds."""
        self.closed = True
        self._backend.events.detach(self.name, self)

    def _wait(self, seconds):
        self._woken.clear()
        self._woken.wait(seconds)


class WorkspaceFeed(Feed):
    """A reader of a workspace. First comes the current status; then, from a cursor on, all that was missed,
    or without one the last `tail` lines; then what comes."""

    def __init__(self, backend, workspace_id, *, cursor=None, tail=DEFAULT_TAIL, on_wake=None):
        super().__init__(backend, workspace_id, on_wake)
        self._pump = backend.logs.watch(workspace_id)
        self._fresh, self._cursor, self._tail = cursor is None, cursor, tail

    def release(self):
        """Give back what it holds."""
        super().release()
        self._backend.logs.unwatch(self._pump)

    def catch_up(self):
        """Yield the batches of what the reader's cursor has not, source by source."""
        if self.last_id:
            self._cursor = Cursor.parse(self.last_id)
        try:
            if not self.last_id:
                yield from self._begin()
            while self.behind:
                while not self._backend.tasks.wait_until_published(self.name, timeout=1):
                    yield None
                self._backend.state.get(self.name)
                # From here to the next yield there is no switch: the cursor is where the ring ends.
                self._index, now = self._topic.end, self._topic.cursor.copy()
                known = now.log is not None
                now.log = now.log or self._cursor.log
                yield from self._missed(now)
                self._cursor, self.last_id = now, str(now)
                self.behind = not known  # the ids of the ring say nothing of the log yet
                if self.behind:
                    yield None
                    self._wait(1)
        except WorkspaceNotFound:
            self._backend.events.forget(self.name)
            yield Batch(Event('status', self.name, str(self._cursor or Cursor()), time.time(), DELETED))

    def _begin(self):
        if self._fresh:
            self._pump.ready.wait(READY_TIMEOUT)
        workspace, now = self._backend.state.get(self.name), self._topic.cursor.copy()
        built = []
        if self._fresh:
            # No old line may come that tells where the log is, and who comes back with this id must miss
            # nothing.
            now.log = now.log if not self._tail or str(now.log) == str(LogPosition()) else None
            self._cursor = now
            if workspace.status in (CREATING, ERROR) and self._tail:
                _, told = self._backend.state.events(self.name)
                built = [event for event in told if event[1] <= now.own and event[2] == 'log'][-self._tail:]
        else:
            cursor = self._cursor
            # An adopted workspace counts anew.
            cursor.begun = min(cursor.begun, now.begun)
            cursor.own = cursor.own if cursor.own <= now.own else 0
        # Each of these ids is one behind which all that follows here comes again, and nothing before.
        told = self._cursor.copy()
        told.own = built[0][1] - 1 if built else told.own
        yield Batch(status_event(self._backend, workspace, str(told)))
        if built:
            ids = [str(Cursor(event[1], told.begun, told.log, told.marks)) for event in built]
            yield Batch(*(self._own_event(*event, event_id=event_id)
                          for event, event_id in zip(built, ids, strict=True)))

    def _missed(self, now):
        cursor = self._cursor
        lost, told = self._backend.state.events(self.name, after=cursor.own)
        if lost:
            yield Batch(dropped_event(self.name, lost, str(cursor)))
        told = [event for event in told if event[1] <= now.own]
        for event in told:
            cursor.own = event[1]
            yield Batch(self._own_event(*event, event_id=str(cursor)))
        cursor.own = now.own
        if (cursor.begun, cursor.marks) != (now.begun, now.marks):
            yield from self._missed_of_tasks(cursor, now)
        if str(cursor.log) != str(now.log):
            yield from self._missed_lines(cursor, now.log)

    @staticmethod
    def _own_event(workspace_id, _, kind, timestamp, data, *, event_id):
        return Event(kind, workspace_id, event_id, timestamp, data)

    def _missed_of_tasks(self, cursor, now):
        """Yield what tasks have written. One that began after what the reader has seen is told from its
        beginning; one that was not told to its end has a mark."""
        begun = self._backend.state.runs_begun(self.name, min([cursor.begun + 1, *cursor.marks]))
        missed = [run for run in begun if (run.serial > cursor.begun or run.serial in cursor.marks)
                  and run.serial <= now.begun]
        # The others were deleted.
        cursor.marks = {run.serial: cursor.marks[run.serial] for run in missed if run.serial in cursor.marks}
        for run in missed:
            after = (run.number, *cursor.marks.get(run.serial, NOT_BEGUN))
            upto = (run.number, *now.marks.get(run.serial, (LAST_LINE, 0)))
            cursor.begin(run.serial)
            for _, steps in replay(self._backend, run.session_id, after, upto, run):
                if steps:
                    yield Steps(run, steps, cursor.ids_of(run.serial))
                    cursor.tell(run.serial, *steps[-1][0][1:])
                else:
                    yield None

    def _missed_lines(self, cursor, end):
        """Yield the log from the cursor on, or its last lines, up to a position: from the ring if that goes
        back so far, else from the engine."""
        redact = self._backend.events.redact_lines
        held = [batch for batch in self._topic.held() if isinstance(batch, Lines)]
        if held and cursor.log is not None and held[0].before.is_before(cursor.log):
            lines = [line[1:] for batch in held for line in batch.lines if end.covers(*line[1:3])]
            cursor.log = cursor.log.copy()
            lines = cursor.log.advance(lines)
            if lines:
                yield Lines(self.name, lines, cursor)
            return
        while True:
            position = cursor.log = cursor.log and cursor.log.copy()  # reading begins again
            try:
                for lines in self._backend.logs.read(self.name, position=position,
                                                     tail=self._tail if position is None else None):
                    if position is None and lines:
                        first = min(parse_stamp(stamp) for _, stamp, _ in lines)
                        position = cursor.log = LogPosition.at(first - 1)
                    covered = [line for line in lines if end.covers(*line[:2])]
                    batch = position.advance(covered) if covered else ()
                    yield Lines(self.name, redact(batch), cursor) if batch else None
                    if lines and end.ends_before(lines[0][1]):
                        return
                return
            except UnreadableLog as error:
                log.debug('A reader of %s goes on behind what is damaged: %s', self.name, error)
                return
            except DockerError as error:
                log.debug('A reader of %s waits for the engine: %s', self.name, error)
            yield None
            gevent.sleep(1)


class SessionFeed(Feed):
    """A reader of a session, which may be yet to come, after a place in it; with `task`, (session, run), to
    the end of that."""

    def __init__(self, backend, session_id, *, after, task=None):
        super().__init__(backend, ('session', session_id))
        self._session_id, self._task, self.last_id = session_id, task, event_id_of(after)

    def catch_up(self):
        """Yield the batches of what the runs have written since the reader's place."""
        while not self._backend.tasks.wait_until_published(self._session_id, timeout=1):
            yield None
        tasks = self._backend.tasks
        # From here to the next yield there is no switch: what was told is what is behind the ring's end.
        self._index, upto = self._topic.end, tasks.told(self._session_id)
        after = tasks.place_in(self._session_id, place_of(self.last_id))
        for run, steps in replay(self._backend, self._session_id, after, upto):
            self.last_id = event_id_of(steps[-1][0]) if steps else self.last_id
            yield Steps(run, steps, event_id_of) if steps else None
        self.behind = False
        yield None

    def batches(self):
        """Yield lists of batches, up to the end of the task if one is given; a task whose session was deleted
        meanwhile is given an end."""
        if self._task is None:
            yield from super().batches()
            return
        session, run = self._task
        end = event_id_of((run.number, LAST_LINE, 0))
        for found in super().batches():
            if not found and not self._backend.tasks.knows(session):
                said = {'runId': run.id, 'code': INTERRUPTED.code, 'message': INTERRUPTED.message}
                found = [Batch(Event('error', session.workspace_id, end, time.time(), said, session.id))]
            ids = [batch.last_id for batch in found]
            if end in ids:
                yield found[:ids.index(end) + 1]
                return
            yield found


class EverythingFeed(Feed):
    """A reader of the status of each workspace: first what it is, then what it becomes."""

    def __init__(self, backend, on_wake):
        super().__init__(backend, EVERYTHING, on_wake)

    def catch_up(self):
        """Yield the status of each workspace."""
        self._index = self._topic.end
        for workspace in self._backend.state.all():
            with contextlib.suppress(WorkspaceNotFound):  # deleted meanwhile
                workspace = self._backend.state.get(workspace.id)
                yield Batch(status_event(self._backend, workspace, str(self._topic.cursor)))
        self.behind = False


def cursor_of(backend, workspace, call):
    """Return the Cursor from which on a routing.Call asks for the events of a workspace, or None: what the
    client says, else what its browser remembers, else a time."""
    text = call.query.get('after', call.last_event_id)
    return Cursor.parse(text) if text else cursor_since(backend, workspace, call)


def cursor_since(backend, workspace, call):
    """Return the Cursor from which on a log is asked for by a time, or None."""
    if 'since' not in call.query:
        return None
    cursor = backend.events.topic(workspace.id).cursor.copy()
    cursor.log = LogPosition.at(parse_since(call.query['since']))
    return cursor


@contextlib.contextmanager
def opened(backend, feed, watch_disconnect):
    """Give the Feed that `feed()` makes for the length of a block, and count it among the streams.

    `watch_disconnect(callback)` gives an object that calls back when the client leaves, and that is closed in
    the end.
    """
    feed = feed()
    watch = watch_disconnect(feed.close)
    try:
        with backend.streams.opened(feed):
            yield feed
    finally:
        watch.close()
        feed.release()


def transcript(backend, session, after, limit):
    """Return {events, next} of what a session has told behind a place, at most so many."""
    found = []
    for run, steps in backend.tasks.replay(session, after, backend.tasks.told(session.id)):
        found += [(run, step) for step in steps]
        if len(found) > limit:
            break
    shown = [row for run, step in found[:limit] for row in Steps(run, [step], event_id_of).rows()]
    return {'events': [json.loads(text) for _, text in shown],
            'next': shown[-1][0] if len(found) > limit else None}


def status_event(backend, workspace, event_id):
    """Return the event that tells a new reader the status of a workspace."""
    error = workspace.error or backend.engine.away(workspace.node)
    data = {'status': workspace.status, 'name': workspace.name} | ({'error': error} if error else {})
    return Event('status', workspace.id, event_id, time.time(), data)


def dropped_event(workspace_id, lost, event_id):
    """Return the event that tells a reader how much of what a workspace told is kept nowhere any more."""
    return Event('error', workspace_id, event_id, time.time(),
                 {'code': 'EVENTS_DROPPED', 'count': lost,
                  'message': f'{lost} events were dropped, because they came too long ago.'})


def replay(backend, session_id, after, upto, run=None):
    """Yield (run, events) of a session behind a place, up to another one, of one run or of all: from its ring
    if that goes back so far, else from what they have written. Nothing of a session that there is not, and no
    events while the engine is away."""
    while after < upto:
        try:
            session = backend.state.session(session_id)
            # There may be some of an earlier session of that id.
            held = [batch for batch in backend.events.held(('session', session_id))
                    if batch.run.started_at >= session.created_at]
            if held and comes_next(held[0].steps[0][0], after):
                found = [(batch.run, [step for step in batch.steps if after < step[0] <= upto])
                         for batch in held]
                upto = min(upto, held[-1].steps[-1][0])
            else:
                found = backend.tasks.replay(session, after, upto, [run] if run is not None else None)
            for of, steps in cooperatively(found):
                after = steps[-1][0] if steps else after
                yield of, steps
            return
        except SessionNotFound:
            return
        except DockerError as error:
            log.debug('A reader of session %s waits for the engine: %s', session_id, error)
        yield run, []
        gevent.sleep(1)
