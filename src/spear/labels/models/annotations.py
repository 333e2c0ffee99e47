"""A detector and a segmenter that read annotations from COCO's JSON or Ego-Exo4D's relations.

If the file lacks an image, or the mask of an object, a second model can label it.
"""

import contextlib
import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from spear.errors import SpearError, format_count, notice
from spear.labels.fit.image import (
    clip_boxes,
    compute_elementwise_iou_2d,
    compute_tight_box,
    have_same_aspect,
    resize_nearest,
)
from spear.labels.fit.masks import decode_coco_run_length_string, decode_mask, rasterize_polygons
from spear.labels.models.protocols import Detection, Detector, Segmenter
from spear.types import Array, Frame
from spear.util.files import read_json
from spear.util.json_text import MAX_ANNOTATIONS_BYTES

MIN_MATCH_IOU = 0.5  # a detection gets an annotation's mask only if their boxes overlap more
MIN_MASK_INSIDE = 0.5  # an annotated box must contain at least this fraction of its mask
MIN_BOX_IOU = 0.25  # an annotated box must overlap the tight box of its mask at least this much
MAX_BOX_ERROR_PX = 2.0
"""An annotated box that differs by at most this from the tight box of its mask always passes. The
fractions above would be too strict for very small objects."""
MAX_NAMED_ENTRIES = 3  # a notice names at most this many unusable entries, and counts the others

_ENTRY_ERRORS = (LookupError, TypeError, ValueError, AttributeError, OverflowError)
"""The errors that reading a malformed entry of a file raises."""

OutlineDecoder = Callable[[int, int], Array]
"""(height, width) → mask [height, width] bool."""


