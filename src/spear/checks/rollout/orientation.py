"""Other variants in which a robot may send its orientation, and which of them fits the training.

Thresholds are chosen on rollouts and demonstrations of nano in the simulator.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
import torch

from spear.checks.rollout.episode import RecordedEpisode
from spear.geometry import EulerConvention, euler_to_quat, quat_to_euler
from spear.types import Array

MAX_COMPARED_ROTATIONS = 1500  # of the demonstrations
NUM_FIRST_STEPS = 3  # steps at the start of each episode of the rollout that are compared
MIN_EPISODES = 4  # demonstrations, with fewer their orientations are no measure
# Distances from a rollout's orientations to the nearest of training, beyond those between training
# episodes themselves.
MIN_OUTSIDE_RAD = np.radians(20)  # as they are sent, they must be farther than this
MAX_INSIDE_RAD = np.radians(8)  # in the other variant, they must be nearer than this

SENT_AS_XYZW = "x y z w"
REORDERED_TWICE = "w x y z reordered once too often"
QUATERNION_VARIANTS = (SENT_AS_XYZW, REORDERED_TWICE)
"""Mistakes with the order of a quaternion's numbers, which should be sent as w x y z, in words.

"x y z w" is a quaternion that was never brought into our order. The other variant was w x y z
already, and was then reordered as if it had been x y z w.
"""


class EulerVariant(NamedTuple):
    """Angles that are written by one convention and read by another one.

    written      the convention of the angles that the robot means.
    read         the convention by which a quaternion was made of them.
    is_reversed  whether the three angles were given in the opposite order.
    """

    written: EulerConvention
    read: EulerConvention
    is_reversed: bool


CONVENTIONS: tuple[EulerConvention, ...] = ("xyz", "XYZ")


def _list_euler_variants() -> dict[str, EulerVariant]:
    """List every mistake with angles, by its name in words."""
    variants = {}
    for written, read, is_reversed in product(CONVENTIONS, CONVENTIONS, (False, True)):
        is_mistake = written != read or is_reversed
        if is_mistake:
            name = f"angles {written} read as {read}"
            if is_reversed:
                name += " in reverse order"
            variants[name] = EulerVariant(written, read, is_reversed)
    return variants


EULER_VARIANTS = _list_euler_variants()
"""Every mistake with angles, by its name in words."""


@dataclass(frozen=True)
class OrientationFit:
    """How near orientations are to those of training, in one variant.

    variant   how the orientation may have been sent; "plain" is the right variant.
    distance  median angle from an orientation of the rollout to the nearest one of training, rad.
    typical   median angle from an orientation of every second training episode to the nearest one
              of the other training episodes, rad.
    """

    variant: str
    distance: float
    typical: float


def undo_variant(rotation: Array, variant: str) -> Array:
    """Return the orientations [T, 4] that are meant, if they were sent in another variant."""
    quats = torch.as_tensor(np.asarray(rotation, np.float64))
    if variant == SENT_AS_XYZW:
        return quats.roll(1, dims=-1).numpy()  # the numbers were sent as x y z w
    if variant == REORDERED_TWICE:
        return quats.roll(-1, dims=-1).numpy()  # the numbers were sent as z w x y
    if variant in EULER_VARIANTS:
        euler_variant = EULER_VARIANTS[variant]
        angles = quat_to_euler(quats, euler_variant.read)
        if euler_variant.is_reversed:
            angles = angles.flip(-1)
        return euler_to_quat(angles, euler_variant.written).numpy()
    return quats.numpy()


def apply_euler_variant(rotation: Array, variant: str) -> Array:
    """Return rotations [T, 4] as a mistake with angles, one of `EULER_VARIANTS`, changes them."""
    euler_variant = EULER_VARIANTS[variant]
    angles = quat_to_euler(torch.as_tensor(np.asarray(rotation)), euler_variant.written)
    if euler_variant.is_reversed:
        angles = angles.flip(-1)
    return euler_to_quat(angles, euler_variant.read).numpy()


def fit_orientations(
    rollout: Sequence[RecordedEpisode], demonstrations: Sequence[RecordedEpisode]
) -> list[OrientationFit]:
    """Compare the orientations of a rollout with training in every variant, the nearest first.

    Returns an empty list with too few demonstrations.
    """
    if len(demonstrations) < MIN_EPISODES or not rollout:
        return []
    # Later states depend on what the policy made of the first ones.
    sent_rotations = np.concatenate([episode.rotation[:NUM_FIRST_STEPS] for episode in rollout])
    training_rotations = np.concatenate([episode.rotation for episode in demonstrations])
    stride = math.ceil(len(training_rotations) / MAX_COMPARED_ROTATIONS)
    first_half = np.concatenate([e.rotation for e in demonstrations[::2]])[::stride]
    second_half = np.concatenate([e.rotation for e in demonstrations[1::2]])[::stride]
    typical = float(np.median(_measure_nearest_angles_rad(first_half, second_half)))
    fits = []
    for variant in ("plain", *QUATERNION_VARIANTS, *EULER_VARIANTS):
        meant_rotations = undo_variant(sent_rotations, variant)
        distances = _measure_nearest_angles_rad(meant_rotations, training_rotations[::stride])
        fits.append(OrientationFit(variant, float(np.median(distances)), typical))
    return sorted(fits, key=lambda fit: fit.distance)


def find_likely_variant(
    fits: Sequence[OrientationFit], variants: Collection[str]
) -> OrientationFit | None:
    """Return the variant in which orientations are like training, if they are not as they are sent.

    Args:
        fits: what `fit_orientations` returned.
        variants: the variants that count.
    """
    if not fits or fits[0].variant not in variants:
        return None
    best = fits[0]
    plain = next(fit for fit in fits if fit.variant == "plain")
    is_outside = plain.distance > plain.typical + MIN_OUTSIDE_RAD
    is_inside = best.distance < best.typical + MAX_INSIDE_RAD
    return best if is_outside and is_inside else None


def _measure_nearest_angles_rad(rotation: Array, reference: Array) -> Array:
    """Return the angle [T] from each orientation [T, 4] to the nearest of `reference` [N, 4]."""
    cosines = np.abs(np.asarray(rotation) @ np.asarray(reference).T).max(1)
    return 2 * np.arccos(np.minimum(cosines, 1.0))
