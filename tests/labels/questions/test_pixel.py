"""Questions about pixels: the answer is the point that the pixel named in the prompt shows."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from labels_scenes import random_frame
from spear.errors import SpearError
from spear.labels.fit.image import unproject
from spear.labels.questions.generate import generate
from spear.labels.questions.templates import FAMILIES_PIXEL
from spear.labels.store import DepthImages, write_depth
from spear.train.tasks import load_depth
from spear.types import LabeledImage
from spear.util.images import encode_jpeg


def test_the_answer_is_the_point_that_the_pixel_shows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frame = random_frame(rng)
    assert frame.depth is not None and frame.intrinsics is not None
    height, width = frame.depth.shape
    image = encode_jpeg(frame.image)
    label = LabeledImage(image, width, height, frame.intrinsics, [], "metre", "made")
    write_depth([(image, frame.depth)], tmp_path / "depth/external/depth-00000.parquet")
    depth = load_depth(tmp_path, {"external": [label]})["external"][0][1]
    truth = unproject(frame.depth, frame.intrinsics)
    asked = [q for _ in range(50) for q in generate(label, rng, (4, 4), FAMILIES_PIXEL, depth=depth)]
    assert len(asked) == 200
    for question in asked:
        y, x = (int(n) / 1024 for n in re.findall(r"<loc(\d{4})>", question.prompt))
        near = truth[round(y * height - 0.5), round(x * width - 0.5)]
        assert question.values == pytest.approx(near.tolist(), abs=0.02)
    assert generate(label, rng, (4, 4), FAMILIES_PIXEL) == []  # without depth there is nothing to ask
    assert generate(label, rng, (4, 4), FAMILIES_PIXEL, depth=np.zeros_like(depth)) == []


def test_depth_of_other_images_is_refused(tmp_path: Path) -> None:
    image = encode_jpeg(np.zeros((8, 8, 3), np.uint8))
    label = LabeledImage(b"another", 8, 8, np.eye(3), [], "metre", "made")
    write_depth([(image, np.ones((8, 8), np.float32))], tmp_path / "depth/external/depth-00000.parquet")
    with pytest.raises(SpearError, match="of other images than the labels"):
        load_depth(tmp_path, {"external": [label]})
    assert len(DepthImages(tmp_path / "depth/external")) == 1