@dataclass(frozen=True)
class Annotation:
    """One annotated object.

    The image that is labeled may be a resized version of the image that was annotated.

    Attributes:
        name: What the object is, in words.
        box2d: [4] x0, y0, x1, y1 in pixels of the annotated image; None for the tight box around
            the mask.
        size: (height, width) of the annotated image.
        decode_outline: Makes the object's mask; None if only a box was annotated.
        score: The annotator's confidence, 0 to 1.
    """

    name: str
    box2d: Array | None
    size: tuple[int, int]
    decode_outline: OutlineDecoder | None
    score: float = 1.0

    @property
    def has_outline(self) -> bool:
        """Whether the object's mask was annotated, and not only its box."""
        return self.decode_outline is not None

    def compute_box_in_image(self, height: int, width: int) -> Array:
        """The box [4] float32 in pixels of an image of this size, clipped to the image.

        The box consists of zeros if no box was annotated, and the mask is empty or absent.

        Raises:
            SpearError: The annotated image has another aspect, or the mask is broken.
        """
        if self.box2d is None:
            mask = self.compute_mask_in_image(height, width)
            return compute_tight_box(mask) if mask is not None else np.zeros(4, np.float32)
        rows, columns = self._get_annotated_size_if_aspect_fits(height, width)
        scale_x = width / columns
        scale_y = height / rows
        scale = np.array([scale_x, scale_y, scale_x, scale_y])
        box = self.box2d * scale
        return clip_boxes(box, height, width)

    def compute_mask_in_image(self, height: int, width: int) -> Array | None:
        """The mask [height, width] bool in an image of this size; None if only a box was annotated.

        Raises:
            SpearError: The annotated image has another aspect, or the mask is broken.
        """
        if self.decode_outline is None:
            return None
        rows, columns = self._get_annotated_size_if_aspect_fits(height, width)
        mask = self.decode_outline(rows, columns)
        return resize_nearest(mask, height, width)

    def check_box_fits_mask(self) -> None:
        """If both box and mask are annotated, check that the box fits the mask.

        The box may be larger than the mask, because some annotators include the hidden parts of an
        object in its box.

        Raises:
            SpearError: Most of the mask is outside the box, the box is much larger than the mask,
                or the file has the box as corners instead of x, y, width, height.
        """
        if self.box2d is None or self.decode_outline is None:
            return
        height, width = self.size
        try:
            mask = self.decode_outline(height, width)
        except SpearError:
            return  # the segmenter raises it when it uses the mask
        if not mask.any():
            return

        box = clip_boxes(self.box2d, height, width)
        mask_box = compute_tight_box(mask)
        if np.abs(box - mask_box).max() <= MAX_BOX_ERROR_PX:
            return
        x0, y0 = np.floor(box[:2]).astype(int)
        x1, y1 = np.ceil(box[2:]).astype(int)
        num_inside = np.count_nonzero(mask[y0:y1, x0:x1])
        fraction_inside = num_inside / np.count_nonzero(mask)
        # If the file has x1, y1 in place of width and height, the box that was read from it is
        # x1 wide and y1 high, where x1 and y1 are those of the mask.
        extent = self.box2d[2:] - self.box2d[:2]
        has_corners = np.abs(extent - mask_box[2:]).max() <= MAX_BOX_ERROR_PX
        overlap = compute_elementwise_iou_2d(box, mask_box)
        if has_corners or fraction_inside < MIN_MASK_INSIDE or overlap < MIN_BOX_IOU:
            raise SpearError(
                f"the box {_format_box(self.box2d)} of {self.name!r} contradicts its mask, which "
                f"is in {_format_box(mask_box)} (x0, y0, x1, y1). Correct the file (COCO's boxes "
                "are x, y, width, height), or leave the image out."
            )

    def _get_annotated_size_if_aspect_fits(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) of the annotated image.

        Raises:
            SpearError: An image of size `height` × `width` has another aspect.
        """
        rows, columns = self.size
        if not have_same_aspect((height, width), self.size):
            raise SpearError(
                f"{self.name!r} is annotated in an image of {columns}×{rows}, this one is "
                f"{width}×{height}. Give the image itself, at most resized."
            )
        return rows, columns


def _format_box(box: Array) -> str:
    return "[" + ", ".join(f"{value:g}" for value in box) + "]"


FindAnnotations = Callable[[str], list[Annotation] | None]
"""Source of an image (`Frame.source`) → the image's annotations; None if the file lacks the image.
It raises `SpearError` if the source fits several images of the file."""


@dataclass(frozen=True)
class Annotations:
    """A file of annotations.

    Attributes:
        name: The file's name, for the label's provenance.
        find: Finds the annotations of an image.
    """

    name: str
    find: FindAnnotations

    def find_in_frame(self, frame: Frame) -> list[Annotation] | None:
        """Find the annotations of an image; None if the file lacks the image.

        Raises:
            SpearError: The image's EXIF data turn it, so it is unknown whether annotations are for
                the stored or for the turned image.
        """
        annotations = self.find(frame.source)
        if annotations and frame.is_turned:
            # The advice: turn the pixels as they were annotated, and store them without the tag.
            raise SpearError(
                f"EXIF turns {frame.source}, so {self.name} may mean it as it is stored or as it "
                "is seen. Remove that tag, from pixels as annotated."
            )
        return annotations


class FileDetector:
    """Reads boxes and names from a file of annotations.

    Args:
        annotations: The file.
        second_detector: Detector for images that the file lacks. Without it, such images raise
            `SpearError`.
    """

    def __init__(self, annotations: Annotations, second_detector: Detector | None = None) -> None:
        self.annotations = annotations
        self.second_detector = second_detector
        self.name = _name_combined_model(annotations, second_detector)
        # Only a detector that costs money has the method `describe_costs_so_far`.
        self._describe_costs_so_far: Callable[[], str] | None = getattr(
            second_detector, "describe_costs_so_far", None
        )

    def describe_costs_so_far(self) -> str:
        """What the second detector has cost, in words; "" if it costs nothing."""
        return "" if self._describe_costs_so_far is None else self._describe_costs_so_far()

    def detect(self, frames: Sequence[Frame]) -> list[list[Detection]]:
        """Return the annotated objects of each image, in the file's order.

        Objects with an empty box are left out.
        """
        annotations_of_frames = [self.annotations.find_in_frame(frame) for frame in frames]
        unknown_frames = []
        for frame, annotations in zip(frames, annotations_of_frames, strict=True):
            if annotations is None:
                unknown_frames.append(frame)

        # Detect objects in the images that the file lacks.
        second_results: Iterator[list[Detection]] = iter(())
        if unknown_frames:
            if self.second_detector is None:
                raise SpearError(
                    f"{unknown_frames[0].source} is not in {self.annotations.name}. Name images "
                    "as that file does, or add a detector for the others."
                )
            second_results = iter(self.second_detector.detect(unknown_frames))

        # Combine both in the order of the images.
        detections = []
        for frame, annotations in zip(frames, annotations_of_frames, strict=True):
            if annotations is None:
                detections.append(next(second_results))
            else:
                detections.append(_to_nonempty_detections(annotations, frame))
        return detections


def _to_nonempty_detections(annotations: Sequence[Annotation], frame: Frame) -> list[Detection]:
    """Convert a frame's annotations to detections, without those whose box is empty."""
    height, width = frame.image.shape[:2]
    detections = []
    for annotation in annotations:
        annotation.check_box_fits_mask()
        box = annotation.compute_box_in_image(height, width)
        if box[2] > box[0] and box[3] > box[1]:
            detections.append(Detection(annotation.name, box, annotation.score))
    return detections


