"""Data parallelism: the same run on several processes, each with its share of every batch.

Started by `torchrun --nproc-per-node N`; alone, every function here is a no-op. Rank r of N takes the batch and the
random numbers number k·N + r at step k, with a batch of 1/N of the recipe's; gradients are averaged. On CPUs, one
process per core is faster than one process with as many threads, since small matrices share threads badly.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist

from spear.errors import SpearError


def start() -> None:
    """Join the process group that `torchrun` describes, once; alone: nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def rank() -> int:
    """Which process this is, from 0; process 0 writes logs and checkpoints."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(total: int, what: str) -> int:
    """This process's part of a batch. Raises `SpearError` when it cannot be divided evenly."""
    if total % world():
        raise SpearError(f"{what} {total} cannot be divided among {world()} processes: use a multiple")
    return total // world()


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes, in one message."""
    if world() == 1:
        return
    learning = list(parameters)
    for parameter in learning:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    grads = [parameter.grad for parameter in learning if parameter.grad is not None]
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    dist.all_reduce(flat)
    flat /= world()
    start = 0
    for grad in grads:
        grad.copy_(flat[start : start + grad.numel()].view_as(grad))
        start += grad.numel()


def wait() -> None:
    """Until all processes are here."""
    if dist.is_initialized():
        dist.barrier()
