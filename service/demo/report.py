"""The demo's tables."""

from rich.table import Table

from service.answers import STOP, matches
from service.client import Answer
from service.console import one_line, table
from service.demo.judgement import Evidence
from service.demo.timed import Timed
from service.schemas import Format, Run

_QUESTION_CHARS = 46
_ANSWER_CHARS = 22
_PHASES = {
    "encode": "encoding",
    "prefix": "frozen prefix",
    "train": "training",
    "evaluate": "evaluation",
    "commit": "writing the version",
    "load": "loading the version into the node",
    "verify": "verification on the node",
}


def answers_table(evidence: Evidence, form: Format) -> Table:
    """Every question with its four answers in one format; ``=`` marks the target."""
    readings = (evidence.before, evidence.after, evidence.rolled_back, evidence.again)
    rows = [
        (
            _cut(fact.prompt, _QUESTION_CHARS),
            *(_shown(reading[index][form], fact.target) for reading in readings),
        )
        for index, fact in enumerate(evidence.facts)
    ]
    return table(("QUESTION", "BEFORE", "AFTER", "ROLLED BACK", "AGAIN"), rows, fixed=0)


def timings(timed: Timed, run: Run | None) -> Table:
    """What took how long, in seconds."""
    rows: list[tuple[str, str]] = []
    if timed.first_live_s is not None and timed.all_live_s is not None:
        rows.append(("edits acknowledged, until the first was live", _seconds(timed.first_live_s)))
        rows.append(("edits acknowledged, until the last was live", _seconds(timed.all_live_s)))
    if run:
        known = [(name, run.timings[phase]) for phase, name in _PHASES.items() if phase in run.timings]
        rows.extend((f"  of the run: {name}", _seconds(took_s)) for name, took_s in known)
    rows.append(("rollback, the call", _seconds(timed.rollback_s)))
    rows.append(("rollback, until the first whole answer of version 0", _seconds(timed.first_answer_s)))
    rows.append(("activation again, the call", _seconds(timed.activate_s)))
    return table(("WHAT", "SECONDS"), rows, fixed=2)


def _shown(answer: Answer, target: str) -> str:
    mark = "= " if matches(answer.text, target, finished=answer.finish_reason == STOP) else "  "
    return mark + _cut(answer.text, _ANSWER_CHARS)


def _cut(text: str, chars: int) -> str:
    line = one_line(text)
    return line if len(line) <= chars else line[: chars - 1] + "…"


def _seconds(value: float) -> str:
    return f"{value:9.3f}"
