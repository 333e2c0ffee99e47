"""Handles the requests of one tab of the page, which shows an episode and a model's answers to it.

The functions here block, and all must be called in one thread, because the renderer of the
simulator belongs to a thread. They return parts of the page's *view*, which is all that a tab
shows, as plain JSON. The page stores these parts by step.
"""

import base64
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from spear.embodiments.actions import compute_target_poses
from spear.embodiments.observations import (
    MAX_IMAGE_SIDE_PX,
    get_image_sizes,
    read_image,
    read_prompt,
)
from spear.errors import SpearError
from spear.evaluate import film
from spear.evaluate.vqa import ask
from spear.evaluate.vqa.calibration import Trust
from spear.labels.fit.box3d import BOX_EDGES
from spear.models.weights.folders import read_taught_question_types
from spear.policy import Spear1Policy, VlmBundle
from spear.sim.scene import EXTERNAL_CAMERA_FOV_Y_DEG, FAMILIES, NOMINAL_START_POSITION_M
from spear.types import Array
from spear.ui.episodes import (
    SHOWN_WIDTHS_PX,
    Episode,
    EpisodeFolder,
    PageState,
    PhotographedEpisode,
    SimulatedEpisode,
    validate_whole_number,
)
from spear.util.images import decode_image, load_image

Request = Mapping[str, Any]
Handler = Callable[[Request], PageState]

MAX_SEED = 2**31 - 1
MAX_BOXES = 8  # objects whose boxes may be asked for in one request
MM_PER_M = 1000
BOX_QUESTION_TYPE = "box_vertices"
PHOTO_STATE = np.array([[*NOMINAL_START_POSITION_M, 1, 0, 0, 0, 1]], np.float32)
"""[1, 8] the robot's state that the policy gets with a photo: the gripper is over the table, points
down and is open."""
EMPTY_PAGE_STATE: PageState = {
    "chunk": None,
    "answer": None,
    "recorded": None,
    "things": [],
    "objects": [],
}
"""Parts of the view that are emptied when another episode begins."""


class SharedModel:
    """The model that all tabs share, and the episodes that they may open."""

    def __init__(
        self, policy: Spear1Policy, name: str, episode_folder: EpisodeFolder | None = None
    ) -> None:
        self.policy = policy
        self.name = name
        self.episode_folder = episode_folder
        self.vlm = VlmBundle(policy.model.vlm, policy.processor)
        # How far the model's probabilities can be trusted; None if no evaluation measured this.
        self.trust = Trust.load(policy.folder) if policy.folder else None
        # The question types that the model was taught; None if they are not known.
        self.taught_types = read_taught_question_types(policy.folder) if policy.folder else None

    @property
    def is_vlm_unit_meters(self) -> bool:
        """Whether the model's 3D numbers are meters."""
        return self.vlm.processor.coordinates.unit == "metre"

    def make_constant_state(self) -> PageState:
        """Return the part of the view that never changes, such as the model and its unit.

        "measured" is what an evaluation has measured: how often the model takes an object that is
        in the picture for absent.
        """
        measured = {"missed": 1 - self.trust.names_present} if self.trust else None
        episodes = self.episode_folder.make_constant_state() if self.episode_folder else {}
        return {
            "model": self._describe_model(),
            "unit": self.vlm.processor.coordinates.unit,
            "families": list(FAMILIES),
            "edges": [list(edge) for edge in BOX_EDGES],
            "default_fov": EXTERNAL_CAMERA_FOV_Y_DEG,
            "measured": measured,
            **episodes,
        }

    def _describe_model(self) -> str:
        """Return the model's name, and which of its cameras the page does not show."""
        cameras = get_image_sizes(self.policy)
        hidden_cameras = [camera for camera in cameras if camera not in SHOWN_WIDTHS_PX]
        if not hidden_cameras:
            return self.name
        return f"{self.name} (also sees {', '.join(hidden_cameras)}, not shown here)"


