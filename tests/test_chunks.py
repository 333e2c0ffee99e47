"""Executing action chunks: the three execution modes of `ChunkExecutor`, and the `Pilot`.

The tests give chunks to an executor and look at the actions that it returns tick by tick. Most
chunks are those of `make_chunk`, whose translations along x, in mm, identify their actions.
"""

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from refusals import no_warning, refuses
from spear.chunks import DEFAULT_REPLAN_INTERVAL, ChunkExecutor, ExecutionMode, Pilot
from spear.errors import Notice
from spear.types import Array


def make_chunk(first_mm: float, horizon: int = 5, turn: Sequence[float] = (0, 0, 0)) -> Array:
    """A chunk [horizon, 8] that moves along x by first_mm, first_mm + 1, first_mm + 2, … mm.

    Each action also rotates by the rotation vector `turn` (rad). The gripper is closed (0).
    """
    actions = np.zeros((horizon, 8))
    actions[:, 0] = 0.001 * (first_mm + np.arange(horizon))
    actions[:, 3:7] = Rotation.from_rotvec(turn).as_quat(scalar_first=True)
    return actions.astype(np.float32)


def make_policy(answer: Callable[[Mapping[str, Any]], Array]) -> Any:
    """A policy whose chunk for an observation is `answer(observation)`."""
    return SimpleNamespace(infer=lambda observation: {"actions": answer(observation)})


def drive(
    executor: ChunkExecutor, num_ticks: int, delay: int = 0, **chunk_options: Any
) -> tuple[list[int], list[Array]]:
    """Run the executor with a policy whose chunk at tick t moves by t, t + 1, t + 2, … mm.

    So this policy's chunks agree with each other: action number t of all chunks moves by t mm.

    Args:
        delay: number of ticks from an observation to the arrival of its chunk.

    Returns:
        The ticks at which the executor asked for a chunk, and the action of each tick.
    """
    inference_ticks = []
    actions = []
    for tick in range(num_ticks):
        if executor.needs_chunk():
            inference_ticks.append(tick)
            executor.add_chunk(make_chunk(tick, **chunk_options), arrival_tick=tick + delay)
        actions.append(executor.next_action())
    return inference_ticks, actions


def execute(executor: ChunkExecutor, num_ticks: int) -> list[Array]:
    """The executor's actions in the next ticks."""
    return [executor.next_action() for _ in range(num_ticks)]


def get_x_mm(actions: Sequence[Array]) -> list[float]:
    """How far each action moves along x, in mm."""
    return [round(1000 * float(action[0]), 3) for action in actions]


def sum_translations(actions: Sequence[Array]) -> Array:
    return sum(action[:3] for action in actions)


def compose_rotations(actions: Sequence[Array]) -> Rotation:
    """The rotation by all actions, one after the other."""
    rotations = [Rotation.from_quat(action[3:7], scalar_first=True) for action in actions]
    return math.prod(rotations, start=Rotation.identity())


# sync


def test_sync_executes_the_first_k_actions_of_each_chunk_unchanged() -> None:
    executor = ChunkExecutor("sync", replan_interval=3)

    inference_ticks, actions = drive(executor, 7)

    assert inference_ticks == [0, 3, 6]
    assert get_x_mm(actions) == [0, 1, 2, 3, 4, 5, 6]
    np.testing.assert_array_equal(actions[3], make_chunk(3)[0])


def test_sync_stands_still_while_it_waits_for_a_chunk() -> None:
    executor = ChunkExecutor("sync", replan_interval=2)

    inference_ticks, actions = drive(executor, 8, delay=2)

    assert inference_ticks == [0, 4]
    # Two ticks without motion, the actions 0 and 1 mm, two ticks without motion, and 4 and 5 mm.
    assert get_x_mm(actions) == [0, 0, 0, 1, 0, 0, 4, 5]


def test_before_the_first_chunk_there_is_no_motion_and_the_gripper_is_open() -> None:
    action = ChunkExecutor("sync").next_action()

    assert action.tolist() == [0, 0, 0, 1, 0, 0, 0, 1]


