"""A flow step's few tokens through the expert's layers on a GPU: our kernels and PyTorch's, as CUDA graphs.

    python benchmarks/models/few_rows.py                                    # on a GPU, spear1, bfloat16
    TRITON_INTERPRET=1 python benchmarks/models/few_rows.py --device cpu    # small, float32, only compared

The roofline is the bytes of the weights over the bandwidth measured here. (Needs Triton;
its interpreter needs NumPy before 2.4.)
"""

import sys
from functools import partial
from typing import Any, Literal

import torch
import tyro
from transformers import GemmaConfig

from pi0_pair import relative
from spear.cli import run_reporting_errors
from spear.doctor import measure_machine
from spear.models.fast.cuda_graphs import CudaGraphCache
from spear.models.fast.few_rows import FewRows
from spear.models.fast.stack import LayerStack
from spear.models.layers import build_language_model
from spear.models.presets import PRESETS, SPECIAL_TOKEN_IDS
from timing import race


def main(
    device: Literal["cuda", "cpu"] = "cuda", prefix: int = 412, batch: int = 1, repeats: int = 50
) -> None:
    """Compare, and on a GPU measure.

    Args:
        device: cpu only with TRITON_INTERPRET=1. prefix: tokens before the state and the actions.
        batch: observations at once, at most 2. repeats: of each, in turn.
    """
    size, kind = PRESETS["spear1"], torch.bfloat16 if device == "cuda" else torch.float32
    small = {"num_hidden_layers": 2, "hidden_size": 512, "intermediate_size": 1024, "head_dim": 64}
    fields = size.expert if device == "cuda" else {**size.expert, **small}
    torch.manual_seed(0)
    with torch.device(device), torch.no_grad():
        config: Any = GemmaConfig(**{**fields, "vocab_size": 1, **dict.fromkeys(SPECIAL_TOKEN_IDS)})
        model: Any = build_language_model(config)
        model.to(kind).eval()
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.normal_(0, 0.2)
        stack = LayerStack(model, compiled=device == "cuda")
        few = FewRows(stack.layers, stack.num_heads, stack.head_dim, stack.eps, stack.scale)
        length = 1 + size.horizon
        end = prefix + length
        held = stack.allocate_cache(batch, end, kind, torch.device(device)).buffer.normal_()
        places = prefix + torch.arange(length).expand(batch, length)
        turns = stack.compute_rotations(places, kind)
        x = torch.randn(batch, length, model.config.hidden_size, dtype=kind)
        bias = torch.zeros(batch, 1, end, dtype=kind)
        bias[..., prefix - 10 : prefix] = torch.finfo(kind).min  # padding
    caches = [stack.allocate_cache(batch, end, kind, x.device) for _ in range(2)]
    windows = []
    for cache in caches:
        cache.buffer.copy_(held)
        windows.append(cache.make_window(prefix, [(1, prefix + 1), (size.horizon, end)]))
    stack.few_rows = None
    ways: dict[str, Any] = {
        "PyTorch's kernels": lambda given: stack(given["x"], turns, windows[0], bias),
        "ours": lambda given: stack._norm(
            few(given["x"], turns, windows[1], bias), stack.last_norm_scale
        ),
    }
    if device == "cuda":
        graphs = {name: CudaGraphCache() for name in ways}
        ways = {name: partial(graphs[name], way) for name, way in ways.items()}
    with torch.inference_mode():
        truth, found = (way({"x": x}) for way in ways.values())
        kept = relative(caches[1].buffer, caches[0].buffer)
        print(
            f"difference: {relative(found, truth):.1e} of the largest value; in the cache {kept:.1e}"
        )
        if device == "cpu":
            return
        ten = {name: lambda w=way: [w({"x": x}) for _ in range(10)] for name, way in ways.items()}
        times = race(ten, device, repeats)
    weights = sum(p.numel() * p.element_size() for p in model.layers.parameters())
    for name, taken in times.items():
        print(f"{name}: {taken} ms for ten flow steps")
    least = 1000 * measure_machine(device, kind).least_seconds(*[(0, weights)] * 10)
    print(f"roofline: {least:.1f} ms; {torch.cuda.get_device_name()}")


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
