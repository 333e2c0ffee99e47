"""`spear evaluate ablations`: the paper's ablations at nano size, by one command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from spear.cli.arguments import Folder, recipe_changes
from spear.errors import SpearError

if TYPE_CHECKING:
    from spear.ablations.data import Data
    from spear.ablations.plan import Plan

Budget = Annotated[str | None, arg(metavar="STEPS|MINUTES")]


def ablations(
    rows: tuple[str, ...] = (),
    seeds: int = 3,
    scenes: int = 200,
    out: Path = Path("runs/ablations"),
    labels: Folder = None,
    episodes: Folder = None,
    init: str = "nano-vlm-0",
    moge: str = "nano-depth",
    budget: Budget = None,
    pretraining: float = 1.0,
    families: tuple[str, ...] = (),
    set: tuple[str, ...] = (),
    workers: int = 1,
    plan: bool = False,
) -> None:
    """Train and score the paper's ablations at nano size, and compare them with its numbers.

    Every row is trained with several seeds and scored on the same held-out scenes of the simulator; stages
    that rows share are trained once. Stopped at any moment, the same command goes on where it was. Started
    several times (one per core), the processes share the work. After every score the tables are written:
    OUT/ablations.md, OUT/ablations.html with bars and the scaling curve, OUT/ablations.json.

    Examples:
        spear evaluate ablations --plan
        spear evaluate ablations --rows 3d --budget 3000
        spear evaluate ablations --rows siglip --families put_on put_in_basket --scenes 100
        spear evaluate ablations --rows no-3d moge-trained images --labels runs/labels --episodes runs/episodes

    Args:
        rows: Rows, or whole tables (3d, rotation, normalisation, siglip, converged, images); all when none is
            given.
        seeds: Trainings of each row.
        scenes: Held-out scenes of each task family, for every training.
        out: Folder for everything.
        labels: Folder of labelled scenes, from spear label. Without it, 13,056 scenes are labelled into
            OUT/labels.
        episodes: Folder of demonstrations, from spear record. Without it, 2,000 of each family are made in
            OUT/episodes.
        families: Task families that policies learn (where demonstrations are made) and are scored on; all of
            them when none is given.
        init: What stands for PaliGemma's weights in all rows: a trained folder of nano-vlm-0, or that name
            for the one that comes with this package.
        moge: What stands for MoGe's: the same of nano-depth.
        budget: Steps of the full row's policy, for example 3000, to which all policies are in proportion; or
            minutes for everything by one process, for example 600min. Without it the recipes' own 12,000
            steps.
        pretraining: Factor on the steps of SPEAR-VLM's stages.
        set: Changes to every recipe as KEY=VALUE, as in spear train.
        workers: Processes that prepare batches, for each training.
        plan: Only print what would be done, and how long it will take here.
    """
    from tempfile import TemporaryDirectory

    from transformers.utils.logging import disable_progress_bar

    from spear.ablations import data as learned
    from spear.ablations.estimate import describe, measure
    from spear.ablations.plan import make_plan, pretrained
    from spear.ablations.rows import choose
    from spear.ablations.run import lock, run
    from spear.ablations.table import fill
    from spear.report.ablations import write

    chosen, changes, start = choose(rows), recipe_changes(set), pretrained(init, moge)
    asked, in_minutes = _budget(budget)
    disable_progress_bar()

    def planned(data: Data, steps: int | None) -> Plan:
        return make_plan(chosen, data, start, seeds, scenes, steps, changes, pretraining, families)

    made = learned.episodes_folder(out, families)
    has_labels, has_episodes = (out / "labels" / "complete").is_file(), made.is_dir()
    if plan:
        with TemporaryDirectory() as scratch:
            data = learned.stand_in(
                Path(scratch),
                labels or (out / "labels" if has_labels else None),
                episodes or (made if has_episodes else None),
            )
            steps = _steps(asked, planned(data, None), out, data) if in_minutes and asked else asked
            todo = planned(data, steps)
            print(describe(todo, out, measure(todo, out, data, _say)))
        return
    with lock(out / "locks" / "data", wait=True):
        data = learned.look_at(
            labels or learned.make_labels(out / "labels", say=_say),
            episodes or learned.make_episodes(made, learned.settle(families), say=_say),
        )
        steps = _steps(asked, planned(data, None), out, data) if in_minutes and asked else asked
    todo = planned(data, steps)
    failed = run(todo, out, data, workers, say=_say, on_score=lambda: write(todo, fill(todo, out, data), out))
    for path in write(todo, fill(todo, out, data), out):
        print(path)
    if failed:
        raise SpearError(f"{len(failed)} set aside: {'; '.join(failed)}")


def _budget(text: str | None) -> tuple[int | None, bool]:
    """The number of a budget, and whether it is in minutes."""
    if text is None:
        return None, False
    number = text.removesuffix("min")
    if not number.isdecimal() or int(number) < 1:
        raise SpearError(f"--budget {text}: give steps, such as 3000, or minutes, such as 600min")
    return int(number), text.endswith("min")


def _steps(minutes: int, plan: Plan, out: Path, data: Data) -> int:
    """Steps for a budget in minutes: worked out once, then kept, so that a second start does the same."""
    from spear.ablations.estimate import measure, steps_for

    kept = out / "budgets.json"
    known = json.loads(kept.read_text()) if kept.is_file() else {}
    key = f"{minutes} minutes, {len(plan.trainings)} trainings, {len(plan.scorings)} scorings of {plan.scenes} scenes"
    if key not in known:
        known[key] = steps_for(minutes, plan, measure(plan, out, data, _say))
        out.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(known, indent=1))
    print(f"{minutes} minutes: {known[key]:,} steps of the full row's policy", file=sys.stderr)
    return int(known[key])


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)
