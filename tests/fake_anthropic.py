"""A fake of Anthropic's Messages API, for the real Claude Code: what a model would say is a script, and all
else is real.

    python tests/fake_anthropic.py [address [port]]    serves by hand; each request is printed as a line of
    JSON

The last `[script:NAME]` in what the user said chooses the script, and the number of answers since then the
step. So retries, resumed conversations and parallel runs need no state here.
"""
import ipaddress
import json
import re
import socket
import sys
import threading
import time
import urllib.parse
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

USAGE = {'input_tokens': 100, 'cache_creation_input_tokens': 0, 'cache_read_input_tokens': 0,
         'output_tokens': 20}
STATUSES = {400: 'invalid_request_error', 401: 'authentication_error', 403: 'permission_error',
            429: 'rate_limit_error',
            500: 'api_error', 529: 'overloaded_error'}
PLANNED = (('Create index.ts', 'Creating index.ts...'), ('Create package.json', 'Creating package.json...'),
           ('Run checks', 'Running checks...'))
SERVER = "export default { port: 3000, fetch: () => new Response('hello') };\n"
PACKAGE = '{"name": "server", "module": "index.ts"}\n'


def text(words):
    return {'type': 'text', 'text': words}


def tool(name, **body):
    return {'type': 'tool_use', 'name': name, 'input': body}


def todos(done):
    """Return the plan with so many steps done, and the next one begun."""
    return tool('TodoWrite', todos=[{'content': content, 'activeForm': active,
                                     'status': 'completed' if number < done else 'in_progress'
                                     if number == done
                                     else 'pending'} for number, (content, active) in enumerate(PLANNED)])


def write(name, content):
    return tool('Write', file_path=f'CWD/{name}', content=content)


def bash(command, description='Run a command', **options):
    return tool('Bash', command=command, description=description, **options)


def mcp(name, /, **body):
    return {'type': 'tool_use', 'name': f'mcp__agentbackend__{name}', 'input': body}


# Each script is a list of answers, each answer a list of blocks. CWD stands for the project's folder, HEARD
# for the last result of a tool.
SCRIPTS = {
    'plan': [[text("I'll plan the work."), todos(0)], [write('index.ts', SERVER)], [todos(1)],
             [write('package.json', PACKAGE)], [todos(2)],
             [bash('ls', 'List files')], [todos(3)], [text('Done: created index.ts and package.json.')]],
    'tasks': [[tool('TaskCreate', subject=content, description=content, activeForm=active)
               for content, active in PLANNED],
              [tool('TaskUpdate', taskId='1', status='in_progress')], [write('tasks.ts', SERVER)],
              [tool('TaskUpdate', taskId='1', status='completed'),
               tool('TaskUpdate', taskId='2', status='in_progress')],
              [tool('TaskUpdate', taskId='2', status='completed'),
               tool('TaskUpdate', taskId='3', status='deleted')],
              [tool('TaskList')], [text('All tasks are done.')]],
    'talk': [[text('Hello there.')]],
    'commit': [[bash('git commit -q --allow-empty -m agent')], [text('I said HEARD.')]],
    'write': [[write('one.txt', 'one\n')], [text('Wrote it.')]],
    'failing': [[bash('echo before; exit 3')], [write('two.txt', 'two\n')], [text('One of two worked.')]],
    'long': [[bash('sh -c "sleep 61.5; true"', 'Sleep')], [text('Slept.')]],
    'nested': [[bash('exec 2>/dev/null; sleep 62.5 & sh -c "sleep 63.5; true" & wait', 'Sleep thrice')],
               [text('Slept.')]],
    'workspaces': [
        [mcp('create_workspace', name='by-claude')],
        [mcp('write_file', workspace='by-claude', path='answer.sh', content='echo "it runs: $((6 * 7))"\n')],
        [mcp('run_command', workspace='by-claude', command='sh answer.sh >result; cat result')],
        [mcp('read_file', workspace='by-claude', path='result')],
        [mcp('delete_workspace', workspace='by-claude')], [text('I did it: HEARD')]],
    'serve': [[bash('setsid sleep 64.5 >/dev/null 2>&1 & echo started', 'Start a server')],
              [text('It is up.')]],
    'background': [[bash('sleep 65.5', 'Serve', run_in_background=True)],
                   [text('It runs in the background.')]],
    'loop': [[bash(f'echo turn {number}')] for number in range(30)] + [[text('At last.')]],
    'leak': [[bash('env | sort; tr "\\0" "\\n" </proc/$PPID/environ | grep TOKEN', 'Show the environment')],
             [text('I found: HEARD')]],
    'slow': [[text('slowly and slowly and slowly ' * 10)]],
    'inner': [[todos(1)], [write('inner.txt', 'inner\n')], [text('The inner work is done.')]],
    'patient': [[bash('sh -c "sleep 9; true"', 'Sleep')], [text('The patient work is done.')]],
    'tests': [[bash('sh -c "sleep 19; true"', 'Run the tests')], [text('They pass.')]],
    'delegating': [[tool('Task', description='Patient work', prompt='Be patient. [script:patient]',
                         subagent_type='general-purpose')],
                   [text('It is being worked on.')], [text('The patient work was done.')]],
    'outer': [[todos(0)], [tool('Task', description='Inner work', prompt='Do the inner work. [script:inner]',
                                subagent_type='general-purpose')],
              [todos(3)], [text('All of it is done.')]],
}
FAULTS = {**{f'err{status}': status for status in STATUSES}, 'hang': 'hang', 'drop': 'drop'}


