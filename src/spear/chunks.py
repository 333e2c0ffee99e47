"""Executing action chunks: how many of the H actions to use, and what to do during inference.

Time counts in ticks of the control loop (5 Hz). A policy predicts a chunk from what the robot
observed at one tick. The chunk arrives at that tick or at a later one, when inference is done.
There are three execution modes:

sync    The robot executes k actions of a chunk (the replan interval), observes, and stands still
        until the next chunk arrives.
async   The robot observes while it still has actions, goes on with them, and switches to the next
        chunk when that arrives. By then it has made other steps than the new chunk assumed.
        `ChunkExecutor` spreads the difference along the new chunk, up to the action that opens or
        closes the gripper. So there is no jump at the seam, and the gripper acts where the new
        chunk wants it to. The gripper needs more care, because what was observed is old when it
        acts (our choice, measured in docs/results/latency.md): the `NUM_SLOW_ACTIONS` before it
        acts are slow, and a chunk that was predicted before the gripper acted but arrives
        afterwards is dropped, since it would undo that.
rtc     Real-time chunking, for policies that were trained for it (`spear.flow.sample_committed`).
        As async, but the policy gets the committed prefix: the actions that the robot will execute
        until the new chunk arrives. The new chunk begins with them, so there is nothing to join and
        no care for the gripper.
"""

import math
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, Literal, get_args

import numpy as np
import torch

from spear.errors import SpearError, check_known, notice
from spear.geometry import (
    action_between_poses,
    quat_exp,
    quat_log,
    quat_multiply,
    quat_normalize,
    validate_unit_quat,
)
from spear.types import (
    ACTION_DIM,
    CONTROL_RATE_HZ,
    MAX_EE_SPEED_M_S,
    MAX_EE_TURN_RAD_S,
    Array,
    Policy,
)

ExecutionMode = Literal["sync", "async", "rtc"]

DEFAULT_REPLAN_INTERVAL = 1
"""Number of actions of a chunk of 5 that are executed before the next inference. The paper does not
say; nano succeeds more often with 1 than with 2 or 3 (docs/results/nano.md), in SIMPLER less often
(docs/results/simpler.md)."""

NUM_SLOW_ACTIONS = 2
"""async: number of slow actions before the one that opens or closes the gripper. Each of them takes
one tick more than inference does (our choice, see docs/howto/latency.md)."""

MIN_LONGEST_STEP_M = 2e-3  # async: no chunk's actions count as shorter than this, see `_plan_steps`
MIN_LONGEST_TURN_RAD = 2e-2  # the same for rotations
MAX_PAUSE_S = 1.0  # after so long without a step, a plan is outdated: the robot may be elsewhere
MAX_ACTION_LENGTH_M = MAX_EE_SPEED_M_S / CONTROL_RATE_HZ  # longer actions are implausible
MAX_ACTION_TURN_RAD = MAX_EE_TURN_RAD_S / CONTROL_RATE_HZ
NUM_REMEMBERED_TICKS = (
    256  # executed actions that are kept, to know the motion since an observation
)

_CLOSED_BELOW = 0.5  # gripper opening


@dataclass(frozen=True)
class _Chunk:
    """Actions [H, 8], predicted from the observation of one tick, usable from another tick on."""

    actions: Array
    observed_tick: int
    arrival_tick: int

    @property
    def delay_ticks(self) -> int:
        return self.arrival_tick - self.observed_tick


@dataclass(frozen=True)
class _Step:
    """What to do in one tick: an action [8], and the fraction of a chunk's action that it is."""

    action: Array
    fraction: float


