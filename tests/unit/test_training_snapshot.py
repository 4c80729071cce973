import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tiny_models import ROOMY, tiny_base
from torch import Tensor

from worker.model import BaseModel
from worker.training.breadth_first import Hooks, Start, TrainingResult, train
from worker.training.config import Pipeline, TrainingConfig
from worker.training.encode import TrainingEdit
from worker.training.errors import TrainingCancelledError
from worker.training.prefix import PrefixCache
from worker.training.snapshot import Saver, Snapshot, SnapshotMismatchError, load, save

EDITS = [TrainingEdit(f"e{number}", f"{number} is", f"{number * 7 % 10}") for number in range(6)]
LATER = TrainingEdit("later", "9 is", "nine")


def kept_in(snapshots: list[Snapshot]) -> Callable[[Callable[[], Snapshot]], None]:
    return lambda take: snapshots.append(take())


def config(**settings: object) -> TrainingConfig:
    return TrainingConfig(**{"learning_rate": 2e-2, "batch_size": 3, "preserve": 0, **settings})


def finish(
    base: BaseModel,
    settings: TrainingConfig,
    *,
    start: Start | None = None,
    edits: Sequence[TrainingEdit] = EDITS,
    hooks: Hooks | None = None,
) -> TrainingResult:
    return train(base, edits, settings, prefix=PrefixCache(), start=start or Start(), hooks=hooks)


def interrupted(base: BaseModel, settings: TrainingConfig, *, epochs: int = 3, hooks: Hooks | None = None) -> Snapshot:
    """The snapshot after so many epochs of a run that is then killed in the middle of the next."""
    snapshots: list[Snapshot] = []

    def stop() -> bool:
        return len(snapshots) == epochs

    arrivals = hooks.arrivals if hooks else tuple
    with pytest.raises(TrainingCancelledError):
        finish(
            base,
            settings,
            hooks=Hooks(on_snapshot=kept_in(snapshots), should_stop=stop, arrivals=arrivals),
        )
    return snapshots[-1]


def equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def story(result: TrainingResult) -> list[tuple[object, ...]]:
    return [(report.epoch, report.loss, report.visited, report.steps) for report in result.epochs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [{}, {"skip_learned": False}, {"pipeline": Pipeline.DEPTH_FIRST, "max_epochs": 5}],
    ids=["skip", "plain", "depth"],
)
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_last_bit(
    tmp_path: Path, dtype: torch.dtype, settings: dict[str, object]
) -> None:
    base = tiny_base(**ROOMY, dtype=dtype)
    whole = finish(base, config(**settings))
    assert len(whole.epochs) > 4
    save(tmp_path / "run", interrupted(base, config(**settings)))
    snapshot = load(tmp_path / "run")
    assert snapshot is not None
    resumed = finish(base, config(**settings), start=Start(snapshot=snapshot))
    assert equal(resumed.tensors, whole.tensors)
    assert story(resumed) == story(whole)
    assert (resumed.stopped, resumed.steps) == (whole.stopped, whole.steps)


@pytest.mark.parametrize("pipeline", Pipeline)
def test_a_snapshot_stays_what_it_was_when_its_run_goes_on(pipeline: Pipeline) -> None:
    base, settings = tiny_base(), config(pipeline=pipeline, max_epochs=3, min_steps=0)
    snapshots: list[Snapshot] = []
    whole = finish(base, settings, hooks=Hooks(on_snapshot=kept_in(snapshots)))
    resumed = finish(base, settings, start=Start(snapshot=snapshots[1]))
    assert equal(resumed.tensors, whole.tensors)


def test_a_snapshot_goes_on_from_a_version_too() -> None:
    base, settings = tiny_base(**ROOMY), config(max_epochs=4, min_steps=0)
    version = {name: tensor + 0.1 for name, tensor in base.tuned_tensors().items()}
    snapshots: list[Snapshot] = []
    whole = finish(base, settings, start=Start(tensors=version), hooks=Hooks(on_snapshot=kept_in(snapshots)))
    resumed = finish(base, settings, start=Start(tensors=version, snapshot=snapshots[0]))
    assert equal(resumed.tensors, whole.tensors)


def test_a_run_with_arrivals_is_resumed_with_them_and_with_what_is_left_of_their_budget() -> None:
    base, settings = tiny_base(), config(max_epochs=4, min_steps=0, loss_threshold=0)

    def arriving() -> Hooks:
        arrivals = iter([[], [], [LATER]])
        return Hooks(arrivals=lambda: next(arrivals, []))

    whole = finish(base, settings, hooks=arriving())
    snapshot = interrupted(base, settings, epochs=4, hooks=arriving())
    resumed = finish(base, settings, edits=[*EDITS, LATER], start=Start(snapshot=snapshot))
    assert [report.sequences for report in resumed.epochs] == [12, 12, 14, 14, 14, 14]
    assert story(resumed) == story(whole)
    assert equal(resumed.tensors, whole.tensors)


@pytest.mark.parametrize("pipeline", Pipeline)
def test_edits_added_at_the_end_join_with_a_whole_budget(pipeline: Pipeline) -> None:
    base, settings = tiny_base(**ROOMY), config(pipeline=pipeline, max_epochs=3, min_steps=0, loss_threshold=0)
    snapshot = interrupted(base, settings, epochs=2)
    resumed = finish(base, settings, edits=[*EDITS, LATER], start=Start(snapshot=snapshot))
    assert resumed.epochs[2].sequences == 14
    assert len(resumed.epochs) == (2 + 3 if pipeline == Pipeline.BREADTH_FIRST else (4 + 1) * 3)


