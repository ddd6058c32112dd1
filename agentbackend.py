"""Agent Backend: development workspaces on your own Docker engine, behind a REST API.

This module is the door: the table of routes and their handlers, the composition, the server and the command
line. The parts stand in the package `_agentbackend`, in layers. Each file knows only those below it:

    clients      who listens: SSE and WebSocket clients
    feeds        what a reader of a workspace or a session is given: what was missed, then what comes
    tasks        tasks that agents do in workspaces: begun, followed, watched, ended
    runs         commands that outlive everybody, each with a folder in the volume
    gate         what comes before the routes: who may call, from where, and with how large a body
    keeper       what keeps records, engine and clock in step: follow, adopt, compare, sweep
    workspaces   the life of workspaces: create, start, stop, restart, change, remove
    recipe       what a workspace's container is made of: its files, environment, limits and mounts
    drafts       bodies of the API as records of workspaces, and the names of the secrets in them
    probes       readiness, last words and usage of workspaces
    claim        the claim of one server to an instance on an engine
    logs         what containers print, followed once for all who read it
    events       what happened, in a ring of batches per topic, in which readers are positions
    pages        the OpenAPI document, the dashboard and the reference
    views        records as the objects of the API, events as they go over the wire
    images       templates, and the images built from them
    engine       containers, volumes and networks on a Docker engine
    dockerclient docker-py, its errors in our words
    state        workspaces and sessions in one locked dict each, mirrored to a file
    records      what is known of a workspace, a run and a session
    store        that file: SQLite, a row per record, in a thread of its own
    config       the settings, read once from the environment
    schemas      JSON Schema files and the errors they find
    positions    every id of an event: where a reader is
    wire         WebSockets with real close codes and limits, and pywsgi with the time limits that it lacks
    agents       each agent's command line, environment and translator
    translators  what agents print, made into events
    sshkeys      keys of OpenSSH as people paste them
    giturls      addresses of repositories, and the secrets in them
    dockerlog    the format of the engine's logs
    timing       turns among greenlets, time limits, and how times are read and written
    errors       what can go wrong, each with its HTTP status and code

What a body may hold (fields, limits, texts) stands in `schemas/`, what runs inside a workspace in
`templates/base/`, the version in `_agentbackend/__init__.py`.

Routes      the table of routes and their handlers
Server      the composition, the WSGI server, the command line
"""
from gevent import monkey; monkey.patch_all()  # noqa: E702, I001 - before others are imported

import collections
import contextlib
import fcntl
import io
import itertools
import json
import logging
import os
import re
import resource
import signal
import sys
import time
import urllib.parse
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import bottle
import gevent
import gevent.event
import gevent.pool

from _agentbackend import VERSION
from _agentbackend.claim import Claim
from _agentbackend.clients import SSE_HEADERS, Streams, WebSocketClient, counted, sse_stream, text_stream
from _agentbackend.config import Config, parse_size
from _agentbackend.dockerclient import DockerClient
from _agentbackend.engine import Engine
from _agentbackend.errors import (
    BackendError,
    ConfigError,
    DockerError,
    EngineUnavailable,
    InstanceTaken,
    MethodNotAllowed,
    NotFound,
    PortExhausted,
    SessionBusy,
    SessionNotFound,
    TooMany,
    UnsupportedMediaType,
    UpgradeRequired,
    ValidationError,
    WorkspaceAlreadyExists,
    WorkspaceNotFound,
    WorkspaceNotRunning,
    internal_error,
    quoted,
    refusal,
)
from _agentbackend.events import Events, Steps, plain
from _agentbackend.feeds import DEFAULT_TAIL, SessionFeed, WorkspaceFeed, opened
from _agentbackend.gate import TICKET_LIFE, Gate, Tickets, split_host
from _agentbackend.images import BASE, Templates
from _agentbackend.keeper import Keeper
from _agentbackend.logs import Logs
from _agentbackend.pages import EVENT_STREAM, JSON_TYPE, PLAIN_TEXT, Pages, openapi_document
from _agentbackend.positions import BEGINNING, LAST_LINE, Cursor, LogPosition, event_id_of, place_of
from _agentbackend.probes import Probes
from _agentbackend.records import RUNNING, STATUSES
from _agentbackend.schemas import Schemas, parse_json
from _agentbackend.state import State
from _agentbackend.tasks import Tasks
from _agentbackend.views import (
    encode,
    view_error,
    view_image,
    view_session,
    view_session_details,
    view_usage,
    view_workspace,
    view_workspace_details,
)
from _agentbackend.wire import DisconnectWatcher, Handler, WSGIServer
from _agentbackend.workspaces import Workspaces

