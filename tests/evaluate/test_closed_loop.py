"""The closed loop: outcomes that do not depend on batching, films, resumption, latency."""

import contextlib
import importlib
import io
import multiprocessing
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from refusals import refuses
from spear.evaluate import closed_loop
from spear.evaluate.agents import IDLE_ACTION, Agent, ExpertAgent, IdleAgent, PolicyAgent
from spear.evaluate.closed_loop import evaluate_tabletop
from spear.evaluate.options import TabletopOptions
from spear.evaluate.results import Results
from spear.types import Array

SMALL_IMAGES = {"external": (48, 32), "wrist": (24, 24)}  # camera → (width, height), px
TIME_LIMIT_STEPS = 60
SECOND_STEPS = 5  # the last frame of a film stays for a second, at 5 Hz


def evaluate(agent: Agent, scenes: int, **options: Any) -> Results:
    """Evaluate an agent on some scenes of the task family "put_on"."""
    tabletop_options = TabletopOptions(num_scenes=scenes, tasks=("put_on",), **options)
    results, _ = evaluate_tabletop(agent, tabletop_options)
    return results


class HalfExpert(ExpertAgent):
    """The expert in even scenes, and idle in odd scenes.

    Args:
        max_calls: Number of calls of `choose_action_chunks` after which the evaluation is
            interrupted.

    scenes  the seeds of the scenes in which it has acted.
    """

    image_sizes = SMALL_IMAGES

    def __init__(self, max_calls: int = 10**6) -> None:
        self.num_calls_left = max_calls
        self.scenes: set[int] = set()

    def choose_action_chunks(
        self, envs: Sequence[Any], observations: Sequence[Mapping[str, Any]]
    ) -> Sequence[Array]:
        self.num_calls_left -= 1
        if self.num_calls_left < 0:
            raise KeyboardInterrupt
        chunks = []
        for env, chunk in zip(envs, super().choose_action_chunks(envs, observations), strict=True):
            seed = env.world.spec.seed
            self.scenes.add(seed)
            chunks.append(chunk if seed % 2 == 0 else IDLE_ACTION[None])  # [1, 8]
        return chunks


