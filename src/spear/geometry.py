"""Rotations as unit quaternions, poses, and the sphere S³ they live on.

Quaternions are scalar first (w, x, y, z), [..., 4]; q and -q are the same rotation. Everything is batched
over leading dimensions (which broadcast), keeps dtype and device, and has finite gradients everywhere,
including at the identity, at half turns and for antipodal pairs; where a function is not differentiable (a
distance at 0) the gradient is a subgradient.

Rotations act on column vectors: `quat_rotate(q, v)` is R(q) v, and `quat_multiply(a, b)` is the rotation
R(a) R(b): b in the frame that a gives. A pose (position, rotation) maps its own frame's points to the frame
it is expressed in.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from spear.errors import SpearError, check_known

EulerConvention = Literal["xyz", "XYZ"]
"""Angles are always given in the order (about x, about y, about z), radians.

"xyz"  about fixed axes: R = Rz(yaw) Ry(pitch) Rx(roll). Roll-pitch-yaw of URDF, BridgeData and DROID.
"XYZ"  about moving axes: R = Rx(a) Ry(b) Rz(c).
The letters' case means what it means in scipy's `Rotation`.
"""

_SERIES = 1e-4
"""Squared angle below which Taylor series replace quotients; their error there is below float64 rounding."""

UNIT_NORM_TOLERANCE = 1e-3
"""How far from 1 the norm of a quaternion from outside may be (ours): then it is normalised, else refused."""


def quat_multiply(a: Tensor, b: Tensor) -> Tensor:
    """Hamilton product a ⊗ b, [..., 4]."""
    (aw, av), (bw, bv) = (q.split((1, 3), dim=-1) for q in torch.broadcast_tensors(a, b))
    across = torch.addcmul(torch.addcmul(torch.linalg.cross(av, bv), aw, bv), bw, av)
    return torch.cat([aw * bw - (av * bv).sum(-1, keepdim=True), across], dim=-1)


def quat_conjugate(q: Tensor) -> Tensor:
    """The conjugate, which is the inverse of a unit quaternion, [..., 4]."""
    return torch.cat([q[..., :1], -q[..., 1:]], dim=-1)


def quat_normalize(q: Tensor) -> Tensor:
    """q / ‖q‖, [..., 4]. The zero quaternion has no direction: it gives the identity, with zero gradient."""
    norm = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
    zero = norm == 0
    identity = torch.zeros_like(q)
    identity[..., 0] = 1
    return torch.where(zero, identity, q / torch.where(zero, 1, norm))


def quat_canonical(q: Tensor) -> Tensor:
    """The one of q and -q with w ≥ 0; where w = 0, the one whose first nonzero component is positive."""
    w, x, y, z = torch.sign(q.detach()).split(1, dim=-1)
    # Powers of two rank the components: the first nonzero one outweighs all later ones together.
    rank = z.add(y, alpha=2).add(x, alpha=4).add(w, alpha=8)
    return torch.where(rank < 0, -q, q)


def check_unit_quat(q: Tensor, what: str) -> Tensor:
    """Check quaternions from outside, [..., 4]: canonical and unit on return.

    Norms within 1e-3 of 1 are normalised; others, and values that are not finite, raise `SpearError` naming
    `what`.
    """
    error = (torch.linalg.vector_norm(q, dim=-1) - 1).abs()
    if not bool((error <= UNIT_NORM_TOLERANCE).all()):  # also refuses NaN
        off = f"norm off by {float(error.max()):.3g}"
        raise SpearError(f"not a unit quaternion: {what} ({off}): give (w, x, y, z) with norm 1")
    return quat_canonical(quat_normalize(q))


def quat_exp(vector: Tensor) -> Tensor:
    """Rotation vector [..., 3], rad (axis times angle), to unit quaternion [..., 4]; w may be negative."""
    cos, sinc = _cos_sinc((vector * vector).sum(-1, keepdim=True) / 4)
    return torch.cat([cos, vector * sinc / 2], dim=-1)


def quat_log(q: Tensor) -> Tensor:
    """Unit quaternion [..., 4] to rotation vector [..., 3], rad, norm ≤ π; q and -q give the same vector."""
    return _log(quat_canonical(q))


def quat_slerp(q0: Tensor, q1: Tensor, t: Tensor | float) -> Tensor:
    """Constant-speed rotation from q0 (t = 0) to q1 (t = 1), the short way (at most π), [..., 4].

    t is a number or a tensor that broadcasts against the leading dimensions. At t = 1 the result may be -q1.
    """
    vector = quat_log(quat_multiply(quat_conjugate(q0), q1))
    if isinstance(t, Tensor):
        t = t[..., None]
    return quat_multiply(q0, quat_exp(vector * t))


def quat_distance(a: Tensor, b: Tensor) -> Tensor:
    """Angle of the rotation between a and b, rad, in [0, π], [...]. Zero gradient where they coincide.

    From chords rather than an arc cosine, so that it keeps full precision near 0 and π.
    """
    minus = torch.linalg.vector_norm(a - b, dim=-1)
    plus = torch.linalg.vector_norm(a + b, dim=-1)
    return 4 * torch.atan2(torch.minimum(minus, plus), torch.maximum(minus, plus))


def quat_rotate(q: Tensor, v: Tensor) -> Tensor:
    """R(q) v for vectors [..., 3]."""
    w, u = q[..., :1], q[..., 1:]
    u, v = torch.broadcast_tensors(u, v)
    twice = 2 * torch.linalg.cross(u, v)
    return v + w * twice + torch.linalg.cross(u, twice)


# The sphere S³: here q and -q are different points.


def quat_derivative(q: Tensor, omega: Tensor) -> Tensor:
    """q̇ = ½ q ⊗ ω [..., 4] of an ω [..., 3], rad per unit time, in the rotated frame; tangent to S³ at q."""
    return quat_multiply(q, torch.cat([torch.zeros_like(omega[..., :1]), omega / 2], dim=-1))


def sphere_exp(q: Tensor, velocity: Tensor) -> Tensor:
    """Follow the great circle from q with the tangent vector `velocity` for unit time, [..., 4].

    The paper's integration step with velocity = q̇ Δτ: Δφ = ‖ω‖Δτ, q ⊗ [cos(Δφ/2), ω̂ sin(Δφ/2)], written
    without the products: cos(Δφ/2) q + sin(Δφ/2) v/‖v‖, where v is the part of the velocity across q and ‖v‖
    = Δφ/2.
    """
    across = velocity - (velocity * q).sum(-1, keepdim=True) * q
    cos, sinc = _cos_sinc((across * across).sum(-1, keepdim=True))
    return cos * q + sinc * across


def sphere_log(q: Tensor, target: Tensor) -> Tensor:
    """The tangent vector at q [..., 4] with `sphere_exp(q, sphere_log(q, target)) = target`, norm in [0, π].

    For an antipodal pair every direction leads there: we take q ⊗ i, so the result is determined and finite.
    """
    return quat_derivative(q, sphere_angular_velocity(q, target))


def sphere_slerp(q: Tensor, target: Tensor, part: float) -> Tensor:
    """The point at that part of the shorter great circle from q to `target`, [..., 4], which is at
    `sphere_exp(q, part * sphere_log(q, target))`: cos(φ) q + sin(φ) u with u, of unit length, across q. For
    an antipodal pair it is ±q. Of unit length also where the others are not quite."""
    along = (q * target).sum(-1, keepdim=True)
    across = target - along * q
    length = torch.linalg.vector_norm(across, dim=-1, keepdim=True)
    angle = part * torch.atan2(length, along)
    point = (
        torch.cos(angle) * q
        + torch.sin(angle) / length.clamp_min(torch.finfo(q.dtype).tiny) * across
    )
    return nn.functional.normalize(point, dim=-1)


def sphere_angular_velocity(q: Tensor, target: Tensor) -> Tensor:
    """The ω [..., 3], rad, that turns q into `target` in unit time on the shorter great-circle arc of S³.

    Norm in [0, 2π]: unlike `quat_log(q* ⊗ target)`, the target is not replaced by its antipode.
    """
    return _log(quat_multiply(quat_conjugate(q), target))


# Matrices, Euler angles, 6D.


def quat_to_matrix(q: Tensor) -> Tensor:
    """Unit quaternion [..., 4] to rotation matrix [..., 3, 3]."""
    w, x, y, z = q.unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def matrix_to_quat(matrix: Tensor) -> Tensor:
    """Rotation matrix [..., 3, 3] or pose [..., 4, 4] to canonical unit quaternion [..., 4], exact."""
    m = matrix[..., :3, :3].flatten(-2).unbind(-1)
    xx, yy, zz = m[0], m[4], m[8]
    wx, wy, wz = m[7] - m[5], m[2] - m[6], m[3] - m[1]
    xy, xz, yz = m[1] + m[3], m[2] + m[6], m[5] + m[7]
    # The outer product 4 q qᵀ: each row is a multiple of q. Take the longest, which never vanishes.
    outer = torch.stack(
        [
            1 + xx + yy + zz, wx, wy, wz,
            wx, 1 + xx - yy - zz, xy, xz,
            wy, xy, 1 - xx + yy - zz, yz,
            wz, xz, yz, 1 - xx - yy + zz,
        ],
        dim=-1,
    ).unflatten(-1, (4, 4))  # fmt: skip
    best = outer.diagonal(dim1=-2, dim2=-1).argmax(-1)
    row = outer.gather(-2, best[..., None, None].expand(*best.shape, 1, 4)).squeeze(-2)
    return quat_canonical(quat_normalize(row))


def euler_to_quat(angles: Tensor, convention: EulerConvention | Literal["zxy"]) -> Tensor:
    """Angles about x, y, z [..., 3], rad, to canonical quaternion [..., 4]; see `EulerConvention`.

    zxy: Ry Rx Rz.
    """
    x, y, z = (
        quat_exp(angles * axis) for axis in torch.eye(3, dtype=angles.dtype, device=angles.device)
    )
    orders = {"xyz": (z, y, x), "XYZ": (x, y, z), "zxy": (y, x, z)}
    check_known("Euler convention", orders, convention)
    first, second, last = orders[convention]
    return quat_canonical(quat_multiply(quat_multiply(first, second), last))


def quat_to_euler(q: Tensor, convention: EulerConvention) -> Tensor:
    """Unit quaternion [..., 4] to angles about x, y, z [..., 3], rad; y in [-π/2, π/2].

    See `EulerConvention`.

    Where y = ±π/2 only a combination of the others is determined: z is set to 0. The result always gives the
    rotation back.
    """
    check_known("Euler convention", get_args(EulerConvention), convention)
    if convention == "XYZ":
        # The transpose of Rx(a) Ry(b) Rz(c) is Rz(-c) Ry(-b) Rx(-a), which is the other convention.
        return -quat_to_euler(quat_conjugate(q), "xyz")
    m = quat_to_matrix(q)
    locked = torch.hypot(m[..., 0, 0], m[..., 1, 0]).detach() < 8 * torch.finfo(q.dtype).eps
    one, zero = torch.ones_like(m[..., 0, 0]), torch.zeros_like(m[..., 0, 0])
    yaw = torch.atan2(
        torch.where(locked, zero, m[..., 1, 0]), torch.where(locked, one, m[..., 0, 0])
    )
    # The other two from the matrix with the yaw undone, so that an ill-determined yaw is compensated.
    c, s = torch.cos(yaw), torch.sin(yaw)
    pitch = torch.atan2(-m[..., 2, 0], c * m[..., 0, 0] + s * m[..., 1, 0])
    roll = torch.atan2(s * m[..., 0, 2] - c * m[..., 1, 2], c * m[..., 1, 1] - s * m[..., 0, 1])
    return torch.stack([roll, pitch, yaw], dim=-1)


def quat_to_6d(q: Tensor) -> Tensor:
    """Unit quaternion [..., 4] to the first two columns of its matrix, one after the other, [..., 6]."""
    return quat_to_matrix(q)[..., :2].mT.flatten(-2)


# Poses: a position [..., 3] in metres and a rotation [..., 4].


def pose_compose(
    position: Tensor, rotation: Tensor, inner_position: Tensor, inner_rotation: Tensor
) -> tuple[Tensor, Tensor]:
    """The pose, in the outer frame, of something given in the frame of (position, rotation)."""
    return position + quat_rotate(rotation, inner_position), quat_multiply(rotation, inner_rotation)


def pose_inverse(position: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """The pose of the outer frame in the frame of (position, rotation)."""
    inverse = quat_conjugate(rotation)
    return -quat_rotate(inverse, position), inverse


def action_between_poses(
    position: Tensor, rotation: Tensor, next_position: Tensor, next_rotation: Tensor
) -> tuple[Tensor, Tensor]:
    """The action between two poses, in the paper's frames; that these are one step apart is our reading.

    Returns the translation [..., 3] in the base frame (m) and the rotation [..., 4] in the end-effector frame
    (canonical): x' = x + translation, R' = R · R(rotation).
    """
    return next_position - position, quat_canonical(
        quat_multiply(quat_conjugate(rotation), next_rotation)
    )


def apply_action(
    position: Tensor, rotation: Tensor, translation: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor]:
    """The pose after an action, the inverse of `action_between_poses`; rotation canonical and unit."""
    return position + translation, quat_canonical(quat_normalize(quat_multiply(rotation, delta)))


def _cos_sinc(square: Tensor) -> tuple[Tensor, Tensor]:
    """cos(a) and sin(a)/a of a² = square: as functions of the square both are smooth at 0."""
    small = square < _SERIES
    angle = torch.sqrt(torch.where(small, 1, square))
    x = torch.where(small, square, 0)
    cos = torch.where(small, 1 - x / 2 * (1 - x / 12 * (1 - x / 30)), torch.cos(angle))
    sinc = torch.where(small, 1 - x / 6 * (1 - x / 20 * (1 - x / 42)), torch.sin(angle) / angle)
    return cos, sinc


def _log(q: Tensor) -> Tensor:
    """2 log(q) of a unit quaternion, [..., 3], norm in [0, 2π]; (2π, 0, 0) at -1: any is right there."""
    w, im = q[..., :1], q[..., 1:]
    square = (im * im).sum(-1, keepdim=True)
    near = (square < _SERIES * w * w) & (w > 0)
    # Closer to -1 than rounding: the direction would be noise, and its gradient without bound.
    opposite = (square <= (4 * torch.finfo(q.dtype).eps) ** 2) & (w <= 0)
    length = torch.sqrt(torch.where(near | opposite, 1, square))
    w_near = torch.where(near, w, 1)
    x = torch.where(near, square, 0) / (w_near * w_near)
    series = (1 - x * (1 / 3 - x * (1 / 5 - x / 7))) / w_near
    scale = torch.where(near, series, torch.atan2(length, torch.where(near, 1, w)) / length)
    half_turn = nn.functional.pad(torch.full_like(w, 2 * math.pi), (0, 2))
    return torch.where(opposite, half_turn, 2 * scale * im)
