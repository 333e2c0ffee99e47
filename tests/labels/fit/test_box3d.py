import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from labels_scenes import make_camera, make_yaw_rotation, sample_visible_sides
from spear.labels.fit.box3d import (
    VERTEX_SIGNS,
    compute_iou_3d,
    compute_vertex_error,
    find_keypoints,
    fit_box,
    make_box,
    make_box_from_vertices,
    order_vertices,
)
from spear.types import Array, Box3D

seeds = st.integers(0, 2**32 - 1)


def random_box(rng: np.random.Generator, spread: float = 0.1) -> Box3D:
    turn = Rotation.from_quat(rng.normal(size=4)).as_matrix()
    return make_box(rng.normal((0, 0, 1), spread, 3), rng.uniform(0.05, 0.3, 3), turn)


def on_table(size: Array, yaw: float, pitch: float = 40.0) -> Array:
    """Vertices, camera frame, of a box that stands at the origin of the base, turned by yaw."""
    _, pose = make_camera(pitch=pitch)
    return (VERTEX_SIGNS * size / 2 @ make_yaw_rotation(yaw).T - pose[:3, 3]) @ pose[:3, :3]


@given(seeds)
def test_order_does_not_depend_on_the_order_given(seed: int) -> None:
    rng = np.random.default_rng(seed)
    box = random_box(rng)
    shuffled = box.vertices[rng.permutation(8)]
    ordered = order_vertices(box.vertices)

    np.testing.assert_array_equal(order_vertices(shuffled), ordered)
    np.testing.assert_array_equal(order_vertices(ordered), ordered)


@given(seeds)
def test_a_box_is_made_from_its_vertices_in_any_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    box = random_box(rng)

    box_again = make_box_from_vertices(box.vertices[rng.permutation(8)])

    np.testing.assert_allclose(box_again.vertices, box.vertices, atol=1e-5)
    np.testing.assert_allclose(box_again.size, box.size, atol=1e-5)
    assert np.linalg.det(box.rotation) == pytest.approx(1, abs=1e-5)


@given(seeds, st.floats(-35, 35), st.sampled_from([0, 90, 180, 270]), st.floats(0, 75))
def test_order_survives_noise_and_quarter_turns(
    seed: int, yaw: float, quarter: int, pitch: float
) -> None:
    rng = np.random.default_rng(seed)
    size = rng.uniform(0.02, 0.2, 3)
    vertices = on_table(size, np.radians(yaw + quarter), pitch)
    noisy = vertices + rng.uniform(-1, 1, (8, 3)) * 0.01 * size.min()
    np.testing.assert_allclose(
        order_vertices(noisy[rng.permutation(8)]), order_vertices(vertices), atol=0.01
    )


@given(st.floats(-35, 35), st.floats(5, 75))
def test_top_near_left_comes_first(yaw: float, pitch: float) -> None:
    v = order_vertices(on_table(np.array([0.1, 0.2, 0.05]), np.radians(yaw), pitch))
    _, pose = make_camera(pitch=pitch)
    base = v @ pose[:3, :3].T + pose[:3, 3]
    assert base[:4, 2].min() > base[4:, 2].max()
    assert (v[[0, 3, 4, 7], 0] < v[[1, 2, 5, 6], 0]).all()
    facing = np.radians(yaw)  # the camera looks along +x
    along = base @ np.array([np.cos(facing), np.sin(facing), 0])
    assert along[[0, 1, 4, 5]].max() < along[[2, 3, 6, 7]].min()


@given(seeds, st.sampled_from([0.0, 1e-8, -3e-8, 1e-7]), st.sampled_from([0.0, 1e-7, 3e-7]))
def test_iou_agrees_with_sampling_where_faces_lie_in_one_plane(
    seed: int, lift: float, tilt: float
) -> None:
    """Two boxes on one table, up to float32."""
    rng = np.random.default_rng(seed)
    turn = Rotation.from_quat(rng.normal(size=4)).as_matrix()
    size = rng.uniform(0.02, 0.3, 3)
    a = make_box(rng.normal((0, 0, 1), 0.2), size, turn)
    yaw = Rotation.from_rotvec(turn[:, 2] * rng.uniform(0, 1.5) + turn[:, 0] * tilt).as_matrix()
    slide = turn[:, :2] @ rng.uniform(-0.3, 0.3, 2) * size.min()
    taller = np.array([1, 1, rng.choice([1, 1.3])])
    rise = (taller[2] - 1) * size[2] / 2 + lift
    b = make_box(a.center + slide + turn[:, 2] * rise, size * taller, yaw @ turn)
    points = a.center + (rng.uniform(-0.5, 0.5, (20_000, 3)) * a.size) @ a.rotation.T
    inside = (np.abs((points - b.center) @ b.rotation) <= b.size / 2 + 1e-6).all(axis=1).mean()
    intersection = inside * np.prod(a.size)
    union = np.prod(a.size) + np.prod(b.size) - intersection
    assert compute_iou_3d(a, b) == pytest.approx(intersection / union, abs=0.015)


