"""Linear layers as inference runs them: by oneDNN on a CPU, several as one, packed where they are read often.

What is worked out of a network's weights is kept by `ModuleCache` until they change.
"""

import ctypes
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeGuard, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

Value = TypeVar("Value")
Places = list[tuple[dict[str, Any], str]]
LayerEvents = list[torch.Event] | None

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
HAS_BFLOAT16: bool = _ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""Whether this CPU computes in bfloat16. With AVX2 alone oneDNN refuses, and PyTorch is many times slower."""
_DTYPES = (torch.float32, torch.bfloat16) if HAS_BFLOAT16 else (torch.float32,)
MAX_CACHED_ELEMENTS = 2**19
"""Weights of fewer elements (2 MB in float32) stay in a core's cache between uses (our choice)."""
_BITS: dict[int, Any] = {1: ctypes.c_int8, 2: ctypes.c_int16, 4: ctypes.c_int32, 8: ctypes.c_int64}
_INFO = Path("/proc/cpuinfo")
CPU_INFO = _INFO.read_text(encoding="utf-8") if _INFO.is_file() else ""
"""What Linux says about the processor."""
# PyTorch gives float32 products on a CPU to MKL, which does not use AMD's AVX-512.
_MKL_IS_FAST = torch.backends.mkl.is_available() and (
    "GenuineIntel" in CPU_INFO or "avx512f" not in CPU_INFO
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, on a CPU by oneDNN where no gradients are wanted.

    [..., in] -> [..., out]. weight: [out, in], or that in oneDNN's own layout. Measured on AMD with AVX-512,
    one thread, against PyTorch's own: 2.1 times as fast for 560 rows and 2,048 × 2,048; for 5 rows and
    1,024 × 4,096 1.6 times, packed 5 times (bfloat16: 1.2, 2.3). On Intel, and on AMD without AVX-512, MKL is
    faster, except for packed weights that no cache holds: `experiments/cpu_matrix_products`.
    """
    if (
        not _ONEDNN
        or x.device.type != "cpu"
        or x.dtype != weight.dtype
        or x.dtype not in _DTYPES
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or (_MKL_IS_FAST and x.dtype == torch.float32 and not weight.is_mkldnn)
        or (
            x.numel() == x.shape[-1] and not weight.is_mkldnn
        )  # one row: nothing to gain from a layout
    ):
        return nn.functional.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


_BRANCHES: dict[torch.device, list[torch.cuda.Stream]] = {}


def run_in_parallel_streams(works: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
    """Results of works none of which needs another's. A CUDA graph that is being recorded runs them at once:
    one image's layers leave most of a GPU idle."""
    if not is_capturing_graph():
        return [work() for work in works]
    here = torch.cuda.current_stream()
    streams = _branches(here.device, len(works) - 1)
    results = []
    for work, stream in zip(works[1:], streams, strict=True):
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            results.append(work())
    results.insert(0, works[0]())
    for stream in streams:
        here.wait_stream(stream)
    return results


@contextmanager
def parallel_branch(events: LayerEvents) -> Iterator[None]:
    """In a CUDA graph that is being recorded, what is done here runs beside what this stream was given after
    the first of some events; then the stream waits for it. With None it is done as ever."""
    if events is None:
        yield
        return
    here = torch.cuda.current_stream()
    (stream,) = _branches(here.device, 1)
    stream.wait_event(events[0])
    with torch.cuda.stream(stream):
        yield
    here.wait_stream(stream)


def is_capturing_graph() -> bool:
    """Whether a CUDA graph is being recorded."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _branches(device: torch.device, count: int) -> list[torch.cuda.Stream]:
    """Always the same: cuBLAS keeps room for each."""
    streams = _BRANCHES.setdefault(device, [])
    streams += [torch.cuda.Stream(device) for _ in range(count - len(streams))]
    return streams[:count]


class FastLinear(nn.Linear):
    """A linear layer that computes by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return linear(x, self.weight, self.bias)


def is_plain_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer is linear and no more: no forward and no hook of a user's belongs to it. (Of hooks on
    whole blocks, which run as one here, nobody knows.)"""
    own = type(layer).forward in (nn.Linear.forward, FastLinear.forward) and "forward" not in vars(
        layer
    )
    return own and not layer._forward_hooks and not layer._forward_pre_hooks


def use_fast_linear(model: nn.Module) -> None:
    """Make every linear layer in `model` a `FastLinear`, in place: the same weights under the same names."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FastLinear


