"""Templates: folders with a Dockerfile, and the images built from them."""
import collections
import contextlib
import hashlib
import logging
import os
import re
import tarfile
import tempfile
import time
from pathlib import Path

import docker
import gevent
import gevent.event

from _agentbackend.engine import HEARS, PREFIX
from _agentbackend.errors import (
    BackendError,
    DockerError,
    EngineUnavailable,
    MissingBaseImage,
    NotFound,
    Superseded,
    UnreadableTemplate,
    quoted,
    refusal,
)

log = logging.getLogger('agentbackend')

BASE = 'base'
# What the engine takes in the name of an image.
TEMPLATE_NAME = re.compile(r'[A-Za-z0-9]+((\.|__?|-+)[A-Za-z0-9]+)*')
VERSION = re.compile(r'^ARG (\w+)_VERSION=(\S+)', re.MULTILINE)
INSTALLED = re.compile(r'apt-get (?:\$option )?install ([^;&|]*)')
OWN_BASE_IMAGE = 'agentbackend-debian:bookworm'  # of templates/make-debian-image
PULL_TIMEOUT = 30  # seconds without a word from the registry: a machine without one may swallow packets
BASE_PAUSE = 2  # seconds between looks for a base image that somebody makes
LAST_LINES = 12  # of a build that failed
STEP = re.compile(r'Step (\d+)/(\d+) : ')
TELL_PAUSE = 10  # seconds between two lines of our log about a build
SEEN_FOR = 1  # seconds for which a state is told without a look into the folder again
MAX_LOG = 1000  # lines that are kept of a build
MAX_LINE = 1000  # characters of one
MAX_QUOTED = 200  # characters of one that our log or an error quotes
# What steers a terminal: colours, titles, and control characters but for tab and the ends of lines.
ESCAPES = re.compile(r'\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[ -/]*[0-~]?'
                     r'|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]')
ENGINES_OWN = re.compile(r' *(--->|Removing intermediate container)')  # lines that say nothing to anybody
COMMAND = re.compile(r"(?<=The command ')(.{80}).+(?=' returned a non-zero code)", re.DOTALL)
CERTIFICATE = re.compile(r'\bcertificate\b', re.IGNORECASE)
TO_TRUST = ('It speaks of a certificate. Behind a proxy that inspects TLS, start the server with '
            "EXTRA_CA_CERTS=<file of the proxy's CA certificate>, which images then trust.")


class Build:
    """An image that is being made, how far that is, and who listens to its output."""

    def __init__(self):
        self.greenlet = None
        self.listeners = []
        self.started_at = time.time()
        self.step = self.steps = None  # once the engine has told
        self.lines = collections.deque(maxlen=MAX_LOG)

    def say(self, line):
        """Keep a line of output, and hand it to all who listen."""
        step = STEP.match(line)
        if step:
            self.step, self.steps = int(step[1]), int(step[2])
        self.lines.append(line[:MAX_LINE])
        for listener in list(self.listeners):
            listener(line)


class Printed:
    """What a build prints, which comes in pieces, as the lines that are left of it on a terminal."""

    def __init__(self):
        self._rest = ''

    def take(self, piece):
        """Return the lines that end with a piece."""
        *lines, rest = (self._rest + piece).split('\n')
        self._rest = rest[rest.rstrip('\r').rfind('\r') + 1:]  # the others were written over
        return [line for line in map(shown, lines) if line and not ENGINES_OWN.match(line)]


