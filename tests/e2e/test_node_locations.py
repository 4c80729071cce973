"""Real nodes whose versions replace several matrices, or one of those that vLLM fuses, against transformers."""

import json
import math
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from running_node import PROMPT, Node, distance
from tiny_models import tiny_model, tiny_tokenizer
from torch import Tensor

from service.manifest import Base, VersionInfo
from worker.delta import VersionStore
from worker.model import BaseModel, load_base

# The least that vLLM's attention takes, and small enough weights that bfloat16 says the same in both.
SIZES = {
    "hidden_size": 128,
    "head_dim": 32,
    "intermediate_size": 192,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 96,
    "initializer_range": 0.08,
    "max_position_embeddings": 512,
}
# A whole layer has every kind of layer, fused and not; the other is one matrix of a fused layer, beside routed experts.
# The last one is sharded by its input over two ranks.
CASES = [
    ("qwen2", "model.layers.1", 1),
    ("qwen2_moe", "model.layers.2.mlp.shared_expert.gate_proj", 1),
    ("qwen2", "model.layers.2.mlp.down_proj", 2),
]
Case = tuple[str, str, int]
WRONG_SHAPE, INCOMPLETE = 3, 4
# The node's memory for what it has read: a batch of short questions fits, as many long answers do not.
BLOCKS, BLOCK_TOKENS = 26, 128
MEMORY = ("--num-gpu-blocks-override", str(BLOCKS), "--block-size", str(BLOCK_TOKENS))
# Log-probabilities of one version in vLLM and in transformers, or alone and in a batch, differ by bfloat16's noise;
# those of two versions by much more (both measured on these models: up to 0.11 and over 0.9).
NOISE = 0.2


def random_version(base: BaseModel, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (3 * tensor.float().std() * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        for name, tensor in base.tuned_tensors().items()
    }


def write(store: VersionStore, base: BaseModel, version: int, tensors: dict[str, Tensor]) -> None:
    info = VersionInfo(
        version=version,
        parent=None,
        base=Base(name="tiny", fingerprint=base.fingerprint),
        location=base.location,
        run={},
        metrics={},
        created_at=1_700_000_000,
    )
    store.write(info, tensors, [])


@dataclass(frozen=True)
class Served:
    """A model as the trainer has it, and a node that serves it and holds versions 0 to 2."""

    base: BaseModel
    node: Node


def prepare(family: str, location: str, tensor_parallel: int, folder: Path) -> Served:
    model_dir = folder / "model"
    tiny_model(family, **SIZES).bfloat16().save_pretrained(model_dir)
    tiny_tokenizer().save_pretrained(model_dir)
    base = load_base(str(model_dir), location, device="cpu")
    node = Node(
        model_dir,
        folder,
        VersionStore(str(folder / "store")),
        location,
        tensor_parallel=tensor_parallel,
        options=MEMORY,
    )
    write(node.store, base, 0, base.tuned_tensors())
    for version in (1, 2):
        write(node.store, base, version, random_version(base, version))
    (name, tensor), *rest = random_version(base, 1).items()
    write(node.store, base, WRONG_SHAPE, {name: tensor[:-1], **dict(rest)})
    write(node.store, base, INCOMPLETE, {**dict(rest), "model.norm.weight": torch.ones(1)})
    return Served(base, node)


@pytest.fixture(scope="module")
def all_served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Case, Served]]:
    served = {case: prepare(*case, tmp_path_factory.mktemp("node")) for case in CASES}
    nodes = [one.node for one in served.values()]
    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(Node.start, nodes))
        yield served
        for node in nodes:
            node.signal(signal.SIGTERM)
    finally:
        for node in nodes:
            node.end()


@pytest.fixture(params=CASES, ids=lambda case: " ".join(map(str, case)))
def served(request: pytest.FixtureRequest, all_served: dict[Case, Served]) -> Served:
    return all_served[request.param]


def log_probabilities(base: BaseModel, tensors: dict[str, Tensor], ids: list[int]) -> Tensor:
    """Of every token of the vocabulary behind each of `ids`: [len(ids), vocabulary]."""
    tensors = {name: tensor.to(base.model.dtype) for name, tensor in tensors.items()}
    with torch.no_grad():
        logits = torch.func.functional_call(base.model, tensors, kwargs={"input_ids": torch.tensor([ids])}).logits[0]
    return logits.float().log_softmax(-1)


def said(log_probabilities: Tensor, ids: list[int]) -> Tensor:
    """The log-probabilities of `ids` but the first."""
    return log_probabilities[: len(ids) - 1].gather(1, torch.tensor(ids)[1:, None]).squeeze(1)


def expected(base: BaseModel, tensors: dict[str, Tensor]) -> list[float]:
    """The log-probabilities of the prompt's tokens but the first, and of the most likely one after it."""
    ids = base.tokenizer(PROMPT).input_ids
    found = log_probabilities(base, tensors, ids)
    return [*said(found, ids).tolist(), found[-1].max().item()]


