"""The whole path at nano size: scenes → labels → depth → VLM stages 0, 1, 2 → demonstrations → SPEAR-1 →
actions."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from spear.data.store.episode_store import EpisodeStore, write_episodes
from spear.errors import SpearError
from spear.labels.scenes import label_scenes
from spear.models.presets import PRESETS
from spear.models.vlm import SpearVLMForConditionalGeneration
from spear.models.weights import load as weights
from spear.policy import Spear1Policy, load_vlm
from spear.train.recipes import ENCODERS, RECIPES, recipe
from spear.train.run import train
from spear.train.tasks.questions import length_groups

SIZES = dict(PRESETS["nano"].image_sizes)
FEW = {"steps": 2, "batch_size": 4, "warmup": 1, "workers": 0, "quiet": True, "device": "cpu"}


@dataclass
class Walk:
    labels: Path
    episodes: EpisodeStore
    folders: dict[str, Path]


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    """Every stage run once, for two steps."""
    from spear.sim.record import record

    root = tmp_path_factory.mktemp("path")
    label_scenes(root / "labels", 6, SIZES, first_seed=10_000, workers=1)
    demonstrations = record(
        [("put_on", 10_000), ("stack_cube", 10_001)], SIZES["external"], SIZES["wrist"], workers=1
    )
    write_episodes(demonstrations, root / "episodes")
    labels, store = root / "labels", EpisodeStore(root / "episodes")
    folders = {}
    folders["nano-depth"] = train("nano-depth", root / "depth", labels, **FEW)
    folders["nano-siglip"] = train("nano-siglip", root / "siglip", labels, **FEW)
    folders["nano-vlm-0"] = train("nano-vlm-0", root / "vlm0", labels, init=folders["nano-siglip"], **FEW)
    folders["nano-vlm-1"] = train(
        "nano-vlm-1", root / "vlm1", labels, init=folders["nano-vlm-0"], moge=folders["nano-depth"], **FEW
    )
    folders["nano-vlm-2"] = train("nano-vlm-2", root / "vlm2", labels, init=folders["nano-vlm-1"], **FEW)
    folders["nano-vla"] = train(
        "nano-vla",
        root / "vla",
        labels,
        [("sim", store, 1.0)],
        init=folders["nano-vlm-2"],
        question_images=2,
        **FEW,
    )
    return Walk(labels, store, folders)


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    return dict(weights.load(SpearVLMForConditionalGeneration, folder).named_parameters())


@pytest.mark.parametrize(("texts", "groups"), [(1, 1), (8, 1), (63, 1), (64, 2), (512, 4)])
def test_few_texts_run_together(texts: int, groups: int) -> None:
    assert length_groups(torch.nn.Linear(1, 1), {"input_ids": torch.zeros(texts, 5)}) == groups


def test_the_result_answers_and_acts(walked: Walk) -> None:
    image = np.full((240, 320, 3), 90, np.uint8)
    answers = load_vlm(walked.folders["nano-vlm-2"]).answer([image], ["Where is the cube?"], "box_vertices")
    assert len(answers[0].values) == 24
    policy = Spear1Policy.load(walked.folders["nano-vla"])
    observation = {
        "observation/image": image,
        "observation/wrist_image": image,
        "observation/state": np.array([0.5, 0, 0.2, 1, 0, 0, 0, 1], np.float32),
        "prompt": "put the cube on the plate",
    }
    actions = policy.infer(observation)["actions"]
    assert actions.shape == (5, 8) and np.isfinite(actions).all()
    np.testing.assert_allclose(np.linalg.norm(actions[:, 3:7], axis=-1), 1, atol=1e-5)
    assert (actions[:, 3] >= 0).all()
    policy.reset()
    np.testing.assert_array_equal(policy.infer(observation)["actions"], actions)


def test_the_comparison_learns_to_act_without_3d(walked: Walk, tmp_path: Path) -> None:
    episodes = [("sim", walked.episodes, 1.0)]
    start = shutil.copytree(walked.folders["nano-vlm-0"], tmp_path / "start")
    (start / "recipe.json").unlink()  # as of a model that somebody else saved
    folder = train("nano-vla-no-3d", tmp_path / "run", episodes=episodes, init=start, **FEW)
    assert Spear1Policy.load(folder).model.vlm.moge is None
    assert json.loads((folder / "recipe.json").read_text())["init"] == {}


@pytest.fixture(scope="module")
def grown(walked: Walk, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SPEAR-VLM before its first step."""
    out, from_ = tmp_path_factory.mktemp("grown"), walked.folders
    return train(
        "nano-vlm-1", out, walked.labels, init=from_["nano-vlm-0"], moge=from_["nano-depth"], steps=0
    )


