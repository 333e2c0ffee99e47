"""Rotations as unit quaternions, poses, and the sphere S³ that unit quaternions lie on.

Quaternions are scalar first (w, x, y, z), [..., 4]; q and -q are the same rotation. All functions
are batched over leading dimensions, which broadcast, and keep dtype and device. Gradients are
finite everywhere, including at the identity, at half turns and for antipodal pairs. Where a
function is not differentiable (a distance at 0) the gradient is a subgradient.

Rotations act on column vectors: `quat_rotate(q, v)` is R(q) v, and `quat_multiply(a, b)` is the
rotation R(a) R(b), that is, b in the frame that a gives. A pose (position, rotation) maps points of
its own frame to the frame that it is expressed in.

Example:
    >>> import math, torch
    >>> quarter_turn = euler_to_quat(torch.tensor([0, 0, math.pi / 2]), "xyz")  # about z
    >>> quat_rotate(quarter_turn, torch.tensor([1.0, 0, 0])).round(decimals=3)  # x becomes y
    tensor([0., 1., 0.])
    >>> round(float(quat_distance(quarter_turn, torch.tensor([1.0, 0, 0, 0]))), 3)  # rad
    1.571
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from spear.errors import SpearError, check_known

EulerConvention = Literal["xyz", "XYZ"]
"""How three angles make a rotation. Their order is always (about x, about y, about z), in radians.

"xyz"  About fixed axes: R = Rz(yaw) Ry(pitch) Rx(roll), as in URDF, BridgeData and DROID.
"XYZ"  About moving axes: R = Rx(a) Ry(b) Rz(c).