class Tab:
    """One tab's episode or photo, with the handlers of the page's requests.

    Each handler takes a request and returns the part of the view that changes. Handlers that
    concern one step take its number from the request's "step"; by default it is the newest step.
    A handler raises `SpearError` if the request has a mistake.

    Args:
        shared_model: the model, which all tabs share.
        is_open: whether the tab is still open.
    """

    def __init__(self, shared_model: SharedModel, is_open: Callable[[], bool]) -> None:
        self._shared_model = shared_model
        self._is_open = is_open
        self._episode: Episode | None = None
        self._box_names: list[str] = []  # objects whose boxes were asked for last
        self._instruction = ""
        self._chunk_instruction = ""  # the instruction with which the current chunk was predicted
        self._keeps_boxes_updated = False  # whether to find the boxes again after each step
        self.handlers: dict[str, Handler] = {
            "reset": self.start_scene,
            "open": self.open_episode,
            "photo": self.open_photo,
            "instruct": self.set_instruction,
            "look": self.show_step,
            "predict": self.predict_chunk,
            "step": self.execute_step,
            "boxes": self.find_boxes,
            "question": self.answer_question,
            "film": self.make_film,
        }

    @property
    def can_move(self) -> bool:
        """Whether the robot can act, which it can in the simulator until the episode is over."""
        return isinstance(self._episode, SimulatedEpisode) and not self._episode.is_over

    def start_scene(self, request: Request) -> PageState:
        """Go to the start of a simulated scene, by its family and seed."""
        family = str(request.get("family"))[:40]
        seed = validate_whole_number("seed", request.get("seed"), MAX_SEED)
        return self._switch_to_episode(SimulatedEpisode(family, seed, self._shared_model.policy))

    def open_episode(self, request: Request) -> PageState:
        """Open an episode of `spear serve --episodes`, by its number."""
        folder = self._shared_model.episode_folder
        if folder is None:
            raise SpearError("there are no episodes. Start the server with --episodes FOLDER.")
        return self._switch_to_episode(
            folder.open(request.get("episode"), self._shared_model.policy)
        )

    def open_photo(self, request: Request) -> PageState:
        """Open a photo, from the data of its file."""
        name = "the image"  # in messages
        pixels = load_image(request["data"], name, largest_allowed_side_px=MAX_IMAGE_SIDE_PX)
        image = read_image({name: pixels}, name)  # checks the size as that of a robot's image
        photo = PhotographedEpisode(
            kind="photo",
            name="photo",
            load_image=lambda step, view: image if view == "external" else None,
            states=PHOTO_STATE,
        )
        return self._switch_to_episode(photo)

    def set_instruction(self, request: Request) -> PageState:
        """Set the robot's instruction ("text"), and whether boxes are found again after each step
        ("follow").
        """
        text = request.get("text", self._instruction)
        self._instruction = text if isinstance(text, str) else ""
        self._keeps_boxes_updated = request.get("follow", self._keeps_boxes_updated) is True
        return {}

    def show_step(self, request: Request) -> PageState:
        """Show the images and the robot at a step."""
        episode, step = self._get_episode_and_step(request)
        return episode.make_page_state_at(step)

    def predict_chunk(self, request: Request) -> PageState:
        """Show the chunk of actions that the policy would execute."""
        episode, step = self._get_episode_and_step(request)
        _, drawn_chunk = self._infer(episode.observation_at(step), step)
        return {"step": step, "chunk": drawn_chunk}

    def execute_step(self, _: Request) -> PageState:
        """Execute one action, which takes 0.2 s. If a new chunk is needed, infer it first."""
        episode, step = self._get_episode_and_step({})  # the newest step
        if not isinstance(episode, SimulatedEpisode):
            raise SpearError(f"a {episode.kind} does not move. Choose a scene of the simulator.")
        if episode.is_over:
            raise SpearError("this episode is over. Reset it, or choose another scene.")

        view: PageState = {}
        executor = episode.executor
        if executor.needs_chunk():
            observation = {**episode.observation_at(step), **executor.committed_actions()}
            actions, drawn_chunk = self._infer(observation, step)
            view["chunk"] = drawn_chunk
            # A simulated latency lets the chunk arrive some steps later.
            executor.add_chunk(actions, arrival_tick=executor.tick + episode.num_latency_steps)
            self._chunk_instruction = self._instruction
        episode.execute(executor.next_action(), self._chunk_instruction)
        view |= episode.make_page_state_at(episode.newest_step)
        if self._keeps_boxes_updated and self._box_names:
            view |= self.find_boxes({"objects": self._box_names})
        return view

    def find_boxes(self, request: Request) -> PageState:
        """Ask SPEAR-VLM for the 3D boxes of several objects at once, and remember their names.

        In the simulator the view has the error of each box's center ("error_mm"), if the model's
        unit is meters. If the model was calibrated, the view also has the half width of the
        interval around each box ("within_mm"), and the names of absent objects.
        """
        names = request.get("objects")
        if not isinstance(names, list) or not 0 < len(names) <= MAX_BOXES:
            raise SpearError(
                f"objects {str(names)[:60]} is not a list of 1 to {MAX_BOXES} names. Give one."
            )
        names = [read_prompt({"object": name}, "object") for name in names]
        episode, step = self._get_episode_and_step(request)
        image = episode.observation_at(step)["observation/image"]

        start_s = time.perf_counter()
        absent_names = self._find_absent_objects(image, names)
        present_names = [name for name in names if name not in absent_names]
        answers = self._ask_for_boxes(image, present_names)
        elapsed_s = time.perf_counter() - start_s

        true_centers = self._compute_true_centers(episode, step)
        boxes = []
        for name, answer in zip(present_names, answers, strict=True):
            vertices = np.reshape(answer.values, (8, 3))
            center = vertices.mean(0)  # [3]
            boxes.append(
                {
                    "name": name,
                    "vertices": vertices.tolist(),
                    "step": step,
                    "error_mm": _compute_distance_mm(center, true_centers.get(name)),
                    "within_mm": self._compute_half_interval_mm(answer),
                }
            )
        self._box_names = names
        return {
            "step": step,
            "boxes": boxes,
            "absent": absent_names,
            "boxes_ms": 1000 * elapsed_s,
        }

    def _find_absent_objects(self, image: Array, names: list[str]) -> list[str]:
        """Return the names of objects that are not in the image.

        The result is empty if it was not measured how far the model can be trusted (`Trust`), or if
        that measurement cannot tell absent objects from present ones.
        """
        trust = self._shared_model.trust
        if trust is None or not trust.can_tell_absent:
            return []
        return list(ask.find_absent_objects_and_what_is_seen(self._shared_model.vlm, image, names))

    def _ask_for_boxes(self, image: Array, names: list[str]) -> list[Any]:
        """Return the model's answer about each object's box, with its probabilities."""
        if not names:
            return []
        prompts = [f"Provide the 3D bounding box coordinates of the {name}" for name in names]
        return self._shared_model.vlm.answer(
            [image] * len(names), prompts, BOX_QUESTION_TYPE, distributions=True
        )

    def _compute_true_centers(self, episode: Episode, step: int) -> dict[str, Array]:
        """Return the true centers [3] of the objects' boxes by name, in meters.

        The result is empty outside the simulator, and for a model whose unit is not meters.
        """
        if not self._shared_model.is_vlm_unit_meters:
            return {}
        objects = episode.make_page_state_at(step).get("things", ())
        return {entry["name"]: np.array(entry["vertices"]).mean(0) for entry in objects}

    def _compute_half_interval_mm(self, answer: Any) -> float | None:
        """Return the calibrated half width of an answer's interval; None without a calibration."""
        trust = self._shared_model.trust
        if trust is None or BOX_QUESTION_TYPE not in trust.factors:
            return None
        if not self._shared_model.is_vlm_unit_meters or answer.distribution is None:
            return None
        # [24] each, in meters
        low, high = trust.compute_intervals(BOX_QUESTION_TYPE, answer.distribution)
        mean_width_m = float((high - low).mean())
        return MM_PER_M * mean_width_m / 2

    def answer_question(self, request: Request) -> PageState:
        """Ask SPEAR-VLM any question, and show its answer in words."""
        episode, step = self._get_episode_and_step(request)
        question = read_prompt({"question": request.get("text")}, "question")
        image = episode.observation_at(step)["observation/image"]
        _, answer = ask.ask_question(
            self._shared_model.vlm,
            image,
            question,
            settings=ask.AskSettings(
                trust=self._shared_model.trust, taught_types=self._shared_model.taught_types
            ),
        )
        return {"step": step, "answer": {"question": question, "text": answer, "step": step}}

    def make_film(self, _: Request) -> PageState:
        """Make a film of all steps so far."""
        episode, newest_step = self._get_episode_and_step({})
        film.import_pyav()
        frames = self._compose_film_frames(episode, newest_step)
        data = film.encode_film(frames, episode.rate_hz)
        encoded_data = base64.b64encode(data).decode()
        return {"film": {"name": f"{episode.name}.mp4", "data": encoded_data}}

    def _compose_film_frames(self, episode: Episode, newest_step: int) -> Iterator[Array]:
        """Yield the frames of a film until `newest_step`, as long as the tab is open."""
        for step in range(newest_step + 1):
            if not self._is_open():
                raise SpearError(
                    "the film is not made, because the tab was closed. Open the page again."
                )
            view = episode.make_page_state_at(step)
            external_image = _decode_data_uri(view["images"]["external"])
            wrist_uri = view["images"]["wrist"]
            wrist_image = _decode_data_uri(wrist_uri) if wrist_uri else None
            instruction = view["told"] or ""
            outcome = view["outcome"]  # None before the last step
            is_success = None if outcome is None else outcome == "success"
            yield film.compose_frame(external_image, wrist_image, instruction, success=is_success)

    def _switch_to_episode(self, episode: Episode) -> PageState:
        """Replace the tab's episode by another one, and return the view of its first step."""
        view = {
            **EMPTY_PAGE_STATE,
            "source": episode.kind,
            "rate_hz": episode.rate_hz,
            **episode.make_constant_state(),
            **episode.make_page_state_at(0),
        }
        self._episode = episode
        self._box_names = []
        if view["instruction"]:  # a photo has none, and the previous instruction stays
            self._instruction = view["instruction"]
        return view

    def _get_episode_and_step(self, request: Request) -> tuple[Episode, int]:
        """Return the episode, and the step that a request is about."""
        if self._episode is None:
            raise SpearError("there is no image yet. Choose a scene or open a photo.")
        newest_step = self._episode.newest_step
        step = request.get("step")
        if step is None:
            return self._episode, newest_step
        return self._episode, validate_whole_number("step", step, newest_step)

    def _infer(self, observation: dict[str, Any], step: int) -> tuple[Array, PageState]:
        """Infer a chunk of actions from what the policy sees at a step.

        Returns:
            The actions [H, 8], and the chunk for the page, which draws it as H + 1 poses: the
            present pose of the gripper and its pose after each action.
        """
        # `read_prompt` refuses an instruction that has no words or is too long.
        observation["prompt"] = read_prompt({"prompt": self._instruction})
        start_s = time.perf_counter()
        actions = self._shared_model.policy.infer(observation)["actions"]
        elapsed_s = time.perf_counter() - start_s

        state: Array = observation["observation/state"]
        positions, rotations = compute_target_poses(state, actions)
        chunk = {
            "step": step,
            "positions": [state[:3].tolist(), *positions.tolist()],
            "rotations": [state[3:7].tolist(), *rotations.tolist()],
            "openings": [float(state[7]), *actions[:, 7].tolist()],
            "ms": 1000 * elapsed_s,
        }
        return actions, chunk


def _compute_distance_mm(center: Array, true_center: Array | None) -> float | None:
    """Return the distance of two points [3] in meters; None if the true one is not known."""
    if true_center is None:
        return None
    return MM_PER_M * float(np.linalg.norm(center - true_center))


def _decode_data_uri(uri: str) -> Array:
    """Return the image [h, w, 3] in a data URI."""
    return decode_image(base64.b64decode(uri.partition(",")[2]))
