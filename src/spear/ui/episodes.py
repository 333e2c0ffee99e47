"""The episodes that a tab shows: in the simulator, recorded ones, and photos.

The page can go back to every step of an episode. Lengths are in meters. Box vertices are in the
camera frame, and all other positions in the base frame.

Results of an evaluation contain how each episode ended, but few films. The seed of a scene
determines the whole episode, including the policy's noise, so the page can run an episode of an
evaluation again, if the server has the same weights.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spear.chunks import DEFAULT_REPLAN_INTERVAL, ChunkExecutor, count_latency_steps
from spear.data.store.episode_store import EpisodeStore, list_shards
from spear.embodiments.observations import (
    get_camera_key,
    get_image_sizes,
    get_rendered_sizes,
    select_cameras,
)
from spear.errors import SpearError, notice
from spear.evaluate import results
from spear.evaluate.results import MILESTONES, Outcome
from spear.labels.fit.box3d import order_vertices
from spear.policy import Spear1Policy
from spear.sim.env import MAX_STEPS, TabletopEnv
from spear.sim.render import (
    compute_camera_pose,
    compute_instance_box_corners,
    compute_intrinsics,
    get_thread_renderer,
)
from spear.types import CONTROL_RATE_HZ, Array, WidthAndHeight
from spear.util.images import decode_image, to_jpeg_data_uri

PageState = dict[str, Any]
"""A part of what the page shows, as plain JSON."""

SHOWN_WIDTHS_PX = {"external": 576, "wrist": 224}
"""The cameras that the page shows, and about how wide it shows their images if they are simulated.
The images that the policy gets are smaller. If the policy has further cameras, the page only names
them."""
MAX_SHOWN_SIZE_PX = (1152, 864)  # larger images of recordings and photos are scaled down
MAX_TRACK_STEPS = 1000
"""Number of steps in the page's chart of a recording; longer recordings are thinned out."""
MAX_LISTED_EPISODES = 500  # a longer list is cut off; an evaluation's failures come first
SEEDS_PER_SCENE = 1000
"""In an evaluation the policy's noise at step k of scene s has the seed 1000 s + k."""
ARM_BODIES = (*(f"link{number}" for number in range(8)), "hand")  # in the simulator's model
STATUS_WORDS = {
    "reached": "reached",
    "grasped": "grasped",
    "wrong_object_moved": "moved something else",
}
"""Bool that the simulator reports → words of the page if it is true."""


@dataclass(frozen=True)
class Rerun:
    """An episode of an evaluation that is run again.

    Attributes:
        settings: the settings of the evaluation.
        outcome: how the episode ended in the evaluation.
    """

    settings: Mapping[str, Any]
    outcome: Outcome


