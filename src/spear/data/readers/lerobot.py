"""LeRobot datasets, versions 2.0, 2.1 and 3.0: read without the library.

    meta/info.json                            version, rate, features, where the files are
    meta/tasks.jsonl, episodes.jsonl          version 2: one file per episode
    meta/tasks.parquet, episodes/**.parquet   version 3: many episodes in one file
    data/**.parquet                           the rows of the steps, images among them or
    videos/**.mp4                             in videos

`read_lerobot` gives `Episode`s in our conventions by a `DatasetSpec`: what the columns mean is told by the
`spear.json` in the folder, as for RLDS (our own writer puts one there). LeRobot's names become paths:
"observation.state" is the column "observation/state"; "task" is the instruction.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spear.data.readers.bad import OnBad, each
from spear.data.readers.layout import episodes_from
from spear.data.readers.spec import Layout, find_spec
from spear.data.readers.splits import split_ranges
from spear.data.readers.video import read_frames
from spear.errors import SpearError
from spear.types import Episode
from spear.util.images import encode_jpeg

INFO = "meta/info.json"
TASK = "task"
"""Our name of the column of instructions."""
TIME_TOLERANCE = 0.25
"""How far a frame may be from its row in time, as part of a step (our choice)."""


@dataclass(frozen=True)
class LeRobotEpisode:
    """Where one episode is.

    videos  feature -> (file, first time, end time) in s.
    """

    index: int
    length: int
    tasks: Sequence[str]
    data: Path
    videos: Mapping[str, tuple[Path, float, float]]


@dataclass(frozen=True)
class LeRobotFolder:
    """What the metadata of a dataset folder say.

    info      `meta/info.json`; features name -> {"dtype", "shape", "names"}.
    splits    split name -> (first episode, end).
    tasks     task index -> instruction.
    """

    path: Path
    name: str
    info: Mapping[str, Any]
    splits: Mapping[str, tuple[int, int]]
    tasks: Mapping[int, str]
    episodes: Sequence[LeRobotEpisode]

    @property
    def lengths(self) -> dict[str, list[int]]:
        """Split name -> number of its episodes."""
        return {name: [end - first] for name, (first, end) in self.splits.items()}

    @property
    def rate_hz(self) -> float:
        """Steps per second."""
        return float(self.info["fps"])

    @property
    def cameras(self) -> list[str]:
        """Features that are images or videos."""
        return [name for name, f in self.info["features"].items() if f["dtype"] in ("image", "video")]


def is_lerobot(path: str | Path) -> bool:
    """Whether `path` is the folder of a LeRobot dataset."""
    return (Path(path) / INFO).is_file()


def open_lerobot(path: str | Path) -> LeRobotFolder:
    """Read the metadata of a LeRobot folder. Raises SpearError, naming the file, when they are not in
    order."""
    folder = Path(path)
    if not is_lerobot(folder):
        raise SpearError(f"not a LeRobot dataset: {folder}: no {INFO} in it")
    return _open(folder, (folder / INFO).stat().st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _open(folder: Path, changed: int) -> LeRobotFolder:
    """Metadata are read once: those of many episodes take a while."""
    where = folder / INFO
    try:
        info = json.loads(where.read_text())
        version = str(info["codebase_version"])
        if not re.match(r"^v?(2\.|3\.)", version):
            raise SpearError(f"unknown LeRobot version {version!r}: {where}: convert it to v2.1 or v3.0")
        if not (info["features"] and float(info["fps"]) > 0):
            raise ValueError("it names no features or no rate")
        old = version.lstrip("v").startswith("2.")
        where = folder / "meta"
        tasks, episodes = _read_v2(folder, info) if old else _read_v3(folder, info)
    except (OSError, KeyError, TypeError, ValueError, IndexError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise SpearError(f"unreadable: {where}: {reason}; copy the dataset again") from error
    if len(episodes) != info.get("total_episodes", len(episodes)):
        total = info["total_episodes"]
        raise SpearError(
            f"episodes missing: {folder}: {INFO} says {total}, {len(episodes)} are listed; copy it again"
        )
    return LeRobotFolder(folder, folder.resolve().name, info, _splits(info, len(episodes)), tasks, episodes)


def _splits(info: Mapping[str, Any], count: int) -> dict[str, tuple[int, int]]:
    """The splits as info.json has them ("0:8"); those of another form are all episodes, named train."""
    found = {}
    for name, text in (info.get("splits") or {}).items():
        match = re.match(r"^(\d+):(\d+)$", str(text))
        if match and int(match[1]) <= int(match[2]) <= count:
            found[name] = (int(match[1]), int(match[2]))
    return found or {"train": (0, count)}


def _read_v2(folder: Path, info: Mapping[str, Any]) -> tuple[dict[int, str], list[LeRobotEpisode]]:
    tasks = {row["task_index"]: row["task"] for row in _json_lines(folder / "meta/tasks.jsonl")}
    videos = [name for name, f in info["features"].items() if f["dtype"] == "video"]
    episodes = []
    for row in _json_lines(folder / "meta/episodes.jsonl"):
        index = int(row["episode_index"])
        place = {"episode_index": index, "episode_chunk": index // int(info.get("chunks_size", 1000))}
        episodes.append(
            LeRobotEpisode(
                index=index,
                length=int(row["length"]),
                tasks=row.get("tasks") or [],
                data=folder / info["data_path"].format(**place),
                videos={
                    name: (folder / info["video_path"].format(video_key=name, **place), 0.0, np.inf)
                    for name in videos
                },
            )
        )
    return tasks, episodes


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def _read_v3(folder: Path, info: Mapping[str, Any]) -> tuple[dict[int, str], list[LeRobotEpisode]]:
    table = pq.read_table(folder / "meta/tasks.parquet").to_pydict()
    # The task is the index of a pandas table: its column has whatever name pandas gave it.
    words = next(values for name, values in table.items() if name != "task_index")
    tasks = dict(zip(table["task_index"], words, strict=True))
    files = sorted((folder / "meta/episodes").glob("*/*.parquet"))
    if not files:
        raise ValueError("no meta/episodes/*/*.parquet")
    videos = [name for name, f in info["features"].items() if f["dtype"] == "video"]
    episodes = []
    for file in files:
        names = [n for n in pq.read_schema(file).names if not n.startswith("stats/")]
        for row in pq.read_table(file, columns=names).to_pylist():
            episodes.append(
                LeRobotEpisode(
                    index=row["episode_index"],
                    length=row["length"],
                    tasks=row.get("tasks") or [],
                    data=folder / _place(info["data_path"], row, "data"),
                    videos={
                        name: (
                            folder / _place(info["video_path"], row, f"videos/{name}", name),
                            float(row[f"videos/{name}/from_timestamp"]),
                            float(row[f"videos/{name}/to_timestamp"]),
                        )
                        for name in videos
                    },
                )
            )
    return tasks, sorted(episodes, key=lambda episode: episode.index)


def _place(template: str, row: Mapping[str, Any], prefix: str, video: str = "") -> str:
    chunk, file = row[f"{prefix}/chunk_index"], row[f"{prefix}/file_index"]
    return template.format(video_key=video, chunk_index=chunk, file_index=file)


def read_raw(
    folder: LeRobotFolder, episode: LeRobotEpisode, cameras: Collection[str] | None = None
) -> dict[str, Any]:
    """The step arrays of one episode: "observation/state" [T, d] …, images as lists of encoded bytes.

    cameras  the features of images to read (those in videos are decoded, and encoded as JPEG); None for all.
    Raises SpearError, naming the episode, when its rows or frames are missing, too many or broken.
    """
    try:
        return _read_raw(folder, episode, cameras)
    except (TypeError, ValueError) as error:  # an empty cell, or rows of different lengths
        reason = (str(error) or repr(error)).splitlines()[0]
        raise SpearError(
            f"broken rows: {folder.name}#{episode.index}: {reason}; leave the episode out"
        ) from error


def _read_raw(
    folder: LeRobotFolder, episode: LeRobotEpisode, cameras: Collection[str] | None
) -> dict[str, Any]:
    rows = _rows(episode, folder.name)
    steps: dict[str, Any] = {}
    for name in rows.column_names:
        if name not in folder.cameras or cameras is None or name in cameras:
            steps[name.replace(".", "/")] = _values(rows.column(name), folder.path)
    times = np.asarray(steps.get("timestamp", np.arange(len(rows)) / folder.rate_hz), float).reshape(-1)
    if not np.isfinite(times).all():
        raise ValueError("a timestamp is missing")
    for name, (file, first, end) in episode.videos.items():
        if cameras is None or name in cameras:
            source = f"{folder.name}#{episode.index}"
            steps[name.replace(".", "/")] = _frames(file, first, end, times, 1 / folder.rate_hz, source)
    if "task_index" in steps:
        steps[TASK] = [folder.tasks.get(int(i), "").encode() for i in np.ravel(steps["task_index"])]
    else:
        steps[TASK] = [" ".join(episode.tasks[:1]).encode()] * len(rows)
    return steps


def _rows(episode: LeRobotEpisode, name: str) -> pa.Table:
    """The rows of one episode. Only the row groups that hold it are read."""
    try:
        file, index = _open_data(episode.data, episode.data.stat().st_mtime_ns)
        where = np.flatnonzero(index == episode.index)
        if len(where) != episode.length:
            raise SpearError(
                f"rows missing: {name}#{episode.index}: {episode.data} has {len(where)} of its "
                f"{episode.length} rows; copy the dataset again, or leave the episode out"
            )
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        starts = np.cumsum([0, *sizes])
        groups = np.unique(np.searchsorted(starts, where, side="right") - 1)
        inside = np.concatenate([np.arange(starts[g], starts[g + 1]) for g in groups] or [where])
        if not len(groups):
            return file.schema_arrow.empty_table()
        return file.read_row_groups(groups.tolist()).take(np.flatnonzero(np.isin(inside, where)))
    except (OSError, KeyError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise SpearError(f"cannot read: {episode.data}: {reason}; copy the dataset again") from error


@functools.lru_cache(maxsize=4)
def _open_data(path: Path, changed: int) -> tuple[pq.ParquetFile, np.ndarray]:
    file = pq.ParquetFile(path)
    if "episode_index" not in file.schema_arrow.names:
        raise SpearError(f"cannot read: {path}: no column 'episode_index'; copy the dataset again")
    return file, file.read(columns=["episode_index"]).column(0).to_numpy()


def _values(column: pa.ChunkedArray, folder: Path) -> Any:
    """A column as an array with the steps first, or as a list of bytes for images and texts."""
    kind = column.type
    if pa.types.is_struct(kind):
        cells = [row or {} for row in column.to_pylist()]
        return [
            cell["bytes"] if cell.get("bytes") is not None else _image_file(folder, cell.get("path"))
            for cell in cells
        ]
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return [(text or "").encode() for text in column.to_pylist()]
    values = column.combine_chunks()
    if (
        pa.types.is_fixed_size_list(kind)
        and not pa.types.is_nested(kind.value_type)
        and not values.null_count
    ):
        return values.flatten().to_numpy(zero_copy_only=False).reshape(len(values), kind.list_size)
    return np.array(column.to_pylist())


def _image_file(folder: Path, path: str | None) -> bytes:
    file = folder / (path or "")
    if not file.is_file():
        raise SpearError(f"missing image: {file}: copy the dataset again, or leave the episode out")
    return file.read_bytes()


def _frames(file: Path, first: float, end: float, times: Any, step: float, source: str) -> list[bytes]:
    """The frames of an episode as JPEG. Raises SpearError unless there is exactly one for each row."""
    slack = TIME_TOLERANCE * step
    found = list(read_frames(file, first - slack, end - slack))
    if len(found) != len(times):
        raise SpearError(
            f"frames and rows differ: {source}: {file} has {len(found)} frames of it, but there are "
            f"{len(times)} rows; leave the episode out"
        )
    late = np.abs(np.array([time for time, _ in found]) - first - times)
    if len(late) and late.max() > slack:
        row = int(late.argmax())
        raise SpearError(
            f"frames and rows differ: {source}: row {row} is at {times[row]:.3f} s, but its frame in {file} is "
            f"{late[row]:.3f} s away; leave the episode out"
        )
    return [encode_jpeg(image) for _, image in found]


def read_lerobot(
    path: str | Path,
    split: str = "train",
    dataset: Layout = None,
    on_bad: OnBad | None = None,
    episodes: Sequence[int] | None = None,
) -> Iterator[Episode]:
    """Episodes of a LeRobot dataset in our conventions, at their own rate, checked (see `check_episode`).

    split     which episodes: "train", "train[:20%]", … (see `spear.data.readers.splits`).
    dataset   the layout; without it, the folder's own `spear.json`, else the registry's entry of that name.
    episodes  the indices of the episodes wanted, in this order, instead of `split`.
    Whatever is wrong with an episode raises SpearError naming it, or, with `on_bad`, is reported there and
    the episode is left out.
    """
    folder = open_lerobot(path)
    defaults = {"instruction": TASK, "rate_hz": folder.rate_hz}
    spec = find_spec(folder.name, folder.path, defaults, dataset)
    wanted = {column.partition("[")[0].replace("/", ".") for column in spec.images.values()}
    steps = read_steps(folder, split, wanted, on_bad, episodes)
    yield from episodes_from(steps, spec, on_bad)


def read_steps(
    folder: LeRobotFolder,
    split: str = "train",
    cameras: Collection[str] | None = None,
    on_bad: OnBad | None = None,
    episodes: Sequence[int] | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(source, step arrays) of the episodes of a split, or of those wanted, as they are; see `read_raw`.

    An episode that cannot be read raises SpearError, or, with `on_bad`, is reported there and left out.
    """

    def read(place: tuple[str, int]) -> tuple[str, dict[str, Any]]:
        name, index = place
        return f"{folder.name}/{name}#{index}", read_raw(folder, folder.episodes[index], cameras)

    yield from each(read, _chosen(folder, split, episodes), on_bad)


def _chosen(folder: LeRobotFolder, split: str, episodes: Sequence[int] | None) -> Iterator[tuple[str, int]]:
    if episodes is not None:
        count = len(folder.episodes)
        for index in episodes:
            if not 0 <= index < count:
                raise SpearError(f"no episode {index}: {folder.path} has {count}, counted from 0")
            yield "train", index
        return
    for name, first, end in split_ranges(folder.lengths, split, folder.path):
        start = folder.splits[name][0]
        yield from ((name, start + i) for i in range(first, end))
