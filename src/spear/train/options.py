"""Recipes and the values they may take, the inputs of a training, and the options of its commands.

This file does not import PyTorch, so that commands can print help texts and errors at once. The
docstrings of `Optimization`, `QuestionMix` and `Recipe` are also shown to users, by `spear recipes`
(`spear.train.settings`).
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from tyro.conf import Positional, arg

from spear.errors import (
    SpearError,
    check_known,
    format_count,
    make_unknown_name_error,
    summarize_error,
)
from spear.question_types import QUESTION_TYPES, QUESTION_TYPES_2D, QUESTION_TYPES_PIXEL
from spear.util.options import (
    Device,
    EpisodeSplit,
    OptionalFolder,
    OptionalInt,
    OptionalName,
    OptionalPreset,
    Options,
    Range,
    RecipeChanges,
    Seed,
)

if TYPE_CHECKING:
    from spear.data.store.episode_store import WeightedStore

Kind = Literal["depth", "naming", "vlm", "vla"]
Precision = Literal["bf16", "fp32"]
# Numbers with the range that a recipe's value is checked against.
Count = Annotated[int, Ge(0)]
PositiveCount = Annotated[int, Ge(1)]
NonNegative = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
Decay = Annotated[float, Ge(0), Lt(1)]


@dataclass(frozen=True)
class Optimization:
    """How the weights are updated: the part of a recipe that the training loop reads.

    steps             number of optimization steps.
    lr                peak learning rate.
    lr_scale          module prefix -> factor on `lr`; the longest matching prefix wins.
    frozen            module prefixes that do not learn.
    trained           if not empty, only modules with these prefixes learn; of these modules, the
                      ones that `frozen` names do not learn.
    schedule          "cosine" decays to `final_lr` x lr after the warmup; "constant" keeps lr.
    warmup            steps over which the learning rate rises linearly to `lr`.
    final_lr          factor on `lr` at the last step of schedule "cosine".
    weight_decay, betas  AdamW's settings (our choice).
    grad_clip         norm to which larger gradients are scaled down.
    ema               decay of the EMA weights; at step k it is at most (1+k)/(10+k). 0 turns
                      averaging off.
    precision         "bf16" runs forward passes under autocast where that is fast
                      (`spear.models.devices`); the weights stay in float32.
    frozen_precision  "bf16" keeps frozen linear layers and token embeddings in bfloat16, which
                      takes half the memory.
    accumulate        pieces into which a process divides its batch; their gradients are averaged.
                      A resumed run keeps its pieces (`spear.train.parallel`).
    gradient_checkpointing  layers run again in the backward pass instead of keeping their
                      activations (`spear.models.layers`), which saves memory and costs time.
    max_skipped       steps whose loss or gradient is not finite are skipped; the run ends if there
                      are more of them than this.
    """

    steps: Count
    lr: NonNegative
    lr_scale: Mapping[str, NonNegative] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: Count = 100
    final_lr: Fraction = 0.05
    weight_decay: NonNegative = 0.01
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    grad_clip: Positive = 1.0
    ema: Decay = 0.999
    precision: Precision = "bf16"
    frozen_precision: Precision = "fp32"
    accumulate: PositiveCount = 1
    gradient_checkpointing: bool = False
    max_skipped: Count = 10

    def __post_init__(self) -> None:
        # Without autocast, a layer in float32 cannot use weights in bfloat16.
        if self.frozen_precision == "bf16" and self.precision == "fp32":
            raise SpearError("frozen_precision bf16 needs precision bf16. Set both, or neither.")


@dataclass(frozen=True)
class QuestionMix:
    """Which questions a batch asks.

    families             question types of `spear.labels.questions.generate`; a name that is given
                         twice is drawn twice as often.
    pairs                fewest and most question-answer pairs per image (paper: 1 to 4).
    wrist                fraction of batches from wrist-camera images, where there are any (our
                         choice); None: the wrist images' fraction of all images.
    coordinate_weight    the paper's λ: factor on the loss of 3D tokens.
    coordinate_smoothing standard deviation, in bins, of a 3D token's Gaussian target; 0 is one-hot
                         (paper).
    most_images          number of labeled images of each view that are asked about, the first ones
                         (0: all).
    """

    families: tuple[str, ...] = QUESTION_TYPES
    pairs: tuple[PositiveCount, PositiveCount] = (1, 4)
    wrist: Fraction | None = None
    coordinate_weight: NonNegative = 2.0
    coordinate_smoothing: NonNegative = 0.0
    most_images: Count = 0


@dataclass(frozen=True)
class Recipe:
    """A named training configuration: one stage of training.

    kind          "depth" (the MoGe-style encoder alone), "naming" (the SigLIP-style encoder),
                  "vlm" or "vla".
    preset        the model's size (`spear.models.presets`).
    moge          False omits the MoGe branch (stage 0: a plain PaliGemma).
    coordinate_rows_only  of the token embeddings, only the 3D tokens' rows learn (the paper's VLM
                  stage 1).
    smooth_tokens  the embeddings of new 3D tokens start similar if their bins are close
                  (`spear.tokens`; our choice).
    bins, spacing  number and spacing of new 3D tokens, which are fitted to the labels. None keeps
                  those of `--init`; without `--init`: the preset's number, at quantiles (paper).
    questions     which questions a batch asks.
    batch_size    images per step ("vlm", "depth") or robot steps per step ("vla").
    flow_samples  number of random pairs of noise and flow time τ per robot step; images and prompt
                  are computed once for all of them (our choice).
    question_images, question_weight  images with 3D questions in addition to a robot batch (0:
                  none), and the factor on their loss (our choice).
    augment       strength of the photometric augmentation, 0 to 1.
    normalization  how translations and positions are normalized: "quantile" (paper), "minmax",
                  "meanstd" or "bounds". With None a new policy has "quantile", and a policy that
                  starts from `--init` keeps its normalization.
    bounds_m      with "bounds", the length of a step that becomes 1, per axis, m. With None a
                  policy that starts from `--init` keeps its bounds.
    action_reference  from which pose actions are measured (`spear.data.action_reference`), our
                  choice because the paper does not say. With None a new policy has "previous", and
                  a policy that starts from `--init` keeps its reference.
    normalize_each  normalize each dataset by its own statistics instead of those of the mixture
                  (for an ablation).
    flow          fields of `spear.types.FlowConfig` that differ from the preset's or from `--init`.
    committed     the longest committed prefix to train with, in actions
                  (`spear.flow.sample_committed_mask`). None is 0 for a new policy, as in the paper,
                  and the length of the initial policy with `--init`.
    lora_rank     if not 0, the language model also learns through LoRA matrices of this rank.
    lora_alpha    LoRA matrices are scaled by alpha / rank (`spear.train.optimize`).
    """

    name: str
    kind: Kind
    preset: str
    description: str
    optimization: Optimization
    batch_size: PositiveCount
    moge: bool = True
    coordinate_rows_only: bool = False
    smooth_tokens: bool = False
    bins: Annotated[int, Ge(2)] | None = None
    spacing: Literal["quantile", "uniform"] | None = None
    questions: QuestionMix = QuestionMix()
    flow_samples: PositiveCount = 1
    question_images: Count = 0
    question_weight: NonNegative = 1.0
    augment: Fraction = 0.0
    normalization: Literal["quantile", "minmax", "meanstd", "bounds"] | None = None
    bounds_m: tuple[Positive, Positive, Positive] | None = None
    action_reference: Literal["previous", "observed"] | None = None
    normalize_each: bool = False
    flow: Mapping[str, bool | float | str] = field(default_factory=dict)
    committed: Count | None = None
    lora_rank: Count = 0
    lora_alpha: Positive = 16.0

    def with_changes(self, **changes: Any) -> "Recipe":
        """Return a copy of the recipe with other values.

        Args:
            changes: new values by key. A key is a field of `Recipe`, of `Optimization` or of
                `QuestionMix`.

        Raises:
            SpearError: for an unknown key or a value that is not allowed.

        Example:
            >>> from spear.train.recipes import get_recipe
            >>> get_recipe("nano-post").with_changes(lr=1e-5, batch_size=8).optimization.lr
            1e-05
        """
        for key, value in changes.items():
            check_known("recipe key", _CLASS_OF_KEY, key, advice="`spear recipes NAME` lists them.")
            _check_value(_CLASS_OF_KEY[key], key, value)
        return self.with_unchecked_changes(**changes)

    def with_unchecked_changes(self, **changes: Any) -> "Recipe":
        """Return a copy of the recipe as `with_changes` does, without checking keys and values."""
        values_of_class: dict[type, dict[str, Any]] = {
            Recipe: {},
            Optimization: {},
            QuestionMix: {},
        }
        for key, value in changes.items():
            values_of_class[_CLASS_OF_KEY[key]][key] = value
        return dataclasses.replace(
            self,
            optimization=dataclasses.replace(self.optimization, **values_of_class[Optimization]),
            questions=dataclasses.replace(self.questions, **values_of_class[QuestionMix]),
            **values_of_class[Recipe],
        )


def _map_keys_to_classes() -> dict[str, type]:
    """Map each recipe key to the class that has the field of this name.

    The keys `optimization` and `questions` are left out, because their fields are keys themselves.
    """
    class_of_key: dict[str, type] = {}
    for owner in (Recipe, Optimization, QuestionMix):
        for owner_field in dataclasses.fields(owner):
            class_of_key[owner_field.name] = owner
    del class_of_key["optimization"]
    del class_of_key["questions"]
    return class_of_key


_CLASS_OF_KEY = _map_keys_to_classes()


def list_recipe_keys() -> list[str]:
    """Return the keys that `--set` takes."""
    return list(_CLASS_OF_KEY)


def is_under(name: str, prefix: str) -> bool:
    """Return whether the parameter or module `name` is the module `prefix`, or inside it.

    >>> is_under("vlm.moge.layers", "vlm.moge"), is_under("vlm.moge_projector", "vlm.moge")
    (True, False)
    """
    return name == prefix or name.startswith(prefix + ".")


def _check_value(owner: type, key: str, value: Any) -> None:
    """Check a value of a recipe against the type and the range of the field `owner.key`."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    hint = get_type_hints(owner, include_extras=True)[key]
    strict = ConfigDict(strict=True, allow_inf_nan=False)
    try:
        # In JSON mode, strict pydantic accepts a list for a tuple and a whole number for a float,
        # but neither a word nor a truth value for a number.
        TypeAdapter(hint, config=strict).validate_json(json.dumps(value))
    except (ValidationError, TypeError) as error:
        choices = _list_choices(hint)
        if choices:
            raise make_unknown_name_error(key, str(value), choices) from error
        raise SpearError(
            f"the recipe key {key} cannot be {value!r} ({summarize_error(error)}). `spear "
            "recipes NAME` shows each key with its meaning."
        ) from error

    if key == "pairs" and value[0] > value[1]:
        raise SpearError(f"recipe key {key} is {value}. Give the smaller number first.")
    if key == "families":
        known_families = (*QUESTION_TYPES, *QUESTION_TYPES_2D, *QUESTION_TYPES_PIXEL)
        # An empty list is refused as if it had an empty, unknown name.
        families = value or [""]
        for family in families:
            check_known("question type", known_families, family, location=f"recipe key {key}")


