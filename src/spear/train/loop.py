"""The one training loop. It knows steps, checkpoints and logs; it knows nothing about images or robots.

A run is a pure function of (task, settings, seed): the batch of step k depends on (seed, k) alone, and so does
every random draw inside the model, so that a killed run continues to the same losses, bit for bit on CPU.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from spear.errors import SpearError
from spear.train import checkpoint

Batch = dict[str, Any]


class Task(Protocol):
    """What the loop trains: a model, its batches and its loss."""

    @property
    def model(self) -> torch.nn.Module:
        """What learns."""
        ...

    def batch(self, step: int) -> Batch:
        """The batch of one step: a pure function of the step. Runs in the loader process."""
        ...

    def loss(
        self, batch: Batch, generator: torch.Generator
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """Total loss and its named parts, all 0-d."""
        ...


@dataclass(frozen=True)
class Optimization:
    """How the weights move; the part of a recipe that the loop reads.

    steps             optimiser steps.
    lr                peak learning rate.
    lr_scale          module prefix -> factor on `lr`; the longest matching prefix wins.
    frozen            module prefixes that do not learn.
    trained           if not empty: only these prefixes learn (then `frozen` is applied within them).
    schedule          "cosine" to `final_lr` x lr after `warmup` linear steps, or "constant" after it.
    ema               decay of the averaged weights; 0 turns averaging off. Ramped up as (1+k)/(10+k).
    precision         "bf16" autocasts the forward pass; master weights stay float32.
    """

    steps: int
    lr: float
    lr_scale: Mapping[str, float] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: int = 100
    final_lr: float = 0.05
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    ema: float = 0.999
    precision: Literal["bf16", "fp32"] = "bf16"


def learning_rate(step: int, opt: Optimization) -> float:
    """Factor on the peak learning rate at `step` (0-based)."""
    if step < opt.warmup:
        return (step + 1) / opt.warmup
    if opt.schedule == "constant":
        return 1.0
    done = (step - opt.warmup) / max(1, opt.steps - opt.warmup)
    return opt.final_lr + (1 - opt.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _matches(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def apply_freeze(model: torch.nn.Module, opt: Optimization) -> None:
    """Set `requires_grad` from the freeze schedule. A prefix that matches nothing is refused."""
    names = [n for n, _ in model.named_parameters()]
    for prefix in (*opt.frozen, *opt.trained, *opt.lr_scale):
        if not any(_matches(n, prefix) for n in names):
            tops = sorted({n.rsplit(".", 1)[0] for n in names})[:6]
            raise SpearError(
                f"freeze schedule names {prefix!r}: no such module (there are {', '.join(tops)}, …)"
            )
    for name, parameter in model.named_parameters():
        learns = not opt.trained or any(_matches(name, p) for p in opt.trained)
        parameter.requires_grad_(learns and not any(_matches(name, p) for p in opt.frozen))


def make_optimizer(model: torch.nn.Module, opt: Optimization) -> torch.optim.AdamW:
    """AdamW over what learns; no weight decay on vectors (norms, biases); one group per learning-rate factor."""
    groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            prefixes = [p for p in opt.lr_scale if _matches(name, p)]
            scale = opt.lr_scale[max(prefixes, key=len)] if prefixes else 1.0
            groups.setdefault((scale, parameter.ndim >= 2), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": params,
                "lr": opt.lr * scale,
                "peak": opt.lr * scale,
                "weight_decay": opt.weight_decay * decays,
            }
            for (scale, decays), params in sorted(groups.items(), key=lambda kv: kv[0])
        ],
        betas=opt.betas,
        fused=True,
    )


class _Steps(torch.utils.data.Dataset[Batch]):
    def __init__(self, task: Task) -> None:
        self.task = task

    def __getitem__(self, step: int) -> Batch:
        return self.task.batch(step)

    def __len__(self) -> int:
        raise TypeError("a run has no last batch of its own")


def batches(task: Task, first: int, last: int, workers: int) -> Iterator[Batch]:
    """The batches of steps first … last-1, in order, made ahead by `workers` processes (0: in this one)."""
    loader = torch.utils.data.DataLoader(
        _Steps(task),
        batch_size=None,
        sampler=range(first, last),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_one_thread if workers else None,
    )
    return iter(loader)


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def step_generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random numbers of one step, a pure function of (seed, step)."""
    return torch.Generator(device).manual_seed((seed * 1_000_003 + step) % (2**63))


