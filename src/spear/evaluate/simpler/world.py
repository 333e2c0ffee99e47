"""One of SIMPLER's tasks in ManiSkill 3: scenes by number, observations and commands as the WidowX has them.

Facts, from mani_skill 3.0.1's code and checked in it (docs/simpler.md): the arm's controller keeps a target
pose of link `ee_gripper_link` and solves for joint angles at every command; the fingers' joints go from
0.015 m (closed) to 0.037 m (open), and a gripper command from -1 to 1 maps onto that range, 1 mm wider at
either end. The photograph behind the scene is kept on ManiSkill's class, so that a process can hold one task
only; it simulates on one core, and a driver that fails takes its process with it. So each running scene has a
process of its own, and they run side by side.
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
"""What ManiSkill calls the files that the tasks need → where they lie in its data folder."""
NEAR, MOVED = 0.04, 0.03
"""m, see `Moment`."""
STILL = 5e-4, 5e-3, 0.01
"""Changes of place (m), of orientation (of a quaternion) and of the opening in a control step, up to which
arm and fingers are at rest. Joints that press on something tremble for ever, while the pose stands still."""


class NoRenderer(SpearError):
    """ManiSkill finds nothing to draw its pictures with, for this reason."""

    def __str__(self) -> str:
        cure = "unless a file is missing, install a Vulkan driver (for a CPU lavapipe 24.3: docs/simpler.md)"
        return f"SIMPLER: ManiSkill cannot draw its scene here ({self.args[0]}): {cure}"


def check_assets(folder: Path | None) -> Path:
    """ManiSkill's asset folder: `folder`, or MS_ASSET_DIR, or ~/.maniskill. Raises `SpearError` where files
    are missing, or ManiSkill itself."""
    if find_spec("mani_skill") is None:
        raise SpearError(missing_extra_message("SIMPLER", "mani_skill", "simpler"))
    root = folder or Path(os.environ.get("MS_ASSET_DIR", "~/.maniskill")).expanduser()
    for name, where in ASSETS.items():
        if not (root / "data" / where).is_dir():
            lacks = f"SIMPLER's assets: {root}: has no data/{where}"
            cure = f"run python -m mani_skill.utils.download_asset {name}"
            raise SpearError(
                f"{lacks}: {cure}, or give the folder that has it (--assets or MS_ASSET_DIR)"
            )
    return root


def hash_assets(root: Path) -> str:
    """`hash_files` of the models and photographs that the tasks need."""
    data, found = root / "data", list[tuple[str, Path]]()
    for where in ASSETS.values():
        files = (path for path in (data / where).rglob("*") if path.is_file())
        found += sorted((path.relative_to(data).as_posix(), path) for path in files)
    return hash_files(
        file for file in found if "/." not in file[0]
    )  # without what downloading left behind


def describe_simulator(assets: Path) -> str:
    """Which ManiSkill and assets these are, for settings: others draw and move otherwise."""
    return f"ManiSkill {version('mani_skill')}, assets {hash_assets(assets)}"


class SimplerWorld:
    """One task. Raises `SpearError` where a renderer is missing, or the task is not what we know of it."""

    def __init__(self, task: str) -> None:
        if task not in TASKS:
            raise SpearError(
                f"SIMPLER: {task}: its process lacks it: import it where your script begins"
            )
        self._env = _make(task)
        self._mode = self._env._obs_mode
        self._name, self._task = task, TASKS[task]
        self._official = places, turns = self._env.xyz_configs, self._env.quat_configs
        self._grid = np.asarray(places, np.float64), np.asarray(turns, np.float64)
        if len(places) * len(turns) != self._task.starts:
            raise SpearError(
                f"SIMPLER: {task}: has {len(places) * len(turns)} starts: say so in its Task"
            )

    def reset(self, start: int, image: bool, other: bool = False) -> Moment:
        """The scene of that number; other: none of the official ones (`tasks.off_grid`). image: whether the
        camera is looked through."""
        if not other:
            rebuild_scene(self._env, *self._official, start)
        else:
            begin = sample_off_grid_start(self._task, start, *self._grid)
            rebuild_scene(
                self._env, torch.from_numpy(begin.places)[None], torch.from_numpy(begin.turns)[None]
            )
            joints = self._env.agent.robot.get_qpos()[0].numpy().copy()
            joints[:6] += begin.joints
            self._env.agent.reset(init_qpos=joints)
        self._unreachable = self._steps = 0
        self._success = self._reached = self._grasped = self._wrong = False
        self._before: Truth | None = None
        self._begin = {name: o.pose.p[0].numpy().copy() for name, o in self._env.objs.items()}
        return self._moment(image, [])

    def run(self, rows: Array, image: bool, filming: bool = False) -> Moment:
        """Control steps, one per row [7] of the embodiment's command; filming: with a picture after each."""
        pictures = []
        arm = self._env.agent.controller.controllers["arm"]
        for row in np.asarray(rows, np.float32):
            before, self._before = arm._target_pose, self._truth()
            self._success = bool(self._env.step(row)[-1]["success"])
            self._steps += 1
            if (
                arm._target_qpos is arm._start_qpos
            ):  # as the controller marks a pose that it cannot reach
                self._unreachable += 1
                arm._target_pose = (
                    before  # or commands would add up far outside, and none back be noticed
                )
            self._notice()
            if filming:
                pictures.append(self.picture())
        return self._moment(image, pictures)

    def look(self, seed: int, size: tuple[int, int]) -> Frame:
        """A scene to label, at (width, height): see `spear.evaluate.simpler.frames`."""
        return fit_frame(
            render_labeled_frame(self._env, self._task, self._grid, seed),
            size,
            f"simpler/{self._name}/{seed}",
        )

    def picture(self) -> Array:
        """What the camera sees, [480, 640, 3] uint8, with the photograph behind it."""
        self._env._obs_mode = self._mode
        data = self._env.get_obs()["sensor_data"][CAMERA]["rgb"][0]
        self._env._obs_mode = "none"
        return np.asarray(data, np.uint8)

    def _notice(self) -> None:
        """What has to be seen after each step, as it may pass."""
        places = {name: o.pose.p[0].numpy() for name, o in self._env.objs.items()}
        moved = {name: float(np.hypot(*(p - self._begin[name])[:2])) for name, p in places.items()}
        wanted = self._env.source_obj_name
        source = moved.pop(wanted)
        self._wrong |= any(m > max(MOVED, source) for m in moved.values())
        link = self._env.agent.controller.controllers["arm"].ee_link.pose.p[0].numpy()
        self._reached |= bool(np.linalg.norm(link - places[wanted]) < NEAR)
        self._grasped |= bool(self._env.agent.is_grasping(self._env.objs[wanted]))

    def _moment(self, image: bool, pictures: list[Array]) -> Moment:
        truth = self._truth()
        position, rotation = truth.measured[:3], torch.from_numpy(truth.measured[3:])
        link = quat_multiply(rotation, LINK_ROTATION).numpy()
        observation: dict[str, Any] = {
            POSE_KEY: np.concatenate([position, link, [truth.opening]]).astype(np.float32),
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
            wrong_object_moved=self._wrong,
            unreachable=int(self._unreachable),
            steps=self._steps,
            pictures=pictures,
        )

    def _truth(self) -> Truth:
        env = self._env
        controllers = env.agent.controller.controllers
        base = _pose(env.agent.robot.pose)
        measured = _ours(_pose(controllers["arm"].ee_pose_at_base))
        opened = compute_opening(env.agent.robot.get_qpos()[0, -2:].numpy().astype(np.float64))
        source, goal = env.source_obj_name, env.target_obj_name
        return Truth(
            commanded=_ours(_pose(controllers["arm"]._target_pose)),
            measured=measured,
            opening=opened,
            open=self._steps == 0
            or float(controllers["gripper"]._target_qpos.mean())
            > (FINGER_CLOSED_M + FINGER_OPEN_M) / 2,
            still=self._before is None or is_at_rest(self._before, measured, opened),
            closing=self._before is not None and opened < self._before.opening - STILL[2],
            source=to_base_frame(base, _pose(env.objs[source].pose)),
            source_size=_size(env.model_db[source]),
            goal=to_base_frame(base, _pose(env.objs[goal].pose)),
            goal_size=_size(env.model_db[goal]),
        )


