"""The faces of a box-shaped thing: its axes and where its faces lie, from all points on them.

A box around points hangs on the outermost few, which noise moves most. Of a thing with flat faces every point
says where its face is: axes and faces are those from which the points are least far, found by Gauss-Newton
from a first guess, with less weight for points that lie on no face. Our choice.
"""

import math
from dataclasses import dataclass

import numpy as np

from spear.types import Array

STEPS = 8
ENOUGH = 2e-3
"""rad: the last turn is smaller."""
LEAST = 0.08
"""A face with a smaller share of the points is not taken for one."""
_EYE = np.eye(3)
_CROSS = np.cross(_EYE[:, None], _EYE).transpose(2, 1, 0)
"""[k, j, i]: part k of (axis i × axis j) of the camera's frame."""


@dataclass(frozen=True)
class Faces:
    """Axes [3, 3] (columns) and the faces that the camera sees: for each axis, where along it its face is
    (`at` [3], NaN without one) and on which side of the points (`side` [3], -1 lower, 1 upper).

    misfit  mean distance of the points from the nearest face; infinite where no face is seen.
    """

    axes: Array
    at: Array
    side: Array
    misfit: float


def faces(points: Array, axes: Array, about: Array | None = None) -> Faces:
    """The faces of points [n, 3] (camera frame) whose axes are near `axes` [3, 3] (columns).

    about: [3] the only direction about which the axes may turn; any where it is None.
    """
    middle = points.mean(axis=0)
    centred = points - middle
    free = _EYE if about is None else np.asarray(about, np.float64)[:, None]
    along = centred @ axes
    low, high = np.quantile(along, (0.02, 0.98), axis=0)
    camera = -middle @ axes  # where it is along each axis
    side = np.where(camera > (low + high) / 2, 1.0, -1.0)
    at = np.where(side > 0, high, low)
    seen = np.abs(camera - (low + high) / 2) > 0.5 * (high - low)
    if not seen.any():
        return Faces(axes, np.full(3, np.nan), side, np.inf)
    every, half = np.arange(len(points)), len(points) // 2
    turn = np.ones(3)
    for step in range(STEPS + 1):
        off = np.where(seen, along - at, np.inf)
        nearest = np.abs(off).argmin(axis=1)
        error = off[every, nearest]
        if step == STEPS or float(turn @ turn) < ENOUGH**2:
            break
        # np.median without its checks, which cost more than the rest of it.
        scale = 2.0 * float(np.partition(np.abs(error), half)[half]) + 1e-6
        weight = 1.0 / (1.0 + (error / scale) ** 2)
        # How far each point moves along its axis when the axes turn: axis × point, of all three axes at once.
        moved = centred @ (_CROSS @ axes).transpose(1, 2, 0).reshape(3, 9)
        turned = moved.reshape(-1, 3, 3)[every, nearest] @ free  # [n, 1 or 3]
        slope = np.concatenate([turned, -_EYE[nearest]], axis=1)
        weighted = (slope * weight[:, None]).T
        normal = weighted @ slope
        normal.flat[:: len(normal) + 1] += 1e-6 * normal.trace()
        change = np.linalg.solve(normal, -weighted @ error)
        turn = free @ change[:-3]
        turn *= min(1.0, 0.2 / max(math.sqrt(turn @ turn), 1e-9))
        axes = _rotation(turn) @ axes
        at = at + change[-3:]
        along = centred @ axes
    share = np.bincount(nearest, minlength=3) / len(points)
    found = np.where(seen & (share >= LEAST), at + middle @ axes, np.nan)
    return Faces(axes, found, side, float(np.abs(error).mean()))


def _rotation(turn: Array) -> Array:
    """Rodrigues' formula: the matrix [3, 3] of a rotation vector [3], rad. (SciPy's checks cost more than
    the rest of a step.)"""
    angle = math.sqrt(turn @ turn)
    cross = _CROSS @ turn
    rise, bend = (math.sin(angle) / angle, (1 - math.cos(angle)) / angle**2) if angle > 1e-9 else (1.0, 0.5)
    return _EYE + rise * cross + bend * (cross @ cross)
