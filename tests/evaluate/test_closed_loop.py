"""The closed loop: fair references, outcomes that do not depend on batching, films of both outcomes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from spear.chunks import mean_action
from spear.errors import SpearError
from spear.evaluate.agents import NOTHING, ConstantActor, ExpertActor, PolicyActor
from spear.evaluate.closed_loop import evaluate
from spear.types import Array

SMALL: dict[str, Any] = {"image_size": (48, 32), "wrist_size": (24, 24), "quiet": True}


class Wander:
    """A policy that moves as its own observation says, so that its outcome shows what it saw."""

    def __init__(self) -> None:
        self.shapes: set[tuple[int, ...]] = set()

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        for key in ("observation/image", "observation/wrist_image"):
            self.shapes.add(observation[key].shape)
        state = observation["observation/state"]
        step = np.array([0.02, -0.1 * state[1], 0.05 * (0.15 - state[2])])
        return {"actions": np.tile([*step, 1, 0, 0, 0, 1], (5, 1)).astype(np.float32)}

    def infer_batch(self, observations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [self.infer(o) for o in observations]


def test_the_expert_succeeds_and_doing_nothing_does_not() -> None:
    expert, _ = evaluate(ExpertActor(), ("put_on", "stack_cube"), scenes=3, quiet=True)
    nothing, _ = evaluate(ConstantActor("nothing", NOTHING), ("put_on",), scenes=2, quiet=True)
    assert expert.mean_success >= 0.8
    assert nothing.mean_success == 0
    assert all(o.steps == 60 and not o.wrong_object_moved for o in nothing.outcomes)
    assert [(o.family, o.seed) for o in expert.outcomes] == [
        (f, s) for f in ("put_on", "stack_cube") for s in range(3)
    ]


def test_outcomes_do_not_depend_on_the_batch() -> None:
    runs = []
    for batch in (1, 3):
        policy = Wander()
        runs.append(evaluate(PolicyActor(policy, "x"), ("put_on",), 4, 20, batch=batch, **SMALL)[0].outcomes)
        assert policy.shapes == {(32, 48, 3), (24, 24, 3)}
    assert runs[0] == runs[1]


def test_films_show_the_first_success_and_the_first_failure() -> None:
    class Mixed(ExpertActor):
        """The expert in even scenes, nothing in odd ones."""

        def act(self, envs: Sequence[Any], observations: Sequence[Mapping[str, Any]]) -> Sequence[Array]:
            acted = super().act(envs, observations)
            return [
                a if e.world.spec.seed % 2 == 0 else NOTHING[None] for a, e in zip(acted, envs, strict=True)
            ]

    results, films = evaluate(Mixed(), ("put_on",), scenes=4, batch=4, films=1, **SMALL)
    assert [o.success for o in results.outcomes] == [True, False, True, False]
    assert [f.outcome.success for f in films] == [True, False]
    for film in films:
        with av.open(io.BytesIO(film.data)) as container:
            count = sum(1 for _ in container.decode(video=0))
        assert count == film.outcome.steps + 1 + 5


def test_every_failure_is_filmed_also_those_of_an_earlier_run(tmp_path: Path) -> None:
    idle = ConstantActor("nothing", NOTHING)
    common: dict[str, Any] = {**SMALL, "out": tmp_path, "films": "failures"}
    _, made = evaluate(idle, ("put_on",), 1, **common)
    assert [p.suffix for p in tmp_path.glob("put_on-failure-0.*")] == [".mp4"]
    film = made[0].data
    (tmp_path / "put_on-failure-0.mp4").unlink()
    results, made = evaluate(idle, ("put_on",), 1, **common)
    assert [(f.outcome, f.data) for f in made] == [(results.outcomes[0], film)]
    assert evaluate(idle, ("put_on",), 1, **common)[1] == []


def test_only_held_out_scenes_and_known_families() -> None:
    with pytest.raises(SpearError, match="held-out seeds are 0 … 9999"):
        evaluate(ExpertActor(), scenes=10, first_seed=9_995)
    with pytest.raises(SpearError, match="did you mean 'stack_cube'"):
        evaluate(ExpertActor(), ("stack_cubes",))
    with pytest.raises(SpearError, match="batch 0"):
        evaluate(ExpertActor(), batch=0)


def test_mean_action_ignores_quaternion_signs() -> None:
    rng = np.random.default_rng(0)
    actions = np.zeros((50, 8))
    actions[:, :3] = rng.normal(0.01, 0.001, (50, 3))
    actions[:, 3:7] = np.array([np.cos(0.2), 0, 0, np.sin(0.2)]) + 0.01 * rng.normal(size=(50, 4))
    actions[:, 3:7] /= np.linalg.norm(actions[:, 3:7], axis=1, keepdims=True)
    actions[:, 7] = rng.random(50) < 0.8
    mean = mean_action(actions)
    actions[::2, 3:7] *= -1
    np.testing.assert_allclose(mean, mean_action(actions), atol=1e-6)
    np.testing.assert_allclose(mean[3:7], [np.cos(0.2), 0, 0, np.sin(0.2)], atol=0.01)
    assert mean[7] > 0.5


def test_latency_costs_steps_and_each_way_of_executing_works() -> None:
    class Planner(ExpertActor):
        """The expert, who says its next action five times over: a chunk to execute while the next is
        awaited."""

        def act(self, envs: Sequence[Any], observations: Sequence[Mapping[str, Any]]) -> Sequence[Array]:
            return [np.repeat(a, 5, axis=0) for a in super().act(envs, observations)]

    steps = {}
    for latency in (0.0, 200.0):
        done, _ = evaluate(Planner(), ("put_on",), 2, replan=1, quiet=True, latency_ms=latency)
        assert done.settings["latency_ms"] == latency and done.settings["execution"] == "sync"
        steps[latency] = sum(o.steps for o in done.outcomes)
    assert steps[200.0] > 1.5 * steps[0.0]
    still, _ = evaluate(ConstantActor("nothing", NOTHING), ("put_on",), 1, quiet=True, execution="async")
    assert still.outcomes[0].steps == 60
    mean, _ = evaluate(ExpertActor(), ("put_on",), 2, quiet=True, execution="ensemble")
    plain, _ = evaluate(ExpertActor(), ("put_on",), 2, quiet=True)
    assert mean.outcomes == plain.outcomes  # one action per chunk: nothing to average
    with pytest.raises(SpearError, match="latency -1"):
        evaluate(ExpertActor(), scenes=1, latency_ms=-1.0)


def test_a_refused_evaluation_leaves_no_journal(tmp_path: Path) -> None:
    with pytest.raises(SpearError, match="replan 0"):
        evaluate(ExpertActor(), ("put_on",), 1, replan=0, quiet=True, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
