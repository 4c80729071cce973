"""The service's own instruments, and the names that the scripts in Redis count under."""

import re
import time
from contextlib import suppress
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from redis import Redis
from starlette.types import Message, Receive, Scope, Send

import service.lua
from service.api.middleware import Measured
from service.metrics.catalogue import CATALOGUE, CHECKSUM_MISMATCHES, MOST_VERSIONS, VERSION_LOAD_SECONDS
from service.metrics.kept import Measures
from service.metrics.process import Passage, ServiceMetrics
from service.nodes import Held


def sample(metrics: ServiceMetrics, name: str, **labels: str) -> float:
    value = metrics.registry.get_sample_value(name, labels)
    assert value is not None, name
    return value


def outcomes(metrics: ServiceMetrics) -> dict[tuple[str, str], float]:
    """Requests by outcome and version."""
    text = generate_latest(metrics.registry).decode()
    rows = re.findall(r'errata_gateway_requests_total\{outcome="(\w+)",version="(\d+)"\} (\S+)', text)
    return {(outcome, version): float(value) for outcome, version, value in rows}


def test_names_follow_prometheus_conventions() -> None:
    for name, metric in CATALOGUE.items():
        assert re.fullmatch(r"errata_[a-z_]+", name)
        assert name.endswith("_total") == (metric.kind == "counter"), name
        assert bool(metric.buckets) == (metric.kind == "histogram"), name
        assert name.endswith("_seconds") or metric.kind != "histogram", name
        assert list(metric.buckets) == sorted(set(metric.buckets)), name


def test_the_scripts_count_under_names_of_the_catalogue() -> None:
    source = "".join(path.read_text() for path in Path(service.lua.__path__[0]).glob("*.lua"))
    found = set(re.findall(r"'(errata_[a-z_]+)", source))
    assert found == {
        "errata_edit_to_live_seconds",
        "errata_runs_ended_total",
        "errata_runs_failed_in_a_row",
        "errata_versions_judged_total",
        "errata_canaries_ended_total",
        "errata_activations_total",
    }
    assert found <= set(CATALOGUE)


def test_the_gateways_own_time_is_what_it_does_not_wait_for() -> None:
    metrics = ServiceMetrics()
    passage = Passage(metrics, 3, began=time.perf_counter() - 0.2)
    with passage.waiting():
        time.sleep(0.05)
    assert sample(metrics, "errata_gateway_requests_in_flight") == 1
    passage.first_byte(streamed=True)
    first_byte = sample(metrics, "errata_gateway_first_byte_seconds_sum", streamed="true")
    overhead = sample(metrics, "errata_gateway_overhead_seconds_sum")
    assert first_byte >= 0.25
    assert 0.2 <= overhead <= first_byte - 0.05
    passage.end("ok")
    passage.end("aborted")
    assert sample(metrics, "errata_gateway_requests_in_flight") == 0
    assert sample(metrics, "errata_gateway_requests_total", version="3", outcome="ok") == 1
    assert (
        metrics.registry.get_sample_value("errata_gateway_requests_total", {"version": "3", "outcome": "aborted"})
        is None
    )


def test_only_versions_that_were_asked_for_lately_are_shown() -> None:
    metrics = ServiceMetrics()
    for version in range(40):
        metrics.passed(0, "ok")
        metrics.passed(version, "unavailable")
    versions = {int(version) for _, version in outcomes(metrics)}
    assert versions == {0, *range(40 - MOST_VERSIONS + 1, 40)}
    assert len(versions) == MOST_VERSIONS
    assert outcomes(metrics)["ok", "0"] == 40, "what is asked for all the time is never left out"


@pytest.mark.parametrize("status", [200, None])
async def test_a_request_that_nobody_ended_was_aborted(status: int | None) -> None:
    """A client that goes before the first byte leaves a stream that nobody reads."""
    metrics = ServiceMetrics()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        scope["state"]["passage"] = Passage(metrics, 5, began=scope["state"]["read_at"])
        if status is None:
            raise RuntimeError
        await send({"type": "http.response.start", "status": status})

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(_: Message) -> None:
        assert sample(metrics, "errata_http_requests_in_flight") == 1

    with suppress(RuntimeError):
        await Measured(app, metrics=metrics)({"type": "http", "method": "POST"}, receive, send)
    assert outcomes(metrics) == {("aborted", "5"): 1}
    assert sample(metrics, "errata_gateway_requests_in_flight") == 0
    assert sample(metrics, "errata_http_requests_in_flight") == 0
    labels = {"method": "POST", "route": "none", "status": str(status or 500)}
    assert sample(metrics, "errata_http_requests_total", **labels) == 1


def test_what_cannot_be_counted_fails_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with Redis(port=1, retry=None) as away:
        measures = Measures(away)
        measures.count(CHECKSUM_MISMATCHES)
        measures.observe(VERSION_LOAD_SECONDS, 1.0)
        measures.tick(1.0, {"http://node": [Held(0, None, pinned=False, device_bytes=0, host_bytes=1)]})
    assert caplog.messages == ["metrics.not_kept"] * 3
