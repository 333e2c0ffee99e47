from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from labels_scenes import TRUTH, random_frame
from refusals import refuses
from spear.labels.pipeline import label_images
from spear.labels.store import SCHEMA, count_labels, read_labels, select_labels, write_labels
from spear.types import LabeledImage


@pytest.fixture(scope="module")
def labels() -> list[LabeledImage]:
    rng = np.random.default_rng(3)
    return list(label_images([random_frame(rng, objects=n % 4) for n in range(23)], *TRUTH))


def write(labels: Sequence[LabeledImage], folder: Path, size: int = 18) -> list[Path]:
    paths = [folder / f"labels-{number:05d}.parquet" for number in range(-(-len(labels) // size))]
    for number, path in enumerate(paths):
        write_labels(labels[number * size : (number + 1) * size], path)
    return paths


def test_round_trip_in_order_and_spread_evenly(labels: list[LabeledImage], tmp_path: Path) -> None:
    paths = write(labels, tmp_path)
    assert sorted(tmp_path.iterdir()) == paths
    np.testing.assert_equal([*map(asdict, labels)], [*map(asdict, read_labels(tmp_path))])
    assert (
        len(list(read_labels(paths[1]))) == 5
        and count_labels(tmp_path) == 23
        and count_labels(paths[1]) == 5
    )
    for images in (1, 4, 7, 23, 99):
        shown = min(images, 23)
        expected = [labels[i * 23 // shown] for i in range(shown)]
        np.testing.assert_equal(
            [*map(asdict, expected)], [*map(asdict, select_labels(tmp_path, images))]
        )


def test_without_pixels_the_rest_is_the_same(labels: list[LabeledImage], tmp_path: Path) -> None:
    write(labels, tmp_path)
    for a, b in zip(labels, read_labels(tmp_path, pixels=False), strict=True):
        assert b.image == b"" and all(len(o.mask) == 0 for o in b.objects)
        masked = [replace(o, mask=a.objects[i].mask) for i, o in enumerate(b.objects)]
        np.testing.assert_equal(asdict(a), asdict(replace(b, image=a.image, objects=masked)))


def test_broken_shards_and_other_files_are_named(
    labels: list[LabeledImage], tmp_path: Path
) -> None:
    (path,) = write(labels, tmp_path, 99)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refuses(r"labels-00000\.parquet is broken.*label it again", count_labels, tmp_path)
    path.write_bytes(whole[:100] + bytes(4000) + whole[4100:])
    refuses(r"labels-00000\.parquet is broken", list, read_labels(path))
    for change in (
        {"width": None},
        {"unit": "inch"},
        {"provenance": ""},
        {"intrinsics": [np.nan] * 9},
    ):
        (first, *rest) = pq.read_table(pa.BufferReader(whole)).to_pylist()
        pq.write_table(pa.Table.from_pylist([first | change, *rest], SCHEMA), path)
        refuses(r"labels-00000\.parquet is broken", list, read_labels(path, pixels=False))
    path.unlink()
    refuses("no label shards", count_labels, tmp_path)
    refuses("no label shards", list, read_labels(tmp_path / "absent"))
    pq.write_table(pa.table({"x": [1]}), tmp_path / "labels.parquet")
    refuses("not a label shard, because it has no", count_labels, tmp_path)
