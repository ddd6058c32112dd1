"""Commands that outlive client and server: runs like those of tasks, known by their folders in the volume."""
import contextlib
import json
import re
import secrets
import time

from _agentbackend.access import not_running
from _agentbackend.dockerlog import STDERR
from _agentbackend.engine import USER
from _agentbackend.errors import ExecNotFound, TooMany, refusal
from _agentbackend.execs import environment, stdin_of, told
from _agentbackend.records import RUNNING
from _agentbackend.timing import cooperatively, known_time, parse_time, view_time

MAX_LISTED = 2**22  # bytes of what describes commands
MAX_LINE = 2**20  # bytes of a line of agent-run's log, which makes none that is longer
START_TIME = 30  # seconds that a command may take until its keeper is seen
EXEC_ID = re.compile(r'exec-[0-9a-f]{16}')
# Prints a line for each command: its id, how it stands, when it ended, and what describes it. Its files may
# be anything by now, also such as never end, or have no beginning.
LIST = r'''
cd "$1" 2>/dev/null || exit 0
for id in $2; do
  [ -f "$id/meta" ] || continue
  if [ -f "$id/exit" ]; then state=$(timeout 2 head -c 20 "$id/exit") at=$(stat -c %Y "$id/exit")
  elif [ ! -f "$id/keeper" ]; then state=starting at=0
  elif kill -s 0 "$(timeout 2 head -c 20 "$id/keeper")"; then state=running at=0
  else state=lost at=$(stat -c %Y "$id/log" || echo 0); fi
  printf '%s %s %s ' "$id" "$state" "$at"; timeout 2 head -c 65536 "$id/meta"; echo
done 2>/dev/null
'''
# Sends a signal to all that carries the command's id in its environment.
SIGNAL = r'''
for file in $(grep -lzxFs "AGENT_RUN_ID=$1" /proc/[0-9]*/environ); do
  pid=${file#/proc/}; kill -s "$2" "${pid%/environ}" 2>/dev/null
done
exit 0
'''
SHELL = 'cd "$1" || exit 126; shift; exec "$@"'
LOG_LINE = re.compile(rb'\d+ ([oOeEnx]) (.*)', re.DOTALL)
STREAMS = {'stdout': b'oO', 'stderr': b'eE', None: b'oOeE'}


