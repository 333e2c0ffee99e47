"""Annotations from files of COCO and Ego-Exo4D, as detections and masks.

Most annotated objects are discs in images of 60 × 40 pixels. Their box is tight around the disc.
"""

import json
import warnings
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
from spear.errors import Notice
from spear.labels.fit.masks import (
    decode_coco_run_length_string,
    decode_mask,
    encode_mask,
    rasterize_polygons,
)
from spear.labels.inputs import list_images
from spear.labels.model_factories import resolve_factory
from spear.labels.models.annotations import (
    Annotation,
    Annotations,
    FileDetector,
    FileSegmenter,
    decompress_lz_string,
    load_annotations,
)  # fmt: skip
from spear.labels.models.protocols import Detection
from spear.labels.options import LabelOptions
from spear.labels.pipeline import (
    detect_and_add_detections,
    make_checked_pending_image,
    read_and_encode_images,
)
from spear.types import Array, Frame

coco_tools = pytest.importorskip("pycocotools.mask")
CUP = Detection("cup", np.array([12, 12, 28, 28]))  # around a disc at (20, 20) with a radius of 8


def make_disc(height: int, width: int, x: float, y: float, radius: float) -> Array:
    """The mask [height, width] of a disc.

    Center and radius are in pixels of an image that is 60 pixels wide; the mask may be resized.
    """
    rows, columns = (np.mgrid[:height, :width] + 0.5) * 60 / width
    return np.hypot(columns - x, rows - y) < radius


def annotate_disc(name: str, x: float, y: float, radius: float = 8, **changes: Any) -> Annotation:
    """The annotation of a disc in an image of 60 × 40 pixels; `changes` replace its fields."""
    fields: dict[str, Any] = {
        "box2d": np.array([x - radius, y - radius, x + radius, y + radius]),
        "size": (40, 60),
        "decode_outline": lambda height, width: make_disc(height, width, x, y, radius),
    }
    return Annotation(name, **{**fields, **changes})


def make_annotations(**images: list[Annotation]) -> Annotations:
    """A file with the annotations of images, given by the images' sources."""
    return Annotations("known", images.get)


def make_frame(source: str, height: int = 40, width: int = 60) -> Frame:
    return Frame(np.zeros((height, width, 3), np.uint8), source=source)


# Boxes and masks of a file


# The annotated image has 60 × 40 pixels; the images to label may be resized copies.
@pytest.mark.parametrize(("height", "width"), [(40, 60), (20, 30), (80, 120), (27, 40)])
def test_boxes_are_those_of_the_file_in_an_image_resized(height: int, width: int) -> None:
    annotations = make_annotations(
        a=[annotate_disc("cup", x=20, y=20), annotate_disc("mug", x=44, y=22)], b=[]
    )
    frames = [make_frame("a", height, width), make_frame("b", height, width)]

    (cup, mug), detections_of_b = FileDetector(annotations).detect(frames)

    assert (cup.name, mug.name) == ("cup", "mug")
    # 27 × 40 pixels have nearly, but not exactly, the aspect of 40 × 60.
    np.testing.assert_allclose(cup.box2d, CUP.box2d * width / 60, rtol=0.02)
    assert detections_of_b == []


@pytest.mark.parametrize(
    ("height", "width", "max_error"),
    [
        (40, 60, 1e-9),  # not resized
        (20, 30, 0.02),  # resized: at most 2 % of the pixels differ
        (80, 120, 0.02),
        (27, 40, 0.02),
    ],
)
def test_masks_are_those_of_the_file_in_an_image_resized(
    height: int, width: int, max_error: float
) -> None:
    annotations = make_annotations(
        a=[annotate_disc("cup", x=20, y=20), annotate_disc("mug", x=44, y=22, radius=5)], b=[]
    )
    frames = [make_frame("a", height, width), make_frame("b", height, width)]
    detections = FileDetector(annotations).detect(frames)

    (cup_mask, mug_mask), masks_of_b = FileSegmenter(annotations).segment(frames, detections)

    assert (cup_mask != make_disc(height, width, x=20, y=20, radius=8)).mean() < max_error
    assert (mug_mask != make_disc(height, width, x=44, y=22, radius=5)).mean() < max_error
    assert masks_of_b.shape == (0, height, width)