class FileSegmenter:
    """Reads masks from a file of annotations, for the detections of any detector.

    A detection gets the mask of the annotated object whose box overlaps the detection's box most,
    if their IoU is above `MIN_MATCH_IOU`. Objects with the detection's name take precedence. Each
    object's mask is used once.

    Args:
        annotations: The file.
        second_segmenter: Segmenter for detections without an annotated mask. Without it, such
            detections raise `SpearError`.
    """

    def __init__(self, annotations: Annotations, second_segmenter: Segmenter | None = None) -> None:
        self.annotations = annotations
        self.second_segmenter = second_segmenter
        self.name = _name_combined_model(annotations, second_segmenter)

    def segment(
        self, frames: Sequence[Frame], detections: Sequence[Sequence[Detection]]
    ) -> list[Array]:
        """Return the masks [n, h, w] bool of the n detections of each frame."""
        masks_of_frames = []
        incomplete_images: list[_IncompleteMasks] = []
        for frame, frame_detections in zip(frames, detections, strict=True):
            masks, missing_indices = self._read_masks_and_missing_indices(frame, frame_detections)
            masks_of_frames.append(masks)
            if missing_indices:
                missing_detections = [frame_detections[i] for i in missing_indices]
                incomplete_images.append(
                    _IncompleteMasks(frame, masks, missing_indices, missing_detections)
                )
        if incomplete_images:
            self._complete_masks(incomplete_images)  # changes arrays in `masks_of_frames`
        return masks_of_frames

    def _complete_masks(self, incomplete_images: Sequence["_IncompleteMasks"]) -> None:
        """Fill in the missing masks of images, in place, with the second segmenter."""
        if self.second_segmenter is None:
            first = incomplete_images[0]
            raise SpearError(
                f"{self.annotations.name} has no mask of {first.missing_detections[0].name!r} in "
                f"{first.frame.source}. Add a segmenter for objects without one."
            )
        second_masks = self.second_segmenter.segment(
            [incomplete.frame for incomplete in incomplete_images],
            [incomplete.missing_detections for incomplete in incomplete_images],
        )
        for incomplete, masks in zip(incomplete_images, second_masks, strict=True):
            incomplete.masks[incomplete.missing_indices] = masks

    def _read_masks_and_missing_indices(
        self, frame: Frame, detections: Sequence[Detection]
    ) -> tuple[Array, list[int]]:
        """Read the masks of a frame's n detections from the file.

        Returns:
            The masks [n, h, w] bool, and the indices of the detections without an annotated mask,
            whose masks are empty.
        """
        height, width = frame.image.shape[:2]
        masks = np.zeros((len(detections), height, width), bool)
        annotations = []
        for annotation in self.annotations.find_in_frame(frame) or ():
            if annotation.has_outline:
                annotations.append(annotation)
        matches = _match_by_name_then_overlap(detections, annotations, height, width)
        for detection_index, annotation_index in matches.items():
            annotation = annotations[annotation_index]
            annotation.check_box_fits_mask()
            masks[detection_index] = annotation.compute_mask_in_image(height, width)
        missing_indices = [i for i in range(len(detections)) if i not in matches]
        return masks, missing_indices


