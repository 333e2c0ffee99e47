"""MoGe as the labeller's point map."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from moge_reference import checkpoint, random_v1, reference
from spear.errors import SpearError
from spear.labels.fit.image import project
from spear.labels.models.pointmap import MogePointMap
from spear.models.moge.infer import infer
from spear.types import Frame


def frame(height: int = 40, width: int = 60, seed: int = 0) -> Frame:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Frame(image=image, source=f"noise {seed}")


def test_images_of_all_sizes_come_back_in_order() -> None:
    frames = [frame(seed=0), frame(56, 42, seed=1), frame(seed=2)]
    pointmap = MogePointMap(random_v1(), device="cpu")
    together = pointmap.predict(frames)
    for one, result in zip(frames, together, strict=True):
        assert result.points.shape == one.image.shape and result.points.dtype == np.float32
        assert result.mask.shape == one.image.shape[:2] and result.mask.dtype == bool and result.mask.all()
        assert result.unit == "relative"
        (alone,) = pointmap.predict([one])
        np.testing.assert_allclose(result.points, alone.points, rtol=1e-3, atol=1e-3)
    assert pointmap.predict([]) == []


def test_points_lie_on_the_rays_of_their_pixels() -> None:
    (found,) = MogePointMap(random_v1(), device="cpu").predict([frame()])
    y, x = np.mgrid[:40, :60] + 0.5
    np.testing.assert_allclose(project(found.points, found.intrinsics), np.stack([x, y], -1), atol=1e-2)
    assert found.intrinsics[0, 2] == 30 and found.intrinsics[1, 2] == 20


def test_moge_2_gives_metres_and_leaves_unknown_points_at_zero(shared: Path) -> None:
    folder = shared / "fixtures" / "moge"
    model = reference(folder, 2)
    pointmap = MogePointMap(model, checkpoint(folder, 2).path.name, device="cpu", num_tokens=20)
    assert pointmap.name == "moge-2 reference-v2.pt"
    one = frame()
    (found,) = pointmap.predict([one])
    assert found.unit == "metre" and 0 < found.mask.mean() < 1
    assert not found.points[~found.mask].any() and (found.points[found.mask][:, 2] > 0).all()
    plain = infer(model, torch.from_numpy(one.image).permute(2, 0, 1)[None], 20)
    np.testing.assert_allclose(found.points[found.mask], plain.points[0].numpy()[found.mask], rtol=1e-5)


def test_points_that_are_not_finite_are_unknown_and_no_camera_is_an_error() -> None:
    model = copy.deepcopy(random_v1())
    with torch.no_grad():
        model.head.output_block[0][2].bias[2] = 200.0  # exp(200) overflows
    (found,) = MogePointMap(model, device="cpu").predict([frame()])
    assert not found.mask.any() and not found.points.any()
    with torch.no_grad():
        model.head.output_block[0][2].bias[2] = 0.0
        model.head.output_block[0][2].weight[:2] *= -1  # mirrored: only a negative focal length fits
    with pytest.raises(SpearError, match="noise 0: no camera fits the predicted points"):
        MogePointMap(model, device="cpu").predict([frame()])
