"""The train worker: Celery shells around Trainer; ``celery -A worker.tasks worker -Q train --pool solo``."""

import logging
import socket
import threading
from contextlib import suppress
from typing import Any

from celery import Task
from celery.signals import worker_init, worker_shutting_down
from redis.exceptions import RedisError

from service.logs import configure_logging
from service.queue import REPAIR, TRAIN, TaskQueue, create_celery
from service.settings import Settings
from service.stores import Stores
from service.tracing import configure_tracing, continued
from worker.checkpoint import CheckpointError
from worker.delta import DeltaError, VersionStore
from worker.model import load_base
from worker.run import Trainer
from worker.run_training import RunTraining
from worker.training.attention import UnsupportedAttentionError
from worker.training.partial_forward import UnsupportedLayerError
from worker.training.prefix import PrefixCache
from worker.workbench import Workbench

log = logging.getLogger(__name__)

_HEARTBEAT_S = 3.0
# A run of hours is not given up because Redis restarts. What a run says to Redis may be said twice.
_RETRIES = 305  # of which the first five take a second together, and each of the others one
# What a worker cannot start with; its message says all.
_UNUSABLE = (CheckpointError, DeltaError, OSError, UnsupportedAttentionError, UnsupportedLayerError, ValueError)

configure_logging(logging.INFO)
configure_tracing("train")
_settings = Settings.from_env()
_stopping = threading.Event()
app = create_celery(_settings)
_trainers: list[Trainer] = []


@worker_init.connect  # type: ignore[untyped-decorator]
def load(**_: Any) -> None:
    """Loads the model once for the life of the process, writes version 0, and says that the worker is there."""
    stores = Stores.connect(_settings, retries=_RETRIES)
    try:
        trainer = _trainer(stores)
        trainer.prepare()
        trainer.workbench.prepare_evaluation()
        trainer.training.prepare()
    except _UNUSABLE as error:
        log.error("worker.not_started", extra={"reason": str(error)})
        raise SystemExit(1) from error
    except Exception as error:
        # Celery logs what a signal's receiver raises and goes on; a worker without a model would only lose messages.
        log.exception("worker.not_started")
        raise SystemExit(1) from error
    _trainers.append(trainer)
    threading.Thread(target=_beat, args=(stores,), name="heartbeat", daemon=True).start()
    base = trainer.base
    log.info("worker.ready", extra={"model": base.name, "location": base.location, "device": str(base.device)})


@worker_shutting_down.connect  # type: ignore[untyped-decorator]
def stop(**_: Any) -> None:
    """Ends a run at its next step; its edits are queued again."""
    _stopping.set()


@app.task(name=TRAIN, bind=True)  # type: ignore[untyped-decorator]
def run(self: Task, run_id: str) -> None:
    """Carries out a queued run."""
    with continued(self.request):
        _trainers[0].execute(run_id)


@app.task(name=REPAIR)  # type: ignore[untyped-decorator]
def repair() -> None:
    """Brings registry and version store into agreement, as at the start."""
    _trainers[0].prepare()


def _trainer(stores: Stores) -> Trainer:
    base = load_base(
        _settings.model,
        _settings.location,
        device=_settings.device or None,
        device_map=_settings.train_device_map or None,
    )
    folder = _settings.home / "prefix"
    workbench = Workbench(base, PrefixCache(folder, _settings.train_prefix_bytes), folder)
    versions = VersionStore(_settings.store_url)
    return Trainer(
        workbench=workbench,
        training=RunTraining(workbench, versions, stores, _settings),
        versions=versions,
        stores=stores,
        queue=TaskQueue(app, stores.redis),
        settings=_settings,
        stopping=_stopping,
    )


def _beat(stores: Stores) -> None:
    name = socket.gethostname()
    while not _stopping.wait(_HEARTBEAT_S):
        try:
            stores.runs.beat(name)
        except RedisError as error:
            log.warning("worker.not_heard", extra={"reason": repr(error)})
    with suppress(RedisError):
        stores.runs.leave(name)
