"""What is well and what is not: each check is a pure function of what was found."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import takewhile
from pathlib import Path
from types import MappingProxyType

from service.ejection import Ejection
from service.runs import WORKER_SILENCE_S
from service.schemas import EditStatus, Health, Run, RunStatus, VersionRecord

_GIB = 1024**3
_FULL_BYTES = 1 * _GIB
_TIGHT_BYTES = 5 * _GIB
RECENT_RUNS = 20
_CONTROL_SILENCE_S = 30.0
# The alerts' bounds (docker/prometheus/rules.yml): a verification may hold the control worker so long.
_VERIFYING_SILENCE_S = 900.0
_MOST_FAILURES = 3
REDIS_DEMANDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "appendonly": ("yes", "edits are lost when Redis restarts"),
        "appendfsync": ("always", "an edit that was acknowledged can be lost with the power"),
        "maxmemory-policy": ("noeviction", "edits can be evicted when memory is short"),
    }
)
"""By name of a Redis setting: the value that it must have, and the harm of any other."""


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what was found, and what to do unless it is well."""

    part: str
    level: Level
    found: str
    advice: str = ""


@dataclass(frozen=True)
class NodeState:
    """What a node said.

    Attributes:
        tensors: SHA-256 by parameter of the active version as it is on the node's device, or None.
        trouble: why one of the others is missing.
    """

    address: str
    ready: bool
    resident: Sequence[int] = ()
    tensors: Mapping[str, str] | None = None
    trouble: str = ""


@dataclass(frozen=True)
class ModelState:
    """What is where the settings say the model is.

    Attributes:
        model: the setting; empty for the default model.
        missing: files that its folder lacks; None if it is no folder.
    """

    model: str
    missing: Sequence[str] | None


def check_api(url: str | None, health: Health | str) -> Finding:
    """The service answers and is ready; ``health`` is its answer, or why there is none."""
    if url is None:
        return Finding("service", Level.FAIL, "no stack runs under this home", "start one: errata up")
    if isinstance(health, str):
        return Finding("service", Level.FAIL, health, "see `errata ps` and `errata logs service`")
    missing = [f"{name}: {check.detail}" for name, check in health.checks.items() if not check.ok]
    if missing:
        return Finding("service", Level.FAIL, f"not ready: {'; '.join(missing)}", "the lines below say more")
    return Finding("service", Level.OK, f"ready at {url}, version {health.active} is active")


def check_redis(config: Mapping[str, str]) -> list[Finding]:
    """An acknowledged edit is on disk, and none is evicted; ``config`` is the answer of ``CONFIG GET``."""
    if not config:
        return [Finding("redis", Level.WARN, "does not tell its configuration", "make sure of: appendfsync always")]
    wrong = [
        Finding(
            "redis",
            Level.FAIL,
            f"{name} is {config.get(name, 'unknown')}: {harm}",
            f"redis-cli config set {name} {value} && redis-cli config rewrite",
        )
        for name, (value, harm) in REDIS_DEMANDS.items()
        if config.get(name) != value
    ]
    return wrong or [Finding("redis", Level.OK, "answers; append-only file, fsync always, nothing is evicted")]


def check_train_worker(heard_of: Sequence[str]) -> Finding:
    """A train worker gave a sign of life lately."""
    if heard_of:
        return Finding("train worker", Level.OK, ", ".join(heard_of))
    return Finding(
        "train worker",
        Level.FAIL,
        f"none was heard of in the last {WORKER_SILENCE_S:.0f} s; edits stay queued",
        "see `errata ps` and `errata logs train`",
    )


def check_control_worker(silent_s: float | None, run: Run | None) -> Finding:
    """A control worker looks at everything, every few seconds.

    Args:
        silent_s: how long ago one last did; None for never.
        run: the run under way; while its version is verified, the worker is busy.
    """
    part = "control worker"
    if silent_s is not None and silent_s <= _CONTROL_SILENCE_S:
        return Finding(part, Level.OK, f"looked at everything {max(0.0, silent_s):.0f} s ago")
    verifying = run is not None and run.status is RunStatus.VERIFYING
    if verifying and silent_s is not None and silent_s <= _VERIFYING_SILENCE_S:
        return Finding(part, Level.WARN, f"busy with a verification for {silent_s:.0f} s", "look again in a minute")
    looked = "has never looked at everything" if silent_s is None else f"last looked at everything {silent_s:.0f} s ago"
    return Finding(
        part,
        Level.FAIL,
        f"{looked}; versions are not verified or activated, nodes not healed",
        "see `errata ps` and `errata logs control`",
    )


