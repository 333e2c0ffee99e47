"""Shifts of SIMPLER's scenes along the axes of `spear.sim.shifts`, as far as SIMPLER allows them.

The photograph behind the scene fits only the camera's own pose. Therefore shifts of camera and
background change the photograph, too (`spear.evaluate.simpler.photograph`), and they need a
photograph of a flat table: in the eggplant's task, the basket is a part of the photograph. The arm
and the objects begin at official starts, so there are no shifts of layout and robot.

The axis "noise" is in `spear.evaluate.noise`; it changes no scene.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from spear.errors import SpearError, check_known
from spear.evaluate.simpler.photograph import (
    CameraView,
    colorize,
    relight,
    render_textured_stage,
    reproject_table_and_dome_with_mirrored_margins,
    shift_to_mean_color,
)
from spear.evaluate.simpler.tasks import CAMERA, CAMERA_SIZE, TASKS
from spear.geometry import matrix_to_quat, quat_normalize, quat_to_matrix
from spear.sim.shifts import (
    AXES,
    BACKGROUND_COLOR_DISTANCE,
    CAMERA_LEVELS,
    LIGHT_LEVELS,
    UNSEEN_SYNONYMS,
    UNSEEN_TEMPLATES,
    CameraLevel,
    ObjectNames,
    Shift,
    describe_beside_anchor,
    sample_brightness_and_tint,
    sample_orbit_near,
    sample_unseen_instruction,
)
from spear.sim.textures import UNSEEN_TEXTURES
from spear.sim.worlds import (
    CameraOrbit,
    sample_any_color,
    sample_color_near,
    sample_downward_light_direction,
)
from spear.types import Array

SIMPLER_AXES = ("camera", "light", "background", "language", "noise")
"""The axes along which SIMPLER's scenes can be shifted."""
_STREAM = 107
"""First number of the random generators' seeds in this file. Other files use other first numbers,
so that no two draw the same random numbers."""

FLAT_TASKS = (
    "PutCarrotOnPlateInScene-v1",
    "PutSpoonOnTableClothInScene-v1",
    "StackGreenCubeOnYellowCubeBakedTexInScene-v1",
)
"""The tasks whose photograph shows a table with nothing on it. Only their camera and background can
be shifted."""
TABLE_HEIGHT_M = 0.8695  # height of the table of `FLAT_TASKS`, z in the world

SAPIEN_AXES = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
"""Rotation from our camera frame (x right, y down, z forward) to ManiSkill's (x forward, y left,
z up)."""


@dataclass(frozen=True)
class TaskWords:
    """The words of a task's instructions.

    family  key of the task's templates in `UNSEEN_TEMPLATES`.
    source  names of the object to move. The first seen name is that of the official instruction.
    target  names of the object or place where it goes.
    """

    family: str
    source: ObjectNames
    target: ObjectNames


def _make_object_names(official_name: str, kind: str) -> ObjectNames:
    """The names of an object: as the official instruction calls it, and the kind's unseen names."""
    return ObjectNames((official_name,), UNSEEN_SYNONYMS[kind])


TASK_WORDS = {
    "PutCarrotOnPlateInScene-v1": TaskWords(
        "put_on", _make_object_names("carrot", "carrot"), _make_object_names("plate", "plate")
    ),
    "PutEggplantInBasketScene-v1": TaskWords(
        "put_in_basket",
        ObjectNames(("eggplant",), ("purple vegetable",)),
        ObjectNames(("yellow basket",), ("yellow hamper", "yellow container")),
    ),
    "PutSpoonOnTableClothInScene-v1": TaskWords(
        "spoon_on_towel", _make_object_names("spoon", "spoon"), _make_object_names("towel", "towel")
    ),
    "StackGreenCubeOnYellowCubeBakedTexInScene-v1": TaskWords(
        "stack_cube",
        _make_object_names("green block", "green cube"),
        _make_object_names("yellow block", "yellow cube"),
    ),
}
"""Task -> its words."""


@dataclass(frozen=True)
class SceneShift:
    """A shift of one scene.

    shift  the axis and the level.
    seed   the seed of the scene. The same task, shift and seed always give the same scene.
    """

    shift: Shift
    seed: int

    def make_generator(self, task: str) -> np.random.Generator:
        """Make the generator of the shift's random numbers."""
        axis_index = AXES.index(self.shift.axis)
        return np.random.default_rng(
            [_STREAM, axis_index, self.shift.level, *task.encode(), self.seed]
        )


def parse_simpler_shift(text: str) -> Shift:
    """Read "AXIS:LEVEL" or "AXIS". Raises `SpearError` if SIMPLER has no such shift."""
    reason = "is not possible in SIMPLER, where objects and arm begin at the benchmark's starts"
    return Shift.parse_possible(text, SIMPLER_AXES, reason)


