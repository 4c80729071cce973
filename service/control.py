"""The control worker: Celery shells around the reconciler. No torch here; ``celery -A service.control worker``."""

import logging
import os
import threading
import time
from typing import Any

from celery import Task
from celery.signals import beat_embedded_init

from service.logs import configure_logging
from service.nodes import NodeClient
from service.queue import PUBLISH, RECONCILE, TaskQueue, create_celery
from service.reconcile import Reconciler
from service.settings import Settings
from service.stores import Stores
from service.tracing import configure_tracing, continued

_ORPHANED_WITHIN_S = 1.0

configure_logging(logging.INFO)
configure_tracing("control")
_settings = Settings.from_env()
_stores = Stores.connect(_settings)
app = create_celery(_settings)
_reconciler = Reconciler(_stores, NodeClient.all(_settings), TaskQueue(app, _stores.redis), _settings)


@beat_embedded_init.connect  # type: ignore[untyped-decorator]
def end_with_the_worker(**_: Any) -> None:
    """Beat is a child process: when the worker is killed, it ends, instead of ticking on beside its successor's."""
    threading.Thread(target=_end_behind, args=(os.getppid(),), name="orphaned", daemon=True).start()


@app.task(name=PUBLISH, bind=True)  # type: ignore[untyped-decorator]
def publish(self: Task, run_id: str) -> None:
    """Verifies and activates the version of a run."""
    with continued(self.request):
        _reconciler.publish(run_id)


@app.task(name=RECONCILE)  # type: ignore[untyped-decorator]
def reconcile() -> None:
    """One tick."""
    _reconciler.tick()


def _end_behind(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_ORPHANED_WITHIN_S)
    os._exit(1)
