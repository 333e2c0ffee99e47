"""A policy that is converted from a published π0 can be trained and loaded.

The published folders are tiny, with random weights, so only the path is tested.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data_tiny import make_episode, write_store
from published_checkpoints import (
    TINY14,
    make_paligemma,
    make_pi0,
    publish_moge,
    publish_paligemma,
    publish_pi0,
)
from refusals import refuses
from spear import embodiments
from spear.data.store.episode_store import EpisodeStore
from spear.models.processing import Processor
from spear.models.weights.pi0_policy import plan_pi0
from spear.policy import Spear1Policy
from spear.tokens import CoordinateTokenizer
from train_tiny import run_recipe

MOGE_PROJECTION = "vlm.moge_projector.linear.weight"
CHANGES: dict[str, Any] = {
    "preset": "tiny14",
    "batch_size": 2,
    "accumulate": 1,
    "warmup": 1,
    "steps": 2,
}


# Registers the preset "tiny14".
pytestmark = pytest.mark.usefixtures("tiny_published_presets")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a converted π0 with a MoGe, which no test changes."""
    root = tmp_path_factory.mktemp("published")
    pi0 = publish_pi0(make_pi0(state_dim=32, action_dim=32), root / "pi0")
    moge = publish_moge(root / "model.pt")
    tokenizer = publish_paligemma(make_paligemma(), root / "paligemma")
    plan = plan_pi0(pi0, moge, size="tiny14", tokenizer=tokenizer)
    coordinates = CoordinateTokenizer.fit([0.0, 1.0], TINY14.bins)
    processor = Processor(plan.tokenizer, coordinates, dict(TINY14.image_sizes))
    plan.save(root / "spear1", save_more=processor.save)
    return root / "spear1"


@pytest.fixture
def store(tmp_path: Path) -> EpisodeStore:
    return write_store([make_episode(0), make_episode(1)], tmp_path / "episodes")


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("recipe", ["post-train-bridge", "finetune-lora"])
def test_training_lets_moge_join(
    recipe: str, policy: Path, store: EpisodeStore, tmp_path: Path
) -> None:
    if recipe == "finetune-lora":
        pytest.importorskip("peft")

    trained = run_recipe(recipe, tmp_path / "run", store=store, init=policy, **CHANGES)

    assert not read_weights(policy)[MOGE_PROJECTION].any()
    assert read_weights(trained)[MOGE_PROJECTION].any()


def test_training_of_the_expert_alone_leaves_moge_without_effect(
    policy: Path, store: EpisodeStore, tmp_path: Path
) -> None:
    trained = run_recipe("finetune-expert", tmp_path / "run", store=store, init=policy, **CHANGES)

    assert not read_weights(trained)[MOGE_PROJECTION].any()


def test_the_trained_policy_infers_but_after_two_steps_may_not_move_a_robot(
    policy: Path, store: EpisodeStore, tmp_path: Path
) -> None:
    """Its new action layers are nearly random, so that it wants to turn too far."""
    run_recipe("post-train-bridge", tmp_path / "run", store=store, init=policy, **CHANGES)
    robot = embodiments.load("generic")

    trained = Spear1Policy.load(tmp_path / "run")

    refuses("the policy wants to go .* in one step", trained.infer, robot.example())
