"""An object that the policy's SPEAR-VLM sees in training, but not in the rollout, is named."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from data_tiny import make_png, write_store
from made_rollouts import make_episode
from spear.checks.rollout.camera_bgr import CameraBgrCheck
from spear.checks.rollout.case import Doubt, Finding, Result
from spear.data.store.episode_store import EpisodeStore
from spear.diagnose.picture_repair import PictureRepair
from spear.diagnose.policy_case import PolicyCase
from spear.diagnose.policy_checks.object_not_in_view import ObjectNotInViewCheck
from spear.diagnose.sight import list_object_names
from spear.evaluate.vqa.calibration import Trust
from spear.policy import Spear1Policy
from spear.types import Array, Episode

INSTRUCTION = "put the mug on the plate"
FULL_LEVEL = 200  # gray level of pictures in which all objects are
EMPTY_LEVEL = 50  # of pictures without the mug
SMALL_LEVEL = 120  # of pictures in which the model takes the mug for a can


def name_by_brightness(
    model: Any, images: Sequence[Array], names: Sequence[str], view: str
) -> list[str]:
    """Stand in for a model: whether it sees the mug is written in the gray level of a picture."""
    seen_names = []
    for image, name in zip(images, names, strict=True):
        sees_all = np.isclose(image.mean(), FULL_LEVEL, atol=10)
        seen_names.append(name if sees_all or name != "mug" else "can")
    return seen_names


class StandInPolicy:
    """A policy whose model is never asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = self
        self.vlm = None
        self.processor = None


def make_store(folder: Path, levels: Sequence[int]) -> EpisodeStore:
    """Write an episode of one gray level for each of some levels."""
    episodes = []
    for seed, level in enumerate(levels):
        numbers = make_episode(seed)
        episode = Episode(
            images={"external": [make_png(level)] * len(numbers)},
            position=numbers.position,
            rotation=numbers.rotation,
            gripper=numbers.opening,
            instruction=INSTRUCTION,
            rate_hz=5.0,
            source=numbers.source,
            action=numbers.action.astype(np.float32),
        )
        episodes.append(episode)
    return write_store(episodes, folder)


def make_policy_case(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    levels: Sequence[int],
    training_levels: Sequence[int] = (FULL_LEVEL,) * 12,
    names_absent: float = 0.02,
    num_demonstrations: int = 8,
) -> PolicyCase:
    """Make a case whose rollout and training episodes have pictures of some gray levels."""
    monkeypatch.setattr("spear.diagnose.sight.point_at_objects_and_name_them", name_by_brightness)
    folder = tmp_path / "policy"
    folder.mkdir()
    Trust("made images", {}, names_present=0.95, names_absent=names_absent).save(folder)
    return PolicyCase(
        rollout=[make_episode(100 + n, instruction=INSTRUCTION) for n in range(len(levels))],
        demonstrations=[make_episode(seed) for seed in range(num_demonstrations)],
        policy=cast(Spear1Policy, StandInPolicy(folder)),
        training=make_store(tmp_path / "training", training_levels),
        rollout_store=make_store(tmp_path / "rollout", levels),
    )


def examine(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    levels: Sequence[int],
    training_levels: Sequence[int] = (FULL_LEVEL,) * 12,
    names_absent: float = 0.02,
) -> Result:
    """Examine a rollout of some gray levels."""
    case = make_policy_case(tmp_path, monkeypatch, levels, training_levels, names_absent)
    return ObjectNotInViewCheck().examine(case)


def test_an_object_that_no_picture_shows_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = examine(tmp_path, monkeypatch, [EMPTY_LEVEL] * 4)

    assert isinstance(result, Finding)
    assert "in 4 of 4 episodes" in result.evidence
    assert "no mug" in result.evidence
    assert "no plate" not in result.evidence


def test_objects_in_view_are_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert examine(tmp_path, monkeypatch, [FULL_LEVEL] * 4) is None


def test_one_missed_object_in_many_episodes_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert examine(tmp_path, monkeypatch, [EMPTY_LEVEL, *[FULL_LEVEL] * 3]) is None


def test_an_object_that_the_model_misses_in_training_is_not_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = [SMALL_LEVEL] * 12

    assert examine(tmp_path, monkeypatch, [EMPTY_LEVEL] * 4, training_levels=levels) is None


def test_a_model_that_confirms_absent_objects_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = examine(tmp_path, monkeypatch, [EMPTY_LEVEL] * 4, names_absent=0.5)

    assert isinstance(result, Doubt)


@pytest.mark.parametrize("is_exchanged", [True, False])
def test_objects_recognized_with_exchanged_colors_are_in_view_of_a_bgr_camera(
    is_exchanged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_red_and_blue_exchanged(repair: PictureRepair) -> PictureRepair:
        """Stand in for the exchange, which does not change gray pictures."""
        change = FULL_LEVEL - EMPTY_LEVEL if is_exchanged else 0
        return replace(repair, changes=[lambda picture: picture + np.uint8(change)])

    monkeypatch.setattr(PictureRepair, "with_red_and_blue_exchanged", with_red_and_blue_exchanged)
    # Two demonstrations are too few to compare colors with.
    case = make_policy_case(tmp_path, monkeypatch, [EMPTY_LEVEL] * 4, num_demonstrations=2)

    bgr_result = CameraBgrCheck().examine(case)
    view_result = ObjectNotInViewCheck().examine(case)

    assert isinstance(bgr_result, Finding) == is_exchanged
    assert isinstance(view_result, Finding) != is_exchanged


@pytest.mark.parametrize(
    ("instruction", "names"),
    [
        ("put the red mug on the plate", ["red mug", "plate"]),
        ("Set the spoon down on a towel.", ["spoon", "towel"]),
        ("the carrot belongs in the basket", ["carrot", "basket"]),
        ("take the can and place it on the dish", ["can", "dish"]),
        ("move the cube on top of the cube", ["cube"]),
        ("open drawer", []),
    ],
)
def test_the_objects_of_an_instruction_follow_its_articles(
    instruction: str, names: list[str]
) -> None:
    assert list_object_names(instruction) == names
