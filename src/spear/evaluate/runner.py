"""What evaluations in every simulator share: outcomes on disk as they come, resumption, and
films.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from spear.data.readers.formats import check_holds_no_input
from spear.errors import SpearError, format_count
from spear.evaluate import film as video
from spear.evaluate.agents import Agent
from spear.evaluate.options import EpisodeOptions
from spear.evaluate.results import Journal, Outcome, Results, ScenesByFamily, parse_shard
from spear.types import CONTROL_RATE_HZ, Array
from spear.util.files import write_bytes
from spear.util.progress import ProgressBar
from spear.util.run_lock import acquire_run_lock

Track = TypeVar("Track")


@dataclass(frozen=True)
class Film:
    """The film of one episode. data: the bytes of an MP4 file."""

    outcome: Outcome
    data: bytes


class Simulator(Protocol[Track]):
    """Scenes of task families, each fixed by its seed, in which an agent acts.

    films_are_free  whether an episode's track costs next to nothing. Otherwise tracks are only
                    recorded where every episode may need one; the few others are run again for
                    their film.
    """

    films_are_free: bool

    def run(
        self, agent: Agent, family: str, seeds: Sequence[int], filming: bool
    ) -> Iterator[tuple[Outcome, float, Track]]:
        """Run one episode per seed, in any order.

        Yields, as each episode ends, its outcome, the seconds that it ran (alongside others), and
        its track: what its film is made of. The track may be empty unless `filming`.
        """

    def film(self, outcome: Outcome, track: Track) -> Iterable[Array]:
        """The frames of an episode's film, one per step."""


def run_evaluation(
    simulator: Simulator[Track],
    agent: Agent,
    scenes: ScenesByFamily,
    settings: dict[str, Any],
    options: EpisodeOptions,
) -> tuple[Results, list[Film]]:
    """Run an evaluation, or what is missing of it.

    Args:
        simulator: Where the scenes are.
        agent: Who acts.
        scenes: Those whose outcomes `options.out` has are only filmed, where a film is wanted and
            missing.
        settings: Whatever else an outcome depends on: only results with the same settings are
            merged.
        options: Which part of the scenes to run, what to film, and where to write.

    Returns:
        The results of this part of the scenes, and the films made now.

    Raises:
        SpearError: The folder has other results; the part is empty, or runs elsewhere.
    """
    # Choose this process's part of the scenes.
    shard = parse_shard(options.shard)
    shard_scenes = select_shard(scenes, shard)
    if options.videos:
        video.import_encoder()  # a missing one is reported before any episode runs

    with contextlib.ExitStack() as stack:
        # Open the journal, which knows what earlier runs have finished.
        journal = None
        if options.out:
            journal = stack.enter_context(
                open_journal(options, agent.name, settings, shard, shard_scenes)
            )

        # Run what is missing, one family after another.
        started = time.perf_counter()
        evaluation = _Evaluation(simulator, agent, options, journal)
        outcomes: list[Outcome] = []
        for family, seeds in shard_scenes.items():
            outcomes += evaluation.run_family(family, seeds)

    results = Results(agent.name, settings, outcomes, time.perf_counter() - started)
    return results, evaluation.films


def select_shard(scenes: ScenesByFamily, shard: tuple[int, int]) -> dict[str, Sequence[int]]:
    """The scenes of part k of n. Raises `SpearError` if there are none."""
    index, count = shard
    max_scenes = max(map(len, scenes.values()), default=0)
    if max_scenes < index:
        raise SpearError(
            f"--shard {index}/{count}: holds no scene: "
            f"make at most {format_count(max_scenes, 'parts')}"
        )
    return {family: seeds[index - 1 :: count] for family, seeds in scenes.items()}


@contextlib.contextmanager
def open_journal(
    options: EpisodeOptions,
    policy: str,
    settings: Mapping[str, Any],
    shard: tuple[int, int],
    shard_scenes: ScenesByFamily,
) -> Iterator[Journal]:
    """The journal of a shard in `options.out`, which no other process writes meanwhile."""
    assert options.out is not None
    index, count = shard
    check_holds_no_input(options.out, "evaluate")
    lock_name = f".episodes-{index}-of-{count}.lock"
    with acquire_run_lock(options.out, f"running part {index}/{count} in", name=lock_name):
        yield Journal(options.out, policy, settings, shard, shard_scenes)


