"""Commands of their own: asking about an image, recording demonstrations, the demo, the doctor."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from spear.errors import check_known, format_count, notice
from spear.evaluate.options import Decode
from spear.util.files import write_bytes, write_text
from spear.util.options import (
    Device,
    Dtype,
    ModelName,
    OptionalFile,
    OptionalFolder,
    OptionalName,
    Options,
    Range,
)

if TYPE_CHECKING:
    from spear.sim.record import InterveningPolicy


class AskOptions(Options):
    image: Annotated[Positional[str], arg(metavar="IMAGE")]
    """A JPEG or PNG file, or sim:SEED for a scene of the built-in simulator."""
    question: Annotated[Positional[str], arg(metavar="QUESTION")]
    """What to ask, in words."""
    model: ModelName = "nano-vlm"
    family: OptionalName = None
    """Kind of question, which fixes the form of the answer: box_vertices, keypoint, offset, distance,
    back_projection or chain_of_thought. Without it the model answers freely."""
    view: str = "external"
    """Which camera took it: external, or wrist."""
    decode: Decode = "median"
    """How numbers are read off the model's probabilities; the interval is around the median."""
    draw: OptionalFile = None
    """Save the image with the answer's box drawn on it (for sim: images, whose camera is known)."""
    device: Device = "auto"
    dtype: Dtype = "float32"


def ask(options: AskOptions) -> None:
    """Ask SPEAR-VLM a 3D question about an image.

    Numbers in the answer are metres from the camera (for a model of relative labels, their unit): x to the
    right, y down, z forward. Of a model that was calibrated, with the interval that held 80 % of the truths,
    or "not in the picture".

    Examples:
        spear ask photo.jpg "How far away is the mug?"
        spear ask sim:7 "Provide the 3D bounding box coordinates of the cucumber" --draw box.png
    """
    from spear.evaluate.vqa import ask as asking
    from spear.evaluate.vqa.calibration import Trust
    from spear.models.weights.folders import is_simulator_only
    from spear.policy import load_vlm, locate
    from spear.util.images import encode_image_file, find_image_format

    o, folder = options, locate(options.model)
    if o.draw:
        find_image_format(str(o.draw))
    bundle = load_vlm(o.model, o.device, o.dtype)
    check_known("view", bundle.processor.image_sizes, o.view)
    picture = asking.load_picture(o.image, bundle.processor.image_sizes[o.view], o.view)
    trust = (
        Trust.load(folder) if o.view == "external" else None
    )  # it was measured with images of that one
    answer, said = asking.ask_question(
        bundle, picture.image, o.question, o.family, o.decode, trust, o.view
    )
    print(said)
    if trust is None and o.view == "external":
        notice(
            f"not measured how sure this is: `spear evaluate vqa {o.model} sim --calibrate` does it"
        )
    if not o.image.startswith("sim:") and is_simulator_only(folder):
        notice(f"{o.model} has seen nothing but the built-in simulator: it knows little of photos")
    if o.draw and answer is None:
        notice(f"{o.draw} is not written: there is no answer to draw")
    elif o.draw and answer is not None:
        from spear.report.draw import draw_answer

        drawn = draw_answer(
            answer.segments, picture.image, picture.intrinsics, answer.question_type
        )
        write_bytes(o.draw, encode_image_file(drawn, str(o.draw)))


class DemonstrationOptions(Options):
    """What is recorded: the same in every simulator."""

    out: Path = Path("runs/episodes")
    """Folder to write to."""
    episodes: Annotated[int, Range(1)] = 200
    """How many demonstrations per task."""
    first_seed: int = 10_000
    """Scenes first-seed, first-seed + 1, … Those below 10000 are kept for testing."""
    preset: str = "nano"
    """Model size to whose cameras the pictures are scaled."""
    workers: Annotated[int, Range(1, 1024)] = 2
    """Processes."""
    policy: OptionalName = None
    """A trained folder or shipped name that takes turns with the expert: what it does wrong is put right."""


class RecordOptions(DemonstrationOptions):
    families: tuple[str, ...] = ()
    """Task families; all of them when none is given."""


def record(options: RecordOptions) -> None:
    """Record demonstrations of the scripted expert in the simulator, to train a policy on.

    Now and then the arm is pushed off course; the expert recovers, and the push itself is never a training
    target. Demonstrations that fail are left out. If it is stopped, the same command continues behind what is
    written, every 256 episodes; with more episodes it adds them.

    Examples:
        spear record --episodes 3000 --out runs/episodes
        spear record --policy nano --first-seed 40000 --out runs/corrections
    """
    from spear.models.presets import get_preset as find_preset
    from spear.sim_data.demonstrations import record_demonstrations

    o, sizes = options, find_preset(options.preset).image_sizes
    how = o.first_seed, sizes, o.workers
    written, tried = record_demonstrations(
        o.out, o.families, o.episodes, *how, policy=_turns(o.policy)
    )
    print(f"{written} of {format_count(tried, 'demonstrations')} succeeded: {o.out}")


