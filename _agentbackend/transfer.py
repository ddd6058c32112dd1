"""Files and folders on their way between this machine and a workspace, as streams that nobody holds whole."""
import os
import re
import shutil
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

from _agentbackend.remote import PIECE, RemoteError, amount, files_path


def is_folder(remote, workspace, path):
    """Tell whether there is a folder; None when there is nothing."""
    try:
        with remote.open('GET', files_path(workspace, path), headers={'Accept': '*/*'}) as answer:
            return 'ETag' not in answer.headers
    except RemoteError as error:
        if error.code != 'FILE_NOT_FOUND':
            raise
        return None


def upload(remote, source, workspace, path, counter):
    """Write a file, a folder or stdin (`-`) into a workspace. Raises RemoteError."""
    into = path == '' or path.endswith('/')
    if source == '-':
        query, parts = {'extract': 'tar' if into else None}, iter(lambda: sys.stdin.buffer.read1(PIECE), b'')
    elif not os.path.lexists(source):
        raise RemoteError(f'{source}: there is no such file here.', 'FILE_NOT_FOUND')
    else:
        # As for `docker cp`: of `.` the content is meant.
        name = '' if re.fullmatch(r'(.*/)?\./?', source) else os.path.basename(os.path.abspath(source))
        if into or is_folder(remote, workspace, path):
            path = '/'.join(filter(None, [path.rstrip('/') or path, name]))
        folder = os.path.isdir(source)
        query = {'extract': 'tar'} if folder else {'mode': f'{os.stat(source).st_mode & 0o777:03o}'}
        parts = packed(source) if folder else read_file(source)
    remote.call('PUT', files_path(workspace, path.rstrip('/')), counter.counted(parts), query=query,
                timeout=None)


def download(remote, workspace, path, target, counter):
    """Write a file or a folder of a workspace here, whole or not at all. Raises RemoteError."""
    folder = is_folder(remote, workspace, path)
    with remote.open('GET', files_path(workspace, path.rstrip('/')), timeout=None,
                     query={'archive': 'tar' if folder else None}, headers={'Accept': '*/*'}) as answer:
        parts = counter.counted(answer.pieces())
        if target == '-':
            for data in parts:
                sys.stdout.buffer.write(data)
            return
        target = Path(target)
        if target.is_dir():
            target /= path.rstrip('/').rpartition('/')[2] or workspace
        try:
            beside = target.absolute().parent
            with tempfile.TemporaryDirectory(prefix='.agentbackend-', dir=beside) as scratch:
                fresh = Path(scratch) / 'new'
                (unpack if folder else write_file)(parts, fresh)
                place(fresh, target)
        except OSError as error:
            raise RemoteError(f'{target}: {error.strerror or error}.', 'FAILED') from error


class Counter:
    """Counts bytes that pass, and tells `step` now and then how many."""

    def __init__(self, step):
        self.size = 0
        self._step = step
        self._begun = time.monotonic()

    def counted(self, parts):
        """Yield the parts."""
        said = time.monotonic()
        for data in parts:
            self.size += len(data)
            if time.monotonic() - said > (0.2 if sys.stderr.isatty() else 10):
                said = time.monotonic()
                self._step(self.told())
            yield data

    def told(self):
        """Return how many, and how fast."""
        seconds = time.monotonic() - self._begun
        return f'{amount(self.size)} in {seconds:.0f} s, {amount(self.size / max(seconds, 0.001))}/s'


def read_file(path):
    """Yield what is in a file."""
    try:
        with open(path, 'rb') as file:
            yield from iter(lambda: file.read(PIECE), b'')
    except OSError as error:
        raise RemoteError(f'{path}: {error.strerror}.', 'FAILED') from error


def packed(folder):
    """Yield a tar of what is in a folder."""
    read, write = os.pipe()
    failed = []

    def pack():
        try:
            with os.fdopen(write, 'wb') as file, tarfile.open(fileobj=file, mode='w|',
                                                              format=tarfile.PAX_FORMAT) as archive:
                archive.add(folder, '.')
        except BrokenPipeError:
            pass  # nobody wants the rest
        except OSError as error:
            failed.append(RemoteError(f'{error.filename or folder}: {error.strerror}.', 'FAILED'))
    threading.Thread(target=pack, daemon=True).start()
    with os.fdopen(read, 'rb') as file:
        yield from iter(lambda: file.read1(PIECE), b'')
    for error in failed:
        raise error


def unpack(parts, folder):
    """Unpack a tar that comes in parts into a new folder, of which nothing leads out."""
    if not hasattr(tarfile, 'data_filter'):
        raise RemoteError('Folders are unpacked by Python 3.10.12 or newer only.', 'FAILED')

    class Parts:
        rest = b''

        def read(self, size):
            while len(self.rest) < size and (data := next(parts, b'')):
                self.rest += data
            data, self.rest = self.rest[:size], self.rest[size:]
            return data
    try:
        with tarfile.open(fileobj=Parts(), mode='r|', errorlevel=1) as archive:
            archive.extractall(folder, filter=lambda member, where: tarfile.tar_filter(member.replace(
                uid=None, gid=None, uname=None, gname=None, deep=False), where))
    except tarfile.TarError as error:
        raise RemoteError(f'The folder did not come whole: {error}', 'FAILED') from error


def write_file(parts, path):
    """Write what comes in parts."""
    with open(path, 'wb') as file:
        for data in parts:
            file.write(data)


def place(fresh, target):
    """Put a file or a folder in its place; a folder is laid over one that is there."""
    if fresh.is_dir() and target.is_dir():
        shutil.copytree(fresh, target, symlinks=True, dirs_exist_ok=True)
    else:
        os.replace(fresh, target)
