import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from labels_scenes import make_random_frame
from refusals import refuses
from rgbd_folders import to_millimeter_image, write_plain, write_scannet
from spear.errors import Notice
from spear.labels.fit.image import unproject
from spear.labels.fit.quality import compare_labels
from spear.labels.inputs import read_contents
from spear.labels.pipeline import label_with_ground_truth
from spear.labels.rgbd import RgbdScene, align_depth, read_matrix
from spear.labels.sources import list_items
from spear.types import Frame


@pytest.fixture(scope="module")
def truth() -> list[Frame]:
    rng = np.random.default_rng(0)
    return [make_random_frame(rng, width=96, height=64) for _ in range(3)]


def test_a_plain_folder_gives_its_frames_back(tmp_path: Path, truth: list[Frame]) -> None:
    scene = RgbdScene(write_plain(tmp_path / "s", truth * 4))

    assert [Path(source).stem for source in scene.sources] == [
        str(i) for i in range(12)
    ]  # by number
    for i, true in enumerate(truth):
        frame = scene[i]
        assert (frame.image == true.image).all()
        assert frame.source == scene.sources[i]
        assert frame.depth is not None
        assert frame.depth.dtype == np.float32
        np.testing.assert_allclose(frame.depth, true.depth, atol=5.1e-4)
        np.testing.assert_allclose(frame.intrinsics, true.intrinsics)
        np.testing.assert_allclose(frame.extrinsics, true.extrinsics, atol=1e-9)
        assert frame.instances is None
        assert frame.boxes is None


def write_json_intrinsics(folder: Path, intrinsics: Any, **size: int) -> None:
    values = {
        "fx": intrinsics[0, 0],
        "fy": intrinsics[1, 1],
        "cx": intrinsics[0, 2] - 0.5,
        "cy": intrinsics[1, 2] - 0.5,
    }
    (folder / "intrinsics.json").write_text(json.dumps(values | size))


def test_intrinsics_may_be_json_and_the_color_folder_have_another_name(
    tmp_path: Path, truth: list[Frame]
) -> None:
    folder = write_plain(tmp_path / "s", truth)
    write_json_intrinsics(folder, truth[0].intrinsics)
    (folder / "color").rename(folder / "rgb")

    np.testing.assert_allclose(RgbdScene(folder)[0].intrinsics, truth[0].intrinsics)


def test_intrinsics_of_images_of_another_size_are_refused(
    tmp_path: Path, truth: list[Frame]
) -> None:
    folder = write_plain(tmp_path / "s", truth)
    write_json_intrinsics(folder, truth[0].intrinsics, width=108, height=64)

    refuses("108×64", RgbdScene(folder).__getitem__, 0)


@pytest.mark.parametrize(("off", "slack"), [(0, 0.001), (1, 0.002)])
def test_a_scan_gives_the_true_boxes(
    tmp_path: Path, truth: list[Frame], off: int, slack: float
) -> None:
    """Also where its outlines are off by a pixel, as those of a scan are."""
    frames = [replace(frame, names=truth[0].names) for frame in truth]
    scan_frames = []
    for frame in frames:
        shifted_instances = np.roll(frame.instances, off, axis=1)
        scan_frames.append(replace(frame, instances=shifted_instances))
    scene = RgbdScene(write_scannet(tmp_path / "s", scan_frames))
    read_frames = [scene[i] for i in range(len(scene.sources))]

    accuracy = compare_labels(label_with_ground_truth(read_frames), frames)

    exact_accuracy = compare_labels(label_with_ground_truth(frames), frames)
    assert accuracy.n == exact_accuracy.n
    assert accuracy.n >= 14
    assert accuracy.center < exact_accuracy.center + slack
    assert accuracy.vertex < exact_accuracy.vertex + 2 * slack


def test_walls_are_no_objects_of_a_scan(tmp_path: Path, truth: list[Frame]) -> None:
    scene = RgbdScene(write_scannet(tmp_path / "s", truth[:1]))

    assert scene[0].names == truth[0].names


def test_an_instance_image_of_another_shape_is_refused(tmp_path: Path, truth: list[Frame]) -> None:
    scene = RgbdScene(write_scannet(tmp_path / "s", truth[:1]))
    file = scene.folder / "instance-filt" / "0.png"
    Image.fromarray(np.asarray(Image.open(file))[:, :64]).save(file)

    refuses(r"instance-filt/0\.png", lambda: scene[0])


