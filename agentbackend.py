"""Agent Backend: development workspaces on your own Docker engine, behind a REST API.

This module is the door: the table of routes and their handlers, the composition, the server and the command
line. The parts stand in the package `_agentbackend`, in layers. Each file knows only those below it:

    cli          the command line, a client over HTTP
    mcp          the MCP server, another one
    shapes       types of what the tools of the MCP server are given and answer
    console      what the command line's verbs share: what they say, how they fail, what they show
    transfer     files and folders on their way between a client's machine and a workspace
    remote       the API as those call it, and what they say when it fails; it imports nothing from below
    server       the WSGI server: the port, the lock of the instance, and the end in order
    clients      who listens: SSE and WebSocket clients
    feeds        what a reader of a workspace or a session is given: what was missed, then what comes
    tasks        tasks that agents do in workspaces: begun, followed, watched, ended
    talks        WebSocket clients: what all have, as their pings, and those of one terminal or one command
    repeats      requests that are sent again, answered as the first time
    gitstate     what git knows of a project
    files        files of workspaces, read and written by a program inside them
    terminals    terminals of workspaces, which are held inside them
    detached     commands that outlive client and server, known by their folders
    execs        commands that clients run in workspaces while they wait for them
    runs         commands that outlive everybody, each with a folder in the volume
    routing      what a route is, and what stands between Bottle and its handler
    gate         what comes before the routes: who may call (token, ticket), from where, with how large a body
    keeper       what keeps records, engine and clock in step: follow, adopt, compare, sweep
    workspaces   the life of workspaces: create, start, stop, restart, change, remove
    pool         workspaces that are made ahead, and wait for their owners
    recipe       what a workspace's container is made of: its files, environment, limits and mounts
    drafts       bodies of the API as records of workspaces, and the names of the secrets in them
    probes       readiness, last words and usage of workspaces
    logs         what containers print, followed once for all who read it
    waits        waiting for a workspace to become what a client waits for
    events       what happened, in a ring of batches per topic, in which readers are positions
    pages        the OpenAPI document, the dashboard and the reference
    views        records as the objects of the API, events as they go over the wire; SSE's time to come back
    images       templates, and the images built from them
    swarm        several nodes as one engine: what is asked of which, and placement
    distribution images on their way from one node to another, whole or by way of a registry
    nodes        machines with an engine each: which there are, how they are reached, whether they answer
    claim        the claim of one server to an instance on an engine
    access       where the files of a workspace are reached, and how programs of ours run there
    engine       containers, volumes and networks on a Docker engine
    alone        what an engine answers that is the only one
    dockerclient docker-py, its errors in our words
    activity     what keeps workspaces alive just now
    state        workspaces and sessions in one locked dict each, mirrored to a file
    mirror       what keeps that file in step with them
    store        the file: SQLite, a row per record, in a thread of its own
    records      what is known of a workspace, a run and a session
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
    errors       what can go wrong, each with its HTTP status and code; its words stand where it is raised

What a body may hold (fields, limits, texts) stands in `schemas/`, the version in `_agentbackend/__init__.py`,
what runs inside a workspace in `templates/base/`, whose `bin/workspace-entrypoint` starts all of it, and what
files and terminals have run there in `_agentbackend/inside/`.

Routes      the table of routes and their handlers
Server      the composition, the WSGI server, the command line
"""
from gevent import events, monkey  # noqa: I001 - before others are imported
searching, events.notify_and_call_entry_points = events.notify_and_call_entry_points, events.notify
monkey.patch_all()  # without a look, 25 times, for gevent's plugins in all that is installed
events.notify_and_call_entry_points = searching

import contextlib
import functools
import itertools
import json
import logging
import os
import resource
import sys
import time
import urllib.parse
from pathlib import Path

