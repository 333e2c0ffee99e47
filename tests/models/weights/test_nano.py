"""The weights that ship: small enough, loadable, and better than not looking."""

import dataclasses
import json
from pathlib import Path

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
from spear.models.weights.folders import BUNDLED_WEIGHTS, locate, read_provenance
from spear.policy import Spear1Policy, load_vlm
from spear.train.recipes import RECIPES


@pytest.mark.parametrize("name", ["nano", "nano-vlm", "nano-vlm-0", "nano-depth"])
def test_they_are_small_and_have_a_card(name: str) -> None:
    assert sum(f.stat().st_size for f in (BUNDLED_WEIGHTS / name).rglob("*") if f.is_file()) < 20e6
    card = (BUNDLED_WEIGHTS / name / "README.md").read_text()
    assert all(word in card for word in ("Data", "Training", "Results", "Limits"))
    assert (
        "_name_or_path" not in (BUNDLED_WEIGHTS / name / "config.json").read_text()
    )  # of whoever trained them


@pytest.mark.parametrize("name", ["nano-vlm-0", "nano-depth"])
def test_what_spear_vlm_begins_with_was_trained_as_its_recipe_says(name: str) -> None:
    made = json.loads((BUNDLED_WEIGHTS / name / "recipe.json").read_text())["recipe"]
    today = json.loads(json.dumps(dataclasses.asdict(RECIPES[name])))
    for one in (made, today):
        del one["optimization"]["precision"]  # float32 where the CPU has no bfloat16
        one["optimization"].pop("moments", None)  # this setting and the next are gone
        one.pop("starts_from", None)
        del one["normalization"]  # of policies
        if one["kind"] == "depth":
            del one["questions"]  # it asks none
    assert {key: today[key] for key in made} == made
    assert not any(today[key] for key in today.keys() - made.keys())  # what came later is off


def test_the_vlm_sees_where_things_are() -> None:
    labels = list(
        label_with_ground_truth(
            render_held_out_frames(12, 500, PRESETS["nano"].image_sizes["external"])
        )
    )
    for name, part, families in (
        ("nano", 0.6, ("keypoint",)),
        ("nano-vlm", 0.35, ("keypoint", "offset")),
    ):
        scores = vqa.evaluate_vqa(load_vlm(name), labels, QuestionOptions(families=families))
        for found in (scores.families[family] for family in families):
            assert found.measures["error"].value < part * found.constant["error"], name
            assert found.grammar.value == 1.0


def test_the_policy_succeeds(nano: Spear1Policy, tmp_path: Path) -> None:
    options = TabletopOptions(scenes=4, families=("put_on",), out=tmp_path)
    results, _ = closed_loop.evaluate_tabletop(PolicyAgent(nano, "nano", None), options)
    assert results.mean_success().value > 0.4


def test_a_folder_named_like_weights_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nano").mkdir()
    with pytest.warns(Notice, match="nano"):
        assert locate("nano") == Path("nano")
    with no_warning():
        assert (
            locate(tmp_path / "nano").is_absolute()
            and locate(BUNDLED_WEIGHTS / "nano") == BUNDLED_WEIGHTS / "nano"
        )
        assert locate("nano-vlm") == BUNDLED_WEIGHTS / "nano-vlm"


@pytest.mark.parametrize("key", ["files", "learned", "simulator_only"])
def test_what_a_folder_says_of_itself_in_another_type_is_refused(key: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps({"seed": 0, key: ["model.safetensors"]}))
    refuses(rf"recipe\.json.*{key}", read_provenance, tmp_path)


def test_a_precision_that_only_saves_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spear.policy.is_bfloat16_fast", lambda _: False)
    with pytest.warns(Notice, match="bfloat16"):
        load_vlm("nano", dtype=torch.bfloat16)
    with no_warning():
        load_vlm("nano")
