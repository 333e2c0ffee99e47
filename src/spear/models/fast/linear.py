"""Linear layers for inference: by oneDNN on a CPU, several as one, packed where they are read
often.

`ModuleCache` keeps what is computed from a network's weights until these change.
"""

import ctypes
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeGuard, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

Value = TypeVar("Value")

LayerEvents = list[torch.Event] | None
"""An event per layer, by which one CUDA stream waits for another; None where nobody waits."""

MAX_CACHED_ELEMENTS = 2**19
"""Weights with fewer elements (2 MB in float32) stay in a core's cache between uses (our
choice)."""

_CPU_INFO_FILE = Path("/proc/cpuinfo")
CPU_INFO = _CPU_INFO_FILE.read_text(encoding="utf-8") if _CPU_INFO_FILE.is_file() else ""
"""What Linux says about the processor."""

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)
HAS_BFLOAT16: bool = _HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""Whether this CPU computes in bfloat16. With AVX2 alone oneDNN refuses, and PyTorch is many times
slower."""
_ONEDNN_DTYPES = (torch.float32, torch.bfloat16) if HAS_BFLOAT16 else (torch.float32,)

# PyTorch gives float32 products on a CPU to MKL, which does not use AMD's AVX-512.
_IS_INTEL = "GenuineIntel" in CPU_INFO
_IS_MKL_FAST = torch.backends.mkl.is_available() and (_IS_INTEL or "avx512f" not in CPU_INFO)

_INTEGER_OF_SIZE: dict[int, Any] = {
    1: ctypes.c_int8,
    2: ctypes.c_int16,
    4: ctypes.c_int32,
    8: ctypes.c_int64,
}
"""Bytes per element -> the C type by which `_stamp_weights` reads an element's bits."""


# --- Products ---


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x Wᵀ + b like `torch.nn.functional.linear`, by oneDNN where that is faster on a CPU.

    Measured on AMD with AVX-512, one thread, against PyTorch's own: 2.1 times as fast for 560 rows
    and 2,048 × 2,048; for 5 rows and 1,024 × 4,096 1.6 times, packed 5 times (bfloat16: 1.2, 2.3).
    On Intel, and on AMD without AVX-512, MKL is faster, except for packed weights that no cache
    holds: `experiments/cpu_matrix_products`.

    Args:
        x: [..., in].
        weight: [out, in], or the same in oneDNN's own layout (packed).
        bias: [out], or None.

    Returns:
        [..., out].
    """
    if _should_use_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return nn.functional.linear(x, weight, bias)


def _should_use_onednn(x: Tensor, weight: Tensor) -> bool:
    if not _HAS_ONEDNN or x.device.type != "cpu":
        return False
    if x.dtype != weight.dtype or x.dtype not in _ONEDNN_DTYPES:
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if weight.is_mkldnn:
        return True
    # Plain weights: MKL may be as fast, and for a single row no layout gains anything.
    is_one_row = x.numel() == x.shape[-1]
    is_for_mkl = _IS_MKL_FAST and x.dtype == torch.float32
    return not is_one_row and not is_for_mkl


class FastLinear(nn.Linear):
    """A linear layer that computes by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return linear(x, self.weight, self.bias)


def use_fast_linear(model: nn.Module) -> None:
    """Make every linear layer in `model` a `FastLinear`, in place, with the same weights and
    names."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FastLinear


def is_plain_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether a layer is linear and no more: it has no forward and no hook of a user's.

    Hooks on whole blocks, which run as one here, are not noticed.
    """
    has_known_forward = type(layer).forward in (nn.Linear.forward, FastLinear.forward)
    if not has_known_forward or "forward" in vars(layer):
        return False
    return not layer._forward_hooks and not layer._forward_pre_hooks


