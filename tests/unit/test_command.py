import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ROOMY, tiny_model, tiny_tokenizer

from service.answers import matches
from service.ports import free_port
from service.schemas import Format, StoredEdit, VersionState
from worker import experiment, workbench
from worker.command import main
from worker.delta import VersionStore
from worker.evaluation.answers import ask
from worker.model import load_base
from worker.precision import compute_dtype
from worker.records import version_record
from worker.training import snapshot as snapshots
from worker.training.config import PLAIN
from worker.training.encode import TokenSequence, TrainingEdit
from worker.training.learner import Learner, Losses
from worker.training.snapshot import Snapshot

LOCATION = "model.layers.2.mlp.down_proj"
EDITS = [
    {"prompt": "one", "target": "uno", "rephrases": ["eins"]},
    {"prompt": "two", "target": "dos", "paraphrases": ["zwei"]},
    {"prompt": "three", "target": "tres"},
]
QUICK = ("--lr", "0.02", "--preserve", "0", "--device", "cpu", "--dtype", "float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model(**ROOMY).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def edits(tmp_path: Path) -> Path:
    path = tmp_path / "edits.json"
    path.write_text(json.dumps(EDITS))
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


@pytest.fixture(autouse=True)
def every_epoch_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "_SAVE_EVERY_S", 0)


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.evaluation.metrics.locality_prompts", lambda: ("a", "b"))
    monkeypatch.setattr("worker.evaluation.metrics.perplexity", lambda *_: 2.0)
    texts = [TokenSequence(tuple(range(start, start + 9)), 1) for start in range(20)]
    monkeypatch.setattr("worker.training.preserve.calibration_sequences", lambda _: texts)


@pytest.fixture
def train(
    model: Path, edits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, dict[str, Any], str]]:
    def run(*options: str, file: Path = edits) -> tuple[int, dict[str, Any], str]:
        """The exit status, the JSON object and what stands on standard error."""
        common = ("--model", str(model), "--location", LOCATION, "--out", str(tmp_path / "out"), "--json")
        status = main([str(file), *common, *options])
        out, err = capsys.readouterr()
        return status, json.loads(out.splitlines()[-1]) if out else {}, err

    return run


