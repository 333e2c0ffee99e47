"""Rotations and poses: against scipy, at every singular place, with gradients."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.spatial.transform import Rotation, Slerp
from torch import Tensor

from refusals import refuses
from spear import geometry as geo


def quats(n: int = 500, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return geo.quat_normalize(
        torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    )


def scipy_of(q: Tensor) -> Rotation:
    return Rotation.from_quat(q.numpy(), scalar_first=True)


def same(a: Tensor, b: Any, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=0, atol=atol)


# Special rotations: the identity, half turns, their neighbourhoods, and antipodes of all.
TINY = [0.0, 1e-12, 1e-8, 1e-5, 1e-3]
ANGLES = [*TINY, 1.0, *(math.pi - t for t in TINY), *(2 * math.pi - t for t in TINY)]
AXES = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0], [0.6, -0.8, 0], [0.48, 0.6, -0.64]]


def special(dtype: torch.dtype = torch.float64) -> Tensor:
    vectors = torch.tensor(ANGLES, dtype=dtype)[:, None, None] * torch.tensor(AXES, dtype=dtype)
    # Products of quarter turns, some of them in gimbal lock, with matrices of exact 0 and ±1.
    quarters = torch.cartesian_prod(*[torch.tensor([0.5, -0.5], dtype=dtype)] * 4)
    return torch.cat([geo.quat_exp(vectors.reshape(-1, 3)), quarters])


def test_product_conjugate_and_rotation_agree_with_scipy() -> None:
    a, b = quats(seed=1), quats(seed=2)
    ours = geo.quat_canonical(geo.quat_multiply(a, b))
    same(ours, (scipy_of(a) * scipy_of(b)).as_quat(canonical=True, scalar_first=True))
    same(geo.quat_multiply(a, geo.quat_conjugate(a)), [[1, 0, 0, 0]] * len(a))
    v = torch.randn(len(a), 3, generator=torch.Generator().manual_seed(3), dtype=a.dtype)
    same(geo.quat_rotate(a, v), scipy_of(a).apply(v.numpy()))
    same(geo.quat_rotate(a[0], v), scipy_of(a[0]).apply(v.numpy()))  # broadcasts


def test_exp_and_log_agree_with_scipy_everywhere() -> None:
    q = torch.cat([quats(), special()])
    log, reference = geo.quat_log(q), torch.from_numpy(scipy_of(q).as_rotvec())
    # At half turns scipy and we may name opposite ends of the axis: compare what the vectors rotate to.
    same(
        geo.quat_distance(geo.quat_exp(log), geo.quat_exp(reference)),
        torch.zeros(len(q)),
        atol=1e-11,
    )
    same(log.norm(dim=-1), reference.norm(dim=-1), atol=1e-11)
    assert float(log.norm(dim=-1).max()) <= math.pi + 1e-12
    clear = reference.norm(dim=-1) < math.pi - 1e-7
    same(log[clear], reference[clear], atol=1e-11)


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_small_rotations_keep_their_relative_precision(dtype: torch.dtype, relative: float) -> None:
    for size in [1e-12, 1e-8, 1e-6, 1e-4, 0.0099, 0.0101, 0.02, 0.1, 0.5]:
        vector = torch.tensor([0.6, -0.48, 0.64], dtype=dtype) * size
        torch.testing.assert_close(
            geo.quat_log(geo.quat_exp(vector)), vector, rtol=relative, atol=0
        )


def test_canonical_is_deterministic_on_the_equator() -> None:
    q = torch.cat(
        [quats(), torch.eye(4, dtype=torch.float64), torch.tensor([[0, 0, -0.6, 0.8]]).double()]
    )
    same(geo.quat_canonical(q), geo.quat_canonical(-q), atol=0)
    assert bool((geo.quat_canonical(q)[:, 0] >= 0).all())
    same(geo.quat_canonical(torch.tensor([0.0, -0.6, 0.8, 0])), [0, 0.6, -0.8, 0], atol=0)
    same(geo.quat_canonical(torch.tensor([-0.0, 0, 0, -1])), [0, 0, 0, 1], atol=0)
    same(geo.quat_canonical(torch.tensor([0.1, -0.9, -0.3, -0.3])), [0.1, -0.9, -0.3, -0.3], atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distance_is_accurate_at_both_ends(dtype: torch.dtype) -> None:
    axis = torch.tensor([0.6, -0.48, 0.64], dtype=torch.float64)
    base, eps = quats(1)[0], torch.finfo(dtype).eps
    for angle in [0, 1e-6, 1e-3, 1, 3, math.pi - 1e-3, math.pi - 1e-6, math.pi]:
        other = geo.quat_multiply(base, geo.quat_exp(axis * angle))
        for sign in (1, -1):
            assert (
                abs(float(geo.quat_distance(base.to(dtype), sign * other.to(dtype))) - angle)
                < 8 * eps
            )
    assert float(geo.quat_distance(base.to(dtype), -base.to(dtype))) == 0


def test_slerp_agrees_with_scipy_and_takes_the_short_way() -> None:
    a, b = quats(50, seed=4), quats(50, seed=5)
    t = torch.linspace(0, 1, 7, dtype=torch.float64)
    ours = geo.quat_slerp(a[:, None], b[:, None], t)
    for i in range(len(a)):
        reference = Slerp([0, 1], Rotation.concatenate([scipy_of(a[i]), scipy_of(b[i])]))(t.numpy())
        same(geo.quat_canonical(ours[i]), reference.as_quat(canonical=True, scalar_first=True))
    same(geo.quat_distance(a, geo.quat_slerp(a, b, 0.5)) * 2, geo.quat_distance(a, b))
    same(geo.quat_distance(a, geo.quat_slerp(a, -a, 0.3)), torch.zeros(50))
    same(geo.quat_distance(geo.quat_slerp(a, -b, 0.3), geo.quat_slerp(a, b, 0.3)), torch.zeros(50))


def test_matrices_agree_with_scipy_everywhere() -> None:
    q = torch.cat([quats(), special()])
    m = geo.quat_to_matrix(q)
    same(m, scipy_of(q).as_matrix())
    same(geo.quat_distance(geo.matrix_to_quat(m), q), torch.zeros(len(q)), atol=1e-14)
    back = geo.matrix_to_quat(torch.nn.functional.pad(m, (0, 1, 0, 1)))  # of a pose
    same(back, geo.quat_canonical(back), atol=0)
    same(geo.quat_to_6d(q), torch.cat([m[:, :, 0], m[:, :, 1]], dim=-1), atol=0)


@pytest.mark.parametrize("convention", ["xyz", "XYZ"])
def test_euler_agrees_with_scipy(convention: geo.EulerConvention) -> None:
    q = quats()
    same(geo.quat_to_euler(q, convention), scipy_of(q).as_euler(convention))
    angles = torch.from_numpy(scipy_of(q).as_euler(convention))
    same(geo.euler_to_quat(angles, convention), geo.quat_canonical(q))


@pytest.mark.parametrize("convention", ["xyz", "XYZ"])
def test_euler_gives_the_rotation_back_in_gimbal_lock(convention: geo.EulerConvention) -> None:
    for pitch in [math.pi / 2 - t for t in TINY] + [-math.pi / 2 + t for t in TINY]:
        q = geo.euler_to_quat(torch.tensor([0.7, pitch, -1.9], dtype=torch.float64), convention)
        measured = geo.quat_to_euler(q, convention)
        assert float(geo.quat_distance(q, geo.euler_to_quat(measured, convention))) < 1e-14
        if abs(pitch) == math.pi / 2:
            assert float(measured[2]) == 0
    refuses("zyx", geo.euler_to_quat, torch.zeros(3), "zyx")  # another convention
    refuses("zyx", geo.quat_to_euler, torch.eye(4)[0], "zyx")


def test_poses_agree_with_homogeneous_matrices() -> None:
    p0, p1 = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    q0, q1 = quats(50, seed=7), quats(50, seed=8)

    def matrix(p: Tensor, q: Tensor) -> Tensor:
        m = torch.eye(4, dtype=torch.float64).repeat(len(p), 1, 1)
        m[:, :3, :3], m[:, :3, 3] = geo.quat_to_matrix(q), p
        return m

    m0, m1 = matrix(p0, q0), matrix(p1, q1)
    same(matrix(*geo.pose_compose(p0, q0, p1, q1)), m0 @ m1)
    same(matrix(*geo.pose_inverse(p0, q0)), torch.linalg.inv(m0))
    translation, delta = geo.action_between_poses(p0, q0, p1, q1)
    same(translation, p1 - p0)
    same(m0[:, :3, :3] @ geo.quat_to_matrix(delta), m1[:, :3, :3])
    position, rotation = geo.apply_action(p0, q0, translation, delta)
    same(position, p1)
    same(rotation, geo.quat_canonical(q1))


def test_ways_on_the_sphere_are_great_circles() -> None:
    a, b = quats(seed=9), quats(seed=10)
    tangent, angle = geo.sphere_log(a, b), torch.arccos((a * b).sum(-1, keepdim=True))
    same((tangent * a).sum(-1), torch.zeros(len(a)))
    same(tangent.norm(dim=-1, keepdim=True), angle)
    for part in (0.0, 0.4, 1.0):
        on_the_way = (((1 - part) * angle).sin() * a + (part * angle).sin() * b) / angle.sin()
        same(geo.sphere_exp(a, part * tangent), on_the_way)
        same(geo.sphere_slerp(a, b, part), on_the_way)
        near = geo.sphere_exp(a, 1e-5 * tangent)
        same(geo.sphere_slerp(a, near, part), geo.sphere_exp(a, part * 1e-5 * tangent))


def test_sphere_log_at_coinciding_and_antipodal_points() -> None:
    a = quats(50)
    for angle in ANGLES:
        target = geo.quat_multiply(a, geo.quat_exp(torch.tensor([0.0, angle, 0], dtype=a.dtype)))
        tangent = geo.sphere_log(a, target)
        same(geo.sphere_exp(a, tangent), target, atol=1e-11)
        same((tangent * a).sum(-1), torch.zeros(len(a)))
        same(tangent.norm(dim=-1), torch.full((len(a),), angle / 2, dtype=a.dtype), atol=1e-11)


REGULAR: dict[str, Callable[[Tensor], Tensor]] = {
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
SINGULAR: dict[str, Callable[[Tensor], Tensor]] = {
    "distance to itself": lambda q: geo.quat_distance(q, q.detach()),
    "distance to the antipode": lambda q: geo.quat_distance(q, -q.detach()),
    "slerp to the antipode": lambda q: geo.quat_slerp(q, -q.detach(), 0.4),
    "sphere_log to itself": lambda q: geo.sphere_log(q, q.detach()),
    "sphere_log to the antipode": lambda q: geo.sphere_log(q, -q.detach()),
}


@pytest.mark.parametrize("name", REGULAR)
def test_gradients_equal_finite_differences(name: str) -> None:
    near_identity = geo.quat_exp(
        torch.tensor([[1e-9, -2e-9, 0], [3e-3, 1e-3, 0]], dtype=torch.float64)
    )
    q = torch.cat([quats(5, seed=11), near_identity]).requires_grad_()
    assert torch.autograd.gradcheck(REGULAR[name], (q,), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*REGULAR, *SINGULAR])
def test_gradients_are_finite_at_every_special_rotation(name: str, dtype: torch.dtype) -> None:
    for q in (special(dtype), torch.eye(4, dtype=dtype), -torch.eye(4, dtype=dtype)):
        q = q.requires_grad_()
        out = (REGULAR | SINGULAR)[name](q)
        (gradient,) = torch.autograd.grad(out.sum(), q)
        assert bool(torch.isfinite(out).all()), name
        assert bool(torch.isfinite(gradient).all()), name


def test_exp_gradient_at_zero_and_beyond() -> None:
    vectors = torch.tensor([[0.0, 0, 0], [1e-9, 0, 0], [5e-3, 0, 0], [1, 2, -1], [math.pi, 0, 0]])
    assert torch.autograd.gradcheck(geo.quat_exp, (vectors.double().requires_grad_(),))
    zero = torch.zeros(2, 4, requires_grad=True)  # no rotation: the identity
    out = geo.quat_normalize(zero)
    same(out.detach(), [[1, 0, 0, 0]] * 2)
    assert bool((torch.autograd.grad(out.sum(), zero)[0] == 0).all())


def test_unit_quat_normalises_within_tolerance_and_refuses_beyond() -> None:
    q = quats(4)
    same(geo.check_unit_quat(q * 1.0009, "state"), geo.quat_canonical(q))
    for bad in (q * 1.002, q * 0, q * math.nan):
        refuses(r"observation/state.*\(w, x, y, z\)", geo.check_unit_quat, bad, "observation/state")
