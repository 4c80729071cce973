from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from celery import Celery
from redis_server import RedisServer
from scripted_node import ScriptedNode, listening
from scripted_worker import ScriptedWorker
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from service.nodes import NodeClient
from service.queue import TaskQueue, create_celery
from service.reconcile import Reconciler
from service.settings import Settings
from service.stores import Stores

if TYPE_CHECKING:
    from training_bench import Bench


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token for each word; the control token has id 0, as in many real vocabularies."""
    tokenizer = Tokenizer(WordLevel({"<|endoftext|>": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def celery(redis_server: RedisServer) -> Iterator[Celery]:
    app = create_celery(Settings(redis_url=redis_server.url))
    yield app
    app.close()


@pytest.fixture
def settings(redis_server: RedisServer, tokenizer_folder: Path, tmp_path: Path) -> Settings:
    return Settings(
        home=tmp_path, redis_url=redis_server.url, model=str(tokenizer_folder), retry_wait_s=0, edit_max_tokens=64
    )


@pytest.fixture
def stores(settings: Settings) -> Iterator[Stores]:
    stores = Stores.connect(settings)
    # The broker's bindings stay: a producer declares its queues only once.
    if keys := [key for key in stores.redis.scan_iter() if not key.startswith("_kombu")]:
        stores.redis.delete(*keys)
    yield stores
    stores.redis.close()


@pytest.fixture
def queue(celery: Celery, stores: Stores) -> TaskQueue:
    return TaskQueue(celery, stores.redis)


@pytest.fixture
def node() -> ScriptedNode:
    return ScriptedNode()


@pytest.fixture(scope="module")
def shared_node() -> Iterator[tuple[ScriptedNode, str]]:
    """A node and where it listens, for a service that the tests of a module share."""
    node = ScriptedNode()
    with listening(node) as address:
        yield node, address


@pytest.fixture
def api(base_url: str, stores: Stores) -> Iterator[httpx.Client]:
    """A client of the service that the module's own `base_url` names, over an empty Redis."""
    with httpx.Client(base_url=base_url, timeout=15) as client:
        yield client


@pytest.fixture
def worker(stores: Stores, node: ScriptedNode) -> ScriptedWorker:
    """A worker that has registered version 0."""
    worker = ScriptedWorker(stores, [node])
    worker.register_base()
    return worker


MakeReconciler = Callable[..., Reconciler]


@pytest.fixture
def make_reconciler(stores: Stores, queue: TaskQueue, settings: Settings) -> MakeReconciler:
    """Builds a reconciler over nodes, with settings changed by name."""

    def make(*nodes: NodeClient, **changed: object) -> Reconciler:
        return Reconciler(stores, nodes, queue, settings.model_copy(update=changed))

    return make


@pytest.fixture
def reconciler(make_reconciler: MakeReconciler, node: ScriptedNode) -> Reconciler:
    return make_reconciler(node.client())


@pytest.fixture
def bench(
    stores: Stores, queue: TaskQueue, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> "Bench":
    from training_bench import make_bench  # with it come torch and transformers, which most tests here do without

    return make_bench(stores, queue, settings, tmp_path, monkeypatch)
