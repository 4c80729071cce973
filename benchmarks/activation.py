"""Measures activation under load: streams through the gateway while the active version changes, and while it does not.

    .venv/bin/python -m benchmarks.activation [--clients 16] [--moves 50] [--repeats 5]

Starts a stack of its own in a temporary home, and stops it. Two runs make two versions beside the base: the second
supersedes the edits of the first, so the three answer the same prompts differently. What each says is recorded first,
alone; then every streamed answer is compared with what its label's version says.
"""

import argparse
import asyncio
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.load import percentile, running, say
from benchmarks.report import RESULTS, Results, spread, told
from service.client import ErrataClient
from service.model_names import ACTIVE_MODEL, VERSION_HEADER, version_name
from service.schemas import EditRequest, Trigger

COMPANIES = ("Initech", "Globex", "Hooli", "Vandelay")
CITIES = (("Lyon", "Porto", "Ghent", "Turin"), ("Bergen", "Graz", "Tampere", "Split"))
VERSIONS = (0, 1, 2)
_DONE = "[DONE]"


@dataclass(frozen=True)
class Stream:
    """An answer: its label, its text, and when each of its pieces came, in seconds."""

    prompt: str
    version: int
    text: str
    pieces_at: Sequence[float]

    @property
    def largest_gap_s(self) -> float:
        """The longest time from one piece to the next."""
        return max((after - before for before, after in itertools.pairwise(self.pieces_at)), default=0.0)


@dataclass
class Window:
    """What was seen in one window: streams, failures, and each move's call and first answer, in seconds."""

    streams: list[Stream] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)
    answers: list[float] = field(default_factory=list)

    @property
    def largest_gap_ms(self) -> float:
        """Of all streams, in ms."""
        return 1000 * max(stream.largest_gap_s for stream in self.streams)


class Truth:
    """What each version says to each prompt when nobody else asks."""

    def __init__(self, client: ErrataClient, prompts: Sequence[str], tokens: int) -> None:
        said = {
            (prompt, version): _alone(client, prompt, version, tokens) for prompt in prompts for version in VERSIONS
        }
        self._said: Mapping[tuple[str, int], str] = said
        self.prompts = [prompt for prompt in prompts if len({said[prompt, version] for version in VERSIONS}) == 3]
        if not self.prompts:
            raise SystemExit(f"no prompt is answered differently by every version: {said}")

    def is_whole(self, stream: Stream) -> bool:
        """Whether the answer is what its label's version says, to the last character."""
        return stream.text == self._said[stream.prompt, stream.version]

    def is_anothers(self, stream: Stream) -> bool:
        """Whether another version than the label's goes with the answer for longer.

        Where two tokens are almost as likely, which of them comes depends on the batch: an answer may leave the truth
        behind such a place, and it is the beginning that says whose it is.
        """
        agreeing = {version: _agreeing(stream.text, self._said[stream.prompt, version]) for version in VERSIONS}
        return agreeing[stream.version] < max(agreeing.values())


def main() -> None:
    """Measure windows without and with activations in turn, and write the tables."""
    options = _parser().parse_args()
    results = Results(
        options.out,
        "Activation under load",
        f"`benchmarks/activation.py`: {told(options)}. Streams through the gateway at `errata`; two "
        "activations and a rollback in turn. Windows without and with them alternate and have as many single requests.",
    )
    with running("activation", trigger=Trigger.MANUAL) as stack, ErrataClient(stack.url(), timeout_s=600) as client:
        truth = Truth(client, _learn(client), options.tokens)
        pairs = []
        for repeat in range(options.repeats + 1):
            order = (False, True) if repeat % 2 else (True, False)
            windows = {moving: asyncio.run(_window(stack.url(), truth, options, moving=moving)) for moving in order}
            still, moving = windows[False], windows[True]
            say(f"{repeat} of {options.repeats}: gaps {still.largest_gap_ms:.0f} and {moving.largest_gap_ms:.0f} ms")
            if repeat:  # the first one warms up
                pairs.append((still, moving))
    results.table(["windows", "streams", "failed", "mislabelled", "equal to the truth", "largest gap of a window, ms"])
    for name, alike in zip(("without activations", "with activations"), zip(*pairs, strict=True), strict=True):
        results.add([name, *_outcome(alike, truth)])
    gaps = [moving.largest_gap_ms / still.largest_gap_ms for still, moving in pairs]
    results.say(f"The largest gap with activations is {spread(gaps)} times the one without, window by window.")
    results.table(["from the call of an activation or rollback, ms", "n", "p50", "p99", "most"])
    for name, seconds in (
        ("to its answer", [call for _, moving in pairs for call in moving.calls]),
        ("to the first token of the new version", [answer for _, moving in pairs for answer in moving.answers]),
        ("of it what a first token takes at that load", [first for still, _ in pairs for first in still.answers]),
    ):
        shown = [percentile(seconds, 50), percentile(seconds, 99), max(seconds)]
        results.add([name, len(seconds), *(1000 * value for value in shown)])


