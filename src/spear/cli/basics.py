"""Commands of their own: asking about an image, recording demonstrations, the demo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from spear.cli.arguments import File, Folder, Name, at_least
from spear.util.files import write_bytes


def ask(
    image: Annotated[Positional[str], arg(metavar="IMAGE")],
    question: Annotated[Positional[str], arg(metavar="QUESTION")],
    /,
    model: str = "nano",
    family: Name = None,
    decode: Literal["mode", "mean", "median"] = "mode",
    draw: File = None,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Ask SPEAR-VLM a 3D question about an image.

    Numbers in the answer are metres from the camera (for a model of relative labels, their unit): x to the
    right, y down, z forward.

    Examples:
        spear ask photo.jpg "How far away is the mug?"
        spear ask sim:7 "Provide the 3D bounding box coordinates of the carrot" --draw box.png

    Args:
        image: A JPEG or PNG file, or sim:SEED for a scene of the built-in simulator.
        question: What to ask, in words.
        model: The model that comes with this package (nano), or a folder with a trained one.
        family: Kind of question, which fixes the form of the answer: box_vertices, keypoint, offset,
            distance, back_projection or chain_of_thought. Without it the model answers freely.
        decode: Which number is said of those that the model holds possible: the likeliest (mode), the
            expected value (mean), or the one in the middle (median). `spear evaluate vqa` measures which is
            best.
        draw: Save the image with the answer's box drawn on it (for sim: images, whose camera is known).
        device: cpu, cuda, cuda:1 …; auto takes a GPU when there is one.
        dtype: Precision of the weights: bfloat16 takes half the memory of float32.
    """
    import torch

    from spear.evaluate.vqa import ask as asking
    from spear.policy import load_vlm
    from spear.train.devices import choose_device
    from spear.util.images import encode_picture, picture_format

    if draw:
        picture_format(str(draw))
    bundle = load_vlm(model, choose_device(device), getattr(torch, dtype))
    picture = asking.read_picture(image, bundle.processor.image_sizes["external"])
    answer = asking.ask(bundle, picture, question, family, decode)
    print(asking.words(answer, picture))
    if draw:
        from spear.report.drawing import draw_answer

        drawn = draw_answer(answer.segments, picture.image, picture.intrinsics)
        write_bytes(draw, encode_picture(drawn, str(draw)))


def record(
    out: Path = Path("runs/episodes"),
    episodes: int = 200,
    families: tuple[str, ...] = (),
    first_seed: int = 10_000,
    preset: str = "nano",
    workers: int = 2,
) -> None:
    """Record demonstrations of the scripted expert in the simulator, to train a policy on.

    Now and then the arm is pushed off course; the expert recovers, and the push itself is never a training
    target. Demonstrations that fail are left out. If it is stopped, the same command continues behind what is
    written, every 256 episodes; with more episodes it adds them.

    Example:
        spear record --episodes 3000 --out runs/episodes

    Args:
        out: Folder to write to.
        episodes: How many demonstrations per task family.
        families: Task families; all of them when none is given.
        first_seed: Scenes first-seed, first-seed + 1, … Those below 10000 are kept for testing.
        preset: Model size whose cameras are used.
        workers: Processes.
    """
    from spear.data.demonstrations import demonstrate
    from spear.models.presets import preset as find_preset
    from spear.sim.scene import FAMILIES

    at_least(1, episodes=episodes)
    at_least(0, workers=workers)
    sizes = find_preset(preset).image_sizes
    written, tried = demonstrate(out, families or FAMILIES, episodes, first_seed, sizes, workers)
    print(f"{written} of {tried} demonstrations succeeded and are in {out}")


def demo(out: Path = Path("runs/demo"), data: Folder = None) -> None:
    """Walk the whole way and make one HTML page of it; takes a few minutes on a laptop.

    Images labelled in 3D; answers to 3D questions; the robot at work in the simulator, with films; and a
    fine-tuning on real robot episodes.

    Example:
        spear demo --out runs/demo --data bridge_dataset/1.0.0

    Args:
        out: Folder for the page and its intermediate results.
        data: A folder with real robot episodes (RLDS, LeRobot).
    """
    from spear.demo import make

    print(f"open {make(out, data).resolve()}")


COMMANDS: dict[str, Callable[..., None]] = {"ask": ask, "record": record, "demo": demo}
