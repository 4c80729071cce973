"""What ends by itself when the service is told to stop: streams without an end, and clients that wait for a change.

Uvicorn waits for answers under way before it lets the application know; one that follows the events would never end.
"""

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stop_announced() -> Iterator[asyncio.Event]:
    """An event that is set as soon as the process is told to stop; the server's own handlers go on to do their part.

    Outside the main thread, where no signals arrive, it is never set.
    """
    stopping = asyncio.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def announce(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(stopping.set)
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)

    for number in _SIGNALS:
        signal.signal(number, announce)
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
