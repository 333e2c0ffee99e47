"""Questions about a folder of labels, the page about it, the Rerun file, and their commands."""

import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from labels_scenes import TRUTH, make_random_frame
from refusals import Command, refuses
from spear.labels.models.ground_truth import GroundTruth
from spear.labels.pipeline import label_images
from spear.labels.questions.store import (
    generate_questions_from_seed,
    read_questions,
    write_questions,
)
from spear.labels.store import count_labeled_images, read_evenly_spread_labels, write_labels
from spear.question_types import QUESTION_TYPES, QUESTION_TYPES_2D
from spear.report.labels import write_label_page, write_rerun_file
from spear.types import Frame, LabeledImage

NUM_LABELS = 12


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    """Rendered scenes, whose sources have a character that HTML must escape."""
    rng = np.random.default_rng(5)
    return [replace(make_random_frame(rng), source=f"scene & {n}") for n in range(NUM_LABELS)]


@pytest.fixture(scope="module")
def labels(frames: list[Frame]) -> list[LabeledImage]:
    """The labels of the scenes, from the ground truth."""
    return list(label_images(frames, *TRUTH))


@pytest.fixture
def folder(labels: list[LabeledImage], tmp_path: Path) -> Path:
    """A folder with the labels, in shards of five."""
    for start in range(0, NUM_LABELS, 5):
        shard = tmp_path / f"labels/labels-{start:05d}.parquet"
        write_labels(labels[start : start + 5], shard)
    return tmp_path / "labels"


QUESTION_TYPE_SETS = pytest.mark.parametrize(
    "question_types", [QUESTION_TYPES, QUESTION_TYPES_2D, ("what_at",)]
)


@QUESTION_TYPE_SETS
def test_written_questions_are_those_that_were_generated(
    question_types: tuple[str, ...], labels: list[LabeledImage], folder: Path
) -> None:
    """The questions about an image depend only on the seed and the image's source."""
    expected = []
    for label in labels:
        for question in generate_questions_from_seed(label, 3, question_types=question_types):
            expected.append((label.source, question))

    num_images, counts = write_questions(folder, seed=3, question_types=question_types)

    written_questions = list(read_questions(folder))
    assert num_images == NUM_LABELS
    assert counts.total() == len(written_questions)
    assert len(written_questions) > NUM_LABELS
    assert set(counts) == set(question_types)
    assert [source for source, _ in written_questions] == [source for source, _ in expected]
    for (_, question), (_, expected_question) in zip(written_questions, expected, strict=True):
        assert question.question_type == expected_question.question_type
        assert question.prompt == expected_question.prompt
        assert question.unit == expected_question.unit
        assert list(question.objects) == list(expected_question.objects)
        assert list(question.segments) == list(expected_question.segments)


def read_question_types(folder: Path) -> set[str]:
    """Return the types of the questions that are written in the folder."""
    return {question.question_type for _, question in read_questions(folder)}


def test_new_questions_replace_those_that_were_written(folder: Path) -> None:
    write_questions(folder, seed=3)

    write_questions(folder, seed=4, questions_per_image=(2, 2), question_types=("distance",))

    assert read_question_types(folder) == {"distance"}


def test_questions_that_need_depth_are_refused_and_the_written_ones_stay(folder: Path) -> None:
    write_questions(folder, question_types=("distance",))

    refuses("pixel_point", write_questions, folder, question_types=("distance", "pixel_point"))

    assert read_question_types(folder) == {"distance"}


def test_questions_are_described_and_not_taken_for_labels(folder: Path) -> None:
    write_questions(folder)

    assert "config_name: questions" in (folder / "README.md").read_text()
    assert count_labeled_images(folder) == NUM_LABELS


def test_the_labels_on_the_page_are_spread_over_the_folder(folder: Path) -> None:
    sources = [label.source for label in read_evenly_spread_labels(folder, 5)]

    assert sources == [f"scene & {number}" for number in (0, 2, 4, 7, 9)]


