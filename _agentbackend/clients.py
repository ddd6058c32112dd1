"""Who listens: SSE and WebSocket clients."""
import collections
import contextlib
import itertools
import logging
import time

import gevent
import gevent.event

from _agentbackend.errors import BackendError, TooMany, Unauthorized, internal_error
from _agentbackend.events import EVERYTHING, Batch, Event, plain
from _agentbackend.feeds import DEFAULT_TAIL, HEARTBEAT, EverythingFeed, WorkspaceFeed, cursor_since, opened
from _agentbackend.gate import WRONG_TOKEN, same_secret
from _agentbackend.positions import Cursor, LogPosition
from _agentbackend.schemas import parse_json
from _agentbackend.talks import Listener
from _agentbackend.timing import Turn, with_pauses
from _agentbackend.views import SSE_RETRY, encode, view_failure
from _agentbackend.wire import POLICY, WebSocketError

log = logging.getLogger('agentbackend')

MAX_SUBSCRIPTIONS = 100  # of one WebSocket
MAX_STRANGERS = 100  # WebSockets that have yet to show the token
AUTH_TIMEOUT = 10  # seconds they have for that
CHECK_PAUSE = 3  # seconds
LEAVING_PAUSE = 1  # seconds after which it is noticed at the latest that a client has left
SSE_HEADERS = {'Content-Type': 'text/event-stream; charset=utf-8', 'Cache-Control': 'no-cache',
               'X-Accel-Buffering': 'no'}


class Streams:
    """The streams that are open, so that there are not too many, and they end properly with the server."""

    def __init__(self, limit):
        self._limit = limit
        self._open = set()
        # Those who have yet to show the token: however many they are, they take no place of others.
        self._strangers = {}
        self._pinger = None

    def admit(self, *, trusted=True):
        """Raise TooMany when no further stream is taken; strangers get in, at the cost of the stranger who
        came first."""
        if trusted and len(self._open) >= self._limit:
            raise TooMany(f'MAX_STREAMS={self._limit} streams are already open; close one or retry later.',
                          headers={'Retry-After': '10'})

    @contextlib.contextmanager
    def opened(self, stream, *, trusted=True):
        """Count a stream, anything with `close()` and maybe `check()`, for the length of a block."""
        if trusted:
            self._open.add(stream)
        else:
            self._strangers[stream] = True
            if len(self._strangers) > MAX_STRANGERS:
                gevent.spawn(next(iter(self._strangers)).close)
        if self._pinger is None:
            self._pinger = gevent.spawn(self._check_for_ever)
        try:
            yield stream
        finally:
            self._open.discard(stream)
            self._strangers.pop(stream, None)

    def trust(self, stream):
        """Count a stream among the others from now on; raise TooMany when there is no place."""
        if stream in self._strangers:
            self.admit()
            del self._strangers[stream]
            self._open.add(stream)

    def close(self):
        """End all streams."""
        if self._pinger is not None:
            self._pinger.kill()
            self._pinger = None
        gevent.joinall([gevent.spawn(stream.close) for stream in self._all()], timeout=5)

    def _all(self):
        return [*self._open, *self._strangers]

    def _check_for_ever(self):
        while True:
            gevent.sleep(CHECK_PAUSE)
            for stream in self._all():
                getattr(stream, 'check', lambda: None)()


class Leaving:
    """Notes that a client has left, so that the parts of its answer end, which may be long in coming."""

    def __init__(self):
        self._left = False

    def cut(self):
        """Take note that it has left."""
        self._left = True

    def close(self):
        """Do nothing: the parts put away what they need."""

    def parts(self, items):
        """Yield the parts of its answer while it is there."""
        for item in with_pauses(items, LEAVING_PAUSE):
            if self._left:
                return
            if item is not None:
                yield item


class Closing:
    """The parts of an answer that stand for something at work: when the client leaves it is cut off, and
    when the answer ends it is closed, also one that never began."""

    def __init__(self, parts, work, watch_disconnect):
        self._parts = parts
        self._work = work
        self._watcher = watch_disconnect(work.cut)

    def __iter__(self):
        return self._parts

    def close(self):
        """Put all of it away."""
        self._watcher.close()
        self._work.close()
        getattr(self._parts, 'close', lambda: None)()


