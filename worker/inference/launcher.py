"""Starts a node: resolves what the node is, sets its environment, and becomes vLLM's server.

python -m worker.inference.launcher --model DIR --store URL --cache DIR --port 8001 [-- vLLM's own flags]
"""

import argparse
import importlib.metadata
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from worker import checkpoint
from worker.folders import remove_abandoned
from worker.inference.environment import TOKEN_VARIABLE, IncompleteEnvironmentError, NodeEnvironment
from worker.inference.fused import module_names

log = logging.getLogger(__name__)

BASE_MODEL_NAME = "base"
# For answers under way when the node is told to stop. Without it vLLM breaks them off, and where its engine's processes
# are told too, its server goes on waiting for them.
_DRAIN_S = "20"
_TRACES = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"


@dataclass(frozen=True)
class Command:
    """A process to become: its arguments, the program first, and its whole environment."""

    arguments: list[str]
    environ: dict[str, str]


def main() -> None:
    """Replace this process by the server. SIGTERM then stops the server and its engine.

    Every process of the node ends with the server, however that ends (worker.inference.plugin).
    """
    logging.basicConfig(level=logging.INFO)  # says what `auto` chose
    try:
        command = build_command(sys.argv[1:], os.environ, on_cpu=_is_cpu_build())
    except (checkpoint.CheckpointError, IncompleteEnvironmentError) as error:
        raise SystemExit(f"the node cannot start: {error}") from error
    _clean(NodeEnvironment.read(command.environ).cache_dir)
    os.execve(command.arguments[0], command.arguments, command.environ)  # noqa: S606  no shell is wanted


def _clean(cache_dir: Path) -> None:
    """Remove what loads that were killed left in the cache, each as large as a version's matrices."""
    try:
        for base in cache_dir.glob("*/"):
            for name in remove_abandoned(base):
                log.info("removed %s from the cache", name)
    except OSError as error:
        log.warning("the cache was not cleaned: %s", error)


def build_command(argv: Sequence[str], environ: Mapping[str, str], *, on_cpu: bool) -> Command:
    """Return the server's command line and environment.

    Raises CheckpointError for a model or location that is not there, IncompleteEnvironmentError without a token, and
    SystemExit on a wrong command line.
    """
    argv, extra = _split(argv)
    options = _parser(environ).parse_args(argv)
    token = _token(environ)
    model_dir = checkpoint.resolve_model(options.model).absolute()
    location = checkpoint.resolve_location(model_dir, options.location)
    node = NodeEnvironment(
        model_dir=model_dir,
        store_url=options.store if "://" in options.store else str(Path(options.store).absolute()),
        cache_dir=Path(options.cache).absolute(),
        location=location,
        fingerprint=checkpoint.fingerprint(model_dir),
    )
    return Command(
        [sys.executable, *_server_arguments(options, node, on_cpu=on_cpu), *_tracing(environ), *extra],
        {**environ, **_server_environ(environ, on_cpu=on_cpu), **node.variables(), TOKEN_VARIABLE: token},
    )


def _token(environ: Mapping[str, str]) -> str:
    """Return the token that the node demands, or what is in the file that `ERRATA_NODE_TOKEN_FILE` names."""
    if token := environ.get(TOKEN_VARIABLE):
        return token
    file = environ.get(f"{TOKEN_VARIABLE}_FILE")
    try:
        token = Path(file).read_text().strip() if file else ""
    except OSError as error:
        raise IncompleteEnvironmentError(f"{TOKEN_VARIABLE}_FILE: {file} cannot be read: {error.strerror}") from error
    if not token:
        raise IncompleteEnvironmentError(f"{TOKEN_VARIABLE} unset: a node never serves without a token")
    return token


