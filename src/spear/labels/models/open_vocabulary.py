"""Grounding DINO and OWLv2: detectors that find the objects of a vocabulary, a list of names.

The authors of the paper tried Grounding DINO and found its labels clearly worse than Gemini's. In
contrast to Gemini, it needs no key. Both networks come from Transformers. The thresholds and the
suppression of overlapping boxes are our choice.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch

from spear.errors import SpearError
from spear.labels.fit.image import clip_boxes, select_indices_by_nms
from spear.labels.models.pretrained import (
    load_model,
    load_pretrained_part,
    translate_out_of_memory_errors,
)
from spear.labels.models.protocols import Detection
from spear.types import Array, Frame


class _InputsAndOutputs(NamedTuple):
    """The inputs of a network, which its processor computed, and the network's outputs."""

    inputs: Any
    outputs: Any


class _OpenVocabularyDetector:
    """The base of both detectors: a network that finds the objects of a vocabulary.

    Args:
        model: Name on the Hub, or folder.
        vocabulary: The names of the objects to find.
        device: "auto", or a device name of PyTorch (`prepare_device`).

    Raises:
        SpearError: The vocabulary is empty, a name is too long for a prompt, or the model cannot be
            loaded.
    """

    kind: str
    """The network's `model_type` in Transformers."""
    prompt: str
    """The prompt for a name, in which {} stands for the name."""
    separator = ""
    """The mark that ends each name in a prompt with several names."""
    threshold: float
    """Boxes with a lower score are no detections."""
    max_overlap = 0.7
    """Two boxes with a higher IoU count as one object, and only the better one is a detection."""

    def __init__(self, model: str, *, vocabulary: Sequence[str], device: str = "auto") -> None:
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

        self._names = _normalize_vocabulary(vocabulary, self.kind)
        self._processor = load_pretrained_part(AutoProcessor, self.kind, model)
        self._network = load_model(AutoModelForZeroShotObjectDetection, self.kind, model, device)
        for name in self._names:
            if not self._is_prompt_short_enough(self.prompt.format(name) + self.separator):
                raise SpearError(
                    f"{name[:40]!r} is too long a name for {self.kind}. Use a few words."
                )
        # The label's provenance gets everything on which the detections depend.
        prompts = ", ".join(self.prompt.format(name) for name in self._names)
        prompts_hash = hashlib.sha256(prompts.encode()).hexdigest()[:8]
        settings = f"threshold {self.threshold:g}, overlap {self.max_overlap:g}"
        self.name = f"{self.kind} {model} ({len(self._names)} names {prompts_hash}, {settings})"

    def _is_prompt_short_enough(self, prompt: str) -> bool:
        """Whether the network can read a prompt of this length."""
        config = self._network.config
        # Grounding DINO has a limit of its own, which is lower than that of its text network.
        max_tokens = getattr(config, "max_text_len", None)
        if not max_tokens:
            max_tokens = config.text_config.max_position_embeddings
        num_tokens = len(self._processor.tokenizer(prompt)["input_ids"])
        return num_tokens <= max_tokens

    def _run_network(
        self, images: Sequence[Array], prompts: Any, **options: Any
    ) -> _InputsAndOutputs:
        """Run the network on images with their prompts."""
        inputs = self._processor(images=images, text=prompts, return_tensors="pt", **options)
        inputs = inputs.to(self._network.device, self._network.dtype)
        with torch.inference_mode(), translate_out_of_memory_errors(len(images)):
            return _InputsAndOutputs(inputs, self._network(**inputs))


