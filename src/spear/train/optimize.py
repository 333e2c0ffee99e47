"""How weights move: the optimiser's numbers, the freeze schedule, and one training step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from spear.errors import SpearError
from spear.models.layers import recompute_layers
from spear.train import parallel, sharding
from spear.train.adamw import HalfStateAdamW
from spear.train.lora import is_adapter
from spear.train.nonfinite import NotFinite

Batch = dict[str, Any]
"""Tensors by name, dicts of them, and what else a task's loss needs."""


class Task(Protocol):
    """What the loop trains: a model, its batches and its loss.

    It may also have `learning_rows`, parameter name -> (first, last): of these, only rows first … last − 1
    learn.
    """

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
    weight_decay, betas  AdamW's, which is our choice, too. grad_clip: the norm beyond which gradients are
                         scaled down.
    ema               decay of the averaged weights; 0 turns averaging off. Ramped up as (1+k)/(10+k).
    precision         "bf16" autocasts the forward pass; the weights that learn stay float32. On a CPU that
                      does not compute in bfloat16 a recipe runs in float32 (`spear.train.devices`).
    frozen_precision  "bf16" keeps the frozen linear layers and token embeddings in bfloat16: half the memory.
                      They are used in bfloat16 under autocast anyway.
    moments           "bf16" keeps AdamW's two averages in bfloat16 (`spear.train.adamw`).
    accumulate        a process works through its batch in so many pieces, whose gradients are averaged. A run
                      that is continued keeps its pieces, whatever the number of processes
                      (`spear.train.parallel`).
    max_skipped       steps whose loss or gradient is not finite are skipped; one more than so many ends the
                      run.
    gradient_checkpointing  layers are run again on the way back instead of kept (`spear.models.layers`).
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
    frozen_precision: Literal["bf16", "fp32"] = "fp32"
    moments: Literal["bf16", "fp32"] = "fp32"
    accumulate: int = 1
    gradient_checkpointing: bool = False
    max_skipped: int = 10


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
    """Set `requires_grad` from the freeze schedule; LoRA matrices learn wherever they are.

    A prefix that matches nothing is refused.
    """
    names = [n for n, _ in model.named_parameters()]
    for prefix in (*opt.frozen, *opt.trained, *opt.lr_scale):
        if not any(_matches(n, prefix) for n in names):
            tops = sorted({n.rsplit(".", 1)[0] for n in names})[:6]
            raise SpearError(
                f"freeze schedule names {prefix!r}: no such module (there are {', '.join(tops)}, …)"
            )
    for name, parameter in model.named_parameters():
        learns = not opt.trained or any(_matches(name, p) for p in opt.trained)
        learns = learns and not any(_matches(name, p) for p in opt.frozen)
        parameter.requires_grad_(learns or is_adapter(name))


def store_weights(model: torch.nn.Module, opt: Optimization) -> None:
    """Convert the weights, in place: float32, but for frozen matrices as `opt.frozen_precision` says.

    Only linear layers and token embeddings are kept in bfloat16: norms, biases and position embeddings are
    small. Raises `SpearError` where the computation is in float32, which could not use them.
    """
    lower = opt.frozen_precision == "bf16"
    if lower and opt.precision == "fp32":
        raise SpearError("frozen_precision bf16 needs precision bf16: set both, or neither")
    for module in model.modules():
        large = isinstance(module, torch.nn.Linear | torch.nn.Embedding)
        for name, parameter in module.named_parameters(recurse=False):
            half = lower and large and name == "weight" and not parameter.requires_grad
            parameter.data = parameter.data.to(torch.bfloat16 if half else torch.float32)


