"""How weights are updated: the freeze schedule, LoRA (by PEFT), the optimizer, and one step."""

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map_only

from spear.errors import SpearError, import_optional
from spear.models.layers import set_gradient_checkpointing
from spear.train import parallel
from spear.train.log import NonFiniteStep
from spear.train.options import Optimization, is_under

Batch = dict[str, Any]
"""Tensors by name, dicts of them, and what else a task's loss needs."""
Loss = tuple[torch.Tensor, Mapping[str, torch.Tensor]]
"""The total loss and its named parts, all 0-d."""

# Every linear layer of the language model; none of the encoders and of the action expert.
LORA_MODULES = (
    r"(.*\.)?language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
)
SEED_STRIDE = 1_000_003  # a prime: the random numbers of two seeds do not meet


class Task(Protocol):
    """What the loop trains: a model, its batches and its loss.

    A task may also have `trainable_rows`, parameter name -> (first, last): of that parameter, only
    the rows first … last − 1 learn.
    """

    @property
    def model(self) -> torch.nn.Module: ...

    def batch(self, step: int) -> Batch:
        """Return the batch of one step: a pure function of the step, run by a loader process."""

    def loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """Return the loss of a batch, with random numbers from `generator`."""


def learning_rate_factor(step: int, opt: Optimization) -> float:
    """Return the factor on the peak learning rate at `step` (0-based).

    >>> opt = Optimization(steps=110, lr=1e-3, warmup=10, final_lr=0.1)
    >>> [round(learning_rate_factor(step, opt), 2) for step in (0, 9, 60, 110)]
    [0.1, 1.0, 0.55, 0.1]
    """
    if step < opt.warmup:
        return (step + 1) / opt.warmup
    if opt.schedule == "constant":
        return 1.0
    progress = (step - opt.warmup) / max(1, opt.steps - opt.warmup)
    return opt.final_lr + (1 - opt.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def apply_freeze(model: torch.nn.Module, opt: Optimization) -> None:
    """Set `requires_grad` as the recipe says; LoRA matrices learn in frozen modules, too.

    Raises `SpearError` for a prefix that matches no module, and if no module would learn.
    """
    names = [name for name, _ in model.named_parameters()]
    for prefix in (*opt.frozen, *opt.trained, *opt.lr_scale):
        if not any(is_under(name, prefix) for name in names):
            modules = sorted({name.rsplit(".", 1)[0] for name in names})
            raise SpearError(
                f"the recipe names the module {prefix!r}, which this model does not have. "
                f"Give one of its modules, such as {', '.join(modules[:6])}."
            )

    for name, parameter in model.named_parameters():
        is_trained = not opt.trained or any(is_under(name, prefix) for prefix in opt.trained)
        is_frozen = any(is_under(name, prefix) for prefix in opt.frozen)
        parameter.requires_grad_((is_trained and not is_frozen) or ".lora_" in name)

    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise SpearError(
            "nothing learns, because every module is frozen. Change frozen or trained in the "
            "recipe."
        )


def add_adapters(model: torch.nn.Module, rank: int, alpha: float) -> Any:
    """Add LoRA matrices to the layers that `LORA_MODULES` names, in place.

    A weight W [out, in] acts as W + alpha / rank · B A, with A [rank, in] random and B [out, rank]
    zero, so that at first nothing changes. Returns PEFT's view of the model, a `PeftModel`. Raises
    `SpearError` when PEFT is missing.
    """
    peft: Any = import_optional("peft", "lora", "LoRA")
    # PEFT reads an attribute that Transformers deprecates.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=LORA_MODULES)
    return peft.PeftModel(model, config)


def set_weight_precision(model: torch.nn.Module, opt: Optimization) -> None:
    """Convert the weights in place: to float32, or frozen matrices to `opt.frozen_precision`.

    Only linear layers and token embeddings may be in bfloat16, because all other weights are small.
    Gemma's scale of embeddings, which is not saved, is rounded where a checkpoint is in bfloat16;
    here it becomes exact again.
    """
    module: Any
    for module in model.modules():
        embedding_scale = getattr(module, "scalar_embed_scale", None)
        if embedding_scale is not None:
            module.embed_scale = torch.full_like(
                module.embed_scale, embedding_scale, dtype=torch.float32
            )

        has_large_weight = isinstance(module, torch.nn.Linear | torch.nn.Embedding)
        for name, parameter in module.named_parameters(recurse=False):
            is_frozen_matrix = has_large_weight and name == "weight" and not parameter.requires_grad
            in_bfloat16 = is_frozen_matrix and opt.frozen_precision == "bf16"
            parameter.data = parameter.data.to(torch.bfloat16 if in_bfloat16 else torch.float32)


def make_optimizer(
    model: torch.nn.Module, opt: Optimization, partly_trained: Collection[str] = ()
) -> torch.optim.AdamW:
    """Return AdamW over the parameters that learn, in one group per learning-rate factor and decay.

    Vectors have no weight decay, nor have the parameters named in `partly_trained`: of these only
    some rows learn, and decay would also change the others.
    """
    parameters_of: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        has_decay = parameter.ndim >= 2 and name not in partly_trained
        parameters_of.setdefault((_rate_factor(name, opt), has_decay), []).append(parameter)

    groups = []
    for (factor, has_decay), parameters in sorted(parameters_of.items(), key=lambda item: item[0]):
        groups.append(
            {
                "params": parameters,
                "lr": opt.lr * factor,
                "peak": opt.lr * factor,
                "weight_decay": opt.weight_decay * has_decay,
            }
        )
    return torch.optim.AdamW(groups, betas=opt.betas, fused=True)


def _rate_factor(name: str, opt: Optimization) -> float:
    """Return a parameter's factor in `lr_scale`: that of the longest matching prefix."""
    prefixes = [prefix for prefix in opt.lr_scale if is_under(name, prefix)]
    return opt.lr_scale[max(prefixes, key=len)] if prefixes else 1.0


def step_generator(seed: int, number: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return the random numbers of a piece, a pure function of the seed and the piece's number."""
    return torch.Generator(device).manual_seed((seed * SEED_STRIDE + number) % (2**63))


class Stepper:
    """Runs one optimization step after another on a task's model.

    device     where the model is moved to; None leaves it where it is.
    sharded    each process holds only its part of everything (`parallel.shard`); no effect on a
               single process.
    trainable  the parameters that learn, by name.
    ema        their EMA weights, by name; None when averaging is off.
    """

    def __init__(
        self,
        task: Task,
        opt: Optimization,
        seed: int,
        device: torch.device | None = None,
        sharded: bool = False,
    ) -> None:
        self.task = task
        self.opt = opt
        self.seed = seed
        self.model = task.model.train()
        self.device = device or next(self.model.parameters()).device
        self.sharded = sharded and parallel.get_world_size() > 1

        # The model: which weights learn, in which precision, where.
        apply_freeze(self.model, opt)
        set_weight_precision(self.model, opt)
        set_gradient_checkpointing(self.model, opt.gradient_checkpointing)
        if self.sharded:
            parallel.shard(self.model, self.device, in_bfloat16=opt.precision == "bf16")
        elif device is not None:
            torch.nn.Module.to(self.model, device)

        # The optimizer and its state.
        trainable_rows: Mapping[str, tuple[int, int]] = getattr(task, "trainable_rows", {})
        self.optimizer = make_optimizer(self.model, opt, trainable_rows)
        self.trainable = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        self.row_masks = self._make_row_masks(trainable_rows)
        self.ema: dict[str, torch.Tensor] | None = None
        if opt.ema > 0:
            self.ema = {
                name: parameter.detach().clone() for name, parameter in self.trainable.items()
            }

    def _make_row_masks(
        self, trainable_rows: Mapping[str, tuple[int, int]]
    ) -> dict[str, torch.Tensor]:
        """Return [rows, 1] masks by parameter name: 1 for the rows that learn, 0 for the others."""
        masks: dict[str, torch.Tensor] = {}
        for name, (first, last) in trainable_rows.items():
            if self.model.get_parameter(name).requires_grad:
                mask = torch.zeros(len(self.trainable[name]), 1)
                mask[first:last] = 1
                masks[name] = parallel.distribute_like(mask, self.trainable[name])
        return masks

    def __call__(self, step: int, pieces: Sequence[Batch]) -> dict[str, float]:
        """Run one step: forward, backward, clip, update and average.

        Args:
            step: the step's number, from 0.
            pieces: this process's pieces of the batch (`accumulate` of them), whose gradients,
                losses and parts are averaged, over the processes as well.

        Returns:
            The mean loss, its parts and "grad_norm", the gradient's norm before clipping.

        Raises:
            NonFiniteStep: on all processes, if a loss or the gradient is not finite. The weights
                are as before.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate_factor(step, self.opt)
        self.optimizer.zero_grad(set_to_none=True)

        # Forward and backward, piece by piece.
        names: list[str] = []
        piece_values: list[torch.Tensor] = []
        piece_numbers = parallel.get_piece_numbers(step, len(pieces))
        for number, piece in zip(piece_numbers, pieces, strict=True):
            values = self._run_piece(piece, number, num_pieces=len(pieces))
            names = list(values)
            piece_values.append(torch.stack([value.detach().float() for value in values.values()]))

        # The gradient: the mean over all processes, of the rows that learn, clipped.
        if self.sharded:
            parallel.release_gathered_weights(self.model)
        else:
            parallel.average_gradients(self.trainable.values())
        for name, mask in self.row_masks.items():
            gradient = self.trainable[name].grad
            if gradient is not None:
                gradient.mul_(mask)
        grad_norm = torch.nn.utils.clip_grad_norm_(
            list(self.trainable.values()), self.opt.grad_clip
        )

        # This is where a process waits for its GPU (apart from questions, which find their
        # answers' tokens): once in a step.
        means = parallel.average_over_processes(torch.stack(piece_values).mean(0))
        grad_norm = parallel.gather(grad_norm).float().reshape(1)
        numbers = torch.cat([means, grad_norm]).tolist()
        step_values = dict(zip([*names, "grad_norm"], numbers, strict=True))

        # The update.
        self._check_finite(step_values, piece_values)
        self.optimizer.step()
        self._update_ema(step)
        return step_values

    def _run_piece(self, piece: Batch, number: int, num_pieces: int) -> dict[str, torch.Tensor]:
        """Add a piece's gradient; return its loss and the parts of the loss."""
        piece_on_device = tree_map_only(
            torch.Tensor, lambda tensor: tensor.to(self.device, non_blocking=True), piece
        )
        with torch.autocast(
            self.device.type,
            torch.bfloat16,
            enabled=self.opt.precision == "bf16",
            # The cache would keep a bfloat16 copy of every weight until the forward pass ends.
            cache_enabled=not self.opt.gradient_checkpointing,
        ):
            generator = step_generator(self.seed, number, self.device)
            loss, parts = self.task.loss(piece_on_device, generator)
        (loss / num_pieces).backward()
        return {"loss": loss.detach(), **parts}

    def _check_finite(
        self, step_values: dict[str, float], piece_values: Sequence[torch.Tensor]
    ) -> None:
        """Drop the gradient and raise `NonFiniteStep` if the loss or the gradient is not finite."""
        if math.isfinite(step_values["loss"]) and math.isfinite(step_values["grad_norm"]):
            return
        self.optimizer.zero_grad(set_to_none=True)
        if math.isfinite(step_values["loss"]):
            all_pieces = list(range(len(piece_values)))
            raise NonFiniteStep("gradient", all_pieces, step_values)
        suspects = [
            index for index, values in enumerate(piece_values) if not values[0].isfinite()
        ]  # the loss is the first value
        raise NonFiniteStep("loss", suspects, step_values)

    def _update_ema(self, step: int) -> None:
        if self.ema is None:
            return
        decay = min(self.opt.ema, (1 + step) / (10 + step))
        weights = [self.trainable[name].detach() for name in self.ema]
        torch._foreach_lerp_(list(self.ema.values()), weights, 1 - decay)

    def result(self) -> dict[str, torch.Tensor]:
        """Return the EMA weights by name, or the plain weights when averaging is off."""
        self.model.eval()
        if self.ema:
            return self.ema
        return {name: parameter.detach().clone() for name, parameter in self.trainable.items()}
