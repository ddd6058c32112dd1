"""Reads and changes files of a workspace, inside it: one request per process, on stdin and stdout.

A request is a line of JSON; then come the bytes of a body, if it has one, in pieces of four bytes of length
and so many bytes, and an empty piece at its end. The answer is a line of JSON, and behind it what was
asked for.
When stdin ends early, nobody is there any more, and all that was begun is taken back.

A path is walked from the base folder, one name at a time, each opened as no link. A link is followed by
walking its target in the same way; so none leads out, whoever changes the folders meanwhile.
"""
import contextlib
import errno
import fcntl
import json
import os
import stat
import subprocess
import sys
import threading
import time

PIECE = 1 << 20  # bytes
MAX_LINKS = 40
PIPE_SIZE = 1 << 20  # bytes; a pipe of more takes fewer turns
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Refused(Exception):
    """What cannot be done: its code, and in words why."""


class Place:
    """A name in a folder: `folder` is its open descriptor, `name` is empty for the base itself."""

    def __init__(self, folder, name):
        self.folder, self.name = folder, name

    def stat(self):
        """Return its stat, without following a link; None when there is nothing."""
        try:
            return os.lstat(self.name, dir_fd=self.folder) if self.name else os.fstat(self.folder)
        except FileNotFoundError:
            return None

    def open_folder(self):
        """Return a descriptor of the folder that it is."""
        return os.open(self.name, FOLDER, dir_fd=self.folder) if self.name else os.dup(self.folder)


class Tree:
    """The base folder, and the way to what is in it."""

    def __init__(self, base):
        self.base = base
        self.root = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._opened = []

    def release(self):
        """Close what was opened on the way to the places found so far."""
        while self._opened:
            os.close(self._opened.pop())

    def find(self, path, *, follow=True, make=False, outside=None):
        """Return the Place of a path; with `make` the folders above it are made. The last name is followed if
        it is a link and `follow` says so. It is not within the folder whose stat is `outside`."""
        stack, links = [self.root], 0
        todo, is_folder = self._names(path), path.endswith('/.')
        while todo:
            name = todo.pop(0)
            if name == '..':
                if len(stack) == 1:
                    raise Refused('OUTSIDE', 'it leads out of the workspace')
                stack.pop()
                continue
            found = Place(stack[-1], name)
            is_last, known = not todo, found.stat()
            if known is not None and stat.S_ISLNK(known.st_mode) and (follow or not is_last):
                links += 1
                if links > MAX_LINKS:
                    raise Refused('OUTSIDE', 'it has too many links')
                target = os.readlink(name, dir_fd=stack[-1])
                if target.startswith('/'):
                    target, stack = self._below(target), [self.root]
                todo = self._names(target) + todo
                continue
            if (is_last or known is None) and outside is not None and any(
                    os.path.samestat(os.fstat(folder), outside) for folder in stack):
                raise Refused('INSIDE', 'its target is within itself')
            if is_last and not is_folder:
                return found
            stack.append(self._enter(found, known, make))
        return Place(stack[-1], '')

    @staticmethod
    def _names(path):
        return [name for name in path.split('/') if name not in ('', '.')]

    def _below(self, target):
        if target != self.base and not target.startswith(self.base + '/'):
            raise Refused('OUTSIDE', 'it is a link that leads out of the workspace')
        return target[len(self.base):]

    def _enter(self, place, known, make):
        if known is None:
            if not make:
                raise Refused('FILE_NOT_FOUND', 'there is no such file')
            with contextlib.suppress(FileExistsError):
                os.mkdir(place.name, 0o755, dir_fd=place.folder)
        elif not stat.S_ISDIR(known.st_mode):
            raise Refused('NOT_A_FOLDER', f'{place.name} is not a folder')
        self._opened.append(place.open_folder())
        return self._opened[-1]


class Body:
    """What is sent behind the request."""

    def __init__(self, stream):
        self._stream, self._left, self._ended = stream, 0, False

    def read(self, size=-1):
        """Return some bytes, at most `size`, all of them unless the body ends before."""
        found = bytearray()
        while size < 0 or len(found) < size:
            data = self._some(PIECE if size < 0 else size - len(found))
            if not data:
                break
            found += data
        return bytes(found)

    def pieces(self):
        """Yield all of it."""
        yield from iter(lambda: self._some(PIECE), b'')

    def _some(self, size):
        if not self._left and not self._ended:
            self._left = int.from_bytes(self._exactly(4), 'big')
            self._ended = not self._left
        if self._ended:
            return b''
        data = self._stream.read1(min(size, self._left))
        if not data:
            raise Refused('GONE', 'the client has left')
        self._left -= len(data)
        return data

    def _exactly(self, size):
        data = self._stream.read(size)
        if len(data) < size:
            raise Refused('GONE', 'the client has left')
        return data


