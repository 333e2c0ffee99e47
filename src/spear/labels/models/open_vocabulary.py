"""Grounding DINO and OWLv2: networks that find the objects whose names they are given.

The authors of the paper tried Grounding DINO and found its labels clearly worse than Gemini's; it
needs no key. Both networks are Transformers'. Thresholds and the suppression of boxes on one object
are our choice.
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
from spear.labels.models.pretrained import explain_full_memory, load_model, load_pretrained_part
from spear.labels.models.protocols import Detection
from spear.types import Array, Frame


class _OpenVocabularyDetector:
    """The base of both detectors: a network that finds the objects of a vocabulary.

    Args:
        model: Name on the Hub, or folder.
        vocabulary: The names.
        device: As for `choose_device`.

    Raises:
        SpearError: The vocabulary is empty, a name is too long for a prompt, or there is no such
            model.
    """

    kind: str
    """The network's `model_type` in Transformers."""
    prompt: str
    """The prompt for a name, with a gap for it."""
    separator = ""
    """What ends a name in a prompt of several."""
    threshold: float
    """Lowest score of a detection."""
    overlap = 0.7
    """Of two boxes with a higher IoU the better one stays."""

    def __init__(self, model: str, *, vocabulary: Sequence[str], device: str = "auto") -> None:
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

        self._names = _clean_vocabulary(vocabulary, self.kind)
        self._processor = load_pretrained_part(AutoProcessor, self.kind, model)
        self._network = load_model(AutoModelForZeroShotObjectDetection, self.kind, model, device)
        for name in self._names:
            if not self._fits_in_prompt(self.prompt.format(name) + self.separator):
                raise SpearError(
                    f"{name[:40]!r} is too long a name for {self.kind}. Use a few words."
                )
        prompts = ", ".join(self.prompt.format(name) for name in self._names)
        prompts_hash = hashlib.sha256(prompts.encode()).hexdigest()[:8]
        settings = f"threshold {self.threshold:g}, overlap {self.overlap:g}"
        self.name = f"{self.kind} {model} ({len(self._names)} names {prompts_hash}, {settings})"

    def _fits_in_prompt(self, prompt: str) -> bool:
        config = self._network.config
        # Grounding DINO's text network takes more tokens than Grounding DINO itself.
        own_limit = getattr(config, "max_text_len", None)
        max_tokens = own_limit or config.text_config.max_position_embeddings
        return len(self._processor.tokenizer(prompt)["input_ids"]) <= max_tokens

    def _run_network(
        self, images: Sequence[Array], prompts: Any, **options: Any
    ) -> tuple[Any, Any]:
        """The network's inputs for images with their prompts, and its outputs."""
        inputs = self._processor(images=images, text=prompts, return_tensors="pt", **options)
        inputs = inputs.to(self._network.device, self._network.dtype)
        with torch.inference_mode(), explain_full_memory(len(images)):
            return inputs, self._network(**inputs)


