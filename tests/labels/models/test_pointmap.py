"""MoGe as the labeller's point map."""

import copy
from pathlib import Path

import numpy as np
import torch

from labels_stand_ins import noise
from moge_reference import build_reference_model, build_small_v1, make_checkpoint
from refusals import refuses
from spear.labels.fit.image import project
from spear.labels.models.pointmap import MogePointMapModel
from spear.models.moge.infer import infer_geometry


def test_images_of_all_sizes_come_back_in_order() -> None:
    frames = [noise(0), noise(1, 56, 42), noise(2)]
    pointmap = MogePointMapModel(build_small_v1(), device="cpu")
    for one, result in zip(frames, pointmap.predict(frames), strict=True):
        assert result.points.shape == one.image.shape and result.points.dtype == np.float32
        assert (
            result.mask.shape == one.image.shape[:2]
            and result.mask.dtype == bool
            and result.mask.all()
        )
        assert result.unit == "relative"
        (alone,) = pointmap.predict([one])
        np.testing.assert_allclose(result.points, alone.points, rtol=1e-3, atol=1e-3)
    assert pointmap.predict([]) == []


def test_points_lie_on_the_rays_of_their_pixels() -> None:
    (found,) = MogePointMapModel(build_small_v1(), device="cpu").predict([noise(0)])
    y, x = np.mgrid[:40, :60] + 0.5
    np.testing.assert_allclose(
        project(found.points, found.intrinsics), np.stack([x, y], -1), atol=1e-2
    )
    assert found.intrinsics[0, 2] == 30 and found.intrinsics[1, 2] == 20


def test_moge_2_gives_metres_and_leaves_unknown_points_at_zero(shared: Path) -> None:
    model = copy.deepcopy(build_reference_model(shared, 2))
    model.max_tokens = 20
    pointmap = MogePointMapModel(model, make_checkpoint(shared, 2).path.name, device="cpu")
    assert pointmap.name == "moge-2 reference-v2.pt"
    one = noise(0)
    (found,) = pointmap.predict([one])
    assert found.unit == "metre" and 0 < found.mask.mean() < 1
    assert not found.points[~found.mask].any() and (found.points[found.mask][:, 2] > 0).all()
    plain = infer_geometry(model, torch.from_numpy(one.image).permute(2, 0, 1)[None])
    np.testing.assert_allclose(
        found.points[found.mask], plain.points[0].numpy()[found.mask], rtol=1e-5
    )


def test_points_to_which_no_camera_fits_are_an_error() -> None:
    model = copy.deepcopy(build_small_v1())
    last = model.head.output_block[0][2]
    last.bias.data[2] = 200.0  # exp(200) overflows
    refuses(r"No camera fits .* 0\.jpg", MogePointMapModel(model, device="cpu").predict, [noise(0)])
    last.bias.data[2] = 0.0
    last.weight.data[:2] *= -1  # mirrored: only a negative focal length fits
    refuses(r"No camera fits .* 0\.jpg", MogePointMapModel(model, device="cpu").predict, [noise(0)])