def answer(**values):
    """Print a line of the answer."""
    sys.stdout.buffer.write(json.dumps(values).encode() + b'\n')
    sys.stdout.buffer.flush()


def watch_stdin(end=lambda: os.killpg(0, 9)):
    """Call `end` when stdin ends; by default this process and its children are ended."""
    def watch():
        if not os.read(0, 1):
            end()
    threading.Thread(target=watch, daemon=True).start()


KINDS = {stat.S_IFREG: 'file', stat.S_IFDIR: 'folder', stat.S_IFLNK: 'link'}


def moment(nanoseconds):
    """Return a time as RFC 3339; one that no such text can hold becomes the next one that it can."""
    seconds, fraction = divmod(max(0, min(nanoseconds, 253402300799 * 10**9)), 10**9)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{fraction // 10**6:03d}Z"


def entry(name, found, folder, link=None):
    """Return what a folder tells of one name."""
    shown = {'name': name.encode('utf-8', 'surrogateescape').decode('utf-8', 'replace'),
             'type': KINDS.get(stat.S_IFMT(found.st_mode), 'other'), 'size': found.st_size,
             'mode': f'{stat.S_IMODE(found.st_mode):04o}', 'modifiedAt': moment(found.st_mtime_ns)}
    if stat.S_ISLNK(found.st_mode):
        with contextlib.suppress(OSError):
            target = os.readlink(link or name, dir_fd=folder)
            shown['target'] = target.encode('utf-8', 'surrogateescape').decode('utf-8', 'replace')
    return shown


def tag(found):
    """Return what tells this version of a file from another."""
    return f'{found.st_mtime_ns:x}-{found.st_size:x}-{found.st_ino:x}'


def head(place, found, **more):
    """Answer with what is known of a file or folder."""
    shown = entry(place.name, found, place.folder)
    answer(ok=True, tag=tag(found), **shown, **more)


def existing(tree, request, **how):
    """Return (Place, stat) of the request's path; raise Refused when there is nothing."""
    place = tree.find(request['path'], **how)
    found = place.stat()
    if found is None:
        raise Refused('FILE_NOT_FOUND', 'there is no such file')
    return place, found


def read(tree, request, lines):
    """Answer with a file's head, and as many of its bytes as the next line of stdin asks for; with the list
    of a folder."""
    place, found = existing(tree, request)
    if stat.S_ISDIR(found.st_mode):
        if request.get('archive'):
            answer(ok=True, type='archive')
            return archive(place, found, request['archive'])
        head(place, found)
        return listing(place) if request.get('content') else None
    if request.get('archive'):
        answer(ok=True, type='archive')
        return archive(place, found, request['archive'])
    if not stat.S_ISREG(found.st_mode):
        raise Refused('NOT_A_FILE', 'it is neither a file nor a folder')
    # Nothing hangs that was exchanged for a FIFO meanwhile.
    file = os.open(place.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
                   dir_fd=place.folder)
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode):
        raise Refused('NOT_A_FILE', 'it is neither a file nor a folder')
    head(place, found)
    if not request.get('content'):
        return None
    start, count = json.loads(lines.readline() or '[0, 0]')
    watch_stdin()
    with contextlib.suppress(OSError):
        fcntl.fcntl(1, 1031, PIPE_SIZE)  # F_SETPIPE_SZ
    while count > 0:
        sent = os.sendfile(1, file, start, min(count, PIECE))
        if not sent:
            return 1  # it has become shorter
        start, count = start + sent, count - sent
    return None


def listing(place):
    """Print the names of a folder as a JSON array, without holding all of them."""
    out, folder = sys.stdout.buffer, place.open_folder()
    watch_stdin()
    out.write(b'[')
    comma = b''
    with os.scandir(folder) as names:
        for item in names:
            with contextlib.suppress(FileNotFoundError):
                shown = entry(item.name, item.stat(follow_symlinks=False), folder)
                out.write(comma + json.dumps(shown).encode())
                comma = b','
    out.write(b']')
    out.flush()


