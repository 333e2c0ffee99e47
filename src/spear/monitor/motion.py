"""Checks of whether one robot executes its actions, from one observation to the next.

A robot is sent a chunk of H actions and executes some of them before it sends its next observation.
How many it executes is unknown here.
"""

import zlib
from collections.abc import Iterator, Mapping

import numpy as np

from spear.checks.frozen import MIN_FROZEN_MOTION_M, RepeatedPicture
from spear.checks.gripper import are_opposite
from spear.monitor.observations import Finding
from spear.types import Array

NUM_STEPS = 64  # observations after which the gripper, and the axes of the motion, are judged
MAX_OPPOSITE_SHARE = 0.5  # a gripper that is the opposite of more commands than this is inverted
# An arm that moved farther than its longest possible path · ratio + margin did not move by its
# actions: somebody else moved it, or the state is that of another arm.
MAX_OVERSHOOT_RATIO = 1.5
OVERSHOOT_MARGIN_M = 0.02
MIN_MOTION_M = 0.003  # a shorter motion has no reliable direction
MIN_AXES_GAIN = 0.4  # gain in the mean cosine (`MotionAxesCheck`) above which axes are reported


class FrozenCameraCheck:
    """Finds a camera whose image stays the very same while the arm moves."""

    def __init__(self) -> None:
        self._cameras: dict[str, RepeatedPicture] = {}

    def examine(self, state: Array, images: Mapping[str, Array]) -> Iterator[Finding]:
        """Check one observation.

        Args:
            state: [8] state.
            images: camera → image as the model sees it.
        """
        for camera, pixels in images.items():
            repeated_picture = self._cameras.setdefault(camera, RepeatedPicture())
            checksum = zlib.crc32(pixels.data)
            distance_m = repeated_picture.add_step_and_measure_motion_m(checksum, state[:3])
            if distance_m > MIN_FROZEN_MOTION_M:
                yield Finding(
                    f"frozen {camera}",
                    f"camera {camera!r} sends the very same picture after {distance_m:.2f} m of "
                    "motion. Check that it is not frozen.",
                )


class FrozenStateCheck:
    """Finds a state that stays the very same although the arm is commanded to move."""

    def __init__(self) -> None:
        # Length of the actions that were sent since the state last changed.
        self._commanded_m: float | np.floating = 0.0

    def examine(self, is_same_state: bool, chunk: Array) -> Iterator[Finding]:
        """Check whether the state changed after a chunk was sent, and add up the commanded motion.

        Args:
            is_same_state: whether the new state equals the state before the chunk.
            chunk: [H, 8] the actions. Only the first one counts, because more may not have been
                executed.
        """
        previous_m = self._commanded_m
        first_action_m = np.linalg.norm(chunk[0, :3])
        if is_same_state:
            self._commanded_m = previous_m + first_action_m
        else:
            self._commanded_m = 0.0
        # Report once, when the sum passes the limit.
        if previous_m <= MIN_FROZEN_MOTION_M < self._commanded_m:
            yield Finding(
                "state",
                f"the state has not changed, though actions of {self._commanded_m:.2f} m were "
                "sent. Check that the robot sends its state of now.",
            )


class GripperCheck:
    """Finds a gripper that mostly does the opposite of its commands."""

    def __init__(self) -> None:
        self._were_opposite: list[bool] = []  # one entry per compared opening

    def examine(self, opening: float, chunk: Array) -> Iterator[Finding]:
        """Collect the gripper opening after the robot executed some actions of a chunk [H, 8].

        The first `NUM_STEPS` openings are judged together.
        """
        commands = chunk[:, 7]
        # Which of the commands were executed is unknown, so chunks that change it are not compared.
        is_one_command = np.ptp(commands) < 0.5  # commands are near 0 or near 1
        if not is_one_command or len(self._were_opposite) == NUM_STEPS:
            return
        self._were_opposite.append(bool(are_opposite(opening, commands.mean())))
        is_complete = len(self._were_opposite) == NUM_STEPS
        if is_complete and sum(self._were_opposite) > MAX_OPPOSITE_SHARE * NUM_STEPS:
            yield Finding(
                "gripper",
                "the gripper does the opposite of its commands. Send 1 for open and 0 for closed, "
                "and read the commands in the same way.",
            )


