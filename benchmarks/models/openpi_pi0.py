"""openpi's PyTorch π0 as a contender: in a process and a Python of its own, with our geometry,
weights and inputs.

openpi patches Transformers 4.53.2, which cannot be installed next to the one that we use. A Python
for it:

    git clone https://github.com/Physical-Intelligence/openpi
    python -m venv openpi-venv
    openpi-venv/bin/pip install torch transformers==4.53.2 safetensors
    cp -r openpi/src/openpi/models_pytorch/transformers_replace/* \\
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
from timing import RemoteContender

CHILD = Path(__file__).with_name("openpi_child.py")


class OpenPi(RemoteContender):
    """openpi's π0 in its own process, until `with` ends. Calling it samples actions once there.

    Args:
        python: A Python with openpi, see above.
        size: Geometry.
        our_model: The model whose weights it gets.
        inputs: π0's arguments as `pi0_pair.make_observation` makes them.
        num_text_tokens: Tokens of the prompt.
        num_flow_steps: Flow steps.
        is_compiled: By openpi's own `torch.compile`, in the mode that is its default.

    Attributes:
        actions: [B, H, 8] that it gave, float32.

    Raises:
        RuntimeError: With one line, when it does not start.
    """

    def __init__(
        self,
        python: Path,
        size: Preset,
        our_model: Spear1ForActionPrediction,
        inputs: dict[str, Any],
        *,
        num_text_tokens: int,
        num_flow_steps: int,
        is_compiled: bool = False,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        save_file(rename_weights(our_model), folder / "weights.safetensors")
        tensors = {
            "images": inputs["pixel_values"].float(),
            "ids": inputs["input_ids"][:, -num_text_tokens:],
            "state": inputs["state"].float(),
            "noise": inputs["noise"].float(),
        }
        contiguous = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        save_file(contiguous, folder / "observation.safetensors")
        request = {
            "vision": size.vision,
            "text": size.text,
            "expert": size.expert,
            "rows": our_model.vlm.language_model.embed_tokens.weight.shape[0],
            "horizon": size.horizon,
            "state": NUM_STATE_FEATURES,
            "action": ACTION_DIM,
            "dtype": str(our_model.dtype).removeprefix("torch."),
            "device": our_model.device.type,
            "threads": torch.get_num_threads() if our_model.device.type == "cpu" else 0,
            "compile": "max-autotune" if is_compiled else None,
            "steps": num_flow_steps,
            "weights": str(folder / "weights.safetensors"),
            "observation": str(folder / "observation.safetensors"),
            "actions": str(folder / "actions.json"),
        }

        environment = dict(os.environ)
        environment.pop("PYTHONPATH", None)
        environment["TRANSFORMERS_VERBOSITY"] = "error"
        self._process = subprocess.Popen(
            [str(python), str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        try:
            self._ask(json.dumps(request))
        except RuntimeError:
            self.close()
            raise
        self.actions = torch.tensor(json.loads((folder / "actions.json").read_text()))

    def __call__(self) -> None:
        """Sample once."""
        answer = self._ask("")
        self.clock_s = answer["clock"]
        self.processor_s = answer["processor"]

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
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(line, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise RuntimeError("openpi's Python has ended: see above") from None
        text = self._process.stdout.readline()
        if not text:
            raise RuntimeError("openpi's Python has ended: see above")
        answer: dict[str, Any] = json.loads(text)
        if "error" in answer:
            raise RuntimeError(f"openpi: {answer['error']}")
        return answer


def rename_weights(our_model: Spear1ForActionPrediction) -> dict[str, torch.Tensor]:
    """Return our weights under the names of openpi's modules.

    Its velocity points from the data to the noise, so the last layer is negated.
    """
    weights = {}
    for name, weight in our_model.state_dict().items():
        if name.startswith("expert.embed_tokens."):
            continue
        if name.startswith("action_out_proj."):
            weight = -weight
        name = name.replace("vlm.vision_tower.", "vlm.vision_tower.vision_model.", 1)
        weights[name] = weight.contiguous().cpu()
    return weights
