"""Keys of OpenSSH as people paste them."""
import base64
import binascii
import re

from _agentbackend.errors import refusal

PUBLIC_KEY = re.compile(r'(?:^|\s)((?:sk-)?(?:ssh|ecdsa)-[a-z0-9-]+(?:@openssh\.com)?)\s+'
                        r'([A-Za-z0-9+/]+={0,3})(?:\s|$)')
PRIVATE_KEY = re.compile(r'-----BEGIN ([A-Z ]{0,30}PRIVATE KEY)-----')


def parse_public_keys(texts):
    """Return the lines for authorized_keys that texts hold, options of OpenSSH included; a text may be a file
    of several.

    Raises ValidationError for a line that OpenSSH would pass over.
    """
    keys = []
    for number, text in enumerate(texts):
        lines = [line.strip() for line in text.splitlines()]
        lines = [line for line in lines if line and not line.startswith('#')]
        if not lines:
            raise refusal(f'sshPublicKeys.{number}', 'is empty; it is a line of a file that ends in .pub')
        for line in lines:
            if 'PRIVATE KEY' in line:
                raise refusal(f'sshPublicKeys.{number}',
                              'is a private key; the public one is in the file that ends in .pub')
            match = PUBLIC_KEY.search(line)
            if not match or not holds(match[2], match[1]):
                raise refusal(f'sshPublicKeys.{number}',
                              'is no public key: that is all of a line of an OpenSSH .pub file, as '
                              'ssh-ed25519 AAAA... me@laptop')
            keys.append(line)
    return list(dict.fromkeys(keys))


def holds(text, kind):
    """Return whether base64 text is a key of a kind, as far as its length fields tell: one that was cut is
    none."""
    try:
        rest, parts = base64.b64decode(text, validate=True), []
    except (ValueError, binascii.Error):
        return False
    while rest:
        length = int.from_bytes(rest[:4], 'big')
        if len(rest) < 4 + length:
            return False
        parts.append(rest[4:4 + length])
        rest = rest[4 + length:]
    return len(parts) > 1 and parts[0] == kind.encode()


def parse_private_key(text):
    """Return a private key as OpenSSH wants its file; raise ValidationError, which quotes nothing of it."""
    text = text.replace('\r', '\n')
    match = PRIVATE_KEY.search(text)
    end = text.find(f'-----END {match[1]}-----', match.end()) if match else -1
    if end < 0 or not text[match.end():end].strip():
        raise refusal('gitSshKey', 'is no private key: that is all of a file that begins with '
                                   '-----BEGIN ... PRIVATE KEY-----')
    kind, body = match[1], text[match.end():end].strip()
    encoded = re.sub(r'^[A-Za-z-]+: .*$', '', body, flags=re.M)
    encrypted = 'ENCRYPTED' in kind or 'ENCRYPTED' in body
    if kind == 'OPENSSH PRIVATE KEY':
        try:
            data = base64.b64decode(''.join(encoded.split()), validate=True)
        except (ValueError, binascii.Error) as error:
            raise refusal('gitSshKey', 'is damaged; paste all of the file') from error
        magic = b'openssh-key-v1\0'
        length = int.from_bytes(data[len(magic):len(magic) + 4], 'big')
        encrypted = data[len(magic) + 4:][:length] != b'none'
    if encrypted:
        raise refusal('gitSshKey', 'has a passphrase, which nobody would be there to give; take one without, '
                                   'a deploy key say')
    lines = '\n'.join(line.strip() for line in body.splitlines() if line.strip())
    return f'-----BEGIN {kind}-----\n{lines}\n-----END {kind}-----\n'