def sse_stream(opened):
    """Yield the text of an SSE stream from an opened Feed; a heartbeat when nothing comes for a while, since
    only a write finds some of the dead."""
    # A proxy may wait for the first bytes. `retry` stands with the first event: alone, some clients make one
    # of it.
    yield b': events\n\n'
    written, turn, retry = time.monotonic(), Turn(), b'retry: %d\n' % SSE_RETRY
    with opened as feed:
        for batches in feed.batches():
            if batches:
                yield retry + b''.join([batch.sse for batch in batches])
                written, retry = time.monotonic(), b''
                turn.pass_on()
                if any(batch.is_end for batch in batches):
                    return
            elif time.monotonic() - written >= HEARTBEAT - 1:
                yield b': still here\n\n'
                written = time.monotonic()


def event_stream(events):
    """Yield objects that are no events of a workspace as SSE text; None is a sign of life."""
    yield b': events\n\n'
    for event in events:
        yield b': still here\n\n' if event is None else b'data: %s\n\n' % encode(event)[:-1]


def log_stream(backend, workspace, call):
    """Return the plain text of a workspace's log as a routing.Call asks for it, in parts; admits it among the
    streams."""
    cursor, tail = cursor_since(backend, workspace, call), call.query.get('tail')
    backend.streams.admit()
    if call.query.get('follow'):
        tail = 10_000_000 if tail is None else tail
        return text_stream(opened(backend, lambda: WorkspaceFeed(backend, workspace.id, cursor=cursor,
                                                                 tail=tail), call.watch_disconnect))
    position = cursor.log if cursor else None
    lines = backend.logs.read(workspace.id, position=position, tail=tail)
    # What is wrong can still be told before the first lines have come.
    return log_text(backend, itertools.chain([next(lines, [])], lines), position or LogPosition())


def log_text(backend, parts, position):
    """Yield lists of lines of a log, as far as they come behind a position, as plain text."""
    with backend.streams.opened(Leaving()):
        for lines in parts:
            yield plain(backend.events.redact_lines(position.advance(lines))).encode('utf-8', 'replace')


def text_stream(opened):
    """Yield the lines of a workspace's log as plain text, from an opened Feed."""
    with opened as feed:
        for batches in feed.batches():
            yield ''.join([batch.text for batch in batches]).encode('utf-8', 'replace')
            if any(batch.is_end for batch in batches):
                return


