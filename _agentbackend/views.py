"""Records as the objects of the API."""
import collections
import contextlib
import json
import re
import time
from json.encoder import encode_basestring

from _agentbackend import VERSION
from _agentbackend.config import EVERYWHERE
from _agentbackend.dockerlog import STREAM_NAMES
from _agentbackend.engine import USER
from _agentbackend.images import BASE
from _agentbackend.records import AGENT, ERROR, RUNNING, STATUSES, STOPPED, title_of
from _agentbackend.timing import view_time
from _agentbackend.wire import text_frame

SSE_RETRY = 2000  # milliseconds after which a browser's EventSource comes back
ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(',', ':'))
NO_LINE_ENDS = {code: f'\\u{code:04x}' for code in (0x85, 0x2028, 0x2029)}
# What the entrypoint of a workspace says of its way to readiness, which is told as `progress`.
ENTRYPOINT = 'workspace: '
PROGRESS = re.compile(f'{ENTRYPOINT}(clone|submodules|large files|setup): (.*)')
STEPS = re.compile(r'(?:(\d{1,9})/(\d{1,9}) |.*?(?<!\d)(\d{1,3})%)', re.A)


def view_workspace(workspace):
    """Return a workspace as a list shows it."""
    custom = {key: port for key, port in workspace.ports.items() if key.isdigit()}
    return {'id': workspace.id, 'name': workspace.name, 'status': workspace.status, 'type': workspace.type,
            'template': workspace.template, 'codeServerPort': workspace.ports.get('codeServer'),
            'sshPort': workspace.ports.get('ssh'),
            'ports': custom, 'createdAt': view_time(workspace.created_at),
            'expiresAt': view_time(workspace.expires_at), 'node': workspace.node or None,
            'warm': workspace.warm}


def view_workspace_details(workspace, usage, config, called, engine):
    """Return a workspace with everything that is known of it; `usage` is its last measurement or None,
    `called` the name by which who asks knows this machine. The engine knows of its node."""
    address, away = config.workspace_bind_address, engine.away(workspace.node)
    there = engine.address(workspace.node) if address in EVERYWHERE else ''
    host = there or config.workspace_host or (called or 'localhost' if address in EVERYWHERE else address)
    shared = 0
    with contextlib.suppress(OSError):
        shared = len(config.shared_keys())
    netloc = f'[{host}]' if ':' in host else host
    project = f'{config.workspace_base_path}/{workspace.folder}'
    editor, ssh = workspace.ports.get('codeServer'), workspace.ports.get('ssh')
    # Each workspace has host keys of its own, and ports are used again: without the alias, ssh would cry
    # wolf.
    return view_workspace(workspace) | {
        'containerId': workspace.container_id[:12] or None,
        'codeServerUrl': f'http://{netloc}:{editor}/?folder={project}' if editor else None,
        'codeServerPassword': workspace.password,
        'sshCommand': f'ssh -p {ssh} -o HostKeyAlias={workspace.id} {USER}@{host}' if ssh else None,
        'gitUrl': workspace.git_url or None, 'gitBranch': workspace.git_branch or None,
        'gitCredentials': 'kept' if workspace.git_access else None,
        'sshKeys': len(workspace.ssh_public_keys) + shared,
        'env': sorted(workspace.env), 'cpus': workspace.cpus or None, 'memory': workspace.memory,
        'labels': workspace.labels, 'error': workspace.error or away or None, 'warnings': workspace.warnings,
        'pending': ['ports'] if workspace.ports and workspace.wants_other_ports else [], 'ttl': workspace.ttl,
        'lastActivityAt': view_time(workspace.last_activity_at),
        'resources': view_usage(workspace, usage)}


def view_node(node, workspaces):
    """Return a node with what its workspaces are promised."""
    promised = sum(item.memory for item in workspaces if item.status not in (STOPPED, ERROR))
    return {'name': node['name'], 'state': node['state'], 'availability': node['availability'],
            'address': node['address'] or None, 'workspaces': len(workspaces),
            'memory': {'total': node['memory'], 'promised': promised}, 'images': node['images'],
            'error': node['error'] or None}


