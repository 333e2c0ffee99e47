"""The training loop. It knows steps, checkpoints and logs; it knows nothing about images or robots.

A run is a pure function of (task, settings, seed): the batch of step k depends on (seed, k) alone,
and so does every random draw inside the model. A killed run therefore continues to the same losses,
on a CPU bit for bit.

The batch of a step consists of pieces (`spear.train.parallel`). Each process handles
`Optimization.accumulate` of them per step. Pieces are numbered through the whole run, and
`Task.batch(number)` makes one of them.
"""

import contextlib
import dataclasses
import functools
import itertools
import signal
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

from spear.errors import SpearError, disable_notices, format_count
from spear.models.devices import is_bfloat16_fast
from spear.train import parallel
from spear.train.checkpoint import Checkpoints, SavedCheckpoint, find_newest_checkpoint
from spear.train.log import SKIPPED_BATCHES, Logger, NonFiniteStep, save_batch
from spear.train.optimize import Batch, Stepper, Task, compute_learning_rate_factor
from spear.train.options import Optimization
from spear.util.run_lock import acquire_run_lock
from spear.util.run_settings import to_plain_json
from spear.util.shared_batches import SharedBatchSlots, SlottedBatch

NUM_BATCHES_AHEAD = 4  # pieces that each worker process loads in advance (our choice)
# Checkpoints that are written by the clock may take at most this fraction of the run's time.
MAX_SAVING_SHARE = 1 / 50
EPISODES_KEY = "--episodes"  # name of a run setting in checkpoints: the datasets
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out, whatever it trains.

    seed          two runs with the same seed give the same weights.
    workers       number of worker processes that load batches in advance; with 0 the training
                  process loads them itself.
    save_every    number of steps between checkpoints.
    save_minutes  a checkpoint is also written after this many minutes, but less often if writing
                  would take more than a fiftieth of the time.
    log_every     number of steps between lines of the log.
    device        the device to which the model is moved; None leaves it where it is.
    sharded       weights, gradients, moments and EMA weights are divided among the processes
                  (`parallel.shard`).
    """

    seed: int = 0
    workers: int = 1
    save_every: int = 500
    save_minutes: float = 3.0
    log_every: int = 20
    device: torch.device | None = None
    sharded: bool = False


def run(
    task: Task,
    opt: Optimization,
    out: Path,
    options: RunOptions | None = None,
    run_settings: Mapping[str, Any] | None = None,
    changeable_settings: Mapping[str, Any] | None = None,
) -> dict[str, torch.Tensor]:
    """Train to `opt.steps`, continuing from the newest checkpoint in `out/checkpoints`.

    On SIGTERM and SIGINT all processes finish their step, save a checkpoint, and raise `SystemExit`
    (143) or `KeyboardInterrupt`.

    Args:
        task: the model, its batches and its loss.
        opt: how the weights are updated.
        out: the run's folder, for checkpoints and logs.
        options: seed, workers, device and so on.
        run_settings: what the run is made from, by name. A run is resumed only if these settings
            are the same.
        changeable_settings: further settings that checkpoints record. They may differ when a run is
            resumed, and so may `opt`.

    Returns:
        The EMA weights of the parameters that learn, by name, or their plain weights when averaging
        is off. The task's model is left in evaluation mode, with plain weights.

    Raises:
        SpearError: for a checkpoint of another seed, model or run, or of a later step than
            `opt.steps`; after more than `opt.max_skipped` steps that were not finite; when a
            process is lost; when another process trains into `out`.
    """
    options = options or RunOptions()

    # What is trained, with which settings.
    opt = resolve_optimization(opt, out, options.device or parallel.CPU)
    stepper = Stepper(task, opt, options.seed, options.device, options.sharded)
    settings: dict[str, Any] = {
        "seed": options.seed,
        "pieces": parallel.get_world_size() * opt.accumulate,
        "optimization": {**dataclasses.asdict(opt), **(changeable_settings or {})},
        "about": dict(run_settings or {}),
    }

    # One run at a time may write to the folder.
    run_lock: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if parallel.get_rank() == 0:
        run_lock = acquire_run_lock(out, "training into")
    with run_lock, Checkpoints(out / "checkpoints", stepper) as checkpoints:
        # Continue where the newest checkpoint is, on all processes.
        progress = _Progress()
        checkpoint = check_and_find_checkpoint_to_resume(
            out, options.seed, settings["about"], opt.steps
        )
        _check_processes_agree(checkpoint, options, settings)
        if checkpoint is not None:
            path, state = checkpoint
            checkpoints.load(path, state["counts"])
            progress.resume(state, settings)

        # Train.
        logger: Logger | None = None
        if parallel.get_rank() == 0:
            logger = Logger(out, progress.first_step, opt.steps, options.log_every)
        saver = _Saver(checkpoints, settings, progress, options, opt.steps)
        with _translate_lost_process_errors():
            _train_steps(stepper, saver, logger, out)

    parallel.wait_for_all_processes()
    stepper.model.eval()
    return stepper.get_trained_weights()


def _train_steps(stepper: Stepper, saver: "_Saver", logger: Logger | None, out: Path) -> None:
    """Run the steps from the last checkpoint to the end: load, update, log, save."""
    opt = stepper.opt
    progress = saver.progress
    loader = load_pieces(
        stepper.task,
        progress.first_step,
        opt.steps,
        saver.options.workers,
        opt.accumulate,
        stepper.device,
    )
    with (
        logger or contextlib.nullcontext(),
        _catch_stop_signal() as signals,
        contextlib.closing(loader) as batches,
    ):
        saver.start_clock()
        for step in range(progress.first_step, opt.steps):
            # Wait for the batches.
            wait_start = time.perf_counter()
            pieces = list(itertools.islice(batches, opt.accumulate))
            waited_s = time.perf_counter() - wait_start

            # Forward, backward and update. A step that is not finite leaves the weights unchanged.
            try:
                values = stepper(step, pieces)
            except NonFiniteStep as problem:
                values = problem.values
                progress.num_skipped += 1
                _save_suspects(problem, step, pieces, stepper.seed, out)
                _report_skip_or_end_run(
                    problem, step, progress.num_skipped, opt.max_skipped, out, logger
                )

            # Log.
            if logger is not None:
                lr = opt.lr * compute_learning_rate_factor(step, opt)
                logger.log(step, values, lr, waited_s)

            # Save when it is time, or when a signal tells a process to stop. All processes have to
            # save in the same step, so each takes the maximum over the processes.
            own_signal = signals[0] if signals else 0  # 0 stands for no signal
            is_due_by_time, stop_signal = parallel.compute_max_over_processes(
                [saver.is_due_by_time(), own_signal]
            )
            if is_due_by_time or stop_signal or saver.is_due_by_step(step):
                saver.save(step)
            if stop_signal:
                saver.checkpoints.wait()
                _end_process(step, stop_signal, logger)


@dataclass
class _Progress:
    """How far a run has come, as its checkpoints record it.

    first_step        the first step that this process does, from 0.
    num_skipped       number of steps skipped so far, because they were not finite.
    earlier_minutes   minutes that the run took before this process continued it.
    earlier_settings  earlier values of settings that changed when the run was resumed, as
                      `list_earlier_settings` returns them.
    start_time        when this process started or continued the run, on the monotonic clock.
    """

    first_step: int = 0
    num_skipped: int = 0
    earlier_minutes: float = 0.0
    earlier_settings: list[dict[str, Any]] = field(default_factory=list)
    start_time: float = field(default_factory=time.monotonic)

    def resume(self, state: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Take over the progress that a checkpoint recorded. Weights are loaded elsewhere.

        Args:
            state: the progress in the checkpoint.
            settings: the settings of the run now, which may differ from those in `state`.
        """
        self.first_step = state["step"]
        self.num_skipped = state["skipped"]
        self.earlier_minutes = state["minutes"]
        self.earlier_settings = list_earlier_settings(state, settings["optimization"])


