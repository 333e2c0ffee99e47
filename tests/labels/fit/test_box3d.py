"""Oriented boxes: the order of vertices, fits to visible points, and comparisons of two boxes."""

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from labels_scenes import make_camera, make_yaw_rotation, sample_visible_sides
from spear.labels.fit.box3d import (
    VERTEX_SIGNS,
    compute_iou_3d,
    compute_keypoints,
    compute_vertex_error,
    fit_box,
    make_box,
    make_box_from_vertices,
    order_vertices,
)
from spear.types import Array, Box3D

seeds = st.integers(0, 2**32 - 1)


def make_random_box(rng: np.random.Generator) -> Box3D:
    """A box of random size and rotation, about 1 m in front of the camera."""
    rotation = Rotation.from_quat(rng.normal(size=4)).as_matrix()
    center = rng.normal((0, 0, 1), 0.1, 3)
    return make_box(center, rng.uniform(0.05, 0.3, 3), rotation)


def make_vertices_on_table(size: Array, yaw_rad: float, pitch: float = 40.0) -> Array:
    """The vertices of a level box whose center is the origin of the base frame.

    Args:
        size: [3] size of the box along its own axes, m.
        yaw_rad: Rotation of the box about the vertical.
        pitch: How far the camera looks down, in degrees.

    Returns:
        [8, 3] camera frame.
    """
    _, pose = make_camera(pitch=pitch)
    vertices_in_base = VERTEX_SIGNS * size / 2 @ make_yaw_rotation(yaw_rad).T
    return (vertices_in_base - pose[:3, 3]) @ pose[:3, :3]


@given(seeds)
def test_order_does_not_depend_on_the_order_given(seed: int) -> None:
    rng = np.random.default_rng(seed)
    box = make_random_box(rng)
    shuffled = box.vertices[rng.permutation(8)]
    ordered = order_vertices(box.vertices)

    np.testing.assert_array_equal(order_vertices(shuffled), ordered)
    np.testing.assert_array_equal(order_vertices(ordered), ordered)


@given(seeds)
def test_a_box_is_made_from_its_vertices_in_any_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    box = make_random_box(rng)

    box_again = make_box_from_vertices(box.vertices[rng.permutation(8)])

    np.testing.assert_allclose(box_again.vertices, box.vertices, atol=1e-5)
    np.testing.assert_allclose(box_again.size, box.size, atol=1e-5)
    assert np.linalg.det(box.rotation) == pytest.approx(1, abs=1e-5)


@given(seeds, st.floats(-35, 35), st.sampled_from([0, 90, 180, 270]), st.floats(0, 75))
def test_order_survives_noise_and_quarter_turns(
    seed: int, yaw_deg: float, quarter_turn_deg: int, pitch: float
) -> None:
    rng = np.random.default_rng(seed)
    size = rng.uniform(0.02, 0.2, 3)
    vertices = make_vertices_on_table(size, np.radians(yaw_deg + quarter_turn_deg), pitch)
    noisy = vertices + rng.uniform(-1, 1, (8, 3)) * 0.01 * size.min()

    ordered = order_vertices(noisy[rng.permutation(8)])

    # The noise is at most 2 mm (1 % of 0.2 m); a vertex in a wrong place is 20 mm off or more.
    np.testing.assert_allclose(ordered, order_vertices(vertices), atol=0.01)


@given(st.floats(-35, 35), st.floats(5, 75))
def test_top_near_left_comes_first(yaw_deg: float, pitch: float) -> None:
    """The order is near-left, near-right, far-right, far-left; the top first, then the bottom."""
    vertices = order_vertices(
        make_vertices_on_table(np.array([0.1, 0.2, 0.05]), np.radians(yaw_deg), pitch)
    )
    _, pose = make_camera(pitch=pitch)
    in_base = vertices @ pose[:3, :3].T + pose[:3, 3]

    top = in_base[:4, 2]
    bottom = in_base[4:, 2]
    assert top.min() > bottom.max()

    left = vertices[[0, 3, 4, 7], 0]
    right = vertices[[1, 2, 5, 6], 0]
    assert (left < right).all()

    # The camera looks along the base's x axis, so near and far differ along the box's x axis.
    box_x_axis = np.array([np.cos(np.radians(yaw_deg)), np.sin(np.radians(yaw_deg)), 0])
    along = in_base @ box_x_axis
    near = along[[0, 1, 4, 5]]
    far = along[[2, 3, 6, 7]]
    assert near.max() < far.min()


