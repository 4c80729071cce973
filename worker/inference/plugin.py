"""The entry point that vLLM calls in each of its processes, before any model is loaded.

Only the standard library is imported at the top: vLLM logs and goes on when a plugin cannot be imported, and a node
without its plugin must not serve. What fails inside `register` stops the process.
"""

import ctypes
import importlib
import multiprocessing
import os
import signal
from collections.abc import Collection, Mapping
from typing import Any

from worker.inference import waiting
from worker.inference.environment import LOCATION_VARIABLE, NodeEnvironment

_PR_SET_PDEATHSIG = 1


def register() -> None:
    """Make this process part of a node, once; do nothing in a process that is none (no $ERRATA_LOCATION).

    Raises IncompleteEnvironmentError, IncompatibleVllmError or UnknownLocationError.
    """
    if not os.environ.get(LOCATION_VARIABLE):
        return
    environment = NodeEnvironment.read(os.environ)
    _end_with_the_server()

    from worker.checkpoint import location_shapes  # noqa: PLC0415  see the module's docstring
    from worker.inference import interfaces  # noqa: PLC0415

    interfaces.check()
    # As of this plugin, so of the routes: vLLM would go on without them.
    importlib.import_module("worker.inference.routes")
    shapes = location_shapes(environment.model_dir, environment.location)
    _leave_experts_alone()
    _sleep_while_waiting()
    _register_layers(frozenset(shapes))
    _register_resolver(environment, shapes)


def _end_with_the_server() -> None:
    """Have the kernel kill a process that vLLM began when what began it ends: its successor needs the memory.

    No thread of the process's own would do: a worker that waits for the other ranks can keep the interpreter's lock.
    See prctl(2), PR_SET_PDEATHSIG. vLLM begins its processes in main threads, which end last.
    """
    if parent := multiprocessing.parent_process():
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL):
            raise OSError(ctypes.get_errno(), "prctl")
        if os.getppid() != parent.pid:  # it ended before the kernel was told
            os._exit(1)


def _leave_experts_alone() -> None:
    """Let routed experts run on the kernels that they have without adapters, as versions never replace them.

    vLLM would pick one that can run adapters; on a CPU there is none, and the first request would take the engine down.
    """
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig  # noqa: PLC0415

    never: Any = property(lambda _: False, lambda _, __: None)
    FusedMoEConfig.is_lora_enabled = never


def _sleep_while_waiting() -> None:
    """Have the engine of a node on a CPU sleep while its workers compute, and a worker while there is nothing to do.

    vLLM's processes spin for a second after each message, so under load the engine takes most of a core, and a worker
    that is asked what it holds every second takes one without any load. The cores of a CPU are what computes.
    """
    from vllm.distributed.device_communicators import shm_broadcast  # noqa: PLC0415
    from vllm.platforms import current_platform  # noqa: PLC0415

    process = multiprocessing.current_process().name
    if not current_platform.is_cpu():
        return
    if process.startswith("EngineCore"):
        shm_broadcast.sched_yield = waiting.sleeping  # type: ignore[attr-defined]
    elif process.startswith("VllmWorker"):
        shm_broadcast.sched_yield = waiting.patient(shm_broadcast.sched_yield)  # type: ignore[attr-defined]


def _register_layers(tuned: Collection[str]) -> None:
    """Put the versioned layers in front: vLLM takes the first class that accepts a module."""
    from vllm.lora import utils  # noqa: PLC0415

    from worker.inference.layer import VersionedLayers  # noqa: PLC0415

    layers: Any = VersionedLayers(tuned)  # to vLLM, a class
    if layers not in utils._all_lora_classes:
        utils._all_lora_classes = (layers, *utils._all_lora_classes)


def _register_resolver(environment: NodeEnvironment, shapes: Mapping[str, tuple[int, ...]]) -> None:
    from vllm.lora.resolver import LoRAResolverRegistry  # noqa: PLC0415

    from worker.delta import VersionStore  # noqa: PLC0415
    from worker.inference.adapter import AdapterCache  # noqa: PLC0415
    from worker.inference.resolver import RESOLVER, VersionResolver  # noqa: PLC0415

    if RESOLVER in LoRAResolverRegistry.get_supported_resolvers():
        return
    adapters = AdapterCache(
        store=VersionStore(environment.store_url),
        folder=environment.cache_dir,
        fingerprint=environment.fingerprint,
        shapes=shapes,
    )
    LoRAResolverRegistry.register_resolver(RESOLVER, VersionResolver(adapters))
