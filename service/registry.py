"""VersionRegistry: committed versions, their edit sets, and the one pointer to the active version.

It owns versions. Edit sets are bitmaps over the edits' sequence numbers: 10,000 edits are 1.25 kB a version.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import cast

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.client import NEVER_DECODE

from service.errors import ConflictError, NotFoundError
from service.keys import VersionKeys
from service.lua import Scripts
from service.metrics.catalogue import VERSIONS_JUDGED
from service.metrics.kept import count
from service.runs import LeaseLostError, RunCancelledError
from service.schemas import Activation, Canary, Run, Version, VersionRecord, VersionState

log = logging.getLogger(__name__)


class FencedError(ConflictError):
    """A newer run has begun; this one may not commit."""

    default_code = "fenced"


class OvertakenError(ConflictError):
    """The pointer moved since the caller looked."""

    default_code = "active_version_changed"


class NotVerifiedError(ConflictError):
    """What is not verified cannot be active."""

    default_code = "version_not_verified"


class VersionRegistry:
    """Versions and the active pointer."""

    def __init__(self, redis: Redis, *, events_max: int, clock: Callable[[], float] = time.time) -> None:
        self._redis = redis
        self._keys = VersionKeys()

        scripts = Scripts(redis, events_max=events_max, clock=clock)
        self._next_number = scripts.load("next_number")
        self._commit = scripts.load("commit")
        self._activate = scripts.load("activate")
        self._reject = scripts.load("reject")
        self._mark_verified = scripts.load("mark_verified")

    def next_number(self, run: Run, *, above: int) -> int:
        """A number that no version had or will have; a run that fails leaves a gap.

        Args:
            run: who asks.
            above: the highest number in the version store, which outlives Redis.

        Raises:
            FencedError: the run is not under way any more.
        """
        answer = self._next_number({"run": run.id, "token": run.token, "above": above})
        if answer.get("refused"):
            raise FencedError(f"run {run.id} was replaced")
        return int(answer["number"])

    def commit(self, record: VersionRecord, members: Sequence[str], *, token: int | None) -> None:
        """Makes a version visible whose folder is whole, and hands its run and the run's edits over to verification.

        Args:
            record: what to keep of it.
            members: ids of its edit set.
            token: the run's fencing token; None for what is found in the version store and has no run under way.

        Raises:
            FencedError: the run is not under way any more.
            RunCancelledError: somebody cancelled the run.
            ConflictError: the number is taken.
        """
        payload = {
            "version": record.version,
            "record": record.model_dump_json(),
            "members": list(members),
            "token": token,
            "run": record.run,
        }
        match self._commit(payload).get("refused"):
            case "fenced":
                raise FencedError(f"version {record.version} comes from a run that was replaced")
            case "cancelled":
                raise RunCancelledError(f"run {record.run} was cancelled")
            case "exists":
                raise ConflictError(f"version {record.version} is committed already", code="version_exists")

    def get(self, number: int) -> VersionRecord:
        """One version's record.

        Raises:
            NotFoundError: no such version.
        """
        raw = cast(str | None, self._redis.get(f"{self._keys.version}{number}"))
        if raw is None:
            raise NotFoundError(f"no version {number}", param="version", code="version_not_found")
        return VersionRecord.model_validate_json(raw)

    def exists(self, number: int) -> bool:
        """Whether the version is committed."""
        return bool(self._redis.exists(f"{self._keys.version}{number}"))

    def count(self) -> int:
        """How many versions are committed."""
        return self._redis.zcard(self._keys.versions)

    def page(self, *, after: int | None, limit: int) -> tuple[list[VersionRecord], bool]:
        """Newest first, after the given number; and whether there are more."""
        top = "+inf" if after is None else f"({after}"
        rows = self._redis.zrevrangebyscore(self._keys.versions, top, "-inf", start=0, num=limit + 1)
        numbers = cast(list[str], rows)
        raws = self._redis.mget([f"{self._keys.version}{number}" for number in numbers]) if numbers else []
        found = [VersionRecord.model_validate_json(raw) for raw in cast(list[str], raws)]
        return found[:limit], len(found) > limit

    def all(self) -> list[VersionRecord]:
        """Every version's record, newest first."""
        records: list[VersionRecord] = []
        more = True
        while more:
            page, more = self.page(after=records[-1].version if records else None, limit=1000)
            records.extend(page)
        return records

    def shown(self, record: VersionRecord, *, resident: Sequence[str] = (), canary: Canary | None = None) -> Version:
        """A record as the API shows it."""
        active = self.active()
        return Version(
            **record.model_dump(),
            active=active is not None and active.active == record.version,
            canary=canary if canary and canary.version == record.version else None,
            resident=list(resident),
        )

    def mark(self, number: int, state: VersionState, *, reason: str | None = None) -> None:
        """Records what became of a version."""
        known = self.get(number)
        pipeline = self._redis.pipeline()
        record = known.model_copy(update={"state": state, "reason": reason})
        pipeline.set(f"{self._keys.version}{number}", record.model_dump_json())
        if known.state is not state:
            count(pipeline, VERSIONS_JUDGED, state)
        pipeline.execute()

    def mark_verified(self, number: int, *, run: Run) -> None:
        """Records that a version passed its verification.

        Raises:
            LeaseLostError: its run has ended, or it was rejected or is missing, so another has judged it.
        """
        record = self.get(number).model_copy(update={"state": VersionState.VERIFIED, "reason": None})
        if self._mark_verified({"version": number, "record": record.model_dump_json(), "run": run.id}).get("refused"):
            raise LeaseLostError(f"run {run.id} has ended, or version {number} was rejected or is missing")

    def reject(self, number: int, *, reason: str, run: Run) -> None:
        """Records that a version failed; if it was the canary, it is none from now on.

        Raises:
            LeaseLostError: its run has ended, or it is active, so another has judged it.
        """
        record = self.get(number).model_copy(update={"state": VersionState.REJECTED, "reason": reason})
        payload = {"version": number, "record": record.model_dump_json(), "reason": reason, "run": run.id}
        if self._reject(payload).get("refused"):
            raise LeaseLostError(f"run {run.id} has ended, or version {number} is active")

    def active(self) -> Activation | None:
        """The pointer, or None before version 0 is committed."""
        return _activation(cast(dict[str, str], self._redis.hgetall(self._keys.active)))

    def activate(
        self,
        number: int,
        *,
        expected_active: int | None = None,
        run: Run | None = None,
        promotes: bool = False,
    ) -> Activation:
        """Moves the pointer and ends the canary. Without one, moving the pointer to where it is changes nothing.

        Args:
            number: the version.
            expected_active: which version the caller saw active.
            run: whose version it is; it must be under way, and the pointer where it was when the run began.
            promotes: the version must still be the canary.

        Raises:
            NotFoundError: no such version.
            NotVerifiedError: the version is not verified, or not any more.
            OvertakenError: another version is active, or the pointer moved, than the caller expects.
            LeaseLostError: the run has ended.
        """
        answer = self._activate(
            {
                "version": number,
                "expected_active": expected_active,
                "run": run.id if run else None,
                "expected_epoch": run.epoch_of_activation if run else None,
                "promotes": promotes,
            }
        )
        match answer.get("refused"):
            case "unknown":
                raise NotFoundError(f"no version {number}", param="version", code="version_not_found")
            case "state":
                raise NotVerifiedError(f"version {number} is {answer['state']}, not verified", param="version")
            case "run":
                raise LeaseLostError(f"run {run.id if run else ''} has ended")
            case "active":
                raise OvertakenError(
                    f"version {answer.get('active')} is active, not {expected_active}", param="expected_active"
                )
            case "epoch":
                raise OvertakenError(f"the active version changed meanwhile, to {answer['active']}")
            case "canary":
                raise OvertakenError(f"version {number} is no canary any more")
        log.info("version.activated", extra={"version": number})
        return cast(Activation, self.active())

    def members(self, number: int) -> list[int]:
        """Sequence numbers of a version's edit set, ascending."""
        return _bits(self._bitmap(f"{self._keys.version_edits}{number}"))

    def record_confident(self, number: int, sequences: Sequence[int]) -> None:
        """Keeps which edits, by sequence number, verification saw answered right by a margin at a version."""
        key = f"{self._keys.version_confident}{number}"
        pipeline = self._redis.pipeline()
        pipeline.delete(key)
        for sequence in sequences:
            pipeline.setbit(key, sequence, 1)
        pipeline.execute()

    def confident(self, number: int) -> list[int]:
        """Sequence numbers that were recorded so, ascending; none for a version that was never verified."""
        return _bits(self._bitmap(f"{self._keys.version_confident}{number}"))

    def containing(self, sequence: int) -> list[int]:
        """Numbers of the versions whose edit set has this sequence number, ascending."""
        numbers = [int(number) for number in cast(list[str], self._redis.zrange(self._keys.versions, 0, -1))]
        pipeline = self._redis.pipeline(transaction=False)
        for number in numbers:
            pipeline.getbit(f"{self._keys.version_edits}{number}", sequence)
        return [number for number, bit in zip(numbers, pipeline.execute(), strict=True) if bit]

    def difference(self, left: int, right: int) -> tuple[list[int], list[int]]:
        """Sequence numbers only in the left version's edit set, and only in the right one's.

        Raises:
            NotFoundError: no such version.
        """
        sets = []
        for number in (left, right):
            self.get(number)
            sets.append(set(self.members(number)))
        return sorted(sets[0] - sets[1]), sorted(sets[1] - sets[0])

    def _bitmap(self, key: str) -> bytes:
        raw = self._redis.execute_command("GET", key, **{NEVER_DECODE: True})
        return cast(bytes | None, raw) or b""


def _bits(bitmap: bytes) -> list[int]:
    return [8 * index + bit for index, byte in enumerate(bitmap) for bit in range(8) if byte & (0x80 >> bit)]


class VersionReader:
    """What the gateway asks about versions for every request; no thread waits for the answer."""

    def __init__(self, redis: AsyncRedis) -> None:
        self._redis = redis
        self._keys = VersionKeys()

    async def active(self) -> Activation | None:
        """The pointer, or None before version 0 is committed."""
        return _activation(await cast(Awaitable[dict[str, str]], self._redis.hgetall(self._keys.active)))

    async def is_verified(self, number: int) -> bool:
        """Whether there is such a version and it may be served."""
        raw = cast(str | None, await self._redis.get(f"{self._keys.version}{number}"))
        return raw is not None and VersionRecord.model_validate_json(raw).state is VersionState.VERIFIED


def _activation(fields: Mapping[str, str]) -> Activation | None:
    if not fields:
        return None
    previous = int(fields["previous"])
    active = int(fields["version"])
    return Activation(
        active=active,
        previous=None if previous == active else previous,
        epoch=int(fields["epoch"]),
        canary=int(fields["canary"]) if "canary" in fields else None,
    )