@pytest.mark.parametrize(
    "other",
    [
        {"edits": EDITS[1:]},
        {"edits": EDITS[:-1]},
        {"edits": [*EDITS[:-1], TrainingEdit("x", "5 is", "7")]},
        {"settings": config(learning_rate=1e-3)},
        {"settings": config(preserve=0, batch_size=4)},
        {"base": tiny_base(seed=1)},
        {"base": tiny_base(location="model.layers.1.mlp.down_proj")},
        {"tensors": 0.5},
    ],
    ids=["first-gone", "last-gone", "target", "lr", "batch", "model", "location", "start"],
)
def test_a_snapshot_of_another_run_is_refused(other: dict[str, object]) -> None:
    base, settings = tiny_base(), config()
    snapshot = interrupted(base, settings, epochs=1)
    tensors = {name: tensor + 0.5 for name, tensor in base.tuned_tensors().items()} if "tensors" in other else None
    with pytest.raises(SnapshotMismatchError):
        finish(
            other.get("base", base),
            other.get("settings", settings),
            edits=other.get("edits", EDITS),
            start=Start(tensors=tensors, snapshot=snapshot),
        )


def test_another_dtype_is_another_run() -> None:
    base, prefix = tiny_base(dtype=torch.bfloat16), PrefixCache()
    start = Start(tensors=base.tuned_tensors())
    snapshots: list[Snapshot] = []
    train(base, EDITS, config(max_epochs=2), prefix=prefix, start=start, hooks=Hooks(on_snapshot=kept_in(snapshots)))
    others = dataclasses.replace(base, dtype=torch.float32), dataclasses.replace(tiny_base(), dtype=torch.bfloat16)
    for other in others:
        with pytest.raises(SnapshotMismatchError):
            finish(other, config(max_epochs=2), start=dataclasses.replace(start, snapshot=snapshots[0]))


def test_a_snapshot_of_another_format_is_of_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base()
    with monkeypatch.context() as older:
        older.setattr("worker.training.snapshot._FORMAT", 1)
        snapshot = interrupted(base, config(), epochs=1)
    with pytest.raises(SnapshotMismatchError):
        finish(base, config(), start=Start(snapshot=snapshot))


def test_the_seed_is_the_snapshots() -> None:
    base, settings = tiny_base(), config(max_epochs=4, min_steps=0)
    whole = finish(base, settings)
    snapshot = interrupted(base, settings, epochs=2)
    resumed = finish(base, config(max_epochs=4, min_steps=0, seed=9), start=Start(snapshot=snapshot))
    assert equal(resumed.tensors, whole.tensors)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "run.safetensors"
    save(path, interrupted(tiny_base(), config(), epochs=1))
    return path


def test_a_file_holds_all_of_a_snapshot(saved: Path) -> None:
    original, read = interrupted(tiny_base(), config(), epochs=1), load(saved)
    assert read is not None
    assert equal(read.tensors, original.tensors)
    assert (read.identity, read.sequences) == (original.identity, original.sequences)
    assert read.schedule == json.loads(json.dumps(original.schedule))
    assert [report.loss for report in read.reports] == [report.loss for report in original.reports]


def test_without_a_file_there_is_no_snapshot(tmp_path: Path) -> None:
    assert load(tmp_path / "none") is None
    assert load(tmp_path) is None


@pytest.mark.parametrize("size", [0, 4, 200, -1])
def test_a_truncated_file_is_no_snapshot(saved: Path, size: int) -> None:
    os.truncate(saved, size if size >= 0 else saved.stat().st_size - 1)
    assert load(saved) is None


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"other": "1"},
        {"snapshot": "no json"},
        {"snapshot": "[]"},
        {"snapshot": "{}"},
        {"snapshot": '{"identity": "", "sequences": 1, "schedule": {}, "reports": [{"epoch": 1}]}'},
    ],
)
def test_a_foreign_file_is_no_snapshot(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(2)}, path, metadata=metadata)
    assert load(path) is None


@pytest.mark.parametrize("broken", ["fsync", "rename"])
def test_a_full_disk_is_an_error_that_leaves_the_old_snapshot_and_nothing_else(
    saved: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = saved.read_bytes()
    monkeypatch.setattr(*(("os.fsync", full) if broken == "fsync" else (Path, "rename", full)))
    with pytest.raises(OSError, match="No space"):
        save(saved, interrupted(tiny_base(), config(), epochs=2))
    monkeypatch.undo()
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_snapshot_is_taken_no_more_often_than_a_restart_is_worth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("worker.training.snapshot.time.monotonic", lambda: clock[0])
    snapshot, taken = interrupted(tiny_base(), config(), epochs=1), []

    def take() -> Snapshot:
        taken.append(clock[0])
        return snapshot

    keep = Saver(tmp_path / "run.safetensors")
    for second in range(31):
        clock[0] = 100.0 + second
        keep(take)
    assert taken == [110.0, 120.0, 130.0]


def test_the_old_snapshot_is_there_until_the_new_one_is_whole(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    before, real = saved.read_bytes(), os.fsync

    def look(descriptor: int) -> None:
        real(descriptor)
        seen.append(saved.read_bytes())

    monkeypatch.setattr("os.fsync", look)
    save(saved, interrupted(tiny_base(), config(), epochs=2))
    assert seen[0] == before
    assert saved.read_bytes() != before
