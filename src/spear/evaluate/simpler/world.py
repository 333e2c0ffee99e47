"""One of SIMPLER's tasks in ManiSkill 3: scenes by number, with the WidowX's observations and
commands.

Facts from mani_skill 3.0.1's code, checked in it (docs/howto/simpler.md):

- The arm's controller keeps a target pose of link `ee_gripper_link` and solves for joint angles at
  every command.
- The fingers' joints go from 0.015 m (closed) to 0.037 m (open). A gripper command from -1 to 1
  maps onto that range, 1 mm wider at either end.
- The photograph behind the scene is kept on ManiSkill's class, so that a process can run one task
  only. ManiSkill simulates on one core, and a driver that fails takes its process with it.

Therefore each running scene has a process of its own, and they run side by side.
"""

import functools
import logging
import multiprocessing
import os
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spear.embodiments.simpler_widowx import LINK_ROTATION, POSE_KEY, ee_from_link_rotation
from spear.errors import SpearError, missing_extra_message, summarize_error
from spear.evaluate.simpler.frames import fit_frame, rebuild_scene, render_labeled_frame
from spear.evaluate.simpler.tasks import (
    CAMERA,
    FINGER_CLOSED_M,
    FINGER_OPEN_M,
    TASKS,
    Moment,
    Truth,
    sample_off_grid_start,
)
from spear.geometry import pose_compose, pose_inverse, quat_canonical, quat_multiply
from spear.types import Array, Frame
from spear.util.fingerprints import hash_files
from spear.util.processes import NO_WORKER_STARTED, block_interrupts, follow_parent_process

ASSETS = {"bridge_v2_real2sim": "tasks/bridge_v2_real2sim_dataset", "widowx250s": "robots/widowx"}
"""ManiSkill's names of the files that the tasks need → their folders in its data folder."""
REACHED_DISTANCE_M = 0.04  # see `Moment.reached`
MIN_MOVED_M = 0.03  # see `Moment.wrong_object_moved`

# Up to these changes in a control step, arm and fingers are at rest. Joints that press on something
# tremble for ever, while the pose stands still.
STILL_POSITION_M = 5e-4
STILL_ROTATION = 5e-3  # norm of the change of the quaternion
STILL_OPENING = 0.01


class NoRenderer(SpearError):
    """ManiSkill finds nothing to render its scene with, for this reason."""

    def __str__(self) -> str:
        return (
            f"SIMPLER: ManiSkill cannot draw its scene here ({self.args[0]}): "
            "unless a file is missing, install a Vulkan driver "
            "(for a CPU lavapipe 24.3: docs/howto/simpler.md)"
        )


def find_assets(folder: Path | None) -> Path:
    """ManiSkill's asset folder: `folder`, or MS_ASSET_DIR, or ~/.maniskill.

    Raises `SpearError` if files are missing, or ManiSkill itself.
    """
    if find_spec("mani_skill") is None:
        raise SpearError(missing_extra_message("SIMPLER", "mani_skill", "simpler"))
    root = folder or Path(os.environ.get("MS_ASSET_DIR", "~/.maniskill")).expanduser()
    for name, subfolder in ASSETS.items():
        if not (root / "data" / subfolder).is_dir():
            raise SpearError(
                f"SIMPLER's assets: {root}: has no data/{subfolder}: "
                f"run python -m mani_skill.utils.download_asset {name}, "
                "or give the folder that has it (--assets or MS_ASSET_DIR)"
            )
    return root


def hash_assets(root: Path) -> str:
    """`hash_files` of the models and photographs that the tasks need."""
    data = root / "data"
    named_files: list[tuple[str, Path]] = []
    for subfolder in ASSETS.values():
        files = [path for path in (data / subfolder).rglob("*") if path.is_file()]
        named_files += sorted((path.relative_to(data).as_posix(), path) for path in files)
    # Hidden files are what downloading left behind.
    return hash_files((name, path) for name, path in named_files if "/." not in name)


def describe_simulator(assets: Path) -> str:
    """ManiSkill's version and the hash of its assets: others render and move differently."""
    return f"ManiSkill {version('mani_skill')}, assets {hash_assets(assets)}"