The letters' case means what it means in SciPy's `Rotation`.
"""

UNIT_NORM_TOLERANCE = 1e-3
"""How far from 1 the norm of a quaternion from outside may be (our choice). Others are refused."""

_MAX_SQUARE_FOR_SERIES = 1e-4
"""Squared angle below which Taylor series replace quotients, with less error than rounding."""


def quat_multiply(a: Tensor, b: Tensor) -> Tensor:
    """Hamilton product a ⊗ b, [..., 4]: the rotation R(a) R(b)."""
    a, b = torch.broadcast_tensors(a, b)
    a_real, a_imag = a.split((1, 3), dim=-1)
    b_real, b_imag = b.split((1, 3), dim=-1)
    # a_imag × b_imag + a_real b_imag + b_real a_imag
    imag = torch.linalg.cross(a_imag, b_imag)
    imag = torch.addcmul(imag, a_real, b_imag)
    imag = torch.addcmul(imag, b_real, a_imag)
    real = a_real * b_real - (a_imag * b_imag).sum(-1, keepdim=True)
    return torch.cat([real, imag], dim=-1)


def quat_conjugate(q: Tensor) -> Tensor:
    """The conjugate, which is the inverse of a unit quaternion, [..., 4]."""
    return torch.cat([q[..., :1], -q[..., 1:]], dim=-1)


def quat_normalize(q: Tensor) -> Tensor:
    """q / ‖q‖, [..., 4]. The zero quaternion, which has no direction, becomes the identity."""
    norm = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
    is_zero = norm == 0
    identity = torch.zeros_like(q)
    identity[..., 0] = 1
    return torch.where(is_zero, identity, q / torch.where(is_zero, 1, norm))


def quat_canonical(q: Tensor) -> Tensor:
    """The one of q and -q with w ≥ 0; if w is 0, the one whose first nonzero component is
    positive."""
    w, x, y, z = torch.sign(q.detach()).split(1, dim=-1)
    # By powers of two the first nonzero component outweighs all later ones together.
    weighted_sign = z.add(y, alpha=2).add(x, alpha=4).add(w, alpha=8)
    return torch.where(weighted_sign < 0, -q, q)


def validate_unit_quat(q: Tensor, name: str) -> Tensor:
    """Check quaternions that come from outside, and make them canonical unit quaternions.

    Args:
        q: [..., 4].
        name: what the quaternions are, for the message.

    Raises:
        SpearError: a norm differs from 1 by more than `UNIT_NORM_TOLERANCE`, or is not finite.
    """
    norm_error = (torch.linalg.vector_norm(q, dim=-1) - 1).abs()
    if not bool((norm_error <= UNIT_NORM_TOLERANCE).all()):  # NaN is refused, too
        raise SpearError(
            f"not a unit quaternion: {name} (norm off by {float(norm_error.max()):.3g}). "
            "Give (w, x, y, z) with norm 1."
        )
    return quat_canonical(quat_normalize(q))


def quat_exp(vector: Tensor) -> Tensor:
    """Rotation vector [..., 3] (axis times angle, rad) to unit quaternion [..., 4]; w may be
    negative."""
    cos, sinc = _cos_sinc((vector * vector).sum(-1, keepdim=True) / 4)
    return torch.cat([cos, vector * sinc / 2], dim=-1)


def quat_log(q: Tensor) -> Tensor:
    """Unit quaternion [..., 4] to rotation vector [..., 3], rad, of norm ≤ π; q and -q give the
    same."""
    return _log(quat_canonical(q))


def quat_slerp(q0: Tensor, q1: Tensor, t: Tensor | float) -> Tensor:
    """Rotate at constant speed from q0 (t = 0) to q1 (t = 1), by at most π, [..., 4].

    t is a number or a tensor that broadcasts against the leading dimensions. At t = 1 the result
    may be -q1, which is the same rotation.
    """
    vector = quat_log(quat_multiply(quat_conjugate(q0), q1))
    if isinstance(t, Tensor):
        t = t[..., None]
    return quat_multiply(q0, quat_exp(vector * t))


def quat_distance(a: Tensor, b: Tensor) -> Tensor:
    """Angle of the rotation between a and b, rad, in [0, π], [...]. The gradient is zero where it
    is 0.

    It is computed from chords instead of an arc cosine, so that it is precise near 0 and π.
    """
    chord = torch.linalg.vector_norm(a - b, dim=-1)
    antipodal_chord = torch.linalg.vector_norm(a + b, dim=-1)
    return 4 * torch.atan2(
        torch.minimum(chord, antipodal_chord), torch.maximum(chord, antipodal_chord)
    )


def quat_rotate(q: Tensor, v: Tensor) -> Tensor:
    """R(q) v for vectors v [..., 3]."""
    real = q[..., :1]
    imag, v = torch.broadcast_tensors(q[..., 1:], v)
    double_cross = 2 * torch.linalg.cross(imag, v)
    return v + real * double_cross + torch.linalg.cross(imag, double_cross)


# The sphere S³. Here q and -q are different points.


def quat_derivative(q: Tensor, omega: Tensor) -> Tensor:
    """q̇ = ½ q ⊗ ω, [..., 4]: the velocity on S³ of a rotation with angular velocity ω.

    Args:
        q: [..., 4].
        omega: [..., 3], rad per unit time, in the rotated frame.
    """
    pure_quaternion = torch.cat([torch.zeros_like(omega[..., :1]), omega / 2], dim=-1)
    return quat_multiply(q, pure_quaternion)


def sphere_exp(q: Tensor, velocity: Tensor) -> Tensor:
    """Follow the great circle from q with the tangent vector `velocity` for unit time, [..., 4].

    With velocity = q̇ Δτ this is the paper's integration step q ⊗ [cos(Δφ/2), ω̂ sin(Δφ/2)], where
    Δφ = ‖ω‖ Δτ. It is written without products: cos(Δφ/2) q + sin(Δφ/2) v/‖v‖, where v is the
    tangential part of the velocity, and ‖v‖ = Δφ/2.
    """
    tangent = velocity - (velocity * q).sum(-1, keepdim=True) * q
    cos, sinc = _cos_sinc((tangent * tangent).sum(-1, keepdim=True))
    return cos * q + sinc * tangent


def sphere_log(q: Tensor, target: Tensor) -> Tensor:
    """The tangent vector v at q with `sphere_exp(q, v) = target`, [..., 4], of norm in [0, π].

    For an antipodal pair every direction leads to the target. The result is then along q ⊗ i, so
    that it is determined and finite.
    """
    return quat_derivative(q, sphere_angular_velocity(q, target))


def sphere_slerp(q: Tensor, target: Tensor, fraction: float) -> Tensor:
    """The point at a fraction of the shorter great-circle arc from q to `target`, [..., 4].

    It is `sphere_exp(q, fraction * sphere_log(q, target))`, computed as cos(φ) q + sin(φ) u, where
    u is the unit tangent. For an antipodal pair it is ±q. Its norm is 1 even if those of the
    arguments are not quite.
    """
    cosine = (q * target).sum(-1, keepdim=True)
    tangent = target - cosine * q
    sine = torch.linalg.vector_norm(tangent, dim=-1, keepdim=True)
    angle = fraction * torch.atan2(sine, cosine)
    safe_sine = sine.clamp_min(torch.finfo(q.dtype).tiny)
    point = torch.cos(angle) * q + torch.sin(angle) / safe_sine * tangent
    return nn.functional.normalize(point, dim=-1)


def sphere_angular_velocity(q: Tensor, target: Tensor) -> Tensor:
    """The ω [..., 3], rad, that turns q into `target` in unit time along the shorter arc of S³.

    Its norm is in [0, 2π]. Unlike `quat_log(q* ⊗ target)`, it never leads to the target's antipode.
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
    """Rotation matrix [..., 3, 3] or pose [..., 4, 4] to canonical unit quaternion [..., 4],
    exactly."""
    xx, m01, m02, m10, yy, m12, m20, m21, zz = matrix[..., :3, :3].flatten(-2).unbind(-1)
    wx = m21 - m12
    wy = m02 - m20
    wz = m10 - m01
    xy = m01 + m10
    xz = m02 + m20
    yz = m12 + m21
    # The outer product 4 q qᵀ, whose rows are multiples of q. The longest row never vanishes.
    outer = torch.stack(
        [
            1 + xx + yy + zz, wx, wy, wz,
            wx, 1 + xx - yy - zz, xy, xz,
            wy, xy, 1 - xx + yy - zz, yz,
            wz, xz, yz, 1 - xx - yy + zz,
        ],
        dim=-1,
    ).unflatten(-1, (4, 4))  # fmt: skip
    longest = outer.diagonal(dim1=-2, dim2=-1).argmax(-1)
    row_index = longest[..., None, None].expand(*longest.shape, 1, 4)
    row = outer.gather(-2, row_index).squeeze(-2)
    return quat_canonical(quat_normalize(row))


