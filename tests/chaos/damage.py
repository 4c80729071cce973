"""Faults of files: the version store away, damaged, littered; the node's copies damaged. Each is put right again."""

import shutil
import uuid
from collections.abc import Callable
from random import Random

from service.client import ApiError, ConnectionFailedError
from service.ejection import ejections
from tests.chaos.asking import Question, ask
from tests.chaos.traffic import SUBJECTS
from tests.chaos.world import WithoutEffectError, World, until


def store_away(world: World, _: Random) -> None:
    """A file is where the version store was, until a run has failed by it."""
    store = world.versions
    away = store.with_name("versions.away")
    run = world.training()
    store.rename(away)
    store.touch()
    try:
        world.until_a_run_fails(run)
    finally:
        store.unlink()
        away.rename(store)


def delta_flipped(world: World, random: Random) -> None:
    """One bit."""

    def flip(good: bytes) -> bytes:
        bad = bytearray(good)
        bad[random.randrange(len(bad))] ^= 1 << random.randrange(8)
        return bytes(bad)

    _damaged_delta(world, random, flip)


def delta_truncated(world: World, random: Random) -> None:
    _damaged_delta(world, random, lambda good: good[: random.randrange(len(good))])


def node_cache_damaged(world: World, random: Random) -> None:
    """Every copy that the node has on its disk loses its end; what it must load again it takes from the store."""
    for path in world.cache.rglob("adapter_model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1000])
    if world.recorded():
        version = random.choice(world.recorded()[-4:])
        world.forget(version)
        question = Question(f"errata@{version}", random.choice(list(SUBJECTS)), chat=False)
        with world.http() as http:
            world.judge.take(ask(http, question))


def half_written_folders(world: World, _: Random) -> None:
    """What writers that died leave until repair removes it: a folder by a temporary name, one without a manifest."""
    number = max(int(path.name) for path in world.versions.iterdir() if path.name.isdecimal()) + 1
    for name in (f".{number:06d}.{uuid.uuid4().hex}", f"{number:06d}"):
        folder = world.versions / name
        folder.mkdir(exist_ok=True)
        if not (folder / "manifest.json").exists():
            (folder / "delta.safetensors").write_bytes(b"half")


def _damaged_delta(world: World, random: Random, damage: Callable[[bytes], bytes]) -> None:
    """A version's tensors on disk are damaged, and the node must load them: it refuses, whoever asks."""
    if not world.recorded():
        raise WithoutEffectError("no version has been recorded yet")
    version = random.choice(world.recorded()[-6:])
    path = world.versions / f"{version:06d}" / "delta.safetensors"
    good = path.read_bytes()
    path.write_bytes(damage(good))
    try:
        for copy in world.cache.glob(f"*/{version:06d}-*"):
            shutil.rmtree(copy)
        world.forget(version)
        until(lambda: _refused(world, version), what=f"the damaged version {version} is refused")
    finally:
        path.write_bytes(good)


def _refused(world: World, version: int) -> bool:
    """Whether the version is refused for its damage, rather than because something is away."""
    question = Question(f"errata@{version}", next(iter(SUBJECTS)), chat=False)
    with world.http() as http:
        try:
            sample = ask(http, question)
        except ApiError as error:
            # A node that is left out serves nothing rather than something else.
            return error.code == "damaged_version" or bool(ejections(world.stores.redis))
        except ConnectionFailedError:
            return False
    world.judge.take(sample)
    world.forget(version)
    return False
