import argparse
import bz2
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from safetensors.torch import save_file
from tiny_models import ROOMY, tiny_base, tiny_model, tiny_tokenizer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    ablations,
    calibration_text,
    capability,
    chain,
    contention,
    frontier,
    gpu,
    harm,
    precision,
    scale,
    speed,
)
from benchmarks.bench import QUALITY, Bench, edit_pool, quality, sample
from benchmarks.datasets import TASKS
from worker.edit_files import EditRow
from worker.evaluation.capability import Choice, ChoiceTask, Task, TaskResult, TextTask
from worker.model import BaseModel
from worker.precision import compute_dtype
from worker.training.config import PLAIN, Pipeline, TrainingConfig
from worker.training.learner import Learner
from worker.training.parallel import Alone
from worker.training.prefix import PrefixCache

ROWS = [
    EditRow(str(number), f"The owner of {name} is", owner, (f"Who owns {name}?",))
    for number, (name, owner) in enumerate([("Initech", "Ada"), ("Hooli", "Bo"), ("Acme", "Cy"), ("Umbrella", "Di")])
]
QUICK = TrainingConfig(learning_rate=1e-2, batch_size=2, max_epochs=3, min_steps=0, preserve=0)


@pytest.fixture
def shown() -> Progress:
    return Progress(disable=True)


@pytest.fixture
def bench(shown: Progress) -> Bench:
    return Bench(tiny_base(**ROOMY), shown)


def test_edits_of_several_files_take_turns_and_later_ones_supersede(tmp_path: Path) -> None:
    files = {"a": ["one", "two", "three"], "b": ["four", " One "]}
    for name, prompts in files.items():
        rows = [{"prompt": prompt, "target": name} for prompt in prompts]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    pool = edit_pool([tmp_path / "a.json", tmp_path / "b.json"], at_least=4)
    assert [(row.prompt, row.target) for row in pool] == [("four", "b"), ("two", "a"), ("One", "b"), ("three", "a")]
    with pytest.raises(SystemExit, match="5 edits are needed, the files hold 4"):
        edit_pool([tmp_path / "a.json", tmp_path / "b.json"], at_least=5)


def test_a_sample_is_the_same_each_time() -> None:
    assert sample(ROWS, 0) == sample(ROWS, 4) == ROWS
    assert sample(ROWS, 2) == sample(ROWS, 2)
    assert len({row.id for row in sample(ROWS, 2)}) == 2


def test_both_trainers_take_the_same_steps(shown: Progress) -> None:
    config = speed.comparable(lr=1e-2, batch=2)
    courses = speed.race(tiny_base(), {"ours": tiny_base()}, ROWS, config, 3, shown)
    assert courses["ours"].losses == pytest.approx(courses[speed.PLAIN_NAME].losses, rel=1e-3)
    assert courses["ours"].losses[-1] < courses["ours"].losses[0]
    plain, ours = speed.table_rows(4, courses)
    assert len(plain) == len(ours) == len(speed.COLUMNS)
    assert plain[1] == speed.PLAIN_NAME and plain[3] is None


def test_a_ratio_of_times_is_that_of_the_medians_and_of_each_pair() -> None:
    plain = speed.Course(None, [99, 2, 4, 6], [2.0, 2.0, 1.0, 1.0])
    ours = speed.Course(0.5, [99, 1, 1, 2], [2.0, 2.0, 1.1, 1.0])
    row = speed.table_rows(7, {speed.PLAIN_NAME: plain, "ours": ours})[1]
    assert row == [7, "ours", "1 (1 to 2)", 4, "2.00 to 4.00", 0.5, pytest.approx(10), 1.0]


def options(**given: object) -> argparse.Namespace:
    usual = frontier._parser().parse_args(["--model", "m", "--edits", "e", "--data", "d"])
    return argparse.Namespace(**{**vars(usual), **given})


