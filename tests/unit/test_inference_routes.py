"""The node's routes over a stand-in for the engine: what they answer, and how they refuse."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import settings as bounds
from hypothesis import strategies as st

from worker.delta import DamagedDeltaError, StoreUnavailableError, UnknownVersionError, WrongBaseError, WrongShapeError
from worker.inference.environment import TOKEN_VARIABLE, NodeEnvironment
from worker.inference.guard import TokenGuard
from worker.inference.residents import LoadFailedError, NotResidentError, Resident
from worker.inference.resolver import VersionRefusedError
from worker.inference.routes import VersionRoutes
from worker.inference.turns import SlotsInUseError, TooManyPinsError


@dataclass
class Holder:
    """Stands in for ResidentVersions: holds what it is told to load, or fails as it is told to."""

    failure: Exception | None = None
    held: list[int] = field(default_factory=list)
    pinned: set[int] = field(default_factory=set)

    async def pin(self, versions: set[int]) -> None:
        if self.failure:
            raise self.failure
        self.pinned = versions

    async def list(self, *, checksum: bool) -> list[Resident]:
        sha256 = {"w": "00"} if checksum else None
        return [Resident(version, 0, version in self.pinned, 10, 30, sha256) for version in self.held]

    async def prefetch(self, version: int) -> None:
        if self.failure:
            raise self.failure
        self.held.append(version)

    async def checksums(self, version: int) -> dict[str, str]:
        if version not in self.held:
            raise NotResidentError(version)
        return {"w": "00"}

    async def evict(self, version: int) -> None:
        if version not in self.held:
            raise NotResidentError(version)
        self.held.remove(version)


@pytest.fixture
def holder() -> Holder:
    return Holder()


@pytest.fixture
def app(holder: Holder, tmp_path: Path) -> FastAPI:
    app = FastAPI()
    VersionRoutes(NodeEnvironment(tmp_path, "store", tmp_path, "model.down", "a" * 64)).attach_router(app)
    app.state.errata_residents = holder
    app.state.errata_identity = {"fingerprint": "a" * 64, "location": "model.down", "slots": 2}

    @app.get("/v1/ask")
    async def ask() -> None:
        raise VersionRefusedError(holder.failure)

    return app


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://node") as client:
        yield client


RESIDENT = {"version": 7, "slot": 0, "pinned": False, "device_bytes": 10, "host_bytes": 30, "sha256": None}


async def test_a_version_comes_and_goes(client: httpx.AsyncClient) -> None:
    loaded = await client.post("/errata/versions/7/prefetch")
    assert loaded.status_code == 200
    assert loaded.json()["version"] == 7
    assert loaded.json()["load_s"] >= 0
    assert (await client.get("/errata/versions")).json() == {
        "fingerprint": "a" * 64,
        "location": "model.down",
        "slots": 2,
        "resident": [RESIDENT],
    }
    read_back = (await client.get("/errata/versions", params={"checksum": "true"})).json()
    assert read_back["resident"] == [{**RESIDENT, "sha256": {"w": "00"}}]
    assert (await client.put("/errata/versions/pins", params={"version": [7]})).status_code == 204
    assert (await client.get("/errata/versions")).json()["resident"] == [{**RESIDENT, "pinned": True}]
    assert (await client.put("/errata/versions/pins")).status_code == 204
    assert (await client.get("/errata/versions")).json()["resident"] == [RESIDENT]
    assert (await client.get("/errata/versions/7/checksum")).json() == {"version": 7, "tensors": {"w": "00"}}
    evicted = await client.delete("/errata/versions/7")
    assert (evicted.status_code, evicted.content) == (204, b"")
    assert (await client.get("/errata/versions")).json()["resident"] == []


@pytest.mark.parametrize(("method", "path"), [("GET", "/errata/versions/7/checksum"), ("DELETE", "/errata/versions/7")])
async def test_what_is_not_resident_is_404(client: httpx.AsyncClient, method: str, path: str) -> None:
    response = await client.request(method, path)
    assert response.status_code == 404
    assert response.json() == {
        "error": {
            "message": "version 7 is not resident",
            "type": "invalid_request_error",
            "param": "version",
            "code": "not_resident",
        }
    }


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (UnknownVersionError("why"), 404, "unknown_version"),
        (DamagedDeltaError("why"), 409, "damaged_version"),
        (WrongBaseError("why"), 409, "wrong_base"),
        (WrongShapeError("why"), 409, "wrong_shape"),
        (StoreUnavailableError("why"), 503, "store_unavailable"),
    ],
)
async def test_a_refusal_has_a_status_and_a_code(
    client: httpx.AsyncClient, holder: Holder, failure: Exception, status: int, code: str
) -> None:
    holder.failure = failure
    prefetched = await client.post("/errata/versions/7/prefetch")
    asked = await client.get("/v1/ask")
    assert prefetched.status_code == asked.status_code == status
    for response, param in ((prefetched, "version"), (asked, "model")):
        assert response.json()["error"]["message"] == "why"
        assert response.json()["error"]["code"] == code
        assert response.json()["error"]["param"] == param


async def test_an_engine_that_cannot_load_is_a_server_error(client: httpx.AsyncClient, holder: Holder) -> None:
    holder.failure = LoadFailedError("why")
    response = await client.post("/errata/versions/7/prefetch")
    assert (response.status_code, response.json()["error"]["code"]) == (500, "load_failed")
    assert response.json()["error"]["type"] == "server_error"


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (TooManyPinsError("why"), 409, "too_many_pins"),
        (SlotsInUseError("why"), 503, "slots_in_use"),
        (NotResidentError(7), 404, "not_resident"),
    ],
)
async def test_pins_that_cannot_be_are_refused(
    client: httpx.AsyncClient, holder: Holder, failure: Exception, status: int, code: str
) -> None:
    holder.failure = failure
    response = await client.put("/errata/versions/pins", params={"version": [7]})
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


@pytest.mark.parametrize("versions", [["-1"], ["1", "x"], [str(2**53 + 1)]])
async def test_pins_that_make_no_sense_are_refused_in_the_one_shape(
    client: httpx.AsyncClient, versions: list[str]
) -> None:
    response = await client.put("/errata/versions/pins", params={"version": versions})
    assert (response.status_code, response.json()["error"]["code"]) == (422, "invalid_value")


NUMBERS = st.integers(0, 2**53).map(str) | st.sampled_from(
    ["7", "-1", "007", "1.0", str(2**53 + 1), "9" * 4000, "9" * 5000, "\u0663", "%00", "%2F", "7%0A", "", "x"]
)
FAILURES = [
    (None, 200, None),
    (UnknownVersionError("why"), 404, "unknown_version"),
    (WrongBaseError("why"), 409, "wrong_base"),
    (LoadFailedError("why"), 500, "load_failed"),
    (StoreUnavailableError("why"), 503, "store_unavailable"),
]
REFUSALS = {(404, "not_found"), (404, "not_resident"), (422, "invalid_value")}


@pytest.mark.parametrize(("failure", "status", "code"), FAILURES)
def test_whatever_is_asked_is_answered_or_refused_in_the_one_shape(
    app: FastAPI,
    holder: Holder,
    failure: Exception | None,
    status: int,
    code: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "token")
    holder.failure = failure
    guarded = TokenGuard(app)
    seen = set()

    async def answer(method: str, path: str, body: bytes) -> httpx.Response:
        headers = {"Authorization": "Bearer token", "content-type": "application/json"}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guarded), base_url="http://node") as client:
            return await client.request(method, path, content=body, headers=headers)

    @bounds(max_examples=100, derandomize=True, database=None, deadline=None)
    @given(
        route=st.tuples(st.sampled_from(["GET", "POST", "DELETE", "PUT"]), NUMBERS, st.sampled_from(["", "/"]))
        | st.tuples(st.just("GET"), NUMBERS, st.just("/checksum"))
        | st.tuples(st.just("POST"), NUMBERS, st.just("/prefetch"))
        | st.tuples(st.just("PUT"), st.just("pins"), st.just(""))
        | st.just(("GET", "", "")),
        query=st.sampled_from(["", "?checksum=true", "?checksum=maybe", "?checksum", "?version=1"]),
        body=st.binary(max_size=20) | st.just(b'{"version": []}'),
    )
    def refused_or_answered(route: tuple[str, str, str], query: str, body: bytes) -> None:
        method, number, rest = route
        path = f"/errata/versions/{number}{rest}" if number else "/errata/versions"
        response = asyncio.run(answer(method, path + query, body))
        if response.is_success:
            seen.add((200, None))
            return
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert error["type"] == ("server_error" if response.status_code >= 500 else "invalid_request_error")
        seen.add((response.status_code, error["code"]))

    refused_or_answered()
    assert seen == REFUSALS | {(200, None), (status, code)}
