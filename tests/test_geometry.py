"""Rotations and poses agree with SciPy, also at every singular rotation, and so do gradients with
finite differences."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.spatial.transform import Rotation, Slerp
from torch import Tensor

from refusals import refuses
from spear import geometry as geo

# Special rotations: the identity (angle 0), half turns (π), the identity's antipode (2π, which is
# the quaternion -1), and their neighborhoods. 1 rad is an ordinary angle.
TINY_RAD = [0.0, 1e-12, 1e-8, 1e-5, 1e-3]
ANGLES_RAD = [
    *TINY_RAD,
    1.0,
    *(math.pi - tiny for tiny in TINY_RAD),
    *(2 * math.pi - tiny for tiny in TINY_RAD),
]
AXES = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0], [0.6, -0.8, 0], [0.48, 0.6, -0.64]]


def draw_quats(n: int = 500, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draw rotations from the uniform distribution, [N, 4]."""
    generator = torch.Generator().manual_seed(seed)
    return geo.quat_normalize(torch.randn(n, 4, generator=generator, dtype=dtype))


def draw_vectors(n: int, seed: int) -> Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_special_quats(dtype: torch.dtype = torch.float64) -> Tensor:
    """All angles of `ANGLES_RAD` about all `AXES`, and 16 products of quarter turns, [N, 4]."""
    angles = torch.tensor(ANGLES_RAD, dtype=dtype)[:, None, None]  # [angles, 1, 1]
    rotation_vectors = angles * torch.tensor(AXES, dtype=dtype)  # [angles, axes, 3]
    # (±½, ±½, ±½, ±½) with all signs: their matrices have exact 0 and ±1, and some are in gimbal
    # lock.
    quarter_turns = torch.cartesian_prod(*[torch.tensor([0.5, -0.5], dtype=dtype)] * 4)
    return torch.cat([geo.quat_exp(rotation_vectors.reshape(-1, 3)), quarter_turns])


def to_scipy(q: Tensor) -> Rotation:
    return Rotation.from_quat(q.numpy(), scalar_first=True)


def assert_close(actual: Tensor, expected: Any, atol: float = 1e-12) -> None:
    torch.testing.assert_close(
        actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=atol
    )


# Quaternions


def test_product_agrees_with_scipy() -> None:
    a = draw_quats(seed=1)
    b = draw_quats(seed=2)

    product = geo.quat_canonical(geo.quat_multiply(a, b))

    expected = (to_scipy(a) * to_scipy(b)).as_quat(canonical=True, scalar_first=True)
    assert_close(product, expected)


def test_conjugate_is_the_inverse() -> None:
    q = draw_quats(seed=1)

    assert_close(geo.quat_multiply(q, geo.quat_conjugate(q)), [[1, 0, 0, 0]] * len(q))


def test_rotating_vectors_agrees_with_scipy() -> None:
    q = draw_quats(seed=1)
    v = draw_vectors(len(q), seed=3)

    assert_close(geo.quat_rotate(q, v), to_scipy(q).apply(v.numpy()))


def test_one_rotation_broadcasts_over_many_vectors() -> None:
    q = draw_quats(1)[0]
    v = draw_vectors(500, seed=3)

    assert_close(geo.quat_rotate(q, v), to_scipy(q).apply(v.numpy()))


def test_log_agrees_with_scipy_everywhere() -> None:
    q = torch.cat([draw_quats(), make_special_quats()])

    log = geo.quat_log(q)

    expected = torch.from_numpy(to_scipy(q).as_rotvec())
    assert_close(log.norm(dim=-1), expected.norm(dim=-1), atol=1e-11)
    assert float(log.norm(dim=-1).max()) <= math.pi + 1e-12
    # At a half turn both directions of the axis give the same rotation, and SciPy may choose the
    # other one.
    is_unambiguous = expected.norm(dim=-1) < math.pi - 1e-7
    assert_close(log[is_unambiguous], expected[is_unambiguous], atol=1e-11)


