"""The types that pass between the parts of this package, with their shapes, units and frames.

Frames:
    base    robot base: x forward, y left, z up, in meters.
    ee      end-effector frame, at the point between the finger tips.
    camera  x right, y down, z forward (OpenCV), in meters or in MoGe's relative unit.

Rotations are unit quaternions, scalar first (w, x, y, z), in the half-space w >= 0.
Gripper values are openings in [0, 1]: 1 is open, 0 is closed (our choice, not the paper's).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, get_origin

from numpy.typing import NDArray

from spear.errors import SpearError, check_known

if TYPE_CHECKING:
    import torch

Array = NDArray[Any]
Unit = Literal["metre", "relative"]
"""The unit of 3D labels, as it is written in files: meters, or MoGe's relative unit."""

ActionReference = Literal["previous", "observed"]
"""The pose from which a policy measures the actions of a chunk: the one that the action before
leads to, or the one that it observed (`spear.data.action_reference`)."""

WidthAndHeight = tuple[int, int]  # of an image, in pixels
ACTION_DIM = 8  # translation 3, rotation quaternion 4, gripper 1
STATE_DIM = 8  # position 3, orientation quaternion 4, gripper opening 1
CONTROL_RATE_HZ = 5.0  # control steps per second, as in the paper

# A recorded or predicted motion faster than this is taken for an error (our choice). For
# comparison, a Franka moves at 1.7 m/s at most, and its wrist turns at 2.6 rad/s.
MAX_EE_SPEED_M_S = 3.0
MAX_EE_TURN_RAD_S = 10.0

CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
"""Matches control characters and unpaired surrogates; no valid instruction contains any."""


@dataclass(frozen=True)
class Action:
    """An action chunk: H actions, one per control step (5 Hz).

    The dots in the shapes stand for any leading dimensions, for example a batch.

    Attributes:
        translation: [..., H, 3], displacement of the end-effector in one step, base frame, meters
            (in normalized units inside the model, see `spear.data.normalize`).
        rotation: [..., H, 4], unit quaternion of the rotation in one step, in the end-effector
            frame: R_next = R_now · R(rotation).
        gripper: [..., H, 1], commanded opening, absolute: 1 is open, 0 is closed (-1 to 1 inside
            the model).

    Example:
        >>> import torch
        >>> still = Action.from_vector(torch.tensor([[0.0, 0, 0, 1, 0, 0, 0, 1]]))  # one step, open
        >>> still.translation.shape, still.rotation.shape, still.gripper.shape
        (torch.Size([1, 3]), torch.Size([1, 4]), torch.Size([1, 1]))
    """

    translation: "torch.Tensor"
    rotation: "torch.Tensor"
    gripper: "torch.Tensor"

    def to_vector(self) -> "torch.Tensor":
        """Join the three parts to one vector per action.

        Returns:
            [..., H, 8]: translation, rotation and gripper side by side.
        """
        import torch

        return torch.cat([self.translation, self.rotation, self.gripper], dim=-1)

    @staticmethod
    def from_vector(vector: "torch.Tensor") -> "Action":
        """Split a vector into the three parts; the inverse of `to_vector`.

        Args:
            vector: [..., H, 8], translation, rotation and gripper side by side.

        Returns:
            The action chunk.
        """
        return Action(vector[..., :3], vector[..., 3:7], vector[..., 7:8])

    def to(self, *args: Any, **kwargs: Any) -> "Action":
        """Apply `torch.Tensor.to` to each part.

        Args:
            args: what `torch.Tensor.to` takes, such as a device or a data type.
            kwargs: likewise, by keyword.

        Returns:
            The same actions on that device, or in that type.
        """
        return Action(
            translation=self.translation.to(*args, **kwargs),
            rotation=self.rotation.to(*args, **kwargs),
            gripper=self.gripper.to(*args, **kwargs),
        )


