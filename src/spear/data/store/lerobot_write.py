"""Writes a LeRobot v3.0 dataset, with the same files, schemas and metadata as the lerobot library.

LeRobot calls a column a feature, and an instruction a task. The feature "observation.state" [8]
consists of position (m, base frame), quaternion (w x y z) and gripper opening, and "action" [8] is
the canonical action (`Action.to_vector`). A `spear.json` next to the folder `meta` says so. The
features `action_mask`, `success` and `source` exist only in datasets of this writer.

A row of the data is one step, and a row of `meta/episodes` is one episode. Files of each kind are
numbered, and up to 1,000 of them are in one folder, which LeRobot calls a chunk.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spear.data.actions import validate_episode, with_canonical_actions
from spear.data.frames import FrameVersions
from spear.data.readers.dataset_layout import LAYOUT_FILE
from spear.data.readers.video import VideoWriter
from spear.data.store.stats import (
    PixelHistograms,
    RowStats,
    check_same_image_shape,
    compute_pixel_histograms,
)
from spear.errors import SpearError
from spear.types import Array, Episode
from spear.util.files import check_new_or_empty_folder, convert_write_errors, write_text
from spear.util.images import decode_image
from spear.util.run_lock import acquire_run_lock

FILES_PER_CHUNK = 1000  # LeRobot's default number of files in a folder
MAX_DATA_FILE_MIB = 100  # LeRobot's default size after which the next file of steps begins
MAX_VIDEO_FILE_MIB = 200  # LeRobot's default size after which the next video file begins
EPISODES_PER_FILE = 10_000  # number of rows in one file of `meta/episodes`
MIB = 2**20  # bytes
PNG_START = b"\x89PNG"  # the first bytes of every PNG

STATE_NAMES = ["x", "y", "z", "qw", "qx", "qy", "qz", "gripper"]
ACTION_NAMES = ["dx", "dy", "dz", "dqw", "dqx", "dqy", "dqz", "gripper"]
OWN_FEATURES = {"action_mask": "bool", "success": "int64", "source": "string"}
"""The features that only datasets of this writer have → their types."""
INDEX_FEATURES = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
"""The features that every LeRobot dataset has → their types."""
ARROW_TYPES = {
    "float32": pa.float32(),
    "int64": pa.int64(),
    "bool": pa.bool_(),
    "string": pa.string(),
}
NUMBER_TYPES = ("float32", "int64", "bool")  # features of these types have statistics
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"

EpisodeRow = dict[str, Any]
"""A row of `meta/episodes`, or some columns of it: column → value."""


def write_lerobot(
    episodes: Iterable[Episode],
    folder: str | Path,
    images: Literal["image", "video"] = "image",
    frames: FrameVersions | None = None,
) -> int:
    """Check episodes, and write them as a LeRobot v3.0 dataset.

    Args:
        episodes: At least one episode. All have the same rate, cameras and image sizes.
        folder: The folder of the dataset. It appears when it is complete.
        images: "image" writes the encoded images unchanged into Parquet files. "video" encodes them
            as AV1 videos.
        frames: The versions of the frames of the poses (`spear.data.frames`).

    Returns:
        The number of episodes.

    Raises:
        SpearError: If the folder is not empty, another process writes it, an episode is bad, or
            episodes differ in cameras, image size or rate.
    """
    target = Path(folder)
    check_new_or_empty_folder(target)
    work_dir = target.with_name(f".{target.name}.part")
    with acquire_run_lock(work_dir, "exporting in"), convert_write_errors(target):
        writer: _Writer | None = None
        shutil.rmtree(work_dir / "dataset", ignore_errors=True)
        try:
            for unchecked_episode in episodes:
                episode = with_canonical_actions(validate_episode(unchecked_episode))
                histograms = compute_pixel_histograms(episode)
                if writer is None:
                    writer = _Writer(work_dir / "dataset", histograms, episode.rate_hz, images)
                    writer.frames = dict(frames or {})
                writer.add(episode, histograms)
            if writer is None:
                raise SpearError(f"there are no episodes to write to {target}. Give some.")
            writer.finish()
            writer.folder.replace(target)
            return writer.num_episodes
        finally:
            if writer is not None:
                # If the disk is full, the error that is being raised already says so.
                with contextlib.suppress(OSError):
                    writer.close()
            shutil.rmtree(work_dir, ignore_errors=True)


class _Writer:
    """Writes the files of a dataset, one episode after the other.

    Args:
        folder: The folder of the dataset.
        histograms: Camera → histograms of the images of the first episode. All episodes must have
            its cameras and image sizes.
        rate_hz: The rate of all episodes.
        image_type: How images are stored, "image" or "video" (see `write_lerobot`).
    """

    def __init__(
        self,
        folder: Path,
        histograms: Mapping[str, PixelHistograms],
        rate_hz: float,
        image_type: str,
    ) -> None:
        self.folder = folder
        self.image_type = image_type
        self.rate_hz = rate_hz
        self.image_shapes = {
            camera: histograms[camera].image_shape for camera in sorted(histograms)
        }
        self.features = make_features(self.image_shapes, image_type, self.rate_hz)
        self.schema = make_schema(self.features)
        self.frames: dict[str, int] = {}  # the versions of the frames of the poses

        # What was added so far.
        self.num_episodes = 0
        self.num_rows = 0
        self.tasks: dict[str, int] = {}  # instruction → task index
        # The rows of `meta/episodes` that are not in a file yet.
        self.episode_rows: list[EpisodeRow] = []

        # Statistics over all episodes.
        self.row_stats: dict[str, RowStats] = {}
        for name, feature in self.features.items():
            if feature["dtype"] in NUMBER_TYPES:
                self.row_stats[name] = RowStats()
        self.pixel_histograms = {
            camera: PixelHistograms(shape) for camera, shape in self.image_shapes.items()
        }

        # The number of the current file of each kind, and the files that are open.
        self.data_file_number = 0
        self.meta_file_number = 0
        self.video_file_numbers = dict.fromkeys(self.image_shapes, 0)  # camera → number
        self._data: pq.ParquetWriter | None = None
        self._videos: dict[str, VideoWriter] = {}  # camera → open video

    def add(self, episode: Episode, histograms: Mapping[str, PixelHistograms]) -> None:
        """Write a checked episode.

        Args:
            episode: The episode, with canonical actions.
            histograms: Camera → histograms of the episode's images (see
                `compute_pixel_histograms`).

        Raises:
            SpearError: If the episode differs from the first one in cameras, image sizes or rate.
        """
        self._check_like_first_episode(episode, histograms)
        if self._data is not None and os.path.getsize(self._data_path) > MAX_DATA_FILE_MIB * MIB:
            self._end_data_file()

        # Write the episode's steps and videos, and make its row of `meta/episodes`.
        length = len(episode)
        task_index = self.tasks.setdefault(episode.instruction, len(self.tasks))
        columns = self._make_columns(episode, task_index)
        self._append_rows(columns, episode)
        row: EpisodeRow = {
            "episode_index": self.num_episodes,
            "tasks": [episode.instruction],
            "length": length,
            **make_file_index_columns("data", self.data_file_number),
            "dataset_from_index": self.num_rows,
            "dataset_to_index": self.num_rows + length,
        }
        if self.image_type == "video":
            for camera in self.image_shapes:
                row |= self._append_to_video(camera, episode)
        row |= self._make_stats_columns(columns, histograms)
        row |= make_file_index_columns("meta/episodes", self.meta_file_number)
        self.episode_rows.append(row)

        # Update statistics and counts of the whole dataset.
        for name, stats in self.row_stats.items():
            stats.add(columns[name].reshape(length, -1))
        for camera, total in self.pixel_histograms.items():
            total.counts[...] += histograms[camera].counts
        self.num_episodes += 1
        self.num_rows += length
        if len(self.episode_rows) == EPISODES_PER_FILE:
            self._write_episode_rows()

    def _check_like_first_episode(
        self, episode: Episode, histograms: Mapping[str, PixelHistograms]
    ) -> None:
        """Raise SpearError unless an episode has the cameras, sizes and rate of the first one."""
        cameras = sorted(episode.images)
        if cameras != list(self.image_shapes):
            raise SpearError(
                f"{episode.source} has the cameras {', '.join(cameras)}, the first episode "
                f"{', '.join(self.image_shapes)}. Export those with the same cameras."
            )
        for camera, shape in self.image_shapes.items():
            check_same_image_shape(
                histograms[camera].image_shape, shape, f"{episode.source} step 0 camera {camera!r}"
            )
        if episode.rate_hz != self.rate_hz:
            raise SpearError(
                f"{episode.source} is at {episode.rate_hz:g} Hz, the first episode at "
                f"{self.rate_hz:g}. Resample it with `spear data prepare`."
            )

    def _make_columns(self, episode: Episode, task_index: int) -> dict[str, Any]:
        """Make all columns except the images: arrays [T] or [T, d], or lists of T texts."""
        length = len(episode)
        steps = np.arange(length)
        state = np.column_stack([episode.position, episode.rotation, episode.gripper])  # [T, 8]
        success = -1 if episode.success is None else episode.success  # -1 is not known
        return {
            "observation.state": state.astype(np.float32),
            "action": np.asarray(episode.action, np.float32),
            "action_mask": np.asarray(episode.action_mask),
            "success": np.full(length, success, np.int64),
            "source": [episode.source] * length,
            "timestamp": (steps / self.rate_hz).astype(np.float32),
            "frame_index": steps,
            "episode_index": np.full(length, self.num_episodes),
            "index": self.num_rows + steps,
            "task_index": np.full(length, task_index),
        }

    def _make_stats_columns(
        self, columns: Mapping[str, Any], histograms: Mapping[str, PixelHistograms]
    ) -> EpisodeRow:
        """Make the statistics of an episode, as columns of its row of `meta/episodes`.

        Args:
            columns: The episode's columns, except images.
            histograms: Camera → histograms of the episode's images.
        """
        stats: dict[str, Mapping[str, Array]] = {}
        for name in self.row_stats:
            values = columns[name]
            rows = values.reshape(len(values), -1)  # [T, d]
            # A new `RowStats` of this episode alone: `self.row_stats` are those of all episodes.
            stats[name] = RowStats().add(rows).compute_stats()
        for camera in self.image_shapes:
            stats[get_feature_name(camera)] = histograms[camera].compute_stats()

        stats_columns: EpisodeRow = {}
        for name in self.features:
            for statistic, values in stats.get(name, {}).items():
                stats_columns[f"stats/{name}/{statistic}"] = values.tolist()
        return stats_columns

    @property
    def _data_path(self) -> Path:
        """The current file of steps."""
        return self.folder / make_file_path(DATA_PATH, self.data_file_number)

    def _append_rows(self, columns: Mapping[str, Any], episode: Episode) -> None:
        """Append the steps of an episode to the current file of steps.

        Args:
            columns: The episode's columns, except images.
            episode: The episode.
        """
        if self._data is None:
            self._data_path.parent.mkdir(parents=True, exist_ok=True)
            self._data = pq.ParquetWriter(self._data_path, self.schema)

        rows: dict[str, list[Any]] = {name: list(values) for name, values in columns.items()}
        if self.image_type == "image":
            for camera, images in episode.images.items():
                rows[get_feature_name(camera)] = _make_image_cells(images)
        self._data.write_table(pa.Table.from_pydict(rows, schema=self.schema))

    def _append_to_video(self, camera: str, episode: Episode) -> EpisodeRow:
        """Append the images of an episode to the current video of a camera.

        Returns the columns of the episode's row of `meta/episodes` that say in which file, and in
        which time span of this file, the images are.
        """
        video = self._get_or_begin_video(camera)
        first_frame = video.num_frames
        for step, encoded in enumerate(episode.images[camera]):
            description = f"{episode.source} step {step} camera {camera!r}"
            image = decode_image(encoded, description)
            check_same_image_shape(image.shape[:2], self.image_shapes[camera], description)
            video.write(image)

        prefix = f"videos/{get_feature_name(camera)}"
        return {
            **make_file_index_columns(prefix, self.video_file_numbers[camera]),
            f"{prefix}/from_timestamp": first_frame / self.rate_hz,
            f"{prefix}/to_timestamp": (first_frame + len(episode)) / self.rate_hz,
        }

    def _get_or_begin_video(self, camera: str) -> VideoWriter:
        """Get the open video of a camera; begin one if there is none or it has grown too large."""
        video = self._videos.get(camera)
        if video is not None and video.num_bytes > MAX_VIDEO_FILE_MIB * MIB:
            self._videos.pop(camera).close()
            self.video_file_numbers[camera] += 1
            video = None
        if video is None:
            number = self.video_file_numbers[camera]
            path = self.folder / make_file_path(
                VIDEO_PATH, number, video_key=get_feature_name(camera)
            )
            height, width = self.image_shapes[camera]
            video = VideoWriter(path, height, width, self.rate_hz)
            self._videos[camera] = video
        return video

    def _end_data_file(self) -> None:
        """Complete the current file of steps, if there is one. The next episode begins another."""
        if self._data is not None:
            data = self._data
            self._data = None  # before closing, which fails if the disk is full
            data.close()
            self.data_file_number += 1

    def _write_episode_rows(self) -> None:
        """Write the collected rows to the next file of `meta/episodes`."""
        path = self.folder / make_file_path(EPISODES_PATH, self.meta_file_number)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(self.episode_rows), path)
        self.episode_rows = []
        self.meta_file_number += 1

    def close(self) -> None:
        """Close the open files: the file of steps, and one video per camera."""
        self._end_data_file()
        while self._videos:
            _, video = self._videos.popitem()
            video.close()

    def finish(self) -> None:
        """Complete all files, and write the files that describe the whole dataset."""
        self.close()
        if self.episode_rows:
            self._write_episode_rows()
        self._write_json("meta/stats.json", self._make_stats())
        self._write_json("meta/info.json", self._make_info())
        layout = make_layout_fields(self.image_shapes)
        if self.frames:
            layout["frames"] = self.frames
        self._write_json(LAYOUT_FILE, layout)
        write_tasks(self.folder / "meta/tasks.parquet", list(self.tasks))

    def _make_stats(self) -> dict[str, Any]:
        """Make the content of stats.json, with features in the order of the dataset's columns."""
        stats = {name: row_stats.compute_stats() for name, row_stats in self.row_stats.items()}
        for camera, histograms in self.pixel_histograms.items():
            stats[get_feature_name(camera)] = histograms.compute_stats()

        content: dict[str, Any] = {}
        for name in self.features:
            if name in stats:
                content[name] = {key: values.tolist() for key, values in stats[name].items()}
        return content

    def _make_info(self) -> dict[str, Any]:
        """Make the content of info.json."""
        return {
            "codebase_version": "v3.0",
            "robot_type": "unknown",
            "total_episodes": self.num_episodes,
            "total_frames": self.num_rows,
            "total_tasks": len(self.tasks),
            "chunks_size": FILES_PER_CHUNK,
            "data_files_size_in_mb": MAX_DATA_FILE_MIB,
            "video_files_size_in_mb": MAX_VIDEO_FILE_MIB,
            "fps": to_int_if_whole(self.rate_hz),
            "splits": {"train": f"0:{self.num_episodes}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if self.image_type == "video" else None,
            "features": self.features,
        }

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file `name` below the folder of the dataset."""
        write_text(self.folder / name, json.dumps(content, indent=4, ensure_ascii=False))


def _make_image_cells(images: Sequence[bytes]) -> list[dict[str, Any]]:
    """Make the cells of an image column, in the form of the `datasets` library."""
    suffix = "png" if images[0].startswith(PNG_START) else "jpg"
    cells: list[dict[str, Any]] = []
    for step, image in enumerate(images):
        cells.append({"bytes": image, "path": f"frame-{step:06d}.{suffix}"})
    return cells


def make_layout_fields(cameras: Iterable[str]) -> dict[str, Any]:
    """Make the content of `spear.json`: what the columns of a dataset of this writer mean."""
    return {
        "images": {camera: f"observation/images/{camera}" for camera in cameras},
        "position": "observation/state[0:3]",
        "rotation": "observation/state[3:7]",
        "rotation_format": "quat_wxyz",
        "gripper": "observation/state[7]",
        "gripper_range": [0.0, 1.0],
        "action": "action",
        **{name: name for name in OWN_FEATURES},
    }


def is_own_format(features: Mapping[str, Sequence[str]]) -> bool:
    """Whether the features of a LeRobot dataset, and their components, are those of this writer.

    Args:
        features: The name of each feature → the names of its components.
    """
    has_own_columns = features.keys() >= OWN_FEATURES.keys()
    is_own_state = list(features.get("observation.state", ())) == STATE_NAMES
    is_own_action = list(features.get("action", ())) == ACTION_NAMES
    return has_own_columns and is_own_state and is_own_action


def make_features(
    image_shapes: Mapping[str, tuple[int, int]], image_type: str, rate_hz: float
) -> dict[str, Any]:
    """Make the "features" of info.json, in the order of the columns.

    Args:
        image_shapes: Camera → (height, width) in pixels.
        image_type: How images are stored, "image" or "video".
        rate_hz: The rate of the dataset.
    """
    features: dict[str, Any] = {}
    for camera, (height, width) in image_shapes.items():
        feature: dict[str, Any] = {
            "dtype": image_type,
            "shape": [height, width, 3],
            "names": ["height", "width", "channels"],
        }
        if image_type == "video":
            feature["info"] = {
                "video.height": height,
                "video.width": width,
                "video.codec": "av1",
                "video.pix_fmt": "yuv420p",
                "video.is_depth_map": False,
                "video.fps": to_int_if_whole(rate_hz),
                "video.channels": 3,
                "has_audio": False,
            }
        features[get_feature_name(camera)] = feature

    features["observation.state"] = {"dtype": "float32", "shape": [8], "names": STATE_NAMES}
    features["action"] = {"dtype": "float32", "shape": [8], "names": ACTION_NAMES}
    for name, dtype in {**OWN_FEATURES, **INDEX_FEATURES}.items():
        features[name] = {"dtype": dtype, "shape": [1], "names": None}
    return features


def make_schema(features: Mapping[str, Any]) -> pa.Schema:
    """Make the Arrow schema of the steps.

    Args:
        features: The "features" of info.json. Videos have no column.

    Returns:
        The schema, with a note in its metadata that the `datasets` library needs.
    """
    fields: list[pa.Field] = []
    note: dict[str, Any] = {}
    for name, feature in features.items():
        dtype = feature["dtype"]
        length = feature["shape"][0]
        value_note = {"dtype": dtype, "_type": "Value"}
        if dtype == "video":
            continue
        if dtype == "image":
            fields.append(pa.field(name, pa.struct({"bytes": pa.binary(), "path": pa.string()})))
            note[name] = {"_type": "Image"}
        elif length == 1:
            fields.append(pa.field(name, ARROW_TYPES[dtype]))
            note[name] = value_note
        else:
            element = pa.field("element", ARROW_TYPES[dtype])
            fields.append(pa.field(name, pa.list_(element, length)))
            note[name] = {"feature": value_note, "length": length, "_type": "List"}
    return pa.schema(fields, {"huggingface": json.dumps({"info": {"features": note}})})


def write_tasks(path: Path, tasks: list[str]) -> None:
    """Write the file of tasks as pandas would, with the texts as the index of the table.

    Args:
        path: The Parquet file.
        tasks: The instructions, in the order of their task indices.
    """
    index_name = "__index_level_0__"
    index_column = {
        "name": None,
        "field_name": index_name,
        "pandas_type": "unicode",
        "numpy_type": "object",
        "metadata": None,
    }
    note = {
        "index_columns": [index_name],
        "columns": [index_column],
        "column_indexes": [],
    }
    columns = {
        "task_index": pa.array(range(len(tasks)), pa.int64()),
        index_name: pa.array(tasks, pa.large_string()),
    }
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(note)}), path)


def get_feature_name(camera: str) -> str:
    """The name of the feature that has a camera's images."""
    return f"observation.images.{camera}"


def make_file_path(template: str, number: int, **names: str) -> str:
    """Fill the path template of one kind of files for file `number`; `names` fill other fields."""
    return template.format(
        chunk_index=number // FILES_PER_CHUNK, file_index=number % FILES_PER_CHUNK, **names
    )


def make_file_index_columns(prefix: str, number: int) -> EpisodeRow:
    """Make the columns of a row of `meta/episodes` that say in which file data of the episode are.

    Args:
        prefix: The kind of data: "data", "meta/episodes", or "videos/" and the feature.
        number: The number of the file among the files of this kind.
    """
    return {
        f"{prefix}/chunk_index": number // FILES_PER_CHUNK,
        f"{prefix}/file_index": number % FILES_PER_CHUNK,
    }


def to_int_if_whole(rate_hz: float) -> int | float:
    """Convert a rate as LeRobot writes it: to an integer if it is a whole number."""
    return int(rate_hz) if rate_hz == int(rate_hz) else rate_hz
