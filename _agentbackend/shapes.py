"""Types of what the tools of the MCP server are given and answer: no more than a model wants to read."""
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

MAX_TEXT = 30_000  # characters of one output that an answer holds
READS, ADDS, AGAIN, RUNS, DESTROYS = 'reads', 'adds', 'again', 'runs', 'destroys'
HINTS = {READS: {'readOnlyHint': True, 'openWorldHint': False},
         ADDS: {'readOnlyHint': False, 'destructiveHint': False, 'openWorldHint': True},
         AGAIN: {'readOnlyHint': False, 'destructiveHint': False, 'idempotentHint': True,
                 'openWorldHint': False},
         RUNS: {'readOnlyHint': False, 'destructiveHint': True, 'openWorldHint': True},
         DESTROYS: {'readOnlyHint': False, 'destructiveHint': True, 'openWorldHint': False}}


def said(kind, description, **limits):
    """Return the type of an argument, with what a model is told of it."""
    return Annotated[kind, Field(description=description, **limits)]


Name = said(str, 'Name or id of the workspace.')
FilePath = said(str, 'Path, relative to the project unless it begins with a slash.')
CommandLine = said(str, 'Command line for bash. Each call is a new shell: cd and exports do not carry over.')
Cwd = said(str | None, 'Folder to run in; default: the project.')
Env = said(dict[str, str] | None, 'Environment variables, for this command only.')
ExecId = said(str, 'exec_id of a command that was started in the background.')
SessionId = said(str, 'Id of the session, as start_task gives it.')


@dataclass
class Workspace:
    """A workspace."""

    name: str
    id: str
    status: str
    type: str
    template: str
    ports: dict[str, int] = field(default_factory=dict)
    editor_url: str | None = None
    ssh_command: str | None = None
    git_url: str | None = None
    expires_at: str | None = None
    error: str | None = None
    warnings: list[str] = field(default_factory=list)


@dataclass
class Output:
    """What a command has printed. `note` says what is missing, and how to get it."""

    exit_code: int | None
    stdout: str
    stderr: str
    note: str = ''


@dataclass
class Background:
    """A command in the background, running, ended or interrupted. `next` is what `after` has to be for what
    follows."""

    exec_id: str
    state: str
    exit_code: int | None = None
    output: str = ''
    next: int = 0
    command: str = ''


@dataclass
class Entry:
    """A file or folder; size in bytes."""

    name: str
    type: str
    size: int


@dataclass
class Lines:
    """Lines of a file. `next_line` is where what follows begins, null at the end."""

    content: str
    first_line: int
    last_line: int
    next_line: int | None


@dataclass
class Written:
    """A file that was written; size in bytes."""

    path: str
    size: int


@dataclass
class Task:
    """A task of an agent: starting, running, cancelling, completed, failed or cancelled."""

    session: str
    state: str
    result: str = ''
    error: str = ''
    title: str = ''


@dataclass
class Transcript:
    """What a session has said and done. `next` is what `after` has to be for what follows; `more` says that
    some of that is there already."""

    lines: list[str]
    state: str
    next: str | None
    more: bool


def workspace_of(found):
    """Return a workspace of the API as the tools show it."""
    return Workspace(
        found['name'], found['id'], found['status'], found['type'], found['template'], found['ports'],
        found.get('codeServerUrl'), found.get('sshCommand'),
        found.get('gitUrl'), found.get('expiresAt'), found.get('error'), found.get('warnings') or [])


def capped(text, encoding='utf-8'):
    """Return a text, or of a long one the beginning and the end."""
    if encoding == 'base64':
        return 'It is no text; base64 of it can be printed by a command.' if text else ''
    if len(text) <= MAX_TEXT:
        return text
    third = MAX_TEXT // 3
    return f'{text[:third]}\n[... {len(text) - 3 * third} characters left out ...]\n{text[-2 * third:]}'


def line_of(event):
    """Return an event of a session as a line."""
    data = event['data']
    words = ' '.join(str(data[key]) for key in ('tool', 'message', 'status') if data.get(key))
    return f"{event['type']}: {words}"[:2000]