@dataclass(frozen=True)
class FlowConfig:
    """Configuration of the flow-matching objective.

    The defaults are the paper's unless they are marked as ours.

    Attributes:
        rotation: "s3" (quaternions flow along great circles of S³) or "linear" (straight lines in
            R⁴).
        rotation_loss: the rotation's loss, "cosine" or "mse".
        prediction: what the network predicts, "velocity" or "clean" (the action without noise; this
            option is ours).
        geodesic_weight: weight of the geodesic loss within the rotation's loss; 0 switches it off.
        geodesic_step: δ, the flow time by which the geodesic loss moves along the velocity. Near
            the end of the flow δ is cut to the remaining time 1 - τ; None always takes the whole
            remaining time. The paper gives no number; 0.1, one of ten Euler steps, is our choice
            (measured by `experiments/flow_losses`, see docs/results/flow-losses.md).
        translation_weight: weight of the translation's loss in the total.
        rotation_weight: weight of the rotation's loss in the total.
        gripper_weight: weight of the gripper's loss in the total (our choice).
        time_alpha: the parameter alpha of the distribution of the flow time τ in training:
            τ = time_scale · (1 - u) with u ~ Beta(time_alpha, time_beta), which draws τ near 0
            (noise) more often. The default values are π0's; the paper says "as π0".
        time_beta: see `time_alpha`.
        time_scale: see `time_alpha`.
        steps: number of Euler steps from noise to an action (10 is π0's; the paper does not say).
            The best number depends on the model (docs/results/nano.md).

    Raises:
        SpearError: a field has an unknown word, or a number out of range.

    Example:
        >>> config = FlowConfig(prediction="clean", steps=5)
        >>> config.rotation, config.geodesic_step
        ('s3', 0.1)
    """

    rotation: Literal["s3", "linear"] = "s3"
    rotation_loss: Literal["cosine", "mse"] = "cosine"
    prediction: Literal["velocity", "clean"] = "velocity"
    geodesic_weight: float = 1.0
    geodesic_step: float | None = 0.1
    translation_weight: float = 1.0
    rotation_weight: float = 1.0
    gripper_weight: float = 1.0
    time_alpha: float = 1.5
    time_beta: float = 1.0
    time_scale: float = 0.999
    steps: int = 10

    def __post_init__(self) -> None:
        for config_field in fields(self):
            name = config_field.name
            value = getattr(self, name)
            if get_origin(config_field.type) is Literal:
                check_known(f"flow {name}", get_args(config_field.type), value)
            elif name == "steps":
                _check_number(name, value, minimum=1, maximum=1e6, types=int)
            elif name == "time_scale":
                _check_number(name, value, minimum=1e-6, maximum=1)
            elif name.endswith("_weight"):
                _check_number(name, value, minimum=0, maximum=1e6)
            elif name == "geodesic_step" and value is None:
                continue
            else:
                _check_number(name, value, minimum=1e-6, maximum=1e6)


def _check_number(
    name: str, value: Any, minimum: float, maximum: float, types: Any = int | float
) -> None:
    """Raise `SpearError` if a `FlowConfig` field's value is not a number in [minimum, maximum]."""
    if not (isinstance(value, types) and minimum <= value <= maximum):
        raise SpearError(
            f"flow {name} is {value!r}. Give a number from {minimum:g} to {maximum:g}."
        )


@dataclass(frozen=True)
class Episode:
    """A robot demonstration of T steps, as every reader and the simulator return it.

    Attributes:
        images: camera name -> T encoded images (JPEG or PNG). The names that policies know are
            "external" and "wrist".
        position: [T, 3], measured end-effector position, base frame, meters.
        rotation: [T, 4], measured end-effector orientation, unit quaternion (w, x, y, z), base
            frame.
        gripper: [T], measured opening, 0 (closed) to 1 (open).
        instruction: what the robot was asked to do.
        rate_hz: steps per second.
        source: where the episode comes from: dataset name and index, or task family and seed.
        action: [T, 8], the command of each step in the layout of `Action`. None if unknown: actions
            are then derived from the states.
        action_mask: [T] bool, whether the action of a step may be a training target. It is False
            for disturbances that were injected on purpose. None means True for all steps.
        success: whether the task was achieved; None if unknown.

    Example:
        >>> import numpy as np
        >>> episode = Episode(
        ...     images={},
        ...     position=np.zeros((3, 3)),
        ...     rotation=np.tile([1.0, 0, 0, 0], (3, 1)),
        ...     gripper=np.ones(3),
        ...     instruction="put the carrot on the plate",
        ...     rate_hz=5.0,
        ...     source="example",
        ... )
        >>> len(episode)
        3
    """

    images: Mapping[str, Sequence[bytes]]
    position: Array
    rotation: Array
    gripper: Array
    instruction: str
    rate_hz: float
    source: str
    action: Array | None = None
    action_mask: Array | None = None
    success: bool | None = None

    def __len__(self) -> int:
        return int(self.position.shape[0])