def test_an_image_that_was_cropped_is_refused() -> None:
    """A crop has another aspect than the annotated image."""
    annotations = make_annotations(a=[annotate_disc("cup", x=20, y=20)])

    refuses(
        r"'cup'.*60×40.* 60×60",
        FileDetector(annotations).detect,
        [make_frame("a", height=60, width=60)],
    )
    refuses(
        "60×40", FileSegmenter(annotations).segment, [make_frame("a", height=40, width=40)], [[CUP]]
    )


# EXIF orientations that an image's size does not show, and the width of an image 40 pixels high: 2
# and 4 mirror it, 3 turns it by 180°, and 6 turns it by 90°, which a square image does not show.
UNSEEN_TURNS = [(2, 60), (3, 60), (4, 60), (6, 40)]


def save_turned_frame(path: Path, orientation: int, width: int) -> Frame:
    """Save an image with an EXIF orientation, and read it as a frame."""
    exif = Image.Exif()
    exif[0x0112] = orientation  # the tag of the orientation
    Image.new("RGB", (width, 40)).save(path, exif=exif)
    (image,) = read_and_encode_images(list(list_images(str(path))))
    assert image.frame is not None
    return image.frame


@pytest.fixture(params=UNSEEN_TURNS)
def turned_frame(request: pytest.FixtureRequest, tmp_path: Path) -> Frame:
    """A JPEG that its EXIF turns or mirrors in a way that its size does not show."""
    orientation, width = request.param
    return save_turned_frame(tmp_path / "a.jpg", orientation, width)


def check_turned_frame_is_refused(frame: Frame) -> None:
    """Check that annotations of a frame are refused because of the frame's EXIF data."""
    size = frame.image.shape[:2]
    annotations = Annotations("known", lambda _: [annotate_disc("cup", x=20, y=20, size=size)])
    refuses("EXIF", FileDetector(annotations).detect, [frame])
    refuses("EXIF", FileSegmenter(annotations).segment, [frame], [[CUP]])


def test_annotations_of_a_photo_that_is_turned_unseen_are_refused(turned_frame: Frame) -> None:
    """The annotations may be for the image as it is stored, or for the turned image."""
    check_turned_frame_is_refused(turned_frame)


@pytest.mark.parametrize(("orientation", "width"), UNSEEN_TURNS)
def test_annotations_of_a_tiff_that_is_turned_unseen_are_refused(
    tmp_path: Path, orientation: int, width: int
) -> None:
    check_turned_frame_is_refused(save_turned_frame(tmp_path / "a.tif", orientation, width))


def test_a_turned_photo_without_objects_is_accepted(turned_frame: Frame) -> None:
    detector = FileDetector(Annotations("empty", lambda _: []))

    assert detector.detect([turned_frame]) == [[]]


CONTRADICTORY_BOXES = [  # of a disc whose mask is in [12, 12, 28, 28]
    [40, 20, 56, 36],  # beside the mask
    [6, 6, 14, 14],  # in pixels of an image of half the size
    [12, 12, 40, 40],  # x1, y1 were read as width and height
    [0, 0, 60, 40],  # the whole image
    [21, 12, 28, 28],  # around less than half of the mask
]


@pytest.mark.parametrize("box", CONTRADICTORY_BOXES)
def test_a_box_that_contradicts_its_mask_is_an_error_of_its_image(box: list[float]) -> None:
    odd_cup = annotate_disc("cup", x=20, y=20, box2d=np.array(box, np.float64))
    annotations = make_annotations(a=[odd_cup], b=[annotate_disc("mug", x=44, y=22)])

    refuses("'cup' contradicts its mask", FileDetector(annotations).detect, [make_frame("a")])
    assert len(FileDetector(annotations).detect([make_frame("b")])[0]) == 1


