"""BridgeData V2 as its authors distribute it: raw recordings, and the NumPy files made of them.

    …/<date>/raw/traj_group0/traj0/   images0/im_0.jpg …, obs_dict.pkl, policy_out.pkl, lang.txt   ("raw")
    …/train/out.npy, …/val/out.npy                               a list of trajectories            ("numpy")

The layout is that of rail-berkeley/bridge_data_v2, data_processing/bridgedata_raw_to_numpy.py. Both are
pickles, which can run any code when they are opened: here nothing but NumPy arrays and plain values is let
in. The columns are then as in the RLDS form: "observation/state" [T, 7], "observation/images0", "action" [T,
7].
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from spear.data.readers.bad import OnBad
from spear.data.readers.layout import episodes_from
from spear.data.readers.look import has_below
from spear.data.readers.spec import Layout, find_spec
from spear.data.readers.splits import split_ranges
from spear.errors import SpearError
from spear.types import Array, Episode
from spear.util.images import encode_jpeg

RAW, NUMPY = "bridge_raw", "bridge_numpy"
"""Names of the two layouts in the registry."""
_LATE_UNTIL = datetime(2021, 7, 23)
"""Before this day camera images came one step late (bridgedata_raw_to_numpy.py)."""
_SAFE = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy.core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
}
Trajectories = Mapping[str, list[tuple[Path, int]]]
"""Split name -> (file or folder, trajectory in it)."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _SAFE:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no array")
        return super().find_class(module, name)


def is_bridge_raw(path: str | Path) -> bool:
    """Whether raw recordings of BridgeData V2 are below `path`."""
    return has_below(path, "obs_dict.pkl")


def is_bridge_numpy(path: str | Path) -> bool:
    """Whether `path` is an out.npy of BridgeData V2, or such files are below it."""
    path = Path(path)
    return path.name == "out.npy" if path.is_file() else has_below(path, "out.npy")


def find_raw(path: str | Path) -> Trajectories:
    """The trajectories below a folder of raw recordings, by path."""
    return {"train": [(p.parent, 0) for p in sorted(Path(path).glob("**/obs_dict.pkl"))]}


def find_numpy(path: str | Path) -> Trajectories:
    """The trajectories of all out.npy below a folder, or of one such file; the split is its folder's name."""
    path = Path(path)
    found: dict[str, list[tuple[Path, int]]] = {}
    for file in [path] if path.is_file() else sorted(path.glob("**/out.npy")):
        split = file.resolve().parent.name
        count = len(_read_numpy(file))
        found.setdefault(split if split in ("train", "val") else "train", []).extend(
            (file, index) for index in range(count)
        )
    return found


def _read_numpy(file: Path) -> Array:
    """The trajectories of one out.npy, an object array of dicts."""
    try:
        with open(file, "rb") as stream:
            version = np.lib.format.read_magic(stream)
            if version == (1, 0):
                shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
            else:
                shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
            if dtype != np.dtype(object) or len(shape) != 1:
                raise ValueError(f"it holds {dtype} {shape}, not a list of trajectories")
            return np.asarray(_Unpickler(stream).load(), object)
    except (OSError, ValueError, EOFError, pickle.UnpicklingError, AttributeError, TypeError) as error:
        raise SpearError(f"unreadable: {file}: {error}; copy it again") from error


def _read_pickle(file: Path) -> Any:
    try:
        return _Unpickler(io.BytesIO(file.read_bytes())).load()
    except (OSError, ValueError, EOFError, pickle.UnpicklingError, AttributeError, TypeError) as error:
        raise SpearError(f"unreadable: {file}: {error}; copy it again, or leave the episode out") from error


def read_bridge_raw(
    path: str | Path, split: str = "train", dataset: Layout = None, on_bad: OnBad | None = None
) -> Iterator[Episode]:
    """Episodes of raw recordings, in our conventions; arguments and errors as for `read_rlds`."""
    spec = find_spec(RAW, Path(path), given=dataset)
    yield from episodes_from(raw_steps(path, split, True, on_bad), spec, on_bad)


def read_bridge_numpy(
    path: str | Path, split: str = "train", dataset: Layout = None, on_bad: OnBad | None = None
) -> Iterator[Episode]:
    """Episodes of out.npy files, in our conventions; arguments and errors as for `read_rlds`."""
    spec = find_spec(NUMPY, Path(path), given=dataset)
    yield from episodes_from(numpy_steps(path, split, True, on_bad), spec, on_bad)


Steps = Iterator[tuple[str, dict[str, Any]]]
"""(source, step arrays) of episodes."""


def raw_steps(path: str | Path, split: str, images: bool, on_bad: OnBad | None = None) -> Steps:
    """The step arrays of raw recordings as they are, with or without images; errors as for `read_rlds`."""
    return _steps(path, find_raw(path), split, RAW, partial(_raw_steps, images=images), on_bad)


