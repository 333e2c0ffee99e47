"""The ablations: their rows can be trained, plans share trainings, runs resume, tables are right.

A table of ablations has *rows*. Each row changes one part of the method, and names the stages to
train, the last of which makes the policy. A *plan* is the list of trainings and scorings that some
rows need; trainings have a *key*, a hash of everything that decides their result. A *line* of a
table is a row with its results.
"""

import json
import os
import re
import shutil
import signal
from collections import Counter
from dataclasses import fields, make_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.ablations import plan as plan_module
from experiments.ablations.plan import (
    Data,
    Plan,
    Scoring,
    Weights,
    describe,
    find_expected_data,
    find_pretrained_weights,
    make_plan,
    read_data,
)
from experiments.ablations.report import write_report
from experiments.ablations.rows import RECIPE_SETTINGS, TABLES, AblationOptions, Row
from experiments.ablations.run import final_folder, is_done, load_score, run
from experiments.ablations.table import Line, fill_tables, judge
from outcomes import make_outcome
from processes import run_in_process
from spear import flow
from spear.evaluate import closed_loop
from spear.evaluate.compare import load_published_tables
from spear.evaluate.results import Journal
from spear.evaluate.stats import Estimate
from spear.geometry import quat_exp, quat_multiply
from spear.models.presets import PRESETS, build_spear1_config, get_preset
from spear.models.spear1 import Spear1ForActionPrediction
from spear.sim.scene import FAMILIES
from spear.sim_data.demonstrations import record_demonstrations
from spear.train.optimize import apply_freeze
from spear.train.options import Recipe
from spear.train.recipes import RECIPES
from spear.types import Action
from spear.util.held_out import FIRST_TRAIN_SEED

NUM_IMAGES = 13_056
DATA = Data(
    labels=Path("labels"),
    episodes=Path("episodes"),
    num_images=NUM_IMAGES,
    key="data",
    labels_key="labels",
)
"""Data of which a plan needs only the keys and the number of images; the folders do not exist."""
START = (Weights(Path("vlm"), "vlm"), Weights(Path("depth"), "depth"))
"""The pretrained VLM and depth encoder, of which a plan needs only the keys."""
NUM_SEEDS = 3  # trainings of each row by default (`AblationOptions.seeds`)
TINY_CHANGES = ("batch_size=2", "question_images=1", "flow_samples=1")


def plan_rows(
    *names: str, data: Data = DATA, start: tuple[Weights, Weights] = START, **options: Any
) -> Plan:
    """Plan the rows and tables of these names; all without any. options: `AblationOptions`."""
    return make_plan(AblationOptions(rows=names, **{"num_scenes": 2, **options}), data, start)


def plan_tiny(
    *names: str, data: Data, changes: tuple[str, ...] = TINY_CHANGES, **options: Any
) -> Plan:
    """Make a plan that takes seconds: one step per training, one scene, one seed."""
    tiny_options: dict[str, Any] = {
        "seeds": 1,
        "num_scenes": 1,
        "budget": 1,  # steps of each policy
        "pretraining": 1e-9,  # so small a part of the steps is rounded up to one step
        "set": changes,
    }
    return plan_rows(*names, data=data, start=find_pretrained_weights(), **tiny_options, **options)


def find_row(name: str) -> Row:
    """Find the row of this name in all tables."""
    for table in TABLES:
        for row in table.rows:
            if row.name == name:
                return row
    raise KeyError(name)


def policy_key(plan: Plan, row: str = "full") -> str:
    """Return the key of the training that makes the row's policy of seed 0."""
    scoring = plan.scoring(row, 0)
    return scoring.previous.key


def flow_config(row: str) -> flow.FlowConfig:
    """Return the flow with which the row's policy is trained."""
    *_, policy_training = plan_rows(row, seeds=1).chains[row, 0]
    return flow.FlowConfig(**{**PRESETS["nano"].flow, **policy_training.recipe.flow})


# ---- Rows.


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_table_has_the_row_that_it_compares_with(table: Any) -> None:
    assert table.against in [row.name for row in table.rows]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_published_number_has_its_row(table: Any) -> None:
    if not table.reference:
        return

    published_titles = set(load_published_tables()[table.reference].means)

    assert published_titles <= {row.title for row in table.rows}


