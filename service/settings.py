"""Every setting, read from the environment with the prefix ``ERRATA_``. An unknown ``ERRATA_`` variable is an error."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from service.defaults import PREFIX_CACHE_BYTES
from service.schemas import Trigger

_PREFIX = "ERRATA_"
_FILE = "_FILE"
_SECRETS = ("api_key", "node_token", "redis_url")
_MIN_KEY_CHARS = 32
_MOST_PINS = 3


class Settings(BaseModel):
    """The one set of settings of all processes; the README's table is generated from it."""

    # An error names the setting and not its value, which may be a secret.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    home: Path = Field(default=Path(".errata"), description="Directory of all state of the embedded stack")
    host: str = Field(default="127.0.0.1", description="Address that the API listens on")
    port: int = Field(default=8000, ge=0, le=65535, description="Port that the API listens on; 0 takes a free one")

    auth: Literal["auto", "required"] = Field(
        default="auto",
        description="Who needs an API key: whoever comes to an address that is not loopback, or everybody",
    )
    api_key: SecretStr = Field(
        default=SecretStr(""), description="The operator's own key, with every scope; what the command and the SDK send"
    )

    review: bool = Field(
        default=False,
        description="Edits wait as `proposed` until another key approves them; needs ERRATA_AUTH `required`",
    )

    model: str = Field(
        default="", description="Hugging Face folder or hub id; empty: the embedded SmolLM2-135M-Instruct"
    )
    location: str = Field(
        default="auto", description="Tuned location: a parameter, module or layer by its exact name, or `auto`"
    )
    device: Literal["", "cpu", "cuda"] = Field(
        default="", description="Where to train and serve; empty: CUDA if present"
    )
    redis_url: str = Field(default="", repr=False, description="An existing Redis; empty: the embedded one")
    store: str = Field(
        default="",
        description="Version store: a directory or fsspec URL with nothing else in it; empty: `versions` under home",
    )
    nodes: tuple[str, ...] = Field(
        default=(), description="Comma-separated base URLs of vLLM nodes that run elsewhere; empty: one embedded node"
    )
    node_token: SecretStr = Field(
        default=SecretStr(""), description="Token that the nodes demand; the embedded stack makes its own"
    )
    node_slots: int = Field(
        default=4, description="Versions that a node holds on its device at once, of which up to three are pinned"
    )
    node_host_slots: int = Field(default=16, ge=2, description="Versions that a node holds in host memory")
    node_cache: str = Field(default="", description="A node's folder for verified local copies of versions")
    node_timeout_s: float = Field(default=60.0, gt=0, description="Longest wait for one answer of a node, seconds")
    activation_quorum: float = Field(
        default=1.0, gt=0, le=1, description="Least share of the nodes that must hold a version before it is active"
    )
    node_check_s: float = Field(
        default=60.0, gt=0, description="A node's slots are read back in turn, one every so many seconds"
    )
    answer_check_s: float = Field(
        default=60.0,
        ge=0,
        description="Each node is asked one verified edit every so many seconds, and its answer compared; 0: never",
    )
    max_model_len: int = Field(default=2048, ge=64, description="Context length of the embedded node, tokens")

    trigger: Trigger = Field(default=Trigger.IMMEDIATE, description="What starts runs")
    trigger_batch_edits: int = Field(default=20, ge=1, description="`batch`: run when so many edits are queued")
    trigger_max_wait_s: float = Field(default=60.0, ge=0, description="`batch`: or when the oldest waited so long")
    trigger_interval_s: float = Field(default=300.0, gt=0, description="`interval`: seconds from one run to the next")

    train_seed: int = Field(default=0, ge=0, description="Seed of a run's shuffles")
    train_learning_rate: float | None = Field(
        default=None, gt=0, description="Adam's step size; empty: measured default"
    )
    train_batch_size: int | None = Field(default=None, ge=1, description="Sequences per step; empty: measured default")
    train_max_epochs: int | None = Field(
        default=None,
        ge=1,
        description="Bound on visits per sequence, on average; a small set may need more for its least number of "
        "steps; empty: measured default",
    )
    train_preserve: float | None = Field(
        default=None, ge=0, description="Strength of preservation, 0 for none; empty: measured default"
    )
    train_decay: float | None = Field(
        default=None,
        ge=0,
        description="Share of the update that a pass takes back, 0 for none; empty: measured default",
    )
    train_random_prefixes: int | None = Field(
        default=None, ge=0, description="Copies of each prompt trained behind random words; empty: none"
    )
    train_warm_runs: int = Field(
        default=20, ge=0, description="Runs in a row that may start from the version before; then one is from the base"
    )
    train_device_map: Literal["", "auto", "lower-on-disk"] = Field(
        default="", description="How the trainer spreads a model over devices and disk; empty: all of it on one device"
    )
    train_prefix_bytes: int = Field(
        default=PREFIX_CACHE_BYTES, ge=0, description="Bound on the frozen prefix's cache on disk, bytes"
    )
    max_attempts: int = Field(default=3, ge=1, description="Runs that may try an edit before it is `failed`")
    retry_wait_s: float = Field(default=10.0, ge=0, description="Wait after a failed run before the next, seconds")
    run_max_s: float = Field(default=6 * 3600.0, gt=0, description="Longest run, seconds")
    run_lease_s: float = Field(default=30.0, gt=0, description="A run whose worker is silent so long is taken over")

    evaluate_sample: int = Field(
        default=100, ge=0, description="Older edits, drawn at random, that a run measures beside its new ones"
    )
    gate_min_reliability: float = Field(
        default=0.5, ge=0, le=1, description="Least share of the evaluated edits learned"
    )
    gate_min_locality: float = Field(default=0.0, ge=0, le=1, description="Least share of unrelated answers unchanged")
    gate_max_perplexity_ratio: float = Field(default=3.0, gt=0, description="Most perplexity, as a ratio to the base's")
    verify_min_new: float = Field(
        default=0.5, ge=0, le=1, description="Least share of a version's new edits that a node must answer right"
    )
    verify_min_kept: float = Field(
        default=0.75, ge=0, le=1, description="Least share of the older edits asked again that must still be right"
    )
    verify_max_s: float = Field(
        default=900.0, gt=0, description="A version that no node could be asked for so long is given up, seconds"
    )
    verify_sample: int = Field(default=8, ge=0, description="Older edits of a version that are asked again")

    canary_share: float = Field(
        default=0.0, ge=0, le=1, description="Share of the requests to `errata` that a verified version gets at first"
    )
    canary_keys: tuple[str, ...] = Field(
        default=(), description="Comma-separated names of API keys that get it at first, whatever the share"
    )
    canary_s: float = Field(default=600.0, gt=0, description="A canary becomes active after so long, seconds")
    canary_requests: int = Field(default=200, ge=1, description="Or after so many requests that it answered")
    canary_max_excess: float = Field(
        default=0.02,
        ge=0,
        le=1,
        description="A canary is withdrawn if its share of errors is so much above the active version's",
    )

    edit_max_tokens: int = Field(default=512, ge=8, description="Longest prompt and target together, tokens")
    body_max_bytes: int = Field(default=4 * 1024**2, ge=1024, description="Largest body, except an import's, bytes")
    import_line_max_bytes: int = Field(default=256 * 1024, ge=1024, description="Longest line of an import, bytes")
    queue_max_edits: int = Field(
        default=100_000, ge=1, description="Edits that may wait to be learned; more are refused with 429"
    )
    gateway_max_answers: int = Field(
        default=256,
        ge=1,
        description="Answers that the gateway has nodes compute at once, a request's prompts times its `n`; "
        "more are refused with 429",
    )
    client_timeout_s: float = Field(
        default=30.0,
        gt=0,
        le=86400,
        description="A client that sends no whole headers, less than 16 KiB of a body, or takes nothing of its answer "
        "for so long is given up, seconds",
    )
    shutdown_grace_s: int = Field(
        default=20, ge=1, le=25, description="Time that answers under way have when the service is stopped, seconds"
    )
    wait_max_s: float = Field(default=60.0, ge=0, description="Longest long-poll, seconds")
    idempotency_ttl_s: int = Field(default=7 * 86400, ge=60, description="How long an Idempotency-Key is remembered")
    events_max: int = Field(default=10_000, ge=100, description="Events that the stream keeps")

    @field_validator("nodes", "canary_keys", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("nodes")
    @classmethod
    def _nodes_are_urls(cls, nodes: tuple[str, ...]) -> tuple[str, ...]:
        nodes = tuple(node.rstrip("/") for node in nodes)
        for node in nodes:
            _demand_scheme(node, "http://", "https://")
            if "@" in urlsplit(node).netloc:
                raise ValueError("must carry no user and no password; ERRATA_NODE_TOKEN is what nodes demand")
        return nodes

    @field_validator("api_key")
    @classmethod
    def _key_is_long_and_fits_a_header(cls, key: SecretStr) -> SecretStr:
        text = key.get_secret_value()
        if text and (len(text) < _MIN_KEY_CHARS or not (text.isascii() and text.isprintable()) or " " in text):
            raise ValueError(f"must be at least {_MIN_KEY_CHARS} printable ASCII characters without a space")
        return key

    @field_validator("node_token")
    @classmethod
    def _token_fits_a_header(cls, token: SecretStr) -> SecretStr:
        # What does not is repeated in the HTTP library's error.
        if not re.fullmatch(r"[!-~]*", token.get_secret_value()):
            raise ValueError("must be printable ASCII without white space (a line end at its end?)")
        return token

    @field_validator("redis_url")
    @classmethod
    def _redis_is_a_url(cls, url: str) -> str:
        if url:
            _demand_scheme(url, "redis://", "rediss://")
            try:
                _ = urlsplit(url).port
            except ValueError:
                # Its message repeats a part of the URL.
                raise ValueError("has no number as its port; a password in a URL must be percent-encoded") from None
        return url

    @model_validator(mode="after")
    def _edit_fits_node(self) -> Self:
        # The chat template's own tokens and the answer must fit beside the edit.
        if self.edit_max_tokens * 2 > self.max_model_len:
            raise ValueError("edit_max_tokens must be at most half of max_model_len")
        return self

    @model_validator(mode="after")
    def _slots_suffice(self) -> Self:
        if self.node_slots <= _MOST_PINS:
            raise ValueError(
                f"node_slots must be more than {_MOST_PINS}: the active version, the one before and the candidate are"
                " pinned, and any other needs a slot too"
            )
        if self.node_slots > self.node_host_slots:
            raise ValueError("node_slots must be at most node_host_slots")
        return self

    @model_validator(mode="after")
    def _reviewers_have_names(self) -> Self:
        if self.review and self.auth != "required":
            raise ValueError("review needs auth to be required: without keys nobody is another")
        return self

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Reads the environment; an empty variable is the default, and ``…_FILE`` names the file of a secret.

        Raises:
            ValueError: a variable has the prefix and is no setting, or a value is wrong; the message names it.
        """
        fields = {_PREFIX + name.upper(): name for name in cls.model_fields}
        given = _with_secrets_read({name: value for name, value in environ.items() if name.startswith(_PREFIX)})
        if unknown := sorted(given.keys() - fields.keys()):
            raise ValueError(f"unknown setting: {', '.join(unknown)}")
        return cls.model_validate({fields[name]: value for name, value in given.items() if value})

    def environment(self) -> dict[str, str]:
        """The variables that give these settings, for the processes of a stack; defaults and secrets are left out."""
        values = self.model_dump(mode="json", exclude_defaults=True, exclude=set(_SECRETS))
        return {
            _PREFIX + name.upper(): ",".join(value) if isinstance(value, list) else str(value)
            for name, value in values.items()
        }

    @property
    def canary(self) -> bool:
        """Whether a verified version gets only a part of the traffic at first."""
        return bool(self.canary_share or self.canary_keys)

    @property
    def store_url(self) -> str:
        """The version store's URL or absolute directory: the next command may run in another folder."""
        if "://" in self.store:
            return self.store
        return str(Path(self.store or self.home / "versions").absolute())


def _with_secrets_read(given: Mapping[str, str]) -> dict[str, str]:
    """The variables, with each secret that is in a file in the place of the file's name.

    Raises:
        ValueError: a file cannot be read or is empty, or the secret is given twice.
    """
    read = dict(given)
    for name in (_PREFIX + secret.upper() for secret in _SECRETS):
        if not (file := read.pop(name + _FILE, "")):
            continue
        if read.get(name):
            raise ValueError(f"{name} and {name}{_FILE} are both set")
        try:
            read[name] = Path(file).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{name}{_FILE}: {file} cannot be read: {type(error).__name__}") from error
        if not read[name]:
            raise ValueError(f"{name}{_FILE}: {file} is empty")
    return read


def _demand_scheme(url: str, *schemes: str) -> None:
    # A URL may carry a password: it is not repeated.
    if not url.startswith(schemes):
        raise ValueError(f"must begin with {' or '.join(schemes)}")
