"""Frames with true depth from folders of colour and depth images: plain ones and ScanNet's.

Each reader is a sequence: `len(scene)`, `scene[i]` -> `Frame`, `scene.sources[i]`. A frame is read when it is
asked for; one that cannot be read is a `SpearError` that concerns no other. `hypersim` reads Hypersim's.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from spear.errors import SpearError
from spear.labels.fit.camera import unproject
from spear.labels.images import load_image
from spear.labels.models.annotations import load_json
from spear.types import Array, Frame

COLOUR_FOLDERS = ("color", "colour", "rgb", "image", "images")
STRUCTURE = frozenset({"wall", "floor", "ceiling"})
"""Parts of the room that are no objects: they keep their instance numbers but get no name (our choice)."""


class Scene(Protocol):
    """Frames that are read one at a time."""

    sources: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Frame: ...


def open_scene(folder: str | Path) -> Scene:
    """The reader that fits a folder: Hypersim's, ScanNet's, or depth PNGs with intrinsics.

    Raises:
        SpearError: none does, or the folder is incomplete.
    """
    path = Path(folder)
    if (path / "_detail").is_dir():
        from spear.labels.hypersim import HypersimScene

        return HypersimScene(path)
    if (path / "intrinsic").is_dir():
        return ScanNetScene(path)
    if (path / "depth").is_dir():
        return RgbdFolder(path)
    raise SpearError(
        f"{path}: no RGB-D scene here: give a folder with depth/, color/ and intrinsics.txt, an exported ScanNet "
        "scan, or a Hypersim scene"
    )


class _Pairs:
    """Colour images and depth PNGs of the same names, with poses: what plain folders and ScanNet's have in
    common."""

    def __init__(self, folder: str | Path, depth_unit: float) -> None:
        self.folder, self.depth_unit = Path(folder), depth_unit
        self._frames = _pairs(self.folder)
        self.sources = [str(color) for color, _ in self._frames]

    def __len__(self) -> int:
        return len(self._frames)

    def _frame(self, index: int, camera: Array, depth_camera: Array | None = None) -> Frame:
        """A frame with depth and pose; `depth_camera` None where both images show the same view."""
        color, depth_file = self._frames[index]
        image = load_image(color)
        height, width = image.shape[:2]
        depth = read_depth(depth_file, self.depth_unit)
        if depth_camera is None:
            rows, columns = depth.shape
            depth_camera = np.diag([columns / width, rows / height, 1.0]) @ camera
        return Frame(
            image=image,
            depth=align_depth(depth, depth_camera, camera, height, width),
            intrinsics=camera,
            extrinsics=read_pose(self.folder / "pose" / f"{color.stem}.txt"),
            source=str(color),
        )


class RgbdFolder(_Pairs):
    """A folder of colour images, depth PNGs of the same names, and the camera.

        color/NAME.jpg    or another image format, in one of `COLOUR_FOLDERS`
        depth/NAME.png    16 bits; 0 and 65535 are unknown
        intrinsics.txt    a 3×3 or 4×4 matrix in pixels of the colour image; or intrinsics.json with fx, fy,
                          cx, cy
        pose/NAME.txt     optional: 4×4, camera -> world, metres, the world's z up; camera x right, y down, z
                          forward

    Both images show the same view; the depth image may have fewer pixels.

    Args:
        folder: as above.
        depth_unit: metres per step of the depth images.
        pixel_centre: where the first pixel's centre is in the intrinsics' coordinates: 0 as in OpenCV, ROS
            and ScanNet, 0.5 as in this package.

    Raises:
        SpearError: a part is missing.
    """

    def __init__(self, folder: str | Path, depth_unit: float = 0.001, pixel_centre: float = 0.0) -> None:
        super().__init__(folder, depth_unit)
        self.pixel_centre = pixel_centre
        self._intrinsics = self._camera()

    def __getitem__(self, index: int) -> Frame:
        return self._frame(index, self._intrinsics)

    def _camera(self) -> Array:
        path = self.folder / "intrinsics.json"
        if not path.is_file():
            return read_intrinsics(self.folder / "intrinsics.txt", self.pixel_centre)
        values, _ = load_json(path, "intrinsics")
        try:
            fx, fy, cx, cy = (float(values[key]) for key in ("fx", "fy", "cx", "cy"))
        except (KeyError, TypeError, ValueError) as error:
            raise SpearError(f"{path}: not intrinsics ({error}): give fx, fy, cx, cy in pixels") from error
        shift = 0.5 - self.pixel_centre
        return _in_pixels(np.array([[fx, 0, cx + shift], [0, fy, cy + shift], [0, 0, 1]]), path)


class ScanNetScene(_Pairs):
    """A ScanNet scan as its own tools export it.

        color/N.jpg, depth/N.png    depth in millimetres, 0 unknown
        pose/N.txt                  4×4, camera -> world, metres; frames that were lost (-inf) have no
                                    extrinsics
        intrinsic/                  intrinsic_color.txt, intrinsic_depth.txt, extrinsic_*.txt
        instance-filt/N.png         optional: the number of the instance, 0 where there is none
        *.aggregation.json          with it: what the instances are called

    The depth image is laid over the colour image along the rays of the two cameras, which stand in one place.
    The calibration puts the first pixel's centre at 0 (its depth camera's centre is 319.5 of 640 pixels).

    Raises:
        SpearError: a part is missing, or the two cameras do not stand in one place.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder, depth_unit=0.001)
        camera = self.folder / "intrinsic"
        self._color = read_intrinsics(camera / "intrinsic_color.txt")
        self._depth = read_intrinsics(camera / "intrinsic_depth.txt")
        for name in ("extrinsic_color.txt", "extrinsic_depth.txt"):
            if (camera / name).is_file() and not np.allclose(
                read_matrix(camera / name), np.eye(4), atol=1e-4
            ):
                raise SpearError(
                    f"{camera / name}: not the identity: depth and colour must be registered to one camera first"
                )
        self._names = _scannet_names(self.folder)

    def __getitem__(self, index: int) -> Frame:
        frame = self._frame(index, self._color, self._depth)
        path = self.folder / "instance-filt" / f"{Path(frame.source).stem}.png"
        if self._names is None or not path.is_file():
            return frame
        instances = _nearest(_read_png(path), *frame.image.shape[:2]).astype(np.int32)
        return dataclasses.replace(frame, instances=instances, names=self._names)


