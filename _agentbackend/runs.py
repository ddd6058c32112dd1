"""Commands in workspaces that outlive everybody: each has a folder in the volume with its input, output and
end."""
import contextlib
import itertools

from _agentbackend.dockerlog import STDERR
from _agentbackend.engine import USER
from _agentbackend.errors import DockerError, refusal
from _agentbackend.translators import parse_status

# One is printed first: an engine that could not run the command says so in its place, on stdout too.
STAMPED, PLAIN = b'\x06', b'\x05'  # agent-run's log; the agent's stdout alone, as earlier versions kept it
SIGNAL_TIMEOUT = 5  # seconds that it may take to send a signal
FOLDERS_AT_ONCE = 500  # that one command deletes
MAX_STATUS = 100  # bytes
FULL = 75  # exit status of PREPARE
# Makes the folder of a run and takes from stdin what describes it and its input, so many bytes each:
# arguments would show in the engine's events. Prints the shell in which the command is to run, which knows
# the workspace's environment. With a limit it does so only while fewer detached commands are at work.
PREPARE = r'''
for program in agent-run "$2"; do command -v "$program" >/dev/null || { echo "$program"; exit 127; }; done
count=0
[ "$5" = 0 ] || for folder in "${1%/*}"/exec-*; do
  [ ! -e "$folder/exit" ] && [ -f "$folder/keeper" ] || continue
  kill -s 0 "$(timeout 2 head -c 20 "$folder/keeper")" && count=$((count + 1))
done 2>/dev/null
[ "$5" = 0 ] || [ "$count" -lt "$5" ] || exit 75
umask 077; mkdir -p "$1" || exit
[ "$3" = 0 ] || head -c "$3" >"$1/meta" || exit
head -c "$4" >"$1/task" || exit
if [ -x /usr/local/lib/agentbackend/bash ]; then echo /usr/local/lib/agentbackend/bash; else command -v sh; fi
'''
# Prints what the run has written from a byte on, as it comes; ends with the run, and then prints its status
# on stderr. The reader is known to be gone when stdin ends, so that a server that was killed leaves no `tail`
# behind. The first byte tells the form; an agent-run of an earlier version writes another one.
FOLLOW = '''
exec 4>&2 2>/dev/null
n=0; while [ ! -e "$1/pid" ] && [ ! -e "$1/exit" ] && [ $n -lt 200 ]; do sleep 0.05; n=$((n+1)); done
if [ -e "$1/log" ]; then file=log; pid=keeper; printf '\006'; else file=out; pid=pid; printf '\005'; fi
if [ -e "$1/exit" ]; then tail -c "+$2" "$1/$file"; else
  exec 3<&0
  tail -c "+$2" -f -s 0.1 --pid="$(cat "$1/$pid")" "$1/$file" & t=$!
  { read -r _ <&3; kill "$t"; } & w=$!
  wait "$t" || true; kill "$w"
fi
n=0; while [ ! -e "$1/exit" ] && [ $n -lt 100 ]; do sleep 0.05; n=$((n+1)); done
[ -e "$1/exit" ] || kill -0 "$(cat "$1/pid")" || echo 137 >"$1/exit" || echo 137 >&4
[ ! -e "$1/exit" ] || head -c 100 "$1/exit" >&4
'''


class Following:
    """The output of a run as it comes. Iterate over it; then `status` is the run's, or None if it has not
    ended."""

    def __init__(self, pieces):
        self._pieces = pieces
        self.stamped = None  # the form of the bytes, once it is known
        self.status = None

    def __iter__(self):
        """Yield bytes, at first maybe none; nothing at all when the engine could not begin to follow."""
        told = b''
        for stream, data in self._pieces:
            if stream == STDERR:
                told = (told + data)[:MAX_STATUS]
            elif self.stamped is not None:
                yield data
            elif data[:1] in (STAMPED, PLAIN):
                self.stamped = data[:1] == STAMPED
                yield data[1:]
            else:
                return
        self.status = parse_status(told)


