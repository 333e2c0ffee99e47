"""The page in a real Chromium: it draws at the right places, and its buttons and gestures work.

The expressions that `Tab.run` and `Tab.wait` evaluate are JavaScript. In the page's scripts `view`
is all that the page shows, `picture` is the image of the external camera, and `memory` contains
what the page knows about earlier steps.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from browser import TIMEOUT_S, Tab, run_chromium
from data_tiny import make_episode
from processes import wait_until
from serve_here import run_server
from spear.data.store.episode_store import append_episodes
from spear.policy import Spear1Policy
from spear.serve.connection import ConnectionLimits
from spear.serve.server import PolicyServer

pytest.importorskip("mujoco")

from spear.ui import page as pages
from spear.ui.episodes import EpisodeFolder
from spear.ui.page import Page

FRAME = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
"""JavaScript that waits until the page has drawn its next frame."""
PAINTED = """((canvas, name) => {
  const probe = document.createElement("canvas").getContext("2d");
  probe.fillStyle = color(name);
  probe.fillRect(0, 0, 1, 1);
  const want = probe.getImageData(0, 0, 1, 1).data;
  const { width, height } = canvas;
  const data = canvas.getContext("2d").getImageData(0, 0, width, height).data;
  let found = [0, 1e9, 1e9, -1, -1];
  for (let i = 0; i < width * height; i++)
    if (data[4 * i + 3] > 200 && [0, 1, 2].every(k => Math.abs(data[4 * i + k] - want[k]) < 24)) {
      const x = i % width;
      const y = Math.floor(i / width);
      const [count, left, top, right, bottom] = found;
      found = [
        count + 1,
        Math.min(left, x),
        Math.min(top, y),
        Math.max(right, x),
        Math.max(bottom, y),
      ];
    }
  return found;
})"""
"""JavaScript function from a canvas and the name of a color to the [count, left, top, right,
bottom] of the canvas's pixels of this color."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a running browser's DevTools."""
    with run_chromium(tmp_path_factory.mktemp("chromium")) as port:
        yield port


@pytest.fixture(scope="module")
def server(browser: int, renderer: Any) -> Iterator[PolicyServer]:
    """A server with the page. The fixture `renderer` skips tests on machines that cannot render."""
    policy = Spear1Policy.load("nano", steps=2)
    max_message_bytes = 2**20
    page = Page(policy, name="nano", token=None, max_message_bytes=max_message_bytes)
    limits = ConnectionLimits(max_message_bytes=max_message_bytes)
    with run_server(policy, page=page, limits=limits) as running_server:
        yield running_server


@pytest.fixture
def tab(browser: int, server: PolicyServer) -> Iterator[Tab]:
    """A tab that shows the page. The test fails if the page's scripts have errors."""
    opened_tab = Tab(browser)
    opened_tab.open(f"http://127.0.0.1:{server.port}/")
    wait_until_settled(opened_tab)
    yield opened_tab
    assert opened_tab.errors == []
    leave_page(opened_tab)


def leave_page(tab: Tab) -> None:
    """Close the websocket of the page, since the server allows few tabs (`MAX_TABS`)."""
    tab.call("Page.navigate", url="about:blank")


def wait_until_settled(tab: Tab, condition: str = "true") -> None:
    """Wait until the page has got and drawn everything, and a JavaScript condition is true."""
    is_drawn = (
        "typeof view === 'object' && view.images && picture.complete && !waiting && !view.running"
    )
    tab.wait(f"{is_drawn} && {condition}")
    tab.run(FRAME)


def find_painted_pixels(tab: Tab, canvas: str, color_name: str) -> list[int]:
    """Return the number and the bounds of a canvas's pixels that have one of the page's colors.

    The page's colors are "answer" (the model's boxes), "truth" (the true boxes) and "accent".

    Returns:
        [count, left, top, right, bottom]
    """
    tab.run(FRAME)
    script = f"{PAINTED}(document.querySelector('{canvas}'), '{color_name}')"
    return [int(value) for value in tab.run(script)]


# ---- Boxes.


