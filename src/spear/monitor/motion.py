"""Checks of what one robot does with its commands, from one observation to the next."""

import zlib
from collections.abc import Iterator, Mapping

import numpy as np

from spear.monitor.distribution import OPPOSITE_OPENING
from spear.monitor.observations import Finding
from spear.types import Array

FROZEN_DISTANCE_M = 0.05  # motion during which neither an image nor a state can stay the very same
NUM_STEPS = 64  # observations from which a gripper or an arm is judged
MAX_OPPOSITE_SHARE = 0.5  # more steps than this with the opposite opening: the gripper is inverted
MAX_OVERSHOOT_RATIO = 1.5  # an arm that moved farther than its whole chunk times this,
OVERSHOOT_MARGIN_M = 0.02  # plus this, was moved by somebody else, or is another arm
MIN_MOTION_M = 0.003  # a shorter motion has no reliable direction
MIN_AXES_GAIN = 0.4  # mean cosine by which other axes must explain the motion better


class FrozenCameraCheck:
    """Finds a camera whose image stays the very same while the arm moves."""

    def __init__(self) -> None:
        self._last_images: dict[
            str, tuple[int, Array]
        ] = {}  # camera → checksum, state when it came

    def check(self, state: Array, images: Mapping[str, Array]) -> Iterator[Finding]:
        """Check one observation: state [8] and camera → image as the model sees it."""
        for camera, pixels in images.items():
            checksum = zlib.crc32(pixels.data)
            last_checksum, last_state = self._last_images.get(camera, (None, state))
            if checksum != last_checksum:
                self._last_images[camera] = checksum, state.copy()
                continue
            distance_m = float(np.linalg.norm(state[:3] - last_state[:3]))
            if distance_m > FROZEN_DISTANCE_M:
                yield Finding(
                    f"frozen {camera}",
                    f"camera {camera!r}: the very same picture {distance_m:.2f} m later: frozen?",
                )


class FrozenStateCheck:
    """Finds a state that stays the very same although the arm is commanded to move."""

    def __init__(self) -> None:
        self._commanded_m: float | np.floating = 0.0  # since the state last changed

    def check(self, is_same_state: bool, chunk: Array) -> Iterator[Finding]:
        """Check whether the state changed after the actions [H, 8] were sent."""
        previous_m = self._commanded_m
        first_action_m = np.linalg.norm(chunk[0, :3])
        self._commanded_m = previous_m + first_action_m if is_same_state else 0.0
        if previous_m <= FROZEN_DISTANCE_M < self._commanded_m:
            yield Finding(
                "state",
                f"the very same state, though told to go {self._commanded_m:.2f} m: does it still "
                f"come?",
            )


class GripperCheck:
    """Finds a gripper that mostly does the opposite of its commands."""

    def __init__(self) -> None:
        self._were_opposite: list[bool] = []

    def check(self, opening: float, chunk: Array) -> Iterator[Finding]:
        """Check the opening that follows some of the actions [H, 8]."""
        commands = chunk[:, 7]
        # If all commands are nearly equal, it does not matter which of them were executed.
        is_one_command = np.ptp(commands) < 0.5
        if not is_one_command or len(self._were_opposite) == NUM_STEPS:
            return
        self._were_opposite.append(bool(abs(commands.mean() - opening) > OPPOSITE_OPENING))
        is_complete = len(self._were_opposite) == NUM_STEPS
        if is_complete and sum(self._were_opposite) > MAX_OPPOSITE_SHARE * NUM_STEPS:
            yield Finding(
                "gripper",
                "the gripper does the opposite of what it is told: 1 is open, 0 closed, told and "
                "read",
            )


class MotionAxesCheck:
    """Finds an arm that moves along other axes than those of its commands."""

    def __init__(self) -> None:
        self._direction_products: list[Array] = []  # [3, 3] each: moved ⊗ commanded direction

    def check(self, moved: Array, paths: Array) -> Iterator[Finding]:
        """Check the displacement [3] that follows some of the actions, whose sums are `paths` [H,
        3] (m).
        """
        if len(self._direction_products) == NUM_STEPS:
            return
        product = self._direction_product(moved, paths)
        if product is None:
            return
        self._direction_products.append(product)
        if len(self._direction_products) < NUM_STEPS:
            return
        axes = self._find_other_axes(np.mean(self._direction_products, axis=0))
        if axes is not None:
            yield Finding(
                "arm", f"told to go along x y z, the arm goes along {axes}: another frame?"
            )

    @staticmethod
    def _direction_product(moved: Array, paths: Array) -> Array | None:
        """Multiply the direction of the motion with that of its command; None for hardly any
        motion.

        How many of the actions were executed is unknown: the path whose length is nearest is taken.
        """
        distance = np.linalg.norm(moved)
        path_lengths = np.linalg.norm(paths, axis=1)
        nearest = np.abs(path_lengths - distance).argmin()
        if min(distance, path_lengths[nearest]) <= MIN_MOTION_M:
            return None
        return np.outer(moved / distance, paths[nearest] / path_lengths[nearest])

    @staticmethod
    def _find_other_axes(mean_product: Array) -> str | None:
        """Name the axes that explain the motion much better than x, y, z do; None if there are
        none.

        The best rotation or reflection is the solution of the orthogonal Procrustes problem.
        """
        left_vectors, gains, right_vectors = np.linalg.svd(mean_product)
        if gains.sum() - np.trace(mean_product) <= MIN_AXES_GAIN:
            return None
        best = left_vectors @ right_vectors
        names = []
        for column, row in enumerate(np.abs(best).argmax(0)):
            sign = "-" if best[row, column] < 0 else ""
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
        """Remember the actions [H, 8] of which the robot now executes some; None if they are
        unknown.

        They are copied, because the robot's program may invert its gripper in place.
        """
        self._chunk = None if chunk is None else chunk.copy()

    def check(self, state: Array) -> list[Finding]:
        """Compare the robot's state [8] with the actions that it was sent last."""
        chunk = self._chunk
        moved = state[:3] - self._last_state[:3]
        is_same_state = bool((state == self._last_state).all())
        self._chunk = None
        self._last_state = state.copy()
        if chunk is None:
            return []

        findings = list(self._frozen_state.check(is_same_state, chunk))
        paths = chunk[:, :3].cumsum(0, np.float64)
        longest_path_m = np.linalg.norm(paths, axis=1).max()
        if np.linalg.norm(moved) > MAX_OVERSHOOT_RATIO * longest_path_m + OVERSHOOT_MARGIN_M:
            return findings
        findings += self._gripper.check(state[7], chunk)
        findings += self._axes.check(moved, paths)
        return findings
