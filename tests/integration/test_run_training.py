"""Real training of a tiny model between a real Redis and a real version store: where a run starts, who joins it."""

import dataclasses
from pathlib import Path

import pytest
import torch
from training_bench import TRAINING, Bench

from service.schemas import EditError, EditRequest, EditStatus, RunStatus
from worker import run_training as worker_run_training
from worker.training import snapshot
from worker.training.config import PLAIN, TrainingConfig
from worker.training.learner import Learner
from worker.training.snapshot import EpochReport


def test_an_addition_starts_from_the_active_version(bench: Bench) -> None:
    first = bench.submit("one", "uno")
    assert bench.manifest_of(bench.run())["chain"] == 0
    second = bench.submit("two", "dos")
    run = bench.run()
    assert bench.starts == [frozenset(), frozenset({first})]
    manifest = bench.manifest_of(run)
    assert (manifest["start"], manifest["chain"]) == (1, 1)
    assert [edit["id"] for edit in bench.trainer.versions.edits(2)] == [first, second]


def test_a_withdrawal_starts_from_the_base(bench: Bench) -> None:
    first, second = bench.submit("one", "uno"), bench.submit("two", "dos")
    bench.run()
    bench.stores.edits.retract(first)
    manifest = bench.manifest_of(bench.run())
    assert bench.starts == [frozenset(), frozenset()]
    assert (manifest["start"], manifest["chain"]) == (0, 0)
    assert [edit["id"] for edit in bench.trainer.versions.edits(2)] == [second]


def test_a_supersession_starts_from_the_base(bench: Bench) -> None:
    bench.submit("one", "uno")
    bench.run()
    newer = bench.submit("one", "eins")
    bench.run()
    assert bench.starts == [frozenset(), frozenset()]
    assert [edit["id"] for edit in bench.trainer.versions.edits(2)] == [newer]


def test_a_run_after_redis_was_lost_is_over_what_was_there_before_too(bench: Bench) -> None:
    """The worker did not die with it, so nothing has been repaired when the first new edit comes."""
    first = bench.submit("one", "uno")
    bench.run()
    redis = bench.stores.redis
    redis.delete(*[key for key in redis.scan_iter() if not key.startswith("_kombu")])
    second = bench.submit("two", "dos")
    queued = bench.run()
    assert queued.status is RunStatus.QUEUED, "what was there is verified first"
    verifying = bench.stores.runs.current()
    assert verifying is not None
    assert (verifying.status, verifying.version) == (RunStatus.VERIFYING, 1)
    bench.publish(verifying)
    bench.run()
    assert [edit["id"] for edit in bench.trainer.versions.edits(2)] == [first, second]


def test_a_rollback_is_the_start_of_what_comes_after_it(bench: Bench) -> None:
    first = bench.submit("one", "uno")
    bench.run()
    bench.submit("two", "dos")
    bench.run()
    bench.stores.registry.activate(1)
    bench.stores.edits.settle()
    bench.submit("three", "tres")
    manifest = bench.manifest_of(bench.run())
    assert bench.starts[-1] == frozenset({first})
    assert manifest["start"] == 1


def test_a_chain_of_warm_starts_ends_at_the_base(bench: Bench) -> None:
    bench.trainer.training.settings.__dict__["train_warm_runs"] = 2
    chains = []
    for number in range(4):
        bench.submit(f"{number}", "x")
        chains.append(bench.manifest_of(bench.run())["chain"])
    assert chains == [0, 1, 2, 0]


def test_a_damaged_parent_is_not_started_from(bench: Bench, tmp_path: Path) -> None:
    bench.submit("one", "uno")
    bench.run()
    delta = tmp_path / "versions" / "000001" / "delta.safetensors"
    delta.write_bytes(delta.read_bytes()[:-1])
    bench.submit("two", "dos")
    assert bench.run().status is RunStatus.SUCCEEDED
    assert bench.starts == [frozenset(), frozenset()]


def test_an_edit_that_arrives_joins_at_the_next_epoch(bench: Bench) -> None:
    bench.submit("one", "uno")
    late: list[str] = []

    def arrive(epoch: EpochReport) -> None:
        if epoch.epoch == 2:
            late.append(bench.submit("two", "dos"))

    bench.between_epochs = arrive
    run = bench.run()
    assert len(bench.starts) == 1, "no second training"
    assert bench.stores.edits.get(late[0]).status is not EditStatus.QUEUED
    assert (run.edits, run.new_edits) == (2, 2)
    sequences = [epoch["sequences"] for epoch in bench.manifest_of(run)["epochs"]]
    assert sequences[:3] == [2, 2, 4]
    assert [edit["id"] for edit in bench.trainer.versions.edits(1)][-1] == late[0]