class _Saver:
    """Decides when to write a checkpoint, and writes it."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        settings: Mapping[str, Any],
        progress: _Progress,
        options: RunOptions,
        num_steps: int,
    ) -> None:
        self.checkpoints = checkpoints
        self.settings = settings
        self.progress = progress
        self.options = options
        self._num_steps = num_steps
        self._last_save_time = 0.0
        self._last_save_duration_s = 0.0

    def start_clock(self) -> None:
        """Count the time to the first checkpoint from now on."""
        self._last_save_time = time.monotonic()

    def is_due_by_step(self, step: int) -> bool:
        """Return whether the step's number (from 0) demands a checkpoint after this step.

        These are every `save_every`-th step, and the last one.
        """
        num_done = step + 1
        return num_done % self.options.save_every == 0 or num_done == self._num_steps

    def is_due_by_time(self) -> bool:
        """Return whether the time since the last checkpoint demands a new one."""
        requested_interval_s = 60 * self.options.save_minutes
        # More frequent checkpoints would take more than `MAX_SAVING_SHARE` of the time.
        min_affordable_interval_s = self._last_save_duration_s / MAX_SAVING_SHARE
        interval_s = max(requested_interval_s, min_affordable_interval_s)
        return time.monotonic() - self._last_save_time >= interval_s

    def save(self, step: int) -> None:
        """Write a checkpoint after the step with this number, from 0."""
        save_start = time.monotonic()
        minutes = (save_start - self.progress.start_time) / 60
        state = {
            "settings": self.settings,
            "skipped": self.progress.num_skipped,
            "earlier": self.progress.earlier_settings,
            "minutes": self.progress.earlier_minutes + minutes,
        }
        self.checkpoints.save(step + 1, state)
        self._last_save_time = time.monotonic()
        self._last_save_duration_s = self._last_save_time - save_start


def load_pieces(
    task: Task,
    first_step: int,
    end_step: int,
    workers: int,
    accumulate: int = 1,
    device: torch.device = parallel.CPU,
) -> Generator[Batch, None, None]:
    """Yield this process's pieces of the batches of steps first_step … end_step - 1, in order.

    Args:
        task: the task whose method `batch` makes a piece from its number.
        first_step: the first step.
        end_step: the step after the last one.
        workers: number of worker processes that load in advance; with 0 this process loads.
        accumulate: pieces per step of this process.
        device: the device on which the batches will be used. For a GPU the batches are put in
            pinned memory, from which the GPU copies while it computes.
    """
    piece_numbers: list[int] = []
    for step in range(first_step, end_step):
        piece_numbers.extend(parallel.get_piece_numbers(step, accumulate))

    is_pinned = device.type == "cuda"
    # Workers pass pieces to this process through slots of shared memory, which are used again. A
    # worker needs slots for the pieces that it loads ahead, and for those of two steps: the present
    # step, and the last one, whose pieces may still be bound to a name in the loop.
    slots_per_worker = 0 if is_pinned else NUM_BATCHES_AHEAD + 2 * accumulate
    slots = SharedBatchSlots(workers, slots_per_worker)
    loader: Any = torch.utils.data.DataLoader(
        piece_numbers,  # type: ignore[arg-type]  # PyTorch accepts a list as a dataset
        batch_size=None,
        collate_fn=functools.partial(_make_piece, task, slots),
        num_workers=workers,
        prefetch_factor=NUM_BATCHES_AHEAD if workers else None,
        # Forked workers share the training data in memory. Spawned ones would copy them.
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_init_worker if workers else None,
        pin_memory=is_pinned,
    )
    for batch in loader:
        if isinstance(batch, SpearError):
            raise batch
        yield slots.take(batch) if isinstance(batch, SlottedBatch) else batch


def _make_piece(
    task: Task, slots: SharedBatchSlots, number: int
) -> Batch | SlottedBatch | SpearError:
    """Make a piece of a batch. In a worker process, put it into a slot of shared memory.

    A `SpearError` is returned instead of raised, because PyTorch would add a worker's traceback to
    its text.
    """
    try:
        batch = task.batch(number)
    except SpearError as error:
        return error
    worker = torch.utils.data.get_worker_info()
    return slots.put(batch, worker.id) if worker else batch


def _init_worker(worker: int) -> None:
    """Prepare a worker process: only the first worker prints notices, and none reacts to signals.

    On a signal the training process finishes its step, and then ends its workers itself.
    """
    if worker > 0:
        disable_notices()
    for signal_number in STOP_SIGNALS:
        signal.signal(signal_number, signal.SIG_IGN)


@contextlib.contextmanager
def _catch_stop_signal() -> Iterator[list[int]]:
    """Put the number of the first SIGTERM or SIGINT into the list that this yields.

    A second signal has the effect that it had before this call, and so ends the process at once. In
    a thread other than the main one no signal is caught, because Python does not allow it there.
    """
    received_signals: list[int] = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for signal_number in STOP_SIGNALS:
            handlers[signal_number] = signal.getsignal(signal_number)

    def restore_handlers() -> None:
        for signal_number, handler in handlers.items():
            signal.signal(signal_number, handler)

    def catch(signal_number: int, _frame: Any) -> None:
        received_signals.append(signal_number)
        restore_handlers()

    for signal_number, handler in handlers.items():
        if handler is not signal.SIG_IGN:
            signal.signal(signal_number, catch)
    try:
        yield received_signals
    finally:
        restore_handlers()


def _end_process(step: int, stop_signal: int, logger: Logger | None) -> NoReturn:
    """Print where the run stopped, and raise the exception that belongs to the signal."""
    if logger is not None:
        logger.bar.print_line(f"stopped, saved at step {step + 1}; the same command continues")
    if stop_signal == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + stop_signal)  # the exit status that shells give for a signal


@contextlib.contextmanager
def _translate_lost_process_errors() -> Iterator[None]:
    """Turn PyTorch's errors about a lost process into a `SpearError`."""
    try:
        yield
    except RuntimeError as error:
        if not parallel.is_process_lost(error):
            raise
        raise SpearError(
            f"process {parallel.get_rank()} stops, because another process of this run is gone. "
            "Read that process's message; the same command continues from the last checkpoint."
        ) from error