def archive(place, found, form):
    """Print a tree as a tar: of a folder what is in it, else the file itself."""
    is_folder = stat.S_ISDIR(found.st_mode)
    os.fchdir(place.open_folder() if is_folder else place.folder)
    watch_stdin()
    done = subprocess.run(['tar', '--create', *(['--gzip'] if form == 'tar.gz' else []), '--file=-',
                           '--format=pax', '--pax-option=delete=atime,delete=ctime', '--ignore-failed-read',
                           '--warning=none', '--', '.' if is_folder else './' + place.name],
                          stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return done.returncode if done.returncode > 1 else 0


def check_match(request, found):
    """Refuse a change of a file that is not the one that the client knows."""
    wanted, known = request.get('match'), tag(found) if found is not None else None
    if wanted is not None and (known is None or ('*' not in wanted and known not in wanted)):
        raise Refused('PRECONDITION_FAILED', 'it is not the version that If-Match names')
    refused = request.get('noneMatch')
    if refused is not None and known is not None and ('*' in refused or known in refused):
        raise Refused('PRECONDITION_FAILED', 'it exists, against If-None-Match')


class Draft:
    """A file without a name, beside the place that it is for: nothing is left of it that is not put there."""

    def __init__(self, folder):
        self._folder = folder
        self._hidden = None
        try:
            self.file = os.open('.', os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=folder)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
            self._hidden = hidden_name()
            self.file = os.open(self._hidden, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600,
                                dir_fd=folder)

    def fill(self, pieces):
        """Write all of the pieces."""
        for data in pieces:
            view = memoryview(data)
            while view:
                view = view[os.write(self.file, view):]

    def put(self, name, mode, *, new=False):
        """Give it its name, in the place of what has it; with `new` nothing may have it."""
        os.fchmod(self.file, mode)
        if self._hidden is None:
            hidden = hidden_name()
            os.link(f'/proc/self/fd/{self.file}', hidden, dst_dir_fd=self._folder, follow_symlinks=True)
            self._hidden = hidden
        rename = rename_new if new else os.rename
        rename(self._hidden, name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        self._hidden = None

    def close(self):
        """Leave nothing of it unless it has its name."""
        os.close(self.file)
        if self._hidden is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._hidden, dir_fd=self._folder)


def hidden_name():
    """Return a name that nothing has yet."""
    return f'.agentbackend-{os.urandom(8).hex()}'


def rename_new(name, new, *, src_dir_fd, dst_dir_fd):
    """Rename as os.rename does, but replace nothing: FileExistsError tells that something has come there."""
    number = errno.ENOSYS
    with contextlib.suppress(ImportError, AttributeError):  # not every libc has it
        import ctypes  # takes its time, which the others need not spend
        call = ctypes.CDLL(None, use_errno=True).renameat2
        if call(src_dir_fd, os.fsencode(name), dst_dir_fd, os.fsencode(new), 1) == 0:  # RENAME_NOREPLACE
            return
        number = ctypes.get_errno()
    if number not in (errno.ENOSYS, errno.EINVAL):  # which kernels and file systems say that lack it
        raise OSError(number, 'there is something at its target' if number == errno.EEXIST
                      else os.strerror(number))
    if stat.S_ISDIR(os.lstat(name, dir_fd=src_dir_fd).st_mode):
        os.rename(name, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)  # of folders only an empty one
        return
    os.link(name, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd, follow_symlinks=False)
    os.unlink(name, dir_fd=src_dir_fd)


def write(tree, request, lines):
    """Write a file from the body: whole, or not at all."""
    place = tree.find(request['path'], make=True)
    found = place.stat() if place.name else os.fstat(place.folder)
    if found is not None and stat.S_ISDIR(found.st_mode):
        raise Refused('FILE_EXISTS', 'it is a folder')
    if found is not None and not stat.S_ISREG(found.st_mode):
        raise Refused('FILE_EXISTS', 'it is neither a file nor a folder')
    check_match(request, found)
    answer(ok=True)
    with contextlib.closing(Draft(place.folder)) as draft:
        draft.fill(Body(lines).pieces())
        now = place.stat()
        check_match(request, now)
        umask = os.umask(0o022)
        os.umask(umask)
        mode = stat.S_IMODE(found.st_mode) if found is not None else 0o666 & ~umask
        try:
            draft.put(place.name, request['mode'] if request.get('mode') is not None else mode,
                      new='*' in (request.get('noneMatch') or ()))
        except FileExistsError:
            check_match(request, place.stat())
            raise
    head(place, place.stat(), created=found is None)


def extract(tree, request, lines):
    """Write a tree from a tar in the body. Each of its names is walked as any path."""
    import gzip  # these take their time, which the others need not spend
    import tarfile
    import zlib
    tree.find(request['path'] + '/.', make=True)
    answer(ok=True)
    body = Body(lines)
    try:
        count = unpack_all(tree, request['path'].rstrip('/'),
                           gzip.GzipFile(fileobj=body) if request['form'] == 'tar.gz' else body)
    # Beside its own errors, tarfile lets through what numbers and lists of a header that is wrong give.
    except (tarfile.TarError, zlib.error, gzip.BadGzipFile, EOFError, ValueError, ArithmeticError,
            LookupError, RecursionError) as error:
        raise Refused('NOT_A_TAR', f'it is not a tar that can be read: {error}') from error
    place = tree.find(request['path'])
    head(place, place.stat(), created=False, entries=count)


def unpack_all(tree, prefix, source):
    """Write all entries of a tar, and return how many there are."""
    import tarfile

    class Header(tarfile.TarInfo):
        """A header that is the end of a tar only where it says so: tarfile takes any bad one for that."""

        @classmethod
        def fromtarfile(cls, archive):
            try:
                return super().fromtarfile(archive)
            except tarfile.EOFHeaderError:
                raise
            except tarfile.HeaderError as error:
                raise tarfile.ReadError(f'{error}, before the end') from error

    count, later = 0, []
    with tarfile.open(fileobj=source, mode='r|', tarinfo=Header, encoding='utf-8', errors='surrogateescape',
                      bufsize=PIECE) as tar:
        for member in tar:
            unpack(tree, prefix, tar, member, later)
            tree.release()
            count += 1
        if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b'\0'):
            raise tarfile.ReadError('an empty header, before the end')
    for _ in iter(lambda: source.read(PIECE), b''):
        pass  # the sum of a gzip stands at its end
    for folder, changed in reversed(later):
        with contextlib.suppress(OSError, Refused):
            os.utime(tree.find(folder + '/.', follow=False).folder, (changed, changed))
        tree.release()
    return count


