"""Executing chunks: k of H, standing still, no jump at the seam, means on S³; a pilot that never waits."""

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
from spear.chunks import DEFAULT_REPLAN_INTERVAL, ChunkExecutor, Pilot
from spear.errors import Notice
from spear.types import Array


def chunk(first: float, horizon: int = 5, turn: Sequence[float] = (0, 0, 0)) -> Array:
    """Actions that move by first, first + 1, … mm along x and turn by `turn` each."""
    rows = np.zeros((horizon, 8))
    rows[:, 0] = 0.001 * (first + np.arange(horizon))
    rows[:, 3:7] = Rotation.from_rotvec(turn).as_quat(scalar_first=True)
    return rows.astype(np.float32)


def policy(answer: Callable[[Mapping[str, Any]], Array]) -> Any:
    """One that answers an observation with that chunk."""
    return SimpleNamespace(infer=lambda observation: {"actions": answer(observation)})


def drive(
    executor: ChunkExecutor, ticks: int, delay: int = 0, **shape: Any
) -> tuple[list[int], list[Array]]:
    """Runs a policy whose chunk at tick t says t, t + 1, … mm: the ticks when it looked, the actions."""
    looked, actions = [], []
    for tick in range(ticks):
        if executor.wants():
            looked.append(tick)
            executor.give(chunk(tick, **shape), arrives=tick + delay)
        actions.append(executor.next())
    return looked, actions


def millimetres(actions: Sequence[Array]) -> list[float]:
    return [round(1000 * float(a[0]), 3) for a in actions]


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spear.chunks.RATE_HZ", math.inf)


def test_sync_executes_k_of_h_untouched_and_stands_still_while_it_waits() -> None:
    looked, actions = drive(ChunkExecutor("sync", replan=3), 7)
    assert looked == [0, 3, 6] and millimetres(actions) == [0, 1, 2, 3, 4, 5, 6]
    np.testing.assert_array_equal(actions[3], chunk(3)[0])
    looked, actions = drive(ChunkExecutor("sync", replan=2), 8, delay=2)
    assert looked == [0, 4] and millimetres(actions) == [0, 0, 0, 1, 0, 0, 4, 5]
    assert actions[0][3] == 1 and actions[0][7] == 1
    executor, closing = ChunkExecutor("sync"), chunk(0, 1)
    closing[:, 7] = 0.25
    executor.give(closing)
    executor.next()
    assert executor.next()[7] == 0.25


def test_async_moves_on_and_agrees_with_a_policy_that_is_consistent() -> None:
    for delay in (1, 2):
        looked, actions = drive(ChunkExecutor("async", replan=5), 14, delay=delay)
        # the policy foresees its own steps, so that chunks agree wherever they overlap
        moving = actions[delay:]
        np.testing.assert_allclose(np.diff([a[0] for a in moving[:5]]), 0.001, atol=1e-7)
        assert not any((a[:3] == 0).all() for a in moving[1:]) and len(looked) >= 14 // 5
        looked, _ = drive(ChunkExecutor("async", replan=1), 9, delay=delay)
        assert looked == [0, *range(delay, 9, delay)]  # again as soon as a chunk is there
    for replan in (2, 5):  # without delay it is the same as sync
        one, two = (drive(ChunkExecutor(mode, replan=replan), 11) for mode in ("async", "sync"))  # type: ignore[arg-type]
        assert one[0] == two[0]
        np.testing.assert_array_equal(one[1], two[1])


def test_async_ends_where_the_new_chunk_wants_and_does_not_jump() -> None:
    executor = ChunkExecutor("async", replan=3)
    old, new = chunk(10, turn=(0, 0, 0.3)), chunk(0, turn=(0.05, 0, 0))
    executor.give(old)
    before = [executor.next() for _ in range(3)]
    assert executor.wants()
    executor.give(new, arrives=executor.tick + 2)
    during = [executor.next() for _ in range(2)]
    np.testing.assert_array_equal([*before, *during], old)
    after = [executor.next() for _ in range(3)]
    assert (
        after[0][0] < new[2][0]
    )  # it went too far while it waited, and gives that back step by step
    np.testing.assert_allclose(sum(a[:3] for a in [*during, *after]), new[:, :3].sum(0), atol=1e-7)
    turned, wanted = (
        math.prod(
            [Rotation.from_quat(a[3:7], scalar_first=True) for a in way], start=Rotation.identity()
        )
        for way in ([*during, *after], new)
    )
    assert (turned.inv() * wanted).magnitude() < 1e-5
    gaps = np.array([a[0] for a in after]) - new[2:, 0]
    np.testing.assert_allclose(gaps, gaps[0], atol=1e-7)


