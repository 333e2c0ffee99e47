"""Processor time of what is done with an image, in preparing and in loading: one core, no disk.

python benchmarks/data/loader_parts.py photo.png
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image
from tyro.conf import Positional

from spear.data.mixture import jitter
from spear.util.images import decode_image, encode_jpeg, fit_image

SIZES = {"external": (210, 280), "wrist": (112, 112)}


def cost(call: Callable[[], object], repeats: int) -> float:
    """Milliseconds of processor time of a call."""
    call()
    begun = time.process_time()
    for _ in range(repeats):
        call()
    return 1000 * (time.process_time() - begun) / repeats


def parts_of(large: np.ndarray, height: int, width: int) -> dict[str, Callable[[], object]]:
    """What is done with an image [480, 640, 3] on its way to a batch, by name."""
    original = encode_jpeg(large)
    small = fit_image(large, height, width)
    encoded = encode_jpeg(small)
    stacked = np.empty((1, height, width, 3), np.uint8)
    place = np.empty((height, width, 3), np.uint8)
    draws = np.linspace(0, 1, 5)

    def turned() -> object:
        stacked[0] = decode_image(encoded)
        return np.ascontiguousarray(stacked.transpose(0, 3, 1, 2))

    def placed() -> None:
        decode_image(encoded, out=place)

    def jittered() -> None:
        jitter(decode_image(encoded, out=place), draws, 1.0, place)

    print(f"{width} x {height}: {len(encoded)} bytes; the original has {len(original)}")
    return {
        "decoded": lambda: decode_image(encoded),
        "decoded, stacked, channels to the front": turned,
        "decoded in its place": placed,
        "decoded and jittered in its place": jittered,
        "preparing: original decoded": lambda: decode_image(original),
        "preparing: scaled": lambda: fit_image(large, height, width),
        "preparing: encoded": lambda: encode_jpeg(small),
    }


def main(photo: Annotated[Positional[Path], tyro.conf.arg(metavar="PHOTO")], repeats: int = 50) -> None:
    """Measure.

    Args:
        photo: an image; it is taken at 640 x 480.
        repeats: of each part.
    """
    large = np.asarray(Image.fromarray(decode_image(photo.read_bytes(), str(photo))).resize((640, 480)))
    for height, width in SIZES.values():
        for name, part in parts_of(large, height, width).items():
            print(f"  {name:<42} {cost(part, repeats):6.2f} ms")


if __name__ == "__main__":
    tyro.cli(main)
