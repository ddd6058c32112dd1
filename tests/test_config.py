"""The settings: each is read, and nonsense is told by the name of its variable."""
import dataclasses
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from _agentbackend.config import Config
from _agentbackend.errors import ConfigError

GOOD = {  # a text that is not the default -> what Config makes of it
    'PORT': ('8080', 8080), 'HOST': ('::1', '::1'),
    'DOCKER_HOST': ('tcp://10.0.0.1:2376', 'tcp://10.0.0.1:2376'),
    'NODE_ENGINES': ('tcp://{address}:2376', 'tcp://{address}:2376'),
    'REGISTRY': ('n1.lan:5000/dev/images/', 'n1.lan:5000/dev/images'),
    'DOCKER_TLS_VERIFY': ('1', '1'), 'DOCKER_CERT_PATH': ('/certs', '/certs'),
    'WORKSPACE_BASE_PATH': ('/srv/work/', '/srv/work'), 'LOG_LEVEL': ('Debug', 'DEBUG'),
    'INSTANCE': ('lab-2', 'lab-2'),
    'API_TOKEN': ('secret', 'secret'), 'ALLOWED_HOSTS': ('dev.lan, box', ('dev.lan', 'box')),
    'ALLOWED_ORIGINS': ('https://a.example https://b.example', ('https://a.example', 'https://b.example')),
    'CODE_SERVER_PORTS': ('20000-20010', (20000, 20010)), 'SSH_PORTS': ('20011', (20011, 20011)),
    'CUSTOM_PORTS': ('20012-65535', (20012, 65535)), 'WORKSPACE_BIND_ADDRESS': ('0.0.0.0', '0.0.0.0'),
    'WORKSPACE_HOST': ('dev.lan', 'dev.lan'), 'WORKSPACE_MEMORY': ('512m', 512 * 2**20),
    'WORKSPACE_CPUS': ('0.5', 0.5),
    'DEFAULT_AGENT': ('command', 'command'),
    'AGENT_COMMAND': ("bash -c 'echo hi'", ('bash', '-c', 'echo hi')),
    'AGENT_TIMEOUT': ('60', 60), 'AGENT_IDLE_TIMEOUT': ('2.5', 2.5), 'AGENT_MAX_OUTPUT': ('1m', 2**20),
    'EXEC_MAX_OUTPUT': ('2m', 2 * 2**20), 'EXEC_MAX_COMMANDS': ('9', 9), 'MAX_TERMINALS': ('3', 3),
    'AGENT_MAX_TASKS': ('2', 2), 'KEEP_RUNS': ('7', 7), 'KEEP_RUNS_FOR': ('3600', 3600),
    'WORKSPACE_NETWORK': ('bridge', 'bridge'), 'ANTHROPIC_API_KEY': ('key', 'key'),
    'ANTHROPIC_AUTH_TOKEN': ('token', 'token'), 'CLAUDE_CODE_OAUTH_TOKEN': ('oauth', 'oauth'),
    'ANTHROPIC_BASE_URL': ('http://gateway.lan', 'http://gateway.lan'),
    'WORKSPACE_PIDS': ('100', 100), 'AGENT_TTL': ('60', 60), 'DEFAULT_TEMPLATE': ('python', 'python'),
    'TEMPLATES_DIR': (str(ROOT), str(ROOT)), 'PREBUILD': ('blank,python', ('blank', 'python')),
    'WARM_POOL': ('blank:2, my.own/agent:1', {'blank': 2, 'my.own/agent': 1}),
    'BASE_IMAGE': ('debian:trixie', 'debian:trixie'), 'BASE_IMAGE_TIMEOUT': ('300', 300),
    'EXTRA_CA_CERTS': (__file__, __file__), 'SSH_AUTHORIZED_KEYS': (__file__, __file__),
    'READY_TIMEOUT': ('1.5', 1.5),
    'GIT_USER_NAME': (' Ada ', 'Ada'), 'GIT_USER_EMAIL': ('ada@example.org', 'ada@example.org'),
    'STOP_TIMEOUT': ('3', 3), 'BUILD_TIMEOUT': ('7200', 7200), 'MAX_BODY': ('2k', 2048),
    'REQUEST_TIMEOUT': ('0.5', 0.5),
    'MAX_STREAMS': ('50', 50), 'STATE_DIR': ('/var/lib/agentbackend', '/var/lib/agentbackend'),
}
BAD = [
    ('PORT', 'abc'), ('PORT', '-1'), ('PORT', '65536'), ('PORT', '80.5'),
    ('CODE_SERVER_PORTS', '8550-8443'), ('SSH_PORTS', '2223-65536'), ('CUSTOM_PORTS', '0-10'),
    ('SSH_PORTS', '2223-'),
    ('SSH_PORTS', 'a-b'), ('SSH_PORTS', '2223-2224-2225'),
    ('WARM_POOL', 'blank'), ('WARM_POOL', 'blank:0'), ('WARM_POOL', 'blank:1,blank:2'),
    ('WARM_POOL', '../etc:1'), ('WARM_POOL', 'blank/temporary:1'),
    ('WORKSPACE_MEMORY', '4 gigs'), ('WORKSPACE_MEMORY', '-4g'), ('WORKSPACE_MEMORY', '1.5g'),
    ('WORKSPACE_MEMORY', '0'),
    ('MAX_BODY', 'much'), ('WORKSPACE_CPUS', '0'), ('WORKSPACE_CPUS', 'nan'), ('WORKSPACE_CPUS', 'two'),
    ('WORKSPACE_PIDS', '0'), ('WORKSPACE_PIDS', 'many'), ('AGENT_TTL', '-5'), ('AGENT_TTL', '0'),
    ('AGENT_TTL', 'nan'), ('AGENT_TTL', 'inf'),
    ('READY_TIMEOUT', '-1'), ('STOP_TIMEOUT', 'soon'), ('STOP_TIMEOUT', '0.5'), ('BUILD_TIMEOUT', '0'),
    ('REQUEST_TIMEOUT', '-0.1'),
    ('MAX_STREAMS', '0'), ('MAX_STREAMS', 'some'),
    ('WORKSPACE_BASE_PATH', 'workspace'), ('WORKSPACE_BASE_PATH', '/'), ('WORKSPACE_BASE_PATH', '/a/../b'),
    ('WORKSPACE_BASE_PATH', '/a b'),
    ('WORKSPACE_BASE_PATH', '/a\n'), ('WORKSPACE_BIND_ADDRESS', 'localhost'),
    ('WORKSPACE_BIND_ADDRESS', '300.0.0.1'), ('WORKSPACE_BIND_ADDRESS', '{node}'),
    ('REGISTRY', 'http://10.0.0.1:5000'), ('REGISTRY', 'someone'), ('REGISTRY', 'box:5000/Dev'),
    ('REGISTRY', 'box:'), ('REGISTRY', 'someone/box.lan:5000'), ('REGISTRY', 'box:5000//dev'),
    ('NODE_ENGINES', 'tcp://10.0.0.1:2376'), ('NODE_ENGINES', '{address}'),
    ('INSTANCE', 'Lab'), ('INSTANCE', 'a/b'), ('INSTANCE', '-a'), ('INSTANCE', 'a' * 33), ('INSTANCE', 'a\n'),
    ('DEFAULT_TEMPLATE', '../etc'), ('DEFAULT_TEMPLATE', 'a\n'), ('LOG_LEVEL', 'loud'),
    ('HOST', '0.0.0.0'), ('HOST', '::'), ('HOST', '192.168.1.5'), ('HOST', 'dev.lan'),
    ('EXTRA_CA_CERTS', '/nowhere/ca.pem'), ('EXTRA_CA_CERTS', '/'), ('SSH_AUTHORIZED_KEYS', '/nowhere/keys'),
    ('SSH_AUTHORIZED_KEYS', '/'),
    ('TEMPLATES_DIR', '/nowhere'), ('TEMPLATES_DIR', __file__),
]