def test_a_mask_is_not_used_for_a_detection_that_matches_its_wrong_box() -> None:
    odd_cup = annotate_disc("cup", x=20, y=20, box2d=np.array([40.0, 20, 56, 36]))
    annotations = make_annotations(a=[odd_cup])
    detection = Detection("cup", np.array([40, 20, 56, 36]))

    refuses(
        "'cup' contradicts", FileSegmenter(annotations).segment, [make_frame("a")], [[detection]]
    )


# The tight box of the mask is [12, 12, 28, 28]. A box around it may have up to four times its area.
@pytest.mark.parametrize("box", [[10, 11, 29, 28], [12, 12, 28, 40], [4, 12, 36, 28]])
def test_a_box_may_be_larger_than_its_mask(box: list[float]) -> None:
    cup = annotate_disc("cup", x=20, y=20, box2d=np.array(box, np.float64))

    (detections,) = FileDetector(make_annotations(a=[cup])).detect([make_frame("a")])

    assert detections[0].box2d.tolist() == box


def test_small_boxes_agree_with_their_mask_within_two_pixels() -> None:
    """The mask is the one pixel in [20, 20, 21, 21], with a small overlap with its box."""
    crumb = annotate_disc(
        "crumb", x=20.5, y=20.5, radius=0.6, box2d=np.array([19.0, 19, 22.6, 22.6])
    )

    (detections,) = FileDetector(make_annotations(a=[crumb])).detect([make_frame("a")])

    assert len(detections) == 1


def test_boxes_are_clipped_to_the_image_and_empty_ones_dropped() -> None:
    """Two objects have only a mask; one of these masks is empty."""
    without_box = Annotation(
        "seen", None, (40, 60), lambda h, w: make_disc(h, w, x=30, y=20, radius=6)
    )
    invisible = Annotation("unseen", None, (40, 60), lambda h, w: np.zeros((h, w), bool))
    objects = [annotate_disc("cut", x=58, y=38), annotate_disc("outside", x=80, y=20)]
    annotations = make_annotations(a=[*objects, without_box, invisible])

    (detections,) = FileDetector(annotations).detect([make_frame("a")])

    # "cut" reaches from [50, 30] beyond the image; the box of "seen" is tight around its mask.
    boxes = [(d.name, d.box2d.tolist()) for d in detections]
    assert boxes == [("cut", [50, 30, 60, 40]), ("seen", [24, 14, 36, 26])]


# A second segmenter or detector


# `BoxSegmenter` is the second segmenter: it returns the whole 2D box as the mask.
SPOON = Detection("spoon", np.array([0, 0, 4, 4], np.float32))


@pytest.fixture
def boxed_fork() -> Annotations:
    """Image "a" has a fork without a mask and a cup with a mask, image "b" has such a cup."""
    fork = annotate_disc("fork", x=44, y=22, radius=5, decode_outline=None)
    return make_annotations(
        a=[fork, annotate_disc("cup", x=20, y=20)], b=[annotate_disc("cup", x=20, y=20)]
    )


def test_an_object_without_a_mask_is_refused_without_a_second_segmenter(
    boxed_fork: Annotations,
) -> None:
    frames = [make_frame("a"), make_frame("b")]
    detections = FileDetector(boxed_fork).detect(frames)

    refuses("'fork'", FileSegmenter(boxed_fork).segment, frames, detections)


def test_only_objects_without_a_mask_go_to_the_second_segmenter(boxed_fork: Annotations) -> None:
    frames = [make_frame("a"), make_frame("b"), make_frame("c")]  # the file lacks "c"
    detections = [*FileDetector(boxed_fork).detect(frames[:2]), [SPOON]]
    second = BoxSegmenter()
    second.segment = Mock(wraps=second.segment)

    masks = FileSegmenter(boxed_fork, second).segment(frames, detections)

    ((_, second_detections), _) = second.segment.call_args
    names = [[d.name for d in image_detections] for image_detections in second_detections]
    assert names == [["fork"], ["spoon"]]
    assert masks[0][0].sum() == 100  # the fork's box has 10 × 10 pixels
    annotated_cup = make_disc(40, 60, x=20, y=20, radius=8)
    assert (masks[0][1] == annotated_cup).all()  # a mask of the file stays
    assert masks[2][0].sum() == 16  # the spoon's box has 4 × 4 pixels


