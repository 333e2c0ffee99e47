"""Linear layers for inference, and a cache for results that are computed from weights.

On a CPU, `linear` computes a matrix product by oneDNN where this is faster than PyTorch's default.
`FusedLinear` computes several linear layers as one product, and may keep their weights *packed*,
which means in oneDNN's own memory layout. `ModuleCache` keeps results that are computed from a
network's weights until the weights change.
"""

import ctypes
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeGuard, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

Value = TypeVar("Value")

LayerEvents = list[torch.Event] | None
"""An event per layer, by which one CUDA stream waits for another. None if no stream waits."""

MAX_CACHED_ELEMENTS = 2**19
"""A weight with fewer elements (2 MB in float32) stays in a core's cache between uses (our
choice)."""

_CPU_INFO_FILE = Path("/proc/cpuinfo")
CPU_INFO = _CPU_INFO_FILE.read_text(encoding="utf-8") if _CPU_INFO_FILE.is_file() else ""
"""Linux's description of the processor, or "" on other systems."""

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)
HAS_BFLOAT16: bool = _HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""Whether oneDNN computes in bfloat16 on this CPU. With only AVX2 it refuses, and PyTorch's own
products in bfloat16 are many times slower."""
_ONEDNN_DTYPES = (torch.float32, torch.bfloat16) if HAS_BFLOAT16 else (torch.float32,)

# PyTorch computes float32 products on a CPU by MKL. MKL is slow on AMD's CPUs with AVX-512, because
# it does not use their AVX-512.
_IS_INTEL = "GenuineIntel" in CPU_INFO
_IS_MKL_FAST = torch.backends.mkl.is_available() and (_IS_INTEL or "avx512f" not in CPU_INFO)

_INTEGER_OF_SIZE: dict[int, Any] = {
    1: ctypes.c_int8,
    2: ctypes.c_int16,
    4: ctypes.c_int32,
    8: ctypes.c_int64,
}
"""Bytes per element -> the C type by which `_compute_change_stamp` reads an element's bits."""


# --- Products ---


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x Wᵀ + b like `torch.nn.functional.linear`, by oneDNN where that is faster on a CPU.

    On AMD with AVX-512 and one thread, oneDNN is 2.1 times as fast as PyTorch's function for 560
    rows and a weight of 2,048 × 2,048. For 5 rows and a weight of 1,024 × 4,096 it is 1.6 times as
    fast, and with packed weights 5 times (in bfloat16 1.2 and 2.3 times). On Intel, and on AMD
    without AVX-512, MKL is faster, except for packed weights that are larger than the CPU's caches.
    These are results of `experiments/cpu_matrix_products`.

    Args:
        x: [..., in].
        weight: [out, in], plain or packed.
        bias: [out], or None.

    Returns:
        [..., out].
    """
    if _should_use_onednn(x, weight):
        # "none": no activation follows the product, so it has no parameters [] and no variant "".
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return nn.functional.linear(x, weight, bias)


def _should_use_onednn(x: Tensor, weight: Tensor) -> bool:
    """Return whether oneDNN can compute the product, and faster than PyTorch's default."""
    if not _HAS_ONEDNN or x.device.type != "cpu":
        return False
    if x.dtype != weight.dtype or x.dtype not in _ONEDNN_DTYPES:
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if weight.is_mkldnn:
        return True
    # For plain weights PyTorch's default may be as fast: by MKL in float32, and in any precision
    # for a single row.
    is_one_row = x.numel() == x.shape[-1]
    is_fast_by_mkl = _IS_MKL_FAST and x.dtype == torch.float32
    return not is_one_row and not is_fast_by_mkl


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
    """Return whether a layer is linear and nothing else: it has no other forward and no hooks.

    A hook on a module around the layer is not noticed. Such a hook does not run in fast inference.
    """
    has_known_forward = type(layer).forward in (nn.Linear.forward, FastLinear.forward)
    if not has_known_forward or "forward" in vars(layer):
        return False
    return not layer._forward_hooks and not layer._forward_pre_hooks


class FusedLinear:
    """Linear layers that read the same input, computed as one product, for inference.

    On a GPU the weights are joined in one tensor, and the weights of the layers become views of it.
    On a CPU one product is not faster, unless the weights are packed. With `packed` this object
    keeps a packed copy of the weights, which is worth its memory for layers that have few rows and
    run often.

    In some cases the layers run one by one, and `weight` is None: on a CPU without `packed`, for
    layers that are not plain (LoRA), and for fake tensors.
    """

    def __init__(self, *layers: nn.Module, packed: bool = False) -> None:
        self.layers = layers
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

        # Only plain layers of one type, on one device, can be joined.
        plain_layers = [layer for layer in layers if is_plain_linear(layer)]
        kinds = {
            (layer.weight.dtype, layer.weight.device, layer.bias is None) for layer in plain_layers
        }
        if len(plain_layers) < len(layers) or len(kinds) > 1:
            return

        weights = [layer.weight for layer in plain_layers]
        first_weight = weights[0]
        if isinstance(first_weight, FakeTensor):
            if len(weights) > 1:
                # Fake tensors measure memory. While weights are joined they exist twice, so this
                # tensor must be counted, too.
                torch.cat(weights)
            return

        has_bias = plain_layers[0].bias is not None
        if first_weight.device.type != "cpu":
            self.weight = _join_in_one_storage(weights)
            if has_bias:
                self.bias = _join_in_one_storage([layer.bias for layer in plain_layers])
        elif packed and _HAS_ONEDNN and first_weight.dtype in _ONEDNN_DTYPES:
            joint_weight = torch.cat(weights) if len(weights) > 1 else first_weight.contiguous()
            self.weight = torch.ops.mkldnn._reorder_linear_weight(joint_weight, None)
            if has_bias:
                self.bias = torch.cat([layer.bias for layer in plain_layers])
        else:
            return
        self._out_sizes = [layer.out_features for layer in plain_layers]

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """[..., in] -> a list of each layer's output, [..., out]."""
        if self.weight is None:
            return [layer(x) for layer in self.layers]
        return self.project_all(x).split(self._out_sizes, dim=-1)

    def project_all(self, x: Tensor) -> Tensor:
        """[..., in] -> all layers' outputs side by side, [..., sum of out]."""
        if self.weight is None:
            return torch.cat([layer(x) for layer in self.layers], dim=-1)
        return linear(x, self.weight, self.bias)


