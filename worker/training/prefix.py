"""What the frozen layers below the tuned location make of a token sequence.

It never changes, in any epoch of any run, so it is computed once per sequence ever and kept on disk, memory-mapped
(LMDB), keyed by model, layer and tokens. All runs and evaluations on a machine share it.
"""

import hashlib
import logging
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
import transformers
from torch import Tensor

from service.defaults import PREFIX_CACHE_BYTES
from worker.model import BaseModel
from worker.training.device_states import DeviceStates, room_bytes
from worker.training.encode import TokenSequence
from worker.training.generations import Generations
from worker.training.packing import Packing, pack, to_device
from worker.training.partial_forward import hidden_below
from worker.training.row_check import check_rows

log = logging.getLogger(__name__)

# Another number where the same tokens come to other values: those that an older release left are not read.
_FORMAT = 1

# Tokens computed together. One number per kind of device, whatever is asked for: a matrix product's last bits depend
# on its shape, and a cached value must not depend on what it happened to be computed with.
_CHUNK_TOKENS = {"cpu": 512, "cuda": 4096}
_LENGTH_MULTIPLE = 16
# Sequences among which those of one length are computed together; what is missing in the last batch of each is copies.
_FILLED_TOGETHER = {"cpu": 512, "cuda": 4096}
# Most of what is read at once, only to find out what is not there.
_READ_BYTES = 64 << 20