def test_detections_of_another_detector_get_the_mask_that_they_overlap() -> None:
    """Equal names come first: a cup gets the cup's mask although it overlaps the mug's box more."""
    annotations = make_annotations(
        a=[annotate_disc("mug", x=20, y=20), annotate_disc("cup", x=22, y=20)]
    )
    cup_in_box_of_mug = Detection("cup", np.array([12, 12, 28, 28], np.float32))
    beaker = Detection("beaker", np.array([13, 12, 29, 28], np.float32))
    distant_cup = Detection("cup", np.array([40, 12, 56, 28], np.float32))
    detections = [cup_in_box_of_mug, beaker, distant_cup]

    (masks,) = FileSegmenter(annotations, BoxSegmenter()).segment([make_frame("a")], [detections])

    assert (masks[0] == make_disc(40, 60, x=22, y=20, radius=8)).all()  # the cup
    assert (masks[1] == make_disc(40, 60, x=20, y=20, radius=8)).all()  # the mug, which is left
    assert masks[2].sum() == 256  # its box of 16 × 16 pixels, from the second segmenter


def test_the_name_of_a_file_with_a_second_model_has_both(tmp_path: Path) -> None:
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    options = LabelOptions()

    detector = resolve_factory("detector", f"file:{path}", options)()
    two_detectors = resolve_factory("detector", f"file:{path}+ground-truth", options)()
    two_segmenters = resolve_factory("segmenter", f"file:{path}+ground-truth", options)()

    assert "boxes.json" in detector.name
    assert two_detectors.name == f"{detector.name}, otherwise ground-truth"
    assert "ground-truth" in two_segmenters.name


# Masks in text


def compress_mask(mask: Array) -> str:
    """Encode a mask [h, w] as pycocotools' compressed string."""
    return coco_tools.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(0.02, 0.98))
def test_compressed_strings_are_those_of_pycocotools(
    height: int, width: int, seed: int, density: float
) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < density

    assert decode_coco_run_length_string(compress_mask(mask)) == encode_mask(mask)
    assert (decode_mask(encode_mask(mask), height, width) == mask).all()


@given(st.integers(1, 40), st.integers(1, 40))
def test_long_runs_are_those_of_pycocotools(height: int, width: int) -> None:
    """In a large mask with few pixels, runs have many digits, and their differences have signs."""
    mask = np.zeros((1000, 100 * width), bool)
    mask[7:40, 2] = True  # 33 pixels in one column
    first_row = 20 * height  # 20 to 800
    mask[first_row:, 90] = True

    assert decode_coco_run_length_string(compress_mask(mask)) == encode_mask(mask)


# Three letters that no number contains, and a number that does not end
@pytest.mark.parametrize("text", ["01 2", "0é", "0\x7f", "0P"])
def test_broken_run_lengths_are_refused(text: str) -> None:
    refuses("compressed mask", decode_coco_run_length_string, text)


@pytest.mark.parametrize("polygon", [[1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, np.nan], []])
def test_what_is_no_polygon_is_refused(polygon: list[float]) -> None:
    refuses("polygon", rasterize_polygons, [polygon], height=6, width=8)


def compress_text(text: str) -> str:
    return str(pytest.importorskip("lzstring").LZString().compressToEncodedURIComponent(text))


@given(st.text(st.sampled_from("0123OPQabc`z\x7fé€日"), max_size=300))
def test_decompresses_what_lz_string_compresses(text: str) -> None:
    assert decompress_lz_string(compress_text(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A",  # the announced letter is missing
        "A*",  # "*" stands for no bits
        "____",  # begins with the index of a word that is not in the dictionary
        "EoFQtg2gTARgDAM",  # cut off before its end
    ],
)
def test_text_that_is_no_complete_lz_string_is_refused(text: str) -> None:
    refuses("lz-string", decompress_lz_string, text)


# COCO

