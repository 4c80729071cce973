"""What keeps a stack from being started, and what its end says; no stack is started here."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from redis import Redis
from redis_server import RedisServer

from service import programs
from service import stack as module
from service.cli.options import connect
from service.home import Home, StackRecord
from service.ports import PortTakenError, free_port, take_port, url_of
from service.readiness import NotReadyError, wait_until_ready
from service.settings import Settings
from service.stack import Stack, StackError
from service.supervisor import Program, Supervisor, end

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


def test_a_redis_that_nobody_knows_the_rest_of_is_not_said_to_be_down(orphan: RedisServer, tmp_path: Path) -> None:
    stack = started(tmp_path)
    with pytest.raises(StackError, match="without its supervisor"):
        stack.down(say=lambda _: None)
    assert (tmp_path / "stack.json").is_file()


def started(home: Path) -> Stack:
    """A stack that was started before; by its port no supervisor answers."""
    (home / "stack.json").write_text(json.dumps({"url": "u", "supervisor_port": 1, "environment": {}}))
    secrets = home / "secrets.json"
    secrets.write_text(secrets.read_text() if secrets.is_file() else json.dumps({"SUPERVISOR_PASSWORD": PASSWORD}))
    return Stack(Settings(home=home, port=0))


@pytest.fixture
def left(tmp_path: Path) -> Iterator[list[psutil.Process]]:
    """Two processes whose supervisor was killed; one has written its title over its environment."""
    wait = "import time; time.sleep(300)"
    titled = f"import setproctitle; setproctitle.setproctitle('worker'); {wait}"
    supervisor = Supervisor(tmp_path, free_port(), PASSWORD)
    programs = [Program(name, [sys.executable, "-c", code], 1) for name, code in (("a", wait), ("b", titled))]
    process = supervisor.start(programs, {**os.environ, "ERRATA_HOME": str(tmp_path)})
    try:
        deadline = time.monotonic() + 20
        while [row.state for row in supervisor.processes()] != ["RUNNING", "RUNNING"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        found = [psutil.Process(row.pid) for row in supervisor.processes()]
    finally:
        process.kill()
        process.wait()
    yield found
    for one in found:
        with suppress(psutil.NoSuchProcess):
            one.kill()


def test_what_a_killed_supervisor_left_is_stopped(left: list[psutil.Process], tmp_path: Path) -> None:
    said: list[str] = []
    started(tmp_path).down(say=said.append)
    assert said == ["stopping 2 processes that run without their supervisor", "stopped"]
    assert not [process for process in left if process.is_running()]
    assert not (tmp_path / "stack.json").exists()
    started(tmp_path).down(say=said.append)
    assert said[2:] == ["nothing runs"]
    assert not (tmp_path / "stack.json").exists()


def test_nothing_is_started_beside_what_a_killed_supervisor_left(left: list[psutil.Process], tmp_path: Path) -> None:
    with pytest.raises(StackError, match="`errata down` stops them"):
        Stack(Settings(home=tmp_path, model=str(tmp_path), port=0)).up(detach=True, say=lambda _: None)


def test_another_session_of_the_same_number_is_left_alone(tmp_path: Path) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
    try:
        (tmp_path / "supervisord.pid").write_text(f"{bystander.pid}\n")
        said: list[str] = []
        started(tmp_path).down(say=said.append)
        assert said == ["nothing runs"]
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_whoever_asks_is_not_among_what_was_left(tmp_path: Path) -> None:
    """A service manager may have given the command's own session the number, and the home."""
    ask = (
        "import os, pathlib; from service.supervisor import left_behind; home = pathlib.Path(os.environ['ERRATA_HOME'])"
        "; (home / 'supervisord.pid').write_text(str(os.getpid())); print(left_behind(home))"
    )
    done = subprocess.run(
        [sys.executable, "-c", ask],
        env={**os.environ, "ERRATA_HOME": str(tmp_path)},
        start_new_session=True,
        capture_output=True,
        check=True,
    )
    assert done.stdout == b"[]\n"


def test_redis_ends_behind_those_that_write_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []

    def process(name: str) -> Any:
        return SimpleNamespace(info={"name": name}, terminate=lambda: ended.append(name), kill=lambda: None)

    monkeypatch.setattr(psutil, "wait_procs", lambda processes, _: (ended.append("waited"), []))
    end([process("redis-server"), process("python")])
    assert [what for what in ended if what != "waited"] == ["python", "redis-server"]
    assert ended[1] == "waited"


def test_a_stack_that_is_being_started_is_not_said_to_be_down(tmp_path: Path) -> None:
    """Its supervisor does not listen yet."""
    stack = started(tmp_path)
    said: list[str] = []
    with Home(tmp_path).starting(), pytest.raises(StackError, match="is being started"):
        stack.down(say=said.append)
    assert (tmp_path / "stack.json").is_file()
    stack.down(say=said.append)
    assert said == ["nothing runs"]
    assert not (tmp_path / "stack.json").exists()


@pytest.mark.parametrize(
    ("host", "reached"),
    [
        ("127.0.0.1", "http://127.0.0.1:{}"),
        ("0.0.0.0", "http://127.0.0.1:{}"),
        ("::1", "http://[::1]:{}"),
        ("::", "http://[::1]:{}"),
    ],
)
async def test_what_listens_on_a_host_is_reached_there(host: str, reached: str) -> None:
    port = take_port(host, 0)
    url = urlsplit(url_of(host, port))
    assert url.geturl() == reached.format(port)
    async with await asyncio.start_server(lambda _, writer: writer.close(), host, port):
        _, writer = await asyncio.open_connection(url.hostname, url.port)
        writer.close()
        await writer.wait_closed()
        with pytest.raises(PortTakenError, match=f"port {port} of {host}"):
            take_port(host, port)


