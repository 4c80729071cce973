"""Everything of vLLM that the plugin leans on beyond its documented extension points, checked at start.

vLLM's internals move between releases. A node that starts on a release that has moved would serve wrong answers or
fail at the first request; this makes it say at start what has moved, and stop.
"""

import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

PINNED_VLLM = "0.32.0"


class IncompatibleVllmError(Exception):
    """The installed vLLM is not the one that the plugin was written for."""


@dataclass(frozen=True)
class Function:
    """A function or method by its dotted path, the parameters it must take and the attributes it must set or read."""

    path: str
    parameters: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()


_LAYERS = "vllm.lora.layers"
_BASE = f"{_LAYERS}.base_linear.BaseLinearLayerWithLoRA"
_LINEAR = "vllm.model_executor.layers.linear"
_MANAGER = "vllm.lora.model_manager.LoRAModelManager"
_QUEUE = "vllm.distributed.device_communicators.shm_broadcast"
_MODELS = "vllm.entrypoints.openai.models.serving.OpenAIServingModels"

FUNCTIONS = (
    Function(
        "vllm.lora.utils.from_layer",
        ("layer", "max_loras", "lora_config", "packed_modules_list", "model_config"),
        ("can_replace_layer", "create_lora_weights"),
    ),
    Function(f"{_BASE}.__init__", ("base_layer",), ("base_layer", "input_size", "tp_size", "tp_rank", "device")),
    Function(f"{_BASE}.create_lora_weights", ("max_loras", "lora_config", "model_config")),
    Function(f"{_BASE}.set_lora", ("index", "lora_a", "lora_b")),
    Function(f"{_BASE}.reset_lora", ("index",)),
    Function(f"{_BASE}.set_mapping", ("punica_wrapper",), ("punica_wrapper",)),
    Function(f"{_BASE}.apply", ("x", "bias")),
    Function(f"{_BASE}._get_quant_method"),
    Function(f"{_LAYERS}.RowParallelLinearWithLoRA.__init__", ("base_layer",), ("input_size_per_partition",)),
    Function(f"{_LAYERS}.RowParallelLinearWithLoRA.slice_lora_a", ("lora_a",)),
    Function(f"{_LAYERS}.RowParallelLinearWithLoRA.forward", ("input_",), ("apply",)),
    Function(f"{_LAYERS}.ColumnParallelLinearWithLoRA.__init__", ("base_layer",)),
    Function(f"{_LAYERS}.ColumnParallelLinearWithLoRA.forward", ("input_",), ("apply",)),
    Function(f"{_LAYERS}.ReplicatedLinearWithLoRA.__init__", ("base_layer",)),
    Function(f"{_LAYERS}.ReplicatedLinearWithLoRA.forward", ("input_",), ("apply",)),
    Function(f"{_LINEAR}.LinearBase.__init__", (), ("prefix", "input_size", "output_size", "tp_size", "tp_rank")),
    Function(f"{_LINEAR}.MergedColumnParallelLinear.__init__", (), ("output_sizes",)),
    Function(f"{_LINEAR}.QKVParallelLinear.__init__", (), ("num_heads", "num_kv_heads", "num_kv_head_replicas")),
    Function(f"{_LINEAR}.QKVParallelLinear.__init__", (), ("total_num_heads", "total_num_kv_heads")),
    Function(f"{_LINEAR}.QKVParallelLinear.__init__", (), ("head_size", "v_head_size")),
    Function("vllm.lora.lora_weights.PackedLoRALayerWeights.pack", ("loras",)),
    Function("vllm.model_executor.layers.fused_moe.config.FusedMoEConfig.__init__", ("is_lora_enabled",)),
    Function("vllm.lora.punica_wrapper.punica_base.PunicaWrapperBase.__init__", (), ("_token_lora_indices",)),
    Function("vllm.model_executor.custom_op.maybe_get_oot_by_class"),
    Function("vllm.distributed.tensor_model_parallel_all_gather", ("input_", "dim")),
    Function(f"{_MANAGER}.__init__", (), ("modules", "lora_index_to_id", "lora_manager")),
    Function(f"{_MANAGER}.create_dummy_lora", ("lora_id", "rank"), ("lora_a_stacked", "lora_b_stacked")),
    Function(f"{_MANAGER}._register_packed_modules", ("module_full_name",), ("packed_modules_mapping",)),
    Function(f"{_MANAGER}.activate_adapter", ("lora_id",), ("set_lora", "reset_lora")),
    Function(f"{_MANAGER}.list_adapters"),
    Function("vllm.lora.model_manager.LRUCacheLoRAModelManager.pin_adapter", ("lora_id",)),
    Function(f"{_MANAGER}.__init__", (), ("_registered_adapters", "_active_adapters")),
    Function("vllm.utils.cache.LRUCache.__init__", (), ("pinned_items",)),
    Function("vllm.utils.cache.LRUCache.popitem", ("remove_pinned",)),
    Function("vllm.lora.lora_model.LoRAModel.__init__", ("loras",), ("loras",)),
    Function("vllm.lora.lora_weights.LoRALayerWeights.__init__", ("lora_a", "lora_b"), ("lora_a", "lora_b")),
    Function("vllm.v1.worker.worker_base.WorkerBase.get_model"),
    Function(f"{_QUEUE}.SpinCondition.wait", (), ("sched_yield",)),
    Function(f"{_QUEUE}.MessageQueue.acquire_write", (), ("sched_yield",)),
    Function("vllm.lora.resolver.LoRAResolver.resolve_lora", ("base_model_name", "lora_name")),
    Function(f"{_MODELS}.__init__", (), ("lora_requests",)),
    Function(f"{_MODELS}.resolve_lora", ("lora_name",), ("add_lora", "lora_requests")),
    Function("vllm.v1.engine.async_llm.AsyncLLM.generate", ("lora_request",)),
    Function("vllm.outputs.RequestOutput.__init__", ("outputs",)),
    Function("vllm.outputs.CompletionOutput.__init__", ("finish_reason",)),
    Function("vllm.v1.engine.async_llm.AsyncLLM.add_lora", ("lora_request",)),
    Function("vllm.v1.engine.async_llm.AsyncLLM.remove_lora", ("lora_id",)),
    Function("vllm.v1.engine.async_llm.AsyncLLM.collective_rpc", ("method", "args")),
    Function("vllm.entrypoints.launchers.api_server.app_state.init_app_state", (), ("openai_serving_models",)),
)


