"""What evaluations in every simulator share: outcomes on disk as they come, what is missing is run, films."""

import contextlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from spear.errors import SpearError, need
from spear.evaluate import film as video
from spear.evaluate.agents import Agent
from spear.evaluate.options import EpisodeOptions, Films
from spear.evaluate.results import Journal, Outcome, Results, parse_shard
from spear.util.files import write_bytes
from spear.util.ledger import lock
from spear.util.progress import ProgressBar

Track = TypeVar("Track")


@dataclass(frozen=True)
class Film:
    """The film of one episode. data: the bytes of a file of MIME type `mime`."""

    outcome: Outcome
    data: bytes
    mime: str


class Simulator(Protocol[Track]):
    """Scenes of task families, each fixed by its seed, in which an agent acts.

    films_are_free  whether an episode's track costs next to nothing, to make and to keep. Otherwise tracks
                    are only asked for where every episode may need one; the few others are run again for
                    their film.
    """

    @property
    def films_are_free(self) -> bool: ...

    def run(
        self, agent: Agent, family: str, seeds: Sequence[int], filming: bool
    ) -> Iterator[tuple[Outcome, float, Track]]:
        """The outcome of each episode as it ends, the seconds that it ran (beside others), and its track:
        what a film is made of, empty unless `filming`."""

    def film(self, outcome: Outcome, track: Track) -> Film:
        """The film of an episode."""


def run_evaluation(
    simulator: Simulator[Track],
    agent: Agent,
    scenes: Mapping[str, Sequence[int]],
    settings: dict[str, Any],
    options: EpisodeOptions,
    quiet: bool = False,
) -> tuple[Results, list[Film]]:
    """Runs an evaluation, and gives its results and the films made now.

    scenes    family → the seeds of its scenes. Those that `options.out` holds are only filmed, where a film
              is wanted and missing.
    settings  whatever else an outcome depends on: only results with the same settings belong together.

    Raises SpearError for a folder with other results, and for a part that is empty or runs elsewhere.
    """
    index, of = parse_shard(options.shard)
    most = max(map(len, scenes.values()), default=0)
    if most < index:
        raise SpearError(f"--shard {index}/{of}: holds no scene: make at most {most} parts")
    films = _FilmMaker(simulator, options.films, options.out)
    journal = None
    outcomes: list[Outcome] = []
    with contextlib.ExitStack() as stack:
        if options.out:
            if not options.out.exists():
                stack.callback(_remove_empty, options.out)
            if not stack.enter_context(lock(options.out / f".episodes-{index}-of-{of}.lock")):
                raise SpearError(f"{options.out}: another process is running part {index}/{of}: wait for it")
            journal = Journal(options.out, agent.name, settings, (index, of))
        started = time.perf_counter()
        for family, everything in scenes.items():
            seeds = everything[index - 1 :: of]
            done = {s: journal.done[family, s] for s in seeds if journal and (family, s) in journal.done}
            todo = [s for s in seeds if s not in done]
            with ProgressBar(f"{agent.name}, {family}", len(seeds), "scenes", len(done), quiet) as bar:
                last = time.perf_counter()
                for outcome, seconds, track in simulator.run(agent, family, todo, films.filming):
                    done[outcome.seed] = outcome
                    if journal:
                        journal.add(outcome, seconds, time.perf_counter() - last)
                    last = time.perf_counter()
                    films.add(outcome, track)
                    bar.update(len(done), f"{sum(o.success for o in done.values())} succeeded")
                ended = [done[s] for s in seeds]
                outcomes += ended
                for outcome, _, track in simulator.run(agent, family, films.finish(ended), True):
                    if outcome == done[outcome.seed]:
                        films.make(outcome, track)
                    else:
                        bar.say(f"no film of {family} {outcome.seed}: it ended differently when run again")
    return Results(agent.name, settings, outcomes, time.perf_counter() - started), films.made


def _remove_empty(folder: Path) -> None:
    """Where nothing ran, nothing is left behind."""
    if not any(folder.glob("[!.]*")):
        shutil.rmtree(folder, ignore_errors=True)


class _FilmMaker(Generic[Track]):
    """Makes the films that are wanted. filming: whether an episode's first run gives its track."""

    def __init__(self, simulator: Simulator[Track], films: Films, out: Path | None) -> None:
        if films:
            need("av", "report", "a film")
        self._simulator, self._films, self._out = simulator, films, out
        self.filming = isinstance(films, str) or (films > 0 and simulator.films_are_free)
        self.made: list[Film] = []
        self._tracks: dict[int, Track] = {}

    def add(self, outcome: Outcome, track: Track) -> None:
        """An episode that has just ended."""
        if isinstance(self._films, int):
            if self.filming:
                self._tracks[outcome.seed] = track
        elif self._missing([outcome]):  # at once, as a track can be large: in SIMPLER every picture
            self.make(outcome, track)

    def finish(self, ended: Sequence[Outcome]) -> list[int]:
        """When a family's episodes have ended: the seeds of those that must run again for their film."""
        tracks, self._tracks = self._tracks, {}
        again = []
        for outcome in self._missing(ended):
            if outcome.seed in tracks:
                self.make(outcome, tracks[outcome.seed])
            else:
                again.append(outcome.seed)
        return again

    def make(self, outcome: Outcome, track: Track) -> None:
        """One film, on disk when this returns."""
        film = self._simulator.film(outcome, track)
        self.made.append(film)
        if self._out:
            write_bytes(self._out / f"{outcome.film_name}.{film.mime.removeprefix('video/')}", film.data)

    def _missing(self, ended: Sequence[Outcome]) -> list[Outcome]:
        """Those to film of a family's episodes of which there is no film yet."""
        if isinstance(self._films, int):
            count = self._films
            wins, failures = ([o for o in ended if o.success is won] for won in (True, False))
            wanted = wins[:count] + failures[:count]
        else:
            wanted = [o for o in ended if self._films == "all" or not o.success]
        made = {film.outcome.film_name for film in self.made}
        new = [o for o in wanted if o.film_name not in made]
        return [o for o in new if not (self._out and video.film_file(self._out, o.film_name))]
