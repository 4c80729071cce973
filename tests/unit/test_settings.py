from pathlib import Path

import pytest
from pydantic import ValidationError

from service.schemas import Trigger
from service.settings import Settings


def test_every_setting_is_documented() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name


def test_the_given_environment_is_read_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRATA_PORT", "9")
    settings = Settings.from_env(
        {
            "ERRATA_NODES": "http://a:1/, http://b:2",
            "ERRATA_TRIGGER": "batch",
            "ERRATA_RUN_LEASE_S": "2.5",
            "ERRATA_MODEL": "",
            "PATH": "/bin",
        }
    )
    assert settings.port == 8000
    assert settings.nodes == ("http://a:1", "http://b:2")
    assert (settings.trigger, settings.run_lease_s, settings.model) == (Trigger.BATCH, 2.5, "")


def test_an_unknown_variable_is_named() -> None:
    with pytest.raises(ValueError, match="unknown setting: ERRATA_TRIGER"):
        Settings.from_env({"ERRATA_TRIGER": "batch"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "70000"),
        ("TRIGGER", "sometimes"),
        ("RUN_LEASE_S", "0"),
        ("MAX_ATTEMPTS", "0"),
        ("DEVICE", "tpu"),
        ("NODES", "http://a:1,b:2"),
        ("REDIS_URL", "localhost:6379"),
    ],
)
def test_a_wrong_value_is_named(name: str, value: str) -> None:
    with pytest.raises(ValidationError, match=name.lower()):
        Settings.from_env({f"ERRATA_{name}": value})


def test_an_edit_must_fit_the_node() -> None:
    with pytest.raises(ValidationError, match="edit_max_tokens"):
        Settings.from_env({"ERRATA_EDIT_MAX_TOKENS": "1500"})


def test_a_version_on_the_device_is_in_host_memory_too() -> None:
    with pytest.raises(ValidationError, match="node_slots must be at most node_host_slots"):
        Settings.from_env({"ERRATA_NODE_HOST_SLOTS": "3"})


def test_a_slot_is_left_beside_the_pinned_ones() -> None:
    with pytest.raises(ValidationError, match="node_slots must be more than 3: the active version, the one before"):
        Settings.from_env({"ERRATA_NODE_SLOTS": "3"})


@pytest.mark.parametrize(
    ("store", "url"),
    [("", "/state/versions"), ("/a", "/a"), ("b", f"{Path.cwd()}/b"), ("s3://bucket/c", "s3://bucket/c")],
)
def test_the_store_is_the_same_from_every_folder(store: str, url: str) -> None:
    assert Settings(home=Path("/state"), store=store).store_url == url


def test_a_review_needs_keys() -> None:
    with pytest.raises(ValidationError, match="review needs auth to be required"):
        Settings.from_env({"ERRATA_REVIEW": "true"})
    settings = Settings.from_env({"ERRATA_REVIEW": "true", "ERRATA_AUTH": "required"})
    assert settings.review
    assert Settings.from_env(settings.environment()) == settings


def test_the_environment_gives_the_same_settings() -> None:
    settings = Settings(
        home=Path("/somewhere"), nodes=("http://a", "http://b"), trigger=Trigger.MANUAL, train_batch_size=4
    )
    assert Settings.from_env(settings.environment()) == settings
    assert Settings().environment() == {}


def test_secrets_are_not_in_the_environment_or_the_representation() -> None:
    settings = Settings.model_validate({"node_token": "s3cret", "api_key": "s3cret" * 6})
    assert "s3cret" not in str(settings.environment())
    assert "s3cret" not in repr(settings)


@pytest.mark.parametrize("name", ["API_KEY", "NODE_TOKEN", "REDIS_URL"])
def test_a_secret_may_be_in_a_file(name: str, tmp_path: Path) -> None:
    secret = "redis://s3cret@host/0-and-long-enough"
    file = tmp_path / "secret"
    file.write_text(f"{secret}\n")
    field = getattr(Settings.from_env({f"ERRATA_{name}_FILE": str(file)}), name.lower())
    assert secret in {field, getattr(field, "get_secret_value", str)()}
    with pytest.raises(ValueError, match=f"ERRATA_{name} and ERRATA_{name}_FILE are both set"):
        Settings.from_env({f"ERRATA_{name}_FILE": str(file), f"ERRATA_{name}": secret})
    file.write_text("\n")
    with pytest.raises(ValueError, match=f"ERRATA_{name}_FILE: .* is empty"):
        Settings.from_env({f"ERRATA_{name}_FILE": str(file)})
    with pytest.raises(ValueError, match=f"ERRATA_{name}_FILE: .*: FileNotFoundError"):
        Settings.from_env({f"ERRATA_{name}_FILE": str(tmp_path / "none")})


def test_only_a_secret_may_be_in_a_file() -> None:
    with pytest.raises(ValueError, match="unknown setting: ERRATA_PORT_FILE"):
        Settings.from_env({"ERRATA_PORT_FILE": "port"})


@pytest.mark.parametrize("key", ["s3cret", "s3cret " * 6, "s3crét" * 6, "s3cret\n" * 6])
def test_a_key_that_is_short_or_fits_no_header_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(ValidationError, match="api_key") as error:
        Settings.from_env({"ERRATA_API_KEY": key})
    assert "s3cr" not in str(error.value)