def test_names_of_rows_and_tables_are_unique() -> None:
    names = [table.name for table in TABLES]
    for table in TABLES:
        names += [row.name for row in table.rows]

    assert len(set(names)) == len(names)


def test_every_row_names_modules_that_its_network_has() -> None:
    """`apply_freeze` raises an error for the name of a missing module."""
    models = {}  # whether the model has MoGe → the model, without memory for its weights
    for has_moge in (True, False):
        config = build_spear1_config(get_preset("nano"))
        if not has_moge:
            config.vlm_config.moge_config = None
        with torch.device("meta"):
            models[has_moge] = Spear1ForActionPrediction(config)

    for training in plan_rows(seeds=1).trainings:
        recipe = training.recipe
        model = models[recipe.moge]
        if recipe.kind == "vla":
            apply_freeze(model, recipe.optimization)
        elif recipe.kind == "vlm":
            apply_freeze(model.vlm, recipe.optimization)


def test_the_vlm_learns_at_its_recipes_rate() -> None:
    """The ablations change the rate of the policy's recipe, and scale it back for the VLM."""
    settings = RECIPE_SETTINGS["nano-vla"]

    vlm_rate = settings["lr"] * settings["lr_scale"]["vlm"]

    assert vlm_rate == pytest.approx(RECIPES["nano-vla"].optimization.lr)


def test_the_longer_training_without_3d_sees_as_many_samples_as_its_recipe() -> None:
    """The row "no-3d-as-long" is a longer "nano-vla", and "nano-vla-no-3d" is its recipe."""
    recipe = RECIPES["nano-vla"]
    longer_recipe = RECIPES["nano-vla-no-3d"]
    num_samples = recipe.optimization.steps * recipe.batch_size
    num_longer_samples = longer_recipe.optimization.steps * longer_recipe.batch_size

    (stage,) = find_row("no-3d-as-long").stages

    assert stage.length == pytest.approx(num_longer_samples / num_samples)


def test_four_rotation_losses_penalize_a_small_error_alike() -> None:
    """For a small angle, each of the four losses is the squared angle times its weight."""
    error_rad = 0.02
    target = quat_exp(torch.tensor([0.3, -0.2, 0.5]))[None, None]  # [1, 1, 4]
    error = quat_exp(torch.tensor([0.0, error_rad, 0.0]))[None, None]
    data = Action(torch.zeros(1, 1, 3), target, torch.zeros(1, 1, 1))
    prediction = Action(torch.zeros(1, 1, 3), quat_multiply(target, error), torch.zeros(1, 1, 1))
    flow_time = torch.full((1,), 0.5)
    rotation_table = next(table for table in TABLES if table.name == "rotation")

    losses = []
    for row in rotation_table.rows[:4]:  # the rows that differ in the loss of rotations
        config = flow_config(row.name)
        # The second argument is the noise, on which the loss of clean actions does not depend.
        loss, *_ = flow.compute_loss(prediction, data, data, flow_time, config)
        losses.append(float(loss))

    rotation_weight = PRESETS["nano"].flow["rotation_weight"]
    assert losses == pytest.approx([losses[0]] * 4, rel=0.01)
    assert losses[0] == pytest.approx(rotation_weight * error_rad**2, rel=0.01)


def test_a_missed_turn_costs_a_predicted_velocity_as_much_as_a_clean_action() -> None:
    """The rows "s3-cosine" and "velocity" have equal losses for a model that predicts no rotation.

    The first predicts clean actions, the second velocities. The true rotations are by 0.1 rad about
    random axes, and the losses are compared at flow time 0.
    """
    generator = torch.Generator().manual_seed(0)
    num_samples = 20_000
    noise = flow.sample_noise((num_samples, 1), flow.FlowConfig(), generator).to(torch.float64)
    random_axes = torch.randn(num_samples, 1, 3, generator=generator).double()
    axes = torch.nn.functional.normalize(random_axes, dim=-1)
    no_translation = torch.zeros(num_samples, 1, 3).double()
    no_gripper = torch.zeros(num_samples, 1, 1).double()
    no_rotation = torch.tensor([1.0, 0, 0, 0]).double().expand(num_samples, 1, 4)
    data = Action(no_translation, quat_exp(0.1 * axes), no_gripper)
    clean_prediction = Action(no_translation, no_rotation, no_gripper)
    flow_time = torch.zeros(num_samples).double()
    clean_config = flow_config("s3-cosine")
    velocity_config = flow_config("velocity")

    # The same prediction, once as clean action and once as the velocity that leads to it.
    clean_loss, *_ = flow.compute_loss(clean_prediction, noise, data, flow_time, clean_config)
    velocity = flow.prediction_to_velocity(
        clean_prediction, noise, flow_time, replace(velocity_config, prediction="clean")
    )
    velocity_loss, *_ = flow.compute_loss(velocity, noise, data, flow_time, velocity_config)

    assert float(velocity_loss) == pytest.approx(float(clean_loss), rel=0.02)


