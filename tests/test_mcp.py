"""The MCP server: the official client calls every tool, and real Claude Code uses it."""
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import gevent
import pytest
from agents import running, seconds_until, served_agents, shell
from conftest import ROOT
from fake_anthropic import FakeAnthropic
from helpers import free_port

PROGRAM = str(Path(sys.executable).with_name('agentbackend'))
CLIENT = Path(__file__).parent / 'clients' / 'mcp_client.py'
CONFINED = {'show_workspace', 'start_workspace', 'stop_workspace', 'read_workspace_log', 'run_command',
            'start_command', 'read_command', 'stop_command', 'list_files', 'read_file', 'write_file',
            'edit_file', 'search_files', 'git_status', 'git_diff', 'start_task', 'wait_for_task',
            'read_transcript', 'cancel_task', 'list_commands', 'list_tasks'}
EVERYTHING = CONFINED | {'list_workspaces', 'list_templates', 'create_workspace', 'delete_workspace'}


@pytest.fixture(scope='module')
def server(tmp_path_factory, agents_template, docker_client):
    with served_agents(tmp_path_factory.mktemp('mcp'), agents_template[0], docker_client,
                       DEFAULT_TEMPLATE='agents', AGENT_COMMAND='sh', DEFAULT_AGENT='command') as served:
        served.clients = {}
        yield served
        for client in served.clients.values():
            client.close()


def url_of(server):
    return f'http://127.0.0.1:{server.port}'


class Client:
    """The official client, which talks with an MCP server: a command line that is started, or a URL."""

    def __init__(self, where, token=None):
        self._process = subprocess.Popen([sys.executable, CLIENT], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, text=True)
        self._say({'server': where, 'token': token})

    def told(self, *calls, resources=()):
        """Return what it was told: its calls are (tool, arguments) or (tool, arguments, patience)."""
        self._say({'calls': [[*call, None][:3] for call in calls], 'resources': list(resources)})
        with gevent.Timeout(120):
            return json.loads(self._process.stdout.readline() or 'null')

    def close(self):
        self._process.communicate(timeout=20)

    def _say(self, wanted):
        self._process.stdin.write(json.dumps(wanted) + '\n')
        self._process.stdin.flush()


def told(server, *calls, options=(), resources=()):
    """Return what a client was told that the tests share, as it would all day long."""
    if options not in server.clients:
        server.clients[options] = Client([PROGRAM, '--url', url_of(server), 'mcp', *options])
    return server.clients[options].told(*calls, resources=resources)


def results(server, *calls, **options):
    """Return what tools answered, none of which failed."""
    found = told(server, *calls, **options)['results']
    assert not [item for item in found if item['error']], found
    return [item['data'] for item in found]


def refusals(server, *calls, **options):
    """Return what tools said that failed, all of them."""
    found = told(server, *calls, **options)['results']
    assert all(item['error'] for item in found), found
    return [item['text'] for item in found]


def test_each_tool_is_described_for_a_model_that_has_never_seen_it(server):
    found = told(server)
    assert {tool['name'] for tool in found['tools']} == EVERYTHING
    for tool in found['tools']:
        assert len(tool['description']) > 30 and tool['outputSchema'], tool['name']
        assert set(tool['annotations']) >= {'readOnlyHint', 'openWorldHint'}
        for name, argument in tool['inputSchema'].get('properties', {}).items():
            assert argument.get('description') or name == 'content', (tool['name'], name)
    hints = {tool['name']: tool['annotations'] for tool in found['tools']}
    assert hints['read_file']['readOnlyHint'] and hints['delete_workspace']['destructiveHint']
    assert 'list_workspaces' in found['instructions']


def test_a_client_that_only_reads_is_offered_nothing_else(server):
    found = told(server, ('delete_workspace', {'workspace': 'work'}), options=('--read-only',))
    assert all(tool['annotations']['readOnlyHint'] for tool in found['tools']) and len(found['tools']) > 10
    assert found['results'][0]['error'] and server.call('GET', '/api/workspaces/work').status_code == 200