def unpack(tree, prefix, tar, member, later):
    """Write one entry of a tar."""
    if '..' in member.name.split('/') or '\0' in member.name:
        raise Refused('OUTSIDE', f'{member.name!r} in the tar leads out of the workspace')
    path = f'{prefix}/{member.name.lstrip("/")}'
    place = tree.find(path, follow=False, make=True)
    found, mode = place.stat() if place.name else os.fstat(place.folder), member.mode & 0o777
    if member.isdir():
        if found is None:
            os.mkdir(place.name, mode | 0o700, dir_fd=place.folder)
        elif not stat.S_ISDIR(found.st_mode):
            raise Refused('NOT_A_FOLDER', f'{member.name!r} is a folder in the tar, none in the workspace')
        later.append((path, member.mtime))
        return
    if not place.name or (found is not None and stat.S_ISDIR(found.st_mode)):
        raise Refused('FILE_EXISTS', f'{member.name!r} is a folder in the workspace, and none in the tar')
    if member.isreg():
        with contextlib.closing(Draft(place.folder)) as draft:
            content = tar.extractfile(member)
            draft.fill(iter(lambda: content.read(PIECE), b''))
            os.utime(draft.file, (member.mtime, member.mtime))
            draft.put(place.name, mode or 0o644)
    elif member.issym() or member.islnk():
        hidden = hidden_name()
        if member.issym():
            os.symlink(member.linkname, hidden, dir_fd=place.folder)
        else:
            target = tree.find(f'{prefix}/{member.linkname.lstrip("/")}', follow=False)
            os.link(target.name, hidden, src_dir_fd=target.folder, dst_dir_fd=place.folder,
                    follow_symlinks=False)
        os.rename(hidden, place.name, src_dir_fd=place.folder, dst_dir_fd=place.folder)
        with contextlib.suppress(FileNotFoundError):  # of one that was the same file already
            os.unlink(hidden, dir_fd=place.folder)
    else:
        raise Refused('NOT_A_FILE', f'{member.name!r} in the tar is neither file, folder nor link')


def check_kept(tree, request, place, found):
    """Refuse to take away the base or the folder of the project, by whichever way it was reached."""
    kept = [tree.find(path, follow=False).stat() for path in request['kept']]
    if not place.name or any(known and os.path.samestat(known, found) for known in kept):
        raise Refused('OUTSIDE', 'it is the folder of the project, or one above it')


