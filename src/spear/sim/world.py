"""A scene as a compiled MuJoCo model: bodies, surfaces, light, cameras, and the milestones of its
task.

The model has the objects of the scene only. Textures and materials are the same in every model, so
that one rendering context serves them all (see `spear.sim.render`).
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from spear.embodiments.inverse_kinematics import Floats, euclidean_norm
from spear.sim.control import (
    FINGER_TRAVEL_M,
    HIDDEN_GROUP,
    PHYSICS_STEPS_PER_CONTROL_STEP,
    Servo,
)
from spear.sim.objects import OBJECT_KINDS, ObjectKind, Primitive
from spear.sim.scene import SOURCE_INDEX, TARGET_INDEX, SceneAppearance, SceneObject, SceneSpec
from spear.sim.textures import UNSEEN_TEXTURES, WILD_TEXTURES, draw_texture

SIMULATOR_VERSION = f"MuJoCo {mujoco.__version__}"
"""Another version has other physics, and makes other pictures."""
GRIPPER_NAME = "robot gripper"
"""What the gripper is called among the instances of an image."""

# Milestones of a task.
MAX_REST_SPEED_M_S = 0.02  # an object that is slower rests
MIN_DISPLACEMENT_M = 0.02  # a bystander that is displaced so far has moved
REACHED_DISTANCE_M = 0.045  # from the middle of the finger tips to the object
MIN_LIFT_M = 0.02  # an object between both fingers is grasped when it is so much higher

MAX_CONTACT_GAP_M = 0.0005  # bodies that are closer touch
CLUTTER_LIFT_M = 0.02  # by which the gripper is raised until it touches nothing
NUM_CLUTTER_LIFTS = 20
TEXTURE_SIDE_PX = 128

_FURTHER_WALLS = (
    ("wall_left", (3.0, 0.02, 1.6), (0.3, 2.4, 0.6)),
    ("wall_front", (0.02, 3.0, 1.6), (3.0, 0.0, 0.6)),
)
"""Name, half-sizes and position of the walls that only closed rooms have, m, base frame."""

_GEOM_TYPES = {
    "box": mujoco.mjtGeom.mjGEOM_BOX,
    "cylinder": mujoco.mjtGeom.mjGEOM_CYLINDER,
    "capsule": mujoco.mjtGeom.mjGEOM_CAPSULE,
    "ellipsoid": mujoco.mjtGeom.mjGEOM_ELLIPSOID,
}


@dataclass(frozen=True)
class Body:
    """An object of the scene.

    kind   its kind.
    index  its body id in the model.
    low    [3] lower corner of its visible extent, in its frame, m.
    high   [3] upper corner.
    """

    kind: ObjectKind
    index: int
    low: Floats
    high: Floats


class World:
    """The state of one scene. Poses are in the base frame: meters, quaternions (w, x, y, z).

    spec              the scene.
    model, data       MuJoCo's.
    bodies            the objects, in the order of the scene.
    servo             moves the arm.
    instance_of_geom  [ngeom + 1] instance id of each geom: objects from 1, then the gripper; the
                      last entry is the background's, 0.
    start_positions   [objects, 3] where the objects were at the start.
    """

    def __init__(self, spec: SceneSpec) -> None:
        self.spec = spec
        self.model = _compile_model(spec)
        self.data = mujoco.MjData(self.model)
        self.bodies = tuple(
            self._make_body(index, scene_object.kind)
            for index, scene_object in enumerate(spec.objects)
        )
        self.servo = Servo(self.model, self.data)
        self.instance_of_geom = self._number_instances()
        self._fingers = (self.model.body("finger1").id, self.model.body("finger2").id)
        self._robot_bodies = range(self.model.body("link0").id, self.model.body("finger2").id + 1)
        self.reset()

    def _make_body(self, index: int, kind_name: str) -> Body:
        kind = OBJECT_KINDS[kind_name]
        low, high = _measure_extent(kind)
        return Body(kind, self.model.body(f"object{index}").id, low, high)

    def _number_instances(self) -> NDArray[np.int32]:
        instance_of_body = np.zeros(self.model.nbody, np.int32)
        for instance, body in enumerate(self.bodies, 1):
            instance_of_body[body.index] = instance
        for name in ("hand", "finger1", "finger2"):
            instance_of_body[self.model.body(name).id] = len(self.bodies) + 1
        background = np.int32(0)
        return np.append(instance_of_body[self.model.geom_bodyid], background)

    def reset(self) -> None:
        """Return to the start of the scene: arm at its start pose, objects at rest."""
        mujoco.mj_resetData(self.model, self.data)
        spec = self.spec
        self.servo.set_pose(np.array(spec.ee_position), np.array(spec.ee_rotation), spec.opening)
        mujoco.mj_forward(self.model, self.data)
        if spec.family == "clutter":
            self._pose_clutter()
        else:
            mujoco.mj_step(self.model, self.data, PHYSICS_STEPS_PER_CONTROL_STEP)
        self.start_positions = self.object_positions()

    def _pose_clutter(self) -> None:
        """Lift the gripper until it touches nothing, then put the held object between the
        fingers."""
        position, rotation = self.servo.measure_pose()
        for _ in range(NUM_CLUTTER_LIFTS):
            if not np.isin(self._contact_bodies(), self._robot_bodies).any():
                break
            position[2] += CLUTTER_LIFT_M
            self.servo.set_pose(position, rotation, self.spec.opening)
            mujoco.mj_forward(self.model, self.data)
        if self.spec.held_object is not None:
            self._put_between_fingers(self.bodies[self.spec.held_object], position, rotation)

    def _put_between_fingers(self, body: Body, position: Floats, rotation: Floats) -> None:
        """Close the gripper at a pose around an object, which is put there."""
        assert body.kind.grasp is not None
        center = np.array(body.kind.grasp[0])
        half = np.array(body.kind.grasp[1])
        self.servo.set_pose(position, rotation, float(half[1]) / FINGER_TRAVEL_M)

        ee_position, ee_rotation = self.servo.measure_pose()
        matrix = np.empty(9)
        mujoco.mju_quat2Mat(matrix, ee_rotation)
        object_position = ee_position - (matrix.reshape(3, 3) * center).sum(1)
        start = self.model.jnt_qposadr[self.model.body_jntadr[body.index]]
        self.data.qpos[start : start + 7] = np.concatenate([object_position, ee_rotation])
        mujoco.mj_forward(self.model, self.data)

    def object_position(self, index: int) -> Floats:
        """[3] position of object `index`."""
        return self.data.xpos[self.bodies[index].index].copy()

    def object_positions(self) -> Floats:
        """[objects, 3] position of each object."""
        return self.data.xpos[[body.index for body in self.bodies]]

    def object_rotation(self, index: int) -> Floats:
        """[3, 3] orientation of object `index`."""
        return self.data.xmat[self.bodies[index].index].reshape(3, 3).copy()

    def count_touching_fingers(self, index: int) -> int:
        """Return how many of the two fingers touch object `index`."""
        body_id = self.bodies[index].index
        return sum(self.are_touching(body_id, finger) for finger in self._fingers)

    def are_touching(self, first_body: int, second_body: int) -> bool:
        """Return whether two bodies of the model touch."""
        pairs = self._contact_bodies()
        is_pair = (pairs == (first_body, second_body)) | (pairs == (second_body, first_body))
        return bool(is_pair.all(axis=1).any())

    def _contact_bodies(self) -> NDArray[np.int32]:
        """[n, 2] body ids of the contacts."""
        contact = self.data.contact
        return self.model.geom_bodyid[contact.geom[contact.dist < MAX_CONTACT_GAP_M]]


def measure_milestones(world: World) -> dict[str, bool]:
    """Return how far the task of a scene is now.

    reached             the gripper is at the object to be moved.
    grasped             it is between both fingers and lifted.
    success             it rests, released, on (in) the target.
    wrong_object_moved  an object that is neither source nor target has been displaced.
    """
    num_touching = world.count_touching_fingers(SOURCE_INDEX)
    ee_position, _ = world.servo.measure_pose()
    ee_distance_m = euclidean_norm(ee_position - world.object_position(SOURCE_INDEX))
    displacement = world.object_positions() - world.start_positions
    bystander_displacement_m = np.linalg.norm(displacement[2:], axis=1)

    # The index of the object's velocity in `qvel`: three numbers in m/s, then three in rad/s
    first_velocity = world.model.body_dofadr[world.bodies[SOURCE_INDEX].index]
    speed_m_s = euclidean_norm(world.data.qvel[first_velocity : first_velocity + 3])
    is_resting = num_touching == 0 and speed_m_s < MAX_REST_SPEED_M_S
    is_lifted = displacement[SOURCE_INDEX, 2] > MIN_LIFT_M
    return {
        "reached": ee_distance_m < REACHED_DISTANCE_M,
        "grasped": bool(num_touching == 2 and is_lifted),
        "success": is_resting and is_source_on_target(world),
        "wrong_object_moved": bool((bystander_displacement_m > MIN_DISPLACEMENT_M).any()),
    }


def is_source_on_target(world: World) -> bool:
    """Return whether the object to be moved lies on or in the target, held or not."""
    source = world.bodies[SOURCE_INDEX]
    target = world.bodies[TARGET_INDEX]
    axes = world.object_rotation(TARGET_INDEX)
    assert target.kind.inside is not None, "a scene without a task"
    # The cosine of the target's tilt: up to 18° it counts as upright.
    is_upright = axes[2, 2] >= 0.95
    if not is_upright or not world.are_touching(source.index, target.index):
        return False
    offset = world.object_position(SOURCE_INDEX) - world.object_position(TARGET_INDEX)
    # The product of the matrix `axes.T` and `offset`: the offset [3] (m) along the target's axes
    local_offset = (axes.T * offset).sum(1)
    # Half the sides of the area in which an object counts as placed, and the area's height (m)
    half_x, half_y, floor = target.kind.inside
    x = local_offset[0] / half_x
    y = local_offset[1] / half_y
    # The area is an ellipse or a rectangle; x and y are 1 or -1 at its border.
    is_inside = x * x + y * y < 1 if target.kind.inside_round else max(abs(x), abs(y)) < 1
    return bool(is_inside and local_offset[2] > floor)


# --- Extents ---


def _measure_extent(kind: ObjectKind) -> tuple[Floats, Floats]:
    """Return the corners of the axis-aligned box around a kind's visible parts, in its frame."""
    lows = []
    highs = []
    rotation = np.empty(9)
    for primitive in kind.primitives:
        if not primitive.visible:
            continue
        mujoco.mju_quat2Mat(rotation, _euler_to_quaternion(primitive.euler))
        half = half_extent(
            _GEOM_TYPES[primitive.shape], np.array(primitive.size), rotation.reshape(3, 3)
        )
        lows.append(np.array(primitive.pos) - half)
        highs.append(np.array(primitive.pos) + half)
    return np.min(lows, axis=0), np.max(highs, axis=0)


