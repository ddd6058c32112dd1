"""What people and agents find in a workspace of the real image: its shells, its editor, its ports, and what
is kept of it."""
import base64
import os
import re
import shlex
import shutil
import subprocess

import docker
import pytest
import requests
from agents import begin, ended
from conftest import ROOT, Served, remove_objects
from playwright.sync_api import expect, sync_playwright

ODD = 'quotes " \' ` $HOME $(id) \\ ! # ~ * and\ttabs,\nlines, ünïcode 日本 🧭 and an end \n'
HOSTILE = {
    'NODE_OPTIONS': '--require ./does-not-exist.js', 'LD_PRELOAD': '/nowhere/lib.so',
    'LD_LIBRARY_PATH': '/nowhere', 'PATH': '/opt/tool/bin:$PATH', 'BASH_ENV': '/nowhere/env',
    'ENV': '/nowhere/env', 'PYTHONHOME': '/nowhere', 'CDPATH': '/', 'POSIXLY_CORRECT': '1', 'PORT': '1',
    'PASSWORD': 'other', 'GIT_DIR': '/nowhere', 'LANG': 'de_DE.UTF-8', 'TZ': 'Asia/Tokyo', 'EMPTY': ''}
TOOLS = ('rsync', 'rg', 'jq', 'tmux', 'vim', 'zip', 'unzip', 'file', 'patch', 'make', 'ps', 'lsof', 'python3',
         'gcc', 'g++', 'git', 'git-lfs', 'curl', 'nano', 'less', 'xz', 'ssh', 'socat', 'code', 'node', 'npm',
         'npx', 'claude', 'pkg-config')
ADDON = {
    'package.json': '{"name": "addon", "version": "1.0.0", "private": true}',
    'binding.gyp': '{"targets": [{"target_name": "addon", "sources": ["addon.c"]}]}',
    'addon.c': '#include <node_api.h>\n'
               'static napi_value start(napi_env env, napi_value exports) {\n'
               '  napi_value text; napi_create_string_utf8(env, "native", NAPI_AUTO_LENGTH, &text);\n'
               '  return text; }\n'
               'NAPI_MODULE(addon, start)\n'}


