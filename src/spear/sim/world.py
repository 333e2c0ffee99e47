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

from spear.embodiments.inverse_kinematics import Floats, euclidean_norm
from spear.sim.control import FINGER_TRAVEL, HIDDEN_GROUP, SUBSTEPS, Servo
from spear.sim.objects import OBJECT_KINDS, ObjectKind
from spear.sim.scene import SOURCE_INDEX, TARGET_INDEX, SceneAppearance, SceneSpec
from spear.sim.textures import UNSEEN_TEXTURES, WILD_TEXTURES, draw_texture

SIMULATOR_VERSION = f"MuJoCo {mujoco.__version__}"
"""Another one is another physics, and makes other pictures."""
GRIPPER_NAME = "robot gripper"
"""What the gripper is called among the instances of an image."""

SLOW, MOVED = 0.02, 0.02
"""An object rests when it is slower than this, m/s; a bystander that is displaced so far has moved, m."""
NEAR = 0.045
"""The gripper has reached an object when the middle of its finger tips is this close to it, m."""
LIFTED = 0.02
"""An object held by both fingers is grasped when it is this much higher than at the start, m."""

_FURTHER_WALLS = (
    ("wall_left", (3.0, 0.02, 1.6), (0.3, 2.4, 0.6)),
    ("wall_front", (0.02, 3.0, 1.6), (3.0, 0.0, 0.6)),
)
"""Name, half-sizes and position of the walls that only closed rooms have, m, base frame."""

_SOLIDS = ("box", "cylinder", "capsule", "ellipsoid")
_SHAPES = {name: getattr(mujoco.mjtGeom, f"mjGEOM_{name.upper()}") for name in _SOLIDS}


@dataclass(frozen=True)
class Body:
    """An object of the scene: its body id in the model, and its visible extent's corners, in its frame, m."""

    kind: ObjectKind
    index: int
    low: Floats
    high: Floats


class World:
    """The state of one scene. Poses are in the base frame: metres, quaternions (w, x, y, z)."""

    def __init__(self, spec: SceneSpec) -> None:
        self.spec = spec
        self.model = _compile(spec)
        self.data = mujoco.MjData(self.model)
        kinds = enumerate(OBJECT_KINDS[thing.kind] for thing in spec.objects)
        self.bodies = tuple(
            Body(k, self.model.body(f"object{i}").id, *_extent(k)) for i, k in kinds
        )
        self.servo = Servo(self.model, self.data)
        of_body = np.zeros(self.model.nbody, np.int32)
        of_body[[body.index for body in self.bodies]] = np.arange(len(self.bodies)) + 1
        of_body[[self.model.body(name).id for name in ("hand", "finger1", "finger2")]] = (
            len(self.bodies) + 1
        )
        self.instance_of_geom = np.append(of_body[self.model.geom_bodyid], np.int32(0))
        """[ngeom + 1] instance id of each geom: objects from 1, then the gripper; last entry: background."""
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
        self.start = self.positions()

    def _pose_clutter(self) -> None:
        """Lift the gripper until it touches nothing, then put the held object between the fingers."""
        position, rotation = self.servo.pose()
        for _ in range(20):
            if not np.isin(self._contact_bodies(), self._robot_bodies).any():
                break
            position[2] += 0.02
            self.servo.place(position, rotation, self.spec.opening)
            mujoco.mj_forward(self.model, self.data)
        if self.spec.held_object is not None:
            body = self.bodies[self.spec.held_object]
            assert body.kind.grasp is not None
            center, half = (np.array(v) for v in body.kind.grasp)
            self.servo.place(position, rotation, float(half[1]) / FINGER_TRAVEL)
            ee, turn = self.servo.pose()
            matrix = np.empty(9)
            mujoco.mju_quat2Mat(matrix, turn)
            start = self.model.jnt_qposadr[self.model.body_jntadr[body.index]]
            at = ee - (matrix.reshape(3, 3) * center).sum(1)
            self.data.qpos[start : start + 7] = np.concatenate([at, turn])
            mujoco.mj_forward(self.model, self.data)

    def _contact_bodies(self) -> NDArray[np.int32]:
        """[n, 2] body ids of the contacts."""
        contact = self.data.contact
        return self.model.geom_bodyid[contact.geom[contact.dist < 0.0005]]

    def position(self, index: int) -> Floats:
        """[3] position of object `index`."""
        return self.data.xpos[self.bodies[index].index].copy()

    def positions(self) -> Floats:
        """[objects, 3] position of each object."""
        return self.data.xpos[[body.index for body in self.bodies]]

    def matrix(self, index: int) -> Floats:
        """[3, 3] orientation of object `index`."""
        return self.data.xmat[self.bodies[index].index].reshape(3, 3).copy()

    def fingers_touching(self, index: int) -> int:
        """How many of the two fingers touch object `index`."""
        return sum(self.touching(self.bodies[index].index, finger) for finger in self._fingers)

    def touching(self, a: int, b: int) -> bool:
        """Whether two bodies of the model touch."""
        pairs = self._contact_bodies()
        return bool((((pairs == (a, b)) | (pairs == (b, a))).all(axis=1)).any())


