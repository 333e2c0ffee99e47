"""What evaluations in every simulator share: outcomes on disk as they come, only what is missing is run, films."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from spear.evaluate import video
from spear.evaluate.actors import Actor
from spear.evaluate.journal import WHOLE, Journal, Shard
from spear.evaluate.results import Outcome, Results

Track = TypeVar("Track")
Films = int | Literal["failures"]
"""Films to make per family: of so many successes and as many failures, lowest seeds first; or of all failures."""


@dataclass(frozen=True)
class Film:
    """The film of one episode. data: the bytes of a file of MIME type `mime`."""

    outcome: Outcome
    data: bytes
    mime: str

    def save(self, folder: Path) -> None:
        """Writes the film under its episode's name, whole or not at all."""
        path = folder / f"{self.outcome.film_name}.{self.mime.removeprefix('video/')}"
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(self.data)
        temporary.replace(path)


class Simulator(Protocol[Track]):
    """Scenes of task families, each fixed by its seed, in which an actor acts.

    films_are_free  whether an episode's track costs next to nothing. Otherwise tracks are only asked for where every
                    episode may need one; the few others are run again for their film.
    """

    @property
    def films_are_free(self) -> bool: ...

    def run(
        self, actor: Actor, family: str, seeds: Sequence[int], filming: bool
    ) -> Iterator[tuple[Outcome, Track]]:
        """The outcome of each episode as it ends, with its track: what a film is made of, empty unless `filming`."""
        ...

    def film(self, outcome: Outcome, track: Track) -> Film:
        """The film of an episode."""
        ...


def conduct(
    simulator: Simulator[Track],
    actor: Actor,
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
    out       folder that outcomes and films are written to as they come. Episodes that it already holds are not
              run again (see `spear.evaluate.journal`), only filmed where a film is wanted and missing.
    shard     run only this part of the scenes.

    Raises SpearError for a folder with results of another policy or of other settings.
    """
    journal = Journal(out, actor.name, settings, shard) if out else None
    started = last = time.perf_counter()
    filming = films == "failures" or (bool(films) and simulator.films_are_free)
    outcomes: list[Outcome] = []
    kept: list[Film] = []
    with _progress(quiet) as bar:
        for family, everything in scenes.items():
            seeds = everything[shard.index - 1 :: shard.of]
            row = bar.add_task(family, total=len(seeds), info="")
            begun = time.perf_counter()
            done = {s: journal.done[family, s] for s in seeds if journal and (family, s) in journal.done}
            tracks: dict[int, Track] = {}
            todo = [s for s in seeds if s not in done]
            for count, (outcome, track) in enumerate(simulator.run(actor, family, todo, filming), 1):
                done[outcome.seed] = outcome
                if filming:
                    tracks[outcome.seed] = track
                if journal:
                    now = time.perf_counter()
                    journal.add(outcome, now - last)
                    last = now
                rate = count / (time.perf_counter() - begun)
                wins = sum(o.success for o in done.values())
                bar.update(row, completed=len(done), info=f"{wins} succeeded, {rate:.1f} scenes/s")
            ended = [done[s] for s in seeds]
            outcomes += ended
            wanted = [o for o in _to_film(ended, films) if not (out and video.film_file(out, o.film_name))]
            again = [o.seed for o in wanted if o.seed not in tracks]
            for outcome, track in simulator.run(actor, family, again, True):
                if outcome == done[outcome.seed]:
                    tracks[outcome.seed] = track
            for outcome in wanted:
                if outcome.seed in tracks:
                    kept.append(simulator.film(outcome, tracks[outcome.seed]))
                    if out:
                        kept[-1].save(out)
    return Results(actor.name, settings, outcomes, time.perf_counter() - started), kept


def _to_film(ended: Sequence[Outcome], films: Films) -> list[Outcome]:
    """The episodes of a family that are to be filmed."""
    failures = [o for o in ended if not o.success]
    if films == "failures":
        return failures
    return [o for o in ended if o.success][:films] + failures[:films]


def _progress(quiet: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[info]}"),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        disable=quiet,
    )
