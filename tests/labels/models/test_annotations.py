"""Annotations from files: COCO's, Ego-Exo4D's, and how they stand in for networks."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from labels_stand_ins import BoxSegmenter
from refusals import refuses
from spear.labels.fit.masks import decode_mask, decode_run_lengths, encode_mask, rasterize_polygons
from spear.labels.inputs import list_images
from spear.labels.model_factories import resolve_factory
from spear.labels.models.annotations import (
    Annotation,
    Annotations,
    FileDetector,
    FileSegmenter,
    decompress_lz_string,
    open_annotations,
)  # fmt: skip
from spear.labels.models.protocols import Detection
from spear.labels.options import LabelOptions
from spear.labels.pipeline import read_images
from spear.types import Array, Frame

coco_tools = pytest.importorskip("pycocotools.mask")
CUP = Detection("cup", np.array([12, 12, 28, 28]))


def disc(height: int, width: int, x: float, y: float, radius: float) -> Array:
    """A mask [height, width], in pixels of a 60×40 image."""
    rows, columns = (np.mgrid[:height, :width] + 0.5) * 60 / width
    return np.hypot(columns - x, rows - y) < radius


def outlined(name: str, x: float, y: float, radius: float = 8, **changes: Any) -> Annotation:
    fields: dict[str, Any] = {
        "box2d": np.array([x - radius, y - radius, x + radius, y + radius]),
        "size": (40, 60),
        "outline": lambda height, width: disc(height, width, x, y, radius),
    }
    return Annotation(name, **{**fields, **changes})


def held(**images: list[Annotation]) -> Annotations:
    return Annotations("known", images.get)


def frame(source: str, height: int = 40, width: int = 60, **known: Any) -> Frame:
    return Frame(np.zeros((height, width, 3), np.uint8), source=source, **known)


def test_boxes_and_masks_are_those_of_the_file_in_an_image_resized_but_not_cropped() -> None:
    known = held(a=[outlined("cup", 20, 20), outlined("mug", 44, 22, 5)], b=[])
    for height, width in ((40, 60), (20, 30), (80, 120), (27, 40)):
        frames = [frame("a", height, width), frame("b", height, width)]
        (cup, mug), nothing = FileDetector(known).detect(frames)
        assert (cup.name, mug.name, nothing) == ("cup", "mug", [])
        np.testing.assert_allclose(cup.box2d, np.array([12, 12, 28, 28]) * width / 60, rtol=0.02)
        masks, none = FileSegmenter(known).segment(frames, [[cup, mug], nothing])
        for mask, place in zip(masks, ((20, 20, 8), (44, 22, 5)), strict=True):
            assert (mask != disc(height, width, *place)).mean() < (0.02 if width != 60 else 1e-9)
        assert none.shape == (0, height, width)
    refuses(r"'cup'.*60×40.* 60×60", FileDetector(known).detect, [frame("a", 60, 60)])
    refuses("60×40", FileSegmenter(known).segment, [frame("a", 40, 40)], [[CUP]])


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
@pytest.mark.parametrize(("orientation", "width"), [(2, 60), (3, 60), (4, 60), (6, 40)])
def test_a_picture_turned_unseen_is_refused(
    tmp_path: Path, orientation: int, width: int, name: str
) -> None:
    """Of these the size does not tell whether annotations mean the picture as it is stored, or turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (width, 40)).save(tmp_path / name, exif=exif)
    (work,) = read_images(list(list_images(str(tmp_path / name))))
    known = Annotations("known", lambda _: [outlined("cup", 20, 20, size=(40, width))])
    refuses("EXIF", FileDetector(known).detect, [work.frame])
    refuses("EXIF", FileSegmenter(known).segment, [work.frame], [[CUP]])
    assert FileDetector(Annotations("empty", lambda _: [])).detect([work.frame]) == [[]]


def test_boxes_are_cut_at_the_edge_and_empty_ones_left_out() -> None:
    seen = Annotation("seen", None, (40, 60), lambda h, w: disc(h, w, 30, 20, 6))
    unseen = Annotation("unseen", None, (40, 60), lambda h, w: np.zeros((h, w), bool))
    known = held(a=[outlined("cut", 58, 38), outlined("outside", 80, 20), seen, unseen])
    (found,) = FileDetector(known).detect([frame("a")])
    boxes = [(d.name, d.box2d.tolist()) for d in found]
    assert boxes == [("cut", [50, 30, 60, 40]), ("seen", [24, 14, 36, 26])]


