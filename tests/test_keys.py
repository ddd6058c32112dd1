"""Keys of OpenSSH as people paste them, made by the real ssh-keygen."""
import subprocess

import pytest

from _agentbackend.errors import ValidationError
from _agentbackend.sshkeys import parse_private_key, parse_public_keys

KINDS = ('ed25519', 'ecdsa', 'rsa')


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    """{kind: (public, private)} of new keys."""
    folder, made = tmp_path_factory.mktemp('keys'), {}
    for kind in KINDS:
        make(folder / kind, '-t', kind, *(['-b', '2048'] if kind == 'rsa' else []))  # is sooner found
        made[kind] = ((folder / f'{kind}.pub').read_text(), (folder / kind).read_text())
    return made


def make(path, *options, passphrase=''):
    subprocess.run(['ssh-keygen', '-q', '-N', passphrase, '-C', 'me@laptop', '-f', path, *options],
                   check=True)
    return path.read_text()


def refused(call, given):
    with pytest.raises(ValidationError) as caught:
        call(given)
    return str(caught.value)


@pytest.mark.parametrize('kind', KINDS)
def test_a_public_key_is_taken_however_it_is_pasted(pairs, kind):
    key = pairs[kind][0].strip()
    for pasted in (key, f'  {key}\r\n', f'\n\n{key}\n', f'# my laptop\n{key}\n', key.rsplit(' ', 1)[0]):
        assert parse_public_keys([pasted]) == [' '.join(pasted.replace('# my laptop', '').split())]
    assert parse_public_keys([f'restrict,command="echo a b" {key}']) == [f'restrict,command="echo a b" {key}']


def test_a_text_may_be_a_file_of_several_and_each_is_kept_once(pairs):
    keys = [public.strip() for public, _ in pairs.values()]
    assert parse_public_keys(['\n'.join(keys), keys[0]]) == keys


@pytest.mark.parametrize('spoil', [
    lambda key: 'not a key', lambda key: key.split()[0], lambda key: key.split()[1],
    lambda key: key[:40], lambda key: key.replace('ssh-ed25519', 'ssh-rsa', 1),
    lambda key: key.replace(key.split()[1], key.split()[1][:-4]),
    lambda key: 'canary-of-a-secret', lambda key: ' \n# me\n'],
    ids=['words', 'kind', 'base64', 'cut', 'kind of another', 'short', 'secret', 'nothing'])
def test_what_openssh_would_pass_over_is_refused(pairs, spoil):
    text = refused(parse_public_keys, [pairs['rsa'][0], spoil(pairs['ed25519'][0].strip())])
    assert text.startswith('sshPublicKeys.1 is ') and 'canary' not in text


def test_a_private_key_in_the_place_of_a_public_one_is_told_and_not_quoted(pairs):
    text = refused(parse_public_keys, [pairs['ed25519'][1]])
    assert 'sshPublicKeys.0 is a private key' in text and pairs['ed25519'][1].splitlines()[1] not in text


@pytest.mark.parametrize('kind', KINDS)
def test_a_private_key_is_taken_however_it_is_pasted(pairs, kind, tmp_path):
    public, private = pairs[kind]
    for number, pasted in enumerate((private, private.replace('\n', '\r\n'), f'  \n{private}  ',
                                     private.strip(), ' '.join(private.split('\n')),
                                     private.replace('\n', '\n   '))):
        path = tmp_path / f'{kind}-{number}'
        path.write_text(parse_private_key(pasted))
        path.chmod(0o600)
        shown = subprocess.run(['ssh-keygen', '-y', '-f', path], capture_output=True, text=True,
                               check=True)
        assert shown.stdout.split()[:2] == public.split()[:2]


def written_anew(private, path, form, passphrase=''):
    """Return a private key in an older format."""
    path.write_text(private)
    path.chmod(0o600)
    subprocess.run(['ssh-keygen', '-q', '-p', '-P', '', '-N', passphrase, '-m', form, '-f', path],
                   stdout=subprocess.DEVNULL, check=True)
    return path.read_text()


def test_older_formats_of_private_keys_are_taken(pairs, tmp_path):
    for form, words in (('PEM', 'BEGIN RSA PRIVATE KEY'), ('PKCS8', 'BEGIN PRIVATE KEY')):
        private = written_anew(pairs['rsa'][1], tmp_path / f'old-{form}', form)
        assert words in private
        path = tmp_path / f'new-{form}'
        path.write_text(parse_private_key(private.replace('\n', '\r\n')))
        path.chmod(0o600)
        subprocess.run(['ssh-keygen', '-y', '-f', path], capture_output=True, check=True)


def test_a_private_key_that_cannot_serve_is_refused_and_not_quoted(pairs, tmp_path):
    locked = make(tmp_path / 'locked', '-t', 'ed25519', passphrase='secret')
    old = written_anew(pairs['rsa'][1], tmp_path / 'old', 'PEM', 'secret')
    assert 'passphrase' in refused(parse_private_key, locked)
    assert 'passphrase' in refused(parse_private_key, old)
    lines = pairs['rsa'][1].splitlines()
    for spoilt in (pairs['rsa'][0], '\n'.join(lines[:-1]), 'canary', '\n'.join([lines[0], '???', lines[-1]])):
        text = refused(parse_private_key, spoilt)
        assert text.startswith('gitSshKey is') and lines[1] not in text and 'canary' not in text
