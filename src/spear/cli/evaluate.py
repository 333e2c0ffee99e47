"""Evaluating policies and SPEAR-VLMs, and comparing the results of two policies."""

from collections.abc import Iterable, Sequence
from dataclasses import field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

from rich import print as print_table
from tyro.conf import Positional, arg

from spear.cli.data import open_or_prepare_episodes, parse_usable_split
from spear.errors import SpearError, escape_control_characters, format_count, notice
from spear.evaluate.compare import find_published_tables_of_same_tasks, load_published_tables
from spear.evaluate.options import (
    AgentOptions,
    LiberoOptions,
    QuestionOptions,
    SimplerOptions,
    TabletopOptions,
)
from spear.evaluate.results import load_results
from spear.util.files import check_empty_or_own_folder, check_writable, read_json, write_text
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

if TYPE_CHECKING:
    from spear.data.store.episode_store import EpisodeStore
    from spear.evaluate.open_loop import OpenLoopErrors
    from spear.evaluate.shift_suite import ShiftResult
    from spear.evaluate.vqa.scores import Scores
    from spear.policy import VlmBundle
    from spear.types import LabeledImage

MIN_CALIBRATION_IMAGES = 100  # number of images that --calibrate needs (our choice)
KEY_OF_RENAMED_OPTION = {
    "--questions-per-image": "--per_image",
    "--question-types": "--families",
    "--model": "model",
    "--labels": "questions",
    "--num-images": "--images",
}
"""Option of `spear evaluate vqa` that was renamed -> its key in scores.json, a former name."""


class EvaluateOptions(Options):
    agent: AgentOptions = field(default_factory=AgentOptions)
    loop: TabletopOptions = field(
        default_factory=lambda: TabletopOptions(videos=1, out=Path("runs/evaluate"))
    )


def evaluate(options: EvaluateOptions) -> None:
    """Let a policy act in simulated scenes it has never seen, and count its successes.

    Prints success per task family with 95 % intervals; writes OUT/results.json and films of
    successes and failures. Outcomes are written as they come: the same command continues an
    evaluation that was stopped, and one with more --num-scenes adds to it.

    With --shift all, the same scenes are evaluated as they are and with every shift: camera, light,
    background, layout, robot, language and noise, each at three levels.

    Examples:
        spear evaluate --policy nano --num-scenes 200
        spear evaluate --policy nano --num-scenes 25 --shift all --out runs/shifts
        spear evaluate --policy runs/my_policy --tasks stack_cube --out runs/mine
        spear evaluate --policy nano --shard 2/5 --videos failures
    """
    from spear.evaluate.agents import load_agent
    from spear.evaluate.closed_loop import evaluate_tabletop

    agent = load_agent(**vars(options.agent))
    if options.loop.shift == "all":
        from spear.evaluate.shift_suite import evaluate_shifts

        shift_results = evaluate_shifts(
            lambda shifted: evaluate_tabletop(agent, shifted)[0], options.loop
        )
        _report_shifts(shift_results, options.agent.policy, options.loop.out)
        return
    results, _ = evaluate_tabletop(agent, options.loop)
    _save_and_print_results(options.agent.policy, options.loop.out, len(results.outcomes))


def _report_shifts(shift_results: "Iterable[ShiftResult]", policy: str, out: Path | None) -> None:
    """Print each result as it comes, then one table, and write a page with one figure."""
    from spear.evaluate.shift_suite import build_shift_table
    from spear.report.shifts import write_shifted_success_page

    assert out is not None
    results = []
    for result in shift_results:
        results.append(result)
        success = result.success.to_text(".0f", scale=100, unit=" %")
        print(f"{result.name}: {success}", flush=True)
    print_table(build_shift_table(results, policy))
    page = out / "shifts.html"
    write_shifted_success_page(results, policy, page)
    print(f"open {page.resolve()}")


class EvaluateSimplerOptions(Options):
    agent: AgentOptions = field(default_factory=AgentOptions)
    loop: SimplerOptions = field(
        default_factory=lambda: SimplerOptions(videos=1, out=Path("runs/simpler"))
    )