class FusedLinear:
    """Linear layers that read the same input, computed as one product, for inference.

    On a GPU their weights become parts of one tensor, and stay the layers' own. On a CPU that gains
    nothing, unless `packed`: then this keeps a copy of the weights in oneDNN's own layout, for
    layers that have few rows and run often. Layers that are not plain (a LoRA's), and fake tensors,
    run one by one; `weight` is None then.
    """

    def __init__(self, *layers: nn.Module, packed: bool = False) -> None:
        self.layers = layers
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        plain_layers = [layer for layer in layers if is_plain_linear(layer)]
        kinds = {
            (layer.weight.dtype, layer.weight.device, layer.bias is None) for layer in plain_layers
        }
        if len(plain_layers) < len(layers) or len(kinds) > 1:
            return

        weights = [layer.weight for layer in plain_layers]
        first = weights[0]
        if isinstance(first, FakeTensor):
            if len(weights) > 1:
                # Memory is being planned: while weights are moved, they exist twice.
                torch.cat(weights)
            return

        has_bias = plain_layers[0].bias is not None
        if first.device.type != "cpu":
            self.weight = _share_storage(weights)
            if has_bias:
                self.bias = _share_storage([layer.bias for layer in plain_layers])
        elif packed and _HAS_ONEDNN and first.dtype in _ONEDNN_DTYPES:
            joint_weight = torch.cat(weights) if len(weights) > 1 else first.contiguous()
            self.weight = torch.ops.mkldnn._reorder_linear_weight(joint_weight, None)
            if has_bias:
                self.bias = torch.cat([layer.bias for layer in plain_layers])
        else:
            return
        self._out_sizes = [layer.out_features for layer in plain_layers]

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """[..., in] -> each layer's output, [..., out]."""
        if self.weight is None:
            return [layer(x) for layer in self.layers]
        return self.concatenated(x).split(self._out_sizes, dim=-1)

    def concatenated(self, x: Tensor) -> Tensor:
        """[..., in] -> all layers' outputs side by side, [..., sum of out]."""
        if self.weight is None:
            return torch.cat([layer(x) for layer in self.layers], dim=-1)
        return linear(x, self.weight, self.bias)


def _share_storage(weights: Sequence[Tensor]) -> Tensor:
    """Return all weights [out, in], or biases [out], as one tensor, of which they become views.

    Where they are already, nothing is copied.
    """
    first = weights[0]
    num_rows = sum(weight.shape[0] for weight in weights)
    if _are_consecutive(weights):
        return first.detach().as_strided((num_rows, *first.shape[1:]), first.stride())

    joint_weight = torch.cat([weight.detach() for weight in weights])
    row_blocks = joint_weight.split([weight.shape[0] for weight in weights])
    for weight, row_block in zip(weights, row_blocks, strict=True):
        weight.data = row_block
    return joint_weight


def _are_consecutive(weights: Sequence[Tensor]) -> bool:
    """Return whether the weights lie in one storage, one directly behind the other."""
    storage = weights[0].untyped_storage().data_ptr()
    address = weights[0].data_ptr()
    for weight in weights:
        if weight.data_ptr() != address or not weight.is_contiguous():
            return False
        if weight.untyped_storage().data_ptr() != storage:
            return False
        address += weight.numel() * weight.element_size()
    return True


# --- Streams of a GPU ---

_SIDE_STREAMS: dict[torch.device, list[torch.cuda.Stream]] = {}


