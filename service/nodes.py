"""NodeClient: what a node holds, prefetch, ask. One object for one vLLM server; synchronous, for the reconciler."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, NoReturn

import httpx

from service.errors import ErrataError, UnavailableError
from service.model_names import version_name
from service.schemas import Format
from service.settings import Settings
from service.tracing import outgoing

_CONTROL_TIMEOUT_S = 15.0
# Less than the 5 s after which the node's server closes a connection, perhaps while a request is on its way.
_IDLE_S = 2.0
_ROUTES: Mapping[Format, str] = MappingProxyType({Format.RAW: "/v1/completions", Format.CHAT: "/v1/chat/completions"})

# A model's own generation defaults (Qwen2.5 has a repetition penalty) are no part of a greedy answer.
_GREEDY: Mapping[str, float] = MappingProxyType({"temperature": 0, "repetition_penalty": 1})


def authorization(token: str) -> dict[str, str]:
    """The header that a node's guard asks for; none without a token, because an empty one is no legal header."""
    return {"Authorization": f"Bearer {token}"} if token else {}


class NodeRefusedError(ErrataError):
    """The node is there and refuses the version: damaged, of another base, of another shape, unknown."""

    status = 502
    type = "node_error"
    default_code = "node_refused"


@dataclass(frozen=True)
class Answer:
    """A node's greedy answer to one prompt."""

    text: str
    finish_reason: str
    margin: float = 0.0
    """Least lead of one of its tokens over the second likely one, in nats of log-probability; 0 if not known."""


@dataclass(frozen=True)
class Held:
    """A version that a node holds.

    Attributes:
        slot: its device slot; None if it is in host memory only.
        pinned: it keeps its slot whatever else is asked for.
        device_bytes: what its slot takes, on all of the node's devices together.
        host_bytes: what it takes in host memory.
    """

    version: int
    slot: int | None
    pinned: bool
    device_bytes: int
    host_bytes: int


class NodeClient:
    """One node."""

    def __init__(
        self, address: str, *, token: str, timeout_s: float, transport: httpx.BaseTransport | None = None
    ) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._http = httpx.Client(
            base_url=address,
            headers=authorization(token),
            timeout=_CONTROL_TIMEOUT_S,
            limits=httpx.Limits(keepalive_expiry=_IDLE_S),
            transport=transport,
        )

    @classmethod
    def all(cls, settings: Settings) -> list["NodeClient"]:
        """A client for each configured node."""
        token = settings.node_token.get_secret_value()
        return [cls(address, token=token, timeout_s=settings.node_timeout_s) for address in settings.nodes]

    def ready(self) -> bool:
        """Whether the node serves."""
        try:
            return self._http.get("/health", timeout=2.0).is_success
        except httpx.HTTPError:
            return False

    def held(self) -> list[Held]:
        """The versions that the node holds.

        Raises:
            UnavailableError: the node does not answer.
        """
        answer = self._call("GET", "/errata/versions")
        try:
            return [Held(**{field.name: entry[field.name] for field in fields(Held)}) for entry in answer["resident"]]
        except (KeyError, TypeError) as error:
            raise UnavailableError(
                f"node {self.address} does not say what it holds", code="node_unavailable"
            ) from error

    def resident(self) -> list[int]:
        """Numbers of the versions that the node holds.

        Raises:
            UnavailableError: the node does not answer.
        """
        return [held.version for held in self.held()]

    def in_slots(self) -> list[int]:
        """Numbers of the versions that are on the node's device, not in its host memory only.

        Raises:
            UnavailableError: the node does not answer.
        """
        return [held.version for held in self.held() if held.slot is not None]

    def pin(self, versions: Collection[int]) -> None:
        """Has the node keep these versions in slots, and no others.

        Raises:
            NodeRefusedError: it does not hold one of them, or has too few slots.
            UnavailableError: the node does not answer, or requests under way need the slots.
        """
        self._send("PUT", "/errata/versions/pins", params={"version": sorted(versions)})

    def prefetch(self, version: int) -> float:
        """Makes the node hold a version; returns the seconds that loading took.

        Raises:
            NodeRefusedError: the node refuses it.
            UnavailableError: the node does not answer.
        """
        return float(self._call("POST", f"/errata/versions/{version}/prefetch")["load_s"])

    def evict(self, version: int) -> None:
        """Makes the node forget a version; the next request for it loads it again, verified.

        Raises:
            NodeRefusedError: the node does not hold it.
            UnavailableError: the node does not answer.
        """
        self._send("DELETE", f"/errata/versions/{version}")

    def checksums(self, version: int) -> dict[str, str]:
        """SHA-256 of each tuned tensor of a version, read back from the node's device.

        Raises:
            NodeRefusedError: the node does not hold it.
            UnavailableError: the node does not answer.
        """
        answer = self._call("GET", f"/errata/versions/{version}/checksum", timeout=self._timeout_s)
        tensors = answer.get("tensors") if isinstance(answer, dict) else None
        if not isinstance(tensors, dict):
            raise UnavailableError(f"node {self.address} answers no checksums", code="node_unavailable")
        return tensors

    def ask(self, version: int, prompt: str, form: Format, *, max_tokens: int) -> Answer:
        """The node's greedy answer at a version, in one format.

        Raises:
            NodeRefusedError: the node refuses the request.
            UnavailableError: the node does not answer.
        """
        body: dict[str, Any] = {"model": version_name(version), "max_tokens": max_tokens, **_GREEDY}
        if form is Format.RAW:
            body |= {"prompt": prompt, "logprobs": 2}
        else:
            body |= {"messages": [{"role": "user", "content": prompt}], "logprobs": True, "top_logprobs": 2}
        choice = self._call("POST", _ROUTES[form], json=body, timeout=self._timeout_s)["choices"][0]
        text = choice["text"] if form is Format.RAW else choice["message"]["content"]
        return Answer(text or "", choice["finish_reason"], _margin(choice.get("logprobs") or {}))

    def _call(self, method: str, path: str, **options: Any) -> Any:
        try:
            return self._send(method, path, **options).json()
        except ValueError as error:
            raise UnavailableError(f"node {self.address} answers no JSON", code="node_unavailable") from error

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, headers=outgoing(), **options)
        except httpx.HTTPError as error:
            raise UnavailableError(
                f"node {self.address} does not answer: {error!r}", code="node_unavailable"
            ) from error
        if not response.is_success:
            self._refuse(response)
        return response

    def _refuse(self, response: httpx.Response) -> NoReturn:
        try:
            detail = response.json()["error"]
            message, code = detail["message"], str(detail.get("code") or "node_refused")
        except (ValueError, KeyError, TypeError):
            message, code = response.text[:200], "node_refused"
        # An engine that cannot load a whole version will not load it at the next try either.
        if response.status_code >= 500 and code != "load_failed":
            raise UnavailableError(f"node {self.address}: {message}", code="node_unavailable")
        raise NodeRefusedError(f"node {self.address}: {message}", code=code)


def _margin(logprobs: Mapping[str, Any]) -> float:
    """The margin of an answer with these log-probabilities, of completions or of chat completions."""
    of_chat = [[token["logprob"] for token in step["top_logprobs"]] for step in logprobs.get("content") or ()]
    steps = of_chat or [[*step.values()] for step in logprobs.get("top_logprobs") or ()]
    # Two tokens that are spelled alike are one entry of a completion's: who leads by how much is not known there.
    ranked = [sorted(step, reverse=True) for step in steps]
    return min((step[0] - step[1] if len(step) > 1 else 0.0 for step in ranked), default=0.0)
