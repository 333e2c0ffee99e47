"""Write episodes as a LeRobot v3.0 dataset: the files, schemas and metadata of LeRobot's own library.

"observation.state" [8] is position (m, base), quaternion (w x y z) and gripper opening; "action" [8] is the
canonical action (`Action.to_vector`). `spear.json` beside `meta` says so, as for any dataset. Columns that
LeRobot knows no name for (`action_mask`, `success`, `source`) are ordinary features of the dataset.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spear.data.actions import add_actions, check_episode
from spear.data.readers.dataset_layout import LAYOUT_FILE
from spear.data.readers.video import VideoWriter
from spear.data.store.stats import ImageSample, RowStats, check_size, sample_images
from spear.errors import SpearError
from spear.types import Episode
from spear.util.files import check_new_folder, report_write_errors, write_text
from spear.util.images import decode_image
from spear.util.run_lock import acquire_run_lock

CHUNK_FILES, DATA_MB, VIDEO_MB = 1000, 100, 200
"""Files in a folder, and the sizes at which the next file begins: LeRobot's."""
STATE_NAMES = ["x", "y", "z", "qw", "qx", "qy", "qz", "gripper"]
ACTION_NAMES = ["dx", "dy", "dz", "dqw", "dqx", "dqy", "dqz", "gripper"]
_OURS = {"action_mask": "bool", "success": "int64", "source": "string"}
_INDEX = {"timestamp": "float32"}
_INDEX |= dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), "int64")
_ARROW = {"float32": pa.float32(), "int64": pa.int64(), "bool": pa.bool_(), "string": pa.string()}
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PER_FILE = 10_000
"""Rows of one file of `meta/episodes` (our choice)."""


def write_lerobot(
    episodes: Iterable[Episode], folder: str | Path, images: Literal["image", "video"] = "image"
) -> int:
    """Write episodes, checked, as a LeRobot v3.0 dataset; returns how many.

    images  "image" keeps the encoded images as they are, inside Parquet; "video" encodes them as AV1.
    The folder appears when everything is in it. Raises SpearError when it holds something, or another process
    writes it, for a bad episode or none, and when episodes differ in cameras, image size or rate.
    """
    target = Path(folder)
    check_new_folder(target)
    part = target.with_name(f".{target.name}.part")
    with acquire_run_lock(part, "exporting in"), report_write_errors(target):
        writer: _Writer | None = None
        shutil.rmtree(part / "dataset", ignore_errors=True)
        try:
            for episode in map(add_actions, map(check_episode, episodes)):
                samples = sample_images(episode)
                writer = writer or _Writer(part / "dataset", samples, episode.rate_hz, images)
                writer.add(episode, samples)
            if writer is None:
                raise SpearError(f"no episodes: nothing to write to {target}")
            writer.finish()
            writer.folder.replace(target)
            return writer.episodes
        finally:
            if writer is not None:
                with contextlib.suppress(
                    OSError
                ):  # the disk may be full: what went wrong first is told
                    writer.close()
            shutil.rmtree(part, ignore_errors=True)