def test_exp_is_the_inverse_of_log_everywhere() -> None:
    q = torch.cat([draw_quats(), make_special_quats()])

    distance_rad = geo.quat_distance(geo.quat_exp(geo.quat_log(q)), q)

    assert_close(distance_rad, torch.zeros(len(q)), atol=1e-11)


def test_exp_of_scipys_rotation_vectors_gives_the_same_rotations() -> None:
    q = torch.cat([draw_quats(), make_special_quats()])
    rotation_vectors = torch.from_numpy(to_scipy(q).as_rotvec())

    distance_rad = geo.quat_distance(geo.quat_exp(rotation_vectors), q)

    assert_close(distance_rad, torch.zeros(len(q)), atol=1e-11)


# The series of exp and log change to quotients at 0.02 rad, where the squared half angle is 1e-4.
@pytest.mark.parametrize("size_rad", [1e-12, 1e-8, 1e-6, 1e-4, 0.0099, 0.0101, 0.02, 0.1, 0.5])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_small_rotations_keep_their_relative_precision(
    dtype: torch.dtype, rtol: float, size_rad: float
) -> None:
    vector = torch.tensor([0.6, -0.48, 0.64], dtype=dtype) * size_rad

    torch.testing.assert_close(geo.quat_log(geo.quat_exp(vector)), vector, rtol=rtol, atol=0)


def test_canonical_is_the_same_for_both_signs() -> None:
    on_the_equator = torch.tensor([[0, 0, -0.6, 0.8]]).double()  # w = 0
    q = torch.cat([draw_quats(), torch.eye(4, dtype=torch.float64), on_the_equator])

    canonical = geo.quat_canonical(q)

    assert_close(canonical, geo.quat_canonical(-q), atol=0)
    assert bool((canonical[:, 0] >= 0).all())


@pytest.mark.parametrize(
    ("q", "expected"),
    [
        ([0.0, -0.6, 0.8, 0], [0, 0.6, -0.8, 0]),
        ([-0.0, 0, 0, -1], [0, 0, 0, 1]),
        ([0.1, -0.9, -0.3, -0.3], [0.1, -0.9, -0.3, -0.3]),
    ],
    ids=["x decides", "z decides", "w decides"],
)
def test_the_first_nonzero_component_of_a_canonical_quaternion_is_positive(
    q: list[float], expected: list[float]
) -> None:
    assert_close(geo.quat_canonical(torch.tensor(q)), expected, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "angle_rad", [0, 1e-6, 1e-3, 1, 3, math.pi - 1e-3, math.pi - 1e-6, math.pi]
)
def test_distance_is_accurate_at_both_ends(dtype: torch.dtype, sign: int, angle_rad: float) -> None:
    """The ends are the distances 0 and π, where an arc cosine loses half of the digits."""
    axis = torch.tensor([0.6, -0.48, 0.64], dtype=torch.float64)
    q = draw_quats(1)[0]
    rotated = geo.quat_multiply(q, geo.quat_exp(axis * angle_rad))

    distance_rad = float(geo.quat_distance(q.to(dtype), sign * rotated.to(dtype)))

    max_error_rad = 8 * torch.finfo(dtype).eps  # a few rounding errors
    assert abs(distance_rad - angle_rad) < max_error_rad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_signs_of_a_quaternion_are_at_distance_0(dtype: torch.dtype) -> None:
    q = draw_quats(1)[0].to(dtype)

    assert float(geo.quat_distance(q, -q)) == 0


def test_slerp_agrees_with_scipy() -> None:
    a = draw_quats(50, seed=4)
    b = draw_quats(50, seed=5)
    t = torch.linspace(0, 1, 7, dtype=torch.float64)

    slerped = geo.quat_slerp(a[:, None], b[:, None], t)  # [50, 7, 4]

    for i in range(len(a)):
        scipy_slerp = Slerp([0, 1], Rotation.concatenate([to_scipy(a[i]), to_scipy(b[i])]))
        expected = scipy_slerp(t.numpy()).as_quat(canonical=True, scalar_first=True)
        assert_close(geo.quat_canonical(slerped[i]), expected)


