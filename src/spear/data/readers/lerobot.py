"""LeRobot datasets, versions 2.0, 2.1 and 3.0: read without the library.

    meta/info.json                            version, rate, features, where the files are
    meta/tasks.jsonl, episodes.jsonl          version 2: one file per episode
    meta/tasks.parquet, episodes/**.parquet   version 3: many episodes in one file
    data/**.parquet                           the rows of the steps, images among them or
    videos/**.mp4                             in videos

What the columns mean is told by the `spear.json` in the folder, as for RLDS (our own writer puts one there).
LeRobot's names become paths: "observation.state" is "observation/state"; "task" is the instruction.
"""

import contextlib
import functools
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from spear.data.actions import empty_episode_error, find_first
from spear.data.readers.columns import RawEpisodes, parse_column
from spear.data.readers.dataset_layout import DatasetLayout, Positive, find_layout
from spear.data.readers.splits import parse_split
from spear.data.readers.video import read_frames
from spear.errors import SpearError, format_count, notice, summarize_error
from spear.util.images import encode_jpeg

INFO = "meta/info.json"
TASK = "task"
"""Our name of the column of instructions."""
TIME_TOLERANCE, DRIFT = 0.25, 0.05
"""How far a row or a frame may be from its place in time, and how wrong a mean step, in steps (ours)."""
JOINT_NAME_PATTERN = re.compile(
    r"(?i)joint|shoulder|elbow|waist|forearm|wrist.?(flex|roll|angle|rotate|\d)|^base$"
)
"""What names of joints have in them."""


class Feature(BaseModel):
    """A column; `names` are those of its components, in whatever form, `info` what is said of its images."""

    dtype: str
    shape: list[int]
    names: Any = None
    info: dict[str, Any] | None = None

    @property
    def depth(self) -> bool:
        """Whether its images are depth."""
        return any((self.info or {}).get(key) for key in ("is_depth_map", "video.is_depth_map"))

    @property
    def axes(self) -> list[str]:
        """The names of its components, one after the other."""
        names = self.names
        if isinstance(names, Mapping):
            names = [
                axis
                for axes in names.values()
                for axis in (axes if isinstance(axes, list) else [axes])
            ]
        return [str(name) for name in names] if isinstance(names, list) else []


class Info(BaseModel):
    """What we need of `meta/info.json`; fps is the rate in Hz."""

    codebase_version: Annotated[str, Field(pattern=r"^v?[23]\.")]
    fps: Positive
    features: Annotated[dict[str, Feature], Field(min_length=1)]
    data_path: str
    video_path: str | None = None
    chunks_size: PositiveInt = 1000
    robot_type: Any = None
    total_episodes: int | None = None
    splits: dict[str, Any] | None = None

    @property
    def videos(self) -> list[str]:
        """Features that are in videos."""
        return [name for name, feature in self.features.items() if feature.dtype == "video"]


@dataclass(frozen=True)
class LeRobotEpisode:
    """Where one episode is; videos: feature -> (file, first time, end time) in s."""

    index: NonNegativeInt
    length: NonNegativeInt
    tasks: list[str]
    data: Path
    videos: dict[str, tuple[Path, float, float]]


