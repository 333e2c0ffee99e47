"""Data parallelism: the same run on several processes, each with its share of every batch.

Started by `torchrun --nproc-per-node N`; alone, every function here is a no-op. A step's batch consists of P
pieces, each with its own random numbers; the gradient is the mean of theirs. N processes take P/N pieces
each, one after the other, so every N that divides P learns the same. The processes hold the whole model each
(DDP), or 1/N of each weight, gradient, moment and average (FSDP2, the second half of this file).
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from spear.errors import SpearError
from spear.util.ledger import difference

BUCKET = 2**25
"""Numbers per message when gradients are averaged: 128 MiB of additional memory in float32."""
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
    """A piece's part of a batch, for `accumulate` pieces per process. Raises `SpearError` if it is uneven."""
    if total % (world() * accumulate):
        among = f"{world() * accumulate} pieces (processes × accumulate)"
        raise SpearError(f"{what} {total} cannot be divided among {among}: use a multiple")
    return total // (world() * accumulate)


def numbers(step: int, accumulate: int = 1) -> range:
    """The pieces (and their random numbers) that are this process's at a step: `accumulate` in a row.

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


def most(*numbers: int) -> list[int]:
    """The largest of each number over the processes."""
    if world() == 1:
        return list(numbers)
    all_of = torch.tensor(numbers)  # on the CPU: no GPU has to be waited for
    dist.all_reduce(all_of, dist.ReduceOp.MAX)
    return [int(number) for number in all_of.tolist()]


def check_alike(given: Mapping[str, Any]) -> None:
    """Raises `SpearError`, on all processes, where one was given something else than process 0: they would
    average the gradients of different models."""
    if world() == 1:
        return
    all_of: list[Any] = [{}] * world()
    dist.all_gather_object(all_of, dict(given))
    for number, own in enumerate(all_of):
        if apart := difference(all_of[0], own):
            which = f"process {number} (here) is of another run than process 0 (there)"
            raise SpearError(f"{which}: {apart}: give all the same command, data and checkpoints")


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes. What no process has a gradient of keeps none."""
    learning = list(parameters)
    if world() == 1 or not learning:
        return
    have = torch.tensor([float(p.grad is not None) for p in learning], device=learning[0].device)
    dist.all_reduce(have)
    for parameter, count in zip(learning, have.tolist(), strict=True):
        if count and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    grads = [parameter.grad for parameter in learning if parameter.grad is not None]
    while grads:
        bucket, size = [], 0
        while grads and size < BUCKET:
            bucket.append(grads.pop(0))
            size += bucket[-1].numel()
        flat = average(torch.cat([grad.reshape(-1) for grad in bucket]))
        for grad, mean in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(mean.view_as(grad))


def wait() -> None:
    """Until all processes are here."""
    if dist.is_initialized():
        dist.all_reduce(
            torch.zeros(1)
        )  # on the CPU, so that it may take longer than NCCL would wait


def lost(error: RuntimeError) -> bool:
    """Whether an error says that another process is gone, which may be one that makes batches."""
    distant = world() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))
    return distant or str(error).startswith("DataLoader worker")


def shard(model: nn.Module, device: torch.device, lower: bool) -> None:
    """Shard `model` over all processes, in place, on `device`: a group per transformer layer and one more.

    lower: layers compute in bfloat16 and, on GPUs, are gathered in it; masters and gradients stay float32. A
    step gathers each layer once and keeps it for the backward pass: the language model's keys and values
    leave their layer through a cache, past FSDP's hooks. Raises `SpearError` for single numbers.
    """
    if single := [name for name, parameter in model.named_parameters() if parameter.ndim == 0]:
        raise SpearError(
            f"parameter {single[0]}: a single number, never sharded: use --parallel ddp"
        )
    processes = init_device_mesh(device.type, (world(),))
    whole = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    gathered = torch.bfloat16 if lower and device.type != "cpu" else None
    layer = MixedPrecisionPolicy(gathered, torch.float32, cast_forward_inputs=False)
    for module in list(model.modules()):
        if isinstance(module, GradientCheckpointingLayer):
            fully_shard(module, mesh=processes, mp_policy=layer, reshard_after_forward=False)
    fully_shard(model, mesh=processes, mp_policy=whole, reshard_after_forward=False)
    model.set_reshard_after_backward(False)  # type: ignore[operator]


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was done to a model, or to one that it is part of."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def release(model: nn.Module) -> None:
    """Give back what was gathered for a step, so that the next one sees the new weights."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def distribute(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`tensor` where `like` is: on its device, and sharded as it is."""
    tensor = tensor.to(like.device)
    if isinstance(like, DTensor):
        return distribute_tensor(tensor, like.device_mesh, like.placements)
    return tensor


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be sharded; every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def unshard(model: nn.Module) -> None:
    """Make a plain model again, on the CPU, in place: whole on process 0, without contents on the others."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = full(parameter.detach())
            value = value.cpu() if rank() == 0 else value.to("meta")
            module.register_parameter(
                name, nn.Parameter(value, requires_grad=parameter.requires_grad)
            )
        if isinstance(module, FSDPModule):
            kind: Any = type(module)
            module.__class__ = kind.__bases__[1]  # FSDP had put a class of its own before it
