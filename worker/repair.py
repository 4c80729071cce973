"""Brings registry and version store into agreement after a crash or the loss of Redis. The store's manifests win.

Every step may be done again, and beside a run that is under way. ``python -m worker.repair`` is what
`errata doctor --repair` runs.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError
from redis.exceptions import RedisError

from service.errors import ConflictError
from service.manifest import Manifest
from service.schemas import EditError, RunStatus, StoredEdit, VersionRecord, VersionState
from service.settings import Settings
from service.stores import Stores
from worker.delta import DamagedDeltaError, DeltaError, VersionStore
from worker.records import version_record

log = logging.getLogger(__name__)

_LOST = EditError(code="worker_lost", message="the run that had it ended without giving it back")
_FOUND = "found in the version store; no node has verified it since"
_GONE = "its folder is gone from the version store"


@dataclass(frozen=True)
class _Found:
    """A version of the store that the registry does not know."""

    manifest: Manifest
    members: Sequence[str]


@dataclass(frozen=True)
class Repair:
    """Repairs one version store and one Redis."""

    versions: VersionStore
    stores: Stores

    def repair(self) -> list[str]:
        """Do all of it; returns a sentence for each thing that was done or could not be.

        Raises:
            DeltaError: the store cannot be read.
        """
        # The registry is read first: a version that is committed meanwhile is whole by the time the store is read.
        registered = self.stores.registry.all()
        done = self._clean()
        whole = self.versions.versions()
        if 0 not in whole:
            return [*done, "the version store has no version 0; the train worker writes it when it starts"]
        done += self._mark(registered, whole)
        done += self._adopt(whole)
        done += self._begin()
        if given_back := self.stores.edits.unclaim(None, error=_LOST):
            done.append(f"{len(given_back)} edits of runs that are not under way were given back")
        for sentence in done:
            log.warning("repair.found", extra={"what": sentence})
        return done

    def _clean(self) -> list[str]:
        run = self.stores.runs.current()
        uploading = run is not None and run.status is RunStatus.TRAINING and self.stores.runs.leased()
        # Before there is a pointer, a train worker may be writing version 0.
        uploading = uploading or self.stores.registry.active() is None
        return [f"removed {name}, which is no whole version" for name in self.versions.clean(uploading=uploading)]

    def _mark(self, registered: Sequence[VersionRecord], whole: Sequence[int]) -> list[str]:
        done = []
        for record in registered:
            number, there = record.version, record.version in whole
            if not there and record.state not in {VersionState.REJECTED, VersionState.MISSING}:
                self.stores.registry.mark(number, VersionState.MISSING, reason=_GONE)
                done.append(f"version {number} cannot be activated any more: {_GONE}")
            elif there and record.state is VersionState.MISSING:
                self.stores.registry.mark(number, VersionState.COMMITTED, reason=_FOUND)
                done.append(f"version {number} is back: {_FOUND}")
        return done

    def _adopt(self, whole: Sequence[int]) -> list[str]:
        """Edits the newest version first, because its set says which of a prompt stands; versions the oldest first."""
        done: list[str] = []
        found: list[_Found] = []
        base = self.versions.manifest(0)
        for number in sorted(whole, reverse=True):
            if self.stores.registry.exists(number):
                continue
            try:
                manifest, edits = self._read(number, base)
            except (DamagedDeltaError, ValidationError) as error:
                done.append(f"version {number} is in the version store and cannot be taken up: {error}")
                continue
            found.append(_Found(manifest, [edit.id for edit in edits]))
            if restored := self.stores.recovery.restore(edits, number):
                done.append(f"{len(restored)} edits of version {number} were put back")
        return done + [sentence for version in reversed(found) for sentence in self._register(version)]

    def _read(self, number: int, base: Manifest) -> tuple[Manifest, list[StoredEdit]]:
        manifest = self.versions.whole(number)
        if (manifest.base.fingerprint, manifest.location) != (base.base.fingerprint, base.location):
            raise DamagedDeltaError(f"it is of {manifest.base.name} at {manifest.location}")
        return manifest, [StoredEdit.model_validate(edit) for edit in self.versions.edits(number)]

    def _register(self, found: _Found) -> list[str]:
        number = found.manifest.version
        # The base's own tensors are what every node has without a version.
        state = VersionState.COMMITTED if number else VersionState.VERIFIED
        record = version_record(found.manifest, state)
        if number:
            record = record.model_copy(update={"reason": _FOUND})
        try:
            self.stores.registry.commit(record, found.members, token=None)
        except ConflictError:  # its own run came first
            return []
        return [f"version {number} was unknown and is registered"]

    def _begin(self) -> list[str]:
        """Where no version is active Redis is new, or was lost."""
        registry = self.stores.registry
        if registry.active() is not None:
            return []
        usable = [record.version for record in registry.all() if record.state is VersionState.COMMITTED]
        newest = max(usable, default=None)
        run = self.stores.recovery.begin(newest)
        return [f"version {newest} is verified again, by {run}, before it is served"] if run else []


def main() -> int:
    """Repair what the environment names; a line for each thing done."""
    try:
        settings = Settings.from_env()
        done = Repair(VersionStore(settings.store_url), Stores.connect(settings)).repair()
    except (DeltaError, RedisError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.writelines(f"{sentence}\n" for sentence in done or ["there is nothing to repair"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
