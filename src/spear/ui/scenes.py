"""What a tab looks at, step by step: an episode in the simulator, or pictures that were taken before.

Every step can be looked at again as it was. Metres; `vertices` are in the camera frame, all else in the base
frame. Results of an evaluation hold how each episode ended, and few films. But the scene's seed fixes all of
an episode, the policy's noise too: an episode is run again, where the same weights are served.
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

View = dict[str, Any]
Again = tuple[Mapping[str, Any], Outcome | None]
SHOWN_WIDTHS = {"external": 576, "wrist": 224}
"""Pixels, about, of the pictures on the page of the cameras that the policy takes; its own are smaller."""
LARGEST_SHOWN = (1152, 864)
"""Pictures of recordings and photos are scaled down to fit these pixels."""
MOST_SENT = 1000
"""Steps of a recording in the page's chart: of a longer one every second, third …"""
MOST_LISTED = 500
"""Episodes that the page offers (our choice): of more, the first; an evaluation's failures come first."""
SAID = {True: "success · ", False: "failure · ", None: ""}
LINKS = (*(f"link{k}" for k in range(8)), "hand")


class Scene:
    """An episode in the simulator, from the start of the scene of `seed`: 60 steps, 20 MB, at most. again:
    the settings of an evaluation and how one of its episodes ended, where it is run again."""

    kind, rate_hz = "simulator", CONTROL_RATE_HZ

    def __init__(
        self, family: str, seed: int, policy: Spear1Policy, again: Again = ({}, None)
    ) -> None:
        settings, self._recorded = again
        self._policy, self._sizes = policy, get_rendered_sizes(policy)
        self._env = TabletopEnv(family, self._sizes["external"], self._sizes["wrist"])
        seen, _ = self._env.reset(seed=seed)
        how = {
            "execution": "sync",
            "replan": DEFAULT_REPLAN_INTERVAL,
            "latency_ms": 0.0,
            **settings,
        }
        self.executor = ChunkExecutor(
            how["execution"], how["replan"], max_committed=policy.committed
        )
        self.delay = count_latency_steps(how["latency_ms"])
        self.name, self.newest = f"{family}-{seed}", 0
        self._steps = [(seen, self._look(seen, {}, self._env.world.spec.instruction))]

    def begins(self) -> View:
        """What holds for all steps."""
        world, was = self._env.world, self._recorded
        return {
            "family": self._env.family,
            "seed": self._env.seed,
            "instruction": world.spec.instruction,
            "objects": [body.kind.name for body in world.bodies],
            "limit": MAX_STEPS,
            "recorded": was
            and f"recorded: {'success' if was.success else 'failure'}, {was.steps} steps",
        }

    def execute(self, action: Array, told: str) -> None:
        """One more step of 0.2 s, under that instruction."""
        seen, *_, info = self._env.step(action)
        self._steps.append((seen, self._look(seen, info, told)))
        self.newest = self._env.steps

    def observation(self, step: int) -> View:
        """What the policy sees at a step, with the noise that an evaluation of this scene draws there."""
        return {
            **select_cameras(self._policy, self._steps[step][0]),
            "seed": 1000 * self._env.seed + step,
        }

    def look(self, step: int) -> View:
        """The scene at a step, for the page."""
        return self._steps[step][1]

    def _look(self, seen: View, info: Mapping[str, Any], told: str) -> View:
        """The scene as it is now."""
        world, sizes, step = self._env.world, self._sizes, self._env.steps
        views = []
        for camera in (c for c in SHOWN_WIDTHS if c in get_image_sizes(self._policy)):
            scale = max(
                1, round(SHOWN_WIDTHS[camera] / sizes[camera][0])
            )  # whole multiples of what it sees
            views.append((camera, (sizes[camera][0] * scale, sizes[camera][1] * scale)))
        external, *wrist = map(_jpeg, get_thread_renderer().images(world, views))
        width, height = views[0][1]
        focal = float(intrinsics(world, "external", (width, height))[1, 1]) / height
        pose, corners = camera_pose(world, "external"), object_boxes(world)
        things = []
        for index, body in enumerate(world.bodies, 1):
            vertices = order_vertices((corners[index] - pose[:3, 3]) @ pose[:3, :3])
            things.append({"name": body.kind.name, "vertices": vertices.tolist()})
        status = {
            "reached": "reached",
            "grasped": "grasped",
            "wrong_object_moved": "moved something else",
        }
        said = [words for key, words in status.items() if info.get(key)]
        ended = "success" if info.get("success") else "time is up" if step >= MAX_STEPS else None
        if ended and (was := self._recorded):  # on another processor it may end differently
            same = step == was.steps and all(
                bool(info[key]) == getattr(was, key) for key in MILESTONES
            )
            said.append("as recorded" if same else "not as recorded")
        return {
            "images": {"external": external, "wrist": wrist[0] if wrist else None},
            "camera": {"aspect": width / height, "focal": focal, "pose": pose.tolist()},
            "step": step,
            "outcome": ended,
            "milestones": said,
            "told": told
            if told == (task := world.spec.instruction)
            else f"{told} (judged by: {task})",
            "gripper": _gripper(seen["observation/state"]),
            "arm": [world.data.xpos[world.model.body(name).id].tolist() for name in LINKS],
            "things": things,
        }


