"""The gateway's proxy between scripted transports: which node, which version, and what comes back."""

import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import httpx
import pytest
from fastapi.responses import JSONResponse, Response, StreamingResponse

from service.errors import UnavailableError
from service.gateway.proxy import Proxy
from service.metrics.process import Passage, ServiceMetrics

Handler = Callable[[httpx.Request], httpx.Response]


class Nodes(httpx.AsyncBaseTransport):
    """Several nodes behind one transport, by host name."""

    def __init__(self, **handlers: Handler) -> None:
        self.handlers = handlers
        self.seen: list[httpx.Request] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        if request.url.path != "/health":
            self.seen.append(request)
        return self.handlers[request.url.host](request)


def completes(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, json={"host": request.url.host})


def unreachable(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused", request=request)


def too_far(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectTimeout("no answer", request=request)


def breaks_off(request: httpx.Request) -> httpx.Response:
    raise httpx.ReadError("reset", request=request)


def proxy_of(nodes: Nodes, *, token: str = "token") -> Proxy:
    return Proxy([f"http://{host}" for host in nodes.handlers], token=token, timeout_s=5, transport=nodes)


async def forward(proxy: Proxy, version: int = 7, *, metrics: ServiceMetrics | None = None, **body: Any) -> Response:
    passage = Passage(metrics or ServiceMetrics(), version, began=time.perf_counter())
    return await proxy.forward("/v1/completions", {"model": "errata", "prompt": "p", **body}, version, passage)


async def test_the_body_goes_on_with_the_versions_name() -> None:
    nodes = Nodes(a=completes)
    response = await forward(proxy_of(nodes), 7, temperature=0.5)
    [request] = nodes.seen
    assert json.loads(request.content) == {"model": "errata@7", "prompt": "p", "temperature": 0.5}
    assert request.url.path == "/v1/completions"
    assert request.headers["authorization"] == "Bearer token"
    assert (response.status_code, response.headers["x-errata-version"]) == (200, "7")


async def test_without_a_token_no_header_is_sent() -> None:
    nodes = Nodes(a=completes)
    await forward(proxy_of(nodes, token=""))
    assert "authorization" not in nodes.seen[0].headers


async def test_nodes_take_turns() -> None:
    nodes = Nodes(a=completes, b=completes)
    proxy = proxy_of(nodes)
    for _ in range(4):
        await forward(proxy)
    assert [request.url.host for request in nodes.seen] in (["a", "b"] * 2, ["b", "a"] * 2)


@pytest.mark.parametrize("away", [unreachable, too_far])
async def test_a_node_that_cannot_be_reached_is_passed_over(away: Handler) -> None:
    nodes = Nodes(a=away, b=completes)
    proxy = proxy_of(nodes)
    for _ in range(3):
        response = await forward(proxy)
        assert json.loads(bytes(response.body)) == {"host": "b"}


@pytest.mark.parametrize("handlers", [{"a": unreachable, "b": too_far}, {}])
async def test_no_node_is_a_503(handlers: dict[str, Handler]) -> None:
    with pytest.raises(UnavailableError) as error:
        await forward(proxy_of(Nodes(**handlers)))
    assert (error.value.status, error.value.code) == (503, "no_ready_node")


async def test_a_request_that_a_node_has_begun_is_not_sent_to_another() -> None:
    nodes = Nodes(a=breaks_off, b=breaks_off)
    with pytest.raises(UnavailableError) as error:
        await forward(proxy_of(nodes))
    assert error.value.code == "node_unavailable"
    assert len(nodes.seen) == 1


async def test_only_nodes_that_answer_are_asked() -> None:
    nodes = Nodes(a=completes, b=lambda _: httpx.Response(500))
    proxy = proxy_of(nodes)
    await proxy.start()
    for _ in range(3):
        await forward(proxy)
    assert {request.url.host for request in nodes.seen} == {"a"}
    await proxy.stop()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            json.dumps({"error": {"message": "too long", "type": "BadRequest", "param": "prompt", "code": 400}}),
            {"message": "too long", "type": "BadRequest", "param": "prompt", "code": "400"},
        ),
        ("<html>", {"message": "<html>", "type": "node_error", "param": None, "code": "node_error"}),
        ("[]", {"message": "[]", "type": "node_error", "param": None, "code": "node_error"}),
        ('{"error": "x"}', {"message": '{"error": "x"}', "type": "node_error", "param": None, "code": "node_error"}),
        (
            '{"error": {"message": "m", "param": 3}}',
            {"message": "m", "type": "node_error", "param": "3", "code": "node_error"},
        ),
    ],
)
async def test_a_nodes_error_comes_back_in_the_one_shape(content: str, expected: dict[str, object]) -> None:
    response = await forward(proxy_of(Nodes(a=lambda _: httpx.Response(400, text=content))))
    assert isinstance(response, JSONResponse)
    assert (response.status_code, response.headers["x-errata-version"]) == (400, "7")
    assert json.loads(bytes(response.body)) == {"error": expected}


