"""What keeps the records in step with the engine and the clock: follow, adopt, compare and sweep."""
import contextlib
import functools
import json
import logging
import re
import secrets
import time
import weakref

import gevent
import gevent.event
import gevent.pool

from _agentbackend.drafts import CREDENTIALS, KEY, MAX_ENV
from _agentbackend.engine import MEMBER, PREFIX
from _agentbackend.errors import (
    BackendError,
    DockerError,
    EngineUnavailable,
    InstanceTaken,
    StateNotWritten,
    Superseded,
    UnreadableTemplate,
    ValidationError,
    WorkspaceNotFound,
)
from _agentbackend.recipe import SETTINGS_FOLDER, read_shell_lines
from _agentbackend.records import (
    AGENT,
    DELETING,
    ERROR,
    PERSISTENT,
    RUNNING,
    SETTLED,
    STOPPED,
    TEMPORARY,
    Workspace,
    record_of,
)

log = logging.getLogger('agentbackend')

CLAIM_TIMEOUT = 12  # seconds; a server that is there has half of that to answer
# Seconds: `docker restart` ends a container for a moment, and a temporary one must not be deleted for that.
GRACE = 4
SWEEP_PAUSE = 1  # seconds
TEND_PAUSE = 0.5  # seconds between looks at what the pool lacks
ASK_TIMEOUT = 5  # seconds that it may take to find out what goes on in a workspace that is to be deleted
EDITOR_PAUSE = 120  # seconds since an editor's last heartbeat after which it counts as closed
CLOCK_SKEW = 60  # seconds by which the clock of a remote engine may be ahead
EXIT_TERM = 143  # of a container that was told to end, by `docker stop` say
REMOVED = ('The container was removed outside Agent Backend, by a clean-up perhaps. The files are there: '
           'start makes a new container.')
LOST = ('The container and its volume were removed outside Agent Backend and the files are lost. '
        'Delete the workspace.')