def test_without_actions_the_gripper_stays_as_last_commanded() -> None:
    executor = ChunkExecutor("sync")
    half_closed = make_chunk(0, horizon=1)
    half_closed[:, 7] = 0.25
    executor.add_chunk(half_closed)

    actions = execute(executor, 2)

    assert actions[1][7] == 0.25  # the second tick has no action: the chunk has only one


# async: when it observes


@pytest.mark.parametrize("delay", [1, 2])
def test_async_moves_on_while_the_next_chunk_is_computed(delay: int) -> None:
    inference_ticks, actions = drive(ChunkExecutor("async", replan_interval=5), 14, delay=delay)

    actions_after_first_chunk = actions[delay:]
    for action in actions_after_first_chunk[1:]:
        assert action[:3].any()
    assert len(inference_ticks) >= 14 // 5
    # The policy's chunks agree, so joining changes nothing: each action is 1 mm longer than the
    # one before.
    increases_m = np.diff([action[0] for action in actions_after_first_chunk[:5]])
    np.testing.assert_allclose(increases_m, 0.001, atol=1e-7)


@pytest.mark.parametrize("delay", [1, 2])
def test_async_with_interval_1_observes_as_soon_as_a_chunk_has_arrived(delay: int) -> None:
    inference_ticks, _ = drive(ChunkExecutor("async", replan_interval=1), 9, delay=delay)

    assert inference_ticks == [0, *range(delay, 9, delay)]


@pytest.mark.parametrize("replan_interval", [2, 5])
def test_without_delay_async_does_the_same_as_sync(replan_interval: int) -> None:
    async_ticks, async_actions = drive(ChunkExecutor("async", replan_interval), 11)
    sync_ticks, sync_actions = drive(ChunkExecutor("sync", replan_interval), 11)

    assert async_ticks == sync_ticks
    np.testing.assert_array_equal(async_actions, sync_actions)


# async: the seam between two chunks


@pytest.fixture
def seam() -> tuple[list[Array], Array]:
    """Five actions across the seam between two chunks, and the new chunk.

    The five actions are all that follow the observation of the new chunk. The first two are still
    the old chunk's, because the new chunk arrives two ticks after its observation.
    """
    executor = ChunkExecutor("async", replan_interval=3)
    old_chunk = make_chunk(10, turn=(0, 0, 0.3))
    new_chunk = make_chunk(0, turn=(0.05, 0, 0))

    executor.add_chunk(old_chunk)
    actions_before = execute(executor, 3)
    assert executor.needs_chunk()
    executor.add_chunk(new_chunk, arrival_tick=executor.tick + 2)
    actions = execute(executor, 5)

    np.testing.assert_array_equal([*actions_before, *actions[:2]], old_chunk)
    return actions, new_chunk


def test_async_ends_where_the_new_chunk_wants_to(seam: tuple[list[Array], Array]) -> None:
    actions, new_chunk = seam

    np.testing.assert_allclose(
        sum_translations(actions), sum_translations(list(new_chunk)), atol=1e-7
    )
    difference = compose_rotations(actions).inv() * compose_rotations(list(new_chunk))
    assert difference.magnitude() < 1e-5


def test_async_makes_up_for_the_difference_in_equal_steps(seam: tuple[list[Array], Array]) -> None:
    actions, new_chunk = seam
    joined_x = np.array([action[0] for action in actions[2:]])

    corrections = joined_x - new_chunk[2:, 0]

    # While the new chunk was computed, the old one moved by 13 + 14 mm instead of 0 + 1 mm.
    assert corrections[0] < 0
    np.testing.assert_allclose(corrections, corrections[0], atol=1e-7)


