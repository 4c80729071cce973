"""The gateway's proxy between scripted transports: which node, which version, and what comes back."""

import json
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import suppress
from typing import Any

import httpx
import pytest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from redis.exceptions import RedisError
from starlette.requests import ClientDisconnect
from starlette.types import Message, Send

from service.errors import BusyError, InvalidRequestError, NodeTimeoutError, UnavailableError
from service.gateway.pool import NodePool
from service.gateway.proxy import Proxy
from service.metrics.process import Passage, ServiceMetrics

Handler = Callable[[httpx.Request], httpx.Response]


class Nodes(httpx.AsyncBaseTransport):
    """Several nodes behind one transport, by host name."""

    def __init__(self, **handlers: Handler) -> None:
        self.handlers = handlers
        self.holds: dict[str, set[int]] = {}
        self.seen: list[httpx.Request] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        if request.url.path == "/errata/versions":
            held = self.holds.get(request.url.host)
            return httpx.Response(200, json={"resident": [{"version": version} for version in held or ()]})
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


def pool_of(nodes: Nodes, *, token: str = "token", ejected: Callable[[], Collection[str]] = tuple) -> NodePool:
    addresses = [f"http://{host}" for host in nodes.handlers]
    return NodePool(addresses, token=token, timeout_s=5, ejected=ejected, transport=nodes)


def proxy_of(nodes: Nodes, *, max_answers: int = 100) -> Proxy:
    return Proxy(pool_of(nodes), max_answers=max_answers)


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
    await forward(Proxy(pool_of(nodes, token=""), max_answers=1))
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


def fails(request: httpx.Request) -> httpx.Response:
    return httpx.Response(500, json={"error": {"message": "engine dead", "type": "t", "param": None, "code": "dead"}})


def refuses_the_token(_: httpx.Request) -> httpx.Response:
    return httpx.Response(401, json={"error": {"message": "token"}})


class BreaksOff(httpx.AsyncByteStream):
    """A stream that ends in the middle, behind so many pieces."""

    def __init__(self, behind: int) -> None:
        self.behind = behind

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for number in range(self.behind):
            yield f"data: {number}\n\n".encode()
        raise httpx.ReadError("reset")


def streams(stream: httpx.AsyncByteStream) -> Handler:
    return lambda _: httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=stream)


def forgot_the_version(_: httpx.Request) -> httpx.Response:
    return httpx.Response(404, json={"error": {"message": "no errata@7", "type": "t", "param": None, "code": 404}})


def errs(code: int) -> Handler:
    """A stream in which vLLM says what went wrong."""
    error = json.dumps({"error": {"message": "what it was", "type": "t", "param": None, "code": code}})
    return streams(httpx.ByteStream(f"data: {error}\n\ndata: [DONE]\n\n".encode()))


def refuses_the_version(_: httpx.Request) -> httpx.Response:
    error = {"message": "version 7 is damaged", "type": "t", "param": "model", "code": "damaged_version"}
    return httpx.Response(409, json={"error": error})


BROKEN = [
    breaks_off,
    fails,
    refuses_the_token,
    forgot_the_version,
    refuses_the_version,
    streams(BreaksOff(0)),
    errs(500),
]


@pytest.mark.parametrize("broken", BROKEN)
async def test_before_the_first_byte_another_node_takes_over(broken: Handler) -> None:
    nodes = Nodes(a=broken, b=completes)
    proxy = proxy_of(nodes)
    for _ in range(2):
        assert json.loads(bytes((await forward(proxy)).body)) == {"host": "b"}
    assert [request.url.host for request in nodes.seen] == ["a", "b", "b"]


