"""The package as pip installs it, used from another folder."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import urllib.request

import pytest
from conftest import ROOT

FOLDERS = ('schemas', 'templates', 'static')
FIND = ('import agentbackend; from pathlib import Path; print(agentbackend.__file__); '
        '[print(path) for path in sorted(agentbackend.DATA.rglob("*")) if path.is_file()]')


def run(*command, **options):
    ended = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           text=True, timeout=120, **options)
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def versioned(*paths):
    """Return the files of the checkout that git knows or would know, without those that were deleted."""
    listed = run('git', 'ls-files', '--cached', '--others', '--exclude-standard', '--', *paths,
                 cwd=ROOT).splitlines()
    return {path for path in listed if (ROOT / path).is_file()}


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """A copy of the checkout as git has it: pip leaves its traces where it builds."""
    folder = tmp_path_factory.mktemp('source')
    for path in versioned():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    return folder


@pytest.fixture(scope='module')
def sdist(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp('sdist')
    run(sys.executable, '-c',
        f'from setuptools import build_meta; print(build_meta.build_sdist({str(folder)!r}))', cwd=source)
    archive, = folder.glob('*.tar.gz')
    return archive


@pytest.fixture(scope='module')
def installed(source, tmp_path_factory):
    """A clean environment into which pip installed the checkout; what it needs is taken from this one."""
    folder = tmp_path_factory.mktemp('installed') / 'venv'
    run(sys.executable, '-m', 'venv', '--without-pip', folder)
    run(sys.executable, '-m', 'pip', '--python', folder / 'bin' / 'python', 'install', '-qq',
        '--disable-pip-version-check', '--no-deps', source)
    site, = (folder / 'lib').glob('python*/site-packages')
    (site / 'borrowed.pth').write_text(sysconfig.get_path('purelib') + '\n')
    return folder


def found_by(python, folder):
    """Return (path of the module, paths of its data in their folders) as a Python elsewhere sees them."""
    module, *data = run(python, '-c', FIND, cwd=folder).splitlines()
    parts = [path.partition('agentbackend_data/')[2] for path in data]
    return module, {part for part in parts if '__pycache__' not in part}


def test_every_file_of_the_data_folders_is_installed_and_found(installed, tmp_path):
    module, data = found_by(installed / 'bin' / 'python', tmp_path)
    assert module.startswith(str(installed)), 'this is the checkout'
    found = {path for path in data if path.partition('/')[0] in FOLDERS}
    assert found == versioned(*FOLDERS)


def test_what_is_installed_is_what_is_in_the_checkout(installed, tmp_path):
    site, = (installed / 'lib').glob('python*/site-packages')
    for path in versioned(*FOLDERS):
        assert (site / 'agentbackend_data' / path).read_bytes() == (ROOT / path).read_bytes(), path
    for path in versioned('*.py'):
        if '/' not in path:
            assert (site / path).read_bytes() == (ROOT / path).read_bytes(), path


def test_the_console_script_serves_from_another_folder(installed, tmp_path):
    env = {'PATH': os.environ['PATH'], 'HOME': str(tmp_path), 'PORT': '0',
           'STATE_DIR': str(tmp_path / 'state'), 'DOCKER_HOST': f'{tmp_path}/no.sock', 'PREBUILD': 'none'}
    with subprocess.Popen([installed / 'bin' / 'agentbackend'], cwd=tmp_path, env=env, stderr=subprocess.PIPE,
                          text=True) as server:
        try:
            port = re.search(r'serves http://127\.0\.0\.1:(\d+)', server.stderr.readline())[1]
            with urllib.request.urlopen(f'http://127.0.0.1:{port}/health', timeout=5) as answer:
                health = json.load(answer)
            assert health['docker'] == 'disconnected'
            assert {'base', 'bun-typescript', 'blank'} <= set(health['templates'])
        finally:
            server.send_signal(signal.SIGTERM)
        server.stderr.read()
        assert server.wait(10) == 0


def test_a_template_has_the_same_image_in_the_checkout_and_installed(installed, tmp_path):
    """The tag is a hash of the folder: were it another, every way of starting the server would build its own
    images."""
    code = ('import agentbackend; b = agentbackend.make_backend(agentbackend.Config.from_env({"STATE_DIR": '
            '"."})); '
            'print({name: b.templates.tag(name) for name in b.templates.names()})')
    here = run(sys.executable, '-c', f'import sys; sys.path.insert(0, {str(ROOT)!r}); {code}', cwd=tmp_path)
    assert run(installed / 'bin' / 'python', '-c', code, cwd=tmp_path) == here


def test_the_source_archive_has_all_that_an_installation_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {member.name.partition('/')[2] for member in archive.getmembers() if member.isfile()}
    needed = versioned(*FOLDERS, 'setup.cfg', 'pyproject.toml',
                       'README.md') | {path for path in versioned('*.py') if '/' not in path}
    assert needed <= names
