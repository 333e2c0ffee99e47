"""From rows to what has to be trained and scored: each training once, however many rows and seeds share it.

A training is known by its contents: recipe, preset, seed, data, and what it begins with. Its key is a hash of
these, so that what was trained under a key stays valid whatever else is asked for later.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spear.ablations.data import Data, settle
from spear.ablations.rows import LENGTHS, SETTINGS, Row, Stage, Table
from spear.errors import SpearError
from spear.evaluate.agents import fingerprint
from spear.flow import FlowConfig
from spear.models.presets import preset
from spear.policy import locate
from spear.sim.scene import FAMILIES
from spear.train.recipes import RECIPES, Recipe, recipe

POLICY = "nano-vla"
"""A budget is given as the steps of this recipe."""
AGAIN = 1000
"""Added to the seed of a stage that continues on the same data."""
_WORDS = ("name", "description", "starts_from")
"""Fields of a recipe that change nothing."""


@dataclass(frozen=True)
class Weights:
    """Trained weights that a plan begins with: their folder, and a hash of them."""

    folder: Path
    key: str


@dataclass(frozen=True)
class Pretrained:
    """What stands for published weights in all rows and seeds: `vlm` for PaliGemma's, `depth` for MoGe's."""

    vlm: Weights
    depth: Weights


@dataclass(frozen=True)
class Training:
    """One stage to train: a recipe as it will run, its seed, and what it begins with.

    init  the key of another training, pretrained weights, or nothing. moge: a pretrained encoder that joins.
    """

    key: str
    recipe: Recipe
    seed: int
    init: str | Weights | None = None
    moge: Weights | None = None

    @property
    def folder(self) -> str:
        """Its folder's name."""
        return f"{self.recipe.name}-{self.key}"

    @property
    def steps(self) -> int:
        """How long it is."""
        return self.recipe.optimization.steps


@dataclass(frozen=True)
class Scoring:
    """A trained policy to score, on so many scenes of each of some task families."""

    policy: Training
    scenes: int
    families: Sequence[str] = FAMILIES

    @property
    def episodes(self) -> int:
        """Of all families together."""
        return self.scenes * len(self.families)

    @property
    def folder(self) -> str:
        """Its folder's name. More scenes and families add to it."""
        return self.policy.key


@dataclass(frozen=True)
class Plan:
    """What there is to do, in order.

    tables   with their rows.
    jobs     trainings and scorings, each after what it needs; all rows of the first seed come first.
    chains   (row, seed) -> its trainings, the policy last.
    """

    tables: Sequence[tuple[Table, Sequence[Row]]]
    jobs: Sequence[Training | Scoring]
    chains: Mapping[tuple[str, int], Sequence[Training]]
    seeds: int
    scenes: int
    families: Sequence[str] = FAMILIES

    @property
    def trainings(self) -> list[Training]:
        """All of them, once each."""
        return [job for job in self.jobs if isinstance(job, Training)]

    @property
    def scorings(self) -> list[Scoring]:
        """All of them, once each."""
        return [job for job in self.jobs if isinstance(job, Scoring)]

    def scoring(self, row: str, seed: int) -> Scoring:
        """The one that gives a row's number for a seed."""
        return Scoring(self.chains[row, seed][-1], self.scenes, self.families)


def pretrained(vlm: str = "nano-vlm-0", depth: str = "nano-depth") -> Pretrained:
    """By names or folders; those that come with this package. Raises `SpearError` where there are none."""
    folders = locate(vlm), locate(depth)
    return Pretrained(*(Weights(folder, fingerprint(folder)) for folder in folders))


def make_plan(
    tables: Sequence[tuple[Table, Sequence[Row]]],
    data: Data,
    start: Pretrained,
    seeds: int = 3,
    scenes: int = 200,
    budget: int | None = None,
    changes: Mapping[str, Any] | None = None,
    pretraining: float = 1.0,
    families: Sequence[str] = FAMILIES,
) -> Plan:
    """All trainings and scorings that some rows need.

    scenes   held-out scenes per task family.
    budget   steps of the full row's policy, to which all policies are in proportion. None: the recipes' own
             steps.
    changes  to every recipe, as in `Recipe.changed`; what a row is about it keeps.
    pretraining  factor on the steps of SPEAR-VLM's stages.
    families  the task families that policies are scored on.

    Raises `SpearError` for an unknown family, fewer than one seed, scene or step, and a factor that is not
    positive.
    """
    if not 0 < pretraining < math.inf:
        raise SpearError(
            f"--pretraining {pretraining:g}: give a positive number, 1 for the recipes' own steps"
        )
    for name, value in (("seeds", seeds), ("scenes", scenes), ("budget", 1 if budget is None else budget)):
        if value < 1:
            raise SpearError(f"--{name} {value}: give 1 or more")
    families = settle(families)
    own = RECIPES[POLICY].optimization.steps
    paces = 1.0 if budget is None else budget / own, pretraining
    if "steps" in (changes or {}):
        raise SpearError("--set steps: every stage has its own number: use --budget")
    jobs: dict[str, Training | Scoring] = {}
    chains: dict[tuple[str, int], Sequence[Training]] = {}
    for seed in range(seeds):
        for _, rows in tables:
            for row in rows:
                chain = chains[row.name, seed] = _chain(row, seed, data, start, paces, dict(changes or {}))
                for training in chain:
                    jobs.setdefault(training.key, training)
                jobs.setdefault(f"score {chain[-1].key}", Scoring(chain[-1], scenes, families))
    return Plan(tables, list(jobs.values()), chains, seeds, scenes, families)


def _chain(
    row: Row,
    seed: int,
    data: Data,
    start: Pretrained,
    paces: tuple[float, float],
    changes: Mapping[str, Any],
) -> list[Training]:
    """A row's trainings for a seed, in order."""
    chain: list[Training] = []
    before: str | Weights | None = start.vlm if row.pretrained else None
    for stage in row.stages:
        moge = start.depth if stage.moge else None
        chain.append(_training(stage, row, seed, data, paces, changes, before, moge))
        before = chain[-1].key
    return chain


def _training(
    stage: Stage,
    row: Row,
    seed: int,
    data: Data,
    paces: tuple[float, float],
    changes: Mapping[str, Any],
    init: str | Weights | None,
    moge: Weights | None,
) -> Training:
    plain = recipe(stage.recipe)
    acts, (policy_pace, earlier_pace) = plain.kind == "vla", paces
    length = stage.length * LENGTHS.get(stage.recipe, 1.0)
    steps = round(plain.optimization.steps * length * (policy_pace if acts else earlier_pace))
    one = plain.changed(**{**SETTINGS.get(stage.recipe, {}), **changes, **stage.changes})
    one = one.changed(steps=max(1, steps) if stage.length else 0)
    if 0 < row.images < 1:
        one = one.changed(most_images=max(1, round(row.images * data.images)))
    if stage.again:
        seed += AGAIN
    fields = {k: v for k, v in dataclasses.asdict(one).items() if k not in _WORDS}
    size = dataclasses.asdict(preset(one.preset))
    # A recipe that says what its preset or a default says is the same as one that says nothing.
    size["flow"] = {**dataclasses.asdict(FlowConfig()), **size["flow"], **fields.pop("flow")}
    learned_from = data.key if acts else data.labels_key
    begins = [part.key if isinstance(part, Weights) else part for part in (init, moge)]
    identity = json.dumps([fields, size, seed, *begins, learned_from], sort_keys=True)
    return Training(hashlib.sha256(identity.encode()).hexdigest()[:12], one, seed, init, moge)
