"""SAM 2 as a segmenter: one mask per detected box.

The network is Transformers' `Sam2Model`. Pre- and postprocessing are our own, because those of
Transformers need torchvision. The image encoder runs on a batch of images. The mask decoder runs on
the boxes of one image at a time, because images may have different numbers of boxes.

The network works on images that are resized to a square, without keeping the aspect.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from spear.labels.models.pretrained import load_model, translate_out_of_memory_errors
from spear.labels.models.protocols import Detection
from spear.models.vision import normalize_by_imagenet
from spear.types import Array, Frame

MAX_BOXES_PER_CALL = 16
"""The mask decoder gets at most this many boxes at a time, and as many masks are resized to the
size of the image at a time. This bounds the memory."""


class Sam2Segmenter:
    """Outlines detected objects from their 2D boxes.

    Args:
        model: Name on the Hub, or folder with `config.json` and `model.safetensors`.
        device: "auto", or a device name of PyTorch.

    Raises:
        SpearError: The model cannot be loaded (`load_model`).
    """

    def __init__(self, model: str, *, device: str = "auto") -> None:
        from transformers import Sam2Model

        # The published checkpoints are of the video model, which contains this network.
        self._network = load_model(
            Sam2Model, "sam2", model, device, larger_model_kinds=("sam2_video",)
        )
        self._side_px = int(self._network.config.prompt_encoder_config.image_size)
        self.name = f"sam2 {model} (box prompts)"

    def segment(
        self, frames: Sequence[Frame], detections: Sequence[Sequence[Detection]]
    ) -> list[Array]:
        """Return the masks [n, h, w] bool of the n detections of each frame."""
        masks = []  # one array per frame; empty masks for now
        for frame, frame_detections in zip(frames, detections, strict=True):
            height, width = frame.image.shape[:2]
            masks.append(np.zeros((len(frame_detections), height, width), bool))

        # Only frames with detections go through the network.
        indices = [i for i, frame_detections in enumerate(detections) if frame_detections]
        if not indices:
            return masks
        pixels = torch.stack([preprocess(frames[i].image, self._side_px) for i in indices])
        with torch.inference_mode(), translate_out_of_memory_errors(len(indices)):
            # Feature maps of several sizes, each [frames, channels, height, width]
            levels = self._network.get_image_embeddings(
                pixels.to(self._network.device, self._network.dtype)
            )
            for row, i in enumerate(indices):
                embeddings = [level[row : row + 1] for level in levels]  # of one frame
                masks[i] = self._decode_masks(embeddings, frames[i], detections[i])
        return masks

    def _decode_masks(
        self, embeddings: list[torch.Tensor], frame: Frame, detections: Sequence[Detection]
    ) -> Array:
        """Decode the masks [n, h, w] bool of the n detections of one image.

        Args:
            embeddings: The image's feature maps, each [1, channels, height, width].
            frame: The image.
            detections: The image's detections.
        """
        height, width = frame.image.shape[:2]
        boxes = np.stack([detection.box2d for detection in detections]).astype(np.float32)
        scaled_boxes = scale_boxes(boxes, height, width, self._side_px)  # [n, 4]
        prompts = scaled_boxes[None].to(embeddings[0])  # [1, n, 4] on the network's device
        logits = []
        for prompt_group in prompts.split(MAX_BOXES_PER_CALL, dim=1):
            output = self._network(
                image_embeddings=embeddings,
                input_boxes=prompt_group,
                multimask_output=False,  # three masks are for ambiguous prompts, which a box is not
            )
            logits.append(output.pred_masks[0, :, 0])  # [boxes in the group, h', w']
        masks = [postprocess(group, height, width).cpu().numpy() for group in logits]
        return np.concatenate(masks)


def preprocess(image: Array, side_px: int) -> torch.Tensor:
    """Resize and normalize an image for the network.

    The image is resized to a square with bilinear, antialiased interpolation, and rounded to
    integers as Transformers does. Then it is normalized with ImageNet's mean and standard
    deviation, as in SAM 2's training.

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
    return normalize_by_imagenet(pixels[0].round().clamp(0, 255) / 255)


def scale_boxes(boxes: Array, height: int, width: int, side_px: int) -> torch.Tensor:
    """Convert boxes from pixels of an image to pixels of the network's square image.

    Args:
        boxes: [n, 4] x0, y0, x1, y1.
        height: Height of the image.
        width: Width of the image.
        side_px: Side of the square.

    Returns:
        [n, 4] float32.
    """
    scale_x = side_px / width
    scale_y = side_px / height
    scale = np.array([scale_x, scale_y, scale_x, scale_y], np.float32)
    return torch.from_numpy(boxes * scale)


def postprocess(logits: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Convert mask logits [n, h', w'] to masks [n, height, width] bool.

    A pixel belongs to a mask where the resampled logit is positive.
    """
    resampled = F.interpolate(
        logits[None].float(), (height, width), mode="bilinear", align_corners=False
    )
    return resampled[0] > 0