@given(seeds, st.sampled_from([0.0, 1e-8, -3e-8, 1e-7]), st.sampled_from([0.0, 1e-7, 3e-7]))
def test_iou_agrees_with_sampling_where_faces_lie_in_one_plane(
    seed: int, lift_m: float, tilt_rad: float
) -> None:
    """Two boxes stand on one table, so their bottoms lie in one plane up to float32's rounding.

    The second box is the first one, slid and turned on the table, and perhaps 1.3 times as tall.
    """
    rng = np.random.default_rng(seed)
    axes = Rotation.from_quat(rng.normal(size=4)).as_matrix()  # columns; the last one is up
    size = rng.uniform(0.02, 0.3, 3)
    a = make_box(rng.normal((0, 0, 1), 0.2), size, axes)
    yaw = axes[:, 2] * rng.uniform(0, 1.5)  # as a rotation vector
    turn = Rotation.from_rotvec(yaw + axes[:, 0] * tilt_rad).as_matrix()
    slide = axes[:, :2] @ rng.uniform(-0.3, 0.3, 2) * size.min()
    scale = np.array([1, 1, rng.choice([1, 1.3])])
    rise = (scale[2] - 1) * size[2] / 2 + lift_m
    b = make_box(a.center + slide + axes[:, 2] * rise, size * scale, turn @ axes)

    # The fraction of random points of `a` that are inside `b`
    points = a.center + (rng.uniform(-0.5, 0.5, (20_000, 3)) * a.size) @ a.rotation.T
    in_b = (points - b.center) @ b.rotation  # [n, 3] along the axes of `b`
    is_inside = (np.abs(in_b) <= b.size / 2 + 1e-6).all(axis=1)
    intersection = is_inside.mean() * np.prod(a.size)
    union = np.prod(a.size) + np.prod(b.size) - intersection

    assert compute_iou_3d(a, b) == pytest.approx(intersection / union, abs=0.015)


@pytest.mark.parametrize(
    ("shift", "shrink", "expected"),
    [
        (0, 1, 1),
        (0.5, 1, 1 / 3),  # half of each box is in the other: 0.5 / (1 + 1 - 0.5)
        (0, 2, 1 / 8),
        (1.01, 1, 0),
        (50, 1, 0),
    ],
)
@given(seeds)
def test_iou_of_a_box_with_itself_shifted_or_shrunk(
    shift: float, shrink: float, expected: float, seed: int
) -> None:
    """The shift is a fraction of the box's size along its first axis."""
    box = make_random_box(np.random.default_rng(seed))
    displacement = shift * box.size[0] * box.rotation[:, 0]
    changed_box = make_box(box.center + displacement, box.size / shrink, box.rotation)

    assert compute_iou_3d(box, changed_box) == pytest.approx(expected, 1e-4)


def test_iou_of_a_cube_with_itself_turned_by_45_degrees() -> None:
    cube = make_box(np.zeros(3), np.ones(3), np.eye(3))
    turned = make_box(np.zeros(3), np.ones(3), make_yaw_rotation(np.pi / 4))

    # Two unit squares, one turned by 45°, intersect in a regular octagon of this area.
    octagon_area = 2 * (np.sqrt(2) - 1)
    expected = octagon_area / (2 - octagon_area)
    assert compute_iou_3d(cube, turned) == pytest.approx(expected, 1e-5)


@given(seeds)
def test_vertex_error_ignores_a_relabeling_of_the_vertices(seed: int) -> None:
    box = make_random_box(np.random.default_rng(seed))
    relabeled_signs = VERTEX_SIGNS[:, [2, 0, 1]] * [1, -1, 1]  # permuted axes, one mirrored
    relabeled = box.center + (relabeled_signs * box.size / 2) @ box.rotation.T

    assert compute_vertex_error(relabeled, box.vertices) == pytest.approx(0, abs=1e-6)