def test_async_gives_a_turn_back_in_equal_parts() -> None:
    """The new chunk turned about x while the arm turned about z, and goes straight from there."""
    executor, new = ChunkExecutor("async", replan=3), chunk(0)
    new[:2, 3:7] = chunk(0, turn=(0.5, 0, 0))[0, 3:7]
    executor.give(chunk(0, turn=(0, 0, 0.4)))
    for step in range(5):
        if step == 3:
            executor.give(new, arrives=executor.tick + 2)
        executor.next()
    after = [executor.next()[3:7] for _ in range(3)]
    np.testing.assert_allclose(after[1:], after[:2], atol=1e-6)
    assert after[0][0] < 0.99


@pytest.mark.parametrize("delay", [0, 1, 2])
def test_async_goes_slowly_to_where_the_gripper_closes_and_takes_nothing_back(delay: int) -> None:
    """Of a policy that goes 10 mm an action and closes the gripper at 80 mm, wherever it is."""
    executor, done = ChunkExecutor("async"), list[Array]()
    for tick in range(24):
        at = sum(millimetres(done))
        if executor.wants():
            said = chunk(10)
            said[:, 0] = 0.01
            said[:, 7] = at + 10 * np.arange(5) < 75
            executor.give(said, arrives=tick + delay)
        done.append(executor.next())
    moved, closed = np.array(millimetres(done)), np.array([a[7] < 0.5 for a in done])
    first = int(closed.argmax())
    assert closed[first:].all() and abs(moved[:first].sum() - 80) < 6 and (moved[delay:] > 0).all()
    slow = np.isclose(moved, 10 / (1 + delay), atol=0.01)
    assert slow[first - 1 - delay : first].all() and np.isclose(moved[~slow][delay:], 10).all()
    assert not delay or sum(slow) <= 2 * (1 + delay) + 1


def test_a_chunk_from_before_the_gripper_closed_is_dropped() -> None:
    executor, old, new = ChunkExecutor("async"), chunk(1), chunk(50)
    old[:2, 7] = new[:, 7] = 1
    executor.give(old)
    done = [executor.next() for _ in range(2)]
    executor.give(new, arrives=3)
    done += [executor.next() for _ in range(2)]
    assert executor.wants()
    executor.give(new, observed=2, arrives=4)
    done.append(executor.next())
    np.testing.assert_array_equal(done, old)
    executor.give(new, observed=2)
    assert executor.next()[[0, 7]].tolist() == [0, 0]  # rather nothing than what it says
    executor.give(new)
    assert executor.next()[7] == 1


def test_the_way_back_to_a_chunks_path_ends_where_the_gripper_closes() -> None:
    executor, new = ChunkExecutor("async"), chunk(0)
    executor.give(chunk(10) + np.eye(8)[7])
    made, new[:3, 7] = [executor.next()], 1
    executor.give(new, observed=0, arrives=1)
    made += [executor.next() for _ in range(4)]
    assert [a[7] for a in made] == [1] * 5
    np.testing.assert_allclose(sum(a[:3] for a in made), new[:3, :3].sum(0), atol=1e-7)


@pytest.mark.parametrize(("delay", "closes"), [(1, 1), (2, 2), (2, 4), (4, 4)])
def test_the_way_back_is_no_faster_than_the_chunks(delay: int, closes: int) -> None:
    executor, there, back = (
        ChunkExecutor("async"),
        chunk(0, turn=(0, 0, 0.2)),
        chunk(0, turn=(0, 0, -0.2)),
    )
    there[:, [0, 7]], back[:, 0], back[:closes, 7] = (0.05, 1), -0.05, 1
    executor.give(there)
    made = [executor.next()]
    executor.give(back, observed=0, arrives=delay)
    made += [executor.next() for _ in range(30)]
    moves, turns = (
        np.stack(made)[:, 0],
        Rotation.from_quat(np.stack(made)[:, 3:7], scalar_first=True),
    )
    assert np.abs(moves).max() <= 0.0501 and turns.magnitude().max() <= 0.201
    count = [a[7] for a in made].index(0) + 1  # the gripper closes where the policy wanted it
    np.testing.assert_allclose(moves[:count].sum(), back[: closes + 1, 0].sum(), atol=1e-6)
    assert turns[:count].as_rotvec()[:, 2].sum() == pytest.approx(-0.2 * (closes + 1), abs=1e-5)


