"""What a folder of robot data is, in a few lines of text: for `spear data inspect PATH`."""

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from spear.data.readers.columns import Steps, count_steps, walk_columns
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
from spear.errors import SpearError, format_count
from spear.util.images import IMAGE_MAGIC_BYTES, decode_image

SHOWN, MOST_AXES, LOOKED_AT = 5, 16, 50
"""How many instructions to show, the most frequent first; numbers of a column that are shown one by one; and
how many episodes of a dataset to read: all of a real one would take hours."""


def inspect(path: str | Path) -> str:
    """A text of what `path` holds, in any format that `spear.data.readers.formats` knows.

    Raises SpearError when it is in none, or is broken.
    """
    folder = open_dataset(path)
    return (
        _describe_store(folder) if isinstance(folder, EpisodeStore) else _describe_dataset(folder)
    )


def _describe_store(store: EpisodeStore) -> str:
    lengths = store.lengths
    rates = Counter(f"{rate:g} Hz" for rate in store.rates_hz)
    lines = [
        f"{store.path}: a store of episodes",
        f"episodes      {len(store)}, {format_count(lengths.sum(), 'steps')} ({_spread(lengths)} each)",
        f"rate          {', '.join(f'{rate} (episodes: {n})' for rate, n in rates.most_common())}",
        f"targets       {100 * store.known.sum() / lengths.sum():.1f} % of the steps have a known action",
    ]
    if len(store) > LOOKED_AT:
        store = store.subset(np.linspace(0, len(store) - 1, LOOKED_AT).round().astype(int).tolist())
        lines.append(f"looked at     {LOOKED_AT} episodes, spread over all")
    episodes = [store.without_images(i) for i in range(len(store))]
    success = Counter(episode.success for episode in episodes)
    lines += [
        *(f"camera        {camera}: {_store_camera(store, camera)}" for camera in store.cameras),
        f"success       {success[True]} yes, {success[False]} no, {success[None]} unknown",
        f"position, m   {_ranges(np.concatenate([e.position for e in episodes]))}",
    ]
    steps = np.concatenate([np.asarray(e.action)[e.action_mask, :3] for e in episodes])
    if len(steps):
        lines.append(f"step, mm      {_ranges(1000 * steps)}")
    return "\n".join([*lines, *_instructions(episode.instruction for episode in episodes)])


def _store_camera(store: EpisodeStore, camera: str) -> str:
    if not (have := [i for i in range(len(store)) if store.image(i, 0, camera) is not None]):
        return f"in none of {format_count(len(store), 'episodes')}"
    encoded = store.image(have[0], 0, camera) or b""
    height, width = decode_image(
        encoded, f"{store.source(have[0])} step 0 camera {camera!r}"
    ).shape[:2]
    return f"{width} x {height} pixels, in {len(have)} of {format_count(len(store), 'episodes')}"


def _describe_dataset(folder: Dataset) -> str:
    found = _some_episodes(folder)
    reasons = [str(steps) for steps in found if isinstance(steps, SpearError)]
    if not (
        read := [dict(walk_columns(steps)) for steps in found if not isinstance(steps, SpearError)]
    ):
        raise SpearError(
            f"no good episode: {folder.path}: {reasons[-1] if reasons else 'it has none'}"
        )
    cameras, axes = list[str](), dict[str, list[str]]()
    if isinstance(folder, LeRobotFolder):
        info, lengths = folder.info, [episode.length for episode in folder.episodes]
        what = f"a LeRobot dataset, {info.codebase_version}, robot {info.robot_type or 'not named'}"
        steps = f", {format_count(sum(lengths), 'steps')} ({_spread(lengths)} each)"
        rate, texts = (
            f"{info.fps:g} Hz",
            [task for episode in folder.episodes for task in episode.tasks],
        )
        for name, feature in info.features.items():
            axes[name.replace(".", "/")] = feature.axes
            if name in folder.cameras:
                kind = "images in video" if feature.dtype == "video" else "images"
                size = " x ".join(map(str, feature.shape))
                size += ", depth: not read" if feature.depth else ""
                cameras.append(f"  {name.replace('.', '/'):<34} {kind}, {size}")
    else:
        what, steps = f"an RLDS dataset, {folder.name} {folder.version}".rstrip(), ""
        rate, instruction = "not known", DatasetLayout.instruction
        with contextlib.suppress(SpearError):  # RLDS does not hold the rate: the layout does
            spec = folder.load_layout()
            rate, instruction = f"{spec.rate_hz:g} Hz, by the layout", spec.instruction
        words = [each.get(instruction) for each in read]
        texts = [w[0].decode("utf-8", "replace") for w in words if isinstance(w, list)]
    lines = [
        f"{folder.path}: {what}",
        f"layout        {_layout_of(folder.name, folder.path)}",
        f"rate          {rate}",
        f"episodes      {', '.join(f'{name} {n}' for name, n in folder.split_lengths.items())}{steps}",
        f"looked at     {format_count(len(read), 'episodes')} "
        f"({_spread([*map(count_steps, read)])} steps each)",
        *(f"skipped       {reason}" for reason in reasons[:SHOWN]),
    ]
    return "\n".join([*lines, *cameras, *_columns(read, axes), *_instructions(texts)])


