"""One question to the gateway, and what came back: the label, the words, and how sure the model was of each."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from service.client import ApiError
from service.client.errors import connection_errors

_MAX_TOKENS = 12


@dataclass(frozen=True)
class Question:
    """A prompt, put raw or through the chat template to a model by its name."""

    model: str
    prompt: str
    chat: bool

    @property
    def route(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def body(self, **more: Any) -> dict[str, Any]:
        """The request's body; ``more`` is what it has besides."""
        put = {"messages": [{"role": "user", "content": self.prompt}]} if self.chat else {"prompt": self.prompt}
        return {"model": self.model, "max_tokens": _MAX_TOKENS, "temperature": 0, **put, **more}


@dataclass(frozen=True)
class Sample:
    """A whole answer.

    Attributes:
        question: what was asked.
        label: ``X-Errata-Version``, None without one.
        names: the models that the answer itself says it is from.
        text: the answer.
        finished: the model ended by itself.
        margin: the least difference, over the answer's tokens, between the log-probabilities of the token and of the
            next best one; None if it was not asked for.
    """

    question: Question
    label: int | None
    names: frozenset[str]
    text: str
    finished: bool
    margin: float | None = None


def ask(http: httpx.Client, question: Question, *, margin: bool = False) -> Sample:
    """The greedy answer. Raises ClientError."""
    more: dict[str, Any] = {}
    if margin:
        more = {"logprobs": True, "top_logprobs": 2} if question.chat else {"logprobs": 2}
    with connection_errors(str(http.base_url)):
        response = http.post(question.route, json=question.body(**more))
    if not response.is_success:
        raise ApiError.of(response)
    answer = response.json()
    return _sample(question, response, [answer], _margin(answer["choices"][0]["logprobs"]) if margin else None)


def stream(http: httpx.Client, question: Question) -> Sample | None:
    """The greedy answer, streamed; None if it broke off or ended in an error. Raises ClientError."""
    with (
        connection_errors(str(http.base_url)),
        http.stream("POST", question.route, json=question.body(stream=True)) as response,
    ):
        if not response.is_success:
            response.read()
            raise ApiError.of(response)
        said = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    if said[-1:] != ["[DONE]"]:
        return None
    pieces = [json.loads(line) for line in said[:-1]]
    return None if any("error" in piece for piece in pieces) else _sample(question, response, pieces)


def served(http: httpx.Client) -> list[int]:
    """Versions that can be asked for by name. Raises ClientError."""
    with connection_errors(str(http.base_url)):
        response = http.get("/v1/models")
    if not response.is_success:
        raise ApiError.of(response)
    names = [model["id"] for model in response.json()["data"]]
    return [int(name.removeprefix("errata@")) for name in names if name != "errata"]


def _sample(
    question: Question, response: httpx.Response, pieces: Sequence[dict[str, Any]], margin: float | None = None
) -> Sample:
    label = response.headers.get("x-errata-version")
    choices = [choice for piece in pieces for choice in piece["choices"]]
    return Sample(
        question,
        int(label) if label is not None else None,
        frozenset(piece["model"] for piece in pieces),
        "".join(_words(choice) for choice in choices),
        any(choice["finish_reason"] == "stop" for choice in choices),
        margin,
    )


def _words(choice: dict[str, Any]) -> str:
    spoken = choice.get("message") or choice.get("delta")
    return (choice["text"] if spoken is None else spoken.get("content")) or ""


def _margin(logprobs: dict[str, Any]) -> float:
    if "content" in logprobs:
        tops = [[top["logprob"] for top in token["top_logprobs"]] for token in logprobs["content"]]
    else:
        tops = [list(top.values()) for top in logprobs["top_logprobs"]]
    best = [sorted(top, reverse=True) for top in tops]
    return min((first - second for first, second, *_ in best), default=0.0)