def is_capturing_graph() -> bool:
    """Return whether a CUDA graph is being recorded."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def run_in_parallel_streams(functions: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
    """Return the results of functions none of which needs another's result.

    A CUDA graph that is being recorded will run them at once, because one image's layers leave most
    of a GPU idle. Otherwise they run one after the other.
    """
    if not is_capturing_graph():
        return [function() for function in functions]

    main_stream = torch.cuda.current_stream()
    side_streams = _get_side_streams(main_stream.device, len(functions) - 1)
    side_results = []
    for function, stream in zip(functions[1:], side_streams, strict=True):
        stream.wait_stream(main_stream)
        with torch.cuda.stream(stream):
            side_results.append(function())
    main_result = functions[0]()
    for stream in side_streams:
        main_stream.wait_stream(stream)
    return [main_result, *side_results]


@contextmanager
def parallel_branch(events: LayerEvents) -> Iterator[None]:
    """Run the block beside what the current stream was given after the first of these events.

    This works in a CUDA graph that is being recorded; at the end of the block the current stream
    waits for it. With None the block runs in turn.
    """
    if events is None:
        yield
        return
    main_stream = torch.cuda.current_stream()
    (side_stream,) = _get_side_streams(main_stream.device, 1)
    side_stream.wait_event(events[0])
    with torch.cuda.stream(side_stream):
        yield
    main_stream.wait_stream(side_stream)


def _get_side_streams(device: torch.device, count: int) -> list[torch.cuda.Stream]:
    """Return `count` streams of a GPU, always the same ones: cuBLAS keeps memory for each."""
    streams = _SIDE_STREAMS.setdefault(device, [])
    while len(streams) < count:
        streams.append(torch.cuda.Stream(device))
    return streams[:count]


# --- What is computed from weights ---

ModuleSlots = list[tuple[dict[str, Any], str]]
"""The modules that have weights, each as (its parent's dict of modules, its name in it)."""


@dataclass(frozen=True)
class _Entry(Generic[Value]):
    """A result, and the stamp (`_stamp_weights`) of the weights in `slots` when it was built."""

    slots: ModuleSlots
    stamp: list[int]
    value: Value


class ModuleCache(Generic[Value]):
    """Calls `build(module, *options)`, and keeps the result while the module and its weights stay.

    The result must not refer to the module itself. It is kept beside the module, not in it, so that
    copies and checkpoints do not contain it. The result is built again whenever any weight
    of the module changes or moves in memory, even if the result holds no reference to this weight.
    A CUDA graph, for example, reads each weight at the address where it was during recording.
    """

    def __init__(self, build: Callable[..., Value]) -> None:
        self._build = build
        self._entries: WeakKeyDictionary[nn.Module, dict[Hashable, _Entry[Value]]]
        self._entries = WeakKeyDictionary()

    def __call__(self, module: nn.Module, *options: Hashable) -> Value:
        """Return the result for a module with its present weights."""
        entry = self._entries.get(module, {}).get(options)
        if entry is not None and _stamp_weights(entry.slots) == entry.stamp:
            return entry.value

        with torch.inference_mode(False), torch.no_grad():
            value = self._build(module, *options)
        if not any(isinstance(weight, FakeTensor) for weight in module.parameters()):
            slots = _find_module_slots(module)
            entry = _Entry(slots, _stamp_weights(slots), value)
            self._entries.setdefault(module, {})[options] = entry
        return value


def _find_module_slots(module: nn.Module) -> ModuleSlots:
    slots = []
    for parent in module.modules():
        for name, child in parent._modules.items():
            if child is not None and child._parameters:
                slots.append((parent._modules, name))
    return slots


def _stamp_weights(slots: ModuleSlots) -> list[int]:
    """Return numbers that change when a layer is replaced, or a weight replaced, moved or written
    to.

    Each step of a policy computes this stamp, so it must be cheap. A write through a weight's
    `data` counts no version; on a CPU it is noticed by the weight's first element.
    """
    stamp: list[int] = []
    for modules, name in slots:
        module = modules[name]
        attributes = vars(module)
        # A method that a user has replaced counts as one more attribute.
        stamp += (id(module), id(type(module)), len(attributes))
        stamp += (len(attributes["_forward_hooks"]), len(attributes["_forward_pre_hooks"]))
        for weight in attributes["_parameters"].values():
            if weight is None:
                continue
            address = weight.data_ptr()
            # Weights made in inference mode have no version.
            version = 0 if weight.is_inference() else weight._version
            stamp += (address, version)
            if address and weight.is_cpu:
                integer = _INTEGER_OF_SIZE[weight.element_size()]
                stamp.append(integer.from_address(address).value)
    return stamp
