"""KeyStore and ``errata keys`` against a real Redis: what is kept of a key, and what it is good for."""

import hashlib
import json
import re

import pytest
from click.testing import Result
from redis_server import RedisServer
from typer.testing import CliRunner

from service.api_keys import ApiKey, KeyStore, Scope, split
from service.cli import app
from service.errors import InvalidRequestError, NotFoundError
from service.ports import free_port
from service.stores import Stores

NOW = 1_700_000_000


@pytest.fixture
def keys(stores: Stores) -> KeyStore:
    return KeyStore(stores.redis, events_max=100, clock=lambda: NOW)


def test_a_key_has_256_random_bits_and_redis_only_their_hash(stores: Stores, keys: KeyStore) -> None:
    made = keys.create("ci", [Scope.READ, Scope.EDIT])
    assert re.fullmatch(r"errata_key_[0-9a-f]{24}_[0-9a-f]{64}", made.key)
    parts = split(made.key)
    assert parts is not None
    key_id, secret = parts
    assert (made.id, made.created_at, made.scopes) == (key_id, NOW, (Scope.EDIT, Scope.READ))
    hashes = [stores.redis.hgetall(name) for name in stores.redis.scan_iter("errata:api_key:*")]
    assert secret not in json.dumps(hashes)
    assert [fields["secret_sha256"] for fields in hashes] == [hashlib.sha256(secret.encode()).hexdigest()]
    assert keys.create("ci", [Scope.READ]).key != made.key


def test_only_the_secret_itself_matches(keys: KeyStore) -> None:
    made, other = keys.create("a", [Scope.READ]), keys.create("b", [Scope.READ])
    credential = keys.credential(made.id)
    assert credential is not None
    _, secret = split(made.key) or ("", "")
    assert credential.matches(secret)
    _, others = split(other.key) or ("", "")
    assert not credential.matches(others)
    assert not credential.matches("")
    assert not credential.matches(credential.secret_sha256)
    assert keys.credential("key_" + "0" * 24) is None


@pytest.mark.parametrize(
    "token",
    [
        "",
        "unused",
        "errata__",
        "errata_key_00_00",
        f"errata_key_{'0' * 24}_{'0' * 63}",
        f"x errata_key_{'0' * 24}_{'0' * 64}",
        f"errata_key_{'0' * 24}_{'0' * 64}\n",
    ],
)
def test_what_has_not_the_form_of_a_key_is_none(token: str) -> None:
    assert split(token) is None


def test_a_key_is_usable_until_it_expires_or_is_revoked(keys: KeyStore) -> None:
    forever = keys.create("forever", [Scope.READ])
    soon = keys.create("soon", [Scope.READ], expires_at=NOW + 10)
    assert (forever.usable(NOW + 10**9), soon.usable(NOW + 9.9), soon.usable(NOW + 10)) == (True, True, False)
    assert keys.any_usable()
    revoked = keys.revoke(forever.id)
    assert (revoked.revoked_at, revoked.usable(NOW)) == (NOW, False)
    later = KeyStore(keys._redis, events_max=100, clock=lambda: NOW + 10)
    assert later.revoke(forever.id) == revoked, "a second time changes nothing"
    assert not later.any_usable()
    assert [key.name for key in keys.all()] == ["soon", "forever"], "they are kept"


def test_the_last_use_is_noted(keys: KeyStore) -> None:
    made = keys.create("a", [Scope.READ], rate=60)
    assert (made.last_used_at, made.rate) == (None, 60)
    keys.touch(made.id)
    assert keys.get(made.id).last_used_at == NOW


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"name": " "}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": "n" * 101}, "name"),
        ({"scopes": []}, "scopes"),
        ({"rate": 0}, "rate"),
        ({"expires_at": NOW}, "expires_at"),
    ],
)
def test_what_is_out_of_bounds_makes_no_key(keys: KeyStore, wrong: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequestError) as error:
        keys.create(**{"name": "n", "scopes": [Scope.READ], **wrong})
    assert error.value.param == param
    assert keys.all() == []


def test_an_unknown_key_cannot_be_revoked(keys: KeyStore) -> None:
    with pytest.raises(NotFoundError, match="no API key 'key_x'"):
        keys.revoke("key_x")


@pytest.fixture
def redis_in_the_environment(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRATA_REDIS_URL", redis_server.url)


def errata(*words: str) -> Result:
    return CliRunner().invoke(app, ["keys", *words])


@pytest.mark.usefixtures("redis_in_the_environment")
class TestCommands:
    def test_create_prints_the_key_and_list_does_not(self, stores: Stores) -> None:
        result = errata("create", "ci", "--scope", "read", "--scope", "infer", "--expires-days", "2", "--rate", "5")
        assert result.exit_code == 0
        key_id, _ = split(result.stdout.strip()) or ("", "")
        key = stores.keys.get(key_id)
        assert (key.name, key.scopes, key.rate) == ("ci", (Scope.INFER, Scope.READ), 5)
        assert key.expires_at is not None
        assert abs(key.expires_at - key.created_at - 2 * 86400) <= 1
        assert result.stderr == f"{key_id} opens infer, read; it is not shown again\n"
        assert result.stdout.strip() not in errata("list").stdout + errata("list", "--json").stdout

    def test_json_shows_a_key_as_it_is_stored(self, stores: Stores) -> None:
        made = json.loads(errata("create", "ci", "--scope", "operate", "--json").stdout)
        assert split(made.pop("key")) is not None
        assert made == stores.keys.get(made["id"]).model_dump(mode="json")
        assert json.loads(errata("list", "--json").stdout) == [made]
        revoked = json.loads(errata("revoke", made["id"], "--json").stdout)
        assert ApiKey.model_validate(revoked) == stores.keys.get(made["id"])
        assert revoked["revoked_at"]

    def test_list_shows_which_keys_are_usable_and_which_revoked(self, stores: Stores) -> None:
        made = stores.keys.create("the name", [Scope.EDIT])
        stores.keys.create("another", [Scope.READ], expires_at=made.created_at + 86400 * 3)
        newest, oldest = errata("list").stdout.splitlines()[1:]
        assert "usable 3 d more" in newest
        assert oldest.split()[:3] == [made.id, "usable", "edit"]
        assert oldest.split()[-3:] == ["never", "the", "name"]
        assert errata("revoke", made.id).stdout == f"{made.id} is revoked\n"
        assert "revoked" in errata("list").stdout.splitlines()[2]

    def test_errors_are_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        unknown = errata("revoke", "key_x")
        assert (unknown.exit_code, unknown.stderr) == (1, "errata: no API key 'key_x'\n")
        assert errata("create", "ci").exit_code == 2, "a scope is required"
        assert errata("create", "ci", "--scope", "root").exit_code == 2
        monkeypatch.setenv("ERRATA_REDIS_URL", f"redis://127.0.0.1:{free_port()}")
        away = errata("list")
        assert away.exit_code == 1
        assert away.stderr.startswith("errata: Redis does not answer: ")


def test_without_a_redis_the_stack_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("ERRATA_HOME", str(tmp_path))
    result = errata("list")
    assert result.exit_code == 1
    assert "`errata up` starts one" in result.stderr
