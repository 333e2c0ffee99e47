"""The ablations as data: what each row trains, and which published number it is the counterpart of.

A row is a chain of stages, each a recipe with changes; a stage begins where the one before it ended. Rows
that begin alike share those stages. Nothing here runs anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spear.errors import unknown_name
from spear.labels.questions.generate import FAMILIES_2D, FAMILIES_PIXEL
from spear.models.presets import PRESETS
from spear.train.recipes import ENCODERS, RECIPES


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

    name       for the command line.
    title      for people: what is different in it.
    stages     what is trained, in order; the last one is the policy.
    published  the counterpart's name in the table's published numbers; "" where the paper has none.
    images     share of the 3D-labelled images that questions are asked about.
    pretrained  begins with the pretrained VLM; False: with random weights.
    """

    name: str
    title: str
    stages: Sequence[Stage]
    published: str = ""
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


def _share(name: str, title: str, images: float) -> Row:
    return Row(name, title, _FULL, images=images)


_WEIGHT = PRESETS["nano"].flow["rotation_weight"]
ROTATION_WEIGHTS = {
    ("s3", "mse"): _WEIGHT,
    ("s3", "cosine"): 4 * _WEIGHT,
    ("linear", "mse"): 16 * _WEIGHT,
    ("linear", "cosine"): 8 * _WEIGHT,
}
"""Factors on the four rotation losses under which a small error in angle costs the same in all of them, as
much as in the preset (our choice: otherwise the table would compare weights)."""
_VELOCITY = {
    "prediction": "velocity",
    "rotation_loss": "cosine",
    "geodesic_weight": 1.0,
    "rotation_weight": 1.0,
}


def _samples(name: str) -> int:
    return RECIPES[name].optimization.steps * RECIPES[name].batch_size


AS_LONG = _samples("nano-vla-no-3d") / _samples("nano-vla")
"""How many more samples a policy sees that also gets the compute that the others spend on SPEAR-VLM, where
all take the recipes' own steps."""

TABLES: tuple[Table, ...] = (
    Table(
        "3d",
        "What 3D pretraining brings",
        "full",
        (
            Row("full", "full method", _FULL, "full"),
            Row("no-3d", "no 3D", _longer(1.0), "no 3D"),
            Row(
                "points",
                "points, no objects",
                (
                    Stage("nano-vlm-1", _about_pixels("nano-vlm-1"), moge=True),
                    Stage("nano-vlm-2", _about_pixels("nano-vlm-2")),
                    _POLICY,
                ),
                "points but no objects",
            ),
            Row(
                "no-moge",
                "no MoGe",
                (
                    Stage("nano-vlm-1", _NO_MOGE_1),
                    Stage("nano-vlm-2", {"moge": False, "lr_scale": {"vision_tower": 0.3}}),
                    Stage("nano-vla", _PLAIN),
                ),
                "no MoGe",
            ),
            Row(
                "encoders-frozen",
                "encoders frozen in the VLM stage",
                (_VLM_1, Stage("nano-vlm-2", {"frozen": ENCODERS, "lr_scale": {}}), _POLICY),
                "encoders frozen in the VLM stage",
            ),
            Row(
                "moge-trained",
                "MoGe trained with actions",
                _policy(frozen=_ALSO_FROZEN, lr_scale={**_RATES, "vlm.moge": _SIGLIP_RATE}),
                "MoGe trained with actions",
            ),
            Row(
                "questions-beside",
                "3D questions beside the actions too",
                _policy(question_images=RECIPES["nano-vla"].question_images),
            ),
        ),
        "ablations",
    ),
    Table(
        "rotation",
        "Rotation: space and loss",
        "s3-cosine",
        (
            Row("linear-mse", "linear, MSE", _rotation("linear", "mse"), "linear, MSE"),
            Row("linear-cosine", "linear, cosine", _rotation("linear", "cosine"), "linear, cosine"),
            Row("s3-mse", "S³, MSE", _rotation("s3", "mse"), "S³, MSE"),
            Row("s3-cosine", "S³, cosine", _rotation("s3", "cosine"), "S³, cosine"),
            Row("velocity", "S³, cosine + geodesic, of velocities", _policy(flow=_VELOCITY)),
        ),
        "rotation",
        "The nano policy predicts the clean action, and its losses compare actions; the last row is the paper's own "
        "loss, on predicted velocities, in our form (`FlowConfig`).",
    ),
    Table(
        "normalisation",
        "Normalisation of translations",
        "quantile",
        (
            Row("min-max", "min-max", _policy(normalization="minmax"), "min-max"),
            Row("quantile", "1–99 % quantile", _FULL, "1–99 % quantile"),
            Row("mean-std", "mean-std", _policy(normalization="meanstd"), "mean-std"),
        ),
        "normalisation",
        "The positions that the policy is told of (proprioception) are normalised in the same way (our choice).",
    ),
    Table(
        "siglip",
        "SigLIP while actions are learned",
        "siglip-trained",
        (
            Row("siglip-trained", "trained", _FULL, "trained"),
            Row(
                "siglip-frozen",
                "frozen",
                _policy(frozen=_SIGLIP_FROZEN),
                "frozen",
            ),
            Row(
                "siglip-thawed",
                "frozen, then trained",
                (
                    *_SPEAR_VLM,
                    Stage(
                        "nano-vla",
                        {"frozen": _SIGLIP_FROZEN, "schedule": "constant"},
                        0.5,
                    ),
                    Stage("nano-vla", {"warmup": 0}, 0.5, again=True),
                ),
                "frozen, then trained",
            ),
        ),
        "siglip",
        "Trained is all of SigLIP but its stem and its positions, at 0.3 × the rate of the rest of the VLM, as in the "
        "recipe (our choice for nano).",
    ),
    Table(
        "converged",
        "Without 3D, trained to convergence",
        "full-again",
        (
            Row("full-again", "full method", _FULL),
            Row("no-3d-as-long", f"no 3D, {AS_LONG:.1f} × the steps", _longer(AS_LONG)),
            Row("no-3d-x5", f"no 3D, {2 * AS_LONG:.1f} × the steps", _longer(2 * AS_LONG)),
            Row("no-3d-x9", f"no 3D, {4 * AS_LONG:.1f} × the steps", _longer(4 * AS_LONG)),
            Row(
                "scratch",
                f"from random weights, {AS_LONG:.1f} × the steps",
                (Stage("nano-vla", _UNTRAINED, AS_LONG),),
                pretrained=False,
            ),
            Row(
                "scratch-x9",
                f"from random weights, {4 * AS_LONG:.1f} × the steps",
                (Stage("nano-vla", _UNTRAINED, 4 * AS_LONG),),
                pretrained=False,
            ),
        ),
        note="Whether longer training would still help is read from neighbouring rows, each twice as long as the last.",
    ),
    Table(
        "images",
        "How much 3D data",
        "all-images",
        (
            Row(
                "no-images",
                "none",
                (Stage("nano-vlm-1", length=0.0, moge=True), _POLICY),
                images=0.0,
            ),
            _share("images-256th", "1/256 of the images", 1 / 256),
            _share("images-64th", "1/64", 1 / 64),
            _share("images-16th", "1/16", 1 / 16),
            _share("images-4th", "1/4", 1 / 4),
            _share("all-images", "all", 1.0),
        ),
        note="The paper left this open. Every row but the first trains for as many steps: fewer images are seen more "
        "often. The pretrained weights are the same in all rows.",
    ),
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
