"""No step of the network touches another device or looks at a value: it would stop a GPU, or a CUDA graph.

On tensors without contents, where both are errors: on the `meta` device, and, where PyTorch is built for CUDA
(a GPU is not needed), on CUDA tensors of `FakeTensorMode`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from models_tiny import START, TINY
from spear import flow
from spear.models import decode, sampling
from spear.models.presets import spear1_config
from spear.models.spear1 import STATE_FEATURES, Spear1ForActionPrediction
from spear.types import ACTION_DIM, Action

BATCH, LENGTH, H = 2, 6, TINY.horizon
DEVICES = ["meta", "cuda"] if torch.version.cuda else ["meta"]


@pytest.fixture(params=DEVICES)
def empty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A SPEAR-1 and its inputs, without contents, on a device that is not the CPU."""
    for file in (decode, sampling):
        monkeypatch.setattr(file, "can_compile", lambda device: False)  # a compiler wants a driver
    if request.param == "meta":  # which autocast does not know
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": False)
    config = spear1_config(TINY)
    config.committed = 2
    with torch.device("meta"):
        model = Spear1ForActionPrediction(config)
    fake = FakeTensorMode() if request.param == "cuda" else contextlib.nullcontext()
    with fake:
        if request.param == "cuda":
            for module in model.modules():
                for name, weight in list(module.named_parameters(recurse=False)):
                    made = torch.empty(weight.shape, dtype=weight.dtype, device="cuda")
                    setattr(module, name, torch.nn.Parameter(made))
                for name, buffer in list(module.named_buffers(recurse=False)):
                    setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda"))

        def make(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=request.param)

        yield {
            "model": model,
            "make": make,
            "pixels": {
                view: make(BATCH, 3, height, width, dtype=torch.uint8)
                for view, (width, height) in TINY.image_sizes.items()
            },
            "ids": make(BATCH, LENGTH, dtype=torch.long),
            "mask": make(BATCH, LENGTH, dtype=torch.long),
            "present": {"wrist": make(BATCH, dtype=torch.bool)},
            "state": make(BATCH, STATE_FEATURES),
            "noise": Action.from_vector(make(BATCH, H, ACTION_DIM)),
            "device": request.param,
        }


def test_a_tensor_on_the_cpu_is_an_error_there(empty: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError):
        empty["state"] + torch.zeros(BATCH, STATE_FEATURES)
    with pytest.raises((RuntimeError, NotImplementedError)):
        empty["state"].sum().item()


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_actions(empty: dict[str, Any], masked: bool, committed: bool) -> None:
    e, model = empty, empty["model"].eval()
    held = flow.Committed(e["noise"], e["make"](BATCH, H, dtype=torch.bool)) if committed else None
    inputs = {f"pixels/{view}": pixels for view, pixels in e["pixels"].items()}
    inputs |= {"input_ids": e["ids"], "state": e["state"], "noise": e["noise"].to_vector()}
    if masked:
        inputs |= {"attention_mask": e["mask"], "present/wrist": e["present"]["wrist"]}
    if held is not None:
        inputs |= {"committed": held.actions.to_vector(), "held": held.held}
    for found in (
        sampling.plain(model, inputs, 3),
        sampling.fast(model, sampling.SAMPLER(model, True), inputs, 3, graphs=False),
    ):
        assert found.shape == (BATCH, H, ACTION_DIM) and found.device.type == e["device"]


def test_answers(empty: dict[str, Any]) -> None:
    e, model = empty, empty["model"].eval()
    inputs = {"pixels/external": e["pixels"]["external"], "input_ids": e["ids"], "attention_mask": e["mask"]}
    rows: list[Any] = [[(START, START + TINY.bins)] * 4] * BATCH
    spans = decode._spans(rows, 8, model.config.vlm_config.text_config)
    inputs["bounds"] = e["make"](len(spans), BATCH, 2, dtype=torch.long)
    layers = decode.STACK(model.vlm.language_model, True, False)
    with torch.no_grad():
        found = decode._decode(model.vlm, layers, inputs, spans)
    assert found.shape[0] == BATCH and found.device.type == e["device"]


@pytest.mark.parametrize("autocast", [False, True])
def test_loss_and_gradients(empty: dict[str, Any], autocast: bool) -> None:
    e, model = empty, empty["model"].train()
    noise = Action.from_vector(e["make"](BATCH, 3, H, ACTION_DIM))
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast and e["device"] == "cuda"):
        loss = model(
            e["pixels"], e["ids"], e["mask"], e["state"], e["noise"], e["make"](BATCH, H, dtype=torch.bool),
            flow_samples=3, noise=noise, time=e["make"](BATCH, 3), view_mask=e["present"],
        ).loss  # fmt: skip
    assert loss.device.type == e["device"]
    if e["device"] == "cuda" and not torch.cuda.is_available():
        return  # autograd wants a driver
    loss.backward()
    gradients = {p.grad.device.type for p in model.parameters() if p.grad is not None}
    assert gradients == {e["device"]}
