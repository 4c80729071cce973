"""KeyStore: API keys, of which Redis has no secret, only its SHA-256.

A key is ``errata_<id>_<secret>``. The secret is 256 random bits, so a plain hash of it cannot be guessed back.
"""

import hmac
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, cast

from redis import Redis

from service.digest import sha256_of
from service.errors import InvalidRequestError, NotFoundError
from service.keys import ApiKeyKeys
from service.lua import Scripts
from service.schemas import Schema

_TOKEN = re.compile(r"errata_(key_[0-9a-f]{24})_([0-9a-f]{64})")
_MAX_NAME_CHARS = 100
MAX_RATE = 1_000_000


class Scope(StrEnum):
    """What a key opens; none includes another."""

    INFER = "infer"
    READ = "read"
    EDIT = "edit"
    OPERATE = "operate"


class ApiKey(Schema):
    """A key without its secret. Times are Unix seconds; ``rate`` is in requests per minute."""

    object: Literal["api_key"] = "api_key"
    id: str
    name: str
    scopes: tuple[Scope, ...]
    created_at: int
    expires_at: int | None = None
    revoked_at: int | None = None
    last_used_at: int | None = None
    rate: int | None = None

    def usable(self, now: float) -> bool:
        """Whether it opens anything: neither revoked nor expired."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


class NewApiKey(ApiKey):
    """A key as its creator sees it, once: ``key`` is what a client sends."""

    key: str


@dataclass(frozen=True)
class Credential:
    """A key and the SHA-256 of its secret."""

    key: ApiKey
    secret_sha256: str

    def matches(self, secret: str) -> bool:
        """Whether it is the key's secret; takes the same time wherever they differ."""
        return hmac.compare_digest(sha256_of(secret), self.secret_sha256)


def split(token: str) -> tuple[str, str] | None:
    """The id and the secret of what a client sent, or None if it has not the form of a key."""
    match = _TOKEN.fullmatch(token)
    return (match.group(1), match.group(2)) if match else None


class KeyStore:
    """API keys. A revoked or expired one is kept, so that the audit log's ids keep their names."""

    def __init__(self, redis: Redis, *, events_max: int, clock: Callable[[], float] = time.time) -> None:
        self._redis = redis
        self._keys = ApiKeyKeys()
        self._clock = clock

        scripts = Scripts(redis, events_max=events_max, clock=clock)
        self._create = scripts.load("create_key")
        self._revoke = scripts.load("revoke_key")

    def create(
        self, name: str, scopes: Iterable[Scope], *, expires_at: int | None = None, rate: int | None = None
    ) -> NewApiKey:
        """Makes a key. Its secret is in the answer and nowhere else.

        Args:
            name: who or what uses it, one line of at most 100 characters.
            scopes: what it opens, at least one.
            expires_at: Unix seconds from which on it opens nothing.
            rate: most requests per minute.

        Raises:
            InvalidRequestError: one of them is out of its bounds.
        """
        if not name.strip() or not name.isprintable() or len(name) > _MAX_NAME_CHARS:
            raise InvalidRequestError(f"a key's name is 1 to {_MAX_NAME_CHARS} printable characters", param="name")
        if not (granted := sorted(set(scopes))):
            raise InvalidRequestError("a key needs a scope", param="scopes")
        if rate is not None and not 1 <= rate <= MAX_RATE:
            raise InvalidRequestError(f"a rate is 1 to {MAX_RATE} requests per minute", param="rate")
        if expires_at is not None and expires_at <= self._clock():
            raise InvalidRequestError("a key cannot expire before it is made", param="expires_at")
        key_id, secret = f"key_{secrets.token_hex(12)}", secrets.token_hex(32)
        self._create(
            {
                "id": key_id,
                "name": name,
                "scopes": " ".join(granted),
                "secret_sha256": sha256_of(secret),
                "expires_at": expires_at or "",
                "rate": rate or "",
            }
        )
        return NewApiKey(**self.get(key_id).model_dump(), key=f"errata_{key_id}_{secret}")

    def get(self, key_id: str) -> ApiKey:
        """One key.

        Raises:
            NotFoundError: no such key.
        """
        if (credential := self.credential(key_id)) is None:
            raise NotFoundError(f"no API key {key_id!r}", param="id", code="api_key_not_found")
        return credential.key

    def credential(self, key_id: str) -> Credential | None:
        """A key with the hash of its secret, or None if there is none of this id."""
        fields = cast(dict[str, str], self._redis.hgetall(self._keys.api_key + key_id))
        return Credential(_key(fields), fields["secret_sha256"]) if fields else None

    def all(self) -> list[ApiKey]:
        """Every key, newest first."""
        ids = cast(list[str], self._redis.lrange(self._keys.api_keys, 0, -1))
        return [self.get(key_id) for key_id in ids]

    def any_usable(self) -> bool:
        """Whether there is a key that opens something."""
        now = self._clock()
        return any(key.usable(now) for key in self.all())

    def revoke(self, key_id: str) -> ApiKey:
        """Takes a key back for good; a second time changes nothing.

        Raises:
            NotFoundError: no such key.
        """
        self.get(key_id)
        self._revoke({"id": key_id})
        return self.get(key_id)

    def touch(self, key_id: str) -> None:
        """Notes that a key was used now."""
        self._redis.hset(self._keys.api_key + key_id, "last_used_at", int(self._clock()))


def _key(fields: Mapping[str, str]) -> ApiKey:
    def number(name: str) -> int | None:
        return int(fields[name]) if fields.get(name) else None

    return ApiKey(
        id=fields["id"],
        name=fields["name"],
        scopes=tuple(Scope(scope) for scope in fields["scopes"].split()),
        created_at=int(fields["created_at"]),
        expires_at=number("expires_at"),
        revoked_at=number("revoked_at"),
        last_used_at=number("last_used_at"),
        rate=number("rate"),
    )
