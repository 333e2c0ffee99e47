"""From rows to the data they learn from, and to what is trained and scored, each training once.

A training is identified by its contents: recipe, preset, seed, data, and what it begins with. Its
key is a hash of these, so that a trained policy and its score stay valid whatever else is asked for
later. The code is not part of the key: after an edit that changes what a training does, use another
folder (`--out`).
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.ablations.rows import (
    RECIPE_SETTINGS,
    STEP_FACTORS,
    AblationOptions,
    Row,
    Stage,
    Table,
    select_tables,
)
from spear.data.store.episode_store import EpisodeStore
from spear.errors import SpearError, check_known, format_count
from spear.labels.store import count_labeled_images
from spear.models.presets import get_preset
from spear.models.weights.folders import locate_checkpoint
from spear.sim.scene import FAMILIES
from spear.train.options import Recipe
from spear.train.recipes import RECIPES, get_recipe
from spear.types import FlowConfig
from spear.util.fingerprints import fingerprint_checkpoint, hash_names_sizes_and_tails
from spear.util.held_out import FIRST_TRAIN_SEED
from spear.util.options import parse_key_values
from spear.util.run_lock import try_to_hold_lock

# The data are those of experiments/nano/train.sh.
NUM_LABELED_SCENES = 13_056
FIRST_LABELED_SEED = 200_000
NUM_DEMONSTRATIONS = 2000  # per task family, from the first seed that is not held out
PRESET = "nano"
POLICY_RECIPE = "nano-vla"  # a budget is given in steps of this recipe

KEY_LENGTH = 12
HASHED_FILES = ("*.parquet", "*.arrow", "*.txt")
# The fields of recipes and of the flow that are always part of a key. A field that is not listed
# is part of a key only if it does not have its default (`_drop_unused_new_fields`). Do not add any:
# another list gives other keys, and kept scores would not be found.
FIELDS_OF_FIRST_KEYS = frozenset(
    {
        # Recipe
        "kind",
        "preset",
        "optimization",
        "batch_size",
        "moge",
        "coordinate_rows_only",
        "smooth_tokens",
        "bins",
        "spacing",
        "questions",
        "flow_samples",
        "question_images",
        "question_weight",
        "augment",
        "normalization",
        "normalize_each",
        "flow",
        "committed",
        "lora_rank",
        "lora_alpha",
        # Optimization
        "steps",
        "lr",
        "lr_scale",
        "frozen",
        "trained",
        "schedule",
        "warmup",
        "final_lr",
        "weight_decay",
        "betas",
        "grad_clip",
        "ema",
        "precision",
        "frozen_precision",
        "accumulate",
        "gradient_checkpointing",
        "max_skipped",
        # QuestionMix
        "families",
        "pairs",
        "wrist",
        "coordinate_weight",
        "coordinate_smoothing",
        "most_images",
        # FlowConfig, whose `steps` is above
        "rotation",
        "rotation_loss",
        "prediction",
        "geodesic_weight",
        "geodesic_step",
        "translation_weight",
        "rotation_weight",
        "gripper_weight",
        "time_alpha",
        "time_beta",
        "time_scale",
    }
)
NEW_ORDER_SEED_OFFSET = 1000  # of a stage that sees the same data in another order


@dataclass(frozen=True)
class Data:
    """What is learned from.

    labels      folder of labels.
    episodes    folder of episodes.
    num_images  labeled images per view.
    key         hash of the labels and the episodes; "" before there are episodes.
    labels_key  hash of the labels alone.
    """

    labels: Path
    episodes: Path
    num_images: int
    key: str
    labels_key: str


def read_data(labels: Path, episodes: Path) -> Data:
    """Read what is in two folders; the second may not exist yet.

    Raises `SpearError` if the first has no labeled images.
    """
    view = labels / "external"
    num_images = count_labeled_images(view if view.is_dir() else labels)
    key = ""
    if episodes.is_dir():
        key = hash_names_sizes_and_tails((labels, episodes), HASHED_FILES)[:KEY_LENGTH]
    labels_key = hash_names_sizes_and_tails((labels,), HASHED_FILES)[:KEY_LENGTH]
    return Data(labels, episodes, num_images, key, labels_key)


def make_missing_data(options: AblationOptions, say: Callable[[str], None] = print) -> Data:
    """The given data; those not given are made in OUT, as for the bundled weights, if missing.

    One process makes them, while the others wait.
    """
    # A plan is printed without PyTorch.
    from spear.sim_data.demonstrations import record_demonstrations
    from spear.sim_data.label_scenes import label_scenes

    labels, episodes = _find_folders(options)
    image_sizes = dict(get_preset(PRESET).image_sizes)
    with try_to_hold_lock(options.out / "locks" / "data", wait=True):
        complete = labels / "complete"
        if options.labels is None and not complete.is_file():
            say(f"labeling {NUM_LABELED_SCENES:,} scenes into {labels}")
            label_scenes(labels, NUM_LABELED_SCENES, image_sizes, FIRST_LABELED_SEED, workers=2)
            complete.touch()
        if options.episodes is None and not episodes.is_dir():
            say(f"recording {NUM_DEMONSTRATIONS:,} demonstrations of each family into {episodes}")
            families = sort_families(options.tasks)
            # The folder appears when all demonstrations are in it.
            unfinished = episodes.with_name(f".part-{episodes.name}")
            record_demonstrations(
                unfinished, families, NUM_DEMONSTRATIONS, FIRST_TRAIN_SEED, image_sizes
            )
            unfinished.replace(episodes)
        return read_data(labels, episodes)


def find_expected_data(options: AblationOptions) -> Data:
    """What `make_missing_data` returns, as far as it can be known without making anything."""
    labels, episodes = _find_folders(options)
    if options.labels or (labels / "complete").is_file():
        return read_data(labels, episodes)
    return Data(labels, episodes, NUM_LABELED_SCENES, "", "")


def sort_families(families: Sequence[str]) -> tuple[str, ...]:
    """Task families in the simulator's order; all if there are none.

    Raises `SpearError` for unknown ones.
    """
    check_known("task family", FAMILIES, *families)
    return tuple(family for family in FAMILIES if family in families) or FAMILIES


def _find_folders(options: AblationOptions) -> tuple[Path, Path]:
    """The folders of labels and of episodes, given or in OUT.

    Raises `SpearError` for a folder of episodes without any.
    """
    labels = options.labels or options.out / "labels"
    families = sort_families(options.tasks)
    name = "episodes"
    if families != FAMILIES:
        name = "-".join(["episodes", *families])
    episodes = options.episodes or options.out / name
    if options.episodes or episodes.is_dir():
        EpisodeStore(episodes)
    return labels, episodes


@dataclass(frozen=True)
class Weights:
    """Trained weights that a plan begins with: their folder, and a hash of them."""

    folder: Path
    key: str


@dataclass(frozen=True)
class Training:
    """One stage to train.

    key     identifies it.
    recipe  as it will run.
    init    what it begins with: another training, pretrained weights, or nothing.
    moge    a pretrained depth encoder that joins.
    """

    key: str
    recipe: Recipe
    seed: int
    init: "Training | Weights | None" = None
    moge: Weights | None = None

    @property
    def previous(self) -> "Training | None":
        """The training that must be done first."""
        return self.init if isinstance(self.init, Training) else None

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return f"{self.recipe.name}-{self.key}"

    @property
    def steps(self) -> int:
        return self.recipe.optimization.steps


@dataclass(frozen=True)
class Scoring:
    """A trained policy to score.

    previous  the policy's training, which must be done first.
    scenes    number of scenes of each task family.
    families  task families.
    """

    previous: Training
    scenes: int
    families: Sequence[str]

    @property
    def key(self) -> str:
        """Identifies it among all jobs, as a training's key does."""
        return f"score-{self.previous.key}"

    @property
    def episodes(self) -> int:
        """The number of episodes of all families together."""
        return self.scenes * len(self.families)


