"""A few tokens through a Gemma's layers on a GPU, in bfloat16: Triton kernels of ours.

Such a pass, a flow step or one token of answers, is the reading of weights, once each. PyTorch launches some
fifteen kernels per layer for it, most of which wait for memory. These are six. Sums are float32. From Hopper
on each is launched while the one before it still runs, for which it waits; bringing its weights along before
that was no faster on an H200. `benchmarks/models/few_rows.py` compares and times.
"""
# mypy: disallow-untyped-defs=False

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

ROWS = 16
"""Tokens of all rows of a batch together, at most: the height of a product of these kernels."""
ONE, TWO, KEYS = tl.constexpr(8), tl.constexpr(16), tl.constexpr(32)
"""What a program does: outputs of one product, or of each of two; keys that it sees (our choice, as what
follows: the quickest of those tried on an H200)."""
PIECE, SHARES, EACH = tl.constexpr(256), tl.constexpr(4), tl.constexpr(64)
"""Inputs taken at a time, in how many shares, and how many a share has, which one warp multiplies."""
AHEAD = {"qkv": 4, "gate_up": 3, "add": 6}
"""How many pieces of weights are on their way at once."""
SIZES = 512
"""What the sizes of layers are multiples of."""


class FewRows:
    """The layers of a `LayerStack` for at most `ROWS` tokens; see `can_do`."""

    def __init__(
        self, layers: Sequence[Any], heads: int, width: int, eps: float, scale: float
    ) -> None:
        self.layers = [
            (each.before_attention, each.before_mlp, *map(_weights, _products(each)))
            for each in layers
        ]
        self.heads, self.width, self.eps, self.scale = heads, width, eps, scale
        place = self.layers[0][0].device
        early = place.type == "cuda" and torch.cuda.get_device_capability(place) >= (9, 0)
        self.how = {"EARLY": early, "launch_pdl": early}
        self.pipelined = {name: {"num_stages": ahead, **self.how} for name, ahead in AHEAD.items()}

    @staticmethod
    def can_do(layers: Sequence[Any], heads: int, width: int, groups: int) -> bool:
        """Whether the GPU has bfloat16 and all layers are plain, in it, Gemma's (not 2's), of one kv head."""
        fits = groups == 1 and width % 32 == 0 and all(map(_is_plain, layers))
        return fits and torch.cuda.is_bf16_supported(including_emulation=False)

    @staticmethod
    def can_run(x: Tensor, window: Any) -> bool:
        """Whether these are few tokens [B, S, D], in at most two blocks."""
        return (
            x.dtype == torch.bfloat16
            and x.shape[0] * x.shape[1] <= ROWS
            and len(window.queries) < 3
        )

    def __call__(
        self, x: Tensor, turns: tuple[Tensor, ...], window: Any, bias: Tensor | None
    ) -> Tensor:
        """As of `LayerStack`, before the last norm."""
        (batch, length, depth), (cos, sin) = x.shape, turns
        heads, width, rows, both = self.heads, self.width, batch * length, length * self.heads
        inner, height = self.layers[0][-1].shape[1], 8 if rows <= 8 else ROWS
        first, ends = window.queries[0], [keys.shape[1] for keys, _ in window.seen[0]]
        chunks, each = triton.cdiv(ends[-1], KEYS.value), max(16, triton.next_power_of_2(both))
        query, found = x.new_empty(2, rows, heads * width).unbind(0)
        parts = x.new_empty(batch, chunks, each, width, dtype=torch.float32)
        peaks, masses = x.new_empty(2, batch, chunks, each, dtype=torch.float32).unbind(0)
        x, middle = x.reshape(rows, depth).contiguous(), x.new_empty(rows, inner)
        strides = (
            cos.stride(0),
            cos.stride(1),
            window.places[0].stride(0),
            window.places[0].stride(1),
        )
        # What a norm needs the kernel before it leaves: rows times its scale, and their squares in parts.
        count = depth // ONE.value
        normed = torch.empty_like(x), x.new_empty(count, height, dtype=torch.float32)
        norm = rows, depth, self.eps, count, triton.next_power_of_2(count), height
        _start[count,](x, self.layers[0][0], *normed, rows, depth, height)
        turned = length, *strides, heads, width, *norm
        attended, grown = (rows, heads * width, depth, height), (rows, inner, depth, height)
        halves, columns, most = (
            width // 2 // TWO.value,
            inner // TWO.value,
            triton.next_power_of_2(chunks),
        )
        sums, add = (parts, peaks, masses), self.pipelined["add"]
        after = [*(weights[0] for weights in self.layers[1:]), self.layers[0][0]]
        each_layer = zip(self.layers, after, window.places, window.seen, strict=True)
        for index, (weights, scale, place, seen) in enumerate(each_layer):
            _, before_mlp, qkv, out, gate_up, down = weights
            keys, values = seen[-1]
            _qkv[heads + 2, halves](
                *normed, qkv, cos, sin, query, place, *turned, **self.pipelined["qkv"]
            )
            window.wait(index)
            hidden = keys if bias is None else bias
            seeing = length, first, ends[0], ends[-1], keys.stride(0), hidden.stride(0), self.scale
            sizes = heads, width, each, bias is not None
            _attend[chunks, batch](query, keys, values, hidden, *sums, *seeing, *sizes, **self.how)
            _combine[both, batch](*sums, found, chunks, both, each, width, most, **self.how)
            into = torch.empty_like(x)
            _add[count,](found, out, x, before_mlp, into, *normed, *attended, **add)
            _gate_up[columns,](*normed, gate_up, middle, inner, *norm, **self.pipelined["gate_up"])
            x = torch.empty_like(x)
            _add[count,](middle, down, into, scale, x, *normed, *grown, **add)
        return x.view(batch, length, depth)


