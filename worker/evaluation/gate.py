"""Decides whether a candidate version may be committed."""

from dataclasses import dataclass

from worker.evaluation.metrics import Metrics


@dataclass(frozen=True)
class Thresholds:
    """The least that a version must reach; defaults from the default model's measurements (benchmarks/results).

    Shares are from 0 to 1. Generalization has no threshold: edits need not have rephrases. Locality has none by
    default: plain fine-tuning of 20 edits leaves 2 to 13 % of the unrelated answers as they were, token for token.
    """

    min_reliability: float = 0.95
    min_locality: float = 0.0
    max_perplexity_ratio: float = 1.5


@dataclass(frozen=True)
class GateDecision:
    """Whether a version passed, and a sentence for each threshold that it missed."""

    passed: bool
    reasons: tuple[str, ...]


def decide(metrics: Metrics, thresholds: Thresholds) -> GateDecision:
    """Compare metrics with thresholds. A NaN misses its threshold."""
    reasons = [
        f"{format_} reliability is {measured.reliability:.3f}, at least {thresholds.min_reliability} is needed"
        for format_, measured in metrics.formats.items()
        if not measured.reliability >= thresholds.min_reliability
    ]
    if not metrics.locality >= thresholds.min_locality:
        reasons.append(f"locality is {metrics.locality:.3f}, at least {thresholds.min_locality} is needed")
    if not metrics.perplexity_ratio <= thresholds.max_perplexity_ratio:
        ratio = metrics.perplexity_ratio
        reasons.append(
            f"perplexity grew by a factor of {ratio:.3f}, at most {thresholds.max_perplexity_ratio} is allowed"
        )
    return GateDecision(passed=not reasons, reasons=tuple(reasons))
