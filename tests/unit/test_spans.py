"""What spans say, what they never say, and that without an endpoint there are none."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from service import tracing
from service.api.middleware import Traced

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    provider = TracerProvider()
    exporter = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("test"))
    yield exporter
    provider.shutdown()


def only(exporter: InMemorySpanExporter) -> ReadableSpan:
    [found] = exporter.get_finished_spans()
    return found


async def served(path: str, *, method: str = "GET", status: int = 200, crash: bool = False) -> None:
    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"] = {"request_id": "req_1"}
        if crash:
            raise ValueError("secret")
        await PlainTextResponse("", status_code=status)(scope, receive, send)

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(_: Message) -> None:
        pass

    headers = Headers({"authorization": "Bearer secret"}).raw
    scope = {"type": "http", "method": method, "path": path, "query_string": b"q=secret", "headers": headers}
    await Traced(application)(scope, receive, send)


def test_what_an_exception_says_is_not_in_its_span(exporter: InMemorySpanExporter) -> None:
    with pytest.raises(ValueError), tracing.span("run", run="run_1"):
        raise ValueError("secret")
    span = only(exporter)
    assert "secret" not in span.to_json()
    assert span.status.status_code is StatusCode.ERROR
    assert dict(span.attributes or {}) == {"errata.run": "run_1", "error.type": "ValueError"}


@pytest.mark.parametrize("request_of", [{"path": "/secret"}, {"path": "/edits", "method": "SECRET"}])
async def test_a_request_that_no_route_answers_has_no_name(
    request_of: dict[str, str], exporter: InMemorySpanExporter
) -> None:
    await served(**request_of, status=404)
    span = only(exporter)
    assert "secret" not in span.to_json().lower()
    assert span.name in {"GET", "other"}


@pytest.mark.parametrize(("status", "crash"), [(503, False), (200, True)])
async def test_a_failure_of_ours_is_an_error(status: int, crash: bool, exporter: InMemorySpanExporter) -> None:
    if crash:
        with pytest.raises(ValueError):
            await served("/edits", crash=True)
    else:
        await served("/edits", status=status)
    assert only(exporter).status.status_code is StatusCode.ERROR
    assert "secret" not in only(exporter).to_json()


async def test_a_clients_error_is_none_of_ours(exporter: InMemorySpanExporter) -> None:
    await served("/edits", status=422)
    assert only(exporter).status.status_code is StatusCode.UNSET


@pytest.mark.parametrize("name", ENDPOINTS)
def test_another_protocol_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "http://127.0.0.1:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(ValueError, match="OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc'"):
        tracing.configure_tracing("test")


def test_outside_of_a_trace_nobody_is_told_of_one() -> None:
    asked: list[str] = []
    with tracing.span("run"):
        tracing.link(lambda: asked)
        assert tracing.outgoing() == {}


def test_without_an_endpoint_nothing_that_exports_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    loaded = (
        "import sys, service.app, service.reconcile; from service.tracing import configure_tracing as configure\n"
        "assert configure('test') is None\n"
        "assert [name for name in sys.modules if name.startswith('opentelemetry.')]\n"
        "sys.exit(any(name in sys.modules for name in ('opentelemetry.sdk.trace', 'opentelemetry.exporter')))"
    )
    subprocess.run([sys.executable, "-c", loaded], check=True)


def test_edits_are_not_looked_up_for_links_that_nobody_records() -> None:
    def look_up() -> list[str]:
        raise AssertionError

    tracing.link(look_up)
