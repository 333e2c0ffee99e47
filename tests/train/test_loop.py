"""The loop's own promises: schedule, freezing, checkpoints, and a killed run that continues bit for bit."""

import errno
import json
import os
import signal
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from data_tiny import edit
from processes import until
from refusals import refuses
from spear.errors import SpearError, notice
from spear.train import log, optimize
from spear.train.checkpoint import find_newest
from spear.train.loop import load_batches
from spear.train.options import Optimization
from spear.util.run_lock import hold_lock
from train_tiny import Broken, Regression, go, rows, start

SMALL = Optimization(steps=40, lr=1e-2, warmup=5, ema=0.9, precision="fp32")
FOUR = replace(SMALL, steps=4)


def losses(out: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows(out)]


def test_training_learns_and_logs_and_keeps_the_newest_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".part-step-00000003").mkdir(
        parents=True
    )  # of a process that was killed
    averaged = go(Regression(), SMALL, tmp_path, seed=1, save_every=10)
    logged = losses(tmp_path)
    assert [r[0] for r in logged] == list(range(1, 41))
    assert sum(r[1] for r in logged[-10:]) < 0.7 * sum(r[1] for r in logged[:10])
    assert set(averaged) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000030",
        "step-00000040",
    ]


@pytest.mark.parametrize(
    ("rank", "workers", "said"), [("0", 0, 4), ("0", 2, 2), ("1", 0, 0), ("1", 2, 0)]
)
def test_one_of_all_processes_gives_the_notices(
    rank: str,
    workers: int,
    said: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Of two workers the first makes half of the batches."""
    monkeypatch.setenv("RANK", rank)
    show = lambda message, *_: print(message, file=sys.stderr, flush=True)  # noqa: E731
    monkeypatch.setattr(warnings, "showwarning", show)
    task = SimpleNamespace(batch=lambda step: {"said": notice(f"odd batch {step}")})
    assert len(list(load_batches(task, 0, 4, workers))) == 4
    assert capfd.readouterr().err.count("odd batch") == said


def test_rates_follow_the_schedule_and_the_module() -> None:
    opt = Optimization(steps=110, lr=1.0, warmup=10, final_lr=0.1)
    for step, rate in ((0, 0.1), (9, 1.0), (60, 0.55)):
        assert optimize.learning_rate(step, opt) == pytest.approx(rate)
    assert optimize.learning_rate(109, opt) == pytest.approx(0.1, abs=1e-3)
    assert optimize.learning_rate(109, replace(opt, schedule="constant")) == 1.0
    task = Regression()
    opt = Optimization(steps=5, lr=1e-2, lr_scale={"2": 0.1, "2.bias": 0.5})
    optimize.apply_freeze(task.model, opt)
    groups = optimize.make_optimizer(task.model, opt).param_groups
    rates = {
        (g["peak"], g["weight_decay"] > 0): sum(p.numel() for p in g["params"]) for g in groups
    }
    assert rates == {(1e-2, True): 64, (1e-2, False): 16, (1e-3, True): 16, (5e-3, False): 1}


def test_steps_that_are_run_again_are_logged_once(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, last in ((0, 5), (3, 6)):
        time.sleep(
            1 - time.time() % 1
        )  # the names of TensorBoard's files are in order by the second
        with log.Logger(tmp_path, first, 9, log_every=1) as logger:
            for step in range(first, last):
                logger.log(step, {"loss": 1.0})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert (
        [event.step for event in events]
        == [row["step"] for row in rows(tmp_path)]
        == [1, 2, 3, 4, 5, 6]
    )


def test_ema_is_the_ramped_average(tmp_path: Path) -> None:
    task = Regression()
    expected = {n: p.detach().clone().double() for n, p in task.model.named_parameters()}
    opt = Optimization(steps=6, lr=1e-2, warmup=1, ema=0.9, precision="fp32", schedule="constant")
    for step in range(1, 7):  # step by step, through checkpoints, to look at the weights between
        averaged = go(task, replace(opt, steps=step), tmp_path, save_every=1)
        decay = min(0.9, step / (9 + step))
        for name, parameter in task.model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach().double()
    torch.testing.assert_close(
        {n: v.double() for n, v in averaged.items()}, expected, rtol=1e-5, atol=1e-7
    )


def test_rows_that_do_not_learn_stay_as_they_are(tmp_path: Path) -> None:
    task, name = Regression(), "0.weight"
    vars(task)["trainable_rows"] = {name: (2, 5)}
    before = task.model.get_parameter(name).detach().clone()
    same = (before == go(task, replace(SMALL, weight_decay=0.5), tmp_path)[name]).all(dim=1)
    assert not same[2:5].any() and same[:2].all() and same[5:].all()
    vars(task)["trainable_rows"] = {"0.wieght": (2, 5)}  # else all of them would learn
    with pytest.raises(AttributeError, match="wieght"):
        optimize.Stepper(task, SMALL, seed=0)


def test_gradients_of_what_learns_are_cut_to_a_length() -> None:
    """Seen in AdamW's first moment, 0.1 of the gradient; its update does not depend on the length."""
    task = Regression(scale=100.0)
    vars(task)["trainable_rows"] = {"0.weight": (2, 5)}
    stepper = optimize.Stepper(task, replace(SMALL, grad_clip=0.25), seed=0)
    said = stepper(0, [task.batch(0)])
    moments = [stepper.optimizer.state[p]["exp_avg"] for p in task.model.parameters()]
    assert float(torch.cat([m.flatten() for m in moments]).norm()) == pytest.approx(0.025, rel=1e-4)
    assert said["grad_norm"] > 1 and not moments[0][:2].any() and moments[0][2:5].any()


@pytest.mark.parametrize("gradient", [False, True])
def test_a_step_that_is_not_finite_is_skipped_and_its_batch_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], gradient: bool
) -> None:
    opt, task = replace(SMALL, schedule="constant"), Broken({6}, gradient)
    go(task, replace(opt, steps=6), tmp_path, seed=5)
    weights = {n: p.detach().clone() for n, p in task.model.named_parameters()}
    averaged = go(task, replace(opt, steps=7), tmp_path, seed=5)
    assert all(torch.equal(weights[n], p) for n, p in task.model.named_parameters())
    assert all(v.isfinite().all() for v in averaged.values())
    said = capsys.readouterr().err
    assert "step 7" in said and ("gradient" if gradient else "loss") in said
    last = rows(tmp_path)[-1]
    assert last["step"] == 7 and last["grad_norm" if gradient else "loss"] is None
    (file,) = (tmp_path / "not-finite").iterdir()
    batch, about = log.load_batch(file)
    assert about == {"step": 6, "number": 6, "seed": 5} and batch["more"]["broken"]
    tries = [
        task.loss(batch, optimize.step_generator(*of))[0].detach()
        for of in ((5, 6), (5, 7), (6, 6))
    ]
    assert tries[0].isfinite() == gradient
    if gradient:  # that of the step; others and other seeds have other random numbers
        assert tries[0].item() == pytest.approx(last["loss"], rel=1e-6)
        assert len({one.item() for one in tries}) == 3


