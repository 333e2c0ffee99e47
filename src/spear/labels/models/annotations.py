"""Detector and segmenter that read what somebody has annotated: COCO's JSON, or Ego-Exo4D's relations.

Where a file does not know an image, or knows no mask of an object, another one can take over.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from spear.errors import SpearError
from spear.labels.fit.image import (
    clip_boxes,
    compute_iou_2d,
    compute_tight_box,
    have_same_aspect,
    resize_nearest,
)
from spear.labels.fit.masks import decode_mask, decode_run_lengths, rasterize_polygons
from spear.labels.models.protocols import Detection, Detector, Segmenter
from spear.types import Array, Frame
from spear.util.files import read_json


@dataclass(frozen=True)
class Annotation:
    """One annotated object.

    box2d    [4] x0, y0, x1, y1 in pixels of the image as annotated; None for the tight box of the mask.
    size     (height, width) of the image as annotated.
    outline  (height, width) -> mask [height, width] bool; None when only the box is annotated.
    """

    name: str
    box2d: Array | None
    size: tuple[int, int]
    outline: Callable[[int, int], Array] | None
    score: float = 1.0

    def box_in(self, height: int, width: int) -> Array:
        """The box [4] float32 in pixels of an image of this size, inside it; zeros for an empty mask.
        `SpearError` as in `mask_in`."""
        if self.box2d is None:
            mask = self.mask_in(height, width)
            return compute_tight_box(mask) if mask is not None else np.zeros(4, np.float32)
        rows, columns = self._annotated_size(height, width)
        return clip_boxes(
            self.box2d * np.array([width / columns, height / rows] * 2), height, width
        )

    def mask_in(self, height: int, width: int) -> Array | None:
        """The mask [height, width] bool in an image of this size (nearest pixel); None without an outline.
        `SpearError` when the annotation is for an image of another shape, or its mask is broken."""
        if self.outline is None:
            return None
        rows, columns = self._annotated_size(height, width)
        return resize_nearest(self.outline(rows, columns), height, width)

    def _annotated_size(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = self.size
        if not have_same_aspect((height, width), self.size):
            sizes = f"of an image of {columns}×{rows}, this one is {width}×{height}"
            raise SpearError(
                f"annotation of {self.name!r}: {sizes}: give the image itself, at most resized"
            )
        return rows, columns


FindAnnotations = Callable[[str], list[Annotation] | None]
"""What is annotated in the image of a source (see `Frame`); None for one that is not known. `SpearError` for
a source that fits several images."""


@dataclass(frozen=True)
class Annotations:
    """A file of annotations. `name` goes into the label's provenance."""

    name: str
    find: FindAnnotations

    def of(self, frame: Frame) -> list[Annotation] | None:
        """What `find` knows of an image. `SpearError` where it cannot be told whether it was annotated as it
        is stored or turned by its EXIF."""
        found = self.find(frame.source)
        if found and frame.is_turned:
            why = f"its EXIF turns it, {self.name} may mean it as it is stored or as it is seen"
            raise SpearError(f"{frame.source}: {why}: remove that tag, from pixels as annotated")
        return found


class FileDetector:
    """Boxes and names from a file of annotations.

    otherwise: detector for the images that the file does not know; without one they are a `SpearError`.
    """

    def __init__(self, annotations: Annotations, otherwise: Detector | None = None) -> None:
        self.annotations, self.otherwise = annotations, otherwise
        self.name = _name(annotations, otherwise)
        self.bill: Callable[[], str] = getattr(
            otherwise, "bill", str
        )  # of the other images' detector

    def detect(self, frames: Sequence[Frame]) -> list[list[Detection]]:
        """The annotated objects of each image, in the file's order; those with an empty box are left out."""
        found = [self.annotations.of(frame) for frame in frames]
        unknown = [
            frame for frame, annotated in zip(frames, found, strict=True) if annotated is None
        ]
        if unknown and self.otherwise is None:
            lacks = f"{unknown[0].source}: not in {self.annotations.name}"
            raise SpearError(
                f"{lacks}: name images as that file does, or add a detector for the others"
            )
        others = iter(self.otherwise.detect(unknown) if unknown and self.otherwise else ())
        results = []
        for frame, annotated in zip(frames, found, strict=True):
            boxed = [(a, a.box_in(*frame.image.shape[:2])) for a in annotated or ()]
            own = [Detection(a.name, b, a.score) for a, b in boxed if b[2] > b[0] and b[3] > b[1]]
            results.append(next(others) if annotated is None else own)
        return results


