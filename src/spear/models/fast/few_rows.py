"""A few tokens through a Gemma's layers on a GPU, in bfloat16: Triton kernels of ours.

Such a pass, a flow step or one token of answers, is the reading of weights, once each. PyTorch launches some
fifteen kernels per layer for it, most of which wait for memory. These are six. Sums are float32.
`benchmarks/models/few_rows.py` compares and times. (Launching each while the one before it still runs, to
bring its weights into the L2 cache, made it slower on an H200: 15.7 instead of 8.9 ms for ten flow steps.)
"""
# mypy: disallow-untyped-defs=False

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16
"""Tokens of all rows of a batch together, at most: the height of a product of these kernels."""
TILES: dict[str, dict[str, int]] = {
    "qkv": {"COLUMNS": 16, "PIECE": 256, "SHARES": 4, "num_stages": 3, "num_warps": 4},
    "out": {"COLUMNS": 8, "PIECE": 512, "SHARES": 8, "num_stages": 4, "num_warps": 8},
    "gate_up": {"COLUMNS": 16, "PIECE": 256, "SHARES": 4, "num_stages": 3, "num_warps": 4},
    "down": {"COLUMNS": 8, "PIECE": 512, "SHARES": 8, "num_stages": 4, "num_warps": 8},
    "attend": {"KEYS": 32, "num_warps": 4},
}
"""Of each kernel: outputs of a program; inputs taken at a time, in how many shares, each a warp's; how far
it reads ahead; keys that a program of the attention sees (our choice: the quickest tried on an H200)."""
SIZES = 512
"""What the sizes of layers are multiples of."""


