"""The loop's own promises: schedule, freezing, checkpoints, and a killed run that continues bit for bit."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from spear.errors import SpearError
from spear.train import checkpoint, loop, nonfinite, optimize
from spear.train.log import Logger, Spikes
from spear.train.optimize import Optimization
from train_tiny import Regression

SMALL = Optimization(steps=40, lr=1e-2, warmup=5, ema=0.9, precision="fp32")


def losses(out: Path) -> list[tuple[int, float, float]]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["grad_norm"]) for r in rows]


def test_training_learns_and_logs(tmp_path: Path) -> None:
    averaged = loop.run(Regression(), SMALL, tmp_path, seed=1, workers=0, log_every=1, quiet=True)
    rows = losses(tmp_path)
    assert [r[0] for r in rows] == list(range(1, 41))
    assert sum(r[1] for r in rows[-10:]) < 0.7 * sum(r[1] for r in rows[:10])
    assert set(averaged) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_schedule() -> None:
    opt = Optimization(steps=110, lr=1.0, warmup=10, final_lr=0.1)
    assert optimize.learning_rate(0, opt) == pytest.approx(0.1)
    assert optimize.learning_rate(9, opt) == pytest.approx(1.0)
    assert optimize.learning_rate(60, opt) == pytest.approx(0.55)
    assert optimize.learning_rate(109, opt) == pytest.approx(0.1, abs=1e-3)
    constant = Optimization(steps=110, lr=1.0, warmup=10, schedule="constant")
    assert optimize.learning_rate(109, constant) == 1.0


def test_ema_is_the_ramped_average(tmp_path: Path) -> None:
    task = Regression()
    expected = {n: p.detach().clone().double() for n, p in task.model.named_parameters()}
    opt = Optimization(steps=6, lr=1e-2, warmup=1, ema=0.9, precision="fp32")
    for step in range(
        1, 7
    ):  # step by step, through checkpoints, so that the weights can be looked at between
        part = Optimization(**{**opt.__dict__, "steps": step, "schedule": "constant"})
        averaged = loop.run(task, part, tmp_path, seed=0, workers=0, save_every=1, quiet=True)
        decay = min(0.9, step / (9 + step))
        for name, parameter in task.model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach().double()
    for name, value in averaged.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-7)


def test_frozen_modules_stay_bit_for_bit(tmp_path: Path) -> None:
    task = Regression()
    before = {n: p.detach().clone() for n, p in task.model.named_parameters()}
    opt = Optimization(steps=5, lr=1e-2, warmup=1, frozen=("0",), weight_decay=0.5, precision="fp32")
    loop.run(task, opt, tmp_path, seed=0, workers=0, quiet=True)
    after = dict(task.model.named_parameters())
    assert torch.equal(before["0.weight"], after["0.weight"]) and torch.equal(
        before["0.bias"], after["0.bias"]
    )
    assert not torch.equal(before["2.weight"], after["2.weight"])


def test_a_freeze_schedule_that_names_nothing_is_refused(tmp_path: Path) -> None:
    opt = Optimization(steps=5, lr=1e-2, frozen=("encoder",))
    with pytest.raises(SpearError, match="'encoder': no such module"):
        loop.run(Regression(), opt, tmp_path, seed=0, workers=0, quiet=True)


def test_learning_rates_per_module() -> None:
    task = Regression()
    opt = Optimization(steps=5, lr=1e-2, lr_scale={"2": 0.1})
    optimize.apply_freeze(task.model, opt)
    groups = optimize.make_optimizer(task.model, opt).param_groups
    rates = {(g["peak"], g["weight_decay"] > 0): sum(p.numel() for p in g["params"]) for g in groups}
    assert rates == {(1e-2, True): 64, (1e-2, False): 16, (1e-3, True): 16, (1e-3, False): 1}


class Broken(Regression):
    """The loss, or the gradient alone, of the steps in `bad` is not finite."""

    def __init__(self, bad: set[int], gradient: bool = False) -> None:
        super().__init__()
        self.bad, self.gradient = bad, gradient

    def batch(self, step: int) -> dict[str, Any]:
        broken = torch.tensor(float(step in self.bad))
        return {**super().batch(step), "more": {"broken": broken, "name": f"batch {step}"}}

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Any:
        loss, parts = super().loss(batch, generator)
        if batch["more"]["broken"]:
            weight = self.model[0].weight.sum()
            # The root's slope at zero is infinite, its value is not.
            loss = loss + (weight - weight.detach()).abs().sqrt() if self.gradient else loss * math.nan
        return loss, parts


@pytest.mark.parametrize("gradient", [False, True])
def test_a_step_that_is_not_finite_is_skipped_and_its_batch_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], gradient: bool
) -> None:
    before = Optimization(**{**SMALL.__dict__, "steps": 6, "schedule": "constant"})
    after = Optimization(**{**before.__dict__, "steps": 7})
    task = Broken({6}, gradient)
    loop.run(task, before, tmp_path, seed=5, workers=0, log_every=1, quiet=True)
    weights = {n: p.detach().clone() for n, p in task.model.named_parameters()}
    averaged = loop.run(task, after, tmp_path, seed=5, workers=0, log_every=1, quiet=True)
    assert all(torch.equal(weights[n], p) for n, p in task.model.named_parameters())
    assert all(v.isfinite().all() for v in averaged.values())
    what = "gradient" if gradient else "loss"
    assert (
        f"step 7: the {what} is not finite: skipped (1 of at most 10); its batch is in"
        in capsys.readouterr().err
    )
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 7 and last["grad_norm" if gradient else "loss"] is None
    (file,) = (tmp_path / "not-finite").iterdir()
    batch, about = nonfinite.load_batch(file)
    assert about == {"step": 6, "number": 6, "seed": 5} and batch["more"]["name"] == "batch 6"
    loss, _ = task.loss(batch, optimize.step_generator(about["seed"], about["number"]))
    loss.backward()
    assert loss.isfinite() == gradient and not task.model[0].weight.grad.isfinite().all()


def test_too_many_steps_that_are_not_finite_end_the_run(tmp_path: Path) -> None:
    opt = Optimization(**{**SMALL.__dict__, "max_skipped": 2})
    with pytest.raises(
        SpearError, match=r"step 9: the loss is not finite, and 2 steps were skipped before: look"
    ):
        loop.run(Broken({3, 5, 8, 9}), opt, tmp_path, seed=0, workers=0, save_every=7, quiet=True)
    with pytest.raises(SpearError, match=r"step 9: .* and 2 steps were skipped before"):  # it remembers
        loop.run(Broken({8}), opt, tmp_path, seed=0, workers=0, quiet=True)
    assert len(list((tmp_path / "not-finite").iterdir())) == 3


def test_loss_spikes_are_counted() -> None:
    noise = torch.randn(400, generator=torch.Generator().manual_seed(0))
    spikes = Spikes()
    for step in range(1, 401):
        jump = 3.0 if step in (30, 200, 300) else 0.0  # the first is too early to tell
        spikes.add(step, 2 * 0.99**step + 0.1 * float(noise[step - 1]) + jump)
    assert (spikes.count, spikes.last) == (2, 300)
    spikes.add(401, math.nan)
    assert spikes.count == 2


def test_waiting_for_data_is_told(tmp_path: Path) -> None:
    class Slow(Regression):
        def batch(self, step: int) -> dict[str, Any]:
            time.sleep(0.03)
            return super().batch(step)

    opt = Optimization(**{**SMALL.__dict__, "steps": 10})
    loop.run(Slow(), opt, tmp_path, seed=0, workers=0, log_every=10, quiet=True)
    row = json.loads((tmp_path / "log.jsonl").read_text())
    assert 0.3 < row["data_wait"] <= 1
    log = Logger(tmp_path, 0, 20, quiet=True)
    log.spikes.count, log.spikes.last = 2, 17
    assert log._line(0.34, {"loss": 1.5, "grad_norm": 2.0}) == (
        "waits for data 34%, loss 1.500, 2 loss spikes, last at 17"
    )


def test_another_seed_does_not_continue_a_run(tmp_path: Path) -> None:
    short = Optimization(**{**SMALL.__dict__, "steps": 4})
    loop.run(Regression(), short, tmp_path, seed=0, workers=0, quiet=True)
    with pytest.raises(SpearError, match="another seed"):
        loop.run(Regression(), SMALL, tmp_path, seed=1, workers=0, quiet=True)


def test_a_checkpoint_of_another_model_or_version_is_named(tmp_path: Path) -> None:
    short = Optimization(**{**SMALL.__dict__, "steps": 4})
    loop.run(Regression(), short, tmp_path, seed=0, workers=0, quiet=True)
    other = Regression()
    other.model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    with pytest.raises(SpearError, match=r"of another model or other settings \(model.0.weight differs\)"):
        loop.run(other, SMALL, tmp_path, seed=0, workers=0, quiet=True)
    state = tmp_path / "checkpoints" / "step-00000004" / "state.json"
    state.write_text('{"step": 4, "settings": {"seed": 0}}')
    with pytest.raises(SpearError, match="written by an earlier version"):
        loop.run(Regression(), SMALL, tmp_path, seed=0, workers=0, quiet=True)


def test_a_checkpoint_that_cannot_be_written_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file in the way")
    short = Optimization(**{**SMALL.__dict__, "steps": 4})
    with pytest.raises(SpearError, match="a checkpoint cannot be written to"):
        loop.run(Regression(), short, tmp_path, seed=0, workers=0, quiet=True)


def test_a_truncated_checkpoint_is_named(tmp_path: Path) -> None:
    short = Optimization(**{**SMALL.__dict__, "steps": 4})
    loop.run(Regression(), short, tmp_path, seed=0, workers=0, quiet=True)
    latest = checkpoint.find_latest(tmp_path / "checkpoints")
    assert latest is not None
    (weights,) = latest.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(SpearError, match=r"step-00000004.*cannot be read"):
        loop.run(Regression(), SMALL, tmp_path, seed=0, workers=0, quiet=True)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    loop.run(Regression(), SMALL, tmp_path, seed=0, workers=0, save_every=10, quiet=True)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000030", "step-00000040"]


@pytest.mark.parametrize("workers", [0, 1])
def test_stopping_and_continuing_changes_nothing(tmp_path: Path, workers: int) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    one = loop.run(Regression(), SMALL, whole, seed=3, workers=workers, log_every=1, quiet=True)

    class Stops(Regression):
        def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Any:
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == 18:
                raise KeyboardInterrupt
            return super().loss(batch, generator)

    for _ in range(2):  # stopped twice, 17 steps after each start: between checkpoints
        with pytest.raises(KeyboardInterrupt):
            loop.run(Stops(), SMALL, parts, seed=3, workers=workers, save_every=5, log_every=1, quiet=True)
    two = loop.run(Regression(), SMALL, parts, seed=3, workers=workers, save_every=5, log_every=1, quiet=True)
    assert losses(whole) == losses(parts)
    assert all(torch.equal(one[k], two[k]) for k in one)


SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.train.test_loop import SMALL, Regression
from spear.train import loop
class Slow(Regression):
    def loss(self, batch, generator):
        time.sleep(0.05)
        return super().loss(batch, generator)
loop.run(Slow(), SMALL, Path(sys.argv[1]), seed=3, workers=0, save_every=5, log_every=1, quiet=True)
"""


def test_kill_nine_and_the_same_command_again(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    loop.run(Regression(), SMALL, whole, seed=3, workers=0, log_every=1, quiet=True)
    command = [sys.executable, "-c", SCRIPT, str(killed), str(Path(__file__).parent)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 60
    while not (killed / "checkpoints" / "step-00000010").is_dir():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert losses(killed)[-1][0] < SMALL.steps
    subprocess.run(command, env=environment, check=True)
    assert losses(whole) == losses(killed)