def resolve_optimization(opt: Optimization, out: Path, device: torch.device) -> Optimization:
    """Return `opt` with the precision and the pieces per process that the run in `out` will have.

    A new run uses bfloat16 only if `device` computes fast with it. A resumed run keeps float32 if
    it had float32, and keeps its number of pieces per batch. Raises `SpearError` if the number of
    processes does not divide the number of pieces.
    """
    in_float32 = dataclasses.replace(opt, precision="fp32", frozen_precision="fp32")
    checkpoint = find_newest_checkpoint(out / "checkpoints")
    if checkpoint is None:
        return opt if is_bfloat16_fast(device) else in_float32

    _, state = checkpoint
    settings = state["settings"]
    if settings["optimization"].get("precision") == "fp32":
        opt = in_float32

    num_pieces = settings["pieces"]
    world_size = parallel.get_world_size()
    if num_pieces % world_size:
        divisors = [str(n) for n in range(1, num_pieces + 1) if num_pieces % n == 0]
        raise SpearError(
            f"{out} holds a run whose batches have {format_count(num_pieces, 'pieces')}, which "
            f"{world_size} processes cannot share. Use {', '.join(divisors)} processes, or a new "
            "--out."
        )
    return dataclasses.replace(opt, accumulate=num_pieces // world_size)


def check_and_find_checkpoint_to_resume(
    out: Path, seed: int, run_settings: Mapping[str, Any], steps: int
) -> SavedCheckpoint | None:
    """Return the newest checkpoint in `out/checkpoints` and its state, or None for a new run.

    Args:
        out: the run's folder.
        seed: the seed that the run is to have.
        run_settings: what the run is to be made from, by name.
        steps: the number of steps that the run is to have.

    Raises:
        SpearError: if the run in `out` has another seed or another value of a run setting, or has
            done more than `steps` steps already.
    """
    checkpoint = find_newest_checkpoint(out / "checkpoints")
    if checkpoint is None:
        if (out / "final" / "recipe.json").is_file():
            raise SpearError(
                f"{out} holds a result without checkpoints. Use a new --out, or move it away."
            )
        return None

    _, state = checkpoint
    stored_settings = {"seed": state["settings"]["seed"], **state["settings"]["about"]}
    new_settings = {"seed": seed, **run_settings}
    for name, stored_value in stored_settings.items():
        if name in new_settings and not is_same_setting(name, stored_value, new_settings[name]):
            setting = name.replace("--moge", "--init-depth-encoder")  # its former name
            raise SpearError(
                f"{out} holds a run with another {setting} ({stored_value}, not "
                f"{new_settings[name]}). Use the same one, or a new --out."
            )
    if state["step"] > steps:
        raise SpearError(
            f"{out} holds {format_count(state['step'], 'steps')}, more than {steps}. Use a new "
            "--out."
        )
    return checkpoint


def is_same_setting(name: str, stored_value: Any, new_value: Any) -> bool:
    """Return whether two values of a run setting make the same run.

    Datasets may have other names, which come from their folders, if their content is the same.
    """
    if name == EPISODES_KEY:  # a list of (name, description of the content) of each dataset
        stored_value = [content for _, content in stored_value]
        new_value = [content for _, content in new_value]
    return bool(stored_value == new_value)


def _check_processes_agree(
    checkpoint: SavedCheckpoint | None, options: RunOptions, settings: dict[str, Any]
) -> None:
    """Check that all processes continue the same run in the same way."""
    first_step = 0
    if checkpoint is not None:
        _, state = checkpoint
        first_step = state["step"]
    parallel.check_same_settings(
        {
            "begins at step": first_step,
            "save_every": options.save_every,
            "sharded": options.sharded,
            "seed": options.seed,
            "pieces": settings["pieces"],
            **settings["optimization"],
            **settings["about"],
        }
    )


def list_earlier_settings(
    state: Mapping[str, Any], settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the values that a run's settings had before they were changed.

    Args:
        state: the state of the checkpoint that is resumed.
        settings: the optimization's settings from now on.

    Returns:
        A dict for each time that settings changed: the earlier values of these settings by name,
        and "until_step", the last step with these values.
    """
    new_settings = to_plain_json(settings)
    earlier_values = {}
    for name, value in state["settings"]["optimization"].items():
        # A resumed run keeps its number of pieces. `accumulate`, the pieces per process, differs
        # if the number of processes differs, which does not change the training.
        if name != "accumulate" and new_settings.get(name) != value:
            earlier_values[name] = value
    if not earlier_values:
        return list(state["earlier"])
    return [*state["earlier"], {"until_step": state["step"], **earlier_values}]


def _save_suspects(
    problem: NonFiniteStep, step: int, pieces: list[Batch], seed: int, out: Path
) -> None:
    """Write the pieces of a skipped step that may be the reason why it was not finite.

    `pieces` are all pieces of this process in this step.
    """
    piece_numbers = parallel.get_piece_numbers(step, len(pieces))
    for index in problem.suspect_pieces:
        save_batch(out, step, piece_numbers[index], seed, pieces[index])


def _report_skip_or_end_run(
    problem: NonFiniteStep,
    step: int,
    num_skipped: int,
    max_skipped: int,
    out: Path,
    logger: Logger | None,
) -> None:
    """Print that a step was skipped. After more than `max_skipped` skipped steps, end the run.

    Only process 0 has a logger. It explains the end by a `SpearError`, and the others exit.
    """
    event = f"step {step + 1}: the {problem.quantity} is not finite"
    folder = out / SKIPPED_BATCHES
    if num_skipped <= max_skipped:
        if logger is not None:
            logger.bar.print_line(
                f"{event}; the step is skipped ({num_skipped} of at most {max_skipped}), and its "
                f"batch is in {folder}"
            )
        return
    if logger is None:
        raise SystemExit(2)
    raise SpearError(
        f"{event}, after {format_count(max_skipped, 'skipped steps')}. Look at their batches in "
        f"{folder}, lower the learning rate, or allow more with --set max_skipped."
    )