@pytest.fixture(scope='module')
def key(tmp_path_factory):
    path = tmp_path_factory.mktemp('key') / 'id'
    subprocess.run(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-C', 'me', '-f', path], check=True)
    return path


@pytest.fixture(scope='module')
def server(tmp_path_factory, docker_client, base_image, key):
    """A server with workspaces that are made at once: `hostile` with variables that rule what runs, `plain`,
    and `caged` for an agent."""
    served = Served(tmp_path_factory.mktemp('shells'), ROOT / 'templates', DEFAULT_TEMPLATE='blank',
                    DEFAULT_AGENT='command',
                    AGENT_COMMAND=shlex.join(['sh', '-c',
                                              'cat >/dev/null; printenv ODD | base64 -w0'])).start()
    try:
        login = {'sshPublicKeys': [f" \n# mine\n{key.with_suffix('.pub').read_text()}\r\n"]}
        served.create('hostile', env=HOSTILE | {'ODD': ODD}, setup='printenv ODD >~/from-setup', **login)
        served.create('plain', ports=[5173, 5174, 5175, 5176], memory='512m', cpus=1, **login)
        served.create('caged', type='agent', **login)
        for name in ('hostile', 'plain', 'caged'):
            ready(served, name)
        yield served
    finally:
        served.stop()
        print(served.log.read_text()[-8000:])
        remove_objects(docker_client, served.instance)


def ready(server, name):
    workspace = server.wait_status(name, 'running', 'error', timeout=180)
    assert workspace['status'] == 'running', workspace
    return workspace


def ssh_command(server, name, key, *options):
    known = server.folder / 'known_hosts'
    return [*server.get(f'/api/workspaces/{name}')['sshCommand'].split(), '-i', str(key), '-o',
            f'UserKnownHostsFile={known}',
            '-o', 'StrictHostKeyChecking=accept-new', '-o', 'BatchMode=yes', '-o', 'LogLevel=ERROR', *options]


def ssh(server, name, key, *words, stdin=None, env=None, timeout=60):
    """Return what a command over SSH prints on stdout and stderr; `words` may begin with options of ssh."""
    done = subprocess.run([*ssh_command(server, name, key), *words], input=stdin, capture_output=True,
                          timeout=timeout, text=True,
                          env={**os.environ, 'TERM': 'xterm', **(env or {})})
    return done.stdout, done.stderr


def decoded(text):
    return base64.b64decode(text).decode()


def test_nobody_complains_in_the_log_of_who_looked_whether_it_is_ready(server):
    log = server.call('GET', '/api/workspaces/caged/logs').text
    assert 'Server listening on' in log and 'Connection' not in log and 'kex_' not in log


# Variables

def test_a_variable_is_what_was_given_whatever_is_in_it_in_every_shell_and_task(server, key):
    show = 'printenv ODD | base64 -w0'
    places = {'a command': decoded(ssh(server, 'hostile', key, show)[0]),
              'a command with a terminal': decoded(ssh(server, 'hostile', key, '-tt',
                                                       f'{show} 2>/dev/null')[0]
                                                   .split('\n')[-1]),
              'set-up': ssh(server, 'hostile', key, 'cat ~dev/from-setup')[0]}
    login = ssh(server, 'hostile', key, '-tt', stdin=f'echo "<$({show})>"; exit\n')[0]
    places['a login'] = decoded(re.findall('<([A-Za-z0-9+/=]+)>', login)[-1])
    session = ended(server, begin(server, 'tell', workspace='hostile')['sessionId'])
    places['a task'] = decoded(session['runs'][0]['result'] or told(server, session['id']))
    assert places == dict.fromkeys(places, ODD + '\n')


def told(server, session):
    events = server.get(f'/api/agent/sessions/{session}/events')['events']
    return [event['data']['message'] for event in events if event['type'] == 'message'][0]


def test_variables_that_rule_node_the_loader_and_the_shell_are_the_users_and_break_nothing(server, key,
                                                                                           docker_client):
    names = [name for name in HOSTILE if name != 'PATH']
    found, _ = ssh(server, 'hostile', key, f"for name in {' '.join(names)}; do printenv $name; done")
    assert found.splitlines() == [HOSTILE[name] for name in names]
    assert ssh(server, 'hostile', key, 'echo $PATH')[0].startswith('/opt/tool/bin:/usr/local/')
    container = docker_client.containers.get(server.get('/api/workspaces/hostile')['containerId'])
    _, said = container.exec_run(['sh', '-c', 'for p in $(pgrep -f "code-server|sshd -D"); do '
                                  'tr "\\0" "\\n" </proc/$p/environ; done'])
    assert 'WORKSPACE_ID=' in said.decode()
    assert not re.search('nowhere|does-not-exist|/opt/tool', said.decode())


def test_a_variable_is_changed_for_shells_that_begin_from_then_on(server, key):
    answer = server.call('PATCH', '/api/workspaces/plain', {'env': {'LATER': ODD, 'NODE_ENV': 'x'}})
    assert answer.status_code == 200 and answer.json()['data']['env'] == ['LATER', 'NODE_ENV']
    assert decoded(ssh(server, 'plain', key, 'printenv LATER | base64 -w0')[0]) == ODD + '\n'
    server.call('PATCH', '/api/workspaces/plain', {'env': {'NODE_ENV': None}})
    assert ssh(server, 'plain', key, 'printenv NODE_ENV || echo none')[0] == 'none\n'


# Locales and tools

@pytest.mark.parametrize('env',
                         [{'LC_ALL': 'de_DE.UTF-8'}, {'LANG': 'en_US.UTF-8', 'LC_ALL': ''},
                          {'LC_CTYPE': 'UTF-8'}],
                         ids=['LC_ALL', 'LANG', 'LC_CTYPE'])
def test_the_locale_of_a_client_harms_no_session(server, key, env):
    command = "locale charmap; printf 'ü' | wc -m; bash -lc true; perl -e 1; python3 -c 'print(\"ü\")'"
    assert ssh(server, 'plain', key, '-o', 'SendEnv=LANG LC_*', command, env=env) == ('UTF-8\n1\nü\n', '')
    printed, _ = ssh(server, 'plain', key, '-tt', '-o', 'SendEnv=LANG LC_*',
                     stdin="echo 'ü'; printf '%q\\n' ü; exit\n", env=env)
    assert 'ü\nü\n' in printed and 'locale' not in printed and '303' not in printed


def test_a_locale_of_the_environment_that_is_not_there_harms_no_session(server, key):
    assert ssh(server, 'hostile', key,
               "unset LD_PRELOAD; locale charmap; date +%Z; printf 'ü' | wc -m")[0] == 'UTF-8\nJST\n1\n'


def test_what_is_reached_for_first_is_there_also_where_nothing_may_be_installed(server, key):
    printed, _ = ssh(server, 'caged', key,
                     f"for tool in {' '.join(TOOLS)}; do command -v $tool >/dev/null || echo $tool; done; "
                     'getent hosts host.docker.internal | wc -l; sudo -n true && echo sudo')
    assert printed == '1\n'


def test_a_native_module_is_built_without_a_download(server, key):
    for name, text in ADDON.items():
        ssh(server, 'caged', key, f'mkdir -p ~/addon && cat >~/addon/{name}', stdin=text)
    build = 'cd ~/addon && npm install --offline --foreground-scripts >log 2>&1 || cat log'
    printed, complaints = ssh(server, 'caged', key, f'{build}; node -p "require(\'./build/Release/addon\')"',
                              timeout=240)
    assert printed == 'native\n', (printed, complaints)


def test_files_are_brought_by_rsync(server, key, tmp_path):
    (tmp_path / 'up').mkdir()
    (tmp_path / 'up' / 'with spaces ü.txt').write_text('brought\n')
    *command, target = ssh_command(server, 'plain', key)[:6]
    where = ssh_command(server, 'plain', key)
    target = next(word for word in where if '@' in word)
    shell = shlex.join(word for word in where if word != target)
    subprocess.run(['rsync', '-az', '-e', shell, f'{tmp_path}/up/', f'{target}:/workspace/plain/brought/'],
                   check=True, timeout=60)
    assert ssh(server, 'plain', key, 'cat "$PROJECT_DIR/brought/with spaces ü.txt"')[0] == 'brought\n'


# The editor

@pytest.fixture
def editor(server):
    """The page of the editor of `hostile`, logged in."""
    workspace = server.get('/api/workspaces/hostile')
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which('chromium')
                                             or shutil.which('google-chrome'),
                                             args=['--no-sandbox', '--disable-gpu'])
        page = browser.new_page()
        page.set_default_timeout(60_000)
        page.goto(workspace['codeServerUrl'])
        page.fill('input[type=password]', workspace['codeServerPassword'])
        page.press('input[type=password]', 'Enter')
        expect(page.locator('.monaco-workbench .explorer-viewlet')).to_contain_text('README.md',
                                                                                    timeout=60_000)
        yield page
        browser.close()


