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


def test_what_the_buttons_do(tab: Tab) -> None:
    assert find_painted_pixels(tab, "#space", "accent")[0] == 0
    tab.click("#predict")
    wait_until_settled(tab, "view.chunk")
    assert find_painted_pixels(tab, "#space", "accent")[0] > 100
    assert tab.run("document.querySelector('#chunk').textContent").startswith(
        "from step 0 · 5 actions"
    )
    tab.click("#run")
    tab.wait("view.running")
    assert tab.run("document.querySelector('#run').textContent") == "Stop"
    tab.wait("view.step >= 3")
    tab.click("#run")
    wait_until_settled(tab)
    assert tab.run("document.querySelector('#run').textContent") == "Start"
    assert not tab.run("document.querySelector('#step').disabled")
    tab.type("#seed", "4")
    tab.click("#reset")
    wait_until_settled(tab, "view.seed === 4 && view.step === 0")
    assert tab.run("view.chunk") is None
    tab.type("#object", tab.run("view.objects[0]"))
    tab.enter()
    tab.wait("view.boxes.length === 1")
    tab.click("#follow")
    wait_until_settled(tab)
    tab.click("#step")
    tab.wait("view.step === 1 && view.boxes[0].step === 1")
    tab.type("#question", "How far away is the " + tab.run("view.objects[0]") + "?")
    tab.enter()
    wait_until_settled(tab, "view.answer")
    assert tab.run("document.querySelector('#answer').textContent") == tab.run("view.answer.text")
    tab.type("#question", "another one")
    assert "How far away" in tab.run("document.querySelector('#answer-of').textContent")


def test_time_goes_back_and_forth(
    tab: Tab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = [tab.run("picture.src")]
    for step in range(1, 4):
        tab.click("#step")
        wait_until_settled(tab, f"view.step === {step}")
        pictures.append(tab.run("picture.src"))
    tab.key("ArrowLeft")
    tab.key("ArrowLeft")
    wait_until_settled(tab)
    assert (
        tab.run("[view.step, view.chunk.step, +document.querySelector('#scrub').value]") == [1] * 3
    )
    assert tab.run("picture.src") == pictures[1] and len(set(pictures)) == 4
    assert tab.run("document.querySelector('#progress').textContent").startswith("step 1 of 60")
    assert tab.run("memory.paths().map(p => p.length)") == [2, 3]  # both have where the gripper is
    tab.click("#objects button.all")
    wait_until_settled(tab, "view.boxes.length && view.boxes[0].step === 1")
    belongs = "document.querySelector('#belongs').textContent"
    assert tab.run(belongs).startswith("step 1 · centers in metres in the camera’s frame")
    assert tab.run("memory.marks()") == [1]
    tab.key("Home")
    assert tab.run("[view.step, view.boxes.length]") == [0, 0]
    tab.click("#play")
    tab.wait("view.step === 3 && !playing")
    assert tab.run("picture.src") == pictures[3] and tab.run(belongs).startswith(
        "step 1, not of step 3"
    )
    tab.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    tab.click("#film")
    wait_until((tmp_path / "put_on-0.mp4").is_file, "the film", timeout_s=TIMEOUT_S)
    tab.run("memory.moments.delete(2); memory.asked = 2; show({problem: 'it is broken'}); seek(2)")
    assert tab.run("[memory.asked, view.late]") == [
        None,
        True,
    ]  # what failed is not asked for again
    tab.run("socket.close(); memory.moments.delete(2); seek(2)")
    assert tab.run("[view.late, view.gripper, view.step]") == [True, None, 2]
    tab.wait("socket.readyState === 1 && !view.late && !waiting")
    assert tab.run("[view.step, document.querySelector('#problem').hidden]") == [0, True]
    tab.run("show({step: 0, images: {...view.images, wrist: view.images.external}})")
    assert tab.run("document.querySelector('#wrist').src === picture.src")
    monkeypatch.setattr(pages, "MAX_TABS", 0)
    tab.run("socket.close()")
    tab.wait("document.querySelector('#problem').textContent.startsWith('busy: ')")
    tab.errors.clear()


def test_a_phone(
    browser: int, server: PolicyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_episodes(
        [make_episode(0, num_steps=11, instruction="a very long instruction " * 9)], tmp_path
    )
    monkeypatch.setattr(server.page._shared, "episode_folder", EpisodeFolder(tmp_path))
    tab = Tab(browser)
    tab.open(f"http://127.0.0.1:{server.port}/", 390, 844, phone=True)
    wait_until_settled(tab)
    tab.run("document.querySelector('#replay').click()")
    tab.wait("view.source === 'recording'")
    assert tab.run("document.documentElement.scrollWidth") <= 390
    heights = tab.run(
        "[...document.querySelectorAll('button')].map(b => b.offsetHeight).filter(h => h)"
    )
    assert len(heights) > 8 and min(heights) >= 40
    vertices, mm = [[-0.1, -0.1, 1.0]] * 8, 222
    box = {"name": "yellow cube", "vertices": vertices, "step": 0, "within_mm": mm, "error_mm": mm}
    tab.run(f"show({json.dumps({'step': 0, 'boxes': [box]})})")
    right = "(e => e.getBoundingClientRect().right)(document.querySelector('{}'))"
    assert tab.run(right.format("#answers td:last-child")) <= tab.run(right.format("#box-form"))
    tab.touch("#track", (0.1, 0.5, 0.5, 0.5))
    wait_until_settled(tab)
    assert tab.run("[view.step, picture.naturalWidth]") == [5, 80]
    yaw, away = tab.run("[space.yaw, space.away]")
    tab.touch("#space", (0.2, 0.5, 0.6, 0.5))
    turned, same = tab.run("[space.yaw, space.away]")
    assert abs(turned - yaw) > 0.2 and same == away
    # Two fingers move three times as far apart
    tab.touch("#space", (0.4, 0.5, 0.2, 0.5), (0.6, 0.5, 0.8, 0.5))
    assert tab.run("[space.yaw, space.away]") == [turned, pytest.approx(away / 3, rel=0.02)]
    assert tab.errors == []
