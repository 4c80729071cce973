"""What the benchmarks of serving share: processes of their own, and clients that ask for completions.

No script: those that serve import it.
"""

import asyncio
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from service.settings import Settings
from service.stack import Stack


@dataclass(frozen=True)
class Load:
    """So many requests, so many of them at a time, each answered with so many tokens."""

    requests: int
    concurrency: int
    tokens: int


@dataclass(frozen=True)
class Measured:
    """What a load took: the whole of it and each request, in seconds."""

    seconds: float
    each: Sequence[float]

    @property
    def rate(self) -> float:
        """Requests a second."""
        return len(self.each) / self.seconds

    @property
    def p50_ms(self) -> float:
        """The median of a request, in ms."""
        return 1000 * statistics.median(self.each)


def ask(url: str, headers: Mapping[str, str], models: Sequence[str], load: Load, *, prompt: str = "") -> Measured:
    """Has the models answer in turn, whole answers. Every request has a prompt of its own, so no prefix is cached."""
    return asyncio.run(_ask(url, headers, models, load, prompt))


async def _ask(url: str, headers: Mapping[str, str], models: Sequence[str], load: Load, prompt: str) -> Measured:
    asked = zip(range(load.requests), itertools.cycle(models), strict=False)
    each: list[float] = []

    async def client(http: httpx.AsyncClient) -> None:
        for number, model in asked:
            body = {"model": model, "prompt": f"{time.monotonic_ns()}-{number}. {prompt}", "temperature": 0}
            began = time.perf_counter()
            answer = await http.post("/v1/completions", json={**body, "max_tokens": load.tokens, "ignore_eos": True})
            answer.raise_for_status()
            each.append(time.perf_counter() - began)
            if (told := answer.json()["usage"]["completion_tokens"]) != load.tokens:
                raise SystemExit(f"{told} tokens came, {load.tokens} were asked for")

    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=300) as http:
        began = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(load.concurrency)))
        return Measured(time.perf_counter() - began, each)


@contextmanager
def running(name: str, **settings: object) -> Iterator[Stack]:
    """A stack in a temporary home."""
    with tempfile.TemporaryDirectory(prefix=f"errata-{name}-") as home:
        stack = Stack(Settings.model_validate({"home": Path(home), "port": 0, **settings}))
        if stack.up(detach=True, say=say):
            raise SystemExit("the start was broken off")
        try:
            yield stack
        finally:
            stack.down(say=say)


def percentile(values: Sequence[float], percent: int) -> float:
    """A percentile of at least two values."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def say(line: str) -> None:
    """Tells whoever waits."""
    print(line, file=sys.stderr, flush=True)
