"""A LIBERO task in a process of LIBERO's own environment, and what is known of a moment in it."""

import os
import secrets
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spear.embodiments.libero import (
    BASE_POSITION_KEY,
    FINGER_TRAVEL_M,
    HAND_ROTATION,
    OBSERVED_STATE_KEY,
)
from spear.embodiments.observations import IMAGE_KEY, PROMPT_KEY, WRIST_IMAGE_KEY
from spear.errors import SpearError
from spear.evaluate.libero.environment import resolve_folder, resolve_python
from spear.geometry import quat_log, quat_multiply
from spear.types import Array

IMAGE_SIZE_PX = 256
"""Side of both pictures, as in openpi's and OpenVLA-OFT's protocols."""
FAST_RENDERING = "no multisampling, no reflections, simplified meshes"
"""What results and demonstrations say if their pictures were rendered fast."""
ACTIONS = "from the measured pose"
"""What results and demonstrations say of their actions. Earlier ones moved the commanded pose."""
WORKER = Path(__file__).with_name("worker.py")
MAX_START_S = 120.0
"""How long the process may take to start, s. It imports MuJoCo first."""


@dataclass(frozen=True)
class Box:
    """The box around an object or a fixture.

    pose  [7] of the object in the base frame.
    low   [3] smallest x, y and z of the box in the object's own frame, m.
    high  [3] largest x, y and z of the box in the object's own frame, m.
    """

    pose: Array
    low: Array
    high: Array


@dataclass(frozen=True)
class Region:
    """A place that a goal names: its pose [7] in the base frame and its half sizes [3], m."""

    pose: Array
    half_size: Array


@dataclass(frozen=True)
class LiberoMoment:
    """A scene between two actions.

    pose               [7] of the end-effector in the base frame.
    commanded          [7] pose that the controller has to reach.
    opening            measured gripper opening, 0 to 1.
    base               [3] position of the robot's base in the world, m.
    objects            name → `Box`, of objects and fixtures.
    regions            name → `Region`.
    joints             name of a fixture's joint → its position, m or rad.
    gripped_objects    names of the objects that both fingers touch.
    is_commanded_open  whether the last command was to open the gripper.
    speed              of the end-effector, m/s.
    finger_speed       of the faster finger, m/s.
    success            whether the task has been fulfilled.
    steps              controller steps since the episode began.
    """

    pose: Array
    commanded: Array
    opening: float
    base: Array
    objects: Mapping[str, Box]
    regions: Mapping[str, Region]
    joints: Mapping[str, float]
    gripped_objects: tuple[str, ...]
    is_commanded_open: bool
    speed: float
    finger_speed: float
    success: bool
    steps: int

    def make_observation(self, instruction: str, pictures: Mapping[str, Array]) -> dict[str, Any]:
        """Make the observation of `spear.embodiments.libero`.

        Args:
            instruction: the task in words.
            pictures: view → uint8 [h, w, 3], upright; black ones where none was rendered.
        """
        position_in_world = self.pose[:3] + self.base
        hand = quat_multiply(torch.from_numpy(np.float64(self.pose[3:])), HAND_ROTATION)
        rotation_vector = quat_log(hand).numpy()
        finger_m = self.opening * FINGER_TRAVEL_M
        finger_positions = np.array([finger_m, -finger_m])
        state = np.concatenate([position_in_world, rotation_vector, finger_positions])  # [8]
        return {
            # Mirror left and right, as in the pictures that other projects' clients send: LIBERO
            # renders upside down, and these clients turn its pictures by 180°.
            IMAGE_KEY: np.ascontiguousarray(pictures["external"][:, ::-1]),
            WRIST_IMAGE_KEY: np.ascontiguousarray(pictures["wrist"][:, ::-1]),
            OBSERVED_STATE_KEY: state.astype(np.float32),
            BASE_POSITION_KEY: self.base.astype(np.float32),
            PROMPT_KEY: instruction,
        }