HERE = Path(__file__).resolve().parent
DATA = HERE if (HERE / 'schemas').is_dir() else HERE / 'agentbackend_data'
log = logging.getLogger('agentbackend')


# ---------------------------------------------------------------------------------------------
# Routes
# ---------------------------------------------------------------------------------------------

DELETE_TIMEOUT = 30  # seconds that DELETE waits for the end before it answers 202


@dataclass(frozen=True)
class Call:
    """What a handler is given: the parts of the path, the checked query and body, and whether a token was
    shown if one is needed.

    `last_event_id` is where a stream is to go on, `watch_disconnect(callback)` watches for the client to
    leave, `websocket` is the connection of a WebSocket client, `host` the name by which it calls us.
    """

    path: dict
    query: dict
    body: object
    trusted: bool
    last_event_id: str
    watch_disconnect: object = None
    websocket: object = None
    accept: str = ''
    if_none_match: str = ''
    host: str = ''


@dataclass(frozen=True)
class Reply:
    """What a handler returns. A `stream` yields bytes, and is sent in the place of the data."""

    data: object = None
    status: int = 200
    headers: dict = field(default_factory=dict)
    stream: object = None


@dataclass(frozen=True)
class Route:
    """One line of the API. `body` and `query` name schemas; an `open` route needs no token; a `bare` one
    answers without the envelope.

    The rest is for the OpenAPI document: under which `tag` it stands, if it does; its `answers`, from status
    to the schema of the data, to a media type, or to None; and the `errors` and `headers` that it has beside
    those of all routes.
    """

    method: str
    path: str
    handler: object
    body: str = None
    query: str = 'no-query'
    open: bool = False
    bare: bool = False
    tag: str = None
    answers: dict = field(default_factory=dict)
    errors: tuple = ()
    headers: tuple = ()

    @property
    def websocket(self):
        """Whether it answers by turning the connection into a WebSocket."""
        return 101 in self.answers

    @property
    def takes_tickets(self):
        """Whether it is a stream, which a browser can't ask for with a token."""
        return bool({EVENT_STREAM, PLAIN_TEXT} & set(self.answers.values()))


def list_workspaces(backend, call):
    """List workspaces, oldest first."""
    found = backend.state.all()
    for key in ('type', 'status'):
        if key in call.query:
            found = [item for item in found if getattr(item, key) in call.query[key]]
    for label in call.query.get('label', ()):
        name, given, value = label.partition('=')
        found = [item for item in found if name in item.labels and (not given or item.labels[name] == value)]
    return Reply([view_workspace(item) for item in found])


def create_workspace(backend, call):
    """Create a workspace. It answers at once with status `creating`; what goes on is told by its events."""
    workspace = backend.workspaces.create(call.body)
    return Reply(view_workspace(workspace), 201, {'Location': f'/api/workspaces/{workspace.id}'})


def get_workspace(backend, call):
    """Get a workspace by its id or name."""
    return show_workspace(backend, call, backend.state.get(call.path['id']))


def update_workspace(backend, call):
    """Change a workspace. Ports change at its next start, as `pending` says; all else at once."""
    return show_workspace(backend, call, backend.workspaces.change(call.path['id'], call.body))


def delete_workspace(backend, call):
    """Delete a workspace with its container and all its data."""
    workspace, gone = backend.workspaces.remove(call.path['id'], wait=DELETE_TIMEOUT)
    return Reply({'id': workspace.id, 'name': workspace.name, 'status': workspace.status, 'deleted': gone},
                 200 if gone else 202)


def start_workspace(backend, call):
    """Start a stopped workspace."""
    return Reply(view_workspace(backend.workspaces.start(call.path['id'])), 202)


