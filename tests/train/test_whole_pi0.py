"""A converted π0 is trained on real episodes: all of it, and by LoRA.

The π0 is tiny and has random weights and LeRobot's names. The episodes are 25 of BridgeData V2,
which the real data beside the repository have; without them the tests are skipped.
"""

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from published_checkpoints import (
    TINY14,
    make_paligemma,
    make_pi0,
    publish_moge,
    publish_paligemma,
    publish_pi0,
)
from refusals import Command
from spear.tokens import CoordinateTokenizer

SIZE = ("--preset", "tiny14")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tiny_published_presets")]


@pytest.fixture
def converted(tmp_path: Path, run_command: Command) -> Path:
    """The folder of the SPEAR-1 that a π0 and a MoGe have become."""
    pi0 = publish_pi0(make_pi0(state_dim=32, action_dim=32), tmp_path / "pi0")
    moge = publish_moge(tmp_path / "moge.pt")
    tokenizer = publish_paligemma(make_paligemma(), tmp_path / "paligemma")
    coordinates = tmp_path / "coordinates.json"
    values_m = np.random.default_rng(0).normal(size=1000)
    CoordinateTokenizer.fit(values_m, TINY14.bins).save(coordinates)
    folder = tmp_path / "spear1"

    run_command(
        ["convert", "pi0", str(pi0), str(moge), "--tokenizer", str(tokenizer)],
        ["--coordinates", str(coordinates), "--out", str(folder), *SIZE],
    )
    return folder


def test_post_training_changes_what_the_pi0_brought_and_moges_projection(
    converted: Path, episodes: str, tmp_path: Path, run_command: Command
) -> None:
    """MoGe's projection is zero at first, and its encoder is frozen by the recipe."""
    out = tmp_path / "bridge"
    run_command(
        ["train", "post-train-bridge", "--episodes", episodes, "--init", str(converted)],
        ["--out", str(out), "--steps", "3", "--batch-size", "4", "--warmup-steps", "1", *SIZE],
    )

    weights_before = load_file(converted / "model.safetensors")
    weights_after = load_file(out / "final" / "model.safetensors")
    changed = {
        name for name, weight in weights_after.items() if not weight.equal(weights_before[name])
    }
    assert "vlm.moge_projector.linear.weight" in changed
    assert "vlm.language_model.layers.0.mlp.up_proj.weight" in changed
    assert "expert.layers.0.mlp.up_proj.weight" in changed
    assert not [name for name in changed if name.startswith("vlm.moge.")]


def test_lora_is_merged_and_saved_beside_the_policy(
    converted: Path, episodes: str, tmp_path: Path, run_command: Command
) -> None:
    out = tmp_path / "lora"
    run_command(
        ["train", "finetune-lora", "--episodes", episodes, "--init", str(converted)],
        ["--out", str(out), "--steps", "3", "--batch-size", "4", "--warmup-steps", "1"],
        ["--set", "accumulate=2", *SIZE],
    )

    assert (out / "final" / "adapter" / "adapter_model.safetensors").is_file()
    weights_before = load_file(converted / "model.safetensors")
    weights_after = load_file(out / "final" / "model.safetensors")
    query = "vlm.language_model.layers.0.self_attn.q_proj.weight"
    assert not weights_after[query].equal(weights_before[query])