class FileSegmenter:
    """Masks from a file of annotations, for detections of that file or of any other detector.

    A detection gets the mask of the annotated object whose box overlaps its own most (IoU > 0.5, one of the
    same name first, each object once).

    otherwise: segmenter for detections without an annotated mask; without one they are a `SpearError`.
    """

    def __init__(self, annotations: Annotations, otherwise: Segmenter | None = None) -> None:
        self.annotations, self.otherwise = annotations, otherwise
        self.name = _name(annotations, otherwise)

    def segment(
        self, frames: Sequence[Frame], detections: Sequence[Sequence[Detection]]
    ) -> list[Array]:
        """For each frame, masks [n, h, w] bool."""
        results = list(map(self._masks, frames, detections))
        rest = [(f, d, *r) for f, d, r in zip(frames, detections, results, strict=True) if r[1]]
        if rest and self.otherwise is None:
            frame, found, _, missing = rest[0]
            lacks = (
                f"{frame.source}: no mask of {found[missing[0]].name!r} in {self.annotations.name}"
            )
            raise SpearError(f"{lacks}: add a segmenter for objects without one")
        if rest and self.otherwise:
            wanted = [[found[i] for i in missing] for _, found, _, missing in rest]
            made = self.otherwise.segment([frame for frame, *_ in rest], wanted)
            for (_, _, masks, missing), others in zip(rest, made, strict=True):
                masks[missing] = others
        return [masks for masks, _ in results]

    def _masks(self, frame: Frame, detections: Sequence[Detection]) -> tuple[Array, list[int]]:
        """Masks [n, h, w] of the detections, and the numbers of those that have none in the file."""
        height, width = frame.image.shape[:2]
        masks = np.zeros((len(detections), height, width), bool)
        annotated = [a for a in self.annotations.of(frame) or () if a.outline is not None]
        boxes = [a.box_in(height, width) for a in annotated]
        pairs = sorted(
            (annotated[j].name != detection.name, -overlap, i, j)
            for i, detection in enumerate(detections)
            for j, box in enumerate(boxes)
            if (overlap := float(compute_iou_2d(detection.box2d, box))) > 0.5
        )
        matched: dict[int, int] = {}
        for _, _, i, j in pairs:
            if i not in matched and j not in matched.values():
                matched[i] = j
                masks[i] = annotated[j].mask_in(height, width)
        return masks, [i for i in range(len(detections)) if i not in matched]


def _name(annotations: Annotations, otherwise: Detector | Segmenter | None) -> str:
    return annotations.name + (f", otherwise {otherwise.name}" if otherwise else "")


def open_annotations(path: str | Path) -> Annotations:
    """A COCO file, which has "images", or else Ego-Exo4D's relations. `SpearError` for what is neither."""
    content = read_json(Path(path), "give another file")
    file = f"{Path(path).name} ({hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]})"
    try:
        if "images" in content:
            return Annotations(f"coco {file}", _coco(content, file))
        return Annotations(f"ego-exo4d relations {file}", _relations(content))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        why = f"{type(error).__name__}: {error}"
        kinds = "COCO's JSON of instances nor Ego-Exo4D's relations"
        raise SpearError(f"{path}: neither {kinds} ({why}): give one of the two") from error


def _parts(path: str) -> list[str]:
    """The folders and the file of a path, whichever slashes it has; "#" separates like a slash."""
    return [part for part in re.split(r"[\\/#]+", path) if part not in ("", ".")]


def _coco(content: Mapping[str, Any], file: str) -> FindAnnotations:
    """The objects in a COCO JSON file, by image.

    An image belongs to the entry whose `file_name` ends as its source does, whole folder names compared.
    Crowds (`iscrowd`) are no instances: each becomes two objects with empty masks, one in the plural, so that
    its name is never alone and is not counted. Annotations without a box get the tight box of their mask. Run
    lengths of the wrong size are a `SpearError` when the mask is wanted.
    """
    known: dict[str, list[tuple[list[str], Any]]] = defaultdict(list)
    objects: dict[Any, list[Annotation]] = {}
    categories = {c["id"]: str(c["name"]) for c in content["categories"]}
    sizes: dict[Any, tuple[int, int]] = {}
    answered: dict[Any, str] = {}
    for image in content["images"]:
        parts = _parts(image["file_name"])
        known[parts[-1]].append((parts, image["id"]))
        objects[image["id"]] = []
        sizes[image["id"]] = (int(image["height"]), int(image["width"]))  # photos may be shrunk
    for a in content["annotations"]:
        size = sizes[a["image_id"]]
        one = _coco_annotation(a, categories[a["category_id"]], size)
        whole = np.array([0, 0, *size[::-1]], np.float64) if one.box2d is None else one.box2d
        crowd = replace(
            one, outline=lambda height, width: np.zeros((height, width), bool), box2d=whole
        )
        objects[a["image_id"]] += (
            [crowd, replace(crowd, name=f"{one.name}s")] if a.get("iscrowd") else [one]
        )

    def find(source: str) -> list[Annotation] | None:
        asked = _parts(source)
        common = {}
        for parts, image in known.get(asked[-1], ()) if asked else ():
            length = min(len(asked), len(parts))
            if asked[-length:] == parts[-length:]:
                common[image] = length
        best = [image for image, length in common.items() if length == max(common.values())]
        if len(best) > 1:
            raise SpearError(
                f"{source}: fits {len(best)} images of coco {file}: name its folder too"
            )
        if best and answered.setdefault(best[0], source) != source:
            other = f"{answered[best[0]]} and {source}"
            raise SpearError(f"{other}: one image of coco {file} fits both: name its folder too")
        return objects[best[0]] if best else None

    return find