class MotionAxesCheck:
    """Finds an arm that moves along other axes than those of its commands.

    For the direction d in which the arm moved and the direction c that was commanded, the outer
    product d ⊗ c says which commanded axis led to which axis of the motion.
    """

    def __init__(self) -> None:
        self._direction_products: list[Array] = []  # d ⊗ c, [3, 3] each

    def examine(self, displacement: Array, paths: Array) -> Iterator[Finding]:
        """Collect in which direction the arm moved.

        The first `NUM_STEPS` motions are judged together.

        Args:
            displacement: [3] how far the arm moved between two observations, m.
            paths: [H, 3] how far the first 1, 2, … H actions of the chunk lead, m.
        """
        if len(self._direction_products) == NUM_STEPS:
            return
        product = self._compute_direction_product(displacement, paths)
        if product is None:
            return
        self._direction_products.append(product)
        if len(self._direction_products) < NUM_STEPS:
            return
        axes = self._find_better_axes(np.mean(self._direction_products, axis=0))
        if axes is not None:
            yield Finding(
                "arm",
                f"the arm goes along {axes} where the actions go along x y z. Check the frames of "
                "its state and its commands.",
            )

    @staticmethod
    def _compute_direction_product(displacement: Array, paths: Array) -> Array | None:
        """Compute d ⊗ c [3, 3] of one motion; None if the arm hardly moved.

        How many of the actions were executed is unknown. The path is assumed whose length is
        nearest to the length of the motion.
        """
        distance = np.linalg.norm(displacement)
        path_lengths = np.linalg.norm(paths, axis=1)  # [H]
        nearest = np.abs(path_lengths - distance).argmin()
        if min(distance, path_lengths[nearest]) <= MIN_MOTION_M:
            return None
        return np.outer(displacement / distance, paths[nearest] / path_lengths[nearest])

    @staticmethod
    def _find_better_axes(mean_product: Array) -> str | None:
        """Name the axes that explain the motion much better than x, y, z do; None if none do.

        The rotation or reflection R that turns commands best into motions maximizes the mean cosine
        of d and R c (the orthogonal Procrustes problem). The singular value decomposition of the
        mean of d ⊗ c gives R = U Vᵀ, and the sum of the singular values is that mean cosine. The
        trace of the mean of d ⊗ c is the mean cosine without any rotation.
        """
        left_vectors, singular_values, right_vectors = np.linalg.svd(mean_product)
        best_cosine = singular_values.sum()
        plain_cosine = np.trace(mean_product)
        if best_cosine - plain_cosine <= MIN_AXES_GAIN:
            return None
        rotation = left_vectors @ right_vectors  # [3, 3]; column c: where commanded axis c leads
        names = []
        for column, row in enumerate(np.abs(rotation).argmax(0)):
            sign = "-" if rotation[row, column] < 0 else ""
            names.append(sign + "xyz"[row])
        return " ".join(names)


class MotionChecks:
    """All checks of whether one robot does what it is commanded."""

    def __init__(self) -> None:
        self._chunk: Array | None = None
        self._last_state = np.zeros(8)
        self._frozen_state = FrozenStateCheck()
        self._gripper = GripperCheck()
        self._axes = MotionAxesCheck()

    def set_chunk(self, chunk: Array | None) -> None:
        """Remember the actions [H, 8] of which the robot now executes some; None if unknown.

        The chunk is copied, because the robot's program may change it in place, for example to
        invert the gripper values.
        """
        self._chunk = None if chunk is None else chunk.copy()

    def examine_next_state(self, state: Array) -> list[Finding]:
        """Compare how the robot moved to its new state [8] with the chunk that it was sent last.

        Then the state is remembered for the next comparison, and the chunk is forgotten. So there
        are no findings until `set_chunk` gets another chunk.
        """
        chunk = self._chunk
        displacement = state[:3] - self._last_state[:3]
        is_same_state = bool((state == self._last_state).all())
        self._chunk = None  # a chunk is compared only with the next observation
        self._last_state = state.copy()
        if chunk is None:
            return []

        findings = list(self._frozen_state.examine(is_same_state, chunk))
        # Do not judge gripper and axes by a motion that is too long to come from the chunk.
        paths = chunk[:, :3].cumsum(0, np.float64)  # [H, 3] after 1, 2, … H actions
        longest_path_m = np.linalg.norm(paths, axis=1).max()
        max_distance_m = MAX_OVERSHOOT_RATIO * longest_path_m + OVERSHOOT_MARGIN_M
        if np.linalg.norm(displacement) > max_distance_m:
            return findings
        findings += self._gripper.examine(state[7], chunk)
        findings += self._axes.examine(displacement, paths)
        return findings
