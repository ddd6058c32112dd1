"""The same work by others that install with pip: create to first command, one command, 1 MB up and down.

All have our image `blank`. What is created here is more: editor and SSH answer before the first command.
They come into an environment of their own in a temporary folder.
"""
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import gevent

from .common import Http, Plain, ms
from .creates import wait_full

TITLE = 'Peers'
# SWE-ReX needs aiohttp, and does not say so.
PACKAGES = {'docker-py': ['docker'], 'llm-sandbox': ['llm-sandbox[docker]'],
            'SWE-ReX': ['swe-rex', 'aiohttp']}
TURNS, COMMANDS = 5, 8  # commands in a turn
WORK = {'create': 'create to the first command', 'exec': 'exec of `true`', 'up': '1 MB up',
        'down': '1 MB down'}
OURS = ('ours', 'ours, warm')
HERE = Path(__file__).resolve().parent


def measure(bench, section):
    with (bench.served() as server, bench.served(WARM_POOL='blank:1') as pooled,
          contextlib.ExitStack() as stack):
        http = Http(server.port)
        image = http.running('first', template='blank') and Plain(bench, server, 'blank').image
        folder = bench.folder / 'peers'
        folder.mkdir()
        (folder / 'file').write_bytes(os.urandom(2**20))
        wait_full(pooled, Http(pooled.port), 'blank')
        content = (folder / 'file').read_bytes()
        players = {'ours': Ours(http, content), 'ours, warm': Ours(Http(pooled.port), content, pooled)}
        for name in install(section, folder, image):
            players[name] = stack.enter_context(Peer(name, image, folder))
        found = {name: {verb: [] for verb in WORK} for name in players}
        with section.watching(server, 'peers'):
            for turn in range(TURNS + 1):  # the first warms up
                for name in sorted(players, reverse=turn % 2 == 1):
                    taken = play(players[name])
                    if isinstance(taken, str):
                        section.remark(f'{name} was not measured further: {taken}')
                        players.pop(name)
                        continue
                    for verb, values in taken.items() if turn else ():
                        found[name][verb] += values
                    gevent.sleep(1)
        section.remark('After a create of ours editor and SSH answer too, and a warm one is from a pool of '
                       'WARM_POOL=blank:1; theirs are containers that sleep, and SWE-ReX starts its own '
                       'server in them.')
        peers = [name for name in found if name not in OURS]
        for what, verb, ours in (*((what, verb, 'ours') for verb, what in WORK.items()),
                                 ('warm create to the first command', 'create', 'ours, warm')):
            for name in peers:
                if found[name][verb]:
                    section.compare(what, found[ours][verb], name, found[name][verb], head=verb == 'create')


def play(player):
    """Return {verb: [ms]} of one turn, or why it failed."""
    found = {}
    try:
        for verb in WORK:
            found[verb] = [player.do(verb) for _ in range(COMMANDS if verb == 'exec' else 1)]
    except RuntimeError as error:
        found = str(error)
    with contextlib.suppress(RuntimeError):
        player.do('close')
    return found


class Ours:
    """The same work through this server; of one that has a pool, which is full before each turn."""

    def __init__(self, http, content, pooled=None):
        self._http, self._content, self._made, self._pooled = http, content, 0, pooled

    def do(self, verb):
        """Return the ms that a verb takes."""
        return ms(getattr(self, verb))

    def create(self):
        self._made += 1
        self._path = f'/api/workspaces/made-{self._made}'
        self._http.running(f'made-{self._made}', template='blank')
        self.exec()

    def exec(self):
        assert self._http('POST', f'{self._path}/exec', {'command': 'true'})['exitCode'] == 0

    def up(self):
        self._http.raw('PUT', f'{self._path}/files/file', self._content)

    def down(self):
        assert len(self._http.raw('GET', f'{self._path}/files/file')) == 2**20

    def close(self):
        self._http('DELETE', self._path)
        if self._pooled:
            wait_full(self._pooled, self._http, 'blank')


class Peer:
    """A peer in a process of its own."""

    def __init__(self, name, image, folder):
        self._log = (folder / f'{name}.log').open('w')
        command = [folder / 'venv' / 'bin' / 'python', HERE / 'peer.py', name, image, folder]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=self._log, text=True)

    def do(self, verb):
        """Return the ms that a verb takes; raise RuntimeError when it fails."""
        self._process.stdin.write(f'{verb}\n')
        self._process.stdin.flush()
        found = json.loads(self._process.stdout.readline() or '"it ended"')
        if isinstance(found, str):
            raise RuntimeError(found)
        return found * 1000

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait()
        self._log.close()


def install(section, folder, image):
    """Install the peers; return the names of those that are there."""
    def pip(*words):
        done = subprocess.run([folder / 'venv' / 'bin' / 'python', '-m', 'pip', 'install', '--quiet',
                               '--disable-pip-version-check', *words], capture_output=True, text=True,
                              timeout=300, check=False)
        return (done.stderr.strip().splitlines() or ['it ended'])[-1] if done.returncode else ''
    subprocess.run([sys.executable, '-m', 'venv', folder / 'venv'], check=True)
    there = []
    for name, packages in PACKAGES.items():
        failed = pip(*packages)
        if name == 'SWE-ReX' and not failed:
            # Its server runs in the container, with the container's Python.
            version = subprocess.run(
                ['docker', 'run', '--rm', '--entrypoint', 'python3', image, '-c',
                 'import sys; print("%d.%d" % sys.version_info[:2])'],
                capture_output=True, text=True, check=True)
            failed = pip('--target', folder / 'inside', '--only-binary', ':all:', '--python-version',
                         version.stdout.strip(), *packages)
            # The command that pip makes names a Python that is not in the container.
            if not failed:
                (folder / 'inside' / 'bin' / 'swerex-remote').write_text(
                    '#!/bin/sh\nexec python3 -c "from swerex.server import main; main()" "$@"\n')
        if failed:
            section.remark(f'{name} was not measured: pip could not install it ({failed[:200]}).')
        else:
            there.append(name)
    return there
