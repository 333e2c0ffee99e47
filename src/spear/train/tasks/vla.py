"""Stage 2: demonstrations → SPEAR-1, with 3D questions alongside so that the VLM keeps what it knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from spear.data.mixture import TrainingSamples
from spear.data.normalize import STATE_VECTOR_DIM, Normalizer
from spear.models.processing import Processor
from spear.models.spear1 import Spear1ForActionPrediction
from spear.train.optimize import Batch, Loss
from spear.train.options import Recipe
from spear.train.tasks.questions import QuestionSamples, length_groups
from spear.types import Action


class VlaTask:
    """Batches of robot steps (and of questions) as in `stage`; the flow loss (plus the questions' loss)."""

    def __init__(
        self,
        model: Spear1ForActionPrediction,
        processor: Processor,
        normalizer: Normalizer,
        samples: TrainingSamples,
        stage: Recipe,
        questions: QuestionSamples | None = None,
    ) -> None:
        self.model, self.processor, self.normalizer = model, processor, normalizer
        self.samples, self.stage, self.questions = samples, stage, questions

    def batch(self, step: int) -> Batch:
        """Network inputs of one step: pixels, prompt, state, action chunk and mask; and questions."""
        raw = self.samples.batch(step, self.stage.batch_size)
        batch = robot_inputs(self.processor, self.normalizer, raw)
        if self.questions is not None:
            batch["questions"] = self.questions.batch(step)
        return batch

    def loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """Flow loss + weight · question loss, and the parts of both."""
        output = self.model(
            batch["pixel_values"],
            batch["input_ids"],
            batch["attention_mask"],
            batch["state"],
            Action.from_vector(batch["actions"]),
            batch["action_mask"],
            flow_samples=self.stage.flow_samples,
            view_mask=batch["view_mask"],
            generator=generator,
        )
        total, parts = output.loss, dict(output.parts)
        if self.questions is not None:
            questions = batch["questions"]
            asked = self.model.vlm(**questions, length_groups=length_groups(self.model, questions))
            total = total + self.stage.question_weight * asked.loss
            parts |= {f"question_{k}": v for k, v in asked.parts.items()}
        return total, parts


def robot_inputs(processor: Processor, normalizer: Normalizer, raw: Mapping[str, Any]) -> Batch:
    """A batch of `TrainingSamples` as network inputs, each row normalised as its dataset is."""
    tensors = {k: torch.from_numpy(np.ascontiguousarray(raw[k])) for k in ("position", "rotation", "gripper")}
    vectors = torch.from_numpy(raw["action"])
    action, state = torch.empty_like(vectors), torch.empty(len(vectors), STATE_VECTOR_DIM)
    kinds = list(normalizer.datasets.values())
    for index, own in enumerate(kinds or [normalizer]):
        rows = torch.from_numpy(raw["dataset"] == index if kinds else np.ones(len(vectors), bool))
        action[rows] = own.normalize_action(Action.from_vector(vectors[rows])).to_vector()
        position, rotation, gripper = (tensors[k][rows] for k in ("position", "rotation", "gripper"))
        state[rows] = own.state_vector(position, rotation, gripper[..., None])
    images = {k: torch.from_numpy(v).permute(0, 3, 1, 2).contiguous() for k, v in raw["images"].items()}
    return {
        "pixel_values": images,
        "view_mask": {k: torch.from_numpy(v) for k, v in raw["views"].items()},
        "state": state,
        "actions": action,
        "action_mask": torch.from_numpy(raw["action_mask"]),
        **processor.prompts(raw["instruction"]),
    }