def test_the_editors_terminal_has_the_variables_and_its_command_opens_files_in_it(server, key, editor):
    editor.keyboard.press('Control+Backquote')
    editor.locator('.terminal.xterm').click()
    editor.keyboard.type('printenv ODD >~dev/from-editor; code /etc/hostname\n')
    server.until(lambda: ssh(server, 'hostile', key, 'cat ~dev/from-editor')[0] == ODD + '\n', 60)
    expect(editor.locator('.tabs-container')).to_contain_text('hostname', timeout=60_000)
    printed = ssh(server, 'hostile', key, 'code ~dev/from-setup')
    expect(editor.locator('.tabs-container'), str(printed)).to_contain_text('from-setup', timeout=60_000)


# Ports

def serve(server, key, port, address):
    """Begin a server in `plain` on an address of it that says on which."""
    code = f'require("http").createServer((_, a) => a.end("{address}")).listen({port}, "{address}")'
    ssh(server, 'plain', key,
        f"setsid node -e '{code}' >/dev/null 2>&1 </dev/null & echo $! >~/server-{port}")


def answer_of(server, port):
    try:
        return requests.get(f"http://127.0.0.1:{server.get('/api/workspaces/plain')['ports'][str(port)]}/",
                            timeout=2).text
    except requests.RequestException:
        return None


def test_a_server_that_listens_on_localhost_only_is_reached_at_its_published_port(server, key, docker_client):
    # Engines whose networks have no IPv6 switch it off, but for the relay's sake it is tried.
    inspected = docker_client.api.inspect_container(server.get('/api/workspaces/plain')['containerId'])
    subprocess.run(['nsenter', f"--net=/proc/{inspected['State']['Pid']}/ns/net", 'sh', '-c',
                    'echo 0 >/proc/sys/net/ipv6/conf/lo/disable_ipv6'], check=True)
    for port, address in ((5173, '127.0.0.1'), (5174, '::1'), (5175, 'localhost'), (5176, '0.0.0.0')):
        serve(server, key, port, address)
    for port, address in ((5173, '127.0.0.1'), (5174, '::1'), (5175, 'localhost'), (5176, '0.0.0.0')):
        server.until(lambda port=port, address=address: answer_of(server, port) == address, 20)
    assert 'localhost:5173 only' in server.call('GET', '/api/workspaces/plain/logs').text
    ssh(server, 'plain', key, 'kill $(cat ~/server-5173)')
    server.until(lambda: answer_of(server, 5173) is None, 20)
    server.until(lambda: not ssh(server, 'plain', key, 'pgrep -f TCP4-LISTEN:5173')[0], 20)
    serve(server, key, 5173, '0.0.0.0')
    server.until(lambda: answer_of(server, 5173) == '0.0.0.0', 20)


