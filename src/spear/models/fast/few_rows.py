"""Triton kernels that run a few tokens through a Gemma's layers on a GPU, in bfloat16.

A flow step, or one more token of an answer, passes at most `MAX_ROWS` tokens through the layers.
Such a pass takes at least as long as reading all weights from memory once. With PyTorch it takes
longer, because PyTorch launches about fifteen kernels per layer, and most of them wait for memory.
Here six kernels make up a layer:

    project_qkv      norm, queries, keys and values, rotary embedding
    attend_to_keys   attention of all query heads to `KEYS_PER_PROGRAM` keys at a time
    combine_keys     softmax over all keys, from the results of attend_to_keys
    add_product      output projection, residual, and the inputs of the next norm
    gelu_gate_up     norm, gate and up projections, GELU
    add_product      down projection, residual, and the inputs of the next norm

A norm needs a sum over all columns of a row x, but a Triton program computes only some columns.
Therefore each program that writes columns of x also writes two inputs of the next norm: `scaled`,
which is x · scale, and `squares`, the sum of x² over the program's columns. The kernel that reads
the row adds up these sums, and divides its products by the row's root mean square at the end:

    (x / rms(x) · scale) Wᵀ = (scaled Wᵀ) / rms(x),    rms(x) = √(mean(x²) + eps)

All sums are float32. In the shapes, B is the batch size, S the number of tokens per batch row, and
R = B · S the number of rows, which are the tokens of all batch rows. D is the width of the layers'
input, F the width of the MLP, H the number of query heads, and E the width of a head. There is one
key-value head.

On GPUs of the Hopper architecture and later, a kernel is launched while the previous kernel still
runs, and then waits for its results (`_wait_for_previous_kernel`). `benchmarks/models/few_rows.py`
compares these kernels with PyTorch's and times them.
"""
# mypy: disallow-untyped-defs=False

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MAX_ROWS = 16  # tokens of a batch, together; the height of one product of the tensor cores

# The block sizes are our choice: the fastest of those tried on an H200.
OUTPUTS_PER_PROGRAM = tl.constexpr(8)  # output columns of a program with one matrix product
PAIRED_OUTPUTS_PER_PROGRAM = tl.constexpr(16)  # output columns of each product, if there are two
KEYS_PER_PROGRAM = tl.constexpr(32)  # keys that one program attends to
INPUTS_PER_STEP = tl.constexpr(256)  # input columns that a program multiplies per loop iteration
NUM_WARPS = tl.constexpr(4)  # warps per program
INPUTS_PER_WARP = tl.constexpr(64)  # INPUTS_PER_STEP / NUM_WARPS, a warp's share of the inputs
NUM_STAGES_QKV = 4  # loop iterations whose weights are loaded ahead of their use, per kernel
NUM_STAGES_GATE_UP = 3
NUM_STAGES_ADD_PRODUCT = 6
WIDTH_MULTIPLE = 512  # the kernels' loops need layers whose widths are multiples of this


@dataclass(frozen=True)
class LayerWeights:
    """The tensors of one layer that the kernels read.

    The scales of norms are float32 [D], the weights bfloat16 [out, in].
    """

    attention_norm_scale: Tensor
    mlp_norm_scale: Tensor
    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor


