"""What happens in vLLM's processes before a model is loaded: checks, registration, refusal."""

import json
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import zmq
from safetensors.torch import save_file
from vllm.distributed.device_communicators import shm_broadcast
from vllm.lora import utils
from vllm.lora.layers import RowParallelLinearWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.resolver import LoRAResolverRegistry
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)
from vllm.platforms import current_platform
from vllm.utils.network_utils import get_open_zmq_ipc_path

from worker.checkpoint import UnknownLocationError
from worker.inference import interfaces, plugin, waiting
from worker.inference.environment import IncompleteEnvironmentError, NodeEnvironment
from worker.inference.layer import VersionedLayers
from worker.inference.resolver import VersionResolver

LOCATION = "model.layers.22.mlp.down_proj"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "config.json").write_text(json.dumps({}))
    save_file({f"{LOCATION}.weight": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    node = NodeEnvironment(tmp_path, str(tmp_path / "store"), tmp_path / "cache", LOCATION, "a" * 64)
    return {**node.variables(), "ERRATA_NODE_TOKEN": "secret"}


@pytest.fixture(autouse=True)
def untouched_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "_all_lora_classes", utils._all_lora_classes)
    monkeypatch.setattr(FusedMoEConfig, "is_lora_enabled", FusedMoEConfig.is_lora_enabled)
    monkeypatch.setattr(LoRAResolverRegistry, "resolvers", {})
    monkeypatch.setattr(shm_broadcast, "sched_yield", shm_broadcast.sched_yield)


def become(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def registered() -> list[VersionedLayers]:
    return [layers for layers in utils._all_lora_classes if isinstance(layers, VersionedLayers)]


def test_the_installed_vllm_has_all_that_the_plugin_leans_on() -> None:
    interfaces.check()


def test_a_missing_method_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(RowParallelLinearWithLoRA, "slice_lora_a")
    monkeypatch.delattr("vllm.lora.layers.base.BaseLayerWithLoRA.slice_lora_a")
    with pytest.raises(interfaces.IncompatibleVllmError, match=r"slice_lora_a is gone"):
        interfaces.check()


def test_a_changed_signature_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def set_lora(self: object, slot: int, lora_a: object, lora_b: object) -> None: ...

    monkeypatch.setattr(BaseLinearLayerWithLoRA, "set_lora", set_lora)
    with pytest.raises(interfaces.IncompatibleVllmError, match=r"set_lora takes no index"):
        interfaces.check()


def test_an_attribute_that_is_no_longer_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(self: object, base_layer: object) -> None: ...

    monkeypatch.setattr(BaseLinearLayerWithLoRA, "__init__", init)
    with pytest.raises(interfaces.IncompatibleVllmError, match=r"__init__ has no input_size"):
        interfaces.check()


def test_a_missing_list_of_layer_classes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(utils, "_all_lora_classes")
    with pytest.raises(interfaces.IncompatibleVllmError, match="_all_lora_classes"):
        interfaces.check()


def test_another_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", "0.33.0+cpu")
    with pytest.raises(interfaces.IncompatibleVllmError, match=r"vLLM is 0\.33\.0, not 0\.32\.0"):
        interfaces.check()


def test_a_process_that_is_no_node_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ERRATA_LOCATION", raising=False)
    plugin.register()
    assert not registered()
    assert not LoRAResolverRegistry.get_supported_resolvers()


SERVER = """
import multiprocessing
from worker.inference import plugin

def engine():
    plugin._end_with_the_server()
    print("began", flush=True)
    sum(range(10**15))  # no other thread gets its turn meanwhile

process = multiprocessing.get_context("fork").Process(target=engine)
process.start()
process.join()
"""


def test_what_a_killed_server_began_ends_with_it() -> None:
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        assert server.stdout.readline() == "began\n"
        server.kill()
        # Its output ends when nobody is left that could write to it.
        assert server.communicate(timeout=10) == ("", None)


def test_registering_twice_is_registering_once(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    become(environment, monkeypatch)
    plugin.register()
    resolver = LoRAResolverRegistry.get_resolver("errata")
    plugin.register()
    assert registered() == [VersionedLayers(frozenset({f"{LOCATION}.weight"}))]
    assert utils._all_lora_classes[0] is registered()[0]
    assert LoRAResolverRegistry.get_resolver("errata") is resolver
    assert isinstance(resolver, VersionResolver)


def test_routed_experts_run_as_without_adapters(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    become(environment, monkeypatch)
    parallel = FusedMoEParallelConfig.make_no_parallel()
    sizes = {"num_experts": 4, "experts_per_token": 2, "hidden_dim": 64, "intermediate_size": 64}
    plugin.register()
    config = FusedMoEConfig(
        **sizes,
        num_local_experts=4,
        num_logical_experts=4,
        activation=MoEActivation.SILU,
        device="cpu",
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=parallel,
        in_dtype=torch.bfloat16,
        is_lora_enabled=True,
    )
    assert not config.is_lora_enabled


def test_the_engine_of_a_node_does_not_spin_while_it_waits(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiprocessing.current_process(), "name", "EngineCore")
    become(environment, monkeypatch)
    plugin.register()
    address = get_open_zmq_ipc_path()
    with zmq.Context() as context:
        reader = shm_broadcast.SpinCondition(is_reader=True, context=context, notify_address=address)
        began = time.monotonic()
        for _ in range(500):
            reader.record_read()
            reader.wait()
        assert time.monotonic() - began >= 500 * 0.0002
        context.destroy(linger=0)


def test_a_worker_spins_between_steps_and_sleeps_when_there_is_nothing_to_do(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, waits = 100.0, []

    def passes(how: str, seconds: float) -> None:
        nonlocal now
        waits.append(how)
        now += seconds

    monkeypatch.setattr(
        waiting, "time", SimpleNamespace(monotonic=lambda: now, sleep=lambda seconds: passes("sleeps", seconds))
    )
    monkeypatch.setattr(shm_broadcast, "sched_yield", lambda: passes("spins", 1e-4))
    monkeypatch.setattr(multiprocessing.current_process(), "name", "VllmWorker-0")
    become(environment, monkeypatch)
    plugin.register()
    for _ in range(2):
        waits.clear()
        for _ in range(1000):
            shm_broadcast.sched_yield()
        assert waits == ["spins"] * 200 + ["sleeps"] * 800
        now += 0.01  # it has computed; the next wait is another


@pytest.mark.parametrize(("process", "on_cpu"), [("EngineCore", False), ("VllmWorker-0", False), ("MainProcess", True)])
def test_a_server_and_what_serves_a_device_wait_as_vllm_has_them(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, process: str, on_cpu: bool
) -> None:
    monkeypatch.setattr(multiprocessing.current_process(), "name", process)
    become(environment, monkeypatch)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: on_cpu)
    waits = shm_broadcast.sched_yield
    plugin.register()
    assert shm_broadcast.sched_yield is waits


def test_a_node_does_not_start_on_a_vllm_that_moved(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    become(environment, monkeypatch)
    monkeypatch.setattr("vllm.__version__", "0.33.0")
    with pytest.raises(interfaces.IncompatibleVllmError):
        plugin.register()
    assert not registered()


def test_a_node_does_not_start_without_its_routes(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    become(environment, monkeypatch)
    monkeypatch.setitem(sys.modules, "worker.inference.routes", None)
    with pytest.raises(ImportError, match=r"worker\.inference\.routes"):
        plugin.register()


@pytest.mark.parametrize("name", ["ERRATA_STORE", "ERRATA_BASE_FINGERPRINT", "ERRATA_NODE_TOKEN"])
def test_a_node_does_not_start_half_configured(
    environment: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    become(environment, monkeypatch)
    monkeypatch.delenv(name)
    with pytest.raises(IncompleteEnvironmentError, match=name):
        plugin.register()


def test_a_node_does_not_start_on_a_location_that_its_model_lacks(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    become({**environment, "ERRATA_LOCATION": "model.layers.2.mlp.down_proj"}, monkeypatch)
    with pytest.raises(UnknownLocationError, match=r"layers\.2\."):
        plugin.register()


def test_a_nodes_environment_comes_back(environment: dict[str, str]) -> None:
    node = NodeEnvironment.read(environment)
    assert {**node.variables(), "ERRATA_NODE_TOKEN": "secret"} == environment
