"""Frames with measured depth, read from folders of color and depth images.

Two kinds of folders are read: plain ones and scans of ScanNet.

In a plain folder, color image and depth image show the same view. The depth image may have fewer
pixels. The files are:

    color/NAME.jpg    color image, also in other image formats and in any of `COLOR_FOLDERS`;
                      used as stored, without turning it as its EXIF data say
    depth/NAME.png    depth image of 16 bits, millimeters along z; 0 and 65535 are unknown
    intrinsics.txt    3×3 or 4×4 matrix in pixels of the color image, with the first pixel's
                      center at 0 (as in OpenCV, ROS and ScanNet);
                      or intrinsics.json with fx, fy, cx, cy
    pose/NAME.txt     optional: 4×4 matrix from camera to world, meters;
                      camera x right, y down, z forward; world z up

In a scan of ScanNet, as its own tools export it, the two cameras have different intrinsics but the
same position and direction. So depth is mapped to the color image along the rays of the cameras.
The files are:

    color/N.jpg, depth/N.png    depth in millimeters, 0 unknown
    pose/N.txt                  as above, but -inf in frames whose pose ScanNet could not track;
                                these frames have no extrinsics
    intrinsic/                  intrinsic_color.txt, intrinsic_depth.txt, extrinsic_*.txt
    instance-filt/N.png         optional: the number of each pixel's instance, 0 where there is none
    *.aggregation.json          the names of the instances
"""

import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from spear.errors import SpearError
from spear.labels.fit.image import have_same_aspect, resize_nearest
from spear.labels.inputs import make_file_stamp
from spear.types import Array, Frame, WidthAndHeight
from spear.util.files import read_json
from spear.util.images import IMAGE_SUFFIXES, check_num_pixels, load_image_and_is_turned_invisibly
from spear.util.json_text import read_utf8_bytes

COLOR_FOLDERS = ("color", "colour", "rgb", "image", "images")
STRUCTURE_NAMES = frozenset({"wall", "floor", "ceiling"})
"""Instances with these names are parts of the room and no objects. They keep their instance numbers
but get no name (our choice)."""
DEPTH_STEP_M = 0.001  # the depth that a pixel value of 1 stands for
UNKNOWN_DEPTH = 0xFFFF  # this pixel value means unknown depth, like 0
MIN_FARTHEST_DEPTH_M = 0.05
"""Every scene reaches farther than this. A depth image that does not is in a unit other than
millimeters (our choice)."""
MAX_CENTER_OFFSET = 0.15
"""Largest distance of the principal point from the center of the image, as a fraction of the
image's size (our choice)."""

StatedSize = tuple[object, object]
"""Width and height of an image as a file states them; (None, None) if it does not."""


