"""What stands on a line of the log."""

import asyncio
import json
import logging
import threading
from contextvars import copy_context

from service.logs import JsonFormatter, bind, bound


def line(**extra: object) -> dict[str, object]:
    record = logging.makeLogRecord({"name": "a.b", "levelname": "INFO", "msg": "thing.happened", **extra})
    said: dict[str, object] = json.loads(JsonFormatter().format(record))
    del said["at"]
    return said


PLAIN = {"level": "info", "event": "thing.happened", "logger": "a.b"}


def test_what_is_bound_stands_on_every_line_inside_and_on_none_outside() -> None:
    with bound(run="r1", edits=2):
        with bound(edits=3):
            assert line(reason="x") == {**PLAIN, "run": "r1", "edits": 3, "reason": "x"}
        assert line() == {**PLAIN, "run": "r1", "edits": 2}
        assert line(run="r2") == {**PLAIN, "run": "r2", "edits": 2}
    assert line() == PLAIN


def test_what_is_found_out_later_stands_until_the_end() -> None:
    with bound(run="r1"):
        bind(edits=2)
        assert line() == {**PLAIN, "run": "r1", "edits": 2}
    assert line() == PLAIN


async def test_two_requests_at_once_keep_their_own() -> None:
    async def request(name: str) -> list[object]:
        with bound(request_id=name):
            before = line()["request_id"]
            await asyncio.sleep(0.01)
            return [before, line()["request_id"], (await asyncio.to_thread(line))["request_id"]]

    assert await asyncio.gather(request("a"), request("b")) == [["a"] * 3, ["b"] * 3]


def test_a_thread_has_what_its_copy_of_the_context_had() -> None:
    said: list[dict[str, object]] = []
    with bound(run="r1"):
        thread = threading.Thread(target=copy_context().run, args=(lambda: said.append(line()),))
    thread.start()
    thread.join()
    assert said == [{**PLAIN, "run": "r1"}]
