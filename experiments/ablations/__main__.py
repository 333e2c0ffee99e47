"""Train and score the paper's ablations at nano size, and compare them with its numbers.

Every row is trained with several seeds, and every training is scored on the same held-out scenes of
the simulator. Stages that rows share are trained once. Rerunning the command resumes from where it
stopped. Start it several times (once per core) to share the work between processes. After every
score the command writes OUT/ablations.md, OUT/ablations.html (with bars and the scaling curve) and
OUT/ablations.json.

Examples:
    python -m experiments.ablations --dry-run
    python -m experiments.ablations --rows 3d --budget 3000
    python -m experiments.ablations --rows siglip --tasks put_on put_in_basket --num-scenes 100
    python -m experiments.ablations --rows no-3d --labels runs/labels --episodes runs/episodes
"""

import functools
import sys
from collections.abc import Sequence

import tyro

from experiments.ablations import plan as planning
from experiments.ablations.plan import Plan, Weights
from experiments.ablations.rows import AblationOptions
from experiments.ablations.run import is_done, run
from spear.cli import renamed, run_reporting_errors
from spear.errors import SpearError
from spear.train.options import TrainingInputs

PROGRAM = "python -m experiments.ablations"


def run_ablations(options: AblationOptions) -> None:
    """Train and score everything that is missing, and write the tables.

    Raises `SpearError` at the end for trainings that failed.
    """
    # A mistake in the options is found before any data are made.
    start = planning.find_pretrained_weights(options.init, options.init_depth_encoder)
    expected_plan = planning.make_plan(options, planning.find_expected_data(options), start)
    if options.dry_run:
        finished = [job for job in expected_plan.jobs if is_done(options.out, job)]
        print(planning.describe(expected_plan, finished))
        return

    # From here on the networks are needed; a plan is printed without PyTorch.
    from transformers.utils.logging import disable_progress_bar

    from experiments.ablations.report import write_report
    from experiments.ablations.table import fill_tables

    disable_progress_bar()
    check_trainings(expected_plan, options)

    say = functools.partial(print, file=sys.stderr, flush=True)
    data = planning.make_missing_data(options, say)
    plan = planning.make_plan(options, data, start)

    def write_tables() -> list[object]:
        return list(write_report(plan, fill_tables(plan, options.out, data), options.out))

    failed = run(plan, options.out, data, options.workers, say=say, on_score=write_tables)
    for path in write_tables():
        print(path)
    if failed:
        raise SpearError(f"{len(failed)} skipped: {'; '.join(failed)}")


def check_trainings(plan: Plan, options: AblationOptions) -> None:
    """Check every different recipe of a plan against the weights that it starts from."""
    from spear.train.build import check

    labels = [options.labels] if options.labels else ()
    trainings = {repr(training.recipe): training for training in plan.trainings}
    for training in trainings.values():
        init = training.init.folder if isinstance(training.init, Weights) else None
        moge = training.moge.folder if training.moge else None
        check(training.recipe, TrainingInputs(labels, (), init, moge))


def main(args: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit code, as `spear` commands do."""

    def parse_and_run() -> None:
        renamed.check_no_former_options(
            "experiments.ablations", sys.argv[1:] if args is None else args
        )
        options = tyro.cli(
            AblationOptions,
            args=args,
            prog=PROGRAM,
            description=__doc__,
            config=(tyro.conf.OmitArgPrefixes,),
        )
        run_ablations(options)

    return run_reporting_errors(parse_and_run)


if __name__ == "__main__":
    sys.exit(main())