def _some_episodes(folder: Dataset) -> list[Steps | SpearError]:
    """Of an RLDS dataset the first, of a LeRobot one some spread over all, without their images."""
    if isinstance(folder, RldsFolder):  # a broken record does not hide the good ones behind it
        return [
            steps
            for _, steps in itertools.islice(
                folder.read_steps(next(iter(folder.splits))), LOOKED_AT
            )
        ]
    count = len(folder.episodes)
    numbers = np.unique(np.linspace(0, count - 1, min(count, LOOKED_AT)).round().astype(int))
    return [_rows(folder, number) for number in numbers.tolist()]


def _rows(folder: LeRobotFolder, index: int) -> Steps | SpearError:
    """The rows of an episode, or what is wrong with them or with the last frames of its videos."""
    episode = folder.episodes[index]
    try:
        steps = folder.read(index, images=())
        for file, first, end in episode.videos.values():
            last = max(first + (episode.length - 1.5) / folder.info.fps, 0.0)
            if next(read_frames(file, last, end), None) is None:
                return SpearError(
                    f"broken video: {file}: it ends before {last:.4g} s; copy it again"
                )
        return steps
    except SpearError as error:
        return error


def layout_known(path: str | Path) -> bool:
    """Whether a folder's own `spear.json`, its format or the registry says what its columns mean."""
    folder = open_dataset(path)
    return isinstance(folder, EpisodeStore) or not _layout_of(folder.name, folder.path).startswith(
        "not"
    )


def _layout_of(name: str, folder: Path) -> str:
    """Whether it is known what the columns of a dataset mean, and from where."""
    if (folder / LAYOUT_FILE).is_file():
        return f"described by {folder / LAYOUT_FILE}"
    if name not in REGISTRY:
        return "not known: see spear data describe"
    unknown = find_missing_fields(REGISTRY[name])
    return (
        f"not known well enough ({', '.join(unknown)}): {LAYOUT_FILE} can say it"
        if unknown
        else "known"
    )


def _columns(read: Sequence[Steps], axes: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """The columns of some episodes, with the range of their numbers, from which a layout's ranges are read.

    axes: what the numbers of a column are called, where the dataset says it.
    """
    for name, values in read[0].items():
        if isinstance(values, np.ndarray) and values.size:
            found = [v for each in read if isinstance(v := each.get(name), np.ndarray)]
            rows = np.concatenate(
                [v.reshape(len(v), -1) for v in found if v.shape[1:] == values.shape[1:]]
            )
            low, high = (
                end.reduce(rows).astype(float) for end in (np.fmin, np.fmax)
            )  # of the numbers
            few, named = 1 < len(low) <= MOST_AXES, ", ".join(axes.get(name, ()))
            span = "" if few else f", {np.fmin.reduce(low):.4g} … {np.fmax.reduce(high):.4g}"
            if empty := int(np.isnan(rows).any(1).sum()):
                span += f", NaN in {empty} of {len(rows)} rows"
            shape = f" {list(values.shape[1:])}" if values.ndim > 1 else ""
            yield f"  {name:<34} {values.dtype}{shape}{named and f': {named}'}{span}"
            for word, ends in (("from", low), ("to", high)) if few else ():
                yield f"  {'':<34}   {word:<5}" + "".join(f" {number:>9.4g}" for number in ends)
        elif isinstance(values, list) and values and values[0].startswith(IMAGE_MAGIC_BYTES):
            pixels = decode_image(values[0], name)
            blank = ", blank" if pixels.max() == pixels.min() else ""
            yield f"  {name:<34} image, {pixels.shape[1]} x {pixels.shape[0]} pixels{blank}"
        else:
            yield f"  {name:<34} {f'not read: {values}' if isinstance(values, str) else 'text'}"


def _spread(lengths: np.ndarray | list[int]) -> str:
    low, high = int(np.min(lengths)), int(np.max(lengths))
    return f"{low}" if low == high else f"{low} … {int(np.median(lengths))} … {high}"


def _ranges(values: np.ndarray) -> str:
    ends = np.quantile(values, [0.01, 0.99], axis=0)
    return (
        ", ".join(f"{axis} {a:.4g} … {b:.4g}" for axis, a, b in zip("xyz", *ends, strict=True))
        + " (98 %)"
    )


def _instructions(texts: Iterable[str]) -> list[str]:
    counts = Counter(text.strip() or "(none)" for text in texts)
    shown = [f"  {n:>6} × {text}" for text, n in counts.most_common(SHOWN)]
    more = [f"         … and {len(counts) - SHOWN} more"] if len(counts) > SHOWN else []
    return [f"instructions  {len(counts)} different", *shown, *more]