class FewRows:
    """Runs the layers of a `LayerStack` for at most `MAX_ROWS` tokens.

    Args:
        layers: The `FusedLayer`s of the stack. `supports_layers` must accept them.
        num_heads: Number of query heads.
        head_dim: Width of a head.
        eps: Added to the mean square in norms.
        scale: Factor of the attention scores.
    """

    def __init__(
        self, layers: Sequence[Any], num_heads: int, head_dim: int, eps: float, scale: float
    ) -> None:
        self.layers = [_collect_weights(layer) for layer in layers]
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.eps = eps
        self.scale = scale

        device = self.layers[0].attention_norm_scale.device
        is_cuda = device.type == "cuda"
        self.launches_early = is_cuda and torch.cuda.get_device_capability(device) >= (9, 0)

    @staticmethod
    def supports_layers(
        layers: Sequence[Any], num_heads: int, head_dim: int, num_kv_heads: int
    ) -> bool:
        """Return whether the kernels can run these layers on this GPU.

        The kernels need a GPU with bfloat16, and layers of Gemma (not Gemma 2) with one key-value
        head. The linear layers must be bfloat16, without biases and adapters.
        """
        has_fitting_heads = num_kv_heads == 1 and head_dim % 32 == 0
        if not has_fitting_heads or not all(map(_is_supported_layer, layers)):
            return False
        return torch.cuda.is_bf16_supported(including_emulation=False)

    @staticmethod
    def supports_input(x: Tensor, window: Any) -> bool:
        """Return whether x [B, S, D] is bfloat16 with few tokens, and the window has at most two
        blocks."""
        num_rows = x.shape[0] * x.shape[1]
        return x.dtype == torch.bfloat16 and num_rows <= MAX_ROWS and len(window.block_lengths) <= 2

    def __call__(
        self, x: Tensor, rotations: tuple[Tensor, ...], window: Any, bias: Tensor | None
    ) -> Tensor:
        """Run all layers, without the norm after the last one: [B, S, D] -> [B, S, D].

        The arguments are those of `LayerStack.__call__`.
        """
        kernels = _LayerKernels(self, x, rotations, window, bias)
        num_layers = len(self.layers)
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        kernels.prepare_norm(rows, self.layers[0].attention_norm_scale)

        for index, layer in enumerate(self.layers):
            # After the last layer the inputs of a next norm are not used, so any scale will do.
            next_layer = self.layers[(index + 1) % num_layers]

            # Attention. The queries stay in a buffer of `kernels`, in which `attend` finds them.
            kernels.project_qkv(layer.qkv, window.new_key_values[index])
            # Another stream may still be writing the prefix's keys and values of this layer.
            window.wait_for_prefix(index)
            # `visible` has keys and values per block of tokens. The last block sees all of them.
            keys, values = window.visible[index][-1]
            kernels.attend(keys, values)  # writes `kernels.attended`
            rows = kernels.add_product(kernels.attended, layer.out, rows, layer.mlp_norm_scale)

            # The MLP.
            kernels.gelu_gate_up(layer.gate_up)  # writes `kernels.mlp_hidden`
            rows = kernels.add_product(
                kernels.mlp_hidden, layer.down, rows, next_layer.attention_norm_scale
            )
        return rows.view(x.shape)


