"""The options of the commands on robot data.

This file imports no large library, so that `--help` is fast.
"""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from spear.errors import SpearError
from spear.util.options import EpisodeSplit, LayoutFile, OptionalInt, Options, Range, RarelyUsed

if TYPE_CHECKING:
    from spear.types import WidthAndHeight

MAX_IMAGE_SIDE_PX = 8192  # the largest width or height to which images are resized
ALL_OTHER_CAMERAS = ""  # the key, in `Conversion.sizes`, of all cameras that have no key there

_FOLDER_HELP = "An RLDS or LeRobot dataset, or episodes written by this program."
DatasetFolder = Annotated[Positional[Path], arg(metavar="FOLDER", help=_FOLDER_HELP)]


class Conversion(Options):
    """How `spear data prepare` converts episodes."""

    image_size: tuple[str, ...] = ()
    """Width x height of the images, as the model takes them (SPEAR-1: 280x210 wrist=112x112), for
    all cameras or CAMERA=WIDTHxHEIGHT for one. Images are not stretched; training adds bars.
    Without it they keep their size."""
    control_hz: Annotated[float, Range(0.01, 1000)] = 5.0
    """Steps per second (training takes 5)."""
    quality: Annotated[int, Range(1, 100), RarelyUsed()] = 95
    """JPEG quality of resized images; color keeps its full resolution."""
    layout: LayoutFile = None

    @cached_property
    def sizes(self) -> "dict[str, WidthAndHeight]":
        """The sizes in `image_size`: camera → (width, height) in pixels.

        The key `ALL_OTHER_CAMERAS` stands for all cameras that have no key. Raises SpearError if a
        text is no size, or if a camera has two sizes.
        """
        sizes: dict[str, WidthAndHeight] = {}
        for text in self.image_size:
            # Without "=", the camera is "", which is `ALL_OTHER_CAMERAS`.
            camera, _, size_text = text.rpartition("=")
            size = _parse_size_if_valid(size_text)
            if size is None:
                raise SpearError(
                    f"--image-size {text} is no size. Write it as 280x210, or for one camera as "
                    "wrist=112x112."
                )
            if camera in sizes:
                raise SpearError(
                    f"--image-size {text} gives a camera its second size. Give it one."
                )
            sizes[camera] = size
        return sizes


def _parse_size_if_valid(text: str) -> "WidthAndHeight | None":
    """Parse "280x210" as (width, height) in pixels.

    Returns:
        The size; None if the text is no size, or a side is 0 or above `MAX_IMAGE_SIDE_PX`.
    """
    side_texts = text.split("x")
    if len(side_texts) != 2 or not all(side.isdecimal() for side in side_texts):
        return None
    width = int(side_texts[0])
    height = int(side_texts[1])
    if not (0 < width <= MAX_IMAGE_SIDE_PX and 0 < height <= MAX_IMAGE_SIDE_PX):
        return None
    return width, height


class PrepareOptions(Options):
    paths: Annotated[Positional[tuple[Path, ...]], arg(metavar="FOLDER...")]
    """Folders of robot data (see spear data inspect). Each of several gets a folder of its name in
    OUT."""
    out: Path
    """Folder to write to."""
    split: EpisodeSplit = "train"
    workers: Annotated[OptionalInt, Range(0, 1024)] = None
    """Processes that read and resize. Default: one per processor. The result does not depend on
    it."""
    conversion: Conversion = Conversion()


class ExportOptions(Options):
    path: DatasetFolder
    out: Path
    """Folder to write to; it must not exist yet."""
    split: EpisodeSplit = "train"
    images: Literal["image", "video"] = "image"
    """Write images unchanged (image), or as AV1 video (video), which is much smaller and slightly
    blurred."""
    layout: LayoutFile = None
