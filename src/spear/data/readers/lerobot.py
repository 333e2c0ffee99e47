"""Reads LeRobot datasets, versions 2.0, 2.1 and 3.0, without the lerobot library.

The files of such a dataset:

    meta/info.json                            version, rate, features, where the files are
    meta/tasks.jsonl, episodes.jsonl          version 2, which has one data file per episode
    meta/tasks.parquet, episodes/**.parquet   version 3, which has many episodes in one data file
    data/**.parquet                           one row per step
    videos/**.mp4                             the images, unless the rows contain them

LeRobot calls a column a feature, and an instruction a task. In the name of a feature, this reader
replaces dots by slashes: "observation.state" becomes the column "observation/state". The column
"task" has the instructions. A `spear.json` in the folder says what the other columns mean.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from spear.data.actions import find_first, make_empty_episode_error
from spear.data.readers.columns import RawEpisodes, parse_column
from spear.data.readers.dataset_layout import DatasetLayout, Positive, resolve_layout
from spear.data.readers.parquet_rows import read_episode_rows
from spear.data.readers.splits import parse_split
from spear.data.readers.video import read_frames
from spear.embodiments.urdf import check_joint_names
from spear.errors import SpearError, format_count, notice, summarize_error
from spear.types import Array
from spear.util.files import advise_on_downloaded_file_error, refuse_lfs_pointer
from spear.util.foreign_paths import fill_path_template, join_inside
from spear.util.images import encode_jpeg
from spear.util.json_text import parse_json_as, read_json_lines, read_utf8_bytes

INFO_FILE = "meta/info.json"
TASK_COLUMN = "task"  # our name of the column of instructions
MOTOR_SUFFIX = ".pos"  # of the names that LeRobot's robots give to the positions of their motors
TIME_TOLERANCE_STEPS = 0.25  # how far the time of a row or frame may be from where fps puts it
MAX_RATE_ERROR = 0.05  # how much the mean step may differ from 1 / fps, as a fraction of 1 / fps
MAX_CACHED_FOLDERS = 4  # the number of folders whose metadata stay in memory

JOINT_NAME_PATTERN = re.compile(
    r"(?i)joint|shoulder|elbow|waist|forearm|wrist.?(flex|roll|angle|rotate|\d)|^base$"
)
"""Matches the names of joint angles in a feature, such as "shoulder_pan" or "wrist_1"."""


class Feature(BaseModel):
    """A feature (column) as `meta/info.json` describes it.

    Attributes:
        dtype: The type of its values; "image" or "video" for images.
        shape: The shape of its value at one step.
        names: The names of the value's components: a list, or a mapping to lists or single names.
        info: A description of its images, if it is a video.
    """

    dtype: str
    shape: list[int]
    names: Any = None
    info: dict[str, Any] | None = None

    @property
    def is_depth(self) -> bool:
        """Whether the feature's images are depth images."""
        info = self.info or {}
        return bool(info.get("is_depth_map") or info.get("video.is_depth_map"))

    @property
    def component_names(self) -> list[str]:
        """The names of the value's components, one after the other; empty if they have none."""
        names = self.names
        if isinstance(names, Mapping):
            names = _flatten(names.values())
        return [str(name) for name in names] if isinstance(names, list) else []


def _flatten(groups: Iterable[Any]) -> list[Any]:
    """Concatenate lists and single values into one list."""
    flat: list[Any] = []
    for group in groups:
        flat.extend(group if isinstance(group, list) else [group])
    return flat


class Info(BaseModel):
    """The part of `meta/info.json` that the reader needs.

    Attributes:
        codebase_version: The version of the format.
        fps: The steps per second.
        features: Feature name → its description.
        data_path: The template of the path of a data file.
        video_path: The template of the path of a video.
        chunks_size: In version 2, the number of episodes in one folder ("chunk").
        robot_type: The robot's name.
        total_episodes: The number of episodes.
        splits: Split name → its episodes, for example "0:8".
    """

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
    def video_features(self) -> list[str]:
        """The names of the features whose images are in videos."""
        return [name for name, feature in self.features.items() if feature.dtype == "video"]


