"""What evaluations in all simulators share: writing outcomes, resuming, and making films.

A simulator runs one episode per seed. An episode's *track* is what its film is made of: joint
positions or images of each step, depending on the simulator.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from spear.data.readers.formats import check_holds_no_input
from spear.errors import SpearError, format_count
from spear.evaluate import film
from spear.evaluate.agents import Agent
from spear.evaluate.options import EpisodeOptions
from spear.evaluate.results import Journal, Outcome, Results, ScenesByFamily, Shard, parse_shard
from spear.types import CONTROL_RATE_HZ, Array
from spear.util.files import write_bytes
from spear.util.progress import ProgressBar
from spear.util.run_lock import acquire_run_lock

Track = TypeVar("Track")
HasEnded = bool  # whether an episode has ended


@dataclass(frozen=True)
class Film:
    """The film of one episode.

    outcome  the episode's outcome.
    data     the bytes of an MP4 file.
    """

    outcome: Outcome
    data: bytes


class EndedEpisode(NamedTuple, Generic[Track]):
    """An episode that has ended.

    outcome  how it ended.
    seconds  how long it ran, at the same time as others.
    track    what its film is made from.
    """

    outcome: Outcome
    seconds: float
    track: Track


class Simulator(Protocol[Track]):
    """Scenes of task families, each fixed by its seed, in which an agent acts.

    has_cheap_tracks  whether recording an episode's track (what its film is made from) costs hardly
                      any time. If it does not, episodes run without tracks first, and the few that
                      are filmed, such as failures, are run again with their tracks.
    group_size        how many episodes are run together. The rounding of a policy's actions depends
                      on the other observations of its batch, so an episode is repeatable only with
                      the same others.
    """

    has_cheap_tracks: bool
    group_size: int

    def run_episodes(
        self, agent: Agent, family: str, seeds: Sequence[int], filming: bool
    ) -> Iterator[EndedEpisode[Track]]:
        """Run one episode per seed, several at a time.

        Args:
            agent: Who acts.
            family: The task family.
            seeds: The seeds of the scenes.
            filming: Whether tracks are needed. Otherwise they may be empty.

        Yields:
            Each episode when it ends, so the order is not that of the seeds.
        """

    def make_film_frames(self, outcome: Outcome, track: Track) -> Iterable[Array]:
        """Render the frames [h, w, 3] uint8 of an episode's film from its track, one per step."""


def run_evaluation(
    simulator: Simulator[Track],
    agent: Agent,
    scenes: ScenesByFamily,
    settings: dict[str, Any],
    options: EpisodeOptions,
) -> tuple[Results, list[Film]]:
    """Run an evaluation, or the missing part of one that was interrupted.

    Args:
        simulator: The simulator of the scenes.
        agent: Who acts.
        scenes: The scenes of the whole evaluation. A scene whose outcome is already in
            `options.out` is not evaluated again; it may be run again for a film that is missing.
        settings: Everything else on which an outcome depends. Only results with the same settings
            are merged.
        options: Which part of the scenes to run, what to film, and where to write.

    Returns:
        The results of this part of the scenes, and the films that this call made.

    Raises:
        SpearError: The folder has other results; this part has no scenes; or another process is
            running it.
    """
    # Choose this process's part of the scenes.
    shard = parse_shard(options.shard)
    shard_scenes = select_shard(scenes, shard)
    if options.videos:
        film.import_pyav()  # raises now, before any episode runs, if there is no encoder

    with contextlib.ExitStack() as stack:
        # Open the journal, which has the outcomes of earlier runs.
        journal = None
        if options.out:
            journal = stack.enter_context(
                open_journal(options, agent.name, settings, shard, shard_scenes)
            )

        # Run the missing scenes, one family after another.
        start_time_s = time.perf_counter()
        evaluation = _Evaluation(simulator, agent, options, journal)
        outcomes: list[Outcome] = []
        for family, seeds in shard_scenes.items():
            outcomes += evaluation.run_family(family, seeds)

    results = Results(agent.name, settings, outcomes, time.perf_counter() - start_time_s)
    return results, evaluation.films


