"""Files of labels (shards): writing them, reading all or some of their labels, and broken files."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from labels_scenes import make_random_frame
from refusals import refuses
from spear.labels.pipeline import label_with_ground_truth
from spear.labels.store import (
    SCHEMA,
    count_labeled_images,
    read_evenly_spread_labels,
    read_labels,
    write_labels,
)
from spear.types import LabeledImage


@pytest.fixture(scope="module")
def labels() -> list[LabeledImage]:
    """23 labels with zero to three objects each."""
    rng = np.random.default_rng(3)
    frames = [make_random_frame(rng, objects=number % 4) for number in range(23)]
    return list(label_with_ground_truth(frames))


@pytest.fixture
def shards(labels: list[LabeledImage], tmp_path: Path) -> list[Path]:
    """Two shards in the folder `tmp_path`, with the first 18 and the last 5 labels.

    A row group has 16 rows, so the first shard has two row groups.
    """
    paths = [tmp_path / "labels-00000.parquet", tmp_path / "labels-00001.parquet"]
    write_labels(labels[:18], paths[0])
    write_labels(labels[18:], paths[1])
    return paths


def assert_equal(labels: Sequence[LabeledImage], expected: Sequence[LabeledImage]) -> None:
    """Assert that labels are equal, arrays included."""
    np.testing.assert_equal(
        [asdict(label) for label in labels], [asdict(label) for label in expected]
    )


def test_a_folder_gives_its_labels_back_in_order(
    labels: list[LabeledImage], shards: list[Path], tmp_path: Path
) -> None:
    assert sorted(tmp_path.iterdir()) == shards
    assert_equal(list(read_labels(tmp_path)), labels)
    assert count_labeled_images(tmp_path) == 23


def test_a_shard_gives_its_labels_alone(labels: list[LabeledImage], shards: list[Path]) -> None:
    assert_equal(list(read_labels(shards[1])), labels[18:])
    assert count_labeled_images(shards[1]) == 5


@pytest.mark.parametrize("max_images", [1, 4, 7, 23, 99])
def test_selected_labels_are_spread_evenly(
    labels: list[LabeledImage], shards: list[Path], tmp_path: Path, max_images: int
) -> None:
    selected_labels = read_evenly_spread_labels(tmp_path, max_images)

    num_selected = min(max_images, 23)
    expected_labels = [labels[i * 23 // num_selected] for i in range(num_selected)]
    assert_equal(selected_labels, expected_labels)


def test_without_pixels_everything_but_images_and_masks_is_the_same(
    labels: list[LabeledImage], shards: list[Path], tmp_path: Path
) -> None:
    labels_without_pixels = list(read_labels(tmp_path, pixels=False))

    for label, bare_label in zip(labels, labels_without_pixels, strict=True):
        assert bare_label.image == b""
        assert all(len(o.mask_runs) == 0 for o in bare_label.objects)

        # With image and masks put back, it is the whole label.
        objects = []
        for o, bare_object in zip(label.objects, bare_label.objects, strict=True):
            objects.append(replace(bare_object, mask_runs=o.mask_runs))
        assert_equal([replace(bare_label, image=label.image, objects=objects)], [label])


def test_a_shard_that_is_cut_off_is_named(shards: list[Path], tmp_path: Path) -> None:
    content = shards[0].read_bytes()
    shards[0].write_bytes(content[: len(content) // 2])

    refuses(r"labels-00000\.parquet is broken.*label it again", count_labeled_images, tmp_path)


def test_a_shard_with_overwritten_bytes_is_named(shards: list[Path]) -> None:
    content = shards[0].read_bytes()
    shards[0].write_bytes(content[:100] + bytes(4000) + content[4100:])  # 4000 zeros

    refuses(r"labels-00000\.parquet is broken", list, read_labels(shards[0]))


@pytest.mark.parametrize(
    "change", [{"width": None}, {"unit": "inch"}, {"provenance": ""}, {"intrinsics": [np.nan] * 9}]
)
def test_a_label_that_makes_no_sense_is_refused(shards: list[Path], change: dict[str, Any]) -> None:
    first_row, *other_rows = pq.read_table(shards[0]).to_pylist()
    changed_rows = [first_row | change, *other_rows]
    pq.write_table(pa.Table.from_pylist(changed_rows, SCHEMA), shards[0])

    refuses(r"labels-00000\.parquet is broken", list, read_labels(shards[0], pixels=False))


def test_a_folder_without_shards_is_named(tmp_path: Path) -> None:
    refuses("no label shards", count_labeled_images, tmp_path)
    refuses("no label shards", list, read_labels(tmp_path / "absent"))


def test_another_parquet_file_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1]}), tmp_path / "labels.parquet")

    refuses("not a label shard, because it has no", count_labeled_images, tmp_path)
