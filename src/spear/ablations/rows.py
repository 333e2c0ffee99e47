"""The ablations as data: what each row trains, and which published number it is the counterpart of.

A row is a chain of stages, each a recipe with changes; a stage begins where the one before it ended. Rows
that begin alike share those stages. Nothing here runs anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from spear.errors import SpearError, unknown_name
from spear.labels.questions.templates import FAMILIES_2D, FAMILIES_PIXEL
from spear.models.presets import PRESETS
from spear.train.recipes import ENCODERS, RECIPES
from spear.util.options import AtLeast, Changes, Folder, Options


@dataclass(frozen=True)
class Stage:
    """One training of a row.

    recipe   of `spear.train.recipes`; changes: as in `Recipe.changed`.
    length   factor on the recipe's steps; 0 only puts the network together.
    moge     the pretrained depth encoder joins.
    again    continues the stage before it on the same data: in another order.
    """

    recipe: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    length: float = 1.0
    moge: bool = False
    again: bool = False


@dataclass(frozen=True)
class Row:
    """One line of a table.

    name        for the command line.
    title       for people: what is different in it; where the paper has the row, its name in the published
                numbers.
    stages      what is trained, in order; the last one is the policy.
    images      share of the 3D-labelled images that questions are asked about.
    pretrained  begins with the pretrained VLM; False: with random weights.
    """

    name: str
    title: str
    stages: Sequence[Stage]
    images: float = 1.0
    pretrained: bool = True


@dataclass(frozen=True)
class Table:
    """Rows that belong together.

    against    name of the row that the others are compared with.
    reference  name of the published table (`spear.evaluate.reference`); "" where there is none.
    note       what to know when reading it.
    """

    name: str
    title: str
    against: str
    rows: Sequence[Row]
    reference: str = ""
    note: str = ""


_ACTING = RECIPES["nano-vla"].optimization
_ALSO_FROZEN = tuple(p for p in _ACTING.frozen if p != "vlm.moge")
"""What the nano policy keeps as it is beside MoGe."""
_SIGLIP_FROZEN = ("vlm.moge", "vlm.vision_tower")
_RATE = 6e-4
_VLM_RATE = _ACTING.lr / _RATE
_SIGLIP_RATE = _ACTING.lr_scale["vlm.vision_tower"] * _VLM_RATE
_RATES = {"vlm": _VLM_RATE, "vlm.vision_tower": _SIGLIP_RATE}
"""Factors on the policies' learning rate, with which the VLM's rates are the recipe's."""
_SLOWLY = {"multi_modal_projector": 0.02}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "nano-vlm-1": {"lr_scale": {**_SLOWLY, "moge_projector": 0.02}},
    "nano-vlm-2": {"lr": 2.5e-4},
    "nano-vla": {"lr": _RATE, "lr_scale": _RATES, "question_images": 0},
}
"""How a recipe is trained here, in all rows alike, unless `--set` or a row says otherwise (docs/ablations.md
says what was tried).

Stage 1 as good as learns the 3D tokens alone: projections that learn as fast, before a language model that
cannot answer yet, lead to visual tokens that it no longer reads. Stage 2 begins with a VLM that finds things,
and has a rate at which that is not forgotten. In the policy the action expert learns faster than the VLM,
whose rate is the recipe's, and no questions are asked beside the actions, as in the paper: the recipe's are
our choice and have their own row.
"""
LENGTHS = {"nano-vlm-2": 0.4}
"""Factors on recipes' steps, in all rows alike."""
_PLAIN = {"moge": False, "frozen": _ALSO_FROZEN}
"""A policy whose VLM has no MoGe."""
_UNTRAINED = {**_PLAIN, "frozen": (), "lr_scale": {"vlm": _VLM_RATE}}
"""The same when nothing was pretrained, so that nothing is worth keeping."""
_NO_MOGE_1 = {
    "moge": False,
    "trained": tuple(p for p in RECIPES["nano-vlm-1"].optimization.trained if p != "moge_projector"),
    "lr_scale": _SLOWLY,
}

_VLM_1, _VLM_2, _POLICY = Stage("nano-vlm-1", moge=True), Stage("nano-vlm-2"), Stage("nano-vla")
_SPEAR_VLM = (_VLM_1, _VLM_2)
_FULL = (*_SPEAR_VLM, _POLICY)


def _about_pixels(stage: str) -> dict[str, Any]:
    """A stage's question mix with every 3D question about objects replaced by one about a pixel."""
    families = RECIPES[stage].questions.families
    return {"families": tuple(f if f in FAMILIES_2D else FAMILIES_PIXEL[0] for f in families)}


def _policy(**changes: Any) -> tuple[Stage, ...]:
    """The full method, with a policy trained differently."""
    return (*_SPEAR_VLM, Stage("nano-vla", changes))


