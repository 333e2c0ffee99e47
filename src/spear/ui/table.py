"""What one tab of the page works with: a scene of the simulator or a photo, and a model that looks at it.

Everything here blocks and belongs to one thread, as `spear.sim.render.Renderer` does. Results are parts of
the page's view, as plain JSON, which the page keeps by key. Metres; `vertices` are in the camera frame, all
else in the base frame.
"""

from __future__ import annotations

import base64
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from spear.chunks import ChunkExecutor
from spear.embodiments import tools
from spear.errors import SpearError
from spear.evaluate.vqa import ask
from spear.evaluate.vqa.calibration import Trust
from spear.labels.fit.box3d import EDGES, order_vertices
from spear.policy import Spear1Policy, VlmBundle
from spear.sim.env import MAX_STEPS, RATE_HZ, TabletopEnv
from spear.sim.render import Renderer, camera_pose, intrinsics, object_boxes
from spear.sim.scene import FAMILIES, FOVY, START
from spear.sim.world import World
from spear.types import Array
from spear.util.images import encode_jpeg, load_image

View = dict[str, Any]

SHOWN_WIDTHS = {"external": 576, "wrist": 224}
"""Pixels, about, of each camera's picture on the page; the model looks at its own, smaller ones."""
LARGEST_SHOWN = (1152, 864)
"""A photo is scaled down to fit these pixels before it goes back to the page."""
MOST_BOXES = 8
"""Objects that may be asked for at once (our choice)."""
LINKS = (*(f"link{k}" for k in range(8)), "hand")
NEUTRAL = np.array([*START, 1, 0, 0, 0, 1], np.float32)
"""The robot's state that a photo is given: gripper open, pointing down over the table."""
NOTHING_YET: View = {"chunk": None, "boxes": [], "absent": [], "answer": None}


class Studio:
    """The model and the rendering context that all tabs share."""

    def __init__(self, policy: Spear1Policy, name: str) -> None:
        self.policy, self.name = policy, name
        self.vlm = VlmBundle(policy.model.vlm, policy.processor)
        self.trust = Trust.load(policy.folder) if policy.folder else None

    @functools.cached_property
    def renderer(self) -> Renderer:
        """Made by the thread that first uses it. Raises `SpearError` where rendering is impossible."""
        return Renderer()

    def close(self) -> None:
        """Give the rendering context back, in the thread that used it."""
        if "renderer" in self.__dict__:
            self.renderer.close()

    def about(self) -> View:
        """What does not change: the model, the task families, the edges of a box."""
        return {
            "model": self.name,
            "families": list(FAMILIES),
            "edges": [list(e) for e in EDGES],
            "rate_hz": RATE_HZ,
            "limit": MAX_STEPS,
            "default_fov": FOVY,
        }


