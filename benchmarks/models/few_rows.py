"""A flow step's few tokens through the expert's layers on a GPU: Triton kernels of ours against `Stack`.

    python benchmarks/models/few_rows.py                                    # on a GPU, spear1, bfloat16
    TRITON_INTERPRET=1 python benchmarks/models/few_rows.py --device cpu    # small, float32, only compared

Such a step is the reading of weights, once each. These kernels do it in six launches per layer, whose
products start while their weights come in; PyTorch's, in `Stack`, take fifteen. Sums are float32. Both run as
CUDA graphs. The roofline is the bytes of the weights over the bandwidth measured here.

An experiment, not part of the package: no GPU has run it yet. Triton's interpreter has (float32, up to 2e-6
of the largest value from `Stack`'s; it needs NumPy before 2.4), and the kernels compile for compute
capability 8.0, 8.9 and 9.0.
"""
# mypy: disallow-untyped-defs=False

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
import triton
import triton.language as tl
import tyro
from torch import Tensor
from transformers import GemmaConfig

from pi0_pair import relative
from spear.doctor import machine
from spear.models.fast.stack import CudaGraphCache, Stack
from spear.models.layers import language_model
from spear.models.presets import PRESETS, TOKEN_IDS
from timing import race

COLUMNS, PIECE, KEYS = 16, 128, 64
"""What one of a kernel's programs does: outputs, inputs at a time, keys that it sees (our choice)."""


