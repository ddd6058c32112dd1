"""What keeps workspaces alive just now, as far as it goes through this server."""
import collections
import contextlib
import time

from _agentbackend.errors import Superseded

NOTE_PAUSE = 1  # seconds between notes of one workspace, each of which is written to the state file


class Activity:
    """Notes that something goes on in a workspace: while it does, and when it ends."""

    def __init__(self, state):
        self._state = state
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

    def of(self, workspace_id):
        """Return what goes on in a workspace, [(kind, since, detail)], oldest first."""
        return sorted(self._present.get(workspace_id, {}).values(), key=lambda item: item[1])

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