def make_optimizer(model: torch.nn.Module, opt: Optimization) -> torch.optim.AdamW:
    """AdamW over what learns; no weight decay on vectors (norms, biases); one group per learning-rate
    factor."""
    groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            prefixes = [p for p in opt.lr_scale if _matches(name, p)]
            scale = opt.lr_scale[max(prefixes, key=len)] if prefixes else 1.0
            groups.setdefault((scale, parameter.ndim >= 2), []).append(parameter)
    kind = HalfStateAdamW if opt.moments == "bf16" else torch.optim.AdamW
    return kind(
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


def step_generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random numbers of one step, a pure function of (seed, step)."""
    return torch.Generator(device).manual_seed((seed * 1_000_003 + step) % (2**63))


class Stepper:
    """One optimisation step after another on a task's model.

    device   where the model is put; None leaves it where it is.
    sharded  each process keeps its share of everything alone (`spear.train.sharding`); without effect on one
             process.
    ema      the averaged weights of what learns, by parameter name; None when averaging is off.
    """

    def __init__(
        self,
        task: Task,
        opt: Optimization,
        seed: int,
        device: torch.device | None = None,
        sharded: bool = False,
    ) -> None:
        self.task, self.opt, self.seed = task, opt, seed
        self.model = task.model.train()
        self.device = device or next(self.model.parameters()).device
        self.sharded = sharded and parallel.world() > 1
        apply_freeze(self.model, opt)
        store_weights(self.model, opt)
        recompute_layers(self.model, opt.gradient_checkpointing)
        if self.sharded:
            sharding.shard(self.model, self.device, opt.precision == "bf16")
        elif device is not None:
            torch.nn.Module.to(self.model, device)
        self.optimizer = make_optimizer(self.model, opt)
        self.learning = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.ema = {n: p.detach().clone() for n, p in self.learning.items()} if opt.ema > 0 else None
        self.masks = dict(self._masks())

    def __call__(self, step: int, *batches: Batch) -> dict[str, float]:
        """Forward, backward, clip, update, average. Returns the mean loss and parts, and the gradient's norm.

        batches  one, or several whose gradients, losses and parts are averaged (`accumulate`).
        Raises `NotFinite`, on all processes, when a loss or the gradient is not finite; nothing is changed
        then.
        """
        opt = self.opt
        factor = learning_rate(step, opt)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self.optimizer.zero_grad(set_to_none=True)
        said: list[torch.Tensor] = []
        keys: list[str] = []
        for number, batch in zip(parallel.numbers(step, len(batches)), batches, strict=True):
            # Autocast would keep a bfloat16 copy of every weight until the end of the forward pass.
            with torch.autocast(
                self.device.type,
                torch.bfloat16,
                enabled=opt.precision == "bf16",
                cache_enabled=not opt.gradient_checkpointing,
            ):
                loss, parts = self.task.loss(
                    to_device(batch, self.device), step_generator(self.seed, number, self.device)
                )
            (loss / len(batches)).backward()
            values = {"loss": loss.detach(), **parts}
            keys = list(values)
            said.append(torch.stack([value.detach().float() for value in values.values()]))
            del loss
        if self.sharded:
            sharding.release(self.model)
        else:
            parallel.average_gradients(self.learning.values())
        for name, mask in self.masks.items():
            gradient = self.learning[name].grad
            if gradient is not None:
                gradient.mul_(mask)
        norm = torch.nn.utils.clip_grad_norm_(list(self.learning.values()), opt.grad_clip)
        means = parallel.average(torch.stack(said).mean(0))
        # The one time in a step that the process waits for a GPU.
        *numbers, length = torch.cat([means, sharding.full(norm).float().reshape(1)]).tolist()
        found = {**dict(zip(keys, numbers, strict=True)), "grad_norm": length}
        if not math.isfinite(found["loss"]) or not math.isfinite(length):
            self.optimizer.zero_grad(set_to_none=True)
            bad = [i for i, piece in enumerate(said) if not math.isfinite(piece[0])]
            if math.isfinite(found["loss"]):
                raise NotFinite("gradient", list(range(len(batches))), found)
            raise NotFinite("loss", bad, found)
        self.optimizer.step()
        if self.ema is not None:
            decay = min(opt.ema, (1 + step) / (10 + step))
            current = [self.learning[n].detach() for n in self.ema]
            torch._foreach_lerp_(list(self.ema.values()), current, 1 - decay)
        return found

    def result(self) -> dict[str, torch.Tensor]:
        """The averaged weights, or the plain ones when averaging is off, by parameter name."""
        self.model.eval()
        if self.ema is not None:
            return self.ema
        return {n: p.detach().clone() for n, p in self.learning.items()}

    def _masks(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Of parameters of which some rows learn: 1 for these, 0 for the others, [rows, 1]."""
        rows: Mapping[str, tuple[int, int]] = getattr(self.task, "learning_rows", {})
        for name, (first, last) in rows.items():
            if name in self.learning:
                parameter = self.learning[name]
                mask = torch.zeros(len(parameter), 1)
                mask[first:last] = 1
                yield name, sharding.distribute(mask, parameter)


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors in nested dicts on `device`; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {k: to_device(v, device) for k, v in value.items()}
    return value
