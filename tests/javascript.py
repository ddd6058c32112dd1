"""Node, Bun and Chromium, with the packages of a package.json in a cache folder."""
import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

TESTS = Path(__file__).resolve().parent
CLIENTS = TESTS / 'clients'


def cached(manifest, install):
    """Return the folder of the cache that has what a manifest lists; let `install(folder)` do that if it is
    missing."""
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    folder = cache / 'agentbackend-tests' / hashlib.sha256(manifest.read_bytes()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / 'done').exists():
            shutil.copy(manifest, folder)
            install(folder)
            (folder / 'done').touch()
    return folder


def installed(manifest=CLIENTS / 'package.json'):
    """Return the folder that has the packages of a manifest as node_modules."""
    return cached(manifest, lambda folder: subprocess.run(
        ['npm', 'install', '--no-audit', '--no-fund', '--ignore-scripts', '--loglevel=error'], cwd=folder,
        check=True, timeout=240))


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
