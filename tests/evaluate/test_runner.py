"""The runner that all simulators share: films as episodes end, or of episodes run again."""

import json
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from spear.errors import SpearError
from spear.evaluate import film
from spear.evaluate.agents import Agent, IdleAgent
from spear.evaluate.compare import compare_results
from spear.evaluate.options import EpisodeOptions, Films
from spear.evaluate.results import Outcome, Results, load_results
from spear.evaluate.runner import run_evaluation

IDLE = IdleAgent()


class Track(str):
    """What a film is made of: pictures, in SIMPLER some 100 MB per episode."""


class Parity:
    """A simulator in which even seeds succeed.

    ran: (seed, whether it was filmed) of each episode. most: tracks that were alive when an episode began.
    fickle: every episode fails at first, and succeeds when it is filmed.
    """

    films_are_free = False

    def __init__(self, fickle: bool = False) -> None:
        self.fickle = fickle
        self.ran: list[tuple[int, bool]] = []
        self.tracks: weakref.WeakSet[Track] = weakref.WeakSet()
        self.most = 0

    def run(
        self, agent: Agent, family: str, seeds: Sequence[int], filming: bool
    ) -> Iterator[tuple[Outcome, float, str]]:
        for seed in seeds:
            self.ran.append((seed, filming))
            self.most = max(self.most, len(self.tracks))
            success = filming if self.fickle else seed % 2 == 0
            track = Track(f"{family} {seed}" if filming else "")
            self.tracks.add(track)
            yield Outcome(family, seed, "go", success, True, True, False, 0, 9), 2.5, track
            del track

    def film(self, outcome: Outcome, track: str) -> str:
        return track


@pytest.fixture(autouse=True)
def _tracks_are_films(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(film, "encode_film", lambda track, rate_hz: track.encode())


@pytest.mark.parametrize(
    ("films", "ran", "made"),
    [
        (0, [(s, False) for s in range(20)], 0),
        (1, [*((s, False) for s in range(20)), (0, True), (1, True)], 2),
        ("failures", [(s, True) for s in range(20)], 10),
        ("all", [(s, True) for s in range(20)], 20),
    ],
)
def test_films_that_cost_are_made_of_few_episodes_and_few_are_in_memory(
    films: Films, ran: list[tuple[int, bool]], made: int, tmp_path: Path
) -> None:
    simulator, options = Parity(), EpisodeOptions(films=films, out=tmp_path)
    results, found = run_evaluation(simulator, IDLE, {"a": range(20)}, {}, options)
    assert simulator.ran == ran and simulator.most <= 3 and results.mean_success().value == 0.5
    assert {f.data.decode() for f in found} == {f"a {f.outcome.seed}" for f in found}
    lines = [
        json.loads(line)
        for line in (tmp_path / "episodes-1-of-1.jsonl").read_text().splitlines()[2:]
    ]
    assert all(line["seconds"] == 2.5 for line in lines)  # its own, whatever runs beside it
    assert results.seconds >= sum(line["wall"] for line in lines) == load_results(tmp_path).seconds
    assert len(found) == len(list(tmp_path.glob("*.mp4"))) == made


def test_what_was_stopped_is_not_taken_for_the_whole(tmp_path: Path) -> None:
    """Successes end first: of half of the scenes, nine in ten may have succeeded."""

    class Stopped(Parity):
        def run(self, *how: Any) -> Iterator[tuple[Outcome, float, str]]:
            for ended in super().run(*how):
                if ended[0].success:
                    yield ended
            raise KeyboardInterrupt

    def run(simulator: Parity, scenes: int, shard: str) -> str:
        options = EpisodeOptions(out=tmp_path, shard=shard)
        with suppress(KeyboardInterrupt):
            run_evaluation(simulator, IDLE, {"a": range(scenes)}, {}, options)
        return load_results(tmp_path).describe_unfinished()

    assert (
        run(Stopped(), 8, "1/1").startswith("4 scenes")
        and "UNFINISHED: 4" in load_results(tmp_path).describe_precision()
    )
    whole = Results("other", {}, load_results(tmp_path).outcomes, 1.0)
    assert [
        words.partition(" ")[0] for words in compare_results(load_results(tmp_path), whole).settings
    ] == [f"{IDLE.name}:"]
    assert run(Parity(), 8, "1/2").startswith("4 ") and run(Parity(), 12, "2/2") == ""
    assert (
        run(Parity(), 12, "1/1") == ""
        and "UNFINISHED" not in load_results(tmp_path).describe_precision()
    )


def test_one_that_ends_otherwise_has_no_film(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = EpisodeOptions(films=1, out=tmp_path)
    results, made = run_evaluation(Parity(fickle=True), IDLE, {"a": range(3)}, {}, options)
    assert (
        results.mean_success().value == 0
        and made == []
        and "no film of a 0" in capsys.readouterr().err
    )


def test_a_simulator_that_cannot_run_leaves_nothing_behind(tmp_path: Path) -> None:
    class Broken(Parity):
        def run(self, *_: object) -> Iterator[tuple[Outcome, float, str]]:
            raise SpearError("no renderer")

    with pytest.raises(SpearError, match="no renderer"):
        run_evaluation(Broken(), IDLE, {"a": range(2)}, {}, EpisodeOptions(out=tmp_path / "new"))
    assert not list(tmp_path.iterdir())