def is_at_rest(before: Truth, measured: Array, opened: float) -> bool:
    """Whether arm and fingers have hardly moved in a control step."""
    away = np.abs(measured - before.measured)
    changes = [np.linalg.norm(away[:3]), np.linalg.norm(away[3:]), abs(opened - before.opening)]
    return bool(np.all(np.array(changes) < STILL))


def compute_opening(fingers: Array) -> float:
    """The gripper's opening, 0 … 1, from the two finger joints [2] (m)."""
    return float(
        np.clip((np.mean(fingers) - FINGER_CLOSED_M) / (FINGER_OPEN_M - FINGER_CLOSED_M), 0, 1)
    )


def to_base_frame(base: Array, pose: Array) -> Array:
    """A pose [7] in the world as one in the base frame; base [7]: where the robot's base is in the world."""
    b, p = torch.from_numpy(base), torch.from_numpy(pose)
    position, rotation = pose_compose(*pose_inverse(b[:3], b[3:]), p[:3], p[3:])
    return torch.cat([position, quat_canonical(rotation)]).numpy()


def _ours(link: Array) -> Array:
    """A pose [7] of link `ee_gripper_link` as that of our end-effector frame, at the same place."""
    return np.concatenate(
        [link[:3], quat_canonical(torch.from_numpy(ee_from_link_rotation(link[3:]))).numpy()]
    )


