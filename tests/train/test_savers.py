"""What saves memory in training changes nothing else: accumulation, bfloat16 states, frozen parts without
state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.test_parallel import OPT, Line, Pairs, tensors

from spear.errors import SpearError
from spear.train import loop
from spear.train.adamw import HalfStateAdamW
from spear.train.optimize import Optimization, Stepper

PARTS = Optimization(**{**OPT.__dict__, "accumulate": 2})


def test_a_batch_in_two_pieces_is_one_step(tmp_path: Path) -> None:
    """Losses within 1e-6 of the whole batch's, weights within 1e-5 relative, after twelve steps."""
    import json

    loop.run(Pairs(), OPT, tmp_path / "one", seed=0, workers=0, log_every=1, quiet=True)
    loop.run(Line(), PARTS, tmp_path / "two", seed=0, workers=0, log_every=1, quiet=True)
    logs = [
        [json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
        for run in ("one", "two")
    ]
    assert len(logs[0]) == len(logs[1]) == OPT.steps
    for one, two in zip(*logs, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
    one, two = (tensors(tmp_path / run, OPT.steps) for run in ("one", "two"))
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-5, atol=1e-6)


def test_the_pieces_of_a_run_that_was_stopped(tmp_path: Path) -> None:
    short = Optimization(**{**PARTS.__dict__, "steps": 5, "schedule": "constant"})
    long = Optimization(**{**PARTS.__dict__, "schedule": "constant"})
    whole = loop.run(Line(), long, tmp_path / "whole", seed=0, workers=0, quiet=True)
    loop.run(Line(), short, tmp_path / "parts", seed=0, workers=0, quiet=True)
    parts = loop.run(Line(), long, tmp_path / "parts", seed=0, workers=0, quiet=True)
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


def test_bfloat16_moments_survive_a_stop_bit_for_bit(tmp_path: Path) -> None:
    long = Optimization(**{**OPT.__dict__, "moments": "bf16", "schedule": "constant"})
    short = Optimization(**{**long.__dict__, "steps": 5})
    whole = loop.run(Line(), long, tmp_path / "whole", seed=0, workers=0, quiet=True)
    loop.run(Line(), short, tmp_path / "parts", seed=0, workers=0, quiet=True)
    parts = loop.run(Line(), long, tmp_path / "parts", seed=0, workers=0, quiet=True)
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


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
    with pytest.raises(SpearError, match="frozen_precision bf16 needs precision bf16"):
        Stepper(Line(), opt, seed=0)
