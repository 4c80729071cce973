"""The SDK: what is sent, what is made of the answers, what errors look like."""

import io
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from fake_service import FakeService, error

from service.client import (
    Answer,
    ApiError,
    AsyncErrataClient,
    ClientError,
    ConnectionFailedError,
    ErrataClient,
    WaitTimeoutError,
)
from service.client.sse import EventParser
from service.client.waiting import waiting
from service.schemas import EditRequest, EditState, EditStatus, Event


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def client(service: FakeService) -> Iterator[ErrataClient]:
    with ErrataClient("http://fake", transport=httpx.MockTransport(service)) as client:
        yield client


@pytest.fixture
async def aclient(service: FakeService) -> AsyncIterator[AsyncErrataClient]:
    async with AsyncErrataClient("http://fake", transport=httpx.MockTransport(service)) as client:
        yield client


def failing(response: httpx.Response) -> ErrataClient:
    return ErrataClient("http://fake", transport=httpx.MockTransport(lambda _: response))


def test_submit_sends_the_edit_and_the_key(client: ErrataClient, service: FakeService) -> None:
    edit = client.submit("Q", "A", rephrases=["R"], metadata={"m": "1"}, idempotency_key="k")

    [request] = service.requests
    assert (request.method, request.url.path) == ("POST", "/edits")
    assert request.headers["Idempotency-Key"] == "k"
    assert json.loads(request.content) == {
        "prompt": "Q",
        "target": "A",
        "rephrases": ["R"],
        "paraphrases": [],
        "metadata": {"m": "1"},
    }
    assert edit.status is EditStatus.QUEUED


def test_submit_without_a_key_sends_none(client: ErrataClient, service: FakeService) -> None:
    client.submit("Q", "A")

    assert "Idempotency-Key" not in service.requests[0].headers


def test_an_import_may_have_a_key(client: ErrataClient, service: FakeService) -> None:
    client.import_edits([], idempotency_key="k")
    client.import_edits([])

    assert [request.headers.get("Idempotency-Key") for request in service.requests] == ["k", None]


def test_submit_batch_answers_with_the_edits(client: ErrataClient) -> None:
    edits = client.submit_batch([EditRequest(prompt="P", target="A"), EditRequest(prompt="Q", target="B")])

    assert [edit.prompt for edit in edits] == ["P", "Q"]


@pytest.mark.parametrize("kind", ["requests", "file", "path"])
def test_import_takes_requests_files_and_paths(
    kind: str, client: ErrataClient, service: FakeService, tmp_path: Path
) -> None:
    requests = [EditRequest(prompt="P", target="A"), EditRequest(prompt="Q", target="B")]
    lines = "".join(request.model_dump_json() + "\n" for request in requests).encode()
    path = tmp_path / "edits.jsonl"
    path.write_bytes(lines)
    sources = {"requests": iter(requests), "file": io.BytesIO(lines), "path": path}

    assert client.import_edits(sources[kind]).accepted == 2
    assert service.requests[0].content == lines
    assert service.requests[0].headers["content-type"] == "application/x-ndjson"


def test_all_edits_goes_through_every_page(client: ErrataClient, service: FakeService) -> None:
    for number in range(5):
        client.submit(f"P{number}", "A")
    service.requests.clear()

    assert [edit.prompt for edit in client.all_edits(page_size=2)] == ["P4", "P3", "P2", "P1", "P0"]
    assert [request.url.params.get("after") for request in service.requests] == [None, "edit_3", "edit_1"]


def test_edits_leaves_out_what_is_not_given(client: ErrataClient, service: FakeService) -> None:
    client.edits(status=EditStatus.LIVE)

    assert dict(service.requests[0].url.params) == {"status": "live", "limit": "100"}


def test_wait_follows_every_edit_until_it_is_at_rest(client: ErrataClient) -> None:
    ids = [client.submit(f"P{number}", "A").id for number in range(3)]
    seen: list[EditState] = []

    states = client.wait(ids, on_change=seen.append)

    assert list(states) == ids
    assert {state.status for state in states.values()} == {EditStatus.LIVE}
    statuses = [state.status for state in seen if state.id == ids[0]]
    assert statuses == ["queued", "training", "live"]


