"""What a check of a rollout is, what it looks at, and what it finds."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np

from spear.checks.rollout.arm_lag import fit_arm_lag
from spear.checks.rollout.episode import RecordedEpisode
from spear.checks.rollout.gripper import GripperUse
from spear.checks.rollout.meant_states import correct_orientations_and_openings
from spear.checks.rollout.motion import RolloutMotion
from spear.checks.rollout.pictures import PictureComparison, PictureReferences
from spear.types import Array

Material = Literal["rollout", "demonstrations", "policy"]
"""What a check needs: a recorded rollout, training episodes, or the policy itself."""


@dataclass(frozen=True)
class Case:
    """What is known of a failure: a rollout, and what the policy learned from.

    rollout         the episodes in which the robot failed.
    demonstrations  training episodes; empty if unknown.
    instructions    the different instructions of all training episodes; by default those of
                    `demonstrations`, which may be fewer.
    references      what the pictures of the demonstrations say, if another case has computed it.
    """

    rollout: Sequence[RecordedEpisode] = ()
    demonstrations: Sequence[RecordedEpisode] = ()
    instructions: Sequence[str] = ()
    references: PictureReferences | None = None

    @property
    def training_instructions(self) -> Sequence[str]:
        """The different instructions of training."""
        if self.instructions:
            return self.instructions
        return list(dict.fromkeys(episode.instruction for episode in self.demonstrations))

    @cached_property
    def motion(self) -> RolloutMotion:
        """The commanded and the achieved motion of the rollout."""
        return RolloutMotion.from_episodes(self.rollout, fit_arm_lag(self.demonstrations))

    @cached_property
    def gripper(self) -> GripperUse:
        """The gripper's commands and openings, in the rollout and in the demonstrations."""
        return GripperUse.from_episodes(self.rollout, self.demonstrations)

    @cached_property
    def comparison(self) -> PictureComparison:
        """The rollout's pictures, compared with those of the demonstrations."""
        references = self.references or PictureReferences(self.demonstrations)
        return PictureComparison(self.rollout_with_corrected_states, references)

    @cached_property
    def rollout_with_corrected_states(self) -> Sequence[RecordedEpisode]:
        """The episodes of the rollout with the states that the robot means."""
        return correct_orientations_and_openings(
            self.rollout, self.demonstrations, self.motion, self.gripper
        )

    @property
    def rollout_cameras(self) -> list[str]:
        """The cameras that any episode of the rollout has."""
        names: set[str] = set()
        for episode in self.rollout:
            names.update(episode.pictures)
        return sorted(names)

    @property
    def bgr_log_ratio_of_objects(self) -> float:
        """Evidence that red and blue are exchanged: a model then recognizes objects better.

        It is a log likelihood ratio; 0 without a model, or if the difference may be chance.
        """
        return 0.0


@dataclass(frozen=True)
class Curve:
    """A line of a figure: its name, and x and y of its points."""

    name: str
    x: Sequence[float] | Array
    y: Sequence[float] | Array


@dataclass(frozen=True)
class Figure:
    """The evidence of a finding as a picture: curves, bars or small pictures.

    title     what is shown.
    x_title   name and unit of the horizontal axis of the curves.
    curves    lines over a common axis.
    bars      (name, value, text) of each bar.
    pictures  (caption, image [h, w, 3] uint8) of each picture.
    """

    title: str
    x_title: str = ""
    curves: Sequence[Curve] = ()
    bars: Sequence[tuple[str, float, str]] = ()
    pictures: Sequence[tuple[str, Array]] = ()


@dataclass(frozen=True)
class Finding:
    """A fault that a check found.

    confidence      how sure the check is, 0 … 1.
    evidence        what was measured.
    cure            what to change.
    file            in which file or part of your setup to change it, in words.
    figure          the evidence as a picture.
    camera          the only camera that the fault concerns; None if it concerns several, or none.
    is_independent  whether it is more than any other fault could cause.
    """

    confidence: float
    evidence: str
    cure: str
    file: str
    figure: Figure | None = None
    camera: str | None = None
    is_independent: bool = False


@dataclass(frozen=True)
class Doubt:
    """A check can neither find its fault nor exclude it.

    reason        why.
    is_suspicion  whether something is odd, so that the diagnosis is undecided. Otherwise the data
                  only do not show it.
    """

    reason: str
    is_suspicion: bool = False


Result = Finding | Doubt | None
"""What a check returns; None if the fault is not there."""


class RolloutCheck:
    """A check for one fault. A subclass in a file of its own is all that a new check needs.

    Attributes:
        fault: the fault's name, as the JSON output has it.
        title: what is wrong, in words.
        needs: without any of these the check is not run.
        causes: faults that this one explains. They are not reported as causes of the failure if
            this one is found and is about as sure (`spear.diagnose.diagnosis`).
    """

    fault: ClassVar[str]
    title: ClassVar[str]
    needs: ClassVar[frozenset[Material]] = frozenset({"rollout"})
    causes: ClassVar[frozenset[str]] = frozenset()

    def examine(self, case: Case) -> Result:
        """Look for the fault."""
        raise NotImplementedError


def compute_confidence_of_margin(margin: float, limit: float, certain: float) -> float:
    """Turn a measured quantity into a confidence: 0.5 at `limit`, 0.98 from `certain` on.

    Example:
        >>> compute_confidence_of_margin(2.0, limit=1.0, certain=3.0)
        0.74
    """
    fraction = (margin - limit) / (certain - limit)
    return round(float(np.clip(0.5 + 0.48 * fraction, 0.0, 0.98)), 3)
