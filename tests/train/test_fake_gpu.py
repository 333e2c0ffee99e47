"""Training on a device other than the CPU, tested on machines without such a device.

The tests use PyTorch's fake tensors, which have a shape and a device but no values. Their device is
"pretend", a backend that is defined in Python, or CUDA if PyTorch is built with it. An operation on
fake tensors fails if one of them is on the CPU by mistake, or if it needs values. Each test runs in
a process of its own, because a backend cannot be removed again.
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

from spear.models.meter import replace_meta_by_fake_tensors
from spear.train import optimize, parallel
from spear.train.checkpoint import Checkpoints
from spear.train.optimize import Stepper
from spear.train.options import Optimization
from train_tiny import PolicyTask

WORLD_SIZE = 4
FAKE = FakeTensorMode()
needs_cuda_build = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="PyTorch is built without CUDA"
)
read_sizes: list[int] = []  # for each time that values were read from a tensor, how many
last_tasks: list[Any] = []  # the tasks of all steppers that were made


class FakePolicyTask(PolicyTask):
    """The policy's task without the loss of questions.

    That loss reads values (it looks for the answers' tokens), and fake tensors have none. The zero
    that is added gives a gradient to a weight that only questions train.
    """

    def loss(self, batch: dict[str, Any], generator: torch.Generator | None) -> Any:
        robot_batch = {key: value for key, value in batch.items() if key != "questions"}
        loss, loss_parts = super().loss(robot_batch, generator)
        return loss + 0 * self.model.vlm.language_model.norm.weight.sum(), loss_parts


def replace_operations_that_need_values() -> None:
    """Replace the operations of a training step that would read the values of fake tensors.

    From now on, `tolist` of a fake tensor returns ones and records their number in `read_sizes`.
    """

    def read_values(tensor: FakeTensor) -> list[float]:
        read_sizes.append(tensor.numel())
        return [1.0] * tensor.numel()

    # PyTorch 2.11 cannot fake the operations of these two functions, which draw random numbers.
    torch._standard_gamma = lambda shape, generator=None: torch.empty_like(shape)  # type: ignore
    optimize.make_step_generator = lambda *_: None  # type: ignore[assignment]
    FakeTensor.tolist = read_values  # type: ignore


def make_stepper(device: str, sharded: bool = False, **changes: Any) -> Stepper:
    """A stepper of fake tensors on a device; `changes` are of its `Optimization`."""
    task = FakePolicyTask()
    last_tasks.append(task)
    opt = Optimization(**{"steps": 2, "lr": 1e-3, "ema": 0.9, "precision": "fp32", **changes})
    with FAKE:
        replace_meta_by_fake_tensors(task.model, device)
        return Stepper(task, opt, seed=0, sharded=sharded)


def check_steps(stepper: Stepper) -> None:
    """Check that each of two steps reads values from the device only once.

    It then reads the loss, its parts and the gradient's norm, which the step returns.
    """
    batch = tree_map_only(torch.Tensor, FAKE.from_tensor, stepper.task.batch(0))
    read_sizes.clear()

    with FAKE:
        values_of_steps = [stepper(number, [batch]) for number in range(2)]

    num_values = len(values_of_steps[0])
    assert read_sizes == [num_values, num_values]
    assert "grad_norm" in values_of_steps[0]


def check_checkpoint(stepper: Stepper, device: str, root: Path) -> None:
    """Check that a checkpoint is copied from the device, and read into tensors on it."""
    with FAKE, Checkpoints(root, stepper) as checkpoints:
        # All tensors are on the device: weights, EMA weights and two moments.
        tensors = checkpoints._collect_tensors()
        assert {tensor.device.type for tensor in tensors.values()} == {device}
        assert len(tensors) > 3 * len(stepper.trainable)

        # The copies to be written are on the CPU, and values were read once, for the counts.
        written: list[Any] = []
        checkpoints._write = lambda *arguments: written.append(arguments)  # type: ignore
        read_sizes.clear()
        checkpoints.save(2, {})
        checkpoints.wait()
        _, copies, _ = written[0]
        assert copies.keys() == tensors.keys()
        assert len(read_sizes) == 1
        for copy in copies.values():
            assert copy.device.type == "cpu"
            assert copy.is_contiguous()

        # Loading creates moments on the device.
        checkpoints._create_moments(dict.fromkeys(stepper.trainable, 2.0))
        tensors = checkpoints._collect_tensors()
        assert {tensor.device.type for tensor in tensors.values()} == {device}


def check_one_process(device: str, root: Path, **changes: Any) -> None:
    """Check that steps, averages and checkpoints stay on the device."""
    stepper = make_stepper(device, gradient_checkpointing=True, frozen=("vlm.moge",), **changes)
    check_steps(stepper)
    assert stepper.ema is not None
    assert stepper.ema.keys() == stepper.trainable.keys()
    check_checkpoint(stepper, device, root)


def check_sharded() -> None:
    """Check that the shards of a model are on the device and divide it evenly."""
    dist.init_process_group("fake", rank=0, world_size=WORLD_SIZE, store=FakeStore())
    # The meshes are made outside of the fake mode, because their construction reads values.
    meshes = {
        device: parallel.init_device_mesh(device, (WORLD_SIZE,)) for device in ("cpu", "pretend")
    }
    parallel.init_device_mesh = lambda device, _: meshes[device]

    stepper = make_stepper("pretend", sharded=True)

    assert parallel.is_sharded(stepper.model)
    shards = [parameter.to_local() for parameter in stepper.model.parameters()]
    assert {shard.device.type for shard in shards} == {"pretend"}
    num_parameters = sum(p.numel() for p in FakePolicyTask().model.parameters())
    num_in_shards = WORLD_SIZE * sum(shard.numel() for shard in shards)
    assert num_parameters <= num_in_shards
    # Rank 0 has the largest shard of each weight, so four times its shards may be a little more.
    assert num_in_shards < 1.02 * num_parameters
    # FSDP's steps need streams, which the pretended device does not have, so steps run on the CPU.
    check_steps(make_stepper("cpu", sharded=True))


def check_pretended_device(root: Path) -> None:
    """Check training on the backend "pretend", with one process and sharded."""
    _setup_privateuseone_for_python_backend("pretend")
    # Autocast asks the backend for the precisions that it supports.
    torch.pretend.get_amp_supported_dtype = lambda: []  # type: ignore[attr-defined]
    replace_operations_that_need_values()
    # The checks rely on it that an operation on tensors of two devices is an error.
    with FAKE, pytest.raises(RuntimeError):
        torch.ones(3, device="pretend") + torch.ones(3)

    check_one_process("pretend", root)
    check_sharded()


def check_cuda(root: Path) -> None:
    """Check training on CUDA without a driver.

    Autocast and autograd would ask for a driver. So the functions that autocast calls are replaced
    by functions that say that there is a driver, and the backward pass by a function that creates
    gradients.
    """

    def backward(loss: torch.Tensor) -> None:
        assert loss.device.type == "cuda"
        assert loss.dtype == torch.float32
        assert loss.requires_grad
        for parameter in last_tasks[-1].model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None

    torch.cuda.amp.common.amp_definitely_not_available = lambda: False  # type: ignore[attr-defined]
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    torch.Tensor.backward = backward  # type: ignore[method-assign, assignment]
    replace_operations_that_need_values()
    check_one_process("cuda", root, precision="bf16", frozen_precision="bf16")


@pytest.mark.slow  # a minute: fake tensors of a pretended device are slow
@pytest.mark.parametrize(
    "check", ["check_pretended_device", pytest.param("check_cuda", marks=needs_cuda_build)]
)
def test_training_keeps_to_its_device(check: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    process = subprocess.run(
        [sys.executable, __file__, check, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
    )

    assert process.returncode == 0, process.stderr


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