def half_extent(shape: int, size: Floats, rotation: Floats) -> Floats:
    """Return half the extent [3] of a primitive along axes in which it is rotated.

    Args:
        shape: MuJoCo's geom type.
        size: MuJoCo's geom size, m.
        rotation: [3, 3] from the primitive's axes to those of the result.
    """
    if shape == mujoco.mjtGeom.mjGEOM_BOX:
        return np.abs(rotation) @ size
    if shape == mujoco.mjtGeom.mjGEOM_ELLIPSOID:
        return np.sqrt((rotation**2) @ (size**2))
    along_axis = size[1] * np.abs(rotation[:, 2])
    if shape == mujoco.mjtGeom.mjGEOM_CAPSULE:
        return size[0] + along_axis
    return size[0] * np.sqrt(np.maximum(0.0, 1 - rotation[:, 2] ** 2)) + along_axis


def _euler_to_quaternion(euler: tuple[float, float, float]) -> Floats:
    quaternion = np.empty(4)
    mujoco.mju_euler2Quat(quaternion, np.array(euler), "XYZ")
    return quaternion


# --- Models ---


@functools.cache
def base_spec() -> mujoco.MjSpec:
    """Return what every scene shares: world.xml, with the arm in franka.xml, and its materials."""
    spec = mujoco.MjSpec.from_file(str(Path(__file__).with_suffix(".xml")))
    _add_material(spec, "plain", None)
    for name, brightness in _draw_task_textures().items():
        pixels = (np.clip(brightness, 0, 1) * 255).astype(np.uint8)
        _add_material(spec, name, pixels)
    for name in (*WILD_TEXTURES, *UNSEEN_TEXTURES):
        _add_material(spec, name, draw_texture(name))
    return spec


