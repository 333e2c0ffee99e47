"""Executing predicted chunks: how many of the H actions, and what to do while the next chunk is computed.

Time counts in ticks of the control loop (5 Hz). A chunk is predicted from what was observed at one tick and
can be used from a later one, when inference is done.

sync      execute k actions, look, stand still until the next chunk is there.
async     look while actions are left, go on with them, and switch when the next chunk is there. The robot has
          then made other steps than the new chunk assumed. The difference is spread along the chunk, up to
          where the gripper opens or closes, so that there is no jump at the seam and the arm is then where
          the new chunk wants it; a step longer than all others takes more ticks. Before the gripper turns,
          the arm goes slowly (`NUM_SLOW_ACTIONS`), so that what was seen is not far away; a chunk predicted
          before the gripper turned, but comes after it, is dropped: it would take that back (our choice).
rtc       as async without that care for the gripper, but the policy is told which actions are executed until
          its chunk is there, and the chunk begins with them: real-time chunking, for policies that have
          learned it (`spear.flow.sample_committed`).
"""

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, Literal, get_args

import numpy as np
import torch

from spear.errors import SpearError, check_known, notice
from spear.geometry import (
    action_between_poses,
    check_unit_quat,
    quat_exp,
    quat_log,
    quat_multiply,
    quat_normalize,
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
"""Actions of a chunk of 5 that are executed before the next look, unless told otherwise. The paper does not
say; nano succeeds more often than with 2 or 3 (docs/nano.md), in SIMPLER less often (docs/simpler.md)."""
NUM_SLOW_ACTIONS = 2
"""async: how many actions before the one that opens or closes the gripper are made slowly, each in one tick
more than inference took (our choice: docs/robots.md)."""
LEAST = 2e-3, 2e-2
"""Lengths of an action (m, rad) that no chunk's path is too short for: see `_rest`."""
MAX_PAUSE_S = 1.0
"""Seconds without a step after which what was planned before no longer counts: the robot may be elsewhere."""
FARTHEST, FARTHEST_TURN = MAX_EE_SPEED_M_S / CONTROL_RATE_HZ, MAX_EE_TURN_RAD_S / CONTROL_RATE_HZ
"""Lengths of an action (m, rad) that nobody means."""
REMEMBERED = 256
"""Ticks of executed actions that are kept, to know what happened since an observation."""


@dataclass(frozen=True)
class _Chunk:
    """actions [H, 8], predicted from the observation of tick `observed`, usable from tick `arrives` on."""

    actions: Array
    observed: int
    arrives: int


class ChunkExecutor:
    """Chooses the action of each tick from the chunks that it is given. Each robot, or scene, has its own.

        while True:
            if executor.wants():
                executor.give(policy.infer(observe() | executor.told())["actions"])
            execute(executor.next())

    replan   k, the actions of a chunk that are executed before the next look.
    most     rtc: the most actions that the policy may be told of (its `committed`).
    gripper  as last told, 0 … 1.
    """

    def __init__(
        self,
        mode: ExecutionMode = "sync",
        replan: int = DEFAULT_REPLAN_INTERVAL,
        most: int = 0,
        gripper: float = 1,
    ) -> None:
        check_known("way of executing chunks", get_args(ExecutionMode), mode)
        if mode == "rtc" and not most:
            others = "async, or train with --set committed=2"
            raise SpearError(f"--execution rtc: not learned by the policy: {others}")
        check_replan_interval(replan)
        self.mode, self.replan, self.most, self.gripper = mode, replan, most, gripper
        self._waiting: list[_Chunk] = []  # until they arrive
        self._left: list[
            tuple[Array, float]
        ] = []  # of the next ticks: what to do, as a share of an action
        self._turned = -1  # the tick after the last that opened or closed the gripper
        self._looked = -replan
        self.tick = self._delay = self._horizon = 0
        self._executed: deque[tuple[Array, float] | None] = deque(maxlen=REMEMBERED)

    def wants(self) -> bool:
        """Whether to look now: `give` is expected before `next`, or as soon as inference allows."""
        if self._looked == self.tick:
            return False
        self._take_up()
        if self._waiting or self.mode == "sync":
            return not self._waiting and not self._left
        # after k ticks, or while it still has enough to last through inference
        due = self.tick - self._looked >= self.replan
        return due or len(self._left) <= min(self._delay, self._horizon - 1)

    def told(self) -> dict[str, Any]:
        """What belongs to an observation of now: in rtc the actions [d, 8] that are executed before its chunk
        is there, if inference takes as long as the last time."""
        rows = [row for row, _ in self._left[: min(self._delay, self.most)]]
        return {"committed": np.stack(rows)} if self.mode == "rtc" and rows else {}

    def give(self, actions: Array, observed: int | None = None, arrives: int | None = None) -> None:
        """Take a chunk [H, 8] from the observation of tick `observed`, usable from tick `arrives` on.

        Both are the present tick by default. Raises as `check_chunk` does, and `SpearError` for a chunk of
        fewer actions than are to be executed of it.
        """
        actions = check_chunk(actions).copy()  # what others do with theirs changes nothing here
        check_replan_interval(self.replan, len(actions))
        observed = self.tick if observed is None else observed
        arrives = self.tick if arrives is None else arrives
        self._waiting.append(_Chunk(actions, observed, arrives))
        self._looked = max(self._looked, observed)
        self._delay = arrives - observed

    def next(self) -> Array:
        """The action [8] of this tick, which ends. With none left: no motion, gripper as last told (open)."""
        self._take_up()
        self.tick += 1
        step = self._left.pop(0) if self._left else None
        self._executed.append(step)
        if step is None:
            return np.array([0, 0, 0, 1, 0, 0, 0, self.gripper], np.float32)
        if self._turn(step[:1]) == 0:
            self._turned = self.tick
        self.gripper = float(step[0][7])
        return step[0].copy()

    def _take_up(self) -> None:
        for chunk in (c for c in self._waiting if c.arrives <= self.tick):
            self._horizon = len(chunk.actions)
            if self.mode == "sync":
                self._left = [(action, 1.0) for action in chunk.actions[: self.replan]]
            elif self.mode == "rtc" or chunk.observed >= self._turned:
                self._left = list(self._rest(chunk))
        self._waiting = [c for c in self._waiting if c.arrives > self.tick]

    def _rest(self, chunk: _Chunk) -> Iterator[tuple[Array, float]]:
        """What is left of a chunk, tick by tick, as `_left` has it."""
        # What was made since the look; in ticks that have no action there was no motion.
        since = max(0, len(self._executed) - (self.tick - chunk.observed))
        made = [step for step in list(self._executed)[since:] if step is not None]
        done = round(sum(share for _, share in made), 3)
        # In rtc there is nothing to join, but where inference took longer than the policy was told.
        turn = self._turn(chunk.actions[int(done) :]) if self.mode == "async" else None
        steps, before = [action for action, _ in made], self.gripper
        longest = np.maximum(_lengths(np.stack([*chunk.actions, *steps])).max(axis=0), LEAST)
        for i, row in enumerate(_joined(chunk.actions, steps, done, turn)):
            share = 1 - done % 1 if i == 0 else 1.0
            slow = turn is not None and turn - NUM_SLOW_ACTIONS <= i < turn
            ticks = max(1, round(share * (1 + chunk.arrives - chunk.observed))) if slow else 1
            ticks = max(ticks, math.ceil((_lengths(row) / longest).max() - 1e-3))
            parts = np.repeat(_part(row, 1 / ticks)[None], ticks, axis=0)
            parts[:-1, 7] = before  # the gripper turns where the action ends
            before = row[7]
            # In rtc the next chunk is told of each as an action of its own.
            yield from ((part, 1.0 if self.mode == "rtc" else share / ticks) for part in parts)

    def _turn(self, actions: Iterable[Array]) -> int | None:
        """Which of these actions is the first that opens or closes the gripper."""
        closed = [self.gripper < 0.5, *(action[7] < 0.5 for action in actions)]
        return next((i for i, (was, now) in enumerate(pairwise(closed)) if was != now), None)


class Pilot:
    """Drives a robot from a policy whose actions are SPEAR-1's own ([H, 8], metres): one call per tick.

    With mode "sync" `step` waits for each chunk, which is best while that takes a small part of a tick
    (docs/robots.md); otherwise inference runs beside the robot, and it waits for the first only. A step that
    comes early waits for its time, as the same actions made faster would move the robot faster; the notice
    says so, for its observation is old by then. After a late one (by half a tick at most) steps are a tenth
    shorter until they are in time again (our choice). After a pause (`MAX_PAUSE_S`) or another prompt, it
    begins anew; an answer that took so much longer than the one before is dropped. Raises what the policy
    raises, and `SpearError` for "rtc" with one that has not learned it, and for a server of a robot's own
    commands: poses, for one, look like steps.
    """

    def __init__(
        self, policy: Policy, mode: ExecutionMode = "sync", replan: int = DEFAULT_REPLAN_INTERVAL
    ) -> None:
        if (about := getattr(policy, "metadata", {})).get("converted"):
            robot = about["embodiment"]
            raise SpearError(f"a server for robot {robot!r}: start it with `--embodiment generic`")
        self._policy, self._took = policy, math.inf  # the first answer may take long
        self._begin = partial(ChunkExecutor, mode, replan, most=getattr(policy, "committed", 0))
        self._executor, self._prompt, self._stepped, self._due = (
            self._begin(),
            None,
            -math.inf,
            -math.inf,
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pilot")
        self._asked: tuple[int, Future[dict[str, Any]], float] | None = None

    def step(self, observation: Mapping[str, Any]) -> Array:
        """The action [8] to execute now, seeing `observation`."""
        now, tick_s = time.monotonic(), 1 / CONTROL_RATE_HZ
        before, self._prompt = self._prompt, observation.get("prompt")
        if now - self._stepped > MAX_PAUSE_S or before != self._prompt:
            self._executor = self._begin(gripper=self._executor.gripper)
            self._asked, self._due = None, -math.inf
        if self._due - now > tick_s / 4:
            notice(
                f"Pilot.step waits: observe and call it once in {tick_s:g} s; simulators: ChunkExecutor"
            )
        time.sleep(max(0.0, self._due - now, self._stepped + 0.9 * tick_s - now))
        self._due = max(self._due, now - tick_s / 2) + tick_s
        executor = self._executor
        self._take(wait=False)
        if self._asked is None and executor.wants():
            seen = (
                deepcopy(dict(observation)) | executor.told()
            )  # the next picture may take this one's place
            self._asked = (
                executor.tick,
                self._thread.submit(self._policy.infer, seen),
                time.monotonic(),
            )
        self._take(wait=executor.mode == "sync" or executor.tick == 0)
        self._stepped = time.monotonic()
        return executor.next()

    def close(self) -> None:
        """Ends the inference thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _take(self, wait: bool) -> None:
        if self._asked is not None and (wait or self._asked[1].done()):
            (tick, future, asked), self._asked = self._asked, None
            actions = future.result()["actions"]
            before, self._took = self._took, time.monotonic() - asked
            if self._took > before + MAX_PAUSE_S:
                notice(
                    f"an answer took {self._took:.1f} s: dropped, as the robot may be elsewhere now"
                )
            else:
                self._executor.give(actions, observed=tick)


def check_replan_interval(replan: int, horizon: int | None = None) -> None:
    """Raises `SpearError` where so many actions of a chunk, of `horizon` ones, cannot be executed."""
    if replan < 1 or (horizon is not None and replan > horizon):
        most = "" if horizon is None else f", and at most the {horizon} that the policy predicts"
        raise SpearError(f"--replan {replan}: execute at least 1 action of a chunk{most}")


def check_chunk(actions: Array) -> Array:
    """A policy's chunk. Raises `SpearError` for what is not [H, 8] finite numbers with unit quaternions."""
    actions = np.asarray(actions)
    if actions.ndim != 2 or actions.shape[1] != ACTION_DIM or not np.isfinite(actions).all():
        cure = "check the policy's weights, and that a server of it has --embodiment generic"
        raise SpearError(
            f"actions {list(actions.shape)}: not finite, or not [H, 8]: do not move; {cure}"
        )
    farthest, turned = _lengths(actions).max(axis=0, initial=0)
    if farthest > FARTHEST or turned > FARTHEST_TURN:
        far = f"{farthest:.2g} m, or turn by {turned:.2g} rad, in one step"
        raise SpearError(f"the policy wants to go {far}: do not move: check it with spear doctor")
    check_unit_quat(torch.tensor(actions[:, 3:7], dtype=torch.float64), "actions[3:7]")
    return actions


def _joined(actions: Array, made: Sequence[Array], done: float, turn: int | None) -> Array:
    """[H - ⌊done⌋, 8]: what is left of a chunk [H, 8] after the steps `made` since its observation, which
    come to `done` of its actions.

    The chunk's path runs through targets (the sum of translations, the product of rotations). The robot is
    not where it was to be by now; that offset fades linearly to zero until the chunk's last action, or the
    one before number `turn` of those left, so the steps stay smooth and the chunk ends where it wanted to.
    """
    first = int(done)
    left = len(actions) - first
    if not made or left <= 0:
        return actions[first:].copy()
    where, turned = _path(actions)
    by_now = np.stack([*actions[:first], _part(actions[first], done % 1)])
    (planned, planned_turn), (at, facing) = (
        [x[-1] for x in _path(p)] for p in (by_now, np.stack(made))
    )
    offset, back = action_between_poses(planned, planned_turn, at, facing)
    fade = (1 - torch.arange(1, left + 1) / max(1, left if turn is None else turn)).clamp_min(0)[
        :, None
    ]
    position = torch.cat([at[None], where[first:] + fade * offset])
    rotation = torch.cat(
        [facing[None], quat_multiply(turned[first:], quat_exp(fade * quat_log(back)))]
    )
    return _steps(position, rotation, actions[first:, 7:])


def _lengths(actions: Array) -> Array:
    """[..., 2]: how far actions [..., 8] go, m, and turn, rad."""
    moves, real, imaginary, _ = np.split(np.float64(actions), (3, 4, 7), axis=-1)
    sine = np.linalg.norm(imaginary, axis=-1)  # `quat_log` takes half a millisecond
    return np.stack(
        [np.linalg.norm(moves, axis=-1), 2 * np.arctan2(sine, np.abs(real[..., 0]))], axis=-1
    )


def _part(action: Array, share: float) -> Array:
    """So much of an action [8]."""
    rotation = quat_exp(share * quat_log(torch.from_numpy(np.float64(action[3:7])))).numpy()
    return np.concatenate([share * action[:3], rotation, action[7:]]).astype(np.float32)


def _path(actions: Array) -> tuple[torch.Tensor, torch.Tensor]:
    """Displacement [n, 3] and turn [n, 4] after each of n actions, from where they start."""
    moves, turns = torch.from_numpy(np.float64(actions)).split([3, ACTION_DIM - 3], dim=1)
    return moves.cumsum(0), quat_normalize(torch.stack([*accumulate(turns[:, :4], quat_multiply)]))


def _steps(position: torch.Tensor, rotation: torch.Tensor, gripper: Array) -> Array:
    """Actions [n, 8] from each of n + 1 poses, [n + 1, 3] and [n + 1, 4], to the next; gripper [n, 1]."""
    moves, turns = action_between_poses(position[:-1], rotation[:-1], position[1:], rotation[1:])
    return np.concatenate([moves.numpy(), turns.numpy(), gripper], axis=1).astype(np.float32)