def retry_workspace(backend, call):
    """Try again to make a workspace whose first start failed. It may come from another repository now."""
    return Reply(view_workspace(backend.workspaces.retry(call.path['id'], call.body)), 202)


def stop_workspace(backend, call):
    """Stop a workspace. A temporary one is deleted by that."""
    return Reply(view_workspace(backend.workspaces.stop(call.path['id'])), 202)


def restart_workspace(backend, call):
    """Stop a running workspace and start it again."""
    return Reply(view_workspace(backend.workspaces.restart(call.path['id'])), 202)


def follow_workspace(backend, call):
    """Stream the events of a workspace as SSE: its status at once, the last lines of its log, and then what
    comes."""
    workspace = backend.state.get(call.path['id'])
    backend.streams.admit()
    cursor, tail = call_cursor(call), call.query.get('tail', DEFAULT_TAIL)
    return follow(backend, call, lambda: WorkspaceFeed(backend, workspace.id, cursor=cursor, tail=tail))


def read_log(backend, call):
    """Get the log of a workspace as plain text: the last `tail` lines or those from `since` on; with `follow`
    also what comes."""
    workspace = backend.state.get(call.path['id'])
    position = LogPosition.at(parse_since(call.query['since'])) if 'since' in call.query else None
    tail = call.query.get('tail')
    backend.streams.admit()
    if call.query.get('follow'):
        cursor = None
        if position:
            cursor = backend.events.topic(workspace.id).cursor.copy()
            cursor.log = position
        tail = 10_000_000 if tail is None else tail
        stream = text_stream(opened(backend, lambda: WorkspaceFeed(backend, workspace.id, cursor=cursor,
                                                                   tail=tail), call.watch_disconnect))
    else:
        lines = backend.logs.read(workspace.id, position=position, tail=tail)
        stream = log_text(backend, itertools.chain([next(lines, [])], lines), position or LogPosition())
    return Reply(stream=stream, headers=SSE_HEADERS | {'Content-Type': 'text/plain; charset=utf-8'})


def log_text(backend, parts, position):
    """Yield lists of lines of a log, as far as they come behind a position, as plain text."""
    with counted(backend.streams):
        for lines in parts:
            yield plain(backend.events.redact_lines(position.advance(lines))).encode('utf-8', 'replace')


def follow(backend, call, feed, headers=()):
    """Return the reply that streams as SSE what the Feed that `feed()` makes has."""
    return Reply(stream=sse_stream(opened(backend, feed, call.watch_disconnect)),
                 headers=SSE_HEADERS | dict(headers))


def execute_task(backend, call):
    """Give an agent a task. What it does is streamed as SSE to its end, and goes on when the stream is left.

    With `Accept: application/json` it answers 202 with the ids at once.
    """
    if 'application/json' not in call.accept:
        backend.streams.admit()
    session, run = backend.tasks.execute(call.body)
    headers = {'X-Session-Id': session.id, 'X-Run-Id': run.id,
               'Location': f'/api/agent/sessions/{session.id}'}
    if 'application/json' in call.accept:
        return Reply({'sessionId': session.id, 'runId': run.id, 'workspaceId': session.workspace_id,
                      'agent': session.agent}, 202, headers)
    after = (run.number - 1, LAST_LINE, 0)
    return follow(backend, call, lambda: SessionFeed(backend, session.id, after=after, task=(session, run)),
                  headers)


def follow_session(backend, call):
    """Stream the events of an agent session as SSE. The session may be yet to come."""
    after = call.query.get('after', call.last_event_id)
    after = place_of(after) if after else BEGINNING
    backend.streams.admit()
    return follow(backend, call, lambda: SessionFeed(backend, call.path['session_id'], after=after))


def list_sessions(backend, call):
    """List agent sessions, oldest first."""
    found = backend.state.sessions()
    if 'workspaceId' in call.query:
        workspace = backend.state.get(call.query['workspaceId'])
        found = [item for item in found if item.workspace_id == workspace.id]
    found = [item for item in found if call.query.get('agent', item.agent) == item.agent]
    found = [item for item in found if call.query.get('state', item.last.state) == item.last.state]
    return Reply([view_session(item) for item in found])


def get_session(backend, call):
    """Get an agent session with its runs."""
    return show_session(backend, backend.state.session(call.path['id']))


