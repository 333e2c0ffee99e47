"""Grounding DINO and OWLv2: names, boxes, batches and vocabularies.

Both networks are tiny, with random weights, so that they detect something everywhere. Frames of
`make_noise_frame` have 60 × 40 pixels unless a height and a width are given.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from labels_stand_ins import make_noise_frame
from labels_tiny import save_grounding_dino, save_owlv2
from refusals import refuses
from spear.labels.models.open_vocabulary import (
    GroundingDinoDetector,
    Owlv2Detector,
    clean_detections,
)
from spear.labels.models.protocols import Detection

VOCABULARY = ["red cup", "forks", "plate", "Steel Bowl."]
CLEAN_NAMES = ["red cup", "forks", "plate", "steel bowl"]


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a Grounding DINO."""
    return str(save_grounding_dino(tmp_path_factory.mktemp("grounding-dino")))


@pytest.fixture(scope="module")
def owl(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of an OWLv2."""
    return str(save_owlv2(tmp_path_factory.mktemp("owlv2")))


def to_rows(detections: list[Detection]) -> list[tuple[str, list[float], float]]:
    """The name, the rounded 2D box and the rounded score of each detection, to compare them."""
    return [(d.name, d.box2d.round(3).tolist(), round(d.score, 4)) for d in detections]


def round_box(detection: Detection) -> tuple[float, ...]:
    return tuple(detection.box2d.round(2).tolist())


def test_a_prompt_has_each_name_in_lower_case(dino: str) -> None:
    detector = GroundingDinoDetector(dino, vocabulary=VOCABULARY)

    assert detector._prompts == [("red cup. forks. plate. steel bowl.", CLEAN_NAMES)]


def test_an_object_has_the_name_of_its_best_token(
    dino: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GroundingDinoDetector, "threshold", 0.4)
    detector = GroundingDinoDetector(dino, vocabulary=VOCABULARY)
    ((prompt, names),) = detector._prompts
    tokens = detector._processor.tokenizer(prompt)["input_ids"]
    # The prompt's 13 tokens are [CLS] red cup . fork ##s . plate . steel bowl . [SEP]. Each box has
    # a dict (position of a token → its score), and center x, center y, width and height as
    # fractions of the image.
    boxes: list[tuple[dict[int, float], list[float]]] = [
        ({1: 0.2, 2: 0.6, 5: 0.5}, [0.5, 0.5, 0.5, 0.25]),
        ({4: 0.3, 5: 0.7, 9: 0.69}, [0.25, 0.25, 0.1, 0.1]),
        # Only "." and [SEP] fit well, which are in no name.
        ({3: 0.99, 12: 0.99, 7: 0.35}, [0.5, 0.5, 0.5, 0.5]),
    ]
    logits = torch.full((1, len(boxes), 16), -torch.inf)  # [images, boxes, tokens]
    for i, (token_scores, _) in enumerate(boxes):
        for position, score in token_scores.items():
            logits[0, i, position] = torch.logit(torch.tensor(score))
    pred_boxes = torch.tensor([[box for _, box in boxes]])
    outputs = SimpleNamespace(logits=logits, pred_boxes=pred_boxes)

    (detections,) = detector._read_outputs(outputs, tokens, (40, 60), names)

    # The first box is as good as its best token "cup" (0.6), the second one as "##s" (0.7).
    assert to_rows(detections) == [
        ("red cup", [15, 15, 45, 25], 0.6),
        ("forks", [12, 8, 18, 12], 0.7),
    ]


@pytest.fixture(params=[GroundingDinoDetector, Owlv2Detector])
def detector(
    request: pytest.FixtureRequest, dino: str, owl: str, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Each of the two detectors, with a threshold of 0.2."""
    monkeypatch.setattr(request.param, "threshold", 0.2)
    folder = dino if request.param is GroundingDinoDetector else owl
    return request.param(folder, vocabulary=VOCABULARY)


def test_an_image_in_a_batch_gets_the_detections_that_it_gets_alone(detector: Any) -> None:
    frames = [
        make_noise_frame(0),
        make_noise_frame(1, height=48, width=32),
        make_noise_frame(2),
        make_noise_frame(3, height=30, width=90),
    ]

    batch_detections = detector.detect(frames)

    # Each image has detections, and they differ from image to image.
    assert all(batch_detections)
    first_boxes = {tuple(to_rows(detections)[0][1]) for detections in batch_detections}
    assert len(first_boxes) == 4
    for frame, detections in zip(frames, batch_detections, strict=True):
        (single_detections,) = detector.detect([frame])
        assert [d.name for d in single_detections] == [d.name for d in detections]
        np.testing.assert_allclose(
            [d.box2d for d in single_detections], [d.box2d for d in detections], atol=0.01
        )


def test_detections_have_names_of_the_vocabulary_and_boxes_inside_the_image(detector: Any) -> None:
    frames = [
        make_noise_frame(0),
        make_noise_frame(1, height=48, width=32),
        make_noise_frame(2),
        make_noise_frame(3, height=30, width=90),
    ]

    for frame, detections in zip(frames, detector.detect(frames), strict=True):
        height, width = frame.image.shape[:2]
        for detection in detections:
            x0, y0, x1, y1 = detection.box2d
            assert detection.name in CLEAN_NAMES
            assert detection.score > 0.2
            assert 0 <= x0 < x1 <= width
            assert 0 <= y0 < y1 <= height


def test_a_long_vocabulary_is_divided_among_several_prompts(
    dino: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The detections are those that detectors with a part of the vocabulary find together."""
    monkeypatch.setattr(GroundingDinoDetector, "threshold", 0.2)
    names = ["red cup", "fork", "plate", "bowl", "steel fork", "red plate", "steel cup", "red bowl"]
    detector = GroundingDinoDetector(dino, vocabulary=names)

    (detections,) = detector.detect([make_noise_frame(0)])

    names_in_prompts = []
    detections_of_prompts = []
    for prompt, prompt_names in detector._prompts:
        names_in_prompts += prompt_names
        num_tokens = len(detector._processor.tokenizer(prompt)["input_ids"])
        assert num_tokens <= 16  # the network's limit
        single_prompt_detector = GroundingDinoDetector(dino, vocabulary=prompt_names)
        detections_of_prompts += single_prompt_detector.detect([make_noise_frame(0)])[0]
    assert len(detector._prompts) > 1
    assert names_in_prompts == names
    expected = clean_detections(detections_of_prompts, height=40, width=60, max_overlap=0.7)
    assert to_rows(detections) == to_rows(expected)


def test_owlv2_scores_do_not_depend_on_the_other_names(
    owl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All boxes are detections, however low their score and however much they overlap.
    monkeypatch.setattr(Owlv2Detector, "threshold", 0.0)
    monkeypatch.setattr(Owlv2Detector, "max_overlap", 1.0)
    frame = make_noise_frame(0)

    (detections_of_two_names,) = Owlv2Detector(owl, vocabulary=["cup", "forks"]).detect([frame])
    (detections_of_one_name,) = Owlv2Detector(owl, vocabulary=["cup"]).detect([frame])

    scores_by_box = {round_box(d): d.score for d in detections_of_one_name}
    cups = [d for d in detections_of_two_names if d.name == "cup"]
    assert cups
    for cup in cups:
        assert scores_by_box[round_box(cup)] == pytest.approx(cup.score, abs=1e-4)


def test_cleaning_keeps_the_best_detections_inside_the_image() -> None:
    detections = [
        Detection("cup", np.array([0, 0, 10, 10]), 0.5),  # nearly the box of the mug
        Detection("mug", np.array([0, 0, 10, 9.5]), 0.8),
        Detection("", np.array([20, 0, 30, 10]), 0.9),
        Detection("fork", np.array([39.5, 0, 50, 10]), 0.9),  # half a pixel wide in the image
        Detection("plate", np.array([30, 10, 60, 40]), 0.3),  # reaches beyond the image
    ]

    cleaned = clean_detections(detections, height=20, width=40, max_overlap=0.7)

    assert to_rows(cleaned) == [
        ("mug", [0, 0, 10, 9.5], 0.8),
        ("plate", [30, 10, 40, 20], 0.3),
    ]


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ([" ", "."], "--vocabulary"),
        ("cup", "list"),
        (["a red cup on the plate " * 4], "a red cup on"),
    ],
)
def test_a_vocabulary_that_is_empty_or_too_long_is_refused(
    dino: str, owl: str, vocabulary: Any, message: str
) -> None:
    refuses(message, GroundingDinoDetector, dino, vocabulary=vocabulary)
    refuses(message, Owlv2Detector, owl, vocabulary=vocabulary)