@dataclass(frozen=True)
class Frame:
    """An image with the ground truth that the simulator or an RGB-D file provides.

    Attributes:
        image: [h, w, 3] uint8, RGB.
        depth: [h, w] float32, meters along the camera's z axis; 0 or inf where unknown.
        instances: [h, w] int32, instance ids; 0 is background.
        names: instance id -> object name, for example {3: "carrot"}.
        intrinsics: [3, 3], pixels. Pixel centers are at integer + 0.5.
        extrinsics: [4, 4], camera pose in the base frame (maps camera to base coordinates).
        boxes: instance id -> [8, 3] vertices of the true oriented box in any order, camera frame,
            meters.
        source: file name or simulator scene that the image comes from.
        is_turned: whether the image's EXIF data turns or mirrors the image in a way that width and
            height do not show (a half turn, for example).
        is_measured: whether depth and instances come from sensors, so that they only approximate
            the truth.

    Example:
        >>> import numpy as np
        >>> frame = Frame(np.zeros((480, 640, 3), np.uint8), source="photo.jpg")
        >>> frame.depth is None, frame.source
        (True, 'photo.jpg')
    """

    image: Array
    depth: Array | None = None
    instances: Array | None = None
    names: Mapping[int, str] = field(default_factory=dict)
    intrinsics: Array | None = None
    extrinsics: Array | None = None
    boxes: Mapping[int, Array] | None = None
    source: str = ""
    is_turned: bool = False
    is_measured: bool = False

    def __getstate__(self) -> dict[str, Any]:
        """Pickle with the field names of older versions, because labels keep hashes of pickles."""
        state = dict(self.__dict__)
        for name in ("turned", "measured"):
            state[name] = state.pop(f"is_{name}")
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Read a pickle that `__getstate__` has written."""
        for name in ("turned", "measured"):
            state[f"is_{name}"] = state.pop(name)
        self.__dict__.update(state)


@dataclass(frozen=True)
class Box3D:
    """An oriented 3D box, in the camera frame and in the unit of its labeled image.

    Attributes:
        vertices: [8, 3], in the order of `spear.labels.fit.box3d.order_vertices`.
        center: [3], the box's center.
        size: [3], full side lengths along the box axes.
        rotation: [3, 3], rotation matrix whose columns are the box axes.

    Example:
        >>> import numpy as np
        >>> from spear.labels.fit.box3d import order_vertices
        >>> corners = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (2, 3)], float)
        >>> box = Box3D(order_vertices(corners), corners.mean(axis=0), np.ones(3), np.eye(3))
        >>> box.center.tolist(), box.size.tolist()
        ([0.5, 0.5, 2.5], [1.0, 1.0, 1.0])
    """

    vertices: Array
    center: Array
    size: Array
    rotation: Array


@dataclass(frozen=True)
class LabeledObject:
    """An object of a labeled image.

    Attributes:
        name: what the detector calls it.
        box2d: [4], x0, y0, x1, y1 in pixels.
        mask_runs: instance mask as run lengths in COCO's format: lengths of alternating runs of
            zeros and ones, column by column, beginning with zeros.
        box3d: the oriented box; None if too few points of the object are known.
        keypoints: {"closest", "furthest", "centre"} -> point [3], camera frame. "closest" and
            "furthest" are points of the visible surface, "centre" is the box's center.
        scores: quality measures: detection score, number of points, visible fraction and others.

    Example:
        >>> import numpy as np
        >>> mug = LabeledObject(
        ...     name="mug",
        ...     box2d=np.array([0.0, 0, 4, 2]),
        ...     mask_runs=[0, 8],  # all eight pixels of an image of 4 × 2
        ...     box3d=None,
        ...     keypoints={},
        ... )
        >>> sum(mug.mask_runs)
        8
    """

    name: str
    box2d: Array
    mask_runs: Sequence[int]
    box3d: Box3D | None
    keypoints: Mapping[str, Array]
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LabeledImage:
    """An image with its objects in 3D.

    Attributes:
        image: the encoded image (JPEG or PNG).
        width: the image's width in pixels.
        height: the image's height in pixels.
        intrinsics: [3, 3], pixels.
        objects: the labeled objects of the image.
        unit: the unit of every 3D number in the label.
        source: where the image comes from.
        provenance: names of the models that labeled the image, by role:
            {"detector": …, "segmenter": …, "pointmap": …}.

    Example:
        >>> from spear.labels.store import read_labels
        >>> for image in read_labels("runs/labels"):  # doctest: +SKIP
        ...     print(image.source, image.unit, [item.name for item in image.objects])
        sim:0/external metre ['plate', 'lemon', 'mug']
    """

    image: bytes
    width: int
    height: int
    intrinsics: Array
    objects: Sequence[LabeledObject]
    unit: Unit
    source: str
    provenance: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """A question about an image, and its answer.

    Attributes:
        question_type: the question type, one of those in `spear.question_types`.
        prompt: the question in words.
        segments: the answer in reading order. A segment is text, a float (one 3D token; a
            coordinate or length in `unit`, camera frame) or a `Pixel` (two location tokens).
        objects: names of the objects asked about.
        unit: the unit of the floats in `segments`.

    Example:
        >>> question = Question("distance", "How far away is the mug?", [0.82], ["mug"])
        >>> question.values, question.unit
        ([0.82], 'metre')
    """

    question_type: str
    prompt: str
    segments: "Segments"
    objects: Sequence[str]
    unit: Unit = "metre"

    @property
    def values(self) -> list[float]:
        """The 3D numbers of the answer, in order."""
        return [segment for segment in self.segments if isinstance(segment, float)]


@dataclass(frozen=True)
class Pixel:
    """A location in an image: x in [0, 1) from left to right, y in [0, 1) from top to bottom.

    Example:
        >>> str(Pixel(0.25, 0.5))  # PaliGemma's two location tokens, y before x
        '<loc0512><loc0256>'
    """

    x: float
    y: float

    def __str__(self) -> str:
        """The location as two of PaliGemma's location tokens, y before x.

        Each token names one of 1,024 equal intervals of the image's height or width.
        """
        return _format_location_token(self.y) + _format_location_token(self.x)


def _format_location_token(fraction: float) -> str:
    """Return PaliGemma's token for a fraction (0 … 1) of an image's height or width."""
    index = min(max(int(fraction * 1024), 0), 1023)
    return f"<loc{index:04d}>"


Segments = Sequence[str | float | Pixel]
"""An answer in reading order: text, numbers and image locations."""


class Policy(Protocol):
    """Anything that acts. The convention is openpi's: a flat dict in, a dict out.

    An observation has these keys:

        "observation/image"        [h, w, 3] uint8, the external camera.
        "observation/wrist_image"  [h, w, 3] uint8, optional.
        "observation/state"        [8] float32: position (m) and quaternion (w, x, y, z), base
                                   frame; gripper opening.
        "prompt"                   str, the instruction.
        "seed"                     int, optional: the seed of the noise that the answer is computed
                                   from. Send a different seed with each observation.
        "committed"                [d, 8] float32, optional: the committed prefix, actions that will
                                   be executed before the answer arrives. The answer begins with
                                   them.

    The result has one key:

        "actions"                  [H, 8] float32, in the layout of `Action`, meters.

    A policy may have an attribute `image_sizes` that says which cameras it takes: view → (width,
    height), in the form that `spear.embodiments.observations.get_image_sizes` returns.

    Example:
        >>> import numpy as np
        >>> class StandStill:
        ...     def infer(self, observation):
        ...         still = np.tile(np.float32([0, 0, 0, 1, 0, 0, 0, 1]), (5, 1))
        ...         return {"actions": still}
        ...
        ...     def infer_batch(self, observations):
        ...         return [self.infer(observation) for observation in observations]
        >>> StandStill().infer({})["actions"].shape
        (5, 8)
    """

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """Compute an action chunk for one observation.

        Args:
            observation: a map with the keys above.

        Returns:
            A map with the key "actions".
        """
        ...

    def infer_batch(self, observations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Compute an action chunk for each of several observations.

        Args:
            observations: maps with the keys above.

        Returns:
            A map with the key "actions" for each observation, in order.
        """
        ...