def test_async_makes_up_for_a_rotation_in_equal_parts() -> None:
    """While two actions of the old chunk turn about z, the new chunk wanted to turn about x.

    The new chunk's last three actions do not turn, so all rotation in them is the correction.
    """
    executor = ChunkExecutor("async", replan_interval=3)
    new_chunk = make_chunk(0)
    new_chunk[:2, 3:7] = make_chunk(0, turn=(0.5, 0, 0))[0, 3:7]
    executor.add_chunk(make_chunk(0, turn=(0, 0, 0.4)))
    execute(executor, 3)
    executor.add_chunk(new_chunk, arrival_tick=executor.tick + 2)
    execute(executor, 2)

    rotations = [action[3:7] for action in execute(executor, 3)]

    np.testing.assert_allclose(rotations[1:], rotations[:2], atol=1e-6)
    assert rotations[0][0] < 0.99  # the quaternion's real part; it is 1 without rotation


def test_the_difference_is_made_up_for_before_the_gripper_closes() -> None:
    executor = ChunkExecutor("async")
    with_open_gripper = make_chunk(10)
    with_open_gripper[:, 7] = 1
    closes_at_fourth = make_chunk(0)
    closes_at_fourth[:3, 7] = 1

    executor.add_chunk(with_open_gripper)
    actions = execute(executor, 1)
    executor.add_chunk(closes_at_fourth, observed_tick=0, arrival_tick=1)
    actions += execute(executor, 4)

    # The gripper is open until now. The five actions together have moved as far as the new chunk's
    # three actions before the one that closes the gripper, so the offset is gone before it closes.
    assert [action[7] for action in actions] == [1] * 5
    np.testing.assert_allclose(
        sum_translations(actions), closes_at_fourth[:3, :3].sum(0), atol=1e-7
    )


@pytest.mark.parametrize(("delay", "closing_index"), [(1, 1), (2, 2), (2, 4), (4, 4)])
def test_making_up_for_the_difference_is_no_faster_than_the_chunks(
    delay: int, closing_index: int
) -> None:
    """The new chunk goes back while the robot goes forth, so the offset is large.

    The new chunk arrives after `delay` ticks, and its action `closing_index` closes the gripper.
    """
    executor = ChunkExecutor("async")
    forth = make_chunk(0, turn=(0, 0, 0.2))
    forth[:, 0] = 0.05
    forth[:, 7] = 1
    back = make_chunk(0, turn=(0, 0, -0.2))
    back[:, 0] = -0.05
    back[:closing_index, 7] = 1

    executor.add_chunk(forth)
    actions = execute(executor, 1)
    executor.add_chunk(back, observed_tick=0, arrival_tick=delay)
    actions += execute(executor, 30)

    x_m = np.stack(actions)[:, 0]
    rotations = Rotation.from_quat(np.stack(actions)[:, 3:7], scalar_first=True)
    # All actions of both chunks move by 0.05 m and turn by 0.2 rad; the rest is rounding.
    assert np.abs(x_m).max() <= 0.0501
    assert rotations.magnitude().max() <= 0.201
    # The gripper closes where the new chunk wanted it to.
    until_closed = [action[7] for action in actions].index(0) + 1
    wanted_x_m = back[: closing_index + 1, 0].sum()
    wanted_turn_rad = -0.2 * (closing_index + 1)
    np.testing.assert_allclose(x_m[:until_closed].sum(), wanted_x_m, atol=1e-6)
    turn_rad = rotations[:until_closed].as_rotvec()[:, 2].sum()
    assert turn_rad == pytest.approx(wanted_turn_rad, abs=1e-5)


# async: care for the gripper


def drive_to_closing_at_80_mm(delay: int) -> tuple[Array, Array]:
    """Run a policy that moves by 10 mm per action and closes the gripper 80 mm from the start.

    From the observed position, the policy computes which actions of its chunk begin at 80 mm or
    later. In these actions the gripper is closed.

    Args:
        delay: number of ticks from an observation to the arrival of its chunk.

    Returns:
        The motion of each tick in mm, [24], and whether the gripper is closed in it, [24] bool.
    """
    executor = ChunkExecutor("async")
    actions: list[Array] = []
    for tick in range(24):
        if executor.needs_chunk():
            position_mm = sum(get_x_mm(actions))
            chunk = make_chunk(10)
            chunk[:, 0] = 0.01
            positions_before_mm = position_mm + 10 * np.arange(5)  # before each action
            # 80 mm, less half an action, so that 79.99 mm counts as 80
            is_open = positions_before_mm < 75
            chunk[:, 7] = is_open
            executor.add_chunk(chunk, arrival_tick=tick + delay)
        actions.append(executor.next_action())
    is_closed = np.array([action[7] < 0.5 for action in actions])
    return np.array(get_x_mm(actions)), is_closed


