"""What a training is told: recipes and the values they take, what it learns from, the commands' options.

Nothing here needs PyTorch, so that help, lists and mistakes are shown at once.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from tyro.conf import Positional, arg

from spear.errors import SpearError, check_known, first_line, unknown_name
from spear.labels.questions.templates import FAMILIES, FAMILIES_2D, FAMILIES_PIXEL
from spear.util.options import Changes, Device, Folder, Name, Number, Options, Seed, Split, Within

if TYPE_CHECKING:
    from spear.data.store.episode_store import EpisodeStore

Kind = Literal["depth", "naming", "vlm", "vla"]
Precision = Literal["bf16", "fp32"]
Count = Annotated[int, Ge(0)]
Some = Annotated[int, Ge(1)]
Amount = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
Decay = Annotated[float, Ge(0), Lt(1)]


@dataclass(frozen=True)
class Optimization:
    """How the weights move; the part of a recipe that the loop reads.

    lr                peak learning rate.
    lr_scale          module prefix -> factor on `lr`; the longest matching prefix wins.
    frozen            module prefixes that do not learn.
    trained           if not empty: only these prefixes learn (then `frozen` is applied within them).
    schedule          "cosine" to `final_lr` x lr after `warmup` linear steps, or "constant" after it.
    weight_decay, betas  AdamW's (our choice). grad_clip: the norm beyond which gradients are scaled down.
    ema               decay of the averaged weights; 0 turns averaging off. Ramped up as (1+k)/(10+k).
    precision         "bf16" autocasts forward passes where that is fast (`models.devices`); not the weights.
    frozen_precision  "bf16" keeps frozen linear layers and token embeddings in bfloat16, at half the memory.
    accumulate        pieces in which a process works through its batch; their gradients are averaged. A run
                      that is continued keeps its pieces (`spear.train.parallel`).
    max_skipped       steps whose loss or gradient is not finite are skipped; more than so many end the run.
    gradient_checkpointing  layers run again on the way back instead of being kept (`spear.models.layers`).
    """

    steps: Count
    lr: Amount
    lr_scale: Mapping[str, Amount] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: Count = 100
    final_lr: Fraction = 0.05
    weight_decay: Amount = 0.01
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    grad_clip: Positive = 1.0
    ema: Decay = 0.999
    precision: Precision = "bf16"
    frozen_precision: Precision = "fp32"
    accumulate: Some = 1
    gradient_checkpointing: bool = False
    max_skipped: Count = 10

    def __post_init__(self) -> None:
        if self.frozen_precision == "bf16" and self.precision == "fp32":  # which could not use them
            raise SpearError("frozen_precision bf16 needs precision bf16: set both, or neither")


@dataclass(frozen=True)
class QuestionMix:
    """Which questions a batch asks.

    families             of `spear.labels.questions.generate`; a name given twice is drawn twice as often.
    pairs                fewest and most question/answer pairs per image (paper: 1 to 4).
    wrist                fraction of batches drawn from wrist-camera images, where there are any (our choice);
                         None: their share of all images.
    coordinate_weight    the paper's λ: factor on the loss of 3D tokens.
    coordinate_smoothing standard deviation, in bins, of a 3D token's Gaussian target; 0 is one-hot (paper).
    most_images          ask only about the first so many labelled images of each view (0: about all).
    """

    families: tuple[str, ...] = FAMILIES
    pairs: tuple[Some, Some] = (1, 4)
    wrist: Fraction | None = None
    coordinate_weight: Amount = 2.0
    coordinate_smoothing: Amount = 0.0
    most_images: Count = 0


@dataclass(frozen=True)
class Recipe:
    """One stage of training.

    kind          "depth" (the MoGe-style encoder alone), "naming" (the SigLIP-style one), "vlm" or "vla".
    preset        the model's size (`spear.models.presets`).
    moge          False leaves the MoGe branch out (stage 0: a plain PaliGemma).
    coordinate_rows_only  of the token embeddings only the 3D tokens' rows learn (the paper's VLM stage 1).
    smooth_tokens  new 3D tokens start out alike where their bins are alike (`spear.tokens`; our choice).
    bins, spacing  how many 3D tokens, and where the edges of their bins lie: new ones, fitted to the labels.
                  None: those of `--init`; without one, the preset's number, at quantiles (the paper).
    batch_size    images per step ("vlm", "depth") or robot steps per step ("vla").
    flow_samples  draws of (noise, τ) per robot step; the prefix is computed once for all (our choice).
    question_images, question_weight  images with 3D questions beside a batch (0: none), their weight (ours).
    augment       strength of photometric augmentation, 0 to 1.
    normalization  of translations: "quantile" (the paper), "minmax" or "meanstd"; also of positions (ours).
                  None: as the policy of `--init`; a new one "quantile".
    normalize_each  each dataset by its own statistics, instead of all by those of the mixture (for ablation).
    flow          fields of `spear.flow.FlowConfig` that differ from the preset's, or those of `--init`.
    committed     the longest delay to learn to act under: so many actions at a chunk's beginning may be given
                  (`spear.flow.sample_held`). None: as the policy of `--init` did; a new one 0, the paper's.
    lora_rank     if not 0, the language model also learns through LoRA matrices of this rank.
    lora_alpha    they count alpha / rank (`spear.train.optimize`).
    """

    name: str
    kind: Kind
    preset: str
    description: str
    optimization: Optimization
    batch_size: Some
    moge: bool = True
    coordinate_rows_only: bool = False
    smooth_tokens: bool = False
    bins: Annotated[int, Ge(2)] | None = None
    spacing: Literal["quantile", "uniform"] | None = None
    questions: QuestionMix = QuestionMix()
    flow_samples: Some = 1
    question_images: Count = 0
    question_weight: Amount = 1.0
    augment: Fraction = 0.0
    normalization: Literal["quantile", "minmax", "meanstd"] | None = None
    normalize_each: bool = False
    flow: Mapping[str, bool | float | str] = field(default_factory=dict)
    committed: Count | None = None
    lora_rank: Count = 0
    lora_alpha: Positive = 16.0

    def with_changes(self, **changes: Any) -> "Recipe":
        """With fields of its own, its optimisation or its question mix replaced.

        Raises `SpearError` for an unknown key, suggesting the nearest, and for a value that is not allowed.
        """
        for key, value in changes.items():
            check_known("recipe key", _HOME, key)
            _check(_HOME[key], key, value)
        return self.with_fields(**changes)

    def with_fields(self, **keys: Any) -> "Recipe":
        """As `with_changes`, of keys and values that are known to be right."""
        new: dict[type, dict[str, Any]] = {part: {} for part in (Recipe, Optimization, QuestionMix)}
        for key, value in keys.items():
            new[_HOME[key]][key] = value
        opt = dataclasses.replace(self.optimization, **new[Optimization])
        mix = dataclasses.replace(self.questions, **new[QuestionMix])
        return dataclasses.replace(self, optimization=opt, questions=mix, **new[Recipe])


_HOME = {
    f.name: part
    for part in (Recipe, Optimization, QuestionMix)
    for f in dataclasses.fields(part)
    if f.name not in ("optimization", "questions")
}
"""Key of a recipe -> the class that has it."""


def matches(name: str, prefix: str) -> bool:
    """Whether a prefix of modules covers a parameter or module of this name."""
    return name == prefix or name.startswith(prefix + ".")


def _check(part: type, key: str, value: Any) -> None:
    """Raises `SpearError` for a value that is not of a dataclass's field's type, or not in its range."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    hint = get_type_hints(part, include_extras=True)[key]
    strict = ConfigDict(strict=True, allow_inf_nan=False)
    try:
        # Through JSON, in which lists are tuples and whole numbers are numbers, but words and flags are not.
        TypeAdapter(hint, config=strict).validate_json(json.dumps(value))
    except (ValidationError, TypeError) as error:
        words = [
            word
            for h in (hint, *get_args(hint))
            if get_origin(h) is Literal
            for word in get_args(h)
        ]
        if words:
            raise unknown_name(key, str(value), words) from error
        raise SpearError(f"recipe key {key} is {value!r}: {first_line(error)}") from error
    if key == "pairs" and value[0] > value[1]:
        raise SpearError(f"recipe key {key} is {value}: the fewest come first")
    if key == "families":
        known = (*FAMILIES, *FAMILIES_2D, *FAMILIES_PIXEL)
        check_known(f"family of questions (recipe key {key})", known, *(value or [""]))


