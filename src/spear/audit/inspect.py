"""Describe a folder of robot data in a few lines of text, for `spear data inspect`."""

import contextlib
import io
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from spear.data.readers.columns import (
    Steps,
    are_raw_images,
    count_steps,
    is_depth_png,
    walk_columns,
)
from spear.data.readers.dataset_layout import (
    LAYOUT_FILE,
    REGISTRY,
    DatasetLayout,
    find_missing_fields,
)
from spear.data.readers.formats import Dataset, open_dataset
from spear.data.readers.lerobot import LeRobotFolder
from spear.data.readers.rlds import RldsFolder
from spear.data.readers.video import read_frames
from spear.data.store.episode_store import EpisodeStore
from spear.errors import SpearError, escape_control_characters, format_count
from spear.types import Array
from spear.util.images import IMAGE_MAGIC_BYTES, decode_image
from spear.util.skipped_items import SkippedItems

MAX_INSTRUCTIONS = 5  # this many instructions are shown, the most frequent ones first
MAX_REASONS = 5  # for this many skipped episodes, the reason is shown
MAX_AXES = 16  # up to this many numbers of a column are shown one by one
MAX_EPISODES = 50  # at most this many episodes are read, because reading all may take hours


def describe_dataset(path: str | Path) -> str:
    """Describe the folder `path` of robot data in text.

    Raises:
        SpearError: the folder is broken, or has no format that this package reads.
    """
    folder = open_dataset(path)
    if isinstance(folder, EpisodeStore):
        return _describe_store(folder)
    return _describe_foreign_dataset(folder)


def _describe_store(store: EpisodeStore) -> str:
    """Describe an episode store."""
    lengths = store.lengths
    rates = Counter(f"{rate_hz:g} Hz" for rate_hz in store.rates_hz)
    rate_counts = ", ".join(f"{rate} (episodes: {n})" for rate, n in rates.most_common())
    percent_known = 100 * store.num_known_actions.sum() / lengths.sum()
    num_steps = format_count(lengths.sum(), "steps")
    lines = [
        f"{store.path}: a store of episodes",
        f"episodes      {len(store)}, {num_steps} ({_format_range(lengths)} each)",
        f"rate          {rate_counts}",
        f"targets       {percent_known:.1f} % of the steps have a known action",
    ]
    if len(store) > MAX_EPISODES:
        indices = np.linspace(0, len(store) - 1, MAX_EPISODES).round().astype(int)
        store = store.subset(indices.tolist())
        lines.append(f"looked at     {MAX_EPISODES} episodes, spread over all")

    episodes = [store.without_images(index) for index in range(len(store))]
    for camera in store.cameras:
        lines.append(f"camera        {camera}: {_describe_store_camera(store, camera)}")
    success = Counter(episode.success for episode in episodes)
    lines.append(f"success       {success[True]} yes, {success[False]} no, {success[None]} unknown")
    positions = np.concatenate([episode.position for episode in episodes])
    lines.append(f"position, m   {_format_xyz_ranges_without_extremes(positions)}")
    # The translations [steps, 3] of the known actions.
    translations = [np.asarray(episode.action)[episode.action_mask, :3] for episode in episodes]
    known_translations = np.concatenate(translations)
    if len(known_translations):
        lines.append(
            f"step, mm      {_format_xyz_ranges_without_extremes(1000 * known_translations)}"
        )
    lines += _summarize_instructions(episode.instruction for episode in episodes)
    return "\n".join(escape_control_characters(line) for line in lines)


def _describe_store_camera(store: EpisodeStore, camera: str) -> str:
    """Say how large a camera's images are, and how many episodes have this camera."""
    num_episodes = format_count(len(store), "episodes")
    episodes_with_camera = []
    for index in range(len(store)):
        first_image = store.image(index, 0, camera)
        if first_image is not None:
            episodes_with_camera.append(index)
    if not episodes_with_camera:
        return f"in none of {num_episodes}"
    first = episodes_with_camera[0]
    encoded = store.image(first, 0, camera) or b""
    image = decode_image(encoded, f"{store.source(first)} step 0 camera {camera!r}")
    height, width = image.shape[:2]
    return f"{width} x {height} pixels, in {len(episodes_with_camera)} of {num_episodes}"


