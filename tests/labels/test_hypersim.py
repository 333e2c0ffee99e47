from pathlib import Path

import numpy as np
import pytest

from labels_scenes import random_frame
from rgbd_folders import camera_table, rays_of, write_hypersim
from spear.errors import SpearError
from spear.labels.fit.accuracy import compare
from spear.labels.hypersim import HypersimScene
from spear.labels.models.ground_truth import GroundTruthDetector, GroundTruthPointMap, GroundTruthSegmenter
from spear.labels.pipeline import label
from spear.labels.rgbd import open_scene
from spear.types import Frame

h5py = pytest.importorskip("h5py")

NAMES = ("chair", "table", "lamp", "box", "bag")


def scene_frame(seed: int = 0, **size: int) -> Frame:
    """Boxes on a table, seen with Hypersim's field of view."""
    frame = random_frame(np.random.default_rng(seed), names=NAMES, **size)
    assert frame.intrinsics is not None
    return frame


def test_a_frame_comes_back_with_depth_along_z_and_true_boxes(tmp_path: Path) -> None:
    true = scene_frame(width=96, height=64)
    assert true.intrinsics is not None and true.boxes is not None
    camera_table(tmp_path, rays_of(true.intrinsics, 64, 96))
    scene = open_scene(write_hypersim(tmp_path, true))
    assert isinstance(scene, HypersimScene) and len(scene) == 1
    frame = scene[0]
    np.testing.assert_allclose(frame.intrinsics, true.intrinsics, atol=1e-6)
    np.testing.assert_allclose(frame.extrinsics, true.extrinsics, atol=1e-9)
    np.testing.assert_allclose(frame.depth, true.depth, atol=1e-4)
    assert frame.instances is not None and (frame.instances == true.instances).all()
    seen = set(np.unique(frame.instances)) - {0}
    assert frame.names == {i: n for i, n in true.names.items() if i in seen}
    assert frame.boxes is not None
    for instance, vertices in frame.boxes.items():
        gaps = np.linalg.norm(vertices[:, None] - true.boxes[instance], axis=-1)
        assert gaps.min(axis=1).max() < 1e-6
    result = compare(
        label([frame], GroundTruthDetector(), GroundTruthSegmenter(), GroundTruthPointMap()), [frame]
    )
    assert result.n == len(seen) and result.center < 0.005


def test_the_usual_camera_sees_sixty_degrees(tmp_path: Path) -> None:
    scene = write_hypersim(tmp_path, scene_frame(width=1024, height=64))
    k = HypersimScene(scene)[0].intrinsics
    np.testing.assert_allclose(k, [[886.81, 0, 512], [0, 886.81, 32], [0, 0, 1]], atol=0.01)


def test_a_shifted_lens_is_followed_and_a_tilted_one_refused(tmp_path: Path) -> None:
    true = scene_frame(width=96, height=64)
    scene = write_hypersim(tmp_path, true)
    shifted = np.array([[86.0, 0, 50], [0, 87, 21], [0, 0, 1]])
    camera_table(tmp_path, 3.7 * rays_of(shifted, 64, 96))
    np.testing.assert_allclose(HypersimScene(scene)[0].intrinsics, shifted, atol=1e-6)
    tilted = rays_of(shifted, 64, 96)
    tilted[2, 1] += 0.05
    camera_table(tmp_path, tilted)
    with pytest.raises(SpearError, match="its lens is tilted"):
        HypersimScene(scene)[0]


def test_without_instances_there_is_depth_alone(tmp_path: Path) -> None:
    scene = write_hypersim(tmp_path, scene_frame(width=96, height=64))
    for path in (scene / "images" / "scene_cam_00_geometry_hdf5").glob("*semantic*"):
        path.unlink()
    frame = HypersimScene(scene)[0]
    assert frame.depth is not None and frame.instances is None and frame.boxes is None and frame.names == {}


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("_detail/metadata_scene.csv", "cannot read the table"),
        ("images/scene_cam_00_final_preview/frame.0007.tonemap.jpg", "no images/scene_cam"),
        (
            "images/scene_cam_00_geometry_hdf5/frame.0007.depth_meters.hdf5",
            "depth_meters.hdf5: cannot read it",
        ),
        ("_detail/cam_00/camera_keyframe_positions.hdf5", "positions.hdf5: cannot read it"),
    ],
)
def test_a_missing_part_is_named(tmp_path: Path, missing: str, message: str) -> None:
    scene = write_hypersim(tmp_path, scene_frame(width=96, height=64))
    (scene / missing).unlink()
    with pytest.raises(SpearError, match=message):
        HypersimScene(scene)[0]


def test_a_scene_that_the_table_does_not_know_is_refused(tmp_path: Path) -> None:
    scene = write_hypersim(tmp_path, scene_frame(width=96, height=64))
    camera_table(tmp_path, np.eye(3))
    with pytest.raises(SpearError, match="no scene ai_002_003"):
        HypersimScene(scene.rename(tmp_path / "ai_002_003"))
