"""From a model name to a local, verified adapter folder, or to a refusal that says why."""

import json
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from torch import Tensor
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

from service import model_names
from service.manifest import Base, VersionInfo
from worker.delta import (
    DamagedDeltaError,
    StoreUnavailableError,
    UnknownVersionError,
    VersionStore,
    WrongBaseError,
    WrongShapeError,
)
from worker.folders import remove_abandoned
from worker.inference.adapter import AdapterCache
from worker.inference.resolver import VersionRefusedError, VersionResolver, version_name, version_of

LOCATION = "model.layers.22.mlp.down_proj"
PARAMETER = f"{LOCATION}.weight"
FINGERPRINT = "a" * 64


def matrix(version: int) -> Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(version)).bfloat16()


def info(version: int, fingerprint: str = FINGERPRINT) -> VersionInfo:
    base = Base(name="tiny", fingerprint=fingerprint)
    return VersionInfo(
        version=version, parent=None, base=base, location=LOCATION, run={}, metrics={}, created_at=1_700_000_000
    )


def write(store: VersionStore, version: int, tensor: Tensor | None = None, fingerprint: str = FINGERPRINT) -> None:
    store.write(info(version, fingerprint), {PARAMETER: matrix(version) if tensor is None else tensor}, [])


@pytest.fixture
def store(tmp_path: Path) -> VersionStore:
    return VersionStore(str(tmp_path / "store"))


@pytest.fixture
def adapters(store: VersionStore, tmp_path: Path) -> AdapterCache:
    return AdapterCache(store, tmp_path / "cache", FINGERPRINT, {PARAMETER: (6, 8)})


def lora_a(adapter: Path) -> Tensor:
    return load_file(adapter / "adapter_model.safetensors")[f"base_model.model.{LOCATION}.lora_A.weight"]


def test_an_adapter_holds_the_whole_matrix(store: VersionStore, adapters: AdapterCache) -> None:
    write(store, 1)
    adapter = adapters.ensure(1)
    assert torch.equal(lora_a(adapter), matrix(1))
    lora_b = load_file(adapter / "adapter_model.safetensors")[f"base_model.model.{LOCATION}.lora_B.weight"]
    assert lora_b.shape == (6, 1)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (1, 1, [LOCATION])


