"""A scene as a compiled MuJoCo model with its state, and the milestones of its task.

A task moves the *source* on or into the *target* (`SOURCE_INDEX` and `TARGET_INDEX` in the scene's
objects). A model has only the objects of its scene, but textures and materials are the same in all
models, so that one rendering context serves them all (see `spear.sim.render`).
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from spear.embodiments.inverse_kinematics import Floats, compute_euclidean_norm
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
"""Results are stored with this version, because another version has other physics and images."""
GRIPPER_NAME = "robot gripper"
"""What the gripper is called among the instances of an image."""

# Milestones of a task.
MAX_REST_SPEED_M_S = 0.02  # a slower object counts as resting
MIN_DISPLACEMENT_M = 0.02  # another object that is displaced by more counts as moved
REACHED_DISTANCE_M = 0.045  # the source is reached if the end-effector is nearer than this
MIN_LIFT_M = 0.02  # a source between both fingers is grasped if it has been lifted by more

MAX_CONTACT_GAP_M = 0.0005  # bodies with a smaller gap touch
# In a scene without a task the gripper is raised by CLUTTER_LIFT_M until it is free, at most
# NUM_CLUTTER_LIFTS times.
CLUTTER_LIFT_M = 0.02
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

    kind     the object's kind.
    body_id  the object's body id in the model.
    low      [3], lower corner of the axis-aligned box around the visible parts, object's frame, m.
    high     [3], upper corner of this box.
    """

    kind: ObjectKind
    body_id: int
    low: Floats
    high: Floats


class World:
    """The state of one scene. Poses are in the base frame: meters, quaternions (w, x, y, z).

    spec              the scene.
    model, data       MuJoCo's model and state.
    bodies            the objects, in the order of the scene.
    servo             moves the arm.
    instance_of_geom  [ngeom + 1], instance id of each geom: objects from 1 on, then the gripper, 0
                      for all else. The last entry, 0, is for geom id -1, the background.
    start_positions   [num_objects, 3], positions of the objects at the start.
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
        self.instance_of_geom = self._compute_instance_of_geom()
        self._fingers = (self.model.body("finger1").id, self.model.body("finger2").id)
        self._robot_bodies = range(self.model.body("link0").id, self.model.body("finger2").id + 1)
        self.reset()

    def _make_body(self, index: int, kind_name: str) -> Body:
        """Return what the world keeps about object `index`."""
        kind = OBJECT_KINDS[kind_name]
        low, high = _measure_lower_and_upper_corner(kind)
        return Body(kind, self.model.body(f"object{index}").id, low, high)

    def _compute_instance_of_geom(self) -> NDArray[np.int32]:
        """Return the array `instance_of_geom`."""
        instance_of_body = np.zeros(self.model.nbody, np.int32)
        for instance, body in enumerate(self.bodies, 1):
            instance_of_body[body.body_id] = instance
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
            self._lift_gripper_and_place_held_object()
        else:
            mujoco.mj_step(self.model, self.data, PHYSICS_STEPS_PER_CONTROL_STEP)
        self.start_positions = self.get_object_positions()

    def _lift_gripper_and_place_held_object(self) -> None:
        """Lift the gripper until it touches nothing; then put the held object, if any, into it."""
        position, rotation = self.servo.measure_pose()
        for _ in range(NUM_CLUTTER_LIFTS):
            if not np.isin(self._list_contact_bodies(), self._robot_bodies).any():
                break
            position[2] += CLUTTER_LIFT_M
            self.servo.set_pose(position, rotation, self.spec.opening)
            mujoco.mj_forward(self.model, self.data)
        if self.spec.held_object is not None:
            self._pose_gripper_with_object(self.bodies[self.spec.held_object], position, rotation)

    def _pose_gripper_with_object(
        self, body: Body, gripper_position: Floats, gripper_rotation: Floats
    ) -> None:
        """Put the gripper at a pose, and an object between its fingers, with parallel axes.

        The gripper opens as wide as the object is along y, the axis along which the fingers close.
        """
        assert body.kind.grasp is not None
        # Center and half-sizes of the box to grasp, in the object's frame.
        center = np.array(body.kind.grasp[0])
        half_size = np.array(body.kind.grasp[1])
        opening = float(half_size[1]) / FINGER_TRAVEL_M
        self.servo.set_pose(gripper_position, gripper_rotation, opening)

        # The box's center has to be at the end-effector. The sum is the product of the matrix and
        # the vector `center`; unlike `@`, it rounds alike on every processor.
        ee_position, ee_rotation = self.servo.measure_pose()
        matrix = np.empty(9)
        mujoco.mju_quat2Mat(matrix, ee_rotation)
        object_position = ee_position - (matrix.reshape(3, 3) * center).sum(1)
        # The object's pose in `qpos`: position [3], then quaternion [4].
        object_joint = self.model.body_jntadr[body.body_id]
        first_qpos = self.model.jnt_qposadr[object_joint]
        self.data.qpos[first_qpos : first_qpos + 7] = np.concatenate([object_position, ee_rotation])
        mujoco.mj_forward(self.model, self.data)

    def get_object_position(self, index: int) -> Floats:
        """The position [3] of object `index`."""
        return self.data.xpos[self.bodies[index].body_id].copy()

    def get_object_positions(self) -> Floats:
        """The positions [num_objects, 3] of all objects."""
        return self.data.xpos[[body.body_id for body in self.bodies]]

    def get_object_rotation_matrix(self, index: int) -> Floats:
        """The orientation of object `index`: a matrix [3, 3], its columns are the object's axes."""
        return self.data.xmat[self.bodies[index].body_id].reshape(3, 3).copy()

    def count_touching_fingers(self, index: int) -> int:
        """Return how many of the two fingers touch object `index`."""
        body_id = self.bodies[index].body_id
        return sum(self.are_bodies_touching(body_id, finger) for finger in self._fingers)

    def are_bodies_touching(self, first_body_id: int, second_body_id: int) -> bool:
        """Return whether two bodies of the model touch."""
        contact_pairs = self._list_contact_bodies()  # [n, 2]
        # MuJoCo lists the two bodies of a contact in any order.
        forward = contact_pairs == (first_body_id, second_body_id)
        backward = contact_pairs == (second_body_id, first_body_id)
        is_pair = forward | backward
        return bool(is_pair.all(axis=1).any())

    def _list_contact_bodies(self) -> NDArray[np.int32]:
        """The ids of the two bodies of each of n contacts, [n, 2]."""
        contact = self.data.contact
        touching_geoms = contact.geom[contact.dist < MAX_CONTACT_GAP_M]  # [n, 2]
        return self.model.geom_bodyid[touching_geoms]


