"""Measures the trainer on models of the paper's size: milliseconds an edit, memory, share of the card's matrix rate.

    python -m benchmarks.gpu [--shapes llama-3-8b qwen2.5-7b] [--edits 3000]

Needs one CUDA device and nothing else: the weights are random, made on the device, and a token is a number, so nothing
is downloaded and nothing is learned about quality. `--device cpu --shapes tiny` runs the same code anywhere.

Each model is trained by the paper's procedure with its settings (worker.presets), then with learned sequences left out.
Work is counted as 2 floating-point operations for each multiplication and addition of matrix products: forward, over
the tuned layer and those above it, the last one's feed-forward and the LM head at learned positions only; backward, the
same again for the gradients of inputs, but of the tuned layer only its matrix's own gradient. Attention's products of
queries, keys and values are left out, as is the frozen prefix, which is timed apart.
"""

import argparse
import dataclasses
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import Progress
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from benchmarks.bench import Bench
from benchmarks.report import RESULTS, Results, progress, told
from worker.edit_files import EditRow
from worker.model import BaseModel, freeze_base
from worker.presets import preset_for
from worker.training.breadth_first import TrainingResult
from worker.training.config import config_for
from worker.training.partial_forward import feed_forward

COLUMNS = (
    "model", "trainer", "edits", "epochs", "steps", "ms an edit", "ms an edit and epoch", "prefix pass s",
    "prefix pass ms an edit", "TFLOP/s", "% of the matrix rate", "peak device GiB",
)  # fmt: skip
_MATRIX_REPEATS = 20


@dataclass(frozen=True)
class Shape:
    """A model's sizes, where it is tuned, and how large a matrix tells its device's rate."""

    config: PreTrainedConfig
    location: str
    matrix: int = 8192


def _config(
    family: type[LlamaConfig | Qwen2Config], layers: int, hidden: int, mlp: int, heads: tuple[int, int], vocabulary: int
) -> PreTrainedConfig:
    return family(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        vocab_size=vocabulary,
        bos_token_id=0,
        eos_token_id=0,
    )


def shapes() -> dict[str, Shape]:
    """The models that can be measured; those of the paper are tuned where it tunes them."""
    configs = {
        "llama-3-8b": _config(LlamaConfig, 32, 4096, 14336, (32, 8), 128256),
        "qwen2.5-7b": _config(Qwen2Config, 28, 3584, 18944, (28, 4), 152064),
    }
    found = {}
    for name, config in configs.items():
        preset = preset_for(config.to_dict())
        if preset is None:
            raise ValueError(f"{name} is no model of the paper's")
        found[name] = Shape(config, preset.location)
    tiny = _config(LlamaConfig, 4, 32, 48, (4, 2), 200)
    return found | {"tiny": Shape(tiny, "model.layers.1.mlp.down_proj", matrix=256)}


def main() -> None:
    """Measure every shape and write the table."""
    options = _parser().parse_args()
    device = torch.device(options.device)
    results = Results(
        options.out,
        "Models of the paper's size, random weights",
        f"`benchmarks/gpu.py`: {told(options)}. {_ran_on(device)} One run a row; the least and most of an epoch's "
        "milliseconds an edit are in brackets. The operations that are counted are in the script's first lines.",
    )
    results.table(COLUMNS)
    with progress() as shown:
        for name in options.shapes:
            for row in measure(name, device, options.edits, options.prompt_tokens, options.target_tokens, shown):
                results.add(row)


