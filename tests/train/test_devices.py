"""Devices, as far as they can be checked without a GPU: the choice, and where tensors are made.

A tensor that a training step makes must say where, else it lands on the CPU: a mode of PyTorch's sees all.
"""

import dataclasses
import itertools
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
from spear.models.devices import choose_device, is_bfloat16_fast, limit_threads
from spear.models.presets import build_vlm_config
from spear.models.stage0 import MogeDepthConfig, MogeForDepth
from spear.train import loop
from spear.train.optimize import Stepper
from spear.train.options import Optimization
from train_tiny import PolicyTask, Regression, run_loop

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def test_bfloat16_is_used_where_it_is_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for has, tiles, pairs, amd in itertools.product((True, False), repeat=4):
        monkeypatch.setattr(devices, "HAS_BFLOAT16", has)
        monkeypatch.setattr(devices, "CPU", "AuthenticAMD" if amd else "GenuineIntel")
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda tiles=tiles: tiles)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda pairs=pairs: pairs)
        both = amd and pairs
        for limit, fast in (
            ("", tiles or both),
            ("avx512_core_bf16", both),
            ("AVX512_CORE", 0),
            ("AVX2", 0),
        ):
            monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
            assert is_bfloat16_fast(CUDA) and is_bfloat16_fast(CPU) == bool(has and fast)

    asked = Optimization(steps=1, lr=1e-3, ema=0, frozen=("0",), frozen_precision="bf16")
    plain = dataclasses.replace(asked, precision="fp32", frozen_precision="fp32")
    for fast, used in ((True, asked), (False, plain)):
        monkeypatch.setattr(loop, "is_bfloat16_fast", lambda _, fast=fast: fast)
        out = tmp_path / str(fast)
        assert (
            loop.resolve_optimization(asked, out, CPU) == used
            and loop.resolve_optimization(plain, out, CPU) == plain
        )
        run_loop(Regression(), loop.resolve_optimization(asked, out, CPU), out)
        monkeypatch.setattr(
            loop, "is_bfloat16_fast", lambda _, fast=fast: not fast
        )  # on another machine
        assert loop.resolve_optimization(asked, out, CPU) == used


def test_a_small_network_acts_by_one_thread() -> None:
    had = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        small, large = (torch.nn.Linear(n, 1000, bias=False, device="meta") for n in (6400, 10**6))
        for model, inputs, used in ((small, 1, 1), (small, 32, 2), (large, 1, 4)):
            with pytest.raises(ZeroDivisionError), limit_threads(model, inputs):
                assert torch.get_num_threads() == used
                raise ZeroDivisionError
            assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(had)


@pytest.mark.parametrize("own", [None, "7"])
def test_threads_that_wait_soon_sleep_unless_told_otherwise(own: str | None) -> None:
    env = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    env |= {"GOMP_SPINCOUNT": own} if own else {}
    command = [sys.executable, "-c", "import os, spear; print(os.environ['GOMP_SPINCOUNT'])"]
    assert subprocess.run(command, env=env, capture_output=True, text=True).stdout.strip() == (
        own or "1000"
    )


def test_the_device_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.device] = []
    two = {"is_available": lambda: True, "device_count": lambda: 2, "set_device": taken.append}
    for name, function in two.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert choose_device("cpu").type == "cpu" and not taken and torch.backends.cudnn.allow_tf32
    assert (
        choose_device("auto") == choose_device("cuda") == CUDA
        and not torch.backends.cudnn.allow_tf32
    )
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    unknown = {name: f"'{name}'" for name in ("gpu", "cuda:x", "cpu:1")}
    for name, hint in {"cuda:2": "cuda:2.* 2 GPUs", **unknown}.items():
        refuses(hint, choose_device, name)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("auto") == taken[-1] == torch.device("cuda", 1)
    refuses("cuda:0", choose_device, "cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    refuses("cuda:2", choose_device, "auto")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused() -> None:
    assert choose_device("auto").type == "cpu"
    refuses("no GPU", choose_device, "cuda")


class Placed(TorchFunctionMode):
    """Notes every tensor that is made without a device, by function and place."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0
        self.adrift: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _device_constructors():
            self.made += 1
            if kwargs.get("device") is None:
                place = traceback.extract_stack(limit=2)[0]
                self.adrift.add(f"{place.filename}:{place.lineno} {func.__name__}")
        return func(*args, **kwargs)


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True, "frozen": ("vlm.moge",)}])
def test_a_training_step_says_where_it_makes_its_tensors(changes: dict[str, Any]) -> None:
    """Robot steps and questions: to the device, forward, backward, clip, update, average. Batches are made on
    the CPU; what PyTorch's own checkpointing makes (2.11) is not ours."""
    task = PolicyTask()
    stepper = Stepper(task, Optimization(steps=2, lr=1e-3, **changes), seed=0)
    with Placed() as placed:
        for step in range(2):
            stepper(step, [task.batch(step)])
    inside = {p for p in placed.adrift if "tests/" not in p and "torch/utils/checkpoint" not in p}
    assert placed.made > 20 and not inside


def test_a_depth_step_says_where_it_makes_its_tensors() -> None:
    model = MogeForDepth(MogeDepthConfig(moge_config=build_vlm_config(TINY).moge_config))
    with Placed() as placed:
        pictures = torch.zeros(2, 3, 32, 48, dtype=torch.uint8, device="cpu")
        model(pictures, torch.ones(2, 32, 48, device="cpu")).loss.backward()
    assert placed.made > 0 and not placed.adrift
