"""`to_quaternion` reads every format of orientations, as SciPy writes it."""

from typing import get_args

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from refusals import refuses
from rotation_writers import ROTATION_WRITERS
from spear.audit.hypotheses import TESTED_FORMATS
from spear.data.readers.dataset_layout import ANGLE_FORMATS, RECORDED_ONLY, RotationFormat
from spear.data.readers.rotation_formats import ROTATION_FORMATS, to_quaternion
from spear.embodiments.kinematics import compute_franka_ee_poses


@pytest.mark.parametrize("rotation_format", ROTATION_WRITERS)
def test_every_format_gives_the_orientation_back(rotation_format: RotationFormat) -> None:
    rotation = Rotation.random(50, random_state=0)
    values = ROTATION_WRITERS[rotation_format](rotation)

    quaternion = to_quaternion(values, rotation_format)  # [50, 4]

    difference = rotation.inv() * Rotation.from_quat(quaternion, scalar_first=True)
    assert difference.magnitude().max() < 1e-6


def test_a_layout_can_name_every_format() -> None:
    named_formats: set[str] = set()
    for literal in get_args(RotationFormat):
        named_formats.update(get_args(literal))

    assert named_formats == {*ROTATION_WRITERS, "franka_joints", "urdf_joints"}
    assert set(ROTATION_FORMATS) == set(ROTATION_WRITERS)


def test_a_layout_can_name_what_the_audit_may_find() -> None:
    """The audit tests all formats but euler_zxy and joint angles (see `RECORDED_ONLY`)."""
    tested_angles = {name for name in TESTED_FORMATS if ROTATION_FORMATS[name].num_components == 3}

    assert set(TESTED_FORMATS) == set(ROTATION_WRITERS) - {"euler_zxy"}
    assert tested_angles == set(ANGLE_FORMATS) - set(RECORDED_ONLY)


# A pose of a writer has a position, so its transpose is no pose.
IDENTITY_BY_COLUMNS = ROTATION_WRITERS["matrix4_columns"](Rotation.identity(1))
IDENTITY_BY_ROWS = ROTATION_WRITERS["matrix4_rows"](Rotation.identity(1))


def test_a_pose_is_read_column_by_column() -> None:
    quaternion = to_quaternion(IDENTITY_BY_COLUMNS, "matrix4_columns")

    np.testing.assert_allclose(quaternion[0, 0], 1)  # w of the identity


@pytest.mark.parametrize(
    ("values", "rotation_format"),
    [
        (IDENTITY_BY_ROWS, "matrix4_columns"),
        (IDENTITY_BY_COLUMNS, "matrix4_rows"),
        (np.eye(2, 6), "6d_rows"),  # the second row of the matrix is 0
    ],
)
def test_numbers_that_are_no_rotation_are_refused(
    values: np.ndarray, rotation_format: RotationFormat
) -> None:
    message = rf"mine at step 0 .* {rotation_format}"
    refuses(message, to_quaternion, values, rotation_format, "mine")


def test_another_number_of_components_is_refused() -> None:
    message = r"mine has the shape \(1, 4\).*euler_xyz"
    refuses(message, to_quaternion, np.zeros((1, 4)), "euler_xyz", "mine")


def test_another_number_of_joints_is_refused() -> None:
    refuses(
        r"joint angles of mine have the shape \(2, 6\)",
        compute_franka_ee_poses,
        np.zeros((2, 6)),
        "mine",
    )


def test_joint_angles_in_degrees_are_refused() -> None:
    refuses(r"joint angle of mine is 45", compute_franka_ee_poses, np.full((2, 7), 45.0), "mine")