class Table:
    """One tab's scene or photo."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._env: TabletopEnv | None = None
        self._photo: Array | None = None
        self._executor = ChunkExecutor()
        self._trail: list[list[float]] = []
        self._asked: list[str] = []
        self._info: Mapping[str, Any] = {}

    @property
    def moves(self) -> bool:
        """Whether there is a robot that can act: not in a photo, and not once the episode is over."""
        return self._env is not None and self._outcome() is None

    def reset(self, family: str, seed: int) -> View:
        """The start of a scene. Raises `SpearError` for an unknown family or a bad seed."""
        sizes = self._studio.policy.processor.image_sizes
        env = TabletopEnv(family, sizes["external"], sizes["wrist"], self._studio.renderer)
        env.reset(seed=seed)
        self._env, self._photo, self._info = env, None, {}
        self._executor = ChunkExecutor()
        self._trail, self._asked = [], []
        return {
            **NOTHING_YET,
            "source": "simulator",
            "family": family,
            "seed": seed,
            "instruction": env.world.spec.instruction,
            "objects": [body.name for body in env.world.bodies],
            **self._look(),
        }

    def show(self, data: bytes) -> View:
        """A photo, as its file. Raises `SpearError` for one that cannot be read or is too large."""
        pixels = load_image(data, "the image", tools.LONGEST_SIDE)
        self._photo = tools.image({"the image": pixels}, "the image")
        self._env, self._trail, self._asked = None, [], []
        shown = Image.fromarray(self._photo)
        shown.thumbnail(LARGEST_SHOWN)
        return {
            **NOTHING_YET,
            "source": "photo",
            "objects": [],
            "images": {"external": _jpeg(np.asarray(shown)), "wrist": None},
            "camera": {"aspect": self._photo.shape[1] / self._photo.shape[0], "focal": None, "pose": None},
            "step": 0,
            "outcome": None,
            "milestones": [],
            "gripper": _gripper(NEUTRAL),
            "arm": [],
            "things": [],
            "trail": [],
        }

    def predict(self, instruction: str) -> View:
        """The chunk of actions that the policy would take next. Raises `SpearError` for a bad instruction."""
        return {"chunk": self._predict(instruction)[1]}

    def step(self, instruction: str, follow: bool) -> View:
        """Makes one step of 0.2 s, with a new look when the last chunk is used up.

        follow  whether the boxes that were asked for are asked for again.
        """
        if self._env is None:
            raise SpearError("a photo does not move: choose a scene of the simulator")
        if self._outcome():
            raise SpearError("this episode is over: reset it, or choose another scene")
        view: View = {}
        if self._executor.wants():
            actions, view["chunk"] = self._predict(instruction)
            self._executor.give(actions)
        self._info = self._env.physics_step(self._executor.next())
        view |= self._look()
        if follow and self._asked:
            view |= self.boxes(self._asked)
        return view

    def boxes(self, names: Sequence[str]) -> View:
        """SPEAR-VLM's 3D boxes of objects, asked for at once; in the simulator also how far off they are.

        Where it was measured how far the model can be trusted, also within which distance (mm) the numbers
        are, and which objects are absent. Raises `SpearError` for no name, too many of them, or bad ones.
        """
        if not 0 < len(names) <= MOST_BOXES:
            raise SpearError(f"{len(names)} objects: ask for 1 to {MOST_BOXES}")
        names = [tools.prompt({"object": name}, "object") for name in names]
        image, started = self._image(), time.perf_counter()
        vlm, trust, family = self._studio.vlm, self._studio.trust, "box_vertices"
        absent = ask.missing(vlm, image, names) if trust and trust.tells_absent else {}
        there = [name for name in names if name not in absent]
        prompts = [f"Provide the 3D bounding box coordinates of the {name}" for name in there]
        answers = vlm.answer([image] * len(there), prompts, family, distributions=True) if there else []
        elapsed = time.perf_counter() - started
        truth = {} if self._env is None else _boxes(self._env.world)
        found = []
        for name, answer in zip(there, answers, strict=True):
            vertices = np.reshape(answer.values, (8, 3))
            true = truth.get(name)
            off = None if true is None else 1000 * float(np.linalg.norm(vertices.mean(0) - true.mean(0)))
            within = None
            if trust and answer.distribution is not None and family in trust.factors:
                low, high = trust.interval(family, answer.distribution)
                within = 1000 * float((high - low).mean()) / 2
            box = {"name": name, "vertices": vertices.tolist(), "error_mm": off, "within_mm": within}
            found.append({**box, "step": self._steps})
        self._asked = list(names)
        return {"boxes": found, "absent": list(absent), "boxes_ms": 1000 * elapsed}

    def question(self, text: str) -> View:
        """SPEAR-VLM's answer to any question, in words."""
        image, text = self._image(), tools.prompt({"question": text}, "question")
        _, said = ask.ask(self._studio.vlm, image, text, trust=self._studio.trust)
        return {"answer": {"question": text, "text": said, "step": self._steps}}

    @property
    def _steps(self) -> int:
        return 0 if self._env is None else self._env.steps

    def _outcome(self) -> str | None:
        if self._info.get("success"):
            return "success"
        return "time is up" if self._steps >= MAX_STEPS else None

    def _image(self) -> Array:
        """What the model sees now: [h, w, 3] uint8."""
        if self._photo is not None:
            return self._photo
        if self._env is None:
            raise SpearError("there is no picture yet: choose a scene or open a photo")
        return self._env.render()

    def _predict(self, instruction: str) -> tuple[Array, View]:
        """Actions [H, 8], and the chunk to draw: H + 1 poses, the first where the gripper is."""
        if self._env is not None:
            # the noise that an evaluation of this scene draws at this step
            observation = {**self._env.observe(), "seed": 1000 * self._env.seed + self._steps}
        else:
            observation = {"observation/image": self._image(), "observation/state": NEUTRAL}
        observation["prompt"] = tools.prompt({"prompt": instruction})
        started = time.perf_counter()
        actions = self._studio.policy.infer(observation)["actions"]
        elapsed = time.perf_counter() - started
        state: Array = observation["observation/state"]
        positions, rotations = tools.targets(state, actions)
        return actions, {
            "positions": [state[:3].tolist(), *positions.tolist()],
            "rotations": [state[3:7].tolist(), *rotations.tolist()],
            "openings": [float(state[7]), *(float(g) for g in actions[:, 7])],
            "ms": 1000 * elapsed,
        }

    def _look(self) -> View:
        """The scene as it is now."""
        assert self._env is not None
        world, sizes = self._env.world, self._studio.policy.processor.image_sizes
        # whole multiples of what the model sees
        scales = {camera: max(1, round(width / sizes[camera][0])) for camera, width in SHOWN_WIDTHS.items()}
        views = [(c, (sizes[c][0] * scale, sizes[c][1] * scale)) for c, scale in scales.items()]
        external, wrist = self._studio.renderer.images(world, views)
        width, height = views[0][1]
        position, rotation = world.servo.pose()
        self._trail.append(position.tolist())
        data = world.data
        status = {"reached": "reached", "grasped": "grasped", "wrong_object_moved": "moved something else"}
        return {
            "images": {"external": _jpeg(external), "wrist": _jpeg(wrist)},
            "camera": {
                "aspect": width / height,
                "focal": float(intrinsics(world, "external", (width, height))[1, 1]) / height,
                "pose": camera_pose(world, "external").tolist(),
            },
            "step": self._steps,
            "outcome": self._outcome(),
            "milestones": [words for key, words in status.items() if self._info.get(key)],
            "gripper": _gripper(np.concatenate([position, rotation, [world.servo.opening()]])),
            "arm": [data.xpos[world.model.body(name).id].tolist() for name in LINKS],
            "things": [{"name": n, "vertices": v.tolist()} for n, v in _boxes(world).items()],
            "trail": self._trail,
        }


def _boxes(world: World) -> dict[str, Array]:
    """Object → its true box [8, 3], external camera's frame, in the order that SPEAR-VLM answers in."""
    pose, boxes = camera_pose(world, "external"), object_boxes(world)
    return {
        body.name: order_vertices((boxes[i + 1] - pose[:3, 3]) @ pose[:3, :3])
        for i, body in enumerate(world.bodies)
    }


def _gripper(state: Array) -> View:
    return {"position": state[:3].tolist(), "rotation": state[3:7].tolist(), "opening": float(state[7])}


def _jpeg(image: Array) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(encode_jpeg(image, quality=88)).decode()