@dataclass
class Recording:
    """Pictures that were taken before: a recorded episode, or one photo.

    picture  (step, view) → [h, w, 3] uint8, None where there is none; views: those that the policy takes.
    states   [T, 8] as `spear.types.Policy` has them.
    """

    kind: str
    name: str
    picture: Callable[[int, str], Array | None]
    states: Array
    views: Collection[str] = ("external",)
    instruction: str | None = None
    rate_hz: float = CONTROL_RATE_HZ
    success: bool | None = None

    @property
    def newest(self) -> int:
        """The last step."""
        return len(self.states) - 1

    def begins(self) -> View:
        """What holds for all steps."""
        every = math.ceil(len(self.states) / MOST_SENT)
        rows = self.states[::every].round(4)
        track = {"every": every, "position": rows[:, :3].tolist(), "opening": rows[:, 7].tolist()}
        return {"instruction": self.instruction, "limit": self.newest, "track": track}

    def observation(self, step: int) -> View:
        """What the policy sees at a step."""
        pictures = {camera_key(view): self.picture(step, view) for view in self.views}
        seen = {key: picture for key, picture in pictures.items() if picture is not None}
        if "observation/image" not in seen:
            raise SpearError(
                f"{self.name}: there is no picture of the external camera at step {step}"
            )
        return {**seen, "observation/state": self.states[step], "seed": step}

    def look(self, step: int) -> View:
        """The pictures and the robot at a step, for the page."""
        seen = self.observation(step)
        image, wrist = seen["observation/image"], seen.get("observation/wrist_image")
        ended = {True: "success", False: "failure", None: None}[self.success]
        return {
            "images": {"external": _jpeg(image), "wrist": None if wrist is None else _jpeg(wrist)},
            "camera": {"aspect": image.shape[1] / image.shape[0], "focal": None, "pose": None},
            "step": step,
            "outcome": ended if step == self.newest else None,
            "told": self.instruction,
            "gripper": _gripper(self.states[step]),
        }


class Shelf:
    """What a folder holds. Raises `SpearError` for a folder of something else."""

    def __init__(self, folder: Path) -> None:
        self._held: EpisodeStore | Sequence[results.Outcome]
        self._settings: dict[str, Any] = {}
        if list_shards(folder):
            self._held = store = EpisodeStore(folder)
            first = [store.without_images(i) for i in range(min(len(store), MOST_LISTED))]
            self._titles = [
                f"{i} · {SAID[e.success]}{e.instruction[:80]}" for i, e in enumerate(first)
            ]
        elif results.find_journals(folder) or (folder / "results.json").is_file():
            found = results.load_results(folder)
            self._policy, self._settings = found.policy, found.settings
            if words := found.describe_unfinished():
                notice(f"--episodes {folder}: {words}")
            self._held = sorted(found.outcomes, key=lambda o: o.success)
            some = self._held[:MOST_LISTED]
            self._titles = [f"{SAID[o.success]}{o.family.replace('_', ' ')} {o.seed}" for o in some]
        else:
            what = "recorded episodes (of spear record, or prepared ones) nor results of spear evaluate --out"
            raise SpearError(f"--episodes {folder}: holds neither {what}")
        self.about = {"episodes": self._titles, "episodes_in_all": len(self._held)}

    def open(self, index: object, policy: Spear1Policy) -> Scene | Recording:
        """An episode, to be looked at. Raises `SpearError` for one that cannot be."""
        number, held = whole("episode", index, len(self._titles) - 1), self._held
        if isinstance(held, EpisodeStore):
            e = held.without_images(number)

            def shown(step: int, camera: str) -> Array | None:
                data = held.image(number, step, camera)
                return None if data is None else decode_image(data, f"{e.source} step {step}")

            states = np.concatenate([e.position, e.rotation, e.gripper[:, None]], 1).astype(
                np.float32
            )
            return Recording(
                kind="recording",
                name=f"episode-{number}",
                picture=shown,
                states=states,
                views=get_image_sizes(policy),
                instruction=e.instruction,
                rate_hz=e.rate_hz,
                success=e.success,
            )
        outcome = held[number]
        weights = self._settings.get("weights")
        if weights is None or weights != policy.identity or "execution" not in self._settings:
            raise SpearError(
                f"{outcome.family} {outcome.seed}: only with the policy that made it can it be run again: "
                f"serve {self._policy}, with its --dtype, --dataset and --flow-steps (SIMPLER: see its films)"
            )
        return Scene(outcome.family, outcome.seed, policy, (self._settings, outcome))


def whole(what: str, value: object, most: int) -> int:
    """A whole number from 0 to `most`, as a page sent it. Raises `SpearError` naming it for anything else."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise SpearError(f"{what} {str(value)[:20]}: give a whole number from 0 to {most}")
    return value


def _gripper(state: Array) -> View:
    return {
        "position": state[:3].tolist(),
        "rotation": state[3:7].tolist(),
        "opening": float(state[7]),
    }


def _jpeg(image: Array) -> str:
    small = Image.fromarray(image)
    small.thumbnail(LARGEST_SHOWN)
    return to_jpeg_data_uri(np.asarray(small))
