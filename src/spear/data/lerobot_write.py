"""Write episodes as a LeRobot v3.0 dataset: the files, schemas and metadata of LeRobot's own library.

The rows hold our nouns: "observation.state" [8] is position (m, base), quaternion (w x y z) and gripper
opening; "action" [8] is the canonical action (`Action.to_vector`). `spear.json` beside `meta` says so, in the
same words as for any dataset, so that `read_lerobot` needs nothing else. Columns that LeRobot knows no name
for (`action_mask`, `success`, `source`) are ordinary features of the dataset.
"""

from __future__ import annotations

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

from spear.data.actions import episode_actions
from spear.data.episode import check_episode
from spear.data.lerobot_stats import Images, Rows, Stats, frames_to_sample, to_json
from spear.data.oxe import SPEC_FILE
from spear.data.video import VideoWriter
from spear.errors import SpearError
from spear.images import decode_image
from spear.types import Array, Episode

CHUNK_FILES, DATA_MB, VIDEO_MB = 1000, 100, 200
"""Files in a folder, and the sizes at which the next file begins: LeRobot's."""
EPISODES_PER_FILE = 10_000
"""Rows of one file of `meta/episodes` (our choice)."""
STATE_NAMES = ["x", "y", "z", "qw", "qx", "qy", "qz", "gripper"]
ACTION_NAMES = ["dx", "dy", "dz", "dqw", "dqx", "dqy", "dqz", "gripper"]
_OURS = {"action_mask": "bool", "success": "int64", "source": "string"}
_INDEX = {"timestamp": "float32"} | dict.fromkeys(
    ("frame_index", "episode_index", "index", "task_index"), "int64"
)
_ARROW = {"float32": pa.float32(), "int64": pa.int64(), "bool": pa.bool_(), "string": pa.string()}
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"


