"""The service's process: uvicorn, with bounds on what a client may leave unsent or untaken, where it has none.

python -m service.server
"""

import asyncio
import math
import socket
from enum import Enum, auto
from typing import ClassVar

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.app import create_app
from service.settings import Settings

HEADERS_MAX_BYTES = 64 * 1024
"""More than any header that means something here; the last read may bring more than that."""


class _Within(Enum):
    """Which part of a request the last byte was of."""

    NOTHING = auto()
    HEADERS = auto()
    BODY = auto()


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
        ws="none",
        access_log=False,
        log_config=None,  # its own would write plain text beside the application's lines
        timeout_graceful_shutdown=settings.shutdown_grace_s,
    )


def protocol(settings: Settings) -> type["BoundedConnection"]:
    """What speaks HTTP on a connection, with the settings' patience; uvicorn makes one of it for each."""

    class Protocol(BoundedConnection):
        timeout_s = settings.client_timeout_s

    return Protocol


class BoundedConnection(HttpToolsProtocol):
    """Closes a connection whose client neither sends what is missing of a request nor takes what was answered.

    Headers have a time as a whole, from the connection's beginning or from the first byte behind an answered request,
    which may be the rest of its body. While a request is unanswered none runs: a body that somebody reads has a pace
    (`service.api.middleware.ClientPace`), and what comes behind it may wait.
    """

    timeout_s: ClassVar[float]
    _due: asyncio.TimerHandle | None = None
    _within = _Within.NOTHING
    _received = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called once."""
        super().connection_made(transport)
        # The kernel alone sees a client take bytes, and gives the connection up also behind `transport.close`.
        patience_ms = math.ceil(self.timeout_s * 1000)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, patience_ms)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        """Called with what the client sent."""
        if not self._due and not self._answering():
            self._expect_headers()
        self._received += len(data)
        super().data_received(data)
        if self._received > HEADERS_MAX_BYTES:
            self._refuse("431 Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        """Called by the parser, with a request's first byte."""
        self._within = _Within.HEADERS
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser. A field behind the body could pass for a header that was checked before it."""
        if self._within is _Within.HEADERS:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        super().on_headers_complete()
        self._within = _Within.BODY
        self._received = 0
        self._stop_waiting()

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        self._received = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Called by the parser, behind the body if there is one."""
        self._within = _Within.NOTHING
        self._received = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Called for what is no HTTP."""
        if self._may_answer():
            super().send_400_response(msg)
        else:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called once."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _answering(self) -> bool:
        # Answers are given in turn, so the last request's is the last.
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_headers(self) -> None:
        self._due = self.loop.call_later(self.timeout_s, self._refuse, "408 Request Timeout")

    def _stop_waiting(self) -> None:
        if self._due:
            self._due.cancel()
            self._due = None

    def _refuse(self, status: str) -> None:
        """There is no request yet that an error of the API's form could answer."""
        self._stop_waiting()
        if self.transport.is_closing():
            return
        if self._may_answer():
            self.transport.write(f"HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n".encode())
        self.transport.close()

    def _may_answer(self) -> bool:
        """Whether a client would take a status for the answer to what it is sending, not for a part of another."""
        if self._within is _Within.BODY:
            return not self.pipeline and not self.cycle.response_started
        return not self._answering()


if __name__ == "__main__":
    main()
