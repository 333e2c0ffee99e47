from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from labels_stand_ins import noise
from labels_tiny import save_grounding_dino, save_owlv2
from refusals import refuses
from spear.labels.models.open_vocabulary import (
    GroundingDinoDetector,
    Owlv2Detector,
    clean_detections,
)
from spear.labels.models.protocols import Detection

THINGS = ["red cup", "forks", "plate", "Steel Bowl."]


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_grounding_dino(tmp_path_factory.mktemp("grounding-dino")))


@pytest.fixture(scope="module")
def owl(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_owlv2(tmp_path_factory.mktemp("owlv2")))


def rows(detections: list[Detection]) -> list[tuple[str, list[float], float]]:
    return [(d.name, d.box2d.round(3).tolist(), round(d.score, 4)) for d in detections]


def test_names_are_those_of_the_best_token(dino: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroundingDinoDetector, "threshold", 0.4)
    detector = GroundingDinoDetector(dino, vocabulary=THINGS)
    ((prompt, names),) = detector._prompts
    assert prompt == "red cup. forks. plate. steel bowl."
    assert names == ["red cup", "forks", "plate", "steel bowl"]
    tokens = detector._processor.tokenizer(prompt)["input_ids"]
    # [CLS] red cup . fork ##s . plate . steel bowl . [SEP]; per box, the scores of some, and centre and size
    objects: list[tuple[dict[int, float], list[float]]] = [
        ({1: 0.2, 2: 0.6, 5: 0.5}, [0.5, 0.5, 0.5, 0.25]),
        ({4: 0.3, 5: 0.7, 9: 0.69}, [0.25, 0.25, 0.1, 0.1]),
        ({3: 0.99, 12: 0.99, 7: 0.35}, [0.5, 0.5, 0.5, 0.5]),  # only a mark between names fits
    ]
    logits = torch.full((1, len(objects), 16), -torch.inf)
    for i, (scores, _) in enumerate(objects):
        for place, score in scores.items():
            logits[0, i, place] = torch.logit(torch.tensor(score))
    said = SimpleNamespace(logits=logits, pred_boxes=torch.tensor([[box for _, box in objects]]))
    (found,) = detector._read_outputs(said, tokens, (40, 60), names)
    assert rows(found) == [("red cup", [15, 15, 45, 25], 0.6), ("forks", [12, 8, 18, 12], 0.7)]


@pytest.mark.parametrize("made", [GroundingDinoDetector, Owlv2Detector])
def test_batches_change_nothing(
    made: Any, dino: str, owl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(made, "threshold", 0.2)
    detector = made(dino if made is GroundingDinoDetector else owl, vocabulary=THINGS)
    frames = [noise(0), noise(1, 48, 32), noise(2), noise(3, 30, 90)]
    together = detector.detect(frames)
    assert all(together) and len({tuple(rows(found)[0][1]) for found in together}) == 4
    for single, found in zip(frames, together, strict=True):
        (alone,) = detector.detect([single])
        assert [d.name for d in alone] == [d.name for d in found]
        np.testing.assert_allclose([d.box2d for d in alone], [d.box2d for d in found], atol=0.01)
        height, width = single.image.shape[:2]
        for d in found:
            assert d.name in ("red cup", "forks", "plate", "steel bowl") and d.score > 0.2
            assert 0 <= d.box2d[0] < d.box2d[2] <= width and 0 <= d.box2d[1] < d.box2d[3] <= height


def test_a_long_vocabulary_is_asked_in_several_prompts(
    dino: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GroundingDinoDetector, "threshold", 0.2)
    names = ["red cup", "fork", "plate", "bowl", "steel fork", "red plate", "steel cup", "red bowl"]
    detector = GroundingDinoDetector(dino, vocabulary=names)
    prompts = detector._prompts
    assert len(prompts) > 1 and [n for _, part in prompts for n in part] == names
    assert (
        max([len(detector._processor.tokenizer(prompt)["input_ids"]) for prompt, _ in prompts])
        <= 16
    )
    (found,) = detector.detect([noise(0)])
    parts = [
        GroundingDinoDetector(dino, vocabulary=part).detect([noise(0)])[0] for _, part in prompts
    ]
    assert rows(found) == rows(clean_detections([d for part in parts for d in part], 40, 60, 0.7))


def test_owlv2_scores_are_those_of_its_query(owl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Owlv2Detector, "threshold", 0.0)
    monkeypatch.setattr(Owlv2Detector, "overlap", 1.0)
    both, cup = (Owlv2Detector(owl, vocabulary=names) for names in (["cup", "forks"], ["cup"]))
    (of_both,), (of_cup,) = both.detect([noise(0)]), cup.detect([noise(0)])
    scores = {tuple(d.box2d.round(2).tolist()): d.score for d in of_cup}
    named_cup = [d for d in of_both if d.name == "cup"]
    assert named_cup
    for d in named_cup:
        assert scores[tuple(d.box2d.round(2).tolist())] == pytest.approx(d.score, abs=1e-4)


def test_tidy_keeps_the_best_of_what_is_inside() -> None:
    found = [
        Detection("cup", np.array([0, 0, 10, 10]), 0.5),
        Detection("mug", np.array([0, 0, 10, 9.5]), 0.8),
        Detection("", np.array([20, 0, 30, 10]), 0.9),
        Detection("fork", np.array([39.5, 0, 50, 10]), 0.9),
        Detection("plate", np.array([30, 10, 60, 40]), 0.3),
    ]
    assert rows(clean_detections(found, 20, 40, 0.7)) == [
        ("mug", [0, 0, 10, 9.5], 0.8),
        ("plate", [30, 10, 40, 20], 0.3),
    ]


@pytest.mark.parametrize(
    ("vocabulary", "named"),
    [
        ([" ", "."], "--vocabulary"),
        ("cup", "list"),
        (["a red cup on the plate " * 4], "a red cup on"),
    ],
)
def test_what_cannot_be_looked_for_is_refused(
    dino: str, owl: str, vocabulary: Any, named: str
) -> None:
    refuses(named, GroundingDinoDetector, dino, vocabulary=vocabulary)
    refuses(named, Owlv2Detector, owl, vocabulary=vocabulary)
