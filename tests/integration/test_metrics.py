"""GET /metrics over the real application: what it says after a life of edits, and what it says when parts are away."""

import json
import os
import re
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis
from redis_server import RedisServer
from scripted_node import ScriptedNode
from scripted_worker import ScriptedWorker, fact
from service_process import serving

from service.metrics.catalogue import CATALOGUE, EDIT_TO_LIVE
from service.metrics.kept import OVERFLOW, bounds
from service.nodes import NodeClient
from service.ports import free_port
from service.queue import TaskQueue
from service.reconcile import Reconciler
from service.schemas import EditStatus, EpochLoss, RunStatus, VersionState
from service.settings import Settings
from service.stores import Stores

pytestmark = pytest.mark.timeout(60)

Samples = Mapping[str, float]
# Redis' answers and connections: a number that does not depend on how many edits there are.
MOST_COMMANDS = 45


@pytest.fixture
def node(shared_node: tuple[ScriptedNode, str]) -> ScriptedNode:
    return shared_node[0]


@pytest.fixture(scope="module")
def base_url(redis_server: RedisServer, tokenizer_folder: Path, shared_node: tuple[ScriptedNode, str]) -> Iterator[str]:
    settings = Settings(redis_url=redis_server.url, model=str(tokenizer_folder), nodes=(shared_node[1],))
    with serving(settings) as url:
        yield url


@pytest.fixture
def control(
    stores: Stores, queue: TaskQueue, settings: Settings, shared_node: tuple[ScriptedNode, str]
) -> Iterator[Reconciler]:
    """The reconciler of a control worker that has the same node as the service."""
    node = NodeClient(shared_node[1], token="node-token", timeout_s=5)
    yield Reconciler(stores, [node], queue, settings)
    node._http.close()