def test_boxes_of_the_model_are_drawn_and_listed(tab: Tab) -> None:
    count_before, *_ = find_painted_pixels(tab, "#camera", "answer")

    tab.click("#objects button.all")
    wait_until_settled(tab, "view.boxes.length > 1")

    count, *_ = find_painted_pixels(tab, "#camera", "answer")
    num_rows = tab.run("document.querySelectorAll('#answers tbody tr').length")
    assert count_before == 0
    assert count > 300  # pixels: the lines of at least one box
    assert num_rows == tab.run("view.boxes.length + view.absent.length")


def test_absent_objects_are_listed_with_the_rate_of_this_mistake(tab: Tab) -> None:
    tab.run("show({step: 0, boxes: [], absent: ['zebra']})")

    shown_lines = tab.run("document.querySelector('#answers').innerText").splitlines()
    assert shown_lines == [
        "step 0; of held-out things that are there 9 % are not found",
        "zebra: not found",
    ]


def test_true_boxes_are_drawn_where_they_project_to(tab: Tab) -> None:
    """The boxes are drawn on an empty picture, and compared with those of a pinhole camera."""
    tab.click("#truth")
    tab.run(
        "(() => { const c = document.createElement('canvas'); c.width = picture.naturalWidth;"
        " c.height = picture.naturalHeight; picture.src = c.toDataURL(); })()"
    )
    tab.wait("picture.complete")

    count, *drawn_bounds = find_painted_pixels(tab, "#camera", "truth")

    width = tab.run("document.querySelector('#camera').width")
    height = tab.run("document.querySelector('#camera').height")
    assert count > 100
    assert abs(width / height - tab.run("view.camera.aspect")) < 0.01
    vertices = np.concatenate([entry["vertices"] for entry in tab.run("view.things")])  # [n, 3]
    focal_px = height * tab.run("view.camera.focal")
    center = np.array([width, height]) / 2
    pixels = center + focal_px * vertices[:, :2] / vertices[:, 2:]
    left, top = np.clip(pixels.min(0), 0, [width - 1, height - 1])
    right, bottom = np.clip(pixels.max(0), 0, [width - 1, height - 1])
    # The lines are dashed, and may begin with a gap.
    np.testing.assert_allclose(drawn_bounds, [left, top, right, bottom], atol=6)


# ---- Buttons.


def test_a_predicted_chunk_is_drawn(tab: Tab) -> None:
    count_before, *_ = find_painted_pixels(tab, "#space", "accent")

    tab.click("#predict")
    wait_until_settled(tab, "view.chunk")

    count, *_ = find_painted_pixels(tab, "#space", "accent")
    chunk_text = tab.run("document.querySelector('#chunk').textContent")
    assert count_before == 0
    assert count > 100
    assert chunk_text.startswith("from step 0 · 5 actions")


def test_the_run_button_starts_and_stops(tab: Tab) -> None:
    tab.click("#run")
    tab.wait("view.running")
    assert tab.run("document.querySelector('#run').textContent") == "Stop"

    tab.wait("view.step >= 3")
    tab.click("#run")
    wait_until_settled(tab)

    assert tab.run("document.querySelector('#run').textContent") == "Start"
    assert not tab.run("document.querySelector('#step').disabled")


def test_a_reset_takes_the_seed_and_drops_the_chunk(tab: Tab) -> None:
    tab.click("#predict")
    wait_until_settled(tab, "view.chunk")

    tab.type("#seed", "4")
    tab.click("#reset")
    wait_until_settled(tab, "view.seed === 4 && view.step === 0")

    assert tab.run("view.chunk") is None


@pytest.fixture
def other_scene(tab: Tab) -> Tab:
    """The tab `tab`, which now shows the scene of seed 4.

    The model finds the first object of this scene, whose name is `view.objects[0]`.
    """
    tab.type("#seed", "4")
    tab.click("#reset")
    wait_until_settled(tab, "view.seed === 4 && view.step === 0")
    return tab


def test_a_followed_object_is_located_at_each_step(other_scene: Tab) -> None:
    tab = other_scene
    tab.type("#object", tab.run("view.objects[0]"))
    tab.enter()
    tab.wait("view.boxes.length === 1")

    tab.click("#follow")
    wait_until_settled(tab)
    tab.click("#step")

    tab.wait("view.step === 1 && view.boxes[0].step === 1")


