"""``errata-train``: the trainer for a file of edits, without the service. Expected failures are one line and exit 2."""

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from service.console import one_line
from service.defaults import PREFIX_CACHE_BYTES
from service.logs import JsonFormatter
from service.schemas import Format
from worker.checkpoint import CheckpointError
from worker.delta import DeltaError
from worker.distributed import own_device, processes, rank
from worker.experiment import Experiment, run_experiment
from worker.placement import LOWER_ON_DISK
from worker.training.attention import UnsupportedAttentionError
from worker.training.config import PLAIN, Pipeline
from worker.training.errors import TrainingError
from worker.training.partial_forward import UnsupportedLayerError
from worker.training.snapshot import SnapshotMismatchError

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# What the paper's procedure does without: field of TrainingConfig, option.
_ADDITIONS = {
    "preserve": "--preserve",
    "decay": "--decay",
    "formats": "--formats",
    "token_threshold": "--token-threshold",
}
_USAGE_ERRORS = (
    CheckpointError,
    DeltaError,
    OSError,
    SafetensorError,
    SnapshotMismatchError,
    UnsupportedAttentionError,
    UnsupportedLayerError,
    ValueError,
    torch.OutOfMemoryError,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 2 for what its caller can mend, 1 for a training without result."""
    disable_progress_bar()
    set_verbosity_error()
    options = _parser().parse_args(arguments)
    try:
        with _parts_heard():
            report = run_experiment(_experiment(options))
    except _USAGE_ERRORS as error:
        return _fail(str(error), 2)
    except TrainingError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on behind the last epoch that it kept", 130)
    if report:
        sys.stdout.write(json.dumps(report) + "\n" if options.json else _summary(report))
    return 0


@contextmanager
def _parts_heard() -> Iterator[None]:
    """What the worker's parts log, such as the location that `auto` chose, on standard error of the first process."""
    logger, handler = logging.getLogger("worker"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    level = logger.level
    logger.setLevel(logging.INFO if rank() == 0 else logging.ERROR)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _experiment(options: argparse.Namespace) -> Experiment:
    """Raises ValueError for options that contradict each other."""
    changes = _changes(options)
    for field, option in _ADDITIONS.items():
        if options.plain and changes.get(field, getattr(PLAIN, field)) != getattr(PLAIN, field):
            raise ValueError(f"--plain is the paper's procedure without Errata's additions: it excludes {option}")
    if options.device and options.device_map == "auto":
        raise ValueError("--device-map auto chooses the devices: it excludes --device")
    if processes() > 1 and (options.device_map == "auto" or (options.device or "").startswith("cuda:")):
        raise ValueError(
            "under torchrun each process has a GPU of its own: it excludes --device-map auto and --device cuda:N"
        )
    return Experiment(
        edits=options.edits,
        out=options.out,
        model=options.model,
        location=options.location,
        plain=options.plain,
        changes=changes,
        limit=options.limit,
        device=options.device,
        device_map=options.device_map,
        dtype=_DTYPES[options.dtype],
        cache=options.cache,
        cache_bytes=options.cache_bytes,
        evaluate=not options.no_evaluate,
    )


def _changes(options: argparse.Namespace) -> dict[str, Any]:
    given = {
        "learning_rate": options.lr,
        "batch_size": options.batch_size,
        "max_epochs": options.epochs,
        # Whoever names the epochs wants no more of them, however few steps they make.
        "min_steps": None if options.epochs is None else 0,
        "loss_threshold": options.loss_threshold,
        "token_threshold": options.token_threshold,
        "pipeline": options.pipeline and Pipeline(options.pipeline),
        "skip_learned": False if options.visit_all else None,
        "preserve": options.preserve,
        "decay": options.decay,
        "random_prefixes": options.random_prefixes,
        "seed": options.seed,
        "formats": options.formats,
        "max_tokens": options.max_tokens,
    }
    return {field: value for field, value in given.items() if value is not None}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="errata-train",
        description="Train a file of edits into one place of a model, without the service.",
        epilog="Under torchrun, every process computes a part of each batch.",
    )
    parser.add_argument("edits", type=Path, metavar="EDITS", help="ZsRE, CounterFact, WikiBigEdit or Errata's own JSON")
    parser.add_argument("--model", required=True, metavar="M", help="Hugging Face folder or hub id")
    parser.add_argument("--location", default="auto", metavar="L", help="parameter, module or layer; default: auto")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="version folder, and what a restart needs"
    )
    parser.add_argument("--plain", action="store_true", help="the paper's procedure and settings, nothing else")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.add_argument("--no-evaluate", action="store_true", help="train only; decoding from disk is slow")
    parser.add_argument("--limit", type=_count, metavar="N", help="the first N rows of the file only")
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="what models need once ever; default: errata in the user's cache"
    )
    parser.add_argument(
        "--cache-bytes", type=_count, default=PREFIX_CACHE_BYTES, metavar="N", help="bound on its prefixes"
    )
    parser.add_argument("--device", type=_device, metavar="D", help="default: CUDA if present")
    parser.add_argument("--device-map", choices=("auto", LOWER_ON_DISK), help="for a model larger than the device")
    parser.add_argument(
        "--dtype",
        choices=tuple(_DTYPES),
        default="bfloat16",
        help="of the version, and computed in where the device can",
    )
    _add_training_options(parser.add_argument_group("training", "defaults: the paper's for its models, else measured"))
    return parser


def _add_training_options(group: Any) -> None:
    group.add_argument("--lr", type=float, metavar="X", help="Adam's step size")
    group.add_argument("--batch-size", type=int, metavar="N", help="sequences per step")
    group.add_argument("--epochs", type=int, metavar="N", help="most epochs, counted in visits per edit")
    group.add_argument("--loss-threshold", type=float, metavar="X", help="learned: mean loss under it, nats")
    group.add_argument("--token-threshold", type=float, metavar="X", help="learned: worst token under it, nats")
    group.add_argument("--pipeline", choices=tuple(Pipeline), help="order of training")
    group.add_argument("--visit-all", action="store_true", help="every epoch over all edits, learned or not")
    group.add_argument("--preserve", type=float, metavar="X", help="strength of preservation, 0 for none")
    group.add_argument("--decay", type=float, metavar="X", help="pulls the update towards nothing, 0 for none")
    group.add_argument("--random-prefixes", type=int, metavar="N", help="copies of each prompt behind other text")
    group.add_argument("--formats", type=_formats, metavar="F,F", help=f"of {', '.join(Format)}; default: all")
    group.add_argument("--max-tokens", type=int, metavar="N", help="longest sequence")
    group.add_argument("--seed", type=int, metavar="N", help="of the shuffles")


def _count(text: str) -> int:
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be positive, not {count}")
    return count


def _device(text: str) -> str:
    try:
        torch.zeros(1, device=own_device(text))
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"there is no device {text!r}") from error
    return text


def _formats(text: str) -> tuple[Format, ...]:
    try:
        return tuple(Format(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of {', '.join(Format)}") from error


def _summary(report: dict[str, Any]) -> str:
    names = (
        "version",
        "location",
        "stopped",
        "epochs",
        "steps",
        "train_seconds",
        "reliability",
        "generalization",
        "locality",
    )
    shown = {name: report[name] for name in (*names, "perplexity_ratio") if report[name] is not None}
    values = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in shown.items()}
    return "".join(f"{name:<17} {value}\n" for name, value in values.items())


def _fail(message: str, status: int) -> int:
    # What one of several processes fails by, the first may never hear of.
    who = f"process {rank()}: " if processes() > 1 else ""
    sys.stderr.write(f"errata-train: {who}{one_line(message)}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
