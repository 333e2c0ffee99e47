"""Everything that can be labeled, as items: photos and videos, robot episodes, RGB-D scenes, the
simulator.

    photos/  *.jpg  shard.tar  images.parquet  film.mp4  takes/     see `spear.labels.inputs`
    runs/episodes  bridge_dataset/1.0.0  my_lerobot_dataset         frames spread over each robot
    episode rgbd:scene0000_00                                               frames with measured
    depth sim:10000-10499                                                 scenes with all ground
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

PREFERRED_CAMERA = "external"
"""The camera of robot episodes that is labeled; the first by name where none has this name."""

ListScenes = Callable[[range], Iterator[Item]]
"""Seeds → the simulator's scenes of these seeds, as items."""

_open_scene = lru_cache(maxsize=1)(RgbdScene)


def list_items(
    arguments: Sequence[str],
    rate: float = 1.0,
    per_episode: int = 4,
    excluded_folder: Path | None = None,
    list_scenes: ListScenes | None = None,
) -> Iterator[Item]:
    """List the images behind all arguments, one after the other; of equal ones only the first.

    Args:
        arguments: As in this module's docstring.
        rate: Frames per second of video.
        per_episode: Frames of each robot episode, spread evenly from its first to its last.
        excluded_folder: A folder that is not entered: the folder of the labels may be among the
            photos.
        list_scenes: Lists the scenes of `sim:`; without it, such an argument is refused.

    Raises:
        SpearError: There is nothing to label in an argument.
    """
    # Files may have changed since an earlier listing in this process.
    for cached in (_open_scene, _read_episode, read_row_group):
        cached.cache_clear()

    listed_names: set[str] = set()
    for argument in arguments:
        path = os.path.normpath(argument)
        if path.startswith("sim:"):
            items = _list_simulated(path, list_scenes)
        else:
            items = _list_recorded(path, rate, per_episode, excluded_folder)
        for item in items:
            if len(arguments) > 1:
                name = os.path.abspath(item.key)
                if name in listed_names:
                    continue
                listed_names.add(name)
            # Parquet stores text, and names of files may be bytes that are no text.
            yield item._replace(key=item.key.encode(errors="backslashreplace").decode())


def _list_simulated(argument: str, list_scenes: ListScenes | None) -> Iterator[Item]:
    if list_scenes is None:
        raise SpearError(f"{argument} needs the simulator. Label it with `spear label`.")
    return list_scenes(parse_scene_seeds(argument, "sim"))


def _list_recorded(
    path: str, rate: float, per_episode: int, excluded_folder: Path | None
) -> Iterator[Item]:
    from spear.data.readers.formats import find_format

    if path.startswith("rgbd:"):
        return _list_rgbd(path.removeprefix("rgbd:"))
    if find_format(path) is not None:
        return _list_episodes(path, per_episode)
    if any(Path(path).glob("depth/*.png")):
        notice(
            f"The images in {path}/depth are labeled as photos, too. Give rgbd:{path} to use them "
            "as depth."
        )
    return list_images(path, rate, excluded_folder)


def parse_scene_seeds(argument: str, simulator: str) -> range:
    """The seeds of `SIMULATOR:SEED` or `SIMULATOR:SEED-SEED`.

    Raises:
        SpearError: The argument is neither.

    Example:
        >>> parse_scene_seeds("sim:10000-10499", "sim")
        range(10000, 10500)
    """
    match = re.fullmatch(rf"{simulator}:(\d+)(?:-(\d+))?", argument)
    if match is None:
        raise SpearError(
            f"{argument} is not a scene. Write one as {simulator}:7, several as "
            f"{simulator}:10000-10499."
        )
    first = int(match[1])
    last = int(match[2] or match[1])
    if last < first:
        raise SpearError(f"{argument} ends before it begins. Write {simulator}:{last}-{first}.")
    return range(first, last + 1)


def _list_rgbd(folder: str) -> Iterator[Item]:
    scene = _open_scene(folder)
    if scene.num_without_depth:
        notice(
            f"{format_count(scene.num_without_depth, 'color images')} of {folder} are ignored, "
            "because no image in depth/ has the same name."
        )
    for index, source in enumerate(scene.sources):
        yield Item(source, read_rgbd, folder, index, scene.compute_stamp(index))


def read_rgbd(folder: str, indices: Sequence[int]) -> Iterator[Content]:
    """Read frames of an RGB-D scene."""
    for index in indices:
        try:
            yield _open_scene(folder)[index]
        except SpearError as error:
            yield error


def _list_episodes(folder: str, per_episode: int) -> Iterator[Item]:
    from spear.data.readers.formats import (
        count_episodes,
        find_format,
        fingerprint_dataset,
        open_dataset,
    )

    has_splits = find_format(folder) != "store"
    stamp = fingerprint_dataset(open_dataset(folder))
    for split, num_episodes in count_episodes(folder).items():
        name = f"{folder}/{split}" if has_splits else folder
        for episode in range(num_episodes):
            for number in range(per_episode):
                key = f"{name}#{episode}/{number + 1}-of-{per_episode}"
                location = (split, episode, number, per_episode)
                yield Item(key, read_episodes, folder, location, stamp)


def read_episodes(folder: str, locations: Sequence[tuple[str, int, int, int]]) -> Iterator[Content]:
    """Read frames of a dataset of any format.

    Args:
        folder: The dataset.
        locations: (split, episode, number of the frame, frames per episode) of each frame.
    """
    for split, index, number, per_episode in locations:
        episode = _read_episode(folder, split, index)
        if isinstance(episode, SpearError):
            yield episode
            continue
        num_steps = len(episode)
        if number >= num_steps:
            yield SpearError(
                f"the episode has only {format_count(num_steps, 'steps')}. Use a smaller "
                "--frames-per-episode."
            )
            continue
        camera = PREFERRED_CAMERA
        if camera not in episode.images:
            camera = min(episode.images)
        num_intervals = max(min(per_episode, num_steps) - 1, 1)
        step = number * (num_steps - 1) // num_intervals  # the frames are spread evenly
        yield bytes(episode.images[camera][step])


@lru_cache(maxsize=1)
def _read_episode(folder: str, split: str, index: int) -> Episode | SpearError:
    """An episode, or why it cannot be read."""
    from spear.data.readers import formats

    try:
        return next(formats.read_episodes(folder, f"{split}[{index}:{index + 1}]"))
    except SpearError as error:
        return error
