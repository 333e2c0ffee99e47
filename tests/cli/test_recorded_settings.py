"""Files keep their keys although options were renamed, so that work of earlier versions continues.

The keys of trainings are tested in `tests/train/test_run.py`.
"""

from pathlib import Path

import pytest

from data_tiny import make_episode
from refusals import Command
from spear.cli.evaluate import EvaluateVqaOptions, _collect_vqa_settings
from spear.data.options import Conversion
from spear.data.store.episode_store import append_episodes
from spear.data.store.prepare import plan_preparation
from spear.evaluate.agents import IdleAgent
from spear.evaluate.closed_loop import evaluate_tabletop
from spear.evaluate.options import TabletopOptions
from spear.labels.options import LabelOptions
from spear.labels.run import prepare_run

GROUND_TRUTH = {role: "ground-truth" for role in ("detector", "segmenter", "pointmap")}


def test_labels_of_images_keep_their_keys() -> None:
    from spear.sim_data.label_scenes import list_scenes

    options = LabelOptions(("sim:1",), max_size=64, fps=2, frames_per_episode=3, **GROUND_TRUTH)

    settings = prepare_run(options, list_scenes).settings

    assert settings == {
        "inputs": ["sim:1"],
        "vocabulary": (),
        "size": 64,
        "rate": 2,
        "per_episode": 3,
        **GROUND_TRUTH,
    }


def test_an_evaluation_keeps_its_keys() -> None:
    pytest.importorskip("mujoco")

    results, _ = evaluate_tabletop(
        IdleAgent(), TabletopOptions(num_scenes=1, tasks=("put_on",), replan_steps=1)
    )

    assert results.settings["replan"] == 1


def test_prepared_data_keep_their_keys(tmp_path: Path) -> None:
    append_episodes([make_episode(0)], tmp_path / "episodes")
    conversion = Conversion(image_size=("64x48",), control_hz=4.0)

    plan = plan_preparation(tmp_path / "episodes", tmp_path / "out", "train", conversion)

    assert plan.request["size"] == {"": (64, 48)}  # "" stands for all cameras
    assert plan.request["rate"] == 4.0


def test_scores_of_a_vlm_keep_their_keys() -> None:
    options = EvaluateVqaOptions(model="nano-vlm", labels="sim", num_images=7)

    assert _collect_vqa_settings(options) == {
        "--per_image": 2,
        "--families": (),
        "--decode": "median",
        "--seed": 0,
        "--view": "external",
        "model": "nano-vlm",
        "questions": "sim",
        "--images": 7,
    }


@pytest.mark.usefixtures("renderer")
def test_labels_without_the_robot_cannot_be_continued_with_it(
    tmp_path: Path, run_command: Command, run_refused_command: Command
) -> None:
    words = ["label", "--num-scenes", "1", "--workers", "0", "--out", str(tmp_path / "labels")]

    output = run_command(words, "--no-robot", "--world", "lab:1")
    message = run_refused_command(words, "--world", "lab:1")

    assert "2 labeled images" in output  # of the two cameras
    assert "shows_robot" in message