@dataclass(frozen=True)
class LeRobotFolder:
    """The metadata of a folder; splits: name -> (first episode, end); tasks: index -> instruction."""

    path: Path
    name: str
    info: Info
    splits: dict[str, tuple[int, int]]
    tasks: dict[int, str]
    episodes: list[LeRobotEpisode]

    @property
    def split_lengths(self) -> dict[str, int]:
        """Split name -> number of episodes."""
        return {name: end - first for name, (first, end) in self.splits.items()}

    @property
    def cameras(self) -> list[str]:
        """Features that are images or videos."""
        return [name for name, f in self.info.features.items() if f.dtype in ("image", "video")]

    def load_layout(self, given: Path | None = None) -> DatasetLayout:
        """Load the layout (see `find_layout`). Raises SpearError where the metadata contradict it."""
        spec = find_layout(
            self.name, self.path, given, {"instruction": TASK, "rate_hz": self.info.fps}
        )
        if spec.rate_hz != self.info.fps:
            why = f"rate_hz is {spec.rate_hz}, but its {INFO} says {self.info.fps} fps"
            raise SpearError(f"two rates: {self.path}: {why}: leave rate_hz out of the layout")
        for key in ("position", "rotation") if spec.rotation_format != "franka_joints" else ():
            if found := self.joints(str(getattr(spec, key))):
                why = f"{key} is {getattr(spec, key)}, but its {INFO} names {found[0]!r} there"
                raise SpearError(
                    f"joints are no pose: {self.path}: {why}: name columns of the end-effector"
                )
        named = self.quaternion(str(spec.rotation))
        if named and spec.rotation_format != named:
            why = f"rotation_format is {spec.rotation_format}, but its {INFO} names them as of {named}"
            raise SpearError(f"two orders: {self.path}: {why}: correct the one that is wrong")
        return spec

    def joints(self, where: str) -> list[str]:
        """Those components of a column that are joints by their names."""
        return [name for name in self.axes(where) if JOINT_NAME_PATTERN.search(name)]

    def quaternion(self, where: str) -> str | None:
        """The format of a column whose components' names end in w, x, y and z, as those of a quaternion."""
        order = "".join(name[-1:].lower() for name in self.axes(where))
        return f"quat_{order}" if order in ("wxyz", "xyzw") else None

    def axes(self, where: str) -> list[str]:
        """The names of a column's components."""
        path, span = parse_column(where)
        axes = next((f.axes for name, f in self.info.features.items() if _column(name) == path), [])
        return axes[span or slice(None)]

    def read_steps(self, split: str, images: Collection[str] | None = None) -> RawEpisodes:
        """The step arrays of each episode of a split, in order.

        images  the columns of images to read, such as "observation/images/top"; None for all.
        """
        for name, first, end in parse_split(self.split_lengths, split, self.path):
            start = self.splits[name][0]
            for index in range(start + first, start + end):
                try:
                    yield f"{self.name}/{name}#{index}", self.read(index, images)
                except SpearError as error:
                    yield f"{self.name}/{name}#{index}", error

    def read(self, index: int, images: Collection[str] | None = None) -> dict[str, Any]:
        """The step arrays of one episode: "observation/state" [T, d] …, images as lists of encoded bytes.

        images as in `steps`, none of depth; videos are decoded, and encoded as JPEG. Raises SpearError,
        naming the episode, when its rows or frames are missing, too many or broken, or it has none.
        """
        seen = (name for name in self.cameras if not self.info.features[name].depth)
        wanted = {name for name in seen if images is None or _column(name) in images}
        if not self.episodes[index].length:
            raise empty_episode_error(f"{self.name}#{index}")
        try:
            return self._read(self.episodes[index], wanted)
        except (
            TypeError,
            ValueError,
            AttributeError,
        ) as error:  # an empty cell, rows of different lengths
            why = f"{summarize_error(error)}; mend it, or leave the episode out"
            raise SpearError(f"broken rows: {self.name}#{index}: {why}") from error

    def _read(self, episode: LeRobotEpisode, wanted: Collection[str]) -> dict[str, Any]:
        rows = _rows(episode, self.name)
        names = [name for name in rows.column_names if name not in self.cameras or name in wanted]
        steps = {_column(name): _values(rows.column(name), self.path) for name in names}
        times = np.asarray(
            steps.get("timestamp", np.arange(len(rows)) / self.info.fps), float
        ).reshape(-1)
        if not np.isfinite(times).all():
            raise ValueError("a timestamp is missing")
        apart = np.diff(times) * self.info.fps  # in steps
        row = find_first(np.abs(apart - 1) > 2 * TIME_TOLERANCE)
        if row is not None and abs(np.median(apart) - 1) < 2 * TIME_TOLERANCE:
            raise ValueError(
                f"rows {row} and {row + 1} are {apart[row]:.3g} steps apart in time, not one"
            )
        if row is not None or abs(apart.sum() - len(apart)) > max(
            2 * TIME_TOLERANCE, DRIFT * len(apart)
        ):
            raise ValueError(
                f"rows are {apart.mean():.3g} steps apart in time: fps in {INFO} is wrong"
            )
        for name, (file, first, end) in episode.videos.items():
            if name in wanted:
                source = f"{self.name}#{episode.index}"
                steps[_column(name)] = _frames(file, first, end, times, 1 / self.info.fps, source)
        if "task_index" in steps:
            steps[TASK] = [
                (self.tasks.get(int(i)) or "").encode() for i in np.ravel(steps["task_index"])
            ]
            told, listed = {text.decode() for text in steps[TASK]}, [*filter(None, episode.tasks)]
            if listed and not told <= {*listed, ""}:
                raise ValueError(f"by task_index its task is {told}, but its metadata say {listed}")
        else:
            steps[TASK] = [" ".join(episode.tasks[:1]).encode()] * len(rows)
        return steps


