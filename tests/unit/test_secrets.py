"""Secrets are in no command line, no representation and no error; and no model brings code of its own."""

import ast
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from tiny_models import tiny_model, tiny_tokenizer

from service import programs
from service.cli.errors import settings_error
from service.settings import Settings
from service.supervisor import Supervisor
from worker.inference.launcher import build_command
from worker.model import load_base

ROOT = Path(__file__).parents[2]
TOKEN, PASSWORD = "t0ken-of-the-nodes", "passw0rd-of-redis"
URL = f"redis://:{PASSWORD}@127.0.0.1:6379/0"


def settings(home: Path) -> Settings:
    return Settings(home=home, redis_url=URL, node_token=TOKEN)


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A stack's supervisor as it would be started, with all its programs."""
    seen = SimpleNamespace(programs=[])

    def popen(command: list[str], *, env: dict[str, str], **_: Any) -> None:
        seen.command, seen.environment = command, env

    monkeypatch.setattr(subprocess, "Popen", popen)
    chosen = settings(tmp_path)
    seen.programs = [
        *programs.workers(chosen),
        programs.service(),
        programs.node(8001, tmp_path / "cache"),
        programs.redis(tmp_path / "redis", 6379, PASSWORD),
    ]
    Supervisor(tmp_path, 9001, PASSWORD).start(seen.programs, {"ERRATA_REDIS_URL": URL, "ERRATA_NODE_TOKEN": TOKEN})
    return seen


def test_no_secret_is_in_a_process_list(started: SimpleNamespace) -> None:
    commands = [started.command, *(program.command for program in started.programs)]
    assert len(commands) == 6
    for command in commands:
        assert TOKEN not in " ".join(command)
        assert PASSWORD not in " ".join(command)
    assert started.environment["ERRATA_NODE_TOKEN"] == TOKEN


def test_files_that_hold_a_secret_are_their_owners(started: SimpleNamespace, tmp_path: Path) -> None:
    holding = [path for path in tmp_path.rglob("*") if path.is_file() and PASSWORD in path.read_text()]
    assert sorted(path.name for path in holding) == ["redis.conf", "supervisord.conf"]
    assert {path.stat().st_mode & 0o777 for path in holding} == {0o600}


def test_settings_show_no_secret(tmp_path: Path) -> None:
    chosen = settings(tmp_path)
    for shown in (repr(chosen), str(chosen), str(chosen.environment())):
        assert TOKEN not in shown
        assert PASSWORD not in shown


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("REDIS_URL", PASSWORD, "must begin with redis://"),
        ("REDIS_URL", f"redis://:{PASSWORD}/x@host:6379", "percent-encoded"),
        ("REDIS_URL", f"redis://:{PASSWORD}@host:port", "percent-encoded"),
        ("NODES", f"http://user:{PASSWORD}@node:8001", "ERRATA_NODE_TOKEN is what nodes demand"),
        ("NODE_TOKEN", f"{PASSWORD}\n", "without white space"),
        ("NODE_TOKEN", f"{PASSWORD} é", "printable ASCII"),
        ("PORT", PASSWORD, "valid integer"),
        ("EDIT_MAX_TOKENS", "1500", "at most half"),
    ],
)
def test_an_error_names_the_setting_and_not_its_value(name: str, value: str, message: str) -> None:
    environment = {"ERRATA_REDIS_URL": URL, "ERRATA_NODE_TOKEN": TOKEN, f"ERRATA_{name}": value}
    with pytest.raises(ValidationError) as raised:
        Settings.from_env(environment)
    for shown in (str(raised.value), repr(raised.value), str(settings_error(raised.value))):
        assert message in shown
        assert PASSWORD not in shown
        assert TOKEN not in shown


SOURCES = [path for folder in ("service", "worker", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
LOADERS = {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer"}


def calls(path: Path) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield node


def test_code_of_a_model_is_never_trusted() -> None:
    refusing = 0
    for path in SOURCES:
        for call in calls(path):
            given = {word.arg: word.value for word in call.keywords}
            if "trust_remote_code" in given:
                value = given["trust_remote_code"]
                assert isinstance(value, ast.Constant), path
                assert value.value is False, path
                refusing += 1
            function = call.func
            named = isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name)
            if named and function.value.id in LOADERS and path.parent.name != "benchmarks":
                assert "trust_remote_code" in given, f"{path}:{call.lineno}"
    assert refusing >= 6
    files = [*ROOT.glob("docker/*"), ROOT / "docker-compose.yml", *SOURCES]
    assert [path for path in files if path.is_file() and "trust-remote-code" in path.read_text()] == []


@pytest.mark.parametrize("device_map", [None, "lower-on-disk"])
def test_a_model_with_code_of_its_own_is_refused_and_nothing_of_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device_map: str | None
) -> None:
    folder, marker = tmp_path / "model", tmp_path / "it-ran"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "unheard-of", "auto_map": dict.fromkeys(LOADERS - {"AutoTokenizer"}, "evil.Evil")}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: ...\n")
    # Whoever sits at the terminal is not asked either.
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match=r"trust_remote_code|unheard-of"):
        load_base(str(folder), "model.layers.2.mlp.down_proj", device="cpu", device_map=device_map)
    assert not marker.exists()


def test_the_node_is_not_told_to_trust_a_model(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    flags = ["--model", str(tmp_path), "--store", "s3://bucket", "--cache", str(tmp_path / "cache")]
    command = build_command(flags, {"ERRATA_NODE_TOKEN": TOKEN}, on_cpu=True)
    shown = " ".join(command.arguments)
    assert "trust" not in shown
    assert TOKEN not in shown