class _IncompleteMasks(NamedTuple):
    """The masks of an image's detections, of which the file lacks some.

    Attributes:
        frame: The image.
        masks: [n, h, w] bool, the masks of all its n detections.
        missing_indices: The indices of the detections whose masks are missing.
        missing_detections: The detections with these indices.
    """

    frame: Frame
    masks: Array
    missing_indices: list[int]
    missing_detections: list[Detection]


def _match_by_name_then_overlap(
    detections: Sequence[Detection], annotations: Sequence[Annotation], height: int, width: int
) -> dict[int, int]:
    """Decide which detection gets the mask of which annotation.

    Args:
        detections: The detections of an image.
        annotations: The image's annotations that have a mask.
        height: Height of the image.
        width: Width of the image.

    Returns:
        Index of a detection → index of its annotation, for the detections that get a mask.
    """
    boxes = [annotation.compute_box_in_image(height, width) for annotation in annotations]
    candidates = []
    for i, detection in enumerate(detections):
        for j, box in enumerate(boxes):
            overlap = float(compute_elementwise_iou_2d(detection.box2d, box))
            if overlap > MIN_MATCH_IOU:
                has_other_name = annotations[j].name != detection.name
                candidates.append((has_other_name, -overlap, i, j))

    # Pairs with equal names come first, then pairs with larger overlaps.
    matches: dict[int, int] = {}
    for _, _, i, j in sorted(candidates):
        if i not in matches and j not in matches.values():
            matches[i] = j
    return matches


def _name_combined_model(
    annotations: Annotations, second_model: Detector | Segmenter | None
) -> str:
    if second_model is None:
        return annotations.name
    return f"{annotations.name}, otherwise {second_model.name}"


def load_annotations(path: str | Path) -> Annotations:
    """Load a file of COCO annotations or of Ego-Exo4D's relations.

    A COCO file has the key "images"; other files are read as relations.

    Raises:
        SpearError: The file is of neither kind.
    """
    content = read_json(Path(path), "give another file", MAX_ANNOTATIONS_BYTES)
    file = f"{Path(path).name} ({hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]})"
    try:
        if "images" in content:
            return Annotations(f"coco {file}", _CocoIndex(content, file).find)
        return Annotations(f"ego-exo4d relations {file}", _RelationsIndex(content).find)
    except _ENTRY_ERRORS as error:
        raise SpearError(
            f"{path} is neither COCO's JSON of instances nor Ego-Exo4D's relations "
            f"({type(error).__name__}, {error}). Give one of the two."
        ) from error


def _split_path(path: str) -> list[str]:
    """Split a path into its folders and its file, at slashes, backslashes and "#"."""
    return [name for name in re.split(r"[\\/#]+", path) if name not in ("", ".")]


