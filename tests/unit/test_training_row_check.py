"""A model is trained over packed rows only if it does not matter to it what lies beside a sequence."""

from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, MIXING, down_projection, tiny_base

from worker.model import load_base
from worker.training.encode import TokenSequence
from worker.training.partial_forward import UnsupportedLayerError
from worker.training.prefix import PrefixCache
from worker.training.row_check import _TOLERANCE, check_rows, row_difference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SEQUENCES = [TokenSequence((5, 6, 7, 8, 256), 2), TokenSequence((20, 21, 256), 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 3])
def test_rounding_is_far_from_what_is_refused(family: str, layer: int, dtype: torch.dtype) -> None:
    base = tiny_base(family, down_projection(family, layer), dtype=dtype)
    assert row_difference(base) < _TOLERANCE / 4
    check_rows(base)


def test_rounding_of_the_default_model_is_far_from_what_is_refused(default_model: Path) -> None:
    assert row_difference(load_base(str(default_model), device="cpu")) < _TOLERANCE / 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", MIXING)
@pytest.mark.parametrize("layer", [0, 3])
def test_a_model_that_mixes_what_lies_side_by_side_is_refused(family: str, layer: int, dtype: torch.dtype) -> None:
    """Tuned at the bottom, all of its layers run in every step; at the top, what mixes is in the frozen prefix."""
    base, prefix = tiny_base(family, down_projection(family, layer), dtype=dtype), PrefixCache()
    assert row_difference(base) > 4 * _TOLERANCE
    with pytest.raises(UnsupportedLayerError, match=r"ForCausalLM cannot be trained.*a convolution or a recurrence"):
        prefix.hidden(base, SEQUENCES)
    with pytest.raises(UnsupportedLayerError):
        prefix.fill(base, SEQUENCES, should_stop=lambda: False)
    assert prefix.computed == 0


def test_attention_that_goes_its_own_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base()
    # As transformers does, with a warning, for models that it cannot give another attention.
    monkeypatch.setattr(base.model, "set_attn_implementation", lambda *_: None)
    with pytest.raises(UnsupportedLayerError):
        PrefixCache().hidden(base, SEQUENCES)


def test_a_model_is_tried_once_and_not_for_what_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[object] = []
    monkeypatch.setattr("worker.training.prefix.check_rows", tried.append)
    bases, prefix = [tiny_base(), tiny_base(seed=1)], PrefixCache(tmp_path / "first")
    for base in (bases[0], *bases, bases[0]):
        prefix.hidden(base, SEQUENCES[:1])
        prefix.hidden(base, SEQUENCES)
    assert tried == bases
    again = PrefixCache(tmp_path / "second")
    again.hidden(bases[0], SEQUENCES)
    tried.clear()
    again.hidden(bases[0], SEQUENCES)
    assert not tried