def _column(feature: str) -> str:
    return feature.replace(".", "/")


def open_lerobot(path: str | Path) -> LeRobotFolder:
    """Read the metadata of a LeRobot folder. Raises SpearError, naming the file, when they are broken."""
    return _open(Path(path), (Path(path) / INFO).stat().st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _open(folder: Path, changed: int) -> LeRobotFolder:
    """Metadata are read once, as those of many episodes take a while; again when their file has changed."""
    where = folder / INFO
    try:
        info = Info.model_validate_json(where.read_text("utf-8"))
        where = folder / "meta"
        old = info.codebase_version.lstrip("v").startswith("2.")
        tasks, listed = _read_v2(folder, info) if old else _read_v3(folder, info)
        episodes = sorted(listed, key=lambda episode: episode.index)
        numbers = [number for number, _ in tasks], [episode.index for episode in episodes]
        if any(len({*each}) < len(each) for each in numbers):
            raise ValueError("one task_index or episode_index is there twice")
        if info.total_episodes not in (None, len(episodes)):
            raise ValueError(f"{INFO} says {info.total_episodes}, {len(episodes)} are listed")
        splits = _splits(info, len(episodes))
        found = LeRobotFolder(folder, folder.resolve().name, info, splits, dict(tasks), episodes)
    except (
        OSError,
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        AttributeError,
        pa.ArrowException,
    ) as error:
        why = summarize_error(error)
        old = why.startswith("codebase_version")
        cure = "convert it to v2.1 or v3.0" if old else "copy the dataset again"
        raise SpearError(f"unreadable: {where}: {why}; {cure}") from error
    if sorted(i for ends in splits.values() for i in range(*ends)) != [*range(len(episodes))]:
        notice(
            f"{folder}: the splits {info.splits} do not have each of its episodes once ({len(episodes)})"
        )
    return found


def _splits(info: Info, count: int) -> dict[str, tuple[int, int]]:
    """The splits as info.json has them ("0:8"); those of another form are all episodes, named train."""
    ends = {
        name: re.findall(r"^(\d+):(\d+)$", str(text)) for name, text in (info.splits or {}).items()
    }
    found = {name: (int(first), int(end)) for name, each in ends.items() for first, end in each}
    return {n: (a, b) for n, (a, b) in found.items() if a <= b <= count} or {"train": (0, count)}


def _read_v2(folder: Path, info: Info) -> tuple[list[tuple[int, str]], list[LeRobotEpisode]]:
    episodes = []
    for row in _json_lines(folder / "meta/episodes.jsonl"):
        index = int(row["episode_index"])
        place = {"episode_index": index, "episode_chunk": index // info.chunks_size}
        files = {name: str(info.video_path).format(video_key=name, **place) for name in info.videos}
        videos = {name: (folder / file, 0.0, np.inf) for name, file in files.items()}
        data = folder / info.data_path.format(**place)
        episodes.append(
            LeRobotEpisode(index, int(row["length"]), row.get("tasks") or [], data, videos)
        )
    return [
        (row["task_index"], row["task"]) for row in _json_lines(folder / "meta/tasks.jsonl")
    ], episodes


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]


def _read_v3(folder: Path, info: Info) -> tuple[list[tuple[int, str]], list[LeRobotEpisode]]:
    table = pq.read_table(folder / "meta/tasks.parquet").to_pydict()
    # The task is the index of a pandas table: its column has whatever name pandas gave it.
    likely = (n for n in ("task", "__index_level_0__", *table) if n in table and n != "task_index")
    tasks = list(zip(table["task_index"], table[next(likely)], strict=True))
    if not (files := sorted((folder / "meta/episodes").glob("*/*.parquet"))):
        raise ValueError("no meta/episodes/*/*.parquet")

    def place(template: str, row: Mapping[str, Any], prefix: str, video: str = "") -> Path:
        chunk, file = row[f"{prefix}/chunk_index"], row[f"{prefix}/file_index"]
        return folder / template.format(video_key=video, chunk_index=chunk, file_index=file)

    episodes = []
    for file in files:
        names = [n for n in pq.read_schema(file).names if not n.startswith("stats/")]
        for row in pq.read_table(file, columns=names).to_pylist():
            videos = {}
            for name in info.videos:
                first, end = (
                    float(row[f"videos/{name}/{which}_timestamp"]) for which in ("from", "to")
                )
                videos[name] = place(str(info.video_path), row, f"videos/{name}", name), first, end
            data, said_tasks = place(info.data_path, row, "data"), row.get("tasks") or []
            episodes.append(
                LeRobotEpisode(row["episode_index"], row["length"], said_tasks, data, videos)
            )
    return tasks, episodes


def _rows(episode: LeRobotEpisode, name: str) -> pa.Table:
    """The rows of one episode. Only the row groups that may hold it are read."""
    try:
        wanted = [("episode_index", "==", episode.index)]
        rows = pq.read_table(episode.data, filters=wanted, partitioning=None)
    except (OSError, KeyError, pa.ArrowException) as error:
        where = f"{name}#{episode.index}: {episode.data}"
        raise SpearError(
            f"cannot read: {where}: {summarize_error(error)}; copy it again"
        ) from error
    if len(rows) != episode.length:
        there = f"{episode.data} has {len(rows)} of its {format_count(episode.length, 'rows')}"
        raise SpearError(f"rows missing: {name}#{episode.index}: {there}; copy the dataset again")
    return rows


def _values(column: pa.ChunkedArray, folder: Path) -> Any:
    """A column as an array with the steps first, a list of bytes for images and texts, or why neither."""
    kind = column.type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return [_image(row or {}, folder) for row in column.to_pylist()]
    values = column.combine_chunks()
    flat = pa.types.is_fixed_size_list(kind) and not pa.types.is_nested(kind.value_type)
    if flat and not values.null_count:
        return values.flatten().to_numpy(zero_copy_only=False).reshape(len(values), kind.list_size)
    cells = column.to_pylist()
    texts = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if texts or isinstance(next((cell for cell in cells if cell is not None), None), str | bytes):
        return [(cell.encode() if isinstance(cell, str) else cell) or b"" for cell in cells]
    with contextlib.suppress(TypeError, ValueError):
        found = np.array(cells)
        return (
            found if found.dtype.kind in "biuf" else found.astype(float)
        )  # what is missing is NaN
    return f"it holds {kind}: no numbers, or not as many in each row"


def _image(cell: Mapping[str, Any], folder: Path) -> bytes:
    """The bytes of an image that is in its cell, or in a file that the cell names."""
    if cell.get("bytes") is not None:
        return bytes(cell["bytes"])
    file = folder / (cell.get("path") or "")
    if not file.is_file():
        raise SpearError(f"missing image: {file}: copy the dataset again, or leave the episode out")
    return file.read_bytes()


def _frames(
    file: Path, first: float, end: float, times: Any, step: float, source: str
) -> list[bytes]:
    """The frames of an episode as JPEG. Raises SpearError unless there is exactly one for each row."""
    slack = TIME_TOLERANCE * step
    found = list(read_frames(file, first - slack, end - slack))
    why = f"it has {format_count(len(found), 'frames')} for {format_count(len(times), 'rows')}"
    if len(found) == len(times):
        late = np.abs(np.array([time for time, _ in found]) - first - times)
        why = (
            f"the frame of row {late.argmax()} is {late.max():.3f} s off"
            if (late > slack).any()
            else ""
        )
    if why:
        raise SpearError(f"frames and rows differ: {source}: {file}: {why}; leave the episode out")
    return [encode_jpeg(image) for _, image in found]