def numpy_steps(path: str | Path, split: str, images: bool, on_bad: OnBad | None = None) -> Steps:
    """The step arrays of out.npy files as they are, with or without images; errors as for `read_rlds`."""
    return _steps(path, find_numpy(path), split, NUMPY, partial(_numpy_steps, images=images), on_bad)


def _steps(
    path: str | Path,
    found: Trajectories,
    split: str,
    dataset: str,
    steps_of: Callable[[Any, str], dict[str, Any]],
    on_bad: OnBad | None,
) -> Steps:
    root = Path(path).resolve()
    open_file: tuple[Path | None, Any] = (None, None)
    for name, first, end in split_ranges({k: [len(v)] for k, v in found.items()}, split, path):
        for where, index in found[name][first:end]:
            place = where.resolve().relative_to(root) if where.resolve() != root else Path(root.name)
            source = f"{dataset}/{place}#{index}"
            try:
                if where.is_file() and open_file[0] != where:
                    open_file = (where, _read_numpy(where))
                steps = steps_of(open_file[1][index] if where.is_file() else where, source)
            except SpearError as error:
                if on_bad is None:
                    raise
                on_bad(error)
            else:
                yield source, steps


def _raw_steps(folder: Path, source: str, images: bool) -> dict[str, Any]:
    """The step arrays of one raw trajectory. It has one observation more than actions."""
    state = np.asarray(_entry(_read_pickle(folder / "obs_dict.pkl"), "full_state", folder), np.float64)
    logged = _read_pickle(folder / "policy_out.pkl")
    actions = _stack([_entry(a, "actions", folder) if isinstance(a, dict) else a for a in logged], source)
    pictures: dict[str, list[bytes]] = {}
    for camera in sorted(folder.glob("images*")) if images else ():
        files = [camera / f"im_{step}.jpg" for step in range(len(list(camera.glob("im_*.jpg"))))]
        missing = next((file for file in files if not file.is_file()), None)
        if missing is not None:
            raise SpearError(f"missing image: {missing}: copy it again, or leave the episode out")
        pictures[camera.name] = [file.read_bytes() for file in files]
    if len(state) != len(actions) + 1:
        raise SpearError(
            f"lengths differ: {source}: {len(state)} states and {len(actions)} actions, where there is one state "
            "more than actions; leave the episode out"
        )
    recorded = _date(folder)
    late = recorded is not None and recorded < _LATE_UNTIL
    rows, acted = (slice(1, -1), slice(0, -1)) if late else (slice(0, -1), slice(None))
    lang = folder / "lang.txt"
    words = lang.read_text("utf-8", "replace").splitlines() if lang.is_file() else []
    observation: dict[str, Any] = {"state": state[rows]}
    for camera_name, files_of in pictures.items():
        if len(files_of) != len(state):
            raise SpearError(
                f"frames and rows differ: {source}: {camera_name} has {len(files_of)} images, but there are "
                f"{len(state)} states; leave the episode out"
            )
        observation[camera_name] = files_of[rows]
    return {
        "observation": observation,
        "action": actions[acted],
        "language_instruction": [(words[0] if words else "").encode()] * len(actions[acted]),
    }


def _date(folder: Path) -> datetime | None:
    """When a trajectory was recorded, by the name of the folder above its "raw"."""
    for parent in folder.resolve().parents:
        try:
            return datetime.strptime(parent.name, "%Y-%m-%d_%H-%M-%S")
        except ValueError:
            continue
    return None


def _numpy_steps(trajectory: Any, source: str, images: bool) -> dict[str, Any]:
    """The step arrays of one trajectory of an out.npy: observations are a list of dicts, one per step."""
    if not isinstance(trajectory, dict) or not isinstance(trajectory.get("observations"), list):
        raise SpearError(f"no trajectory: {source}: it has no list of observations; leave it out")
    steps = trajectory["observations"]
    if not steps:
        raise SpearError(f"empty episode: {source}: it has no steps; leave it out")
    observation: dict[str, Any] = {}
    for key in steps[0]:
        picture = key.startswith("images")
        if picture and not images:
            continue
        values = [_entry(step, key, source) for step in steps]
        if picture:
            observation[key] = [encode_jpeg(np.asarray(value, np.uint8)) for value in values]
        else:
            observation[key] = _stack(values, source)
    words = trajectory.get("language", trajectory.get("lang", ""))
    words = words[0] if isinstance(words, list) and words else words
    return {
        "observation": observation,
        "action": _stack(trajectory.get("actions", []), source),
        "language_instruction": [str(words or "").encode()] * len(steps),
    }


def _entry(values: Any, key: str, where: object) -> Any:
    if not isinstance(values, dict) or key not in values:
        raise SpearError(f"no {key!r}: {where}: leave the episode out")
    return values[key]


def _stack(rows: Any, source: str) -> Array:
    try:
        return np.asarray(rows, np.float64)
    except (TypeError, ValueError) as error:
        raise SpearError(f"no numbers: {source}: {error}; leave the episode out") from error
