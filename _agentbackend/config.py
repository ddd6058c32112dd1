"""The settings, read once from the environment."""
import dataclasses
import ipaddress
import os
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from _agentbackend.errors import ConfigError

UNITS = {'': 1, 'b': 1, 'k': 2**10, 'm': 2**20, 'g': 2**30, 't': 2**40}


def parse_port(text):
    """Return the number of a port to listen on; 0 lets the system choose one."""
    number = int(text)
    if not 0 <= number <= 65535:
        raise ValueError('a port is a number from 0 to 65535')
    return number


def parse_port_range(text):
    """Return (first, last) of `8443-8550`; one port alone is a range too."""
    first, dash, last = text.partition('-')
    first, last = int(first), int(last if dash else first)
    if not 1 <= first <= last <= 65535:
        raise ValueError('a port range is FIRST-LAST with 1 <= FIRST <= LAST <= 65535')
    return first, last


def parse_size(text):
    """Return the bytes of `4g`, `512m` or `1073741824`."""
    match = re.fullmatch(r'(\d+)\s*([bkmgt]?)b?', text.strip().lower())
    if not match or int(match[1]) == 0:  # to the engine, 0 is no limit at all
        raise ValueError('a size is a positive number of bytes, or one with k, m, g or t behind it')
    return int(match[1]) * UNITS[match[2]]


def parse_seconds(text):
    """Return a duration, which may have a fraction."""
    seconds = float(text)
    if not 0 < seconds < 1e9:
        raise ValueError('a duration is a positive number of seconds')
    return int(seconds) if seconds == int(seconds) else seconds


def parse_count(text):
    """Return a whole number of at least one."""
    number = int(text)
    if number < 1:
        raise ValueError('it must be at least 1')
    return number


def parse_cpus(text):
    """Return a number of cores, which may have a fraction; the engine takes no less than 0.01."""
    cpus = float(text)
    if not 0.01 <= cpus <= 1024:
        raise ValueError('it is a number of cores, at least 0.01')
    return cpus


def parse_words(text):
    """Return the words of a list with spaces or commas between them."""
    return tuple(word for word in re.split(r'[\s,]+', text.strip()) if word)


def parse_pool(text):
    """Return {kind: count} of `blank:2,bun-typescript/agent:1`."""
    found = {}
    for word in parse_words(text):
        match = re.fullmatch(r'([A-Za-z0-9][A-Za-z0-9_.-]{0,62}(?:/agent)?):([1-9]\d{0,3})', word)
        if not match or match[1] in found:
            raise ValueError('it is a list of TEMPLATE:COUNT and TEMPLATE/agent:COUNT, each once')
        found[match[1]] = int(match[2])
    return found


def parse_instance(text):
    """Return the name of an instance, which begins the names of its containers and volumes."""
    if not re.fullmatch(r'[a-z0-9][a-z0-9_.-]{0,31}', text):
        raise ValueError("it has small letters, digits and '_.-', at most 32")
    return text


def parse_name(text):
    """Return the name of a template."""
    if not re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9_.-]{0,62}', text):
        raise ValueError("it has letters, digits and '_.-'")
    return text


def parse_path(text):
    """Return an absolute path inside of containers, without a slash at its end."""
    if not re.fullmatch(r'(/[A-Za-z0-9_.-]+)+/?', text) or '..' in text.split('/'):
        raise ValueError('it must be an absolute path, not the root, of letters, digits and _.-')
    return text.rstrip('/')


def parse_address(text):
    """Return an IP address; the engine binds ports to no names."""
    return text if text == NODE_ADDRESS else str(ipaddress.ip_address(text))


def parse_template(text):
    """Return a URL with {address} or {name} of a node."""
    if not re.fullmatch(r'(ssh|tcp|unix)://[^{}]*(\{(address|name)\}[^{}]*)+', text):
        raise ValueError('it is a URL such as tcp://{address}:2376, with {address} or {name}')
    return text


def parse_registry(text):
    """Return a registry, with or without a prefix, as names of images begin with it."""
    host, prefix = r'(?=[^/]*[.:])[A-Za-z0-9][A-Za-z0-9.-]*(:\d{1,5})?', r'(/[a-z0-9]+([._-]+[a-z0-9]+)*)*/?'
    if text and not re.fullmatch(host + prefix, text):
        raise ValueError('it is host:port or host:port/prefix, without http:// before it, the prefix in '
                         'small letters; a host without a dot needs its port')
    return text.rstrip('/')