def delete_tree(folder, name):
    """Delete a tree of any depth; return what rm says of that, nothing when it is gone."""
    done = subprocess.run(['rm', '-rf', '--', f'/proc/self/fd/{folder}/{name}'], pass_fds=(folder,),
                          env={**os.environ, 'LC_ALL': 'C'}, stdin=subprocess.DEVNULL,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return done.stderr.decode('utf-8', 'replace').strip() if done.returncode else ''


def remove(tree, request, lines):
    """Delete a file, a link, or a folder; one that is not empty only if that is said."""
    place, found = existing(tree, request, follow=False)
    check_kept(tree, request, place, found)
    check_match(request, found)
    if not stat.S_ISDIR(found.st_mode):
        os.unlink(place.name, dir_fd=place.folder)
    elif request.get('recursive'):
        said = delete_tree(place.folder, place.name)
        if said:
            raise Refused('FAILED', said.rpartition(': ')[2])
    else:
        os.rmdir(place.name, dir_fd=place.folder)
    answer(ok=True)


def make_folder(tree, request, lines):
    """Make a folder, and those above it."""
    place = tree.find(request['path'], follow=False, make=True)
    if not place.name:
        raise Refused('FILE_EXISTS', 'it exists')
    os.mkdir(place.name, 0o755, dir_fd=place.folder)
    head(place, place.stat(), created=True)


def target_of(tree, request, found):
    """Return the Place that something with the stat `found` is to be moved or copied to, which nothing
    has."""
    place = tree.find(request['to'], follow=False, make=True, outside=found)
    if place.stat() is not None:
        raise Refused('FILE_EXISTS', 'there is something at its target')
    return place


def move(tree, request, lines):
    """Give a file or folder another name."""
    place, found = existing(tree, request, follow=False)
    check_kept(tree, request, place, found)
    to = target_of(tree, request, found)
    rename_new(place.name, to.name, src_dir_fd=place.folder, dst_dir_fd=to.folder)
    head(to, to.stat(), created=True)


def copy(tree, request, lines):
    """Copy a file or a tree: links stay links, and it appears when all of it is there."""
    place, found = existing(tree, request, follow=False)
    if not place.name:
        raise Refused('OUTSIDE', 'it is the folder of all')
    if not any(check(found.st_mode) for check in (stat.S_ISDIR, stat.S_ISREG, stat.S_ISLNK)):
        raise Refused('NOT_A_FILE', 'it is neither a file nor a folder')
    to, hidden = target_of(tree, request, found), hidden_name()
    copying = subprocess.Popen(['cp', '-a', '-T', '--', f'/proc/self/fd/{place.folder}/{place.name}',
                                f'/proc/self/fd/{to.folder}/{hidden}'], pass_fds=(place.folder, to.folder),
                               stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    watch_stdin(copying.kill)
    try:
        said = copying.communicate()[1]
        if copying.returncode:
            raise Refused('FAILED', said.decode('utf-8', 'replace')[-300:].strip())
        rename_new(hidden, to.name, src_dir_fd=to.folder, dst_dir_fd=to.folder)
    except BaseException:
        delete_tree(to.folder, hidden)
        raise
    head(to, to.stat(), created=True)


WORK = {'read': read, 'write': write, 'extract': extract, 'remove': remove, 'mkdir': make_folder,
        'move': move, 'copy': copy}
CODES = {errno.ENOENT: 'FILE_NOT_FOUND', errno.ENOTDIR: 'NOT_A_FOLDER', errno.EEXIST: 'FILE_EXISTS',
         errno.ENOTEMPTY: 'FILE_EXISTS', errno.EACCES: 'NOT_ALLOWED', errno.EPERM: 'NOT_ALLOWED',
         errno.ELOOP: 'OUTSIDE', errno.ENAMETOOLONG: 'FILE_NOT_FOUND', errno.EINVAL: 'NOT_ALLOWED'}


def main():
    """Do what the request says."""
    lines = sys.stdin.buffer
    request = json.loads(lines.readline())
    try:
        status = WORK[request['work']](Tree(request['base']), request, lines)
    except Refused as error:
        answer(ok=False, code=error.args[0], error=error.args[1])
        return
    except OSError as error:
        answer(ok=False, code=CODES.get(error.errno, 'FAILED'), error=error.strerror or str(error))
        return
    sys.stdout.buffer.flush()
    if status:
        sys.exit(status)
    sys.stderr.write('\0done')  # what has no length is whole only with this


main()
