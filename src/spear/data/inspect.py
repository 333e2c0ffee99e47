"""What a folder of robot data is, in a few lines of text: for `spear data inspect PATH`."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from spear.data.readers.formats import open_dataset
from spear.data.readers.layout import Steps, leaves, row_count
from spear.data.readers.lerobot import LeRobotFolder, read_ends
from spear.data.readers.rlds import RldsFolder
from spear.data.readers.spec import REGISTRY, SPEC_FILE, DatasetSpec, missing
from spear.data.readers.video import read_frames
from spear.data.store.episode_store import EpisodeStore
from spear.errors import SpearError, counted
from spear.util.images import IMAGE_BEGINS, decode_image

SHOWN = 5
"""How many instructions to show; the most frequent first."""
MOST_AXES = 16
"""Numbers of a feature that are shown one by one."""
LOOKED_AT = 50
"""How many episodes of a dataset to read: all of a real one would take hours."""


def inspect(path: str | Path) -> str:
    """A text of what `path` holds, in any format that `spear.data.readers.formats` knows.

    Raises SpearError when it is in none, or is broken.
    """
    folder = open_dataset(path)
    if isinstance(folder, EpisodeStore):
        return _describe_store(folder)
    return _describe_rlds(folder) if isinstance(folder, RldsFolder) else _describe_lerobot(folder)


def _describe_store(store: EpisodeStore) -> str:
    lengths = store.lengths
    rates = Counter(f"{rate:g} Hz" for rate in store.rates_hz)
    lines = [
        f"{store.path}: a store of episodes",
        f"episodes      {len(store)}, {counted(lengths.sum(), 'steps')} ({_spread(lengths)} each)",
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
    have = [i for i in range(len(store)) if store.image(i, 0, camera) is not None]
    if not have:
        return f"in none of {counted(len(store), 'episodes')}"
    encoded = store.image(have[0], 0, camera) or b""
    height, width = decode_image(encoded, f"{store.source(have[0])} step 0 camera {camera!r}").shape[:2]
    return f"{width} x {height} pixels, in {len(have)} of {counted(len(store), 'episodes')}"


def _describe_rlds(folder: RldsFolder) -> str:
    first = next(iter(folder.splits))
    # A broken record in the middle of a file does not hide the good ones behind it.
    found = [steps for _, steps in itertools.islice(folder.steps(first), LOOKED_AT)]
    reasons = [str(steps) for steps in found if isinstance(steps, SpearError)]
    steps = [steps for steps in found if not isinstance(steps, SpearError)]
    if not steps:
        raise SpearError(f"no episodes: {folder.path}: {reasons[-1] if reasons else f'{first!r} is empty'}")
    try:  # RLDS does not hold the rate: the layout does
        spec = folder.spec()
        rate, instruction = f"{spec.rate_hz:g} Hz, by the layout", spec.instruction
    except SpearError:
        rate, instruction = "not known", DatasetSpec.instruction
    lines = [
        f"{folder.path}: an RLDS dataset, {folder.name} {folder.version}".rstrip(),
        f"layout        {_layout_of(folder.name, folder.path)}",
        f"rate          {rate}",
        f"episodes      {', '.join(f'{name} {n}' for name, n in folder.lengths.items())}",
        f"looked at     {counted(len(steps), 'episodes')} ({_spread([*map(row_count, steps)])} steps each)",
        *(f"skipped       {reason}" for reason in reasons[:SHOWN]),
    ]
    lines += [f"  {name:<34} {what}" for name, what in _columns(steps[0])]
    words = [dict(leaves(s)).get(instruction) for s in steps]
    texts = (w[0].decode("utf-8", "replace") for w in words if isinstance(w, list))
    return "\n".join([*lines, *_instructions(texts)])


def _describe_lerobot(folder: LeRobotFolder) -> str:
    info = folder.info
    lengths = np.array([episode.length for episode in folder.episodes])
    if not len(lengths):
        raise SpearError(f"no episodes: {folder.path}: its metadata list none")
    looked = np.unique(np.linspace(0, len(lengths) - 1, min(len(lengths), LOOKED_AT)).round().astype(int))
    reasons = [reason for i in looked if (reason := _why_unreadable(folder, int(i)))]
    if len(reasons) == len(looked):
        raise SpearError(f"no good episode: {folder.path}: {reasons[-1]}")
    much = "of videos the last frames" if info.videos else "without their images"
    lines = [
        f"{folder.path}: a LeRobot dataset, {info.codebase_version}",
        f"robot         {info.robot_type or 'not named'}",
        f"layout        {_layout_of(folder.name, folder.path)}",
        f"episodes      {', '.join(f'{name} {n}' for name, n in folder.lengths.items())}, "
        f"{counted(lengths.sum(), 'steps')} ({_spread(lengths)} each)",
        f"rate          {info.fps:g} Hz",
        f"looked at     {counted(len(looked), 'episodes')}, {much}",
        *(f"skipped       {reason}" for reason in reasons[:SHOWN]),
    ]
    ends = read_ends(folder.path)
    for name, feature in info.features.items():
        if name in folder.cameras:
            kind = "images in video" if feature.dtype == "video" else "images"
            lines.append(f"  {name.replace('.', '/'):<34} {kind}, {' x '.join(map(str, feature.shape))}")
            continue
        axes = ", ".join(feature.axes)
        lines.append(f"  {name.replace('.', '/'):<34} {feature.dtype} {feature.shape}{axes and f': {axes}'}")
        # What a layout's ranges are read from.
        for word, values in zip(("from", "to"), ends.get(name, ()), strict=False):
            if 1 < len(values) <= MOST_AXES:
                lines.append(f"  {'':<34}   {word:<5}" + "".join(f" {value:>9.4g}" for value in values))
    return "\n".join([*lines, *_instructions(task for e in folder.episodes for task in e.tasks)])


def _why_unreadable(folder: LeRobotFolder, index: int) -> str:
    """What is wrong with the rows of an episode, or the last frames of its videos; "" if nothing is."""
    episode = folder.episodes[index]
    try:
        folder.read(index, images=())
        for file, first, end in episode.videos.values():
            last = max(first + (episode.length - 1.5) / folder.info.fps, 0.0)
            if next(read_frames(file, last, end), None) is None:
                return f"broken video: {file}: it ends before {last:.4g} s; copy it again"
    except SpearError as error:
        return str(error)
    return ""


def layout_known(path: str | Path) -> bool:
    """Whether a folder's own `spear.json`, its format or the registry says what its columns mean."""
    folder = open_dataset(path)
    return isinstance(folder, EpisodeStore) or not _layout_of(folder.name, folder.path).startswith("not")