class RgbdScene:
    """The frames of a ScanNet scan or a plain folder: `scene[i]` is read from `scene.sources[i]`.

    A frame is read when you index the scene, so a frame that cannot be read does not affect others.

    Attributes:
        folder: The folder of the scan, or the plain folder.
        sources: The path of each frame's color image.
        num_without_depth: How many color images have no depth image.

    Raises:
        SpearError: The folder is of neither kind or incomplete, or the two cameras of a scan have
            different positions or directions.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._pairs, self.num_without_depth = _list_pairs_and_count_unpaired(self.folder)
        self.sources = [str(color) for color, _ in self._pairs]
        # `_camera` is [3, 3], the intrinsics of the color camera; `_size` is the (width, height) of
        # its images, or (None, None) if the file does not contain them. Only scans have a depth
        # camera with intrinsics of its own, and names of instances by number.
        self._depth_camera: Array | None = None
        self._names: dict[int, str] | None = None
        calibration = self.folder / "intrinsic"
        if calibration.is_dir():
            for file in calibration.glob("extrinsic_*.txt"):
                if not np.allclose(read_matrix(file), np.eye(4), atol=1e-4):
                    raise SpearError(
                        f"{file} is not the identity matrix. Register depth and color to one "
                        "camera."
                    )
            self._camera, self._size = read_intrinsics_and_size(calibration / "intrinsic_color.txt")
            self._depth_camera, _ = read_intrinsics_and_size(calibration / "intrinsic_depth.txt")
            self._names = _read_scannet_instance_names(self.folder)
        else:
            file = self.folder / "intrinsics.json"
            if not file.is_file():
                file = self.folder / "intrinsics.txt"
            self._camera, self._size = read_intrinsics_and_size(file)

    def make_file_stamp(self, index: int) -> str:
        """The stamp of a frame's files, after a checksum of the scene's calibration.

        The checksum also covers the names of the instances.
        """
        color, depth = self._pairs[index]
        pose = self._get_pose_path(color)
        instances = self._get_instances_path(color)
        optional_files = [path for path in (pose, instances) if path.is_file()]
        files = [color, depth, *optional_files]
        calibration = repr((self._camera, self._depth_camera, self._names))
        return f"{zlib.crc32(calibration.encode())} {make_file_stamp(*files)}"

    def __getitem__(self, index: int) -> Frame:
        color, depth_path = self._pairs[index]
        image, is_turned = load_image_and_is_turned_invisibly(color, keep_stored_orientation=True)
        depth = read_depth(depth_path)
        height, width = image.shape[:2]
        if self._size not in ((None, None), (width, height)):
            raise SpearError(
                f"{color} has {width}×{height} pixels, the intrinsics are for "
                f"{self._size[0]}×{self._size[1]}. Give the intrinsics of images of this size."
            )
        depth_camera = self._get_depth_intrinsics(depth_path, depth, (width, height))
        _check_intrinsics_fit_image_size(color, self._camera, (width, height))
        _check_intrinsics_fit_image_size(color, depth_camera, (depth.shape[1], depth.shape[0]))
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

    def _get_depth_intrinsics(self, path: Path, depth: Array, color_size: WidthAndHeight) -> Array:
        """The intrinsics [3, 3] of the depth camera, in pixels of the depth image.

        In a plain folder there is one camera, whose intrinsics are scaled from the size of the
        color image to that of the depth image.

        Args:
            path: The depth image's path, for the error message.
            depth: [rows, columns] the depth image.
            color_size: Width and height of the color image.
        """
        if self._depth_camera is not None:
            return self._depth_camera
        width, height = color_size
        rows, columns = depth.shape
        if not have_same_aspect((height, width), (rows, columns)):
            raise SpearError(
                f"{path} has {columns}×{rows} pixels, its color image {width}×{height}. Register "
                "the depth to the color camera first."
            )
        scale = np.diag([columns / width, rows / height, 1.0])
        return scale @ self._camera

    def _read_instances(self, path: Path, height: int, width: int) -> Array | None:
        """The instance numbers [height, width] int32 of a frame; None if the scan has none."""
        if self._names is None or not path.is_file():
            return None
        instances = _read_png(path)
        if not have_same_aspect((height, width), instances.shape):
            raise SpearError(
                f"{path} has the shape {instances.shape}, which is not that of the "
                f"{width}×{height} image. Replace it."
            )
        return resize_nearest(instances, height, width).astype(np.int32)


def _check_intrinsics_fit_image_size(image_path: Path, camera: Array, size: WidthAndHeight) -> None:
    """Raise `SpearError` if intrinsics seem to belong to images of another size.

    Args:
        image_path: The image's path, for the error message.
        camera: [3, 3] intrinsics in pixels.
        size: Width and height of the image.
    """
    center = camera[:2, 2]  # the principal point in pixels
    relative_center = center / size  # near (0.5, 0.5) if the intrinsics belong to the image
    offset = np.abs(relative_center - 0.5).max()
    # The offset in an image turned by 90°. If this is clearly smaller, the intrinsics belong to the
    # turned image.
    offset_if_turned = np.abs(center / size[::-1] - 0.5).max()
    # The limits here, 0.05 on either side, are our choice.
    is_off_center = offset > min(MAX_CENTER_OFFSET, offset_if_turned + 0.05)
    # Intrinsics for a larger image shift the center right and down, for a smaller one left and up.
    is_shifted_both_ways = min(relative_center) > 0.55 or max(relative_center) < 0.45
    if is_off_center or is_shifted_both_ways:
        raise SpearError(
            f"{image_path} has {size[0]}×{size[1]} pixels, but the camera's center is at "
            f"{center.round()}. Give the intrinsics of images of this size."
        )


def align_depth(depth: Array, k_depth: Array, k_image: Array, height: int, width: int) -> Array:
    """Map a depth image to a color camera with the same position and direction.

    Because both cameras have the same position and direction, a ray has the same depth in both, and
    rows and columns are mapped independently of each other.

    Args:
        depth: [h, w] along z.
        k_depth: [3, 3] intrinsics of the depth camera (pixel centers at +0.5, without skew).
        k_image: [3, 3] intrinsics of the color camera (likewise).
        height: Height of the color image in pixels.
        width: Width of the color image in pixels.

    Returns:
        [height, width]: for each pixel of the color image the value of the pixel of `depth` on its
        ray; 0 where the ray is outside the depth image.
    """
    rows = _map_color_to_depth_indices(height, k_image, k_depth, xy_index=1)  # [height]
    columns = _map_color_to_depth_indices(width, k_image, k_depth, xy_index=0)  # [width]
    rows = _replace_outside_by_minus_1(rows, depth.shape[0])
    columns = _replace_outside_by_minus_1(columns, depth.shape[1])
    padded = np.pad(depth, ((0, 1), (0, 1)))  # index -1 is the padding, which is 0
    return padded[np.ix_(rows, columns)]


def _map_color_to_depth_indices(
    num_color_pixels: int, k_image: Array, k_depth: Array, xy_index: int
) -> Array:
    """Map the columns or rows of a color image to those of a depth image.

    Args:
        num_color_pixels: Number of columns (or rows) of the color image.
        k_image: [3, 3] intrinsics of the color camera.
        k_depth: [3, 3] intrinsics of the depth camera.
        xy_index: 0 for columns (x), 1 for rows (y).

    Returns:
        [size] column (or row) of the depth image that sees the center of each pixel.
    """
    pixel_centers = np.arange(num_color_pixels) + 0.5
    i = xy_index
    at_depth_1 = (pixel_centers - k_image[i, 2]) / k_image[i, i]  # camera frame
    in_depth_image = at_depth_1 * k_depth[i, i] + k_depth[i, 2]
    return np.floor(in_depth_image).astype(np.intp)


def _replace_outside_by_minus_1(indices: Array, size: int) -> Array:
    """Replace indices outside 0 … size - 1 by -1."""
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
    steps = np.where(steps < UNKNOWN_DEPTH, steps, 0)  # unknown depth becomes 0
    if 0 < steps.max() * DEPTH_STEP_M < MIN_FARTHEST_DEPTH_M:
        raise SpearError(
            f"{path} shows nothing farther than {steps.max()} mm, so its unit may be meters. Give "
            "millimeters."
        )
    return steps.astype(np.float32) * np.float32(DEPTH_STEP_M)


def read_matrix(path: Path) -> Array:
    """Read a 3×3 or 4×4 matrix from a text file, one row per line.

    Raises:
        SpearError: The file does not exist or contains no such matrix.
    """
    try:
        matrix = np.loadtxt(read_utf8_bytes(path).decode().splitlines(), ndmin=2)
    except (OSError, ValueError) as error:
        raise SpearError(
            f"{path} contains no matrix ({error}). Give one row of numbers per line."
        ) from error
    if matrix.shape not in ((3, 3), (4, 4)):
        shape = "×".join(str(size) for size in matrix.shape)
        raise SpearError(f"{path} contains a matrix of {shape} numbers. Give 3×3 or 4×4 numbers.")
    return matrix


def read_intrinsics_and_size(path: Path) -> tuple[Array, StatedSize]:
    """Read the intrinsics of a camera, and the size of its images.

    In the file the first pixel's center is at 0. In the result it is at 0.5.

    Args:
        path: A text file with a matrix, or JSON with fx, fy, cx and cy in pixels.

    Returns:
        The intrinsics [3, 3]; and the width and height of the images.

    Raises:
        SpearError: The intrinsics are missing or not in pixels.
    """
    size: StatedSize = (None, None)
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
    k[:2, 2] += 0.5  # move the origin from the first pixel's center to its corner
    # A focal length of 2 or less is in other units, such as fractions of the image's size.
    is_in_pixels = np.isfinite(k).all() and min(k[0, 0], k[1, 1]) > 2
    if not is_in_pixels or not np.allclose(k[2], [0, 0, 1]):
        raise SpearError(
            f"{path} contains no intrinsics in pixels. Give [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]."
        )
    return k, size


def read_pose(path: Path) -> Array | None:
    """Read a pose [4, 4] from a text file.

    Returns:
        The pose; None if there is no file, or if the pose is unknown (not finite).

    Raises:
        SpearError: The file contains no rigid transform.
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
    """Read a PNG with one channel of integers, as [h, w] of the stored type."""
    try:
        with Image.open(path) as image:
            check_num_pixels(image, str(path))
            values = np.asarray(image)
    except SpearError:
        raise
    except Exception as error:  # decoders raise errors of many types for broken files
        raise SpearError(f"{path} is not a readable PNG ({error}). Replace it.") from error
    if values.ndim != 2 or values.dtype.kind not in "iu":
        raise SpearError(
            f"{path} has pixels of {values.dtype} {values.shape}. Give one channel of integers."
        )
    return values


