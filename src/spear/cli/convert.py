"""`spear convert …`: published weights to SPEAR-VLM, SPEAR-VLM to SPEAR-1, and back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from spear.cli.arguments import Name
from spear.errors import SpearError, unknown_name

if TYPE_CHECKING:
    import torch

    from spear.models.processing import Processor
    from spear.models.weights.conversion import Conversion

Some = Annotated[Path | None, arg(metavar="PATH")]
PRECISIONS = ("float32", "bfloat16", "float16")


def convert_backbones(
    paligemma: Annotated[Positional[str], arg(metavar="PALIGEMMA")],
    moge: Annotated[Positional[str], arg(metavar="MOGE")],
    /,
    out: Path = Path("runs/spear-vlm"),
    coordinates: Some = None,
    preset: str = "spear1",
    dtype: Name = None,
    shard: str = "5GB",
    seed: int = 0,
    dry_run: bool = False,
) -> None:
    """Make a SPEAR-VLM, ready to be trained, from published PaliGemma and MoGe weights.

    Prints where each weight comes from, and the parameters per part.

    Examples:
        spear convert backbones google/paligemma-3b-pt-224 Ruicheng/moge-vitl --coordinates runs/labels
        spear convert backbones ./paligemma-3b-pt-224 ./moge-vitl/model.pt --dry-run

    Args:
        paligemma: Folder of a PaliGemma 1 or 2 (config.json and safetensors), or its name on the Hugging Face
            Hub.
        moge: A MoGe file (model.pt), or its name on the Hub; none leaves the 3D encoder out.
        out: New folder to write to.
        coordinates: What the 3D tokens shall mean: a coordinates.json, or a folder of labelled images to fit
            them to. Without it the model is written without a processor, which training needs.
        preset: Preset whose views, image sizes and number of 3D tokens the model gets (spear1 is the
            paper's).
        dtype: Precision of the result: float32, bfloat16 or float16; without it that of PaliGemma.
        shard: The most that one file holds.
        seed: Of the new weights.
        dry_run: Only say what would be done; nothing is written.
    """
    from spear.models.presets import preset as find_preset
    from spear.models.weights.backbones import plan_backbones

    size = find_preset(preset)
    plan = plan_backbones(paligemma, None if moge == "none" else moge, preset)
    processor = None
    if coordinates is not None:
        from spear.models.processing import Processor

        if plan.tokenizer is None:
            raise SpearError(
                f"--coordinates needs a tokenizer, and {paligemma} has none: copy tokenizer.json there"
            )
        meaning = _coordinates(coordinates, size.bins, seed)
        processor = Processor(plan.tokenizer, meaning, dict(size.image_sizes), size.prompt_tokens)
    _finish(plan, processor, out, dtype, shard, seed, dry_run)


def convert_vlm(
    vlm: Annotated[Positional[str], arg(metavar="VLM")],
    /,
    out: Path = Path("runs/spear1"),
    expert: Name = None,
    preset: str = "spear1",
    dtype: Name = None,
    shard: str = "5GB",
    seed: int = 0,
    dry_run: bool = False,
) -> None:
    """Make a SPEAR-1 policy, ready to be trained, from a SPEAR-VLM and an action expert.

    Prints where each weight comes from, and the parameters per part.

    Examples:
        spear convert vlm runs/vlm-stage2/final --out runs/spear1
        spear convert vlm runs/vlm-stage2/final --expert lerobot/pi0_base --dry-run

    Args:
        vlm: Folder of a SPEAR-VLM, or its name on the Hugging Face Hub.
        out: New folder to write to.
        expert: Folder of a π0 in safetensors, or its name on the Hub; without it the action expert is new.
        preset: Preset of the chunk length, the flow and a new expert (spear1 is the paper's).
        dtype: Precision of the result: float32, bfloat16 or float16; without it that of the SPEAR-VLM.
        shard: The most that one file holds.
        seed: Of the new weights.
        dry_run: Only say what would be done; nothing is written.
    """
    from spear.models.weights.action_expert import plan_policy

    folder = _folder(vlm, "SPEAR-VLM")
    plan = plan_policy(folder, expert, preset)
    _finish(plan, _processor(folder, plan.config.vlm_config), out, dtype, shard, seed, dry_run)


def convert_policy(
    policy: Annotated[Positional[str], arg(metavar="POLICY")],
    /,
    out: Path = Path("runs/spear-vlm"),
    dtype: Name = None,
    shard: str = "5GB",
    dry_run: bool = False,
) -> None:
    """Take the SPEAR-VLM out of a SPEAR-1 policy, as a checkpoint of its own.

    Example:
        spear convert policy nano --out runs/nano-vlm

    Args:
        policy: Folder of a SPEAR-1, its name on the Hugging Face Hub, or nano for the one that comes with
            this package.
        out: New folder to write to.
        dtype: Precision of the result: float32, bfloat16 or float16; without it that of the policy.
        shard: The most that one file holds.
        dry_run: Only say what would be done; nothing is written.
    """
    from spear.models.weights.backbones import plan_inner_vlm

    folder = _folder(policy, "SPEAR-1")
    plan = plan_inner_vlm(folder)
    _finish(plan, _processor(folder, plan.config), out, dtype, shard, 0, dry_run)


def _finish(
    plan: Conversion[Any],
    processor: Processor | None,
    out: Path,
    dtype: str | None,
    shard: str,
    seed: int,
    dry_run: bool,
) -> None:
    """Print what becomes of each weight and, unless it is a dry run, write the model."""
    precision = _precision(dtype)
    if not re.fullmatch(r"[1-9]\d*(KB|MB|GB|TB)", shard):
        raise SpearError(f"--shard {shard}: write it as 5GB or 500MB")
    print(plan.report)
    plan.check()
    if dry_run:
        print(f"nothing written (dry run); it would be {_size(plan, precision)} in {out}")
        return
    plan.save(out, precision, seed, shard, processor.save if processor is not None else None)
    print(f"written: {out} ({_size(plan, precision)})")
    if processor is None:
        print("without a processor: training needs one, see --coordinates of `spear convert backbones`")


def _size(plan: Conversion[Any], precision: torch.dtype | None) -> str:
    kind = precision or plan.dtype
    return f"{plan.report.parameters() * kind.itemsize / 1e9:.2f} GB, {str(kind).removeprefix('torch.')}"


def _precision(name: str | None) -> torch.dtype | None:
    import torch

    if name is None:
        return None
    if name not in PRECISIONS:
        raise unknown_name("precision", name, PRECISIONS)
    return getattr(torch, name)


def _folder(name: str, what: str) -> Path:
    """A checkpoint's folder: local, a run's, one that comes with the package, or from the Hub."""
    from spear.models.weights.shards import find, is_hub_name
    from spear.policy import locate

    if is_hub_name(name) and not Path(name).exists():
        return find(name, what)
    return locate(name)


def _processor(folder: Path, config: Any) -> Processor | None:
    """The processor beside a model, None where there is none. Raises `SpearError` when it is another's."""
    from spear.models.processing import Processor

    if not (folder / "processor.json").is_file():
        return None
    processor = Processor.load(folder)
    found = (processor.coordinate_start, processor.coordinates.bins)
    wanted = (config.coordinate_start, config.coordinate_bins)
    if found != wanted:
        raise SpearError(
            f"vocabulary mismatch: {folder}: its tokenizer has {found[1]} 3D tokens from {found[0]} on, its model "
            f"{wanted[1]} from {wanted[0]} on: take both from the same checkpoint"
        )
    return processor


def _coordinates(path: Path, bins: int, seed: int) -> Any:
    """3D tokens from a file, a folder that holds one, or fitted to labelled images."""
    from spear.tokens import CoordinateTokenizer

    file = path / "coordinates.json" if path.is_dir() else path
    if file.is_file():
        tokens = CoordinateTokenizer.load(file)
    else:
        from spear.train.tasks.questions import fit_coordinates, load_labels

        tokens = fit_coordinates(load_labels(path, ["external"])["external"], bins, seed)
    if tokens.bins != bins:
        raise SpearError(
            f"vocabulary mismatch: {path} has {tokens.bins} 3D tokens, the preset {bins}: fit them again"
        )
    return tokens
