"""The options of `spear convert …`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from spear.errors import SpearError
from spear.util.options import Name, Options, Seed

Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(Options):
    """What every conversion takes."""

    out: Path
    """New folder to write to."""
    dtype: Precision | None = None
    """Precision of the result; without it that of the weights that are read."""
    shard: str = "5GB"
    """The most that one file holds, as 5GB or 500MB."""
    dry_run: bool = False
    """Only say what would be done; nothing is written."""
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[1-9]\d*(KB|MB|GB|TB)", self.shard):
            raise SpearError(f"--shard {self.shard}: write it as 5GB or 500MB")


@dataclass(frozen=True, kw_only=True)
class BackbonesOptions(ConvertOptions):
    """Options of `spear convert backbones`."""

    paligemma: Annotated[Positional[str], arg(metavar="PALIGEMMA")]
    """Folder of a PaliGemma 1 or 2 (config.json and safetensors), or its name on the Hugging Face Hub."""
    moge: Annotated[Positional[str], arg(metavar="MOGE")]
    """A MoGe file (model.pt), or its name on the Hub; none leaves the 3D encoder out."""
    out: Path = Path("runs/spear-vlm")
    coordinates: Annotated[Path | None, arg(metavar="PATH")] = None
    """What the 3D tokens shall mean: a coordinates.json, or a folder of labelled images to fit them to.
    Without it the model is written without a processor, which training needs."""
    preset: str = "spear1"
    """Preset whose views, image sizes and number of 3D tokens the model gets (spear1 is the paper's)."""


@dataclass(frozen=True, kw_only=True)
class PolicyOptions(ConvertOptions):
    """Options of `spear convert vlm`."""

    vlm: Annotated[Positional[str], arg(metavar="VLM")]
    """Folder of a SPEAR-VLM, or its name on the Hugging Face Hub."""
    out: Path = Path("runs/spear1")
    expert: Name = None
    """Folder of a π0 in safetensors, or its name on the Hub; without it the action expert is new."""
    preset: str = "spear1"
    """Preset of the chunk length, the flow and a new expert (spear1 is the paper's)."""


@dataclass(frozen=True, kw_only=True)
class InnerVlmOptions(ConvertOptions):
    """Options of `spear convert policy`."""

    policy: Annotated[Positional[str], arg(metavar="POLICY")]
    """Folder of a SPEAR-1, its name on the Hub, or nano for the one that comes with this package."""
    out: Path = Path("runs/spear-vlm")