def _list_pairs_and_count_unpaired(folder: Path) -> tuple[list[tuple[Path, Path]], int]:
    """Find the color and depth images that have the same name.

    Returns:
        The pairs (color, depth), sorted by the number that is their name, then by name; and how
        many color images have no depth image.
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
    """Raise `SpearError` if two color images (1.jpg and 1.png) belong to one depth image."""
    by_stem = {path.stem: path for path in images}
    for path in images:
        image_of_stem = by_stem[path.stem]
        if image_of_stem != path:
            raise SpearError(
                f"{path} and {image_of_stem.name} have the same depth image. Leave one of them out."
            )


def _get_number_and_name(pair: tuple[Path, Path]) -> tuple[int, str]:
    """The key by which pairs are sorted: 2.jpg comes before 10.jpg, other names come first."""
    color, _ = pair
    number = int(color.stem) if color.stem.isdecimal() else -1
    return number, color.name


def _read_scannet_instance_names(folder: Path) -> dict[int, str] | None:
    """Read the names of a scan's instances from its aggregation file.

    Returns:
        The number of each instance in the instance images → its name; None if there is no
        aggregation file. Parts of the room (`STRUCTURE_NAMES`) are left out.
    """
    # A scan may have several aggregations, such as NAME_vh_clean.aggregation.json. The shortest
    # name is the scan's own.
    files = sorted(folder.glob("*.aggregation.json"), key=lambda path: len(path.name))
    if not files:
        return None
    content = read_json(files[0], "replace it")
    names = {}
    try:
        for group in content["segGroups"]:
            number = int(group["objectId"]) + 1  # 0 is the background of the instance images
            names[number] = str(group["label"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise SpearError(
            f"{files[0]} is not an aggregation of ScanNet ({error}). Replace it."
        ) from error
    return {number: name for number, name in names.items() if name not in STRUCTURE_NAMES}
