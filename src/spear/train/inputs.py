"""What a recipe learns from and begins with, checked before anything is read, prepared or waits in a
queue."""

from __future__ import annotations

from spear.errors import SpearError
from spear.train.recipes import Recipe


def check_inputs(stage: Recipe, labels: bool, episodes: bool, init: bool, moge: bool) -> None:
    """Whether a recipe needs and takes what is given to it.

    labels, episodes, init, moge: whether there are any. Raises `SpearError` for what is missing, and for what
    would change nothing.
    """
    name, acts = stage.name, stage.kind == "vla"
    if acts and not episodes:
        raise SpearError(f"recipe {name} learns from demonstrations: give --episodes FOLDER")
    if episodes and not acts:
        raise SpearError(f"recipe {name} learns from labelled images: leave --episodes out")
    if not labels and (not acts or not init or stage.question_images):
        raise SpearError(f"recipe {name} needs --labels FOLDER (see `spear label --help`)")
    if init and stage.kind in ("depth", "naming"):
        raise SpearError(f"recipe {name} begins with random weights: leave --init out")
    if moge and not (stage.kind == "vlm" and stage.moge and init):
        where = "without --init" if stage.kind == "vlm" and stage.moge else f"of kind {stage.kind!r}"
        raise SpearError(f"recipe {name} {where} takes no --moge: it joins the VLM of an earlier stage")
