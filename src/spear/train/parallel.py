"""Data parallelism: the same run on several processes, each with its share of every batch.

Started by `torchrun --nproc-per-node N`; alone, every function here is a no-op. Rank r of N takes the batch and the
random numbers number k·N + r at step k, with a batch of 1/N of the recipe's; gradients are averaged. A process that
accumulates gradients over M pieces is M ranks one after the other. On CPUs, one
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


def share(total: int, what: str, accumulate: int = 1) -> int:
    """What this process takes of a batch at a time, when it takes its part of it in `accumulate` pieces.

    Raises `SpearError` when the batch cannot be divided evenly.
    """
    if accumulate < 1:
        raise SpearError(f"accumulate {accumulate}: give 1, or in how many pieces a batch is worked through")
    if total % (world() * accumulate):
        pieces = f" in {accumulate} pieces each (accumulate)" if accumulate > 1 else ""
        raise SpearError(
            f"{what} {total} cannot be divided among {world()} processes{pieces}: use a multiple"
        )
    return total // (world() * accumulate)


def numbers(step: int, accumulate: int = 1) -> range:
    """The batches (and the random numbers) that are this process's at a step: `accumulate` of them, in a row.

    N processes and one that accumulates N take the same ones, and so learn the same.
    """
    first = (step * world() + rank()) * accumulate
    return range(first, first + accumulate)


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