def scraped(api: httpx.Client) -> Samples:
    """Every sample as ``name{label="value",…}``; each metric is of the catalogue, with its kind and labels."""
    response = api.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    samples = {}
    for found in text_string_to_metric_families(response.text):
        metric = CATALOGUE[found.name + "_total" * (found.type == "counter")]
        assert (found.type, found.documentation) == (metric.kind, metric.meaning)
        for sample in found.samples:
            assert set(sample.labels) - {"le"} == set(metric.labels), sample
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            samples[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return samples


def names(samples: Samples) -> set[str]:
    found = {name.partition("{")[0] for name in samples}
    return {name if name in CATALOGUE else name.rpartition("_")[0] for name in found}


def test_every_metric_is_there_after_a_life_of_edits(
    api: httpx.Client,
    stores: Stores,
    worker: ScriptedWorker,
    node: ScriptedNode,
    control: Reconciler,
    shared_node: tuple[ScriptedNode, str],
) -> None:
    worker.nodes = [node]
    stores.runs.beat("worker-1")
    edits = stores.edits.submit([fact("a", "1"), fact("b", "2")])
    stores.redis.hincrby(f"errata:edit:{edits[0].id}", "accepted_at", -40)
    run, _ = worker.train()
    control.publish(run.id)
    control.tick()
    # A second run, up to its training.
    stores.edits.submit([fact("c", "3")])
    run, _ = worker.begin()
    stores.runs.add_epoch(run, EpochLoss(epoch=1, loss=0.25, steps=3, seconds=2), eta_s=4)
    stores.runs.add_timing(run, "train", 7.0)
    stores.edits.submit([fact("d", "4")])
    assert api.post("/versions/0/activate").status_code == 202
    assert api.post("/v1/completions", json={"model": "errata@1", "prompt": "a"}).status_code == 200

    samples = scraped(api)
    of_a_canary = {"errata_canary_version", "errata_canary_requests"}  # test_canary.py has one
    assert names(samples) == set(CATALOGUE) - of_a_canary
    where = shared_node[1].removeprefix("http://")
    assert (
        samples.items()
        >= {
            "errata_redis_up": 1,
            'errata_edits{status="held"}': 2,
            'errata_edits{status="training"}': 1,
            'errata_edits{status="queued"}': 1,
            "errata_edits_accepted_total": 4,
            'errata_edit_oldest_age_seconds{status="trained"}': 0,
            'errata_edit_to_live_seconds_bucket{le="30.0"}': 1,
            'errata_edit_to_live_seconds_bucket{le="60.0"}': 2,
            "errata_edit_to_live_seconds_count": 2,
            'errata_runs{status="queued"}': 0,
            'errata_runs{status="training"}': 1,
            'errata_runs{status="verifying"}': 0,
            'errata_runs_ended_total{status="succeeded"}': 1,
            'errata_runs_ended_total{status="failed"}': 0,
            'errata_run_phase_seconds_bucket{le="5.0",phase="train"}': 0,
            'errata_run_phase_seconds_bucket{le="10.0",phase="train"}': 1,
            'errata_run_phase_seconds_sum{phase="train"}': 7,
            'errata_run_phase_seconds_count{phase="load"}': 1,
            'errata_run_phase_seconds_count{phase="verify"}': 1,
            'errata_run_phase{phase="claim"}': 1,
            "errata_run_epoch": 1,
            "errata_run_loss": 0.25,
            "errata_run_eta_seconds": 4,
            "errata_train_workers": 1,
            "errata_versions": 2,
            'errata_versions_judged_total{outcome="verified"}': 1,
            'errata_versions_judged_total{outcome="rejected"}': 0,
            "errata_active_version": 0,
            "errata_activations_total": 3,
            "errata_activation_seconds_count": 1,
            "errata_version_load_seconds_count": 2,
            "errata_checksum_mismatches_total": 0,
            "errata_nodes_ready": 1,
            f'errata_node_ready{{node="{where}"}}': 1,
            f'errata_node_resident_versions{{node="{where}"}}': 2,
            f'errata_node_holds_active_version{{node="{where}"}}': 1,
            f'errata_version_bytes{{memory="device",node="{where}",version="1"}}': 10,
            f'errata_version_bytes{{memory="host",node="{where}",version="0"}}': 30,
            'errata_http_requests_total{method="POST",route="/versions/{number}/activate",status="202"}': 1,
            'errata_gateway_requests_total{outcome="ok",version="1"}': 1,
            "errata_gateway_overhead_seconds_count": 1,
            'errata_gateway_first_byte_seconds_count{streamed="false"}': 1,
            "errata_gateway_requests_in_flight": 0,
            "errata_http_requests_in_flight": 1,
        }.items()
    )
    assert 39 < samples["errata_edit_to_live_seconds_sum"] < 60
    assert samples["errata_redis_memory_bytes"] > 100_000
    assert abs(time.time() - samples["errata_control_last_tick_timestamp_seconds"]) < 30
    assert 0 <= samples['errata_edit_oldest_age_seconds{status="queued"}'] < 30
    assert (
        samples["errata_gateway_overhead_seconds_sum"]
        < samples['errata_gateway_first_byte_seconds_sum{streamed="false"}']
    )


def test_what_an_alert_compares_is_there_from_the_start(api: httpx.Client) -> None:
    groups = yaml.safe_load((Path(__file__).parents[2] / "docker/prometheus/rules.yml").read_text())["groups"]
    compared = {name for group in groups for rule in group["rules"] for name in re.findall(r"errata_\w+", rule["expr"])}
    series = {sample.partition("{")[0] for sample in scraped(api)}
    # Of requests that were made, and of nodes that the control worker has seen.
    later = {"errata_gateway_requests_total", "errata_http_requests_total", "errata_node_holds_active_version"}
    assert later <= compared
    assert compared - series <= later
    assert scraped(api)["errata_control_last_tick_timestamp_seconds"] == 0, "it has been silent ever since"


def test_the_scripts_name_a_bucket_as_python_does(stores: Stores) -> None:
    # As prelude.lua reads its bounds and writes one.
    script = "return tostring(cjson.decode(ARGV[1]))"
    in_lua = [stores.redis.eval(script, 0, json.dumps(bound)) for bound in EDIT_TO_LIVE.buckets]
    assert [*in_lua, OVERFLOW] == bounds(EDIT_TO_LIVE)


def test_failures_are_counted_in_a_row_until_a_run_succeeds(
    api: httpx.Client, stores: Stores, worker: ScriptedWorker, node: ScriptedNode, control: Reconciler
) -> None:
    worker.nodes = [node]
    for _ in range(2):
        stores.edits.submit([fact("a", "1")])
        worker.mistakes = {"a": "wrong"}
        run, version = worker.train()
        control.publish(run.id)
        assert stores.registry.get(version).state is VersionState.REJECTED
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node, "tensors", {})
        run, _ = worker.train()
        control.publish(run.id)
    samples = scraped(api)
    assert samples["errata_runs_failed_in_a_row"] == 3
    assert samples['errata_runs_ended_total{status="failed"}'] == 3
    assert samples['errata_versions_judged_total{outcome="rejected"}'] == 3
    assert samples["errata_checksum_mismatches_total"] == 1
    stores.runs.finish(worker.begin()[0].id, RunStatus.CANCELLED)
    assert scraped(api)["errata_runs_failed_in_a_row"] == 3
    stores.runs.finish(worker.begin()[0].id, RunStatus.SUCCEEDED)
    assert scraped(api)["errata_runs_failed_in_a_row"] == 0


