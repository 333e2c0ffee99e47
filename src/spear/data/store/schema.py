"""What a LeRobot v3.0 dataset of our episodes looks like: its features, schemas, file names and metadata."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

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


def our_layout(cameras: Iterable[str]) -> dict[str, Any]:
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


def make_features(sizes: Mapping[str, tuple[int, int]], images: str, rate_hz: float) -> dict[str, Any]:
    """The "features" of info.json, in the order of the columns."""
    features: dict[str, Any] = {}
    for camera, (height, width) in sizes.items():
        names = ["height", "width", "channels"]
        features[feature_name(camera)] = {"dtype": images, "shape": [height, width, 3], "names": names}
        if images == "video":
            features[feature_name(camera)]["info"] = {
                "video.height": height,
                "video.width": width,
                "video.codec": "av1",
                "video.pix_fmt": "yuv420p",
                "video.is_depth_map": False,
                "video.fps": whole(rate_hz),
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
    note = {"index_columns": [index], "columns": [{**column, "metadata": None}], "column_indexes": []}
    numbers, texts = pa.array(range(len(tasks)), pa.int64()), pa.array(tasks, pa.large_string())
    table = pa.table({"task_index": numbers, index: texts})
    pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(note)}), path)


def feature_name(camera: str) -> str:
    return f"observation.images.{camera}"


def place(template: str, number: int, **names: str) -> str:
    """The path of file `number` of one kind below the folder of the dataset."""
    return template.format(chunk_index=number // CHUNK_FILES, file_index=number % CHUNK_FILES, **names)


def place_of(prefix: str, number: int) -> dict[str, int]:
    return {f"{prefix}/chunk_index": number // CHUNK_FILES, f"{prefix}/file_index": number % CHUNK_FILES}


def whole(rate_hz: float) -> int | float:
    """LeRobot's rates are whole numbers where they can be."""
    return int(rate_hz) if rate_hz == int(rate_hz) else rate_hz