# ---- Plans.


def test_trainings_that_rows_share_are_planned_once() -> None:
    plan = plan_rows("3d")

    num_trainings = Counter(training.recipe.name for training in plan.trainings)

    num_rows = 7
    assert num_trainings == {
        "nano-vlm-1": NUM_SEEDS * 3,  # as in the paper, about points, without MoGe
        "nano-vlm-2": NUM_SEEDS * 4,  # the same three, and with frozen encoders
        "nano-vla": NUM_SEEDS * num_rows,
    }
    num_scorings = sum(isinstance(job, Scoring) for job in plan.jobs)
    assert num_scorings == NUM_SEEDS * num_rows


def test_a_chain_leads_from_the_pretrained_weights_to_the_policy() -> None:
    chain = plan_rows("3d").chains["full", 1]

    assert [(training.recipe.name, training.seed) for training in chain] == [
        ("nano-vlm-1", 1),
        ("nano-vlm-2", 1),
        ("nano-vla", 1),
    ]
    vlm, depth = START
    assert chain[0].init == vlm
    assert [training.moge for training in chain] == [depth, None, None]  # joins in the first stage
    assert all(training.init == previous for previous, training in pairwise(chain))


def test_a_row_from_scratch_begins_with_nothing() -> None:
    first_training = plan_rows("scratch").chains["scratch", 0][0]

    assert first_training.init is None


def test_the_row_about_points_asks_about_no_objects() -> None:
    *_, stage, _ = plan_rows("points").chains["points", 0]  # the last stage of the VLM

    families = stage.recipe.questions.families

    assert "pixel_point" in families
    assert "box_vertices" not in families


def test_the_row_without_moge_trains_the_projection_alone() -> None:
    first_training = plan_rows("no-moge").chains["no-moge", 0][0]

    assert first_training.moge is None
    assert list(first_training.recipe.optimization.trained) == [
        "multi_modal_projector",
        "language_model.embed_tokens",
    ]


def test_rows_of_different_tables_that_mean_the_same_share_their_policy() -> None:
    plan = plan_rows()

    names = ("full", "mean-std", "siglip-trained", "all-images", "full-again", "s3-cosine")
    keys = {policy_key(plan, name) for name in names}

    assert len(keys) == 1
    assert policy_key(plan, "s3-mse") not in keys
    assert len({training.key for training in plan.trainings}) == len(plan.trainings)


def test_a_key_stays_as_it_was() -> None:
    """With another key, the scores that are kept in the repository would not be found."""
    assert policy_key(plan_rows("full", seeds=1)) == "0364d014e594"


def test_a_new_setting_of_the_flow_is_part_of_a_key_only_if_it_has_another_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flow_with_new_field = make_dataclass(
        "FlowWithNewField", [("new_weight", float, 0.0)], bases=(flow.FlowConfig,), frozen=True
    )
    key = policy_key(plan_rows("full", seeds=1))
    monkeypatch.setattr(plan_module, "FlowConfig", flow_with_new_field)

    key_with_default = policy_key(plan_rows("full", seeds=1))
    same_default = plan_rows("full", seeds=1, set=('flow={"new_weight":0.0}',))
    other_value = plan_rows("full", seeds=1, set=('flow={"new_weight":0.5}',))

    assert key_with_default == key
    assert policy_key(same_default) == key
    assert policy_key(other_value) != key


