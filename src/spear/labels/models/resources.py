"""What the networks of labelling need, before any download: their sizes, run on tensors without contents."""

from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from spear.labels.models.sam2 import MAX_BOXES_PER_CALL
from spear.models.meter import MemoryMeter, allocate_storage
from spear.models.weights.published import PUBLISHED


class Resources(NamedTuple):
    """Of a network in float32: parameters and their bytes; the bytes beside them at the fullest moment of a
    batch; floating-point operations per image. The last two are 0 where only real numbers would tell."""

    parameters: int
    weights: int
    activations: int
    flops: float

    def __str__(self) -> str:
        more = f"{self.activations / 2**30:.2f} GiB" if self.flops else "not known before it runs"
        return f"{self.parameters / 1e6:.0f} M parameters, {self.weights / 2**30:.2f} GiB, activations {more}"


def estimate_resources(name: str, batch: int, longest: int, names: int) -> Resources:
    """What a network of `PUBLISHED` needs for so many images at a time, each 4:3 and `longest` pixels wide.

    names: how many are looked for.
    """
    network = PUBLISHED[name].build().eval()
    # PyTorch's counter does not know the attention of a CPU.
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    known = {attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    work = FlopCounterMode(display=False, custom_mapping=known)
    with FakeTensorMode(), MemoryMeter() as meter, work, torch.inference_mode():
        allocate_storage(network)
        weights = meter.live
        if name.startswith("moge"):
            network(torch.zeros(batch, 3, longest * 3 // 4, longest), network.max_tokens)
        elif name == "sam2":
            side = network.config.prompt_encoder_config.image_size
            levels = network.get_image_embeddings(torch.zeros(batch, 3, side, side))
            for place in range(batch):
                one = [level[place : place + 1] for level in levels]
                network(
                    image_embeddings=one,
                    input_boxes=torch.zeros(1, MAX_BOXES_PER_CALL, 4),
                    multimask_output=False,
                )
        elif name == "owlv2":  # Grounding DINO looks at numbers
            vision, text = network.config.vision_config, network.config.text_config
            ids = torch.zeros(batch * names, text.max_position_embeddings, dtype=torch.long)
            side = vision.image_size
            network(
                pixel_values=torch.zeros(batch, 3, side, side),
                input_ids=ids,
                attention_mask=ids + 1,
            )
    count = sum(weight.numel() for weight in network.parameters())
    return Resources(count, weights, meter.peak - weights, work.get_total_flops() / batch)