def get_transcript(backend, call):
    """Get the events of a session: `limit` at a time; `next` is what `after` must be for the ones that
    follow."""
    session = backend.state.session(call.path['id'])
    after = place_of(call.query['after']) if call.query.get('after') else BEGINNING
    limit, found = call.query.get('limit', 1000), []
    for run, steps in backend.tasks.replay(session, after, backend.tasks.told(session.id)):
        found += [(run, step) for step in steps]
        if len(found) > limit:
            break
    shown = [row for run, step in found[:limit] for row in Steps(run, [step], event_id_of).rows()]
    return Reply({'events': [json.loads(text) for _, text in shown],
                  'next': shown[-1][0] if len(found) > limit else None})


def cancel_session(backend, call):
    """Interrupt the task of a session. It ends with an error event, AGENT_CANCELLED, within seconds."""
    return show_session(backend, backend.tasks.cancel(call.path['id']), 202)


def delete_session(backend, call):
    """Forget a session and delete its transcript."""
    backend.tasks.remove(call.path['id'])
    return Reply({'id': call.path['id'], 'deleted': True})


def open_websocket(backend, call):
    """Talk over a WebSocket: subscribe to workspaces, and receive their events."""
    if call.websocket is None:
        raise UpgradeRequired('This is a WebSocket: connect with Upgrade: websocket, Sec-WebSocket-Version: '
                              '13 and a proper key.',
                              headers={'Upgrade': 'websocket', 'Sec-WebSocket-Version': '13'})
    try:
        backend.streams.admit(trusted=call.trusted)
    except TooMany as error:
        call.websocket.close(1013, str(error))
        return Reply({})
    WebSocketClient(backend, call.websocket, call.trusted).run()
    return Reply({})


def issue_ticket(backend, call):
    """Get a ticket that opens one stream. It is for a browser's EventSource, which can send no token: add it
    as `?ticket=`."""
    return Reply({'ticket': backend.tickets.issue(), 'expiresIn': TICKET_LIFE}, 201)


def get_usage(backend, call):
    """Get what all running workspaces use, by their ids."""
    return Reply({item.id: view_usage(item, backend.probes.usage(item.id)) for item in backend.state.all()
                  if item.status == RUNNING})


def list_templates(backend, call):
    """List the templates that a workspace can be made from."""
    templates, default = backend.templates, backend.config.default_template
    return Reply([{'name': name, 'description': templates.describe(name), 'holds': templates.holds(name),
                   'default': name == default} | view_image(templates.state(name))
                   for name in templates.names()])


def read_build_log(backend, call):
    """Get the log of the last build of an image. It has at most a thousand lines."""
    lines = backend.templates.log(call.path['name'])
    return Reply(stream=[f'{line}\n'.encode('utf-8', 'replace') for line in lines],
                 headers={'Content-Type': 'text/plain; charset=utf-8', 'Cache-Control': 'no-store'})


def get_health(backend, call):
    """Tell how the server is. Without the token, when one is set, only the first four fields."""
    well = backend.keeper.connected and not backend.state.failure
    shown = {'status': 'healthy' if well else 'degraded', 'version': VERSION,
             'uptime': int(time.monotonic() - backend.started_at),
             'docker': 'connected' if backend.keeper.connected else 'disconnected'}
    if call.trusted:
        statuses = collections.Counter(item.status for item in backend.state.all())
        shown['templates'] = {name: view_image(backend.templates.state(name))
                              for name in [BASE, *backend.templates.names()]}
        shown['agents'] = {name: {'ready': not why, **({'reason': why} if why else {})}
                           for name, why in backend.tasks.agents().items()}
        shown['workspaces'] = {'total': sum(statuses.values()),
                               **{status: statuses[status] for status in STATUSES}}
        shown['problems'] = [*backend.keeper.problems.values(),
                             *([f'The state file {backend.state.path} cannot be written '
f'({backend.state.failure}): make room, or see to the disk.'] if backend.state.failure else [])]
        shown['ports'] = {kind: {'used': used, 'total': total}
                          for kind, (used, total) in backend.state.ports_in_use().items()}
    return Reply(shown)


