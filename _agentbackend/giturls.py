"""Addresses of git repositories, and the secrets that people put into them."""
import contextlib
import re
import urllib.parse

from _agentbackend.errors import refusal


def split_credentials(url):
    """Return (url without secrets, line for git's credential store or '').

    All of the user part of an http URL is taken for a secret, since tokens are given as user names; of an ssh
    URL only a password. Raises ValidationError where a secret might stand at a place that is kept and shown.
    """
    scheme, separator, rest = url.partition('://')
    url = f'{scheme.lower()}://{rest}' if separator else url
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:  # which would quote it
        raise refusal('gitUrl', 'has no valid host') from None
    is_http = parts.scheme in ('http', 'https')
    if is_http and ('?' in url or '#' in url or has_late_password(parts)):
        # It may well be a secret, so it is not quoted here either.
        raise refusal('gitUrl', 'has a ?, # or @ where the address of a repository has none; in a user name '
                                'or password write # as %23, ? as %3F and / as %2F')
    if '@' not in parts.netloc or not parts.scheme:
        return url, ''
    user, _, host = parts.netloc.rpartition('@')
    if not is_http:
        return parts._replace(netloc=f"{user.partition(':')[0]}@{host}").geturl(), ''
    name, _, password = (urllib.parse.quote(urllib.parse.unquote(part), safe='')
                         for part in user.partition(':'))
    return parts._replace(netloc=host).geturl(), f'{parts.scheme}://{name}:{password}@{host}\n'


def with_token(url, credentials, token):
    """Return the line for git's credential store with a token; its user is the one that a line has already.

    Hosts that ask for a token take any user's name, and GitHub this one.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ('http', 'https'):
        raise refusal('gitToken', 'is for addresses that begin with https or http; for ssh, give gitSshKey')
    user = urllib.parse.urlsplit(credentials).username or 'x-access-token'
    return f"{parts.scheme}://{user}:{urllib.parse.quote(token, safe='')}@{parts.netloc}\n"


def has_late_password(parts):
    """Return whether what seems to be port and path may be a password with a slash in it, before its @."""
    if '@' not in parts.path or ':' not in parts.netloc:
        return False
    with contextlib.suppress(ValueError):
        return parts.port is None or re.search('[^/]@', parts.path) is not None  # host:3000/@team is none
    return True
