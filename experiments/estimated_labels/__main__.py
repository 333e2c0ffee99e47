"""How much accuracy does SPEAR-VLM lose when its labels are estimated?

    python -m experiments.estimated_labels make --scenes 13056 --out runs/proof
    python -m experiments.estimated_labels table --out runs/proof

`make` labels the same scenes from the ground truth and by the estimated path, and prints what to
run next. It writes OUT/true and OUT/estimated, as `spear train --labels` reads them. The estimated
path is the pipeline that labels photographs, fed with stand-ins for its models, whose errors depend
on the image alone:

    boxes    some objects are missed, the edges of the others are off by about a pixel
    masks    grown or shrunk by a pixel, the same all over an image
    depth    blurred over outlines, noisy, bent, and of a wrong scale: see
             `accuracy.make_wrong_depth`
    gravity  unknown, as in a photograph

Names are true: a detector that confuses objects is not part of this study. Labels are in meters, as
MoGe-2 gives them, so that models trained on either can be asked the same questions in meters. Depth
images under OUT/…/depth are true in both: they belong to stage 0, which the two trainings share, as
they share the bins of the 3D tokens.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from tyro.extras import SubcommandApp

from spear.cli import run_reporting_errors
from spear.errors import SpearError
from spear.labels.fit.accuracy import compare_labels
from spear.labels.fit.image import clip_boxes
from spear.labels.models.ground_truth import GroundTruth
from spear.labels.models.protocols import Detection, PointMapResult
from spear.labels.pipeline import label_images, label_with_ground_truth
from spear.labels.questions.generate import MIN_VISIBLE
from spear.labels.store import read_labels
from spear.models.presets import get_preset
from spear.sim.render import render_clutter_frame
from spear.sim_data.label_scenes import LabelFrames, label_scenes
from spear.types import Array, Frame, LabeledImage

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "labels"))
from accuracy import WrongMasks, make_wrong_depth  # noqa: E402

MISSED_FRACTION = 0.05  # of the objects (our choice)
BOX_EDGE_STD_PX = 1.0  # of the other objects' box edges (our choice)
VARIANTS = ("true", "estimated")
app = SubcommandApp()


class WrongBoxes:
    """True boxes; some are missing, all are a little off."""

    name = "wrong-boxes"

    def detect(self, frames: Sequence[Frame]) -> list[list[Detection]]:
        """As `spear.labels.models.protocols.Detector`."""
        detections = GroundTruth().detect(frames)
        return [self._change(*pair) for pair in zip(frames, detections, strict=True)]

    def _change(self, frame: Frame, detections: Sequence[Detection]) -> list[Detection]:
        rng = np.random.default_rng((1, get_seed(frame)))
        height, width = frame.image.shape[:2]
        changed = []
        for detection in detections:
            if rng.random() >= MISSED_FRACTION:
                box = detection.box2d + rng.normal(0, BOX_EDGE_STD_PX, 4)
                box = clip_boxes(box, height, width)
                changed.append(dataclasses.replace(detection, box2d=box))
        return changed


class WrongSizedMasks:
    """True masks, all of an image grown or all shrunk by a pixel."""

    name = "either-masks"

    def segment(
        self, frames: Sequence[Frame], detections: Sequence[Sequence[Detection]]
    ) -> list[Array]:
        """As `spear.labels.models.protocols.Segmenter`."""
        masks = []
        for frame, frame_detections in zip(frames, detections, strict=True):
            growth_px = -1 if get_seed(frame) % 2 else 1
            masks += WrongMasks(growth_px).segment([frame], [frame_detections])
        return masks


@dataclasses.dataclass
class WrongDepth:
    """True depth with the errors of a network.

    max_scale  largest factor by which its scale is off, either way.
    """

    max_scale: float
    name: str = "wrong-depth"

    def predict(self, frames: Sequence[Frame]) -> list[PointMapResult]:
        """As `spear.labels.models.protocols.PointMapModel`."""
        wrong_frames = []
        for frame in frames:
            wrong_frames.append(make_wrong_depth(frame, get_seed(frame), self.max_scale))
        return GroundTruth().predict(wrong_frames)


def get_seed(frame: Frame) -> int:
    """A number that depends on the image alone."""
    return zlib.crc32(frame.source.encode())


def estimate_labels(frames: Iterator[Frame], max_scale: float) -> Iterator[LabeledImage]:
    """Labels of frames by the path that photographs take."""
    photographs = (dataclasses.replace(frame, extrinsics=None) for frame in frames)
    return label_images(photographs, WrongBoxes(), WrongSizedMasks(), WrongDepth(max_scale))


@app.command
def make(  # noqa: PLR0913  the options of the command
    out: Path = Path("runs/proof"),
    scenes: int = 13_056,
    first_seed: int = 200_000,
    scale: float = 1.1,
    workers: int = 2,
    check: int = 100,
    init: str = "nano-vlm-0",
    moge: str = "nano-depth",
) -> None:
    """Label scenes both ways, compare the labels with the truth, and print the commands that train.

    Args:
        out: folder to write to; an interrupted run resumes.
        scenes: how many, seen by both cameras.
        first_seed: of the first.
        scale: the estimated depth of an image is off by this factor at most, either way.
        workers: processes.
        check: scenes on which the labels are compared with the truth.
        init: SPEAR-VLM after stage 0, for the commands.
        moge: the depth encoder after stage 0, for the commands.
    """
    image_sizes = dict(get_preset("nano").image_sizes)
    label_functions: dict[str, LabelFrames] = {
        "true": label_with_ground_truth,
        "estimated": partial(estimate_labels, max_scale=scale),
    }
    for variant, label_frames in label_functions.items():
        label_scenes(
            out / variant, scenes, image_sizes, first_seed, workers, label_frames=label_frames
        )
    print_accuracy(out, range(first_seed, first_seed + min(check, scenes)), image_sizes)
    print_commands(out, init, moge)


def print_accuracy(out: Path, seeds: range, image_sizes: Mapping[str, tuple[int, int]]) -> None:
    """Print how accurate the labels of the first scenes are."""
    print("| labels | view | boxes | centre | vertex | IoU | not found |")
    print("|---|---|---|---|---|---|---|")
    for view, size in image_sizes.items():
        frames = [render_clutter_frame(seed, view, size) for seed in seeds]
        for variant in VARIANTS:
            labels = islice(read_labels(out / variant / view), len(frames))
            accuracy = compare_labels(labels, frames, MIN_VISIBLE)
            print(
                f"| {variant} | {view} | {accuracy.n} | {1000 * accuracy.center:.1f} mm "
                f"| {1000 * accuracy.vertex:.1f} mm | {accuracy.iou:.2f} | {accuracy.missed} |"
            )


def print_commands(out: Path, init: str, moge: str) -> None:
    """Print the commands that train on both kinds of labels and ask the models."""
    print("\nspear train and evaluate, for each:")
    for variant in VARIANTS:
        labels = out / variant
        stage_1 = out / f"{variant}-vlm-1"
        stage_2 = out / f"{variant}-vlm-2"
        scores = out / f"{variant}-scores"
        print(
            f"spear train nano-vlm-1 --labels {labels} --out {stage_1} --init {init} "
            f"--init-depth-encoder {moge}"
        )
        print(
            f"spear train nano-vlm-2 --steps 1500 --labels {labels} --out {stage_2} "
            f"--init {stage_1}"
        )
        print(f"spear evaluate vqa --model {stage_2} --labels sim --num-images 200 --out {scores}")


@app.command
def table(out: Path = Path("runs/proof")) -> None:
    """Compare what `spear evaluate vqa` found for the two models.

    Args:
        out: folder of `make`, with the scores in OUT/true-scores and OUT/estimated-scores.
    """
    scores = []
    for variant in VARIANTS:
        path = out / f"{variant}-scores" / "scores.json"
        if not path.is_file():
            raise SpearError(f"{path}: no scores: run the commands that `make` has printed")
        scores.append(json.loads(path.read_text())["families"])

    true_scores, estimated_scores = scores
    print("| question | n | true labels | estimated labels | ratio |\n|---|---|---|---|---|")
    for family, true_score in true_scores.items():
        is_in_image = family == "back_projection"
        measure = "relative" if is_in_image else "error"
        unit = "%" if is_in_image else "mm"
        medians = [true_score["measures"][measure], estimated_scores[family]["measures"][measure]]
        cells = []
        for median in medians:
            interval = f"[{median['low']:.1f}, {median['high']:.1f}]"
            cells.append(f"{median['value']:.1f} {unit} {interval}")
        ratio = medians[1]["value"] / medians[0]["value"]
        question = family.replace("_", " ")
        print(f"| {question} | {true_score['n']} | {' | '.join(cells)} | {ratio:.2f} |")


if __name__ == "__main__":
    sys.exit(run_reporting_errors(app.cli))