def test_a_confined_client_reaches_one_workspace(server):
    server.running('other')
    confined = ('--workspace', 'work')
    found = told(server, ('show_workspace', {'workspace': 'other'}),
                 ('show_workspace', {'workspace': 'work'}),
                 ('run_command', {'workspace': server.get('/api/workspaces/other')['id'], 'command': 'true'}),
                 ('start_task', {'workspace': 'other', 'task': 'true'}), options=confined)
    assert {tool['name'] for tool in found['tools']} == CONFINED
    assert [item['error'] for item in found['results']] == [True, False, True, True]
    assert 'confined to the workspace work' in found['results'][0]['text']
    session = json.loads(subprocess.check_output(
        [PROGRAM, '--url', url_of(server), 'run', '-d', '--json', 'other', 'true']))['sessionId']
    task = {'workspace': 'work', 'task': 'true'}
    mine = results(server, ('start_task', task))[0]['session']
    assert all('confined' in text for text in refusals(
        server, ('read_transcript', {'session': session}), ('start_task', {**task, 'session': session}),
        ('start_task', {**task, 'workspace': 'other', 'session': mine}), options=confined))


def test_a_workspace_from_its_making_to_its_end(server):
    found = told(server, ('create_workspace', {'name': 'made', 'env': {'COLOUR': 'red'}, 'ports': [3000]}),
                 ('list_workspaces', {}), ('list_templates', {}), ('stop_workspace', {'workspace': 'made'}),
                 ('start_workspace', {'workspace': 'made'}),
                 ('run_command', {'workspace': 'made', 'command': 'echo $COLOUR'}),
                 ('read_workspace_log', {'workspace': 'made', 'tail': 5}),
                 ('delete_workspace', {'workspace': 'made'}),
                 resources=[])
    assert not [item for item in found['results'] if item['error']], found['results']
    made, listed, templates, stopped, started, ran, log, deleted = (
        item['data'] for item in found['results'])
    assert made['status'] == 'running' and list(made['ports']) == ['3000'] and made['editor_url']
    assert 'made' in [item['name'] for item in listed['result']]
    assert 'agents' in [item['name'] for item in templates['result']]
    assert (stopped['status'], started['status']) == ('stopped', 'running')
    assert ran['stdout'] == 'red\n' and log['result'].count('\n') <= 5
    assert 'made is deleted' in deleted['result']
    assert server.call('GET', '/api/workspaces/made').status_code == 404


def test_commands_say_what_is_missing(server):
    work = {'workspace': 'work'}
    short, long, late, begun = results(
        server, ('run_command', {**work, 'command': 'cat; echo err >&2; exit 3', 'stdin': 'given'}),
        ('run_command', {**work, 'command': 'seq 100000'}),
        ('run_command', {**work, 'command': 'sleep 60', 'timeout': 0.5}),
        ('start_command', {**work, 'command': 'echo one; sleep 1; seq 20000; exit 5'}))
    assert (short['exit_code'], short['stdout'], short['stderr'], short['note']) == (3, 'given', 'err\n', '')
    assert 'characters left out' in long['stdout'] and long['stdout'].endswith('100000\n')
    assert 'read_file' in long['note'] and 'ended after 0.5 s' in late['note']
    server.until(lambda: server.get(f"/api/workspaces/work/exec/{begun['exec_id']}")['state'] == 'ended')
    first = results(server, ('read_command', {**work, 'exec_id': begun['exec_id']}))[0]
    rest, after = first['output'], first['next']
    while first['next'] - after or not rest.endswith('20000\n'):
        after = first['next']
        first = results(server, ('read_command', {**work, 'exec_id': begun['exec_id'], 'after': after}))[0]
        rest += first['output']
    assert rest == 'one\n' + ''.join(f'{number}\n' for number in range(1, 20001)) and first['exit_code'] == 5
    lasting = results(server, ('start_command', {**work, 'command': 'sleep 4201'}))[0]['exec_id']
    listed = results(server, ('list_commands', work), ('stop_command', {**work, 'exec_id': lasting}))[0]
    assert lasting in [item['exec_id'] for item in listed['result'] if item['command'] == 'sleep 4201']
    server.until(lambda: server.get(f'/api/workspaces/work/exec/{lasting}')['state'] == 'ended')


