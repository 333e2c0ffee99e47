"""Linear layers as inference runs them: by oneDNN on a CPU, several as one, packed where they are read
often."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
HAS_BFLOAT16: bool = _ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""Whether this CPU computes in bfloat16. One with AVX2 alone does not: oneDNN refuses, PyTorch is many times
slower."""
_DTYPES = (torch.float32, torch.bfloat16) if HAS_BFLOAT16 else (torch.float32,)
_CACHED = 2**19
"""Weights of fewer elements (2 MB in float32) stay in a core's cache between uses (our choice)."""


def _on_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


_MKL_IS_FAST = torch.backends.mkl.is_available() and _on_intel()
"""Whether MKL, to which PyTorch gives float32 products on a CPU, knows this one: it does not use all of
AMD's."""


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear`; on a CPU by oneDNN, where no gradients are wanted. [..., in] -> [...,
    out].

    weight: [out, in], or that in oneDNN's own layout. PyTorch gives float32 products on a CPU to MKL, which
        on AMD's
    processors leaves half of the vector units idle. Measured there, one thread, against PyTorch's own: 2.1
    times as fast for 560 rows and 2,048 × 2,048; for 5 rows and 1,024 × 4,096 1.6 times, packed 5 times
    (bfloat16: 1.2, 2.3). On Intel's MKL is the faster one, but for packed weights that no cache holds:
    `benchmarks/models/products.py`.
    """
    if (
        not _ONEDNN
        or x.device.type != "cpu"
        or x.dtype != weight.dtype
        or x.dtype not in _DTYPES
        or (_MKL_IS_FAST and x.dtype == torch.float32 and not weight.is_mkldnn)
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or (x.numel() == x.shape[-1] and not weight.is_mkldnn)  # one row: nothing to gain from a layout
    ):
        return nn.functional.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class FastLinear(nn.Linear):
    """A linear layer that computes by `linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        return linear(x, self.weight, self.bias)


def use_fast_linear(model: nn.Module) -> None:
    """Make every linear layer in `model` a `FastLinear`, in place: the same weights under the same names."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FastLinear


class Fused:
    """Linear layers that read the same input, as one, for inference.

    On a GPU their weights become parts of one tensor, which takes no memory: they stay the layers' own, are
    trained and saved as before. On a CPU that gains nothing, unless `packed`: then this keeps a copy of them,
    in oneDNN's own layout where that is faster, for layers that have few rows and run often. Layers that are
    not plain (a LoRA's) run one by one, and so do fake tensors, on which memory is planned: these only take
    what the real ones would (`_plan`).
    """

    def __init__(self, *layers: nn.Module, packed: bool = False) -> None:
        self.layers = layers
        self.weight: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        self.planned: torch.Tensor | None = None
        plain = [layer for layer in layers if isinstance(layer, nn.Linear)]
        first = plain[0].weight if plain else None
        alike = first is not None and all(
            (m.weight.dtype, m.weight.device, m.bias is None)
            == (first.dtype, first.device, plain[0].bias is None)
            for m in plain
        )
        if first is None or not alike or len(plain) < len(layers):
            return
        if isinstance(first, FakeTensor):
            self.planned = _plan([m.weight for m in plain], packed)
            return
        if first.device.type == "cpu":
            if not packed or not _ONEDNN or first.dtype not in _DTYPES:
                return
            whole = torch.cat([m.weight for m in plain]) if len(plain) > 1 else first.contiguous()
            self.weight = (
                torch.ops.mkldnn._reorder_linear_weight(whole, None)
                if _own_layout(whole)
                else whole.T.contiguous().T  # for few rows MKL reads [in, out] the faster: 5 to 8 rows, 0.8 of the time
            )
        else:
            self.weight = _share_storage([m.weight for m in plain])
        if plain[0].bias is not None:
            self.bias = torch.cat([m.bias for m in plain])
        self.sizes = [m.out_features for m in plain]

    def __call__(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """[..., in] -> what each layer says, [..., out]."""
        if self.weight is None:
            return [layer(x) for layer in self.layers]
        together = self.whole(x)
        return (together,) if len(self.sizes) == 1 else together.split(self.sizes, dim=-1)

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> what all layers say, one after the other, [..., sum of out]."""
        if self.weight is None:
            return torch.cat([layer(x) for layer in self.layers], dim=-1)
        return linear(x, self.weight, self.bias)


def _own_layout(weight: torch.Tensor) -> bool:
    """Whether oneDNN's layout is the faster one for few rows."""
    return not (_MKL_IS_FAST and weight.dtype == torch.float32 and weight.numel() < _CACHED)


def _plan(weights: Sequence[torch.Tensor], packed: bool) -> torch.Tensor | None:
    """Take, of memory that is planned, what `Fused` takes: a copy to keep where it packs, else one for a
    moment.

    Where oneDNN is switched off (`torch.backends.mkldnn`) a GPU is planned: there weights are moved, not
    copied, but while they are, old and new ones exist.
    """
    if torch.backends.mkldnn.enabled:
        if not packed or not _ONEDNN or weights[0].dtype not in _DTYPES:
            return None
        whole = torch.cat(list(weights)) if len(weights) > 1 else weights[0]
        return torch.empty_like(whole)
    if len(weights) > 1:
        torch.cat(list(weights))
    return None


def _share_storage(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """All weights [out, in] in one tensor, which they become parts of (unless they are already)."""
    first, place = weights[0], weights[0].data_ptr()
    apart = False
    for weight in weights:
        apart |= weight.data_ptr() != place or not weight.is_contiguous()
        apart |= weight.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        place += weight.numel() * weight.element_size()
    rows = sum(weight.shape[0] for weight in weights)
    if not apart:
        return first.detach().as_strided((rows, first.shape[1]), (first.shape[1], 1))
    whole = torch.cat([weight.detach() for weight in weights])
    start = 0
    for weight in weights:
        weight.data = whole[start : start + weight.shape[0]]
        start += weight.shape[0]
    return whole
