"""The one training loop. It knows steps, checkpoints and logs; it knows nothing about images or robots.

A run is a pure function of (task, settings, seed): the batch of step k depends on (seed, k) alone, and so
does every random draw inside the model: a killed run continues to the same losses, on a CPU bit for bit.
"""

import contextlib
import dataclasses
import functools
import itertools
import signal
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spear.errors import SpearError, counted, silence
from spear.models.devices import bfloat16_is_fast
from spear.train import parallel
from spear.train.checkpoint import Checkpoints, newest
from spear.train.log import FOLDER, Logger, NotFinite, save_batch
from spear.train.optimize import Batch, Stepper, Task, learning_rate
from spear.train.options import Optimization
from spear.util.handover import Handed, Slots
from spear.util.ledger import alone, plain


@dataclass(frozen=True)
class RunOptions:
    """How a run goes, whatever it trains.

    seed        two runs with the same seed give the same weights.
    workers     processes that make batches ahead; 0: this one does.
    save_every, log_every  steps between checkpoints, and between lines of the log.
    save_minutes  a checkpoint is also written after so long, as far as that takes a fiftieth of the time.
    device      where the model is put; None leaves it where it is.
    sharded     weights, gradients, moments and averages are divided among the processes (`parallel.shard`).
    """

    seed: int = 0
    workers: int = 1
    save_every: int = 500
    save_minutes: float = 3.0
    log_every: int = 20
    device: torch.device | None = None
    sharded: bool = False


AHEAD = 4
"""Batches that each worker makes ahead (our choice)."""


def _batch(task: Task, slots: Slots, number: int) -> Batch | Handed | SpearError:
    """An error is returned, since raised in a worker it would bring a traceback."""
    try:
        batch = task.batch(number)
    except SpearError as error:
        return error
    worker = torch.utils.data.get_worker_info()
    return slots.put(batch, worker.id) if worker else batch


def load_batches(
    task: Task,
    first: int,
    last: int,
    workers: int,
    accumulate: int = 1,
    device: torch.device = parallel.CPU,
) -> Generator[Batch, None, None]:
    """The batches of steps first … last-1, in order, made ahead by `workers` processes (0: in this one).

    `accumulate` of them per step: those that as many processes would take. For a GPU they are in pinned
    memory, from which it copies while it works.
    """
    numbers = [n for step in range(first, last) for n in parallel.numbers(step, accumulate)]
    pinned = device.type == "cuda"
    # Two steps' batches are held at most: those before may still be bound to a name.
    slots = Slots(workers, 0 if pinned else AHEAD + 2 * accumulate)
    loader: Any = torch.utils.data.DataLoader(
        numbers,  # type: ignore[arg-type]  # a list is a data set
        batch_size=None,
        collate_fn=functools.partial(_batch, task, slots),
        num_workers=workers,
        prefetch_factor=AHEAD if workers else None,
        multiprocessing_context="fork"
        if workers
        else None,  # which copies no labels, whatever is usual
        worker_init_fn=_serve if workers else None,
        pin_memory=pinned,
    )
    for batch in loader:
        if isinstance(batch, SpearError):
            raise batch
        yield slots.take(batch) if isinstance(batch, Handed) else batch


_STOPPING = (signal.SIGTERM, signal.SIGINT)


def _serve(worker: int) -> None:
    """A signal to all processes ends the work when the step is done. The first worker gives the notices."""
    if worker > 0:
        silence()
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _noted() -> Iterator[list[int]]:
    """The first SIGTERM or SIGINT is put into the list that this gives; the next acts as ever, and all do in
    other threads than the main one, which cannot take signals."""
    came: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in _STOPPING if main}

    def restore(*given: Any) -> None:
        came.extend(given[:1])
        for known, handler in before.items():
            signal.signal(known, handler)

    for known, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(known, restore)
    try:
        yield came
    finally:
        restore()