class _Writer:
    """The files of a dataset being written, one episode after the other.

    samples   of the images of the first episode, whose cameras and sizes all have.
    rate_hz   of all episodes.
    """

    def __init__(
        self, folder: Path, samples: Mapping[str, ImageSample], rate_hz: float, images: str
    ) -> None:
        self.folder, self.images, self.rate_hz = folder, images, rate_hz
        self.sizes = {camera: samples[camera].size for camera in sorted(samples)}
        self.features = make_features(self.sizes, images, self.rate_hz)
        self.schema = make_schema(self.features)
        self.tasks: dict[str, int] = {}
        numbers = [
            n for n, f in self.features.items() if f["dtype"] in ("float32", "int64", "bool")
        ]
        self.rows = {name: RowStats() for name in numbers}
        self.pictures = {camera: ImageSample(size) for camera, size in self.sizes.items()}
        self.episodes = self.frames = self.data_files = self.meta_files = 0
        self.waiting: list[dict[str, Any]] = []
        self.video_files = dict.fromkeys(self.sizes, 0)
        self._data: pq.ParquetWriter | None = None
        self._videos: dict[str, VideoWriter] = {}

    def add(self, episode: Episode, samples: Mapping[str, ImageSample]) -> None:
        """Write a checked episode; samples are those of its images (see `sample_images`). Raises SpearError
        when it differs from the others in cameras, image sizes or rate."""
        name, cameras = episode.source, sorted(episode.images)
        if cameras != list(self.sizes):
            raise SpearError(
                f"cameras differ: {name} has {cameras}, the first episode {list(self.sizes)}"
            )
        for camera, size in self.sizes.items():
            check_size(samples[camera].size, size, f"{name} step 0 camera {camera!r}")
        if episode.rate_hz != self.rate_hz:
            rates = f"{name} is at {episode.rate_hz:g} Hz, the first episode at {self.rate_hz:g}"
            raise SpearError(f"rates differ: {rates}: resample (see `spear data prepare`)")
        if self._data is not None and os.path.getsize(self._data_path) > DATA_MB << 20:
            self._end_file()
        length, columns = len(episode), self._columns(episode)
        row: dict[str, Any] = {
            "episode_index": self.episodes,
            "tasks": [episode.instruction],
            "length": length,
            **self._write_rows(columns, episode),
            "dataset_from_index": self.frames,
            "dataset_to_index": self.frames + length,
        }
        rows = {name: columns[name].reshape(length, -1) for name in self.rows}
        stats = {name: RowStats().add(values).total() for name, values in rows.items()}
        for camera in self.sizes:
            if self.images == "video":
                row |= self._write_video(camera, episode)
            stats[feature_name(camera)] = samples[camera].stats()
            self.pictures[camera].histogram[...] += samples[camera].histogram
        for name in self.features:
            for which, values in stats.get(name, {}).items():
                row[f"stats/{name}/{which}"] = values.tolist()
        self.waiting.append(row | file_indices("meta/episodes", self.meta_files))
        for name, values in rows.items():
            self.rows[name].add(values)
        self.episodes += 1
        self.frames += length
        if len(self.waiting) == EPISODES_PER_FILE:
            self._write_episodes()

    def _columns(self, episode: Episode) -> dict[str, Any]:
        """Everything but images, as arrays [T] or [T, d]."""
        length = len(episode)
        state = episode.position, episode.rotation, episode.gripper
        return {
            "observation.state": np.column_stack(state).astype(np.float32),
            "action": np.asarray(episode.action, np.float32),
            "action_mask": np.asarray(episode.action_mask),
            "success": np.full(
                length, -1 if episode.success is None else episode.success, np.int64
            ),
            "source": [episode.source] * length,
            "timestamp": (np.arange(length) / self.rate_hz).astype(np.float32),
            "frame_index": np.arange(length),
            "episode_index": np.full(length, self.episodes),
            "index": self.frames + np.arange(length),
            "task_index": np.full(
                length, self.tasks.setdefault(episode.instruction, len(self.tasks))
            ),
        }

    @property
    def _data_path(self) -> Path:
        return self.folder / file_path(DATA_PATH, self.data_files)

    def _write_rows(self, columns: Mapping[str, Any], episode: Episode) -> dict[str, int]:
        if self._data is None:
            self._data_path.parent.mkdir(parents=True, exist_ok=True)
            self._data = pq.ParquetWriter(self._data_path, self.schema)
        rows: dict[str, list[Any]] = {name: list(values) for name, values in columns.items()}
        for camera, images in episode.images.items() if self.images == "image" else ():
            end = "png" if images[0][:4] == b"\x89PNG" else "jpg"
            cells = [
                {"bytes": image, "path": f"frame-{step:06d}.{end}"}
                for step, image in enumerate(images)
            ]
            rows[feature_name(camera)] = cells
        self._data.write_table(pa.Table.from_pydict(rows, schema=self.schema))
        return file_indices("data", self.data_files)

    def _write_video(self, camera: str, episode: Episode) -> dict[str, Any]:
        """Append the frames of an episode; returns where they are."""
        name = feature_name(camera)
        if camera in self._videos and self._videos[camera].num_bytes > VIDEO_MB << 20:
            self._videos.pop(camera).close()
            self.video_files[camera] += 1
        if camera not in self._videos:
            path = self.folder / file_path(VIDEO_PATH, self.video_files[camera], video_key=name)
            self._videos[camera] = VideoWriter(path, *self.sizes[camera], self.rate_hz)
        video = self._videos[camera]
        first = video.num_frames
        for step, encoded in enumerate(episode.images[camera]):
            where = f"{episode.source} step {step} camera {camera!r}"
            image = decode_image(encoded, where)
            check_size(image.shape[:2], self.sizes[camera], where)
            video.write(image)
        return {
            **file_indices(f"videos/{name}", self.video_files[camera]),
            f"videos/{name}/from_timestamp": first / self.rate_hz,
            f"videos/{name}/to_timestamp": (first + len(episode)) / self.rate_hz,
        }

    def _end_file(self) -> None:
        """Complete the file of rows; the next episode begins another."""
        if self._data is not None:
            data, self._data = self._data, None
            data.close()
            self.data_files += 1

    def _write_episodes(self) -> None:
        """Write a file of `meta/episodes` from what is waiting for it."""
        path = self.folder / file_path(EPISODES_PATH, self.meta_files)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(self.waiting), path)
        self.waiting, self.meta_files = [], self.meta_files + 1

    def close(self) -> None:
        """Close what is open."""
        self._end_file()
        while self._videos:
            self._videos.popitem()[1].close()

    def finish(self) -> None:
        """Complete all files, and write those that sum up the dataset."""
        self.close()
        if self.waiting:
            self._write_episodes()
        stats = {name: rows.total() for name, rows in self.rows.items()}
        stats |= {feature_name(camera): seen.stats() for camera, seen in self.pictures.items()}
        lists = {
            n: {k: v.tolist() for k, v in stats[n].items()} for n in self.features if n in stats
        }
        info = {
            "codebase_version": "v3.0",
            "robot_type": "unknown",
            "total_episodes": self.episodes,
            "total_frames": self.frames,
            "total_tasks": len(self.tasks),
            "chunks_size": CHUNK_FILES,
            "data_files_size_in_mb": DATA_MB,
            "video_files_size_in_mb": VIDEO_MB,
            "fps": int_if_whole(self.rate_hz),
            "splits": {"train": f"0:{self.episodes}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if self.images == "video" else None,
            "features": self.features,
        }
        layout = describe_layout(self.sizes)
        for name, content in {
            "meta/stats.json": lists,
            "meta/info.json": info,
            LAYOUT_FILE: layout,
        }.items():
            write_text(self.folder / name, json.dumps(content, indent=4, ensure_ascii=False))
        write_tasks(self.folder / "meta/tasks.parquet", list(self.tasks))


def describe_layout(cameras: Iterable[str]) -> dict[str, Any]:
    """What `spear.json` says of the columns."""
    return {
        "images": {camera: f"observation/images/{camera}" for camera in cameras},
        "position": "observation/state[0:3]",
        "rotation": "observation/state[3:7]",
        "rotation_format": "quat_wxyz",
        "gripper": "observation/state[7]",
        "gripper_range": [0.0, 1.0],
        "action": "action",
        **{name: name for name in _OURS},
    }


def make_features(
    sizes: Mapping[str, tuple[int, int]], images: str, rate_hz: float
) -> dict[str, Any]:
    """The "features" of info.json, in the order of the columns."""
    features: dict[str, Any] = {}
    for camera, (height, width) in sizes.items():
        names = ["height", "width", "channels"]
        features[feature_name(camera)] = {
            "dtype": images,
            "shape": [height, width, 3],
            "names": names,
        }
        if images == "video":
            features[feature_name(camera)]["info"] = {
                "video.height": height,
                "video.width": width,
                "video.codec": "av1",
                "video.pix_fmt": "yuv420p",
                "video.is_depth_map": False,
                "video.fps": int_if_whole(rate_hz),
                "video.channels": 3,
                "has_audio": False,
            }
    features["observation.state"] = {"dtype": "float32", "shape": [8], "names": STATE_NAMES}
    features["action"] = {"dtype": "float32", "shape": [8], "names": ACTION_NAMES}
    for name, dtype in {**_OURS, **_INDEX}.items():
        features[name] = {"dtype": dtype, "shape": [1], "names": None}
    return features


def make_schema(features: Mapping[str, Any]) -> pa.Schema:
    """The schema of the rows, with the note that lets the `datasets` library restore its types."""
    fields: list[pa.Field] = []
    note: dict[str, Any] = {}
    for name, feature in features.items():
        dtype, length = feature["dtype"], feature["shape"][0]
        value = {"dtype": dtype, "_type": "Value"}
        if dtype == "image":
            fields.append(pa.field(name, pa.struct({"bytes": pa.binary(), "path": pa.string()})))
            note[name] = {"_type": "Image"}
        elif dtype != "video" and length == 1:
            fields.append(pa.field(name, _ARROW[dtype]))
            note[name] = value
        elif dtype != "video":
            fields.append(pa.field(name, pa.list_(pa.field("element", _ARROW[dtype]), length)))
            note[name] = {"feature": value, "length": length, "_type": "List"}
    return pa.schema(fields, {"huggingface": json.dumps({"info": {"features": note}})})


def write_tasks(path: Path, tasks: list[str]) -> None:
    """The tasks, as the index of the table for whoever reads it with pandas."""
    index = "__index_level_0__"
    column = {"name": None, "field_name": index, "pandas_type": "unicode", "numpy_type": "object"}
    note = {
        "index_columns": [index],
        "columns": [{**column, "metadata": None}],
        "column_indexes": [],
    }
    numbers, texts = pa.array(range(len(tasks)), pa.int64()), pa.array(tasks, pa.large_string())
    table = pa.table({"task_index": numbers, index: texts})
    pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(note)}), path)


def feature_name(camera: str) -> str:
    return f"observation.images.{camera}"


def file_path(template: str, number: int, **names: str) -> str:
    """The path of file `number` of one kind below the folder of the dataset."""
    return template.format(
        chunk_index=number // CHUNK_FILES, file_index=number % CHUNK_FILES, **names
    )


def file_indices(prefix: str, number: int) -> dict[str, int]:
    return {
        f"{prefix}/chunk_index": number // CHUNK_FILES,
        f"{prefix}/file_index": number % CHUNK_FILES,
    }


def int_if_whole(rate_hz: float) -> int | float:
    """LeRobot's rates are whole numbers where they can be."""
    return int(rate_hz) if rate_hz == int(rate_hz) else rate_hz
