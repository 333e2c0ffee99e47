"""The registry of datasets: complete where it says so, marked where it is not, and refused in words."""

import dataclasses
import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from refusals import refuses
from spear.audit.hypotheses import TESTED_FORMATS
from spear.data.readers.build_episode import build_episode, read_pose
from spear.data.readers.columns import read_column
from spear.data.readers.dataset_layout import (
    ANGLE_FORMATS,
    RECORDED_ONLY,
    REGISTRY,
    DatasetLayout,
    RotationFormat,
    find_layout,
    find_missing_fields,
    read_layout_file,
)
from spear.data.readers.rotation_formats import ROTATION_FORMATS, to_quaternion
from spear.embodiments.kinematics import franka_pose
from spear.util.images import encode_jpeg

MIXTURE = {name: spec for name, spec in REGISTRY.items() if spec.weight is not None}
TURN = Rotation.from_euler("xyz", [[0.1 * k, 0.2, -0.1 * k] for k in range(4)])
WHERE = np.array([[0.3 + 0.001 * k, 0.1, 0.2] for k in range(4)])
JOINTS = np.array([[0.1 * k, -0.5, 0.2, -2.2, 0.1, 1.8, 0.7] for k in range(4)])
"""Four poses (m, base frame), and others as the joint angles of a Franka (rad)."""

WRITTEN = {
    "euler_xyz": lambda r: r.as_euler("xyz"),
    "euler_ZYX": lambda r: r.as_euler("ZYX"),
    "euler_XYZ": lambda r: r.as_euler("XYZ"),
    "euler_zxy": lambda r: r.as_euler("zxy"),
    "rotation_vector": lambda r: r.as_rotvec(),
    "quat_wxyz": lambda r: r.as_quat(scalar_first=True),
    "quat_xyzw": lambda r: r.as_quat(),
    "6d_columns": lambda r: r.as_matrix()[:, :, :2].transpose(0, 2, 1).reshape(-1, 6),
    "6d_rows": lambda r: r.as_matrix()[:, :2].reshape(-1, 6),
    "matrix4_columns": lambda r: _poses(r).transpose(0, 2, 1).reshape(-1, 16),
    "matrix4_rows": lambda r: _poses(r).reshape(-1, 16),
}
"""Every format but joint angles, as SciPy writes it (capitals: moving axes)."""


def _poses(turn: Rotation) -> np.ndarray:
    poses = np.tile(np.eye(4), (len(turn), 1, 1))
    poses[:, :3, :3], poses[:, :3, 3] = turn.as_matrix(), [0.3, 0.1, 0.2]
    return poses


def test_the_mixture_is_the_papers_where_that_is_known() -> None:
    assert len(MIXTURE) == 24
    known = {"droid": 35.0, "bridge_dataset": 18.0, "fractal20220817_data": 12.0, "kuka": 4.0}
    assert {name: REGISTRY[name].weight for name in known} == known
    assert {name for name, spec in MIXTURE.items() if spec.success} == {"bc_z", "droid", "kuka"}
    assert sum(spec.weight or 0 for spec in MIXTURE.values()) == pytest.approx(100, abs=0.05)
    for name, spec in MIXTURE.items():
        assert spec.facts["weight"].startswith("the paper: " if name in known else "ours: "), name


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_everything_has_a_source_or_is_said_not_to_be_known(name: str) -> None:
    spec = REGISTRY[name]
    assert spec.robot and spec.rate_hz and spec.images and spec.instruction
    assert "external" in spec.images and all(len(fact) > 5 for fact in spec.facts.values())
    unknown = find_missing_fields(spec)
    if unknown:
        refuses(f"'{name}': {unknown[0]}", find_layout, name, Path("nowhere"))
        assert set(unknown) & set(spec.facts), f"{name}: say why {unknown} is not known"


@pytest.mark.parametrize(
    "name", sorted(n for n, s in REGISTRY.items() if not find_missing_fields(s))
)
def test_each_readable_layout_reads_a_plausible_episode(name: str) -> None:
    """Columns exactly where the layout says, filled with one known motion, give that motion back."""
    spec = REGISTRY[name]
    position, rotation, layout, gripper = (
        spec.position,
        spec.rotation,
        spec.rotation_format,
        spec.gripper,
    )
    closed, opened = spec.gripper_range
    same = spec.command == gripper  # nothing was measured
    where, turn, joints = WHERE, TURN, layout == "franka_joints"
    if joints:
        where, quaternions = franka_pose(JOINTS)
        turn = Rotation.from_quat(quaternions, scalar_first=True)
    steps: dict[str, object] = {}

    def put(path: str, values: np.ndarray) -> None:
        name_of, _, span = path.rstrip("]").partition("[")
        first, _, end = span.partition(":")
        start = int(first or 0)
        steps.setdefault(name_of, np.zeros((4, 40)))[
            :, start : int(end or start + values.shape[1])
        ] = values
        if not span:
            steps[name_of] = values

    put(rotation, JOINTS if joints else WRITTEN[layout](turn))
    put(position, JOINTS if joints else where)
    put(
        gripper, closed + np.array([[1.0], [0.0]] * 2 if same else 4 * [[0.75]]) * (opened - closed)
    )
    if spec.command is not None:
        put(spec.command, np.array([[spec.command_range[1]], [spec.command_range[0]]] * 2))
    for path in spec.images.values():
        steps[path] = [encode_jpeg(np.zeros((8, 8, 3), np.uint8))] * 4
    steps[spec.instruction] = [b"do it"] * 4
    if spec.success is not None:
        steps[spec.success] = np.zeros(4, bool)
    episode = build_episode(steps, spec, name)
    np.testing.assert_allclose(episode.position, where, atol=1e-6)
    assert episode.success is (None if spec.success is None else False)
    tool = Rotation.from_quat(spec.tool_rotation, scalar_first=True)
    got = Rotation.from_quat(episode.rotation, scalar_first=True)
    assert ((turn * tool).inv() * got).magnitude().max() < 1e-5
    np.testing.assert_allclose(episode.gripper, [1, 1, 0, 1] if same else 4 * [0.75], atol=1e-6)
    if spec.command is not None:
        for way in (spec, dataclasses.replace(spec, command=None))[: 1 + same]:
            np.testing.assert_array_equal(
                build_episode(steps, way, name).action[:, 7], [1, 0, 1, 0]
            )


