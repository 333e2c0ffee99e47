"""The demo's page is whole, and so are the answers and films that it is made of."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tiny import make
from refusals import Command
from spear import cli, demo
from spear.cli import main
from spear.data.store.lerobot_write import write_lerobot
from spear.evaluate import closed_loop
from spear.evaluate import film as video
from spear.evaluate.vqa.calibration import CALIBRATION_FILE
from spear.policy import locate


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"SCENES": 1, "QUESTION_SCENES": 1, "LABEL_SCENES": 2, "FINE_TUNE_STEPS": 1}
    for name, value in {**few, "FAMILIES": ("put_on",)}.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(closed_loop, "MAX_STEPS", 3)
    monkeypatch.setattr(video, "HEIGHT", 84)


def test_ask_answers_in_metres_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With weights whose answers nobody has measured."""
    model = shutil.copytree(locate("nano"), tmp_path / "nano")
    (model / CALIBRATION_FILE).unlink()
    ask = ["ask", "--model", str(model)]
    assert main([*ask, "sim:7", "How far away is the bowl?", "--family", "distance"]) == 0
    said = capsys.readouterr()
    assert re.fullmatch(r"-?\d\.\d{3} m\n", said.out) and "--calibrate" in said.err
    photo, drawing = tmp_path / "p.jpg", tmp_path / "d.png"
    Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(photo)
    question = ["Where does the box around the mug appear?", "--family", "back_projection"]
    assert main([*ask, str(photo), *question, "--draw", str(drawing)]) == 0
    said = capsys.readouterr()
    assert said.out.count("px") == 8
    notes = said.err.splitlines()  # the size, that nothing was measured, that photos are new to it
    assert (
        len(notes) == 3 and "80×60" in notes[0] and all(note.startswith("note: ") for note in notes)
    )
    assert Image.open(drawing).size == (240, 180)
    assert main([*ask, str(photo), *question, "--draw", str(photo / "d.png")]) == 2
    *notes, said = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: {photo}: ") and all(line.startswith("note: ") for line in notes)


def test_the_example_of_ask_draws_and_what_cannot_be_drawn_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"spear (ask sim:.*)", cli.load_command("ask").__doc__ or "")
    *words, drawing = shlex.split(example)
    assert main([*words, drawing]) == 0 and Image.open(drawing).size == (576, 384)
    assert "note:" not in capsys.readouterr().err
    assert main(["ask", "sim:7", "How far away is the zebra?", "--draw", "none.png"]) == 0
    away = "Estimate the x, y, z distance between the plate and the sponge"
    assert main(["ask", "sim:7", away, "--draw", "none.png"]) == 2  # an offset is no place
    assert "note: none.png" in capsys.readouterr().err and not Path("none.png").exists()
    Image.new("RGB", (1, 1)).save("dot.png")
    assert main(["ask", "dot.png", "How far away is the mug?"]) == 0
    assert not re.search(r"\d", capsys.readouterr().out)  # what it sees instead is no number


def test_the_page_without_real_data_says_how_to_get_some(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: Command
) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path / "page/index.html") in done("demo", "--out", "page")
    html = (tmp_path / "page/index.html").read_text()
    assert "make demo DATA=" in html and html.count("<video") == 1 and html.count("<section>") == 4
    assert not re.search(r'(src|href)="(?!data:)', html)


def test_bad_episodes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Command
) -> None:
    monkeypatch.setattr(demo, "load_vlm", None)
    data, out = tmp_path / "mine", tmp_path / "page"
    write_lerobot([make(0), make(1)], data)
    (data / "spear.json").write_text('{"like": "bridge_dataset"}')
    assert "'observation/image_0'" in refused("demo", "--data", str(data), "--out", str(out))
    assert not out.exists()


def test_real_episodes_are_learned_and_scored(small: None, shared: Path, tmp_path: Path) -> None:
    data = shared / "data/bridge_v2_sample"
    values = demo.real_episodes(tmp_path, data)
    assert (values["learned"], values["held_out"], values["source"]) == (19, 6, "bridge_dataset")
    assert "mean action" in values["headers"] and len(values["charts"]) == 3
    assert "mean action" in values["fact"][1]
    before = sorted(p.name for p in tmp_path.iterdir())
    assert [len(store) for store in demo._split(data, tmp_path)] == [19, 6]
    assert sorted(p.name for p in tmp_path.iterdir()) == before
