"""The same inputs for our models and for Transformers' PaliGemma and π0, and how results differ."""

from dataclasses import replace
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from spear.models.spear1 import NUM_STATE_FEATURES, Spear1ForActionPrediction
from spear.models.vlm import SpearVLMForConditionalGeneration
from spear.types import ACTION_DIM, Action

Pi0Inputs = tuple[dict[str, Any], dict[str, Any]]
"""The arguments of SPEAR-1's `encode_prefix`, and those of Transformers' π0 but for state and
noise. Both are the same images and texts."""

BATCH = 2
LENGTH = 9  # number of tokens of a question and its answer
ANSWER_START = 5  # index of the answer's first token


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference divided by the largest expected value."""
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())


def compute_logits_of_both(
    our_model: SpearVLMForConditionalGeneration, their_model: Any, width: int, height: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the logits [valid tokens, vocabulary] of both models for the same random inputs.

    Args:
        our_model: the SPEAR-VLM.
        their_model: a `PaliGemmaForConditionalGeneration`; the id of its image token is high.
        width: width of the images in pixels.
        height: height of the images in pixels.

    Returns:
        The logits of `our_model` and of `their_model`.
    """
    torch.manual_seed(5)
    patch = their_model.config.vision_config.patch_size
    num_image_tokens = width // patch * (height // patch)
    image_token = their_model.config.image_token_id

    image = torch.randint(0, 256, (BATCH, 3, height, width), dtype=torch.uint8)
    # Ids of words: smaller ids are special tokens, and the image token has a larger one.
    ids = torch.randint(3, min(1000, image_token), (BATCH, LENGTH))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0  # the second question has two tokens of padding
    token_types = (torch.arange(LENGTH) >= ANSWER_START).long().expand(BATCH, LENGTH)

    # PaliGemma takes image tokens and text as one sequence, and pixels from -1 to 1.
    pixels = image / 127.5 - 1
    image_output = their_model.model.get_image_features(pixels, interpolate_pos_encoding=True)
    features = image_output.pooler_output
    ones = torch.ones(BATCH, num_image_tokens, dtype=torch.long)
    output = their_model(
        input_ids=torch.cat([ones * image_token, ids], dim=1),
        attention_mask=torch.cat([ones, mask], dim=1),
        token_type_ids=torch.cat([torch.zeros_like(ones), token_types], dim=1),
        mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=features)},
    )
    their_logits = output.logits[:, num_image_tokens:]  # [BATCH, LENGTH, vocabulary]
    our_logits = our_model({"external": image}, ids, mask, token_types).logits
    is_valid = mask.bool()
    return our_logits[is_valid], their_logits[is_valid]


def draw_pi0_inputs(image_token: int) -> Pi0Inputs:
    """Draw two images and a padded text per row, as inputs of a SPEAR-1 and of Transformers' π0.

    Args:
        image_token: the id of π0's image token.
    """
    images = torch.randint(0, 256, (BATCH, 2, 3, 224, 224), dtype=torch.uint8)
    ids = torch.randint(3, 40, (BATCH, 6))  # ids of words; smaller ones are special tokens
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0  # the first text has two tokens of padding
    our_inputs = {
        "pixel_values": {"external": images[:, 0], "wrist": images[:, 1]},
        "input_ids": ids,
        "attention_mask": mask,
    }
    # In π0's sequence, image tokens stand before the text: 16 × 16 patches per image.
    image_mask = torch.ones(BATCH, 2 * 256, dtype=torch.long)
    their_inputs = {
        "pixel_values": images / 127.5 - 1,
        "pixel_attention_mask": torch.ones(BATCH, 2, dtype=torch.bool),
        "input_ids": torch.cat([image_mask * image_token, ids], dim=1),
        "attention_mask": torch.cat([image_mask, mask], dim=1),
    }
    return our_inputs, their_inputs


def predict_velocities_of_both(
    our_model: Spear1ForActionPrediction, their_model: Any, inputs: Pi0Inputs
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predict the velocities [BATCH, H, 8] of both models for the same random state and noise."""
    our_inputs, their_inputs = inputs
    state = torch.randn(BATCH, NUM_STATE_FEATURES)
    noisy = torch.randn(BATCH, our_model.config.horizon, ACTION_DIM)
    tau = torch.tensor([0.2, 0.9])

    # π0's flow time runs from data to noise, so it is 1 - τ, and its velocity is negative.
    output = their_model(state=state, noise=noisy, timestep=1 - tau, **their_inputs)
    prefix = our_model.encode_prefix(**our_inputs)
    velocity = our_model.predict(prefix, state, Action.from_vector(noisy), tau)
    return velocity.to_vector(), -output.logits


def sample_actions_of_both(
    our_model: Spear1ForActionPrediction, their_model: Any, inputs: Pi0Inputs
) -> tuple[Action, Action]:
    """Sample an action chunk of both models from the same random state and noise, in four steps.

    Our sampling returns canonical unit quaternions, so π0's quaternions are made canonical too.
    """
    our_inputs, their_inputs = inputs
    state = torch.randn(BATCH, NUM_STATE_FEATURES)
    noise = torch.randn(BATCH, our_model.config.horizon, ACTION_DIM)

    our_actions = our_model.sample_actions(
        **our_inputs, state=state, steps=4, noise=Action.from_vector(noise)
    )
    their_actions = Action.from_vector(
        their_model.sample_actions(state=state, noise=noise, num_steps=4, **their_inputs)
    )
    unit = torch.nn.functional.normalize(their_actions.rotation, dim=-1)
    canonical = unit * torch.where(unit[..., :1] < 0, -1.0, 1.0)
    return our_actions, replace(their_actions, rotation=canonical)
