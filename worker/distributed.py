"""The processes of one training, as torchrun starts them: which one this is, and how they meet."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed

from worker.training.parallel import Alone, DataParallel, Ranks

_LONGEST_WAIT = timedelta(hours=2)  # for a process that measures what is to be preserved, or loads a model


def rank() -> int:
    """This process's number among those that torchrun started; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def processes() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_device(asked: str | None) -> str | None:
    """What is asked for; of several processes that may use GPUs, each has one of its own."""
    shares = processes() > 1 and asked in (None, "cuda") and torch.cuda.is_available()
    return f"cuda:{os.environ['LOCAL_RANK']}" if shares else asked


@contextmanager
def process_group(device: torch.device) -> Iterator[Ranks]:
    """The processes of a run, connected while it lasts. Of one process there is nothing to connect."""
    if processes() == 1:
        yield Alone()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what NCCL and pinned memory go by
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_LONGEST_WAIT)
    try:
        yield DataParallel()
    finally:
        distributed.destroy_process_group()


@contextmanager
def first_process_first() -> Iterator[None]:
    """In a process group, let the first process be done before the others begin: they find what it kept."""
    together = distributed.is_initialized()
    if together and rank() > 0:
        distributed.barrier()
    yield
    if together and rank() == 0:
        distributed.barrier()
