"""Statistics of labels: counted again by hand on a few scenes."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from labels_scenes import random_frame
from spear.errors import SpearError
from spear.labels.models.ground_truth import GroundTruthDetector, GroundTruthPointMap, GroundTruthSegmenter
from spear.labels.pipeline import label
from spear.labels.questions.generate import FAMILIES, askable, generate
from spear.labels.questions.statistics import balance, histogram, statistics, token_use
from spear.labels.questions.templates import FAMILIES_2D
from spear.tokens import CoordinateTokenizer
from spear.types import LabeledImage

TRUTH = (GroundTruthDetector(), GroundTruthSegmenter(), GroundTruthPointMap())


@pytest.fixture(scope="module")
def labels() -> list[LabeledImage]:
    rng = np.random.default_rng(1)
    frames = [random_frame(rng, objects=n) for n in (2, 3, 5, 7, 0)]
    found = list(label(frames, *TRUTH))
    unboxed = replace(found[1], objects=[replace(found[1].objects[0], box3d=None, keypoints={})])
    return [*found, unboxed]


def test_counts(labels: list[LabeledImage]) -> None:
    s = statistics(iter(labels))
    objects = [o for image in labels for o in image.objects]
    boxed = [o for o in objects if o.box3d is not None]
    assert (s.images, s.objects, s.boxed, s.unit) == (6, 18, 17, "metre")
    assert s.asked == sum(len(askable(image)) for image in labels)
    assert s.per_image == {"0": 1, "1": 1, "2": 1, "3": 1, "5": 1, "7": 1}
    assert s.names == dict(Counter(o.name for o in objects).most_common())
    assert s.provenance["segmenter: ground-truth"] == 6
    assert s.reasons["ambiguous"] == 2 and s.reasons["no box"] == 1
    assert s.distance is not None and s.size is not None
    assert s.distance.n == sum(s.distance.counts) == 17
    assert s.distance.median == pytest.approx(np.median([np.linalg.norm(o.box3d.center) for o in boxed]))
    assert s.size.edges[-1] == pytest.approx(max(o.box3d.size.max() for o in boxed))
    assert s.scores["visible"].n == 18 and s.scores["stability"].n == 18
    assert s.tokens is None
    assert json.loads(json.dumps(s.to_dict()))["names"] == s.names


def test_balance_is_that_of_the_questions(labels: list[LabeledImage]) -> None:
    b = balance(labels, seed=3)
    asked = [generate(image, np.random.default_rng((3, i))) for i, image in enumerate(labels)]
    flat = [q for questions in asked for q in questions]
    assert b.questions == len(flat) > 0
    assert b.images == 6 and b.silent == sum(not q for q in asked) >= 2
    assert set(b.families) == set(FAMILIES)
    assert b.families == dict.fromkeys(FAMILIES, 0) | dict(Counter(q.family for q in flat))
    assert b.objects == dict(Counter(name for q in flat for name in q.objects).most_common())
    assert sum(int(n) * images for n, images in b.pairs.items()) == len(flat)
    assert statistics(labels, seed=3).balance == b
    assert set(balance(labels, families=FAMILIES_2D).families) == set(FAMILIES_2D)


def test_token_use(labels: list[LabeledImage]) -> None:
    values = [
        v for i in range(40) for x in labels for q in generate(x, np.random.default_rng(i)) for v in q.values
    ]
    tokens = CoordinateTokenizer.fit(values, 16)
    even = token_use(values, tokens)
    assert sum(even.counts) == len(values) and even.unused == even.outside == 0
    assert even.evenness > 0.95
    assert token_use([0.0] * 5, tokens).evenness == pytest.approx(1 / 16)
    far = token_use([1e3, -1e3], tokens)
    assert far.outside == 2 and far.counts[0] == far.counts[-1] == 1 and far.unused == 14
    assert tokens.clamped == 0
    assert token_use([], tokens).evenness == 0.0
    used = statistics(labels, tokens).tokens
    asked = [generate(x, np.random.default_rng((0, 1, i)), (4, 4)) for i, x in enumerate(labels)]
    assert used == token_use([v for questions in asked for q in questions for v in q.values], tokens)
    assert sum(used.counts) > 50


def test_units_are_not_mixed(labels: list[LabeledImage]) -> None:
    with pytest.raises(SpearError, match="give labels of one unit"):
        statistics([labels[0], replace(labels[1], unit="relative")])
    with pytest.raises(SpearError, match="'metre', not 'relative'"):
        statistics(labels, CoordinateTokenizer.fit(np.linspace(-1, 1, 99), 8, "relative"))


def test_no_labels() -> None:
    s = statistics([])
    assert s.images == s.objects == s.balance.questions == 0
    assert s.unit is s.distance is s.tokens is None and s.scores == {}
    assert histogram([]) is None
    assert json.dumps(s.to_dict())
