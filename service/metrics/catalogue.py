"""Every metric: its name, kind, labels and meaning. docs/observability.md's table is generated from it.

No label holds an id; ``version`` is one of the few that were asked for last, or that a node holds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from service.schemas import EditStatus, RunStatus, VersionState

MOST_VERSIONS = 16
"""Versions that a label shows at once; the one that was asked for longest ago is left out first."""

_SECONDS = (1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600)
_SHORT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_MILLISECONDS = (0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 1)


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: as Prometheus shows it; of a histogram without ``_bucket``, ``_sum`` and ``_count``.
        meaning: one line, shown as HELP.
        labels: the labels' names, in order.
        buckets: a histogram's upper bounds, ascending, in the unit of the name.
        kept: values of the first label that a metric kept in Redis shows from the start, so that a rate sees the first.
    """

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    meaning: str
    labels: Sequence[str] = ()
    buckets: Sequence[float] = ()
    kept: Sequence[str] = field(default=())


REDIS_UP = Metric(
    "gauge", "errata_redis_up", "1 if Redis answered this scrape; at 0 all that is read from it is left out"
)
REDIS_MEMORY = Metric("gauge", "errata_redis_memory_bytes", "Memory that Redis uses")
EDITS = Metric("gauge", "errata_edits", "Edits by status", ["status"])
EDITS_ACCEPTED = Metric("counter", "errata_edits_accepted_total", "Edits ever stored")
EDIT_OLDEST_AGE = Metric(
    "gauge",
    "errata_edit_oldest_age_seconds",
    "Time since the acceptance (or approval, or release) of the oldest edit in a status; 0 if there is none",
    ["status"],
)
EDIT_TO_LIVE = Metric(
    "histogram",
    "errata_edit_to_live_seconds",
    "From an edit's acceptance (or approval, or release) to live, in whole seconds",
    buckets=_SECONDS,
)
RUNS = Metric("gauge", "errata_runs", "Runs that wait or are under way, by status", ["status"])
RUNS_ENDED = Metric(
    "counter",
    "errata_runs_ended_total",
    "Runs that ended, by status",
    ["status"],
    kept=(RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.CANCELLED, RunStatus.STALE),
)
RUNS_FAILED_IN_A_ROW = Metric("gauge", "errata_runs_failed_in_a_row", "Runs that failed since the last that succeeded")
RUN_PHASE_SECONDS = Metric(
    "histogram",
    "errata_run_phase_seconds",
    "Duration of a run's phases",
    ["phase"],
    buckets=(0.01, 0.05, 0.1, 0.5, *_SECONDS),
    kept=("train", "evaluate", "commit", "load", "verify"),
)
RUN_PHASE = Metric("gauge", "errata_run_phase", "1 for the phase of the run under way", ["phase"])
RUN_ELAPSED = Metric("gauge", "errata_run_elapsed_seconds", "Time since the run under way began; 0 without one")
RUN_EPOCH = Metric("gauge", "errata_run_epoch", "Epochs that the run under way has trained; 0 without one")
RUN_LOSS = Metric("gauge", "errata_run_loss", "Mean loss of the last epoch of the run under way; absent without one")
RUN_ETA = Metric(
    "gauge", "errata_run_eta_seconds", "Estimated time to the end of training, at most; absent without one"
)
RUN_EDITS = Metric("gauge", "errata_run_edits", "Edits in the set of the run under way; 0 without one")
QUEUE_LENGTH = Metric("gauge", "errata_queue_length", "Messages that wait in a Celery queue", ["queue"])
TRAIN_WORKERS = Metric("gauge", "errata_train_workers", "Train workers heard of lately")
CONTROL_TICK = Metric(
    "gauge",
    "errata_control_last_tick_timestamp_seconds",
    "When the control worker last looked at everything, Unix time; 0 before the first time",
)
VERSIONS = Metric("gauge", "errata_versions", "Committed versions")
VERSIONS_JUDGED = Metric(
    "counter",
    "errata_versions_judged_total",
    "Versions by the outcome of their verification",
    ["outcome"],
    kept=(VersionState.VERIFIED, VersionState.REJECTED),
)
ACTIVE_VERSION = Metric("gauge", "errata_active_version", "Number of the active version")
ACTIVATIONS = Metric("counter", "errata_activations_total", "Moves of the active pointer, rollbacks among them")
ACTIVATION_SECONDS = Metric(
    "histogram",
    "errata_activation_seconds",
    "From the call of an activation or rollback to the moved pointer, loading included",
    buckets=_SHORT,
)
CANARY_VERSION = Metric("gauge", "errata_canary_version", "Number of the canary; absent without one")
CANARY_REQUESTS = Metric(
    "gauge",
    "errata_canary_requests",
    "Requests to `errata` since the canary began, by who answered (canary, active) and outcome (ok, error)",
    ["by", "outcome"],
)
CANARIES_ENDED = Metric(
    "counter",
    "errata_canaries_ended_total",
    "Canaries that ended: promoted to active, withdrawn, or overtaken by a call that named another version",
    ["outcome"],
    kept=("promoted", "withdrawn", "overtaken"),
)
VERSION_LOAD_SECONDS = Metric(
    "histogram",
    "errata_version_load_seconds",
    "Time that a node took to make a version resident; near 0 where it was",
    buckets=(0.001, *_SHORT),
)
CHECKSUM_MISMATCHES = Metric(
    "counter", "errata_checksum_mismatches_total", "Versions that a node held otherwise than they were trained"
)
ANSWERS_CHECKED = Metric(
    "counter",
    "errata_answers_checked_total",
    "Answers of nodes that were compared with what verification recorded, by outcome: right, wrong",
    ["outcome"],
    kept=("right", "wrong"),
)
NODES_READY = Metric("gauge", "errata_nodes_ready", "Nodes that answer the gateway")
NODE_READY = Metric("gauge", "errata_node_ready", "1 if the node answers the gateway", ["node"])
NODE_RESIDENT = Metric(
    "gauge",
    "errata_node_resident_versions",
    "Versions that the node holds, as the control worker saw",
    ["node"],
)
VERSION_BYTES = Metric(
    "gauge",
    "errata_version_bytes",
    "Memory that a version takes on a node, on the device or in host memory, as the control worker saw",
    ["node", "version", "memory"],
)
NODE_ACTIVE = Metric(
    "gauge",
    "errata_node_holds_active_version",
    "1 if the node holds the active version, as the control worker saw",
    ["node"],
)
HTTP_REQUESTS = Metric(
    "counter",
    "errata_http_requests_total",
    "Requests that ended, by route and status; 499: the client left before its answer",
    ["method", "route", "status"],
)
HTTP_SECONDS = Metric(
    "histogram",
    "errata_http_request_seconds",
    "Duration of requests, streams and long polls included",
    ["route"],
    buckets=(0.001, *_SHORT, 60),
)
HTTP_IN_FLIGHT = Metric("gauge", "errata_http_requests_in_flight", "Requests under way")
GATEWAY_REQUESTS = Metric(
    "counter",
    "errata_gateway_requests_total",
    "Requests for a version that ended, by outcome: ok, client_error, unavailable, broken, aborted",
    ["version", "outcome"],
)
GATEWAY_OVERHEAD = Metric(
    "histogram",
    "errata_gateway_overhead_seconds",
    "From the request's last byte to the answer's first, less the time spent waiting for a node",
    buckets=_MILLISECONDS,
)
GATEWAY_FIRST_BYTE = Metric(
    "histogram",
    "errata_gateway_first_byte_seconds",
    "From the request's last byte to the answer's first",
    ["streamed"],
    buckets=(*_SHORT, 60),
)
GATEWAY_IN_FLIGHT = Metric("gauge", "errata_gateway_requests_in_flight", "Requests for a version under way")

CATALOGUE: Mapping[str, Metric] = {
    metric.name: metric for metric in list(globals().values()) if isinstance(metric, Metric)
}
"""All of them by name."""

WAITING = (EditStatus.QUEUED, EditStatus.TRAINING, EditStatus.TRAINED)
"""Statuses of edits that are on their way to live."""


def table() -> str:
    """The catalogue as a table of Markdown."""
    rows = [
        f"| `{metric.name}` | {metric.kind} | {', '.join(f'`{label}`' for label in metric.labels)} | {metric.meaning} |"
        for metric in CATALOGUE.values()
    ]
    return "\n".join(["| metric | kind | labels | meaning |", "|---|---|---|---|", *rows])
