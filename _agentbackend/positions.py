"""Every id of an event: where a reader of a log, a session or a workspace is."""
import contextlib
import re

from _agentbackend.dockerlog import STDERR, STDOUT
from _agentbackend.errors import quoted, refusal


class LogPosition:
    """How far a log has been read: for each stream the last stamp, and how many lines had it.

    The engine writes the two streams in any order, but each of them in the order of its stamps.
    """

    def __init__(self, stdout=(0, 0), stderr=(0, 0)):
        self._last = {STDOUT: stdout, STDERR: stderr}
        self._skip = {STDOUT: stdout[1], STDERR: stderr[1]}

    @classmethod
    def parse(cls, text):
        """Return the position that `str()` wrote; raise ValueError for anything else."""
        match = re.fullmatch(r'([0-9a-f]{1,16})(?:\+([0-9a-f]{1,8}))?-([0-9a-f]{1,16})(?:\+([0-9a-f]{1,8}))?',
                             text)
        if not match:
            raise ValueError(f'{text!r} is no position in a log')
        stdout, stdout_count, stderr, stderr_count = (int(part or '1', 16) for part in match.groups())
        return cls((stdout, stdout_count), (stderr, stderr_count))

    def __str__(self):
        return '-'.join(f'{stamp:x}+{count:x}' if count > 1 else f'{stamp:x}'
                        for stamp, count in (self._last[STDOUT], self._last[STDERR]))

    def copy(self):
        """Return the same position, from which reading begins again."""
        return LogPosition(self._last[STDOUT], self._last[STDERR])

    def since(self):
        """Return from where the engine must be asked to go on, in nanoseconds: a stream that was silent may
        come a little late."""
        stamps = sorted(stamp for stamp, _ in self._last.values())
        return stamps[0] or max(0, stamps[1] - 1_000_000_000)

    def advance(self, stream, stamp):
        """Tell whether a line is new, and count it if so. Reading again from `since()` gives each line
        once."""
        last, count = self._last[stream]
        if stamp > last:
            self._last[stream] = (stamp, 1)
            self._skip[stream] = 0
            return True
        if stamp < last:
            # The engine repeats lines when a log file is rotated while it is followed.
            self._skip[stream] = count
            return False
        if self._skip[stream] > 0:
            self._skip[stream] -= 1
            return False
        self._last[stream] = (last, count + 1)
        return True

    def covers(self, stream, stamp):
        """Tell whether a line of this stamp has been read."""
        return stamp <= self._last[stream][0]


LAST_LINE = 10**12  # in the place of a run's last event, which is not made from a line
BEGINNING = (0, LAST_LINE, 0)  # the place before the first event of a session
NOT_BEGUN = (-1, 0)  # the (line, number) before the first event of a run


def event_id_of(place):
    """Return the id of a session's event from its place, (run, line, number of the event in the line)."""
    run, line, number = place
    return f"{run}-{'end' if line == LAST_LINE else line}-{number}"


def place_of(event_id):
    """Return the place of a session's event from its id; raise ValidationError for anything else."""
    match = re.fullmatch(r'(\d{1,9})-(\d{1,12}|end)-(\d{1,9})', event_id)
    if not match:
        raise refusal('after', f'is {quoted(event_id)}, which is no id of an event of a session')
    return int(match[1]), LAST_LINE if match[2] == 'end' else int(match[2]), int(match[3])


def comes_next(place, after):
    """Tell whether nothing lies between two places in a session: the first is not beyond the second, or
    begins the run that follows."""
    return place <= after or (place[1:] == (0, 0) and after >= (place[0] - 1, LAST_LINE, 0))


class Cursor:
    """A position in a workspace's topic, as an event's id holds it.

    It says what was published; how many tasks had begun in the workspace; how far the log was read; and of
    each of these tasks that was not told to its end, how far it was told: {serial number of the run: (line,
    number in the line)}. All but the first hold beyond the end of this process.
    """

    PATTERN = re.compile(r'([0-9a-f]{1,16})\.(\d{1,18})\.(\d{1,9})\.([0-9a-f+-]*)'
                         r'((~\d{1,9}(\.\d{1,12}\.\d{1,9})?)*)')

    def __init__(self, boot, count, begun, position=None, marks=None):
        self.boot, self.count, self.begun = boot, count, begun
        self.position, self.marks = position, marks or {}

    @classmethod
    def parse(cls, text):
        """Return the cursor of an event's id; raise ValidationError for anything else."""
        match = cls.PATTERN.fullmatch(text)
        with contextlib.suppress(ValueError):
            if match:
                marks = [mark.split('.') for mark in match[5].split('~')[1:]]
                return cls(match[1], int(match[2]), int(match[3]),
                           LogPosition.parse(match[4]) if match[4] else None,
                           {int(serial): tuple(map(int, place)) or NOT_BEGUN for serial, *place in marks})
        raise refusal('after', f'is {quoted(text)}, which is no id of an event')

    def __str__(self):
        marks = ''.join(f'~{serial}' if place == NOT_BEGUN else f'~{serial}.{place[0]}.{place[1]}'
                        for serial, place in self.marks.items())
        return f"{self.boot}.{self.count}.{self.begun}.{self.position or ''}{marks}"

    def has_seen(self, place):
        """Tell whether an event of a task at (serial, line, number) was seen already, maybe as another
        process told it."""
        serial, *rest = place
        return serial <= self.begun and (serial not in self.marks or tuple(rest) <= self.marks[serial])

    def begin(self, serial):
        """Note that the tasks up to a serial number have begun; nothing is told of them yet."""
        for number in range(self.begun + 1, serial + 1):
            self.marks[number] = NOT_BEGUN
        self.begun = max(self.begun, serial)

    def tell(self, place):
        """Move on behind an event of a task; with its last one the task needs no mark any more."""
        serial, line, number = place
        self.begin(serial)
        if line == LAST_LINE:
            self.marks.pop(serial, None)
        else:
            self.marks[serial] = line, number