def test_slerp_goes_half_the_distance_in_half_the_time() -> None:
    a = draw_quats(50, seed=4)
    b = draw_quats(50, seed=5)

    halfway = geo.quat_slerp(a, b, 0.5)

    assert_close(geo.quat_distance(a, halfway) * 2, geo.quat_distance(a, b))


def test_slerp_takes_the_short_way_whatever_the_signs() -> None:
    a = draw_quats(50, seed=4)
    b = draw_quats(50, seed=5)

    to_itself = geo.quat_distance(a, geo.quat_slerp(a, -a, 0.3))
    between_signs = geo.quat_distance(geo.quat_slerp(a, -b, 0.3), geo.quat_slerp(a, b, 0.3))

    assert_close(to_itself, torch.zeros(50))
    assert_close(between_signs, torch.zeros(50))


def test_unit_quaternions_within_tolerance_are_normalized() -> None:
    """The tolerance of the norm is 0.001."""
    q = draw_quats(4)

    assert_close(geo.validate_unit_quat(q * 1.0009, "state"), geo.quat_canonical(q))


@pytest.mark.parametrize("scale", [1.002, 0, math.nan])
def test_quaternions_that_are_not_unit_are_refused(scale: float) -> None:
    q = draw_quats(4) * scale

    refuses(r"observation/state.*\(w, x, y, z\)", geo.validate_unit_quat, q, "observation/state")


# Matrices, Euler angles, 6D


def test_matrices_agree_with_scipy_everywhere() -> None:
    q = torch.cat([draw_quats(), make_special_quats()])

    assert_close(geo.quat_to_matrix(q), to_scipy(q).as_matrix())


def test_matrices_give_the_rotation_back_everywhere() -> None:
    q = torch.cat([draw_quats(), make_special_quats()])

    distance_rad = geo.quat_distance(geo.matrix_to_quat(geo.quat_to_matrix(q)), q)

    assert_close(distance_rad, torch.zeros(len(q)), atol=1e-14)


def test_the_rotation_of_a_pose_matrix_is_canonical() -> None:
    q = torch.cat([draw_quats(), make_special_quats()])
    pose = torch.nn.functional.pad(geo.quat_to_matrix(q), (0, 1, 0, 1))  # [N, 4, 4]

    rotation = geo.matrix_to_quat(pose)

    assert_close(rotation, geo.quat_canonical(rotation), atol=0)


def test_6d_is_the_first_two_columns_of_the_matrix() -> None:
    q = torch.cat([draw_quats(), make_special_quats()])
    matrix = geo.quat_to_matrix(q)

    columns = torch.cat([matrix[:, :, 0], matrix[:, :, 1]], dim=-1)
    assert_close(geo.quat_to_6d(q), columns, atol=0)


@pytest.mark.parametrize("convention", ["xyz", "XYZ"])
def test_euler_angles_agree_with_scipy(convention: geo.EulerConvention) -> None:
    q = draw_quats()

    assert_close(geo.quat_to_euler(q, convention), to_scipy(q).as_euler(convention))


@pytest.mark.parametrize("convention", ["xyz", "XYZ"])
def test_rotations_of_scipys_euler_angles_are_the_same(convention: geo.EulerConvention) -> None:
    q = draw_quats()
    angles = torch.from_numpy(to_scipy(q).as_euler(convention))

    assert_close(geo.euler_to_quat(angles, convention), geo.quat_canonical(q))


