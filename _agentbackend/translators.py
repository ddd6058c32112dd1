"""What agents print, made into events. Knows nothing of workspaces, and nothing of time."""
import json
import math
import re
from dataclasses import dataclass, field, replace

MAX_LINE = 32 * 2**20  # bytes; a longer one is left out
MAX_WORDS = 8192  # characters of one message
MAX_FIELDS, MAX_NAME = 50, 100  # of one event, characters of a name of one
MAX_STEPS = 1000  # of a plan; each that is told makes us look at all of them
MAX_PARTS = 1_000_000  # of one line
MAX_NUMBER = 10**15  # of anything that an agent counts; JavaScript reads it exactly
# In the place of Claude's own words, which tell to do something that nobody can do here.
CLAUDE_HAS_NO_KEY = ('Claude has no key on this server. Start it with ANTHROPIC_API_KEY, '
                     'ANTHROPIC_AUTH_TOKEN or CLAUDE_CODE_OAUTH_TOKEN; workspaces go on meanwhile.')
CLAUDE_IS_REFUSED = ("Claude's API refused the key (401). Check ANTHROPIC_API_KEY, ANTHROPIC_AUTH_TOKEN or "
                     'CLAUDE_CODE_OAUTH_TOKEN of the server, and start it again; workspaces go on meanwhile.')


# ---------------------------------------------------------------------------------------------
# Plans
# ---------------------------------------------------------------------------------------------

class Plan:
    """What a run has told of its steps; makes the progress events, only where something has changed."""

    def __init__(self):
        self._last = None
        self._planned = False
        self._done = 0

    def steps(self, steps):
        """Take a plan as [(text, state)]; state is pending, in_progress or completed."""
        if not steps:
            return []
        self._planned = True
        states = [state for _, state in steps]
        if 'in_progress' in states:
            index = states.index('in_progress')
            return self._progress(index + 1, len(steps), steps[index][0])
        done = states.count('completed')
        if done == len(steps):
            return self._progress(done, len(steps), 'All steps are done')
        return self._progress(done, len(steps), next(text for text, state in steps if state != 'completed'))

    def tool_done(self, title):
        """Count a finished tool call: all the progress there is to tell where there is no plan. The total is
        not known."""
        self._done += 1
        return [] if self._planned else self._progress(self._done, None, title)

    def _progress(self, step, total, message):
        progress = {'step': step, 'total': total, 'message': shorten(message)}
        if progress == self._last:
            return []
        self._last = progress
        return [('progress', progress)]


def shorten(text, limit=MAX_WORDS):
    """Return text of at most `limit` characters, and say how much was left out."""
    text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
    return text if len(text) <= limit else f'{text[:limit]}… ({len(text) - limit} more characters)'


# ---------------------------------------------------------------------------------------------
# Translators
# ---------------------------------------------------------------------------------------------

def parse_record(text):
    """Return the JSON object of a line, or None for anything else, NaN and infinite numbers included: a
    browser could not read them.

    One of very many parts is none either: an object of Python has ten times the size of its text, and to make
    it takes all others' time.
    """
    if text.count('{') + text.count('[') > MAX_PARTS:
        return None
    try:
        record = DECODER.decode(text)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def finite(text):
    """Return a number that JSON has; raise ValueError for the others."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


DECODER = json.JSONDecoder(parse_constant=finite, parse_float=finite)


def bounded(value):
    """Return a value of an event so that it is neither large nor deep; if it was, as text."""
    if isinstance(value, str):
        return value if len(value) <= MAX_WORDS else shorten(value)
    if isinstance(value, (dict, list)):
        text = json.dumps(value, ensure_ascii=False)
        return value if len(text) <= MAX_WORDS and text.count('[') + text.count('{') <= 100 else shorten(text)
    return value


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `data` is of the result of a successful one; `code` and `message` say why another
    failed."""

    ok: bool
    code: str = None
    message: str = ''
    data: dict = field(default_factory=dict)
    total_cost_usd: float = None  # of the whole session
    duration_ms: int = 0
    turns: int = None

    def because(self, code, message):
        """Return the same with another reason."""
        return replace(self, code=code, message=message)