class _LayerKernels:
    """Sizes and buffers of one pass through the layers, and one method per kernel launch."""

    def __init__(
        self,
        model: FewRows,
        x: Tensor,
        rotations: tuple[Tensor, ...],
        window: Any,
        bias: Tensor | None,
    ) -> None:
        batch, length, width = x.shape  # B, S, D
        self.cos, self.sin = rotations
        self.bias = bias
        self.scale = model.scale
        self.batch = batch
        self.length = length
        self.width = width
        self.num_heads = model.num_heads
        self.head_dim = model.head_dim
        self.num_rows = batch * length
        self.padded_rows = 8 if self.num_rows <= 8 else MAX_ROWS  # Triton needs a power of 2
        self.launch_options = {
            "LAUNCHES_EARLY": model.launches_early,  # read by our kernels
            "launch_pdl": model.launches_early,  # read by Triton
        }

        # A window with two blocks has the state token, which sees the prefix and itself, and the
        # actions, which see all keys. So tokens with an index below `first_block_length`, the
        # number of tokens in the first block, see `first_block_num_keys` keys. The tokens of the
        # second block see all `num_keys` keys. These numbers are the same in all layers.
        num_keys_per_block = [keys.shape[1] for keys, _ in window.visible[0]]
        self.first_block_length = window.block_lengths[0]
        self.first_block_num_keys = num_keys_per_block[0]
        self.num_keys = num_keys_per_block[-1]

        # Attention: the keys are divided into chunks, and a program attends to one chunk, with all
        # query heads of one batch row. It writes partial sums, maxima and masses, which
        # `_attend_to_keys_kernel` explains.
        self.num_chunks = triton.cdiv(self.num_keys, KEYS_PER_PROGRAM.value)
        self.num_queries = length * self.num_heads
        # 16 is the height of one product of the tensor cores.
        self.padded_queries = max(16, triton.next_power_of_2(self.num_queries))
        attention_width = self.num_heads * self.head_dim
        self.query, self.attended = x.new_empty(2, self.num_rows, attention_width).unbind(0)
        partial_shape = (batch, self.num_chunks, self.padded_queries)
        self.partial_sums = x.new_empty(*partial_shape, self.head_dim, dtype=torch.float32)
        self.partial_max, self.partial_mass = x.new_empty(
            2, *partial_shape, dtype=torch.float32
        ).unbind(0)

        # The MLP's hidden layer.
        self.mlp_width = model.layers[0].down.shape[1]
        self.mlp_hidden = x.new_empty(self.num_rows, self.mlp_width)

        self._allocate_norm_inputs(x)
        self.norm_arguments = self._make_norm_arguments(model.eps)

    def _allocate_norm_inputs(self, x: Tensor) -> None:
        """Allocate `scaled` and `squares`, the inputs of a norm (see the module's description).

        The kernels that write them have one program for each `OUTPUTS_PER_PROGRAM` columns, and
        each program writes one part of `squares`. So the number of parts is also the number of
        programs.
        """
        self.num_square_parts = self.width // OUTPUTS_PER_PROGRAM.value
        self.scaled = x.new_empty(self.num_rows, self.width)
        self.squares = x.new_empty(self.num_square_parts, self.padded_rows, dtype=torch.float32)

    def _make_norm_arguments(self, eps: float) -> dict[str, Any]:
        """Return the arguments of the kernels that read the inputs of a norm."""
        return {
            "scaled_ptr": self.scaled,
            "squares_ptr": self.squares,
            "num_rows": self.num_rows,
            "width": self.width,
            "eps": eps,
            "num_square_parts": self.num_square_parts,
            "PADDED_SQUARE_PARTS": triton.next_power_of_2(self.num_square_parts),
            "PADDED_ROWS": self.padded_rows,
        }

    def prepare_norm(self, rows: Tensor, scale: Tensor) -> None:
        """Write `self.scaled` and `self.squares` for the first norm, which reads `rows` [R, D]."""
        num_programs = self.num_square_parts  # each program writes one part of the squares
        _prepare_norm_kernel[(num_programs,)](
            x_ptr=rows,
            scale_ptr=scale,
            scaled_ptr=self.scaled,
            squares_ptr=self.squares,
            num_rows=self.num_rows,
            width=self.width,
            PADDED_ROWS=self.padded_rows,
        )

    def project_qkv(self, weight: Tensor, new_key_values: Tensor) -> None:
        """Write the queries to `self.query`, and keys and values to the cache.

        `new_key_values` [2, B, 1, S, E] is the cache's view for the new tokens.
        """
        num_all_heads = self.num_heads + 2  # the query heads, one key head and one value head
        # A program computes columns of the first half of a head, and their partners in the second.
        num_column_blocks = self.head_dim // 2 // PAIRED_OUTPUTS_PER_PROGRAM.value
        _project_qkv_kernel[(num_all_heads, num_column_blocks)](
            weight_ptr=weight,
            cos_ptr=self.cos,
            sin_ptr=self.sin,
            query_ptr=self.query,
            cache_ptr=new_key_values,
            length=self.length,
            rotation_batch_stride=self.cos.stride(0),
            rotation_token_stride=self.cos.stride(1),
            cache_kind_stride=new_key_values.stride(0),
            cache_batch_stride=new_key_values.stride(1),
            NUM_HEADS=self.num_heads,
            HEAD_DIM=self.head_dim,
            num_stages=NUM_STAGES_QKV,
            **self.norm_arguments,
            **self.launch_options,
        )

    def attend(self, keys: Tensor, values: Tensor) -> None:
        """Write the attention of `self.query` to keys and values [B, num_keys, E].

        The result goes to `self.attended`. Tokens of the window's first block see only the first
        `first_block_num_keys` keys.
        """
        # Without a bias the kernel gets the pointer of the keys instead, and does not read it.
        bias = keys if self.bias is None else self.bias
        _attend_to_keys_kernel[(self.num_chunks, self.batch)](
            query_ptr=self.query,
            keys_ptr=keys,
            values_ptr=values,
            bias_ptr=bias,
            sums_ptr=self.partial_sums,
            max_ptr=self.partial_max,
            mass_ptr=self.partial_mass,
            length=self.length,
            first_block_length=self.first_block_length,
            first_block_num_keys=self.first_block_num_keys,
            num_keys=self.num_keys,
            batch_stride=keys.stride(0),
            bias_stride=bias.stride(0),
            scale=self.scale,
            NUM_HEADS=self.num_heads,
            HEAD_DIM=self.head_dim,
            PADDED_QUERIES=self.padded_queries,
            HAS_BIAS=self.bias is not None,
            **self.launch_options,
        )
        _combine_keys_kernel[(self.num_queries, self.batch)](
            sums_ptr=self.partial_sums,
            max_ptr=self.partial_max,
            mass_ptr=self.partial_mass,
            out_ptr=self.attended,
            num_chunks=self.num_chunks,
            num_queries=self.num_queries,
            PADDED_QUERIES=self.padded_queries,
            HEAD_DIM=self.head_dim,
            PADDED_CHUNKS=triton.next_power_of_2(self.num_chunks),
            **self.launch_options,
        )

    def add_product(
        self, x: Tensor, weight: Tensor, residual: Tensor, next_norm_scale: Tensor
    ) -> Tensor:
        """Return residual + x Wᵀ [R, D].

        The next norm, whose scale is `next_norm_scale`, reads this sum. The norm's inputs are
        written to `self.scaled` and `self.squares`.
        """
        out = torch.empty_like(residual)
        num_programs = self.num_square_parts  # each program writes one part of the squares
        _add_product_kernel[(num_programs,)](
            x_ptr=x,
            weight_ptr=weight,
            residual_ptr=residual,
            scale_ptr=next_norm_scale,
            out_ptr=out,
            scaled_ptr=self.scaled,
            squares_ptr=self.squares,
            num_rows=self.num_rows,
            in_width=x.shape[1],
            out_width=self.width,
            PADDED_ROWS=self.padded_rows,
            num_stages=NUM_STAGES_ADD_PRODUCT,
            **self.launch_options,
        )
        return out

    def gelu_gate_up(self, weight: Tensor) -> None:
        """Write GELU(gate) · up [R, F] to `self.mlp_hidden`."""
        num_column_blocks = self.mlp_width // PAIRED_OUTPUTS_PER_PROGRAM.value
        _gelu_gate_up_kernel[(num_column_blocks,)](
            weight_ptr=weight,
            out_ptr=self.mlp_hidden,
            mlp_width=self.mlp_width,
            num_stages=NUM_STAGES_GATE_UP,
            **self.norm_arguments,
            **self.launch_options,
        )