class VideoSpan(NamedTuple):
    """The part of a video file that shows one episode, from `start_s` to `end_s`."""

    file: Path
    start_s: float
    end_s: float


@dataclass(frozen=True)
class LeRobotEpisode:
    """Where the data of one episode are.

    Attributes:
        index: The episode's number in the dataset.
        length: The number of its rows.
        tasks: The instructions that its rows have.
        data: The Parquet file that has its rows.
        videos: Camera (feature name) → part of a video file, for each video that the episode has.
        missing_entry: The entry of its metadata that is empty, so that the episode cannot be read;
            "" if none is.
    """

    index: NonNegativeInt
    length: NonNegativeInt
    tasks: list[str]
    data: Path
    videos: dict[str, VideoSpan]
    missing_entry: str = ""


@dataclass(frozen=True)
class LeRobotFolder:
    """A LeRobot dataset with its metadata read.

    Attributes:
        path: The folder.
        name: The dataset's name.
        info: The contents of `meta/info.json`.
        splits: Split name → its first episode, and the episode after its last one.
        tasks: Task index → instruction.
        episodes: All episodes, by their numbers.
    """

    path: Path
    name: str
    info: Info
    splits: dict[str, tuple[int, int]]
    tasks: dict[int, str]
    episodes: list[LeRobotEpisode]

    @property
    def split_lengths(self) -> dict[str, int]:
        """Split name → number of episodes."""
        return {name: end - first for name, (first, end) in self.splits.items()}

    @property
    def image_features(self) -> list[str]:
        """The names of the features that are images or videos, with and without depth."""
        return [
            name
            for name, feature in self.info.features.items()
            if feature.dtype in ("image", "video")
        ]

    def load_layout(self, layout_file: Path | None = None) -> DatasetLayout:
        """Load the dataset's layout (see `resolve_layout`).

        Raises:
            SpearError: If the metadata contradict the layout. They may state another rate. Or they
                name the numbers of the pose's columns, and the names are those of joints or of
                another quaternion order.
        """
        format_defaults = {"instruction": TASK_COLUMN, "rate_hz": self.info.fps}
        layout = resolve_layout(self.name, self.path, layout_file, format_defaults)
        if layout.rate_hz != self.info.fps:
            raise SpearError(
                f"rate_hz in the layout of {self.path} is {layout.rate_hz}, but its {INFO_FILE} "
                f"says {self.info.fps} fps. Leave rate_hz out of the layout."
            )
        if layout.rotation_format == "urdf_joints":
            layout = self._with_joint_names(layout)
        elif layout.rotation_format != "franka_joints":
            self._check_no_joints("position", str(layout.position))
            self._check_no_joints("rotation", str(layout.rotation))

        named_format = self.find_quaternion_format(str(layout.rotation))
        if named_format and layout.rotation_format != named_format:
            raise SpearError(
                f"rotation_format in the layout of {self.path} is {layout.rotation_format}, but "
                f"the component names in its {INFO_FILE} say {named_format}. Correct the one that "
                "is wrong."
            )
        return layout

    def _with_joint_names(self, layout: DatasetLayout) -> DatasetLayout:
        """Add the names of the joints that the metadata give, unless the layout names them.

        Raises SpearError if the metadata's names are not those of the layout's arm.
        """
        # With joint angles, the layout's columns `position` and `rotation` are the same column.
        joint_column = str(layout.position)
        names = [name.removesuffix(MOTOR_SUFFIX) for name in self.component_names(joint_column)]
        if layout.joints is not None or not names:
            return layout
        assert layout.arm is not None
        check_joint_names(layout.arm, names, joint_column, f"{self.path / INFO_FILE}")
        return dataclasses.replace(layout, joints=tuple(names))

    def _check_no_joints(self, key: str, column: str) -> None:
        """Raise SpearError if the column that a layout names as `key` has names of joints."""
        joint_names = self.find_joint_names(column)
        if joint_names:
            raise SpearError(
                f"{key} in the layout of {self.path} is {column}, but its {INFO_FILE} names the "
                f"joint {joint_names[0]!r} there, and joints are no pose. Name columns of the "
                "end-effector."
            )

    def find_joint_names(self, column: str) -> list[str]:
        """Find the names of a column's components that are names of joints."""
        return [name for name in self.component_names(column) if JOINT_NAME_PATTERN.search(name)]

    def find_quaternion_format(self, column: str) -> str | None:
        """Find the quaternion format of a column whose component names end in w, x, y and z.

        Returns None for any other names.
        """
        last_letters = "".join(name[-1:].lower() for name in self.component_names(column))
        return f"quat_{last_letters}" if last_letters in ("wxyz", "xyzw") else None

    def component_names(self, column: str) -> list[str]:
        """The names of a column's components; empty if the metadata do not name them."""
        path, components = parse_column(column)
        selected_components = slice(None) if components is None else components
        for name, feature in self.info.features.items():
            if _to_column(name) == path:
                return feature.component_names[selected_components]
        return []

    def read_steps(self, split: str, image_columns: Collection[str] | None = None) -> RawEpisodes:
        """Read the columns of each episode of a split, in order.

        Args:
            split: For example "train[:10]" (see `parse_split`).
            image_columns: The image columns to read, such as "observation/images/top"; None
                for all.

        Yields:
            (source, steps) of each episode. If the episode cannot be read, an error replaces its
            steps.
        """
        for name, first, end in parse_split(self.split_lengths, split, self.path):
            split_start = self.splits[name][0]
            for index in range(split_start + first, split_start + end):
                source = f"{self.name}/{name}#{index}"
                try:
                    yield source, self.read_episode_columns(index, image_columns)
                except SpearError as error:
                    yield source, error

    def read_episode_columns(
        self, index: int, image_columns: Collection[str] | None = None
    ) -> dict[str, Any]:
        """Read the columns of one episode.

        Videos are decoded, and their frames encoded as JPEG. Depth images are skipped.

        Args:
            index: The episode's number in the dataset.
            image_columns: The image columns to read; None for all.

        Returns:
            Column → array with the steps first, or list of bytes for images and texts.

        Raises:
            SpearError: If rows or frames of the episode are missing, too many or broken, or its
                metadata lack an entry or a wanted camera.
        """
        episode = self.episodes[index]
        if episode.missing_entry:
            raise SpearError(
                f"{self.name}#{index} has no {episode.missing_entry} in meta/episodes. Fill it "
                "in, or leave the episode out."
            )
        if not episode.length:
            raise make_empty_episode_error(f"{self.name}#{index}")

        cameras = self._select_cameras(episode, image_columns)
        try:
            return self._read_columns(episode, cameras)
        except (TypeError, ValueError, AttributeError) as error:
            # An empty cell, or rows of different lengths.
            raise SpearError(
                f"the rows of {self.name}#{index} are broken ({summarize_error(error)}). "
                "Correct them, or leave the episode out."
            ) from error

    def _select_cameras(
        self, episode: LeRobotEpisode, image_columns: Collection[str] | None
    ) -> set[str]:
        """Select the features of the cameras to read.

        Args:
            episode: The episode.
            image_columns: The image columns to read; None for all that the episode has.

        Raises:
            SpearError: If the episode lacks the video of a camera that `image_columns` names.
        """
        cameras: set[str] = set()
        for camera in self.image_features:
            is_wanted = image_columns is None or _to_column(camera) in image_columns
            if not is_wanted or self.info.features[camera].is_depth:
                continue
            lacks_video = camera in self.info.video_features and camera not in episode.videos
            if not lacks_video:
                cameras.add(camera)
            elif image_columns is not None:
                raise SpearError(
                    f"{self.name}#{episode.index} has no video of the camera {camera} in "
                    "meta/episodes. Leave the episode out, or do without this camera."
                )
        return cameras

    def _read_columns(self, episode: LeRobotEpisode, cameras: Collection[str]) -> dict[str, Any]:
        """Read all columns of an episode, but only the images of the selected cameras."""
        skipped_columns = set(self.image_features) - set(cameras)
        rows = _read_rows(episode, self.name, skipped_columns)
        steps: dict[str, Any] = {}
        for name in rows.column_names:
            steps[_to_column(name)] = _convert_column(rows.column(name), self.path)

        times_s = self._read_times(steps, len(rows))
        for name, span in episode.videos.items():
            if name in cameras:
                source = f"{self.name}#{episode.index}"
                step_s = 1 / self.info.fps
                steps[_to_column(name)] = _read_video(span, times_s, step_s, source)
        steps[TASK_COLUMN] = self._read_tasks(steps, episode, len(rows))
        return steps

    def _read_times(self, steps: Mapping[str, Any], num_rows: int) -> Array:
        """Read the timestamps [T] of the rows, s. Rows without timestamps have those of the rate.

        Raises ValueError if the timestamps contradict the rate: if two rows are not one step apart,
        or if all of them together take too long or too short a time.
        """
        default_times_s = np.arange(num_rows) / self.info.fps
        times_s = np.asarray(steps.get("timestamp", default_times_s), float).reshape(-1)
        if not np.isfinite(times_s).all():
            raise ValueError("a timestamp is missing")

        # Two rows may each be off by the tolerance, so a gap between rows may be off by twice that.
        max_gap_error = 2 * TIME_TOLERANCE_STEPS
        gaps = np.diff(times_s) * self.info.fps  # [T - 1], in steps
        irregular_row = find_first(np.abs(gaps - 1) > max_gap_error)
        if irregular_row is not None:
            is_median_regular = abs(np.median(gaps) - 1) < max_gap_error
            if is_median_regular:
                raise ValueError(
                    f"rows {irregular_row} and {irregular_row + 1} are {gaps[irregular_row]:.3g} "
                    "steps apart in time, not one"
                )

        # If most gaps are irregular, or if small errors of all gaps add up, the rate is wrong.
        drift = abs(gaps.sum() - len(gaps))
        max_drift = max(max_gap_error, MAX_RATE_ERROR * len(gaps))
        if irregular_row is not None or drift > max_drift:
            raise ValueError(
                f"rows are {gaps.mean():.3g} steps apart in time, because fps in {INFO_FILE} is "
                "wrong"
            )
        return times_s

    def _read_tasks(
        self, steps: Mapping[str, Any], episode: LeRobotEpisode, num_rows: int
    ) -> list[bytes]:
        """Read the instruction of each row: the task that its `task_index` names.

        Without the column `task_index`, all rows have the first of the episode's tasks in the
        metadata. Raises ValueError if the rows have other tasks than the metadata say.
        """
        if "task_index" not in steps:
            first_task = " ".join(episode.tasks[:1])
            return [first_task.encode()] * num_rows

        tasks: list[str] = []
        for index in np.ravel(steps["task_index"]):
            task = self.tasks.get(int(index))
            tasks.append(task or "")
        listed_tasks = [task for task in episode.tasks if task]
        allowed_tasks = {*listed_tasks, ""}
        if listed_tasks and not set(tasks) <= allowed_tasks:
            raise ValueError(
                f"by task_index its task is {', '.join(sorted(set(tasks)))}, "
                f"but its metadata say {', '.join(listed_tasks)}"
            )
        return [task.encode() for task in tasks]

    def replace_task_indices(self, raw_episodes: RawEpisodes, column: str) -> RawEpisodes:
        """Replace indices of tasks in the column of the instruction by the tasks' texts.

        Datasets of GR00T have such a column, `annotation.human.action.task_description`.

        Args:
            raw_episodes: The columns of episodes, as `read_steps` yields them.
            column: The column of the instruction, as a layout names it.

        Yields:
            The same episodes. Columns that have texts already stay unchanged. If an index is of no
            task, an error replaces the episode's columns.
        """
        for source, steps in raw_episodes:
            if isinstance(steps, SpearError) or not may_be_task_indices(steps.get(column)):
                yield source, steps
                continue
            try:
                yield source, {**steps, column: self._look_up_tasks(steps[column], column, source)}
            except SpearError as error:
                yield source, error

    def _look_up_tasks(self, indices: Array, column: str, source: str) -> list[bytes]:
        """Look up the instruction of each row by its task index; a negative index means no text."""
        texts: list[bytes] = []
        for index in np.ravel(indices).tolist():
            if index >= 0 and index not in self.tasks:
                raise SpearError(
                    f"{column} of {source} names task {index}, which meta/tasks lacks. Add it "
                    "there, or name another column as instruction."
                )
            texts.append(self.tasks.get(index, "").encode())  # negative indices are no tasks
        return texts


