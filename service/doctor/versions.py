"""What is well and what is not in the version store, beside the registry: a pure function of what was found."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from service.doctor.checks import Finding, Level
from service.schemas import VersionRecord, VersionState


@dataclass(frozen=True)
class StoreState:
    """What is in the version store.

    Attributes:
        whole: numbers of the versions whose files are there, in their length.
        leftovers: names of folders that are no versions.
        damaged: what is wrong with the other versions, by number.
    """

    whole: Sequence[int]
    leftovers: Sequence[str] = ()
    damaged: Mapping[int, str] = field(default_factory=dict)


def check_versions(records: Sequence[VersionRecord], active: int | None, store: StoreState | None) -> list[Finding]:
    """What the registry knows is in the version store, and the other way round; None for a store that is no folder."""
    if active is None:
        return [
            Finding(
                "versions", Level.FAIL, "no version is active", "the train worker begins with version 0 when it starts"
            )
        ]
    if store is None:
        return [Finding("versions", Level.OK, f"{len(records)} registered; the store is remote and not looked at")]
    findings = [*_missing(records, active, store), *_damaged(records, store)]
    if unknown := sorted(set(store.whole) - {record.version for record in records}):
        found = f"in the store and not registered: {_listed(unknown)}"
        findings.append(Finding("versions", Level.WARN, found, "errata doctor --repair registers them, unverified"))
    if store.leftovers:
        found = f"{len(store.leftovers)} folders in the store are no whole versions: {_listed(store.leftovers)}"
        findings.append(Finding("versions", Level.WARN, found, "errata doctor --repair removes what no worker writes"))
    if findings:
        return findings
    return [Finding("versions", Level.OK, f"{len(records)} registered, {active} is active; the store agrees")]


def _missing(records: Sequence[VersionRecord], active: int, store: StoreState) -> list[Finding]:
    known = {*store.whole, *store.damaged, *_rejected(records)}
    missing = [record.version for record in records if record.version not in known]
    findings = []
    if active in missing:
        findings.append(
            Finding(
                "versions",
                Level.FAIL,
                f"version {active}, the active one, is not in the store; a node that restarts cannot load it",
                "restore the store's folder, or activate another version: errata versions, errata activate N",
            )
        )
    if others := [number for number in missing if number != active]:
        found = f"registered and not in the store: {_listed(others)}"
        findings.append(
            Finding("versions", Level.FAIL, found, "restore the store's folder, then errata doctor --repair")
        )
    return findings


def _damaged(records: Sequence[VersionRecord], store: StoreState) -> list[Finding]:
    return [
        Finding("versions", Level.FAIL, f"version {number} is damaged in the store: {damage}", "restore its folder")
        for number, damage in store.damaged.items()
        if number not in _rejected(records)
    ]


def _rejected(records: Sequence[VersionRecord]) -> set[int]:
    """Numbers of the versions that nobody asks for any more."""
    return {record.version for record in records if record.state is VersionState.REJECTED}


def _listed(names: Sequence[object]) -> str:
    return ", ".join(str(name) for name in names)