class _CocoIndex:
    """The objects in a COCO JSON file, by image.

    The file lists images, categories and annotations; each is called an entry. A source belongs to
    the image entry whose `file_name` ends in the same folders and file as the source.

    A crowd (`iscrowd`) is no single object. It becomes two placeholders
    (`_replace_crowd_by_placeholders`). Annotations without a box get the tight box of their mask. A
    mask that cannot be decoded raises `SpearError` only when it is used.

    If an entry cannot be used, a notice names it, and `find` raises `SpearError` for its image. The
    other images can be used.
    """

    def __init__(self, content: Mapping[str, Any], file: str) -> None:
        self.file = file
        # Name of the image file → (folders and name of the file, image id) of all such images
        self._images_by_name: dict[str, list[tuple[list[str], Any]]] = defaultdict(list)
        self._file_names: dict[Any, str] = {}  # image id → its `file_name`
        self._sizes: dict[Any, tuple[int, int]] = {}  # image id → (height, width)
        self._annotations: dict[Any, list[Annotation]] = {}  # image id → its annotations
        self._problems: dict[Any, str] = {}  # image id → why the image cannot be used
        self._sources: dict[Any, str] = {}  # image id → the source for which it was found

        names = _read_category_names(content["categories"])
        stray_problems = []  # why entries that belong to no image cannot be used
        for index, entry in enumerate(_validate_list(content["images"])):
            try:
                self._add_image(entry)
            except _ENTRY_ERRORS as error:
                stray_problems.append(f"{_name_entry('image', entry, index)} {_explain(error)}")
        if stray_problems and not self._annotations:  # no image entry can be used
            raise ValueError(stray_problems[0])
        for index, entry in enumerate(_validate_list(content["annotations"])):
            entry_name = _name_entry("annotation", entry, index)
            try:
                image_id = self._resolve_annotated_image_id(entry)
            except _ENTRY_ERRORS as error:
                stray_problems.append(f"{entry_name} {_explain(error)}")
                continue
            self._add_annotation(image_id, entry, entry_name, names)
        self._give_notice_of_problems(stray_problems)

    def _add_image(self, entry: Mapping[str, Any]) -> None:
        """Add an image entry, or note why the image cannot be used."""
        path = _split_path(entry["file_name"])
        name = path[-1]
        image_id = entry["id"]
        self._annotations[image_id] = []
        self._images_by_name[name].append((path, image_id))
        self._file_names[image_id] = entry["file_name"]

        # Annotations are in pixels of this size. The image to label may be a smaller copy.
        height = entry.get("height")
        width = entry.get("width")
        if _can_be_image_side(height) and _can_be_image_side(width):
            self._sizes[image_id] = (int(height), int(width))
            return
        self._problems[image_id] = (
            f"{entry['file_name']} has height {height} and width {width}, which is no size"
        )

    def _resolve_annotated_image_id(self, entry: Mapping[str, Any]) -> Any:
        """The id of the image that an annotation belongs to."""
        image_id = entry["image_id"]
        if image_id not in self._annotations:
            raise _OddEntryError(f"belongs to image {image_id}, which the file does not list")
        return image_id

    def _add_annotation(
        self, image_id: Any, entry: Mapping[str, Any], entry_name: str, names: Mapping[Any, str]
    ) -> None:
        """Add an annotation to its image, or note why the image cannot be used.

        Args:
            image_id: The image's id.
            entry: The annotation's entry.
            entry_name: What messages call the entry.
            names: The names of the categories, by id.
        """
        if image_id in self._problems:
            return
        try:
            annotation = _read_coco_annotation(entry, names, self._sizes[image_id])
        except _ENTRY_ERRORS as error:
            file_name = self._file_names[image_id]
            self._problems[image_id] = f"{entry_name} of {file_name} {_explain(error)}"
            return
        if entry.get("iscrowd"):
            self._annotations[image_id] += _replace_crowd_by_placeholders(annotation)
        else:
            self._annotations[image_id].append(annotation)

    def _give_notice_of_problems(self, stray_problems: Sequence[str]) -> None:
        """Give a notice of the entries that cannot be used, with the first ones' names."""
        problems = [*self._problems.values(), *stray_problems]
        if not problems:
            return
        examples = "; ".join(problems[:MAX_NAMED_ENTRIES])
        if len(problems) > MAX_NAMED_ENTRIES:
            examples += "; …"
        notice(
            f"{format_count(len(problems), 'records')} of coco {self.file} cannot be used "
            f"({examples}). Correct the file; until then "
            f"{format_count(len(self._problems), 'images')} in it will be skipped."
        )

    def find(self, source: str) -> list[Annotation] | None:
        """Find the annotations of the image with this source; None if the file lacks the image.

        Raises:
            SpearError: The source fits several images, an earlier source fits the same image, or an
                entry of the image cannot be used.
        """
        path = _split_path(source)
        if not path:
            return None

        # Images whose path ends as the source does, or the other way round. The image with the
        # longest common ending fits best.
        common_lengths = {}
        for image_path, image_id in self._images_by_name.get(path[-1], ()):
            length = min(len(path), len(image_path))
            if path[-length:] == image_path[-length:]:
                common_lengths[image_id] = length
        max_length = max(common_lengths.values(), default=0)
        best_ids = [image_id for image_id, length in common_lengths.items() if length == max_length]
        if not best_ids:
            return None
        if len(best_ids) > 1:
            raise SpearError(
                f"{source} fits {len(best_ids)} images of coco {self.file}. Name its folder too."
            )
        best_id = best_ids[0]
        earlier_source = self._sources.setdefault(best_id, source)
        if earlier_source != source:
            raise SpearError(
                f"{earlier_source} and {source} fit the same image of coco {self.file}. Name the "
                "folder too."
            )
        if best_id in self._problems:
            raise SpearError(
                f"In coco {self.file}, {self._problems[best_id]}. Correct the file, or leave "
                f"{source} out."
            )
        return self._annotations[best_id]


