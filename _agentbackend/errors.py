"""What can go wrong, each with its HTTP status and code."""
import json
import logging
import secrets

MAX_QUOTED = 60  # characters of a value that a text quotes
log = logging.getLogger('agentbackend')


class BackendError(Exception):
    """A failure that a client is told: its text, its HTTP status and its code."""

    status = 500
    code = 'INTERNAL_ERROR'

    def __init__(self, text, *, details=None, headers=()):
        super().__init__(text)
        self.details = details
        self.headers = dict(headers)


class ConfigError(Exception):
    """A setting that makes no sense; the text begins with its name."""


class ValidationError(BackendError): status, code = 400, 'VALIDATION_ERROR'


class UriTooLong(ValidationError): status = 414
class UnsupportedMediaType(ValidationError): status = 415


class Unauthorized(BackendError): status, code = 401, 'UNAUTHORIZED'


class Forbidden(BackendError): status, code = 403, 'FORBIDDEN'


class NotFound(BackendError): status, code = 404, 'NOT_FOUND'


class MethodNotAllowed(BackendError): status, code = 405, 'METHOD_NOT_ALLOWED'


class PayloadTooLarge(BackendError): status, code = 413, 'PAYLOAD_TOO_LARGE'


class RequestTimeout(BackendError): status, code = 408, 'VALIDATION_ERROR'


class ClientLeft(RequestTimeout):
    """Who asked is no more there to be told: what was answered was not heard."""


class WorkspaceNotFound(BackendError):
    """No workspace has that id or name. The contract has the words; the details name it."""

    status, code = 404, 'WORKSPACE_NOT_FOUND'

    def __init__(self, name):
        said = f"there is no workspace '{name[:MAX_QUOTED]}'; GET /api/workspaces lists them"
        super().__init__('Workspace not found', details=[{'path': 'id', 'message': said}])


class SessionNotFound(BackendError):
    """No session has that id."""

    status, code = 404, 'SESSION_NOT_FOUND'

    def __init__(self, name):
        said = f"there is no session '{name[:MAX_QUOTED]}'; GET /api/agent/sessions lists them"
        super().__init__('Session not found', details=[{'path': 'id', 'message': said}])


class ExecNotFound(BackendError):
    """No detached command has that id."""

    status, code = 404, 'EXEC_NOT_FOUND'

    def __init__(self, name):
        said = f"there is no command '{name[:MAX_QUOTED]}'; GET /api/workspaces/<id>/exec lists them"
        super().__init__('Command not found', details=[{'path': 'execId', 'message': said}])


class TerminalNotFound(BackendError):
    """No terminal has that name."""

    status, code = 404, 'TERMINAL_NOT_FOUND'

    def __init__(self, name):
        said = f"there is no terminal '{name[:MAX_QUOTED]}'; GET /api/workspaces/<id>/terminals lists them"
        super().__init__('Terminal not found', details=[{'path': 'name', 'message': said}])


class FileMissing(BackendError): status, code = 404, 'FILE_NOT_FOUND'
class FileExists(BackendError): status, code = 409, 'FILE_EXISTS'


class NotAFolder(BackendError): status, code = 409, 'NOT_A_FOLDER'
class NotAFile(BackendError): status, code = 409, 'NOT_A_FILE'


class PreconditionFailed(BackendError): status, code = 412, 'PRECONDITION_FAILED'
class RangeNotSatisfiable(BackendError): status, code = 416, 'VALIDATION_ERROR'


class IdempotencyConflict(BackendError): status, code = 409, 'IDEMPOTENCY_CONFLICT'
class KeyReused(IdempotencyConflict): status = 422
class WaitTimeout(BackendError): status, code = 504, 'WAIT_TIMEOUT'


class SessionBusy(BackendError): status, code = 409, 'SESSION_BUSY'


class WorkspaceAlreadyExists(BackendError): status, code = 409, 'WORKSPACE_ALREADY_EXISTS'


class WorkspaceNotRunning(BackendError): status, code = 409, 'WORKSPACE_NOT_RUNNING'


class TooMany(BackendError): status, code = 429, 'TOO_MANY'


class UpgradeRequired(BackendError): status, code = 426, 'VALIDATION_ERROR'


class StateNotWritten(BackendError): status, code = 503, 'STATE_NOT_WRITTEN'


class PortExhausted(BackendError):
    """A range of ports is full; `kind` says which: codeServer, ssh or custom."""

    status, code = 503, 'PORT_EXHAUSTED'

    def __init__(self, text, kind):
        super().__init__(text)
        self.kind = kind


class NoRoom(BackendError): status, code = 503, 'NO_ROOM'


class DockerError(BackendError): status, code = 502, 'DOCKER_ERROR'


class EngineUnavailable(DockerError):
    """An engine does not answer; `node` is that of several on which it is, '' for the only one."""

    status = 503

    def __init__(self, text, *, node=''):
        super().__init__(text)
        self.node = node


class InstanceTaken(DockerError): status = 503
class MissingOnEngine(DockerError): pass


class ConflictOnEngine(DockerError): pass


class UnreadableTemplate(DockerError): pass
class MissingBaseImage(DockerError): pass


class UnreadableLog(DockerError): pass


class PortTaken(DockerError):
    """The engine could not bind a published port; `port` is its number, or None if it did not say."""

    def __init__(self, text, *, port=None):
        super().__init__(text)
        self.port = port


class Superseded(Exception):
    """A job found that its workspace has meanwhile been given another fate."""


def internal_error(error):
    """Log a traceback under a number, and return the error that tells a client that number and nothing
    else."""
    number = secrets.token_hex(4)
    log.error('Internal error %s', number, exc_info=error)
    return BackendError(f'Internal error {number}; the log of the server has the traceback.')


def refusal(path, text):
    """Return the error that says what is wrong with a field: its name and the text make a sentence."""
    return ValidationError(f'{path} {text}', details=[{'path': path, 'message': f'{path} {text}'}])


def kind_of(value):
    """Return what a value of JSON is, for a sentence that must not quote it."""
    kinds = {str: 'a text', list: 'a list', dict: 'an object', int: 'a number', float: 'a number'}
    return kinds.get(type(value)) or json.dumps(value)


def quoted(value):
    """Return a value in the spelling of JSON, for a sentence; a long text is cut, a list is only named."""
    if isinstance(value, (list, dict)):
        return kind_of(value)
    is_long = isinstance(value, str) and len(value) > MAX_QUOTED
    return json.dumps(value[:MAX_QUOTED] + '...' if is_long else value, ensure_ascii=False)


def either(words):
    """Return words as a choice: a, b or c."""
    *others, last = words or ['']
    return f"{', '.join(others)} or {last}" if others else last
