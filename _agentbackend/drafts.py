"""Bodies of the API as records of workspaces: what is taken, what is tidied, and what is refused."""
import secrets
import time

from _agentbackend.errors import WorkspaceNotRunning, refusal
from _agentbackend.giturls import split_credentials, with_token
from _agentbackend.records import AGENT, PERSISTENT, Workspace
from _agentbackend.sshkeys import parse_private_key, parse_public_keys

MAX_LABELS = 100  # of a workspace
# Bytes of all variables together; Linux gives a program two million for them and its arguments.
MAX_ENV = 1_000_000
CREDENTIALS, KEY = 'git-credentials', 'git-key'  # names of files in the container
# Field of a body -> that of a record, and what this is where a gitUrl comes without it.
GIT_FIELDS = {'gitBranch': ('git_branch', ''), 'gitDepth': ('git_depth', None),
              'gitFilter': ('git_filter', None)}


def draft(body, config):
    """Return (record, {name of a file: secret}) of a body that asks for a workspace; id and ports are given
    later.

    The secrets are for the first clone only; those to keep are in the record. Raises ValidationError.
    """
    now, kind = time.time(), body.get('type', PERSISTENT)
    git, once = git_fields(body)
    return Workspace(
        id='', name=body['name'], folder=body['name'], type=kind,
        template=body.get('template', config.default_template),
        created_at=now, wanted_ports=body.get('ports', []), ssh=body.get('ssh', True),
        ssh_public_keys=parse_public_keys(body.get('sshPublicKeys', [])),
        env=checked_env(body.get('env', {})),
        cpus=body.get('cpus') or 0, memory=body.get('memory') or config.workspace_memory,
        labels=body.get('labels', {}), ttl=body.get('ttl', config.agent_ttl if kind == AGENT else None),
        ttl_from=now, last_activity_at=now, password=secrets.token_urlsafe(12), setup=body.get('setup', ''),
        git_user_name=body.get('gitUserName', config.git_user_name),
        git_user_email=body.get('gitUserEmail', config.git_user_email), **git), once


def git_fields(body, before=None):
    """Return (fields of a record, secrets for the first clone) of what a body says of a repository, on top of
    a record if there is one."""
    url, credentials = split_credentials(body.get('gitUrl', before.git_url if before else ''))
    for name in ('gitBranch', 'gitDepth', 'gitFilter', 'gitToken', 'gitSshKey', 'gitCredentials'):
        if body.get(name) is not None and not url:
            raise refusal(name, 'needs a gitUrl beside it')
    given = git_secrets(body, url, credentials)
    if before and before.has_credentials and not given and 'gitUrl' not in body:
        raise refusal('gitToken', 'is needed again, or gitSshKey, or a gitUrl with credentials: those of the '
                                  'first try were for that one only')
    keep = body.get('gitCredentials') == 'keep'
    if keep and not given:
        raise refusal('gitCredentials', 'has none to keep: give gitToken or gitSshKey')
    fields = {field: body.get(name, none) for name, (field, none) in GIT_FIELDS.items()
              if name in body or 'gitUrl' in body}
    kept = dict(before.git_access) if before and not given else {}
    return fields | {'git_url': url, 'has_credentials': bool(given) and not keep,
                     'git_access': given if keep else kept}, {} if keep else given


def git_secrets(body, url, credentials=''):
    """Return {name of a file: secret} of what a body gives to reach a repository."""
    found = {CREDENTIALS: credentials}
    if body.get('gitToken'):
        found[CREDENTIALS] = with_token(url, credentials, body['gitToken'].strip())
    if body.get('gitSshKey'):
        found[KEY] = parse_private_key(body['gitSshKey'])
    return {name: text for name, text in found.items() if text}


def changes_of(workspace, body):
    """Return the fields that a body of PATCH changes in a record, the name apart; raise ValidationError."""
    now = time.time()
    changes = {'last_activity_at': now}
    if 'ttl' in body:
        changes |= {'ttl': body['ttl'], 'ttl_from': now}
    if 'labels' in body:
        changes['labels'] = merged(workspace.labels, body['labels'])
        if len(changes['labels']) > MAX_LABELS:
            raise refusal('labels', f"would be {len(changes['labels'])}, but a workspace has at most "
                                    f'{MAX_LABELS}; null removes one')
    if 'env' in body:
        changes['env'] = checked_env(merged(workspace.env, body['env']))
    if 'sshPublicKeys' in body:
        changes['ssh_public_keys'] = parse_public_keys(body['sshPublicKeys'])
    if 'ports' in body:
        changes['wanted_ports'] = body['ports']
    for name, field in (('cpus', 'cpus'), ('memory', 'memory'), ('gitUserName', 'git_user_name'),
                        ('gitUserEmail', 'git_user_email')):
        if name in body:
            changes[field] = body[name]
    if 'gitToken' in body or 'gitSshKey' in body:
        if not workspace.git_url:
            raise refusal('gitToken' if 'gitToken' in body else 'gitSshKey',
                          'is for a workspace that was cloned, which this one was not')
        revoked = {name for name, field in ((CREDENTIALS, 'gitToken'), (KEY, 'gitSshKey')) if field in body}
        kept = {name: text for name, text in workspace.git_access.items() if name not in revoked}
        changes['git_access'] = kept | git_secrets(body, workspace.git_url)
    return changes


def merged(before, changes):
    """Return a dict with changes applied, of which None removes a key."""
    return {key: value for key, value in (before | changes).items() if value is not None}


def checked_env(env):
    """Return an environment; raise ValidationError for one that no program could be started with."""
    size = sum(len(name.encode()) + len(value.encode()) + 2 for name, value in env.items())
    if size > MAX_ENV:
        raise refusal('env', f'has {size:,} bytes in all, but at most {MAX_ENV:,} are taken; put what is '
                             'large into a file')
    return env


def refuse_unless(workspace, statuses, done):
    """Raise WorkspaceNotRunning for a workspace in another status than what is asked of it needs."""
    if workspace.status not in statuses:
        raise WorkspaceNotRunning(f'Workspace {workspace.name} is {workspace.status} and cannot be {done} '
                                  f"now; it can be when it is {' or '.join(sorted(statuses))}.")