Job = Training | Scoring


@dataclass(frozen=True)
class Plan:
    """What there is to do, in order.

    jobs    trainings and scorings, each after what it needs; all rows of the first seed come first.
    chains  (row, seed) → its trainings, the policy last.
    """

    tables: Sequence[tuple[Table, Sequence[Row]]]
    jobs: Sequence[Job]
    chains: Mapping[tuple[str, int], Sequence[Training]]
    seeds: int
    scenes: int
    families: Sequence[str]

    @property
    def trainings(self) -> list[Training]:
        """The jobs that are trainings; one that several rows share is there once."""
        return [job for job in self.jobs if isinstance(job, Training)]

    def scoring(self, row: str, seed: int) -> Scoring:
        """The scoring that gives a row's number for a seed."""
        policy = self.chains[row, seed][-1]
        return Scoring(policy, self.scenes, self.families)


def find_pretrained_weights(
    vlm: str = "nano-vlm-0", depth: str = "nano-depth"
) -> tuple[Weights, Weights]:
    """What stands for PaliGemma's weights and for MoGe's in all rows, by names or folders.

    Raises `SpearError` if they are not there.
    """
    vlm_folder = locate_checkpoint(vlm)
    depth_folder = locate_checkpoint(depth)
    return (
        Weights(vlm_folder, fingerprint_checkpoint(vlm_folder)),
        Weights(depth_folder, fingerprint_checkpoint(depth_folder)),
    )


