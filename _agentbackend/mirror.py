"""What keeps the file of the state in step with its records: it notes what changes, writes it, and tells when
that failed."""
import logging
import threading
import time
from pathlib import Path

import gevent
import gevent.event

from _agentbackend.errors import ConfigError, StateNotWritten
from _agentbackend.store import DamagedFile, NewerFile, Store, read_json

log = logging.getLogger('agentbackend')

RETRY_PAUSE = 1  # seconds until a write that failed is tried again


class Mirror:
    """Records in memory that a Store holds too.

    A subclass has `_load(content)`, which takes what the Store had, or raises ValueError; `_take_over(...)`,
    which takes what `read_json` returns; `_values(kind, key)`, which returns the columns of a record's row,
    None when there is none any more; and `_settle()`, called under the lock when a write is done.
    """

    def __init__(self, path):
        self.path = Path(path) if path else None
        self.store = None  # while the file is open
        self.failure = ''  # why the last write failed
        # Protects the records, _dirty and _version. Nothing that can block is done under it: no file, no
        # engine, no event.
        self._lock = threading.RLock()
        self._dirty = {}  # (kind, *key) -> whether the record is to be dropped; in the order of the changes
        self._version = self._saved = 0
        self._changed = gevent.event.Event()
        self._written = gevent.event.Event()  # set and replaced after each attempt
        self._writer = None

    @property
    def opened(self):
        """Whether the file was read, and is being written."""
        return self._writer is not None

    def open(self):
        """Read the file and begin to mirror to it. A damaged file is put aside, and the engine's labels tell
        the rest.

        Raises ConfigError for a file of a newer version, which is left as it is, and OSError for a folder
        that cannot be used.
        """
        if not self.path:
            return
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.store, old = Store(self.path), self.path.with_suffix('.json')
        if not self._taken(self.path, self._load_all, self.store.set_aside):
            self._load_all()
        if old.is_file() and self._taken(old, lambda: self._take_over(*read_json(old)),
                                        lambda: old.rename(f'{old}.damaged-{int(time.time())}')):
            self._write(must=True)
            old.rename(f'{old}.taken-over')
        self._writer = gevent.spawn(self._write_for_ever)

    def close(self):
        """Write what is not yet written, and stop."""
        if self._writer is None:
            return
        while self._saved < self._version and self.try_flush():
            pass  # the write at work in its thread must not meet another one
        self._writer.kill()
        self._writer = None
        self._write()
        self._wake()
        self.store.close()

    def flush(self):
        """Wait until the file holds everything up to now; raise StateNotWritten when that fails."""
        if not self.try_flush():
            raise StateNotWritten(f'The change could not be written to {self.path} ({self.failure}). It is '
                                  'tried again each second, and '
                                  'lost if the server ends before that: make room, or see to the disk.',
                                  headers={'Retry-After': '5'})

    def try_flush(self):
        """Wait until the file holds everything up to now; return False when the attempt failed."""
        target = self._version
        while self._writer and self._saved < target:
            self._written.wait()
            if self.failure and self._saved < target:
                return False
        return True

    # How the file is read

    def _load_all(self):
        self._load(self.store.open())

    @staticmethod
    def _taken(path, take, set_aside):
        """Return whether a file could be read; one that is damaged is put aside."""
        try:
            take()
        except NewerFile as error:
            raise ConfigError(f'The state file {path} was written by a newer version of Agent Backend, and '
                              'is left as it is: run that version, or name another STATE_DIR.') from error
        except (DamagedFile, ValueError, TypeError, KeyError) as error:
            log.error('The state file %s is damaged (%s); it is kept as %s, and what the engine knows is '
                      'adopted.', path, error, set_aside())
            return False
        return True

    # How it is written

    def _take_back(self, session_ids):
        """Note no more that sessions and their runs have changed: they are no more."""
        self._dirty = {other: value for other, value in self._dirty.items()
                       if other[0] not in ('session', 'run') or other[1] not in session_ids}

    def _touch(self, kind, *key, drop=False):
        """Note a change of a record, or its end; that of a session takes its runs along."""
        self._dirty.pop((kind, *key), None)
        self._dirty[(kind, *key)] = drop
        self._version += 1
        self._changed.set()

    def _write_for_ever(self):
        while True:
            self._changed.wait()
            try:
                self._write()
            except Exception as error:  # whatever it is, what comes later is to be written
                self._tell_failure(repr(error))
                log.exception('Writing the state failed; trying again.')
                self._changed.set()
            self._wake()
            if self.failure:
                gevent.sleep(RETRY_PAUSE)

    def _wake(self):
        done, self._written = self._written, gevent.event.Event()
        done.set()

    def _write(self, must=False):
        """Write what has changed since the last time, a row per record; what fails is put back."""
        self._changed.clear()
        with self._lock:
            version, dirty, self._dirty = self._version, self._dirty, {}
        try:
            with self._lock:
                rows, refused = self._rows({**dirty, ('meta', 'clock'): False})
            # A disk may take its time; in a thread, other greenlets go on meanwhile.
            self.store.write(rows)
        except Exception as error:
            if must:
                raise OSError(0, str(error)) from error
            self._tell_failure(str(error) or type(error).__name__)
            with self._lock:
                newer, self._dirty = self._dirty, dirty
                self._take_back({key[1] for key, drop in newer.items() if key[0] == 'session' and drop})
                for (kind, *key), drop in newer.items():
                    self._touch(kind, *key, drop=drop)
                self._changed.set()
            return
        if self.failure and not refused:
            log.warning('The state file %s can be written again.', self.path)
        self.failure, self._saved = refused, version
        with self._lock:
            self._settle()

    def _tell_failure(self, failure):
        if failure != self.failure:
            log.error('The state file %s could not be written (%s); it is tried again each second.',
                      self.path, failure)
        self.failure = failure

    def _rows(self, dirty):
        """Return (rows for the store, '' or why some are left out): one record that can't be written keeps no
        other from the file."""
        rows, refused = [], ''
        for (kind, *key), drop in dirty.items():
            try:
                values = None if drop else self._values(kind, key)
            except Exception as error:
                refused = f'{kind} {key[0]}: {error!r}'
                self._dirty[(kind, *key)] = drop  # it is tried again with what comes next
                log.exception('The record of %s %s can not be written.', kind, key)
                continue
            rows.append((kind, tuple(key), values))
        return rows, refused