@pytest.mark.parametrize("delay", [0, 1, 2])
def test_async_closes_the_gripper_once_and_where_the_policy_wants_it(delay: int) -> None:
    moved_mm, is_closed = drive_to_closing_at_80_mm(delay)
    closing_tick = int(is_closed.argmax())

    assert is_closed[closing_tick:].all()
    # An action moves by 10 mm, so the position is tested to half an action, and 1 mm for rounding.
    assert moved_mm[:closing_tick].sum() == pytest.approx(80, abs=6)
    assert (moved_mm[delay:] > 0).all()  # the robot only rests before the first chunk


@pytest.mark.parametrize("delay", [0, 1, 2])
def test_async_goes_slowly_before_the_gripper_closes_and_only_there(delay: int) -> None:
    moved_mm, is_closed = drive_to_closing_at_80_mm(delay)
    closing_tick = int(is_closed.argmax())

    # A slow action takes 1 + delay ticks instead of one.
    ticks_per_slow_action = 1 + delay
    is_slow = np.isclose(moved_mm, 10 / ticks_per_slow_action, atol=0.01)
    last_action_before_closing = slice(closing_tick - ticks_per_slow_action, closing_tick)
    assert is_slow[last_action_before_closing].all()
    # All other ticks move by a whole action, except those before the first chunk.
    np.testing.assert_allclose(moved_mm[~is_slow][delay:], 10)
    if delay:
        # At most NUM_SLOW_ACTIONS = 2 slow actions, and one tick of tolerance.
        assert is_slow.sum() <= 2 * ticks_per_slow_action + 1


def test_a_chunk_from_before_the_gripper_closed_is_dropped() -> None:
    executor = ChunkExecutor("async")
    closes_at_third = make_chunk(1)
    closes_at_third[:2, 7] = 1  # open in the first two actions
    stays_open = make_chunk(50)
    stays_open[:, 7] = 1

    executor.add_chunk(closes_at_third)
    actions = execute(executor, 2)
    # `stays_open` is observed at the beginning of tick 2, in which the gripper closes.
    executor.add_chunk(stays_open, arrival_tick=3)
    actions += execute(executor, 2)
    assert executor.needs_chunk()
    # A second chunk of the same observation is dropped, too.
    executor.add_chunk(stays_open, observed_tick=2, arrival_tick=4)
    actions += execute(executor, 1)

    np.testing.assert_array_equal(actions, closes_at_third)  # `stays_open` was never executed


def test_rather_no_motion_than_a_chunk_from_before_the_gripper_closed() -> None:
    executor = ChunkExecutor("async")
    closes_at_once = make_chunk(1, horizon=1)
    stays_open = make_chunk(50)
    stays_open[:, 7] = 1
    executor.add_chunk(closes_at_once)
    execute(executor, 1)

    executor.add_chunk(stays_open, observed_tick=0)
    action = executor.next_action()

    assert action[[0, 7]].tolist() == [0, 0]  # no motion, and the gripper is still closed


def test_a_chunk_from_after_the_gripper_closed_may_open_it() -> None:
    executor = ChunkExecutor("async")
    closes_at_once = make_chunk(1, horizon=1)
    stays_open = make_chunk(50)
    stays_open[:, 7] = 1
    executor.add_chunk(closes_at_once)
    execute(executor, 2)

    executor.add_chunk(stays_open)

    assert executor.next_action()[7] == 1


