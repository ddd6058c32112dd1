"""What git knows of a workspace's project: its branch, its changes, and what is nowhere else."""
import itertools

from _agentbackend.engine import USER
from _agentbackend.errors import DockerError, refusal

MAX_PRINTED = 2**20  # bytes
MAX_CHANGES = 1000
NO_REPOSITORY = 3  # exit status of STATE
NOT_STARTED = (126, 127)  # of an exec, where the image lacks the user dev or a shell
# What the project's configuration names for git to run is not run because somebody asks.
GIT = r'''
git() { command git -c core.fsmonitor= -c core.hooksPath=/dev/null "$@"; }
export GIT_OPTIONAL_LOCKS=0
'''
STATE = GIT + r'''
export LC_ALL=C
cd "$1" 2>/dev/null && git rev-parse --is-inside-work-tree >/dev/null 2>&1 || exit 3
printf '%s\0' "$(git rev-list --count --branches HEAD --not --remotes 2>/dev/null || echo 0)"
printf '%s\0' "$(git config --get remote.origin.url | head -c 4096)"
git status --porcelain=v2 --branch -z --untracked-files=all
'''
# Prints a patch from a commit to the files as they are. With an index of its own new files are in it, too;
# what removes that stands in no group with the rest, which is killed when the client leaves.
DIFF = GIT + r'''
fail() { echo "$1" >&2; exit 129; }
git rev-parse --is-inside-work-tree >/dev/null 2>&1 || fail "the project is no git repository"
base=$(git rev-parse --verify --quiet --end-of-options "${1:-HEAD}^{commit}") ||
  { [ -z "$1" ] && base=$(git hash-object -t tree /dev/null); } || fail "there is no commit $1"
index=$(git rev-parse --git-path index); folder=$(mktemp -d) || fail "there is no room for an index"
exec 4>&1
{
  export GIT_INDEX_FILE="$folder/index"
  [ ! -e "$index" ] || cat "$index" >"$GIT_INDEX_FILE"
  git add --all --intent-to-add . >/dev/null 2>&1
  git diff --no-color --no-ext-diff --no-textconv "$base" -- ${2:+"$2"} >&4
  echo $?
} | setsid sh -c 'read -r status; rm -rf "$1"; exit "${status:-1}"' sh "$folder" 4>&-
'''
WORDS = {'M': 'modified', 'T': 'modified', 'A': 'added', 'D': 'deleted', 'R': 'renamed', 'C': 'copied'}


def git_state(engine, access, workspace, folder):
    """Return {repository, branch, commit, ...} of the project, also of a stopped workspace."""
    with access.container(workspace) as container_id:
        code, printed = engine.run(container_id, ['sh', '-c', STATE, 'sh', folder], user=USER,
                                   limit=MAX_PRINTED)
    if code in (NO_REPOSITORY, *NOT_STARTED):
        return {'repository': False, 'branch': None, 'commit': None, 'upstream': None, 'remote': None,
                'ahead': 0, 'behind': 0, 'unpushed': 0, 'changes': [], 'truncated': False}
    if code != 0 and len(printed) < MAX_PRINTED:
        raise DockerError(f'git status ended with status {code}: {printed[-300:].decode("utf-8", "replace")}')
    *fields, rest = printed.decode('utf-8', 'replace').split('\0')
    unpushed, remote, *fields = fields
    heads = list(itertools.takewhile(lambda field: field.startswith('# '), fields))  # a name may look so, too
    headers = dict(field[2:].partition(' ')[::2] for field in heads)
    ahead, behind = (abs(int(word)) for word in headers.get('branch.ab', '+0 -0').split())
    branch, commit = headers.get('branch.head', '(detached)'), headers.get('branch.oid', '(initial)')
    found = list(changes(fields[len(heads):]))
    return {'repository': True, 'branch': None if branch == '(detached)' else branch,
            'commit': None if commit == '(initial)' else commit, 'upstream': headers.get('branch.upstream'),
            'remote': remote or None, 'ahead': ahead, 'behind': behind,
            'unpushed': int(unpushed) if unpushed.isdigit() else 0, 'changes': found[:MAX_CHANGES],
            'truncated': len(found) > MAX_CHANGES or bool(rest)}


def changes(fields):
    """Yield {path, status} of the entries of git's porcelain, version 2."""
    fields = iter(fields)
    for field in fields:
        kind, _, rest = field.partition(' ')
        if kind == '?':
            yield {'path': rest, 'status': 'untracked'}
        elif kind == 'u':
            yield {'path': rest.split(' ', 9)[-1], 'status': 'conflicted'}
        elif kind in ('1', '2'):
            letters, path = rest[:2].replace('.', ''), rest.split(' ', 7 if kind == '1' else 8)[-1]
            yield {'path': path, 'status': WORDS.get(letters[-1:], 'modified')}
            if kind == '2':
                next(fields, None)  # the name that it had


def diff_body(base, path):
    """Return the body of a command that prints a patch of the project."""
    for name, text in (('base', base), ('path', path)):
        if '\0' in text:
            raise refusal(name, 'has a NUL character')
    return {'command': ['sh', '-c', DIFF, 'sh', base, path]}
