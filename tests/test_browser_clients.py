"""The contract's own client code, letter for letter, in a real browser, in Bun and in Node; and how their
WebSockets end."""
import functools
import http.server
import json
import shutil
import signal
import socket
import subprocess
import threading

import javascript
import pytest
from conftest import Served, remove_objects
from helpers import give_records, state_path

CONTRACT = javascript.CLIENTS / 'contract'


@pytest.fixture(scope='module')
def packages():
    return javascript.installed()


class Browser:
    """Headless Chromium, and a server of pages on a port of its own."""

    def __init__(self, packages, pages):
        handler = functools.partial(QuietHandler, directory=str(pages))
        self.pages = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
        threading.Thread(target=self.pages.serve_forever, daemon=True).start()
        self._process = subprocess.Popen(['node', str(javascript.CLIENTS / 'browse.cjs'),
                                          shutil.which('chromium') or '/usr/bin/chromium'], text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         env=javascript.environment(packages))

    def do(self, command, **options):
        """Let the browser do something, and return what comes of it."""
        self._process.stdin.write(json.dumps({'command': command, **options}) + '\n')
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert 'error' not in answer, answer
        return answer['result']

    def open(self, page):
        self.do('open', url=f'http://localhost:{self.pages.server_port}/{page}')

    def close(self):
        self.do('close')
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()
        self.pages.shutdown()
        self.pages.server_close()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope='module')
def pages(tmp_path_factory, packages):
    """A folder of pages with the contract's code, compiled where it is TypeScript and otherwise as it is."""
    folder = tmp_path_factory.mktemp('pages')
    for name in ('websocket', 'eventsource'):
        shutil.copy(CONTRACT / f'{name}.js', folder)
        (folder / f'{name}.html').write_text(f'<!doctype html><meta charset="utf-8"><title>{name}</title>'
                                             f'<body><script src="{name}.js"></script></body>')
    # The contract's component is not exported; that is all that is added.
    source = (CONTRACT / 'react.tsx').read_text() + 'export { WorkspaceStatus };\n'
    (folder / 'contract-react.tsx').write_text(source)
    subprocess.run([javascript.esbuild(packages), str(javascript.CLIENTS / 'page.tsx'), '--bundle',
                    '--jsx=automatic', f'--outfile={folder}/react.js', '--log-level=error',
                    f'--alias:contract-react={folder}/contract-react.tsx'], check=True,
                    env=javascript.environment(packages), cwd=folder, timeout=60)
    (folder / 'react.html').write_text('<!doctype html><meta charset="utf-8"><title>React</title><body><div '
                                       'id="root"></div><script src="react.js"></script></body>')
    return folder


@pytest.fixture(scope='module')
def browser(packages, pages):
    made = Browser(packages, pages)
    yield made
    made.close()


@pytest.fixture
def server(port_3100, tmp_path, own_templates, docker_client):
    """A server on the port that the contract's code has, on which its template is a small one, and with its
    workspace ws-abc123."""
    folder, add_template = own_templates
    add_template('bun-typescript')
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(('127.0.0.1', port_3100))  # fails when another program has it, and says so
    server = Served(tmp_path, folder, PORT=str(port_3100))
    state_path(server).parent.mkdir()
    record = {'id': 'ws-abc123', 'name': 'myold', 'folder': 'myold', 'type': 'persistent', 'template': 'tiny',
              'created_at': 1.0, 'status': 'error', 'error': 'made up'}
    give_records(server, record)
    yield server.start()
    server.stop()
    print(f'--- log of {server.instance}\n' + server.log.read_text()[-8000:])
    remove_objects(docker_client, server.instance)


def test_the_react_component_shows_the_status_as_it_changes(server, browser):
    workspace = server.create('watched', env={'SLOW': '1'})
    browser.open(f"react.html?workspace={workspace['id']}")
    server.until(lambda: browser.do('text').strip() == 'Status: creating', 10)
    server.until(lambda: browser.do('text').strip() == 'Status: running', 20)
    server.call('POST', '/api/workspaces/watched/stop')
    server.until(lambda: browser.do('text').strip() == 'Status: stopped', 20)
    server.call('DELETE', '/api/workspaces/watched')
    server.until(lambda: browser.do('text').strip() == 'Status: deleting', 10)
    assert not [line for line in browser.do('heard') if 'ERROR' in line]