def readme_table():
    """Return the settings table that README.md has to have."""
    rows = ['| Variable | Default | What |', '| --- | --- | --- |']
    for item in dataclasses.fields(Config):
        default = item.metadata['default']
        rows.append(f"| `{item.name.upper()}` | {f'`{default}`' if default else '-'} | "
                    f"{item.metadata['help']} |")
    return '\n'.join(rows)


def cells(row):
    return [cell.strip() for cell in row.strip().strip('|').split('|')]


def run_server(**settings):
    env = {key: value for key, value in os.environ.items() if key not in ('API_TOKEN', 'HOST')} | settings
    return subprocess.run([sys.executable, str(ROOT / 'agentbackend.py')], env=env, capture_output=True,
                          text=True, timeout=20,
                          stdin=subprocess.DEVNULL)


def test_this_table_knows_every_setting():
    assert set(GOOD) == {item.name.upper() for item in dataclasses.fields(Config)}


def test_the_contracts_defaults_hold():
    config = Config.from_env({})
    assert (config.port, config.workspace_base_path, config.log_level) == (3100, '/workspace', 'INFO')
    assert (config.code_server_ports, config.ssh_ports) == ((8443, 8550), (2223, 2250))
    assert (config.host, config.workspace_bind_address) == ('127.0.0.1', '127.0.0.1')
    assert config.default_template == 'bun-typescript'


@pytest.mark.parametrize('name', GOOD)
def test_a_setting_is_read(name):
    text, wanted = GOOD[name]
    value = getattr(Config.from_env({name: text}), name.lower())
    assert value == wanted and value != getattr(Config.from_env({}), name.lower())
    assert type(value) is type(wanted)


@pytest.mark.parametrize('name', GOOD)
def test_an_empty_setting_is_the_default(name):
    assert Config.from_env({name: ''}) == Config.from_env({})


