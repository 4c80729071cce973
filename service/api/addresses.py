"""Who can reach an address, and whether a request comes from a page that a browser got elsewhere."""

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address; a name other than ``localhost`` may be anything."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def is_foreign(headers: Headers) -> bool:
    """Whether a page of another host made a browser send the request, or a name that is not this machine's led here.

    Such a page reaches loopback as any program here does; browsers name its origin, and the name they looked up.
    """
    named = [f"//{host}" for host in headers.getlist("host")] + headers.getlist("origin")
    return any(not is_loopback(_host(url)) for url in named)


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
