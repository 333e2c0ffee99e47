"""A π0 of openpi's PyTorch port, converted by `spear convert pi0`, computes the same.

    python benchmarks/models/openpi_conversion.py --openpi openpi-venv/bin/python

`openpi_pi0.py` says how to install that Python. openpi builds a small π0 with random weights, saves
it as it saves its own, and computes keys and values of a prefix, hidden states of the expert, a
velocity and actions. The converted SPEAR-1, with a MoGe, computes them from the same inputs. The
script prints the largest differences over the largest value. Of a π0.5, only keys and values are
the same, because its expert has other norms.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor

from pi0_pair import relative_difference
from spear.cli import run_reporting_errors
from spear.models import presets
from spear.models.moge import checkpoint as moge_checkpoint
from spear.models.moge.networks import ENCODERS, MogeV1
from spear.models.presets import SPEAR1, make_gemma_fields, make_image_encoder_fields
from spear.models.spear1 import NUM_STATE_FEATURES, Spear1ForActionPrediction
from spear.models.weights.pi0_policy import plan_pi0
from spear.types import ACTION_DIM, Action

CHILD = Path(__file__).with_name("openpi_conversion_child.py")
BATCH = 2
NUM_TEXT_TOKENS = 6
NUM_ROWS = 320  # token embeddings; the last is the image token
NUM_FLOW_STEPS = 4
FLOW_TIME = 0.3  # SPEAR-1's, from noise to data
TINY = dataclasses.replace(
    SPEAR1,
    name="tiny-openpi",
    vision=make_image_encoder_fields(
        64, 2, 16, intermediate_size=96, patch_size=14, image_size=224
    ),
    text=make_gemma_fields(64, 3, 4, intermediate_size=96, head_dim=16),
    expert=make_gemma_fields(32, 3, 4, intermediate_size=48, head_dim=16),
    flow={"rotation": "linear"},
)
MOGE_ENCODER = (16, 5, 2)  # width, layers, heads


def draw_inputs() -> dict[str, Tensor]:
    """Draw two images and a padded text per row, and a state, noise and a flow time."""
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, 2, 3, 224, 224)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    mask = torch.ones(BATCH, NUM_TEXT_TOKENS, dtype=torch.long)
    mask[0, 4:] = 0
    return {
        "pixels": pixels,
        "images": pixels / 127.5 - 1,
        "ids": torch.randint(3, NUM_ROWS - 1, mask.shape, generator=generator),
        "mask": mask,
        "state": torch.randn(BATCH, NUM_STATE_FEATURES, generator=generator),
        "noise": torch.randn(BATCH, TINY.horizon, ACTION_DIM, generator=generator),
        "time": torch.full((BATCH,), 1 - FLOW_TIME),  # π0's, from data to noise
    }


def run_openpi(python: Path, folder: Path, inputs: dict[str, Tensor], is_pi05: bool) -> Any:
    """Let openpi write `folder`/pi0, and return what its model computes, by name."""
    (folder / "pi0").mkdir(parents=True)
    save_file(inputs, folder / "inputs.safetensors")
    request = {
        "pi05": is_pi05,
        "vision": TINY.vision,
        "text": TINY.text,
        "expert": TINY.expert,
        "rows": NUM_ROWS,
        "horizon": TINY.horizon,
        "state": NUM_STATE_FEATURES,
        "action": ACTION_DIM,
        "steps": NUM_FLOW_STEPS,
        "inputs": str(folder / "inputs.safetensors"),
        "checkpoint": str(folder / "pi0" / "model.safetensors"),
        "results": str(folder / "results.safetensors"),
    }
    request_file = folder / "request.json"
    request_file.write_text(json.dumps(request))
    environment = dict(os.environ, TRANSFORMERS_VERBOSITY="error")
    environment.pop("PYTHONPATH", None)
    subprocess.run([str(python), str(CHILD), str(request_file)], env=environment, check=True)
    return load_file(folder / "results.safetensors")


def write_moge(path: Path) -> Path:
    """Write a MoGe v1 with random weights and the names of the published file."""
    ENCODERS["dinov2_tiny"] = MOGE_ENCODER
    config = {
        "encoder": "dinov2_tiny",
        "remap_output": "exp",
        "intermediate_layers": 4,
        "dim_proj": 8,
        "dim_upsample": [32, 32, 32],
        "last_conv_channels": 32,
    }
    weights = moge_checkpoint.to_published_weights(MogeV1(config).state_dict(), version=1)
    torch.save({"model_config": config, "model": weights}, path)
    return path


@torch.no_grad()
def compute_results(
    model: Spear1ForActionPrediction, inputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Compute with SPEAR-1 what openpi's model computes, by the same names."""
    arguments: dict[str, Any] = {
        "pixel_values": {"external": inputs["pixels"][:, 0], "wrist": inputs["pixels"][:, 1]},
        "input_ids": inputs["ids"],
        "attention_mask": inputs["mask"],
    }
    prefix = model.encode_prefix(**arguments)
    results = {}
    for layer, (keys, values) in enumerate(
        zip(prefix.cache.keys, prefix.cache.values, strict=True)
    ):
        results[f"keys {layer}"] = keys
        results[f"values {layer}"] = values

    hidden_states: list[Tensor] = []
    hooks = []
    for module in model.expert.layers:
        hooks.append(
            module.register_forward_hook(lambda _, __, output: hidden_states.append(output))
        )
    noise = Action.from_vector(inputs["noise"])
    tau = torch.full((BATCH,), FLOW_TIME)
    velocity = model.predict(prefix, inputs["state"], noise, tau)
    for hook in hooks:
        hook.remove()
    for layer, hidden in enumerate(hidden_states):
        results[f"hidden {layer}"] = hidden
    results["velocity"] = -velocity.to_vector()  # π0's points to the noise

    sampled = model.sample_actions(
        **arguments, state=inputs["state"], steps=NUM_FLOW_STEPS, noise=noise
    )
    results["actions"] = sampled.to_vector()
    return results