def _rotation(kind: str, loss: str) -> tuple[Stage, ...]:
    weight = ROTATION_WEIGHTS[kind, loss]
    return _policy(flow={"rotation": kind, "rotation_loss": loss, "rotation_weight": weight})


def _longer(factor: float) -> tuple[Stage, ...]:
    return (Stage("nano-vla", _PLAIN, factor),)


def _scratch(name: str, factor: float) -> Row:
    title = f"from random weights, {factor:.1f} × the steps"
    return Row(name, title, (Stage("nano-vla", _UNTRAINED, factor),), pretrained=False)


_WEIGHT = PRESETS["nano"].flow["rotation_weight"]
ROTATION_WEIGHTS = {
    ("s3", "mse"): _WEIGHT,
    ("s3", "cosine"): 4 * _WEIGHT,
    ("linear", "mse"): 16 * _WEIGHT,
    ("linear", "cosine"): 8 * _WEIGHT,
}
"""Factors on the four rotation losses under which a small error in angle costs the same in all of them, as
much as in the preset (our choice: otherwise the table would compare weights)."""
VELOCITY = {
    "prediction": "velocity",
    "rotation_loss": "cosine",
    "geodesic_weight": 1.0,
    "geodesic_step": 0.1,
    "rotation_weight": 1.32 * _WEIGHT,
}
"""The paper's loss, with a weight under which a turn of 0.1 rad that is not made costs what it costs in the
other rows, when the velocity from the noise leads where the clean action would be. (Later all parts of the
loss grow as 1 / (1 - τ)². The geodesic term is linear in the angle: at one angle alone can they be equal.)"""


def _samples(name: str) -> int:
    return RECIPES[name].optimization.steps * RECIPES[name].batch_size


AS_LONG = _samples("nano-vla-no-3d") / _samples("nano-vla")
"""How many more samples a policy sees that also gets the compute that the others spend on SPEAR-VLM, where
all take the recipes' own steps."""

_POINTS = tuple(Stage(one.recipe, _about_pixels(one.recipe), moge=one.moge) for one in _SPEAR_VLM)
_NO_MOGE = (
    Stage("nano-vlm-1", _NO_MOGE_1),
    Stage("nano-vlm-2", {"moge": False, "lr_scale": {"vision_tower": 0.3}}),
    Stage("nano-vla", _PLAIN),
)
_ENCODERS_FROZEN = (_VLM_1, Stage("nano-vlm-2", {"frozen": ENCODERS, "lr_scale": {}}), _POLICY)
_MOGE_TRAINED = _policy(frozen=_ALSO_FROZEN, lr_scale={**_RATES, "vlm.moge": _SIGLIP_RATE})
_THAWED = (
    *_SPEAR_VLM,
    Stage("nano-vla", {"frozen": _SIGLIP_FROZEN, "schedule": "constant"}, 0.5),
    Stage("nano-vla", {"warmup": 0}, 0.5, again=True),
)
_NO_IMAGES = (Stage("nano-vlm-1", length=0.0, moge=True), _POLICY)
_BESIDE = _policy(question_images=RECIPES["nano-vla"].question_images)

