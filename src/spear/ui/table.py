"""What one tab of the page works with: something to look at, step by step, and a model that looks at it.

Everything here blocks and belongs to one thread, as a `spear.sim.render.Renderer` does. Results are parts of
the page's view, as plain JSON, which the page keeps by step.
"""

import base64
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from spear.embodiments.actions import compute_target_poses
from spear.embodiments.observations import MAX_IMAGE_SIDE_PX, read_image, read_prompt
from spear.errors import SpearError
from spear.evaluate import film as video
from spear.evaluate.vqa import ask
from spear.evaluate.vqa.calibration import Trust
from spear.labels.fit.box3d import BOX_EDGES
from spear.policy import Spear1Policy, VlmBundle
from spear.sim.scene import EXTERNAL_CAMERA_FOV_Y_DEG, FAMILIES, NOMINAL_START_POSITION_M
from spear.types import Array
from spear.ui.scenes import Recording, Scene, Shelf, View, whole
from spear.util.images import decode_image, load_image

Request = Mapping[str, Any]
LARGEST_SEED = 2**31 - 1
MOST_BOXES = 8
"""Objects that may be asked for at once (our choice)."""
NEUTRAL = np.array([[*NOMINAL_START_POSITION_M, 1, 0, 0, 0, 1]], np.float32)
"""The robot's state that a photo is given: gripper open, pointing down over the table."""
NOTHING_YET: View = {"chunk": None, "answer": None, "recorded": None, "things": [], "objects": []}


class Studio:
    """The model that all tabs share."""

    def __init__(self, policy: Spear1Policy, name: str, shelf: Shelf | None = None) -> None:
        self.policy, self.name, self.shelf = policy, name, shelf
        self.vlm = VlmBundle(policy.model.vlm, policy.processor)
        self.trust = Trust.load(policy.folder) if policy.folder else None

    def about(self) -> View:
        """What does not change: the model, its numbers' unit, the task families, the edges of a box."""
        return {
            "model": self.name,
            "unit": self.vlm.processor.coordinates.unit,
            "families": list(FAMILIES),
            "edges": [list(e) for e in BOX_EDGES],
            "default_fov": EXTERNAL_CAMERA_FOV_Y_DEG,
            "measured": self.trust and {"missed": 1 - self.trust.names_present},
            **(self.shelf.about if self.shelf else {}),
        }


