"""SAM 2 as a segmenter: one mask per detected box.

The network is Transformers' `Sam2Model`; what comes before and after it is ours, since Transformers' own
needs torchvision. The image encoder runs on a batch of images, the mask decoder on the boxes of one image at
a time: images may have different numbers of boxes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from spear.labels.models.pretrained import explain_full_memory, load_model
from spear.labels.models.protocols import Detection
from spear.models.vision import standardize
from spear.types import Array, Frame

MAX_BOXES_PER_CALL = 16
"""Boxes per call of the mask decoder, and masks blown up to the size of the image at a time."""


class Sam2Segmenter:
    """Outlines detected objects from their boxes; arguments and errors as of `load_model`."""

    def __init__(self, model: str, *, device: str = "auto") -> None:
        from transformers import Sam2Model

        # The published checkpoints are those of the video model, which holds this one
        self._network = load_model(Sam2Model, "sam2", model, device, also=("sam2_video",))
        self._side = int(self._network.config.prompt_encoder_config.image_size)
        self.name = f"sam2 {model} (box prompts)"

    def segment(
        self, frames: Sequence[Frame], detections: Sequence[Sequence[Detection]]
    ) -> list[Array]:
        """For each frame, masks [n, h, w] bool."""
        pairs = zip(frames, detections, strict=True)
        masks = [np.zeros((len(found), *frame.image.shape[:2]), bool) for frame, found in pairs]
        if not (busy := [i for i, found in enumerate(detections) if found]):
            return masks
        pixels = torch.stack([preprocess(frames[i].image, self._side) for i in busy])
        with torch.inference_mode(), explain_full_memory(len(busy)):
            levels = self._network.get_image_embeddings(
                pixels.to(self._network.device, self._network.dtype)
            )
            for place, i in enumerate(busy):
                height, width = frames[i].image.shape[:2]
                boxes = np.stack([d.box2d for d in detections[i]]).astype(np.float32)
                prompts = scale_boxes(boxes, height, width, self._side)[None].to(levels[0])
                found = [
                    self._network(
                        image_embeddings=[level[place : place + 1] for level in levels],
                        input_boxes=some,
                        multimask_output=False,  # three masks are for ambiguous prompts, which a box is not
                    ).pred_masks[0, :, 0]
                    for some in prompts.split(MAX_BOXES_PER_CALL, dim=1)
                ]
                masks[i] = np.concatenate(
                    [postprocess(some, height, width).cpu().numpy() for some in found]
                )
        return masks


def preprocess(image: Array, side: int) -> torch.Tensor:
    """An image [h, w, 3] uint8 as the network takes it: [3, side, side] float32.

    Squeezed to a square (bilinear, antialiased, rounded to whole levels as Transformers does), then
    normalised with ImageNet's statistics, as SAM 2 was trained.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
    pixels = F.interpolate(
        pixels, (side, side), mode="bilinear", align_corners=False, antialias=True
    )
    return standardize(pixels[0].round().clamp(0, 255) / 255)


def scale_boxes(boxes: Array, height: int, width: int, side: int) -> torch.Tensor:
    """Boxes [n, 4] in pixels of an image -> [n, 4] float32 in pixels of the network's square."""
    return torch.from_numpy(boxes * np.array([side / width, side / height] * 2, np.float32))


def postprocess(logits: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Mask logits [n, h', w'], resampled bilinearly -> masks [n, height, width] bool: positive is inside."""
    return (
        F.interpolate(logits[None].float(), (height, width), mode="bilinear", align_corners=False)[
            0
        ]
        > 0
    )
