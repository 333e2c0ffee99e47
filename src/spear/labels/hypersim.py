"""Frames with true depth, instances and 3D boxes from a scene of Hypersim.

    SCENE/_detail/metadata_scene.csv                                    metres per asset unit
    SCENE/_detail/cam_XX/camera_keyframe_{orientations,positions,frame_indices}.hdf5
    SCENE/_detail/mesh/metadata_semantic_instance_bounding_box_object_aligned_2d_{extents,orientations,positions}.hdf5
    SCENE/images/scene_cam_XX_final_preview/frame.IIII.tonemap.jpg
    SCENE/images/scene_cam_XX_geometry_hdf5/frame.IIII.{depth_meters,semantic,semantic_instance}.hdf5

Hypersim's depth is the distance from the camera's centre, its positions are in asset units, and its cameras
look along
-z with y up; frames come out as this package has them.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from spear.errors import SpearError
from spear.labels.fit.box3d import SIGNS
from spear.labels.images import load_image
from spear.labels.rgbd import STRUCTURE, distance_to_depth
from spear.types import Array, Frame

FIELD_OF_VIEW = np.radians(60.0)
"""Horizontal, of most scenes."""

TO_OPENCV = np.diag([1.0, -1.0, -1.0])
"""Between cameras with y up, looking along -z, and ours."""

NYU40 = (
    "wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture", "counter",
    "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror", "floor mat", "clothes", "ceiling", "books",
    "refrigerator", "television", "paper", "towel", "shower curtain", "box", "whiteboard", "person", "night stand",
    "toilet", "sink", "lamp", "bathtub", "bag",
)  # fmt: skip
"""Names of the semantic labels 1 to 37; 38 to 40 are "other" things, which have no name."""

_BOXES = "metadata_semantic_instance_bounding_box_object_aligned_2d_{}.hdf5"


class HypersimScene:
    """The frames of all cameras of a scene, in order.

    Args:
        folder: the scene, `ai_VVV_NNN`.
        cameras: `metadata_camera_parameters.csv` of the dataset's repository, for scenes whose lens is
            shifted; by default the one beside the scene, and without one a pinhole of `FIELD_OF_VIEW`.

    Raises:
        SpearError: a part is missing or broken, the lens is tilted (no pinhole camera), or h5py is not
            installed.
    """

    def __init__(self, folder: str | Path, cameras: str | Path | None = None) -> None:
        self.folder = Path(folder)
        self._metres = _metres_per_unit(self.folder / "_detail" / "metadata_scene.csv")
        beside = self.folder.parent / "metadata_camera_parameters.csv"
        table = Path(cameras) if cameras is not None else beside if beside.is_file() else None
        self._rays = None if table is None else _ray_matrix(table, self.folder.name)
        files = self.folder.glob("images/scene_cam_*_final_preview/frame.*.tonemap.jpg")
        self._images = sorted(files)
        if not self._images:
            raise SpearError(
                f"{self.folder}: no images/scene_cam_*_final_preview/frame.*.tonemap.jpg: download them"
            )
        self.sources = [str(path) for path in self._images]
        mesh = self.folder / "_detail" / "mesh"
        self._boxes = None
        if (mesh / _BOXES.format("extents")).is_file():
            kinds = ("positions", "orientations", "extents")
            self._boxes = [_read(mesh / _BOXES.format(kind)) for kind in kinds]
        self._poses: dict[str, dict[int, Array]] = {}

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Frame:
        path = self._images[index]
        camera = path.parent.name.removeprefix("scene_").removesuffix("_final_preview")
        number = path.name.split(".")[1]
        image = load_image(path)
        height, width = image.shape[:2]
        intrinsics = self._intrinsics(height, width)
        geometry = self.folder / "images" / f"scene_{camera}_geometry_hdf5"
        distance = _read(geometry / f"frame.{number}.depth_meters.hdf5").astype(np.float32)
        if distance.shape != (height, width):
            raise SpearError(
                f"{path}: depth is {distance.shape[1]}×{distance.shape[0]}, not {width}×{height}"
            )
        pose = self._pose(camera, int(number), path)
        instances, names = _instances(geometry, number)
        return Frame(
            image=image,
            depth=distance_to_depth(np.nan_to_num(distance, posinf=0.0), intrinsics),
            instances=instances,
            names=names,
            intrinsics=intrinsics,
            extrinsics=pose,
            boxes=None if instances is None else self._boxes_in(pose, names),
            source=str(path),
        )

    def _intrinsics(self, height: int, width: int) -> Array:
        if self._rays is None:
            focal = width / 2 / np.tan(FIELD_OF_VIEW / 2)
            return np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
        uv_from_pixel = np.array(
            [[2 / width, 0, -1], [0, -2 / height, 1], [0, 0, 1]]
        )  # u right, v up, -1 … 1
        k = np.linalg.inv(TO_OPENCV @ self._rays @ uv_from_pixel)
        k /= k[2, 2]
        if not np.allclose(k[2, :2] * max(height, width), 0, atol=1e-3):
            raise SpearError(
                f"{self.folder}: its lens is tilted, which no pinhole camera can follow: leave it out"
            )
        return k

    def _pose(self, camera: str, number: int, path: Path) -> Array:
        """Camera -> world [4, 4], metres."""
        if camera not in self._poses:
            folder = self.folder / "_detail" / camera
            kinds = ("frame_indices", "orientations", "positions")
            frames, turns, places = (_read(folder / f"camera_keyframe_{kind}.hdf5") for kind in kinds)
            poses = np.tile(np.eye(4), (len(frames), 1, 1))
            poses[:, :3, :3] = turns @ TO_OPENCV
            poses[:, :3, 3] = places * self._metres
            self._poses[camera] = dict(zip(frames.astype(int).tolist(), poses, strict=True))
        if number not in self._poses[camera]:
            raise SpearError(
                f"{path}: frame {number} has no pose in _detail/{camera}: download that folder again"
            )
        return self._poses[camera][number]

    def _boxes_in(self, pose: Array, names: dict[int, str]) -> dict[int, Array] | None:
        """Instance -> vertices [8, 3], camera frame, metres, of the named instances."""
        if self._boxes is None:
            return None
        places, turns, sizes = self._boxes
        boxes = {}
        for instance in names:
            if instance < len(sizes) and np.isfinite(sizes[instance]).all() and sizes[instance].min() > 0:
                corners = places[instance] + (SIGNS * sizes[instance] / 2) @ turns[instance].T
                boxes[instance] = (corners * self._metres - pose[:3, 3]) @ pose[:3, :3]
        return boxes


def _instances(geometry: Path, number: str) -> tuple[Array | None, dict[int, str]]:
    """The instance image [h, w] int32 (0 where there is none) and the names; None when it was not
    downloaded."""
    path = geometry / f"frame.{number}.semantic_instance.hdf5"
    if not path.is_file():
        return None, {}
    instances = np.maximum(_read(path).astype(np.int32), 0)
    labels = _read(geometry / f"frame.{number}.semantic.hdf5").astype(np.int32)
    names = {}
    for instance in np.unique(instances[instances > 0]).tolist():
        label = int(np.bincount(np.maximum(labels[instances == instance], 0)).argmax())
        if 0 < label <= len(NYU40) and NYU40[label - 1] not in STRUCTURE:
            names[instance] = NYU40[label - 1]
    return instances, names


def _metres_per_unit(path: Path) -> float:
    for row in _rows(path):
        if row.get("parameter_name") == "meters_per_asset_unit":
            try:
                return float(row["parameter_value"])
            except ValueError as error:
                raise SpearError(f"{path}: meters_per_asset_unit is no number: download it again") from error
    raise SpearError(f"{path}: no meters_per_asset_unit: download it again")


def _ray_matrix(path: Path, scene: str) -> Array:
    """[3, 3] image coordinates (u, v, 1) in -1 … 1, v up -> rays, camera frame of Hypersim."""
    for row in _rows(path):
        if row.get("scene_name") == scene:
            try:
                return np.array([[float(row[f"M_cam_from_uv_{i}{j}"]) for j in range(3)] for i in range(3)])
            except (KeyError, ValueError) as error:
                raise SpearError(
                    f"{path}: no M_cam_from_uv for {scene} ({error}): download it again"
                ) from error
    raise SpearError(f"{path}: no scene {scene}: give the table of the dataset's repository")


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="") as file:
            return [
                {k.strip(): (v or "").strip() for k, v in row.items() if k} for row in csv.DictReader(file)
            ]
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise SpearError(f"{path}: cannot read the table ({error}): download it again") from error


def _read(path: Path) -> Array:
    """The array in one of the dataset's HDF5 files."""
    try:
        import h5py
    except ImportError as error:
        raise SpearError('Hypersim needs h5py: pip install "spear-vla[label]"') from error
    try:
        with h5py.File(path, "r") as file:
            dataset: Any = file["dataset"]
            return np.asarray(dataset)
    except (OSError, KeyError, AttributeError) as error:
        raise SpearError(f"{path}: cannot read it ({error}): download it again") from error
