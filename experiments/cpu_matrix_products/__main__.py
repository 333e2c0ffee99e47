"""Products of few rows on a CPU: PyTorch's own, with weights as [in, out] too, oneDNN's, and with its own
layout.

    python -m experiments.cpu_matrix_products

`spear.models.fast.linear` chooses between them. Prints microseconds per product, the best of some rounds, one
thread, as PyTorch's own / [in, out] / oneDNN's / packed. Like the layers of a network, the weights take
turns: 50 MB of them in float32, more than a core's own caches hold.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
import tyro

from spear.cli import run_reporting_errors

WIDTHS = ((192, 320), (192, 1152), (512, 512), (512, 1280), (1024, 4096))
"""(in, out): of nano's layers, small's, and spear1's expert."""


ELEMENTS = 12_500_000
"""Of the weights that take turns."""


def best(
    run: Callable[[torch.Tensor], object],
    weights: Sequence[torch.Tensor],
    repeats: int,
    rounds: int = 6,
) -> float:
    """Microseconds of processor time per weight."""
    times = []
    for _ in range(rounds + 1):
        begun = time.process_time()
        for _ in range(repeats):
            for weight in weights:
                run(weight)
        times.append((time.process_time() - begun) / (repeats * len(weights)))
    return 1e6 * min(times[1:])


def _onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


@torch.inference_mode()
def main(
    rows: tuple[int, ...] = (1, 5, 8, 320),
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16"),
) -> None:
    """Measure, and print a table.

    Args:
        rows: of the inputs. dtypes: of inputs and weights.
    """
    torch.set_num_threads(1)
    print(
        "| dtype | in × out | "
        + " | ".join(f"{n} rows" for n in rows)
        + " |\n|"
        + "---|" * (len(rows) + 2)
    )
    for kind in dtypes:
        for width, out in WIDTHS:
            count = -(-ELEMENTS // (width * out))
            weights = [torch.randn(out, width).to(getattr(torch, kind)) for _ in range(count)]
            turned = [weight.T.contiguous().T for weight in weights]
            packed = [torch.ops.mkldnn._reorder_linear_weight(weight, None) for weight in weights]
            cells = []
            for many in rows:
                x = torch.randn(many, width).to(weights[0].dtype)
                repeats = 3 if many < 100 else 1
                own = partial(torch.nn.functional.linear, x)
                onednn = partial(_onednn, x)
                ways = ((own, weights), (own, turned), (onednn, weights), (onednn, packed))
                cells.append(" / ".join(f"{best(run, each, repeats):.0f}" for run, each in ways))
            print(f"| {kind} | {width} × {out} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
