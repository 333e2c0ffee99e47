"""A task of SIMPLER in ManiSkill 3, with the WidowX's observations and commands.

These facts were found in the code of mani_skill 3.0.1 (docs/howto/simpler.md):

- The arm's controller has a target pose of link `ee_gripper_link`. At every command it moves this
  pose and solves for joint angles.
- The fingers' joints go from 0.015 m (closed) to 0.037 m (open). A gripper command from -1 to 1
  maps onto that range, extended by 1 mm at either end.
- The photograph behind the scene is an attribute of ManiSkill's class, so that a process can run
  only one task. ManiSkill simulates on one core, and if the graphics driver fails, the process
  ends.

Therefore each running scene has its own process (`SimplerProcess`), and the processes run at the
same time.
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

from spear.embodiments.simpler_widowx import LINK_ROTATION, POSE_KEY, convert_link_to_ee_rotation
from spear.errors import SpearError, make_missing_extra_message, summarize_error
from spear.evaluate.simpler.frames import (
    fit_frame_and_drop_cut_instances,
    rebuild_scene,
    render_labeled_frame,
)
from spear.evaluate.simpler.shifts import (
    SceneShift,
    read_photograph,
    set_photograph,
    shift_built_scene_and_get_instruction,
)
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
from spear.types import Array, Frame, WidthAndHeight
from spear.util.fingerprints import hash_files
from spear.util.processes import (
    NO_WORKER_STARTED,
    block_interrupts,
    ignore_interrupts_and_end_with_parent,
)

ASSETS = {"bridge_v2_real2sim": "tasks/bridge_v2_real2sim_dataset", "widowx250s": "robots/widowx"}
"""ManiSkill's name of each download that the tasks need → its folder in ManiSkill's data folder."""
REACHED_DISTANCE_M = 0.04  # see `Moment.reached`
MIN_MOVED_M = 0.03  # see `Moment.wrong_object_moved`

# If the pose and the opening change by less than this in a control step, arm and fingers are at
# rest. The joints are not compared, because joints that press on something keep trembling.
STILL_POSITION_M = 5e-4
STILL_ROTATION = 5e-3  # norm of the change of the quaternion
STILL_OPENING = 0.01


class NoRenderer(SpearError):
    """ManiSkill cannot render its scene. The argument is the reason."""

    def __str__(self) -> str:
        return (
            f"SIMPLER: ManiSkill cannot draw its scene here ({self.args[0]}). If that names no "
            "missing file, install a Vulkan driver; docs/howto/simpler.md names one for CPUs."
        )


def resolve_assets_folder(folder: Path | None) -> Path:
    """Find ManiSkill's asset folder: `folder`, or else $MS_ASSET_DIR, or else ~/.maniskill.

    Raises:
        SpearError: The folder lacks assets, or ManiSkill is not installed.
    """
    if find_spec("mani_skill") is None:
        raise SpearError(make_missing_extra_message("SIMPLER", "mani_skill", "simpler"))
    root = folder or Path(os.environ.get("MS_ASSET_DIR", "~/.maniskill")).expanduser()
    for name, subfolder in ASSETS.items():
        if not (root / "data" / subfolder).is_dir():
            raise SpearError(
                f"{root}, the folder of SIMPLER's assets, has no data/{subfolder}. Run python "
                f"-m mani_skill.utils.download_asset {name}, or give the folder that has it "
                "(--assets or MS_ASSET_DIR)."
            )
    return root


def hash_assets(root: Path) -> str:
    """Compute the hash (`hash_files`) of the models and photographs that the tasks need.

    Args:
        root: ManiSkill's asset folder.
    """
    data = root / "data"
    named_files: list[tuple[str, Path]] = []  # (path in the data folder, path)
    for subfolder in ASSETS.values():
        files = [path for path in (data / subfolder).rglob("*") if path.is_file()]
        named_files += sorted((path.relative_to(data).as_posix(), path) for path in files)
    # Hidden files are remains of the download.
    return hash_files((name, path) for name, path in named_files if "/." not in name)


def describe_simulator(assets: Path) -> str:
    """Identify the simulator by ManiSkill's version and the hash of its assets.

    With another version or other assets, scenes look and move differently.
    """
    return f"ManiSkill {version('mani_skill')}, assets {hash_assets(assets)}"


class SimplerWorld:
    """One task of SIMPLER, simulated in this process.

    Args:
        task: One of `TASKS`.

    Raises:
        SpearError: A renderer is missing, or the task has another number of starts than its `Task`
            says.
    """

    def __init__(self, task: str) -> None:
        # `SimplerProcess` starts a new Python process for each world. A task that a user's script
        # adds is known there only if importing the script adds the task to `TASKS`.
        if task not in TASKS:
            raise SpearError(
                f"the process of SIMPLER's {task} does not know this task. Import it where your "
                "script begins."
            )
        self._env = _make_env(task)
        self._render_mode = self._env._obs_mode  # set only while an image is rendered
        self._name = task
        self._task = TASKS[task]
        # Positions [n, 2, 3] and orientations [m, 2, 4] of the official starts, as ManiSkill's
        # tensors, from which `rebuild_scene` builds scenes
        self._position_tensor = self._env.xyz_configs
        self._orientation_tensor = self._env.quat_configs
        # The same as float64 arrays, which `sample_off_grid_start` uses
        self._official_positions = np.asarray(self._position_tensor, np.float64)
        self._official_orientations = np.asarray(self._orientation_tensor, np.float64)
        self._photograph = read_photograph(self._env)
        num_starts = len(self._official_positions) * len(self._official_orientations)
        if num_starts != self._task.num_starts:
            raise SpearError(f"SIMPLER's {task} has {num_starts} starts. Say so in its Task.")

    def reset(
        self,
        start_or_seed: int,
        image: bool,
        is_off_grid: bool = False,
        scene_shift: SceneShift | None = None,
    ) -> Moment:
        """Build the scene of one start, and return its state.

        Args:
            start_or_seed: The number of an official start, or the seed of a start off the grid.
            image: Whether the observation should have an image.
            is_off_grid: Whether the start is off the grid (`sample_off_grid_start`).
            scene_shift: How the scene is shifted; None for the scene as it is.
        """
        set_photograph(self._env, self._photograph)  # the last scene's may have been shifted
        if is_off_grid:
            self._reset_off_grid(start_or_seed)
        else:
            rebuild_scene(
                self._env,
                self._position_tensor,
                self._orientation_tensor,
                pair_number=start_or_seed,
            )
        self._instruction = str(self._env.get_language_instruction()[0])
        if scene_shift is not None:
            instruction = shift_built_scene_and_get_instruction(
                self._env, self._name, self._photograph, scene_shift
            )
            self._instruction = instruction or self._instruction
        self._unreachable = 0
        self._steps = 0
        self._success = False
        self._reached = False
        self._grasped = False
        self._wrong_object_moved = False
        self._last_truth: Truth | None = None
        self._first_positions = self._read_object_positions()
        return self._make_moment(image, pictures=[])

    def _reset_off_grid(self, seed: int) -> None:
        """Build the scene of a start off the grid, and change the arm's posture."""
        start = sample_off_grid_start(
            self._task, seed, self._official_positions, self._official_orientations
        )
        rebuild_scene(
            self._env,
            torch.from_numpy(start.positions)[None],
            torch.from_numpy(start.orientations)[None],
        )
        joints = self._env.agent.robot.get_qpos()[0].numpy().copy()
        joints[:6] += start.joints
        self._env.agent.reset(init_qpos=joints)

    def run(self, rows: Array, image: bool, filming: bool = False) -> Moment:
        """Execute control steps, and return the state after them.

        Args:
            rows: [steps, 7] commands of the embodiment.
            image: Whether the observation should have an image.
            filming: Whether to render an image after each step.
        """
        pictures = []
        arm = self._env.agent.controller.controllers["arm"]
        for row in np.asarray(rows, np.float32):
            last_target_pose = arm._target_pose
            self._last_truth = self._read_truth()
            *_, info = self._env.step(row)
            self._success = bool(info["success"])
            self._steps += 1
            # For a pose that it cannot reach, the controller takes the present joints as targets.
            if arm._target_qpos is arm._start_qpos:
                self._unreachable += 1
                # Without this, the target pose would move farther and farther outside with every
                # command, and the first commands back would have no effect.
                arm._target_pose = last_target_pose
            self._update_milestones()
            if filming:
                pictures.append(self.render_picture())
        return self._make_moment(image, pictures)

    def build_and_render_scene(self, seed: int, size: WidthAndHeight) -> Frame:
        """Build and render a scene for labeling (see `spear.evaluate.simpler.frames`).

        Args:
            seed: The seed of the scene.
            size: (width, height) of the image, px.
        """
        set_photograph(self._env, self._photograph)  # the last scene's may have been shifted
        frame = render_labeled_frame(
            self._env, self._task, self._official_positions, self._official_orientations, seed
        )
        return fit_frame_and_drop_cut_instances(frame, size, f"simpler/{self._name}/{seed}")

    def render_picture(self) -> Array:
        """Render what the camera sees, in front of the task's photograph: [480, 640, 3] uint8."""
        self._env._obs_mode = self._render_mode
        image = self._env.get_obs()["sensor_data"][CAMERA]["rgb"][0]
        self._env._obs_mode = "none"
        return np.asarray(image, np.uint8)

    def _read_object_positions(self) -> dict[str, Array]:
        """Return ManiSkill's name of each object → its position [3] in the world, m."""
        positions = {}
        for name, actor in self._env.objs.items():
            positions[name] = actor.pose.p[0].numpy().copy()
        return positions

    def _update_milestones(self) -> None:
        """Record after a control step which milestones have been reached so far.

        This cannot wait for the last step of a `run`, because a grasp, for example, may have begun
        and ended before. A milestone stays reached until the next reset.
        """
        source_name = self._env.source_obj_name
        positions = self._read_object_positions()
        moved_m = {}  # object → horizontal distance from its first position
        for name, position in positions.items():
            x, y, _ = position - self._first_positions[name]
            moved_m[name] = float(np.hypot(x, y))
        source_moved_m = moved_m.pop(source_name)
        # See `Moment.wrong_object_moved`.
        for distance in moved_m.values():
            self._wrong_object_moved |= distance > max(MIN_MOVED_M, source_moved_m)

        link_position = self._env.agent.controller.controllers["arm"].ee_link.pose.p[0].numpy()
        link_distance = np.linalg.norm(link_position - positions[source_name])
        self._reached |= bool(link_distance < REACHED_DISTANCE_M)
        self._grasped |= bool(self._env.agent.is_grasping(self._env.objs[source_name]))

    def _make_moment(self, needs_image: bool, pictures: list[Array]) -> Moment:
        """Return the present state.

        Args:
            needs_image: Whether the observation should have an image.
            pictures: Images of the steps since the last moment.
        """
        truth = self._read_truth()
        position = truth.measured[:3]
        rotation = torch.from_numpy(truth.measured[3:])
        # Observations have the orientation of the robot's link, not that of our end-effector frame.
        link_rotation = quat_multiply(rotation, LINK_ROTATION).numpy()
        pose = np.concatenate([position, link_rotation, [truth.opening]]).astype(np.float32)
        observation: dict[str, Any] = {
            POSE_KEY: pose,
            "prompt": self._instruction,
        }
        if needs_image:
            # The last of the pictures already shows the present state.
            observation["observation/image"] = pictures[-1] if pictures else self.render_picture()
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
        """Read the true state from the simulator."""
        env = self._env
        arm = env.agent.controller.controllers["arm"]
        gripper = env.agent.controller.controllers["gripper"]
        base = _read_pose(env.agent.robot.pose)
        measured = _to_ee_pose(_read_pose(arm.ee_pose_at_base))
        fingers = env.agent.robot.get_qpos()[0, -2:].numpy().astype(np.float64)
        opening = compute_opening(fingers)

        # Before the first command, the gripper counts as commanded to be open.
        half_open = (FINGER_CLOSED_M + FINGER_OPEN_M) / 2
        is_commanded_open = self._steps == 0 or float(gripper._target_qpos.mean()) > half_open
        is_still = True
        is_closing = False
        if self._last_truth is not None:
            is_still = is_arm_at_rest(self._last_truth, measured, opening)
            is_closing = opening < self._last_truth.opening - STILL_OPENING

        source_name = env.source_obj_name
        goal_name = env.target_obj_name
        return Truth(
            commanded=_to_ee_pose(_read_pose(arm._target_pose)),
            measured=measured,
            opening=opening,
            is_commanded_open=is_commanded_open,
            is_still=is_still,
            is_closing=is_closing,
            source=to_base_frame(base, _read_pose(env.objs[source_name].pose)),
            source_size=_read_size(env.model_db[source_name]),
            goal=to_base_frame(base, _read_pose(env.objs[goal_name].pose)),
            goal_size=_read_size(env.model_db[goal_name]),
        )