from _agentbackend import VERSION, errors
from _agentbackend.access import Access
from _agentbackend.activity import Activity
from _agentbackend.claim import Claim
from _agentbackend.clients import (
    SSE_HEADERS,
    Closing,
    Leaving,
    Streams,
    WebSocketClient,
    event_stream,
    log_stream,
    sse_stream,
)
from _agentbackend.config import Config
from _agentbackend.detached import Detached
from _agentbackend.dockerlog import STDERR
from _agentbackend.events import Events
from _agentbackend.execs import Execs, short_output
from _agentbackend.execs import events as command_events
from _agentbackend.feeds import DEFAULT_TAIL, SessionFeed, WorkspaceFeed, cursor_of, opened, transcript
from _agentbackend.files import ARCHIVES, Files, described, etag_of, tags
from _agentbackend.gate import TICKET_LIFE, Gate, Tickets
from _agentbackend.gitstate import diff_body, git_state
from _agentbackend.images import Templates
from _agentbackend.keeper import Keeper
from _agentbackend.logs import Logs
from _agentbackend.pages import (
    ANY_TYPE,
    EVENT_STREAM,
    JSON_TYPE,
    OCTETS,
    PLAIN_TEXT,
    Pages,
    StreamOf,
    openapi_document,
)
from _agentbackend.positions import BEGINNING, LAST_LINE, event_id_of, place_of
from _agentbackend.probes import Probes
from _agentbackend.records import RUNNING, STOPPED
from _agentbackend.repeats import Repeats
from _agentbackend.routing import Application, Call, Reply, Route, read_query, waited
from _agentbackend.runs import Runs
from _agentbackend.schemas import Schemas
from _agentbackend.server import Server
from _agentbackend.state import State
from _agentbackend.swarm import engine_of
from _agentbackend.talks import CommandClient, TerminalClient
from _agentbackend.tasks import Tasks
from _agentbackend.terminals import Terminals
from _agentbackend.views import (
    encode,
    view_activity,
    view_failure,
    view_health,
    view_image,
    view_node,
    view_session,
    view_session_details,
    view_usage,
    view_workspace,
    view_workspace_details,
)
from _agentbackend.wire import POLICY, WebSocketError
from _agentbackend.workspaces import Workspaces

HERE = Path(__file__).resolve().parent
DATA = HERE if (HERE / 'schemas').is_dir() else HERE / 'agentbackend_data'
log = logging.getLogger('agentbackend')


# ---------------------------------------------------------------------------------------------
# Routes
# ---------------------------------------------------------------------------------------------

DELETE_TIMEOUT = 30  # seconds that DELETE waits for the end before it answers 202


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
    """Create a workspace. It answers at once with status `creating`; what goes on is told by its events.

    With `wait=running` it answers when that is so. `Accept: text/plain` gets the id alone.
    """
    workspace = backend.workspaces.create(call.body)
    return Reply(view_workspace(workspace), 201, {'Location': f'/api/workspaces/{workspace.id}'})


def get_workspace(backend, call):
    """Get a workspace by its id or name. With `wait` it answers when the workspace has such a status."""
    workspace = backend.state.get(call.path['id'])
    if 'wait' in call.query:
        workspace = waited(backend, call, workspace)
    return show_workspace(backend, call, workspace)


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
    cursor, tail = cursor_of(backend, workspace, call), call.query.get('tail', DEFAULT_TAIL)
    return follow(backend, call, lambda: WorkspaceFeed(backend, workspace.id, cursor=cursor, tail=tail))


def read_log(backend, call):
    """Get the log of a workspace as plain text: the last `tail` lines or those from `since` on; with `follow`
    also what comes."""
    stream = log_stream(backend, backend.state.get(call.path['id']), call)
    return Reply(stream=stream, headers=SSE_HEADERS | {'Content-Type': 'text/plain; charset=utf-8'})


def follow(backend, call, feed, headers=()):
    """Return the reply that streams as SSE what the Feed that `feed()` makes has."""
    return Reply(stream=sse_stream(opened(backend, feed, call.watch_disconnect)),
                 headers=SSE_HEADERS | dict(headers))