def evaluate_simpler(options: EvaluateSimplerOptions) -> None:
    """Let a policy act in SIMPLER's four WidowX tasks (ManiSkill 3), and count its successes.

    Needs pip install 'spear-vla[simpler]', ManiSkill's assets and a Vulkan driver: see
    docs/howto/simpler.md. Prints success per task with 95 % intervals and the paper's numbers;
    writes OUT/results.json and films. The same command continues an evaluation that was stopped.

    With --shift all, the same scenes are evaluated as they are and with every shift that SIMPLER
    can have: camera, light, background, language and noise, each at three levels.

    Examples:
        spear evaluate simpler --policy runs/my_policy
        spear evaluate simpler --policy runs/my_policy --shift all --num-scenes 24 --out runs/shifts
        spear evaluate simpler --policy oracle --tasks PutCarrotOnPlateInScene-v1 --out runs/oracle
    """
    from spear.evaluate.agents import load_agent
    from spear.evaluate.simpler import run

    if options.agent.policy == "expert":
        raise SpearError(
            "--policy expert knows only the embedded simulator. Give --policy oracle for SIMPLER."
        )
    # The oracle of SIMPLER needs no weights. With other agent options `load_agent` decides.
    is_plain_oracle = options.agent == AgentOptions(policy="oracle")
    agent = run.OracleAgent() if is_plain_oracle else load_agent(**vars(options.agent))
    if options.loop.shift == "all":
        from spear.evaluate.shift_suite import evaluate_shifts
        from spear.evaluate.simpler.shifts import SIMPLER_AXES, select_shiftable_tasks

        # The same tasks with every shift, so that their mean success can be compared.
        tasks = select_shiftable_tasks(options.loop.tasks, "all")
        shift_results = evaluate_shifts(
            lambda shifted: run.evaluate_simpler(agent, shifted)[0],
            replace(options.loop, tasks=tasks),
            SIMPLER_AXES,
        )
        _report_shifts(shift_results, options.agent.policy, options.loop.out)
        return
    results, _ = run.evaluate_simpler(agent, options.loop)
    _save_and_print_results(options.agent.policy, options.loop.out, len(results.outcomes))


class EvaluateLiberoOptions(Options):
    agent: AgentOptions = field(default_factory=AgentOptions)
    loop: LiberoOptions = field(
        default_factory=lambda: LiberoOptions(videos=1, out=Path("runs/libero"))
    )
    setup: bool = False
    """Set up LIBERO's Python environment (2.1 GB), and do nothing else."""


def evaluate_libero(options: EvaluateLiberoOptions) -> None:
    """Let a policy act in LIBERO's tasks, and count its successes.

    LIBERO runs in a separate Python environment, which --setup makes once: see
    docs/howto/libero.md. Prints success per task and suite with 95 % intervals; writes
    OUT/results.json and films. The same command continues an evaluation that was stopped.

    Examples:
        spear evaluate libero --setup
        spear evaluate libero --policy oracle --suites libero_object --num-scenes 2
        spear evaluate libero --policy runs/my_policy --suites libero_spatial libero_goal_swap
    """
    from spear.evaluate.libero import environment

    if options.setup:
        print(f"LIBERO is ready in {environment.install_in_folder()}")
        return
    environment.resolve_python()  # a missing one is reported before weights are loaded

    from spear.evaluate.agents import load_agent
    from spear.evaluate.libero import run

    if options.agent.policy == "expert":
        raise SpearError(
            "--policy expert knows only the embedded simulator. Give --policy oracle for LIBERO."
        )
    is_plain_oracle = options.agent == AgentOptions(policy="oracle")
    agent = run.OracleAgent() if is_plain_oracle else load_agent(**vars(options.agent))
    results, _ = run.evaluate_libero(agent, options.loop)
    _save_and_print_results(options.agent.policy, options.loop.out, len(results.outcomes))
    for suite, success in run.summarize_suites(results).items():
        print(f"{suite}: {success.to_text('.1f', scale=100, unit=' %')}")


class EvaluateDataOptions(Options):
    policy: PolicyName
    episodes: Annotated[Path, arg(metavar="FOLDER")]
    """Folder of held-out episodes, in any format (see `spear data inspect`)."""
    split: str = "train"
    """Which of its episodes are held out: train, val, train[90%:] …"""
    train: OptionalFolder = None
    """Folder of the training episodes, whose mean action is a baseline. Default: the same folder
    with --train-split, otherwise the held-out episodes."""
    train_split: OptionalName = None
    """Which of the training folder's episodes were trained on."""
    report: OptionalFile = None
    """Write a page with plots of predicted and true actions to this file."""
    device: Device = "auto"
    dtype: Dtype = "float32"
    norm_stats: DatasetName = None