def test_moge_changes_no_visual_token_before_it_has_learned(walked: Walk, grown: Path) -> None:
    """The average of both projections is at first what the language model knows, and no longer after a
    step."""
    pixels = torch.randint(0, 256, (2, 3, 128, 192), generator=torch.Generator().manual_seed(0)).byte()
    tokens = []
    for folder in (walked.folders["nano-vlm-0"], grown, walked.folders["nano-vlm-1"]):
        vlm = weights.load(SpearVLMForConditionalGeneration, folder).eval()
        assert (vlm.moge is None) == (folder == walked.folders["nano-vlm-0"])
        with torch.no_grad():
            tokens.append(vlm.image_features("external", pixels))
    before, start, after = tokens
    torch.testing.assert_close(start, before, rtol=1e-5, atol=1e-5)
    assert (after - before).abs().max() > 1e-4


def test_new_tokens_do_not_depend_on_moge(walked: Walk, grown: Path, tmp_path: Path) -> None:
    """Without it, stage 1 begins with the same new 3D tokens as with it; stage 2 keeps what stage 1
    learned."""
    start = walked.folders["nano-vlm-0"]
    still = {"steps": 0, "quiet": True}
    stages = [recipe(name).changed(moge=False) for name in ("nano-vlm-1", "nano-vlm-2")]
    one = train(
        stages[0], tmp_path / "1", walked.labels, init=start, trained=("multi_modal_projector",), **still
    )
    rows = "language_model.embed_tokens.weight"
    before, without, with_moge = (parameters(folder)[rows] for folder in (start, one, grown))
    first = load_vlm(one).processor.coordinate_start
    assert torch.equal(without, with_moge) and not torch.equal(without[first:], before[first:])
    assert torch.equal(without[:first], before[:first])
    two = train(stages[1], tmp_path / "2", walked.labels, init=one, lr_scale={"vision_tower": 0.3}, **still)
    assert torch.equal(parameters(two)[rows], without)


def test_what_a_number_weighs_is_the_recipes(walked: Walk, tmp_path: Path) -> None:
    """Also where questions are asked beside the actions."""
    weights_of = {"coordinate_weight": 5.0, "coordinate_smoothing": 0.5, "question_images": 2}
    episodes = [("sim", walked.episodes, 1.0)]
    folder = train(
        "nano-vla",
        tmp_path,
        walked.labels,
        episodes,
        init=walked.folders["nano-vlm-2"],
        **{**FEW, **weights_of},
    )
    config = Spear1Policy.load(folder).model.vlm.config
    assert (config.coordinate_loss_weight, config.coordinate_smoothing) == (5.0, 0.5)


def test_stage_one_learns_what_the_paper_says_and_nothing_else(walked: Walk, grown: Path) -> None:
    before, after = parameters(grown), parameters(walked.folders["nano-vlm-1"])
    first = load_vlm(walked.folders["nano-vlm-1"]).processor.coordinate_start
    embeddings = "language_model.embed_tokens.weight"
    changed = {n for n in before if n != embeddings and not torch.equal(before[n], after[n])}
    assert changed == {n for n in before if n.startswith(("multi_modal_projector.", "moge_projector."))}
    assert torch.equal(before[embeddings][:first], after[embeddings][:first])
    assert not torch.equal(before[embeddings][first:], after[embeddings][first:])
    encoder = {n for n in after if n.startswith("moge.")}
    from spear.models.moge.encoder import MogeForDepth

    trained = dict(weights.load(MogeForDepth, walked.folders["nano-depth"]).named_parameters())
    assert encoder and all(torch.equal(trained[n], after[n]) for n in encoder)


