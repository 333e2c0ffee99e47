"""Reading RGB-D folders: their frames, their stamps, and what is refused.

`write_plain` writes frames as a plain folder, without instances; `write_scannet` writes them as a
scan of ScanNet, with instances and their names. Files are named by the frame's number: 0.png, ….
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tiny import assemble_png
from labels_scenes import make_random_frame
from refusals import refuses
from rgbd_folders import to_millimeter_image, write_plain, write_scannet
from spear.errors import Notice
from spear.labels.fit.accuracy import compare_labels
from spear.labels.fit.image import unproject
from spear.labels.inputs import read_contents
from spear.labels.pipeline import label_with_ground_truth
from spear.labels.rgbd import RgbdScene, align_depth, read_matrix
from spear.labels.sources import list_items
from spear.types import Array, Frame

DEPTH_TOLERANCE_M = 5.1e-4  # depth is stored in whole millimeters, so it is rounded by half of one


@pytest.fixture(scope="module")
def truth() -> list[Frame]:
    """Three frames of 96 × 64 pixels, each with five boxes on a table."""
    rng = np.random.default_rng(0)
    return [make_random_frame(rng, width=96, height=64) for _ in range(3)]


def test_a_plain_folder_gives_its_frames_back(tmp_path: Path, truth: list[Frame]) -> None:
    scene = RgbdScene(write_plain(tmp_path / "s", truth * 4))

    # Frames are sorted by number: 2 comes before 10.
    stems = [Path(source).stem for source in scene.sources]
    assert stems == [str(i) for i in range(12)]
    for i, true in enumerate(truth):
        frame = scene[i]
        assert (frame.image == true.image).all()
        assert frame.source == scene.sources[i]
        assert frame.depth is not None
        assert frame.depth.dtype == np.float32
        np.testing.assert_allclose(frame.depth, true.depth, atol=DEPTH_TOLERANCE_M)
        np.testing.assert_allclose(frame.intrinsics, true.intrinsics)
        np.testing.assert_allclose(frame.extrinsics, true.extrinsics, atol=1e-9)
        assert frame.instances is None
        assert frame.boxes is None


def write_json_intrinsics(folder: Path, intrinsics: Any, **size: int) -> None:
    """Write intrinsics.json, with the first pixel's center at 0 instead of 0.5."""
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


@pytest.mark.parametrize(("shift_px", "max_extra_error_m"), [(0, 0.001), (1, 0.002)])
def test_a_scan_gives_the_true_boxes(
    tmp_path: Path, truth: list[Frame], shift_px: int, max_extra_error_m: float
) -> None:
    """Boxes from a scan are nearly as accurate as boxes from the exact frames.

    The instances of a real scan are off by about a pixel, so they are shifted by `shift_px`.
    """
    # A scan has one name for each instance number, so all frames get the names of the first one.
    frames = [replace(frame, names=truth[0].names) for frame in truth]
    scan_frames = []
    for frame in frames:
        shifted_instances = np.roll(frame.instances, shift_px, axis=1)
        scan_frames.append(replace(frame, instances=shifted_instances))
    scene = RgbdScene(write_scannet(tmp_path / "s", scan_frames))
    read_frames = [scene[i] for i in range(len(scene.sources))]

    accuracy = compare_labels(label_with_ground_truth(read_frames), frames)

    exact_accuracy = compare_labels(label_with_ground_truth(frames), frames)
    assert accuracy.n == exact_accuracy.n
    assert accuracy.n >= 14  # of 15 boxes, one may be hidden
    assert accuracy.center < exact_accuracy.center + max_extra_error_m
    assert accuracy.vertex < exact_accuracy.vertex + 2 * max_extra_error_m


def test_walls_are_no_objects_of_a_scan(tmp_path: Path, truth: list[Frame]) -> None:
    """The scan that `write_scannet` writes also has an instance with the name "wall"."""
    scene = RgbdScene(write_scannet(tmp_path / "s", truth[:1]))

    assert scene[0].names == truth[0].names


