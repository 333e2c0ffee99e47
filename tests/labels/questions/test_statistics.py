"""Statistics of labels: counted again by hand on a few scenes."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from labels_scenes import TRUTH, random_frame
from refusals import refuses
from spear.labels.pipeline import label
from spear.labels.questions.generate import askable, generate
from spear.labels.questions.statistics import statistics, token_use
from spear.tokens import CoordinateTokenizer
from spear.types import LabeledImage


@pytest.fixture(scope="module")
def labels() -> list[LabeledImage]:
    rng = np.random.default_rng(1)
    found = list(label([random_frame(rng, objects=n) for n in (2, 3, 5, 7, 0)], *TRUTH))
    return [
        *found,
        replace(found[1], objects=[replace(found[1].objects[0], box3d=None, keypoints={})]),
    ]


def test_counts_are_those_by_hand_and_units_are_not_mixed(labels: list[LabeledImage]) -> None:
    s = statistics(iter(labels))
    objects = [o for image in labels for o in image.objects]
    boxed = [o for o in objects if o.box3d is not None]
    assert (s.images, s.objects, s.boxed, s.unit) == (6, 18, 17, "metre")
    assert s.asked == sum(len(askable(image)) for image in labels)
    assert s.names == dict(Counter(o.name for o in objects).most_common())
    assert s.provenance["segmenter: ground-truth"] == 6
    assert s.reasons["ambiguous"] == 2 and s.reasons["no box"] == 1
    assert list(s.distances) == pytest.approx([np.linalg.norm(o.box3d.center) for o in boxed])
    assert max(s.sizes) == pytest.approx(max(o.box3d.size.max() for o in boxed))
    assert len(s.scores["visible"]) == 18 and len(s.scores["stability"]) == 18
    refuses("'relative'", statistics, [labels[0], replace(labels[1], unit="relative")])


def test_token_use_counts_what_is_even_unused_and_outside(labels: list[LabeledImage]) -> None:
    asked = [q for i in range(40) for x in labels for q in generate(x, np.random.default_rng(i))]
    values = [value for q in asked for value in q.values]
    tokens = CoordinateTokenizer.fit(values, 16)
    even = token_use(values, tokens)
    assert sum(even.counts) == len(values) and even.unused == even.outside == 0
    assert even.evenness > 0.95 and token_use([0.0] * 5, tokens).evenness == pytest.approx(1 / 16)
    far = token_use([1e3, -1e3], tokens)
    assert far.outside == 2 and far.counts[0] == far.counts[-1] == 1 and far.unused == 14
    assert token_use([], tokens).evenness == 0.0
