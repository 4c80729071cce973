"""Decides whether a candidate version may be committed."""

from dataclasses import dataclass

from worker.evaluation.metrics import Metrics


@dataclass(frozen=True)
class Thresholds:
    """The least that a version must reach. Shares are from 0 to 1.

    Generalization has no threshold: edits need not have rephrases.
    """

    min_reliability: float
    min_locality: float
    max_perplexity_ratio: float


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
