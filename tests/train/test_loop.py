"""The loop: schedule, freezing, checkpoints, and a killed run that continues bit for bit.

Most tests train `Regression`, a network of two linear layers, "0" (4 → 16) and "2" (16 → 1), whose
batches depend on the step alone. A run's log has one row per step, which counts steps from 1.
"""

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

from data_tiny import edit_json
from processes import wait_until
from refusals import refuses
from spear.errors import SpearError, notice
from spear.train import log, optimize
from spear.train.checkpoint import find_newest_checkpoint
from spear.train.loop import load_pieces
from spear.train.options import Optimization
from spear.util.run_lock import try_to_hold_lock
from train_tiny import (
    NonFiniteRegression,
    Regression,
    read_log,
    read_losses,
    run_loop,
    start_processes,
)

FORTY_STEPS = Optimization(steps=40, lr=1e-2, warmup=5, ema=0.9, precision="fp32")
FOUR_STEPS = replace(FORTY_STEPS, steps=4)


def read_progress(out: Path) -> list[tuple[int, float, float]]:
    """Return step, loss and gradient norm of each row of a run's log."""
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_log(out)]


def test_training_lowers_the_loss_and_logs_every_step(tmp_path: Path) -> None:
    averaged = run_loop(Regression(), FORTY_STEPS, tmp_path, seed=1)

    losses = read_losses(tmp_path)
    assert [row["step"] for row in read_log(tmp_path)] == list(range(1, 41))
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])  # the last ten and the first ten steps
    assert set(averaged) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_the_two_newest_checkpoints_stay_and_remnants_of_killed_processes_go(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "checkpoints"
    (folder / ".part-step-00000003").mkdir(parents=True)

    run_loop(Regression(), FORTY_STEPS, tmp_path, save_every=10)

    assert sorted(path.name for path in folder.iterdir()) == ["step-00000030", "step-00000040"]


# Rank of the training process, number of its worker processes, and number of notices on stderr.
@pytest.mark.parametrize(
    ("rank", "workers", "num_notices"), [("0", 0, 4), ("0", 2, 2), ("1", 0, 0), ("1", 2, 0)]
)
def test_one_of_all_processes_gives_the_notices(
    rank: str,
    workers: int,
    num_notices: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Each of four batches has a notice, and the first of two workers makes two of the batches."""

    def show_warning(message: Warning | str, *_: Any) -> None:
        print(message, file=sys.stderr, flush=True)

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(warnings, "showwarning", show_warning)
    task = SimpleNamespace(batch=lambda step: {"is_given": notice(f"odd batch {step}")})

    batches = list(load_pieces(task, first_step=0, end_step=4, workers=workers))

    assert len(batches) == 4
    assert capfd.readouterr().err.count("odd batch") == num_notices


def test_the_learning_rate_follows_the_schedule() -> None:
    """The factor rises linearly in 10 steps, and falls to a tenth in the other 100 steps."""
    opt = Optimization(steps=110, lr=1.0, warmup=10, final_lr=0.1)

    assert optimize.compute_learning_rate_factor(0, opt) == pytest.approx(0.1)
    assert optimize.compute_learning_rate_factor(9, opt) == pytest.approx(1.0)
    # Half of the fall is over after step 60, at the mean of 1 and 0.1.
    assert optimize.compute_learning_rate_factor(60, opt) == pytest.approx(0.55)
    assert optimize.compute_learning_rate_factor(109, opt) == pytest.approx(0.1, abs=1e-3)
    assert optimize.compute_learning_rate_factor(109, replace(opt, schedule="constant")) == 1.0


def test_modules_have_their_own_learning_rate_and_vectors_no_weight_decay() -> None:
    task = Regression()
    opt = Optimization(steps=5, lr=1e-2, lr_scale={"2": 0.1, "2.bias": 0.5})
    optimize.apply_freeze(task.model, opt)

    groups = optimize.make_optimizer(task.model, opt).param_groups

    # Layer "2" has a tenth of the learning rate, but its bias half of it.
    num_parameters = {}
    for group in groups:
        key = (group["peak"], group["weight_decay"] > 0)
        num_parameters[key] = sum(parameter.numel() for parameter in group["params"])
    assert num_parameters == {  # (learning rate, has weight decay) -> number of parameters
        (1e-2, True): 64,  # 0.weight
        (1e-2, False): 16,  # 0.bias
        (1e-3, True): 16,  # 2.weight
        (5e-3, False): 1,  # 2.bias
    }


def test_steps_that_are_run_again_are_logged_once(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    # The steps 0 to 4, then a resumed run from step 3 to 5, which repeats two of them.
    for first_step, end_step in ((0, 5), (3, 6)):
        # TensorBoard sorts its files by the second in their names, so each begins in a new second.
        time.sleep(1 - time.time() % 1)
        with log.Logger(tmp_path, first_step=first_step, num_steps=9, log_every=1) as logger:
            for step in range(first_step, end_step):
                logger.log(step, {"loss": 1.0})

    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    # Logs count steps from 1.
    assert [event.step for event in events] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_ema_is_the_ramped_average(tmp_path: Path) -> None:
    task = Regression()
    expected = {}
    for name, parameter in task.model.named_parameters():
        expected[name] = parameter.detach().clone().double()
    opt = Optimization(steps=6, lr=1e-2, warmup=1, ema=0.9, precision="fp32", schedule="constant")

    # Train one step more each time, continuing from the checkpoint, to see the weights after it.
    for step in range(1, 7):
        averaged = run_loop(task, replace(opt, steps=step), tmp_path, save_every=1)
        decay = min(0.9, step / (9 + step))  # (1 + k) / (10 + k) for k = step - 1
        for name, parameter in task.model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach().double()

    averaged_in_float64 = {name: value.double() for name, value in averaged.items()}
    torch.testing.assert_close(averaged_in_float64, expected, rtol=1e-5, atol=1e-7)


def test_only_the_trainable_rows_change(tmp_path: Path) -> None:
    task = Regression()
    vars(task)["trainable_rows"] = {"0.weight": (2, 5)}  # the rows 2, 3 and 4 of 16
    original = task.model.get_parameter("0.weight").detach().clone()

    averaged = run_loop(task, replace(FORTY_STEPS, weight_decay=0.5), tmp_path)

    is_unchanged = (original == averaged["0.weight"]).all(dim=1)
    assert not is_unchanged[2:5].any()
    assert is_unchanged[:2].all()
    assert is_unchanged[5:].all()


def test_trainable_rows_of_an_unknown_parameter_are_an_error() -> None:
    """Otherwise a misspelled name would let all rows of the parameter learn."""
    task = Regression()
    vars(task)["trainable_rows"] = {"0.wieght": (2, 5)}

    with pytest.raises(AttributeError, match="wieght"):
        optimize.Stepper(task, FORTY_STEPS, seed=0)


def test_gradients_of_trainable_rows_are_clipped_to_a_norm() -> None:
    """The norm of the clipped gradient is seen in AdamW's first moment.

    After one step the first moment is 0.1 of the gradient (1 - beta of 0.9), so its norm is 0.025
    for a gradient clipped to 0.25. The update itself does not depend on the gradient's norm.
    """
    task = Regression(scale=100.0)
    vars(task)["trainable_rows"] = {"0.weight": (2, 5)}
    stepper = optimize.Stepper(task, replace(FORTY_STEPS, grad_clip=0.25), seed=0)

    values = stepper(0, [task.batch(0)])

    optimizer_state = stepper.optimizer.state
    moments = [optimizer_state[parameter]["exp_avg"] for parameter in task.model.parameters()]
    norm = float(torch.cat([moment.flatten() for moment in moments]).norm())
    assert norm == pytest.approx(0.025, rel=1e-4)
    assert values["grad_norm"] > 1  # before clipping
    assert not moments[0][:2].any()  # 0.weight, rows that do not learn
    assert moments[0][2:5].any()


@pytest.mark.parametrize("in_gradient", [False, True])
def test_a_step_that_is_not_finite_is_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], in_gradient: bool
) -> None:
    opt = replace(FORTY_STEPS, schedule="constant")
    task = NonFiniteRegression(bad_steps={6}, in_gradient=in_gradient)
    run_loop(task, replace(opt, steps=6), tmp_path)
    weights = {
        name: parameter.detach().clone() for name, parameter in task.model.named_parameters()
    }

    averaged = run_loop(task, replace(opt, steps=7), tmp_path)  # step 6, counted from 0, is bad

    for name, parameter in task.model.named_parameters():
        assert torch.equal(weights[name], parameter)
    assert all(value.isfinite().all() for value in averaged.values())
    message = capsys.readouterr().err
    assert "step 7" in message
    assert ("gradient" if in_gradient else "loss") in message
    last_row = read_log(tmp_path)[-1]
    assert last_row["step"] == 7
    assert last_row["grad_norm" if in_gradient else "loss"] is None


@pytest.mark.parametrize("in_gradient", [False, True])
def test_the_batch_of_a_skipped_step_gives_its_loss_again(
    tmp_path: Path, in_gradient: bool
) -> None:
    """The stored batch has the loss of the log again, with the random numbers of its origin.

    A loss with another seed or another piece number differs.
    """
    opt = replace(FORTY_STEPS, schedule="constant", steps=7)
    task = NonFiniteRegression(bad_steps={6}, in_gradient=in_gradient)
    run_loop(task, opt, tmp_path, seed=5)

    (file,) = (tmp_path / "not-finite").iterdir()
    batch, origin = log.load_batch(file)

    assert origin == {"step": 6, "number": 6, "seed": 5}
    assert batch["nested"]["is_bad"]
    losses = []
    for seed, number in ((5, 6), (5, 7), (6, 6)):
        loss, _ = task.loss(batch, optimize.make_step_generator(seed, number))
        losses.append(loss.item())
    # If only the gradient was not finite, the loss is finite.
    is_finite = bool(torch.tensor(losses[0]).isfinite())
    assert is_finite == in_gradient
    if in_gradient:
        assert losses[0] == pytest.approx(read_losses(tmp_path)[-1], rel=1e-6)
        assert len(set(losses)) == 3


def test_a_skipped_batch_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Files are written under another name and then renamed; here renaming fails.
    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError(errno.ENOSPC, "full")))

    origin = {"step": 0, "number": 0, "seed": 0}
    batch = {"x": torch.ones(3)}
    words = "not-finite/step-.*disk is full"
    refuses(words, log.save_batch, tmp_path, **origin, batch=batch)

    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_too_many_steps_that_are_not_finite_end_the_run(tmp_path: Path) -> None:
    opt = replace(FORTY_STEPS, max_skipped=2)

    task = NonFiniteRegression(bad_steps={3, 5, 8})
    refuses(r"step 9.*2 skipped steps", run_loop, task, opt, tmp_path, save_every=4)

    # The run continues from the checkpoint after step 8. The two steps that were skipped before it
    # still count, so the third one ends the run again.
    task = NonFiniteRegression(bad_steps={8})
    refuses("step 9", run_loop, task, opt, tmp_path, save_every=4)


RUN_SETTINGS = {"--init": "one", "preset": "nano"}


# Each change is of one run setting.
@pytest.mark.parametrize("change", [{"--init": "two"}, {"--init": None}, {"preset": "small"}])
def test_a_run_does_not_continue_with_other_run_settings(change: Any, tmp_path: Path) -> None:
    run_loop(Regression(), FOUR_STEPS, tmp_path, RUN_SETTINGS)

    (name,) = change
    changed = {**RUN_SETTINGS, **change}
    refuses(f"another {name}", run_loop, Regression(), FOUR_STEPS, tmp_path, changed)


def test_a_run_does_not_continue_with_another_seed_or_fewer_steps(tmp_path: Path) -> None:
    run_loop(Regression(), FOUR_STEPS, tmp_path)

    refuses("another seed", run_loop, Regression(), FORTY_STEPS, tmp_path, seed=1)
    two_steps = replace(FORTY_STEPS, steps=2)
    refuses("4 steps, more than 2", run_loop, Regression(), two_steps, tmp_path)


def test_a_run_continues_with_another_learning_rate_and_more_steps(tmp_path: Path) -> None:
    run_loop(Regression(), FOUR_STEPS, tmp_path, RUN_SETTINGS)

    run_loop(Regression(), replace(FORTY_STEPS, steps=6, lr=1e-3), tmp_path, RUN_SETTINGS)

    assert read_log(tmp_path)[-1]["step"] == 6


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """The folder of a run of four steps."""
    run_loop(Regression(), FOUR_STEPS, tmp_path)
    return tmp_path


def refuses_to_continue(words: str, out: Path) -> None:
    """Continue the run in `out`, which must be refused with these words."""
    refuses(words, run_loop, Regression(), FORTY_STEPS, out)


def test_a_checkpoint_of_another_model_is_refused(trained: Path) -> None:
    other_task = Regression()
    other_task.model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
    )

    refuses(r"model\.0\.weight", run_loop, other_task, FORTY_STEPS, trained)


def test_a_checkpoint_with_cut_off_or_missing_weights_is_named(trained: Path) -> None:
    (weights,) = trained.glob("checkpoints/step-00000004/*.safetensors")

    weights.write_bytes(weights.read_bytes()[:-8])  # without the last 8 bytes
    refuses_to_continue("step-00000004", trained)

    weights.unlink()
    refuses_to_continue(weights.name, trained)


def test_a_checkpoint_whose_state_lacks_a_key_is_named(trained: Path) -> None:
    path = trained / "checkpoints" / "step-00000004" / "state.json"
    state = json.loads(path.read_text())

    path.write_text(json.dumps({"step": 4, "settings": {"seed": 0}}))
    refuses_to_continue("pieces", trained)

    # The number of updates of a parameter has to be a number.
    path.write_text(json.dumps({**state, "counts": {"0.bias": None}}))
    refuses_to_continue("counts", trained)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_batch_is_one_line(workers: int, tmp_path: Path) -> None:
    message = "broken image: step 3: leave it out"
    task = Regression()
    # mypy allows no assignment to a method.
    vars(task)["batch"] = Mock(side_effect=SpearError(message))

    assert refuses("", run_loop, task, FOUR_STEPS, tmp_path, workers=workers) == message


def run_slowly(root: Path, options: dict[str, Any]) -> None:
    """Train 40 steps of 0.05 s; this is run in a process that the test ends by a signal."""
    # The tests may run as a shell's background job, whose processes ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run_loop(Regression(delay_s=0.05), FORTY_STEPS, root / "stopped", seed=3, **options)


# Options of the run, the signal that ends it, and the exit code of its process. A killed run needs
# checkpoints by steps or by time; on the other signals the run saves one itself.
@pytest.mark.parametrize(
    ("options", "signal_number", "exit_code"),
    [
        ({"workers": 1, "save_every": 5}, signal.SIGKILL, -9),
        ({"save_minutes": 1e-6}, signal.SIGKILL, -9),
        ({"workers": 1}, signal.SIGTERM, 143),
        # `multiprocessing` turns KeyboardInterrupt into exit code 1.
        ({"workers": 1}, signal.SIGINT, 1),
    ],
)
def test_a_run_that_a_signal_stopped_continues_bit_for_bit(
    options: Any, signal_number: int, exit_code: int, tmp_path: Path
) -> None:
    uninterrupted = tmp_path / "uninterrupted"
    stopped = tmp_path / "stopped"
    run_loop(Regression(), FORTY_STEPS, uninterrupted, seed=3)
    log_file = stopped / "log.jsonl"

    num_processes = 1
    (process,) = start_processes(run_slowly, tmp_path, num_processes, options)
    wait_until(lambda: log_file.is_file() and len(read_log(stopped)) >= 12, "12 steps", process)
    os.kill(process.pid, signal_number)
    process.join()

    assert process.exitcode == exit_code
    num_done = read_log(stopped)[-1]["step"]
    assert 12 <= num_done < FORTY_STEPS.steps
    _, state = find_newest_checkpoint(stopped / "checkpoints")
    if signal_number == signal.SIGKILL:
        assert 0 < state["step"] <= num_done
    else:
        assert state["step"] == num_done

    # A broken line in the log does no harm.
    log_file.write_bytes(log_file.read_bytes() + b"{\xff\n")
    run_loop(Regression(), FORTY_STEPS, stopped, seed=3)
    # Compared as text, because NaN does not equal NaN otherwise.
    assert json.dumps(read_progress(uninterrupted)) == json.dumps(read_progress(stopped))


def test_frozen_modules_have_no_gradient_no_state_and_weights_in_bfloat16() -> None:
    task = Regression()
    opt = Optimization(steps=2, lr=1e-2, frozen=("0",), frozen_precision="bf16")
    stepper = optimize.Stepper(task, opt, seed=0)

    stepper(0, [task.batch(0)])

    frozen_layer, _, trained_layer = task.model
    assert frozen_layer.weight.dtype == torch.bfloat16
    assert trained_layer.weight.dtype == torch.float32
    assert frozen_layer.weight.grad is None
    assert trained_layer.weight.grad is not None
    assert set(stepper.optimizer.state) == {trained_layer.weight, trained_layer.bias}
    assert stepper.ema is not None
    assert set(stepper.ema) == {"2.weight", "2.bias"}


def test_frozen_weights_in_bfloat16_need_autocast() -> None:
    opt = Optimization(steps=2, lr=1e-2, frozen_precision="bf16")

    refuses("frozen_precision", replace, opt, precision="fp32")


def test_only_one_process_may_train_into_a_folder(tmp_path: Path) -> None:
    with try_to_hold_lock(tmp_path / ".lock"):
        refuses("another process is training", run_loop, Regression(), FOUR_STEPS, tmp_path)

    assert find_newest_checkpoint(tmp_path / "checkpoints") is None


def test_the_minutes_of_a_continued_run_add_up(trained: Path) -> None:
    path = trained / "checkpoints" / "step-00000004" / "state.json"
    edit_json(path, lambda state: state.update(minutes=7.0))

    run_loop(Regression(), replace(FOUR_STEPS, steps=6), trained)

    _, state = find_newest_checkpoint(trained / "checkpoints")
    assert 7.0 < state["minutes"] < 8.0  # the earlier 7 minutes and the short time since
