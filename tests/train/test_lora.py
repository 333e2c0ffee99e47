"""LoRA on the nano policy: what learns, what is saved, and that a stopped run continues bit for bit."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tiny import make, stored
from spear import embodiments
from spear.data.store.episode_store import EpisodeStore
from spear.models.spear1 import Spear1ForActionPrediction
from spear.models.weights import load as weights
from spear.policy import Spear1Policy, locate
from train_tiny import read_log, run_recipe

pytest.importorskip("peft")
pytestmark = pytest.mark.xdist_group("lora")  # what the tests share is made once
FEW = {
    "preset": "nano",
    "batch_size": 2,
    "accumulate": 2,
    "warmup": 1,
    "ema": 0.5,
    "schedule": "constant",
}
FEW |= {"precision": "fp32", "frozen_precision": "fp32"}  # on every processor
LANGUAGE = "vlm.language_model."


def run(out: Path, store: EpisodeStore, steps: int, **changes: Any) -> Path:
    arguments = {**FEW, "steps": steps, "lr": 1e-3, **changes}
    return run_recipe("finetune-lora", out, store=store, init=locate("nano"), **arguments)


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    return weights.load(Spear1ForActionPrediction, folder).state_dict()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    return stored([make(0), make(1)], tmp_path_factory.mktemp("episodes") / "made")


@pytest.fixture(scope="module")
def trained(store: EpisodeStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("lora"), store, 3)


def test_the_language_model_learns_by_lora_the_expert_fully_the_encoders_not(trained: Path) -> None:
    before, after = parameters(locate("nano")), parameters(trained)
    assert before.keys() == after.keys() and all(v.dtype == torch.float32 for v in after.values())
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    layers = {
        n for n in before if n.startswith(f"{LANGUAGE}layers.") and n.endswith("_proj.weight")
    }
    # Of the last layer the expert reads keys and values alone: the rest of it has no part in an action.
    unread = {
        n for n in layers if ".layers.4." in n and ".k_proj." not in n and ".v_proj." not in n
    }
    assert len(layers) == 7 * 5 and len(unread) == 5
    assert {n for n in changed if n.startswith(LANGUAGE)} == layers - unread
    assert not [n for n in changed if n.startswith(("vlm.vision_tower.", "vlm.moge."))]
    assert {n for n in before if n.startswith("expert.") and n.endswith("_proj.weight")} < changed
    for name in layers - unread:  # what LoRA adds has its rank
        spectrum = torch.linalg.svdvals((after[name] - before[name]).double())
        assert spectrum[16] < 1e-4 * spectrum[0], name


def test_peft_reads_the_adapter_and_merges_it_to_the_same_weights(trained: Path) -> None:
    from peft import PeftModel

    base = weights.load(Spear1ForActionPrediction, locate("nano"))
    merged = (
        PeftModel.from_pretrained(base, str(trained / "adapter")).merge_and_unload().state_dict()
    )
    for name, value in parameters(trained).items():
        if name.startswith(f"{LANGUAGE}layers."):
            torch.testing.assert_close(merged[name], value, rtol=1e-6, atol=1e-7)


def test_a_stopped_run_continues_bit_for_bit(
    trained: Path, store: EpisodeStore, tmp_path: Path
) -> None:
    run(tmp_path, store, 1)
    continued = run(tmp_path, store, 3)
    logs = [[row["loss"] for row in read_log(folder.parent)] for folder in (trained, continued)]
    assert len(logs[0]) == 3 and logs[0] == logs[1]
    torch.testing.assert_close(parameters(continued), parameters(trained), rtol=0, atol=0)


def test_one_folder_is_all_that_serving_needs(trained: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(trained, tmp_path / "robot")
    texts = [path.read_text() for path in alone.iterdir() if path.suffix == ".json"]
    assert not any(str(trained.parent) in text for text in texts)
    policy = Spear1Policy.load(alone)
    assert not any(".lora_" in name for name, _ in policy.model.named_parameters())
    observation = embodiments.load("generic").example()
    actions = policy.infer(observation)["actions"]
    np.testing.assert_array_equal(Spear1Policy.load(trained).infer(observation)["actions"], actions)