def _products(layer: Any) -> tuple[Any, ...]:
    return layer.qkv, layer.out, layer.gate_up, layer.down


def _is_plain(layer: Any) -> bool:
    if layer.after_mlp is not None or any(
        p.weight is None or p.bias is not None for p in _products(layer)
    ):
        return False
    weights = [product.weight for product in _products(layer)]
    return all(w.dtype == torch.bfloat16 and w.shape[1] % SIZES == 0 for w in weights)


def _weights(fused: Any) -> Tensor:
    """The weights of linear layers that read the same input, [out, in]."""
    return (
        torch.cat([layer.weight for layer in fused.layers])
        if fused.weight is None
        else fused.weight
    )


@triton.jit
def _take_over(EARLY: tl.constexpr):
    """Waits for what the kernel before leaves, and lets the one after begin."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def _inputs(x, begin, rows, depth, ROWS: tl.constexpr):
    """Some inputs of the rows, [SHARES, ROWS, EACH]: each warp multiplies its share."""
    share, row = tl.arange(0, SHARES)[:, None, None], tl.arange(0, ROWS)[None, :, None]
    at = begin + share * EACH + tl.arange(0, EACH)[None, None, :]
    return tl.load(x + row * depth + at, mask=row < rows, other=0.0)


@triton.jit
def _of(weight, column, begin, depth):
    """Some inputs' weights of outputs, [SHARES, EACH, N]."""
    at = begin + tl.arange(0, SHARES)[:, None, None] * EACH + tl.arange(0, EACH)[None, :, None]
    return tl.load(weight + column[None, None, :] * depth + at)


@triton.jit
def _leave(x, scale, column, scaled, squares, rows, depth, ROWS: tl.constexpr):
    """What the next norm needs of columns of the rows, [ROWS, N], see `_two`."""
    row = tl.arange(0, ROWS)
    at = row[:, None] * depth + column[None, :]
    product = x * tl.load(scale + column)[None, :]
    tl.store(scaled + at, product.to(scaled.dtype.element_ty), row[:, None] < rows)
    tl.store(squares + tl.program_id(0) * ROWS + row, tl.sum(x * x, 1))


@triton.jit
def _start(x, scale, scaled, squares, rows, depth, ROWS: tl.constexpr):
    """What the first norm needs, of tokens that no kernel of these has made."""
    row, column = tl.arange(0, ROWS)[:, None], tl.program_id(0) * ONE + tl.arange(0, ONE)
    part = tl.load(x + row * depth + column[None, :], row < rows, other=0.0).to(tl.float32)
    _leave(part, scale, column, scaled, squares, rows, depth, ROWS)


