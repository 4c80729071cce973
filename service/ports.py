"""Ports that a stack listens on, and the URLs at which this machine reaches them."""

import random
import socket
from contextlib import suppress
from itertools import cycle

from service.errors import ErrataError

# Below what Linux and macOS hand out themselves: between the choice of a port and the listener on it, which may be
# seconds of imports, nobody's outgoing connection can have it. A process chooses none twice before it has had all.
_UNASSIGNED = range(20_000, 32_768)
_candidates = cycle(random.SystemRandom().sample(_UNASSIGNED, len(_UNASSIGNED)))
_TRIES = 100


class PortTakenError(ErrataError):
    """The port cannot be listened on."""

    default_code = "port_taken"


def take_port(host: str, port: int) -> int:
    """The port if it is free; for 0 a free one. It is not kept: whoever listens first has it.

    Raises:
        PortTakenError: it is taken, or the host is none of this machine's addresses.
    """
    if port:
        return _listen(host, port)
    for _ in range(_TRIES):
        with suppress(PortTakenError):
            return _listen(host, next(_candidates))
    return _listen(host, 0)


def free_port() -> int:
    """A free port on loopback."""
    return take_port("127.0.0.1", 0)


def _listen(host: str, port: int) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family) as server:
            return int(server.getsockname()[1])
    except OSError as error:
        raise PortTakenError(
            f"port {port} of {host}: {error.strerror}; --port takes another one, 0 a free one"
        ) from error


def url_of(host: str, port: int) -> str:
    """The base URL of what listens on a host, as this machine reaches it."""
    # asyncio listens on :: without IPv4.
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"