@pytest.mark.parametrize("leave", ["superseded", "withdrawn"])
def test_what_leaves_while_others_arrive_is_not_in_the_version(bench: Bench, leave: str) -> None:
    first, kept = bench.submit("one", "uno"), bench.submit("two", "dos")

    def change(epoch: EpochReport) -> None:
        if epoch.epoch == 2 and len(bench.starts) == 1:
            if leave == "withdrawn":
                bench.stores.edits.retract(first)
                bench.submit("three", "tres")
            else:
                bench.submit("one", "eins")

    bench.between_epochs = change
    run = bench.run()
    members = bench.trainer.versions.edits(1)
    assert len(bench.starts) == 2, "it began again"
    assert first not in [edit["id"] for edit in members]
    assert members[0]["id"] == kept
    assert run.status is RunStatus.SUCCEEDED
    assert bench.stores.edits.get(str(members[1]["id"])).status is EditStatus.LIVE


def test_a_killed_run_goes_on_where_it_was(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "_SAVE_EVERY_S", 0)
    bench.submit("one", "uno")

    def cancel(epoch: EpochReport) -> None:
        if epoch.epoch == 3 and len(bench.starts) == 1:
            bench.trainer.stopping.set()

    bench.between_epochs = cancel
    assert bench.run().status is RunStatus.CANCELLED
    bench.trainer.stopping.clear()
    run = bench.run()
    epochs = [epoch["epoch"] for epoch in bench.manifest_of(run)["epochs"]]
    assert epochs == list(range(1, len(epochs) + 1))
    assert len(run.epochs) == len(epochs) - 3, "the first three were not trained again"

    monkeypatch.setattr(bench.trainer.training.__class__, "_snapshot_path", Path("/nonexistent/snapshot"))
    bench.stores.edits.retract(bench.stores.edits.in_status(EditStatus.LIVE)[0].id)
    bench.submit("one", "uno")
    again = bench.run()
    assert run.version is not None
    assert again.version is not None
    left, right = (bench.trainer.versions.load(version) for version in (run.version, again.version))
    assert all(torch.equal(left[name], right[name]) for name in left), "the same bits as without the kill"


