"""A version of errata-train, taken up by a service that begins beside it."""

import dataclasses
import json
from pathlib import Path

import pytest
from conftest import MakeReconciler
from scripted_node import ScriptedNode
from tiny_models import ROOMY, tiny_base
from training_bench import make_bench

from service.queue import TaskQueue
from service.schemas import EditStatus, Format, VersionState
from service.settings import Settings
from service.stores import Stores
from worker import experiment
from worker.experiment import Experiment, run_experiment

FACTS = {"one": "uno", "two": "dos", "three": "tres"}


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two versions of one file, the first of two of its edits."""
    base = dataclasses.replace(tiny_base(**ROOMY), fingerprint="f" * 64)  # the bench's
    monkeypatch.setattr(experiment, "load_base", lambda *_, **__: base)
    file = tmp_path / "facts.json"
    file.write_text(json.dumps([{"prompt": prompt, "target": target} for prompt, target in FACTS.items()]))
    changes = {"preserve": 0.0, "learning_rate": 4e-2}
    for limit in (2, None):
        asked = Experiment(file, tmp_path, "tiny", changes=changes, limit=limit, cache=tmp_path, evaluate=limit is None)
        run_experiment(asked)


@pytest.mark.usefixtures("trained")
def test_a_new_service_takes_up_what_errata_train_wrote(
    stores: Stores,
    queue: TaskQueue,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_reconciler: MakeReconciler,
) -> None:
    bench = make_bench(stores, queue, settings, tmp_path, monkeypatch)
    assert [record.version for record in stores.registry.all()] == [2, 1, 0]
    active = stores.registry.active()
    assert active is not None
    assert active.active == 0, "nothing is served that no node answered for"
    record = stores.registry.get(2)
    assert (record.state, record.run, record.edits.count) == (VersionState.COMMITTED, None, 3)
    assert (record.formats, record.metrics["formats"].keys()) == ([Format.RAW, Format.CHAT], {"raw", "chat"})
    assert (stores.registry.members(1), stores.registry.members(2)) == ([1, 2], [1, 2, 3])

    node = ScriptedNode()
    node.tensors = record.tensors
    node.teach(2, FACTS)
    make_reconciler(node.client()).tick()
    active = stores.registry.active()
    assert active is not None
    assert active.active == 2
    assert {edit.prompt: edit.target for edit in stores.edits.in_status(EditStatus.LIVE)} == FACTS

    bench.submit("four", "cuatro")
    manifest = bench.manifest_of(bench.run())
    assert (manifest["start"], manifest["chain"]) == (2, 1)
    assert len(bench.trainer.versions.edits(3)) == 4
