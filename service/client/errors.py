"""What can go wrong on the client's side of a call.

ClientError
├── ApiError                the service answered, with an error
├── ConnectionFailedError   nothing answered
└── WaitTimeoutError        it did answer, and what was waited for did not happen
"""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from pydantic import ValidationError

from service.schemas import ErrorBody


class ClientError(Exception):
    """Base of the SDK's errors; ``message`` is one line for a person."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConnectionFailedError(ClientError):
    """Nothing that speaks HTTP answers at the address, or not in time."""


class WaitTimeoutError(ClientError):
    """The edits were not at rest in time."""


class ApiError(ClientError):
    """The service refused, or failed.

    Attributes:
        status: HTTP status.
        code: stable name of the error, such as ``edit_not_found``.
        message: what is wrong.
        param: the field, header or path element that is wrong, or None.
        request_id: the answer's ``x-request-id``, which the service's log has too, or None.
        retry_after_s: after how many seconds the same call may succeed, if the answer says so, or None.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None,
        request_id: str | None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.request_id = request_id
        self.retry_after_s = retry_after_s

    @classmethod
    def of(cls, response: httpx.Response) -> "ApiError":
        """Reads an error answer; one that is not in the service's shape comes from something before it."""
        request_id = response.headers.get("x-request-id")
        try:
            error = ErrorBody.model_validate_json(response.content).error
        except ValidationError:
            return cls(
                response.status_code,
                "not_errata",
                f"{response.url} answered {response.status_code} and not as Errata does: is this its address?",
                param=None,
                request_id=request_id,
            )
        retry_after = response.headers.get("retry-after", "")
        return cls(
            response.status_code,
            error.code,
            error.message,
            param=error.param,
            request_id=request_id,
            retry_after_s=int(retry_after) if retry_after.isdecimal() else None,
        )


@contextmanager
def connection_errors(base_url: str) -> Iterator[None]:
    """Turns httpx's errors into ConnectionFailedError, and text that no request can carry into ClientError."""
    try:
        yield
    except UnicodeEncodeError as error:
        raise ClientError(f"the request is not valid Unicode text at position {error.start}") from error
    except httpx.TimeoutException as error:
        raise ConnectionFailedError(f"{base_url} did not answer in time ({type(error).__name__})") from error
    except httpx.ConnectError as error:
        raise ConnectionFailedError(
            f"nothing answers at {base_url}: start a stack with `errata up`, or give another address"
        ) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConnectionFailedError(f"{base_url}: {error or type(error).__name__}") from error