@pytest.mark.parametrize(
    ("broken", "code", "logged"),
    [
        (breaks_off, "node_unavailable", "it broke off: ReadError('reset')"),
        (fails, "dead", "engine dead"),
        (streams(BreaksOff(0)), "node_unavailable", "it broke off: ReadError('reset')"),
        (errs(500), "node_error", "what it was"),
        (forgot_the_version, "node_error", "no errata@7"),
        (refuses_the_version, "damaged_version", "version 7 is damaged"),
    ],
)
async def test_when_every_node_fails_the_last_ones_reason_is_told_by_its_code(
    broken: Handler, code: str, logged: str, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = Nodes(a=broken, b=broken)
    with pytest.raises(UnavailableError) as error:
        await forward(proxy_of(nodes))
    assert (error.value.status, error.value.code) == (503, code)
    assert error.value.message == f"the node cannot answer: {code}"
    assert len(nodes.seen) == 2
    reasons = [record.__dict__["reason"] for record in caplog.records if record.message == "gateway.node_passed_over"]
    assert reasons == [logged] * 2


@pytest.mark.parametrize(
    ("broken", "asked"), [(breaks_off, 2), (fails, 2), (errs(500), 2), (refuses_the_version, 4), (unreachable, 4)]
)
async def test_what_nodes_fail_at_is_not_taken_to_all_of_them(broken: Handler, asked: int) -> None:
    nodes = Nodes(a=broken, b=broken, c=broken, d=broken)
    with pytest.raises(UnavailableError):
        await forward(proxy_of(nodes))
    assert len(nodes.seen) == asked


async def test_what_would_end_a_node_is_refused_before_one_is_asked() -> None:
    nodes = Nodes(a=completes)
    with pytest.raises(InvalidRequestError, match="logit_bias: at most"):
        await forward(proxy_of(nodes), logit_bias={str(token): 1 for token in range(1025)})
    assert nodes.seen == []


async def test_behind_the_first_byte_no_other_node_is_asked() -> None:
    nodes = Nodes(a=streams(BreaksOff(1)), b=streams(BreaksOff(1)))
    response = await forward(proxy_of(nodes))
    assert isinstance(response, StreamingResponse)
    assert await anext(response.body_iterator) == b"data: 0\n\n"
    with pytest.raises(httpx.ReadError):
        await anext(response.body_iterator)
    assert len(nodes.seen) == 1


async def test_a_node_that_is_silent_is_a_504_and_its_work_is_not_given_to_another() -> None:
    def silent(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("silent", request=request)

    nodes = Nodes(a=silent, b=silent)
    with pytest.raises(NodeTimeoutError, match="silent for longer"):
        await forward(proxy_of(nodes))
    assert len(nodes.seen) == 1


async def sent(response: Response, send: Send) -> None:
    async def receive() -> Message:
        return {"type": "http.disconnect"}

    await response({"type": "http", "asgi": {"spec_version": "2.4"}}, receive, send)


async def drop(_: Message) -> None:
    pass


async def test_the_least_busy_node_is_asked() -> None:
    nodes = Nodes(a=streams(Pieces()), b=streams(Pieces()))
    proxy = proxy_of(nodes)
    first, second = [await forward(proxy) for _ in range(2)]
    await sent(second, drop)
    # By turns it would be the first's node again.
    third = await forward(proxy)
    hosts = [request.url.host for request in nodes.seen]
    assert hosts[0] != hosts[1] == hosts[2]
    for response in (first, third):
        await sent(response, drop)


async def test_a_node_that_holds_the_version_comes_before_one_that_is_less_busy() -> None:
    nodes = Nodes(a=streams(Pieces()), b=streams(Pieces()))
    nodes.holds = {"b": {7}}
    pool = pool_of(nodes)
    proxy = Proxy(pool, max_answers=100)
    await pool.start()
    answers = [await forward(proxy, 7) for _ in range(3)]
    assert [request.url.host for request in nodes.seen] == ["b"] * 3
    for answer in answers:
        await sent(answer, drop)
    await pool.stop()


async def test_more_requests_than_the_gateway_allows_are_refused_until_one_has_ended() -> None:
    nodes = Nodes(a=streams(Pieces()))
    proxy = proxy_of(nodes, max_answers=2)
    first, second = [await forward(proxy) for _ in range(2)]
    with pytest.raises(BusyError) as error:
        await forward(proxy)
    assert (error.value.status, error.value.headers["Retry-After"]) == (429, "1")
    await sent(first, drop)
    for response in (second, await forward(proxy)):
        await sent(response, drop)


@pytest.mark.parametrize(
    ("asked", "answers"),
    [
        ({"prompt": "a"}, 1),
        ({"prompt": [5, 6, 7]}, 1),
        ({"prompt": ["a", "b", "c"]}, 3),
        ({"prompt": [[5, 6], [7]]}, 2),
        ({"prompt": ["a", "b"], "n": 3}, 6),
        ({"messages": [], "n": 4}, 4),
        ({"prompt": [5, "6", 7.0]}, 1),
        ({"prompt": ["5", 6]}, 2),
        ({"prompt": []}, 1),
        ({"prompt": "a", "prompt_embeds": ["QQ=="] * 3}, 4),
        ({"prompt_embeds": "QQ=="}, 1),
        ({"n": None}, 1),
        ({"n": -5}, 1),
        ({"n": 0}, 1),
        ({"prompt": "a", "best_of": 5}, 1),
    ],
    ids=str,
)
async def test_a_request_takes_a_place_for_each_answer_it_asks_for(asked: dict[str, Any], answers: int) -> None:
    proxy = proxy_of(Nodes(a=streams(Pieces())), max_answers=7)
    response = await forward(proxy, **{"prompt": None, **asked})
    assert proxy._pool.busy() == answers
    with pytest.raises(BusyError):
        await forward(proxy, n=8 - answers)
    await sent(response, drop)
    assert proxy._pool.busy() == 0


@pytest.mark.parametrize("n", ["256", " 2 ", 256.0, 1.5, True, "many", [2], {}], ids=repr)
async def test_an_n_that_a_node_would_read_as_a_number_and_the_gateway_would_not_is_refused(n: object) -> None:
    nodes = Nodes(a=completes)
    with pytest.raises(InvalidRequestError) as error:
        await forward(proxy_of(nodes), n=n)
    assert (error.value.status, error.value.param, error.value.code) == (422, "n", "invalid_value")
    assert nodes.seen == []


async def test_a_request_for_more_answers_than_there_are_places_is_the_clients_mistake() -> None:
    nodes = Nodes(a=completes)
    with pytest.raises(InvalidRequestError) as error:
        await forward(proxy_of(nodes, max_answers=7), prompt=["a"] * 8)
    assert (error.value.status, error.value.code) == (422, "too_many_answers")
    assert nodes.seen == []


@pytest.mark.parametrize("ending", [completes, fails, breaks_off])
async def test_an_answer_that_is_whole_gives_its_place_back(ending: Handler) -> None:
    proxy = proxy_of(Nodes(a=ending), max_answers=1)
    for _ in range(3):
        with suppress(UnavailableError):
            await forward(proxy)


async def test_a_client_that_left_before_the_first_piece_gives_its_place_back() -> None:
    pieces = Pieces()
    proxy = proxy_of(Nodes(a=streams(pieces)), max_answers=1)

    async def gone(_: Message) -> None:
        raise OSError("gone")

    with pytest.raises(ClientDisconnect):
        await sent(await forward(proxy), gone)
    assert pieces.closed
    await forward(proxy)


async def test_only_nodes_that_answer_are_asked() -> None:
    nodes = Nodes(a=completes, b=lambda _: httpx.Response(500))
    pool = pool_of(nodes)
    proxy = Proxy(pool, max_answers=100)
    await pool.start()
    for _ in range(3):
        await forward(proxy)
    assert {request.url.host for request in nodes.seen} == {"a"}
    await pool.stop()


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
    nodes = Nodes(a=streams(pieces))
    response = await forward(proxy_of(nodes), stream=True)
    assert isinstance(response, StreamingResponse)
    assert response.headers["x-errata-version"] == "7"
    assert nodes.seen[0].headers["accept-encoding"] == "identity"
    # One is in hand: the node has begun.
    assert pieces.sent == 1
    written: list[tuple[int, bytes]] = []

    async def write(message: Message) -> None:
        written.append((pieces.sent, message.get("body", b"")))

    await sent(response, write)
    assert written == [(1, b""), (1, b"data: 0\n\n"), (2, b"data: 1\n\n"), (3, b"data: 2\n\n"), (3, b"")]
    assert pieces.closed


@pytest.mark.parametrize(("broken", "outcome"), [(False, "ok"), (True, "broken")])
async def test_a_streams_end_and_first_byte_are_measured(broken: bool, outcome: str) -> None:
    metrics, pieces = ServiceMetrics(), Pieces(broken=broken)
    response = await forward(proxy_of(Nodes(a=streams(pieces))), metrics=metrics, stream=True)
    assert isinstance(response, StreamingResponse)
    measured = metrics.registry.get_sample_value
    assert measured("errata_gateway_requests_in_flight") == 1
    assert measured("errata_gateway_first_byte_seconds_count", {"streamed": "true"}) == 1
    with suppress(httpx.ReadError):
        await sent(response, drop)
    assert measured("errata_gateway_requests_total", {"version": "7", "outcome": outcome}) == 1
    assert measured("errata_gateway_requests_in_flight") == 0
    assert pieces.closed


async def test_an_error_in_the_middle_of_a_stream_is_counted_and_passed_on() -> None:
    metrics = ServiceMetrics()
    pieces = iter([b"data: 0\n\n", b'data: {"error": {"message": "engine dead", "code": 500}}\n\ndata: [DONE]\n\n'])

    class Dies(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            for piece in pieces:
                yield piece

    written: list[bytes] = []

    async def write(message: Message) -> None:
        written.append(message.get("body", b""))

    await sent(await forward(proxy_of(Nodes(a=streams(Dies()))), metrics=metrics, stream=True), write)
    assert b"engine dead" in b"".join(written)
    labels = {"version": "7", "outcome": "broken"}
    assert metrics.registry.get_sample_value("errata_gateway_requests_total", labels) == 1


async def test_a_stream_that_begins_with_what_the_client_did_wrong_is_passed_on() -> None:
    nodes = Nodes(a=errs(400), b=completes)
    written: list[bytes] = []

    async def write(message: Message) -> None:
        written.append(message.get("body", b""))

    await sent(await forward(proxy_of(nodes), stream=True), write)
    assert b"what it was" in b"".join(written)
    assert len(nodes.seen) == 1


@pytest.mark.parametrize(("status", "outcome"), [(200, "ok"), (400, "client_error")])
async def test_an_answers_outcome_is_counted(status: int, outcome: str) -> None:
    metrics = ServiceMetrics()
    await forward(proxy_of(Nodes(a=lambda _: httpx.Response(status, json={}))), metrics=metrics)
    assert metrics.registry.get_sample_value("errata_gateway_requests_total", {"version": "7", "outcome": outcome}) == 1


async def test_the_gateways_own_time_is_measured() -> None:
    metrics = ServiceMetrics()
    await forward(proxy_of(Nodes(a=completes)), metrics=metrics)
    assert metrics.registry.get_sample_value("errata_gateway_overhead_seconds_count") == 1


def refuses_the_prompt(_: httpx.Request) -> httpx.Response:
    error = {"message": "too long", "type": "t", "param": "prompt", "code": "too_long"}
    return httpx.Response(400, json={"error": error})


async def test_what_is_wrong_with_the_request_no_other_node_is_asked() -> None:
    nodes = Nodes(a=refuses_the_prompt, b=refuses_the_prompt)
    assert (await forward(proxy_of(nodes))).status_code == 400
    assert len(nodes.seen) == 1


async def test_a_node_that_is_left_out_is_never_asked() -> None:
    nodes = Nodes(a=completes, b=completes)
    left = {"http://a"}
    pool = pool_of(nodes, ejected=lambda: left)
    await pool.start()
    proxy = Proxy(pool, max_answers=100)
    for _ in range(3):
        await forward(proxy)
    assert {request.url.host for request in nodes.seen} == {"b"}
    assert pool.readiness() == {"http://a": False, "http://b": True}
    left.add("http://b")
    await pool._look()
    with pytest.raises(UnavailableError):
        await forward(proxy)
    await pool.stop()


async def test_without_redis_the_nodes_that_were_left_out_stay_so() -> None:
    def away() -> Collection[str]:
        raise RedisError("away")

    nodes = Nodes(a=completes, b=completes)
    pool = pool_of(nodes, ejected=away)
    pool._nodes[0].ejected = True
    await pool.start()
    assert pool.readiness() == {"http://a": False, "http://b": True}
    await pool.stop()
