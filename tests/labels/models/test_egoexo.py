import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spear.errors import SpearError
from spear.labels.fit import rle
from spear.labels.models.annotations import FileDetector, FileSegmenter
from spear.labels.models.egoexo import RelationAnnotations, decompress
from spear.types import Array, Frame

UID = "44d647ce-72d2-4312-b80c-99faea2d017d"


def compress(text: str) -> str:
    """As the dataset's makers did."""
    return str(pytest.importorskip("lzstring").LZString().compressToEncodedURIComponent(text))


def blob(height: int, width: int, seed: int) -> Array:
    rows, columns = np.mgrid[:height, :width]
    x, y, r = np.random.default_rng(seed).uniform(
        [0.3 * width, 0.3 * height, 4], [0.7 * width, 0.7 * height, 9]
    )
    return np.hypot(columns - x, rows - y) < r


def entry(mask: Array) -> dict[str, Any]:
    height, width = mask.shape
    return {"width": width, "height": height, "encodedMask": compress(rle.to_string(rle.encode(mask)))}


def relations(folder: Path) -> RelationAnnotations:
    """Two bowls in the wearer's frame 270, one of them in frame 0 of a camera that looks on; frame 30
    empty."""
    views = {
        "steel bowl_0": {
            "aria01_214-1": {"annotation": {"270": entry(blob(48, 48, 0))}, "annotated_frames": [0, 30, 270]},
            "cam04": {"annotation": {"0": entry(blob(36, 64, 1))}, "annotated_frames": [0, 30]},
        },
        "glass bowl_11": {"aria01_214-1": {"annotation": {"270": entry(blob(48, 48, 2))}}},
    }
    take = {"take_name": "sfu_cooking_008_3", "scenario": "salad", "object_masks": views}
    path = folder / "relations_train.json"
    path.write_text(json.dumps({"annotations": {UID: take}}))
    return RelationAnnotations(path)


def frame(source: str, height: int, width: int) -> Frame:
    return Frame(np.zeros((height, width, 3), np.uint8), source=source)


@given(st.text(st.sampled_from("0123OPQabc`z\x7fé€日"), max_size=300))
def test_decompresses_what_lz_string_compresses(text: str) -> None:
    assert decompress(compress(text)) == text


@pytest.mark.parametrize("text", ["", "A", "A*", "____", "EoFQtg2gTARgDAM"])
def test_what_is_no_lz_string_is_refused(text: str) -> None:
    with pytest.raises(SpearError, match="not an lz-string"):
        decompress(text)


def test_annotated_masks_are_used_as_they_are(tmp_path: Path) -> None:
    known = relations(tmp_path)
    frames = [
        frame("takes/sfu_cooking_008_3/frame_aligned_videos/aria01_214-1.mp4#270", 48, 48),
        frame(f"{UID}/cam04/0.jpg", 36, 64),
        frame("sfu_cooking_008_3/cam04/frame_000030.png", 36, 64),
    ]
    detections = FileDetector(known).detect(frames)
    assert [[d.name for d in found] for found in detections] == [
        ["steel bowl", "glass bowl"],
        ["steel bowl"],
        [],
    ]
    masks = FileSegmenter(known).segment(frames, detections)
    assert (masks[0][0] == blob(48, 48, 0)).all() and (masks[0][1] == blob(48, 48, 2)).all()
    assert (masks[1][0] == blob(36, 64, 1)).all()


def test_frames_may_be_smaller_than_the_video(tmp_path: Path) -> None:
    frames = [frame(f"{UID}/cam04/0.jpg", 18, 32)]
    known = relations(tmp_path)
    (masks,) = FileSegmenter(known).segment(frames, FileDetector(known).detect(frames))
    assert masks[0].sum() == pytest.approx(blob(36, 64, 1).sum() / 4, rel=0.15)


@pytest.mark.parametrize(
    "source",
    [
        "sfu_cooking_008_3/cam04/60.jpg",  # not annotated
        "sfu_cooking_008_3/cam05/0.jpg",
        "sfu_cooking_009/cam04/0.jpg",
        "cam04/0.jpg",
        "sfu_cooking_008_3/frame_aligned_videos/aria01_214-1.mp4",
        "sfu_cooking_008_3/cam04/first.jpg",
        "",
    ],
)
def test_other_images_are_unknown(tmp_path: Path, source: str) -> None:
    assert relations(tmp_path).find(source) is None


def test_a_broken_mask_concerns_its_image_alone(tmp_path: Path) -> None:
    relations(tmp_path)
    path = tmp_path / "relations_train.json"
    data = json.loads(path.read_text())
    views = data["annotations"][UID]["object_masks"]["steel bowl_0"]
    views["cam04"]["annotation"]["0"]["encodedMask"] = "A*"
    path.write_text(json.dumps(data["annotations"]))  # also without the outer level
    known = RelationAnnotations(path)
    with pytest.raises(SpearError, match="not an lz-string"):
        FileDetector(known).detect([frame(f"{UID}/cam04/0.jpg", 36, 64)])
    assert len(FileDetector(known).detect([frame(f"{UID}/aria01_214-1/270.jpg", 48, 48)])[0]) == 2


def test_what_is_not_relations_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"images": [], "annotations": []}))
    with pytest.raises(SpearError, match=r"other\.json: not Ego-Exo4D's relations"):
        RelationAnnotations(path)
