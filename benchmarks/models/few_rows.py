"""A flow step's few tokens through the expert's layers on a GPU: our Triton kernels against
PyTorch's, as CUDA graphs.

    python benchmarks/models/few_rows.py                                    # on a GPU
    TRITON_INTERPRET=1 python benchmarks/models/few_rows.py --device cpu    # only compared

The GPU runs spear1's expert in bfloat16, the interpreter a small one in float32.
The roofline is the bytes of the weights over the bandwidth measured here. Triton is needed; its
interpreter needs NumPy before 2.4.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from transformers import GemmaConfig

from pi0_pair import relative_difference
from spear.cli import run_reporting_errors
from spear.doctor import measure_machine
from spear.models.fast.cuda_graphs import CudaGraphCache, Inputs
from spear.models.fast.few_rows import FewRows
from spear.models.fast.kv_cache import CacheWindow, StaticKVCache, TokenBlock
from spear.models.fast.stack import LayerStack
from spear.models.layers import build_language_model
from spear.models.presets import PRESETS, SPECIAL_TOKEN_IDS
from timing import race

NUM_FLOW_STEPS = 10
NUM_PADDING = 10  # tokens at the end of the prefix
SMALL_SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "head_dim": 64,
}
"""For Triton's interpreter, which is slow."""

Implementation = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class FlowStep:
    """What a flow step reads.

    x          embeddings of the state and the actions.
    rotations  of their positions.
    bias       the mask of padding.
    cache      the KV cache, filled up to the end of the prefix.
    prefix     number of tokens of the prefix.
    """

    x: Tensor
    rotations: tuple[Tensor, ...]
    bias: Tensor
    cache: StaticKVCache
    prefix: int

    def copy_cache(self, stack: LayerStack) -> tuple[StaticKVCache, CacheWindow]:
        """Return a copy of the cache, and its window for the state and the actions."""
        batch, length = self.x.shape[:2]
        end = self.prefix + length
        copy = stack.allocate_cache(batch, end, self.x.dtype, self.x.device)
        copy.buffer.copy_(self.cache.buffer)
        # The state sees the prefix and itself; the actions see everything.
        blocks = [
            TokenBlock(num_tokens=1, visible_end=self.prefix + 1),
            TokenBlock(num_tokens=length - 1, visible_end=end),
        ]
        return copy, copy.make_window(self.prefix, blocks)


def make_expert(device: str, dtype: torch.dtype) -> Any:
    """Return an action expert with random weights, norms included."""
    fields = dict(PRESETS["spear1"].expert)
    if device == "cpu":
        fields |= SMALL_SIZES
    fields |= dict.fromkeys(SPECIAL_TOKEN_IDS)
    config: Any = GemmaConfig(**{**fields, "vocab_size": 1})
    model: Any = build_language_model(config)
    model.to(dtype).eval()
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.normal_(0, 0.2)
    return model


def make_flow_step(stack: LayerStack, prefix: int, batch: int, x: Tensor) -> FlowStep:
    length = x.shape[1]
    end = prefix + length
    cache = stack.allocate_cache(batch, end, x.dtype, x.device)
    cache.buffer.normal_()
    positions = prefix + torch.arange(length).expand(batch, length)
    bias = torch.zeros(batch, 1, end, dtype=x.dtype)
    bias[..., prefix - NUM_PADDING : prefix] = torch.finfo(x.dtype).min
    return FlowStep(x, stack.compute_rotary_factors(positions, x.dtype), bias, cache, prefix)


def main(
    device: Literal["cuda", "cpu"] = "cuda", prefix: int = 412, batch: int = 1, repeats: int = 50
) -> None:
    """Compare, and on a GPU measure.

    Args:
        device: cpu only with TRITON_INTERPRET=1. prefix: tokens before the state and the actions.
        batch: observations at once, at most 2. repeats: of each, in turn.
    """
    is_gpu = device == "cuda"
    dtype = torch.bfloat16 if is_gpu else torch.float32
    torch.manual_seed(0)
    with torch.device(device), torch.no_grad():
        model = make_expert(device, dtype)
        stack = LayerStack(model, compiled=is_gpu)
        stack.few_rows = None  # so that `stack` computes with PyTorch's kernels
        few_rows = FewRows(stack.layers, stack.num_heads, stack.head_dim, stack.eps, stack.scale)
        num_tokens = 1 + PRESETS["spear1"].horizon  # the state and the actions
        x = torch.randn(batch, num_tokens, model.config.hidden_size, dtype=dtype)
        step = make_flow_step(stack, prefix, batch, x)
    pytorch_cache, pytorch_window = step.copy_cache(stack)
    our_cache, our_window = step.copy_cache(stack)

    def run_pytorch(inputs: Inputs) -> Tensor:
        return stack(inputs["x"], step.rotations, pytorch_window, step.bias)

    def run_ours(inputs: Inputs) -> Tensor:
        output = few_rows(inputs["x"], step.rotations, our_window, step.bias)
        return stack._norm(output, stack.last_norm_scale)

    implementations: dict[str, Implementation] = {
        "PyTorch's kernels": run_pytorch,
        "ours": run_ours,
    }
    if is_gpu:
        for name, run in implementations.items():
            implementations[name] = partial(CudaGraphCache(), run)

    with torch.inference_mode():
        expected, actual = [run({"x": step.x}) for run in implementations.values()]
        difference = relative_difference(actual, expected)
        cache_difference = relative_difference(our_cache.buffer, pytorch_cache.buffer)
        print(
            f"difference: {difference:.1e} of the largest value;"
            f" in the cache {cache_difference:.1e}"
        )
        if is_gpu:
            measure(implementations, step.x, repeats)
            print_roofline(model, device, dtype)


def measure(implementations: dict[str, Implementation], x: Tensor, repeats: int) -> None:
    """Print the time of all flow steps with each implementation."""

    def run_flow(run: Implementation) -> None:
        for _ in range(NUM_FLOW_STEPS):
            run({"x": x})

    contenders = {name: partial(run_flow, run) for name, run in implementations.items()}
    for name, times in race(contenders, "cuda", repeats).items():
        print(f"{name}: {times} ms for {NUM_FLOW_STEPS} flow steps")


def print_roofline(model: Any, device: str, dtype: torch.dtype) -> None:
    weight_bytes = sum(p.numel() * p.element_size() for p in model.layers.parameters())
    phases = [(0.0, float(weight_bytes))] * NUM_FLOW_STEPS
    least_ms = 1000 * measure_machine(device, dtype).compute_least_seconds(*phases)
    print(f"roofline: {least_ms:.1f} ms; {torch.cuda.get_device_name()}")


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