def _describe_foreign_dataset(folder: Dataset) -> str:
    """Describe a dataset in another format than ours."""
    episodes: list[Steps] = []
    reasons: list[str] = []
    for steps in _read_first_or_spread_episodes(folder):
        if isinstance(steps, SpearError):
            reasons.append(str(steps))
        else:
            episodes.append(dict(walk_columns(steps)))
    if not episodes:
        skipped = SkippedItems(limit=0.0, reasons=reasons)  # only to summarize the reasons
        reason = skipped.summarize() or "it has none"
        raise SpearError(
            f"no episode of {folder.path} can be read ({reason}). Correct the dataset."
        )

    splits = ", ".join(f"{name} {length}" for name, length in folder.split_lengths.items())
    num_read = format_count(len(episodes), "episodes")
    lengths_read = [count_steps(episode) for episode in episodes]
    if isinstance(folder, LeRobotFolder):
        title, rate, num_steps = _summarize_lerobot(folder)
        texts = []
        for episode in folder.episodes:
            texts.extend(episode.tasks)
        cameras = _describe_lerobot_cameras(folder)
        axes = {
            _to_column_name(name): feature.component_names
            for name, feature in folder.info.features.items()
        }
    else:
        title = f"an RLDS dataset, {folder.name} {folder.version}".rstrip()
        rate, texts = _describe_rate_and_read_instructions(folder, episodes)
        num_steps = ""
        cameras = []
        axes = {}

    lines = [
        f"{folder.path}: {title}",
        f"layout        {_get_layout_status(folder.name, folder.path).description}",
        f"rate          {rate}",
        f"episodes      {splits}{num_steps}",
        f"looked at     {num_read} ({_format_range(lengths_read)} steps each)",
    ]
    lines += [f"skipped       {reason}" for reason in reasons[:MAX_REASONS]]
    lines += cameras
    lines += _format_columns(episodes, axes)
    lines += _summarize_instructions(texts)
    return "\n".join(escape_control_characters(line) for line in lines)


def _to_column_name(feature_name: str) -> str:
    """Convert a LeRobot feature's name to the form that layouts use."""
    return feature_name.replace(".", "/")


class _LeRobotSummary(NamedTuple):
    """Title, rate and number of steps of a LeRobot dataset, in words."""

    title: str
    rate: str
    num_steps: str


def _summarize_lerobot(folder: LeRobotFolder) -> _LeRobotSummary:
    """Summarize the metadata of a LeRobot dataset."""
    info = folder.info
    lengths = [episode.length for episode in folder.episodes]
    title = f"a LeRobot dataset, {info.codebase_version}, robot {info.robot_type or 'not named'}"
    num_steps = format_count(sum(lengths), "steps")
    return _LeRobotSummary(
        title, f"{info.fps:g} Hz", f", {num_steps} ({_format_range(lengths)} each)"
    )


def _describe_lerobot_cameras(folder: LeRobotFolder) -> list[str]:
    """Describe each camera of a LeRobot dataset in a line."""
    lines = []
    for name, feature in folder.info.features.items():
        if name not in folder.image_features:
            continue
        kind = "images in video" if feature.dtype == "video" else "images"
        size = " x ".join(map(str, feature.shape))
        depth = ", depth: not read" if feature.is_depth else ""
        lines.append(f"  {_to_column_name(name):<34} {kind}, {size}{depth}")
    return lines