def check() -> None:
    """Raise IncompatibleVllmError, listing all that is not as expected."""
    version = importlib.import_module("vllm").__version__.partition("+")[0]
    problems = [f"vLLM is {version}, not {PINNED_VLLM}"] if version != PINNED_VLLM else []
    problems += [problem for function in FUNCTIONS for problem in _problems(function)]
    classes = getattr(importlib.import_module("vllm.lora.utils"), "_all_lora_classes", None)
    if not isinstance(classes, tuple):
        problems.append("vllm.lora.utils._all_lora_classes is not a tuple of classes")
    if problems:
        raise IncompatibleVllmError("this vLLM cannot hold versions: " + "; ".join(problems))


def _problems(function: Function) -> Iterator[str]:
    try:
        found = inspect.unwrap(_resolve(function.path))
    except (ImportError, AttributeError) as error:
        yield f"{function.path} is gone ({error})"
        return
    code = getattr(found, "__func__", found).__code__
    for name in function.parameters:
        if name not in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
            yield f"{function.path} takes no {name}"
    for name in function.attributes:
        if name not in code.co_names:
            yield f"{function.path} has no {name}"


def _resolve(path: str) -> Any:
    """Return what a dotted path names, whatever part of it is the module."""
    names = path.split(".")
    for split in range(len(names) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(names[:split]))
        except ModuleNotFoundError:
            continue
        for name in names[split:]:
            found = getattr(found, name)
        return found
    raise ImportError(f"no module {names[0]}")