def test_a_new_setting_of_recipes_is_part_of_a_key_only_if_it_has_another_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe_with_new_field = make_dataclass(
        "RecipeWithNewField", [("new_count", int, 0)], bases=(Recipe,), frozen=True
    )
    key = policy_key(plan_rows("full", seeds=1))

    def plan_with_new_field(value: int) -> Plan:
        def get_recipe_with_new_field(name: str) -> Any:
            recipe = RECIPES[name]
            values = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
            return recipe_with_new_field(**values, new_count=value)

        monkeypatch.setattr(plan_module, "get_recipe", get_recipe_with_new_field)
        return plan_rows("full", seeds=1)

    assert policy_key(plan_with_new_field(0)) == key
    assert policy_key(plan_with_new_field(1)) != key


def test_a_key_does_not_depend_on_what_else_is_planned() -> None:
    key = policy_key(plan_rows("full", seeds=1))

    assert policy_key(plan_rows("rotation", "full", seeds=2, num_scenes=9)) == key


def test_a_key_does_not_depend_on_where_the_weights_are() -> None:
    vlm, depth = START
    moved_vlm = replace(vlm, folder=Path("elsewhere"))

    key = policy_key(plan_rows("full", seeds=1))

    assert policy_key(plan_rows("full", start=(moved_vlm, depth), seeds=1)) == key


def test_keys_differ_with_everything_that_decides_the_result() -> None:
    vlm, depth = START
    plans = [
        plan_rows("full", seeds=1),
        plan_rows("full", seeds=1, data=replace(DATA, key="other")),
        plan_rows("full", seeds=1, start=(vlm, vlm)),
        plan_rows("full", seeds=1, start=(depth, depth)),
        plan_rows("full", seeds=1, budget=7),
        plan_rows("full", seeds=1, set=("lr=1e-5",)),
        plan_rows("full", seeds=1, set=('flow={"steps":2}',)),
        plan_rows("full", seeds=1, set=('flow={"steps":3}',)),
    ]

    assert len({policy_key(plan) for plan in plans}) == len(plans)


@pytest.mark.parametrize(("row", "loss"), [("s3-cosine", "cosine"), ("linear-mse", "mse")])
def test_what_a_row_is_about_stays_whatever_is_set_for_all(row: str, loss: str) -> None:
    plan = plan_rows(row, seeds=1, set=('flow={"steps":2}',))

    *_, policy_training = plan.chains[row, 0]
    policy_flow = policy_training.recipe.flow
    assert policy_flow["rotation_loss"] == loss
    assert policy_flow["steps"] == 2


def test_trainings_that_see_no_demonstrations_are_shared_whatever_these_are() -> None:
    chain = plan_rows("full", seeds=1).chains["full", 0]
    other_data = replace(DATA, key="other")
    other_chain = plan_rows("full", data=other_data, seeds=1).chains["full", 0]

    *vlm_keys, key_of_policy = [training.key for training in chain]
    *other_vlm_keys, other_key_of_policy = [training.key for training in other_chain]

    assert vlm_keys == other_vlm_keys
    assert key_of_policy != other_key_of_policy


@pytest.mark.parametrize(
    ("row", "steps"),
    [
        ("full", [200, 2600, 1200]),
        ("no-3d", [1200]),
        ("points", [200, 2600, 1200]),
        ("no-moge", [200, 2600, 1200]),
        ("images-64th", [200, 2600, 1200]),
        ("no-3d-as-long", [2800]),
        ("scratch-x9", [11_200]),
        ("siglip-thawed", [200, 2600, 600, 600]),
        ("no-images", [0, 1200]),
    ],
)
def test_a_budget_is_the_same_for_every_row(row: str, steps: list[int]) -> None:
    """`steps` are the steps of the row's stages.

    A policy is trained for 1,200 steps in all, except for the rows that train it longer
    ("no-3d-as-long" and "scratch-x9"). The stages of the VLM have their recipes' part of it.
    """
    chain = plan_rows(row, seeds=1, budget=1200).chains[row, 0]

    assert [training.steps for training in chain] == steps


def test_the_second_half_of_a_thawed_row_sees_the_data_in_another_order() -> None:
    plan = plan_rows("siglip-thawed", seeds=1, budget=1200)

    frozen_half, thawed_half = plan.chains["siglip-thawed", 0][-2:]

    assert frozen_half.seed != thawed_half.seed
    assert thawed_half.recipe.optimization.frozen == RECIPES["nano-vla"].optimization.frozen