def measure_milestones(world: World) -> dict[str, bool]:
    """How far the task of a scene is now.

    reached             the gripper is at the object to be moved.
    grasped             it is between both fingers and lifted.
    success             it rests, released, on (in) the target.
    wrong_object_moved  an object that is neither source nor target has been displaced.
    """
    touching = world.fingers_touching(SOURCE_INDEX)
    ee, _ = world.servo.pose()
    displaced, start = (
        world.positions() - world.start,
        world.model.body_dofadr[world.bodies[SOURCE_INDEX].index],
    )
    speed = euclidean_norm(world.data.qvel[start : start + 3])
    return {
        "reached": euclidean_norm(ee - world.position(SOURCE_INDEX)) < NEAR,
        "grasped": bool(touching == 2 and displaced[SOURCE_INDEX, 2] > LIFTED),
        "success": touching == 0 and speed < SLOW and is_source_on_target(world),
        "wrong_object_moved": bool((np.linalg.norm(displaced[2:], axis=1) > MOVED).any()),
    }


def is_source_on_target(world: World) -> bool:
    """Whether the object to be moved lies on or in the target, held or not."""
    source, target = world.bodies[SOURCE_INDEX], world.bodies[TARGET_INDEX]
    kind, frame = target.kind, world.matrix(TARGET_INDEX)
    assert kind.inside is not None, "a scene without a task"
    if frame[2, 2] < 0.95 or not world.touching(source.index, target.index):
        return False
    local = (frame.T * (world.position(SOURCE_INDEX) - world.position(TARGET_INDEX))).sum(1)
    half_x, half_y, floor = kind.inside
    x, y = local[0] / half_x, local[1] / half_y
    within = x * x + y * y < 1 if kind.inside_round else max(abs(x), abs(y)) < 1
    return bool(within and local[2] > floor)


def _extent(kind: ObjectKind) -> tuple[Floats, Floats]:
    """Corners of the axis-aligned box around a kind's visible parts, in its frame."""
    lows, highs, rotation = [], [], np.empty(9)
    for part in (part for part in kind.parts if part.visible):
        mujoco.mju_quat2Mat(rotation, _euler_quat(part.euler))
        half = half_extent(_SHAPES[part.shape], np.array(part.size), rotation.reshape(3, 3))
        lows.append(np.array(part.pos) - half)
        highs.append(np.array(part.pos) + half)
    return np.min(lows, axis=0), np.max(highs, axis=0)


def half_extent(shape: int, size: Floats, m: Floats) -> Floats:
    """[3] half the extent of a primitive (MuJoCo's geom type and size) along axes in which it is turned by
    `m`."""
    if shape == mujoco.mjtGeom.mjGEOM_BOX:
        return np.abs(m) @ size
    if shape == mujoco.mjtGeom.mjGEOM_ELLIPSOID:
        return np.sqrt((m**2) @ (size**2))
    if shape == mujoco.mjtGeom.mjGEOM_CAPSULE:
        return size[0] + size[1] * np.abs(m[:, 2])
    return size[0] * np.sqrt(np.maximum(0.0, 1 - m[:, 2] ** 2)) + size[1] * np.abs(m[:, 2])


def _euler_quat(euler: tuple[float, float, float]) -> Floats:
    quat = np.empty(4)
    mujoco.mju_euler2Quat(quat, np.array(euler), "XYZ")
    return quat


