"""The way from a π0 to a served policy, with `nano` as the π0.

The π0 is converted, trained on real episodes with all its weights, then by LoRA, and at last asked
through a server. The episodes are 25 of BridgeData V2, which the real data beside the repository
have; without them the tests are skipped.
"""

import runpy
from pathlib import Path

import numpy as np
import pytest

from refusals import Command
from serve_here import run_server
from spear import embodiments
from spear.policy import Spear1Policy
from spear.serve.client import RemotePolicy

EXAMPLE = Path(__file__).parents[2] / "examples" / "nano_pi0.py"
TRAIN_SPLIT = ("--split", "train[:19]")

pytestmark = pytest.mark.slow


@pytest.fixture
def converted(tmp_path: Path, run_command: Command) -> str:
    """The folder of the SPEAR-1 that the π0 has become, with the 3D encoder of nano-depth."""
    pi0 = tmp_path / "pi0"
    runpy.run_path(str(EXAMPLE))["main"](pi0)
    folder = str(tmp_path / "spear1")
    run_command(
        ["convert", "pi0", str(pi0), "nano-depth", "--preset", "nano"],
        ["--coordinates", str(pi0 / "coordinates.json"), "--out", folder],
    )
    return folder


@pytest.fixture
def trained(converted: str, episodes: str, tmp_path: Path, run_command: Command) -> str:
    """The folder of the policy after some steps of post-training."""
    folder = str(tmp_path / "bridge")
    run_command(
        ["train", "post-train-bridge", "--preset", "nano", "--episodes", episodes, *TRAIN_SPLIT],
        ["--init", converted, "--out", folder, "--steps", "12", "--batch-size", "4"],
        ["--lr", "4e-4", "--warmup-steps", "2"],
    )
    return folder


def ask_server(policy: str) -> np.ndarray:
    """Serve a policy to a WidowX, and return the actions for one observation.

    The noise that the policy begins with is the same in every call.
    """
    observation = {**embodiments.load("widowx").example(), "seed": 0}
    with run_server(Spear1Policy.load(policy), robot="widowx") as server:
        client = RemotePolicy(f"ws://localhost:{server.port}")
        return np.asarray(client.infer(observation)["actions"])


def test_after_post_training_a_server_answers_with_actions(trained: str) -> None:
    actions = ask_server(trained)

    assert actions.shape == (5, 7)
    assert np.isfinite(actions).all()


def test_after_post_training_lora_adapts_it_and_a_server_answers(
    trained: str, episodes: str, tmp_path: Path, run_command: Command
) -> None:
    adapted = str(tmp_path / "lora")

    run_command(
        ["train", "finetune-lora", "--preset", "nano", "--episodes", episodes, *TRAIN_SPLIT],
        ["--init", f"{trained}/final", "--out", adapted, "--steps", "4", "--batch-size", "4"],
        ["--warmup-steps", "1", "--set", "accumulate=2"],
    )

    assert (Path(adapted) / "final" / "adapter" / "adapter_model.safetensors").is_file()
    assert not np.array_equal(ask_server(adapted), ask_server(trained))
