"""What evaluations in every simulator share: outcomes on disk as they come, what is missing is run, films."""

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

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

    films_are_free  whether an episode's track costs next to nothing. Otherwise tracks are only asked for
                    where every episode may need one; the few others are run again for their film.
    """

    films_are_free: bool

    def run(
        self, agent: Agent, family: str, seeds: Sequence[int], filming: bool
    ) -> Iterator[tuple[Outcome, float, Track]]:
        """The outcome of each episode as it ends, the seconds that it ran (beside others), and its track:
        what a film is made of, which may be empty unless `filming`."""

    def film(self, outcome: Outcome, track: Track) -> Iterable[Array]:
        """The pictures of an episode's film, one a step."""


def run_evaluation(
    simulator: Simulator[Track],
    agent: Agent,
    scenes: ScenesByFamily,
    settings: dict[str, Any],
    options: EpisodeOptions,
) -> tuple[Results, list[Film]]:
    """Runs an evaluation, and gives its results and the films made now.

    scenes    those that `options.out` holds are only filmed, where a film is wanted and missing.
    settings  whatever else an outcome depends on: only results with the same settings belong together.

    Raises SpearError for a folder with other results, and for a part that is empty or runs elsewhere.
    """
    index, of = parse_shard(options.shard)
    most = max(map(len, scenes.values()), default=0)
    if most < index:
        raise SpearError(
            f"--shard {index}/{of}: holds no scene: make at most {format_count(most, 'parts')}"
        )
    part = {family: seeds[index - 1 :: of] for family, seeds in scenes.items()}
    if options.films:
        video.import_encoder()
    films: dict[str, Film] = {}

    def make_films(ended: Sequence[Outcome], tracks: Mapping[int, Track]) -> list[int]:
        """Films that are wanted of these episodes and not there yet; the seeds of those without a track."""
        if isinstance(options.films, int):
            wins, failures = ([o for o in ended if o.success is won] for won in (True, False))
            wanted = wins[: options.films] + failures[: options.films]
        else:
            wanted = [o for o in ended if options.films == "all" or not o.success]
        again = []
        for outcome in wanted:
            name = outcome.film_name
            if name in films or (options.out and (options.out / name).is_file()):
                continue
            if outcome.seed not in tracks:
                again.append(outcome.seed)
                continue
            pictures = simulator.film(outcome, tracks[outcome.seed])
            films[name] = film = Film(outcome, video.encode_film(pictures, CONTROL_RATE_HZ))
            if options.out:
                write_bytes(options.out / name, film.data)
        return again

    filming = isinstance(options.films, str) or (options.films > 0 and simulator.films_are_free)
    journal = None
    outcomes: list[Outcome] = []
    with contextlib.ExitStack() as stack:
        if options.out:
            check_holds_no_input(options.out, "evaluate")
            doing, name = f"running part {index}/{of} in", f".episodes-{index}-of-{of}.lock"
            stack.enter_context(acquire_run_lock(options.out, doing, name=name))
            journal = Journal(options.out, agent.name, settings, (index, of), part)
        started = time.perf_counter()
        for family, seeds in part.items():
            done = {
                s: journal.done[family, s] for s in seeds if journal and (family, s) in journal.done
            }
            todo = [s for s in seeds if s not in done]
            with ProgressBar(f"{agent.name}, {family}", len(seeds), "scenes", len(done)) as bar:
                last, tracks = time.perf_counter(), dict[int, Track]()
                for outcome, seconds, track in simulator.run(agent, family, todo, filming):
                    done[outcome.seed] = outcome
                    if journal:
                        journal.add(outcome, seconds, time.perf_counter() - last)
                    last = time.perf_counter()
                    if filming:
                        tracks[outcome.seed] = track
                    if isinstance(
                        options.films, str
                    ):  # at once: in SIMPLER a track is every picture
                        make_films([outcome], tracks)
                        tracks.clear()
                    bar.update(len(done), f"{sum(o.success for o in done.values())} succeeded")
                ended = [done[s] for s in seeds]
                outcomes += ended
                again = make_films(ended, tracks)
                for outcome, _, track in simulator.run(agent, family, again, True):
                    if outcome == done[outcome.seed]:
                        make_films([outcome], {outcome.seed: track})
                    else:
                        bar.print_line(
                            f"no film of {family} {outcome.seed}: it ended differently when run again"
                        )
    return Results(agent.name, settings, outcomes, time.perf_counter() - started), list(
        films.values()
    )