class FakeAnthropic:
    """The API on an address of its own. `requests` is what was asked: path, headers in small letters,
    body."""

    def __init__(self, address, port=0, on_request=None):
        self.requests = []
        self.on_request = on_request
        self._server = ThreadingHTTPServer((address, port), Handler)
        self._server.daemon_threads = True
        self._server.fake = self
        self.url = f'http://{address}:{self._server.server_port}'
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={'poll_interval': 0.05},
                                        daemon=True)

    def start(self):
        self._thread.start()
        return self

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.close()

    def asked(self, wanted):
        """Return the bodies of the requests for an answer in which the user says something with `wanted` in
        it."""
        return [item['body'] for item in list(self.requests) if item['path'] == '/v1/messages'
                and wanted in '\n'.join(user_texts(item['body']))]


def bridge_address(docker_client):
    """Return the address under which containers reach this machine."""
    settings = docker_client.api.inspect_network('bridge')['IPAM']['Config'][0]
    # Some engines leave it out.
    return settings.get('Gateway') or str(next(ipaddress.ip_network(settings['Subnet']).hosts()))


def user_texts(body):
    """Return all that the user said, not what tools gave."""
    return [block['text'] for message in body['messages'] if message['role'] == 'user'
            for block in blocks_of(message) if block['type'] == 'text']


def blocks_of(message):
    content = message['content']
    return [text(content)] if isinstance(content, str) else content


def script_of(body):
    """Return (name of the script, number of the step)."""
    name, step = 'plan', 0
    for message in body['messages']:
        if message['role'] == 'assistant':
            step += 1
            continue
        for block in [block for block in blocks_of(message) if block['type'] == 'text']:
            found = re.findall(r'\[script:([\w-]+)\]', block['text'])
            if found:
                name, step = found[-1], 0
            elif '<system-reminder>' in block['text'] or name in FAULTS:
                continue
            elif step >= len(SCRIPTS[name]):
                name, step = 'plan', 0
    return name, step


def heard(body):
    """Return the text of the last result of a tool."""
    for message in reversed(body['messages']):
        for block in reversed(blocks_of(message)):
            if block['type'] == 'tool_result':
                content = block['content']
                is_text = isinstance(content, str)
                return content if is_text else ''.join(part.get('text', '') for part in content)
    return ''


def folder_of(body):
    """Return the folder that Claude Code says it works in."""
    # In a system prompt of one release, in a message of another.
    found = re.search(r'[Ww]orking directory:\s*([^\s\\"]+)', json.dumps(body))
    return found[1] if found else '/tmp'