def _can_be_image_side(value: Any) -> TypeGuard[float]:
    """Whether a value can be the height or width of an image."""
    return isinstance(value, int | float) and 1 <= value < math.inf


def _validate_list(value: Any) -> list[Any]:
    """Return a value that must be a list; otherwise raise `TypeError`."""
    if not isinstance(value, list):
        raise TypeError(f"{type(value).__name__} instead of a list")
    return value


def _read_category_names(entries: Any) -> dict[Any, str]:
    """Read the names of the categories, by id. Entries that cannot be used are left out."""
    names = {}
    for entry in _validate_list(entries):
        with contextlib.suppress(*_ENTRY_ERRORS):
            names[entry["id"]] = str(entry["name"])
    return names


def _name_entry(kind: str, entry: Any, index: int) -> str:
    """What messages call entry number `index` of a list: its id, or its number if it has no id."""
    if isinstance(entry, Mapping) and "id" in entry:
        return f"{kind} {entry['id']}"
    return f"{kind} number {index + 1}"


class _OddEntryError(ValueError):
    """A wrong entry of a file. The message ends a sentence that begins with the entry's name."""


def _explain(error: Exception) -> str:
    """Why an entry cannot be used, as the end of a sentence that begins with the entry's name."""
    if isinstance(error, KeyError):
        return f"has no {error}"
    if isinstance(error, _OddEntryError):
        return str(error)
    return f"cannot be read ({type(error).__name__}, {error})"


def _replace_crowd_by_placeholders(crowd: Annotation) -> list[Annotation]:
    """Make two objects with empty masks that stand for an annotated crowd.

    Questions about "the person" and counts of persons would be wrong in an image with a crowd of
    persons. The two placeholders, "person" and "persons", prevent such questions, because no
    question is about an object whose name may also mean another object of the image.
    """
    height, width = crowd.size
    box = crowd.box2d
    if box is None:
        box = np.array([0, 0, width, height], np.float64)
    placeholder = replace(crowd, decode_outline=_make_empty_mask, box2d=box)
    return [placeholder, replace(placeholder, name=f"{crowd.name}s")]


def _make_empty_mask(height: int, width: int) -> Array:
    return np.zeros((height, width), bool)


def _read_coco_annotation(
    entry: Mapping[str, Any], names: Mapping[Any, str], size: tuple[int, int]
) -> Annotation:
    """Read an annotation.

    Args:
        entry: The annotation's entry.
        names: The names of the categories, by id.
        size: (height, width) of the annotated image.

    Raises:
        _ENTRY_ERRORS: The annotation cannot be used.
    """
    category = entry["category_id"]
    if category not in names:
        raise _OddEntryError(f"has category {category}, which the file does not define")
    decode_outline = None
    if entry.get("segmentation"):
        decode_outline = _make_outline_decoder(entry["segmentation"])
    box = None
    if entry.get("bbox") not in (None, []):
        box = _read_coco_box(entry["bbox"])
    elif decode_outline is None:
        raise _OddEntryError("has neither a box nor a mask")
    return Annotation(names[category], box, size, decode_outline, _read_coco_score(entry))


