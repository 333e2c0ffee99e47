"""A page that shows some episodes of a dataset: frames, actions over time, the path of the gripper.

Of a dataset whose layout nobody has said yet it shows the columns as they are: what is in `state[3]`, and
where the gripper closes, is easier seen than guessed.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from spear.audit.dataset_audit import episode_steps
from spear.audit.inspect import inspect, layout_known
from spear.data.actions import canonicalize_actions
from spear.data.readers.columns import Steps, walk_columns
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
from spear.report.plot import GREY, XYZ, Axis, Line, chart
from spear.types import Array, Episode
from spear.util.files import write_text
from spear.util.images import IMAGE_MAGIC_BYTES, decode_image, to_jpeg_data_uri
from spear.util.skipped_items import SkippedItems

EPISODES, FRAMES = 4, 8
"""Episodes on the page, and frames in the strip of each camera."""
STRIP_HEIGHT = 120
"""Pixels."""
TOGETHER, MOST_NUMBERS = 3, 24
"""Numbers of a column in one chart, and in all its charts."""
TIME = Axis("seconds")


def write_page(path: str | Path, out: Path, layout: Path | None = None) -> None:
    """Write a page on the dataset in `path` to the file `out`; `layout` is its own, if it has none itself.

    The episodes shown are the first good ones; those skipped on the way are listed. Raises SpearError when
    there is no good one among the first, and for a file that cannot be written.
    """
    skipped = SkippedItems(limit=1.0)
    counts = count_episodes(path)
    split = next(iter(counts))
    known = layout is not None or layout_known(path)
    episodes: Iterator[dict[str, Any]]
    if known:
        episodes = map(_episode, read_episodes(path, split, layout, skipped))
    else:
        episodes = convert_episodes(episode_steps(path, split, None), _columns, skipped)
    shown = list(itertools.islice(episodes, EPISODES))
    check_enough_good(len(shown), skipped, path, split)
    html = render(
        "dataset.html",
        title=f"Dataset: {Path(path).resolve().name}",
        facts=[(f"{n:,}", f"episodes in split {name}") for name, n in counts.items()],
        text=inspect(path),
        known=known,
        spec_file=LAYOUT_FILE,
        reasons=skipped.reasons,
        episodes=shown,
    )
    write_text(out, html)


def _episode(episode: Episode) -> dict[str, Any]:
    actions, valid = canonicalize_actions(episode)
    known = np.where(valid[:, None], actions, np.nan)
    turn = np.degrees(quat_log(torch.tensor(known[:, 3:7])).numpy())
    seconds = np.arange(len(episode)) / episode.rate_hz
    measured = Line("measured", seconds, episode.gripper, GREY)
    gripper = [measured, Line("commanded", seconds, known[:, 7], dashed=True)]
    success = {True: ", a success", False: ", a failure", None: ""}[episode.success]
    source, steps = (
        episode.source,
        f"{format_count(len(episode), 'steps')} at {episode.rate_hz:g} Hz",
    )
    cameras = episode.images.items()
    return {
        "title": episode.instruction or "(no instruction)",
        "about": f"{source}: {steps}, {int(valid.sum())} with a known action{success}",
        "strips": [(name, _strip(images, f"{source} camera {name!r}")) for name, images in cameras],
        "charts": [
            chart(_xyz(seconds, 1000 * known[:, :3]), TIME, title="Step, mm (base frame)"),
            chart(_xyz(seconds, turn), TIME, title="Turn, degrees (end-effector frame)"),
            chart(gripper, TIME, Axis(ends=(-0.1, 1.1)), "Gripper (1 is open)"),
            _path(
                episode, 1, 0, "Path seen from above, m", Axis("y, to the left", reverse=True), "x"
            ),
            _path(episode, 0, 2, "Path seen from the right, m", Axis("x, forward"), "z"),
        ],
        "quiet": [],
    }


def _xyz(x: Array, values: Array) -> list[Line]:
    return [Line(name, x, values[:, i], XYZ[i]) for i, name in enumerate("xyz")]


def _path(episode: Episode, across: int, up: int, title: str, axis: Axis, up_title: str) -> str:
    """The path of the end-effector in a plane of the base frame, with its own x y z axes at some steps."""
    position = episode.position
    lines = [
        Line("", position[:, across], position[:, up], GREY),
        Line("start", position[:1, across], position[:1, up], GREY, dots=True),
    ]
    length = 0.14 * max(float(np.ptp(position[:, [across, up]], axis=0).max()), 1e-3)
    axes = quat_to_matrix(
        torch.tensor(episode.rotation)
    ).numpy()  # columns are the axes in the base frame
    for step in _spread(len(episode), 5):
        for i, colour in enumerate(XYZ):
            ends = np.stack([position[step], position[step] + length * axes[step, :, i]])
            lines.append(Line("", ends[:, across], ends[:, up], colour))
    return chart(lines, axis, Axis(up_title), title, (360, 260), equal=True)


def _columns(steps: Steps, source: str) -> dict[str, Any]:
    """An episode by its columns: images, charts of the numbers that change, words about all else."""
    strips, quiet = [], []
    charts: list[str] = []
    for name, values in walk_columns(steps):
        if not len(values):
            continue
        if isinstance(values, str):
            quiet.append((name, f"not read: {values}"))
        elif not isinstance(values, np.ndarray):
            if values[0].startswith(IMAGE_MAGIC_BYTES):
                strips.append((name, _strip(values, f"{source} column {name!r}")))
            else:
                quiet.append((name, bytes(values[0]).decode("utf-8", "replace")))
        elif words := _without_signal(values):
            quiet.append((name, words))
        else:
            charts += _charts(name, values)
    return {"title": source, "about": "", "strips": strips, "charts": charts, "quiet": quiet}


def _without_signal(values: Array) -> str:
    """What a column holds that says nothing about motion, such as a row's number; "" for a signal."""
    if values.dtype.kind not in "fiub" or values.ndim > 2:
        return f"{values.dtype} {list(values.shape[1:])}, not shown"
    if values.dtype.kind == "b" and values.ndim == 1:
        steps = np.flatnonzero(values)
        return f"true at step {', '.join(map(str, steps[:8]))}" if len(steps) else "always false"
    table = values.reshape(len(values), -1).astype(np.float64)
    if (table == table[0]).all():
        return (
            f"always {table[0, 0]:g}" if table.shape[1] == 1 else "the same numbers in every step"
        )
    change = np.diff(table[:, 0])
    if table.shape[1] == 1 and len(change) > 2 and np.ptp(change) < 1e-3 * abs(change[0]):
        return f"counts from {table[0, 0]:g} to {table[-1, 0]:g}"
    return ""