class ChunkExecutor:
    """Chooses the action of each tick from the chunks that it gets, for one robot or scene.

    A control loop calls it like this:

        while True:
            if executor.needs_chunk():
                observation = observe() | executor.committed_actions()
                executor.add_chunk(policy.infer(observation)["actions"])
            execute(executor.next_action())

    Args:
        mode: the execution mode, see the module's description.
        replan_interval: k, the number of actions of a chunk that are executed before the next
            inference.
        max_committed: in rtc the longest committed prefix that the policy was trained with
            (`Spear1Policy.committed`).
        gripper: the gripper's last commanded opening, 0 to 1.

    Raises:
        SpearError: for an unknown mode, rtc without `max_committed`, and an interval of less than
            1.

    Example:
        >>> executor = ChunkExecutor("sync", replan_interval=2)
        >>> executor.needs_chunk()
        True
        >>> chunk = np.zeros((5, 8), np.float32)
        >>> chunk[:, 0] = 0.01  # 1 cm per step along x of the base frame
        >>> chunk[:, 3] = 1  # no rotation
        >>> executor.add_chunk(chunk)
        >>> [executor.next_action()[0].item() for _ in range(2)]
        [0.009999999776482582, 0.009999999776482582]
        >>> executor.needs_chunk()
        True
    """

    def __init__(
        self,
        mode: ExecutionMode = "sync",
        replan_interval: int = DEFAULT_REPLAN_INTERVAL,
        max_committed: int = 0,
        gripper: float = 1,
    ) -> None:
        check_known("way of executing chunks", get_args(ExecutionMode), mode)
        if mode == "rtc" and not max_committed:
            raise SpearError(
                "--execution rtc: the policy was not trained for it. Use async, or train with "
                "--set committed=2."
            )
        check_replan_interval(replan_interval)
        self.mode = mode
        self.replan_interval = replan_interval
        self.max_committed = max_committed
        self.gripper = gripper
        self.tick = 0
        self._arriving: list[_Chunk] = []
        self._planned: list[_Step] = []  # one per tick, beginning with the next one
        self._executed: deque[_Step | None] = deque(maxlen=NUM_REMEMBERED_TICKS)
        self._gripper_change_tick = -1  # the tick after the last that opened or closed the gripper
        self._last_observed_tick = -replan_interval
        self._delay_ticks = 0  # of the last chunk
        self._horizon = 0

    def needs_chunk(self) -> bool:
        """Whether the executor needs a new observation now, and `add_chunk` before the next tick.

        In async and rtc the chunk may also come later, with the tick of its observation.
        """
        if self._last_observed_tick == self.tick:
            return False
        self._adopt_arrived_chunks()
        if self._arriving:
            return False
        if self.mode == "sync":
            return not self._planned
        has_interval_passed = self.tick - self._last_observed_tick >= self.replan_interval
        num_needed_for_inference = min(self._delay_ticks, self._horizon - 1)
        return has_interval_passed or len(self._planned) <= num_needed_for_inference

    def committed_actions(self) -> dict[str, Array]:
        """The part of an observation that the executor knows: in rtc the committed prefix.

        These are the actions that the robot executes before a chunk from an observation of now
        arrives, if inference takes as long as the last time.

        Returns:
            {"committed": [d, 8]}, or {} where nothing is committed.
        """
        if self.mode != "rtc":
            return {}
        num_committed = min(self._delay_ticks, self.max_committed)
        actions = [step.action for step in self._planned[:num_committed]]
        return {"committed": np.stack(actions)} if actions else {}

    def add_chunk(
        self, actions: Array, observed_tick: int | None = None, arrival_tick: int | None = None
    ) -> None:
        """Accept a chunk that a policy has predicted.

        Args:
            actions: [H, 8], in the layout of `spear.types.Action`; they are copied.
            observed_tick: tick of the observation; the present one by default.
            arrival_tick: tick from which the chunk can be used; the present one by default.

        Raises:
            SpearError: as `validate_chunk` does, and for a chunk shorter than the replan interval.
        """
        actions = validate_chunk(actions).copy()
        check_replan_interval(self.replan_interval, len(actions))
        if observed_tick is None:
            observed_tick = self.tick
        if arrival_tick is None:
            arrival_tick = self.tick
        chunk = _Chunk(actions, observed_tick, arrival_tick)
        self._arriving.append(chunk)
        self._last_observed_tick = max(self._last_observed_tick, observed_tick)
        self._delay_ticks = chunk.delay_ticks

    def next_action(self) -> Array:
        """The action [8] to execute in this tick, which ends with the call.

        Without a planned action it is no motion, with the gripper as last commanded.
        """
        self._adopt_arrived_chunks()
        self.tick += 1
        step = self._planned.pop(0) if self._planned else None
        self._executed.append(step)
        if step is None:
            return np.array([0, 0, 0, 1, 0, 0, 0, self.gripper], np.float32)
        if self._find_gripper_change([step.action]) == 0:
            self._gripper_change_tick = self.tick
        self.gripper = float(step.action[7])
        return step.action.copy()

    def _adopt_arrived_chunks(self) -> None:
        """Plan the next ticks by the chunks that have arrived; the last one replaces others."""
        for chunk in self._arriving:
            if chunk.arrival_tick > self.tick:
                continue
            self._horizon = len(chunk.actions)
            if self.mode == "sync":
                actions = chunk.actions[: self.replan_interval]
                self._planned = [_Step(action, 1.0) for action in actions]
            elif self.mode == "rtc" or chunk.observed_tick >= self._gripper_change_tick:
                self._planned = self._plan_steps(chunk)
        self._arriving = [chunk for chunk in self._arriving if chunk.arrival_tick > self.tick]

    def _plan_steps(self, chunk: _Chunk) -> list[_Step]:
        """Plan the next ticks: a chunk's remaining actions, joined to the executed ones.

        An action that takes several ticks becomes several steps: before the gripper acts, and where
        joining has made an action longer than any that the chunk or the robot has made.
        """
        executed = self._executed_since(chunk.observed_tick)
        executed_actions = [step.action for step in executed]
        num_executed = round(sum(step.fraction for step in executed), 3)  # in actions of a chunk

        # In rtc only an inference that took longer than announced leaves anything to join, and the
        # gripper needs no care.
        gripper_change = None
        if self.mode == "async":
            gripper_change = self._find_gripper_change(chunk.actions[int(num_executed) :])
        actions = _join(chunk.actions, executed_actions, num_executed, gripper_change)

        longest = _lengths(np.stack([*chunk.actions, *executed_actions])).max(axis=0)
        longest = np.maximum(longest, (MIN_LONGEST_STEP_M, MIN_LONGEST_TURN_RAD))

        steps = []
        gripper = self.gripper
        for index, action in enumerate(actions):
            fraction = 1 - num_executed % 1 if index == 0 else 1.0
            num_ticks = 1
            if gripper_change is not None and 0 < gripper_change - index <= NUM_SLOW_ACTIONS:
                num_ticks = max(1, round(fraction * (1 + chunk.delay_ticks)))
            num_ticks = max(num_ticks, math.ceil((_lengths(action) / longest).max() - 1e-3))

            step_actions = np.repeat(_scale_action(action, 1 / num_ticks)[None], num_ticks, axis=0)
            step_actions[:-1, 7] = gripper  # the gripper acts where the action ends
            gripper = action[7]

            # In rtc the next committed prefix contains each part as an action.
            step_fraction = 1.0 if self.mode == "rtc" else fraction / num_ticks
            steps += [_Step(step_action, step_fraction) for step_action in step_actions]
        return steps

    def _executed_since(self, tick: int) -> list[_Step]:
        """The steps executed since the observation of a tick, without ticks of no motion."""
        first = max(0, len(self._executed) - (self.tick - tick))
        return [step for step in list(self._executed)[first:] if step is not None]

    def _find_gripper_change(self, actions: Iterable[Array]) -> int | None:
        """The index of the first of these actions that opens or closes the gripper."""
        was_closed = self.gripper < _CLOSED_BELOW
        for index, action in enumerate(actions):
            if (action[7] < _CLOSED_BELOW) != was_closed:
                return index
        return None


