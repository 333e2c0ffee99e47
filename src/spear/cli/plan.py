"""`spear plan`: what a recipe needs of a GPU, before anything is rented or waited for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spear.errors import SpearError
from spear.train.options import PlanOptions

if TYPE_CHECKING:
    from spear.train.memory import Memory

SIZES = ("8GB", "16GB", "24GB", "48GB", "80GB", "141GB")
ROWS = {
    "full fine-tuning": "post-train-bridge",
    "LoRA": "finetune-lora",
    "expert only": "finetune-expert",
}
GIB = 2**30


def plan(options: PlanOptions) -> None:
    """Say whether a recipe fits on a GPU, what takes the memory, and which settings make it fit.

    Needs no GPU and no weights: one training step of the real code is run on tensors without contents, and
    what is alive is added up. Acting is planned too, as the recipe named inference.

    Examples:
        spear plan --recipe finetune-lora --gpu 16GB
        spear plan --recipe post-train-bridge --gpu 48GB --set ema=0
        spear plan --recipe inference --gpu 8GB
        spear plan --table
    """
    from spear.models.presets import preset
    from spear.train import memory
    from spear.train.recipes import recipe
    from spear.util.options import key_values

    if options.table:
        print(_table(options.preset or "spear1"))
        return
    capacity = memory.usable(options.gpu)
    changes = key_values(options.set, "--set") | {"preset": options.preset, "batch_size": options.batch_size}
    if options.recipe == "inference":
        if options.set:
            raise SpearError("--set changes recipes, and inference is none: leave it out")
        for name, needed in _acting(options.preset or "spear1", options.batch_size or 1).items():
            parts = f"weights {_gib(needed.weights)} + activations {_gib(needed.activations)}"
            word = "fits" if needed.total <= capacity else "does not fit"
            print(
                f"{name:<9} {parts} = {_gib(needed.total)}: {word} in {options.gpu} (usable {_gib(capacity)})"
            )
        return
    stage = recipe(options.recipe).changed(**changes)
    preset(stage.preset)
    opt = stage.optimization
    print(f"{stage.name}, {stage.preset}, batch {stage.batch_size} in {opt.accumulate} pieces\n")
    for changes, needed in memory.plans(stage):
        if not changes:
            print(f"{_parts(needed)}\n\nusable of {options.gpu}: {_gib(capacity)}")
        if needed.total <= capacity:
            extra = f"does not fit as it is; fits with {memory.flags(changes)}: {_gib(needed.total)}"
            print(extra if changes else "fits")
            return
    print(f"does not fit even with {memory.flags(changes)}: {_gib(needed.total)}")


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def _parts(needed: Memory) -> str:
    rows = {
        f"weights ({needed.parameters / 1e9:.2f} B, {needed.learning / 1e9:.2f} B learn)": needed.weights,
        "gradients": needed.gradients,
        "optimiser": needed.moments,
        "averaged weights": needed.averaged,
        "activations, temporaries": needed.activations,
        "together": needed.total,
    }
    return "\n".join(f"{name:<34} {size / GIB:8.2f} GiB" for name, size in rows.items())


def _acting(size: str, batch: int) -> dict[str, Memory]:
    """What acting needs, by precision."""
    import torch

    from spear.models.presets import preset
    from spear.train import memory

    return {
        name: memory.inference(preset(size), getattr(torch, name), batch) for name in ("bfloat16", "float32")
    }


def _table(size: str) -> str:
    """Markdown: ways to train and to act, by size of GPU."""
    from spear.train import memory
    from spear.train.recipes import recipe

    def cell(plans: list[tuple[dict[str, object], Memory]], gpu: str) -> str:
        for changes, needed in plans:
            if needed.total <= memory.usable(gpu):
                return f"{_gib(needed.total)} `{memory.flags(changes)}`" if changes else _gib(needed.total)
        return f"no ({_gib(plans[-1][1].total)})"

    rows = {}
    for title, name in ROWS.items():
        rows[f"{title} (`{name}`)"] = [*memory.plans(recipe(name).changed(preset=size, batch_size=64))]
    for dtype, needed in _acting(size, 1).items():
        rows[f"acting, {dtype}"] = [({}, needed)]
    lines = [f"| | {' | '.join(SIZES)} |", "|---" * (len(SIZES) + 1) + "|"]
    for title, plans in rows.items():
        lines.append(f"| {title} | {' | '.join(cell(plans, gpu) for gpu in SIZES)} |")
    return "\n".join(lines)