def compare(
    our_results: dict[str, Tensor], expected_results: dict[str, Tensor], mask: Tensor
) -> dict[str, float]:
    """Return the largest relative difference of each kind of result."""
    num_padding = (mask == 0).sum(dim=1)  # at the end of each row
    differences: dict[str, float] = {}
    for name, expected in expected_results.items():
        kind = name.split(" ")[0]
        actual = our_results[name]
        if kind == "actions":
            # Our sampling returns canonical unit quaternions, so the other five numbers compare.
            expected = expected[..., [0, 1, 2, 7]]
            actual = actual[..., [0, 1, 2, 7]]
        for row in range(BATCH):
            num_tokens = expected.shape[-2]
            if kind in ("keys", "values"):
                num_tokens -= int(num_padding[row])  # those of padding are never read
            difference = relative_difference(
                actual[row, ..., :num_tokens, :], expected[row, ..., :num_tokens, :]
            )
            differences[kind] = max(differences.get(kind, 0.0), difference)
    return differences


def main(openpi: Path) -> None:
    """Print the differences.

    Args:
        openpi: a Python with openpi.
    """
    presets.PRESETS[TINY.name] = TINY
    inputs = draw_inputs()
    for title, is_pi05 in (("π0", False), ("π0.5", True)):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / title
            expected_results = run_openpi(openpi, folder, inputs, is_pi05)
            plan = plan_pi0(folder / "pi0", write_moge(folder / "model.pt"), TINY.name)
            our_results = compute_results(plan.run(), inputs)
        if is_pi05:
            expected_results = {
                name: expected_results[name]
                for name in expected_results
                if name.startswith(("keys", "values"))
            }
        differences = compare(our_results, expected_results, inputs["mask"])
        columns = [f"{kind} {value:.1e}" for kind, value in differences.items()]
        statuses = [
            f"{len(plan.report.select_by_status(s))} {s}" for s in ("loaded", "new", "left out")
        ]
        print(f"{title}: {', '.join(columns)}; weights: {', '.join(statuses)}")


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