class SimulatedEpisode:
    """An episode in the simulator, from the start of a scene.

    All steps stay in memory: the 60 steps of the longest episode take 20 MB.

    Args:
        family: the scene's task family.
        seed: the scene's seed.
        policy: the policy that acts.
        rerun: the episode of an evaluation that is run again; None for a new episode.
    """

    kind = "simulator"
    rate_hz = CONTROL_RATE_HZ

    def __init__(
        self, family: str, seed: int, policy: Spear1Policy, rerun: Rerun | None = None
    ) -> None:
        self._policy = policy
        self._recorded_outcome = rerun.outcome if rerun else None
        self._image_sizes = get_rendered_sizes(policy)
        self._env = TabletopEnv(family, self._image_sizes)
        observation, _ = self._env.reset(seed=seed)

        settings = rerun.settings if rerun else {}
        self.executor = ChunkExecutor(
            settings.get("execution", "sync"),
            settings.get("replan", DEFAULT_REPLAN_INTERVAL),
            max_committed=policy.committed,
        )
        self.num_latency_steps = count_latency_steps(settings.get("latency_ms", 0.0))
        self.name = f"{family}-{seed}"
        self.newest_step = 0
        self._observations = [observation]
        task = self._env.world.spec.instruction
        self._views = [self._make_page_state(observation, info={}, instruction=task)]

    def make_constant_state(self) -> PageState:
        """Return the part of the page's state that is the same for all steps."""
        world = self._env.world
        return {
            "family": self._env.family,
            "seed": self._env.seed,
            "instruction": world.spec.instruction,
            "objects": [body.kind.name for body in world.bodies],
            "limit": MAX_STEPS,
            "recorded": self._describe_recorded_outcome(),
        }

    def _describe_recorded_outcome(self) -> str | None:
        """Return how the episode ended in the evaluation; None for a new episode."""
        if self._recorded_outcome is None:
            return None
        ending = "success" if self._recorded_outcome.success else "failure"
        return f"recorded: {ending}, {self._recorded_outcome.steps} steps"

    def execute(self, action: Array, instruction: str) -> None:
        """Execute one action [8], which takes 0.2 s and was predicted for `instruction`."""
        observation, *_, info = self._env.step(action)
        self._observations.append(observation)
        self._views.append(self._make_page_state(observation, info, instruction))
        self.newest_step = self._env.steps

    def observation_at(self, step: int) -> dict[str, Any]:
        """Return what the policy sees at a step, with the seed of its noise in an evaluation."""
        observation = select_cameras(self._policy, self._observations[step])
        return {**observation, "seed": SEEDS_PER_SCENE * self._env.seed + step}

    def make_page_state_at(self, step: int) -> PageState:
        """Return what the page shows of a step."""
        return self._views[step]

    @property
    def is_over(self) -> bool:
        """Whether the episode has ended."""
        return self._views[self.newest_step]["outcome"] is not None

    def _make_page_state(
        self, observation: dict[str, Any], info: Mapping[str, Any], instruction: str
    ) -> PageState:
        """Return what the page shows of the scene in its present state."""
        world = self._env.world
        shown_sizes = self._get_shown_sizes()
        images = get_thread_renderer().render_images(world, list(shown_sizes.items()))
        encoded_images = [_to_shown_data_uri(image) for image in images]
        shown_images = dict(zip(shown_sizes, encoded_images, strict=True))

        width, height = shown_sizes["external"]
        camera_matrix = compute_intrinsics(world, "external", (width, height))  # [3, 3]
        focal = float(camera_matrix[1, 1]) / height  # in heights of the image
        pose = compute_camera_pose(world, "external")  # [4, 4] in the base frame
        outcome = self._find_outcome(info)
        return {
            "images": {
                "external": shown_images["external"],
                "wrist": shown_images.get("wrist"),
            },
            "camera": {"aspect": width / height, "focal": focal, "pose": pose.tolist()},
            "step": self._env.steps,
            "outcome": outcome,
            "milestones": self._list_milestones(info, outcome),
            "told": self._describe_instruction(instruction),
            "gripper": _describe_pose_and_opening(observation["observation/state"]),
            "arm": [world.data.xpos[world.model.body(name).id].tolist() for name in ARM_BODIES],
            "things": self._list_object_boxes_in_camera_frame(pose),
        }

    def _get_shown_sizes(self) -> dict[str, WidthAndHeight]:
        """Return the sizes of the shown images, by camera.

        They are whole multiples of the sizes that the policy sees.
        """
        sizes = {}
        for camera, shown_width in SHOWN_WIDTHS_PX.items():
            if camera in get_image_sizes(self._policy):
                width, height = self._image_sizes[camera]
                scale = max(1, round(shown_width / width))
                sizes[camera] = (width * scale, height * scale)
        return sizes

    def _list_object_boxes_in_camera_frame(self, pose_of_camera: Array) -> list[PageState]:
        """Return the names and box vertices of the objects, in the camera frame.

        Args:
            pose_of_camera: [4, 4] in the base frame.
        """
        world = self._env.world
        corners_of_object = compute_instance_box_corners(world)  # index → [8, 3] in the base frame
        camera_rotation = pose_of_camera[:3, :3]
        camera_position = pose_of_camera[:3, 3]
        objects = []
        for index, body in enumerate(world.bodies, start=1):
            # For row vectors, v @ R is R⁻¹ v: the rotation from the base into the camera frame.
            corners = (corners_of_object[index] - camera_position) @ camera_rotation
            vertices = order_vertices(corners)
            objects.append({"name": body.kind.name, "vertices": vertices.tolist()})
        return objects

    def _find_outcome(self, info: Mapping[str, Any]) -> str | None:
        """Return how the episode ended; None if it has not ended."""
        if info.get("success"):
            return "success"
        return "time is up" if self._env.steps >= MAX_STEPS else None

    def _list_milestones(self, info: Mapping[str, Any], outcome: str | None) -> list[str]:
        """List what the robot has achieved, and whether a rerun ended like the recorded episode.

        The two may differ if the evaluation ran on another processor.
        """
        descriptions = [words for key, words in STATUS_WORDS.items() if info.get(key)]
        recorded_outcome = self._recorded_outcome
        if outcome and recorded_outcome:
            has_same_length = self._env.steps == recorded_outcome.steps
            has_same_milestones = all(
                bool(info[key]) == getattr(recorded_outcome, key) for key in MILESTONES
            )
            is_same = has_same_length and has_same_milestones
            descriptions.append("as recorded" if is_same else "not as recorded")
        return descriptions

    def _describe_instruction(self, instruction: str) -> str:
        """Return the robot's instruction, with the scene's own task if that differs."""
        task = self._env.world.spec.instruction
        return instruction if instruction == task else f"{instruction} (judged by: {task})"


