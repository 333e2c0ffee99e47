"""The commands that make labels and show them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from spear.errors import SpearError, format_count
from spear.labels.options import LabelOptions, QuestionOptions
from spear.util.files import read_json
from spear.util.options import OptionalFile, Options, Range, list_changed_options

if TYPE_CHECKING:
    from spear.labels.models.protocols import PointMapResult
    from spear.labels.models.resources import Resources
    from spear.types import LabeledImage

LIBERO_PREFIX = "libero:"
BENCHMARK_PREFIXES = ("simpler:", LIBERO_PREFIX)
"""PHOTOS that begin with one of these are scenes of a benchmark, labeled from its ground truth."""
DEFAULT_PLANNED_SIZE_PX = 840
"""Longer side of an image in the plan of --dry-run, if no --max-size limits the photos' sizes."""
DEFAULT_PLANNED_NAMES = 8
"""Number of names that the detector looks for in the plan of --dry-run, without --vocabulary."""
MODEL_OPTIONS = ("detector", "segmenter", "pointmap")
"""The options that name the three models that label an image."""


def label(options: LabelOptions) -> None:
    """Label images with the 3D boxes of the objects in them.

    Finds every object of an image, outlines it, lifts it to 3D and fits an oriented box. PHOTOS are
    images, folders, patterns, tar shards, Parquet files, videos, EgoExo4D takes, robot episodes,
    rgbd:FOLDER or sim:SEED-SEED. Writes Parquet shards and a dataset card. Images that cannot be
    labeled are recorded in skipped.parquet with the reason. Run the same command to continue after
    it was stopped.

    With --num-scenes instead of PHOTOS, scenes of the simulator are labeled from its ground truth,
    in the layout that `spear train` reads. So are scenes of SIMPLER's four tasks, with
    simpler:SEED-SEED (docs/howto/simpler.md), and of LIBERO's forty tasks, with libero:SEED-SEED
    (docs/howto/libero.md).

    Examples:
        spear label photos/ --dry-run
        spear label photos/ --out runs/my_labels --questions
        spear label film.mp4 --detector owlv2 --vocabulary "mug, spoon, bowl" --out runs/my_labels
        spear label --num-scenes 1000 --out runs/labels
        spear label simpler:10000-10255 --out runs/simpler-labels
        spear label libero:10000-10024 --out runs/libero-labels
    """
    is_benchmark = any(photo.startswith(BENCHMARK_PREFIXES) for photo in options.photos)
    _check_label_options(options, is_benchmark)
    if options.dry_run:
        _print_labeling_cost(options)
    elif is_benchmark:
        _label_benchmark_scenes(options)
    elif options.photos:
        _label_photos(options)
    else:
        _label_simulated_scenes(options)
    if options.questions and not options.dry_run:
        make_questions(QuestionOptions(options.out, options.seed))


def _check_label_options(options: LabelOptions, is_benchmark: bool) -> None:
    """Check that something is to be labeled, and that every option has an effect on it."""
    if not options.photos and options.scene.num_scenes is None:
        raise SpearError(
            "there is nothing to label. Name the PHOTOS, or give --num-scenes 1000 to label scenes "
            "of the simulator."
        )
    if is_benchmark and (len(options.photos) > 1 or options.dry_run):
        prefixes = "SEED-SEED and ".join(BENCHMARK_PREFIXES)
        raise SpearError(
            f"{prefixes}SEED-SEED do not go with other options or images, because these "
            "scenes are labeled without networks. Give it alone, without --dry-run."
        )

    unused_options: list[str] = []
    if options.photos:
        unused_options += list_changed_options(
            options.scene, "num_scenes", "first_seed", "world", "no_robot"
        )
        if not is_benchmark:
            unused_options += list_changed_options(options.scene, "preset")
    if not any(photo.startswith(LIBERO_PREFIX) for photo in options.photos):
        unused_options += list_changed_options(options.scene, "suites")
    if is_benchmark or not options.photos:
        unused_options += list_changed_options(
            options,
            "detector",
            "segmenter",
            "pointmap",
            "vocabulary",
            "cache",
            "requests_per_minute",
            "max_size",
            "fps",
            "frames_per_episode",
            "retry_skipped",
            "device",
        )
        unused_options += list_changed_options(
            options.work, "engine", "batch_size", "shard_size", "replicas", "gpus"
        )
    if unused_options:
        circumstance = "with PHOTOS" if options.photos else "without PHOTOS to label"
        raise SpearError(
            f"{unused_options[0]} has no effect {circumstance}. Leave it out, or change PHOTOS."
        )
    if list_changed_options(options, "seed") and not options.questions:
        raise SpearError("--seed has no effect without --questions. Leave it out, or add those.")