def check_run(run: Run | None, *, leased: bool, now: float, longest_s: float) -> Finding:
    """The run under way moves."""
    if run is None:
        return Finding("run", Level.OK, "none is under way")
    took_s = now - (run.started_at or run.created_at)
    where = f"{run.id} is {run.status} ({run.phase or 'no phase yet'}) for {took_s:.0f} s"
    if run.status is RunStatus.TRAINING and not leased:
        return Finding("run", Level.WARN, f"{where} and its worker is silent", "the control worker takes it over")
    if took_s > longest_s:
        return Finding("run", Level.FAIL, f"{where}, longer than ERRATA_RUN_MAX_S", "see `errata logs`")
    return Finding("run", Level.OK, where)


def check_ended_runs(recent: Sequence[Run]) -> Finding:
    """Runs do not fail; ``recent`` are the newest ones, newest first."""
    since_success = takewhile(lambda run: run.status is not RunStatus.SUCCEEDED, recent)
    failed = [run for run in since_success if run.status is RunStatus.FAILED]
    if not failed:
        return Finding("runs", Level.OK, "none has failed since the last that succeeded")
    error = failed[0].error
    because = f"{error.message} ({error.code})" if error else "no reason is kept"
    return Finding(
        "runs",
        Level.FAIL if len(failed) >= _MOST_FAILURES else Level.WARN,
        f"{len(failed)} failed since the last that succeeded, lastly {failed[0].id}: {because}",
        "see `errata runs`, and `errata logs train` or `control`",
    )


def check_node(node: NodeState, active: VersionRecord | None, ejection: Ejection | None = None) -> Finding:
    """A node is ready, is not left out, holds the active version, and what is on its device is what was trained."""
    part = f"node {node.address}"
    if not node.ready:
        return Finding(part, Level.FAIL, "is not ready", "see `errata logs node`, or the node's own log")
    if ejection:
        return Finding(
            part,
            Level.FAIL,
            f"is left out and serves nothing, after {ejection.attempts} attempts: {ejection.reason}",
            "it is tried again, and taken back once it is fit; see `errata logs control`, and the node's own log",
        )
    if active is None:
        return Finding(part, Level.OK, "ready")
    return _check_active(part, node, active)


def _check_active(part: str, node: NodeState, active: VersionRecord) -> Finding:
    if node.trouble:
        return Finding(part, Level.FAIL, node.trouble, "is ERRATA_NODE_TOKEN the node's own? see its log")
    if active.version not in node.resident:
        return Finding(
            part,
            Level.WARN,
            f"does not hold version {active.version}, the active one",
            "the next reconcile loads it; if not, see `errata logs control`",
        )
    if node.tensors != active.tensors:
        return Finding(
            part,
            Level.FAIL,
            f"version {active.version} on its device is not the one that was trained (checksums differ)",
            "restart the node; it loads the version again and verifies it",
        )
    return Finding(part, Level.OK, f"holds version {active.version}; read back, its checksums are right")


def check_model(state: ModelState) -> Finding:
    """The model's folder is whole."""
    if not state.model:
        return Finding("model", Level.OK, "the default model; errata up makes it if it is missing")
    if state.missing is None:
        return Finding("model", Level.WARN, f"{state.model} is no folder here; taken as a hub id")
    if state.missing:
        return Finding(
            "model",
            Level.FAIL,
            f"{state.model} lacks {', '.join(state.missing)}",
            "set ERRATA_MODEL to a whole Hugging Face folder",
        )
    return Finding("model", Level.OK, state.model)


def check_disk(folders: Mapping[str, Path | None], free_bytes: Callable[[Path], int]) -> list[Finding]:
    """There is room; a version store that is not a folder (None) is left out."""
    findings = []
    for name, folder in folders.items():
        if folder is None:
            continue
        free = free_bytes(folder)
        level = Level.FAIL if free < _FULL_BYTES else Level.WARN if free < _TIGHT_BYTES else Level.OK
        advice = "" if level is Level.OK else "make room: Redis and the version store stop when the disk is full"
        findings.append(Finding(f"disk of {name}", level, f"{free / _GIB:.1f} GiB free for {folder}", advice))
    return findings


def check_edits(counts: Mapping[EditStatus, int], run: Run | None) -> Finding:
    """No edit waits for a run that is over; ``run`` is the one under way."""
    waiting = counts[EditStatus.TRAINING] + counts[EditStatus.TRAINED]
    if waiting and run is None:
        found = f"{waiting} are in training or trained, and no run is under way"
        return Finding("edits", Level.WARN, found, "errata doctor --repair puts them back into the queue")
    return Finding("edits", Level.OK, f"{sum(counts.values())} stored, {counts[EditStatus.LIVE]} live")
