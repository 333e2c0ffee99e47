"""`MotionCheck`: what the checks of commanded and achieved motion share."""

from spear.checks.rollout.case import Case, Doubt, Result, RolloutCheck
from spear.checks.rollout.motion import MIN_COMMAND_M, MIN_MOVES, RolloutMotion


class MotionCheck(RolloutCheck):
    """A check of how the arm moves, which needs `MIN_MOVES` moves that are long enough."""

    def examine(self, case: Case) -> Result:
        motion = case.motion
        if motion.num_commanded_moves < MIN_MOVES:
            return Doubt(
                f"only {motion.num_commanded_moves} moves were commanded to be longer than "
                f"{1000 * MIN_COMMAND_M:.0f} mm; {MIN_MOVES} are needed"
            )
        return self.examine_motion(motion)

    def examine_motion(self, motion: RolloutMotion) -> Result:
        """Look for the fault in enough moves."""
        raise NotImplementedError
