"""The same inputs through SPEAR-VLM and Transformers' PaliGemma, and how far apart two results are."""

from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from spear.models.vlm import SpearVLMForConditionalGeneration

B = 2


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference over the largest value of `b`."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def logits(
    ours: SpearVLMForConditionalGeneration, theirs: Any, width: int, height: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What both say of images and padded questions with answers, at the valid places: [places, tokens] each.

    theirs: a `PaliGemmaForConditionalGeneration` whose image token has about the highest id.
    """
    torch.manual_seed(5)
    patch, image_token = theirs.config.vision_config.patch_size, theirs.config.image_token_id
    tokens = width // patch * (height // patch)
    image = torch.randint(0, 256, (B, 3, height, width), dtype=torch.uint8)
    ids = torch.randint(3, min(1000, image_token), (B, 9))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    kinds = (torch.arange(9) >= 5).long().expand(B, 9)
    features = theirs.model.get_image_features(
        image / 127.5 - 1, interpolate_pos_encoding=True
    ).pooler_output
    before = torch.ones(B, tokens, dtype=torch.long)
    said = theirs(
        input_ids=torch.cat([before * image_token, ids], dim=1),
        attention_mask=torch.cat([before, mask], dim=1),
        token_type_ids=torch.cat([before * 0, kinds], dim=1),
        mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=features)},
    ).logits[:, tokens:]
    return ours({"external": image}, ids, mask, kinds).logits[mask.bool()], said[mask.bool()]
