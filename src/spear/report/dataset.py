"""A page that shows some episodes of a dataset: frames, actions over time, paths of the gripper.

If nobody has described the dataset yet, the page shows its columns as they are: what is in
`state[3]`, and where the gripper closes, is easier to see than to guess.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from spear.audit.dataset_audit import episode_steps
from spear.audit.inspect import inspect, is_layout_known
from spear.data.actions import canonicalize_actions
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

MAX_EPISODES = 4  # on the page
MAX_FRAMES = 8  # in the strip of each camera
STRIP_HEIGHT_PX = 120
NUMBERS_PER_CHART = 3
MAX_NUMBERS = 24  # of a column, in all its charts
MAX_LISTED_STEPS = 8  # at which a column of truth values is true
NUM_DRAWN_FRAMES = 5  # poses whose axes are drawn along a path
PATH_SIZE_PX = (360, 260)
TIME_AXIS = Axis("seconds")


def write_page(path: str | Path, out: Path, layout: Path | None = None) -> None:
    """Write a page about the dataset in `path` to the file `out`.

    The page shows the first good episodes and lists those that were skipped before them.

    Args:
        path: the dataset's folder.
        out: the HTML file to write.
        layout: a file like spear.json; the dataset's own layout if None.

    Raises:
        SpearError: none of the first episodes is good, or the file cannot be written.
    """
    skipped = SkippedItems(limit=1.0)
    split_counts = count_episodes(path)
    split = next(iter(split_counts))
    has_layout = layout is not None or is_layout_known(path)
    episodes: Iterator[dict[str, Any]]
    if has_layout:
        episodes = map(_show_episode, read_episodes(path, split, layout, skipped))
    else:
        episodes = convert_episodes(episode_steps(path, split, None), _show_columns, skipped)
    first_episodes = list(itertools.islice(episodes, MAX_EPISODES))
    check_enough_good(len(first_episodes), skipped, path, split)
    html = render(
        "dataset.html",
        title=f"Dataset: {Path(path).resolve().name}",
        facts=[(f"{n:,}", f"episodes in split {name}") for name, n in split_counts.items()],
        text=inspect(path),
        known=has_layout,
        spec_file=LAYOUT_FILE,
        reasons=skipped.reasons,
        episodes=first_episodes,
    )
    write_text(out, html)


def _show_episode(episode: Episode) -> dict[str, Any]:
    """Return an episode as the template shows it."""
    strips = []
    for name, images in episode.images.items():
        strips.append((name, _make_strip(images, f"{episode.source} camera {name!r}")))
    actions, is_valid = canonicalize_actions(episode)
    success = {True: ", a success", False: ", a failure", None: ""}[episode.success]
    length = f"{format_count(len(episode), 'steps')} at {episode.rate_hz:g} Hz"
    num_known = int(is_valid.sum())
    return {
        "title": episode.instruction or "(no instruction)",
        "about": f"{episode.source}: {length}, {num_known} with a known action{success}",
        "strips": strips,
        "charts": _draw_episode(episode, np.where(is_valid[:, None], actions, np.nan)),
        "quiet": [],
    }


def _draw_episode(episode: Episode, actions: Array) -> list[str]:
    """Charts of actions [T, 8] (NaN where unknown), gripper and path."""
    seconds = np.arange(len(episode)) / episode.rate_hz
    turns_deg = np.degrees(quat_log(torch.tensor(actions[:, 3:7])).numpy())
    gripper = [
        Line("measured", seconds, episode.gripper, GREY),
        Line("commanded", seconds, actions[:, 7], dashed=True),
    ]
    left_axis = Axis("y, to the left", reverse=True)
    return [
        draw_chart(
            _xyz_lines(seconds, 1000 * actions[:, :3]), TIME_AXIS, title="Step, mm (base frame)"
        ),
        draw_chart(
            _xyz_lines(seconds, turns_deg), TIME_AXIS, title="Turn, degrees (end-effector frame)"
        ),
        draw_chart(gripper, TIME_AXIS, Axis(ends=(-0.1, 1.1)), "Gripper (1 is open)"),
        _draw_path(episode, (1, 0), "Path seen from above, m", left_axis, Axis("x")),
        _draw_path(episode, (0, 2), "Path seen from the right, m", Axis("x, forward"), Axis("z")),
    ]


def _xyz_lines(x: Array, values: Array) -> list[Line]:
    return [Line(name, x, values[:, i], XYZ_COLORS[i]) for i, name in enumerate("xyz")]


def _draw_path(
    episode: Episode, plane: tuple[int, int], title: str, x_axis: Axis, y_axis: Axis
) -> str:
    """Return the end-effector's path in a plane of the base frame, with its own x y z axes at some steps.

    Args:
        plane: the base frame's axes that are drawn to the right and upward.
    """
    across, up = plane
    position = episode.position
    lines = [
        Line("", position[:, across], position[:, up], GREY),
        Line("start", position[:1, across], position[:1, up], GREY, dots=True),
    ]
    extent = float(np.ptp(position[:, [across, up]], axis=0).max())
    axis_length = 0.14 * max(extent, 1e-3)
    axes = quat_to_matrix(torch.tensor(episode.rotation)).numpy()  # columns, base frame
    for step in _spread_steps(len(episode), NUM_DRAWN_FRAMES):
        for i, color in enumerate(XYZ_COLORS):
            ends = np.stack([position[step], position[step] + axis_length * axes[step, :, i]])
            lines.append(Line("", ends[:, across], ends[:, up], color))
    return draw_chart(lines, x_axis, y_axis, title, PATH_SIZE_PX, equal=True)


def _show_columns(steps: Steps, source: str) -> dict[str, Any]:
    """Return an episode by its columns: images, charts of numbers that change, words about all else."""
    strips: list[tuple[str, Any]] = []
    charts: list[str] = []
    quiet: list[tuple[str, str]] = []
    for name, values in walk_columns(steps):
        if not len(values):
            continue
        if isinstance(values, str):
            quiet.append((name, f"not read: {values}"))
        elif isinstance(values, np.ndarray):
            description = _describe_without_signal(values)
            if description:
                quiet.append((name, description))
            else:
                charts += _draw_column(name, values)
        elif is_depth_png(values[0]):
            quiet.append((name, "depth images, not shown"))
        elif values[0].startswith(IMAGE_MAGIC_BYTES):
            strips.append((name, _make_strip(values, f"{source} column {name!r}")))
        else:
            quiet.append((name, bytes(values[0]).decode("utf-8", "replace")))
    return {"title": source, "about": "", "strips": strips, "charts": charts, "quiet": quiet}


def _describe_without_signal(values: Array) -> str:
    """What a column holds that says nothing about motion, such as a counter; "" for a signal."""
    if values.dtype.kind not in "fiub" or values.ndim > 2:
        return f"{values.dtype} {list(values.shape[1:])}, not shown"
    if values.dtype.kind == "b" and values.ndim == 1:
        true_steps = np.flatnonzero(values)[:MAX_LISTED_STEPS]
        if len(true_steps) == 0:
            return "always false"
        return f"true at step {', '.join(map(str, true_steps))}"

    table = values.reshape(len(values), -1).astype(np.float64)
    is_single = table.shape[1] == 1
    if (table == table[0]).all():
        return f"always {table[0, 0]:g}" if is_single else "the same numbers in every step"
    change = np.diff(table[:, 0])
    if is_single and len(change) > 2 and np.ptp(change) < 1e-3 * abs(change[0]):
        return f"counts from {table[0, 0]:g} to {table[-1, 0]:g}"
    return ""


def _draw_column(name: str, values: Array) -> Iterator[str]:
    """Charts of a column over its steps, some numbers in each."""
    table = values.reshape(len(values), -1)[:, :MAX_NUMBERS].astype(np.float64)
    is_single = values.ndim == 1
    for first in range(0, table.shape[1], NUMBERS_PER_CHART):
        numbers = table[:, first : first + NUMBERS_PER_CHART]
        end = first + numbers.shape[1]
        column_range = "" if is_single else f"[{first}:{end}]"
        lines = []
        for index, color in zip(range(first, end), XYZ_COLORS, strict=False):
            label = "" if is_single else str(index)
            lines.append(Line(label, np.arange(len(table)), table[:, index], color))
        yield draw_chart(lines, Axis("step"), title=name + column_range)


def _make_strip(images: Sequence[bytes], where: str) -> list[tuple[int, str]]:
    """Some of a camera's images: their steps, and small versions as data URIs."""
    strip = []
    for step in _spread_steps(len(images), MAX_FRAMES):
        image = Image.fromarray(decode_image(images[step], f"{where} step {step}"))
        width = max(1, round(image.width * STRIP_HEIGHT_PX / image.height))
        small = image.resize((width, STRIP_HEIGHT_PX), Image.Resampling.LANCZOS)
        strip.append((step, to_jpeg_data_uri(np.asarray(small))))
    return strip


def _spread_steps(length: int, max_steps: int) -> list[int]:
    """At most `max_steps` steps, evenly spread from the first to the last."""
    spread = np.linspace(0, length - 1, min(max_steps, length))
    return np.unique(spread.round().astype(int)).tolist()
