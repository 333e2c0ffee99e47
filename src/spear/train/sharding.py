"""FSDP2: every process keeps 1/N of each weight, gradient, moment and average, and borrows the rest while it
works.

One group per transformer layer, and one for what is left. On GPUs layers are gathered in bfloat16 where the
computation is in bfloat16; masters, gradients and what is reduced stay float32. A step gathers each layer
once and keeps it for the way back: the language model's keys and values leave their layer through a cache,
past the hooks by which FSDP would know that the layer is needed again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from spear.errors import SpearError


def mesh(kind: str) -> DeviceMesh:
    """All processes in a row. kind: "cpu" or "cuda"."""
    return init_device_mesh(kind, (dist.get_world_size(),))


def shard(model: nn.Module, device: torch.device, lower: bool) -> None:
    """Shard `model` over all processes, in place, on `device`.

    lower: layers compute in bfloat16, and are gathered in it. (On a CPU they are gathered as they are, and
        autocast has
    the rest to do: its layer norms want their weights in the precision of their input.)
    Raises `SpearError` for a model with parameters that have no dimension.
    """
    single = [name for name, parameter in model.named_parameters() if parameter.ndim == 0]
    if single:
        raise SpearError(
            f"parameter {single[0]} is a single number, which cannot be sharded: use --parallel ddp"
        )
    processes = mesh(device.type)
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
    main = dist.get_rank() == 0
    done: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in done:
                value = full(parameter.detach())
                value = value.cpu() if main else value.to("meta")
                done[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            module.register_parameter(name, done[id(parameter)])
        if isinstance(module, FSDPModule):
            kind: Any = type(module)
            module.__class__ = kind.__bases__[1]  # FSDP had put a class of its own before it