class SimplerWorld:
    """One task of SIMPLER in this process.

    Raises `SpearError` if a renderer is missing, or if the task is not what its `Task` says.
    """

    def __init__(self, task: str) -> None:
        # `SimplerProcess` spawns a process for each world. That process knows a script's own task
        # only if the script adds the task to `TASKS` when it is imported.
        if task not in TASKS:
            raise SpearError(
                f"SIMPLER: {task}: its process lacks it: import it where your script begins"
            )
        self._env = _make_env(task)
        self._render_mode = self._env._obs_mode
        self._name = task
        self._task = TASKS[task]
        # ManiSkill's tensors of the official starts, from which `rebuild_scene` builds scenes
        self._official = (self._env.xyz_configs, self._env.quat_configs)
        positions, turns = self._official
        # The same starts as float64 arrays, with which starts off the grid are sampled
        self._grid = (np.asarray(positions, np.float64), np.asarray(turns, np.float64))
        num_starts = len(positions) * len(turns)
        if num_starts != self._task.num_starts:
            raise SpearError(f"SIMPLER: {task}: has {num_starts} starts: say so in its Task")

    def reset(self, start: int, image: bool, is_off_grid: bool = False) -> Moment:
        """Build the scene of one start, and return what is observed there.

        Args:
            start: The number of an official start; or the seed of another one.
            image: Whether the observation has an image.
            is_off_grid: Whether the start is none of the official ones (`sample_off_grid_start`).
        """
        if is_off_grid:
            self._reset_off_grid(start)
        else:
            rebuild_scene(self._env, *self._official, start)
        self._unreachable = 0
        self._steps = 0
        self._success = False
        self._reached = False
        self._grasped = False
        self._wrong_object_moved = False
        self._last_truth: Truth | None = None
        self._first_positions = self._object_positions()
        return self._make_moment(image, [])

    def _reset_off_grid(self, seed: int) -> None:
        start = sample_off_grid_start(self._task, seed, *self._grid)
        rebuild_scene(
            self._env, torch.from_numpy(start.positions)[None], torch.from_numpy(start.turns)[None]
        )
        joints = self._env.agent.robot.get_qpos()[0].numpy().copy()
        joints[:6] += start.joints
        self._env.agent.reset(init_qpos=joints)

    def run(self, rows: Array, image: bool, filming: bool = False) -> Moment:
        """Execute control steps.

        Args:
            rows: One row [7] of the embodiment's command per step.
            image: Whether the observation has an image.
            filming: Whether an image is taken after each step.
        """
        pictures = []
        arm = self._env.agent.controller.controllers["arm"]
        for row in np.asarray(rows, np.float32):
            last_target_pose = arm._target_pose
            self._last_truth = self._read_truth()
            *_, info = self._env.step(row)
            self._success = bool(info["success"])
            self._steps += 1
            # The controller marks a pose that it cannot reach by keeping its joint targets.
            if arm._target_qpos is arm._start_qpos:
                self._unreachable += 1
                # Otherwise commands would add up far outside, and a command back would do nothing.
                arm._target_pose = last_target_pose
            self._update_milestones()
            if filming:
                pictures.append(self.picture())
        return self._make_moment(image, pictures)

    def look(self, seed: int, size: tuple[int, int]) -> Frame:
        """Render a scene to label, at (width, height): see `spear.evaluate.simpler.frames`."""
        frame = render_labeled_frame(self._env, self._task, self._grid, seed)
        return fit_frame(frame, size, f"simpler/{self._name}/{seed}")

    def picture(self) -> Array:
        """What the camera sees, [480, 640, 3] uint8.

        The background of the rendered scene is the task's photograph.
        """
        self._env._obs_mode = self._render_mode
        image = self._env.get_obs()["sensor_data"][CAMERA]["rgb"][0]
        self._env._obs_mode = "none"
        return np.asarray(image, np.uint8)

    def _object_positions(self) -> dict[str, Array]:
        positions = {}
        for name, actor in self._env.objs.items():
            positions[name] = actor.pose.p[0].numpy().copy()
        return positions

    def _update_milestones(self) -> None:
        """Note after each control step which milestones are reached.

        A moment is only made after the last step of a `run`. A grasp, for example, may have begun
        and ended by then, so a milestone that was reached once stays reached until the next reset.
        """
        source = self._env.source_obj_name
        positions = self._object_positions()
        moved_m = {}
        for name, position in positions.items():
            moved_m[name] = float(np.hypot(*(position - self._first_positions[name])[:2]))
        source_moved_m = moved_m.pop(source)
        # Another object counts as wrongly moved if it moved by more than 3 cm and by more than the
        # object to move: the condition that ManiSkill describes (see `Moment`).
        for distance in moved_m.values():
            self._wrong_object_moved |= distance > max(MIN_MOVED_M, source_moved_m)

        link = self._env.agent.controller.controllers["arm"].ee_link.pose.p[0].numpy()
        link_distance = np.linalg.norm(link - positions[source])
        self._reached |= bool(link_distance < REACHED_DISTANCE_M)
        self._grasped |= bool(self._env.agent.is_grasping(self._env.objs[source]))

    def _make_moment(self, image: bool, pictures: list[Array]) -> Moment:
        truth = self._read_truth()
        position = truth.measured[:3]
        rotation = torch.from_numpy(truth.measured[3:])
        link_rotation = quat_multiply(rotation, LINK_ROTATION).numpy()
        pose = np.concatenate([position, link_rotation, [truth.opening]]).astype(np.float32)
        observation: dict[str, Any] = {
            POSE_KEY: pose,
            "prompt": self._env.get_language_instruction()[0],
        }
        if image:
            observation["observation/image"] = pictures[-1] if pictures else self.picture()
        return Moment(
            observation=observation,
            truth=truth,
            success=self._success,
            reached=self._reached,
            grasped=self._grasped,
            wrong_object_moved=self._wrong_object_moved,
            unreachable=self._unreachable,
            steps=self._steps,
            pictures=pictures,
        )

    def _read_truth(self) -> Truth:
        env = self._env
        arm = env.agent.controller.controllers["arm"]
        gripper = env.agent.controller.controllers["gripper"]
        base = _read_pose(env.agent.robot.pose)
        measured = _to_ee_pose(_read_pose(arm.ee_pose_at_base))
        fingers = env.agent.robot.get_qpos()[0, -2:].numpy().astype(np.float64)
        opening = compute_opening(fingers)

        half_open = (FINGER_CLOSED_M + FINGER_OPEN_M) / 2
        is_commanded_open = self._steps == 0 or float(gripper._target_qpos.mean()) > half_open
        is_still = True
        is_closing = False
        if self._last_truth is not None:
            is_still = is_at_rest(self._last_truth, measured, opening)
            is_closing = opening < self._last_truth.opening - STILL_OPENING

        source = env.source_obj_name
        goal = env.target_obj_name
        return Truth(
            commanded=_to_ee_pose(_read_pose(arm._target_pose)),
            measured=measured,
            opening=opening,
            open=is_commanded_open,
            still=is_still,
            closing=is_closing,
            source=to_base_frame(base, _read_pose(env.objs[source].pose)),
            source_size=_read_size(env.model_db[source]),
            goal=to_base_frame(base, _read_pose(env.objs[goal].pose)),
            goal_size=_read_size(env.model_db[goal]),
        )


