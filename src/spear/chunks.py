"""Executing action chunks: how many of the H actions to use, and what to do during inference.

Time counts in ticks of the control loop (5 Hz). A policy predicts a chunk from what the robot
observed at one tick. The chunk arrives at that tick or at a later one, when inference is done.
There are three execution modes:

sync    The robot executes k actions of a chunk (the replan interval), observes, and stands still
        until the next chunk arrives.
async   The robot observes while it still has actions of the running chunk, continues to execute
        them, and switches to the new chunk when the new chunk arrives. By then the robot has
        executed other actions than the first ones of the new chunk, so it is not where the new
        chunk expects it to be. `ChunkExecutor` spreads this difference along the new chunk, up to
        the action that opens or closes the gripper. So the robot does not jump at the switch, and
        the gripper acts at the place that the new chunk wants. The gripper needs two more
        measures, because the observation is old by the time that the gripper acts (our choice,
        measured in docs/results/latency.md). First, the `NUM_SLOW_ACTIONS` actions before the
        gripper acts are slowed down. Second, a chunk is dropped if it was predicted before the
        gripper acted but arrives afterwards, since it would undo the gripper's action.
rtc     Real-time chunking, for policies that were trained for it
        (`spear.flow.sample_committed_mask`). As async, but the policy gets the committed prefix:
        the actions that the robot will execute until the new chunk arrives. The new chunk begins
        with the committed prefix, so the robot is where the new chunk expects it to be, and none of
        async's measures are needed.

A *step* in this file is what the robot executes in one tick: an action of a chunk, or a part of an
action that was spread over several ticks.
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

from spear.embodiments.actions import measure_lengths_and_angles, validate_chunk
from spear.errors import SpearError, check_known, notice
from spear.geometry import (
    action_between_poses,
    quat_exp,
    quat_log,
    quat_multiply,
    quat_normalize,
)
from spear.types import (
    CONTROL_RATE_HZ,
    Array,
    Policy,
)

ExecutionMode = Literal["sync", "async", "rtc"]

DEFAULT_REPLAN_INTERVAL = 1
"""Number of actions of a chunk of 5 that are executed before the next inference. The paper gives no
number. The nano policy succeeds more often with 1 than with 2 or 3 (docs/results/nano.md), but in
the SIMPLER benchmark less often (docs/results/simpler.md)."""

NUM_SLOW_ACTIONS = 2
"""In async, the number of slow actions before the one that opens or closes the gripper. A slow
action takes one tick more than inference does (our choice, see docs/howto/latency.md)."""

# In async an action is split if joining made it longer than the longest action of the chunk, see
# `_plan_steps`. If all actions of a chunk are shorter than this, this length is the limit instead.
MIN_LONGEST_STEP_M = 2e-3
MIN_LONGEST_TURN_RAD = 2e-2  # the same for rotations

# How `Pilot` keeps time, in ticks (our choice, see its docstring).
MAX_EARLY_TICKS = 0.25  # a call of `step` that comes earlier than this gives a notice
MAX_LATE_TICKS = 0.5  # of a longer delay, only so much is made up for
MIN_TICK_LENGTH = 0.9  # length of a tick while a delay is made up for

MAX_PAUSE_S = 1.0  # after a longer pause the plan is outdated, because the robot may have moved

# Number of executed steps that are stored, from which the motion since an observation is computed.
NUM_REMEMBERED_TICKS = 256

_CLOSED_BELOW = 0.5  # a gripper opening below this counts as closed


@dataclass(frozen=True)
class _Chunk:
    """A predicted action chunk with the ticks of its observation and of its arrival."""

    actions: Array  # [H, 8]
    observed_tick: int  # the tick of the observation that the chunk was predicted from
    arrival_tick: int  # the first tick in which the chunk can be used

    @property
    def delay_ticks(self) -> int:
        """The number of ticks that inference took."""
        return self.arrival_tick - self.observed_tick


@dataclass(frozen=True)
class _Step:
    """What the robot does in one tick."""

    action: Array  # [8]
    fraction: float  # which fraction of an action of the chunk this is; 1 is a whole action


class ChunkExecutor:
    """Chooses the action of each tick from the predicted chunks, for one robot or scene.

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
                "--execution rtc needs a policy that was trained for it. Use async, or train "
                "with --set committed=2."
            )
        check_replan_interval(replan_interval)
        self.mode = mode
        self.replan_interval = replan_interval
        self.max_committed = max_committed
        self.gripper = gripper
        self.tick = 0
        self._arriving_chunks: list[_Chunk] = []  # chunks that were added but have not arrived yet
        self._planned_steps: list[_Step] = []  # the steps of the next ticks, one per tick
        # The steps of the last ticks, one per tick; None for a tick without a planned step.
        self._executed_steps: deque[_Step | None] = deque(maxlen=NUM_REMEMBERED_TICKS)
        # The tick that followed the last opening or closing of the gripper; -1 if there was none.
        self._gripper_change_tick = -1
        self._last_observed_tick = -replan_interval  # so that the first tick needs a chunk
        self._delay_ticks = 0  # delay of the last chunk
        self._is_last_chunk_dropped = False  # the last chunk that has arrived
        self._horizon = 0  # number of actions of the last chunk

    def needs_chunk(self) -> bool:
        """Whether the caller should observe now and call `add_chunk` with the predicted chunk.

        In sync the caller adds the chunk before the next tick. In async and rtc the caller may add
        the chunk in a later tick, and passes the tick of the observation as `observed_tick`.

        A chunk that was added before and has arrived by now becomes the plan at this call.

        Returns:
            True if a chunk is needed.
        """
        if self._last_observed_tick == self.tick:
            return False
        self._adopt_arrived_chunks()
        if self._arriving_chunks:
            return False
        if self.mode == "sync":
            return not self._planned_steps
        has_interval_passed = self.tick - self._last_observed_tick >= self.replan_interval
        # During inference the robot executes planned steps, as many as the last inference took
        # ticks. When no more than these are left, the next inference has to start. The limit is
        # below the horizon, so that a chunk is not replaced before any of it was executed.
        num_needed_for_inference = min(self._delay_ticks, self._horizon - 1)
        return has_interval_passed or len(self._planned_steps) <= num_needed_for_inference

    def committed_actions(self) -> dict[str, Array]:
        """Return the entry of the present observation that tells the policy the committed prefix.

        Only rtc has a committed prefix. It consists of the actions that the robot will execute
        during the next inference, which is assumed to take as long as the last one.

        Returns:
            {"committed": [d, 8]}, d committed actions in the layout of `spear.types.Action`; {} if
            nothing is committed.
        """
        if self.mode != "rtc":
            return {}
        num_committed = min(self._delay_ticks, self.max_committed)
        actions = [step.action for step in self._planned_steps[:num_committed]]
        return {"committed": np.stack(actions)} if actions else {}

    def add_chunk(
        self, actions: Array, observed_tick: int | None = None, arrival_tick: int | None = None
    ) -> None:
        """Accept a chunk that a policy has predicted.

        Args:
            actions: [H, 8], in the layout of `spear.types.Action`; they are copied.
            observed_tick: the tick of the observation; the present tick by default.
            arrival_tick: the first tick in which the chunk can be used; the present one by default.

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
        self._arriving_chunks.append(chunk)
        self._last_observed_tick = max(self._last_observed_tick, observed_tick)
        self._delay_ticks = chunk.delay_ticks

    def next_action(self) -> Array:
        """Return the action [8] to execute in this tick, and go on to the next tick.

        If no step is planned, the action is no motion, with the last commanded gripper opening.

        Returns:
            [8]: translation (m, base frame), quaternion (end-effector frame), gripper opening.
        """
        self._adopt_arrived_chunks()
        self.tick += 1
        step = self._planned_steps.pop(0) if self._planned_steps else None
        self._executed_steps.append(step)
        if step is None:
            return np.array([0, 0, 0, 1, 0, 0, 0, self.gripper], np.float32)
        is_gripper_change = self._find_gripper_change([step.action]) is not None
        if is_gripper_change:
            self._gripper_change_tick = self.tick
        self.gripper = float(step.action[7])
        return step.action.copy()

    @property
    def is_standing_still(self) -> bool:
        """Whether the last action was no motion because no step was planned."""
        return bool(self._executed_steps) and self._executed_steps[-1] is None

    @property
    def is_last_chunk_dropped(self) -> bool:
        """Whether the last chunk that arrived was dropped, because the gripper acted meanwhile."""
        return self._is_last_chunk_dropped

    def _adopt_arrived_chunks(self) -> None:
        """Plan the next ticks by the chunks that have arrived; the last chunk replaces the plan."""
        for chunk in self._arriving_chunks:
            if chunk.arrival_tick > self.tick:
                continue
            self._horizon = len(chunk.actions)
            self._is_last_chunk_dropped = False
            if self.mode == "sync":
                actions = chunk.actions[: self.replan_interval]
                self._planned_steps = [_Step(action, 1.0) for action in actions]
            elif self.mode == "rtc" or chunk.observed_tick >= self._gripper_change_tick:
                self._planned_steps = self._plan_steps(chunk)
            else:  # async: the chunk does not know that the gripper has acted
                self._is_last_chunk_dropped = True
        self._arriving_chunks = [
            chunk for chunk in self._arriving_chunks if chunk.arrival_tick > self.tick
        ]

    def _plan_steps(self, chunk: _Chunk) -> list[_Step]:
        """Plan the next ticks: a chunk's remaining actions, joined to the executed ones.

        An action becomes several steps, one per tick, in two cases: it is one of the slow actions
        before the gripper acts, or joining has made it longer than all actions of the chunk and all
        executed actions.
        """
        executed = self._list_executed_since(chunk.observed_tick)
        executed_actions = [step.action for step in executed]
        # How many of the chunk's actions the executed steps amount to. Not always an integer,
        # because a step may be a part of an action.
        num_executed = round(sum(step.fraction for step in executed), 3)
        num_finished = int(num_executed)

        # In rtc the chunk begins with the committed prefix, so there is something to join only if
        # inference took longer than the prefix, and no action is slowed down for the gripper.
        gripper_change = None
        if self.mode == "async":
            gripper_change = self._find_gripper_change(chunk.actions[num_finished:])
        actions = _join_remaining_to_executed(
            chunk.actions, executed_actions, num_executed, gripper_change
        )

        # The largest translation (m) and rotation (rad) of an action before joining, [2].
        max_lengths = measure_lengths_and_angles(np.stack([*chunk.actions, *executed_actions])).max(
            axis=0
        )
        max_lengths = np.maximum(max_lengths, (MIN_LONGEST_STEP_M, MIN_LONGEST_TURN_RAD))

        steps = []
        gripper = self.gripper
        for index, action in enumerate(actions):
            # Only the first of the remaining actions may have been executed in part.
            fraction = 1.0
            if index == 0:
                fraction = 1 - num_executed % 1

            num_ticks = 1
            if gripper_change is not None and 0 < gripper_change - index <= NUM_SLOW_ACTIONS:
                num_ticks = max(1, round(fraction * (1 + chunk.delay_ticks)))
            relative_length = (measure_lengths_and_angles(action) / max_lengths).max()
            # Rounding errors of up to a thousandth do not cost a tick.
            num_ticks = max(num_ticks, math.ceil(relative_length - 1e-3))

            step_action = _shorten_motion(action, 1 / num_ticks)
            step_actions = np.repeat(step_action[None], num_ticks, axis=0)  # [num_ticks, 8]
            step_actions[:-1, 7] = gripper  # the gripper moves only in the action's last tick
            gripper = action[7]

            # In rtc the next committed prefix contains each step as a whole action.
            step_fraction = 1.0 if self.mode == "rtc" else fraction / num_ticks
            steps += [_Step(step_action, step_fraction) for step_action in step_actions]
        return steps

    def _list_executed_since(self, tick: int) -> list[_Step]:
        """The steps executed since the start of a tick; ticks without a planned step are left out.

        `_executed_steps` ends with the tick before `self.tick`, and forgets the oldest ticks.
        """
        num_ticks = self.tick - tick
        first_index = max(0, len(self._executed_steps) - num_ticks)
        return [step for step in list(self._executed_steps)[first_index:] if step is not None]

    def _find_gripper_change(self, actions: Iterable[Array]) -> int | None:
        """The index of the first of `actions` that opens or closes the gripper; None if none does.

        The gripper's present state is the last commanded one.
        """
        was_closed = self.gripper < _CLOSED_BELOW
        for index, action in enumerate(actions):
            if (action[7] < _CLOSED_BELOW) != was_closed:
                return index
        return None


@dataclass(frozen=True)
class _Inference:
    """An inference in another thread; it still runs or has ended."""

    observed_tick: int  # the executor's tick in which the observation was taken
    result: Future[dict[str, Any]]
    start_time_s: float


class Pilot:
    """Drives one robot from a policy whose actions are SPEAR-1's own ([H, 8], meters).

    Call `step` once per tick (0.2 s). In the mode "sync" `step` waits until inference has ended,
    which is best while inference takes a small part of a tick (docs/howto/latency.md). In the
    other modes inference runs in another thread, and only the first call of `step` waits for it. If
    an answer comes later than the actions of the chunk before it last, `step` returns actions
    without motion until it comes, with the last gripper command. So it does after a chunk was
    dropped because the gripper acted meanwhile. A notice says each of the two once.

    The pilot keeps time. A call of `step` that comes early waits for its tick, because a robot that
    executes the same actions at a higher rate moves faster. A notice tells you about early calls,
    because the observation grows old while the pilot waits. After a late call each tick is shorter
    by a tenth until the delay is made up for. Of a longer delay, only half a tick is made up for
    (our choice).
    After a pause of `MAX_PAUSE_S`, and when the prompt changes, the pilot drops its plan and begins
    anew.
    The pilot also drops a chunk whose inference took more than `MAX_PAUSE_S` longer than the
    inference before.

    Args:
        policy: a loaded policy, or a client of a server that sends SPEAR-1's own actions.
        mode: the execution mode, see `ChunkExecutor`.
        replan_interval: the number of actions of a chunk that are executed before the next
            inference.

    Raises:
        SpearError: for "rtc" with a policy that was not trained for it, and for a server that sends
            commands in a robot's own format. Such commands could be poses, for example, and the
            pilot would execute them as displacements. `step` raises what the policy raises.

    Example:
        >>> from spear.policy import Spear1Policy
        >>> pilot = Pilot(Spear1Policy.load("nano"), "async")  # doctest: +SKIP
        >>> while True:  # doctest: +SKIP
        ...     action = pilot.step(observe())  # `observe` and `robot` are yours
        ...     robot.execute(action)
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
        self._prompt: Any = None  # the prompt of the last observation
        # Times on the monotonic clock: when the last step returned, and when the next tick begins.
        # Minus infinity means that the pilot begins anew, and waits for nothing.
        self._last_step_time_s = -math.inf
        self._next_tick_time_s = -math.inf
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pilot")
        self._inference: _Inference | None = None  # the inference that runs, or whose chunk waits
        self._inference_s = math.inf  # duration of the last inference; the first may take any time
        # Whether each of the two notices of `_say_once_why_it_stands` came.
        self._has_said_that_chunks_are_dropped = False
        self._has_said_that_it_waits = False

    def step(self, observation: Mapping[str, Any]) -> Array:
        """Return the action [8] to execute now.

        Args:
            observation: what the robot observes now, with the keys of `spear.types.Policy`.

        Returns:
            [8]: translation (m, base frame), quaternion (end-effector frame), gripper opening.
        """
        now_s = time.monotonic()
        tick_s = 1 / CONTROL_RATE_HZ
        self._begin_anew_if_outdated(observation.get("prompt"), now_s)

        # Wait for the tick. After a late call the next tick is planned as if the call had been at
        # most `MAX_LATE_TICKS` late, and the present tick may be as short as `MIN_TICK_LENGTH`.
        if self._next_tick_time_s - now_s > MAX_EARLY_TICKS * tick_s:
            notice(
                f"Pilot.step waits until a step is due. Observe and call it once in {tick_s:g} "
                "s; in a simulator, use ChunkExecutor."
            )
        earliest_s = max(self._next_tick_time_s, self._last_step_time_s + MIN_TICK_LENGTH * tick_s)
        time.sleep(max(0.0, earliest_s - now_s))
        planned_start_s = max(self._next_tick_time_s, now_s - MAX_LATE_TICKS * tick_s)
        self._next_tick_time_s = planned_start_s + tick_s

        # Collect a finished inference, and start the next one if needed. In sync, and in the first
        # tick, wait until inference has ended.
        executor = self._executor
        self._pass_finished_chunk_to_executor(wait=False)
        if self._inference is None and executor.needs_chunk():
            self._start_inference(observation)
        self._pass_finished_chunk_to_executor(wait=executor.mode == "sync" or executor.tick == 0)
        self._last_step_time_s = time.monotonic()
        action = executor.next_action()
        if executor.is_standing_still:
            self._say_once_why_it_stands()
        return action

    def close(self) -> None:
        """End the inference thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _begin_anew_if_outdated(self, prompt: Any, now_s: float) -> None:
        """Drop the plan and the running inference after a pause or a change of the prompt."""
        is_outdated = now_s - self._last_step_time_s > MAX_PAUSE_S or prompt != self._prompt
        self._prompt = prompt
        if is_outdated:
            self._executor = self._create_executor(gripper=self._executor.gripper)
            self._inference = None
            self._next_tick_time_s = -math.inf

    def _start_inference(self, observation: Mapping[str, Any]) -> None:
        """Start inference from an observation in the other thread."""
        # The copy is needed because the robot's program may reuse the arrays of the observation for
        # the next one while inference runs.
        observation = deepcopy(dict(observation)) | self._executor.committed_actions()
        result = self._thread.submit(self._policy.infer, observation)
        self._inference = _Inference(self._executor.tick, result, time.monotonic())

    def _pass_finished_chunk_to_executor(self, wait: bool) -> None:
        """Pass the chunk of the running inference to the executor, if inference has ended.

        Args:
            wait: whether to wait for the end of an inference that still runs.
        """
        inference = self._inference
        if inference is None or not (wait or inference.result.done()):
            return
        self._inference = None
        actions = inference.result.result()["actions"]

        previous_inference_s = self._inference_s
        self._inference_s = time.monotonic() - inference.start_time_s
        if self._inference_s > previous_inference_s + MAX_PAUSE_S:
            notice(
                f"an answer took {self._inference_s:.1f} s and was dropped, because the robot "
                "may be elsewhere now."
            )
        else:
            self._executor.add_chunk(actions, observed_tick=inference.observed_tick)

    def _say_once_why_it_stands(self) -> None:
        """Give a notice if the robot stands still because it waits for an answer.

        There are two reasons: an answer was dropped, or this one is late. Each is said once.
        """
        if self._inference is None:
            return
        if self._executor.is_last_chunk_dropped:
            if not self._has_said_that_chunks_are_dropped:
                self._has_said_that_chunks_are_dropped = True
                notice(
                    "the robot stands still until the next answer, because the last one was "
                    "dropped: the gripper opened or closed while the policy computed it. This "
                    "notice comes once. If the gripper opens and closes again and again, the "
                    "policy is not sure (docs/howto/latency.md)."
                )
        elif not self._has_said_that_it_waits:
            self._has_said_that_it_waits = True
            waiting_s = time.monotonic() - self._inference.start_time_s
            notice(
                "the robot stands still, because all actions of the last answer are executed and "
                f"the policy has computed the next one for {waiting_s:.1f} s. This notice comes "
                "once. docs/howto/latency.md says how to measure the latency."
            )


def count_latency_steps(latency_ms: float) -> int:
    """Return how many control steps pass from an observation until its chunk can be used."""
    latency_steps = latency_ms / 1000 * CONTROL_RATE_HZ
    return math.ceil(latency_steps - 1e-9)  # so that a rounding error adds no step


def check_replan_interval(replan_interval: int, horizon: int | None = None) -> None:
    """Raise `SpearError` for a replan interval below 1, or above the `horizon` of the chunks."""
    if replan_interval >= 1 and (horizon is None or replan_interval <= horizon):
        return
    maximum = "" if horizon is None else f", and at most the {horizon} that the policy predicts"
    raise SpearError(
        f"--replan-steps {replan_interval} is out of range. Execute at least 1 action of a "
        f"chunk{maximum}."
    )


def _join_remaining_to_executed(
    actions: Array, executed: Sequence[Array], num_executed: float, gripper_change: int | None
) -> Array:
    """Return a chunk's remaining actions, joined to those executed since the chunk's observation.

    A chunk describes a path: the poses after each of its actions. Because the robot executed other
    actions than the chunk's first ones, its actual pose differs from the pose that the path plans
    for now. This offset is added to the remaining poses of the path, and fades linearly to zero
    along them. So each action changes little, and the last pose is the one that the chunk wanted.

    Args:
        actions: [H, 8], the chunk.
        executed: the actions [8] that the robot executed since the observation of the chunk.
        num_executed: how many of the chunk's actions `executed` amounts to. With 2.25, a quarter of
            the third action has been executed, which is the first of the remaining ones.
        gripper_change: index, among the remaining actions, of the one that opens or closes the
            gripper. The offset has faded to zero when this action begins. None if no action does.

    Returns:
        The remaining actions, [H - ⌊num_executed⌋, 8].
    """
    first = int(num_executed)  # index of the first action that is not executed completely
    num_remaining = len(actions) - first
    if not executed or num_remaining <= 0:
        return actions[first:].copy()

    # The offset, as the action that leads from the pose planned for now to the actual pose.
    planned_until_now = [*actions[:first], _shorten_motion(actions[first], num_executed % 1)]
    planned_position, planned_rotation = _compute_pose_after(planned_until_now)
    actual_position, actual_rotation = _compute_pose_after(executed)
    position_offset, rotation_offset = action_between_poses(
        planned_position, planned_rotation, actual_position, actual_rotation
    )

    # The fraction of the offset that remains after each of the remaining actions.
    num_fading = num_remaining if gripper_change is None else gripper_change
    num_done = torch.arange(1, num_remaining + 1, dtype=torch.float32, device="cpu")
    fade = (1 - num_done / max(1, num_fading)).clamp_min(0)[:, None]  # [num_remaining, 1]

    # The poses of the new path: the actual pose, then the chunk's poses with the fading offset.
    path_positions, path_rotations = _compute_poses_along_path(actions)
    faded_rotation_offsets = quat_exp(fade * quat_log(rotation_offset))  # [num_remaining, 4]
    positions = path_positions[first:] + fade * position_offset
    rotations = quat_multiply(path_rotations[first:], faded_rotation_offsets)
    positions = torch.cat([actual_position[None], positions])  # [num_remaining + 1, 3]
    rotations = torch.cat([actual_rotation[None], rotations])  # [num_remaining + 1, 4]

    # The new actions lead from each pose of the new path to the next one.
    translation, rotation = action_between_poses(
        positions[:-1], rotations[:-1], positions[1:], rotations[1:]
    )
    gripper = actions[first:, 7:]
    new_actions = np.concatenate([translation.numpy(), rotation.numpy(), gripper], axis=1)
    return new_actions.astype(np.float32)


def _shorten_motion(action: Array, fraction: float) -> Array:
    """Shorten the motion of an action [8] to a fraction; the gripper opening stays."""
    rotation = torch.from_numpy(np.float64(action[3:7]))
    scaled_rotation = quat_exp(fraction * quat_log(rotation)).numpy()
    return np.concatenate([fraction * action[:3], scaled_rotation, action[7:]]).astype(np.float32)


def _compute_poses_along_path(actions: Array) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the poses after each of n actions [n, 8], relative to the pose before the first one.

    Returns:
        Positions [n, 3], and rotations [n, 4] as quaternions.
    """
    vectors = torch.from_numpy(np.float64(actions))
    positions = vectors[:, :3].cumsum(0)
    running_products = list(accumulate(vectors[:, 3:7], quat_multiply))
    return positions, quat_normalize(torch.stack(running_products))


def _compute_pose_after(actions: Sequence[Array]) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute position [3] and rotation [4] after all actions, from the pose before the first."""
    positions, rotations = _compute_poses_along_path(np.stack(actions))
    return positions[-1], rotations[-1]
