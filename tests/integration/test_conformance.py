"""Every route of the OpenAPI document, asked for what it describes and what it forbids: the answers are as it says."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given
from hypothesis import settings as bounds
from hypothesis import strategies as st
from redis_server import RedisServer
from schemathesis import APIOperation, Case, GenerationMode, Response, SerializationContext
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from scripted_node import ScriptedNode, listening
from scripted_worker import ScriptedWorker, fact
from service_process import serving

from service.api.scopes import SCOPES
from service.api_keys import Scope
from service.audit import Actor, acting
from service.schemas import ErrorBody, Trigger, VersionState
from service.settings import Settings
from service.store import EditStore
from service.stores import Stores

pytestmark = pytest.mark.timeout(60)

DOCUMENT = Path(__file__).parents[2] / "openapi/openapi.json"
OPERATORS = "the-operators-key-is-long-enough"
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
FEW = bounds(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


@schemathesis.serializer("application/x-ndjson")
def ndjson(_: SerializationContext, value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")


OPERATIONS = [found.ok() for found in schemathesis.openapi.from_path(DOCUMENT).get_all_operations()]
each_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)


@dataclass(frozen=True)
class Door:
    """A service, and the header that lets a client in."""

    url: str
    headers: Mapping[str, str]


@pytest.fixture(scope="module")
def node() -> ScriptedNode:
    return ScriptedNode()


@pytest.fixture(scope="module")
def module_settings(redis_server: RedisServer, tokenizer_folder: Path, node: ScriptedNode) -> Iterator[Settings]:
    with listening(node) as address:
        yield Settings(redis_url=redis_server.url, model=str(tokenizer_folder), nodes=(address,), wait_max_s=0.05)


@pytest.fixture(scope="module")
def open_door(module_settings: Settings) -> Iterator[Door]:
    with serving(module_settings) as url:
        yield Door(url, {})


@pytest.fixture(scope="module")
def locked_door(module_settings: Settings) -> Iterator[Door]:
    locked = Settings(**{**module_settings.model_dump(), "auth": "required", "api_key": OPERATORS})
    with serving(locked) as url:
        yield Door(url, {"Authorization": f"Bearer {OPERATORS}"})


@pytest.fixture(params=["open", "locked"])
def door(request: pytest.FixtureRequest) -> Door:
    door: Door = request.getfixturevalue(f"{request.param}_door")
    return door


@pytest.fixture
def known(operation: APIOperation, stores: Stores, worker: ScriptedWorker) -> Mapping[str, Sequence[object]]:
    """Names of what there is: two versions, a queued run, an edit in the state that the route asks for."""
    stores.runs.beat("worker")
    stores.edits.submit([fact("a", "1")])
    _, version = worker.train()
    stores.registry.mark(version, VersionState.VERIFIED)
    stores.registry.activate(version)
    with acting(Actor("proposer")):
        [proposed] = EditStore(
            stores.redis, events_max=100, idempotency_ttl_s=60, max_attempts=3, queue_max_edits=100, review=True
        ).submit([fact("b", "2")])
    queued, held = stores.edits.submit([fact("c", "3"), fact("d", "4")])
    stores.redis.hset(f"errata:edit:{held.id}", "status", "held")
    run, _ = stores.runs.request(Trigger.MANUAL)
    edit = {"approve": proposed, "release": held}.get(operation.path.rpartition("/")[2], queued)
    return {
        "edit_id": [edit.id],
        "run_id": [run.id],
        "number": [0, version],
        "other": [0, version],
        "model": ["errata", "errata@0"],
        "X-Errata-Min-Version": ["0"],
        "to": [0, version],
    }


def modes(operation: APIOperation) -> list[GenerationMode]:
    """Both, unless every text is right: then nothing can be made that the document forbids."""
    parameters = [parameter["schema"] for parameter in operation.definition.raw.get("parameters", ())]
    free = all(schema.get("type") == "string" and len(schema) == 2 for schema in parameters)
    return [GenerationMode.POSITIVE] if free and not operation.body else list(GenerationMode)


@st.composite
def cases(draw: st.DrawFn, operation: APIOperation, known: Mapping[str, Sequence[object]]) -> Case:
    """What the document describes, or nearly; every other time it names what there is."""
    case = draw(st.sampled_from(modes(operation)).flatmap(operation.as_strategy))
    if draw(st.booleans()):
        body = case.body if isinstance(case.body, dict) else {}
        for place in (case.path_parameters, case.headers, body):
            place.update({name: draw(st.sampled_from(known[name])) for name in place if name in known})
        if "model" in body:
            body |= {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}
    return case


def ask(case: Case, door: Door, session: requests.Session, headers: Mapping[str, str] | None = None) -> Response:
    given = door.headers if headers is None else headers
    if case.operation.label != "GET /events":
        return case.call(base_url=door.url, session=session, headers=dict(given))
    # A stream has no end: its head is the answer, and the connection serves nothing else.
    request = case.as_transport_kwargs(base_url=door.url, headers=dict(given))
    with requests.request(**request, stream=True) as response:
        if response.ok:
            response._content = b""
        return Response.from_requests(response, verify=False)


@each_operation
def test_every_answer_is_as_the_document_says(
    operation: APIOperation, door: Door, known: Mapping[str, Sequence[object]]
) -> None:
    statuses = set()

    @bounds(FEW, max_examples=15)
    @given(case=cases(operation, known))
    def conforms(case: Case) -> None:
        response = ask(case, door, session)
        statuses.add(response.status_code)
        case.validate_response(response, checks=CHECKS)

    with requests.Session() as session:
        conforms()
    assert statuses & {200, 202}, "the route was never reached"


@each_operation
def test_without_a_key_nothing_of_a_request_matters(operation: APIOperation, locked_door: Door, stores: Stores) -> None:
    method, path = operation.method.upper(), operation.path
    demanded = SCOPES[method, path]
    others = stores.keys.create("others", [scope for scope in Scope if scope is not demanded])

    @bounds(FEW, max_examples=3)
    @given(case=cases(operation, {}))
    def refused(case: Case) -> None:
        case.headers.pop("Authorization", None)
        for headers, status in (({}, 401), ({"Authorization": f"Bearer {others.key}"}, 403)):
            response = ask(case, locked_door, session, headers)
            case.validate_response(response, checks=CHECKS)
            assert response.status_code == (status if demanded else 200)

    stores.runs.beat("worker")
    ScriptedWorker(stores).register_base()
    with requests.Session() as session:
        refused()


PATHS = sorted({operation.path for operation in OPERATIONS} - {"/events"})
PIECES = ["/", "edits", "0", "%00", "%ff", "%2F", "..", "%C3%A9", "?", "&"]
HOSTS = ["127.0.0.1", "localhost:1", "elsewhere", "[", "[::1", "a b", "127.0.0.1:x", "\xff", ""]


def test_what_the_document_does_not_describe_is_an_error_in_the_one_shape(door: Door, stores: Stores) -> None:
    @bounds(FEW, max_examples=60)
    @given(
        method=st.sampled_from(["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]),
        path=st.tuples(st.sampled_from(PATHS), st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("".join)),
        host=st.sampled_from(HOSTS),
    )
    def refused(method: str, path: tuple[str, str], host: str) -> None:
        with closing(HTTPConnection(door.url.removeprefix("http://"), timeout=10)) as connection:
            connection.putrequest(method, "".join(path), skip_host=True)
            for name, value in {**door.headers, "host": host}.items():
                connection.putheader(name, value.encode("latin-1"))
            connection.endheaders()
            answer = connection.getresponse()
            body = answer.read()
        if answer.status not in {200, 202}:
            assert 400 <= answer.status < 500, (answer.status, body)
            ErrorBody.model_validate_json(body, strict=True)
            assert answer.headers["x-request-id"]

    refused()