def show_dashboard(backend, call):
    """Show the dashboard."""
    return show_page(backend, call, 'index.html')


def show_reference(backend, call):
    """Show the API as pages to read and to try, or as a plain list."""
    return show_page(backend, call, 'openapi-plain.html' if call.query.get('plain') else 'openapi.html')


def show_document(backend, call):
    """Get this document."""
    return show_page(backend, call, 'openapi.json')


def show_file(backend, call):
    """Get a file that the pages need."""
    return show_page(backend, call, call.path['name'])


def show_page(backend, call, name):
    """Return the reply that sends a page, or says that the browser has it already."""
    page = backend.pages.find(name)
    if page.etag in call.if_none_match:
        return Reply(status=304, headers=page.headers, stream=())
    return Reply(stream=[page.read()], headers=page.headers)


def call_cursor(call):
    """Return from where a stream is to go on: what the client says, else what its browser remembers."""
    text = call.query.get('after', call.last_event_id)
    return Cursor.parse(text) if text else None


def parse_since(text):
    """Return the nanoseconds since the epoch of an RFC 3339 time, or of a number of seconds."""
    if re.fullmatch(r'\d{1,12}(\.\d{1,9})?', text):
        seconds, _, fraction = text.partition('.')
        return int(seconds) * 1_000_000_000 + int(fraction.ljust(9, '0'))
    try:
        return int(datetime.fromisoformat(text.replace('Z', '+00:00')).timestamp() * 1e9)
    except ValueError as error:
        raise refusal('since', f'is {quoted(text)}, but has to be a time, such as 2026-01-31T12:00:00Z, or a '
                               'number of seconds') from error


def show_workspace(backend, call, workspace):
    """Return the reply that shows all of a workspace."""
    return Reply(view_workspace_details(workspace, backend.probes.usage(workspace.id), backend.config,
                                        call.host))


def show_session(backend, session, status=200):
    """Return the reply that shows all of a session."""
    return Reply(view_session_details(session, backend.state.runs(session.id)), status)


ENGINE_TROUBLE = (DockerError, EngineUnavailable)
CHANGE = {'tag': 'Workspaces', 'answers': {202: 'workspace'},
          'errors': (WorkspaceNotFound, WorkspaceNotRunning, *ENGINE_TROUBLE)}
