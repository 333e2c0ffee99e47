"""The recipes: the paper's numbers, and modules that exist."""

import dataclasses
import tomllib
from pathlib import Path

import torch

from spear.data.actions import HORIZON
from spear.models.presets import build_spear1_config, get_preset
from spear.models.spear1 import Spear1ForActionPrediction
from spear.question_types import QUESTION_TYPES
from spear.tokens import CoordinateTokenizer
from spear.train import recipes
from spear.train.optimize import apply_freeze
from spear.train.recipes import RECIPES, get_recipe
from spear.types import CONTROL_RATE_HZ

PAPER = ("vlm-stage1", "vlm-stage2", "vla-pretrain", "post-train-bridge", "post-train-droid")
PAGE = Path(__file__).parents[2] / "docs" / "train.md"


def test_recipes_and_model_have_the_papers_numbers() -> None:
    numbers = [(get_recipe(name).batch_size, get_recipe(name).optimization.steps) for name in PAPER]
    assert numbers == [(512, 2000), (512, 10_000), (2048, 300_000), *2 * [(256, 50_000)]]
    assert get_recipe("vlm-stage1").coordinate_rows_only
    for stage in map(get_recipe, PAPER[:2]):
        mix, tokens = stage.questions, (stage.smooth_tokens, stage.bins, stage.spacing)
        assert (mix.coordinate_weight, mix.coordinate_smoothing, mix.pairs) == (2.0, 0.0, (1, 4))
        assert set(mix.families) == set(QUESTION_TYPES) and tokens == (False, None, None)
    for stage in map(get_recipe, PAPER[2:]):
        assert (
            stage.optimization.ema > 0
            and stage.normalization == "quantile"
            and not stage.normalize_each
        )
        assert (stage.flow_samples, stage.question_images, stage.augment, stage.flow) == (
            1,
            0,
            0.0,
            {},
        )
    assert {get_recipe(name).preset for name in (*PAPER, "finetune-lora")} == {"spear1"}
    bridge, droid = (dataclasses.asdict(get_recipe(name)) for name in PAPER[3:])
    assert {key for key in bridge if bridge[key] != droid[key]} == {"name", "description"}
    # The model: where the paper is silent, π0's numbers, or our choice, which `FlowConfig` says.
    config = build_spear1_config(get_preset("spear1"))
    weights = {f"{part}_weight": 1.0 for part in ("translation", "rotation", "gripper", "geodesic")}
    losses = {
        "rotation": "s3",
        "rotation_loss": "cosine",
        "prediction": "velocity",
        "geodesic_step": 0.1,
    }
    times = {"time_alpha": 1.5, "time_beta": 1.0, "time_scale": 0.999, "steps": 10}
    assert config.flow == {**weights, **losses, **times}
    assert (config.horizon, config.committed, config.min_period, config.max_period) == (
        5,
        0,
        4e-3,
        4.0,
    )
    vlm = config.vlm_config
    assert list(get_preset("spear1").image_sizes.items()) == [
        ("external", (280, 210)),
        ("wrist", (112, 112)),
    ]
    assert vlm.views == ["external", "wrist"] and vlm.vision_config.patch_size == 14
    assert (vlm.coordinate_bins, vlm.coordinate_loss_weight, vlm.coordinate_smoothing) == (
        1024,
        2.0,
        0.0,
    )
    assert (vlm.moge_config.image_size, vlm.moge_config.position_offset) == (518, 0.1)
    assert (CoordinateTokenizer.fit([0.0, 1.0]).num_bins, HORIZON, CONTROL_RATE_HZ) == (
        1024,
        5,
        5.0,
    )
    networks = config.expert_config, vlm.text_config, vlm.vision_config
    sizes = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
    found = [[getattr(network, field) for field in sizes] for network in networks]
    assert found == [[1024, 18, 8, 4096], [2048, 18, 8, 16384], [1152, 27, 16, 4304]]
    assert {(network.num_key_value_heads, network.head_dim) for network in networks[:2]} == {
        (1, 256)
    }
    assert vlm.text_config.vocab_size == vlm.coordinate_start + 1024 == 257_152 + 1024


def test_a_recipe_has_keys_and_values_that_set_would_take() -> None:
    for name, keys in tomllib.loads(
        Path(recipes.__file__).with_suffix(".toml").read_text()
    ).items():
        keys.pop("like", "")
        RECIPES[name].with_changes(**keys)


def test_every_recipe_names_modules_that_exist_and_the_papers_freeze_what_it_says() -> None:
    with torch.device("meta"):
        sizes = {stage.preset for stage in RECIPES.values()}
        models = {
            size: Spear1ForActionPrediction(build_spear1_config(get_preset(size))) for size in sizes
        }
    learned = {}
    for stage in RECIPES.values():
        if stage.kind != "depth":
            model = models[stage.preset]
            whole = model if stage.kind == "vla" else model.vlm
            apply_freeze(whole, stage.optimization)
            learned[stage.name] = {n: p.requires_grad for n, p in whole.named_parameters()}
    for name in PAPER:
        for parameter, learns in learned[name].items():
            inner = parameter.removeprefix("vlm.")
            of_stage_1 = inner.startswith(("moge_projector.", "multi_modal_projector."))
            of_stage_1 |= inner == "language_model.embed_tokens.weight"
            moge = name.startswith(("vla", "post")) and inner.startswith("moge.")
            assert learns == (of_stage_1 if name == "vlm-stage1" else not moge), (name, parameter)


def test_the_page_has_every_recipe_with_its_numbers() -> None:
    rows = [
        line for line in PAGE.read_text().splitlines() if line.startswith("| `") and " × " in line
    ]
    cells = {row.split("`")[1]: [cell.strip() for cell in row.split("|")[1:-1]] for row in rows}
    assert set(cells) == set(RECIPES)
    for name, row in cells.items():
        stage = RECIPES[name]
        assert f"{stage.optimization.steps:,} × {stage.batch_size:,}" in row, name
        assert any(cell.startswith(f"{stage.optimization.lr:g}") for cell in row), name