def test_an_answer_stays_with_its_question(other_scene: Tab) -> None:
    tab = other_scene
    tab.type("#question", "How far away is the " + tab.run("view.objects[0]") + "?")
    tab.enter()
    wait_until_settled(tab, "view.answer")
    assert tab.run("document.querySelector('#answer').textContent") == tab.run("view.answer.text")

    tab.type("#question", "another one")

    assert "How far away" in tab.run("document.querySelector('#answer-of').textContent")


# ---- Time.


BELONGS_TEXT = "document.querySelector('#belongs').textContent"
"""JavaScript for the text that says to which step the shown boxes belong."""


@pytest.fixture
def pictures(tab: Tab) -> list[str]:
    """Executes three steps in the tab. The pictures of steps 0 to 3, as data URIs."""
    sources = [tab.run("picture.src")]
    for step in range(1, 4):
        tab.click("#step")
        wait_until_settled(tab, f"view.step === {step}")
        sources.append(tab.run("picture.src"))
    return sources


def go_back_to_step_1(tab: Tab) -> None:
    """Go back in time by two steps, from step 3."""
    tab.key("ArrowLeft")
    tab.key("ArrowLeft")
    wait_until_settled(tab)


def test_the_arrow_keys_go_back_in_time(tab: Tab, pictures: list[str]) -> None:
    go_back_to_step_1(tab)

    steps = tab.run("[view.step, view.chunk.step, +document.querySelector('#scrub').value]")
    progress_text = tab.run("document.querySelector('#progress').textContent")
    assert steps == [1, 1, 1]
    assert len(set(pictures)) == 4
    assert tab.run("picture.src") == pictures[1]
    assert progress_text.startswith("step 1 of 60")


def test_paths_before_and_after_both_have_where_the_gripper_is(
    tab: Tab, pictures: list[str]
) -> None:
    """The path before has steps 0 and 1, and the path after steps 1, 2 and 3."""
    go_back_to_step_1(tab)

    assert tab.run("memory.paths().map(p => p.length)") == [2, 3]


def test_boxes_belong_to_the_step_at_which_they_were_asked_for(
    tab: Tab, pictures: list[str]
) -> None:
    go_back_to_step_1(tab)
    tab.click("#objects button.all")
    wait_until_settled(tab, "view.boxes.length && view.boxes[0].step === 1")
    belongs_text = tab.run(BELONGS_TEXT)
    assert belongs_text.startswith("step 1 · centers in meters in the camera’s frame")
    assert tab.run("memory.marks()") == [1]  # the marked steps of the time line

    tab.key("Home")

    assert tab.run("[view.step, view.boxes.length]") == [0, 0]


def test_playing_shows_the_steps_up_to_the_last(tab: Tab, pictures: list[str]) -> None:
    go_back_to_step_1(tab)
    tab.click("#objects button.all")
    wait_until_settled(tab, "view.boxes.length && view.boxes[0].step === 1")
    tab.key("Home")

    tab.click("#play")
    tab.wait("view.step === 3 && !playing")

    assert tab.run("picture.src") == pictures[3]
    assert tab.run(BELONGS_TEXT).startswith("step 1, not of step 3")


def test_a_film_is_downloaded(tab: Tab, pictures: list[str], tmp_path: Path) -> None:
    tab.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))

    tab.click("#film")

    wait_until((tmp_path / "put_on-0.mp4").is_file, "the film", timeout_s=TIMEOUT_S)


def fail_request_for_step_2(tab: Tab) -> None:
    """Let the page forget step 2, ask for it, get a problem as answer, and go to this step."""
    tab.run("memory.moments.delete(2); memory.asked = 2; show({problem: 'it is broken'}); seek(2)")


def test_a_moment_whose_request_failed_is_not_asked_for_again(
    tab: Tab, pictures: list[str]
) -> None:
    fail_request_for_step_2(tab)

    assert tab.run("[memory.asked, view.late]") == [None, True]


def test_a_lost_connection_is_made_anew(tab: Tab, pictures: list[str]) -> None:
    fail_request_for_step_2(tab)

    tab.run("socket.close(); memory.moments.delete(2); seek(2)")
    assert tab.run("[view.late, view.gripper, view.step]") == [True, None, 2]

    tab.wait("socket.readyState === 1 && !view.late && !waiting")  # 1: open

    # The new connection begins with the first scene.
    assert tab.run("[view.step, document.querySelector('#problem').hidden]") == [0, True]
    tab.errors.clear()  # Chromium reports the lost connection


