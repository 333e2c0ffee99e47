"""Closed-loop evaluation in SIMPLER's WidowX tasks, through the robot's own adapter.

Every episode runs to its time limit, as in SIMPLER's own scripts. It is successful if the task is
fulfilled at the end, not if it was fulfilled for a moment.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np

from spear import embodiments
from spear.chunks import check_replan_interval, count_latency_steps
from spear.embodiments.observations import IMAGE_KEY
from spear.evaluate import film
from spear.evaluate.agents import IDLE_ACTION, Agent
from spear.evaluate.noise import NOISE_LEVELS, degrade_images_of_observation
from spear.evaluate.options import SimplerOptions
from spear.evaluate.results import Outcome, Results
from spear.evaluate.runner import EndedEpisode, Film, HasEnded, run_evaluation
from spear.evaluate.simpler import oracle
from spear.evaluate.simpler.shifts import SceneShift, parse_simpler_shift, select_shiftable_tasks
from spear.evaluate.simpler.tasks import TASKS, Moment
from spear.evaluate.simpler.world import SimplerProcess, hash_assets, resolve_assets_folder
from spear.sim.scene import list_held_out_seeds
from spear.types import Array
from spear.util.images import fit_image

ROBOT = "simpler_widowx"  # name of the embodiment
GRIPPER_INDEX = 7  # of the gripper's opening in an action
NO_IMAGE = {IMAGE_KEY: np.zeros((480, 640, 3), np.uint8)}
"""A black image, because the robot's adapter needs an image even if none was rendered."""


def evaluate_simpler(agent: Agent, options: SimplerOptions) -> tuple[Results, list[Film]]:
    """Measure success on the seeds first_seed … first_seed + num_scenes - 1 of each task.

    A task has few official starts. More seeds than starts use the starts again, with other noise
    for the policy. Baselines have no noise, so they use each start at most once. With
    `options.off_grid`, every seed has its own start.

    Args:
        agent: Who acts.
        options: Which tasks and starts, how chunks are executed, and where the results are written.

    Returns:
        The results, and the films that this call made.

    Raises:
        SpearError: The folder has results of another policy or of other settings; a task or shift
            is unknown, or not possible; or ManiSkill, its assets or a renderer are missing.
    """
    tasks = select_shiftable_tasks(options.tasks, options.shift)
    if options.off_grid:
        list_held_out_seeds(options.first_seed, options.num_scenes)  # raises if training uses them
    assets = resolve_assets_folder(options.assets)  # raises without ManiSkill, too

    settings: dict[str, Any] = {
        "simulator": f"ManiSkill {version('mani_skill')}",
        "assets": hash_assets(assets),
        "commands begin at": "the last that was reached",
        "replan": options.replan_steps,
        "weights": agent.weights,
    }
    if options.off_grid:
        settings["starts"] = "off the grid"
    if options.shift is not None:
        settings["shift"] = str(parse_simpler_shift(options.shift))

    can_repeat_starts = agent.needs_images or options.off_grid
    scenes = {}
    for task in tasks:
        num_scenes = options.num_scenes
        if not can_repeat_starts:
            num_scenes = min(num_scenes, TASKS[task].num_starts)
        scenes[task] = range(options.first_seed, options.first_seed + num_scenes)
    with contextlib.closing(Simpler(options)) as simulator:
        return run_evaluation(simulator, agent, scenes, settings, options)


@dataclass
class SimplerScene:
    """A running scene.

    task             the task.
    seed             the seed of the scene.
    moment           the state after the last executed step.
    process          the simulator of the scene.
    pictures         the camera's image at each step so far, if a film may be made.
    gripper          the gripper's last commanded opening, 0 to 1.
    fulfilled_since  the step since which the task has been fulfilled; None while it is not.
    start_time_s     start of the episode, by `time.perf_counter`.
    """

    task: str
    seed: int
    moment: Moment
    process: SimplerProcess
    pictures: list[Array]
    gripper: float = 1.0
    fulfilled_since: int | None = None
    start_time_s: float = field(default_factory=time.perf_counter)

    @property
    def steps(self) -> int:
        """The number of control steps so far."""
        return self.moment.steps