def test_only_the_way_to_live_is_measured_and_a_release_begins_it_anew(
    api: httpx.Client, stores: Stores, worker: ScriptedWorker, node: ScriptedNode, control: Reconciler
) -> None:
    worker.nodes = [node]
    [edit] = stores.edits.submit([fact("a", "1")])
    run, version = worker.train()
    control.publish(run.id)
    for number in (0, version):
        control.activate(number)
    assert stores.edits.get(edit.id).status is EditStatus.LIVE
    assert scraped(api)["errata_edit_to_live_seconds_count"] == 1
    control.activate(0)
    stores.redis.hset(f"errata:edit:{edit.id}", "accepted_at", 1)
    stores.edits.release(edit.id)
    assert scraped(api)['errata_edit_oldest_age_seconds{status="queued"}'] < 30


def test_an_edit_without_an_acceptance_is_shown_and_not_measured(
    api: httpx.Client, stores: Stores, worker: ScriptedWorker, node: ScriptedNode, control: Reconciler
) -> None:
    worker.nodes = [node]
    [edit] = stores.edits.submit([fact("a", "1")])
    stores.redis.hdel(f"errata:edit:{edit.id}", "accepted_at")
    assert scraped(api)['errata_edit_oldest_age_seconds{status="queued"}'] < 30
    run, _ = worker.train()
    control.publish(run.id)
    assert stores.edits.get(edit.id).status is EditStatus.LIVE
    assert scraped(api)["errata_edit_to_live_seconds_count"] == 0


def test_a_scrape_costs_the_same_however_many_edits_there_are(
    api: httpx.Client, stores: Stores, worker: ScriptedWorker
) -> None:
    def cost() -> int:
        def commands() -> int:
            return cast(int, stores.redis.info("stats")["total_commands_processed"])

        idle = -commands() + commands()
        before = commands()
        scraped(api)
        return commands() - before - idle

    stores.edits.submit([fact("first", "x")])
    worker.begin()
    stores.edits.submit([fact("second", "x")])
    scraped(api)
    # The gateway looks at Redis once a second, which may fall into one.
    few = min(cost() for _ in range(5))
    stores.edits.submit([fact(f"prompt {number}", "x") for number in range(400)])
    assert min(cost() for _ in range(5)) == few < MOST_COMMANDS


def test_labels_are_bounded(api: httpx.Client, worker: ScriptedWorker) -> None:
    for number, method in enumerate(("PROPFIND", "MKCOL", "LOCK")):
        api.get(f"/no/such/path/{number}")
        api.request(method, "/edits")
        api.get(f"/edits/edit_{number}")
    routes = {name for name in scraped(api) if name.startswith("errata_http_requests_total")}
    assert {name for name in routes if "such" in name or "MKCOL" in name or "edit_0" in name} == set()
    assert 'errata_http_requests_total{method="GET",route="none",status="404"}' in routes
    assert 'errata_http_requests_total{method="other",route="/edits",status="405"}' in routes
    assert 'errata_http_requests_total{method="GET",route="/edits/{edit_id}",status="404"}' in routes


def test_metrics_say_that_redis_and_nodes_are_away(tmp_path: Path, tokenizer_folder: Path) -> None:
    redis = RedisServer(tmp_path)
    redis.start()
    away = f"http://127.0.0.1:{free_port()}"
    settings = Settings(redis_url=redis.url, model=str(tokenizer_folder), nodes=(away,))
    with serving(settings) as url, httpx.Client(base_url=url, timeout=10) as api:
        assert scraped(api)["errata_redis_up"] == 1
        redis.kill()
        began = time.monotonic()
        samples = scraped(api)
        assert time.monotonic() - began < 5
        assert samples["errata_redis_up"] == 0
        assert samples["errata_nodes_ready"] == 0
        assert samples[f'errata_node_ready{{node="{away.removeprefix("http://")}"}}'] == 0
        assert samples['errata_http_requests_total{method="GET",route="/metrics",status="200"}'] == 1
        assert not [name for name in samples if name.startswith(("errata_edits", "errata_runs", "errata_versions"))]
        redis.start()
        assert scraped(api)["errata_redis_up"] == 1
        with Redis(port=redis.port) as connection:
            process = connection.info("server")["process_id"]
        os.kill(process, signal.SIGSTOP)
        try:
            assert scraped(api)["errata_redis_up"] == 0, "a Redis that hangs is away too"
        finally:
            os.kill(process, signal.SIGCONT)
        redis.kill()
        redis.start()
        assert scraped(api)["errata_redis_up"] == 1, "a connection that a restart closed is no Redis that is away"
    redis.stop()
