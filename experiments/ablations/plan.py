"""From rows to the data they learn from, and to what is trained and scored: each training once.

A training is known by its contents: recipe, preset, seed, data, and what it begins with. Its key is a hash of
these, so that what was trained under a key stays valid whatever else is asked for later.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.ablations.rows import LENGTHS, SETTINGS, AblationOptions, Row, Stage, Table, choose
from spear.data.store.episode_store import EpisodeStore
from spear.errors import SpearError, check_known, format_count
from spear.labels.store import count_labels
from spear.models.presets import get_preset
from spear.models.weights.folders import locate
from spear.sim.scene import FAMILIES
from spear.train.options import Recipe
from spear.train.recipes import RECIPES, get_recipe
from spear.types import FlowConfig
from spear.util.fingerprints import fingerprint_checkpoint, hash_file_ends
from spear.util.held_out import FIRST_TRAIN_SEED
from spear.util.options import parse_key_values
from spear.util.run_lock import hold_lock

SCENES = 13_056
FIRST_SCENE = 200_000
DEMONSTRATIONS = 2000
"""Labelled scenes, and demonstrations per task family (from the first seed that is not kept for testing), as
in experiments/nano/train.sh."""
PRESET = "nano"
POLICY = "nano-vla"
"""A budget is given as the steps of this recipe."""


@dataclass(frozen=True)
class Data:
    """What is learned from: labels and episodes, the labelled images per view, and hashes of the files.

    key  of the labels and the episodes; labels_key: of the labels alone.
    """

    labels: Path
    episodes: Path
    images: int
    key: str
    labels_key: str


def look_at(labels: Path, episodes: Path) -> Data:
    """What is in two folders; there may be no episodes yet. `SpearError` for one without labelled images."""
    view = labels / "external"
    images = count_labels(view if view.is_dir() else labels)
    kinds = "*.parquet", "*.arrow", "*.txt"
    keys = [hash_file_ends(folders, kinds)[:12] for folders in ((labels,), (labels, episodes))]
    return Data(labels, episodes, images, keys[1] if episodes.is_dir() else "", keys[0])


def obtain(options: AblationOptions, say: Callable[[str], None] = print) -> Data:
    """What is given, or made in OUT as for the shipped weights: by one process, while others wait."""
    from spear.sim_data.demonstrations import (
        record_demonstrations,  # here: a plan does without PyTorch
    )
    from spear.sim_data.label_scenes import label_scenes

    (labels, episodes), sizes = _folders(options), dict(get_preset(PRESET).image_sizes)
    with hold_lock(options.out / "locks" / "data", wait=True):
        complete = labels / "complete"
        if options.labels is None and not complete.is_file():
            say(f"labelling {SCENES:,} scenes into {labels}")
            label_scenes(labels, SCENES, sizes, FIRST_SCENE, 2)
            complete.touch()
        if options.episodes is None and not episodes.is_dir():
            say(f"recording {DEMONSTRATIONS:,} demonstrations of each family into {episodes}")
            part = episodes.with_name(f".part-{episodes.name}")  # all or none
            record_demonstrations(
                part, settle(options.families), DEMONSTRATIONS, FIRST_TRAIN_SEED, sizes
            )
            part.replace(episodes)
        return look_at(labels, episodes)


def expected(options: AblationOptions) -> Data:
    """What `obtain` gives, as far as it can be known without making anything."""
    labels, episodes = _folders(options)
    if options.labels or (labels / "complete").is_file():
        return look_at(labels, episodes)
    return Data(labels, episodes, SCENES, "", "")


def settle(families: Sequence[str]) -> tuple[str, ...]:
    """Task families in the simulator's order; all for none. Raises `SpearError` for unknown ones."""
    check_known("task family", FAMILIES, *families)
    return tuple(family for family in FAMILIES if family in families) or FAMILIES


def _folders(options: AblationOptions) -> tuple[Path, Path]:
    """Of labels and of episodes, given or made here. `SpearError` for a folder of episodes without any."""
    chosen = settle(options.families)
    made = "-".join(("episodes", *(() if chosen == FAMILIES else chosen)))
    episodes = options.episodes or options.out / made
    if options.episodes or episodes.is_dir():
        EpisodeStore(episodes)
    return options.labels or options.out / "labels", episodes


@dataclass(frozen=True)
class Weights:
    """Trained weights that a plan begins with: their folder, and a hash of them."""

    folder: Path
    key: str


@dataclass(frozen=True)
class Training:
    """One stage to train: a recipe as it will run, its seed, and what it begins with.

    init  another training, pretrained weights, or nothing. moge: a pretrained encoder that joins.
    """

    key: str
    recipe: Recipe
    seed: int
    init: "Training | Weights | None" = None
    moge: Weights | None = None

    @property
    def before(self) -> "Training | None":
        """The training that comes before it."""
        return self.init if isinstance(self.init, Training) else None

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

    before: Training
    scenes: int
    families: Sequence[str]

    @property
    def key(self) -> str:
        """As of a training, among all jobs."""
        return f"score-{self.before.key}"

    @property
    def episodes(self) -> int:
        """Of all families together."""
        return self.scenes * len(self.families)


