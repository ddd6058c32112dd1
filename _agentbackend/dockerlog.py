"""The format in which the engine sends the output of a container."""
import functools
from datetime import datetime

STDOUT, STDERR = 1, 2
STREAM_NAMES = {0: 'stdout', STDOUT: 'stdout', STDERR: 'stderr'}
MAX_LINE = 2**20  # bytes of one line; the rest of a longer one is left out


@functools.lru_cache(maxsize=4)
def parse_second(text):
    """Return the seconds since the epoch of a stamp without its fraction; lines of a log mostly share one."""
    return int(datetime.fromisoformat(text + '+00:00').timestamp())


def parse_stamp(stamp):
    """Return the nanoseconds since the epoch of one of the engine's stamps, as
    2026-11-23T20:56:17.502392174Z."""
    return parse_second(stamp[:19]) * 1_000_000_000 + int(stamp[20:29])


class LogDamaged(Exception):
    """The engine says, in the midst of a log, that it can not read on; the text is what it says."""


class LogLines:
    """Takes the bytes of a log stream with stamps, and gives lines as (stream, stamp, text).

    Without a TTY the engine frames its output: one byte for the stream, three of nothing, four of length. A
    line over 16 KB comes in several frames, each with the stamp of the first. With a TTY there are no frames,
    and the stamps stand within the line.
    """

    def __init__(self, tty):
        self.pieces = 0  # that came, of which a long line has several
        self._tty = tty
        self._buffer = bytearray()
        self._parts = {}  # stream -> [stamp, bytes of the line so far]

    def feed(self, data):
        """Return the lines that are complete with these bytes."""
        self._buffer += data
        if self._tty and b'\n' not in data:
            # Of a line without an end, as a progress bar makes it; the stamp stands before it.
            del self._buffer[MAX_LINE + 100:]
            return []
        return self._feed_tty() if self._tty else self._feed_frames()

    def end(self):
        """Return what was printed last without a line end; a container's output may end so."""
        if self._tty and self._buffer:
            self._buffer += b'\n'
            return self._feed_tty()
        return [self._line(stream, *self._parts.pop(stream)) for stream in list(self._parts)]

    def _feed_frames(self):
        lines, start, buffer = [], 0, self._buffer
        while len(buffer) - start >= 8:
            size = int.from_bytes(buffer[start + 4:start + 8], 'big')
            if len(buffer) - start - 8 < size:
                break
            self.pieces += 1
            self._frame(buffer[start], bytes(buffer[start + 8:start + 8 + size]), lines)
            start += 8 + size
        del buffer[:start]
        return lines

    def _frame(self, stream, payload, lines):
        if stream not in STREAM_NAMES:
            raise LogDamaged(payload.decode('utf-8', 'replace').strip())
        stamp, _, content = payload.partition(b' ')
        held = self._parts.get(stream)
        if held is not None and held[0] != stamp:
            lines.append(self._line(stream, *self._parts.pop(stream)))
            held = None
        if content.endswith(b'\n'):
            if held is not None:
                content = held[1] + content
                del self._parts[stream]
            lines.append(self._line(stream, stamp, content))
        elif held is None:
            self._parts[stream] = [stamp, bytearray(content)]
        elif len(held[1]) <= MAX_LINE:
            held[1] += content

    def _feed_tty(self):
        *complete, rest = bytes(self._buffer).split(b'\n')
        self._buffer = bytearray(rest)
        lines = []
        for line in complete:
            stamp, _, content = line.partition(b' ')
            self.pieces += 1 + content.count(stamp + b' ')
            lines.append(self._line(0, stamp, content.replace(stamp + b' ', b'')))
        return lines

    @staticmethod
    def _line(stream, stamp, content):
        try:
            at = parse_stamp(stamp.decode('ascii'))
        except ValueError as error:
            raise LogDamaged(bytes(stamp + b' ' + content)[:300].decode('utf-8', 'replace')) from error
        return (stream or STDOUT), at, bytes(content[:MAX_LINE]).decode('utf-8', 'replace').rstrip('\r\n')


def read_frames(stream):
    """Yield (stream, bytes) of what a command prints, as the engine frames it, until the connection ends."""
    while True:
        header = stream.read(8)
        if len(header) < 8:
            return
        left = int.from_bytes(header[4:], 'big')
        while left:
            data = stream.read1(min(left, 65536))
            if not data:
                return
            left -= len(data)
            yield header[0], data