def _collect_weights(layer: Any) -> LayerWeights:
    """Return the tensors of a `FusedLayer` that the kernels read."""
    return LayerWeights(
        attention_norm_scale=layer.before_attention,
        mlp_norm_scale=layer.before_mlp,
        qkv=_concatenate_weights(layer.qkv),
        out=_concatenate_weights(layer.out),
        gate_up=_concatenate_weights(layer.gate_up),
        down=_concatenate_weights(layer.down),
    )


def _concatenate_weights(fused: Any) -> Tensor:
    """Return the weights of linear layers that read the same input as one tensor [out, in]."""
    if fused.weight is not None:
        return fused.weight
    return torch.cat([layer.weight for layer in fused.layers])


def _is_supported_layer(layer: Any) -> bool:
    if layer.after_mlp is not None:  # Gemma 2
        return False
    for product in (layer.qkv, layer.out, layer.gate_up, layer.down):
        if product.weight is None or product.bias is not None:
            return False
        if product.weight.dtype != torch.bfloat16 or product.weight.shape[1] % WIDTH_MULTIPLE != 0:
            return False
    return True


# --- Parts of kernels ---


@triton.jit
def _wait_for_previous_kernel(LAUNCHES_EARLY: tl.constexpr):
    """Wait for the results of the kernel before, and let the kernel after this one start."""
    if LAUNCHES_EARLY:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def _load_inputs(x_ptr, begin, num_rows, width, PADDED_ROWS: tl.constexpr):
    """Load columns begin … begin + INPUTS_PER_STEP - 1 of the rows x [num_rows, width].

    The result is [NUM_WARPS, PADDED_ROWS, INPUTS_PER_WARP]: each warp has its share of the columns.
    """
    warp = tl.arange(0, NUM_WARPS)[:, None, None]
    row = tl.arange(0, PADDED_ROWS)[None, :, None]
    column = begin + warp * INPUTS_PER_WARP + tl.arange(0, INPUTS_PER_WARP)[None, None, :]
    return tl.load(x_ptr + row * width + column, mask=row < num_rows, other=0.0)