def euler_to_quat(angles: Tensor, convention: EulerConvention | Literal["zxy"]) -> Tensor:
    """Angles about x, y and z [..., 3], rad, to canonical unit quaternion [..., 4].

    See `EulerConvention` for "xyz" and "XYZ"; "zxy" is R = Ry Rx Rz.
    """
    axis_x, axis_y, axis_z = torch.eye(3, dtype=angles.dtype, device=angles.device)
    about_x = quat_exp(angles * axis_x)
    about_y = quat_exp(angles * axis_y)
    about_z = quat_exp(angles * axis_z)
    factors = {
        "xyz": (about_z, about_y, about_x),
        "XYZ": (about_x, about_y, about_z),
        "zxy": (about_y, about_x, about_z),
    }
    check_known("Euler convention", factors, convention)
    first, second, third = factors[convention]
    return quat_canonical(quat_multiply(quat_multiply(first, second), third))


def quat_to_euler(q: Tensor, convention: EulerConvention) -> Tensor:
    """Unit quaternion [..., 4] to angles about x, y and z [..., 3], rad; y is in [-π/2, π/2].

    Where y = ±π/2 (gimbal lock) only a combination of the other two angles is determined, and z is
    set to 0. The angles always give the rotation back.
    """
    check_known("Euler convention", get_args(EulerConvention), convention)
    if convention == "XYZ":
        # The transpose of Rx(a) Ry(b) Rz(c) is Rz(-c) Ry(-b) Rx(-a), which is the other convention.
        return -quat_to_euler(quat_conjugate(q), "xyz")
    m = quat_to_matrix(q)
    cos_pitch = torch.hypot(m[..., 0, 0], m[..., 1, 0]).detach()
    is_locked = cos_pitch < 8 * torch.finfo(q.dtype).eps
    yaw_sine = torch.where(is_locked, torch.zeros_like(m[..., 1, 0]), m[..., 1, 0])
    yaw_cosine = torch.where(is_locked, torch.ones_like(m[..., 0, 0]), m[..., 0, 0])
    yaw = torch.atan2(yaw_sine, yaw_cosine)

    # The other two come from the matrix with the yaw undone, which makes up for an imprecise yaw.
    cos = torch.cos(yaw)
    sin = torch.sin(yaw)
    pitch = torch.atan2(-m[..., 2, 0], cos * m[..., 0, 0] + sin * m[..., 1, 0])
    roll = torch.atan2(
        sin * m[..., 0, 2] - cos * m[..., 1, 2], cos * m[..., 1, 1] - sin * m[..., 0, 1]
    )
    return torch.stack([roll, pitch, yaw], dim=-1)


