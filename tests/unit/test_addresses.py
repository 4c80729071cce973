import pytest
from starlette.datastructures import Headers

from service.api.addresses import is_foreign, is_loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost", "::ffff:127.0.0.1"])
def test_a_host_of_this_machine_is_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org", "", "::ffff:10.0.0.1"]
)
def test_any_other_host_is_not_loopback(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"host": "127.0.0.1:8000"},
        {"host": "localhost"},
        {"host": "LOCALHOST:8000"},
        {"host": "[::1]:8000", "origin": "http://localhost:3000"},
    ],
)
def test_a_request_from_this_machine_is_not_foreign(headers: dict[str, str]) -> None:
    assert not is_foreign(Headers(headers))


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example:8000"},
        {"host": "evil.example:8000", "origin": "http://evil.example:8000"},
        {"host": "127.0.0.1:8000", "origin": "https://evil.example"},
        {"host": "127.0.0.1:8000", "origin": "null"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "evil.example@127.0.0.1.evil.example"},
        {"host": "[::1"},
        {"host": ""},
    ],
)
def test_a_request_from_elsewhere_is_foreign(headers: dict[str, str]) -> None:
    assert is_foreign(Headers(headers))
