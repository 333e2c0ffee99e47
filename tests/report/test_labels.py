"""Questions beside labels, the page, the Rerun file, and the commands that make them."""

import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from labels_scenes import TRUTH, random_frame
from refusals import Command, refuses
from spear.labels.models.ground_truth import GroundTruth
from spear.labels.pipeline import label_images
from spear.labels.questions.store import generate_label_questions, read_questions, write_questions
from spear.labels.store import count_labels, select_labels, write_labels
from spear.question_types import QUESTION_TYPES, QUESTION_TYPES_2D
from spear.report.labels import write_label_page, write_rerun
from spear.types import Frame, LabeledImage


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    rng = np.random.default_rng(5)
    return [replace(random_frame(rng), source=f"scene & {n}") for n in range(12)]


@pytest.fixture(scope="module")
def labels(frames: list[Frame]) -> list[LabeledImage]:
    return list(label_images(frames, *TRUTH))


@pytest.fixture
def folder(labels: list[LabeledImage], tmp_path: Path) -> Path:
    for number in range(0, 12, 5):
        write_labels(labels[number : number + 5], tmp_path / f"labels/labels-{number:05d}.parquet")
    return tmp_path / "labels"


@pytest.mark.parametrize("families", [QUESTION_TYPES, QUESTION_TYPES_2D, ("what_at",)])
def test_questions_are_kept_exactly_and_depend_on_seed_and_source_alone(
    families: tuple[str, ...], labels: list[LabeledImage], folder: Path
) -> None:
    images, counts = write_questions(folder, seed=3, families=families)
    kept = list(read_questions(folder))
    assert images == 12 and counts.total() == len(kept) > 12 and set(counts) == set(families)
    expected = [
        (item.source, question)
        for item in labels
        for question in generate_label_questions(item, 3, families=families)
    ]
    assert [source for source, _ in kept] == [source for source, _ in expected]
    for (_, a), (_, b) in zip(kept, expected, strict=True):
        assert (a.family, a.prompt, a.unit, list(a.objects)) == (
            b.family,
            b.prompt,
            b.unit,
            list(b.objects),
        )
        assert list(a.segments) == list(b.segments)
    write_questions(folder, seed=4, pairs=(2, 2), families=("distance",))
    assert {question.family for _, question in read_questions(folder)} == {"distance"}
    assert "config_name: questions" in (folder / "README.md").read_text()
    assert count_labels(folder) == 12  # the questions are not taken for labels
    refuses(
        "pixel_point", write_questions, folder, families=("distance", "pixel_point")
    )  # without depth
    assert {question.family for _, question in read_questions(folder)} == {"distance"}


def test_the_page_is_whole_in_itself_and_says_what_is_there(folder: Path, tmp_path: Path) -> None:
    write_questions(folder)
    shown = select_labels(folder, 5)
    assert [item.source for item in shown] == [f"scene & {n}" for n in (0, 2, 4, 7, 9)]
    out = tmp_path / "page.html"
    write_label_page(folder, shown, out)
    html = out.read_text()
    assert html.count("data:image/jpeg;base64,") == 5 and "Contact sheet: 5 of 12" in html
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    assert "scene &amp; 4" in html and "<b>12</b>" in html and "written yet" not in html
    question = next(q for source, q in read_questions(folder) if source == "scene & 4")
    assert question.prompt.split("{")[0] in html
    assert "numbers;" in html and "box vertices" in html and not list(tmp_path.glob(".*"))
    (folder / "skipped.parquet").write_bytes(b"PAR1")
    refuses(r"skipped\.parquet is broken", write_label_page, folder, shown, out)


def test_the_rerun_file_is_whole(
    frames: list[Frame], labels: list[LabeledImage], tmp_path: Path
) -> None:
    pytest.importorskip("rerun")
    clouds = [*GroundTruth().predict(frames[:2]), None]
    write_rerun(labels[:3], clouds, path := tmp_path / "labels.rrd")
    assert path.stat().st_size > 100_000
    show = [sys.executable, "-m", "rerun", "rrd", "print", str(path)]
    told = subprocess.run(show, capture_output=True, text=True, check=True).stdout
    rows: Counter[str] = Counter()
    for number, entity in re.findall(r"with (\d+) rows .* - (\S+) - data", told):
        rows[entity] += int(number)
    for entity in ("/camera/boxes", "/camera/points", "/camera/keypoints", "/source"):
        assert rows[entity] == 3
    with pytest.raises(IndexError):
        write_rerun(
            labels[:1], [replace(clouds[0], mask=np.ones((9, 9), bool))], tmp_path / "x.rrd"
        )
    assert list(tmp_path.iterdir()) == [path]


def test_the_commands_ask_and_show(
    folder: Path, run_command: Command, run_refused_command: Command
) -> None:
    said = run_command("questions", str(folder), "--seed", "2", "--pairs", "1", "1")
    assert "12 questions about 12 images:" in said
    assert str(folder / "show.html") in run_command("label", "show", str(folder), "--images", "2")
    assert "'distance'" in run_refused_command("questions", str(folder), "--families", "distanze")
