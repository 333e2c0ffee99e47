"""What a robot was told beside where it was: the logged actions and recorded states of a dataset's
episodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from spear.data.episode import EpisodeStore, check_norm
from spear.data.hypotheses import Recording
from spear.data.readers import bridge_raw, droid_raw
from spear.data.readers.bad import OnBad
from spear.data.readers.formats import need_format, open_split
from spear.data.readers.layout import recorded_pose, to_quaternion
from spear.data.readers.lerobot import TASK, open_lerobot
from spear.data.readers.lerobot import read_steps as read_lerobot_steps
from spear.data.readers.rlds import open_rlds, read_raw
from spear.data.readers.spec import RECORDED_ONLY, DatasetSpec, Layout, column, find_spec
from spear.errors import SpearError

BELIEVED = (*RECORDED_ONLY, "euler_zyx")
"""Formats of recorded orientations that are not judged, but made quaternions first (see
`hypotheses.state_forms`)."""
STORE = DatasetSpec(
    "store", position="position", rotation="rotation", rotation_format="quat_wxyz", action="action"
)


def logged_steps(
    path: str | Path, split: str, layout: Layout, on_bad: OnBad
) -> tuple[DatasetSpec, Iterator[tuple[str, Any]]]:
    """The layout of a dataset and (source, step arrays) of its episodes, without images where possible.

    Raises SpearError for a layout that names no logged actions.
    """
    name = need_format(path)
    if name == "store":
        store = open_split(path, split)
        return replace(STORE, rate_hz=store.rate_hz(0)), _store_steps(store, on_bad)
    if name == "rlds":
        rlds = open_rlds(path)
        spec = _logged(find_spec(rlds.name, rlds.path, given=layout))
        return spec, ((source, example["steps"]) for source, example in read_raw(rlds, split, on_bad))
    if name == "lerobot":
        lerobot = open_lerobot(path)
        said = {"instruction": TASK, "rate_hz": lerobot.rate_hz}
        spec = _logged(find_spec(lerobot.name, lerobot.path, said, given=layout))
        return spec, read_lerobot_steps(lerobot, split, (), on_bad)
    if name == "droid_raw":
        spec = _logged(find_spec(droid_raw.NAME, Path(path), given=layout))
        return replace(spec, action_mask="enabled"), droid_raw.steps_without_images(path, split, on_bad)
    raw = name == "bridge_raw"
    spec = _logged(find_spec(bridge_raw.RAW if raw else bridge_raw.NUMPY, Path(path), given=layout))
    read = bridge_raw.raw_steps if raw else bridge_raw.numpy_steps
    return spec, read(path, split, images=False, on_bad=on_bad)


def _logged(spec: DatasetSpec) -> DatasetSpec:
    """The same layout. Raises SpearError when it names no logged actions."""
    if spec.action is None and spec.logged_translation is None and spec.logged_rotation is None:
        raise SpearError(
            f"nothing to audit: {spec.name}: its layout names no logged actions; add logged_translation and "
            'logged_rotation to its spear.json, for example "logged_translation": "action[0:3]"'
        )
    return spec


def _store_steps(store: EpisodeStore, on_bad: OnBad) -> Iterator[tuple[str, dict[str, Any]]]:
    for index in range(len(store)):
        episode = store.without_images(index)
        if episode.action is None:
            on_bad(SpearError(f"no actions of its own: {episode.source}: audit the dataset it came from"))
            continue
        yield (
            episode.source,
            {
                "position": episode.position,
                "rotation": episode.rotation,
                "action": episode.action,
                "action_mask": np.asarray(episode.action_mask, bool),
            },
        )


def recording(steps: Mapping[str, Any], spec: DatasetSpec, source: str) -> Recording:
    """One episode's states and logged actions, checked. Raises SpearError for lengths that differ, and for
    numbers that are none."""
    assert spec.position is not None and spec.rotation is not None and spec.rate_hz is not None
    names: tuple[str | None, str | None] = spec.logged_translation, spec.logged_rotation
    if spec.action is not None:
        names = f"{spec.action}[0:3]", f"{spec.action}[3:7]"
    logged = [None if n is None else np.asarray(column(steps, n, source), np.float64) for n in names]
    position, rotation, form = recorded_pose(steps, spec, source)
    valid = np.ones(len(position), bool)
    mask = spec.action_mask or ("action_mask" if spec.action and "action_mask" in steps else None)
    if mask is not None:
        valid = np.asarray(column(steps, mask, source), bool).reshape(-1)
    numbers = {
        "position": position,
        "rotation": rotation,
        "logged translation": logged[0],
        "logged turn": logged[1],
    }
    for what, values in numbers.items():
        if values is not None and len(values) != len(valid):
            raise SpearError(
                f"lengths differ: {source}: {what} has {len(values)} rows, position {len(valid)}"
            )
        if values is not None and not np.isfinite(values).all():
            raise SpearError(f"not a number: {source}: its {what}; leave the episode out")
    if not len(valid):
        raise SpearError(f"empty episode: {source}: it has no steps; leave it out")
    if form in BELIEVED:
        rotation = to_quaternion(rotation, form, source)
    elif form.startswith("quat"):
        check_norm(rotation, source, "rotation")
    return Recording(source, position, rotation, logged[0], logged[1], valid, spec.rate_hz)
