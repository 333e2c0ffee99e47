"""Are the recorded states plausible by themselves: positions, orientations, and how fast the arm
moves?

All thresholds are our choice.
"""

from collections.abc import Sequence

import numpy as np

from spear.checks.recording import Recording, are_degrees
from spear.checks.result import Check, Verdict
from spear.types import MAX_EE_SPEED_M_S, Array, Episode
from spear.util.units import LENGTH_UNITS

MIN_REACH_M = 0.03  # every arm moves its end effector farther from its base than this
MAX_REACH_M = 3.0  # no arm reaches farther from its base
MIN_TOP_SPEED_M_S = 0.03  # the fastest 1 % of a demonstration's steps are faster than this
MAX_TOP_SPEED_M_S = 1.0  # 99 % of a demonstration's steps are slower than this


def find_state_problems(recordings: Sequence[Recording | Episode]) -> list[str]:
    """Return what is wrong with the recorded states by themselves, one remark per problem.

    Positions are taken for meters, and angles for radians, as the layout says.
    """
    remarks = []
    position_remark = explain_implausible_positions([r.position for r in recordings])
    if position_remark is not None:
        remarks.append(f"{position_remark} (length_unit)")
    rotation = np.concatenate([r.rotation for r in recordings])
    if are_degrees(rotation):
        remarks.append(
            f"orientations go up to {np.abs(rotation).max():.4g}, which are degrees, where the "
            "layout has radians (angle_unit)"
        )
    return remarks


def explain_implausible_positions(positions: Sequence[Array]) -> str | None:
    """Say what is wrong with positions if they are taken for meters; None if they may be.

    Args:
        positions: [T, 3] end-effector positions of each episode, base frame.
    """
    distances_m = np.linalg.norm(np.concatenate(positions), axis=1)
    reach_m = float(np.quantile(distances_m, 0.95))
    if reach_m > MAX_REACH_M:
        unit = find_plausible_length_unit(reach_m) or "another unit"
        return f"positions are up to {reach_m:.4g} from the base, which are not meters, but {unit}"
    if reach_m < MIN_REACH_M:
        return (
            f"positions are up to {reach_m:.2g} m from the base, which may be steps, or another "
            "unit"
        )
    return None


def find_plausible_length_unit(reach: float) -> str | None:
    """Find the first length unit by which an arm can go `reach` from its base.

    Args:
        reach: distance from the base, in the unit that is sought.

    Returns:
        The unit's name; None if the distance is implausible in every unit.
    """
    for unit, factor in LENGTH_UNITS.items():
        if reach * factor <= MAX_REACH_M:
            return unit
    return None


def examine_speeds(recordings: Sequence[Recording]) -> list[Check]:
    """Look for implausible speeds: an arm that moves much faster, or slower, than arms do.

    A wrong rate (`rate_hz` of the layout) shows nowhere but in implausible speeds.
    """
    velocities = [np.diff(r.position, axis=0) * r.rate_hz for r in recordings]
    speeds_m_s = np.linalg.norm(np.concatenate(velocities), axis=1)
    top_speed_m_s = float(np.quantile(speeds_m_s, 0.99))
    if MIN_TOP_SPEED_M_S <= top_speed_m_s <= MAX_TOP_SPEED_M_S:
        return []
    verdict: Verdict = "wrong" if top_speed_m_s > MAX_EE_SPEED_M_S else "cannot tell"
    words = f"by this rate the arm moves at up to {top_speed_m_s:.2g} m/s, as few arms do"
    return [Check("rate_hz", verdict, words)]
