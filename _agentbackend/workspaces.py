"""The life of workspaces: create, start, stop, restart, change and remove, each with its job."""
import collections
import contextlib
import dataclasses
import functools
import logging
import secrets
import time

import gevent
import gevent.event
import gevent.lock

from _agentbackend.drafts import changes_of, draft, git_fields, refuse_unless
from _agentbackend.errors import (
    BackendError,
    ConflictOnEngine,
    DockerError,
    EngineUnavailable,
    PortExhausted,
    PortTaken,
    StateNotWritten,
    Superseded,
    WorkspaceAlreadyExists,
    WorkspaceNotFound,
    WorkspaceNotRunning,
)
from _agentbackend.events import DELETED
from _agentbackend.pool import Pool
from _agentbackend.probes import EXIT_WANTS_PORTS, PROBE_TIMEOUT, Start
from _agentbackend.recipe import SETTINGS_FOLDER, Recipe
from _agentbackend.records import (
    CREATING,
    DELETING,
    ERROR,
    PERSISTENT,
    RUNNING,
    SETTLED,
    STOPPED,
    STOPPING,
    TEMPORARY,
)

log = logging.getLogger('agentbackend')

PORT_ATTEMPTS = 5
LISTEN_PAUSE = 2  # seconds between looks into its log
INSPECT_PAUSE = 0.25  # seconds between looks whether it has ended
MAX_TOLD = 48_000  # bytes of settings that go over stdin, which waits for nobody
QUIET = 1  # seconds without a job after which there is time for what can wait
MAX_CRASHES = 5  # of its editor, which is started again a second later
# Fields that are files in the container, which are written again as soon as they change.
IN_FILES = {'env', 'ssh_public_keys', 'git_access', 'git_user_name', 'git_user_email'}