TASK_ANSWERS = {200: EVENT_STREAM, 202: 'task-accepted'}
TASK_ERRORS = (WorkspaceNotFound, WorkspaceNotRunning, SessionBusy, TooMany, *ENGINE_TROUBLE)
PAGE = {'open': True, 'bare': True, 'headers': ('ETag',)}
ROUTES = (
    Route('GET', '/api/workspaces', list_workspaces, query='workspace-list-query', tag='Workspaces',
          answers={200: 'workspace-list'}),
    Route('POST', '/api/workspaces', create_workspace, body='workspace-create', tag='Workspaces',
          answers={201: 'workspace'}, headers=('Location',),
          errors=(WorkspaceAlreadyExists, PortExhausted, *ENGINE_TROUBLE)),
    Route('GET', '/api/usage', get_usage, tag='Workspaces', answers={200: 'usage'}),
    Route('GET', '/api/workspaces/<id>', get_workspace, tag='Workspaces', answers={200: 'workspace-details'},
          errors=(WorkspaceNotFound,)),
    Route('PATCH', '/api/workspaces/<id>', update_workspace, body='workspace-update', tag='Workspaces',
          answers={200: 'workspace-details'},
          errors=(WorkspaceNotFound, WorkspaceAlreadyExists, WorkspaceNotRunning, *ENGINE_TROUBLE)),
    Route('DELETE', '/api/workspaces/<id>', delete_workspace, tag='Workspaces',
          answers={200: 'workspace-deleted', 202: 'workspace-deleted'},
          errors=(WorkspaceNotFound, *ENGINE_TROUBLE)),
    Route('POST', '/api/workspaces/<id>/start', start_workspace, **CHANGE),
    Route('POST', '/api/workspaces/<id>/retry', retry_workspace, body='workspace-retry', tag='Workspaces',
          answers={202: 'workspace'},
          errors=(WorkspaceNotFound, WorkspaceNotRunning, PortExhausted, *ENGINE_TROUBLE)),
    Route('POST', '/api/workspaces/<id>/stop', stop_workspace, **CHANGE),
    Route('POST', '/api/workspaces/<id>/restart', restart_workspace, **CHANGE),
    Route('GET', '/api/workspaces/<id>/events', follow_workspace, query='events-query', tag='Workspaces',
          answers={200: EVENT_STREAM},
          errors=(WorkspaceNotFound, TooMany)),
    Route('GET', '/api/workspaces/<id>/logs', read_log, query='logs-query', tag='Workspaces',
          answers={200: PLAIN_TEXT},
          errors=(WorkspaceNotFound, TooMany, *ENGINE_TROUBLE)),
    Route('POST', '/api/agent/execute', execute_task, body='agent-execute', tag='Agents',
          answers=TASK_ANSWERS, errors=TASK_ERRORS,
          headers=('X-Session-Id', 'X-Run-Id', 'Location')),
    Route('GET', '/api/agent/sessions', list_sessions, query='session-list-query', tag='Agents',
          answers={200: 'session-list'}, errors=(WorkspaceNotFound,)),
    Route('GET', '/api/agent/sessions/<id>', get_session, tag='Agents', answers={200: 'session-details'},
          errors=(SessionNotFound,)),
    Route('GET', '/api/agent/sessions/<id>/events', get_transcript, query='transcript-query', tag='Agents',
          answers={200: 'transcript'},
          errors=(SessionNotFound, *ENGINE_TROUBLE)),
    Route('POST', '/api/agent/sessions/<id>/cancel', cancel_session, tag='Agents',
          answers={202: 'session-details'}, errors=(SessionNotFound,)),
    Route('DELETE', '/api/agent/sessions/<id>', delete_session, tag='Agents',
          answers={200: 'session-deleted'},
          errors=(SessionNotFound, SessionBusy, *ENGINE_TROUBLE)),
    Route('GET', '/agent/sse/<session_id>', follow_session, query='session-events-query', tag='Agents',
          answers={200: EVENT_STREAM}, errors=(TooMany,)),
    Route('GET', '/agent/ws', open_websocket, open=True, tag='Streams', answers={101: None},
          errors=(UpgradeRequired,)),
    Route('POST', '/api/tickets', issue_ticket, tag='Streams', answers={201: 'ticket'}),
    Route('GET', '/api/templates', list_templates, tag='Server', answers={200: 'template-list'}),
    Route('GET', '/api/templates/<name>/log', read_build_log, tag='Server', answers={200: PLAIN_TEXT},
          errors=(NotFound,)),
    Route('GET', '/health', get_health, open=True, bare=True, tag='Server', answers={200: 'health'}),
    Route('GET', '/openapi.json', show_document, tag='Server', answers={200: JSON_TYPE}, **PAGE),
    Route('GET', '/', show_dashboard, **PAGE),
    Route('GET', '/openapi', show_reference, query='openapi-query', **PAGE),
    Route('GET', '/static/<name>', show_file, **PAGE),
)


class Application(bottle.Bottle):
    """The routes as a WSGI application whose every answer is JSON."""

    def __init__(self, backend):
        super().__init__()
        for route in ROUTES:
            self.route(route.path, route.method, endpoint(backend, route), spec=route)

    def find(self, method, path):
        """Return the Route that answers a request, or None."""
        try:
            return self.match({'REQUEST_METHOD': method, 'PATH_INFO': path})[0].config['spec']
        except bottle.HTTPError:
            return None

    def default_error_handler(self, error):
        """Put Bottle's own errors into the contract's shape."""
        if error.status_code == 404:
            return self._json(NotFound(f'There is no {bottle.request.path[:200]} here; GET /openapi.json '
                                       'lists what there is.'))
        if error.status_code == 405:
            *others, last = error.headers['Allow'].split(',')
            allowed = f"{', '.join(others)} and {last}" if others else last
            path, method = bottle.request.path[:200], bottle.request.method
            return self._json(MethodNotAllowed(f'{path} takes {allowed}, not {method}.'))
        return self._json(internal_error(error.exception) if error.status_code >= 500
                          else ValidationError(str(error.body)))

    @staticmethod
    def _json(error):
        bottle.response.content_type = 'application/json'
        return encode(view_error(error))