def run_command(backend, call):
    """Run a command in a workspace.

    The answer has its exit status and output. It ends with its whole process group when the client leaves.
    With `Accept: text/event-stream` its output comes as it is printed, as events `output`, and an event
    `exit` at the end; `?output=raw` streams its stdout as it is. With `detach` it outlives client and server.
    """
    workspace = backend.state.get(call.path['id'])
    if call.body.get('detach'):
        begun = backend.detached.begin(workspace, call.body)
        return Reply(begun, 202, {'Location': f"/api/workspaces/{workspace.id}/exec/{begun['execId']}"})
    if 'output' not in call.query and EVENT_STREAM not in call.accept:
        return Reply(backend.execs.run(workspace, call.body, call.watch_disconnect))
    command = backend.execs.begin(workspace, call.body)
    if 'output' not in call.query:
        return Reply(stream=Closing(event_stream(command_events(command)), command, call.watch_disconnect),
                     headers=SSE_HEADERS)
    data, more = short_output(command)
    headers = {'Content-Type': OCTETS, 'Cache-Control': 'no-store', **DOWNLOADED}
    if more is None:
        command.close()
        return Reply(stream=[data], headers=headers | {'Content-Length': str(len(data)),
                                                       'X-Exit-Code': str(command.exit_code)})

    def parts():
        yield data
        yield from more
        call.trailers['X-Exit-Code'] = str(command.exit_code)
    return Reply(stream=Closing(parts(), command, call.watch_disconnect),
                 headers=headers | {'Trailer': 'X-Exit-Code'})


def join_command(backend, call):
    """Run a command over a WebSocket.

    The first message is what POST takes. Then binary messages are its stdin, up to an empty one, of which not
    more than 4 MiB may be under way (`taken` tells what has arrived), and what it prints, behind a byte that
    is 1 for stdout and 2 for stderr. It ends with its whole process group when the client leaves.
    """
    backend.streams.admit()
    CommandClient(backend, call.websocket, backend.state.get(call.path['id'])).run()


def list_commands(backend, call):
    """List the detached commands of a workspace, oldest first."""
    return Reply(backend.detached.list(backend.state.get(call.path['id'])))


def get_command(backend, call):
    """Get a detached command."""
    return Reply(backend.detached.get(backend.state.get(call.path['id']), call.path['exec_id']))


def delete_command(backend, call):
    """End a detached command and delete its output."""
    backend.detached.remove(backend.state.get(call.path['id']), call.path['exec_id'])
    return Reply({'execId': call.path['exec_id'], 'deleted': True})


def signal_command(backend, call):
    """Send a signal to a detached command. All that it has started gets it too."""
    return Reply(backend.detached.signal(backend.state.get(call.path['id']), call.path['exec_id'],
                                         call.body['signal']))


def read_command(backend, call):
    """Read the output of a detached command. It comes as it is, from a byte on; with `follow` to its end."""
    parts = backend.detached.output(
        backend.state.get(call.path['id']), call.path['exec_id'], stream=call.query.get('stream'),
        after=call.query.get('after', 0), follow=call.query.get('follow', False))
    next(parts)  # here what is wrong can still be told
    backend.streams.admit()
    leaving = Leaving()

    def pieces():
        with backend.streams.opened(leaving):
            yield from leaving.parts(parts)
    return Reply(stream=Closing(pieces(), leaving, call.watch_disconnect),
                 headers={'Content-Type': OCTETS, **DOWNLOADED})


def list_files(backend, call):
    """List the folder of the project, or get it as a tar."""
    return get_file(backend, call)


def get_file(backend, call):
    """Get a file, or what is in a folder.

    A path is relative to the project, or begins with the folder of the volume. A file comes with ETag and
    ranges; `archive` gives a file or a whole tree as a tar. It works on a stopped workspace too.
    """
    parts, work, headers, status = backend.files.answer(backend.state.get(call.path['id']), call)
    return Reply(stream=Closing(parts, work, call.watch_disconnect), status=status,
                 headers=headers | DOWNLOADED)


def put_file(backend, call):
    """Write a file. It is written whole or not at all, of any size; folders above it are made.

    `If-Match` with an ETag, and `If-None-Match: *`, guard against the work of others. With `extract` the body
    is a tar, and the path the folder that it is unpacked into.
    """
    workspace, path = backend.state.get(call.path['id']), call.path.get('path', '')
    if 'extract' in call.query:
        told = backend.files.extract(workspace, path, call.upload, call.query['extract'])
        return Reply(described(told))
    mode = int(call.query['mode'], 8) if 'mode' in call.query else None
    told = backend.files.write(workspace, path, call.upload, mode=mode,
                               match=tags(call.headers.get('If-Match')), none_match=tags(call.if_none_match))
    return file_reply(call, told)