def select_shard(scenes: ScenesByFamily, shard: Shard) -> dict[str, Sequence[int]]:
    """Select the scenes of one part.

    Args:
        scenes: The scenes of the whole evaluation.
        shard: The part.

    Raises:
        SpearError: The part has no scenes.
    """
    number, num_shards = shard
    max_scenes = max(map(len, scenes.values()), default=0)
    if max_scenes < number:
        raise SpearError(
            f"--shard {number}/{num_shards} contains no scene. Make at most "
            f"{format_count(max_scenes, 'parts')}."
        )
    return {family: seeds[number - 1 :: num_shards] for family, seeds in scenes.items()}


@contextlib.contextmanager
def open_journal(
    options: EpisodeOptions,
    policy: str,
    settings: Mapping[str, Any],
    shard: Shard,
    shard_scenes: ScenesByFamily,
) -> Iterator[Journal]:
    """Open the journal of a part in `options.out`, locked so that no other process writes to it."""
    assert options.out is not None
    number, num_shards = shard
    check_holds_no_input(options.out, "evaluate")
    lock_name = f".episodes-{number}-of-{num_shards}.lock"
    with acquire_run_lock(options.out, f"running part {number}/{num_shards} in", name=lock_name):
        yield Journal(options.out, policy, settings, shard, shard_scenes)