RING = np.zeros((12, 20), bool)  # rows 2 to 8, columns 3 to 10, with a hole
RING[2:9, 3:11] = True
RING[4:6, 5:8] = False
# A square of 6 × 6 pixels, as two polygons x0, y0, x1, y1, …, which are its halves
SQUARE = [[10.0, 1, 13, 1, 13, 7, 10, 7], [13.0, 1, 16, 1, 16, 7, 13, 7]]


def make_coco(**changes: Any) -> dict[str, Any]:
    """Make COCO's JSON; `changes` replace its lists.

    Image 7 (kitchen/1.jpg) has a ring, a tile and a crowd of tiles; image 8 (hall/1.jpg) has a
    ring; image 9 (2.png) has no object. The masks are run lengths, polygons and a compressed
    string. The last annotation has no box.
    """
    size = {"height": 12, "width": 20}
    plain_ring = {"size": [12, 20], "counts": encode_mask(RING)}
    compressed_ring = {"size": [12, 20], "counts": compress_mask(RING)}
    return {
        "images": [
            {"id": 7, "file_name": "kitchen/1.jpg", **size},
            {"id": 8, "file_name": "hall/1.jpg", **size},
            {"id": 9, "file_name": "2.png", **size},
        ],
        "categories": [{"id": 1, "name": "ring"}, {"id": 4, "name": "tile"}],
        "annotations": [
            {"image_id": 7, "category_id": 1, "bbox": [3, 2, 8, 7], "segmentation": plain_ring},
            {
                "image_id": 7, "category_id": 4, "bbox": [10, 1, 6, 6],
                "segmentation": SQUARE, "score": 0.5,
            },
            {"image_id": 7, "category_id": 4, "segmentation": SQUARE, "iscrowd": 1},
            {"image_id": 8, "category_id": 1, "segmentation": compressed_ring},
        ],
        **changes,
    }  # fmt: skip


def write_and_open(folder: Path, data: Any) -> Annotations:
    """Open annotations from a file with these data, or with this text."""
    path = folder / "annotations.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return load_annotations(path)


COCO_FRAMES = [  # kitchen, hall and the image without objects
    make_frame("photos/kitchen/1.jpg", height=12, width=20),
    make_frame("hall/1.jpg", height=12, width=20),
    make_frame("2.png", height=12, width=20),
]


def test_coco_objects_have_their_names_boxes_and_scores(tmp_path: Path) -> None:
    coco = write_and_open(tmp_path, make_coco())

    kitchen, hall, last = FileDetector(coco).detect(COCO_FRAMES)

    crowd = [("tile", 1.0), ("tiles", 1.0)]  # two placeholders
    assert [(d.name, d.score) for d in kitchen] == [("ring", 1.0), ("tile", 0.5), *crowd]
    assert [(d.name, d.score) for d in hall] == [("ring", 1.0)]
    assert last == []
    assert kitchen[1].box2d.tolist() == [10, 1, 16, 7]
    assert hall[0].box2d.tolist() == [3, 2, 11, 9]  # the tight box of the mask


def test_coco_masks_are_run_lengths_or_polygons_and_those_of_crowds_empty(tmp_path: Path) -> None:
    coco = write_and_open(tmp_path, make_coco())
    detections = FileDetector(coco).detect(COCO_FRAMES)

    kitchen, hall, _ = FileSegmenter(coco).segment(COCO_FRAMES, detections)

    assert (kitchen[0] == RING).all()
    assert (hall[0] == RING).all()
    assert kitchen[1].sum() == 36  # the square
    assert kitchen[1, 1:7, 10:16].all()
    assert not kitchen[2:].any()  # the crowd


@pytest.mark.parametrize("source", ["/data/kitchen/1.jpg", r"C:\data\kitchen\1.jpg"])
def test_coco_images_are_found_by_the_end_of_their_path(tmp_path: Path, source: str) -> None:
    coco = write_and_open(tmp_path, make_coco())

    annotations = coco.find(source)

    assert annotations is not None
    assert len(annotations) == 4


@pytest.mark.parametrize("source", ["cellar/1.jpg", "3.jpg", ""])
def test_other_images_are_not_known_to_coco(tmp_path: Path, source: str) -> None:
    assert write_and_open(tmp_path, make_coco()).find(source) is None


