"""A tiny SPEAR-1 as a training task, and processes to train it on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from models_tiny import START, TINY, actions, pixels, spear1, text
from spear.models.spear1 import STATE_FEATURES
from spear.train.questions import length_groups
from spear.types import Action

EMBEDDINGS = "vlm.language_model.embed_tokens.weight"


class Acting:
    """Robot steps, questions beside them, and embeddings of which some rows learn; as `VlaTask` and `VlmTask`."""

    learning_rows = {EMBEDDINGS: (START, START + TINY.bins)}  # noqa: RUF012

    def __init__(self) -> None:
        self.model = spear1()

    def batch(self, step: int) -> dict[str, Any]:
        ids, mask = text(2, 6, seed=step)
        asked, there = text(3, 8, seed=step + 1)
        answer = (torch.arange(8) > 3).long() * there
        return {
            "pixel_values": pixels(2, seed=step),
            "view_mask": {"external": torch.tensor([True, True]), "wrist": torch.tensor([True, False])},
            "input_ids": ids,
            "attention_mask": mask,
            "state": torch.randn(2, STATE_FEATURES, generator=torch.Generator().manual_seed(step)),
            "actions": actions(2, TINY.horizon, seed=step).to_vector(),
            "action_mask": torch.ones(2, TINY.horizon, dtype=torch.bool),
            "questions": {
                "pixel_values": pixels(2, seed=step, views=("external",)),
                "image_index": torch.tensor([0, 0, 1]),
                "input_ids": asked,
                "attention_mask": there,
                "token_type_ids": answer,
                "labels": torch.where(answer.bool(), asked, -100),
            },
        }

    def loss(
        self, batch: dict[str, Any], generator: torch.Generator | None
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        robot = {k: v for k, v in batch.items() if k not in ("questions", "actions")}
        chunk = Action.from_vector(batch["actions"])
        acted = self.model(**robot, actions=chunk, flow_samples=2, generator=generator)
        asked = self.questions(batch["questions"])
        return acted.loss + 0.5 * asked, {**acted.parts, "questions": asked}

    def questions(self, asked: dict[str, Any]) -> torch.Tensor:
        return self.model.vlm(**asked, length_groups=length_groups(self.model)).loss


def start(function: str, *args: Path, processes: int = 2) -> list[subprocess.Popen[str]]:
    """Call a test module's function, "module.function", in so many processes that know of each other."""
    module, name = function.split(".")
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "from spear.errors import SpearError\n"
        f"from {module} import {name}\n"
        f"try:\n    {name}(*map(Path, sys.argv[1:]))\n"
        "except SpearError as error:\n    sys.exit(print(f'error: {error}', file=sys.stderr) or 2)\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, args)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