def evaluate_data(options: EvaluateDataOptions) -> None:
    """Compare a policy's actions with a demonstrator's, on recorded episodes (no robot needed).

    Prints the errors, with 95 % intervals over episodes, and those of two baselines that ignore the
    observation: always the mean action, and the last action repeated.

    Examples:
        spear evaluate data --policy runs/my_robot --episodes runs/held_out --report errors.html
        spear evaluate data --policy runs/mine --episodes my_dataset --split "train[90%:]"
    """
    from spear.data.frames import merge_frame_versions
    from spear.evaluate import open_loop
    from spear.policy import Spear1Policy
    from spear.report.comparison import make_open_loop_page

    # Find mistakes in the options before loading the weights and preparing the data.
    train_folder, train_split = _choose_training_folder_and_split(options)
    _check_splits_are_disjoint(options, train_folder, train_split)
    policy = Spear1Policy.load(
        options.policy, options.device, dataset=options.norm_stats, dtype=options.dtype
    )
    policy.truncate_instructions = True  # training truncated long instructions, too

    with TemporaryDirectory() as scratch:
        held_out_store = open_or_prepare_episodes(
            options.episodes, Path(scratch) / "held-out", options.split
        )
        held_out_frames = (str(options.episodes), held_out_store.frame_versions)
        # Raises an error if the policy learned another version of the robot's frames.
        merge_frame_versions([(options.policy, policy.frames or {}), held_out_frames])
        held_out = held_out_store.drop_failed_episodes()
        training = held_out  # without training episodes, the baselines are fitted to these
        if options.train or options.train_split:
            training_store = open_or_prepare_episodes(
                train_folder, Path(scratch) / "train", train_split
            )
            training = training_store.drop_failed_episodes()
            _check_episodes_are_disjoint(options, held_out, training, train_split)
        _notice_learned_episodes(options.policy, held_out)

        horizon = policy.model.config.horizon
        policy_errors = open_loop.measure_policy_errors(options.policy, policy, held_out)
        mean_action_errors = open_loop.measure_constant_mean_action_errors(
            training, held_out, horizon
        )
        last_action_errors = open_loop.measure_repeated_action_errors(held_out, horizon)

    _print_open_loop_errors(
        [policy_errors, mean_action_errors, last_action_errors], num_episodes=len(held_out)
    )
    if options.report:
        write_text(options.report, make_open_loop_page(policy_errors, mean_action_errors))
        print(f"page: {options.report}")


def _choose_training_folder_and_split(options: EvaluateDataOptions) -> tuple[Path, str]:
    """Return the folder and the split of the episodes whose mean action is a baseline.

    Without --train the folder is that of the held-out episodes, and without --train-split the split
    is theirs, too.
    """
    folder = options.train or options.episodes
    default_split = "train" if options.train else options.split
    return folder, options.train_split or default_split


def _check_splits_are_disjoint(
    options: EvaluateDataOptions, train_folder: Path, train_split: str
) -> None:
    """Check that both folders have the splits, and that splits of one folder do not overlap."""
    from spear.data.readers.splits import count_shared_episodes

    held_out_ranges = parse_usable_split(options.episodes, options.split)
    train_ranges = parse_usable_split(train_folder, train_split)
    has_own_training_episodes = options.train or options.train_split
    if not has_own_training_episodes:  # the baseline is fitted to the held-out episodes
        return
    if train_folder.resolve() != options.episodes.resolve():
        return
    num_shared = count_shared_episodes(held_out_ranges, train_ranges)
    if num_shared:
        raise SpearError(_describe_shared_episodes(options, train_split, num_shared))


def _check_episodes_are_disjoint(
    options: EvaluateDataOptions,
    held_out: "EpisodeStore",
    training: "EpisodeStore",
    train_split: str,
) -> None:
    """Check that no episode is in both stores, also if their folders differ."""
    shared = {*held_out.list_episode_fingerprints()} & {*training.list_episode_fingerprints()}
    if shared:
        raise SpearError(_describe_shared_episodes(options, train_split, len(shared)))


def _describe_shared_episodes(
    options: EvaluateDataOptions, train_split: str, num_shared: int
) -> str:
    """Return the message for held-out episodes that are also training episodes."""
    return (
        f"{num_shared} of the episodes are in both --split {options.split} and --train-split "
        f"{train_split}. Hold other episodes out."
    )


def _notice_learned_episodes(policy: str, held_out: "EpisodeStore") -> None:
    """Give a notice if the policy was trained on held-out episodes."""
    fingerprints = set(held_out.list_episode_fingerprints())
    num_learned = len(fingerprints & _read_learned_fingerprints(policy))
    if num_learned:
        notice(
            f"{policy} was trained on {num_learned} of {len(fingerprints)} held-out episodes. "
            "Hold other episodes out."
        )