def _layout_of(name: str, folder: Path) -> str:
    """Whether it is known what the columns of a dataset mean, and from where."""
    if (folder / SPEC_FILE).is_file():
        return f"described by {folder / SPEC_FILE}"
    if name not in REGISTRY:
        return "not known: see spear data describe"
    unknown = missing(REGISTRY[name])
    return f"not known well enough ({', '.join(unknown)}): {SPEC_FILE} can say it" if unknown else "known"


def _columns(steps: Steps) -> Iterator[tuple[str, str]]:
    for name, values in leaves(steps):
        if isinstance(values, np.ndarray):
            low, high = (f"{float(x):.4g}" for x in (values.min(), values.max()))
            shape = f" {list(values.shape[1:])}" if values.ndim > 1 else ""
            yield name, f"{values.dtype}{shape}, {low} … {high} in the first episode"
        elif isinstance(values, list) and values and values[0].startswith(IMAGE_BEGINS):
            pixels = decode_image(values[0], name)
            blank = ", blank" if pixels.max() == pixels.min() else ""
            yield name, f"image, {pixels.shape[1]} x {pixels.shape[0]} pixels{blank}"
        else:
            yield name, f"not read: {values}" if isinstance(values, str) else "text"


def _spread(lengths: np.ndarray | list[int]) -> str:
    low, high = int(np.min(lengths)), int(np.max(lengths))
    return f"{low}" if low == high else f"{low} … {int(np.median(lengths))} … {high}"


def _ranges(values: np.ndarray) -> str:
    ends = np.quantile(values, [0.01, 0.99], axis=0)
    return ", ".join(f"{axis} {a:.4g} … {b:.4g}" for axis, a, b in zip("xyz", *ends, strict=True)) + " (98 %)"


def _instructions(texts: Iterable[str]) -> list[str]:
    counts = Counter(text.strip() or "(none)" for text in texts)
    shown = [f"  {n:>6} × {text}" for text, n in counts.most_common(SHOWN)]
    more = [f"         … and {len(counts) - SHOWN} more"] if len(counts) > SHOWN else []
    return [f"instructions  {len(counts)} different", *shown, *more]
