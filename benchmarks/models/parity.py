"""The same numbers as Transformers' PaliGemma and π0 at the widths of each preset, and what bfloat16 changes.

    python benchmarks/models/parity.py
    python benchmarks/models/parity.py --presets small mid --layers 99      # whole; 12 GB

Random weights in float32, without MoGe, encoders with patch convolutions, a vocabulary of 2,048, and so many
layers that it fits a laptop (printed). Differences are the largest over the largest value: "logits" of
questions with padding about one image (280×210, nano 192×128) against PaliGemma's, "velocity" and "actions"
(10 steps, two square images) against π0's with the same noise. "bf16": our weights rounded to bfloat16
against ours in float32.
"""

from __future__ import annotations

import sys
from typing import Any, Literal

import torch
import tyro
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pi0_pair import IMAGE_TOKEN, SIZES, pair, reduced, relative
from spear.cli import run_reporting_errors
from spear.types import Action

LAYERS = {"nano": 99, "small": 2, "mid": 2, "spear1": 1}
B, TEXT = 1, 9


def compare(name: str, layers: int) -> str:
    """One line of the table."""
    size = reduced(name, layers, side=8)  # few tokens where images must be square
    ours, theirs = pair(size)
    width, height = SIZES[name].image_sizes["external"]
    patch, side = size.vision["patch_size"], size.vision["image_size"]
    ids = torch.randint(3, 1000, (B, TEXT))
    mask = torch.ones_like(ids)
    mask[-1, TEXT - 2 :] = 0
    kinds = (torch.arange(TEXT) >= 5).long().expand(B, TEXT)

    image = torch.randint(0, 256, (B, 3, height, width), dtype=torch.uint8)
    vlm = theirs.model.vlm
    features = vlm.get_image_features(
        image / 127.5 - 1, interpolate_pos_encoding=True
    ).pooler_output
    before = torch.ones(B, features.shape[1], dtype=torch.long)
    hidden = vlm(
        input_ids=torch.cat([before * IMAGE_TOKEN, ids], dim=1),
        attention_mask=torch.cat([before, mask], dim=1),
        token_type_ids=torch.cat([before * 0, kinds], dim=1),
        mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=features)},
    ).last_hidden_state[:, before.shape[1] :]
    expected = hidden @ vlm.language_model.embed_tokens.weight.T
    asked = ({"external": image}, ids, mask, kinds)
    said = ours.vlm(*asked).logits

    images = torch.randint(0, 256, (B, 2, 3, side, side), dtype=torch.uint8)
    before = torch.ones(B, 2 * (side // patch) ** 2, dtype=torch.long)
    state, noise, time = torch.randn(B, 10), torch.randn(B, size.horizon, 8), torch.full((B,), 0.2)
    reference: dict[str, Any] = {
        "pixel_values": images / 127.5 - 1,
        "pixel_attention_mask": torch.ones(B, 2, dtype=torch.bool),
        "input_ids": torch.cat([before * IMAGE_TOKEN, ids], dim=1),
        "attention_mask": torch.cat([before, mask], dim=1),
        "state": state,
        "noise": noise,
    }
    seen = ({"external": images[:, 0], "wrist": images[:, 1]}, ids, mask)
    noisy = Action.from_vector(noise)
    flow = -theirs(timestep=1 - time, **reference).logits
    velocity = ours.predict(ours.encode_prefix(*seen), state, noisy, time).to_vector()
    goal = theirs.sample_actions(num_steps=10, **reference)[..., :3]
    actions = ours.sample_actions(*seen, state, steps=10, noise=noisy).translation

    rounded = ours.to(torch.bfloat16)
    drift = rounded.vlm(*asked).logits
    slower = rounded.predict(rounded.encode_prefix(*seen), state, noisy, time).to_vector()
    real = mask.bool()
    millions = sum(p.numel() for p in ours.parameters()) / 1e6
    numbers = [
        relative(said[real], expected[real]),
        relative(velocity, flow),
        relative(actions, goal),
        relative(drift[real], said[real]),
        relative(slower, velocity),
    ]
    depth = f"{size.vision['num_hidden_layers']}/{size.text['num_hidden_layers']}"
    return (
        f"| {name} | {depth} | {millions:.0f} M | " + " | ".join(f"{n:.1e}" for n in numbers) + " |"
    )


@torch.no_grad()
def main(
    presets: tuple[Literal["nano", "small", "mid", "spear1"], ...] = ("nano", "small", "spear1"),
    layers: int | None = None,
) -> None:
    """Print a table.

    Args:
        presets: widths. layers: at most so many per network; else as many as fit a laptop.
    """
    print(
        "| widths of | layers SigLIP/Gemma | parameters | logits | velocity | actions | bf16 logits "
        "| bf16 velocity |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in presets:
        print(compare(name, layers or LAYERS[name]), flush=True)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
