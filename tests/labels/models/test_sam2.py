"""SAM 2 as a segmenter, compared with Transformers' own model and processor.

The network is tiny, with random weights; its square images have 64 × 64 pixels. Frames of
`make_noise_frame` have 60 × 40 pixels unless a height and a width are given.
"""

import ast
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import Sam2Model, Sam2Processor, ViTImageProcessorPil

from labels_stand_ins import make_noise_frame
from labels_tiny import save_sam2
from refusals import refuses
from spear.labels.models.protocols import Detection
from spear.labels.models.sam2 import Sam2Segmenter, postprocess, preprocess, scale_boxes
from spear.types import Array

MEAN = (0.485, 0.456, 0.406)  # ImageNet's mean and standard deviation of red, green and blue
STD = (0.229, 0.224, 0.225)
BOXES = np.array([[5, 4, 30, 30], [20, 5, 50, 33], [1, 20, 12, 39], [40, 2, 59, 20]], np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_sam2(tmp_path_factory.mktemp("sam2")))


@pytest.fixture(scope="module")
def segmenter(folder: str) -> Sam2Segmenter:
    return Sam2Segmenter(folder)


def make_detections(boxes: Array) -> list[Detection]:
    return [Detection(f"thing {i}", box) for i, box in enumerate(boxes)]


def load_reference_postprocessing() -> Any:
    """Load Transformers' `post_process_masks` from its source.

    The module with this function cannot be imported, because it needs torchvision.
    """
    path = Path(transformers.__file__).parent / "models" / "sam2" / "image_processing_sam2.py"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name == "post_process_masks":
            names: dict[str, Any] = {"torch": torch, "np": np, "F": F}
            exec(compile(ast.Module([node], []), str(path), "exec"), names)
            return names["post_process_masks"]
    raise AssertionError("Transformers has no post_process_masks")


@pytest.mark.parametrize("size", [(40, 60), (200, 90), (64, 64)])
def test_preprocessing_is_that_of_transformers(size: tuple[int, int]) -> None:
    image = make_noise_frame(0, *size).image
    processor = ViTImageProcessorPil(
        size={"height": 64, "width": 64},
        image_mean=MEAN,
        image_std=STD,
        resample=2,  # bilinear
        do_rescale=True,
    )
    reference = processor(image, return_tensors="pt")["pixel_values"][0]

    pixels = preprocess(image, 64)

    assert pixels.shape == (3, 64, 64)
    std = torch.tensor(STD)[:, None, None]
    level_errors = (pixels - reference).abs() * std * 255  # in gray levels before normalization
    assert level_errors.max() < 1.01  # Pillow computes in fixed point, so rounding differs by one
    assert level_errors.mean() < 0.3


def test_box_prompts_are_those_of_transformers() -> None:
    reference = Sam2Processor._normalize_coordinates(
        None, 1024, torch.tensor(BOXES), (40, 60), is_bounding_box=True
    )

    prompts = scale_boxes(BOXES, height=40, width=60, side_px=1024)

    torch.testing.assert_close(prompts, reference)


def test_postprocessing_is_that_of_transformers() -> None:
    logits = torch.randn(5, 16, 16, generator=torch.Generator().manual_seed(0))
    post_process_masks = load_reference_postprocessing()
    (reference,) = post_process_masks(None, [logits[:, None]], [(40, 60)])

    masks = postprocess(logits, height=40, width=60)

    assert (masks == reference[:, 0]).all()


def test_masks_are_those_of_transformers_model(folder: str, segmenter: Sam2Segmenter) -> None:
    frame = make_noise_frame(0)
    network = Sam2Model.from_pretrained(folder).eval()
    pixels = preprocess(frame.image, side_px=64)[None]
    prompts = scale_boxes(BOXES, height=40, width=60, side_px=64)[None]
    with torch.inference_mode():
        output = network(pixels, input_boxes=prompts, multimask_output=False)
    logits = output.pred_masks[0][:, 0]  # from [1 image, 4 boxes, 1 mask, h', w'] to [4, h', w']
    reference = postprocess(logits, height=40, width=60).numpy()

    (masks,) = segmenter.segment([frame], [make_detections(BOXES)])

    assert masks.dtype == bool
    assert (masks == reference).mean() > 0.999
    assert masks.mean() > 0.02  # neither empty nor full
    assert masks.mean() < 0.98


def test_images_of_a_batch_may_have_any_number_of_boxes(segmenter: Sam2Segmenter) -> None:
    """They have 1, 4, 0 and 20 boxes; the decoder gets up to 16 boxes at a time."""
    frames = [
        make_noise_frame(0),
        make_noise_frame(1, height=48, width=32),
        make_noise_frame(2),
        make_noise_frame(3),
    ]
    many_boxes = np.concatenate([BOXES + 0.5 * i for i in range(5)])
    detections = [
        make_detections(BOXES[:1]),
        make_detections(BOXES / 2),
        [],
        make_detections(many_boxes),
    ]

    masks = segmenter.segment(frames, detections)

    shapes = [image_masks.shape for image_masks in masks]
    assert shapes == [(1, 40, 60), (4, 48, 32), (0, 40, 60), (20, 40, 60)]
    for frame, frame_detections, batch_masks in zip(frames, detections, masks, strict=True):
        if frame_detections:
            (single_masks,) = segmenter.segment([frame], [frame_detections])
            assert (single_masks == batch_masks).mean() > 0.999


def test_a_box_among_many_gets_the_mask_that_it_gets_alone(segmenter: Sam2Segmenter) -> None:
    frame = make_noise_frame(3)
    detections = make_detections(np.concatenate([BOXES + 0.5 * i for i in range(5)]))

    (masks,) = segmenter.segment([frame], [detections])

    # Boxes 14 and 15 are the last of the decoder's first call, 16 to 18 the first of the second.
    single_masks = []
    for detection in detections[14:19]:
        (masks_of_detection,) = segmenter.segment([frame], [[detection]])
        single_masks.append(masks_of_detection[0])
    assert (np.stack(single_masks) == masks[14:19]).mean() > 0.999
    assert (masks[0] != masks[1]).any()


def test_no_images_give_no_masks(segmenter: Sam2Segmenter) -> None:
    assert segmenter.segment([], []) == []


def test_checkpoints_of_the_video_model_are_loaded(tmp_path: Path) -> None:
    """The published checkpoints are of the video model, which contains the network and more."""
    folder = save_sam2(tmp_path / "video", video=True)
    published_weights = load_file(folder / "model.safetensors")

    segmenter = Sam2Segmenter(str(folder))

    loaded_weights = segmenter._network.state_dict()
    assert loaded_weights
    assert len(published_weights) > len(loaded_weights)
    for name, value in loaded_weights.items():
        assert (published_weights[name] == value).all()
    (masks,) = segmenter.segment([make_noise_frame(0)], [make_detections(BOXES)])
    assert masks.shape == (4, 40, 60)


def test_full_memory_asks_for_a_smaller_batch(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter = Sam2Segmenter(folder)
    full_memory = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr(segmenter._network.vision_encoder, "forward", full_memory)

    refuses(
        "memory is full with 2 images at a time",
        segmenter.segment,
        [make_noise_frame(0), make_noise_frame(1)],
        [make_detections(BOXES)] * 2,
    )