def test_a_fraction_of_the_images_limits_every_stage() -> None:
    chain = plan_rows("images-64th", seeds=1).chains["images-64th", 0]

    limit = NUM_IMAGES // 64
    assert [training.recipe.questions.most_images for training in chain] == [limit] * 3


@pytest.mark.parametrize(
    ("families", "name"),
    [((), "episodes"), (FAMILIES[::-1], "episodes"), (("put_on",), "episodes-put_on")],
)
def test_demonstrations_of_some_families_have_their_own_folder(
    families: tuple[str, ...], name: str, tmp_path: Path
) -> None:
    data = find_expected_data(AblationOptions(out=tmp_path, tasks=families))

    assert data.episodes.name == name


# ---- Tables.


@pytest.mark.parametrize(
    (
        "ours",
        "published",
        "seeds",
        "verdict",
    ),  # ours: difference, low, high as fractions; published: points
    [
        ((-0.2, -0.3, -0.1), -14.6, 3, "agrees"),
        ((0.2, 0.1, 0.3), -14.6, 3, "disagrees"),
        ((-0.1, -0.21, 0.01), -14.6, 3, "cannot tell"),
        ((-0.2, -0.3, -0.1), -14.6, 1, "cannot tell: one seed"),
        ((-0.2, -0.3, -0.1), None, 3, "–"),
        (None, 4.1, 0, "not run yet"),
    ],
)
def test_verdicts(
    ours: tuple[float, float, float] | None, published: float | None, seeds: int, verdict: str
) -> None:
    against = None if ours is None else Estimate(*ours, n=10)

    assert judge(against, published, seeds) == verdict


def write_scores(plan: Plan, out: Path, rates: dict[str, float], **settings: Any) -> None:
    """Write the journals of scored policies, with random outcomes of these success rates.

    Args:
        plan: the plan, whose policies are scored.
        out: the folder of the ablations.
        rates: row → success rate. Other rows are not scored.
        settings: further settings of the evaluation.
    """
    for (row, seed), chain in plan.chains.items():
        if row not in rates:
            continue
        policy = chain[-1]
        folder = out / "scores" / policy.key
        journal = Journal(
            folder, policy.folder, {"weights": row, **settings}, shard=(1, 1), scenes={}
        )
        rng = np.random.default_rng(seed)
        for family in FAMILIES:
            for scene in range(plan.scenes + 1):  # the plan does not ask for the last scene
                success = bool(rng.random() < rates[row])
                journal.add(
                    make_outcome(family, scene, success), episode_s=0.1, since_last_end_s=0.1
                )


@pytest.fixture
def scored_plan(tmp_path: Path) -> Plan:
    """A plan of the tables "3d" and "images", of which four rows are scored in `tmp_path`.

    The policy of the row "full" is also that of the row "all-images". "no-moge" has the same
    outcomes as "full", because rates and random numbers are the same.
    """
    plan = plan_rows("3d", "images", num_scenes=12)
    rates = {"full": 0.8, "no-3d": 0.2, "no-moge": 0.8, "images-64th": 0.5}
    write_scores(plan, tmp_path, rates)
    return plan


def lines_by_row(plan: Plan, out: Path) -> dict[str, Line]:
    """Return the lines of the plan's first table, by the names of their rows."""
    table, *_ = fill_tables(plan, out, DATA)
    return {line.row.name: line for line in table.lines}


def test_a_line_has_the_mean_of_its_seeds(scored_plan: Plan, tmp_path: Path) -> None:
    line = lines_by_row(scored_plan, tmp_path)["full"]

    assert line.success is not None
    assert line.success.n == NUM_SEEDS * len(FAMILIES) * scored_plan.scenes
    assert line.success.value == pytest.approx(np.mean(line.by_seed))


def test_a_line_is_compared_with_the_papers_difference(scored_plan: Plan, tmp_path: Path) -> None:
    line = lines_by_row(scored_plan, tmp_path)["no-3d"]

    assert line.verdict == "agrees"
    assert line.published_against == pytest.approx(-14.6)  # points, in the paper's table


def test_rows_with_the_same_outcomes_cannot_be_told_apart(
    scored_plan: Plan, tmp_path: Path
) -> None:
    assert lines_by_row(scored_plan, tmp_path)["no-moge"].verdict == "cannot tell"


