"""Training on a GPU, as far as it can be checked without one: the choice of device, and where every tensor lives.

PyTorch's fake tensors have a device and no contents. An operation on tensors of two devices fails on them as it does on
a GPU, so a training step on fake CUDA tensors finds every tensor that was made, or left, on the CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from spear import flow
from spear.cli import main
from spear.errors import SpearError
from spear.models.losses import token_loss
from spear.train import optimize
from spear.train.devices import choose_device
from spear.train.optimize import Optimization, Stepper
from train_tiny import Acting

CUDA = torch.device("cuda", 0)


def test_the_device_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert choose_device("cpu").type == "cpu" and not taken
    assert choose_device("auto") == choose_device("cuda") == CUDA
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    for name, hint in (
        ("cuda:2", "no device cuda:2: .* finds 2 GPUs here: give another, or cpu"),
        ("gpu", "unknown device 'gpu'"),
        ("cuda:x", "unknown device 'cuda:x': did you mean"),
        ("cpu:1", "unknown device 'cpu:1'"),
    ):
        with pytest.raises(SpearError, match=hint):
            choose_device(name)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("auto") == taken[-1] == torch.device("cuda", 1)
    with pytest.raises(SpearError, match="several processes cannot share a GPU: give cuda"):
        choose_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(SpearError, match="start as many processes as there are GPUs"):
        choose_device("auto")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused() -> None:
    assert choose_device("auto").type == "cpu"
    with pytest.raises(SpearError, match="finds no GPU here"):
        choose_device("cuda")


def test_the_command_refuses_a_device_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "nano-vla", "--device", "gpu", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: unknown device 'gpu'") and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


class Faked(Acting):
    """Without choosing the places that have a label, and with times that are given: both need contents."""

    def questions(self, asked: dict[str, Any]) -> torch.Tensor:
        labels = asked.pop("labels")
        logits = self.model.vlm(**asked).logits
        assert logits.device == labels.device == CUDA
        return token_loss(logits.flatten(0, 1), labels.flatten(), self.model.vlm.config)[0]


class Arrived(Exception):
    """The backward pass is done."""


def test_every_tensor_of_a_training_step_is_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the device, forward, backward, on fake tensors; but for the random numbers' generator."""

    def stop(*_: Any) -> None:
        raise Arrived

    monkeypatch.setattr(optimize, "step_generator", lambda *_: None)
    monkeypatch.setattr(flow, "sample_time", lambda count, *_, device: torch.rand(count, device=device))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", stop)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    batch = Faked().batch(0)
    with torch.device("meta"):
        task = Faked()
    mode = FakeTensorMode()
    batch = tree_map_only(torch.Tensor, mode.from_tensor, batch)
    with mode:
        for module in task.model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(torch.empty(parameter.shape, device=CUDA)))
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=CUDA))
        stepper = Stepper(task, Optimization(steps=2, lr=1e-3), seed=0)
        with pytest.raises(Arrived):
            stepper(0, batch)
    learned = [p.grad for p in task.model.parameters() if p.grad is not None]
    assert len(learned) > 50 and {grad.device for grad in learned} == {CUDA}


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any = None, **kwargs: Any
) -> torch.Tensor:
    """Scaled dot-product attention; PyTorch picks a kernel for it by asking the GPU, which there is none of here."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (kwargs.get("scale") or query.shape[-1] ** -0.5)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -1e9)
    return scores.softmax(-1) @ value