def is_arm_at_rest(previous: Truth, pose_after_step: Array, opening: float) -> bool:
    """Return whether arm and fingers have hardly moved in a control step.

    Args:
        previous: The state before the step.
        pose_after_step: [7] pose of the end effector after the step.
        opening: Gripper opening after the step.
    """
    change = np.abs(pose_after_step - previous.measured)
    is_position_still = np.linalg.norm(change[:3]) < STILL_POSITION_M
    is_rotation_still = np.linalg.norm(change[3:]) < STILL_ROTATION
    is_opening_still = abs(opening - previous.opening) < STILL_OPENING
    return bool(is_position_still and is_rotation_still and is_opening_still)


def compute_opening(fingers: Array) -> float:
    """Compute the gripper opening (0 to 1) from the positions of the finger joints, [2] m."""
    travel = FINGER_OPEN_M - FINGER_CLOSED_M
    return float(np.clip((np.mean(fingers) - FINGER_CLOSED_M) / travel, 0, 1))


def to_base_frame(base: Array, pose: Array) -> Array:
    """Convert a pose from the world to the robot's base frame.

    Args:
        base: [7] pose of the robot's base in the world.
        pose: [7] pose in the world.
    """
    base_tensor = torch.from_numpy(base)
    pose_tensor = torch.from_numpy(pose)
    inverse_position, inverse_rotation = pose_inverse(base_tensor[:3], base_tensor[3:])
    position, rotation = pose_compose(
        inverse_position, inverse_rotation, pose_tensor[:3], pose_tensor[3:]
    )
    return torch.cat([position, quat_canonical(rotation)]).numpy()


