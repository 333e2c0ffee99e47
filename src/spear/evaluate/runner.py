"""What evaluations in every simulator share: outcomes on disk as they come, only what is missing is run,
films."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from spear.errors import SpearError
from spear.evaluate import film as video
from spear.evaluate.agents import Agent
from spear.evaluate.journal import WHOLE, Journal, Shard
from spear.evaluate.results import Outcome, Results
from spear.util.files import write_bytes
from spear.util.progress import ProgressBar

Track = TypeVar("Track")
Films = int | Literal["failures", "all"]
"""Films to make per family: of so many successes and as many failures, lowest seeds first; of all failures;
or of all episodes."""


@dataclass(frozen=True)
class Film:
    """The film of one episode. data: the bytes of a file of MIME type `mime`."""

    outcome: Outcome
    data: bytes
    mime: str

    def save(self, folder: Path) -> None:
        """Writes the film under its episode's name, whole or not at all."""
        write_bytes(folder / f"{self.outcome.film_name}.{self.mime.removeprefix('video/')}", self.data)


class Simulator(Protocol[Track]):
    """Scenes of task families, each fixed by its seed, in which an agent acts.

    films_are_free  whether an episode's track costs next to nothing. Otherwise tracks are only asked for
                    where every episode may need one; the few others are run again for their film.
    """

    @property
    def films_are_free(self) -> bool: ...

    def run(
        self, agent: Agent, family: str, seeds: Sequence[int], filming: bool
    ) -> Iterator[tuple[Outcome, Track]]:
        """The outcome of each episode as it ends, with its track: what a film is made of, empty unless
        `filming`."""
        ...

    def film(self, outcome: Outcome, track: Track) -> Film:
        """The film of an episode."""
        ...


def run_evaluation(
    simulator: Simulator[Track],
    agent: Agent,
    scenes: Mapping[str, Sequence[int]],
    settings: dict[str, Any],
    films: Films = 0,
    quiet: bool = False,
    out: Path | None = None,
    shard: Shard = WHOLE,
) -> tuple[Results, list[Film]]:
    """Runs an evaluation.

    scenes    family → the seeds of its scenes.
    settings  whatever else an outcome depends on: only results with the same settings belong together.
    out       folder that outcomes and films are written to as they come. Episodes that it already holds are
              not run again (see `spear.evaluate.journal`), only filmed where a film is wanted and missing.
    shard     run only this part of the scenes.

    Raises SpearError for a folder with results of another policy or of other settings, and for a part without
    scenes.
    """
    most = max(map(len, scenes.values()), default=0)
    if most < shard.index:
        raise SpearError(
            f"--shard {shard.index}/{shard.of}: holds no scene, as there are only {most}: give more --scenes, or make "
            f"at most {most} parts"
        )
    studio = _Studio(simulator, films, out)
    journal = Journal(out, agent.name, settings, shard) if out else None
    started = last = time.perf_counter()
    outcomes: list[Outcome] = []
    for family, everything in scenes.items():
        seeds = everything[shard.index - 1 :: shard.of]
        done = {s: journal.done[family, s] for s in seeds if journal and (family, s) in journal.done}
        todo = [s for s in seeds if s not in done]
        with ProgressBar(f"{agent.name}, {family}", len(seeds), "scenes", len(done), quiet) as bar:
            for outcome, track in simulator.run(agent, family, todo, studio.filming):
                done[outcome.seed] = outcome
                studio.add(outcome, track, [done[s] for s in seeds if s in done])
                if journal:
                    now = time.perf_counter()
                    journal.add(outcome, now - last)
                    last = now
                bar.update(len(done), f"{sum(o.success for o in done.values())} succeeded")
            ended = [done[s] for s in seeds]
            outcomes += ended
            again = studio.finish(ended)
            for outcome, track in simulator.run(agent, family, again, True):
                if outcome == done[outcome.seed]:
                    studio.make(outcome, track)
                else:
                    bar.say(f"no film of {family} {outcome.seed}: it ended differently when run again")
    return Results(agent.name, settings, outcomes, time.perf_counter() - started), studio.made


class _Studio(Generic[Track]):
    """Makes the films that are wanted. Tracks can be large (every picture of an episode), so that each is
    filmed as its episode ends, or kept only as long as it may be wanted.

    filming  whether the first run of an episode is to give its track. made: the films so far.
    """

    def __init__(self, simulator: Simulator[Track], films: Films, out: Path | None) -> None:
        if films:
            video.check()
        self._simulator, self._films, self._out = simulator, films, out
        self.filming = isinstance(films, str) or (films > 0 and simulator.films_are_free)
        self.made: list[Film] = []
        self._tracks: dict[int, Track] = {}

    def add(self, outcome: Outcome, track: Track, ended: Sequence[Outcome]) -> None:
        """An episode that has just ended; ended: those of its family so far, by seed."""
        if not self.filming:
            return
        if isinstance(self._films, str):
            if self._missing([outcome]):
                self.make(outcome, track)
            return
        self._tracks[outcome.seed] = track
        wanted = {o.seed for o in _wanted(ended, self._films)}
        self._tracks = {seed: kept for seed, kept in self._tracks.items() if seed in wanted}

    def finish(self, ended: Sequence[Outcome]) -> list[int]:
        """All episodes of a family have ended: the seeds of those that have to be run again for their
        film."""
        tracks, self._tracks = self._tracks, {}
        made = {(f.outcome.family, f.outcome.seed) for f in self.made}
        missing = [o for o in self._missing(ended) if (o.family, o.seed) not in made]
        for outcome in missing:
            if outcome.seed in tracks:
                self.make(outcome, tracks[outcome.seed])
        return [o.seed for o in missing if o.seed not in tracks]

    def make(self, outcome: Outcome, track: Track) -> None:
        """One film, on disk when this returns."""
        self.made.append(self._simulator.film(outcome, track))
        if self._out:
            self.made[-1].save(self._out)

    def _missing(self, ended: Sequence[Outcome]) -> list[Outcome]:
        wanted = _wanted(ended, self._films)
        return [o for o in wanted if not (self._out and video.film_file(self._out, o.film_name))]


def _wanted(ended: Sequence[Outcome], films: Films) -> list[Outcome]:
    """The episodes of a family that are to be filmed."""
    if films == "all":
        return list(ended)
    failures = [o for o in ended if not o.success]
    if films == "failures":
        return failures
    return [o for o in ended if o.success][:films] + failures[:films]