class Workspaces:
    """Each verb changes the record at once and goes on in a job, at most one per workspace."""

    def __init__(self, config, state, events, engine, templates, probes, claim):
        self._config = config
        self._state = state
        self._events = events
        self._engine = engine
        self._templates = templates
        self._probes = probes
        self._claim = claim
        self.recipe = Recipe(config, engine)
        self._jobs = {}  # id -> greenlet of its last job
        self._cancelled = {}  # id -> event that is set when the job at work has lost its purpose
        # Id -> {name of a file: secret} for its first clone, only here and only until that is done.
        self._once = {}
        self._told = {}  # id -> the files that its container was given when it was made
        self.pool = Pool(config, state, engine, templates, self.recipe, probes)
        self._fresh = {}  # id -> the Container of a member of the pool that it was given by this process
        self._worked_at = 0  # when a job was at work at the last
        # Id -> the turn of those who change it: what one has merged, the next must find.
        self._turns = collections.defaultdict(lambda: gevent.lock.BoundedSemaphore(1))

    # Verbs

    def create(self, body):
        """Reserve a workspace for a checked body of POST /api/workspaces and begin to make it; return its
        record."""
        record, once = draft(body, self._config)
        tag = self._templates.tag(record.template)
        self._claim.check()
        names, ports = self._engine.taken()
        self.recipe.check_limits(body)
        workspace = self._reserve(record, tag, self.recipe.names_of(names), ports, body)
        self._once[workspace.id] = once
        self.announce(workspace)
        self._begin(workspace.id, self._bring_up)
        try:
            self._state.flush()
        except StateNotWritten:
            self._cancelled[workspace.id].set()  # its job has begun nothing, since it waits for the same
            self._forget(workspace.id)
            raise
        return workspace

    def _reserve(self, record, tag, names, ports, body):
        """Add the record, with what a member of the pool has if one fits, and return it."""
        member = self.pool.take(record, tag)
        place = functools.partial(self._engine.place, node=body.get('node', ''),
                                  constraints=body.get('constraints', {}))
        if member is not None:
            record.id, record.ports, record.container_id = member.id, member.ports, member.container.id
            record.warm = True
        while True:
            try:
                workspace = self._state.reserve(record, flush=False, taken_names=names,
                                                taken_ports=ports | self.pool.ports(),
                                                is_free=self.recipe.is_free, place=place)
            except PortExhausted as error:
                if not self.pool.give_up_one(error.kind):  # whose ports are better used by this one
                    raise
                ports = self._engine.taken()[1]
            except BaseException:
                if member is not None:
                    self.pool.give_back(member)
                raise
            else:
                if member is not None:
                    self._fresh[workspace.id] = member.container
                return workspace

    def start(self, id_or_name):
        """Start a stopped workspace, or try again one that failed after it had run; one that runs is left
        alone."""
        workspace = self._reachable(id_or_name)
        if workspace.status in (RUNNING, CREATING):
            return workspace
        if workspace.status == ERROR and not workspace.ever_ran:
            raise WorkspaceNotRunning(f'{workspace.name} has no container, because it was never made: '
                                      f'{workspace.error} Retry it, with another gitUrl if need be, or '
                                      'delete it.')
        refuse_unless(workspace, {STOPPED, ERROR}, 'started')
        return self._set_out(workspace.id, CREATING, self._bring_up, last_activity_at=time.time())

    def retry(self, id_or_name, body):
        """Try again to make a workspace that never ran, with what a checked body says of its repository."""
        workspace = self._reachable(id_or_name)
        if workspace.status != ERROR or workspace.ever_ran:
            raise WorkspaceNotRunning(f'{workspace.name} is {workspace.status}; only one whose first start '
                                      'has failed is retried.')
        fields, once = git_fields(body, workspace)
        self._claim_ports(workspace)
        self._once[workspace.id] = once
        return self._set_out(workspace.id, CREATING, self._bring_up, last_activity_at=time.time(), **fields)

    def stop(self, id_or_name):
        """Stop a running workspace: a temporary one is deleted by that. One that is stopped is left alone."""
        workspace = self._reachable(id_or_name)
        if workspace.status in (STOPPED, STOPPING):
            return workspace
        refuse_unless(workspace, {RUNNING, ERROR} if workspace.ever_ran else {RUNNING}, 'stopped')
        if workspace.type == TEMPORARY:
            return self.remove(workspace.id)[0]
        return self._set_out(workspace.id, STOPPING, self._bring_down, last_activity_at=time.time())

    def restart(self, id_or_name):
        """Stop a running workspace and start it again, with the same data, ports and container."""
        workspace = self._reachable(id_or_name)
        refuse_unless(workspace, {RUNNING}, 'restarted')
        return self._set_out(workspace.id, CREATING, self._bring_down_and_up, last_activity_at=time.time())

    def remove(self, id_or_name, *, wait=0):
        """Delete a workspace with its container and data, whatever it does just now.

        Waits up to `wait` seconds for the end; returns (record, whether it is gone). With the engine away it
        is deleted later.
        """
        workspace = self._state.get(id_or_name)
        self._claim.check()
        job = self._jobs.get(workspace.id) if workspace.status == DELETING else None
        if job is None:
            workspace = self._set_status(workspace.id, DELETING, flush=False)
            job = self._begin(workspace.id, self._tear_down)
            self._state.flush()
        job.join(wait)
        with contextlib.suppress(WorkspaceNotFound):
            return self._state.get(workspace.id), False
        return workspace, True

    def change(self, id_or_name, body):
        """Apply a checked body of PATCH /api/workspaces/:id and return the record."""
        workspace_id = self._state.get(id_or_name).id
        with self._turns[workspace_id]:
            return self._change(self._state.get(workspace_id), body)

    def _change(self, workspace, body):
        changes = changes_of(workspace, body)
        limits = {'cpus', 'memory'} & body.keys()
        if limits:
            self.recipe.check_limits(body, workspace.node)
        container = self._engine.find(workspace.id) if limits or IN_FILES & changes.keys() else None
        if 'name' in body and body['name'] != workspace.name:
            self._rename(workspace, body['name'])
        changed = dataclasses.replace(workspace, **changes)
        if container and limits:
            self._engine.limit(container.id, memory=changed.memory, cpus=self.recipe.cpus_of(changed))
        if container and IN_FILES & changes.keys():
            self._engine.put_files(container.id, self.recipe.files(changed))
        try:
            return self._state.update(workspace.id, **changes)
        except Superseded:
            raise WorkspaceNotFound(workspace.name) from None

    # What keeps up with the engine uses these

    def has_job(self, workspace_id):
        """Return whether a job is at work on a workspace."""
        return workspace_id in self._jobs

    def is_quiet(self):
        """Return whether no job is at work, and none was for QUIET seconds."""
        return not self._jobs and time.monotonic() - self._worked_at >= QUIET

    def join_job(self, workspace_id):
        """Wait for the end of the job that is at work on a workspace, if any."""
        job = self._jobs.get(workspace_id)
        if job is not None:
            job.join()

    def go_on(self, workspace):
        """Begin the job that the status of a record asks for; return False for a settled one, which needs
        none."""
        steps = {CREATING: self._bring_up, STOPPING: self._bring_down,
                 DELETING: self._tear_down}.get(workspace.status)
        if steps is not None:
            log.info('Going on with workspace %s, which is %s.', workspace.id, workspace.status)
            self._begin(workspace.id, steps)
        return steps is not None

    def has_started(self, workspace):
        """Take note that somebody else has started the container of a settled workspace."""
        self._set_out(workspace.id, CREATING, self._bring_up)

    def has_ended(self, workspace, status, reason):
        """Take note that the container of a settled workspace is not up any more, and why."""
        self._probes.unmeter(workspace.id)
        self._set_status(workspace.id, status, when=SETTLED, error=reason)
        if reason:
            self._events.publish('error', workspace.id, {'code': DockerError.code, 'message': reason})

    def expire(self, now):
        """Delete the workspaces whose time has come."""
        # What goes on in a workspace is not known while its node does not answer.
        for workspace_id in self._state.expire(now, may_end=lambda item: not self._engine.away(item.node)):
            log.info('Workspace %s has expired.', workspace_id)
            self.announce(self._state.get(workspace_id))
            self._begin(workspace_id, self._tear_down)

    def close(self):
        """End all jobs; whoever follows the engine next goes on from there."""
        gevent.killall(list(self._jobs.values()), timeout=10)

    # Jobs

    def _reachable(self, id_or_name):
        """Return the record once the engine has answered: so no other call comes between looking at it and
        changing it."""
        workspace = self._state.get(id_or_name)
        self._claim.check()
        self._engine.ping(workspace.node)
        return self._state.get(id_or_name)

    def _set_out(self, workspace_id, status, steps, **changes):
        """Change the status and begin its job with nothing in between: a record without a job passes for one
        left half-done."""
        workspace = self._set_status(workspace_id, status, flush=False, error='', **changes)
        self._begin(workspace_id, steps)
        self._state.flush()
        return workspace

    def _begin(self, workspace_id, steps):
        """Run `steps(id, cancelled)` after the job that is still at work on the workspace, which is told to
        give up."""
        before = self._jobs.get(workspace_id)
        if workspace_id in self._cancelled:
            self._cancelled[workspace_id].set()
        cancelled = self._cancelled[workspace_id] = gevent.event.Event()
        job = self._jobs[workspace_id] = gevent.spawn(self._job, workspace_id, steps, before, cancelled)
        return job

    def _job(self, workspace_id, steps, before, cancelled):
        if before is not None:
            before.join()
        try:
            while not self._state.try_flush():  # nothing is done that a crash could make forget
                if cancelled.wait(1):
                    return
            if not cancelled.is_set():
                steps(workspace_id, cancelled)
        except Superseded:
            log.debug('A job on %s was overtaken.', workspace_id)
        except BackendError as error:
            if isinstance(error, EngineUnavailable) or (
                    isinstance(error, DockerError)
                    and self._engine.is_leaving(self._state.node_of(workspace_id))):
                # The status stays as it is; once the engine is back, the keeper goes on from there.
                log.warning('Workspace %s waits for the engine: %s', workspace_id, error)
            else:
                self._fail(workspace_id, str(error), error.code, cancelled)
        except Exception:
            log.exception('A job on workspace %s failed.', workspace_id)
            self._fail(workspace_id, 'Internal error; the log of the server has the traceback.',
                       BackendError.code, cancelled)
        finally:
            self._worked_at = time.monotonic()
            if self._jobs.get(workspace_id) is gevent.getcurrent():
                del self._jobs[workspace_id]
                self._cancelled.pop(workspace_id, None)

    def _bring_up(self, workspace_id, cancelled):
        """Make what is missing, start it, and wait until it answers. Goes on from wherever an earlier try
        ended."""
        self._still(workspace_id, CREATING, cancelled)
        before, warnings = self._state.get(workspace_id), []
        while True:
            container_id, said = self._started_container(workspace_id, cancelled)
            if container_id == before.container_id:  # its project was prepared already, and so was told of
                warnings = before.warnings
            workspace = self._still(workspace_id, CREATING, cancelled, container_id=container_id)
            self._probes.meter(workspace_id, container_id)  # so that something is known when it runs
            start = Start(container_id, warnings,
                          again=before.ever_ran and container_id == before.container_id, said=said)
            if self._wait_until_ready(workspace_id, start, cancelled):
                break
            # Of a container that has just cloned, so only once.
            self._publish_ports(workspace_id, start.ports)
            warnings = start.warnings
        self._once.pop(workspace_id, None)
        with self._turns[workspace_id]:
            workspace = self._still(workspace_id, CREATING, cancelled)
            files = self.recipe.files(workspace)
            if self._told.pop(workspace_id, files) != files:  # it was changed while it took what it was given
                self._engine.put_files(container_id, files)
        self._set_status(workspace_id, RUNNING, when={CREATING}, ever_ran=True, has_credentials=False,
                         error='', warnings=start.warnings, last_activity_at=time.time())
        if workspace.type == PERSISTENT:
            # Only now: until then a crash is an answer, not something to repeat.
            with contextlib.suppress(DockerError):  # the keeper sees to it when it lacks
                self._engine.keep_running(container_id)

    def _started_container(self, workspace_id, cancelled):
        """Return the id of the workspace's container, started, and made if there is none; and what it has
        said of that."""
        workspace = self._still(workspace_id, CREATING, cancelled)
        container = self._fresh.get(workspace_id) or self._engine.find(workspace_id)
        if workspace.warm and not workspace.ever_ran:
            said = self._hand_over(workspace, container, cancelled) if container is not None else None
            if said:
                return container.id, said
            if said is None:
                log.info('Workspace %s is made cold: its member of the pool is not to be had.', workspace_id)
                self._engine.remove(workspace_id)
                container = None
                workspace = self._still(workspace_id, CREATING, cancelled, warm=False, container_id='')
        if workspace.wants_other_ports:
            workspace = self._claim_ports(workspace)
        if container is not None and container.started and (
                container.ports == set(workspace.ports.values())
                and self._engine.is_bound(container, self._config.workspace_bind_address)):
            if not workspace.ever_ran:  # and nobody knows what it was given
                self._told[workspace_id] = {}
            self._engine.start(container.id, self.recipe.network(workspace))
            return container.id, b''
        image = self._templates.image(workspace.template, lambda line: self._build_output(workspace_id, line),
                                      cancelled)
        self._engine.bring(image, workspace.node, lambda line: self._build_output(workspace_id, line))
        if container is not None:
            # It publishes other ports or elsewhere, or was never started: a crash may have come before its
            # files were in it. One of the pool is noted as cold first, or a crash here would cost its files.
            self._still(workspace_id, CREATING, cancelled, warm=False)
            self._engine.remove_container(container.id)
        return self._make_container(self._still(workspace_id, CREATING, cancelled), image, cancelled), b''

    def _hand_over(self, workspace, container, cancelled):
        """Give a member of the pool to its owner; return what it says to that, or None when it is none to be
        had; b'' when it has its owner already. What is done twice does no harm."""
        if workspace.id not in self._fresh:  # a crash came between
            self._told[workspace.id] = {}
            if self._engine.get_file(container.id, f'{SETTINGS_FOLDER}/owned'):
                return b''
            if workspace.has_credentials:
                return None
        self._fresh.pop(workspace.id, None)
        try:
            self._engine.create_volume(self._engine.hold_of(workspace.id), self.recipe.labels(workspace))
            with self._turns[workspace.id]:
                workspace = self._still(workspace.id, CREATING, cancelled)
                if workspace.name != workspace.folder:  # somebody renamed it, and maybe the container too
                    container = self._engine.inspect(container.id) or container
                self._engine.rename(container, self.recipe.name(workspace.name))
                cpus = self.recipe.cpus_of(workspace)
                if (container.memory, container.cpus) != (workspace.memory, cpus):
                    self._engine.limit(container.id, memory=workspace.memory, cpus=cpus)
                files = self.recipe.files(workspace, self._once.get(workspace.id))
                self._told[workspace.id] = self.recipe.files(workspace)
                word = secrets.token_hex(16)
                settings, answers = self.recipe.spoken(files, word), self.recipe.answers(word)
            said = self._engine.tell(container.id, settings, answers) if len(settings) <= MAX_TOLD else b''
            return said if answers[0][0] in said else None
        except EngineUnavailable:
            raise
        except DockerError as error:
            log.info('Workspace %s: %s', workspace.id, error)
            return None

    def _make_container(self, workspace, image, cancelled):
        """Create the volume and a started container, on other ports if those reserved turn out to be
        taken."""
        if workspace.has_credentials and not self._once.get(workspace.id):
            raise BackendError('The server ended before the clone was done, and it does not keep '
                               'credentials. Retry with them, or delete the workspace.')
        if workspace.ever_ran and not self._engine.has_volume(workspace.id):
            raise DockerError('The volume was removed outside Agent Backend and the files are lost. Delete '
                              'the workspace.')
        for volume in (self._engine.volume_of(workspace.id), self._engine.home_of(workspace.id)):
            self._engine.create_volume(volume, self.recipe.labels(workspace))
        avoid, network = set(), self.recipe.network(workspace)
        for attempt in range(1, PORT_ATTEMPTS + 1):
            with self._turns[workspace.id]:  # a PATCH is in the record before, or finds the container
                workspace = self._still(workspace.id, CREATING, cancelled)
                self._told[workspace.id] = self.recipe.files(workspace)
                files = self.recipe.files(workspace, self._once.get(workspace.id))
                settings = self.recipe.spoken(files)
                by_stdin = self._templates.hears(image) and len(settings) <= MAX_TOLD
                container_id = self._engine.create_container(
                    **self.recipe.container(workspace, image, network, stdin=by_stdin))
                if by_stdin:
                    self._engine.tell(container_id, settings)
                else:
                    self._engine.put_files(container_id, files)
            try:
                self._engine.start(container_id, network)
                return container_id
            except PortTaken as error:
                log.info('Workspace %s: %s', workspace.id, error)
                self._engine.remove_container(container_id)
                if attempt == PORT_ATTEMPTS:
                    raise
                avoid |= {error.port} if error.port else set(workspace.ports.values())
                workspace = self._claim_ports(workspace, avoid)

    def _wait_until_ready(self, workspace_id, start, cancelled):
        """Wait until what the user will use answers; return False when it wants more ports first.

        Raises DockerError when the container ends first, or does not answer READY_TIMEOUT after its last sign
        of life.
        """
        if start.is_up:  # a member of the pool, whose editor was there before, has just said so
            return True
        begun, looked_at = time.monotonic(), 0
        while True:
            workspace = self._still(workspace_id, CREATING, cancelled)
            waited = time.monotonic() - begun
            if time.monotonic() - looked_at >= INSPECT_PAUSE:
                container, looked_at = self._engine.inspect(start.container_id), time.monotonic()
            if container is None:
                raise DockerError('The container was removed outside Agent Backend while it started.')
            if container.state not in ('running', 'paused'):
                self._probes.listen(start, container)
                if container.exit_code == EXIT_WANTS_PORTS and start.ports:
                    return False
                raise DockerError(self._probes.why_it_ended(container))
            # An answer that does not come at once is late, or the question was lost.
            if self._probes.is_ready(workspace, container, start, min(0.1 + waited / 4, PROBE_TIMEOUT)):
                return True
            self._probes.listen(start, container, pause=LISTEN_PAUSE)
            if start.crashes >= MAX_CRASHES:
                raise DockerError(f'{start.crashed} does not start. It printed last: '
                                  f'{self._probes.last_words(container)}')
            if time.monotonic() - start.heard_at > self._config.ready_timeout:
                raise DockerError('The workspace did not answer within '
                                  f'READY_TIMEOUT={self._config.ready_timeout} s. '
                                  f'It printed last: {self._probes.last_words(container)}')
            cancelled.wait(self._probes.pause(container, waited, len(self._jobs)))

    def _publish_ports(self, workspace_id, ports):
        """Let the next container of a workspace publish more ports, as far as there are any."""
        wanted = self._state.get(workspace_id).wanted_ports
        try:
            workspace = self._state.update(workspace_id, when={CREATING}, flush=False,
                                           wanted_ports=[*wanted, *ports])
            self._claim_ports(workspace)
        except PortExhausted as error:
            log.warning('Workspace %s: %s', workspace_id, error)
            self._state.update(workspace_id, when={CREATING}, flush=False, wanted_ports=wanted)

    def _claim_ports(self, workspace, avoid=frozenset()):
        """Give a workspace the ports that it lacks, those of the pool if need be; it keeps those it has."""
        while True:
            taken = self._engine.taken()[1] - set(workspace.ports.values()) | avoid
            try:
                return self._state.claim_ports(workspace.id, avoid=taken, is_free=self.recipe.is_free)
            except PortExhausted as error:
                if not self.pool.give_up_one(error.kind):
                    raise

    def _bring_down(self, workspace_id, cancelled):
        """Stop the container and keep everything."""
        self._still(workspace_id, STOPPING, cancelled)
        self._stop_container(workspace_id)
        self._probes.unmeter(workspace_id)
        self._set_status(workspace_id, STOPPED, when={STOPPING}, error='')

    def _bring_down_and_up(self, workspace_id, cancelled):
        self._still(workspace_id, CREATING, cancelled)
        self._stop_container(workspace_id)
        self._bring_up(workspace_id, cancelled)

    def _stop_container(self, workspace_id):
        container = self._engine.find(workspace_id)
        if container is not None:
            self._engine.stop(container.id, self._config.stop_timeout)

    def _tear_down(self, workspace_id, cancelled):
        """Remove everything of a workspace from the engine, and then its record: so a crash in between loses
        no trace of it."""
        self._still(workspace_id, DELETING, cancelled)
        self._probes.unmeter(workspace_id)
        self._engine.remove(workspace_id)
        self._forget(workspace_id)
        log.info('Workspace %s is gone.', workspace_id)

    def _forget(self, workspace_id):
        self._once.pop(workspace_id, None)
        self._told.pop(workspace_id, None)
        self._fresh.pop(workspace_id, None)
        self._turns.pop(workspace_id, None)
        self._events.publish('status', workspace_id, DELETED)
        self._events.forget(workspace_id)
        self._state.remove(workspace_id)  # with what it has told
        self.recipe.drop_network(lambda: self._state.all() or self.pool.ports())

    def _fail(self, workspace_id, text, code, cancelled):
        """Set status `error` with the reason, unless the job was superseded.

        A workspace that never ran is removed from the engine; one that did keeps its data.
        """
        with contextlib.suppress(WorkspaceNotFound, Superseded):
            workspace = self._state.get(workspace_id)
            log.warning('Workspace %s (%s): %s', workspace_id, workspace.name, text.partition(':\n')[0])
            self._probes.unmeter(workspace_id)
            changes = {'error': text}
            if workspace.status == CREATING and not workspace.ever_ran:
                with contextlib.suppress(DockerError):  # if it stays, the keeper removes it
                    self._engine.remove(workspace_id)
                self._once.pop(workspace_id, None)
                changes |= {'ports': {}, 'container_id': ''}
            if cancelled.is_set():
                raise Superseded(workspace_id)
            self._set_status(workspace_id, ERROR, when={workspace.status}, **changes)
            self._events.publish('error', workspace_id, {'code': code, 'message': text})

    def _still(self, workspace_id, status, cancelled, **changes):
        """Return the record, changed, if the job still has its purpose; else raise Superseded."""
        if cancelled.is_set():
            raise Superseded(workspace_id)
        return self._state.update(workspace_id, when={status}, flush=False, **changes)

    # Records

    def _set_status(self, workspace_id, status, *, when=None, flush=True, **changes):
        try:
            workspace = self._state.update(workspace_id, when=when, flush=False, status=status, **changes)
        except Superseded:
            if when is None:
                raise WorkspaceNotFound(workspace_id) from None
            raise
        self.announce(workspace)  # at once: whoever sees a status has its event behind him
        if flush:
            # A disk that refuses is no reason to end a job; who waits for an answer is told.
            self._state.try_flush()
        return workspace

    def announce(self, workspace):
        """Tell the status of a workspace, and since when its node does not answer."""
        log.info('Workspace %s (%s) is %s.', workspace.id, workspace.name, workspace.status)
        told = {'error': workspace.error or self._engine.away(workspace.node),
                'warnings': workspace.warnings if workspace.status == RUNNING else None}
        self._events.publish('status', workspace.id, {'status': workspace.status, 'name': workspace.name}
                             | {name: value for name, value in told.items() if value})

    def _build_output(self, workspace_id, line):
        self._events.publish('log', workspace_id, {'stream': 'build', 'message': line})

    def _rename(self, workspace, name):
        self._state.rename(workspace.id, name, taken_names=self.recipe.names_of(self._engine.taken()[0]))
        try:
            container = self._engine.find(workspace.id)
            if container is not None:
                self._engine.rename(container, self.recipe.name(name))
        except DockerError as error:
            self._state.rename(workspace.id, workspace.name)
            if isinstance(error, ConflictOnEngine):
                raise WorkspaceAlreadyExists(str(error)) from error
            raise
