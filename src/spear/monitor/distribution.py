"""The training distribution summary (`seen.json`): what the drift monitor compares observations
with.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field, TypeAdapter

from spear.data.mixture import TrainingSamples
from spear.geometry import quat_distance
from spear.types import Array
from spear.util.files import read_json_as, write_text

NUM_SAMPLES = 512  # steps that are summarized, in the order in which training draws them
THUMBNAIL_SIZE = 8  # images are compared by their brightness in so many rows and columns
MAX_CONSTANT_CAMERA_SHARE = 0.95  # a camera in more steps than this is one the policy relies on
OPPOSITE_OPENING = 0.75  # an opening this far (of 0 … 1) from a command is the opposite of it

VIEW_TRANSFORMS = {
    "turned by 180°": (-1, -1),
    "flipped left to right": (1, -1),
    "flipped upside down": (-1, 1),
}
"""How a camera's image may be transformed by mistake: steps through its rows and columns."""

_Vector3 = Annotated[tuple[float, ...], Field(min_length=3, max_length=3)]
_Quaternion = Annotated[tuple[float, ...], Field(min_length=4, max_length=4)]
_Row = Annotated[list[float], Field(min_length=THUMBNAIL_SIZE, max_length=THUMBNAIL_SIZE)]
_Thumbnail = Annotated[list[_Row], Field(min_length=THUMBNAIL_SIZE, max_length=THUMBNAIL_SIZE)]


@dataclass(frozen=True)
class TrainingDistribution:
    """A summary of the first steps that training drew. Aliases are the keys in `seen.json`.

    Attributes:
        min_position_m: the smallest end-effector position along each axis, base frame.
        max_position_m: the largest one.
        mean_rotation: the mean orientation, unit quaternion.
        max_rotation_rad: the largest angle between an orientation and the mean one.
        red_minus_blue: camera → mean and standard deviation, over images, of an image's mean red
            minus its mean blue (-255 … 255).
        opposite_gripper_share: the share of steps whose gripper is the opposite of its command.
        mean_initial_opening: the mean gripper opening with which the episodes of these steps begin.
        mean_thumbnails: camera → the mean of its thumbnails, [8, 8].
        max_mismatch: camera → transform → the most by which an image of training correlates better
            with the mean thumbnail when it is transformed than when it is not.
        camera_shares: camera → the share of steps that have its image; summaries of earlier
            versions do not have it.
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
        """Summarize the first batches of a training, without their augmentation."""
        plain = replace(samples, augment=0.0)
        num_batches = -(-NUM_SAMPLES // batch_size)
        initial_openings = []
        for step in range(num_batches):
            for sample in plain.mixture.draw(step, batch_size):
                initial_openings.append(plain.mixture.episode(sample).gripper[0])
        batches = [plain.batch(step, batch_size) for step in range(num_batches)]
        return TrainingDistribution.from_batches(batches, float(np.mean(initial_openings)))

    @staticmethod
    def from_batches(
        batches: Sequence[Mapping[str, Any]], mean_initial_opening: float
    ) -> "TrainingDistribution":
        """Summarize batches as `TrainingSamples.batch` returns them."""
        position = np.concatenate([batch["position"] for batch in batches])
        rotation = np.concatenate([batch["rotation"] for batch in batches])
        mean_rotation = _mean_quaternion(rotation)
        rotation_angles = quat_distance(torch.from_numpy(rotation), torch.tensor(mean_rotation))
        is_gripper_opposite = np.concatenate([_is_gripper_opposite(batch) for batch in batches])

        images_by_camera = _images_by_camera(batches)
        red_minus_blue = {}
        thumbnails = {}
        mean_thumbnails = {}
        for camera, images in images_by_camera.items():
            difference = images[..., 0].mean((1, 2)) - images[..., 2].mean((1, 2))
            red_minus_blue[camera] = (float(difference.mean()), float(difference.std()))
            thumbnails[camera] = compute_thumbnails(images.mean(-1, dtype=np.float32))
            mean_thumbnails[camera] = thumbnails[camera].mean(0, dtype=np.float64).round(3)
        max_mismatch = {}
        for camera in thumbnails:
            max_mismatch[camera] = {
                match.transform: float((match.correlation - match.plain_correlation).max())
                for match in match_transforms(thumbnails[camera], camera, mean_thumbnails)
            }

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
            camera_shares=_compute_camera_shares(batches, images_by_camera),
        )

    @property
    def constant_cameras(self) -> list[str]:
        """The cameras that (nearly) every step of training has, so that the policy relies on
        them.

        If the summary does not have the shares, these are all cameras of the training.
        """
        return [
            camera
            for camera in self.red_minus_blue
            if self.camera_shares.get(camera, 1.0) > MAX_CONSTANT_CAMERA_SHARE
        ]

    def save(self, path: Path) -> None:
        """Write the summary as JSON; the file is complete or not there."""
        adapter = TypeAdapter(TrainingDistribution)
        write_text(path, adapter.dump_json(self, indent=1, by_alias=True).decode())

    @staticmethod
    def load(path: Path) -> "TrainingDistribution | None":
        """Read what `save` wrote. Returns None if there is no such file.

        Raises:
            SpearError: the file is broken or has another format.
        """
        if not path.is_file():
            return None
        return read_json_as(TrainingDistribution, path, "copy the folder again, or remove it")


class TransformMatch(NamedTuple):
    """How well thumbnails [B] match a mean thumbnail if a transform is assumed, and if none is."""

    transform: str
    correlation: Array
    plain_correlation: Array


def compute_thumbnails(brightness: Array) -> Array:
    """Shrink images' brightness [B, h, w] to [B, 8, 8], each with mean 0 and length 1."""
    small = F.adaptive_avg_pool2d(torch.from_numpy(brightness)[:, None], THUMBNAIL_SIZE)[:, 0]
    centered = small - small.mean((1, 2), keepdim=True)
    return F.normalize(centered.flatten(1)).view_as(centered).numpy()


