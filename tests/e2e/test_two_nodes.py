"""Two real nodes behind one gateway, the second of them tensor-parallel: a version is active when both hold it, and one
of them may die.

The tests share the nodes and run in file order.
"""

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from running_node import TOKEN, Node
from running_stack import RunningStack, until

from service.client import ErrataClient
from service.nodes import NodeClient
from service.schemas import EditStatus, Format, RunStatus, VersionState, normalise_text
from worker.delta import VersionStore
from worker.precision import compute_dtype

pytestmark = pytest.mark.timeout(900)

PROMPT, TARGET = "The capital of France is", "Lyon"
LIVE_WITHIN_S = 300.0
HEADS = 3  # for keys and values; vLLM deals them out evenly


@dataclass(frozen=True)
class Two:
    """Two nodes and the stack in front of them."""

    nodes: list[Node]
    stack: RunningStack
    client: ErrataClient

    def holders(self, version: int) -> set[str]:
        return set(self.client.version(version).resident)

    def addresses(self) -> set[str]:
        return {node.address for node in self.nodes}


@pytest.fixture(scope="module")
def two(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    store = tmp_path_factory.mktemp("shared")
    nodes = []
    for core, ranks in enumerate((1, HEADS)):
        folder = tmp_path_factory.mktemp("node")
        (folder / "store").symlink_to(store)
        versions = VersionStore(str(store))
        nodes.append(Node(default_model, folder, versions, slots=4, host_slots=8, core=core, tensor_parallel=ranks))
    stack = None
    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(Node.start, nodes))
        settings = {
            "ERRATA_NODES": ",".join(node.address for node in nodes),
            "ERRATA_NODE_TOKEN": TOKEN,
            "ERRATA_STORE": str(store),
            "ERRATA_ANSWER_CHECK_S": "1",
            "ERRATA_MAX_MODEL_LEN": "512",
            "ERRATA_EDIT_MAX_TOKENS": "256",
        }
        stack = RunningStack(tmp_path_factory.mktemp("errata"), settings)
        stack.up()
        with ErrataClient(stack.url, timeout_s=120) as client:
            yield Two(nodes, stack, client)
    finally:
        if stack:
            stack.down()
        for node in nodes:
            node.end()


def verified(two: Two) -> int:
    """The version that has the edit."""
    return next(found.version for found in two.client.versions().data if found.state is VersionState.VERIFIED)


def test_a_version_is_active_only_when_both_nodes_hold_it(two: Two) -> None:
    until(lambda: two.holders(0) == two.addresses(), within_s=60, what="both hold version 0")
    # The second cannot keep a local copy of what it would load: for the moment, so it is waited for.
    cache = two.nodes[1].folder / "cache"
    cache.rename(cache.with_name("away"))
    cache.touch()
    edit = two.client.submit(PROMPT, TARGET)
    until(
        lambda: any(run.status is RunStatus.VERIFYING for run in two.client.runs().data),
        within_s=LIVE_WITHIN_S,
        what="the version is committed",
    )
    candidate = two.client.versions().data[0].version
    until(lambda: two.holders(candidate) == {two.nodes[0].address}, within_s=60, what="the first holds it")
    for _ in range(4):
        time.sleep(1)
        assert two.client.health().active == 0
        assert two.client.status(edit.id).status is EditStatus.TRAINED
    cache.unlink()
    cache.with_name("away").rename(cache)
    assert two.client.wait([edit.id], timeout_s=LIVE_WITHIN_S)[edit.id].status is EditStatus.LIVE
    assert two.client.health().active == candidate == verified(two)
    assert two.holders(candidate) == two.addresses()


def test_both_nodes_answer_right_and_keep_the_slots_of_what_users_may_get(two: Two) -> None:
    version = verified(two)
    bases = set()
    matrix = compute_dtype(torch.bfloat16, "cpu").itemsize * 576 * 1536
    for node in two.nodes:
        direct = NodeClient(node.address, token=TOKEN, timeout_s=120)
        for form in Format:
            answer = direct.ask(version, PROMPT, form, max_tokens=12)
            assert (normalise_text(answer.text), answer.finish_reason) == ("lyon", "stop")
            assert answer.margin > 1
        bases.add(direct.ask(0, PROMPT, Format.RAW, max_tokens=12).text)
        until(lambda node=direct: pinned(node) == {0, version}, within_s=60, what="both versions are pinned")
        for held in direct.held():
            # The ranks share out the matrix; on the host each has the whole, and of the adapter's B a column.
            assert held.device_bytes == matrix
            assert held.host_bytes == node.tensor_parallel * (matrix + matrix // 1536)
        direct._http.close()
    [base] = bases
    wanted = {"errata": "lyon", f"errata@{version}": "lyon", "errata@0": normalise_text(base)}
    models = list(wanted) * 4
    with ThreadPoolExecutor(len(models)) as pool:
        answers = list(pool.map(lambda model: two.client.ask(PROMPT, model=model, max_tokens=12), models))
    for model, answer in zip(models, answers, strict=True):
        assert normalise_text(answer.text) == wanted[model]
        assert answer.version == (0 if model == "errata@0" else version)


def pinned(node: NodeClient) -> set[int]:
    return {held.version for held in node.held() if held.pinned}


def test_both_nodes_are_asked_again_and_found_right(two: Two) -> None:
    def checked(outcome: str) -> float:
        lines = httpx.get(f"{two.stack.url}/metrics", timeout=30).text.splitlines()
        name = f'errata_answers_checked_total{{outcome="{outcome}"}}'
        return next(float(line.split()[-1]) for line in lines if line.startswith(name))

    until(lambda: checked("right") >= 4, within_s=60, what="four answers were checked")
    assert checked("wrong") == 0


def test_a_node_killed_under_traffic_costs_no_request(two: Two) -> None:
    version = verified(two)
    ended, answers = threading.Event(), []

    def ask() -> None:
        with ErrataClient(two.stack.url, timeout_s=120) as client:
            while not ended.is_set():
                answers.append(client.ask(PROMPT, max_tokens=12))

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        try:
            until(lambda: len(answers) >= 12, within_s=60, what="the traffic flows")
            two.nodes[1].signal(signal.SIGKILL)
            killed_at = len(answers)
            until(lambda: len(answers) >= killed_at + 20, within_s=120, what="the traffic flows on")
        finally:
            ended.set()
    for asked in asking:
        asked.result()
    assert {(normalise_text(answer.text), answer.version) for answer in answers} == {("lyon", version)}


def test_a_restarted_node_is_healed_and_serves(two: Two) -> None:
    version = verified(two)
    two.nodes[1].start()
    until(lambda: two.holders(version) == two.addresses(), within_s=60, what="it holds the active version again")
    two.nodes[0].signal(signal.SIGKILL)
    until(lambda: two.holders(version) == {two.nodes[1].address}, within_s=60, what="the first is seen to be gone")
    answer = two.client.ask(PROMPT, max_tokens=12)
    assert (normalise_text(answer.text), answer.version) == ("lyon", version)
