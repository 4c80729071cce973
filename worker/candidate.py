"""A candidate for a version: trained, measured and let through by the gate; and which edits keep it from that."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from service.schemas import Edit
from service.store import Claim
from worker.bisection import culprits
from worker.evaluation.metrics import Metrics
from worker.run_training import TrainedRun
from worker.training.errors import TrainingDivergedError

log = logging.getLogger(__name__)

_MOST_CULPRITS = 3


class GateRejectedError(Exception):
    """The candidate is not good enough; the message says in what."""


EditsFault = TrainingDivergedError | GateRejectedError
"""What edits can be at fault for; whatever else ends a run is the machine's doing."""


@dataclass(frozen=True)
class Candidate:
    """What training gave, and what it is worth."""

    trained: TrainedRun
    metrics: Metrics


@dataclass(frozen=True)
class Isolated:
    """The edits at fault, and the candidate without them; None if there is none or it brings nothing new."""

    culprits: Sequence[Edit]
    candidate: Candidate | None


def isolate(claim: Claim, fault: EditsFault, attempt: Callable[[Claim], Candidate]) -> Isolated | None:
    """Find the new edits that are at fault, by training without some of them.

    None if there are none: what was there before fails by itself, or there is only one new edit, which is tried again
    as often as any. Raises what `attempt` does, but for another such fault.

    Args:
        claim: what was trained.
        fault: how that ended.
        attempt: makes a candidate of a part of the claim, or raises such a fault.
    """
    trials = _Trials(claim, attempt)
    if len(trials.new) < 2:
        return None
    named = fault.edit_ids if isinstance(fault, TrainingDivergedError) else frozenset()
    unnamed = [edit for edit in trials.new if edit.id not in named]
    if unnamed and len(unnamed) < len(trials.new) and not trials.fails(unnamed):
        return Isolated([edit for edit in trials.new if edit.id in named], trials.passed)
    if trials.fails([]):
        return None
    found, passes = culprits(trials.new, trials.fails, most=_MOST_CULPRITS)
    everything = len(found) == len(trials.new)
    return Isolated(found, trials.passed if passes and not everything else None)


class _Trials:
    """Trains what was there before with some of what is new, and remembers the last candidate that passed."""

    def __init__(self, claim: Claim, attempt: Callable[[Claim], Candidate]) -> None:
        claimed = set(claim.claimed)
        self._old = [edit for edit in claim.members if edit.id not in claimed]
        self._attempt = attempt
        self.new = [edit for edit in claim.members if edit.id in claimed]
        self.passed: Candidate | None = None

    def fails(self, some: Sequence[Edit]) -> bool:
        members = [*self._old, *some]
        if not members:  # the base itself
            return False
        try:
            self.passed = self._attempt(Claim(members, [edit.id for edit in some]))
        except (TrainingDivergedError, GateRejectedError) as error:
            log.info("run.trial_failed", extra={"new_edits": len(some), "reason": str(error)})
            return True
        log.info("run.trial_passed", extra={"new_edits": len(some)})
        return False