def test_async_goes_on_although_the_gripper_is_to_open_or_close_at_every_action() -> None:
    executor = ChunkExecutor("async")
    chunk = make_chunk(1)
    chunk[:, 7] = [0, 1, 0, 1, 0]

    for tick in range(40):
        if executor.needs_chunk():
            executor.add_chunk(chunk, arrival_tick=tick + 1)
        executor.next_action()

    # A chunk arrives one tick after it is asked for. The arm moves in over a third of the ticks.
    num_ticks_with_motion = sum(step is not None for step in executor._executed_steps)
    assert num_ticks_with_motion > 40 // 3


# rtc


@pytest.mark.parametrize("delay", [0, 1, 2])
def test_rtc_commits_what_is_executed_until_the_chunk_arrives(delay: int) -> None:
    executor = ChunkExecutor("rtc", max_committed=2)
    inference_ticks, prefixes, chunks, actions = [], [], [], []
    for tick in range(12):
        if executor.needs_chunk():
            committed = executor.committed_actions().get("committed", np.zeros((0, 8), np.float32))
            # Each chunk differs from the one before in all actions that are not committed.
            chunk = make_chunk(50 * tick + 25, turn=(0, 0.01 * tick, 0))
            chunk[: len(committed)] = committed
            inference_ticks.append(tick)
            prefixes.append(committed)
            chunks.append(chunk)
            executor.add_chunk(chunk, arrival_tick=tick + delay)
        actions.append(executor.next_action())

    # The executor asks for the next chunk as soon as the one before has arrived.
    inference_interval = max(delay, 1)
    assert inference_ticks == [0, *range(inference_interval, 12, inference_interval)]
    # It stands still only before the first chunk.
    assert [mm == 0 for mm in get_x_mm(actions)] == [True] * delay + [False] * (12 - delay)
    # From the observation of a chunk until the next chunk arrives, twice the delay, the robot
    # executes that chunk's actions: first its committed prefix, then the actions after it.
    for tick, prefix, chunk in zip(inference_ticks[1:], prefixes[1:], chunks[1:], strict=True):
        assert len(prefix) == delay
        executed = actions[tick : tick + max(2 * delay, 1)]
        np.testing.assert_allclose(executed, chunk[: len(executed)], atol=1e-6)


def add_a_chunk_that_comes_later_than_the_policy_has_learned(executor: ChunkExecutor) -> Array:
    """Give the executor a chunk 3 ticks after its observation.

    The policy has learned prefixes of only 1 action, so two actions are executed that the chunk
    does not contain.

    Returns:
        The last action that is executed before the chunk arrives.
    """
    executor.add_chunk(make_chunk(10))
    executor.next_action()
    executor.add_chunk(make_chunk(10, horizon=6)[1:], arrival_tick=executor.tick + 3)
    return execute(executor, 3)[-1]


def test_rtc_joins_a_chunk_that_comes_later_than_the_policy_has_learned() -> None:
    rtc = ChunkExecutor("rtc", max_committed=1)
    plain_async = ChunkExecutor("async", replan_interval=1)
    action_before = add_a_chunk_that_comes_later_than_the_policy_has_learned(rtc)
    add_a_chunk_that_comes_later_than_the_policy_has_learned(plain_async)

    assert rtc.needs_chunk()
    assert len(rtc.committed_actions()["committed"]) == 1
    action = rtc.next_action()

    assert get_x_mm([action]) == get_x_mm([plain_async.next_action()])  # joined as async does
    assert get_x_mm([action]) != get_x_mm([action_before])


def test_rtc_has_no_jump_when_it_joins_a_late_chunk() -> None:
    executor = ChunkExecutor("rtc", max_committed=1)
    add_a_chunk_that_comes_later_than_the_policy_has_learned(executor)
    executor.next_action()

    # A chunk that goes back, by 60, 59, … mm, while the robot went forth for three ticks.
    executor.add_chunk(make_chunk(-60), observed_tick=executor.tick - 3)
    actions = execute(executor, 3)

    # No action is longer than the chunk's longest: the joined actions were spread over more ticks.
    assert -61 < min(get_x_mm(actions)) < -50
    assert {step.fraction for step in executor._planned_steps} == {
        1
    }  # each counts as a whole action


