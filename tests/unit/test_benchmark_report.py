import argparse
import bz2
import json
from pathlib import Path

import pytest

from benchmarks import overview
from benchmarks.datasets import ROWS, TASKS, capability_tasks, hellaswag
from benchmarks.report import RESULTS, Machine, Results, markdown_table, spread, told, write_plot
from worker.evaluation.capability import Choice


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "wikitext2_test.raw").write_text(" = Title = \n line two \n" * 20_000)
    (tmp_path / "lambada_test.jsonl").write_text("".join(json.dumps({"text": f"a {n}"}) + "\n" for n in range(600)))
    scenes = "".join(f"scene {n}\n{n % 4}\na\nb\nc\nd\n" for n in range(600))
    (tmp_path / "hellaswag_val_full.txt.bz2").write_bytes(bz2.compress(scenes.encode()))
    (tmp_path / "sst2_dev.tsv").write_text("".join(f"film {n} \t{n % 2}\n" for n in range(600)))
    return tmp_path


def test_tasks_are_the_same_500_rows_each_time(data: Path) -> None:
    tasks = capability_tasks(data)
    assert tasks == capability_tasks(data)
    text, words, scenes, films = tasks
    assert text.texts[0].endswith("\n line two ") or text.texts[0].endswith("\n = Title = ")
    assert 279_900 < len(text.texts[0]) < 280_000
    assert len(set(words.texts)) == len(set(scenes.choices)) == len(set(films.choices)) == ROWS
    scene = scenes.choices[0]
    assert scene == Choice(scene.context, ("a", "b", "c", "d"), int(scene.context.split()[1]) % 4)
    film = films.choices[0]
    number = int(film.context.split()[1])
    assert film.context == f"film {number}\nQuestion: Is this sentence positive or negative?\nAnswer:"
    assert film.endings[film.right] == ("negative", "positive")[number % 2]


def test_named_tasks_alone_are_read(data: Path) -> None:
    assert [task.name for task in capability_tasks(data)] == list(TASKS)
    (data / "lambada_test.jsonl").unlink()
    films, text = capability_tasks(data, ["SST-2", "WikiText-2"])
    assert (films.name, text.name) == ("SST-2", "WikiText-2")


def test_a_cut_file_is_an_error(data: Path) -> None:
    (data / "hellaswag_val_full.txt.bz2").write_bytes(bz2.compress(b"scene\n0\na\nb\n"))
    with pytest.raises(ValueError, match="six lines"):
        hellaswag(data)


def test_a_table_of_texts_numbers_and_nothing() -> None:
    assert markdown_table(["name", "n", "share"], [["a", 5, 0.123456], ["b", 1000, None]]) == (
        "| name | n | share |\n| --- | --- | --- |\n| a | 5 | 0.123 |\n| b | 1000 | - |"
    )


def test_the_machine_is_told() -> None:
    line = Machine().line()
    told = ("cores", "GiB", "Python 3.11", "torch 2", "transformers 5", "commit ", "OMP_WAIT_POLICY", "load average")
    for part in told:
        assert part in line


def test_a_plot_is_written(tmp_path: Path) -> None:
    path = tmp_path / "plots" / "time.png"
    write_plot(path, {"plain": [(1, 2), (10, 5)], "other": [(1, 1.0)]}, title="t", x_label="edits", y_label="s")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_results_are_on_disk_after_every_row(tmp_path: Path) -> None:
    out = tmp_path / "new" / "speed.md"
    results = Results(out, "Speed", "How.")
    results.table(["edits", "s"])
    results.add([20, 1.5])
    text = out.read_text()
    assert text.startswith("# Speed\n\nHow.\n") and text.endswith("| edits | s |\n| --- | --- |\n| 20 | 1.5 |\n")
    results.say("Then.")
    results.add([1000, 1234.5])
    assert results.plot("time") == tmp_path / "new" / "speed-time.png"
    assert out.read_text().endswith("| 1000 | 1234 |\n\nThen.\n\n![time](speed-time.png)\n")
    results.record(edits=20, seconds=[1.5, 1.6])
    assert json.loads((tmp_path / "new" / "speed.jsonl").read_text()) == {"edits": 20, "seconds": [1.5, 1.6]}


def test_a_spread_is_the_median_and_the_range() -> None:
    assert spread([0.25]) == "0.25"
    assert spread([3, 1, 2]) == "2 (1 to 3)"
    assert spread([1.0, None]) is None


def test_options_are_told_without_places() -> None:
    options = argparse.Namespace(model=Path("/a/b/model"), counts=[1, 20], max_lr=5e-4, plain=None, out=Path("/x"))
    assert told(options) == "model model, counts 1 20, max lr 0.0005"


def test_the_overview_has_the_rows_of_all_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in RESULTS.glob("*.md"):
        (tmp_path / file.name).write_text(file.read_text())
    monkeypatch.setattr("sys.argv", ["overview", "--results", str(tmp_path)])
    overview.main()
    assert (tmp_path / "overview.md").read_text() == (RESULTS / "overview.md").read_text(), "run benchmarks.overview"
    assert (tmp_path / "overview.png").stat().st_size > 10_000