def test_an_instance_image_of_another_shape_is_refused(tmp_path: Path, truth: list[Frame]) -> None:
    scene = RgbdScene(write_scannet(tmp_path / "s", truth[:1]))
    file = scene.folder / "instance-filt" / "0.png"
    instances = np.asarray(Image.open(file))
    Image.fromarray(instances[:, :64]).save(file)  # 64 of 96 columns

    refuses(r"instance-filt/0\.png", lambda: scene[0])


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize(
    ("orientation", "is_turned"),
    [
        (2, True),  # mirrored
        (3, True),  # turned by 180°
        (6, False),  # turned by 90°, which the size of the image shows
    ],
)
def test_exif_does_not_turn_a_color_image(
    truth: list[Frame], tmp_path: Path, orientation: int, is_turned: bool, suffix: str
) -> None:
    """The color image is read as stored, like its depth.

    `is_turned` makes readers of annotations refuse the image. Annotations of an image that EXIF
    turns by 90° have another aspect, by which they are refused anyway.
    """
    exif = Image.Exif()
    exif[0x0112] = orientation  # the tag of the orientation
    folder = write_plain(tmp_path / "s", truth[:1])
    (folder / "color" / "0.png").unlink()
    color_path = folder / "color" / f"0{suffix}"
    Image.fromarray(truth[0].image).save(color_path, exif=exif)

    frame = RgbdScene(folder)[0]

    assert (frame.image == truth[0].image).all()
    assert frame.is_turned == is_turned


def test_coarser_depth_lands_on_the_right_pixels(truth: list[Frame], tmp_path: Path) -> None:
    """A depth image with half the rows and columns covers squares of 2 × 2 color pixels."""
    folder = write_plain(tmp_path / "s", truth[:1])
    coarse_depth = truth[0].depth[1::2, 1::2]
    to_millimeter_image(coarse_depth).save(folder / "depth" / "0.png")

    frame = RgbdScene(folder)[0]

    expected = coarse_depth.repeat(2, axis=0).repeat(2, axis=1)
    np.testing.assert_allclose(frame.depth, expected, atol=DEPTH_TOLERANCE_M)


def test_files_that_are_no_images_are_no_frames(truth: list[Frame], tmp_path: Path) -> None:
    folder = write_plain(tmp_path / "s", truth)
    (folder / "color" / "0.json").write_text("{}")

    assert len(list(list_items([f"rgbd:{folder}"]))) == 3


def test_a_scene_listed_as_photos_is_noticed(truth: list[Frame], tmp_path: Path) -> None:
    folder = write_plain(tmp_path / "s", truth)

    with pytest.warns(Notice, match="rgbd:"):
        items = list(list_items([str(folder)]))

    assert len(items) == 6  # three color images, and three depth images as photos


def test_color_images_without_depth_are_ignored_with_a_notice(
    truth: list[Frame], tmp_path: Path
) -> None:
    folder = write_plain(tmp_path / "s", truth)
    (folder / "depth" / "1.png").rename(folder / "depth" / "01.png")  # color/1.png has none now

    with pytest.warns(Notice, match="1 color"):
        items = list(list_items([f"rgbd:{folder}"]))

    assert [Path(item.key).name for item in items] == ["0.png", "2.png"]


@pytest.mark.parametrize(
    "name", ["color/1.png", "depth/1.png", "instance-filt/1.png", "pose/1.txt"]
)
def test_a_changed_file_changes_the_stamp_of_its_frame_only(
    truth: list[Frame], tmp_path: Path, name: str
) -> None:
    folder = write_scannet(tmp_path / "s", truth)
    scene = RgbdScene(folder)
    old_stamps = [scene.make_file_stamp(i) for i in range(3)]

    shutil.copy(folder / name.replace("1", "2"), folder / name)  # the file of frame 2

    new_stamps = [scene.make_file_stamp(i) for i in range(3)]
    assert new_stamps[0] == old_stamps[0]
    assert new_stamps[1] != old_stamps[1]
    assert new_stamps[2] == old_stamps[2]


def write_other_color_intrinsics(folder: Path) -> None:
    """Give the color camera of a scan a focal length of 200 pixels."""
    intrinsics = [[200, 0, 48], [0, 200, 32], [0, 0, 1]]
    np.savetxt(folder / "intrinsic" / "intrinsic_color.txt", intrinsics)


def test_changed_intrinsics_change_the_stamp_of_a_frame(truth: list[Frame], tmp_path: Path) -> None:
    folder = write_scannet(tmp_path / "s", truth[:1])
    old_stamp = RgbdScene(folder).make_file_stamp(0)

    write_other_color_intrinsics(folder)

    assert RgbdScene(folder).make_file_stamp(0) != old_stamp


