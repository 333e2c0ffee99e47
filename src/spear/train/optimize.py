"""How weights move: the freeze schedule, LoRA (by PEFT), the optimiser, and one training step."""

import math
import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map_only

from spear.errors import SpearError, need
from spear.models.layers import recompute_layers
from spear.train import parallel
from spear.train.log import NotFinite
from spear.train.options import Optimization, is_under

Batch = dict[str, Any]
"""Tensors by name, dicts of them, and what else a task's loss needs."""
Loss = tuple[torch.Tensor, Mapping[str, torch.Tensor]]
"""The total loss and its named parts, all 0-d."""
TARGETS = r"(.*\.)?language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
"""The modules that get one: every linear layer of the language model, none of the encoders and the expert."""


class Task(Protocol):
    """What the loop trains: a model, its batches and its loss.

    It may also have `learning_rows`, parameter -> (first, last): of it, only rows first … last − 1 learn.
    """

    @property
    def model(self) -> torch.nn.Module: ...

    def batch(self, step: int) -> Batch:
        """The batch of one step: a pure function of the step. Runs in the loader process."""

    def loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """The loss of a batch, with the random numbers of `generator`."""


def learning_rate(step: int, opt: Optimization) -> float:
    """Factor on the peak learning rate at `step` (0-based)."""
    if step < opt.warmup:
        return (step + 1) / opt.warmup
    if opt.schedule == "constant":
        return 1.0
    done = (step - opt.warmup) / max(1, opt.steps - opt.warmup)
    return opt.final_lr + (1 - opt.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def apply_freeze(model: torch.nn.Module, opt: Optimization) -> None:
    """Set `requires_grad` from the freeze schedule; LoRA matrices learn wherever they are.

    Raises `SpearError` for a prefix that matches nothing, and where nothing is left to learn.
    """
    names = [n for n, _ in model.named_parameters()]
    for prefix in (*opt.frozen, *opt.trained, *opt.lr_scale):
        if not any(is_under(n, prefix) for n in names):
            tops = ", ".join(sorted({n.rsplit(".", 1)[0] for n in names})[:6])
            raise SpearError(
                f"freeze schedule names {prefix!r}: no such module (there are {tops}, …)"
            )
    for name, parameter in model.named_parameters():
        learns = not opt.trained or any(is_under(name, p) for p in opt.trained)
        learns = learns and not any(is_under(name, p) for p in opt.frozen)
        parameter.requires_grad_(learns or ".lora_" in name)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise SpearError(
            "nothing learns: every module is frozen: change the recipe's frozen or trained"
        )


def add_adapters(model: torch.nn.Module, rank: int, alpha: float) -> Any:
    """Put LoRA matrices beside the layers in `TARGETS`, in place; at first they change nothing.

    A weight W [out, in] acts as W + alpha / rank · B A, with A [rank, in] random and B [out, rank] zero.
    Returns PEFT's view of the model, a `PeftModel`. Raises `SpearError` when PEFT is missing.
    """
    peft: Any = need("peft", "lora", "LoRA")
    warnings.filterwarnings(
        "ignore", message="`is_gradient_checkpointing` is deprecated"
    )  # PEFT asks for it
    return peft.PeftModel(model, peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS))


def store_weights(model: torch.nn.Module, opt: Optimization) -> None:
    """Convert the weights, in place: float32, but for frozen matrices as `opt.frozen_precision` says.

    Only linear layers and token embeddings are kept in bfloat16: all other weights are small. Gemma's scale
    of embeddings, which is not saved, is rounded where a checkpoint is in bfloat16: it is made exact again.
    """
    lower = opt.frozen_precision == "bf16"
    module: Any
    for module in model.modules():
        if (scale := getattr(module, "scalar_embed_scale", None)) is not None:
            module.embed_scale = torch.full_like(module.embed_scale, scale, dtype=torch.float32)
        large = isinstance(module, torch.nn.Linear | torch.nn.Embedding)
        for name, parameter in module.named_parameters(recurse=False):
            half = lower and large and name == "weight" and not parameter.requires_grad
            parameter.data = parameter.data.to(torch.bfloat16 if half else torch.float32)


