"""EditStore: what changes edits.

It owns them. It does not know what a version or a run is beyond their numbers, ids and bitmaps.
"""

import json
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from service.digest import sha256_of
from service.edit_reader import EditReader, edit_of
from service.errors import BusyError, ConflictError, InvalidRequestError, OwnProposalError
from service.logs import of_edits
from service.lua import Scripts
from service.runs import LeaseLostError, unclaim_terms
from service.schemas import Edit, EditError, EditRequest, EditStatus, Format, FormatOutcome, normalise_text
from service.tracing import outgoing

log = logging.getLogger(__name__)

# A queue that is full of edits is emptied by whole runs.
_FULL_RETRY_S = 30


@dataclass(frozen=True)
class Idempotency:
    """A client's key and the digest of what it sent with it."""

    key: str
    body: str

    @classmethod
    def of(cls, key: str, route: str, body: bytes, *, part: int = 0) -> "Idempotency":
        """Hashes a key and the canonical body that came with it.

        Args:
            key: what the client sent; clients of other API keys may send the same.
            route: where to.
            body: what it means.
            part: which one, where the parts of a body are stored one by one.
        """
        # No header has a NUL in it, so this is nobody's own key.
        return cls(key=sha256_of(f"{key}\0{part}" if part else key), body=sha256_of(route.encode() + b"\0" + body))


@dataclass(frozen=True)
class Claim:
    """What a run trains: the whole cumulative set, of which some edits are new."""

    members: list[Edit]
    claimed: list[str]

    @property
    def new(self) -> list[Edit]:
        """The new ones of its members."""
        claimed = set(self.claimed)
        return [edit for edit in self.members if edit.id in claimed]