def _to_ee_pose(link_pose: Array) -> Array:
    """Convert a pose [7] of link `ee_gripper_link` to our end-effector frame.

    The two frames have the same origin.
    """
    rotation = torch.from_numpy(convert_link_to_ee_rotation(link_pose[3:]))
    return np.concatenate([link_pose[:3], quat_canonical(rotation).numpy()])


def _read_pose(pose: Any) -> Array:
    """Convert ManiSkill's `Pose` of a batch of one to [7] float64."""
    raw_pose = pose.raw_pose[0].numpy().astype(np.float64)
    raw_pose[3:] /= np.linalg.norm(raw_pose[3:])
    return np.asarray(raw_pose)


def _read_size(model: Any) -> Array:
    """Return the sides [3] of a model's bounding box, m."""
    return np.subtract(model["bbox"]["max"], model["bbox"]["min"]).astype(np.float64)


def _make_env(task: str) -> Any:
    """Make ManiSkill's environment, without Gymnasium's time limit (`Task.max_steps` is ours)."""
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
    """A `SimplerWorld` in its own process.

    Calls wait for their result, so several processes run at the same time only if each is called
    from its own thread. The methods raise the errors of `SimplerWorld`, and `NoRenderer` if the
    process has crashed.

    Args:
        task: One of `TASKS`.
        assets: ManiSkill's asset folder, see `resolve_assets_folder`.
    """

    def __init__(self, task: str, assets: Path | None = None) -> None:
        # ManiSkill reads this variable when the new process imports it.
        os.environ["MS_ASSET_DIR"] = str(resolve_assets_folder(assets))
        self._task = task
        context = multiprocessing.get_context("spawn")
        self._worker = ProcessPoolExecutor(
            1, context, initializer=ignore_interrupts_and_end_with_parent
        )
        with block_interrupts():
            # A job that does nothing. It fails if the process does not start.
            self._worker_start = self._worker.submit(int)

    def reset(
        self,
        start_or_seed: int,
        image: bool,
        is_off_grid: bool = False,
        scene_shift: SceneShift | None = None,
    ) -> Moment:
        """Build the scene of one start, see `SimplerWorld.reset`."""
        return self._call("reset", start_or_seed, image, is_off_grid, scene_shift)

    def run(self, rows: Array, image: bool, filming: bool = False) -> Moment:
        """Execute control steps, see `SimplerWorld.run`."""
        return self._call("run", rows, image, filming)

    def build_and_render_scene(self, seed: int, size: WidthAndHeight) -> Frame:
        """Build and render a scene for labeling, see `SimplerWorld.build_and_render_scene`."""
        return self._call("build_and_render_scene", seed, size)

    def close(self) -> None:
        self._worker.shutdown(cancel_futures=True)

    def _call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the world in the process."""
        try:
            return self._worker.submit(_call_world, self._task, method, arguments).result()
        except BrokenProcessPool:
            if self._worker_start.exception():  # the process did not even start
                raise SpearError(NO_WORKER_STARTED) from None
            raise NoRenderer(
                "its process crashed; if it was out of memory, run fewer at once"
            ) from None


@functools.cache
def _get_world(task: str) -> SimplerWorld:
    """Return the world of this process, which is made at the first call.

    The first call is made in the process of the world, so several processes make their worlds at
    the same time.
    """
    torch.set_num_threads(1)  # with more threads, many processes only slow each other down
    os.environ.setdefault("LP_NUM_THREADS", "1")  # threads of the software renderer
    return SimplerWorld(task)


def _call_world(task: str, method: str, arguments: tuple[Any, ...]) -> Any:
    """Call a method of this process's world. Any error becomes a `SpearError` that names the task.

    This is a function of the module, because `SimplerProcess` has to pickle it for its process.
    """
    try:
        return getattr(_get_world(task), method)(*arguments)
    except SpearError:
        raise
    except Exception as error:
        raise SpearError(
            f"SIMPLER's {task} fails with {type(error).__name__} ({error}). Run the command "
            "again; it continues."
        ) from error