@pytest.mark.parametrize("convention", ["xyz", "XYZ"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("tiny_rad", TINY_RAD)
def test_euler_angles_give_the_rotation_back_in_gimbal_lock(
    convention: geo.EulerConvention, sign: int, tiny_rad: float
) -> None:
    """Gimbal lock is a pitch of ±π/2, where the third angle is set to 0."""
    pitch = sign * (math.pi / 2 - tiny_rad)
    q = geo.euler_to_quat(torch.tensor([0.7, pitch, -1.9], dtype=torch.float64), convention)

    angles = geo.quat_to_euler(q, convention)

    assert float(geo.quat_distance(q, geo.euler_to_quat(angles, convention))) < 1e-14
    if tiny_rad == 0:
        assert float(angles[2]) == 0


def test_an_unknown_euler_convention_is_refused() -> None:
    refuses("zyx", geo.euler_to_quat, torch.zeros(3), "zyx")
    refuses("zyx", geo.quat_to_euler, torch.eye(4)[0], "zyx")


# Poses


def compute_pose_matrix(pose: tuple[Tensor, Tensor]) -> Tensor:
    """[N, 4, 4] homogeneous matrices of positions [N, 3] and quaternions [N, 4]."""
    position, rotation = pose
    matrix = torch.eye(4, dtype=torch.float64).repeat(len(position), 1, 1)
    matrix[:, :3, :3] = geo.quat_to_matrix(rotation)
    matrix[:, :3, 3] = position
    return matrix


def draw_pose(seed: int) -> tuple[Tensor, Tensor]:
    return draw_vectors(50, seed), draw_quats(50, seed)


def test_composing_poses_multiplies_their_matrices() -> None:
    outer = draw_pose(7)
    inner = draw_pose(8)

    composed = compute_pose_matrix(geo.pose_compose(*outer, *inner))

    assert_close(composed, compute_pose_matrix(outer) @ compute_pose_matrix(inner))


def test_the_inverse_pose_has_the_inverse_matrix() -> None:
    pose = draw_pose(7)

    assert_close(
        compute_pose_matrix(geo.pose_inverse(*pose)), torch.linalg.inv(compute_pose_matrix(pose))
    )


def test_actions_translate_in_the_base_frame_and_rotate_in_the_end_effector_frame() -> None:
    position, rotation = draw_pose(7)
    next_position, next_rotation = draw_pose(8)

    translation, step_rotation = geo.action_between_poses(
        position, rotation, next_position, next_rotation
    )

    assert_close(translation, next_position - position)
    rotated = geo.quat_to_matrix(rotation) @ geo.quat_to_matrix(step_rotation)
    assert_close(rotated, geo.quat_to_matrix(next_rotation))


def test_applying_the_action_between_two_poses_leads_to_the_second() -> None:
    pose = draw_pose(7)
    next_pose = draw_pose(8)
    action = geo.action_between_poses(*pose, *next_pose)

    position, rotation = geo.apply_action(*pose, *action)

    assert_close(position, next_pose[0])
    assert_close(rotation, geo.quat_canonical(next_pose[1]))


# The sphere S³


def test_sphere_log_is_tangent_and_as_long_as_the_arc() -> None:
    a = draw_quats(seed=9)
    b = draw_quats(seed=10)

    tangent = geo.sphere_log(a, b)

    assert_close((tangent * a).sum(-1), torch.zeros(len(a)))
    assert_close(tangent.norm(dim=-1), torch.arccos((a * b).sum(-1)))


@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_paths_on_the_sphere_are_great_circles(fraction: float) -> None:
    a = draw_quats(seed=9)
    b = draw_quats(seed=10)
    angle = torch.arccos((a * b).sum(-1, keepdim=True))
    weight_a = ((1 - fraction) * angle).sin() / angle.sin()
    weight_b = (fraction * angle).sin() / angle.sin()
    expected = weight_a * a + weight_b * b

    assert_close(geo.sphere_exp(a, fraction * geo.sphere_log(a, b)), expected)
    assert_close(geo.sphere_slerp(a, b, fraction), expected)


@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_slerp_on_the_sphere_is_precise_between_near_points(fraction: float) -> None:
    a = draw_quats(seed=9)
    b = draw_quats(seed=10)
    tangent = 1e-5 * geo.sphere_log(a, b)
    near = geo.sphere_exp(a, tangent)

    assert_close(geo.sphere_slerp(a, near, fraction), geo.sphere_exp(a, fraction * tangent))


@pytest.mark.parametrize("angle_rad", ANGLES_RAD)
def test_sphere_log_leads_to_its_target_at_every_angle(angle_rad: float) -> None:
    """The angles include 0 and 2π, at which the two points coincide and are antipodal."""
    a = draw_quats(50)
    rotation = geo.quat_exp(torch.tensor([0.0, angle_rad, 0], dtype=a.dtype))
    target = geo.quat_multiply(a, rotation)

    tangent = geo.sphere_log(a, target)

    assert_close(geo.sphere_exp(a, tangent), target, atol=1e-11)
    assert_close((tangent * a).sum(-1), torch.zeros(len(a)))
    # An arc on S³ is half as long as the angle of the rotation.
    length = torch.full((len(a),), angle_rad / 2, dtype=a.dtype)
    assert_close(tangent.norm(dim=-1), length, atol=1e-11)


# Gradients

# Functions of one quaternion q. The regular ones are differentiable at almost every q; the singular
# ones compare q with itself or with its antipode, where a distance has no derivative.
REGULAR_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "log": geo.quat_log,
    "matrix": geo.quat_to_matrix,
    "to and from matrix": lambda q: geo.matrix_to_quat(geo.quat_to_matrix(q)),
    "normalize": geo.quat_normalize,
    "slerp": lambda q: geo.quat_slerp(torch.tensor([1.0, 0, 0, 0]).to(q), q, 0.3),
    "sphere_log": lambda q: geo.sphere_log(torch.tensor([0.0, 0, 0.6, 0.8]).to(q), q),
    "xyz": lambda q: geo.quat_to_euler(q, "xyz"),
    "XYZ": lambda q: geo.quat_to_euler(q, "XYZ"),
    "distance": lambda q: geo.quat_distance(q, torch.tensor([0.8, 0.6, 0, 0]).to(q)),
    "rotate": lambda q: geo.quat_rotate(q, torch.tensor([1.0, 2, 3]).to(q)),
    "multiply": lambda q: geo.quat_multiply(q, q),
    "canonical": geo.quat_canonical,
}
SINGULAR_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "distance to itself": lambda q: geo.quat_distance(q, q.detach()),
    "distance to the antipode": lambda q: geo.quat_distance(q, -q.detach()),
    "slerp to the antipode": lambda q: geo.quat_slerp(q, -q.detach(), 0.4),
    "sphere_log to itself": lambda q: geo.sphere_log(q, q.detach()),
    "sphere_log to the antipode": lambda q: geo.sphere_log(q, -q.detach()),
}
ALL_FUNCTIONS = REGULAR_FUNCTIONS | SINGULAR_FUNCTIONS


