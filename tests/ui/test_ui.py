"""The page for people, over real sockets: who sees it, what a tab may ask, tabs beside each other."""

import base64
import io
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import closing
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
from spear.data.store.episode_store import write_episodes
from spear.embodiments import load
from spear.errors import Notice
from spear.evaluate import film as video
from spear.evaluate.agents import PolicyAgent
from spear.evaluate.options import TabletopOptions
from spear.evaluate.vqa import ask
from spear.evaluate.vqa.calibration import Trust
from spear.policy import Spear1Policy, VlmBundle
from spear.serve.client import RemotePolicy
from spear.serve.connection import ConnectionLimits
from spear.serve.server import PolicyServer
from spear.util.images import decode_image

pytest.importorskip("mujoco")

from spear.evaluate import closed_loop
from spear.sim.env import TabletopEnv
from spear.sim.render import camera_pose, object_boxes
from spear.ui import episodes
from spear.ui import page as pages
from spear.ui.episodes import EpisodeFolder
from spear.ui.page import Page
from spear.ui.tab import SharedModel

LIMIT = 2**20
PATIENCE = 240


@pytest.fixture(scope="module")
def policy() -> Spear1Policy:
    return Spear1Policy.load("nano", steps=2)


@pytest.fixture(scope="module")
def server(policy: Spear1Policy) -> Iterator[PolicyServer]:
    page = Page(policy, "nano", None, LIMIT)
    with run_server(policy, page=page, limits=ConnectionLimits(max_message_bytes=LIMIT)) as running:
        yield running


@pytest.fixture
def studio(server: PolicyServer) -> SharedModel:
    return server.page._shared


class Tab:
    """What a browser's tab is to the server."""

    def __init__(self, server: PolicyServer, **options: Any) -> None:
        address = f"ws://127.0.0.1:{server.port}/ui"
        self.socket = connect(address, max_size=None, compression=None, proxy=None, **options)
        self.view: dict[str, Any] = {}
        self.until(lambda part: "images" in self.view and part.get("problem", "") is None)

    def until(self, true: Any) -> None:
        while True:
            part = json.loads(self.socket.recv(timeout=PATIENCE))
            self.view |= part
            if true(part):
                return

    def send(self, what: bytes | str | dict[str, Any]) -> str | None:
        """Ask for something; the problem with it, or None."""
        self.socket.send(json.dumps(what) if isinstance(what, dict) else what)
        self.until(lambda part: "problem" in part and "running" not in part)
        return self.view["problem"]

    def ask(self, do: str, **what: Any) -> str | None:
        return self.send({"do": do, **what})


@pytest.fixture
def tab(server: PolicyServer, renderer: Any) -> Iterator[Tab]:
    """`renderer`: skips where nothing can be rendered."""
    with (opened := Tab(server)).socket:
        yield opened


def test_the_page_is_whole(server: PolicyServer) -> None:
    status, headers, html = http_get(server, "/")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    wanted = re.findall(r'(?:src|href)="([^"]+)"', html)
    assert len(wanted) >= 4
    for path in wanted:
        if not path.startswith("data:"):
            status, _, text = http_get(server, path)
            assert status == 200 and "://" not in text
    assert http_get(server, "/nowhere")[0] == 404
    with run_server() as plain:  # a server without a page
        assert http_get(plain, "/")[0] == http_get(plain, "/ui.js")[0] == 404


def test_the_token_is_asked_for(policy: Spear1Policy, renderer: Any) -> None:
    with run_server(policy, token="secret", page=Page(policy, "nano", "secret", LIMIT)) as server:
        for path in ("/", "/?token=wrong", "/ui.js", "/memory.js", "/space.js", "/timeline.js"):
            status, _, body = http_get(server, path)
            assert status == 401 and "secret" not in body and 'name="token"' in body
        with pytest.raises(InvalidStatus, match="401"):
            Tab(server)
        status, headers, _ = http_get(server, "/?token=secret")
        assert status == 303 and headers["Location"] == "/"
        cookie, *rest = headers["Set-Cookie"].split("; ")
        assert "secret" not in cookie and {"HttpOnly", "SameSite=Strict"} <= set(rest)
        assert (
            http_get(server, "/", Cookie=cookie)[0] == 200
            and http_get(server, "/", Cookie=cookie[:-1])[0] == 401
        )
        with (opened := Tab(server, additional_headers={"Cookie": f"other=1; {cookie}"})).socket:
            assert opened.view["source"] == "simulator"


