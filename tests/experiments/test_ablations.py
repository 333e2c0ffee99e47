"""The ablations: rows that can be trained, plans that share, runs that go on, tables that say what is so."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.ablations.plan import (
    Data,
    Plan,
    Scoring,
    Weights,
    describe,
    expected,
    look_at,
    make_plan,
    pretrained,
)
from experiments.ablations.report import write
from experiments.ablations.rows import SETTINGS, TABLES, AblationOptions
from experiments.ablations.run import done, final, run, scored
from experiments.ablations.table import fill, judge
from processes import run_in_process
from spear import flow
from spear.evaluate import closed_loop
from spear.evaluate.compare import load_references
from spear.evaluate.results import Journal, Outcome
from spear.evaluate.stats import Estimate
from spear.geometry import quat_exp, quat_multiply
from spear.models.presets import PRESETS, build_spear1_config, get_preset
from spear.models.spear1 import Spear1ForActionPrediction
from spear.sim.scene import FAMILIES
from spear.sim_data.demonstrations import record_demonstrations
from spear.train.optimize import apply_freeze
from spear.train.recipes import RECIPES
from spear.types import Action
from spear.util.held_out import FIRST_TRAIN_SEED

DATA = Data(Path("labels"), Path("episodes"), 13_056, "data", "labels")
ROTATIONS = next(table.rows for table in TABLES if table.name == "rotation")
START = (Weights(Path("vlm"), "vlm"), Weights(Path("depth"), "depth"))
TINY = ("batch_size=2", "question_images=1", "flow_samples=1")


def planned(
    *names: str, data: Data = DATA, start: tuple[Weights, Weights] = START, **given: Any
) -> Plan:
    return make_plan(AblationOptions(rows=names, **{"scenes": 2, **given}), data, start)


def flow_of(row: str) -> dict[str, Any]:
    return {**PRESETS["nano"].flow, **planned(row, seeds=1).chains[row, 0][-1].recipe.flow}


def short(*names: str, data: Data, changes: tuple[str, ...] = TINY, **given: Any) -> Plan:
    few: dict[str, Any] = {
        "seeds": 1,
        "scenes": 1,
        "budget": 1,
        "pretraining": 1e-9,
        "set": changes,
    }
    return planned(*names, data=data, start=pretrained(), **few, **given)


def test_every_row_has_its_published_number_and_something_to_compare_with() -> None:
    for table in TABLES:
        assert table.against in [row.name for row in table.rows]
        if table.reference:
            assert set(load_references()[table.reference].means) <= {
                row.title for row in table.rows
            }
    every = [row.name for table in TABLES for row in table.rows] + [table.name for table in TABLES]
    assert len(set(every)) == len(every)


def test_every_row_names_modules_that_its_network_has() -> None:
    models = {}
    for moge in (True, False):
        config = build_spear1_config(get_preset("nano"))
        if not moge:
            config.vlm_config.moge_config = None
        with torch.device("meta"):
            models[moge] = Spear1ForActionPrediction(config)
    for training in planned(seeds=1).trainings:
        stage = training.recipe
        if stage.kind in ("vlm", "vla"):
            model = models[stage.moge]
            apply_freeze(model if stage.kind == "vla" else model.vlm, stage.optimization)


def test_the_vlms_rates_and_the_longer_trainings_follow_the_recipes() -> None:
    alone, rates = RECIPES["nano-vla"], SETTINGS["nano-vla"]
    assert rates["lr"] * rates["lr_scale"]["vlm"] == pytest.approx(alone.optimization.lr)
    ours, theirs = (r.optimization.steps * r.batch_size for r in (alone, RECIPES["nano-vla-no-3d"]))
    longer = next(row for table in TABLES for row in table.rows if row.name == "no-3d-as-long")
    assert longer.stages[0].length == pytest.approx(theirs / ours)


def test_four_rotation_losses_ask_the_same_of_a_small_error() -> None:
    target = quat_exp(torch.tensor([0.3, -0.2, 0.5]))[None, None]
    guess = quat_multiply(target, quat_exp(torch.tensor([0.0, 0.02, 0.0]))[None, None])
    data, said = (Action(torch.zeros(1, 1, 3), q, torch.zeros(1, 1, 1)) for q in (target, guess))
    configs = [flow.FlowConfig(**flow_of(row.name)) for row in ROTATIONS[:4]]
    costs = [
        float(flow.compute_loss(said, data, data, torch.full((1,), 0.5), config)[0])
        for config in configs
    ]
    assert costs == pytest.approx([costs[0]] * 4, rel=0.01)
    assert costs[0] == pytest.approx(PRESETS["nano"].flow["rotation_weight"] * 0.02**2, rel=0.01)


def test_velocities_cost_as_much_when_a_turn_is_missed() -> None:
    generator, n = torch.Generator().manual_seed(0), 20_000
    noise = flow.sample_noise((n, 1), flow.FlowConfig(), generator).to(torch.float64)
    axes = torch.nn.functional.normalize(torch.randn(n, 1, 3, generator=generator).double(), dim=-1)
    still = torch.tensor([1.0, 0, 0, 0]).double().expand(n, 1, 4)
    data, said = (Action(*(torch.zeros(n, 1, k).double() for k in (3, 4, 1))) for _ in range(2))
    data, said = replace(data, rotation=quat_exp(0.1 * axes)), replace(said, rotation=still)
    time, costs = torch.zeros(n).double(), []
    for row in ("s3-cosine", "velocity"):
        config = flow.FlowConfig(**flow_of(row))
        if row == "velocity":
            said = flow.prediction_to_velocity(
                said, noise, time, replace(config, prediction="clean")
            )
        costs.append(float(flow.compute_loss(said, noise, data, time, config)[0]))
    assert costs[1] == pytest.approx(costs[0], rel=0.02)


def test_what_rows_share_is_trained_once() -> None:
    plan = planned("3d")
    count = {name: sum(t.recipe.name == name for t in plan.trainings) for name in RECIPES}
    assert {n: c for n, c in count.items() if c} == {
        "nano-vlm-1": 9,  # as in the paper, about points, without MoGe
        "nano-vlm-2": 12,  # and with frozen encoders
        "nano-vla": 21,
    }
    assert sum(isinstance(job, Scoring) for job in plan.jobs) == 21
    full = plan.chains["full", 1]
    assert [(t.recipe.name, t.seed) for t in full] == [
        ("nano-vlm-1", 1),
        ("nano-vlm-2", 1),
        ("nano-vla", 1),
    ]
    assert full[0].init == START[0] and [t.moge for t in full] == [START[1], None, None]
    assert all(t.init == before for before, t in pairwise(full))
    assert planned("scratch").chains["scratch", 0][0].init is None
    asked = plan.chains["points", 0][-2].recipe.questions.families
    assert "pixel_point" in asked and "box_vertices" not in asked
    assert plan.chains["no-moge", 0][0].moge is None
    learns = list(plan.chains["no-moge", 0][0].recipe.optimization.trained)
    assert learns == ["multi_modal_projector", "language_model.embed_tokens"]
    everything = planned()
    assert len({t.key for t in everything.trainings}) == len(everything.trainings)
    names = ("full", "mean-std", "siglip-trained", "all-images", "full-again", "s3-cosine")
    assert len({everything.scoring(row, 0).before.key for row in names}) == 1
    assert everything.scoring("s3-mse", 0).before.key != everything.scoring("full", 0).before.key


def test_keys_follow_what_decides_the_result() -> None:
    key = planned("full", seeds=1).scoring("full", 0).before.key
    assert key == "0364d014e594"  # else scores that are kept count no more
    assert planned("rotation", "full", seeds=2, scenes=9).scoring("full", 0).before.key == key
    more = planned("full", data=replace(DATA, key="other"), seeds=1)
    sets = ("lr=1e-5",), ('flow={"steps":2}',), ('flow={"steps":3}',)
    changes = [{"start": (one, one)} for one in START] + [
        {"budget": 7},
        *({"set": one} for one in sets),
    ]
    others = [more, *(planned("full", seeds=1, **change) for change in changes)]
    assert len({key, *(plan.scoring("full", 0).before.key for plan in others)}) == 8
    for row, loss in (("s3-cosine", "cosine"), ("linear-mse", "mse")):  # what a row is about stays
        flow = planned(row, seeds=1, set=sets[1]).chains[row, 0][-1].recipe.flow
        assert (flow["rotation_loss"], flow["steps"]) == (loss, 2)
    moved = (replace(START[0], folder=Path("elsewhere")), START[1])
    assert planned("full", start=moved, seeds=1).scoring("full", 0).before.key == key
    # What sees no demonstrations is shared, whatever they are.
    ours, theirs = (
        [t.key for t in plan.chains["full", 0]] for plan in (planned("full", seeds=1), more)
    )
    assert ours[:-1] == theirs[:-1] and ours[-1] != theirs[-1]


def test_a_budget_is_the_same_for_every_row() -> None:
    plan = planned("3d", "converged", "siglip", "images", seeds=1, budget=1200)
    steps = {row: [t.steps for t in chain] for (row, _), chain in plan.chains.items()}
    assert steps["full"] == [200, 2600, 1200] and steps["no-3d"] == [1200]
    assert steps["points"] == steps["no-moge"] == steps["images-64th"] == steps["full"]
    assert steps["no-3d-as-long"] == [2800] and steps["scratch-x9"] == [11_200]
    assert steps["siglip-thawed"][-2:] == [600, 600] and steps["no-images"] == [0, 1200]
    halves = plan.chains["siglip-thawed", 0][-2:]
    assert halves[0].seed != halves[1].seed
    assert halves[1].recipe.optimization.frozen == RECIPES["nano-vla"].optimization.frozen
    assert [t.recipe.questions.most_images for t in plan.chains["images-64th", 0]] == [
        204,
        204,
        204,
    ]


@pytest.mark.parametrize(
    ("ours", "theirs", "seeds", "said"),
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
    ours: tuple[float, ...] | None, theirs: float | None, seeds: int, said: str
) -> None:
    assert judge(None if ours is None else Estimate(*ours, 10), theirs, seeds) == said


def scores(plan: Plan, out: Path, rates: dict[str, float], **how: Any) -> None:
    """Journals as scoring writes them, with so many successes."""
    for (row, seed), chain in plan.chains.items():
        if row in rates:
            folder = out / "scores" / plan.scoring(row, seed).before.key
            journal = Journal(folder, chain[-1].folder, {"weights": row, **how}, (1, 1), {})
            rng = np.random.default_rng(seed)
            for family in FAMILIES:
                for scene in range(plan.scenes + 1):  # one more than is asked for
                    won = bool(rng.random() < rates[row])
                    journal.add(Outcome(family, scene, "go", won, won, won, False, 0, 9), 0.1, 0.1)


def test_tables_say_what_is_so(tmp_path: Path) -> None:
    plan = planned("3d", "images", scenes=12)
    scores(plan, tmp_path, {"full": 0.8, "no-3d": 0.2, "no-moge": 0.8, "images-64th": 0.5})
    tables = fill(plan, tmp_path, DATA)
    lines = {line.row.name: line for line in tables[0].lines}
    assert lines["full"].success is not None and lines["full"].success.n == 144
    assert lines["full"].success.value == pytest.approx(np.mean(lines["full"].by_seed))
    assert lines["no-3d"].verdict == "agrees" and lines["no-3d"].published_against == pytest.approx(
        -14.6
    )
    assert lines["no-moge"].verdict == "cannot tell"  # the same draws
    assert lines["points"].verdict == "not run yet" and lines["points"].success is None
    assert [line.images for line in tables[1].lines] == [0, 51, 204, 816, 3264, 13_056]
    markdown, page, numbers = (path.read_text() for path in write(plan, tables, tmp_path))
    assert re.search(
        r"\| no 3D \| \d\d\.\d \[.*\] \| 20\.8 \| -14\.6 \| agrees \| .* \| 12,000 \|", markdown
    )
    assert "not run yet" in markdown and "arXiv 2511.17411" in markdown
    assert page.count("(theirs)</div>") == 6 and "<svg" in page
    assert json.loads(numbers)[0]["lines"][1]["verdict"] == "agrees"
    scores(plan, tmp_path, {"points": 0.5}, replan=5)
    markdown_now, *_ = (
        path.read_text() for path in write(plan, fill(plan, tmp_path, DATA), tmp_path)
    )
    assert "alike: replan is null there, 5 here." in markdown_now and "alike" not in markdown


def test_other_families_are_left_out(tmp_path: Path) -> None:
    plan = planned("full", "no-3d", scenes=12)
    scores(plan, tmp_path, {"full": 0.8, "no-3d": 0.2})
    some = planned("full", "no-3d", scenes=12, families=("stack_cube", "put_on"))
    assert [job.key for job in some.trainings] == [job.key for job in plan.trainings]
    scoring = next(job for job in some.jobs if isinstance(job, Scoring))
    assert some.families == ("put_on", "stack_cube") and scoring.episodes == 24
    tables = fill(some, tmp_path, DATA)
    assert [line.success.n for line in tables[0].lines if line.success] == [72, 72]
    assert (
        "of each task family (put on, stack cube) per"
        in write(some, tables, tmp_path)[0].read_text()
    )
    whole, part = (scored(tmp_path, one.scoring("full", 0)) for one in (plan, some))
    assert (
        whole is not None
        and part is not None
        and len(whole.outcomes) == 48
        and len(part.outcomes) == 24
    )
    assert {o.family for o in part.outcomes} == {"put_on", "stack_cube"}
    for families, name in (
        ((), "episodes"),
        (FAMILIES[::-1], "episodes"),
        (("put_on",), "episodes-put_on"),
    ):
        assert expected(AblationOptions(out=tmp_path, families=families)).episodes.name == name


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    pytest.importorskip("mujoco")
    from spear.sim_data.label_scenes import label_scenes

    folder = tmp_path_factory.mktemp("data")
    label_scenes(folder / "labels", 3, dict(PRESETS["nano"].image_sizes), 10_000, workers=1)
    record_demonstrations(
        folder / "episodes", ("put_on",), 1, FIRST_TRAIN_SEED, get_preset("nano").image_sizes, 1
    )
    return look_at(folder / "labels", folder / "episodes")


def test_a_plan_knows_the_labels_before_there_are_episodes(data: Data, tmp_path: Path) -> None:
    """Else what was learned from them alone would count as not done."""
    found = expected(AblationOptions(labels=data.labels, out=tmp_path))
    assert (found.labels_key, found.images, found.key) == (data.labels_key, data.images, "")


def die(words: str) -> None:
    if "nano-vlm-2" in words:
        os.kill(os.getpid(), signal.SIGKILL)


def test_killed_at_any_moment_it_goes_on(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closed_loop, "MAX_STEPS", 3)
    plan = short("full", data=data, families=("put_on",))
    said: list[str] = []
    # Not forked: what tests before left in this process would go with it.
    run_in_process(-signal.SIGKILL, run, plan, tmp_path, data, 0, die, start_method="spawn")
    made = {job.key: done(tmp_path, job) for job in plan.trainings}
    assert [job.recipe.name for job in plan.trainings if made[job.key]] == ["nano-vlm-1"]
    kept = {t.key: final(tmp_path, t).stat().st_mtime_ns for t in plan.trainings if made[t.key]}
    assert run(plan, tmp_path, data, 0, said.append) == []
    assert {
        t.key: final(tmp_path, t).stat().st_mtime_ns for t in plan.trainings if made[t.key]
    } == kept
    assert all(done(tmp_path, job) for job in plan.jobs) and len(said) == len(plan.jobs) - len(kept)
    assert not list(tmp_path.glob("stages/*/checkpoints"))
    assert all(line.success is not None for line in fill(plan, tmp_path, data)[0].lines)
    lines = describe(plan, plan.jobs).splitlines()[1:-1]
    assert [line.split()[0] for line in lines] == [
        "nano-vlm-1",
        "nano-vlm-2",
        "nano-vla",
        "scoring",
    ]
    assert all(line.split()[1:3] == ["1", "1"] for line in lines)
    shutil.rmtree(tmp_path / "stages")
    again: list[str] = []
    assert (
        run(plan, tmp_path, data, 0, again.append) == [] and again == []
    )  # all policies are scored


def test_a_row_that_fails_stops_no_other(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closed_loop, "MAX_STEPS", 3)
    good = short("no-3d", data=data, families=("put_on",)).scoring("no-3d", 0)
    bad = short("scratch", data=data, changes=(*TINY, "lr=1e30", "warmup=0", "max_skipped=0"))
    scratch = bad.scoring("scratch", 0)
    jobs = [scratch.before, scratch, good.before, good]
    failed = run(replace(bad, jobs=jobs), tmp_path, data, 0, lambda _: None)
    assert len(failed) == 1 and "not finite" in failed[0] and scratch.before.key in failed[0]
    assert [done(tmp_path, job) for job in jobs] == [False, False, True, True]
