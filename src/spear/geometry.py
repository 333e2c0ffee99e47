"""Rotations as unit quaternions, poses, and the sphere S³ that unit quaternions lie on.

Quaternions are tensors [..., 4] of (w, x, y, z), scalar first; q and -q are the same rotation. A
canonical quaternion is the one of the two with w ≥ 0. All functions are batched: their leading
dimensions broadcast, and results keep dtype and device. Gradients are finite everywhere, including
at the identity, at half turns and for antipodal pairs (q and -q). Where a function is not
differentiable (a distance at 0) the gradient is a subgradient.

R(q) is the rotation matrix of q, and rotations act on column vectors: `quat_rotate(q, v)` is
R(q) v, and `quat_multiply(a, b)` is the rotation R(a) R(b). A pose (position, rotation) maps points
of its own frame to the outer frame, in which the pose is expressed.

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
"""How far from 1 the norm of a user's quaternion may be (our choice). Beyond that, the quaternion
is refused."""

_MAX_SQUARE_FOR_SERIES = 1e-4
"""Squared angle (rad²) below which Taylor series replace quotients like sin(a)/a. The series' error
is then less than that of rounding."""


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
    # With the weights 8, 4, 2, 1 the first nonzero sign outweighs all later signs together.
    weighted_sign = z.add(y, alpha=2).add(x, alpha=4).add(w, alpha=8)
    return torch.where(weighted_sign < 0, -q, q)


def validate_unit_quat(q: Tensor, name: str) -> Tensor:
    """Check a user's quaternions, and return them as canonical unit quaternions.

    Args:
        q: [..., 4].
        name: what the quaternions are called in the error's message.

    Raises:
        SpearError: a norm differs from 1 by more than `UNIT_NORM_TOLERANCE`, or is not finite.
    """
    norm_error = (torch.linalg.vector_norm(q, dim=-1) - 1).abs()
    if not bool((norm_error <= UNIT_NORM_TOLERANCE).all()):  # NaN is refused, too
        raise SpearError(
            f"{name} is no unit quaternion (norm off by {float(norm_error.max()):.3g}). Give "
            "(w, x, y, z) with norm 1."
        )
    return quat_canonical(quat_normalize(q))


def quat_exp(vector: Tensor) -> Tensor:
    """Convert a rotation vector to a unit quaternion.

    Args:
        vector: [..., 3], axis times angle, rad.

    Returns:
        [..., 4], (w, x, y, z); w may be negative.

    Example:
        >>> quat_exp(torch.tensor([0.0, 0.0, torch.pi / 2]))
        tensor([0.7071, 0.0000, 0.0000, 0.7071])
    """
    squared_half_angle = (vector * vector).sum(-1, keepdim=True) / 4
    cos, sinc = _cos_sinc(squared_half_angle)
    return torch.cat([cos, vector * sinc / 2], dim=-1)


def quat_log(q: Tensor) -> Tensor:
    """Convert a unit quaternion to a rotation vector.

    Args:
        q: [..., 4], (w, x, y, z); q and -q give the same.

    Returns:
        [..., 3], axis times angle, rad, of norm ≤ π.

    Example:
        >>> quat_log(torch.tensor([0.7071, 0.0, 0.0, 0.7071]))
        tensor([0.0000, 0.0000, 1.5708])
    """
    return _double_log(quat_canonical(q))


def quat_slerp(q0: Tensor, q1: Tensor, t: Tensor | float) -> Tensor:
    """Rotate at constant speed from q0 (t = 0) to q1 (t = 1), by at most π.

    Args:
        q0: [..., 4], unit quaternion.
        q1: [..., 4], unit quaternion.
        t: a number, or a tensor that broadcasts against the leading dimensions.

    Returns:
        [..., 4]. At t = 1 the result may be -q1, which is the same rotation.

    Example:
        >>> q0 = torch.tensor([1.0, 0.0, 0.0, 0.0])
        >>> q1 = torch.tensor([0.0, 0.0, 0.0, 1.0])  # half a turn about z
        >>> quat_slerp(q0, q1, 0.5)
        tensor([0.7071, 0.0000, 0.0000, 0.7071])
    """
    relative_rotation = quat_multiply(quat_conjugate(q0), q1)
    rotation_vector = quat_log(relative_rotation)
    if isinstance(t, Tensor):
        t = t[..., None]
    return quat_multiply(q0, quat_exp(rotation_vector * t))


def quat_distance(a: Tensor, b: Tensor) -> Tensor:
    """Angle of the rotation between a and b, rad, in [0, π], [...]. The gradient is zero where the
    angle is 0.

    The angle is computed from chords instead of an arc cosine, so that it is precise near 0 and π.
    """
    # With α the angle of the rotation, the two chords are 2 sin(α/4) and 2 cos(α/4). Which of the
    # two is ‖a - b‖ depends on the quaternions' signs; the sine is the shorter one.
    chord = torch.linalg.vector_norm(a - b, dim=-1)
    antipodal_chord = torch.linalg.vector_norm(a + b, dim=-1)
    shorter = torch.minimum(chord, antipodal_chord)
    longer = torch.maximum(chord, antipodal_chord)
    return 4 * torch.atan2(shorter, longer)


def quat_rotate(q: Tensor, v: Tensor) -> Tensor:
    """Rotate vectors.

    Args:
        q: [..., 4], unit quaternion.
        v: [..., 3], vectors.

    Returns:
        [..., 3], R(q) v.

    Example:
        >>> turn = quat_exp(torch.tensor([0.0, 0.0, torch.pi], dtype=torch.float64))
        >>> quat_rotate(turn, torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)).round()[0].item()
        -1.0
    """
    real = q[..., :1]
    imag, v = torch.broadcast_tensors(q[..., 1:], v)
    double_cross = 2 * torch.linalg.cross(imag, v)
    return v + real * double_cross + torch.linalg.cross(imag, double_cross)


# The sphere S³ of unit quaternions. In this section q and -q are different points.


def quat_derivative(q: Tensor, omega: Tensor) -> Tensor:
    """q̇ = ½ q ⊗ ω, [..., 4]: the velocity on S³ of a rotation q with angular velocity ω.

    Args:
        q: [..., 4].
        omega: [..., 3], rad per unit time, in the rotated frame.
    """
    half_omega = torch.cat([torch.zeros_like(omega[..., :1]), omega / 2], dim=-1)  # (0, ω/2)
    return quat_multiply(q, half_omega)


def sphere_exp(q: Tensor, velocity: Tensor) -> Tensor:
    """Follow the great circle from q with the tangent vector `velocity` for unit time, [..., 4].

    With velocity = q̇ Δτ this is the paper's integration step q ⊗ [cos(Δφ/2), ω̂ sin(Δφ/2)], where
    Δφ = ‖ω‖ Δτ. The code needs no quaternion product: it computes cos(Δφ/2) q + sin(Δφ/2) v/‖v‖,
    where v is the tangential part of the velocity, and ‖v‖ = Δφ/2.
    """
    radial_speed = (velocity * q).sum(-1, keepdim=True)
    tangent = velocity - radial_speed * q
    cos, sinc = _cos_sinc((tangent * tangent).sum(-1, keepdim=True))
    return cos * q + sinc * tangent


def sphere_log(q: Tensor, target: Tensor) -> Tensor:
    """The tangent vector v at q with `sphere_exp(q, v) = target`, [..., 4], of norm in [0, π].

    For an antipodal pair every direction leads to the target. The result then has the direction of
    q ⊗ i (i is the imaginary unit of x), so that the result is unique and finite.
    """
    return quat_derivative(q, sphere_angular_velocity(q, target))


def sphere_slerp(q: Tensor, target: Tensor, fraction: float) -> Tensor:
    """The point at a fraction of the shorter great-circle arc from q to `target`, [..., 4].

    The point is `sphere_exp(q, fraction * sphere_log(q, target))`, computed as cos(φ) q + sin(φ) u,
    where φ is the arc from q to the point, and u the unit tangent. For an antipodal pair the
    direction u is unknown, and the result is ±q.
    The point's norm is 1 even if rounding errors lengthened the arguments.
    """
    cosine = (q * target).sum(-1, keepdim=True)
    tangent = target - cosine * q
    sine = torch.linalg.vector_norm(tangent, dim=-1, keepdim=True)
    angle = fraction * torch.atan2(sine, cosine)
    safe_sine = sine.clamp_min(torch.finfo(q.dtype).tiny)
    point = torch.cos(angle) * q + torch.sin(angle) / safe_sine * tangent
    return nn.functional.normalize(point, dim=-1)


def sphere_angular_velocity(q: Tensor, target: Tensor) -> Tensor:
    """The angular velocity ω [..., 3] that turns q into `target` in unit time, by the shorter arc.

    The norm of ω is in [0, 2π] rad. The arc ends at `target` itself, while the rotation vector
    `quat_log(q* ⊗ target)`, of norm ≤ π, may lead to -target.
    """
    return _double_log(quat_multiply(quat_conjugate(q), target))


# Conversion to and from rotation matrices, Euler angles, and the 6D form.


def quat_to_matrix(q: Tensor) -> Tensor:
    """Unit quaternion [..., 4] to rotation matrix [..., 3, 3]."""
    w, x, y, z = q.unbind(-1)
    entries = [  # row by row
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(entries, dim=-1).unflatten(-1, (3, 3))


def matrix_to_quat(matrix: Tensor) -> Tensor:
    """Rotation matrix [..., 3, 3] or pose [..., 4, 4] to canonical unit quaternion [..., 4],
    accurate for every rotation."""
    xx, m01, m02, m10, yy, m12, m20, m21, zz = matrix[..., :3, :3].flatten(-2).unbind(-1)
    # Products of two components of q = (w, x, y, z), times 4. The diagonal gives the squares below.
    wx = m21 - m12
    wy = m02 - m20
    wz = m10 - m01
    xy = m01 + m10
    xz = m02 + m20
    yz = m12 + m21
    # The outer product 4 q qᵀ. Each of its rows is a multiple of q: the first is 4 w q. We take the
    # longest row, that of the largest component of q, because it never vanishes.
    outer = torch.stack(
        [
            1 + xx + yy + zz, wx, wy, wz,
            wx, 1 + xx - yy - zz, xy, xz,
            wy, xy, 1 - xx + yy - zz, yz,
            wz, xz, yz, 1 - xx - yy + zz,
        ],
        dim=-1,
    ).unflatten(-1, (4, 4))  # fmt: skip
    longest_row = outer.diagonal(dim1=-2, dim2=-1).argmax(-1)  # [...]
    gather_index = longest_row[..., None, None].expand(*longest_row.shape, 1, 4)  # [..., 1, 4]
    multiple_of_q = outer.gather(-2, gather_index).squeeze(-2)  # [..., 4]
    return quat_canonical(quat_normalize(multiple_of_q))


def euler_to_quat(angles: Tensor, convention: EulerConvention | Literal["zxy"]) -> Tensor:
    """Convert Euler angles to a unit quaternion.

    Args:
        angles: [..., 3], angles about x, y and z, rad.
        convention: see `EulerConvention` for "xyz" and "XYZ"; "zxy" is R = Ry Rx Rz.

    Returns:
        [..., 4], canonical: w is not negative.

    Example:
        >>> euler_to_quat(torch.tensor([0.0, 0.0, torch.pi / 2]), "xyz")
        tensor([0.7071, 0.0000, 0.0000, 0.7071])
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
    first, second, third = factors[convention]  # of the product, from left to right
    return quat_canonical(quat_multiply(quat_multiply(first, second), third))


