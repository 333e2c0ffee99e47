"""The demo writes a complete page, and `spear ask` answers and draws its answers."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tiny import make_episode
from refusals import Command
from spear import demo
from spear.cli import load_command, main
from spear.data.store.lerobot_write import write_lerobot
from spear.evaluate import closed_loop
from spear.evaluate.vqa.calibration import CALIBRATION_FILE
from spear.policy import locate_checkpoint


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the demo as small as it can be: few scenes, short episodes, small films."""
    monkeypatch.setattr(demo, "NUM_SCENES", 1)
    monkeypatch.setattr(demo, "NUM_QUESTION_SCENES", 1)
    monkeypatch.setattr(demo, "NUM_LABEL_SCENES", 2)
    monkeypatch.setattr(demo, "FINE_TUNE_STEPS", 1)
    monkeypatch.setattr(demo, "FAMILIES", ("put_on",))
    monkeypatch.setattr(closed_loop, "MAX_STEPS", 3)
    monkeypatch.setattr("spear.evaluate.film.HEIGHT_PX", 84)


@pytest.fixture(scope="module")
def uncalibrated(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose certainty nobody has measured."""
    model = shutil.copytree(locate_checkpoint("nano"), tmp_path_factory.mktemp("models") / "nano")
    (model / CALIBRATION_FILE).unlink()
    return str(model)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A black photo of 80 × 60 pixels."""
    path = tmp_path / "photo.jpg"
    Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(path)
    return path


BOX_QUESTION = ["Where does the box around the mug appear?", "--question-type", "back_projection"]


def test_ask_answers_in_meters_and_says_that_certainty_was_not_measured(
    uncalibrated: str, capsys: pytest.CaptureFixture[str]
) -> None:
    question = ["How far away is the bowl?", "--question-type", "distance"]

    assert main(["ask", "--model", uncalibrated, "sim:7", *question]) == 0

    output = capsys.readouterr()
    assert re.fullmatch(r"-?\d\.\d{3} m\n", output.out)
    assert "--calibrate" in output.err


def test_ask_draws_a_box_on_a_photo(
    uncalibrated: str, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawing = photo.with_name("drawing.png")

    words = ["--model", uncalibrated, str(photo), *BOX_QUESTION, "--save-image", str(drawing)]
    assert main(["ask", *words]) == 0

    output = capsys.readouterr()
    assert output.out.count("px") == 8  # the corners of the box
    # Notices about the photo's size, about certainty, and that the model has never seen photos.
    notes = output.err.splitlines()
    assert len(notes) == 3
    assert "80×60" in notes[0]
    assert all(note.startswith("note: ") for note in notes)
    assert Image.open(drawing).size == (3 * 80, 3 * 60)


def test_ask_refuses_a_drawing_that_cannot_be_written(
    uncalibrated: str, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawing = photo / "drawing.png"  # below a file

    words = ["--model", uncalibrated, str(photo), *BOX_QUESTION, "--save-image", str(drawing)]
    assert main(["ask", *words]) == 2

    *notes, last_line = capsys.readouterr().err.splitlines()
    assert last_line.startswith(f"error: {photo} is a file")
    assert all(note.startswith("note: ") for note in notes)


def test_the_example_of_ask_draws_without_a_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"spear (ask sim:.*)", load_command("ask").__doc__ or "")
    words = shlex.split(example)

    assert main(words) == 0

    assert Image.open(words[-1]).size == (3 * 192, 3 * 128)  # the policy's image, enlarged
    assert "note:" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("question", "exit_code"),
    [
        ("How far away is the zebra?", 3),  # no zebra is in the picture
        # The answer is an offset, which has no place in the image.
        ("Estimate the x, y, z distance between the plate and the sponge", 2),
    ],
)
def test_ask_draws_no_answer_that_has_no_place(
    question: str, exit_code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    assert main(["ask", "sim:7", question, "--save-image", "none.png"]) == exit_code

    assert not Path("none.png").exists()


def test_ask_says_why_it_does_not_draw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    main(["ask", "sim:7", "How far away is the zebra?", "--save-image", "none.png"])

    assert "not in the picture: zebra" in capsys.readouterr().err


def test_an_image_that_shows_nothing_has_no_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")

    assert main(["ask", str(tmp_path / "dot.png"), "How far away is the mug?"]) == 3

    assert not re.search(r"\d", capsys.readouterr().out)


@pytest.mark.usefixtures("small_demo")
def test_texts_of_others_are_escaped_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "<script>alert(1)</script>"
    values = {
        "source": script,
        "learned": 1,
        "held_out": 1,
        "steps": 1,
        "headers": [script],
        "rows": [[script]],
        "charts": [],
        "fact": (script, script),
    }
    monkeypatch.setattr(demo, "fine_tune", lambda out, data: values)

    page = demo.write_report(tmp_path).read_text()

    assert "<script" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.usefixtures("small_demo")
def test_the_page_without_real_data_says_how_to_get_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_command: Command
) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page" / "index.html"

    assert str(page) in run_command("demo", "--out", "page")

    html = page.read_text()
    assert "make demo DATA=" in html
    assert html.count("<video") == 1
    assert html.count("<section>") == 4
    assert not re.search(r'(src|href)="(?!data:)', html)  # the page needs no other file


def test_bad_episodes_are_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_refused_command: Command
) -> None:
    monkeypatch.setattr(demo, "load_vlm", None)  # calling None would raise another error
    data = tmp_path / "mine"
    out = tmp_path / "page"
    write_lerobot([make_episode(0), make_episode(1)], data)
    (data / "spear.json").write_text('{"like": "bridge_dataset"}')  # names another camera

    message = run_refused_command("demo", "--data", str(data), "--out", str(out))

    assert "'observation/image_0'" in message
    assert not out.exists()


@pytest.mark.usefixtures("small_demo")
@pytest.mark.slow
def test_real_episodes_are_learned_and_scored(shared: Path, tmp_path: Path) -> None:
    data = shared / "data/bridge_v2_sample"

    values = demo.fine_tune(tmp_path, data)

    assert values["source"] == "bridge_dataset"
    assert values["learned"] == 19  # of 25 episodes
    assert values["held_out"] == 6
    assert "mean action" in values["headers"]
    _, meaning_of_fact = values["fact"]
    assert "mean action" in meaning_of_fact
    assert len(values["charts"]) == 3  # of as many episodes


def test_real_episodes_are_prepared_once(shared: Path, tmp_path: Path) -> None:
    data = shared / "data/bridge_v2_sample"
    demo._prepare_and_split_episodes(data, tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}

    training, held_out = demo._prepare_and_split_episodes(data, tmp_path)

    assert len(training) == 19
    assert len(held_out) == 6
    for path, time_ns in files.items():
        assert path.stat().st_mtime_ns == time_ns
