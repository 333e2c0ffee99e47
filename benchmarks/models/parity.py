"""The same numbers as Transformers' PaliGemma and π0 at the widths of each preset, and what
bfloat16 changes.

    python benchmarks/models/parity.py
    python benchmarks/models/parity.py --presets small mid --layers 99      # whole; 12 GB

Random weights in float32, without MoGe, encoders with patch convolutions, a vocabulary of 2,048,
and as many layers as fit a laptop (printed). Differences are the largest over the largest value:
"logits" of questions with padding about one image (280×210, nano 192×128) against PaliGemma's,
"velocity" and "actions" (10 steps, two square images) against π0's with the same noise. "bf16": our
weights rounded to bfloat16 against ours in float32.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pi0_pair import (
    IMAGE_TOKEN,
    SIZES,
    count_image_tokens,
    make_pair,
    reduce_preset,
    relative_difference,
)
from spear.cli import run_reporting_errors
from spear.models.presets import Preset
from spear.models.spear1 import NUM_STATE_FEATURES
from spear.types import ACTION_DIM, Action
from timing import format_header, format_row

LAPTOP_LAYERS = {"nano": 99, "small": 2, "mid": 2, "spear1": 1}
BATCH = 1
NUM_TEXT_TOKENS = 9
ANSWER_START = 5
SIDE_PATCHES = 8  # few tokens where images must be square
TAU = 0.2
COLUMNS = [
    "widths of",
    "layers SigLIP/Gemma",
    "parameters",
    "logits",
    "velocity",
    "actions",
    "bf16 logits",
    "bf16 velocity",
]


@dataclass(frozen=True)
class Question:
    """A padded question with its answer about an image."""

    image: Tensor
    ids: Tensor
    mask: Tensor
    token_types: Tensor


@dataclass(frozen=True)
class FlowInputs:
    """Two square images, a state, noise and a flow time."""

    images: Tensor
    state: Tensor
    noise: Tensor
    tau: Tensor


def make_question(name: str) -> Question:
    width, height = SIZES[name].image_sizes["external"]
    ids = torch.randint(3, 1000, (BATCH, NUM_TEXT_TOKENS))
    mask = torch.ones_like(ids)
    mask[-1, NUM_TEXT_TOKENS - 2 :] = 0
    is_answer = torch.arange(NUM_TEXT_TOKENS) >= ANSWER_START
    image = torch.randint(0, 256, (BATCH, 3, height, width), dtype=torch.uint8)
    return Question(image, ids, mask, is_answer.long().expand(BATCH, NUM_TEXT_TOKENS))


def make_flow_inputs(size: Preset) -> FlowInputs:
    side_px = size.vision["image_size"]
    return FlowInputs(
        images=torch.randint(0, 256, (BATCH, 2, 3, side_px, side_px), dtype=torch.uint8),
        state=torch.randn(BATCH, NUM_STATE_FEATURES),
        noise=torch.randn(BATCH, size.horizon, ACTION_DIM),
        tau=torch.full((BATCH,), TAU),
    )


def compute_their_logits(vlm: Any, question: Question) -> Tensor:
    """Return the logits of π0's PaliGemma at the text positions."""
    features = vlm.get_image_features(
        question.image / 127.5 - 1, interpolate_pos_encoding=True
    ).pooler_output
    ones = torch.ones(BATCH, features.shape[1], dtype=torch.long)
    output = vlm(
        input_ids=torch.cat([ones * IMAGE_TOKEN, question.ids], dim=1),
        attention_mask=torch.cat([ones, question.mask], dim=1),
        token_type_ids=torch.cat([ones * 0, question.token_types], dim=1),
        mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=features)},
    )
    hidden = output.last_hidden_state[:, ones.shape[1] :]
    return hidden @ vlm.language_model.embed_tokens.weight.T


def compute_our_logits(policy: Any, question: Question) -> Tensor:
    images = {"external": question.image}
    return policy.vlm(images, question.ids, question.mask, question.token_types).logits


def make_our_prefix_inputs(question: Question, inputs: FlowInputs) -> tuple[Any, Tensor, Tensor]:
    views = {"external": inputs.images[:, 0], "wrist": inputs.images[:, 1]}
    return views, question.ids, question.mask


def compute_our_velocity(policy: Any, question: Question, inputs: FlowInputs) -> Tensor:
    prefix = policy.encode_prefix(*make_our_prefix_inputs(question, inputs))
    noisy = Action.from_vector(inputs.noise)
    return policy.predict(prefix, inputs.state, noisy, inputs.tau).to_vector()


def make_their_inputs(size: Preset, question: Question, inputs: FlowInputs) -> dict[str, Any]:
    ones = torch.ones(BATCH, 2 * count_image_tokens(size), dtype=torch.long)
    return {
        "pixel_values": inputs.images / 127.5 - 1,
        "pixel_attention_mask": torch.ones(BATCH, 2, dtype=torch.bool),
        "input_ids": torch.cat([ones * IMAGE_TOKEN, question.ids], dim=1),
        "attention_mask": torch.cat([ones, question.mask], dim=1),
        "state": inputs.state,
        "noise": inputs.noise,
    }


def compare(name: str, max_layers: int) -> str:
    """Return one line of the table."""
    size = reduce_preset(name, max_layers, SIDE_PATCHES)
    our_model, their_model = make_pair(size)
    question = make_question(name)
    inputs = make_flow_inputs(size)

    # Ours and theirs, in float32.
    is_valid = question.mask.bool()
    their_logits = compute_their_logits(their_model.model.vlm, question)
    our_logits = compute_our_logits(our_model, question)
    their_inputs = make_their_inputs(size, question, inputs)
    # π0's time and velocity point the other way.
    their_velocity = -their_model(timestep=1 - inputs.tau, **their_inputs).logits
    our_velocity = compute_our_velocity(our_model, question, inputs)
    their_actions = their_model.sample_actions(num_steps=10, **their_inputs)
    our_actions = our_model.sample_actions(
        *make_our_prefix_inputs(question, inputs),
        inputs.state,
        steps=10,
        noise=Action.from_vector(inputs.noise),
    )

    # Ours in bfloat16.
    num_parameters = sum(parameter.numel() for parameter in our_model.parameters())
    rounded = our_model.to(torch.bfloat16)
    rounded_logits = compute_our_logits(rounded, question)
    rounded_velocity = compute_our_velocity(rounded, question, inputs)

    differences = [
        relative_difference(our_logits[is_valid], their_logits[is_valid]),
        relative_difference(our_velocity, their_velocity),
        relative_difference(our_actions.translation, their_actions[..., :3]),
        relative_difference(rounded_logits[is_valid], our_logits[is_valid]),
        relative_difference(rounded_velocity, our_velocity),
    ]
    depth = f"{size.vision['num_hidden_layers']}/{size.text['num_hidden_layers']}"
    cells = [name, depth, f"{num_parameters / 1e6:.0f} M"]
    return format_row(cells + [f"{difference:.1e}" for difference in differences])


@torch.no_grad()
def main(
    presets: tuple[Literal["nano", "small", "mid", "spear1"], ...] = ("nano", "small", "spear1"),
    layers: int | None = None,
) -> None:
    """Print a table.

    Args:
        presets: widths. layers: at most so many per network; else as many as fit a laptop.
    """
    print(format_header(COLUMNS))
    for name in presets:
        print(compare(name, layers or LAPTOP_LAYERS[name]), flush=True)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
