"""Training on another device than the CPU, without one: fake tensors of a backend that PyTorch lets Python
pretend, and of CUDA where PyTorch is built with it. A stray tensor on the CPU is an error there, and so is a
look at a value.

In a process of its own, since such a backend stays.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from spear.models.meter import allocate_storage
from spear.train import optimize, parallel
from spear.train.checkpoint import Checkpoints
from spear.train.optimize import Stepper
from spear.train.options import Optimization
from train_tiny import Acting

WORLD, FAKE = 4, FakeTensorMode()
built = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="PyTorch is built without CUDA"
)
looks: list[int] = []
tasks: list[Any] = []


class Robot(Acting):
    """Questions look for the tokens that are asked for, which only real tensors have."""

    def loss(self, batch: dict[str, Any], generator: torch.Generator | None) -> Any:
        acted, parts = super().loss({k: v for k, v in batch.items() if k != "questions"}, generator)
        return acted + 0 * self.model.vlm.language_model.norm.weight.sum(), parts


def count_looks() -> None:
    """From now on looks at values are counted."""
    # PyTorch 2.11 cannot fake it.
    torch._standard_gamma = lambda shape, generator=None: torch.empty_like(shape)  # type: ignore
    optimize.step_generator = lambda *_: None  # type: ignore[assignment]
    FakeTensor.tolist = lambda self: looks.append(self.numel()) or [1.0] * self.numel()  # type: ignore


def prepared(device: str, sharded: bool = False, **changes: Any) -> Stepper:
    tasks.append(task := Robot())
    with FAKE:
        allocate_storage(task.model, device)
        opt = Optimization(**{"steps": 2, "lr": 1e-3, "ema": 0.9, "precision": "fp32", **changes})
        return Stepper(task, opt, seed=0, sharded=sharded)


def cuda(root: Path) -> None:
    """Autocast and autograd ask for a driver: the one is told that there is one, the other left out."""

    def backward(loss: torch.Tensor) -> None:
        assert loss.device.type == "cuda" and loss.dtype == torch.float32 and loss.requires_grad
        for parameter in tasks[-1].model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None

    torch.cuda.amp.common.amp_definitely_not_available = lambda: False  # type: ignore[attr-defined]
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    torch.Tensor.backward = backward  # type: ignore[method-assign, assignment]
    count_looks()
    check("cuda", root, precision="bf16", frozen_precision="bf16")


def step(stepper: Stepper) -> None:
    """Two steps, each of which looks at the device once: at the losses and the norm."""
    batch = tree_map_only(torch.Tensor, FAKE.from_tensor, stepper.task.batch(0))
    looks.clear()
    with FAKE:
        found = [stepper(number, [batch]) for number in range(2)]
    assert looks == 2 * [len(found[0])] and "grad_norm" in found[0]


def pretended(root: Path) -> None:
    _setup_privateuseone_for_python_backend("pretend")
    torch.pretend.get_amp_supported_dtype = lambda: []  # type: ignore[attr-defined]
    count_looks()
    with FAKE, pytest.raises(RuntimeError):
        torch.ones(3, device="pretend") + torch.ones(3)
    check("pretend", root)
    several()


def check(device: str, root: Path, **changes: Any) -> None:
    """Steps, averages and checkpoints stay on the device; a checkpoint is copied from it."""
    stepper = prepared(device, gradient_checkpointing=True, frozen=("vlm.moge",), **changes)
    step(stepper)
    assert stepper.ema is not None and stepper.ema.keys() == stepper.trainable.keys()
    with FAKE, Checkpoints(root, stepper) as checkpoints:
        held = checkpoints._collect_tensors()
        assert {tensor.device.type for tensor in held.values()} == {device}
        assert len(held) > 3 * len(stepper.trainable)
        written: list[Any] = []
        checkpoints._write = lambda *what, to=written: to.append(what)  # type: ignore[assignment]
        looks.clear()
        checkpoints.save(2, {})
        checkpoints.wait()
        copies = written[0][1]
        assert copies.keys() == held.keys() and len(looks) == 1
        assert all(copy.device.type == "cpu" and copy.is_contiguous() for copy in copies.values())
        checkpoints._create_moments(
            dict.fromkeys(stepper.trainable, 2.0)
        )  # what a checkpoint is read into
        assert {tensor.device.type for tensor in checkpoints._collect_tensors().values()} == {
            device
        }


def several() -> None:
    dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    # Their own numbers are real.
    meshes = {kind: parallel.init_device_mesh(kind, (WORLD,)) for kind in ("cpu", "pretend")}
    parallel.init_device_mesh = lambda kind, _: meshes[kind]
    stepper = prepared("pretend", sharded=True)
    parts = [p.to_local() for p in stepper.model.parameters()]
    assert {part.device.type for part in parts} == {"pretend"} and parallel.is_sharded(
        stepper.model
    )
    whole = sum(p.numel() for p in Robot().model.parameters())
    assert whole <= WORLD * sum(map(torch.numel, parts)) < 1.02 * whole
    step(prepared("cpu", sharded=True))  # FSDP wants streams, which the pretended device lacks


@pytest.mark.parametrize("work", ["pretended", pytest.param("cuda", marks=built)])
def test_training_keeps_to_its_device(work: str, tmp_path: Path) -> None:
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, work, str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, **paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
