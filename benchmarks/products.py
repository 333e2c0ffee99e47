"""Products of few rows on a CPU: PyTorch's own, oneDNN's, and oneDNN's with weights in its own layout.

    python benchmarks/products.py

`spear.models.linear` chooses between them. Prints microseconds per product, the best of some rounds, one thread, as
PyTorch's own / oneDNN's / packed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import torch
import tyro

WIDTHS = ((192, 320), (192, 1152), (512, 512), (512, 1280), (1024, 4096))
"""(in, out): of nano's layers, small's, and spear1's expert."""


def best(run: Callable[[], object], repeats: int, rounds: int = 6) -> float:
    """Microseconds of processor time."""
    run()
    times = []
    for _ in range(rounds):
        begun = time.process_time()
        for _ in range(repeats):
            run()
        times.append((time.process_time() - begun) / repeats)
    return 1e6 * min(times)


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
        "| dtype | in × out | " + " | ".join(f"{n} rows" for n in rows) + " |\n|" + "---|" * (len(rows) + 2)
    )
    for kind in dtypes:
        for width, out in WIDTHS:
            weight = torch.randn(out, width).to(getattr(torch, kind))
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
            cells = []
            for count in rows:
                x = torch.randn(count, width).to(weight.dtype)
                repeats = max(2, int(1e7 / (count * width * out + 2e5)))
                ways = (
                    lambda: torch.nn.functional.linear(x, weight),  # noqa: B023
                    lambda: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""),  # noqa: B023
                    lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""),  # noqa: B023
                )
                cells.append(" / ".join(f"{best(way, repeats):.0f}" for way in ways))
            print(f"| {kind} | {width} × {out} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
