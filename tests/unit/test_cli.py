"""The command: what it prints, where, and its exit status."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from fake_service import FakeService, error, serve
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner, Result

from service import doctor
from service.cli import app
from service.cli.logs import follow, last_lines
from service.console import Follow, ago, one_line
from service.schemas import EditState, EditStatus

Errata = Callable[..., Result]
COMMANDS = (
    *("up", "down", "ps", "logs", "model", "submit", "import", "status", "list", "retract", "approve", "release"),
    *("versions", "activate", "rollback", "runs", "ask", "doctor", "demo", "keys", "audit"),
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ERRATA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def service() -> FakeService:
    return FakeService()


def run(*words: str, **options: str) -> Result:
    return CliRunner().invoke(app, words, **options)


@pytest.fixture
def errata(service: FakeService) -> Iterator[Errata]:
    with serve(service) as url:
        yield lambda *words, **options: run(*words, "--url", url, **options)


def test_help_names_every_command() -> None:
    result = run("--help")

    assert result.exit_code == 0
    for name in COMMANDS:
        assert f" {name} " in result.output
    assert get_command(app).commands.keys() == set(COMMANDS)


def test_submit_waits_until_the_edit_is_live(errata: Errata) -> None:
    result = errata("submit", "Q", "A", "--rephrase", "R1", "--rephrase", "R2", "--wait")

    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == "edit_0  live  version 1"
    assert "raw: 'no' -> 'A'" in result.stdout
    assert "train, epoch 3, loss 0.500" in result.stderr


def test_submit_sends_the_rephrases(errata: Errata, service: FakeService) -> None:
    assert errata("submit", "Q", "A", "--rephrase", "R1", "--rephrase", "R2").stdout == "edit_0  queued\n"
    assert service.edits["edit_0"]["rephrases"] == ["R1", "R2"]


def test_submit_sends_the_paraphrases(errata: Errata, service: FakeService) -> None:
    assert errata("submit", "Q", "A", "--paraphrase", "P1", "--paraphrase", "P2").stdout == "edit_0  queued\n"
    assert service.edits["edit_0"]["paraphrases"] == ["P1", "P2"]
    assert service.edits["edit_0"]["rephrases"] == []


def test_waiting_for_an_edit_that_fails_exits_1(errata: Errata, service: FakeService) -> None:
    service.ends["Q"] = "failed"

    result = errata("submit", "Q", "A", "--wait")

    assert result.exit_code == 1
    assert "a node did not answer the prompt with the target (not_verified)" in result.stdout


def test_waiting_too_long_exits_1(errata: Errata) -> None:
    result = errata("submit", "Q", "A", "--wait", "--timeout", "0")

    assert result.exit_code == 1
    assert "edit_0 is still queued after 0 s" in result.stderr


def test_json_is_the_answer_of_the_api(errata: Errata) -> None:
    assert json.loads(errata("submit", "Q", "A", "--json").stdout)["id"] == "edit_0"
    assert json.loads(errata("list", "--json").stdout)["data"][0]["prompt"] == "Q"
    assert json.loads(errata("status", "edit_0", "--json").stdout)["status"] == "queued"
    assert json.loads(errata("versions", "--json").stdout)["data"][0]["version"] == 1
    assert json.loads(errata("runs", "--json").stdout)["data"][0]["id"] == "run_1"
    assert json.loads(errata("activate", "1", "--json").stdout)["active"] == 1
    assert json.loads(errata("retract", "edit_0", "--json").stdout)["status"] == "retracting"


def test_tables_keep_ids_and_versions_whole(errata: Errata) -> None:
    errata("submit", "Q [bold] " + "x" * 300, "A\x1b[31m", "--json")

    listed = errata("list").stdout
    assert "edit_0  queued" in listed
    assert "[bold]" in listed
    assert "\x1b" not in listed
    assert "1 *" in errata("versions").stdout
    assert "run_1  succeeded" in errata("runs").stdout


def test_import_reads_a_file_or_standard_input(errata: Errata, tmp_path: Path) -> None:
    line = '{"prompt": "P", "target": "A"}\n'
    path = tmp_path / "edits.jsonl"
    path.write_text(line * 2)

    assert errata("import", str(path)).stdout == "2 stored, 0 refused\n"
    assert errata("import", "-", input=line).stdout == "1 stored, 0 refused\n"


def test_refused_lines_are_named_and_exit_1() -> None:
    refused = {"line": 3, "message": "target: Field required", "param": "target", "code": "missing_field"}
    report = {"accepted": 2, "rejected": 1, "errors": [refused], "first_id": None, "last_id": None}
    with serve(lambda _: httpx.Response(202, json=report)) as url:
        result = run("import", "-", "--url", url, input="{}")

    assert result.exit_code == 1
    assert result.stderr == "line 3: target: Field required (missing_field)\n"


def test_activate_and_rollback_say_what_was_active_before(errata: Errata) -> None:
    assert errata("activate", "1").stdout == "version 1 is active (before: 0)\n"
    assert errata("rollback", "--to", "0").stdout == "version 0 is active (before: 1)\n"


def test_ask_prints_the_answer_alone_on_standard_output(errata: Errata) -> None:
    result = errata("ask", "Q", "--model", "errata@0", "--chat")

    assert result.stdout == "I do not know\n"
    assert result.stderr == "version 0, cut at 64 tokens\n"


def test_an_error_of_the_api_is_one_line_on_standard_error(errata: Errata) -> None:
    result = errata("status", "edit_9")

    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == "errata: id: no edit 'edit_9' (edit_not_found)\n"


def test_an_error_of_the_server_names_the_request() -> None:
    with serve(lambda _: error(503, "unavailable", "no node is ready")) as url:
        result = run("ask", "Q", "--url", url)

    assert result.stderr == "errata: no node is ready (unavailable, request req_test)\n"


@pytest.mark.parametrize("words", [("ask", "Q"), ("versions",), ("submit", "Q", "A", "--wait"), ("rollback",)])
def test_without_a_stack_the_error_says_what_to_do(words: tuple[str, ...], home: Path) -> None:
    result = run(*words)

    assert result.exit_code == 1
    assert result.stderr == f"errata: no stack runs under {home}; `errata up` starts one\n"


def test_an_address_where_nothing_answers_is_named() -> None:
    result = run("ask", "Q", "--url", "http://127.0.0.1:1")

    assert result.exit_code == 1
    assert result.stderr.startswith("errata: nothing answers at http://127.0.0.1:1: start a stack with `errata up`")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ERRATA_PORTT", "1", "errata: unknown setting: ERRATA_PORTT\n"),
        ("ERRATA_PORT", "x", "errata: ERRATA_PORT: Input should be a valid integer"),
    ],
)
def test_a_wrong_setting_is_named(name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)

    result = run("ps")

    assert result.exit_code == 1
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [("activate", "x"), ("submit", "Q"), ("bogus",), ("import", "no-such-file")])
def test_wrong_usage_exits_2(words: tuple[str, ...]) -> None:
    assert run(*words).exit_code == 2


def test_ps_and_down_without_a_stack_find_nothing() -> None:
    assert run("ps").exit_code == 1
    assert json.loads(run("ps", "--json").stdout) == []
    assert run("down").stdout == "nothing runs\n"


def test_doctor_without_a_stack_fails_and_says_so() -> None:
    result = run("doctor")

    assert result.exit_code == 1
    assert "FAIL  service: no stack runs under this home\n      -> start one: errata up" in result.stdout
    assert {"part", "level", "found", "advice"} == set(json.loads(run("doctor", "--json").stdout)[0])


def test_doctor_repairs_only_what_it_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("doctor", "--repair")
    assert result.exit_code == 1
    assert result.stderr.startswith("errata: nothing more was repaired: ERRATA_REDIS_URL is not set")

    monkeypatch.setattr(doctor, "repair", lambda settings: [f"repaired under {settings.home}"])
    assert run("doctor", "--repair").stdout.startswith("repaired under ")
    assert json.loads(run("doctor", "--repair", "--json").stdout)


def test_logs_of_a_home_without_logs_exit_1(home: Path) -> None:
    result = run("logs")

    assert result.exit_code == 1
    assert result.stderr == f"errata: there are no logs under {home}\n"


def test_logs_are_the_last_lines_of_each_program(home: Path) -> None:
    (home / "logs").mkdir(parents=True)
    (home / "logs" / "train.log").write_text("one\ntwo\nthree\n")
    (home / "logs" / "node.log").write_text("four\n")

    assert run("logs", "train", "-n", "2").stdout == "two\nthree\n"
    assert run("logs").stdout == "node: four\ntrain: one\ntrain: two\ntrain: three\n"
    refused = run("logs", "nodes")
    assert refused.exit_code == 1
    assert refused.stderr == "errata: no log of 'nodes'; there are: node, train\n"


def test_logs_are_followed_through_rotation(tmp_path: Path) -> None:
    path = tmp_path / "train.log"
    path.write_text("old\n")

    def steps() -> Iterator[None]:
        path.write_text("old\nnew\nhal")
        yield
        path.write_text("old\nnew\nhalf\n")
        yield
        path.unlink()
        yield
        path.write_text("fresh\n")
        yield

    script = steps()
    lines = follow({"train": path}, pause=lambda _: next(script))

    assert [next(lines) for _ in range(3)] == [("train", "new"), ("train", "half"), ("train", "fresh")]


def test_last_lines_survive_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.log").write_bytes(b"a\n\xff\n")

    assert last_lines(tmp_path / "x.log", 1) == ["\\xff"]


def test_one_line_shows_what_a_terminal_would_obey() -> None:
    assert one_line("a\n b\x1b[2J\u202e") == "a b\\x1b[2J\\u202e"


@pytest.mark.parametrize(("seconds", "text"), [(-1, "0 s"), (59, "59 s"), (90, "2 min"), (7200, "2 h"), (2e5, "2 d")])
def test_ago_is_in_whole_units(seconds: float, text: str) -> None:
    assert ago(seconds) == text


def test_following_on_a_terminal_leaves_the_counts() -> None:
    console = Console(force_terminal=True, color_system=None, width=100)
    state = EditState(
        id="edit_1", status=EditStatus.LIVE, version=1, verified={}, progress=None, error=None, updated_at=0
    )

    with console.capture() as captured, Follow(console) as follow:
        follow(state)

    assert captured.get().endswith("\x1b[2K1 live\n")
