"""3D question scores: measures by hand, baselines, calibration, and a model that knows the truth."""

import base64
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from labels_boxes import labelled
from refusals import Command, refuses
from spear.errors import Notice
from spear.evaluate.options import QuestionOptions
from spear.evaluate.vqa import run as vqa
from spear.evaluate.vqa.ask import format_reply
from spear.evaluate.vqa.calibration import (
    Certainty,
    calibrate,
    compute_spread_factor,
    compute_uncertainty,
)
from spear.evaluate.vqa.measures import (
    Segments,
    find_closer_named,
    guess_constants,
    guess_from_depth,
    measure_answer,
)
from spear.evaluate.vqa.scores import AnsweredQuestion, Scores, summarize
from spear.labels.fit.box3d import compute_iou_3d, fit_nearest_box, make_box
from spear.labels.inputs import hash_content
from spear.labels.store import write_labels
from spear.models.readout import Distribution
from spear.policy import Answer
from spear.report.draw import PREDICTION_COLOR, TRUTH_COLOR
from spear.report.vqa import draw_figure, make_vqa_page
from spear.tokens import CoordinateTokenizer
from spear.types import Array, LabeledImage, Pixel, Question, Unit
from spear.util.images import decode_image

COORDINATES = CoordinateTokenizer.fit(np.random.default_rng(0).normal(0.4, 0.5, 20_000), bins=256)


class Oracle:
    """Knows every question's answer and adds an offset (m) to all 3D points and distances.

    sigma  if not 0, it also says what it holds possible: normals of this standard deviation about that.
    """

    def __init__(self, offset: float = 0.0, drop_last: bool = False, sigma: float = 0.0) -> None:
        self.offset, self.drop_last, self.sigma = offset, drop_last, sigma
        self.known: dict[str, Segments] = {}

    def answer(
        self,
        images: Sequence[Array],
        prompts: Sequence[str],
        family: str | None = None,
        *_: str,
        **how: Any,
    ) -> list[Answer]:
        said = []
        for image, prompt in zip(images, prompts, strict=True):
            assert image.dtype == np.uint8
            segments = [s + self.offset if isinstance(s, float) else s for s in self.known[prompt]]
            values = [s for s in segments if isinstance(s, float)]
            held = self._held(np.array(values)) if self.sigma and how.get("distributions") else None
            kept = segments[:-1] if self.drop_last and family is None else segments
            said.append(Answer(kept, "metre", held))
        return said

    def _held(self, values: Array) -> Distribution:
        score = (COORDINATES.bin_centers - values[:, None]) / self.sigma
        p = np.exp(-0.5 * score**2) * np.diff(COORDINATES.bin_edges)
        return Distribution((p / p.sum(1, keepdims=True)).astype(np.float32), COORDINATES)


def ask_oracle(
    oracle: Oracle, labels: list[LabeledImage], monkeypatch: pytest.MonkeyPatch, **options: object
) -> Scores:
    real = vqa.generate_questions

    def remember(*args: object, **kwargs: object) -> list[Question]:
        """Makes prompts unique per image, so that the oracle can look them up."""
        asked = []
        for q in real(*args, **kwargs):  # type: ignore[arg-type]
            prompt = f"{q.prompt} #{len(oracle.known)}"
            oracle.known[prompt] = q.segments
            asked.append(Question(q.family, prompt, q.segments, q.objects, q.unit))
        return asked

    with monkeypatch.context() as patch:
        patch.setattr(vqa, "generate_questions", remember)
        return vqa.evaluate_vqa(oracle, labels, QuestionOptions(**options))  # type: ignore[arg-type]


