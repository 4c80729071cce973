"""``create_app``: the API, the gateway, and how long their parts live."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from redis.asyncio import Redis as AsyncRedis

from service.api import audit, edits, events, health, runs, versions
from service.api.access import KeyDemand, require_a_key
from service.api.dependencies import Parts
from service.api.errors import install_error_handlers
from service.api.middleware import BodyLimit, RequestId
from service.api.scopes import document_scopes
from service.events import BLOCK_S
from service.gateway import router as gateway
from service.gateway.proxy import Proxy
from service.logs import configure_logging
from service.nodes import NodeClient
from service.queue import TaskQueue, create_celery
from service.reconcile import Reconciler
from service.settings import Settings
from service.stores import Stores
from service.tokens import EditChecker

_MAX_WAITING = 4096


def create_app(settings: Settings | None = None) -> FastAPI:
    """Builds the application; parts that need Redis or the model are made when it starts.

    Args:
        settings: what to run with; None reads the environment.

    Raises:
        ValueError: a setting is unknown or wrong.
        NoKeyError: it would listen where others can reach it, and there is no API key.
    """
    configure_logging(logging.INFO)
    chosen = settings or Settings.from_env()
    require_a_key(chosen)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        stores = Stores.connect(chosen)
        # Everyone who waits for an event holds a connection.
        async_redis = AsyncRedis.from_url(
            chosen.redis_url, decode_responses=True, socket_timeout=BLOCK_S * 3, max_connections=_MAX_WAITING
        )
        queue = TaskQueue(create_celery(chosen), stores.redis)
        app.state.parts = Parts(
            settings=chosen,
            stores=stores,
            reconciler=Reconciler(stores, NodeClient.all(chosen), queue, chosen),
            checker=EditChecker.load(chosen.model, max_tokens=chosen.edit_max_tokens),
            async_redis=async_redis,
        )
        app.state.proxy = Proxy.of(chosen)
        await app.state.proxy.start()
        yield
        await app.state.proxy.stop()
        await async_redis.aclose()
        stores.redis.close()

    app = FastAPI(
        title="Errata",
        version=version("errata"),
        description="Corrections for a running language model: stored, trained, verified, served, and taken back.",
        lifespan=lifespan,
    )
    install_error_handlers(app)
    app.add_middleware(BodyLimit, max_bytes=chosen.body_max_bytes, streamed=frozenset({edits.IMPORT_PATH}))
    app.add_middleware(KeyDemand, settings=chosen)
    app.add_middleware(RequestId)
    for router in (
        edits.router,
        versions.router,
        runs.router,
        events.router,
        audit.router,
        health.router,
        gateway.router,
    ):
        app.include_router(router)
    document_scopes(app)
    return app
