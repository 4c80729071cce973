"""What must hold when everything is at rest again: nothing lost or made up, versions whole and as they were."""

import json
from collections import Counter

from service.client import ClientError
from service.schemas import EditStatus
from tests.chaos.asking import ask, served
from tests.chaos.world import World
from worker.delta import DeltaError, VersionStore, tensor_sha256

_ENGINE_FAILED = "WorkerProc hit an exception"


def aftermath(world: World) -> None:
    """Notes what is wrong."""
    try:
        _edits(world)
        _versions(world)
        _answers(world)
    except (ClientError, DeltaError) as error:
        world.notes.wrong(f"what is left could not be looked at: {error}")
    _engine(world)
    _doctor(world)


def _edits(world: World) -> None:
    """Each acknowledged edit is listed once as it was submitted, and no other."""
    acknowledged = world.ledger.acknowledged()
    with world.client() as client:
        listed = {edit.id: (edit.prompt, edit.target) for edit in client.all_edits()}
    for edit_id, request in acknowledged.items():
        if listed.get(edit_id) != (request.prompt, request.target):
            world.notes.wrong(f"{edit_id} was acknowledged as {request} and is listed as {listed.get(edit_id)}")
    for edit_id in listed.keys() - acknowledged.keys():
        world.notes.wrong(f"{edit_id} is listed and was submitted by nobody")


def _versions(world: World) -> None:
    """No two versions of one run; registry and store tell of the same bits; what is live is in the active version."""
    with world.client() as client:
        versions = client.versions(limit=1000).data
        active = client.health().active
        live = {edit.id for edit in client.all_edits(status=EditStatus.LIVE)}
        members = {edit.id for edit in client.diff(active, 0).only_in[str(active)]} if active else set()
    for run, count in Counter(version.run for version in versions if version.run).items():
        if count > 1:
            world.notes.wrong(f"{run} committed {count} versions")
    if live - members:
        world.notes.wrong(f"live and not in the active version {active}: {sorted(live - members)}")
    store = VersionStore(world.settings.store_url)
    for version in versions:
        stored = {name: tensor_sha256(tensor) for name, tensor in store.load(version.version).items()}
        if stored != version.tensors:
            world.notes.wrong(f"version {version.version} is not in the store as the registry has it")


def _answers(world: World) -> None:
    """Each version still answers what it answered when it was first seen; every answer taken was judged."""
    with world.http() as http, world.client() as client:
        for number in sorted(set(served(http)) - set(world.truth.known())):
            for wrong in world.truth.record(number, client, http):
                world.notes.wrong(wrong)
        for question in world.truth.sure_questions():
            world.judge.take(ask(http, question))
    if rest := world.judge.work_off():
        world.notes.wrong(f"{len(rest)} answers are labelled with versions that nobody can ask for: {rest[:3]}")


def _engine(world: World) -> None:
    """vLLM's engine never ended by itself: a supervisor that starts another hides it, and streams have ended in it."""
    logs = list(world.settings.home.glob("logs/node.log*"))
    if not logs:
        world.notes.wrong("the node has left no log")
    for path in logs:
        if _ENGINE_FAILED in (said := path.read_text(errors="replace")):
            world.notes.wrong(f"the engine failed:\n{said[said.index(_ENGINE_FAILED) :][:5000]}")


def _doctor(world: World) -> None:
    """Once repaired, nothing fails, and registry and store agree to the letter."""
    done = world.running.errata("doctor", "--repair", "--json", timeout_s=600)
    findings = json.loads(done.stdout or "[]")
    for finding in findings:
        # Runs fail by the faults; what they leave of the edits is looked at above.
        fails = finding["level"] == "fail" and finding["part"] != "runs"
        if fails or (finding["part"] in {"versions", "edits"} and finding["level"] != "ok"):
            world.notes.wrong(f"errata doctor: {finding}")
    if "versions" not in {finding["part"] for finding in findings}:
        world.notes.wrong(f"errata doctor did not look at the versions: {done.stderr}")