def test_an_oracle_has_no_error_and_an_offset_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = [labelled(i) for i in range(6)]
    perfect = ask_oracle(Oracle(), labels, monkeypatch)
    assert set(perfect.families) == set(vqa.QUESTION_TYPES)
    for score in perfect.families.values():
        assert score.n > 0 and score.grammar.value == 1
        assert score.measures["relative"].value == pytest.approx(0, abs=1e-6)
    boxes, worded = perfect.families["box_vertices"], perfect.families["chain_of_thought"]
    assert boxes.measures["iou"].value == pytest.approx(1, abs=1e-4)
    assert boxes.measures["iou_50"].value == 1 and boxes.constant["iou_50"] < 1
    assert worded.measures["closer"].value == worded.measures["consistent"].value == 1
    assert worded.constant["closer"] < 1
    off = ask_oracle(Oracle(0.01), labels, monkeypatch).families
    root3 = np.sqrt(3) * 10
    expected = {"box_vertices": root3, "keypoint": root3, "offset": root3}
    for family, millimetres in (expected | {"distance": 10, "chain_of_thought": 10}).items():
        assert off[family].measures["error"].value == pytest.approx(millimetres, rel=1e-6)
    assert off["box_vertices"].measures["vertex"].value == pytest.approx(root3, rel=1e-6)
    shifted = 5**3 / (2 * 6**3 - 5**3)  # boxes of 60 mm, 10 mm apart along each axis
    assert off["box_vertices"].measures["iou"].value == pytest.approx(shifted, abs=1e-3)
    assert off["box_vertices"].constant["error"] > 5
    assert 100 * 0.010 / 0.95 < off["distance"].measures["relative"].value < 100 * 0.010 / 0.8
    assert off["distance"].measures["relative"].low > 1


def test_broken_grammar_is_counted_and_counts_as_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = [labelled(i) for i in range(3)]
    scores = ask_oracle(Oracle(drop_last=True), labels, monkeypatch)
    box = scores.families["box_vertices"]
    assert box.grammar.value == 1 and box.free.value == 0
    headers, rows = scores.rows()
    assert [row[0] for row in rows] == [f.replace("_", " ") for f in scores.families]
    assert rows[0][headers.index("free")] == "0.0%"
    lonely = replace(labels[0], objects=labels[0].objects[:1])
    with pytest.warns(Notice, match="offset, chain_of_thought"):
        assert len(ask_oracle(Oracle(), [lonely], monkeypatch).families) == 4
    question = scores.answers[0].question
    assert measure_answer(question, question.segments[:-1], labels[0]) == {"iou_25": 0, "iou_50": 0}


def test_an_answer_that_fails_counts_in_medians_and_means() -> None:
    labels = [labelled(i) for i in range(8)]
    questions = [
        vqa.generate_questions_by_family([x], ["box_vertices"], 1, seed=3)["box_vertices"][0][1]
        for x in labels
    ]
    for failed, finite in ((3, True), (5, False)):
        said = [q.segments if i >= failed else [] for i, q in enumerate(questions)]
        asked = [
            AnsweredQuestion(i, x, q, s)
            for i, (x, q, s) in enumerate(zip(labels, questions, said, strict=True))
        ]
        found = summarize(asked, {"box_vertices": [True] * 8}, labels, "mode").families[
            "box_vertices"
        ]
        assert (
            np.isfinite(found.measures["error"].value) == finite
            and found.measures["error"].high == np.inf
        )
        assert found.measures["iou"].value == pytest.approx(1 - failed / 8, abs=1e-3)