def _draw_task_textures() -> dict[str, Any]:
    """Return the textures of scenes in the default world: name -> brightness [n, n]."""
    rng = np.random.default_rng(0)
    side = TEXTURE_SIDE_PX
    x, y = np.meshgrid(np.arange(side) / side, np.arange(side) / side)

    wave: Any = 0
    for frequency, phase in ((3, 0.1), (7, 0.4), (17, 0.8), (31, 0.3)):
        wave = wave + np.sin(2 * math.pi * (frequency * x + phase)) / frequency
    fiber = np.sin(2 * math.pi * (2 * y + 0.2 * np.sin(2 * math.pi * 2 * x)))
    wood = 0.86 + 0.07 * wave + 0.03 * fiber

    gap = 1 - 0.25 * ((x * 4) % 1 < 0.04)
    plank_brightness = 0.92 + 0.08 * rng.random(4)[(x * 4).astype(int)]
    planks = wood * gap * plank_brightness

    threads_x = np.sign(np.sin(2 * math.pi * 32 * x))
    threads_y = np.sign(np.sin(2 * math.pi * 32 * y))
    cloth = 0.90 + 0.05 * threads_x * threads_y
    cloth = cloth + rng.normal(0, 0.02, (side, side))

    is_joint = ((x * 2) % 1 < 0.03) | ((y * 2) % 1 < 0.03)
    tiles = 0.95 - 0.20 * is_joint + rng.normal(0, 0.008, (side, side))
    return {"wood": wood, "planks": planks, "cloth": cloth, "tiles": tiles}