class FewRows:
    """The layers of a `Stack` for at most 16 tokens of all rows together: plain ones in bfloat16, of one
    key-value head, without softcap, all sizes multiples of 256."""

    def __init__(self, layers: Sequence[Any], heads: int, width: int, eps: float, scale: float) -> None:
        self.layers = [
            (
                each.before_attention,
                each.before_mlp,
                *map(_whole, (each.qkv, each.out, each.gate_up, each.down)),
            )
            for each in layers
        ]
        self.heads, self.width, self.eps, self.scale = heads, width, eps, scale

    def __call__(self, x: Tensor, turns: tuple[Tensor, ...], window: Any, bias: Tensor | None) -> Tensor:
        """As of `Stack`, before the last norm."""
        (batch, length, depth), (cos, sin) = x.shape, turns
        heads, width, rows = self.heads, self.width, batch * length
        first, ends = window.queries[0], [keys.shape[1] for keys, _ in window.seen[0]]
        chunks, each = triton.cdiv(ends[-1], KEYS), max(16, triton.next_power_of_2(length * heads))
        x = x.reshape(rows, depth).contiguous()
        query, found = x.new_empty(2, rows, heads * width).unbind(0)
        parts = x.new_empty(batch, chunks, each, width, dtype=torch.float32)
        peaks, masses = x.new_empty(2, batch, chunks, each, dtype=torch.float32).unbind(0)
        inner = self.layers[0][-1].shape[1]
        middle = x.new_empty(rows, inner)
        turned = cos.stride(0), cos.stride(1)
        for weights, place, seen in zip(self.layers, window.places, window.seen, strict=True):
            before_attention, before_mlp, qkv, out, gate_up, down = weights
            keys, values = seen[-1]
            to = place.stride(0), place.stride(1)
            norm = before_attention, qkv, cos, sin
            sizes = heads, width, COLUMNS, PIECE
            own = rows, length, depth, self.eps, *turned, *to
            _qkv[heads + 2, width // 2 // COLUMNS](x, *norm, query, place, *own, *sizes, num_stages=5)
            hidden = keys if bias is None else bias
            seeing = length, first, ends[0], ends[-1], keys.stride(0), hidden.stride(0), self.scale
            into = parts, peaks, masses
            how = heads, width, each, KEYS, bias is not None
            _attend[chunks, batch](query, keys, values, hidden, *into, *seeing, *how)
            most = triton.next_power_of_2(chunks)
            _combine[length * heads, batch](*into, found, chunks, length * heads, each, width, most)
            x = _add(found, out, x)
            _gate_up[inner // 32,](x, before_mlp, gate_up, middle, rows, depth, inner, self.eps, 32, PIECE)
            x = _add(middle, down, x)
        return x.view(batch, length, depth)


def _whole(fused: Any) -> Tensor:
    """The weights of linear layers that read the same input, [out, in]."""
    return torch.cat([layer.weight for layer in fused.layers]) if fused.weight is None else fused.weight


def _add(rows: Tensor, weight: Tensor, onto: Tensor) -> Tensor:
    """onto + rows · weightᵀ."""
    out = torch.empty_like(onto)
    width, depth = weight.shape
    sizes = len(rows), depth, width, COLUMNS, 2 * PIECE
    _product[width // COLUMNS,](rows, weight, onto, out, *sizes, num_stages=5)
    return out


@triton.jit
def _inverse(x, rows, depth, eps, PIECE: tl.constexpr):
    """1 / rms of each row, [16]."""
    row, total = tl.arange(0, 16), tl.zeros([16], tl.float32)
    for begin in range(0, depth, PIECE):
        at = row[:, None] * depth + begin + tl.arange(0, PIECE)[None, :]
        part = tl.load(x + at, mask=row[:, None] < rows, other=0.0).to(tl.float32)
        total += tl.sum(part * part, 1)
    return tl.rsqrt(total / depth + eps)


@triton.jit
def _normed(x, scale, inverse, begin, rows, depth, PIECE: tl.constexpr):
    """A piece of the rows after RMSNorm, [16, PIECE]."""
    row, at = tl.arange(0, 16)[:, None], begin + tl.arange(0, PIECE)
    part = tl.load(x + row * depth + at[None, :], mask=row < rows, other=0.0).to(tl.float32)
    return (part * inverse[:, None] * tl.load(scale + at)[None, :]).to(x.dtype.element_ty)


@triton.jit
def _times(part, weight, begin, depth, PIECE: tl.constexpr):
    """A piece of rows · a piece of weights, whose rows start at the pointers [N, 1]: [16, N]."""
    return tl.dot(part, tl.trans(tl.load(weight + begin + tl.arange(0, PIECE)[None, :])))


@triton.jit
def _qkv(
    x,
    scale,
    weight,
    cos,
    sin,
    query,
    place,
    rows,
    length,
    depth,
    eps,
    turn_batch,
    turn_token,
    place_kind,
    place_batch,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Queries [rows, HEADS · WIDTH], turned; keys, turned, and values into the cache. A program makes columns
    of one head in its first half and those that they are turned with in its second."""
    head, column = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inverse = _inverse(x, rows, depth, eps, PIECE)
    first = weight + (head * WIDTH + column)[:, None] * depth
    second = first + WIDTH // 2 * depth
    a, b = tl.zeros([16, COLUMNS], tl.float32), tl.zeros([16, COLUMNS], tl.float32)
    for begin in range(0, depth, PIECE):
        part = _normed(x, scale, inverse, begin, rows, depth, PIECE)
        a += _times(part, first, begin, depth, PIECE)
        b += _times(part, second, begin, depth, PIECE)
    row = tl.arange(0, 16)[:, None]
    there, turns = row < rows, head <= HEADS
    at = row // length * turn_batch + row % length * turn_token + column[None, :]
    half = WIDTH // 2
    mask = there & turns
    kind = x.dtype.element_ty
    turned_a = a * tl.load(cos + at, mask, 1.0) + b * tl.load(sin + at, mask, 0.0)
    turned_b = b * tl.load(cos + at + half, mask, 1.0) + a * tl.load(sin + at + half, mask, 0.0)
    turned_a, turned_b = turned_a.to(kind), turned_b.to(kind)
    to = query + row * HEADS * WIDTH + head * WIDTH + column[None, :]
    tl.store(to, turned_a, there & (head < HEADS))
    tl.store(to + half, turned_b, there & (head < HEADS))
    to = place + (head - HEADS) * place_kind + row // length * place_batch + row % length * WIDTH
    tl.store(to + column[None, :], turned_a, there & (head >= HEADS))
    tl.store(to + column[None, :] + half, turned_b, there & (head >= HEADS))


@triton.jit
def _attend(
    query,
    keys,
    values,
    bias,
    parts,
    peaks,
    masses,
    length,
    first,
    first_end,
    end,
    batch_stride,
    bias_stride,
    scale,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """What all heads of a batch's tokens find among some keys: sums of values, and the largest score and the
    sum of the weights by which `_combine` puts them together. The `first` tokens see less than the others."""
    chunk, batch = tl.program_id(0), tl.program_id(1)
    row, place, at = tl.arange(0, ROWS), chunk * KEYS + tl.arange(0, KEYS), tl.arange(0, WIDTH)[None, :]
    known = row < length * HEADS
    q = tl.load(query + (batch * length * HEADS + row)[:, None] * WIDTH + at, mask=known[:, None], other=0.0)
    here = batch * batch_stride + place[:, None] * WIDTH + at
    k = tl.load(keys + here, mask=place[:, None] < end, other=0.0)
    v = tl.load(values + here, mask=place[:, None] < end, other=0.0)
    scores = tl.dot(q, tl.trans(k)) * scale
    if HIDDEN:
        scores += tl.load(bias + batch * bias_stride + place, mask=place < end, other=0.0)[None, :]
    own = tl.where(row // HEADS < first, first_end, end)
    scores = tl.where(place[None, :] < own[:, None], scores, -1e30)
    peak = tl.max(scores, 1)
    share = tl.exp(scores - peak[:, None])
    to = (batch * tl.num_programs(0) + chunk) * ROWS + row
    tl.store(peaks + to, peak)
    tl.store(masses + to, tl.sum(share, 1))
    tl.store(parts + to[:, None] * WIDTH + at, tl.dot(share.to(v.dtype), v))


@triton.jit
def _combine(
    parts,
    peaks,
    masses,
    out,
    chunks,
    rows,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """One row of what `_attend` found, of all keys."""
    row, batch = tl.program_id(0), tl.program_id(1)
    chunk, at = tl.arange(0, CHUNKS), tl.arange(0, WIDTH)
    where = (batch * chunks + chunk) * ROWS + row
    peak = tl.load(peaks + where, mask=chunk < chunks, other=float("-inf"))
    share = tl.exp(peak - tl.max(peak, 0))
    mass = tl.sum(share * tl.load(masses + where, mask=chunk < chunks, other=0.0), 0)
    mask = (chunk < chunks)[:, None]
    found = tl.load(parts + where[:, None] * WIDTH + at[None, :], mask=mask, other=0.0)
    whole = tl.sum(found * share[:, None], 0) / mass
    tl.store(out + (batch * rows + row) * WIDTH + at, whole.to(out.dtype.element_ty))


@triton.jit
def _product(
    x,
    weight,
    onto,
    out,
    rows,
    depth,
    width,
    COLUMNS: tl.constexpr,
    PIECE: tl.constexpr,
):
    """out = onto + x · weightᵀ."""
    row, column = tl.arange(0, 16)[:, None], tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([16, COLUMNS], tl.float32)
    for begin in range(0, depth, PIECE):
        at = row * depth + begin + tl.arange(0, PIECE)[None, :]
        part = tl.load(x + at, mask=row < rows, other=0.0)
        total += _times(part, weight + column[:, None] * depth, begin, depth, PIECE)
    at = row * width + column[None, :]
    total += tl.load(onto + at, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=row < rows)


@triton.jit
def _gate_up(
    x,
    scale,
    weight,
    out,
    rows,
    depth,
    inner,
    eps,
    COLUMNS: tl.constexpr,
    PIECE: tl.constexpr,
):
    """GELU of the gate, by its tanh approximation, x σ(2u), times up: [rows, inner]."""
    inverse = _inverse(x, rows, depth, eps, PIECE)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    gate, up = tl.zeros([16, COLUMNS], tl.float32), tl.zeros([16, COLUMNS], tl.float32)
    for begin in range(0, depth, PIECE):
        part = _normed(x, scale, inverse, begin, rows, depth, PIECE)
        gate += _times(part, weight + column[:, None] * depth, begin, depth, PIECE)
        up += _times(part, weight + (inner + column)[:, None] * depth, begin, depth, PIECE)
    row = tl.arange(0, 16)[:, None]
    grown = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    tl.store(out + row * inner + column[None, :], (grown * up).to(out.dtype.element_ty), mask=row < rows)


def main(
    device: Literal["cuda", "cpu"] = "cuda", prefix: int = 412, batch: int = 1, repeats: int = 50
) -> None:
    """Compare, and on a GPU measure.

    Args:
        device: cpu only with TRITON_INTERPRET=1. prefix: tokens before the state and the actions.
        batch: observations at once, at most 2. repeats: of each, in turn.
    """
    size, kind = PRESETS["spear1"], torch.bfloat16 if device == "cuda" else torch.float32
    small = {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 768, "head_dim": 64}
    fields = size.expert if device == "cuda" else {**size.expert, **small}
    torch.manual_seed(0)
    with torch.device(device), torch.no_grad():
        config: Any = GemmaConfig(**{**fields, "vocab_size": 1, **dict.fromkeys(TOKEN_IDS)})
        model: Any = language_model(config)
        model.to(kind).eval()
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.normal_(0, 0.2)
        stack = Stack(model, compiled=device == "cuda")
        few = FewRows(stack.layers, stack.heads, stack.width, stack.eps, stack.scale)
        length = 1 + size.horizon
        end = prefix + length
        held = stack.cache(batch, end, kind, torch.device(device)).whole.normal_()
        places = prefix + torch.arange(length).expand(batch, length)
        turns = stack.rotations(places, kind)
        x = torch.randn(batch, length, model.config.hidden_size, dtype=kind)
        bias = torch.zeros(batch, 1, end, dtype=kind)
        bias[..., prefix - 10 : prefix] = torch.finfo(kind).min  # padding
    caches = [stack.cache(batch, end, kind, x.device) for _ in range(2)]
    windows = []
    for cache in caches:
        cache.whole.copy_(held)
        windows.append(cache.window(prefix, [(1, prefix + 1), (size.horizon, end)]))
    ways: dict[str, Any] = {
        "Stack": lambda given: stack(given["x"], turns, windows[0], bias),
        "few rows": lambda given: stack._norm(few(given["x"], turns, windows[1], bias), stack.norm),
    }
    if device == "cuda":
        graphs = {name: CudaGraphCache() for name in ways}
        ways = {name: partial(graphs[name], way) for name, way in ways.items()}
    with torch.inference_mode():
        truth, found = (way({"x": x}) for way in ways.values())
        kept = relative(caches[1].whole, caches[0].whole)
        print(f"difference: {relative(found, truth):.1e} of the largest value; in the cache {kept:.1e}")
        if device == "cpu":
            return
        ten = {name: lambda w=way: [w({"x": x}) for _ in range(10)] for name, way in ways.items()}
        times = race(ten, device, repeats)
    weights = sum(p.numel() * p.element_size() for p in model.layers.parameters())
    for name, taken in times.items():
        print(f"{name}: {taken} ms for ten flow steps")
    least = 1000 * machine(device, kind).least(*[(0, weights)] * 10)
    print(f"roofline: {least:.1f} ms; {torch.cuda.get_device_name()}")


if __name__ == "__main__":
    tyro.cli(main)
