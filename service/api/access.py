"""ASGI middleware: who is let in, and how long what Redis says of a key is believed."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from redis.exceptions import RedisError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service import api_keys
from service.api.addresses import is_foreign, is_loopback
from service.api.dependencies import Parts
from service.api.errors import redis_unavailable
from service.api.middleware import refuse
from service.api.rates import Rates
from service.api.scopes import scopes_for
from service.api_keys import ApiKey, Credential, KeyStore
from service.audit import Actor, acting
from service.digest import sha256_of
from service.errors import BusyError, ErrataError, InvalidApiKeyError, MissingScopeError, NotLocalError
from service.settings import Settings
from service.stores import Stores

log = logging.getLogger(__name__)

CACHE_S = 5.0
"""A key that is revoked is refused so many seconds later at most, by every process."""
_TOUCH_S = 60
OPERATOR = "operator"
ANONYMOUS = "anonymous"


class NoKeyError(ErrataError):
    """The service would listen where anybody can reach it, and there is no key to ask for."""

    default_code = "no_api_key"


def require_a_key(settings: Settings) -> None:
    """Checks that a service on another address than loopback has a key to ask for.

    Raises:
        NoKeyError: it has none.
    """
    if is_loopback(settings.host) or settings.api_key.get_secret_value():
        return
    stores = Stores.connect(settings)
    try:
        if stores.keys.any_usable():
            return
    finally:
        stores.redis.close()
    raise NoKeyError(
        f"ERRATA_HOST is {settings.host}, not loopback, and there is no usable API key: set ERRATA_API_KEY, or make a "
        "key with `errata keys create NAME --scope operate` while the service listens on 127.0.0.1"
    )


class Keyring:
    """Keys by what a client sends, looked up in Redis at most every ``CACHE_S`` seconds."""

    def __init__(
        self,
        operators_key: str,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._operators = sha256_of(operators_key) if operators_key else None
        self._clock = clock
        self._monotonic = monotonic
        self._seen: dict[str, tuple[float, Credential]] = {}
        self._touched: dict[str, float] = {}

    async def key_of(self, token: str, store: KeyStore) -> ApiKey | None:
        """The usable key that a client's token is, or None."""
        if self._operators and Credential(_OPERATORS_KEY, self._operators).matches(token):
            return _OPERATORS_KEY
        if (parts := api_keys.split(token)) is None:
            return None
        credential = await self._credential(parts[0], store)
        if credential is None or not credential.matches(parts[1]) or not credential.key.usable(self._clock()):
            return None
        await self._touch(credential.key, store)
        return credential.key

    async def _credential(self, key_id: str, store: KeyStore) -> Credential | None:
        now = self._monotonic()
        looked_up, credential = self._seen.get(key_id, (now - CACHE_S, None))
        if credential and now - looked_up < CACHE_S:
            return credential
        credential = await run_in_threadpool(store.credential, key_id)
        # Ids that nobody gave out are not kept: they would fill the memory.
        if credential:
            self._seen[key_id] = (now, credential)
        return credential

    async def _touch(self, key: ApiKey, store: KeyStore) -> None:
        now = self._clock()
        # To the minute is enough, and a write waits for the disk.
        if now - max(key.last_used_at or 0, self._touched.get(key.id, 0)) >= _TOUCH_S:
            self._touched[key.id] = now
            await run_in_threadpool(store.touch, key.id)


_OPERATORS_KEY = ApiKey(id=OPERATOR, name="ERRATA_API_KEY", scopes=tuple(api_keys.Scope), created_at=0)


@dataclass(frozen=True)
class Caller:
    """Who made a request. A request on an open address has no key."""

    key: ApiKey | None
    token: str
    keyring: Keyring
    store: KeyStore

    async def still_admitted(self) -> bool:
        """Whether the key is still usable, for an answer that has no end."""
        return self.key is None or await self.keyring.key_of(self.token, self.store) is not None


def _actor(scope: Scope) -> Actor:
    key: ApiKey | None = scope["state"]["caller"].key
    request_id = scope["state"]["request_id"]
    return Actor(key.id, key.name, request_id) if key else Actor(ANONYMOUS, request_id=request_id)


class KeyDemand:
    """Asks for a key where one is needed, before anything of the body is read."""

    def __init__(self, app: ASGIApp, *, settings: Settings) -> None:
        self._app = app
        self._always = settings.auth == "required" or not is_loopback(settings.host)
        self._keyring = Keyring(settings.api_key.get_secret_value())
        self._rates = Rates()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            scope.setdefault("state", {})["caller"] = await self._admit(scope)
        except ErrataError as error:
            log.info("access.refused", extra={"code": error.code, "method": scope["method"], "path": scope["path"]})
            await refuse(send, error)
            return
        except RedisError as error:
            await refuse(send, redis_unavailable(error))
            return
        with acting(_actor(scope)):
            await self._app(scope, receive, send)

    def _demands(self, scope: Scope) -> bool:
        # The setting may be wrong about what the server was told to listen on; the socket is not.
        server = scope.get("server")
        return self._always or not (server and is_loopback(server[0]))

    async def _admit(self, scope: Scope) -> Caller:
        """The caller, if they may use the route.

        Raises:
            InvalidApiKeyError: there is no usable key with the request.
            NotLocalError: no key is needed, and a page from elsewhere made a browser send it.
            MissingScopeError: the key does not open the route.
            BusyError: the key asks more often than it may.
        """
        parts: Parts = scope["app"].state.parts
        headers = Headers(scope=scope)
        asked, foreign = self._demands(scope), is_foreign(headers)
        demanded = scopes_for(scope["app"].routes, scope) if asked or foreign else None
        if demanded is None:
            return Caller(None, "", self._keyring, parts.stores.keys)
        if not asked:
            raise NotLocalError(
                "without API keys only requests to and from this machine are answered: Host and Origin must name "
                "localhost or a loopback address; behind a proxy, set ERRATA_AUTH=required"
            )
        kind, _, token = headers.get("authorization", "").partition(" ")
        key = await self._keyring.key_of(token, parts.stores.keys) if kind.lower() == "bearer" else None
        if key is None:
            refusal = InvalidApiKeyError("this needs a usable API key, sent as `Authorization: Bearer …`")
            refusal.headers["WWW-Authenticate"] = "Bearer"
            raise refusal
        if wait_s := self._rates.wait_s(key):
            limit = f"key {key.id} may ask {key.rate} times a minute"
            raise BusyError(limit, retry_after_s=math.ceil(wait_s), code="rate_limited")
        if demanded.isdisjoint(key.scopes):
            raise MissingScopeError(f"key {key.id} does not have the scope {' or '.join(sorted(demanded))}")
        return Caller(key, token, self._keyring, parts.stores.keys)
