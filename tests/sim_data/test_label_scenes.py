"""Labeling scenes of the simulator into a folder, which later calls continue."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from refusals import refuses
from spear.errors import Notice
from spear.labels.pipeline import label_with_ground_truth
from spear.labels.store import read_labels
from spear.sim_data.label_scenes import label_scenes
from spear.types import Frame, LabeledImage

pytest.importorskip("mujoco")

SIZES = {"external": (96, 64), "wrist": (64, 64)}  # view: width and height in pixels
FIRST_SEED = 10_000


def label_by_hand(frames: Iterator[Frame]) -> Iterator[LabeledImage]:
    """Label frames from ground truth, with a source that shows that this function labeled them."""
    for label in label_with_ground_truth(frames):
        yield dataclasses.replace(label, source=f"by hand/{label.source}")


def never_label(frames: Iterator[Frame]) -> Iterator[LabeledImage]:
    """Fail the test, because it is about scenes that must not be labeled again."""
    raise AssertionError("finished scenes are not labeled again")


@pytest.fixture
def two_scenes(tmp_path: Path) -> Path:
    """A folder of two labeled scenes, with two views each."""
    label_scenes(
        tmp_path,
        num_scenes=2,
        sizes=SIZES,
        first_seed=FIRST_SEED,
        workers=1,
        label_frames=label_by_hand,
    )
    return tmp_path


@pytest.mark.parametrize("view", list(SIZES))
def test_scenes_are_labeled_by_the_given_function(two_scenes: Path, view: str) -> None:
    labels = list(read_labels(two_scenes / view))

    sources = [label.source for label in labels]
    assert sources == [f"by hand/sim/clutter/{seed}/{view}" for seed in (10_000, 10_001)]
    assert {(label.width, label.height) for label in labels} == {SIZES[view]}
    assert (two_scenes / "depth" / view / "depth-00000.parquet").is_file()


def test_the_instructions_of_the_simulator_are_stored(two_scenes: Path) -> None:
    assert "carrot" in (two_scenes / "wording.txt").read_text()


def test_finished_scenes_are_not_labeled_again(two_scenes: Path) -> None:
    num_images = label_scenes(
        two_scenes,
        num_scenes=2,
        sizes=SIZES,
        first_seed=FIRST_SEED,
        workers=1,
        label_frames=never_label,
    )

    assert num_images == 4  # two scenes, two views


def test_fewer_scenes_than_are_finished_change_nothing(two_scenes: Path) -> None:
    num_images = label_scenes(
        two_scenes,
        num_scenes=1,
        sizes=SIZES,
        first_seed=FIRST_SEED,
        workers=1,
        label_frames=never_label,
    )

    assert num_images == 4


def test_more_scenes_continue_where_fewer_ended(two_scenes: Path) -> None:
    num_images = label_scenes(
        two_scenes, num_scenes=3, sizes=SIZES, first_seed=FIRST_SEED, workers=1
    )

    assert num_images == 6


def test_a_missing_shard_is_made_again_and_removes_outdated_questions(two_scenes: Path) -> None:
    (two_scenes / "wrist/labels-00000.parquet").unlink()
    (two_scenes / "external/questions.parquet").touch()

    with pytest.warns(Notice, match="spear questions"):
        label_scenes(two_scenes, num_scenes=2, sizes=SIZES, first_seed=FIRST_SEED, workers=1)

    assert (two_scenes / "wrist/labels-00000.parquet").is_file()
    assert not (two_scenes / "external/questions.parquet").exists()


@pytest.mark.parametrize(
    ("key", "value", "option"),
    [
        ("first_seed", 10_001, "--first-seed"),
        ("sizes", {**SIZES, "wrist": (48, 48)}, "--preset"),
    ],
)
def test_other_settings_are_refused(two_scenes: Path, key: str, value: Any, option: str) -> None:
    arguments = {"num_scenes": 2, "sizes": SIZES, "first_seed": FIRST_SEED, key: value}

    refuses(
        rf"other settings \({option}",
        label_scenes,
        two_scenes,
        **arguments,
        workers=1,
        label_frames=never_label,
    )