class Keeper:
    """Owns the loops. What is to be done with a workspace, it asks of Workspaces."""

    def __init__(self, config, state, engine, templates, logs, workspaces, probes, claim):
        self._config = config
        self._state = state
        self._engine = engine
        self._templates = templates
        self._logs = logs
        self._workspaces = workspaces
        self._probes = probes
        self._claim = claim
        self.connected = False
        self.problems = {}  # what is wrong -> in words, for /health
        self.on_connected = []  # called when the engine answers, after `reconcile`
        self.on_ready = []  # called once, when the images of PREBUILD are there too
        self.on_expiring = []  # called with a workspace that lives by its activity, before it is deleted
        self.on_changed = []  # called with the id of a workspace whose container has changed
        self._first_try = True
        self._loops = []
        self._checks = gevent.pool.Group()
        self._to_check = set()
        self._latest = weakref.WeakValueDictionary()  # workspace id -> the look that was begun last

    def open(self):
        """Begin to follow the engine and to sweep; raise InstanceTaken when another server is at work on this
        instance."""
        try:
            with gevent.Timeout(CLAIM_TIMEOUT, EngineUnavailable('The Docker engine does not answer.')):
                self._claim.take()
        except InstanceTaken:
            raise
        except DockerError as error:
            log.debug('The instance is claimed when the engine answers: %s', error)
        self._loops = [gevent.spawn(self._follow_engine), gevent.spawn(self._sweep_for_ever)]
        if self._config.warm_pool:
            self._loops.append(gevent.spawn(self._tend_pool))

    def close(self):
        """End the loops and what they have begun; the next `open` goes on from there."""
        gevent.killall([*self._loops, *self._checks], timeout=10)
        self._to_check.clear()
        with contextlib.suppress(DockerError):
            self._claim.release()

    # The engine

    def _follow_engine(self):
        while True:
            try:
                self._follow_once()
            except (EngineUnavailable, InstanceTaken) as error:
                log.log(logging.WARNING if self.connected or self._first_try else logging.DEBUG, '%s', error)
                self.problems[''] = str(error)
            except Exception:
                log.exception('Following the engine failed; trying again.')
            self.connected = self._first_try = False
            with contextlib.suppress(InstanceTaken):  # a sweep that found it out may say so just now
                gevent.sleep(1)

    def _follow_once(self):
        info = self._engine.info()
        self._claim.take()
        log.info('The Docker engine answers: %d cores, %.1f GB.', info['cpus'], info['memory'] / 1e9)
        self._templates.look()
        self.reconcile()
        self.connected = True
        self.problems.pop('', None)
        for listener in self.on_connected:
            self._checks.start(gevent.Greenlet(listener))
        self._checks.start(gevent.Greenlet(self._prebuild))
        # From the time before the list on, so that nothing in between is missed; what comes twice does no
        # harm.
        for changed in self._engine.changes(info['time']):
            if isinstance(changed, str):
                self._look_at(changed)
            else:
                self._look_at_node(changed.node)

    def _look_at_node(self, node):
        """See to what is on a node that answers, or does not any more."""
        on_it = [workspace.id for workspace in self._state.all() if workspace.node == node]
        for workspace_id in on_it:
            self._probes.unmeter(workspace_id)  # its stream may not know yet that nobody speaks any more
        self.reconcile()
        for workspace_id in on_it:
            with contextlib.suppress(WorkspaceNotFound):
                self._workspaces.announce(self._state.get(workspace_id))
            if not self._engine.away(node):
                self._look_at(workspace_id)

    def _prebuild(self):
        builds = [self._checks.spawn(self._build, name) for name in self._config.prebuild]
        gevent.joinall(builds)
        if all(build.value for build in builds):
            listeners, self.on_ready = self.on_ready, []
            for listener in listeners:
                listener()

    def _build(self, name):
        """Return the image of a template, None if it could not be built."""
        try:
            return self._templates.image(name, lambda line: None, gevent.event.Event())
        except (UnreadableTemplate, ValidationError) as error:
            log.error('Template %s cannot be built: %s', name, error)
        except BackendError:
            return None  # the build has told

    def reconcile(self):
        """Compare the records with what the engine has: adopt what is unknown, go on with what was left
        half-done."""
        self._workspaces.pool.look()
        before = {workspace.id for workspace in self._state.all()}
        busy = {workspace_id for workspace_id in before if self._workspaces.has_job(workspace_id)}
        containers, volumes = self._engine.containers(), self._engine.volumes()
        known = before | {workspace.id for workspace in self._state.all()}
        for workspace_id in (containers.keys() | volumes.keys()) - known:
            self._try_to_adopt(workspace_id, containers.get(workspace_id), volumes.get(workspace_id))
        # Of those that were made or worked on meanwhile the lists tell an old state.
        for workspace_id in [item.id for item in self._state.all() if item.id not in (known - before) | busy]:
            with contextlib.suppress(WorkspaceNotFound, Superseded):  # of this one; the others go on
                try:
                    if not self._workspaces.has_job(workspace_id):
                        self._reconcile(self._state.get(workspace_id), containers.get(workspace_id),
                                        volumes.get(workspace_id))
                except EngineUnavailable as error:
                    if not error.node:
                        raise
                    log.debug('Workspace %s is looked at when its node answers: %s', workspace_id, error)

    def _reconcile(self, workspace, container, labels):
        """Compare a record with its container and the labels of its volume. It is on the node where these are
        found, whatever that was called before."""
        if container or labels:
            node = container.node if container else labels.get(f'{PREFIX}.node', '')
            if node != workspace.node:
                workspace = self._state.update(workspace.id, flush=False, node=node)
        self._resume(workspace, container, labels is not None)

    def _resume(self, workspace, container, has_volume):
        """Go on with a workspace on which no job is at work. One whose node does not answer is left alone,
        but for a removal: from a node that is no more there is nothing to remove."""
        if workspace.status != DELETING and self._engine.away(workspace.node):
            return
        if self._workspaces.go_on(workspace):
            return
        if workspace.status == ERROR and not workspace.ever_ran:
            if container or has_volume:
                self._engine.remove(workspace.id)
        else:
            self._compare(workspace, container, has_volume)

    def _look_at(self, workspace_id):
        """See to a workspace whose container changed, once the job at work on it is done."""
        self._logs.changed(workspace_id)
        for listener in self.on_changed:
            self._checks.start(gevent.Greenlet(listener, workspace_id))
        if workspace_id and workspace_id not in self._to_check:
            self._to_check.add(workspace_id)
            self._checks.start(gevent.Greenlet(self._check, workspace_id))

    def _check(self, workspace_id):
        had_job = self._workspaces.has_job(workspace_id)
        self._workspaces.join_job(workspace_id)
        self._to_check.discard(workspace_id)
        self._latest[workspace_id] = gevent.getcurrent()
        with contextlib.suppress(WorkspaceNotFound, EngineUnavailable, Superseded):
            workspace = self._state.get(workspace_id)
            container = self._engine.find(workspace_id)
            is_up = container and container.up
            if workspace.type == TEMPORARY and workspace.status == RUNNING and not is_up:
                gevent.sleep(GRACE)
                if self._latest.get(workspace_id) is not gevent.getcurrent():
                    return  # it has changed since, and is given the same time anew
                container = self._engine.find(workspace_id)
            workspace = self._state.get(workspace_id)
            if had_job and workspace.status == ERROR:
                return  # the job that the change came from has just failed, and said why
            if workspace.status in SETTLED and not self._workspaces.has_job(workspace_id):
                self._compare(workspace, container,
                              container is not None or self._engine.has_volume(workspace_id))

    def _compare(self, workspace, container, has_volume):
        """Bring a settled record in line with the engine."""
        if container is not None and container.going:
            container = None
        with contextlib.suppress(StateNotWritten):  # the change stands, and is written later
            if container is not None and container.up:
                self._compare_with_running(workspace, container)
            elif workspace.status == RUNNING or container is None:
                self._compare_with_ended(workspace, *self._second_look(workspace, container, has_volume))

    def _compare_with_running(self, workspace, container):
        if workspace.status != RUNNING:
            if workspace.ever_ran:
                self._workspaces.has_started(workspace)
            return
        if workspace.container_id != container.id or not self._probes.is_metered(workspace.id):
            self._state.update(workspace.id, flush=False, container_id=container.id)
            self._probes.meter(workspace.id, container.id)
        if workspace.type == PERSISTENT and not container.restarts:
            self._engine.keep_running(container.id)

    def _compare_with_ended(self, workspace, container, has_volume):
        if container is not None and container.up:
            return  # the list told something else; what changes from now on is told
        if workspace.status == RUNNING and workspace.type == TEMPORARY:
            self._workspaces.remove(workspace.id)
        elif container is None and not has_volume and workspace.ever_ran and workspace.status != ERROR:
            self._workspaces.has_ended(workspace, ERROR, LOST)
        elif container is None and workspace.ever_ran and not workspace.error and workspace.status != ERROR:
            self._workspaces.has_ended(workspace, STOPPED, REMOVED)
        elif workspace.status == RUNNING:
            quiet = container.exit_code in (0, EXIT_TERM) and not container.out_of_memory
            self._workspaces.has_ended(workspace, STOPPED,
                                       '' if quiet else self._probes.why_it_ended(container))

    def _second_look(self, workspace, container, has_volume):
        """Ask for the container and the volume themselves before it is said that they are gone: a list may
        lack something."""
        found = self._engine.inspect(workspace.container_id) if workspace.container_id else None
        if found is None and container is not None:
            found = self._engine.inspect(container.id)
        return None if found and found.going else found, has_volume or self._engine.has_volume(workspace.id)

    def _tend_pool(self):
        while True:
            gevent.sleep(TEND_PAUSE)
            try:
                if self.connected:
                    self._workspaces.pool.tend(self._workspaces.is_quiet)
            except EngineUnavailable as error:
                log.debug('The pool waits for the engine: %s', error)
            except Exception:
                log.exception('The pool could not be seen to; the next turn comes.')

    # Adoption

    def _try_to_adopt(self, workspace_id, container, labels):
        """Adopt a workspace; one that can't be is left out, and keeps no other from being adopted."""
        try:
            self._adopt(workspace_id, container, labels)
            self.problems.pop(workspace_id, None)
        except EngineUnavailable:
            raise
        except Exception as error:
            volume = self._engine.volume_of(workspace_id)
            what = f'container {container.name}' if container else f'volume {volume}'
            self.problems[workspace_id] = (
                f'The {what} bears the label of workspace {workspace_id}, which is not known here, and '
                'cannot be adopted '
                f'({error!r:.200}). Look at it with docker inspect; remove it if it is not needed.')
            log.warning('%s', self.problems[workspace_id])

    def _adopt(self, workspace_id, container, labels):
        """Make a record of what the engine's labels tell, when the state does not know of it."""
        if container and MEMBER in container.labels and not self._read(container, 'owned'):
            log.info('Removing %s, which was made ahead and has no owner.', container.name)
            self._engine.remove(workspace_id)
            return
        labels = (labels or {}) | (container.labels if container else {})
        if f'{PREFIX}.spec' not in labels:  # somebody tidied the volume away that bears them
            labels |= self._labels_inside(container)
        value = {key.removeprefix(f'{PREFIX}.'): text for key, text in labels.items()
                 if key.startswith(f'{PREFIX}.')}
        if container is None and value['type'] == TEMPORARY:
            log.info('Removing the volume of temporary workspace %s, whose container is gone.', workspace_id)
            self._engine.remove(workspace_id)
            return
        now = time.time()
        record = {'id': workspace_id, 'type': value['type'], 'template': value['template'],
                  'created_at': float(value['createdAt']), 'ports': json.loads(value['ports']),
                  'git_url': value['gitUrl'],
                  'git_branch': value['gitBranch'], 'ttl_from': now, 'last_activity_at': now,
                  'ever_ran': True}
        found = self._found_in(container) if container else {
            'name': value['name'], 'memory': self._config.workspace_memory, 'status': STOPPED,
            'node': value.get('node', '')}
        found.setdefault('password', secrets.token_urlsafe(12))
        if any(found['name'] in (item.name, item.id) for item in self._state.all()):
            # It was given away while the node was not among them.
            taken, found['name'] = found['name'], f"{found['name']}-{workspace_id.removeprefix('ws-')}"
            log.warning('Workspace %s is called %s from now on: another one is called %s.', workspace_id,
                        found['name'], taken)
        # What the state file would refuse at the next start is refused here.
        self._state.adopt(record_of(Workspace, {**json.loads(value['spec']), **record, **found}))
        log.info('Adopted workspace %s (%s) from the engine.', workspace_id, found['name'])

    def _found_in(self, container):
        """Return the fields of a record that a container tells."""
        read = functools.partial(self._read, container)
        secrets_kept = {name: text for name in (CREDENTIALS, KEY) if (text := read(name))}
        shared, password = self._config.shared_keys(), read('password').strip()
        keys = [key for key in read('authorized_keys').splitlines() if key not in shared]
        found = {'name': container.name.removeprefix(self._workspaces.recipe.name('')),
                 'env': read_shell_lines(read('env')),
                 'git_access': secrets_kept, 'setup': read('setup'), 'ssh_public_keys': keys,
                 'cpus': container.cpus,
                 'memory': container.memory, 'container_id': container.id, 'node': container.node,
                 'status': RUNNING}
        return found | ({'password': password} if password else {})

    def _labels_inside(self, container):
        """Return the labels that a workspace made ahead would have, as its container was told."""
        told = dict(line.partition('=')[::2] for line in self._read(container, 'workspace').split('\0'))
        spec = {'folder': told['WORKSPACE_NAME'], 'ssh': True, 'ttl': None, 'labels': {},
                'wanted_ports': []}
        values = {'type': told['WORKSPACE_TYPE'], 'template': re.split('[ /]', container.labels[MEMBER])[0],
                  'createdAt': repr(container.created_at), 'gitUrl': told['GIT_URL'],
                  'gitBranch': told['GIT_BRANCH'], 'spec': json.dumps(spec)}
        return {f'{PREFIX}.{key}': value for key, value in values.items()}

    def _read(self, container, name):
        pieces = self._engine.read_file(container.id, f'{SETTINGS_FOLDER}/{name}', limit=2 * MAX_ENV)
        return b''.join(pieces).decode('utf-8', 'replace')

    # The clock

    def _sweep_for_ever(self):
        while True:
            gevent.sleep(SWEEP_PAUSE)
            try:
                self.sweep(time.time())
            except InstanceTaken as error:
                self.connected = False
                self._loops[0].kill(error, block=False)  # it begins anew with a claim
            except Exception:
                log.exception('A sweep failed; the next one comes.')

    def sweep(self, now):
        """Do one turn: delete what has expired, and go on with what waited for the engine."""
        step = self._state.follow_the_clock()
        if step:
            log.warning('The clock was set by %+.0f s, or the machine slept; the times of expiry are moved '
                        'along.', step)
        if not self.connected:
            return
        self._claim.defend()
        asking = []
        for workspace in self._state.all():
            expires_at = workspace.expires_at or now + 1
            if workspace.type == AGENT and workspace.status == RUNNING and expires_at <= now and (
                    not self._engine.away(workspace.node)):
                asking.append(gevent.spawn(self._ask, workspace))
        # What runs in one of them may keep its own answer back, but not hold up the others.
        gevent.joinall(asking, timeout=ASK_TIMEOUT)
        gevent.killall(asking, block=False)
        self._workspaces.expire(now)
        for workspace in self._state.all():
            if workspace.status not in SETTLED and not self._workspaces.has_job(workspace.id) and (
                    not self._engine.away(workspace.node)):
                self._workspaces.go_on(workspace)

    def _ask(self, workspace):
        """Let all who know it note what keeps a workspace alive that is to be deleted."""
        for note in (self._note_editor, *self.on_expiring):
            try:
                note(workspace)
            except DockerError as error:
                log.warning('What goes on in workspace %s is not known: %s', workspace.id, error)
            except Exception:
                log.exception('What goes on in workspace %s could not be told.', workspace.id)

    def _note_editor(self, workspace):
        """Count an open editor as activity."""
        with contextlib.suppress(Superseded):
            beat = self.editor_seen(workspace)
            if beat and workspace.last_activity_at < beat:
                self._state.update(workspace.id, flush=False, last_activity_at=beat)

    def editor_at_work(self, workspace):
        """Return [('editor', since, words)] while the editor of a workspace is open."""
        beat = self.editor_seen(workspace)
        return [('editor', beat, 'an open editor')] if beat and beat > time.time() - EDITOR_PAUSE else []

    def editor_seen(self, workspace):
        """Return when the editor of a workspace was last open, or None: code-server notes its heartbeat, in
        milliseconds since the epoch."""
        # Whatever runs in there may answer in its place.
        with contextlib.suppress(ValueError, TypeError, KeyError, ArithmeticError, RecursionError,
                                 DockerError):
            health = self._probes.health(workspace, workspace.container_id)
            beat, now = json.loads(health)['lastHeartbeat'] / 1000, time.time()
            return min(beat, now) if 0 < beat < now + CLOCK_SKEW else None
        return None