def fill_project(backend, call):
    """Unpack a tar into the folder of the project."""
    if 'extract' not in call.query:
        raise errors.refusal('extract', 'is missing: the project is a folder, so tell of what form the body '
                                        'is')
    return put_file(backend, call)


def change_file(backend, call):
    """Move or copy a file or folder, or make a folder. What is at the target is never replaced."""
    body = call.body
    if 'to' not in body and body['operation'] != 'mkdir':
        raise errors.refusal('to', f"is missing, the target of {body['operation']}")
    told = backend.files.change(backend.state.get(call.path['id']), body['operation'], call.path['path'],
                                to=body.get('to'))
    return file_reply(call, told, body.get('to'))


def delete_file(backend, call):
    """Delete a file or folder. One that is not empty needs `recursive`."""
    backend.files.change(backend.state.get(call.path['id']), 'remove', call.path['path'],
                         recursive=call.query.get('recursive', False),
                         match=tags(call.headers.get('If-Match')))
    return Reply({'path': call.path['path'], 'deleted': True})


def file_reply(call, told, path=None):
    """Return the reply that describes a file which was written or made."""
    path = call.path['path'] if path is None else path
    location = f"/api/workspaces/{call.path['id']}/files/{urllib.parse.quote(path)}"
    return Reply(described(told), 201 if told['created'] else 200,
                 {'ETag': etag_of(told), 'Location': location})


def get_git(backend, call):
    """Get what git knows of the project. `unpushed` counts the commits that are on no remote."""
    workspace = backend.state.get(call.path['id'])
    return Reply(git_state(backend.engine, backend.access, workspace, backend.execs.folder(workspace, {})))


def get_diff(backend, call):
    """Get a patch of the project. It leads from `base`, the last commit by default, to the files as they are,
    new ones included."""
    command = backend.execs.begin(backend.state.get(call.path['id']),
                                  diff_body(call.query.get('base', ''), call.query.get('path', '')))
    kept = bytearray()
    pieces = ((stream, data if stream != STDERR else kept.extend(data[:500]) or b'')
              for stream, data in command)
    data, more = short_output(pieces)
    if more is None:
        command.close()
        if command.exit_code:
            raise errors.refusal('base', f'is of no use: {kept.decode("utf-8", "replace").strip()}')
    return Reply(stream=[data] if more is None else Closing(itertools.chain([data], more), command,
                                                            call.watch_disconnect),
                 headers={'Content-Type': 'text/plain; charset=utf-8', 'Cache-Control': 'no-store',
                          **DOWNLOADED})


def get_activity(backend, call):
    """Get what keeps a workspace alive. It tells also when it is deleted, and why."""
    workspace = backend.state.get(call.path['id'])
    return Reply(view_activity(workspace, backend.activity.reasons(workspace)))


def execute_task(backend, call):
    """Give an agent a task. What it does is streamed as SSE to its end, and goes on when the stream is left.

    With `Accept: application/json` it answers 202 with the ids at once.
    """
    if 'application/json' not in call.accept:
        backend.streams.admit()
    session, run = backend.tasks.execute(call.body)
    headers = {'X-Session-Id': session.id, 'X-Run-Id': run.id,
               'Location': f'/api/agent/sessions/{session.id}'}
    after = (run.number - 1, LAST_LINE, 0)
    if 'application/json' in call.accept:
        return Reply({'sessionId': session.id, 'runId': run.id, 'workspaceId': session.workspace_id,
                      'agent': session.agent, 'after': event_id_of(after)}, 202, headers)
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
    return Reply(transcript(backend, session, after, call.query.get('limit', 1000)))


def cancel_session(backend, call):
    """Interrupt the task of a session. It ends with an error event, AGENT_CANCELLED, within seconds."""
    return show_session(backend, backend.tasks.cancel(call.path['id']), 202)


def delete_session(backend, call):
    """Forget a session and delete its transcript."""
    backend.tasks.remove(call.path['id'])
    return Reply({'id': call.path['id'], 'deleted': True})


