"""Scores of 3D questions: measures that are computed by hand, baselines, calibration, the command.

Most tests ask a model that knows the true answers, and that makes a known error. The images
(`make_labeled_image`) show three cubes of 6 cm, at 0.8 to 0.9 m from the camera.
"""

import base64
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from answer_checker import CHECKED_TYPES
from labels_boxes import make_labeled_image
from refusals import Command, refuses
from spear.errors import Notice
from spear.evaluate.options import QuestionOptions
from spear.evaluate.vqa import run as vqa
from spear.evaluate.vqa.ask import format_reply
from spear.evaluate.vqa.calibration import (
    Calibration,
    Certainty,
    ScoredAnswer,
    compute_spread,
    compute_spread_factor,
    measure_calibration,
)
from spear.evaluate.vqa.measures import (
    guess_medians,
    guess_medians_in_units_of_depth,
    measure_answer,
)
from spear.evaluate.vqa.scores import AnsweredQuestion, Scores, summarize
from spear.labels.fit.box3d import compute_iou_3d, fit_nearest_box, make_box
from spear.labels.inputs import hash_content
from spear.labels.questions.types.chain_of_thought import find_name_called_closer
from spear.labels.store import write_labels
from spear.models.readout import Distribution
from spear.policy import Answer
from spear.question_types import ANSWER_FORMS
from spear.report.draw import PREDICTION_COLOR, TRUTH_COLOR
from spear.report.vqa import draw_answer_and_truth, make_vqa_page
from spear.tokens import CoordinateTokenizer
from spear.types import Array, LabeledImage, Pixel, Question, Segments, Unit
from spear.util.images import decode_image

COORDINATES = CoordinateTokenizer.fit(np.random.default_rng(0).normal(0.4, 0.5, 20_000), bins=256)


def make_distribution(values: Array, sigma: float) -> Distribution:
    """Make normal distributions around some numbers, as probabilities of bins.

    Args:
        values: [n] the means.
        sigma: The standard deviation.
    """
    z = (COORDINATES.bin_centers - values[:, None]) / sigma  # [n, bins]
    bin_widths = np.diff(COORDINATES.bin_edges)
    unscaled = np.exp(-0.5 * z**2) * bin_widths
    probabilities = unscaled / unscaled.sum(1, keepdims=True)
    return Distribution(probabilities.astype(np.float32), COORDINATES)


class OracleModel:
    """A stand-in for SPEAR-VLM that knows the true answer to every question.

    offset_m             error that is added to every number of its answers.
    breaks_free_grammar  whether its free answers lack their last segment.
    sigma                if not 0, its numbers have normal distributions with this standard
                         deviation.
    answers              prompt → true answer, see `ask_oracle`.
    """

    def __init__(
        self, offset_m: float = 0.0, breaks_free_grammar: bool = False, sigma: float = 0.0
    ) -> None:
        self.offset_m = offset_m
        self.breaks_free_grammar = breaks_free_grammar
        self.sigma = sigma
        self.answers: dict[str, Segments] = {}

    def answer(
        self,
        images: Sequence[Array],
        prompts: Sequence[str],
        question_type: str | None = None,
        *_: str,
        distributions: bool = False,
        **__: Any,
    ) -> list[Answer]:
        assert all(image.dtype == np.uint8 for image in images)
        assert len(images) == len(prompts)
        return [self._answer_one(prompt, question_type, distributions) for prompt in prompts]

    def _answer_one(self, prompt: str, question_type: str | None, distributions: bool) -> Answer:
        segments: Segments = []
        for segment in self.answers[prompt]:
            is_number = isinstance(segment, float)
            segments.append(segment + self.offset_m if is_number else segment)
        distribution = None
        if self.sigma and distributions:
            values = [segment for segment in segments if isinstance(segment, float)]
            distribution = make_distribution(np.array(values), self.sigma)
        if self.breaks_free_grammar and question_type is None:
            segments = segments[:-1]
        return Answer(segments, "metre", distribution)


