"""Node, Bun and Chromium, with the packages of tests/clients/package.json in a cache folder."""
import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

CLIENTS = Path(__file__).resolve().parent / 'clients'


def installed():
    """Return the folder that has the packages as node_modules; install them into it if they are missing."""
    manifest = CLIENTS / 'package.json'
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    folder = cache / 'agentbackend-tests' / hashlib.sha256(manifest.read_bytes()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / 'done').exists():
            shutil.copy(manifest, folder)
            subprocess.run(['npm', 'install', '--no-audit', '--no-fund', '--ignore-scripts',
                            '--loglevel=error'], cwd=folder, check=True, timeout=240)
            (folder / 'done').touch()
    return folder


def bun(folder):
    """Return the path of Bun, which its package has beside its install script."""
    return next(path for path in (folder / 'node_modules' / '@oven').glob('*/bin/bun') if works(path))


def works(path):
    return subprocess.run([path, '--version'], capture_output=True).returncode == 0


def esbuild(folder):
    return next((folder / 'node_modules' / '@esbuild').glob('*/bin/esbuild'))


def environment(folder):
    """Return an environment in which Node finds the packages."""
    return {**os.environ, 'NODE_PATH': str(folder / 'node_modules')}