class Streamed:
    """What Bottle sends part by part as a file's: of any other iterable it waits for the first part before it
    sends the headers."""

    def __init__(self, parts):
        self._parts = iter(parts)
        self.close = getattr(parts, 'close', lambda: None)

    def read(self, _=None):
        """Return the next part that is not empty, and nothing at the end."""
        return next(filter(None, self._parts), b'')


def endpoint(backend, route):
    """Return the function that Bottle calls: it checks what came, calls the handler, and puts what it returns
    into JSON."""
    def called(**path):
        environ = bottle.request.environ
        try:
            query = read_query(backend.schemas, route.query, environ.get('QUERY_STRING', ''))
            body = read_body(backend.schemas, route.body, environ) if route.body else None
            call = Call(path, query, body, environ.get('agentbackend.trusted', True),
                        environ.get('HTTP_LAST_EVENT_ID'), watcher_of(environ),
                        accept=environ.get('HTTP_ACCEPT', ''),
                        if_none_match=environ.get('HTTP_IF_NONE_MATCH', ''),
                        host=split_host(environ.get('HTTP_HOST', '')) or '')
            reply = route.handler(backend, call)
            if reply.stream is not None:
                environ['agentbackend.streams'] = True
                return bottle.HTTPResponse(Streamed(reply.stream), reply.status, reply.headers)
            return respond(reply.data if route.bare else {'success': True, 'data': reply.data}, reply.status,
                           reply.headers)
        except BackendError as error:
            return respond(view_error(error), error.status, error.headers)
        except Exception as error:
            error = internal_error(error)
            return respond(view_error(error), error.status, {})
    return called


def watcher_of(environ):
    """Return what watches for a client to leave. Under another program's server nothing does, and a heartbeat
    finds it out."""
    connection = environ.get('agentbackend.socket')
    if connection is None:
        return lambda callback: io.BytesIO()  # has a close()
    return lambda callback: DisconnectWatcher(connection, callback)


def respond(value, status, headers):
    """Return a value as Bottle's JSON response."""
    return bottle.HTTPResponse(encode(value), status,
                               {**headers, 'Content-Type': 'application/json', 'Cache-Control': 'no-store'})


def read_query(schemas, name, text):
    """Return the query as a checked dict: lists, integers and booleans where the schema has them."""
    properties = schemas.documents[name]['properties']
    query = {}
    for key, values in urllib.parse.parse_qs(text, keep_blank_values=True).items():
        kind = properties.get(key, {}).get('type')
        last = values[-1]
        if kind == 'array':
            query[key] = values
        elif kind == 'integer' and re.fullmatch(r'-?\d{1,15}', last):
            query[key] = int(last)
        elif kind == 'boolean' and last in ('true', 'false', '1', '0', ''):
            query[key] = last in ('true', '1', '')
        else:
            query[key] = last
    schemas.check(name, query, where='query')
    return query


def read_body(schemas, name, environ):
    """Return the JSON body, checked, with sizes in bytes; raise ValidationError, or UnsupportedMediaType when
    it says that it is something else."""
    media_type = environ.get('CONTENT_TYPE', '').partition(';')[0].strip().lower()
    if media_type != 'application/json' and not media_type.endswith('+json'):
        raise UnsupportedMediaType(f"The Content-Type is {quoted(media_type) if media_type else 'missing'}, "
                                   'but has to be application/json.')
    value = parse_json(environ['wsgi.input'].read())
    for key, schema in schemas.properties(name) if isinstance(value, dict) else ():
        if schema.get('x-trim') and isinstance(value.get(key), str):
            value[key] = value[key].strip()
        if schema.get('format') == 'bytes' and isinstance(value.get(key), str):
            with contextlib.suppress(ValueError):  # what is no size the schema refuses, too
                value[key] = parse_size(value[key])
    schemas.check(name, value)
    return value


# ---------------------------------------------------------------------------------------------
# Server
# ---------------------------------------------------------------------------------------------

MAX_CONNECTIONS = 5000


