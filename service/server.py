"""The service's process: uvicorn, with bounds on the time and the size of a request's headers, where it has none.

python -m service.server
"""

import asyncio
from typing import ClassVar

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.app import create_app
from service.settings import Settings

HEADERS_MAX_BYTES = 64 * 1024
"""More than any header that means something here; the last read may bring more than that."""


def main() -> None:
    """Serve until a signal says otherwise.

    Raises ValueError for a wrong setting, NoKeyError on an open address without a key.
    """
    settings = Settings.from_env()
    uvicorn.run(
        create_app,
        factory=True,
        host=settings.host,
        port=settings.port,
        http=protocol(settings),
        access_log=False,
        timeout_graceful_shutdown=settings.shutdown_grace_s,
    )


def protocol(settings: Settings) -> type["BoundedHeaders"]:
    """What speaks HTTP on a connection, with the settings' patience; uvicorn makes one of it for each."""

    class Protocol(BoundedHeaders):
        timeout_s = settings.client_timeout_s

    return Protocol


class BoundedHeaders(HttpToolsProtocol):
    """Closes a connection whose next request's headers are not whole in time, or too long.

    The time runs from the connection's beginning, or from the first byte behind a request; a body's parts have a time
    of their own (`service.api.middleware.ClientPace`).
    """

    timeout_s: ClassVar[float]
    _due: asyncio.TimerHandle | None = None
    _received = 0
    _in_body = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called once."""
        super().connection_made(transport)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        """Called with what the client sent."""
        if not self._due and not self._in_body:
            self._expect_headers()
        self._received += len(data)
        super().data_received(data)
        if self._due and self._received > HEADERS_MAX_BYTES:
            self._refuse("431 Request Header Fields Too Large")

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        self._stop_waiting()
        self._in_body = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Called by the parser, behind the body if there is one."""
        self._in_body = False
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called once."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        self._received = 0
        self._due = self.loop.call_later(self.timeout_s, self._refuse, "408 Request Timeout")

    def _stop_waiting(self) -> None:
        if self._due:
            self._due.cancel()
            self._due = None

    def _refuse(self, status: str) -> None:
        """There is no request yet that an error of the API's form could answer."""
        self._stop_waiting()
        if not self.transport.is_closing():
            self.transport.write(f"HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n".encode())
            self.transport.close()


if __name__ == "__main__":
    main()