_ACTS = "flow_samples question_images question_weight normalization normalize_each flow committed"
_ASKS = "families pairs wrist most_images question_weight coordinate_weight coordinate_smoothing"
UNUSED = {"vla": "coordinate_rows_only smooth_tokens", "vlm": _ACTS}
UNUSED["naming"] = f"{_ACTS} {_ASKS} {UNUSED['vla']} augment lora_rank lora_alpha"
UNUSED["depth"] = f"{UNUSED['naming']} moge bins spacing"
"""Kind -> the keys of a recipe that change nothing in it; `_ASKS` nothing where no questions are asked."""


@dataclass(frozen=True)
class TrainingInputs:
    """What a stage learns from and starts from.

    labels    folders of labelled images ("depth", "naming" and "vlm" recipes; "vla": for questions beside).
    episodes  (name, store, share of the batches) of robot demonstrations ("vla").
    init      the `final` folder of an earlier stage; None starts from random weights.
    moge      the `final` folder of a "depth" recipe, whose encoder joins SPEAR-VLM.
    """

    labels: Sequence[Path] = ()
    episodes: "Sequence[tuple[str, EpisodeStore, float]]" = ()
    init: Path | None = None
    moge: Path | None = None


def check_inputs(stage: Recipe, given: "TrainingInputs | TrainOptions") -> None:
    """Whether a recipe needs and takes what is given to it; looks at nothing on disk.

    Raises `SpearError` for what is missing, and for what would change nothing.
    """
    name, acts = stage.name, stage.kind == "vla"
    if acts and not given.episodes:
        raise SpearError(f"recipe {name} learns from demonstrations: give --episodes FOLDER")
    if given.episodes and not acts:
        raise SpearError(f"recipe {name} learns from labelled images: leave --episodes out")
    if not given.labels and (not acts or not given.init or stage.question_images):
        start = "--init NAME to start from, or " if acts and not given.init else ""
        raise SpearError(f"recipe {name} needs {start}--labels FOLDER (see `spear label --help`)")
    if acts and given.labels and given.init and not stage.question_images:
        raise SpearError(
            f"recipe {name} asks no questions: leave --labels out, or --set question_images=2"
        )
    if given.init and stage.kind in ("depth", "naming"):
        raise SpearError(f"recipe {name} begins with random weights: leave --init out")
    if given.moge and not (stage.kind == "vlm" and stage.moge and given.init):
        where = (
            "without --init" if stage.kind == "vlm" and stage.moge else f"of kind {stage.kind!r}"
        )
        raise SpearError(
            f"recipe {name} {where} takes no --moge: it joins the VLM of an earlier stage"
        )
    silent = _ASKS if acts and not stage.question_images else ""
    opt, unused = stage.optimization, f"{UNUSED[stage.kind]} {silent}".split()
    unused += [] if stage.lora_rank else ["lora_alpha"]
    unused += ["final_lr"] if opt.schedule == "constant" else []
    part = opt.trained or opt.lr_scale  # all, where all learn
    still = [p for p in opt.lr_scale if any(matches(p, frozen) for frozen in opt.frozen)]
    still += [
        p for p in opt.lr_scale if not any(matches(p, one) or matches(one, p) for one in part)
    ]
    adapted = ("vlm.language_model" if acts else "language_model",) if stage.lora_rank else ()
    idle = [p for p in still if not any(matches(one, p) or matches(p, one) for one in adapted)]
    unused += ["lr_scale"] if idle else []
    if useless := [word for word in getattr(given, "set", ()) if word.partition("=")[0] in unused]:
        raise SpearError(f"--set {useless[0]}: recipe {name} does not use it: leave it out")