@dataclass(frozen=True)
class Plan:
    """What there is to do, in order.

    jobs     trainings and scorings, each after what it needs; all rows of the first seed come first.
    chains   (row, seed) -> its trainings, the policy last.
    """

    tables: Sequence[tuple[Table, Sequence[Row]]]
    jobs: Sequence[Training | Scoring]
    chains: Mapping[tuple[str, int], Sequence[Training]]
    seeds: int
    scenes: int
    families: Sequence[str]

    @property
    def trainings(self) -> list[Training]:
        """All of them, once each."""
        return [job for job in self.jobs if isinstance(job, Training)]

    def scoring(self, row: str, seed: int) -> Scoring:
        """The one that gives a row's number for a seed."""
        return Scoring(self.chains[row, seed][-1], self.scenes, self.families)


def pretrained(vlm: str = "nano-vlm-0", depth: str = "nano-depth") -> tuple[Weights, Weights]:
    """What stands for PaliGemma's weights and for MoGe's in all rows, by names or folders. Raises
    `SpearError` where there are none."""
    one, two = locate(vlm), locate(depth)
    return Weights(one, fingerprint_checkpoint(one)), Weights(two, fingerprint_checkpoint(two))


def make_plan(options: AblationOptions, data: Data, start: tuple[Weights, Weights]) -> Plan:
    """All trainings and scorings that some rows need.

    Raises `SpearError` for an unknown row, family or change.
    """
    (vlm, depth), tables, families = start, choose(options.rows), settle(options.families)
    changes = parse_key_values(options.set)
    if "steps" in changes:
        raise SpearError("--set steps: every stage has its own number: use --budget")
    jobs: dict[str, Any] = {}
    chains: dict[tuple[str, int], Sequence[Training]] = {}
    for seed in range(options.seeds):
        for _, rows in tables:
            for row in rows:
                chain: list[Training] = []
                before: Training | Weights | None = vlm if row.pretrained else None
                for stage in row.stages:
                    one = _recipe(stage, row, options, changes, data)
                    own = seed + 1000 * stage.again  # the same data in another order
                    training = _training(one, own, data, before, depth if stage.moge else None)
                    before = training = jobs.setdefault(training.key, training)
                    chain.append(training)
                chains[row.name, seed] = chain
                scoring = Scoring(chain[-1], options.scenes, families)
                jobs.setdefault(scoring.key, scoring)
    return Plan(tables, list(jobs.values()), chains, options.seeds, options.scenes, families)


def _recipe(
    stage: Stage, row: Row, options: AblationOptions, changes: Mapping[str, Any], data: Data
) -> Recipe:
    """A row's stage as it will run. What a row is about it keeps, whatever the changes to all recipes."""
    plain = get_recipe(stage.recipe)
    policy_pace = (
        1.0 if options.budget is None else options.budget / RECIPES[POLICY].optimization.steps
    )
    pace = policy_pace if plain.kind == "vla" else options.pretraining
    steps = round(plain.optimization.steps * (stage.length * LENGTHS.get(stage.recipe, 1.0)) * pace)
    given = SETTINGS.get(stage.recipe, {}), changes, stage.changes
    one = plain.with_changes(**{key: value for part in given for key, value in part.items()})
    flow = {key: value for part in given for key, value in part.get("flow", {}).items()}
    one = one.with_changes(flow=flow) if flow else one
    one = one.with_changes(steps=max(1, steps) if stage.length else 0)
    if 0 < row.images < 1:
        one = one.with_changes(most_images=max(1, round(row.images * data.images)))
    return one


def _training(
    one: Recipe, seed: int, data: Data, init: Training | Weights | None, moge: Weights | None
) -> Training:
    fields = {k: v for k, v in dataclasses.asdict(one).items() if k not in ("name", "description")}
    # rate_hz was a field of presets: the keys of scores that are kept have it.
    size = {**dataclasses.asdict(get_preset(one.preset)), "rate_hz": 5.0}
    # A recipe that says what its preset or a default says is the same as one that says nothing.
    size["flow"] = {**dataclasses.asdict(FlowConfig()), **size["flow"], **fields.pop("flow")}
    if one.kind != "vla" or size["flow"]["steps"] == FlowConfig.steps:  # of acting
        del size["flow"]["steps"]
    learned_from = data.key if one.kind == "vla" else data.labels_key
    fields["normalization"] = one.normalization or "quantile"
    begins = init and init.key, moge and moge.key
    identity = json.dumps([fields, size, seed, *begins, learned_from], sort_keys=True)
    return Training(hashlib.sha256(identity.encode()).hexdigest()[:12], one, seed, init, moge)


def describe(plan: Plan, finished: Sequence[Training | Scoring]) -> str:
    """What a plan trains and scores, and how much of it is done, as text."""
    groups: dict[str, list[Training | Scoring]] = {}
    for job in plan.jobs:
        groups.setdefault(job.recipe.name if isinstance(job, Training) else "scoring", []).append(
            job
        )
    lines = [f"{'':<14} {'number':>7} {'done':>5} {'steps or episodes each':>24}"]
    for name, jobs in groups.items():
        sizes = [job.steps if isinstance(job, Training) else job.episodes for job in jobs]
        span = f"{min(sizes):,}" + (f" … {max(sizes):,}" if min(sizes) < max(sizes) else "")
        lines.append(
            f"{name:<14} {len(jobs):7} {sum(job in finished for job in jobs):5} {span:>24}"
        )
    rows = sum(len(members) for _, members in plan.tables)
    return "\n".join([*lines, f"{format_count(rows, 'rows')}, {format_count(plan.seeds, 'seeds')}"])