@pytest.mark.parametrize("ending", [".png", ".tif"])
@pytest.mark.parametrize("orientation", [2, 3, 6])
def test_exif_turns_no_colour(
    truth: list[Frame], tmp_path: Path, orientation: int, ending: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    folder = write_plain(tmp_path / "s", truth[:1])
    (folder / "color" / "0.png").unlink()
    Image.fromarray(truth[0].image).save((folder / "color" / "0").with_suffix(ending), exif=exif)
    frame = RgbdScene(folder)[0]
    assert (frame.image == truth[0].image).all()
    assert frame.is_turned == (orientation != 6)  # so that annotations of it are refused


def test_coarser_depth_lands_on_the_right_pixels(truth: list[Frame], tmp_path: Path) -> None:
    folder = write_plain(tmp_path / "s", truth[:1])
    to_millimeter_image(truth[0].depth[1::2, 1::2]).save(folder / "depth" / "0.png")
    blocks = truth[0].depth[1::2, 1::2].repeat(2, axis=0).repeat(2, axis=1)
    np.testing.assert_allclose(RgbdScene(folder)[0].depth, blocks, atol=5.1e-4)


def test_files_that_are_no_images_are_no_frames(truth: list[Frame], tmp_path: Path) -> None:
    folder = write_plain(tmp_path / "s", truth)
    (folder / "color" / "0.json").write_text("{}")

    assert len(list(list_items([f"rgbd:{folder}"]))) == 3


def test_a_scene_listed_as_photos_is_noticed(truth: list[Frame], tmp_path: Path) -> None:
    folder = write_plain(tmp_path / "s", truth)

    with pytest.warns(Notice, match="rgbd:"):
        items = list(list_items([str(folder)]))

    assert len(items) == 6  # its depth as photos


def test_color_images_without_depth_are_ignored_with_a_notice(
    truth: list[Frame], tmp_path: Path
) -> None:
    folder = write_plain(tmp_path / "s", truth)
    (folder / "depth" / "1.png").rename(folder / "depth" / "01.png")

    with pytest.warns(Notice, match="1 color"):
        items = list(list_items([f"rgbd:{folder}"]))

    assert [Path(item.key).name for item in items] == ["0.png", "2.png"]


def test_a_frame_of_which_a_file_has_changed_shows(truth: list[Frame], tmp_path: Path) -> None:
    folder = write_scannet(tmp_path / "s", truth)
    scene = RgbdScene(folder)
    for name in ("color/1.png", "depth/1.png", "instance-filt/1.png", "pose/1.txt"):
        stamps = [scene.compute_stamp(i) for i in range(3)]
        shutil.copy(folder / name.replace("1", "2"), folder / name)
        assert [scene.compute_stamp(i) == mark for i, mark in enumerate(stamps)] == [
            True,
            False,
            True,
        ], name
    (old,) = read_contents([next(list_items([f"rgbd:{folder}"]))])
    np.savetxt(
        folder / "intrinsic" / "intrinsic_color.txt", [[200, 0, 48], [0, 200, 32], [0, 0, 1]]
    )
    assert RgbdScene(folder).compute_stamp(0) != scene.compute_stamp(0)
    (new,) = read_contents([next(list_items([f"rgbd:{folder}"]))])
    assert old.intrinsics[0, 0] != new.intrinsics[0, 0] == 200  # in one process, as in a notebook


def test_align_depth_looks_along_the_same_ray() -> None:
    wide = np.array([[80.0, 0, 33], [0, 82, 24], [0, 0, 1]])
    close = np.array([[150.0, 0, 47], [0, 140, 40], [0, 0, 1]])
    rays = unproject(np.ones((48, 64)), wide)
    # Smooth along the rays
    depth = (2 + 0.5 * rays[..., 0] + 0.3 * rays[..., 1]).astype(np.float32)
    aligned = align_depth(depth, wide, close, 80, 100)
    rays = unproject(np.ones((80, 100)), close)
    np.testing.assert_allclose(aligned, 2 + 0.5 * rays[..., 0] + 0.3 * rays[..., 1], atol=0.006)
    assert align_depth(depth, close, wide, 80, 100)[0, 0] == 0  # outside what the depth camera saw


def test_a_lost_camera_has_no_pose_and_unknown_depth_is_zero(
    tmp_path: Path, truth: list[Frame]
) -> None:
    folder = write_scannet(tmp_path / "s", truth[:1])
    (folder / "pose" / "0.txt").write_text("\n".join(["-inf -inf -inf -inf"] * 4))
    steps = np.asarray(to_millimeter_image(truth[0].depth)).copy()
    steps[0, 0] = 0
    steps[0, 1] = 65535
    Image.fromarray(steps).save(folder / "depth" / "0.png")
    frame = RgbdScene(folder)[0]
    assert frame.extrinsics is None
    assert frame.depth is not None
    assert frame.depth[0, 0] == 0
    assert frame.depth[0, 1] == 0
    assert frame.depth[0, 2] > 0


DOUBLE = np.diag([2.05, 2.05, 1.0])
HALF = np.diag([0.5, 0.5, 1.0])
ZERO = '{"fx": 0, "fy": 9, "cx": 5, "cy": 5}'


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda at: Image.new("L", (96, 64), 3).save(at / "depth/0.png"), r"0\.png has 8 bits"),
        (
            lambda at: Image.new("I;16", (96, 64), 3).save(at / "depth/0.png"),
            r"0\.png .* unit may be meters",
        ),
        (
            lambda at: Image.new("RGB", (96, 64)).save(at / "depth/0.png"),
            r"0\.png .* \(64, 96, 3\)",
        ),
        (
            lambda at: Image.new("I;16", (64, 64), 999).save(at / "depth/0.png"),
            r"0\.png has 64×64 pixels",
        ),
        (
            lambda at: np.savetxt(at / "pose/0.txt", np.diag([2.0, 1, 1, 1])),
            r"0\.txt contains no pose",
        ),
        (
            lambda at: np.savetxt(at / "intrinsics.txt", np.diag([0.9, 0.9, 1.0])),
            r"s\.txt .* in pixels",
        ),
        (
            lambda at: np.savetxt(
                at / "intrinsics.txt", DOUBLE @ read_matrix(at / "intrinsics.txt")
            ),
            "center",
        ),
        (
            lambda at: np.savetxt(at / "intrinsics.txt", HALF @ read_matrix(at / "intrinsics.txt")),
            "center",
        ),
        (
            lambda at: np.savetxt(
                at / "intrinsics.txt", [[150, 0, 31.5], [0, 150, 47.5], [0, 0, 1]]
            ),
            "center",
        ),
        (
            lambda at: np.savetxt(
                at / "intrinsics.txt", [[150, 0, 59.5], [0, 150, 39.5], [0, 0, 1]]
            ),
            "center",
        ),
        (lambda at: (at / "intrinsics.txt").unlink(), r"intrinsics\.txt contains no matrix"),
        (
            lambda at: (at / "intrinsics.txt").write_text("fx fy"),
            r"intrinsics\.txt contains no matrix",
        ),
        (lambda at: (at / "intrinsics.txt").write_text("1 2 3"), "a matrix of 1×3"),
        (
            lambda at: (at / "intrinsics.json").write_text("{}"),
            r"intrinsics\.json contains no intrinsics",
        ),
        (lambda at: (at / "intrinsics.json").write_text(ZERO), r"intrinsics\.json .* in pixels"),
        (lambda at: (at / "color" / "0.png").unlink(), "no image in color/"),
        (
            lambda at: Image.new("RGB", (96, 64)).save(at / "color/0.jpg"),
            r"0\.(jpg|png) and 0\.(jpg|png) have",
        ),
        (lambda at: (at / "color").rename(at / "pictures"), "no color/ or no depth/"),
    ],
)
def test_what_is_wrong_is_said(
    tmp_path: Path, truth: list[Frame], spoil: Any, message: str
) -> None:
    folder = write_plain(tmp_path / "s", truth[:1])
    spoil(folder)
    refuses(message, lambda: RgbdScene(folder)[0])


def test_cameras_in_two_places_are_refused(tmp_path: Path, truth: list[Frame]) -> None:
    folder = write_scannet(tmp_path / "s", truth[:1])
    np.savetxt(folder / "intrinsic" / "extrinsic_depth.txt", np.eye(4) + 0.03 * np.eye(4, k=3))
    refuses("extrinsic_depth", RgbdScene, folder)