def test_files_are_written_read_edited_and_found(server):
    work = {'workspace': 'work'}
    text = ''.join(f'line {number}\n' for number in range(1, 2001))
    written, listed, first, more, edited, found, git = results(
        server, ('write_file', {**work, 'path': 'deep/er/file.txt', 'content': text}),
        ('list_files', {**work, 'path': 'deep/er'}), ('read_file', {**work, 'path': 'deep/er/file.txt'}),
        ('read_file', {**work, 'path': 'deep/er/file.txt', 'first_line': 1999}),
        ('edit_file', {**work, 'path': 'deep/er/file.txt', 'old': 'line 1500\n', 'new': 'line changed\n'}),
        ('search_files', {**work, 'pattern': 'chang.d', 'glob': '*.txt'}),
        ('git_status', work))
    assert written['size'] == len(text) and [item['name'] for item in listed['result']] == ['file.txt']
    assert (first['first_line'], first['last_line'], first['next_line']) == (1, 500, 501)
    assert more['content'] == 'line 1999\nline 2000\n' and more['next_line'] is None
    assert edited['size'] == len(text) - len('1500') + len('changed')
    assert 'deep/er/file.txt:1500:line changed' in found['result']
    assert git['repository'] is False  # there is no git in this image


def test_wrong_arguments_are_told_in_words_and_change_nothing(server):
    work = {'workspace': 'work'}
    results(server, ('write_file', {**work, 'path': 'kept', 'content': 'a a\0' * 10}))
    said = refusals(
        server, ('show_workspace', {'workspace': 'nobody'}), ('show_workspace', {}), ('no_such_tool', {}),
        ('create_workspace', {'name': 'no good'}), ('read_file', {**work, 'path': 'missing'}),
        ('read_file', {**work, 'path': ''}), ('list_files', {**work, 'path': 'kept'}),
        ('edit_file', {**work, 'path': 'kept', 'old': 'a', 'new': 'b'}),
        ('edit_file', {**work, 'path': 'kept', 'old': 'zz', 'new': 'b'}),
        ('read_file', {**work, 'path': 'kept'}),
        ('run_command', {**work, 'command': 'true', 'timeout': 9999}),
        ('run_command', {**work, 'command': 'true', 'cwd': 'nowhere'}),
        ('search_files', {**work, 'pattern': '('}), ('read_command', {**work, 'exec_id': 'exec-0'}),
        ('wait_for_task', {'session': 'nobody'}), ('git_diff', work))
    for text, part in zip(said, (
            "'nobody'", 'workspace', 'no_such_tool', 'name', 'there is no such file', 'folder', 'is a file',
            'stands in kept 20 times', 'read the file again', 'is no text', 'timeout', 'no such folder', '',
            '', 'nobody', 'no git repository'), strict=True):
        assert part in text and 'Traceback' not in text, (text, part)


def test_a_call_that_is_cancelled_ends_its_command(server, docker_client):
    told(server, ('run_command', {'workspace': 'work', 'command': 'sleep 4202'}, 1.5),
         ('list_workspaces', {}))
    seconds_until(lambda: not running(docker_client, server.container, 'sleep 4202'), timeout=10)


def test_a_task_is_given_watched_and_read(server, docker_client):
    step = json.dumps({'type': 'progress', 'data': {'step': 1, 'total': 2, 'message': 'Half of it'}})
    task = f"sleep 6; echo '{step}'; echo done"
    session = results(server, ('start_task', {'workspace': 'work', 'task': task}))[0]['session']
    shell(docker_client, server.container, 'echo logged >/proc/1/fd/1', user='root')
    found = told(server, ('wait_for_task', {'session': session}), ('read_transcript', {'session': session}),
                 resources=[f'agentbackend://sessions/{session}/transcript', 'agentbackend://workspaces/work/log'])
    assert found['results'][0]['data']['state'] == 'completed' and [1, 2, 'Half of it'] in found['progress']
    assert any('done' in line for line in found['results'][1]['data']['lines'])
    assert 'done' in found['resources'][0] and 'logged' in found['resources'][1]
    lasting = results(server, ('start_task', {'workspace': 'work', 'task': 'sleep 4203'}))[0]['session']
    waited, listed, _ = results(server, ('wait_for_task', {'session': lasting, 'timeout': 1}),
                                ('list_tasks', {'workspace': 'work'}),
                                ('cancel_task', {'session': lasting}))
    assert lasting in [item['session'] for item in listed['result'] if item['state'] == 'running']
    assert waited['state'] == 'running'
    server.until(lambda: server.get(f'/api/agent/sessions/{lasting}')['state'] == 'cancelled')