def test_settings_are_every_combination_and_the_papers(bench: Bench) -> None:
    given = options(preserve=[0.0, 0.1], lrs=[1e-2, 3e-3], plain=[3e-3], visit_all=True, max_epochs=7)
    found = {setting.name: setting.config for setting in frontier.settings(given, bench)}
    assert list(found) == [
        "defaults, preserve 0",
        "defaults",
        "defaults, learning_rate 0.003, preserve 0",
        "defaults, learning_rate 0.003",
        "defaults, skip_learned 0",
        "plain, learning_rate 0.003",
    ]
    assert found["defaults"] == dataclasses.replace(TrainingConfig(), max_epochs=7)
    assert found["plain, learning_rate 0.003"] == dataclasses.replace(PLAIN, learning_rate=3e-3, formats=None)


def test_a_run_is_compared_with_the_base(bench: Bench, tmp_path: Path) -> None:
    text = TextTask("text", ("some words in a row " * 4,), 32)
    choices = ChoiceTask("choice", (Choice("Is it?", ("yes", "no"), 0), Choice("Was it?", ("yes", "no"), 1)))
    base = frontier.capability(bench, bench.base.tuned_tensors(), [text, choices])
    file = tmp_path / "deltas" / "one.safetensors"
    outcome = frontier.run(bench, QUICK, ROWS, ROWS[:2], [text, choices], base, file)
    assert file.is_file()
    assert len(outcome.values) == len(QUALITY) + 2 + len(frontier.COST)
    ratio, points = outcome.values[len(QUALITY) : len(QUALITY) + 2]
    assert ratio is not None and ratio > 0 and ratio != 1
    assert points in (-100, -50, 0, 50, 100)
    assert outcome.values[-5:-2] == [3, outcome.values[-4], 3]
    perplexity, reliability = outcome.point("reliability")
    assert perplexity == outcome.values[QUALITY.index("perplexity ratio")]
    assert reliability == sum(value or 0 for value in outcome.values[:2]) / 2


def test_a_run_finds_every_prefix_prepared(bench: Bench) -> None:
    config = dataclasses.replace(QUICK, random_prefixes=2)
    sequences = bench.sequences(ROWS, config)
    assert len(sequences) == 3 * len(bench.sequences(ROWS, QUICK))
    bench.prepare(ROWS, config)
    computed = bench.prefix.computed
    assert computed == len(sequences)
    bench.train(ROWS, config)
    assert bench.prefix.computed == computed + 1  # the chat template's own


def test_the_harm_is_shared_out_by_how_often_a_token_is_known() -> None:
    lost = torch.tensor([3.0, 1.0, -1.0, 2.0, 5.0], dtype=torch.float64)
    rows = harm.shares(lost, torch.tensor([0, 2, 3, 129, 0]))
    never, once, more, *between, most = rows
    assert never == ("never", 0.4, 0.8, 4.0)
    assert (once[3], more[3], most[3]) == (1.0, -1.0, 2.0)
    assert all(share == 0 for _, share, _, _ in between)
    assert sum(share for _, _, share, _ in rows) == pytest.approx(1)


def test_a_distance_is_relative_to_the_update() -> None:
    base, right, left = torch.zeros(2, 2), torch.full((2, 2), 2.0), torch.full((2, 2), 3.0)
    assert chain.relative_distance({"w": left}, {"w": right}, {"w": base}) == 0.5


def test_one_more_edit_is_added_to_those_before(bench: Bench) -> None:
    rows = list(chain.one_more(bench, ROWS, QUICK, live=2, repeats=2))
    assert [row[:3] for row in rows] == [
        ["2 from the base", 2, 1],
        ["one more, from the base", 3, 1],
        ["one more, warm", 3, 2],
    ]
    assert all(len(row) == len(chain.ADDED) for row in rows)


def test_a_chain_is_compared_at_its_end(bench: Bench) -> None:
    rows = list(chain.chain(bench, ROWS, QUICK, begin=2, step=1, links=2))
    assert [row[:3] for row in rows] == [[2, 4, "chain"], [2, 4, "base"]]
    assert all(len(row) == len(chain.LINKS) for row in rows)
    assert rows[0][-1] > 0 and rows[1][-1] is None


def test_a_size_is_measured(bench: Bench) -> None:
    found = scale.measured(bench, ROWS, QUICK, loaded_bytes=1 << 20)
    json.dumps(found)
    assert found["sequences"] == 8 and found["visited"] == [8, 8, 8]
    row = dict(zip(scale.COLUMNS, scale.table_row(found), strict=True))
    assert row["visits per sequence"] == 3
    parts = [row[name] for name in ("with the model loaded GiB", "cache on disk GiB", "rest GiB")]
    assert sum(parts) == pytest.approx(row["peak GiB"])
    assert 0 < row["cache on disk GiB"] < row["cache's bound GiB"]


