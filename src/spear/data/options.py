"""Options of the commands on robot data: plain values, so that asking for help loads nothing heavy."""

from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from spear.errors import SpearError
from spear.util.options import EpisodeSplit, LayoutFile, OptionalInt, Options, Range

_SOURCE = "An RLDS or LeRobot dataset, or episodes written by this program."
DatasetFolder = Annotated[Positional[Path], arg(metavar="FOLDER", help=_SOURCE)]
MAX_IMAGE_SIDE_PX = 8192
"""The largest side of an image that is asked for."""


class Conversion(Options):
    """What preparing makes of episodes."""

    size: tuple[str, ...] = ()
    """Width x height of the images, as the model takes them (SPEAR-1: 280x210 wrist=112x112), for all cameras
    or CAMERA=WIDTHxHEIGHT for one; not stretched: training adds bars. Without it they stay as they are."""
    rate: Annotated[float, Range(0.01, 1000)] = 5.0
    """Steps per second (training takes 5)."""
    quality: Annotated[int, Range(1, 100)] = 95
    """JPEG quality of images that are changed; colour is kept at full resolution (our choice)."""
    layout: LayoutFile = None

    @cached_property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Camera -> (width, height), "" for all others. `SpearError` for other words, and two of one."""
        sizes: dict[str, tuple[int, int]] = {}
        for word in self.size:
            camera, _, text = word.rpartition("=")
            numbers = [int(n) if n.isdecimal() else 0 for n in text.split("x")]
            if len(numbers) != 2 or not all(0 < n <= MAX_IMAGE_SIDE_PX for n in numbers):
                raise SpearError(
                    f"--size {word}: write it as 280x210, or for one camera as wrist=112x112"
                )
            if camera in sizes:
                raise SpearError(
                    f"--size {word}: this camera has another size already: give it once"
                )
            sizes[camera] = (numbers[0], numbers[1])
        return sizes


class PrepareOptions(Options):
    paths: Annotated[Positional[tuple[Path, ...]], arg(metavar="FOLDER...")]
    """Folders of robot data (see spear data inspect). Each of several gets a folder of its name in OUT."""
    out: Path
    """Folder to write to."""
    split: EpisodeSplit = "train"
    workers: Annotated[OptionalInt, Range(0, 1024)] = None
    """Processes that read and resize; one for each processor by default. The result is the same."""
    conversion: Conversion = Conversion()


class ExportOptions(Options):
    path: DatasetFolder
    out: Path
    """Folder to write to; it must not exist yet."""
    split: EpisodeSplit = "train"
    images: Literal["image", "video"] = "image"
    """Images as they are (image), or as AV1 video (video), which is much smaller and a little blurred."""
    layout: LayoutFile = None
