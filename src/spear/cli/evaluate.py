"""Evaluating policies and SPEAR-VLMs, and comparing the results of two policies."""

from dataclasses import field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

from rich import print as show
from tyro.conf import Positional, arg

from spear.cli.data import check_episodes, open_episodes
from spear.errors import SpearError, format_count, notice
from spear.evaluate.compare import find_matching_references, load_references
from spear.evaluate.options import AgentOptions, QuestionOptions, SimplerOptions, TabletopOptions
from spear.evaluate.results import load_results
from spear.util.files import check_no_foreign_files, check_writable, read_json, write_text
from spear.util.options import (
    DatasetName,
    Device,
    Dtype,
    ModelName,
    OptionalFile,
    OptionalFolder,
    OptionalName,
    Options,
    PolicyName,
    Range,
)
from spear.util.run_settings import describe_difference


class EvaluateOptions(Options):
    agent: AgentOptions = field(default_factory=AgentOptions)
    loop: TabletopOptions = field(
        default_factory=lambda: TabletopOptions(films=1, out=Path("runs/evaluate"))
    )


def evaluate(options: EvaluateOptions) -> None:
    """Let a policy act in simulated scenes it has never seen, and count its successes.

    Prints success per task family with 95 % intervals; writes OUT/results.json and films of successes and
    failures. Outcomes are written as they come: the same command continues an evaluation that was stopped,
    and one with more --scenes adds to it.

    Examples:
        spear evaluate --policy nano --scenes 200
        spear evaluate --policy runs/my_policy --families stack_cube --out runs/mine
        spear evaluate --policy nano --shard 2/5 --films failures
    """
    from spear.evaluate.agents import load_agent
    from spear.evaluate.closed_loop import evaluate_tabletop as run

    ran, _ = run(load_agent(**vars(options.agent)), options.loop)
    _report(options.agent.policy, options.loop.out, len(ran.outcomes))


class EvaluateSimplerOptions(Options):
    agent: AgentOptions = field(default_factory=AgentOptions)
    loop: SimplerOptions = field(
        default_factory=lambda: SimplerOptions(films=1, out=Path("runs/simpler"))
    )


def evaluate_simpler(options: EvaluateSimplerOptions) -> None:
    """Let a policy act in SIMPLER's four WidowX tasks (ManiSkill 3), and count its successes.

    Needs pip install 'spear-vla[simpler]', ManiSkill's assets and a Vulkan driver: see docs/simpler.md.
    Prints success per task with 95 % intervals beside the paper's numbers; writes OUT/results.json and films.
    The same command continues an evaluation that was stopped.

    Examples:
        spear evaluate simpler --policy runs/my_policy
        spear evaluate simpler --policy oracle --tasks PutCarrotOnPlateInScene-v1 --out runs/oracle
    """
    from spear.evaluate.agents import load_agent
    from spear.evaluate.simpler import run

    who = options.agent
    if who.policy == "expert":
        raise SpearError("--policy expert: knows the embedded simulator only: give oracle")
    agent = run.OracleAgent() if who == AgentOptions("oracle") else load_agent(**vars(who))
    ran, _ = run.evaluate_simpler(agent, options.loop)
    _report(who.policy, options.loop.out, len(ran.outcomes))


class EvaluateDataOptions(Options):
    policy: Annotated[Positional[PolicyName], arg(metavar="POLICY")]
    data: Annotated[Positional[Path], arg(metavar="FOLDER")]
    """Folder of held-out episodes, in any format (see `spear data inspect`)."""
    split: str = "train"
    """Which of its episodes are held out: train, val, train[90%:] …"""
    train: OptionalFolder = None
    """Folder of the training episodes, whose mean action is a reference (default: the same folder with
    --train-split, or else the held-out episodes)."""
    train_split: OptionalName = None
    """Which of the training folder's episodes were trained on."""
    plot: OptionalFile = None
    """Write a page with plots of predictions and truth to this file."""
    device: Device = "auto"
    dtype: Dtype = "float32"
    dataset: DatasetName = None


