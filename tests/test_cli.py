"""The command line, run as a program against a real server: what it prints, how it ends, and what comes back
by itself."""
import contextlib
import fcntl
import filecmp
import hashlib
import http.server
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import tarfile
import termios
import threading
import time
from pathlib import Path

import pexpect
import pexpect.fdpexpect
import pytest
from agents import restarted, running, seconds_until, served_agents, shell
from conftest import ROOT

PROGRAM = str(Path(sys.executable).with_name('agentbackend'))
# Whoever runs the tests in the background may have told all below it to ignore ^C.
MINDFUL = ['env', '--default-signal=INT', PROGRAM]
VERBS = ('cancel', 'completion', 'cp', 'create', 'diff', 'events', 'exec', 'follow', 'health', 'logs', 'ls',
         'mcp', 'open', 'output', 'restart', 'rm', 'run', 'serve', 'sessions', 'shell', 'show', 'start',
         'stop', 'templates')


@pytest.fixture(scope='module')
def server(tmp_path_factory, agents_template, docker_client):
    with served_agents(tmp_path_factory.mktemp('cli'), agents_template[0], docker_client,
                       DEFAULT_TEMPLATE='agents', AGENT_COMMAND='sh', DEFAULT_AGENT='command') as served:
        yield served


def environment(server, **more):
    """Return the environment of a command line that knows where the server is, and nothing else of it."""
    others = {key: value for key, value in os.environ.items() if key not in ('API_TOKEN', 'AGENTBACKEND_URL')}
    return {**others, 'AGENTBACKEND_URL': f'http://127.0.0.1:{server.port}', 'PYTHONUNBUFFERED': '1', **more}


def agentbackend(server, *words, stdin=b'', timeout=60, env=None, **options):
    """Run the command line to its end."""
    given = {'stdin': subprocess.DEVNULL} if stdin is None else {'input': stdin}
    return subprocess.run([PROGRAM, *words], env=environment(server, **(env or {})), capture_output=True,
                          timeout=timeout, **given, **options)


def printed(server, *words, **options):
    """Return what it printed, when all went well."""
    done = agentbackend(server, *words, **options)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


@contextlib.contextmanager
def begun(server, *words, **options):
    """Begin it, with pipes for its outputs."""
    process = subprocess.Popen([*MINDFUL, *words], env=environment(server), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, **{'stdin': subprocess.DEVNULL, **options})
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def failed(server, *words, code, **options):
    """Return what it said when it ended with a code; it said it in few lines, and without a traceback."""
    done = agentbackend(server, *words, **options)
    said = done.stderr.decode()
    assert done.returncode == code, said
    assert 'Traceback' not in said and said.count('\n') <= 4, said
    return said


# What it is

def test_it_imports_nothing_of_the_server():
    text = ('import sys, _agentbackend.cli\n'
            "print(*sorted(name for name in sys.modules if name.split('.')[0] in ('gevent', 'docker', "
            "'bottle', 'jsonschema', 'websocket', 'agentbackend', '_agentbackend', 'mcp')))")
    assert subprocess.check_output([sys.executable, '-c', text], cwd=ROOT, text=True).split() == [
        '_agentbackend', *(f'_agentbackend.{name}' for name in ('cli', 'console', 'remote'))]


@pytest.fixture(scope='module')
def helps():
    """What each verb says of itself, all in one process: {verb: text}."""
    text = ('import contextlib, io, json, sys; from _agentbackend.cli import cli; told = {}\n'
            'for verb in sys.argv[1:]:\n'
            '    with contextlib.redirect_stdout(io.StringIO()) as said:\n'
            '        cli.main([verb, "--help"], prog_name="agentbackend", standalone_mode=False)\n'
            '    told[verb] = said.getvalue()\n'
            'print(json.dumps(told))')
    return json.loads(subprocess.check_output([sys.executable, '-c', text, *VERBS], cwd=ROOT))


@pytest.mark.parametrize('verb', VERBS)
def test_the_help_of_each_verb_has_an_example(helps, verb):
    told = helps[verb]
    assert f'agentbackend {verb}' in told.partition('Example:')[2] and '--json' in told