class Templates:
    """An image's tag holds a hash of what it is made of, so an edit rebuilds and nothing else does."""

    def __init__(self, client, folders, *, base_image, base_image_timeout, ca_certs, timeout):
        self._client = client
        self._folders = [Path(folder) for folder in folders]  # later ones win
        self._base_image = base_image
        self._base_image_timeout = base_image_timeout
        self._ca_certs = ca_certs
        self._timeout = timeout
        self._builds = {}
        self._logs = {}  # name -> the lines of its last build
        self._errors = {}
        self._seen = {}  # name -> (when, the tag that its folder made then)
        self._digests = {}  # name -> (what was seen of its files, a digest of their content)
        self._ready = {}  # name -> the tag that was last seen on the engine
        self._hearing = set()  # tags of images whose entrypoint takes its settings over stdin

    def names(self):
        """Return the names that a workspace can ask for."""
        found = {path.parent.name for folder in self._folders for path in folder.glob('*/Dockerfile')}
        return sorted(name for name in found - {BASE} if TEMPLATE_NAME.fullmatch(name))

    def describe(self, name):
        """Return the first sentence of the comment at the head of a template's Dockerfile."""
        first = (self._folder(name) / 'Dockerfile').read_text(errors='replace').partition('\n')[0]
        return first.lstrip('# ').partition('. ')[0].rstrip('.') + '.' if first.startswith('#') else ''

    def holds(self, name):
        """Return what a template's image holds, as its Dockerfile says: ['node 24.21.0', 'git', ...]."""
        text = (self._folder(name) / 'Dockerfile').read_text(errors='replace').replace('\\\n', ' ')
        versions = [f"{key.lower().replace('_', '-')} {value}" for key, value in VERSION.findall(text)]
        last_stage = re.split(r'^FROM ', text, flags=re.MULTILINE)[-1]
        packages = [word for words in INSTALLED.findall(last_stage) for word in words.split()
                    if not word.startswith('-')]
        below = self.holds(BASE) if name != BASE and self._stands_on_base(name) else []
        return list(dict.fromkeys([*versions, *packages, *below]))

    def state(self, name):
        """Return {image, state, error, build}: state is ready, building, failed or missing, as last seen;
        `build` is the Build that goes on, or None."""
        try:
            seen_at, tag = self._seen.get(name, (0, None))
            if time.monotonic() - seen_at > SEEN_FOR:
                tag = self.tag(name)
                self._seen[name] = time.monotonic(), tag
        except UnreadableTemplate as error:
            return {'image': f'{PREFIX}/{name.lower()}', 'state': 'failed', 'error': str(error),
                    'build': None}
        build, error = self._builds.get(name), self._errors.get(name)
        there = 'ready' if self._ready.get(name) == tag else 'missing'
        state = 'building' if build else 'failed' if error else there
        return {'image': tag, 'state': state, 'error': error, 'build': build}

    def log(self, name):
        """Return what the build of a template's image has printed, the one that goes on or the last; raise
        NotFound for a template that there is not."""
        if name not in [BASE, *self.names()]:
            raise NotFound(f'There is no template {quoted(name)}; GET /api/templates lists them.')
        return list(self._logs.get(name, ()))

    def tag(self, name):
        """Return the name of the image that a template's folder, as it is now, makes."""
        below = self.tag(BASE) if name != BASE and self._stands_on_base(name) else self._base_image
        try:
            files = self._context(name)
            seen = [(key, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size)
                    for key, (path, _) in files.items() for stat in [path.stat()]]
            if self._digests.get(name, ((), ''))[0] != seen:
                # Files may be large: in a thread, other greenlets go on meanwhile.
                self._digests[name] = seen, gevent.get_hub().threadpool.apply(digest, (files,))
        except OSError as error:
            raise UnreadableTemplate(f'The file {error.filename} of template {name} is not readable: '
                                     f'{error.strerror}.') from error
        made_of = f'{self._digests[name][1]} {below}'
        return f'{PREFIX}/{name.lower()}:{hashlib.sha256(made_of.encode()).hexdigest()[:12]}'

    def look(self):
        """See which images the engine has."""
        for name in [BASE, *self.names()]:
            with contextlib.suppress(UnreadableTemplate):  # its state says so
                tag = self.tag(name)
                if self._has_image(tag):
                    self._ready[name] = tag
                else:
                    self._ready.pop(name, None)

    def image(self, name, on_line, cancelled):
        """Return the tag of a template's image, built if need be. Everybody who asks meanwhile shares one
        build.

        `on_line` gets its output; when the event `cancelled` is set, the caller leaves with Superseded and
        the build goes on.
        """
        build = self._builds.get(name)
        if build is None:
            tag = self.tag(name)
            if self._has_image(tag):
                self._ready[name] = tag
                self._errors.pop(name, None)
                return tag
            build = self._builds.get(name) or self._start(name, tag)
        build.listeners.append(on_line)
        try:
            gevent.wait([build.greenlet, cancelled], count=1)
        finally:
            build.listeners.remove(on_line)
        if not build.greenlet.ready():
            raise Superseded(name)
        made = build.greenlet.get()
        if isinstance(made, BackendError):
            raise made
        return made

    def is_there(self, tag):
        """Return whether the engine has an image; it is not built for that."""
        return self._has_image(tag)

    def hears(self, tag):
        """Return whether the entrypoint of an image that is there takes its settings over stdin."""
        return tag in self._hearing

    def stop(self):
        """End the builds that go on."""
        gevent.killall([build.greenlet for build in self._builds.values()], block=True, timeout=5)

    # Building

    def _start(self, name, tag):
        build = self._builds[name] = Build()
        self._logs[name] = build.lines
        build.greenlet = gevent.Greenlet(self._make, name, tag, build)
        build.greenlet.start()
        return build

    def _make(self, name, tag, build):
        """Return the tag, or the error that every caller is to raise: of one that is raised here gevent would
        print a traceback, and it is no bug."""
        telling = gevent.spawn(self._tell, name, build)
        try:
            build.say(f'Building image {tag} of template {name}.')
            log.info('Building image %s of template %s; this can take some minutes.', tag, name)
            late = DockerError(f'The build of image {tag} took more than BUILD_TIMEOUT={self._timeout} s.')
            if not self._client.fetch(tag, build.say):
                with gevent.Timeout(self._timeout, late):
                    self._build(name, tag, self._below(name, build.say),
                                lambda line: self._said(build, name, line))
            self._has_image(tag)  # and whether it hears
            self._errors.pop(name, None)
            self._ready[name] = tag
            log.info('Image %s is ready after %.0f s.', tag, time.time() - build.started_at)
            return tag
        except BackendError as error:
            is_told = name != BASE and self._errors.get(BASE) == str(error)
            log.log(logging.DEBUG if is_told else logging.ERROR, 'No image for template %s: %s', name, error)
            self._errors[name] = str(error)
            return error
        finally:
            telling.kill(block=False)
            del self._builds[name]

    def _tell(self, name, build):
        """Log now and then how far a build is; one that waits for the base leaves that to it."""
        while True:
            gevent.sleep(TELL_PAUSE)
            if name == BASE or BASE not in self._builds:
                step = f'step {build.step} of {build.steps}, ' if build.steps else ''
                minutes, seconds = divmod(int(time.time() - build.started_at), 60)
                log.info('build %s: %s%d:%02d so far. It printed last: %s', name, step, minutes, seconds,
                         quotable(build.lines[-1].strip()) if build.lines else 'nothing')

    def _below(self, name, on_line):
        """Return the image that a template stands on, '' for one that needs none of ours."""
        if name == BASE:
            return self._debian(on_line)
        return self.image(BASE, on_line, gevent.event.Event()) if self._stands_on_base(name) else ''

    def _build(self, name, tag, below, on_line):
        """Build an image; each line of output goes to `on_line`. Raises DockerError with the last ones."""
        last, printed, hint = collections.deque(maxlen=LAST_LINES), Printed(), ''
        with self._packed(name) as context, self._client.errors():
            output = self._client.api.build(
                fileobj=context, custom_context=True, tag=tag,
                buildargs={'BASE_IMAGE': below} if below else {},
                labels={f'{PREFIX}.template': name}, rm=True, forcerm=True, decode=True)
            for item in output:
                failure = COMMAND.sub(r'\1...', item.get('error', ''))
                for line in printed.take(f'\n{failure}\n' if failure else item.get('stream', '')):
                    if STEP.match(line):  # those before it were done
                        last.clear()
                        hint = ''
                    hint = f'\n{TO_TRUST}' if CERTIFICATE.search(line) else hint
                    last.append(quotable(line))
                    on_line(line)
                if 'error' in item:
                    raise DockerError(f'The build of image {tag} failed:\n' + '\n'.join(last) + hint)

    @contextlib.contextmanager
    def _packed(self, name):
        """Give a file with what the build of a template is made from; a disk that is full is not the engine's
        fault."""
        with tempfile.TemporaryFile(prefix='agentbackend-context-') as context:
            try:
                gevent.get_hub().threadpool.apply(pack, (self._context(name), context))
            except OSError as error:
                raise DockerError(f'The files of template {name} could not be packed into '
                                  f'{tempfile.gettempdir()}: {error.strerror}.') from error
            yield context

    @staticmethod
    def _said(build, name, line):
        if STEP.match(line):
            log.info('build %s: %s', name, quotable(line))
        else:
            log.debug('build %s: %s', name, line)
        build.say(line)

    def _debian(self, on_line):
        """Return the name of a Debian image that the engine has, pulled if need be. Raises
        MissingBaseImage."""
        if self._debian_there():
            return self._debian_there()
        try:
            on_line(f'Pulling {self._base_image}.')
            self._pull(self._base_image, on_line)
            return self._base_image
        except EngineUnavailable:
            raise
        except DockerError as error:
            reason = str(error)
        deadline = time.monotonic() + self._base_image_timeout
        on_line(f'{self._base_image} could not be pulled ({reason}).')
        while time.monotonic() < deadline:
            on_line('Waiting for a Debian image, which is being made.')
            gevent.sleep(BASE_PAUSE)
            if self._debian_there():
                return self._debian_there()
        raise MissingBaseImage(
            f'No base image: {self._base_image} is not on the engine and could not be pulled ({reason}). Do '
            'one of: '
            f'docker pull {self._base_image}; as root, templates/make-debian-image, which makes one from a '
            'Debian mirror; '
            'BASE_IMAGE=<a Debian image that the engine has>.')

    def _debian_there(self):
        return next((image for image in (self._base_image, OWN_BASE_IMAGE) if self._has_image(image)), None)

    def _pull(self, image, on_line):
        """Pull an image; give up when the registry says nothing for half a minute."""
        repository, tag = docker.utils.parse_repository_tag(image)
        silent = DockerError('the registry says nothing')
        for item in self._client.progress(
                lambda: self._client.api.pull(repository, tag=tag or 'latest', stream=True, decode=True),
                PULL_TIMEOUT, silent):
            if 'progress' not in item:
                on_line(f"{item.get('id', '')} {item.get('status', '')}".strip())

    def _has_image(self, tag):
        with self._client.errors():
            try:
                labels = self._client.api.inspect_image(tag)['Config']['Labels'] or {}
            except docker.errors.ImageNotFound:
                return False
        if labels.get(HEARS) == 'stdin':
            self._hearing.add(tag)
        return True

    # Folders

    def _folder(self, name):
        for folder in reversed(self._folders):
            if TEMPLATE_NAME.fullmatch(name) and (folder / name / 'Dockerfile').is_file():
                return folder / name
        raise refusal('template', f"is {quoted(name)}, but known are {', '.join(self.names())}")

    def _context(self, name):
        """Return what an image is built from, {relative path: (path, mode)}; all that the folder holds
        arrives executable."""
        folder = self._folder(name)
        files = {str(path.relative_to(folder)): (path, 0o755) for path in sorted(folder.rglob('*'))
                 if path.is_file() and not {'.git', '__pycache__'} & set(path.relative_to(folder).parts)}
        if name == BASE:
            files['extra-ca-certs.crt'] = (Path(self._ca_certs or os.devnull), 0o644)
        return files

    def _stands_on_base(self, name):
        return 'BASE_IMAGE' in (self._folder(name) / 'Dockerfile').read_text(errors='replace')


def shown(line):
    """Return what a terminal shows of a line in the end: it is written over from the beginning at each CR."""
    return next((part.rstrip() for part in reversed(ESCAPES.sub('', line).split('\r')) if part.strip()), '')


def quotable(line):
    """Return a line, its end left out when it is long."""
    return line if len(line) <= MAX_QUOTED else f'{line[:MAX_QUOTED]}...'


def digest(files):
    """Return a digest of the names and contents of files, {name: (path, mode)}, read piece by piece."""
    content = hashlib.sha256()
    for name, (path, _) in sorted(files.items()):
        content.update(f'{name}\0{path.stat().st_size}\0'.encode())
        with open(path, 'rb') as file:
            while piece := file.read(2**18):
                content.update(piece)
    return content.hexdigest()


def pack(files, target):
    """Write files, {name: (path, mode)}, as a tar into a file object: the same bytes for the same files."""
    with tarfile.open(fileobj=target, mode='w') as archive:
        for name, (path, mode) in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            with open(path, 'rb') as file:
                entry.size, entry.mode = os.fstat(file.fileno()).st_size, mode
                archive.addfile(entry, file)
    target.seek(0)
