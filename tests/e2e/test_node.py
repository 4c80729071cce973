"""A real node, started as its operators start it, over a real store with whole and with broken versions."""

import contextlib
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from running_node import HOST_SLOTS, PROMPT, SLOTS, Node, distance
from safetensors import safe_open
from torch import Tensor

from service.manifest import Base, VersionInfo
from worker import checkpoint
from worker.delta import VersionStore
from worker.precision import compute_dtype

WHOLE = (0, 1, 2, 6, 7)
TRUNCATED, WRONG_SHAPE, WRONG_BASE, UNKNOWN = 3, 4, 5, 99
# Log-probabilities of one request alone and in a batch differ by the noise of bfloat16; those of two versions by much
# more (both measured, on the default model: up to 0.1 and over 1).
BATCH_NOISE = 0.3


def fill(store: VersionStore, folder: Path, model_dir: Path) -> None:
    location = checkpoint.resolve_location(model_dir, "auto")
    parameter = f"{location}.weight"
    with safe_open(model_dir / "model.safetensors", framework="pt") as weights:
        base = weights.get_tensor(parameter)
    fingerprint = checkpoint.fingerprint(model_dir)

    def write(version: int, tensor: Tensor, fingerprint: str = fingerprint) -> None:
        info = VersionInfo(
            version=version,
            parent=None,
            base=Base(name="default", fingerprint=fingerprint),
            location=location,
            run={},
            metrics={},
            created_at=1_700_000_000,
        )
        store.write(info, {parameter: tensor}, [])

    def perturbed(seed: int) -> Tensor:
        noise = torch.randn(base.shape, generator=torch.Generator().manual_seed(seed))
        return (base.float() + base.float().std() * noise).to(base.dtype)

    write(0, base)
    for version in (*WHOLE[1:], TRUNCATED):
        write(version, perturbed(version))
    delta = folder / "store" / f"{TRUNCATED:06d}" / "delta.safetensors"
    delta.write_bytes(delta.read_bytes()[:-1000])
    write(WRONG_SHAPE, torch.cat([base, base[:, :1]], dim=1))
    write(WRONG_BASE, base, fingerprint="f" * 64)


