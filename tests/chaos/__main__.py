"""The chaos test in its full form: a table of faults, and what must not have happened behind it.

    .venv/bin/python -m tests.chaos [--seed 1] [--faults 60] [--minutes 20] [--out benchmarks/results/chaos.md]

Exit 1 if anything was lost or wrong, an edit did not come to rest, or there was no time for all faults.
"""

import argparse
import logging
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import Random

from benchmarks.report import RESULTS, Results
from tests.chaos.campaign import Injected, Outcome, carry_out
from tests.chaos.faults import FAULTS
from tests.chaos.world import world_of_its_own

# Faults make runs fail, and behind eight failures in a row the next one waits for two minutes (service.triggers).
_REST_WITHIN_S = 600.0
_PAUSE_S = 3.0
_COLUMNS = (
    "fault",
    "times",
    "answers again, s: median",
    "most",
    "edits at rest, s: median",
    "most",
)


def main() -> int:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="of the order of faults, what they hit, and the traffic")
    parser.add_argument("--faults", type=int, default=60, help="how many")
    parser.add_argument("--minutes", type=float, default=20, help="no fault begins later than that")
    parser.add_argument("--only", nargs="*", default=list(FAULTS), choices=list(FAULTS), help="kinds")
    parser.add_argument("--out", type=Path, default=RESULTS / "chaos.md")
    options = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("tests.chaos").setLevel(logging.INFO)
    about = (
        f"`python -m tests.chaos --seed {options.seed}`: a stack on one machine under edits, retractions, rollbacks, "
        "activations and questions without a pause. Seconds are counted from the end of a fault: until the stack is "
        "ready and a user is answered, and until every edit that was acknowledged before is at rest, which the faults "
        "that follow delay."
    )
    results = Results(options.out, "Faults injected into a running stack", about)
    with (
        tempfile.TemporaryDirectory(prefix="errata-chaos-") as home,
        world_of_its_own(Path(home), Random(options.seed)) as world,
    ):
        outcome = carry_out(
            world,
            seed=options.seed,
            kinds=options.only,
            count=options.faults,
            longest_s=60 * options.minutes,
            rest_within_s=_REST_WITHIN_S,
            pause_s=_PAUSE_S,
        )
    if len(outcome.injected) < options.faults:
        outcome.wrong.append(f"{len(outcome.injected)} of {options.faults} faults were injected in time")
    _tell(outcome, results)
    return 1 if outcome.wrong else 0


def _tell(outcome: Outcome, results: Results) -> None:
    results.table(_COLUMNS)
    for kind in FAULTS:
        if faults := [fault for fault in outcome.injected if fault.kind == kind]:
            results.add([kind, *_row(faults)])
    results.add(["all", *_row(outcome.injected)])
    counted = "; ".join(f"{name}: {number}" for name, number in sorted(outcome.counts.items()))
    results.say(f"{counted}.")
    results.say("\n".join(f"- WRONG: {what}" for what in outcome.wrong) or "Nothing was lost, and nothing was wrong.")


def _row(faults: Sequence[Injected]) -> list[object]:
    row: list[object] = [len(faults)]
    for values in ([fault.answers_s for fault in faults], [fault.rest_s for fault in faults]):
        known = [value for value in values if value is not None]
        row += [statistics.median(known), max(known)] if known else [None, None]
    return row


if __name__ == "__main__":
    sys.exit(main())