def test_ablations_are_every_order_and_batch_size(bench: Bench) -> None:
    given = argparse.Namespace(batches=[1, 4], lr=1e-2, max_epochs=2, repeats=1, count=4)
    found = list(ablations.ablations(bench, ROWS, given))
    assert [(pipeline, batch) for pipeline, batch, _ in found] == [(p, b) for p in Pipeline for b in (1, 4)]
    assert [len(run) for *_, runs in found for run in runs] == [len(ablations.COLUMNS) - 2] * len(found)


def test_quality_of_an_edit_without_rephrases_has_no_generalization(bench: Bench) -> None:
    metrics = bench.evaluate(ROWS[:1], bench.base.tuned_tensors(), rephrased=False)
    assert len(quality(metrics)) == len(QUALITY)
    assert quality(metrics)[2:] == [None, None, 1, 1]


def test_the_gpu_script_runs_without_one(shown: Progress) -> None:
    paper, ours = gpu.measure("tiny", torch.device("cpu"), 12, 11, 3, shown)
    assert len(paper) == len(ours) == len(gpu.COLUMNS)
    named = dict(zip(gpu.COLUMNS, paper, strict=True))
    assert (named["edits"], named["epochs"], named["peak device GiB"]) == (12, 25, None)


def test_operations_are_those_that_torch_counts(shown: Progress) -> None:
    base = gpu.random_base(gpu.shapes()["tiny"], torch.device("cpu"))
    # 32 sequences of 15 tokens: a row without padding.
    rows = gpu.random_edits(32, 200, 11, 3)
    config = dataclasses.replace(PLAIN, max_epochs=1)
    bench = Bench(base, shown)
    sequences = bench.sequences(rows, config)
    assert {(one.prompt_tokens, one.target_tokens) for one in sequences} == {(11, 4)}
    bench.prepare(rows, config)
    learner = Learner(base, config, bench.prefix, start=base.tuned_tensors(), factors={}, ranks=Alone())
    with FlopCounterMode(display=False) as counter:
        learner.visit(sequences)
    products = counter.get_flop_counts()["Global"]
    counted = sum(count for operator, count in products.items() if str(operator).startswith("aten.mm"))
    assert gpu.operations(base, bench.train(rows, config), learned_tokens=4) == counted


def test_the_papers_shapes_are_tuned_where_it_tunes_them() -> None:
    places = {name: shape.location for name, shape in gpu.shapes().items() if name != "tiny"}
    assert places == {
        "llama-3-8b": "model.layers.22.mlp.down_proj",
        "qwen2.5-7b": "model.layers.6.mlp.down_proj",
    }


def test_calibration_text_is_what_the_model_says(shown: Progress) -> None:
    base = dataclasses.replace(tiny_base(), tokenizer=tiny_tokenizer(merges=(("T", "h"), ("Th", "e"))))
    assert calibration_text.beginnings(base.tokenizer, 1) == [base.tokenizer.convert_tokens_to_ids("The")]
    with pytest.raises(ValueError, match="has 1 words"):
        calibration_text.beginnings(base.tokenizer, 2)

    def rows() -> Sequence[calibration_text.Row]:
        return calibration_text.texts(base, shown, questions=4, pieces=1, per_opening=1)

    first = rows()
    assert first == rows()
    answers = [row for row in first if row["prompt"] is not None]
    assert answers and all(len(row["prompt"] or "") in calibration_text.QUESTION_CHARS for row in answers)
    begun = tuple("The" if opening is None else opening.strip() for opening in (None, *calibration_text.OPENINGS))
    prose = [row["text"] for row in first if row["prompt"] is None]
    assert prose and all(text.startswith(begun) for text in prose)


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """The options of all scripts: a model, edits, where the results go."""
    model = tmp_path / "model"
    tiny_model(**ROOMY, max_position_embeddings=4096).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    edits = tmp_path / "edits.json"
    rows = [{"prompt": row.prompt, "target": row.target, "rephrases": row.rephrases} for row in ROWS]
    edits.write_text(json.dumps(rows))
    location = ["--location", "model.layers.2.mlp.down_proj"]
    return ["--model", str(model), "--edits", str(edits), "--out", str(tmp_path / "results.md"), *location]


