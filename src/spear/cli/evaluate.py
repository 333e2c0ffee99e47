"""Evaluating policies, comparing the results of two, putting parts together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from spear.cli.arguments import File, Folder, Name, open_episodes
from spear.cli.results import films_wanted, report
from spear.errors import SpearError, notice, unknown_name
from spear.util.files import check_own, write_bytes, write_text


def evaluate(
    policy: str = "nano",
    families: tuple[str, ...] = (),
    scenes: int = 381,
    first_seed: int = 0,
    replan: int = 1,
    batch: int = 32,
    films: str = "1",
    out: Path = Path("runs/evaluate"),
    compare: File = None,
    execution: Literal["sync", "async", "ensemble"] = "sync",
    latency_ms: float = 0.0,
    shard: str = "1/1",
    device: str = "auto",
    dtype: Literal["float32", "bfloat16"] = "float32",
    dataset: Name = None,
) -> None:
    """Let a policy act in simulated scenes it has never seen, and count its successes.

    Prints success per task family with 95 % intervals; writes OUT/results.json and films of successes and
    failures. Outcomes are written as they come: the same command continues an evaluation that was stopped,
    and one with more --scenes adds to it.

    Examples:
        spear evaluate --policy nano --scenes 200
        spear evaluate --policy runs/my_policy --families stack_cube --compare runs/evaluate --out runs/mine
        spear evaluate --policy nano --shard 2/5 --films failures

    Args:
        policy: nano (comes with this package), a folder with a trained policy, the ws:// address of a policy
            server, or a reference: expert or nothing.
        families: Task families; all of them when none is given.
        scenes: Scenes per family. 381 are enough to know each family's success rate to ±5 points.
        first_seed: Scenes first-seed, first-seed + 1, … below 10000.
        replan: How many of the predicted actions are executed before the policy looks again.
        batch: Scenes that run at once.
        films: Films of so many successes and failures per family; failures, for a film of every failure; or
            all.
        out: Folder for the results.
        compare: An earlier folder or results.json: also print the difference on the scenes that both have
            seen.
        execution: sync waits for each chunk of actions; async moves on while the next one is computed;
            ensemble looks at every step and averages what all chunks say about it.
        latency_ms: Simulated time that the policy takes to answer, in milliseconds.
        shard: Run only a part of the scenes, 2/5 for the second of five. Parts with the same --out come
            together there; parts from other machines with `spear evaluate merge`.
        device: cpu, cuda, cuda:1 …; auto takes a GPU when there is one.
        dtype: Precision of the weights: bfloat16 takes half the memory of float32.
        dataset: Of a policy whose training datasets were normalised each by itself: the one whose units to
            use.
    """
    import torch

    from spear.evaluate.closed_loop import evaluate as run
    from spear.evaluate.journal import Shard, load
    from spear.evaluate.load import load_agent
    from spear.sim.scene import FAMILIES
    from spear.train.devices import choose_device

    filmed = films_wanted(films)
    part = Shard.parse(shard)
    earlier = load(compare) if compare else None
    agent, sizes = load_agent(policy, choose_device(device), getattr(torch, dtype), dataset)
    run(
        agent,
        families or FAMILIES,
        scenes,
        first_seed,
        replan,
        batch,
        films=filmed,
        execution=execution,
        latency_ms=latency_ms,
        out=out,
        shard=part,
        **sizes,
    )
    report(policy, out, earlier)


def evaluate_data(
    policy: Annotated[Positional[str], arg(metavar="POLICY")],
    data: Annotated[Positional[Path], arg(metavar="FOLDER")],
    /,
    split: str = "train",
    train: Folder = None,
    train_split: Name = None,
    plot: File = None,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16"] = "float32",
    dataset: Name = None,
) -> None:
    """Compare a policy's actions with a demonstrator's, on recorded episodes (no robot needed).

    Prints the errors, with 95 % intervals over episodes, beside those of two policies that see nothing:
    always the mean action, and always the last action again.

    Examples:
        spear evaluate data runs/my_robot runs/held_out --train runs/train --plot errors.png
        spear evaluate data runs/my_robot my_dataset --split "train[90%:]" --train-split "train[:90%]"

    Args:
        policy: nano (comes with this package) or a folder with a trained policy.
        data: Folder of held-out episodes, in any format (see `spear data inspect`).
        split: Which of its episodes are held out: train, val, train[90%:] …
        train: Folder of the training episodes, whose mean action is a reference (default: the same folder
            with --train-split, or else the held-out episodes).
        train_split: Which of the training folder's episodes were trained on.
        plot: Save a plot of predictions and truth as PNG.
        device: cpu, cuda, cuda:1 …; auto takes a GPU when there is one.
        dtype: Precision of the weights: bfloat16 takes half the memory of float32.
        dataset: Of a policy whose training datasets were normalised each by itself: the one whose units to
            use.
    """
    from tempfile import TemporaryDirectory

    import torch

    from spear.evaluate import open_loop
    from spear.policy import Spear1Policy
    from spear.train.devices import choose_device

    place = choose_device(device)
    with TemporaryDirectory() as scratch:
        held_out = open_episodes(data, Path(scratch) / "held-out", split)
        model = Spear1Policy.load(policy, place, dataset=dataset, dtype=getattr(torch, dtype))
        ours = open_loop.score(policy, model, held_out)
        learned = held_out
        if train or train_split:
            learned = open_episodes(train or data, Path(scratch) / "train", train_split or "train")
        reference = open_loop.score_mean_action(learned, held_out)
        scores = (ours, reference, open_loop.score_last_action(held_out))
    print(
        f"{len(held_out)} held-out episodes".ljust(24)
        + "".join(f"{s.name[-26:]:<28}" for s in scores).rstrip()
    )
    summaries = [score.summary() for score in scores]
    for name in summaries[0]:
        cells = (f"{s[name].value:.3f} [{s[name].low:.3f}, {s[name].high:.3f}]" for s in summaries)
        print(f"{name.replace('_', ' '):<24}" + "".join(f"{cell:<28}" for cell in cells).rstrip())
    if plot:
        write_bytes(plot, open_loop.plot(ours, reference))


def compare(
    first: Annotated[Positional[Path], arg(metavar="A")],
    second: Annotated[Positional[Path], arg(metavar="B")],
    /,
    out: File = None,
    films: int = 12,
) -> None:
    """Say which of two evaluated policies is better, on the scenes that both have seen.

    Prints both success rates per task family, the difference (A minus B, in percentage points) with its 95 %
    interval, and the p-value of an exact paired test.

    Examples:
        spear evaluate compare runs/mine runs/evaluate
        spear evaluate compare runs/mine runs/evaluate --out compare.html

    Args:
        first: Folder that spear evaluate wrote (or its results.json).
        second: The folder (or results.json) to compare with.
        out: Also write an HTML page with plots, and films of the same scenes side by side.
        films: At most so many pairs of films on the page; scenes that only one of the two solved come first.
            Both films are there where both were evaluated with --films all.
    """
    from rich import print as show

    from spear.evaluate.compare import compare as pair_up
    from spear.evaluate.journal import load
    from spear.evaluate.reference import beside
    from spear.report.comparison import comparison_page, reference_section

    results = load(first), load(second)
    same = results[0].policy == results[1].policy
    comparison = pair_up(*results, names=(str(first), str(second)) if same else None)
    show(comparison.table())
    print(comparison.verdict())
    for setting in comparison.settings:
        print(f"run differently: {setting}")
    if comparison.unshared:
        print(f"left out: {comparison.unshared} episodes whose scene only one of the two saw")
    ours = list(zip((comparison.first, comparison.second), results, strict=True))
    published = beside(results[0])
    for table in published:
        show(table.table(ours))
    if out:
        folders = tuple(p if p.is_dir() else p.parent for p in (first, second))
        extra = [reference_section(table, ours) for table in published]
        write_text(out, comparison_page(comparison, (folders[0], folders[1]), films, extra))
        print(f"page: {out}")


def merge(
    parts: Annotated[Positional[tuple[Path, ...]], arg(metavar="FOLDER...")],
    /,
    out: Path = Path("runs/merged"),
) -> None:
    """Put the parts of one evaluation together that ran with spear evaluate --shard on several machines.

    Prints the whole table; writes OUT/results.json and copies the films.

    Example:
        spear evaluate merge from-machine-1 from-machine-2 --out runs/evaluate

    Args:
        parts: Folders that spear evaluate wrote.
        out: Folder for the whole, a new one.
    """
    from rich import print as show

    from spear.evaluate.film import film_file
    from spear.evaluate.journal import journals, load, missing_parts
    from spear.evaluate.reference import beside
    from spear.evaluate.results import merge as put_together

    if not parts:
        raise SpearError("nothing to merge: name the folders that `spear evaluate --shard` wrote")
    if journals(out):
        raise SpearError(f"--out {out}: holds an evaluation of its own: give a new folder for the whole")
    check_own(out, "results.json", "merge")
    found = [load(path) for path in parts]
    if missing := missing_parts(parts):
        notice(f"not all of the evaluation: part {', '.join(missing)} is in none of these folders")
    results = put_together(found)
    results.save(out / "results.json")
    for path, part in zip(parts, found, strict=True):
        folder = path if path.is_dir() else path.parent
        for film in filter(None, (film_file(folder, o.film_name) for o in part.outcomes)):
            if film.parent.resolve() != out.resolve():
                write_bytes(out / film.name, film.read_bytes())
    show(results.table())
    for published in beside(results):
        show(published.table([(results.policy, results)]))
    print(f"results in {out}")


def reference(table: Annotated[str | None, arg(metavar="NAME")] = None) -> None:
    """Show the numbers that the SPEAR-1 paper published.

    They are theirs, not measured here. `spear evaluate` shows them beside results on the same tasks.

    Examples:
        spear evaluate reference
        spear evaluate reference --table rotation

    Args:
        table: Only this one: simpler_widowx, ablations, rotation, normalisation, siglip or droid.
    """
    from rich import print as show

    from spear.evaluate.reference import references

    known = references()
    if table is not None and table not in known:
        raise unknown_name("table", table, known)
    for name in [table] if table else known:
        show(known[name].table())