@triton.jit
def _load_weights(weight_ptr, out_column, begin, width):
    """Load the weights of the same input columns for N outputs, [NUM_WARPS, INPUTS_PER_WARP, N].

    The weight is [out, width], and `out_column` [N] has the indices of the outputs.
    """
    warp = tl.arange(0, NUM_WARPS)[:, None, None]
    in_column = begin + warp * INPUTS_PER_WARP + tl.arange(0, INPUTS_PER_WARP)[None, :, None]
    return tl.load(weight_ptr + out_column[None, None, :] * width + in_column)


@triton.jit
def _store_for_norm(
    x, scale_ptr, column, scaled_ptr, squares_ptr, num_rows, width, PADDED_ROWS: tl.constexpr
):
    """Store the inputs of the next norm, for x [PADDED_ROWS, N], which has N columns of all rows.

    scaled[r, c] = x[r, c] · scale[c]        squares[program, r] = Σ_c x[r, c]²

    `column` [N] has the indices of the columns.
    """
    row = tl.arange(0, PADDED_ROWS)
    offset = row[:, None] * width + column[None, :]
    scaled = x * tl.load(scale_ptr + column)[None, :]
    tl.store(scaled_ptr + offset, scaled.to(scaled_ptr.dtype.element_ty), row[:, None] < num_rows)
    tl.store(squares_ptr + tl.program_id(0) * PADDED_ROWS + row, tl.sum(x * x, 1))


@triton.jit
def _multiply_normalized_rows_by_two_weights(
    scaled_ptr, squares_ptr, first_weight_ptr, second_weight_ptr, column,
    num_rows, width, eps, num_square_parts,
    PADDED_SQUARE_PARTS: tl.constexpr, PADDED_ROWS: tl.constexpr, LAUNCHES_EARLY: tl.constexpr,
):  # fmt: skip
    """Multiply the normalized rows with N rows of W₁ and N rows of W₂, both [out, D].

    norm(x) W₁ᵀ = (scaled W₁ᵀ) / √(Σ squares / D + eps), and the same for W₂.

    `column` [N] has the indices of the weights' rows. The two results are [PADDED_ROWS, N] float32.
    """
    # This kernel may have started while the previous kernel still ran. From here on it reads the
    # results of the previous kernel.
    _wait_for_previous_kernel(LAUNCHES_EARLY)

    # Partial sums of squares [PADDED_SQUARE_PARTS, PADDED_ROWS]: one part per program of the kernel
    # that wrote them (see `_store_for_norm`). Their sum over the parts is Σ squares.
    part_index = tl.arange(0, PADDED_SQUARE_PARTS)[:, None]
    squares = tl.load(
        squares_ptr + part_index * PADDED_ROWS + tl.arange(0, PADDED_ROWS)[None, :],
        mask=part_index < num_square_parts,
        other=0.0,
    )

    # Each warp sums the products of its share of the inputs, and the sums of the warps are added at
    # the end. The warps are the first axis: `inputs` is [NUM_WARPS, PADDED_ROWS, INPUTS_PER_WARP].
    first_sums = tl.zeros([NUM_WARPS, PADDED_ROWS, PAIRED_OUTPUTS_PER_PROGRAM], tl.float32)
    second_sums = tl.zeros([NUM_WARPS, PADDED_ROWS, PAIRED_OUTPUTS_PER_PROGRAM], tl.float32)
    for begin in range(0, width, INPUTS_PER_STEP):
        inputs = _load_inputs(scaled_ptr, begin, num_rows, width, PADDED_ROWS)
        first_sums += tl.dot(inputs, _load_weights(first_weight_ptr, column, begin, width))
        second_sums += tl.dot(inputs, _load_weights(second_weight_ptr, column, begin, width))

    inverse_rms = tl.rsqrt(tl.sum(squares, 0) / width + eps)[:, None]
    return tl.sum(first_sums, 0) * inverse_rms, tl.sum(second_sums, 0) * inverse_rms


# --- Kernels ---