@dataclass
class PhotographedEpisode:
    """An episode whose images were taken before: a recorded episode, or a single photo.

    Attributes:
        kind: "recording" or "photo".
        name: name of the film's file, without its ending.
        load_image: function from step and view to the image [h, w, 3] uint8; None if it is missing.
        states: [T, 8] position in meters, rotation quaternion and gripper opening.
        views: the cameras that the policy uses.
        instruction: the episode's instruction; None for a photo.
        rate_hz: steps per second.
        success: whether the episode succeeded; None if nobody knows.
    """

    kind: str
    name: str
    load_image: Callable[[int, str], Array | None]
    states: Array
    views: Collection[str] = ("external",)
    instruction: str | None = None
    rate_hz: float = CONTROL_RATE_HZ
    success: bool | None = None

    @property
    def newest_step(self) -> int:
        """The last step."""
        return len(self.states) - 1

    def make_constant_state(self) -> PageState:
        """Return the part of the page's state that is the same for all steps.

        The track is the gripper's path for the page's chart.
        """
        stride = math.ceil(len(self.states) / MAX_TRACK_STEPS)
        states = self.states[::stride].round(4)
        track = {
            "every": stride,
            "position": states[:, :3].tolist(),
            "opening": states[:, 7].tolist(),
        }
        return {"instruction": self.instruction, "limit": self.newest_step, "track": track}

    def observation_at(self, step: int) -> dict[str, Any]:
        """Return what the policy sees at a step."""
        observation: dict[str, Any] = {}
        for view in self.views:
            image = self.load_image(step, view)
            if image is not None:
                observation[get_camera_key(view)] = image
        if "observation/image" not in observation:
            raise SpearError(
                f"{self.name} has no image of the external camera at step {step}. "
                "Choose another step."
            )
        return {**observation, "observation/state": self.states[step], "seed": step}

    def make_page_state_at(self, step: int) -> PageState:
        """Return what the page shows of a step."""
        observation = self.observation_at(step)
        image = observation["observation/image"]
        wrist_image = observation.get("observation/wrist_image")
        return {
            "images": {
                "external": _to_shown_data_uri(image),
                "wrist": None if wrist_image is None else _to_shown_data_uri(wrist_image),
            },
            "camera": {"aspect": image.shape[1] / image.shape[0], "focal": None, "pose": None},
            "step": step,
            "outcome": self._describe_success() if step == self.newest_step else None,
            "told": self.instruction,  # the instruction that the policy gets at this step
            "gripper": _describe_pose_and_opening(self.states[step]),
        }

    def _describe_success(self) -> str | None:
        """Return how the recorded episode ended; None if nobody knows."""
        if self.success is None:
            return None
        return "success" if self.success else "failure"


Episode = SimulatedEpisode | PhotographedEpisode


class EpisodeFolder:
    """A folder of episodes that the page offers: recorded ones, or the results of an evaluation.

    Raises:
        SpearError: the folder contains neither.
    """

    def __init__(self, folder: Path) -> None:
        self._source: _Recordings | _Evaluation
        if list_shards(folder):
            self._source = _Recordings(folder)
        elif results.find_journals(folder) or (folder / "results.json").is_file():
            self._source = _Evaluation(folder)
        else:
            raise SpearError(
                f"--episodes {folder} contains neither recorded episodes (of spear record, or "
                "prepared ones) nor results of spear evaluate --out. Give a folder of one."
            )

    def make_constant_state(self) -> PageState:
        """Return the titles of the listed episodes, and the number of all episodes."""
        return {
            "episodes": self._source.titles,
            "episodes_in_all": self._source.num_episodes,
        }

    def open(self, index: object, policy: Spear1Policy) -> Episode:
        """Open an episode by its number in the list of titles.

        Raises:
            SpearError: the number is not valid, or the episode cannot be opened with this policy.
        """
        number = validate_whole_number("episode", index, len(self._source.titles) - 1)
        return self._source.open(number, policy)