class GroundingDinoDetector(_OpenVocabularyDetector):
    """Finds the objects of a vocabulary with Grounding DINO.

    The network gives each box a score for each token of the prompt. A name's score is that of its
    best token, and a box gets the name with the best score. A vocabulary that is too long for one
    prompt is divided among several prompts.
    """

    kind = "grounding-dino"
    prompt = "{}"
    separator = "."
    threshold = 0.3

    def detect(self, frames: Sequence[Frame]) -> list[list[Detection]]:
        """Detect the objects of each image, best first."""
        # Images of different sizes in one batch would be padded, so that the detections in one
        # image would depend on the others. So each batch has images of one size.
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
                detections[index] = clean_detections(
                    detections[index], height, width, self.max_overlap
                )
        return detections

    def _read_outputs(
        self, outputs: Any, tokens: Sequence[int], size: tuple[int, int], names: Sequence[str]
    ) -> list[list[Detection]]:
        """Convert the network's outputs to the detections of each image.

        Args:
            outputs: `logits` [images, boxes, tokens] and `pred_boxes` [images, boxes, 4] (center
                and size, as fractions of the image).
            tokens: The ids of the prompt's tokens.
            size: Height and width of the images.
            names: The names in the prompt.
        """
        # The score of a name is that of its best token; a box gets its best name.
        token_scores = outputs.logits.float().sigmoid()
        spans = self._list_name_spans(tokens)
        scores_by_name = [token_scores[..., span].amax(dim=-1) for span in spans]
        name_scores = torch.stack(scores_by_name, dim=-1)  # [images, boxes, names]
        scores, name_indices = name_scores.max(dim=-1)  # [images, boxes]

        # From center and size to corners, from fractions to pixels
        centers, sizes = outputs.pred_boxes.float().split(2, dim=-1)
        boxes = torch.cat([centers - sizes / 2, centers + sizes / 2], dim=-1)
        height, width = size
        boxes = boxes * torch.tensor([width, height, width, height], device=boxes.device)

        results = []
        for image_boxes, image_scores, image_name_indices in zip(
            boxes, scores, name_indices, strict=True
        ):
            is_detected = image_scores > self.threshold
            detected_names = [names[i] for i in image_name_indices[is_detected].tolist()]
            results.append(
                _make_detections(
                    image_boxes[is_detected], image_scores[is_detected], detected_names
                )
            )
        return results

    def _list_name_spans(self, tokens: Sequence[int]) -> list[list[int]]:
        """Find the positions of each name's tokens in a prompt.

        Names are the runs of tokens between full stops and special tokens.
        """
        tokenizer = self._processor.tokenizer
        separators = {tokenizer.convert_tokens_to_ids("."), *tokenizer.all_special_ids}
        separators -= {tokenizer.unk_token_id}  # stands for an unknown piece of a name
        runs = groupby(range(len(tokens)), lambda position: tokens[position] in separators)
        return [list(positions) for is_separator, positions in runs if not is_separator]

    @cached_property
    def _prompts(self) -> list[tuple[str, list[str]]]:
        """The prompts of the vocabulary, each short enough for the network: (prompt, its names)."""
        prompts: list[tuple[str, list[str]]] = [("", [])]
        for name in self._names:
            prompt, names = prompts[-1]
            longer_prompt = f"{prompt} {name}.".strip()
            if self._is_prompt_short_enough(longer_prompt):
                prompts[-1] = (longer_prompt, [*names, name])
            else:
                prompts.append((f"{name}.", [name]))
        return prompts


class Owlv2Detector(_OpenVocabularyDetector):
    """Finds the objects of a vocabulary with OWLv2, which gets a separate prompt for each name."""

    kind = "owlv2"
    prompt = "a photo of a {}"
    threshold = 0.2

    def detect(self, frames: Sequence[Frame]) -> list[list[Detection]]:
        """Detect the objects of each image, best first."""
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
            raw_detections = _make_detections(
                result["boxes"], result["scores"], result["text_labels"]
            )
            detections.append(clean_detections(raw_detections, height, width, self.max_overlap))
        return detections


def clean_detections(
    detections: Sequence[Detection], height: int, width: int, max_overlap: float
) -> list[Detection]:
    """Clip detections to the image, drop bad ones, and sort the others, best first.

    A detection is dropped if it is narrower than a pixel, has no name, or overlaps a better one
    (`select_indices_by_nms`).

    Args:
        detections: The detections of one image.
        height: Height of the image.
        width: Width of the image.
        max_overlap: The largest IoU of two remaining detections.
    """
    if not detections:
        return []
    boxes = clip_boxes(np.stack([d.box2d for d in detections]), height, width)
    scores = np.array([d.score for d in detections])
    cleaned_detections = []
    for index in select_indices_by_nms(boxes, scores, max_overlap).tolist():
        box = boxes[index]
        if detections[index].name and (box[2:] - box[:2]).min() >= 1:
            cleaned_detections.append(replace(detections[index], box2d=box))
    return cleaned_detections


def _make_detections(
    boxes: torch.Tensor, scores: torch.Tensor, names: Sequence[str]
) -> list[Detection]:
    rows = zip(names, boxes.float().cpu().numpy(), scores.tolist(), strict=True)
    return [Detection(name, box, float(score)) for name, box, score in rows]


def _normalize_vocabulary(vocabulary: Sequence[str], kind: str) -> list[str]:
    """The names in lower case, without marks that end a name in a prompt, and without repetitions.

    Raises:
        SpearError: No name remains, or the vocabulary is a string instead of a list.
    """
    if isinstance(vocabulary, str):
        raise SpearError(f"the vocabulary of {kind} is one text. Give a list of names.")
    names: dict[str, None] = {}  # a set that keeps its order
    for name in vocabulary:
        words = name.lower().replace(".", " ").replace("?", " ").split()
        if words:
            names[" ".join(words)] = None
    if not names:
        raise SpearError(
            f'{kind} has nothing to look for. Name it, as in --vocabulary "mug, spoon".'
        )
    return list(names)