@triton.jit
def _prepare_norm_kernel(
    x_ptr, scale_ptr, scaled_ptr, squares_ptr, num_rows, width, PADDED_ROWS: tl.constexpr
):
    """Store the inputs of the first norm, whose rows are x [R, D]: see `_store_for_norm`.

    The inputs of all later norms are stored by `_add_product_kernel`.

    Grid: (D / OUTPUTS_PER_PROGRAM,).
    """
    row = tl.arange(0, PADDED_ROWS)[:, None]
    column = tl.program_id(0) * OUTPUTS_PER_PROGRAM + tl.arange(0, OUTPUTS_PER_PROGRAM)
    x = tl.load(x_ptr + row * width + column[None, :], row < num_rows, other=0.0).to(tl.float32)
    _store_for_norm(x, scale_ptr, column, scaled_ptr, squares_ptr, num_rows, width, PADDED_ROWS)


@triton.jit
def _project_qkv_kernel(
    scaled_ptr, squares_ptr, weight_ptr, cos_ptr, sin_ptr, query_ptr, cache_ptr,
    length, rotation_batch_stride, rotation_token_stride, cache_kind_stride, cache_batch_stride,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    num_rows, width, eps, num_square_parts,
    PADDED_SQUARE_PARTS: tl.constexpr, PADDED_ROWS: tl.constexpr, LAUNCHES_EARLY: tl.constexpr,
):  # fmt: skip
    """Project the normalized rows to queries, keys and values, and rotate queries and keys.

    [q k v] = norm(x) W_qkvᵀ

    W_qkv is [(H + 2) E, D]: first the H query heads, then the key head, then the value head. The
    queries q are stored to `query` [R, H E], and k and v to the cache's view for the new tokens
    [2, B, 1, S, E].

    Rotary embedding of column c < E/2 and its partner c + E/2, where `sin` has the signs of
    `LayerStack.compute_rotary_factors`:
        c:        q_c cos_c + q_{c+E/2} sin_c
        c + E/2:  q_{c+E/2} cos_{c+E/2} + q_c sin_{c+E/2}

    Grid: (H + 2 heads, E / 2 / PAIRED_OUTPUTS_PER_PROGRAM). A program computes columns of a head's
    first half and their partners. Values are not rotated: for them cos is 1 and sin is 0.
    """
    head = tl.program_id(0)
    column = tl.program_id(1) * PAIRED_OUTPUTS_PER_PROGRAM + tl.arange(
        0, PAIRED_OUTPUTS_PER_PROGRAM
    )
    half = HEAD_DIM // 2
    first_weight_ptr = weight_ptr + head * HEAD_DIM * width
    second_weight_ptr = first_weight_ptr + half * width
    first_half, second_half = _multiply_normalized_rows_by_two_weights(
        scaled_ptr, squares_ptr, first_weight_ptr, second_weight_ptr, column,
        num_rows, width, eps, num_square_parts, PADDED_SQUARE_PARTS, PADDED_ROWS, LAUNCHES_EARLY,
    )  # fmt: skip

    # Rotate. Head NUM_HEADS is the key head, NUM_HEADS + 1 the value head. Row r is token
    # r % length of batch row r // length.
    row = tl.arange(0, PADDED_ROWS)[:, None]
    is_row = row < num_rows
    rotation_offset = (
        row // length * rotation_batch_stride
        + row % length * rotation_token_stride
        + column[None, :]
    )
    is_rotated = is_row & (head <= NUM_HEADS)
    dtype = query_ptr.dtype.element_ty
    first_cos = tl.load(cos_ptr + rotation_offset, is_rotated, 1.0)
    first_sin = tl.load(sin_ptr + rotation_offset, is_rotated, 0.0)
    second_cos = tl.load(cos_ptr + rotation_offset + half, is_rotated, 1.0)
    second_sin = tl.load(sin_ptr + rotation_offset + half, is_rotated, 0.0)
    rotated_first = (first_half * first_cos + second_half * first_sin).to(dtype)
    rotated_second = (second_half * second_cos + first_half * second_sin).to(dtype)

    # Store to the queries or to the cache, whose first axis is keys, then values.
    query_out_ptr = query_ptr + row * NUM_HEADS * HEAD_DIM + head * HEAD_DIM + column[None, :]
    tl.store(query_out_ptr, rotated_first, is_row & (head < NUM_HEADS))
    tl.store(query_out_ptr + half, rotated_second, is_row & (head < NUM_HEADS))
    cache_out_ptr = (
        cache_ptr
        + (head - NUM_HEADS) * cache_kind_stride
        + row // length * cache_batch_stride
        + row % length * HEAD_DIM
    )
    tl.store(cache_out_ptr + column[None, :], rotated_first, is_row & (head >= NUM_HEADS))
    tl.store(cache_out_ptr + column[None, :] + half, rotated_second, is_row & (head >= NUM_HEADS))