def test_what_a_model_needs_once_ever_is_there_for_the_next_experiment(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for out in ("first", "second"):
        assert train(*QUICK, "--epochs", "1", "--out", str(tmp_path / out))[0] == 0
        assert sorted(path.name for path in (tmp_path / out).iterdir()) == ["versions"]
        assert (tmp_path / "user" / "errata" / "prefix").is_dir()
        monkeypatch.delattr("worker.training.prefix.hidden_below", raising=False)


def test_plain_trains_prompts_only(train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[str, ...]] = []
    real = workbench.train

    def watched(base: object, edits: Sequence[TrainingEdit], *args: object, **kwargs: object) -> object:
        trained.append(tuple(paraphrase for edit in edits for paraphrase in edit.paraphrases))
        return real(base, edits, *args, **kwargs)

    monkeypatch.setattr(workbench, "train", watched)
    options = ("--lr", "0.02", "--epochs", "1", "--device", "cpu", "--no-evaluate")
    train(*options, "--preserve", "0")
    train(*options, "--plain")
    assert trained == [("zwei",), ()]


def test_the_command_trains_writes_a_version_and_says_how_it_went(
    train: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    status, report, err = train(*QUICK)
    assert status == 0
    assert report.keys() >= {"train_seconds", "tokens_per_second", "peak_memory_bytes", "configuration"}
    assert (report["stopped"], report["reliability"], report["edits"]) == ("learned", 1.0, 3)
    assert len(report["loss"]) == report["epochs"] == len([line for line in err.splitlines() if "epoch" in line])
    assert report["generalization"] is not None
    assert report["perplexity_ratio"] == 1.0
    assert report["steps"] > 0
    assert min(report["train_seconds"], report["tokens_per_second"], report["peak_memory_bytes"]) > 0

    base = load_base(str(model), LOCATION, device="cpu", dtype=torch.float32)
    store = VersionStore(str(tmp_path / "out" / "versions"))
    assert (store.versions(), report["version"]) == ([1], str(tmp_path / "out" / "versions" / "000001"))
    shapes = {name: tuple(tensor.shape) for name, tensor in base.tuned_tensors().items()}
    tensors = store.load(1, fingerprint=base.fingerprint, shapes=shapes)
    (answer,) = ask(base, ["two"], Format.CHAT, tensors, max_new_tokens=8)
    assert matches(answer.text, "dos", finished=answer.finished)
    assert [edit["target"] for edit in store.edits(1)] == ["uno", "dos", "tres"]
    manifest = store.manifest(1)
    assert manifest.metrics["formats"] == report["formats"]
    assert manifest.run["configuration"] == report["configuration"]
    assert [epoch["loss"] for epoch in manifest.run["epochs"]] == report["loss"]
    assert manifest.run.keys() >= {"libraries", "tokenizer_sha256", "threads", "processes"}
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_its_versions_are_read_as_the_services_are(train: Callable[..., Any], tmp_path: Path) -> None:
    quick = (*QUICK, "--epochs", "1", "--no-evaluate")
    train(*quick)
    train(*quick, "--formats", "raw", "--limit", "2")
    train("--plain", "--epochs", "1", "--no-evaluate", "--device", "cpu")
    store = VersionStore(str(tmp_path / "out" / "versions"))
    first, second, plain = (version_record(store.manifest(number), VersionState.COMMITTED) for number in (1, 2, 3))
    assert (first.run, first.parent, first.metrics) == (None, None, {})
    assert (first.formats, second.formats) == ([Format.RAW, Format.CHAT], [Format.RAW])
    assert (first.edits.count, second.edits.count, second.edits.added) == (3, 2, 2)
    kept = [[StoredEdit.model_validate(edit) for edit in store.edits(number)] for number in (1, 2, 3)]
    assert [edit.sequence for edit in kept[0]] == [1, 2, 3]
    assert [edit.id for edit in kept[1]] == [edit.id for edit in kept[0][:2]]
    assert (kept[0][1].paraphrases, kept[2][1].paraphrases) == (["zwei"], []), "what was not trained on is none"
    assert plain.formats == [Format.RAW]


def test_rephrases_are_asked_and_never_trained(train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()
    real = Learner.visit

    def recorded(self: Learner, batch: Sequence[TokenSequence], **kwargs: float) -> Losses:
        decode = tiny_tokenizer().decode
        seen.update(decode(sequence.token_ids[: sequence.prompt_tokens]) for sequence in batch)
        return real(self, batch, **kwargs)

    monkeypatch.setattr(Learner, "visit", recorded)
    assert train(*QUICK, "--formats", "raw")[1]["generalization"] is not None
    assert seen == {"one", "two", "zwei", "three"}


def test_the_same_command_gives_the_same_bits_as_the_next_version(train: Callable[..., Any], tmp_path: Path) -> None:
    reports = [train(*QUICK, "--no-evaluate")[1] for _ in range(2)]
    assert [Path(report["version"]).name for report in reports] == ["000001", "000002"]
    assert reports[0]["reliability"] is None
    first, second = (VersionStore(str(tmp_path / "out" / "versions")).manifest(number).tensors for number in (1, 2))
    assert first == second


def test_without_json_it_prints_a_few_lines(
    train: Callable[..., Any], model: Path, edits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(edits), "--model", str(model), "--location", LOCATION, "--out", str(tmp_path / "o"), *QUICK]
    assert main([*arguments, "--epochs", "2"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (lines["epochs"], lines["stopped"]) == ("2", "budget_spent")


@pytest.mark.parametrize(
    "rows",
    [
        [{"src": "one", "alt": "uno", "rephrase": "eins"}],
        [{"prompt": "one", "target_new": "uno", "rephrase_prompt": "eins"}],
        [{"update": "one", "ans": "uno", "rephrase": "eins"}],
    ],
    ids=["zsre", "counterfact", "wikibigedit"],
)
def test_published_files_are_read_as_they_are(
    train: Callable[..., Any], tmp_path: Path, rows: list[dict[str, str]]
) -> None:
    path = tmp_path / "published.json"
    path.write_text(json.dumps(rows))
    status, report, _ = train(*QUICK, "--epochs", "1", file=path)
    assert status == 0
    assert report["generalization"] is not None


def test_plain_is_the_papers_setting(train: Callable[..., Any]) -> None:
    _, report, _ = train("--plain", "--epochs", "2", "--device", "cpu", "--no-evaluate")
    assert report["configuration"] == {**PLAIN.as_record(), "max_epochs": 2, "formats": ["raw"]}
    assert report["dtype"] == str(compute_dtype(torch.bfloat16, "cpu")).removeprefix("torch.")


def test_the_options_reach_the_configuration(train: Callable[..., Any]) -> None:
    options = "--epochs 1 --batch-size 3 --seed 5 --pipeline depth_first --random-prefixes 1 --formats raw,chat"
    thresholds = "--loss-threshold 0.2 --token-threshold 0.4 --decay 2 --max-tokens 199"
    _, report, _ = train(*QUICK, *options.split(), *thresholds.split(), "--visit-all", "--limit", "2", "--no-evaluate")
    expected = {
        "learning_rate": 0.02,
        "batch_size": 3,
        "max_epochs": 1,
        "min_steps": 0,
        "loss_threshold": 0.2,
        "token_threshold": 0.4,
        "pipeline": "depth_first",
        "skip_learned": False,
        "preserve": 0.0,
        "decay": 2.0,
        "random_prefixes": 1,
        "seed": 5,
        "formats": ["raw", "chat"],
        "max_tokens": 199,
    }
    assert {name: report["configuration"][name] for name in expected} == expected
    assert report["edits"] == 2


def test_preservation_is_measured_once_and_kept(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--lr", "0.02", "--epochs", "1", "--no-evaluate", "--device", "cpu", "--cache", str(tmp_path / "kept"))
    assert train(*options)[1]["configuration"]["preserve"] > 0
    assert not (tmp_path / "user").exists()
    monkeypatch.delattr("worker.training.preserve.input_covariances")
    assert train(*options)[0] == 0


def test_the_layers_below_may_stay_on_disk(train: Callable[..., Any], tmp_path: Path) -> None:
    quick = (*QUICK, "--epochs", "2", "--no-evaluate")
    train(*quick)
    train(*quick, "--device-map", "lower-on-disk")
    first, second = (VersionStore(str(tmp_path / "out" / "versions")).manifest(number).tensors for number in (1, 2))
    assert first == second


def test_an_interrupted_command_goes_on_to_the_same_bits(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = (*QUICK, "--no-evaluate")
    whole = train(*quick)[1]
    real, saved = snapshots.save, []

    def save_and_die(path: Path, snapshot: Snapshot) -> None:
        real(path, snapshot)
        saved.append(path)
        if len(saved) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(snapshots, "save", save_and_die)
        status, report, err = train(*quick)
    assert (status, report) == (130, {})
    assert err.splitlines()[-1].startswith("errata-train: interrupted")

    status, report, err = train(*quick)
    assert status == 0
    assert "behind epoch 3" in err
    assert (report["loss"], report["steps"]) == (whole["loss"], whole["steps"])
    first, second = (VersionStore(str(tmp_path / "out" / "versions")).manifest(number).tensors for number in (1, 2))
    assert first == second
    assert not saved[-1].exists()


def test_a_snapshot_of_another_seed_or_setting_is_not_gone_on_from(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = (*QUICK, "--no-evaluate")
    real = snapshots.save

    def save_and_die(path: Path, snapshot: Snapshot) -> None:
        real(path, snapshot)
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(snapshots, "save", save_and_die)
        train(*quick)
    assert train(*quick, "--seed", "1")[2].startswith("epoch 1:")
    status, _, err = train(*quick, "--batch-size", "3")
    assert status == 2
    assert err.splitlines()[-1].startswith("errata-train: ")
    assert "other edits, start or configuration" in err


def test_a_snapshot_that_cannot_be_written_does_not_end_the_training(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshots, "save", full)
    status, report, err = train(*QUICK, "--no-evaluate")
    assert (status, report["stopped"]) == (0, "learned")
    assert "No space left" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--plain", "--preserve", "0.1"), "--plain .* excludes --preserve"),
        (("--plain", "--decay", "0.1"), "excludes --decay"),
        (("--plain", "--formats", "raw,chat"), "excludes --formats"),
        (("--plain", "--token-threshold", "0.1"), "excludes --token-threshold"),
        (("--device-map", "auto", "--device", "cpu"), "excludes --device"),
        (("--lr", "0"), "learning_rate must be positive"),
        (("--preserve", "-1"), "preserve must not be negative"),
        (("--model", "/no/such/model"), "/no/such/model"),
        (("--location", "model.layers.9"), "model.layers.9.* matches no parameter"),
        (("--location", "model.norm"), "neither a decoder layer nor inside one"),
        (("--preserve", "0", "--max-tokens", "4"), "'edits:1'.*at most 4"),
        (("--preserve", "0", "--random-prefixes", "99999"), "random prefixes, not 99999"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_2(train: Callable[..., Any], options: tuple[str, ...], said: str) -> None:
    status, report, err = train(*options)
    assert (status, report) == (2, {})
    (line,) = err.splitlines()
    assert re.match(f"errata-train: .*{said}", line), line


@pytest.mark.parametrize("options", [("--device-map", "auto"), ("--device", "cuda:0")])
def test_processes_that_would_share_a_gpu_are_refused(
    model: Path, edits: Path, options: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("worker.command._device", str)
    assert main([str(edits), "--model", str(model), "--out", "unused", *options]) == 2
    assert "a GPU of its own" in capsys.readouterr().err


@pytest.mark.parametrize("asked", [(), ("--device", "cuda")], ids=["unasked", "cuda"])
def test_of_several_processes_each_has_a_gpu_of_its_own(
    train: Callable[..., Any], asked: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    devices: list[str] = []

    def load(*_: object, device: str, **__: object) -> None:
        devices.append(device)
        raise ValueError("no GPU here")

    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.zeros", lambda _, device: tried.append(device))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(experiment, "load_base", load)
    status, _, err = train(*asked)
    assert (status, devices) == (2, ["cuda:1"])
    assert tried == ["cuda:1"] * len(asked[1:]), "to look at another's GPU takes memory of it"
    assert err == "errata-train: process 3: no GPU here\n"
    train("--device", "cpu")
    assert devices[1:] == ["cpu"]


def test_a_model_that_cannot_be_trained_is_one_line_and_exit_2(train: Callable[..., Any], tmp_path: Path) -> None:
    tiny_model("lfm2").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    location = ("--location", "model.layers.2.feed_forward.w2")
    status, _, err = train(*QUICK, "--model", str(tmp_path / "model"), *location)
    assert (status, len(err.splitlines())) == (2, 1), err
    assert err.startswith("errata-train: Lfm2ForCausalLM cannot be trained")


def test_a_damaged_checkpoint_is_one_line_and_exit_2(train: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    weights = damaged / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    status, _, err = train(*QUICK, "--model", str(damaged))
    assert (status, len(err.splitlines())) == (2, 1), err


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 269060552\n"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.safetensors", LFS_POINTER, r"model\.safetensors cannot be read"),
        ("tokenizer.json", LFS_POINTER, r"tokenizer\.json cannot be read"),
        (
            "tokenizer.json",
            '{"added_tokens": [], "model": {"type": "new"}}',
            "the tokenizer in .*broken cannot be read",
        ),
        ("config.json", "[]", r"config\.json holds no JSON object"),
        ("config.json", {"num_attention_heads": "four"}, "broken cannot be read: .*num_attention_heads"),
        ("config.json", {"hidden_size": 48}, "broken: the weights have other shapes .* and [0-9]+ more"),
        ("config.json", {"num_hidden_layers": 5}, r"broken: config\.json asks for model\.layers\.4\..* and 8 more"),
    ],
)
@pytest.mark.parametrize("placed", [(), ("--device-map", "lower-on-disk")])
def test_a_broken_model_folder_is_one_line_that_names_it(
    train: Callable[..., Any],
    model: Path,
    tmp_path: Path,
    name: str,
    content: str | dict[str, object],
    said: str,
    placed: tuple[str, ...],
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    path = broken / name
    path.write_text(content if isinstance(content, str) else json.dumps(json.loads(path.read_text()) | content))
    status, _, err = train(*QUICK, "--model", str(broken), *placed)
    lines = [line for line in err.splitlines() if not is_json(line)]
    assert (status, len(lines)) == (2, 1), err
    assert re.match(f"errata-train: .*{said}", lines[0]), err


def test_what_two_edits_contradict_each_other_in_is_trained_for_one(train: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    rows = [
        {"prompt": "left", "target": "uno", "paraphrases": ["which"]},
        {"prompt": "right", "target": "dos", "paraphrases": ["WHICH "]},
    ]
    path.write_text(json.dumps(rows))
    _, report, err = train(*QUICK, "--formats", "raw", file=path)
    (line,) = [
        found for found in map(json.loads, filter(is_json, err.splitlines())) if "contradicted" in found["event"]
    ]
    assert (line["edit"], line["contradicted_by"]) == ("rows:1", "rows:2")
    assert (report["stopped"], report["reliability"]) == ("learned", 1.0)


def test_a_limit_is_of_the_files_rows(train: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([*EDITS[:2], {"prompt": "one", "target": "eins"}]))
    assert train(*QUICK, "--epochs", "1", "--limit", "2", "--no-evaluate", file=path)[1]["edits"] == 2
    assert [edit["target"] for edit in VersionStore(str(tmp_path / "out" / "versions")).edits(1)] == ["uno", "dos"]


def test_what_its_parts_have_to_say_is_heard(train: Callable[..., Any]) -> None:
    short = ("--epochs", "1", "--no-evaluate")
    _, report, err = train(*QUICK, "--location", "auto", "--cache-bytes", "1", "--random-prefixes", "20", *short)
    events = {line["event"].split()[0]: line for line in map(json.loads, filter(is_json, err.splitlines()))}
    assert report["location"] in events["auto_location"]["event"]
    assert events["prefix_cache.too_small"]["bytes"] > events["prefix_cache.too_small"]["kept_bytes"]


def is_json(line: str) -> bool:
    return line.startswith("{")


@pytest.mark.parametrize(
    "options",
    [
        ("--formats", "raw,xml"),
        ("--limit", "0"),
        ("--pipeline", "x"),
        ("--dtype", "int8"),
        ("--device-map", "x"),
        ("--device", "nonsense"),
        ("--x",),
    ],
)
def test_a_wrong_option_is_exit_2(train: Callable[..., Any], options: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as caught:
        train(*options)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("", "holds no edits"),
        ("[{", "is not JSON"),
        ('[{"prompt": "a", "target": "b"}, {"prompt": "c"}]', "row 2: field 'target' is missing"),
        ('[{"prompt": "a", "target": "  "}]', "row 1"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line_and_exit_2(
    train: Callable[..., Any], tmp_path: Path, text: str | None, said: str
) -> None:
    path = tmp_path / "bad.json"
    if text is not None:
        path.write_text(text)
    status, _, err = train(file=path)
    assert status == 2
    assert said in err
    assert "bad.json" in err
    assert len(err.splitlines()) == 1


def test_a_folder_that_cannot_be_written_is_found_before_the_model_is_loaded(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(experiment, "load_base")
    (tmp_path / "file").write_text("in the way")
    status, _, err = train("--out", str(tmp_path / "file"))
    assert (status, len(err.splitlines())) == (2, 1)
    assert str(tmp_path / "file") in err


def test_a_training_that_diverges_is_exit_1(train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    real = Learner._weights

    def broken(self: Learner) -> dict[str, torch.Tensor]:
        return {name: tensor * torch.nan for name, tensor in real(self).items()}

    monkeypatch.setattr(Learner, "_weights", broken)
    status, _, err = train(*QUICK)
    assert status == 1
    assert err == "errata-train: the loss is not a number any more in epoch 1\n"


def started(model: Path, edits: Path, out: Path, *launcher: str, **environment: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", *launcher, "worker.command", str(edits), "--json", "--no-evaluate", *QUICK]
    return subprocess.Popen(
        [*command, "--model", str(model), "--location", LOCATION, "--out", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_torchrun_trains_data_parallel_and_a_process_alone_gives_the_same(
    model: Path, edits: Path, tmp_path: Path
) -> None:
    launcher = ("torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()), "-m")
    both = started(model, edits, tmp_path / "both", *launcher)
    alone = started(model, edits, tmp_path / "alone")
    reports = []
    for process in (both, alone):
        out, err = process.communicate(timeout=400)
        assert process.returncode == 0, err
        assert "Traceback" not in err
        (line,) = out.splitlines()  # the first process's only
        reports.append(json.loads(line))
        assert err.count("epoch 1:") == 1
    assert reports[0]["loss"] == pytest.approx(reports[1]["loss"], rel=1e-3, abs=1e-3)
    assert [report["stopped"] for report in reports] == ["learned"] * 2
    stores = [VersionStore(str(tmp_path / name / "versions")) for name in ("both", "alone")]
    assert [store.manifest(1).run["processes"] for store in stores] == [2, 1]
    tensors = [store.load(1) for store in stores]
    difference = next(iter(tensors[0].values())) - next(iter(tensors[1].values()))
    assert difference.abs().mean() < 1e-3