def _describe_rate_and_read_instructions(
    folder: RldsFolder, episodes: Sequence[Steps]
) -> tuple[str, list[str]]:
    """Return the rate of an RLDS dataset in words, and the instructions of some of its episodes.

    RLDS has no rate, so the rate is the one that the layout names.
    """
    rate = "not known"
    instruction_column = DatasetLayout.instruction
    with contextlib.suppress(SpearError):
        layout = folder.load_layout()
        rate = f"{layout.rate_hz:g} Hz, by the layout"
        instruction_column = layout.instruction
    texts = []
    for episode in episodes:
        instructions = episode.get(instruction_column)
        if isinstance(instructions, list):
            texts.append(instructions[0].decode("utf-8", "replace"))
    return rate, texts


def _read_first_or_spread_episodes(folder: Dataset) -> list[Steps | SpearError]:
    """Read some episodes, or what is wrong with each.

    Of an RLDS dataset these are the first episodes. Of a LeRobot dataset they are spread over all
    episodes, and images are not read.
    """
    if isinstance(folder, RldsFolder):
        first_split = next(iter(folder.splits))
        raw_episodes = itertools.islice(folder.read_steps(first_split), MAX_EPISODES)
        return [steps for _, steps in raw_episodes]
    num_episodes = len(folder.episodes)
    spread = np.linspace(0, num_episodes - 1, min(num_episodes, MAX_EPISODES))
    indices = np.unique(spread.round().astype(int)).tolist()
    return [_read_and_check_lerobot_episode(folder, index) for index in indices]


def _read_and_check_lerobot_episode(folder: LeRobotFolder, index: int) -> Steps | SpearError:
    """Read the rows of an episode.

    Returns:
        The rows, without images; or what is wrong with them or with the end of a video.
    """
    episode = folder.episodes[index]
    try:
        steps = folder.read_episode_columns(index, image_columns=())
        for file, first_s, end_s in episode.videos.values():
            # An incomplete download lacks the end of a video. Try to read the episode's last frame:
            # the first one after the middle between the last two.
            last_s = max(first_s + (episode.length - 1.5) / folder.info.fps, 0.0)
            if next(read_frames(file, last_s, end_s), None) is None:
                return SpearError(
                    f"the video {file} ends before {last_s:.4g} s, where the metadata have more "
                    "frames. Delete it, and download this file again."
                )
        return steps
    except SpearError as error:
        return error


def has_column_layout(path: str | Path) -> bool:
    """Return whether it is known what the columns of a dataset mean.

    It is known from the folder's own `spear.json`, from the registry, or because the format is
    ours.
    """
    dataset = open_dataset(path)
    if isinstance(dataset, EpisodeStore):
        return True
    return _get_layout_status(dataset.name, dataset.path).is_known


class _LayoutStatus(NamedTuple):
    """Whether it is known what the columns of a dataset mean, and a description in words."""

    is_known: bool
    description: str


def _get_layout_status(name: str, folder: Path) -> _LayoutStatus:
    """Find out whether a dataset's layout is known.

    Args:
        name: the dataset's name in the registry.
        folder: the dataset's folder, which may contain a `spear.json`.
    """
    if (folder / LAYOUT_FILE).is_file():
        return _LayoutStatus(is_known=True, description=f"described by {folder / LAYOUT_FILE}")
    if name not in REGISTRY:
        return _LayoutStatus(is_known=False, description="not known: see spear data describe")
    missing_fields = find_missing_fields(REGISTRY[name])
    if missing_fields:
        description = (
            f"not known well enough ({', '.join(missing_fields)}): {LAYOUT_FILE} can say it"
        )
        return _LayoutStatus(is_known=False, description=description)
    return _LayoutStatus(is_known=True, description="known")