@functools.cache
def base_spec() -> mujoco.MjSpec:
    """What every scene shares (world.xml, with the arm in franka.xml), and its materials."""
    spec = mujoco.MjSpec.from_file(str(Path(__file__).with_suffix(".xml")))
    rng = np.random.default_rng(0)
    n = 128
    x, y = np.meshgrid(np.arange(n) / n, np.arange(n) / n)
    wave = sum(
        np.sin(2 * math.pi * (k * x + p)) / k for k, p in ((3, 0.1), (7, 0.4), (17, 0.8), (31, 0.3))
    )
    wood = (
        0.86
        + 0.07 * wave
        + 0.03 * np.sin(2 * math.pi * (2 * y + 0.2 * np.sin(2 * math.pi * 2 * x)))
    )
    planks = (
        wood
        * (1 - 0.25 * ((x * 4) % 1 < 0.04))
        * (0.92 + 0.08 * rng.random(4)[(x * 4).astype(int)])
    )
    cloth = 0.90 + 0.05 * np.sign(np.sin(2 * math.pi * 32 * x)) * np.sign(
        np.sin(2 * math.pi * 32 * y)
    )
    cloth = cloth + rng.normal(0, 0.02, (n, n))
    tiles = (
        0.95 - 0.20 * (((x * 2) % 1 < 0.03) | ((y * 2) % 1 < 0.03)) + rng.normal(0, 0.008, (n, n))
    )
    images = {"plain": None, "wood": wood, "planks": planks, "cloth": cloth, "tiles": tiles}
    for name, image in images.items():
        look = {"specular": 0.2, "shininess": 0.3, "texuniform": True, "texrepeat": [3, 3]}
        material = spec.add_material(name=name, **look)
        if image is not None:
            size = {"width": n, "height": n, "nchannel": 3}
            texture = spec.add_texture(name=name, type=mujoco.mjtTexture.mjTEXTURE_2D, **size)
            pixels = (np.clip(image, 0, 1) * 255).astype(np.uint8)
            texture.data = np.repeat(pixels[..., None], 3, axis=-1).tobytes()
            material.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = name
    for name in (*WILD_TEXTURES, *UNSEEN_TEXTURES):
        _add_material(spec, name, draw_texture(name))
    return spec


def _add_material(spec: mujoco.MjSpec, name: str, gray: NDArray[np.uint8]) -> None:
    """Add a material with a gray texture [n, n] to a model."""
    side = len(gray)
    texture = spec.add_texture(
        name=name, type=mujoco.mjtTexture.mjTEXTURE_2D, width=side, height=side, nchannel=3
    )
    texture.data = np.repeat(gray[..., None], 3, axis=-1).tobytes()
    material = spec.add_material(
        name=name, specular=0.2, shininess=0.3, texuniform=True, texrepeat=[3, 3]
    )
    material.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = name


def _compile(scene: SceneSpec) -> mujoco.MjModel:
    spec = base_spec().copy()
    look = scene.appearance
    _furnish(spec, look)
    for geom in spec.worldbody.geoms:
        surface = geom.name.partition("_")[0]
        if surface in look.surfaces:
            geom.material, color = look.surfaces[surface]
            geom.rgba = [*color, 1.0]
    for i, thing in enumerate(scene.objects):
        kind = OBJECT_KINDS[thing.kind]
        body = spec.worldbody.add_body(name=f"object{i}", pos=thing.position, quat=thing.rotation)
        if not kind.fixed:
            body.add_freejoint()
        solid = sum(part.solid for part in kind.parts)
        for part in kind.parts:
            geom = body.add_geom(
                type=_SHAPES[part.shape], pos=part.pos, quat=_euler_quat(part.euler)
            )
            geom.size[: len(part.size)] = part.size
            geom.rgba = [*(part.color or thing.color), 1.0]
            geom.group = 0 if part.visible else HIDDEN_GROUP
            geom.mass = kind.mass / solid if part.solid else 0.0
            geom.friction = (0.9, 0.02, 0.002)
            geom.condim = 4
            geom.contype, geom.conaffinity = (1, 3) if part.solid else (0, 0)
    model = spec.compile()
    back = np.array(look.camera) - look.target
    back /= euclidean_norm(back)
    right = np.cross([0, 0, 1.0], back)
    right /= euclidean_norm(right)
    camera, light = model.camera("external"), model.light("light")
    mujoco.mju_mat2Quat(camera.quat, np.stack([right, np.cross(back, right), back], axis=1).ravel())
    camera.pos, camera.fovy = look.camera, look.fovy_deg
    light.dir, light.diffuse, light.ambient = look.light, look.diffuse, look.ambient
    if not look.is_robot_visible:
        first, last = model.body("link0").id, model.body("finger2").id
        is_robot = (model.geom_bodyid >= first) & (model.geom_bodyid <= last)
        model.geom_rgba[is_robot, 3] = 0.0  # MuJoCo draws nothing that is fully transparent
    return model


def _furnish(spec: mujoco.MjSpec, look: SceneAppearance) -> None:
    """Table, floor, walls and further lights, where a world has others than the usual ones."""
    if look.table_half_size_m is not None:
        half_x, half_y = look.table_half_size_m
        spec.geom("table").size[:2] = half_x, half_y
    if look.table_height_m is not None:
        spec.geom("floor").pos[2] = -look.table_height_m
    if look.has_four_walls:
        for name, size, position in _FURTHER_WALLS:
            spec.worldbody.add_geom(
                name=name,
                type=mujoco.mjtGeom.mjGEOM_BOX,
                size=size,
                pos=position,
                contype=0,
                conaffinity=0,
            )
    for direction, color in look.fill_lights:
        spec.worldbody.add_light(
            type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL,
            castshadow=False,
            dir=direction,
            diffuse=color,
            ambient=(0.0, 0.0, 0.0),
            specular=(0.0, 0.0, 0.0),
        )