class CommandLines:
    """The lines of the `command` agent: one of our events as JSON, or plain text. `line` gives [(type,
    data)].

    `outcome` is None until the agent has told its end.
    """

    independent = True  # a line can be left out without harm to the next
    KINDS = ('progress', 'log', 'message', 'result', 'error')

    def __init__(self):
        self.outcome = None
        self.conversed = True
        self.open_call = ''  # what a tool does that was called and has not answered

    @property
    def has_ended(self):
        """Tell whether it has said its last word, after which it need not live on."""
        return self.outcome is not None

    def end(self, status):
        """Take the exit status: a script that says nothing of its end is judged by it."""
        if self.outcome is None and status == 0:
            self.outcome = Outcome(True, data={'message': ''})

    def line(self, text):
        """Return the events of one line. A result or error record is the end; it becomes the run's last
        event."""
        record = parse_record(text)
        if record is None or record.get('type') not in self.KINDS or not isinstance(
                record.get('data', {}), dict):
            return [('message', {'message': shorten(text)})] if text.strip() else []
        data = {key if len(key) <= MAX_NAME else shorten(key, MAX_NAME): bounded(value)
                for key, value in list(record.get('data', {}).items())[:MAX_FIELDS]}
        if record['type'] in ('log', 'message'):
            data['message'] = shorten(data.get('message', ''))
        if record['type'] == 'result':
            self.outcome = self.outcome or Outcome(True, data=data)
            return []
        if record['type'] == 'error':
            code, message = data.get('code', 'AGENT_FAILED'), data.get('message', 'The agent failed.')
            self.outcome = self.outcome or Outcome(False, str(code), str(message))
            return []
        return [(record['type'], data)]


