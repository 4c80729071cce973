"""Preservation: updates are kept away from what a tuned matrix hears all the time.

An update D changes a matrix's output for an input x by D x, so over ordinary text by tr(D C D'), where C is the mean of
x x' there. Few directions carry most of C. The update is trained as D = M F with F = (k / (C + k))^1/2, k a share of
C's mean eigenvalue: directions that ordinary text uses much are trained little. Hard projections on C's quiet
directions (AlphaEdit, arXiv 2410.02355) are the limit of a spectrum with a gap; language models have none.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from worker.folders import write_file
from worker.model import BaseModel
from worker.training.calibration import calibration_sequences
from worker.training.packing import pack
from worker.training.partial_forward import run_tuned_layer
from worker.training.prefix import PrefixCache, computed_with

Factors = Mapping[str, Tensor]
"""By tuned parameter: F, [in, in] fp32, on the CPU."""

log = logging.getLogger(__name__)

_SEQUENCES_PER_BATCH = 16


class Preservation:
    """The factors of one base model; what they are made from is measured once ever, and kept in a folder."""

    def __init__(self, base: BaseModel, prefix: PrefixCache, folder: Path) -> None:
        self._base = base
        self._prefix = prefix
        self._folder = folder
        self._factors: dict[float, dict[str, Tensor]] = {}

    def factors(self, strength: float) -> Factors:
        """F of every tuned matrix for k = `strength` times the mean eigenvalue of C."""
        if strength not in self._factors:
            self._factors[strength] = factors(self._covariances(), strength, self._base.device)
        return self._factors[strength]

    def _covariances(self) -> dict[str, Tensor]:
        path = self._path()
        try:
            return safetensors.torch.load(path.read_bytes())
        except (OSError, SafetensorError):
            measured = input_covariances(self._base, self._prefix)
        try:
            write_file(path, safetensors.torch.save(measured), durable=False)
        except OSError as error:
            log.warning("preservation.not_kept", extra={"path": str(path), "reason": str(error)})
        return measured

    def _path(self) -> Path:
        base = self._base
        texts = [sequence.token_ids for sequence in calibration_sequences(base.tokenizer)]
        inputs = f"{base.fingerprint} {base.parameter_names} {computed_with(base)} {texts}"
        return self._folder / f"{hashlib.sha256(inputs.encode()).hexdigest()[:24]}.safetensors"


@torch.no_grad()
def input_covariances(base: BaseModel, prefix: PrefixCache) -> dict[str, Tensor]:
    """C of every tuned matrix over the calibration text: [in, in] fp32, on the CPU, by parameter."""
    sums: dict[str, Tensor] = {}
    sequences = calibration_sequences(base.tokenizer)
    prefix.fill(base, sequences, should_stop=lambda: False)
    tokens = 0
    for start in range(0, len(sequences), _SEQUENCES_PER_BATCH):
        batch = sequences[start : start + _SEQUENCES_PER_BATCH]
        packing = pack(batch).to(base.device)
        real = sum(group.size for group in packing.groups)
        with _watched(base, sums, real):
            run_tuned_layer(base, packing, prefix.row(base, packing, batch))
        tokens += real
    return {name: (total / tokens).cpu() for name, total in sums.items()}


def factors(covariances: Mapping[str, Tensor], strength: float, device: torch.device) -> dict[str, Tensor]:
    """F of every tuned matrix, for k = `strength` times C's mean eigenvalue."""
    return {name: _factor(covariance, strength, device) for name, covariance in covariances.items()}


def _factor(covariance: Tensor, strength: float, device: torch.device) -> Tensor:
    # fp64 where it is not slow: the spectrum spans ten powers of ten.
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    values, vectors = torch.linalg.eigh(covariance.to(device, dtype))
    values = values.clamp(min=0)
    k = strength * values.mean()
    factor: Tensor = (vectors * (k / (values + k)).sqrt()) @ vectors.T
    return factor.float().cpu()


@contextmanager
def _watched(base: BaseModel, sums: dict[str, Tensor], tokens: int) -> Iterator[None]:
    """Add x x' of the first `tokens` inputs of every tuned linear module to `sums`, for the length of one forward."""
    with ExitStack() as hooks:
        for name in base.parameter_names:

            def add(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                inputs = args[0].reshape(-1, args[0].shape[-1])[:tokens].float()
                product = inputs.T @ inputs
                sums[name] = sums[name] + product if name in sums else product

            module = base.model.get_submodule(name.rpartition(".")[0])
            hooks.callback(module.register_forward_pre_hook(add).remove)
        yield