def may_be_task_indices(values: Any) -> bool:
    """Whether a column has one integer per row, which may be the index of a task."""
    is_integer_array = isinstance(values, np.ndarray) and values.dtype.kind in "iu"
    return is_integer_array and values.size == len(values)


def _to_column(feature: str) -> str:
    """Convert the name of a feature to the path of a column: dots become slashes."""
    return feature.replace(".", "/")


def open_lerobot(path: str | Path) -> LeRobotFolder:
    """Read the metadata of a LeRobot folder.

    Raises:
        SpearError: If the metadata are broken; the message names the file.
    """
    path = Path(path)
    info_file = path / INFO_FILE
    # If the file is missing, reading it fails with the message for broken metadata.
    changed_ns = info_file.stat().st_mtime_ns if info_file.exists() else 0
    return _open_cached(path, changed_ns)


@functools.lru_cache(maxsize=MAX_CACHED_FOLDERS)
def _open_cached(folder: Path, changed_ns: int) -> LeRobotFolder:
    """Read the metadata of a folder. If info.json is unchanged, they come from the cache.

    Args:
        folder: The folder.
        changed_ns: When info.json was changed; only distinguishes entries of the cache.
    """
    file = folder / INFO_FILE  # what is being read, for the error message
    try:
        info = parse_json_as(Info, read_utf8_bytes(file))
        file = folder / "meta"
        dataset = _read_metadata(folder, info)
    except (
        OSError,
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        AttributeError,
        OverflowError,
        pa.ArrowException,
    ) as error:
        for metadata_file in sorted((folder / "meta").rglob("*.*")):
            refuse_lfs_pointer(metadata_file, metadata_file)
        reason = summarize_error(error)
        raise SpearError(
            f"{file} cannot be read ({reason}). {_advise_on_metadata_error(error, reason)}"
        ) from error

    indices_in_splits: list[int] = []
    for first, end in dataset.splits.values():
        indices_in_splits.extend(range(first, end))
    all_indices = list(range(len(dataset.episodes)))
    if sorted(indices_in_splits) != all_indices:
        notice(
            f"the splits {info.splits} of {folder} do not contain each of its "
            f"{len(dataset.episodes)} episodes once."
        )
    return dataset


