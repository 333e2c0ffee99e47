"""Statistics of labels, compared with counts by hand, and the use of 3D tokens in answers."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from labels_scenes import TRUTH, make_random_frame
from refusals import refuses
from spear.labels.pipeline import label_images
from spear.labels.questions.generate import find_askable_objects, generate_questions
from spear.labels.questions.statistics import (
    LabelStatistics,
    compute_statistics,
    compute_token_usage,
)
from spear.tokens import CoordinateTokenizer
from spear.types import LabeledImage, LabeledObject

NUM_BINS = 16


@pytest.fixture(scope="module")
def labels() -> list[LabeledImage]:
    """Labels of 2, 3, 5, 7, 0 and 1 objects. The object of the last label has no box.

    The scenes have six different names, so two of the fourth label's seven objects have the same.
    """
    rng = np.random.default_rng(1)
    frames = [make_random_frame(rng, objects=num_objects) for num_objects in (2, 3, 5, 7, 0)]
    labels = list(label_images(frames, *TRUTH))
    object_without_box = replace(labels[1].objects[0], box3d=None, keypoints={})
    return [*labels, replace(labels[1], objects=[object_without_box])]


@pytest.fixture(scope="module")
def statistics(labels: list[LabeledImage]) -> LabelStatistics:
    return compute_statistics(iter(labels))


def list_objects(labels: list[LabeledImage]) -> list[LabeledObject]:
    objects = []
    for label in labels:
        objects += label.objects
    return objects


def list_answer_values(labels: list[LabeledImage]) -> list[float]:
    """The numbers in the answers to many questions."""
    values = []
    for seed in range(40):
        for label in labels:
            for question in generate_questions(label, np.random.default_rng(seed)):
                values += question.values
    return values


def test_images_objects_and_boxes_are_counted(statistics: LabelStatistics) -> None:
    assert statistics.num_images == 6
    assert statistics.num_objects == 18  # 2 + 3 + 5 + 7 + 0 + 1
    assert statistics.num_boxes == 17  # one object has no box
    assert statistics.unit == "metre"


def test_objects_are_counted_by_name_and_images_by_provenance(
    statistics: LabelStatistics, labels: list[LabeledImage]
) -> None:
    names = Counter(o.name for o in list_objects(labels))

    assert statistics.names == dict(names.most_common())
    assert statistics.provenance["segmenter: ground-truth"] == 6


def test_askable_objects_are_counted_and_the_reasons_of_the_others(
    statistics: LabelStatistics, labels: list[LabeledImage]
) -> None:
    num_askable = sum(len(find_askable_objects(label)) for label in labels)

    assert statistics.num_askable == num_askable
    assert statistics.reasons["ambiguous"] == 2  # two of seven objects
    assert statistics.reasons["no box"] == 1


def test_distances_sizes_and_scores_are_those_of_the_objects(
    statistics: LabelStatistics, labels: list[LabeledImage]
) -> None:
    boxes = [o.box3d for o in list_objects(labels) if o.box3d is not None]

    distances = [np.linalg.norm(box.center) for box in boxes]
    assert list(statistics.distances) == pytest.approx(distances)
    assert max(statistics.sizes) == pytest.approx(max(box.size.max() for box in boxes))
    assert len(statistics.scores["visible"]) == statistics.num_objects  # also without a box
    assert len(statistics.scores["stability"]) == statistics.num_objects


def test_labels_of_several_units_are_refused(labels: list[LabeledImage]) -> None:
    relative = replace(labels[1], unit="relative")

    refuses("'relative'", compute_statistics, [labels[0], relative])


def test_bins_that_were_fitted_to_values_contain_equally_many_of_them(
    labels: list[LabeledImage],
) -> None:
    values = list_answer_values(labels)
    tokens = CoordinateTokenizer.fit(values, NUM_BINS)

    usage = compute_token_usage(values, tokens)

    assert sum(usage.counts) == len(values)
    assert usage.num_unused == 0
    assert usage.num_outside == 0
    assert usage.evenness > 0.95


@pytest.mark.parametrize(
    ("values", "evenness"),
    [
        ([0.0] * 5, 1 / NUM_BINS),  # all values in one bin: the lowest evenness
        ([], 0.0),
    ],
)
def test_evenness_is_lowest_if_one_bin_is_used_and_0_without_values(
    labels: list[LabeledImage], values: list[float], evenness: float
) -> None:
    tokens = CoordinateTokenizer.fit(list_answer_values(labels), NUM_BINS)

    assert compute_token_usage(values, tokens).evenness == pytest.approx(evenness)


def test_values_outside_all_bins_count_for_the_first_and_the_last_one(
    labels: list[LabeledImage],
) -> None:
    tokens = CoordinateTokenizer.fit(list_answer_values(labels), NUM_BINS)

    usage = compute_token_usage([1e3, -1e3], tokens)

    assert usage.num_outside == 2
    assert usage.counts[0] == 1
    assert usage.counts[-1] == 1
    assert usage.num_unused == NUM_BINS - 2
