"""Episodes made ready for training, some at a time, in this process or in others: always in the same
order."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from spear.data.actions import RATE_HZ, resample, with_actions
from spear.data.readers.formats import episode_counts, read_episodes
from spear.data.readers.spec import Layout
from spear.data.readers.splits import split_ranges
from spear.data.store.stats import Look, look
from spear.errors import SpearError
from spear.types import Episode
from spear.util import processes
from spear.util.images import FitImage, decode_image, encode_jpeg

BLOCK = 16
"""Episodes that are made ready at a time (our choice)."""
QUALITY = 95
"""Of the JPEGs that are written; colour is kept at full resolution (our choice)."""


@dataclass(frozen=True)
class Conversion:
    """What is made of episodes.

    layout     what their columns mean, as for `read_episodes`.
    rate_hz    steps per second.
    sizes      camera -> (width, height) in pixels, "" for all others; those that have none stay as they are.
    fit_image  brings an image to its size, aspect kept.
    quality    of the JPEGs, for images that are changed.
    """

    layout: Layout = None
    rate_hz: float = RATE_HZ
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    fit_image: FitImage | None = None
    quality: int = QUALITY


@dataclass(frozen=True)
class Ready:
    """An episode with canonical actions, and what its images look like (see `look`)."""

    episode: Episode
    looks: Mapping[str, Look]


def blocks(path: Path, split: str) -> list[tuple[str, int]]:
    """A split in pieces of at most `BLOCK` episodes: (a split that the readers take, its length) of each."""
    pieces = []
    for name, start, end in split_ranges(episode_counts(path), split, path):
        for first in range(start, end, BLOCK):
            last = min(first + BLOCK, end)
            pieces.append((f"{name}[{first}:{last}]", last - first))
    return pieces


def make_ready(path: Path, how: Conversion, split: str) -> tuple[list[Ready], list[str]]:
    """The good episodes of a split, and why not the others."""
    good: list[Ready] = []
    reasons: list[str] = []
    for episode in read_episodes(path, split, how.layout, lambda error: reasons.append(str(error))):
        try:
            good.append(_ready(episode, how))
        except SpearError as error:
            reasons.append(str(error))
    return good, reasons


def _ready(episode: Episode, how: Conversion) -> Ready:
    unknown = set(how.sizes) - {"", *episode.images}
    if unknown:
        raise SpearError(
            f"no camera {min(unknown)!r}: {episode.source}: its cameras are "
            f"{', '.join(sorted(episode.images))}"
        )
    episode = with_actions(resample(episode, how.rate_hz))
    images = {camera: _fit(episode, camera, how) for camera in episode.images}
    episode = dataclasses.replace(episode, images=images)
    return Ready(episode, look(episode))


def _fit(episode: Episode, camera: str, how: Conversion) -> Sequence[bytes]:
    """A camera's images as JPEG in the size wanted; one that is so already stays, byte for byte."""
    size = how.sizes.get(camera, how.sizes.get(""))
    if size is None or how.fit_image is None:
        return episode.images[camera]
    fitted = []
    for step, encoded in enumerate(episode.images[camera]):
        image = decode_image(encoded, f"{episode.source} step {step} camera {camera!r}")
        if image.shape[1::-1] != size or encoded[:2] != b"\xff\xd8":
            encoded = encode_jpeg(how.fit_image(image, size[1], size[0]), how.quality)
        fitted.append(encoded)
    return fitted


def ready_blocks(
    path: Path, how: Conversion, splits: Sequence[str], workers: int
) -> Generator[tuple[list[Ready], list[str]], None, None]:
    """`make_ready` of each split, in order, by so many processes (0: this one). Close it to stop them."""
    advice = "use fewer --workers, and run the same command again: it continues"
    with processes.pool(workers, __name__, advice) as pool:
        yield from processes.in_order(pool, partial(make_ready, path, how), splits, workers)