def get_milestone_states(world: World) -> dict[str, bool]:
    """Return which milestones of the scene's task are true now.

    reached             the gripper is at the source.
    grasped             the source is between both fingers and lifted.
    success             the source rests on or in the target, and no finger touches it.
    wrong_object_moved  an object that is neither source nor target has been displaced.
    """
    num_touching = world.count_touching_fingers(SOURCE_INDEX)
    ee_position, _ = world.servo.measure_pose()
    ee_distance_m = compute_euclidean_norm(ee_position - world.get_object_position(SOURCE_INDEX))
    displacement = world.get_object_positions() - world.start_positions
    # The objects after target and source have no part in the task.
    other_displacements_m = np.linalg.norm(displacement[2:], axis=1)

    # The index of the source's velocity in `qvel`: three numbers in m/s, then three in rad/s.
    first_velocity = world.model.body_dofadr[world.bodies[SOURCE_INDEX].body_id]
    speed_m_s = compute_euclidean_norm(world.data.qvel[first_velocity : first_velocity + 3])
    is_resting = num_touching == 0 and speed_m_s < MAX_REST_SPEED_M_S
    is_lifted = displacement[SOURCE_INDEX, 2] > MIN_LIFT_M
    return {
        "reached": ee_distance_m < REACHED_DISTANCE_M,
        "grasped": bool(num_touching == 2 and is_lifted),
        "success": is_resting and is_source_on_target(world),
        "wrong_object_moved": bool((other_displacements_m > MIN_DISPLACEMENT_M).any()),
    }