def open_websocket(backend, call):
    """Talk over a WebSocket: subscribe to workspaces, and receive their events."""
    try:
        backend.streams.admit(trusted=call.trusted)
    except errors.TooMany as error:
        call.websocket.close(1013, str(error))
        return
    WebSocketClient(backend, call.websocket, call.trusted).run()


def open_terminal(backend, call):
    """Open a terminal over a WebSocket.

    Binary messages are what is typed and what is printed. The same `name` finds the same terminal again, with
    the last 256 KB that it printed: it goes on without client and server until its program ends.
    """
    backend.streams.admit()
    query = {'name': 'main', 'cols': 80, 'rows': 24, 'command': '', **call.query}
    query.pop('ticket', None)
    TerminalClient(backend, call.websocket, backend.state.get(call.path['id']), **query).run()


def list_terminals(backend, call):
    """List the terminals of a workspace."""
    return Reply(backend.terminals.list(backend.state.get(call.path['id'])))


def end_terminal(backend, call):
    """End a terminal, with all that runs in it."""
    backend.terminals.end(backend.state.get(call.path['id']), call.path['name'])
    return Reply({'name': call.path['name'], 'deleted': True})


def issue_ticket(backend, call):
    """Get a ticket that opens one stream. It is for a browser's EventSource, which can send no token: add it
    as `?ticket=`."""
    return Reply({'ticket': backend.tickets.issue(), 'expiresIn': TICKET_LIFE}, 201)


def get_usage(backend, call):
    """Get what all running workspaces use, by their ids."""
    return Reply({item.id: view_usage(item, backend.probes.usage(item.id)) for item in backend.state.all()
                  if item.status == RUNNING})


def list_nodes(backend, call):
    """List the machines that workspaces are on. Without several engines it is one."""
    found = backend.state.all()
    return Reply([view_node(node, [item for item in found if item.node == node['node']])
                  for node in backend.engine.nodes()])


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
    return Reply(view_health(backend, trusted=call.trusted))


def show_reference(backend, call):
    """Show the API as pages to read and to try, or as a plain list."""
    return show_page(backend, call, 'openapi-plain.html' if call.query.get('plain') else 'openapi.html')


def show_document(backend, call):
    """Get this document."""
    return show_page(backend, call, 'openapi.json')


def show_page(backend, call, name=None):
    """Return the reply that sends a page, or says that the browser has it already."""
    page = backend.pages.find(name or call.path['name'])
    if page.etag in call.if_none_match:
        return Reply(status=304, headers=page.headers, stream=())
    return Reply(stream=[page.read()], headers=page.headers)


def show_workspace(backend, call, workspace):
    """Return the reply that shows all of a workspace."""
    return Reply(view_workspace_details(workspace, backend.probes.usage(workspace.id), backend.config,
                                        call.host, backend.engine))


def show_session(backend, session, status=200):
    """Return the reply that shows all of a session."""
    return Reply(view_session_details(session, backend.state.runs(session.id)), status)


DOWNLOADED = {'X-Content-Type-Options': 'nosniff', 'Content-Security-Policy': 'sandbox'}
ENGINE_TROUBLE = (errors.DockerError, errors.EngineUnavailable)
WORK_ERRORS = (errors.WorkspaceNotRunning, *ENGINE_TROUBLE)
TALK_ERRORS = (errors.WorkspaceNotRunning, errors.TooMany)
FILE_ANSWERS = ('file-list', *ARCHIVES.values(), ANY_TYPE)
FILE_ERRORS = (*WORK_ERRORS, errors.FileMissing, errors.FileExists, errors.NotAFolder, errors.NotAFile)
CHANGE = {'tag': 'Workspaces', 'query': 'wait-query', 'becomes': RUNNING, 'answers': {202: 'workspace'},
          'errors': WORK_ERRORS}