def _label_photos(options: LabelOptions) -> None:
    """Label PHOTOS with the three models, and print how many labels there are."""
    from spear.labels.run import label_photos
    from spear.sim_data.label_scenes import list_scenes

    result = label_photos(options, list_scenes)
    num_labeled = format_count(result.num_done - result.num_skipped, "labeled images")
    messages = [f"{num_labeled} in {options.out}", f"{result.num_skipped:,} skipped"]
    if result.rate:
        messages.append(result.rate)
    print(", ".join(messages))
    if result.num_retryable:
        print(
            f"{result.num_retryable:,} of them failed for a temporary reason: --retry-skipped "
            "tries these again"
        )


def _label_simulated_scenes(options: LabelOptions) -> None:
    """Label scenes of the built-in simulator from its ground truth."""
    from spear.models.presets import get_preset
    from spear.sim_data.label_scenes import label_scenes

    scene = options.scene
    assert scene.num_scenes is not None
    num_images = label_scenes(
        options.out,
        scene.num_scenes,
        get_preset(scene.preset).image_sizes,
        scene.first_seed,
        options.work.workers,
        world=scene.world,
        shows_robot=not scene.no_robot,
    )
    _print_labeled_scenes(num_images, options.out)


def _label_benchmark_scenes(options: LabelOptions) -> None:
    """Label scenes of SIMPLER's or LIBERO's tasks from the simulator's ground truth."""
    from spear.labels.sources import parse_scene_seeds
    from spear.models.presets import get_preset

    argument = options.photos[0]
    benchmark, _, _ = argument.partition(":")
    seeds = parse_scene_seeds(argument, benchmark)
    size = get_preset(options.scene.preset).image_sizes["external"]
    if benchmark == "simpler":
        from spear.evaluate.simpler.record import label_tasks as label_simpler_tasks

        num_images = label_simpler_tasks(options.out, seeds, size, options.work.workers)
    else:
        from spear.evaluate.libero.label import label_tasks as label_libero_tasks

        num_images = label_libero_tasks(
            options.out, options.scene.suites, seeds, size, options.work.workers
        )
    _print_labeled_scenes(num_images, options.out)


def _print_labeled_scenes(num_images: int, out: Path) -> None:
    """Print how many scenes were labeled, and the command that shows them."""
    print(
        f"{format_count(num_images, 'labeled images')} in {out}; to look at them: "
        f"spear label show {out}"
    )


def _print_labeling_cost(options: LabelOptions) -> None:
    """Print what labeling would cost.

    A model may be written FILE+OTHER: the file's annotations, completed by the model OTHER. The
    plan assumes that OTHER runs on every image.
    """
    from spear.labels.run import prepare_run
    from spear.models.devices import prepare_device
    from spear.sim_data.label_scenes import list_scenes

    if not options.photos:
        raise SpearError("--dry-run has nothing to plan. Name the PHOTOS to label.")
    device = prepare_device(options.device)
    _, images, settings = prepare_run(options, list_scenes)
    num_images = sum(1 for _ in images)  # `images` is an iterator
    size_px = options.max_size or DEFAULT_PLANNED_SIZE_PX
    print(
        f"{format_count(num_images, 'images')}, {options.work.batch_size} at a time, longer side "
        f"{size_px} pixels; computed in float32:"
    )

    networks: list[Resources] = []
    for option in MODEL_OPTIONS:
        _, _, description = getattr(options, option).rpartition("+")  # OTHER of FILE+OTHER
        line, resources = _estimate_model_cost(
            description, settings["vocabulary"], num_images, options
        )
        print(f"  {line}")
        if resources is not None:
            networks.append(resources)
    if networks:
        _print_estimated_cost(networks, num_images, device)


def _estimate_model_cost(
    description: str, vocabulary: Sequence[str], num_images: int, options: LabelOptions
) -> "tuple[str, Resources | None]":
    """Return a line about what a model costs, and its resources.

    The resources are None unless the model is a published network.

    Args:
        description: the model as the user names it, such as "owlv2" or "gemini".
        vocabulary: the names that the detector looks for; empty if the user gave none.
        num_images: number of images to label.
        options: the options of `spear label`.
    """
    from spear.labels.model_factories import split_model_description
    from spear.labels.models.gemini import MAX_OUTPUT_TOKENS, estimate_input_tokens
    from spear.labels.models.resources import estimate_resources
    from spear.models.weights.published import PUBLISHED

    name, user_model = split_model_description(description)
    if name == "gemini":
        tokens = estimate_input_tokens(vocabulary)
        cost = (
            f"per image about {tokens:,} tokens in, at most {MAX_OUTPUT_TOKENS:,} out; "
            f"all {tokens * num_images:,} in"
        )
        return f"{name:<15} {cost}", None
    if name not in PUBLISHED:
        return f"{name:<15} no network", None
    if user_model:
        return f"{name:<15} not known before it is loaded: {user_model}", None
    size_px = options.max_size or DEFAULT_PLANNED_SIZE_PX
    num_names = len(vocabulary) or DEFAULT_PLANNED_NAMES
    resources = estimate_resources(name, options.work.batch_size, size_px, num_names)
    return f"{name:<15} {resources}: {PUBLISHED[name].repository}", resources


