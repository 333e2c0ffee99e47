"""The runner that all simulators share: films as episodes end, and of what was not filmed in the first
run."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from spear.evaluate.agents import NOTHING, Agent, ConstantActor
from spear.evaluate.journal import Shard
from spear.evaluate.results import Outcome
from spear.evaluate.runner import Film, Films, run_evaluation


class Parity:
    """A simulator in which even seeds succeed. ran: (seed, whether it was filmed) of each episode."""

    films_are_free = False

    def __init__(self) -> None:
        self.ran: list[tuple[int, bool]] = []

    def run(
        self, agent: Agent, family: str, seeds: Sequence[int], filming: bool
    ) -> Iterator[tuple[Outcome, str]]:
        for seed in seeds:
            self.ran.append((seed, filming))
            ended = Outcome(family, seed, "go", seed % 2 == 0, True, True, False, 0, 9)
            yield ended, f"{family} {seed}" if filming else ""

    def film(self, outcome: Outcome, track: str) -> Film:
        return Film(outcome, track.encode(), "video/mp4")


@pytest.mark.parametrize(
    ("films", "ran"),
    [
        (0, [(0, False), (1, False), (2, False), (3, False)]),
        (1, [(0, False), (1, False), (2, False), (3, False), (0, True), (1, True)]),
        ("failures", [(0, True), (1, True), (2, True), (3, True)]),
        ("all", [(0, True), (1, True), (2, True), (3, True)]),
    ],
)
def test_films_that_cost_are_made_of_few_episodes(
    films: Films, ran: list[tuple[int, bool]], tmp_path: Path
) -> None:
    simulator, idle = Parity(), ConstantActor("nothing", NOTHING)
    results, made = run_evaluation(simulator, idle, {"a": range(4)}, {}, films, quiet=True, out=tmp_path)
    assert simulator.ran == ran
    assert results.mean_success == 0.5
    assert {f.data.decode() for f in made} == {f"a {o.seed}" for o in (f.outcome for f in made)}
    assert len(list(tmp_path.glob("*.mp4"))) == {0: 0, 1: 2, "failures": 2, "all": 4}[films]


@pytest.mark.parametrize(("free", "films"), [(False, "failures"), (False, "all"), (True, 1)])
def test_few_episodes_are_held_in_memory_at_a_time(free: bool, films: Films, tmp_path: Path) -> None:
    class Track(str):
        """What a film is made of: pictures, in SIMPLER some 100 MB per episode."""

    class Heavy(Parity):
        """Notes how many tracks are alive when an episode begins."""

        films_are_free = free

        def __init__(self) -> None:
            super().__init__()
            self.tracks: weakref.WeakSet[Track] = weakref.WeakSet()
            self.most = 0

        def run(
            self, agent: Agent, family: str, seeds: Sequence[int], filming: bool
        ) -> Iterator[tuple[Outcome, str]]:
            for seed in seeds:
                self.most = max(self.most, len(self.tracks))
                for ended, text in super().run(agent, family, [seed], filming):
                    track = Track(text)
                    self.tracks.add(track)
                    yield ended, track
                    del track

    simulator = Heavy()
    _, made = run_evaluation(
        simulator, ConstantActor("x", NOTHING), {"a": range(40)}, {}, films, quiet=True, out=tmp_path
    )
    assert len(made) == {"failures": 20, "all": 40, 1: 2}[films]
    assert simulator.most <= 3


def test_an_episode_that_ends_otherwise_when_run_again_has_no_film(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Fickle(Parity):
        """Every episode fails at first, and succeeds when run again."""

        def run(
            self, agent: Agent, family: str, seeds: Sequence[int], filming: bool
        ) -> Iterator[tuple[Outcome, str]]:
            for ended, track in super().run(agent, family, seeds, filming):
                yield replace(ended, success=filming), track

    results, made = run_evaluation(
        Fickle(), ConstantActor("x", NOTHING), {"a": range(3)}, {}, 1, out=tmp_path
    )
    assert results.mean_success == 0 and made == []
    assert "no film of a 0: it ended differently" in capsys.readouterr().err


def test_each_family_has_its_own_scenes_and_shards_share_them_out(tmp_path: Path) -> None:
    simulator, idle = Parity(), ConstantActor("nothing", NOTHING)
    scenes = {"a": range(5), "b": range(2)}
    part, _ = run_evaluation(simulator, idle, scenes, {}, quiet=True, out=tmp_path, shard=Shard(2, 2))
    assert [(o.family, o.seed) for o in part.outcomes] == [("a", 1), ("a", 3), ("b", 1)]
    whole, _ = run_evaluation(simulator, idle, scenes, {}, quiet=True, out=tmp_path)
    assert len(simulator.ran) == len(whole.outcomes) == 7