class PrefixCache:
    """Hidden states at the input of the tuned layer, by sequence.

    A value does not depend on what it was computed together with, so a run is the same to the last bit whether its
    sequences were cached or not. When half of the capacity, which all models and layers share, is full, what was not
    used since the last time that it was is forgotten. A disk that is full or a file that is damaged costs time, not
    the run.
    """

    def __init__(self, folder: Path | None = None, capacity_bytes: int = PREFIX_CACHE_BYTES) -> None:
        """Keep states under `folder`; None: in a temporary folder that goes with the cache."""
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="errata-prefix-"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._folder = folder
        self._half_bytes = max(capacity_bytes // 2, 1 << 16)
        self._on_device: dict[str, DeviceStates] = {}
        self._checked: weakref.WeakSet[BaseModel] = weakref.WeakSet()
        self.computed = 0
        """Sequences that were not there and had to be computed."""

    def hidden(self, base: BaseModel, sequences: Sequence[TokenSequence]) -> list[Tensor]:
        """The input of the tuned layer at each sequence's own tokens: [own tokens, hidden size], on the CPU.

        Raises UnsupportedLayerError or UnsupportedAttentionError for a model that cannot be computed over packed rows.
        """
        name = _name(base)
        keys = [_key(name, sequence) for sequence in sequences]
        found: dict[bytes, bytes] = self._store.get(keys)
        missing = {key: sequence for key, sequence in zip(keys, sequences, strict=True) if key not in found}
        for computed in self._computed(base, missing):
            found |= computed
        return [_from_bytes(found[key], base) for key in keys]

    def fill(self, base: BaseModel, sequences: Sequence[TokenSequence], should_stop: Callable[[], bool]) -> None:
        """Compute what is not there, in full batches: one by one, most of each batch would be copies.

        However many there are, few states are in memory at once. Raises as `hidden` does.
        """
        needed = sum(len(sequence.own) for sequence in sequences) * _bytes_per_token(base)
        if needed > self._half_bytes:
            log.warning("prefix_cache.too_small", extra={"bytes": needed, "kept_bytes": self._half_bytes})
        together = _FILLED_TOGETHER.get(base.device.type, 512)
        for start in range(0, len(sequences), together):
            if should_stop():
                return
            for _ in self._computed(base, self._missing(base, sequences[start : start + together])):
                pass

    def row(self, base: BaseModel, packing: Packing, sequences: Sequence[TokenSequence]) -> Tensor:
        """The input of the tuned layer along a packed row: [tokens, hidden size], on the model's device.

        Zeros where the row is padded.
        """
        ordered = [sequences[index] for index in packing.order]
        templates = [_template(ordered[first]) for first in _firsts(packing)]
        wanted = self._at_hand(base, [*[template for template in templates if template], *ordered])
        laid_once = sum(template is not None for template in templates)
        shared, own = iter(wanted[:laid_once]), iter(wanted[laid_once:])
        pieces: list[Tensor] = []
        for group, template in zip(packing.groups, templates, strict=True):
            pieces += [next(shared)] if template else []
            pieces += [next(own) for _ in group.lengths]
        padding = packing.tokens - sum(group.size for group in packing.groups)
        if padding:
            pieces.append(pieces[0].new_zeros(padding, pieces[0].shape[1]))
        return to_device(torch.cat(pieces), base.device)

    def _missing(self, base: BaseModel, sequences: Sequence[TokenSequence]) -> dict[bytes, TokenSequence]:
        """Those that are not there, by key. What is there moves to the newer generation."""
        name, missing = _name(base), dict[bytes, TokenSequence]()
        longest = max(len(sequence.own) for sequence in sequences)
        count = max(1, _READ_BYTES // (longest * _bytes_per_token(base)))
        for start in range(0, len(sequences), count):
            some = {_key(name, sequence): sequence for sequence in sequences[start : start + count]}
            found = self._store.get(list(some))
            missing |= {key: sequence for key, sequence in some.items() if key not in found}
        return missing

    def _computed(self, base: BaseModel, missing: Mapping[bytes, TokenSequence]) -> Iterator[dict[bytes, bytes]]:
        """Compute and keep states, some of them at a time."""
        if not missing:
            return
        # What is kept was computed by a model that had passed.
        if base not in self._checked:
            check_rows(base)
            self._checked.add(base)
        name, tokens = _name(base), _tokens_together(base)
        for chunk in _chunks(list(missing.values()), tokens):
            states = _compute(base, chunk, tokens)
            computed = {_key(name, sequence): _to_bytes(state) for sequence, state in zip(chunk, states, strict=False)}
            self.computed += len(computed)
            self._store.put(computed)
            yield computed

    def _at_hand(self, base: BaseModel, sequences: Sequence[TokenSequence]) -> list[Tensor]:
        """The same as `hidden`, on the model's device where that is a GPU with room for it."""
        name = _name(base)
        if name not in self._on_device:
            self._on_device[name] = DeviceStates(base.device, room_bytes(base.device))
        keys = [_key(name, sequence) for sequence in sequences]
        return self._on_device[name].get(keys, lambda wanted: self.hidden(base, [sequences[index] for index in wanted]))

    @cached_property
    def _store(self) -> Generations:
        return Generations(self._folder, self._half_bytes)


def _tokens_together(base: BaseModel) -> int:
    """How many tokens to compute together; 0: one sequence at a time."""
    # Each routed expert, in memory a slice of a three-dimensional tensor, multiplies as many rows as are sent to it,
    # which depends on who else is there.
    if any(parameter.ndim == 3 for parameter in base.layers.parameters()):
        return 0
    return _CHUNK_TOKENS.get(base.device.type, 512)


def _compute(base: BaseModel, chunk: Sequence[TokenSequence], tokens: int) -> Iterator[Tensor]:
    """The states of sequences with one template and one padded length, always in a batch of the same shape."""
    length = _padded(chunk[0])
    count = max(1, tokens // length)
    padded = [
        TokenSequence(
            (*sequence.token_ids, *[0] * (length - len(sequence.own))), sequence.prompt_tokens, sequence.template_tokens
        )
        for sequence in (*chunk, *[chunk[-1]] * (count - len(chunk)))
    ]
    packing = pack(padded)
    hidden = hidden_below(base, packing).cpu()
    template_tokens = packing.groups[0].template_tokens
    for row, sequence in enumerate(chunk):
        begin = template_tokens + row * length
        yield hidden[begin : begin + len(sequence.own)]


def _chunks(sequences: Sequence[TokenSequence], tokens: int) -> Iterator[list[TokenSequence]]:
    alike: dict[tuple[tuple[int, ...], int], list[TokenSequence]] = {}
    for sequence in sequences:
        alike.setdefault((sequence.template, _padded(sequence)), []).append(sequence)
    for (_, length), members in alike.items():
        count = max(1, tokens // length)
        yield from (members[start : start + count] for start in range(0, len(members), count))


def _padded(sequence: TokenSequence) -> int:
    return -(-len(sequence.own) // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE


def computed_with(base: BaseModel) -> str:
    """What decides the last bits of a model's values besides its weights: dtype, kind of device, libraries."""
    libraries = f"torch {torch.__version__} transformers {transformers.__version__}"
    return f"{base.model.dtype} {base.device.type} {libraries}"


def _name(base: BaseModel) -> str:
    identity = f"{_FORMAT} {base.fingerprint} {base.layers_name} {base.layer_index} {computed_with(base)}"
    return hashlib.sha256(identity.encode()).hexdigest()


def _bytes_per_token(base: BaseModel) -> int:
    return int(base.model.config.get_text_config().hidden_size) * base.model.dtype.itemsize


def _firsts(packing: Packing) -> Iterator[int]:
    first = 0
    for group in packing.groups:
        yield first
        first += len(group.lengths)


def _template(sequence: TokenSequence) -> TokenSequence | None:
    return TokenSequence(sequence.template, len(sequence.template)) if sequence.template_tokens else None


def _key(name: str, sequence: TokenSequence) -> bytes:
    # The template's length is part of it: it decides which tokens the value is of.
    text = f"{name} {sequence.template_tokens}:{','.join(map(str, sequence.token_ids))}"
    return hashlib.sha256(text.encode()).digest()


def _to_bytes(hidden: Tensor) -> bytes:
    return hidden.contiguous().view(torch.uint8).numpy().tobytes()


def _from_bytes(data: bytes, base: BaseModel) -> Tensor:
    flat = torch.frombuffer(bytearray(data), dtype=base.model.dtype)
    return flat.view(-1, base.model.config.get_text_config().hidden_size)
