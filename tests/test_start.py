"""What somebody is told who starts it: by run.sh, and by the server's log until the first image is there."""
import os
import shutil
import socket
import subprocess
import sys
import tempfile

import gevent.event
from conftest import ROOT

from _agentbackend import images
from _agentbackend.dockerclient import DockerClient
from _agentbackend.images import Templates

NOBODY = ['setpriv', '--reuid=65534', '--regid=65534', '--clear-groups']


def run(*command, **settings):
    return subprocess.run(command, env={**os.environ, **settings}, cwd='/', capture_output=True, text=True,
                          timeout=60, stdin=subprocess.DEVNULL)


def test_help_is_no_mistake():
    done = run(ROOT / 'run.sh', '--help')
    assert done.returncode == 0 and not done.stderr
    assert './run.sh test' in done.stdout and 'set -e' not in done.stdout
    wrong = run(ROOT / 'run.sh', 'halp')
    assert wrong.returncode == 2 and '--help' in wrong.stderr


def test_a_taken_port_is_told_before_anything_is_made(tmp_path):
    shutil.copy(ROOT / 'run.sh', tmp_path)
    with socket.create_server(('127.0.0.1', 0)) as taken:
        done = run(tmp_path / 'run.sh', PORT=str(taken.getsockname()[1]))
    assert done.returncode == 2 and 'run.sh: PORT=' in done.stderr and 'another program' in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ['run.sh']


def test_who_may_not_use_docker_is_told_which_group_that_takes():
    script = (ROOT / 'run.sh').read_text().partition('\ncase ')[0] + '\nis_refused'
    code = (f'import os, sys; sys.path.insert(0, {str(ROOT)!r})\n'
            'from agentbackend import monkey\nfrom _agentbackend.dockerclient import DockerClient\n'
            'os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n'
            'DockerClient(host=os.environ["DOCKER_HOST"]).ping()')
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        path = f'{folder}/docker.sock'
        listener.bind(path)
        listener.listen()
        os.chmod(folder, 0o755)
        os.chmod(path, 0o660)
        shutil.chown(path, group='daemon')
        told = run(*NOBODY, 'bash', '-c', script, '/run.sh', DOCKER_HOST=f'unix://{path}')
        assert told.returncode == 0 and 'usermod -aG daemon nobody' in told.stderr
        assert run('bash', '-c', script, '/run.sh', DOCKER_HOST=path).returncode == 1
        told = run(sys.executable, '-c', code, DOCKER_HOST=f'unix://{path}')
    assert 'user nobody is not in the group daemon' in told.stderr
    assert 'As root: usermod -aG daemon nobody' in told.stderr


def test_the_log_says_how_far_a_build_is_and_where_to_go_then(make_server, own_templates):
    folder, add = own_templates
    add('fresh', 'RUN sleep 1')
    add('broken', 'RUN exit 3')
    server = make_server(TEMPLATES_DIR=str(folder), PREBUILD='fresh')
    log = server.wait_for_log('Ready. Open') and server.log.read_text()
    assert f'Ready. Open http://127.0.0.1:{server.port}/\n' in log
    assert log.index('Image agentbackend/fresh:') < log.index('Ready. Open')
    failing = make_server(TEMPLATES_DIR=str(folder), PREBUILD='broken')
    failing.wait_for_log('No image for template broken: ')
    assert 'Ready' not in failing.log.read_text()


def test_a_build_that_takes_its_time_is_told_of_again_and_again(own_templates, monkeypatch, caplog):
    folder, add = own_templates
    add('slow', 'RUN echo on-my-way && sleep 2')
    monkeypatch.setattr(images, 'TELL_PAUSE', 0.5)
    caplog.set_level('INFO')
    client = DockerClient()
    templates = Templates(client, [ROOT / 'templates', folder], base_image='', base_image_timeout=1,
                          ca_certs='', timeout=60)
    templates.image('slow', lambda line: None, gevent.event.Event())
    client.close()
    told = [text for text in caplog.messages if 'so far' in text]
    assert any(text.startswith('build slow: step 8 of 9, 0:0')
               and text.endswith('It printed last: on-my-way') for text in told), told
    assert len(told) >= 3
