"""Every id of an event: where a reader of a log, a session or a workspace is."""
import contextlib
import functools
import re
import string

from _agentbackend.dockerlog import STDERR, STDOUT, parse_second, parse_stamp, stamp_of
from _agentbackend.errors import quoted, refusal

DIGITS = string.digits + string.ascii_lowercase
# Nanoseconds: the engine writes a line of one stream a little after a later one of the other.
MARGIN = 1_000_000_000


@functools.lru_cache(maxsize=64)
def short_second(text):
    """Return the second of a stamp in as few characters as an id can have."""
    return base36(parse_second(text))


def base36(number):
    """Return a number in digits and small letters, as `int(text, 36)` reads it."""
    text = ''
    while number:
        number, digit = divmod(number, 36)
        text = DIGITS[digit] + text
    return text or '0'


class LogPosition:
    """How far a log has been read: for each stream the last stamp, and how many lines had it.

    The engine writes the two streams in any order, but each of them in the order of its stamps. A stamp is
    the engine's own text; that of a stream of which nothing was read is empty.
    """

    PART = r'(?:([0-9a-z]{1,8})(\d{9})(?:\+([0-9a-f]{1,8}))?)?'
    PATTERN = re.compile(f'{PART}-{PART}')

    def __init__(self, stdout=('', 0), stderr=('', 0)):
        self._last = {STDOUT: stdout, STDERR: stderr}
        self._skip = {STDOUT: stdout[1], STDERR: stderr[1]}
        self._shown = {stream: self._show(*last) for stream, last in self._last.items()}

    @classmethod
    def parse(cls, text):
        """Return the position that `str()` wrote; raise ValueError for anything else."""
        match = cls.PATTERN.fullmatch(text)
        if not match:
            raise ValueError(f'{text!r} is no position in a log')
        return cls(*((stamp_of(int(second, 36) * 10**9 + int(rest)), int(count or '1', 16)) if second
                     else ('', 0) for second, rest, count in (match.groups()[:3], match.groups()[3:])))

    @classmethod
    def at(cls, nanoseconds):
        """Return the position before all that came at a time, in nanoseconds since the epoch, or later."""
        stamp = stamp_of(nanoseconds)
        return cls((stamp, 0), (stamp, 0))

    @staticmethod
    def _show(stamp, count):
        more = f'+{count:x}' if count > 1 else ''
        return f'{short_second(stamp[:19])}{stamp[20:29]}{more}' if stamp else ''

    def __str__(self):
        return f'{self._shown[STDOUT]}-{self._shown[STDERR]}'

    def copy(self):
        """Return the same position, from which reading begins again."""
        return LogPosition(self._last[STDOUT], self._last[STDERR])

    def since(self):
        """Return from where the engine must be asked to go on, in nanoseconds: a stream that was silent may
        come a little late."""
        stamps = sorted(parse_stamp(stamp) if stamp else 0 for stamp, _ in self._last.values())
        return stamps[0] or max(0, stamps[1] - 1_000_000_000)

    def advance(self, lines):
        """Return (position as text, stream, stamp, text) of those lines, (stream, stamp, text), that are new,
        and move on behind them. Reading again from `since()` gives each line once."""
        new, last, shown = [], self._last, self._shown
        for stream, stamp, text in lines:
            if stamp > last[stream][0]:
                last[stream], self._skip[stream] = (stamp, 1), 0
                shown[stream] = short_second(stamp[:19]) + stamp[20:29]
            elif self._is_seen(stream, stamp):
                continue
            new.append((f'{shown[STDOUT]}-{shown[STDERR]}', stream, stamp, text))
        return new

    def _is_seen(self, stream, stamp):
        """Tell whether a line that is not later than the last was seen already, and count it if not."""
        last, count = self._last[stream]
        if stamp < last:
            # The engine repeats lines when a log file is rotated while it is followed.
            self._skip[stream] = count
            return True
        if self._skip[stream] > 0:
            self._skip[stream] -= 1
            return True
        self._last[stream] = (last, count + 1)
        self._shown[stream] = self._show(last, count + 1)
        return False

    def covers(self, stream, stamp):
        """Tell whether a line of this stamp has been read."""
        return stamp <= self._last[stream][0]

    def is_before(self, other):
        """Tell whether nothing that comes behind another position comes before this one."""
        return all(self._last[stream] <= other._last[stream] for stream in self._last)

    def ends_before(self, stamp):
        """Tell whether a line of this stamp comes so much later that none before it is covered any more."""
        return parse_stamp(stamp) > MARGIN + max(parse_stamp(last) if last else 0 for last, _ in
                                                 self._last.values())


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
    """A position in what is told of a workspace, {source: position}, as an event's id holds it.

    `own` is the number of the last event of the workspace's own, `begun` how many tasks had begun in it, and
    `log` how far its log was read, None where that is not known. `marks` has each of these tasks that was not
    told to its end: {serial number of the run: (line, number in the line)}.
    """

    PATTERN = re.compile(r'([0-9a-z]{1,10})\.([0-9a-z]{1,6})\.([0-9a-z+-]*)'
                         r'((?:~\d{1,9}(?:\.\d{1,12}\.\d{1,9})?)*)')

    def __init__(self, own=0, begun=0, log=None, marks=None):
        self.own, self.begun, self.log, self.marks = own, begun, log, marks or {}

    @classmethod
    def parse(cls, text):
        """Return the cursor of an event's id; raise ValidationError for anything else."""
        match = cls.PATTERN.fullmatch(text)
        with contextlib.suppress(ValueError):
            if match:
                marks = [mark.split('.') for mark in match[4].split('~')[1:]]
                return cls(int(match[1], 36), int(match[2], 36),
                           LogPosition.parse(match[3]) if match[3] else None,
                           {int(serial): tuple(map(int, place)) or NOT_BEGUN for serial, *place in marks})
        raise refusal('after', f'is {quoted(text)}, which is no id of an event')

    def __str__(self):
        return f"{self.head}{'' if self.log is None else self.log}{self.tail}"

    @property
    def head(self):
        """What stands in an id before the log's position."""
        return f'{base36(self.own)}.{base36(self.begun)}.'

    @property
    def tail(self):
        """What stands behind it."""
        return ''.join(f'~{serial}' if place == NOT_BEGUN else f'~{serial}.{place[0]}.{place[1]}'
                       for serial, place in self.marks.items())

    def ids_of(self, serial):
        """Return the function that gives the ids of a task's events from their places, as long as only they
        move the cursor."""
        others = str(Cursor(self.own, self.begun, self.log,
                            {key: place for key, place in self.marks.items() if key != serial}))
        return lambda place: others if place[1] == LAST_LINE else f'{others}~{serial}.{place[1]}.{place[2]}'

    def copy(self):
        """Return the same cursor, which stays as it is."""
        return Cursor(self.own, self.begun, self.log and self.log.copy(), dict(self.marks))

    def begin(self, serial):
        """Note that the tasks up to a serial number have begun; nothing is told of them yet."""
        for number in range(self.begun + 1, serial + 1):
            self.marks[number] = NOT_BEGUN
        self.begun = max(self.begun, serial)

    def tell(self, serial, line, number):
        """Move on behind an event of a task; with its last one the task needs no mark any more."""
        self.begin(serial)
        if line == LAST_LINE:
            self.marks.pop(serial, None)
        else:
            self.marks[serial] = line, number