def parse_log_level(text):
    """Return a level as logging names it."""
    if text.upper() not in ('DEBUG', 'INFO', 'WARNING', 'ERROR'):
        raise ValueError('it is one of debug, info, warning and error')
    return text.upper()


def parse_command(text):
    """Return the words of a command line, split as a shell does."""
    return tuple(shlex.split(text))


NODE_ADDRESS = '{node}'  # a bind address: that of the node
# Bind addresses behind which a machine is reached by whatever address it has.
EVERYWHERE = ('0.0.0.0', '::', NODE_ADDRESS)
SECRET_SETTINGS = ('api_token', 'anthropic_api_key', 'anthropic_auth_token', 'claude_code_oauth_token')


def setting(default, parse, text):
    """Return a field of Config with its default as text, the function that reads it, and its line of the
    README."""
    return field(metadata={'default': default, 'parse': parse, 'help': text})


@dataclass(frozen=True)
class Config:
    """The settings. Each is the environment variable of the same name in capitals."""

    port: int = setting('3100', parse_port, 'Port of the server.')
    host: str = setting('127.0.0.1', str,
                        'Address the server listens on. Any other than loopback needs `API_TOKEN`.')
    docker_host: str = setting('', str,
                               'Docker engine, as `unix:///path`, a bare socket path, or `tcp://host:port`. '
                               'Empty is the default socket. Several with commas between, `ssh://host` '
                               'among them, or `swarm://manager,manager`, are '
                               '[several nodes](#from-one-machine-to-three).')
    node_engines: str = setting('ssh://{address}', parse_template,
                                'How the engine of a node of a swarm is reached: a URL with `{address}` or '
                                '`{name}`.')
    registry: str = setting('', parse_registry,
                            'Registry by way of which images come to several nodes, as `host:port` or '
                            '`host:port/prefix`. Empty sends each image whole, through this server.')
    docker_tls_verify: str = setting('', str,
                                     'As for the `docker` command: not empty makes a `tcp://` engine prove '
                                     'itself.')
    docker_cert_path: str = setting('', str,
                                    'As for the `docker` command: folder with `ca.pem`, `cert.pem` and '
                                    '`key.pem`.')
    workspace_base_path: str = setting('/workspace', parse_path,
                                       'Where a workspace has its volume; the project is `<this>/<name>`.')
    log_level: str = setting('info', parse_log_level, '`debug`, `info`, `warning` or `error`.')
    instance: str = setting('default', parse_instance,
                            'Name of this server on its engine. Servers with different names '
                            "don't see each other's workspaces.")
    api_token: str = setting('', str, 'When set, every call needs `Authorization: Bearer <token>`.')
    allowed_hosts: tuple = setting('', parse_words,
                                   'Host names, beside localhost, `HOST` and plain addresses of loopback, '
                                   'under which the server may be called.')
    allowed_origins: tuple = setting('', parse_words,
                                     'Origins of web pages, beside those on localhost, that may call '
                                     'the server, as `https://dev.example.org`.')
    code_server_ports: tuple = setting('8443-8550', parse_port_range, 'Host ports for editors.')
    ssh_ports: tuple = setting('2223-2250', parse_port_range, 'Host ports for SSH.')
    custom_ports: tuple = setting('10000-10999', parse_port_range,
                                  'Host ports for the `ports` of a workspace.')
    workspace_bind_address: str = setting('127.0.0.1', parse_address,
                                          'Host address that published ports are bound to; links name it, '
                                          'or for `0.0.0.0` the name by which the API is called. `{node}` '
                                          'is the address of each node, where there are several.')
    workspace_host: str = setting('', str,
                                  'Host name under which published ports are reached, when it is not the '
                                  'bind address: '
                                  'the engine is remote, or the server runs in a container itself.')
    workspace_network: str = setting('', str,
                                     'Docker network that workspaces stand on. Empty is one of their own, on '
                                     'which they '
                                     "don't reach each other.")
    workspace_memory: int = setting('4g', parse_size, 'Memory limit of a workspace that names none.')
    workspace_cpus: float = setting('2', parse_cpus,
                                    'Cores of a workspace that names none, at most what the engine has.')
    workspace_pids: int = setting('4096', parse_count, 'How many processes a workspace may have.')
    agent_ttl: int = setting('86400', parse_seconds,
                             'Seconds without activity after which a workspace of type `agent` '
                             'is deleted, if it names no `ttl`.')
    default_agent: str = setting('claude', parse_name, 'Agent of a task that names none.')
    agent_command: tuple = setting('', parse_command,
                                   'Command line of the agent `command`: it reads the task from stdin, and '
                                   'prints events as JSON or plain text.')
    agent_timeout: float = setting('1800', parse_seconds, 'Seconds a task may take at most.')
    agent_idle_timeout: float = setting('900', parse_seconds,
                                        'Seconds an agent may say nothing, unless a tool that it called is '
                                        'at work.')
    agent_max_output: int = setting('64m', parse_size, 'How much an agent may print in a task.')
    keep_runs: int = setting('10000', parse_count,
                             'How many ended tasks are kept, with their transcripts; the oldest go first.')
    keep_runs_for: float = setting('7776000', parse_seconds, 'Seconds that an ended task is kept: 90 days.')
    agent_max_tasks: int = setting('8', parse_count, 'How many tasks may run at once.')
    exec_max_output: int = setting('1m', parse_size,
                                   'How much of stdout and of stderr the answer of a command holds; streams '
                                   'have no such limit.')
    exec_max_commands: int = setting('256', parse_count,
                                     'How many commands may run at once for clients that wait for them; also '
                                     'how many detached ones in a workspace.')
    max_terminals: int = setting('20', parse_count, 'How many terminals a workspace may have.')
    anthropic_api_key: str = setting('', str,
                                     'Key for Claude. It is given to an agent when it starts, and to nothing '
                                     'else in the workspace.')
    anthropic_auth_token: str = setting('', str, 'Bearer token for Claude, in the place of a key.')
    claude_code_oauth_token: str = setting('', str, 'Token of a Claude subscription, in the place of a key.')
    anthropic_base_url: str = setting('', str,
                                      "Where Claude's API is, when it is a gateway; reached from inside the "
                                      "workspace.")
    default_template: str = setting('bun-typescript', parse_name, 'Template of a workspace that names none.')
    templates_dir: str = setting('', str,
                                 'Folder with templates of your own; one named as a built-in takes its '
                                 'place.')
    git_user_name: str = setting('', str.strip,
                                 'Name in the commits of workspaces that name none. Empty is `dev`.')
    git_user_email: str = setting('', str.strip, 'Address in those commits. Empty is `dev@localhost`.')
    prebuild: tuple = setting('bun-typescript', parse_words,
                              'Templates whose images are built as soon as the engine answers. '
                              '`none` builds each when it is first used.')
    warm_pool: dict = setting('', parse_pool,
                              'How many workspaces of a template are made ahead, so that a create takes a '
                              'moment, as `blank:2,bun-typescript/agent:1`.')
    base_image: str = setting('debian:bookworm-slim', str,
                              'Debian image that `templates/base` begins with. It is taken from the '
                              'engine, else pulled; `templates/make-debian-image` makes one where no '
                              'registry is reached.')
    base_image_timeout: float = setting('1', parse_seconds,
                                        'Seconds to wait for that image while somebody makes it, as `run.sh` '
                                        'does.')
    extra_ca_certs: str = setting('', str,
                                  'File of CA certificates that images trust beside their own. Empty takes '
                                  'the file that '
                                  '`NODE_EXTRA_CA_CERTS` or `SSL_CERT_FILE` names.')
    ssh_authorized_keys: str = setting('', str, 'File of public keys that may log in to every workspace.')
    ready_timeout: float = setting('600', parse_seconds,
                                   'Seconds without a sign of life after which a workspace that starts is '
                                   'given up.')
    stop_timeout: int = setting('10', parse_count,
                                'Seconds between SIGTERM and SIGKILL when a workspace stops.')
    build_timeout: float = setting('3600', parse_seconds, 'Seconds the build of an image may take.')
    max_body: int = setting('8m', parse_size, 'Largest body of a request.')
    request_timeout: float = setting('10', parse_seconds,
                                     'Seconds a client has for the headers of a request, and again for its '
                                     'body.')
    max_streams: int = setting('4000', parse_count, 'How many SSE and WebSocket streams may be open.')
    state_dir: str = setting('', str,
                             "Folder of the state file. Empty is `agentbackend` in the user's state folder.")

    @classmethod
    def from_env(cls, environ):
        """Read every setting from `environ`; raise ConfigError with the name of the first that makes no
        sense."""
        values = {}
        for item in dataclasses.fields(cls):
            name = item.name.upper()
            text = environ.get(name) or item.metadata['default']
            try:
                values[item.name] = item.metadata['parse'](text)
            except ValueError as error:
                raise ConfigError(f'{name}={text!r} makes no sense: {error}.') from error
        return cls(**cls._derived(values, environ))._checked()

    @staticmethod
    def _derived(values, environ):
        if not values['extra_ca_certs']:
            found = environ.get('NODE_EXTRA_CA_CERTS') or environ.get('SSL_CERT_FILE')
            values['extra_ca_certs'] = found or ''
        if not values['state_dir']:
            home = environ.get('XDG_STATE_HOME') or os.path.join(os.path.expanduser('~'), '.local', 'state')
            values['state_dir'] = os.path.join(home, 'agentbackend')
        scheme, hosts = re.fullmatch(r'(swarm://)?(.*)', values['docker_host'], re.DOTALL).groups()
        hosts = [f'unix://{host}' if host.startswith('/') else host for host in re.split(r'\s*,\s*', hosts)]
        values['docker_host'] = (scheme or '') + ','.join(hosts)
        if values['prebuild'] == ('none',):
            values['prebuild'] = ()
        return values

    @property
    def has_nodes(self):
        """Whether there are several engines, one on each node."""
        return ',' in self.docker_host or self.docker_host.startswith(('swarm://', 'ssh://'))

    def secrets(self):
        """Return the values that no event, log line or file may show."""
        return [getattr(self, name) for name in SECRET_SETTINGS if getattr(self, name)]

    def shared_keys(self):
        """Return the keys that the file SSH_AUTHORIZED_KEYS has; raise OSError when it cannot be read."""
        path = self.ssh_authorized_keys
        lines = [line.strip() for line in Path(path).read_text().splitlines()] if path else []
        return [line for line in lines if line and not line.startswith('#')]

    def agent_keys(self):
        """Return the environment that only agents are given."""
        names = ('anthropic_api_key', 'anthropic_auth_token', 'claude_code_oauth_token', 'anthropic_base_url')
        return {name.upper(): getattr(self, name) for name in names if getattr(self, name)}

    def _checked(self):
        if not is_loopback(self.host) and not self.api_token:
            raise ConfigError(f'HOST={self.host!r} is reached from other machines, and whoever reaches this '
                              'server is root here: '
                              'set API_TOKEN too, or leave HOST at 127.0.0.1.')
        ranges = {name: getattr(self, name.lower())
                  for name in ('CODE_SERVER_PORTS', 'SSH_PORTS', 'CUSTOM_PORTS')}
        for one, other in (('CODE_SERVER_PORTS', 'SSH_PORTS'), ('CODE_SERVER_PORTS', 'CUSTOM_PORTS'),
                           ('SSH_PORTS', 'CUSTOM_PORTS')):
            if ranges[one][0] <= ranges[other][1] and ranges[other][0] <= ranges[one][1]:
                raise ConfigError(f'{one} and {other} overlap; give each a range of its own.')
        if self.workspace_bind_address == NODE_ADDRESS and not self.has_nodes:
            raise ConfigError(f'WORKSPACE_BIND_ADDRESS={NODE_ADDRESS!r} is for several nodes, and '
                              f'DOCKER_HOST={self.docker_host!r} names one engine.')
        if self.warm_pool and self.has_nodes:
            raise ConfigError('WARM_POOL is for one engine, and DOCKER_HOST names several: leave one of them '
                              'out.')
        for name in ('extra_ca_certs', 'ssh_authorized_keys'):
            if getattr(self, name) and not (os.path.isfile(getattr(self, name))
                                            and os.access(getattr(self, name), os.R_OK)):
                raise ConfigError(f'{name.upper()}={getattr(self, name)!r} is no file that can be read.')
        if self.templates_dir and not os.path.isdir(self.templates_dir):
            raise ConfigError(f'TEMPLATES_DIR={self.templates_dir!r} is no folder.')
        return self


def is_loopback(host):
    """Tell whether a host name or address can only mean this machine."""
    if host.lower() == 'localhost':
        return True
    try:
        return ipaddress.ip_address(host.strip('[]')).is_loopback
    except ValueError:
        return False