def test_the_help_names_each_verb_and_the_exit_codes():
    told = subprocess.check_output([PROGRAM, '--help'], text=True)
    verbs = told.partition('Commands:')[2].partition('Exit codes:')[0]
    assert {line.split()[0] for line in verbs.splitlines() if line[2:3].strip()} == set(VERBS)
    assert [line.split()[0] for line in told.partition('Exit codes:')[2].splitlines()[1:7]] == [
        '0', '1', '2', '3', '4', '130']


# Workspaces

def test_a_workspace_from_its_making_to_its_end(server, tmp_path):
    key = tmp_path / 'key.pub'
    subprocess.run(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', tmp_path / 'key'], check=True)
    done = agentbackend(server, 'create', 'journey', '--wait', '--type', 'persistent', '--port', '3000',
                        '--env', 'COLOUR=red=blue', '--ttl', '3600', '--ssh-key', str(key),
                        '--label', 'team=web')
    assert done.returncode == 0, done.stderr
    told = server.get('/api/workspaces/journey')
    assert told['status'] == 'running' and told['env'] == ['COLOUR'] and told['ttl'] == 3600
    assert told['labels'] == {'team': 'web'} and told['sshKeys'] == 1 and list(told['ports']) == ['3000']
    for part in (told['id'], told['codeServerUrl'], told['codeServerPassword'], told['sshCommand']):
        assert part in done.stdout.decode()
    listed = printed(server, 'ls', '--label', 'team').splitlines()
    assert listed[0].split()[:3] == ['NAME', 'STATUS', 'TYPE'] and len(listed) == 2
    assert listed[1].split()[:3] == ['journey', 'running', 'persistent']
    assert printed(server, 'exec', 'journey', 'echo $COLOUR') == 'red=blue\n'
    assert printed(server, 'stop', 'journey', '--wait') == 'journey is stopped\n'
    assert printed(server, 'start', 'journey', '--wait') == 'journey is running\n'
    assert printed(server, 'restart', 'journey', '--wait') == 'journey is running\n'
    changing = {'resources': 0, 'lastActivityAt': 0}
    shown = json.loads(printed(server, 'show', 'journey', '--json'))
    assert shown | changing == server.get('/api/workspaces/journey') | changing
    assert printed(server, 'rm', 'journey') == 'journey is deleted\n'
    assert 'journey' in failed(server, 'show', 'journey', code=3)


def test_how_far_it_is_comes_as_lines_where_nobody_looks_and_a_failure_says_why(make_server, own_templates):
    folder, add = own_templates
    add('steps', 'RUN ["/bin/busybox", "true"]', 'RUN ["/bin/busybox", "false"]')
    server = make_server(TEMPLATES_DIR=str(folder))
    done = agentbackend(server, 'create', 'slow', '--template', 'steps', '--wait')
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 1 and 'returned a non-zero code' in lines[-1], lines
    assert any('Step 2/' in line for line in lines), lines
    assert not any('\r' in line or '\x1b' in line for line in lines)


def test_lists_of_the_server(server):
    assert printed(server, 'health').splitlines()[0].split() == ['status', 'healthy']
    assert json.loads(printed(server, 'health', '--json'))['docker'] == 'connected'
    assert 'agents' in printed(server, 'templates')
    assert printed(server, 'open', env={'BROWSER': 'true'}).strip() == f'http://127.0.0.1:{server.port}/'
    assert '/?folder=/workspace/work' in printed(server, 'open', 'work', env={'BROWSER': 'true'})


# What goes wrong

def test_what_is_wrong_is_one_line_that_says_what_to_do(server, tmp_path):
    assert "'nobody'" in failed(server, 'show', 'nobody', code=3) and 'agentbackend ls' in failed(
        server, 'logs', 'nobody', code=3)
    assert 'agentbackend sessions' in failed(server, 'follow', 'nobody', code=3)
    assert 'there is no such file' in failed(server, 'cp', 'work:nowhere', str(tmp_path), code=3)
    assert 'no such folder' in failed(server, 'exec', '--cwd', 'nowhere', 'work', 'true', code=2)
    assert 'name' in failed(server, 'create', 'no good', code=2)
    assert 'NAME=VALUE' in failed(server, 'create', 'fine', '--env', 'nothing', code=2)
    assert 'No such command' in failed(server, 'launch', code=2)
    assert 'COMMAND' in failed(server, 'exec', 'work', code=2)
    assert 'needs a terminal' in failed(server, 'exec', '-t', 'work', 'vi', code=2)
    assert 'needs a terminal' in failed(server, 'shell', 'work', code=2)
    assert 'in a workspace' in failed(server, 'cp', 'here', 'there', code=2)
    assert 'no address' in failed(server, '--url', 'nonsense', 'ls', code=2)
    assert '--token-file' in failed(server, '--token-file', str(tmp_path / 'none'), 'ls', code=2)


def test_a_server_that_is_away_or_none_of_ours_or_of_another_version_is_told_apart(server, tmp_path):
    assert 'agentbackend serve' in failed(server, '--url', 'http://127.0.0.1:1', 'ls', code=4)

    class Other(http.server.BaseHTTPRequestHandler):
        answers = {'/health': (200, b'{"status": "healthy", "version": "0.1.0", "docker": "connected", '
                                    b'"uptime": 1}'),
                   '/api/templates': (404, b'{"success": false, "error": "no", "code": "NOT_FOUND"}')}

        def do_GET(self):
            status, body = self.answers.get(self.path, (200, b'<html>'))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass
    other = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Other)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    with contextlib.closing(other.socket):
        url = f'http://127.0.0.1:{other.server_port}'
        assert 'no Agent Backend' in failed(server, '--url', url, 'ls', code=4)
        assert 'its version is 0.1.0' in failed(server, '--url', url, 'templates', code=1)
        other.shutdown()


