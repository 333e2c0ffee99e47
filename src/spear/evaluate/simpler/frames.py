"""Images of SIMPLER's scenes with their ground truth, for labeling.

The images show a task's objects at other positions than the official starts, with other objects
(*clutter*) among them, in other light and with another posture of the arm. Half of the images are
taken from another camera pose.
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
from spear.types import Array, Frame, WidthAndHeight
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
"""Name of a ManiSkill model → name of the object in instructions. Models that are not listed keep
their names. Basket and sink are part of the photograph."""
GRIPPER_LINK_NAMES = ("gripper", "finger")  # links with one of these in their names are the gripper
MILLIMETERS_PER_METER = 1000

MAX_CLUTTER_OBJECTS = 3  # per scene
MIN_CLUTTER_DISTANCE_M = 0.11  # horizontal distance of a clutter object from all other objects
CLUTTER_DROP_HEIGHT_M = 0.905  # world z from which clutter falls onto the table
CLUTTER_X_M = (-0.3, 0.02)  # range of world x of clutter
CLUTTER_Y_M = (-0.2, 0.25)  # range of world y of clutter
JOINT_STD_RAD = (0.3, 0.15, 0.15, 0.3, 0.2, 0.5)  # noise of the arm's joints around a task's start
CAMERA_POSITION_STD_M = 0.04  # noise of a moved camera along each axis
CAMERA_TURN_STD_RAD = math.radians(4)  # noise of a moved camera about each axis
AMBIENT_LIGHT = 0.3  # ManiSkill's brightness
LIGHT_FACTOR = (0.3, 2.0)  # range of the factor on the brightness
LIGHT_TINT = 0.05  # largest change of a single color channel


def render_labeled_frame(
    env: Any, task: Task, official_positions: Array, official_orientations: Array, seed: int
) -> Frame:
    """Render a scene that differs from the official starts, as the task's camera sees it.

    Args:
        env: ManiSkill's environment of this task. It keeps the new scene until the next
            `rebuild_scene`.
        task: The task.
        official_positions: [n, 2, 3], see `sample_off_grid_start`.
        official_orientations: [m, 2, 4] official orientations.
        seed: The seed of the scene.

    Returns:
        The image [480, 640, 3], its depth [480, 640], and the ground truth.
    """
    rng = np.random.default_rng([seed, 3])  # 3: see `sample_off_grid_start`
    start = sample_off_grid_start(task, seed, official_positions, official_orientations)

    # The order of these calls must stay, because it is the order in which `rng` draws numbers.
    clutter_names = _build_scene_and_list_clutter(env, start, rng)
    _change_light(env, rng)
    _change_posture(env, rng)
    is_camera_moved = _move_camera_sometimes(env, rng)

    env.scene.update_render()
    sensor = env._sensors[CAMERA]
    sensor.capture()
    images = sensor.get_obs(rgb=True, depth=True, segmentation=True, position=False)
    if not is_camera_moved:
        # Put the photograph behind the scene. It fits only the camera's own pose, from which it was
        # taken; a moved camera sees the simulator's background.
        photograph = env._rgb_overlay_images[CAMERA]
        images["rgb"] = env._green_sceen_rgb(images["rgb"], images["segmentation"], photograph)

    segment_ids = images["segmentation"][0].numpy()[..., 0]  # [480, 640]
    instances, names = _number_named_objects(
        segment_ids, _find_foreground_segments(env, clutter_names)
    )
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


def _build_scene_and_list_clutter(env: Any, start: Start, rng: np.random.Generator) -> list[str]:
    """Build the scene of a start, with clutter. Return the models of the clutter objects."""
    task_names = list(env.obj_names)
    foreground_names = list(env.objects_excluded_from_greenscreening)
    other_names = [name for name in OBJECT_NAMES if name not in task_names]
    positions, clutter_names = sample_positions_with_clutter(start.positions, other_names, rng)
    clutter_orientations = []  # quaternions (w x y z) of rotations about the vertical
    for half_angle in rng.uniform(0, math.pi, len(clutter_names)):
        clutter_orientations.append([math.cos(half_angle), 0, 0, math.sin(half_angle)])

    # ManiSkill builds the objects that these attributes of the environment list.
    env.obj_names = [*task_names, *clutter_names]
    env.objects_excluded_from_greenscreening = [*foreground_names, *clutter_names]
    # ManiSkill needs an entry in `model_db` for every model. An empty entry is enough; the model's
    # density is then that of water.
    empty_entries: dict[str, Any] = {name: {} for name in clutter_names}
    env.model_db = {**empty_entries, **env.model_db}
    try:
        orientations = np.vstack([start.orientations, *clutter_orientations])  # [objects, 4]
        rebuild_scene(env, torch.from_numpy(positions)[None], torch.from_numpy(orientations)[None])
    finally:
        env.obj_names = task_names
        env.objects_excluded_from_greenscreening = foreground_names
    return clutter_names


def _change_light(env: Any, rng: np.random.Generator) -> None:
    """Change brightness and color of the ambient light."""
    brightness = AMBIENT_LIGHT * rng.uniform(*LIGHT_FACTOR)
    tint = rng.uniform(-LIGHT_TINT, LIGHT_TINT, 3)
    env.scene.set_ambient_light(list(brightness + tint))


def _change_posture(env: Any, rng: np.random.Generator) -> None:
    """Change the joints of the arm, and the opening of the gripper."""
    joints = env.agent.robot.get_qpos()[0].numpy().copy()  # 6 of the arm, 2 of the fingers
    joints[:6] += rng.normal(0, JOINT_STD_RAD)
    joints[6:] = rng.uniform(FINGER_CLOSED_M, FINGER_OPEN_M)
    env.agent.reset(init_qpos=joints)


def _move_camera_sometimes(env: Any, rng: np.random.Generator) -> bool:
    """Move the camera in half of the scenes. Return whether it was moved."""
    is_moved = bool(rng.random() < 0.5)
    if is_moved:
        camera = env._sensors[CAMERA].camera
        pose = camera.get_local_pose().sp
        turn = quat_exp(torch.from_numpy(rng.normal(0, CAMERA_TURN_STD_RAD, 3)))
        pose.p = pose.p + rng.normal(0, CAMERA_POSITION_STD_M, 3)
        pose.q = quat_multiply(torch.from_numpy(pose.q).double(), turn).numpy()
        camera.set_local_pose(pose)
    return is_moved


def _find_foreground_segments(env: Any, clutter_names: Sequence[str]) -> dict[str, list[int]]:
    """Find the ids in ManiSkill's segmentation of everything that is in front of the photograph.

    Returns:
        Name of the object, or of the gripper → its ids. The gripper consists of several links.
    """
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


def _number_named_objects(
    segment_ids: Array, segments: Mapping[str, Sequence[int]]
) -> tuple[Array, dict[int, str]]:
    """Number the named objects from 1 on.

    Args:
        segment_ids: [h, w] ManiSkill's segmentation.
        segments: Name → ids in this segmentation.

    Returns:
        The number of the object at each pixel, [h, w] int32, 0 for none; and number → name.
    """
    instances = np.zeros(segment_ids.shape, np.int32)
    names = {}
    for number, (name, ids) in enumerate(segments.items(), 1):
        instances[np.isin(segment_ids, ids)] = number
        names[number] = name
    return instances, names


def rebuild_scene(
    env: Any, positions: torch.Tensor, orientations: torch.Tensor, pair_number: int = 0
) -> None:
    """Build a scene anew, so that nothing of the scene before remains.

    Otherwise objects would settle while the arm still stands where the last episode left it, and
    contacts that the solver remembers would change how the objects roll.

    Args:
        env: ManiSkill's environment. From now on it renders images only on demand, because
            rendering takes longer than the physics.
        positions: [n, objects, 3] (m).
        orientations: [m, objects, 4] (w x y z).
        pair_number: Which of the n · m pairs of positions and orientations the scene has. The pair
            number i · m + j is `positions[i]` with `orientations[j]`.
    """
    env.xyz_configs = positions
    env.quat_configs = orientations
    env.objs.clear()
    env._obs_mode = "none"
    env.reset(seed=0, options={"reconfigure": True, "episode_id": torch.tensor([pair_number])})


def sample_positions_with_clutter(
    task_positions: Array, candidate_names: list[str], rng: np.random.Generator
) -> tuple[Array, list[str]]:
    """Sample positions for some clutter objects, beside those of a task's objects.

    An object that has no room is left out.

    Args:
        task_positions: [n, 3] positions of a task's objects, m.
        candidate_names: Names of the objects that may be clutter.
        rng: Generator of random numbers.

    Returns:
        The positions of all objects, [n + clutter objects, 3], those of the task first; and the
        names of the clutter objects.
    """
    clutter_names: list[str] = []
    positions = task_positions
    shuffled_names = rng.permutation(candidate_names)
    num_candidates = rng.integers(MAX_CLUTTER_OBJECTS + 1)
    for name in shuffled_names[:num_candidates]:
        x = rng.uniform(*CLUTTER_X_M)
        y = rng.uniform(*CLUTTER_Y_M)
        position = np.array([x, y, CLUTTER_DROP_HEIGHT_M])
        distances = np.linalg.norm(positions[:, :2] - position[:2], axis=1)
        if distances.min() >= MIN_CLUTTER_DISTANCE_M:
            positions = np.vstack([positions, position])
            clutter_names.append(str(name))
    return positions, clutter_names


def fit_frame_and_drop_cut_instances(frame: Frame, size: WidthAndHeight, source: str) -> Frame:
    """Scale a frame to the size at which the policy sees images.

    The whole frame is visible. If the aspect ratio differs, there is a black border on two sides,
    in which no depth is known. Instances of fewer than `MIN_PIXELS` pixels are dropped, and so are
    instances that touch the border.

    Args:
        frame: The frame, with ground truth.
        size: (width, height), px.
        source: The source of the new frame.
    """
    assert frame.depth is not None
    assert frame.instances is not None
    assert frame.intrinsics is not None
    width, height = size
    frame_height, frame_width = frame.image.shape[:2]
    scale, left_px, top_px, inner_width, inner_height = compute_placement(
        (frame_width, frame_height), size
    )
    # Depths and instances must not be interpolated: take the nearest pixel.
    rows = ((np.arange(inner_height) + 0.5) / scale).astype(int)
    columns = ((np.arange(inner_width) + 0.5) / scale).astype(int)
    nearest_pixels = np.ix_(rows, columns)
    bottom_px = height - inner_height - top_px
    right_px = width - inner_width - left_px
    border = ((top_px, bottom_px), (left_px, right_px))
    depth = np.pad(frame.depth[nearest_pixels], border)
    instances = np.pad(frame.instances[nearest_pixels], border)

    visible = _find_large_whole_instances(instances, left_px, top_px, inner_width, inner_height)
    scale_and_shift = np.array([[scale, 0, left_px], [0, scale, top_px], [0, 0, 1]])
    return Frame(
        image=fit_image(np.ascontiguousarray(frame.image), height, width),
        depth=depth,
        instances=np.where(np.isin(instances, visible), instances, 0).astype(np.int32),
        names={number: frame.names[number] for number in visible},
        intrinsics=scale_and_shift @ frame.intrinsics,
        extrinsics=frame.extrinsics,
        source=source,
    )


def _find_large_whole_instances(
    instances: Array, left_px: int, top_px: int, inner_width: int, inner_height: int
) -> list[int]:
    """Return the numbers of the instances that are large enough and do not touch the border.

    Args:
        instances: [h, w] with the border.
        left_px: Width of the left border.
        top_px: Height of the upper border.
        inner_width: Width without the borders, px.
        inner_height: Height without the borders, px.
    """
    instance_numbers, counts = np.unique(instances, return_counts=True)
    # An instance with a pixel in an outermost row or column of the image touches the border. Its
    # count is set to 0, so that it is dropped below.
    if left_px:
        outermost_columns = instances[:, [left_px, left_px + inner_width - 1]]
        counts[np.isin(instance_numbers, outermost_columns)] = 0
    elif top_px:
        outermost_rows = instances[[top_px, top_px + inner_height - 1]]
        counts[np.isin(instance_numbers, outermost_rows)] = 0
    visible = []
    for number, count in zip(instance_numbers, counts, strict=True):
        if number > 0 and count >= MIN_PIXELS:
            visible.append(int(number))
    return visible