@dataclass
class _Evaluation(Generic[Track]):
    """An evaluation that is running, with the films made so far."""

    simulator: Simulator[Track]
    agent: Agent
    options: EpisodeOptions
    journal: Journal | None
    _films: dict[str, Film] = field(default_factory=dict)

    @property
    def films(self) -> list[Film]:
        return list(self._films.values())

    @property
    def records_tracks(self) -> bool:
        """Whether all episodes are run with their tracks."""
        films = self.options.videos
        return isinstance(films, str) or (films > 0 and self.simulator.films_are_free)

    @property
    def films_at_once(self) -> bool:
        """Whether each film is made as its episode ends: in SIMPLER a track is every picture."""
        return isinstance(self.options.videos, str)

    def run_family(self, family: str, seeds: Sequence[int]) -> list[Outcome]:
        """Run the episodes of a family that are missing; the outcomes of all, in the order of their
        seeds.
        """
        outcomes: dict[int, Outcome] = {}
        if self.journal is not None:
            for seed in seeds:
                if (family, seed) in self.journal.outcomes:
                    outcomes[seed] = self.journal.outcomes[family, seed]
        missing = [seed for seed in seeds if seed not in outcomes]

        title = f"{self.agent.name}, {family}"
        with ProgressBar(title, len(seeds), "scenes", len(outcomes)) as bar:
            tracks = self._run_episodes(family, missing, outcomes, bar)
            ended = [outcomes[seed] for seed in seeds]
            without_track = self._make_films(ended, tracks)
            self._film_again(family, without_track, outcomes, bar)
        return ended

    def _run_episodes(
        self, family: str, seeds: Sequence[int], outcomes: dict[int, Outcome], bar: ProgressBar
    ) -> dict[int, Track]:
        """Run episodes and add their outcomes; returns the tracks of which no film was made yet."""
        tracks: dict[int, Track] = {}
        last_end = time.perf_counter()
        episodes = self.simulator.run(self.agent, family, seeds, self.records_tracks)
        for outcome, seconds, track in episodes:
            outcomes[outcome.seed] = outcome
            if self.journal is not None:
                self.journal.add(outcome, seconds, time.perf_counter() - last_end)
            last_end = time.perf_counter()
            if self.records_tracks:
                tracks[outcome.seed] = track
            if self.films_at_once:
                self._make_films([outcome], tracks)
                tracks.clear()
            num_successes = sum(outcome.success for outcome in outcomes.values())
            bar.update(len(outcomes), f"{num_successes} succeeded")
        return tracks

    def _film_again(
        self, family: str, seeds: Sequence[int], outcomes: Mapping[int, Outcome], bar: ProgressBar
    ) -> None:
        """Run episodes that have ended a second time, for their films."""
        for outcome, _, track in self.simulator.run(self.agent, family, seeds, True):
            if outcome == outcomes[outcome.seed]:
                self._make_films([outcome], {outcome.seed: track})
            else:
                bar.print_line(
                    f"no film of {family} {outcome.seed}: it ended differently when run again"
                )

    def _make_films(self, ended: Sequence[Outcome], tracks: Mapping[int, Track]) -> list[int]:
        """Make the films that are wanted of these episodes and missing; returns the seeds without a
        track.
        """
        without_track = []
        for outcome in self._select_filmed(ended):
            name = outcome.film_name
            is_on_disk = self.options.out is not None and (self.options.out / name).is_file()
            if name in self._films or is_on_disk:
                continue
            if outcome.seed not in tracks:
                without_track.append(outcome.seed)
                continue
            frames = self.simulator.film(outcome, tracks[outcome.seed])
            film = Film(outcome, video.encode_film(frames, CONTROL_RATE_HZ))
            self._films[name] = film
            if self.options.out:
                write_bytes(self.options.out / name, film.data)
        return without_track

    def _select_filmed(self, ended: Sequence[Outcome]) -> list[Outcome]:
        """The episodes of which a film is wanted."""
        films = self.options.videos
        successes = [outcome for outcome in ended if outcome.success]
        failures = [outcome for outcome in ended if not outcome.success]
        if isinstance(films, int):
            return successes[:films] + failures[:films]
        return list(ended) if films == "all" else failures
