"""What is known of a workspace, a run and a session, as records that a file can hold."""
import copy
import dataclasses
import json
from dataclasses import dataclass, field

STATUSES = ('creating', 'running', 'stopping', 'stopped', 'error', 'deleting')
CREATING, RUNNING, STOPPING, STOPPED, ERROR, DELETING = STATUSES
SETTLED = frozenset((RUNNING, STOPPED, ERROR))  # no job is at work on it
COMPLETED, FAILED, CANCELLED = 'completed', 'failed', 'cancelled'  # of a run, beside RUNNING
PERSISTENT, TEMPORARY, AGENT = 'persistent', 'temporary', 'agent'
MAX_TITLE = 100  # characters


@dataclass
class Workspace:
    """What is known of one workspace. Times are seconds since the epoch, sizes bytes.

    `folder` is the name it was created with, and names the project folder: a rename does not move files under
    an open editor. `ever_ran` is true once it has answered: from then on a failure never removes its data.
    `runs_begun` counts the tasks it was given.
    """

    id: str
    name: str
    folder: str
    type: str
    template: str
    created_at: float
    status: str = CREATING
    ports: dict = field(default_factory=dict)  # 'codeServer', 'ssh' or a container port as text -> host port
    wanted_ports: list = field(default_factory=list)
    ssh: bool = True
    git_url: str = ''
    git_branch: str = ''
    git_depth: int = None
    git_filter: str = None
    git_user_name: str = ''
    git_user_email: str = ''
    # Name of a file in the container -> the secret that is kept in it.
    git_access: dict = field(default_factory=dict)
    has_credentials: bool = False  # it was given some for the first clone, which are kept nowhere
    setup: str = ''
    env: dict = field(default_factory=dict)
    cpus: float = 0
    memory: int = 0
    labels: dict = field(default_factory=dict)
    ssh_public_keys: list = field(default_factory=list)
    ttl: float = None
    ttl_from: float = 0
    last_activity_at: float = 0
    password: str = ''
    container_id: str = ''
    node: str = ''  # the machine that it is on, where there are several
    ever_ran: bool = False
    warm: bool = False  # its container was made ahead, and waited for it
    error: str = ''
    warnings: list = field(default_factory=list)  # what its last start told that did not end well
    runs_begun: int = 0

    @property
    def wants_other_ports(self):
        """Whether its next container is to publish other ports than this one."""
        return set(map(str, self.wanted_ports)) != {key for key in self.ports if key.isdigit()}

    @property
    def expires_at(self):
        """When it is deleted, or None: an agent workspace counts from its last activity, the others from when
        ttl was set."""
        if self.ttl is None:
            return None
        return (self.last_activity_at if self.type == AGENT else self.ttl_from) + self.ttl

    def copy(self):
        """Return a copy that shares nothing with this one."""
        return dataclasses.replace(self, **{name: copy.copy(value) for name, value in vars(self).items()
                                            if isinstance(value, (dict, list))})


@dataclass(frozen=True)
class Run:
    """One task of a session; a record that never changes, only gives way to another.

    `number` counts the tasks of its session, `serial` those of its workspace. `boot` is when its container
    was started: a run does not outlive that. `begun` is [boot of this machine, monotonic seconds] when it
    began. `stop` is [code, message] once it is to be ended, `end` {'type', 'data'} of its last event once it
    has. Then `length` is how many bytes of its output belong to it: what it has left running may write on.
    `unswept` is true while processes of it may live that were to be ended.
    """

    id: str
    task: str
    started_at: float
    timeout: float
    boot: str
    session_id: str = ''
    workspace_id: str = ''
    number: int = 0
    serial: int = 0
    begun: list = field(default_factory=list)
    state: str = RUNNING  # then COMPLETED, FAILED or CANCELLED
    stop: list = None
    end: dict = None
    length: int = None
    ended_at: float = None
    unswept: bool = False


@dataclass(frozen=True)
class Session:
    """A conversation with an agent in one workspace; like Run, a record that never changes.

    The agent has an id of its own for it, and counts its cost from the beginning. `count` is how many runs it
    had, `last` the last one. `title` is of its first task; earlier versions kept none.
    """

    id: str
    workspace_id: str
    agent: str
    created_at: float
    agent_session_id: str = ''
    conversed: bool = False  # the agent has something to resume
    total_cost_usd: float = 0
    count: int = 0
    last: Run = None
    title: str = ''


def title_of(task):
    """Return what a session is called after its first task: the first line of it that says something."""
    line = next((line.strip() for line in task.splitlines() if line.strip()), '')
    return line if len(line) <= MAX_TITLE else f'{line[:MAX_TITLE - 1].rstrip()}…'


def record_of(kind, values):
    """Return a record of a class from what a file holds; raise ValueError for anything that is none."""
    try:
        record = kind(**values)
    except TypeError as error:
        raise ValueError(f'{kind.__name__}: {error}') from error
    for item in dataclasses.fields(kind):
        value = getattr(record, item.name)
        wanted = (int, float) if item.type is float else item.type
        may_be_none = value is None and item.default is None
        if not may_be_none and (
                not isinstance(value, wanted) or isinstance(value, bool) != (wanted is bool)):
            raise ValueError(f'{kind.__name__}: {item.name} is {value!r:.100}')
    return record


def encode_record(record, without=None):
    """Return a record as JSON text; raise ValueError for what JSON has not."""
    values = {item.name: getattr(record, item.name) for item in dataclasses.fields(record)
              if item.name != without}
    return json.dumps(values, allow_nan=False)
