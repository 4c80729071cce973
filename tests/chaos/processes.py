"""Faults of processes: killed, stopped, put to sleep, without room on the disk. The supervisor starts them again."""

import resource
import signal
import time
from contextlib import suppress
from random import Random

from tests.chaos.world import LEASE_S, World, until

ALL = ("service", "control", "train", "redis", "node")
_NAP_S = 4.0


def service_killed(world: World, _: Random) -> None:
    world.signal("service", signal.SIGKILL)


def control_worker_killed(world: World, _: Random) -> None:
    world.signal("control", signal.SIGKILL)


def train_worker_killed(world: World, _: Random) -> None:
    world.training()
    world.signal("train", signal.SIGKILL)


def redis_killed(world: World, _: Random) -> None:
    world.signal("redis", signal.SIGKILL)


def redis_restarted(world: World, _: Random) -> None:
    world.signal("redis", signal.SIGTERM)


def node_killed(world: World, _: Random) -> None:
    world.signal("node", signal.SIGKILL)


def everything_killed(world: World, random: Random) -> None:
    for name in random.sample(ALL, len(ALL)):
        world.signal(name, signal.SIGKILL, group=True)


def train_worker_asleep(world: World, _: Random) -> None:
    """Past its lease: its run is taken over, and what it says of it when it wakes up is not heard."""
    run = world.training()
    world.signal("train", signal.SIGSTOP)
    try:
        until(lambda: world.stores.runs.get(run.id).finished_at is not None, what="the run is taken over")
        time.sleep(LEASE_S / 4)
    finally:
        world.signal("train", signal.SIGCONT)


def node_asleep(world: World, _: Random) -> None:
    world.signal("node", signal.SIGSTOP, group=True)
    try:
        time.sleep(_NAP_S)
    finally:
        world.signal("node", signal.SIGCONT, group=True)


def train_worker_disk_full(world: World, _: Random) -> None:
    """No file that the trainer writes may grow past a page: its writes break off in the middle, as on a full disk."""
    run = world.training()
    train = world.pid("train")
    _limit_files(train, 4096)
    try:
        world.until_a_run_fails(run)
    finally:
        _limit_files(train, resource.RLIM_INFINITY)


def redis_disk_full(world: World, _: Random) -> None:
    """The append-only file may take a few bytes more: half of a record is written, and Redis dies of it."""
    redis = world.pid("redis")
    longest = max(path.stat().st_size for path in (world.settings.home / "redis").rglob("*.aof"))
    _limit_files(redis, longest + 7)
    until(lambda: world.pid("redis") != redis, what="Redis ends, because it cannot write")


def _limit_files(pid: int, most_bytes: int) -> None:
    with suppress(ProcessLookupError):
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (most_bytes, hard))
