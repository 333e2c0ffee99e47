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

from labels_stand_ins import noise
from labels_tiny import save_sam2
from refusals import refuses
from spear.labels.models.protocols import Detection
from spear.labels.models.sam2 import Sam2Segmenter, postprocess, preprocess, scale_boxes
from spear.types import Array

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BOXES = np.array([[5, 4, 30, 30], [20, 5, 50, 33], [1, 20, 12, 39], [40, 2, 59, 20]], np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_sam2(tmp_path_factory.mktemp("sam2")))


def asked(boxes: Array) -> list[Detection]:
    return [Detection(f"thing {i}", box) for i, box in enumerate(boxes)]


@pytest.mark.parametrize("size", [(40, 60), (200, 90), (64, 64)])
def test_preprocessing_is_that_of_transformers(size: tuple[int, int]) -> None:
    image = noise(0, *size).image
    known = {"size": {"height": 64, "width": 64}, "image_mean": MEAN, "image_std": STD}
    processor = ViTImageProcessorPil(**known, resample=2, do_rescale=True)
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    ours = preprocess(image, 64)
    assert ours.shape == (3, 64, 64)
    levels = (ours - theirs).abs() * torch.tensor(STD)[:, None, None] * 255
    assert levels.max() < 1.01 and levels.mean() < 0.3  # Pillow computes in fixed point


def test_box_prompts_and_postprocessing_are_those_of_transformers() -> None:
    boxes = torch.tensor(BOXES)
    theirs = Sam2Processor._normalize_coordinates(None, 1024, boxes, (40, 60), is_bounding_box=True)
    torch.testing.assert_close(scale_boxes(BOXES, 40, 60, 1024), theirs)
    # Transformers' `post_process_masks`, from its source: its module needs torchvision.
    path = Path(transformers.__file__).parent / "models" / "sam2" / "image_processing_sam2.py"
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    (found,) = [f for f in functions if f.name == "post_process_masks"]
    names: dict[str, Any] = {"torch": torch, "np": np, "F": F}
    exec(compile(ast.Module([found], []), str(path), "exec"), names)
    logits = torch.randn(5, 16, 16, generator=torch.Generator().manual_seed(0))
    (theirs,) = names["post_process_masks"](None, [logits[:, None]], [(40, 60)])
    assert (postprocess(logits, 40, 60) == theirs[:, 0]).all()


def test_masks_are_those_of_the_plain_model(folder: str) -> None:
    network, image = Sam2Model.from_pretrained(folder).eval(), noise(0)
    pixels = preprocess(image.image, 64)[None]
    with torch.inference_mode():
        said = network(
            pixels, input_boxes=scale_boxes(BOXES, 40, 60, 64)[None], multimask_output=False
        )
    expected = postprocess(said.pred_masks[0][:, 0], 40, 60).numpy()
    (masks,) = Sam2Segmenter(folder).segment([image], [asked(BOXES)])
    assert masks.dtype == bool and (masks == expected).mean() > 0.999 and 0.02 < masks.mean() < 0.98


def test_images_of_a_batch_may_have_any_number_of_boxes(folder: str) -> None:
    segmenter = Sam2Segmenter(folder)
    frames = [noise(0), noise(1, 48, 32), noise(2), noise(3)]
    many = np.concatenate([BOXES + 0.5 * i for i in range(5)])
    detections = [asked(BOXES[:1]), asked(BOXES / 2), [], asked(many)]
    masks = segmenter.segment(frames, detections)
    assert [m.shape for m in masks] == [(1, 40, 60), (4, 48, 32), (0, 40, 60), (20, 40, 60)]
    for image, found, together in zip(frames, detections, masks, strict=True):
        (alone,) = segmenter.segment([image], [found])
        assert together.size == 0 or (alone == together).mean() > 0.999
    one_by_one = [segmenter.segment([frames[3]], [[d]])[0][0] for d in detections[3][14:19]]
    assert (np.stack(one_by_one) == masks[3][14:19]).mean() > 0.999
    assert (masks[3][0] != masks[3][1]).any() and segmenter.segment([], []) == []


def test_checkpoints_of_the_video_model_are_loaded(tmp_path: Path) -> None:
    folder = save_sam2(tmp_path / "video", video=True)
    segmenter = Sam2Segmenter(str(folder))
    weights = load_file(folder / "model.safetensors")
    ours = segmenter._network.state_dict()
    assert ours and all((weights[name] == value).all() for name, value in ours.items())
    assert len(weights) > len(ours)
    (masks,) = segmenter.segment([noise(0)], [asked(BOXES)])
    assert masks.shape == (4, 40, 60)


def test_full_memory_asks_for_a_smaller_batch(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter = Sam2Segmenter(folder)
    full = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr(segmenter._network.vision_encoder, "forward", full)
    frames = [noise(0), noise(1)]
    refuses("memory is full with 2 images at a time", segmenter.segment, frames, [asked(BOXES)] * 2)
