"""Closed loop in LIBERO: a policy acts in its tasks, through the robot's own adapter.

As in openpi's and OpenVLA-OFT's scripts, an episode begins in an official state after ten steps in
which things come to rest, and ends when the task is fulfilled for the first time or at its suite's
limit of steps.
"""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spear import embodiments
from spear.chunks import check_replan_interval
from spear.embodiments.libero import CONTROLLER_STEPS_PER_ACTION
from spear.embodiments.observations import CheckedObservation
from spear.errors import check_known
from spear.evaluate import film
from spear.evaluate.agents import Agent
from spear.evaluate.libero import oracle
from spear.evaluate.libero.environment import REQUIREMENTS
from spear.evaluate.libero.process import (
    ACTIONS,
    FAST_RENDERING,
    LiberoMoment,
    LiberoProcess,
    make_black_pictures,
)
from spear.evaluate.libero.suites import (
    NUM_TASKS,
    PROTOCOLS,
    format_task_family,
    get_max_steps,
    parse_task,
    resolve_original_suite,
)
from spear.evaluate.options import LiberoOptions
from spear.evaluate.results import Outcome, Results
from spear.evaluate.runner import EndedEpisode, Film, HasEnded, run_evaluation
from spear.evaluate.stats import Estimate, estimate_mean_proportion
from spear.types import Array

ROBOT = "libero"
CONTROL = "pose_steps"
REACHED_DISTANCE_M = 0.06
"""An object counts as reached if the end-effector was nearer to it than this (our choice)."""
MIN_MOVED_M = 0.03
"""An object that no condition of the goal names counts as moved if it is farther than this from
where it was at the start (our choice)."""


def evaluate_libero(agent: Agent, options: LiberoOptions) -> tuple[Results, list[Film]]:
    """Measure success from the official states of each task.

    Seed n of a task is its official state n modulo their number, so that further seeds use the
    states again, with other noise for the policy.

    Returns:
        The results, and the films made now.

    Raises:
        SpearError: the folder has results of another policy or of other settings; a suite or
            protocol is unknown; or LIBERO's environment is missing.
    """
    check_known("protocol", PROTOCOLS, options.protocol)
    for suite in options.suites:
        resolve_original_suite(suite)
    settings: dict[str, Any] = {
        "simulator": list(REQUIREMENTS),
        "protocol": options.protocol,
        "actions": ACTIONS,
        "replan": options.replan_steps,
        "weights": agent.weights,
    }
    if options.fast_rendering:
        settings["rendering"] = FAST_RENDERING

    task_indices = options.tasks or tuple(range(NUM_TASKS))
    seeds = range(options.first_seed, options.first_seed + options.num_scenes)
    scenes = {}
    for suite in options.suites:
        for index in task_indices:
            scenes[format_task_family(suite, index)] = seeds
    with contextlib.closing(Libero(options)) as simulator:
        return run_evaluation(simulator, agent, scenes, settings, options)


@dataclass
class LiberoScene:
    """A running scene.

    task                    the task.
    seed                    the seed of the scene.
    process                 the simulator of the scene.
    first_moment            the state when the episode began.
    moment                  the state after the last executed action.
    pictures                of both cameras before the next inference, by view.
    track                   the pictures of each inference so far, for a film.
    reached                 whether the gripper has been at an object that the goal names.
    grasped                 whether the gripper has held such an object.
    has_moved_wrong_object  whether another object has moved.
    start_time_s            start of the episode, by `time.perf_counter`.
    """

    task: str
    seed: int
    process: LiberoProcess
    first_moment: LiberoMoment
    moment: LiberoMoment
    pictures: Mapping[str, Array]
    track: list[Mapping[str, Array]] = field(default_factory=list)
    reached: bool = False
    grasped: bool = False
    has_moved_wrong_object: bool = False
    start_time_s: float = field(default_factory=time.perf_counter)

    @property
    def steps(self) -> int:
        """Actions so far."""
        return self.moment.steps // CONTROLLER_STEPS_PER_ACTION

    def update_milestones(self) -> None:
        """Set `reached`, `grasped` and `has_moved_wrong_object` to True if so at this moment."""
        goal_names = set[str]()  # of objects and places
        for _, *names in self.process.goal:  # a condition is ["on", object, place], for example
            goal_names.update(names)
        for name, box in self.moment.objects.items():
            moved_m = np.linalg.norm(box.pose[:3] - self.first_moment.objects[name].pose[:3])
            if name not in goal_names:
                self.has_moved_wrong_object |= bool(moved_m > MIN_MOVED_M)
                continue
            distance_m = np.linalg.norm(box.pose[:3] - self.moment.pose[:3])
            self.reached |= bool(distance_m < REACHED_DISTANCE_M)
            self.grasped |= name in self.moment.gripped_objects

    def make_outcome(self) -> Outcome:
        return Outcome(
            family=self.task,
            seed=self.seed,
            instruction=self.process.instruction,
            success=self.moment.success,
            reached=self.reached,
            grasped=self.grasped,
            wrong_object_moved=self.has_moved_wrong_object,
            unreachable=0,  # robosuite's controller solves for torques and has no such verdict
            steps=self.steps,
        )


class OracleAgent(Agent):
    """The scripted expert, which sees the true state.

    Its success shows what adapter, controller and step limit allow.
    """

    name = "oracle"

    def choose_action_chunks(
        self, envs: Sequence[LiberoScene], observations: Sequence[Mapping[str, Any]]
    ) -> Sequence[Array]:
        return [oracle.choose_action(env.process.goal, env.moment)[None] for env in envs]


