"""The layers of a Gemma as inference runs them, with keys and values in buffers that are made once, and the
prefill of those buffers with images and text. The same numbers as the model's own layers, up to rounding. And
CUDA graphs: a computation recorded once per set of shapes, then launched as a whole."""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import Gemma2Model, GemmaModel

from spear.errors import notice, summarize_error
from spear.models.fast.linear import FusedLinear, LayerEvents, ModuleCache
from spear.models.layers import compute_position_ids, mask_to_bias

Inputs = Mapping[str, Tensor]
Recorded = tuple[torch.cuda.CUDAGraph, Inputs, Tensor]
"""A graph, where it reads, and where it leaves its result."""
MOST = 8
"""Graphs kept (our choice): each holds the memory of its results. The least recently used one goes."""
_WARM_UPS, _RECORDING = 3, threading.Lock()


def split_image_inputs(inputs: Inputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Pixels and presence, by view."""
    pixels, present = (
        {name.removeprefix(kind): t for name, t in inputs.items() if name.startswith(kind)}
        for kind in ("pixels/", "present/")
    )
    return pixels, present


class StaticKVCache:
    """Keys and values of every layer in buffers of a fixed size, [2, B, kv heads, places, head_dim] each."""

    def __init__(
        self,
        layers: int,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.whole = torch.empty(layers, 2, *shape, dtype=dtype, device=device)
        self.layers = self.whole.unbind(0)
        self._pairs = [held.flatten(1, 2).unbind(0) for held in self.layers]

    def window(self, start: int, blocks: Sequence[tuple[int, int]]) -> "Window":
        """Where new tokens go and what they see; see `Window`. Made once for many steps."""
        queries = [count for count, _ in blocks]
        places = [held[:, :, :, start : start + sum(queries)] for held in self.layers]
        seen = [
            [(keys[:, :end], values[:, :end]) for _, end in blocks] for keys, values in self._pairs
        ]
        return Window(places, queries, seen)


@dataclass(frozen=True)
class Window:
    """Views of a `StaticKVCache` for consecutive tokens in blocks of (tokens, end), which see places < end.

    places   per layer: where the new tokens' keys and values go.
    queries  tokens per block.
    seen     per layer and block: keys and values, [B · kv heads, places seen, head_dim].
    write_events  takes an event per layer, when its keys and values are written; None: nobody waits.
    await_events  those of the places before these, which another stream fills.
    """

    places: list[Tensor]
    queries: list[int]
    seen: list[list[tuple[Tensor, Tensor]]]
    write_events: LayerEvents = None
    await_events: LayerEvents = None

    def write(self, layer: int, held: Tensor) -> None:
        """Puts a layer's new keys and values [2, B, kv heads, S, d] in their places."""
        self.places[layer].copy_(held)
        if self.write_events is not None:
            self.write_events.append(torch.cuda.current_stream().record_event())

    def wait(self, layer: int) -> None:
        """Before a layer's keys and values are read."""
        if self.await_events:
            torch.cuda.current_stream().wait_event(self.await_events[layer])


class Layer:
    """One layer. Norms are their scales, 1 + weight, float32; those after attention and MLP are Gemma 2's."""

    def __init__(self, layer: Any, packed: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        second = hasattr(layer, "pre_feedforward_layernorm")  # Gemma 2
        self.before_attention = norm_scale(layer.input_layernorm)
        self.after_attention = norm_scale(layer.post_attention_layernorm) if second else None
        before_mlp = layer.pre_feedforward_layernorm if second else layer.post_attention_layernorm
        self.before_mlp = norm_scale(before_mlp)
        self.after_mlp = norm_scale(layer.post_feedforward_layernorm) if second else None
        self.qkv = FusedLinear(attention.q_proj, attention.k_proj, attention.v_proj, packed=packed)
        self.out = FusedLinear(attention.o_proj, packed=packed)
        self.gate_up = FusedLinear(mlp.gate_proj, mlp.up_proj, packed=packed)
        self.down = FusedLinear(mlp.down_proj, packed=packed)


class CudaGraphCache:
    """Runs functions of named tensors on a GPU as CUDA graphs. Safe to use from several threads.

    A function must launch the same work whatever is in its tensors: it may not look at their values.
    """

    def __init__(self) -> None:
        self._graphs: OrderedDict[Hashable, Recorded | None] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(
        self, function: Callable[[Inputs], Tensor], inputs: Inputs, *options: Hashable
    ) -> Tensor:
        """function(inputs). There is a graph per options, and per names, shapes and types of the inputs. One
        that cannot be recorded, perhaps for want of memory, is said by a notice, and the others have theirs.
        """
        key = (options, tuple((name, tuple(t.shape), t.dtype) for name, t in inputs.items()))
        with self._lock:
            if key not in self._graphs:
                try:
                    self._graphs[key] = _record(function, inputs)
                except Exception as error:  # whatever a compiler may raise
                    self._graphs[key] = None
                    notice(f"no CUDA graph ({summarize_error(error)}): slower, same results")
            self._graphs.move_to_end(key)
            while len(self._graphs) > MOST:
                self._graphs.popitem(last=False)
            if (recorded := self._graphs[key]) is None:
                return function(inputs)
            graph, places, result = recorded
            for name, tensor in inputs.items():
                places[name].copy_(tensor)
            graph.replay()
            return result.clone()


def _record(function: Callable[[Inputs], Tensor], inputs: Inputs) -> Recorded:
    places = {name: tensor.clone() for name, tensor in inputs.items()}
    device = next(
        iter(places.values())
    ).device  # of a thread's current GPU the graph would be empty
    aside, here = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    aside.wait_stream(here)
    with torch.cuda.stream(
        aside
    ):  # compilers, autotuners and lazy initialisations do their work here
        for _ in range(_WARM_UPS):
            function(places)
    here.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # A process records one graph at a time, while its other threads may use the GPU.
    with _RECORDING, torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
        result = function(places)
    return graph, places, result


class LayerStack:
    """All layers of a Gemma or Gemma 2 and its last norm.

    packed: see `FusedLinear`. compiled: `torch.compile` what is before and after attention, for all layers.
    """

    kind = StaticKVCache

    def __init__(
        self, model: GemmaModel | Gemma2Model, packed: bool = False, compiled: bool = False
    ) -> None:
        config: Any = model.config
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.width, self.eps = config.head_dim, config.rms_norm_eps
        self._eps = torch.tensor(self.eps)
        self.dtype: torch.dtype = model.norm.weight.dtype
        one: Any = model.layers[0]
        self.scale: float = one.self_attn.scaling
        self.softcap: float | None = getattr(one.self_attn, "attn_logit_softcapping", None)
        self.activation: Any = one.mlp.act_fn
        self.rotary = model.rotary_emb
        self.norm = norm_scale(model.norm)
        self.layers = [Layer(layer, packed) for layer in model.layers]
        self.few: Any = None
        if compiled:
            from spear.models.fast.few_rows import FewRows  # here: it needs Triton

            if FewRows.can_do(self.layers, self.heads, self.width, self.groups):
                self.few = FewRows(self.layers, self.heads, self.width, self.eps, self.scale)
        # Not bound: a stack that refers to itself keeps its weights and graphs when nobody has it any more.
        self._before: Any = type(self)._project
        self._after: Any = type(self)._finish
        if compiled:
            warnings.filterwarnings(
                "ignore", "TensorFloat32 tensor cores"
            )  # which float32 does without here
            # With few rows, small kernels take most of the time on a GPU; compiled, they become one.
            self._before, self._after = torch.compile(self._before), torch.compile(self._after)
            # One length, then any; the VLM and the expert; prompts and single tokens: more variants than 8.
            limits: Any = torch._dynamo.config
            limits.recompile_limit = max(limits.recompile_limit, 32)
        self.replay = CudaGraphCache()

    def cache(
        self, batch: int, places: int, dtype: torch.dtype, device: torch.device
    ) -> StaticKVCache:
        """Room for the keys and values of so many tokens."""
        return self.kind(len(self.layers), (batch, self.groups, places, self.width), dtype, device)

    def adopt_cache(self, cache: StaticKVCache) -> StaticKVCache:
        """What another stack left in a cache, as this one reads it: itself, or a copy in its precision."""
        if cache.whole.dtype == self.dtype:
            return cache
        _, _, batch, _, places, _ = cache.whole.shape
        copy = self.cache(batch, places, self.dtype, cache.whole.device)
        copy.whole.copy_(cache.whole)
        return copy

    def rotations(self, places: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What rotates queries and keys at positions [B, S]: cosines, and signed sines, [B, S, 1, d] each."""
        cos, sin = self.rotary(torch.empty(0, dtype=dtype, device=places.device), places)
        first, second = sin.chunk(2, dim=-1)
        return cos[:, :, None], torch.cat([-first, second], dim=-1)[:, :, None]

    def __call__(
        self,
        x: Tensor,
        rotations: tuple[Tensor, ...],
        window: Window,
        bias: Tensor | None = None,
        keys_only: bool = False,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Embeddings [B, S, D] of the window's tokens -> the last layer's output, after the last norm; their
        keys and values are left in the cache.

        bias       [B · kv heads, 1, places] added to all scores, or None: see `PrefilledCache.bias`.
        keys_only  the last layer stops at its keys and values, and the result is its input.
        wanted     [B] the one token of each row that is needed, of a window of one block: gives [B, 1, D].
        """
        if (
            self.few is not None
            and wanted is None
            and not keys_only
            and self.few.can_run(x, window)
        ):
            with torch.cuda.device_of(x):  # Triton launches on a thread's current GPU
                return self._norm(self.few(x, rotations, window, bias), self.norm)
        for index, layer in enumerate(self.layers):
            query, held = self._before(self, layer, x, *rotations)
            window.write(index, held)
            window.wait(index)
            if index + 1 == len(self.layers):
                if keys_only:
                    return x
                if wanted is not None:
                    query, x = self._only(wanted, query, x)
                    window = replace(window, queries=[1])
            found = self._attend(query, window.seen[index], window.queries, bias)
            x = self._after(self, layer, x, found)
        return self._norm(x, self.norm)

    def _project(self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B · kv heads, S · query heads per kv head, d]; keys and values [2, B, kv heads, S, d]."""
        batch, length, _ = x.shape
        qkv = layer.qkv.concatenated(self._norm(x, layer.before_attention))
        both, value = qkv.view(batch, length, -1, self.width).tensor_split(
            (self.heads + self.groups,), dim=2
        )
        # Rotary position embeddings, of queries and keys together: [B, S, heads, d].
        rotated = torch.addcmul(both * cos, both.roll(self.width // 2, dims=-1), sin)
        query, key = rotated.tensor_split((self.heads,), dim=2)
        held = torch.stack([key, value.to(key.dtype)]).transpose(2, 3)
        query = query.unflatten(2, (self.groups, -1)).transpose(1, 2)
        return query.reshape(batch * self.groups, -1, self.width), held

    def _only(self, wanted: Tensor, query: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The queries, as `_project` gives them, and the embeddings of one token [B] per row."""
        batch, length, _ = x.shape
        rows = torch.arange(batch, device=x.device)
        each = query.view(batch, self.groups, length, -1, self.width)[rows, :, wanted]
        return each.reshape(batch * self.groups, -1, self.width), x[rows, wanted][:, None]

    def _finish(self, layer: Layer, x: Tensor, found: Tensor) -> Tensor:
        """The rest of the layer, after attention found [B · kv heads, S · query heads per kv head, d]."""
        batch, length, _ = x.shape
        found = found.view(batch, self.groups, length, -1, self.width).transpose(1, 2)
        out = layer.out(found.reshape(batch, length, self.heads * self.width))[0]
        x = x + self._norm(out, layer.after_attention)
        gate, up = layer.gate_up(self._norm(x, layer.before_mlp))
        return x + self._norm(layer.down(self.activation(gate) * up)[0], layer.after_mlp)

    def _attend(
        self,
        query: Tensor,
        seen: list[tuple[Tensor, Tensor]],
        queries: list[int],
        bias: Tensor | None,
    ) -> Tensor:
        """Attention in which the query heads of a key-value head are rows of one product."""
        each = self.heads // self.groups
        parts = [query] if len(queries) == 1 else query.split([q * each for q in queries], dim=1)
        out = []
        for part, (keys, values) in zip(parts, seen, strict=True):
            hidden = None if bias is None else bias[:, :, : keys.shape[1]]
            if part.device.type != "cpu" and self.softcap is None:
                # PyTorch's fused attention sees one head: so it needs no copies of keys and values.
                mask = None if hidden is None else hidden[:, None]
                qkv = (part[:, None], keys[:, None], values[:, None])
                fused = nn.functional.scaled_dot_product_attention(
                    *qkv, attn_mask=mask, scale=self.scale
                )
                out.append(fused[:, 0])
                continue
            if self.scale == 1 and hidden is None and self.softcap is None:
                scores = torch.bmm(part, keys.transpose(1, 2))
            elif self.softcap is None:
                nothing = part.new_zeros(1) if hidden is None else hidden
                scores = torch.baddbmm(nothing, part, keys.transpose(1, 2), alpha=self.scale)
            else:
                scores = torch.bmm(part * self.scale, keys.transpose(1, 2))
                scores = self.softcap * (scores / self.softcap).tanh()
                scores = scores if hidden is None else scores + hidden
            out.append(torch.bmm(scores.softmax(-1), values))
        return out[0] if len(out) == 1 else torch.cat(out, dim=1)

    def _norm(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """Gemma's RMSNorm: x / rms(x) · scale, in float32; x itself where there is no norm."""
        if scale is None:
            return x
        full = x if x.dtype == torch.float32 else x.float()
        if x.device.type != "cpu":
            return nn.functional.rms_norm(full, full.shape[-1:], scale, self.eps).to(x.dtype)
        norm = torch.linalg.vector_norm(full, dim=-1, keepdim=True)
        inverse = torch.addcmul(self._eps, norm, norm, value=1 / full.shape[-1]).rsqrt_()
        return (full * scale).mul_(inverse).to(x.dtype)


@dataclass(frozen=True)
class PrefilledCache:
    """A prefix of S tokens after `prefill`.

    cache   keys and values of every layer, with room behind them.
    valid   [B, S] bool, False for padding and missing images; padded: whether any is False.
    next_positions  [B] the position after the last valid token.
    hidden  [B, D] the last layer's output at the last valid token; None where the cache alone was wanted.
    write_events   as `prefill` was given it; see `Window`.
    """

    cache: StaticKVCache
    valid: Tensor
    padded: bool
    next_positions: Tensor
    hidden: Tensor | None
    write_events: LayerEvents

    def bias(self, room: int, groups: int, dtype: torch.dtype) -> Tensor | None:
        """[B · kv heads, 1, places] added to the scores of the prefix and `room` places after it; or None."""
        if not self.padded:
            return None
        after = self.valid.new_ones(self.valid.shape[0], room)
        return mask_to_bias(torch.cat([self.valid, after], dim=1), dtype).repeat_interleave(
            groups, dim=0
        )[:, None]


def prefill(
    layers: LayerStack,
    features: Tensor,
    text: Tensor,
    image_valid: Tensor | None,
    text_valid: Tensor | None,
    room: int,
    keys_only: bool = False,
    write_events: LayerEvents = None,
) -> PrefilledCache:
    """Visual tokens [B, T, D] and text embeddings [B, L, D], which see each other, through the layers.

    image_valid [B, T] bool, text_valid [B, L]: None where all are valid, which saves masks.
    room: tokens that are to follow. keys_only: see `LayerStack`. write_events: see `Window`.
    """
    x = torch.cat([features.to(text.dtype), text], dim=1)
    batch, length = x.shape[:2]
    parts = [
        torch.ones(batch, count, dtype=torch.bool, device=x.device)
        if known is None
        else known.bool()
        for known, count in ((image_valid, features.shape[1]), (text_valid, text.shape[1]))
    ]
    valid = torch.cat(parts, dim=1)
    padded = image_valid is not None or text_valid is not None
    # On a GPU, looking at the mask would mean waiting; a fake tensor, which plans memory, has no contents.
    if padded and x.device.type == "cpu" and not isinstance(valid, FakeTensor):
        padded = not bool(valid.all())
    cache = layers.cache(batch, length + room, x.dtype, x.device)
    where = compute_position_ids(valid)
    prefix = PrefilledCache(cache, valid, padded, where[:, -1] + 1, None, write_events)
    window = replace(cache.window(0, [(length, length)]), write_events=write_events)
    rotations = layers.rotations(where, x.dtype)
    # Of all places with as many valid ones before them as the last token, it is the first.
    wanted = None if keys_only else where.argmax(-1)
    found = layers(x, rotations, window, prefix.bias(0, layers.groups, x.dtype), keys_only, wanted)
    return prefix if keys_only else replace(prefix, hidden=found[:, 0])


def norm_scale(norm: nn.Module) -> Tensor:
    """What Gemma's RMSNorm multiplies by, float32."""
    return 1 + norm.weight.detach().float()  # type: ignore[operator]


def can_compile(device: torch.device) -> bool:
    """Whether layers are compiled: on a GPU that PyTorch's compiler can write kernels for."""
    return device.type == "cuda" and find_spec("triton") is not None


get_layer_stack = ModuleCache(LayerStack)
"""`get_layer_stack(model, packed, compiled)`: the layers of a Gemma, ready to run."""
