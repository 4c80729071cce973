"""What an edit in a status may become (design.md, decision records 0003, 0018, 0019); everything else is refused."""

from collections.abc import Mapping

from service.schemas import EditStatus

TRANSITIONS: Mapping[EditStatus, frozenset[EditStatus]] = {
    EditStatus.PROPOSED: frozenset({EditStatus.QUEUED, EditStatus.RETRACTED}),
    EditStatus.QUEUED: frozenset({EditStatus.TRAINING, EditStatus.SUPERSEDED, EditStatus.RETRACTING}),
    EditStatus.TRAINING: frozenset(
        {EditStatus.TRAINED, EditStatus.QUEUED, EditStatus.FAILED, EditStatus.SUPERSEDED, EditStatus.RETRACTING}
    ),
    EditStatus.TRAINED: frozenset(
        {
            EditStatus.LIVE,
            EditStatus.HELD,
            EditStatus.QUEUED,
            EditStatus.FAILED,
            EditStatus.SUPERSEDED,
            EditStatus.RETRACTING,
        }
    ),
    EditStatus.LIVE: frozenset({EditStatus.HELD, EditStatus.SUPERSEDED, EditStatus.RETRACTING}),
    EditStatus.HELD: frozenset(
        {EditStatus.TRAINED, EditStatus.LIVE, EditStatus.QUEUED, EditStatus.SUPERSEDED, EditStatus.RETRACTING}
    ),
    EditStatus.FAILED: frozenset({EditStatus.SUPERSEDED, EditStatus.RETRACTING}),
    EditStatus.SUPERSEDED: frozenset({EditStatus.LIVE, EditStatus.RETRACTING}),
    EditStatus.RETRACTING: frozenset({EditStatus.RETRACTED}),
    EditStatus.RETRACTED: frozenset(),
}
TABLE: Mapping[str, Mapping[str, bool]] = {
    status: dict.fromkeys(allowed, True) for status, allowed in TRANSITIONS.items()
}
"""The transitions as the scripts look them up."""
