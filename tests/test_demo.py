"""The whole way with hardly trained weights: every command runs, the page is whole, broken weights are
refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import spear.policy
from spear import demo
from spear.cli import main
from spear.evaluate import closed_loop
from spear.evaluate import film as video


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the one that ships, trained for a single step by the commands themselves."""
    root = tmp_path_factory.mktemp("weights")
    labels, episodes = str(root / "labels"), str(root / "episodes")
    small = ["--steps", "1", "--set", "batch_size=2"]
    siglip, vlm, depth, nano = (str(root / name) for name in ("siglip", "vlm-0", "depth", "nano"))
    for command in (
        ["label", "--scenes", "3", "--out", labels, "--workers", "1", "--drawings", "1"],
        ["record", "--episodes", "1", "--families", "put_on", "--out", episodes, "--workers", "1"],
        [*f"train nano-depth --out {depth} --labels {labels}".split(), *small],
        [*f"train nano-siglip --out {siglip} --labels {labels}".split(), *small],
        [*f"train nano-vlm-0 --out {vlm} --labels {labels} --init {siglip}".split(), *small],
        [*f"train nano-vlm-1 --out {nano}/vlm --labels {labels} --init {vlm} --moge {depth}".split(), *small],
        [
            *f"train nano-vla --out {nano}/policy --labels {labels} --episodes {episodes}".split(),
            *["--init", f"{nano}/vlm", *small, "question_images=1"],
        ],
    ):
        assert main(command) == 0
    shutil.copytree(root / "nano" / "policy" / "final", root / "shipped" / "nano")
    return root


@pytest.fixture
def shipped(weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(spear.policy, "SHIPPED", weights / "shipped")
    small = {"SCENES": 1, "QUESTION_SCENES": 1, "LABEL_SCENES": 2, "FINE_TUNE_STEPS": 1}
    for name, value in {**small, "FAMILIES": ("put_on",)}.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(video, "HEIGHT", 84)
    return weights


def test_ask_answers_in_metres_and_draws(
    shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Image.open(shipped / "labels/drawings/0000.png").size == (3 * 192, 3 * 128)
    assert main(["ask", "sim:7", "How far away is the bowl?", "--family", "distance"]) == 0
    said = capsys.readouterr()
    assert re.fullmatch(r"-?\d\.\d{3} m\n", said.out) and "--calibrate" in said.err
    photo, drawing = tmp_path / "p.jpg", tmp_path / "d.png"
    Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(photo)
    question = ["Where does the box around the mug appear?", "--family", "back_projection"]
    assert main(["ask", str(photo), *question, "--draw", str(drawing)]) == 0
    said = capsys.readouterr()
    assert said.out.count("px") == 8
    assert said.err.startswith("note: ") and "80×60" in said.err and said.err.count("\n") == 3
    assert Image.open(drawing).size == (240, 180)
    below = photo / "d.png"
    assert main(["ask", str(photo), *question, "--draw", str(below)]) == 2
    *notes, said = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: {below}: ") and all(line.startswith("note: ") for line in notes)


def test_evaluate_writes_results_films_and_a_comparison(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = ["--families", "stack_cube", "--scenes", "1", "--out"]
    assert main(["evaluate", "--policy", "expert", *scenes, str(tmp_path / "expert")]) == 0
    expert = tmp_path / "expert" / "results.json"
    assert json.loads(expert.read_text())["mean_success"] == 1
    assert [p.name for p in (tmp_path / "expert").glob("*.mp4")] == ["stack_cube-success-0.mp4"]
    capsys.readouterr()
    monkeypatch.setattr(closed_loop, "MAX_STEPS", 3)
    assert main(["evaluate", *scenes, str(tmp_path / "nano")]) == 0
    assert main(["evaluate", "compare", str(tmp_path / "nano"), str(expert)]) == 0
    assert "against expert" in capsys.readouterr().out


def test_the_page_without_real_data_says_how_to_get_some(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(closed_loop, "MAX_STEPS", 3)
    assert main(["demo", "--out", "page"]) == 0
    html = (tmp_path / "page/index.html").read_text()
    assert str(tmp_path / "page/index.html") in capsys.readouterr().out
    assert "make demo DATA=" in html and html.count("<video") == 1 and html.count("<section>") == 4
    assert not re.search(r'(src|href)="(?!data:)', html)


def test_real_episodes_are_learned_and_scored(shipped: Path, shared: Path, tmp_path: Path) -> None:
    data = shared / "data/bridge_v2_sample"
    values = demo.real_episodes(tmp_path, data)
    assert (values["learned"], values["held_out"], values["source"]) == (19, 6, "bridge_v2_sample")
    assert "mean action" in values["headers"] and len(values["charts"]) == 3
    assert "mean action" in values["fact"][1]
    before = sorted(p.name for p in tmp_path.iterdir())
    assert [len(store) for store in demo._split(data, tmp_path)] == [19, 6]
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_truncated_checkpoint_is_one_line(
    shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "policy"
    shutil.copytree(shipped / "shipped/nano", broken)
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert main(["evaluate", "--policy", str(broken), "--scenes", "1"]) == 2
    said = capsys.readouterr().err
    assert "model.safetensors" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["ask", "sim:7", " "], "empty question"),
        (["ask", "sim:x", "how far?"], "sim:SEED"),
        (["ask", "sim:10000", "how far?"], "held-out seeds"),
        (["ask", "absent.png", "how far?"], "No such file"),
        (["ask", __file__, "how far?"], "not a readable image"),
        (["ask", "sim:7", "how far?", "--family", "distanse"], "did you mean 'distance'?"),
        (["train", "nano-post", "--init", "nano", "--episodes", "/nowhere"], "/nowhere"),
        (["train", "nano-post", "--episodes", "x", "--init", "nanno"], "'nanno'"),
    ],
)
def test_bad_questions_and_recipes_are_one_line(
    shipped: Path, argv: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert hint in said and said.startswith("error: ") and said.count("\n") == 1