def settled(opt: Optimization, out: Path, device: torch.device) -> Optimization:
    """`opt` with the pieces per process and the precision in which the run in `out` is continued.

    Without a run there: in bfloat16 only where that is fast. Raises `SpearError` when the run's pieces cannot
    be shared among the processes that there are.
    """
    found = newest(out / "checkpoints")
    full: dict[str, Any] = {"precision": "fp32", "frozen_precision": "fp32"}
    if found is None:
        return opt if bfloat16_is_fast(device) else dataclasses.replace(opt, **full)
    before = found[1]["settings"]
    if before["optimization"].get("precision") == "fp32":
        opt = dataclasses.replace(opt, **full)
    pieces = before["pieces"]
    if pieces % parallel.world():
        fitting = ", ".join(str(n) for n in range(1, pieces + 1) if pieces % n == 0)
        has = f"{out} holds a run whose batches have {counted(pieces, 'pieces')}"
        which = f"which {parallel.world()} processes cannot share"
        raise SpearError(f"{has}, {which}: use {fitting}, or a new --out")
    return dataclasses.replace(opt, accumulate=pieces // parallel.world())


def run(
    task: Task,
    opt: Optimization,
    out: Path,
    how: RunOptions | None = None,
    about: Mapping[str, Any] | None = None,
    changing: Mapping[str, Any] | None = None,
) -> dict[str, torch.Tensor]:
    """Train to `opt.steps`, continuing from the newest checkpoint in `out/checkpoints` if there is one.

    On SIGTERM and SIGINT all processes finish the step and save: `SystemExit` (143) or `KeyboardInterrupt`.

    about: what the run is of, by name; a run continues only where all of it is the same. changing: what may
    change meanwhile, as `opt` may; the checkpoints say what it was.
    Returns the averaged (EMA) weights by parameter name, or the plain ones when averaging is off.
    Raises `SpearError` for a checkpoint of another seed, model or run, or of a later step than `opt.steps`;
    after more than `opt.max_skipped` steps that were not finite; when a process is gone, or `out` is in use.
    """
    how = how or RunOptions()
    opt = settled(opt, out, how.device or parallel.CPU)
    stepper = Stepper(task, opt, how.seed, how.device, how.sharded)
    settings: dict[str, Any] = {
        "seed": how.seed,
        "pieces": parallel.world() * opt.accumulate,
        "optimization": {**dataclasses.asdict(opt), **(changing or {})},
        "about": dict(about or {}),
    }
    own = alone(out, "training into") if parallel.rank() == 0 else contextlib.nullcontext()
    with own, Checkpoints(out / "checkpoints", stepper) as checkpoints:
        first, skipped, minutes, began, earlier = 0, 0, 0.0, time.monotonic(), []
        found = state_to_continue(out, how.seed, settings["about"], opt.steps)
        every = {"begins at step": found[1]["step"] if found else 0, "save_every": how.save_every}
        every |= {"sharded": how.sharded, "seed": how.seed, "pieces": settings["pieces"]}
        parallel.check_alike({**every, **settings["optimization"], **settings["about"]})
        if found is not None:
            latest, state = found
            checkpoints.load(latest, state["counts"])
            first, skipped, minutes = state["step"], state["skipped"], state["minutes"]
            earlier = history(state, settings["optimization"])
        logger: Logger | contextlib.nullcontext[None] = contextlib.nullcontext()
        if parallel.rank() == 0:
            logger = Logger(out, first, opt.steps, how.log_every)
        try:
            made = load_batches(task, first, opt.steps, how.workers, opt.accumulate, stepper.device)
            with logger as log, _noted() as signals, contextlib.closing(made) as ahead:
                saved, blocked = time.monotonic(), 0.0
                for step in range(first, opt.steps):
                    begun = time.perf_counter()
                    pieces = list(itertools.islice(ahead, opt.accumulate))
                    waited = time.perf_counter() - begun
                    try:
                        values = stepper(step, *pieces)
                    except NotFinite as problem:
                        skipped, values = skipped + 1, problem.values
                        numbers = parallel.numbers(step, len(pieces))
                        for index in problem.suspects:
                            save_batch(out, step, numbers[index], how.seed, pieces[index])
                        _report(problem, step, skipped, opt.max_skipped, out, log)
                    if log is not None:
                        log.log(step, values, opt.lr * learning_rate(step, opt), waited)
                    passed = time.monotonic() - saved >= max(60 * how.save_minutes, 50 * blocked)
                    late, stopped = parallel.most(passed, *signals[:1] or [0])
                    if late or stopped or (step + 1) % how.save_every == 0 or step + 1 == opt.steps:
                        begun = time.monotonic()
                        state = {"settings": settings, "skipped": skipped, "earlier": earlier}
                        state["minutes"] = minutes + (begun - began) / 60
                        checkpoints.save(step + 1, state)
                        saved = time.monotonic()
                        blocked = saved - begun
                    if stopped:
                        checkpoints.wait()
                        if log is not None:
                            log.bar.say(
                                f"stopped, saved at step {step + 1}; the same command continues"
                            )
                        raise (
                            KeyboardInterrupt
                            if stopped == signal.SIGINT
                            else SystemExit(128 + stopped)
                        )
        except RuntimeError as error:
            if not parallel.lost(error):
                raise
            what = f"process {parallel.rank()}: another process of this run is gone"
            cure = "see what it said; the same command continues from the last checkpoint"
            raise SpearError(f"{what}: {cure}") from error
    parallel.wait()
    return stepper.result()


def state_to_continue(
    out: Path, seed: int, about: Mapping[str, Any], steps: int
) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint in `out/checkpoints` and its state, if there is one; `SpearError` unless its run
    has this seed, what is known `about` it is the same, and it is at no later a step."""
    found = newest(out / "checkpoints")
    if found is None:
        if (out / "final" / "recipe.json").is_file():
            raise SpearError(
                f"{out} holds a result without checkpoints: use a new --out, or move it away"
            )
        return None
    _, state = found
    there = {"seed": state["settings"]["seed"], **state["settings"]["about"]}
    here = {"seed": seed, **about}
    for name in there:
        if name in here and there[name] != here[name]:
            other = f"another {name} ({there[name]}, not {here[name]})"
            raise SpearError(f"{out} holds a run with {other}: use the same, or a new --out")
    if state["step"] > steps:
        raise SpearError(
            f"{out} holds {counted(state['step'], 'steps')}, more than {steps}: use a new --out"
        )
    return found


def history(state: Mapping[str, Any], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a run of this `state` was set to before it was changed (last to `settings`), until which step."""
    now, before = plain(settings), state["settings"]["optimization"]
    changed = {
        k: v for k, v in before.items() if k != "accumulate" and now.get(k) != v
    }  # pieces stay
    return [*state["earlier"], *([{"until_step": state["step"], **changed}] if changed else [])]


def _report(
    problem: NotFinite, step: int, skipped: int, most: int, out: Path, log: Logger | None
) -> None:
    """Say that a step was skipped, or, when it was one too many, end the run on all processes."""
    where = f"step {step + 1}: the {problem.what} is not finite"
    if skipped <= most:
        if log is not None:
            log.bar.say(
                f"{where}: skipped ({skipped} of at most {most}); its batch is in {out / FOLDER}"
            )
        return
    if log is None:
        raise SystemExit(2)  # process 0 says why
    cure = f"look at their batches in {out / FOLDER}, lower the learning rate, or allow more (max_skipped)"
    raise SpearError(f"{where}, and {counted(most, 'steps')} skipped before: {cure}")