def _add_material(spec: mujoco.MjSpec, name: str, gray: NDArray[np.uint8] | None) -> None:
    """Add a material to a model, with a gray texture [n, n] or none."""
    material = spec.add_material(
        name=name, specular=0.2, shininess=0.3, texuniform=True, texrepeat=[3, 3]
    )
    if gray is None:
        return
    side = len(gray)
    texture = spec.add_texture(
        name=name, type=mujoco.mjtTexture.mjTEXTURE_2D, width=side, height=side, nchannel=3
    )
    texture.data = np.repeat(gray[..., None], 3, axis=-1).tobytes()
    material.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = name


def _compile_model(scene: SceneSpec) -> mujoco.MjModel:
    appearance = scene.appearance
    spec = base_spec().copy()
    _furnish(spec, appearance)
    for geom in spec.worldbody.geoms:
        surface = geom.name.partition("_")[0]
        if surface in appearance.surfaces:
            geom.material, color = appearance.surfaces[surface]
            geom.rgba = [*color, 1.0]
    for index, scene_object in enumerate(scene.objects):
        _add_object(spec, f"object{index}", scene_object)

    model = spec.compile()
    _set_camera(model, appearance)
    light = model.light("light")
    light.dir = appearance.light
    light.diffuse = appearance.diffuse
    light.ambient = appearance.ambient
    if not appearance.is_robot_visible:
        _hide_robot(model)
    return model


def _furnish(spec: mujoco.MjSpec, appearance: SceneAppearance) -> None:
    """Set table, floor, walls and further lights, where a world has others than the usual ones."""
    if appearance.table_half_size_m is not None:
        half_x, half_y = appearance.table_half_size_m
        spec.geom("table").size[:2] = half_x, half_y
    if appearance.table_height_m is not None:
        spec.geom("floor").pos[2] = -appearance.table_height_m
    if appearance.has_four_walls:
        for name, size, position in _FURTHER_WALLS:
            spec.worldbody.add_geom(
                name=name,
                type=mujoco.mjtGeom.mjGEOM_BOX,
                size=size,
                pos=position,
                contype=0,
                conaffinity=0,
            )
    for direction, color in appearance.fill_lights:
        spec.worldbody.add_light(
            type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL,
            castshadow=False,
            dir=direction,
            diffuse=color,
            ambient=(0.0, 0.0, 0.0),
            specular=(0.0, 0.0, 0.0),
        )


def _add_object(spec: mujoco.MjSpec, name: str, scene_object: SceneObject) -> None:
    kind = OBJECT_KINDS[scene_object.kind]
    body = spec.worldbody.add_body(name=name, pos=scene_object.position, quat=scene_object.rotation)
    if not kind.fixed:
        body.add_freejoint()
    num_solid = sum(primitive.solid for primitive in kind.primitives)
    for primitive in kind.primitives:
        mass = kind.mass / num_solid if primitive.solid else 0.0
        _add_part(body, primitive, mass, primitive.color or scene_object.color)


def _add_part(
    body: Any, primitive: Primitive, mass_kg: float, color: tuple[float, float, float]
) -> None:
    geom = body.add_geom(
        type=_GEOM_TYPES[primitive.shape],
        pos=primitive.pos,
        quat=_euler_to_quaternion(primitive.euler),
    )
    geom.size[: len(primitive.size)] = primitive.size
    geom.rgba = [*color, 1.0]
    geom.group = 0 if primitive.visible else HIDDEN_GROUP
    geom.mass = mass_kg
    geom.friction = (0.9, 0.02, 0.002)
    geom.condim = 4
    geom.contype = 1 if primitive.solid else 0
    geom.conaffinity = 3 if primitive.solid else 0


def _set_camera(model: mujoco.MjModel, appearance: SceneAppearance) -> None:
    """Point the external camera at its target, upright."""
    back = np.array(appearance.camera) - appearance.target
    back /= euclidean_norm(back)
    right = np.cross([0, 0, 1.0], back)
    right /= euclidean_norm(right)
    up = np.cross(back, right)
    camera = model.camera("external")
    mujoco.mju_mat2Quat(camera.quat, np.stack([right, up, back], axis=1).ravel())
    camera.pos = appearance.camera
    camera.fovy = appearance.fovy_deg


def _hide_robot(model: mujoco.MjModel) -> None:
    first = model.body("link0").id
    last = model.body("finger2").id
    is_robot = (model.geom_bodyid >= first) & (model.geom_bodyid <= last)
    model.geom_rgba[is_robot, 3] = 0.0  # MuJoCo draws nothing that is fully transparent