def _read_learned_fingerprints(model: str) -> set[str]:
    """Return the fingerprints of the images and episodes that a model was trained on."""
    from spear.models.weights.folders import read_provenance
    from spear.policy import locate_checkpoint

    return set(read_provenance(locate_checkpoint(model)).get("learned", "").split())


def _print_open_loop_errors(scores: "Sequence[OpenLoopErrors]", num_episodes: int) -> None:
    """Print a table: a row per kind of error, a column per policy."""
    summaries = [score.estimate_mean_errors() for score in scores]
    # A column has 28 characters. Long names are paths of policies, which differ at their ends.
    names = [score.name[-26:] for score in scores]
    rows = [(format_count(num_episodes, "held-out episodes"), names)]
    for error_name in summaries[0]:
        cells = [summary[error_name].to_text(".3f") for summary in summaries]
        rows.append((error_name.replace("_", " "), cells))
    for title, cells in rows:
        columns = "".join(f"{cell:<28}" for cell in cells)
        print(f"{title:<24}{columns.rstrip()}")


class EvaluateVqaOptions(Options):
    model: ModelName
    labels: Annotated[str, arg(metavar="FOLDER|sim")]
    """A folder of labeled images that `spear label` wrote, from which questions are made; or sim,
    for scenes of the built-in simulator that nothing is trained on (sim:SEED begins with the scene
    of that seed)."""
    num_images: Annotated[int, Range(1)] = 300
    """Maximum number of images; of a folder, they are spread evenly over it."""
    query: QuestionOptions = field(default_factory=QuestionOptions)
    device: Device = "auto"
    dtype: Dtype = "float32"
    out: Path = Path("runs/evaluate-vqa")
    """Write the results of this model and these questions to this folder."""
    shift: Annotated[str | None, arg(metavar="AXIS[:LEVEL]")] = None
    """With --labels sim: shift the scenes along one axis, camera, light, background, layout, robot
    or noise, by level 1, 2 (default) or 3; or all, for every axis and level."""
    calibrate: bool = False
    """Also write calibration.json beside the model's weights, from which `spear ask` says how
    certain an answer is, and what is not in the picture. Evaluate on other images afterwards."""


def evaluate_vqa(options: EvaluateVqaOptions) -> None:
    """Measure what SPEAR-VLM knows in 3D: ask it about labeled images that it has not seen.

    Prints, per question type, how far off the answers are, compared with a constant guess and with
    one that knows only how far away the scene is; how well boxes overlap; which way of reading
    numbers from the model's probabilities is best; and how well these are calibrated. Writes
    OUT/scores.json and a page, index.html.

    With --shift all, the same scenes are asked about as they are and with every shift of the
    pictures, and a table and shifts.html compare the errors. The same command continues.

    Examples:
        spear evaluate vqa --model nano-vlm --labels sim --num-images 100
        spear evaluate vqa --model runs/nano-vlm-2 --labels runs/labels-held-out --decode mode
        spear evaluate vqa --model runs/nano-vlm-2 --labels sim:1000 --num-images 200 --calibrate
        spear evaluate vqa --model nano-vlm --labels sim --shift all --num-images 100 --out shifts
    """
    from spear.policy import load_vlm

    if options.shift == "all":
        _evaluate_vqa_shifts(options)
        return
    _check_vqa_run(options)
    bundle = load_vlm(options.model, options.device, options.dtype)
    labels, scores = _ask_and_save(options, bundle)
    for table in scores.tables():
        print_table(table)
    print(f"page: {options.out / 'index.html'}")
    if options.calibrate:
        from spear.evaluate.vqa import run
        from spear.policy import locate_checkpoint

        measured_trust = run.measure_trust(bundle, labels, scores, options.labels)
        print(f"calibration: {measured_trust.save(locate_checkpoint(options.model))}")


