"""Images of the tasks' scenes with their ground truth, for labeling.

They show a task's objects in other positions, with other objects among them, in other light and
with another posture of the arm. Half of them are taken from another camera pose.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from spear.evaluate.simpler.tasks import (
    CAMERA,
    FINGER_CLOSED_M,
    FINGER_OPEN_M,
    Start,
    Task,
    sample_off_grid_start,
)
from spear.geometry import quat_exp, quat_multiply
from spear.sim.render import MIN_PIXELS
from spear.sim.world import GRIPPER_NAME
from spear.types import Array, Frame
from spear.util.images import compute_placement, fit_image

OBJECT_NAMES = {
    "bridge_carrot_generated_modified": "carrot",
    "bridge_plate_objaverse_larger": "plate",
    "eggplant": "eggplant",
    "bridge_spoon_generated_modified": "spoon",
    "table_cloth_generated_shorter": "towel",
    "baked_green_cube_3cm": "green block",
    "baked_yellow_cube_3cm": "yellow block",
}
"""ManiSkill's models → how instructions call them. Other models keep their names; basket and sink
are part of the photograph."""
GRIPPER_LINK_NAMES = ("gripper", "finger")  # links with this in their names are the gripper
MILLIMETERS_PER_METER = 1000

MAX_CLUTTER_OBJECTS = 3
MIN_CLUTTER_DISTANCE_M = 0.11  # from all other objects
CLUTTER_DROP_HEIGHT_M = 0.905  # in the world; clutter falls onto the table from here
CLUTTER_X_M = (-0.3, 0.02)  # where clutter may be in the world
CLUTTER_Y_M = (-0.2, 0.25)
JOINT_STD_RAD = (0.3, 0.15, 0.15, 0.3, 0.2, 0.5)  # of the arm around the posture of a task's start
CAMERA_POSITION_STD_M = 0.04  # along each axis
CAMERA_TURN_STD_RAD = math.radians(4)
AMBIENT_LIGHT = 0.3  # ManiSkill's
LIGHT_FACTOR = (0.3, 2.0)
LIGHT_TINT = 0.05  # largest difference of a color channel


def render_labeled_frame(env: Any, task: Task, official: tuple[Array, Array], seed: int) -> Frame:
    """Render what the task's camera sees of a start off the grid.

    Args:
        env: ManiSkill's environment of this task; it keeps the scene until the next
            `rebuild_scene`.
        task: The task.
        official: Places and turns of the official starts, as `sample_off_grid_start` takes them.
        seed: The seed of the scene.

    Returns:
        Image and depth [480, 640], and the ground truth.
    """
    rng = np.random.default_rng([seed, 3])
    start = sample_off_grid_start(task, seed, *official)

    # The random numbers are drawn in this order.
    clutter_names = _add_clutter(env, start, rng)
    _change_light(env, rng)
    _change_posture(env, rng)
    is_camera_moved = _move_camera_sometimes(env, rng)

    env.scene.update_render()
    sensor = env._sensors[CAMERA]
    sensor.capture()
    images = sensor.get_obs(rgb=True, depth=True, segmentation=True, position=False)
    if not is_camera_moved:
        # The photograph was taken from the camera's own pose.
        photograph = env._rgb_overlay_images[CAMERA]
        images["rgb"] = env._green_sceen_rgb(images["rgb"], images["segmentation"], photograph)

    segment_ids = images["segmentation"][0].numpy()[..., 0]
    instances, names = _name_instances(segment_ids, _find_segments(env, clutter_names))
    camera = sensor.get_params()
    camera_from_world = np.vstack([camera["extrinsic_cv"][0].numpy(), [0, 0, 0, 1]])
    depth_mm = images["depth"][0].numpy()[..., 0]
    return Frame(
        image=images["rgb"][0].numpy().astype(np.uint8),
        depth=depth_mm.astype(np.float32) / MILLIMETERS_PER_METER,
        instances=instances,
        names=names,
        intrinsics=camera["intrinsic_cv"][0].numpy().astype(np.float64),
        extrinsics=np.linalg.inv(camera_from_world),
    )


def _add_clutter(env: Any, start: Start, rng: np.random.Generator) -> list[str]:
    """Build the scene of a start with other objects in it; returns the names of their models."""
    task_names = list(env.obj_names)
    foreground_names = list(env.objects_excluded_from_greenscreening)
    other_names = [name for name in OBJECT_NAMES if name not in task_names]
    positions, clutter_names = sample_clutter(start.positions, other_names, rng)
    turns = []
    for angle in rng.uniform(0, math.pi, len(clutter_names)):
        turns.append([math.cos(angle), 0, 0, math.sin(angle)])

    env.obj_names = [*task_names, *clutter_names]
    env.objects_excluded_from_greenscreening = [*foreground_names, *clutter_names]
    # A model without a density has that of water.
    env.model_db = {**{name: {} for name in clutter_names}, **env.model_db}
    try:
        rebuild_scene(
            env,
            torch.from_numpy(positions)[None],
            torch.from_numpy(np.vstack([start.turns, *turns]))[None],
        )
    finally:
        env.obj_names = task_names
        env.objects_excluded_from_greenscreening = foreground_names
    return clutter_names


def _change_light(env: Any, rng: np.random.Generator) -> None:
    brightness = AMBIENT_LIGHT * rng.uniform(*LIGHT_FACTOR)
    env.scene.set_ambient_light(list(brightness + rng.uniform(-LIGHT_TINT, LIGHT_TINT, 3)))


def _change_posture(env: Any, rng: np.random.Generator) -> None:
    joints = env.agent.robot.get_qpos()[0].numpy().copy()
    joints[:6] += rng.normal(0, JOINT_STD_RAD)
    joints[6:] = rng.uniform(FINGER_CLOSED_M, FINGER_OPEN_M)
    env.agent.reset(init_qpos=joints)


def _move_camera_sometimes(env: Any, rng: np.random.Generator) -> bool:
    """Move the camera in half of the scenes; returns whether it was moved."""
    is_moved = bool(rng.random() < 0.5)
    if is_moved:
        camera = env._sensors[CAMERA].camera
        pose = camera.get_local_pose().sp
        turn = quat_exp(torch.from_numpy(rng.normal(0, CAMERA_TURN_STD_RAD, 3)))
        pose.p = pose.p + rng.normal(0, CAMERA_POSITION_STD_M, 3)
        pose.q = quat_multiply(torch.from_numpy(pose.q).double(), turn).numpy()
        camera.set_local_pose(pose)
    return is_moved


def _find_segments(env: Any, clutter_names: Sequence[str]) -> dict[str, list[int]]:
    """Name of each thing in front of the photograph → its numbers in ManiSkill's segmentation."""
    gripper_ids = []
    for link in env.agent.robot.links:
        if any(link_name in link.name for link_name in GRIPPER_LINK_NAMES):
            gripper_ids.append(int(link.per_scene_id))
    segments = {GRIPPER_NAME: gripper_ids}
    foreground_names = (*env.objects_excluded_from_greenscreening, *clutter_names)
    for model, actor in env.objs.items():
        if model in foreground_names:
            name = OBJECT_NAMES.get(model, model.replace("_", " "))
            segments[name] = [int(actor.per_scene_id)]
    return segments