def test_a_pose_written_row_after_row_is_refused() -> None:
    columns, rows = (WRITTEN[f"matrix4_{way}"](Rotation.identity(1)) for way in ("columns", "rows"))
    np.testing.assert_allclose(to_quaternion(columns, "matrix4_columns")[0, 0], 1)
    refuses(r"mine step 0: .* matrix4_columns", to_quaternion, rows, "matrix4_columns", "mine")
    refuses(r"mine step 0: .* matrix4_rows", to_quaternion, columns, "matrix4_rows", "mine")
    refuses(r"mine step 0: .* 6d_rows", to_quaternion, np.eye(2, 6), "6d_rows", "mine")
    refuses(
        r"mine: rotation is \(1, 4\).*euler_xyz",
        to_quaternion,
        np.zeros((1, 4)),
        "euler_xyz",
        "mine",
    )
    refuses(r"mine: joint angles are \(2, 6\)", franka_pose, np.zeros((2, 6)), "mine")
    refuses(r"45 .* mine: radians", franka_pose, np.full((2, 7), 45.0), "mine")


def test_what_the_audit_may_find_a_layout_can_say() -> None:
    named = {name for part in get_args(RotationFormat) for name in get_args(part)}
    assert named == set(WRITTEN) | {"franka_joints"} and set(ROTATION_FORMATS) == set(WRITTEN)
    assert set(TESTED_FORMATS) == set(WRITTEN) - {"euler_zxy"}
    angle_formats = {form for form in TESTED_FORMATS if ROTATION_FORMATS[form][0] == 3}
    assert angle_formats == set(ANGLE_FORMATS) - set(RECORDED_ONLY)


@pytest.mark.parametrize("layout", WRITTEN)
def test_every_way_to_write_an_orientation_gives_it_back(layout: RotationFormat) -> None:
    turn = Rotation.random(50, random_state=0)
    got = Rotation.from_quat(to_quaternion(WRITTEN[layout](turn), layout), scalar_first=True)
    assert (turn.inv() * got).magnitude().max() < 1e-6


@pytest.mark.parametrize("layout", [*WRITTEN, "franka_joints"])
def test_millimetres_and_degrees_are_what_the_layout_says(layout: RotationFormat) -> None:
    """The same poses in other units, where a format has any; joint angles have no length."""
    joints = layout == "franka_joints"
    numbers = JOINTS if joints else WRITTEN[layout](TURN)
    spec = DatasetLayout("mine", position="at", rotation="turn", rotation_format=layout)
    first = read_pose({"at": JOINTS if joints else WHERE, "turn": numbers}, spec, "mine")
    other = dataclasses.replace(spec, length_unit="mm", angle_unit="deg")
    degrees = np.degrees(numbers) if layout in ANGLE_FORMATS else numbers
    steps = {"at": degrees if joints else 1000 * WHERE, "turn": degrees}
    for one, same in zip(first[:2], read_pose(steps, other, "mine")[:2], strict=True):
        np.testing.assert_allclose(same, one, atol=1e-12)


def test_keys_of_a_layout_that_would_change_nothing_are_refused(tmp_path: Path) -> None:
    layout = tmp_path / "layout.json"
    for key, value in (("weight", 9.0), ("image_aspect", {"externl": 1.5})):
        layout.write_text(json.dumps({"like": "bridge_dataset", key: value}))
        refuses(rf"{key}.*external|{key}'.*images", find_layout, "mine", tmp_path, layout)
    layout.write_text(
        json.dumps({"like": "bridge_dataset", "gripper": "mine[6]", "command_range": [1, 0]})
    )
    refuses("command_range", read_layout_file, layout, "mine")
    layout.write_text(json.dumps({"like": "taco_play", "action": "act"}))
    assert (
        read_layout_file(layout, "mine").tool_rotation
        == (1, 0, 0, 0)
        != REGISTRY["taco_play"].tool_rotation
    )
    for named, key, value in (
        ({}, "action_mask", "valid"),
        ({"action": "act"}, "tool_rotation", [0.0, 1.0, 0.0, 0.0]),  # would turn the states alone
        ({"action": "act"}, "drop_idle", True),
    ):
        layout.write_text(json.dumps({"like": "fractal20220817_data", **named, key: value}))
        refuses(f"{key}.*action", read_layout_file, layout, "mine")


def test_names_with_slashes_in_them_are_found() -> None:
    inner = {"present/xyz": np.arange(6.0).reshape(2, 3)}
    steps = {"observation": inner, "observation/state": np.ones((2, 4))}
    np.testing.assert_array_equal(
        read_column(steps, "observation/present/xyz[0:2]", "x"), [[0, 1], [3, 4]]
    )
    np.testing.assert_array_equal(read_column(steps, "observation/state[3]", "x"), [1, 1])
    refuses(
        r"no 'present' \(there is: present/xyz\)",
        read_column,
        steps,
        "observation/present/abc",
        "x",
    )
