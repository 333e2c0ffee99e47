"""Frames with true depth from folders of colour and depth images: plain ones and ScanNet's.

A plain folder. Both images show the same view; the depth image may have fewer pixels.

    color/NAME.jpg    or another image format, in one of `COLOUR_FOLDERS`; as stored, whatever its
    EXIF says depth/NAME.png    16 bits, millimetres along z; 0 and 65535 are unknown
    intrinsics.txt    a 3×3 or 4×4 matrix in pixels of the colour image, the first pixel's centre at
    0 (as in
                      OpenCV, ROS and ScanNet); or intrinsics.json with fx, fy, cx, cy
    pose/NAME.txt     optional: 4×4, camera → world, metres, world z up; camera x right, y down, z
    forward

A ScanNet scan as its own tools export it. The depth image is laid over the colour image along the
rays of the two cameras, which stand in one place.

    color/N.jpg, depth/N.png    depth in millimetres, 0 unknown
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
from spear.labels.inputs import IMAGE_SUFFIXES, compute_stamp
from spear.types import Array, Frame
from spear.util.files import read_json
from spear.util.images import load_image_and_orientation

COLOR_FOLDERS = ("color", "colour", "rgb", "image", "images")
STRUCTURE = frozenset({"wall", "floor", "ceiling"})
"""Parts of the room that are no objects: they keep their instance numbers but get no name (our
choice)."""
UNIT = 0.001
"""Metres per step of the depth images."""
NEAREST = 0.05
"""Metres that every scene reaches beyond: depth that does not is in another unit (our choice)."""


class RgbdScene:
    """The frames of a ScanNet scan or a plain folder: `scene[i]`, from `scene.sources[i]`. A frame
    is read when it is asked for, and a `SpearError` there concerns no other. alone: colour images
    without depth.

    Raises `SpearError` for a folder that is neither or incomplete, and for a scan of cameras in two
    places.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = path = Path(folder)
        self._pairs, self.alone = _pairs(path)
        self.sources = [str(color) for color, _ in self._pairs]
        self.depth_camera: Array | None = None  # both images show the same view
        self.names: dict[int, str] | None = None
        calibration = path / "intrinsic"
        if calibration.is_dir():
            for file in calibration.glob("extrinsic_*.txt"):
                if not np.allclose(read_matrix(file), np.eye(4), atol=1e-4):
                    raise SpearError(
                        f"{file}: not the identity: register depth and colour to one camera"
                    )
            self.camera, self.size = read_intrinsics(calibration / "intrinsic_color.txt")
            self.depth_camera, _ = read_intrinsics(calibration / "intrinsic_depth.txt")
            self.names = _scannet_names(path)
        else:
            file = path / "intrinsics.json"
            self.camera, self.size = read_intrinsics(
                file if file.is_file() else file.with_suffix(".txt")
            )

    def stamp(self, index: int) -> str:
        """The stamp of a frame's files and a checksum of its camera and of the names of objects."""
        stem = self._pairs[index][0].stem
        others = self.folder / "pose" / f"{stem}.txt", self.folder / "instance-filt" / f"{stem}.png"
        files = (*self._pairs[index], *filter(Path.is_file, others))
        checksum = zlib.crc32(repr((self.camera, self.depth_camera, self.names)).encode())
        return f"{checksum} {compute_stamp(*files)}"

    def __getitem__(self, index: int) -> Frame:
        color, depth_file = self._pairs[index]
        (image, turned), depth = (
            load_image_and_orientation(color, stored=True),
            read_depth(depth_file),
        )
        (height, width), (rows, columns) = image.shape[:2], depth.shape
        if self.size not in ((None, None), (width, height)):
            what = f"{width}×{height} pixels, the intrinsics are of {self.size[0]}×{self.size[1]}"
            raise SpearError(f"{color}: {what}: give the intrinsics of images of this size")
        depth_camera = self.depth_camera
        if depth_camera is None:
            if not have_same_aspect(image.shape[:2], depth.shape):
                what = f"{columns}×{rows} depth, {width}×{height} color"
                raise SpearError(
                    f"{depth_file}: {what}: register the depth to the color camera first"
                )
            depth_camera = np.diag([columns / width, rows / height, 1.0]) @ self.camera
        for centre, size in (
            (self.camera[:2, 2], (width, height)),
            (depth_camera[:2, 2], (columns, rows)),
        ):
            off, upright = (np.abs(centre / sides - 0.5).max() for sides in (size, size[::-1]))
            if (
                off > min(0.15, upright + 0.05)
                or min(centre / size) > 0.55
                or max(centre / size) < 0.45
            ):
                what = f"{size[0]}×{size[1]} pixels, and the camera's centre at {centre.round()}"
                raise SpearError(f"{color}: {what}: give the intrinsics of images of this size")
        path, instances = self.folder / "instance-filt" / f"{color.stem}.png", None
        if self.names is not None and path.is_file():
            instances = _read_png(path)
            if not have_same_aspect(image.shape[:2], instances.shape):
                raise SpearError(
                    f"{path}: {instances.shape}, not of the {width}×{height} image: replace it"
                )
            instances = resize_nearest(instances, height, width).astype(np.int32)
        return Frame(
            image=image,
            depth=align_depth(depth, depth_camera, self.camera, height, width),
            instances=instances,
            names=self.names or {} if instances is not None else {},
            intrinsics=self.camera,
            extrinsics=read_pose(self.folder / "pose" / f"{color.stem}.txt"),
            source=str(color),
            is_turned=turned,
            is_measured=True,
        )