def run(
    task: Task,
    opt: Optimization,
    out: Path,
    seed: int,
    workers: int = 1,
    save_every: int = 500,
    log_every: int = 20,
    quiet: bool = False,
) -> dict[str, torch.Tensor]:
    """Train to `opt.steps`, continuing from the newest checkpoint in `out/checkpoints` if there is one.

    Returns the averaged (EMA) weights by parameter name, or the plain ones when averaging is off.
    Writes `out/log.jsonl` (one line per `log_every` steps: losses as hexadecimal-exact floats) and TensorBoard
    events when tensorboard is installed.
    """
    model = task.model
    apply_freeze(model, opt)
    optimizer = make_optimizer(model, opt)
    learning = [p for p in model.parameters() if p.requires_grad]
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    ema = {n: p.detach().clone() for n, p in named.items()} if opt.ema > 0 else None
    folder = out / "checkpoints"
    latest = checkpoint.find_latest(folder)
    first = 0
    settings = json.loads(json.dumps({"seed": seed, "optimization": opt.__dict__}, default=dict))
    if latest is not None:
        state = checkpoint.load(latest, model, ema, optimizer)
        if {**state["settings"], "optimization": None} != {**settings, "optimization": None}:
            raise SpearError(f"{out} holds a run with another seed: give a new --out folder or the same seed")
        first = int(state["step"])
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.jsonl"
    _keep_lines_before(log, first)
    writer = _tensorboard(out)
    device = next(model.parameters()).device
    model.train()
    started, seen = time.perf_counter(), 0
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[info]}"),
        disable=quiet,
    ) as bar:
        row = bar.add_task(out.name, total=opt.steps, completed=first, info="")
        for step, batch in zip(
            range(first, opt.steps), batches(task, first, opt.steps, workers), strict=True
        ):
            factor = learning_rate(step, opt)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            with torch.autocast(device.type, torch.bfloat16, enabled=opt.precision == "bf16"):
                loss, parts = task.loss(batch, step_generator(seed, step, device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(learning, opt.grad_clip)
            if not torch.isfinite(norm):
                raise SpearError(
                    f"step {step}: the loss or its gradient is not finite: lower --lr; run kept in {out}"
                )
            optimizer.step()
            if ema is not None:
                decay = min(opt.ema, (1 + step) / (10 + step))
                torch._foreach_lerp_(list(ema.values()), [named[n].detach() for n in ema], 1 - decay)
            seen += 1
            if (step + 1) % log_every == 0 or step + 1 == opt.steps:
                values = {
                    "loss": loss.item(),
                    **{k: v.item() for k, v in parts.items()},
                    "grad_norm": norm.item(),
                }
                rate = seen / (time.perf_counter() - started)
                with log.open("a") as file:
                    file.write(
                        json.dumps({"step": step + 1, **values, "lr": factor * opt.lr, "steps_per_s": rate})
                        + "\n"
                    )
                if writer is not None:
                    for key, value in values.items():
                        writer.add_scalar(key, value, step + 1)
                short = " ".join(f"{k} {v:.3f}" for k, v in values.items() if k != "grad_norm")
                bar.update(row, info=f"{rate:.1f} steps/s  {short}")
            bar.update(row, completed=step + 1)
            if (step + 1) % save_every == 0 or step + 1 == opt.steps:
                checkpoint.save(folder, step + 1, model, ema, optimizer, {"settings": settings})
    if writer is not None:
        writer.close()
    model.eval()
    return ema if ema is not None else {n: p.detach().clone() for n, p in named.items()}


def _keep_lines_before(log: Path, step: int) -> None:
    """Drop log lines of steps that the checkpoint does not contain: they will be run again."""
    if log.is_file():
        lines = []
        for line in log.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    lines.append(line + "\n")
            except ValueError:
                continue
        log.write_text("".join(lines))


def _tensorboard(out: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out / "tensorboard"))
