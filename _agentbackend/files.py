"""Files of workspaces: read, written and moved by a program inside them, which keeps to their folder."""
import contextlib
import errno
import itertools
import json
import mimetypes
import re
import urllib.parse
from email.utils import formatdate

import gevent

from _agentbackend.access import check_program, program
from _agentbackend.dockerlog import STDERR
from _agentbackend.engine import USER
from _agentbackend.errors import (
    DockerError,
    FileExists,
    FileMissing,
    Forbidden,
    NotAFile,
    NotAFolder,
    PreconditionFailed,
    RangeNotSatisfiable,
    ValidationError,
    quoted,
    refusal,
)
from _agentbackend.timing import Turn

PROGRAM, COMMAND = program('files')
DONE = b'\0done'
MAX_HEAD = 2**16  # bytes of a line of its answer
CODES = {'FILE_NOT_FOUND': FileMissing, 'FILE_EXISTS': FileExists, 'NOT_A_FOLDER': NotAFolder,
         'NOT_A_FILE': NotAFile, 'PRECONDITION_FAILED': PreconditionFailed, 'NOT_ALLOWED': Forbidden,
         'NOT_A_TAR': ValidationError, 'INSIDE': ValidationError, 'FAILED': Forbidden}
TEXTS = re.compile(r'text/|application/(json|javascript|xml)')
ARCHIVES = {'tar': 'application/x-tar', 'tar.gz': 'application/gzip'}
RANGE = re.compile(r'bytes=(\d*)-(\d*)')


class Work:
    """One request to the program inside a workspace. It is ended by `close`, also in the middle."""

    def __init__(self, stack, attached, path):
        self._stack = stack
        self._attached = attached
        self._path = path
        self._pieces = iter(attached)
        self._rest = b''
        self._said = b''  # on stderr

    def send(self, data):
        """Write to its stdin; when it has ended, its answer says why."""
        with contextlib.suppress(OSError):
            self._attached.sendall(data)

    def send_body(self, pieces):
        """Send a body, piece by piece; an answer that comes before its end is not kept waiting."""
        turn, answered = Turn(), gevent.spawn(self._take_line)
        answered.link(lambda _: self.cut())  # whoever has ended takes nothing more
        try:
            for data in pieces:
                if answered.ready():
                    break
                self.send(len(data).to_bytes(4, 'big') + data)
                turn.pass_on()
            self.send(bytes(4))
        except BaseException:
            self.cut()
            raise
        finally:
            answered.join()

    def answer(self):
        """Return the next line of its answer; raise the error that it tells."""
        self._take_line()
        line, _, self._rest = self._rest.partition(b'\n')
        try:
            value = json.loads(line)
        except ValueError:
            said = (line + self._said).decode('utf-8', 'replace')
            check_program(said, 'path')
            raise DockerError('The files could not be reached: '
                              f'{said[-500:].strip() or "no answer"}') from None
        if not value['ok']:
            raise error_of(value['code'], f'{self._path}: {value["error"]}')
        return value

    def rest(self, length=None):
        """Yield the bytes behind that; raise BrokenPipeError, which cuts the connection, if they are not
        whole."""
        left = length
        data = self._rest
        while data or (data := self._next()):
            yield data if left is None else data[:left]
            left = None if left is None else left - len(data)
            data = b''
            if left is not None and left <= 0:
                return
        if left or (left is None and not self._said.endswith(DONE)):
            raise BrokenPipeError(errno.EPIPE, 'what was to be sent is not whole')

    def cut(self):
        """End it, from whichever greenlet."""
        self._attached.cut()

    def close(self):
        """End it, and put everything away."""
        self.cut()
        self._stack.close()

    def _take_line(self):
        while b'\n' not in self._rest and len(self._rest) < MAX_HEAD:
            data = self._next()
            if not data:
                break
            self._rest += data

    def _next(self):
        for stream, data in self._pieces:
            if stream != STDERR:
                return data
            self._said = (self._said + data)[-MAX_HEAD:]
        return b''