def make_plan(options: AblationOptions, data: Data, start: tuple[Weights, Weights]) -> Plan:
    """Plan all trainings and scorings that some rows need.

    Args:
        options: Which rows, and what is the same in all of them.
        data: What is learned from.
        start: The pretrained VLM and depth encoder.

    Raises:
        SpearError: A row, family or change is unknown.
    """
    tables = select_tables(options.rows)
    families = sort_families(options.tasks)
    changes = parse_key_values(options.set)
    if "steps" in changes:
        raise SpearError("--set steps: every stage has its own number: use --budget")

    jobs: dict[str, Any] = {}  # by key: what rows share is done once
    chains: dict[tuple[str, int], Sequence[Training]] = {}
    for seed in range(options.seeds):
        for _, rows in tables:
            for row in rows:
                chain = _plan_chain(row, seed, options, changes, data, start, jobs)
                chains[row.name, seed] = chain
                scoring = Scoring(chain[-1], options.num_scenes, families)
                jobs.setdefault(scoring.key, scoring)
    return Plan(tables, list(jobs.values()), chains, options.seeds, options.num_scenes, families)


def _plan_chain(
    row: Row,
    seed: int,
    options: AblationOptions,
    changes: Mapping[str, Any],
    data: Data,
    start: tuple[Weights, Weights],
    jobs: dict[str, Any],
) -> list[Training]:
    """Add the trainings of a row to the jobs; each of them begins with the one before it."""
    vlm, depth = start
    init: Training | Weights | None = vlm if row.pretrained else None
    chain = []
    for stage in row.stages:
        recipe = _adapt_recipe(stage, row, options, changes, data)
        stage_seed = seed
        if stage.another_order:
            stage_seed += NEW_ORDER_SEED_OFFSET
        training = _identify(recipe, stage_seed, data, init, depth if stage.moge else None)
        training = jobs.setdefault(training.key, training)
        chain.append(training)
        init = training
    return chain


def _adapt_recipe(
    stage: Stage, row: Row, options: AblationOptions, changes: Mapping[str, Any], data: Data
) -> Recipe:
    """The recipe of a row's stage as it will run.

    A stage's own changes win over `changes` to all recipes, because they are what the row is about.
    """
    recipe = get_recipe(stage.recipe)

    # How long it is trained.
    if recipe.kind != "vla":
        pace = options.pretraining
    elif options.budget is None:
        pace = 1.0
    else:
        pace = options.budget / RECIPES[POLICY_RECIPE].optimization.steps
    factor = stage.length * STEP_FACTORS.get(stage.recipe, 1.0)
    steps = max(1, round(recipe.optimization.steps * factor * pace)) if stage.length else 0

    # What is different from the recipe; later settings win, those of the flow one by one.
    all_changes: dict[str, Any] = {}
    flow: dict[str, Any] = {}
    for settings in (RECIPE_SETTINGS.get(stage.recipe, {}), changes, stage.changes):
        all_changes |= settings
        flow |= settings.get("flow", {})
    recipe = recipe.with_changes(**all_changes)
    if flow:
        recipe = recipe.with_changes(flow=flow)
    recipe = recipe.with_changes(steps=steps)
    if 0 < row.images < 1:
        recipe = recipe.with_changes(most_images=max(1, round(row.images * data.num_images)))
    return recipe