class ClaudeLines:
    """The lines of Claude Code's `--output-format stream-json`. Unknown records and fields come with every
    release and are passed over."""

    independent = False
    ENDS = {'error_max_turns': ('AGENT_MAX_TURNS', 'The task needed more turns than maxTurns allows.'),
            'error_max_budget_usd': ('AGENT_MAX_BUDGET', 'The task cost more than maxBudgetUsd allows.')}

    def __init__(self):
        self.outcome = None
        self.conversed = False
        self._begun = False
        self._plan = Plan()
        self._tools = {}  # id -> (name, title)
        # Id -> [text while it is done, state]; the plan of the newer task tools, told bit by bit.
        self._tasks = {}
        self._calls_to_come = {}  # id of a TaskCreate call -> its activeForm
        # Ids of other agents' tasks for whose end it waits, to go on with what they have found.
        self._background = set()

    def line(self, text):
        """Return the events of one line."""
        record = parse_record(text)
        if record is None:
            return [('log', {'stream': 'agent', 'message': shorten(text)})] if text.strip() else []
        read = {'system': self._read_system, 'assistant': self._read_assistant, 'user': self._read_user,
                'result': self._read_result}
        try:
            events = list(read.get(record.get('type'), lambda _: ())(record))
            return [(kind, {key: bounded(value) for key, value in data.items()}) for kind, data in events]
        except (TypeError, AttributeError, KeyError):
            return []  # a record of a shape that no release has had so far; the run goes on without it

    @property
    def open_call(self):
        """What a tool does that was called and has not answered; Claude has limits of its own for that."""
        return next((title for _, title, _ in self._tools.values()), '')

    @property
    def has_ended(self):
        """Tell whether it has said its last word. It may still wait for other agents; for a command, a server
        say, it would wait for ever."""
        return self.outcome is not None and not self._background

    def end(self, status):
        """Take the exit status, which tells nothing: Claude Code ends with 0 when it was interrupted."""

    def _read_system(self, record):
        # A further one comes with each answer to a background task.
        if record.get('subtype') == 'init' and not self._begun:
            self._begun = True
            yield 'log', {'stream': 'agent',
                          'message': f"Claude Code {record.get('claude_code_version', '')} with "
                                     f"{record.get('model', 'its model')}"}
        elif record.get('subtype') == 'task_started' and record.get('is_backgrounded'):
            if record.get('task_type') == 'local_bash':
                return
            self._background.add(str(record.get('task_id')))
        elif record.get('subtype') == 'task_notification':
            self._background.discard(str(record.get('task_id')))
        elif record.get('subtype') == 'api_retry':
            status = record.get('error_status')
            what = f"{f'answered {status}' if status else 'did not answer'} ({record.get('error')})"
            yield 'log', {'stream': 'agent',
                          'message': f"The API {what}; attempt {record.get('attempt')} of "
                                     f"{record.get('max_retries')} follows."}

    def _read_assistant(self, record):
        if record.get('error') == 'authentication_failed':
            return  # the result says it again, and we in our words
        self.conversed = True
        inner = record.get('parent_tool_use_id') is not None
        for block in blocks_of(record):
            if block.get('type') == 'text' and block.get('text'):
                kind = 'log' if inner else 'message'
                yield kind, {**({'stream': 'agent'} if inner else {}), 'message': shorten(block['text'])}
            elif block.get('type') == 'tool_use':
                yield from self._tool_called(block, inner)

    def _tool_called(self, block, inner):
        name, body = block.get('name', ''), block.get('input') if isinstance(block.get('input'), dict) else {}
        if name == 'TodoWrite':
            if not inner:
                yield from self._plan.steps([
                    (item.get('activeForm') or item.get('content', ''), item.get('status'))
                    for item in body.get('todos', ()) if isinstance(item, dict)])
            return
        if name in ('TaskCreate', 'TaskUpdate', 'TaskList', 'TaskGet'):
            self._calls_to_come[block.get('id')] = None if inner else (name, body)
            return
        title = tool_title(name, body)
        self._tools[block.get('id')] = name, title, inner
        yield 'log', {'stream': 'tool', 'tool': name, 'status': 'started', 'message': title}

    def _read_user(self, record):
        for block in blocks_of(record):
            if block.get('type') != 'tool_result':
                continue
            call = block.get('tool_use_id')
            if call in self._calls_to_come:
                yield from self._task_result(self._calls_to_come.pop(call), record.get('tool_use_result'))
            elif call in self._tools:
                name, title, inner = self._tools.pop(call)
                yield 'log', {'stream': 'tool', 'tool': name,
                              'status': 'failed' if block.get('is_error') else 'completed', 'message': title}
                if not inner:
                    yield from self._plan.tool_done(title)

    def _task_result(self, call, result):
        """Rebuild the list of the newer task tools: ids come only in results, texts only in calls."""
        if call is None or not isinstance(result, dict):
            return
        name, body = call
        if name == 'TaskCreate' and isinstance(result.get('task'), dict) and len(self._tasks) < MAX_STEPS:
            title = body.get('activeForm') or body.get('subject', '')
            self._tasks[str(result['task'].get('id'))] = [title, 'pending']
        elif name == 'TaskUpdate' and str(result.get('taskId')) in self._tasks:
            state = (result.get('statusChange') or {}).get('to') or body.get('status')
            if state == 'deleted':
                del self._tasks[str(result['taskId'])]
            elif state:
                self._tasks[str(result['taskId'])][1] = state
        elif name == 'TaskList' and isinstance(result.get('tasks'), list):
            for item in result['tasks']:
                known = self._tasks.setdefault(str(item.get('id')), [item.get('subject', ''), 'pending'])
                known[1] = item.get('status', known[1])
        yield from self._plan.steps([(text, state) for text, state in self._tasks.values()])

    def _read_result(self, record):
        """Judge by this record alone: an API failure has the subtype `success`, and an interrupted CLI the
        exit code 0."""
        text = record.get('result') if isinstance(record.get('result'), str) else ''
        # An agent that waited for its background tasks tells several ends; turns and time are each one's own,
        # the cost is all of it.
        before = self.outcome or Outcome(True, turns=0)
        figures = {'turns': before.turns + number_of(record, 'num_turns'),
                   'total_cost_usd': number_of(record, 'total_cost_usd'),
                   'duration_ms': before.duration_ms + number_of(record, 'duration_ms')}
        if not record.get('is_error') and record.get('subtype') == 'success':
            refused = len(list_of(record, 'permission_denials'))
            self.outcome = Outcome(True, data={'message': shorten(text)}
                                   | ({'permissionDenials': refused} if refused else {}), **figures)
        else:
            self.outcome = Outcome(False, *self._why(record, text), **figures)
        return ()

    def _why(self, record, text):
        errors = ' '.join(str(item) for item in list_of(record, 'errors'))
        if str(record.get('subtype')) in self.ENDS:
            return self.ENDS[record['subtype']]
        if 'Not logged in' in text:
            return 'AGENT_NOT_LOGGED_IN', CLAUDE_HAS_NO_KEY
        if 'Invalid API key' in text or record.get('api_error_status') == 401:
            return 'AGENT_NOT_LOGGED_IN', CLAUDE_IS_REFUSED
        if 'No conversation found' in errors:
            return ('AGENT_UNKNOWN_CONVERSATION',
                    f'{shorten(errors)} The next task of the session begins a new conversation.')
        if record.get('api_error_status') or record.get('terminal_reason') == 'api_error':
            return 'AGENT_API_ERROR', shorten(text or errors)
        return 'AGENT_FAILED', shorten(text or errors or f"The agent ended with {record.get('subtype')}.")


def number_of(record, name):
    """Return a number of a record, 0 where there is none, or one that nothing sensible has."""
    value = record.get(name)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and 0 <= value <= MAX_NUMBER else 0