def select_shiftable_tasks(tasks: Sequence[str], shift: str | None) -> tuple[str, ...]:
    """Return the tasks to evaluate with a shift.

    Args:
        tasks: The tasks that the user names; none for the default. The default is all tasks that
            can be shifted this way, without a shift all tasks.
        shift: "AXIS:LEVEL", "AXIS", "all" for every shift, or None for no shift.

    Raises:
        SpearError: A task is unknown, or cannot be shifted this way.
    """
    check_known("task", TASKS, *tasks)
    shiftable_tasks = tuple(TASKS)
    reason = ""
    if shift is not None:
        axes = SIMPLER_AXES if shift == "all" else (parse_simpler_shift(shift).axis,)
        if "camera" in axes or "background" in axes:
            shiftable_tasks = FLAT_TASKS
            reason = "its photograph is not known to show a table with nothing on it"
        elif "language" in axes:
            shiftable_tasks = tuple(TASK_WORDS)
            reason = "no other words are known for its instruction"
    for task in tasks:
        if task not in shiftable_tasks:
            raise SpearError(
                f"--shift {shift} is not possible for {task}, because {reason}. Give "
                f"--tasks {' '.join(shiftable_tasks)}."
            )
    return tuple(tasks) or shiftable_tasks


def sample_camera(
    camera: CameraView, table_z_m: float, level: CameraLevel, rng: np.random.Generator
) -> CameraView:
    """Draw another camera pose around the point of the table that a camera looks at.

    The image keeps its roll about the optical axis.

    Args:
        camera: The usual camera.
        table_z_m: The table's height, m, base frame.
        level: How far the camera is moved at most.
        rng: Generator of random numbers.
    """
    target = camera.compute_target(table_z_m)
    x, y, z = target.tolist()
    orbit = CameraOrbit.around((x, y, z), tuple(camera.position.tolist()))
    position = np.array(sample_orbit_near(orbit, level, rng).compute_position())
    fovy_deg = camera.fovy_deg + rng.uniform(-level.fovy_deg, level.fovy_deg)
    turn = _look_at(position, target) @ _look_at(camera.position, target).T
    return replace(
        camera,
        position=position,
        rotation=turn @ camera.rotation,
        focal_px=camera.size_px[1] / 2 / math.tan(math.radians(fovy_deg) / 2),
    )


def _look_at(position: Array, target: Array) -> Array:
    """Return the rotation [3, 3] to the base frame of a level camera that looks at a point."""
    forward = (target - position) / np.linalg.norm(target - position)
    right = np.cross(forward, [0, 0, 1])
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    return np.stack([right, down, forward], axis=1)


def sample_photograph_with_other_background(
    photograph: Array, camera: CameraView, table_z_m: float, level: int, rng: np.random.Generator
) -> Array:
    """Draw a photograph with another background, table included, in its place.

    Level 1 moves the photograph's colors, level 2 shows it in a single color, and level 3 shows a
    table and a wall with an unseen texture in a single color.

    Args:
        photograph: [h, w, 3] uint8.
        camera: The camera of the photograph.
        table_z_m: The table's height, m, base frame.
        level: The level of the shift.
        rng: Generator of random numbers.
    """
    if level == 1:
        red, green, blue = (photograph.reshape(-1, 3).mean(axis=0) / 255).tolist()
        color = sample_color_near((red, green, blue), BACKGROUND_COLOR_DISTANCE, rng)
        return shift_to_mean_color(photograph, color)
    color = sample_any_color(rng)
    if level == 2:
        return colorize(photograph, color)
    return render_textured_stage(str(rng.choice(tuple(UNSEEN_TEXTURES))), color, camera, table_z_m)


def sample_instruction(
    task: str, source_right_m: float, target_right_m: float, level: int, rng: np.random.Generator
) -> str:
    """Draw an instruction in words that the benchmark does not have.

    Args:
        task: The task.
        source_right_m: How far to the right in the camera's image the object to move lies, m.
        target_right_m: The same for the object or place where it goes.
        level: The level of the shift.
        rng: Generator of random numbers.
    """
    words = TASK_WORDS[task]
    # A scene has two objects, so the object to move is the only other thing than the target.
    names = [words.source.seen[0], words.target.seen[0]]
    relation = describe_beside_anchor(0, names, [0, 1], [source_right_m, target_right_m])
    templates = UNSEEN_TEMPLATES[words.family]
    return sample_unseen_instruction(templates, words.source, words.target, relation, level, rng)