@pytest.mark.parametrize(
    ("shift", "shrink", "expected"),
    [(0, 1, 1), (0.5, 1, 1 / 3), (0, 2, 1 / 8), (1.01, 1, 0), (50, 1, 0)],
)
@given(seeds)
def test_iou_of_a_box_with_itself_shifted_or_shrunk(
    shift: float, shrink: float, expected: float, seed: int
) -> None:
    box = random_box(np.random.default_rng(seed))
    along = shift * box.size[0] * box.rotation[:, 0]
    changed_box = make_box(box.center + along, box.size / shrink, box.rotation)

    assert compute_iou_3d(box, changed_box) == pytest.approx(expected, 1e-4)


def test_iou_of_a_cube_with_itself_turned_by_45_degrees() -> None:
    cube = make_box(np.zeros(3), np.ones(3), np.eye(3))
    intersection = 2 * (np.sqrt(2) - 1)
    turned = make_box(np.zeros(3), np.ones(3), make_yaw_rotation(np.pi / 4))
    assert compute_iou_3d(cube, turned) == pytest.approx(intersection / (2 - intersection), 1e-5)


@given(seeds)
def test_vertex_error_ignores_a_relabeling_of_the_vertices(seed: int) -> None:
    box = random_box(np.random.default_rng(seed))
    relabeled_signs = VERTEX_SIGNS[:, [2, 0, 1]] * [1, -1, 1]
    relabeled = box.center + (relabeled_signs * box.size / 2) @ box.rotation.T

    assert compute_vertex_error(relabeled, box.vertices) == pytest.approx(0, abs=1e-6)


@given(seeds)
def test_vertex_error_of_a_shifted_box_is_the_shift(seed: int) -> None:
    rng = np.random.default_rng(seed)
    box = random_box(rng)
    shift = rng.normal(size=3) * 1e-3

    assert compute_vertex_error(box.vertices + shift, box.vertices) == pytest.approx(
        np.linalg.norm(shift), rel=1e-2
    )


@given(seeds, st.floats(0, np.pi))
@example(seed=33554431, yaw=3.0)  # a face that is hardly seen
def test_upright_fit_reaches_the_support(seed: int, yaw: float) -> None:
    rng = np.random.default_rng(seed)
    true = make_box_from_vertices(on_table(rng.uniform(0.05, 0.2, 3), yaw))
    up = -true.rotation[:, 1]
    points = sample_visible_sides(true, rng, 0.0)
    height = (points @ up).min()
    upper = points[points @ up > height + 0.5 * true.size[1]]  # the lower half is hidden

    assert compute_iou_3d(fit_box(upper, up, support=height), true) > 0.85
    assert compute_iou_3d(fit_box(upper, up), true) < 0.6


@pytest.mark.parametrize("radius", [0.02, 0.05])
def test_the_hidden_back_of_a_ball_is_part_of_its_box(radius: float) -> None:
    _, pose = make_camera()
    up = pose[:3, :3].T @ [0, 0, 1]
    center = (np.array([0, 0, radius]) - pose[:3, 3]) @ pose[:3, :3]
    normals = np.random.default_rng(0).normal(size=(2000, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    points = center + radius * normals
    facing = np.einsum("ij,ij->i", normals, points)
    visible_points = points[facing < -0.3 * np.linalg.norm(points, axis=1)]

    box = fit_box(visible_points, up, support=up @ center - radius)
    np.testing.assert_allclose(box.size, 2 * radius, rtol=0.1)
    assert np.linalg.norm(box.center - center) < 0.15 * radius


@given(seeds)
def test_full_fit_finds_a_box_in_any_orientation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    true = random_box(rng)
    assume(np.abs(true.center @ true.rotation).min() > 0.1)
    solid = true.center + (rng.uniform(-0.5, 0.5, (3000, 3)) * true.size) @ true.rotation.T
    assert compute_iou_3d(fit_box(solid), true) > 0.7


@pytest.mark.parametrize("num_points", [1, 2, 3])
@pytest.mark.parametrize(("up", "support"), [(None, None), (np.array([0, -1.0, 0]), 0.0)])
def test_a_box_around_very_few_points_is_finite(
    num_points: int, up: Array | None, support: float | None
) -> None:
    points = np.random.default_rng(0).normal((0, 0, 3), size=(num_points, 3))

    box = fit_box(points, up, support)

    assert np.isfinite(box.vertices).all()
    assert (box.size > 0).all()


def test_keypoints_are_the_extremes() -> None:
    """In their distance from the camera, which is not their depth."""
    points = np.array([[0, 0, 1.2], [1.5, 0, 1.8], [0.9, 0, 1.0], [0, 0, 2.0], [0, 0.5, 1.5]])
    box = fit_box(points)

    keypoints = find_keypoints(points, box)

    np.testing.assert_allclose(keypoints["closest"], points[0], rtol=1e-6)
    np.testing.assert_allclose(keypoints["furthest"], points[1], rtol=1e-6)
    np.testing.assert_allclose(keypoints["centre"], box.vertices.mean(0), atol=1e-6)
