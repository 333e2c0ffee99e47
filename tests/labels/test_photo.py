"""Labeling a real photograph with all three networks, which are small and have random weights."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from labels_tiny import WORDS, save_grounding_dino, save_sam2
from moge_reference import build_small_v1
from refusals import refuses
from spear.labels.models.open_vocabulary import GroundingDinoDetector
from spear.labels.models.pointmap import MogePointMapModel
from spear.labels.models.sam2 import Sam2Segmenter
from spear.labels.pipeline import label_images
from spear.labels.questions.generate import generate_questions
from spear.labels.store import read_labels, write_labels
from spear.question_types import QUESTION_TYPES
from spear.types import Frame, LabeledImage
from spear.util.images import decode_image

photographs = pytest.importorskip("skimage.data", reason="scikit-image brings the photograph")
VOCABULARY = [word for word in WORDS if word in ("cup", "plate", "bowl")]

Models = tuple[GroundingDinoDetector, Sam2Segmenter, MogePointMapModel]


@pytest.fixture
def photo() -> Frame:
    """A cup of coffee with a spoon on a saucer."""
    return Frame(photographs.coffee()[::2, ::2].copy(), source="coffee.png")


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Models:
    """The three networks. Limits are lowered, because networks with random weights find little."""
    monkeypatch.setattr(GroundingDinoDetector, "threshold", 0.0)
    monkeypatch.setattr("spear.labels.objects.MIN_POINTS", 8)
    network = str(save_grounding_dino(tmp_path / "grounding-dino"))
    detector = GroundingDinoDetector(network, vocabulary=VOCABULARY)
    segmenter = Sam2Segmenter(str(save_sam2(tmp_path / "sam2")))
    point_map_model = MogePointMapModel(deepcopy(build_small_v1()), device="cpu")
    monkeypatch.setattr(point_map_model.model, "max_tokens", 60)  # to be fast
    return detector, segmenter, point_map_model


def label_photo(photo: Frame, models: Models) -> Iterator[LabeledImage]:
    detector, segmenter, point_map_model = models
    return label_images([photo], detector, segmenter, point_map_model, inputs_are_exact=True)


@pytest.fixture
def label(photo: Frame, models: Models, tmp_path: Path) -> LabeledImage:
    """The photo's label, after writing it to a shard and reading it from there."""
    shard = tmp_path / "labels.parquet"
    write_labels(label_photo(photo, models), shard)
    (label,) = read_labels(shard)
    return label


def test_a_photograph_gets_a_label_with_boxes(
    photo: Frame, models: Models, label: LabeledImage
) -> None:
    detector, segmenter, point_map_model = models

    assert (label.width, label.height, label.unit) == (300, 200, "relative")
    pixel_errors = np.abs(decode_image(label.image).astype(int) - photo.image)
    assert pixel_errors.mean() < 3  # of 255, by the compression as JPEG
    assert label.source == "coffee.png"
    assert label.provenance == {
        "detector": detector.name,
        "segmenter": segmenter.name,
        "pointmap": point_map_model.name,
    }
    assert label.intrinsics[0, 0] > 0
    assert label.objects
    assert {o.name for o in label.objects} <= set(VOCABULARY)
    assert any(o.box3d is not None for o in label.objects)


def test_questions_about_a_photograph_are_in_relative_units(label: LabeledImage) -> None:
    # Without scores and with unique names, questions may be about all objects with a box. With
    # their scores they would be excluded, because random networks label them badly.
    objects = []
    for number, o in enumerate(label.objects):
        if o.box3d is not None:
            objects.append(replace(o, name=str(number), scores={}))
    askable_label = replace(label, objects=objects)

    rng = np.random.default_rng(0)
    questions = generate_questions(
        askable_label, rng, questions_per_image=(4, 4), question_types=QUESTION_TYPES
    )

    assert questions
    assert {question.unit for question in questions} == {"relative"}


def fill_with_nan(network: torch.nn.Module) -> None:
    """Replace all weights of a network by NaN."""
    for weights in network.parameters():
        weights.data.fill_(np.nan)


def test_a_network_with_broken_weights_is_named(photo: Frame, models: Models) -> None:
    detector, segmenter, point_map_model = models

    # Break the last network of the pipeline first. The network that is broken next is called before
    # it, so each error names the network that was broken last.
    fill_with_nan(point_map_model.model)
    refuses("the 0 known points", list, label_photo(photo, models))

    fill_with_nan(segmenter._network)
    refuses("Sam2", list, label_photo(photo, models))

    fill_with_nan(detector._network)
    refuses("Dino", list, label_photo(photo, models))
