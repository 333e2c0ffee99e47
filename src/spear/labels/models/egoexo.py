"""Ego-Exo4D's relations: people's masks of the objects in use, seen by the wearer's camera and by others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spear.errors import SpearError
from spear.labels.fit import rle
from spear.labels.models.annotations import Annotation, load_json, path_parts
from spear.types import Array


class RelationAnnotations:
    """The objects in `relations_train.json` or `relations_val.json`, by take, camera and frame.

    The source of an image names the take (its name or its uid), then the camera (`aria01_214-1`, `cam04`),
    and ends in the number of the frame in the frame-aligned video, in any spelling of a path:
    `takes/sfu_cooking_008_3/frame_aligned_videos/cam04.mp4#270` or `<take uid>/cam04/270.jpg`.

    The object `stainless bowl_0` is named `stainless bowl`. A frame that was annotated without finding any
    object is known, and empty. Images may be smaller than the video was: masks are resized to them.

    Raises:
        SpearError: no such file, or not relations; from masks, one that cannot be decoded.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        content, self.name = load_json(self.path, "ego-exo4d relations")
        self._takes: dict[str, dict[str, dict[int, list[Annotation]]]] = {}
        try:
            for uid, take in content.get("annotations", content).items():
                cameras = _cameras(take["object_masks"])
                self._takes[uid] = self._takes[str(take["take_name"])] = cameras
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SpearError(
                f"{self.path}: not Ego-Exo4D's relations ({type(error).__name__}: {error}): give "
                "relations_train.json or relations_val.json"
            ) from error

    def find(self, source: str) -> list[Annotation] | None:
        """See `from_files.Annotations`."""
        parts = [re.sub(r"\.(mp4|jpe?g|png|webp)$", "", part, flags=re.I) for part in path_parts(source)]
        take = max((i for i, part in enumerate(parts) if part in self._takes), default=None)
        if take is None:
            return None
        cameras = self._takes[parts[take]]
        camera = next((part for part in parts[take + 1 : -1] if part in cameras), None)
        number = re.search(r"\d+$", parts[-1])
        return None if camera is None or number is None else cameras[camera].get(int(number.group()))


def _cameras(masks: Mapping[str, Any]) -> dict[str, dict[int, list[Annotation]]]:
    """camera -> frame -> objects, from the `object_masks` of a take."""
    cameras: dict[str, dict[int, list[Annotation]]] = {}
    for thing, views in masks.items():
        name = re.sub(r"_\d+$", "", thing)
        for camera, view in views.items():
            frames = cameras.setdefault(camera, {})
            for number in view.get("annotated_frames", ()):
                frames.setdefault(int(number), [])
            for number, entry in view["annotation"].items():
                frames.setdefault(int(number), []).append(_annotation(name, entry))
    return cameras


def _annotation(name: str, entry: Mapping[str, Any]) -> Annotation:
    encoded = entry["encodedMask"]

    def outline(height: int, width: int) -> Array:
        return rle.decode(rle.from_string(decompress(encoded)), height, width)

    return Annotation(name, None, (int(entry["height"]), int(entry["width"])), outline)


_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+-$"
_VALUES = {letter: value for value, letter in enumerate(_LETTERS)}


def decompress(text: str) -> str:
    """Undo lz-string's `compressToEncodedURIComponent`, in which the compressed run lengths are written.

    The letters are a stream of bits, six each, highest first. The numbers in it are written lowest bit first
    and name words of a dictionary that grows by each word's first letter put after the word before; they are
    as wide as its next free place needs. Three have a meaning of their own: 0 and 1 bring a new letter of 8
    or 16 bits, 2 ends the text.

    Raises:
        SpearError: the text is not such a stream, or not all of it.
    """
    broken = SpearError("Ego-Exo4D mask: not an lz-string: give the file as it was published")
    if not set(text) <= _VALUES.keys():
        raise broken
    bits = [_VALUES[letter] >> i & 1 for letter in text for i in range(5, -1, -1)]
    position = 0

    def number(width: int) -> int:
        nonlocal position
        position += width
        if position > len(bits):
            raise broken
        return sum(bit << i for i, bit in enumerate(bits[position - width : position]))

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