def _read_coco_box(values: Any) -> Array:
    """Convert a COCO `bbox` (x, y, width, height) to a box [4] x0, y0, x1, y1."""
    box = np.asarray(values, np.float64)
    if box.shape != (4,) or not np.isfinite(box).all():
        raise _OddEntryError(f"has the box {values}, which is not x, y, width, height")
    if min(box[2:]) <= 0:
        raise _OddEntryError(f"has the box {values}, whose width or height is not positive")
    corner = box[:2]
    size = box[2:]
    return np.concatenate([corner, corner + size])


def _read_coco_score(entry: Mapping[str, Any]) -> float:
    """The score of an annotation; 1 if it has none."""
    if entry.get("score") is None:
        return 1.0
    score = float(entry["score"])
    if not np.isfinite(score):
        raise _OddEntryError(f"has the score {score}")
    return score


def _make_outline_decoder(segmentation: Any) -> OutlineDecoder:
    """Make the decoder of a COCO `segmentation`: a list of polygons, or run lengths with a size."""
    if isinstance(segmentation, list):
        return partial(_fill_coco_polygons, segmentation)
    return partial(_decode_coco_runs, segmentation["counts"], tuple(segmentation["size"]))


def _fill_coco_polygons(polygons: list[Any], height: int, width: int) -> Array:
    try:
        return rasterize_polygons(polygons, height, width)
    except (TypeError, ValueError) as error:
        raise SpearError(
            f"the polygons of a mask cannot be read ({error}). Repair the file."
        ) from error


def _decode_coco_runs(
    counts: str | list[int], annotated_size: tuple[int, int], height: int, width: int
) -> Array:
    """Decode run lengths of a mask of (height, width) `annotated_size`.

    This must be the size of the image.
    """
    if annotated_size != (height, width):
        actual_size = "×".join(str(side) for side in reversed(annotated_size))
        raise SpearError(
            f"a mask has {actual_size} pixels in an image of {width}×{height}. Repair the file."
        )
    try:
        runs = decode_coco_run_length_string(counts) if isinstance(counts, str) else counts
        return decode_mask(runs, height, width)
    except (TypeError, ValueError) as error:
        raise SpearError(
            f"the run lengths of a mask cannot be read ({error}). Repair the file."
        ) from error