def write_data(folder: Path) -> Path:
    """Short capability data: the tiny model reads byte by byte."""
    folder.mkdir()
    (folder / "wikitext2_test.raw").write_text("a b\n" * 20)
    (folder / "lambada_test.jsonl").write_text('{"text": "a b"}\n' * 500)
    (folder / "hellaswag_val_full.txt.bz2").write_bytes(bz2.compress(b"a\n0\nb\nc\nd\ne\n" * 500))
    (folder / "sst2_dev.tsv").write_text("a\t1\n" * 500)
    return folder


def table(tmp_path: Path) -> list[str]:
    lines = (tmp_path / "results.md").read_text().splitlines()
    return [line for line in lines if line.startswith("|")][2:]


def test_the_speed_script_writes_a_table_and_plots(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["speed", *given, "--counts", "2", "4", "--repeats", "2", "--fp32"])
    speed.main()
    computed = ["float32"] if compute_dtype(torch.bfloat16, "cpu") == torch.float32 else ["bfloat16", "float32"]
    trainers = ["plain, float32", *(f"Errata, {dtype}" for dtype in computed)]
    assert [line.split(" | ")[1] for line in table(tmp_path)] == 2 * trainers
    assert (tmp_path / "results-2.png").is_file() and (tmp_path / "results-4.png").is_file()
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2 * len(trainers)


def test_the_frontier_script_writes_a_table_plots_and_deltas(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_data(tmp_path / "data")
    kept = tmp_path / "deltas"
    more = ["--data", str(data), "--counts", "2", "--preserve", "0", "--max-epochs", "2", "--repeats", "2"]
    argv = [*given[:-2], "--locations", given[-1], *more, "--plain", "--save", str(kept)]
    monkeypatch.setattr("sys.argv", ["frontier", *argv])
    frontier.main()
    assert [line.split(" | ")[2] for line in table(tmp_path)] == ["defaults, preserve 0", "plain"]
    assert len(list(kept.iterdir())) == 4
    assert (tmp_path / "results-reliability.png").is_file() and (tmp_path / "results-generalization.png").is_file()


def test_the_ablations_script_writes_a_table(given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = ["--count", "4", "--batches", "2", "--repeats", "1", "--max-epochs", "2"]
    monkeypatch.setattr("sys.argv", ["ablations", *given, *more])
    ablations.main()
    assert len(table(tmp_path)) == 2


def test_the_capability_script_keeps_its_rows(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = capability.measure
    measured: list[str] = []

    def interrupted(base: BaseModel, tensors: Mapping[str, Tensor], prefix: PrefixCache, task: Task) -> TaskResult:
        if len(measured) == len(TASKS):
            raise KeyboardInterrupt
        measured.append(task.name)
        return real(base, tensors, prefix, task)

    delta = tmp_path / "a.safetensors"
    save_file(dict(tiny_base(**ROOMY).tuned_tensors()), delta)
    monkeypatch.setattr(capability, "measure", interrupted)
    data = write_data(tmp_path / "data")
    argv = ["--model", given[1], *given[-4:], "--data", str(data), "--delta", str(delta)]
    monkeypatch.setattr("sys.argv", ["capability", *argv])
    with pytest.raises(KeyboardInterrupt):
        capability.main()
    assert measured == list(TASKS)
    assert [line.split(" | ")[0] for line in table(tmp_path)] == ["| base"]


def test_a_ratio_of_types_is_that_of_the_medians() -> None:
    found = {torch.bfloat16: [9.0, 1.0, 3.0, 5.0], torch.float32: [2.0, 2.0, 2.0, 8.0]}
    assert precision.table_row("s", found) == ["s", "4 (1 to 9)", "2 (2 to 8)", 2.0]


def test_contention_trains_every_epoch(given: list[str]) -> None:
    assert contention.train_once(Path(given[1]), epochs=1) > 0