def _charts(name: str, values: Array) -> Iterator[str]:
    """A column over its steps, some numbers in each chart."""
    table = values.reshape(len(values), -1)[:, :MOST_NUMBERS].astype(np.float64)
    for first in range(0, table.shape[1], TOGETHER):
        some = table[:, first : first + TOGETHER]
        where = "" if values.ndim == 1 else f"[{first}:{first + some.shape[1]}]"
        names = [""] if values.ndim == 1 else [str(first + i) for i in range(some.shape[1])]
        parts = zip(names, some.T, XYZ, strict=False)
        lines = [Line(part, np.arange(len(some)), column, colour) for part, column, colour in parts]
        yield chart(lines, Axis("step"), title=name + where)


def _strip(images: Sequence[bytes], where: str) -> list[tuple[int, str]]:
    """Some of the images of a camera: their steps, and the images as data URIs."""
    shown = []
    for step in _spread(len(images), FRAMES):
        image = Image.fromarray(decode_image(images[step], f"{where} step {step}"))
        width = max(1, round(image.width * STRIP_HEIGHT / image.height))
        small = image.resize((width, STRIP_HEIGHT), Image.Resampling.LANCZOS)
        shown.append((step, to_jpeg_data_uri(np.asarray(small))))
    return shown


def _spread(length: int, most: int) -> list[int]:
    """At most so many steps, evenly spread from the first to the last."""
    return np.unique(np.linspace(0, length - 1, min(most, length)).round().astype(int)).tolist()