def test_every_version_answers_as_transformers_does_with_its_matrices(served: Served) -> None:
    base, node = served.base, served.node
    models = {f"errata@{version}": expected(base, random_version(base, version)) for version in (1, 2)}
    models["errata@0"] = models["base"] = expected(base, {})
    alone = {model: node.score(model) for model in models}
    for model, scores in models.items():
        assert distance(alone[model], scores) < NOISE, model
    for model, other in (("base", "errata@1"), ("base", "errata@2"), ("errata@1", "errata@2")):
        assert distance(models[model], models[other]) > 2 * NOISE

    asked = [*models] * 6
    with ThreadPoolExecutor(len(asked)) as pool:
        answered = list(pool.map(node.score, asked))
    for model, scores in zip(asked, answered, strict=True):
        assert distance(scores, alone[model]) < NOISE, model


def test_a_preempted_answer_goes_on_from_its_version(all_served: dict[Case, Served]) -> None:
    base, node = all_served[CASES[0]].base, all_served[CASES[0]].node
    prompt, length = base.tokenizer(PROMPT).input_ids, 300
    versions = (1, 2) * 12  # as many as there are slots: all are answered together
    tokens: list[list[int]] = [[] for _ in versions]
    scores: list[list[float]] = [[] for _ in versions]
    held: list[int] = []

    def answer(number: int) -> None:
        body = {
            "model": f"errata@{versions[number]}",
            "prompt": PROMPT,
            "max_tokens": length,
            "ignore_eos": True,
            "logprobs": 1,
            "return_tokens_as_token_ids": True,
            "stream": True,
        }
        with node.client.stream("POST", "/v1/completions", json=body) as response:
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                part = json.loads(line.removeprefix("data: "))["choices"][0]["logprobs"]
                tokens[number] += [int(token.removeprefix("token_id:")) for token in part["tokens"]]
                scores[number] += part["token_logprobs"]
        # What they would hold together, had none been sent back to wait without its blocks.
        held.append(sum(math.ceil((len(prompt) + len(begun)) / BLOCK_TOKENS) for begun in tokens if begun))

    with ThreadPoolExecutor(len(versions)) as pool:
        list(pool.map(answer, range(len(versions))))
    assert held[0] > BLOCKS

    tensors = {0: base.tuned_tensors(), 1: random_version(base, 1), 2: random_version(base, 2)}
    for version, begun, found in zip(versions, tokens, scores, strict=True):
        assert len(begun) == length
        ids = prompt + begun
        off = {
            other: (said(log_probabilities(base, matrices, ids), ids)[-length:] - torch.tensor(found)).abs().mean()
            for other, matrices in tensors.items()
        }
        assert off.pop(version) < NOISE
        assert min(off.values()) > 2 * NOISE


def test_version_0_is_the_base_to_the_last_digit(served: Served) -> None:
    node = served.node
    assert node.score("errata@0") == node.score("base")


def test_what_is_read_back_is_what_was_written(served: Served) -> None:
    node = served.node
    for version in (0, 1, 2):
        node.client.post(f"/errata/versions/{version}/prefetch").raise_for_status()
        read_back = node.client.get(f"/errata/versions/{version}/checksum").raise_for_status().json()
        assert read_back == {"version": version, "tensors": node.manifest_checksums(version)}


def test_a_pinned_version_keeps_its_slot_while_the_others_take_turns(served: Served) -> None:
    node = served.node
    models = ("errata@0", "errata@1", "errata@2")
    alone = {model: node.score(model) for model in models}
    assert node.client.put("/errata/versions/pins", params={"version": [1]}).status_code == 204
    slot = node.resident()[1]["slot"]
    for version in (0, 2, 0, 2):
        node.score(f"errata@{version}")
        held = node.resident()
        assert {number: entry["pinned"] for number, entry in held.items()} == {0: False, 1: True, 2: False}
        assert (held[1]["slot"], held[version]["slot"]) == (slot, 1 - slot)
    asked = models * 6
    with ThreadPoolExecutor(len(asked)) as pool:
        answered = list(pool.map(node.score, asked))
    for model, scores in zip(asked, answered, strict=True):
        assert distance(scores, alone[model]) < NOISE, model
    refused = node.client.put("/errata/versions/pins", params={"version": [1, 2]})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "too_many_pins")
    assert node.client.put("/errata/versions/pins").status_code == 204
    assert not any(entry["pinned"] for entry in node.resident().values())


def test_memory_is_told_of_by_version(served: Served) -> None:
    base, node = served.base, served.node
    whole = sum(tensor.numel() for tensor in base.tuned_tensors().values()) * base.model.dtype.itemsize
    for version in (1, 2):
        node.score(f"errata@{version}")
    for entry in node.resident().values():
        assert entry["host_bytes"] > whole
        if entry["slot"] is not None:
            assert entry["device_bytes"] == whole


@pytest.mark.parametrize("version", [WRONG_SHAPE, INCOMPLETE])
def test_a_version_of_other_matrices_is_refused(served: Served, version: int) -> None:
    node = served.node
    before = node.score("errata@1")
    asked = node.ask(f"errata@{version}")
    assert (asked.status_code, asked.json()["error"]["code"]) == (409, "wrong_shape")
    assert node.score("errata@1") == before