@given(seeds)
def test_vertex_error_of_a_shifted_box_is_the_shift(seed: int) -> None:
    rng = np.random.default_rng(seed)
    box = make_random_box(rng)
    shift = rng.normal(size=3) * 1e-3  # small, so that no other symmetry is nearer

    error = compute_vertex_error(box.vertices + shift, box.vertices)

    assert error == pytest.approx(np.linalg.norm(shift), rel=1e-2)


@given(seeds, st.floats(0, np.pi))
@example(seed=33554431, yaw_rad=3.0)  # a face that is hardly seen
def test_upright_fit_reaches_the_support(seed: int, yaw_rad: float) -> None:
    """Of a standing box only the upper half is visible."""
    rng = np.random.default_rng(seed)
    true = make_box_from_vertices(make_vertices_on_table(rng.uniform(0.05, 0.2, 3), yaw_rad))
    up = -true.rotation[:, 1]  # the second axis of a box is down
    points = sample_visible_sides(true, rng, noise=0.0)
    support = (points @ up).min()
    upper_points = points[points @ up > support + 0.5 * true.size[1]]

    with_support = fit_box(upper_points, up, support_height=support)
    without_support = fit_box(upper_points, up)

    # Without the support, the box ends at the lowest visible point, at half the true height.
    assert compute_iou_3d(with_support, true) > 0.85
    assert compute_iou_3d(without_support, true) < 0.6


@pytest.mark.parametrize("radius", [0.02, 0.05])
def test_the_hidden_back_of_a_ball_is_part_of_its_box(radius: float) -> None:
    """A ball lies on a table; the camera sees the points whose normals face it."""
    _, pose = make_camera()
    up = pose[:3, :3].T @ [0, 0, 1]
    center = (np.array([0, 0, radius]) - pose[:3, 3]) @ pose[:3, :3]
    normals = np.random.default_rng(0).normal(size=(2000, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    points = center + radius * normals
    # The cosine between a point's normal and the line of sight is negative where the normal faces
    # the camera. Points that are seen from the side only are left out.
    rays = points / np.linalg.norm(points, axis=1, keepdims=True)
    cosines = np.einsum("ij,ij->i", normals, rays)
    visible_points = points[cosines < -0.3]

    box = fit_box(visible_points, up, support_height=up @ center - radius)

    np.testing.assert_allclose(box.size, 2 * radius, rtol=0.1)
    assert np.linalg.norm(box.center - center) < 0.15 * radius


@given(seeds)
def test_full_fit_finds_a_box_in_any_orientation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    true = make_random_box(rng)
    # The camera does not look along any of the box's faces.
    assume(np.abs(true.center @ true.rotation).min() > 0.1)
    local_points = rng.uniform(-0.5, 0.5, (3000, 3)) * true.size  # everywhere in the box
    points = true.center + local_points @ true.rotation.T

    box = fit_box(points)

    assert compute_iou_3d(box, true) > 0.7


@pytest.mark.parametrize("num_points", [1, 2, 3])
@pytest.mark.parametrize(
    ("up", "support"),
    [(None, None), (np.array([0, -1.0, 0]), 0.0)],  # a free box, a box on a support
)
def test_a_box_around_very_few_points_is_finite(
    num_points: int, up: Array | None, support: float | None
) -> None:
    points = np.random.default_rng(0).normal((0, 0, 3), size=(num_points, 3))

    box = fit_box(points, up, support)

    assert np.isfinite(box.vertices).all()
    assert (box.size > 0).all()


def test_keypoints_are_the_extremes() -> None:
    """The keypoints are extreme in their distance from the camera, not in their depth z."""
    points = np.array(
        [
            [0, 0, 1.2],  # closest: distance 1.2
            [1.5, 0, 1.8],  # furthest: distance 2.34
            [0.9, 0, 1.0],  # smallest depth
            [0, 0, 2.0],  # largest depth
            [0, 0.5, 1.5],
        ]
    )
    box = fit_box(points)

    keypoints = compute_keypoints(points, box)

    np.testing.assert_allclose(keypoints["closest"], points[0], rtol=1e-6)
    np.testing.assert_allclose(keypoints["furthest"], points[1], rtol=1e-6)
    np.testing.assert_allclose(keypoints["centre"], box.vertices.mean(0), atol=1e-6)