class WanderingPolicy:
    """A policy whose actions depend on its state, so that its outcome shows what it observed.

    Args:
        image_sizes: Camera → (width, height) of the images that it wants, px.
        committed: The longest committed prefix that it can continue.

    image_shapes   the shapes of the images that it has seen.
    num_committed  the length of the committed prefix at each inference.
    """

    def __init__(
        self, image_sizes: Mapping[str, tuple[int, int]] = SMALL_IMAGES, committed: int = 0
    ) -> None:
        self.image_sizes = image_sizes
        self.committed = committed
        self.image_shapes: set[tuple[int, ...]] = set()
        self.num_committed: list[int] = []

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        self.num_committed.append(len(observation.get("committed", ())))
        for key, value in observation.items():
            if key.endswith("image"):
                self.image_shapes.add(value.shape)
        state = observation["observation/state"]
        # Forward, towards y = 0, and towards a height of 0.15 m.
        translation = np.array([0.02, -0.1 * state[1], 0.05 * (0.15 - state[2])])
        chunk = np.tile([*translation, 1, 0, 0, 0, 1], (5, 1))  # five equal actions
        return {"actions": chunk.astype(np.float32)}

    def infer_batch(self, observations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [self.infer(observation) for observation in observations]


# ---- Observations and batches.


def test_outcomes_do_not_depend_on_the_batch() -> None:
    options = {"first_seed": 20, "replan_steps": 5}

    alone = evaluate(PolicyAgent(WanderingPolicy(), name="any"), 3, batch_size=1, **options)
    together = evaluate(PolicyAgent(WanderingPolicy(), name="any"), 3, batch_size=3, **options)

    assert together.outcomes == alone.outcomes


def test_a_policy_sees_images_of_its_own_sizes() -> None:
    policy = WanderingPolicy()

    evaluate(PolicyAgent(policy, name="any"), 1, replan_steps=5)

    assert policy.image_shapes == {(32, 48, 3), (24, 24, 3)}


@pytest.mark.parametrize("view", SMALL_IMAGES)
def test_a_policy_with_one_camera_sees_that_one_only(view: str) -> None:
    width, height = SMALL_IMAGES[view]
    policy = WanderingPolicy(image_sizes={view: (width, height)})

    results = evaluate(PolicyAgent(policy, name="any"), 1, replan_steps=5)

    assert results.outcomes
    assert policy.image_shapes == {(height, width, 3)}


def test_the_image_sizes_of_all_cameras_are_recorded() -> None:
    """Results with different sizes of a camera are results of different evaluations."""
    agent = IdleAgent()
    agent.image_sizes = {**SMALL_IMAGES, "shoulder": (64, 48)}

    settings = evaluate(agent, 1).settings

    assert settings["image_size"] == [48, 32]
    assert settings["wrist_size"] == [24, 24]
    assert settings["shoulder_size"] == [64, 48]


# ---- Films and resumption.


def count_frames(data: bytes) -> int:
    """Count the frames of an MP4 file."""
    with av.open(io.BytesIO(data)) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.fixture
def filmed_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TabletopOptions:
    """Options for two scenes, of which one success and one failure are filmed in `tmp_path`."""
    monkeypatch.setattr("spear.evaluate.film.HEIGHT_PX", 60)  # small films, to save time
    return TabletopOptions(num_scenes=2, out=tmp_path, videos=1, tasks=("put_on",))


def test_a_success_and_a_failure_are_filmed_step_by_step(filmed_options: TabletopOptions) -> None:
    results, films = evaluate_tabletop(HalfExpert(), filmed_options)

    assert [outcome.success for outcome in results.outcomes] == [True, False]
    assert [film.outcome for film in films] == results.outcomes
    for film in films:
        num_states = film.outcome.steps + 1  # the start, and the state after each step
        assert count_frames(film.data) == num_states + SECOND_STEPS


def test_only_missing_films_are_made_again(filmed_options: TabletopOptions, tmp_path: Path) -> None:
    results, _ = evaluate_tabletop(HalfExpert(), filmed_options)
    (tmp_path / "put_on-success-0.mp4").unlink()

    results_again, new_films = evaluate_tabletop(HalfExpert(), filmed_options)
    _, no_films = evaluate_tabletop(HalfExpert(), filmed_options)

    assert results_again.outcomes == results.outcomes
    assert [film.outcome.seed for film in new_films] == [0]
    assert no_films == []


def test_an_interrupted_sharded_evaluation_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    """Four scenes in two parts: scenes 0 and 2, and scenes 1 and 3."""
    uninterrupted = evaluate(HalfExpert(), 4)
    options = {"batch_size": 1, "out": tmp_path}
    steps_of_first_scene = uninterrupted.outcomes[0].steps

    # The first part is interrupted in the first step of its second scene, and resumed.
    with pytest.raises(KeyboardInterrupt):
        evaluate(HalfExpert(max_calls=steps_of_first_scene + 1), 4, shard="1/2", **options)
    resumed_agent = HalfExpert()
    first_shard = evaluate(resumed_agent, 4, shard="1/2", **options)
    second_shard = evaluate(HalfExpert(), 4, shard="2/2", **options)
    merged = evaluate(HalfExpert(max_calls=0), 4, **options)  # all outcomes are there already

    assert resumed_agent.scenes == {2}  # scene 0 was done
    assert first_shard.outcomes == uninterrupted.outcomes[::2]
    assert second_shard.outcomes == uninterrupted.outcomes[1::2]
    assert merged.outcomes == uninterrupted.outcomes


class CrowdedExpert(HalfExpert):
    """The expert while at least two scenes run together, and otherwise idle.

    Its process is killed instead of being interrupted.
    """

    def choose_action_chunks(
        self, envs: Sequence[Any], observations: Sequence[Mapping[str, Any]]
    ) -> Sequence[Array]:
        if self.num_calls_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        chunks = super().choose_action_chunks(envs, observations)
        return chunks if len(envs) > 1 else [IDLE_ACTION[None]]


def test_a_killed_evaluation_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    options = {"batch_size": 3, "first_seed": 20}
    uninterrupted = evaluate(CrowdedExpert(), 5, **options)
    first_end = min(outcome.steps for outcome in uninterrupted.outcomes[:3])

    def evaluate_until_killed() -> None:
        """Killed two steps after the end of the first scene, while other scenes run."""
        evaluate(CrowdedExpert(max_calls=first_end + 2), 5, out=tmp_path, **options)

    process = multiprocessing.get_context("fork").Process(target=evaluate_until_killed)
    process.start()
    process.join()
    resumed = evaluate(CrowdedExpert(), 5, out=tmp_path, **options)

    assert process.exitcode == -signal.SIGKILL
    assert resumed.outcomes == uninterrupted.outcomes


def test_results_of_another_physics_do_not_mix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(IdleAgent(), 1, out=tmp_path)
    other_version = "MuJoCo 3.3.7"  # with this version the expert fails in 7 of 25 scenes
    monkeypatch.setattr(closed_loop, "SIMULATOR_VERSION", other_version)

    refuses(other_version, evaluate, IdleAgent(), 2, out=tmp_path)


def test_results_of_other_slow_actions_do_not_mix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"out": tmp_path, "execution": "async"}
    evaluate(IdleAgent(), 1, **options)
    monkeypatch.setattr(closed_loop, "NUM_SLOW_ACTIONS", 9)

    refuses("slow_actions", evaluate, IdleAgent(), 2, **options)


