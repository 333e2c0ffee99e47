"""The closed loop: fair references, outcomes that do not depend on batching, films of both outcomes."""

import contextlib
import importlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from refusals import refuses
from spear.evaluate import closed_loop
from spear.evaluate import film as video
from spear.evaluate.agents import IDLE_ACTION, Agent, ExpertAgent, IdleAgent, PolicyAgent
from spear.evaluate.closed_loop import evaluate_tabletop
from spear.evaluate.options import TabletopOptions
from spear.evaluate.results import Outcome, Results
from spear.types import Array

SMALL = {"external": (48, 32), "wrist": (24, 24)}


def run(agent: Agent, scenes: int, *families: str, **options: Any) -> Results:
    return evaluate_tabletop(
        agent, TabletopOptions(scenes, families=families or ("put_on",), **options)
    )[0]


class Half(ExpertAgent):
    """The expert in even scenes, idle in odd ones; Ctrl-C after so many steps."""

    image_sizes = SMALL

    def __init__(self, steps: int = 10**6) -> None:
        self.steps, self.scenes = steps, set[int]()

    def act(
        self, envs: Sequence[Any], observations: Sequence[Mapping[str, Any]]
    ) -> Sequence[Array]:
        self.steps -= 1
        if self.steps < 0:
            raise KeyboardInterrupt
        self.scenes |= {e.world.spec.seed for e in envs}
        pairs = zip(super().act(envs, observations), envs, strict=True)
        return [a if e.world.spec.seed % 2 == 0 else IDLE_ACTION[None] for a, e in pairs]


class Wander:
    """A policy that moves as its own observation says, so that its outcome shows what it saw."""

    image_sizes: Mapping[str, tuple[int, int]] = SMALL

    def __init__(self) -> None:
        self.shapes, self.told, self.committed = set[tuple[int, ...]](), list[int](), 0

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        self.told.append(len(observation.get("committed", ())))
        self.shapes |= {value.shape for key, value in observation.items() if key.endswith("image")}
        state = observation["observation/state"]
        step = np.array([0.02, -0.1 * state[1], 0.05 * (0.15 - state[2])])
        return {"actions": np.tile([*step, 1, 0, 0, 0, 1], (5, 1)).astype(np.float32)}

    def infer_batch(self, observations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [self.infer(o) for o in observations]


def test_outcomes_do_not_depend_on_the_batch() -> None:
    runs: list[Sequence[Outcome]] = []
    for batch in (1, 3):
        policy = Wander()
        runs.append(run(PolicyAgent(policy, "x"), 3, first_seed=20, batch=batch, replan=5).outcomes)
        assert policy.shapes == {(32, 48, 3), (24, 24, 3)}
    assert runs[0] == runs[1]


@pytest.mark.parametrize("view", SMALL)
def test_a_policy_with_one_camera_sees_that_one_only(view: str) -> None:
    policy, (width, height) = Wander(), SMALL[view]
    policy.image_sizes = {view: SMALL[view]}
    assert run(PolicyAgent(policy, "x"), 1, replan=5).outcomes and policy.shapes == {
        (height, width, 3)
    }


def test_films_are_made_in_both_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "HEIGHT", 60)
    one = TabletopOptions(2, out=tmp_path, films=1, families=("put_on",))
    results, films = evaluate_tabletop(Half(), one)
    assert [o.success for o in results.outcomes] == [True, False]
    assert [f.outcome for f in films] == results.outcomes
    for film in films:
        with av.open(io.BytesIO(film.data)) as container:
            assert sum(1 for _ in container.decode(video=0)) == film.outcome.steps + 1 + 5
    (tmp_path / "put_on-success-0.mp4").unlink()
    again, films = evaluate_tabletop(Half(), one)
    assert again.outcomes == results.outcomes and [f.outcome.seed for f in films] == [0]
    assert evaluate_tabletop(Half(), one)[1] == []


def test_an_interrupted_sharded_evaluation_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = run(Half(), 4)
    common = {"batch": 1, "out": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        run(Half(whole.outcomes[0].steps + 1), 4, shard="1/2", **common)
    rest = Half()
    first = run(rest, 4, shard="1/2", **common)
    assert rest.scenes == {2}  # scene 0 was done
    second = run(Half(), 4, shard="2/2", **common)
    assert (first.outcomes, second.outcomes) == (whole.outcomes[::2], whole.outcomes[1::2])
    assert run(Half(0), 4, **common).outcomes == whole.outcomes


def test_results_of_another_physics_do_not_mix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(IdleAgent(), 1, out=tmp_path)
    monkeypatch.setattr(
        closed_loop, "SIMULATOR_VERSION", "MuJoCo 3.3.7"
    )  # where the expert fails in 7 of 25 scenes
    refuses("MuJoCo 3.3.7", run, IdleAgent(), 2, out=tmp_path)
    run(IdleAgent(), 1, out=tmp_path / "async", execution="async")
    monkeypatch.setattr(closed_loop, "NUM_SLOW_ACTIONS", 9)
    refuses("slow_actions", run, IdleAgent(), 2, out=tmp_path / "async", execution="async")


def test_latency_costs_steps() -> None:
    class Planner(ExpertAgent):
        """The expert, who says its next action five times over: a chunk to execute meanwhile."""

        def act(
            self, envs: Sequence[Any], observations: Sequence[Mapping[str, Any]]
        ) -> Sequence[Array]:
            return [np.repeat(a, 5, axis=0) for a in super().act(envs, observations)]

    soon, late = (run(Planner(), 2, latency_ms=ms) for ms in (0.0, 200.0))
    assert sum(o.steps for o in late.outcomes) > 1.5 * sum(o.steps for o in soon.outcomes)
    assert late.settings["latency_ms"] == 200 and late.settings["execution"] == "sync"
    assert run(IdleAgent(), 1, execution="async").outcomes[0].steps == 60


def test_rtc_is_for_policies_that_have_learned_it() -> None:
    policy = Wander()
    policy.committed = 2
    late = run(PolicyAgent(policy, "x"), 1, execution="rtc", latency_ms=300.0)
    assert set(policy.told) == {0, 2} and policy.told.count(0) == 1
    assert len(policy.told) == late.outcomes[0].steps / 2
    refuses("--execution rtc", run, ExpertAgent(), 1, execution="rtc")


def test_seams_of_an_episode_run_again_count_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ChunkExecutor", "_make_outcome"):  # which the study replaces
        monkeypatch.setattr(closed_loop, name, getattr(closed_loop, name))
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks/evaluate")
    study, seams = importlib.import_module("latency_study"), []
    for ends in ([99], [30, 99]):  # at one go; stopped while one of two scenes runs
        for most in ends:
            with contextlib.suppress(KeyboardInterrupt):
                study.cell(Half(most), "sync/1", 0, 2, tmp_path / str(len(ends)), ("put_on",))
        seams.append(
            sorted(next((tmp_path / str(len(ends))).rglob("seams.txt")).read_text().split())
        )
    assert seams[0] == seams[1] and len(seams[0]) > 60
