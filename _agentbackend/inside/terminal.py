"""Holds terminals in a workspace, so that a program in one needs neither client nor server.

    attach NAME COLUMNS ROWS FOLDER LIMIT [COMMAND]   joins a terminal, which is made if there is none
    list                                               prints what there is, a line of JSON each
    end NAME                                           ends one with all that runs in it

A terminal is a process with a pseudo-terminal and a socket. Both ways, all goes in frames: a letter, four
bytes of length, and so many bytes. To it: `d` is typed, `r` is a new size (two numbers of two bytes), `j`
joins, `s` asks what it is, `k` ends it. From it: `d` is printed, beginning with what was printed before, `s`
is JSON, `x` the exit status. `attach` passes these frames on as they are; `e` is its own word for why there
is no terminal.
"""
import contextlib
import errno
import fcntl
import json
import os
import pty
import select
import signal
import socket
import struct
import sys
import termios
import time

FOLDER = f'/tmp/.agentbackend-terminals-{os.getuid()}'
SCROLLBACK = 256 * 1024  # bytes
PENDING = 256 * 1024  # bytes that a reader may be behind before the program has to wait for it
PIECE = 65536
IGNORED = (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGTERM)  # by the terminal, not its program
SHELL = '/usr/local/lib/agentbackend/bash'


def frame(letter, data=b''):
    """Return a frame."""
    return letter + struct.pack('!I', len(data)) + data


def take_frames(buffer):
    """Return the frames [(letter, data)] that a buffer holds, and take them out of it."""
    found = []
    while len(buffer) >= 5:
        size = struct.unpack('!I', buffer[1:5])[0]
        if len(buffer) < 5 + size:
            break
        found.append((bytes(buffer[:1]), bytes(buffer[5:5 + size])))
        del buffer[:5 + size]
    return found


def path_of(name):
    """Return the path of a terminal's socket."""
    return f'{FOLDER}/{name}'


def connect(name):
    """Return a connection to a terminal, None when there is none; what a terminal left behind is removed."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(path_of(name))
        return sock
    except FileNotFoundError:
        sock.close()
    except ConnectionRefusedError:
        sock.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path_of(name))
    return None


def names():
    """Return the names of the terminals that there may be."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(os.listdir(FOLDER))
    return []


class Reader:
    """A connection to a terminal, with what is still to be sent over it."""

    def __init__(self, sock):
        sock.setblocking(False)
        self.sock, self.pending, self.received = sock, bytearray(), bytearray()

    def send(self):
        """Send what it takes just now; return whether it is still there."""
        try:
            while self.pending:
                del self.pending[:self.sock.send(self.pending[:PIECE])]
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True


