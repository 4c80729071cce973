"""What the service believes of a key, and for how long."""

import pytest
from scripted_clock import Clock

from service.api.access import CACHE_S, Keyring
from service.api_keys import ApiKey, Credential, Scope
from service.digest import sha256_of

SECRET = "5" * 64
KEY = ApiKey(id="key_" + "a" * 24, name="ci", scopes=(Scope.READ,), created_at=0, expires_at=2000)
TOKEN = f"errata_{KEY.id}_{SECRET}"
OPERATORS = "operators-own-key-of-some-length"


class Store:
    """One key, and what was asked of it."""

    def __init__(self, key: ApiKey = KEY) -> None:
        self.key = key
        self.looked_up = 0
        self.touched = 0

    def credential(self, key_id: str) -> Credential | None:
        self.looked_up += 1
        return Credential(self.key, sha256_of(SECRET)) if key_id == self.key.id else None

    def touch(self, key_id: str) -> None:
        assert key_id == self.key.id
        self.touched += 1


@pytest.fixture
def keyring(clock: Clock) -> Keyring:
    return Keyring(OPERATORS, clock=clock, monotonic=clock)


async def test_redis_is_asked_once_while_the_answer_is_fresh(keyring: Keyring, clock: Clock) -> None:
    store = Store()
    for _ in range(100):
        assert await keyring.key_of(TOKEN, store) == KEY
        clock.now += CACHE_S / 101
    assert (store.looked_up, store.touched) == (1, 1)


async def test_a_revoked_key_is_refused_when_the_answer_is_old(keyring: Keyring, clock: Clock) -> None:
    assert CACHE_S <= 5, "`errata keys revoke` says so"
    store = Store()
    assert await keyring.key_of(TOKEN, store)
    store.key = KEY.model_copy(update={"revoked_at": 1000})
    clock.now += CACHE_S
    assert await keyring.key_of(TOKEN, store) is None


async def test_a_key_expires_while_the_answer_is_fresh(keyring: Keyring, clock: Clock) -> None:
    store = Store()
    clock.now = 1999.9
    assert await keyring.key_of(TOKEN, store)
    clock.now = 2000
    assert await keyring.key_of(TOKEN, store) is None
    assert store.looked_up == 1


async def test_another_secret_is_refused_though_the_key_is_known(keyring: Keyring) -> None:
    store = Store()
    assert await keyring.key_of(TOKEN, store)
    other_secrets = (f"errata_{KEY.id}_{'6' * 64}", f"errata_{KEY.id}_{sha256_of(SECRET)}")
    for wrong in (*other_secrets, TOKEN.upper(), TOKEN + "0", ""):
        assert await keyring.key_of(wrong, store) is None
    assert store.looked_up == 1


async def test_ids_that_nobody_gave_out_take_no_memory(keyring: Keyring) -> None:
    store = Store()
    for number in range(50):
        assert await keyring.key_of(f"errata_key_{number:024x}_{SECRET}", store) is None
    assert keyring._seen == {}


@pytest.mark.parametrize(("last_used_at", "touched"), [(None, 1), (940, 1), (941, 0)])
async def test_the_last_use_is_written_once_a_minute(keyring: Keyring, last_used_at: int | None, touched: int) -> None:
    store = Store(KEY.model_copy(update={"last_used_at": last_used_at}))
    await keyring.key_of(TOKEN, store)
    assert store.touched == touched


async def test_only_the_right_secret_notes_a_use(keyring: Keyring, clock: Clock) -> None:
    """Ids are in the audit log: whoever reads it must not make a key look used."""
    store = Store()
    wrong = f"errata_{KEY.id}_{'6' * 64}"
    assert await keyring.key_of(wrong, store) is None
    assert store.touched == 0
    assert await keyring.key_of(TOKEN, store) == KEY
    assert (store.looked_up, store.touched) == (1, 1)
    clock.now += 2 * CACHE_S
    assert await keyring.key_of(TOKEN, store) == KEY
    assert (store.looked_up, store.touched) == (2, 1), "to the minute"


@pytest.mark.parametrize("end", ["revoked_at", "expires_at"])
async def test_a_key_that_opens_nothing_is_not_used(keyring: Keyring, end: str) -> None:
    store = Store(KEY.model_copy(update={end: 999}))
    assert await keyring.key_of(TOKEN, store) is None
    assert store.touched == 0


async def test_the_operators_key_has_every_scope_and_needs_no_redis(keyring: Keyring) -> None:
    store = Store()
    key = await keyring.key_of(OPERATORS, store)
    assert key is not None
    assert (key.id, set(key.scopes)) == ("operator", set(Scope))
    assert store.looked_up == 0
    assert await keyring.key_of(OPERATORS + "x", store) is None


async def test_without_an_operators_key_an_empty_one_opens_nothing() -> None:
    assert await Keyring("").key_of("", Store()) is None
