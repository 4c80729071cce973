"""A train worker without a model: it carries a run from its claim to a committed version, and teaches the nodes."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from scripted_node import TENSORS, ScriptedNode

from service.schemas import Edit, EditCounts, EditRequest, Format, Run, Trigger, VersionRecord, VersionState
from service.stores import Stores


def record(version: int, *, run: str | None = None, state: VersionState = VersionState.COMMITTED) -> VersionRecord:
    return VersionRecord(
        version=version,
        parent=None if version == 0 else 0,
        run=run,
        state=state,
        fingerprint="f" * 64,
        location="model.layers.1.mlp.down_proj",
        tensors=TENSORS,
        formats=[Format.RAW, Format.CHAT],
        metrics={},
        edits=EditCounts(count=0, added=0, removed=0),
        created_at=int(time.time()),
    )


@dataclass
class ScriptedWorker:
    """Runs to a committed version; ``mistakes`` are the prompts that it teaches wrongly."""

    stores: Stores
    nodes: Sequence[ScriptedNode] = ()
    mistakes: Mapping[str, str] = field(default_factory=dict)

    def register_base(self) -> None:
        self.stores.registry.commit(record(0, state=VersionState.VERIFIED), [], token=None)
        self.stores.registry.activate(0)

    def begin(self) -> tuple[Run, list[Edit]]:
        """The queued run, or a new one, up to its claim."""
        queued = self.stores.runs.queued() or self.stores.runs.request(Trigger.MANUAL)[0]
        run = self.stores.runs.start(queued.id)
        assert run is not None
        return run, self.stores.edits.claim(run.id).members

    def commit(self, run: Run, members: Sequence[Edit]) -> int:
        version = self.stores.registry.next_number(run, above=0)
        members_ids = [edit.id for edit in members]
        self.stores.registry.commit(record(version, run=run.id), members_ids, token=run.token)
        answers = {edit.prompt: self.mistakes.get(edit.prompt, edit.target) for edit in members}
        for node in self.nodes:
            node.teach(version, answers)
        return version

    def train(self) -> tuple[Run, int]:
        """A whole run, up to its verification."""
        run, members = self.begin()
        return run, self.commit(run, members)


def fact(prompt: str, target: str) -> EditRequest:
    return EditRequest(prompt=prompt, target=target)
