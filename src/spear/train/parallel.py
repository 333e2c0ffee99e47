"""Data parallelism: the same run on several processes, each with its share of every batch.

Started by `torchrun --nproc-per-node N`; alone, every function here is a no-op. A step's batch consists of P
pieces, each with its own random numbers; the gradient is the mean of theirs. N processes take P/N pieces
each, one after the other, so every N that divides P learns the same. On CPUs, one process per core is faster
than one process with as many threads, since small matrices share threads badly.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist

from spear.errors import SpearError

BUCKET = 2**25
"""Numbers per message when gradients are averaged: 128 MiB in float32, which is what it needs of memory
besides."""
CPU = torch.device("cpu")


def start(device: torch.device = CPU) -> None:
    """Join the process group that `torchrun` describes, once; alone: nothing.

    GPUs talk through NCCL. What is on CPUs (checkpoints and barriers, or everything) goes through gloo.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def rank() -> int:
    """Which process this is, from 0; process 0 writes logs and the result."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(total: int, what: str, accumulate: int = 1) -> int:
    """What one piece has of a batch, when each process takes its part of it in `accumulate` pieces.

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
    """The pieces (and their random numbers) that are this process's at a step: `accumulate` of them, in a
    row.

    N processes and one that accumulates N take the same ones, and so learn the same.
    """
    first = (step * world() + rank()) * accumulate
    return range(first, first + accumulate)


def average(values: torch.Tensor) -> torch.Tensor:
    """The mean over the processes of a tensor that all of them have; in place."""
    if world() > 1:
        dist.all_reduce(values)
        values /= world()
    return values


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes. What no process has a gradient of keeps none."""
    learning = list(parameters)
    if world() == 1 or not learning:
        return
    have = torch.tensor([float(p.grad is not None) for p in learning], device=learning[0].device)
    dist.all_reduce(have)
    grads = []
    for parameter, count in zip(learning, have.tolist(), strict=True):
        if count and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad is not None:
            grads.append(parameter.grad)
    for bucket in _buckets(grads):
        flat = average(torch.cat([grad.reshape(-1) for grad in bucket]))
        for grad, mean in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(mean.view_as(grad))


def _buckets(tensors: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The tensors in their order, in groups of about `BUCKET` numbers."""
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(t.numel() for t in bucket) >= BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def wait() -> None:
    """Until all processes are here."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))  # on the CPU, so that it may take longer than NCCL would wait


def lost(error: RuntimeError) -> bool:
    """Whether an error says that another process is gone."""
    return world() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))