def view_usage(workspace, usage):
    """Return what a workspace uses by its last measurement, which may be None; None if it does not run."""
    if usage is None and workspace.status == RUNNING:  # the engine takes a second to measure
        usage = {'cpu_percent': 0.0, 'memory': 0, 'memory_limit': workspace.memory}
    return usage and {'cpuPercent': usage['cpu_percent'], 'memoryUsage': usage['memory'],
                      'memoryLimit': usage['memory_limit']}


def view_activity(workspace, reasons):
    """Return what keeps a workspace alive, [(kind, since, detail)], and what will end it."""
    lives = workspace.type == AGENT and workspace.ttl is not None
    ends = None if workspace.ttl is None or (lives and reasons) else 'idle' if lives else 'ttl'
    return {'lastActivityAt': view_time(workspace.last_activity_at),
            'reasons': [{'kind': kind, 'since': view_time(since), 'detail': detail}
                        for kind, since, detail in sorted(reasons, key=lambda reason: reason[1] or 0)],
            'expiresAt': view_time(workspace.expires_at) if ends else None, 'endsBecause': ends}


def view_session(session):
    """Return a session as a list shows it."""
    last = session.last
    return {'id': session.id, 'title': session.title or title_of(last.task),
            'workspaceId': session.workspace_id, 'agent': session.agent, 'state': last.state,
            'createdAt': view_time(session.created_at),
            'lastActivityAt': view_time(last.ended_at or last.started_at), 'runs': session.count}


def view_session_details(session, runs):
    """Return a session with those of its runs that are kept."""
    return view_session(session) | {'agentSessionId': session.agent_session_id,
                                    'totalCostUsd': session.total_cost_usd,
                                    'runs': [view_run(run) for run in runs]}


def view_run(run):
    """Return a run: its task and times, and how it ended."""
    end = run.end['data'] if run.end else {}
    return {'id': run.id, 'number': run.number, 'state': run.state, 'task': run.task,
            'startedAt': view_time(run.started_at),
            'endedAt': view_time(run.ended_at), 'timeout': run.timeout, 'turns': end.get('turns'),
            'durationMs': end.get('durationMs'),
            'costUsd': end.get('costUsd'), 'result': end.get('message') if run.state == 'completed' else None,
            'error': {'code': end.get('code'), 'message': end.get('message')}
            if run.state in ('failed', 'cancelled') else None}


def view_health(backend, *, trusted):
    """Return how the server is; to whom has not shown the token, only the first four fields."""
    state, keeper, templates = backend.state, backend.keeper, backend.templates
    shown = {'status': 'healthy' if keeper.connected and not state.failure else 'degraded',
             'version': VERSION, 'uptime': int(time.monotonic() - backend.started_at),
             'docker': 'connected' if keeper.connected else 'disconnected'}
    if not trusted:
        return shown
    statuses = collections.Counter(item.status for item in state.all())
    unwritten = [f'The state file {state.path} cannot be written ({state.failure}): make room, or see to the '
                 'disk.'] if state.failure else []
    kinds, pooled = backend.workspaces.pool.view(), backend.workspaces.pool.used_ports()
    nodes, wrong = backend.engine.health()
    return shown | ({'nodes': nodes} if nodes else {}) | {
        'templates': {name: view_image(templates.state(name)) for name in [BASE, *templates.names()]},
        'agents': {name: {'ready': not why, **({'reason': why} if why else {})}
                   for name, why in backend.tasks.agents().items()},
        'workspaces': {'total': statuses.total(), **{status: statuses[status] for status in STATUSES}},
        'problems': list(dict.fromkeys([*keeper.problems.values(), *wrong, *unwritten])),
        'ports': {kind: {'used': used + pooled[kind], 'total': total}
                  | ({'pool': pooled[kind]} if kinds else {})
                  for kind, (used, total) in state.ports_in_use().items()},
        **({'pool': kinds} if kinds else {})}