def test_wait_names_what_is_not_at_rest_in_time() -> None:
    times = iter([0.0, 11.0])
    plan = waiting(["edit_1", "edit_2"], timeout_s=10, on_change=None, clock=lambda: next(times))
    moving = {"status": "queued", "version": None, "verified": {}, "progress": None, "error": None, "updated_at": 0}
    next(plan)
    plan.send(EditState(id="edit_1", **moving))

    with pytest.raises(WaitTimeoutError, match="edit_1 is still queued and 1 more after 10 s"):
        plan.send(EditState(id="edit_2", **moving))


def too_often(retry_after: str | None, status: int = 429) -> httpx.Response:
    response = error(status, "rate_limited", "key key_1 may ask 60 times a minute")
    if retry_after is not None:
        response.headers["retry-after"] = retry_after
    return response


def test_a_plan_asks_again_when_the_key_may() -> None:
    now = [0.0]
    plan = waiting(["edit_1"], timeout_s=10, on_change=None, clock=lambda: now[0])
    first = next(plan)
    again = plan.throw(ApiError.of(too_often("7")))
    assert (first.pause_s, again.pause_s, again.call) == (0, 7, first.call)
    now[0] = 7.0

    with pytest.raises(WaitTimeoutError, match="in time: key key_1 may ask 60 times a minute"):
        plan.throw(ApiError.of(too_often("4")))


@pytest.mark.parametrize("refusal", [too_often(None), too_often("soon"), too_often("1", 503)])
def test_a_plan_ends_with_what_no_pause_helps(refusal: httpx.Response) -> None:
    plan = waiting(["edit_1"], timeout_s=10, on_change=None)
    next(plan)
    with pytest.raises(ApiError):
        plan.throw(ApiError.of(refusal))


class Eager:
    """A service that finds the second call to be one too many."""

    def __init__(self, service: FakeService) -> None:
        self.service = service
        self.calls = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.calls += 1
        return too_often("1") if self.calls == 2 else self.service(request)


async def test_both_clients_wait_at_the_pace_that_their_key_may(service: FakeService) -> None:
    began = time.monotonic()
    with ErrataClient("http://fake", transport=httpx.MockTransport(Eager(service))) as client:
        assert client.wait([client.submit("P", "A").id])
    assert time.monotonic() - began >= 1
    async with AsyncErrataClient("http://fake", transport=httpx.MockTransport(Eager(service))) as aclient:
        edit = await aclient.submit("Q", "A")
        assert await aclient.wait([edit.id])
    assert time.monotonic() - began >= 2


def test_waiting_for_nothing_asks_nothing(client: ErrataClient, service: FakeService) -> None:
    assert client.wait([]) == {}
    assert service.requests == []


def test_ask_is_greedy_and_says_which_version_answered(client: ErrataClient, service: FakeService) -> None:
    answer = client.ask("Q", model="errata@0", max_tokens=5, min_version=0)

    request = service.requests[0]
    assert request.url.path == "/v1/completions"
    assert json.loads(request.content) == {"model": "errata@0", "temperature": 0, "max_tokens": 5, "prompt": "Q"}
    assert request.headers["X-Errata-Min-Version"] == "0"
    assert answer == Answer("I do not know", 0, "length")


def test_a_chat_question_goes_to_the_chat_route(client: ErrataClient, service: FakeService) -> None:
    client.ask("Q", chat=True)

    assert service.requests[0].url.path == "/v1/chat/completions"
    assert json.loads(service.requests[0].content)["messages"] == [{"role": "user", "content": "Q"}]


def test_activate_and_rollback_move_the_pointer(client: ErrataClient, service: FakeService) -> None:
    assert client.activate(1, expected_active=0).active == 1
    assert json.loads(service.requests[-1].content) == {"expected_active": 0}
    assert client.rollback().active == 0
    assert json.loads(service.requests[-1].content) == {}


def test_health_that_is_not_ready_is_an_answer(client: ErrataClient) -> None:
    assert not client.health().ready


