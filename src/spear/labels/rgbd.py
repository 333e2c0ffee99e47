"""Frames with measured depth from folders of color and depth images: plain ones and ScanNet's.

A plain folder. Both images show the same view; the depth image may have fewer pixels.

    color/NAME.jpg    or another image format, in one of `COLOR_FOLDERS`; as stored, whatever its
    EXIF says depth/NAME.png    16 bits, millimeters along z; 0 and 65535 are unknown
    intrinsics.txt    a 3×3 or 4×4 matrix in pixels of the color image, the first pixel's center at
    0 (as in
                      OpenCV, ROS and ScanNet); or intrinsics.json with fx, fy, cx, cy
    pose/NAME.txt     optional: 4×4, camera → world, meters, world z up; camera x right, y down, z
    forward

A ScanNet scan as its own tools export it. The depth image is laid over the color image along the
rays of the two cameras, which stand in one place.

    color/N.jpg, depth/N.png    depth in millimeters, 0 unknown
    pose/N.txt                  as above; frames that were lost (-inf) have no extrinsics
    intrinsic/                  intrinsic_color.txt, intrinsic_depth.txt, extrinsic_*.txt
    instance-filt/N.png         optional: the number of the instance, 0 where there is none
    *.aggregation.json          with it: what the instances are called
"""

import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from spear.errors import SpearError
from spear.labels.fit.image import have_same_aspect, resize_nearest
from spear.labels.inputs import compute_stamp
from spear.types import Array, Frame
from spear.util.files import read_json
from spear.util.images import IMAGE_SUFFIXES, load_image_and_orientation
from spear.util.json_text import read_utf8

COLOR_FOLDERS = ("color", "colour", "rgb", "image", "images")
STRUCTURE_NAMES = frozenset({"wall", "floor", "ceiling"})
"""Parts of the room that are no objects. They keep their instance numbers but get no name (our
choice)."""
DEPTH_STEP_M = 0.001  # of the depth images
UNKNOWN_DEPTH = 0xFFFF  # like 0
MIN_FARTHEST_DEPTH_M = 0.05
"""Every scene reaches farther than this; depth that does not is in another unit (our choice)."""
MAX_CENTER_OFFSET = 0.15
"""Largest offset of the principal point from the center, as a fraction of the image's size (our
choice)."""

Size = tuple[int, int]
"""Width and height of an image, in pixels."""


