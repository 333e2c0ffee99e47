"""The two engines that label many batches of images: a local one, and one that uses Ray.

Both engines do the same with each batch: read images → detect objects → segment them → predict
point maps → fit boxes. The labeled batches come out in the order in which the batches went in.
Images without objects are skipped.

The local engine runs the networks in this process, and everything else in worker processes. Only a
few batches are in progress at any time. The Ray engine runs on one machine or a cluster. Each
network is an actor that keeps its model; reading and box fitting are tasks. The input files must be
at the same paths on every node.
"""

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple
from warnings import catch_warnings

import numpy as np
import pyarrow as pa

from spear.errors import Notice, RetryableError, import_optional
from spear.labels.inputs import Item
from spear.labels.models.protocols import Detector, PointMapModel, Segmenter
from spear.labels.options import WorkOptions
from spear.labels.pipeline import (
    PendingImage,
    detect_and_add_detections,
    fit_boxes,
    predict_and_add_point_maps,
    read_and_encode_images,
    segment_and_add_masks,
)
from spear.labels.store import to_table
from spear.types import LabeledImage
from spear.util import processes

DEFAULT_MAX_SIDE_PX = 840  # larger images are shrunk to this longer side, as in the paper

ModelFactories = tuple[Callable[[], Detector], Callable[[], Segmenter], Callable[[], PointMapModel]]
"""Three functions that make the detector, the segmenter and the point-map model. The functions can
be pickled, so that another process can make the models."""


class SkippedImage(NamedTuple):
    """A skipped image.

    Attributes:
        source: The key of the image's item.
        reason: Why the image was skipped.
        retryable: Whether labeling may succeed later, for example because a server could not be
            reached.
    """

    source: str
    reason: str
    retryable: bool


class LabeledBatch(NamedTuple):
    """A labeled batch.

    Attributes:
        labels: The labels, as rows of `store.SCHEMA`.
        skipped: The images without a label.
        content_hashes: `PendingImage.content_hash` of all images of the batch.
        notices: The notices that box fitting gave, each once.
    """

    labels: pa.Table
    skipped: list[SkippedImage]
    content_hashes: list[str]
    notices: Sequence[str] = ()


Engine = Callable[[Iterable[Sequence[Item]]], Generator[LabeledBatch, None, None]]
"""Batches of items → labeled batches, in order."""


def predict_point_maps_and_pack_images(
    images: list[PendingImage], point_map_model: PointMapModel
) -> None:
    """Predict point maps, and remove from the images what box fitting does not need.

    The images are smaller then, and cheaper to send to another process. Pixels and ground truth are
    removed (the image is encoded already). Masks are packed, eight pixels to a byte.
    """
    predict_and_add_point_maps(images, point_map_model)
    for image in images:
        if image.error is not None or image.frame is None or image.masks is None:
            # A skipped image needs no arrays any more.
            image.frame = None
            image.masks = None
            image.point_map = None
        else:
            no_pixels = image.frame.image[..., :0]  # [h, w, 0]: box fitting needs the size
            image.frame = replace(
                image.frame, image=no_pixels, depth=None, instances=None, boxes=None
            )
            image.masks = np.packbits(image.masks, axis=-1)  # [n, h, ⌈w / 8⌉]


def fit_boxes_of_packed_images(images: Sequence[PendingImage]) -> LabeledBatch:
    """Fit the boxes of a batch that `predict_point_maps_and_pack_images` has packed.

    An unexpected exception in one image skips only that image: among millions of images, some
    break the code.
    """
    labels = []
    skipped = []
    notices = set[str]()
    for image in images:
        if image.error is not None:
            is_retryable = isinstance(image.error, RetryableError)
            skipped.append(SkippedImage(image.source, str(image.error), is_retryable))
            continue
        try:
            with catch_warnings(action="always", category=Notice, record=True) as caught:
                labels.append(_unpack_and_fit(image))
            notices.update(str(warning.message) for warning in caught)
        except Exception as error:
            reason = f"boxes cannot be fitted ({type(error).__name__}, {error}). Leave it out."
            skipped.append(SkippedImage(image.source, reason, retryable=False))
    content_hashes = [image.content_hash for image in images]
    return LabeledBatch(to_table(labels), skipped, content_hashes, sorted(notices))


def _unpack_and_fit(image: PendingImage) -> LabeledImage:
    """Fit the boxes of an image whose masks are packed."""
    assert image.frame is not None and image.masks is not None
    width = image.frame.image.shape[1]
    masks = np.unpackbits(image.masks, axis=-1, count=width).view(bool)
    return fit_boxes(replace(image, masks=masks))


Stage = Callable[[list[PendingImage], Any], None]
STAGES: Sequence[Stage] = (
    partial(detect_and_add_detections, skip_empty=True),
    segment_and_add_masks,
    predict_point_maps_and_pack_images,
)
"""The stages of detector, segmenter and point-map model. A stage calls its model with a batch and
changes the batch's images."""