@dataclass
class Backend:
    """The parts, put together. `open` begins what goes on in the background, `close` ends it."""

    config: Config
    schemas: Schemas
    state: State
    events: Events
    client: DockerClient
    engine: Engine
    templates: Templates
    logs: Logs
    probes: Probes
    workspaces: Workspaces
    keeper: Keeper
    tasks: Tasks
    streams: Streams
    pages: Pages
    tickets: Tickets = field(default_factory=Tickets)
    started_at: float = field(default_factory=time.monotonic)

    def load(self):
        """Read what is known; until then no call may be answered."""
        self.state.open()
        self.tasks.open()

    def open(self):
        """Begin to keep up with the engine, with what is known if it is not yet read."""
        if not self.state.opened:
            self.load()
        self.keeper.open()
        return self

    def close(self):
        """End what goes on here, and write what is known; workspaces and their tasks go on."""
        self.keeper.close()
        self.workspaces.close()
        self.probes.close()
        self.templates.stop()
        self.logs.close()
        self.tasks.close()
        self.state.close()
        self.client.close()


def make_backend(config):
    """Put the parts together; nothing goes on until `open` is called."""
    state = State(Path(config.state_dir) / f'{config.instance}.sqlite',
                  {'codeServer': config.code_server_ports, 'ssh': config.ssh_ports,
                   'custom': config.custom_ports})
    events = Events(state, config.secrets())
    client = DockerClient(host=config.docker_host, tls_verify=config.docker_tls_verify,
                          cert_path=config.docker_cert_path)
    engine = Engine(client, instance=config.instance, recorded=state.container_of)
    templates = Templates(client, [DATA / 'templates', *filter(None, [config.templates_dir])],
                          base_image=config.base_image,
                          base_image_timeout=config.base_image_timeout, ca_certs=config.extra_ca_certs,
                          timeout=config.build_timeout)
    logs, probes, claim = Logs(events, engine), Probes(config, engine), Claim(engine, lambda: state.id)
    workspaces = Workspaces(config, state, events, engine, templates, probes, claim)
    keeper = Keeper(config, state, engine, templates, logs, workspaces, probes, claim)
    tasks = Tasks(config, state, events, engine, claim)
    keeper.on_connected.append(tasks.resume)
    keeper.on_changed.append(tasks.sweep_up)
    schemas = Schemas(DATA / 'schemas')
    frame = json.loads((DATA / 'static' / 'openapi-frame.json').read_text())
    pages = Pages(DATA / 'static', openapi_document(ROUTES, schemas, frame))
    return Backend(config, schemas, state, events, client, engine, templates, logs, probes, workspaces,
                   keeper, tasks, Streams(config.max_streams), pages)


def make_app(backend):
    """Return the WSGI callable, to be served here or mounted in another program."""
    def talk(websocket, trusted):
        open_websocket(backend, Call({}, {}, None, trusted, None, websocket=websocket))
    return Gate(backend.config, Application(backend), backend.tickets, talk)


class Server:
    """The backend behind a port."""

    def __init__(self, backend):
        self.backend = backend
        config = backend.config
        app = make_app(backend)

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


def address_of(config, port):
    """Return where a browser on this machine finds the server."""
    host = {'0.0.0.0': '127.0.0.1', '::': '::1'}.get(config.host, config.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve(config):
    """Run a server until it is told to stop."""
    backend = make_backend(config)
    server = Server(backend)
    backend.keeper.on_ready.append(lambda: log.info('Ready. Open %s/', address_of(config, server.port)))
    server.open()
    log.info('Agent Backend %s serves http://%s:%d', VERSION,
             f'[{config.host}]' if ':' in config.host else config.host, server.port)
    try:
        server.wait()
        log.info('Stopping.')
    finally:
        server.close()


def main():
    """Run the server as the environment says; end with 2 and one line when it says nonsense."""
    try:
        config = Config.from_env(os.environ)
        logging.basicConfig(level=config.log_level, format='%(asctime)s %(levelname)s %(message)s',
                            stream=sys.stderr)
        for chatty in ('urllib3', 'geventwebsocket'):
            logging.getLogger(chatty).setLevel(max(logging.INFO, logging.getLogger().level))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        # Each stream is an open file, and 1024 is a common limit.
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        serve(config)
    except ConfigError as error:
        print(f'agentbackend: {error}', file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__':
    main()