class Libero:
    """LIBERO's tasks as a `spear.evaluate.runner.Simulator`.

    A track is the pictures of both cameras at each inference.
    """

    has_cheap_tracks = False

    def __init__(self, options: LiberoOptions) -> None:
        self._options = options
        self._protocol = PROTOCOLS[options.protocol]
        self._num_processes = options.batch_size or os.cpu_count() or 1
        self.group_size = self._num_processes
        self._robot = embodiments.load(ROBOT)
        _, control = self._robot.select_control(CONTROL)
        self._convert = control.convert
        self._processes: list[LiberoProcess] = []
        self._task = ""  # the task of the processes

    def run_episodes(
        self, agent: Agent, family: str, seeds: Sequence[int], filming: bool
    ) -> Iterator[EndedEpisode[list[Mapping[str, Array]]]]:
        """Run all seeds through a few processes; one whose episode ends takes the next seed."""
        needs_pictures = agent.needs_images or filming
        waiting_seeds = list(reversed(seeds))
        free_processes = self._ensure_processes(family, min(self._num_processes, len(seeds)))
        scenes: list[LiberoScene] = []
        with ThreadPoolExecutor(self._num_processes) as threads:
            while waiting_seeds or scenes:
                # Begin new episodes in the processes that are free.
                starting = []
                while free_processes and waiting_seeds:
                    process = free_processes.pop()
                    seed = waiting_seeds.pop()
                    starting.append(
                        threads.submit(self._start, family, process, seed, needs_pictures)
                    )
                scenes += [start.result() for start in starting]

                # One inference for all scenes, then its actions in all of them at once.
                observations = [self._observe(scene) for scene in scenes]
                chunks = agent.choose_action_chunks(scenes, observations)
                moving = []
                for scene, chunk in zip(scenes, chunks, strict=True):
                    moving.append(threads.submit(self._execute, scene, chunk, needs_pictures))
                has_ended = [move.result() for move in moving]

                running = []
                for scene, is_over in zip(scenes, has_ended, strict=True):
                    if is_over:
                        seconds = time.perf_counter() - scene.start_time_s
                        yield EndedEpisode(scene.make_outcome(), seconds, scene.track)
                        free_processes.append(scene.process)
                    else:
                        running.append(scene)
                scenes = running

    def make_film_frames(
        self, outcome: Outcome, track: Sequence[Mapping[str, Array]]
    ) -> Iterable[Array]:
        frames = []
        for step, pictures in enumerate(track):
            is_last = step == len(track) - 1
            success = outcome.success if is_last else None
            frames.append(
                film.compose_frame(
                    pictures["external"], pictures["wrist"], outcome.instruction, success=success
                )
            )
        return frames

    def close(self) -> None:
        for process in self._processes:
            process.close()
        self._processes = []

    def _ensure_processes(self, task: str, count: int) -> list[LiberoProcess]:
        """Ensure that at least `count` processes of a task are open, and return `count` of them.

        Processes of another task are closed first.
        """
        if task != self._task:
            self.close()
            self._task = task
        suite, index = parse_task(task)
        num_missing = count - len(self._processes)
        with ThreadPoolExecutor(max(num_missing, 1)) as threads:
            new_processes = [
                threads.submit(
                    LiberoProcess, suite, index, self._protocol.seed, self._options.fast_rendering
                )
                for _ in range(num_missing)
            ]
            self._processes += [process.result() for process in new_processes]
        return self._processes[:count]

    def _start(
        self, task: str, process: LiberoProcess, seed: int, needs_pictures: bool
    ) -> LiberoScene:
        """Put a process in the official state of a seed, and return the scene that begins there."""
        state_index = seed % process.num_states
        # Other projects go through the states in their order, with one reset before each. That
        # number fixes where cabinet and stove stand, also in an evaluation that was continued.
        moment = process.reset(state_index, num_resets_since_seeding=state_index + 1)
        pictures = process.render() if needs_pictures else make_black_pictures()
        return LiberoScene(
            task,
            seed,
            process,
            first_moment=moment,
            moment=moment,
            pictures=pictures,
            track=[pictures],
        )

    def _observe(self, scene: LiberoScene) -> CheckedObservation:
        """Return what the policy sees of a scene now, through the robot's adapter."""
        observation = scene.moment.make_observation(scene.process.instruction, scene.pictures)
        return self._robot.read(observation)

    def _execute(self, scene: LiberoScene, chunk: Array, needs_pictures: bool) -> HasEnded:
        """Step one scene until the next inference is due. Returns True if its episode has ended."""
        check_replan_interval(self._options.replan_steps, len(chunk))
        suite, _ = parse_task(scene.task)
        max_steps = get_max_steps(suite, self._protocol)
        robot_observation: Mapping[str, Any] = {}  # this control reads nothing from it
        for action in chunk[: self._options.replan_steps]:
            # An action begins at the measured pose, also when it is not the first one of its chunk.
            state = np.append(scene.moment.pose, scene.moment.opening)
            rows = self._convert(action[None], state, robot_observation)
            scene.moment = scene.process.run(rows, max_steps)
            scene.update_milestones()
        if needs_pictures:
            scene.pictures = scene.process.render()
            scene.track.append(scene.pictures)
        return scene.moment.success or scene.moment.steps >= max_steps


def summarize_suites(results: Results) -> dict[str, Estimate]:
    """Return the success of each suite: the mean of its tasks, with a 95 % interval."""
    counts: dict[str, dict[str, tuple[int, int]]] = {}
    for outcome in results.outcomes:
        suite, _ = parse_task(outcome.family)
        tasks = counts.setdefault(suite, {})
        successes, total = tasks.get(outcome.family, (0, 0))
        tasks[outcome.family] = (successes + outcome.success, total + 1)
    return {
        suite: estimate_mean_proportion(list(tasks.values())) for suite, tasks in counts.items()
    }