def make_optimizer(model: torch.nn.Module, opt: Optimization, part: Any = ()) -> torch.optim.AdamW:
    """AdamW over what learns, in a group per learning-rate factor; no weight decay on vectors, and on what is
    named in `part`: of these only some rows learn."""
    groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            prefixes = [p for p in opt.lr_scale if is_under(name, p)]
            scale = opt.lr_scale[max(prefixes, key=len)] if prefixes else 1.0
            groups.setdefault((scale, parameter.ndim >= 2 and name not in part), []).append(
                parameter
            )
    settings = []
    for (scale, decays), params in sorted(groups.items(), key=lambda kv: kv[0]):
        rate = {"lr": opt.lr * scale, "peak": opt.lr * scale}
        settings.append({"params": params, **rate, "weight_decay": opt.weight_decay * decays})
    return torch.optim.AdamW(settings, betas=opt.betas, fused=True)


def step_generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random numbers of one step, a pure function of (seed, step)."""
    return torch.Generator(device).manual_seed((seed * 1_000_003 + step) % (2**63))


class Stepper:
    """One optimisation step after another on a task's model.

    device   where the model is put; None leaves it where it is.
    sharded  each process keeps only its share of everything (`parallel.shard`); no effect on one process.
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
            parallel.shard(self.model, self.device, opt.precision == "bf16")
        elif device is not None:
            torch.nn.Module.to(self.model, device)
        rows: Mapping[str, tuple[int, int]] = getattr(task, "learning_rows", {})
        self.optimizer = make_optimizer(self.model, opt, rows)
        self.learning = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.ema = (
            {n: p.detach().clone() for n, p in self.learning.items()} if opt.ema > 0 else None
        )
        self.masks: dict[
            str, torch.Tensor
        ] = {}  # [rows, 1]: 1 for the rows that learn, 0 for others
        for name, (first, last) in rows.items():
            if self.model.get_parameter(name).requires_grad:
                mask = torch.zeros(len(self.learning[name]), 1)
                mask[first:last] = 1
                self.masks[name] = parallel.distribute(mask, self.learning[name])

    def __call__(self, step: int, *batches: Batch) -> dict[str, float]:
        """Forward, backward, clip, update, average. Returns the mean loss and parts, and the gradient's norm.

        batches  one, or several whose gradients, losses and parts are averaged (`accumulate`).
        Raises `NotFinite`, on all processes, when a loss or the gradient is not; the weights are as before.
        """
        opt = self.opt
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate(step, opt)
        self.optimizer.zero_grad(set_to_none=True)
        said, keys = list[torch.Tensor](), list[str]()
        # Autocast's cache would keep a bfloat16 copy of every weight until the end of the forward pass.
        lower, cache = opt.precision == "bf16", not opt.gradient_checkpointing
        for number, batch in zip(parallel.numbers(step, len(batches)), batches, strict=True):
            moved = tree_map_only(
                torch.Tensor, lambda t: t.to(self.device, non_blocking=True), batch
            )
            with torch.autocast(
                self.device.type, torch.bfloat16, enabled=lower, cache_enabled=cache
            ):
                loss, parts = self.task.loss(moved, step_generator(self.seed, number, self.device))
            (loss / len(batches)).backward()
            values = {"loss": loss.detach(), **parts}
            keys = list(values)
            said.append(torch.stack([value.detach().float() for value in values.values()]))
            del loss
        if self.sharded:
            parallel.release(self.model)
        else:
            parallel.average_gradients(self.learning.values())
        for name, mask in self.masks.items():
            gradient = self.learning[name].grad
            if gradient is not None:
                gradient.mul_(mask)
        norm = torch.nn.utils.clip_grad_norm_(list(self.learning.values()), opt.grad_clip)
        means = parallel.average(torch.stack(said).mean(0))
        # The one time in a step that the process waits for a GPU (questions find their answers, too).
        *numbers, length = torch.cat([means, parallel.full(norm).float().reshape(1)]).tolist()
        found = {**dict(zip(keys, numbers, strict=True)), "grad_norm": length}
        if not math.isfinite(found["loss"]) or not math.isfinite(length):
            self.optimizer.zero_grad(set_to_none=True)
            if math.isfinite(found["loss"]):
                raise NotFinite("gradient", list(range(len(batches))), found)
            raise NotFinite(
                "loss", [i for i, piece in enumerate(said) if not piece[0].isfinite()], found
            )
        self.optimizer.step()
        if self.ema is not None:
            decay = min(opt.ema, (1 + step) / (10 + step))
            current = [self.learning[n].detach() for n in self.ema]
            torch._foreach_lerp_(list(self.ema.values()), current, 1 - decay)
        return found

    def result(self) -> dict[str, torch.Tensor]:
        """The averaged weights, or the plain ones when averaging is off, by parameter name."""
        self.model.eval()
        return self.ema or {n: p.detach().clone() for n, p in self.learning.items()}
