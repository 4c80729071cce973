"""The audit of the code and the pins, over what bandit and pip-audit would print."""

import importlib.util
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EXCEPTIONS = {"bandit": [{"test": "B1", "files": ["service/a.py"], "reason": "r"}]}
CANARY = {"name": "jinja2", "version": "2.4.1", "vulns": [{"id": "PYSEC-1", "aliases": []}]}
FOUND = {"test_id": "B1", "filename": "service/a.py", "line_number": 3, "issue_text": "text"}


@pytest.fixture(scope="module")
def security() -> ModuleType:
    spec = importlib.util.spec_from_file_location("security_audit", ROOT / "security/audit.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Tools:
    """What the two tools print: JSON, or nothing when they break."""

    def __init__(self, *packages: dict[str, Any], results: Sequence[dict[str, Any]] = (FOUND,)) -> None:
        self.bandit: Any = {"errors": [], "results": list(results)}
        self.canary: Any = {"dependencies": [CANARY]}
        self.packages: Any = {"dependencies": list(packages)}
        self.asked: list[list[str]] = []

    def __call__(self, command: Sequence[str]) -> str:
        if command[0] == "bandit":
            answer = self.bandit
        else:
            pins = Path(command[-1]).read_text().splitlines()
            self.asked.append(pins)
            answer = self.canary if pins == ["jinja2==2.4.1"] else self.packages
        return "" if answer is None else json.dumps(answer)


def test_an_audit_in_which_all_is_excused_finds_nothing_wrong(security: ModuleType) -> None:
    tools = Tools({"name": "a", "version": "1", "vulns": []})
    assert security.audit(EXCEPTIONS, [["a==1"], ["a==2"]], tools) == ([], [])
    assert tools.asked == [["jinja2==2.4.1"], ["a==1"], ["a==2"]]


def test_a_finding_in_the_code_fails(security: ModuleType) -> None:
    elsewhere = {**FOUND, "filename": "service/b.py"}
    wrong, _ = security.audit(EXCEPTIONS, [], Tools(results=[FOUND, elsewhere]))
    assert wrong == ["bandit: service/b.py:3: B1: text"]


def test_an_exception_that_nothing_needs_fails(security: ModuleType) -> None:
    rows = {**EXCEPTIONS, "advisory": [{"id": "PYSEC-2", "package": "a", "reason": "r"}]}
    wrong, _ = security.audit(rows, [["a==1"]], Tools(results=[]))
    assert wrong == [
        "exceptions.toml: nothing finds B1 in service/a.py any more",
        "exceptions.toml: nothing finds PYSEC-2 in a any more",
    ]


@pytest.mark.parametrize("output", [None, {"errors": ["syntax"], "results": []}])
def test_a_bandit_that_saw_nothing_is_no_success(security: ModuleType, output: Any) -> None:
    tools = Tools()
    tools.bandit = output
    with pytest.raises(RuntimeError, match="bandit"):
        security.audit(EXCEPTIONS, [], tools)


def test_an_advisory_fails_once_unless_it_is_excused_by_one_of_its_names(security: ModuleType) -> None:
    tools = Tools({"name": "a", "version": "1", "vulns": [{"id": "PYSEC-2", "aliases": ["CVE-3"]}]})
    wrong, _ = security.audit(EXCEPTIONS, [["a==1"], ["a==1"]], tools)
    assert wrong == ["pip-audit: a 1: PYSEC-2, CVE-3"]
    for name in ("PYSEC-2", "CVE-3"):
        rows = {**EXCEPTIONS, "advisory": [{"id": name, "package": "a", "reason": "r"}]}
        assert security.audit(rows, [["a==1"]], tools) == ([], [])
    other = {**EXCEPTIONS, "advisory": [{"id": "CVE-3", "package": "b", "reason": "r"}]}
    assert "pip-audit: a 1: PYSEC-2, CVE-3" in security.audit(other, [["a==1"]], tools)[0]


@pytest.mark.parametrize(
    "canary",
    [
        None,
        {"dependencies": [{"name": "jinja2", "skip_reason": "not found on PyPI"}]},
        {"dependencies": [{**CANARY, "vulns": []}]},
    ],
)
def test_a_source_that_knows_no_advisories_is_said_to_be_none(security: ModuleType, canary: Any) -> None:
    """pip-audit itself exits with 0 and "No known vulnerabilities found" for packages that its source does not know."""
    tools = Tools()
    tools.canary = canary
    wrong, [note] = security.audit(EXCEPTIONS, [["a==1"]], tools)
    assert wrong == []
    assert "SKIPPED" in note
    assert tools.asked == [["jinja2==2.4.1"]]


def test_a_source_that_breaks_off_fails_and_what_it_does_not_know_is_named(security: ModuleType) -> None:
    tools = Tools({"name": "b", "skip_reason": "not found"})
    assert security.audit(EXCEPTIONS, [["b==1"]], tools) == (
        [],
        ["pip-audit: not audited, its source does not know them: b"],
    )
    tools.packages = None
    wrong, _ = security.audit(EXCEPTIONS, [["b==1"]], tools)
    assert wrong == ["pip-audit: the source of advisories broke off"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_pin_is_audited_by_its_public_version(security: ModuleType, device: str) -> None:
    pins = security.public_pins(device)
    names = [pin.partition("==")[0] for pin in pins]
    assert len(set(names)) == len(names), "pip-audit takes no package twice"
    assert {"torch", "fastapi", "pip-audit", "supervisor"} <= set(names)
    assert [pin for pin in pins if "+" in pin or "===" in pin] == []


def test_every_exception_has_its_reason_and_its_files() -> None:
    rows = tomllib.loads((ROOT / "security/exceptions.toml").read_text())
    assert set(rows) <= {"bandit", "advisory"}
    for row in rows["bandit"]:
        assert set(row) == {"test", "files", "reason"}
        assert len(row["reason"]) > 30
        assert all((ROOT / file).is_file() for file in row["files"])
    for row in rows.get("advisory", ()):
        assert set(row) == {"id", "package", "reason"}


def test_lint_runs_the_audit() -> None:
    assert "security/audit.py" in (ROOT / "Makefile").read_text()
