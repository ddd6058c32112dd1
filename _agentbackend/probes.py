"""What a workspace shows from outside: whether its editor and SSH answer, its last words, and what it
uses."""
import contextlib
import http.client
import logging
import re
import time

import gevent

from _agentbackend.config import EVERYWHERE, NODE_ADDRESS
from _agentbackend.dockerlog import parse_stamp
from _agentbackend.engine import CODE_SERVER_PORT, HEARS, SSH_PORT
from _agentbackend.errors import ConflictOnEngine, DockerError, MissingOnEngine, UnreadableLog
from _agentbackend.timing import parse_time

log = logging.getLogger('agentbackend')

PROBE_TIMEOUT = 3  # seconds that a workspace has to say that it is well
EXIT_CLONE_FAILED, EXIT_WANTS_PORTS = 65, 66  # of the entrypoint
LAST_WORDS = 6  # lines of a container's output that an error quotes
LAST_LINES = 30  # that are looked through for them
MANY_LINES = 1000  # that are looked through where a log can be read from its end only
MAX_WARNINGS, MAX_WARNING = 20, 500  # of a start, characters of one
MAX_HEALTH = 10_000  # bytes that are read of what a workspace says of itself


class Start:
    """What a container tells while it starts; `again` says that it was started before, and `said` is what
    was heard of it already."""

    def __init__(self, container_id, warnings=(), *, again=False, said=b''):
        self.container_id = container_id
        self.again = again
        # Its last sign of life; when it was last listened for.
        self.heard_at = self.listened_at = time.monotonic()
        self.stamp = 0  # of the last line that was read
        self.warnings = list(warnings)  # those of the container before it too
        self.ports = []  # that its project wants to have published
        self.crashes, self.crashed = 0, ''  # how often something ended that is kept running; the last one
        self.is_up = False  # all is there, it has said
        self.waits = False  # for its owner, it has said
        self.is_late = False  # its editor begins only when it has one, it has said
        for line in said.decode('utf-8', 'replace').splitlines():
            self.take(line)

    def take(self, text):
        """Take a line of its log."""
        if not self.is_up:  # what comes later is no progress: an editor that dies again and again
            self.heard_at = time.monotonic()
        said = text.partition('workspace: ')[2] if text.startswith('workspace: ') else ''
        if said.startswith('warning: ') and len(self.warnings) < MAX_WARNINGS:
            warning = said.removeprefix('warning: ')[:MAX_WARNING]
            self.warnings += [warning] if warning not in self.warnings else []
        elif said.startswith('forward '):
            found = map(int, re.findall(r'(?<!\S)[1-9][0-9]{0,4}(?!\S)', said))
            taken = CODE_SERVER_PORT, SSH_PORT  # which are published anyway
            self.ports = [port for port in found if port < 65536 and port not in taken][:20]
        elif ' ended with status ' in said:
            self.crashes, self.crashed = self.crashes + 1, said.partition(' ended with')[0]
        self.is_late = self.is_late or said.endswith('the editor starts by its own command')
        self.waits = self.waits or said == 'waits for its owner'
        self.is_up = self.is_up or said.startswith('started in ')


