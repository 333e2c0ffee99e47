"""A scene as a compiled MuJoCo model: bodies, surfaces, light, cameras, and the milestones of its task.

The model has the objects of the scene only. Textures and materials are the same in every model, so that one
rendering context serves them all (see `spear.sim.render`).
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import mujoco
import numpy as np
from numpy.typing import NDArray

from spear.sim.control import FINGER_TRAVEL, HIDDEN_GROUP, Servo, length
from spear.sim.objects import KINDS, Kind, Part
from spear.sim.scene import SceneSpec

SUBSTEPS = 50
"""Physics steps (of 4 ms) per control step: 5 Hz."""
MATERIALS = ("plain", "wood", "planks", "cloth", "tiles")
GRIPPER = "robot gripper"
"""What the gripper is called among the instances of an image."""

SLOW = 0.02
"""An object rests when it is slower than this, m/s."""
NEAR = 0.045
"""The gripper has reached an object when the middle of its finger tips is this close to it, m."""
LIFTED = 0.02
"""An object held by both fingers is grasped when it is this much higher than at the start, m."""
MOVED = 0.02
"""A bystander counts as moved from this displacement on, m."""

Floats = NDArray[np.float64]
_SHAPES = {
    name: getattr(mujoco.mjtGeom, f"mjGEOM_{name.upper()}")
    for name in ("box", "cylinder", "capsule", "ellipsoid", "sphere")
}
_SOLID_FRICTION = (0.9, 0.02, 0.002)


@dataclass(frozen=True)
class Body:
    """An object of the scene in the model.

    index     its body id; qpos: where its seven numbers start in qpos, or None when it does not move.
    low, high corners of its visible extent in its own frame, m.
    """

    name: str
    kind: Kind
    index: int
    qpos: int | None
    low: Floats
    high: Floats


class World:
    """The state of one scene. Poses are in the base frame: metres, quaternions (w, x, y, z)."""

    def __init__(self, spec: SceneSpec) -> None:
        self.spec = spec
        self.model = _compile(spec)
        self.data = mujoco.MjData(self.model)
        self.bodies = tuple(self._body(i) for i in range(len(spec.things)))
        self.servo = Servo(self.model, self.data)
        self.instance_of_geom = self._instances()
        self._fingers = tuple(self.model.body(f"finger{k}").id for k in (1, 2))
        self._robot_bodies = range(self.model.body("link0").id, self.model.body("finger2").id + 1)
        self.reset()

    def reset(self) -> None:
        """Back to the start of the scene: arm at its start pose, objects at rest."""
        mujoco.mj_resetData(self.model, self.data)
        spec = self.spec
        self.servo.place(np.array(spec.ee_position), np.array(spec.ee_rotation), spec.opening)
        mujoco.mj_forward(self.model, self.data)
        if spec.family == "clutter":
            self._pose_clutter()
        else:
            mujoco.mj_step(self.model, self.data, SUBSTEPS)
        self.start = np.array([self.position(i) for i in range(len(self.bodies))])

    def _pose_clutter(self) -> None:
        """Lift the gripper until it touches nothing, then put the held object between the fingers."""
        position, rotation = self.servo.pose()
        for _ in range(20):
            if not np.isin(self._contact_bodies(), self._robot_bodies).any():
                break
            position[2] += 0.02
            self.servo.place(position, rotation, self.spec.opening)
            mujoco.mj_forward(self.model, self.data)
        held = self.spec.held
        if held is not None:
            body = self.bodies[held]
            assert body.kind.grasp is not None and body.qpos is not None
            center, half = (np.array(v) for v in body.kind.grasp)
            self.servo.place(position, rotation, float(half[1]) / FINGER_TRAVEL)
            ee, turn = self.servo.pose()
            matrix = np.empty(9)
            mujoco.mju_quat2Mat(matrix, turn)
            self.data.qpos[body.qpos : body.qpos + 3] = ee - (matrix.reshape(3, 3) * center).sum(1)
            self.data.qpos[body.qpos + 3 : body.qpos + 7] = turn
            mujoco.mj_forward(self.model, self.data)

    def _contact_bodies(self) -> NDArray[np.int32]:
        """[n, 2] body ids of the contacts."""
        contact = self.data.contact
        return self.model.geom_bodyid[contact.geom[contact.dist < 0.0005]]

    def position(self, index: int) -> Floats:
        """[3] position of object `index`."""
        return self.data.xpos[self.bodies[index].index].copy()

    def matrix(self, index: int) -> Floats:
        """[3, 3] orientation of object `index`."""
        return self.data.xmat[self.bodies[index].index].reshape(3, 3).copy()

    def speed(self, index: int) -> float:
        """Linear speed of object `index`, m/s."""
        body = self.bodies[index]
        if body.qpos is None:
            return 0.0
        start = self.model.body_dofadr[body.index]
        return length(self.data.qvel[start : start + 3])

    def fingers_touching(self, index: int) -> int:
        """How many of the two fingers touch object `index`."""
        pairs = self._contact_bodies()
        body = self.bodies[index].index
        others = np.concatenate([pairs[pairs[:, 0] == body, 1], pairs[pairs[:, 1] == body, 0]])
        return sum(int((others == finger).any()) for finger in self._fingers)

    def touching(self, one: int, other: int) -> bool:
        """Whether objects `one` and `other` touch."""
        pairs = self._contact_bodies()
        a, b = self.bodies[one].index, self.bodies[other].index
        return bool((((pairs == (a, b)) | (pairs == (b, a))).all(axis=1)).any())

    def _body(self, i: int) -> Body:
        thing = self.spec.things[i]
        kind = KINDS[thing.kind]
        handle = self.model.body(f"object{i}")
        joint = int(self.model.body_jntadr[handle.id])
        corners = [_extent(part) for part in kind.parts if part.visible]
        return Body(
            name=thing.kind,
            kind=kind,
            index=int(handle.id),
            qpos=int(self.model.jnt_qposadr[joint]) if joint >= 0 else None,
            low=np.min([low for low, _ in corners], axis=0),
            high=np.max([high for _, high in corners], axis=0),
        )

    def _instances(self) -> NDArray[np.int32]:
        """[ngeom + 1] instance id of each geom: objects from 1, then the gripper; last entry: background."""
        result = np.zeros(self.model.ngeom + 1, np.int32)
        for i, body in enumerate(self.bodies):
            result[:-1][self.model.geom_bodyid == body.index] = i + 1
        for name in ("hand", "finger1", "finger2"):
            result[:-1][self.model.geom_bodyid == self.model.body(name).id] = len(self.bodies) + 1
        return result


def milestones(world: World) -> dict[str, bool]:
    """How far the task of a scene is now.

    reached             the gripper is at the object to be moved.
    grasped             it is between both fingers and lifted.
    success             it rests, released, on (in) the target.
    wrong_object_moved  an object that is neither source nor target has been displaced.
    """
    source, target = roles(world)
    touching = world.fingers_touching(source)
    position = world.position(source)
    ee, _ = world.servo.pose()
    displaced = np.array([world.position(i) for i in range(len(world.bodies))]) - world.start
    bystander = [i for i in range(len(world.bodies)) if i not in (source, target)]
    return {
        "reached": length(ee - position) < NEAR,
        "grasped": bool(touching == 2 and displaced[source, 2] > LIFTED),
        "success": touching == 0 and world.speed(source) < SLOW and placed(world),
        "wrong_object_moved": bool((np.linalg.norm(displaced[bystander], axis=1) > MOVED).any()),
    }


def placed(world: World) -> bool:
    """Whether the object to be moved lies on or in the target, held or not."""
    source, target = roles(world)
    kind = world.bodies[target].kind
    assert kind.inside is not None
    frame = world.matrix(target)
    if frame[2, 2] < 0.95 or not world.touching(source, target):
        return False
    local = (frame.T * (world.position(source) - world.position(target))).sum(1)
    half_x, half_y, floor = kind.inside
    x, y = local[0] / half_x, local[1] / half_y
    within = x * x + y * y < 1 if kind.inside_round else max(abs(x), abs(y)) < 1
    return bool(within and local[2] > floor)


def roles(world: World) -> tuple[int, int]:
    """Indices of the object to be moved and of where it goes."""
    source, target = world.spec.source, world.spec.target
    assert source is not None and target is not None, "a scene without a task"
    return source, target


def _extent(part: Part) -> tuple[Floats, Floats]:
    """Corners of a part's axis-aligned extent in its object's frame."""
    rotation = np.empty(9)
    mujoco.mju_quat2Mat(rotation, _euler_quat(part.euler))
    half = half_extent(_SHAPES[part.shape], np.array(part.size), rotation.reshape(3, 3))
    return np.array(part.pos) - half, np.array(part.pos) + half


def half_extent(shape: int, size: Floats, m: Floats) -> Floats:
    """[3] half the extent of a primitive (MuJoCo's geom type and size) along axes in which it is turned by
    `m`."""
    if shape == mujoco.mjtGeom.mjGEOM_BOX:
        return np.abs(m) @ size
    if shape == mujoco.mjtGeom.mjGEOM_ELLIPSOID:
        return np.sqrt((m**2) @ (size**2))
    if shape == mujoco.mjtGeom.mjGEOM_SPHERE:
        return np.full(3, size[0])
    if shape == mujoco.mjtGeom.mjGEOM_CAPSULE:
        return size[0] + size[1] * np.abs(m[:, 2])
    return size[0] * np.sqrt(np.maximum(0.0, 1 - m[:, 2] ** 2)) + size[1] * np.abs(m[:, 2])


def _euler_quat(euler: tuple[float, float, float]) -> Floats:
    quat = np.empty(4)
    mujoco.mju_euler2Quat(quat, np.array(euler), "XYZ")
    return quat


@functools.cache
def base_spec() -> mujoco.MjSpec:
    """What every scene shares (world.xml, with the arm in arm.xml), and its materials."""
    spec = mujoco.MjSpec.from_file(str(Path(__file__).with_suffix(".xml")))
    _add_materials(spec)
    return spec


def _add_materials(spec: mujoco.MjSpec) -> None:
    rng = np.random.default_rng(0)
    n = 128
    x, y = np.meshgrid(np.arange(n) / n, np.arange(n) / n)
    wave = sum(np.sin(2 * math.pi * (k * x + p)) / k for k, p in ((3, 0.1), (7, 0.4), (17, 0.8), (31, 0.3)))
    wood = 0.86 + 0.07 * wave + 0.03 * np.sin(2 * math.pi * (2 * y + 0.2 * np.sin(2 * math.pi * 2 * x)))
    planks = wood * (1 - 0.25 * ((x * 4) % 1 < 0.04)) * (0.92 + 0.08 * rng.random(4)[(x * 4).astype(int)])
    cloth = 0.90 + 0.05 * np.sign(np.sin(2 * math.pi * 32 * x)) * np.sign(np.sin(2 * math.pi * 32 * y))
    cloth = cloth + rng.normal(0, 0.02, (n, n))
    tiles = 0.95 - 0.20 * (((x * 2) % 1 < 0.03) | ((y * 2) % 1 < 0.03)) + rng.normal(0, 0.008, (n, n))
    for name, image in (("wood", wood), ("planks", planks), ("cloth", cloth), ("tiles", tiles)):
        texture = spec.add_texture(
            name=name, type=mujoco.mjtTexture.mjTEXTURE_2D, width=n, height=n, nchannel=3
        )
        pixels = (np.clip(image, 0, 1) * 255).astype(np.uint8)
        texture.data = np.repeat(pixels[..., None], 3, axis=-1).tobytes()
    for name in MATERIALS:
        material = spec.add_material(
            name=name, specular=0.2, shininess=0.3, texuniform=True, texrepeat=[3, 3]
        )
        if name != "plain":
            material.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = name


def _compile(scene: SceneSpec) -> mujoco.MjModel:
    spec = base_spec().copy()
    look = scene.look
    for name in ("table", "floor", "wall", "wall_side"):
        surface = name.partition("_")[0]
        geom = spec.geom(name)
        geom.material = getattr(look, surface)
        geom.rgba = [*getattr(look, f"{surface}_color"), 1.0]
    for i, thing in enumerate(scene.things):
        kind = KINDS[thing.kind]
        body = spec.worldbody.add_body(name=f"object{i}", pos=thing.position, quat=thing.rotation)
        if not kind.fixed:
            body.add_freejoint()
        solid = sum(part.solid for part in kind.parts)
        for part in kind.parts:
            _add_part(body, part, thing.color, kind.mass / solid)
    model = spec.compile()
    _apply_look(model, scene)
    return model


def _add_part(body: mujoco.MjsBody, part: Part, color: tuple[float, float, float], mass: float) -> None:
    geom = body.add_geom(type=_SHAPES[part.shape], pos=part.pos, quat=_euler_quat(part.euler))
    geom.size[: len(part.size)] = part.size
    geom.rgba = [*(part.color or color), 1.0]
    geom.group = 0 if part.visible else HIDDEN_GROUP
    geom.mass = mass if part.solid else 0.0
    geom.friction = _SOLID_FRICTION
    geom.condim = 4
    geom.contype, geom.conaffinity = (1, 3) if part.solid else (0, 0)


def _apply_look(model: mujoco.MjModel, scene: SceneSpec) -> None:
    look = scene.look
    camera = model.camera("external").id
    position, target = np.array(look.camera), np.array(look.target)
    back = position - target
    back /= length(back)
    right = np.cross([0, 0, 1.0], back)
    right /= length(right)
    rotation = np.stack([right, np.cross(back, right), back], axis=1)
    quat = np.empty(4)
    mujoco.mju_mat2Quat(quat, rotation.ravel())
    model.cam_pos[camera] = position
    model.cam_quat[camera] = quat
    model.cam_fovy[camera] = look.fovy
    model.light_dir[0] = look.light
    model.light_diffuse[0] = look.diffuse
    model.light_ambient[0] = look.ambient
