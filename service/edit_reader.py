"""EditReader: what Redis says about edits; EditStore changes them."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import cast

from redis import Redis

from service.errors import InvalidRequestError, NotFoundError
from service.keys import EditKeys
from service.schemas import Edit, EditStatus, Page

_SEARCH_CHUNK = 500


class EditReader:
    """Edits by id, by sequence number, by page and by status."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._keys = EditKeys()

    def get(self, edit_id: str) -> Edit:
        """One edit.

        Raises:
            NotFoundError: no such edit.
        """
        found = self.get_many([edit_id])
        if not found:
            raise NotFoundError(f"no edit {edit_id!r}", param="id", code="edit_not_found")
        return found[0]

    def get_many(self, edit_ids: Iterable[str]) -> list[Edit]:
        """The edits of these ids that exist, in their order."""
        pipeline = self._redis.pipeline(transaction=False)
        for edit_id in edit_ids:
            pipeline.hgetall(self._keys.edit + edit_id)
        return [edit_of(fields) for fields in pipeline.execute() if fields]

    def by_sequence(self, numbers: Iterable[int]) -> list[Edit]:
        """The edits of these sequence numbers."""
        pipeline = self._redis.pipeline(transaction=False)
        for number in numbers:
            pipeline.zrange(self._keys.edits, number, number, byscore=True)
        return self.get_many(edit_id for ids in pipeline.execute() for edit_id in ids)

    def sequences(self, edit_ids: Iterable[str]) -> list[int]:
        """The edits' sequence numbers: the order in which they came, and their bits in every version's bitmap."""
        pipeline = self._redis.pipeline(transaction=False)
        for edit_id in edit_ids:
            pipeline.hget(self._keys.edit + edit_id, "seq")
        return [int(number) for number in pipeline.execute()]

    def traceparents(self, edit_ids: Iterable[str]) -> list[str]:
        """Where in which trace each of the edits was brought, if that was traced."""
        pipeline = self._redis.pipeline(transaction=False)
        for edit_id in edit_ids:
            pipeline.hget(self._keys.edit + edit_id, "traceparent")
        return [kept for kept in pipeline.execute() if kept]

    def page(self, *, status: EditStatus | None, q: str | None, after: str | None, limit: int) -> Page[Edit]:
        """Newest first, after the given id.

        Raises:
            InvalidRequestError: ``after`` is no edit's id.
        """
        found: list[Edit] = []
        for edit in self._newest_first(status, after, limit + 1 if q is None else _SEARCH_CHUNK):
            if q is None or q.casefold() in f"{edit.prompt}\n{edit.target}".casefold():
                found.append(edit)
                if len(found) > limit:
                    break
        return Page[Edit](data=found[:limit], has_more=len(found) > limit)

    def _newest_first(self, status: EditStatus | None, after: str | None, chunk: int) -> Iterator[Edit]:
        key = self._keys.edits if status is None else self._keys.edits_in + status
        top = "+inf"
        if after is not None:
            score = self._redis.zscore(self._keys.edits, after)
            if score is None:
                raise InvalidRequestError(f"no edit {after!r}", param="after", code="edit_not_found")
            top = f"({int(score)}"
        while rows := self._below(key, top, chunk):
            yield from self.get_many(edit_id for edit_id, _ in rows)
            top = f"({int(rows[-1][1])}"

    def _below(self, key: str, top: str, chunk: int) -> list[tuple[str, float]]:
        rows = self._redis.zrevrangebyscore(key, top, "-inf", start=0, num=chunk, withscores=True)
        return cast(list[tuple[str, float]], rows)

    def counts(self) -> dict[EditStatus, int]:
        """How many edits are in each status."""
        pipeline = self._redis.pipeline(transaction=False)
        for status in EditStatus:
            pipeline.zcard(self._keys.edits_in + status)
        return dict(zip(EditStatus, pipeline.execute(), strict=True))

    def in_status(self, status: EditStatus) -> list[Edit]:
        """All edits in a status, oldest first."""
        return self.get_many(cast(list[str], self._redis.zrange(self._keys.edits_in + status, 0, -1)))

    def oldest_queued_at(self) -> int | None:
        """Unix seconds of the oldest queued edit's last change, or None."""
        first = cast(list[str], self._redis.zrange(self._keys.edits_in + EditStatus.QUEUED, 0, 0))
        return self.get(first[0]).updated_at if first else None

    def oldest_accepted_at(self, statuses: Sequence[EditStatus]) -> dict[EditStatus, int]:
        """Unix seconds of the acceptance, approval or release of the oldest edit in each status that has one."""
        pipeline = self._redis.pipeline(transaction=False)
        for status in statuses:
            pipeline.zrange(self._keys.edits_in + status, 0, 0)
        oldest = {status: ids[0] for status, ids in zip(statuses, pipeline.execute(), strict=True) if ids}
        for edit_id in oldest.values():
            pipeline.hmget(self._keys.edit + edit_id, "accepted_at", "updated_at")
        rows = pipeline.execute()
        return {status: int(row[0] or row[1] or 0) for status, row in zip(oldest, rows, strict=True)}

    def accepted(self) -> int:
        """How many edits were ever stored."""
        return int(cast(str | None, self._redis.get(self._keys.seq)) or 0)


def edit_of(fields: Mapping[str, str]) -> Edit:
    """An edit as its hash in Redis tells it."""
    record = json.loads(fields["record"])
    return Edit(
        id=fields["id"],
        status=EditStatus(fields["status"]),
        version=int(fields["version"]) if fields.get("version") else None,
        verified=json.loads(fields.get("verified") or "{}"),
        error=json.loads(fields.get("error") or "null"),
        attempts=int(fields["attempts"]),
        superseded_by=fields.get("superseded_by") or None,
        request_id=fields.get("request_id", ""),
        updated_at=int(fields["updated_at"]),
        **record,
    )
