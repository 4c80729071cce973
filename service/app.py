"""``create_app``: the API, the gateway, and how long their parts live."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING

from fastapi import FastAPI

from service.api import audit, edits, events, health, metrics, runs, versions
from service.api.access import KeyDemand, require_a_key
from service.api.dependencies import Parts, Shared
from service.api.errors import install_error_handlers
from service.api.imports import IMPORT_PATH
from service.api.middleware import BodyLimit, ClientPace, Measured, RequestId, Traced
from service.api.scopes import KEYLESS, document_scopes
from service.draining import stop_announced
from service.ejection import ejections
from service.gateway import router as gateway
from service.gateway.canary import CanaryTraffic
from service.gateway.pool import NodePool
from service.gateway.proxy import Proxy
from service.logs import configure_logging
from service.metrics.process import NodeCollector, ServiceMetrics
from service.metrics.state import PATIENCE_S, StateCollector
from service.nodes import NodeClient
from service.queue import TaskQueue, create_celery
from service.reconcile import Reconciler
from service.registry import VersionReader
from service.settings import Settings
from service.stores import Stores, connect_async
from service.tokens import EditChecker
from service.tracing import configure_tracing

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_LAST_SPANS_MS = 2000


def create_app(settings: Settings | None = None) -> FastAPI:
    """Builds the application; parts that need Redis or the model are made when it starts.

    Args:
        settings: what to run with; None reads the environment.

    Raises:
        ValueError: a setting is unknown or wrong, or traces are to be exported otherwise than by HTTP.
        NoKeyError: it would listen where others can reach it, and there is no API key.
    """
    configure_logging(logging.INFO)
    chosen = settings or Settings.from_env()
    require_a_key(chosen)
    tracing = configure_tracing("service")

    app = FastAPI(
        title="Errata",
        version=version("errata"),
        description="Corrections for a running language model: stored, trained, verified, served, and taken back.",
        lifespan=partial(_parts, chosen=chosen, tracing=tracing),
        redirect_slashes=False,  # the document has no redirects
    )
    app.state.metrics = measured = ServiceMetrics()
    install_error_handlers(app)
    app.add_middleware(BodyLimit, max_bytes=chosen.body_max_bytes, streamed=frozenset({IMPORT_PATH}), unread=KEYLESS)
    app.add_middleware(ClientPace, timeout_s=chosen.client_timeout_s)
    app.add_middleware(KeyDemand, settings=chosen)
    app.add_middleware(Measured, metrics=measured)
    app.add_middleware(RequestId)
    if tracing:
        app.add_middleware(Traced)
    for part in (edits, versions, runs, events, audit, health, metrics, gateway):
        app.include_router(part.router)
    document_scopes(app)
    return app


@asynccontextmanager
async def _parts(app: FastAPI, chosen: Settings, tracing: "TracerProvider | None") -> AsyncIterator[None]:
    """The application's parts, from its start to its stop."""
    stores = Stores.connect(chosen)
    async_redis, followers = connect_async(chosen), connect_async(chosen)
    queue = TaskQueue(create_celery(chosen), stores.redis)
    pool = NodePool(
        chosen.nodes,
        token=chosen.node_token.get_secret_value(),
        timeout_s=chosen.node_timeout_s,
        ejected=lambda: ejections(stores.redis),
    )
    await pool.start()
    app.state.proxy = Proxy(pool, max_answers=chosen.gateway_max_answers)
    app.state.canary = traffic = CanaryTraffic(stores.canaries, share=chosen.canary_share, keys=chosen.canary_keys)
    await traffic.start()
    # On a connection of its own: a scrape or a probe would rather do without Redis than wait for it.
    watched = Stores.connect(chosen, patience_s=PATIENCE_S, retries=0)
    app.state.metrics.registry.register(StateCollector(watched))
    app.state.metrics.registry.register(NodeCollector(pool.readiness))
    with stop_announced() as stopping:
        reconciler = Reconciler(stores, NodeClient.all(chosen), queue, chosen)
        app.state.parts = Parts(
            settings=chosen,
            stores=stores,
            versions=VersionReader(async_redis),
            reconciler=reconciler,
            pull=Shared(reconciler.pull),
            health=Shared(partial(health.look, watched, pool)),
            checker=EditChecker.load(chosen.model, max_tokens=chosen.edit_max_tokens),
            async_redis=async_redis,
            followers=followers,
            stopping=stopping,
        )
        yield
    await pool.stop()
    await traffic.stop()
    await async_redis.aclose()
    await followers.aclose()
    watched.redis.close()
    stores.redis.close()
    if tracing:
        # The server ends by the signal that stops it, which nothing in Python outlives.
        await asyncio.to_thread(tracing.force_flush, _LAST_SPANS_MS)
