"""How weights are updated: the freeze schedule, LoRA (by PEFT), the optimizer, and one step.

The freeze schedule says which parameters learn. It names modules by prefixes of parameter names
(`Optimization.frozen`, `Optimization.trained`). The batch of a step consists of pieces, whose
gradients are averaged (`spear.train.parallel`).
"""

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
"""What a task's loss needs, by name: tensors, dicts of tensors, and other values."""
Loss = tuple[torch.Tensor, Mapping[str, torch.Tensor]]
"""The total loss and its named parts, all 0-d tensors."""

# Matches every linear layer of the language model, and no layer of the image encoders or of the
# action expert.
LORA_MODULES = (
    r"(.*\.)?language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
)
# Generators are seeded with seed · SEED_STRIDE + piece number. So two runs with different seeds get
# a common generator only if their piece numbers differ by a multiple of this, about a million.
SEED_STRIDE = 1_000_003
SEED_LIMIT = 2**63  # PyTorch's seeds are smaller


class Task(Protocol):
    """What the loop trains: a model, its batches and its loss.

    A task may also have an attribute `trainable_rows`, parameter name -> (first, end). Only the
    rows first … end − 1 of the named parameter learn, and its other rows stay as they are.
    """

    @property
    def model(self) -> torch.nn.Module: ...

    def batch(self, piece_number: int, /) -> Batch:
        """Return one piece of a batch, which depends only on the task and the piece's number.

        Worker processes call this. Pieces are numbered through the whole run, so if batches consist
        of one piece each, a piece's number is the step's number.
        """

    def loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """Return the loss of a batch, with random numbers from `generator`."""


def compute_learning_rate_factor(step: int, opt: Optimization) -> float:
    """Return the factor on the peak learning rate at `step` (from 0).

    >>> opt = Optimization(steps=110, lr=1e-3, warmup=10, final_lr=0.1)
    >>> [round(compute_learning_rate_factor(step, opt), 2) for step in (0, 9, 60, 110)]
    [0.1, 1.0, 0.55, 0.1]
    """
    if step < opt.warmup:
        return (step + 1) / opt.warmup
    if opt.schedule == "constant":
        return 1.0
    # A cosine from 1 after the warmup to -1 at the last step gives factors from 1 to `final_lr`.
    progress = (step - opt.warmup) / max(1, opt.steps - opt.warmup)
    cosine = math.cos(math.pi * min(1.0, progress))
    return opt.final_lr + (1 - opt.final_lr) * 0.5 * (1 + cosine)


def apply_freeze(model: torch.nn.Module, opt: Optimization) -> None:
    """Set `requires_grad` of each parameter as the recipe's prefixes say.

    LoRA matrices always learn, even in frozen modules. Raises `SpearError` for a prefix that
    matches no module, and if no module would learn.
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
        is_lora_matrix = ".lora_" in name
        parameter.requires_grad_((is_trained and not is_frozen) or is_lora_matrix)

    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise SpearError(
            "nothing learns, because every module is frozen. Change frozen or trained in the "
            "recipe."
        )


def add_adapters(model: torch.nn.Module, rank: int, alpha: float) -> Any:
    """Add LoRA matrices to the layers that `LORA_MODULES` names, in place.

    A layer with the weight W [out, in] then computes with W + alpha / rank · B A. A [rank, in] is
    random and B [out, rank] is zero, so that the model's outputs do not change at first. Returns
    PEFT's view of the model, a `PeftModel`. Raises `SpearError` when PEFT is missing.
    """
    peft: Any = import_optional("peft", "lora", "LoRA")
    # PEFT reads an attribute that is deprecated in Transformers.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=LORA_MODULES)
    return peft.PeftModel(model, config)


def set_weight_precision(model: torch.nn.Module, opt: Optimization) -> None:
    """Convert the weights in place: to float32, but some frozen ones to `opt.frozen_precision`.

    These are the frozen matrices of linear layers and token embeddings. All other frozen weights
    are so small that bfloat16 would save nothing.
    """
    module: Any
    for module in model.modules():
        # Gemma's embedding module multiplies embeddings by a scale, which checkpoints do not
        # contain. Loading a checkpoint in bfloat16 rounds the scale; here it becomes exact again.
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
    """Return AdamW over the parameters that learn.

    Parameters with the same learning-rate factor and the same weight decay form a group. Vectors
    have no weight decay. The parameters named in `partly_trained` have none either, because only
    some of their rows learn, and decay would also change the other rows.
    """
    parameters_of: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        has_decay = parameter.ndim >= 2 and name not in partly_trained
        group_key = (_get_rate_factor(name, opt), has_decay)
        parameters_of.setdefault(group_key, []).append(parameter)

    groups = []
    for factor, has_decay in sorted(parameters_of):
        groups.append(
            {
                "params": parameters_of[factor, has_decay],
                "lr": opt.lr * factor,
                "peak": opt.lr * factor,  # every step sets "lr" to a fraction of this
                "weight_decay": opt.weight_decay if has_decay else 0.0,
            }
        )
    return torch.optim.AdamW(groups, betas=opt.betas, fused=True)


def _get_rate_factor(name: str, opt: Optimization) -> float:
    """Return the factor on a parameter's learning rate.

    It is the one that `lr_scale` gives for the longest prefix of the parameter's name, or 1.
    """
    prefixes = [prefix for prefix in opt.lr_scale if is_under(name, prefix)]
    return opt.lr_scale[max(prefixes, key=len)] if prefixes else 1.0


def make_step_generator(
    seed: int, piece_number: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Return the random number generator of the piece with this number in a run with this seed."""
    return torch.Generator(device).manual_seed((seed * SEED_STRIDE + piece_number) % SEED_LIMIT)