def _list_choices(hint: Any) -> list[str]:
    """Return the words that a type hint such as `Literal["a", "b"] | None` allows."""
    choices: list[str] = []
    for option in (hint, *get_args(hint)):
        if get_origin(option) is Literal:
            choices.extend(get_args(option))
    return choices


# Recipe keys that have an effect only if a policy, questions or a VLM learns.
_POLICY_KEYS = {
    "flow_samples",
    "question_images",
    "question_weight",
    "normalization",
    "bounds_m",
    "action_reference",
    "normalize_each",
    "flow",
    "committed",
}
_QUESTION_KEYS = {
    "families",
    "pairs",
    "wrist",
    "most_images",
    "question_weight",
    "coordinate_weight",
    "coordinate_smoothing",
}
_VLM_KEYS = {"coordinate_rows_only", "smooth_tokens"}
_NAMING_UNUSED = _POLICY_KEYS | _QUESTION_KEYS | _VLM_KEYS | {"augment", "lora_rank", "lora_alpha"}
UNUSED_KEYS: dict[Kind, set[str]] = {
    "vla": _VLM_KEYS,
    "vlm": _POLICY_KEYS,
    "naming": _NAMING_UNUSED,
    "depth": _NAMING_UNUSED | {"moge", "bins", "spacing"},
}
"""Kind of recipe -> the keys that have no effect in it."""


