"""COCO's JSON of instances: boxes, polygons, and masks as run lengths, plain or compressed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spear.errors import SpearError
from spear.labels.fit import rle
from spear.labels.fit.polygons import fill
from spear.labels.models.annotations import Annotation, load_json, path_parts
from spear.types import Array


class CocoAnnotations:
    """The objects in a COCO JSON file, by image.

    An image belongs to the entry whose `file_name` ends as its source does, whole folder names compared.
    Annotations of crowds (`iscrowd`) are left out: they are no instances. Annotations without a box get the
    tight box of their mask.

    Raises:
        SpearError: no such file, or not COCO's JSON; from `find`, a source that fits several images; from
            masks, run lengths of the wrong size.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        content, self.name = load_json(self.path, "coco")
        self._by_file: dict[str, list[tuple[list[str], Any]]] = defaultdict(list)
        self._objects: dict[Any, list[Annotation]] = {}
        try:
            categories = {c["id"]: str(c["name"]) for c in content["categories"]}
            sizes = {}
            for image in content["images"]:
                parts = path_parts(image["file_name"])
                self._by_file[parts[-1]].append((parts, image["id"]))
                self._objects[image["id"]] = []
                if "height" in image and "width" in image:
                    sizes[image["id"]] = (int(image["height"]), int(image["width"]))
            for a in content["annotations"]:
                if not a.get("iscrowd"):
                    size = sizes.get(a["image_id"])
                    name = categories[a["category_id"]]
                    self._objects[a["image_id"]].append(_annotation(a, name, size))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise SpearError(
                f"{self.path}: not COCO's JSON of instances ({type(error).__name__}: {error}): give a file with "
                "images, annotations and categories"
            ) from error

    def find(self, source: str) -> list[Annotation] | None:
        """See `from_files.Annotations`."""
        asked = path_parts(source)
        common = {}
        for known, image in self._by_file.get(asked[-1], ()) if asked else ():
            length = min(len(asked), len(known))
            if asked[-length:] == known[-length:]:
                common[image] = length
        best = [image for image, length in common.items() if length == max(common.values())]
        if len(best) > 1:
            raise SpearError(f"{source}: fits {len(best)} images of {self.path}: name its folder too")
        return self._objects[best[0]] if best else None


def _annotation(a: Mapping[str, Any], name: str, size: tuple[int, int] | None) -> Annotation:
    outline = _outline(a["segmentation"]) if a.get("segmentation") else None
    box = None
    if "bbox" in a:
        x, y, w, h = (float(v) for v in a["bbox"])
        box = np.array([x, y, x + w, y + h])
    elif outline is None:
        raise ValueError(f"annotation {a.get('id')} has neither a box nor a mask")
    return Annotation(name, box, size, outline, float(a.get("score", 1.0)))


def _outline(segmentation: Any) -> Callable[[int, int], Array]:
    """(height, width) -> mask [height, width] of a COCO `segmentation`."""
    if isinstance(segmentation, list):
        return lambda height, width: fill(segmentation, height, width)
    counts, size = segmentation["counts"], tuple(segmentation["size"])

    def outline(height: int, width: int) -> Array:
        if size != (height, width):
            raise SpearError(f"mask of {size[1]}×{size[0]} in an image of {width}×{height}: repair the file")
        runs = rle.from_string(counts) if isinstance(counts, str) else counts
        return rle.decode(runs, height, width)

    return outline
