"""A proposed spear.json: what the columns say, and what they leave open."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.spatial.transform import Rotation

from data_tiny import copied, edit
from refusals import refuses
from spear.audit.dataset_audit import audit
from spear.audit.describe import describe
from spear.audit.inspect import inspect
from spear.cli import main
from spear.data.readers.dataset_layout import REGISTRY
from spear.data.readers.formats import read_episodes

described = cache(describe)  # for folders that no test changes


@pytest.mark.parametrize("name", ["bridge_v2_sample", "lerobot/v3.0_image"])
def test_a_proposal_for_the_real_sample_is_right(shared: Path, tmp_path: Path, name: str) -> None:
    folder, known = shared / "data" / name, REGISTRY["bridge_dataset"]
    found = described(folder)
    columns = (
        "position",
        "rotation",
        "gripper",
        "command",
        "logged_translation",
        "logged_rotation",
    )
    for key in (*columns, "rotation_format", "logged_kind", "logged_frame"):
        assert found[key] == getattr(known, key), key
    assert (
        found["images"]["external"].startswith("observation/image")
        and "wrist" not in found["images"]
    )
    closed, opened = found["gripper_range"]
    assert closed < opened  # and not the other way round
    (tmp_path / "layout.json").write_text(json.dumps({**found, "rate_hz": 5.0}))
    assert next(read_episodes(folder, layout_file=tmp_path / "layout.json")).rate_hz == 5
    if name.startswith("bridge"):
        assert found["rate_hz"] is None and "rate_hz" in found["facts"]


def rewritten(
    shared: Path, folder: Path, change: Callable[..., tuple[np.ndarray, np.ndarray]]
) -> Path:
    """A copy of the real sample, whose states and actions, both [T, 7], are what `change` makes of them."""
    copy = copied(shared / "data" / "lerobot" / "v3.0_image", folder / "copy", None)
    (file,) = copy.glob("data/*/*.parquet")
    table, names = pq.read_table(file), ("observation.state", "action")
    for name, values in zip(
        names, change(*(np.array(table[n].to_pylist()) for n in names)), strict=True
    ):
        column = pa.array(list(values if values.dtype.kind == "i" else values.astype(np.float32)))
        table = table.set_column(table.column_names.index(name), name, column)
    pq.write_table(table, file)
    return copy


def test_one_nan_decides_nothing(shared: Path, tmp_path: Path) -> None:
    copy = rewritten(shared, tmp_path, lambda s, a: (np.where(s == s.flat[93], np.nan, s), a))
    found, expected = describe(copy), described(shared / "data" / "lerobot" / "v3.0_image")
    assert {**found, "facts": 0} == {**expected, "facts": 0}
    assert "NaN in 1 of" in inspect(copy) and " nan " not in inspect(copy)


def test_whole_numbers_are_measurements_too(shared: Path, tmp_path: Path) -> None:
    units = [1000] * 3 + [180 / np.pi] * 3 + [100]  # millimetres, degrees, an opening in per cent
    folder = rewritten(shared, tmp_path, lambda s, a: (np.rint(s * units).astype(int), a))
    found = describe(folder)
    assert (found["position"], found["length_unit"]) == ("observation/state[0:3]", "mm")
    layout, said = tmp_path / "layout.json", {**found, "rotation_format": "euler_xyz"}
    layout.write_text(json.dumps(said | {"angle_unit": "deg"}))
    assert len(list(read_episodes(folder, layout_file=layout))) == 8
    layout.write_text(json.dumps(said | {"angle_unit": "rad"}))
    refuses("angle_unit deg", next, read_episodes(folder, layout_file=layout))


def test_a_grippers_ends_are_no_part_of_a_quaternion(shared: Path, tmp_path: Path) -> None:
    small, last = np.array([1, 1, 1, 0.3, 0.3, 0.3, 1]), np.arange(7) == 6  # turns; the gripper
    copy = rewritten(
        shared, tmp_path, lambda s, a: (s * small, np.where(last, 2 * a.round() - 1, a * small))
    )
    found = describe(copy)
    assert (
        found["position"] == "observation/state[0:3]"
        and found["logged_translation"] == "action[0:3]"
    )


def test_six_numbers_are_an_orientation(shared: Path, tmp_path: Path) -> None:
    def wide(values: np.ndarray) -> np.ndarray:
        six = Rotation.from_euler("xyz", values[:, 3:6]).as_matrix()[:, :2].reshape(-1, 6)
        return np.concatenate([values[:, 6:], six, values[:, :3]], axis=1)

    copy = rewritten(shared, tmp_path, lambda s, a: (wide(s), wide(a)))
    found = describe(copy)
    assert (
        found["position"] == "observation/state[7:10]"
        and found["rotation"] == "observation/state[1:7]"
    )
    assert (
        found["rotation_format"] is None
        and "6d_rows or 6d_columns" in found["facts"]["rotation_format"]
    )
    for form, outcome in {"6d_rows": "undecided", "6d_columns": "contradiction"}.items():
        said = {
            **found,
            "rotation_format": form,
            "logged_rotation_format": form,
            "logged_frame": "base",
        }
        (copy / "spear.json").write_text(json.dumps(said))
        assert audit(copy).outcome == outcome


def test_a_whole_pose_is_an_orientation(shared: Path, tmp_path: Path) -> None:
    def pose(s: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        columns = np.tile(np.eye(4), (len(s), 1, 1))
        columns[:, :3, :3] = Rotation.from_euler("xyz", s[:, 3:6]).inv().as_matrix()
        columns[:, 3, :3] = s[:, :3]
        return np.concatenate([columns.reshape(-1, 16), s[:, 6:]], axis=1), a

    found = describe(rewritten(shared, tmp_path, pose))
    assert (
        found["position"] == "observation/state[12:15]"
        and found["rotation"] == "observation/state[0:16]"
    )
    assert found["rotation_format"] in (None, "matrix4_columns")


def test_columns_are_found_in_any_order_and_yaw_first_is_thought_of(
    shared: Path, tmp_path: Path
) -> None:
    def yaw_first(s: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        turns = Rotation.from_euler("xyz", s[:, 3:6])
        parts = (s, s[:, 3:6]), (a, (turns[[*range(1, len(s)), 0]] * turns.inv()).as_euler("xyz"))
        return tuple(np.concatenate([x[:, 6:], x[:, :3], r[:, ::-1]], axis=1) for x, r in parts)

    found = describe(rewritten(shared, tmp_path, yaw_first))
    assert (
        found["position"] == "observation/state[1:4]"
        and found["logged_translation"] == "action[1:4]"
    )
    assert (
        found["rotation"] == "observation/state[4:7]" and found["logged_rotation"] == "action[4:7]"
    )
    assert found["rotation_format"] is None and "euler_ZYX" in found["facts"]["rotation_format"]


def test_targets_do_not_tell_how_rotations_are_written(shared: Path, tmp_path: Path) -> None:
    copy = rewritten(shared, tmp_path, lambda s, a: (s, np.roll(s, -1, 0)))
    found = describe(copy)
    assert found["rotation_format"] is None and "euler_xyz or" in found["facts"]["rotation_format"]
    others = {"euler_xyz": "euler_ZYX", "rotation_vector": "euler_ZYX", "euler_ZYX": "euler_xyz"}
    for form, other in others.items():
        said = {**found, "rotation_format": form, "logged_rotation_format": form, "facts": {}}
        (copy / "spear.json").write_text(json.dumps(said))
        report = audit(copy)
        (told,) = [check.words for check in report.checks if check.name == "rotation_format"]
        assert report.outcome == "undecided" and other in told


def test_joints_are_no_pose_and_success_is_proposed(shared: Path, tmp_path: Path) -> None:
    copy = rewritten(shared, tmp_path, lambda s, a: (s, a))
    (file,) = copy.glob("data/*/*.parquet")
    table = pq.read_table(file)
    for name in ("observation.joint_position", "action.joint_position"):
        table = table.append_column(name, table["observation.state"])
    pq.write_table(table, file)
    taken = describe(copy)
    assert (taken["position"], taken["gripper"]) == (
        "observation/state[0:3]",
        "observation/state[6]",
    )
    pq.write_table(table.append_column("next.success", pa.array([True] * len(table))), file)
    names = [
        "shoulder_pan",
        "shoulder_lift",
        "elbow_flex",
        "wrist_flex",
        "wrist_roll",
        "gripper",
        "joint_6",
    ]
    features = lambda info: info["features"]["observation.state"]  # noqa: E731
    edit(copy / "meta/info.json", lambda info: features(info).update(names={"motors": names}))
    found = describe(copy)
    assert found["position"] is None and found["gripper"] == "observation/state[5]"
    assert found["success"] == "next/success" and "success" not in taken
    (copy / "spear.json").write_text(json.dumps(taken))
    refuses("shoulder_pan", lambda: next(read_episodes(copy)))


def test_the_command(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "describe", str(shared / "data" / "bridge_v2_sample")]) == 0
    said = capsys.readouterr()
    assert (
        json.loads(said.out)["facts"] and "1.0.0/spear.json is to be this" in said.err
    )  # where it is found
    copy = copied(shared / "data" / "lerobot" / "v3.0_image", tmp_path / "copy", None)
    layout = copy / "spear.json"  # not there before
    codes = [main(["data", "describe", str(copy), "--out", str(layout)]) for _ in range(2)]
    assert codes == [0, 2] and json.loads(layout.read_text())["facts"]
    assert f"{layout} is to be this" in capsys.readouterr().err
