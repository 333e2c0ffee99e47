"""Episodes made ready for training, some at a time, in this process or in others: always in the same
order."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from spear.data.actions import episode_actions, resample
from spear.data.images import FitImage
from spear.data.readers.formats import episode_ranges, read_episodes
from spear.data.readers.spec import Layout
from spear.data.store.stats import Look, look
from spear.errors import SpearError
from spear.types import Episode
from spear.util import processes
from spear.util.images import decode_image, encode_jpeg

BLOCK = 16
"""Episodes that are made ready at a time (our choice)."""
AHEAD = 1
"""Blocks for each worker that wait to be written (our choice)."""


@dataclass(frozen=True)
class Wanted:
    """What is made of which episodes.

    path, dataset  a folder in any format, and its layout, as for `read_episodes`.
    rate_hz        steps per second.
    sizes          camera -> (width, height) in pixels, "" for all others; those that have none stay as they
                   are.
    fit_image      brings an image to its size, aspect kept.
    quality        of the JPEGs, for images that are changed.
    """

    path: Path
    dataset: Layout
    rate_hz: float
    sizes: Mapping[str, tuple[int, int]]
    fit_image: FitImage | None
    quality: int


@dataclass(frozen=True)
class Ready:
    """An episode with canonical actions, and what its images look like (see `look`)."""

    episode: Episode
    looks: Mapping[str, Look]


def blocks(path: Path, split: str) -> list[str]:
    """A split in pieces of at most `BLOCK` episodes, as texts that the readers take."""
    return [
        f"{name}[{first}:{min(first + BLOCK, end)}]"
        for name, start, end in episode_ranges(path, split)
        for first in range(start, end, BLOCK)
    ]


def length(block: str) -> int:
    """How many episodes are in one of these pieces."""
    first, end = block[:-1].rpartition("[")[2].split(":")
    return int(end) - int(first)


def make_ready(wanted: Wanted, split: str) -> tuple[list[Ready], list[str]]:
    """The good episodes of a split, and why not the others."""
    good: list[Ready] = []
    reasons: list[str] = []
    for episode in read_episodes(
        wanted.path, split, wanted.dataset, lambda error: reasons.append(str(error))
    ):
        try:
            good.append(_ready(episode, wanted))
        except SpearError as error:
            reasons.append(str(error))
    return good, reasons


def _ready(episode: Episode, wanted: Wanted) -> Ready:
    unknown = set(wanted.sizes) - {"", *episode.images}
    if unknown:
        raise SpearError(
            f"no camera {min(unknown)!r}: {episode.source}: its cameras are {', '.join(sorted(episode.images))}"
        )
    episode = resample(episode, wanted.rate_hz)
    action, mask = episode_actions(episode)
    images = {camera: _fit(episode, camera, wanted) for camera in episode.images}
    episode = dataclasses.replace(episode, images=images, action=action, action_mask=mask)
    return Ready(episode, look(episode))


def _fit(episode: Episode, camera: str, wanted: Wanted) -> Sequence[bytes]:
    """A camera's images as JPEG in the size wanted; one that is so already stays, byte for byte."""
    size = wanted.sizes.get(camera, wanted.sizes.get(""))
    if size is None or wanted.fit_image is None:
        return episode.images[camera]
    fitted = []
    for step, encoded in enumerate(episode.images[camera]):
        image = decode_image(encoded, f"{episode.source} step {step} camera {camera!r}")
        if image.shape[1::-1] == size and encoded[:2] == b"\xff\xd8":
            fitted.append(encoded)
        else:
            fitted.append(encode_jpeg(wanted.fit_image(image, size[1], size[0]), wanted.quality))
    return fitted


def ready_blocks(
    wanted: Wanted, splits: Sequence[str], workers: int
) -> Generator[tuple[list[Ready], list[str]], None, None]:
    """`make_ready` of each split, in order, by so many processes (0: this one). Close it to stop them."""
    advice = "use fewer --workers, and run the same command again: it continues"
    with processes.pool(workers, __name__, advice) as pool:
        yield from processes.in_order(pool, partial(make_ready, wanted), splits, AHEAD * workers)
