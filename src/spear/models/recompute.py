"""Gradient checkpointing: layers keep their input alone, and compute the rest again on the way back.

Transformers' own way drops the keys and values that a layer is to leave for later tokens, and the action
expert lives on those; here they are a result of the layer like any other, and gradients flow through them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from spear.models.cache import KeyValues


def recompute_layers(model: nn.Module, on: bool = True) -> None:
    """Turn gradient checkpointing of all transformer layers in `model` on or off.

    Losses and gradients stay the same, bit for bit on a CPU; a training step runs each layer forward twice.
    Without gradients (`torch.no_grad`) nothing changes.
    """
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            vars(layer).pop("forward", None)
            if on:
                layer.forward = partial(_run, layer.forward)


def recomputes(model: nn.Module) -> bool:
    """Whether gradient checkpointing is on for any layer of `model`."""
    return any("forward" in vars(m) for m in model.modules() if isinstance(m, GradientCheckpointingLayer))


class RecomputesLayers:
    """What makes Transformers' `gradient_checkpointing_enable()` and `…_disable()` of a model do the
    above."""

    def _set_gradient_checkpointing(self, enable: bool = True, *_: Any, **__: Any) -> None:
        assert isinstance(self, nn.Module)
        recompute_layers(self, enable)


def _run(forward: Any, *args: Any, past_key_values: KeyValues | None = None, **kwargs: Any) -> Any:
    """One layer, checkpointed. Its keys and values go into the cache here, once, not when it is run again."""
    if past_key_values is not None:
        kwargs["past_key_values"] = past_key_values
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    if past_key_values is None or past_key_values.frozen:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    def whole(*args: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
        own = KeyValues()
        result = forward(*args, **{**kwargs, "past_key_values": own})
        return result, own.keys[0], own.values[0]

    result, keys, values = checkpoint(whole, *args, use_reentrant=False)
    past_key_values.update(keys, values, len(past_key_values.keys))
    return result