# Resources, and what is kept

# As the newer and the older way of the kernel show them.
LIMITS = """cd /sys/fs/cgroup
cat memory.max 2>/dev/null || cat memory/memory.limit_in_bytes
cat cpu.max 2>/dev/null || echo $(cat cpu/cpu.cfs_quota_us cpu/cpu.cfs_period_us)
df -B1 --output=size /dev/shm
"""


def limits(server, key):
    """Return (memory, cores, shared memory) as they are seen in `plain`."""
    memory, cores, _, shared = ssh(server, 'plain', key, LIMITS)[0].splitlines()
    quota, period = map(int, cores.split())
    return int(memory), quota / period, int(shared)


def test_limits_are_changed_at_once_and_ports_at_the_next_start(server, key):
    assert limits(server, key) == (512 * 2**20, 1, 128 * 2**20)
    answer = server.call('PATCH', '/api/workspaces/plain',
                         {'memory': '640m', 'cpus': 1.5, 'ports': [5173, 8080]})
    assert answer.status_code == 200, answer.text
    assert answer.json()['data']['pending'] == ['ports']
    assert limits(server, key)[:2] == (640 * 2**20, 1.5)
    found = server.get('/api/workspaces/plain')
    assert (found['memory'], found['cpus'], set(found['ports'])) == (640 * 2**20, 1.5,
                                                                     {'5173', '5174', '5175', '5176'})


OWN = """mkdir -p ~/tool ~/.config ~/.local/share/code-server/User
echo "alias mine='echo alias'" >>~/.bashrc
for file in ~/.bash_history ~/.config/own ~/.local/share/code-server/User/settings.json; do
    echo own >$file
done
git config --global user.name Kept
echo kept >$PROJECT_DIR/note.txt
cd ~/tool
echo '{"name": "tool", "version": "1.0.0", "bin": "tool.js"}' >package.json
printf '#!/usr/bin/env node\nconsole.log("a tool")\n' >tool.js
npm install --offline -g . >&2
"""
SHOW_OWN = """tool
cat ~/.bash_history ~/.config/own ~/.local/share/code-server/User/settings.json $PROJECT_DIR/note.txt
git config user.name
bash -ic mine 2>/dev/null
printenv LATER | wc -l
"""


def test_what_a_person_would_miss_is_kept_when_the_container_is_removed(server, key, docker_client):
    before = server.get('/api/workspaces/plain')
    ssh(server, 'plain', key, OWN)
    assert server.call('POST', '/api/workspaces/plain/stop').status_code == 202
    server.wait_status('plain', 'stopped')
    docker_client.api.remove_container(before['containerId'])
    told = server.until(lambda: server.get('/api/workspaces/plain')['error'], 20)
    assert 'removed outside' in told and 'start makes a new container' in told
    assert server.get('/api/workspaces/plain')['status'] == 'stopped'
    assert server.call('POST', '/api/workspaces/plain/start').status_code == 202
    after = ready(server, 'plain')
    assert after['containerId'] != before['containerId'] and after['error'] is None
    # ssh would refuse another host key here.
    printed, complaints = ssh(server, 'plain', key, SHOW_OWN)
    assert printed == 'a tool\nown\nown\nown\nkept\nKept\nalias\n3\n', (printed, complaints)
    assert (set(after['ports']), after['pending'], after['memory']) == ({'5173', '8080'}, [], 640 * 2**20)
    assert after['ports']['5173'] == before['ports']['5173']
    assert limits(server, key) == (640 * 2**20, 1.5, 160 * 2**20)


def test_the_volumes_of_a_workspace_go_with_it(server, docker_client):
    identity = server.get('/api/workspaces/caged')['id']
    names = [f'{server.instance}-{identity}', f'{server.instance}-{identity}-home']
    assert all(docker_client.api.inspect_volume(name) for name in names)
    assert server.call('DELETE', '/api/workspaces/caged').status_code == 200
    for name in names:
        with pytest.raises(docker.errors.NotFound):
            docker_client.api.inspect_volume(name)
