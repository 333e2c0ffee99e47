"""Grounding DINO and OWLv2: networks that find what is named to them.

The authors of the paper tried Grounding DINO and found its labels clearly worse than Gemini's; it needs no
key. Both networks are Transformers'. Thresholds and the suppression of boxes on one object are our choice.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import torch

from spear.errors import SpearError
from spear.labels.fit.image import clip_boxes, suppress_overlaps
from spear.labels.models.pretrained import explain_full_memory, load_model, load_processor
from spear.labels.models.protocols import Detection
from spear.types import Array, Frame


class _OpenVocabulary:
    """What both share: a network that finds the objects of a vocabulary.

    model: name on the Hub, or folder. Raises `SpearError`: an empty vocabulary, a name too long for a prompt,
    or no such model.
    """

    kind: str
    """The network's `model_type` in Transformers."""
    prompt: str
    """What it is told for a name; with `end` where several are told at once."""
    end = ""
    threshold: float
    """Lowest score of a detection."""
    overlap = 0.7
    """Of two boxes with a higher IoU the better stays."""

    def __init__(self, model: str, *, vocabulary: Sequence[str], device: str = "auto") -> None:
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

        self._names = names = _names(vocabulary, self.kind)
        self._processor = load_processor(AutoProcessor, self.kind, model)
        self._network = load_model(AutoModelForZeroShotObjectDetection, self.kind, model, device)
        told = hashlib.sha256(", ".join(map(self.prompt.format, names)).encode()).hexdigest()[:8]
        for name in names:
            if not self._fits(self.prompt.format(name) + self.end):
                raise SpearError(f"{self.kind}: {name[:40]!r} is too long: give a few words")
        settings = f"threshold {self.threshold:g}, overlap {self.overlap:g}"
        self.name = f"{self.kind} {model} ({len(names)} names {told}, {settings})"

    def _fits(self, prompt: str) -> bool:
        config = self._network.config  # Grounding DINO's text network takes more tokens than itself
        most = getattr(config, "max_text_len", None) or config.text_config.max_position_embeddings
        return len(self._processor.tokenizer(prompt)["input_ids"]) <= most

    def _ask(self, images: Sequence[Array], prompts: Any, **options: Any) -> tuple[Any, Any]:
        """What the network is given about images and what is told with each, and what it says."""
        inputs = self._processor(images=images, text=prompts, return_tensors="pt", **options)
        inputs = inputs.to(self._network.device, self._network.dtype)
        with torch.inference_mode(), explain_full_memory(len(images)):
            return inputs, self._network(**inputs)


