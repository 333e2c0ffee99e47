"""A page that shows the columns of a dataset as they are, for one whose layout nobody has said yet.

What is in `state[3]`, and where the gripper closes, is easier seen than guessed: the pictures and the numbers
of some episodes, in the order of their columns. With a layout there is more to show: see
`spear.report.dataset`.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from spear.data.inspect import inspect, leaves
from spear.data.readers.formats import open_dataset
from spear.data.readers.layout import Steps
from spear.data.readers.spec import SPEC_FILE
from spear.data.store.episode_store import EpisodeStore
from spear.errors import SpearError
from spear.report.dataset import plot, strip, write_html

EPISODES = 3
"""Episodes on the page."""
TOGETHER = 3
"""Numbers of a column in one plot."""
MOST_NUMBERS = 24
"""Numbers of a column that are drawn."""
IMAGE_BEGINS = (b"\xff\xd8\xff", b"\x89PNG")


def write_columns_page(path: str | Path, out: Path) -> None:
    """Write a page on the columns of the RLDS or LeRobot dataset in `path` to the file `out`.

    Raises SpearError when no episode can be read, and for a file that cannot be written.
    """
    folder = open_dataset(path)
    assert not isinstance(folder, EpisodeStore)  # a store's columns are known
    reasons: list[str] = []
    episodes: list[tuple[str, Steps]] = []
    for source, steps in folder.steps(next(iter(folder.lengths))):
        if isinstance(steps, SpearError):
            reasons.append(str(steps))
        else:
            episodes.append((source, steps))
        if len(episodes) == EPISODES:
            break
    if not episodes:
        raise SpearError(f"no good episode: {path}: {reasons[-1] if reasons else 'it is empty'}")
    bad = "".join(f'<p class="bad">skipped: {escape(reason)}</p>' for reason in reasons)
    say = (
        f"<p>What these columns mean is not known: a file {SPEC_FILE} in the folder says it (docs/data.md). "
        "They are shown as they are.</p>"
    )
    shown = "".join(_episode(source, steps) for source, steps in episodes)
    write_html(out, Path(path).resolve().name, f"<pre>{escape(inspect(path))}</pre>{say}{bad}{shown}")


def _episode(source: str, steps: Steps) -> str:
    pictures, plots = [], []
    for name, values in leaves(steps):
        if isinstance(values, np.ndarray):
            plots += list(_plots(name, values))
        elif values and values[0].startswith(IMAGE_BEGINS):
            shown = strip(values, f"{source} column {name!r}")
            pictures.append(f'<div class="label">{escape(name)}</div>{shown}')
        elif values:
            text = bytes(values[0]).decode("utf-8", "replace")
            pictures.append(f'<div class="label">{escape(name)}: {escape(text)}</div>')
    return f'<h2>{escape(source)}</h2>{"".join(pictures)}<div class="plots">{"".join(plots)}</div>'


def _plots(name: str, values: Any) -> Iterator[str]:
    """A column over its steps, some numbers in each plot; one that is no number, or holds a table, is left
    out."""
    if values.dtype.kind not in "fiub" or values.ndim > 2 or not len(values):
        return
    table = values.reshape(len(values), -1)[:, :MOST_NUMBERS].astype(np.float64)
    for first in range(0, table.shape[1], TOGETHER):
        some = table[:, first : first + TOGETHER]
        names = [str(first + i) for i in range(some.shape[1])]
        where = "" if values.ndim == 1 else f"[{first}:{first + len(names)}]"
        yield plot(f"{name}{where}", np.arange(len(some), dtype=float), some, names, unit=" steps")
