"""A stack that cannot start says why, soon, and leaves nothing running."""

import socket
from pathlib import Path

import pytest
from running_stack import RunningStack

pytestmark = pytest.mark.timeout(180)


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    stack = RunningStack(tmp_path, {"ERRATA_MODEL": str(tmp_path / "nothing")})
    done = stack.errata("up", "--detach")
    assert (done.returncode, stack.stack.processes()) == (1, [])
    assert done.stderr.startswith(f"errata: ERRATA_MODEL: there is no folder {tmp_path / 'nothing'}")


def test_a_location_that_is_not_there_is_named(default_model: Path, tmp_path: Path) -> None:
    stack = RunningStack(tmp_path, {"ERRATA_LOCATION": "model.layers.2.mlp.nothing"})
    done = stack.errata("up", "--detach")
    assert (done.returncode, stack.stack.processes()) == (1, [])
    assert "model.layers.2.mlp.nothing" in done.stderr


def test_a_port_that_is_taken_is_named(default_model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        stack = RunningStack(tmp_path)
        done = stack.errata("up", "--detach", "--port", str(port))
    assert (done.returncode, stack.stack.processes()) == (1, [])
    assert f"port {port}" in done.stderr


def test_nodes_elsewhere_need_their_token(tmp_path: Path) -> None:
    done = RunningStack(tmp_path, {"ERRATA_NODES": "http://127.0.0.1:1"}).errata("up", "--detach")
    assert done.returncode == 1
    assert "ERRATA_NODE_TOKEN" in done.stderr