def is_source_on_target(world: World) -> bool:
    """Return whether the source is on or in the upright target and touches it, held or not."""
    source = world.bodies[SOURCE_INDEX]
    target = world.bodies[TARGET_INDEX]
    axes = world.get_object_rotation_matrix(TARGET_INDEX)
    assert target.kind.inside is not None, "a scene without a task"
    # The vertical component of the target's z axis is the cosine of its tilt. Up to a tilt of 18°
    # the target counts as upright.
    is_upright = axes[2, 2] >= 0.95
    if not is_upright or not world.are_bodies_touching(source.body_id, target.body_id):
        return False
    offset = world.get_object_position(SOURCE_INDEX) - world.get_object_position(TARGET_INDEX)
    # The offset along the target's axes: the product of the matrix `axes.T` and `offset`, [3] m.
    local_offset = (axes.T * offset).sum(1)
    # Half the sides of the area in which an object counts as placed, and the area's height, m.
    half_x, half_y, floor = target.kind.inside
    # The offset in units of these half sides: 1 or -1 at the border of the area.
    x = local_offset[0] / half_x
    y = local_offset[1] / half_y
    if target.kind.inside_round:
        is_inside = x * x + y * y < 1
    else:
        is_inside = max(abs(x), abs(y)) < 1
    return bool(is_inside and local_offset[2] > floor)


# --- Extents ---


def _measure_lower_and_upper_corner(kind: ObjectKind) -> tuple[Floats, Floats]:
    """Return the lower and upper corner [3] of the box around an object's visible parts.

    The box is aligned with the axes of the object's frame.
    """
    lows = []
    highs = []
    rotation = np.empty(9)
    for primitive in kind.primitives:
        if not primitive.visible:
            continue
        mujoco.mju_quat2Mat(rotation, _euler_to_quaternion(primitive.euler))
        half_size = compute_half_extent(
            _GEOM_TYPES[primitive.shape], np.array(primitive.size), rotation.reshape(3, 3)
        )
        lows.append(np.array(primitive.pos) - half_size)
        highs.append(np.array(primitive.pos) + half_size)
    return np.min(lows, axis=0), np.max(highs, axis=0)


def compute_half_extent(geom_type: int, geom_size: Floats, rotation: Floats) -> Floats:
    """Return half the extent [3] of a rotated primitive along the axes of another frame.

    Args:
        geom_type: MuJoCo's geom type.
        geom_size: MuJoCo's geom size for this type, m.
        rotation: [3, 3], rotation from the primitive's frame to the other frame.
    """
    if geom_type == mujoco.mjtGeom.mjGEOM_BOX:
        return np.abs(rotation) @ geom_size
    if geom_type == mujoco.mjtGeom.mjGEOM_ELLIPSOID:
        return np.sqrt((rotation**2) @ (geom_size**2))
    # Capsules and cylinders have a radius, geom_size[0], and half a length along z, geom_size[1].
    along_axis = geom_size[1] * np.abs(rotation[:, 2])
    if geom_type == mujoco.mjtGeom.mjGEOM_CAPSULE:
        return geom_size[0] + along_axis
    # A cylinder's end is a disc across the axis; its extent is the radius times the sine of the
    # angle between the cylinder's axis and the other frame's.
    sine = np.sqrt(np.maximum(0.0, 1 - rotation[:, 2] ** 2))
    return geom_size[0] * sine + along_axis


def _euler_to_quaternion(fixed_xyz_rad: tuple[float, float, float]) -> Floats:
    """Return the quaternion [4] of turns about the fixed x, then y, then z axis."""
    quaternion = np.empty(4)
    mujoco.mju_euler2Quat(quaternion, np.array(fixed_xyz_rad), "XYZ")
    return quaternion


# --- Models ---


@functools.cache
def get_shared_base_spec() -> mujoco.MjSpec:
    """Return the model that every scene begins with: arm, table and room, and all materials.

    It is described by world.xml, which includes the arm of franka.xml. The caller copies it before
    changing it.
    """
    spec = mujoco.MjSpec.from_file(str(Path(__file__).with_suffix(".xml")))
    _add_material(spec, "plain", None)
    for name, brightness in _draw_task_textures().items():
        pixels = (np.clip(brightness, 0, 1) * 255).astype(np.uint8)
        _add_material(spec, name, pixels)
    for name in (*WILD_TEXTURES, *UNSEEN_TEXTURES):
        _add_material(spec, name, draw_texture(name))
    return spec


def list_cameras() -> list[str]:
    """Return the names of the cameras of every world: those of world.xml, then those of the arm."""
    return [camera.name for camera in get_shared_base_spec().cameras]