def test_async_goes_on_although_the_gripper_is_to_open_or_close_at_every_action() -> None:
    executor, given = ChunkExecutor("async"), chunk(1)
    given[:, 7] = [0, 1, 0, 1, 0]
    for tick in range(40):
        if executor.wants():
            executor.give(given, arrives=tick + 1)
        executor.next()
    assert sum(action is not None for action in executor._executed) > 40 // 3


@pytest.mark.parametrize("delay", [0, 1, 2])
def test_rtc_tells_what_will_be_done_and_goes_on_from_it(delay: int) -> None:
    executor = ChunkExecutor("rtc", most=2)
    looked, told, said, done = [], [], [], []
    for tick in range(12):
        if executor.wants():
            looked.append(tick)
            told.append(executor.told().get("committed", np.zeros((0, 8), np.float32)))
            said.append(
                chunk(50 * tick + 25, turn=(0, 0.01 * tick, 0))
            )  # elsewhere than the chunk before
            said[-1][: len(told[-1])] = told[-1]
            executor.give(said[-1], arrives=tick + delay)
        done.append(executor.next())
    assert looked == [0, *range(max(delay, 1), 12, max(delay, 1))]  # as soon as it may
    assert [mm == 0 for mm in millimetres(done)] == [True] * delay + [False] * (12 - delay)
    for tick, begins, actions in zip(looked[1:], told[1:], said[1:], strict=True):
        assert len(begins) == delay
        now = done[tick : tick + max(2 * delay, 1)]
        np.testing.assert_allclose(now, actions[: len(now)], atol=1e-6)


def test_rtc_with_a_policy_that_is_later_than_it_has_learned_has_no_jump() -> None:
    executor, late = ChunkExecutor("rtc", most=1), ChunkExecutor("async", replan=1)
    for one in (executor, late):
        one.give(chunk(10))
        one.next()
        one.give(chunk(10, horizon=6)[1:], arrives=one.tick + 3)
        before = [one.next() for _ in range(3)]
    assert executor.wants() and len(executor.told()["committed"]) == 1
    assert millimetres([executor.next()]) == millimetres([late.next()]) != millimetres(before[-1:])
    executor.give(chunk(-60), observed=executor.tick - 3)
    back = [executor.next() for _ in range(3)]
    assert -61 < min(millimetres(back)) < -50 and {share for _, share in executor._left} == {1}


@pytest.mark.parametrize("mode", ["sync", "async", "rtc"])
def test_what_a_robots_program_does_with_its_action_changes_no_other(mode: str) -> None:
    """Millimetres in place, a gripper turned round, a buffer that the policy uses again."""

    def run(spoil: bool) -> list[Array]:
        executor, buffer, done = ChunkExecutor(mode, replan=2, most=2), chunk(0), []  # type: ignore[arg-type]
        for tick in range(12):
            if executor.wants():
                buffer[:] = chunk(tick)
                executor.give(buffer, arrives=tick + 1)
                buffer *= 0 if spoil else 1
            done.append((action := executor.next()).copy())
            if spoil:
                action[:3] *= 1000
                action[7] = 1 - action[7]
        return done

    np.testing.assert_array_equal(run(True), run(False))


def test_bad_settings_are_refused() -> None:
    refuses("asynch", ChunkExecutor, "asynch")
    refuses("replan 0", ChunkExecutor, replan=0)
    for mode in ("sync", "async"):
        refuses(r"replan 9.* 5 ", ChunkExecutor(mode, replan=9).give, chunk(0))
    refuses("--execution rtc", ChunkExecutor, "rtc")


@pytest.mark.parametrize("bad", [np.nan * chunk(0), chunk(0)[:, :7], chunk(0)[0], 0 * chunk(0)])
def test_what_is_no_chunk_moves_no_robot(bad: Array) -> None:
    with closing(Pilot(policy(lambda _: bad))) as pilot:
        refuses("actions", pilot.step, {})


