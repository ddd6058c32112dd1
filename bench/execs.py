"""Commands against `docker exec`, and files against `docker cp`."""
import contextlib
import os
import subprocess

from .common import Http, ms, turn_about

TITLE = 'Commands and files'
TURNS = 30
SIZES = {'1 KB': (2**10, 20), '1 MB': (2**20, 20), '64 MB': (2**26, 5)}  # name: (bytes, turns)
COMMAND = {'command': 'true'}


def measure(bench, section):
    with bench.served() as server:
        http = Http(server.port)
        container = http.running('work', template='blank')['containerId']
        engine = bench.client.containers.get(container)

        def ours():
            return ms(http, 'POST', '/api/workspaces/work/exec', COMMAND)

        def command_line():
            return ms(run, 'docker', 'exec', '-u', 'dev', '-w', '/workspace/work', container,
                      'sh', '-c', 'true')

        def docker_py():
            return ms(lambda: engine.exec_run(['sh', '-c', 'true'], user='dev', workdir='/workspace/work'))
        ours(), command_line(), docker_py()
        with section.watching(server, 'commands'):
            one, two, three = turn_about(TURNS, ours, command_line, docker_py)
        section.compare('exec of `true`', one, 'docker exec', two, head=True)
        section.compare('exec of `true`', one, 'exec_run of docker-py', three)
        with section.watching(server, 'files'):
            for size, (count, turns) in SIZES.items():
                files(bench, section, http, container, size, os.urandom(count), turns)


def files(bench, section, http, container, size, content, turns):
    """Measure a file in both directions."""
    local, path = bench.folder / 'file', '/api/workspaces/work/files/file'
    local.write_bytes(content)
    inside = f'{container}:/workspace/work/file'
    ways = {'up': (lambda: ms(lambda: http.raw('PUT', path, content)),
                   lambda: ms(run, 'docker', 'cp', local, inside)),
            'down': (lambda: ms(lambda: http.raw('GET', path)),
                     lambda: ms(run, 'docker', 'cp', inside, f'{local}-back'))}
    for way, pair in ways.items():
        for function in pair:
            function()
        ours, theirs = turn_about(turns, *pair)
        section.compare(f'file of {size} {way}', ours, 'docker cp', theirs, head=size == '1 MB')
    assert http.raw('GET', path) == content
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f'{local}-back')


def run(*command):
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