def test_a_token_is_taken_from_the_environment_or_a_file(guarded, tmp_path):
    assert 'API_TOKEN' in failed(guarded, 'ls', code=1)
    assert "not the server's" in failed(guarded, 'ls', code=1, env={'API_TOKEN': 'wrong'})
    assert printed(guarded, 'ls', env={'API_TOKEN': 'open sesame'}).startswith('NAME')
    (tmp_path / 'token').write_text('open sesame\n')
    assert printed(guarded, '--token-file', str(tmp_path / 'token'), 'ls').startswith('NAME')


def test_a_reader_that_has_enough_ends_it_quietly(server):
    line = f'{PROGRAM} exec work "yes | head -c 5000000" | head -1; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(['bash', '-c', line], env=environment(server), capture_output=True, text=True,
                          timeout=60)
    assert done.stdout.splitlines()[0] == 'y' and not done.stderr


# In a workspace

def test_a_command_has_its_own_exit_code_and_both_outputs(server):
    done = agentbackend(server, 'exec', 'work', 'echo out; echo err >&2; printf "\\377\\n"; exit 7')
    assert (done.returncode, done.stdout, done.stderr) == (7, b'out\n\xff\n', b'err\n')
    assert printed(server, 'exec', 'work', '--', 'printf', '%s|', 'a b', '--json', '$H') == 'a b|--json|$H|'
    assert printed(server, 'exec', '-e', 'ONE=1', '--cwd', '/tmp', 'work', 'echo $ONE; pwd') == '1\n/tmp\n'
    assert agentbackend(server, 'exec', '--timeout', '0.5', 'work', 'sleep 60').returncode == 137
    lines = printed(server, 'exec', '--json', 'work', 'echo one').splitlines()
    assert [json.loads(line)['type'] for line in lines] == ['output', 'exit']