TASK_ANSWERS = {200: EVENT_STREAM, 202: 'task-accepted'}
TASK_ERRORS = (errors.WorkspaceNotFound, *WORK_ERRORS, errors.SessionBusy, errors.TooMany)
PAGE = {'open': True, 'bare': True, 'headers': ('ETag',)}
ROUTES = (
    Route('GET', '/api/workspaces', list_workspaces, query='workspace-list-query', tag='Workspaces',
          answers={200: 'workspace-list'}),
    Route('POST', '/api/workspaces', create_workspace, body='workspace-create', query='wait-query',
          tag='Workspaces', becomes=RUNNING, answers={201: 'workspace'}, headers=('Location',),
          errors=(errors.WorkspaceAlreadyExists, errors.WorkspaceNotRunning, errors.PortExhausted,
                  errors.NoRoom, *ENGINE_TROUBLE)),
    Route('GET', '/api/usage', get_usage, tag='Workspaces', answers={200: 'usage'}),
    Route('GET', '/api/workspaces/<id>', get_workspace, query='wait-query', tag='Workspaces',
          answers={200: 'workspace-details'}, errors=(errors.WorkspaceNotRunning,)),
    Route('PATCH', '/api/workspaces/<id>', update_workspace, body='workspace-update', tag='Workspaces',
          answers={200: 'workspace-details'}, errors=(*WORK_ERRORS, errors.WorkspaceAlreadyExists)),
    Route('DELETE', '/api/workspaces/<id>', delete_workspace, tag='Workspaces',
          answers={200: 'workspace-deleted', 202: 'workspace-deleted'}, errors=ENGINE_TROUBLE),
    Route('POST', '/api/workspaces/<id>/start', start_workspace, **CHANGE),
    Route('POST', '/api/workspaces/<id>/retry', retry_workspace, body='workspace-retry',
          query='wait-query', tag='Workspaces', becomes=RUNNING, answers={202: 'workspace'},
          errors=(*WORK_ERRORS, errors.PortExhausted)),
    Route('POST', '/api/workspaces/<id>/stop', stop_workspace, **CHANGE | {'becomes': STOPPED}),
    Route('POST', '/api/workspaces/<id>/restart', restart_workspace, **CHANGE),
    Route('GET', '/api/workspaces/<id>/events', follow_workspace, query='events-query', tag='Workspaces',
          answers={200: EVENT_STREAM}, errors=(errors.TooMany,)),
    Route('GET', '/api/workspaces/<id>/logs', read_log, query='logs-query', tag='Workspaces',
          answers={200: PLAIN_TEXT}, errors=(errors.TooMany, *ENGINE_TROUBLE)),
    Route('POST', '/api/workspaces/<id>/exec', run_command, body='exec', query='exec-query',
          tag='Commands', answers={200: ('exec-result', StreamOf('exec-event'), OCTETS), 202: 'exec-run'},
          errors=(*WORK_ERRORS, errors.TooMany)),
    Route('GET', '/api/workspaces/<id>/exec', list_commands, tag='Commands',
          answers={200: 'exec-run-list'}, errors=WORK_ERRORS),
    Route('GET', '/api/workspaces/<id>/exec/ws', join_command, tag='Commands', answers={101: None},
          talk=('exec', 'exec-talk'), errors=TALK_ERRORS),
    Route('GET', '/api/workspaces/<id>/exec/<exec_id>', get_command, tag='Commands',
          answers={200: 'exec-run'}, errors=WORK_ERRORS),
    Route('DELETE', '/api/workspaces/<id>/exec/<exec_id>', delete_command, tag='Commands',
          answers={200: 'exec-deleted'}, errors=WORK_ERRORS),
    Route('POST', '/api/workspaces/<id>/exec/<exec_id>/signal', signal_command, body='exec-signal',
          tag='Commands', answers={200: 'exec-run'}, errors=WORK_ERRORS),
    Route('GET', '/api/workspaces/<id>/exec/<exec_id>/output', read_command, query='exec-output-query',
          tag='Commands', answers={200: OCTETS}, errors=(*WORK_ERRORS, errors.TooMany)),
    Route('GET', '/api/workspaces/<id>/files', list_files, query='file-query', tag='Commands',
          answers={200: FILE_ANSWERS}, errors=FILE_ERRORS),
    Route('PUT', '/api/workspaces/<id>/files', fill_project, query='file-put-query', tag='Commands',
          upload=True, answers={200: 'file'}, errors=FILE_ERRORS),
    Route('GET', '/api/workspaces/<id>/files/<path:path>', get_file, query='file-query', tag='Commands',
          answers={200: FILE_ANSWERS, 206: (OCTETS, ANY_TYPE)}, headers=('ETag',),
          errors=(*FILE_ERRORS, errors.RangeNotSatisfiable)),
    Route('PUT', '/api/workspaces/<id>/files/<path:path>', put_file, query='file-put-query', tag='Commands',
          upload=True, answers={200: 'file', 201: 'file'}, headers=('ETag', 'Location'),
          errors=(*FILE_ERRORS, errors.PreconditionFailed)),
    Route('POST', '/api/workspaces/<id>/files/<path:path>', change_file, body='file-change', tag='Commands',
          answers={201: 'file'}, headers=('ETag', 'Location'), errors=FILE_ERRORS),
    Route('DELETE', '/api/workspaces/<id>/files/<path:path>', delete_file, query='file-delete-query',
          tag='Commands', answers={200: 'file-deleted'}, errors=(*FILE_ERRORS, errors.PreconditionFailed)),
    Route('GET', '/api/workspaces/<id>/terminal', open_terminal, query='terminal-query', tag='Commands',
          answers={101: None}, talk=('terminal-message', 'terminal-event'), errors=TALK_ERRORS),
    Route('GET', '/api/workspaces/<id>/terminals', list_terminals, tag='Commands',
          answers={200: 'terminal-list'}, errors=WORK_ERRORS),
    Route('DELETE', '/api/workspaces/<id>/terminals/<name>', end_terminal, tag='Commands',
          answers={200: 'terminal-ended'}, errors=(*WORK_ERRORS, errors.TerminalNotFound)),
    Route('GET', '/api/workspaces/<id>/git', get_git, tag='Commands', answers={200: 'git'},
          errors=WORK_ERRORS),
    Route('GET', '/api/workspaces/<id>/git/diff', get_diff, query='diff-query', tag='Commands',
          answers={200: PLAIN_TEXT}, errors=(*WORK_ERRORS, errors.TooMany)),
    Route('GET', '/api/workspaces/<id>/activity', get_activity, tag='Workspaces', answers={200: 'activity'}),
    Route('POST', '/api/agent/execute', execute_task, body='agent-execute', tag='Agents',
          answers=TASK_ANSWERS, errors=TASK_ERRORS, headers=('X-Session-Id', 'X-Run-Id', 'Location')),
    Route('GET', '/api/agent/sessions', list_sessions, query='session-list-query', tag='Agents',
          answers={200: 'session-list'}, errors=(errors.WorkspaceNotFound,)),
    Route('GET', '/api/agent/sessions/<id>', get_session, tag='Agents', answers={200: 'session-details'}),
    Route('GET', '/api/agent/sessions/<id>/events', get_transcript, query='transcript-query', tag='Agents',
          answers={200: 'transcript'}, errors=ENGINE_TROUBLE),
    Route('POST', '/api/agent/sessions/<id>/cancel', cancel_session, tag='Agents',
          answers={202: 'session-details'}),
    Route('DELETE', '/api/agent/sessions/<id>', delete_session, tag='Agents',
          answers={200: 'session-deleted'}, errors=(errors.SessionBusy, *ENGINE_TROUBLE)),
    Route('GET', '/agent/sse/<session_id>', follow_session, query='session-events-query', tag='Agents',
          answers={200: EVENT_STREAM}, errors=(errors.TooMany,)),
    Route('GET', '/agent/ws', open_websocket, open=True, tag='Streams', answers={101: None},
          talk=('websocket-message', 'any-event')),
    Route('POST', '/api/tickets', issue_ticket, tag='Streams', answers={201: 'ticket'}),
    Route('GET', '/api/nodes', list_nodes, tag='Server', answers={200: 'node-list'}, errors=ENGINE_TROUBLE),
    Route('GET', '/api/templates', list_templates, tag='Server', answers={200: 'template-list'}),
    Route('GET', '/api/templates/<name>/log', read_build_log, tag='Server', answers={200: PLAIN_TEXT},
          errors=(errors.NotFound,)),
    Route('GET', '/health', get_health, open=True, bare=True, tag='Server', answers={200: 'health'}),
    Route('GET', '/openapi.json', show_document, tag='Server', answers={200: JSON_TYPE}, **PAGE),
    Route('GET', '/', functools.partial(show_page, name='index.html'), **PAGE),
    Route('GET', '/openapi', show_reference, query='openapi-query', **PAGE),
    Route('GET', '/terminal', functools.partial(show_page, name='terminal.html'), **PAGE),
    Route('GET', '/static/<name>', show_page, **PAGE),
)


