"""The commands `ask`, `record`, `record simpler`, `demo` and `doctor`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from spear.errors import (
    UnansweredError,
    check_known,
    escape_control_characters,
    format_count,
    notice,
)
from spear.evaluate.options import DecodeOption
from spear.question_types import QUESTION_TYPES
from spear.util.files import write_bytes, write_text
from spear.util.options import (
    CameraView,
    Device,
    Dtype,
    ModelName,
    OptionalFile,
    OptionalFolder,
    OptionalName,
    Options,
    Preset,
    Range,
    RarelyUsed,
)

if TYPE_CHECKING:
    from spear.doctor import InferenceResult
    from spear.sim.record import InterveningPolicy
    from spear.types import Frame

MAIN_VIEW = "external"  # a model's certainty is measured only on images of this camera


class AskOptions(Options):
    image: Annotated[Positional[str], arg(metavar="IMAGE")]
    """A JPEG or PNG file, or sim:SEED for a scene of the built-in simulator."""
    question: Annotated[Positional[str], arg(metavar="QUESTION")]
    """What to ask, in words."""
    model: ModelName = "nano-vlm"
    question_type: Annotated[str | None, arg(metavar=f"{{{','.join(QUESTION_TYPES)}}}")] = None
    """Type that fixes the form of the answer. Default: the type that the words of the question
    say."""
    free: bool = False
    """Also answer questions that the model was not taught, with whatever it finds most likely."""
    view: CameraView = MAIN_VIEW
    """Camera that took the image."""
    decode: DecodeOption = "median"
    """How numbers are read from the model's probabilities; the interval is around the median."""
    save_image: OptionalFile = None
    """Save the image with the answer's box drawn on it (for sim: images, whose camera is known)."""
    device: Device = "auto"
    dtype: Dtype = "float32"


def ask(options: AskOptions) -> None:
    """Ask SPEAR-VLM a 3D question about an image.

    Numbers in the answer are meters in the camera frame (for a model of relative labels, their
    unit): x to the right, y down, z forward. A calibrated model adds the interval that contained
    80 % of the true values. The command exits with code 3 if the model was not taught to answer
    such a question, or if a calibrated model does not see the object.

    Examples:
        spear ask photo.jpg "How far away is the mug?"
        spear ask sim:7 "Provide the 3D bounding box of the cucumber" --save-image box.png
    """
    from spear.evaluate.vqa.ask import AskSettings, ask_question, load_or_render_picture
    from spear.evaluate.vqa.calibration import Trust
    from spear.models.weights.folders import is_simulator_only, read_taught_question_types
    from spear.policy import load_vlm, locate_checkpoint
    from spear.util.images import get_image_format

    folder = locate_checkpoint(options.model)
    if options.save_image:
        get_image_format(str(options.save_image))  # refuses an unknown format before the work
    bundle = load_vlm(options.model, options.device, options.dtype)
    check_known("view", bundle.processor.image_sizes, options.view)
    size = bundle.processor.image_sizes[options.view]
    picture = load_or_render_picture(options.image, size, options.view)

    # How far the model's probabilities can be trusted; None if this was not measured.
    trust = Trust.load(folder) if options.view == MAIN_VIEW else None
    settings = AskSettings(
        decode=options.decode,
        trust=trust,
        view=options.view,
        taught_types=read_taught_question_types(folder),
        is_free=options.free,
    )
    answer, reply = ask_question(
        bundle, picture.image, options.question, options.question_type, settings
    )
    if answer is None:
        is_absent = "not in the picture" in reply
        advice = "" if is_absent else " Add --free for whatever it finds most likely."
        raise UnansweredError(f"{reply}.{advice}")
    print(escape_control_characters(reply, keep_newlines=True))

    if trust is None and options.view == MAIN_VIEW:
        notice(
            "how certain this answer is was not measured. "
            f"`spear evaluate vqa --model {options.model} --labels sim --calibrate` does it."
        )
    if not options.image.startswith("sim:") and is_simulator_only(folder):
        notice(
            f"{options.model} has seen nothing but the built-in simulator. Do not expect a "
            "meaningful answer about a photo."
        )
    if options.save_image:
        _save_drawn_answer(answer, picture, options.save_image)


def _save_drawn_answer(answer: Any, picture: "Frame", file: Path) -> None:
    """Save the picture with the answer's box drawn on it."""
    if answer is None:
        notice(f"{file} is not written, because there is no answer to draw.")
        return
    from spear.report.draw import draw_answer_enlarged
    from spear.util.images import encode_image_file

    drawing = draw_answer_enlarged(
        answer.segments, picture.image, picture.intrinsics, answer.question_type
    )
    write_bytes(file, encode_image_file(drawing, str(file)))