class GroundingDinoDetector(_OpenVocabularyDetector):
    """Finds the objects of a vocabulary.

    An object has the name whose best token fits it best. A vocabulary that is too long for one
    prompt is divided over several.
    """

    kind = "grounding-dino"
    prompt = "{}"
    separator = "."
    threshold = 0.3

    def detect(self, frames: Sequence[Frame]) -> list[list[Detection]]:
        """The objects of each image, best first."""
        # Images of one size need no padding, so what is detected in one does not depend on the
        # others.
        indices_by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, frame in enumerate(frames):
            indices_by_shape[frame.image.shape].append(index)

        detections: list[list[Detection]] = [[] for _ in frames]
        for (height, width, _), indices in indices_by_shape.items():
            images = [frames[index].image for index in indices]
            for prompt, names in self._prompts:
                inputs, outputs = self._run_network(images, [prompt] * len(images))
                tokens = inputs["input_ids"][0].tolist()
                results = self._read_outputs(outputs, tokens, (height, width), names)
                for index, result in zip(indices, results, strict=True):
                    detections[index] += result
            for index in indices:
                detections[index] = clean_detections(detections[index], height, width, self.overlap)
        return detections

    def _read_outputs(
        self, outputs: Any, tokens: Sequence[int], size: tuple[int, int], names: Sequence[str]
    ) -> list[list[Detection]]:
        """The detections of each image.

        Args:
            outputs: `logits` [images, boxes, tokens] and `pred_boxes` [images, boxes, 4] (center
                and size, as fractions of the image).
            tokens: Tokens of the prompt.
            size: Height and width of the images.
            names: In the prompt.
        """
        # Per box and name, the score of the name's best token
        token_scores = outputs.logits.float().sigmoid()
        spans = self._find_name_spans(tokens)
        name_scores = torch.stack([token_scores[..., span].amax(dim=-1) for span in spans], dim=-1)
        scores, name_indices = name_scores.max(dim=-1)

        centers, sizes = outputs.pred_boxes.float().split(2, dim=-1)
        boxes = torch.cat([centers - sizes / 2, centers + sizes / 2], dim=-1)
        height, width = size
        boxes = boxes * torch.tensor([width, height, width, height], device=boxes.device)

        results = []
        for image_boxes, image_scores, image_names in zip(boxes, scores, name_indices, strict=True):
            is_detected = image_scores > self.threshold
            detected_names = [names[i] for i in image_names[is_detected].tolist()]
            results.append(
                _make_detections(
                    image_boxes[is_detected], image_scores[is_detected], detected_names
                )
            )
        return results

    def _find_name_spans(self, tokens: Sequence[int]) -> list[list[int]]:
        """The positions of each name's tokens in a prompt."""
        tokenizer = self._processor.tokenizer
        separators = {tokenizer.convert_tokens_to_ids("."), *tokenizer.all_special_ids}
        separators -= {tokenizer.unk_token_id}
        runs = groupby(range(len(tokens)), lambda position: tokens[position] in separators)
        return [list(positions) for is_separator, positions in runs if not is_separator]

    @cached_property
    def _prompts(self) -> list[tuple[str, list[str]]]:
        """Prompts that are short enough, with the names in each."""
        prompts: list[tuple[str, list[str]]] = [("", [])]
        for name in self._names:
            prompt, names = prompts[-1]
            longer_prompt = f"{prompt} {name}.".strip()
            if self._fits_in_prompt(longer_prompt):
                prompts[-1] = (longer_prompt, [*names, name])
            else:
                prompts.append((f"{name}.", [name]))
        return prompts


class Owlv2Detector(_OpenVocabularyDetector):
    """Finds the objects of a vocabulary."""

    kind = "owlv2"
    prompt = "a photo of a {}"
    threshold = 0.2

    def detect(self, frames: Sequence[Frame]) -> list[list[Detection]]:
        """The objects of each image, best first."""
        images = [frame.image for frame in frames]
        sizes = [image.shape[:2] for image in images]
        prompts = [self.prompt.format(name) for name in self._names]
        _, outputs = self._run_network(images, [prompts] * len(images), padding="max_length")
        results = self._processor.post_process_grounded_object_detection(
            outputs,
            threshold=self.threshold,
            target_sizes=sizes,
            text_labels=[self._names] * len(images),
        )
        detections = []
        for result, (height, width) in zip(results, sizes, strict=True):
            raw = _make_detections(result["boxes"], result["scores"], result["text_labels"])
            detections.append(clean_detections(raw, height, width, self.overlap))
        return detections


def clean_detections(
    detections: Sequence[Detection], height: int, width: int, max_overlap: float
) -> list[Detection]:
    """Clip detections to the image and order them, best first.

    Dropped are those of less than a pixel, without a name, or on a better one (see
    `suppress_overlaps`).
    """
    if not detections:
        return []
    boxes = clip_boxes(np.stack([d.box2d for d in detections]), height, width)
    scores = np.array([d.score for d in detections])
    cleaned = []
    for index in suppress_overlaps(boxes, scores, max_overlap).tolist():
        box = boxes[index]
        if detections[index].name and (box[2:] - box[:2]).min() >= 1:
            cleaned.append(replace(detections[index], box2d=box))
    return cleaned


def _make_detections(
    boxes: torch.Tensor, scores: torch.Tensor, names: Sequence[str]
) -> list[Detection]:
    rows = zip(names, boxes.float().cpu().numpy(), scores.tolist(), strict=True)
    return [Detection(name, box, float(score)) for name, box, score in rows]


def _clean_vocabulary(vocabulary: Sequence[str], kind: str) -> list[str]:
    """Each name once, in lower case, without the marks that end a name in a prompt."""
    if isinstance(vocabulary, str):
        raise SpearError(f"the vocabulary of {kind} is one text. Give a list of names.")
    names: dict[str, None] = {}
    for name in vocabulary:
        words = name.lower().replace(".", " ").replace("?", " ").split()
        if words:
            names[" ".join(words)] = None
    if not names:
        raise SpearError(
            f'{kind} has nothing to look for. Name it, as in --vocabulary "mug, spoon".'
        )
    return list(names)
