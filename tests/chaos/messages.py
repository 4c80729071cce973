"""Faults of what is said: tasks delivered twice or lost, abandoned claims, cut connections, ill-mannered clients."""

import time
from concurrent.futures import ThreadPoolExecutor
from random import Random

import httpx
from redis.exceptions import RedisError

from service.client import ApiError, ClientError
from service.queue import TRAIN_QUEUE
from service.schemas import EditError, RunStatus
from tests.chaos.asking import Question, ask
from tests.chaos.traffic import SUBJECTS
from tests.chaos.world import AT_ONCE, PATIENCE_S, WithoutEffectError, World

_LOSING_S = 1.5


def tasks_delivered_again(world: World, _: Random) -> None:
    """Every task of the last runs, twice more."""
    world.training()
    for run in world.stores.runs.page(after=None, limit=6).data:
        for _again in range(2):
            world.queue.train(run.id)
            world.queue.publish(run.id)


def tasks_lost(world: World, _: Random) -> None:
    """Messages to the train worker vanish from the broker."""
    deadline = time.monotonic() + _LOSING_S
    world.ledger.submit(within_s=PATIENCE_S)
    while time.monotonic() < deadline:
        world.stores.redis.delete(TRAIN_QUEUE)
        time.sleep(0.02)


def claim_left_behind(world: World, _: Random) -> None:
    """A run is ended by somebody who dies before he gives its edits back."""
    run = world.training()
    error = EditError(code="worker_lost", message="whoever ended the run died behind it")
    if not world.stores.runs.finish(run.id, RunStatus.FAILED, error=error):
        raise WithoutEffectError("the run trained no more")


def redis_connections_cut(world: World, _: Random) -> None:
    for kind in ("pubsub", "normal"):
        try:
            world.stores.redis.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
        except RedisError as error:
            raise WithoutEffectError(f"connections could not be cut: {error!r}") from error


def clients_break_off(world: World, random: Random) -> None:
    """Streams whose readers go away after the first piece."""
    question = Question("errata", random.choice(list(SUBJECTS)), chat=False)
    body = {**question.body(stream=True), "max_tokens": 150, "ignore_eos": True}
    for _ in range(4):
        try:
            with world.http() as http, http.stream("POST", question.route, json=body) as response:
                next(response.iter_lines(), None)
        except httpx.HTTPError:
            world.notes.count("streams that broke")


def burst(world: World, random: Random) -> None:
    """Three times as many requests at once as the gateway takes: the rest is told to come back."""
    questions = [Question("errata", random.choice(list(SUBJECTS)), chat=False) for _ in range(3 * AT_ONCE)]
    with world.http() as http, ThreadPoolExecutor(len(questions)) as pool:

        def put(question: Question) -> int:
            try:
                world.judge.take(ask(http, question))
            except ApiError as error:
                world.notes.refused(error)
                return error.status
            except ClientError as error:
                world.notes.refused(error)
                return 0
            return 200

        answers = list(pool.map(put, questions))
    if 429 not in answers:
        raise WithoutEffectError(f"nobody was told to come back: {sorted(answers)}")