def quat_to_euler(q: Tensor, convention: EulerConvention) -> Tensor:
    """Unit quaternion [..., 4] to angles about x, y and z [..., 3], rad; y is in [-π/2, π/2].

    Where y = ±π/2 (gimbal lock) only a combination of the other two angles is determined, and z is
    set to 0. `euler_to_quat` of the angles always returns the rotation of q.
    """
    check_known("Euler convention", get_args(EulerConvention), convention)
    if convention == "XYZ":
        # The transpose of Rx(a) Ry(b) Rz(c) is Rz(-c) Ry(-b) Rx(-a), which is the other convention.
        return -quat_to_euler(quat_conjugate(q), "xyz")
    # The first column of Rz(yaw) Ry(pitch) Rx(roll) is (cos(yaw) cos(pitch), sin(yaw) cos(pitch),
    # -sin(pitch)).
    m = quat_to_matrix(q)
    abs_cos_pitch = torch.hypot(m[..., 0, 0], m[..., 1, 0]).detach()
    # A smaller cos(pitch) is rounding noise, from which no yaw can be read.
    is_locked = abs_cos_pitch < 8 * torch.finfo(q.dtype).eps
    yaw_sine = torch.where(is_locked, torch.zeros_like(m[..., 1, 0]), m[..., 1, 0])
    yaw_cosine = torch.where(is_locked, torch.ones_like(m[..., 0, 0]), m[..., 0, 0])
    yaw = torch.atan2(yaw_sine, yaw_cosine)

    # Pitch and roll are read off Rz(-yaw) R = Ry(pitch) Rx(roll). Because the computed yaw is
    # undone there, its rounding error does not add to the error of the whole rotation.
    cos = torch.cos(yaw)
    sin = torch.sin(yaw)
    cos_pitch = cos * m[..., 0, 0] + sin * m[..., 1, 0]
    pitch = torch.atan2(-m[..., 2, 0], cos_pitch)
    # The second row of this product is (0, cos(roll), -sin(roll)). In Rz(-yaw) R it is
    # -sin · (first row of R) + cos · (second row of R).
    sin_roll = sin * m[..., 0, 2] - cos * m[..., 1, 2]
    cos_roll = cos * m[..., 1, 1] - sin * m[..., 0, 1]
    roll = torch.atan2(sin_roll, cos_roll)
    return torch.stack([roll, pitch, yaw], dim=-1)


