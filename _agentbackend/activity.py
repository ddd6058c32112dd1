"""What keeps workspaces alive just now."""
import collections
import contextlib
import time

from _agentbackend.errors import DockerError, Superseded, WorkspaceNotRunning
from _agentbackend.records import RUNNING

NOTE_PAUSE = 1  # seconds between notes of one workspace, each of which is written to the state file


class Activity:
    """Notes that something goes on in a workspace: while it does, and when it ends."""

    def __init__(self, state):
        self._state = state
        # Each returns [(kind, since, detail)] of what else goes on in a workspace that runs.
        self.sources = []
        self._present = collections.defaultdict(dict)  # workspace id -> {key: (kind, since, detail)}
        self._noted = {}  # workspace id -> when it was last noted

    @contextlib.contextmanager
    def during(self, workspace_id, kind, detail):
        """Count something as activity for the length of a block."""
        key = object()
        self._present[workspace_id][key] = (kind, time.time(), detail)
        self.note(workspace_id)
        try:
            yield
        finally:
            del self._present[workspace_id][key]
            if not self._present[workspace_id]:
                del self._present[workspace_id]
            self.note(workspace_id)

    def reasons(self, workspace):
        """Return what keeps a workspace alive, [(kind, since, detail)]."""
        found = [('task', run.started_at, run.task[:200]) for run in self._state.open_runs()
                 if run.workspace_id == workspace.id and run.state == RUNNING]
        found += self._present.get(workspace.id, {}).values()
        for source in self.sources if workspace.status == RUNNING else ():
            with contextlib.suppress(DockerError, WorkspaceNotRunning):
                found += source(workspace)
        return found

    def keep_alive(self, workspace):
        """Let a workspace live on that is to be deleted, when something is at work in it. What an editor says
        of itself counts from when it said it."""
        if any(kind != 'editor' for kind, *_ in self.reasons(workspace)):
            self.note(workspace.id)

    def note(self, workspace_id, *, now=None):
        """Let the time of a workspace that lives by its activity count from now."""
        now = time.time() if now is None else now
        if abs(now - self._noted.get(workspace_id, 0)) < NOTE_PAUSE:
            return
        self._noted[workspace_id] = now
        try:
            self._state.update(workspace_id, flush=False, last_activity_at=now)
        except Superseded:
            self._noted.pop(workspace_id, None)
