"""The same inputs for our models and for Transformers' PaliGemma and π0, and how results differ."""

from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from spear.models.vlm import SpearVLMForConditionalGeneration

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


def draw_pi0_inputs(image_token: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Draw two images and a padded text per row, as inputs of a SPEAR-1 and of Transformers' π0.

    Args:
        image_token: the id of π0's image token.

    Returns:
        The arguments of SPEAR-1's `encode_prefix`, and those of π0 but for state and noise.
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