@pytest.mark.parametrize("name", REGULAR_FUNCTIONS)
def test_gradients_equal_finite_differences(name: str) -> None:
    near_identity = geo.quat_exp(
        torch.tensor([[1e-9, -2e-9, 0], [3e-3, 1e-3, 0]], dtype=torch.float64)
    )
    q = torch.cat([draw_quats(5, seed=11), near_identity]).requires_grad_()

    assert torch.autograd.gradcheck(REGULAR_FUNCTIONS[name], (q,), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ALL_FUNCTIONS)
def test_gradients_are_finite_at_every_special_rotation(name: str, dtype: torch.dtype) -> None:
    for q in (make_special_quats(dtype), torch.eye(4, dtype=dtype), -torch.eye(4, dtype=dtype)):
        q = q.requires_grad_()

        result = ALL_FUNCTIONS[name](q)
        (gradient,) = torch.autograd.grad(result.sum(), q)

        assert bool(torch.isfinite(result).all())
        assert bool(torch.isfinite(gradient).all())


def test_gradients_of_exp_are_right_at_zero_and_beyond() -> None:
    vectors = torch.tensor([[0.0, 0, 0], [1e-9, 0, 0], [5e-3, 0, 0], [1, 2, -1], [math.pi, 0, 0]])
    rotation_vectors = vectors.double().requires_grad_()

    assert torch.autograd.gradcheck(geo.quat_exp, (rotation_vectors,))


def test_the_zero_quaternion_normalizes_to_the_identity_with_zero_gradient() -> None:
    zero = torch.zeros(2, 4, requires_grad=True)

    normalized = geo.quat_normalize(zero)
    (gradient,) = torch.autograd.grad(normalized.sum(), zero)

    assert_close(normalized.detach(), [[1, 0, 0, 0]] * 2)
    assert bool((gradient == 0).all())