def test_changed_intrinsics_are_read_when_a_scene_is_listed_again(
    truth: list[Frame], tmp_path: Path
) -> None:
    """Both listings are in one process, as in a notebook, where the scene could stay cached."""
    folder = write_scannet(tmp_path / "s", truth[:1])
    (old_frame,) = read_contents(list_items([f"rgbd:{folder}"]))

    write_other_color_intrinsics(folder)
    (new_frame,) = read_contents(list_items([f"rgbd:{folder}"]))

    assert old_frame.intrinsics[0, 0] != 200
    assert new_frame.intrinsics[0, 0] == 200


# Two cameras with the same position and direction but different fields of view
WIDE_CAMERA = np.array([[80.0, 0, 33], [0, 82, 24], [0, 0, 1]])  # of 64 × 48 pixels
NARROW_CAMERA = np.array([[150.0, 0, 47], [0, 140, 40], [0, 0, 1]])  # of 100 × 80 pixels


def compute_surface_depth(camera: Array, width: int, height: int) -> Array:
    """The depth [height, width] of a smooth surface that a camera sees."""
    rays = unproject(np.ones((height, width)), camera)  # [height, width, 3] at depth 1
    return (2 + 0.5 * rays[..., 0] + 0.3 * rays[..., 1]).astype(np.float32)


def test_align_depth_looks_along_the_same_ray() -> None:
    depth = compute_surface_depth(WIDE_CAMERA, 64, 48)

    aligned = align_depth(depth, k_depth=WIDE_CAMERA, k_image=NARROW_CAMERA, height=80, width=100)

    # Half a pixel of the wide camera is up to 0.5 / 80 of a ray's x and y, so depth is off by up to
    # (0.5 + 0.3) · 0.5 / 80 = 0.005.
    expected = compute_surface_depth(NARROW_CAMERA, 100, 80)
    np.testing.assert_allclose(aligned, expected, atol=0.006)


def test_align_depth_is_zero_outside_the_view_of_the_depth_camera() -> None:
    depth = compute_surface_depth(NARROW_CAMERA, 64, 48)  # the first 64 × 48 pixels only

    aligned = align_depth(depth, k_depth=NARROW_CAMERA, k_image=WIDE_CAMERA, height=80, width=100)

    assert aligned[0, 0] == 0  # the corner of the wide view is outside the narrow one


def test_a_frame_without_a_tracked_pose_has_no_extrinsics(
    tmp_path: Path, truth: list[Frame]
) -> None:
    folder = write_scannet(tmp_path / "s", truth[:1])
    (folder / "pose" / "0.txt").write_text("\n".join(["-inf -inf -inf -inf"] * 4))

    assert RgbdScene(folder)[0].extrinsics is None


def test_depths_of_0_and_65535_are_unknown(tmp_path: Path, truth: list[Frame]) -> None:
    folder = write_scannet(tmp_path / "s", truth[:1])
    depth_mm = np.asarray(to_millimeter_image(truth[0].depth)).copy()
    depth_mm[0, 0] = 0
    depth_mm[0, 1] = 65535
    Image.fromarray(depth_mm).save(folder / "depth" / "0.png")

    depth = RgbdScene(folder)[0].depth

    assert depth is not None
    assert depth[0, 0] == 0
    assert depth[0, 1] == 0
    assert depth[0, 2] > 0


def save_depth(folder: Path, mode: str, size: tuple[int, int], value: int) -> None:
    """Replace the depth image by one of this mode and size, all of whose pixels have one value."""
    Image.new(mode, size, value).save(folder / "depth" / "0.png")


@pytest.mark.parametrize(
    ("mode", "size", "value", "message"),
    [
        ("L", (96, 64), 3, r"0\.png has 8 bits"),
        ("I;16", (96, 64), 3, r"0\.png .* unit may be meters"),  # 3 mm from the camera
        ("RGB", (96, 64), 0, r"0\.png .* \(64, 96, 3\)"),
        ("I;16", (64, 64), 999, r"0\.png has 64×64 pixels"),  # another aspect than the color image
    ],
)
def test_a_bad_depth_image_is_refused(
    tmp_path: Path,
    truth: list[Frame],
    mode: str,
    size: tuple[int, int],
    value: int,
    message: str,
) -> None:
    folder = write_plain(tmp_path / "s", truth[:1])
    save_depth(folder, mode, size, value)

    refuses(message, lambda: RgbdScene(folder)[0])


