"""Closed loop in SIMPLER: a policy acts in ManiSkill's WidowX tasks, through the robot's own adapter.

As in SIMPLER's own scripts, an episode runs to its time limit and what counts is whether the task is
fulfilled then, not whether it was for a moment.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np

from spear import embodiments
from spear.chunks import check_replan_interval
from spear.errors import check_known
from spear.evaluate import film as video
from spear.evaluate.agents import Agent
from spear.evaluate.options import SimplerOptions
from spear.evaluate.results import MILESTONES, Outcome, Results
from spear.evaluate.runner import Film, run_evaluation
from spear.evaluate.simpler import oracle
from spear.evaluate.simpler.tasks import TASKS, Moment
from spear.evaluate.simpler.world import SimplerProcess, check_assets, hash_assets
from spear.sim.scene import held_out_seeds
from spear.types import Array

ROBOT = "simpler_widowx"
UNSEEN = {"observation/image": np.zeros((480, 640, 3), np.uint8)}


def evaluate_simpler(agent: Agent, options: SimplerOptions) -> tuple[Results, list[Film]]:
    """Success on the seeds first_seed … first_seed + scenes - 1 of each task; the films made now.

    A task has few starts: further seeds show them again, with other noise for the policy. References, which
    have none, see each start at most once. With `options.off_grid` every seed has a start of its own.

    Raises SpearError for a folder with results of another policy or of other settings, for an unknown task,
    and where ManiSkill, its assets or a renderer are missing.
    """
    tasks = options.tasks or tuple(TASKS)
    check_known("task", TASKS, *tasks)
    if options.off_grid:
        held_out_seeds(options.first_seed, options.scenes)
    settings = {
        "simulator": f"ManiSkill {version('mani_skill')}",
        "assets": hash_assets(check_assets(options.assets)),
        "commands begin at": "the last that was reached",
        "replan": options.replan,
        "weights": agent.weights,
        **({"starts": "off the grid"} if options.off_grid else {}),
    }
    first, repeats = options.first_seed, agent.needs_images or options.off_grid
    counts = {t: options.scenes if repeats else min(options.scenes, TASKS[t].starts) for t in tasks}
    scenes = {t: range(first, first + count) for t, count in counts.items()}
    with contextlib.closing(Simpler(options)) as simulator:
        return run_evaluation(simulator, agent, scenes, settings, options)


@dataclass
class SimplerScene:
    """A running scene. moment: what is known since the last look; pictures: of each step so far, for a film;
    achieved: the step since which the task has been fulfilled, None while it is not."""

    task: str
    seed: int
    moment: Moment
    process: SimplerProcess
    pictures: list[Array]
    achieved: int | None = None
    started: float = field(default_factory=time.perf_counter)

    @property
    def steps(self) -> int:
        return self.moment.steps


class OracleAgent(Agent):
    """The scripted reference, which sees the true state: what adapter, controller and time limit allow."""

    name = "oracle"

    def act(
        self, envs: Sequence[SimplerScene], observations: Sequence[Mapping[str, Any]]
    ) -> Sequence[Array]:
        return [oracle.choose_action(env.task, env.moment.truth)[None] for env in envs]


class Simpler:
    """The tasks as a `spear.evaluate.runner.Simulator`. A track is the camera's picture at each step."""

    films_are_free = False

    def __init__(self, options: SimplerOptions) -> None:
        self._options = options
        self._batch = options.batch or os.cpu_count() or 1
        self._robot = embodiments.load(ROBOT)
        self._convert = self._robot.select_control(None)[1].convert
        self._processes: list[SimplerProcess] = []
        self._task = ""

    def run(
        self, agent: Agent, family: str, seeds: Sequence[int], filming: bool
    ) -> Iterator[tuple[Outcome, float, list[Array]]]:
        """All seeds through a few processes."""
        free = self.open(family, min(self._batch, len(seeds)))
        image = agent.needs_images or filming
        waiting, scenes = list(seeds)[::-1], list[SimplerScene]()
        with ThreadPoolExecutor(self._batch) as threads:
            while waiting or scenes:
                new = [(free.pop(), waiting.pop()) for _ in range(min(len(free), len(waiting)))]
                scenes += threads.map(
                    lambda pair: self._start(family, pair[0], pair[1], image), new
                )
                # The robot's adapter wants a picture, also where nobody looked through the camera.
                observations = [
                    self._robot.read({**UNSEEN, **s.moment.observation}) for s in scenes
                ]
                chunks = agent.act(scenes, observations)
                todo = partial(self._execute, image=image, filming=filming)
                ended = list(threads.map(todo, scenes, chunks, observations))
                for scene, over in zip(scenes, ended, strict=True):
                    if over:
                        yield _outcome(scene), time.perf_counter() - scene.started, scene.pictures
                        free.append(scene.process)
                scenes = [s for s, over in zip(scenes, ended, strict=True) if not over]

    def film(self, outcome: Outcome, track: Sequence[Array]) -> list[Array]:
        ended = [*[None] * (len(track) - 1), outcome.success]
        return [
            video.compose_frame(p, None, outcome.instruction, e)
            for p, e in zip(track, ended, strict=True)
        ]

    def close(self) -> None:
        for process in self._processes:
            process.close()
        self._processes = []

    def open(self, task: str, count: int) -> list[SimplerProcess]:
        """Processes of a task; those of another one end."""
        if task != self._task:
            self.close()
            self._task = task
        while len(self._processes) < count:
            self._processes.append(SimplerProcess(task, self._options.assets))
        return self._processes[:count]

    def _start(self, task: str, process: SimplerProcess, seed: int, image: bool) -> SimplerScene:
        other = self._options.off_grid
        moment = process.reset(seed if other else seed % TASKS[task].starts, image, other)
        seen = [moment.observation["observation/image"]] if image else []
        return SimplerScene(task, seed, moment, process, seen)

    def _execute(
        self,
        scene: SimplerScene,
        chunk: Array,
        observation: Mapping[str, Any],
        image: bool,
        filming: bool,
    ) -> bool:
        """Steps one scene until it is time to look again; True when its episode has ended."""
        check_replan_interval(self._options.replan, len(chunk))
        actions = chunk[: min(self._options.replan, TASKS[scene.task].steps - scene.steps)]
        rows = self._convert(actions, observation["observation/state"], scene.moment.observation)
        scene.moment = scene.process.run(rows, image, filming)
        scene.pictures = scene.pictures + scene.moment.pictures if filming else []
        scene.achieved = (scene.achieved or scene.steps) if scene.moment.success else None
        return scene.steps >= TASKS[scene.task].steps


def _outcome(scene: SimplerScene) -> Outcome:
    moment = scene.moment
    seen = {name: getattr(moment, name) for name in (*MILESTONES, "unreachable")}
    where = scene.task, scene.seed, moment.observation["prompt"]
    return Outcome(*where, **seen, steps=scene.achieved or moment.steps)
