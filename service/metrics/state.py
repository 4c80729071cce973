"""What a scrape reads: the state in Redis, by a bounded number of commands however many edits there are."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import Metric as Family
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from redis.exceptions import RedisError

from service.metrics import catalogue, kept
from service.metrics.catalogue import WAITING, Metric
from service.nodes import Held
from service.queue import CONTROL_QUEUE, TRAIN_QUEUE
from service.runs import WORKER_SILENCE_S
from service.schemas import Run, RunStatus
from service.stores import Stores

PATIENCE_S = 2.0
"""Longest wait of a scrape for one answer of Redis."""

Families = Iterator[Family]


class StateCollector(Collector):
    """Reads Redis when it is scraped; without Redis it says so and nothing else."""

    def __init__(self, stores: Stores, *, clock: Callable[[], float] = time.time) -> None:
        self._stores = stores
        self._clock = clock

    def describe(self) -> Iterable[Family]:
        """Nothing: the names are the catalogue's, and describing by collecting would ask Redis."""
        return []

    def collect(self) -> Families:
        """The metrics of this moment."""
        try:
            found = [
                *self._of_redis(),
                *self._of_edits(),
                *self._of_runs(),
                *self._of_versions(),
                *self._of_nodes(),
                *_of_kept(self._stores.measures.kept()),
            ]
        except RedisError:
            found = []
        yield family(catalogue.REDIS_UP, {(): float(bool(found))})
        yield from found

    def _of_redis(self) -> Families:
        memory = self._stores.redis.info("memory")
        yield family(catalogue.REDIS_MEMORY, {(): memory["used_memory"]})
        pipeline = self._stores.redis.pipeline(transaction=False)
        queues = (TRAIN_QUEUE, CONTROL_QUEUE)
        for queue in queues:
            pipeline.llen(queue)
        yield family(catalogue.QUEUE_LENGTH, {(queue,): n for queue, n in zip(queues, pipeline.execute(), strict=True)})

    def _of_edits(self) -> Families:
        edits = self._stores.edits
        yield family(catalogue.EDITS, {(status,): number for status, number in edits.counts().items()})
        yield family(catalogue.EDITS_ACCEPTED, {(): edits.accepted()})
        since, now = edits.oldest_accepted_at(WAITING), self._clock()
        ages = {(status,): max(0.0, now - since.get(status, now)) for status in WAITING}
        yield family(catalogue.EDIT_OLDEST_AGE, ages)

    def _of_runs(self) -> Families:
        runs = self._stores.runs
        queued, run = runs.queued(), runs.current()
        under_way = {RunStatus.QUEUED: queued, run.status if run else RunStatus.TRAINING: run}
        statuses = (RunStatus.QUEUED, RunStatus.TRAINING, RunStatus.VERIFYING)
        yield family(catalogue.RUNS, {(status,): float(bool(under_way.get(status))) for status in statuses})
        yield family(catalogue.TRAIN_WORKERS, {(): len(runs.workers(within_s=WORKER_SILENCE_S))})
        yield from _of_progress(run, self._clock())

    def _of_versions(self) -> Families:
        yield family(catalogue.VERSIONS, {(): self._stores.registry.count()})
        if active := self._stores.registry.active():
            yield family(catalogue.ACTIVE_VERSION, {(): active.active})
        canary = self._stores.canaries.current()
        yield family(catalogue.CANARY_VERSION, {(): canary.version} if canary else {})
        sides = {"canary": canary.of_canary, "active": canary.of_active} if canary else {}
        counts = {(by, "ok"): said.ok for by, said in sides.items()}
        counts |= {(by, "error"): said.errors for by, said in sides.items()}
        yield family(catalogue.CANARY_REQUESTS, counts)

    def _of_nodes(self) -> Families:
        active, held = self._stores.registry.active(), self._stores.measures.held()
        # Without a sample no alert could compare it.
        yield family(catalogue.CONTROL_TICK, {(): self._stores.measures.ticked_at() or 0})
        yield family(catalogue.NODE_RESIDENT, {(host(node),): len(versions) for node, versions in held.items()})
        yield family(catalogue.VERSION_BYTES, _bytes(held))
        if active:
            holds = {
                (host(node),): float(active.active in {version.version for version in versions})
                for node, versions in held.items()
            }
            yield family(catalogue.NODE_ACTIVE, holds)


def _bytes(held: Mapping[str, Iterable[Held]]) -> dict[tuple[str, str, str], float]:
    found: dict[tuple[str, str, str], float] = {}
    for address, versions in held.items():
        for version in versions:
            found[host(address), str(version.version), "device"] = version.device_bytes
            found[host(address), str(version.version), "host"] = version.host_bytes
    return found


def host(address: str) -> str:
    """A node as a label: its host and port, without what else a URL may carry."""
    parts = urlsplit(address)
    return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)


def family(metric: Metric, values: Mapping[Any, float]) -> Family:
    """A gauge's or a counter's values by the tuple of its labels."""
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    made: CounterMetricFamily | GaugeMetricFamily = kind(metric.name, metric.meaning, labels=metric.labels)
    for labels, value in values.items():
        made.add_metric(labels, value)
    return made


def _of_progress(run: Run | None, now: float) -> Families:
    last = run.epochs[-1] if run and run.epochs else None
    yield family(catalogue.RUN_PHASE, {(run.phase,): 1} if run and run.phase else {})
    yield family(catalogue.RUN_ELAPSED, {(): max(0.0, now - (run.started_at or now)) if run else 0})
    yield family(catalogue.RUN_EDITS, {(): run.edits if run else 0})
    yield family(catalogue.RUN_EPOCH, {(): last.epoch if last else 0})
    yield family(catalogue.RUN_LOSS, {(): last.loss} if last else {})
    yield family(catalogue.RUN_ETA, {(): run.eta_s} if run and run.eta_s is not None else {})


def _of_kept(fields: Mapping[str, float]) -> Families:
    for metric in (*_KEPT_COUNTS, *_KEPT_DURATIONS):
        labels = [(value,) for value in metric.kept] if metric.labels else [()]
        if metric in _KEPT_COUNTS:
            yield family(metric, {label: fields.get(kept.named(metric, *label), 0) for label in labels})
        else:
            yield _histogram(metric, labels, fields)


def _histogram(metric: Metric, labels: Iterable[tuple[str, ...]], fields: Mapping[str, float]) -> Family:
    made = HistogramMetricFamily(metric.name, metric.meaning, labels=metric.labels)
    for label in labels:
        names = kept.bounds(metric)
        counts = accumulate(fields.get(kept.named(metric, *label, bound), 0) for bound in names)
        shown = [*(str(float(bound)) for bound in metric.buckets), "+Inf"]
        total = fields.get(kept.named(metric, *label, kept.SUM), 0)
        made.add_metric(label, list(zip(shown, counts, strict=True)), total)
    return made


_KEPT_COUNTS = (
    catalogue.RUNS_ENDED,
    catalogue.RUNS_FAILED_IN_A_ROW,
    catalogue.VERSIONS_JUDGED,
    catalogue.ACTIVATIONS,
    catalogue.CANARIES_ENDED,
    catalogue.CHECKSUM_MISMATCHES,
    catalogue.ANSWERS_CHECKED,
)
_KEPT_DURATIONS = (
    catalogue.EDIT_TO_LIVE,
    catalogue.RUN_PHASE_SECONDS,
    catalogue.VERSION_LOAD_SECONDS,
    catalogue.ACTIVATION_SECONDS,
)
