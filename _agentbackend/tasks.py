"""Tasks that agents do in workspaces: begun, followed by what they write, watched, ended and told."""
import collections
import contextlib
import logging
import secrets
import time

import gevent
import gevent.event
import gevent.lock

from _agentbackend.agents import configured_agents
from _agentbackend.engine import USER
from _agentbackend.errors import (
    BackendError,
    DockerError,
    EngineUnavailable,
    SessionNotFound,
    Superseded,
    WorkspaceNotRunning,
    internal_error,
    quoted,
    refusal,
)
from _agentbackend.positions import BEGINNING, LAST_LINE, NOT_BEGUN
from _agentbackend.records import CANCELLED, COMPLETED, FAILED, RUNNING, Run, Session, title_of
from _agentbackend.runs import STAMPED, Runs
from _agentbackend.timing import boot_id, cooperatively
from _agentbackend.translators import CommandLines, Outcome, RunReader, shorten

log = logging.getLogger('agentbackend')

CANCEL_TIMEOUT = 5  # seconds an interrupted agent has for its last record
BACKLOG_TIMEOUT = 10  # seconds for which what it printed is told after it was interrupted
# Seconds after that until its reading is given up: its workspace may be paused, or stop its own reader.
CUT_TIMEOUT = 2
OVERDUE = BACKLOG_TIMEOUT + CUT_TIMEOUT
LINGER_TIMEOUT = 5  # seconds an agent may live on after its last record
WATCH_PAUSE = 0.25  # seconds
SERVER_STALL = 1  # seconds by which a pause of this process has to be too long to count as standing still
ACTIVITY_PAUSE = 10  # seconds between notes that a running task keeps its workspace alive
TIDY_PAUSE = 60  # seconds
MAX_HELD = 2 * 2**20  # bytes of an ended run that are held after they were read
MAX_WORDS = 2000  # characters of an agent's last words that an error quotes
INTERRUPTED = Outcome(False, 'AGENT_INTERRUPTED', 'The workspace was stopped or deleted while the task ran.')


class Unending(Exception):
    """A run does not end though it was told to."""


class Follower:
    """A run that is going on, as this process follows it."""

    def __init__(self, session, run, reader, *, fresh):
        self.session, self.run, self.reader = session, run, reader
        # What an earlier process may have told is in the ring; of a fresh run none has told anything.
        self.caught_up = gevent.event.Event()
        if fresh:
            self.caught_up.set()
        self.told = NOT_BEGUN  # (line, number) of the last event that was published
        self.attached = False  # it is read where it is written
        self.heard_at = time.monotonic()
        self.said = ''  # the last of its words
        self.begun_at = time.monotonic() - seconds_since(run)
        self.stopped_at = None  # when it was first told to end
        self.greenlet = self.watchdog = None
        self._waits = False  # the greenlet waits for what the run writes

    def pieces(self, stream):
        """Yield what a stream gives, and note while it is waited for: only then may `cut` end the waiting."""
        stream, end = iter(stream), object()
        with contextlib.closing(stream):
            while True:
                self._waits = True
                try:
                    piece = next(stream, end)
                finally:
                    self._waits = False
                if piece is end:
                    return
                yield piece

    def is_overdue(self):
        """Return whether it should have ended by now."""
        return self.stopped_at is not None and time.monotonic() - self.stopped_at > OVERDUE

    def cut(self):
        """End the waiting for a run that does not end though it was told to; raises Unending there."""
        if self._waits:
            self._waits = False
            self.greenlet.kill(Unending, block=False)