class Terminal:
    """A pseudo-terminal with its program, and those who look at it."""

    def __init__(self, name, listener, columns, rows, folder, command):
        self.name, self.listener, self.command = name, listener, command
        self.size = columns, rows
        self.begun_at = time.time()
        self.printed = bytearray()
        self.readers = {}
        self.child, self.master = pty.fork()
        if self.child == 0:
            self._become_shell(folder)
        self._resize(columns, rows)
        os.set_blocking(self.master, False)
        self.typed = bytearray()

    def _become_shell(self, folder):
        for number in IGNORED:
            signal.signal(number, signal.SIG_DFL)
        with contextlib.suppress(OSError):
            os.chdir(folder)
        os.environ.update(TERM='xterm-256color', COLORTERM='truecolor')
        if not {'LANG', 'LC_ALL', 'LC_CTYPE'} & os.environ.keys():
            os.environ['LANG'] = 'C.UTF-8'  # a shell takes what is typed for bytes otherwise
        shell = SHELL if os.access(SHELL, os.X_OK) else 'sh'
        words = [shell, '-lc', self.command] if self.command else [shell]
        try:
            os.execvp(shell, words)
        finally:
            os._exit(127)

    def _resize(self, columns, rows):
        self.size = columns, rows
        with contextlib.suppress(OSError):
            fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack('HHHH', rows, columns, 0, 0))

    def run(self):
        """Pass on what is typed and printed until the program has ended."""
        while self.master is not None:
            waiting = [self.listener, *self.readers]
            if all(len(reader.pending) < PENDING for reader in self.readers.values()):
                waiting.append(self.master)
            writing = [sock for sock, reader in self.readers.items() if reader.pending]
            ready, free, _ = select.select(waiting, writing + ([self.master] if self.typed else []), [])
            for item in free:
                self._write(item)
            for item in ready:
                self._read(item)
        status = os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])
        self._tell(frame(b'x', b'%d' % (status if status >= 0 else 128 - status)))
        deadline = time.monotonic() + 5
        while any(reader.pending for reader in self.readers.values()) and time.monotonic() < deadline:
            behind = [sock for sock, reader in self.readers.items() if reader.pending]
            _, free, _ = select.select([], behind, [], 1)
            for sock in free:
                self._write(sock)

    def _write(self, item):
        if item is self.master or item == self.master:
            with contextlib.suppress(BlockingIOError, OSError):
                del self.typed[:os.write(self.master, self.typed[:4096])]
        elif item in self.readers and not self.readers[item].send():
            self._drop(item)

    def _read(self, item):
        if item is self.listener:
            sock = self.listener.accept()[0]
            self.readers[sock] = Reader(sock)
        elif item == self.master:
            self._take_printed()
        elif item in self.readers:
            self._take_said(item, self.readers[item])

    def _take_printed(self):
        try:
            data = os.read(self.master, PIECE)
        except BlockingIOError:
            return
        except OSError:
            data = b''
        if not data:
            self.master = None
            return
        self.printed += data
        if len(self.printed) > 2 * SCROLLBACK:
            del self.printed[:-SCROLLBACK]
        self._tell(frame(b'd', data))

    def _take_said(self, sock, reader):
        try:
            data = sock.recv(PIECE)
        except BlockingIOError:
            return
        except OSError:
            data = b''
        if not data:
            self._drop(sock)
            return
        reader.received += data
        for letter, payload in take_frames(reader.received):
            if letter == b'd':
                self.typed += payload
                self._write(self.master)
            elif letter == b'r' and len(payload) == 4:
                self._resize(*struct.unpack('!HH', payload))
            elif letter == b'j':
                reader.pending += frame(b'd', bytes(self.printed[-SCROLLBACK:]))
                reader.joined = True
            elif letter == b's':
                reader.pending += frame(b's', json.dumps(self._described()).encode())
            elif letter == b'k':
                self._kill()
        if not reader.send():
            self._drop(sock)

    def _described(self):
        return {'name': self.name, 'command': self.command, 'startedAt': self.begun_at,
                'columns': self.size[0], 'rows': self.size[1],
                'clients': sum(hasattr(reader, 'joined') for reader in self.readers.values())}

    def _kill(self):
        # All that has this terminal: its session, whatever groups it has made.
        for entry in os.listdir('/proc'):
            with contextlib.suppress(OSError, ValueError):
                if entry.isdigit() and os.getsid(int(entry)) == self.child:
                    os.kill(int(entry), signal.SIGKILL)

    def _tell(self, data):
        for sock, reader in list(self.readers.items()):
            if hasattr(reader, 'joined'):
                reader.pending += data
                if not reader.send():
                    self._drop(sock)

    def _drop(self, sock):
        self.readers.pop(sock, None)
        sock.close()


def hold(name, columns, rows, folder, command):
    """Become a terminal, in a process of its own; return in the one that called."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(path_of(name))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return  # somebody else was faster
        raise
    listener.listen(16)
    if os.fork():
        return
    os.setsid()
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    if os.fork():
        os._exit(0)
    nowhere = os.open('/dev/null', os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    try:
        Terminal(name, listener, columns, rows, folder, command).run()
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path_of(name))
        os._exit(0)


def attach(name, columns, rows, folder, limit, command=''):
    """Join a terminal: pass frames on between it, stdin and stdout."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(FOLDER, 0o700)
    found = os.lstat(FOLDER)
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(f'{FOLDER} is not mine alone')
    sock = connect(name)
    if sock is None and len(names()) >= int(limit):
        os.write(1, frame(b'e', b'TOO_MANY'))
        return
    while sock is None:
        hold(name, int(columns), int(rows), folder, command)
        sock = connect(name)
    sock.sendall(frame(b'r', struct.pack('!HH', int(columns), int(rows))) + frame(b'j'))
    while True:
        ready, _, _ = select.select([0, sock], [], [])
        if 0 in ready:
            data = os.read(0, PIECE)
            if not data:
                return
            sock.sendall(data)
        if sock in ready:
            data = sock.recv(PIECE)
            if not data:
                return
            while data:
                data = data[os.write(1, data):]


def ask(name, letter):
    """Send a word to a terminal and return what it says until it closes, or says what it is."""
    sock, buffer = connect(name), bytearray()
    if sock is None:
        return None
    sock.settimeout(5)
    with contextlib.closing(sock), contextlib.suppress(OSError):
        sock.sendall(frame(letter))
        while data := sock.recv(PIECE):
            buffer += data
            for found, payload in take_frames(buffer):
                if found == b's':
                    return payload.decode()
    return ''


def main(work, *words):
    """Do one of the works."""
    if work == 'attach':
        attach(*words)
    elif work == 'list':
        for name in names():
            told = ask(name, b's')
            if told:
                print(told)
    elif work == 'end':
        sys.exit(0 if ask(words[0], b'k') is not None else 3)


main(*sys.argv[2:])