def ask_oracle(
    oracle: OracleModel,
    labels: list[LabeledImage],
    monkeypatch: pytest.MonkeyPatch,
    **options: object,
) -> Scores:
    """Evaluate an oracle on labeled images, with some `QuestionOptions`."""
    generate_questions = vqa.generate_questions

    def generate_and_remember(*args: object, **kwargs: object) -> list[Question]:
        """Generate questions, number their prompts, and tell the oracle their true answers.

        Without the numbers, the same question about two images would have the same prompt.
        """
        questions = []
        for question in generate_questions(*args, **kwargs):  # type: ignore[arg-type]
            prompt = f"{question.prompt} #{len(oracle.answers)}"
            oracle.answers[prompt] = question.segments
            questions.append(replace(question, prompt=prompt))
        return questions

    with monkeypatch.context() as patch:
        patch.setattr(vqa, "generate_questions", generate_and_remember)
        return vqa.evaluate_vqa(oracle, labels, QuestionOptions(**options))  # type: ignore[arg-type]


def generate_one(label: LabeledImage, question_type: str) -> Question:
    """Generate one question of a type about an image."""
    questions = vqa.generate_questions_by_type([label], [question_type], 1, seed=3)
    _, question = questions[question_type][0]
    return question


# ---- Scores.


@pytest.fixture(scope="module")
def labels() -> list[LabeledImage]:
    """Six labeled images."""
    return [make_labeled_image(seed) for seed in range(6)]