def _evaluate_vqa_shifts(options: EvaluateVqaOptions) -> None:
    """Ask about the scenes with every shift, print one table, and write a page with one figure."""
    from spear.evaluate.shift_suite import list_shifts, name_folder
    from spear.evaluate.vqa.shift_suite import (
        PICTURE_AXES,
        build_error_table,
        read_shifted_errors,
    )
    from spear.policy import load_vlm
    from spear.report.shifts import write_shifted_errors_page

    shifts = list_shifts(PICTURE_AXES)
    shifted_options = []  # one per shift
    for shift in shifts:
        shift_text = None if shift is None else str(shift)
        out = options.out / name_folder(shift)
        shifted_options.append(replace(options, shift=shift_text, out=out))
    for shifted in shifted_options:
        _check_vqa_run(shifted)

    bundle = load_vlm(options.model, options.device, options.dtype)
    results = []
    for shift, shifted in zip(shifts, shifted_options, strict=True):
        scores_file = shifted.out / "scores.json"
        if not scores_file.is_file():  # otherwise an earlier call has asked these questions
            print("no shift" if shift is None else f"shift {shift}", flush=True)
            _ask_and_save(shifted, bundle)
        content = read_json(scores_file, advice="remove it, and run the same command again")
        results.append(read_shifted_errors(shift, content))
    print_table(build_error_table(results, options.model))
    page = options.out / "shifts.html"
    write_shifted_errors_page(results, options.model, page)
    print(f"page: {page}")


def _ask_and_save(
    options: EvaluateVqaOptions, bundle: "VlmBundle"
) -> "tuple[list[LabeledImage], Scores]":
    """Ask the questions, and write their scores and a page.

    Returns:
        The labeled images, and the scores.
    """
    from spear.evaluate.vqa import run
    from spear.evaluate.vqa.ask import load_or_render_labeled_images
    from spear.evaluate.vqa.calibration import Trust
    from spear.evaluate.vqa.shift_suite import parse_picture_shift
    from spear.policy import locate_checkpoint
    from spear.report.vqa import make_vqa_page

    labels = load_or_render_labeled_images(
        options.labels,
        options.num_images,
        options.query.view,
        bundle.processor,
        None if options.shift is None else parse_picture_shift(options.shift),
    )
    if options.calibrate and len(labels) < MIN_CALIBRATION_IMAGES:
        raise SpearError(
            f"--calibrate needs at least {MIN_CALIBRATION_IMAGES} images, and there are "
            f"{len(labels)}. Give more with --num-images."
        )
    _notice_learned_images(options.model, labels)
    # The calibration that an earlier run measured. A run that measures it must not apply one.
    trust = None if options.calibrate else Trust.load(locate_checkpoint(options.model))
    scores = run.evaluate_vqa(bundle, labels, options.query, trust)

    scores.save_without_answers(options.out / "scores.json", _collect_vqa_settings(options))
    asked_about = options.labels if options.shift is None else f"{options.labels}, {options.shift}"
    page = make_vqa_page(scores, options.model, asked_about)
    write_text(options.out / "index.html", page)
    return labels, scores


def _collect_vqa_settings(options: EvaluateVqaOptions) -> dict[str, Any]:
    """Return the settings that the scores depend on, by their keys in scores.json."""
    from spear.evaluate.vqa.shift_suite import parse_picture_shift

    value_of_option = {
        "--questions-per-image": options.query.questions_per_image,
        "--question-types": options.query.question_types,
        "--decode": options.query.decode,
        "--seed": options.query.seed,
        "--view": options.query.view,
        "--model": options.model,
        "--labels": options.labels,
        "--num-images": options.num_images,
    }
    if options.shift is not None:
        value_of_option["--shift"] = str(parse_picture_shift(options.shift))
    return {
        KEY_OF_RENAMED_OPTION.get(option, option): value
        for option, value in value_of_option.items()
    }


def _check_vqa_run(options: EvaluateVqaOptions) -> None:
    """Check that the options agree, and that the folder is writable and has no other scores."""
    from spear.evaluate.vqa.ask import is_simulator
    from spear.evaluate.vqa.calibration import CALIBRATION_FILE
    from spear.policy import locate_checkpoint

    scores_file = options.out / "scores.json"
    settings = _collect_vqa_settings(options)
    if options.shift is not None and not is_simulator(options.labels):
        raise SpearError(
            f"--shift needs scenes of the built-in simulator, and --labels {options.labels} is a "
            "folder. Give --labels sim."
        )
    if options.shift is not None and options.calibrate:
        raise SpearError("--calibrate measures trust in scenes as they are. Leave out --shift.")
    if options.calibrate and (options.query.question_types or options.query.view != "external"):
        raise SpearError(
            "--calibrate measures everything that `spear ask` may be asked. Leave out "
            "--question-types and --view."
        )
    check_empty_or_own_folder(options.out, "scores.json", action="evaluate")
    check_writable(scores_file)
    if options.calibrate:
        check_writable(locate_checkpoint(options.model) / CALIBRATION_FILE)
    if not scores_file.is_file():
        return

    # Compare with the settings of the scores in the folder. In both, some keys are former names of
    # options. The message names the options as they are called today.
    recorded_scores = read_json(scores_file, advice="remove it, or give another --out")
    option_of_key = {key: option for option, key in KEY_OF_RENAMED_OPTION.items()}
    recorded_values = {option_of_key.get(key, key): recorded_scores.get(key) for key in settings}
    values = {option_of_key.get(key, key): value for key, value in settings.items()}
    differences = describe_difference(recorded_values, values)
    if differences:
        raise SpearError(
            f"{scores_file} contains other scores ({differences}). Give another --out."
        )


