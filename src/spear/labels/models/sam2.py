"""SAM 2 as a segmenter: one mask per detected box.

The network is Transformers' `Sam2Model`; what comes before and after it is ours, since
Transformers' own needs torchvision. The image encoder runs on a batch of images, the mask decoder
on the boxes of one image at a time, because images may have different numbers of boxes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from spear.labels.models.pretrained import explain_full_memory, load_model
from spear.labels.models.protocols import Detection
from spear.models.vision import standardize
from spear.types import Array, Frame

MAX_BOXES_PER_CALL = 16  # of the mask decoder; so many masks are resized to the image at a time


class Sam2Segmenter:
    """Outlines detected objects from their boxes; arguments and errors as of `load_model`."""

    def __init__(self, model: str, *, device: str = "auto") -> None:
        from transformers import Sam2Model

        # The published checkpoints are those of the video model, of which this one is a part.
        self._network = load_model(Sam2Model, "sam2", model, device, other_kinds=("sam2_video",))
        self._side_px = int(self._network.config.prompt_encoder_config.image_size)
        self.name = f"sam2 {model} (box prompts)"

    def segment(
        self, frames: Sequence[Frame], detections: Sequence[Sequence[Detection]]
    ) -> list[Array]:
        """For each frame, the masks [n, h, w] bool of its detections."""
        masks = []
        for frame, frame_detections in zip(frames, detections, strict=True):
            height, width = frame.image.shape[:2]
            masks.append(np.zeros((len(frame_detections), height, width), bool))

        indices = [i for i, frame_detections in enumerate(detections) if frame_detections]
        if not indices:
            return masks
        pixels = torch.stack([preprocess(frames[i].image, self._side_px) for i in indices])
        with torch.inference_mode(), explain_full_memory(len(indices)):
            levels = self._network.get_image_embeddings(
                pixels.to(self._network.device, self._network.dtype)
            )
            for row, i in enumerate(indices):
                embeddings = [level[row : row + 1] for level in levels]
                masks[i] = self._decode_masks(embeddings, frames[i], detections[i])
        return masks

    def _decode_masks(
        self, embeddings: list[torch.Tensor], frame: Frame, detections: Sequence[Detection]
    ) -> Array:
        """The masks [n, h, w] bool of the boxes of one image."""
        height, width = frame.image.shape[:2]
        boxes = np.stack([detection.box2d for detection in detections]).astype(np.float32)
        prompts = scale_boxes(boxes, height, width, self._side_px)[None].to(embeddings[0])
        logits = []
        for some_prompts in prompts.split(MAX_BOXES_PER_CALL, dim=1):
            output = self._network(
                image_embeddings=embeddings,
                input_boxes=some_prompts,
                multimask_output=False,  # three masks are for ambiguous prompts, which a box is not
            )
            logits.append(output.pred_masks[0, :, 0])
        masks = [postprocess(some_logits, height, width).cpu().numpy() for some_logits in logits]
        return np.concatenate(masks)


def preprocess(image: Array, side_px: int) -> torch.Tensor:
    """Bring an image to the form that the network takes.

    The image is squeezed to a square (bilinear, antialiased, rounded to whole levels as
    Transformers does), then normalized with ImageNet's statistics, as SAM 2 was trained.

    Args:
        image: [h, w, 3] uint8.
        side_px: Side of the square.

    Returns:
        [3, side_px, side_px] float32.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
    pixels = F.interpolate(
        pixels, (side_px, side_px), mode="bilinear", align_corners=False, antialias=True
    )
    return standardize(pixels[0].round().clamp(0, 255) / 255)


def scale_boxes(boxes: Array, height: int, width: int, side_px: int) -> torch.Tensor:
    """Boxes [n, 4] in pixels of an image → [n, 4] float32 in pixels of the network's square."""
    scale_x = side_px / width
    scale_y = side_px / height
    return torch.from_numpy(boxes * np.array([scale_x, scale_y, scale_x, scale_y], np.float32))


def postprocess(logits: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Mask logits [n, h', w'] → masks [n, height, width] bool: inside where the resampled logit is
    positive."""
    resampled = F.interpolate(
        logits[None].float(), (height, width), mode="bilinear", align_corners=False
    )
    return resampled[0] > 0
