import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spear.errors import SpearError
from spear.labels.fit import rle
from spear.labels.models.annotations import FileDetector, FileSegmenter
from spear.labels.models.coco import CocoAnnotations
from spear.types import Frame

RING = np.zeros((12, 20), bool)
RING[2:9, 3:11] = True
RING[4:6, 5:8] = False
PLAIN = rle.encode(RING)
SQUARE = [10.0, 1, 16, 1, 16, 7, 10, 7]


def content(**changes: Any) -> dict[str, Any]:
    image = {"id": 7, "file_name": "kitchen/1.jpg", "height": 12, "width": 20}
    ring = {"size": [12, 20]}
    return {
        "images": [image, {**image, "id": 8, "file_name": "hall/1.jpg"}, {**image, "id": 9, "file_name": "2.png"}],
        "categories": [{"id": 1, "name": "ring"}, {"id": 4, "name": "tile"}],
        "annotations": [
            {"image_id": 7, "category_id": 1, "bbox": [3, 2, 8, 7], "segmentation": {**ring, "counts": PLAIN}},
            {"image_id": 7, "category_id": 4, "bbox": [10, 1, 6, 6], "segmentation": [SQUARE], "score": 0.5},
            {"image_id": 7, "category_id": 4, "bbox": [0, 0, 20, 12], "iscrowd": 1},
            {"image_id": 8, "category_id": 1, "segmentation": {**ring, "counts": rle.to_string(PLAIN)}},
        ],
        **changes,
    }  # fmt: skip


def frame(source: str, height: int = 12, width: int = 20) -> Frame:
    return Frame(np.zeros((height, width, 3), np.uint8), source=source)


def write(folder: Path, data: Any) -> CocoAnnotations:
    path = folder / "instances.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return CocoAnnotations(path)


def test_boxes_and_all_kinds_of_masks(tmp_path: Path) -> None:
    coco = write(tmp_path, content())
    frames = [frame("photos/kitchen/1.jpg"), frame("hall/1.jpg"), frame("2.png")]
    detections = FileDetector(coco).detect(frames)
    assert [[(d.name, d.score) for d in found] for found in detections] == [
        [("ring", 1.0), ("tile", 0.5)],
        [("ring", 1.0)],
        [],
    ]
    assert detections[0][1].box2d.tolist() == [10, 1, 16, 7]
    assert detections[1][0].box2d.tolist() == [3, 2, 11, 9]  # from the mask
    kitchen, hall, _ = FileSegmenter(coco).segment(frames, detections)
    assert (kitchen[0] == RING).all() and (hall[0] == RING).all()
    assert kitchen[1].sum() == 36 and kitchen[1, 1:7, 10:16].all()


def test_images_are_found_by_the_end_of_their_path(tmp_path: Path) -> None:
    coco = write(tmp_path, content())
    assert len(coco.find("/data/kitchen/1.jpg") or ()) == 2
    assert len(coco.find(r"C:\data\kitchen\1.jpg") or ()) == 2
    assert coco.find("2.png") == coco.find("./any/where/2.png") == []
    assert coco.find("cellar/1.jpg") is None and coco.find("3.jpg") is None and coco.find("") is None
    with pytest.raises(SpearError, match=r"1\.jpg: fits 2 images of .*instances\.json: name its folder"):
        coco.find("1.jpg")


def test_provenance_names_the_content(tmp_path: Path) -> None:
    first = write(tmp_path, content()).name
    assert first.startswith("coco instances.json (") and first == write(tmp_path, content()).name
    assert first != write(tmp_path, content(annotations=[])).name


def test_images_without_a_size_take_that_of_the_picture(tmp_path: Path) -> None:
    images = [{"id": 7, "file_name": "a.jpg"}]
    annotation = {"image_id": 7, "category_id": 4, "bbox": [10, 1, 6, 6], "segmentation": [SQUARE]}
    coco = write(tmp_path, content(images=images, annotations=[annotation]))
    frames = [frame("a.jpg", 30, 30)]
    (masks,) = FileSegmenter(coco).segment(frames, FileDetector(coco).detect(frames))
    assert masks[0].sum() == 36 and masks.shape == (1, 30, 30)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "not JSON"),
        ("[]", "its JSON is a list"),
        ({}, "KeyError: 'categories'"),
        (content(images=[{"id": 7}]), "KeyError: 'file_name'"),
        (content(annotations=[{"image_id": 70, "category_id": 1, "bbox": [1, 2, 3, 4]}]), "KeyError: 70"),
        (content(annotations=[{"image_id": 7, "category_id": 5, "bbox": [1, 2, 3, 4]}]), "KeyError: 5"),
        (content(annotations=[{"image_id": 7, "category_id": 1, "bbox": [1, 2]}]), "ValueError"),
        (content(annotations=[{"image_id": 7, "category_id": 1, "id": 3}]), "annotation 3 has neither a box"),
    ],
)  # fmt: skip
def test_what_is_not_coco_is_refused(tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(SpearError, match=rf"instances\.json: .*{message}"):
        write(tmp_path, data)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpearError, match=r"nothing\.json: cannot read the annotations \(No such file"):
        CocoAnnotations(tmp_path / "nothing.json")


def test_a_mask_of_the_wrong_size_concerns_its_image_alone(tmp_path: Path) -> None:
    wrong = {"size": [20, 12], "counts": rle.encode(RING.T)}
    annotation = {"image_id": 7, "category_id": 1, "bbox": [3, 2, 8, 7], "segmentation": wrong}
    coco = write(tmp_path, content(annotations=[annotation]))
    frames = [frame("kitchen/1.jpg")]
    with pytest.raises(SpearError, match="mask of 12×20 in an image of 20×12"):
        FileSegmenter(coco).segment(frames, FileDetector(coco).detect(frames))