class Tasks:
    """One greenlet follows each run by the file that it writes; the run itself needs nobody."""

    def __init__(self, config, state, events, engine, claim):
        self._config = config
        self._state = state
        self._events = events
        self._engine = engine
        self._claim = claim
        self._runs = Runs(engine, config.workspace_base_path)
        self._agents = configured_agents(config)
        self._refused = {}  # name of an agent whose key was refused the last time -> in words
        self._env = config.agent_keys() | {'HOME': f'/home/{USER}', 'PYTHONUNBUFFERED': '1'}
        self._followers = {}  # session id -> Follower
        self._launching = set()  # ids of runs that are being begun by this process
        self._tidying = None
        self._reading, self._held = gevent.lock.BoundedSemaphore(1), (None, [])  # the ended run read last
        self.resumed = gevent.event.Event()  # set when the runs of an earlier process have been taken up

    # Verbs

    def execute(self, body):
        """Begin a task for a checked body of POST /api/agent/execute; return (session, its new run)."""
        workspace = self._state.get(body['workspaceId'])
        if workspace.status != RUNNING:
            raise WorkspaceNotRunning(f'Workspace {workspace.name} is {workspace.status}; start it, and wait '
                                      'until it is running.')
        self._claim.check()
        session = self._session_for(body, workspace)
        agent = self._agent(body.get('agent') or session.agent)
        container = self._engine.find(workspace.id)
        if container is None or not container.up:
            raise WorkspaceNotRunning(f'The container of workspace {workspace.name} does not run.')
        run = Run(id='run-' + secrets.token_hex(8), task=shorten(body['task'], 1000), started_at=time.time(),
                  begun=[boot_id(), time.monotonic()], boot=container.started_at,
                  timeout=min(body.get('timeout') or self._config.agent_timeout, self._config.agent_timeout))
        self._launching.add(run.id)
        try:
            session = self._state.begin_run(session, run, limit=self._config.agent_max_tasks)
            # No event may come in between: its id would tell that the run was over before it.
            self._events.topic(workspace.id).cursor.begin(session.last.serial)
            self._launch(workspace, container, session, agent, body)
            return session, session.last
        finally:
            self._launching.discard(run.id)

    def cancel(self, session_id):
        """Interrupt the run of a session. It ends with an error event, within seconds."""
        run = self._state.session(session_id).last
        if run.state == RUNNING and not run.stop:
            self._state.update_run(session_id, run.number,
                                   stop=['AGENT_CANCELLED', 'The task was cancelled.'])
        return self._state.session(session_id)

    def remove(self, session_id):
        """Forget a session and delete its transcript; raise SessionBusy while it runs.

        The transcript goes first: an engine that is away is told before anything is forgotten.
        """
        session = self._state.session(session_id)
        if session.last.state != RUNNING:
            self._runs.delete(session.workspace_id, [run.id for run in self._state.runs(session_id)])
        self._state.remove_session(session_id)

    def tidy(self, now):
        """Forget ended runs beyond KEEP_RUNS and KEEP_RUNS_FOR, with what they wrote; those of a stopped
        workspace wait for it."""
        outdated = collections.defaultdict(list)
        for run in self._state.outdated_runs(self._config.keep_runs, now - self._config.keep_runs_for):
            outdated[run.workspace_id].append(run)
        for workspace_id, runs in outdated.items():
            if self._runs.delete(workspace_id, [run.id for run in runs]):
                self._state.forget_runs(runs)

    # Life

    def open(self):
        """Note which runs an earlier process has begun."""
        running = collections.defaultdict(list)
        for run in self._state.open_runs():
            running[run.workspace_id] += [run.serial] if run.state == RUNNING else []
        for workspace in self._state.all():
            cursor = self._events.topic(workspace.id).cursor
            cursor.begun, cursor.marks = workspace.runs_begun, dict.fromkeys(running[workspace.id], NOT_BEGUN)
        self._tidying = gevent.spawn(self._tidy_for_ever)

    def resume(self):
        """Take up the runs that an earlier process has begun; called when the engine answers."""
        for run in self._state.open_runs():
            if run.unswept:
                self.sweep_up(run.workspace_id)
            elif run.session_id not in self._followers and run.id not in self._launching:
                self._follow(self._state.session(run.session_id), run, fresh=False)
        self.resumed.set()

    def sweep_up(self, workspace_id):
        """End what is left of runs whose container could not be entered when they ended; called when a
        container has changed."""
        for run in self._state.open_runs():
            if run.unswept and run.workspace_id == workspace_id:
                with contextlib.suppress(SessionNotFound):
                    self._state.update_run(run.session_id, run.number, flush=False,
                                           unswept=not self._sweep(run))

    def close(self):
        """End all followers; the runs go on."""
        greenlets = [greenlet for item in self._followers.values()
                     for greenlet in (item.greenlet, item.watchdog)]
        gevent.killall([*greenlets, *([self._tidying] if self._tidying else [])], timeout=5)
        self._followers.clear()

    # What readers ask

    def agents(self):
        """Return what keeps each agent from working here, in words, by its name; nothing is ''."""
        return {name: agent.lacks or self._refused.get(name, '') for name, agent in self._agents.items()}

    def wait_until_published(self, topic, *, timeout):
        """Return whether it is known, after a while, how far earlier processes have told the tasks of a
        workspace or session."""
        if not self.resumed.wait(timeout):
            return False
        behind = [item.caught_up for item in self._followers.values()
                  if topic in (item.session.id, item.session.workspace_id)]
        return len(gevent.wait(behind, timeout)) == len(behind)

    def told(self, session_id):
        """Return the place up to which the events of a session have been published."""
        try:
            session = self._state.session(session_id)
        except SessionNotFound:
            return BEGINNING
        follower, run = self._followers.get(session_id), session.last
        if follower is not None and follower.run.id == run.id:
            return (run.number, *follower.told)
        is_begun = run.state != RUNNING and run.id not in self._launching
        return (run.number, LAST_LINE, 0) if is_begun else (run.number, *NOT_BEGUN)

    def place_in(self, session_id, after):
        """Return a place from which to tell a session on; one beyond its runs is of another session that had
        the same id."""
        with contextlib.suppress(SessionNotFound):
            if after[0] <= self._state.session(session_id).count:
                return after
        return BEGINNING

    def knows(self, session):
        """Return whether a session was not deleted meanwhile, whatever has its id now."""
        with contextlib.suppress(SessionNotFound):
            return self._state.session(session.id).created_at == session.created_at
        return False

    def replay(self, session, after, upto, runs=None):
        """Yield (run, events) of a session behind a place, up to another one, from what its runs, or some of
        them, have written: lists of (place, type, data, seconds), of which some are empty. Raises
        DockerError."""
        for run in self._state.runs(session.id, after=after[0] - 1) if runs is None else runs:
            if not after < (run.number, LAST_LINE, 0) or (run.number, 0, 0) > upto:
                continue
            skip = after[1] - 1 if after[0] == run.number else 0
            for steps in cooperatively(self._written(session, run, skip=skip)):
                found = [(place, kind, self._events.redact(data), at or run.ended_at or run.started_at)
                         for place, kind, data, at in steps if after < place <= upto]
                yield run, found
                if steps and steps[-1][0] > upto:
                    return

    # Beginning

    def _session_for(self, body, workspace):
        session_id = body.get('sessionId') or 'session-' + secrets.token_hex(6)
        try:
            session = self._state.session(session_id)
        except SessionNotFound:
            agent = self._agent(body.get('agent') or self._config.default_agent)
            return Session(id=session_id, workspace_id=workspace.id, agent=agent.name, created_at=time.time(),
                           title=title_of(body['task']))
        if session.workspace_id != workspace.id:
            raise refusal('sessionId', f'is {quoted(session_id)}, a session of another workspace, '
                                       f'{session.workspace_id}; choose another id')
        if body.get('agent', session.agent) != session.agent:
            raise refusal('agent', f"is {quoted(body['agent'])}, but session {session_id} is with "
                                   f'{session.agent}; choose another session')
        return session

    def _agent(self, name):
        if name not in self._agents:
            hint = '; set AGENT_COMMAND for that one' if name == 'command' else ''
            raise refusal('agent', f"is {quoted(name)}, but known are {', '.join(self._agents)}{hint}")
        return self._agents[name]

    def _launch(self, workspace, container, session, agent, body):
        """Write the task, start the agent, detached from everybody, and follow it."""
        run = session.last
        try:
            self._state.flush()
            shell = self._runs.prepare(container, run.id, body['task'].encode('utf-8', 'surrogatepass'),
                                       program=agent.program)
            env = self._env | agent.env
            # Of an earlier version, which kept it there.
            if self._engine.home_of(workspace.id) not in container.volumes:
                env['CLAUDE_CONFIG_DIR'] = f'{self._config.workspace_base_path}/.agentbackend/claude'
            try:
                self._runs.start(container, run.id, shell, agent.command(session, body), env=env,
                                 workdir=f'{self._config.workspace_base_path}/{workspace.folder}')
            except EngineUnavailable as error:
                log.warning('Whether run %s has begun is seen when the engine is back: %s', run.id, error)
        except BaseException as error:
            self._end(session, run, Outcome(False, getattr(error, 'code', BackendError.code), str(error)),
                      None)
            raise
        self._follow(session, run, fresh=True)

    # Following

    def _follow(self, session, run, *, fresh):
        follower = Follower(session, run, self._reader(session, run), fresh=fresh)
        self._followers[session.id] = follower
        follower.greenlet = gevent.spawn(self._follow_to_the_end, follower)
        follower.watchdog = gevent.spawn(self._watch, follower)

    def _reader(self, session, run, *, skip=0):
        """Return what makes events of a run, also of an agent that is not configured any more."""
        lines = self._agents[session.agent].lines() if session.agent in self._agents else CommandLines()
        return RunReader(run.number, lines, self._events.redact, skip=skip)

    def _follow_to_the_end(self, follower):
        """Publish the events of a run until it has ended, whatever happens to the engine meanwhile."""
        session, run = follower.session, follower.run
        try:
            self._publish(follower, [first_event(session, run)])
            outcome = None
            while outcome is None:
                try:
                    outcome = self._follow_once(follower)
                except DockerError as error:  # it is away, or refuses because the container is about to end
                    log.debug('Run %s waits for the engine: %s', run.id, error)
                    follower.heard_at = time.monotonic()  # this silence is not the agent's
                except Unending:
                    log.warning('Run %s did not end when it was told to; it is followed no longer.', run.id)
                    outcome = INTERRUPTED
                if outcome is None and follower.is_overdue():
                    outcome = INTERRUPTED
                elif outcome is None:
                    gevent.sleep(0.2)
            self._end(session, run, outcome, follower)
        except Exception as error:
            self._end(session, run, Outcome(False, BackendError.code, str(internal_error(error))), follower)
        finally:
            follower.caught_up.set()
            if self._followers.get(session.id) is follower:
                del self._followers[session.id]
            follower.watchdog.kill(block=False)

    def _follow_once(self, follower):
        """Read what the run has written, and what it writes; return its outcome, or None to come again."""
        run, lines = follower.run, follower.reader.lines
        container = self._engine.find(run.workspace_id)
        alive = container is not None and container.up and container.started_at == run.boot
        if not alive or not follower.caught_up.is_set():
            self._read_what_there_is(follower, container)
            follower.caught_up.set()
        if not alive:
            self._publish(follower, follower.reader.take(b'', ended=True))
            status = follower.reader.status
            if status is None and container:
                status = self._runs.status(container, run.id)
            if status is not None:
                lines.end(status)  # it had ended before its container did
            return lines.outcome or INTERRUPTED
        return self._beyond_limits(follower) or self._read_as_it_comes(follower, container)

    def _read_what_there_is(self, follower, container):
        """Take what a run has written so far, of a container that may be stopped."""
        skip = follower.reader.offset
        for data in cooperatively(self._output_of(container, follower.run, follower.reader)):
            new, skip = data[skip:], max(0, skip - len(data))
            self._publish(follower, follower.reader.take(new))

    def _read_as_it_comes(self, follower, container):
        run, reader = follower.run, follower.reader
        following = self._runs.follow(container, run.id, reader.offset)
        for data in cooperatively(follower.pieces(following)):
            follower.attached, reader.stamped = True, following.stamped
            follower.heard_at = time.monotonic() if data else follower.heard_at
            self._publish(follower, reader.take(data))
            if self._beyond_limits(follower):
                return self._beyond_limits(follower)
            if reader.status is not None:
                break
        status = following.status if reader.status is None else reader.status
        if status is None:
            return None
        was_killed = reader.lines.outcome is None and status > 128 and not self._latest(run).stop
        if was_killed and self._is_going(container):
            return None  # it was ended along with its workspace
        self._publish(follower, reader.take(b'', ended=True))
        reader.lines.end(status)
        return reader.lines.outcome or Outcome(
            False, 'AGENT_FAILED', f'The agent ended with exit code {status} and without a result. '
            f"It said last: {reader.last_words[-MAX_WORDS:].strip() or '(nothing)'}")

    def _beyond_limits(self, follower):
        """Return the outcome of a run that printed too much, or faster than can be told after it was told to
        end; else None."""
        if follower.reader.offset > self._config.agent_max_output:
            return Outcome(False, 'AGENT_MAX_OUTPUT', 'The agent printed more than '
                           f'AGENT_MAX_OUTPUT={self._config.agent_max_output} bytes, and was ended.')
        late = follower.stopped_at is not None and time.monotonic() - follower.stopped_at > BACKLOG_TIMEOUT
        return INTERRUPTED if late else None

    def _is_going(self, container):
        """Return whether a container is about to end: its processes, which are told to, may be a moment ahead
        of it."""
        gevent.sleep(1)
        found = self._engine.inspect(container.id)
        return found is None or not found.up or found.started_at != container.started_at

    def _output_of(self, container, run, reader):
        """Return the bytes of a run, and tell a reader their form."""
        limit = self._config.agent_max_output + 1 if run.length is None else run.length
        if container is None or not limit:
            return ()
        form, pieces = self._runs.output(container, run.id, limit)
        reader.stamped = form == STAMPED
        return pieces

    def _written(self, session, run, *, skip):
        """Return lists of the events of a run, of which some at the beginning may be left out. One that ended
        is read once for all who ask meanwhile: who is cut off comes back at once, and asks again."""
        if run.state == RUNNING or run.length is None or run.length > MAX_HELD:
            return self._replay_run(session, run, skip=skip)
        with self._reading:
            if self._held[0] != run.id:
                self._held = run.id, list(cooperatively(self._replay_run(session, run, skip=0)))
            return self._held[1]

    def _replay_run(self, session, run, *, skip):
        """Yield lists of (place, type, data, time or None) of a run; those of `skip` lines at its beginning
        may be left out."""
        yield [first_event(session, run)]
        reader = self._reader(session, run, skip=skip)
        for data in self._output_of(self._engine.find(session.workspace_id), run, reader):
            yield reader.take(data)
        if run.state != RUNNING:
            yield reader.take(b'', ended=True)
            yield [((run.number, LAST_LINE, 0), run.end['type'], run.end['data'], run.ended_at)]

    def _publish(self, follower, steps):
        if not steps:
            return
        self._events.publish_steps(follower.run, steps)
        follower.told = steps[-1][0][1:]
        said = [data['message'] for place, _, data, _ in steps if place[1] and data.get('message')]
        follower.said = said[-1] if said else follower.said  # the first event is ours
        self._events.topic(follower.run.workspace_id).breathe()

    # Ending

    def _end(self, session, run, outcome, follower):
        """Write down how a run ended, sweep up if it was ended, and tell: one result or one error event is
        the last."""
        run = self._latest(run)
        if run.stop and not outcome.ok:
            outcome = outcome.because(*run.stop)
        swept = (outcome.ok and not run.stop) or self._sweep(run, keeper=True)
        kind, data = self._last_event(session, run, outcome)
        self._write_end(session, run, outcome, {'type': kind, 'data': data}, follower, swept)
        place = (run.number, LAST_LINE, 0)
        self._events.publish_steps(run, [(place, kind, data, self._latest(run).ended_at)])
        if follower is not None:
            follower.told = (LAST_LINE, 0)

    def _last_event(self, session, run, outcome):
        """Return (type, data) of the event that ends a run; a session's cost is counted from its
        beginning."""
        total = outcome.total_cost_usd
        figures = {'runId': run.id, 'durationMs': outcome.duration_ms or int(seconds_since(run) * 1000),
                   'turns': outcome.turns,
                   'costUsd': None if total is None else round(max(0, total - session.total_cost_usd), 6)}
        said = outcome.data if outcome.ok else {'code': outcome.code, 'message': outcome.message}
        return 'result' if outcome.ok else 'error', self._events.redact(figures | said | {'runId': run.id})

    def _write_end(self, session, run, outcome, end, follower, swept):
        state = COMPLETED if outcome.ok else CANCELLED if outcome.code == 'AGENT_CANCELLED' else FAILED
        if outcome.code == 'AGENT_NOT_LOGGED_IN':
            self._refused[session.agent] = outcome.message
        elif outcome.ok:
            self._refused.pop(session.agent, None)
        conversed = session.conversed or (follower is not None and follower.reader.lines.conversed)
        with contextlib.suppress(Superseded):  # its ttl counts from here
            self._state.update(session.workspace_id, flush=False, last_activity_at=time.time())
        self._state.end_run(session.id, run.number, state=state, end=end,
                            total_cost_usd=outcome.total_cost_usd,
                            length=follower.reader.offset if follower is not None else None,
                            unswept=not swept,
                            conversed=conversed and outcome.code != 'AGENT_UNKNOWN_CONVERSATION')
        log.info('Run %s of session %s %s%s.', run.id, session.id, state,
                 '' if outcome.ok else f': {outcome.code}')

    def _latest(self, run):
        """Return what is known of a run now; the run itself when it was deleted meanwhile."""
        found = self._state.run(run.session_id, run.number)
        return found if found is not None and found.id == run.id else run

    def _sweep(self, run, *, keeper=False):
        return self._runs.sweep(run.workspace_id, run.boot, run.id, keeper=keeper)

    def _signal(self, run, name):
        self._runs.signal(run.workspace_id, run.boot, run.id, name)

    # Watching

    def _watch(self, follower):
        """Look after a run until its greenlet ends this."""
        interrupted_at = noted_at = 0
        while True:
            begun = time.monotonic()
            gevent.sleep(WATCH_PAUSE)
            now = time.monotonic()
            if now - begun > WATCH_PAUSE + SERVER_STALL:  # the silence was this process's: it stood still
                follower.heard_at = min(now, follower.heard_at + now - begun)
            try:
                if now - noted_at > ACTIVITY_PAUSE:
                    self._state.update(follower.run.workspace_id, flush=False, last_activity_at=time.time())
                    noted_at = now
                interrupted_at = self._watch_once(follower, self._latest(follower.run), now, interrupted_at)
            except Superseded:
                log.debug('The workspace of run %s is gone.', follower.run.id)
                return
            except DockerError as error:
                log.debug('Run %s: %s', follower.run.id, error)
            except Exception:
                log.exception('Watching run %s failed; it goes on.', follower.run.id)

    def _watch_once(self, follower, run, now, interrupted_at):
        """End a run that is cancelled, silent, too long, or lives on after its last word; return when it was
        last told to end."""
        if run.stop and follower.stopped_at is None:
            follower.stopped_at = now
            self._signal(run, 'INT')
            return now
        if run.stop and follower.is_overdue():
            follower.cut()
        elif run.stop and now - interrupted_at > CANCEL_TIMEOUT:
            self._sweep(run)
            return now
        elif not run.stop and follower.reader.lines.has_ended:
            if now - follower.heard_at > LINGER_TIMEOUT:
                self._signal(run, 'KILL')
        elif not run.stop:
            self._check_limits(follower, run, now)
        return interrupted_at

    def _check_limits(self, follower, run, now):
        idle, call = self._config.agent_idle_timeout, follower.reader.lines.open_call
        if follower.attached and not call and now - follower.heard_at > idle:
            stop = ['AGENT_IDLE_TIMEOUT',
                    f'The agent said nothing for AGENT_IDLE_TIMEOUT={idle} s, and was ended.'
                    + (f' It said last: {follower.said[-MAX_WORDS:]}' if follower.said else '')]
        elif now - follower.begun_at > run.timeout:
            stop = ['AGENT_TIMEOUT', f'The task took more than its {run.timeout} s, and was ended.'
                    + (f' It was at: {call}' if call else '')]
        else:
            return
        with contextlib.suppress(SessionNotFound):
            self._state.update_run(run.session_id, run.number, flush=False, stop=stop)

    def _tidy_for_ever(self):
        while True:
            gevent.sleep(TIDY_PAUSE)
            try:
                self.tidy(time.time())
            except DockerError as error:
                log.debug('Ended runs are tidied up later: %s', error)
            except Exception:
                log.exception('Tidying up ended runs failed; it is tried again.')


def first_event(session, run):
    """Return (place, type, data, time) of the event that begins a run."""
    message = f'Task {run.number} of session {session.id} is with {session.agent}.'
    data = {'stream': 'agent', 'message': message, 'runId': run.id, 'agent': session.agent}
    return (run.number, 0, 0), 'log', data, run.started_at


def seconds_since(run):
    """Return for how long a run has been going on: by the clock that nobody sets, unless the machine was
    started anew."""
    if run.begun and run.begun[0] == boot_id():
        return time.monotonic() - run.begun[1]
    return max(0, time.time() - run.started_at)
