"""How a greenlet that is never without work lets others work too, and how times are read and written."""
import contextlib
import functools
import re
import time
from datetime import datetime, timezone
from pathlib import Path

import gevent
import gevent.queue

from _agentbackend.errors import quoted, refusal

TURN = 0.005  # seconds of work before others are let on
END_OF_TIME = 253_402_300_800  # the year 10000, in seconds since the epoch


class Turn:
    """The time that a greenlet takes for its work before others are let on: while there is data, gevent never
    switches by itself."""

    __slots__ = ('_begun',)

    def __init__(self):
        self._begun = time.monotonic()

    def pass_on(self):
        """Let others have theirs if this one is over."""
        if time.monotonic() - self._begun > TURN:
            gevent.sleep(0)
            self._begun = time.monotonic()


def cooperatively(items):
    """Yield what an iterator gives, and let others have their turn now and then."""
    turn = Turn()
    for item in items:
        yield item
        turn.pass_on()


def with_deadline(items, timeout, error):
    """Yield what an iterator gives; raise `error` when the next item takes more than `timeout` seconds."""
    items, end = iter(items), object()
    while True:
        with gevent.Timeout(timeout, error):
            item = next(items, end)
        if item is end:
            return
        yield item


def with_pauses(items, seconds):
    """Yield what an iterator gives, and None whenever it gives nothing for so long."""
    queue, end = gevent.queue.Queue(1), object()

    def fill():
        try:
            for item in items:
                queue.put(item)
        finally:
            queue.put(end)
    filling = gevent.spawn(fill)
    try:
        while True:
            try:
                item = queue.get(timeout=seconds)
            except gevent.queue.Empty:
                item = None
            if item is end:
                return
            yield item
    finally:
        filling.kill(block=False)


def parse_time(text):
    """Return the seconds since the epoch of the engine's RFC 3339 times, whose nanoseconds Python can't
    read."""
    match = re.match(r'(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d)?', text or '')
    if not match:
        return time.time()
    second = datetime.fromisoformat(match[1] + (match[3] or 'Z').replace('Z', '+00:00'))
    return second.timestamp() + float(match[2] or 0)


def known_time(value):
    """Return what should be seconds since the epoch as such, and 0 for what is none that can be shown."""
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        seconds = float(value)
        return seconds if 0 <= seconds < END_OF_TIME else 0.0
    return 0.0


def view_time(seconds):
    """Return seconds since the epoch as RFC 3339 in UTC, with milliseconds; None stays None."""
    if seconds is None:
        return None
    second, micros = divmod(round(seconds * 1_000_000), 1_000_000)
    return f'{view_second(second)}.{micros // 1000:03d}Z'


@functools.lru_cache(maxsize=64)
def view_second(second):
    """Return a whole second as the beginning of such a time; events mostly share one."""
    return datetime.fromtimestamp(second, timezone.utc).isoformat()[:19]


@functools.lru_cache
def boot_id():
    """Return what tells this boot of the machine from another: monotonic times mean something within one boot
    only."""
    return Path('/proc/sys/kernel/random/boot_id').read_text().strip()


def clock_offset():
    """Return by how many seconds the wall clock is ahead of the monotonic one: it changes when the clock is
    set, or the machine slept."""
    while True:
        before = time.monotonic()
        offset = time.time() - before
        if time.monotonic() - before < 0.01:  # this process was not stopped in between
            return offset


def parse_since(text):
    """Return the nanoseconds since the epoch of an RFC 3339 time, or of a number of seconds."""
    if re.fullmatch(r'\d{1,12}(\.\d{1,9})?', text):
        seconds, _, fraction = text.partition('.')
        return int(seconds) * 1_000_000_000 + int(fraction.ljust(9, '0'))
    try:
        return int(datetime.fromisoformat(text.replace('Z', '+00:00')).timestamp() * 1e9)
    except ValueError as error:
        raise refusal('since', f'is {quoted(text)}, but has to be a time, such as 2026-01-31T12:00:00Z, or a '
                               'number of seconds') from error
