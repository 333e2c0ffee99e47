"""Data parallelism: the same run on several processes, each with its part of every batch.

`torchrun --nproc-per-node N` starts the processes; in a single process the functions here have no
effect. A step's batch consists of P pieces, each with its own random numbers, and the step's
gradient is the mean of the pieces' gradients. Each of N processes takes P/N pieces, one after the
other. So the training is the same for every number N that divides P. Each process holds the whole
model (DDP), or 1/N of each weight, gradient, moment and EMA weight (FSDP2, the second half of this
file). In the code the number of processes is PyTorch's "world size", and a process's number, from
0, is its "rank".
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

# Numbers per message in which gradients are averaged; in float32 a message takes 128 MiB.
BUCKET_SIZE = 2**25
CPU = torch.device("cpu")


def join_process_group(device: torch.device = CPU) -> None:
    """Join the process group that `torchrun` describes, unless this process has joined it already.

    GPUs communicate through NCCL. Tensors on CPUs go through gloo. On a GPU machine these are only
    the tensors of checkpoints and barriers.
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


def compute_piece_size(num_items: int, recipe_key: str, accumulate: int = 1) -> int:
    """Return how many items each piece of a batch has.

    Args:
        num_items: number of items in the batch.
        recipe_key: the recipe key that sets this number, for the error.
        accumulate: number of pieces per process.

    Raises:
        SpearError: if the batch does not divide into equal pieces.
    """
    num_pieces = get_world_size() * accumulate
    if num_items % num_pieces:
        raise SpearError(
            f"{recipe_key} {num_items} cannot be divided among {num_pieces} pieces "
            f"(processes × accumulate). Use a multiple of {num_pieces}."
        )
    return num_items // num_pieces


def get_piece_numbers(step: int, accumulate: int = 1) -> range:
    """Return the numbers, through the whole run, of this process's pieces at a step.

    They are `accumulate` consecutive numbers. A piece's number determines its random numbers. N
    processes with one piece each and one process with N pieces have pieces with the same numbers at
    every step, so the training is the same.
    """
    first = (step * get_world_size() + get_rank()) * accumulate
    return range(first, first + accumulate)


def average_over_processes_in_place(values: torch.Tensor) -> torch.Tensor:
    """Replace a tensor that all processes have by its mean over the processes, and return it."""
    if get_world_size() > 1:
        dist.all_reduce(values)
        values /= get_world_size()
    return values


def compute_max_over_processes(values: Sequence[int]) -> list[int]:
    """Return, for each of `values`, its maximum over all processes."""
    if get_world_size() == 1:
        return list(values)
    maxima = torch.tensor(values)  # on the CPU, so that the process need not wait for its GPU
    dist.all_reduce(maxima, dist.ReduceOp.MAX)
    return [int(value) for value in maxima.tolist()]