class Stepper:
    """Runs one optimization step after another on a task's model.

    task       the model, its batches and its loss.
    opt        how the weights are updated.
    seed       the run's seed.
    device     the device to which the model is moved; None leaves it where it is.
    sharded    whether each process holds only a part of each weight, gradient, moment and EMA
               weight (`parallel.shard`). This has no effect on a single process.
    trainable  the parameters that learn, by name.
    row_masks  masks of the rows that learn, for the parameters in the task's `trainable_rows`.
    ema        the EMA weights of the parameters that learn, by name; None when averaging is off.
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

        # The model: which weights learn, their precision, and their device.
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
        for name, (first, end) in trainable_rows.items():
            if self.model.get_parameter(name).requires_grad:
                mask = torch.zeros(len(self.trainable[name]), 1)
                mask[first:end] = 1
                masks[name] = parallel.distribute_like(mask, self.trainable[name])
        return masks

    def __call__(self, step: int, pieces: Sequence[Batch]) -> dict[str, float]:
        """Run one step: forward, backward, clip, update and average.

        Args:
            step: the step's number, from 0.
            pieces: this process's pieces of the step's batch, `accumulate` of them. Gradients,
                losses and the parts of losses are averaged over the pieces of all processes.

        Returns:
            The mean loss, its parts and "grad_norm", the gradient's norm before clipping.

        Raises:
            NonFiniteStep: on all processes, if a loss or the gradient is not finite. The weights
                then stay as they were before the step.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * compute_learning_rate_factor(step, self.opt)
        self.optimizer.zero_grad(set_to_none=True)

        # Forward and backward, piece by piece.
        names: list[str] = []
        piece_values: list[torch.Tensor] = []
        piece_numbers = parallel.get_piece_numbers(step, len(pieces))
        for number, piece in zip(piece_numbers, pieces, strict=True):
            values = self._add_gradient_of_piece(piece, number, num_pieces=len(pieces))
            names = list(values)
            piece_values.append(torch.stack([value.detach().float() for value in values.values()]))

        # The gradient: averaged over all processes, zeroed in the rows that do not learn, clipped.
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

        # `tolist` makes the process wait for its GPU. This happens here alone, once in a step, and
        # in the loss of questions, which looks for the answers' tokens.
        means = parallel.average_over_processes_in_place(torch.stack(piece_values).mean(0))
        grad_norm = parallel.gather(grad_norm).float().reshape(1)
        mean_values = torch.cat([means, grad_norm]).tolist()
        step_values = dict(zip([*names, "grad_norm"], mean_values, strict=True))

        # The update.
        self._check_finite(step_values, piece_values)
        self.optimizer.step()
        self._update_ema(step)
        return step_values

    def _add_gradient_of_piece(
        self, piece: Batch, number_in_run: int, num_pieces: int
    ) -> dict[str, torch.Tensor]:
        """Add a piece's gradient, divided by `num_pieces`, to the parameters' gradients.

        Args:
            piece: The piece.
            number_in_run: The piece's number, counted from the begin of the run. It decides the
                random numbers.
            num_pieces: How many pieces the step has.

        Returns:
            The piece's loss, as "loss", and the parts of the loss.
        """
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
            generator = make_step_generator(self.seed, number_in_run, self.device)
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
        suspects = []
        for index, values in enumerate(piece_values):
            piece_loss = values[0]  # the parts of the loss follow
            if not piece_loss.isfinite():
                suspects.append(index)
        raise NonFiniteStep("loss", suspects, step_values)

    def _update_ema(self, step: int) -> None:
        """Move the EMA weights towards the weights; faster in the first steps of a run."""
        if self.ema is None:
            return
        decay = min(self.opt.ema, (1 + step) / (10 + step))
        weights = [self.trainable[name].detach() for name in self.ema]
        torch._foreach_lerp_(list(self.ema.values()), weights, 1 - decay)

    def get_trained_weights(self) -> dict[str, torch.Tensor]:
        """Return the EMA weights of the parameters that learn, by name.

        When averaging is off, these are copies of the plain weights.
        """
        if self.ema:
            return self.ema
        return {name: parameter.detach().clone() for name, parameter in self.trainable.items()}