def test_the_websocket_of_the_contract_hears_what_happens(server, browser):
    browser.open('websocket.html')
    server.until(lambda: any(line.startswith('Event: status') for line in browser.do('heard')), 10)
    server.call('DELETE', '/api/workspaces/ws-abc123')
    server.until(lambda: sum(line.startswith('Event: status') for line in browser.do('heard')) >= 2, 10)
    browser.do('evaluate', code='ws.close(4001, "bye")')


def test_the_event_source_of_the_contract_stays_open_for_a_session_to_come(server, browser):
    browser.open('eventsource.html')
    server.until(lambda: browser.do('evaluate', code='eventSource.readyState') == 1, 10)
    assert not [line for line in browser.do('heard') if 'SSE Error' in line]


def test_an_event_source_hears_a_workspace_and_goes_on_after_a_crash_of_the_server(server, browser):
    count = 'n=0; while :; do echo line $n; n=$((n+1)); usleep 20000; done &'
    workspace = server.running('lines', env={'PRINT': count})
    browser.open('eventsource.html')
    url = f"http://localhost:{server.port}/api/workspaces/{workspace['id']}/events?tail=100000"
    browser.do('evaluate', code=f"""window.lines = []; window.source = new EventSource('{url}');
        source.onmessage = event => {{
            const m = JSON.parse(event.data);
            if (m.type == 'log') lines.push(m.data.message);
        }}; 1""")
    server.until(lambda: len(browser.do('evaluate', code='lines')) > 20, 10)
    server.kill()
    server.start()
    had = len(browser.do('evaluate', code='lines'))
    server.until(lambda: len(browser.do('evaluate', code='lines')) > had + 50, 15)
    lines = browser.do('evaluate', code='source.close(), lines')
    assert lines == ['workspace: started in tiny'] + [f'line {number}' for number in range(len(lines) - 1)]


@pytest.mark.parametrize('runtime', ['bun', 'node'])
def test_the_node_client_of_the_contract_creates_and_lists(server, packages, tmp_path, runtime):
    source = (CONTRACT / 'node.ts').read_text()
    source += "const done = [await createWorkspace('myproject'), await listWorkspaces()];\n"
    source += 'console.log(JSON.stringify(done));\n'
    (tmp_path / 'client.ts').write_text(source)
    command = [javascript.bun(packages), str(tmp_path / 'client.ts')]
    if runtime == 'node':
        # Node has no module named bun; its own fetch is the same function.
        (tmp_path / 'bun.mjs').write_text('const { fetch } = globalThis;\nexport { fetch };\n')
        subprocess.run([javascript.esbuild(packages), str(tmp_path / 'client.ts'), '--bundle',
                        '--platform=node', '--format=esm', f'--alias:bun={tmp_path}/bun.mjs',
                        f'--outfile={tmp_path}/client.mjs', '--log-level=error'], check=True, cwd=tmp_path,
                        timeout=60)
        command = ['node', str(tmp_path / 'client.mjs')]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    made, listed = json.loads(ended.stdout)
    assert made['success'] and (made['data']['name'], made['data']['status']) == ('myproject', 'creating')
    assert type(made['data']['codeServerPort']) is int
    assert listed['success'] and made['data']['id'] in [item['id'] for item in listed['data']]


@pytest.mark.parametrize('client', ['bun', 'node', 'ws'])
def test_every_client_sees_the_real_close_codes(server, packages, client):
    command = [javascript.bun(packages) if client == 'bun' else 'node',
               *(['--experimental-websocket'] if client == 'node' else []),
               str(javascript.CLIENTS / 'closing.js'), str(server.port), 'ws' if client == 'ws' else 'native']
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True,
                               env=javascript.environment(packages))
    seen = {}
    for line in process.stdout:
        name, *rest = json.loads(line)
        seen[name] = rest[0] if rest else None
        if name == 'open':
            server.process.send_signal(signal.SIGTERM)
    process.stdout.close()
    process.wait(10)
    assert seen['4001'] == {'code': 4001, 'reason': 'bye', 'clean': True}
    assert seen['1000'] == {'code': 1000, 'reason': '', 'clean': True}
    assert seen['big']['code'] == 1009
    assert seen['stop'] == {'code': 1001, 'reason': 'the server is stopping', 'clean': True}
