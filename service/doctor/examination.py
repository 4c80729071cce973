"""Looks at a stack, beside its running processes, and asks the checks."""

import re
import shutil
import time
from pathlib import Path
from typing import cast

from redis import Redis
from redis.exceptions import RedisError, ResponseError

from service.client import ClientError, ErrataClient
from service.doctor.checks import (
    RECENT_RUNS,
    REDIS_DEMANDS,
    Finding,
    Level,
    ModelState,
    NodeState,
    check_api,
    check_control_worker,
    check_disk,
    check_edits,
    check_ended_runs,
    check_model,
    check_node,
    check_redis,
    check_run,
    check_train_worker,
)
from service.doctor.versions import StoreState, check_versions
from service.ejection import ejections
from service.errors import ErrataError, NotFoundError
from service.manifest import MANIFEST, ManifestError, read_manifest, version_of_folder
from service.model_folder import missing_model_files
from service.nodes import NodeClient
from service.runs import WORKER_SILENCE_S
from service.schemas import Health, VersionRecord
from service.settings import Settings
from service.stores import Stores

_REDIS_ADVICE = "is it running? see `errata ps` and `errata logs redis`, or ERRATA_REDIS_URL"
# Whole, or begun; a file system of its own has lost+found too.
_VERSION_FOLDER = re.compile(r"\.?\d{6,}")


def examine(settings: Settings, *, url: str | None) -> list[Finding]:
    """Looks at everything; what cannot be looked at because something before it is broken is left out.

    Args:
        settings: what the processes run with.
        url: the API of the running stack, or None if none runs.
    """
    findings = [
        check_api(url, _health(url)),
        check_model(look_at_model(settings.model)),
        *check_disk({"home": settings.home, "version store": store_folder(settings.store_url)}, _free_bytes),
    ]
    if not settings.redis_url:
        return [*findings, Finding("redis", Level.FAIL, "no Redis is configured", "errata up starts one")]
    stores = Stores.connect(settings)
    try:
        return [*findings, *_examine_redis(stores.redis), *_examine_parts(settings, stores)]
    except RedisError as error:
        return [*findings, Finding("redis", Level.FAIL, f"does not answer: {error}", _REDIS_ADVICE)]
    finally:
        stores.redis.close()


def store_folder(url: str) -> Path | None:
    """The folder of a version store, or None for one that is elsewhere."""
    if "://" in url:
        return Path(url.removeprefix("file://")) if url.startswith("file://") else None
    return Path(url)


def _health(url: str | None) -> Health | str:
    if url is None:
        return ""
    try:
        with ErrataClient(url, timeout_s=10) as client:
            return client.health()
    except ClientError as error:
        return error.message


def _free_bytes(folder: Path) -> int:
    folder = folder.absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return shutil.disk_usage(existing).free


def _examine_redis(redis: Redis) -> list[Finding]:
    redis.ping()
    config: dict[str, str] = {}
    try:
        # One at a time: before version 7, CONFIG GET takes only one name.
        for name in REDIS_DEMANDS:
            config |= cast(dict[str, str], redis.config_get(name))
    except ResponseError:
        # Hosted Redis often forbids CONFIG.
        config = {}
    return check_redis(config)


def _examine_parts(settings: Settings, stores: Stores) -> list[Finding]:
    run, now = stores.runs.current(), time.time()
    active = _active(stores)
    out = ejections(stores.redis)
    records = stores.registry.all()
    return [
        check_train_worker(stores.runs.workers(within_s=WORKER_SILENCE_S)),
        check_control_worker(_silent_s(stores, now), run),
        check_run(run, leased=stores.runs.leased(), now=now, longest_s=settings.run_max_s),
        check_ended_runs(stores.runs.page(after=None, limit=RECENT_RUNS).data),
        *(check_node(look_at_node(node, active), active, out.get(node.address)) for node in NodeClient.all(settings)),
        *check_versions(records, active.version if active else None, look_at_store(settings.store_url)),
        check_edits(stores.edits.counts(), run),
    ]


def _active(stores: Stores) -> VersionRecord | None:
    activation = stores.registry.active()
    try:
        return stores.registry.get(activation.active) if activation else None
    except NotFoundError:
        return None


def look_at_model(model: str) -> ModelState:
    """What is where ERRATA_MODEL says the model is."""
    folder = Path(model)
    return ModelState(model, missing_model_files(folder) if folder.is_dir() else None)


def look_at_store(url: str) -> StoreState | None:
    """What is in the version store, or None for one that is elsewhere."""
    if (folder := store_folder(url)) is None:
        return None
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    folders = [path for path in found if _VERSION_FOLDER.match(path.name) and path.is_dir()]
    numbers = {path: version_of_folder(path.name) for path in folders if (path / MANIFEST).is_file()}
    damages = {number: _damage(path, number) for path, number in numbers.items() if number is not None}
    return StoreState(
        whole=[number for number, damage in damages.items() if not damage],
        leftovers=[path.name for path in folders if numbers.get(path) is None],
        damaged={number: damage for number, damage in damages.items() if damage},
    )


def _damage(folder: Path, version: int) -> str | None:
    """What is wrong with a version's files by their manifest, as far as it shows without reading them; or None."""
    try:
        manifest = read_manifest((folder / MANIFEST).read_bytes(), version)
    except ManifestError as error:
        return str(error)
    except OSError:
        return f"{MANIFEST} cannot be read"
    faults = (manifest.fault_of(name, _size_bytes(folder / name)) for name in manifest.files)
    return next(filter(None, faults), None)


def _size_bytes(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _silent_s(stores: Stores, now: float) -> float | None:
    ticked_at = stores.measures.ticked_at()
    return None if ticked_at is None else now - ticked_at


def look_at_node(node: NodeClient, active: VersionRecord | None) -> NodeState:
    """What a node says of itself, and the checksums of the active version read back from its device."""
    if not (ready := node.ready()) or active is None:
        return NodeState(node.address, ready=ready)
    try:
        resident = node.resident()
        tensors = node.checksums(active.version) if active.version in resident else None
    except ErrataError as error:
        return NodeState(node.address, ready=True, trouble=error.message)
    return NodeState(node.address, ready=True, resident=resident, tensors=tensors)