def align_depth(depth: Array, k_depth: Array, k_image: Array, height: int, width: int) -> Array:
    """Depth seen by one camera, as another camera in the same place and direction sees it.

    Args:
        depth: [h, w] along z.
        k_depth: [3, 3] its camera, pixel centres at +0.5, without skew.
        k_image: [3, 3] the other camera.
        height, width: of the other camera's image.

    Returns:
        [height, width]: each pixel the nearest one of `depth` on its ray, 0 where that saw nothing of it.
    """
    rows = _matching(height, k_image[1], k_depth[1], 1, depth.shape[0])
    columns = _matching(width, k_image[0], k_depth[0], 0, depth.shape[1])
    padded = np.pad(depth, ((0, 1), (0, 1)))  # number -1: outside
    aligned: Array = padded[np.ix_(rows, columns)]
    return aligned


def _matching(size: int, image: Array, depth: Array, axis: int, most: int) -> Array:
    along = (np.arange(size) + 0.5 - image[2]) / image[axis] * depth[axis] + depth[2]
    number = np.floor(along).astype(np.intp)
    return np.where((number >= 0) & (number < most), number, -1)


def distance_to_depth(distance: Array, intrinsics: Array) -> Array:
    """Distance from the camera's centre, along the ray of each pixel, to depth along z; [h, w] both."""
    rays = unproject(np.ones(distance.shape), intrinsics)
    depth: Array = (distance / np.linalg.norm(rays, axis=-1)).astype(np.float32)
    return depth