def _identify(
    recipe: Recipe, seed: int, data: Data, init: Training | Weights | None, moge: Weights | None
) -> Training:
    """A training with its key, a hash of the settings and data that decide its result.

    The code is not part of the key.
    """
    fields = dataclasses.asdict(recipe)
    del fields["name"]
    del fields["description"]
    # rate_hz was a field of presets: the keys of scores that are kept have it.
    size = {**dataclasses.asdict(get_preset(recipe.preset)), "rate_hz": 5.0}
    size["vocabulary"] = size.pop("vocabulary_size")  # its former name, which the keys have
    # A recipe that says what its preset or a default says is the same as one that says nothing.
    size["flow"] = {**dataclasses.asdict(FlowConfig()), **size["flow"], **fields.pop("flow")}
    is_policy = recipe.kind == "vla"
    if not is_policy or size["flow"]["steps"] == FlowConfig.steps:  # of acting
        del size["flow"]["steps"]
    fields["normalization"] = recipe.normalization or "quantile"
    if recipe.action_reference == "previous":  # the default of a new policy
        fields["action_reference"] = None
    _drop_unused_new_fields(fields, recipe)
    _drop_unused_new_fields(fields["optimization"], recipe.optimization)
    _drop_unused_new_fields(fields["questions"], recipe.questions)
    _drop_unused_new_fields(size["flow"], FlowConfig())
    identity = [
        fields,
        size,
        seed,
        init.key if init else None,
        moge.key if moge else None,
        data.key if is_policy else data.labels_key,
    ]
    content = json.dumps(identity, sort_keys=True)
    key = hashlib.sha256(content.encode()).hexdigest()[:KEY_LENGTH]
    return Training(key, recipe, seed, init, moge)


def _drop_unused_new_fields(values: dict[str, Any], owner: Any) -> None:
    """Remove from `values` the fields that the first keys did not have, if they have no effect.

    Such a field has its default value. So a setting that is added to the method, whose default is
    what was there before, leaves the keys of kept scores as they are.

    Args:
        values: The values of the fields of `owner`.
        owner: An instance of the dataclass whose fields have the defaults.
    """
    for field in dataclasses.fields(owner):
        if field.name in FIELDS_OF_FIRST_KEYS or field.name not in values:
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if values[field.name] == default:
            del values[field.name]


def describe(plan: Plan, finished: Sequence[Job]) -> str:
    """What a plan trains and scores, and how much of it is done, as text."""
    jobs_by_name: dict[str, list[Job]] = {}
    for job in plan.jobs:
        name = job.recipe.name if isinstance(job, Training) else "scoring"
        jobs_by_name.setdefault(name, []).append(job)

    lines = [f"{'':<14} {'number':>7} {'done':>5} {'steps or episodes each':>24}"]
    for name, jobs in jobs_by_name.items():
        sizes = [job.steps if isinstance(job, Training) else job.episodes for job in jobs]
        size = f"{min(sizes):,}"
        if min(sizes) < max(sizes):
            size += f" … {max(sizes):,}"
        num_done = sum(job in finished for job in jobs)
        lines.append(f"{name:<14} {len(jobs):7} {num_done:5} {size:>24}")
    num_rows = sum(len(rows) for _, rows in plan.tables)
    lines.append(f"{format_count(num_rows, 'rows')}, {format_count(plan.seeds, 'seeds')}")
    return "\n".join(lines)