def evaluate_data(options: EvaluateDataOptions) -> None:
    """Compare a policy's actions with a demonstrator's, on recorded episodes (no robot needed).

    Prints the errors, with 95 % intervals over episodes, beside those of two policies that see nothing:
    always the mean action, and always the last action again.

    Examples:
        spear evaluate data runs/my_robot runs/held_out --train runs/train --plot errors.html
        spear evaluate data runs/my_robot my_dataset --split "train[90%:]" --train-split "train[:90%]"
    """
    from spear.data.readers.splits import count_shared_episodes
    from spear.evaluate import open_loop
    from spear.models.weights.folders import read_provenance
    from spear.policy import Spear1Policy, locate
    from spear.report.comparison import open_loop_page

    o = options
    learned = (o.train or o.data, o.train_split or ("train" if o.train else o.split))
    held, trained = check_episodes(o.data, o.split), check_episodes(*learned)
    known = (o.train or o.train_split) and learned[0].resolve() == o.data.resolve()
    if known and (both := count_shared_episodes(held, trained)):
        where = f"--split {o.split}: {both} of its episodes also in --train-split {learned[1]}"
        raise SpearError(f"{where}: hold others out")
    model = Spear1Policy.load(o.policy, o.device, dataset=o.dataset, dtype=o.dtype)
    model.truncate_instructions = True  # its training cut the instructions of these episodes, too
    with TemporaryDirectory() as scratch:
        held_out = open_episodes(
            o.data, Path(scratch) / "held-out", o.split
        ).select_demonstrations()
        train, marks = held_out, held_out.episode_fingerprints()
        if o.train or o.train_split:
            train = open_episodes(
                learned[0], Path(scratch) / "train", learned[1]
            ).select_demonstrations()
            if both := len({*marks} & {*train.episode_fingerprints()}):
                raise SpearError(
                    f"--split {o.split}: {both} of them also in --train-split {learned[1]}"
                )
        if both := len({*marks} & {*read_provenance(locate(o.policy)).get("learned", "").split()}):
            notice(
                f"{o.policy} was trained on held-out episodes, {both} of {len(marks)}: hold others out"
            )
        ours = open_loop.score_policy(o.policy, model, held_out)
        horizon = model.model.config.horizon
        reference = open_loop.score_mean_action(train, held_out, horizon)
        scores = (ours, reference, open_loop.score_last_action(held_out, horizon))
    summaries = [score.summarize() for score in scores]
    rows = [[format_count(len(held_out), "held-out episodes"), *(s.name[-26:] for s in scores)]]
    rows += [
        [name.replace("_", " "), *(s[name].to_text(".3f") for s in summaries)]
        for name in summaries[0]
    ]
    for head, *cells in rows:
        print(f"{head:<24}" + "".join(f"{cell:<28}" for cell in cells).rstrip())
    if o.plot:
        write_text(o.plot, open_loop_page(ours, reference))
        print(f"page: {o.plot}")


class EvaluateVqaOptions(Options):
    model: Annotated[Positional[ModelName], arg(metavar="MODEL")]
    questions: Annotated[Positional[str], arg(metavar="QUESTIONS")]
    """A folder of labelled images that `spear label` wrote, of which questions are made; or sim, for scenes
    of the built-in simulator that nothing is trained on (sim:SEED begins with that one)."""
    images: Annotated[int, Range(1)] = 300
    """At most so many images; of a folder, spread evenly over it."""
    asked: QuestionOptions = field(default_factory=QuestionOptions)
    device: Device = "auto"
    dtype: Dtype = "float32"
    out: Path = Path("runs/evaluate-vqa")
    """Folder for the results of this model and these questions."""
    calibrate: bool = False
    """Also write calibration.json beside the model's weights, from which `spear ask` says how sure an answer
    is, and what is not in the picture. Evaluate on other images than those."""