def test_a_chosen_port_is_none_that_an_outgoing_connection_may_have() -> None:
    assigned = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first = int(assigned.read_text().split()[0]) if assigned.is_file() else 32_768
    ports = [free_port() for _ in range(200)]
    assert max(ports) < first
    assert len(set(ports)) == len(ports)


def test_a_service_whose_port_was_taken_meanwhile_is_said_to_lack_it(settings: Settings, tmp_path: Path) -> None:
    """uvicorn says so, and then ends in order."""
    supervisor = Supervisor(tmp_path, free_port(), PASSWORD)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        own = settings.model_copy(update={"port": port, "nodes": ("http://127.0.0.1:1",)}).environment()
        secrets = {"ERRATA_REDIS_URL": settings.redis_url, "ERRATA_NODE_TOKEN": "t"}
        process = supervisor.start([programs.service()], {**os.environ, **own, **secrets})
        try:
            with pytest.raises(NotReadyError, match=r"service does not start: .*address already in use"):
                wait_until_ready(f"http://127.0.0.1:{port}", supervisor, process, lambda _: None)
        finally:
            process.terminate()
            process.wait()


def test_a_redis_that_has_ended_is_in_nobodys_way(orphan: RedisServer, tmp_path: Path) -> None:
    orphan.kill()
    with pytest.raises(StackError, match=r"ERRATA_MODEL: .* lacks config.json, tokenizer.json, \*.safetensors"):
        Stack(Settings(home=tmp_path, model=str(tmp_path), port=0)).up(detach=True, say=lambda _: None)


def test_the_operators_key_is_with_the_secrets(tmp_path: Path) -> None:
    """Who owns the home needs no key in the shell: the command takes the running stack's."""
    key = "operators-key-of-thirty-two-characters"
    secrets = Home(tmp_path).secrets_for(Settings.model_validate({"home": tmp_path, "api_key": key}), 1)
    record = StackRecord(url="u", supervisor_port=1, environment={}, secrets=secrets)
    assert Settings.from_env(record.variables).api_key.get_secret_value() == key


def test_secrets_are_in_one_file_that_only_its_owner_reads(tmp_path: Path) -> None:
    home = Home(tmp_path)
    secrets = home.secrets_for(Settings(home=tmp_path), 1)
    home.write(StackRecord(url="u", supervisor_port=1, environment={}, secrets=secrets))
    assert (tmp_path / "secrets.json").stat().st_mode & 0o077 == 0
    assert json.loads((tmp_path / "secrets.json").read_text()) == secrets
    public = (tmp_path / "stack.json").read_text()
    assert not [secret for secret in secrets.values() if secret and secret in public]


def test_a_process_has_no_secret_that_it_does_not_need(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path, free_port(), PASSWORD)
    script = "import os, sys; print(dict(os.environ), flush=True); sys.stdin.read(); import time; time.sleep(60)"
    show = Program("show", [sys.executable, "-c", script], priority=1, withheld=["ERRATA_API_KEY"])
    environment = {**os.environ, "ERRATA_API_KEY": "the-key", "ERRATA_NODE_TOKEN": "the-token"}
    everything = Program("all", show.command, priority=0)
    process = supervisor.start([everything, show], environment)
    logs = {name: supervisor.log_file(name) for name in ("all", "show")}
    try:
        deadline = time.monotonic() + 20
        while not all(log.is_file() and "the-token" in log.read_text() for log in logs.values()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.terminate()
        process.wait()
    assert "'ERRATA_API_KEY': ''" in logs["show"].read_text()
    assert "'ERRATA_API_KEY': 'the-key'" in logs["all"].read_text()
    assert "the-key" not in (tmp_path / "supervisord.conf").read_text()


def test_each_program_has_only_the_secrets_that_it_uses(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    started = [*programs.workers(settings), programs.service(), programs.node(1, tmp_path)]
    withheld = {
        program.name: set(program.withheld) for program in [*started, programs.redis(tmp_path / "redis", 1, "p")]
    }
    secrets = {"ERRATA_API_KEY", "ERRATA_REDIS_URL", "ERRATA_NODE_TOKEN"}
    assert {name: secrets - kept for name, kept in withheld.items()} == {
        "service": secrets,
        "control": {"ERRATA_REDIS_URL", "ERRATA_NODE_TOKEN"},
        "train": {"ERRATA_REDIS_URL"},
        "node": {"ERRATA_NODE_TOKEN"},
        "redis": set(),
    }


@pytest.mark.parametrize(("given", "sent"), [("", "kept-by-the-stack"), ("given-in-the-shell", "given-in-the-shell")])
def test_the_commands_key_is_the_shells_or_the_stacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, sent: str
) -> None:
    monkeypatch.setattr(Stack, "url", lambda _: "http://127.0.0.1:1")
    monkeypatch.setattr(Stack, "settings", lambda _: Settings.model_validate({"api_key": "kept-by-the-stack" * 2}))
    monkeypatch.setenv("ERRATA_API_KEY", given * 2)
    with connect(tmp_path, None) as client:
        assert client._http.headers["authorization"] == f"Bearer {sent * 2}"


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
    record = StackRecord(url="", supervisor_port=1, environment={}, secrets={"SUPERVISOR_PASSWORD": ""})
    monkeypatch.setattr(Stack, "_start", lambda *_: (record, process))
    monkeypatch.setattr(module, "wait_until_ready", lambda *_: None if ready else interrupt())
    assert Stack(Settings(home=tmp_path)).up(detach=False, say=lambda _: None) == status
    assert ended == ["terminated"]
