"""What a workspace's container is made of: names, labels, environment, files and limits."""
import json
import socket
from pathlib import Path

from _agentbackend.engine import CODE_SERVER_PORT, PREFIX, SSH_PORT
from _agentbackend.records import AGENT

SETTINGS_FOLDER = '/etc/agentbackend'  # in the container: what the entrypoint reads
INSIDE = {'codeServer': CODE_SERVER_PORT, 'ssh': SSH_PORT}


class Recipe:
    """Knows the settings that all workspaces of this instance share, and what a record adds to them."""

    def __init__(self, config, engine):
        self._config = config
        self._engine = engine
        self._cpus = None  # how many the engine has

    def name(self, workspace_name):
        """Return the name of a container: the engine itself refuses a second one, also from another
        process."""
        return f'{self._config.instance}-{workspace_name}'

    def names_of(self, engine_names):
        """Return the names of workspaces that the names of containers on the engine stand for."""
        prefix = self.name('')
        return {name[len(prefix):] for name in engine_names if name.startswith(prefix)}

    def is_free(self, port):
        """Return whether nothing listens on a host port that is to be published."""
        return is_bindable(self._config.workspace_bind_address, port)

    def container(self, workspace, image, network):
        """Return the arguments of Engine.create_container for a record."""
        config = self._config
        return {
            'name': self.name(workspace.name), 'image': image, 'network': network,
            'env': workspace.env | self.reserved_environment(workspace),
            'labels': self.labels(workspace) | {f'{PREFIX}.ports': json.dumps(workspace.ports)},
            'volume': self._engine.volume_of(workspace.id), 'mount': config.workspace_base_path,
            'ports': {INSIDE.get(key) or int(key): port for key, port in workspace.ports.items()},
            'bind_address': config.workspace_bind_address, 'memory': workspace.memory,
            'cpus': workspace.cpus or self._default_cpus(), 'pids': config.workspace_pids,
            'new_privileges': workspace.type != AGENT}

    def files(self, workspace, credentials):
        """Return the files that the entrypoint reads, {path: (bytes, mode)}."""
        keys = [key.strip() for key in self._shared_keys() + workspace.ssh_public_keys if key.strip()]
        files = {'password': (f'{workspace.password}\n'.encode(), 0o600),
                 'authorized_keys': (''.join(f'{key}\n' for key in keys).encode(), 0o644)}
        if credentials:
            files['git-credentials'] = (credentials.encode(), 0o600)
        return {f'{SETTINGS_FOLDER}/{name}': content for name, content in files.items()}

    def reserved_environment(self, workspace=None):
        """Return the variables that a workspace is given by us; without a record their names, for nothing."""
        base = self._config.workspace_base_path
        values = {'WORKSPACE_ID': 'id', 'WORKSPACE_NAME': 'folder', 'WORKSPACE_TYPE': 'type',
                  'GIT_URL': 'git_url',
                  'GIT_BRANCH': 'git_branch'}
        return {name: getattr(workspace, key, '') for name, key in values.items()} | {
            'WORKSPACE_BASE_PATH': base, 'PROJECT_DIR': f"{base}/{getattr(workspace, 'folder', '')}",
            'SSH_ENABLED': '1' if getattr(workspace, 'ssh', False) else '0'}

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

    def _default_cpus(self):
        if self._cpus is None:
            self._cpus = self._engine.info()['cpus']
        return min(self._config.workspace_cpus, self._cpus)

    def _shared_keys(self):
        path = self._config.ssh_authorized_keys
        return Path(path).read_text().splitlines() if path else []


def is_bindable(address, port):
    """Return whether nothing listens on a host port. An address that is not this machine's tells nothing, so
    it passes."""
    family = socket.AF_INET6 if ':' in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # A connection in TIME_WAIT is no listener.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            return error.errno not in (98, 13)  # EADDRINUSE, EACCES
    return True
