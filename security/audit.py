"""What `make lint` asks of the supply chain: bandit over the code, pip-audit over the pins, less the exceptions.

    python security/audit.py

`exceptions.toml` has each finding that stands, with its reason. A new finding fails, and so does an exception that
nothing finds any more. pip-audit says "no known vulnerabilities" also when its source of advisories does not know the
packages, so the source is first asked for one that is known to be vulnerable; where it does not say so, the audit says
that it was skipped.
"""

import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
CANARY = "jinja2==2.4.1"  # CVE-2014-1402 and later ones; nothing here needs it

Run = Callable[[Sequence[str]], str]
Name = tuple[str, str]  # a test and a file, or an advisory and a package
Finding = tuple[frozenset[Name], str]  # every name that it has, and what is to be said of it


def run(command: Sequence[str]) -> str:
    """What a module of this interpreter prints; it exits with 1 when it finds something."""
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout


def bandit(run: Run) -> list[Finding]:
    """Findings in the code.

    Raises:
        RuntimeError: bandit could not read a file, or did not run.
    """
    try:
        report = json.loads(run(["bandit", "--quiet", "--recursive", "service", "worker", "--format", "json"]))
    except ValueError:
        raise RuntimeError("bandit did not run") from None
    if report["errors"]:
        raise RuntimeError(f"bandit: {report['errors']}")
    return [
        (
            frozenset({(found["test_id"], found["filename"])}),
            f"bandit: {found['filename']}:{found['line_number']}: {found['test_id']}: {found['issue_text']}",
        )
        for found in report["results"]
    ]


def public_pins(device: str) -> list[str]:
    """Every pin of an environment for `cpu` or `cuda` as PyPI knows it: without a local version such as +cpu."""
    other = {"cpu": "-cuda", "cuda": "-cpu"}[device]
    files = [path for path in (ROOT / "requirements").glob("*.txt") if not path.stem.endswith(other)]
    lines = {line for path in files for line in path.read_text().splitlines() if line and line[0] not in "# "}
    return sorted({line.replace("===", "==").removesuffix(" \\").partition("+")[0] for line in lines})


def advisories(pins: Sequence[str], run: Run) -> tuple[list[Finding], list[str]] | None:
    """Advisories on the pins, and the packages that the source does not know; None without an answer."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(pins))
        file.flush()
        options = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
        try:
            report = json.loads(run(["pip_audit", *options, "--requirement", file.name]))
        except ValueError:
            return None
    found = [
        (
            frozenset((name, package["name"]) for name in (advisory["id"], *advisory["aliases"])),
            f"pip-audit: {package['name']} {package['version']}: {', '.join((advisory['id'], *advisory['aliases']))}",
        )
        for package in report["dependencies"]
        for advisory in package.get("vulns", ())
    ]
    return found, [package["name"] for package in report["dependencies"] if "skip_reason" in package]


def unexcused(found: Sequence[Finding], excused: Sequence[Name]) -> list[str]:
    """Findings that nothing excuses, and excuses that nothing needs."""
    names = {name for known, _ in found for name in known}
    return [
        *(text for known, text in found if not known & set(excused)),
        *(
            f"exceptions.toml: nothing finds {test} in {where} any more"
            for test, where in excused
            if (test, where) not in names
        ),
    ]


def audit(
    exceptions: Mapping[str, Any], environments: Sequence[Sequence[str]], run: Run
) -> tuple[list[str], list[str]]:
    """What is wrong, and what is to be said besides.

    Args:
        exceptions: the content of exceptions.toml.
        environments: the pins of each; no package twice in one.
        run: runs a module and returns what it prints.
    """
    wrong = unexcused(bandit(run), [(row["test"], file) for row in exceptions["bandit"] for file in row["files"]])
    canary = advisories([CANARY], run)
    if canary is None or not canary[0]:
        return wrong, [f"pip-audit: SKIPPED, nothing was audited: no source of advisories answers for {CANARY}"]
    found: dict[Finding, None] = {}
    unknown: set[str] = set()
    for pins in environments:
        answer = advisories(pins, run)
        if answer is None:
            return [*wrong, "pip-audit: the source of advisories broke off"], []
        found |= dict.fromkeys(answer[0])
        unknown |= set(answer[1])
    wrong += unexcused(list(found), [(row["id"], row["package"]) for row in exceptions.get("advisory", ())])
    if unknown:
        return wrong, [f"pip-audit: not audited, its source does not know them: {', '.join(sorted(unknown))}"]
    return wrong, []


def main() -> int:
    """Prints what is wrong; returns the exit status."""
    exceptions = tomllib.loads((HERE / "exceptions.toml").read_text())
    wrong, notes = audit(exceptions, [public_pins("cpu"), public_pins("cuda")], run)
    for line in [*wrong, *notes]:
        sys.stdout.write(f"{line}\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
