"""LoRA on the nano policy: what learns, what is saved, and a stopped run that continues exactly.

Nano's language model has five layers, 0 to 4.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tiny import make_episode, write_store
from spear import embodiments
from spear.data.store.episode_store import EpisodeStore
from spear.models.spear1 import Spear1ForActionPrediction
from spear.models.weights import load as weights
from spear.policy import Spear1Policy, locate_checkpoint
from train_tiny import read_losses, run_recipe

pytest.importorskip("peft")
CHANGES = {
    "preset": "nano",
    "batch_size": 2,
    "accumulate": 2,
    "warmup": 1,
    "lr": 1e-3,
    "ema": 0.5,
    "schedule": "constant",
    # The same numbers on every processor: by default bfloat16 is used where it is fast.
    "precision": "fp32",
    "frozen_precision": "fp32",
}
NUM_LAYERS = 5
RANK = 16  # rank of the LoRA matrices in the recipe finetune-lora
LANGUAGE_MODEL = "vlm.language_model."
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def run(out: Path, store: EpisodeStore, steps: int) -> Path:
    """Train the recipe finetune-lora for `steps` steps, and return the folder of the result."""
    changes: dict[str, Any] = {**CHANGES, "steps": steps}
    return run_recipe("finetune-lora", out, store=store, init=locate_checkpoint("nano"), **changes)


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    return weights.load(Spear1ForActionPrediction, folder).state_dict()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    return write_store(
        [make_episode(0), make_episode(1)], tmp_path_factory.mktemp("episodes") / "made"
    )


@pytest.fixture(scope="module")
def trained(store: EpisodeStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("lora"), store, steps=3)


@pytest.fixture(scope="module")
def original() -> dict[str, torch.Tensor]:
    return load_weights(locate_checkpoint("nano"))


@pytest.fixture(scope="module")
def trained_weights(trained: Path) -> dict[str, torch.Tensor]:
    return load_weights(trained)


@pytest.fixture(scope="module")
def changed(
    original: dict[str, torch.Tensor], trained_weights: dict[str, torch.Tensor]
) -> set[str]:
    """Names of the weights that the training changed."""
    return {name for name in original if not torch.equal(original[name], trained_weights[name])}


@pytest.fixture(scope="module")
def read_layers(original: dict[str, torch.Tensor]) -> set[str]:
    """Names of the weights of the language model's linear layers that influence actions.

    The action expert reads each layer's keys and values. In the last layer, number 4, the five
    other linear layers follow after keys and values, and influence nothing.
    """
    layers = {
        name
        for name in original
        if name.startswith(f"{LANGUAGE_MODEL}layers.") and name.endswith("_proj.weight")
    }
    assert len(layers) == len(LINEAR_LAYERS) * NUM_LAYERS
    unread = {
        name
        for name in layers
        if ".layers.4." in name and ".k_proj." not in name and ".v_proj." not in name
    }
    assert len(unread) == len(LINEAR_LAYERS) - 2  # all but those of keys and of values
    return layers - unread


def test_the_result_has_the_same_weights_in_float32(
    original: dict[str, torch.Tensor], trained_weights: dict[str, torch.Tensor]
) -> None:
    assert original.keys() == trained_weights.keys()
    assert all(value.dtype == torch.float32 for value in trained_weights.values())


def test_the_linear_layers_of_the_language_model_learn(
    changed: set[str], read_layers: set[str]
) -> None:
    assert {name for name in changed if name.startswith(LANGUAGE_MODEL)} == read_layers


def test_the_encoders_do_not_learn(changed: set[str]) -> None:
    assert not [name for name in changed if name.startswith(("vlm.vision_tower.", "vlm.moge."))]


def test_the_action_expert_learns_fully(
    original: dict[str, torch.Tensor], changed: set[str]
) -> None:
    names = {
        name for name in original if name.startswith("expert.") and name.endswith("_proj.weight")
    }

    assert names < changed


def test_what_lora_adds_has_its_rank(
    original: dict[str, torch.Tensor],
    trained_weights: dict[str, torch.Tensor],
    read_layers: set[str],
) -> None:
    """A change of rank 16 has 16 singular values; the next ones are only rounding."""
    for name in read_layers:
        singular_values = torch.linalg.svdvals((trained_weights[name] - original[name]).double())
        assert singular_values[RANK] < 1e-4 * singular_values[0], name


def test_peft_reads_the_adapter_and_merges_it_to_the_same_weights(
    trained: Path, trained_weights: dict[str, torch.Tensor]
) -> None:
    from peft import PeftModel

    base = weights.load(Spear1ForActionPrediction, locate_checkpoint("nano"))

    model = PeftModel.from_pretrained(base, str(trained / "adapter"))
    merged = model.merge_and_unload().state_dict()

    for name, value in trained_weights.items():
        if name.startswith(f"{LANGUAGE_MODEL}layers."):
            torch.testing.assert_close(merged[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_a_stopped_run_continues_bit_for_bit(
    trained: Path, trained_weights: dict[str, torch.Tensor], store: EpisodeStore, tmp_path: Path
) -> None:
    run(tmp_path, store, steps=1)
    continued = run(tmp_path, store, steps=3)

    losses = read_losses(continued.parent)
    assert len(losses) == 3
    assert losses == read_losses(trained.parent)
    torch.testing.assert_close(load_weights(continued), trained_weights, rtol=0, atol=0)


def test_one_folder_is_all_that_serving_needs(trained: Path, tmp_path: Path) -> None:
    """A copied result names no file of the run that made it, and acts as the original does."""
    folder = shutil.copytree(trained, tmp_path / "robot")
    for path in folder.glob("*.json"):
        assert str(trained.parent) not in path.read_text()
    observation = embodiments.load("generic").example()

    policy = Spear1Policy.load(folder)
    actions = policy.infer(observation)["actions"]

    assert not any(".lora_" in name for name, _ in policy.model.named_parameters())
    expected = Spear1Policy.load(trained).infer(observation)["actions"]
    np.testing.assert_array_equal(actions, expected)