@dataclass(frozen=True)
class TrainingInputs:
    """What a training learns from and starts from.

    labels    folders of labeled images ("depth", "naming" and "vlm" recipes; in "vla" recipes,
              the images that the questions are about).
    episodes  the datasets of robot demonstrations ("vla").
    init      the `final` folder of an earlier training; None starts from random weights.
    init_depth_encoder  the `final` folder of a "depth" recipe, whose encoder joins SPEAR-VLM.
    """

    labels: Sequence[Path] = ()
    episodes: "Sequence[WeightedStore]" = ()
    init: Path | None = None
    init_depth_encoder: Path | None = None


def check_inputs(recipe: Recipe, inputs: "TrainingInputs | TrainOptions") -> None:
    """Check that the inputs are all that the recipe needs, and none that it would ignore.

    The check reads nothing from disk. It raises `SpearError` for the first input that is missing,
    and for the first input or change (`--set`) that would have no effect.
    """
    _check_data(recipe, inputs)
    _check_initial_weights(recipe, inputs)

    unused_keys = _list_unused_keys(recipe)
    for change in getattr(inputs, "set", ()):
        if change.partition("=")[0] in unused_keys:
            raise SpearError(
                f"--set {change} has no effect, because recipe {recipe.name} does not use this "
                "key. Leave it out."
            )