class DemonstrationOptions(Options):
    """The options of recording demonstrations that are the same in every simulator."""

    out: Path = Path("runs/episodes")
    """Write to this folder."""
    num_episodes: Annotated[int, Range(1)] = 200
    """Number of demonstrations per task."""
    first_seed: int = 10_000
    """Record the scenes first-seed, first-seed + 1, … Those below 10000 are kept for testing."""
    preset: Annotated[Preset, RarelyUsed()] = "nano"
    """Model size to whose cameras the images are scaled."""
    workers: Annotated[int, Range(1, 1024)] = 2
    """Number of processes."""
    policy: OptionalName = None
    """Trained folder or shipped name of a policy that takes turns with the expert, which corrects
    its mistakes."""


class RecordOptions(DemonstrationOptions):
    tasks: tuple[str, ...] = ()
    """Task families; default: all."""
    world: str = "default"
    """Surroundings of the scenes: default, colorful, varied, wild, lab:N (laboratory number N),
    labs:K (the scenes are spread over K laboratories), colorful-lab:N or colorful-labs:K."""


def record(options: RecordOptions) -> None:
    """Record demonstrations of the scripted expert in the simulator, to train a policy on.

    Now and then the arm is pushed off course. The expert recovers, and the push itself is never a
    training target. Failed demonstrations are not written. Demonstrations are written 256 at a
    time: run the same command to continue after it was stopped, or with more --num-episodes to add
    some.

    Examples:
        spear record --num-episodes 3000 --out runs/episodes
        spear record --policy nano --first-seed 40000 --out runs/corrections
    """
    from spear.models.presets import get_preset
    from spear.sim_data.demonstrations import record_demonstrations

    num_written, num_tried = record_demonstrations(
        options.out,
        options.tasks,
        options.num_episodes,
        options.first_seed,
        get_preset(options.preset).image_sizes,
        options.workers,
        policy=_load_intervening_policy(options.policy),
        world=options.world,
    )
    _print_recorded(num_written, num_tried, options.out)


class RecordSimplerOptions(DemonstrationOptions):
    out: Path = Path("runs/simpler-episodes")
    """Write to this folder, which has a folder for each task."""
    tasks: tuple[str, ...] = ()
    """ManiSkill's names of the tasks; default: all four."""
    assets: OptionalFolder = None
    """ManiSkill's asset folder, if it is neither ~/.maniskill nor named by MS_ASSET_DIR."""


def record_simpler(options: RecordSimplerOptions) -> None:
    """Record demonstrations of SIMPLER's four WidowX tasks (ManiSkill 3), to train a policy on.

    A script that knows the true state (oracle) acts, as in spear record, from starts off the
    official grid. Those of seeds below 10000 are kept for evaluate simpler --off-grid. This command
    needs what spear evaluate simpler needs.

    Example:
        spear record simpler --num-episodes 80 --out runs/simpler-episodes
    """
    from spear.evaluate.simpler.record import record_demonstrations
    from spear.models.presets import get_preset

    _, height = get_preset(options.preset).image_sizes[MAIN_VIEW]
    progress_of_task = record_demonstrations(
        options.out,
        options.tasks,
        range(options.first_seed, options.first_seed + options.num_episodes),
        height,
        options.workers,
        options.assets,
        _load_intervening_policy(options.policy),
    )
    for task, (num_written, num_tried) in progress_of_task.items():
        _print_recorded(num_written, num_tried, options.out / task)


class RecordLiberoOptions(DemonstrationOptions):
    out: Path = Path("runs/libero-episodes")
    """Write to this folder, which has a folder for each task."""
    num_episodes: Annotated[int, Range(1)] = 50
    """Number of demonstrations per task."""
    suites: tuple[str, ...] = ("libero_spatial", "libero_object", "libero_goal")
    """Suites; those for which the scripted expert was written are the default."""
    tasks: tuple[int, ...] = ()
    """Numbers of the tasks of each suite, from 0. Default: all ten."""
    fast_rendering: bool = False
    """Render pictures without multisampling and reflections, of simplified meshes, several times as
    fast. They differ from the official ones."""


def record_libero(options: RecordLiberoOptions) -> None:
    """Record demonstrations of LIBERO's tasks, to train a policy on.

    A script that knows the true state (oracle) acts, as in spear record. Episodes begin in changed
    official states: objects are moved by up to 5 cm, at least one of them by more than 15 mm from
    where it is in any official state. This command needs what spear evaluate libero needs.

    Example:
        spear record libero --suites libero_object --num-episodes 50 --out runs/libero-episodes
    """
    from spear.evaluate.libero.record import RecordingSettings, record_demonstrations
    from spear.models.presets import get_preset

    settings = RecordingSettings(
        sizes=get_preset(options.preset).image_sizes,
        workers=options.workers,
        fast_rendering=options.fast_rendering,
        policy=_load_intervening_policy(options.policy),
    )
    progress_of_task = record_demonstrations(
        options.out,
        options.suites,
        options.tasks,
        range(options.first_seed, options.first_seed + options.num_episodes),
        settings,
    )
    for task, (num_written, num_tried) in progress_of_task.items():
        _print_recorded(num_written, num_tried, options.out / task)


