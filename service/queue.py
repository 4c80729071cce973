"""The Celery app, the tasks' names, how to enqueue them. No task bodies: the API reaches the trainer by name only."""

import logging

from celery import Celery
from kombu.exceptions import OperationalError
from redis import Redis

from service.settings import Settings
from service.tracing import outgoing

log = logging.getLogger(__name__)

TRAIN_QUEUE = "train"
CONTROL_QUEUE = "control"
TRAIN = "errata.train"
REPAIR = "errata.repair"
PUBLISH = "errata.publish"
RECONCILE = "errata.reconcile"

_RECONCILE_EVERY_S = 2.0


def create_celery(settings: Settings) -> Celery:
    """The app for every process, with Redis as its broker and no result backend."""
    app = Celery("errata", broker=settings.redis_url)
    app.conf.update(
        task_routes={
            TRAIN: {"queue": TRAIN_QUEUE},
            REPAIR: {"queue": TRAIN_QUEUE},
            "errata.*": {"queue": CONTROL_QUEUE},
        },
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_ignore_result=True,
        worker_prefetch_multiplier=1,
        # A message that is not acknowledged for so long is delivered again; a run must not meet itself.
        broker_transport_options={"visibility_timeout": int(settings.run_max_s) + 3600},
        broker_connection_retry_on_startup=True,
        worker_hijack_root_logger=False,
        worker_send_task_events=False,
        worker_enable_remote_control=False,
        beat_schedule={
            RECONCILE: {
                "task": RECONCILE,
                "schedule": _RECONCILE_EVERY_S,
                # A control worker that was away looks once, not once for every tick it missed.
                "options": {"expires": _RECONCILE_EVERY_S},
            }
        },
    )
    return app


class TaskQueue:
    """Enqueues tasks, with ids only; a task reads the rest from the stores."""

    def __init__(self, celery: Celery, redis: Redis) -> None:
        self._celery = celery
        self._redis = redis

    def train(self, run_id: str) -> None:
        """Asks a train worker to carry out a queued run."""
        self._send(TRAIN, [run_id], TRAIN_QUEUE)

    def repair(self) -> None:
        """Asks a train worker to bring registry and version store into agreement."""
        self._send(REPAIR, [], TRAIN_QUEUE)

    def publish(self, run_id: str) -> None:
        """Asks a control worker to verify and activate a run's version."""
        self._send(PUBLISH, [run_id], CONTROL_QUEUE)

    def train_is_empty(self) -> bool:
        """Whether no train message waits."""
        return self._redis.llen(TRAIN_QUEUE) == 0

    def _send(self, task: str, arguments: list[str], queue: str) -> None:
        try:
            self._celery.send_task(task, args=arguments, queue=queue, headers=outgoing(), retry=False)
        except OperationalError as error:
            # What it is about is stored; the reconciler sends a lost message again.
            log.warning("queue.not_sent", extra={"task": task, "of": arguments, "reason": repr(error)})
