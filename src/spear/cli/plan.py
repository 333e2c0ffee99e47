"""`spear plan`: what a recipe needs of a GPU, before anything is rented or waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from spear.cli.arguments import Name, Number, recipe_changes
from spear.errors import SpearError

if TYPE_CHECKING:
    from spear.models.presets import Preset
    from spear.train.memory import Memory
    from spear.train.recipes import Recipe

SIZES = ("8GB", "16GB", "24GB", "48GB", "80GB", "141GB")
ROWS = (
    ("full fine-tuning", "post-train-bridge"),
    ("LoRA", "finetune-lora"),
    ("expert only", "finetune-expert"),
)


def plan(
    recipe: str = "finetune-lora",
    preset: Name = None,
    gpu: str = "24GB",
    batch_size: Number = None,
    set: tuple[str, ...] = (),
    table: bool = False,
) -> None:
    """Say whether a recipe fits on a GPU, what takes the memory, and which settings make it fit.

    Needs no GPU and no weights: one training step of the real code is run on tensors without contents, and
    what is alive is added up. Acting is planned too, as the recipe named inference.

    Examples:
        spear plan --recipe finetune-lora --gpu 16GB
        spear plan --recipe post-train-bridge --gpu 48GB --set ema=0
        spear plan --recipe inference --gpu 8GB
        spear plan --table

    Args:
        recipe: A policy's or VLM's recipe (spear train list shows them), or inference.
        preset: Model size, when it shall not be the recipe's: nano, small or spear1.
        gpu: Memory of the GPU as it is sold, such as 24GB.
        batch_size: Examples per training step (per observation for inference), when not the recipe's.
        set: Changes to the recipe as KEY=VALUE, as in spear train.
        table: Print the table of docs/memory.md instead: three ways to train, and acting, on GPUs of six
            sizes.
    """
    from spear.models.presets import preset as find_preset
    from spear.train import memory
    from spear.train.recipes import recipe as find

    if table:
        print(_table(preset or "spear1"))
        return
    capacity = memory.usable(gpu)
    if recipe == "inference":
        if set:
            raise SpearError("--set changes recipes, and inference is none: leave it out")
        _plan_inference(find_preset(preset or "spear1"), batch_size or 1, gpu, capacity)
        return
    stage = find(recipe).changed(**recipe_changes(set))
    stage = stage.changed(preset=preset, batch_size=batch_size)
    whole = memory.training(stage)
    print(f"{recipe}, {stage.preset}, batch {stage.batch_size} in {stage.optimization.accumulate} pieces\n")
    print(_parts(whole))
    print(f"\nusable of {gpu}: {capacity / memory.GIB:.1f} GiB")
    fits, last = memory.fit(stage, capacity, _known(whole, stage))
    print(_verdict(fits, last))


def _known(whole: Memory, stage: Recipe) -> Callable[[Recipe], Memory]:
    """`memory.training`, which need not measure `stage` again."""
    from spear.train import memory

    return lambda other: whole if other == stage else memory.training(other)


def _verdict(fits: Any, last: Any) -> str:
    from spear.train import memory

    if fits is None:
        tried = memory.flags(last[0])
        with_it = f" even with {tried}" if tried else ""
        return f"does not fit{with_it}: {last[1].total / memory.GIB:.1f} GiB"
    changes, needed = fits
    if not changes:
        return "fits"
    return f"does not fit as it is; fits with {memory.flags(changes)}: {needed.total / memory.GIB:.1f} GiB"


def _parts(needed: Memory) -> str:
    from spear.train import memory

    rows = {
        f"weights ({needed.parameters / 1e9:.2f} B, {needed.learning / 1e9:.2f} B learn)": needed.weights,
        "gradients": needed.gradients,
        "optimiser": needed.moments,
        "averaged weights": needed.averaged,
        "activations, temporaries": needed.activations,
        "together": needed.total,
    }
    return "\n".join(f"{name:<34} {size / memory.GIB:8.2f} GiB" for name, size in rows.items())


def _plan_inference(size: Preset, batch: int, gpu: str, capacity: float) -> None:
    import torch

    from spear.train import memory

    names = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
    for dtype, name in names.items():
        needed = memory.inference(size, dtype, batch)
        word = "fits" if needed.total <= capacity else "does not fit"
        print(f"{name:<9} {_inference_parts(needed)}: {word} in {gpu} (usable {capacity / memory.GIB:.1f})")
    print("\non a CPU, which keeps weights that it reads often a second time, packed:")
    for answers, what in ((False, "acting"), (True, "acting and answering")):
        for dtype, name in names.items():
            needed = memory.inference(size, dtype, batch, as_on_gpu=False, answers=answers)
            print(f"{name:<9} {_inference_parts(needed)}: {what}")


def _inference_parts(needed: Memory) -> str:
    from spear.train.memory import GIB

    packed = f"packed {needed.prepared / GIB:5.2f} + " if needed.prepared > 0.005 * GIB else ""
    return (
        f"weights {needed.weights / GIB:6.2f} + {packed}activations {needed.activations / GIB:5.2f} = "
        f"{needed.total / GIB:6.2f} GiB"
    )


def _table(size: str) -> str:
    """Markdown: ways to train and to act, by size of GPU."""
    import functools

    import torch

    from spear.models.presets import preset
    from spear.train import memory
    from spear.train.recipes import recipe

    lines = ["| | " + " | ".join(SIZES) + " |", "|---" * (len(SIZES) + 1) + "|"]
    for title, name in ROWS:
        stage = recipe(name).changed(preset=size, batch_size=64)
        measured: dict[str, Memory] = {}

        def measure(other: Recipe, measured: dict[str, Memory] = measured) -> Memory:
            key = repr(other)
            if key not in measured:
                measured[key] = memory.training(other)
            return measured[key]

        cells = []
        for gpu in SIZES:
            fits, last = memory.fit(stage, memory.usable(gpu), measure)
            changes, needed = fits or last
            amount = f"{needed.total / memory.GIB:.1f} GiB"
            more = f" `{memory.flags(changes)}`" if changes and fits else ""
            cells.append(f"{amount}{more}" if fits else f"no ({amount})")
        lines.append(f"| {title} (`{name}`) | " + " | ".join(cells) + " |")
    act = functools.partial(memory.inference, preset(size))
    for dtype in (torch.bfloat16, torch.float32):
        total = act(dtype).total
        cells = [
            f"{'' if total <= memory.usable(gpu) else 'no ('}{total / memory.GIB:.1f} GiB"
            f"{'' if total <= memory.usable(gpu) else ')'}"
            for gpu in SIZES
        ]
        lines.append(f"| acting, {str(dtype).removeprefix('torch.')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