def answer_to(body):
    """Return the blocks of the next answer."""
    if not body.get('tools'):
        return [text('ok')]
    name, step = script_of(body)
    if name not in SCRIPTS:
        return [text(f'There is no script {name}.')]
    steps = SCRIPTS[name]
    filled = json.dumps(steps[min(step, len(steps) - 1)]).replace('CWD', folder_of(body))
    filled = filled.replace('HEARD', json.dumps(heard(body))[1:-1])
    return [block | ({'id': f'toolu_{uuid.uuid4().hex[:20]}'} if block['type'] == 'tool_use' else {})
            for block in json.loads(filled)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._reply(200, b'')

    def do_GET(self):
        self._fail(404, 'not_found_error', 'There is nothing here.')

    def do_POST(self):
        path = urllib.parse.urlsplit(self.path).path
        body = json.loads(self.rfile.read(int(self.headers.get('Content-Length') or 0)) or '{}')
        record = {'path': path, 'headers': {key.lower(): value for key, value in self.headers.items()},
                  'body': body, 'time': time.time()}
        fake = self.server.fake
        fake.requests.append(record)
        if fake.on_request is not None:
            fake.on_request(record)
        try:
            if path.endswith('/count_tokens'):
                self._reply(200, b'{"input_tokens": 42}')
            elif path == '/v1/messages':
                self._messages(body)
            else:
                self._fail(404, 'not_found_error', f'There is no {path}.')
        except (BrokenPipeError, ConnectionResetError):
            pass

    def _messages(self, body):
        name = script_of(body)[0] if body.get('tools') else ''
        fault = FAULTS.get(name)
        if isinstance(fault, int):
            self._fail(fault, STATUSES[fault], f'the fake was told to answer {fault}',
                       {'x-should-retry': 'false'} if fault in (401, 403) else {})
        elif fault == 'drop' and not body.get('stream'):
            self.close_connection = True
        elif fault == 'hang':
            self.connection.settimeout(120)
            self.connection.recv(1)  # returns when the client goes
            self.close_connection = True
        else:
            message = {'id': f'msg_{uuid.uuid4().hex[:20]}', 'type': 'message', 'role': 'assistant',
                       'model': body.get('model', 'fake'),
                       'content': [text('I begin.')] if fault else answer_to(body), 'stop_sequence': None,
                       'usage': USAGE}
            calls_a_tool = any(block['type'] == 'tool_use' for block in message['content'])
            message['stop_reason'] = 'tool_use' if calls_a_tool else 'end_turn'
            if body.get('stream'):
                self._stream(message, pause=0.1 if name == 'slow' else 0, drop=fault == 'drop')
            else:
                self._reply(200, json.dumps(message).encode())

    def _stream(self, message, *, pause, drop):
        self.send_response(200)
        self.send_header('Content-Type', 'text/event-stream')
        self.send_header('Connection', 'close')
        self.end_headers()
        self.close_connection = True
        self._say('message_start', message={**message, 'content': [], 'stop_reason': None})
        for index, block in enumerate(message['content']):
            if block['type'] == 'text':
                key, kind, whole, empty = 'text', 'text_delta', block['text'], ''
            else:
                key, kind, whole, empty = 'partial_json', 'input_json_delta', json.dumps(block['input']), {}
            self._say('content_block_start', index=index,
                      content_block={**block, 'text' if block['type'] == 'text' else 'input': empty})
            if drop:
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            for start in range(0, len(whole), 40):
                time.sleep(pause)
                self._say('content_block_delta', index=index,
                          delta={'type': kind, key: whole[start:start + 40]})
            self._say('content_block_stop', index=index)
        self._say('message_delta', delta={'stop_reason': message['stop_reason'], 'stop_sequence': None},
                  usage={'output_tokens': USAGE['output_tokens']})
        self._say('message_stop')

    def _say(self, event, **data):
        self.wfile.write(f"event: {event}\ndata: {json.dumps({'type': event, **data})}\n\n".encode())
        self.wfile.flush()

    def _fail(self, status, kind, message, headers=None):
        self._reply(status, json.dumps({'type': 'error',
                                        'error': {'type': kind, 'message': message}}).encode(), headers)

    def _reply(self, status, body, headers=None):
        self.send_response(status)
        for name, value in {'Content-Type': 'application/json', 'Content-Length': str(len(body)),
                            'Connection': 'close', **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True


if __name__ == '__main__':
    served = FakeAnthropic(*sys.argv[1:2] or ['127.0.0.1'], *map(int, sys.argv[2:3]),
                           on_request=lambda record: print(json.dumps(record), flush=True))
    print(served.url, file=sys.stderr)
    served.start()._thread.join()
