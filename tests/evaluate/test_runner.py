"""The runner that all simulators share: journals, films, and evaluations that are interrupted.

The tests use a simulator without scenes, whose films are the text of its tracks.
"""

import dataclasses
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
from spear.evaluate.runner import EndedEpisode, run_evaluation

IDLE = IdleAgent()
NO_SETTINGS: dict[str, Any] = {}  # of the simulator; they do not matter here


class Track(str):
    """What a film is made of, here a text. In SIMPLER, images of some 100 MB per episode.

    A class of our own, because a plain `str` cannot be in a `WeakSet`.
    """


class ParitySimulator:
    """A simulator in which even seeds succeed and odd seeds fail.

    is_fickle        whether, instead, every episode fails at first and succeeds when it is filmed.
    episodes         (seed, whether it was run with its track) of each episode that was run.
    live_tracks      the tracks that are in memory.
    max_live_tracks  the largest number of tracks in memory at the begin of an episode.
    """

    has_cheap_tracks = False
    group_size = 1

    def __init__(self, is_fickle: bool = False) -> None:
        self.is_fickle = is_fickle
        self.episodes: list[tuple[int, bool]] = []
        self.live_tracks: weakref.WeakSet[Track] = weakref.WeakSet()
        self.max_live_tracks = 0

    def run_episodes(
        self, agent: Agent, family: str, seeds: Sequence[int], filming: bool
    ) -> Iterator[EndedEpisode[str]]:
        for seed in seeds:
            self.episodes.append((seed, filming))
            self.max_live_tracks = max(self.max_live_tracks, len(self.live_tracks))
            success = filming if self.is_fickle else seed % 2 == 0
            track = Track(f"{family} {seed}" if filming else "")
            self.live_tracks.add(track)
            outcome = Outcome(
                family=family,
                seed=seed,
                instruction="go",
                success=success,
                reached=True,
                grasped=True,
                wrong_object_moved=False,
                unreachable=0,
                steps=9,
            )
            yield EndedEpisode(outcome, 2.5, track)  # an episode takes 2.5 s
            del track  # so that only the runner may keep it in memory

    def make_film_frames(self, outcome: Outcome, track: str) -> str:
        return track


class StoppedSimulator(ParitySimulator):
    """A simulator that is interrupted when only its successes have ended."""

    group_size = 20

    def run_episodes(self, *arguments: Any) -> Iterator[EndedEpisode[str]]:
        for episode in super().run_episodes(*arguments):
            outcome, _, _ = episode
            if outcome.success:
                yield episode
        raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def _tracks_are_films(monkeypatch: pytest.MonkeyPatch) -> None:
    """In all tests, the bytes of a film are the text of its track."""
    monkeypatch.setattr(film, "encode_film", lambda track, rate_hz: track.encode())


ALL_UNFILMED = [(seed, False) for seed in range(20)]
ALL_FILMED = [(seed, True) for seed in range(20)]


# The option `--videos`; which episodes are run, and whether with their tracks; and how many films
# there are in the end. Ten of the twenty episodes fail.
@pytest.mark.parametrize(
    ("films", "episodes", "num_films"),
    [
        (0, ALL_UNFILMED, 0),
        (1, [*ALL_UNFILMED, (0, True), (1, True)], 2),
        ("failures", ALL_FILMED, 10),
        ("all", ALL_FILMED, 20),
    ],
)
def test_costly_films_are_made_of_few_episodes_with_few_tracks_in_memory(
    films: Films, episodes: list[tuple[int, bool]], num_films: int, tmp_path: Path
) -> None:
    simulator = ParitySimulator()
    options = EpisodeOptions(videos=films, out=tmp_path)

    results, made_films = run_evaluation(simulator, IDLE, {"a": range(20)}, NO_SETTINGS, options)

    assert simulator.episodes == episodes
    assert simulator.max_live_tracks <= 3  # far less than 20
    assert results.mean_success().value == 0.5
    assert len(made_films) == len(list(tmp_path.glob("*.mp4"))) == num_films
    contents = {made_film.data.decode() for made_film in made_films}
    assert contents == {f"a {made_film.outcome.seed}" for made_film in made_films}


def test_the_journal_has_each_episodes_own_time_and_the_wall_time(tmp_path: Path) -> None:
    options = EpisodeOptions(out=tmp_path)

    results, _ = run_evaluation(ParitySimulator(), IDLE, {"a": range(20)}, NO_SETTINGS, options)

    lines = (tmp_path / "episodes-1-of-1.jsonl").read_text().splitlines()
    episodes = [json.loads(line) for line in lines[2:]]  # behind policy and scenes
    assert all(episode["seconds"] == 2.5 for episode in episodes)
    wall_time = sum(episode["wall"] for episode in episodes)
    assert load_results(tmp_path).seconds == wall_time
    assert results.seconds >= wall_time