@triton.jit
def _two(
    scaled, squares, first, second, column, rows, depth, eps, count,
    PARTS: tl.constexpr, ROWS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Products of the rows after their norm with two lots of weights, [ROWS, N] each. Of the rows there are
    `scaled`, without 1 / rms, and the sums of their squares in `count` parts."""
    _take_over(EARLY)
    part = tl.arange(0, PARTS)[:, None]
    sums = tl.load(
        squares + part * ROWS + tl.arange(0, ROWS)[None, :], mask=part < count, other=0.0
    )
    a = tl.zeros([SHARES, ROWS, TWO], tl.float32)
    b = tl.zeros([SHARES, ROWS, TWO], tl.float32)
    for begin in range(0, depth, PIECE):
        inputs = _inputs(scaled, begin, rows, depth, ROWS)
        a += tl.dot(inputs, _of(first, column, begin, depth))
        b += tl.dot(inputs, _of(second, column, begin, depth))
    inverse = tl.rsqrt(tl.sum(sums, 0) / depth + eps)[:, None]
    return tl.sum(a, 0) * inverse, tl.sum(b, 0) * inverse


@triton.jit
def _qkv(
    scaled, squares, weight, cos, sin, query, place,
    length, turn_batch, turn_token, place_kind, place_batch, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    rows, depth, eps, count, PARTS: tl.constexpr, ROWS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Queries [rows, HEADS · WIDTH], turned; keys, turned, and values into the cache. A program makes columns
    of one head in its first half and those that they are turned with in its second."""
    head, column = tl.program_id(0), tl.program_id(1) * TWO + tl.arange(0, TWO)
    half = WIDTH // 2
    first = weight + head * WIDTH * depth
    second = first + half * depth
    a, b = _two(scaled, squares, first, second, column, rows, depth, eps, count, PARTS, ROWS, EARLY)
    row = tl.arange(0, ROWS)[:, None]
    there = row < rows
    at = row // length * turn_batch + row % length * turn_token + column[None, :]
    mask = there & (head <= HEADS)
    kind = query.dtype.element_ty
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
    query, keys, values, bias, parts, peaks, masses, length, first, first_end, end, batch_stride, bias_stride,
    scale, HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, HIDDEN: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """What all heads of a batch's tokens find among some keys: sums of values, and the largest score and the
    sum of the weights by which `_combine` puts them together. The `first` tokens see less than the others."""
    _take_over(EARLY)
    chunk, batch = tl.program_id(0), tl.program_id(1)
    row, place, at = (
        tl.arange(0, ROWS),
        chunk * KEYS + tl.arange(0, KEYS),
        tl.arange(0, WIDTH)[None, :],
    )
    known = row < length * HEADS
    q = tl.load(
        query + (batch * length * HEADS + row)[:, None] * WIDTH + at, mask=known[:, None], other=0.0
    )
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
    parts, peaks, masses, out, chunks, rows,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One row of what `_attend` found, of all keys."""
    _take_over(EARLY)
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
    x, weight, onto, scale, out, scaled, squares, rows, depth, width, ROWS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out = onto + x · weightᵀ, and what the norm after it needs."""
    row, column = tl.arange(0, ROWS)[:, None], tl.program_id(0) * ONE + tl.arange(0, ONE)
    at = row * width + column[None, :]
    _take_over(EARLY)
    before = tl.load(onto + at, mask=row < rows, other=0.0)
    sums = tl.zeros([SHARES, ROWS, ONE], tl.float32)
    for begin in range(0, depth, PIECE):
        part = _inputs(x, begin, rows, depth, ROWS)
        sums += tl.dot(part, _of(weight, column, begin, depth))
    total = (tl.sum(sums, 0) + before.to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + at, total, mask=row < rows)
    _leave(total.to(tl.float32), scale, column, scaled, squares, rows, width, ROWS)


@triton.jit
def _gate_up(
    scaled, squares, weight, out, inner,
    rows, depth, eps, count, PARTS: tl.constexpr, ROWS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """GELU of the gate, by its tanh approximation, x σ(2u), times up: [rows, inner]."""
    column = tl.program_id(0) * TWO + tl.arange(0, TWO)
    second = weight + inner * depth
    gate, up = _two(
        scaled, squares, weight, second, column, rows, depth, eps, count, PARTS, ROWS, EARLY
    )
    row = tl.arange(0, ROWS)[:, None]
    grown = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    tl.store(
        out + row * inner + column[None, :], (grown * up).to(out.dtype.element_ty), mask=row < rows
    )