def test_a_batch_is_kept_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError(errno.ENOSPC, "full")))
    refuses(
        "not-finite/step-.*disk is full", log.save_batch, tmp_path, 0, 0, 0, {"x": torch.ones(3)}
    )
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_one_step_too_many_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    opt = replace(SMALL, max_skipped=2)
    refuses(r"step 9.*2 skipped steps", go, Broken({3, 5, 8}), opt, tmp_path, save_every=4)
    refuses(
        "step 9", go, Broken({8}), opt, tmp_path, save_every=4
    )  # those before the checkpoint still count


def test_a_run_is_continued_only_by_the_same(tmp_path: Path) -> None:
    about = {"--init": "one", "preset": "nano"}
    go(Regression(), FOUR, tmp_path, about)
    for changed in ({"--init": "two"}, {"--init": None}, {"preset": "small"}):
        refuses(
            f"another {next(iter(changed))}", go, Regression(), FOUR, tmp_path, {**about, **changed}
        )
    refuses("another seed", go, Regression(), SMALL, tmp_path, about, seed=1)
    refuses("4 steps, more than 2", go, Regression(), replace(SMALL, steps=2), tmp_path, about)
    go(Regression(), replace(SMALL, steps=6, lr=1e-3), tmp_path, about)


def test_a_checkpoint_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    go(Regression(), FOUR, tmp_path)
    other = Regression()
    other.model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    refuses(r"model\.0\.weight", go, other, SMALL, tmp_path)
    latest, _ = find_newest(tmp_path / "checkpoints")
    (weights,) = latest.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-8])
    refuses("step-00000004", go, Regression(), SMALL, tmp_path)
    weights.unlink()
    refuses(weights.name, go, Regression(), SMALL, tmp_path)
    empty = {**json.loads((latest / "state.json").read_text()), "counts": {"0.bias": None}}
    for state, key in (({"step": 4, "settings": {"seed": 0}}, "pieces"), (empty, "counts")):
        (latest / "state.json").write_text(json.dumps(state))
        refuses(key, go, Regression(), SMALL, tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_wrong_with_a_batch_is_one_line(workers: int, tmp_path: Path) -> None:
    task = Regression()
    vars(task)["batch"] = Mock(side_effect=SpearError("broken image: step 3: leave it out"))
    assert (
        refuses("", go, task, FOUR, tmp_path, workers=workers)
        == "broken image: step 3: leave it out"
    )


def slow_run(root: Path, saves: dict[str, Any]) -> None:
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # which a shell's background jobs ignore
    go(Regression(pause=0.05), SMALL, root / "ended", seed=3, **saves)


@pytest.mark.parametrize(
    ("saves", "number", "code"),
    [
        ({"workers": 1, "save_every": 5}, signal.SIGKILL, -9),
        ({"save_minutes": 1e-6}, signal.SIGKILL, -9),
        ({"workers": 1}, signal.SIGTERM, 143),  # when told
        ({"workers": 1}, signal.SIGINT, 1),  # as any process whose function is interrupted
    ],
)
def test_ended_by_a_signal_and_the_same_again(
    saves: Any, number: int, code: int, tmp_path: Path
) -> None:
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    go(Regression(), SMALL, whole, seed=3)
    (process,) = start(slow_run, tmp_path, 1, saves)
    until(lambda: (ended / "log.jsonl").is_file() and len(losses(ended)) >= 12, "12 steps", process)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == code
    done, kept = losses(ended)[-1][0], find_newest(ended / "checkpoints")[1]["step"]
    assert 12 <= done < SMALL.steps
    assert kept == done if number != signal.SIGKILL else 0 < kept <= done
    (log := ended / "log.jsonl").write_bytes(log.read_bytes() + b"{\xff\n")  # a disk's mistake
    go(Regression(), SMALL, ended, seed=3)
    assert json.dumps(losses(whole)) == json.dumps(losses(ended))


def test_frozen_parts_have_no_gradient_no_state_and_half_the_weights() -> None:
    task = Regression()
    opt = Optimization(steps=2, lr=1e-2, frozen=("0",), frozen_precision="bf16")
    stepper = optimize.Stepper(task, opt, seed=0)
    stepper(0, [task.batch(0)])
    first, _, second = task.model
    assert first.weight.dtype == torch.bfloat16 and second.weight.dtype == torch.float32
    assert first.weight.grad is None and second.weight.grad is not None
    assert set(stepper.optimizer.state) == {second.weight, second.bias}
    assert stepper.ema is not None and set(stepper.ema) == {"2.weight", "2.bias"}
    refuses("frozen_precision", replace, opt, precision="fp32")


def test_one_run_at_a_time_and_its_minutes_add_up(tmp_path: Path) -> None:
    def minutes() -> float:
        found = find_newest(tmp_path / "checkpoints")
        return 0.0 if found is None else float(found[1]["minutes"])

    with (
        hold_lock(tmp_path / ".lock"),
        pytest.raises(SpearError, match="another process is training"),
    ):
        go(Regression(), FOUR, tmp_path)
    assert minutes() == 0.0
    go(Regression(), FOUR, tmp_path)
    edit(tmp_path / "checkpoints/step-00000004/state.json", lambda said: said.update(minutes=7.0))
    go(Regression(), replace(FOUR, steps=6), tmp_path)
    assert 7.0 < minutes() < 8.0