class Runs:
    """Begins, follows, ends and deletes runs. A run is named by its id; `boot` is when its container was
    started."""

    def __init__(self, engine, base_path):
        self._engine = engine
        self._base_path = base_path

    def folder(self, run_id):
        """Return the folder of a run inside its workspace."""
        return f'{self._base_path}/.agentbackend/runs/{run_id}'

    def prepare(self, container, run_id, data, *, asked='agent', program='agent-run', meta=b'', limit=0):
        """Make the folder of a run with its input, and return the shell for its command, or None when `limit`
        detached commands are at work; raise ValidationError of what was asked when the image lacks what it
        needs."""
        command = ['sh', '-c', PREPARE, 'sh', self.folder(run_id), program, str(len(meta)), str(len(data)),
                   str(limit)]
        code, said = self._engine.run(container.id, command, user=USER, stdin=meta + data)
        said = said.decode('utf-8', 'replace').strip()
        if code == FULL:
            return None
        if 'unable to find user' in said:  # the engine says that in the place of the command
            raise refusal(asked, f'needs the user {USER}, whom the image of this workspace has not')
        if code == 127:
            raise refusal(asked, f'needs {said}, which the image of this workspace has not')
        if code != 0 or not said:
            raise DockerError('The run could not be prepared in the workspace: '
                              f'{said[-500:] or "the engine lost what was printed; try again"}')
        return said.splitlines()[-1]

    def start(self, container, run_id, shell, command, *, env, workdir):
        """Start a command in a shell, detached from everybody; it reads the input that was prepared.

        `env` wins over what the workspace's own environment has.
        """
        words = ['agent-run', self.folder(run_id), shell, '-c', 'exec "$@"', shell, *command]
        self._engine.run_detached(container.id, words, user=USER, workdir=workdir, env={
            **env, 'WORKSPACE_KEEP': ' '.join(env), 'AGENT_RUN_KEPT_ID': run_id})

    def follow(self, container, run_id, offset):
        """Return the Following of a run's output from a byte on."""
        command = ['sh', '-c', FOLLOW, 'sh', self.folder(run_id), str(offset + 1)]
        # With its id, a sweep ends this reader too: the command may have stopped it.
        return Following(self._engine.follow(container.id, command, user=USER, env={'AGENT_RUN_ID': run_id}))

    def output(self, container, run_id, limit):
        """Return (form, pieces) of what a run has written, at most `limit` bytes, of a container that may be
        stopped.

        A file of a workspace may be of any length, and cost the workspace nothing.
        """
        for form, name in ((STAMPED, 'log'), (PLAIN, 'out')):
            pieces = self._engine.read_file(container.id, f'{self.folder(run_id)}/{name}', limit=limit)
            first = next(pieces, None)
            if first is not None:
                return form, itertools.chain([first], pieces)
        return STAMPED, ()

    def status(self, container, run_id):
        """Return the exit status that a run has written, or None."""
        return parse_status(self._engine.get_file(container.id, f'{self.folder(run_id)}/exit'))

    def signal(self, workspace_id, boot, run_id, name):
        """Send a signal to the command itself: its children would take an interrupt for their own."""
        script = f'[ -e "$1/exit" ] || kill -s {name} "$(cat "$1/pid")"'
        self._in_container(workspace_id, boot, ['sh', '-c', script, 'sh', self.folder(run_id)])

    def sweep(self, workspace_id, boot, run_id, *, keeper=False):
        """Kill everything that carries the run's id in its environment, with what waits for its end if asked
        to.

        Returns whether nothing can be left of it: a container that is paused, or an engine that is away, has
        to be asked again.
        """
        with contextlib.suppress(DockerError):
            return self._in_container(workspace_id, boot,
                                      ['agent-sweep', run_id, *(['keeper'] if keeper else [])])
        return False

    def delete(self, workspace_id, run_ids):
        """Delete what runs have written; return False when that has to wait until their workspace runs."""
        container = self._engine.find(workspace_id)
        if container is None or container.state != 'running':
            return False
        self.remove(container.id, run_ids)
        return True

    def remove(self, container_id, run_ids):
        """Delete what runs have written, by a command in a container with their volume."""
        for start in range(0, len(run_ids), FOLDERS_AT_ONCE):
            folders = [self.folder(run_id) for run_id in run_ids[start:start + FOLDERS_AT_ONCE]]
            code, _ = self._engine.run(container_id, ['rm', '-rf', *folders], user=USER)
            if code != 0:
                raise DockerError('What a task or command has written could not be deleted: rm ended with '
                                  f'status {code}.')

    def _in_container(self, workspace_id, boot, command):
        """Run a short command in the container of a run; return whether it was done, or there is nothing to
        do it to."""
        container = self._engine.find(workspace_id)
        # Its number is another's by now.
        if container is None or not container.up or container.started_at != boot:
            return True
        return self._engine.run(container.id, command, user=USER, timeout=SIGNAL_TIMEOUT)[0] == 0