@pytest.mark.parametrize(
    "scale",
    [
        2.05,  # for images of about twice the size
        0.5,  # for images of half the size
    ],
)
def test_intrinsics_for_larger_or_smaller_images_are_refused(
    tmp_path: Path, truth: list[Frame], scale: float
) -> None:
    folder = write_plain(tmp_path / "s", truth[:1])
    file = folder / "intrinsics.txt"
    np.savetxt(file, np.diag([scale, scale, 1.0]) @ read_matrix(file))

    refuses("center", lambda: RgbdScene(folder)[0])


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[150, 0, 31.5], [0, 150, 47.5], [0, 0, 1]], "center"),  # of an image of 64 × 96 pixels
        ([[150, 0, 59.5], [0, 150, 39.5], [0, 0, 1]], "center"),  # of an image of 120 × 80 pixels
        (np.diag([0.9, 0.9, 1.0]), r"s\.txt .* in pixels"),  # focal length in image widths
    ],
)
def test_intrinsics_that_do_not_fit_the_image_are_refused(
    tmp_path: Path, truth: list[Frame], matrix: Any, message: str
) -> None:
    """The images have 96 × 64 pixels."""
    folder = write_plain(tmp_path / "s", truth[:1])
    np.savetxt(folder / "intrinsics.txt", matrix)

    refuses(message, lambda: RgbdScene(folder)[0])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("intrinsics.txt", "fx fy", r"intrinsics\.txt contains no matrix"),
        ("intrinsics.txt", "1 2 3", "a matrix of 1×3"),
        ("intrinsics.json", "{}", r"intrinsics\.json contains no intrinsics"),
        (
            "intrinsics.json",
            '{"fx": 0, "fy": 9, "cx": 5, "cy": 5}',
            r"intrinsics\.json .* in pixels",
        ),
        # A pose that scales by 2 along x is not rigid.
        ("pose/0.txt", "2 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1", r"0\.txt contains no pose"),
    ],
)
def test_a_bad_text_file_is_refused(
    tmp_path: Path, truth: list[Frame], name: str, text: str, message: str
) -> None:
    folder = write_plain(tmp_path / "s", truth[:1])
    (folder / name).write_text(text)

    refuses(message, lambda: RgbdScene(folder)[0])


def test_a_folder_without_intrinsics_is_refused(tmp_path: Path, truth: list[Frame]) -> None:
    folder = write_plain(tmp_path / "s", truth[:1])
    (folder / "intrinsics.txt").unlink()

    refuses(r"intrinsics\.txt contains no matrix", RgbdScene, folder)


def test_a_folder_without_color_images_is_refused(tmp_path: Path, truth: list[Frame]) -> None:
    folder = write_plain(tmp_path / "s", truth[:1])
    (folder / "color" / "0.png").unlink()

    refuses("no image in color/", RgbdScene, folder)


def test_a_color_folder_with_an_unknown_name_is_refused(tmp_path: Path, truth: list[Frame]) -> None:
    folder = write_plain(tmp_path / "s", truth[:1])
    (folder / "color").rename(folder / "pictures")

    refuses("no color/ or no depth/", RgbdScene, folder)


def test_two_color_images_with_one_depth_image_are_refused(
    tmp_path: Path, truth: list[Frame]
) -> None:
    folder = write_plain(tmp_path / "s", truth[:1])
    Image.new("RGB", (96, 64)).save(folder / "color" / "0.jpg")

    refuses(r"0\.(jpg|png) and 0\.(jpg|png) have", RgbdScene, folder)


def test_cameras_in_two_places_are_refused(tmp_path: Path, truth: list[Frame]) -> None:
    folder = write_scannet(tmp_path / "s", truth[:1])
    extrinsics = np.eye(4)
    extrinsics[0, 3] = 0.03  # 3 cm to the right
    np.savetxt(folder / "intrinsic" / "extrinsic_depth.txt", extrinsics)

    refuses("extrinsic_depth", RgbdScene, folder)


@pytest.mark.filterwarnings("ignore:Image size")
def test_an_enormous_depth_image_is_refused_before_it_is_decoded(
    truth: list[Frame], tmp_path: Path
) -> None:
    folder = write_plain(tmp_path / "scene", truth[:1])
    header = (13_300, 13_300, 16, 0)  # width, height, bits per channel, and 0 for gray
    (folder / "depth" / "0.png").write_bytes(assemble_png(header, data=b""))

    refuses("13300 x 13300 pixels", lambda: RgbdScene(folder)[0])