def test_an_error_has_everything_that_the_service_said() -> None:
    client = failing(error(422, "idempotency_key_reused", "came before", "Idempotency-Key"))

    with pytest.raises(ApiError) as caught:
        client.submit("Q", "A")

    found = caught.value
    assert (found.status, found.code, found.message) == (422, "idempotency_key_reused", "came before")
    assert (found.param, found.request_id) == ("Idempotency-Key", "req_test")


def test_an_error_of_something_else_says_so() -> None:
    with pytest.raises(ApiError, match="is this its address") as caught:
        failing(httpx.Response(502, text="<html>bad gateway</html>")).versions()

    assert (caught.value.status, caught.value.code) == (502, "not_errata")


@pytest.mark.parametrize("body", ["<html>", "{}", '{"choices": []}'])
def test_a_success_of_something_else_is_an_error(body: str) -> None:
    for call in (lambda client: client.runs(), lambda client: client.ask("Q")):
        with pytest.raises(ClientError, match="is it Errata"):
            call(failing(httpx.Response(200, text=body)))


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (httpx.ConnectError("refused"), "nothing answers at http://fake: start a stack with `errata up`"),
        (httpx.ReadTimeout("slow"), "did not answer in time"),
        (httpx.RemoteProtocolError("broke off"), "broke off"),
    ],
)
def test_no_answer_is_a_connection_error(failure: httpx.HTTPError, message: str) -> None:
    def fail(request: httpx.Request) -> httpx.Response:
        raise failure

    client = ErrataClient("http://fake", transport=httpx.MockTransport(fail))

    with pytest.raises(ConnectionFailedError, match=message):
        client.health()


def test_an_id_cannot_name_another_route(client: ErrataClient, service: FakeService) -> None:
    with pytest.raises(ClientError, match="no id"):
        client.retract("..")
    with pytest.raises(ApiError):
        client.edit("a/../../versions")

    assert service.requests[0].url.raw_path == b"/edits/a%2F..%2F..%2Fversions"


def test_text_that_is_no_unicode_is_an_error_of_the_client(client: ErrataClient) -> None:
    with pytest.raises(ClientError, match="not valid Unicode"):
        client.submit("\udcff", "A")


def test_events_are_parsed_and_an_unfinished_one_is_dropped(client: ErrataClient) -> None:
    assert list(client.events(after="0")) == [Event(id="1-0", type="edit.queued", data={"id": "edit_0"})]


def test_events_that_are_refused_are_an_error() -> None:
    with pytest.raises(ApiError, match="bad id"):
        next(failing(error(422, "invalid_value", "bad id")).events(after="x"))


def test_the_parser_takes_lines_as_the_standard_says() -> None:
    parser = EventParser()

    assert [parser.feed(line) for line in (":comment", "", "data:{}", "id:7", "id: 8", "retry: 3")] == [None] * 6
    assert parser.feed("") == Event(id="8", type="message", data={})


async def test_the_async_client_does_the_same(aclient: AsyncErrataClient, service: FakeService) -> None:
    edits = await aclient.submit_batch([EditRequest(prompt=f"P{number}", target="A") for number in range(3)])
    states = await aclient.wait(edit.id for edit in edits)

    assert {state.status for state in states.values()} == {EditStatus.LIVE}
    assert (await aclient.ask("P1")).text == "A"
    assert (await aclient.import_edits([EditRequest(prompt="P", target="A")], idempotency_key="k")).accepted == 1
    assert service.requests[-1].headers["Idempotency-Key"] == "k"
    assert [edit.prompt async for edit in aclient.all_edits(page_size=2)] == ["P", "P2", "P1", "P0"]
    assert [event.id async for event in aclient.events()] == ["1-0"]
    assert (await aclient.rollback(0)).active == 0


async def test_the_async_client_raises_the_same() -> None:
    client = AsyncErrataClient("http://fake", transport=httpx.MockTransport(lambda _: error(404, "x", "no edit")))

    async with client:
        with pytest.raises(ApiError, match="no edit"):
            await client.edit("edit_1")


def test_both_clients_have_the_same_methods() -> None:
    def public(kind: type) -> set[str]:
        return {name.removeprefix("a") if name == "aclose" else name for name in vars(kind) if not name.startswith("_")}

    assert public(ErrataClient) == public(AsyncErrataClient)