class Detached:
    """Begins, lists, reads, signals and deletes detached commands. What is known of them is in the volume."""

    def __init__(self, config, engine, runs, access, execs, activity):
        self._config = config
        self._engine = engine
        self._runs = runs
        self._access = access
        self._execs = execs
        self._activity = activity

    def begin(self, workspace, body):
        """Begin a command for a checked body of POST .../exec, and return what describes it."""
        if body.get('user', USER) != USER:
            raise refusal('user', 'is root, but a detached command runs as dev; let it call sudo')
        if workspace.status != RUNNING:
            raise not_running(workspace)
        exec_id, data = f'exec-{secrets.token_hex(8)}', stdin_of(body)
        folder = self._execs.folder(workspace, body)
        with self._access.container(workspace) as container_id:
            container = self._engine.inspect(container_id)
            if container is None or not container.up:
                raise not_running(workspace)
            meta = {'command': told(body), 'cwd': folder, 'startedAt': time.time(),
                    'boot': container.started_at}
            limit = self._config.exec_max_commands
            shell = self._runs.prepare(container, exec_id, data, asked='detach',
                                       meta=json.dumps(meta).encode(), limit=limit)
            if shell is None:
                raise TooMany(f'EXEC_MAX_COMMANDS={limit} detached commands are running in this workspace; '
                              'wait for one to finish.', headers={'Retry-After': '10'})
            words = ['sh', '-c', SHELL, 'sh', folder, *self._words(shell, body)]
            self._runs.start(container, exec_id, shell, words, env=environment(USER, body),
                             workdir=self._config.workspace_base_path)
        self._activity.note(workspace.id)
        return view(exec_id, 'running', 0, meta, container.started_at)

    def list(self, workspace, exec_id='exec-*'):
        """Return what describes the commands of a workspace, oldest first."""
        with self._access.container(workspace) as container_id:
            container = self._engine.inspect(container_id)
            _, printed = self._engine.run(container_id, ['sh', '-c', LIST, 'sh', self._runs.folder('.'),
                                                         exec_id], user=USER, limit=MAX_LISTED)
        found = [line.split(b' ', 3) for line in printed.split(b'\n') if line.count(b' ') >= 3]
        boot = container.started_at if container is not None else ''
        shown = [view(name.decode(), state.decode('ascii', 'replace'), known_time(at), read_meta(meta), boot)
                 for name, state, at, meta in found if EXEC_ID.fullmatch(name.decode('ascii', 'replace'))]
        return sorted(shown, key=lambda item: (item['startedAt'] or '', item['execId']))

    def get(self, workspace, exec_id):
        """Return what describes a command; raise ExecNotFound."""
        found = self.list(workspace, exec_id) if EXEC_ID.fullmatch(exec_id) else []
        if not found:
            raise ExecNotFound(exec_id)
        return found[0]

    def at_work(self, workspace):
        """Return [('exec', since, command)] of what runs in a workspace."""
        return [('exec', parse_time(item['startedAt']), item['command']) for item in self.list(workspace)
                if item['state'] == 'running']

    def output(self, workspace, exec_id, *, stream=None, after=0, follow=False):
        """Yield first nothing, then what a command has printed from a byte on; with `follow` also what it
        prints until it ends."""
        self.get(workspace, exec_id)
        with self._access.container(workspace) as container_id:
            container = self._engine.inspect(container_id)
            if follow and workspace.status == RUNNING:
                pieces = self._runs.follow(container, exec_id, 0)
            else:
                pieces = (data for kind, data in self._engine.follow(
                    container_id, ['cat', f'{self._runs.folder(exec_id)}/log'], user=USER) if kind != STDERR)
            yield b''
            for data in cooperatively(printed_by(pieces, STREAMS[stream])):
                if after < len(data):
                    yield data[after:]
                after = max(0, after - len(data))

    def signal(self, workspace, exec_id, name):
        """Send a signal to a command and all that it has started; one that has ended is left alone."""
        found = self.get(workspace, exec_id)
        if found['state'] == 'running':
            with self._access.container(workspace) as container_id:
                self._engine.run(container_id, ['sh', '-c', SIGNAL, 'sh', exec_id, name], user=USER)
        return found

    def remove(self, workspace, exec_id):
        """End a command if it runs, and delete what it has written."""
        found = self.get(workspace, exec_id)
        with self._access.container(workspace) as container_id:
            if found['state'] == 'running':
                self._engine.run(container_id, ['agent-sweep', exec_id, 'keeper'], user=USER)
            self._runs.remove(container_id, [exec_id])

    @staticmethod
    def _words(shell, body):
        command = body['command']
        words = [shell.rpartition('/')[2], '-lc', command] if isinstance(command, str) else command
        return [*(['timeout', '-k', '5', str(body['timeout'])] if 'timeout' in body else []), *words]


def read_meta(text):
    """Return what describes a command, from a file that anything in the workspace may have written."""
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        found = json.loads(text)
        return {'command': str(found['command'])[:200], 'cwd': str(found['cwd'])[:5000],
                'startedAt': known_time(found['startedAt']), 'boot': str(found['boot'])}
    return {'command': '', 'cwd': '', 'startedAt': 0.0, 'boot': ''}


def view(exec_id, state, ended_at, meta, boot):
    """Return a command as an object of the API; one that ended with its container has no exit status."""
    is_starting = state == 'starting' and abs(time.time() - meta['startedAt']) < START_TIME
    is_running = (state == 'running' or is_starting) and meta['boot'] == boot
    exit_code = int(state) if state.isdigit() and len(state) <= 3 else None
    return {'execId': exec_id, 'command': meta['command'], 'cwd': meta['cwd'],
            'state': 'running' if is_running else 'ended' if exit_code is not None else 'interrupted',
            'exitCode': exit_code, 'startedAt': view_time(meta['startedAt']),
            'endedAt': view_time(ended_at) if ended_at and not is_running else None}


def printed_by(pieces, letters):
    """Yield what a command has printed on some of its streams, from agent-run's log."""
    rest, unfinished = b'', set()
    for data in pieces:
        *lines, rest = (rest + data).split(b'\n')
        rest, found = rest[:MAX_LINE], bytearray()
        for line in lines:
            match = LOG_LINE.fullmatch(line)
            letter, text = match.groups() if match else (b'x', b'')
            if letter == b'n':
                unfinished.add(text)  # the line that follows is the last one of its stream, and has no end
            elif letter in letters:
                found += text + (b'' if letter.isupper() or letter in unfinished else b'\n')
        if found:
            yield bytes(found)
