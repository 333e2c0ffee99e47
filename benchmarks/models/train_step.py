"""A training step of the policy: ours against Transformers' π0, same geometry, same weights, same frozen
parts.

    python benchmarks/models/train_step.py --presets nano small
    python benchmarks/models/train_step.py --device cuda --presets spear1 --batch-size 16 --alone

Forward, backward and a fused AdamW step on one batch in memory, in bfloat16 by autocast or in float32, runs
in turn. One flow sample per observation on both sides. MFU: 6 operations per learning weight and token (4
through frozen ones that gradients pass, 2 elsewhere), and attention's, over the measured peak.
"""

from __future__ import annotations

import sys
from typing import Any, Literal

import torch
import tyro
from torch import nn

from pi0_pair import observation, one, pair, reduced
from spear.cli import run_reporting_errors
from spear.doctor import measure_machine
from spear.types import Action
from timing import Times, race

TEXT = 48
Frozen = Literal["none", "vision", "vlm"]


def freeze(vlm: nn.Module, frozen: Frozen) -> None:
    """Both sides' VLMs have the same names."""
    for name, parameter in vlm.named_parameters():
        parameter.requires_grad_(
            frozen == "none" or (frozen == "vision" and not name.startswith("vision_tower"))
        )


def operations(ours: Any, tokens: int, views: int, batch: int) -> float:
    """Of a step: matrix products and attention, forward and backward."""
    config = ours.config.vlm_config
    length = views * tokens + TEXT

    def of(part: nn.Module, rows: int, seen: int, width: int, layers: int, before: bool) -> float:
        """before: something before this part learns, so that gradients pass through it."""
        weights = [p for p in part.parameters() if p.dim() > 1]
        learning = sum(p.numel() for p in weights if p.requires_grad)
        count = sum(p.numel() for p in weights)
        back = learning + (count if before or learning else 0)
        attention = 4 * layers * rows * seen * width
        return 2 * rows * (count + back) + attention * (3 if before or learning else 1)

    text, vision, expert = config.text_config, config.vision_config, ours.config.expert_config
    wide = text.num_attention_heads * text.head_dim
    tower = ours.vlm.vision_tower
    learned = any(p.requires_grad for p in tower.parameters())
    suffix = 1 + ours.config.horizon
    parts = [
        of(tower, views * tokens, tokens, vision.hidden_size, vision.num_hidden_layers, False),
        of(ours.vlm.language_model.layers, length, length, wide, text.num_hidden_layers, learned),
        of(ours.expert, suffix, length + suffix, wide, expert.num_hidden_layers, True),
    ]
    return batch * sum(parts)


def main(
    presets: tuple[Literal["nano", "small", "mid", "spear1"], ...] = ("nano", "small"),
    frozen: tuple[Frozen, ...] = ("none", "vision", "vlm"),
    batch_size: int = 4,
    views: int = 2,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    device: Literal["cpu", "cuda"] = "cpu",
    layers: int | None = None,
    repeats: int = 5,
    threads: int | None = None,
    processor_time: bool = False,
    alone: bool = False,
) -> None:
    """Measure, and print a table.

    Args:
        presets: geometries. frozen: the parts that do not learn. batch_size: observations per step.
        dtype: bfloat16 is float32 weights under autocast. layers: at most so many per network.
        repeats: of either side. threads: of PyTorch on a CPU.
        processor_time: processor time instead of the clock's, for a busy machine (CPU).
        alone: without π0: both at full size need more memory than a GPU has.
    """
    if threads:
        torch.set_num_threads(threads)
    limit = measure_machine(device, getattr(torch, dtype), processor_time)
    print(
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {dtype}, batch "
        f"{batch_size};"
    )
    print(f"peak {limit.flops_per_s / 1e12:.3f} T operations/s; milliseconds\n")
    names = ["preset", "frozen", "ours", "π0", "π0 / ours", "MFU of ours", "MFU of π0"]
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for name in presets:
        size = reduced(name, layers)
        tokens = (size.vision["image_size"] // size.vision["patch_size"]) ** 2
        for what in frozen:
            ours, theirs = (one(size, device=device), None) if alone else pair(size, device=device)
            mine, given = observation(size, views, batch_size, TEXT, torch.float32, device)
            noise = mine.pop("noise").to_vector()
            time = torch.rand(batch_size, 1, device=device)
            target = torch.randn(batch_size, size.horizon, 8, device=device)
            target[..., 3:7] = nn.functional.normalize(target[..., 3:7], dim=-1)
            losses = {
                "ours": lambda: (
                    ours(  # noqa: B023
                        **mine,  # noqa: B023
                        actions=Action.from_vector(target),  # noqa: B023
                        noise=Action.from_vector(noise[:, None]),  # noqa: B023
                        time=time,  # noqa: B023
                    ).loss
                ),
                "π0": lambda: theirs(  # type: ignore[misc]  # noqa: B023
                    **given,  # noqa: B023
                    actions=target,  # noqa: B023
                    timestep=1 - time[:, 0],  # noqa: B023
                ).loss.mean(),
            }
            runs = {}
            for side, model in (("ours", ours), *([] if theirs is None else [("π0", theirs)])):
                freeze(model.vlm if side == "ours" else model.model.vlm, what)
                learning = [p for p in model.train().parameters() if p.requires_grad]
                optimizer = torch.optim.AdamW(learning, lr=1e-6, fused=True)

                def step(side: str = side, optimizer: Any = optimizer) -> None:
                    with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
                        loss = losses[side]()  # noqa: B023
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()

                runs[side] = step
            found = race(runs, device, repeats, processor_time, warm_ups=1)
            flops = operations(ours, tokens, views, batch_size)
            a, b = found["ours"], found.get("π0", "–")
            both = isinstance(a, Times) and isinstance(b, Times)
            ratio = f"{b.median / a.median:.2f}" if both else "–"  # type: ignore[union-attr]
            use = [
                f"{flops / (t.median / 1000) / limit.flops_per_s:.0%}"
                if isinstance(t, Times)
                else "–"
                for t in (a, b)
            ]
            label = name + (f" ({layers} layers)" if layers else "")
            print(f"| {label} | {what} | {a} | {b} | {ratio} | {use[0]} | {use[1]} |", flush=True)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
