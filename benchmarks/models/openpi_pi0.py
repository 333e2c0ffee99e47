"""openpi's PyTorch π0 as a contender: in a process and a Python of its own, with our geometry, weights and
inputs.

openpi patches Transformers 4.53.2, which cannot stand beside the one that we use. A Python for it:

    git clone https://github.com/Physical-Intelligence/openpi
    python -m venv openpi-venv
    openpi-venv/bin/pip install torch transformers==4.53.2 safetensors
    cp -r openpi/src/openpi/models_pytorch/transformers_replace/*
    openpi-venv/lib/python3*/site-packages/transformers/
    echo "$PWD/openpi/src" > $(echo openpi-venv/lib/python3*/site-packages)/openpi.pth
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import save_file

from spear.models.presets import Preset
from spear.models.spear1 import NUM_STATE_FEATURES, Spear1ForActionPrediction
from spear.types import ACTION_DIM
from timing import Elsewhere


class OpenPi(Elsewhere):
    """openpi's π0 in its own process, until `with` ends. Calling it samples actions once there.

    python    with openpi, see above. compiled: by openpi's own `torch.compile`, in the mode that is its
              default.
    size, ours, given  geometry, weights, and π0's arguments as `pi0_pair.observation` makes them.
    actions [B, H, 8]  that it gave, float32.
    Raises `RuntimeError` with one line when it does not start.
    """

    def __init__(
        self,
        python: Path,
        size: Preset,
        ours: Spear1ForActionPrediction,
        given: dict[str, Any],
        text: int,
        steps: int,
        compiled: bool = False,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        save_file(_weights(ours), folder / "weights.safetensors")
        tensors = {
            "images": given["pixel_values"].float(),
            "ids": given["input_ids"][:, -text:],
            "state": given["state"].float(),
            "noise": given["noise"].float(),
        }
        save_file(
            {k: v.contiguous().cpu() for k, v in tensors.items()},
            folder / "observation.safetensors",
        )
        wanted = {
            "vision": size.vision,
            "text": size.text,
            "expert": size.expert,
            "rows": ours.vlm.language_model.embed_tokens.weight.shape[0],
            "horizon": size.horizon,
            "state": NUM_STATE_FEATURES,
            "action": ACTION_DIM,
            "dtype": str(ours.dtype).removeprefix("torch."),
            "device": ours.device.type,
            "threads": torch.get_num_threads() if ours.device.type == "cpu" else 0,
            "compile": "max-autotune" if compiled else None,
            "steps": steps,
            "weights": str(folder / "weights.safetensors"),
            "observation": str(folder / "observation.safetensors"),
            "actions": str(folder / "actions.json"),
        }
        there = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self._process = subprocess.Popen(
            [str(python), str(Path(__file__).with_name("openpi_child.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**there, "TRANSFORMERS_VERBOSITY": "error"},
        )
        try:
            self._ask(json.dumps(wanted))
        except RuntimeError:
            self.close()
            raise
        self.actions = torch.tensor(json.loads((folder / "actions.json").read_text()))

    def __call__(self) -> None:
        """Sample once."""
        answer = self._ask("")
        self.took = answer["clock"], answer["processor"]

    def __enter__(self) -> OpenPi:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(line, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise RuntimeError("openpi's Python has ended: see above") from None
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("openpi's Python has ended: see above")
        said: dict[str, Any] = json.loads(answer)
        if "error" in said:
            raise RuntimeError(f"openpi: {said['error']}")
        return said


def _weights(ours: Spear1ForActionPrediction) -> dict[str, torch.Tensor]:
    """Our weights under the names of openpi's modules; its velocity points from the data to the noise."""
    found = {}
    for name, weight in ours.state_dict().items():
        if name.startswith("action_out_proj."):
            weight = -weight
        if name.startswith("expert.embed_tokens."):
            continue
        name = name.replace("vlm.vision_tower.", "vlm.vision_tower.vision_model.", 1)
        found[name] = weight.contiguous().cpu()
    return found