class WebSocketClient(Listener):
    """One client of /agent/ws: its greenlet reads, and another one writes as long as there is something to
    write."""

    def __init__(self, backend, socket, trusted):
        super().__init__(backend, socket)
        self._trusted = trusted
        self._came_at = time.monotonic()
        self._feeds = {}  # topic -> Feed
        self._catching_up = set()  # of those that are behind
        self._held = collections.defaultdict(list)  # feed that catches up -> what was held for it
        self._writer = None
        self._due = gevent.event.Event()

    def run(self):
        """Serve the client until it leaves."""
        with self._backend.streams.opened(self, trusted=self._trusted):
            try:
                while True:
                    text = self._socket.receive()
                    if text is None:
                        break
                    self._handle(text)
            finally:
                for name in list(self._feeds):
                    self._unsubscribe(name)
                if self._writer is not None:
                    self._writer.kill(block=False)
                self._socket.close()

    def check(self):
        """Drop also a client that shows no token."""
        if not self._trusted and time.monotonic() - self._came_at > AUTH_TIMEOUT:
            gevent.spawn(self._socket.close, POLICY, f'no token came within {AUTH_TIMEOUT} s')
        super().check()

    # What the client says

    def _handle(self, text):
        message = {}
        try:
            message = parse_json(text.encode() if isinstance(text, str) else bytes(text))
            self._backend.schemas.check('websocket-message', message, where='message')
            self._obey(message)
        except BackendError as error:
            self._refuse(message, error)
        except Exception as error:
            self._refuse(message, internal_error(error))

    def _refuse(self, message, error):
        """Say what was wrong; the connection stays, but for a client that is not allowed here."""
        about = message.get('workspaceId') if isinstance(message, dict) else None
        about = about if isinstance(about, str) and len(about) <= 100 else None
        self._say('error', about, view_failure(error))
        if isinstance(error, Unauthorized):
            self._socket.close(POLICY, 'unauthorized')

    def _obey(self, message):
        kind = message['type']
        if kind == 'auth':
            self._trusted = self._trusted or same_secret(message['token'], self._backend.config.api_token)
            if self._trusted:
                self._backend.streams.trust(self)
        if not self._trusted:
            raise Unauthorized(WRONG_TOKEN if kind == 'auth' else 'This server needs its API token: send '
                               '{"type": "auth", "token": "<API_TOKEN>"} first.')
        if kind == 'ping':
            self._say('pong', None, {})
        elif kind == 'subscribe':
            self._subscribe(message)
        elif kind == 'unsubscribe':
            topic = self._topic(message['workspaceId'])
            held = self._held.pop(self._feeds.get(topic), [])
            self._unsubscribe(topic)
            with contextlib.suppress(WebSocketError):
                self._send(held)

    def _topic(self, name):
        return EVERYTHING if name == EVERYTHING else self._backend.state.get(name).id

    def _subscribe(self, message):
        cursor = Cursor.parse(message['after']) if 'after' in message else None
        topic = self._topic(message['workspaceId'])
        self._unsubscribe(topic)
        if len(self._feeds) >= MAX_SUBSCRIPTIONS:
            raise TooMany(f'This connection has {MAX_SUBSCRIPTIONS} subscriptions already; unsubscribe from '
                          'one, or open another.')
        if topic == EVERYTHING:
            self._feeds[topic] = EverythingFeed(self._backend, self._wake)
        else:
            self._feeds[topic] = WorkspaceFeed(self._backend, topic, cursor=cursor, on_wake=self._wake,
                                               tail=message.get('tail', DEFAULT_TAIL))
        self._catch_up(self._feeds[topic])

    def _unsubscribe(self, name):
        feed = self._feeds.pop(name, None)
        if feed is not None:
            feed.release()

    # What the client is sent

    def _say(self, kind, workspace_id, data):
        with contextlib.suppress(WebSocketError):
            self._send([Batch(Event(kind, workspace_id, '', time.time(), data))])

    def _wake(self):
        self._due.set()
        if self._writer is None:
            self._writer = gevent.spawn(self._write)

    def _write(self):
        """Write what waits, all of it at once, until nothing comes for a second."""
        try:
            while not self._socket.closed:
                self._due.clear()
                for feed in [feed for feed in self._feeds.values() if feed not in self._catching_up]:
                    batches = feed.take()
                    self._send(self._untold(batches) if feed.name == EVERYTHING else batches)
                    if feed.behind:
                        self._catch_up(feed)
                # It may have been set in the moment in which the time was over.
                if not self._due.wait(1) and not self._due.is_set():
                    return
        except WebSocketError as error:
            log.debug('A WebSocket client is gone: %s', error)
        finally:
            self._writer = None

    def _untold(self, batches):
        """Return those statuses of all workspaces that are not told by the feed of one that is followed: a
        status comes once. While that feed catches up they are held, since it may end before."""
        untold = []
        for batch in batches:
            feed = self._feeds.get(batch.workspace_id)
            if feed is None:
                untold.append(batch)
            elif feed in self._catching_up:
                self._held[feed].append(batch)
        return untold

    def _catch_up(self, feed):
        """Let a greenlet send what a feed has missed; one that is in the ring is not worth the memory."""
        self._catching_up.add(feed)
        gevent.spawn(self._send_missed, feed)

    def _send_missed(self, feed):
        try:
            for batch in feed.catch_up():
                if feed.closed:
                    return
                if batch is not None:
                    self._send([batch])
        except WebSocketError as error:
            log.debug('A WebSocket client is gone: %s', error)
        except BackendError as error:
            self._say('error', feed.name, view_failure(error))
        finally:
            self._catching_up.discard(feed)
            self._held.pop(feed, None)
        self._wake()

    def _send(self, batches):
        if batches:
            self._socket.send_encoded(b''.join([batch.frames for batch in batches]))
        for batch in batches:
            if batch.is_end:
                self._unsubscribe(batch.workspace_id)
