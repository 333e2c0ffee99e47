"""A real photograph through every component with a network in it: random weights, real code, real
files."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

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
from spear.types import Frame
from spear.util.images import decode_image

data = pytest.importorskip("skimage.data", reason="scikit-image brings the photograph")
VOCABULARY = [word for word in WORDS if word in ("cup", "plate", "bowl")]


def test_a_photograph_goes_through_the_whole_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cup of coffee with a spoon on a saucer."""
    photo = Frame(data.coffee()[::2, ::2].copy(), source="coffee.png")
    network = str(save_grounding_dino(tmp_path / "grounding-dino"))
    monkeypatch.setattr(GroundingDinoDetector, "threshold", 0.0)
    detector = GroundingDinoDetector(network, vocabulary=VOCABULARY)
    segmenter = Sam2Segmenter(str(save_sam2(tmp_path / "sam2")))
    pointmap = MogePointMapModel(deepcopy(build_small_v1()), device="cpu")
    monkeypatch.setattr(pointmap.model, "max_tokens", 60)
    monkeypatch.setattr("spear.labels.objects.MIN_POINTS", 8)
    write_labels(
        label_images([photo], detector, segmenter, pointmap, True), tmp_path / "labels.parquet"
    )
    (seen,) = read_labels(tmp_path / "labels.parquet")

    assert (seen.width, seen.height, seen.unit) == (300, 200, "relative")
    assert np.abs(decode_image(seen.image).astype(int) - photo.image).mean() < 3
    assert seen.source == "coffee.png"
    names = {"detector": detector.name, "segmenter": segmenter.name, "pointmap": pointmap.name}
    assert seen.provenance == names and seen.intrinsics[0, 0] > 0
    assert seen.objects and {o.name for o in seen.objects} <= set(VOCABULARY)
    boxed = [o for o in seen.objects if o.box3d is not None]
    assert boxed
    # random networks find nothing that is good enough to be asked about: make it so
    good = [replace(o, name=str(i), scores={}) for i, o in enumerate(boxed)]
    asked = generate_questions(
        replace(seen, objects=good), np.random.default_rng(0), (4, 4), QUESTION_TYPES
    )
    assert asked and {question.unit for question in asked} == {"relative"}
    parts = {"its 0 points": pointmap.model, "Sam2": segmenter._network, "Dino": detector._network}
    for said, part in parts.items():
        for weights in part.parameters():
            weights.data.fill_(np.nan)  # in each before those that are broken already
        refuses(said, list, label_images([photo], detector, segmenter, pointmap, True))
