"""Where the base image comes from, and that nothing hangs where no registry is."""
import socket

import gevent.event
import pytest

import agentbackend_engine
from agentbackend import DATA
from agentbackend_config import DockerError
from agentbackend_engine import Engine, Templates


@pytest.fixture
def silent_host():
    """An address that takes connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        listener.listen(100)
        yield f'127.0.0.1:{listener.getsockname()[1]}'


@pytest.fixture
def engine(docker_client):
    made = Engine()
    yield made
    made.close()


def test_a_pull_ends_when_the_registry_says_nothing(engine, silent_host, monkeypatch):
    monkeypatch.setattr(agentbackend_engine, 'PULL_PATIENCE', 1)
    with pytest.raises(DockerError, match='the registry says nothing'):
        engine.pull(f'{silent_host}/none:latest', print)


def test_a_base_image_that_can_not_be_had_is_told_with_what_to_do(engine, silent_host, monkeypatch):
    monkeypatch.setattr(agentbackend_engine, 'PULL_PATIENCE', 1)
    monkeypatch.setattr(agentbackend_engine, 'DEBOOTSTRAP_PATIENCE', 2)
    monkeypatch.setattr(agentbackend_engine, 'OWN_BASE_IMAGE', 'agentbackend-none:never')
    templates = Templates(engine, [DATA / 'templates'], base_image=f'{silent_host}/none:latest', debian_mirror=f'http://{silent_host}/debian',
                          ca_certs='', timeout=60)
    said = []
    with pytest.raises(DockerError, match='debootstrap.* said nothing for 2 s; is its mirror reached'):
        templates.image('base', said.append, gevent.event.Event())
    assert any('making a Debian image with debootstrap instead' in line for line in said)
    assert templates.state('base')['state'] == 'failed' and 'mirror' in templates.state('base')['error']


def test_without_debootstrap_the_ways_out_are_told(engine, monkeypatch):
    monkeypatch.setattr(agentbackend_engine, 'OWN_BASE_IMAGE', 'agentbackend-none:never')
    monkeypatch.setattr(agentbackend_engine.os, 'geteuid', lambda: 1000)  # the only way to be somebody else within this process
    templates = Templates(engine, [DATA / 'templates'], base_image='127.0.0.1:9/none:latest', debian_mirror='', ca_certs='', timeout=60)
    with pytest.raises(DockerError, match='docker pull 127.0.0.1:9/none:latest; apt-get install debootstrap and run as root; BASE_IMAGE='):
        templates.image('base', print, gevent.event.Event())


def test_the_base_image_of_the_engine_is_taken_first(engine, docker_client, templates_dir):
    image = docker_client.images.list()[0].id
    templates = Templates(engine, [DATA / 'templates'], base_image=image, debian_mirror='', ca_certs='', timeout=60)
    assert templates._debian(print) == image


def test_an_image_has_another_name_when_what_it_is_made_of_has_changed(engine, tmp_path):
    def tag(**changes):
        settings = {'base_image': 'debian:bookworm-slim', 'debian_mirror': '', 'ca_certs': '', 'timeout': 60} | changes
        return Templates(engine, [DATA / 'templates'], **settings).tag('bun-typescript')
    certificates = tmp_path / 'ca.pem'
    certificates.write_text('one')
    first = tag(ca_certs=str(certificates))
    certificates.write_text('two')
    assert len({tag(), first, tag(ca_certs=str(certificates)), tag(base_image='debian:trixie-slim')}) == 4
    assert tag() == tag()