def quat_to_6d(q: Tensor) -> Tensor:
    """Unit quaternion [..., 4] to the first two columns of its matrix, concatenated, [..., 6]."""
    return quat_to_matrix(q)[..., :2].mT.flatten(-2)


# Poses: a position [..., 3] in meters and a rotation [..., 4].


def pose_compose(
    position: Tensor, rotation: Tensor, inner_position: Tensor, inner_rotation: Tensor
) -> tuple[Tensor, Tensor]:
    """Express a pose that is given in the frame of (position, rotation) in the outer frame."""
    composed_position = position + quat_rotate(rotation, inner_position)
    return composed_position, quat_multiply(rotation, inner_rotation)


def pose_inverse(position: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """The pose of the outer frame in the frame of (position, rotation)."""
    inverse_rotation = quat_conjugate(rotation)
    return -quat_rotate(inverse_rotation, position), inverse_rotation


def action_between_poses(
    position: Tensor, rotation: Tensor, next_position: Tensor, next_rotation: Tensor
) -> tuple[Tensor, Tensor]:
    """The action that leads from one end-effector pose to the next, in the paper's frames.

    That an action is the difference between poses one step apart is our reading of the paper.

    Returns:
        The translation [..., 3] in the base frame (m) and the rotation [..., 4] in the end-effector
        frame
        (canonical): x' = x + translation, R' = R · R(rotation).
    """
    translation = next_position - position
    step_rotation = quat_multiply(quat_conjugate(rotation), next_rotation)
    return translation, quat_canonical(step_rotation)


def apply_action(
    position: Tensor, rotation: Tensor, translation: Tensor, step_rotation: Tensor
) -> tuple[Tensor, Tensor]:
    """The pose after an action, the inverse of `action_between_poses`; its rotation is canonical
    and unit."""
    next_rotation = quat_multiply(rotation, step_rotation)
    return position + translation, quat_canonical(quat_normalize(next_rotation))


def _cos_sinc(square: Tensor) -> tuple[Tensor, Tensor]:
    """cos(a) and sin(a)/a of a² = square. As functions of the square both are smooth at 0."""
    is_small = square < _MAX_SQUARE_FOR_SERIES
    angle = torch.sqrt(torch.where(is_small, 1, square))
    x = torch.where(is_small, square, 0)
    cos_series = 1 - x / 2 * (1 - x / 12 * (1 - x / 30))
    sinc_series = 1 - x / 6 * (1 - x / 20 * (1 - x / 42))
    cos = torch.where(is_small, cos_series, torch.cos(angle))
    sinc = torch.where(is_small, sinc_series, torch.sin(angle) / angle)
    return cos, sinc


def _log(q: Tensor) -> Tensor:
    """2 log(q) of a unit quaternion, [..., 3], of norm in [0, 2π].

    At q = -1, where every vector of norm 2π is right, it is (2π, 0, 0).
    """
    w = q[..., :1]
    imag = q[..., 1:]
    square = (imag * imag).sum(-1, keepdim=True)
    is_near_identity = (square < _MAX_SQUARE_FOR_SERIES * w * w) & (w > 0)
    # Closer to -1 than rounding: the direction would be noise, and its gradient without bound.
    is_antipode = (square <= (4 * torch.finfo(q.dtype).eps) ** 2) & (w <= 0)

    # Near the identity atan(‖imag‖ / w) / ‖imag‖ as a series.
    w_near = torch.where(is_near_identity, w, 1)
    x = torch.where(is_near_identity, square, 0) / (w_near * w_near)
    series = (1 - x * (1 / 3 - x * (1 / 5 - x / 7))) / w_near

    length = torch.sqrt(torch.where(is_near_identity | is_antipode, 1, square))
    quotient = torch.atan2(length, torch.where(is_near_identity, 1, w)) / length
    half_angle_per_length = torch.where(is_near_identity, series, quotient)

    full_turn = nn.functional.pad(torch.full_like(w, 2 * math.pi), (0, 2))
    return torch.where(is_antipode, full_turn, 2 * half_angle_per_length * imag)
