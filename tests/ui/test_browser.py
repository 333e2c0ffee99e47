"""The page in a real Chromium: it draws what is true, and its buttons do what they say."""

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
from spear.data.store.episode_store import write_episodes
from spear.policy import Spear1Policy
from spear.serve.connection import ConnectionLimits
from spear.serve.server import PolicyServer

pytest.importorskip("mujoco")

from spear.ui import page as pages
from spear.ui.episodes import EpisodeFolder
from spear.ui.page import Page

FRAME = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
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


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with run_chromium(tmp_path_factory.mktemp("chromium")) as running:
        yield running


@pytest.fixture(scope="module")
def server(browser: int, renderer: Any) -> Iterator[PolicyServer]:
    """`renderer`: skips where nothing can be rendered."""
    policy = Spear1Policy.load("nano", steps=2)
    page = Page(policy, "nano", None, 2**20)
    with run_server(policy, page=page, limits=ConnectionLimits(max_message_bytes=2**20)) as running:
        yield running


@pytest.fixture
def tab(browser: int, server: PolicyServer) -> Iterator[Tab]:
    opened = Tab(browser)
    opened.open(f"http://127.0.0.1:{server.port}/")
    wait_until_settled(opened)
    yield opened
    assert opened.errors == []
    leave_page(opened)


def leave_page(tab: Tab) -> None:
    """The server allows `pages.MAX_TABS` tabs at a time, fewer than there are tests."""
    tab.call("Page.navigate", url="about:blank")


def wait_until_settled(tab: Tab, what: str = "true") -> None:
    """Everything that was asked for is there and drawn, and `what` holds."""
    drawn = (
        "typeof view === 'object' && view.images && picture.complete && !waiting && !view.running"
    )
    tab.wait(f"{drawn} && {what}")
    tab.run(FRAME)


def find_painted_pixels(tab: Tab, canvas: str, name: str) -> list[int]:
    """[count, left, top, right, bottom] of a canvas's pixels that have one of the page's colors."""
    tab.run(FRAME)
    return [int(v) for v in tab.run(f"{PAINTED}(document.querySelector('{canvas}'), '{name}')")]


def test_boxes_are_drawn_where_they_project_to(tab: Tab) -> None:
    assert find_painted_pixels(tab, "#camera", "answer")[0] == 0
    tab.click("#objects button.all")
    wait_until_settled(tab, "view.boxes.length > 1")
    assert find_painted_pixels(tab, "#camera", "answer")[0] > 300
    rows = tab.run("document.querySelectorAll('#answers tbody tr').length")
    assert rows == tab.run("view.boxes.length + view.absent.length")
    tab.run("show({step: 0, boxes: [], absent: ['zebra']})")
    shown_lines = tab.run("document.querySelector('#answers').innerText").splitlines()
    assert shown_lines == [
        "step 0; of held-out things that are there 9 % are not found",
        "zebra: not found",
    ]
    # the true boxes alone, on an empty picture of the same size: where the pinhole camera puts them
    tab.run("show({step: 0, boxes: [], absent: []})")
    tab.click("#truth")
    tab.run(
        "(() => { const c = document.createElement('canvas'); c.width = picture.naturalWidth;"
        " c.height = picture.naturalHeight; picture.src = c.toDataURL(); })()"
    )
    tab.wait("picture.complete")
    count, *drawn = find_painted_pixels(tab, "#camera", "truth")
    assert count > 100
    width, height = (
        tab.run(f"document.querySelector('#camera').{side}") for side in ("width", "height")
    )
    vertices = np.concatenate([t["vertices"] for t in tab.run("view.things")])
    assert abs(width / height - tab.run("view.camera.aspect")) < 0.01
    focal = height * tab.run("view.camera.focal")
    pixels = np.array([width, height]) / 2 + focal * vertices[:, :2] / vertices[:, 2:]
    expected = np.clip([*pixels.min(0), *pixels.max(0)], 0, [width - 1, height - 1] * 2)
    np.testing.assert_allclose(drawn, expected, atol=6)  # dashed lines may begin with a gap


# ---- Buttons.