def align_depth(depth: Array, k_depth: Array, k_image: Array, height: int, width: int) -> Array:
    """Depth [h, w] along z, seen by the camera `k_depth` [3, 3] (pixel centres at +0.5, without
    skew), as the camera `k_image` in the same place and direction sees it.

    Returns [height, width]: each pixel the nearest one of `depth` on its ray, 0 where that saw
    nothing of it.
    """
    chosen = []
    for axis, size, most in ((1, height, depth.shape[0]), (0, width, depth.shape[1])):
        image, seen = k_image[axis], k_depth[axis]
        along = (np.arange(size) + 0.5 - image[2]) / image[axis] * seen[axis] + seen[2]
        number = np.floor(along).astype(np.intp)
        chosen.append(np.where((number >= 0) & (number < most), number, -1))
    padded = np.pad(depth, ((0, 1), (0, 1)))  # number -1: outside
    return padded[np.ix_(*chosen)]


def read_depth(path: Path) -> Array:
    """A 16-bit depth PNG → [h, w] float32 metres; 0 and 65535 (unknown) become 0; else
    `SpearError`."""
    steps = _read_png(path)
    if steps.dtype == np.uint8:
        raise SpearError(f"{path}: 8 bits are no depth: give a 16-bit PNG")
    steps = np.where(steps < 0xFFFF, steps, 0)
    if 0 < steps.max() * UNIT < NEAREST:
        raise SpearError(
            f"{path}: nothing is farther than {steps.max()} mm: metres? give millimetres"
        )
    return steps.astype(np.float32) * np.float32(UNIT)


def read_matrix(path: Path) -> Array:
    """A 3×3 or 4×4 matrix from a text file, one row per line; `SpearError` for another or no
    file."""
    try:
        matrix = np.loadtxt(path, ndmin=2)
    except (OSError, ValueError) as error:
        raise SpearError(
            f"{path}: no matrix ({error}): give one row of numbers per line"
        ) from error
    if matrix.shape not in ((3, 3), (4, 4)):
        raise SpearError(
            f"{path}: a matrix of {'×'.join(map(str, matrix.shape))}: give 3×3 or 4×4 numbers"
        )
    return matrix


