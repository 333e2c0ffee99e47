"""The recipes have the paper's numbers, and name modules that exist.

`VLM_RECIPES` and `POLICY_RECIPES` are the paper's; all others are ours.
"""

import dataclasses
import tomllib
from pathlib import Path

import pytest
import torch

from spear.data.actions import HORIZON
from spear.models.presets import build_spear1_config, get_preset
from spear.models.spear1 import Spear1Config, Spear1ForActionPrediction
from spear.question_types import QUESTION_TYPES
from spear.tokens import CoordinateTokenizer
from spear.train import recipes
from spear.train.optimize import apply_freeze
from spear.train.recipes import RECIPES, get_recipe
from spear.types import CONTROL_RATE_HZ

VLM_RECIPES = ("vlm-stage1", "vlm-stage2")
POLICY_RECIPES = ("vla-pretrain", "post-train-bridge", "post-train-droid")
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "recipes.md"


@pytest.mark.parametrize(
    ("name", "batch_size", "steps"),
    [
        ("vlm-stage1", 512, 2000),
        ("vlm-stage2", 512, 10_000),
        ("vla-pretrain", 2048, 300_000),
        ("post-train-bridge", 256, 50_000),
        ("post-train-droid", 256, 50_000),
    ],
)
def test_batches_and_steps_are_the_papers(name: str, batch_size: int, steps: int) -> None:
    recipe = get_recipe(name)

    assert recipe.batch_size == batch_size
    assert recipe.optimization.steps == steps


@pytest.mark.parametrize("name", [*VLM_RECIPES, *POLICY_RECIPES, "finetune-lora"])
def test_full_size_recipes_have_the_full_preset(name: str) -> None:
    assert get_recipe(name).preset == "spear1"


@pytest.mark.parametrize("name", VLM_RECIPES)
def test_questions_and_3d_tokens_of_the_vlm_are_the_papers(name: str) -> None:
    recipe = get_recipe(name)

    assert recipe.questions.coordinate_weight == 2.0
    assert recipe.questions.coordinate_smoothing == 0.0
    assert recipe.questions.pairs == (1, 4)
    assert set(recipe.questions.families) == set(QUESTION_TYPES)
    assert not recipe.smooth_tokens
    assert recipe.bins is None
    assert recipe.spacing is None


def test_stage_one_trains_only_the_3d_tokens_rows_of_the_embeddings() -> None:
    assert get_recipe("vlm-stage1").coordinate_rows_only


@pytest.mark.parametrize("name", POLICY_RECIPES)
def test_policies_are_trained_as_the_paper_says(name: str) -> None:
    recipe = get_recipe(name)

    assert recipe.optimization.ema > 0
    assert recipe.normalization == "quantile"
    assert not recipe.normalize_each
    assert recipe.flow_samples == 1
    assert recipe.question_images == 0
    assert recipe.augment == 0.0
    assert recipe.flow == {}


def test_post_training_is_the_same_on_both_datasets() -> None:
    bridge = dataclasses.asdict(get_recipe("post-train-bridge"))
    droid = dataclasses.asdict(get_recipe("post-train-droid"))

    assert {key for key in bridge if bridge[key] != droid[key]} == {"name", "description"}


@pytest.fixture(scope="module")
def config() -> Spear1Config:
    """The config of the full-size model.

    Where the paper gives no number, it has π0's number or our choice.
    """
    return build_spear1_config(get_preset("spear1"))


def test_the_flow_has_the_papers_settings(config: Spear1Config) -> None:
    papers_settings = {
        "translation_weight": 1.0,
        "rotation_weight": 1.0,
        "gripper_weight": 1.0,
        "geodesic_weight": 1.0,
        "rotation": "s3",
        "rotation_loss": "cosine",
        "prediction": "velocity",
        "geodesic_step": 0.1,
        "time_alpha": 1.5,
        "time_beta": 1.0,
        "time_scale": 0.999,
        "steps": 10,
    }
    # The paper's loss has no other terms, so their weights are 0.
    other_weights = {
        name: 0 for name in config.flow if name.endswith("_weight") and name not in papers_settings
    }
    assert config.flow == {**papers_settings, **other_weights}
    assert config.horizon == 5
    assert config.committed == 0
    # Periods of the sinusoidal encoding of the flow time τ, as in π0.
    assert config.min_period == 4e-3
    assert config.max_period == 4.0
    assert HORIZON == 5
    assert CONTROL_RATE_HZ == 5.0