class Probes:
    """Looks at editors over their published ports, or from inside where those can't be reached from here, and
    at the rest from inside."""

    def __init__(self, config, engine):
        self._engine = engine
        address = config.workspace_bind_address
        # Where published ports are reached from here, '' where they have another address than the one that
        # they are bound to.
        here = {'0.0.0.0': '127.0.0.1', '::': '::1', NODE_ADDRESS: '127.0.0.1'}.get(address, address)
        self._address = '' if config.workspace_host else here
        self._everywhere = address in EVERYWHERE
        self._usage = {}  # workspace id -> its last measurement
        self._meters = {}  # workspace id -> greenlet

    def is_ready(self, workspace, container, start, timeout):
        """Return whether what the user will use is there: the editor, which has `timeout` seconds to answer,
        SSH where there is any, and the project."""
        if self.health(workspace, container.id, timeout) is None:
            return False
        if container.labels.get(HEARS):  # it says itself that sshd and the project are there
            if not start.is_up:
                self.listen(start, container)
            return start.is_up
        if not self._ssh_answers(workspace, container.id):
            return False
        self.listen(start, container)  # of what it warns
        return True

    @staticmethod
    def pause(container, waited, number):
        """Return the seconds until the next look at a container that starts since `waited` seconds: a
        twentieth of that, and longer beside others, `number` in all. Where a look runs a command inside, it
        is not taken so often."""
        return min(max((0.02 if container.labels.get(HEARS) else 0.1) * number, waited / 20), 0.5)

    def health(self, workspace, container_id, timeout=PROBE_TIMEOUT):
        """Return the body of code-server's /healthz, or None when it does not answer within some seconds."""
        if self._engine.away(workspace.node):
            return None
        node = self._engine.reached(workspace.node)
        address = node if node and self._everywhere else '' if node else self._address
        if not address:
            url = f'http://127.0.0.1:{CODE_SERVER_PORT}/healthz'
            return self._ask_inside(container_id, ['curl', '--noproxy', '*', '-fsS', '-m', '2', url])
        connection = http.client.HTTPConnection(address, workspace.ports['codeServer'], timeout=timeout)
        try:
            # Whatever runs in there may answer in its place, and a byte at a time at that.
            with gevent.Timeout(timeout, TimeoutError()):
                connection.request('GET', '/healthz')
                answer = connection.getresponse()
                return answer.read(MAX_HEALTH) if answer.status == 200 else None
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def why_it_ended(self, container):
        """Return in words why a container has ended."""
        if container.out_of_memory:
            return (f'The container ran out of its {container.memory} bytes of memory. '
                    'Give it more, or ask less of it.')
        words = self.last_words(container)
        if container.exit_code == EXIT_CLONE_FAILED:
            return f'The clone failed: {words}'
        return f'The container ended with exit code {container.exit_code}. It printed last: {words}'

    def last_words(self, container):
        """Return the last lines that a container printed; without what the entrypoint tells of itself, if
        there are others."""
        printed = []
        with contextlib.suppress(MissingOnEngine, ConflictOnEngine):  # somebody removes it just now
            printed = [text.strip() for lines in self._engine.log_lines(container, tail=LAST_LINES)
                       for _, _, text in lines if text.strip()]
        others = [text for text in printed if not text.startswith(('workspace: ', 'Cloning into '))]
        return '\n'.join((others or printed)[-LAST_WORDS:]) or '(nothing)'

    def listen(self, start, container, *, pause=0):
        """Take what a container has told since it started, unless that was done less than `pause` seconds
        ago."""
        if time.monotonic() - start.listened_at < pause:
            return
        # The engine notes the time of a start a moment after it, so the first lines may be older than that.
        begun = int(parse_time(container.ended_at) * 1e9) if start.again else 0
        start.listened_at = time.monotonic()
        since = max(begun, start.stamp + 1)
        with contextlib.suppress(MissingOnEngine, ConflictOnEngine):
            try:
                self._hear(start, self._engine.log_lines(container, since=since))
            except UnreadableLog:  # what stands behind the damage is found from the end
                self._hear(start, self._engine.log_lines(container, since=since, tail=MANY_LINES))

    @staticmethod
    def _hear(start, batches):
        for lines in batches:
            for _, stamp, text in lines:
                start.take(text)
                start.stamp = max(start.stamp, parse_stamp(stamp))

    def usage(self, workspace_id):
        """Return the last measurement of a workspace, {cpu_percent, memory, memory_limit}, or None; never
        waits."""
        return self._usage.get(workspace_id)

    def is_metered(self, workspace_id):
        """Return whether a workspace is being measured."""
        return workspace_id in self._meters

    def meter(self, workspace_id, container_id):
        """Measure a container from now on: a stream per running one costs the engine about 0.1 % of a
        core."""
        self.unmeter(workspace_id)
        self._meters[workspace_id] = gevent.spawn(self._measure, workspace_id, container_id)

    def unmeter(self, workspace_id):
        """Stop that; twice is fine."""
        meter = self._meters.pop(workspace_id, None)
        if meter is not None:
            self._usage.pop(workspace_id, None)
            meter.kill(block=False)

    def close(self):
        """Stop measuring."""
        gevent.killall(list(self._meters.values()), timeout=5)

    def _ask_inside(self, container_id, command):
        """Return what a command prints, or None when it fails, or the container is paused or ends
        meanwhile."""
        with contextlib.suppress(MissingOnEngine, ConflictOnEngine):
            code, printed = self._engine.run(container_id, command)
            return printed if code == 0 else None

    def _ssh_answers(self, workspace, container_id):
        """Return whether sshd listens, which it does when its settings and keys are in order. It is not
        called: in the workspace's log it complains of whoever leaves without a login."""
        listens = ['sh', '-c', f"grep -Eq ':{SSH_PORT:04X} [0-9A-F]+:0000 0A ' /proc/net/tcp*"]
        return not workspace.ssh or self._ask_inside(container_id, listens) is not None

    def _measure(self, workspace_id, container_id):
        try:
            for usage in self._engine.usage(container_id):
                self._usage[workspace_id] = usage
        except DockerError as error:
            log.debug('Workspace %s is not measured any more: %s', workspace_id, error)
        finally:
            if self._meters.get(workspace_id) is gevent.getcurrent():
                del self._meters[workspace_id]
                self._usage.pop(workspace_id, None)