async def test_the_nodes_guard_is_not_the_clients_business() -> None:
    """A wrong internal token is the service's trouble: the client's own credentials are not in question."""
    with pytest.raises(UnavailableError) as error:
        await forward(proxy_of(Nodes(a=lambda _: httpx.Response(401, json={"error": {"message": "token"}}))))
    assert error.value.code == "node_refused"


class Pieces(httpx.AsyncByteStream):
    def __init__(self, *, broken: bool = False) -> None:
        self.broken = broken
        self.sent = 0
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for number in range(3):
            self.sent += 1
            yield f"data: {number}\n\n".encode()
        if self.broken:
            raise httpx.ReadError("reset")

    async def aclose(self) -> None:
        self.closed = True


async def test_a_stream_is_passed_on_piece_by_piece_and_closed() -> None:
    pieces = Pieces()

    def streams(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=pieces)

    nodes = Nodes(a=streams)
    response = await forward(proxy_of(nodes), stream=True)
    assert isinstance(response, StreamingResponse)
    assert response.headers["x-errata-version"] == "7"
    assert nodes.seen[0].headers["accept-encoding"] == "identity"
    assert pieces.sent == 0
    body = response.body_iterator
    assert await anext(body) == b"data: 0\n\n"
    assert pieces.sent == 1
    assert [piece async for piece in body] == [b"data: 1\n\n", b"data: 2\n\n"]
    assert pieces.closed


@pytest.mark.parametrize(("broken", "outcome"), [(False, "ok"), (True, "broken")])
async def test_a_streams_end_and_first_byte_are_measured(broken: bool, outcome: str) -> None:
    metrics, pieces = ServiceMetrics(), Pieces(broken=broken)

    def streams(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=pieces)

    response = await forward(proxy_of(Nodes(a=streams)), metrics=metrics, stream=True)
    assert isinstance(response, StreamingResponse)
    measured = metrics.registry.get_sample_value
    assert measured("errata_gateway_requests_in_flight") == 1
    with suppress(httpx.ReadError):
        async for _ in response.body_iterator:
            assert measured("errata_gateway_first_byte_seconds_count", {"streamed": "true"}) == 1
    assert measured("errata_gateway_requests_total", {"version": "7", "outcome": outcome}) == 1
    assert measured("errata_gateway_requests_in_flight") == 0
    assert pieces.closed


@pytest.mark.parametrize(("status", "outcome"), [(200, "ok"), (404, "client_error"), (500, "node_error")])
async def test_an_answers_outcome_is_counted(status: int, outcome: str) -> None:
    metrics = ServiceMetrics()
    await forward(proxy_of(Nodes(a=lambda _: httpx.Response(status, json={}))), metrics=metrics)
    assert metrics.registry.get_sample_value("errata_gateway_requests_total", {"version": "7", "outcome": outcome}) == 1
    assert metrics.registry.get_sample_value("errata_gateway_overhead_seconds_count") == 1
