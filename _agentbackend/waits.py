"""Waiting for a workspace to become what a client waits for, so that no script has to ask again and again."""
import contextlib

import gevent.event

from _agentbackend.errors import ClientLeft, WaitTimeout, WorkspaceNotRunning
from _agentbackend.events import EVERYTHING
from _agentbackend.records import ERROR, STOPPED

LOOK_PAUSE = 5  # seconds after which a record is looked at in any case


class Bell(gevent.event.Event):
    """A reader of events that rings when there are some."""

    def __init__(self):
        super().__init__()
        self.client_left = False
        self.wake = self.set

    def leave(self):
        """Ring because the client leaves."""
        self.client_left = True
        self.set()


def wait_until(state, events, workspace, statuses, timeout, watch_disconnect, *, strict=True):
    """Return the workspace once it has one of the statuses.

    Raises WorkspaceNotRunning, with the reason, when it can't get there by itself, and WaitTimeout; if it is
    not strict, it returns what there is instead. Raises ClientLeft when the client does.
    """
    bell = Bell()
    with gevent.Timeout(timeout, False), contextlib.closing(watch_disconnect(bell.leave)), \
            events.attached(EVERYTHING, bell):
        while workspace.status not in statuses:
            bell.clear()
            if workspace.status in (STOPPED, ERROR):
                if strict:
                    raise WorkspaceNotRunning(f'Workspace {workspace.name} is {workspace.status}, and does '
                                              f"not become {' or '.join(statuses)} by itself"
                                              + (f': {workspace.error}' if workspace.error else '.'))
                return workspace
            bell.wait(LOOK_PAUSE)
            if bell.client_left:
                raise ClientLeft('Nobody waits for it any more.')
            workspace = state.get(workspace.id)
        return workspace
    if strict:
        raise WaitTimeout(f'Workspace {workspace.name} is still {workspace.status} after {timeout:g} s.',
                          details=[{'path': 'status', 'message': workspace.status}])
    return workspace
