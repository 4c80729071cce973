import itertools
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from worker import checkpoint
from worker.folders import in_use
from worker.inference.environment import IncompleteEnvironmentError, NodeEnvironment
from worker.inference.launcher import Command, build_command, main

TOKEN = {"ERRATA_NODE_TOKEN": "secret"}


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    weights = {f"model.layers.{layer}.mlp.down_proj.weight": torch.ones(2, 3) for layer in range(3)}
    save_file(weights, tmp_path / "model.safetensors")
    return tmp_path


def value(command: Command, flag: str) -> str:
    return command.arguments[command.arguments.index(flag) + 1]


def values(command: Command, flag: str) -> list[str]:
    behind = command.arguments[command.arguments.index(flag) + 1 :]
    return list(itertools.takewhile(lambda argument: not argument.startswith("--"), behind))


def flags(model_dir: Path) -> list[str]:
    return ["--model", str(model_dir), "--store", "s3://bucket/store", "--cache", str(model_dir / "cache")]


def test_the_server_is_told_what_the_node_is(model_dir: Path) -> None:
    command = build_command([*flags(model_dir), "--slots", "3", "--port", "9000"], TOKEN, on_cpu=True)
    assert command.arguments[:2] == [sys.executable, "-m"]
    assert value(command, "--model") == str(model_dir)
    assert value(command, "--served-model-name") == "base"
    assert values(command, "--lora-target-modules") == ["model.layers.2.mlp.down_proj"]
    assert value(command, "--max-loras") == "3"
    assert value(command, "--max-cpu-loras") == "16"
    assert value(command, "--port") == "9000"
    assert "--enforce-eager" in command.arguments
    assert "secret" not in " ".join(command.arguments)


@pytest.mark.parametrize(("has_bfloat16", "on_cpu_in"), [(True, "bfloat16"), (False, "float32")])
def test_a_node_computes_in_what_the_trainer_computes_in_whatever_the_checkpoint_is_in(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, has_bfloat16: bool, on_cpu_in: str
) -> None:
    (model_dir / "config.json").write_text(json.dumps({"model_type": "unheard-of", "dtype": "float16"}))
    monkeypatch.setattr("worker.precision._cpu_multiplies_bfloat16", lambda: has_bfloat16)
    on_cpu, on_gpu = (build_command(flags(model_dir), TOKEN, on_cpu=on_cpu) for on_cpu in (True, False))
    assert (values(on_cpu, "--dtype"), values(on_gpu, "--dtype")) == ([on_cpu_in], ["bfloat16"])


@pytest.mark.parametrize("on_cpu", [True, False])
def test_no_model_takes_what_would_have_to_be_fetched(model_dir: Path, on_cpu: bool) -> None:
    assert "--language-model-only" in build_command(flags(model_dir), TOKEN, on_cpu=on_cpu).arguments


def test_the_server_is_told_of_fused_layers_too(model_dir: Path) -> None:
    """Of a matrix's own layer and the fused one vLLM has one; only vLLM knows which."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    weights = {f"model.layers.20.self_attn.{name}.weight": torch.ones(2, 3) for name in names}
    save_file(weights, model_dir / "model.safetensors")
    command = build_command([*flags(model_dir), "--location", "model.layers.20"], TOKEN, on_cpu=True)
    expected = [f"model.layers.20.self_attn.{name}" for name in ("k_proj", "o_proj", "q_proj", "qkv_proj", "v_proj")]
    assert values(command, "--lora-target-modules") == expected


def test_what_auto_chose_is_said(model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    build_command(flags(model_dir), TOKEN, on_cpu=True)
    assert len([message for message in caplog.messages if message.startswith("auto_location ")]) == 1


def test_the_plugin_is_told_what_the_node_is(model_dir: Path) -> None:
    command = build_command(flags(model_dir), TOKEN, on_cpu=True)
    node = NodeEnvironment.read(command.environ)
    assert node.location == "model.layers.2.mlp.down_proj"
    assert node.fingerprint == checkpoint.fingerprint(model_dir)
    assert node.store_url == "s3://bucket/store"
    assert command.environ["VLLM_PLUGINS"] == "errata"
    assert command.environ["VLLM_CPU_KVCACHE_SPACE"] == "1"


def test_a_relative_store_is_made_absolute(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model_dir)
    command = build_command(["--model", ".", "--store", "store", "--cache", "cache"], TOKEN, on_cpu=True)
    node = NodeEnvironment.read(command.environ)
    assert (node.store_url, node.cache_dir, node.model_dir) == (
        str(model_dir / "store"),
        model_dir / "cache",
        model_dir,
    )


def test_every_setting_can_come_from_the_environment(model_dir: Path) -> None:
    environ = {
        **TOKEN,
        "ERRATA_MODEL": str(model_dir),
        "ERRATA_LOCATION": "model.layers.2.mlp.down_proj.weight",
        "ERRATA_STORE": "/store",
        "ERRATA_NODE_CACHE": "/cache",
        "ERRATA_NODE_SLOTS": "2",
        "ERRATA_NODE_HOST_SLOTS": "8",
        "ERRATA_MAX_MODEL_LEN": "512",
        "VLLM_CPU_KVCACHE_SPACE": "3",
    }
    command = build_command([], environ, on_cpu=True)
    found = [value(command, flag) for flag in ("--max-loras", "--max-cpu-loras", "--max-model-len")]
    assert found == ["2", "8", "512"]
    assert command.environ["ERRATA_LOCATION"] == "model.layers.2.mlp.down_proj"
    assert command.environ["VLLM_CPU_KVCACHE_SPACE"] == "3"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318/"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://collector:4318/v1/traces"),
    ],
)
def test_a_node_exports_its_spans_where_the_others_do(model_dir: Path, name: str, value: str) -> None:
    command = build_command(flags(model_dir), {**TOKEN, name: value}, on_cpu=True)
    assert values(command, "--otlp-traces-endpoint") == ["http://collector:4318/v1/traces"]
    assert command.environ["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] == "http/protobuf"
    assert command.environ["OTEL_SERVICE_NAME"] == "errata-node"


def test_without_an_endpoint_a_node_exports_nothing(model_dir: Path) -> None:
    assert "--otlp-traces-endpoint" not in build_command(flags(model_dir), TOKEN, on_cpu=True).arguments


def test_a_collectors_password_gets_into_no_command_line(model_dir: Path) -> None:
    environ = {**TOKEN, "OTEL_EXPORTER_OTLP_ENDPOINT": "http://user:passw0rd@collector:4318"}
    with pytest.raises(IncompleteEnvironmentError, match="OTEL_EXPORTER_OTLP_HEADERS") as raised:
        build_command(flags(model_dir), environ, on_cpu=True)
    assert "passw0rd" not in str(raised.value)


def test_vllms_own_flags_come_last(model_dir: Path) -> None:
    command = build_command([*flags(model_dir), "--", "--seed", "1"], TOKEN, on_cpu=False)
    assert command.arguments[-2:] == ["--seed", "1"]
    assert "--enforce-eager" not in command.arguments
    assert "VLLM_CPU_KVCACHE_SPACE" not in command.environ


def test_a_node_never_runs_in_development_mode(model_dir: Path) -> None:
    command = build_command(flags(model_dir), {**TOKEN, "VLLM_SERVER_DEV_MODE": "1"}, on_cpu=True)
    assert command.environ["VLLM_SERVER_DEV_MODE"] == "0"


def test_a_nodes_processes_are_not_forked(model_dir: Path) -> None:
    """In a forked one vLLM would load no plugin: it would not end with the server."""
    command = build_command(flags(model_dir), {**TOKEN, "VLLM_WORKER_MULTIPROC_METHOD": "fork"}, on_cpu=False)
    assert command.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"


@pytest.fixture
def started(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The programs that `main` becomes."""
    programs: list[str] = []
    monkeypatch.setattr(os, "execve", lambda program, *_: programs.append(program))
    monkeypatch.setattr(sys, "argv", ["launcher", *flags(model_dir)])
    monkeypatch.setenv("ERRATA_NODE_TOKEN", "secret")
    return programs