def _format_columns(episodes: Sequence[Steps], axes: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Describe each column of some episodes in a line or more, with the ranges of its numbers.

    Args:
        episodes: the columns of each episode.
        axes: column → names of its numbers, if the dataset has such names.
    """
    for name, values in episodes[0].items():
        # Of a column of encoded images or texts; no bytes of other columns.
        first_bytes = values[0] if isinstance(values, list) and values else b""
        if are_raw_images(values):
            height, width = values.shape[1:3]
            yield f"  {name:<34} raw image, {width} x {height} pixels"
        elif isinstance(values, np.ndarray) and values.size:
            yield from _format_numbers(name, values, episodes, axes.get(name, ()))
        elif is_depth_png(first_bytes):
            width, height = Image.open(io.BytesIO(first_bytes)).size
            yield f"  {name:<34} depth, {width} x {height} pixels: not read"
        elif first_bytes.startswith(IMAGE_MAGIC_BYTES):
            pixels = decode_image(first_bytes, name)
            height, width = pixels.shape[:2]
            blank = ", blank" if pixels.max() == pixels.min() else ""
            yield f"  {name:<34} image, {width} x {height} pixels{blank}"
        elif isinstance(values, str):
            yield f"  {name:<34} not read: {values}"
        else:
            yield f"  {name:<34} text"


def _format_numbers(
    name: str, first_values: Array, episodes: Sequence[Steps], axis_names: Sequence[str]
) -> Iterator[str]:
    """Describe a column of numbers: type, shape, range and NaN.

    If the column has 2 to `MAX_AXES` numbers per step, the range of each is shown.

    Args:
        name: the column.
        first_values: its values in the first episode.
        episodes: the columns of each episode.
        axis_names: names of the column's numbers; empty if they are not known.
    """
    rows = _join_rows_of_same_shape(name, first_values, episodes)
    # fmin and fmax leave NaN out.
    low = np.fmin.reduce(rows).astype(float)  # [d]
    high = np.fmax.reduce(rows).astype(float)  # [d]
    shows_each_axis = 1 < len(low) <= MAX_AXES

    description = str(first_values.dtype)
    if first_values.ndim > 1:
        description += f" {list(first_values.shape[1:])}"
    if axis_names:
        description += f": {', '.join(axis_names)}"
    if not shows_each_axis:
        description += f", {np.fmin.reduce(low):.4g} … {np.fmax.reduce(high):.4g}"
    num_nan_rows = int(np.isnan(rows).any(1).sum())
    if num_nan_rows:
        description += f", NaN in {num_nan_rows} of {len(rows)} rows"
    yield f"  {name:<34} {description}"
    if shows_each_axis:
        for label, limits in (("from", low), ("to", high)):
            numbers = "".join(f" {limit:>9.4g}" for limit in limits)
            yield f"  {'':<34}   {label:<5}{numbers}"


def _join_rows_of_same_shape(name: str, values: Array, episodes: Sequence[Steps]) -> Array:
    """Concatenate a column's rows [T, d] of all episodes in which it has the shape of `values`."""
    columns: list[Any] = []
    for episode in episodes:
        column = episode.get(name)
        if isinstance(column, np.ndarray) and column.shape[1:] == values.shape[1:]:
            columns.append(column.reshape(len(column), -1))
    return np.concatenate(columns)


def _format_range(lengths: Array | Sequence[int]) -> str:
    """Format the smallest, median and largest length, or the only one."""
    low = int(np.min(lengths))
    high = int(np.max(lengths))
    if low == high:
        return f"{low}"
    return f"{low} … {int(np.median(lengths))} … {high}"


def _format_xyz_ranges_without_extremes(values: Array) -> str:
    """Format the range of x, y and z, each without the lowest and highest 1 % of values [N, 3]."""
    low, high = np.quantile(values, [0.01, 0.99], axis=0)
    ranges = []
    for index, axis in enumerate("xyz"):
        ranges.append(f"{axis} {low[index]:.4g} … {high[index]:.4g}")
    return ", ".join(ranges) + " (98 %)"


def _summarize_instructions(texts: Iterable[str]) -> list[str]:
    """Say how many different instructions there are, and show the most frequent ones."""
    counts = Counter(text.strip() or "(none)" for text in texts)
    lines = [f"instructions  {len(counts)} different"]
    for text, number in counts.most_common(MAX_INSTRUCTIONS):
        lines.append(f"  {number:>6} × {text}")
    if len(counts) > MAX_INSTRUCTIONS:
        lines.append(f"         … and {len(counts) - MAX_INSTRUCTIONS} more")
    return lines
