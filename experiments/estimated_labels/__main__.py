"""What estimated labels cost SPEAR-VLM: the same scenes, labelled from the truth and by the
estimated path.

    python -m experiments.estimated_labels make --scenes 13056 --out runs/proof    # prints what to
    run next python -m experiments.estimated_labels table --out runs/proof

`make` writes OUT/true and OUT/estimated, as `spear train --labels` reads them. The estimated path
is the pipeline that labels photographs, fed with stand-ins for its models, whose errors depend on
the image alone:

    boxes   some objects are not found, the edges of the others are off by about a pixel
    masks   grown or shrunk by a pixel, the same all over an image
    depth   blurred over outlines, noisy, bent, and of a scale that is off: see
            `accuracy.make_wrong_depth`
    gravity unknown, as in a photograph

Names are true: a detector that mixes things up is not part of this. Labels are in metres, as MoGe-2
gives them, so that models trained on either can be asked the same questions in metres. Depth images
under OUT/…/depth are true in
both: they belong to stage 0, which the two trainings share, as they share the bins of the 3D
    tokens.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from tyro.extras import SubcommandApp

from spear.cli import run_reporting_errors
from spear.errors import SpearError
from spear.labels.fit.image import clip_boxes
from spear.labels.fit.quality import MIN_VISIBLE, compare_labels
from spear.labels.models.ground_truth import GroundTruth
from spear.labels.models.protocols import Detection, PointMapResult
from spear.labels.pipeline import label_images, label_with_ground_truth
from spear.labels.store import read_labels
from spear.models.presets import get_preset
from spear.sim.render import render_clutter_frame
from spear.sim_data.label_scenes import LabelFrames, label_scenes
from spear.types import Array, Frame, LabeledImage

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "labels"))
from accuracy import WrongMasks, make_wrong_depth  # noqa: E402

MISSED, OFF = 0.05, 1.0
"""Fraction of objects that are not found; standard deviation of the others' box edges, pixels (our
choice)."""
ARMS = ("true", "estimated")
app = SubcommandApp()


class WrongBoxes:
    """True boxes, some missing, all a little off."""

    name = "wrong-boxes"

    def detect(self, frames: Sequence[Frame]) -> list[list[Detection]]:
        """As `spear.labels.models.protocols.Detector`."""
        found = GroundTruth().detect(frames)
        return [self._change(*pair) for pair in zip(frames, found, strict=True)]

    def _change(self, frame: Frame, found: Sequence[Detection]) -> list[Detection]:
        rng = np.random.default_rng((1, _seed(frame)))
        height, width = frame.image.shape[:2]
        return [
            dataclasses.replace(d, box2d=clip_boxes(d.box2d + rng.normal(0, OFF, 4), height, width))
            for d in found
            if rng.random() >= MISSED
        ]


class EitherMasks:
    """True masks, all of an image grown or all shrunk by a pixel."""

    name = "either-masks"

    def segment(
        self, frames: Sequence[Frame], detections: Sequence[Sequence[Detection]]
    ) -> list[Array]:
        """As `spear.labels.models.protocols.Segmenter`."""
        return [
            WrongMasks(-1 if _seed(frame) % 2 else 1).segment([frame], [found])[0]
            for frame, found in zip(frames, detections, strict=True)
        ]


@dataclasses.dataclass
class WrongDepth:
    """True depth with the errors of a network; its scale is off by `most_scale` at most, either
    way.
    """

    most_scale: float
    name: str = "wrong-depth"

    def predict(self, frames: Sequence[Frame]) -> list[PointMapResult]:
        """As `spear.labels.models.protocols.PointMapModel`."""
        return GroundTruth().predict(
            [make_wrong_depth(f, _seed(f), self.most_scale) for f in frames]
        )


def _seed(frame: Frame) -> int:
    return zlib.crc32(frame.source.encode())


def estimated(frames: Iterator[Frame], most_scale: float) -> Iterator[LabeledImage]:
    """Labels of frames by the path that photographs take."""
    unaided = (dataclasses.replace(frame, extrinsics=None) for frame in frames)
    return label_images(unaided, WrongBoxes(), EitherMasks(), WrongDepth(most_scale))


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
    """Label scenes both ways, say how true the labels are, and print the commands that train on
    them.

    Args:
        out: folder to write to; an interrupted run continues.
        scenes: how many, seen by both cameras.
        first_seed: of the first.
        scale: the estimated depth of an image is off by this factor at most, either way.
        workers: processes.
        check: scenes on which the labels are compared with the truth.
        init: SPEAR-VLM after stage 0, for the commands.
        moge: the depth encoder after stage 0, for the commands.
    """
    sizes = dict(get_preset("nano").image_sizes)
    ways: tuple[LabelFrames, ...] = (label_with_ground_truth, partial(estimated, most_scale=scale))
    for arm, how in zip(ARMS, ways, strict=True):
        label_scenes(out / arm, scenes, sizes, first_seed, workers, label_frames=how)
    checked = range(first_seed, first_seed + min(check, scenes))
    print(
        "| labels | view | boxes | centre | vertex | IoU | not found |\n|---|---|---|---|---|---|---|"
    )
    for view, size in sizes.items():
        frames = [render_clutter_frame(seed, view, size) for seed in checked]
        for arm in ARMS:
            a = compare_labels(
                islice(read_labels(out / arm / view), len(frames)), frames, MIN_VISIBLE
            )
            print(
                f"| {arm} | {view} | {a.n} | {1000 * a.center:.1f} mm | {1000 * a.vertex:.1f} mm | "
                f"{a.iou:.2f} "
                f"| {a.missed} |"
            )
    print("\nspear train and evaluate, for each:")
    for arm in ARMS:
        one, two = out / f"{arm}-vlm-1", out / f"{arm}-vlm-2"
        print(
            f"spear train nano-vlm-1 --labels {out / arm} --out {one} --init {init} --moge {moge}"
        )
        print(f"spear train nano-vlm-2 --steps 1500 --labels {out / arm} --out {two} --init {one}")
        print(f"spear evaluate vqa {two} sim --images 200 --out {out / f'{arm}-scores'}")


@app.command
def table(out: Path = Path("runs/proof")) -> None:
    """Compare what `spear evaluate vqa` found for the two models.

    Args:
        out: folder of `make`, with the scores in OUT/true-scores and OUT/estimated-scores.
    """
    scores = []
    for arm in ARMS:
        path = out / f"{arm}-scores" / "scores.json"
        if not path.is_file():
            raise SpearError(f"{path}: no scores: run the commands that `make` has printed")
        scores.append(json.loads(path.read_text())["families"])
    print(
        f"| question | n | {' | '.join(f'{arm} labels' for arm in ARMS)} | ratio |\n|---|---|---|---|---|"
    )
    for family, true in scores[0].items():
        unit, name = ("%", "relative") if family == "back_projection" else ("mm", "error")
        medians = [some[family]["measures"][name] for some in scores]
        cells = [f"{m['value']:.1f} {unit} [{m['low']:.1f}, {m['high']:.1f}]" for m in medians]
        ratio = medians[1]["value"] / medians[0]["value"]
        print(f"| {family.replace('_', ' ')} | {true['n']} | {' | '.join(cells)} | {ratio:.2f} |")


if __name__ == "__main__":
    sys.exit(run_reporting_errors(app.cli))
