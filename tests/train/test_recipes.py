"""The recipes: the paper's numbers, and modules that exist."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from spear.models.presets import preset, spear1_config
from spear.models.spear1 import Spear1ForActionPrediction
from spear.train.optimize import apply_freeze
from spear.train.recipes import RECIPES, VLM_1, recipe

PAPER = ("vlm-stage1", "vlm-stage2", "vla-pretrain", "post-train-bridge", "post-train-droid")
PAGE = Path(__file__).parents[2] / "docs" / "train.md"


def test_the_papers_numbers() -> None:
    numbers = {name: (recipe(name).batch_size, recipe(name).optimization.steps) for name in PAPER}
    assert numbers["vlm-stage1"] == (512, 2000) and numbers["vlm-stage2"] == (512, 10_000)
    assert numbers["vla-pretrain"] == (2048, 300_000)
    assert numbers["post-train-bridge"][1] == numbers["post-train-droid"][1] == 50_000
    assert recipe("vlm-stage1").optimization.trained == VLM_1 and recipe("vlm-stage1").coordinate_rows_only
    for name in ("vlm-stage1", "vlm-stage2"):
        mix = recipe(name).questions
        assert (mix.coordinate_weight, mix.coordinate_smoothing, mix.pairs) == (2.0, 0.0, (1, 4))
    for name in PAPER[2:]:
        stage = recipe(name)
        assert stage.optimization.frozen == ("vlm.moge",) and stage.optimization.ema > 0
        assert stage.normalization == "quantile" and not stage.normalize_each
    assert {recipe(name).preset for name in (*PAPER, "finetune-lora")} == {"spear1"}
    bridge, droid = (dataclasses.asdict(recipe(name)) for name in PAPER[3:])
    assert {key for key in bridge if bridge[key] != droid[key]} == {"name", "description"}


def test_every_recipe_names_modules_that_exist() -> None:
    for stage in RECIPES.values():
        if stage.kind != "depth":
            with torch.device("meta"):
                model = Spear1ForActionPrediction(spear1_config(preset(stage.preset)))
            apply_freeze(model if stage.kind == "vla" else model.vlm, stage.optimization)


def test_the_page_has_every_recipe_with_its_numbers() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `") and " × " in line]
    cells = {row.split("`")[1]: [cell.strip() for cell in row.split("|")[1:-1]] for row in rows}
    assert set(cells) == set(RECIPES)
    for name, row in cells.items():
        stage = RECIPES[name]
        assert f"{stage.optimization.steps:,} × {stage.batch_size:,}" in row, name
        assert any(cell.startswith(f"{stage.optimization.lr:g}") for cell in row), name
