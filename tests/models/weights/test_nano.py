"""The weights that come with the package are small, match their recipes, see and act.

Also tested is how folders of weights are found by name.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from refusals import no_warning, refuses
from spear.errors import Notice
from spear.evaluate import closed_loop
from spear.evaluate.agents import PolicyAgent
from spear.evaluate.options import QuestionOptions, TabletopOptions
from spear.evaluate.vqa import run as vqa
from spear.evaluate.vqa.ask import render_held_out_frames
from spear.labels.pipeline import label_with_ground_truth
from spear.models.presets import PRESETS
from spear.models.weights.folders import BUNDLED_WEIGHTS, locate_checkpoint, read_provenance
from spear.policy import Spear1Policy, load_vlm
from spear.train.recipes import RECIPES

NAMES = ["nano", "nano-colorful", "nano-vlm", "nano-vlm-0", "nano-depth"]
MAX_FOLDER_BYTES = 20e6
NUM_HELD_OUT_FRAMES = 12
FIRST_HELD_OUT_SEED = 500  # training has the seeds from 10,000 on


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_small(name: str) -> None:
    files = [path for path in (BUNDLED_WEIGHTS / name).rglob("*") if path.is_file()]

    assert sum(file.stat().st_size for file in files) < MAX_FOLDER_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_has_a_model_card(name: str) -> None:
    card = (BUNDLED_WEIGHTS / name / "README.md").read_text()

    for heading in ("Data", "Training", "Results", "Limits"):
        assert heading in card


@pytest.mark.parametrize("name", NAMES)
def test_a_config_does_not_say_on_which_machine_it_was_trained(name: str) -> None:
    assert "_name_or_path" not in (BUNDLED_WEIGHTS / name / "config.json").read_text()


def drop_keys_without_effect(recipe: dict[str, Any]) -> dict[str, Any]:
    """Drop keys whose value depends on the machine, that no longer exist, or that this recipe does
    not use."""
    del recipe["optimization"]["precision"]  # float32 on a machine whose CPU has no bfloat16
    recipe["optimization"].pop("moments", None)  # no longer exists
    recipe.pop("starts_from", None)  # no longer exists
    del recipe["normalization"]  # only used by policies
    if recipe["kind"] == "depth":
        del recipe["questions"]  # depth is trained without questions
    return recipe


@pytest.mark.parametrize("name", ["nano-vlm-0", "nano-depth"])
def test_starting_points_were_trained_by_their_recipe(name: str) -> None:
    """The recipe in recipe.json, of the time of the training, is the package's recipe of today."""
    provenance = json.loads((BUNDLED_WEIGHTS / name / "recipe.json").read_text())
    recipe_of_today = json.loads(json.dumps(dataclasses.asdict(RECIPES[name])))
    stored = drop_keys_without_effect(provenance["recipe"])
    present = drop_keys_without_effect(recipe_of_today)

    assert {key: present[key] for key in stored} == stored
    # Keys that were added after the training are off (false, 0 or empty).
    added_keys = present.keys() - stored.keys()
    assert not any(present[key] for key in added_keys)


@pytest.fixture(scope="module")
def held_out_labels() -> list[Any]:
    """Labeled images of simulated scenes, with the true boxes and keypoints."""
    size = PRESETS["nano"].image_sizes["external"]
    frames = render_held_out_frames(NUM_HELD_OUT_FRAMES, FIRST_HELD_OUT_SEED, size)
    return list(label_with_ground_truth(frames))


@pytest.mark.parametrize(
    ("name", "max_fraction_of_constant_error", "question_types"),
    [("nano", 0.6, ("keypoint",)), ("nano-vlm", 0.35, ("keypoint", "offset"))],
)
def test_a_vlm_sees_where_objects_are(
    held_out_labels: list[Any],
    name: str,
    max_fraction_of_constant_error: float,
    question_types: tuple[Any, ...],
) -> None:
    """A VLM's error is well below that of the best constant answer, which ignores the image."""
    options = QuestionOptions(question_types=question_types)

    scores = vqa.evaluate_vqa(load_vlm(name), held_out_labels, options)

    for question_type in question_types:
        score = scores.type_scores[question_type]
        max_error = max_fraction_of_constant_error * score.constant["error"]
        assert score.measures["error"].value < max_error
        assert score.grammar.value == 1.0  # all answers had the right form


def test_the_policy_succeeds(nano: Spear1Policy, tmp_path: Path) -> None:
    """The policy nano succeeds in at least two of four rollouts."""
    options = TabletopOptions(num_scenes=4, tasks=("put_on",), out=tmp_path)

    results, _ = closed_loop.evaluate_tabletop(PolicyAgent(nano, name="nano"), options)

    assert results.mean_success().value > 0.4


@pytest.mark.slow  # acts in the simulator
def test_another_policy_succeeds_on_tables_of_any_color(tmp_path: Path) -> None:
    """The policy nano-colorful succeeds in at least two of four rollouts."""
    policy = Spear1Policy.load("nano-colorful")
    # At level 2 of this shift, table, floor and wall have any colors.
    options = TabletopOptions(num_scenes=4, tasks=("put_on",), shift="background:2", out=tmp_path)

    results, _ = closed_loop.evaluate_tabletop(PolicyAgent(policy, name="nano-colorful"), options)

    assert results.mean_success().value > 0.4


class TestLocate:
    @pytest.fixture(autouse=True)
    def folder_named_nano(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The current folder has a subfolder with the name of weights of the package."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "nano").mkdir()

    def test_a_folder_wins_over_weights_of_its_name_with_a_notice(self) -> None:
        with pytest.warns(Notice, match="nano"):
            assert locate_checkpoint("nano") == Path("nano")

    def test_a_whole_path_needs_no_notice(self, tmp_path: Path) -> None:
        with no_warning():
            assert locate_checkpoint(tmp_path / "nano") == tmp_path / "nano"

    def test_bundled_weights_are_found_by_path_and_by_name(self) -> None:
        with no_warning():
            assert locate_checkpoint(BUNDLED_WEIGHTS / "nano") == BUNDLED_WEIGHTS / "nano"
            assert locate_checkpoint("nano-vlm") == BUNDLED_WEIGHTS / "nano-vlm"

    def test_the_name_of_the_authors_weights_leads_to_the_page_about_them(self) -> None:
        refuses(
            r"cannot be loaded yet.*docs/howto/weights\.md",
            locate_checkpoint,
            "INSAIT-Institute/spear1-franka",
        )


@pytest.mark.parametrize("key", ["files", "learned", "simulator_only"])
def test_a_recipe_json_with_a_value_of_another_type_is_refused(key: str, tmp_path: Path) -> None:
    """The value is a list, which is right for none of these keys."""
    (tmp_path / "recipe.json").write_text(json.dumps({"seed": 0, key: ["model.safetensors"]}))

    refuses(rf"recipe\.json.*{key}", read_provenance, tmp_path)


def test_loading_in_slow_bfloat16_gives_a_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spear.policy.is_bfloat16_fast", lambda _: False)

    with pytest.warns(Notice, match="bfloat16"):
        load_vlm("nano", dtype=torch.bfloat16)


def test_loading_in_float32_gives_no_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spear.policy.is_bfloat16_fast", lambda _: False)

    with no_warning():
        load_vlm("nano")
