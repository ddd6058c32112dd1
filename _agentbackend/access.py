"""Where the files of a workspace are reached: in its container, or beside it when that is stopped; and how
programs of ours run there."""
import contextlib
from pathlib import Path

from _agentbackend.engine import USER
from _agentbackend.errors import ConflictOnEngine, MissingOnEngine, WorkspaceNotRunning, refusal
from _agentbackend.records import ERROR, RUNNING, STOPPED

# Reads no more than the program from stdin, of which the rest is for the program.
LOADER = '''import os, sys
text = b""
while len(text) < int(sys.argv[1]):
    data = os.read(0, int(sys.argv[1]) - len(text))
    if not data: sys.exit(1)
    text += data
exec(compile(text, "inside", "exec"))
'''


class Access:
    """Gives the container in which a command sees the volumes of a workspace."""

    def __init__(self, state, engine):
        self._state = state
        self._engine = engine

    @contextlib.contextmanager
    def container(self, workspace):
        """Give the id of a container that runs, for the length of a block: the workspace's own, or a helper
        with the same volumes. Raises WorkspaceNotRunning where there is none."""
        if workspace.status == RUNNING:
            try:
                yield self._state.container_of(workspace.id)
            except (MissingOnEngine, ConflictOnEngine) as error:
                raise not_running(workspace, error) from error
            return
        container = self._engine.find(workspace.id) if workspace.status in (STOPPED, ERROR) else None
        if container is None:
            raise not_running(workspace)
        with self._engine.helper(container, workspace.id) as container_id:
            yield container_id


def program(name):
    """Return a program of the folder `inside`, and the command that runs it as the first thing on its
    stdin."""
    text = (Path(__file__).parent / 'inside' / f'{name}.py').read_bytes()
    return text, ['python3', '-I', '-S', '-c', LOADER, str(len(text))]


def check_program(said, asked):
    """Raise ValidationError of what was asked when the engine has said, in the place of a program, that the
    image lacks what it needs."""
    if 'executable file not found' in said or 'unable to find user' in said:
        raise refusal(asked, f'needs python3 and the user {USER}, which the image of this workspace has not')


def not_running(workspace, error=None):
    """Return the error for a workspace in which nothing can be done."""
    now, verb = workspace.status, 'start'
    if now == RUNNING:
        now = 'running, but its container is not'
    if error is not None and 'paused' in str(error):
        now, verb = 'paused by somebody', 'restart'
    return WorkspaceNotRunning(f'Workspace {workspace.name} is {now}; {verb} it, and wait until it is '
                               'running.')