def is_at_rest(previous: Truth, measured: Array, opening: float) -> bool:
    """Whether arm and fingers have hardly moved in a control step."""
    change = np.abs(measured - previous.measured)
    is_position_still = np.linalg.norm(change[:3]) < STILL_POSITION_M
    is_rotation_still = np.linalg.norm(change[3:]) < STILL_ROTATION
    is_opening_still = abs(opening - previous.opening) < STILL_OPENING
    return bool(is_position_still and is_rotation_still and is_opening_still)


def compute_opening(fingers: Array) -> float:
    """The gripper's opening, 0 to 1, from the two finger joints [2] (m)."""
    travel = FINGER_OPEN_M - FINGER_CLOSED_M
    return float(np.clip((np.mean(fingers) - FINGER_CLOSED_M) / travel, 0, 1))


def to_base_frame(base: Array, pose: Array) -> Array:
    """Convert a pose [7] from the world to the base frame; base [7]: the robot's base in the
    world.
    """
    base_tensor = torch.from_numpy(base)
    pose_tensor = torch.from_numpy(pose)
    inverse_position, inverse_rotation = pose_inverse(base_tensor[:3], base_tensor[3:])
    position, rotation = pose_compose(
        inverse_position, inverse_rotation, pose_tensor[:3], pose_tensor[3:]
    )
    return torch.cat([position, quat_canonical(rotation)]).numpy()