def test_a_warm_run_whose_worker_was_killed_goes_on_where_it_was(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its attempt counts, and what is tried again starts from the base, but nothing of it has failed."""
    monkeypatch.setattr(snapshot, "_SAVE_EVERY_S", 0)
    first = bench.submit("one", "uno")
    bench.run()
    second = bench.submit("two", "dos")

    def die(epoch: EpochReport) -> None:
        if epoch.epoch == 3:
            raise KeyboardInterrupt

    bench.between_epochs = die
    with pytest.raises(KeyboardInterrupt):
        bench.run()
    bench.between_epochs = lambda _: None
    dead = bench.stores.runs.current()
    assert dead is not None
    lost = EditError(code="worker_lost", message="taken over")
    bench.stores.runs.finish(dead.id, RunStatus.FAILED, error=lost)
    bench.stores.edits.unclaim(dead.id, error=lost)
    assert bench.stores.edits.get(second).attempts == 1
    run = bench.run()
    assert bench.starts[-1] == frozenset({first})
    manifest = bench.manifest_of(run)
    assert (manifest["start"], manifest["chain"]) == (1, 1)
    assert manifest["configuration"]["seed"] == bench.trainer.settings.train_seed, "whose shuffles it went on with"
    assert len(run.epochs) == len(manifest["epochs"]) - 2, "the third was not kept yet"


def test_edits_that_keep_coming_do_not_keep_a_run_from_its_end(bench: Bench) -> None:
    first = bench.submit("first", "eins")

    def another(epoch: EpochReport) -> None:
        bench.submit(f"prompt {epoch.epoch}", "word")
        assert epoch.epoch < 1000

    bench.between_epochs = another
    run = bench.run()
    assert run.status is RunStatus.SUCCEEDED
    assert run.edits == 9
    assert bench.stores.edits.get(first).status is EditStatus.LIVE
    assert bench.stores.edits.counts()[EditStatus.QUEUED] > 0


def test_a_warm_run_of_the_papers_settings_judges_each_new_edit_by_itself(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean over many learned edits is under the threshold before the new one is looked at twice."""
    plain = dataclasses.replace(PLAIN, learning_rate=4e-2, loss_threshold=0.05, max_epochs=100)
    monkeypatch.setattr(worker_run_training, "config_for", lambda _: plain)
    for number in range(12):
        bench.submit(f"number {number}", str(number))
    bench.run()
    bench.submit("the newest of all", "zebra")
    manifest = bench.manifest_of(bench.run())
    assert manifest["chain"] == 1
    assert manifest["stopped"] == "learned"
    assert manifest["epochs"][-1]["unlearned"] == 0
    assert manifest["configuration"]["skip_learned"]


def test_a_warm_run_of_the_papers_settings_steps_as_small_as_any(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their rate does not fall over the budget: at that of a new run, one edit on many makes the run forget others."""
    plain = dataclasses.replace(PLAIN, learning_rate=4e-2, loss_threshold=0.05, max_epochs=100, batch_size=4)
    monkeypatch.setattr(worker_run_training, "config_for", lambda _: plain)
    rates: list[float] = []
    set_learning_rate = Learner.set_learning_rate

    def watched(self: Learner, *args: float, **kwargs: float) -> None:
        set_learning_rate(self, *args, **kwargs)
        rates.append(self.optimiser.param_groups[0]["lr"] / plain.learning_rate)

    monkeypatch.setattr(Learner, "set_learning_rate", watched)
    for number in range(12):
        bench.submit(f"number {number}", str(number))
    assert bench.manifest_of(bench.run())["configuration"]["final_lr_ratio"] == 1
    assert set(rates) == {1.0}
    rates.clear()
    bench.submit("the newest of all", "zebra")
    assert bench.manifest_of(bench.run())["configuration"]["final_lr_ratio"] == TrainingConfig().final_lr_ratio
    # Of twelve learned sequences a batch is replayed.
    assert rates[0] == pytest.approx((4 / 12) ** 0.5)


def test_what_the_settings_say_of_training_is_done(bench: Bench) -> None:
    bench.trainer.settings.__dict__ |= {"train_decay": 0.0, "train_random_prefixes": 1}
    bench.submit("one", "uno")
    configuration = bench.manifest_of(bench.run())["configuration"]
    assert configuration["decay"] == 0
    assert configuration["random_prefixes"] == 1
    assert configuration["max_epochs"] == TRAINING["train_max_epochs"]


def test_a_rejected_run_leaves_nothing_to_go_on_from(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "_SAVE_EVERY_S", 0)
    bench.trainer.settings.__dict__["gate_max_perplexity_ratio"] = 1e-9
    bench.submit("one", "uno")
    assert bench.run().status is RunStatus.FAILED
    assert not bench.trainer.training._snapshot_path.exists()


def test_an_edit_that_is_tried_again_starts_from_the_base(bench: Bench) -> None:
    bench.submit("one", "uno")
    bench.run()
    bench.submit("two", "dos")
    bench.trainer.settings.__dict__["gate_max_perplexity_ratio"] = 1e-9
    assert bench.run().status is RunStatus.FAILED
    bench.trainer.settings.__dict__["gate_max_perplexity_ratio"] = 1e9
    assert bench.run().status is RunStatus.SUCCEEDED
    assert [bool(learned) for learned in bench.starts] == [False, True, False]


def test_a_run_starts_over_once_at_most(bench: Bench) -> None:
    bench.submit("one", "uno")
    bench.submit("two", "dos")

    def supersede(epoch: EpochReport) -> None:
        if epoch.epoch == 2:
            bench.submit("one", f"answer {len(bench.starts)}")

    bench.between_epochs = supersede
    assert bench.run().status is RunStatus.SUCCEEDED
    assert len(bench.starts) == 2


def test_an_arrival_that_contradicts_a_paraphrase_begins_the_training_again(bench: Bench) -> None:
    edits = bench.stores.edits
    [older] = edits.submit([EditRequest(prompt="one", target="uno", paraphrases=["first", "which"])])
    late: list[str] = []

    def arrive(epoch: EpochReport) -> None:
        if epoch.epoch == 2 and not late:
            late.append(bench.submit("Which", "dos"))

    bench.between_epochs = arrive
    run = bench.run()
    assert run.status is RunStatus.SUCCEEDED
    assert len(bench.starts) == 2, "it began again"
    manifest = bench.manifest_of(run)
    assert {epoch["sequences"] for epoch in manifest["epochs"]} == {3 * 2}, "prompts and one paraphrase, two formats"
    assert manifest["stopped"] == "learned"
    stored = {edit["id"]: edit["paraphrases"] for edit in bench.trainer.versions.edits(1)}
    assert stored == {older.id: ["first", "which"], late[0]: []}, "the edits are what was said"


def test_what_a_run_writes_is_enough_to_rebuild_redis(bench: Bench) -> None:
    bench.submit("one", "uno")
    bench.run()
    bench.submit("two", "dos")
    bench.run()
    registry, edits = bench.stores.registry, bench.stores.edits
    records, members = registry.all(), registry.members(2)
    before = edits.page(status=None, q=None, after=None, limit=10).data
    bench.stores.redis.delete(*[key for key in bench.stores.redis.scan_iter() if not key.startswith("_kombu")])

    bench.trainer.prepare()
    said = {"state", "reason"}
    assert [found.model_dump(exclude=said) for found in registry.all()] == [
        record.model_dump(exclude=said) for record in records
    ]
    assert registry.members(2) == members
    newest = registry.get(2)
    assert (newest.formats, newest.edits.count, newest.edits.added) == (["raw", "chat"], 2, 1)
    after = edits.page(status=None, q=None, after=None, limit=10).data
    constant = {"id", "prompt", "target", "metadata", "created_at"}
    assert [edit.model_dump(include=constant) for edit in after] == [
        edit.model_dump(include=constant) for edit in before
    ]
    run = bench.stores.runs.current()
    assert run is not None
    assert (run.status, run.version) == (RunStatus.VERIFYING, 2)
