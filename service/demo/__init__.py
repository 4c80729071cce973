"""``errata demo``: 20 real corrections, published, verified, rolled back and activated again, with proof."""

from service.demo.script import run_demo

__all__ = ["run_demo"]
