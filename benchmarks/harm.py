"""Measures where in a text a version predicts worse than the base: at tokens that the calibration text has, or has not.

    .venv/bin/python -m benchmarks.harm --model FOLDER --data FOLDER --delta VERSION [--location auto]

The text is WikiText-2's; a delta is what `benchmarks/capability.py` takes, such as `frontier.py --save` keeps. Harm
is the sum over tokens of the nats that each lost, what others gained taken off.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.capability import PREFIX_BYTES, read_delta
from benchmarks.datasets import wikitext
from benchmarks.report import RESULTS, Results
from worker.evaluation.capability import windows
from worker.model import load_base
from worker.training.calibration import calibration_sequences
from worker.training.prefix import PrefixCache
from worker.training.score import TokenScores, score

_AT_MOST = (0, 2, 8, 32, 128)
_ROWS = ("never", "1 or 2 times", "3 to 8 times", "9 to 32 times", "33 to 128 times", "more than 128 times")


def main() -> None:
    """Score the text with the base's tensors and with the delta's, and compare token by token."""
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    base = load_base(str(options.model), options.location)
    tensors = read_delta(options.delta, base)
    task = wikitext(options.data)
    sequences = [window for text in task.texts for window in windows(base, text, task.window_tokens)]
    prefix = PrefixCache(capacity_bytes=PREFIX_BYTES)
    lost = _nats(score(base, tensors, prefix, sequences)) - _nats(score(base, base.tuned_tensors(), prefix, sequences))
    read = [token for one in sequences for token in one.token_ids[one.prompt_tokens - 1 : -1]]
    known = Counter(token for one in calibration_sequences(base.tokenizer) for token in one.token_ids)
    results = Results(
        options.out,
        "Where the harm is",
        f"`benchmarks/harm.py`: {options.delta.name} at {base.location}, {task.name}. The calibration text has "
        f"{known.total()} tokens of {len(known)} kinds. Perplexity ratio {lost.mean().exp().item():.4f}; the hundredth "
        f"of the tokens that lost most has {_share_of_the_worst(lost, 100):.2f} of the harm.",
    )
    results.table(
        ["the token read is in the calibration text", "share of the tokens", "share of the harm", "nats a token"]
    )
    for row in shares(lost, torch.tensor([known[token] for token in read])):
        results.add(row)


def shares(lost: torch.Tensor, counts: torch.Tensor) -> list[tuple[str, float, float, float]]:
    """The rows of the table.

    Args:
        lost: [tokens] fp64, what each lost, nats.
        counts: [tokens] int64, how often the calibration text has the token read before each.
    """
    of_each = torch.bucketize(counts, torch.tensor(_AT_MOST))
    chosen = [(name, lost[of_each == number]) for number, name in enumerate(_ROWS)]
    return [(name, len(one) / len(lost), (one.sum() / lost.sum()).item(), one.mean().item()) for name, one in chosen]


def _nats(scores: Sequence[TokenScores]) -> torch.Tensor:
    return torch.cat([one.nats for one in scores]).double()


def _share_of_the_worst(lost: torch.Tensor, part: int) -> float:
    """What the `part`th part of the tokens, those that lost most, have of the whole harm."""
    return (lost.sort(descending=True).values[: len(lost) // part].sum() / lost.sum()).item()


def _parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m benchmarks.harm")
    options.add_argument("--model", required=True, type=Path, help="folder of the base model")
    options.add_argument("--data", type=Path, required=True, help="folder of the data sets: see benchmarks/datasets.py")
    options.add_argument("--delta", type=Path, required=True, help="version to measure")
    options.add_argument("--location", default="auto", help="tuned parameter, module or layer")
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch")
    options.add_argument("--out", type=Path, default=RESULTS / "harm.md", help="where the results go")
    return options


if __name__ == "__main__":
    main()
