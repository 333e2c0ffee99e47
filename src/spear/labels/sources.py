"""Listing the images behind the arguments of `spear label`, as items (`spear.labels.inputs.Item`).

An argument names files, a dataset of robot episodes, an RGB-D scene or scenes of the simulator:

    photos/  *.jpg  shard.tar  images.parquet  film.mp4  takes/    images and frames of videos
    runs/episodes  bridge_dataset/1.0.0  my_lerobot_dataset        frames of robot episodes
    rgbd:scene0000_00                                              frames with measured depth
    sim:10000-10499                                                scenes with all ground truth
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from spear.errors import SpearError, format_count, notice
from spear.labels.inputs import Content, Item, list_images, read_column_of_row_group
from spear.labels.rgbd import RgbdScene
from spear.types import Episode

PREFERRED_CAMERA = "external"
"""The camera of robot episodes whose images are labeled. In episodes without this camera, it is the
first one in alphabetical order."""

ListScenes = Callable[[range], Iterator[Item]]
"""Seeds → the simulator's scenes of these seeds, as items. The caller passes this function, because
`spear.labels` does not import the simulator."""

_open_scene = lru_cache(maxsize=1)(RgbdScene)  # the scene that was opened last stays open


def list_items(
    arguments: Sequence[str],
    rate: float = 1.0,
    per_episode: int = 4,
    excluded_folder: Path | None = None,
    list_scenes: ListScenes | None = None,
) -> Iterator[Item]:
    """List the images behind all arguments. An image that several arguments name is listed once.

    Args:
        arguments: Files, folders, `rgbd:` and `sim:`, as in this module's docstring.
        rate: How many frames per second of a video are listed.
        per_episode: How many frames of each robot episode are listed. They are spread evenly from
            the first to the last step.
        excluded_folder: A folder that is ignored. Pass the folder of the labels, which may be
            inside a folder of photos.
        list_scenes: Lists the scenes of `sim:` arguments. Without it, they are refused.

    Raises:
        SpearError: There is nothing to label in an argument.
    """
    # Files may have changed since an earlier listing in this process: forget what was read.
    for cached in (_open_scene, _read_episode, read_column_of_row_group):
        cached.cache_clear()

    listed_names: set[str] = set()
    for argument in arguments:
        path = os.path.normpath(argument)
        if path.startswith("sim:"):
            items = _list_simulated_scenes(path, list_scenes)
        else:
            items = _list_recorded_images(path, rate, per_episode, excluded_folder)
        for item in items:
            if len(arguments) > 1:
                name = os.path.abspath(item.key)
                if name in listed_names:
                    continue
                listed_names.add(name)
            # Parquet stores keys as valid Unicode, which names of files need not be.
            yield item._replace(key=item.key.encode(errors="backslashreplace").decode())


def _list_simulated_scenes(argument: str, list_scenes: ListScenes | None) -> Iterator[Item]:
    """List the scenes that a `sim:` argument names."""
    if list_scenes is None:
        raise SpearError(f"{argument} needs the simulator. Label it with `spear label`.")
    return list_scenes(parse_scene_seeds(argument, "sim"))


def _list_recorded_images(
    path: str, rate: float, per_episode: int, excluded_folder: Path | None
) -> Iterator[Item]:
    """List the images of an RGB-D scene, a dataset of robot episodes, or other files."""
    from spear.data.readers.formats import find_format

    if path.startswith("rgbd:"):
        return _list_rgbd_frames(path.removeprefix("rgbd:"))
    if find_format(path) is not None:
        return _list_episode_frames(path, per_episode)
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


def _list_rgbd_frames(folder: str) -> Iterator[Item]:
    """List the frames of an RGB-D scene; an item's location is the index of its frame."""
    scene = _open_scene(folder)
    if scene.num_without_depth:
        notice(
            f"{format_count(scene.num_without_depth, 'color images')} of {folder} are ignored, "
            "because no image in depth/ has the same name."
        )
    for index, source in enumerate(scene.sources):
        yield Item(source, read_rgbd_frames, folder, index, scene.make_file_stamp(index))


def read_rgbd_frames(folder: str, indices: Sequence[int]) -> Iterator[Content]:
    """Read the frames of an RGB-D scene with these indices."""
    for index in indices:
        try:
            yield _open_scene(folder)[index]  # opened once, because the scene is cached
        except SpearError as error:
            yield error


def _list_episode_frames(folder: str, per_episode: int) -> Iterator[Item]:
    """List frames of a dataset of robot episodes; see `read_episode_frames` for locations."""
    from spear.data.readers.formats import (
        count_episodes,
        find_format,
        fingerprint_dataset,
        open_dataset,
    )

    has_splits = find_format(folder) != "store"  # an episode store is not divided into splits
    stamp = fingerprint_dataset(open_dataset(folder))
    for split, num_episodes in count_episodes(folder).items():
        name = f"{folder}/{split}" if has_splits else folder
        for episode in range(num_episodes):
            for number in range(per_episode):
                key = f"{name}#{episode}/{number + 1}-of-{per_episode}"
                location = (split, episode, number, per_episode)
                yield Item(key, read_episode_frames, folder, location, stamp)


def read_episode_frames(
    folder: str, locations: Sequence[tuple[str, int, int, int]]
) -> Iterator[Content]:
    """Read some frames of a dataset of robot episodes in any format.

    Args:
        folder: The dataset.
        locations: For each frame (split, index of the episode in the split, number of the frame
            from 0, number of frames per episode).
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
        # Spread the frames evenly: the first is at step 0, the last at the last step.
        num_intervals = max(min(per_episode, num_steps) - 1, 1)  # between the frames
        step = number * (num_steps - 1) // num_intervals
        yield bytes(episode.images[camera][step])


@lru_cache(maxsize=1)
def _read_episode(folder: str, split: str, index: int) -> Episode | SpearError:
    """Read an episode. If it cannot be read, return the error, so that it is cached as well."""
    from spear.data.readers import formats

    try:
        return next(formats.read_episodes(folder, f"{split}[{index}:{index + 1}]"))
    except SpearError as error:
        return error