def _tracing(environ: Mapping[str, str]) -> list[str]:
    """Return the flag that has vLLM export its spans where the environment says that spans go; empty if nowhere."""
    base = environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    endpoint = environ.get(_TRACES) or (f"{base.rstrip('/')}/v1/traces" if base else "")
    if not endpoint:
        return []
    if "@" in urlsplit(endpoint).netloc:
        # The flag can be read in the list of processes.
        raise IncompleteEnvironmentError("the OTLP endpoint holds a password; OTEL_EXPORTER_OTLP_HEADERS takes it")
    return ["--otlp-traces-endpoint", endpoint]


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return this launcher's arguments and, from behind `--`, vLLM's."""
    own = list(argv)
    if "--" not in own:
        return own, []
    at = own.index("--")
    return own[:at], own[at + 1 :]


def _parser(environ: Mapping[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m worker.inference.launcher", description=__doc__)

    def add(flag: str, variable: str, default: str | None, description: str) -> None:
        default = environ.get(variable) or default
        parser.add_argument(flag, default=default, required=default is None, help=f"{description} (${variable})")

    add("--model", "ERRATA_MODEL", None, "base model: a folder or a hub id")
    add("--location", "ERRATA_LOCATION", "auto", "tuned parameter, module or layer by its full name, or auto")
    add("--store", "ERRATA_STORE", None, "version store: a folder or any fsspec URL")
    add("--cache", "ERRATA_NODE_CACHE", None, "folder for the node's local copies of versions")
    add("--slots", "ERRATA_NODE_SLOTS", "4", "versions in device memory")
    add("--host-slots", "ERRATA_NODE_HOST_SLOTS", "16", "versions in host memory, those in device memory included")
    add("--max-model-len", "ERRATA_MAX_MODEL_LEN", "2048", "longest prompt and answer together, in tokens")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", default="8001")
    return parser


def _server_arguments(options: argparse.Namespace, node: NodeEnvironment, *, on_cpu: bool) -> list[str]:
    # The module behind `vllm serve`: the CPU build's console script looks for a distribution that it is not.
    arguments = ["-m", "vllm.entrypoints.launchers.api_server.entry", "--model", str(node.model_dir)]
    arguments += ["--served-model-name", BASE_MODEL_NAME, "--max-model-len", options.max_model_len]
    arguments += ["--host", options.host, "--port", options.port]
    targets = module_names(checkpoint.location_shapes(node.model_dir, node.location))
    arguments += ["--enable-lora", "--lora-target-modules", *targets, "--max-lora-rank", "1"]
    arguments += ["--max-loras", options.slots, "--max-cpu-loras", options.host_slots]
    # Images and sounds come by address: a client could have the node fetch from anywhere that it reaches.
    arguments += ["--language-model-only"]
    arguments += ["--worker-extension-cls", "worker.inference.readback.SlotReader"]
    arguments += ["--middleware", "worker.inference.guard.TokenGuard", "--disable-uvicorn-access-log"]
    arguments += ["--shutdown-timeout", _DRAIN_S]
    arguments += precision_flags("cpu" if on_cpu else "cuda")
    return [*arguments, "--enforce-eager"] if on_cpu else arguments


def precision_flags(device_type: str) -> list[str]:
    """Return the flag that has vLLM compute in what the trainer computes in on such a device.

    Left to itself vLLM takes the checkpoint's dtype, and a version does not survive being cast to float16.
    """
    import torch  # noqa: PLC0415  it takes seconds, which a wrong command line need not wait for

    from worker.precision import compute_dtype  # noqa: PLC0415

    return ["--dtype", str(compute_dtype(torch.bfloat16, device_type)).removeprefix("torch.")]


def _server_environ(environ: Mapping[str, str], *, on_cpu: bool) -> dict[str, str]:
    variables = {
        "VLLM_PLUGINS": "errata",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        # Whatever the shell says: it would open routes that call any method of the engine.
        "VLLM_SERVER_DEV_MODE": "0",
        # A forked process takes the plugins for registered, and would not end with the server.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # As the other processes export; vLLM's own default is gRPC. Only with an endpoint do they mean anything.
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_SERVICE_NAME": "errata-node",
    }
    if on_cpu:
        # Some samplers are compiled at their first use even with --enforce-eager: seconds in the middle of somebody's
        # request, and a C++ compiler in the image.
        variables["TORCH_COMPILE_DISABLE"] = "1"
        variables["VLLM_CPU_KVCACHE_SPACE"] = environ.get("VLLM_CPU_KVCACHE_SPACE") or "1"
    return variables


def _is_cpu_build() -> bool:
    try:
        importlib.metadata.distribution("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
