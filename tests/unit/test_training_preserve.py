"""Preservation against computations by hand and by the whole model, text by text."""

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, down_projection, tiny_base
from torch import Tensor

from service.schemas import Format
from worker.model import BaseModel
from worker.training import calibration
from worker.training.breadth_first import TrainingResult, train
from worker.training.calibration import calibration_sequences
from worker.training.config import TrainingConfig
from worker.training.encode import TokenSequence, TrainingEdit, prompt_token_ids
from worker.training.prefix import PrefixCache
from worker.training.preserve import Preservation, factors, input_covariances

CPU = torch.device("cpu")
TEXTS = [TokenSequence(tuple((start * 7 + place * 3) % 250 for place in range(5 + start)), 2) for start in range(21)]


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.training.preserve.calibration_sequences", lambda _: TEXTS)


def naive_covariances(base: BaseModel) -> dict[str, Tensor]:
    """By the model's own forward, one text at a time: no packing, no padding, no cache."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in base.parameter_names}
    handles = [
        base.model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda _, args, name=name: inputs[name].append(args[0].reshape(-1, args[0].shape[-1]).double())
        )
        for name in base.parameter_names
    ]
    for text in TEXTS:
        base.model(torch.tensor([text.token_ids]))
    for handle in handles:
        handle.remove()
    return {name: (torch.cat(all_).T @ torch.cat(all_) / len(torch.cat(all_))).float() for name, all_ in inputs.items()}


@pytest.mark.usefixtures("texts")
@pytest.mark.parametrize("family", FAMILIES)
def test_covariances_are_those_of_every_text_by_itself(family: str) -> None:
    base = tiny_base(family, location=down_projection(family, 2))
    found, expected = input_covariances(base, PrefixCache()), naive_covariances(base)
    (name,) = base.parameter_names
    torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-3 * expected[name].abs().max().item())
    assert found[name].dtype == torch.float32


@pytest.mark.usefixtures("texts")
def test_padding_counts_for_nothing_where_biases_make_something_of_it() -> None:
    base = tiny_base("phi", location=down_projection("phi", 2))
    for name, parameter in base.model.named_parameters():
        if name.endswith("bias"):
            parameter.data.fill_(0.3)
    (name,) = base.parameter_names
    found, expected = input_covariances(base, PrefixCache())[name], naive_covariances(base)[name]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("texts")
def test_every_matrix_of_a_layer_has_its_own() -> None:
    base = tiny_base(location="model.layers.2")
    found, expected = input_covariances(base, PrefixCache()), naive_covariances(base)
    assert found.keys() == set(base.parameter_names)
    for name, covariance in found.items():
        assert covariance.shape == (base.model.get_parameter(name).shape[1],) * 2
        torch.testing.assert_close(covariance, expected[name], rtol=1e-3, atol=1e-4)


def test_factors_are_the_square_root_of_k_over_c_plus_k_by_hand() -> None:
    # Eigenvalues 6 and 2 along (1, 1) and (1, -1); their mean is 4, so k is 2 for a strength of a half.
    covariance = torch.tensor([[4.0, 2.0], [2.0, 4.0]])
    found = factors({"w": covariance}, 0.5, CPU)["w"]
    loud, quiet = math.sqrt(2 / 8), math.sqrt(2 / 4)
    torch.testing.assert_close(found @ torch.tensor([1.0, 1.0]), torch.tensor([loud, loud]))
    torch.testing.assert_close(found @ torch.tensor([1.0, -1.0]), torch.tensor([quiet, -quiet]))


def test_a_direction_that_is_never_used_is_left_free() -> None:
    found = factors({"w": torch.diag(torch.tensor([8.0, 0.0]))}, 0.1, CPU)["w"]
    torch.testing.assert_close(found, torch.diag(torch.tensor([math.sqrt(0.4 / 8.4), 1.0])))


def test_more_strength_leaves_more_of_an_update() -> None:
    covariance = {"w": torch.diag(torch.tensor([3.0, 1.0]))}
    weak, strong = (factors(covariance, strength, CPU)["w"].diagonal() for strength in (0.01, 10.0))
    assert (weak < strong).all()


def loudness(base: BaseModel, result: TrainingResult, covariance: Tensor) -> float:
    """What the update does to ordinary text, per unit of its size."""
    (name,) = base.parameter_names
    update = result.tensors[name] - base.model.get_parameter(name)
    return ((update @ covariance * update).sum() / update.square().sum()).item()


@pytest.mark.usefixtures("texts")
def test_an_update_is_kept_away_from_what_ordinary_text_uses_and_the_edits_are_learned() -> None:
    base, prefix = tiny_base(hidden_size=64, intermediate_size=256), PrefixCache()
    covariances = input_covariances(base, prefix)
    edits = [TrainingEdit("a", "one", "uno"), TrainingEdit("b", "two", "dos")]
    rate, strength = 5e-2, 0.1
    free = train(base, edits, TrainingConfig(learning_rate=rate, preserve=0), prefix=prefix)
    kept = train(
        base,
        edits,
        TrainingConfig(learning_rate=rate, preserve=strength),
        prefix=prefix,
        factors=factors(covariances, strength, CPU),
    )
    assert free.stopped == kept.stopped == "learned"
    covariance = covariances[base.parameter_names[0]]
    assert loudness(base, kept, covariance) < loudness(base, free, covariance) / 5


def test_the_shipped_text_is_of_every_origin_and_format() -> None:
    base = tiny_base()
    sequences = calibration_sequences(base.tokenizer)
    texts = [base.tokenizer.decode(sequence.token_ids) for sequence in sequences]
    assert len(texts) > 250
    assert all(sequence.target_tokens == 1 for sequence in sequences)
    turn = base.tokenizer.decode(prompt_token_ids(base.tokenizer, "?", Format.CHAT)).partition("?")[0]
    chats = sum(text.startswith(turn) for text in texts)
    assert 10 < chats < len(texts) - 200
    for file in ("calibration.jsonl", "calibration_wikipedia.jsonl"):
        row = json.loads((Path(calibration.__file__).parent / file).read_text(encoding="utf-8").splitlines()[-1])
        assert row["text"] in texts


@pytest.mark.usefixtures("texts")
def test_what_was_measured_once_is_kept_and_a_damaged_file_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, prefix = tiny_base(), PrefixCache()
    first = Preservation(base, prefix, tmp_path).factors(0.1)
    (kept,) = tmp_path.iterdir()
    with monkeypatch.context() as unmeasurable:
        unmeasurable.delattr("worker.training.preserve.input_covariances")
        again = Preservation(base, prefix, tmp_path).factors(0.1)
    assert all(torch.equal(again[name], factor) for name, factor in first.items())
    kept.write_bytes(kept.read_bytes()[:50])
    mended = Preservation(base, prefix, tmp_path).factors(0.1)
    assert all(torch.equal(mended[name], factor) for name, factor in first.items())


@pytest.mark.usefixtures("texts")
def test_models_do_not_share_what_was_measured(tmp_path: Path) -> None:
    prefix = PrefixCache()
    first, second = (Preservation(tiny_base(seed=seed), prefix, tmp_path).factors(0.1) for seed in (0, 1))
    assert not any(torch.equal(second[name], factor) for name, factor in first.items())


def test_other_texts_do_not_share_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another tokenizer or chat template makes other tokens of the shipped text, and leaves the fingerprint."""
    base, prefix = tiny_base(), PrefixCache()
    measured = []
    for texts in (TEXTS, TEXTS[:7]):
        monkeypatch.setattr("worker.training.preserve.calibration_sequences", lambda _, texts=texts: texts)
        measured.append(Preservation(base, prefix, tmp_path).factors(0.1))
    assert not any(torch.equal(measured[1][name], factor) for name, factor in measured[0].items())


@pytest.mark.usefixtures("texts")
@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_what_another_release_of_a_library_measured_is_not_read(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, prefix = tiny_base(), PrefixCache()
    Preservation(base, prefix, tmp_path).factors(0.1)
    monkeypatch.setattr(f"worker.training.prefix.{library}.__version__", "99.0")
    Preservation(base, prefix, tmp_path).factors(0.1)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.usefixtures("texts")
def test_a_folder_that_cannot_be_written_costs_time_and_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "file"
    folder.write_text("in the way")
    base = tiny_base()
    assert Preservation(base, PrefixCache(), folder).factors(0.1).keys() == set(base.parameter_names)
    assert caplog.messages == ["preservation.not_kept"]