class Files:
    """Does what clients ask for with the files of a workspace, also of one that is stopped."""

    def __init__(self, config, engine, access, activity):
        self._base = config.workspace_base_path
        self._engine = engine
        self._access = access
        self._activity = activity

    def answer(self, workspace, call):
        """Return (parts, Work, headers, status) of the answer to a routing.Call for a file, for what is in a
        folder, or for an archive; the Work is to be closed."""
        path, archive = call.path.get('path', ''), call.query.get('archive')
        work, told = self._begin(workspace, 'read', path, archive=archive, content=call.method != 'HEAD')
        name = path.rstrip('/').rpartition('/')[2] or call.path['id']
        if archive:
            return work.rest(), work, {'Content-Type': ARCHIVES[archive],
                                       **attachment(f'{name}.{archive}')}, 200
        if told['type'] == 'folder':
            parts = itertools.chain([b'{"success":true,"data":'], work.rest(), [b'}\n'])
            return parts, work, {'Content-Type': 'application/json', 'Cache-Control': 'no-store'}, 200
        try:
            return self._content(call, work, told, name)
        except BaseException:
            work.close()
            raise

    @staticmethod
    def _content(call, work, told, name):
        """Return what `answer` does, for a file, or the range of it that is asked for."""
        headers, is_read = file_headers(told, name, download='download' in call.query), call.method != 'HEAD'
        if told['tag'] in (tags(call.if_none_match) or ()):
            return iter(()), work, headers, 304
        part = asked_range(call.headers.get('Range'), call.headers.get('If-Range'), told) if is_read else None
        start, count = part or (0, told['size'])
        headers['Content-Length'] = str(count)
        if part:
            headers['Content-Range'] = f"bytes {start}-{start + count - 1}/{told['size']}"
        if is_read:
            work.send(b'[%d, %d]\n' % (start, count))
        return work.rest(count) if is_read and count else iter(()), work, headers, 206 if part else 200

    def write(self, workspace, path, pieces, *, mode=None, match=None, none_match=None):
        """Write a file from pieces; return what describes it."""
        return self._upload(workspace, 'write', path, pieces, mode=mode, match=match, noneMatch=none_match)

    def extract(self, workspace, path, pieces, form):
        """Write a tree from the pieces of a tar; return what describes its folder, and how many entries
        it had."""
        return self._upload(workspace, 'extract', path, pieces, form=form)

    def change(self, workspace, work, path, *, to=None, **request):
        """Move, copy or delete something, or make a folder; return what describes it then."""
        more = {} if to is None else {'to': self._relative(workspace, to, 'to')}
        begun, told = self._begin(workspace, work, path, **more, **request)
        begun.close()
        return told

    def _upload(self, workspace, kind, path, pieces, **request):
        work, _ = self._begin(workspace, kind, path, **request)
        with contextlib.closing(work):
            work.send_body(pieces)
            return work.answer()

    def _begin(self, workspace, kind, path, **request):
        relative = self._relative(workspace, path)
        line = json.dumps({'work': kind, 'base': self._base, 'path': relative,
                           'kept': ['', workspace.folder], **request}).encode() + b'\n'
        stack = contextlib.ExitStack()
        try:
            stack.enter_context(self._activity.during(workspace.id, 'files', f'{kind} {relative}'[:200]))
            container_id = stack.enter_context(self._access.container(workspace))
            attached = stack.enter_context(self._engine.attached(
                container_id, COMMAND, user=USER))
            work = Work(stack, attached, path or '.')
            sending = gevent.spawn(work.send, PROGRAM + line)
            told = work.answer()
            sending.join()
            return work, told
        except BaseException as error:
            # An error of the engine gets its words from those who have opened what is closed here.
            if not stack.__exit__(type(error), error, error.__traceback__):
                raise
            raise AssertionError from error

    def _relative(self, workspace, path, field='path'):
        """Return a path relative to the base folder; one without a slash at its beginning is relative to the
        project."""
        if '\0' in path:
            raise refusal(field, 'has a NUL character, which no path can have')
        names = [name for name in path.split('/') if name not in ('', '.')]
        if not path.startswith('/'):
            return '/'.join([workspace.folder, *names])
        base = self._base.strip('/').split('/')
        if names[:len(base)] != base:
            raise refusal(field, f'is {quoted(path)}, which is not in {self._base}')
        return '/'.join(names[len(base):])


def error_of(code, text):
    """Return the error that the program inside has told."""
    if code == 'OUTSIDE':
        return refusal('path', f'is refused: {text}')
    return CODES.get(code, DockerError)(text)


def described(told):
    """Return what a client is told of a file."""
    return {key: value for key, value in told.items() if key not in ('ok', 'tag', 'created')}


def etag_of(told):
    """Return the ETag of a file."""
    return f'"{told["tag"]}"'


def tags(header):
    """Return the tags that If-Match or If-None-Match names, None where there is no such header."""
    if not header:
        return None
    return ['*'] if header.strip() == '*' else re.findall(r'"([^"]*)"', header)


def media_type(name):
    """Return the media type that a name suggests."""
    found = mimetypes.guess_type(name)
    kind = found[0] if found[0] and not found[1] else 'application/octet-stream'
    return f'{kind}; charset=utf-8' if TEXTS.match(kind) else kind


def file_headers(told, name, *, download):
    """Return the headers of a file."""
    seconds = int(told['tag'].partition('-')[0], 16) / 1e9
    return {'Content-Type': media_type(name), 'ETag': etag_of(told), 'Accept-Ranges': 'bytes',
            'Last-Modified': formatdate(max(0, seconds), usegmt=True), 'Cache-Control': 'no-cache',
            **(attachment(name) if download else {})}


def attachment(name):
    """Return the header that lets a browser save an answer under a name."""
    return {'Content-Disposition': f"attachment; filename*=UTF-8''{urllib.parse.quote(name, safe='')}"}


def asked_range(header, if_range, told):
    """Return (first, count) of the one range that is asked for, None for all of a file; raise
    RangeNotSatisfiable."""
    match, size = RANGE.fullmatch((header or '').replace(' ', '')), told['size']
    if not match or match[0] == 'bytes=-' or (if_range and if_range != etag_of(told)):
        return None
    # No file has as many bytes as a number of 19 digits, and int() refuses those of thousands.
    first, last = (int(text.lstrip('0')[:19] or 0) if text else None for text in match.groups())
    if None not in (first, last) and first > last:
        return None
    start = max(0, size - last) if first is None else first
    end = size - 1 if None in (first, last) else min(last, size - 1)
    if start > end:
        raise RangeNotSatisfiable(f'The file has {size} bytes, none of them in {header[:100]}.',
                                  headers={'Content-Range': f'bytes */{size}'})
    return start, end - start + 1
