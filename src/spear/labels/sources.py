"""All that can be labelled, as items: photos and videos, robot episodes, RGB-D scenes, the
simulator.

photos/  *.jpg  shard.tar  images.parquet  film.mp4  takes/     see `spear.labels.inputs`
runs/episodes  bridge_dataset/1.0.0  my_lerobot_dataset         robot episodes: frames spread over
each rgbd:scene0000_00                                               frames with true depth
sim:10000-10499                                                 scenes of the simulator, with all
truth
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from spear.errors import SpearError, format_count, notice
from spear.labels.inputs import Content, Item, list_images, read_row_group
from spear.labels.rgbd import RgbdScene
from spear.types import Episode

ListScenes = Callable[[range], Iterator[Item]]
"""Seeds → the simulator's scenes of these seeds, as items."""

_scene = lru_cache(maxsize=1)(RgbdScene)
PREFERRED_CAMERA = "external"
"""The camera of robot episodes that is labelled; the first by name when there is none of this
name."""


def list_items(
    arguments: Sequence[str],
    rate: float = 1.0,
    per_episode: int = 4,
    excluded_folder: Path | None = None,
    list_scenes: ListScenes | None = None,
) -> Iterator[Item]:
    """The images behind all arguments, one after the other; one that is met again is passed over.

    besides      a folder that is not entered: that of the labels may lie among the photos.
    rate         frames per second of video.
    per_episode  frames of each robot episode, spread evenly from its first to its last.
    Raises `SpearError`: an argument with nothing to label in it.
    """
    for kept in (_scene, _episode, read_row_group):
        kept.cache_clear()  # by an earlier listing in this process: files may have changed since
    seen: set[str] = set()
    for argument in arguments:
        for item in _items(
            os.path.normpath(argument), rate, per_episode, excluded_folder, list_scenes
        ):
            if len(arguments) > 1:
                if (name := os.path.abspath(item.key)) in seen:
                    continue
                seen.add(name)
            # Parquet holds text, and the names of files may be bytes that are none.
            yield item._replace(key=item.key.encode(errors="backslashreplace").decode())


def _items(
    argument: str,
    rate: float,
    per_episode: int,
    excluded_folder: Path | None,
    list_scenes: ListScenes | None,
) -> Iterator[Item]:
    from spear.data.readers.formats import find_format

    if argument.startswith("sim:"):
        if list_scenes is None:
            raise SpearError(f"{argument}: scenes of the simulator are not an input here")
        return list_scenes(parse_scene_seeds(argument, "sim"))
    if argument.startswith("rgbd:"):
        scene = _scene(folder := argument.removeprefix("rgbd:"))
        if scene.alone:
            notice(
                f"{folder}: {format_count(scene.alone, 'color images')} left out: none in depth/ has its name"
            )
        return (
            Item(source, read_rgbd, folder, i, scene.stamp(i))
            for i, source in enumerate(scene.sources)
        )
    photos = find_format(argument) is None
    if photos and any(Path(argument).glob("depth/*.png")):
        notice(
            f"{argument}: the pictures in depth/ count as photos, too: give rgbd:{argument} for its depth"
        )
    return (
        list_images(argument, rate, excluded_folder)
        if photos
        else _find_episodes(argument, per_episode)
    )


def parse_scene_seeds(argument: str, simulator: str) -> range:
    """The seeds of `SIMULATOR:SEED` or `SIMULATOR:SEED-SEED`. Raises `SpearError` for anything
    else."""
    if not (match := re.fullmatch(rf"{simulator}:(\d+)(?:-(\d+))?", argument)):
        raise SpearError(
            f"{argument}: write a scene as {simulator}:7, scenes as {simulator}:10000-10499"
        )
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise SpearError(f"{argument}: ends before it begins: write {simulator}:{last}-{first}")
    return range(first, last + 1)


def read_rgbd(folder: str, numbers: Sequence[int]) -> Iterator[Content]:
    """Frames of an RGB-D scene."""
    for number in numbers:
        try:
            yield _scene(folder)[number]
        except SpearError as error:
            yield error


def _find_episodes(folder: str, per_episode: int) -> Iterator[Item]:
    from spear.data.readers.formats import (
        count_episodes,
        find_format,
        fingerprint_dataset,
        open_dataset,
    )

    ours, stamp = find_format(folder) == "store", fingerprint_dataset(open_dataset(folder))
    for split, count in count_episodes(folder).items():
        name = folder if ours else f"{folder}/{split}"
        for index in range(count):
            for number in range(per_episode):
                key = f"{name}#{index}/{number + 1}-of-{per_episode}"
                yield Item(key, read_episodes, folder, (split, index, number, per_episode), stamp)


def read_episodes(folder: str, places: Sequence[tuple[str, int, int, int]]) -> Iterator[Content]:
    """Frames of a dataset of any format, by (split, episode, number of the frame, frames per
    episode)."""
    for split, index, number, count in places:
        episode = _episode(folder, split, index)
        if isinstance(episode, SpearError):
            yield episode
            continue
        camera = PREFERRED_CAMERA if PREFERRED_CAMERA in episode.images else min(episode.images)
        steps = len(episode)
        if number < steps:  # frame `number` of `count` that are spread evenly
            yield bytes(
                episode.images[camera][number * (steps - 1) // max(min(count, steps) - 1, 1)]
            )
        else:
            yield SpearError(
                f"the episode has only {format_count(steps, 'steps')}: take fewer frames of each"
            )


@lru_cache(maxsize=1)
def _episode(folder: str, split: str, index: int) -> Episode | SpearError:
    from spear.data.readers import formats

    try:
        return next(formats.read_episodes(folder, f"{split}[{index}:{index + 1}]"))
    except SpearError as error:
        return error