def test_texts_of_others_are_escaped_on_the_page(
    labels: list[LabeledImage], tmp_path: Path
) -> None:
    script = "<script>alert(1)</script>\"'>"
    hostile_objects = [replace(o, name=script) for o in labels[0].objects]
    hostile = replace(labels[0], source=script, objects=hostile_objects)
    write_labels([hostile], tmp_path / "labels/labels-0.parquet")

    write_label_page(tmp_path / "labels", [hostile], tmp_path / "page.html")

    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_the_page_is_self_contained_and_shows_labels_and_questions(
    folder: Path, tmp_path: Path
) -> None:
    write_questions(folder)

    write_label_page(folder, read_evenly_spread_labels(folder, 5), tmp_path / "page.html")

    html = (tmp_path / "page.html").read_text()
    # Images are in the page, and nothing is loaded from elsewhere.
    assert html.count("data:image/jpeg;base64,") == 5
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    # The contact sheet, with the shown labels and their questions.
    assert "Contact sheet: 5 of 12" in html
    assert "scene &amp; 4" in html
    question = next(q for source, q in read_questions(folder) if source == "scene & 4")
    assert question.prompt.split("{")[0] in html
    # The statistics: number of images, use of the 3D tokens, question types.
    assert "<b>12</b>" in html
    assert "numbers;" in html
    assert "box vertices" in html
    assert "written yet" not in html
    assert not list(tmp_path.glob(".*"))  # no temporary files


def test_the_page_generates_questions_if_none_were_written(folder: Path, tmp_path: Path) -> None:
    write_label_page(folder, read_evenly_spread_labels(folder, 2), tmp_path / "page.html")

    assert "none of them written yet" in (tmp_path / "page.html").read_text()


def test_a_broken_list_of_skipped_images_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "skipped.parquet").write_bytes(b"PAR1")

    refuses(
        r"skipped\.parquet is broken",
        write_label_page,
        folder,
        read_evenly_spread_labels(folder, 2),
        tmp_path / "page.html",
    )


def test_the_rerun_file_has_every_label(
    frames: list[Frame], labels: list[LabeledImage], tmp_path: Path
) -> None:
    """Three labels are written, of which the last has no point cloud."""
    pytest.importorskip("rerun")
    path = tmp_path / "labels.rrd"
    clouds = [*GroundTruth().predict(frames[:2]), None]

    write_rerun_file(labels[:3], clouds, path)

    assert path.stat().st_size > 100_000  # with the clouds
    command = [sys.executable, "-m", "rerun", "rrd", "print", str(path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    num_rows: Counter[str] = Counter()
    for number, entity in re.findall(r"with (\d+) rows .* - (\S+) - data", printed):
        num_rows[entity] += int(number)
    for entity in ("/camera/boxes", "/camera/points", "/camera/keypoints", "/source"):
        assert num_rows[entity] == 3  # a row per label; the missing cloud has an empty one


def test_a_rerun_file_that_cannot_be_made_leaves_nothing(
    frames: list[Frame], labels: list[LabeledImage], tmp_path: Path
) -> None:
    pytest.importorskip("rerun")
    [cloud] = GroundTruth().predict(frames[:1])
    wrong_cloud = replace(cloud, mask=np.ones((9, 9), bool))  # another size than the image

    with pytest.raises(IndexError):
        write_rerun_file(labels[:1], [wrong_cloud], tmp_path / "labels.rrd")

    assert list(tmp_path.iterdir()) == []


def test_the_commands_ask_and_show(
    folder: Path, run_command: Command, run_refused_command: Command
) -> None:
    output = run_command("questions", str(folder), "--seed", "2", "--questions-per-image", "1", "1")
    assert "12 questions about 12 images:" in output
    assert str(folder / "show.html") in run_command(
        "label", "show", str(folder), "--num-images", "2"
    )
    assert "'distance'" in run_refused_command(
        "questions", str(folder), "--question-types", "distanze"
    )
