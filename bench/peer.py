"""One peer at its work, in an environment of its own, which has nothing of this project: each line of stdin
is a verb, each line of stdout the seconds that it took, or why it failed.

    python peer.py PEER IMAGE FOLDER
"""
import asyncio
import json
import sys
import time
from pathlib import Path

IMAGE, FOLDER = sys.argv[2], Path(sys.argv[3])
SLEEP = ['sleep', 'infinity']  # in the place of the image's own entrypoint: no editor, no SSH


class DockerPy:
    """docker-py as its documentation shows it."""

    def __init__(self):
        import docker
        self.client = docker.from_env()

    def create(self):
        self.container = self.client.containers.run(IMAGE, entrypoint=SLEEP, init=True, detach=True)
        self.exec()

    def exec(self):
        assert self.container.exec_run('true').exit_code == 0

    def up(self):
        import io
        import tarfile
        data, archive = (FOLDER / 'file').read_bytes(), io.BytesIO()
        with tarfile.open(fileobj=archive, mode='w') as tar:
            entry = tarfile.TarInfo('file')
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        assert self.container.put_archive('/tmp', archive.getvalue())

    def down(self):
        data, _ = self.container.get_archive('/tmp/file')
        assert sum(len(piece) for piece in data) > 2**20

    def close(self):
        self.container.remove(force=True)


class LlmSandbox:
    """llm-sandbox, without the Python environment that it would set up first."""

    def create(self):
        from llm_sandbox import SandboxSession
        self.session = SandboxSession(image=IMAGE, lang='python', skip_environment_setup=True,
                                      runtime_configs={'entrypoint': SLEEP, 'init': True})
        self.session.open()
        self.exec()

    def exec(self):
        assert self.session.execute_command('true').exit_code == 0

    def up(self):
        self.session.copy_to_runtime(str(FOLDER / 'file'), '/tmp/file')

    def down(self):
        self.session.copy_from_runtime('/tmp/file', str(FOLDER / 'back'))

    def close(self):
        self.session.close()


class SweRex:
    """SWE-ReX: its server is mounted into the container, where else it would be installed at each start."""

    def __init__(self):
        self.loop = asyncio.new_event_loop()

    def create(self):
        from swerex.deployment.docker import DockerDeployment
        from swerex.runtime.abstract import CreateBashSessionRequest
        self.deployment = DockerDeployment(image=IMAGE, pull='never', docker_args=[
            '--entrypoint', '', '--init', '--volume', f'{FOLDER}/inside:/opt/swerex:ro',
            '--env', 'PYTHONPATH=/opt/swerex', '--env', 'PATH=/opt/swerex/bin:/usr/local/bin:/usr/bin:/bin'])
        self.loop.run_until_complete(self.deployment.start())
        self.loop.run_until_complete(self.deployment.runtime.create_session(CreateBashSessionRequest()))
        self.exec()

    def exec(self):
        from swerex.runtime.abstract import BashAction
        action = BashAction(command='true')
        done = self.loop.run_until_complete(self.deployment.runtime.run_in_session(action))
        assert done.exit_code == 0

    def up(self):
        from swerex.runtime.abstract import UploadRequest
        self.loop.run_until_complete(self.deployment.runtime.upload(
            UploadRequest(source_path=str(FOLDER / 'file'), target_path='/tmp/file')))

    def down(self):
        from swerex.runtime.abstract import ReadFileRequest
        done = self.loop.run_until_complete(self.deployment.runtime.read_file(
            ReadFileRequest(path='/tmp/file', encoding='latin-1')))
        assert len(done.content) > 1_000_000  # it makes one of two bytes that end a line

    def close(self):
        self.loop.run_until_complete(self.deployment.stop())


def main():
    peer = {'docker-py': DockerPy, 'llm-sandbox': LlmSandbox, 'SWE-ReX': SweRex}[sys.argv[1]]()
    answers = sys.stdout
    sys.stdout = sys.stderr  # for what the peer itself prints
    for line in sys.stdin:
        begun = time.perf_counter()
        try:
            getattr(peer, line.strip())()
            found = time.perf_counter() - begun
        except Exception as error:  # noqa: BLE001 - whatever it is, the bench tells it
            found = f'{type(error).__name__}: {error}'
        print(json.dumps(found), file=answers, flush=True)


if __name__ == '__main__':
    main()