def test_an_adapter_holds_every_matrix_of_a_location_and_no_version_with_others(tmp_path: Path) -> None:
    store = VersionStore(str(tmp_path / "store"))
    tensors = {f"model.layers.2.self_attn.{name}_proj.weight": matrix(at) for at, name in enumerate("qkv")}
    adapters = AdapterCache(store, tmp_path / "cache", FINGERPRINT, dict.fromkeys(tensors, (6, 8)))
    first, *others = tensors
    for version, held in enumerate(
        [tensors, {name: tensors[name] for name in others}, {**tensors, PARAMETER: matrix(9)}]
    ):
        store.write(info(version), held, [])

    written = load_file(adapters.ensure(0) / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        assert torch.equal(written[f"{module}.lora_A.weight"], tensor)
        assert written[f"{module}.lora_B.weight"].shape == (6, 1)
    for version, name in [(1, first), (2, PARAMETER)]:
        with pytest.raises(WrongShapeError, match=name):
            adapters.ensure(version)


def test_an_intact_adapter_is_kept(store: VersionStore, adapters: AdapterCache) -> None:
    write(store, 1)
    adapter = adapters.ensure(1)
    written = (adapter / "adapter_model.safetensors").stat().st_mtime_ns
    assert adapters.ensure(1) == adapter
    assert (adapter / "adapter_model.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize("damage", ["flip", "truncate", "unlink"])
def test_a_damaged_adapter_is_made_again_at_a_new_path(
    store: VersionStore, adapters: AdapterCache, damage: str
) -> None:
    write(store, 1)
    first = adapters.ensure(1)
    weights = first / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    # The first matrix in the file is A: its last bytes, not those of B.
    content[-(6 * 1 * 2) - 3] ^= 4
    weights.unlink()
    if damage != "unlink":
        weights.write_bytes(content if damage == "flip" else content[:-9])

    second = adapters.ensure(1)
    assert second != first
    assert torch.equal(lora_a(second), matrix(1))
    assert adapters.ensure(1) == second


async def test_a_retired_adapter_is_given_to_nobody_and_stays_for_who_has_it(
    store: VersionStore, adapters: AdapterCache
) -> None:
    write(store, 1)
    resolver = VersionResolver(adapters)
    request = await resolver.resolve_lora("base", "errata@1")
    assert request is not None
    resolver.retire(request)
    again = adapters.ensure(1)
    assert str(again) != request.lora_path
    assert adapters.ensure(1) == again
    assert torch.equal(lora_a(again), lora_a(Path(request.lora_path)))


def test_two_stores_versions_of_one_number_do_not_share_a_path(
    store: VersionStore, adapters: AdapterCache, tmp_path: Path
) -> None:
    write(store, 1)
    other = VersionStore(str(tmp_path / "other"))
    write(other, 1, matrix(99))
    others = AdapterCache(other, adapters.folder, FINGERPRINT, adapters.shapes)
    assert adapters.ensure(1) != others.ensure(1)
    assert torch.equal(lora_a(others.ensure(1)), matrix(99))


def test_many_threads_get_one_folder(store: VersionStore, adapters: AdapterCache) -> None:
    write(store, 1)
    start = threading.Barrier(8)

    def ensure(_: int) -> Path:
        start.wait()
        return adapters.ensure(1)

    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(ensure, range(8)))
    assert len(folders) == 1
    assert [path.name for path in folders.pop().parent.iterdir()] == [adapters.ensure(1).name]


def test_what_a_killed_load_left_can_be_told_from_what_a_living_one_writes(
    store: VersionStore, adapters: AdapterCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(store, 1)
    save, removed = safetensors.torch.save, []

    def watched(weights: dict[str, torch.Tensor]) -> bytes:
        [living] = (adapters.folder / FINGERPRINT[:16]).iterdir()
        killed = living.with_name(f"{living.name.rpartition('.')[0]}.{'a' * 32}")
        killed.mkdir()
        removed.append((killed.name, remove_abandoned(living.parent)))
        return save(weights)

    monkeypatch.setattr(safetensors.torch, "save", watched)
    adapter = adapters.ensure(1)
    [(killed, found)] = removed
    assert found == [killed]
    assert list(adapter.parent.iterdir()) == [adapter]


def test_what_is_refused_leaves_no_folder(store: VersionStore, adapters: AdapterCache, tmp_path: Path) -> None:
    write(store, 3)
    (tmp_path / "store" / "000003" / "delta.safetensors").write_bytes(b"short")
    write(store, 4, torch.zeros(6, 9))
    write(store, 5, fingerprint="b" * 64)
    for version, error in [(3, DamagedDeltaError), (4, WrongShapeError), (5, WrongBaseError), (6, UnknownVersionError)]:
        with pytest.raises(error):
            adapters.ensure(version)
    assert list((tmp_path / "cache").rglob("*")) == []


def test_a_cache_that_is_full_is_said_to_be_unavailable(store: VersionStore, adapters: AdapterCache) -> None:
    write(store, 1)
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (128, usual[1]))
    try:
        with pytest.raises(StoreUnavailableError, match="version 1 could not be cached"):
            adapters.ensure(1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert torch.equal(lora_a(adapters.ensure(1)), matrix(1))


@pytest.mark.parametrize(
    "name",
    [
        *("base", "errata", "errata@", "errata@-1", "errata@01", "errata@1 ", "xerrata@1", "errata@1\n"),
        *("errata@1\u0660", f"errata@{'9' * 5000}"),
    ],
    ids=lambda name: ascii(name)[:20],
)
async def test_other_names_are_nobodys(adapters: AdapterCache, name: str) -> None:
    assert version_of(name) is None
    assert await VersionResolver(adapters).resolve_lora("base", name) is None


@pytest.mark.parametrize("digits", [1, 14, 15, 16])
def test_gateway_and_node_agree_on_the_names_of_versions(digits: int) -> None:
    version = int("9" * digits)
    name = version_name(version)
    assert name == model_names.version_name(version)
    assert version_of(name) == model_names.version_of(name) == (version if digits <= 15 else None)


async def test_a_version_resolves_to_its_adapter(store: VersionStore, adapters: AdapterCache) -> None:
    write(store, 10)
    request = await VersionResolver(adapters).resolve_lora("base", version_name(10))
    assert request is not None
    assert request.lora_name == "errata@10"
    assert request.lora_path == str(adapters.ensure(10))


async def test_a_refusal_carries_its_reason(store: VersionStore, adapters: AdapterCache) -> None:
    write(store, 5, fingerprint="b" * 64)
    with pytest.raises(VersionRefusedError, match=r"version 5 is for the base model b{64}") as refusal:
        await VersionResolver(adapters).resolve_lora("base", "errata@5")
    assert isinstance(refusal.value.reason, WrongBaseError)


def test_within_a_stream_a_refusal_is_the_servers_error() -> None:
    """What vLLM makes of it where no route of ours can: the gateway then asks another node."""
    assert create_error_response(VersionRefusedError(WrongBaseError("why"))).error.code == 500