def _name_instances(
    segment_ids: Array, segments: Mapping[str, Sequence[int]]
) -> tuple[Array, dict[int, str]]:
    """Number the named things from 1 on; returns the instances [h, w] int32 and their names."""
    instances = np.zeros(segment_ids.shape, np.int32)
    names = {}
    for number, (name, ids) in enumerate(segments.items(), 1):
        instances[np.isin(segment_ids, ids)] = number
        names[number] = name
    return instances, names


def rebuild_scene(env: Any, positions: torch.Tensor, turns: torch.Tensor, number: int = 0) -> None:
    """Build one scene among all pairs of positions and turns; nothing of the scene before remains.

    Otherwise objects would settle while the arm still stands where the last episode left it, and
    contacts that the solver remembers would change how they roll. Images are only rendered where
    they are used, because rendering takes longer than the physics.

    Args:
        env: ManiSkill's environment.
        positions: [n, objects, 3] (m).
        turns: [m, objects, 4] (w x y z).
        number: The number of the pair.
    """
    env.xyz_configs = positions
    env.quat_configs = turns
    env.objs.clear()
    env._obs_mode = "none"
    env.reset(seed=0, options={"reconfigure": True, "episode_id": torch.tensor([number])})


def sample_clutter(
    positions: Array, names: list[str], rng: np.random.Generator
) -> tuple[Array, list[str]]:
    """Sample positions for some other objects; an object that has no room is left out.

    Args:
        positions: [n, 3] (m) of a task's objects.
        names: Names of the other objects.
        rng: Random numbers.

    Returns:
        The positions of all objects, those of the task first, and the names of the others.
    """
    clutter_names: list[str] = []
    for name in rng.permutation(names)[: rng.integers(MAX_CLUTTER_OBJECTS + 1)]:
        x = rng.uniform(*CLUTTER_X_M)
        y = rng.uniform(*CLUTTER_Y_M)
        position = np.array([x, y, CLUTTER_DROP_HEIGHT_M])
        distances = np.linalg.norm(positions[:, :2] - position[:2], axis=1)
        if distances.min() >= MIN_CLUTTER_DISTANCE_M:
            positions = np.vstack([positions, position])
            clutter_names.append(str(name))
    return positions, clutter_names


