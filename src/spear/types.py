"""The nouns that pass between rooms: few, typed, frozen; shapes, units and frames stated here once.

Frames
    base    robot base: x forward, y left, z up, metres.
    ee      end-effector (tool centre point, between the finger tips).
    camera  x right, y down, z forward (OpenCV), metres, or MoGe's relative unit.
Rotations are unit quaternions, scalar first (w, x, y, z), kept in the half-space w >= 0.
Gripper values are openings in [0, 1]: 1 is open, 0 is closed (our choice).
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

ACTION_DIM = 8
"""translation 3 + rotation quaternion 4 + gripper 1."""
CONTROL_RATE_HZ = 5.0
"""Control steps per second (the paper)."""
MAX_EE_SPEED_M_S, MAX_EE_TURN_RAD_S = 3.0, 10.0
"""Metres and radians per second that an end-effector can move and turn, and still be believed (our choice; a
Franka moves at 1.7 m/s, its wrist turns at 2.6 rad/s)."""
STATE_DIM = 8
"""An observed robot state: position 3 (m, base) + orientation quaternion 4 (base) + gripper opening 1."""
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters and halves of characters: no instruction has one."""


@dataclass(frozen=True)
class Action:
    """A chunk of H actions, one per control step (5 Hz); leading dimensions are free.

    translation [..., H, 3]  step displacement of the end-effector, base frame; metres (or normalised units
                             inside the model, see `spear.data.normalize`).
    rotation    [..., H, 4]  unit quaternion of the step rotation, expressed in the end-effector frame:
                             R_next = R_now · R(rotation).
    gripper     [..., H, 1]  commanded opening, absolute, 1 open … 0 closed (-1 … 1 inside the model).
    """

    translation: "torch.Tensor"
    rotation: "torch.Tensor"
    gripper: "torch.Tensor"

    def to_vector(self) -> "torch.Tensor":
        """[..., H, 8]: translation, rotation, gripper side by side."""
        import torch

        return torch.cat([self.translation, self.rotation, self.gripper], dim=-1)

    @staticmethod
    def from_vector(vector: "torch.Tensor") -> "Action":
        """The inverse of `to_vector`; [..., H, 8] in."""
        return Action(vector[..., :3], vector[..., 3:7], vector[..., 7:8])

    def to(self, *args: Any, **kwargs: Any) -> "Action":
        """`torch.Tensor.to` on each part."""
        return Action(
            *(part.to(*args, **kwargs) for part in (self.translation, self.rotation, self.gripper))
        )