def test_images_have_the_papers_sizes(config: Spear1Config) -> None:
    vlm = config.vlm_config

    image_sizes = get_preset("spear1").image_sizes
    assert list(image_sizes.items()) == [("external", (280, 210)), ("wrist", (112, 112))]
    assert vlm.views == ["external", "wrist"]
    assert vlm.vision_config.patch_size == 14
    assert vlm.moge_config.image_size == 518
    assert vlm.moge_config.position_offset == 0.1


def test_3d_tokens_are_the_papers(config: Spear1Config) -> None:
    vlm = config.vlm_config

    assert vlm.coordinate_bins == 1024
    assert vlm.coordinate_loss_weight == 2.0
    assert vlm.coordinate_smoothing == 0.0
    assert CoordinateTokenizer.fit([0.0, 1.0]).num_bins == 1024
    # PaliGemma's vocabulary has 257,152 tokens; the 3D tokens follow them.
    assert vlm.coordinate_start == 257_152
    assert vlm.text_config.vocab_size == 257_152 + 1024


def test_networks_have_the_published_sizes(config: Spear1Config) -> None:
    vlm = config.vlm_config
    networks = {
        "expert": config.expert_config,
        "language model": vlm.text_config,
        "image encoder": vlm.vision_config,
    }

    sizes = {}
    for name, network in networks.items():
        sizes[name] = (
            network.hidden_size,
            network.num_hidden_layers,
            network.num_attention_heads,
            network.intermediate_size,
        )
    assert sizes == {  # width, layers, attention heads, width inside of the MLP
        "expert": (1024, 18, 8, 4096),
        "language model": (2048, 18, 8, 16384),
        "image encoder": (1152, 27, 16, 4304),
    }
    for network in (config.expert_config, vlm.text_config):
        assert network.num_key_value_heads == 1
        assert network.head_dim == 256


def test_a_recipe_has_keys_and_values_that_set_would_take() -> None:
    """`with_changes` checks keys and values, and raises for wrong ones."""
    tables = tomllib.loads(Path(recipes.__file__).with_suffix(".toml").read_text())

    for name, keys in tables.items():
        keys.pop("like", "")
        RECIPES[name].with_changes(**keys)


def list_trainable(recipe: recipes.Recipe) -> dict[str, bool]:
    """Return whether each parameter of a recipe's model learns, by the parameter's name."""
    with torch.device("meta"):
        policy = Spear1ForActionPrediction(build_spear1_config(get_preset(recipe.preset)))
    model = policy if recipe.kind == "vla" else policy.vlm
    apply_freeze(model, recipe.optimization)
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


OTHER_RECIPES = [
    name
    for name, recipe in RECIPES.items()
    if recipe.kind != "depth" and name not in (*VLM_RECIPES, *POLICY_RECIPES)
]


@pytest.mark.parametrize("name", OTHER_RECIPES)
def test_a_recipe_names_modules_that_exist(name: str) -> None:
    assert any(list_trainable(get_recipe(name)).values())


def test_stage_one_trains_projectors_and_embeddings_alone() -> None:
    trainable = list_trainable(get_recipe("vlm-stage1"))

    learning_modules = {name.partition(".")[0] for name, learns in trainable.items() if learns}
    assert learning_modules == {"moge_projector", "multi_modal_projector", "language_model"}
    for name, learns in trainable.items():
        is_projector = name.startswith(("moge_projector.", "multi_modal_projector."))
        assert learns == (is_projector or name == "language_model.embed_tokens.weight"), name


def test_stage_two_trains_everything() -> None:
    assert all(list_trainable(get_recipe("vlm-stage2")).values())


@pytest.mark.parametrize("name", POLICY_RECIPES)
def test_policies_train_everything_but_moges_encoder(name: str) -> None:
    for parameter, learns in list_trainable(get_recipe(name)).items():
        assert learns != parameter.startswith("vlm.moge."), parameter


def test_the_page_has_every_recipe_with_its_numbers() -> None:
    """A row of the page's tables has the recipe's name, steps × batch size, learning rate, …"""
    cells_of_recipe = {}
    for line in PAGE.read_text().splitlines():
        if line.startswith("| `") and " × " in line:
            name = line.split("`")[1]
            cells_of_recipe[name] = [cell.strip() for cell in line.split("|")[1:-1]]

    assert set(cells_of_recipe) == set(RECIPES)
    for name, cells in cells_of_recipe.items():
        recipe = RECIPES[name]
        assert f"{recipe.optimization.steps:,} × {recipe.batch_size:,}" in cells, name
        assert any(cell.startswith(f"{recipe.optimization.lr:g}") for cell in cells), name
