import json
from typing import Any

import pytest

from service import errors
from service.api.errors import printable, validation_error
from service.errors import ErrataError, MalformedRequestError
from service.nodes import NodeRefusedError
from service.registry import FencedError, OvertakenError
from service.runs import LeaseLostError

TREE = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, ErrataError)]


@pytest.mark.parametrize("kind", [*TREE, NodeRefusedError, FencedError, OvertakenError, LeaseLostError])
def test_every_error_has_the_one_shape(kind: type[ErrataError]) -> None:
    error = kind("what is wrong", param="field")
    assert 400 <= error.status < 600
    assert error.body() == {
        "error": {"message": "what is wrong", "type": error.type, "param": "field", "code": kind.default_code}
    }
    assert kind("m", code="special").body()["error"]["code"] == "special"
    assert str(error) == "what is wrong"


def test_headers_are_each_errors_own() -> None:
    ErrataError("m").headers["x"] = "y"
    assert ErrataError("m").headers == {}


def detail(*location: str | int, kind: str = "missing", message: str = "Field required") -> list[dict[str, Any]]:
    return [{"loc": location, "type": kind, "msg": message, "input": "s3cret"}]


@pytest.mark.parametrize(
    ("location", "param"),
    [
        (("body", "edits", 3, "prompt"), "edits.3.prompt"),
        (("query", "limit"), "limit"),
        (("prompt",), "prompt"),
        (("body",), None),
        ((), None),
    ],
)
def test_the_field_is_named_by_its_path(location: tuple[str | int, ...], param: str | None) -> None:
    error = validation_error(detail(*location))
    assert (error.param, error.code) == (param, "missing_field")
    assert "s3cret" not in json.dumps(error.body())


def test_broken_json_is_a_400() -> None:
    broken = [{"loc": ("body", 3), "type": "json_invalid", "msg": "JSON decode error", "ctx": {"error": "Expecting"}}]
    assert isinstance(validation_error(broken), MalformedRequestError)


def test_a_fields_name_can_always_be_sent_back() -> None:
    assert printable("\ud800é") == "\\ud800é"
    assert len(printable("x" * 5000)) == 100
    error = validation_error(detail("body", "\ud800", kind="extra_forbidden"))
    assert json.dumps(error.body(), ensure_ascii=False).encode()
    assert error.code == "unknown_field"
