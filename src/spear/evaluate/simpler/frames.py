"""Pictures of the tasks' scenes with their truth, to label: the same objects in other places, with others
among them, in other light, under another posture of the arm, and half of them from another place."""

import math
from typing import Any

import numpy as np
import torch

from spear.evaluate.simpler.tasks import (
    CAMERA,
    FINGER_CLOSED_M,
    FINGER_OPEN_M,
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
"""ManiSkill's models → what instructions call them; others keep their names. Basket and sink are photos."""
HAND = ("gripper", "finger")
"""Links of the arm that have this in their names are the gripper."""
MOST, APART, HEIGHT = 3, 0.11, 0.905
"""At most so many other objects, so far from all others (m); from where they fall, in the world (m)."""
AROUND = (-0.3, 0.02), (-0.2, 0.25)
"""Where they may be, along x and y in the world, m."""
POSTURE = (0.3, 0.15, 0.15, 0.3, 0.2, 0.5)
"""Standard deviations of the arm's joints around the posture in which tasks begin, rad."""
SHIFT, TURN = 0.04, math.radians(4)
"""Standard deviations of the camera's place, along each axis (m), and of its orientation (rad)."""


def render_labeled_frame(env: Any, task: Task, official: tuple[Array, Array], seed: int) -> Frame:
    """What the task's camera sees of a start off the grid: image and depth [480, 640], and the truth.

    env       ManiSkill's, of this task; it keeps the scene until the next `rebuild`.
    official  places and turns of the official starts, as `off_grid` takes them.
    """
    rng, begin = np.random.default_rng([seed, 3]), sample_off_grid_start(task, seed, *official)
    own, behind = list(env.obj_names), list(env.objects_excluded_from_greenscreening)
    places, more = sample_clutter(
        begin.places, [name for name in OBJECT_NAMES if name not in own], rng
    )
    turns = [
        [math.cos(angle), 0, 0, math.sin(angle)] for angle in rng.uniform(0, math.pi, len(more))
    ]
    env.obj_names, env.objects_excluded_from_greenscreening = [*own, *more], [*behind, *more]
    env.model_db = {
        **{name: {} for name in more},
        **env.model_db,
    }  # without a density: that of water
    try:
        rebuild_scene(
            env,
            torch.from_numpy(places)[None],
            torch.from_numpy(np.vstack([begin.turns, *turns]))[None],
        )
    finally:
        env.obj_names, env.objects_excluded_from_greenscreening = own, behind
    env.scene.set_ambient_light(list(0.3 * rng.uniform(0.3, 2.0) + rng.uniform(-0.05, 0.05, 3)))
    joints = env.agent.robot.get_qpos()[0].numpy().copy()
    joints[:6] += rng.normal(0, POSTURE)
    joints[6:] = rng.uniform(FINGER_CLOSED_M, FINGER_OPEN_M)
    env.agent.reset(init_qpos=joints)
    sensor = env._sensors[CAMERA]
    moved = rng.random() < 0.5
    if moved:  # without the photograph, which was taken from the camera's own place
        pose = sensor.camera.get_local_pose().sp
        turn = quat_exp(torch.from_numpy(rng.normal(0, TURN, 3)))
        pose.p = pose.p + rng.normal(0, SHIFT, 3)
        pose.q = quat_multiply(torch.from_numpy(pose.q).double(), turn).numpy()
        sensor.camera.set_local_pose(pose)
    env.scene.update_render()
    sensor.capture()
    seen = sensor.get_obs(rgb=True, depth=True, segmentation=True, position=False)
    if not moved:
        background = env._rgb_overlay_images[CAMERA]
        seen["rgb"] = env._green_sceen_rgb(seen["rgb"], seen["segmentation"], background)
    image, depth, ids = (seen[key][0].numpy() for key in ("rgb", "depth", "segmentation"))
    hand = [
        int(x.per_scene_id) for x in env.agent.robot.links if any(part in x.name for part in HAND)
    ]
    shown = [(name, actor) for name, actor in env.objs.items() if name in (*behind, *more)]
    actors = {OBJECT_NAMES.get(n, n.replace("_", " ")): [int(x.per_scene_id)] for n, x in shown}
    names, instances = {}, np.zeros(ids.shape[:2], np.int32)
    for number, (name, members) in enumerate({GRIPPER_NAME: hand, **actors}.items(), 1):
        instances[np.isin(ids[..., 0], members)] = number
        names[number] = name
    camera = sensor.get_params()
    return Frame(
        image=image.astype(np.uint8),
        depth=depth[..., 0].astype(np.float32) / 1000,
        instances=instances,
        names=names,
        intrinsics=camera["intrinsic_cv"][0].numpy().astype(np.float64),
        extrinsics=np.linalg.inv(np.vstack([camera["extrinsic_cv"][0].numpy(), [0, 0, 0, 1]])),
    )


def rebuild_scene(env: Any, places: torch.Tensor, turns: torch.Tensor, number: int = 0) -> None:
    """Builds the scene of that number among all pairs of places [n, objects, 3] and turns [m, objects, 4]; of
    the one before nothing stays.

    Otherwise objects would settle while the arm still stands where the last episode left it, and contacts
    that the solver remembers change how they roll. Pictures are only drawn where they are looked at: drawing
    takes longer than the physics.
    """
    env.xyz_configs, env.quat_configs = places, turns
    env.objs.clear()
    env._obs_mode = "none"
    env.reset(seed=0, options={"reconfigure": True, "episode_id": torch.tensor([number])})


def sample_clutter(
    places: Array, others: list[str], rng: np.random.Generator
) -> tuple[Array, list[str]]:
    """Places [n, 3] of a task's objects and of some others; their names. None where there is no room."""
    more: list[str] = []
    for name in rng.permutation(others)[: rng.integers(MOST + 1)]:
        place = np.array([*(rng.uniform(*span) for span in AROUND), HEIGHT])
        if np.linalg.norm(places[:, :2] - place[:2], axis=1).min() >= APART:
            places, more = np.vstack([places, place]), [*more, str(name)]
    return places, more


def fit_frame(frame: Frame, size: tuple[int, int], source: str) -> Frame:
    """A frame at (width, height) as the policy sees pictures: the whole of it, with black around it, where no
    depth is known. Instances of fewer than `MIN_PIXELS` are left out, and those that the black cuts."""
    assert frame.depth is not None and frame.instances is not None and frame.intrinsics is not None
    (width, height), (h, w) = size, frame.image.shape[:2]
    scale, left, top, across, down = compute_placement((w, h), size)
    rows, columns = (((np.arange(n) + 0.5) / scale).astype(int) for n in (down, across))
    around = ((top, height - down - top), (left, width - across - left))
    depth, instances = (
        np.pad(x[np.ix_(rows, columns)], around) for x in (frame.depth, frame.instances)
    )
    found, counts = np.unique(instances, return_counts=True)
    sides, ends = instances[:, [left, left + across - 1]], instances[[top, top + down - 1]]
    counts[np.isin(found, sides if left else ends if top else 0)] = 0
    seen = [int(i) for i, n in zip(found, counts, strict=True) if i > 0 and n >= MIN_PIXELS]
    return Frame(
        image=fit_image(np.ascontiguousarray(frame.image), height, width),
        depth=depth,
        instances=np.where(np.isin(instances, seen), instances, 0).astype(np.int32),
        names={i: frame.names[i] for i in seen},
        intrinsics=np.array([[scale, 0, left], [0, scale, top], [0, 0, 1]]) @ frame.intrinsics,
        extrinsics=frame.extrinsics,
        source=source,
    )
