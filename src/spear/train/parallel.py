"""Data parallelism: the same run on several processes, each with its part of every batch.

`torchrun --nproc-per-node N` starts the processes; in a single process every function here does
nothing. A step's batch consists of P pieces, each with its own random numbers, and the gradient is
the mean of the pieces' gradients. N processes take P/N pieces each, one after the other, so every N
that divides P learns the same. Each process holds the whole model (DDP), or 1/N of each weight,
gradient, moment and EMA weight (FSDP2, the second half of this file).
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from spear.errors import SpearError
from spear.util.run_settings import describe_difference

BUCKET_SIZE = 2**25  # numbers per message of averaged gradients: 128 MiB more memory in float32
CPU = torch.device("cpu")


def join_process_group(device: torch.device = CPU) -> None:
    """Join the process group that `torchrun` describes, unless this process has joined it already.

    GPUs communicate through NCCL. Tensors on CPUs (those of checkpoints and barriers, or all of
    them) go through gloo.
    """
    has_other_processes = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if has_other_processes and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def get_rank() -> int:
    """Return this process's number, from 0. Process 0 writes the logs and the result."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def divide_into_pieces(total: int, name: str, accumulate: int = 1) -> int:
    """Return how many of a batch's `total` items are in each piece, with `accumulate` per process.

    Raises `SpearError`, which names the batch by `name`, if the pieces would be unequal.
    """
    num_pieces = get_world_size() * accumulate
    if total % num_pieces:
        raise SpearError(
            f"{name} {total} cannot be divided among {num_pieces} pieces (processes × accumulate). "
            f"Use a multiple of {num_pieces}."
        )
    return total // num_pieces


def get_piece_numbers(step: int, accumulate: int = 1) -> range:
    """Return the numbers of this process's pieces at a step: `accumulate` consecutive ones.

    A piece's number determines its random numbers. N processes with one piece each and one process
    with N pieces take the same numbers, and so learn the same.
    """
    first = (step * get_world_size() + get_rank()) * accumulate
    return range(first, first + accumulate)


def average_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Replace a tensor that all processes have by its mean over the processes, and return it."""
    if get_world_size() > 1:
        dist.all_reduce(values)
        values /= get_world_size()
    return values


def max_over_processes(values: Sequence[int]) -> list[int]:
    """Return the maximum over the processes of each of some numbers."""
    if get_world_size() == 1:
        return list(values)
    maxima = torch.tensor(values)  # on the CPU, so that no GPU has to be waited for
    dist.all_reduce(maxima, dist.ReduceOp.MAX)
    return [int(value) for value in maxima.tolist()]


def check_same_settings(settings: Mapping[str, Any]) -> None:
    """Check that all processes have the same settings, so that their gradients are of one model.

    Raises `SpearError`, on all processes, if the settings of one differ from those of process 0.
    """
    if get_world_size() == 1:
        return
    settings_by_rank: list[Any] = [{}] * get_world_size()
    dist.all_gather_object(settings_by_rank, dict(settings))
    for rank, settings_of_rank in enumerate(settings_by_rank):
        differences = describe_difference(settings_by_rank[0], settings_of_rank)
        if differences:
            raise SpearError(
                f"process {rank} (here) is of another run than process 0 (there): {differences}. "
                "Give all processes the same command, data and checkpoints."
            )


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes.

    A parameter without a gradient in some processes counts there as zero; one without a gradient in
    all processes keeps none. PyTorch's DDP is not used because it reduces within one forward call
    per step, whereas a step of ours calls the policy and its VLM, each on several pieces.
    """
    trainable = list(parameters)
    if get_world_size() == 1 or not trainable:
        return

    has_gradient = torch.tensor(
        [float(parameter.grad is not None) for parameter in trainable], device=trainable[0].device
    )
    dist.all_reduce(has_gradient)
    for parameter, num_processes in zip(trainable, has_gradient.tolist(), strict=True):
        if num_processes and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)

    gradients = [parameter.grad for parameter in trainable if parameter.grad is not None]
    for bucket in _fill_buckets(gradients):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        means = average_over_processes(flat).split([gradient.numel() for gradient in bucket])
        for gradient, mean in zip(bucket, means, strict=True):
            gradient.copy_(mean.view_as(gradient))


def _fill_buckets(gradients: Sequence[torch.Tensor]) -> Iterable[list[torch.Tensor]]:
    """Group gradients, in order, so that each group but the last has `BUCKET_SIZE` numbers."""
    bucket: list[torch.Tensor] = []
    size = 0
    for gradient in gradients:
        bucket.append(gradient)
        size += gradient.numel()
        if size >= BUCKET_SIZE:
            yield bucket
            bucket = []
            size = 0
    if bucket:
        yield bucket


def wait_for_all_processes() -> None:
    """Wait until all processes have come to this call."""
    if dist.is_initialized():
        # On the CPU, where it may take longer than NCCL would wait.
        dist.all_reduce(torch.zeros(1))


def is_process_lost(error: RuntimeError) -> bool:
    """Return whether an error says that another process is gone, or one that loads batches."""
    is_distributed_error = isinstance(error, dist.DistError) or "gloo" in str(error)
    if get_world_size() > 1 and is_distributed_error:
        return True
    return str(error).startswith("DataLoader worker")


def shard(model: nn.Module, device: torch.device, in_bfloat16: bool) -> None:
    """Shard a model over all processes, in place, on `device`.

    Each transformer layer is a group of its own, and all other parameters are one more group. With
    `in_bfloat16`, layers compute in bfloat16 and, on GPUs, are gathered in it; the stored weights
    and the gradients stay in float32. A step gathers each layer once and keeps it for the backward
    pass, because the language model's keys and values leave their layer through a KV cache, which
    FSDP's hooks do not see. Raises `SpearError` for a parameter that is a single number.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0:
            raise SpearError(
                f"parameter {name} is a single number, which cannot be sharded. Use --parallel ddp."
            )

    mesh = init_device_mesh(device.type, (get_world_size(),))
    gathered_dtype = torch.bfloat16 if in_bfloat16 and device.type != "cpu" else None
    layer_policy = MixedPrecisionPolicy(gathered_dtype, torch.float32, cast_forward_inputs=False)
    model_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in list(model.modules()):
        if isinstance(module, GradientCheckpointingLayer):
            fully_shard(module, mesh=mesh, mp_policy=layer_policy, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, mp_policy=model_policy, reshard_after_forward=False)
    model.set_reshard_after_backward(False)  # type: ignore[operator]


def is_sharded(model: nn.Module) -> bool:
    """Return whether `shard` was applied to a model, or to a model that it is part of."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def release_gathered_weights(model: nn.Module) -> None:
    """Free the weights that a step has gathered, so that the next step gathers the new ones."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def distribute_like(tensor: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return `tensor` on the device of `reference`, and sharded like it."""
    tensor = tensor.to(reference.device)
    if isinstance(reference, DTensor):
        return distribute_tensor(tensor, reference.device_mesh, reference.placements)
    return tensor


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole of a tensor that may be sharded; all processes have to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def unshard(model: nn.Module) -> None:
    """Turn a sharded model into a plain model on the CPU, in place.

    Process 0 has the weights then; on the other processes they are without contents.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            weight = gather(parameter.detach())
            weight = weight.cpu() if get_rank() == 0 else weight.to("meta")
            module.register_parameter(
                name, nn.Parameter(weight, requires_grad=parameter.requires_grad)
            )
        if isinstance(module, FSDPModule):
            sharded_class: Any = type(module)
            # FSDP made a subclass of FSDPModule and the module's own class.
            module.__class__ = sharded_class.__bases__[1]