def _pose(pose: Any) -> Array:
    """[7] float64 of ManiSkill's `Pose` of a batch of one."""
    raw = pose.raw_pose[0].numpy().astype(np.float64)
    raw[3:] /= np.linalg.norm(raw[3:])
    return np.asarray(raw)


def _size(model: Any) -> Array:
    return np.subtract(model["bbox"]["max"], model["bbox"]["min"]).astype(np.float64)


def _make(task: str) -> Any:
    """The environment itself, without Gymnasium's time limit: `spear.evaluate.simpler.tasks` has it."""
    import gymnasium
    import mani_skill.envs  # noqa: F401

    warnings.filterwarnings("ignore")  # that its files and ours are as they are
    logging.getLogger("mani_skill ").setLevel(logging.ERROR)  # with a space, as ManiSkill calls it
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
    """A `SimplerWorld` in a process of its own. Calls block; use one thread per process to run several."""

    def __init__(self, task: str, assets: Path | None = None) -> None:
        os.environ["MS_ASSET_DIR"] = str(
            check_assets(assets)
        )  # ManiSkill reads it when a script begins
        context = multiprocessing.get_context("spawn")
        self._task, self._worker = (
            task,
            ProcessPoolExecutor(1, context, initializer=follow_parent_process),
        )
        with block_interrupts():
            self._begun = self._worker.submit(int)

    def reset(self, start: int, image: bool, other: bool = False) -> Moment:
        """As `SimplerWorld.reset`. Raises its `SpearError`, and `NoRenderer` where the process has ended."""
        return self._ask("reset", start, image, other)

    def run(self, rows: Array, image: bool, filming: bool = False) -> Moment:
        return self._ask("run", rows, image, filming)

    def look(self, seed: int, size: tuple[int, int]) -> Frame:
        """As `SimplerWorld.look`; raises as `reset`."""
        return self._ask("look", seed, size)

    def close(self) -> None:
        self._worker.shutdown(cancel_futures=True)

    def _ask(self, *call: Any) -> Any:
        try:
            return self._worker.submit(_answer, self._task, *call).result()
        except BrokenProcessPool:
            if self._begun.exception():
                raise SpearError(NO_WORKER_STARTED) from None
            raise NoRenderer(
                "its process crashed; if it was out of memory, run fewer at once"
            ) from None


@functools.cache
def _world(task: str) -> SimplerWorld:
    """The world of this process. It is made at the first call: processes start side by side."""
    torch.set_num_threads(1)  # threads of many processes only stand in each other's way
    os.environ.setdefault("LP_NUM_THREADS", "1")  # those of the software renderer
    return SimplerWorld(task)


def _answer(task: str, call: str, *arguments: Any) -> Any:
    try:
        return getattr(_world(task), call)(*arguments)
    except SpearError:
        raise
    except Exception as error:
        raise SpearError(f"SIMPLER: {task}: {type(error).__name__}: {error}") from error