def _draw_task_textures() -> dict[str, Any]:
    """Return the textures of scenes in the default world: name -> brightness [n, n], around 0.9.

    x and y are pixel coordinates in [0, 1), so `(x * 4) % 1` is the position within one of four
    planks.
    """
    rng = np.random.default_rng(0)
    side = TEXTURE_SIDE_PX
    x, y = np.meshgrid(np.arange(side) / side, np.arange(side) / side)

    # Wood: bands across x, and fibers along x that bend a little.
    wave: Any = 0
    for frequency, phase in ((3, 0.1), (7, 0.4), (17, 0.8), (31, 0.3)):
        wave = wave + np.sin(2 * math.pi * (frequency * x + phase)) / frequency
    fiber = np.sin(2 * math.pi * (2 * y + 0.2 * np.sin(2 * math.pi * 2 * x)))
    wood = 0.86 + 0.07 * wave + 0.03 * fiber

    # Planks: wood with dark gaps, and another brightness for each of the four planks.
    gap = 1 - 0.25 * ((x * 4) % 1 < 0.04)
    plank_brightness = 0.92 + 0.08 * rng.random(4)[(x * 4).astype(int)]
    planks = wood * gap * plank_brightness

    # Cloth: crossing threads, with noise.
    threads_x = np.sign(np.sin(2 * math.pi * 32 * x))
    threads_y = np.sign(np.sin(2 * math.pi * 32 * y))
    cloth = 0.90 + 0.05 * threads_x * threads_y
    cloth = cloth + rng.normal(0, 0.02, (side, side))

    # Tiles: two by two, with dark joints and noise.
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
    """Compile the model of a scene."""
    appearance = scene.appearance
    spec = get_shared_base_spec().copy()
    _resize_room_and_add_fill_lights(spec, appearance)
    # Several geoms may belong to a surface; "wall_left", for example, is of the surface "wall".
    for geom in spec.worldbody.geoms:
        surface = geom.name.partition("_")[0]
        if surface in appearance.surfaces:
            geom.material, color = appearance.surfaces[surface]
            geom.rgba = [*color, 1.0]
    for index, scene_object in enumerate(scene.objects):
        _add_object(spec, f"object{index}", scene_object)

    model = spec.compile()
    _place_external_camera(model, appearance)
    light = model.light("light")
    light.dir = appearance.light
    light.diffuse = appearance.diffuse
    light.ambient = appearance.ambient
    if not appearance.is_robot_visible:
        _hide_robot(model)
    return model


def _resize_room_and_add_fill_lights(spec: mujoco.MjSpec, appearance: SceneAppearance) -> None:
    """Change the sizes of table and room, and add walls and lights, where the scene differs."""
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
    """Add an object to a model; its mass is divided equally among its solid primitives."""
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
    """Add a primitive to an object's body."""
    geom = body.add_geom(
        type=_GEOM_TYPES[primitive.shape],
        pos=primitive.pos,
        quat=_euler_to_quaternion(primitive.euler),
    )
    geom.size[: len(primitive.size)] = primitive.size
    geom.rgba = [*color, 1.0]
    geom.group = 0 if primitive.visible else HIDDEN_GROUP
    geom.mass = mass_kg
    geom.friction = (0.9, 0.02, 0.002)  # against sliding, twisting and rolling
    geom.condim = 4  # contacts resist sliding and twisting
    # Solid primitives have bit 1, and collide with what has bit 1 (objects) or bit 2 (the gripper).
    geom.contype = 1 if primitive.solid else 0
    geom.conaffinity = 1 | 2 if primitive.solid else 0


def _place_external_camera(model: mujoco.MjModel, appearance: SceneAppearance) -> None:
    """Place the external camera and point it at its target, with "up" in the image up in the scene.

    Its view angle is set, too.
    """
    # The camera's axes in the base frame: x right, y up, z back (MuJoCo's convention).
    back = np.array(appearance.camera) - appearance.target
    back /= compute_euclidean_norm(back)
    right = np.cross([0, 0, 1.0], back)
    right /= compute_euclidean_norm(right)
    up = np.cross(back, right)
    camera = model.camera("external")
    mujoco.mju_mat2Quat(camera.quat, np.stack([right, up, back], axis=1).ravel())
    camera.pos = appearance.camera
    camera.fovy = appearance.fovy_deg


def _hide_robot(model: mujoco.MjModel) -> None:
    """Make the robot invisible in images. The bodies of the robot have consecutive ids."""
    first = model.body("link0").id
    last = model.body("finger2").id
    is_robot = (model.geom_bodyid >= first) & (model.geom_bodyid <= last)
    model.geom_rgba[is_robot, 3] = 0.0  # MuJoCo draws nothing that is fully transparent