def fit_frame(frame: Frame, size: tuple[int, int], source: str) -> Frame:
    """Scale a frame to (width, height) as the policy sees images.

    The whole frame is visible, with a black border where no depth is known. Instances of fewer than
    `MIN_PIXELS` pixels are dropped, and so are those that the border cuts.
    """
    assert frame.depth is not None
    assert frame.instances is not None
    assert frame.intrinsics is not None
    width, height = size
    frame_height, frame_width = frame.image.shape[:2]
    scale, left_px, top_px, inner_width, inner_height = compute_placement(
        (frame_width, frame_height), size
    )
    rows = ((np.arange(inner_height) + 0.5) / scale).astype(int)
    columns = ((np.arange(inner_width) + 0.5) / scale).astype(int)
    border = ((top_px, height - inner_height - top_px), (left_px, width - inner_width - left_px))
    depth = np.pad(frame.depth[np.ix_(rows, columns)], border)
    instances = np.pad(frame.instances[np.ix_(rows, columns)], border)

    visible = _find_visible_instances(instances, left_px, top_px, inner_width, inner_height)
    border_shift = np.array([[scale, 0, left_px], [0, scale, top_px], [0, 0, 1]])
    return Frame(
        image=fit_image(np.ascontiguousarray(frame.image), height, width),
        depth=depth,
        instances=np.where(np.isin(instances, visible), instances, 0).astype(np.int32),
        names={number: frame.names[number] for number in visible},
        intrinsics=border_shift @ frame.intrinsics,
        extrinsics=frame.extrinsics,
        source=source,
    )


def _find_visible_instances(
    instances: Array, left_px: int, top_px: int, inner_width: int, inner_height: int
) -> list[int]:
    """The instances that are large enough and that the border does not cut."""
    numbers, counts = np.unique(instances, return_counts=True)
    if left_px:
        cut = instances[:, [left_px, left_px + inner_width - 1]]
        counts[np.isin(numbers, cut)] = 0
    elif top_px:
        cut = instances[[top_px, top_px + inner_height - 1]]
        counts[np.isin(numbers, cut)] = 0
    visible = []
    for number, count in zip(numbers, counts, strict=True):
        if number > 0 and count >= MIN_PIXELS:
            visible.append(int(number))
    return visible