def test_a_source_that_fits_two_coco_images_is_refused(tmp_path: Path) -> None:
    coco = write_and_open(tmp_path, make_coco())

    refuses(r"1\.jpg .*annotations\.json", coco.find, "1.jpg")


def test_two_sources_that_fit_one_coco_image_are_refused(tmp_path: Path) -> None:
    coco = write_and_open(tmp_path, make_coco())

    assert coco.find("2.png") == []
    assert coco.find("2.png") == []  # one source may be looked up again
    refuses(r"2\.png and \./any/where/2\.png", coco.find, "./any/where/2.png")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("{", "JSON"),
        ({"images": []}, "'categories'"),
        (make_coco(images={"7": "1.jpg"}), "list"),
        (make_coco(images=[{"id": 7}]), "file_name"),
        (make_coco(annotations="none"), "list"),
        ({"annotations": {"uid": {"take_name": "a"}}}, "'object_masks'"),
    ],
)
def test_what_is_neither_coco_nor_relations_is_refused(
    tmp_path: Path, data: Any, reason: str
) -> None:
    refuses(rf"annotations\.json.*{reason}", write_and_open, tmp_path, data)


ODD_ANNOTATIONS: list[tuple[Any, str]] = [  # changed fields, reason in the message
    ({"bbox": [1, 2]}, "x, y, width, height"),
    ({"bbox": [1, 2, 3, np.nan]}, "x, y, width, height"),
    ({"bbox": ["a", 2, 3, 4]}, "annotation 31"),
    ({"bbox": [9, 8, -6, -5]}, "not positive"),
    ({"bbox": [3, 2, 8, 0]}, "not positive"),
    ({"bbox": []}, "neither a box nor a mask"),
    ({"bbox": None, "segmentation": None}, "neither a box nor a mask"),
    ({"segmentation": {"size": [12, 20]}}, "counts"),
    ({"segmentation": 7}, "annotation 31"),
    ({"bbox": [1, 2, 3, 4], "category_id": 5}, "category 5"),
    ({"bbox": [1, 2, 3, 4], "category_id": [1]}, "annotation 31"),
    ({"bbox": [1, 2, 3, 4], "score": "high"}, "high"),
    ({"bbox": [1, 2, 3, 4], "score": np.nan}, "score"),
]


@pytest.mark.parametrize(("odd", "reason"), ODD_ANNOTATIONS)
def test_an_odd_coco_annotation_costs_its_image_alone_and_is_named(
    tmp_path: Path, odd: dict[str, Any], reason: str
) -> None:
    content = make_coco()
    content["annotations"].append({"id": 31, "image_id": 8, "category_id": 1, **odd})

    with pytest.warns(Notice, match=reason) as notices:
        coco = write_and_open(tmp_path, content)

    messages = [str(notice.message) for notice in notices if notice.category is Notice]
    assert len(messages) == 1
    assert "annotation 31" in messages[0]

    # The kitchen has its four objects; the hall, to which the annotation belongs, is refused.
    assert len(FileDetector(coco).detect(COCO_FRAMES[:1])[0]) == 4
    message = refuses(reason, FileDetector(coco).detect, COCO_FRAMES[1:2])
    assert "annotation 31" in message
    assert "hall/1.jpg" in message


@pytest.mark.parametrize(
    ("stray", "reason"),
    [  # the fifth annotation of the file, the reason in the message
        ({"id": 31, "image_id": 70, "category_id": 1, "bbox": [1, 2, 3, 4]}, "31.* image 70"),
        ({"id": 31, "category_id": 1, "bbox": [1, 2, 3, 4]}, "31.*image_id"),
        ({"image_id": [7], "category_id": 1}, "annotation number 5"),
        (None, "annotation number 5"),
    ],
)
def test_a_coco_annotation_of_no_image_costs_nothing_and_is_named(
    tmp_path: Path, stray: Any, reason: str
) -> None:
    content = make_coco()
    content["annotations"].append(stray)

    with pytest.warns(Notice, match=reason):
        coco = write_and_open(tmp_path, content)

    num_objects = [len(detections) for detections in FileDetector(coco).detect(COCO_FRAMES)]
    assert num_objects == [4, 1, 0]


