"""A page that shows some episodes of a dataset: frames, actions over time, the path of the gripper.

One HTML file with everything inside: no script, no network. Plots are SVG, written here.
"""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from spear.data.actions import episode_actions
from spear.data.inspect import inspect
from spear.data.readers.formats import episode_counts, read_episodes
from spear.data.readers.spec import Layout
from spear.errors import SpearError
from spear.geometry import quat_log, quat_to_matrix
from spear.types import Array, Episode
from spear.util.files import write_text
from spear.util.images import decode_image, encode_jpeg

EPISODES, FRAMES = 6, 8
"""Episodes on the page, and frames in the strip of each camera."""
STRIP_HEIGHT = 120
"""Pixels."""
COLOURS = ("#d1495b", "#3a8f5c", "#3d6fb6", "#8a6fb0")
"""x, y, z, and the gripper."""
_WIDTH, _HEIGHT, _LEFT = 360, 150, 46
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:0
auto;max-width:1180px;padding:24px;color:#1c1f24;background:#fff}
h1{font-size:1.5em}h2{font-size:1.1em;margin:1.6em 0 .3em}pre{background:#f3f4f6;padding:12px;overflow-x:auto}
.strip{display:flex;gap:2px}.strip img{max-height:120px;flex:0 1 auto;min-width:0;border-radius:2px}
.label{color:#667;font-size:.85em;margin:.4em 0 .1em}.plots{display:flex;flex-wrap:wrap;gap:12px}
svg{background:#fafafa;border:1px solid #e3e5e8;border-radius:4px}svg text{font:11px
system-ui,sans-serif;fill:#556} .bad{color:#a33} @media
(prefers-color-scheme:dark){body{background:#16181c;color:#e6e8eb}pre,svg{background:#1f2227;border-color:#333} svg text,.label{fill:#9aa;color:#9aa}}
"""


def write_page(path: str | Path, out: Path, dataset: Layout = None) -> None:
    """Write a page on the dataset in `path` to the file `out`; `dataset` is its layout, if it has none
    itself.

    The episodes shown are the first good ones; those skipped on the way are listed. Raises SpearError when
    there is no good one among the first, and for a file that cannot be written.
    """
    reasons: list[str] = []
    split = next(iter(episode_counts(path)))
    read = read_episodes(path, split, dataset, lambda error: reasons.append(str(error)))
    episodes = list(itertools.islice(read, EPISODES))
    if not episodes:
        why = f": {reasons[-1]}" if reasons else " (it is empty)"
        raise SpearError(f"no good episode: {path} split {split!r}{why}")
    bad = "".join(f'<p class="bad">skipped: {escape(reason)}</p>' for reason in reasons)
    body = f"<pre>{escape(inspect(path))}</pre>{bad}{''.join(_episode(e) for e in episodes)}"
    write_html(out, Path(path).resolve().name, body)


def write_html(out: Path, title: str, body: str, style: str = "") -> None:
    """Write a page with everything inside to one file; `style` comes after `STYLE`.

    Raises SpearError for a file that cannot be written.
    """
    html = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style><h1>{escape(title)}</h1>{body}</html>\n"
    )
    write_text(out, html)


def _episode(episode: Episode) -> str:
    actions, valid = episode_actions(episode)
    seconds = np.arange(len(episode)) / episode.rate_hz
    turn = quat_log(torch.tensor(actions[:, 3:7])).numpy()
    known = np.where(valid[:, None], actions, np.nan)
    gripper = np.stack([episode.gripper, known[:, 7]], axis=1)
    success = {True: ", a success", False: ", a failure", None: ""}[episode.success]
    strips = "".join(
        f'<div class="label">{escape(camera)}</div>{strip(images, f"{episode.source} camera {camera!r}")}'
        for camera, images in episode.images.items()
    )
    plots = [
        plot("step, mm (base frame)", seconds, 1000 * known[:, :3], "xyz"),
        plot(
            "turn, degrees (end-effector frame)",
            seconds,
            np.degrees(np.where(valid[:, None], turn, np.nan)),
            "xyz",
        ),
        plot(
            "gripper: measured, commanded (1 open)",
            seconds,
            gripper,
            ("measured", "commanded"),
            (-0.15, 1.35),
        ),
        _path("seen from above (x up, y left), m", episode, 1, 0),
        _path("seen from the right (x right, z up), m", episode, 0, 2),
    ]
    return (
        f"<h2>{escape(episode.instruction)}</h2>"
        f'<div class="label">{escape(episode.source)}: {len(episode)} steps at {episode.rate_hz:g} Hz, '
        f"{int(valid.sum())} with a known action{success}</div>"
        f'{strips}<div class="plots">{"".join(plots)}</div>'
    )


def strip(images: Sequence[bytes], where: str) -> str:
    """Some of the images of a camera, beside one another."""
    steps = np.unique(np.linspace(0, len(images) - 1, min(FRAMES, len(images))).round().astype(int))
    shown = []
    for step in steps:
        image = Image.fromarray(decode_image(images[step], f"{where} step {step}"))
        width = max(1, round(image.width * STRIP_HEIGHT / image.height))
        small = np.asarray(image.resize((width, STRIP_HEIGHT), Image.Resampling.LANCZOS))
        data = base64.b64encode(encode_jpeg(small, 85)).decode()
        shown.append(f'<img src="data:image/jpeg;base64,{data}" alt="step {step}" title="step {step}">')
    return f'<div class="strip">{"".join(shown)}</div>'


def _scale(values: Array, room: tuple[float, float]) -> tuple[float, float]:
    """The span of the finite values, with some air around them."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
    air = 0.06 * (high - low) or max(abs(high), 1.0) * 0.1
    return (low - air, high + air) if np.isnan(room[0]) else room


def plot(
    title: str,
    seconds: Array,
    values: Array,
    names: Sequence[str],
    room: tuple[float, float] = (np.nan, np.nan),
    unit: str = " s",
) -> str:
    """Lines over time (or what else `unit` says): values [T, n], gaps where they are not known."""
    low, high = _scale(values, room)
    end = max(float(seconds[-1]), 1e-6)
    x = _LEFT + (seconds / end) * (_WIDTH - _LEFT - 8)
    y = _HEIGHT - 20 - (values - low) / (high - low) * (_HEIGHT - 44)
    out = io.StringIO()
    for column, name in enumerate(names):
        colour = COLOURS[column] if len(names) == 3 else COLOURS[2 + column]
        pen = False
        line = []
        for a, b in zip(x, y[:, column], strict=True):
            if np.isfinite(b):
                line.append(f"{'L' if pen else 'M'}{a:.1f} {b:.1f}")
            pen = bool(np.isfinite(b))
        out.write(f'<path d="{" ".join(line)}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        right = _WIDTH - 8 - sum(7 * len(n) + 12 for n in names[column + 1 :])
        out.write(f'<text x="{right}" y="30" text-anchor="end" ')
        out.write(f'style="fill:{colour}">{escape(name)}</text>')
    return _frame(title, out.getvalue(), (low, high), (0.0, end), unit, _HEIGHT)


def _path(title: str, episode: Episode, across: int, up: int) -> str:
    """The path of the end-effector in a plane of the base frame, with its axes at some steps.

    across, up  which coordinate goes to the right and which upwards; y is drawn to the left, as seen from
    above. Both have the same scale.
    """
    sign = -1 if across == 1 else 1
    size = _WIDTH - _LEFT - 8, 220 - 44
    points = np.stack([sign * episode.position[:, across], episode.position[:, up]], axis=1)
    span = max(float(np.ptp(points[:, 0])) / size[0], float(np.ptp(points[:, 1])) / size[1], 1e-4) * 1.25
    middle = (points.min(0) + points.max(0)) / 2

    def place(values: Array) -> tuple[float, float]:
        return (
            _LEFT + size[0] / 2 + float(values[0] - middle[0]) / span,
            24 + size[1] / 2 - float(values[1] - middle[1]) / span,
        )

    places = [place(p) for p in points]
    line = " ".join(f"{'L' if i else 'M'}{a:.1f} {b:.1f}" for i, (a, b) in enumerate(places))
    body = [f'<path d="{line}" fill="none" stroke="#888" stroke-width="1.4"/>']
    axes = quat_to_matrix(torch.tensor(episode.rotation)).numpy()  # columns are the axes in the base frame
    for step in np.unique(np.linspace(0, len(episode) - 1, min(5, len(episode))).round().astype(int)):
        a, b = places[step]
        for axis in range(3):
            right, above = sign * axes[step, across, axis], axes[step, up, axis]
            body.append(
                f'<line x1="{a:.1f}" y1="{b:.1f}" x2="{a + 16 * right:.1f}" y2="{b - 16 * above:.1f}" '
                f'stroke="{COLOURS[axis]}" stroke-width="2"/>'
            )
    a, b = places[0]
    body.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="#888"/>')
    low, high = middle[1] - span * size[1] / 2, middle[1] + span * size[1] / 2
    ends = sign * (middle[0] - span * size[0] / 2), sign * (middle[0] + span * size[0] / 2)
    return _frame(title, "".join(body), (float(low), float(high)), (float(ends[0]), float(ends[1])), "", 220)


def _frame(
    title: str,
    body: str,
    vertical: tuple[float, float],
    horizontal: tuple[float, float],
    unit: str,
    height: int,
) -> str:
    """An SVG with a title, the ends of both axes written at them, and a zero line where zero is inside."""
    low, high = vertical
    zero = ""
    if low < 0 < high:
        y = height - 20 + low / (high - low) * (height - 44)
        zero = f'<line x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}" stroke="#bbb" stroke-dasharray="3 3"/>'
    return (
        f'<svg width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}" role="img">'
        f'<text x="8" y="14">{escape(title)}</text>'
        f'<text x="{_LEFT - 5}" y="34" text-anchor="end">{high:.3g}</text>'
        f'<text x="{_LEFT - 5}" y="{height - 22}" text-anchor="end">{low:.3g}</text>'
        f'<text x="{_LEFT}" y="{height - 6}">{horizontal[0]:.3g}{unit}</text>'
        f'<text x="{_WIDTH - 8}" y="{height - 6}" text-anchor="end">{horizontal[1]:.3g}{unit}</text>'
        f"{zero}{body}</svg>"
    )