def read_depth(path: Path, unit: float) -> Array:
    """A 16-bit depth PNG -> [h, w] float32 metres, `unit` metres per step; 0 and 65535 (unknown) become 0.

    Raises:
        SpearError: no such file, or not one channel of 16 bits.
    """
    steps = _read_png(path)
    if steps.dtype == np.uint8:
        raise SpearError(f"{path}: 8 bits are no depth: give a 16-bit PNG")
    return np.where(steps < 0xFFFF, steps, 0).astype(np.float32) * np.float32(unit)


def read_matrix(path: Path) -> Array:
    """A matrix from a text file, one row per line.

    Raises:
        SpearError: no such file, or not a square matrix of three or four rows.
    """
    try:
        matrix = np.loadtxt(path, ndmin=2)
    except OSError as error:
        raise SpearError(
            f"{path}: cannot read the matrix ({error.strerror or error}): add the file"
        ) from error
    except ValueError as error:
        raise SpearError(f"{path}: not a matrix ({error}): give one row of numbers per line") from error
    if matrix.shape not in ((3, 3), (4, 4)):
        raise SpearError(f"{path}: a matrix of {'×'.join(map(str, matrix.shape))}: give 3×3 or 4×4 numbers")
    return matrix


def read_intrinsics(path: Path, pixel_centre: float = 0.0) -> Array:
    """Intrinsics [3, 3] with pixel centres at +0.5, from a text file in which the first is at `pixel_centre`.

    Raises:
        SpearError: no such file, or not intrinsics in pixels.
    """
    k = read_matrix(path)[:3, :3].copy()
    k[:2, 2] += 0.5 - pixel_centre
    return _in_pixels(k, path)


def _in_pixels(k: Array, path: Path) -> Array:
    """Intrinsics [3, 3] as they are. Raises SpearError, naming their file, when they are not in pixels."""
    if not (np.isfinite(k).all() and min(k[0, 0], k[1, 1]) > 2 and np.allclose(k[2], [0, 0, 1])):
        raise SpearError(f"{path}: not intrinsics in pixels: give [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]")
    return k


def read_pose(path: Path) -> Array | None:
    """A pose [4, 4] from a text file; None when there is no file, or it says that the camera was lost.

    Raises:
        SpearError: a file that holds something else.
    """
    if not path.is_file():
        return None
    pose = read_matrix(path)
    if not np.isfinite(pose).all():
        return None
    turn = pose[:3, :3]
    if (
        pose.shape != (4, 4)
        or not np.allclose(turn @ turn.T, np.eye(3), atol=1e-2)
        or np.linalg.det(turn) < 0
    ):
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
            f"{path}: pixels are {values.dtype} {values.shape}: give one channel of whole numbers"
        )
    return values


def _nearest(values: Array, height: int, width: int) -> Array:
    rows = (np.arange(height) * values.shape[0] // height)[:, None]
    return values[rows, np.arange(width) * values.shape[1] // width]


def _pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Colour and depth files of the same name, by number, then by name."""
    color = next((folder / name for name in COLOUR_FOLDERS if (folder / name).is_dir()), None)
    if color is None or not (folder / "depth").is_dir():
        raise SpearError(f"{folder}: no color/ or no depth/ here: give a folder that has both")
    depths = {path.stem: path for path in (folder / "depth").glob("*.png")}
    pairs = [(path, depths[path.stem]) for path in color.iterdir() if path.stem in depths]
    if not pairs:
        raise SpearError(f"{folder}: no image in {color.name}/ has a depth PNG of its name in depth/")
    return sorted(
        pairs, key=lambda pair: (int(pair[0].stem) if pair[0].stem.isdecimal() else -1, pair[0].name)
    )


def _scannet_names(folder: Path) -> dict[int, str] | None:
    """Number in the instance images -> name, from the scan's aggregation; None without one."""
    files = sorted(folder.glob("*.aggregation.json"), key=lambda path: len(path.name))
    if not files:
        return None
    content, _ = load_json(files[0], "aggregation")
    try:
        names = {int(group["objectId"]) + 1: str(group["label"]) for group in content["segGroups"]}
    except (KeyError, TypeError, ValueError) as error:
        raise SpearError(f"{files[0]}: not an aggregation of ScanNet ({error}): replace it") from error
    return {number: name for number, name in names.items() if name not in STRUCTURE}