def run_local(
    factories: ModelFactories,
    workers: int,
    batches: Iterable[Sequence[Item]],
    max_side_px: int | None = DEFAULT_MAX_SIDE_PX,
) -> Generator[LabeledBatch, None, None]:
    """Label batches on this computer.

    The models are made in this process, before a worker starts. If a model's use costs money, the
    bill is printed at the end, even after an error.

    Args:
        factories: Functions that make the models.
        workers: Number of processes that read images and fit boxes; with 0, this process does all
            of it.
        batches: Batches of items; the images of a batch go through the networks together.
        max_side_px: The longer side, in pixels, to which larger images are shrunk; None keeps all
            sizes.

    Raises:
        SpearError: A model cannot be made, or a worker was killed.
    """
    # What the error says when a worker is killed, most often because memory ran out
    advice = "use fewer --workers or a smaller --batch-size, and run the same command again"
    models = [make_model() for make_model in factories]
    num_ahead = workers + 1  # number of batches that are in progress at once, per stage
    read_batch = partial(read_and_encode_images, max_side_px=max_side_px)
    try:
        with processes.open_worker_pool(workers, __name__, advice) as pool:
            # A chain of generators: each one draws its batches from the one before.
            pending = processes.map_in_order(pool, read_batch, batches, num_ahead)
            for stage, model in zip(STAGES, models, strict=True):
                pending = _run_stage_on_all(stage, model, pending)
            yield from processes.map_in_order(pool, fit_boxes_of_packed_images, pending, num_ahead)
    finally:
        for model in models:
            _print_bill(model)


def _print_bill(model: Any) -> None:
    """Print what the use of a model costs, if the model knows."""
    bill = model.describe_costs_so_far() if hasattr(model, "describe_costs_so_far") else ""
    if bill:
        print(bill, flush=True)


def _run_stage(stage: Stage, model: Any, images: list[PendingImage]) -> list[PendingImage]:
    """Run a stage, which changes the images of a batch, and return the same images."""
    stage(images, model)
    return images


def _run_stage_on_all(
    stage: Stage, model: Any, batches: Iterable[list[PendingImage]]
) -> Iterator[list[PendingImage]]:
    """Run a stage on each batch, when the batch is needed."""
    for images in batches:
        yield _run_stage(stage, model, images)


class _StageActor:
    """A Ray actor that applies one stage to batches. It makes its model for the first batch."""

    def __init__(self, make_model: Callable[[], Any], stage: Stage) -> None:
        self.make_model = make_model
        self.stage = stage
        self.model: Any = None

    def run_stage(self, images: list[PendingImage]) -> list[PendingImage]:
        if self.model is None:
            self.model = self.make_model()
        return _run_stage(self.stage, self.model, images)


def run_ray(
    factories: ModelFactories,
    work: WorkOptions,
    batches: Iterable[Sequence[Item]],
    max_side_px: int | None = DEFAULT_MAX_SIDE_PX,
) -> Generator[LabeledBatch, None, None]:
    """Label batches with Ray.

    Ray connects to the cluster of RAY_ADDRESS or to the one that runs on this machine. If there is
    neither, a new one is started here.

    Args:
        factories: Functions that make the models.
        work: Its `replicas` and `gpus` say how many actors run each model, and how many GPUs each
            actor gets.
        batches: Batches of items; the images of a batch go through the networks together.
        max_side_px: The longer side, in pixels, to which larger images are shrunk; None keeps all
            sizes.

    Raises:
        SpearError: Ray is not installed, or a model cannot be made.
    """
    ray = import_optional("ray", "ray", "the ray engine")
    is_started_here = not ray.is_initialized()
    if is_started_here:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    try:
        actors_of_stages = _start_actors(ray, factories, work)
        reader = ray.remote(read_and_encode_images)
        finisher = ray.remote(fit_boxes_of_packed_images)
        # Keep all CPUs and actors busy (an actor has one batch in work and one waiting), and bound
        # the number of batches in memory.
        num_cpus = int(ray.cluster_resources().get("CPU", 1))
        max_ahead = num_cpus + 2 * sum(work.replicas)
        results: deque[Any] = deque()  # futures of labeled batches, in order
        for batch in batches:
            # `images` is a future. Ray passes it from stage to stage without waiting here.
            images = reader.remote(list(batch), max_side_px)
            for actors in actors_of_stages:
                images = next(actors).run_stage.remote(images)
            results.append(finisher.remote(images))
            if len(results) > max_ahead:
                yield ray.get(results.popleft())
        while results:
            yield ray.get(results.popleft())
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error  # the error that a stage raised in its process
    finally:
        if is_started_here:
            ray.shutdown()


ActorCycle = Iterator[Any]
"""The actors of one stage, in turn and without end."""


def _start_actors(ray: Any, factories: ModelFactories, work: WorkOptions) -> list[ActorCycle]:
    """Start the actors of each stage."""
    actors_of_stages: list[ActorCycle] = []
    stages = zip(factories, STAGES, work.replicas, work.gpus, strict=True)
    for make_model, stage, num_replicas, num_gpus in stages:
        # Reserve no CPUs for the actors: three actors would leave a small machine none for tasks.
        # -1 restarts an actor, and repeats its call, as often as needed.
        actor_class = ray.remote(
            num_cpus=0, num_gpus=num_gpus, max_restarts=-1, max_task_retries=-1
        )(_StageActor)
        actors = [actor_class.remote(make_model, stage) for _ in range(num_replicas)]
        actors_of_stages.append(cycle(actors))
    return actors_of_stages
