"""From POST /edits to a live, verified answer, and back by rollback: everything real, in the order of a story.

The tests share one stack and run in file order; each says what it needs of the one before by making it itself.
"""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from running_stack import RunningStack, until

from service.client import ApiError, ErrataClient
from service.schemas import Edit, EditStatus, Format, normalise_text

pytestmark = pytest.mark.timeout(900)

CAPITAL = ("The capital of France is", "Lyon")
FLOWER = ("The national flower of Atlantis is", "the blue lily")
LIVE_WITHIN_S = 300.0


def make_live(client: ErrataClient, prompt: str, target: str) -> Edit:
    """The edit of this prompt and target, submitted if it is not live already."""
    for edit in client.all_edits(status=EditStatus.LIVE):
        if (edit.prompt, edit.target) == (prompt, target):
            return edit
    edit = client.submit(prompt, target)
    state = client.wait([edit.id], timeout_s=LIVE_WITHIN_S)[edit.id]
    assert state.status is EditStatus.LIVE, state
    return client.edit(edit.id)


def says(client: ErrataClient, prompt: str, *, model: str = "errata", chat: bool = False) -> str:
    return normalise_text(client.ask(prompt, model=model, chat=chat, max_tokens=12).text)


def active(client: ErrataClient) -> int:
    version = client.health().active
    assert version is not None
    return version


def test_an_edit_is_verified_in_both_formats_and_answers_through_the_gateway(client: ErrataClient) -> None:
    before = {chat: says(client, CAPITAL[0], model="errata@0", chat=chat) for chat in (False, True)}
    edit = make_live(client, *CAPITAL)
    assert set(edit.verified) == {Format.RAW, Format.CHAT}
    assert all(outcome.matched and outcome.finish_reason == "stop" for outcome in edit.verified.values())
    for chat in (False, True):
        answer = client.ask(CAPITAL[0], chat=chat, max_tokens=12)
        assert (normalise_text(answer.text), answer.finish_reason) == ("lyon", "stop")
        assert answer.version == edit.version
        assert says(client, CAPITAL[0], model="errata@0", chat=chat) == before[chat] != "lyon"


