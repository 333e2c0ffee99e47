"""Estimates of the memory and time that the networks of labeling need, without downloading them.

The networks run on fake tensors, which have shapes but no contents.
"""

from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from spear.labels.models.sam2 import MAX_BOXES_PER_CALL
from spear.models.meter import MemoryMeter, replace_meta_by_fake_tensors
from spear.models.weights.published import PUBLISHED


class Resources(NamedTuple):
    """What a network needs in float32.

    Activations and operations are 0 if they depend on the contents of tensors, as with Grounding
    DINO.

    Attributes:
        parameters: Number of parameters.
        weights: Memory of the parameters, in bytes.
        activations: Largest memory of everything else while a batch is computed, in bytes.
        flops: Floating-point operations per image.
    """

    parameters: int
    weights: int
    activations: int
    flops: float

    def __str__(self) -> str:
        activations = "not known before it runs"
        if self.flops:  # 0 if they were not estimated
            activations = f"{self.activations / 2**30:.2f} GiB"
        return (
            f"{self.parameters / 1e6:.0f} M parameters, {self.weights / 2**30:.2f} GiB, "
            f"activations {activations}"
        )


def estimate_resources(
    network_name: str, batch_size: int, width_px: int, num_vocabulary_names: int
) -> Resources:
    """Estimate what a network needs for a batch of 4:3 images.

    Args:
        network_name: Name of the network in `PUBLISHED`.
        batch_size: Number of images in a batch.
        width_px: Width of each image.
        num_vocabulary_names: Number of names in the vocabulary, for detectors.
    """
    network = PUBLISHED[network_name].build().eval()
    # PyTorch's counter has no formula for the attention kernel of CPUs.
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={attention: _count_attention_flops})
    with FakeTensorMode(), MemoryMeter() as meter, counter, torch.inference_mode():
        replace_meta_by_fake_tensors(network)
        weights_bytes = meter.live
        if network_name.startswith("moge"):
            _run_moge(network, batch_size, width_px)
        elif network_name == "sam2":
            _run_sam2(network, batch_size)
        elif network_name == "owlv2":
            _run_owlv2(network, batch_size, num_vocabulary_names)
        # Grounding DINO is not run, because its code depends on the contents of tensors.
    return Resources(
        parameters=sum(weight.numel() for weight in network.parameters()),
        weights=weights_bytes,
        activations=meter.peak - weights_bytes,
        flops=counter.get_total_flops() / batch_size,
    )


def _count_attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _run_moge(network: Any, batch_size: int, width_px: int) -> None:
    height_px = width_px * 3 // 4
    images = torch.zeros(batch_size, 3, height_px, width_px)
    network(images, network.max_tokens)


def _run_sam2(network: Any, batch_size: int) -> None:
    """Encode the batch, then decode the masks of the most boxes that one call gets per image."""
    side_px = network.config.prompt_encoder_config.image_size
    images = torch.zeros(batch_size, 3, side_px, side_px)
    levels = network.get_image_embeddings(images)  # feature maps of several sizes, each [batch, …]
    for index in range(batch_size):
        network(
            image_embeddings=[level[index : index + 1] for level in levels],
            input_boxes=torch.zeros(1, MAX_BOXES_PER_CALL, 4),
            multimask_output=False,
        )


def _run_owlv2(network: Any, batch_size: int, num_names: int) -> None:
    side_px = network.config.vision_config.image_size
    max_tokens = network.config.text_config.max_position_embeddings
    # Each image has one prompt per name.
    token_ids = torch.zeros(batch_size * num_names, max_tokens, dtype=torch.long)
    network(
        pixel_values=torch.zeros(batch_size, 3, side_px, side_px),
        input_ids=token_ids,
        attention_mask=torch.ones_like(token_ids),  # no padding
    )