def _advise_on_metadata_error(error: Exception, reason: str) -> str:
    """Say what to do about metadata that cannot be read."""
    if reason.startswith("codebase_version"):
        return "Convert the dataset to v2.1 or v3.0 with LeRobot's own scripts."
    if reason.startswith(INFO_FILE):
        return f"Correct total_episodes in {INFO_FILE}, or download the episodes that are missing."
    if isinstance(error, OSError | pa.ArrowException):
        return advise_on_downloaded_file_error(error)
    return "Correct this entry in meta/; `spear data export` writes metadata to compare with."


def _read_metadata(folder: Path, info: Info) -> LeRobotFolder:
    """Read tasks and episodes. Raises ValueError if they contradict themselves or info.json."""
    is_version_2 = info.codebase_version.lstrip("v").startswith("2.")
    tasks, listed_episodes = _read_v2(folder, info) if is_version_2 else _read_v3(folder, info)

    episodes = sorted(listed_episodes, key=lambda episode: episode.index)
    task_indices = [index for index, _ in tasks]
    episode_indices = [episode.index for episode in episodes]
    if _has_duplicates(task_indices) or _has_duplicates(episode_indices):
        raise ValueError("one task_index or episode_index is there twice")
    if info.total_episodes not in (None, len(episodes)):
        raise ValueError(f"{INFO_FILE} says {info.total_episodes}, {len(episodes)} are listed")

    splits = _parse_splits(info, len(episodes))
    return LeRobotFolder(folder, folder.resolve().name, info, splits, dict(tasks), episodes)