# what it accepts


@pytest.mark.parametrize("mode", ["sync", "async", "rtc"])
def test_a_robots_program_may_change_the_arrays_that_it_gets_and_gives(mode: ExecutionMode) -> None:
    """The executor's plan does not share memory with arrays that go in or come out.

    The robot's program converts actions to millimeters in place and inverts the gripper. The policy
    overwrites the array of its last chunk.
    """

    def run(spoil: bool) -> list[Array]:
        executor = ChunkExecutor(mode, replan_interval=2, max_committed=2)
        buffer = make_chunk(0)
        actions = []
        for tick in range(12):
            if executor.needs_chunk():
                buffer[:] = make_chunk(tick)
                executor.add_chunk(buffer, arrival_tick=tick + 1)
                if spoil:
                    buffer[:] = 0
            action = executor.next_action()
            actions.append(action.copy())
            if spoil:
                action[:3] *= 1000
                action[7] = 1 - action[7]
        return actions

    np.testing.assert_array_equal(run(spoil=True), run(spoil=False))


def test_an_unknown_mode_is_refused() -> None:
    refuses("asynch", ChunkExecutor, "asynch")


def test_a_replan_interval_of_0_is_refused() -> None:
    refuses("--replan-steps 0", ChunkExecutor, replan_interval=0)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_chunk_shorter_than_the_replan_interval_is_refused(mode: ExecutionMode) -> None:
    executor = ChunkExecutor(mode, replan_interval=9)

    refuses(r"--replan-steps 9.* 5 ", executor.add_chunk, make_chunk(0))


def test_rtc_without_a_committed_prefix_is_refused() -> None:
    refuses("--execution rtc", ChunkExecutor, "rtc")


@pytest.mark.parametrize(
    "bad_chunk",
    [np.nan * make_chunk(0), make_chunk(0)[:, :7], make_chunk(0)[0], 0 * make_chunk(0)],
    ids=["not finite", "7 columns", "one action", "zero quaternions"],
)
def test_what_is_no_chunk_moves_no_robot(bad_chunk: Array) -> None:
    with closing(Pilot(make_policy(lambda _: bad_chunk))) as pilot:
        refuses("actions", pilot.step, {})