def test_objects_without_a_mask_go_to_the_other_segmenter_or_are_an_error() -> None:
    boxed = outlined("fork", 44, 22, 5, outline=None)
    known = held(a=[boxed, outlined("cup", 20, 20)], b=[outlined("cup", 20, 20)])
    frames = [frame("a"), frame("b"), frame("c")]
    spoon = Detection("spoon", np.array([0, 0, 4, 4], np.float32))
    detections = [*FileDetector(known).detect(frames[:2]), [spoon]]
    refuses("'fork'", FileSegmenter(known).segment, frames, detections)
    boxes = BoxSegmenter()
    boxes.segment = Mock(wraps=boxes.segment)
    masks = FileSegmenter(known, boxes).segment(frames, detections)
    asked = [found for call in boxes.segment.call_args_list for found in call.args[1]]
    assert [[d.name for d in found] for found in asked] == [["fork"], ["spoon"]]
    assert masks[0][0].sum() == 100 and (masks[0][1] == disc(40, 60, 20, 20, 8)).all()
    assert masks[2][0].sum() == 16


def test_detections_of_others_get_the_mask_that_they_overlap() -> None:
    known = held(a=[outlined("mug", 20, 20), outlined("cup", 22, 20)])
    near = Detection(
        "cup", np.array([12, 12, 28, 28], np.float32)
    )  # the mug's box, but a cup by name
    second = Detection("beaker", np.array([13, 12, 29, 28], np.float32))
    far = Detection("cup", np.array([40, 12, 56, 28], np.float32))
    (masks,) = FileSegmenter(known, BoxSegmenter()).segment([frame("a")], [[near, second, far]])
    assert (masks[0] == disc(40, 60, 22, 20, 8)).all()
    assert (masks[1] == disc(40, 60, 20, 20, 8)).all() and masks[2].sum() == 256


def test_annotations_come_first_and_leave_the_rest_to_another(tmp_path: Path) -> None:
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    alone = resolve_factory("detector", f"file:{path}", LabelOptions())()
    both = resolve_factory("detector", f"file:{path}+ground-truth", LabelOptions())()
    assert "boxes.json" in alone.name and both.name == f"{alone.name}, otherwise ground-truth"
    assert (
        "ground-truth"
        in resolve_factory("segmenter", f"file:{path}+ground-truth", LabelOptions())().name
    )


def compressed(mask: Array) -> str:
    return coco_tools.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(0.02, 0.98))
