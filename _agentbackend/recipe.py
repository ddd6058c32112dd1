"""What a workspace's container is made of: names, labels, environment, files and limits."""
import contextlib
import json
import re
import shlex

import gevent.lock

from _agentbackend.dockerclient import make_tar
from _agentbackend.drafts import CREDENTIALS, KEY
from _agentbackend.engine import CODE_SERVER_PORT, PREFIX, SSH_PORT, USER, USER_ID
from _agentbackend.errors import DockerError, refusal
from _agentbackend.records import AGENT

SETTINGS_FOLDER = '/etc/agentbackend'  # in the container: what the entrypoint reads
# Of the variables of a workspace those that everything in it has, editor and clone too; dev's shells have the
# others.
FOR_ALL = re.compile(r'(?i:(http|https|ftp|all|no)_proxy)|GIT_SSL_[A-Z_]+|TZ')
TAKE_TIMEOUT, SOON = 10, 2  # seconds that an entrypoint has to take its settings, and then to be ready
INSIDE = {'codeServer': CODE_SERVER_PORT, 'ssh': SSH_PORT}


class Recipe:
    """Knows the settings that all workspaces of this instance share, and what a record adds to them."""

    def __init__(self, config, engine):
        self._config = config
        self._engine = engine
        self._network = gevent.lock.BoundedSemaphore(1)  # it is not removed while somebody relies on it

    def name(self, workspace_name):
        """Return the name of a container: the engine itself refuses a second one, also from another
        process."""
        return f'{self._config.instance}-{workspace_name}'

    def names_of(self, engine_names):
        """Return the names of workspaces that the names of containers on the engine stand for."""
        prefix = self.name('')
        return {name[len(prefix):] for name in engine_names if name.startswith(prefix)}

    def network(self, workspace):
        """Return the name of the network on which a workspace stands; that of the instance is made if need
        be."""
        if self._config.workspace_network:
            return self._config.workspace_network
        with self._network:
            return self._engine.create_network(isolated=True, node=workspace.node)

    def drop_network(self, is_needed):
        """Remove the network of this instance unless it is needed, or another one is used."""
        with self._network, contextlib.suppress(DockerError):
            if not self._config.workspace_network and not is_needed():
                self._engine.remove_network()

    def is_free(self, port):
        """Return whether nothing listens on a host port that is to be published."""
        return self._engine.is_free(self._config.workspace_bind_address, port)

    def container(self, workspace, image, network, *, stdin=False):
        """Return the arguments of Engine.create_container for a record; `stdin`: it is told its settings over
        that."""
        config = self._config
        return {
            'name': self.name(workspace.name), 'image': image, 'network': network,
            'env': self.environment(workspace) | ({'WORKSPACE_SETTINGS': 'stdin'} if stdin else {}),
            'stdin': stdin,
            'labels': self.labels(workspace) | {f'{PREFIX}.ports': json.dumps(workspace.ports)},
            'volumes': {config.workspace_base_path: self._engine.volume_of(workspace.id),
                        f'/home/{USER}': self._engine.home_of(workspace.id)},
            'ports': {INSIDE.get(key) or int(key): port for key, port in workspace.ports.items()},
            'bind_address': config.workspace_bind_address, 'memory': workspace.memory,
            'cpus': self.cpus_of(workspace), 'pids': config.workspace_pids,
            'new_privileges': workspace.type != AGENT}

    def files(self, workspace, once=None):
        """Return the files that a workspace reads, {path: (bytes, mode, owner)}; `once` are secrets for its
        first clone.

        A secret that was taken back is an empty file.
        """
        keys = self._config.shared_keys() + workspace.ssh_public_keys
        told = self.environment(workspace)
        identity = {'name': workspace.git_user_name, 'email': workspace.git_user_email}
        lines = ''.join(f'\t{name} = {git_value(text)}\n' for name, text in identity.items() if text)
        public = {'authorized_keys': ''.join(f'{key}\n' for key in keys), 'env': shell_lines(workspace.env),
                  'gitconfig': f'[user]\n{lines}',
                  'workspace': ''.join(f'{name}={value}\0' for name, value in told.items())}
        if workspace.setup:
            public['setup'] = workspace.setup
        secret = {name: workspace.git_access.get(name, '') for name in (CREDENTIALS, KEY)}
        secret |= {f'{name}-once': text for name, text in (once or {}).items()}
        files = {'password': (f'{workspace.password}\n'.encode(), 0o600, 0)}
        files |= {name: (text.encode(), 0o644, 0) for name, text in public.items()}
        files |= {name: (text.encode(), 0o600, USER_ID) for name, text in secret.items()}
        return {f'{SETTINGS_FOLDER}/{name}': content for name, content in files.items()}

    @staticmethod
    def spoken(files, word='-'):
        """Return files as they are said to an entrypoint that takes its settings over stdin, which repeats
        the word once it has them."""
        settings = make_tar(files)
        return f'{word} {len(settings)}\n'.encode() + settings

    @staticmethod
    def answers(word):
        """Return what an entrypoint answers to that, as Engine.tell takes it: that it has them, and soon that
        all is there, if nothing is cloned or set up; to wait for that costs less than to look."""
        return (f'workspace: owned {word}\n'.encode(), TAKE_TIMEOUT), (b'workspace: started in ', SOON)

    def environment(self, workspace):
        """Return the variables that everything in a workspace has, not only dev's shells."""
        base = self._config.workspace_base_path
        for_all = {name: value for name, value in workspace.env.items() if FOR_ALL.fullmatch(name)}
        return for_all | {
            'WORKSPACE_ID': workspace.id, 'WORKSPACE_NAME': workspace.folder,
            'WORKSPACE_TYPE': workspace.type, 'WORKSPACE_BASE_PATH': base,
            'WORKSPACE_PORTS': ' '.join(key for key in workspace.ports if key.isdigit()),
            'PROJECT_DIR': f'{base}/{workspace.folder}', 'SSH_ENABLED': '1' if workspace.ssh else '0',
            'GIT_URL': workspace.git_url, 'GIT_BRANCH': workspace.git_branch,
            'GIT_DEPTH': str(workspace.git_depth or ''), 'GIT_FILTER': workspace.git_filter or ''}

    def labels(self, workspace):
        """Return what is known of a workspace when the state is lost; no environment, no keys, no
        password."""
        spec = {'folder': workspace.folder, 'ssh': workspace.ssh, 'ttl': workspace.ttl,
                'labels': workspace.labels,
                'wanted_ports': workspace.wanted_ports}
        values = {'id': workspace.id, 'instance': self._config.instance, 'name': workspace.name,
                  'type': workspace.type,
                  'template': workspace.template, 'createdAt': repr(workspace.created_at),
                  'ports': json.dumps(workspace.ports), 'gitUrl': workspace.git_url,
                  'gitBranch': workspace.git_branch,
                  'spec': json.dumps(spec)}
        return {f'{PREFIX}.{key}': value for key, value in values.items()}

    def cpus_of(self, workspace):
        """Return how many cores a workspace may use: what it asks for, or the default as far as there are so
        many."""
        return workspace.cpus or min(self._config.workspace_cpus, self._engine.cpus(workspace.node))

    def check_limits(self, body, node=''):
        """Raise ValidationError for limits that the engine does not have."""
        if (body.get('cpus') or 0) > self._engine.cpus(node):
            raise refusal('cpus', f"is {body['cpus']:g}, which is more than this machine has "
                                  f'({self._engine.cpus(node)})')


def shell_lines(env):
    """Return an environment as lines that a shell reads. PATH goes before the one that is there."""
    lines = []
    for name, value in env.items():
        if name == 'PATH':
            folders = [folder for folder in value.split(':') if folder not in ('', '$PATH', '${PATH}')]
            lines.append(f"export PATH={shlex.quote(':'.join(folders))}:\"$PATH\"\n")
        else:
            lines.append(f'export {name}={shlex.quote(value)}\n')
    return ''.join(lines)


def read_shell_lines(text):
    """Return the environment that `shell_lines` has written."""
    found = dict(word.partition('=')[::2] for word in shlex.split(text) if word != 'export')
    return found | ({'PATH': found['PATH'].removesuffix(':$PATH')} if 'PATH' in found else {})


def git_value(text):
    """Return a text as the value of a line in git's configuration."""
    escaped = text.replace('\\', r'\\').replace('"', r'\"')
    return f'"{escaped}"'