def _to_ee_pose(link: Array) -> Array:
    """Convert a pose [7] of link `ee_gripper_link` to our end-effector frame, at the same place."""
    rotation = torch.from_numpy(ee_from_link_rotation(link[3:]))
    return np.concatenate([link[:3], quat_canonical(rotation).numpy()])


def _read_pose(pose: Any) -> Array:
    """[7] float64 of ManiSkill's `Pose` of a batch of one."""
    raw_pose = pose.raw_pose[0].numpy().astype(np.float64)
    raw_pose[3:] /= np.linalg.norm(raw_pose[3:])
    return np.asarray(raw_pose)


def _read_size(model: Any) -> Array:
    """[3] the sides of a model's bounding box, m."""
    return np.subtract(model["bbox"]["max"], model["bbox"]["min"]).astype(np.float64)


def _make_env(task: str) -> Any:
    """ManiSkill's environment, without Gymnasium's time limit: `Task.max_steps` has it."""
    import gymnasium
    import mani_skill.envs  # noqa: F401

    warnings.filterwarnings("ignore")  # about ManiSkill's own files, which we cannot change
    logging.getLogger("mani_skill ").setLevel(logging.ERROR)  # with a space, as ManiSkill names it
    try:
        options: Any = {
            "obs_mode": "rgb+segmentation",
            "sim_backend": "cpu",
            "render_backend": "cpu",
        }
        return gymnasium.make(task, num_envs=1, **options).unwrapped
    except RuntimeError as error:
        raise NoRenderer(summarize_error(error)) from error


class SimplerProcess:
    """A `SimplerWorld` in a process of its own. Calls block; to run several, use a thread for
    each.
    """

    def __init__(self, task: str, assets: Path | None = None) -> None:
        # ManiSkill reads this when a script begins.
        os.environ["MS_ASSET_DIR"] = str(find_assets(assets))
        self._task = task
        context = multiprocessing.get_context("spawn")
        self._worker = ProcessPoolExecutor(1, context, initializer=follow_parent_process)
        with block_interrupts():
            self._started = self._worker.submit(int)

    def reset(self, start: int, image: bool, is_off_grid: bool = False) -> Moment:
        """As `SimplerWorld.reset`. Raises its `SpearError`, and `NoRenderer` if the process has
        ended.
        """
        return self._call("reset", start, image, is_off_grid)

    def run(self, rows: Array, image: bool, filming: bool = False) -> Moment:
        """As `SimplerWorld.run`; raises as `reset`."""
        return self._call("run", rows, image, filming)

    def look(self, seed: int, size: tuple[int, int]) -> Frame:
        """As `SimplerWorld.look`; raises as `reset`."""
        return self._call("look", seed, size)

    def close(self) -> None:
        self._worker.shutdown(cancel_futures=True)

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return self._worker.submit(_call_world, self._task, method, arguments).result()
        except BrokenProcessPool:
            if self._started.exception():
                raise SpearError(NO_WORKER_STARTED) from None
            raise NoRenderer(
                "its process crashed; if it was out of memory, run fewer at once"
            ) from None


@functools.cache
def _get_world(task: str) -> SimplerWorld:
    """The world of this process. It is made at the first call, so that processes start side by
    side.
    """
    torch.set_num_threads(1)  # threads of many processes only slow each other down
    os.environ.setdefault("LP_NUM_THREADS", "1")  # those of the software renderer
    return SimplerWorld(task)


def _call_world(task: str, method: str, arguments: tuple[Any, ...]) -> Any:
    try:
        return getattr(_get_world(task), method)(*arguments)
    except SpearError:
        raise
    except Exception as error:
        raise SpearError(f"SIMPLER: {task}: {type(error).__name__}: {error}") from error