class Table:
    """One tab's scene, recording or photo. What the page may ask for is a method of that name.

    Each takes the request, whose "step" is the step to look at (else the newest), and gives the part of the
    view that changes. Raises `SpearError` for whatever is wrong with a request. alive: is the tab still open?
    """

    def __init__(self, studio: Studio, alive: Callable[[], bool]) -> None:
        self._studio, self._alive = studio, alive
        self._scene: Scene | Recording | None = None
        self._asked: list[str] = []
        self._instruction, self._told, self._following = "", "", False

    @property
    def moves(self) -> bool:
        """Whether there is a robot that can act: not in a recording, and not once the episode is over."""
        scene = self._scene
        return isinstance(scene, Scene) and scene.look(scene.newest)["outcome"] is None

    def reset(self, request: Request) -> View:
        """The start of a scene, by its family and seed."""
        family, seed = (
            str(request.get("family"))[:40],
            whole("seed", request.get("seed"), LARGEST_SEED),
        )
        return self._begin(Scene(family, seed, self._studio.policy))

    def open(self, request: Request) -> View:
        """An episode of `spear serve --episodes`, by its number."""
        if self._studio.shelf is None:
            raise SpearError("there are no episodes: start the server with --episodes FOLDER")
        return self._begin(self._studio.shelf.open(request.get("episode"), self._studio.policy))

    def photo(self, request: Request) -> View:
        """A photo, as the data of its file."""
        pixels = load_image(request["data"], "the image", MAX_IMAGE_SIDE_PX)
        seen = {"external": read_image({"the image": pixels}, "the image")}
        photo = Recording(
            kind="photo", name="photo", picture=lambda _, view: seen.get(view), states=NEUTRAL
        )
        return self._begin(photo)

    def instruct(self, request: Request) -> View:
        """What the robot is to do from now on; whether boxes are asked for again after each of its steps."""
        text = request.get("text", self._instruction)
        self._instruction = text if isinstance(text, str) else ""
        self._following = request.get("follow", self._following) is True
        return {}

    def look(self, request: Request) -> View:
        """The pictures and the robot."""
        scene, step = self._at(request)
        return scene.look(step)

    def predict(self, request: Request) -> View:
        """The chunk of actions that the policy would take."""
        scene, step = self._at(request)
        return {"step": step, "chunk": self._predict(scene.observation(step), step)[1]}

    def step(self, _: Request) -> View:
        """Makes one step of 0.2 s, with a new look when the last chunk is used up."""
        scene, step = self._at({})
        if not isinstance(scene, Scene):
            raise SpearError(f"a {scene.kind} does not move: choose a scene of the simulator")
        if not self.moves:
            raise SpearError("this episode is over: reset it, or choose another scene")
        view: View = {}
        if scene.executor.needs_chunk():
            actions, view["chunk"] = self._predict(
                {**scene.observation(step), **scene.executor.committed_actions()}, step
            )
            arrival_tick = scene.executor.tick + scene.delay
            scene.executor.add_chunk(actions, arrival_tick=arrival_tick)
            self._told = self._instruction
        scene.execute(scene.executor.next_action(), self._told)
        view |= scene.look(scene.newest)
        if self._following and self._asked:
            view |= self.boxes({"objects": self._asked})
        return view

    def boxes(self, request: Request) -> View:
        """SPEAR-VLM's 3D boxes of objects, asked for at once; of a model of metres in the simulator also how
        far off they are. Where the model was calibrated, also within which distance (mm) they are, and which
        objects are absent."""
        names = request.get("objects")
        if not isinstance(names, list) or not 0 < len(names) <= MOST_BOXES:
            raise SpearError(f"objects {str(names)[:60]}: give a list of 1 to {MOST_BOXES} names")
        names = [read_prompt({"object": name}, "object") for name in names]
        scene, step = self._at(request)
        image, started = scene.observation(step)["observation/image"], time.perf_counter()
        vlm, trust, family = self._studio.vlm, self._studio.trust, "box_vertices"
        absent = ask.find_absent_objects(vlm, image, names) if trust and trust.tells_absent else {}
        there = [name for name in names if name not in absent]
        prompts = [f"Provide the 3D bounding box coordinates of the {name}" for name in there]
        answers = (
            vlm.answer([image] * len(there), prompts, family, distributions=True) if there else []
        )
        elapsed = time.perf_counter() - started
        metric = vlm.processor.coordinates.unit == "metre"
        things = scene.look(step).get("things", ()) if metric else ()
        truth = {thing["name"]: np.array(thing["vertices"]) for thing in things}
        found = []
        for name, answer in zip(there, answers, strict=True):
            vertices = np.reshape(answer.values, (8, 3))
            true = truth.get(name)
            off = (
                None
                if true is None
                else 1000 * float(np.linalg.norm(vertices.mean(0) - true.mean(0)))
            )
            within = None
            if metric and trust and answer.distribution is not None and family in trust.factors:
                low, high = trust.interval(family, answer.distribution)
                within = 1000 * float((high - low).mean()) / 2
            sure = {"error_mm": off, "within_mm": within}
            found.append({"name": name, "vertices": vertices.tolist(), "step": step, **sure})
        self._asked = names
        return {"step": step, "boxes": found, "absent": list(absent), "boxes_ms": 1000 * elapsed}

    def question(self, request: Request) -> View:
        """SPEAR-VLM's answer to any question, in words."""
        scene, step = self._at(request)
        asked = read_prompt({"question": request.get("text")}, "question")
        image = scene.observation(step)["observation/image"]
        _, said = ask.ask_question(self._studio.vlm, image, asked, trust=self._studio.trust)
        return {"step": step, "answer": {"question": asked, "text": said, "step": step}}

    def film(self, _: Request) -> View:
        """All steps so far as a film."""
        scene, newest = self._at({})
        video.import_encoder()

        def frames() -> Iterator[Array]:
            for look in map(scene.look, range(newest + 1)):
                if not self._alive():
                    raise SpearError("the film: nobody waits for it any more")
                data = [
                    base64.b64decode(uri.partition(",")[2])
                    for uri in look["images"].values()
                    if uri
                ]
                external, *wrist = map(decode_image, data)
                ended = {"success": True, None: None}.get(look["outcome"], False)
                yield video.compose_frame(
                    external, wrist[0] if wrist else None, look["told"] or "", ended
                )

        data = video.encode_film(frames(), scene.rate_hz)
        return {"film": {"name": f"{scene.name}.mp4", "data": base64.b64encode(data).decode()}}

    def _begin(self, scene: Scene | Recording) -> View:
        about = {"source": scene.kind, "rate_hz": scene.rate_hz}
        view = {
            **NOTHING_YET,
            **about,
            **scene.begins(),
            **scene.look(0),
        }  # else the last one stays
        self._scene, self._asked = scene, []
        self._instruction = view["instruction"] or self._instruction  # a photo brings none
        return view

    def _at(self, request: Request) -> tuple[Scene | Recording, int]:
        """The scene and the step."""
        if self._scene is None:
            raise SpearError("there is no picture yet: choose a scene or open a photo")
        newest, step = self._scene.newest, request.get("step")
        return self._scene, newest if step is None else whole("step", step, newest)

    def _predict(self, seen: View, step: int) -> tuple[Array, View]:
        """Actions [H, 8], and the chunk to draw: H + 1 poses, the first where the gripper is."""
        seen["prompt"] = read_prompt({"prompt": self._instruction})
        started = time.perf_counter()
        actions = self._studio.policy.infer(seen)["actions"]
        elapsed = time.perf_counter() - started
        state: Array = seen["observation/state"]
        positions, rotations = compute_target_poses(state, actions)
        return actions, {
            "step": step,
            "positions": [state[:3].tolist(), *positions.tolist()],
            "rotations": [state[3:7].tolist(), *rotations.tolist()],
            "openings": [float(state[7]), *(float(g) for g in actions[:, 7])],
            "ms": 1000 * elapsed,
        }