# Pilot


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the pilot not wait for the next tick: at an infinite rate a tick takes no time."""
    monkeypatch.setattr("spear.chunks.CONTROL_RATE_HZ", math.inf)


def test_the_pilot_has_the_default_replan_interval() -> None:
    with closing(Pilot(make_policy(lambda _: make_chunk(0)))) as pilot:
        assert pilot._executor.replan_interval == DEFAULT_REPLAN_INTERVAL


@pytest.mark.usefixtures("no_waiting")
def test_the_pilot_goes_on_while_the_policy_computes() -> None:
    may_answer = threading.Event()
    observed_ticks: list[int] = []

    def answer(observation: Mapping[str, Any]) -> Array:
        observed_ticks.append(observation["t"])
        if len(observed_ticks) > 1:
            assert may_answer.wait(60)
        return make_chunk(observation["t"])

    with closing(Pilot(make_policy(answer), "async", replan_interval=3)) as pilot:
        # The first chunk has five actions; after them the robot stands still.
        actions = [pilot.step({"t": t}) for t in range(5)]
        with pytest.warns(Notice, match="stands still"):
            actions += [pilot.step({"t": t}) for t in (5, 6)]
        assert get_x_mm(actions) == [0, 1, 2, 3, 4, 0, 0]

        may_answer.set()
        assert pilot._inference is not None
        pilot._inference.result.result(60)
        assert observed_ticks == [0, 3]

        # Two actions were executed since the observation at t = 3, by 3 and 4 mm. So the new chunk
        # continues with its third action, by 5 mm, while the next chunk is computed.
        may_answer.clear()
        assert get_x_mm([pilot.step({"t": 7})]) == [5]
        may_answer.set()
        assert pilot._inference.result.result(60)
        assert observed_ticks == [0, 3, 7]


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.filterwarnings("always")
def test_a_notice_says_once_that_the_robot_stands_still_because_an_answer_is_late() -> None:
    may_answer = threading.Event()

    def answer(observation: Mapping[str, Any]) -> Array:
        if observation["t"]:
            assert may_answer.wait(60)
        return make_chunk(0)

    with closing(Pilot(make_policy(answer), "async", replan_interval=3)) as pilot:
        with pytest.warns(Notice, match="stands still") as notices:
            actions = [pilot.step({"t": t}) for t in range(9)]
        may_answer.set()

    assert get_x_mm(actions) == [0, 1, 2, 3, 4, 0, 0, 0, 0]
    assert len(notices) == 1


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.filterwarnings("always")
def test_a_notice_says_that_the_robot_stands_still_because_the_gripper_acted() -> None:
    """The fourth action closes the gripper, so the answer to t = 1, which comes later, is dropped.

    Until the answer to t = 4, the first chunk has only one more action.
    """
    may_answer = {1: threading.Event(), 4: threading.Event()}

    def answer(observation: Mapping[str, Any]) -> Array:
        chunk = make_chunk(observation["t"] + 1)
        if observation["t"] == 0:
            chunk[:3, 7] = 1
        else:
            assert may_answer[observation["t"]].wait(60)
        return chunk

    with closing(Pilot(make_policy(answer), "async")) as pilot:
        actions = [pilot.step({"t": t}) for t in range(4)]
        assert pilot._inference is not None
        may_answer[1].set()
        pilot._inference.result.result(60)
        actions.append(pilot.step({"t": 4}))
        with pytest.warns(Notice) as notices:
            actions += [pilot.step({"t": t}) for t in (5, 6)]
        may_answer[4].set()

    assert get_x_mm(actions) == [1, 2, 3, 4, 5, 0, 0]
    [only_notice] = notices
    assert "the gripper opened or closed while the policy computed it" in str(only_notice.message)


def answer_after_50_ms(observation: Mapping[str, Any]) -> Array:
    """A chunk that moves by t, t + 1, … mm, for an observation {"t": t}."""
    time.sleep(0.05)
    return make_chunk(observation["t"])


@pytest.mark.usefixtures("no_waiting")
def test_the_pilot_in_sync_waits_for_every_chunk() -> None:
    """The chunks of t = 1, 4 and 7 move by t, t + 1 and t + 2 mm."""
    with closing(Pilot(make_policy(answer_after_50_ms), "sync", replan_interval=3)) as pilot:
        actions = [pilot.step({"t": t}) for t in range(1, 9)]

    assert get_x_mm(actions) == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.usefixtures("no_waiting")
def test_the_pilot_begins_anew_after_a_pause() -> None:
    with closing(Pilot(make_policy(answer_after_50_ms), "sync", replan_interval=3)) as pilot:
        pilot.step({"t": 1})
        pilot._last_step_time_s -= 2  # as if 2 s had passed, more than MAX_PAUSE_S

        # The old plan, 2 and 3 mm, is dropped.
        assert get_x_mm([pilot.step({"t": t}) for t in (50, 51)]) == [50, 51]


@pytest.mark.usefixtures("no_waiting")
def test_the_pilot_begins_anew_with_another_prompt() -> None:
    with closing(Pilot(make_policy(answer_after_50_ms), "sync", replan_interval=3)) as pilot:
        pilot.step({"t": 1})

        actions = [pilot.step({"t": t, "prompt": "stop"}) for t in (80, 90)]

    assert get_x_mm(actions) == [80, 81]  # the chunk of t = 80; the old plan was 2 and 3 mm


@pytest.mark.usefixtures("no_waiting")
def test_an_answer_that_took_much_longer_than_the_one_before_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A chunk is dropped if its inference took over 1 s longer than the one before.

    Only the third and the sixth did. The first inference of a pilot may take any time, and the
    seventh is hardly longer than the sixth. A change of the prompt at t = 5 makes no difference.
    """
    clock_s = [100.0]  # a list, so that `answer` can advance the clock
    inference_times_s = iter([9.0, 0.1, 3.0, 0.1, 0.1, 3.0, 3.5])

    def answer(observation: Mapping[str, Any]) -> Array:
        clock_s[0] += next(inference_times_s)
        chunk = make_chunk(observation["t"])
        chunk[:, 7] = 0.25
        return chunk

    monkeypatch.setattr("spear.chunks.time.monotonic", lambda: clock_s[0])
    with (
        closing(Pilot(make_policy(answer), "sync")) as pilot,
        pytest.warns(Notice, match=r"took 3\.0 s"),
    ):
        actions = [pilot.step({"t": t, "prompt": str(t // 5)}) for t in range(1, 8)]

    assert get_x_mm(actions) == [1, 2, 0, 4, 5, 0, 7]  # 0: no motion, because the chunk was dropped
    assert {float(action[7]) for action in actions} == {0.25}  # the gripper stays as it is


class Clock:
    """Replaces the pilot's clock by one that advances only by its sleeps and by `wait_until`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        self.sleeps_s: list[float] = []
        monkeypatch.setattr("spear.chunks.time.monotonic", lambda: self.now_s)
        monkeypatch.setattr("spear.chunks.time.sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.sleeps_s.append(seconds)
        self.now_s += seconds

    def wait_until(self, time_s: float) -> None:
        self.now_s = max(self.now_s, time_s)


@pytest.mark.parametrize("late_tick", [0, 3])
def test_after_one_late_step_the_pilot_is_soon_in_time_again(
    late_tick: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    step_times_s = []

    with no_warning(), closing(Pilot(make_policy(lambda _: make_chunk(0)), "sync")) as pilot:
        for tick in range(12):
            delay_s = 0.08 if tick == late_tick else 0
            clock.wait_until(100 + 0.2 * tick + delay_s)
            pilot.step({})
            step_times_s.append(clock.now_s)

    # Each step sleeps once. The step after the late one comes too early and waits. At 0.02 s per
    # tick the pilot makes up for 0.08 s in four ticks, and waits no more.
    np.testing.assert_allclose(clock.sleeps_s[late_tick + 5 :], 0, atol=1e-9)
    assert clock.sleeps_s[late_tick + 1] > 0
    # No tick is shorter than nine tenths of 0.2 s.
    assert np.diff(step_times_s).min() > 0.1799


def test_steps_that_come_too_often_wait_with_a_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    with (
        closing(Pilot(make_policy(lambda _: make_chunk(0)), "sync")) as pilot,
        pytest.warns(Notice, match="waits"),
    ):
        for tick in range(20):  # at 10 Hz
            clock.wait_until(100 + 0.1 * tick)
            pilot.step({})

    # 20 steps last 19 ticks of 0.2 s, less half a tick at most.
    assert clock.now_s - 100 > 0.2 * 19 - 0.1 - 1e-6


@pytest.mark.usefixtures("no_waiting")
def test_the_policy_gets_the_image_of_the_step_although_the_camera_overwrites_it() -> None:
    camera_buffer = np.zeros(1)
    may_answer = threading.Event()
    seen_images: list[float] = []

    def answer(observation: Mapping[str, Any]) -> Array:
        if seen_images:
            assert may_answer.wait(60)
        seen_images.append(float(observation["image"][0]))
        return make_chunk(0)

    with closing(Pilot(make_policy(answer), "async")) as pilot:
        for tick in range(3):
            camera_buffer[0] = tick
            pilot.step({"image": camera_buffer})
        may_answer.set()
        assert pilot._inference is not None
        assert pilot._inference.result.result(60)

    # The second inference began at tick 1, and read its image after tick 2 had overwritten it.
    assert seen_images == [0, 1]
