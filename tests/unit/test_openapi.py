"""What is generated from the code is what is in the repository."""

import json
from pathlib import Path

import pytest

from service.generate import (
    OBSERVABILITY,
    OPENAPI,
    README,
    MissingMarkersError,
    main,
    openapi_document,
    settings_table,
    with_metrics,
    with_settings,
)
from service.metrics.catalogue import CATALOGUE
from service.settings import Settings

ROOT = Path(__file__).parents[2]
METRICS = "# Metrics\n\n<!-- metrics -->\n<!-- /metrics -->\n"
MARKED = "# Title\n\n<!-- settings -->\nold\n<!-- /settings -->\n\nThe rest.\n"


def test_the_openapi_document_is_the_applications() -> None:
    kept = (ROOT / OPENAPI).read_text(encoding="utf-8")
    assert json.loads(kept) == json.loads(openapi_document()), "run `make generated`"
    assert kept == openapi_document()


def test_the_readmes_table_is_the_settings() -> None:
    readme = (ROOT / README).read_text(encoding="utf-8")
    assert readme == with_settings(readme), "run `make generated`"


def test_the_table_of_metrics_is_the_catalogue() -> None:
    text = (ROOT / OBSERVABILITY).read_text(encoding="utf-8")
    assert text == with_metrics(text), "run `make generated`"
    for name in CATALOGUE:
        assert f"| `{name}` |" in text


def test_every_error_answer_is_in_the_one_shape() -> None:
    for path, operations in json.loads(openapi_document())["paths"].items():
        for method, operation in operations.items():
            for status, response in operation["responses"].items():
                if status[0] in "45" and not path.startswith("/health"):
                    schema = response["content"]["application/json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/ErrorBody"}, (method, path, status)


def test_whatever_asks_for_a_key_says_that_it_may_refuse() -> None:
    operations = [found for path in json.loads(openapi_document())["paths"].values() for found in path.values()]
    assert [
        found["operationId"] for found in operations if "security" in found and "4XX" not in found["responses"]
    ] == []


def test_every_setting_has_a_row() -> None:
    table = settings_table()
    for name in Settings.model_fields:
        assert f"| `ERRATA_{name.upper()}` |" in table
    assert "| `ERRATA_PORT` | `8000` |" in table
    assert "| `ERRATA_NODE_TOKEN` |  |" in table
    assert "(`immediate`, `batch`, `interval`, `manual`)" in table
    assert "PydanticUndefined" not in table


def test_the_table_goes_between_its_markers() -> None:
    written = with_settings(MARKED)
    assert written.startswith("# Title\n\n<!-- settings -->\n| variable |")
    assert written.endswith("|\n<!-- /settings -->\n\nThe rest.\n")
    assert with_settings(written) == written


@pytest.mark.parametrize("readme", ["", "<!-- settings -->", "<!-- /settings --> <!-- settings -->", MARKED * 2])
def test_without_its_markers_there_is_no_place(readme: str) -> None:
    with pytest.raises(MissingMarkersError, match="README"):
        with_settings(readme)


def test_written_then_checked_then_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / README).write_text(MARKED)
    (tmp_path / OBSERVABILITY.parent).mkdir()
    (tmp_path / OBSERVABILITY).write_text(METRICS)
    assert main(["--check"], root=tmp_path) == 1
    assert (tmp_path / README).read_text() == MARKED
    assert main([], root=tmp_path) == 0
    assert main(["--check"], root=tmp_path) == 0
    capsys.readouterr()
    (tmp_path / OPENAPI).write_text("{}")
    assert main(["--check"], root=tmp_path) == 1
    assert capsys.readouterr().err == "openapi/openapi.json is out of date; run `make generated`\n"


def test_a_readme_without_markers_is_a_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / README).write_text("# Title\n")
    assert main([], root=tmp_path) == 1
    assert "<!-- settings -->" in capsys.readouterr().err