# ---------------------------------------------------------------------------------------------
# Server
# ---------------------------------------------------------------------------------------------


class Backend:
    """The parts, put together. `open` begins what goes on in the background, `close` ends it."""

    def __init__(self, config):
        self.started_at = time.monotonic()
        self.config, self.schemas, self.tickets = config, Schemas(DATA / 'schemas'), Tickets()
        self.state = state = State(
            Path(config.state_dir) / f'{config.instance}.sqlite',
            {'codeServer': config.code_server_ports, 'ssh': config.ssh_ports, 'custom': config.custom_ports})
        self.events = Events(state, config.secrets())
        self.client, self.engine = engine_of(config, state)
        engine = self.engine
        self.templates = Templates(
            self.client, [DATA / 'templates', *filter(None, [config.templates_dir])],
            base_image=config.base_image, base_image_timeout=config.base_image_timeout,
            ca_certs=config.extra_ca_certs, timeout=config.build_timeout)
        self.logs, self.probes = Logs(self.events, engine), Probes(config, engine)
        claim = Claim(engine, lambda: state.id)
        self.workspaces = Workspaces(config, state, self.events, engine, self.templates, self.probes, claim)
        self.keeper = keeper = Keeper(config, state, engine, self.templates, self.logs, self.workspaces,
                                      self.probes, claim)
        self.tasks = Tasks(config, state, self.events, engine, claim)
        self.activity = activity = Activity(state)
        self.access = access = Access(state, engine)
        self.execs = Execs(config, state, engine, activity)
        self.detached = Detached(config, engine, Runs(engine, config.workspace_base_path), access, self.execs,
                                 activity)
        self.files = Files(config, engine, access, activity)
        self.terminals = Terminals(config, engine, access, activity)
        self.repeats, self.streams = Repeats(state), Streams(config.max_streams)
        frame = json.loads((DATA / 'static' / 'openapi-frame.json').read_text())
        self.pages = Pages(DATA / 'static', openapi_document(ROUTES, self.schemas, frame))
        activity.sources += [self.detached.at_work, keeper.editor_at_work]
        keeper.on_connected += [self.tasks.resume, engine.remove_helpers]
        keeper.on_changed.append(self.tasks.sweep_up)
        keeper.on_expiring.append(activity.keep_alive)

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


make_backend = Backend  # nothing goes on until `open` is called


def make_app(backend):
    """Return the WSGI callable, to be served here or mounted in another program."""
    def talk(route, environ, trusted):
        websocket, path = environ['wsgi.websocket'], application.match(environ)[1]
        try:
            query = {} if route.open else read_query(backend.schemas, route.query,
                                                     environ.get('QUERY_STRING', ''))
            route.handler(backend, Call(path, query, None, trusted, None, websocket=websocket))
        except errors.BackendError as error:
            with contextlib.suppress(WebSocketError):
                told = {'type': 'error', **view_failure(error)}
                websocket.send_frame(encode(told)[:-1], websocket.OPCODE_TEXT)
            websocket.close(POLICY, 'refused')
    application = Application(backend, ROUTES)
    return Gate(backend.config, application, backend.tickets, talk)


def address_of(config, port):
    """Return where a browser on this machine finds the server."""
    host = {'0.0.0.0': '127.0.0.1', '::': '::1'}.get(config.host, config.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve(config):
    """Run a server until it is told to stop."""
    backend = make_backend(config)
    server = Server(backend, make_app(backend))
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
    except errors.ConfigError as error:
        print(f'agentbackend: {error}', file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__':
    main()