def check_same_settings(settings: Mapping[str, Any]) -> None:
    """Check that all processes have the same settings; otherwise averaged gradients make no sense.

    Raises `SpearError`, on all processes, if a process's settings differ from those of process 0.
    """
    if get_world_size() == 1:
        return
    settings_by_rank: list[Any] = [{}] * get_world_size()
    dist.all_gather_object(settings_by_rank, dict(settings))
    for rank, settings_of_rank in enumerate(settings_by_rank):
        differences = describe_difference(settings_by_rank[0], settings_of_rank)
        if differences:
            raise SpearError(
                f"process {rank} (here) is of another run than process 0 (there), with "
                f"{differences}. Give all processes the same command, data and checkpoints."
            )


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes.

    If a parameter has a gradient in some processes only, the missing gradients count as zero. If it
    has a gradient in no process, it stays without. PyTorch's DDP is not used, because it averages
    during the one backward pass of one forward call. A step here has several forward calls: of the
    policy and of the policy's VLM, each on several pieces.
    """
    trainable = list(parameters)
    if get_world_size() == 1 or not trainable:
        return

    # In how many processes each parameter has a gradient: 1 or 0 here, then the sum over processes.
    num_with_gradient = torch.tensor(
        [float(parameter.grad is not None) for parameter in trainable], device=trainable[0].device
    )
    dist.all_reduce(num_with_gradient)
    for parameter, num_processes in zip(trainable, num_with_gradient.tolist(), strict=True):
        if num_processes > 0 and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)

    # One message averages all gradients of a bucket, side by side in a vector.
    gradients = [parameter.grad for parameter in trainable if parameter.grad is not None]
    for bucket in _group_into_buckets(gradients):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        lengths = [gradient.numel() for gradient in bucket]
        means = average_over_processes_in_place(flat).split(lengths)
        for gradient, mean in zip(bucket, means, strict=True):
            gradient.copy_(mean.view_as(gradient))


def _group_into_buckets(gradients: Sequence[torch.Tensor]) -> Iterable[list[torch.Tensor]]:
    """Group gradients, in order. Each group but the last has at least `BUCKET_SIZE` numbers."""
    bucket: list[torch.Tensor] = []
    bucket_size = 0
    for gradient in gradients:
        bucket.append(gradient)
        bucket_size += gradient.numel()
        if bucket_size >= BUCKET_SIZE:
            yield bucket
            bucket = []
            bucket_size = 0
    if bucket:
        yield bucket


def wait_for_all_processes() -> None:
    """Wait until all processes have reached this call."""
    if dist.is_initialized():
        # The tensor is on the CPU, because gloo waits longer for other processes than NCCL does.
        dist.all_reduce(torch.zeros(1))


def is_process_lost(error: RuntimeError) -> bool:
    """Return whether an error says that another training process or a worker process is gone."""
    is_distributed_error = isinstance(error, dist.DistError) or "gloo" in str(error)
    if get_world_size() > 1 and is_distributed_error:
        return True
    return str(error).startswith("DataLoader worker")


def shard(model: nn.Module, device: torch.device, in_bfloat16: bool) -> None:
    """Shard a model over all processes, in place, on `device`.

    FSDP gathers the weights of a group from all processes when the group computes. Each transformer
    layer is a group of its own, and all other parameters are one more group. A step gathers each
    layer once and keeps the whole weights for the backward pass. FSDP cannot free them after the
    forward pass, because the language model's keys and values leave their layer through a KV cache,
    which FSDP's hooks do not see.

    Args:
        model: the model to shard.
        device: where the shards are stored.
        in_bfloat16: whether layers compute in bfloat16. On GPUs the layers' weights are then also
            gathered in bfloat16. The stored weights and the gradients stay in float32.

    Raises:
        SpearError: for a parameter that is a single number.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0:
            raise SpearError(
                f"parameter {name} is a single number, which cannot be sharded. Use --parallel ddp."
            )

    mesh = init_device_mesh(device.type, (get_world_size(),))
    gathered_dtype = torch.bfloat16 if in_bfloat16 and device.type != "cpu" else None
    layer_policy = MixedPrecisionPolicy(
        param_dtype=gathered_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    model_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in list(model.modules()):
        if isinstance(module, GradientCheckpointingLayer):
            fully_shard(module, mesh=mesh, mp_policy=layer_policy, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, mp_policy=model_policy, reshard_after_forward=False)
    model.set_reshard_after_backward(False)  # type: ignore[operator]


def is_sharded(model: nn.Module) -> bool:
    """Return whether `shard` was applied to `model`, or to a model that contains `model`."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def release_gathered_weights(model: nn.Module) -> None:
    """Free the weights that a step has gathered, so that the next step gathers the new ones."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def distribute_like(tensor: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return `tensor` on the device of `reference`; sharded if `reference` is sharded."""
    tensor = tensor.to(reference.device)
    if isinstance(reference, DTensor):
        return distribute_tensor(tensor, reference.device_mesh, reference.placements)
    return tensor


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole tensor of which `tensor` may be a shard. All processes have to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_on_first_process(model: nn.Module) -> None:
    """Turn a sharded model into a plain model on the CPU, in place.

    Afterwards process 0 has the weights. On the other processes the model's weights are on
    PyTorch's meta device, where they have no contents.
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
            # FSDP had replaced the module's class by a new one with two base classes: FSDPModule,
            # and the original class.
            module.__class__ = sharded_class.__bases__[1]