def test_a_row_without_scores_has_not_run_yet(scored_plan: Plan, tmp_path: Path) -> None:
    line = lines_by_row(scored_plan, tmp_path)["points"]

    assert line.verdict == "not run yet"
    assert line.success is None


def test_lines_say_how_many_images_questions_were_asked_about(
    scored_plan: Plan, tmp_path: Path
) -> None:
    _, images_table = fill_tables(scored_plan, tmp_path, DATA)

    # The rows of this table ask about these fractions of the images.
    num_images = [0, *(NUM_IMAGES // divisor for divisor in (256, 64, 16, 4, 1))]
    assert [line.images for line in images_table.lines] == num_images


def test_the_report_is_written_as_markdown_html_and_json(scored_plan: Plan, tmp_path: Path) -> None:
    tables = fill_tables(scored_plan, tmp_path, DATA)

    paths = write_report(scored_plan, tables, tmp_path)

    markdown, page, numbers = [path.read_text() for path in paths]
    # Columns: row, our success with its interval, the paper's, its difference, verdict, …, steps.
    no_3d_line = r"\| no 3D \| \d\d\.\d \[.*\] \| 20\.8 \| -14\.6 \| agrees \| .* \| 12,000 \|"
    assert re.search(no_3d_line, markdown)
    assert "not run yet" in markdown
    assert "arXiv 2511.17411" in markdown  # the paper
    assert page.count("(theirs)</div>") == 6  # bars of the published numbers
    assert "<svg" in page
    first_table = json.loads(numbers)[0]
    assert first_table["lines"][1]["verdict"] == "agrees"  # of "no-3d"


def test_the_report_says_whether_rows_were_scored_alike(scored_plan: Plan, tmp_path: Path) -> None:
    tables = fill_tables(scored_plan, tmp_path, DATA)
    markdown_file, *_ = write_report(scored_plan, tables, tmp_path)
    assert "alike" not in markdown_file.read_text()

    # Score another row with another replan interval.
    write_scores(scored_plan, tmp_path, {"points": 0.5}, replan=5)
    tables = fill_tables(scored_plan, tmp_path, DATA)
    markdown_file, *_ = write_report(scored_plan, tables, tmp_path)

    assert "alike: replan is not set there, 5 here." in markdown_file.read_text()


@pytest.fixture
def two_family_plan(tmp_path: Path) -> Plan:
    """A plan of two of the four task families, in a folder with scores of all families."""
    plan = plan_rows("full", "no-3d", num_scenes=12)
    write_scores(plan, tmp_path, {"full": 0.8, "no-3d": 0.2})
    return plan_rows("full", "no-3d", num_scenes=12, tasks=("stack_cube", "put_on"))


def test_families_do_not_change_what_is_trained(two_family_plan: Plan) -> None:
    plan = plan_rows("full", "no-3d", num_scenes=12)

    assert [job.key for job in two_family_plan.trainings] == [job.key for job in plan.trainings]
    assert two_family_plan.families == ("put_on", "stack_cube")


def test_only_scenes_of_the_chosen_families_count(two_family_plan: Plan, tmp_path: Path) -> None:
    score = load_score(tmp_path, two_family_plan.scoring("full", 0))

    assert score is not None
    assert len(score.outcomes) == 2 * 12  # families times scenes
    assert {outcome.family for outcome in score.outcomes} == {"put_on", "stack_cube"}


def test_tables_name_the_families_that_count(two_family_plan: Plan, tmp_path: Path) -> None:
    tables = fill_tables(two_family_plan, tmp_path, DATA)

    markdown_file, *_ = write_report(two_family_plan, tables, tmp_path)

    num_episodes = NUM_SEEDS * 2 * 12  # seeds times families times scenes
    num_episodes_of_rows = [line.success.n for line in tables[0].lines if line.success]
    assert num_episodes_of_rows == [num_episodes, num_episodes]  # of "full" and of "no-3d"
    text = markdown_file.read_text()
    assert "of each task family (put on, stack cube) per" in text


# ---- Runs.


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Three labeled scenes and one demonstration, with which plans can be run."""
    pytest.importorskip("mujoco")
    from spear.sim_data.label_scenes import label_scenes

    folder = tmp_path_factory.mktemp("data")
    image_sizes = get_preset("nano").image_sizes
    label_scenes(
        folder / "labels",
        num_scenes=3,
        sizes=dict(image_sizes),
        first_seed=FIRST_TRAIN_SEED,
        workers=1,
    )
    record_demonstrations(
        folder / "episodes",
        ("put_on",),
        episodes_per_family=1,
        first_seed=FIRST_TRAIN_SEED,
        image_sizes=image_sizes,
        workers=1,
    )
    return read_data(folder / "labels", folder / "episodes")


def test_a_plan_knows_the_labels_before_there_are_episodes(data: Data, tmp_path: Path) -> None:
    """Trainings on labels alone then have the same keys before and after recording episodes."""
    expected_data = find_expected_data(AblationOptions(labels=data.labels, out=tmp_path))

    assert expected_data.labels_key == data.labels_key
    assert expected_data.num_images == data.num_images
    assert expected_data.key == ""


def kill_this_process(message: str) -> None:
    """Print nothing, and kill this process when the message announces the second stage."""
    if "nano-vlm-2" in message:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow  # trains, is killed and trains again
def test_a_killed_run_resumes_until_everything_is_scored(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closed_loop, "MAX_STEPS", 3)
    plan = plan_tiny("full", data=data, tasks=("put_on",))

    # A run in another process is killed after the first stage. The process is not forked, because
    # it would inherit what earlier tests left in this process.
    num_workers = 0  # the training process loads its batches itself
    run_in_process(
        -signal.SIGKILL,
        run,
        plan,
        tmp_path,
        data,
        num_workers,
        kill_this_process,
        start_method="spawn",
    )
    finished_trainings = [training for training in plan.trainings if is_done(tmp_path, training)]
    assert [training.recipe.name for training in finished_trainings] == ["nano-vlm-1"]
    first_folder = final_folder(tmp_path, finished_trainings[0])
    first_time = first_folder.stat().st_mtime_ns

    # A second run in this process does the rest.
    messages: list[str] = []
    failures = run(plan, tmp_path, data, workers=num_workers, say=messages.append)

    assert failures == []
    assert first_folder.stat().st_mtime_ns == first_time
    assert all(is_done(tmp_path, job) for job in plan.jobs)
    assert len(messages) == len(plan.jobs) - 1  # one for each job but the first
    assert not list(tmp_path.glob("stages/*/checkpoints"))
    table, *_ = fill_tables(plan, tmp_path, data)
    assert all(line.success is not None for line in table.lines)

    # A third run has nothing to do, even without the weights, because the policy is scored.
    shutil.rmtree(tmp_path / "stages")
    messages = []
    failures = run(plan, tmp_path, data, workers=num_workers, say=messages.append)
    assert failures == []
    assert messages == []


def test_a_plan_is_described_by_recipe(data: Data) -> None:
    plan = plan_tiny("full", data=data, tasks=("put_on",))

    _, *lines, _ = describe(plan, finished=plan.jobs).splitlines()

    names = [line.split()[0] for line in lines]
    counts = [line.split()[1:3] for line in lines]  # number of jobs, and of finished jobs
    assert names == ["nano-vlm-1", "nano-vlm-2", "nano-vla", "scoring"]
    assert counts == [["1", "1"]] * 4


@pytest.mark.slow  # trains
def test_a_row_that_fails_stops_no_other(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closed_loop, "MAX_STEPS", 3)
    good_plan = plan_tiny("no-3d", data=data, tasks=("put_on",))
    good_score = good_plan.scoring("no-3d", 0)
    bad_changes = (*TINY_CHANGES, "lr=1e30", "warmup=0", "max_skipped=0")  # weights become infinite
    bad_plan = plan_tiny("scratch", data=data, changes=bad_changes)
    bad_score = bad_plan.scoring("scratch", 0)
    jobs = [bad_score.previous, bad_score, good_score.previous, good_score]

    reasons = run(replace(bad_plan, jobs=jobs), tmp_path, data, workers=0, say=lambda _: None)

    assert len(reasons) == 1
    assert "not finite" in reasons[0]
    assert bad_score.previous.key in reasons[0]
    assert [is_done(tmp_path, job) for job in jobs] == [False, False, True, True]