class _RelationsIndex:
    """The objects in `relations_train.json` or `relations_val.json` of Ego-Exo4D.

    They are found by take (a recording), camera and number of the frame. The source of an image
    must contain these in this order: the take's name or uid, the camera (`aria01_214-1`, `cam04`),
    and at its end the number of the frame in the frame-aligned video. Two examples:

        takes/sfu_cooking_008_3/frame_aligned_videos/cam04.mp4#270
        <take uid>/cam04/270.jpg

    The object `stainless bowl_0` gets the name `stainless bowl`. A frame that annotators saw
    without finding an object has an empty list of annotations. Images may be smaller than the
    video; masks are resized to them. A mask that cannot be decoded raises `SpearError` only when it
    is used.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        # Name or uid of the take → camera → number of the frame → annotations
        self._takes: dict[str, dict[str, dict[int, list[Annotation]]]] = {}
        for uid, take in content.get("annotations", content).items():
            cameras: dict[str, dict[int, list[Annotation]]] = defaultdict(dict)
            self._takes[uid] = cameras
            self._takes[str(take["take_name"])] = cameras
            for object_name, views in take["object_masks"].items():
                name = re.sub(r"_\d+$", "", object_name)  # without the object's number
                for camera, view in views.items():
                    _add_object_masks_of_view(cameras[camera], name, view)
        if not self._takes:
            raise ValueError("it is empty")

    def find(self, source: str) -> list[Annotation] | None:
        """Find the annotations of the frame with this source; None if the file lacks it."""
        suffix = r"\.(mp4|jpe?g|png|webp)$"
        path = [re.sub(suffix, "", name, flags=re.IGNORECASE) for name in _split_path(source)]
        take_indices = [index for index, name in enumerate(path) if name in self._takes]
        if not take_indices:
            return None
        take_index = take_indices[-1]
        cameras = self._takes[path[take_index]]
        folders_in_take = path[take_index + 1 : -1]
        camera = next((name for name in folders_in_take if name in cameras), None)
        number = re.search(r"\d+$", path[-1])
        if camera is None or number is None:
            return None
        return cameras[camera].get(int(number.group()))


def _add_object_masks_of_view(
    annotations_by_frame: dict[int, list[Annotation]], object_name: str, view: Mapping[str, Any]
) -> None:
    """Add the masks of one object in one camera's video to the annotations of the video's frames.

    Args:
        annotations_by_frame: Number of the frame → annotations; the masks are added to them.
        object_name: The object's name.
        view: The object's masks in the video, by number of the frame, and the numbers of all
            annotated frames.
    """
    for number in view.get("annotated_frames", ()):
        annotations_by_frame.setdefault(int(number), [])
    for number, entry in view["annotation"].items():
        size = (int(entry["height"]), int(entry["width"]))
        decode_outline = partial(_decode_relations_mask, entry["encodedMask"])
        annotation = Annotation(object_name, None, size, decode_outline)
        annotations_by_frame.setdefault(int(number), []).append(annotation)


def _decode_relations_mask(encoded: str, height: int, width: int) -> Array:
    runs = decode_coco_run_length_string(decompress_lz_string(encoded))
    return decode_mask(runs, height, width)


# lz-string's letters for the numbers 0 to 64, and the numbers in its streams with special meanings
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+-$"
_VALUES = {letter: value for value, letter in enumerate(_LETTERS)}
_NEW_8_BIT_LETTER = 0
_NEW_16_BIT_LETTER = 1
_END = 2


def decompress_lz_string(text: str) -> str:
    """Undo lz-string's `compressToEncodedURIComponent`, the encoding of Ego-Exo4D's run lengths.

    Each letter stands for six bits, highest first. Together they are a stream of bits. The stream
    consists of numbers, each written lowest bit first. A number is an index into a dictionary of
    words, and the text is the sequence of these words. After each word, the dictionary gets a new
    entry: the previous word with the first letter of the current word appended. A number has as
    many bits as the next free index of the dictionary. Three numbers are no indices: 0 and 1
    announce a new word of one letter, which follows in 8 or 16 bits, and 2 ends the text.

    Raises:
        SpearError: The text is not such a stream, or a truncated one.
    """
    if not set(text) <= _VALUES.keys():
        raise _make_broken_lz_string_error()
    bits = chain.from_iterable(f"{_VALUES[letter]:06b}" for letter in text)
    words = ["", "", ""]  # indices 0, 1 and 2 are no words
    output = [""]  # the words of the text, after an empty one that stands for "no previous word"
    while (code := _read_number(bits, len(words).bit_length())) != _END:
        if code in (_NEW_8_BIT_LETTER, _NEW_16_BIT_LETTER):
            num_bits = 8 if code == _NEW_8_BIT_LETTER else 16
            words.append(chr(_read_number(bits, num_bits)))
            code = len(words) - 1
        previous_word = output[-1]
        if code > len(words) or (code == len(words) and not previous_word):
            raise _make_broken_lz_string_error()
        # The next free index is the entry that is added after this word. Because this word is that
        # entry, it is the previous word with the previous word's own first letter appended.
        word = words[code] if code < len(words) else previous_word + previous_word[0]
        if previous_word:
            words.append(previous_word + word[0])
        output.append(word)
    return "".join(output)


def _read_number(bits: Iterator[str], num_bits: int) -> int:
    """Read the next number from a stream of bits ("0" or "1"), lowest bit first."""
    digits = "".join(islice(bits, num_bits))
    if len(digits) < num_bits:
        raise _make_broken_lz_string_error()
    return int(digits[::-1], 2)


def _make_broken_lz_string_error() -> SpearError:
    return SpearError("An Ego-Exo4D mask is not an lz-string. Use the file as it was published.")