def shift_built_scene_and_get_instruction(
    env: Any, task: str, photograph: Array, scene_shift: SceneShift
) -> str | None:
    """Shift the scene that ManiSkill has just built.

    Args:
        env: ManiSkill's environment of the task. Its changes last until the next `rebuild_scene`;
            only its photograph, `_rgb_overlay_images`, stays.
        task: The task.
        photograph: [480, 640, 3] uint8, as it is without a shift.
        scene_shift: The shift.

    Returns:
        The new instruction; None if the shift leaves it as it is.
    """
    shift = scene_shift.shift
    rng = scene_shift.make_generator(task)
    camera = _read_camera(env)
    if shift.axis == "language":
        positions = []  # of both objects, to the right in the image
        for name in (env.source_obj_name, env.target_obj_name):
            offset = _read_position_in_base_frame(env, env.objs[name]) - camera.position
            positions.append(float(offset @ camera.rotation[:, 0]))
        return sample_instruction(task, positions[0], positions[1], shift.level, rng)

    table_z_m = TABLE_HEIGHT_M - float(env.agent.robot.pose.p[0, 2])
    if shift.axis == "camera":
        moved_camera = sample_camera(camera, table_z_m, CAMERA_LEVELS[shift.level], rng)
        _move_camera(env, moved_camera)
        photograph = reproject_table_and_dome_with_mirrored_margins(
            photograph, camera, moved_camera, table_z_m
        )
    elif shift.axis == "light":
        factor, tint = sample_brightness_and_tint(LIGHT_LEVELS[shift.level], rng)
        _change_light(env, factor * tint, sample_downward_light_direction(rng))
        photograph = relight(photograph, factor * tint)
    elif shift.axis == "background":
        photograph = sample_photograph_with_other_background(
            photograph, camera, table_z_m, shift.level, rng
        )
    set_photograph(env, photograph)
    return None


def read_photograph(env: Any) -> Array:
    """Return a copy of the photograph behind ManiSkill's scene, [480, 640, 3] uint8."""
    return np.array(env._rgb_overlay_images[CAMERA], np.uint8)


def set_photograph(env: Any, photograph: Array) -> None:
    """Put a photograph [480, 640, 3] uint8 behind ManiSkill's scene."""
    env._rgb_overlay_images[CAMERA] = torch.from_numpy(photograph)


def _read_camera(env: Any) -> CameraView:
    """Read where the camera is, which is mounted on the robot's base."""
    sensor = env._sensors[CAMERA]
    pose = sensor.camera.get_local_pose().sp
    rotation = quat_to_matrix(torch.from_numpy(np.float64(pose.q))).numpy() @ SAPIEN_AXES
    intrinsics = sensor.get_params()["intrinsic_cv"][0].numpy()
    return CameraView(
        position=np.asarray(pose.p, np.float64),
        rotation=rotation,
        focal_px=float(intrinsics[0, 0]),
        center_px=(float(intrinsics[0, 2]), float(intrinsics[1, 2])),
        size_px=CAMERA_SIZE,
    )


def _read_position_in_base_frame(env: Any, actor: Any) -> Array:
    """Return the position [3] of an object in the robot's base frame, m."""
    in_base = env.agent.robot.pose.inv() * actor.pose
    return np.asarray(in_base.p[0], np.float64)


def _move_camera(env: Any, camera: CameraView) -> None:
    """Move ManiSkill's camera."""
    sensor_camera = env._sensors[CAMERA].camera
    pose = sensor_camera.get_local_pose().sp
    pose.p = camera.position
    pose.q = matrix_to_quat(torch.from_numpy(camera.rotation @ SAPIEN_AXES.T)).numpy()
    sensor_camera.set_local_pose(pose)
    for render_camera in sensor_camera._render_cameras:
        render_camera.set_focal_lengths(camera.focal_px, camera.focal_px)


def compute_quat_turning_x_axis_to(direction: tuple[float, float, float]) -> Array:
    """Return the quaternion [4] (w x y z) of the shortest rotation of the x axis to a direction.

    Args:
        direction: A unit vector, which is not the negative x axis.
    """
    x, y, z = direction
    # (1 + a · b, a × b) is a multiple of the quaternion that rotates a to b.
    multiple = torch.tensor([1 + x, 0.0, -z, y], dtype=torch.float64)
    return quat_normalize(multiple).numpy()


def _change_light(env: Any, factors: Array, direction: tuple[float, float, float]) -> None:
    """Multiply the color of all lights by factors [3], and turn the main light.

    Args:
        env: ManiSkill's environment.
        factors: Factors on red, green and blue.
        direction: Where the main light shines, a unit vector in the world.
    """
    for sub_scene in env.scene.sub_scenes:
        sub_scene.set_ambient_light(list(np.multiply(sub_scene.ambient_light, factors)))
        main_light, *_ = sub_scene.render_system.lights  # the first one, which is the brightest
        pose = main_light.entity.pose
        pose.q = compute_quat_turning_x_axis_to(direction)  # a light shines along its x axis
        main_light.entity.pose = pose
        for light in sub_scene.render_system.lights:
            light.color = list(np.multiply(light.color, factors))
