"""Statistics of labels: counted again by hand on a few scenes."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from labels_scenes import TRUTH, random_frame
from refusals import refuses
from spear.labels.pipeline import label_images
from spear.labels.questions.generate import find_askable_objects, generate_questions
from spear.labels.questions.statistics import compute_statistics, compute_token_usage
from spear.tokens import CoordinateTokenizer
from spear.types import LabeledImage


@pytest.fixture(scope="module")
def labels() -> list[LabeledImage]:
    rng = np.random.default_rng(1)
    found = list(label_images([random_frame(rng, objects=n) for n in (2, 3, 5, 7, 0)], *TRUTH))
    return [
        *found,
        replace(found[1], objects=[replace(found[1].objects[0], box3d=None, keypoints={})]),
    ]


def test_counts_are_those_by_hand_and_units_are_not_mixed(labels: list[LabeledImage]) -> None:
    s = compute_statistics(iter(labels))
    objects = [o for image in labels for o in image.objects]
    boxed = [o for o in objects if o.box3d is not None]
    assert (s.images, s.objects, s.boxed, s.unit) == (6, 18, 17, "metre")
    assert s.asked == sum(len(find_askable_objects(image)) for image in labels)
    assert s.names == dict(Counter(o.name for o in objects).most_common())
    assert s.provenance["segmenter: ground-truth"] == 6
    assert s.reasons["ambiguous"] == 2 and s.reasons["no box"] == 1
    assert list(s.distances) == pytest.approx([np.linalg.norm(o.box3d.center) for o in boxed])
    assert max(s.sizes) == pytest.approx(max(o.box3d.size.max() for o in boxed))
    assert len(s.scores["visible"]) == 18 and len(s.scores["stability"]) == 18
    refuses("'relative'", compute_statistics, [labels[0], replace(labels[1], unit="relative")])


def test_token_use_counts_what_is_even_unused_and_outside(labels: list[LabeledImage]) -> None:
    asked = [
        q
        for i in range(40)
        for x in labels
        for q in generate_questions(x, np.random.default_rng(i))
    ]
    values = [value for q in asked for value in q.values]
    tokens = CoordinateTokenizer.fit(values, 16)
    even = compute_token_usage(values, tokens)
    assert sum(even.counts) == len(values) and even.unused == even.outside == 0
    assert even.evenness > 0.95 and compute_token_usage(
        [0.0] * 5, tokens
    ).evenness == pytest.approx(1 / 16)
    far = compute_token_usage([1e3, -1e3], tokens)
    assert far.outside == 2 and far.counts[0] == far.counts[-1] == 1 and far.unused == 14
    assert compute_token_usage([], tokens).evenness == 0.0