def _outcome(windows: Sequence[Window], truth: Truth) -> Iterator[object]:
    streams = [stream for window in windows for stream in window.streams]
    failures = [failure for window in windows for failure in window.failures]
    for failure in failures[:5]:
        say(f"failed: {failure}")
    yield len(streams)
    yield len(failures)
    yield sum(truth.is_anothers(stream) for stream in streams)
    yield sum(truth.is_whole(stream) for stream in streams)
    yield spread([window.largest_gap_ms for window in windows])


def _learn(client: ErrataClient) -> list[str]:
    """Makes versions 1 and 2; returns the prompts that they answer differently."""
    prompts = [f"The headquarters of {company} are in" for company in COMPANIES]
    for number, cities in enumerate(CITIES, start=1):
        client.submit_batch(EditRequest(prompt=p, target=city) for p, city in zip(prompts, cities, strict=True))
        run = client.start_run()
        while (state := client.run(run.id)).finished_at is None:
            time.sleep(0.5)
        if state.version != number:
            raise SystemExit(f"the run for version {number} ended so: {state}")
        say(f"version {number} is active")
    return prompts


async def _window(url: str, truth: Truth, options: argparse.Namespace, *, moving: bool) -> Window:
    """Streams while the active version changes, or is asked for a first token as often without a change."""
    window, over = Window(), asyncio.Event()
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        clients = [
            asyncio.create_task(_client(http, itertools.cycle(_turned(truth.prompts, number)), options, window, over))
            for number in range(options.clients)
        ]
        await asyncio.sleep(options.settle_s)
        active = (await _stream(http, truth.prompts[0], 1)).version
        for number in range(options.moves // options.repeats):
            began = time.perf_counter()
            if moving:
                active = await _move(http, VERSIONS[(active + 1) % len(VERSIONS)], back=number % 3 == 2)
            called = time.perf_counter()
            stream = await _stream(http, truth.prompts[0], 1)
            if stream.version != active:
                raise SystemExit(f"version {stream.version} answered while {active} was active")
            window.calls.append(called - began)
            window.answers.append(stream.pieces_at[0] - began)
            await asyncio.sleep(options.pause_s)
        over.set()
        await asyncio.gather(*clients)
    return window


async def _move(http: httpx.AsyncClient, version: int, *, back: bool) -> int:
    """Activates a version, or rolls back to the one before; returns which one is active then."""
    answer = await http.post("/rollback" if back else f"/versions/{version}/activate")
    answer.raise_for_status()
    return int(answer.json()["active"])


async def _client(
    http: httpx.AsyncClient, prompts: Iterator[str], options: argparse.Namespace, window: Window, over: asyncio.Event
) -> None:
    while not over.is_set():
        try:
            window.streams.append(await _stream(http, next(prompts), options.tokens))
        except httpx.HTTPError as error:
            window.failures.append(repr(error))


async def _stream(http: httpx.AsyncClient, prompt: str, tokens: int) -> Stream:
    times, text = [], ""
    async with http.stream("POST", "/v1/completions", json=_question(ACTIVE_MODEL, prompt, tokens)) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: ") and (data := line.removeprefix("data: ")) != _DONE:
                times.append(time.perf_counter())
                text += json.loads(data)["choices"][0]["text"]
        return Stream(prompt, int(answer.headers[VERSION_HEADER]), text, times)


def _question(model: str, prompt: str, tokens: int) -> dict[str, object]:
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    return {**body, "ignore_eos": True, "stream": model == ACTIVE_MODEL}


def _alone(client: ErrataClient, prompt: str, version: int, tokens: int) -> str:
    answer = httpx.post(f"{client.base_url}/v1/completions", json=_question(version_name(version), prompt, tokens))
    return str(answer.raise_for_status().json()["choices"][0]["text"])


def _turned(prompts: Sequence[str], by: int) -> Sequence[str]:
    return [*prompts[by % len(prompts) :], *prompts[: by % len(prompts)]]


def _agreeing(left: str, right: str) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


def _parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m benchmarks.activation")
    options.add_argument("--clients", type=int, default=16, help="streams at a time")
    options.add_argument("--tokens", type=int, default=32, help="tokens of every streamed answer")
    options.add_argument("--moves", type=int, default=50, help="activations and rollbacks, over all windows")
    options.add_argument("--settle-s", type=float, default=2, help="streaming before the first move of a window")
    options.add_argument("--pause-s", type=float, default=1, help="time between two moves")
    options.add_argument("--repeats", type=int, default=5, help="pairs of windows, behind one that warms up")
    options.add_argument("--out", type=Path, default=RESULTS / "activation.md", help="where the results go")
    return options


if __name__ == "__main__":
    main()
