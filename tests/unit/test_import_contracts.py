"""Modules that nobody has named yet are held by the import contracts all the same."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STRAYS = {
    "service/stray.py": "import torch",
    "service/api/stray.py": "import worker.delta",
    "service/other.py": "",
    "worker/stray.py": "import service.other",
    "worker/web.py": "import fastapi",
    "worker/state.py": "import redis",
    "worker/training/stray.py": "import service.stores",
    "worker/evaluation/stray.py": "import worker.tasks",
    "worker/inference/stray.py": "import worker.model",
    "worker/inference/keys.py": "import service.schemas",
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What import-linter says of the packages with the strays in them."""
    copy = tmp_path_factory.mktemp("copy")
    shutil.copy(ROOT / "pyproject.toml", copy)
    for package in ("service", "worker"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, line in STRAYS.items():
        (copy / name).write_text(line)
    lint = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(lint, cwd=copy, env={"PYTHONPATH": str(copy)}, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", [name for name, line in STRAYS.items() if line])
def test_a_module_that_no_contract_names_is_held_by_one(said: str, name: str) -> None:
    module, imported = name.removesuffix(".py").replace("/", "."), STRAYS[name].removeprefix("import ")
    assert f"{module} -> {imported}" in said
