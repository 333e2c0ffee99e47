"""Figures of commanded and achieved motion."""

from collections.abc import Mapping

import numpy as np

from spear.checks.rollout.case import Curve, Figure
from spear.checks.rollout.motion import PLAIN, Reading, RolloutMotion

MAX_CURVE_MOVES = 120  # moves that a figure shows
FRAME_NAMES = {"base": "base frame", "tool": "tool's frame", "inverse tool": "inverted tool frame"}


def describe_reading(reading: Reading) -> str:
    """Name a reading of the actions."""
    name = FRAME_NAMES.get(reading.frame, reading.frame)
    if reading.signs == PLAIN.signs:
        return name
    return f"{name} with signs {reading.signs}"


def draw_reading_errors(motion: RolloutMotion) -> Figure:
    """Draw the share of the motion that the best readings, and the plain one, do not explain."""
    bars = []
    for fit in motion.fits[:6]:
        bars.append((describe_reading(fit.reading), fit.error, f"{fit.error:.0%}"))
    plain = motion.fit_of(PLAIN)
    if all(fit.reading != PLAIN for fit in motion.fits[:6]):
        bars.append((describe_reading(PLAIN), plain.error, f"{plain.error:.0%}"))
    return Figure("motion that each reading of the actions leaves unexplained", bars=bars)


def draw_unexplained_shares(errors: Mapping[str, float]) -> Figure:
    """Draw the share of the motion that each of some explanations leaves unexplained."""
    bars = [(name, error, f"{error:.0%}") for name, error in errors.items()]
    return Figure("motion that stays unexplained", bars=bars)


def draw_move_gains(motion: RolloutMotion) -> Figure:
    """Draw how much of each commanded displacement was achieved."""
    gains = motion.move_gains[motion.is_move_commanded][:MAX_CURVE_MOVES]
    moves = np.arange(len(gains))
    return Figure(
        "achieved per commanded displacement",
        "move",
        [Curve("achieved / commanded", moves, gains), Curve("1", moves, np.ones(len(gains)))],
    )


def draw_turn_reading_errors(motion: RolloutMotion) -> Figure:
    """Draw how far the rotations are off by each reading, the nearest first."""
    means = {name: float(np.degrees(e.mean())) for name, e in motion.turn_errors_rad.items()}
    nearest = sorted(means, key=lambda name: means[name])[:6]
    bars = [(name, means[name], f"{means[name]:.1f}°") for name in nearest]
    return Figure("distance from the achieved rotation, per move", bars=bars)