def write_lerobot(
    episodes: Iterable[Episode],
    folder: str | Path,
    images: Literal["image", "video"] = "image",
    robot: str = "unknown",
) -> int:
    """Write episodes, checked, as a LeRobot v3.0 dataset; returns how many.

    images  "image" keeps the encoded images as they are, inside Parquet; "video" encodes them as AV1.
    robot   LeRobot's `robot_type`.

    The folder appears when everything is in it. Raises SpearError when it exists already with something in
    it, for a bad episode, when no episode comes, and when episodes differ in cameras, image size or rate.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SpearError(f"not empty: {target}: choose another folder for the dataset, or remove it")
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    writer: _Writer | None = None
    try:
        for episode in episodes:
            episode = check_episode(episode)
            writer = writer or _Writer(part, episode, images, robot)
            writer.add(episode)
        if writer is None:
            raise SpearError(f"no episodes: nothing to write to {target}")
        count = writer.close()
        part.replace(target)
        return count
    except OSError as error:
        raise SpearError(
            f"cannot write: {target}: {error}; free some space or choose another folder"
        ) from error
    finally:
        if writer is not None:
            with contextlib.suppress(OSError):  # the disk may be full: what went wrong first is told
                writer.abandon()
        shutil.rmtree(part, ignore_errors=True)


class _Writer:
    """The files being written. What the first episode has, all must have."""

    def __init__(self, folder: Path, first: Episode, images: str, robot: str) -> None:
        self.folder, self.images, self.robot = folder, images, robot
        self.rate_hz = first.rate_hz
        self.sizes = {camera: _size(first, camera) for camera in sorted(first.images)}
        self.features = _features(self.sizes, images, self.rate_hz)
        self.schema = _schema(self.features)
        self.tasks: dict[str, int] = {}
        self.rows = {
            name: Rows() for name, f in self.features.items() if f["dtype"] in ("float32", "int64", "bool")
        }
        self.pictures = {camera: Images() for camera in self.sizes}
        self.episodes = self.frames = self.meta_files = 0
        self.waiting: list[dict[str, Any]] = []
        self.data_file, self.video_files = -1, dict.fromkeys(self.sizes, -1)
        self.data: pq.ParquetWriter | None = None
        self.videos: dict[str, VideoWriter] = {}

    def add(self, episode: Episode) -> None:
        self._check(episode)
        length = len(episode)
        columns = self._columns(episode)
        row: dict[str, Any] = {
            "episode_index": self.episodes,
            "tasks": [episode.instruction],
            "length": length,
            **self._write_rows(columns, episode),
            "dataset_from_index": self.frames,
            "dataset_to_index": self.frames + length,
        }
        stats: dict[str, Stats] = {}
        for camera in self.sizes:
            sampled = set(frames_to_sample(length).tolist())
            looked_at = []
            if self.images == "video":
                row |= self._start_video(camera, length)
            for step, encoded in enumerate(episode.images[camera]):
                if step in sampled or self.images == "video":
                    where = f"{episode.source} step {step} camera {camera!r}"
                    image = decode_image(encoded, where)
                    self._check_size(camera, image, where)
                    if self.images == "video":
                        self.videos[camera].write(image)
                    if step in sampled:
                        looked_at.append(image)
            stats[_key(camera)] = self.pictures[camera].add(looked_at)
        for name, rows in self.rows.items():
            values = columns[name]
            stats[name] = rows.add(values.reshape(length, -1))
        for name in self.features:
            for which, values in stats.get(name, {}).items():
                row[f"stats/{name}/{which}"] = values.tolist()
        place = _place("meta/episodes", self.meta_files)
        self.waiting.append(row | place)
        self.episodes += 1
        self.frames += length
        if len(self.waiting) == EPISODES_PER_FILE:
            self._write_episodes()

    def _check(self, episode: Episode) -> None:
        name = episode.source
        if set(episode.images) != set(self.sizes):
            raise SpearError(
                f"cameras differ: {name} has {sorted(episode.images)}, the first episode {sorted(self.sizes)}: "
                "a LeRobot dataset has the same cameras throughout; leave the episode out"
            )
        if episode.rate_hz != self.rate_hz:
            raise SpearError(
                f"rates differ: {name} is at {episode.rate_hz:g} Hz, the first episode at {self.rate_hz:g}: "
                "resample (see `spear data prepare`), or leave the episode out"
            )

    def _check_size(self, camera: str, image: Array, where: str) -> None:
        if image.shape[:2] != self.sizes[camera]:
            (h, w), (h0, w0) = image.shape[:2], self.sizes[camera]
            raise SpearError(
                f"image sizes differ: {where} is {w} x {h} pixels, the first one {w0} x {h0}: leave it out"
            )

    def _columns(self, episode: Episode) -> dict[str, Any]:
        """Everything but images, as arrays [T] or [T, d]."""
        length = len(episode)
        action, mask = episode_actions(episode)
        task = self.tasks.setdefault(episode.instruction, len(self.tasks))
        success = -1 if episode.success is None else int(episode.success)
        state = np.concatenate([episode.position, episode.rotation, episode.gripper[:, None]], axis=1)
        return {
            "observation.state": state.astype(np.float32),
            "action": np.asarray(action, np.float32),
            "action_mask": mask,
            "success": np.full(length, success, np.int64),
            "source": [episode.source] * length,
            "timestamp": (np.arange(length) / self.rate_hz).astype(np.float32),
            "frame_index": np.arange(length),
            "episode_index": np.full(length, self.episodes),
            "index": self.frames + np.arange(length),
            "task_index": np.full(length, task),
        }

    def _write_rows(self, columns: Mapping[str, Any], episode: Episode) -> dict[str, int]:
        if self.data is not None and os.path.getsize(self._data_path()) / 2**20 > DATA_MB:
            self.data.close()
            self.data = None
        if self.data is None:
            self.data_file += 1
            path = self._data_path()
            path.parent.mkdir(parents=True, exist_ok=True)
            self.data = pq.ParquetWriter(path, self.schema)
        arrays = []
        for field in self.schema:
            if pa.types.is_struct(field.type):
                camera = field.name.removeprefix("observation.images.")
                arrays.append(pa.array(_pictures(episode.images[camera]), field.type))
            elif pa.types.is_fixed_size_list(field.type):
                flat = pa.array(columns[field.name].reshape(-1))
                arrays.append(pa.FixedSizeListArray.from_arrays(flat, type=field.type))
            else:
                arrays.append(pa.array(columns[field.name], field.type))
        self.data.write_table(pa.Table.from_arrays(arrays, schema=self.schema))
        return _place("data", self.data_file)

    def _data_path(self) -> Path:
        return self.folder / DATA_PATH.format(**_chunk(self.data_file))

    def _start_video(self, camera: str, length: int) -> dict[str, Any]:
        video = self.videos.get(camera)
        if video is not None and video.bytes / 2**20 > VIDEO_MB:
            video.close()
            video = None
        if video is None:
            self.video_files[camera] += 1
            path = VIDEO_PATH.format(video_key=_key(camera), **_chunk(self.video_files[camera]))
            video = self.videos[camera] = VideoWriter(self.folder / path, *self.sizes[camera], self.rate_hz)
        key = f"videos/{_key(camera)}"
        return {
            **_place(key, self.video_files[camera]),
            f"{key}/from_timestamp": video.frames / self.rate_hz,
            f"{key}/to_timestamp": (video.frames + length) / self.rate_hz,
        }

    def _write_episodes(self) -> None:
        path = self.folder / "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet".format(
            **_chunk(self.meta_files)
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(self.waiting), path)
        self.waiting, self.meta_files = [], self.meta_files + 1

    def close(self) -> int:
        """Complete all files; returns the number of episodes."""
        self.abandon()
        if self.waiting:
            self._write_episodes()
        totals: dict[str, Rows | Images] = dict(self.rows)
        totals |= {_key(camera): pictures for camera, pictures in self.pictures.items()}
        stats = {name: to_json(totals[name].total()) for name in self.features if name in totals}
        _write_json(self.folder / "meta/stats.json", stats)
        _write_json(self.folder / "meta/info.json", self._info())
        _write_tasks(self.folder / "meta/tasks.parquet", list(self.tasks))
        _write_json(self.folder / SPEC_FILE, _layout(self.sizes))
        return self.episodes

    def abandon(self) -> None:
        """Close what is open."""
        if self.data is not None:
            self.data.close()
            self.data = None
        for video in self.videos.values():
            video.close()
        self.videos = {}

    def _info(self) -> dict[str, Any]:
        return {
            "codebase_version": "v3.0",
            "robot_type": self.robot,
            "total_episodes": self.episodes,
            "total_frames": self.frames,
            "total_tasks": len(self.tasks),
            "chunks_size": CHUNK_FILES,
            "data_files_size_in_mb": DATA_MB,
            "video_files_size_in_mb": VIDEO_MB,
            "fps": _whole(self.rate_hz),
            "splits": {"train": f"0:{self.episodes}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if self.images == "video" else None,
            "features": self.features,
        }


def _layout(cameras: Iterable[str]) -> dict[str, Any]:
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


def _features(sizes: Mapping[str, tuple[int, int]], images: str, rate_hz: float) -> dict[str, Any]:
    """The "features" of info.json, in the order of the columns."""
    features: dict[str, Any] = {}
    for camera, (height, width) in sizes.items():
        names = ["height", "width", "channels"]
        features[_key(camera)] = {"dtype": images, "shape": [height, width, 3], "names": names}
        if images == "video":
            features[_key(camera)]["info"] = {
                "video.height": height,
                "video.width": width,
                "video.codec": "av1",
                "video.pix_fmt": "yuv420p",
                "video.is_depth_map": False,
                "video.fps": _whole(rate_hz),
                "video.channels": 3,
                "has_audio": False,
            }
    features["observation.state"] = {"dtype": "float32", "shape": [8], "names": STATE_NAMES}
    features["action"] = {"dtype": "float32", "shape": [8], "names": ACTION_NAMES}
    for name, dtype in {**_OURS, **_INDEX}.items():
        features[name] = {"dtype": dtype, "shape": [1], "names": None}
    return features


def _schema(features: Mapping[str, Any]) -> pa.Schema:
    """The schema of the rows, with the note that lets the `datasets` library restore its types."""
    fields: list[pa.Field] = []
    note: dict[str, Any] = {}
    for name, feature in features.items():
        dtype = feature["dtype"]
        if dtype == "video":
            continue
        if dtype == "image":
            fields.append(pa.field(name, pa.struct({"bytes": pa.binary(), "path": pa.string()})))
            note[name] = {"_type": "Image"}
            continue
        value = {"dtype": dtype, "_type": "Value"}
        if feature["shape"] == [1]:
            fields.append(pa.field(name, _ARROW[dtype]))
            note[name] = value
        else:
            length = feature["shape"][0]
            fields.append(pa.field(name, pa.list_(pa.field("element", _ARROW[dtype]), length)))
            note[name] = {"feature": value, "length": length, "_type": "List"}
    return pa.schema(fields, {"huggingface": json.dumps({"info": {"features": note}})})


def _pictures(images: Sequence[bytes]) -> list[dict[str, Any]]:
    end = "png" if images[0][:4] == b"\x89PNG" else "jpg"
    return [{"bytes": image, "path": f"frame-{step:06d}.{end}"} for step, image in enumerate(images)]


def _write_tasks(path: Path, tasks: list[str]) -> None:
    """The tasks as pandas would write them, with the task as the index of the table."""
    index = "__index_level_0__"
    entry = {"pandas_type": "int64", "numpy_type": "int64", "metadata": None}
    pandas = {
        "index_columns": [index],
        "column_indexes": [
            {
                "name": None,
                "field_name": None,
                "pandas_type": "unicode",
                "numpy_type": "object",
                "metadata": {"encoding": "UTF-8"},
            }
        ],
        "columns": [
            {"name": "task_index", "field_name": "task_index", **entry},
            {"name": None, "field_name": index, **entry, "pandas_type": "unicode", "numpy_type": "object"},
        ],
        "attributes": {},
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.2.0",
    }
    fields = [pa.field("task_index", pa.int64()), pa.field(index, pa.large_string())]
    schema = pa.schema(fields, {"pandas": json.dumps(pandas)})
    numbers = pa.array(range(len(tasks)), pa.int64())
    pq.write_table(pa.Table.from_arrays([numbers, pa.array(tasks, pa.large_string())], schema=schema), path)


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=4, ensure_ascii=False))


def _size(episode: Episode, camera: str) -> tuple[int, int]:
    image = decode_image(episode.images[camera][0], f"{episode.source} step 0 camera {camera!r}")
    return image.shape[0], image.shape[1]


def _key(camera: str) -> str:
    return f"observation.images.{camera}"


def _chunk(number: int) -> dict[str, int]:
    return {"chunk_index": number // CHUNK_FILES, "file_index": number % CHUNK_FILES}


def _place(prefix: str, number: int) -> dict[str, int]:
    return {f"{prefix}/{name}": value for name, value in _chunk(number).items()}


def _whole(rate_hz: float) -> int | float:
    """LeRobot's rates are whole numbers where they can be."""
    return int(rate_hz) if rate_hz == int(rate_hz) else rate_hz
