"""Closed-loop evaluation in the embedded simulator.

An agent acts in many scenes at once. Each episode ends with success or at its time limit.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mujoco

from spear.chunks import NUM_SLOW_ACTIONS, ChunkExecutor, count_latency_steps
from spear.errors import check_known
from spear.evaluate import film
from spear.evaluate.agents import Agent
from spear.evaluate.noise import NOISE_LEVELS, degrade_images_of_observation
from spear.evaluate.options import TabletopOptions
from spear.evaluate.results import Outcome, Results
from spear.evaluate.runner import EndedEpisode, Film, HasEnded, run_evaluation
from spear.sim.env import MAX_STEPS, TabletopEnv
from spear.sim.render import get_thread_renderer
from spear.sim.scene import FAMILIES, SceneSpec, list_held_out_seeds, sample_scene
from spear.sim.shifts import Shift, shift_scene
from spear.sim.world import SIMULATOR_VERSION, World
from spear.sim.worlds import DEFAULT_WORLD, place_in_world, validate_world
from spear.types import Array, WidthAndHeight


def evaluate_tabletop(agent: Agent, options: TabletopOptions) -> tuple[Results, list[Film]]:
    """Measure success on the held-out seeds first_seed … first_seed + num_scenes - 1 per family.

    Args:
        agent: Who acts.
        options: Which scenes, how chunks are executed, and where the results are written.

    Returns:
        The results, and the films that this call made.

    Raises:
        SpearError: The folder has results of another policy or of other settings; a family, world
            or shift is unknown; seeds are not held out; or the policy has not learned the execution
            mode.
    """
    check_known("task family", FAMILIES, *options.tasks)
    families = options.tasks or FAMILIES
    scenes = dict.fromkeys(families, list_held_out_seeds(options.first_seed, options.num_scenes))
    settings = {
        "simulator": SIMULATOR_VERSION,
        "replan": options.replan_steps,
        **_make_image_size_settings(agent.image_sizes),
        "execution": options.execution,
        "latency_ms": options.latency_ms,
        "weights": agent.weights,
    }
    if options.execution == "async":
        settings["slow_actions"] = NUM_SLOW_ACTIONS
    if options.world != DEFAULT_WORLD:
        settings["world"] = validate_world(options.world)
    if options.shift is not None:
        settings["shift"] = str(Shift.parse(options.shift))
    return run_evaluation(_Tabletop(agent, options), agent, scenes, settings, options)


def _make_image_size_settings(image_sizes: Mapping[str, WidthAndHeight]) -> dict[str, list[int]]:
    """Describe the sizes (width, height) of the images, for the settings that results record.

    The size of the external camera's images keeps the key "image_size", which it has had in
    results of all versions.

    Returns:
        "image_size" for the external camera, "CAMERA_size" for each other one → [width, height].
    """
    sizes = {}
    for camera, size in image_sizes.items():
        key = "image_size" if camera == "external" else f"{camera}_size"
        sizes[key] = list(size)
    return sizes


@dataclass
class _RunningScene:
    """A scene in which the agent acts.

    env           the environment that simulates the scene.
    executor      executes the agent's chunks in the execution mode of the options.
    track         the joint positions (MuJoCo's qpos, of the arm and of all objects) at each step so
                  far, from which a film can be made.
    info          what the environment returned about the last step.
    unreachable   number of control steps whose target the arm could not reach.
    start_time_s  start of the episode, by `time.perf_counter`.
    """

    env: TabletopEnv
    executor: ChunkExecutor
    track: list[Array]
    info: Mapping[str, Any] = field(default_factory=dict)
    unreachable: int = 0
    start_time_s: float = field(default_factory=time.perf_counter)


class _Tabletop:
    """The embedded simulator as a `spear.evaluate.runner.Simulator`.

    An episode's track, from which its film is made, is the joint positions at each step.
    """

    has_cheap_tracks = True  # see `Simulator`; a track consists of joint positions only

    def __init__(self, agent: Agent, options: TabletopOptions) -> None:
        self.group_size = options.batch_size
        self._options = options
        self._image_sizes = agent.image_sizes
        self._shift = None if options.shift is None else Shift.parse(options.shift)
        self._noise = None
        latency_ms = options.latency_ms
        if self._shift is not None and self._shift.axis == "noise":
            self._noise = NOISE_LEVELS[self._shift.level]
            latency_ms += self._noise.latency_ms
        self._latency_steps = count_latency_steps(latency_ms)
        if agent.needs_images or options.videos:
            get_thread_renderer()  # raises now, before any episode runs, if there is no renderer

    def run_episodes(
        self, agent: Agent, family: str, seeds: Sequence[int], filming: bool
    ) -> Iterator[EndedEpisode[list[Array]]]:
        """Run one episode per seed, all at once (see `Simulator.run_episodes`).

        Tracks are recorded whether `filming` or not, because joint positions cost hardly any time.

        Yields:
            The outcome of an episode, how long it ran (s), and its track.
        """
        scenes = []
        for seed in seeds:
            scenes.append(self._start_scene(agent, self._make_env(agent, family), seed))
        while scenes:
            # One inference for all running scenes.
            observations = []
            for scene in scenes:
                images_and_state = self._observe(scene.env) if agent.needs_images else {}
                committed_prefix = scene.executor.committed_actions()  # {"committed": …} or {}
                observations.append({**images_and_state, **committed_prefix})
            chunks = agent.choose_action_chunks([scene.env for scene in scenes], observations)

            # Execute the chunks.
            running = []
            for scene, chunk in zip(scenes, chunks, strict=True):
                arrival_tick = scene.executor.tick + self._latency_steps
                scene.executor.add_chunk(chunk, arrival_tick=arrival_tick)
                has_ended = _step_until_inference_or_end(scene)
                if has_ended:
                    seconds = time.perf_counter() - scene.start_time_s
                    yield EndedEpisode(_make_outcome(scene), seconds, scene.track)
                else:
                    running.append(scene)
            scenes = running

    def _make_env(self, agent: Agent, family: str) -> TabletopEnv:
        return TabletopEnv(family, self._image_sizes, images=agent.needs_images)

    def _start_scene(self, agent: Agent, env: TabletopEnv, seed: int) -> _RunningScene:
        """Load the scene of a seed into an environment, with an executor for the agent's chunks."""
        env.start_episode_in(World(self._sample_scene(env.family, seed)))
        executor = ChunkExecutor(
            self._options.execution, self._options.replan_steps, max_committed=agent.max_committed
        )
        return _RunningScene(env, executor, [env.world.data.qpos.copy()])

    def _sample_scene(self, family: str, seed: int) -> SceneSpec:
        """Sample the scene of a seed, in the world and with the shift of the options."""
        scene = place_in_world(sample_scene(family, seed), self._options.world)
        return scene if self._shift is None else shift_scene(scene, self._shift)

    def _observe(self, env: TabletopEnv) -> dict[str, Any]:
        """Observe a scene as the policy sees it: with degraded images if the shift is noise."""
        observation = env.observe()
        if self._noise is None:
            return observation
        return degrade_images_of_observation(observation, self._noise, env.seed, env.steps)

    def make_film_frames(self, outcome: Outcome, track: Sequence[Array]) -> Iterator[Array]:
        """Replay an episode's joint positions and render a frame of the film at each step.

        A film shows the external and the wrist camera, whatever cameras the policy has. The images
        are larger than the policy's, with the same aspect ratio.
        """
        world = World(self._sample_scene(outcome.family, outcome.seed))
        width, height = self._image_sizes["external"]
        views = [
            ("external", (round(film.HEIGHT_PX * width / height), film.HEIGHT_PX)),
            ("wrist", (film.HEIGHT_PX, film.HEIGHT_PX)),
        ]
        for step, joint_positions in enumerate(track):
            world.data.qpos[:] = joint_positions
            mujoco.mj_forward(world.model, world.data)
            is_last = step == len(track) - 1
            external, wrist = get_thread_renderer().render_images(world, views)
            yield film.compose_frame(
                external,
                wrist,
                outcome.instruction,
                success=outcome.success if is_last else None,
            )


def _step_until_inference_or_end(scene: _RunningScene) -> HasEnded:
    """Step a scene until its executor needs the next chunk, or until the episode ends.

    Returns:
        Whether the episode has ended.
    """
    while not scene.executor.needs_chunk():
        scene.info = scene.env.step_without_observing(scene.executor.next_action())
        scene.track.append(scene.env.world.data.qpos.copy())
        scene.unreachable += scene.info["unreachable"]
        if scene.info["success"] or scene.env.steps >= MAX_STEPS:
            return True
    return False


def _make_outcome(scene: _RunningScene) -> Outcome:
    """Make the outcome of a scene whose episode has ended."""
    return Outcome(
        family=scene.env.family,
        seed=scene.env.seed,
        instruction=scene.env.world.spec.instruction,
        success=bool(scene.info["success"]),
        reached=bool(scene.info["reached"]),
        grasped=bool(scene.info["grasped"]),
        wrong_object_moved=bool(scene.info["wrong_object_moved"]),
        unreachable=scene.unreachable,
        steps=scene.env.steps,
    )