def test_an_oracle_has_no_error(
    labels: list[LabeledImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = ask_oracle(OracleModel(), labels, monkeypatch)

    assert set(scores.type_scores) == set(vqa.QUESTION_TYPES)
    for score in scores.type_scores.values():
        assert score.n > 0
        assert score.grammar.value == 1
        assert score.measures["relative"].value == pytest.approx(0, abs=1e-6)
    box_score = scores.type_scores["box_vertices"]
    assert box_score.measures["iou"].value == pytest.approx(1, abs=1e-4)
    assert box_score.measures["iou_50"].value == 1
    worded_score = scores.type_scores["chain_of_thought"]
    assert worded_score.measures["closer"].value == 1
    assert worded_score.measures["consistent"].value == 1


def test_baselines_are_worse_than_an_oracle(
    labels: list[LabeledImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = ask_oracle(OracleModel(), labels, monkeypatch)

    assert scores.type_scores["box_vertices"].constant["error"] > 5  # mm
    assert scores.type_scores["box_vertices"].constant["iou_50"] < 1
    assert scores.type_scores["chain_of_thought"].constant["closer"] < 1


@pytest.mark.parametrize(
    ("question_type", "error_mm"),
    [
        # 10 mm along each of three axes, or of a single distance.
        ("box_vertices", np.sqrt(3) * 10),
        ("keypoint", np.sqrt(3) * 10),
        ("offset", np.sqrt(3) * 10),
        ("distance", 10),
        ("chain_of_thought", 10),
    ],
)
def test_an_offset_is_measured(
    question_type: str,
    error_mm: float,
    labels: list[LabeledImage],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scores = ask_oracle(
        OracleModel(offset_m=0.01), labels, monkeypatch, question_types=(question_type,)
    )

    error = scores.type_scores[question_type].measures["error"]
    assert error.value == pytest.approx(error_mm, rel=1e-6)


def test_the_overlap_of_shifted_boxes_is_as_worked_out_by_hand(
    labels: list[LabeledImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Cubes of 6 cm that are shifted by 1 cm along each axis share a cube of 5 cm.
    intersection = 5**3
    union = 2 * 6**3 - intersection
    iou = intersection / union

    scores = ask_oracle(
        OracleModel(offset_m=0.01), labels, monkeypatch, question_types=("box_vertices",)
    )

    measures = scores.type_scores["box_vertices"].measures
    assert measures["vertex"].value == pytest.approx(np.sqrt(3) * 10, rel=1e-6)
    assert measures["iou"].value == pytest.approx(iou, abs=1e-3)


def test_relative_errors_are_relative_to_the_distance(
    labels: list[LabeledImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The objects are 0.8 to 0.95 m away, measured along the line of sight."""
    scores = ask_oracle(
        OracleModel(offset_m=0.01), labels, monkeypatch, question_types=("distance",)
    )

    relative = scores.type_scores["distance"].measures["relative"]
    assert 100 * 0.010 / 0.95 < relative.value < 100 * 0.010 / 0.8  # percent
    assert relative.low > 1


def test_free_answers_with_the_wrong_grammar_are_counted(
    labels: list[LabeledImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = ask_oracle(OracleModel(breaks_free_grammar=True), labels[:3], monkeypatch)

    box_score = scores.type_scores["box_vertices"]
    assert box_score.grammar.value == 1
    assert box_score.free.value == 0
    headers, rows = scores.rows()
    assert [row[0] for row in rows] == [
        question_type.replace("_", " ") for question_type in scores.type_scores
    ]
    assert rows[0][headers.index("free")] == "0.0%"


def test_an_answer_with_the_wrong_grammar_fails_the_rates_only(
    labels: list[LabeledImage],
) -> None:
    """The answer lacks the last of its 24 numbers."""
    question = generate_one(labels[0], "box_vertices")

    measures = measure_answer(question, question.segments[:-1], labels[0])

    assert measures == {"iou_25": 0, "iou_50": 0}


def test_question_types_that_no_image_allows_are_named(
    labels: list[LabeledImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    one_object = replace(labels[0], objects=labels[0].objects[:1])
    types_about_two_objects = [
        name for name in vqa.QUESTION_TYPES if CHECKED_TYPES[name].num_objects == 2
    ]

    with pytest.warns(Notice, match=", ".join(types_about_two_objects)):
        scores = ask_oracle(OracleModel(), [one_object], monkeypatch)

    assert set(scores.type_scores) == set(vqa.QUESTION_TYPES) - set(types_about_two_objects)


def test_an_unknown_question_type_is_refused(labels: list[LabeledImage]) -> None:
    options = QuestionOptions(question_types=("keypiont",))

    refuses("Did you mean 'keypoint'", vqa.evaluate_vqa, OracleModel(), labels, options)


@pytest.mark.parametrize(("num_failed", "is_finite"), [(3, True), (5, False)])
def test_failed_answers_count_in_medians_and_means(num_failed: int, is_finite: bool) -> None:
    """Of eight answers, some have no segments. Such an error is infinite, and its IoU is 0."""
    labels = [make_labeled_image(seed) for seed in range(8)]
    answers = []
    for index, label in enumerate(labels):
        question = generate_one(label, "box_vertices")
        segments = question.segments if index >= num_failed else []
        answers.append(AnsweredQuestion(index, label, question, segments))

    are_free_answers_grammatical = {"box_vertices": [True] * 8}
    scores = summarize(answers, are_free_answers_grammatical, labels, "mode")

    measures = scores.type_scores["box_vertices"].measures
    assert np.isfinite(measures["error"].value) == is_finite
    assert measures["error"].high == np.inf
    assert measures["iou"].value == pytest.approx(1 - num_failed / 8, abs=1e-3)


def test_relative_labels_have_no_millimeters(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = [make_labeled_image(seed, unit="relative") for seed in range(3)]

    scores = ask_oracle(OracleModel(offset_m=0.01), labels, monkeypatch)

    assert "error" not in scores.type_scores["keypoint"].measures
    _, rows = scores.rows()
    assert "%" in rows[0][2]


# ---- Measures.


@pytest.mark.parametrize("question_type", ["box_vertices", "keypoint", "offset", "distance"])
def test_the_depth_baseline_knows_how_far_away_a_scene_is(question_type: str) -> None:
    """The scenes are the same, but for their scale."""
    labels = [make_labeled_image(0, scale) for scale in (0.5, 1.0, 2.0, 3.0)]
    questions = [generate_one(label, question_type) for label in labels]

    guesses = guess_medians_in_units_of_depth(questions, labels)
    constants = guess_medians(questions)

    assert guesses is not None
    for index, (question, label) in enumerate(zip(questions, labels, strict=True)):
        assert measure_answer(question, guesses[index], label)["relative"] < 0.01
        # The best constant lies between the answers for 1.0 and 2.0, far from the other two.
        if index in (0, 3):
            assert measure_answer(question, constants[index], label)["relative"] > 5


def test_a_back_projection_is_measured_as_worked_out_by_hand() -> None:
    true_pixels = [Pixel(0.1, 0.2), Pixel(0.5, 0.5)]
    question = Question("back_projection", prompt="?", segments=true_pixels, objects=["x"])
    answer: Segments = [Pixel(0.4, 0.6), Pixel(0.5, 0.5)]

    measures = measure_answer(question, answer, make_labeled_image(0))

    # The first of two points is off by 0.3 of the width (140 px) and 0.4 of the height (105 px).
    mean_pixels = np.hypot(0.3 * 140, 0.4 * 105) / 2
    mean_percent = 100 * np.hypot(0.3, 0.4) / 2
    assert measures == pytest.approx({"pixels": mean_pixels, "relative": mean_percent})


@pytest.mark.parametrize(
    ("conclusion", "name"),
    [
        (" so the mug is closer", "mug"),
        (" so the Red Cube is  closer than the mug", "red cube"),
        (" it is the mugs", None),  # another word
        ("", None),
    ],
)
def test_the_first_object_named_after_the_numbers_is_the_closer(
    conclusion: str, name: str | None
) -> None:
    thought = ["the mug is ", 0.5, " and the red cube is ", 0.4, conclusion]

    assert find_name_called_closer(thought, ("mug", "red cube")) == name


def test_a_name_with_parentheses_is_found() -> None:
    thought = [0.4, " so the cup (left) is closer"]

    assert find_name_called_closer(thought, ("mug", "cup (left)")) == "cup (left)"


@pytest.fixture
def turned_box() -> Any:
    """A box with three different sides and random axes."""
    axes, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    return make_box(np.array([0.1, 0, 1.0]), np.array([0.1, 0.2, 0.05]), axes)


def test_the_nearest_box_of_a_boxs_vertices_is_the_box(turned_box: Any) -> None:
    assert compute_iou_3d(fit_nearest_box(turned_box.vertices), turned_box) == pytest.approx(
        1, abs=1e-4
    )


def test_the_nearest_box_of_noisy_vertices_is_close(turned_box: Any) -> None:
    noise = np.random.default_rng(1).normal(0, 0.003, (8, 3))

    nearest = fit_nearest_box(turned_box.vertices + noise)

    assert 0.8 < compute_iou_3d(nearest, turned_box) < 0.999
    np.testing.assert_allclose(nearest.rotation.T @ nearest.rotation, np.eye(3), atol=1e-5)


def test_the_nearest_box_of_one_point_overlaps_nothing(turned_box: Any) -> None:
    nearest = fit_nearest_box(np.ones((8, 3)))

    assert compute_iou_3d(nearest, turned_box) == pytest.approx(0)


# ---- Calibration.


def simulate_calibration(overconfidence: float) -> Calibration:
    """Compute the calibration of simulated answers.

    Half of the 300 answers have a small error, the others a large one. The factor of `Trust` is
    computed from the first half of the answers.

    Args:
        overconfidence: How many times smaller the predicted spread is than the standard deviation
            of the error.
    """
    rng = np.random.default_rng(1)
    answers = []
    for image in range(300):
        sigma = 0.02 if image % 2 else 0.1
        truth = rng.normal(0.4, 0.1, 3)
        prediction = truth + rng.normal(0, sigma, 3)
        distribution = make_distribution(prediction, sigma / overconfidence)
        certainty = Certainty.measure(distribution, truth, scales=np.full(3, 0.5))
        relative_error_percent = float(100 * certainty.relative_error.mean())
        answers.append(ScoredAnswer(image, certainty, relative_error_percent))
    factor = compute_spread_factor([answer.certainty for answer in answers[:150]])
    return measure_calibration(answers, factor)


# The overconfidence, and the fraction of true numbers in intervals of 80 %. These reach to 1.2816
# standard deviations; with an overconfidence of 3, only to 0.4272, between which 33.1 % lie.
CASES = pytest.mark.parametrize(("overconfidence", "coverage"), [(1.0, 0.8), (3.0, 0.331)])


@CASES
def test_intervals_contain_as_many_truths_as_they_should(
    overconfidence: float, coverage: float
) -> None:
    calibration = simulate_calibration(overconfidence)

    estimate = calibration.coverage["80%"]
    assert estimate.value == pytest.approx(coverage, abs=0.05)
    assert estimate.low < coverage < estimate.high + 0.05
    is_calibrated = overconfidence == 1
    assert (calibration.expected_calibration_error < 0.05) == is_calibrated


@CASES
def test_scaled_intervals_contain_80_percent(overconfidence: float, coverage: float) -> None:
    calibration = simulate_calibration(overconfidence)

    assert calibration.coverage["spear ask, 80%"].value == pytest.approx(0.8, abs=0.05)


@CASES
def test_bands_compare_spread_and_error(overconfidence: float, coverage: float) -> None:
    calibration = simulate_calibration(overconfidence)

    widest_band = calibration.bands[-1]
    assert widest_band.error / widest_band.spread == pytest.approx(overconfidence, rel=0.2)
    num_numbers = 300 * 3
    assert calibration.n == num_numbers
    assert sum(band.n for band in calibration.bands) == num_numbers
    assert calibration.less_sure > 3 * calibration.surer  # about 5 = 0.1 / 0.02 times


def test_the_curve_begins_at_none_and_ends_at_all() -> None:
    curve = simulate_calibration(1.0).curve

    assert curve[0] == 0
    assert curve[-1] == 1


def test_a_vertex_is_no_surer_than_those_before_it() -> None:
    """The first vertex is unsure in x and y, and all other numbers are sure."""
    wide = make_distribution(np.full(3, 0.4), 0.1)
    narrow = make_distribution(np.full(3, 0.4), 0.01)
    first_vertex = np.concatenate([wide.probabilities[:2], narrow.probabilities[2:]])
    vertices = np.concatenate([first_vertex, *[narrow.probabilities] * 7])

    spread = compute_spread(Distribution(vertices, COORDINATES))

    x, y, _ = wide.spread()
    z = narrow.spread()[2]
    np.testing.assert_allclose(spread, np.tile([x, y, z], 8))


def test_the_spread_of_a_point_is_that_of_its_distribution() -> None:
    distribution = make_distribution(np.full(3, 0.4), 0.01)

    np.testing.assert_array_equal(compute_spread(distribution), distribution.spread())


# ---- Readings and the page.


@pytest.fixture
def certain_scores(monkeypatch: pytest.MonkeyPatch) -> Scores:
    """Scores of answers that are off by 2 cm and have distributions, for four images."""
    labels = [make_labeled_image(seed) for seed in range(4)]
    oracle = OracleModel(offset_m=0.02, sigma=0.02)
    return ask_oracle(oracle, labels, monkeypatch, decode="median")


def test_ways_of_reading_numbers_are_compared(certain_scores: Scores) -> None:
    assert certain_scores.decode == "median"
    question_types = {name for name in vqa.QUESTION_TYPES if ANSWER_FORMS[name].num_numbers > 0}
    assert set(certain_scores.readings) == set(certain_scores.calibration) == question_types
    for question_type, readings in certain_scores.readings.items():
        median_error = certain_scores.type_scores[question_type].measures["relative"].value
        assert readings.error["median"] == pytest.approx(median_error)
        assert readings.best in readings.error
        # The distributions are symmetric, so the ways of reading differ little: by less than half
        # of the relative error.
        assert abs(readings.gain["mean"].value) < 0.5


def test_a_figure_shows_the_true_and_the_predicted_box(certain_scores: Scores) -> None:
    answers = certain_scores.answers
    box_answer = next(a for a in answers if a.question.question_type == "box_vertices")

    uri, _ = draw_answer_and_truth(box_answer)

    picture = decode_image(base64.b64decode(uri.partition(",")[2]))
    assert picture.shape == (420, 560, 3)
    for color in (TRUTH_COLOR, PREDICTION_COLOR):
        color_difference = np.abs(picture.astype(int) - color).sum(-1)  # [420, 560]
        num_pixels = (color_difference < 20).sum()  # JPEG changes colors a little
        assert num_pixels > 50  # the box is drawn with lines of more pixels


def test_the_page_is_complete(certain_scores: Scores) -> None:
    page = make_vqa_page(certain_scores, "model <1>", "labels")

    assert page.count("<svg") == 2
    assert "model &lt;1&gt;" in page
    assert "<script" not in page
    num_images = page.count("<img")
    assert num_images > 10
    assert page.count("data:image/jpeg;base64,") == num_images  # all are in the page itself
    for title in ("Worst", "Best", "Calibration", "Mode, mean or median", "In words"):
        assert title in page


# ---- The command.


@pytest.fixture
def label_folder(tmp_path: Path) -> Path:
    """A folder of four labeled images, whose files differ."""
    labels = []
    for seed in range(4):
        label = make_labeled_image(seed)
        # A byte behind a JPEG image does not change its pixels.
        labels.append(replace(label, image=label.image + bytes([seed])))
    write_labels(labels, tmp_path / "labels/external/labels-00000.parquet")
    return tmp_path / "labels"


COMMAND = ("evaluate", "vqa", "--model", "nano", "--labels")
FEW_QUESTIONS = ("--num-images", "2", "--questions-per-image", "1")


def make_arguments(labels: object, out: Path, *question_types: str) -> list[str]:
    """Make the arguments of a command that asks nano a few questions of some types."""
    types = ["--question-types", *question_types]
    return [*COMMAND, str(labels), *FEW_QUESTIONS, *types, "--out", str(out)]


def test_the_command_writes_scores_and_a_page(
    label_folder: Path, tmp_path: Path, run_command: Command
) -> None:
    out = tmp_path / "out"

    output = run_command(make_arguments(label_folder, out, "keypoint", "distance"))

    assert "Calibration" in output
    saved = json.loads((out / "scores.json").read_text())
    assert saved["images"] == 2
    assert saved["model"] == "nano"
    assert set(saved["readings"]["keypoint"]["error"]) == {"mode", "mean", "median"}
    assert "spear ask, 80%" in saved["calibration"]["keypoint"]["coverage"]
    assert (out / "index.html").stat().st_size > 5000


def test_the_command_says_which_images_the_model_was_trained_on(
    label_folder: Path, tmp_path: Path, run_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command evaluates two of the images, of which the model was trained on one."""
    notices: list[str] = []
    label = make_labeled_image(2)
    provenance = {"learned": hash_content(label.image + bytes([2]))}  # as in `label_folder`
    monkeypatch.setattr("spear.cli.evaluate.notice", notices.append)
    monkeypatch.setattr("spear.models.weights.folders.read_provenance", lambda folder: provenance)

    run_command(make_arguments(label_folder, tmp_path / "out", "distance"))

    assert "1 of 2" in notices[0]


def test_the_command_does_not_replace_other_scores(
    label_folder: Path, tmp_path: Path, run_command: Command, run_refused_command: Command
) -> None:
    out = tmp_path / "out"
    arguments = make_arguments(label_folder, out, "distance")
    run_command(arguments)

    of_another_model = run_refused_command(arguments, "--model", "nano-vlm")
    of_other_labels = run_refused_command(COMMAND, "sim", "--out", str(out))
    of_another_type = run_refused_command(make_arguments(label_folder, out, "offset"))

    assert "--model is" in of_another_model
    assert "--labels is" in of_other_labels
    assert "--question-types is" in of_another_type


def test_labels_of_another_unit_are_refused(tmp_path: Path, run_refused_command: Command) -> None:
    write_labels([make_labeled_image(0, unit="relative")], tmp_path / "labels-00000.parquet")

    message = run_refused_command(*COMMAND, str(tmp_path), "--out", str(tmp_path / "out"))

    assert "the model answers in 'metre'" in message


# ---- Answers as text.


@pytest.mark.parametrize(("unit", "suffix"), [("metre", "m"), ("relative", "units")])
def test_a_number_is_written_in_the_unit_of_the_model(unit: Unit, suffix: str) -> None:
    image = np.zeros((60, 80, 3), np.uint8)

    text = format_reply(Answer(["the mug is ", 0.41251, " away"], unit), image)

    assert text == f"the mug is 0.413 {suffix} away"


@pytest.mark.parametrize(("unit", "suffix"), [("metre", "m"), ("relative", "units")])
def test_a_box_is_written_as_its_center_and_vertices(unit: Unit, suffix: str) -> None:
    image = np.zeros((60, 80, 3), np.uint8)

    lines = format_reply(Answer([0.25] * 24, unit), image).splitlines()

    assert lines[0] == f"centre (0.250, 0.250, 0.250) {suffix}; vertices:"
    assert len(lines) == 1 + 8  # the center and eight vertices


def test_an_image_point_is_written_in_pixels() -> None:
    image = np.zeros((60, 80, 3), np.uint8)

    assert format_reply(Answer([Pixel(0.5, 0.25)], "metre"), image) == "(40, 15) px"


def test_an_empty_answer_is_said_to_be_none() -> None:
    image = np.zeros((60, 80, 3), np.uint8)

    assert format_reply(Answer([], "metre"), image) == "(no answer)"
