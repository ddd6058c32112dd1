"""Waiting for a workspace to become what a client waits for, so that no script has to ask again and again."""
import contextlib

import gevent.event

from _agentbackend.errors import WaitTimeout, WorkspaceNotRunning
from _agentbackend.records import ERROR, STOPPED

PAUSE = 0.05  # seconds between looks at a record


def wait_until(state, workspace, statuses, timeout, watch_disconnect, *, strict=True):
    """Return the workspace once it has one of the statuses.

    Raises WorkspaceNotRunning, with the reason, when it can't get there by itself, and WaitTimeout; if it is
    not strict, it returns what there is instead. It ends, too, when the client leaves.
    """
    left = gevent.event.Event()
    with gevent.Timeout(timeout, False), contextlib.closing(watch_disconnect(left.set)):
        while workspace.status not in statuses:
            if workspace.status in (STOPPED, ERROR):
                if strict:
                    raise WorkspaceNotRunning(f'Workspace {workspace.name} is {workspace.status}, and does '
                                              f"not become {' or '.join(statuses)} by itself"
                                              + (f': {workspace.error}' if workspace.error else '.'))
                return workspace
            if left.wait(PAUSE):
                return workspace
            workspace = state.get(workspace.id)
        return workspace
    if strict:
        raise WaitTimeout(f'Workspace {workspace.name} is still {workspace.status} after {timeout:g} s.',
                          details=[{'path': 'status', 'message': workspace.status}])
    return workspace
