"""The format in which the engine sends the output of a container."""
import functools
import struct
from datetime import datetime, timezone

STDOUT, STDERR = 1, 2
STREAM_NAMES = {0: 'stdout', STDOUT: 'stdout', STDERR: 'stderr'}
MAX_LINE = 2**20  # bytes of one line; the rest of a longer one is left out
MAX_SECOND = 253_402_300_799  # the last of the year 9999
HEADER = struct.Struct('>B3xI')  # of a frame: its stream and its length


@functools.lru_cache(maxsize=64)
def parse_second(text):
    """Return the seconds since the epoch of a stamp without its fraction; lines of a log mostly share one."""
    return int(datetime.fromisoformat(text + '+00:00').timestamp())


def parse_stamp(stamp):
    """Return the nanoseconds since the epoch of one of the engine's stamps, as
    2026-11-23T20:56:17.502392174Z."""
    return parse_second(stamp[:19]) * 1_000_000_000 + int(stamp[20:29])


def stamp_of(nanoseconds):
    """Return the stamp that the engine writes for nanoseconds since the epoch. All have the same length, so
    they compare as times do."""
    second, rest = divmod(max(0, nanoseconds), 1_000_000_000)
    moment = datetime.fromtimestamp(min(second, MAX_SECOND), timezone.utc)
    return f'{moment:%Y-%m-%dT%H:%M:%S}.{rest:09d}Z'


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
        """Return the lines that are complete with these bytes; raise LogDamaged when there are none before
        the damage."""
        self._buffer += data
        if self._tty and b'\n' not in data:
            # Of a line without an end, as a progress bar makes it; the stamp stands before it.
            del self._buffer[MAX_LINE + 100:]
            return []
        lines = []
        try:
            self._feed_tty(lines) if self._tty else self._feed_frames(lines)
        except LogDamaged:
            if not lines:
                raise  # else it is met again behind them
        return lines

    def end(self):
        """Return what was printed last without a line end; a container's output may end so."""
        if self._tty:
            return self.feed(b'\n') if self._buffer else []
        return [self._line(stream, *self._parts.pop(stream)) for stream in list(self._parts)]

    def _feed_frames(self, lines):
        buffer, start, length = bytes(self._buffer), 0, len(self._buffer)
        try:
            while length - start >= 8:
                stream, size = HEADER.unpack_from(buffer, start)
                at, end = start + 8, start + 8 + size
                if end > length:
                    break
                if not self._parts and buffer[end - 1] == 10:  # a whole line, as nearly all are
                    lines.append(self._line(stream, buffer[at:at + 30], buffer[at + 31:end]))
                else:
                    self._frame(stream, buffer[at:end], lines)
                start, self.pieces = end, self.pieces + 1
        finally:
            self._buffer = bytearray(buffer[start:])

    def _frame(self, stream, payload, lines):
        stamp, _, content = payload.partition(b' ')
        held = self._parts.get(stream)
        if held is not None and held[0] != stamp:
            lines.append(self._line(stream, *self._parts.pop(stream)))
            held = None
        if stream not in STREAM_NAMES or content.endswith(b'\n'):
            if held is not None:
                content = held[1] + content
                del self._parts[stream]
            lines.append(self._line(stream, stamp, content))
        elif held is None:
            self._parts[stream] = [stamp, bytearray(content)]
        elif len(held[1]) <= MAX_LINE:
            held[1] += content

    def _feed_tty(self, lines):
        *complete, self._buffer = self._buffer.split(b'\n')
        for number, line in enumerate(complete):
            stamp, _, content = line.partition(b' ')
            self.pieces += 1 + content.count(stamp + b' ')
            try:
                lines.append(self._line(0, stamp, content.replace(stamp + b' ', b'')))
            except LogDamaged:
                self._buffer = bytearray(b'\n').join([*complete[number:], self._buffer])
                raise

    @staticmethod
    def _line(stream, stamp, content):
        try:
            time = stamp.decode('ascii')
            parse_second(time[:19])
            if stream in STREAM_NAMES and len(time) == 30:
                return stream or STDOUT, time, content[:MAX_LINE].decode('utf-8', 'replace').rstrip('\r\n')
        except ValueError:
            pass
        raise LogDamaged(bytes(stamp + b' ' + content)[:300].decode('utf-8', 'replace').strip())


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
