"""OpenTelemetry traces, where an OTLP endpoint is set; without one nothing is recorded.

A trace begins with a request. Celery's messages and requests to nodes carry it on as W3C `traceparent`; what one run
does for many edits is linked to the request that brought each. Spans hold ids, numbers and names of ours, never a text
of a client: no prompt, target, query, header or message of an exception.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.context import Context, attach, detach
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_HTTP = "http/protobuf"
_TRACEPARENT = "traceparent"
# No baggage and no tracestate: what a client wrote into them would be exported, and reach the nodes.
_FORMAT = TraceContextTextMapPropagator()
_tracer = trace.get_tracer("errata")


def configure_tracing(process: str) -> "TracerProvider | None":
    """Exports this process' spans if the environment names an OTLP endpoint; returns what does it, or None.

    It exports the last ones when the process ends by itself; one that a signal ends must have it flush.

    Args:
        process: its name; the spans' service is ``errata-`` and that.

    Raises:
        ValueError: the environment demands another protocol than OTLP over HTTP.
    """
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        return None
    for name in _PROTOCOLS:
        if os.environ.get(name, _HTTP) != _HTTP:
            raise ValueError(f"{name} is {os.environ[name]!r}; traces are exported by {_HTTP} only")
    # Loaded here: who traces nothing need not wait for it.
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    provider = TracerProvider(resource=Resource.create({"service.name": f"errata-{process}"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return provider


@contextmanager
def span(name: str, *, kind: SpanKind = SpanKind.INTERNAL, **attributes: str | int) -> Iterator[Span]:
    """A span of what is done inside, a child of the one around it.

    Args:
        name: what is done.
        kind: its side of a call, if it is one.
        attributes: ids and numbers, shown with the prefix ``errata.``.
    """
    with _tracer.start_as_current_span(
        name,
        kind=kind,
        attributes={f"errata.{key}": value for key, value in attributes.items()},
        # An exception's message may repeat what a client sent.
        record_exception=False,
        set_status_on_exception=False,
    ) as begun:
        try:
            yield begun
        except BaseException as error:
            begun.set_status(StatusCode.ERROR)
            begun.set_attribute("error.type", type(error).__name__)
            raise


def link(traceparents: Callable[[], Iterable[str]]) -> None:
    """Links the current span to the requests on whose behalf it is; they are asked for only if it is recorded."""
    current = trace.get_current_span()
    for traceparent in traceparents() if current.is_recording() else ():
        context = trace.get_current_span(_context(traceparent)).get_span_context()
        if context.is_valid:
            current.add_link(context)


def outgoing() -> dict[str, str]:
    """The ``traceparent`` header with which a receiver continues this trace; empty outside of one."""
    headers: dict[str, str] = {}
    _FORMAT.inject(headers)
    return headers


@contextmanager
def continued(headers: Mapping[str, str]) -> Iterator[None]:
    """Continues the trace that these headers carry, if they carry one, for what is done within."""
    token = attach(_context(headers.get(_TRACEPARENT)))
    try:
        yield
    finally:
        detach(token)


def _context(traceparent: str | None) -> Context:
    return _FORMAT.extract({_TRACEPARENT: traceparent} if traceparent else {})
