"""What saves memory changes nothing else: accumulation, bfloat16 moments, frozen parts without state."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.test_parallel import OPT, Line, Pairs, same_run

from spear.errors import SpearError
from spear.train.optimize import HalfStateAdamW, Stepper
from spear.train.options import Optimization
from train_tiny import go


def test_a_batch_in_two_pieces_is_one_step(tmp_path: Path) -> None:
    go(Pairs(), OPT, tmp_path / "one")
    go(Line(), replace(OPT, accumulate=2), tmp_path / "two")
    same_run(tmp_path / "one", tmp_path / "two", OPT.steps, rel=1e-6)


@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"moments": "bf16"}])
def test_pieces_and_bfloat16_moments_survive_a_stop_bit_for_bit(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    long = replace(OPT, schedule="constant", **changes)
    whole = go(Line(), long, tmp_path / "whole")
    go(Line(), replace(long, steps=5), tmp_path / "parts")
    parts = go(Line(), long, tmp_path / "parts")
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_moments_in_bfloat16_follow_those_in_float32() -> None:
    def run(kind: type[torch.optim.AdamW]) -> tuple[torch.Tensor, torch.optim.AdamW]:
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 60).view(6, 10))
        optimizer = kind([weight], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
        for step in range(30):
            noise = torch.randn(6, 10, generator=torch.Generator().manual_seed(step))
            weight.grad = weight.detach() + 0.5 * noise
            optimizer.step()
        return weight.detach(), optimizer

    (half, optimizer), (full, _) = run(HalfStateAdamW), run(torch.optim.AdamW)
    start = torch.linspace(-1, 1, 60).view(6, 10)
    assert (half - full).norm() < 0.01 * (full - start).norm()
    assert not torch.equal(half, full)
    (state,) = optimizer.state.values()
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16


class Two(Line):
    """A frozen layer before a learning one."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Any:
        return (self.model(batch["x"]).float() - 1).square().mean(), {}


def test_frozen_parts_have_no_gradient_no_state_and_half_the_weights() -> None:
    task = Two()
    opt = Optimization(steps=2, lr=1e-2, frozen=("0",), frozen_precision="bf16")
    stepper = Stepper(task, opt, seed=0)
    stepper(0, task.batch(0))
    first, second = task.model
    assert first.weight.dtype == torch.bfloat16 and second.weight.dtype == torch.float32
    assert first.weight.grad is None and second.weight.grad is not None
    assert set(stepper.optimizer.state) == {second.weight, second.bias}
    assert stepper.ema is not None and set(stepper.ema) == {"1.weight", "1.bias"}


def test_frozen_bfloat16_weights_need_a_bfloat16_computation() -> None:
    opt = Optimization(steps=2, lr=1e-2, frozen_precision="bf16", precision="fp32")
    with pytest.raises(SpearError, match="frozen_precision"):
        Stepper(Line(), opt, seed=0)
