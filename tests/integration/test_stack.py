"""What keeps a stack from being started, and what its end says; no stack is started here."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from redis import Redis
from redis_server import RedisServer

from service import stack as module
from service.settings import Settings
from service.stack import Stack, StackError

PASSWORD = "s3cret"


@pytest.fixture
def orphan(tmp_path: Path) -> Iterator[RedisServer]:
    """A home's Redis whose supervisor was killed."""
    server = RedisServer(tmp_path)
    server.start()
    with Redis.from_url(server.url) as redis:
        redis.config_set("requirepass", PASSWORD)
    url = f"redis://:{PASSWORD}@127.0.0.1:{server.port}/0"
    secrets = {"SUPERVISOR_PASSWORD": PASSWORD, "ERRATA_NODE_TOKEN": "t", "ERRATA_REDIS_URL": url}
    (tmp_path / "secrets.json").write_text(json.dumps(secrets))
    yield server
    server.kill()


def test_two_servers_never_write_to_one_file(orphan: RedisServer, tmp_path: Path) -> None:
    with pytest.raises(StackError, match="without its supervisor"):
        Stack(Settings(home=tmp_path, model=str(tmp_path), port=0)).up(detach=True, say=lambda _: None)


def test_a_redis_that_has_ended_is_in_nobodys_way(orphan: RedisServer, tmp_path: Path) -> None:
    orphan.kill()
    with pytest.raises(StackError, match="has no config"):
        Stack(Settings(home=tmp_path, model=str(tmp_path), port=0)).up(detach=True, say=lambda _: None)


@pytest.mark.parametrize(("ready", "status"), [(False, 130), (True, 0)])
def test_an_interruption_is_a_success_only_of_a_stack_that_was_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ready: bool, status: int
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    ended: list[str] = []
    process = SimpleNamespace(
        wait=lambda: None if ended else interrupt(), terminate=lambda: ended.append("terminated"), poll=lambda: None
    )
    record = SimpleNamespace(url="", supervisor_port=1, secrets={"SUPERVISOR_PASSWORD": ""})
    monkeypatch.setattr(Stack, "_start", lambda *_: (record, process))
    monkeypatch.setattr(module, "wait_until_ready", lambda *_: None if ready else interrupt())
    assert Stack(Settings(home=tmp_path)).up(detach=False, say=lambda _: None) == status
    assert ended == ["terminated"]
