"""What a tab shows, step by step: an episode in the simulator, a recorded episode or a photo.

The page can look at every step again. Lengths are in meters; `vertices` are in the camera frame,
everything else is in the base frame. Results of an evaluation contain how each episode ended, and
few films. But the seed of a scene fixes the whole episode, including the policy's noise, so an
episode can be run again if the same weights are served.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spear.chunks import DEFAULT_REPLAN_INTERVAL, ChunkExecutor
from spear.data.store.episode_store import EpisodeStore, list_shards
from spear.embodiments.observations import (
    camera_key,
    get_image_sizes,
    get_rendered_sizes,
    select_cameras,
)
from spear.errors import SpearError, notice
from spear.evaluate import results
from spear.evaluate.closed_loop import count_latency_steps
from spear.evaluate.results import MILESTONES, Outcome
from spear.labels.fit.box3d import order_vertices
from spear.policy import Spear1Policy
from spear.sim.env import MAX_STEPS, TabletopEnv
from spear.sim.render import camera_pose, get_thread_renderer, intrinsics, object_boxes
from spear.types import CONTROL_RATE_HZ, Array
from spear.util.images import decode_image, to_jpeg_data_uri

PageState = dict[str, Any]
"""A part of what the page shows, as plain JSON."""

SHOWN_WIDTHS_PX = {"external": 576, "wrist": 224}
"""About how wide the page shows a simulated camera; the policy's own images are smaller."""
MAX_SHOWN_SIZE_PX = (1152, 864)  # larger images of recordings and photos are scaled down
MAX_TRACK_STEPS = 1000  # in the page's chart; of a longer recording it shows every second, third …
MAX_LISTED_EPISODES = 500  # the first ones; an evaluation's failures come first
SEEDS_PER_SCENE = 1000  # as in an evaluation: the seed of step k is 1000 times the scene's, plus k
ARM_BODIES = (*(f"link{number}" for number in range(8)), "hand")
STATUS_WORDS = {
    "reached": "reached",
    "grasped": "grasped",
    "wrong_object_moved": "moved something else",
}
"""A truth value that the simulator reports → what the page says if it is true."""


@dataclass(frozen=True)
class Rerun:
    """An episode of an evaluation that is run again: the evaluation's settings, and how it ended
    then.
    """

    settings: Mapping[str, Any]
    outcome: Outcome


class SimulatedEpisode:
    """An episode in the simulator, from a scene's start; at most 60 steps, which take 20 MB."""

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
        self._views = [self._make_view(observation, {}, self._env.world.spec.instruction)]

    def describe(self) -> PageState:
        """Return what holds for all steps."""
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
        if self._recorded_outcome is None:
            return None
        ending = "success" if self._recorded_outcome.success else "failure"
        return f"recorded: {ending}, {self._recorded_outcome.steps} steps"

    def execute(self, action: Array, instruction: str) -> None:
        """Execute one action [8], 0.2 s, which follows that instruction."""
        observation, *_, info = self._env.step(action)
        self._observations.append(observation)
        self._views.append(self._make_view(observation, info, instruction))
        self.newest_step = self._env.steps

    def observation_at(self, step: int) -> dict[str, Any]:
        """Return what the policy sees at a step, with the seed that an evaluation of this scene
        uses there.
        """
        observation = select_cameras(self._policy, self._observations[step])
        return {**observation, "seed": SEEDS_PER_SCENE * self._env.seed + step}

    def view_at(self, step: int) -> PageState:
        """Return what the page shows of a step."""
        return self._views[step]

    @property
    def is_over(self) -> bool:
        """Whether the episode has ended."""
        return self._views[self.newest_step]["outcome"] is not None

    def _make_view(
        self, observation: dict[str, Any], info: Mapping[str, Any], instruction: str
    ) -> PageState:
        """Make the view of the scene as it is now."""
        world = self._env.world
        shown_sizes = self._get_shown_sizes()
        images = get_thread_renderer().images(world, list(shown_sizes.items()))
        shown_images = dict(zip(shown_sizes, map(_encode_jpeg, images), strict=True))
        width, height = shown_sizes["external"]
        focal = float(intrinsics(world, "external", (width, height))[1, 1]) / height
        pose = camera_pose(world, "external")
        outcome = self._find_outcome(info)
        return {
            "images": {
                "external": shown_images["external"],
                "wrist": shown_images.get("wrist"),
            },
            "camera": {"aspect": width / height, "focal": focal, "pose": pose.tolist()},
            "step": self._env.steps,
            "outcome": outcome,
            "milestones": self._describe_milestones(info, outcome),
            "told": self._describe_instruction(instruction),
            "gripper": _describe_gripper(observation["observation/state"]),
            "arm": [world.data.xpos[world.model.body(name).id].tolist() for name in ARM_BODIES],
            "things": self._list_objects(pose),
        }

    def _get_shown_sizes(self) -> dict[str, tuple[int, int]]:
        """Return the sizes of the shown images, whole multiples of what the policy sees."""
        sizes = {}
        for camera, shown_width in SHOWN_WIDTHS_PX.items():
            if camera in get_image_sizes(self._policy):
                width, height = self._image_sizes[camera]
                scale = max(1, round(shown_width / width))
                sizes[camera] = (width * scale, height * scale)
        return sizes

    def _list_objects(self, pose: Array) -> list[PageState]:
        """Return names and box vertices of the objects, in the frame of the camera at `pose`."""
        world = self._env.world
        corners = object_boxes(world)
        objects = []
        for index, body in enumerate(world.bodies, 1):
            vertices = order_vertices((corners[index] - pose[:3, 3]) @ pose[:3, :3])
            objects.append({"name": body.kind.name, "vertices": vertices.tolist()})
        return objects

    def _find_outcome(self, info: Mapping[str, Any]) -> str | None:
        """Return how the episode ended; None if it goes on."""
        if info.get("success"):
            return "success"
        return "time is up" if self._env.steps >= MAX_STEPS else None

    def _describe_milestones(self, info: Mapping[str, Any], outcome: str | None) -> list[str]:
        """List what the robot achieved, and whether a rerun ended as it did before."""
        words = [words for key, words in STATUS_WORDS.items() if info.get(key)]
        recorded = self._recorded_outcome
        if outcome and recorded:  # on another processor it may end differently
            is_same = self._env.steps == recorded.steps and all(
                bool(info[key]) == getattr(recorded, key) for key in MILESTONES
            )
            words.append("as recorded" if is_same else "not as recorded")
        return words

    def _describe_instruction(self, instruction: str) -> str:
        task = self._env.world.spec.instruction
        return instruction if instruction == task else f"{instruction} (judged by: {task})"


