"""Where the files of a workspace are reached: in its container, or beside it when that is stopped."""
import contextlib

from _agentbackend.errors import ConflictOnEngine, MissingOnEngine, WorkspaceNotRunning
from _agentbackend.records import ERROR, RUNNING, STOPPED


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


def not_running(workspace, error=None):
    """Return the error for a workspace in which nothing can be done."""
    now, verb = workspace.status, 'start'
    if now == RUNNING:
        now = 'running, but its container is not'
    if error is not None and 'paused' in str(error):
        now, verb = 'paused by somebody', 'restart'
    return WorkspaceNotRunning(f'Workspace {workspace.name} is {now}; {verb} it, and wait until it is '
                               'running.')
