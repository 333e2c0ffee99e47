"""Devices, as far as they can be checked without a GPU: the choice, and where tensors are created.

Code of a training step has to pass a device whenever it creates a tensor. Otherwise the tensor is
on the CPU, also if the model is on a GPU. `TensorCreations` finds such places.
"""

import dataclasses
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from models_tiny import TINY
from refusals import refuses
from spear.models import devices
from spear.models.devices import is_bfloat16_fast, limit_threads, prepare_device
from spear.models.presets import build_vlm_config
from spear.models.stage0 import MogeDepthConfig, MogeForDepth
from spear.train import loop
from spear.train.optimize import Stepper
from spear.train.options import Optimization
from train_tiny import PolicyTask, Regression, run_loop

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")


@pytest.mark.parametrize("has_bfloat16", [True, False])
@pytest.mark.parametrize("has_amx", [True, False])
@pytest.mark.parametrize("has_avx512_bf16", [True, False])
@pytest.mark.parametrize("is_amd", [True, False])
def test_bfloat16_is_fast_with_amx_or_on_amd_unless_onednn_may_not_use_it(
    has_bfloat16: bool,
    has_amx: bool,
    has_avx512_bf16: bool,
    is_amd: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "HAS_BFLOAT16", has_bfloat16)
    monkeypatch.setattr(devices, "CPU_INFO", "AuthenticAMD" if is_amd else "GenuineIntel")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_avx512_bf16)

    is_fast_on_amd = is_amd and has_avx512_bf16
    # A value of ONEDNN_MAX_CPU_ISA, which limits oneDNN's instructions -> whether bfloat16 is fast.
    # oneDNN takes values in lower and in upper case.
    expected_of_limit = {
        "": has_amx or is_fast_on_amd,
        "avx512_core_bf16": is_fast_on_amd,
        "AVX512_CORE": False,
        "AVX2": False,
    }
    for limit, is_fast in expected_of_limit.items():
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        assert is_bfloat16_fast(CUDA)
        assert is_bfloat16_fast(CPU) == (has_bfloat16 and is_fast)


IN_BFLOAT16 = Optimization(steps=1, lr=1e-3, ema=0, frozen=("0",), frozen_precision="bf16")
IN_FLOAT32 = dataclasses.replace(IN_BFLOAT16, precision="fp32", frozen_precision="fp32")


@pytest.mark.parametrize(("is_fast", "expected"), [(True, IN_BFLOAT16), (False, IN_FLOAT32)])
def test_a_run_uses_bfloat16_where_it_is_fast_and_keeps_to_that_on_other_machines(
    is_fast: bool, expected: Optimization, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "is_bfloat16_fast", lambda _: is_fast)

    opt = loop.resolve_optimization(IN_BFLOAT16, tmp_path, CPU)
    assert opt == expected
    run_loop(Regression(), opt, tmp_path)

    monkeypatch.setattr(loop, "is_bfloat16_fast", lambda _: not is_fast)
    assert loop.resolve_optimization(IN_BFLOAT16, tmp_path, CPU) == expected


@pytest.mark.parametrize("is_fast", [True, False])
def test_a_run_uses_float32_where_the_recipe_says_so(
    is_fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "is_bfloat16_fast", lambda _: is_fast)

    assert loop.resolve_optimization(IN_FLOAT32, tmp_path, CPU) == IN_FLOAT32


# A layer's inputs, the batch size, and the number of threads that results; four are available. The
# layer has 1,000 outputs. A thread is worth 100 million parameters times the batch size.
@pytest.mark.parametrize(
    ("num_inputs", "batch_size", "num_threads"), [(6400, 1, 1), (6400, 32, 2), (10**6, 1, 4)]
)
def test_a_small_network_acts_with_few_threads(
    num_inputs: int, batch_size: int, num_threads: int
) -> None:
    model = torch.nn.Linear(num_inputs, 1000, bias=False, device="meta")
    original_num_threads = torch.get_num_threads()
    torch.set_num_threads(4)

    # The number of threads is restored even after an exception.
    try:
        with pytest.raises(ZeroDivisionError), limit_threads(model, batch_size):
            assert torch.get_num_threads() == num_threads
            raise ZeroDivisionError
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(original_num_threads)