@pytest.mark.usefixtures("no_waiting")
def test_the_pilot_goes_on_while_the_policy_thinks() -> None:
    think = threading.Event()
    asked: list[int] = []

    def answer(observation: Mapping[str, Any]) -> Array:
        asked.append(observation["t"])
        if len(asked) > 1:
            assert think.wait(60)
        return chunk(observation["t"])

    assert Pilot(policy(answer))._executor.replan == DEFAULT_REPLAN_INTERVAL
    with closing(Pilot(policy(answer), "async", replan=3)) as pilot:
        actions = [pilot.step({"t": t}) for t in range(7)]
        assert millimetres(actions) == [0, 1, 2, 3, 4, 0, 0]  # nothing left: it stands still
        think.set()
        pilot._asked[1].result(60)
        assert asked == [0, 3]
        think.clear()
        # two steps were made since t = 3: the new chunk goes on with its third, while it looks again
        assert millimetres([pilot.step({"t": 7})]) == [5]
        think.set()
        assert pilot._asked[1].result(60) and asked == [0, 3, 7]


@pytest.mark.usefixtures("no_waiting")
def test_the_pilot_waits_in_sync_and_looks_again_after_a_pause_and_with_another_prompt() -> None:
    def answer(observation: Mapping[str, Any]) -> Array:
        time.sleep(0.05)
        return chunk(observation["t"])

    with closing(Pilot(policy(answer), "sync", replan=3)) as pilot:
        assert millimetres([pilot.step({"t": t}) for t in range(1, 9)]) == [1, 2, 3, 4, 5, 6, 7, 8]
        pilot._stepped -= 2  # seconds pass
        assert millimetres([pilot.step({"t": t}) for t in (50, 51)]) == [50, 51]
        assert millimetres([pilot.step({"t": t, "prompt": "stop"}) for t in (80, 90)]) == [80, 81]


def test_an_answer_of_another_time_is_dropped(
    no_waiting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, thought = [100.0], iter([9.0, 0.1, 3.0, 0.1, 0.1, 3.0, 3.5])

    def answer(observation: Mapping[str, Any]) -> Array:
        clock[0] += next(thought)
        return (chunk(observation["t"]) + 0.25 * np.eye(8)[7]).astype(np.float32)

    monkeypatch.setattr("spear.chunks.time.monotonic", lambda: clock[0])
    with closing(Pilot(policy(answer), "sync")) as pilot, pytest.warns(Notice, match="took 3.0 s"):
        said = [pilot.step({"t": t, "prompt": str(t // 5)}) for t in range(1, 8)]
    assert millimetres(said) == [1, 2, 0, 4, 5, 0, 7]
    assert {float(action[7]) for action in said} == {0.25}  # the gripper holds what it holds


@pytest.mark.parametrize("late", [0, 3])
def test_one_late_step_leaves_no_observation_waiting(
    late: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a first answer that takes long: who calls in time again is served in time again."""
    clock, slept = [100.0], list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr("spear.chunks.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("spear.chunks.time.sleep", sleep)
    pilot, stepped = Pilot(policy(lambda _: chunk(0)), "sync"), list[float]()
    with no_warning():
        for tick in range(12):
            clock[0] = max(clock[0], 100 + 0.2 * tick + 0.08 * (tick == late))
            pilot.step({})
            stepped.append(clock[0])
    np.testing.assert_allclose(slept[late + 5 :], 0, atol=1e-9)
    assert slept[late + 1] > 0 and np.diff(stepped).min() > 0.1799
    with pytest.warns(Notice, match="waits"):  # at 10 Hz: as many steps as before, and it is said
        for tick in range(20):
            clock[0] = max(clock[0], 102.4 + 0.1 * tick)
            pilot.step({})
    assert clock[0] - stepped[-1] > 0.2 * 20 - 0.1 - 1e-6
    pilot.close()


@pytest.mark.usefixtures("no_waiting")
def test_the_pilot_asks_about_what_was_seen_then() -> None:
    camera, ready, seen = np.zeros(1), threading.Event(), list[float]()

    def answer(observation: Mapping[str, Any]) -> Array:
        assert not seen or ready.wait(60)
        seen.append(float(observation["image"][0]))
        return chunk(0)

    with closing(Pilot(policy(answer), "async")) as pilot:
        for tick in range(3):  # a camera that writes each picture over the last
            camera[0] = tick
            pilot.step({"image": camera})
        ready.set()
        assert pilot._asked is not None and pilot._asked[1].result(60) and seen == [0, 1]
