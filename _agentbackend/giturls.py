"""Addresses of git repositories, and the secrets that people put into them."""
import contextlib
import urllib.parse

from _agentbackend.errors import refusal


def split_credentials(url):
    """Return (url without secrets, line for git's credential store or '').

    All of the user part of an http URL is taken for a secret, since tokens are given as user names; of an ssh
    URL only a password. Raises ValidationError where a secret might stand at a place that is kept and shown.
    """
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:  # which would quote it
        raise refusal('gitUrl', 'the host is invalid') from None
    is_http = parts.scheme in ('http', 'https')
    if is_http and ('?' in url or '#' in url or ('@' in parts.path and not has_port(parts))):
        # It may well be a secret, so it is not quoted here either.
        raise refusal('gitUrl',
                      'the address of a repository has no query (?) and no fragment (#); in a user name or '
                                'password write # as %23, ? as %3F and / as %2F')
    if '@' not in parts.netloc or not parts.scheme:
        return url, ''
    user, _, host = parts.netloc.rpartition('@')
    if not is_http:
        return parts._replace(netloc=f"{user.partition(':')[0]}@{host}").geturl(), ''
    name, _, password = (urllib.parse.quote(urllib.parse.unquote(part), safe='')
                         for part in user.partition(':'))
    return parts._replace(netloc=host).geturl(), f'{parts.scheme}://{name}:{password}@{host}\n'


def has_port(parts):
    """Return whether what follows the first colon of an authority, if any, is a port and no part of a
    password."""
    with contextlib.suppress(ValueError):
        return parts.port is None or parts.port > 0
    return False
