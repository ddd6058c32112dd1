"""The WSGI server: the port, the lock of the instance, and the end in order."""
import fcntl
import logging
import signal
from pathlib import Path

import gevent
import gevent.event
import gevent.pool

from _agentbackend.errors import ConfigError, InstanceTaken, ValidationError
from _agentbackend.views import encode, view_error
from _agentbackend.wire import Handler, WSGIServer

MAX_CONNECTIONS = 5000


class Server:
    """The backend behind a port."""

    def __init__(self, backend, app):
        self.backend = backend
        config = backend.config

        class Connection(Handler):
            request_timeout = config.request_timeout
            may_upgrade = staticmethod(app.may_upgrade)

            @staticmethod
            def refusal(status, text):
                return encode(view_error(ValidationError(text)))

        self._server = WSGIServer((config.host, config.port), app, handler_class=Connection,
                                  spawn=gevent.pool.Pool(MAX_CONNECTIONS),
                                  log=None, error_log=logging.getLogger('agentbackend.http'))
        self._stopping = gevent.event.Event()
        self._lock_file = None

    def open(self):
        """Take the instance's lock and the port, and begin; raise ConfigError when another has one of
        them."""
        self._lock_instance()
        config = self.backend.config
        try:
            self._server.init_socket()
        except OSError as error:
            raise ConfigError(f'PORT={config.port}: the server cannot listen on HOST={config.host}: '
                              f'{error.strerror}.') from error
        try:
            self.backend.load()
            self._server.start()
            self.backend.open()
        except OSError as error:
            raise ConfigError(f'STATE_DIR={config.state_dir!r} cannot be used: {error.strerror}.') from error
        except InstanceTaken as error:
            raise ConfigError(str(error)) from error
        return self

    @property
    def port(self):
        """The port that it listens on, which PORT=0 leaves to the system."""
        return self._server.server_port

    def wait(self):
        """Serve until SIGTERM or SIGINT comes."""
        for number in (signal.SIGTERM, signal.SIGINT):
            gevent.signal_handler(number, self._stopping.set)
        self._stopping.wait()

    def close(self):
        """Take no more calls, let those that go on end, and put everything away."""
        self._server.close()
        self.backend.streams.close()
        self.backend.execs.close()
        self._server.stop(timeout=8)
        self.backend.close()
        if self._lock_file:
            self._lock_file.close()

    def _lock_instance(self):
        """Two servers of one instance would remove each other's half-made workspaces."""
        path = Path(self.backend.config.state_dir) / f'{self.backend.config.instance}.lock'
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock_file = open(path, 'a')
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f'INSTANCE={self.backend.config.instance!r}: another server of that name runs '
                              'on this STATE_DIR; '
                              'stop it, or choose another INSTANCE and PORT.') from error
        except OSError as error:
            raise ConfigError(f'STATE_DIR={self.backend.config.state_dir!r} cannot be used: '
                              f'{error.strerror}.') from error
