"""The node's own HTTP routes, added to vLLM's server: what is resident, prefetch, read-back, evict.

Errors are in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`. The guard stands in front.
"""

import os
import time
from argparse import Namespace
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import Field
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient
from vllm.lora.resolver import LoRAResolverRegistry
from vllm.v1.engine.async_llm import AsyncLLM

from worker.checkpoint import location_shapes
from worker.delta import (
    DamagedDeltaError,
    DeltaError,
    StoreUnavailableError,
    UnknownVersionError,
    WrongBaseError,
    WrongShapeError,
)
from worker.inference.environment import NodeEnvironment
from worker.inference.residents import LoadFailedError, NotResidentError, ResidentVersions
from worker.inference.resolver import RESOLVER, VersionRefusedError, VersionResolver
from worker.inference.turns import SlotsInUseError, TooManyPinsError, Turns


class _Route(APIRoute):
    """Refuses a wrong request in the one shape; the server's own routes keep the server's."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_or_refuse(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                first = error.errors()[0]
                return _answer(first["msg"], 422, "invalid_value", param=str(first["loc"][-1]))

        return handle_or_refuse


router = APIRouter(prefix="/errata/versions", route_class=_Route)

# HTTP status and code on these routes.
_ANSWERS: dict[type[Exception], tuple[int, str]] = {
    UnknownVersionError: (404, "unknown_version"),
    NotResidentError: (404, "not_resident"),
    DamagedDeltaError: (409, "damaged_version"),
    WrongBaseError: (409, "wrong_base"),
    WrongShapeError: (409, "wrong_shape"),
    TooManyPinsError: (409, "too_many_pins"),
    LoadFailedError: (500, "load_failed"),
    SlotsInUseError: (503, "slots_in_use"),
    StoreUnavailableError: (503, "store_unavailable"),
}


def _residents(request: Request) -> ResidentVersions:
    residents: ResidentVersions = request.app.state.errata_residents
    return residents


Residents = Annotated[ResidentVersions, Depends(_residents)]
Number = Annotated[int, Field(ge=0, le=2**53)]
Version = Annotated[Number, Path()]


@router.get("")
async def list_versions(request: Request, residents: Residents, checksum: bool = False) -> dict[str, Any]:
    """What the node is and holds; `?checksum=true` also reads back what is in device slots."""
    return {
        **request.app.state.errata_identity,
        "resident": [asdict(resident) for resident in await residents.list(checksum=checksum)],
    }


@router.put("/pins", status_code=204)
async def pin(residents: Residents, version: Annotated[set[Number], Query(default_factory=set)]) -> None:
    """Have these loaded versions, and no others, keep their slots whatever else is asked for."""
    await residents.pin(version)


@router.post("/{version}/prefetch")
async def prefetch(version: Version, residents: Residents) -> dict[str, Any]:
    """Load a version, so that the next request for it waits for nothing. `load_s` is near 0 when it was loaded."""
    started = time.monotonic()
    await residents.prefetch(version)
    return {"version": version, "load_s": round(time.monotonic() - started, 4)}


@router.get("/{version}/checksum")
async def read_back(version: Version, residents: Residents) -> dict[str, Any]:
    """The sha256 of each tensor as it is in the device slot, to be compared with the version's manifest."""
    return {"version": version, "tensors": await residents.checksums(version)}


@router.delete("/{version}", status_code=204)
async def evict(version: Version, residents: Residents) -> None:
    """Forget a version; the next request for it loads it again."""
    await residents.evict(version)


def _answer(message: str, status: int, code: str, param: str) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": body}, status_code=status)


async def _on_route_error(_request: Request, error: Exception) -> JSONResponse:
    status, code = _ANSWERS[type(error)]
    return _answer(str(error), status, code, param="version")


async def _on_refused_request(_request: Request, error: Exception) -> JSONResponse:
    """Answer an inference request whose version this node cannot serve, as the version's own routes do."""
    assert isinstance(error, VersionRefusedError)  # noqa: S101  narrows FastAPI's handler type
    status, code = _ANSWERS[type(error.reason)]
    return _answer(str(error), status, code, param="model")


class VersionRoutes:
    """The endpoint plugin, in the form that `vllm.endpoint_plugins` asks for."""

    name = "errata"
    required_tasks = ("generate",)

    def __init__(self, environment: NodeEnvironment) -> None:
        self._environment = environment

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes and the answers to refusals."""
        app.include_router(router)
        app.add_exception_handler(VersionRefusedError, _on_refused_request)
        for error in (DeltaError, NotResidentError, LoadFailedError, TooManyPinsError, SlotsInUseError):
            app.add_exception_handler(error, _on_route_error)

    async def init_state(self, engine_client: EngineClient, state: State, args: Namespace) -> None:
        """Connect the routes to the engine. Fails, and with it the server, if the tuned layers cannot hold versions."""
        assert isinstance(engine_client, AsyncLLM)  # noqa: S101  the one engine of vLLM's server
        turns = Turns(args.max_loras)
        resolver = LoRAResolverRegistry.get_resolver(RESOLVER)
        assert isinstance(resolver, VersionResolver)  # noqa: S101  the plugin has registered it
        residents = ResidentVersions(
            engine_client,
            state.openai_serving_models,
            turns,
            host_slots=args.max_cpu_loras,
            retire=resolver.retire,
        )
        in_turn = turns.in_turn(engine_client.generate, residents)
        engine_client.generate = in_turn  # type: ignore[method-assign,assignment]
        engine_client.add_lora = residents.add_lora  # type: ignore[method-assign]
        state.openai_serving_models.resolve_lora = residents.resolve_lora
        await residents.check_parameters(location_shapes(self._environment.model_dir, self._environment.location))
        state.errata_residents = residents
        state.errata_identity = {
            "fingerprint": self._environment.fingerprint,
            "location": self._environment.location,
            "slots": args.max_loras,
        }


def plugin() -> VersionRoutes:
    """Return the endpoint plugin; named by the `vllm.endpoint_plugins` entry point."""
    return VersionRoutes(NodeEnvironment.read(os.environ))