def test_a_starting_node_removes_what_killed_loads_left(model_dir: Path, started: list[str]) -> None:
    base = model_dir / "cache" / checkpoint.fingerprint(model_dir)[:16]
    killed, living = (base / f".000007-{'c' * 16}-0.{name * 32}" for name in "ab")
    whole = base / f"000006-{'d' * 16}-0"
    for folder in (killed, living, whole):
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_bytes(b"matrices")
    with in_use(living):
        main()
    assert sorted(base.iterdir()) == [living, whole]
    assert started == [sys.executable]


def test_a_node_whose_cache_cannot_be_cleaned_starts(
    model_dir: Path, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> list[str]:
        raise PermissionError("not yours")

    (model_dir / "cache" / "base").mkdir(parents=True)
    monkeypatch.setattr("worker.inference.launcher.remove_abandoned", fail)
    main()
    assert started == [sys.executable]


def test_a_node_without_a_token_is_refused(model_dir: Path) -> None:
    with pytest.raises(IncompleteEnvironmentError, match="ERRATA_NODE_TOKEN"):
        build_command(flags(model_dir), {}, on_cpu=True)


def test_the_token_may_be_in_a_file(model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("from-the-file\n")
    command = build_command(flags(model_dir), {"ERRATA_NODE_TOKEN_FILE": str(file)}, on_cpu=True)
    assert command.environ["ERRATA_NODE_TOKEN"] == "from-the-file"
    file.write_text("")
    with pytest.raises(IncompleteEnvironmentError, match="ERRATA_NODE_TOKEN unset"):
        build_command(flags(model_dir), {"ERRATA_NODE_TOKEN_FILE": str(file)}, on_cpu=True)
    with pytest.raises(IncompleteEnvironmentError, match="No such file"):
        build_command(flags(model_dir), {"ERRATA_NODE_TOKEN_FILE": str(tmp_path / "none")}, on_cpu=True)


def test_a_location_that_the_model_lacks_is_refused(model_dir: Path) -> None:
    with pytest.raises(checkpoint.UnknownLocationError, match=r"layers\.20\."):
        build_command([*flags(model_dir), "--location", "model.layers.20.mlp.down_proj"], TOKEN, on_cpu=True)


def test_a_node_that_cannot_start_says_why(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ERRATA_NODE_TOKEN", raising=False)
    monkeypatch.setattr(sys, "argv", ["launcher", *flags(model_dir)])
    with pytest.raises(SystemExit, match="cannot start: ERRATA_NODE_TOKEN unset"):
        main()


@pytest.mark.parametrize("location", ["auto", "model.layers.2.mlp.down_proj"])
def test_a_node_whose_weights_are_a_pointer_to_them_says_so(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, started: list[str], location: str
) -> None:
    (model_dir / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 269060552\n")
    monkeypatch.setattr(sys, "argv", ["launcher", *flags(model_dir), "--location", location])
    with pytest.raises(SystemExit, match=r"cannot start: .*model\.safetensors cannot be read"):
        main()
    assert started == []


def test_a_missing_setting_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_command([], TOKEN, on_cpu=True)
    assert "--model, --store, --cache" in capsys.readouterr().err