@dataclass
class RecordedEpisode:
    """Images that were taken before: a recorded episode, or one photo.

    Attributes:
        kind: "recording" or "photo".
        name: of the film's file.
        load_image: (step, view) → [h, w, 3] uint8; None if there is none.
        states: [T, 8] as `spear.types.Policy` has them.
        views: the cameras that the policy takes.
        instruction: of the episode; None for a photo.
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

    def describe(self) -> PageState:
        """Return what holds for all steps."""
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
                observation[camera_key(view)] = image
        if "observation/image" not in observation:
            raise SpearError(f"{self.name} has no image of the external camera at step {step}.")
        return {**observation, "observation/state": self.states[step], "seed": step}

    def view_at(self, step: int) -> PageState:
        """Return what the page shows of a step."""
        observation = self.observation_at(step)
        image = observation["observation/image"]
        wrist_image = observation.get("observation/wrist_image")
        return {
            "images": {
                "external": _encode_jpeg(image),
                "wrist": None if wrist_image is None else _encode_jpeg(wrist_image),
            },
            "camera": {"aspect": image.shape[1] / image.shape[0], "focal": None, "pose": None},
            "step": step,
            "outcome": self._describe_success() if step == self.newest_step else None,
            "told": self.instruction,
            "gripper": _describe_gripper(self.states[step]),
        }

    def _describe_success(self) -> str | None:
        if self.success is None:
            return None
        return "success" if self.success else "failure"


Episode = SimulatedEpisode | RecordedEpisode


class EpisodeFolder:
    """A folder of episodes that the page offers.

    Raises `SpearError` for a folder of something else.
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
                "prepared ones) nor results of spear evaluate --out."
            )

    def describe(self) -> PageState:
        """Return the titles of the episodes that can be opened, and how many there are in all."""
        return {
            "episodes": self._source.titles,
            "episodes_in_all": self._source.num_episodes,
        }

    def open(self, index: object, policy: Spear1Policy) -> Episode:
        """Open an episode by its number. Raises `SpearError` if that is impossible."""
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
            ending = _title_prefix(episode.success)
            self.titles.append(f"{number} · {ending}{episode.instruction[:80]}")

    def open(self, number: int, policy: Spear1Policy) -> RecordedEpisode:
        episode = self._store.without_images(number)

        def load_image(step: int, camera: str) -> Array | None:
            data = self._store.image(number, step, camera)
            return None if data is None else decode_image(data, f"{episode.source} step {step}")

        columns = [episode.position, episode.rotation, episode.gripper[:, None]]
        return RecordedEpisode(
            kind="recording",
            name=f"episode-{number}",
            load_image=load_image,
            states=np.concatenate(columns, axis=1).astype(np.float32),
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
            notice(f"--episodes {folder}: {unfinished}")
        self._outcomes: Sequence[Outcome] = sorted(
            self._results.outcomes, key=lambda outcome: outcome.success
        )
        self.num_episodes = len(self._outcomes)
        self.titles = []
        for outcome in self._outcomes[:MAX_LISTED_EPISODES]:
            family = outcome.family.replace("_", " ")
            self.titles.append(f"{_title_prefix(outcome.success)}{family} {outcome.seed}")

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
    """Return a whole number from 0 to `largest`.

    Raises `SpearError` naming it for anything else.
    """
    # A bool is an int, too.
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= largest:
        return value
    raise SpearError(f"{name} {str(value)[:20]} is not a whole number from 0 to {largest}.")


def _title_prefix(success: bool | None) -> str:
    if success is None:
        return ""
    return "success · " if success else "failure · "


def _describe_gripper(state: Array) -> PageState:
    return {
        "position": state[:3].tolist(),
        "rotation": state[3:7].tolist(),
        "opening": float(state[7]),
    }


def _encode_jpeg(image: Array) -> str:
    small = Image.fromarray(image)
    small.thumbnail(MAX_SHOWN_SIZE_PX)
    return to_jpeg_data_uri(np.asarray(small))