def match_transforms(
    thumbnails: Array, camera: str, mean_thumbnails: Mapping[str, Any]
) -> Iterator[TransformMatch]:
    """Compare thumbnails [B, 8, 8] with the mean ones, under each transform and exchange of
    cameras.
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
    mean = np.asarray(mean_thumbnail, np.float64)
    return np.einsum("bij,ij->b", thumbnails, mean / max(float(np.linalg.norm(mean)), 1e-6))


def _mean_quaternion(rotation: Array) -> Array:
    """Average unit quaternions [N, 4], whatever their signs (Markley et al. 2007)."""
    return np.linalg.eigh(rotation.T.astype(np.float64) @ rotation)[1][:, -1]


def _is_gripper_opposite(batch: Mapping[str, Any]) -> Array:
    """Return, for each step of a batch, whether its gripper is the opposite of its command."""
    first_command = batch["action"][:, 0, 7]
    return np.abs(first_command - batch["gripper"]) > OPPOSITE_OPENING


def _compute_camera_shares(
    batches: Sequence[Mapping[str, Any]], cameras: Iterable[str]
) -> dict[str, float]:
    shares = {}
    for camera in cameras:
        has_image = np.concatenate([batch["views"][camera] for batch in batches])
        shares[camera] = float(has_image.mean())
    return shares


def _images_by_camera(batches: Sequence[Mapping[str, Any]]) -> dict[str, Array]:
    """Collect each camera's images [N, h, w, 3], without cameras that no step has."""
    images_by_camera = {}
    for camera in batches[0]["images"]:
        images = np.concatenate(
            [batch["images"][camera][batch["views"][camera]] for batch in batches]
        )
        if len(images):
            images_by_camera[camera] = images
    return images_by_camera