def measure(
    name: str, device: torch.device, edits: int, prompt_tokens: int, target_tokens: int, shown: Progress
) -> Iterator[list[object]]:
    """Rows of `COLUMNS`: the paper's procedure, then the same with learned sequences left out."""
    shape = shapes()[name]
    rate = matrix_rate(device, shape.matrix)
    rows = random_edits(edits, shape.config.vocab_size, prompt_tokens, target_tokens)
    base = random_base(shape, device)
    bench = Bench(base, shown)
    paper = config_for(shape.config.to_dict(), plain=True)
    prefix_s = None
    for trainer, config in (
        ("the paper's", paper),
        ("learned left out", dataclasses.replace(paper, skip_learned=True)),
    ):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        first = bench.prepare(rows, config)
        prefix_s = first if prefix_s is None else prefix_s
        _wait(device)
        result = bench.train(rows, config)
        _wait(device)
        # Not train_s: what sweeps compute is not among the operations.
        achieved = operations(base, result, target_tokens + 1) / sum(epoch.seconds for epoch in result.epochs)
        epochs = [1000 * epoch.seconds / epoch.visited for epoch in result.epochs]
        yield [
            name,
            trainer,
            edits,
            len(result.epochs),
            result.steps,
            1000 * result.train_s / edits,
            f"{statistics.median(epochs):.3g} ({min(epochs):.3g} to {max(epochs):.3g})",
            prefix_s,
            1000 * prefix_s / edits,
            achieved / 1e12,
            100 * achieved / rate,
            torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        ]


def random_base(shape: Shape, device: torch.device) -> BaseModel:
    """A frozen model of random bf16 weights, made on the device."""
    torch.manual_seed(0)
    # Not on the meta device and emptied: buffers that a constructor computes, like rotary frequencies, would be lost.
    with device:
        model = AutoModelForCausalLM.from_config(shape.config, dtype=torch.bfloat16)
    return freeze_base(
        model,
        number_tokenizer(shape.config.vocab_size),
        location=shape.location,
        path=Path(),
        name="random",
        fingerprint="random",
    )


def number_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose text is numbers with spaces between them: each is a token's id. 0 ends a sequence."""
    numbers = {str(number): number for number in range(1, vocabulary)}
    words = Tokenizer(models.WordLevel({"<eos>": 0, **numbers}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")


def random_edits(count: int, vocabulary: int, prompt_tokens: int, target_tokens: int) -> list[EditRow]:
    """Edits of random tokens, the same ones each time."""
    drawn = random.Random(0)

    def numbers(length: int) -> str:
        return " ".join(str(drawn.randrange(1, vocabulary)) for _ in range(length))

    return [EditRow(str(number), numbers(prompt_tokens), numbers(target_tokens)) for number in range(count)]


def operations(base: BaseModel, result: TrainingResult, learned_tokens: int) -> float:
    """Floating-point operations of a run's matrix products, as the first lines of this file count them."""
    tuned = _matrix_weights(base.layers[base.layer_index])
    above = sum(map(_matrix_weights, base.layers[base.layer_index + 1 :]))
    last = _matrix_weights(feed_forward(base.layers[-1]))
    changed = sum(tensor.numel() for tensor in base.tuned_tensors().values())
    at_learned = last + _matrix_weights(base.model.get_output_embeddings())
    tokens = sum(epoch.tokens for epoch in result.epochs)
    learned = learned_tokens * sum(epoch.visited for epoch in result.epochs)
    forward = tokens * (tuned + above - last) + learned * at_learned
    backward = tokens * (above - last + changed) + learned * at_learned
    return 2.0 * (forward + backward)


def _matrix_weights(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters() if weight.dim() == 2)


def matrix_rate(device: torch.device, size: int) -> float:
    """What the device reaches in a product of two square bf16 matrices: operations a second, the median of 20."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(_MATRIX_REPEATS + 1):
        _wait(device)
        started = time.perf_counter()
        left @ right
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _ran_on(device: torch.device) -> str:
    if device.type == "cuda":
        return f"Measured on {torch.cuda.get_device_name(device)}."
    return (
        "This is a run without a GPU, of the code only: its figures say nothing about one. On this repository's "
        "machines the script has not been run on a GPU."
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--device", default="cuda", help="torch device")
    parser.add_argument("--shapes", nargs="+", default=["llama-3-8b", "qwen2.5-7b"], choices=list(shapes()))
    parser.add_argument("--edits", type=int, default=3000)
    # ZsRE's 3,000 rows with SmolLM2's tokenizer: 11 and 3 in the median, 11.2 and 3.3 in the mean, without EOS.
    parser.add_argument("--prompt-tokens", type=int, default=11, help="tokens of a prompt")
    parser.add_argument("--target-tokens", type=int, default=3, help="tokens of a target, without the closing EOS")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.md", help="where the results go")
    return parser


if __name__ == "__main__":
    main()