@pytest.mark.parametrize(('name', 'text'), BAD, ids=[f'{name}={text!r}' for name, text in BAD])
def test_nonsense_is_told_by_the_name_of_its_variable(name, text):
    with pytest.raises(ConfigError) as caught:
        Config.from_env({name: text})
    told = str(caught.value)
    assert re.match(rf'{name}\b', told) and '\n' not in told and told.endswith('.')


@pytest.mark.parametrize(('one', 'other'), [('CODE_SERVER_PORTS', 'SSH_PORTS'),
                                            ('CODE_SERVER_PORTS', 'CUSTOM_PORTS'),
                                            ('SSH_PORTS', 'CUSTOM_PORTS')])
@pytest.mark.parametrize('ranges', [('30000-30010', '30010-30020'), ('30010-30020', '30000-30010'),
                                    ('30000-30020', '30005'), ('30005', '30005')])
def test_ranges_that_overlap_are_refused(one, other, ranges):
    with pytest.raises(ConfigError, match=rf'^{one} and {other} overlap'):
        Config.from_env({one: ranges[0], other: ranges[1]})


def test_ranges_that_only_touch_are_fine():
    config = Config.from_env({'CODE_SERVER_PORTS': '30000-30009', 'SSH_PORTS': '30010-30019',
                              'CUSTOM_PORTS': '30020'})
    assert config.custom_ports == (30020, 30020)


@pytest.mark.parametrize('host', ['127.0.0.1', '127.8.8.8', '::1', 'localhost', 'LocalHost'])
def test_loopback_needs_no_token(host):
    assert Config.from_env({'HOST': host}).host == host


def test_another_host_is_fine_with_a_token():
    assert Config.from_env({'HOST': '0.0.0.0', 'API_TOKEN': 'x'}).host == '0.0.0.0'


def test_the_token_is_in_no_error():
    with pytest.raises(ConfigError) as caught:
        Config.from_env({'API_TOKEN': 'hush-hush', 'PORT': 'abc'})
    assert 'hush-hush' not in str(caught.value)


def test_docker_host_may_be_a_bare_path():
    config = Config.from_env({'DOCKER_HOST': '/run/user/1000/docker.sock'})
    assert config.docker_host == 'unix:///run/user/1000/docker.sock'


def test_prebuild_none_builds_nothing_ahead():
    assert Config.from_env({'PREBUILD': 'none'}).prebuild == ()


def test_certificates_are_found_where_other_programs_find_them(tmp_path):
    one, other = tmp_path / 'one.pem', tmp_path / 'other.pem'
    one.touch(), other.touch()
    assert Config.from_env({'SSL_CERT_FILE': str(one)}).extra_ca_certs == str(one)
    assert Config.from_env({'SSL_CERT_FILE': str(one),
                            'NODE_EXTRA_CA_CERTS': str(other)}).extra_ca_certs == str(other)
    assert Config.from_env({'EXTRA_CA_CERTS': str(one),
                            'NODE_EXTRA_CA_CERTS': str(other)}).extra_ca_certs == str(one)


def test_the_state_folder_follows_the_users():
    assert Config.from_env({'XDG_STATE_HOME': '/xdg'}).state_dir == '/xdg/agentbackend'
    assert Config.from_env({}).state_dir == os.path.expanduser('~/.local/state/agentbackend')


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config.from_env({}).port = 1


@pytest.mark.parametrize('settings', [{'PORT': 'abc'}, {'HOST': '0.0.0.0'}, {'STATE_DIR': __file__},
                                      {'STATE_DIR': '/proc/nowhere'}],
                         ids=lambda settings: ' '.join(settings))
def test_the_process_ends_with_2_and_one_line(settings):
    ended = run_server(**({'STATE_DIR': '/nowhere/at/all'} | settings))
    name = next(iter(settings))
    assert ended.returncode == 2 and ended.stdout == ''
    assert re.fullmatch(rf'agentbackend: {name}=.*\.\n', ended.stderr), ended.stderr


def test_the_readme_lists_every_setting():
    expected = [cells(row) for row in readme_table().splitlines()[2:]]
    settings = (ROOT / 'README.md').read_text().partition('\n## Settings\n')[2].partition('\n## ')[0]
    rows = [cells(row) for row in settings.splitlines() if re.match(r'\|\s*`[A-Z_]+`\s*\|', row)]
    assert rows == expected, f'README.md must have this table:\n\n{readme_table()}\n'


def test_what_is_for_one_engine_is_refused_with_several():
    several = {'DOCKER_HOST': '/run/docker.sock, tcp://b:2376'}
    assert Config.from_env(several).docker_host == 'unix:///run/docker.sock,tcp://b:2376'
    with pytest.raises(ConfigError, match='WARM_POOL is for one engine'):
        Config.from_env(several | {'WARM_POOL': 'blank:1'})