class FewRows:
    """The layers of a `Stack` for at most `ROWS` tokens; see `can_do`."""

    def __init__(self, layers: Sequence[Any], heads: int, width: int, eps: float, scale: float) -> None:
        self.layers = [
            (each.before_attention, each.before_mlp, *map(_weights, _products(each))) for each in layers
        ]
        self.heads, self.width, self.eps, self.scale = heads, width, eps, scale

    @staticmethod
    def can_do(layers: Sequence[Any], heads: int, width: int, groups: int) -> bool:
        """Whether all layers are Gemma's (not Gemma 2's), plain, in bfloat16, with one key-value head."""
        return groups == 1 and width % 32 == 0 and all(map(_is_plain, layers))

    @staticmethod
    def can_run(x: Tensor, window: Any) -> bool:
        """Whether these are few tokens [B, S, D], in at most two blocks."""
        return x.dtype == torch.bfloat16 and x.shape[0] * x.shape[1] <= ROWS and len(window.queries) < 3

    def __call__(self, x: Tensor, turns: tuple[Tensor, ...], window: Any, bias: Tensor | None) -> Tensor:
        """As of `Stack`, before the last norm."""
        (batch, length, depth), (cos, sin) = x.shape, turns
        heads, width, rows = self.heads, self.width, batch * length
        first, ends = window.queries[0], [keys.shape[1] for keys, _ in window.seen[0]]
        chunks, each = (
            triton.cdiv(ends[-1], TILES["attend"]["KEYS"]),
            max(16, triton.next_power_of_2(length * heads)),
        )
        x = x.reshape(rows, depth).contiguous()
        query, found = x.new_empty(2, rows, heads * width).unbind(0)
        parts = x.new_empty(batch, chunks, each, width, dtype=torch.float32)
        peaks, masses = x.new_empty(2, batch, chunks, each, dtype=torch.float32).unbind(0)
        inner = self.layers[0][-1].shape[1]
        middle, between = x.new_empty(rows, inner), torch.empty_like(x)
        turned, halves = (cos.stride(0), cos.stride(1)), width // 2 // TILES["qkv"]["COLUMNS"]
        both, most = length * heads, triton.next_power_of_2(chunks)
        for weights, place, seen in zip(self.layers, window.places, window.seen, strict=True):
            before_attention, before_mlp, qkv, out, gate_up, down = weights
            keys, values = seen[-1]
            own = rows, length, depth, self.eps, *turned, place.stride(0), place.stride(1), heads, width
            norm = before_attention, qkv, cos, sin
            _qkv[heads + 2, halves](x, *norm, query, place, *own, **_tile("qkv", depth))
            hidden = keys if bias is None else bias
            seeing = length, first, ends[0], ends[-1], keys.stride(0), hidden.stride(0), self.scale
            how = heads, width, each, bias is not None
            _attend[chunks, batch](
                query, keys, values, hidden, parts, peaks, masses, *seeing, *how, **TILES["attend"]
            )
            _combine[both, batch](parts, peaks, masses, found, chunks, both, each, width, most)
            tile = _tile("out", heads * width)
            _add[depth // tile["COLUMNS"],](found, out, x, between, rows, heads * width, depth, **tile)
            tile = _tile("gate_up", depth)
            norm = between, before_mlp, gate_up, middle
            _gate_up[inner // tile["COLUMNS"],](*norm, rows, depth, inner, self.eps, **tile)
            tile, x = _tile("down", inner), torch.empty_like(x)
            _add[depth // tile["COLUMNS"],](middle, down, between, x, rows, inner, depth, **tile)
        return x.view(batch, length, depth)


def _tile(name: str, depth: int) -> dict[str, int]:
    return {**TILES[name], "PIECE": min(TILES[name]["PIECE"], depth)}


def _products(layer: Any) -> tuple[Any, ...]:
    return layer.qkv, layer.out, layer.gate_up, layer.down


def _is_plain(layer: Any) -> bool:
    if layer.after_mlp is not None or any(p.weight is None or p.bias is not None for p in _products(layer)):
        return False
    weights = [product.weight for product in _products(layer)]
    return all(w.dtype == torch.bfloat16 and w.shape[1] % SIZES == 0 for w in weights)


def _weights(fused: Any) -> Tensor:
    """The weights of linear layers that read the same input, [out, in]."""
    return torch.cat([layer.weight for layer in fused.layers]) if fused.weight is None else fused.weight


@triton.jit
def _inputs(x, begin, rows, depth, PIECE: tl.constexpr, SHARES: tl.constexpr):
    """Some inputs of the rows, [SHARES, 16, PIECE / SHARES]: each warp multiplies its share."""
    each: tl.constexpr = PIECE // SHARES
    share, row = tl.arange(0, SHARES)[:, None, None], tl.arange(0, 16)[None, :, None]
    at = begin + share * each + tl.arange(0, each)[None, None, :]
    return tl.load(x + row * depth + at, mask=row < rows, other=0.0)


@triton.jit
def _normed(x, scale, begin, rows, depth, PIECE: tl.constexpr, SHARES: tl.constexpr):
    """Some inputs of the rows times the norm's scale, and their squares."""
    each: tl.constexpr = PIECE // SHARES
    part = _inputs(x, begin, rows, depth, PIECE, SHARES).to(tl.float32)
    at = begin + tl.arange(0, SHARES)[:, None, None] * each + tl.arange(0, each)[None, None, :]
    return (part * tl.load(scale + at)).to(x.dtype.element_ty), part * part


@triton.jit
def _of(weight, column, begin, depth, PIECE: tl.constexpr, SHARES: tl.constexpr):
    """Some inputs' weights of outputs, [SHARES, PIECE / SHARES, N]."""
    each: tl.constexpr = PIECE // SHARES
    at = begin + tl.arange(0, SHARES)[:, None, None] * each + tl.arange(0, each)[None, :, None]
    return tl.load(weight + column[None, None, :] * depth + at)


@triton.jit
def _two(
    x,
    scale,
    first,
    second,
    column,
    rows,
    depth,
    eps,
    COLUMNS: tl.constexpr,
    PIECE: tl.constexpr,
    SHARES: tl.constexpr,
):
    """Products of the rows after their norm with two lots of weights, [16, N] each."""
    a = tl.zeros([SHARES, 16, COLUMNS], tl.float32)
    b = tl.zeros([SHARES, 16, COLUMNS], tl.float32)
    squares = tl.zeros([SHARES, 16, PIECE // SHARES], tl.float32)
    for begin in range(0, depth, PIECE):
        part, more = _normed(x, scale, begin, rows, depth, PIECE, SHARES)
        squares += more
        a += tl.dot(part, _of(first, column, begin, depth, PIECE, SHARES))
        b += tl.dot(part, _of(second, column, begin, depth, PIECE, SHARES))
    inverse = tl.rsqrt(tl.sum(tl.sum(squares, 2), 0) / depth + eps)[:, None]
    return tl.sum(a, 0) * inverse, tl.sum(b, 0) * inverse


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
    SHARES: tl.constexpr,
):
    """Queries [rows, HEADS · WIDTH], turned; keys, turned, and values into the cache. A program makes columns
    of one head in its first half and those that they are turned with in its second."""
    head, column = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    half = WIDTH // 2
    first = weight + head * WIDTH * depth
    second = first + half * depth
    a, b = _two(x, scale, first, second, column, rows, depth, eps, COLUMNS, PIECE, SHARES)
    row = tl.arange(0, 16)[:, None]
    there, turns = row < rows, head <= HEADS
    at = row // length * turn_batch + row % length * turn_token + column[None, :]
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
    HIDDEN: tl.constexpr,
    KEYS: tl.constexpr,
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
def _add(
    x,
    weight,
    onto,
    out,
    rows,
    depth,
    width,
    COLUMNS: tl.constexpr,
    PIECE: tl.constexpr,
    SHARES: tl.constexpr,
):
    """out = onto + x · weightᵀ."""
    row, column = tl.arange(0, 16)[:, None], tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros([SHARES, 16, COLUMNS], tl.float32)
    for begin in range(0, depth, PIECE):
        part = _inputs(x, begin, rows, depth, PIECE, SHARES)
        sums += tl.dot(part, _of(weight, column, begin, depth, PIECE, SHARES))
    total = tl.sum(sums, 0)
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
    SHARES: tl.constexpr,
):
    """GELU of the gate, by its tanh approximation, x σ(2u), times up: [rows, inner]."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    second = weight + inner * depth
    gate, up = _two(x, scale, weight, second, column, rows, depth, eps, COLUMNS, PIECE, SHARES)
    row = tl.arange(0, 16)[:, None]
    grown = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    tl.store(out + row * inner + column[None, :], (grown * up).to(out.dtype.element_ty), mask=row < rows)