class _Recordings:
    """Recorded episodes of a store."""

    def __init__(self, folder: Path) -> None:
        self._store = EpisodeStore(folder)
        self.num_episodes = len(self._store)
        self.titles = []
        for number in range(min(self.num_episodes, MAX_LISTED_EPISODES)):
            episode = self._store.without_images(number)
            ending = _make_title_prefix(episode.success)
            self.titles.append(f"{number} · {ending}{episode.instruction[:80]}")

    def open(self, number: int, policy: Spear1Policy) -> PhotographedEpisode:
        episode = self._store.without_images(number)

        def load_image(step: int, camera: str) -> Array | None:
            """Return an image [h, w, 3] of the episode; None if it is missing."""
            data = self._store.image(number, step, camera)
            return None if data is None else decode_image(data, f"{episode.source} step {step}")

        columns = [episode.position, episode.rotation, episode.gripper[:, None]]
        states = np.concatenate(columns, axis=1).astype(np.float32)  # [T, 3 + 4 + 1]
        return PhotographedEpisode(
            kind="recording",
            name=f"episode-{number}",
            load_image=load_image,
            states=states,
            views=get_image_sizes(policy),
            instruction=episode.instruction,
            rate_hz=episode.rate_hz,
            success=episode.success,
        )


class _Evaluation:
    """Results of an evaluation, whose episodes are run again."""

    def __init__(self, folder: Path) -> None:
        self._results = results.load_results(folder)
        unfinished = self._results.describe_unfinished()
        if unfinished:
            notice(f"In --episodes {folder}, {unfinished}")
        # Failures come first, because False sorts before True.
        self._outcomes: Sequence[Outcome] = sorted(
            self._results.outcomes, key=lambda outcome: outcome.success
        )
        self.num_episodes = len(self._outcomes)
        self.titles = []
        for outcome in self._outcomes[:MAX_LISTED_EPISODES]:
            family = outcome.family.replace("_", " ")
            self.titles.append(f"{_make_title_prefix(outcome.success)}{family} {outcome.seed}")

    def open(self, number: int, policy: Spear1Policy) -> SimulatedEpisode:
        outcome = self._outcomes[number]
        settings = self._results.settings
        weights = settings.get("weights")
        is_same_policy = weights is not None and weights == policy.identity
        if not is_same_policy or "execution" not in settings:
            raise SpearError(
                f"{outcome.family} {outcome.seed} can be run again only with the policy that made "
                f"it. Serve {self._results.policy}, with its --dtype, --norm-stats and "
                "--flow-steps (for SIMPLER, see its films)."
            )
        return SimulatedEpisode(outcome.family, outcome.seed, policy, Rerun(settings, outcome))


def validate_whole_number(name: str, value: object, largest: int) -> int:
    """Return `value` if it is a whole number from 0 to `largest`.

    Args:
        name: the value's name in the message.
        value: a value that a page has sent.
        largest: the largest number that is valid.

    Raises:
        SpearError: the value is something else.
    """
    # For Python a bool is an int, too.
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= largest:
        return value
    raise SpearError(
        f"{name} {str(value)[:20]} is not a whole number from 0 to {largest}. Give one."
    )


def _make_title_prefix(success: bool | None) -> str:
    """Return the beginning of an episode's title; empty if its success is not known."""
    if success is None:
        return ""
    return "success · " if success else "failure · "


def _describe_pose_and_opening(state_of_step: Array) -> PageState:
    """Return the pose and opening of the gripper in a state [8], for the page."""
    return {
        "position": state_of_step[:3].tolist(),
        "rotation": state_of_step[3:7].tolist(),
        "opening": float(state_of_step[7]),
    }


def _to_shown_data_uri(image: Array) -> str:
    """Return an image as data URI, scaled down to at most `MAX_SHOWN_SIZE_PX`."""
    shown_image = Image.fromarray(image)
    shown_image.thumbnail(MAX_SHOWN_SIZE_PX)
    return to_jpeg_data_uri(np.asarray(shown_image))