def test_compressed_strings_are_those_of_pycocotools(
    h: int, w: int, seed: int, share: float
) -> None:
    mask = np.random.default_rng(seed).random((h, w)) < share
    assert decode_run_lengths(compressed(mask)) == encode_mask(mask)
    assert (decode_mask(encode_mask(mask), h, w) == mask).all()
    long = np.zeros((1000, 100 * w), bool)
    long[7:40, 2] = long[100 * h // 5 :, 90] = True
    assert decode_run_lengths(compressed(long)) == encode_mask(long)


@pytest.mark.parametrize(
    ("read", "wrong"),
    [
        *((decode_run_lengths, text) for text in ("01 2", "0é", "0\x7f", "0P")),
        *(
            (lambda polygon: rasterize_polygons([polygon], 6, 8), polygon)
            for polygon in ([1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, float("nan")], [])
        ),
        *((decompress_lz_string, text) for text in ("", "A", "A*", "____", "EoFQtg2gTARgDAM")),
    ],
)
def test_what_is_no_mask_polygon_or_compressed_text_is_refused(read: Any, wrong: Any) -> None:
    refuses("", read, wrong)


RING = np.zeros((12, 20), bool)
RING[2:9, 3:11] = True
RING[4:6, 5:8] = False
PLAIN = encode_mask(RING)
SQUARE = [[10.0, 1, 13, 1, 13, 7, 10, 7], [13.0, 1, 16, 1, 16, 7, 13, 7]]


def content(**changes: Any) -> dict[str, Any]:
    first = {"id": 7, "file_name": "kitchen/1.jpg", "height": 12, "width": 20}
    ring = {"size": [12, 20]}
    return {
        "images": [first, *(first | {"id": i, "file_name": f} for i, f in ((8, "hall/1.jpg"), (9, "2.png")))],
        "categories": [{"id": 1, "name": "ring"}, {"id": 4, "name": "tile"}],
        "annotations": [
            {"image_id": 7, "category_id": 1, "bbox": [3, 2, 8, 7], "segmentation": ring | {"counts": PLAIN}},
            {"image_id": 7, "category_id": 4, "bbox": [10, 1, 6, 6], "segmentation": SQUARE, "score": 0.5},
            {"image_id": 7, "category_id": 4, "segmentation": SQUARE, "iscrowd": 1},
            {"image_id": 8, "category_id": 1, "segmentation": {**ring, "counts": compressed(RING)}},
        ],
        **changes,
    }  # fmt: skip


def written(folder: Path, data: Any) -> Annotations:
    path = folder / "annotations.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return open_annotations(path)


def test_boxes_and_all_kinds_of_masks(tmp_path: Path) -> None:
    coco = written(tmp_path, content())
    frames = [frame(name, 12, 20) for name in ("photos/kitchen/1.jpg", "hall/1.jpg", "2.png")]
    detections = FileDetector(coco).detect(frames)
    names = [[(d.name, d.score) for d in found] for found in detections]
    assert names == [
        [("ring", 1.0), ("tile", 0.5), *[("tile", 1.0), ("tiles", 1.0)]],
        [("ring", 1.0)],
        [],
    ]
    assert detections[0][1].box2d.tolist() == [10, 1, 16, 7]
    assert detections[1][0].box2d.tolist() == [3, 2, 11, 9]  # from the mask
    kitchen, hall, _ = FileSegmenter(coco).segment(frames, detections)
    assert (kitchen[0] == RING).all() and (hall[0] == RING).all()
    assert kitchen[1].sum() == 36 and kitchen[1, 1:7, 10:16].all() and not kitchen[2:].any()


def test_images_are_found_by_the_end_of_their_path(tmp_path: Path) -> None:
    coco = written(tmp_path, content())
    assert len(coco.find("/data/kitchen/1.jpg") or ()) == 4
    assert len(written(tmp_path, content()).find(r"C:\data\kitchen\1.jpg") or ()) == 4
    assert coco.find("2.png") == coco.find("2.png") == []
    refuses(r"2\.png and \./any/where/2\.png", coco.find, "./any/where/2.png")
    assert (
        coco.find("cellar/1.jpg") is None and coco.find("3.jpg") is None and coco.find("") is None
    )
    refuses(r"1\.jpg .*annotations\.json", coco.find, "1.jpg")


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ("{", "JSON"),
        ({"images": []}, "'categories'"),
        (
            content(images=[{"id": 7, "file_name": "1.jpg"}]),
            "'height'",
        ),  # of a photo that may be shrunk
        (content(annotations=[{"image_id": 70, "category_id": 1, "bbox": [1, 2, 3, 4]}]), "70"),
        (content(annotations=[{"image_id": 7, "category_id": 1, "bbox": [1, 2]}]), "ValueError"),
        (
            content(annotations=[{"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, np.nan]}]),
            "ValueError",
        ),
        (content(annotations=[{"image_id": 7, "category_id": 1, "id": 3}]), "annotation 3"),
        ({"annotations": {"uid": {"take_name": "a"}}}, "'object_masks'"),
    ],
)
def test_what_is_neither_coco_nor_relations_is_refused(
    tmp_path: Path, data: Any, named: str
) -> None:
    refuses(rf"annotations\.json.*{named}", written, tmp_path, data)


def compress(text: str) -> str:
    return str(pytest.importorskip("lzstring").LZString().compressToEncodedURIComponent(text))


UID = "44d647ce-72d2-4312-b80c-99faea2d017d"
FIRST, SECOND, THIRD = disc(48, 48, 20, 25, 8), disc(36, 64, 40, 20, 5), disc(48, 48, 40, 30, 6)


def relations(folder: Path, second: str | None = None) -> Annotations:
    """Two bowls in the wearer's frame 270, one of them in frame 0 of a camera that looks on; frame 30 empty.
    second: the packed mask in frame 0."""

    def entry(mask: Array) -> dict[str, Any]:
        height, width = mask.shape
        return {"width": width, "height": height, "encodedMask": compress(compressed(mask))}

    looking_on = entry(SECOND) if second is None else entry(SECOND) | {"encodedMask": second}
    views = {
        "steel bowl_0": {
            "aria01_214-1": {"annotation": {"270": entry(FIRST)}, "annotated_frames": [0, 30, 270]},
            "cam04": {"annotation": {"0": looking_on}, "annotated_frames": [0, 30]},
        },
        "glass bowl_11": {"aria01_214-1": {"annotation": {"270": entry(THIRD)}}},
    }
    takes = {UID: {"take_name": "sfu_cooking_008_3", "scenario": "salad", "object_masks": views}}
    return written(folder, {"annotations": takes} if second is None else takes)


@given(st.text(st.sampled_from("0123OPQabc`z\x7fé€日"), max_size=300))
def test_decompresses_what_lz_string_compresses(text: str) -> None:
    assert decompress_lz_string(compress(text)) == text


def test_annotated_masks_are_used_as_they_are(tmp_path: Path) -> None:
    known = relations(tmp_path)
    frames = [
        frame("takes/sfu_cooking_008_3/frame_aligned_videos/aria01_214-1.mp4#270", 48, 48),
        frame(f"{UID}/cam04/0.jpg", 36, 64),
        frame("sfu_cooking_008_3/cam04/frame_000030.png", 36, 64),
    ]
    detections = FileDetector(known).detect(frames)
    names = [[d.name for d in found] for found in detections]
    assert names == [["steel bowl", "glass bowl"], ["steel bowl"], []]
    masks = FileSegmenter(known).segment(frames, detections)
    assert (masks[0] == [FIRST, THIRD]).all() and (masks[1][0] == SECOND).all()


def test_a_broken_mask_concerns_its_image_alone(tmp_path: Path) -> None:
    known = relations(tmp_path, second="A*")  # also without the outer level
    refuses("Ego-Exo4D", FileDetector(known).detect, [frame(f"{UID}/cam04/0.jpg", 36, 64)])
    assert len(FileDetector(known).detect([frame(f"{UID}/aria01_214-1/270.jpg", 48, 48)])[0]) == 2
