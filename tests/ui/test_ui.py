"""The page in the browser, over real sockets: who sees it, and how it answers one tab or several.

A tab sends requests, such as {"do": "step"}. The server answers with *updates*, parts of the
*view*, which is all that the tab shows. An update {"problem": …} ends the answer to a request; it
is None if nothing was wrong.
"""

import base64
import io
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from data_tiny import assemble_png, make_episode, make_png
from refusals import Command
from serve_here import http_get, run_server
from spear.chunks import DEFAULT_REPLAN_INTERVAL
from spear.data.store.episode_store import append_episodes
from spear.embodiments import load
from spear.errors import Notice
from spear.evaluate import film
from spear.evaluate.agents import PolicyAgent
from spear.evaluate.options import TabletopOptions
from spear.evaluate.vqa import ask
from spear.evaluate.vqa.calibration import Trust
from spear.policy import Spear1Policy, VlmBundle
from spear.serve.client import RemotePolicy
from spear.serve.connection import ConnectionLimits
from spear.serve.server import PolicyServer
from spear.types import Array, Episode
from spear.util.images import decode_image

pytest.importorskip("mujoco")

from spear.evaluate import closed_loop
from spear.sim.env import TabletopEnv
from spear.sim.render import compute_camera_pose, compute_instance_box_corners
from spear.ui import episodes
from spear.ui import page as pages
from spear.ui.episodes import EpisodeFolder
from spear.ui.page import Page
from spear.ui.tab import SharedModel

MAX_MESSAGE_BYTES = 2**20  # larger than every message of these tests
TIMEOUT_S = 240  # so long that only a server that hangs exceeds it
NUM_LAST_FRAMES = 5  # a film shows its last step for this many more frames


@pytest.fixture(scope="module")
def policy() -> Spear1Policy:
    """The shipped policy, with few flow steps, so that it is fast."""
    return Spear1Policy.load("nano", steps=2)


@pytest.fixture(scope="module")
def server(policy: Spear1Policy) -> Iterator[PolicyServer]:
    """A server with the page and without a token, which the tests of this file share."""
    page = Page(policy, "nano", token=None, max_message_bytes=MAX_MESSAGE_BYTES)
    limits = ConnectionLimits(max_message_bytes=MAX_MESSAGE_BYTES)
    with run_server(policy, page=page, limits=limits) as running:
        yield running


@pytest.fixture
def shared_model(server: PolicyServer) -> SharedModel:
    """The model and the episodes that all tabs of the server share."""
    return server.page._shared


