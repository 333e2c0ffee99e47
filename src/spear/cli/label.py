"""The commands that make labels and show them. See `spear.cli.basics`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from spear.cli.arguments import File, Folder, Name, at_least

if TYPE_CHECKING:
    from spear.labels.models.protocols import PointMapResult
    from spear.types import LabeledImage

Sim = Literal["sim"]
EngineName = Literal["local", "ray"]


def label(
    photos: Annotated[Positional[tuple[str, ...]], arg(metavar="PHOTOS")] = (),
    /,
    out: Path = Path("runs/labels"),
    detector: str = "gemini",
    segmenter: str = "sam2",
    pointmap: str = "moge-2",
    vocabulary: str = "",
    questions: bool = False,
    retry_rejected: bool = False,
    size: int = 840,
    rate: float = 1.0,
    per_episode: int = 4,
    engine: EngineName = "local",
    workers: int = 2,
    batch_size: int = 8,
    shard_size: int = 256,
    device: Name = None,
    copies: tuple[int, int, int] = (1, 1, 1),
    gpus: tuple[float, float, float] = (0.0, 0.0, 0.0),
    cache: Folder = None,
    seed: int = 0,
    source: Sim = "sim",
    scenes: int = 1000,
    first_seed: int = 10_000,
    preset: str = "nano",
    drawings: int = 4,
) -> None:
    """Label images with the 3D boxes of the objects in them.

    Finds every object of an image, outlines it, lifts it to 3D and fits an oriented box. PHOTOS are images,
    folders, patterns, tar shards, Parquet files, videos, EgoExo4D takes, robot episodes, rgbd:FOLDER or
    sim:SEED-SEED. Writes Parquet shards and a dataset card; what cannot be labelled goes to rejected.parquet
    with the reason. Stopped at any moment, the same command finishes the rest.

    Without PHOTOS, scenes of the simulator are labelled from what it knows, in the layout that `spear train`
    reads.

    Examples:
        spear label photos/ --out runs/my_labels --questions
        spear label film.mp4 --detector owlv2 --vocabulary "mug, spoon, bowl" --out runs/my_labels
        spear label --scenes 1000 --out runs/labels

    Args:
        photos: What to label.
        out: Folder to write to.
        detector: gemini (its key in GEMINI_API_KEY), grounding-dino, owlv2, file:ANNOTATIONS.json or
            ground-truth. A model of your choice: owlv2=HUB_NAME_OR_FOLDER. With file:A.json+gemini, Gemini
            does the images that the file lacks.
        segmenter: sam2, file:ANNOTATIONS.json or ground-truth.
        pointmap: moge-2 (metres), moge (up to scale, as in the paper) or ground-truth.
        vocabulary: Names of objects to look for, separated by commas.
        questions: Also write questions and answers, as spear questions does.
        retry_rejected: Try again what was set aside for a reason that may pass, such as a service out of
            reach.
        size: Larger photos are labelled and kept at so many pixels on their longer side; 0 leaves them as
            they are.
        rate: Frames per second of video.
        per_episode: Frames of each robot episode.
        engine: local, or ray to use a Ray cluster.
        workers: Processes that read images and fit boxes.
        batch_size: Images that go through a network together.
        shard_size: Images per file. What is not in a finished file is done again after an interruption.
        device: Where networks run, such as cpu or cuda:1; the GPU if there is one.
        copies: With ray: how many detectors, segmenters and point maps run.
        gpus: With ray: GPUs for each detector, segmenter and point map; 0.5 shares one.
        cache: Folder of Gemini's answers, which are paid for only once; default: OUT/.answers.
        seed: Decides which questions are asked.
        source: Where images come from without PHOTOS; sim is the built-in simulator, which knows the truth.
        scenes: How many scenes to label (two images each).
        first_seed: Scenes first-seed, first-seed + 1, … Those below 10000 are kept for testing.
        preset: Model size whose cameras are used for scenes.
        drawings: So many labelled scenes are also saved as pictures, boxes drawn, in OUT/drawings.
    """
    at_least(1, batch_size=batch_size, shard_size=shard_size, per_episode=per_episode, scenes=scenes)
    at_least(0, size=size, workers=workers, first_seed=first_seed, drawings=drawings, seed=seed)
    if not photos:
        _label_scenes(out, scenes, first_seed, preset, drawings, workers)
        if questions:
            ask_about(out, seed=seed)
        return
    from spear.labels.components import Choice, graph
    from spear.labels.engine import run_local
    from spear.labels.ray_engine import Resources, run_ray
    from spear.labels.run import Progress, label_folder
    from spear.labels.sources import items
    from spear.util.progress import ProgressBar

    names = tuple(name.strip() for name in vocabulary.split(",") if name.strip())
    chosen = graph(
        detector, segmenter, pointmap, Choice(names, device, cache or out / ".answers"), size or None
    )
    inputs = [os.path.normpath(photo) for photo in photos]
    settings = {
        "inputs": inputs, "detector": detector, "segmenter": segmenter, "pointmap": pointmap,
        "vocabulary": names, "size": size, "rate": rate, "per_episode": per_episode,
        "boxes": dataclasses.asdict(chosen.boxes),
    }  # fmt: skip
    made: list[Any] = []

    def watched() -> Any:
        made.append(chosen.detector())
        return made[0]

    if engine == "ray":
        parts = [Resources(c, g) for c, g in zip(copies, gpus, strict=True)]
        run: Any = partial(run_ray, chosen, (parts[0], parts[1], parts[2]))
    else:
        run = partial(run_local, dataclasses.replace(chosen, detector=watched), workers)
    with ProgressBar("labelling", unit="images") as bar:

        def report(now: Progress) -> None:
            if bar.total is None:
                bar.begin(now.total, now.before)
            bar.update(now.done, f"{now.rejected:,} set aside")

        done = label_folder(
            partial(items, inputs, rate, per_episode),
            out,
            run,
            settings,
            shard_size,
            batch_size,
            retry_rejected=retry_rejected,
            on_progress=report,
        )
    said = (
        f"{done.done - done.rejected:,} labelled images in {out}",
        f"{done.rejected:,} set aside",
        bar.rate(),
    )
    print(", ".join(part for part in said if part))
    if done.temporary:
        print(f"{done.temporary:,} of them for a reason that may pass: --retry-rejected tries these again")
    for component in made:
        if hasattr(component, "bill"):
            print(component.bill())
    if questions:
        ask_about(out, seed=seed)


def _label_scenes(out: Path, scenes: int, first_seed: int, preset: str, drawings: int, workers: int) -> None:
    from spear.labels.scenes import label_scenes
    from spear.labels.store import LabelStore
    from spear.models.presets import preset as find_preset
    from spear.report.draw import draw_label
    from spear.util.files import write_bytes
    from spear.util.images import encode_picture

    sizes = dict(find_preset(preset).image_sizes)
    images = label_scenes(out, scenes, sizes, first_seed, workers)
    store = LabelStore(out / "external")
    for index in range(min(drawings, len(store))):
        path = out / "drawings" / f"{index:04d}.png"
        write_bytes(path, encode_picture(draw_label(store[index]), path.name))
    print(f"{images} labelled images in {out}" + (f", drawings in {out / 'drawings'}" if drawings else ""))


def ask_about(
    labels: Annotated[Positional[Path], arg(metavar="LABELS")],
    /,
    seed: int = 0,
    pairs: tuple[int, int] = (1, 4),
    families: tuple[str, ...] = (),
) -> None:
    """Ask 3D questions about labelled images, and answer them from the labels.

    Writes LABELS/questions.parquet. Objects that occur twice in an image, or that are barely seen, are not
    asked about.

    Example:
        spear questions runs/my_labels --pairs 2 4

    Args:
        labels: Folder that spear label has written.
        seed: The same seed gives the same questions.
        pairs: Fewest and most questions per image.
        families: Kinds of question: box_vertices, keypoint, offset, distance, back_projection,
            chain_of_thought; all of them when none is given.
    """
    from spear.labels.questions.generate import FAMILIES
    from spear.labels.questions.store import write_questions

    at_least(0, seed=seed)
    images, counts = write_questions(_shards(labels), seed, pairs, families or FAMILIES)
    kinds = ", ".join(f"{count:,} {family}" for family, count in counts.most_common())
    print(f"{counts.total():,} questions about {images:,} images: {kinds or 'none could be asked'}")


def show(
    labels: Annotated[Positional[Path], arg(metavar="LABELS")],
    /,
    out: File = None,
    images: int = 24,
    model: Name = None,
    rerun: File = None,
) -> None:
    """Make a page of labelled images, with masks, 3D boxes, questions and statistics, to look at.

    Examples:
        spear label show runs/my_labels
        spear label show runs/my_labels --images 6 --rerun labels.rrd

    Args:
        labels: Folder that spear label has written.
        out: HTML file; default: LABELS/show.html.
        images: How many images to show.
        model: Count the use of this model's 3D tokens (nano, or a trained folder) instead of tokens fitted
            here.
        rerun: Also write the images, boxes and point clouds to this file, for the Rerun viewer.
    """
    from spear.labels.store import LabelStore, choose
    from spear.report.labels import label_page

    at_least(1, images=images)
    folder = _shards(labels)
    shown = choose(LabelStore(folder), images)
    tokenizer = None
    if model is not None:
        from spear.policy import locate
        from spear.tokens import CoordinateTokenizer

        path = locate(model) / "coordinates.json"
        tokenizer = CoordinateTokenizer.from_json(path.read_text(), str(path))
    target = out or labels / "show.html"
    label_page(folder, shown, target, tokenizer)
    print(f"open {target.resolve()}")
    if rerun is not None:
        from spear.report.rerun import write_rerun

        write_rerun(shown, _point_maps(folder, shown), rerun)
        print(f"rerun {rerun}")


def _shards(labels: Path) -> Path:
    """The folder of shards: the one given, or the view of the scene that has most to show."""
    return labels / "external" if (labels / "external").is_dir() else labels


def _point_maps(folder: Path, labels: Sequence[LabeledImage]) -> list[PointMapResult | None]:
    """The point maps of labels, which are not kept: made again as run.json says; None where that cannot
    be."""
    import json

    from spear.labels.components import Choice, build
    from spear.labels.inputs import read
    from spear.labels.pipeline import admit, locate
    from spear.labels.sources import items
    from spear.types import Frame
    from spear.util.images import decode_image

    if not (folder / "run.json").is_file():
        return [None] * len(labels)
    run = json.loads((folder / "run.json").read_text())
    works = [admit(Frame(decode_image(label.image), source=label.source)) for label in labels]
    if run["pointmap"] == "ground-truth":
        found = {item.key: item for item in items(run["inputs"], run["rate"], run["per_episode"])}
        works = read([found[label.source] for label in labels if label.source in found])
    locate(works, build("point map", run["pointmap"], Choice()))
    located = {work.source: work.geometry for work in works}
    return [located.get(label.source) for label in labels]