def _notice_learned_images(model: str, labels: "Sequence[LabeledImage]") -> None:
    """Give a notice if the model was trained on some of the images."""
    from spear.labels.inputs import hash_content

    learned_fingerprints = _read_learned_fingerprints(model)
    num_learned = sum(hash_content(label.image) in learned_fingerprints for label in labels)
    if num_learned:
        notice(
            f"{model} was trained on {num_learned} of {len(labels)} evaluated images. Hold other "
            "images out."
        )


class CompareOptions(Options):
    first: Annotated[Positional[Path], arg(metavar="A")]
    """Folder that spear evaluate wrote (or its results.json)."""
    second: Annotated[Positional[Path], arg(metavar="B")]
    """Folder (or results.json) to compare with."""
    report: OptionalFile = None
    """Also write an HTML page with plots, and films of the same scenes side by side."""
    videos: Annotated[int, Range(0)] = 12
    """Maximum number of pairs of films on the page; scenes that only one of the two solved come
    first. All scenes have films if both were evaluated with --videos all."""


def compare(options: CompareOptions) -> None:
    """Say which of two evaluated policies is better, on the scenes that both have seen.

    Prints both success rates per task family, and the difference (A minus B, in percentage points)
    with its 95 % interval and p-value, which is below 0.05 exactly if the interval excludes zero.

    Examples:
        spear evaluate compare runs/mine runs/evaluate
        spear evaluate compare runs/mine runs/evaluate --report compare.html
    """
    from spear.evaluate.compare import compare_results
    from spear.report.comparison import make_comparison_page

    first = load_results(options.first)
    second = load_results(options.second)
    folders = (_get_result_folder(options.first), _get_result_folder(options.second))
    if folders[0].resolve() == folders[1].resolve():
        raise SpearError(
            f"{options.first} and {options.second} are the same results. Give two that differ."
        )

    names = None
    if first.policy == second.policy:  # only the folders tell the two results apart
        names = (str(options.first), str(options.second))
    comparison = compare_results(first, second, names=names)
    print_table(comparison.to_table())
    print(escape_control_characters(comparison.verdict(), keep_newlines=True))
    for setting in comparison.settings:
        print(f"run differently: {escape_control_characters(setting)}")
    if comparison.num_unshared:
        unshared_count = format_count(comparison.num_unshared, "episodes")
        print(f"not compared: {unshared_count} whose scene only one of the two saw")

    named_results = [(comparison.first_name, first), (comparison.second_name, second)]
    published_tables = find_published_tables_of_same_tasks(first)
    for published_table in published_tables:
        print_table(published_table.to_table(named_results))
    if options.report:
        page = make_comparison_page(
            comparison, folders, options.videos, published_tables, named_results
        )
        write_text(options.report, page)
        print(f"page: {options.report}")


def _get_result_folder(results: Path) -> Path:
    """Return the folder of results, which may be given as the file in it."""
    return results if results.is_dir() else results.parent


def reference() -> None:
    """Show the numbers that the SPEAR-1 paper published.

    They were not measured with this package. `spear evaluate` shows them together with results on
    the same tasks.

    Example:
        spear evaluate reference
    """
    for table in load_published_tables().values():
        print_table(table.to_table())


def _save_and_print_results(policy: str, out: Path | None, num_requested: int) -> None:
    """Write results.json into the folder `out`, and print all results in it.

    Args:
        policy: the evaluated policy.
        out: the folder, which may also have results of earlier commands.
        num_requested: how many of the folder's episodes this command asked for.
    """
    assert out is not None
    results = load_results(out)
    results.save(out / "results.json")
    print_table(results.to_table())
    for table in find_published_tables_of_same_tasks(results):
        print_table(table.to_table([(policy, results)]))
    num_others = len(results.outcomes) - num_requested
    note = ""
    if num_others:
        note = f", including {format_count(num_others, 'episodes')} of other commands"
    print(f"results in {out}{note}")