class LiberoProcess:
    """A task in a process of its own. Calls block; to run several, use a thread for each.

    instruction  the task in words.
    num_states   how many official states the task has.
    goal         the conditions of the task, for example ["on", object, place].

    Args:
        suite: name of the suite.
        task_index: number of the task, from 0.
        seed: seed of the environment, see `Protocol`.
        fast_rendering: whether pictures are rendered without multisampling and reflections, and
            of simplified meshes.

    Raises:
        SpearError: LIBERO's environment is missing, or it does not know the task.
    """

    def __init__(self, suite: str, task_index: int, seed: int, fast_rendering: bool) -> None:
        self._name = f"{suite}/{task_index}"
        self._process, self._connection = _start_worker()
        description = self._call("open", suite, task_index, seed, fast_rendering)
        self.instruction = str(description["instruction"])
        self.num_states = int(description["num_states"])
        self.goal: list[list[str]] = description["goal"]

    def list_official_object_positions(self) -> dict[str, Array]:
        """Loose object → [states, 3], where it is in each official state, world frame, m."""
        positions: dict[str, Array] = self._call("list_official_object_positions")
        return positions

    def reset(
        self,
        state_index: int,
        changes: Mapping[str, Any] | None = None,
        num_resets_since_seeding: int | None = None,
    ) -> LiberoMoment:
        """Begin an episode from an official state (see `LiberoTask.reset` in worker.py)."""
        return _read_moment(self._call("reset", state_index, changes, num_resets_since_seeding))

    def run(self, pose_steps: Array, max_episode_steps: int) -> LiberoMoment:
        """Execute rows [n, 7] of the control "pose_steps", unless the episode reaches its limit.

        The limit is in controller steps (20 Hz), and steps of earlier calls count, too.
        """
        return _read_moment(self._call("run", pose_steps, max_episode_steps))

    def run_controller(self, commands: Array, max_episode_steps: int) -> LiberoMoment:
        """Execute rows [n, 7] of the control "osc_pose"."""
        return _read_moment(self._call("run_controller", commands, max_episode_steps))

    def render(self, size: int = IMAGE_SIZE_PX) -> dict[str, Array]:
        """Render both cameras: view → uint8 [size, size, 3], upright."""
        pictures: dict[str, Array] = self._call("render", size)
        return pictures

    def render_external_ground_truth(
        self, size_px: int, appearance_changes: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Render the external camera, with the ground truth (see worker.py)."""
        frame: dict[str, Any] = self._call(
            "render_external_ground_truth", size_px, appearance_changes
        )
        return frame

    def close(self) -> None:
        self._connection.close()
        self._process.wait()

    def _call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the task in the worker process, and wait for its result."""
        try:
            self._connection.send((method, arguments))
            is_fine, result = self._connection.recv()
        except (EOFError, OSError) as error:
            raise SpearError(
                f"LIBERO's process of {self._name} ended (exit code {self._process.poll()}). If "
                "the machine was out of memory (a process takes 2 GB), give a smaller --batch-size."
            ) from error
        if not is_fine:
            raise SpearError(
                f"LIBERO's task {self._name} failed ({result}). Run the command again; it "
                "continues."
            )
        return result


def make_black_pictures() -> dict[str, Array]:
    """Make black pictures, for observations of agents that use no pictures."""
    blank = np.zeros((IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3), np.uint8)
    return {"external": blank, "wrist": blank}


def _start_worker() -> tuple[subprocess.Popen[bytes], Connection]:
    """Start worker.py in LIBERO's own Python. Return the process and the connection to it."""
    python = resolve_python()
    key = secrets.token_bytes(32)
    with tempfile.TemporaryDirectory() as folder:
        address = str(Path(folder) / "socket")
        environment = {
            **os.environ,
            "SPEAR_LIBERO_KEY": key.hex(),
            "MUJOCO_GL": os.environ.get("MUJOCO_GL", "egl"),
            "LIBERO_CONFIG_PATH": str(resolve_folder() / "config"),
            "OMP_NUM_THREADS": "1",
        }
        environment.pop("PYTHONPATH", None)  # packages of another Python
        with Listener(address, authkey=key) as listener:
            process = subprocess.Popen(
                [str(python), str(WORKER), address],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            # `accept` takes no timeout, so the listener's socket gets one.
            listener._listener._socket.settimeout(MAX_START_S)  # type: ignore[attr-defined]
            try:
                return process, listener.accept()
            except TimeoutError:
                process.kill()
                raise SpearError(
                    "LIBERO's process did not start. Run spear evaluate libero --setup again."
                ) from None


def _read_moment(values: Mapping[str, Any]) -> LiberoMoment:
    """Make a moment from what the worker sends of its state."""
    fingers = values["fingers"]
    opening = float(np.clip((fingers[0] - fingers[1]) / (2 * FINGER_TRAVEL_M), 0, 1))
    return LiberoMoment(
        pose=values["pose"],
        commanded=values["commanded"],
        opening=opening,
        base=values["base"],
        objects={name: Box(*box) for name, box in values["objects"].items()},
        regions={name: Region(*region) for name, region in values["sites"].items()},
        joints=values["joints"],
        gripped_objects=tuple(values["gripped_objects"]),
        is_commanded_open=values["is_commanded_open"],
        speed=values["speed"],
        finger_speed=values["finger_speed"],
        success=values["success"],
        steps=values["steps"],
    )