class Tab:
    """The websocket of a tab, as the browser uses it; options: those of the connection.

    A new tab waits until the server has sent its first scene.
    """

    def __init__(self, server: PolicyServer, **options: Any) -> None:
        address = f"ws://127.0.0.1:{server.port}/ui"
        self.socket = connect(address, max_size=None, compression=None, proxy=None, **options)
        self.view: dict[str, Any] = {}
        self.receive_until(
            lambda update: "images" in self.view and update.get("problem", "") is None
        )

    def receive_until(self, is_last: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """Receive updates until `is_last` is true for one, and return them all."""
        updates = []
        while True:
            update = json.loads(self.socket.recv(timeout=TIMEOUT_S))
            updates.append(update)
            self.view |= update
            if is_last(update):
                return updates

    def send(self, message: bytes | str | dict[str, Any]) -> str | None:
        """Send a message and wait for the answer; return the problem with the message, or None."""
        self.socket.send(json.dumps(message) if isinstance(message, dict) else message)
        # The first update of a tab has a problem, too; "running" tells it from an answer.
        self.receive_until(lambda update: "problem" in update and "running" not in update)
        return self.view["problem"]

    def fail(self, request: str, **arguments: Any) -> str:
        """Send a request that must have a problem, and return the problem."""
        problem = self.send({"do": request, **arguments})
        assert problem is not None
        return problem

    def ask(self, request: str, **arguments: Any) -> dict[str, Any]:
        """Send a request that must have no problem, and return the view after it."""
        assert self.send({"do": request, **arguments}) is None
        return dict(self.view)

    def make_film(self) -> list[Array]:
        """Let the server make a film, and return its frames [h, w, 3]."""
        data = base64.b64decode(self.ask("film")["film"]["data"])
        with av.open(io.BytesIO(data)) as container:
            return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@contextmanager
def open_tab(server: PolicyServer, **options: Any) -> Iterator[Tab]:
    """Open a tab, and close it at the end of the `with` block."""
    tab = Tab(server, **options)
    with tab.socket:
        yield tab


@pytest.fixture
def tab(server: PolicyServer, renderer: Any) -> Iterator[Tab]:
    """An open tab. The fixture `renderer` skips the test on machines that cannot render."""
    with open_tab(server) as opened_tab:
        yield opened_tab


def decode_external(view: dict[str, Any]) -> Array:
    """Return the image [h, w, 3] of the external camera in a view."""
    return decode_image(base64.b64decode(view["images"]["external"].partition(",")[2]))


# The page's files, and who may see them


def test_the_page_has_a_content_security_policy(server: PolicyServer) -> None:
    status, headers, _ = http_get(server, "/")

    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'self'" in headers["Content-Security-Policy"]


def test_all_files_of_the_page_are_served_and_need_no_other_site(server: PolicyServer) -> None:
    _, _, html = http_get(server, "/")
    links = re.findall(r'(?:src|href)="([^"]+)"', html)
    paths = [link for link in links if not link.startswith("data:")]

    assert len(links) >= 4  # the search has found the page's scripts and its style sheet
    for path in paths:
        status, _, text = http_get(server, path)
        assert status == 200
        assert "://" not in text


def test_other_paths_are_not_found(server: PolicyServer) -> None:
    status, *_ = http_get(server, "/nowhere")

    assert status == 404


@pytest.mark.parametrize("path", ["/", "/ui.js"])
def test_a_server_without_a_page_has_no_files(path: str) -> None:
    with run_server() as server:
        status, *_ = http_get(server, path)

    assert status == 404


@pytest.fixture(scope="module")
def server_with_token(policy: Spear1Policy) -> Iterator[PolicyServer]:
    """A server whose page asks for the token "secret"."""
    page = Page(policy, "nano", token="secret", max_message_bytes=MAX_MESSAGE_BYTES)
    with run_server(policy, token="secret", page=page) as server:
        yield server


@pytest.mark.parametrize(
    "path", ["/", "/?token=wrong", "/ui.js", "/memory.js", "/space.js", "/timeline.js"]
)
def test_the_page_asks_for_the_token(server_with_token: PolicyServer, path: str) -> None:
    status, _, body = http_get(server_with_token, path)

    assert status == 401
    assert "secret" not in body
    assert 'name="token"' in body


def test_a_tab_without_the_token_is_refused(server_with_token: PolicyServer, renderer: Any) -> None:
    with pytest.raises(InvalidStatus, match="401"):
        Tab(server_with_token)


def test_the_token_is_exchanged_for_a_cookie(
    server_with_token: PolicyServer, renderer: Any
) -> None:
    """The page that is opened with the token redirects, and its cookie is the key from then on."""
    status, headers, _ = http_get(server_with_token, "/?token=secret")

    assert status == 303
    assert headers["Location"] == "/"
    cookie, *attributes = headers["Set-Cookie"].split("; ")
    assert "secret" not in cookie
    assert {"HttpOnly", "SameSite=Strict"} <= set(attributes)

    status_with_cookie, *_ = http_get(server_with_token, "/", Cookie=cookie)
    status_with_wrong_cookie, *_ = http_get(server_with_token, "/", Cookie=cookie[:-1])
    assert status_with_cookie == 200
    assert status_with_wrong_cookie == 401

    tab_headers = {"Cookie": f"other=1; {cookie}"}
    with open_tab(server_with_token, additional_headers=tab_headers) as tab:
        assert tab.view["source"] == "simulator"


@pytest.mark.parametrize("path", [*pages.SUBTYPE_BY_PATH, "/ui"])
def test_other_sites_get_nothing(server: PolicyServer, path: str) -> None:
    status, *_ = http_get(server, path, Host=f"evil.example:{server.port}")

    assert status == 403


def test_other_sites_open_no_tab(server: PolicyServer, renderer: Any) -> None:
    with pytest.raises(InvalidStatus, match="403"):
        Tab(server, origin="http://evil.example")

    Tab(server, origin=f"http://127.0.0.1:{server.port}").socket.close()  # the page itself may


def test_the_number_of_tabs_is_bounded(
    server: PolicyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "MAX_TABS", 0)

    with pytest.raises(InvalidStatus, match="503"):
        Tab(server)


# An episode in the simulator


@pytest.fixture
def passed_views(tab: Tab) -> list[dict[str, Any]]:
    """The views of steps 0 to 3. Another instruction leads to the last step."""
    views = [tab.ask("reset", family="put_on", seed=2)]
    task = views[0]["told"]
    for instruction in (task, task, "wave"):
        tab.ask("instruct", text=instruction)
        views.append(tab.ask("step"))
    tab.ask("instruct", text=task)
    return views


def test_an_episode_begins_without_a_chunk(tab: Tab) -> None:
    view = tab.ask("reset", family="put_on", seed=2)

    assert view["step"] == 0
    assert view["chunk"] is None
    assert view["outcome"] is None


def test_every_step_can_be_looked_at_again(tab: Tab, passed_views: list[dict[str, Any]]) -> None:
    for step, passed_view in enumerate(passed_views):
        view = tab.ask("look", step=step)

        assert passed_view["step"] == step
        for key in ("images", "gripper", "things", "arm"):
            assert view[key] == passed_view[key]


def test_boxes_can_be_asked_for_at_an_earlier_step(tab: Tab) -> None:
    """The answer for step 0 is the same at step 0 and later."""
    names = tab.view["objects"][:1]
    first_boxes = tab.ask("boxes", objects=names)["boxes"]
    tab.ask("step")

    new_boxes = tab.ask("boxes", objects=names)["boxes"]
    earlier_boxes = tab.ask("boxes", objects=names, step=0)["boxes"]

    assert new_boxes[0]["step"] == 1
    assert earlier_boxes == first_boxes


def test_a_chunk_predicted_again_has_the_same_noise(
    tab: Tab, passed_views: list[dict[str, Any]]
) -> None:
    # Each step begins with a new chunk, so the view of step 2 has the chunk predicted at step 1.
    assert DEFAULT_REPLAN_INTERVAL == 1

    chunk = tab.ask("predict", step=1)["chunk"]

    assert {**chunk, "ms": 0} == {**passed_views[2]["chunk"], "ms": 0}  # but for the time it took


def test_the_film_shows_every_step_with_its_instruction(
    tab: Tab, passed_views: list[dict[str, Any]]
) -> None:
    """A frame of the film has a caption `film.BAR_HEIGHT_PX` high, and the images below it."""
    frames = tab.make_film()

    assert len(frames) == len(passed_views) + NUM_LAST_FRAMES
    captions = [frame[: film.BAR_HEIGHT_PX].astype(float) for frame in frames]
    assert np.abs(captions[2] - captions[0]).mean() < 2  # the same instruction
    assert np.abs(captions[3] - captions[0]).mean() > 2  # another one

    shown_image = Image.fromarray(decode_external(passed_views[1]))
    aspect = shown_image.width / shown_image.height
    assert aspect == passed_views[1]["camera"]["aspect"]
    expected_image = shown_image.resize((round(film.HEIGHT_PX * aspect), film.HEIGHT_PX))
    filmed_image = frames[1][film.BAR_HEIGHT_PX :, : expected_image.width].astype(float)
    assert np.abs(filmed_image - expected_image).mean() < 6  # of 255, for the film's compression


def test_a_rollout_that_is_stopped_sends_each_step_that_it_made(
    tab: Tab, policy: Spear1Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_inferring = threading.Event()
    infer = policy.infer

    def infer_slowly(observation: Any) -> Any:
        is_inferring.set()
        time.sleep(0.2)
        return infer(observation)

    monkeypatch.setattr(policy, "infer", infer_slowly)
    tab.ask("start")
    assert is_inferring.wait(TIMEOUT_S)
    # Stop the rollout in the middle of step 1, and ask for one more step.
    for request in ("stop", "step"):
        tab.socket.send(json.dumps({"do": request}))

    updates = tab.receive_until(lambda update: "images" in update and update["step"] == 2)

    assert [update["step"] for update in updates if "images" in update] == [1, 2]


# Recorded episodes


@pytest.fixture
def recorded_episodes(
    shared_model: SharedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[Episode]:
    """Three recorded episodes of 4, 5 and 6 steps, which the page offers.

    The first is a success, the second a failure, and of the third nobody knows.
    """
    recorded_episodes = []
    for index, success in enumerate((True, False, None)):
        recorded_episodes.append(make_episode(index, num_steps=4 + index, success=success))
    append_episodes(recorded_episodes, tmp_path)
    monkeypatch.setattr(shared_model, "episode_folder", EpisodeFolder(tmp_path))
    return recorded_episodes


def test_a_recorded_episode_is_opened_with_its_track(
    tab: Tab, recorded_episodes: list[Episode]
) -> None:
    view = tab.ask("open", episode=1)

    assert view["source"] == "recording"
    assert view["limit"] == 4  # the last of 5 steps
    assert view["outcome"] is None  # only the last step has one
    np.testing.assert_allclose(view["track"]["position"], recorded_episodes[1].position, atol=1e-4)
    np.testing.assert_allclose(view["track"]["opening"], recorded_episodes[1].gripper, atol=1e-4)


def test_the_last_step_of_a_recording_shows_its_outcome(
    tab: Tab, recorded_episodes: list[Episode]
) -> None:
    tab.ask("open", episode=1)

    view = tab.ask("look", step=4)

    assert view["outcome"] == "failure"
    original = decode_image(recorded_episodes[1].images["external"][4])
    # The mean difference, of 255, that compressing the image again may cause.
    assert np.abs(decode_external(view).astype(float) - original).mean() < 6


def test_a_chunk_is_predicted_from_a_recorded_step(
    tab: Tab, recorded_episodes: list[Episode]
) -> None:
    tab.ask("open", episode=1)

    chunk = tab.ask("predict", step=2)["chunk"]

    assert chunk["step"] == 2
    np.testing.assert_allclose(chunk["positions"][0], recorded_episodes[1].position[2], atol=1e-5)


def test_a_recording_does_not_move(tab: Tab, recorded_episodes: list[Episode]) -> None:
    tab.ask("open", episode=1)

    assert "recording" in tab.fail("step")


def test_an_episode_that_is_not_there_is_refused(
    tab: Tab, recorded_episodes: list[Episode]
) -> None:
    assert "episode 3" in tab.fail("open", episode=3)


def test_a_recording_is_filmed(tab: Tab, recorded_episodes: list[Episode]) -> None:
    tab.ask("open", episode=1)

    assert len(tab.make_film()) == 5 + NUM_LAST_FRAMES


@pytest.mark.slow  # reads a recording again and again
def test_a_tab_may_be_dragged_through_a_recording(
    tab: Tab, recorded_episodes: list[Episode]
) -> None:
    """A tab asks for more steps than the server accepts messages per second."""
    tab.ask("open", episode=1)

    for number in range(3 * ConnectionLimits().max_small_frames_per_s):
        tab.ask("look", step=number % 5)


def test_the_film_of_a_closed_tab_is_given_up(
    server: PolicyServer,
    tab: Tab,
    recorded_episodes: list[Episode],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_composed = 0
    has_begun = threading.Event()

    def close_tab_and_compose(external: Array, *_: Any, **__: Any) -> Array:
        """Compose a frame of the film so slowly that the server sees that the tab is closed."""
        nonlocal num_composed
        num_composed += 1
        has_begun.set()
        tab.socket.close()
        time.sleep(1)
        return external

    tab.ask("open", episode=1)
    monkeypatch.setattr(film, "compose_frame", close_tab_and_compose)
    tab.socket.send(json.dumps({"do": "film"}))
    assert has_begun.wait(TIMEOUT_S)

    # Another tab gets its first scene after the film has ended, since one thread does all the work.
    Tab(server).socket.close()

    assert num_composed == 1


def test_a_folder_without_episodes_is_refused(tmp_path: Path, run_refused_command: Command) -> None:
    error = run_refused_command("serve", "--policy", "nano", "--ui", "--episodes", str(tmp_path))

    assert "--episodes" in error


def test_episodes_need_the_page(tmp_path: Path, run_refused_command: Command) -> None:
    assert "--ui" in run_refused_command("serve", "--policy", "nano", "--episodes", str(tmp_path))


# The cameras of the policy


@pytest.fixture
def inferred_cameras(policy: Spear1Policy, monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """A list to which each inference adds the keys of the images in its observation."""
    key_sets: list[set[str]] = []
    infer = policy.infer

    def infer_and_record(observation: dict[str, Any]) -> Any:
        key_sets.append({key for key in observation if "image" in key})
        return infer(observation)

    monkeypatch.setattr(policy, "infer", infer_and_record)
    return key_sets


@pytest.fixture
def image_sizes(
    policy: Spear1Policy, monkeypatch: pytest.MonkeyPatch
) -> dict[str, tuple[int, int]]:
    """The image sizes of a policy that takes only the external camera. A test may add cameras."""
    sizes = {"external": policy.image_sizes["external"]}
    monkeypatch.setattr(policy, "processor", replace(policy.processor, image_sizes=sizes))
    return sizes


@pytest.fixture
def three_camera_folder(
    shared_model: SharedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> EpisodeFolder:
    """A folder, which the page offers, of two episodes: with three cameras, and with the wrist's
    only."""
    images = make_episode(0, num_steps=4).images["external"]
    cameras = {"external": images, "wrist": images, "left": images}
    append_episodes(
        [
            make_episode(0, num_steps=4, images=cameras),
            make_episode(0, num_steps=4, images={"wrist": images}),
        ],
        tmp_path,
    )
    folder = EpisodeFolder(tmp_path)
    monkeypatch.setattr(shared_model, "episode_folder", folder)
    return folder


def test_a_policy_with_one_camera_gets_one_in_the_simulator(
    tab: Tab, image_sizes: dict[str, tuple[int, int]], inferred_cameras: list[set[str]]
) -> None:
    tab.ask("reset", family="put_on", seed=0)

    view = tab.ask("step")

    assert inferred_cameras == [{"observation/image"}]
    assert view["images"]["wrist"] is None
    assert len(tab.make_film()) == 2 + NUM_LAST_FRAMES  # of steps 0 and 1


def test_a_policy_with_one_camera_gets_one_of_a_recording(
    tab: Tab,
    image_sizes: dict[str, tuple[int, int]],
    three_camera_folder: EpisodeFolder,
    inferred_cameras: list[set[str]],
) -> None:
    tab.ask("open", episode=0)

    view = tab.ask("predict")

    assert inferred_cameras == [{"observation/image"}]
    assert view["images"]["wrist"] is None


def test_a_recording_without_the_external_camera_is_refused_and_the_last_one_stays(
    tab: Tab, image_sizes: dict[str, tuple[int, int]], three_camera_folder: EpisodeFolder
) -> None:
    tab.ask("open", episode=0)

    assert "external" in tab.fail("open", episode=1)
    tab.ask("look")


def test_a_policy_may_take_a_third_camera_of_a_recording(
    policy: Spear1Policy,
    image_sizes: dict[str, tuple[int, int]],
    three_camera_folder: EpisodeFolder,
) -> None:
    image_sizes["left"] = (96, 96)

    observation = three_camera_folder.open(0, policy).observation_at(1)

    image_keys = {key for key in observation if "image" in key}
    assert image_keys == {"observation/image", "observation/left_image"}


# Episodes of an evaluation


@pytest.fixture
def evaluated_chunks(
    policy: Spear1Policy,
    shared_model: SharedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[int, tuple[Array, Array]]:
    """Evaluates an episode of at most 7 steps, which the page then offers.

    The result is, for each step at which the policy inferred a chunk, the state [8] and the chunk
    [H, 8].
    """
    for module in (closed_loop, episodes):
        monkeypatch.setattr(module, "MAX_STEPS", 7)
    agent = PolicyAgent(policy, "nano", policy.identity)
    inference_of_step = {}

    def act_and_record(envs: Any, observations: Any) -> Any:
        chunks = PolicyAgent.choose_action_chunks(agent, envs, observations)
        [env] = envs
        inference_of_step[env.steps] = (observations[0]["observation/state"], chunks[0])
        return chunks

    monkeypatch.setattr(agent, "choose_action_chunks", act_and_record)
    options = TabletopOptions(
        num_scenes=1,
        tasks=("stack_cube",),
        out=tmp_path,
        replan_steps=2,
        execution="async",
        latency_ms=200.0,
    )
    closed_loop.evaluate_tabletop(agent, options)
    monkeypatch.setattr(shared_model, "episode_folder", EpisodeFolder(tmp_path))
    return inference_of_step


def test_an_evaluated_episode_is_run_again(
    tab: Tab, evaluated_chunks: dict[int, tuple[Array, Array]]
) -> None:
    tab.ask("open", episode=0)

    updates = tab.receive_until(lambda update: update.get("running") is False)

    assert tab.view["outcome"] == "time is up"
    assert tab.view["recorded"] == "recorded: failure, 7 steps"
    assert tab.view["milestones"][-1] == "as recorded"
    chunk_of_step = {
        update["chunk"]["step"]: update["chunk"] for update in updates if "chunk" in update
    }
    assert chunk_of_step.keys() == evaluated_chunks.keys()
    assert len(chunk_of_step) > 2
    for step, (state, actions) in evaluated_chunks.items():
        positions = chunk_of_step[step]["positions"]  # [H + 1, 3]
        translations = np.diff(positions, axis=0)
        np.testing.assert_allclose(positions[0], state[:3], atol=1e-4)
        np.testing.assert_allclose(translations, actions[:, :3], atol=1e-4)


def test_another_policy_does_not_run_an_evaluated_episode_again(
    tab: Tab,
    policy: Spear1Policy,
    evaluated_chunks: dict[int, tuple[Array, Array]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(policy, "steps", 3)  # of the flow, which are part of its identity

    assert "stack_cube 0 can be run again only" in tab.fail("open", episode=0)


def test_an_unfinished_evaluation_brings_a_notice(
    evaluated_chunks: dict[int, tuple[Array, Array]], tmp_path: Path
) -> None:
    (journal_file,) = tmp_path.glob("*.jsonl")
    with journal_file.open("a") as journal:
        journal.write('{"scenes": {"stack_cube": [1]}}\n')  # a second scene is planned

    with pytest.warns(Notice, match="1 scene is left"):
        EpisodeFolder(tmp_path)


# SPEAR-VLM's answers


def test_boxes_are_those_of_spear_vlm_with_their_true_errors(
    tab: Tab, policy: Spear1Policy
) -> None:
    """The page shows the first scene, of the family put_on and seed 0."""
    names = tab.view["objects"][:2]
    assert len(names) == 2
    env = TabletopEnv("put_on", policy.processor.image_sizes)
    env.reset(seed=0)
    prompts = [f"Provide the 3D bounding box coordinates of the {name}" for name in names]
    vlm = VlmBundle(policy.model.vlm, policy.processor)
    answers = vlm.answer([env.render()] * 2, prompts, "box_vertices")

    boxes = tab.ask("boxes", objects=names)["boxes"]

    pose = compute_camera_pose(env.world, "external")  # [4, 4] in the base frame
    for number, (box, answer) in enumerate(zip(boxes, answers, strict=True), start=1):
        vertices = np.reshape(answer.values, (8, 3))  # in the camera frame
        np.testing.assert_allclose(box["vertices"], vertices)
        true_center = compute_instance_box_corners(env.world)[number].mean(0)  # in the base frame
        center = pose[:3, :3] @ vertices.mean(0) + pose[:3, 3]
        error_mm = 1000 * np.linalg.norm(center - true_center)
        assert box["error_mm"] == pytest.approx(error_mm, abs=0.01)


@pytest.fixture
def relative_unit(policy: Spear1Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the model's 3D numbers be relative, instead of meters."""
    coordinates = replace(policy.processor.coordinates, unit="relative")
    monkeypatch.setattr(policy.processor, "coordinates", coordinates)


def test_nano_answers_in_meters(shared_model: SharedModel) -> None:
    assert shared_model.make_constant_state()["unit"] == "metre"


def test_the_page_names_the_cameras_that_it_does_not_show(
    shared_model: SharedModel, policy: Spear1Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    description = shared_model.make_constant_state()["model"]
    image_sizes = {**policy.image_sizes, "shoulder": (96, 96)}
    monkeypatch.setattr(Spear1Policy, "image_sizes", image_sizes)

    assert description == shared_model.name
    assert "also sees shoulder" in shared_model.make_constant_state()["model"]


@pytest.mark.usefixtures("relative_unit")
def test_boxes_in_relative_units_have_no_errors_in_meters(
    tab: Tab, shared_model: SharedModel
) -> None:
    [box] = tab.ask("boxes", objects=tab.view["objects"][:1])["boxes"]

    assert shared_model.make_constant_state()["unit"] == "relative"
    assert box["error_mm"] is None
    assert box["within_mm"] is None


@pytest.mark.usefixtures("relative_unit")
def test_distances_in_relative_units_are_said_in_units(tab: Tab) -> None:
    name = tab.view["objects"][0]

    answer = tab.ask("question", text=f"How far away is the {name}?")["answer"]

    assert re.search(r"\d\.\d{3} units", answer["text"])


def test_a_model_without_a_calibration_does_not_say_how_sure_it_is(
    shared_model: SharedModel, tab: Tab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_model, "trust", None)

    view = tab.ask("boxes", objects=[tab.view["objects"][0], "zebra"])

    assert [box["within_mm"] for box in view["boxes"]] == [None, None]
    assert view["absent"] == []


@pytest.fixture
def zebra_is_absent(shared_model: SharedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the model a calibrated one, for which a zebra is absent and all else is there."""
    trust = Trust("held-out scenes", {"box_vertices": 2.0}, names_present=1.0, names_absent=0.0)
    monkeypatch.setattr(shared_model, "trust", trust)

    def find_absent_objects_and_what_is_seen(
        vlm: Any, image: Any, names: list[str]
    ) -> dict[str, str]:
        return {name: "bowl" for name in names if name == "zebra"}

    monkeypatch.setattr(
        ask, "find_absent_objects_and_what_is_seen", find_absent_objects_and_what_is_seen
    )


@pytest.mark.usefixtures("zebra_is_absent")
def test_a_calibrated_model_says_how_sure_it_is_and_what_is_absent(tab: Tab) -> None:
    name = tab.view["objects"][0]

    view = tab.ask("boxes", objects=[name, "zebra"])

    [box] = view["boxes"]
    assert box["name"] == name
    assert box["within_mm"] > 0
    assert view["absent"] == ["zebra"]


@pytest.mark.usefixtures("zebra_is_absent")
def test_only_absent_objects_have_no_boxes(tab: Tab) -> None:
    assert tab.ask("boxes", objects=["zebra"])["boxes"] == []


# Photos

GRAY_PHOTO = make_png(120, width=300, height=200)


def test_a_photo_is_shown_without_a_scene(tab: Tab) -> None:
    assert tab.send(GRAY_PHOTO) is None

    assert tab.view["source"] == "photo"
    assert tab.view["things"] == []
    assert tab.view["camera"]["aspect"] == 300 / 200


def test_an_object_that_a_photo_does_not_show_is_absent(tab: Tab) -> None:
    tab.send(GRAY_PHOTO)

    assert tab.ask("boxes", objects=["mug"])["absent"] == ["mug"]


def test_boxes_in_a_photo_have_no_error(
    shared_model: SharedModel, tab: Tab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_model, "trust", None)  # so that the model answers in any case
    tab.send(GRAY_PHOTO)

    [box] = tab.ask("boxes", objects=["mug"])["boxes"]

    assert np.shape(box["vertices"]) == (8, 3)
    assert box["error_mm"] is None


def test_a_chunk_is_predicted_from_a_photo(tab: Tab) -> None:
    tab.send(GRAY_PHOTO)
    tab.ask("instruct", text="lift the mug")

    chunk = tab.ask("predict")["chunk"]

    assert np.shape(chunk["positions"]) == (6, 3)  # the gripper's position, and after 5 actions


def test_a_photo_does_not_move(tab: Tab) -> None:
    tab.send(GRAY_PHOTO)

    tab.ask("start")  # the server answers at once; the rollout reports the problem later

    tab.receive_until(lambda update: "photo" in (update.get("problem") or ""))


# Wrong requests


@pytest.mark.parametrize(
    ("message", "words"),  # the problem contains the words
    [
        ("nonsense", "nonsense"),
        ("[" * 5000, "[["),  # nested too deep for Python's JSON
        ("[" + 300_000 * "[]," + "[]]", "[[],[]"),  # far longer than a request
        ('{"do": ["reset"]}', "reset"),
        ({"do": "explode"}, "explode"),
        ({"do": "photo", "data": "x"}, "photo"),
        ({"do": "reset", "family": "put_onn", "seed": 0}, "put_onn"),
        ({"do": "reset", "family": 7, "seed": 0}, "task family '7'"),
        ({"do": "reset", "family": "put_on"}, "seed None"),
        ({"do": "boxes", "objects": "mug"}, "objects"),
        ({"do": "boxes", "objects": ["mug"] * 9}, "objects"),  # more than 8
        ({"do": "boxes", "objects": [{}]}, "object"),
        ({"do": "look", "step": 1}, "step "),  # the scene is at step 0
        ({"do": "look", "step": -1}, "step "),
        ({"do": "look", "step": True}, "step "),
        ({"do": "look", "step": "0"}, "step "),
        ({"do": "look", "step": 10**30}, "step "),
        ({"do": "open", "episode": 0}, "--episodes"),
        ({"do": "question", "text": "  "}, "question"),
        (b"GIF89a", "the image"),
        (GRAY_PHOTO[:200], "the image"),
        (make_png(120, width=300, height=8), "the image has 300 x 8"),  # too small
        (assemble_png((10_000, 10_000, 8, 2), b""), "10000 x 10000"),  # too large
    ],
)
def test_a_wrong_request_is_reported_in_one_line_and_the_next_one_works(
    server: PolicyServer, tab: Tab, message: bytes | str | dict[str, Any], words: str
) -> None:
    problem = tab.send(message)

    assert problem is not None
    assert words in problem
    assert "\n" not in problem
    assert tab.ask("look")["source"] == "simulator"


def test_a_chunk_needs_an_instruction(tab: Tab) -> None:
    tab.ask("instruct", text="")

    assert "prompt" in tab.fail("predict")


# Several tabs at once


def test_tabs_have_scenes_of_their_own(server: PolicyServer, tab: Tab) -> None:
    """The first tab runs an episode while the second one stays at the start of another scene."""
    tab.ask("reset", family="put_in_basket", seed=5)
    tab.ask("start")

    with open_tab(server) as second_tab:
        assert second_tab.view["running"] is False
        assert second_tab.view["step"] == 0
        second_tab.ask("reset", family="stack_cube", seed=1)
        tab.receive_until(lambda update: update.get("step", 0) >= 2)
        view = tab.ask("stop")
        other_view = second_tab.ask("predict")

    assert view["running"] is False
    assert view["family"] == "put_in_basket"
    assert other_view["step"] == 0
    assert other_view["family"] == "stack_cube"


def test_the_server_answers_others_while_a_tab_runs(server: PolicyServer, tab: Tab) -> None:
    tab.ask("start")

    status, *_ = http_get(server, "/healthz")
    assert status == 200
    with closing(RemotePolicy(f"ws://127.0.0.1:{server.port}")) as robot:
        assert robot.infer(load("generic").example())["actions"].shape == (5, 8)


def test_a_tab_that_is_closed_while_it_runs_leaves_the_page_working(
    server: PolicyServer, tab: Tab
) -> None:
    tab.ask("start")
    tab.socket.close()

    with open_tab(server) as second_tab:
        second_tab.ask("step")
