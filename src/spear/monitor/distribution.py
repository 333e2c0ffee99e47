"""The training distribution summary (`seen.json`), with which the drift monitor compares
observations.

A *thumbnail* is the brightness of one image in 8 x 8 cells, with mean 0 and length 1, so that the
scalar product of two thumbnails is the correlation of their images.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field, TypeAdapter

from spear.checks.gripper import are_opposite
from spear.data.mixture import TrainingSamples
from spear.geometry import quat_distance
from spear.types import Array
from spear.util.files import read_json_as, write_text

NUM_SAMPLES = 512  # at least this many steps are summarized, in the order in which training draws
THUMBNAIL_SIZE = 8  # rows and columns of a thumbnail
# The policy relies on a camera if more than this share of the steps has its image.
MIN_USUAL_CAMERA_SHARE = 0.95

VIEW_TRANSFORMS = {
    "turned by 180°": (-1, -1),
    "flipped left to right": (1, -1),
    "flipped upside down": (-1, 1),
}
"""How an image may be transformed by mistake: name → steps through its rows and its columns.

A step of -1 reads the rows or columns backwards.
"""

_Vector3 = Annotated[tuple[float, ...], Field(min_length=3, max_length=3)]
_Quaternion = Annotated[tuple[float, ...], Field(min_length=4, max_length=4)]
_Row = Annotated[list[float], Field(min_length=THUMBNAIL_SIZE, max_length=THUMBNAIL_SIZE)]
_Thumbnail = Annotated[list[_Row], Field(min_length=THUMBNAIL_SIZE, max_length=THUMBNAIL_SIZE)]


@dataclass(frozen=True)
class TrainingDistribution:
    """A summary of the first steps that training drew. Aliases are the keys in `seen.json`.

    Attributes:
        min_position_m: the smallest end-effector position along each axis, base frame.
        max_position_m: the largest end-effector position along each axis, base frame.
        mean_rotation: the mean orientation, unit quaternion.
        max_rotation_rad: the largest angle between an orientation and `mean_rotation`.
        red_minus_blue: camera → mean and standard deviation, over images, of an image's mean red
            minus its mean blue (-255 … 255).
        opposite_gripper_share: the share of steps whose gripper opening is the opposite of its
            command.
        mean_initial_opening: the mean gripper opening with which the episodes of these steps begin.
        mean_thumbnails: camera → the mean of its images' thumbnails, [8, 8].
        max_mismatch: camera → transform → the largest gain in correlation with the mean thumbnail
            that the transform gives to an image of training. Although these images are right, a
            transform can happen to bring one nearer to the mean. On a robot, only a larger gain
            tells of a mistake.
        camera_shares: camera → the share of steps that have its image. Summaries of earlier
            versions do not have these shares.
    """

    min_position_m: Annotated[_Vector3, Field(alias="low")]
    max_position_m: Annotated[_Vector3, Field(alias="high")]
    mean_rotation: Annotated[_Quaternion, Field(alias="facing")]
    max_rotation_rad: Annotated[float, Field(alias="turned")]
    red_minus_blue: Annotated[Mapping[str, tuple[float, float]], Field(alias="redder")]
    opposite_gripper_share: Annotated[float, Field(alias="opposite")] = 0.0
    mean_initial_opening: Annotated[float, Field(alias="begins")] = 0.5
    mean_thumbnails: Annotated[Mapping[str, _Thumbnail], Field(alias="looks")] = field(
        default_factory=dict
    )
    max_mismatch: Annotated[Mapping[str, Mapping[str, float]], Field(alias="mistaken")] = field(
        default_factory=dict
    )
    camera_shares: Annotated[Mapping[str, float], Field(alias="shown")] = field(
        default_factory=dict
    )
    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    @staticmethod
    def from_samples(samples: TrainingSamples, batch_size: int) -> "TrainingDistribution":
        """Summarize the first batches of a training, without image augmentation."""
        plain = replace(samples, augment=0.0)
        num_batches = math.ceil(NUM_SAMPLES / batch_size)
        initial_openings = []
        for step in range(num_batches):
            for sample in plain.mixture.sample(step, batch_size):
                episode = plain.mixture.read_episode_without_images(sample)
                initial_openings.append(episode.gripper[0])
        batches = [plain.batch(step, batch_size) for step in range(num_batches)]
        return TrainingDistribution.from_batches(batches, float(np.mean(initial_openings)))

    @staticmethod
    def from_batches(
        batches: Sequence[Mapping[str, Any]], mean_initial_opening: float
    ) -> "TrainingDistribution":
        """Summarize batches as `TrainingSamples.batch` returns them.

        Args:
            batches: each with position [B, 3], rotation [B, 4], gripper [B], action [B, H, 8], and
                per camera images [B, h, w, 3] and views [B] (whether the step has the image).
            mean_initial_opening: see the attribute of that name.
        """
        position = np.concatenate([batch["position"] for batch in batches])
        rotation = np.concatenate([batch["rotation"] for batch in batches])
        mean_rotation = _compute_mean_quaternion(rotation)
        rotation_angles = quat_distance(torch.from_numpy(rotation), torch.tensor(mean_rotation))
        is_gripper_opposite = np.concatenate(
            [_mark_openings_opposite_to_command(batch) for batch in batches]
        )

        images_by_camera = _group_images_by_camera(batches)
        red_minus_blue = {}
        thumbnails = {}
        mean_thumbnails = {}
        for camera, images in images_by_camera.items():
            red = images[..., 0].mean((1, 2))  # [N]
            blue = images[..., 2].mean((1, 2))  # [N]
            difference = red - blue
            red_minus_blue[camera] = (float(difference.mean()), float(difference.std()))
            thumbnails[camera] = compute_thumbnails(images.mean(-1, dtype=np.float32))
            mean_thumbnails[camera] = thumbnails[camera].mean(0, dtype=np.float64).round(3)
        max_mismatch: dict[str, dict[str, float]] = {}
        for camera in thumbnails:
            max_mismatch[camera] = {}
            for match in correlate_under_transforms(thumbnails[camera], camera, mean_thumbnails):
                gain = match.correlation - match.plain_correlation  # [N]
                max_mismatch[camera][match.transform] = float(gain.max())

        return TrainingDistribution(
            min_position_m=tuple(position.min(0).tolist()),
            max_position_m=tuple(position.max(0).tolist()),
            mean_rotation=tuple(mean_rotation.tolist()),
            max_rotation_rad=float(rotation_angles.max()),
            red_minus_blue=red_minus_blue,
            opposite_gripper_share=float(is_gripper_opposite.mean()),
            mean_initial_opening=mean_initial_opening,
            mean_thumbnails={name: mean.tolist() for name, mean in mean_thumbnails.items()},
            max_mismatch=max_mismatch,
            camera_shares=_compute_share_of_steps_per_camera(batches, images_by_camera),
        )

    @property
    def usual_cameras(self) -> list[str]:
        """The cameras that nearly every step of training has, so that the policy relies on them.

        If the summary has no `camera_shares`, these are all cameras of the training.
        """
        all_cameras = list(self.red_minus_blue)  # every summary has the colors of each camera
        return [
            camera
            for camera in all_cameras
            if self.camera_shares.get(camera, 1.0) > MIN_USUAL_CAMERA_SHARE
        ]

    def save(self, path: Path) -> None:
        """Write the summary as JSON. An interrupted write leaves no incomplete file."""
        adapter = TypeAdapter(TrainingDistribution)
        write_text(path, adapter.dump_json(self, indent=1, by_alias=True).decode())

    @staticmethod
    def load(path: Path) -> "TrainingDistribution | None":
        """Read a summary that `save` wrote, or return None if there is no such file.

        Raises:
            SpearError: the file is broken or has another format.
        """
        if not path.is_file():
            return None
        return read_json_as(TrainingDistribution, path, "copy the folder again, or remove it")


class TransformMatch(NamedTuple):
    """How well the thumbnails of B images match a mean thumbnail with and without a transform.

    transform          what may have happened to the images, in words.
    correlation        [B] correlations after the transform.
    plain_correlation  [B] correlations without a transform.
    """

    transform: str
    correlation: Array
    plain_correlation: Array


def compute_thumbnails(brightness: Array) -> Array:
    """Compute the thumbnails [B, 8, 8] of images from their brightness [B, h, w]."""
    one_channel = torch.from_numpy(brightness)[:, None]  # [B, 1, h, w], as pooling wants it
    small = F.adaptive_avg_pool2d(one_channel, THUMBNAIL_SIZE)[:, 0]  # [B, 8, 8]
    centered = small - small.mean((1, 2), keepdim=True)
    unit_vectors = F.normalize(centered.flatten(1))  # [B, 64]
    return unit_vectors.view_as(centered).numpy()


def correlate_under_transforms(
    thumbnails: Array, camera: str, mean_thumbnails: Mapping[str, Any]
) -> Iterator[TransformMatch]:
    """Compare the thumbnails of one camera with mean thumbnails, under every possible mistake.

    Args:
        thumbnails: [B, 8, 8] thumbnails of the camera's images.
        camera: the camera's name.
        mean_thumbnails: camera → mean thumbnail [8, 8] of training.

    Yields:
        A match for each of `VIEW_TRANSFORMS`, then one for each other camera, with which this
        camera may have been exchanged.
    """
    plain = _correlate(thumbnails, mean_thumbnails[camera])
    for transform, (row_step, column_step) in VIEW_TRANSFORMS.items():
        transformed = thumbnails[:, ::row_step, ::column_step]
        yield TransformMatch(transform, _correlate(transformed, mean_thumbnails[camera]), plain)
    for other_camera in mean_thumbnails:
        if other_camera != camera:
            correlation = _correlate(thumbnails, mean_thumbnails[other_camera])
            yield TransformMatch(f"exchanged with camera {other_camera!r}", correlation, plain)


def _correlate(thumbnails: Array, mean_thumbnail: Any) -> Array:
    """Compute the correlations [B] of thumbnails [B, 8, 8] with a mean thumbnail [8, 8]."""
    mean = np.asarray(mean_thumbnail, np.float64)
    unit_mean = mean / max(float(np.linalg.norm(mean)), 1e-6)
    return np.einsum("bij,ij->b", thumbnails, unit_mean)


def _compute_mean_quaternion(rotation: Array) -> Array:
    """Average unit quaternions [N, 4], whatever their signs (Markley et al. 2007).

    The mean is the eigenvector of the sum of q qᵀ with the largest eigenvalue.
    """
    sum_of_outer_products = rotation.T.astype(np.float64) @ rotation  # [4, 4]
    _, eigenvectors = np.linalg.eigh(sum_of_outer_products)  # in ascending order of eigenvalues
    return eigenvectors[:, -1]


def _mark_openings_opposite_to_command(batch: Mapping[str, Any]) -> Array:
    """Return [B] whether each step's gripper opening is the opposite of its command."""
    first_command = batch["action"][:, 0, 7]  # the gripper value of each chunk's first action
    return are_opposite(batch["gripper"], first_command)


def _compute_share_of_steps_per_camera(
    batches: Sequence[Mapping[str, Any]], cameras: Iterable[str]
) -> dict[str, float]:
    """Compute camera → the share of steps that have its image."""
    shares = {}
    for camera in cameras:
        has_image = np.concatenate([batch["views"][camera] for batch in batches])
        shares[camera] = float(has_image.mean())
    return shares


def _group_images_by_camera(batches: Sequence[Mapping[str, Any]]) -> dict[str, Array]:
    """Collect each camera's images [N, h, w, 3], without cameras that no step has."""
    images_by_camera = {}
    for camera in batches[0]["images"]:
        images_per_batch = []
        for batch in batches:
            has_image = batch["views"][camera]  # [B] bool
            images_per_batch.append(batch["images"][camera][has_image])
        images = np.concatenate(images_per_batch)
        if len(images):
            images_by_camera[camera] = images
    return images_by_camera
