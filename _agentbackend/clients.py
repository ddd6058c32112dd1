"""Who listens: SSE and WebSocket clients."""
import contextlib
import logging
import time

import gevent
import gevent.event

from _agentbackend.errors import BackendError, TooMany, Unauthorized, WorkspaceNotFound, internal_error
from _agentbackend.events import EVERYTHING, Event, Subscription
from _agentbackend.feeds import DEFAULT_TAIL, HEARTBEAT, CatchUp, dropped_event, is_end, status_event
from _agentbackend.gate import WRONG_TOKEN, same_secret
from _agentbackend.positions import Cursor
from _agentbackend.schemas import parse_json
from _agentbackend.timing import Turn
from _agentbackend.views import RETRY, view_frame, view_sse
from _agentbackend.wire import GOING_AWAY, POLICY, WebSocketError

log = logging.getLogger('agentbackend')

PING_PAUSE = 20  # seconds without a word from a WebSocket client until it is asked for a sign of life
MAX_SUBSCRIPTIONS = 100  # of one WebSocket
MAX_STRANGERS = 100  # WebSockets that have yet to show the token
AUTH_TIMEOUT = 10  # seconds they have for that
CHECK_PAUSE = 3  # seconds
BATCH = 200  # events
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


def counted(streams, parts):
    """Yield the parts of an answer that may be long, and count it among the streams meanwhile."""
    with streams.opened(Subscription()):
        yield from parts


def sse_stream(batches):
    """Yield the text of an SSE stream; a heartbeat when nothing comes for a while, since only a write finds
    some of the dead."""
    # A proxy may wait for the first bytes. `retry` stands with the first event: alone, some clients make one
    # of it.
    yield b': events\n\n'
    written, turn, retry = time.monotonic(), Turn(), b'retry: %d\n' % RETRY
    for batch in batches:
        for start in range(0, len(batch), BATCH):
            yield retry + b''.join(map(view_sse, batch[start:start + BATCH]))
            retry = b''
            turn.pass_on()
        if batch:
            written = time.monotonic()
        elif time.monotonic() - written >= HEARTBEAT - 1:
            yield b': still here\n\n'
            written = time.monotonic()


def text_stream(batches):
    """Yield the lines of a log as plain text."""
    for batch in batches:
        text = ''.join(f"workspace: {event.data['phase']}: {event.data['message']}\n"
                       if event.type == 'progress'
                       else f"{event.data['message']}\n" for event in batch
                       if event.type == 'log' or 'phase' in event.data)
        if text:
            yield text.encode('utf-8', 'replace')


class WebSocketClient:
    """One client of /agent/ws: its greenlet reads, and another one writes as long as there is something to
    write."""

    def __init__(self, backend, socket, trusted):
        self._backend = backend
        self._socket = socket
        self._trusted = trusted
        self._came_at = time.monotonic()
        self._outbox = Subscription(on_put=self._wake)
        self._room = gevent.event.Event()
        self._feeds = {}  # topic -> (pump, greenlet that catches up), each of them or None
        self._writer = None
        self._ping_is_due = False
        self._place = ''

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
                for topic in list(self._feeds):
                    self._unsubscribe(topic)
                if self._writer is not None:
                    self._writer.kill(block=False)
                self._socket.close()

    def close(self):
        """Tell the client that the server goes away."""
        self._socket.close(GOING_AWAY, 'the server is stopping')

    def check(self):
        """Drop a client that has not been heard of for long, or shows no token; ask one that is silent for a
        sign of life."""
        if not self._trusted and time.monotonic() - self._came_at > AUTH_TIMEOUT:
            gevent.spawn(self._socket.close, POLICY, f'no token came within {AUTH_TIMEOUT} s')
        silent = time.monotonic() - self._socket.last_heard
        if silent > 3 * PING_PAUSE:
            self._socket.abort()
        elif silent > PING_PAUSE:
            self._ping_is_due = True
            self._wake()

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
        self._say('error', about, {'code': error.code, 'message': str(error)}
                  | ({'details': error.details} if error.details else {}))
        if isinstance(error, Unauthorized):
            self._flush()
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
            self._unsubscribe(self._topic(message['workspaceId']))

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
            self._feeds[topic] = None, gevent.spawn(self._feed_everything)
        else:
            pump = self._backend.logs.watch(topic)
            tail = message.get('tail', DEFAULT_TAIL)
            self._feeds[topic] = pump, gevent.spawn(self._feed, topic, pump, cursor, tail)

    def _unsubscribe(self, topic):
        pump, greenlet = self._feeds.pop(topic, (None, None))
        if greenlet is not None:
            greenlet.kill()
        self._backend.events.detach(topic, self._outbox)
        if pump is not None:
            self._backend.logs.unwatch(pump)

    def _feed(self, workspace_id, pump, cursor, tail):
        try:
            for batch in CatchUp(self._backend, workspace_id, self._outbox, pump, cursor=cursor,
                                 tail=tail).batches():
                self._offer(batch)
            self._feeds[workspace_id] = pump, None  # a greenlet that is done is not worth its memory
        except BackendError as error:
            self._say('error', workspace_id, {'code': error.code, 'message': str(error)})

    def _feed_everything(self):
        """Tell the status of each workspace; what it was before `after` is of no use."""
        events = self._backend.events
        events.attach(EVERYTHING, self._outbox)
        place = events.place(EVERYTHING)
        for workspace in self._backend.state.all():
            self._wait_for_room()
            # Deleted meanwhile; what changed meanwhile has been told already.
            with contextlib.suppress(WorkspaceNotFound):
                self._outbox.put(status_event(self._backend.state.get(workspace.id), place))

    def _offer(self, batch):
        """Put old events into the outbox when there is room: unlike the live ones, they can wait."""
        for event in batch:
            self._wait_for_room()
            self._outbox.put(event)

    def _wait_for_room(self):
        while not self._outbox.has_room:
            self._room.clear()
            self._room.wait(1)

    def _say(self, kind, workspace_id, data):
        self._outbox.put(Event(kind, workspace_id, '', time.time(), data))

    # What the client is sent

    def _wake(self):
        if self._writer is None:
            self._writer = gevent.spawn(self._write)

    def _write(self):
        """Write what waits, all of it at once, until nothing comes for a second."""
        try:
            while not self._socket.closed:
                if self._ping_is_due:
                    self._ping_is_due = False
                    self._socket.ping()
                lost, events = self._outbox.take(1)
                if not events and not len(self._outbox) and not self._ping_is_due:
                    return
                self._send(lost, events)
        except WebSocketError as error:
            log.debug('A WebSocket client is gone: %s', error)
        finally:
            self._writer = None

    def _send(self, lost, events):
        frames = [view_frame(dropped_event(None, lost, self._place))] if lost else []
        frames += map(view_frame, events)
        self._room.set()
        if frames:
            self._socket.send_encoded(b''.join(frames))
        self._place = next((event.id for event in reversed(events) if event.id), self._place)
        for event in events:
            if is_end([event]):
                self._unsubscribe(event.workspace_id)

    def _flush(self):
        with contextlib.suppress(WebSocketError):
            self._send(*self._outbox.drain())