class EditStore(EditReader):
    """The cumulative edit store."""

    def __init__(
        self,
        redis: Redis,
        *,
        events_max: int,
        idempotency_ttl_s: int,
        max_attempts: int,
        queue_max_edits: int,
        review: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(redis)
        self._clock = clock
        self._idempotency_ttl_s = idempotency_ttl_s
        self._max_attempts = max_attempts
        self._queue_max_edits = queue_max_edits
        self._submitted = EditStatus.PROPOSED if review else EditStatus.QUEUED

        scripts = Scripts(redis, events_max=events_max, clock=clock)
        self._submit = scripts.load("submit")
        self._move = scripts.load("move")
        self._claim = scripts.load("claim")
        self._set_aside = scripts.load("set_aside")
        self._record_verification = scripts.load("record_verification")
        self._unclaim = scripts.load("unclaim")
        self._retract = scripts.load("retract")
        self._approve = scripts.load("approve")
        self._release = scripts.load("release")
        self._settle = scripts.load("settle")

    def submit(self, requests: Sequence[EditRequest], idempotency: Idempotency | None = None) -> list[Edit]:
        """Stores corrections, all or none, and supersedes older ones of the same prompt with another target.

        Under review they are stored as proposed, and supersede nothing until they are approved.

        Args:
            requests: what to store.
            idempotency: the client's key, if it sent one.

        Returns the stored edits; for a known idempotency key those stored the first time.

        Raises:
            InvalidRequestError: the idempotency key came before with another body.
            BusyError: so many edits wait to be learned that these would be too many.
        """
        return self._accepted(self._submit(self._submission(requests, idempotency)))

    async def submit_awaited(
        self, redis: AsyncRedis, requests: Sequence[EditRequest], idempotency: Idempotency | None = None
    ) -> list[Edit]:
        """``submit`` over another client, which no thread waits for."""
        return self._accepted(await self._submit.awaited(redis, self._submission(requests, idempotency)))

    def _submission(self, requests: Sequence[EditRequest], idempotency: Idempotency | None) -> dict[str, Any]:
        now = int(self._clock())
        once = None
        if idempotency:
            once = {"key": idempotency.key, "body": idempotency.body, "ttl_s": self._idempotency_ttl_s}
        return {
            "edits": [_new(request, now) for request in requests],
            "idempotency": once,
            "status": self._submitted,
            "queue_max_edits": self._queue_max_edits,
            **outgoing(),
        }

    def _accepted(self, answer: Mapping[str, Any]) -> list[Edit]:
        if answer.get("reused"):
            raise InvalidRequestError(
                "this Idempotency-Key came before with another body",
                param="Idempotency-Key",
                code="idempotency_key_reused",
            )
        if "waiting" in answer:
            raise BusyError(
                f"{answer['waiting']} edits wait to be learned, {self._queue_max_edits} may; repeat the request later",
                retry_after_s=_FULL_RETRY_S,
                code="queue_full",
            )
        edits = [edit_of(fields) for fields in answer["edits"]]
        log.info("edits.accepted", extra=of_edits(edits))
        return edits

    def move(self, edit_id: str, to: EditStatus, **fields: str | int) -> Edit:
        """Moves one edit.

        Raises:
            NotFoundError: no such edit.
            ConflictError: the table refuses.
        """
        self.get(edit_id)
        if refused := self._move({"id": edit_id, "to": to, "fields": fields}).get("refused"):
            raise ConflictError(f"an edit that is {refused} cannot become {to}", param="id", code="invalid_transition")
        return self.get(edit_id)

    def retract(self, edit_id: str) -> Edit:
        """Takes an edit out of the cumulative set; a second time changes nothing.

        Raises:
            NotFoundError: no such edit.
        """
        self.get(edit_id)
        self._retract({"id": edit_id})
        self.settle()
        return self.get(edit_id)

    def approve(self, edit_id: str) -> Edit:
        """Lets a proposed edit join the cumulative set, on behalf of somebody other than its proposer.

        Raises:
            NotFoundError: no such edit.
            ConflictError: it is not proposed.
            OwnProposalError: whoever approves it proposed it.
        """
        self.get(edit_id)
        answer = self._approve({"id": edit_id})
        if refused := answer.get("refused"):
            raise ConflictError(f"edit {edit_id} is {refused}, not proposed", param="id", code="edit_not_proposed")
        if answer.get("own"):
            raise OwnProposalError(f"edit {edit_id} waits for the approval of another key than its proposer's")
        return self.get(edit_id)

    def release(self, edit_id: str) -> Edit:
        """Lets a held edit join the cumulative set again, in the place of what it once superseded.

        Raises:
            NotFoundError: no such edit.
            ConflictError: it is not held.
        """
        self.get(edit_id)
        if refused := self._release({"id": edit_id}).get("refused"):
            raise ConflictError(f"edit {edit_id} is {refused}, not held", param="id", code="edit_not_held")
        return self.get(edit_id)

    def claim(self, run: str) -> Claim:
        """Gives every queued edit to a run; returns the whole set that it trains, oldest first.

        Raises:
            LeaseLostError: the run was taken over.
        """
        # Whoever moved the pointer may not have settled yet; what it rolled back must not be claimed as live.
        self.settle()
        answer = self._claim({"run": run})
        if answer.get("lost"):
            raise LeaseLostError(f"run {run} was taken over")
        return Claim(self.get_many(answer["members"]), answer["claimed"])

    def set_aside(self, run: str, token: int | None, edit_ids: Sequence[str], error: EditError) -> list[str]:
        """Edits that a run fails by are `failed`; returns those that were still wanted.

        Args:
            run: the run that found them out.
            token: its fencing token.
            edit_ids: the edits.
            error: what they did.

        Raises:
            LeaseLostError: the run was taken over.
        """
        payload = {"run": run, "token": token, "ids": list(edit_ids), "error": error.model_dump_json()}
        answer = self._set_aside(payload)
        if answer.get("lost"):
            raise LeaseLostError(f"run {run} was taken over")
        return cast(list[str], answer["moved"])

    def record_verification(self, run: str, outcomes: Mapping[str, Mapping[Format, FormatOutcome]]) -> None:
        """Keeps what nodes answered to edits, by their ids, at the version of a run.

        ``settle`` decides by it once the version is active. Of edits that the run has not any more nothing is kept.
        """
        edits = {
            edit_id: {
                "verified": json.dumps({name: outcome.model_dump() for name, outcome in by_format.items()}),
                "verdict": "matched" if by_format and all(one.matched for one in by_format.values()) else "mismatch",
            }
            for edit_id, by_format in outcomes.items()
        }
        self._record_verification({"run": run, "edits": edits})

    def unclaim(
        self,
        run: str | None,
        *,
        error: EditError | None = None,
        refund: bool = False,
        trained_to: EditStatus = EditStatus.QUEUED,
    ) -> list[str]:
        """Ends a run's hold on its edits: what is not live is queued again, or fails if its attempts are used up.

        Returns the ids that moved.

        Args:
            run: the run's id; None for every run that is not under way.
            error: what went wrong, kept with the edits.
            refund: the attempt does not count (cancelled, overtaken, shut down).
            trained_to: where edits of a committed version go that a rollback overtook; QUEUED or HELD.
        """
        terms = unclaim_terms(max_attempts=self._max_attempts, error=error, refund=refund, trained_to=trained_to)
        return cast(list[str], self._unclaim({"run": run, **terms}))

    def settle(self) -> list[str]:
        """Makes every edit's status agree with the active version; returns the ids that moved."""
        unverified = EditError(code="not_verified", message="a node did not answer the prompt with the target")
        return cast(
            list[str],
            self._settle({"max_attempts": self._max_attempts, "unverified": unverified.model_dump_json()}),
        )


def _new(request: EditRequest, now: int) -> dict[str, Any]:
    record = {**request.model_dump(), "created_at": now}
    return {"id": f"edit_{secrets.token_hex(12)}", **stored_fields(request, record)}


def stored_fields(request: EditRequest, record: Mapping[str, Any]) -> dict[str, Any]:
    """An edit's fields for the scripts that store it, beside its id; ``record`` has those that never change."""
    return {
        "record": json.dumps(record),
        "target": request.target,
        "prompt_key": sha256_of(normalise_text(request.prompt)),
    }