class RecordSimplerOptions(DemonstrationOptions):
    out: Path = Path("runs/simpler-episodes")
    """Folder to write to; each task has a folder of its own in it."""
    tasks: tuple[str, ...] = ()
    """ManiSkill's names; all four when none is given."""
    assets: OptionalFolder = None
    """ManiSkill's asset folder, where it is neither ~/.maniskill nor named by MS_ASSET_DIR."""


def record_simpler(options: RecordSimplerOptions) -> None:
    """Record demonstrations of SIMPLER's four WidowX tasks (ManiSkill 3), to train a policy on.

    As spear record, by a script that knows the true state (oracle), from starts off the official grid. Those
    of seeds below 10000 are kept for evaluate simpler --off-grid. Needs what spear evaluate simpler needs.

    Example:
        spear record simpler --episodes 80 --out runs/simpler-episodes
    """
    from spear.evaluate.simpler.record import record_demonstrations
    from spear.models.presets import get_preset as find_preset

    o, height = options, find_preset(options.preset).image_sizes["external"][1]
    how = o.first_seed, height, o.workers, o.assets
    done = record_demonstrations(o.out, o.tasks, o.episodes, *how, _turns(o.policy))
    for task, (written, tried) in done.items():
        print(f"{written} of {format_count(tried, 'demonstrations')} succeeded: {o.out / task}")


def _turns(policy: str | None) -> "InterveningPolicy | None":
    """What takes turns with the expert."""
    if policy is None:
        return None
    from spear.evaluate.agents import predict_next_action
    from spear.policy import locate
    from spear.sim.record import InterveningPolicy

    return InterveningPolicy(locate(policy), predict_next_action)


class DemoOptions(Options):
    out: Path = Path("runs/demo")
    """Folder for the page and its intermediate results."""
    data: OptionalFolder = None
    """A folder with real robot episodes (RLDS, LeRobot)."""


def demo(options: DemoOptions) -> None:
    """Walk the whole way and make one HTML page of it; takes a few minutes on a laptop.

    Images labelled in 3D; answers to 3D questions; the robot at work in the simulator, with films; and a
    fine-tuning on real robot episodes.

    Example:
        spear demo --out runs/demo --data bridge_dataset/1.0.0
    """
    from spear.demo import make

    print(f"open {make(options.out, options.data).resolve()}")


class DoctorOptions(Options):
    preset: str = "nano"
    """Model size: nano (the weights that come with this package), small or spear1 (random weights)."""
    device: Device = "auto"
    out: OptionalFile = Path("runs/doctor.html")
    """The page to write; None: none."""


def doctor(options: DoctorOptions) -> None:
    """Find out whether acting is right and fast on this machine.

    One observation goes through the plain network and through what replaces it: the fast way, its CUDA graph,
    bfloat16. Each is compared with the plain network and timed. What is printed is to be pasted into an
    issue. Exits with 1 when something disagrees.

    Examples:
        spear doctor
        spear doctor --device cuda --preset spear1
    """
    from spear import doctor as machine
    from spear.models.devices import choose_device
    from spear.models.presets import get_preset
    from spear.report.page import render

    size, device = get_preset(options.preset), choose_device(options.device)
    facts = machine.about(size, device)
    lines = [f"{what}: {which}  " for what, which in facts]
    lines += ["", f"| {' | '.join(machine.COLUMNS)} |", "|---" * len(machine.COLUMNS) + "|"]
    print("\n".join(lines), flush=True)
    rows, wrong = [], []
    for way in machine.examine(size, device):
        rows.append(way.row())
        wrong += [f"{way.name} in {way.dtype}"] if way.problem else []
        lines.append(f"| {' | '.join(rows[-1])} |")
        print(lines[-1], flush=True)
    title = f"spear doctor: {size.name} on {device}"
    page = render(
        "doctor.html", title=title, facts=facts, columns=machine.COLUMNS, rows=rows, text=lines
    )
    if options.out is not None:
        write_text(options.out, page)
    if wrong:
        raise machine.Disagrees(f"{', '.join(wrong)}: paste the lines above into an issue")
    print("\neverything agrees" + (f"; open {options.out.resolve()}" if options.out else ""))
