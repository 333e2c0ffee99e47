"""`spear evaluate ablations`: the paper's ablations at nano size, by one command."""

from __future__ import annotations

import sys

from spear.ablations.rows import AblationOptions
from spear.errors import SpearError


def ablations(options: AblationOptions) -> None:
    """Train and score the paper's ablations at nano size, and compare them with its numbers.

    Every row is trained with several seeds and scored on the same held-out scenes of the simulator; stages
    that rows share are trained once. Stopped at any moment, the same command goes on where it was. Started
    several times (one per core), the processes share the work. After every score the tables are written:
    OUT/ablations.md, OUT/ablations.html with bars and the scaling curve, OUT/ablations.json.

    Examples:
        spear evaluate ablations --plan
        spear evaluate ablations --rows 3d --budget 3000
        spear evaluate ablations --rows siglip --families put_on put_in_basket --scenes 100
        spear evaluate ablations --rows no-3d images --labels runs/labels --episodes runs/episodes
    """
    from transformers.utils.logging import disable_progress_bar

    from spear.ablations.data import expected, obtain
    from spear.ablations.plan import describe, make_plan, pretrained
    from spear.ablations.run import done, run
    from spear.ablations.table import fill
    from spear.report.ablations import write

    out, start = options.out, pretrained(options.init, options.moge)
    if options.plan:
        todo = make_plan(options, expected(options), start)
        print(describe(todo, [job for job in todo.jobs if done(out, job)]))
        return
    disable_progress_bar()
    make_plan(options, expected(options), start)  # mistakes are found before data are made
    data = obtain(options, _say)
    todo = make_plan(options, data, start)
    pages = lambda: write(todo, fill(todo, out, data), out)  # noqa: E731
    failed = run(todo, out, data, options.workers, say=_say, on_score=pages)
    for path in pages():
        print(path)
    if failed:
        raise SpearError(f"{len(failed)} skipped: {'; '.join(failed)}")


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)