def _print_estimated_cost(networks: "Sequence[Resources]", num_images: int, device: Any) -> None:
    """Print the least memory and time that the networks need.

    All networks are in memory at once, but only one of them computes at a time.
    """
    import torch

    from spear.doctor import measure_machine

    weight_bytes = sum(network.weights for network in networks)
    activation_bytes = max(network.activations for network in networks)
    memory_gib = (weight_bytes + activation_bytes) / 2**30
    print(f"memory: at least {memory_gib:.2f} GiB; a smaller --batch-size needs less")

    flops = sum(network.flops for network in networks)  # per image
    flops_per_s = measure_machine(device.type, torch.float32).flops_per_s
    seconds = flops / flops_per_s
    hours = num_images * seconds / 3600
    print(
        f"time on {device}: at least {seconds:.3g} s per image, {hours:.2g} h in all "
        f"({flops / 1e12:.2f} TFLOP; {flops_per_s / 1e12:.2f} TFLOP/s, measured in a matrix "
        "product)"
    )


def make_questions(options: QuestionOptions) -> None:
    """Ask 3D questions about labeled images, and answer them from the labels.

    Writes LABELS/questions.parquet. No questions are asked about objects that occur twice in an
    image or are barely visible.

    Example:
        spear questions runs/my_labels --questions-per-image 2 4
    """
    from spear.labels.questions.store import write_questions
    from spear.question_types import QUESTION_TYPES

    folder = _get_external_shard_folder(options.labels)
    question_types = options.question_types or QUESTION_TYPES
    num_images, counts = write_questions(
        folder, options.seed, options.questions_per_image, question_types
    )
    counts_text = ", ".join(f"{count:,} {name}" for name, count in counts.most_common())
    print(
        f"{format_count(counts.total(), 'questions')} about "
        f"{format_count(num_images, 'images')}: {counts_text or 'none'}"
    )


class ShowOptions(Options):
    labels: Annotated[Positional[Path], arg(metavar="LABELS")]
    """Folder that spear label has written."""
    out: OptionalFile = None
    """Write the page to this HTML file; default: LABELS/show.html."""
    num_images: Annotated[int, Range(1)] = 24
    """Number of images to show."""
    save_rerun: OptionalFile = None
    """Also write the images, boxes and point clouds to this file, for the Rerun viewer."""


def show(options: ShowOptions) -> None:
    """Make a page of labeled images, with masks, 3D boxes, questions and statistics.

    Examples:
        spear label show runs/my_labels
        spear label show runs/my_labels --num-images 6 --save-rerun labels.rrd
    """
    from spear.labels.store import read_evenly_spread_labels
    from spear.report.labels import write_label_page, write_rerun_file

    folder = _get_external_shard_folder(options.labels)
    labels = read_evenly_spread_labels(folder, options.num_images)
    page = options.out or options.labels / "show.html"
    write_label_page(folder, labels, page)
    print(f"open {page.resolve()}")
    if options.save_rerun is not None:
        write_rerun_file(labels, _predict_point_maps(folder, labels), options.save_rerun)
        print(f"rerun {options.save_rerun}")


def _get_external_shard_folder(labels: Path) -> Path:
    """Return the folder of label shards: `labels`, or its subfolder for the external camera."""
    external = labels / "external"
    return external if external.is_dir() else labels


def _predict_point_maps(
    folder: Path, labels: "Sequence[LabeledImage]"
) -> "list[PointMapResult | None]":
    """Predict the point maps of labeled images, which labels do not store.

    Args:
        folder: the folder of the labels, whose run.json names the point-map model.
        labels: the labeled images.

    Returns:
        A point map per label; None for each that cannot be predicted.
    """
    from spear.labels.model_factories import resolve_factory
    from spear.labels.pipeline import (
        make_checked_pending_image,
        predict_and_add_point_maps,
        read_and_encode_images,
    )
    from spear.labels.sources import list_items
    from spear.sim_data.label_scenes import list_scenes
    from spear.types import Frame
    from spear.util.images import decode_image

    if not (folder / "run.json").is_file():
        return [None] * len(labels)
    run = read_json(
        folder / "run.json",
        advice="leave out --save-rerun, which needs to know how the images were made",
    )

    if run["pointmap"] == "ground-truth":
        # The true depth is not in the labels, so read the images again from where they came.
        items = list_items(run["inputs"], run["rate"], run["per_episode"], list_scenes=list_scenes)
        item_of_source = {item.key: item for item in items}
        labeled_items = [
            item_of_source[label.source] for label in labels if label.source in item_of_source
        ]
        images = read_and_encode_images(labeled_items)
    else:
        frames = [Frame(decode_image(label.image), source=label.source) for label in labels]
        images = [make_checked_pending_image(frame) for frame in frames]
    default_options = LabelOptions()
    make_model = resolve_factory("point map", run["pointmap"], default_options)
    predict_and_add_point_maps(images, make_model())  # sets the attribute `point_map` of each image
    point_map_of_source = {image.source: image.point_map for image in images}
    return [point_map_of_source.get(label.source) for label in labels]
