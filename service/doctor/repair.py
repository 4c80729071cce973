"""``errata doctor --repair``: what the train worker repairs when it starts, now."""

import os
import subprocess
import sys
from collections.abc import Mapping

from service.errors import UnavailableError
from service.settings import Settings


def repair(settings: Settings) -> list[str]:
    """Repairs registry, version store and edits; returns a sentence for each thing that was done.

    The version store's format is the worker's business, and its libraries are no part of this process.

    Raises:
        UnavailableError: Redis or the version store cannot be reached, or the worker is not installed here.
    """
    command = [sys.executable, "-m", "worker.repair"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=_environment(settings))
    if done.returncode:
        raise UnavailableError(f"nothing more was repaired: {done.stderr.strip()}", code="not_repaired")
    return done.stdout.splitlines()


def _environment(settings: Settings) -> Mapping[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ERRATA_")}
    return {**inherited, **settings.environment(), "ERRATA_REDIS_URL": settings.redis_url}