@pytest.fixture(scope="module")
def node(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    folder = tmp_path_factory.mktemp("node")
    node = Node(default_model, folder, VersionStore(str(folder / "store")))
    fill(node.store, folder, default_model)
    node.start()
    try:
        yield node
        node.signal(signal.SIGTERM)
    finally:
        node.end()


def test_version_0_answers_as_the_base_model_does(node: Node) -> None:
    # In bfloat16 to the last digit; the product that vLLM prepares in fp32 adds up in another order.
    wide = compute_dtype(torch.bfloat16, "cpu") == torch.float32
    assert node.score("errata@0") == pytest.approx(node.score("base"), rel=0, abs=1e-4 if wide else 0)
    answers = [node.ask(model, max_tokens=32).json()["choices"][0] for model in ("errata@0", "base")]
    assert answers[0]["text"] == answers[1]["text"]
    first, second = (answer["logprobs"]["token_logprobs"][1:] for answer in answers)
    assert first == pytest.approx(second, rel=0, abs=1e-4 if wide else 0)


def test_versions_answer_in_one_batch_as_they_do_alone(node: Node) -> None:
    models = ("base", "errata@1", "errata@2")
    alone = {model: node.score(model) for model in models}
    for model, other in (("base", "errata@1"), ("base", "errata@2"), ("errata@1", "errata@2")):
        assert distance(alone[model], alone[other]) > 3 * BATCH_NOISE

    asked = models * 8
    with ThreadPoolExecutor(len(asked)) as pool:
        answered = list(pool.map(node.score, asked))
    for model, score in zip(asked, answered, strict=True):
        assert distance(score, alone[model]) < BATCH_NOISE, model


@pytest.mark.parametrize(
    ("version", "code", "reason"),
    [
        (TRUNCATED, "damaged_version", "delta.safetensors has"),
        (WRONG_SHAPE, "wrong_shape", "(576, 1537)"),
        (WRONG_BASE, "wrong_base", "f" * 64),
        (UNKNOWN, "unknown_version", "version 99"),
    ],
)
def test_a_version_that_cannot_be_served_is_refused_and_the_rest_are_served(
    node: Node, version: int, code: str, reason: str
) -> None:
    before = node.score("errata@1")
    asked = node.ask(f"errata@{version}")
    prefetched = node.client.post(f"/errata/versions/{version}/prefetch")
    assert (asked.status_code, prefetched.status_code) == ((404, 404) if version == UNKNOWN else (409, 409))
    for response in (asked, prefetched):
        assert response.json()["error"]["code"] == code
        assert reason in response.json()["error"]["message"]
    assert f"version_refused version={version} " in node.log()
    assert version not in node.resident()
    assert node.score("errata@1") == before


def test_a_name_that_is_no_version_is_unknown(node: Node) -> None:
    assert node.ask("errata@1x").status_code == 404


@pytest.mark.parametrize("kind", ["image_url", "video_url", "audio_url"])
def test_nothing_is_fetched_for_a_client(node: Node, kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.settimeout(1)
        url = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/"
        content = [{"type": "text", "text": PROMPT}, {"type": kind, kind: {"url": url}}]
        body = {"model": "errata@0", "messages": [{"role": "user", "content": content}], "max_tokens": 1}
        assert node.client.post("/v1/chat/completions", json=body).status_code == 400
        with pytest.raises(TimeoutError):
            elsewhere.accept()


def stream(node: Node, at_token: int, then: Callable[[], None]) -> str:
    """Stream 120 tokens of version 1, calling `then` once in between, and return the text."""
    body = {
        "model": "errata@1",
        "prompt": PROMPT,
        "max_tokens": 120,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    chunks = 0
    with node.client.stream("POST", "/v1/completions", json=body) as response:
        lines = []
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            lines.append(httpx.Response(200, text=line.removeprefix("data: ")).json()["choices"][0]["text"])
            chunks += 1
            if chunks == at_token:
                then()
    assert chunks > at_token
    return "".join(lines)


def test_a_version_loads_while_another_streams(node: Node) -> None:
    undisturbed = stream(node, 10, lambda: None)
    for version in (6, 7):
        with contextlib.suppress(httpx.HTTPStatusError):
            node.client.delete(f"/errata/versions/{version}").raise_for_status()

    def load_until_every_slot_changed_hands() -> None:
        for version in (6, 7):
            loaded = node.client.post(f"/errata/versions/{version}/prefetch").raise_for_status().json()
            assert loaded["version"] == version
            assert loaded["load_s"] < 5

    assert stream(node, 10, load_until_every_slot_changed_hands) == undisturbed
    assert {6, 7} <= node.resident().keys()


def test_a_prefetch_is_idempotent_and_may_be_asked_many_times_at_once(node: Node) -> None:
    node.client.delete("/errata/versions/2")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: node.client.post("/errata/versions/2/prefetch"), range(8)))
    assert [answer.status_code for answer in answers] == [200] * 8
    assert node.resident()[2]["slot"] is not None


def test_more_versions_than_slots_are_served_and_read_back_as_written(node: Node) -> None:
    assert len(WHOLE) > HOST_SLOTS > SLOTS
    scores = {}
    for version in WHOLE:
        node.client.post(f"/errata/versions/{version}/prefetch").raise_for_status()
        read_back = node.client.get(f"/errata/versions/{version}/checksum").raise_for_status().json()
        assert read_back == {"version": version, "tensors": node.manifest_checksums(version)}
        scores[version] = node.score(f"errata@{version}")

    resident = node.resident(checksum=True)
    in_slots = {version: entry for version, entry in resident.items() if entry["slot"] is not None}
    assert len(resident) == HOST_SLOTS
    assert len(in_slots) == SLOTS
    for version, entry in in_slots.items():
        assert entry["sha256"] == node.manifest_checksums(version)
    for version in WHOLE:
        assert node.score(f"errata@{version}") == scores[version]


def test_an_evicted_version_is_gone_and_comes_back(node: Node) -> None:
    score = node.score("errata@1")
    assert node.client.delete("/errata/versions/1").status_code == 204
    assert 1 not in node.resident()
    for response in (node.client.delete("/errata/versions/1"), node.client.get("/errata/versions/1/checksum")):
        assert (response.status_code, response.json()["error"]["code"]) == (404, "not_resident")
    assert node.score("errata@1") == score


def test_what_an_evicted_versions_slot_computed_is_not_used_again(node: Node) -> None:
    """The slot may have been damaged; what vLLM keeps of a prompt's beginning is what the slot made of it."""

    def cached_tokens() -> int:
        body = {"model": "errata@1", "prompt": "one prompt, " * 100, "max_tokens": 1}
        usage = node.client.post("/v1/completions", json=body).raise_for_status().json()["usage"]
        return (usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0

    cached_tokens()
    assert cached_tokens() > 100
    node.client.delete("/errata/versions/1").raise_for_status()
    assert cached_tokens() == 0
    assert cached_tokens() > 100


def test_a_node_outlives_its_cache_folder(node: Node) -> None:
    scores = {version: node.score(f"errata@{version}") for version in WHOLE}
    shutil.rmtree(node.folder / "cache")
    for version in (*WHOLE, *WHOLE):
        assert node.score(f"errata@{version}") == scores[version]


def test_a_stream_outlives_the_eviction_of_its_version_and_its_folder(node: Node) -> None:
    undisturbed = stream(node, 10, lambda: None)
    with ThreadPoolExecutor(1) as pool:
        evicted = []

        def evict() -> None:
            shutil.rmtree(node.folder / "cache")
            evicted.append(pool.submit(node.client.delete, "/errata/versions/1"))

        assert stream(node, 10, evict) == undisturbed
        assert evicted[0].result().status_code == 204
    assert 1 not in node.resident()
    assert stream(node, 10, lambda: None) == undisturbed


def test_the_node_says_what_it_is(node: Node) -> None:
    answer = node.client.get("/errata/versions").json()
    assert answer["fingerprint"] == checkpoint.fingerprint(node.model_dir)
    assert answer["location"] == "model.layers.24.mlp.down_proj"
    assert answer["slots"] == SLOTS


@pytest.mark.parametrize("path", ["/health", "/metrics", "/ping", "/v1/models", "/errata/versions", "/docs"])
@pytest.mark.parametrize("authorization", ["", "Bearer wrong"])
def test_nothing_answers_without_the_token(node: Node, path: str, authorization: str) -> None:
    assert node.client.get(path, headers={"Authorization": authorization}).status_code == 401


def test_vllms_own_routes_are_closed(node: Node) -> None:
    body = {"lora_name": "errata@99", "lora_path": "/"}
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters", "/collective_rpc", "/tokenize"):
        assert node.client.post(path, json=body).status_code == 404
    for path in ("/metrics", "/v1/models", "/docs", "/version", "/load"):
        assert node.client.get(path).status_code == 404


def test_a_killed_node_heals_on_the_first_request(node: Node) -> None:
    score = node.score("errata@1")
    node.signal(signal.SIGKILL)
    node.start()
    assert node.resident() == {}
    assert node.score("errata@1") == score
    assert node.resident()[1]["slot"] is not None


def test_a_node_that_is_told_to_stop_finishes_its_answers_first(node: Node) -> None:
    """The last test here: the node is gone behind it."""
    undisturbed = stream(node, 10, lambda: None)
    assert stream(node, 10, lambda: node.process.send_signal(signal.SIGTERM)) == undisturbed
    node.process.wait(60)
