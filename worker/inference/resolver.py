"""From a model name, `errata@7`, to a verified version that vLLM can load, or to a refusal with its reason."""

import asyncio
import logging
import re
from pathlib import Path

from typing_extensions import override
from vllm.exceptions import VLLMServerError
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from worker.delta import DeltaError
from worker.inference.adapter import AdapterCache

# Below "vllm", so that vLLM's own logging configuration applies.
logger = logging.getLogger("vllm.errata.resolver")

RESOLVER = "errata"
"""The resolver's name in vLLM's registry."""

_NAME = re.compile(r"errata@(0|[1-9][0-9]{0,14})")


class VersionRefusedError(VLLMServerError):
    """The version of a request, which is right, cannot be served by this node; `reason` says why."""

    def __init__(self, reason: DeltaError) -> None:
        super().__init__(str(reason))
        self.reason = reason


def version_name(version: int) -> str:
    """Return the name by which requests ask for a version."""
    return f"errata@{version}"


def version_of(name: str) -> int | None:
    """Return the version that a model name asks for; None when it is no version's name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


class VersionResolver(LoRAResolver):
    """Asked by vLLM, once at a time for each name, for names that it does not know."""

    def __init__(self, adapters: AdapterCache) -> None:
        self._adapters = adapters

    @override
    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Return where the version's adapter is; None for a name that is no version's. Raises VersionRefusedError."""
        version = version_of(lora_name)
        if version is None:
            return None
        try:
            folder = await asyncio.to_thread(self._adapters.ensure, version)
        except DeltaError as reason:
            logger.warning("version_refused version=%d error=%s reason=%s", version, type(reason).__name__, reason)
            raise VersionRefusedError(reason) from reason
        # vLLM sets the integer itself after this returns.
        return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(folder))

    def retire(self, request: LoRARequest) -> None:
        """Have what a version's slot has computed be used no more: see `AdapterCache.retire`."""
        self._adapters.retire(Path(request.lora_path))