class RgbdScene:
    """The frames of a ScanNet scan or a plain folder: `scene[i]`, from `scene.sources[i]`.

    A frame is read when it is asked for, and an error of one frame concerns no other.

    Attributes:
        folder: The folder.
        sources: The color image of each frame.
        num_without_depth: How many color images have no depth image.

    Raises:
        SpearError: The folder is neither of the two or incomplete, or the cameras of a scan stand
            in two places.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._pairs, self.num_without_depth = _find_pairs(self.folder)
        self.sources = [str(color) for color, _ in self._pairs]
        self._depth_camera: Array | None = None  # both images show the same view
        self._names: dict[int, str] | None = None
        calibration = self.folder / "intrinsic"
        if calibration.is_dir():
            for file in calibration.glob("extrinsic_*.txt"):
                if not np.allclose(read_matrix(file), np.eye(4), atol=1e-4):
                    raise SpearError(
                        f"{file} is not the identity matrix. Register depth and color to one "
                        "camera."
                    )
            self._camera, self._size = read_intrinsics(calibration / "intrinsic_color.txt")
            self._depth_camera, _ = read_intrinsics(calibration / "intrinsic_depth.txt")
            self._names = _read_scannet_names(self.folder)
        else:
            file = self.folder / "intrinsics.json"
            if not file.is_file():
                file = self.folder / "intrinsics.txt"
            self._camera, self._size = read_intrinsics(file)

    def compute_stamp(self, index: int) -> str:
        """The stamp of a frame's files, and a checksum of its camera and of the names of
        objects."""
        color, depth = self._pairs[index]
        pose = self._get_pose_path(color)
        instances = self._get_instances_path(color)
        files = [color, depth] + [path for path in (pose, instances) if path.is_file()]
        calibration = repr((self._camera, self._depth_camera, self._names))
        return f"{zlib.crc32(calibration.encode())} {compute_stamp(*files)}"

    def __getitem__(self, index: int) -> Frame:
        color, depth_path = self._pairs[index]
        image, is_turned = load_image_and_orientation(color, stored=True)
        depth = read_depth(depth_path)
        height, width = image.shape[:2]
        if self._size not in ((None, None), (width, height)):
            raise SpearError(
                f"{color} has {width}×{height} pixels, the intrinsics are for "
                f"{self._size[0]}×{self._size[1]}. Give the intrinsics of images of this size."
            )
        depth_camera = self._get_depth_camera(depth_path, depth, (width, height))
        _check_camera_center(color, self._camera, (width, height))
        _check_camera_center(color, depth_camera, (depth.shape[1], depth.shape[0]))
        instances = self._read_instances(self._get_instances_path(color), height, width)
        names = {}
        if instances is not None and self._names is not None:
            names = self._names
        return Frame(
            image=image,
            depth=align_depth(depth, depth_camera, self._camera, height, width),
            instances=instances,
            names=names,
            intrinsics=self._camera,
            extrinsics=read_pose(self._get_pose_path(color)),
            source=str(color),
            is_turned=is_turned,
            is_measured=True,
        )

    def _get_pose_path(self, color: Path) -> Path:
        return self.folder / "pose" / f"{color.stem}.txt"

    def _get_instances_path(self, color: Path) -> Path:
        return self.folder / "instance-filt" / f"{color.stem}.png"

    def _get_depth_camera(self, path: Path, depth: Array, color_size: Size) -> Array:
        """The intrinsics [3, 3] of a depth image; in a plain folder it is the color image,
        resized."""
        if self._depth_camera is not None:
            return self._depth_camera
        width, height = color_size
        rows, columns = depth.shape
        if not have_same_aspect((height, width), (rows, columns)):
            raise SpearError(
                f"{path} has {columns}×{rows} pixels, its color image {width}×{height}. Register "
                "the depth to the color camera first."
            )
        return np.diag([columns / width, rows / height, 1.0]) @ self._camera

    def _read_instances(self, path: Path, height: int, width: int) -> Array | None:
        """The instance numbers [height, width] int32 of a frame, or None."""
        if self._names is None or not path.is_file():
            return None
        instances = _read_png(path)
        if not have_same_aspect((height, width), instances.shape):
            raise SpearError(
                f"{path} has the shape {instances.shape}, which is not that of the "
                f"{width}×{height} image. Replace it."
            )
        return resize_nearest(instances, height, width).astype(np.int32)


def _check_camera_center(image: Path, camera: Array, size: Size) -> None:
    """Raise `SpearError` where a camera [3, 3] looks like that of an image of another size."""
    center = camera[:2, 2]
    offset = np.abs(center / size - 0.5).max()
    offset_if_turned = np.abs(center / size[::-1] - 0.5).max()
    is_off_center = offset > min(MAX_CENTER_OFFSET, offset_if_turned + 0.05)
    is_shifted_both_ways = min(center / size) > 0.55 or max(center / size) < 0.45
    if is_off_center or is_shifted_both_ways:
        raise SpearError(
            f"{image} has {size[0]}×{size[1]} pixels, but the camera's center is at "
            f"{center.round()}. "
            "Give the intrinsics of images of this size."
        )


def align_depth(depth: Array, k_depth: Array, k_image: Array, height: int, width: int) -> Array:
    """Compute what one camera sees of the depth that another one in the same place has measured.

    Args:
        depth: [h, w] along z.
        k_depth: [3, 3] intrinsics of the depth camera (pixel centers at +0.5, without skew).
        k_image: [3, 3] intrinsics of the other one, which looks in the same direction.
        height: Height of the result in pixels.
        width: Width of the result in pixels.

    Returns:
        [height, width]: for each pixel the nearest one of `depth` on its ray, 0 where there is
        none.
    """
    rows = _project_pixel_centers(height, k_image[1, 1], k_image[1, 2], k_depth[1], 1)
    columns = _project_pixel_centers(width, k_image[0, 0], k_image[0, 2], k_depth[0], 0)
    padded = np.pad(depth, ((0, 1), (0, 1)))  # index -1: outside
    return padded[
        np.ix_(_mask_outside(rows, depth.shape[0]), _mask_outside(columns, depth.shape[1]))
    ]


def _project_pixel_centers(
    size: int, focal: float, center: float, other_camera: Array, axis: int
) -> Array:
    """Along one axis, in which pixel of another camera the center of each pixel is seen."""
    on_plane = (np.arange(size) + 0.5 - center) / focal
    return np.floor(on_plane * other_camera[axis] + other_camera[2]).astype(np.intp)


def _mask_outside(indices: Array, size: int) -> Array:
    return np.where((indices >= 0) & (indices < size), indices, -1)


def read_depth(path: Path) -> Array:
    """Read a 16-bit depth image.

    Returns:
        [h, w] float32 meters; 0 where the depth is unknown.

    Raises:
        SpearError: The file is no 16-bit PNG, or its unit is not millimeters.
    """
    steps = _read_png(path)
    if steps.dtype == np.uint8:
        raise SpearError(f"{path} has 8 bits per pixel, too few for depth. Give a 16-bit PNG.")
    steps = np.where(steps < UNKNOWN_DEPTH, steps, 0)
    if 0 < steps.max() * DEPTH_STEP_M < MIN_FARTHEST_DEPTH_M:
        raise SpearError(
            f"{path} shows nothing farther than {steps.max()} mm, so its unit may be meters. Give "
            "millimeters."
        )
    return steps.astype(np.float32) * np.float32(DEPTH_STEP_M)


def read_matrix(path: Path) -> Array:
    """Read a 3×3 or 4×4 matrix from a text file, one row per line.

    Raises:
        SpearError: There is no file, or it contains no such matrix.
    """
    try:
        matrix = np.loadtxt(read_utf8(path).decode().splitlines(), ndmin=2)
    except (OSError, ValueError) as error:
        raise SpearError(
            f"{path} contains no matrix ({error}). Give one row of numbers per line."
        ) from error
    if matrix.shape not in ((3, 3), (4, 4)):
        shape = "×".join(str(size) for size in matrix.shape)
        raise SpearError(f"{path} contains a matrix of {shape} numbers. Give 3×3 or 4×4 numbers.")
    return matrix


def read_intrinsics(path: Path) -> tuple[Array, tuple[object, object]]:
    """Read the intrinsics of a camera, for which the file has the first pixel's center at 0.

    Args:
        path: A text file with a matrix, or JSON.

    Returns:
        Intrinsics [3, 3] with pixel centers at +0.5; and the images' width and height, where JSON
        has them.

    Raises:
        SpearError: The intrinsics are missing or not in pixels.
    """
    size: tuple[object, object] = (None, None)
    if path.suffix == ".json":
        values = read_json(path, "give fx, fy, cx, cy in pixels")
        try:
            fx, fy, cx, cy = (float(values[key]) for key in ("fx", "fy", "cx", "cy"))
        except (KeyError, TypeError, ValueError) as error:
            raise SpearError(
                f"{path} contains no intrinsics ({error}). Give fx, fy, cx, cy in pixels."
            ) from error
        k = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
        size = (values.get("width"), values.get("height"))
    else:
        k = read_matrix(path)[:3, :3].copy()
    k[:2, 2] += 0.5
    is_in_pixels = np.isfinite(k).all() and min(k[0, 0], k[1, 1]) > 2
    if not is_in_pixels or not np.allclose(k[2], [0, 0, 1]):
        raise SpearError(
            f"{path} contains no intrinsics in pixels. Give [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]."
        )
    return k, size


def read_pose(path: Path) -> Array | None:
    """Read a pose [4, 4] from a text file.

    Returns:
        The pose; None when there is no file, or it says that the camera was lost.

    Raises:
        SpearError: The file contains something else.
    """
    if not path.is_file():
        return None
    pose = read_matrix(path)
    if not np.isfinite(pose).all():
        return None
    rotation = pose[:3, :3]
    is_orthogonal = np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-2)
    is_rigid = is_orthogonal and np.linalg.det(rotation) > 0
    if pose.shape != (4, 4) or not is_rigid:
        raise SpearError(
            f"{path} contains no pose. Give a rigid 4×4 transform from camera to world."
        )
    return pose


def _read_png(path: Path) -> Array:
    """One channel of whole numbers [h, w], as stored."""
    try:
        with Image.open(path) as image:
            values = np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise SpearError(f"{path} is not a readable PNG ({error}). Replace it.") from error
    if values.ndim != 2 or values.dtype.kind not in "iu":
        raise SpearError(
            f"{path} has pixels of {values.dtype} {values.shape}. Give one channel of integers."
        )
    return values


def _find_pairs(folder: Path) -> tuple[list[tuple[Path, Path]], int]:
    """Color and depth images of the same name, by number, then by name.

    Returns:
        The pairs, and how many color images have no depth image.
    """
    color = next((folder / name for name in COLOR_FOLDERS if (folder / name).is_dir()), None)
    if color is None or not (folder / "depth").is_dir():
        raise SpearError(
            f"{folder} is not an RGB-D scene, because it has no color/ or no depth/. Give both and "
            "intrinsics.txt, or a ScanNet scan."
        )
    depth_by_stem = {path.stem: path for path in (folder / "depth").glob("*.png")}
    images = [path for path in color.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
    pairs = [(path, depth_by_stem[path.stem]) for path in images if path.stem in depth_by_stem]
    if not pairs:
        raise SpearError(
            f"{folder} has no image in {color.name}/ with a depth PNG of its name in depth/. Name "
            "both alike."
        )
    _check_unique_stems([path for path, _ in pairs])
    pairs.sort(key=_get_number_and_name)
    return pairs, len(images) - len(pairs)


def _check_unique_stems(images: list[Path]) -> None:
    by_stem = {path.stem: path for path in images}
    for path in images:
        image_of_stem = by_stem[path.stem]
        if image_of_stem != path:
            raise SpearError(
                f"{path} and {image_of_stem.name} have the same depth image. Leave one of them out."
            )


def _get_number_and_name(pair: tuple[Path, Path]) -> tuple[int, str]:
    color, _ = pair
    number = int(color.stem) if color.stem.isdecimal() else -1
    return number, color.name


def _read_scannet_names(folder: Path) -> dict[int, str] | None:
    """Number in the instance images → name, from the scan's aggregation; None without one."""
    files = sorted(folder.glob("*.aggregation.json"), key=lambda path: len(path.name))
    if not files:
        return None
    content = read_json(files[0], "replace it")
    names = {}
    try:
        for group in content["segGroups"]:
            names[int(group["objectId"]) + 1] = str(group["label"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise SpearError(
            f"{files[0]} is not an aggregation of ScanNet ({error}). Replace it."
        ) from error
    return {number: name for number, name in names.items() if name not in STRUCTURE_NAMES}