def _check_data(recipe: Recipe, inputs: "TrainingInputs | TrainOptions") -> None:
    """Check that the demonstrations and the labeled images are those that the recipe needs."""
    is_policy = recipe.kind == "vla"
    if is_policy and not inputs.episodes:
        raise SpearError(f"recipe {recipe.name} learns from demonstrations. Add --episodes FOLDER.")
    if inputs.episodes and not is_policy:
        raise SpearError(f"recipe {recipe.name} learns from labeled images. Leave --episodes out.")

    # Even a policy without questions needs labels if it is new, because its tokenizer and its 3D
    # tokens are made from them.
    needs_labels = not is_policy or not inputs.init or recipe.question_images > 0
    if needs_labels and not inputs.labels:
        init_option = "--init NAME to start from, or " if is_policy and not inputs.init else ""
        raise SpearError(
            f"recipe {recipe.name} needs {init_option}--labels FOLDER. `spear label --help` shows "
            "how to make one."
        )
    if inputs.labels and not needs_labels:
        raise SpearError(
            f"recipe {recipe.name} asks no questions. Leave --labels out, or add "
            "--set question_images=2."
        )


def _check_initial_weights(recipe: Recipe, inputs: "TrainingInputs | TrainOptions") -> None:
    """Check that the recipe can begin with the weights of `--init` and `--init-depth-encoder`."""
    is_vlm_with_moge = recipe.kind == "vlm" and recipe.moge
    if inputs.init_depth_encoder and not (is_vlm_with_moge and inputs.init):
        reason = "without --init" if is_vlm_with_moge else f"of kind {recipe.kind!r}"
        raise SpearError(
            f"recipe {recipe.name} {reason} takes no --init-depth-encoder, because MoGe's encoder "
            "joins the VLM of an earlier stage. Leave it out."
        )


def _list_unused_keys(recipe: Recipe) -> set[str]:
    """Return the keys that have no effect in a recipe, given its kind and its other values."""
    unused = set(UNUSED_KEYS[recipe.kind])
    if recipe.kind == "vla" and not recipe.question_images:
        unused |= _QUESTION_KEYS
    if not recipe.lora_rank:
        unused.add("lora_alpha")
    if recipe.optimization.schedule == "constant":
        unused.add("final_lr")
    if any(not _can_learn(prefix, recipe) for prefix in recipe.optimization.lr_scale):
        unused.add("lr_scale")
    return unused


