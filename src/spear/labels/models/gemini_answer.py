"""What Gemini is asked, and how its answer is read."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from spear.errors import SpearError
from spear.labels.fit.boxes2d import iou2d
from spear.labels.models.protocols import Detection

PROMPT = (
    "Detect the distinct physical objects in this image that one could point at, pick up or use: tools, food, "
    "containers, appliances, furniture, parts of a machine, hands and people. Leave out walls, floors, shadows, "
    "reflections and printed pictures. List every instance on its own, at most 40, the most prominent first. The "
    "box is tight around the visible part. The label is a short lower-case noun phrase that names the object; where "
    "several of a kind are visible and a colour, material or use tells them apart, say it in the label."
)
"""The wording is our choice."""
VOCABULARY = " Detect only objects of these kinds, and label each with exactly one of these names: {names}."
SCHEMA: dict[str, Any] = {
    "type": "ARRAY",
    "items": {
        "type": "OBJECT",
        "properties": {
            "box_2d": {"type": "ARRAY", "items": {"type": "INTEGER"}, "minItems": 4, "maxItems": 4},
            "label": {"type": "STRING"},
        },
        "required": ["box_2d", "label"],
    },
}


class Unusable(ValueError):
    """An answer that is not what was asked for."""


def parse(text: str, height: int, width: int) -> list[Detection]:
    """Gemini's answer, boxes [ymin, xmin, ymax, xmax] in thousandths of the image, to detections in pixels.

    Boxes are cut at the edge of the image; those of less than a pixel inside it are left out, and so is a box
    that was given before (same label, IoU above 0.9).

    Raises:
        Unusable: the text is not what the schema says.
    """
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"not JSON ({error})") from error
    if not isinstance(items, list):
        raise Unusable(f"a {type(items).__name__}, not a list")
    found: list[Detection] = []
    for item in items:
        box, label = _item(item)
        y0, x0, y1, x1 = (
            np.clip(v / 1000, 0, 1) * side for v, side in zip(box, (height, width) * 2, strict=True)
        )
        pixels = np.array([x0, y0, x1, y1], np.float32)
        again = any(d.name == label and float(iou2d(d.box2d, pixels)) > 0.9 for d in found)
        if label and min(x1 - x0, y1 - y0) >= 1 and not again:
            found.append(Detection(label, pixels))
    return found


def _item(item: Any) -> tuple[list[float], str]:
    if not isinstance(item, dict) or not isinstance(item.get("label"), str):
        raise Unusable("an object without a label")
    box = item.get("box_2d")
    numbers = isinstance(box, list) and all(isinstance(v, int | float) and abs(v) < 1e9 for v in box)
    if not isinstance(box, list) or not numbers or len(box) != 4:
        raise Unusable(f"box_2d of {item['label']!r} is not four numbers")
    return box, " ".join(item["label"].encode(errors="ignore").decode().lower().split())


def answer_text(response: Any, where: str) -> str:
    """The answer's text.

    Raises:
        SpearError: Gemini refused to answer.
        Unusable: the answer is cut off or empty.
    """
    feedback = response.prompt_feedback
    if feedback is not None and feedback.block_reason:
        raise SpearError(f"{where}: Gemini blocked the image ({_value(feedback.block_reason)}): leave it out")
    candidate = response.candidates[0] if response.candidates else None
    end = "" if candidate is None else _value(candidate.finish_reason)
    if end not in ("STOP", "MAX_TOKENS", ""):
        raise SpearError(f"{where}: Gemini refused to answer ({end}): leave the image out")
    parts = candidate.content.parts if candidate is not None and candidate.content is not None else None
    text = "".join(part.text for part in parts or () if part.text and not part.thought)
    if end == "MAX_TOKENS":
        raise Unusable("cut off at the limit of tokens")
    if not text:
        raise Unusable("empty")
    return text


def _value(enum: Any) -> str:
    return str(getattr(enum, "value", enum) or "")
