"""Where the base image comes from, and that nothing hangs where no registry is."""
import socket
import subprocess
import uuid

import gevent
import gevent.event
import pytest
from conftest import ROOT, debian

from _agentbackend import images
from _agentbackend.dockerclient import DockerClient
from _agentbackend.errors import DockerError, MissingBaseImage
from _agentbackend.images import Templates


@pytest.fixture
def silent_host():
    """An address that takes connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        listener.listen(100)
        yield f'127.0.0.1:{listener.getsockname()[1]}'


@pytest.fixture
def make_templates(docker_client):
    """A function that makes Templates of the real folder, on the real engine."""
    client = DockerClient()

    def make(**settings):
        return Templates(client, [ROOT / 'templates'],
                         **{'base_image': 'debian:bookworm-slim', 'base_image_timeout': 0.1, 'ca_certs': '',
                            'timeout': 60, **settings})
    yield make
    client.close()


def test_a_pull_ends_when_the_registry_says_nothing(make_templates, silent_host, monkeypatch):
    monkeypatch.setattr(images, 'PULL_TIMEOUT', 1)
    with pytest.raises(DockerError, match='the registry says nothing'):
        make_templates()._pull(f'{silent_host}/none:latest', print)


def test_a_base_image_that_can_not_be_had_is_told_with_what_to_do(make_templates, monkeypatch):
    monkeypatch.setattr(images, 'OWN_BASE_IMAGE', 'agentbackend-none:never')
    templates, said = make_templates(base_image='127.0.0.1:9/none:latest'), []
    with pytest.raises(MissingBaseImage,
                       match='docker pull 127.0.0.1:9/none:latest; as root, '
                             'templates/make-debian-image.*BASE_IMAGE='):
        templates.image('base', said.append, gevent.event.Event())
    assert any('could not be pulled' in line for line in said)
    assert templates.state('base')['state'] == 'failed'
    assert 'make-debian-image' in templates.state('base')['error']


def test_a_base_image_that_somebody_makes_meanwhile_is_waited_for(make_templates, docker_client, monkeypatch):
    name = f'agentbackend-test:{uuid.uuid4().hex}'
    monkeypatch.setattr(images, 'OWN_BASE_IMAGE', name)
    monkeypatch.setattr(images, 'BASE_PAUSE', 0.1)
    templates = make_templates(base_image='127.0.0.1:9/none:latest', base_image_timeout=20)
    waiting = gevent.spawn(templates._debian, lambda line: None)
    gevent.sleep(0.5)
    assert not waiting.ready()
    docker_client.images.get(debian()).tag(name)
    try:
        assert waiting.get(timeout=10) == name
    finally:
        docker_client.api.remove_image(name)


def test_the_base_image_of_the_engine_is_taken_first(make_templates, docker_client, templates_dir):
    image = docker_client.images.list()[0].id
    assert make_templates(base_image=image)._debian(print) == image


def test_what_makes_a_base_image_says_what_it_lacks():
    script = [ROOT / 'templates' / 'make-debian-image']
    ended = subprocess.run(script, env={'PATH': '/nowhere:/bin',
                                        'DEBIAN_MIRROR': 'http://127.0.0.1:9/debian'}, capture_output=True,
                                        text=True)
    assert ended.returncode == 1 and 'make-debian-image: ' in ended.stderr
    ended = subprocess.run(['setpriv', '--reuid=65534', '--clear-groups', *script], capture_output=True,
                           text=True)
    assert ended.returncode == 1 and 'needs root' in ended.stderr


def test_how_far_a_build_is_and_what_it_prints_is_told(make_server, own_templates):
    folder, add = own_templates
    add('fresh', 'RUN echo the-build-says-this && sleep 3')
    server = make_server(TEMPLATES_DIR=str(folder), PREBUILD='fresh')

    def image():
        return server.get('/health')['templates']['fresh']
    server.until(lambda: image().get('lastLine') == 'the-build-says-this')
    told = image()
    assert (told['state'], told['step'], told['steps']) == ('building', 8, 9)
    shown = next(item for item in server.get('/api/templates') if item['name'] == 'fresh')
    assert (shown['step'], shown['steps']) == (8, 9)
    log = server.call('GET', '/api/templates/fresh/log').text.splitlines()
    assert log[0].startswith('Building image ') and log[-1] == 'the-build-says-this'
    server.until(lambda: image()['state'] == 'ready')
    assert image().keys() == {'image', 'state'}
    assert 'Step 9/9 : ' in server.call('GET', '/api/templates/fresh/log').text
    assert server.call('GET', '/api/templates/tiny/log').text == ''
    assert server.call('GET', '/api/templates/none/log').json()['code'] == 'NOT_FOUND'


def test_what_a_build_prints_becomes_the_lines_that_a_terminal_keeps():
    printed = images.Printed()
    pieces = ['Step 1/2 : RUN x', '\n', ' ---> Running in ba3f00aa11bb\n', '\x1b[91mred\n\x1b[0m', 'one ',
              'two\n', '(Reading database ... 5%\r', '(Reading database ... 10%\r', '(Reading database ... ',
              '99 files.)\r\n', 'a\tb\x07\x1b]0;title\x07\n', 'the rest']
    assert [line for piece in pieces for line in printed.take(piece)] == [
        'Step 1/2 : RUN x', 'red', 'one two', '(Reading database ... 99 files.)', 'a\tb']
    assert printed.take('\n') == ['the rest']


def test_a_build_that_fails_is_told_once_in_plain_words(make_server, own_templates):
    folder, add = own_templates
    says = r'printf "\033[31mE: a red line\033[0m\n5%%\r10%%\rall\nSSL certificate problem\n" >&2'
    add('broken', f"RUN {says}; : {'and-on ' * 150}; exit 3")
    server = make_server(TEMPLATES_DIR=str(folder), PREBUILD='broken')
    server.create('hopeless', template='broken')
    error = server.wait_status('hopeless', 'error')['error']
    assert error == next(item['error'] for item in server.get('/api/templates') if item['name'] == 'broken')
    lines = error.splitlines()
    assert lines[1].startswith('Step 8/9 : ')
    assert lines[2:-2] == ['E: a red line', 'all', 'SSL certificate problem']
    assert lines[-2].startswith("The command '/bin/sh -c printf ")
    assert lines[-2].endswith("...' returned a non-zero code: 3") and max(map(len, lines)) < 210
    assert 'EXTRA_CA_CERTS=' in lines[-1] and '\x1b' not in error
    assert '\x1b' not in server.call('GET', '/api/templates/broken/log').text
    log = server.log.read_text()
    assert log.count('EXTRA_CA_CERTS=') == 1 and 'Traceback' not in log and '\x1b' not in log


def test_an_image_has_another_name_when_what_it_is_made_of_has_changed(make_templates, tmp_path):
    def tag(**changes):
        return make_templates(**changes).tag('bun-typescript')
    certificates = tmp_path / 'ca.pem'
    certificates.write_text('one')
    first = tag(ca_certs=str(certificates))
    certificates.write_text('two')
    assert len({tag(), first, tag(ca_certs=str(certificates)), tag(base_image='debian:trixie-slim')}) == 4
    assert tag() == tag()