def _can_learn(prefix: str, recipe: Recipe) -> bool:
    """Return whether a recipe trains anything inside the module `prefix`."""
    opt = recipe.optimization
    if recipe.lora_rank:  # LoRA matrices learn in frozen modules, too
        language_model = "vlm.language_model" if recipe.kind == "vla" else "language_model"
        if _overlaps(prefix, language_model):
            return True
    if any(is_under(prefix, frozen) for frozen in opt.frozen):
        return False
    return not opt.trained or any(_overlaps(prefix, trained) for trained in opt.trained)


def _overlaps(prefix: str, other: str) -> bool:
    """Return whether one of two modules is inside the other."""
    return is_under(prefix, other) or is_under(other, prefix)


class RecipesOptions(Options):
    recipe: Annotated[Positional[str | None], arg(metavar="[RECIPE]")] = None
    """Recipe whose settings to show; without it, all recipes are listed."""


class TrainOptions(Options):
    recipe: Annotated[Positional[str], arg(metavar="RECIPE")]
    """Name of the recipe (`spear recipes` lists them)."""
    out: OptionalFolder = None
    """Write checkpoints, logs and the result (OUT/final) to this folder; default: runs/RECIPE."""
    labels: tuple[Path, ...] = ()
    """Folders of labeled images from spear label; all images of a camera are drawn equally
    often."""
    episodes: tuple[Path, ...] = ()
    """Folders of robot demonstrations: from spear record, or RLDS or LeRobot datasets."""
    split: EpisodeSplit = "train"
    sampling_weights: Annotated[tuple[float, ...], Range(1e-9, 1e9)] = ()
    """Sampling weights of the folders of --episodes, one for each. Default: the weights in the list
    of known datasets (spear data datasets) if all are in it, otherwise equal weights."""
    init: OptionalName = None
    """Start from this trained folder, or from weights that come with this package (nano, the
    policy; nano-vlm-0, a VLM before it learns 3D). Without it, training starts from random
    weights."""
    init_depth_encoder: OptionalName = None
    """Trained folder of a depth recipe, or nano-depth (comes with this package): SPEAR-VLM begins
    with its encoder."""
    preset: OptionalPreset = None
    """Model size; default: the recipe's."""
    steps: OptionalInt = None
    """Number of steps; default: the recipe's."""
    batch_size: OptionalInt = None
    """Examples per step; default: the recipe's."""
    lr: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Peak learning rate; default: the recipe's."""
    warmup_steps: OptionalInt = None
    """Steps over which the learning rate rises to its peak; default: the recipe's."""
    seed: Seed = 0
    device: Device = "auto"
    save_steps: Annotated[int, Range(1)] = 500
    """Steps between checkpoints. One is also written every three minutes, on SIGTERM and on
    Ctrl-C."""
    workers: Annotated[int, Range(1, 1024)] = 1
    """Processes that load batches, per training process; more help where training waits for
    data."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """What each process holds when torchrun starts several: ddp, the whole model; fsdp, its part of
    it."""
    set: RecipeChanges = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampling_weights and len(self.sampling_weights) != len(self.episodes):
            weights = format_count(len(self.sampling_weights), "numbers")
            folders = format_count(len(self.episodes), "folders")
            raise SpearError(
                f"--sampling-weights has {weights}, and --episodes has {folders}. Give one number "
                "for each folder."
            )


class EstimateMemoryOptions(Options):
    recipe: str = "finetune-lora"
    """Name of a policy's or VLM's recipe (`spear recipes` lists them), or inference."""
    preset: OptionalPreset = None
    """Model size; default: the recipe's."""
    gpu: str = "24GB"
    """Memory of the GPU by its data sheet, such as 24GB."""
    batch_size: Annotated[OptionalInt, Range(1)] = None
    """Examples per training step (with inference: observations at once); default: the recipe's."""
    set: RecipeChanges = ()