class TrainOptions(Options):
    recipe: Annotated[Positional[str], arg(metavar="RECIPE")]
    """Name of the recipe, or list."""
    out: Folder = None
    """Folder for checkpoints, logs and the result (OUT/final); default: runs/RECIPE."""
    labels: tuple[Path, ...] = ()
    """Folders of labelled images, from spear label; every image of a camera counts the same."""
    episodes: tuple[Path, ...] = ()
    """Folders of robot demonstrations: from spear record, or RLDS or LeRobot datasets."""
    split: Split = "train"
    shares: Annotated[tuple[float, ...], Within(1e-9, 1e9)] = ()
    """Shares of the folders in each batch, one for each. Without them: those in the list of known datasets
    (spear data datasets) where all are in it, otherwise equal ones."""
    init: Name = None
    """Where to start from: a trained folder, or the name of weights that come with this package (nano, the
    policy; nano-vlm-0, before it learns 3D). Without it, training starts from random weights."""
    moge: Name = None
    """Trained folder of a depth recipe, whose encoder SPEAR-VLM begins with, or nano-depth (built in)."""
    preset: Name = None
    """Model size, when it shall not be the recipe's: nano, small or spear1."""
    steps: Number = None
    """Number of steps, when it shall not be the recipe's."""
    seed: Seed = 0
    device: Device = "auto"
    save_every: Annotated[int, Within(1)] = 500
    """Steps between checkpoints. They are also written every three minutes, on SIGTERM and on Ctrl-C."""
    workers: Annotated[int, Within(1, 1024)] = 1
    """Processes that make batches, for each that trains; more help where it waits for data."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """What each of several processes (torchrun) holds: ddp, the whole model; fsdp, its share of it."""
    set: Changes = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shares and len(self.shares) != len(self.episodes):
            count, folders = len(self.shares), len(self.episodes)
            raise SpearError(
                f"--shares: {count}, folders of --episodes: {folders}: give one for each"
            )


class PlanOptions(Options):
    recipe: str = "finetune-lora"
    """A policy's or VLM's recipe (spear train list shows them), or inference."""
    preset: Name = None
    """Model size, when it shall not be the recipe's: nano, small or spear1."""
    gpu: str = "24GB"
    """Memory of the GPU as it is sold, such as 24GB."""
    batch_size: Annotated[Number, Within(1)] = None
    """Examples per training step (inference: observations at once), when not the recipe's."""
    set: Changes = ()
