"""Terminals of workspaces, which are held inside them."""
import contextlib
import json
import struct

from _agentbackend.access import check_program, not_running, program
from _agentbackend.dockerlog import STDERR
from _agentbackend.engine import USER
from _agentbackend.errors import DockerError, TerminalNotFound
from _agentbackend.records import RUNNING
from _agentbackend.timing import known_time, view_time

PROGRAM, COMMAND = program('terminal')
MAX_FRAME = 2**20  # bytes; the scrollback is the longest
MAX_LISTED = 2**20


class Terminals:
    """Finds, makes, lists and ends the terminals of workspaces, which are held inside them."""

    def __init__(self, config, engine, access, activity):
        self._config = config
        self._engine = engine
        self._access = access
        self._activity = activity

    def list(self, workspace):
        """Return what describes the terminals of a workspace."""
        if workspace.status != RUNNING:
            return []
        _, printed = self._run(workspace, 'list')
        shown = []
        for line in printed.decode('utf-8', 'replace').splitlines():
            # Anything in the workspace may have a socket where terminals have theirs.
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                item = json.loads(line)
                told = {key: int(item[key]) for key in ('columns', 'rows', 'clients')}
                shown.append({'name': str(item['name'])[:63], 'command': str(item['command'])[:1000], **told,
                              'startedAt': view_time(known_time(item['startedAt']))})
        return shown

    def end(self, workspace, name):
        """End a terminal with all that runs in it; raise TerminalNotFound."""
        if workspace.status != RUNNING or self._run(workspace, 'end', name)[0] != 0:
            raise TerminalNotFound(name)

    @contextlib.contextmanager
    def attached(self, workspace, name, *, cols, rows, command):
        """Join a terminal for the length of a block, which is given a dockerclient.Attached."""
        if workspace.status != RUNNING:
            raise not_running(workspace)
        folder = f'{self._config.workspace_base_path}/{workspace.folder}'
        words = ['attach', name, str(cols), str(rows), folder, str(self._config.max_terminals), command]
        with self._activity.during(workspace.id, 'terminal', name), \
                self._access.container(workspace) as container_id, \
                self._engine.attached(container_id, [*COMMAND, *words], user=USER) as attached:
            attached.sendall(PROGRAM)
            yield attached

    def _run(self, workspace, *words):
        with self._access.container(workspace) as container_id:
            return self._engine.run(container_id, [*COMMAND, *words], user=USER, stdin=PROGRAM,
                                    limit=MAX_LISTED)


def frame(letter, data=b''):
    """Return a frame for the program inside."""
    return letter + struct.pack('!I', len(data)) + data


def frames_of(attached):
    """Yield the frames (letter, bytes) that the program inside sends."""
    buffer, said = bytearray(), b''
    for stream, data in attached:
        if stream == STDERR:
            said = (said + data)[-1000:]
            continue
        buffer += data
        while len(buffer) >= 5:
            size = struct.unpack('!I', buffer[1:5])[0]
            if size > MAX_FRAME:
                break
            if len(buffer) < 5 + size:
                break
            yield bytes(buffer[:1]), bytes(buffer[5:5 + size])
            del buffer[:5 + size]
    text = (bytes(buffer[:500]) + said).decode('utf-8', 'replace').strip()
    check_program(text, 'terminal')
    if text:
        raise DockerError(f'The terminal has ended: {text[-500:]}')
