"""Findings about the variant of orientations, which two checks share."""

from collections.abc import Collection

import numpy as np

from spear.checks.rollout.action_frame import ROBOT_FILE
from spear.checks.rollout.case import Case, Doubt, Figure, Finding, Result
from spear.checks.rollout.motion import COMMANDS, STATES
from spear.checks.rollout.motion_figures import draw_turn_reading_errors
from spear.checks.rollout.orientation import find_likely_variant, fit_orientations


def examine_orientations_by_training(case: Case, variants: Collection[str], cure: str) -> Result:
    """Look for orientations that were sent in one of some other variants."""
    fits = fit_orientations(case.rollout, case.demonstrations)
    if not fits:
        return Doubt("too few demonstrations to know the usual orientations")
    best = find_likely_variant(fits, variants)
    if best is None:
        return None
    plain = next(fit for fit in fits if fit.variant == "plain")
    bars = []
    for fit in fits:
        bars.append(
            (fit.variant, float(np.degrees(fit.distance)), f"{np.degrees(fit.distance):.0f}°")
        )
    return Finding(
        confidence=0.93,
        evidence=(
            f"the orientations are {np.degrees(plain.distance):.0f}° from the nearest of training; "
            f"taken for {best.variant}, {np.degrees(best.distance):.0f}° (between training "
            f"episodes {np.degrees(best.typical):.0f}°)"
        ),
        cure=cure,
        file=f"observe in your robot's file, and {ROBOT_FILE}",
        figure=Figure("distance to the nearest orientation of training", bars=bars),
    )


def examine_turn_variants(case: Case, variants: Collection[str], cure: str) -> Finding | None:
    """Look for moves that rotate as commanded, if orientations are in one of some variants."""
    motion = case.motion
    reading = motion.better_turn_reading
    if reading is None or not reading.startswith((COMMANDS, STATES)):
        return None
    prefix, variant = reading.split(" ", 1)
    if variant not in variants:
        return None
    errors = motion.turn_errors_rad
    subject = "the robot executes rotations as"
    if prefix == STATES:
        subject = "the robot measures its orientation as"
    return Finding(
        confidence=0.94,
        evidence=(
            f"{subject} {variant}: then the moves differ from their commands by "
            f"{np.degrees(errors[reading].mean()):.1f}°, otherwise by "
            f"{np.degrees(errors['plain'].mean()):.1f}°"
        ),
        cure=cure,
        file=f"observe in your robot's file, and {ROBOT_FILE}",
        figure=draw_turn_reading_errors(motion),
    )