def test_trees_pass_through_pipes_both_ways(server, tmp_path):
    here, back = tmp_path / 'here', tmp_path / 'back'
    (here / 'deep').mkdir(parents=True)
    back.mkdir()
    for number in range(1000):
        (here / 'deep' / f'file {number}').write_text(f'{number}\n' * number)
    (here / 'large').write_bytes(os.urandom(30_000_000))
    line = (f'cd {here} && tar c . | {PROGRAM} exec work -- sh -c "mkdir -p tree && tar x -C tree" && '
            f'cd {back} && {PROGRAM} exec work -- tar c -C tree . | tar x')
    done = subprocess.run(['bash', '-c', line], env=environment(server), capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    files = [path.relative_to(here) for path in here.rglob('*') if path.is_file()]
    compared = filecmp.cmpfiles(here, back, files, shallow=False)
    assert len(compared[0]) == 1001 and not compared[1] and not compared[2]


@pytest.mark.parametrize('sign', (signal.SIGINT, signal.SIGTERM, signal.SIGKILL))
def test_whatever_ends_it_ends_its_command_too(server, docker_client, sign):
    with begun(server, 'exec', 'work', 'sleep 4001 & sleep 4002') as process:
        server.until(lambda: len(running(docker_client, server.container, 'sleep 400')) >= 2)
        process.send_signal(sign)
        assert process.wait(10) == (130 if sign == signal.SIGINT else -sign)
    server.until(lambda: not running(docker_client, server.container, 'sleep 400'))


def test_a_detached_command_is_read_later(server):
    exec_id = printed(server, 'exec', '-d', 'work', 'echo one; sleep 2; echo two; exit 5').strip()
    assert exec_id in printed(server, 'output', 'work')
    done = agentbackend(server, 'output', '-f', 'work', exec_id)
    assert (done.returncode, done.stdout) == (5, b'one\ntwo\n')


# Terminals

class Child(pexpect.fdpexpect.fdspawn):
    """The command line in a terminal of its own. pexpect's own way to start it does not go together with
    gevent."""

    def __init__(self, server, words, size):
        master, slave = pty.openpty()
        super().__init__(master, timeout=30)
        self.resize(*size)
        self.process = subprocess.Popen(['setsid', '--ctty', '--wait', *MINDFUL, *words], stdin=slave,
                                        stdout=slave, stderr=slave, env=environment(server))
        os.close(slave)

    def resize(self, rows, columns):
        fcntl.ioctl(self.child_fd, termios.TIOCSWINSZ, struct.pack('HHHH', rows, columns, 0, 0))

    def end(self):
        """Read it to its end, and return its exit code."""
        self.expect(pexpect.EOF)
        return self.process.wait(10)


@contextlib.contextmanager
def at_a_terminal(server, *words, size=(24, 80)):
    child = Child(server, words, size)
    try:
        yield child
    finally:
        child.process.kill()
        child.process.wait()
        os.close(child.child_fd)


def test_a_shell_is_found_again_by_its_name(server):
    with at_a_terminal(server, 'shell', 'work', '--name', 'mine') as child:
        child.expect('work')  # its prompt
        child.sendline('kept=yes; stty size')
        child.expect('24 80')
        child.resize(30, 100)
        child.sendline('sleep 0.5; stty size')
        child.expect('30 100')
        child.send(b'\x1d')
        assert child.end() == 0
    with at_a_terminal(server, 'shell', 'work', '--name', 'mine', size=(1, 1)) as child:
        child.resize(24, 80)
        child.sendline('echo "it is $kept"; exit 9')
        child.expect('it is yes')
        assert child.end() == 9


def test_a_shell_comes_back_after_its_server_died(server):
    with at_a_terminal(server, 'shell', 'work', '--name', 'lasting') as child:
        child.expect('work')  # its prompt
        child.sendline('mark=here; echo "it is $mark"')
        child.expect('it is here')
        server.kill()
        child.expect('connection lost')
        server.settings['PORT'] = str(server.port)
        server.start()
        child.sendline('echo "still $mark"; exit')
        child.expect('still here')
        assert child.end() == 0


def test_a_command_with_a_terminal_is_gone_when_it_ends(server):
    with at_a_terminal(server, 'exec', '-t', 'work', 'tty; exit 4') as child:
        child.expect('/dev/pts/')
        assert child.end() == 4
    found = server.get('/api/workspaces/work/terminals')
    assert not [item for item in found if item['name'].startswith('exec-')]


# Files

def test_files_and_folders_pass_both_ways(server, tmp_path):
    folder = tmp_path / 'folder'
    (folder / 'sub').mkdir(parents=True)
    odd = [folder / 'a b', folder / 'new\nline', folder / 'sub' / 'ünicode', folder / os.fsdecode(b'\xff')]
    for path in odd:
        path.write_text(repr(path.name))
    odd[0].chmod(0o750)
    (folder / 'link').symlink_to('a b')
    (folder / 'away').symlink_to('/etc')
    printed(server, 'cp', str(folder), 'work:copied')
    assert printed(server, 'exec', 'work', 'cd copied && ls -A | wc -l; stat -c %a "a b"') == '7\n750\n'
    printed(server, 'cp', 'work:copied', str(tmp_path / 'back'))
    for path in odd:
        assert (tmp_path / 'back' / path.relative_to(folder)).read_text() == repr(path.name)
        if path.name == os.fsdecode(b'\xff'):
            continue  # the API takes only paths of UTF-8; trees have any
        printed(server, 'cp', str(path), 'work:single/')
        printed(server, 'cp', f'work:single/{path.name}', str(tmp_path / 'one'))
        assert (tmp_path / 'one').read_text() == repr(path.name)
    assert os.readlink(tmp_path / 'back' / 'link') == 'a b'
    assert os.readlink(tmp_path / 'back' / 'away') == '/etc'
    assert (tmp_path / 'back' / 'a b').stat().st_uid == os.getuid()
    # Into a folder that is there, and the content of `.`.
    printed(server, 'cp', str(folder), 'work:copied')
    assert printed(server, 'exec', 'work', 'ls -d copied/folder/sub') == 'copied/folder/sub\n'
    printed(server, 'cp', '.', 'work:content', cwd=folder)
    assert printed(server, 'exec', 'work', 'ls -d content/sub') == 'content/sub\n'


def test_pipes_are_files_or_tars(server, tmp_path):
    printed(server, 'cp', '-', 'work:piped', stdin=b'through\0')
    assert agentbackend(server, 'cp', 'work:piped', '-').stdout == b'through\0'
    (tmp_path / 'inside').write_text('tar')
    with tarfile.open(tmp_path / 'it.tar', 'w') as archive:
        archive.add(tmp_path / 'inside', 'inside')
    printed(server, 'cp', '-', 'work:unpacked/', stdin=(tmp_path / 'it.tar').read_bytes())
    assert agentbackend(server, 'cp', 'work:unpacked/inside', '-').stdout == b'tar'


def test_a_copy_that_breaks_off_leaves_nothing_and_no_old_file_is_lost(server, tmp_path):
    printed(server, 'exec', 'work', 'head -c 300000000 /dev/zero >large')
    (tmp_path / 'large').write_text('old')
    with begun(server, 'cp', 'work:large', str(tmp_path / 'large')) as process:
        seconds_until(lambda: any(path.stat().st_size > 10_000 for path in tmp_path.glob('.agent*/new')))
        process.send_signal(signal.SIGINT)
        process.wait(10)
    assert (tmp_path / 'large').read_text() == 'old' and len(list(tmp_path.iterdir())) == 1
    said = failed(server, 'cp', 'work:large', '/dev/full/no', code=1)
    assert '/dev/full' in said


def test_large_files_pass_at_a_flat_memory(server, tmp_path):
    source = tmp_path / 'source'
    with source.open('wb') as file:
        for _ in range(200):
            file.write(os.urandom(2**20))
    measure = ('import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); '
               'print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)')
    for words in (['cp', str(source), 'work:large'], ['cp', 'work:large', str(tmp_path / 'back')]):
        said = subprocess.check_output([sys.executable, '-c', measure, PROGRAM, *words], timeout=120,
                                       env=environment(server))
        assert int(said.split()[-1]) < 60_000  # kilobytes
    digests = {hashlib.sha256(path.read_bytes()).digest() for path in (source, tmp_path / 'back')}
    assert len(digests) == 1


# Logs, events and tasks

def test_a_log_is_printed_and_followed_over_the_death_of_the_server(server, docker_client):
    shell(docker_client, server.container, 'echo before >/proc/1/fd/1', user='root')
    assert printed(server, 'logs', '--tail', '1', 'work') == 'before\n'
    assert 'before' in printed(server, 'logs', '--since', '10m', 'work')
    server.settings['PORT'] = str(server.port)
    with begun(server, 'logs', '-f', '--tail', '0', 'work') as process:
        time.sleep(1.5)
        lines, container = [], docker_client.containers.get(server.container)
        for number in range(30):
            container.exec_run(['sh', '-c', f'echo told {number} >/proc/1/fd/1'])
            if number == 10:
                server.kill()
            if number == 20:
                server.start()
        while len(lines) < 30:
            lines.append(process.stdout.readline().decode().strip())
        process.kill()
        assert lines == [f'told {number}' for number in range(30)]
        said = process.stderr.read().decode()
        assert said.count('connection lost') == 1 and said.count('connected again') == 1


def test_events_are_lines_or_json(server):
    with begun(server, 'events', '--json', 'work') as process:
        first = json.loads(process.stdout.readline())
        assert first['type'] == 'status' and first['data']['status'] == 'running'


def test_a_task_is_followed_to_its_end(server):
    step = json.dumps({'type': 'progress', 'data': {'step': 1, 'total': 2, 'message': 'Half of it'}})
    told = printed(server, 'run', 'work', f"echo a word; echo '{step}'")
    assert '[1/2] Half of it' in told and 'a word' in told
    assert agentbackend(server, 'run', 'work', '-', stdin=b'exit 3').returncode == 1
    listed = printed(server, 'sessions', '--workspace', 'work').splitlines()
    assert [line.split()[1] for line in listed] == ['STATE', 'completed', 'failed']
    session = listed[1].split()[0]
    assert 'a word' in printed(server, 'follow', session)
    again = agentbackend(server, 'run', '--session', session, '--json', 'work', 'echo further')
    events = [json.loads(line) for line in again.stdout.splitlines()]
    assert 'further' in str(events) and 'a word' not in str(events) and again.returncode == 0


def test_a_task_survives_the_death_of_the_server_and_each_event_is_printed_once(server):
    task = 'for number in $(seq 100); do echo "told $number"; sleep 0.1; done'
    server.settings['PORT'] = str(server.port)
    with begun(server, 'run', '--json', 'work', task) as process:
        events = [json.loads(process.stdout.readline()) for _ in range(20)]
        server.kill()
        time.sleep(1)
        server.start()
        events += [json.loads(line) for line in process.stdout]
        assert process.wait() == 0
    words = [event['data']['message'] for event in events if event['type'] == 'message']
    assert ' '.join(words).split() == ' '.join(f'told {number}' for number in range(1, 101)).split()
    assert len({event['id'] for event in events}) == len(events)


def test_an_interrupted_run_asks_what_is_to_become_of_the_task(server, docker_client):
    for answer, state, code in (('cancel', 'cancelled', 1), ('leave', 'running', 130)):
        session = f'asked-{answer}'
        with at_a_terminal(server, 'run', '--session', session, 'work', 'echo here; sleep 4003') as child:
            child.expect('here')
            child.send(b'\x03')
            child.expect('leave it running')
            child.sendline(answer)
            assert child.end() == code
        assert server.get(f'/api/agent/sessions/{session}')['state'] == state
    assert 'asked-leave' in printed(server, 'cancel', 'asked-leave')
    server.until(lambda: not running(docker_client, server.container, 'sleep 4003'))
    # Where nobody can be asked, it goes on.
    with begun(server, 'run', '--session', 'alone', 'work', 'echo here; sleep 4004') as process:
        assert b'with command' in process.stdout.readline() or process.stdout.readline()
        server.until(lambda: running(docker_client, server.container, 'sleep 4004'))
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130 and b'agentbackend follow alone' in process.stderr.read()
    assert server.get('/api/agent/sessions/alone')['state'] == 'running'
    printed(server, 'cancel', 'alone')


# Completion

@pytest.mark.parametrize('shell', ('bash', 'zsh', 'fish'))
def test_names_of_workspaces_are_completed(server, shell):
    script = printed(server, 'completion', shell)
    assert f'_AGENTBACKEND_COMPLETE={shell}_complete' in script
    words = {'COMP_WORDS': 'agentbackend show wo', 'COMP_CWORD': 'wo' if shell == 'fish' else '2'}
    found = agentbackend(server, env={'_AGENTBACKEND_COMPLETE': f'{shell}_complete', **words})
    assert 'work' in found.stdout.decode().replace(',', '\n').split('\n')
    words |= {'_AGENTBACKEND_COMPLETE': f'{shell}_complete', 'AGENTBACKEND_URL': 'http://127.0.0.1:1'}
    assert agentbackend(server, env=words).stderr == b''


def test_the_server_starts_without_a_verb(server, tmp_path):
    with restarted(server):  # under another port, since its own is not the default
        pass
    env = environment(server, STATE_DIR=str(tmp_path), INSTANCE='test-cli', PORT='0', PREBUILD='none')
    process = subprocess.Popen([PROGRAM], env=env, stderr=subprocess.PIPE, text=True)
    try:
        assert any('serves http' in line for line in process.stderr)
    finally:
        process.terminate()
        process.communicate()