class GroundingDinoDetector(_OpenVocabulary):
    """Finds the objects of a vocabulary. An object has the name whose best token fits it best; a vocabulary
    too long for a prompt is asked in several."""

    kind, prompt, end, threshold = "grounding-dino", "{}", ".", 0.3

    def detect(self, frames: Sequence[Frame]) -> list[list[Detection]]:
        """The objects of each image, best first."""
        # Images of one size need no padding, so what is found in one does not depend on the others.
        sizes: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, frame in enumerate(frames):
            sizes[frame.image.shape].append(i)
        found: list[list[Detection]] = [[] for _ in frames]
        for (height, width, _), numbers in sizes.items():
            images = [frames[i].image for i in numbers]
            for prompt, names in self._prompts:
                inputs, outputs = self._ask(images, [prompt] * len(images))
                said = self._read(outputs, inputs["input_ids"][0].tolist(), (height, width), names)
                for i, detections in zip(numbers, said, strict=True):
                    found[i] += detections
            for i in numbers:
                found[i] = clean_detections(found[i], height, width, self.overlap)
        return found

    def _read(
        self, outputs: Any, tokens: Sequence[int], size: tuple[int, ...], names: Sequence[str]
    ) -> list[list[Detection]]:
        """Detections from logits [images, boxes, places], pred_boxes [images, boxes, 4] (centre and size,
        fractions of the image), and the prompt's tokens [places]."""
        fits = outputs.logits.float().sigmoid()
        best = torch.stack([fits[..., span].amax(dim=-1) for span in self._spans(tokens)], dim=-1)
        scores, chosen = best.max(dim=-1)
        middle, whole = outputs.pred_boxes.float().split(2, dim=-1)
        boxes = torch.cat([middle - whole / 2, middle + whole / 2], dim=-1)
        boxes = boxes * torch.tensor([size[1], size[0], size[1], size[0]], device=boxes.device)
        results = []
        for box, score, which in zip(boxes, scores, chosen, strict=True):
            keep = score > self.threshold
            results.append(
                _detections(box[keep], score[keep], [names[i] for i in which[keep].tolist()])
            )
        return results

    def _spans(self, tokens: Sequence[int]) -> list[list[int]]:
        """The places of each name's tokens in a prompt."""
        tokenizer = self._processor.tokenizer
        ends = {tokenizer.convert_tokens_to_ids("."), *tokenizer.all_special_ids} - {
            tokenizer.unk_token_id
        }
        runs = groupby(range(len(tokens)), lambda place: tokens[place] in ends)
        return [list(places) for end, places in runs if not end]

    @cached_property
    def _prompts(self) -> list[tuple[str, list[str]]]:
        """Prompts that are short enough, with the names in each."""
        prompts: list[tuple[str, list[str]]] = [("", [])]
        for name in self._names:
            prompt, others = prompts[-1]
            if self._fits(longer := f"{prompt} {name}.".strip()):
                prompts[-1] = longer, [*others, name]
            else:
                prompts.append((f"{name}.", [name]))
        return prompts


class Owlv2Detector(_OpenVocabulary):
    """Finds the objects of a vocabulary."""

    kind, prompt, threshold = "owlv2", "a photo of a {}", 0.2

    def detect(self, frames: Sequence[Frame]) -> list[list[Detection]]:
        """The objects of each image, best first."""
        images = [frame.image for frame in frames]
        prompts = [[self.prompt.format(name) for name in self._names]] * len(images)
        _, outputs = self._ask(images, prompts, padding="max_length")
        sizes, names = [image.shape[:2] for image in images], [self._names] * len(images)
        results = self._processor.post_process_grounded_object_detection(
            outputs, threshold=self.threshold, target_sizes=sizes, text_labels=names
        )
        found = [_detections(r["boxes"], r["scores"], r["text_labels"]) for r in results]
        return [
            clean_detections(d, h, w, self.overlap) for d, (h, w) in zip(found, sizes, strict=True)
        ]


def clean_detections(
    detections: Sequence[Detection], height: int, width: int, overlap: float
) -> list[Detection]:
    """Detections, best first, cut at the edge of the image; without those of less than a pixel, without a
    name, or on a better one (see `suppress`)."""
    if not detections:
        return []
    boxes = clip_boxes(np.stack([d.box2d for d in detections]), height, width)
    kept = suppress_overlaps(boxes, np.array([d.score for d in detections]), overlap)
    found = [replace(detections[i], box2d=boxes[i]) for i in kept.tolist()]
    return [d for d in found if d.name and (d.box2d[2:] - d.box2d[:2]).min() >= 1]


def _detections(boxes: torch.Tensor, scores: torch.Tensor, names: Sequence[str]) -> list[Detection]:
    rows = zip(names, boxes.float().cpu().numpy(), scores.tolist(), strict=True)
    return [Detection(name, box, float(score)) for name, box, score in rows]


def _names(vocabulary: Sequence[str], who: str) -> list[str]:
    """Each name once, in lower case, without the marks that end a name in a prompt."""
    if isinstance(vocabulary, str):
        raise SpearError(f"{who}: the vocabulary is one text: give a list of names")
    names = [
        " ".join(name.lower().replace(".", " ").replace("?", " ").split()) for name in vocabulary
    ]
    names = [name for name in dict.fromkeys(names) if name]
    if not names:
        raise SpearError(f'{who}: nothing to look for: name it, as in --vocabulary "mug, spoon"')
    return names