def view_image(state):
    """Return the state of a template's image."""
    shown = {'image': state['image'], 'state': state['state']}
    if state['error']:
        shown['error'] = state['error']
    build = state['build']
    if build:
        shown['buildingSince'] = view_time(build.started_at)
        if build.steps:
            shown |= {'step': build.step, 'steps': build.steps}
        if build.lines:
            shown['lastLine'] = build.lines[-1]
    return shown


def view_event(event):
    """Return an event as JSON."""
    about = to_json({'type': event.type, 'workspaceId': event.workspace_id, 'id': event.id or None})
    session = '' if event.session_id is None else f',"sessionId":{to_json(event.session_id)}'
    return f'{about[:-1]},"timestamp":"{view_time(event.timestamp)}","data":{to_json(event.data)}{session}}}'


def view_lines(workspace_id, lines, head, tail):
    """Yield (id, JSON) of lines of a log, (position, stream, stamp, text), whose ids begin and end alike."""
    for position, stream, stamp, text in lines:
        event_id = f'{head}{position}{tail}'
        progress = PROGRESS.match(text) if text.startswith(ENTRYPOINT) else None
        kind, data = (('progress', to_json(progress_of(*progress.groups()))) if progress else
                      ('log', f'{{"stream":"{STREAM_NAMES[stream]}","message":{quote(text)}}}'))
        yield event_id, (f'{{"type":"{kind}","workspaceId":"{workspace_id}","id":"{event_id}",'
                         f'"timestamp":"{stamp[:23]}Z","data":{data}}}')


def view_steps(run, steps):
    """Return (place, first half, second half) of the JSON of a task's events, (place, type, data, seconds):
    the id, of which each stream has another one, stands in between."""
    session = to_json(run.session_id)
    return [(place, f'{{"type":"{kind}","workspaceId":"{run.workspace_id}","id":"',
             f'","timestamp":"{view_time(at)}","data":{to_json(data)},"sessionId":{session}}}')
            for place, kind, data, at in steps]


def progress_of(phase, message):
    """Return the data of the progress event for a word of the entrypoint: `2/3 npm ci`, or something in
    percent."""
    found = STEPS.match(message)
    step, total, percent = found.groups() if found else (None, None, None)
    return {'phase': phase, 'step': int(step or percent or 0), 'total': int(total or 100) if found else None,
            'message': message}


def view_sse(rows):
    """Return (id, JSON) of events as SSE text. It has no names: a browser's `onmessage` sees only those
    without."""
    return ''.join([f'id: {event_id}\ndata: {text}\n\n'
                    for event_id, text in rows]).encode('utf-8', 'replace')


def view_frames(rows):
    """Return (id, JSON) of events as WebSocket frames."""
    return b''.join([text_frame(text.encode('utf-8', 'replace')) for _, text in rows])


def quote(text):
    """Return a text as JSON. Many readers of SSE take U+0085, U+2028 and U+2029 for the end of a line."""
    text = encode_basestring(text)
    return text if text.isascii() else text.translate(NO_LINE_ENDS)


def to_json(value):
    """Return a value as JSON, without spaces."""
    text = ENCODER.encode(value)
    return text if text.isascii() else text.translate(NO_LINE_ENDS)


def encode(value):
    """Return a value as JSON bytes with a line end, which a shell is grateful for."""
    return (to_json(value) + '\n').encode('utf-8', 'replace')


def view_failure(error):
    """Return a failure as it is told on a stream: {code, message, details}."""
    return {'code': error.code, 'message': str(error)} | ({'details': error.details} if error.details else {})


def view_error(error):
    """Return the one shape in which every failure is told."""
    shown = {'success': False, 'error': str(error), 'code': error.code}
    return shown | ({'details': error.details} if error.details else {})
