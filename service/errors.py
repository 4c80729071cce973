"""The error tree: every failure a client can meet, with its HTTP status, OpenAI error type and code.

An error's message names what is wrong and, where it helps, what to do. Nothing here knows of FastAPI.
"""

from collections.abc import Mapping
from typing import ClassVar


class ErrataError(Exception):
    """Base of the tree.

    Attributes:
        param: the field, header or path element that is wrong, as a dotted path, or None.
        headers: headers that the answer carries besides.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.default_code
        self.headers: dict[str, str] = {}

    def body(self) -> Mapping[str, Mapping[str, str | None]]:
        """The error in OpenAI's shape."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequestError(ErrataError):
    """The request is understood and wrong."""

    status = 422
    type = "invalid_request_error"
    default_code = "invalid_value"


class MalformedRequestError(InvalidRequestError):
    """The request cannot be parsed at all."""

    status = 400
    default_code = "malformed_json"


class TooLargeError(InvalidRequestError):
    """The body is larger than the service reads."""

    status = 413
    default_code = "body_too_large"


class InvalidApiKeyError(ErrataError):
    """The request needs an API key and has none that is usable."""

    status = 401
    type = "authentication_error"
    default_code = "invalid_api_key"


class MissingScopeError(ErrataError):
    """The key is good, for something else."""

    status = 403
    type = "permission_error"
    default_code = "missing_scope"


class OwnProposalError(ErrataError):
    """Nobody approves what they proposed themselves."""

    status = 403
    type = "permission_error"
    default_code = "own_proposal"


class NotLocalError(ErrataError):
    """The address is open to this machine, and the request is a web page's from elsewhere."""

    status = 403
    type = "permission_error"
    default_code = "not_local"


class NotFoundError(ErrataError):
    """No such edit, version, run or path."""

    status = 404
    type = "not_found_error"
    default_code = "not_found"


class MethodNotAllowedError(ErrataError):
    """The path exists, the method does not."""

    status = 405
    type = "invalid_request_error"
    default_code = "method_not_allowed"


class ConflictError(ErrataError):
    """The request is right and the state of the thing forbids it."""

    status = 409
    type = "conflict_error"
    default_code = "conflict"


class VersionNotReachedError(ErrataError):
    """The client must read its own edit and no version that new answers yet."""

    status = 412
    type = "conflict_error"
    default_code = "version_not_reached"


class UnavailableError(ErrataError):
    """A part that the request needs is not there now; the same request may succeed later."""

    status = 503
    type = "unavailable_error"
    default_code = "unavailable"


class NodeTimeoutError(ErrataError):
    """A node took the request and did not answer in time."""

    status = 504
    type = "unavailable_error"
    default_code = "node_timeout"


class ClientTooSlowError(InvalidRequestError):
    """The client stopped in the middle of its request."""

    status = 408
    default_code = "client_too_slow"


class BusyError(ErrataError):
    """There is more to do than the service takes on; the same request will succeed later."""

    status = 429
    type = "rate_limit_error"
    default_code = "too_busy"

    def __init__(
        self, message: str, *, retry_after_s: int = 1, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.headers["Retry-After"] = str(retry_after_s)
