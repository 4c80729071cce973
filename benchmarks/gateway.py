"""Measures what the gateway costs: completions through it beside the same from the node itself.

    .venv/bin/python -m benchmarks.gateway [--concurrency 1 16] [--repeats 5]

Starts a stack of its own in a temporary home, and stops it. Both ways are taken in turn, each first in every other
repetition, so that a repetition compares neighbours in time; then both at once, each with as many clients, so that both
medians are of the same seconds on the same node. The clients share the cores with all of it, so the gateway's own time,
which its metric tells, is reported beside what it adds.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.load import Load, Measured, ask, running, say
from benchmarks.report import RESULTS, Results, spread, told
from service.metrics.catalogue import GATEWAY_OVERHEAD
from service.model_names import version_name
from service.nodes import authorization
from service.schemas import Trigger
from service.stack import Stack

COLUMNS = (
    "at a time",
    "node, requests/s",
    "gateway, of the node's",
    "node, p50 ms",
    "p50 added, in turn, ms",
    "node, p50 ms, both at once",
    "p50 added, both at once, ms",
    "gateway's own time, mean ms",
)

Way = tuple[str, Mapping[str, str], Sequence[str]]
"""A base URL, the headers and the models that are asked for there."""


def main() -> None:
    """Measure each concurrency and write the table."""
    options = _parser().parse_args()
    results = Results(
        options.out,
        "What the gateway costs",
        f"`benchmarks/gateway.py`: {told(options)}. Whole answers of the base model, by the node at `errata@0` and "
        "through the gateway at `errata`; both at once, the node has twice as many to answer. Medians of the "
        "repetitions, with least and most in brackets; shares and differences are of one repetition's neighbours. The "
        f"gateway's own time is `{GATEWAY_OVERHEAD.name}`, of all requests of a repetition.",
    )
    results.table(COLUMNS)
    with running("gateway", trigger=Trigger.MANUAL) as stack:
        for row in _rows(options, stack):
            results.add(row)


def _rows(options: argparse.Namespace, stack: Stack) -> Iterator[list[object]]:
    settings = stack.settings()
    token = authorization(settings.node_token.get_secret_value())
    ways: dict[str, Way] = {
        "node": (settings.nodes[0], token, [version_name(0)]),
        "gateway": (stack.url(), {}, ["errata"]),
    }
    for concurrency in options.concurrency:
        load = Load(options.requests * concurrency, concurrency, options.tokens)
        apart: list[Mapping[str, Measured]] = []
        at_once: list[Mapping[str, Measured]] = []
        own_ms: list[float] = []
        for repeat in range(options.repeats + 1):
            order = list(ways) if repeat % 2 else list(ways)[::-1]
            before = _overhead(stack)
            pair = {way: ask(*ways[way], load) for way in order}
            both = _at_once(ways, load)
            for found in (pair, both):
                shown = ", ".join(f"{way} {found[way].rate:.1f}/s {found[way].p50_ms:.1f} ms" for way in ways)
                say(f"{concurrency} at a time, {repeat} of {options.repeats}: {shown}")
            if repeat:  # the first one warms up
                apart.append(pair)
                at_once.append(both)
                seconds, requests = (now - then for now, then in zip(_overhead(stack), before, strict=True))
                own_ms.append(1000 * seconds / requests)
        yield [
            concurrency,
            spread([pair["node"].rate for pair in apart]),
            spread([pair["gateway"].rate / pair["node"].rate for pair in apart]),
            *_p50s(apart),
            *_p50s(at_once),
            spread(own_ms),
        ]


def _at_once(ways: Mapping[str, Way], load: Load) -> dict[str, Measured]:
    def asked(way: Way) -> Measured:
        return ask(*way, load)

    with ThreadPoolExecutor(len(ways)) as pool:
        return dict(zip(ways, pool.map(asked, ways.values()), strict=True))


def _p50s(pairs: Sequence[Mapping[str, Measured]]) -> Iterator[str | None]:
    yield spread([pair["node"].p50_ms for pair in pairs])
    yield spread([pair["gateway"].p50_ms - pair["node"].p50_ms for pair in pairs])


def _overhead(stack: Stack) -> tuple[float, float]:
    """The seconds that the gateway spent on its own so far, and the requests."""
    families = text_string_to_metric_families(httpx.get(f"{stack.url()}/metrics").raise_for_status().text)
    samples = {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}
    return samples[f"{GATEWAY_OVERHEAD.name}_sum"], samples[f"{GATEWAY_OVERHEAD.name}_count"]


def _parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m benchmarks.gateway")
    options.add_argument("--concurrency", type=int, nargs="+", default=[1, 16], help="requests at a time")
    options.add_argument("--requests", type=int, default=30, help="requests of a repetition, for each at a time")
    options.add_argument("--tokens", type=int, default=16, help="tokens of every answer")
    options.add_argument("--repeats", type=int, default=5, help="repetitions, behind one that warms up")
    options.add_argument("--out", type=Path, default=RESULTS / "gateway.md", help="where the results go")
    return options


if __name__ == "__main__":
    main()