@dataclass(frozen=True)
class FlowConfig:
    """What flows how, and what is penalised. The defaults are the paper's, or else our choice and say so.

    rotation          "s3" (great circles) or "linear" (straight lines in R⁴).
    rotation_loss     "cosine" or "mse".
    prediction        what the network gives: "velocity" or "clean".
    geodesic_weight   of the geodesic term within the rotation loss, 0 for none (1: the paper adds it).
    geodesic_step     δ of the geodesic term for velocities, clipped to the 1 - τ that remains; None is all of
                      it. The paper gives no number: 0.1, one Euler step of ten, is our choice (measured by
                      experiments/flow_losses, see docs/train.md).
    *_weight          of the parts in the total (1: the paper adds them; the gripper's is our choice).
    steps             Euler steps from noise to an action, when acting (10: π0's; the paper does not say). How
                      many are best depends on the model (docs/nano.md).
    time_*            τ = scale · (1 - u), u ~ Beta(alpha, beta): skewed towards noise (π0's values; the paper
                      says "as π0").
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
        for f in fields(self):
            if get_origin(f.type) is Literal:
                check_known(f"flow {f.name}", get_args(f.type), getattr(self, f.name))
        for name in (f.name for f in fields(self) if f.type in (int, float, float | None)):
            whole = name == "steps"
            value, least = (
                getattr(self, name),
                1 if whole else 0.0 if name.endswith("weight") else 1e-6,
            )
            most = 1.0 if name == "time_scale" else 1e6
            number = isinstance(value, int if whole else int | float) and least <= value <= most
            if not number and (value is not None or name != "geodesic_step"):
                raise SpearError(
                    f"flow {name} is {value!r}: give a number from {least:g} to {most:g}"
                )


@dataclass(frozen=True)
class Episode:
    """One robot demonstration of T steps, as any reader or the simulator gives it.

    images       camera name -> T encoded images (JPEG or PNG bytes). Canonical names: "external", "wrist".
    position     [T, 3] end-effector position, metres, base frame.
    rotation     [T, 4] end-effector orientation, unit quaternion (w, x, y, z), base frame.
    gripper      [T] measured opening, 0 closed … 1 open.
    instruction  what the robot was asked to do.
    rate_hz      steps per second.
    source       where it came from (dataset name and index, or simulator family and seed).
    action       [T, 8] commanded action at each step (layout of `Action`), or None when unknown (then actions
                 are derived from the states).
    action_mask  [T] bool, False where the step is not a demonstration (an injected disturbance): never a
                 training target. None means all True.
    success      whether the task was achieved, None when unknown.
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
    """One image with whatever ground truth is known about it (from the simulator or RGB-D files).

    image       [h, w, 3] uint8 RGB.
    depth       [h, w] float32 metres along the camera's z axis (0 or inf where unknown), or None.
    instances   [h, w] int32 instance ids, 0 is background, or None.
    names       instance id -> object name, e.g. {3: "carrot"}.
    intrinsics  [3, 3] pixels, or None. Pixel centres are at integer + 0.5.
    extrinsics  [4, 4] camera pose in the base frame (camera -> base), or None.
    boxes       instance id -> [8, 3] true oriented-box vertices, camera frame, metres (any order), or None.
    source      where it came from.
    is_turned   whether its EXIF turns or mirrors it in a way that its size does not show.
    is_measured whether depth and instances are from sensors: near to the truth, not it.
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


@dataclass(frozen=True)
class Box3D:
    """An oriented 3D box, camera frame.

    vertices  [8, 3] in the consistent order of `spear.labels.fit.box3d.order_vertices`.
    center    [3]; size [3] full side lengths along the box axes; rotation [3, 3] columns are the box axes.
    """

    vertices: Array
    center: Array
    size: Array
    rotation: Array


@dataclass(frozen=True)
class LabeledObject:
    """One object of a labelled image.

    name        what the detector called it.
    box2d       [4] x0, y0, x1, y1 in pixels.
    mask        run lengths (COCO, column-major, starting with zeros) of the instance mask.
    box3d       oriented box, or None when too few points were left.
    keypoints   {"closest", "furthest", "centre"} -> [3] camera frame; the first two of what is seen.
    scores      quality numbers: detection score, points, visible fraction, ...
    """

    name: str
    box2d: Array
    mask: Sequence[int]
    box3d: Box3D | None
    keypoints: Mapping[str, Array]
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LabeledImage:
    """An image and what is known of its objects in 3D.

    image       encoded bytes (JPEG or PNG); width, height in pixels.
    intrinsics  [3, 3] pixels.
    unit        of every 3D number here: "metre" or MoGe's "relative".
    provenance  which model said what: {"detector": ..., "segmenter": ..., "pointmap": ...}.
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
    """A 3D question and its answer.

    family    which of the question families made it ("box_vertices", "keypoint", ...).
    prompt    the question in words.
    segments  the answer as text pieces and numbers: each item is a str, a float (one 3D token, in the label's
              unit, camera frame) or a `Pixel` (two location tokens). Text and numbers in reading order.
    objects   the names asked about.
    unit      of the floats.
    """

    family: str
    prompt: str
    segments: "Segments"
    objects: Sequence[str]
    unit: Unit = "metre"

    @property
    def values(self) -> list[float]:
        """The 3D numbers of the answer, in order."""
        return [s for s in self.segments if isinstance(s, float)]


@dataclass(frozen=True)
class Pixel:
    """A 2D image location as fractions of the image: x in [0, 1) left to right, y top to bottom."""

    x: float
    y: float

    def __str__(self) -> str:
        """As PaliGemma's two location tokens, y before x: "<loc0512><loc0256>"."""
        return "".join(f"<loc{min(max(int(v * 1024), 0), 1023):04d}>" for v in (self.y, self.x))


Segments = Sequence[str | float | Pixel]
"""An answer, in reading order: text, numbers and image locations."""


class Policy(Protocol):
    """Anything that acts. The openpi convention: a flat dict in, a dict out.

    Observation keys
        "observation/image"        [h, w, 3] uint8, the external camera
        "observation/wrist_image"  [h, w, 3] uint8, optional
        "observation/state"        [8] float32: position (m) and quaternion (w x y z), base; gripper opening
        "prompt"                   str
        "seed"                     int, optional: fixes what is random in this answer; give each look another
        "committed"                [d, 8] float32, optional: actions that are executed before the answer is
                                   there, which begins with them
    Result keys
        "actions"                  [H, 8] float32, the layout of `Action`, metres
    It may say which cameras it takes: `image_sizes`, view → (width, height), as
    `spear.embodiments.observations.get_image_sizes` returns them.
    """

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]: ...

    def infer_batch(self, observations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]: ...