# ---- Latency and execution modes.


class RepeatingExpert(ExpertAgent):
    """The expert with chunks of five actions, which are its next action repeated.

    With several actions, there is something to execute during inference.
    """

    def choose_action_chunks(
        self, envs: Sequence[Any], observations: Sequence[Mapping[str, Any]]
    ) -> Sequence[Array]:
        return [
            np.repeat(chunk, 5, axis=0)
            for chunk in super().choose_action_chunks(envs, observations)
        ]


def test_latency_costs_steps() -> None:
    """In sync mode, the robot waits for one step (200 ms) at each inference, that is before every
    action. So episodes take about twice as many steps.
    """
    immediate = evaluate(RepeatingExpert(), 2, latency_ms=0.0)
    late = evaluate(RepeatingExpert(), 2, latency_ms=200.0)

    num_steps = sum(outcome.steps for outcome in immediate.outcomes)
    num_late_steps = sum(outcome.steps for outcome in late.outcomes)
    assert num_late_steps > 1.5 * num_steps
    assert late.settings["latency_ms"] == 200
    assert late.settings["execution"] == "sync"


def test_async_runs_to_the_time_limit() -> None:
    (outcome,) = evaluate(IdleAgent(), 1, execution="async").outcomes

    assert outcome.steps == TIME_LIMIT_STEPS


def test_rtc_gives_the_policy_what_is_executed_during_inference() -> None:
    """With a latency of 300 ms, two steps (400 ms) are executed during each inference."""
    policy = WanderingPolicy(committed=2)

    results = evaluate(PolicyAgent(policy, name="any"), 1, execution="rtc", latency_ms=300.0)

    first_count, *later_counts = policy.num_committed
    assert first_count == 0
    assert set(later_counts) == {2}
    assert len(policy.num_committed) == results.outcomes[0].steps / 2  # one inference per 2 steps


def test_rtc_is_refused_for_a_policy_that_was_not_trained_for_it() -> None:
    refuses("--execution rtc", evaluate, ExpertAgent(), 1, execution="rtc")


# ---- The latency study.


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module benchmarks/evaluate/latency_study.py.

    It replaces parts of the closed loop when it is imported. These are restored after the test.
    """
    for name in ("ChunkExecutor", "_make_outcome"):
        monkeypatch.setattr(closed_loop, name, getattr(closed_loop, name))
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks/evaluate")
    return importlib.import_module("latency_study")


def test_seams_of_an_episode_run_again_count_once(study: Any, tmp_path: Path) -> None:
    """A seam is the change from one chunk to the next. The study writes a line for each."""

    def run_cell(out: Path, max_calls: int) -> list[str]:
        """Run two scenes, perhaps until they are interrupted, and read the seams."""
        with contextlib.suppress(KeyboardInterrupt):
            agent = HalfExpert(max_calls)
            study.run_cell(
                agent, row="sync/1", latency_ms=0, scenes=2, out=out, families=("put_on",)
            )
        (seams_file,) = out.rglob("seams.txt")
        return sorted(seams_file.read_text().split())

    more_than_enough = 99  # calls; the idle scene has one in each of its 60 steps
    seams = run_cell(tmp_path / "uninterrupted", max_calls=more_than_enough)
    run_cell(tmp_path / "resumed", max_calls=30)  # stopped while one of two scenes runs
    resumed_seams = run_cell(tmp_path / "resumed", max_calls=more_than_enough)

    assert len(seams) > TIME_LIMIT_STEPS  # the idle scene alone has that many steps
    assert resumed_seams == seams