def test_the_freeze_schedule_decides_what_learns(walked: Walk, tmp_path: Path) -> None:
    one, two = (parameters(walked.folders[name]) for name in ("nano-vlm-1", "nano-vlm-2"))
    moge = "moge.backbone.encoder.layer.0.mlp.fc1.weight"
    siglip = next(n for n in one if n.startswith("vision_tower.") and n.endswith("fc1.weight"))
    assert not torch.equal(one[moge], two[moge]) and not torch.equal(one[siglip], two[siglip])
    assert not torch.equal(
        one["language_model.layers.0.mlp.up_proj.weight"], two["language_model.layers.0.mlp.up_proj.weight"]
    )
    start = walked.folders["nano-vlm-1"]
    frozen = parameters(train("nano-vlm-2", tmp_path, walked.labels, init=start, frozen=ENCODERS, **FEW))
    encoders = [n for n in one if n.startswith(("vision_tower.", "moge."))]
    assert encoders and all(torch.equal(one[n], frozen[n]) for n in encoders)
    vla = dict(Spear1Policy.load(walked.folders["nano-vla"]).model.vlm.named_parameters())
    stem = "vision_tower.embeddings.patch_embedding.convs.0.weight"
    assert torch.equal(two[moge], vla[moge]) and torch.equal(two[stem], vla[stem])
    assert not torch.equal(two[siglip], vla[siglip])


def test_a_seeded_run_repeats_bit_for_bit(walked: Walk, tmp_path: Path) -> None:
    again = train("nano-vlm-2", tmp_path / "again", walked.labels, init=walked.folders["nano-vlm-1"], **FEW)
    first, second = parameters(walked.folders["nano-vlm-2"]), parameters(again)
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_the_policy_run_continues_bit_for_bit(walked: Walk, tmp_path: Path) -> None:
    arguments = {"episodes": [("sim", walked.episodes, 1.0)], "init": walked.folders["nano-vlm-2"]}
    few = {**FEW, "question_images": 2, "schedule": "constant", "log_every": 1}
    whole = train("nano-vla", tmp_path / "whole", walked.labels, **arguments, **{**few, "steps": 4})
    train("nano-vla", tmp_path / "parts", walked.labels, **arguments, **few)
    parts = train("nano-vla", tmp_path / "parts", walked.labels, **arguments, **{**few, "steps": 4})
    logs = [
        [json.loads(line)["loss"] for line in (run.parent / "log.jsonl").read_text().splitlines()]
        for run in (whole, parts)
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 4
    first, second = (dict(Spear1Policy.load(run).model.named_parameters()) for run in (whole, parts))
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_every_recipe_names_modules_that_exist() -> None:
    from spear.models.presets import preset, spear1_config
    from spear.models.spear1 import Spear1ForActionPrediction
    from spear.train.optimize import apply_freeze

    for one in RECIPES.values():
        if one.kind == "depth":
            continue
        with torch.device("meta"):
            model = Spear1ForActionPrediction(spear1_config(preset(one.preset)))
        apply_freeze(model if one.kind == "vla" else model.vlm, one.optimization)


def test_bad_requests_are_refused(walked: Walk, tmp_path: Path) -> None:
    with pytest.raises(SpearError, match="unknown recipe 'nano-vlm2': did you mean 'nano-vlm-2'"):
        recipe("nano-vlm2")
    with pytest.raises(SpearError, match="unknown recipe key 'batchsize': did you mean 'batch_size'"):
        recipe("nano-vla").changed(batchsize=3)
    with pytest.raises(SpearError, match="needs --labels"):
        train("nano-vlm-2", tmp_path / "a", **FEW)
    with pytest.raises(SpearError, match="demonstrations"):
        train("nano-vla", tmp_path / "b", walked.labels, **FEW)
    with pytest.raises(SpearError, match="give --moge"):
        train("nano-vlm-1", tmp_path / "c", walked.labels, init=walked.folders["nano-vlm-0"], **FEW)
    assert not any((tmp_path / name).exists() for name in "abc")