def test_relative_labels_have_no_millimetres(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = ask_oracle(Oracle(0.01), [labelled(i, unit="relative") for i in range(3)], monkeypatch)
    assert "error" not in scores.families["keypoint"].measures and "%" in scores.rows()[1][0][2]
    unknown = QuestionOptions(families=("keypiont",))
    refuses("did you mean 'keypoint'", vqa.evaluate_vqa, Oracle(), [labelled(0)], unknown)


def test_the_depth_guess_knows_how_far_away_a_scene_is() -> None:
    labels = [labelled(0, scale) for scale in (0.5, 1.0, 2.0, 3.0)]
    for family in ("box_vertices", "keypoint", "offset", "distance"):
        questions = [
            vqa.generate_questions_by_family([label], [family], 1, seed=3)[family][0][1]
            for label in labels
        ]
        depth, constant = guess_from_depth(questions, labels), guess_constants(questions)
        for i, (q, near, far) in enumerate(zip(questions, depth, constant, strict=True)):
            assert measure_answer(q, near, labels[i])["relative"] < 0.01
            assert i in (1, 2) or measure_answer(q, far, labels[i])["relative"] > 5


def test_single_answers_are_measured_as_worked_out_by_hand() -> None:
    truth = Question("back_projection", "?", [Pixel(0.1, 0.2), Pixel(0.5, 0.5)], ["x"])
    found = measure_answer(truth, [Pixel(0.4, 0.6), Pixel(0.5, 0.5)], labelled(0))
    assert found == pytest.approx({"pixels": np.hypot(0.3 * 140, 0.4 * 105) / 2, "relative": 25})
    for closing, named in (
        (" so the mug is closer", "mug"),
        (" so the Red Cube is  closer than the mug", "red cube"),
        (" it is the mugs", None),
        ("", None),
    ):
        thought = ["the mug is ", 0.5, " and the red cube is ", 0.4, closing]
        assert find_closer_named(thought, ("mug", "red cube")) == named
    assert (
        find_closer_named([0.4, " so the cup (left) is closer"], ("mug", "cup (left)"))
        == "cup (left)"
    )


def test_the_nearest_box_of_a_box_is_itself_and_noise_does_not_break_it() -> None:
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    true = make_box(np.array([0.1, 0, 1.0]), np.array([0.1, 0.2, 0.05]), axes)
    assert compute_iou_3d(fit_nearest_box(true.vertices), true) == pytest.approx(1, abs=1e-4)
    noisy = fit_nearest_box(true.vertices + rng.normal(0, 0.003, (8, 3)))
    assert 0.8 < compute_iou_3d(noisy, true) < 0.999
    np.testing.assert_allclose(noisy.rotation.T @ noisy.rotation, np.eye(3), atol=1e-5)
    assert compute_iou_3d(fit_nearest_box(np.ones((8, 3))), true) == pytest.approx(0)


@pytest.mark.parametrize(("too_sure", "inside"), [(1.0, 0.8), (3.0, 0.331)])
def test_coverage_is_what_it_should_be(too_sure: float, inside: float) -> None:
    """Truths drawn about what was said; a model that knows how far, or is three times as sure."""
    rng = np.random.default_rng(1)
    answers, oracle = [], Oracle(sigma=0.1)
    for image in range(300):
        sigma = 0.02 if image % 2 else 0.1
        truth = rng.normal(0.4, 0.1, 3)
        oracle.sigma = sigma / too_sure
        c = Certainty.of(oracle._held(truth + rng.normal(0, sigma, 3)), truth, np.full(3, 0.5))
        answers.append((image, c, float(100 * c.relative_error.mean())))
    found = calibrate(answers, compute_spread_factor([c for _, c, _ in answers[:150]]))
    assert found.coverage["80%"].value == pytest.approx(inside, abs=0.05)
    assert found.coverage["80%"].low < inside < found.coverage["80%"].high + 0.05
    assert found.coverage["spear ask, 80%"].value == pytest.approx(0.8, abs=0.05)
    assert (
        found.curve[0] == 0
        and found.curve[-1] == 1
        and found.n == sum(b.n for b in found.bands) == 900
    )
    assert found.bands[-1].error / found.bands[-1].spread == pytest.approx(too_sure, rel=0.2)
    assert found.less_sure > 3 * found.surer and (found.miss < 0.05) == (too_sure == 1)


def test_a_vertex_is_no_surer_than_those_before_it() -> None:
    wide, narrow = (Oracle(sigma=sigma)._held(np.full(3, 0.4)) for sigma in (0.1, 0.01))
    parts = [wide.probabilities[:2], narrow.probabilities[2:], *[narrow.probabilities] * 7]
    box = Distribution(np.concatenate(parts), wide.coordinates)
    np.testing.assert_allclose(
        compute_uncertainty(box), np.tile([*wide.spread()[:2], narrow.spread()[2]], 8)
    )
    np.testing.assert_array_equal(compute_uncertainty(narrow), narrow.spread())


def test_readings_are_compared_and_the_page_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = [labelled(i) for i in range(4)]
    scores = ask_oracle(Oracle(0.02, sigma=0.02), labels, monkeypatch, decode="median")
    assert scores.decode == "median"
    assert (
        set(scores.readings)
        == set(scores.calibration)
        == set(vqa.QUESTION_TYPES) - {"back_projection"}
    )
    for family, readings in scores.readings.items():
        assert readings.error["median"] == pytest.approx(
            scores.families[family].measures["relative"].value
        )
        assert readings.best in readings.error and abs(readings.gain["mean"].value) < 0.5
    uri, _ = draw_figure(next(a for a in scores.answers if a.question.family == "box_vertices"))
    picture = decode_image(base64.b64decode(uri.partition(",")[2]))
    assert picture.shape == (420, 560, 3)
    for colour in (TRUTH_COLOR, PREDICTION_COLOR):
        assert (np.abs(picture.astype(int) - colour).sum(-1) < 20).sum() > 50
    page = make_vqa_page(scores, "model <1>", "labels")
    assert page.count("<svg") == 2 and "model &lt;1&gt;" in page and "<script" not in page
    assert page.count("<img") == page.count("data:image/jpeg;base64,") > 10
    assert all(
        t in page for t in ("Worst", "Best", "Calibration", "Mode, mean or median", "In words")
    )


def test_the_command_writes_a_page(
    tmp_path: Path, run_command: Command, run_refused_command: Command, monkeypatch: Any
) -> None:
    labels = [replace(one := labelled(i), image=one.image + bytes([i])) for i in range(4)]
    said, learned = list[str](), {"learned": hash_content(labels[2].image)}
    monkeypatch.setattr("spear.cli.evaluate.notice", said.append)
    monkeypatch.setattr("spear.models.weights.folders.read_provenance", lambda folder: learned)
    write_labels(labels, tmp_path / "labels/external/labels-00000.parquet")
    out = tmp_path / "out"
    command = [
        "evaluate",
        "vqa",
        "nano",
        str(tmp_path / "labels"),
        "--images",
        "2",
        "--per-image",
        "1",
    ]
    assert "Calibration" in run_command(
        *command, "--families", "keypoint", "distance", "--out", str(out)
    )
    saved = json.loads((out / "scores.json").read_text())
    assert (saved["images"], saved["model"]) == (2, "nano") and "1 of 2" in said[0]
    assert set(saved["readings"]["keypoint"]["error"]) == {"mode", "mean", "median"}
    assert "spear ask, 80%" in saved["calibration"]["keypoint"]["coverage"]
    assert (out / "index.html").stat().st_size > 5000
    cases = ["nano-vlm", command[3]], ["nano", "sim"], [*command[2:], "--families", "offset"]
    for other, what in zip(cases, ("model", "questions", "--families"), strict=True):
        assert f"{what} is" in run_refused_command(*command[:2], *other, "--out", str(out))


def test_labels_of_another_unit_are_refused(tmp_path: Path, run_refused_command: Command) -> None:
    write_labels([labelled(0, unit="relative")], tmp_path / "labels-00000.parquet")
    command = ("evaluate", "vqa", "nano", str(tmp_path), "--out", str(tmp_path / "out"))
    assert "the model answers in 'metre'" in run_refused_command(*command)


@pytest.mark.parametrize(("unit", "said"), [("metre", "m"), ("relative", "units")])
def test_an_answer_to_one_question_is_said_in_the_unit_of_the_model(unit: Unit, said: str) -> None:
    image = np.zeros((60, 80, 3), np.uint8)
    assert (
        format_reply(Answer(["the mug is ", 0.41251, " away"], unit), image)
        == f"the mug is 0.413 {said} away"
    )
    box = format_reply(Answer([0.25] * 24, unit), image).splitlines()
    assert box[0] == f"centre (0.250, 0.250, 0.250) {said}; vertices:" and len(box) == 9
    assert format_reply(Answer([Pixel(0.5, 0.25)], unit), image) == "(40, 15) px"
    assert format_reply(Answer([], unit), image) == "(no answer)"