class OracleAgent(Agent):
    """The scripted expert, which sees the true state.

    Its success shows what adapter, controller and time limit allow.
    """

    name = "oracle"

    def choose_action_chunks(
        self, envs: Sequence[SimplerScene], observations: Sequence[Mapping[str, Any]]
    ) -> Sequence[Array]:
        return [oracle.choose_action(env.task, env.moment.truth)[None] for env in envs]


class Simpler:
    """SIMPLER's tasks as a `spear.evaluate.runner.Simulator`.

    An episode's track, from which its film is made, is the camera's image at each step.
    """

    has_cheap_tracks = False

    def __init__(self, options: SimplerOptions) -> None:
        self._options = options
        self._num_processes = options.batch_size or os.cpu_count() or 1
        self.group_size = self._num_processes
        self._robot = embodiments.load(ROBOT)
        _, control = self._robot.select_control(None)  # None selects the robot's default control
        self._convert = control.convert
        self._shift = None if options.shift is None else parse_simpler_shift(options.shift)
        self._noise = None
        if self._shift is not None and self._shift.axis == "noise":
            self._noise = NOISE_LEVELS[self._shift.level]
        self._latency_steps = count_latency_steps(self._noise.latency_ms if self._noise else 0)
        self._processes: list[SimplerProcess] = []
        self._task = ""

    def run_episodes(
        self, agent: Agent, family: str, seeds: Sequence[int], filming: bool
    ) -> Iterator[EndedEpisode[list[Array]]]:
        """Run one episode per seed in a few processes (see `Simulator.run_episodes`).

        A process whose episode has ended takes the next seed.
        """
        free_processes = self.ensure_processes(family, min(self._num_processes, len(seeds)))
        needs_image = agent.needs_images or filming
        waiting_seeds = list(reversed(seeds))
        scenes: list[SimplerScene] = []
        with ThreadPoolExecutor(self._num_processes) as threads:

            def start(process: SimplerProcess, seed: int) -> SimplerScene:
                return self._start(family, process, seed, needs_image)

            def execute(
                scene: SimplerScene, chunk: Array, observation: Mapping[str, Any]
            ) -> HasEnded:
                return self._execute(scene, chunk, observation, needs_image, filming)

            while waiting_seeds or scenes:
                # Start episodes in all free processes.
                num_new = min(len(free_processes), len(waiting_seeds))
                new_processes = [free_processes.pop() for _ in range(num_new)]
                new_seeds = [waiting_seeds.pop() for _ in range(num_new)]
                scenes += threads.map(start, new_processes, new_seeds)

                # One inference for all running scenes.
                observations = [self._observe(agent, scene) for scene in scenes]
                chunks = agent.choose_action_chunks(scenes, observations)

                # Execute the chunks. The processes of ended episodes become free.
                are_over = list(threads.map(execute, scenes, chunks, observations))
                running = []
                for scene, is_over in zip(scenes, are_over, strict=True):
                    if is_over:
                        seconds = time.perf_counter() - scene.start_time_s
                        yield EndedEpisode(_make_outcome(scene), seconds, scene.pictures)
                        free_processes.append(scene.process)
                    else:
                        running.append(scene)
                scenes = running

    def make_film_frames(self, outcome: Outcome, track: Sequence[Array]) -> list[Array]:
        """Compose the frames of an episode's film from its images."""
        frames = []
        for step, picture in enumerate(track):
            is_last = step == len(track) - 1
            success = outcome.success if is_last else None
            frames.append(film.compose_frame(picture, None, outcome.instruction, success=success))
        return frames

    def close(self) -> None:
        """End all processes."""
        for process in self._processes:
            process.close()
        self._processes = []

    def ensure_processes(self, task: str, count: int) -> list[SimplerProcess]:
        """Ensure that `count` processes of a task run, and return them.

        Processes of another task end first.
        """
        if task != self._task:
            self.close()
            self._task = task
        while len(self._processes) < count:
            self._processes.append(SimplerProcess(task, self._options.assets))
        return self._processes[:count]

    def _start(
        self, task: str, process: SimplerProcess, seed: int, needs_image: bool
    ) -> SimplerScene:
        """Start the episode of one seed in a process.

        Off the grid (`sample_off_grid_start`), the seed draws the start. Otherwise the seeds count
        through the task's official starts, again and again.
        """
        is_off_grid = self._options.off_grid
        start = seed if is_off_grid else seed % TASKS[task].num_starts
        scene_shift = None if self._shift is None else SceneShift(self._shift, seed)
        moment = process.reset(start, needs_image, is_off_grid, scene_shift)
        pictures = [moment.observation[IMAGE_KEY]] if needs_image else []
        return SimplerScene(task, seed, moment, process, pictures)

    def _observe(self, agent: Agent, scene: SimplerScene) -> dict[str, Any]:
        """Observe a scene as the agent sees it: with degraded images if the shift is noise."""
        observation = self._robot.read({**NO_IMAGE, **scene.moment.observation})
        if self._noise is None or not agent.needs_images:
            return observation
        # As in the embedded simulator, images are degraded at the size at which the policy sees
        # them. At the camera's own, larger size the same blur and noise would hardly be seen.
        width, height = agent.image_sizes["external"]
        image = fit_image(observation[IMAGE_KEY], height, width, has_bars=False)
        resized = {**observation, IMAGE_KEY: image}
        return degrade_images_of_observation(resized, self._noise, scene.seed, scene.steps)

    def _execute(
        self,
        scene: SimplerScene,
        chunk: Array,
        observation: Mapping[str, Any],
        needs_image: bool,
        filming: bool,
    ) -> HasEnded:
        """Step one scene until the next inference, or until the episode ends.

        If the shift is noise, the chunk arrives late, and the robot stands still until then.

        Args:
            scene: The scene.
            chunk: [H, 8] the predicted actions.
            observation: The observation from which they were predicted.
            needs_image: Whether the next observation should have an image.
            filming: Whether the images of all steps are kept for a film.

        Returns:
            Whether the episode has ended.
        """
        check_replan_interval(self._options.replan_steps, len(chunk))
        max_steps = TASKS[scene.task].max_steps
        waiting = np.tile(IDLE_ACTION, (self._latency_steps, 1))
        waiting[:, GRIPPER_INDEX] = scene.gripper
        actions = np.concatenate([waiting, chunk[: self._options.replan_steps]])
        actions = actions[: max_steps - scene.steps]
        scene.gripper = float(actions[-1, GRIPPER_INDEX])
        state = observation["observation/state"]
        rows = self._convert(actions, state, scene.moment.observation)
        scene.moment = scene.process.run(rows, image=needs_image, filming=filming)
        if filming:
            scene.pictures = scene.pictures + scene.moment.pictures
        else:
            scene.pictures = []
        if not scene.moment.success:
            scene.fulfilled_since = None
        elif scene.fulfilled_since is None:
            scene.fulfilled_since = scene.steps
        return scene.steps >= max_steps


def _make_outcome(scene: SimplerScene) -> Outcome:
    """Make the outcome of a scene whose episode has ended."""
    moment = scene.moment
    # With success, the steps until the task was fulfilled; otherwise all steps.
    num_steps = moment.steps if scene.fulfilled_since is None else scene.fulfilled_since
    return Outcome(
        family=scene.task,
        seed=scene.seed,
        instruction=moment.observation["prompt"],
        success=moment.success,
        reached=moment.reached,
        grasped=moment.grasped,
        wrong_object_moved=moment.wrong_object_moved,
        unreachable=moment.unreachable,
        steps=num_steps,
    )