def evaluate_vqa(options: EvaluateVqaOptions) -> None:
    """Measure what SPEAR-VLM knows in 3D: ask it about labelled images that it has not seen.

    Prints, per kind of question, how far off the answers are, beside a constant guess and one that knows only
    how far away the scene is; how well boxes overlap; which way of reading numbers off the model's
    probabilities is best; and how well these are calibrated. Writes OUT/scores.json and a page, index.html.

    Examples:
        spear evaluate vqa nano-vlm sim --images 100
        spear evaluate vqa runs/nano-vlm-2 runs/labels-held-out --decode mode --out runs/vqa
        spear evaluate vqa runs/nano-vlm-2 sim:1000 --images 200 --calibrate --out runs/calibrated
    """
    from spear.evaluate.vqa import run
    from spear.evaluate.vqa.ask import load_labeled_images
    from spear.evaluate.vqa.calibration import CALIBRATION_FILE, Trust
    from spear.labels.inputs import hash_content
    from spear.models.weights.folders import read_provenance
    from spear.policy import load_vlm, locate
    from spear.report.vqa import vqa_page

    o, asked = options, options.asked
    if o.calibrate and (asked.families or asked.view != "external"):
        raise SpearError(
            "--calibrate: for all that `spear ask` may be asked: leave out --families, --view"
        )
    check_no_foreign_files(o.out, "scores.json", "evaluate")
    file = o.out / "scores.json"
    check_writable(file)
    if o.calibrate:
        check_writable(locate(o.model) / CALIBRATION_FILE)
    about = {f"--{key}": value for key, value in vars(asked).items() if key != "batch"}
    about |= {"model": o.model, "questions": o.questions, "--images": o.images}
    there = read_json(file, "remove it, or give another --out") if file.is_file() else about
    if others := describe_difference({key: there.get(key) for key in about}, about):
        raise SpearError(f"{file}: these are other scores: {others}: give another --out")
    bundle = load_vlm(o.model, o.device, o.dtype)
    labels = load_labeled_images(o.questions, o.images, asked.view, bundle.processor)
    if o.calibrate and len(labels) < 100:
        raise SpearError(
            f"--calibrate: too few images ({len(labels)}): take at least 100 (--images)"
        )
    learned = {*read_provenance(locate(o.model)).get("learned", "").split()}
    if both := sum(hash_content(label.image) in learned for label in labels):
        notice(f"{o.model} was trained on these images, {both} of {len(labels)}: hold others out")
    trust = None if o.calibrate else Trust.load(locate(o.model))
    scores = run.evaluate_vqa(bundle, labels, asked, trust)
    scores.save(file, about)
    write_text(o.out / "index.html", vqa_page(scores, o.model, o.questions))
    show(*scores.tables())
    print(f"page: {o.out / 'index.html'}")
    if o.calibrate:
        kept = run.measure_trust(bundle, labels, scores, o.questions).save(locate(o.model))
        print(f"calibration: {kept}")


class CompareOptions(Options):
    first: Annotated[Positional[Path], arg(metavar="A")]
    """Folder that spear evaluate wrote (or its results.json)."""
    second: Annotated[Positional[Path], arg(metavar="B")]
    """The folder (or results.json) to compare with."""
    out: OptionalFile = None
    """Also write an HTML page with plots, and films of the same scenes side by side."""
    films: Annotated[int, Range(0)] = 12
    """At most so many pairs of films on the page; scenes that only one of the two solved come first. Of
    all scenes there are films where both were evaluated with --films all."""


def compare(options: CompareOptions) -> None:
    """Say which of two evaluated policies is better, on the scenes that both have seen.

    Prints both success rates per task family, and the difference (A minus B, in percentage points) with 95 %
    interval and p-value, which is below 0.05 exactly where the interval leaves out zero.

    Examples:
        spear evaluate compare runs/mine runs/evaluate
        spear evaluate compare runs/mine runs/evaluate --out compare.html
    """
    from spear.evaluate.compare import compare_results as pair_up
    from spear.report.comparison import comparison_page

    first, second = options.first, options.second
    results = load_results(first), load_results(second)
    one, other = (given if given.is_dir() else given.parent for given in (first, second))
    if one.resolve() == other.resolve():
        raise SpearError(f"{first} and {second}: are the same results: name two that differ")
    same = results[0].policy == results[1].policy
    comparison = pair_up(*results, names=(str(first), str(second)) if same else None)
    show(comparison.to_table())
    print(comparison.verdict())
    for setting in comparison.settings:
        print(f"run differently: {setting}")
    if comparison.unshared:
        print(
            f"left out: {format_count(comparison.unshared, 'episodes')} whose scene only one of the two saw"
        )
    ours = list(zip((comparison.first, comparison.second), results, strict=True))
    published = find_matching_references(results[0])
    for table in published:
        show(table.to_table(ours))
    if options.out:
        write_text(
            options.out, comparison_page(comparison, (one, other), options.films, published, ours)
        )
        print(f"page: {options.out}")


def reference() -> None:
    """Show the numbers that the SPEAR-1 paper published.

    They are theirs, not measured here. `spear evaluate` shows them beside results on the same tasks.

    Example:
        spear evaluate reference
    """
    show(*(table.to_table() for table in load_references().values()))


def _report(name: str, out: Path | None, ran: int) -> None:
    """Write results.json into a folder, and print all its results (`ran`: those asked for now)."""
    assert out is not None
    results = load_results(out)
    results.save(out / "results.json")
    show(
        results.to_table(),
        *(table.to_table([(name, results)]) for table in find_matching_references(results)),
    )
    more = len(results.outcomes) - ran
    among = f", {format_count(more, 'episodes')} of other commands among them" if more else ""
    print(f"results in {out}{among}")
