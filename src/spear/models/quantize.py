"""Weights of linear layers in 8 or 4 bits, for inference in less memory.

A quantized weight is an integer times a scale. With 8 bits each row of a weight matrix (each
output) has a scale, with 4 bits each group of `GROUP_SIZE` numbers in a row. The integers are
symmetric around 0. Only large linear layers of the VLM and of the action expert are quantized. The
embeddings, norms, convolutions, and the layers for states and actions stay as they are.

The layers use PyTorch alone. `docs/howto/memory.md` says what was measured, also in comparison with
the library torchao.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from spear.errors import SpearError, check_known

Quantization = Literal["int8", "int8-dynamic", "int4"]
"""How weights are quantized. "int8" and "int4": weights only. "int8-dynamic": weights in 8 bits,
and inputs rounded to 8 bits, too, one scale per token, so that a CPU multiplies integers."""
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)

GROUP_SIZE = 32  # numbers that share a scale at 4 bits (our choice)
MAX_INT8 = 127
MAX_INT4 = 7  # integers -7 … 7 are stored as 1 … 15
INT4_OFFSET = 8
MIN_SCALE = 1e-12  # so that a row of zeros is not divided by 0
MIN_QUANTIZED_ELEMENTS = 2**12  # of a weight; a smaller one stays (our choice)

MAX_FEW_ROWS = 16
"""Up to about this many rows, PyTorch's product of bfloat16 inputs and 8-bit weights is faster than
converting the weights. For 372 rows it takes six times as long (measured on a Xeon with AMX)."""


class QuantizedLinear(nn.Module):
    """A linear layer with a quantized weight, for inference.

    Args:
        layer: The layer, whose weight is quantized and whose bias is kept.
        quantization: How the weight is quantized. A layer whose inputs do not divide into groups
            gets 8 bits instead of 4.

    Attributes:
        quantized: 8 bits: int8 [out, in]. 4 bits: uint8 [out, in / 2], where the lower four bits
            are of the row's first half, and the upper four of its second half.
        scales: [out], or [out, in / GROUP_SIZE] with 4 bits, in the precision of the layer.
        bias: [out], or None.
    """

    def __init__(self, layer: nn.Linear, quantization: Quantization) -> None:
        super().__init__()
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        if layer.in_features % GROUP_SIZE != 0 and quantization == "int4":
            quantization = "int8"
        self.quantization = quantization
        weight = layer.weight.detach()
        if quantization == "int4":
            integers, scales = _quantize_int4(weight)
        else:
            integers, scales = _quantize_int8(weight)
        # Parameters, not buffers: they count as parameters, and keep their type in `.to(dtype)`.
        self.quantized = nn.Parameter(integers, requires_grad=False)
        self.scales = nn.Parameter(scales.to(weight.dtype), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        rows = x.reshape(-1, self.in_features)
        if self.quantization == "int8-dynamic":
            output = self._multiply_rounded_rows(rows)
        elif self.quantization == "int8":
            output = self._multiply_unrounded_rows(rows)
        else:
            output = nn.functional.linear(rows, self._dequantize_int4(rows.dtype))
        if self.bias is not None:
            output = output + self.bias
        return output.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """The layer's sizes and its quantization, for `print(model)`."""
        return f"{self.in_features}, {self.out_features}, {self.quantization}"

    def _multiply_rounded_rows(self, rows: Tensor) -> Tensor:
        """Multiply rows [N, in] by the weight of 8 bits, in integers.

        The rows are rounded to 8 bits for this, with a scale for each row ("int8-dynamic").
        """
        float32_rows = rows.float()
        row_scales = float32_rows.abs().amax(1, keepdim=True).clamp(min=MIN_SCALE) / MAX_INT8
        integer_rows = (float32_rows / row_scales).round().to(torch.int8)
        products = torch._int_mm(integer_rows, self.quantized.t())  # int32
        return (products * row_scales * self.scales.float()).to(rows.dtype)

    def _multiply_unrounded_rows(self, rows: Tensor) -> Tensor:
        """Multiply rows [N, in], which keep their precision, by the weight of 8 bits ("int8")."""
        has_few_rows = len(rows) <= MAX_FEW_ROWS
        if has_few_rows and rows.dtype == torch.bfloat16 and rows.device.type == "cpu":
            return torch._weight_int8pack_mm(rows, self.quantized, self.scales)
        # The scales belong to outputs, so it is enough to multiply the result by them.
        return nn.functional.linear(rows, self.quantized.to(rows.dtype)) * self.scales

    def _dequantize_int4(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [out, in] of a layer with 4 bits."""
        halves = [self.quantized & 15, self.quantized >> 4]
        integers = torch.cat(halves, dim=1).to(dtype) - INT4_OFFSET
        groups = integers.unflatten(1, (-1, GROUP_SIZE))
        return (groups * self.scales[..., None].to(dtype)).flatten(1)


def _quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a weight [out, in] to 8 bits: integers [out, in], scales [out]."""
    float32_weight = weight.float()
    scales = float32_weight.abs().amax(1).clamp(min=MIN_SCALE) / MAX_INT8
    return (float32_weight / scales[:, None]).round().to(torch.int8), scales


def _quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a weight [out, in] to 4 bits; see `QuantizedLinear` for the two results."""
    groups = weight.float().unflatten(1, (-1, GROUP_SIZE))
    scales = groups.abs().amax(-1).clamp(min=MIN_SCALE) / MAX_INT4
    integers = (groups / scales[..., None]).round().flatten(1).to(torch.int8) + INT4_OFFSET
    first_half, second_half = integers.to(torch.uint8).chunk(2, dim=1)
    return first_half | (second_half << 4), scales


def quantize_model(model: Any, quantization: Quantization) -> None:
    """Quantize the large linear layers of a SPEAR-1 or a SPEAR-VLM in place, for inference.

    The model takes no gradients afterwards, and cannot be saved as a checkpoint. The layers are
    quantized one by one, so the memory never has to have room for both forms of all of them.

    Raises:
        SpearError: The quantization is unknown, or the device does not support it.
    """
    check_known("quantization", QUANTIZATIONS, quantization)
    networks = [model.vlm, model.expert] if hasattr(model, "expert") else [model]
    for network in networks:
        for module in network.modules():
            for name, child in module.named_children():
                is_large = isinstance(child, nn.Linear) and (
                    child.weight.numel() >= MIN_QUANTIZED_ELEMENTS
                )
                if is_large:
                    setattr(module, name, QuantizedLinear(child, quantization))


def check_quantization(quantization: Quantization | None, device: torch.device) -> None:
    """Raise `SpearError` if a device cannot compute with quantized weights of this kind."""
    if quantization is None:
        return
    check_known("quantization", QUANTIZATIONS, quantization)
    if quantization == "int8-dynamic" and device.type != "cpu":
        raise SpearError(
            f"int8-dynamic computes on a CPU, not on {device}. Use --quantize int8 there."
        )
    if quantization == "int8-dynamic" and not can_multiply_int8_exactly():
        raise SpearError(
            "int8-dynamic would give wrong actions on this processor, whose products of 8-bit "
            "integers overflow (it has no VNNI instructions). Use --quantize int8."
        )


def can_multiply_int8_exactly() -> bool:
    """Return whether PyTorch's product of 8-bit matrices is right on this processor.

    On x86 processors without VNNI instructions, sums of two products overflow 16 bits and are cut
    off, without an error.
    """
    # A product of two matrices of the largest integers. Each sum has 64 terms of -127².
    first = torch.full((32, 64), 127, dtype=torch.int8, device="cpu")
    second = torch.full((64, 32), -127, dtype=torch.int8, device="cpu")
    product = torch._int_mm(first, second)
    return bool((product == -127 * 127 * 64).all())