@dataclass
class _Evaluation(Generic[Track]):
    """A running evaluation, with the films that it has made so far."""

    simulator: Simulator[Track]
    agent: Agent
    options: EpisodeOptions
    journal: Journal | None
    _films: dict[str, Film] = field(default_factory=dict)  # by the name of the film's file

    @property
    def films(self) -> list[Film]:
        """The films that have been made so far."""
        return list(self._films.values())

    @property
    def should_record_all_tracks_at_first(self) -> bool:
        """Whether the tracks of all episodes are recorded when the episodes run for the first time.

        They are recorded if all failures or all episodes are filmed ("failures", "all"). If only a
        number of films is wanted, they are recorded if that costs hardly any time.
        """
        films = self.options.videos  # "failures", "all", or a number of films
        if isinstance(films, str):
            return True
        return films > 0 and self.simulator.has_cheap_tracks

    @property
    def should_film_each_episode_as_it_ends(self) -> bool:
        """Whether each film is made when its episode ends, so that its track can be deleted.

        This is possible if `videos` is "all" or "failures", because an episode's outcome then says
        whether it is filmed. Tracks of many episodes would need much memory, because in SIMPLER a
        track has the image of each step.
        """
        return isinstance(self.options.videos, str)

    def run_family(self, family: str, seeds: Sequence[int]) -> list[Outcome]:
        """Run the missing episodes of a family.

        Returns:
            The outcomes of all its episodes, in the order of `seeds`.
        """
        outcomes: dict[int, Outcome] = {}
        if self.journal is not None:
            for seed in seeds:
                if (family, seed) in self.journal.outcomes:
                    outcomes[seed] = self.journal.outcomes[family, seed]
        title = f"{self.agent.name}, {family}"
        with ProgressBar(title, len(seeds), "scenes", num_done_before=len(outcomes)) as bar:
            tracks = self._run_missing_episodes(family, seeds, outcomes, bar)
            ended = [outcomes[seed] for seed in seeds]
            seeds_without_track = self._make_films_and_list_seeds_without_track(ended, tracks)
            self._rerun_for_films(family, seeds, seeds_without_track, outcomes, bar)
        return ended

    def _run_missing_episodes(
        self, family: str, seeds: Sequence[int], outcomes: dict[int, Outcome], bar: ProgressBar
    ) -> dict[int, Track]:
        """Run the missing episodes, and add their outcomes to `outcomes` and to the journal.

        A group of which some episodes are missing is run as a whole. Only if its episodes run
        together do they end as they would have ended without the interruption.

        Returns:
            Seed → track, for the episodes that were run and of which no film was made yet.
        """
        tracks: dict[int, Track] = {}
        last_end = time.perf_counter()
        for group in self._split_into_groups(seeds):
            if all(seed in outcomes for seed in group):
                continue
            episodes = self.simulator.run_episodes(
                self.agent, family, group, self.should_record_all_tracks_at_first
            )
            for outcome, seconds, track in episodes:
                if outcome.seed not in outcomes:
                    outcomes[outcome.seed] = outcome
                    if self.journal is not None:
                        self.journal.add(outcome, seconds, time.perf_counter() - last_end)
                    last_end = time.perf_counter()
                # An episode that was run again may have ended differently. Its track would then not
                # show the outcome that is in the journal.
                if self.should_record_all_tracks_at_first and outcome == outcomes[outcome.seed]:
                    tracks[outcome.seed] = track
                if self.should_film_each_episode_as_it_ends:
                    self._make_films_and_list_seeds_without_track([outcomes[outcome.seed]], tracks)
                    tracks.clear()
                num_successes = sum(outcome.success for outcome in outcomes.values())
                bar.set_num_done(len(outcomes), f"{num_successes} succeeded")
        return tracks

    def _split_into_groups(self, seeds: Sequence[int]) -> list[Sequence[int]]:
        """Split the seeds of a part into those that run together."""
        size = self.simulator.group_size
        return [seeds[start : start + size] for start in range(0, len(seeds), size)]

    def _rerun_for_films(
        self,
        family: str,
        seeds: Sequence[int],
        seeds_to_film: Sequence[int],
        outcomes: Mapping[int, Outcome],
        bar: ProgressBar,
    ) -> None:
        """Run the groups of some episodes a second time, with tracks, and make their films."""
        for group in self._split_into_groups(seeds):
            if not set(group) & set(seeds_to_film):
                continue
            for outcome, _, track in self.simulator.run_episodes(
                self.agent, family, group, filming=True
            ):
                if outcome.seed not in seeds_to_film:
                    continue
                if outcome == outcomes[outcome.seed]:
                    self._make_films_and_list_seeds_without_track([outcome], {outcome.seed: track})
                else:
                    bar.print_line(
                        f"no film of {family} {outcome.seed}: it ended differently when run again"
                    )

    def _make_films_and_list_seeds_without_track(
        self, ended: Sequence[Outcome], tracks: Mapping[int, Track]
    ) -> list[int]:
        """Make the missing films of those episodes that the options select.

        Args:
            ended: Outcomes of episodes.
            tracks: Seed → track, for some of the episodes.

        Returns:
            The seeds of selected episodes that have no track.
        """
        seeds_without_track = []
        for outcome in self._select_episodes_to_film(ended):
            name = outcome.film_name
            is_on_disk = self.options.out is not None and (self.options.out / name).is_file()
            if name in self._films or is_on_disk:
                continue
            if outcome.seed not in tracks:
                seeds_without_track.append(outcome.seed)
                continue
            frames = self.simulator.make_film_frames(outcome, tracks[outcome.seed])
            new_film = Film(outcome, film.encode_film(frames, CONTROL_RATE_HZ))
            self._films[name] = new_film
            if self.options.out:
                write_bytes(self.options.out / name, new_film.data)
        return seeds_without_track

    def _select_episodes_to_film(self, ended: Sequence[Outcome]) -> list[Outcome]:
        """Select the episodes that the options want to be filmed."""
        films = self.options.videos  # "failures", "all", or a number of successes and of failures
        successes = [outcome for outcome in ended if outcome.success]
        failures = [outcome for outcome in ended if not outcome.success]
        if isinstance(films, int):
            return successes[:films] + failures[:films]
        if films == "all":
            return list(ended)
        return failures