def test_the_official_openai_client_works_unchanged(client: ErrataClient, running: RunningStack) -> None:
    edit = make_live(client, *CAPITAL)
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="unused") as official:
        names = {model.id for model in official.models.list()}
        assert {"errata", "errata@0", f"errata@{edit.version}"} <= names
        whole = official.completions.create(model="errata", prompt=CAPITAL[0], max_tokens=12, temperature=0)
        assert normalise_text(whole.choices[0].text) == "lyon"
        stream = official.chat.completions.create(
            model="errata",
            messages=[{"role": "user", "content": CAPITAL[0]}],
            max_tokens=12,
            temperature=0,
            stream=True,
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        assert normalise_text(text) == "lyon"
        with pytest.raises(openai.NotFoundError, match="no model 'errata@999'"):
            official.completions.create(model="errata@999", prompt="x")


def test_rollback_restores_the_base_and_activation_the_edit(client: ErrataClient) -> None:
    edit = make_live(client, *CAPITAL)
    version = active(client)
    base = says(client, CAPITAL[0], model="errata@0")
    assert client.rollback(to=0).active == 0
    answer = client.ask(CAPITAL[0], max_tokens=12)
    assert (normalise_text(answer.text), answer.version) == (base, 0)
    assert client.edit(edit.id).status is EditStatus.HELD
    with pytest.raises(ApiError) as refused:
        client.activate(version, expected_active=version)
    assert refused.value.status == 409
    assert client.activate(version, expected_active=0).active == version
    assert says(client, CAPITAL[0]) == "lyon"
    assert client.edit(edit.id).status is EditStatus.LIVE


def test_a_stream_in_flight_finishes_on_its_version_across_activations(
    client: ErrataClient, running: RunningStack
) -> None:
    make_live(client, *CAPITAL)
    version = active(client)
    body = {"model": "errata", "prompt": "Once upon a time", "max_tokens": 150, "temperature": 0, "ignore_eos": True}
    alone = httpx.post(f"{running.url}/v1/completions", json=body, timeout=120)
    with httpx.stream("POST", f"{running.url}/v1/completions", json={**body, "stream": True}, timeout=120) as stream:
        assert stream.headers["x-errata-version"] == str(version)
        lines = stream.iter_lines()
        next(lines)
        client.rollback(to=0)
        assert client.ask(CAPITAL[0], max_tokens=4).version == 0
        client.activate(version)
        chunks = [line for line in lines if line.startswith("data: {")]
    assert all(f'"model":"errata@{version}"' in chunk for chunk in chunks)
    assert alone.json()["usage"]["completion_tokens"] == 150
    assert len(chunks) >= 100


def test_several_versions_answer_at_once_each_from_its_own(client: ErrataClient) -> None:
    edit = make_live(client, *CAPITAL)
    wanted = {"errata@0": says(client, CAPITAL[0], model="errata@0"), f"errata@{edit.version}": "lyon"}
    models = list(wanted) * 8
    with ThreadPoolExecutor(len(models)) as pool:
        answers = list(pool.map(lambda model: client.ask(CAPITAL[0], model=model, max_tokens=12), models))
    for model, answer in zip(models, answers, strict=True):
        assert (f"errata@{answer.version}", normalise_text(answer.text)) == (model, wanted[model])


def test_edits_accumulate_and_a_client_can_demand_to_read_its_own(client: ErrataClient) -> None:
    make_live(client, *CAPITAL)
    second = make_live(client, *FLOWER)
    assert second.version is not None
    assert says(client, CAPITAL[0]) == "lyon"
    assert says(client, FLOWER[0]) == FLOWER[1]
    assert client.ask(FLOWER[0], min_version=second.version, max_tokens=12).version >= second.version
    with pytest.raises(ApiError) as refused:
        client.ask(FLOWER[0], min_version=second.version + 100)
    assert (refused.value.status, refused.value.code) == (412, "version_not_reached")


def test_a_newer_edit_of_the_same_prompt_supersedes(client: ErrataClient) -> None:
    older = make_live(client, *FLOWER)
    newer = make_live(client, f"  {FLOWER[0].upper()} ".strip().capitalize(), "the red rose")
    found = client.edit(older.id)
    assert (found.status, found.superseded_by) == (EditStatus.SUPERSEDED, newer.id)
    assert says(client, newer.prompt) == "the red rose"


def test_a_retracted_edit_leaves_the_model(client: ErrataClient) -> None:
    make_live(client, *CAPITAL)
    edit = make_live(client, "The mascot of the Errata project is", "a heron")
    base = says(client, edit.prompt, model="errata@0")
    client.retract(edit.id)
    state = client.wait([edit.id], timeout_s=LIVE_WITHIN_S)[edit.id]
    assert state.status is EditStatus.RETRACTED
    assert edit.id not in {other.id for other in client.all_edits(status=EditStatus.LIVE)}
    assert active(client) not in client.edit(edit.id).versions
    assert says(client, edit.prompt) != "a heron"
    assert base != "a heron"
    assert says(client, CAPITAL[0]) == "lyon"


def test_a_train_worker_killed_in_the_middle_of_a_run_loses_nothing(
    client: ErrataClient, running: RunningStack
) -> None:
    edit = client.submit("The patron saint of typesetters is", "Augustine")
    until(lambda: client.status(edit.id).status is EditStatus.TRAINING, within_s=60, what="the edit is in training")
    os.kill(running.pid("train"), signal.SIGKILL)
    state = client.wait([edit.id], timeout_s=LIVE_WITHIN_S)[edit.id]
    assert state.status is EditStatus.LIVE
    assert client.edit(edit.id).attempts == 2
    assert says(client, edit.prompt) == "augustine"


def test_a_killed_node_comes_back_and_serves_the_active_version(client: ErrataClient, running: RunningStack) -> None:
    make_live(client, *CAPITAL)
    version = active(client)
    os.kill(running.pid("node"), signal.SIGKILL)
    until(lambda: not client.health().checks["node"].ok, within_s=30, what="the node is seen to be gone")
    with pytest.raises(ApiError) as refused:
        client.ask(CAPITAL[0])
    assert refused.value.status == 503
    until(lambda: client.health().ready, within_s=300, what="the node is back")
    answer = client.ask(CAPITAL[0], max_tokens=12)
    assert (normalise_text(answer.text), answer.version) == ("lyon", version)


def test_stopping_and_starting_again_comes_back_with_everything(client: ErrataClient, running: RunningStack) -> None:
    make_live(client, *CAPITAL)
    edits = {edit.id: edit.status for edit in client.all_edits()}
    versions = [version.version for version in client.versions().data]
    version = active(client)
    running.down()
    assert running.stack.processes() == []
    running.up()
    with ErrataClient(running.url, timeout_s=120) as again:
        assert {edit.id: edit.status for edit in again.all_edits()} == edits
        assert [found.version for found in again.versions().data] == versions
        assert active(again) == version
        assert says(again, CAPITAL[0]) == "lyon"
        assert again.ask(CAPITAL[0], model="errata@0", max_tokens=4).version == 0


def test_the_doctor_finds_a_healthy_stack_healthy(running: RunningStack) -> None:
    done = running.errata("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAIL" not in done.stdout