def _print_recorded(num_written: int, num_tried: int, folder: Path) -> None:
    """Print how many of the demonstrations that were tried succeeded and were written."""
    print(f"{num_written} of {format_count(num_tried, 'demonstrations')} succeeded: {folder}")


def _load_intervening_policy(name: str | None) -> "InterveningPolicy | None":
    """Return the policy that takes turns with the expert; None if the user named none."""
    if name is None:
        return None
    from spear.evaluate.agents import predict_first_action
    from spear.policy import locate_checkpoint
    from spear.sim.record import InterveningPolicy

    return InterveningPolicy(locate_checkpoint(name), predict_first_action)


class DemoOptions(Options):
    out: Path = Path("runs/demo")
    """Write the page and its intermediate results to this folder."""
    data: OptionalFolder = None
    """Folder of real robot episodes (RLDS, LeRobot) to fine-tune on."""


def demo(options: DemoOptions) -> None:
    """Run the complete pipeline on small examples, and write an HTML report.

    Takes a few minutes on a laptop. The report shows images labeled in 3D, answers to 3D questions,
    the robot acting in the simulator, with films, and a fine-tuning on real robot episodes.

    Example:
        spear demo --out runs/demo --data bridge_dataset/1.0.0
    """
    from spear.demo import write_report

    print(f"open {write_report(options.out, options.data).resolve()}")


class DoctorOptions(Options):
    preset: Preset = "nano"
    """Model size: nano (the weights that come with this package), small or spear1 (random
    weights)."""
    device: Device = "auto"
    out: OptionalFile = Path("runs/doctor.html")
    """Write a page to this file; None writes none."""
    checkpoint: OptionalFolder = None
    """Instead of this machine, examine the settings of another project's SPEAR-1 in a folder: look
    for them in its JSON, YAML and Python files (which are not run) and compare them with ours."""


def doctor(options: DoctorOptions) -> None:
    """Check that optimized inference is correct and fast on this machine.

    One observation goes through the plain network and through what replaces it: the fast
    implementation, its CUDA graph, bfloat16. Each is compared with the plain network and timed.
    Paste the output into an issue. The exit code is 1 if something disagrees.

    Examples:
        spear doctor
        spear doctor --device cuda --preset spear1
        spear doctor --checkpoint ./spear1-franka
    """
    if options.checkpoint is not None:
        _print_settings_comparison(options.checkpoint)
        return
    from spear.doctor import COLUMNS, DisagreementError, list_machine_facts, measure_implementations
    from spear.models.devices import prepare_device
    from spear.models.presets import get_preset
    from spear.report.page import render

    preset = get_preset(options.preset)
    device = prepare_device(options.device)
    facts = list_machine_facts(preset, device)
    # The lines are Markdown. Two spaces at the end of a line are a line break.
    lines = [f"{name}: {description}  " for name, description in facts]
    rule_below_header = "|---" * len(COLUMNS) + "|"
    lines += ["", _format_markdown_row(COLUMNS), rule_below_header]
    print("\n".join(lines), flush=True)

    results: list[InferenceResult] = []
    for result in measure_implementations(preset, device):
        results.append(result)
        row = _format_markdown_row(result.to_row())
        lines.append(row)
        print(row, flush=True)

    if options.out is not None:
        page = render(
            "doctor.html",
            title=f"spear doctor: {preset.name} on {device}",
            facts=facts,
            columns=COLUMNS,
            rows=[result.to_row() for result in results],
            text=lines,
        )
        write_text(options.out, page)

    problems = [f"{result.name} in {result.dtype}" for result in results if result.problem]
    if problems:
        raise DisagreementError(
            f"optimized inference disagrees with the plain network ({', '.join(problems)}). "
            "Paste the lines above into an issue."
        )
    page_advice = "" if options.out is None else f"; open {options.out.resolve()}"
    print(f"\neverything agrees{page_advice}")


def _print_settings_comparison(folder: Path) -> None:
    """Print how the settings of a checkpoint compare with ours."""
    from spear.models.weights.foreign_settings import COLUMNS, compare_settings, summarize_verdicts

    comparisons = compare_settings(folder)
    lines = [_format_markdown_row(COLUMNS), "|---" * len(COLUMNS) + "|"]
    lines += [_format_markdown_row(comparison.to_row()) for comparison in comparisons]
    print(escape_control_characters("\n".join(lines), keep_newlines=True))
    print(f"\n{summarize_verdicts(comparisons)}")


def _format_markdown_row(cells: list[str]) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"