@dataclass(frozen=True)
class _Inference:
    """An inference that runs, or has ended, in another thread."""

    observed_tick: int
    result: Future[dict[str, Any]]
    start_time_s: float


class Pilot:
    """Drives one robot from a policy whose actions are SPEAR-1's own ([H, 8], meters).

    Call `step` once per tick (0.2 s). In the mode "sync" a step waits for its chunk, which is best
    while inference takes a small part of a tick (docs/howto/latency.md). In the other modes
    inference runs in another thread, and only the first step waits for it.

    The pilot keeps time. A step that comes early waits for its tick, because the same actions made
    faster would move the robot faster; a notice says so, since the observation is old by then.
    After a late step (by half a tick at most) steps are a tenth shorter until they are in time
    again (our choice). After a pause of `MAX_PAUSE_S`, and when the prompt changes, the pilot drops
    its plan and begins anew. It also drops a chunk whose inference took so much longer than the one
    before.

    Args:
        policy: a loaded policy, or a client of a server that sends SPEAR-1's own actions.
        mode: the execution mode, see `ChunkExecutor`.
        replan_interval: the number of actions of a chunk that are executed before the next
            inference.

    Raises:
        SpearError: for "rtc" with a policy that was not trained for it, and for a server that sends
            a robot's own commands: poses, for one, look like displacements. `step` raises what the
            policy raises.
    """

    def __init__(
        self,
        policy: Policy,
        mode: ExecutionMode = "sync",
        replan_interval: int = DEFAULT_REPLAN_INTERVAL,
    ) -> None:
        metadata = getattr(policy, "metadata", {})
        if metadata.get("converted"):
            robot = metadata["embodiment"]
            raise SpearError(
                f"the server is for robot {robot!r}. Start it with `--embodiment generic`."
            )
        self._policy = policy
        self._create_executor = partial(
            ChunkExecutor,
            mode,
            replan_interval,
            max_committed=getattr(policy, "committed", 0),
        )
        self._executor = self._create_executor()
        self._prompt: Any = None
        self._last_step_time_s = -math.inf
        self._next_tick_time_s = -math.inf
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pilot")
        self._inference: _Inference | None = None
        self._inference_s = math.inf  # the first inference may take long

    def step(self, observation: Mapping[str, Any]) -> Array:
        """The action [8] to execute now, after an observation (see `spear.types.Policy`)."""
        now_s = time.monotonic()
        tick_s = 1 / CONTROL_RATE_HZ
        self._begin_anew_if_outdated(observation.get("prompt"), now_s)

        if self._next_tick_time_s - now_s > tick_s / 4:
            notice(
                f"Pilot.step waits: observe and call it once in {tick_s:g} s; simulators: "
                "ChunkExecutor"
            )
        earliest_s = max(self._next_tick_time_s, self._last_step_time_s + 0.9 * tick_s)
        time.sleep(max(0.0, earliest_s - now_s))
        self._next_tick_time_s = max(self._next_tick_time_s, now_s - tick_s / 2) + tick_s

        executor = self._executor
        self._collect_chunk(wait=False)
        if self._inference is None and executor.needs_chunk():
            self._start_inference(observation)
        self._collect_chunk(wait=executor.mode == "sync" or executor.tick == 0)
        self._last_step_time_s = time.monotonic()
        return executor.next_action()

    def close(self) -> None:
        """End the inference thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _begin_anew_if_outdated(self, prompt: Any, now_s: float) -> None:
        """Drop the plan after a pause and when the prompt has changed."""
        is_outdated = now_s - self._last_step_time_s > MAX_PAUSE_S or prompt != self._prompt
        self._prompt = prompt
        if is_outdated:
            self._executor = self._create_executor(gripper=self._executor.gripper)
            self._inference = None
            self._next_tick_time_s = -math.inf

    def _start_inference(self, observation: Mapping[str, Any]) -> None:
        # The robot's program may write the next image into the memory of this one.
        observation = deepcopy(dict(observation)) | self._executor.committed_actions()
        result = self._thread.submit(self._policy.infer, observation)
        self._inference = _Inference(self._executor.tick, result, time.monotonic())

    def _collect_chunk(self, wait: bool) -> None:
        """Give the executor the chunk of the inference if that has ended, or wait for it."""
        inference = self._inference
        if inference is None or not (wait or inference.result.done()):
            return
        self._inference = None
        actions = inference.result.result()["actions"]

        previous_inference_s = self._inference_s
        self._inference_s = time.monotonic() - inference.start_time_s
        if self._inference_s > previous_inference_s + MAX_PAUSE_S:
            notice(
                f"an answer took {self._inference_s:.1f} s: dropped, as the robot may be "
                "elsewhere now"
            )
        else:
            self._executor.add_chunk(actions, observed_tick=inference.observed_tick)


def check_replan_interval(replan_interval: int, horizon: int | None = None) -> None:
    """Raise `SpearError` for a replan interval below 1 or above the number of actions."""
    if replan_interval >= 1 and (horizon is None or replan_interval <= horizon):
        return
    maximum = "" if horizon is None else f", and at most the {horizon} that the policy predicts"
    raise SpearError(
        f"--replan-steps {replan_interval}: execute at least 1 action of a chunk{maximum}."
    )


def validate_chunk(actions: Array) -> Array:
    """Check a policy's chunk before a robot moves by it.

    Args:
        actions: anything that should be an action chunk.

    Returns:
        The chunk as an array [H, 8]: translation (m, base frame), rotation (unit quaternion,
        end-effector frame), gripper opening.

    Raises:
        SpearError: if it is not [H, 8] finite numbers with unit quaternions, or if one of its
            actions is longer than `MAX_ACTION_LENGTH_M` or turns by more than
            `MAX_ACTION_TURN_RAD`.
    """
    actions = np.asarray(actions)
    if actions.ndim != 2 or actions.shape[1] != ACTION_DIM or not np.isfinite(actions).all():
        raise SpearError(
            f"actions {list(actions.shape)}: not finite, or not [H, 8]. So do not move; check the "
            "policy's weights, and that a server of it has --embodiment generic."
        )
    max_length_m, max_turn_rad = _lengths(actions).max(axis=0, initial=0)
    if max_length_m > MAX_ACTION_LENGTH_M or max_turn_rad > MAX_ACTION_TURN_RAD:
        raise SpearError(
            f"the policy wants to go {max_length_m:.2g} m, or turn by {max_turn_rad:.2g} rad, in "
            "one step. So do not move; check it with spear doctor."
        )
    validate_unit_quat(torch.from_numpy(np.float64(actions[:, 3:7])), "actions[3:7]")
    return actions


def _join(
    actions: Array, executed: Sequence[Array], num_executed: float, gripper_change: int | None
) -> Array:
    """Join a chunk to the actions that the robot executed since the observation of the chunk.

    A chunk describes a path: the poses after each of its actions. Because the robot executed other
    actions, it is not at the pose of the path where it was to be by now. That offset fades linearly
    to zero along the remaining actions, so that the actions change little and the last pose is the
    one that the chunk wanted.

    Args:
        actions: [H, 8], the chunk.
        executed: the actions [8] executed since its observation.
        num_executed: how many of the chunk's actions these correspond to; not always an integer.
        gripper_change: which of the remaining actions opens or closes the gripper. The offset is
            zero from the action before it on.

    Returns:
        The remaining actions, [H - ⌊num_executed⌋, 8].
    """
    first = int(num_executed)
    num_remaining = len(actions) - first
    if not executed or num_remaining <= 0:
        return actions[first:].copy()

    # The offset, as an action from the pose planned for now to the actual one.
    planned_until_now = [*actions[:first], _scale_action(actions[first], num_executed % 1)]
    planned_position, planned_rotation = _pose_after(planned_until_now)
    actual_position, actual_rotation = _pose_after(executed)
    position_offset, rotation_offset = action_between_poses(
        planned_position, planned_rotation, actual_position, actual_rotation
    )

    # The poses of the new path: the actual one, then those of the chunk with the fading offset.
    num_fading = num_remaining if gripper_change is None else gripper_change
    fade = (
        1
        - torch.arange(1, num_remaining + 1, dtype=torch.float32, device="cpu") / max(1, num_fading)
    ).clamp_min(0)[:, None]
    path_positions, path_rotations = _path(actions)
    positions = path_positions[first:] + fade * position_offset
    rotations = quat_multiply(path_rotations[first:], quat_exp(fade * quat_log(rotation_offset)))
    positions = torch.cat([actual_position[None], positions])
    rotations = torch.cat([actual_rotation[None], rotations])

    translation, rotation = action_between_poses(
        positions[:-1], rotations[:-1], positions[1:], rotations[1:]
    )
    gripper = actions[first:, 7:]
    return np.concatenate([translation.numpy(), rotation.numpy(), gripper], axis=1).astype(
        np.float32
    )


def _lengths(actions: Array) -> Array:
    """How far actions [..., 8] move (m) and turn (rad), [..., 2]."""
    translation, real, imaginary, _ = np.split(np.float64(actions), (3, 4, 7), axis=-1)
    length_m = np.linalg.norm(translation, axis=-1)
    sine = np.linalg.norm(imaginary, axis=-1)  # `quat_log` would take half a millisecond
    turn_rad = 2 * np.arctan2(sine, np.abs(real[..., 0]))
    return np.stack([length_m, turn_rad], axis=-1)


def _scale_action(action: Array, fraction: float) -> Array:
    """A fraction of the motion of an action [8], with its gripper opening."""
    rotation = torch.from_numpy(np.float64(action[3:7]))
    scaled_rotation = quat_exp(fraction * quat_log(rotation)).numpy()
    return np.concatenate([fraction * action[:3], scaled_rotation, action[7:]]).astype(np.float32)


def _path(actions: Array) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions [n, 3] and rotations [n, 4] after each of n actions [n, 8], from their start."""
    vectors = torch.from_numpy(np.float64(actions))
    positions = vectors[:, :3].cumsum(0)
    rotations = torch.stack(list(accumulate(vectors[:, 3:7], quat_multiply)))
    return positions, quat_normalize(rotations)


def _pose_after(actions: Sequence[Array]) -> tuple[torch.Tensor, torch.Tensor]:
    """Position [3] and rotation [4] after some actions, relative to where they start."""
    positions, rotations = _path(np.stack(actions))
    return positions[-1], rotations[-1]