def _coco_annotation(a: Mapping[str, Any], name: str, size: tuple[int, int]) -> Annotation:
    outline = _outline(a["segmentation"]) if a.get("segmentation") else None
    box = None
    if "bbox" in a:
        x, y, w, h = np.asarray_chkfinite(a["bbox"], float)
        box = np.array([x, y, x + w, y + h])
    elif outline is None:
        raise ValueError(f"annotation {a.get('id')} has neither a box nor a mask")
    return Annotation(name, box, size, outline, float(a.get("score", 1.0)))


def _outline(segmentation: Any) -> Callable[[int, int], Array]:
    """(height, width) → mask [height, width] of a COCO `segmentation`."""
    if isinstance(segmentation, list):
        return lambda height, width: rasterize_polygons(segmentation, height, width)
    counts, size = segmentation["counts"], tuple(segmentation["size"])

    def outline(height: int, width: int) -> Array:
        if size != (height, width):
            raise SpearError(
                f"mask of {size[1]}×{size[0]} in an image of {width}×{height}: repair the file"
            )
        return decode_mask(
            decode_run_lengths(counts) if isinstance(counts, str) else counts, height, width
        )

    return outline


def _relations(content: Mapping[str, Any]) -> FindAnnotations:
    """The objects in `relations_train.json` or `relations_val.json`, by take, camera and frame.

    The source of an image names the take (its name or its uid), then the camera (`aria01_214-1`, `cam04`),
    and ends in the number of the frame in the frame-aligned video, in any spelling of a path:
    `takes/sfu_cooking_008_3/frame_aligned_videos/cam04.mp4#270` or `<take uid>/cam04/270.jpg`.

    The object `stainless bowl_0` is named `stainless bowl`. A frame that was annotated without finding any
    object is known, and empty. Images may be smaller than the video was: masks are resized to them. A mask
    that cannot be decoded is a `SpearError` when it is wanted.
    """
    takes: dict[str, dict[str, dict[int, list[Annotation]]]] = {}
    for uid, take in content.get("annotations", content).items():
        cameras: dict[str, dict[int, list[Annotation]]] = defaultdict(lambda: defaultdict(list))
        takes[uid] = takes[str(take["take_name"])] = cameras
        for thing, views in take["object_masks"].items():
            for camera, view in views.items():
                for number in view.get("annotated_frames", ()):
                    cameras[camera].setdefault(int(number), [])
                for number, entry in view["annotation"].items():
                    size = int(entry["height"]), int(entry["width"])
                    outline = partial(_packed, entry["encodedMask"])
                    name = re.sub(r"_\d+$", "", thing)
                    cameras[camera][int(number)].append(Annotation(name, None, size, outline))
    if not takes:
        raise ValueError("it is empty")

    def find(source: str) -> list[Annotation] | None:
        parts = [
            re.sub(r"\.(mp4|jpe?g|png|webp)$", "", part, flags=re.I) for part in _parts(source)
        ]
        take = max((i for i, part in enumerate(parts) if part in takes), default=None)
        if take is None:
            return None
        cameras = takes[parts[take]]
        camera = next((part for part in parts[take + 1 : -1] if part in cameras), None)
        number = re.search(r"\d+$", parts[-1])
        return (
            None if camera is None or number is None else cameras[camera].get(int(number.group()))
        )

    return find


def _packed(encoded: str, height: int, width: int) -> Array:
    return decode_mask(decode_run_lengths(decompress_lz_string(encoded)), height, width)


_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+-$"
_VALUES = {letter: value for value, letter in enumerate(_LETTERS)}


def decompress_lz_string(text: str) -> str:
    """Undo lz-string's `compressToEncodedURIComponent`, in which the compressed run lengths are written.

    The letters are a stream of bits, six each, highest first. The numbers in it are written lowest bit first
    and name words of a dictionary that grows by each word's first letter put after the word before; they are
    as wide as its next free place needs. Three have a meaning of their own: 0 and 1 bring a new letter of 8
    or 16 bits, 2 ends the text.

    Raises `SpearError`: the text is not such a stream, or not all of it.
    """
    broken = SpearError("Ego-Exo4D mask: not an lz-string: give the file as it was published")
    if not set(text) <= _VALUES.keys():
        raise broken
    bits = chain.from_iterable(f"{_VALUES[letter]:06b}" for letter in text)

    def number(width: int) -> int:
        taken = "".join(islice(bits, width))
        if len(taken) < width:
            raise broken
        return int(taken[::-1], 2)

    words, pieces = ["", "", ""], [""]
    while (code := number(len(words).bit_length())) != 2:
        if code < 2:
            words.append(chr(number(8 if code == 0 else 16)))
            code = len(words) - 1
        if code > len(words) or (code == len(words) and not pieces[-1]):
            raise broken
        word = words[code] if code < len(words) else pieces[-1] + pieces[-1][0]
        if pieces[-1]:
            words.append(pieces[-1] + word[0])
        pieces.append(word)
    return "".join(pieces)