def _join_in_one_storage(weights: Sequence[Tensor]) -> Tensor:
    """Join weights [out, in], or biases [out], to one tensor, of which they become views.

    If they already are consecutive parts of one tensor, nothing is copied.
    """
    first_weight = weights[0]
    num_rows = sum(weight.shape[0] for weight in weights)
    if _are_consecutive(weights):
        joint_shape = (num_rows, *first_weight.shape[1:])
        return first_weight.detach().as_strided(joint_shape, first_weight.stride())

    joint_weight = torch.cat([weight.detach() for weight in weights])
    row_blocks = joint_weight.split([weight.shape[0] for weight in weights])
    for weight, row_block in zip(weights, row_blocks, strict=True):
        weight.data = row_block
    return joint_weight


def _are_consecutive(weights: Sequence[Tensor]) -> bool:
    """Return whether the weights are in one storage, each directly after the one before."""
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

# GPU -> the streams that work beside its main stream.
_SIDE_STREAMS: dict[torch.device, list[torch.cuda.Stream]] = {}


def is_capturing_graph() -> bool:
    """Return whether a CUDA graph is being recorded."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def run_in_parallel_if_capturing(functions: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
    """Return the results of functions that do not depend on each other.

    While a CUDA graph is recorded, the functions are recorded in parallel streams, and the graph
    will run them at the same time. This is faster, because the layers for one image leave most of a
    GPU idle. Otherwise the functions run one after the other.
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
    """A context whose work runs in parallel to the current stream, from the first event on.

    It is used while a CUDA graph is recorded. The current stream has recorded the events, and may
    still have work to do after the first of them. At the end of the context it waits for the
    context's work. If `events` is None, the context's work runs in the current stream.
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
    """Return `count` streams of a GPU. They are always the same ones, because cuBLAS keeps memory
    for each stream."""
    streams = _SIDE_STREAMS.setdefault(device, [])
    while len(streams) < count:
        streams.append(torch.cuda.Stream(device))
    return streams[:count]


# --- Results that are computed from weights ---


class ModuleSlot(NamedTuple):
    """Where a module is: a slot also finds a module that has replaced the first one there.

    siblings  The parent's dict of child modules.
    name      The module's name in this dict.
    """

    siblings: dict[str, Any]
    name: str


@dataclass(frozen=True)
class _Entry(Generic[Value]):
    """A result, and the stamp of the weights in `slots` when it was built.

    See `_compute_change_stamp`.
    """

    slots: list[ModuleSlot]
    stamp: list[int]
    value: Value


class ModuleCache(Generic[Value]):
    """Calls `build(module, *options)`, and keeps the result as long as the module and its weights.

    The result is not stored in the module, so copies and checkpoints of the module do not contain
    it. The result must not refer to the module, which otherwise would never be freed. The result is
    built again when any weight of the module changes or moves in memory, even if the result has no
    reference to this weight. For example, a CUDA graph reads each weight at the address that the
    weight had during recording.
    """

    def __init__(self, build: Callable[..., Value]) -> None:
        self._build = build
        # Module -> options -> result.
        self._entries: WeakKeyDictionary[nn.Module, dict[Hashable, _Entry[Value]]]
        self._entries = WeakKeyDictionary()

    def __call__(self, module: nn.Module, *options: Hashable) -> Value:
        """Return the result for a module with its present weights."""
        entry = self._entries.get(module, {}).get(options)
        if entry is not None and _compute_change_stamp(entry.slots) == entry.stamp:
            return entry.value

        with torch.inference_mode(False), torch.no_grad():
            value = self._build(module, *options)
        has_fake_weights = any(isinstance(weight, FakeTensor) for weight in module.parameters())
        if not has_fake_weights:
            slots = _list_slots_of_weighted_modules(module)
            entry = _Entry(slots, _compute_change_stamp(slots), value)
            self._entries.setdefault(module, {})[options] = entry
        return value


def _list_slots_of_weighted_modules(module: nn.Module) -> list[ModuleSlot]:
    """Return the slots of all modules below `module` that have weights of their own."""
    slots = []
    for parent in module.modules():
        for name, child in parent._modules.items():
            if child is not None and child._parameters:
                slots.append(ModuleSlot(parent._modules, name))
    return slots


def _compute_change_stamp(slots: list[ModuleSlot]) -> list[int]:
    """Return numbers that change if a layer or weight is replaced, moved in memory or written to.

    Each inference computes this stamp, so it must be cheap. PyTorch's version of a weight increases
    when the weight is written to, but not if the write goes through `weight.data`. On a CPU, such a
    write is noticed by the weight's first element, which is part of the stamp.
    """
    stamp: list[int] = []
    for siblings, name in slots:
        module = siblings[name]
        attributes = vars(module)
        # A method that a user replaces on a module (such as `forward`) is one more attribute.
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
