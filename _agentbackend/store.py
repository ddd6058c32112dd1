"""The file behind the state: one SQLite database with a row per record, used in one thread of its own."""
import contextlib
import json
import os
import re
import sqlite3
import time

import gevent.threadpool

from _agentbackend.records import Run, Session, Workspace, record_of

VERSION = 1  # of the file's format
TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE workspaces (id TEXT PRIMARY KEY, record TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE sessions (id TEXT PRIMARY KEY, record TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE runs (session_id TEXT, number INTEGER, workspace_id TEXT NOT NULL, serial INTEGER NOT NULL,
    ended_at REAL, open INTEGER NOT NULL, record TEXT NOT NULL,
    PRIMARY KEY (session_id, number)) WITHOUT ROWID;
CREATE INDEX runs_of_workspace ON runs (workspace_id, serial);
CREATE INDEX runs_by_end ON runs (ended_at);
CREATE INDEX runs_open ON runs (open) WHERE open;
"""
# What workspaces told of themselves. It came later; a version that knows nothing of it leaves it alone.
EVENTS = """
CREATE TABLE IF NOT EXISTS events (workspace_id TEXT, number INTEGER, record TEXT NOT NULL,
    PRIMARY KEY (workspace_id, number)) WITHOUT ROWID;
"""
# Beside the records, and made whenever it is missing: a file of an earlier version lacks it.
ANSWERS = ('CREATE TABLE IF NOT EXISTS answers '
           '(key TEXT PRIMARY KEY, at REAL NOT NULL, record TEXT NOT NULL) WITHOUT ROWID')
ANSWER = 'SELECT record FROM answers WHERE key = ?'
PUT = {'meta': 'INSERT OR REPLACE INTO meta VALUES (?, ?)',
       'answer': 'INSERT OR REPLACE INTO answers VALUES (?, ?, ?)',
       'workspace': 'INSERT OR REPLACE INTO workspaces VALUES (?, ?)',
       'session': 'INSERT OR REPLACE INTO sessions VALUES (?, ?)',
       'run': 'INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?, ?, ?, ?)',
       'event': 'INSERT OR REPLACE INTO events VALUES (?, ?, ?)'}
DROP = {'answers before': ('DELETE FROM answers WHERE at < ?',),
        'workspace': ('DELETE FROM workspaces WHERE id = ?', 'DELETE FROM events WHERE workspace_id = ?'),
        'event': ('DELETE FROM events WHERE workspace_id = ? AND number = ?',),
        'run': ('DELETE FROM runs WHERE session_id = ? AND number = ?',),
        'session': ('DELETE FROM sessions WHERE id = ?', 'DELETE FROM runs WHERE session_id = ?')}
# A session is loaded with its last run; runs that are open are at work, or have processes that are still to
# be ended.
LOADED = """
SELECT record FROM runs JOIN (SELECT session_id, max(number) AS number FROM runs GROUP BY session_id)
    USING (session_id, number)
UNION SELECT record FROM runs WHERE open
"""
RUNS = 'SELECT record FROM runs WHERE session_id = ? AND number > ? ORDER BY number LIMIT ?'
BEGUN = 'SELECT record FROM runs WHERE workspace_id = ? AND serial >= ? ORDER BY serial'
# Those of a stopped workspace have to wait for it, so not always the same ones are to come first.
OUTDATED = """
SELECT record FROM (SELECT record FROM (SELECT record FROM runs WHERE ended_at IS NOT NULL AND NOT open
    ORDER BY ended_at DESC LIMIT -1 OFFSET ?)
UNION SELECT record FROM runs WHERE ended_at < ? AND NOT open) ORDER BY random() LIMIT 500
"""
JSON_VERSION = 1  # of the file that earlier versions kept
RENAMED = {'born': 'ever_ran'}  # fields that it has under another name
FOREIGN = re.compile('no such|already exists')  # what SQLite says of a file with other tables


class DamagedFile(Exception):
    """The file is no state file, or not a whole one."""


class NewerFile(Exception):
    """The file was written by a newer version of this program."""


class Store:
    """One SQLite file. Every method does its work in a thread, one after the other, while other greenlets go
    on.

    What a disk refuses is an OSError or sqlite3.Error. A change is on the disk when `write` returns (WAL,
    synchronous=FULL).
    """

    def __init__(self, path):
        self.path = path
        self._thread = None
        self._connection = None

    def open(self):
        """Open the file and return its content as {'meta': {key: value}, 'workspaces', 'sessions', 'runs',
        'events': records}; a new one is empty.

        Raises NewerFile, which leaves the file as it is, DamagedFile, and OSError when the folder cannot be
        used.
        """
        self._thread = gevent.threadpool.ThreadPool(1)
        return self._apply(self._open)

    def write(self, rows):
        """Write rows as one transaction: (kind, key, values), where values None removes the record and what
        belongs to it."""
        self._apply(self._write, rows)

    def read(self, query, *parameters):
        """Return the records that one of the queries of this module finds."""
        return self._apply(self._records, query, parameters)

    def close(self):
        """Close the file and end the thread; the next `open` begins anew."""
        self._apply(self._close)
        self._thread.kill()

    def _apply(self, function, *args):
        """Call a function in the thread. What it raises is carried over: gevent would print it too."""
        def called():
            try:
                return function(*args), None
            except Exception as error:
                return None, error
        result, error = self._thread.apply(called)
        if error is not None:
            raise error
        return result

    def set_aside(self):
        """Close the file and rename it, with what SQLite keeps beside it; return its new name."""
        self.close()
        aside = self.path.with_suffix(f'.damaged-{int(time.time())}')
        for end in ('-wal', '-shm', ''):
            with contextlib.suppress(FileNotFoundError):
                os.rename(f'{self.path}{end}', f'{aside}{end}')
        return aside

    def _open(self):
        try:
            if self.path.is_file() and self._version_in_header() > VERSION:
                raise NewerFile
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))  # only its owner may read it
            self._connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            if self._read('PRAGMA quick_check', ()) != ['ok']:
                raise DamagedFile('its own check finds errors')
            version = self._connection.execute('PRAGMA user_version').fetchone()[0]
            if version > VERSION:
                raise NewerFile
            if not version:
                self._connection.executescript(f'BEGIN; {TABLES} PRAGMA user_version = {VERSION}; COMMIT')
            meta = dict(self._connection.execute('SELECT key, value FROM meta'))
            self._connection.executescript(EVENTS)
            content = {'meta': {key: json.loads(value) for key, value in meta.items()}} | {
                'workspaces': self._records('SELECT record FROM workspaces'),
                'sessions': self._records('SELECT record FROM sessions'),
                'runs': self._records(LOADED),
                'events': self._records('SELECT record FROM events ORDER BY workspace_id, number')}
            # Only now: what is damaged stays as it is.
            for pragma in ('journal_mode = WAL', 'synchronous = FULL'):
                self._connection.execute(f'PRAGMA {pragma}')
            self._connection.execute(ANSWERS)
            return content
        except (sqlite3.DatabaseError, ValueError, RecursionError) as error:
            self._close()
            if isinstance(error, sqlite3.OperationalError) and not FOREIGN.search(str(error)):
                raise OSError(0, str(error)) from error
            raise DamagedFile(str(error)) from error
        except BaseException:
            self._close()
            raise

    def _version_in_header(self):
        """Return user_version as the file itself has it (bytes 60 to 63): to ask SQLite would make files
        beside it."""
        with open(self.path, 'rb') as file:
            head = file.read(64)
        return int.from_bytes(head[60:], 'big') if head.startswith(b'SQLite format 3\0') else 0

    def _read(self, query, parameters):
        return [text for text, in self._connection.execute(query, parameters)]

    def _records(self, query, parameters=()):
        return [json.loads(text) for text in self._read(query, parameters)]

    def _write(self, rows):
        self._connection.execute('BEGIN IMMEDIATE')
        try:
            for kind, key, values in rows:
                if values is None:
                    for statement in DROP[kind]:
                        self._connection.execute(statement, key)
                else:
                    self._connection.execute(PUT[kind], (*key, *values))
            self._connection.execute('COMMIT')
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute('ROLLBACK')
            raise

    def _close(self):
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def read_json(path):
    """Return the workspaces of the JSON file that earlier versions kept, and [(session, its runs)]; raise
    NewerFile and DamagedFile."""
    try:
        document = json.loads(path.read_bytes())
        if document['version'] > JSON_VERSION:
            raise NewerFile
        return ([record_of(Workspace, {RENAMED.get(key, key): value for key, value in item.items()})
                 for item in document['workspaces']],
                [(record_of(Session, {key: value for key, value in item.items() if key != 'runs'}),
                  [record_of(Run, run) for run in item['runs']]) for item in document.get('sessions', ())])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedFile(str(error)) from error