@pytest.mark.parametrize(
    "size",
    [
        {},
        {"height": None, "width": None},
        {"height": 0, "width": 20},
        {"height": "tall", "width": 20},
        {"height": np.inf, "width": 20},
    ],
)
def test_a_coco_image_without_a_size_is_refused_alone_and_named(
    tmp_path: Path, size: dict[str, Any]
) -> None:
    content = make_coco()
    content["images"][1] = {"id": 8, "file_name": "hall/1.jpg", **size}

    with pytest.warns(Notice, match=r"hall/1\.jpg"):
        coco = write_and_open(tmp_path, content)

    assert len(FileDetector(coco).detect(COCO_FRAMES[:1])[0]) == 4
    refuses(r"hall/1\.jpg.*no size", FileDetector(coco).detect, COCO_FRAMES[1:2])


@pytest.mark.parametrize("entry", [{"id": 9}, {"file_name": "2.png"}, {"id": 9, "file_name": ""}])
def test_a_coco_image_without_a_name_or_id_is_named(tmp_path: Path, entry: Any) -> None:
    content = make_coco()
    content["images"][2] = entry

    with pytest.warns(Notice, match=r"image (9|number 3)"):
        coco = write_and_open(tmp_path, content)

    assert len(FileDetector(coco).detect(COCO_FRAMES[:1])[0]) == 4


def test_many_odd_entries_are_counted_in_one_notice(tmp_path: Path) -> None:
    content = make_coco()
    strays = [{"id": 30 + i, "image_id": 70, "category_id": 1} for i in range(9)]
    content["annotations"] += strays

    # The first three, 30 to 32, are named.
    with pytest.warns(Notice, match="^9 records.*annotation 32.*; …"):
        write_and_open(tmp_path, content)


