"""Makes a page about some episodes of a dataset: images, actions over time, paths of the gripper.

If nobody has described the dataset yet, the page shows its columns as they are. In such charts the
reader can see what `state[3]` is, and where the gripper closes, instead of guessing.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from spear.audit.dataset_audit import read_episode_steps
from spear.audit.inspect import describe_dataset, has_column_layout
from spear.data.actions import get_or_derive_actions
from spear.data.readers.columns import Steps, is_depth_png, walk_columns
from spear.data.readers.dataset_layout import LAYOUT_FILE
from spear.data.readers.formats import (
    check_enough_good,
    convert_episodes,
    count_episodes,
    read_episodes,
)
from spear.errors import format_count
from spear.geometry import quat_log, quat_to_matrix
from spear.report.page import render
from spear.report.plot import GREY, XYZ_COLORS, Axis, Line, draw_chart
from spear.types import Array, Episode
from spear.util.files import write_text
from spear.util.images import IMAGE_MAGIC_BYTES, decode_image, to_jpeg_data_uri
from spear.util.skipped_items import SkippedItems

MAX_EPISODES = 4  # episodes on the page
MAX_FRAMES = 8  # images in a strip; a strip is a row of images of one camera
STRIP_HEIGHT_PX = 120
NUMBERS_PER_CHART = 3  # lines in a chart of a column that has several numbers per step
MAX_NUMBERS = 24  # of a column with more numbers per step, only the first are drawn
MAX_LISTED_STEPS = 8  # the words about a bool column list its first true steps
NUM_DRAWN_FRAMES = 5  # poses whose axes are drawn along a path
# Length of a drawn axis, as a share of the path's extent: so short that axes stay apart.
DRAWN_AXIS_SHARE = 0.14
MIN_PATH_EXTENT_M = 1e-3  # a smaller extent counts as this one, so that axes have a length
PATH_SIZE_PX = (360, 260)  # width and height of a chart of a path
TIME_AXIS = Axis("seconds")


def write_dataset_page(path: str | Path, out: Path, layout: Path | None = None) -> None:
    """Write a page about the dataset in `path` to the file `out`.

    The page shows the first good episodes and lists the ones that were skipped among them.

    Args:
        path: the dataset's folder.
        out: the HTML file to write.
        layout: a file like spear.json; the dataset's own layout if None.

    Raises:
        SpearError: none of the first episodes is good, or the file cannot be written.
    """
    skipped = SkippedItems(limit=1.0)  # any number of episodes may be bad
    split_counts = count_episodes(path)
    split = next(iter(split_counts))  # the first split
    has_layout = layout is not None or has_column_layout(path)
    episodes: Iterator[dict[str, Any]]
    if has_layout:
        episodes = map(_make_episode_section, read_episodes(path, split, layout, skipped))
    else:
        raw_episodes = read_episode_steps(path, split, image_columns=None)  # with all images
        episodes = convert_episodes(raw_episodes, _make_section_without_layout, skipped)
    first_episodes = list(itertools.islice(episodes, MAX_EPISODES))
    check_enough_good(len(first_episodes), skipped, path, split)
    html = render(
        "dataset.html",
        title=f"Dataset: {Path(path).resolve().name}",
        facts=[(f"{count:,}", f"episodes in split {name}") for name, count in split_counts.items()],
        text=describe_dataset(path),
        known=has_layout,
        spec_file=LAYOUT_FILE,
        reasons=skipped.reasons,
        episodes=first_episodes,
    )
    write_text(out, html)


def _make_episode_section(episode: Episode) -> dict[str, Any]:
    """Return the values that the template shows of an episode whose layout is known."""
    strips = []
    for name, images in episode.images.items():
        strips.append((name, _make_strip(images, f"{episode.source} camera {name!r}")))
    actions, is_valid = get_or_derive_actions(episode)  # [T, 8] and [T]
    success = {True: ", a success", False: ", a failure", None: ""}[episode.success]
    length = f"{format_count(len(episode), 'steps')} at {episode.rate_hz:g} Hz"
    num_known = int(is_valid.sum())
    known_actions = np.where(is_valid[:, None], actions, np.nan)  # [T, 8]
    return {
        "title": episode.instruction or "(no instruction)",
        "about": f"{episode.source}: {length}, {num_known} with a known action{success}",
        "strips": strips,
        "charts": _draw_episode(episode, known_actions),
        "quiet": [],
    }


def _draw_episode(episode: Episode, actions: Array) -> list[str]:
    """Return charts of an episode's actions, gripper and path.

    Args:
        episode: the episode.
        actions: [T, 8] translation in meters, rotation quaternion and gripper opening; NaN where
            the action is not known.
    """
    seconds = np.arange(len(episode)) / episode.rate_hz
    translations_mm = 1000 * actions[:, :3]
    rotations = torch.tensor(actions[:, 3:7])  # quaternions
    rotation_vectors_deg = np.degrees(quat_log(rotations).numpy())  # [T, 3]
    gripper_lines = [
        Line("measured", seconds, episode.gripper, GREY),
        Line("commanded", seconds, actions[:, 7], dashed=True),
    ]
    gripper_axis = Axis(ends=(-0.1, 1.1))
    left_axis = Axis("y, to the left", reverse=True)
    return [
        draw_chart(
            _make_xyz_lines(seconds, translations_mm), TIME_AXIS, title="Step, mm (base frame)"
        ),
        draw_chart(
            _make_xyz_lines(seconds, rotation_vectors_deg),
            TIME_AXIS,
            title="Turn, degrees (end-effector frame)",
        ),
        draw_chart(gripper_lines, TIME_AXIS, gripper_axis, title="Gripper (1 is open)"),
        _draw_path(episode, (1, 0), "Path seen from above, m", left_axis, Axis("x")),
        _draw_path(episode, (0, 2), "Path seen from the right, m", Axis("x, forward"), Axis("z")),
    ]


def _make_xyz_lines(x: Array, values: Array) -> list[Line]:
    """Return a line for each column of values [T, 3], named x, y and z, over `x` [T]."""
    return [Line(name, x, values[:, i], XYZ_COLORS[i]) for i, name in enumerate("xyz")]


def _draw_path(
    episode: Episode, plane: tuple[int, int], title: str, x_axis: Axis, y_axis: Axis
) -> str:
    """Draw the end-effector's path in a plane of the base frame, with its axes at some steps.

    Args:
        episode: the episode.
        plane: indices of the base frame's axes (0 x, 1 y, 2 z) that are drawn horizontally and
            vertically.
        title: title of the chart.
        x_axis: the chart's horizontal axis.
        y_axis: the chart's vertical axis.
    """
    across, up = plane
    position = episode.position  # [T, 3]
    lines = [
        Line("", position[:, across], position[:, up], GREY),
        Line("start", position[:1, across], position[:1, up], GREY, dots=True),
    ]
    extent_m = float(np.ptp(position[:, [across, up]], axis=0).max())
    axis_length_m = DRAWN_AXIS_SHARE * max(extent_m, MIN_PATH_EXTENT_M)
    # [T, 3, 3]: the columns are the end-effector's axes in the base frame.
    axes = quat_to_matrix(torch.tensor(episode.rotation)).numpy()
    for step in _spread_steps(len(episode), NUM_DRAWN_FRAMES):
        start = position[step]
        for i, color in enumerate(XYZ_COLORS):
            axis_vector = axis_length_m * axes[step, :, i]
            ends = np.stack([start, start + axis_vector])  # [2, 3]
            lines.append(Line("", ends[:, across], ends[:, up], color))
    return draw_chart(lines, x_axis, y_axis, title, PATH_SIZE_PX, has_equal_scales=True)


def _make_section_without_layout(steps: Steps, source: str) -> dict[str, Any]:
    """Return the values that the template shows of an episode whose layout is not known.

    Columns of images become strips, and numbers that change become charts. Words describe every
    other column.

    Args:
        steps: the episode's columns.
        source: name of the episode.
    """
    strips: list[tuple[str, Any]] = []
    charts: list[str] = []
    quiet_columns: list[tuple[str, str]] = []  # columns without images or charts: name, words
    for name, values in walk_columns(steps):
        if not len(values):
            continue
        if isinstance(values, str):  # the reason why the column was not read
            quiet_columns.append((name, f"not read: {values}"))
        elif isinstance(values, np.ndarray):
            description = _describe_if_no_signal(values)
            if description:
                quiet_columns.append((name, description))
            else:
                charts += _draw_column(name, values)
        elif is_depth_png(values[0]):
            quiet_columns.append((name, "depth images, not shown"))
        elif values[0].startswith(IMAGE_MAGIC_BYTES):
            strips.append((name, _make_strip(values, f"{source} column {name!r}")))
        else:  # a text
            quiet_columns.append((name, bytes(values[0]).decode("utf-8", "replace")))
    return {
        "title": source,
        "about": "",
        "strips": strips,
        "charts": charts,
        "quiet": quiet_columns,
    }


def _describe_if_no_signal(values: Array) -> str:
    """Describe a column [T, …] if it says nothing about motion, such as a counter; else return "".

    A signal is a column of numbers that is worth a chart.
    """
    is_number = values.dtype.kind in "fiub"  # float, signed and unsigned integer, bool
    if not is_number or values.ndim > 2:
        return f"{values.dtype} {list(values.shape[1:])}, not shown"
    if values.dtype.kind == "b" and values.ndim == 1:
        true_steps = np.flatnonzero(values)[:MAX_LISTED_STEPS]
        if len(true_steps) == 0:
            return "always false"
        return f"true at step {', '.join(map(str, true_steps))}"

    table = values.reshape(len(values), -1).astype(np.float64)  # [T, numbers per step]
    is_single = table.shape[1] == 1
    if (table == table[0]).all():
        return f"always {table[0, 0]:g}" if is_single else "the same numbers in every step"
    changes = np.diff(table[:, 0])  # [T - 1]
    # The same change at every step, but for rounding.
    is_even = len(changes) > 2 and np.ptp(changes) < 1e-3 * abs(changes[0])
    if is_single and is_even:
        return f"counts from {table[0, 0]:g} to {table[-1, 0]:g}"
    return ""


def _draw_column(name: str, values: Array) -> Iterator[str]:
    """Yield charts of a column [T, …] over its steps, each with `NUMBERS_PER_CHART` numbers."""
    numbers = values.reshape(len(values), -1)[:, :MAX_NUMBERS].astype(np.float64)
    num_steps, num_numbers = numbers.shape
    is_single = values.ndim == 1
    for first in range(0, num_numbers, NUMBERS_PER_CHART):
        end = min(first + NUMBERS_PER_CHART, num_numbers)
        index_range = "" if is_single else f"[{first}:{end}]"
        lines = []
        for index, color in zip(range(first, end), XYZ_COLORS, strict=False):
            label = "" if is_single else str(index)
            lines.append(Line(label, np.arange(num_steps), numbers[:, index], color))
        yield draw_chart(lines, Axis("step"), title=name + index_range)


def _make_strip(images: Sequence[bytes], name_in_messages: str) -> list[tuple[int, str]]:
    """Return some of a camera's images, as pairs of the step and a small version as data URI.

    Args:
        images: the encoded images of all steps.
        name_in_messages: name of the images in error messages.
    """
    strip = []
    for step in _spread_steps(len(images), MAX_FRAMES):
        image = Image.fromarray(decode_image(images[step], f"{name_in_messages} step {step}"))
        width = max(1, round(image.width * STRIP_HEIGHT_PX / image.height))
        small = image.resize((width, STRIP_HEIGHT_PX), Image.Resampling.LANCZOS)
        strip.append((step, to_jpeg_data_uri(np.asarray(small))))
    return strip


def _spread_steps(length: int, max_steps: int) -> list[int]:
    """Return at most `max_steps` of `length` steps, evenly spread from the first to the last."""
    spread = np.linspace(0, length - 1, min(max_steps, length))
    return np.unique(spread.round().astype(int)).tolist()