def test_other_sites_get_nothing_and_tabs_are_bounded(
    server: PolicyServer, renderer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (*pages.SUBTYPE_BY_PATH, "/ui"):
        assert http_get(server, path, Host=f"evil.example:{server.port}")[0] == 403
    with pytest.raises(InvalidStatus, match="403"):
        Tab(server, origin="http://evil.example")
    Tab(server, origin=f"http://127.0.0.1:{server.port}").socket.close()
    monkeypatch.setattr(pages, "MAX_TABS", 0)
    with pytest.raises(InvalidStatus, match="503"):
        Tab(server)


def test_every_step_can_be_looked_at_asked_about_and_filmed_later(tab: Tab) -> None:
    assert tab.ask("reset", family="put_on", seed=2) is None
    assert (tab.view["step"], tab.view["chunk"], tab.view["outcome"]) == (0, None, None)
    names = tab.view["objects"][:1]
    assert tab.ask("boxes", objects=names) is None
    passed = [dict(tab.view)]
    for told in (tab.view["told"], tab.view["told"], "wave"):
        assert tab.ask("instruct", text=told) is None and tab.ask("step") is None
        passed.append(dict(tab.view))
    assert tab.ask("instruct", text=passed[0]["told"]) is None
    for step, then in enumerate(passed):
        assert then["step"] == step and tab.ask("look", step=step) is None
        assert all(tab.view[key] == then[key] for key in ("images", "gripper", "things", "arm"))
    assert (
        tab.ask("boxes", objects=names, step=0) is None and tab.view["boxes"] == passed[0]["boxes"]
    )
    assert tab.ask("boxes", objects=names) is None and tab.view["boxes"][0]["step"] == 3
    assert (
        DEFAULT_REPLAN_INTERVAL == 1 and tab.ask("predict", step=1) is None
    )  # with the same noise as then
    assert {**tab.view["chunk"], "ms": 0} == {**passed[2]["chunk"], "ms": 0}
    with film(tab) as opened:
        frames = [frame.to_ndarray(format="rgb24") for frame in opened.decode(video=0)]
    assert len(frames) == 4 + 5  # the last stays for a second
    shown = Image.fromarray(picture(passed[1]))
    assert shown.width / shown.height == passed[1]["camera"]["aspect"]
    bars = [frame[: video.BAR].astype(float) for frame in frames]  # each step's own instruction
    assert np.abs(bars[2] - bars[0]).mean() < 2 < np.abs(bars[3] - bars[0]).mean()
    large = shown.resize((round(video.HEIGHT * shown.width / shown.height), video.HEIGHT))
    assert np.abs(frames[1][video.BAR :, : large.width].astype(float) - large).mean() < 6


def test_a_rollout_that_is_stopped_says_each_step_that_it_made(
    tab: Tab, policy: Spear1Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    thinks, infer, told = threading.Event(), policy.infer, list[int]()

    def slowly(seen: Any) -> Any:
        thinks.set()
        time.sleep(0.2)
        return infer(seen)

    monkeypatch.setattr(policy, "infer", slowly)
    tab.ask("start")
    assert thinks.wait(PATIENCE)  # it is stopped in the middle of a step
    for do in ("stop", "step"):
        tab.socket.send(json.dumps({"do": do}))
    while 2 not in told:
        part = json.loads(tab.socket.recv(timeout=PATIENCE))
        told += [part["step"]] if "images" in part else []
    assert told == [1, 2]


def picture(view: dict[str, Any]) -> np.ndarray:
    return decode_image(base64.b64decode(view["images"]["external"].partition(",")[2]))


def film(tab: Tab) -> Any:
    """What Save film gives, opened."""
    assert tab.ask("film") is None
    return av.open(io.BytesIO(base64.b64decode(tab.view["film"]["data"])))


def test_recorded_episodes_are_replayed(
    server: PolicyServer,
    tab: Tab,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_refused_command: Command,
) -> None:
    said = [make_episode(k, num_steps=4 + k, success=(True, False, None)[k]) for k in range(3)]
    write_episodes(said, tmp_path)
    monkeypatch.setattr(server.page._shared, "episode_folder", EpisodeFolder(tmp_path))
    assert tab.ask("open", episode=1) is None
    assert (tab.view["source"], tab.view["limit"], tab.view["outcome"]) == ("recording", 4, None)
    np.testing.assert_allclose(tab.view["track"]["position"], said[1].position, atol=1e-4)
    np.testing.assert_allclose(tab.view["track"]["opening"], said[1].gripper, atol=1e-4)
    assert tab.ask("look", step=4) is None and tab.view["outcome"] == "failure"
    assert (
        np.abs(picture(tab.view).astype(float) - decode_image(said[1].images["external"][4])).mean()
        < 6
    )
    assert tab.ask("predict", step=2) is None and tab.view["chunk"]["step"] == 2
    np.testing.assert_allclose(tab.view["chunk"]["positions"][0], said[1].position[2], atol=1e-5)
    assert "recording" in (tab.ask("step") or "") and "episode 3" in (
        tab.ask("open", episode=3) or ""
    )
    with film(tab) as opened:
        assert opened.streams.video[0].frames == 5 + 5
    for step in range(3 * ConnectionLimits().max_small_frames_per_s):  # as when it is dragged
        assert tab.ask("look", step=step % 5) is None
    (tmp_path / "empty").mkdir()
    assert "--episodes" in run_refused_command(
        "serve", "nano", "--ui", "--episodes", str(tmp_path / "empty")
    )
    assert "--ui" in run_refused_command("serve", "nano", "--episodes", str(tmp_path))
    drawn = list[None]()
    monkeypatch.setattr(
        video, "compose_frame", lambda *a: (drawn.append(tab.socket.close()), time.sleep(1), *a)[2]
    )
    tab.socket.send(json.dumps({"do": "film"}))
    Tab(server).socket.close()  # has its picture, as the film of the tab that has gone has ended
    assert len(drawn) == 1


def test_a_policy_is_shown_the_cameras_that_it_takes(
    tab: Tab,
    studio: SharedModel,
    policy: Spear1Policy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the simulator as in a recording: one of two; and a third, where it takes that."""
    seen: list[set[str]] = []
    infer = policy.infer
    monkeypatch.setattr(
        policy, "infer", lambda o: (seen.append({k for k in o if "image" in k}), infer(o))[1]
    )
    three = dict.fromkeys(
        ("external", "wrist", "left"), make_episode(0, num_steps=4).images["external"]
    )
    write_episodes(
        [make_episode(0, num_steps=4, images=i) for i in (three, {"wrist": three["wrist"]})],
        tmp_path,
    )
    monkeypatch.setattr(studio, "episode_folder", EpisodeFolder(tmp_path))
    sizes = {"external": policy.image_sizes["external"]}
    monkeypatch.setattr(policy, "processor", replace(policy.processor, image_sizes=sizes))
    assert tab.ask("reset", family="put_on", seed=0) is None and tab.ask("step") is None
    assert seen == [{"observation/image"}] and tab.view["images"]["wrist"] is None
    with film(tab) as opened:
        assert opened.streams.video[0].frames == 2 + 5
    assert tab.ask("open", episode=0) is None and tab.ask("predict") is None
    assert (
        "external" in (tab.ask("open", episode=1) or "") and tab.ask("look") is None
    )  # the last one stays
    assert seen == [{"observation/image"}] * 2 and tab.view["images"]["wrist"] is None
    sizes["left"] = (96, 96)
    other = EpisodeFolder(tmp_path).open(0, policy).observation_at(1)
    assert {key for key in other if "image" in key} == {
        "observation/image",
        "observation/left_image",
    }


def test_an_evaluations_failure_is_run_again(
    tab: Tab,
    policy: Spear1Policy,
    studio: SharedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (closed_loop, episodes):
        monkeypatch.setattr(module, "MAX_STEPS", 7)
    agent = PolicyAgent(policy, "nano", policy.identity)
    evaluated = {}

    def act(envs: Any, observations: Any) -> Any:
        chunks = PolicyAgent.act(agent, envs, observations)
        evaluated[envs[0].steps] = observations[0]["observation/state"], chunks[0]
        return chunks

    monkeypatch.setattr(agent, "act", act)
    options = TabletopOptions(scenes=1, families=("stack_cube",), out=tmp_path, replan=2)
    closed_loop.evaluate_tabletop(agent, replace(options, execution="async", latency_ms=200.0))
    monkeypatch.setattr(studio, "episode_folder", EpisodeFolder(tmp_path))
    with monkeypatch.context() as patched:
        patched.setattr(policy, "steps", 3)
        assert "stack_cube 0 can be run again only" in (tab.ask("open", episode=0) or "")
    assert tab.ask("open", episode=0) is None
    parts: list[Any] = []
    tab.until(lambda part: parts.append(part) or part.get("running") is False)
    assert (tab.view["outcome"], tab.view["recorded"]) == (
        "time is up",
        "recorded: failure, 7 steps",
    )
    assert tab.view["milestones"][-1] == "as recorded"
    again = {part["chunk"]["step"]: part["chunk"] for part in parts if "chunk" in part}
    assert again.keys() == evaluated.keys() and len(again) > 2
    for step, (state, actions) in evaluated.items():
        np.testing.assert_allclose(again[step]["positions"][0], state[:3], atol=1e-4)
        np.testing.assert_allclose(
            np.diff(again[step]["positions"], axis=0), actions[:, :3], atol=1e-4
        )
    with next(tmp_path.glob("*.jsonl")).open("a") as journal:
        journal.write('{"scenes": {"stack_cube": [1]}}\n')
    with pytest.warns(Notice, match="1 scene left"):
        EpisodeFolder(tmp_path)


def test_boxes_are_spear_vlms_and_measured_against_the_truth(
    tab: Tab, policy: Spear1Policy
) -> None:
    names = tab.view["objects"]
    assert len(names) >= 2 and tab.ask("boxes", objects=names[:2]) is None
    env = TabletopEnv("put_on", *policy.processor.image_sizes.values())
    env.reset(seed=0)
    prompts = [f"Provide the 3D bounding box coordinates of the {name}" for name in names[:2]]
    vlm = VlmBundle(policy.model.vlm, policy.processor)
    answers = vlm.answer([env.render()] * 2, prompts, "box_vertices")
    pose = camera_pose(env.world, "external")
    for index, (box, answer) in enumerate(zip(tab.view["boxes"], answers, strict=True)):
        vertices = np.reshape(answer.values, (8, 3))
        np.testing.assert_allclose(box["vertices"], vertices)
        true = object_boxes(env.world)[index + 1].mean(0)
        answered = pose[:3, :3] @ vertices.mean(0) + pose[:3, 3]
        assert box["error_mm"] == pytest.approx(1000 * np.linalg.norm(answered - true), abs=0.01)


def test_numbers_without_a_scale_are_no_metres(
    studio: SharedModel, tab: Tab, policy: Spear1Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert studio.describe()["unit"] == "metre"
    relative = replace(policy.processor.coordinates, unit="relative")
    monkeypatch.setattr(policy.processor, "coordinates", relative)
    assert (
        studio.describe()["unit"] == "relative"
        and tab.ask("boxes", objects=tab.view["objects"][:1]) is None
    )
    assert [(b["error_mm"], b["within_mm"]) for b in tab.view["boxes"]] == [(None, None)]
    assert tab.ask("question", text=f"How far away is the {tab.view['objects'][0]}?") is None
    assert re.search(r"\d\.\d{3} units", tab.view["answer"]["text"])


def test_boxes_say_how_sure_they_are(
    studio: SharedModel, tab: Tab, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [tab.view["objects"][0], "zebra"]
    monkeypatch.setattr(studio, "trust", None)
    assert tab.ask("boxes", objects=names) is None
    assert [b["within_mm"] for b in tab.view["boxes"]] == [None, None] and tab.view["absent"] == []
    trust = Trust("held-out scenes", {"box_vertices": 2.0}, names_present=1.0, names_absent=0.0)
    monkeypatch.setattr(studio, "trust", trust)
    monkeypatch.setattr(
        ask,
        "find_absent_objects",
        lambda vlm, image, names: {n: "bowl" for n in names if n == "zebra"},
    )
    assert tab.ask("boxes", objects=names) is None
    (box,) = tab.view["boxes"]
    assert box["name"] == names[0] and box["within_mm"] > 0 and tab.view["absent"] == ["zebra"]
    assert tab.ask("boxes", objects=["zebra"]) is None and tab.view["boxes"] == []


def test_a_photo_can_be_asked_about(
    studio: SharedModel, tab: Tab, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tab.send(make_png(120, 300, 200)) is None
    assert tab.ask("boxes", objects=["mug"]) is None and tab.view["absent"] == ["mug"]
    monkeypatch.setattr(studio, "trust", None)  # now the model answers whatever it is asked
    assert (tab.view["source"], tab.view["things"], tab.view["camera"]["aspect"]) == (
        "photo",
        [],
        1.5,
    )
    assert tab.ask("boxes", objects=["mug"]) is None
    (box,) = tab.view["boxes"]
    assert np.shape(box["vertices"]) == (8, 3) and box["error_mm"] is None
    assert tab.ask("instruct", text="lift the mug") is None and tab.ask("predict") is None
    assert np.shape(tab.view["chunk"]["positions"]) == (6, 3)
    tab.ask("start")  # is heard at once; the rollout then says what is wrong
    tab.until(lambda part: "photo" in (part.get("problem") or ""))


def test_whatever_is_wrong_is_one_line_and_the_next_request_works(tab: Tab) -> None:
    for request, said in (
        ("nonsense", "nonsense"),
        ("[" * 5000, "[["),
        ("[" + 300_000 * "[]," + "[]]", "[[],[]"),
        ('{"do": ["reset"]}', "reset"),
        ({"do": "explode"}, "explode"),
        ({"do": "reset", "family": "put_onn", "seed": 0}, "put_onn"),
        ({"do": "reset", "family": 7, "seed": 0}, "task family '7'"),
        ({"do": "reset", "family": "put_on"}, "seed None"),
        ({"do": "boxes", "objects": "mug"}, "objects"),
        ({"do": "boxes", "objects": ["mug"] * 9}, "objects"),
        *(({"do": "look", "step": step}, "step ") for step in (1, -1, True, "0", 10**30)),
        ({"do": "open", "episode": 0}, "--episodes"),
        ({"do": "boxes", "objects": [{}]}, "object"),
        ({"do": "question", "text": "  "}, "question"),
        (b"GIF89a", "the image"),
        (make_png(120, 300, 200)[:200], "the image"),
        (make_png(120, 300, 8), "the image has 300 x 8"),
        (assemble_png((10_000, 10_000, 8, 2), b""), "the image: 10000 x 10000"),
    ):
        problem = tab.send(request)
        assert problem is not None and said in problem and "\n" not in problem, (request, problem)
    assert tab.ask("instruct", text="") is None
    assert "prompt" in (tab.ask("predict") or "") and tab.view["source"] == "simulator"


def test_tabs_run_beside_each_other_and_the_server_stays_awake(
    server: PolicyServer, tab: Tab
) -> None:
    assert tab.ask("reset", family="put_in_basket", seed=5) is None and tab.ask("start") is None
    with (other := Tab(server)).socket:
        assert other.view["running"] is False and other.view["step"] == 0
        assert (
            other.ask("reset", family="stack_cube", seed=1) is None
            and http_get(server, "/healthz")[0] == 200
        )
        with closing(RemotePolicy(f"ws://127.0.0.1:{server.port}")) as robot:
            assert robot.infer(load("generic").example())["actions"].shape == (5, 8)
        tab.until(lambda part: part.get("step", 0) >= 2)
        assert tab.ask("stop") is None and tab.view["running"] is False
        assert tab.view["family"] == "put_in_basket"
        assert other.ask("predict") is None and other.view["step"] == 0
        assert other.view["family"] == "stack_cube"
    assert tab.ask("start") is None  # and a tab that is closed while it runs takes nothing with it
    tab.socket.close()
    with (third := Tab(server)).socket:
        assert third.ask("step") is None
