"""What the service's own process measures: its requests, and those that its gateway passes on to nodes."""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.registry import Collector

from service.metrics import catalogue
from service.metrics.catalogue import Metric
from service.metrics.state import Families, family, host

# A second series for each, of when it began, which Prometheus does not read from text.
disable_created_metrics()  # type: ignore[no-untyped-call]

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class ServiceMetrics:
    """The instruments of one process, in a registry of their own.

    Attributes:
        registry: what ``GET /metrics`` shows; collectors of other things are added to it.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._requests = self._counter(catalogue.HTTP_REQUESTS)
        self._seconds = self._histogram(catalogue.HTTP_SECONDS)
        self.in_flight = self._gauge(catalogue.HTTP_IN_FLIGHT)
        self._by_version = self._counter(catalogue.GATEWAY_REQUESTS)
        self._lately: OrderedDict[str, None] = OrderedDict()
        self._overhead = self._histogram(catalogue.GATEWAY_OVERHEAD)
        self._first_byte = self._histogram(catalogue.GATEWAY_FIRST_BYTE)
        self.passing = self._gauge(catalogue.GATEWAY_IN_FLIGHT)

    def ended(self, *, method: str, route: str | None, status: int, seconds: float) -> None:
        """A request has been answered; ``route`` is its template, None for a path that no route has."""
        known = route or "none"
        self._requests.labels(method if method in METHODS else "other", known, str(status)).inc()
        self._seconds.labels(known).observe(seconds)

    def first_byte(self, *, seconds: float, waited_s: float, streamed: bool) -> None:
        """An answer of a node begins to be passed on."""
        self._first_byte.labels(str(streamed).lower()).observe(seconds)
        self._overhead.observe(max(0.0, seconds - waited_s))

    def passed(self, version: int, outcome: str) -> None:
        """A request for a version has ended."""
        label = str(version)
        self._lately[label] = None
        self._lately.move_to_end(label)
        if len(self._lately) > catalogue.MOST_VERSIONS:
            forgotten, _ = self._lately.popitem(last=False)
            self._by_version.remove_by_labels({"version": forgotten})
        self._by_version.labels(label, outcome).inc()

    def _counter(self, metric: Metric) -> Counter:
        return Counter(metric.name, metric.meaning, metric.labels, registry=self.registry)

    def _gauge(self, metric: Metric) -> Gauge:
        return Gauge(metric.name, metric.meaning, metric.labels, registry=self.registry)

    def _histogram(self, metric: Metric) -> Histogram:
        return Histogram(metric.name, metric.meaning, metric.labels, registry=self.registry, buckets=metric.buckets)


class Passage:
    """One request's way through the gateway.

    Args:
        metrics: where it is counted.
        version: the version that it asks for.
        began: when its last byte was read, by ``time.perf_counter``.
        told: who else wants to know how it ended, of what the nodes had their part in.
    """

    def __init__(
        self,
        metrics: ServiceMetrics,
        version: int,
        *,
        began: float,
        told: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._metrics = metrics
        self._told = told
        self._version = version
        self._began = began
        self._waited_s = 0.0
        self._ended = False
        metrics.passing.inc()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The gateway waits for a node."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._waited_s += time.perf_counter() - began

    def first_byte(self, *, streamed: bool) -> None:
        """The answer begins to be passed on."""
        seconds = time.perf_counter() - self._began
        self._metrics.first_byte(seconds=seconds, waited_s=self._waited_s, streamed=streamed)

    def end(self, outcome: str, *, of_node: bool = True) -> None:
        """Counts how the request ended, once: later calls change nothing. ``of_node`` is False if no node was asked."""
        if self._ended:
            return
        self._ended = True
        self._metrics.passing.dec()
        self._metrics.passed(self._version, outcome)
        if of_node:
            self._told(outcome)


class NodeCollector(Collector):
    """Which nodes answer the gateway, by their addresses."""

    def __init__(self, readiness: Callable[[], Mapping[str, bool]]) -> None:
        self._readiness = readiness

    def describe(self) -> Families:
        """Nothing: the names are the catalogue's."""
        return iter(())

    def collect(self) -> Families:
        """The nodes of this moment."""
        ready = self._readiness()
        yield family(catalogue.NODES_READY, {(): sum(ready.values())})
        yield family(catalogue.NODE_READY, {(host(address),): float(value) for address, value in ready.items()})