def test_a_predicted_chunk_is_drawn(tab: Tab) -> None:
    assert find_painted_pixels(tab, "#space", "accent")[0] == 0

    tab.click("#predict")
    wait_until_settled(tab, "view.chunk")

    chunk_text = tab.run("document.querySelector('#chunk').textContent")
    assert find_painted_pixels(tab, "#space", "accent")[0] > 100
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
    """The tab with the scene of seed 4, whose first object the policy finds."""
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


@pytest.fixture
def pictures(tab: Tab) -> list[str]:
    """Steps the tab to step 3. The sources of the pictures of steps 0 … 3."""
    sources = [tab.run("picture.src")]
    for step in range(1, 4):
        tab.click("#step")
        wait_until_settled(tab, f"view.step === {step}")
        sources.append(tab.run("picture.src"))
    return sources


def go_back_to_step_1(tab: Tab) -> None:
    """From step 3."""
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
    go_back_to_step_1(tab)

    assert tab.run("memory.paths().map(p => p.length)") == [2, 3]


def test_boxes_belong_to_the_step_at_which_they_were_asked_for(
    tab: Tab, pictures: list[str]
) -> None:
    go_back_to_step_1(tab)
    tab.click("#objects button.all")
    wait_until_settled(tab, "view.boxes.length && view.boxes[0].step === 1")
    belongs_text = tab.run(BELONGS_TEXT)
    assert belongs_text.startswith("step 1 · centers in metres in the camera’s frame")
    assert tab.run("memory.marks()") == [1]

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
    """The page has asked for a step that it lacks, is told of a problem, and goes to that step."""
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

    tab.wait("socket.readyState === 1 && !view.late && !waiting")

    assert tab.run("[view.step, document.querySelector('#problem').hidden]") == [0, True]
    tab.errors.clear()


def test_the_wrist_camera_shows_its_image(tab: Tab) -> None:
    tab.run("show({step: 0, images: {...view.images, wrist: view.images.external}})")

    assert tab.run("document.querySelector('#wrist').src === picture.src")


def test_a_tab_too_many_is_told_that_the_server_is_busy(
    tab: Tab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "MAX_TABS", 0)

    tab.run("socket.close()")

    tab.wait("document.querySelector('#problem').textContent.startsWith('busy: ')")
    tab.errors.clear()


# ---- Phones.


@pytest.fixture
def phone_tab(
    browser: int, server: PolicyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Tab]:
    """A phone that shows a recorded episode with a very long instruction."""
    write_episodes(
        [make_episode(0, num_steps=11, instruction="a very long instruction " * 9)], tmp_path
    )
    monkeypatch.setattr(server.page._shared, "episode_folder", EpisodeFolder(tmp_path))
    opened = Tab(browser)
    opened.open(f"http://127.0.0.1:{server.port}/", 390, 844, phone=True)
    wait_until_settled(opened)
    opened.run("document.querySelector('#replay').click()")
    wait_until_settled(opened, "view.source === 'recording'")
    yield opened
    assert opened.errors == []
    leave_page(opened)


def test_the_page_fits_a_phone(phone_tab: Tab) -> None:
    assert phone_tab.run("document.documentElement.scrollWidth") <= 390


def test_buttons_are_large_enough_for_fingers(phone_tab: Tab) -> None:
    heights_px = phone_tab.run(
        "[...document.querySelectorAll('button')].map(b => b.offsetHeight).filter(h => h)"
    )

    assert len(heights_px) > 8
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
    phone_tab.touch("#track", (0.1, 0.5, 0.5, 0.5))
    wait_until_settled(phone_tab)

    assert phone_tab.run("[view.step, picture.naturalWidth]") == [5, 80]


def test_one_finger_turns_the_space_and_two_bring_it_nearer(phone_tab: Tab) -> None:
    yaw, away = phone_tab.run("[space.yaw, space.away]")

    phone_tab.touch("#space", (0.2, 0.5, 0.6, 0.5))

    turned_yaw, turned_away = phone_tab.run("[space.yaw, space.away]")
    assert abs(turned_yaw - yaw) > 0.2
    assert turned_away == away

    # Two fingers move three times as far apart
    phone_tab.touch("#space", (0.4, 0.5, 0.2, 0.5), (0.6, 0.5, 0.8, 0.5))

    nearer_yaw, nearer_away = phone_tab.run("[space.yaw, space.away]")
    assert nearer_yaw == turned_yaw
    assert nearer_away == pytest.approx(away / 3, rel=0.02)