@pytest.mark.parametrize(("user_value", "expected"), [(None, "1000"), ("7", "7")])
def test_waiting_threads_soon_sleep_unless_the_user_says_otherwise(
    user_value: str | None, expected: str
) -> None:
    """GOMP_SPINCOUNT is how often a thread of OpenMP looks for work before it sleeps."""
    environment = dict(os.environ)
    environment.pop("GOMP_SPINCOUNT", None)
    if user_value is not None:
        environment["GOMP_SPINCOUNT"] = user_value
    code = "import os, spear; print(os.environ['GOMP_SPINCOUNT'])"

    process = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )

    assert process.stdout.strip() == expected


@pytest.fixture
def current_devices(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Pretend that the machine has two GPUs; returns a list of the devices made current so far."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    return current


def test_the_cpu_can_be_chosen(current_devices: list[torch.device]) -> None:
    assert prepare_device("cpu") == CPU

    assert not current_devices
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(("name", "index"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_is_chosen_and_computes_exactly(
    name: str, index: int, current_devices: list[torch.device]
) -> None:
    assert prepare_device(name) == torch.device("cuda", index)

    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpu", "'gpu'"),
        ("cuda:x", "'cuda:x'"),
        ("cpu:1", "'cpu:1'"),
        ("cuda:2", "cuda:2.* 2 GPUs"),
    ],
)
def test_unknown_devices_are_refused(
    name: str, words: str, current_devices: list[torch.device]
) -> None:
    refuses(words, prepare_device, name)


def test_each_of_several_processes_takes_its_own_gpu(
    current_devices: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")

    assert prepare_device("auto") == torch.device("cuda", 1)
    assert current_devices[-1] == torch.device("cuda", 1)


def test_processes_cannot_share_a_gpu(
    current_devices: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")

    refuses("cuda:0", prepare_device, "cuda:0")
    refuses("cuda:2", prepare_device, "auto")  # there are two GPUs


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused() -> None:
    assert prepare_device("auto") == CPU

    refuses("no GPU", prepare_device, "cuda")


class TensorCreations(TorchFunctionMode):
    """While active, counts created tensors, and collects the places that give no device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.without_device: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _device_constructors():
            self.count += 1
            if kwargs.get("device") is None:
                frame = traceback.extract_stack(limit=2)[0]
                self.without_device.add(f"{frame.filename}:{frame.lineno} {func.__name__}")
        return func(*args, **kwargs)


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True, "frozen": ("vlm.moge",)}])
def test_a_training_step_says_where_it_creates_tensors(changes: dict[str, Any]) -> None:
    """The steps of `PolicyTask` have robot samples and questions, and do all that a step does."""
    task = PolicyTask()
    stepper = Stepper(task, Optimization(steps=2, lr=1e-3, **changes), seed=0)

    with TensorCreations() as creations:
        for step in range(2):
            stepper(step, [task.batch(step)])

    assert creations.count > 20  # the mode saw the whole step
    # The tests make their batches on the CPU, and PyTorch 2.11's gradient checkpointing creates a
    # tensor without a device itself.
    for location in creations.without_device:
        assert "tests/" in location or "torch/utils/checkpoint" in location


def test_a_depth_step_says_where_it_creates_tensors() -> None:
    model = MogeForDepth(MogeDepthConfig(moge_config=build_vlm_config(TINY).moge_config))

    with TensorCreations() as creations:
        images = torch.zeros(2, 3, 32, 48, dtype=torch.uint8, device="cpu")
        model(images, torch.ones(2, 32, 48, device="cpu")).loss.backward()

    assert creations.count > 0
    assert not creations.without_device
