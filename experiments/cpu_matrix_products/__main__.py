"""Which library multiplies a few rows with a weight matrix fastest on a CPU?

    python -m experiments.cpu_matrix_products

`spear.models.fast.linear` chooses by the result. Printed are microseconds per product on one
thread, the best of some rounds, as PyTorch's own / PyTorch's with weights as [in, out] / oneDNN's /
oneDNN's with its own weight layout. Like the layers of a network, the weights take turns: 50 MB of
them in float32, more than a core's own caches hold.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import tyro
from torch import Tensor

from spear.cli import run_reporting_errors

WEIGHT_SHAPES = ((192, 320), (192, 1152), (512, 512), (512, 1280), (1024, 4096))
"""(in, out) of nano's layers, small's, and spear1's expert."""
NUM_WEIGHT_ELEMENTS = 12_500_000  # of all weights that take turns
NUM_ROUNDS = 6
FEW_ROWS = 100  # inputs with fewer rows are repeated
NUM_REPEATS = 3


def measure_us(product: Callable[[Tensor], object], weights: Sequence[Tensor], repeats: int) -> str:
    """Processor time per product, microseconds, the best of some rounds after one to warm up."""
    times_s = []
    for _ in range(NUM_ROUNDS + 1):
        start = time.process_time()
        for _ in range(repeats):
            for weight in weights:
                product(weight)
        times_s.append((time.process_time() - start) / (repeats * len(weights)))
    return f"{1e6 * min(times_s[1:]):.0f}"


def multiply_onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def compare_products(num_rows: int, weights: Sequence[Tensor]) -> str:
    """The times of all products of an input with weights [out, in], as text."""
    in_width = weights[0].shape[1]
    x = torch.randn(num_rows, in_width).to(weights[0].dtype)
    repeats = NUM_REPEATS if num_rows < FEW_ROWS else 1

    def multiply_torch(weight: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, weight)

    def multiply(weight: Tensor) -> Tensor:
        return multiply_onednn(x, weight)

    transposed = [weight.T.contiguous().T for weight in weights]
    packed = [torch.ops.mkldnn._reorder_linear_weight(weight, None) for weight in weights]
    times = [
        measure_us(multiply_torch, weights, repeats),
        measure_us(multiply_torch, transposed, repeats),
        measure_us(multiply, weights, repeats),
        measure_us(multiply, packed, repeats),
    ]
    return " / ".join(times)


@torch.inference_mode()
def main(
    rows: tuple[int, ...] = (1, 5, 8, 320),
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16"),
) -> None:
    """Measure, and print a table.

    Args:
        rows: of the inputs.
        dtypes: of inputs and weights.
    """
    torch.set_num_threads(1)
    headers = " | ".join(f"{num_rows} rows" for num_rows in rows)
    print(f"| dtype | in × out | {headers} |")
    print("|" + "---|" * (len(rows) + 2))
    for dtype in dtypes:
        for in_width, out_width in WEIGHT_SHAPES:
            num_weights = math.ceil(NUM_WEIGHT_ELEMENTS / (in_width * out_width))
            weights = []
            for _ in range(num_weights):
                weights.append(torch.randn(out_width, in_width).to(getattr(torch, dtype)))
            cells = [compare_products(num_rows, weights) for num_rows in rows]
            print(f"| {dtype} | {in_width} × {out_width} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