def test_it_is_served_over_http_to_those_with_the_token_on_this_machine(guarded):
    port = free_port()
    process = subprocess.Popen([PROGRAM, '--url', url_of(guarded), 'mcp', '--http', str(port)],
                               env={**os.environ, 'API_TOKEN': 'open sesame'}, stderr=subprocess.PIPE)

    def status(**headers):
        request = urllib.request.Request(f'http://127.0.0.1:{port}/mcp', b'{}', {
            'Content-Type': 'application/json', 'Accept': 'application/json, text/event-stream', **headers})
        try:
            with contextlib.closing(urllib.request.urlopen(request, timeout=10)) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code
        except urllib.error.URLError:
            return 0
    try:
        guarded.until(lambda: status() == 401)
        token = {'Authorization': 'Bearer open sesame'}
        assert status(Authorization='Bearer wrong') == 401
        assert status(**token, Host='evil.example.org') in (403, 421)
        assert status(**token, Origin='http://evil.example.org') == 403
        with contextlib.closing(Client(f'http://127.0.0.1:{port}/mcp', 'open sesame')) as client:
            found = client.told(('list_workspaces', {}))
        assert found['results'][0]['data'] == {'result': []}
    finally:
        process.terminate()
        process.communicate()


def test_a_server_that_is_away_or_refuses_is_told_before_anything_is_served(server, guarded):
    def said(**env):
        done = subprocess.run([PROGRAM, 'mcp'], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              timeout=60, env={**os.environ, **env})
        assert 'Traceback' not in done.stderr
        return done.returncode, done.stderr
    assert said(AGENTBACKEND_URL='http://127.0.0.1:1')[0] == 4
    assert 'API_TOKEN' in said(AGENTBACKEND_URL=url_of(guarded))[1]


# Claude Code

@pytest.fixture(scope='module')
def claude(docker_client, base_image, tmp_path_factory):
    """The real Claude Code, on this machine."""
    folder = tmp_path_factory.mktemp('claude')
    container = docker_client.containers.create(base_image)
    try:
        archive = io.BytesIO(b''.join(container.get_archive('/usr/local/bin/claude')[0]))
    finally:
        container.remove()
    with tarfile.open(fileobj=archive) as file:
        file.extractall(folder, filter='tar')
    yield folder / 'claude'
    (folder / 'claude').unlink()


@pytest.mark.parametrize('form', ('command', 'block'))
def test_claude_code_makes_a_workspace_works_in_it_and_deletes_it(server, claude, tmp_path, form):
    """In both forms that the README has for it."""
    readme = (ROOT / 'README.md').read_text().partition('## For agents elsewhere: MCP')[2]
    with FakeAnthropic('127.0.0.1') as fake:
        env = {**os.environ, 'HOME': str(tmp_path), 'ANTHROPIC_BASE_URL': fake.url,
               'ANTHROPIC_API_KEY': 'sk-x', 'CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC': '1',
               'AGENTBACKEND_URL': url_of(server),
               'PATH': os.pathsep.join([str(claude.parent), str(Path(PROGRAM).parent), os.environ['PATH']])}

        def run(*words):
            return subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=env,
                                  stdin=subprocess.DEVNULL)
        if form == 'command':
            added = run('sh', '-c', re.search('```sh\n(claude mcp add .*)\n```', readme)[1])
            assert added.returncode == 0, added
            options = []
        else:
            block = re.search('<!-- mcp -->\n```json\n(.*?)```', readme, re.DOTALL)[1]
            options = ['--strict-mcp-config', '--mcp-config',
                       block.replace('http://127.0.0.1:3100', url_of(server))]
        done = run('claude', '-p', 'Try the workspaces. [script:workspaces]', '--allowedTools',
                   'mcp__agentbackend', *options)
        assert done.returncode == 0 and 'by-claude is deleted' in done.stdout, (done.stdout, done.stderr)
        given = json.dumps([item['body'].get('messages') for item in fake.requests])
    assert 'it runs: 42' in given and 'running' in given
    assert server.call('GET', '/api/workspaces/by-claude').status_code == 404