class FusedLinear:
    """Linear layers that read the same input, as one, for inference.

    On a GPU their weights become parts of one tensor, and stay the layers' own. On a CPU that gains nothing,
    unless `packed`: then this keeps a copy of them, in oneDNN's own layout, for layers that have few rows and
    run often. Layers that are not plain (a LoRA's), and fake tensors, run one by one.
    """

    def __init__(self, *layers: nn.Module, packed: bool = False) -> None:
        self.layers = layers
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        plain = [layer for layer in layers if is_plain_linear(layer)]
        kinds = {(m.weight.dtype, m.weight.device, m.bias is None) for m in plain}
        if len(plain) < len(layers) or len(kinds) > 1:
            return
        weights = [m.weight for m in plain]
        first = weights[0]
        if isinstance(first, FakeTensor):
            if len(weights) > 1:
                torch.cat(weights)  # memory is planned: while weights are moved, they exist twice
            return
        if first.device.type != "cpu":
            self.weight = _share_storage(weights)
            self.bias = None if plain[0].bias is None else _share_storage([m.bias for m in plain])
        elif packed and _ONEDNN and first.dtype in _DTYPES:
            whole = torch.cat(weights) if len(weights) > 1 else first.contiguous()
            self.weight = torch.ops.mkldnn._reorder_linear_weight(whole, None)
            self.bias = None if plain[0].bias is None else torch.cat([m.bias for m in plain])
        else:
            return
        self.sizes = [m.out_features for m in plain]

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """[..., in] -> each layer's output, [..., out]."""
        if self.weight is None:
            return [layer(x) for layer in self.layers]
        return self.concatenated(x).split(self.sizes, dim=-1)

    def concatenated(self, x: Tensor) -> Tensor:
        """[..., in] -> all layers' outputs side by side, [..., sum of out]."""
        if self.weight is None:
            return torch.cat([layer(x) for layer in self.layers], dim=-1)
        return linear(x, self.weight, self.bias)


def _share_storage(weights: Sequence[Tensor]) -> Tensor:
    """All weights [out, in], or biases [out], in one tensor, of which they become parts (if not already)."""
    first, place = weights[0], weights[0].data_ptr()
    apart = False
    for weight in weights:
        apart |= weight.data_ptr() != place or not weight.is_contiguous()
        apart |= weight.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        place += weight.numel() * weight.element_size()
    rows = sum(weight.shape[0] for weight in weights)
    if not apart:
        return first.detach().as_strided((rows, *first.shape[1:]), first.stride())
    whole = torch.cat([weight.detach() for weight in weights])
    for weight, part in zip(weights, whole.split([w.shape[0] for w in weights]), strict=True):
        weight.data = part
    return whole


class ModuleCache(Generic[Value]):
    """`make(module, *options)`, kept while the module lives and its weights stay what and where they are.

    The result must not refer to the module itself. It is kept beside the module, not in it: copies and
    checkpoints know nothing of it. All weights count, also those that the result does not hold: a CUDA graph
    reads them where they were when it was recorded.
    """

    def __init__(self, make: Callable[..., Value]) -> None:
        self._make = make
        self._kept: WeakKeyDictionary[nn.Module, dict[Hashable, tuple[Places, list[int], Value]]]
        self._kept = WeakKeyDictionary()

    def __call__(self, module: nn.Module, *options: Hashable) -> Value:
        """The result for a module, as its weights are now."""
        kept = self._kept.get(module, {}).get(options)
        if kept is not None and _stamp(kept[0]) == kept[1]:
            return kept[2]
        with torch.inference_mode(False), torch.no_grad():
            value = self._make(module, *options)
        if not any(isinstance(weight, FakeTensor) for weight in module.parameters()):
            places = [
                (parent._modules, name)
                for parent in module.modules()
                for name, child in parent._modules.items()
                if child is not None and child._parameters
            ]
            self._kept.setdefault(module, {})[options] = (places, _stamp(places), value)
        return value


def _stamp(places: Places) -> list[int]:
    """Numbers that change when a layer is replaced, or a weight is replaced, moved or written to: on a CPU,
    where its first number can be seen, also through its `data`, which counts no version."""
    stamp: list[int] = []
    for modules, name in places:
        state = vars(module := modules[name])  # a method of the user's own counts as one more entry
        hooks = len(state["_forward_hooks"]), len(state["_forward_pre_hooks"])
        stamp += (id(module), id(type(module)), len(state), *hooks)
        for weight in state["_parameters"].values():
            if weight is not None:
                version = (
                    0 if weight.is_inference() else weight._version
                )  # those made in inference mode
                stamp += (place := weight.data_ptr(), version)
                if place and weight.is_cpu:
                    stamp.append(_BITS[weight.element_size()].from_address(place).value)
    return stamp