@triton.jit
def _attend_to_keys_kernel(
    query_ptr, keys_ptr, values_ptr, bias_ptr, sums_ptr, max_ptr, mass_ptr,
    length, first_block_length, first_block_num_keys, num_keys, batch_stride, bias_stride, scale,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_QUERIES: tl.constexpr,
    HAS_BIAS: tl.constexpr, LAUNCHES_EARLY: tl.constexpr,
):  # fmt: skip
    """Attend with all query heads of a batch row's tokens to a chunk of KEYS_PER_PROGRAM keys.

    The results are a part of the softmax over all keys, with k over the chunk's keys:

        s    = scale · q Kᵀ + bias
        max  = max_k s_k
        mass = Σ_k exp(s_k - max)
        sums = Σ_k exp(s_k - max) V_k

    q is [S H, E] (for each token all heads), K and V are [KEYS_PER_PROGRAM, E]. The results are
    float32: sums [B, chunks, PADDED_QUERIES, E], max and mass [B, chunks, PADDED_QUERIES].

    Tokens with an index below `first_block_length` see the first `first_block_num_keys` keys, the
    other tokens all `num_keys` keys.

    Grid: (chunks of keys, B).
    """
    _wait_for_previous_kernel(LAUNCHES_EARLY)
    chunk = tl.program_id(0)
    batch = tl.program_id(1)
    query_row = tl.arange(0, PADDED_QUERIES)
    key = chunk * KEYS_PER_PROGRAM + tl.arange(0, KEYS_PER_PROGRAM)
    column = tl.arange(0, HEAD_DIM)[None, :]
    is_query = query_row < length * NUM_HEADS
    query = tl.load(
        query_ptr + (batch * length * NUM_HEADS + query_row)[:, None] * HEAD_DIM + column,
        mask=is_query[:, None],
        other=0.0,
    )
    key_offset = batch * batch_stride + key[:, None] * HEAD_DIM + column
    keys = tl.load(keys_ptr + key_offset, mask=key[:, None] < num_keys, other=0.0)
    values = tl.load(values_ptr + key_offset, mask=key[:, None] < num_keys, other=0.0)

    scores = tl.dot(query, tl.trans(keys)) * scale  # [PADDED_QUERIES, KEYS_PER_PROGRAM]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + batch * bias_stride + key, mask=key < num_keys, other=0.0)
        scores += bias[None, :]
    is_in_first_block = query_row // NUM_HEADS < first_block_length
    num_visible = tl.where(is_in_first_block, first_block_num_keys, num_keys)
    # The score of keys that are not seen is finite, because with -inf the weights of a query that
    # sees no key of the chunk would be NaN.
    scores = tl.where(key[None, :] < num_visible[:, None], scores, -1e30)

    max_score = tl.max(scores, 1)
    weights = tl.exp(scores - max_score[:, None])
    out_row = (batch * tl.num_programs(0) + chunk) * PADDED_QUERIES + query_row
    tl.store(max_ptr + out_row, max_score)
    tl.store(mass_ptr + out_row, tl.sum(weights, 1))
    sums = tl.dot(weights.to(values.dtype), values)
    tl.store(sums_ptr + out_row[:, None] * HEAD_DIM + column, sums)


@triton.jit
def _combine_keys_kernel(
    sums_ptr, max_ptr, mass_ptr, out_ptr, num_chunks, num_queries,
    PADDED_QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_CHUNKS: tl.constexpr,
    LAUNCHES_EARLY: tl.constexpr,
):  # fmt: skip
    """Combine the results of `_attend_to_keys_kernel` for all chunks c of keys, for one query.

        w_c = exp(max_c - maximum over all chunks)
        out = Σ_c w_c sums_c / Σ_c w_c mass_c        [B S H, E]

    Grid: (S H queries, B).
    """
    _wait_for_previous_kernel(LAUNCHES_EARLY)
    query_row = tl.program_id(0)
    batch = tl.program_id(1)
    chunk = tl.arange(0, PADDED_CHUNKS)
    column = tl.arange(0, HEAD_DIM)
    in_row = (batch * num_chunks + chunk) * PADDED_QUERIES + query_row
    is_chunk = chunk < num_chunks
    max_score = tl.load(max_ptr + in_row, mask=is_chunk, other=float("-inf"))
    weight = tl.exp(max_score - tl.max(max_score, 0))
    chunk_mass = tl.load(mass_ptr + in_row, mask=is_chunk, other=0.0)
    mass = tl.sum(weight * chunk_mass, 0)
    sums = tl.load(
        sums_ptr + in_row[:, None] * HEAD_DIM + column[None, :], mask=is_chunk[:, None], other=0.0
    )
    attended = tl.sum(sums * weight[:, None], 0) / mass
    tl.store(
        out_ptr + (batch * num_queries + query_row) * HEAD_DIM + column,
        attended.to(out_ptr.dtype.element_ty),
    )