@pytest.mark.parametrize("fields", [{"score": None}, {"bbox": None}, {"bbox": []}])
def test_empty_fields_of_a_coco_annotation_count_as_missing(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    content = make_coco()
    content["annotations"][3].update(fields)  # the ring in the hall

    (detection,) = FileDetector(write_and_open(tmp_path, content)).detect(COCO_FRAMES[1:2])[0]

    assert detection.score == 1.0
    assert detection.box2d.tolist() == [3, 2, 11, 9]


@pytest.mark.parametrize(
    "segmentation",
    [
        [["a", 1, 2, 3, 4, 5]],  # a coordinate is no number
        [[1, 2, 3, 4]],  # two points
        [[[1, 2], [3]]],  # lists of points instead of a flat list of coordinates
        {"size": [12, 20], "counts": "é"},  # no letter of compressed run lengths
        {"size": [12, 20], "counts": [1, "a"]},  # a run length is no number
        {"size": [12], "counts": [240]},  # no width
    ],
)
def test_a_broken_coco_mask_concerns_its_image_alone(tmp_path: Path, segmentation: Any) -> None:
    content = make_coco()
    content["annotations"][3]["segmentation"] = segmentation  # the ring in the hall
    coco = write_and_open(tmp_path, content)
    kitchen, hall = COCO_FRAMES[:2]

    assert len(FileDetector(coco).detect([kitchen])[0]) == 4
    any_reason = ""
    refuses(any_reason, FileDetector(coco).detect, [hall])


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ([27, 24, -18, -15], "not positive"),
        ([39, 24, 18, 9], "contradicts"),  # beside the mask
    ],
)
def test_in_the_pipeline_only_the_image_of_an_odd_box_is_skipped(
    tmp_path: Path, box: list[float], reason: str
) -> None:
    """The images are larger than those of `make_coco`, because the pipeline skips small ones.

    Each has one ring. That of image 7 (kitchen) is right, that of image 8 (hall) has the odd box.
    """
    content = make_coco()
    content["images"] = [{**image, "height": 36, "width": 60} for image in content["images"]]
    square = [[3.0, 6, 27, 6, 27, 27, 3, 27]]
    content["annotations"] = [
        {"image_id": 7, "category_id": 1, "bbox": [3, 6, 24, 21], "segmentation": square},
        {"image_id": 8, "category_id": 1, "bbox": box, "segmentation": square},
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        detector = FileDetector(write_and_open(tmp_path, content))
    frames = [
        make_frame("kitchen/1.jpg", height=36, width=60),
        make_frame("hall/1.jpg", height=36, width=60),
    ]
    kitchen, hall = [make_checked_pending_image(frame) for frame in frames]

    detect_and_add_detections([kitchen, hall], detector)

    assert kitchen.error is None
    assert [detection.name for detection in kitchen.detections] == ["ring"]
    assert reason in str(hall.error)


# Ego-Exo4D's relations

UID = "44d647ce-72d2-4312-b80c-99faea2d017d"  # of a take
STEEL_BOWL = make_disc(48, 48, x=20, y=25, radius=8)
GLASS_BOWL = make_disc(48, 48, x=40, y=30, radius=6)
STEEL_BOWL_FROM_CAM04 = make_disc(36, 64, x=40, y=20, radius=5)


def make_relations_entry(mask: Array) -> dict[str, Any]:
    """The entry of a mask, whose compressed run lengths are compressed once more."""
    height, width = mask.shape
    return {"width": width, "height": height, "encodedMask": compress_text(compress_mask(mask))}


def make_relations() -> dict[str, Any]:
    """Make the relations of one take.

    The glasses (aria01_214-1) show two bowls in frame 270, and cam04 shows one bowl in frame 0.
    Frame 30 of both was annotated, without an object.
    """
    glasses = {
        "annotation": {"270": make_relations_entry(STEEL_BOWL)},
        "annotated_frames": [0, 30, 270],
    }
    cam04 = {
        "annotation": {"0": make_relations_entry(STEEL_BOWL_FROM_CAM04)},
        "annotated_frames": [0, 30],
    }
    glass_bowl = {"annotation": {"270": make_relations_entry(GLASS_BOWL)}}
    masks = {
        "steel bowl_0": {"aria01_214-1": glasses, "cam04": cam04},
        "glass bowl_11": {"aria01_214-1": glass_bowl},
    }
    return {UID: {"take_name": "sfu_cooking_008_3", "scenario": "salad", "object_masks": masks}}


def test_annotated_masks_of_relations_are_used_unchanged(tmp_path: Path) -> None:
    relations = write_and_open(tmp_path, {"annotations": make_relations()})
    frames = [
        make_frame(
            "takes/sfu_cooking_008_3/frame_aligned_videos/aria01_214-1.mp4#270", height=48, width=48
        ),
        make_frame(f"{UID}/cam04/0.jpg", height=36, width=64),
        make_frame("sfu_cooking_008_3/cam04/frame_000030.png", height=36, width=64),
    ]

    detections = FileDetector(relations).detect(frames)
    masks = FileSegmenter(relations).segment(frames, detections)

    names = [[d.name for d in frame_detections] for frame_detections in detections]
    assert names == [["steel bowl", "glass bowl"], ["steel bowl"], []]
    assert (masks[0] == [STEEL_BOWL, GLASS_BOWL]).all()
    assert (masks[1][0] == STEEL_BOWL_FROM_CAM04).all()


def test_a_broken_mask_of_relations_concerns_its_image_alone(tmp_path: Path) -> None:
    takes = make_relations()
    takes[UID]["object_masks"]["steel bowl_0"]["cam04"]["annotation"]["0"]["encodedMask"] = "A*"
    relations = write_and_open(tmp_path, takes)  # without the outer level, as in older files

    (detections,) = FileDetector(relations).detect(
        [make_frame(f"{UID}/aria01_214-1/270.jpg", height=48, width=48)]
    )

    assert len(detections) == 2
    refuses(
        "Ego-Exo4D",
        FileDetector(relations).detect,
        [make_frame(f"{UID}/cam04/0.jpg", height=36, width=64)],
    )
