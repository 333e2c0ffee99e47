"""The command that measures what a SPEAR-VLM knows in 3D."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from spear.cli.arguments import at_least


def evaluate_vqa(
    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")],
    questions: Annotated[Positional[str], arg(metavar="QUESTIONS")],
    /,
    images: int = 300,
    per_image: int = 2,
    families: tuple[str, ...] = (),
    decode: Literal["mode", "mean", "median"] = "mode",
    seed: int = 0,
    view: str = "external",
    batch: int = 32,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16"] = "float32",
    out: Path = Path("runs/evaluate-vqa"),
) -> None:
    """Measure what SPEAR-VLM knows in 3D: ask it about labelled images that it has not seen.

    Prints, per kind of question, how far off the answers are, beside a constant guess and one that knows only
    how far away the scene is; how well boxes overlap; which way of reading numbers off the model's
    probabilities is best; and whether it is as sure as it may be. Writes OUT/scores.json and a page with
    drawn boxes, OUT/index.html.

    Examples:
        spear evaluate vqa nano sim --images 100
        spear evaluate vqa runs/nano-vlm-2 runs/labels-held-out --decode median --out runs/vqa

    Args:
        checkpoint: nano (comes with this package) or a folder with a trained model or policy.
        questions: A folder of labelled images that `spear label` wrote, of which questions are made; or sim,
            for scenes of the built-in simulator that nothing is trained on (sim:SEED begins with that one).
        images: At most so many images; of a folder, spread evenly over it.
        per_image: At most so many questions of each kind about an image.
        families: Kinds of questions; all when none is given: box_vertices, keypoint, offset, distance,
            back_projection, chain_of_thought.
        decode: Which number is scored of those that the model holds possible: the likeliest (mode), the
            expected value (mean), or the one in the middle (median). The others are compared with it in any
            case.
        seed: Of the questions: the same images and seed give the same ones.
        view: The camera that the images are from, external or wrist.
        batch: Questions that are answered at once.
        device: cpu, cuda, cuda:1 …; auto takes a GPU when there is one.
        dtype: Precision of the weights: bfloat16 takes half the memory of float32.
        out: Folder for the results.
    """
    import torch
    from rich import print as show

    from spear.evaluate.vqa.images import find_images
    from spear.evaluate.vqa.run import evaluate as run
    from spear.labels.questions.generate import FAMILIES
    from spear.policy import load_vlm
    from spear.report.vqa import vqa_page
    from spear.train.devices import choose_device
    from spear.util.files import write_text

    at_least(1, images=images, per_image=per_image, batch=batch)
    at_least(0, seed=seed)
    bundle = load_vlm(checkpoint, choose_device(device), getattr(torch, dtype))
    labels = find_images(questions, images, view, bundle.processor)
    scores = run(bundle, labels, families or FAMILIES, per_image, seed, batch, decode=decode, view=view)
    about: dict[str, str | int] = {
        "checkpoint": checkpoint,
        "questions": questions,
        "seed": seed,
        "view": view,
    }
    scores.save(out / "scores.json", **about)
    write_text(out / "index.html", vqa_page(scores, checkpoint, questions))
    for table in scores.tables():
        show(table)
    print(f"page: {out / 'index.html'}")