def run_shard(simulator: ParitySimulator, scenes: int, shard: str, out: Path) -> Results:
    """Run a shard until it is finished or interrupted, and load the folder's results.

    Args:
        simulator: The simulator.
        scenes: The number of scenes of the whole evaluation.
        shard: The part, for example "1/2".
        out: The folder of results.
    """
    with suppress(KeyboardInterrupt):
        options = EpisodeOptions(out=out, shard=shard)
        run_evaluation(simulator, IDLE, {"a": range(scenes)}, NO_SETTINGS, options)
    return load_results(out)


def test_a_stopped_evaluation_says_that_it_is_unfinished(tmp_path: Path) -> None:
    """Successes end first, so a rate over the scenes that have ended is too high."""
    results = run_shard(StoppedSimulator(), 8, "1/1", tmp_path)

    assert results.describe_unfinished().startswith("4 scenes")
    assert "UNFINISHED: 4" in results.describe_interval_widths()


def test_a_comparison_names_the_unfinished_result(tmp_path: Path) -> None:
    unfinished = run_shard(StoppedSimulator(), 8, "1/1", tmp_path)
    finished = Results("other", NO_SETTINGS, unfinished.outcomes, seconds=1.0)

    (warning,) = compare_results(unfinished, finished).settings

    assert warning.startswith(f"in {IDLE.name}, ")


def test_an_evaluation_is_finished_when_all_shards_are(tmp_path: Path) -> None:
    """A later part may have more scenes than were planned before."""
    run_shard(StoppedSimulator(), 8, "1/1", tmp_path)  # scenes 0 to 7; 0, 2, 4 and 6 end

    first_half = run_shard(ParitySimulator(), 8, "1/2", tmp_path)
    both_halves = run_shard(ParitySimulator(), 12, "2/2", tmp_path)
    everything = run_shard(ParitySimulator(), 12, "1/1", tmp_path)

    assert first_half.describe_unfinished().startswith("4 ")  # 1, 3, 5 and 7
    assert both_halves.describe_unfinished() == ""
    assert everything.describe_unfinished() == ""
    assert "UNFINISHED" not in everything.describe_interval_widths()


def test_an_episode_that_ends_differently_when_run_again_has_no_film(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    simulator = ParitySimulator(is_fickle=True)
    options = EpisodeOptions(videos=1, out=tmp_path)

    results, made_films = run_evaluation(simulator, IDLE, {"a": range(3)}, NO_SETTINGS, options)

    assert results.mean_success().value == 0
    assert made_films == []
    assert "no film of a 0" in capsys.readouterr().err


def test_a_simulator_that_cannot_run_leaves_nothing_behind(tmp_path: Path) -> None:
    class BrokenSimulator(ParitySimulator):
        def run_episodes(self, *_: object) -> Iterator[EndedEpisode[str]]:
            raise SpearError("no renderer")

    options = EpisodeOptions(out=tmp_path / "new")

    with pytest.raises(SpearError, match="no renderer"):
        run_evaluation(BrokenSimulator(), IDLE, {"a": range(2)}, NO_SETTINGS, options)

    assert not list(tmp_path.iterdir())


class CrowdedSimulator(ParitySimulator):
    """A simulator in which the number of episodes that run together decides how they end."""

    group_size = 3

    def run_episodes(
        self, agent: Agent, family: str, seeds: Sequence[int], filming: bool
    ) -> Iterator[EndedEpisode[str]]:
        for outcome, seconds, track in super().run_episodes(agent, family, seeds, filming):
            yield EndedEpisode(dataclasses.replace(outcome, steps=len(seeds)), seconds, track)


class StoppedCrowdedSimulator(CrowdedSimulator):
    """That simulator, interrupted in its second group, in which only the last episode has ended."""

    def run_episodes(
        self, agent: Agent, family: str, seeds: Sequence[int], filming: bool
    ) -> Iterator[EndedEpisode[str]]:
        for episode in super().run_episodes(agent, family, seeds, filming):
            outcome, _, _ = episode
            is_second_group = 3 in seeds
            if not is_second_group or outcome.seed == 5:
                yield episode
        if 3 in seeds:
            raise KeyboardInterrupt


def test_episodes_run_again_with_those_of_their_group(tmp_path: Path) -> None:
    options = EpisodeOptions(out=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(StoppedCrowdedSimulator(), IDLE, {"a": range(8)}, NO_SETTINGS, options)
    simulator = CrowdedSimulator()

    resumed, _ = run_evaluation(simulator, IDLE, {"a": range(8)}, NO_SETTINGS, options)

    uninterrupted, _ = run_evaluation(
        CrowdedSimulator(), IDLE, {"a": range(8)}, NO_SETTINGS, EpisodeOptions()
    )
    assert resumed.outcomes == uninterrupted.outcomes
    assert [seed for seed, _ in simulator.episodes] == [3, 4, 5, 6, 7]
