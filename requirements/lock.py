"""Regenerate the pinned requirement files: `.venv/bin/python requirements/lock.py`.

pip resolves every `.in` file at once, so one set of versions serves all images. The result is then split: each package
is pinned in the first file of its chain that needs it, and an image installs the files up to its own, with `--no-deps`.

CPU and CUDA differ in `torch-*.txt` and `node-*.txt` only: CUDA is resolved second, with everything else held where the
CPU resolution put it. pip reads metadata and downloads no wheel (a local pip setting may choose where from).

Beside each pin are the hashes that PyPI has of its wheels for Python 3.11 on Linux, but not in `torch-cpu.txt`: torch's
CPU build is not on PyPI, is rebuilt by distributors under one version, and pip wants hashes of all or of none.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag

import httpx
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.tags import Tag
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import Version

HERE = Path(__file__).parent
INDEX = "https://pypi.org/simple"

# vLLM lists these for images, audio and video. Errata serves text, and PyPI's builds of them break every import of a
# transformers model beside a CPU torch ("operator torchvision::nms does not exist").
# Triton has no CPU backend, and is a gigabyte: only xgrammar's CUDA kernels ask for it there.
DROPPED = {"torchvision", "torchaudio", "torchcodec"}
DROPPED_ON_CPU = {"triton"}

HEADER = """\
# Generated from {name}.in by requirements/lock.py; do not edit. Installed with --no-deps.
"""


def chain(device: str) -> list[str]:
    """File names, each needing those before it."""
    return ["service", f"torch-{device}", "worker", f"node-{device}", "stack", "dev"]


def requested(name: str) -> list[str]:
    """The requirement lines of one `.in` file, without comments."""
    lines = (line.partition("#")[0].strip() for line in (HERE / f"{name}.in").read_text().splitlines())
    return [line for line in lines if line]


def resolve(requirements: Iterable[str], constraints: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Let pip choose versions; answers the metadata of every package by canonical name."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = Path(folder, "constraints.txt")
        fixed.write_text("\n".join(constraints))
        report = Path(folder, "report.json")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--dry-run"]
        options = ["--ignore-installed", "--only-binary=:all:", "--constraint", str(fixed), "--report", str(report)]
        subprocess.run([*pip, *options, *requirements], check=True)
        installs = json.loads(report.read_text())["install"]
    return {canonicalize_name(item["metadata"]["name"]): item["metadata"] for item in installs}


def closure(lines: Iterable[str], packages: dict[str, dict[str, Any]], dropped: set[str]) -> set[str]:
    """Canonical names of what the requirement lines need, themselves included and `dropped` left out."""
    seen: set[tuple[str, str]] = set()

    def visit(requirement: Requirement) -> None:
        name = canonicalize_name(requirement.name)
        if name in dropped:
            return
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for needed in applying(packages[name], extra):
                visit(needed)

    for line in lines:
        visit(Requirement(line))
    return {name for name, _ in seen}


def applying(metadata: dict[str, Any], extra: str) -> Iterator[Requirement]:
    """The dependencies of one package that apply here, with one of its extras."""
    environment = default_environment() | {"extra": extra}
    for line in metadata.get("requires_dist", []):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            yield requirement


def pin(name: str, metadata: dict[str, Any]) -> str:
    """One exact pin; `===` where a local version of the same number must not match."""
    exact = "===" if name == "torch" else "=="
    return f"{name}{exact}{metadata['version']}"


class Links(HTMLParser):
    """The wheels of an index page (PEP 503): file name and sha256, in hex."""

    def __init__(self) -> None:
        super().__init__()
        self.wheels: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Takes the links of it."""
        url, fragment = urldefrag(dict(attrs).get("href") or "")
        if tag == "a" and fragment.startswith("sha256="):
            self.wheels[url.rpartition("/")[2]] = fragment.removeprefix("sha256=")


def hashes(client: httpx.Client, name: str, version: str) -> list[str]:
    """The sha256 of every wheel of a version that Python 3.11 on some Linux may install."""
    links = Links()
    links.feed(client.get(f"{INDEX}/{name}/", headers={"Accept": "text/html"}).raise_for_status().text)
    found = []
    for wheel, sha256 in links.wheels.items():
        try:
            _, its_version, _, tags = parse_wheel_filename(wheel)
        except InvalidWheelFilename:
            continue  # a source distribution
        if its_version == Version(version) and any(map(may_install, tags)):
            found.append(sha256)
    if not found:
        raise LookupError(f"{INDEX} has no wheel of {name} {version}")
    return sorted(found)


def may_install(tag: Tag) -> bool:
    """Whether Python 3.11 on Linux, of whatever architecture, takes a wheel with this tag."""
    of_python = tag.interpreter.startswith("py") or tag.interpreter == "cp311" or tag.abi == "abi3"
    return of_python and (tag.platform == "any" or "linux" in tag.platform)


def hashed(client: httpx.Client, line: str) -> str:
    """A pin with its hashes, in pip's form."""
    name, _, version = line.replace("===", "==").partition("==")
    return " \\\n    ".join([line, *(f"--hash=sha256:{sha256}" for sha256 in hashes(client, name, version))])


def split(names: list[str], packages: dict[str, dict[str, Any]], dropped: set[str]) -> dict[str, list[str]]:
    """The pins of each file: the first of `names` that needs a package has it."""
    files: dict[str, list[str]] = {}
    placed: set[str] = set()
    for name in names:
        new = closure(requested(name), packages, dropped) - placed
        files[name] = [pin(package, packages[package]) for package in sorted(new)]
        placed |= new
    return files


def main() -> None:
    """Resolve for CPU, then for CUDA with the shared versions held, and write the files."""
    cpu_packages = resolve((line for name in chain("cpu") for line in requested(name)), [])
    cpu = split(chain("cpu"), cpu_packages, DROPPED | DROPPED_ON_CPU)
    shared = [line for name, lines in cpu.items() for line in lines if not name.endswith("-cpu")]
    cuda_packages = resolve((line for name in chain("cuda") for line in requested(name)), shared)
    with httpx.Client(timeout=60) as client:
        for name, lines in (split(chain("cuda"), cuda_packages, DROPPED) | cpu).items():
            whole = lines if name == "torch-cpu" else [hashed(client, line) for line in lines]
            (HERE / f"{name}.txt").write_text(HEADER.format(name=name) + "\n".join(whole) + "\n")


if __name__ == "__main__":
    main()