TABLES: tuple[Table, ...] = (
    Table(
        "3d",
        "What 3D pretraining brings",
        "full",
        (
            Row("full", "full", _FULL),
            Row("no-3d", "no 3D", _longer(1.0)),
            Row("points", "points but no objects", (*_POINTS, _POLICY)),
            Row("no-moge", "no MoGe", _NO_MOGE),
            Row("encoders-frozen", "encoders frozen in the VLM stage", _ENCODERS_FROZEN),
            Row("moge-trained", "MoGe trained with actions", _MOGE_TRAINED),
            Row("questions-beside", "3D questions beside the actions too", _BESIDE),
        ),
        "ablations",
    ),
    Table(
        "rotation",
        "Rotation: space and loss",
        "s3-cosine",
        (
            Row("linear-mse", "linear, MSE", _rotation("linear", "mse")),
            Row("linear-cosine", "linear, cosine", _rotation("linear", "cosine")),
            Row("s3-mse", "S³, MSE", _rotation("s3", "mse")),
            Row("s3-cosine", "S³, cosine", _rotation("s3", "cosine")),
            Row("velocity", "S³, cosine + geodesic, of velocities", _policy(flow=VELOCITY)),
        ),
        "rotation",
        "The nano policy predicts the clean action, and its losses compare actions; the last row is the "
        "paper's own loss, on predicted velocities, in our form (`FlowConfig`). A missed turn of 0.1 rad "
        "costs the same in all.",
    ),
    Table(
        "normalisation",
        "Normalisation of translations",
        "quantile",
        (
            Row("min-max", "min-max", _policy(normalization="minmax")),
            Row("quantile", "1–99 % quantile", _FULL),
            Row("mean-std", "mean-std", _policy(normalization="meanstd")),
        ),
        "normalisation",
        "The policy's own positions (proprioception) are normalised in the same way (our choice).",
    ),
    Table(
        "siglip",
        "SigLIP while actions are learned",
        "siglip-trained",
        (
            Row("siglip-trained", "trained", _FULL),
            Row("siglip-frozen", "frozen", _policy(frozen=_SIGLIP_FROZEN)),
            Row("siglip-thawed", "frozen, then trained", _THAWED),
        ),
        "siglip",
        "Trained is all of SigLIP but its stem and its positions, at 0.3 × the rate of the rest of the VLM, "
        "as in the recipe (our choice for nano).",
    ),
    Table(
        "converged",
        "Without 3D, trained to convergence",
        "full-again",
        (
            Row("full-again", "full", _FULL),
            Row("no-3d-as-long", f"no 3D, {AS_LONG:.1f} × the steps", _longer(AS_LONG)),
            Row("no-3d-x5", f"no 3D, {2 * AS_LONG:.1f} × the steps", _longer(2 * AS_LONG)),
            Row("no-3d-x9", f"no 3D, {4 * AS_LONG:.1f} × the steps", _longer(4 * AS_LONG)),
            _scratch("scratch", AS_LONG),
            _scratch("scratch-x9", 4 * AS_LONG),
        ),
        note="Whether longer training would still help is read from neighbouring rows, each twice as long "
        "as the last.",
    ),
    Table(
        "images",
        "How much 3D data",
        "all-images",
        (
            Row("no-images", "none", _NO_IMAGES, images=0.0),
            Row("images-256th", "1/256 of the images", _FULL, images=1 / 256),
            Row("images-64th", "1/64", _FULL, images=1 / 64),
            Row("images-16th", "1/16", _FULL, images=1 / 16),
            Row("images-4th", "1/4", _FULL, images=1 / 4),
            Row("all-images", "all", _FULL),
        ),
        note="The paper left this open. Every row but the first trains for as many steps: fewer images are "
        "seen more often. The pretrained weights are the same in all rows.",
    ),
)


@dataclass(frozen=True)
class AblationOptions(Options):
    """The options of `spear evaluate ablations`."""

    rows: tuple[str, ...] = ()
    """Rows, or whole tables (3d, rotation, normalisation, siglip, converged, images); all without it."""
    seeds: Annotated[int, AtLeast(1)] = 3
    """Trainings of each row."""
    scenes: Annotated[int, AtLeast(1)] = 200
    """Held-out scenes of each task family, for every training."""
    out: Path = Path("runs/ablations")
    """Folder for everything."""
    labels: Folder = None
    """Folder of labelled scenes, from spear label. Without it, 13,056 scenes are labelled into OUT/labels."""
    episodes: Folder = None
    """Folder of demonstrations, from spear record. Without it, 2,000 per family are made in OUT/episodes."""
    init: str = "nano-vlm-0"
    """What stands for PaliGemma's weights in all rows: a trained folder of nano-vlm-0, or that name for the
    one that comes with this package."""
    moge: str = "nano-depth"
    """What stands for MoGe's: the same of nano-depth."""
    budget: Annotated[int | None, AtLeast(1)] = None
    """Steps of the full row's policy, to which all policies are in proportion. Without it the recipes' own
    12,000 steps."""
    pretraining: float = 1.0
    """Factor on the steps of SPEAR-VLM's stages."""
    families: tuple[str, ...] = ()
    """Task families that policies learn (where demonstrations are made) and are scored on; all of them when
    none is given."""
    set: Changes = ()
    workers: Annotated[int, AtLeast(0)] = 1
    """Processes that prepare batches, for each training."""
    plan: bool = False
    """Only print what would be done."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.pretraining < math.inf:
            raise SpearError(
                f"--pretraining {self.pretraining:g}: give a positive number, 1 for the recipes' own steps"
            )


def choose(names: Sequence[str]) -> list[tuple[Table, list[Row]]]:
    """The tables with the chosen rows, by names of rows or of whole tables (none: everything).

    The row that a table compares with always comes along. Raises `SpearError` for a name that there is not.
    """
    known = {row.name for table in TABLES for row in table.rows} | {table.name for table in TABLES}
    for name in names:
        if name not in known:
            raise unknown_name("ablation", name, known)
    chosen = []
    for table in TABLES:
        wanted = [r for r in table.rows if not names or table.name in names or r.name in names]
        if wanted:
            chosen.append((table, [r for r in table.rows if r in wanted or r.name == table.against]))
    return chosen