def quat_to_6d(q: Tensor) -> Tensor:
    """Unit quaternion [..., 4] to the first two columns of its matrix, concatenated, [..., 6]."""
    first_two_columns = quat_to_matrix(q)[..., :2]  # [..., 3, 2]
    return first_two_columns.mT.flatten(-2)


# Poses: a position [..., 3] in meters and a rotation [..., 4].


def pose_compose(
    position: Tensor, rotation: Tensor, inner_position: Tensor, inner_rotation: Tensor
) -> tuple[Tensor, Tensor]:
    """Express the inner pose, given in the frame of (position, rotation), in the outer frame."""
    composed_position = position + quat_rotate(rotation, inner_position)
    return composed_position, quat_multiply(rotation, inner_rotation)


def pose_inverse(position: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """The pose of the outer frame in the frame of (position, rotation)."""
    inverse_rotation = quat_conjugate(rotation)
    return -quat_rotate(inverse_rotation, position), inverse_rotation


def action_between_poses(
    position: Tensor, rotation: Tensor, next_position: Tensor, next_rotation: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the action that leads from one end-effector pose to the next, in the paper's frames.

    That an action is the difference between poses one step apart is our reading of the paper.

    Args:
        position: [..., 3], base frame, m.
        rotation: [..., 4], unit quaternion, base frame.
        next_position: [..., 3], one step later.
        next_rotation: [..., 4], one step later.

    Returns:
        The translation [..., 3] in the base frame (m), with x' = x + translation; and the canonical
        rotation [..., 4] in the end-effector frame, with R' = R · R(rotation). Here x and R are the
        pose, and x' and R' the next pose.

    Example:
        >>> upright = torch.tensor([1.0, 0.0, 0.0, 0.0])
        >>> higher = torch.tensor([0.0, 0.0, 0.1])
        >>> action_between_poses(torch.zeros(3), upright, higher, upright)
        (tensor([0.0000, 0.0000, 0.1000]), tensor([1., 0., 0., 0.]))
    """
    translation = next_position - position
    step_rotation = quat_multiply(quat_conjugate(rotation), next_rotation)
    return translation, quat_canonical(step_rotation)


def apply_action(
    position: Tensor, rotation: Tensor, translation: Tensor, step_rotation: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the pose that an action leads to; the inverse of `action_between_poses`.

    Args:
        position: [..., 3], base frame, m.
        rotation: [..., 4], unit quaternion, base frame.
        translation: [..., 3], of the action, base frame, m.
        step_rotation: [..., 4], of the action, end-effector frame.

    Returns:
        The next position [..., 3] and the next rotation [..., 4], which is canonical.

    Example:
        >>> upright = torch.tensor([1.0, 0.0, 0.0, 0.0])
        >>> apply_action(torch.zeros(3), upright, torch.tensor([0.0, 0.0, 0.1]), upright)
        (tensor([0.0000, 0.0000, 0.1000]), tensor([1., 0., 0., 0.]))
    """
    next_rotation = quat_multiply(rotation, step_rotation)
    return position + translation, quat_canonical(quat_normalize(next_rotation))


def _cos_sinc(square: Tensor) -> tuple[Tensor, Tensor]:
    """cos(a) and sin(a)/a of a² = square. As functions of the square both are smooth at 0.

    In each `torch.where` the branch that is not used gets a harmless argument (1 or 0), because an
    infinite gradient there would make the result's gradient NaN.
    """
    is_small = square < _MAX_SQUARE_FOR_SERIES
    angle = torch.sqrt(torch.where(is_small, 1, square))
    x = torch.where(is_small, square, 0)
    # Taylor series in a² by Horner's rule.
    cos_series = 1 - x / 2 * (1 - x / 12 * (1 - x / 30))
    sinc_series = 1 - x / 6 * (1 - x / 20 * (1 - x / 42))
    cos = torch.where(is_small, cos_series, torch.cos(angle))
    sinc = torch.where(is_small, sinc_series, torch.sin(angle) / angle)
    return cos, sinc


def _double_log(q: Tensor) -> Tensor:
    """2 log(q) of a unit quaternion, [..., 3], of norm in [0, 2π].

    At q = -1 every vector of norm 2π is right, and the result is (2π, 0, 0). As in `_cos_sinc`, the
    branches of `torch.where` that are not used get harmless arguments.
    """
    w = q[..., :1]
    imag = q[..., 1:]
    square = (imag * imag).sum(-1, keepdim=True)
    is_near_identity = (square < _MAX_SQUARE_FOR_SERIES * w * w) & (w > 0)
    # So close to q = -1 that the direction of `imag` is rounding noise, with an unbounded gradient.
    is_antipode = (square <= (4 * torch.finfo(q.dtype).eps) ** 2) & (w <= 0)

    # Half the angle divided by ‖imag‖: near the identity a series of atan(‖imag‖ / w) / ‖imag‖,
    # elsewhere the quotient itself.
    w_near = torch.where(is_near_identity, w, 1)
    x = torch.where(is_near_identity, square, 0) / (w_near * w_near)
    series = (1 - x * (1 / 3 - x * (1 / 5 - x / 7))) / w_near

    length = torch.sqrt(torch.where(is_near_identity | is_antipode, 1, square))
    quotient = torch.atan2(length, torch.where(is_near_identity, 1, w)) / length
    half_angle_per_length = torch.where(is_near_identity, series, quotient)

    full_turn = nn.functional.pad(torch.full_like(w, 2 * math.pi), (0, 2))  # (2π, 0, 0)
    return torch.where(is_antipode, full_turn, 2 * half_angle_per_length * imag)
