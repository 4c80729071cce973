"""The control worker: Celery shells around the reconciler. No torch here; ``celery -A service.control worker``."""

import logging

from celery import Task

from service.logs import configure_logging
from service.nodes import NodeClient
from service.queue import PUBLISH, RECONCILE, TaskQueue, create_celery
from service.reconcile import Reconciler
from service.settings import Settings
from service.stores import Stores
from service.tracing import configure_tracing, continued

configure_logging(logging.INFO)
configure_tracing("control")
_settings = Settings.from_env()
_stores = Stores.connect(_settings)
app = create_celery(_settings)
_reconciler = Reconciler(_stores, NodeClient.all(_settings), TaskQueue(app, _stores.redis), _settings)


@app.task(name=PUBLISH, bind=True)  # type: ignore[untyped-decorator]
def publish(self: Task, run_id: str) -> None:
    """Verifies and activates the version of a run."""
    with continued(self.request):
        _reconciler.publish(run_id)


@app.task(name=RECONCILE)  # type: ignore[untyped-decorator]
def reconcile() -> None:
    """One tick."""
    _reconciler.tick()
