"""One task of SIMPLER in a process of its own.

ManiSkill holds one task per process and simulates on one core, and a driver that fails takes its process with
it: so each running scene has a process, and they run side by side.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from spear.errors import SpearError
from spear.evaluate.simpler.tasks import Moment
from spear.types import Array


class SimplerProcess:
    """A `spear.evaluate.simpler.world.SimplerWorld` elsewhere. Calls block; use one thread per process to run
    several."""

    def __init__(self, task: str, assets: Path | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, task, assets), daemon=True)
        self._process.start()
        theirs.close()

    def reset(self, start: int, image: bool) -> Moment:
        """As `SimplerWorld.reset`. Raises its `SpearError`, and one where the process has ended."""
        return self._ask("reset", start, image)

    def run(self, rows: Array, image: bool, filming: bool = False) -> Moment:
        """As `SimplerWorld.run`."""
        return self._ask("run", rows, image, filming)

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ask(self, call: str, *arguments: Any) -> Moment:
        try:
            self._pipe.send((call, arguments))
            answer = self._pipe.recv()
        except (EOFError, OSError):
            from spear.evaluate.simpler.world import NoRenderer, no_renderer

            self._process.join(5)
            reason = f"its process ended with code {self._process.exitcode}"
            raise NoRenderer(no_renderer(reason)) from None
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, Moment)
        return answer


def _serve(pipe: Connection, task: str, assets: Path | None) -> None:
    """Answers calls until the pipe closes. The world is made at the first, so that processes start side by
    side."""
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch: its threads only stand in each other's way here
    os.environ.setdefault("LP_NUM_THREADS", "1")  # of the software renderer
    world: Any = None
    while True:
        try:
            call, arguments = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            if world is None:
                from spear.evaluate.simpler.world import SimplerWorld

                world = SimplerWorld(task, assets)
            answer: Any = getattr(world, call)(*arguments)
        except KeyboardInterrupt:
            return
        except SpearError as error:
            answer = type(error)(*error.args)
        except Exception as error:
            answer = SpearError(f"SIMPLER: {task}: {type(error).__name__}: {error}")
        pipe.send(answer)