def test_the_wrist_camera_shows_its_image(tab: Tab) -> None:
    tab.run("show({step: 0, images: {...view.images, wrist: view.images.external}})")

    assert tab.run("document.querySelector('#wrist').src === picture.src")


def test_a_tab_too_many_is_told_that_the_server_is_busy(
    tab: Tab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "MAX_TABS", 0)

    tab.run("socket.close()")

    tab.wait("document.querySelector('#problem').textContent.startsWith('busy: ')")
    tab.errors.clear()  # Chromium reports the refused connection


# ---- Phones.

PHONE_WIDTH_PX = 390
PHONE_HEIGHT_PX = 844


@pytest.fixture
def phone_tab(
    browser: int, server: PolicyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Tab]:
    """A phone that shows a recorded episode with a very long instruction."""
    append_episodes(
        [make_episode(0, num_steps=11, instruction="a very long instruction " * 9)], tmp_path
    )
    monkeypatch.setattr(server.page._shared, "episode_folder", EpisodeFolder(tmp_path))
    opened_tab = Tab(browser)
    opened_tab.open(
        f"http://127.0.0.1:{server.port}/", PHONE_WIDTH_PX, PHONE_HEIGHT_PX, is_phone=True
    )
    wait_until_settled(opened_tab)
    opened_tab.run("document.querySelector('#replay').click()")
    wait_until_settled(opened_tab, "view.source === 'recording'")
    yield opened_tab
    assert opened_tab.errors == []
    leave_page(opened_tab)


def test_the_page_fits_a_phone(phone_tab: Tab) -> None:
    assert phone_tab.run("document.documentElement.scrollWidth") <= PHONE_WIDTH_PX


def test_buttons_are_large_enough_for_fingers(phone_tab: Tab) -> None:
    heights_px = phone_tab.run(
        "[...document.querySelectorAll('button')].map(b => b.offsetHeight).filter(h => h)"
    )

    assert len(heights_px) > 8  # the visible buttons, of which the page has more than eight
    assert min(heights_px) >= 40


def test_answers_fit_a_phone(phone_tab: Tab) -> None:
    box = {
        "name": "yellow cube",
        "vertices": [[-0.1, -0.1, 1.0]] * 8,
        "step": 0,
        "within_mm": 222,
        "error_mm": 222,
    }

    phone_tab.run(f"show({json.dumps({'step': 0, 'boxes': [box]})})")

    right = "(e => e.getBoundingClientRect().right)(document.querySelector('{}'))"
    right_of_answers = phone_tab.run(right.format("#answers td:last-child"))
    right_of_form = phone_tab.run(right.format("#box-form"))
    assert right_of_answers <= right_of_form


def test_a_finger_on_the_track_chooses_the_step(phone_tab: Tab) -> None:
    """The finger ends in the middle of the track, which is step 5 of 0 to 10."""
    phone_tab.touch("#track", (0.1, 0.5, 0.5, 0.5))
    wait_until_settled(phone_tab)

    assert phone_tab.run("[view.step, picture.naturalWidth]") == [5, 80]  # recorded images


def test_one_finger_turns_the_space_and_two_bring_it_nearer(phone_tab: Tab) -> None:
    """`space.yaw` is the camera's angle in radians, `space.away` its distance from its target."""
    yaw, away = phone_tab.run("[space.yaw, space.away]")

    phone_tab.touch("#space", (0.2, 0.5, 0.6, 0.5))

    turned_yaw, turned_away = phone_tab.run("[space.yaw, space.away]")
    assert abs(turned_yaw - yaw) > 0.2
    assert turned_away == away

    # The distance between two fingers grows from 0.2 to 0.6 of the width.
    phone_tab.touch("#space", (0.4, 0.5, 0.2, 0.5), (0.6, 0.5, 0.8, 0.5))

    nearer_yaw, nearer_away = phone_tab.run("[space.yaw, space.away]")
    assert nearer_yaw == turned_yaw
    assert nearer_away == pytest.approx(away / 3, rel=0.02)
