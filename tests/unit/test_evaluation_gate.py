import math

import pytest

from service.schemas import Format
from worker.evaluation.gate import Thresholds, decide
from worker.evaluation.metrics import FormatMetrics, Metrics

THRESHOLDS = Thresholds(min_reliability=0.9, min_locality=0.5, max_perplexity_ratio=1.5)


def measured(raw: float = 1.0, chat: float = 1.0, locality: float = 1.0, perplexity: float = 40.0) -> Metrics:
    formats = {Format.RAW: FormatMetrics(raw, None), Format.CHAT: FormatMetrics(chat, 0.0)}
    return Metrics(formats, locality, perplexity, base_perplexity=40.0, edits_measured=1, evaluate_s=0.0)


def test_exactly_at_every_threshold_passes() -> None:
    decision = decide(measured(raw=0.9, chat=0.9, locality=0.5, perplexity=60.0), THRESHOLDS)
    assert decision.passed
    assert decision.reasons == ()


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        (measured(raw=0.89), "raw reliability is 0.890, at least 0.9 is needed"),
        (measured(chat=0.89), "chat reliability is 0.890, at least 0.9 is needed"),
        (measured(locality=0.4), "locality is 0.400, at least 0.5 is needed"),
        (measured(perplexity=61.0), "perplexity grew by a factor of 1.525, at most 1.5 is allowed"),
        (measured(perplexity=math.nan), "perplexity grew by a factor of nan, at most 1.5 is allowed"),
    ],
)
def test_each_missed_threshold_is_a_reason(metrics: Metrics, reason: str) -> None:
    decision = decide(metrics, THRESHOLDS)
    assert not decision.passed
    assert decision.reasons == (reason,)


def test_all_reasons_are_given() -> None:
    assert len(decide(measured(0, 0, 0, 1000), THRESHOLDS).reasons) == 4