def list_of(record, name):
    """Return a list of a record, an empty one where there is none."""
    return record[name] if isinstance(record.get(name), list) else []


def blocks_of(record):
    """Return the content blocks of a message record."""
    message = record.get('message')
    content = message.get('content') if isinstance(message, dict) else None
    return [block for block in content if isinstance(block, dict)] if isinstance(content, list) else []


def tool_title(name, body):
    """Return what a tool call does, in a line."""
    for key in ('command', 'file_path', 'path', 'pattern', 'url', 'query', 'description', 'prompt'):
        if isinstance(body.get(key), str) and body[key]:
            return shorten(f'{name} {body[key]}'.splitlines()[0], 300)
    return name


# ---------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------

# Letters in agent-run's log, of which STDOUT and STDERR are capitals where the line goes on.
STDOUT, STDERR, EXIT = b'o', b'e', b'x'
STAMPED = re.compile(rb'(\d{1,13}) ([oeOEx]) (.*)', re.S)
PIECE = 65536  # bytes


class RunReader:
    """Makes events of the bytes that a run has written: always the same ones, with the same ids, from the
    same bytes.

    `stamped` tells the form of the bytes: agent-run's log, in which each line has its time and its stream, or
    what earlier versions kept, the agent's stdout alone.
    """

    def __init__(self, number, lines, redact=str, *, skip=0):
        self.number = number
        self.lines = lines
        self.stamped = True
        self._skip = skip if lines.independent else 0  # lines at the beginning whose events nobody wants
        # Takes secrets out of a line, before a shortened message can hold a part of one.
        self._redact = redact
        self.offset = 0  # bytes taken
        self.count = 0  # lines
        self.status = None  # the exit status, once the log has told it
        self.last_words = ''  # of stderr
        self._rest = bytearray()
        self._pieces = {STDOUT: Pieces(), STDERR: Pieces()}

    def take(self, data, *, ended=False):
        """Return [(place, type, data, seconds since the epoch or None)] of the lines that these bytes
        complete; at the end a last one needs no line end."""
        self.offset += len(data)
        self._rest += data
        if b'\n' not in data and not ended:
            if not self.stamped and len(self._rest) > PIECE:
                self._pieces[STDOUT].add(self._rest)
                self._rest = bytearray()
            return []
        *lines, rest = bytes(self._rest).split(b'\n')
        self._rest = bytearray(rest)
        if ended and (rest or self._pieces[STDOUT].parts):
            self._rest.clear()
            lines.append(rest)
        return [event for line in lines for event in self._line(line)]

    def _line(self, line):
        self.count += 1
        match = STAMPED.fullmatch(line)
        if self.stamped and match is None:
            return []  # where the writer was killed
        stamp, stream, text = match.groups() if self.stamped else (None, STDOUT, line)
        if stream == EXIT:
            self.status = parse_status(text)
            return []
        pieces = self._pieces[stream.lower()]
        if pieces.parts or stream.isupper() or len(text) > MAX_LINE:
            pieces.add(text)
            if stream.isupper():
                return []
            text = pieces.take()
        if self.count <= self._skip:
            return []
        return [((self.number, self.count, index), kind, data, int(stamp) / 1000 if stamp else None)
                for index, (kind, data) in enumerate(self._events(stream, text))]

    def _events(self, stream, line):
        if line is None:
            return [('log',
                     {'stream': 'agent', 'message': f'A line of more than {MAX_LINE} bytes was left out.'})]
        text = self._redact(line.decode('utf-8', 'replace'))
        if stream == STDOUT:
            return self.lines.line(text)
        self.last_words = (self.last_words + text[-MAX_WORDS:] + '\n')[-MAX_WORDS:]
        return [('log', {'stream': 'stderr', 'message': shorten(text)})] if text.strip() else []


def parse_status(text):
    """Return the exit status that bytes hold, or None."""
    return int(text) if text.strip().isdigit() and len(text.strip()) <= 3 else None


class Pieces:
    """A line that comes in pieces, as far as it is not too long."""

    def __init__(self):
        self.parts = []
        self._size = 0

    def add(self, part):
        """Add a piece."""
        self._size += len(part)
        if self._size <= MAX_LINE:
            self.parts.append(part)
        else:
            self.parts = [b'']

    def take(self):
        """Return the line and begin the next one; None in the place of one that is too long."""
        line = b''.join(self.parts) if self._size <= MAX_LINE else None
        self.parts, self._size = [], 0
        return line