def _has_duplicates(indices: list[int]) -> bool:
    return len(set(indices)) < len(indices)


def _parse_splits(info: Info, num_episodes: int) -> dict[str, tuple[int, int]]:
    """Parse the splits of info.json.

    A split is valid if it has the form "0:8" and lies within the episodes. Other splits are
    ignored. If no split is valid, "train" has all episodes.

    Returns:
        Split name → its first episode, and the episode after its last one.
    """
    splits: dict[str, tuple[int, int]] = {}
    for name, text in (info.splits or {}).items():
        match = re.search(r"^(\d+):(\d+)$", str(text))
        if match is None:
            continue
        first = int(match[1])
        end = int(match[2])
        if first <= end <= num_episodes:
            splits[name] = (first, end)
    return splits or {"train": (0, num_episodes)}


def _read_v2(folder: Path, info: Info) -> tuple[list[tuple[int, str]], list[LeRobotEpisode]]:
    """Read tasks and episodes of version 2, in which each episode has its own files.

    Returns:
        (task index, instruction) of all tasks, and all episodes.
    """
    episodes: list[LeRobotEpisode] = []
    for row in read_json_lines(folder / "meta/episodes.jsonl"):
        index = int(row["episode_index"])
        indices = {"episode_index": index, "episode_chunk": index // info.chunks_size}
        videos: dict[str, VideoSpan] = {}
        for name in info.video_features:
            video_file = fill_path_template(str(info.video_path), {"video_key": name, **indices})
            videos[name] = VideoSpan(join_inside(folder, video_file), start_s=0.0, end_s=np.inf)
        length = _to_int(row.get("length"))
        episode = LeRobotEpisode(
            index=index,
            length=length or 0,
            tasks=row.get("tasks") or [],
            data=join_inside(folder, fill_path_template(info.data_path, indices)),
            videos=videos,
            missing_entry="length" if length is None else "",
        )
        episodes.append(episode)

    task_rows = read_json_lines(folder / "meta/tasks.jsonl")
    tasks = [(row["task_index"], row["task"]) for row in task_rows]
    return tasks, episodes


def _read_v3(folder: Path, info: Info) -> tuple[list[tuple[int, str]], list[LeRobotEpisode]]:
    """Read tasks and episodes of version 3, in which a file has many episodes; see `_read_v2`."""
    tasks = _read_v3_tasks(folder / "meta/tasks.parquet")
    files = sorted((folder / "meta/episodes").glob("*/*.parquet"))
    if not files:
        raise ValueError("no meta/episodes/*/*.parquet")

    episodes: list[LeRobotEpisode] = []
    for file in files:
        column_names = pq.read_schema(file).names
        columns = [name for name in column_names if not name.startswith("stats/")]
        for row in pq.read_table(file, columns=columns).to_pylist():
            episodes.append(_read_v3_episode(row, folder, info))
    return tasks, episodes


def _read_v3_tasks(file: Path) -> list[tuple[int, str]]:
    """Read (task index, instruction) of all tasks.

    LeRobot writes this file with pandas, and the instructions are the index of the pandas table.
    Their column is called "task", or "__index_level_0__" if the index has no name.
    """
    table = pq.read_table(file).to_pydict()
    candidates = ["task", "__index_level_0__", *table]
    column = next(name for name in candidates if name in table and name != "task_index")
    return list(zip(table["task_index"], table[column], strict=True))


def _read_v3_episode(row: Mapping[str, Any], folder: Path, info: Info) -> LeRobotEpisode:
    """Convert an episode's row of the metadata."""
    videos: dict[str, VideoSpan] = {}
    for name in info.video_features:
        span = _read_v3_video_span(row, name, folder, info)
        if span is not None:
            videos[name] = span

    # An episode with an empty entry stays in the list, so that its error names it.
    missing_entry = ""
    length = _to_int(row.get("length"))
    if length is None:
        missing_entry = "length"
    file_indices = _read_v3_file_indices(row, "data")
    if file_indices is None:
        missing_entry = "data/chunk_index or data/file_index"
        file_indices = {"chunk_index": 0, "file_index": 0}
    # Data files belong to no camera, so the template's field for cameras is filled with nothing.
    data_file = fill_path_template(info.data_path, {"video_key": "", **file_indices})
    return LeRobotEpisode(
        index=int(row["episode_index"]),
        length=length or 0,
        tasks=row.get("tasks") or [],
        data=join_inside(folder, data_file),
        videos=videos,
        missing_entry=missing_entry,
    )


def _read_v3_video_span(
    row: Mapping[str, Any], camera: str, folder: Path, info: Info
) -> VideoSpan | None:
    """Read which part of which video a camera has; None if an entry about the video is empty."""
    prefix = f"videos/{camera}"
    file_indices = _read_v3_file_indices(row, prefix)
    start_s: Any = row.get(f"{prefix}/from_timestamp")
    end_s: Any = row.get(f"{prefix}/to_timestamp")
    if file_indices is None or _is_empty(start_s) or _is_empty(end_s):
        return None

    video_file = fill_path_template(str(info.video_path), {"video_key": camera, **file_indices})
    return VideoSpan(join_inside(folder, video_file), float(start_s), float(end_s))


def _read_v3_file_indices(row: Mapping[str, Any], prefix: str) -> dict[str, int] | None:
    """Read the numbers of the folder ("chunk") and of the file in it; None if one is empty.

    Args:
        row: An episode's row of the metadata.
        prefix: "data", or "videos/" and the camera.
    """
    chunk_index = _to_int(row.get(f"{prefix}/chunk_index"))
    file_index = _to_int(row.get(f"{prefix}/file_index"))
    if chunk_index is None or file_index is None:
        return None
    return {"chunk_index": chunk_index, "file_index": file_index}


def _is_empty(cell: Any) -> bool:
    """Whether a cell is null, or NaN, which pandas writes for null."""
    is_nan = cell != cell  # only NaN differs from itself
    return cell is None or is_nan


def _to_int(cell: Any) -> int | None:
    """Convert a cell to an integer; None only if the cell is empty (see `_is_empty`).

    The cell may be a float, because pandas stores a column of integers with null cells as floats.
    """
    return None if _is_empty(cell) else int(cell)


def _read_rows(episode: LeRobotEpisode, dataset: str, skipped_columns: Collection[str]) -> pa.Table:
    """Read the rows of one episode, without the skipped columns.

    Raises SpearError if the file cannot be read, or has another number of rows of the episode than
    its metadata say.
    """
    try:
        rows = read_episode_rows(episode.data, episode.index, episode.length, skipped_columns)
    except (OSError, KeyError, pa.ArrowException) as error:
        refuse_lfs_pointer(episode.data, f"{episode.data} of {dataset}#{episode.index}")
        raise SpearError(
            f"{dataset}#{episode.index} cannot be read from {episode.data} "
            f"({summarize_error(error)}). {_advise_on_rows_error(error)}"
        ) from error

    if len(rows) != episode.length:
        raise SpearError(
            f"{dataset}#{episode.index} has only {len(rows)} of its "
            f"{format_count(episode.length, 'rows')} in {episode.data}. Correct its length in "
            "meta/episodes, or leave the episode out."
        )
    return rows


def _advise_on_rows_error(error: Exception) -> str:
    """Say what to do about rows that cannot be read."""
    if isinstance(error, KeyError):
        return "Add this column, which says to which episode each row belongs."
    return advise_on_downloaded_file_error(error)


def _convert_column(column: pa.ChunkedArray, folder: Path) -> Any:
    """Convert a column to the form that `spear.data.readers.columns.Steps` describes.

    Returns:
        An array whose first dimension is the step, a list of bytes (images or texts), or, if the
        column has neither, a str that says why.
    """
    kind = column.type
    has_encoded_images = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    if has_encoded_images:
        return [_read_image(cell or {}, folder) for cell in column.to_pylist()]

    # Rows of a fixed number of numbers are converted by pyarrow alone, which is fast.
    is_matrix = pa.types.is_fixed_size_list(kind) and not pa.types.is_nested(kind.value_type)
    values = column.combine_chunks()
    has_empty_cells = values.null_count > 0
    if is_matrix and not has_empty_cells:
        numbers = values.flatten().to_numpy(zero_copy_only=False)
        return numbers.reshape(len(values), kind.list_size)

    raw_images = _convert_if_raw_images(values)
    if raw_images is not None:
        return raw_images

    cells = column.to_pylist()
    first_cell = next((cell for cell in cells if cell is not None), None)
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if is_text or isinstance(first_cell, str | bytes):
        return [_to_bytes(cell) for cell in cells]

    with contextlib.suppress(TypeError, ValueError):
        array = np.array(cells)
        is_numeric = array.dtype.kind in "biuf"
        return array if is_numeric else array.astype(float)  # an empty cell becomes NaN
    return f"it holds {kind}: no numbers, or not as many in each row"


def _is_list(kind: pa.DataType) -> bool:
    is_of_any_length = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return bool(is_of_any_length or pa.types.is_fixed_size_list(kind))


def _convert_if_raw_images(values: pa.Array) -> Array | None:
    """Convert lists of lists of lists of uint8 to an array [T, h, w, c]; None for anything else."""
    # Each round removes one level of lists, which must all have the same length.
    shape = [len(values)]
    while _is_list(values.type) and not values.null_count:
        lengths = pc.list_value_length(values).to_numpy(zero_copy_only=False)
        distinct_lengths = np.unique(lengths)
        if len(distinct_lengths) != 1:
            return None
        shape.append(int(distinct_lengths[0]))
        values = values.flatten()
    if len(shape) != 4 or values.type != pa.uint8() or values.null_count:
        return None
    pixels: Array = values.to_numpy(zero_copy_only=False).reshape(shape)
    return pixels


def _to_bytes(cell: str | bytes | None) -> bytes:
    """Encode a cell with a text; b"" if it is empty."""
    encoded = cell.encode() if isinstance(cell, str) else cell
    return encoded or b""


def _read_image(cell: Mapping[str, Any], folder: Path) -> bytes:
    """Read the bytes of an image from its cell, or from the file that the cell names."""
    if cell.get("bytes") is not None:
        return bytes(cell["bytes"])
    file = join_inside(folder, cell.get("path") or "")
    if not file.is_file():
        raise SpearError(
            f"the image {file} is missing. Download the folder of images too, or leave the "
            "episode out."
        )
    return file.read_bytes()


def _read_video(span: VideoSpan, times_s: Array, step_s: float, source: str) -> list[bytes]:
    """Read the frames of an episode as JPEG images.

    Args:
        span: The part of a video that shows the episode.
        times_s: [T] the times of the episode's rows, from the start of `span`.
        step_s: The duration of one step.
        source: The name of the episode, for error messages.

    Raises:
        SpearError: Unless there is exactly one frame for each row, at the time of the row.
    """
    # Frame times may be rounded, so the whole span is moved back a little.
    tolerance_s = TIME_TOLERANCE_STEPS * step_s
    frames = list(read_frames(span.file, span.start_s - tolerance_s, span.end_s - tolerance_s))
    if len(frames) != len(times_s):
        raise SpearError(
            f"{source} has {format_count(len(frames), 'frames')} in {span.file} for "
            f"{format_count(len(times_s), 'rows')}. Leave the episode out."
        )

    frame_times_s = np.array([time_s for time_s, _ in frames])  # [T] from the start of the video
    offsets_s = np.abs(frame_times_s - span.start_s - times_s)  # [T]
    if (offsets_s > tolerance_s).any():
        raise SpearError(
            f"the frame of row {offsets_s.argmax()} of {source} is {offsets_s.max():.3f} s off "
            f"in {span.file}. Leave the episode out."
        )
    return [encode_jpeg(image) for _, image in frames]
