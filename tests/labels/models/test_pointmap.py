"""MoGe as the point-map model of the labeling pipeline.

`small_v1` is a small MoGe v1 with random weights; `metric_model` is a small MoGe-2 with the weights
of reference data. Frames of `make_noise_frame` have 60 × 40 pixels unless a size is given.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from labels_stand_ins import make_noise_frame
from moge_reference import build_reference_model, build_small_v1, make_checkpoint
from refusals import refuses
from spear.labels.fit.image import project
from spear.labels.models.pointmap import MogePointMapModel
from spear.models.moge.infer import infer_geometry
from spear.models.moge.networks import MogeV1


@pytest.fixture
def small_v1() -> MogePointMapModel:
    return MogePointMapModel(build_small_v1(), device="cpu")


@pytest.fixture
def metric_model(shared: Path) -> MogePointMapModel:
    model = copy.deepcopy(build_reference_model(shared, 2))
    model.max_tokens = 20  # to be fast
    return MogePointMapModel(model, make_checkpoint(shared, 2).path.name, device="cpu")


def test_point_maps_have_the_sizes_of_their_images(small_v1: MogePointMapModel) -> None:
    frames = [make_noise_frame(0), make_noise_frame(1, height=56, width=42), make_noise_frame(2)]

    point_maps = small_v1.predict(frames)

    assert [point_map.points.shape for point_map in point_maps] == [
        frame.image.shape for frame in frames
    ]
    assert [point_map.mask.shape for point_map in point_maps] == [(40, 60), (56, 42), (40, 60)]
    for point_map in point_maps:
        assert point_map.points.dtype == np.float32
        assert point_map.mask.dtype == bool
        assert point_map.mask.all()
        assert point_map.unit == "relative"


def test_an_image_in_a_batch_gets_the_points_that_it_gets_alone(
    small_v1: MogePointMapModel,
) -> None:
    frames = [make_noise_frame(0), make_noise_frame(1, height=56, width=42), make_noise_frame(2)]

    point_maps = small_v1.predict(frames)

    for frame, point_map in zip(frames, point_maps, strict=True):
        (single_result,) = small_v1.predict([frame])
        np.testing.assert_allclose(point_map.points, single_result.points, rtol=1e-3, atol=1e-3)


def test_no_images_give_no_point_maps(small_v1: MogePointMapModel) -> None:
    assert small_v1.predict([]) == []


def test_points_lie_on_the_rays_of_their_pixels(small_v1: MogePointMapModel) -> None:
    (point_map,) = small_v1.predict([make_noise_frame(0)])

    y, x = np.mgrid[:40, :60] + 0.5
    pixel_centers = np.stack([x, y], -1)
    pixels = project(point_map.points, point_map.intrinsics)
    np.testing.assert_allclose(pixels, pixel_centers, atol=1e-2)
    assert point_map.intrinsics[0, 2] == 30  # the center of the image
    assert point_map.intrinsics[1, 2] == 20


def test_moge_2_gives_the_metric_points_of_its_network(metric_model: MogePointMapModel) -> None:
    frame = make_noise_frame(0)

    (point_map,) = metric_model.predict([frame])

    pixels = torch.from_numpy(frame.image).permute(2, 0, 1)[None]
    geometry = infer_geometry(metric_model.model, pixels)
    expected = geometry.points[0].numpy()[point_map.mask]
    np.testing.assert_allclose(point_map.points[point_map.mask], expected, rtol=1e-5)
    assert point_map.unit == "metre"
    assert metric_model.name == "moge-2 reference-v2.pt"


def test_unknown_points_are_zero_and_known_ones_in_front_of_the_camera(
    metric_model: MogePointMapModel,
) -> None:
    (point_map,) = metric_model.predict([make_noise_frame(0)])

    assert 0 < point_map.mask.mean() < 1
    assert not point_map.points[~point_map.mask].any()
    assert (point_map.points[point_map.mask][:, 2] > 0).all()


def get_last_layer(model: MogeV1) -> torch.nn.Conv2d:
    """The layer whose output channels are x, y and the logarithm of the depth."""
    return model.head.output_block[0][2]


def overflow_depth(model: MogeV1) -> None:
    """Make all depths infinite: exp(200) overflows."""
    get_last_layer(model).bias.data[2] = 200.0


def mirror_points(model: MogeV1) -> None:
    """Change the signs of x and y, so that only a negative focal length fits."""
    get_last_layer(model).weight.data[:2] *= -1


@pytest.mark.parametrize("break_weights", [overflow_depth, mirror_points])
def test_an_image_to_whose_points_no_camera_fits_is_refused(
    break_weights: Callable[[MogeV1], None],
) -> None:
    model = copy.deepcopy(build_small_v1())
    break_weights(model)
    point_map_model = MogePointMapModel(model, device="cpu")

    refuses(r"No camera fits .* 0\.jpg", point_map_model.predict, [make_noise_frame(0)])