def read_intrinsics(path: Path) -> tuple[Array, tuple[object, object]]:
    """Intrinsics [3, 3] with pixel centres at +0.5, from a file in which the first pixel's centre
    is at 0: a text file with a matrix, or JSON; and the images' width and height, where JSON says
    them. `SpearError` where they are missing or not in pixels."""
    size: tuple[object, object] = None, None
    if path.suffix == ".json":
        values = read_json(path, "give fx, fy, cx, cy in pixels")
        try:
            fx, fy, cx, cy = (float(values[key]) for key in ("fx", "fy", "cx", "cy"))
        except (KeyError, TypeError, ValueError) as error:
            raise SpearError(
                f"{path}: not intrinsics ({error}): give fx, fy, cx, cy in pixels"
            ) from error
        k, size = (
            np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]),
            (values.get("width"), values.get("height")),
        )
    else:
        k = read_matrix(path)[:3, :3].copy()
    k[:2, 2] += 0.5
    if not (np.isfinite(k).all() and min(k[0, 0], k[1, 1]) > 2 and np.allclose(k[2], [0, 0, 1])):
        raise SpearError(
            f"{path}: not intrinsics in pixels: give [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]"
        )
    return k, size


def read_pose(path: Path) -> Array | None:
    """A pose [4, 4] from a text file; None when there is no file, or it says that the camera was
    lost. `SpearError` for anything else."""
    pose = read_matrix(path) if path.is_file() else None
    if pose is None or not np.isfinite(pose).all():
        return None
    turn = pose[:3, :3]
    rigid = np.allclose(turn @ turn.T, np.eye(3), atol=1e-2) and np.linalg.det(turn) > 0
    if pose.shape != (4, 4) or not rigid:
        raise SpearError(f"{path}: not a pose: give a rigid 4×4 transform, camera to world")
    return pose


def _read_png(path: Path) -> Array:
    """One channel of whole numbers [h, w], as stored."""
    try:
        with Image.open(path) as image:
            values = np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise SpearError(f"{path}: not a readable PNG ({error}): replace it") from error
    if values.ndim != 2 or values.dtype.kind not in "iu":
        raise SpearError(
            f"{path}: pixels are {values.dtype} {values.shape}: give one channel of integers"
        )
    return values


def _pairs(folder: Path) -> tuple[list[tuple[Path, Path]], int]:
    """Colour and depth files of the same name, by number, then by name; how many colour files have
    none."""
    color = next((folder / name for name in COLOR_FOLDERS if (folder / name).is_dir()), None)
    if color is None or not (folder / "depth").is_dir():
        what = "no RGB-D scene (no color/ or no depth/)"
        raise SpearError(f"{folder}: {what}: give both and intrinsics.txt, or a ScanNet scan")
    depths = {path.stem: path for path in (folder / "depth").glob("*.png")}
    images = [path for path in color.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
    if not (pairs := [(path, depths[path.stem]) for path in images if path.stem in depths]):
        raise SpearError(
            f"{folder}: no image in {color.name}/ has a depth PNG of its name in depth/"
        )
    last = {path.stem: path for path, _ in pairs}
    if twice := next((path for path, _ in pairs if last[path.stem] != path), None):
        raise SpearError(
            f"{twice}: {last[twice.stem].name} has the same depth image: leave one of them out"
        )
    pairs.sort(key=lambda p: (int(p[0].stem) if p[0].stem.isdecimal() else -1, p[0].name))
    return pairs, len(images) - len(pairs)


def _scannet_names(folder: Path) -> dict[int, str] | None:
    """Number in the instance images → name, from the scan's aggregation; None without one."""
    files = sorted(folder.glob("*.aggregation.json"), key=lambda path: len(path.name))
    if not files:
        return None
    content = read_json(files[0], "replace it")
    try:
        names = {int(group["objectId"]) + 1: str(group["label"]) for group in content["segGroups"]}
    except (KeyError, TypeError, ValueError) as error:
        raise SpearError(
            f"{files[0]}: not an aggregation of ScanNet ({error}): replace it"
        ) from error
    return {number: name for number, name in names.items() if name not in STRUCTURE}