@triton.jit
def _add_product_kernel(
    x_ptr, weight_ptr, residual_ptr, scale_ptr, out_ptr, scaled_ptr, squares_ptr,
    num_rows, in_width, out_width, PADDED_ROWS: tl.constexpr, LAUNCHES_EARLY: tl.constexpr,
):  # fmt: skip
    """Multiply, add the residual, and store the inputs of the next norm (`_store_for_norm`).

    out = residual + x Wᵀ

    x is [R, in_width], W [out_width, in_width], and residual and out are [R, out_width].

    Grid: (out_width / OUTPUTS_PER_PROGRAM,).
    """
    row = tl.arange(0, PADDED_ROWS)[:, None]
    column = tl.program_id(0) * OUTPUTS_PER_PROGRAM + tl.arange(0, OUTPUTS_PER_PROGRAM)
    offset = row * out_width + column[None, :]
    _wait_for_previous_kernel(LAUNCHES_EARLY)
    residual = tl.load(residual_ptr + offset, mask=row < num_rows, other=0.0)

    sums = tl.zeros([NUM_WARPS, PADDED_ROWS, OUTPUTS_PER_PROGRAM], tl.float32)
    for begin in range(0, in_width, INPUTS_PER_STEP):
        inputs = _load_inputs(x_ptr, begin, num_rows, in_width, PADDED_ROWS)
        sums += tl.dot(inputs, _load_weights(weight_ptr, column, begin, in_width))

    out = (tl.sum(sums, 0) + residual.to(tl.float32)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offset, out, mask=row < num_rows)
    _store_for_norm(
        out.to(tl.float32),
        scale_ptr,
        column,
        scaled_ptr,
        squares_ptr,
        num_rows,
        out_width,
        PADDED_ROWS,
    )


@triton.jit
def _gelu_gate_up_kernel(
    scaled_ptr, squares_ptr, weight_ptr, out_ptr, mlp_width,
    num_rows, width, eps, num_square_parts,
    PADDED_SQUARE_PARTS: tl.constexpr, PADDED_ROWS: tl.constexpr, LAUNCHES_EARLY: tl.constexpr,
):  # fmt: skip
    """The first half of the MLP, with GELU by its tanh approximation.

        gate = norm(x) W_gateᵀ
        up   = norm(x) W_upᵀ
        out  = GELU(gate) · up

    W_gate and W_up are the halves of W [2 F, D]; out is [R, F].
    GELU(x) ≈ ½ x (1 + tanh u) = x σ(2u) with u = √(2/π) (x + 0.044715 x³).

    Grid: (F / PAIRED_OUTPUTS_PER_PROGRAM,).
    """
    column = tl.program_id(0) * PAIRED_OUTPUTS_PER_PROGRAM + tl.arange(
        0, PAIRED_OUTPUTS_PER_PROGRAM
    )
    up_weight_ptr = weight_ptr + mlp_width * width
    gate, up = _multiply_normalized_rows_by_two_weights(
        scaled_ptr, squares_ptr, weight_ptr, up_weight_ptr, column,
        num_rows, width, eps, num_square_parts, PADDED_SQUARE_PARTS, PADDED_ROWS, LAUNCHES_EARLY,
    )  # fmt: skip
    row = tl.arange(0, PADDED_ROWS)[:, None]
    # GELU(gate) = gate · σ(2u), where 1.5957691216057308 is 2 √(2/π).
    activated = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    tl.store(
        out_ptr + row * mlp_width + column[None, :],
        (activated * up).to(out_ptr.dtype.element_ty),
        mask=row < num_rows,
    )
