"""The commands that make labels and show them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from spear.errors import SpearError, format_count
from spear.labels.options import LabelOptions, QuestionOptions
from spear.util.files import read_json
from spear.util.options import OptionalFile, Options, Range, list_changed_options

if TYPE_CHECKING:
    from spear.labels.models.protocols import PointMapResult
    from spear.types import LabeledImage


def label(options: LabelOptions) -> None:
    """Label images with the 3D boxes of the objects in them.

    Finds every object of an image, outlines it, lifts it to 3D and fits an oriented box. PHOTOS are images,
    folders, patterns, tar shards, Parquet files, videos, EgoExo4D takes, robot episodes, rgbd:FOLDER or
    sim:SEED-SEED. Writes Parquet shards and a dataset card; what cannot be labelled goes to skipped.parquet
    with the reason. Stopped at any moment, the same command finishes the rest.

    Without PHOTOS, scenes of the simulator are labelled from what it knows, in the layout that `spear train`
    reads. So are those of SIMPLER's four tasks, as simpler:SEED-SEED (docs/simpler.md).

    Examples:
        spear label photos/ --plan
        spear label photos/ --out runs/my_labels --questions
        spear label film.mp4 --detector owlv2 --vocabulary "mug, spoon, bowl" --out runs/my_labels
        spear label --scenes 1000 --out runs/labels
        spear label simpler:10000-10255 --out runs/simpler-labels
    """
    simpler = any(photo.startswith("simpler:") for photo in options.photos)
    if simpler and (len(options.photos) > 1 or options.plan):
        raise SpearError(
            "simpler:SEED-SEED: give it alone, without --plan: no network labels these scenes"
        )
    of_scenes = ("scenes", "first_seed") if simpler else ("scenes", "first_seed", "preset")
    idle = list_changed_options(options.scene, *of_scenes) if options.photos else []
    if simpler or not options.photos:
        idle += list_changed_options(
            options, "detector", "segmenter", "pointmap", "vocabulary", "cache", "per_minute"
        )
        idle += list_changed_options(
            options, "size", "rate", "per_episode", "retry_skipped", "device"
        )
        idle += list_changed_options(
            options.work, "engine", "batch_size", "shard_size", "copies", "gpus"
        )
    if idle:
        where = "beside PHOTOS" if options.photos else "without PHOTOS to label"
        raise SpearError(f"{idle[0]} says nothing {where}: leave it out, or name others")
    if list_changed_options(options, "seed") and not options.questions:
        raise SpearError("--seed says nothing without --questions: leave it out, or ask for them")
    if options.plan:
        _plan(options)
        return
    if options.photos and not simpler:
        from spear.labels.run import label_photos
        from spear.sim_data.label_scenes import list_scenes

        done = label_photos(options, list_scenes)
        labelled = format_count(done.num_done - done.num_skipped, "labelled images")
        said = f"{labelled} in {options.out}", f"{done.num_skipped:,} skipped", done.rate
        print(", ".join(filter(None, said)))
        if done.num_retryable:
            print(
                f"{done.num_retryable:,} of them for a reason that may pass: "
                "--retry-skipped tries these again"
            )
    else:
        from spear.labels.sources import parse_scene_seeds
        from spear.models.presets import get_preset
        from spear.sim_data.label_scenes import label_scenes

        out, scene, workers = options.out, options.scene, options.work.workers
        sizes = get_preset(scene.preset).image_sizes
        if simpler:
            from spear.evaluate.simpler.record import label_tasks

            images = label_tasks(
                out, parse_scene_seeds(options.photos[0], "simpler"), sizes["external"], workers
            )
        else:
            images = label_scenes(out, scene.scenes, sizes, scene.first_seed, workers)
        print(
            f"{format_count(images, 'labelled images')} in {out}; to look at them: spear label show {out}"
        )
    if options.questions:
        ask_about(QuestionOptions(options.out, options.seed))


def _plan(options: LabelOptions) -> None:
    """Print what labelling would cost. Of FILE+OTHERWISE the second is counted, for every image."""
    import torch

    from spear.doctor import machine
    from spear.labels.model_factories import parse_description
    from spear.labels.models.gemini import MAX_OUTPUT_TOKENS, estimate_input_tokens
    from spear.labels.models.resources import estimate_resources
    from spear.labels.run import prepare_run
    from spear.models.devices import choose_device
    from spear.models.weights.published import PUBLISHED
    from spear.sim_data.label_scenes import list_scenes

    if not options.photos:
        raise SpearError("--plan: name the PHOTOS that shall be labelled")
    device, (_, listing, settings) = (
        choose_device(options.device),
        prepare_run(options, list_scenes),
    )
    images, words = sum(1 for _ in listing), settings["vocabulary"]
    batch, longest = options.work.batch_size, options.size or 840
    print(
        f"{format_count(images, 'images')}, {batch} at a time, {longest} pixels wide; computed in float32:"
    )
    found = []
    for part in ("detector", "segmenter", "pointmap"):
        name, model = parse_description(getattr(options, part).rpartition("+")[2])
        said = f"not known before it is loaded: {model}" if name in PUBLISHED else "no network"
        if name == "gemini":
            each = estimate_input_tokens(words)
            said = (
                f"per image about {each:,} tokens in, at most {MAX_OUTPUT_TOKENS:,} out; "
                f"all {each * images:,} in"
            )
        elif name in PUBLISHED and not model:
            found.append(estimate_resources(name, batch, longest, len(words) or 8))
            said = f"{found[-1]}: {PUBLISHED[name].repository}"
        print(f"  {name:<15} {said}")
    if found:
        most = sum(n.weights for n in found) + max(n.activations for n in found)
        work, peak = sum(n.flops for n in found), machine(device.type, torch.float32).peak
        print(f"memory: at least {most / 2**30:.2f} GiB; a smaller --batch-size needs less")
        time = f"{work / peak:.3g} s per image, {images * work / peak / 3600:.2g} h in all"
        speed = f"{work / 1e12:.2f} TFLOP; {peak / 1e12:.2f} TFLOP/s, measured in a matrix product"
        print(f"time on {device}: at least {time} ({speed})")


def ask_about(options: QuestionOptions) -> None:
    """Ask 3D questions about labelled images, and answer them from the labels.

    Writes LABELS/questions.parquet. Objects that occur twice in an image, or are barely seen, are left out.

    Example:
        spear questions runs/my_labels --pairs 2 4
    """
    from spear.labels.questions.store import write_questions
    from spear.question_types import QUESTION_TYPES

    folder, families = _shards(options.labels), options.families or QUESTION_TYPES
    images, counts = write_questions(folder, options.seed, options.pairs, families)
    kinds = ", ".join(f"{count:,} {family}" for family, count in counts.most_common())
    print(
        f"{format_count(counts.total(), 'questions')} about "
        f"{format_count(images, 'images')}: {kinds or 'none'}"
    )


class ShowOptions(Options):
    labels: Annotated[Positional[Path], arg(metavar="LABELS")]
    """Folder that spear label has written."""
    out: OptionalFile = None
    """HTML file; default: LABELS/show.html."""
    images: Annotated[int, Range(1)] = 24
    """How many images to show."""
    rerun: OptionalFile = None
    """Also write the images, boxes and point clouds to this file, for the Rerun viewer."""


def show(options: ShowOptions) -> None:
    """Make a page of labelled images, with masks, 3D boxes, questions and statistics, to look at.

    Examples:
        spear label show runs/my_labels
        spear label show runs/my_labels --images 6 --rerun labels.rrd
    """
    from spear.labels.store import select_labels
    from spear.report.labels import label_page, write_rerun

    folder = _shards(options.labels)
    shown = select_labels(folder, options.images)
    target = options.out or options.labels / "show.html"
    label_page(folder, shown, target)
    print(f"open {target.resolve()}")
    if options.rerun is not None:
        write_rerun(shown, _point_maps(folder, shown), options.rerun)
        print(f"rerun {options.rerun}")


def _shards(labels: Path) -> Path:
    """The folder of shards: the one given, or the view of the scene that has most to show."""
    return labels / "external" if (labels / "external").is_dir() else labels


def _point_maps(folder: Path, labels: "Sequence[LabeledImage]") -> "list[PointMapResult | None]":
    """The point maps of labels, which are not kept: made again as run.json says; None if that cannot be."""
    from spear.labels.model_factories import resolve_factory
    from spear.labels.pipeline import admit_frame, predict_point_maps, read_images
    from spear.labels.sources import list_items
    from spear.sim_data.label_scenes import list_scenes
    from spear.types import Frame
    from spear.util.images import decode_image

    if not (folder / "run.json").is_file():
        return [None] * len(labels)
    run = read_json(folder / "run.json", "leave out --rerun, or copy the folder again")
    works = [admit_frame(Frame(decode_image(label.image), source=label.source)) for label in labels]
    if run["pointmap"] == "ground-truth":
        items = list_items(run["inputs"], run["rate"], run["per_episode"], list_scenes=list_scenes)
        found = {item.key: item for item in items}
        works = read_images([found[label.source] for label in labels if label.source in found])
    predict_point_maps(works, resolve_factory("point map", run["pointmap"], LabelOptions())())
    located = {work.source: work.point_map for work in works}
    return [located.get(label.source) for label in labels]
