"""How many 3D tokens, and which: bins at quantiles (the paper) or equally wide, 256, 1,024 or 4,096
of them.

    python -m experiments.tokenizer quantise --labels runs/labels/external   # rounding alone
    python -m experiments.tokenizer commands --labels runs/labels            # what to train
    python -m experiments.tokenizer table --out runs/tokenizer               # the results

All trainings start from the same stage 0 (which has not used its 3D tokens), with the same seed,
data and steps. `coordinate_smoothing` is 2 bins at 1,024 and the same share of the bins at other
counts. A command that is run again continues, or does nothing when it is done, as far as `spear
train` does; those whose result is there are not printed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from itertools import islice, product
from pathlib import Path
from typing import Annotated, get_args

import numpy as np
import tyro
from tyro.extras import SubcommandApp

from spear.cli import run_reporting_errors
from spear.errors import SpearError
from spear.evaluate.vqa.measures import compute_error_scales
from spear.labels.fit.box3d import compute_iou_3d, fit_nearest_box
from spear.labels.questions.statistics import compute_token_usage
from spear.labels.questions.store import generate_label_questions
from spear.labels.store import read_labels
from spear.tokens import BinSpacing, CoordinateTokenizer
from spear.types import Array, LabeledImage, Question, Unit

BINS = (256, 1024, 4096)
SPACINGS: tuple[BinSpacing, ...] = get_args(BinSpacing)
ARMS = [(spacing, bins) for spacing, bins in product(SPACINGS, BINS)]
FAMILIES = ("box_vertices", "keypoint", "offset", "distance")
"""Families whose numbers are points or distances: what rounding does to them can be said in one
number.
"""
SMOOTHING = 2.0 / 1024
app = SubcommandApp()
Labels = Annotated[Path, tyro.conf.arg(metavar="FOLDER")]


@app.command
def quantise(
    labels: Labels = Path("runs/labels/external"), images: int = 1000, per_image: int = 8
) -> None:
    """Fit bins to the answers about every other image, round those about the others, and print what
    is lost.

    Args:
        labels: folder of label shards.
        images: at most so many, the first.
        per_image: questions about each.
    """
    found = list(islice(read_labels(labels, pixels=False), images))
    asked = [_asked(label, per_image) for label in found]
    fitted = np.concatenate([q.values for some in asked[::2] for _, q in some])
    tested = [pair for some in asked[1::2] for pair in some]
    print(
        f"{len(fitted):,} numbers fitted, {sum(len(q.values) for _, q in tested):,} tested, "
        f"{len(found):,} images\n"
    )
    print(
        "| bins | 3D tokens | number, median | mean | 99 % below | point, median | of the distance | "
        "IoU of boxes "
        "| evenness of use | outside |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    unit = found[0].unit
    for spacing, bins in ARMS:
        print(_row(CoordinateTokenizer.fit(fitted, bins, unit, spacing), spacing, tested, unit))


def _asked(label: LabeledImage, per_image: int) -> list[tuple[LabeledImage, Question]]:
    return [
        (label, q) for q in generate_label_questions(label, 0, (per_image, per_image), FAMILIES)
    ]


def _row(
    tokens: CoordinateTokenizer,
    spacing: BinSpacing,
    tested: Sequence[tuple[LabeledImage, Question]],
    unit: Unit,
) -> str:
    factor, name = (1000, "mm") if unit == "metre" else (1, "units")
    values = np.concatenate([q.values for _, q in tested])
    use = compute_token_usage(values.tolist(), tokens)
    lost = factor * np.abs(tokens.decode(tokens.encode(values)) - values)
    points: list[float] = []
    relative: list[float] = []
    overlap: list[float] = []
    for label, question in tested:
        truth = np.array(question.values)
        rounded = np.asarray(tokens.decode(tokens.encode(truth)))
        apart = np.linalg.norm(_points(rounded) - _points(truth), axis=1).mean()
        points.append(factor * apart)
        relative.append(100 * apart / compute_error_scales(question, label)[0])
        if question.family == "box_vertices" and len(overlap) < 200:
            overlap.append(
                compute_iou_3d(fit_nearest_box(_points(rounded)), fit_nearest_box(_points(truth)))
            )
    return (
        f"| {spacing} | {tokens.num_bins:,} | {np.median(lost):.2f} {name} | {lost.mean():.2f} | "
        f"{np.quantile(lost, 0.99):.1f} | {np.median(points):.1f} {name} | {np.median(relative):.2f} % | "
        f"{np.mean(overlap):.2f} | {use.evenness:.2f} | {use.outside} |"
    )


def _points(values: Array) -> Array:
    return values.reshape(-1, 3) if len(values) % 3 == 0 else values[:, None]


@app.command
def commands(
    labels: Labels = Path("runs/labels"),
    out: Path = Path("runs/tokenizer"),
    init: str = "nano-vlm-0",
    moge: str = "nano-depth",
    steps: int = 2000,
    images: int = 300,
) -> None:
    """Print what to run, one line per stage and tokenizer; a quiet machine takes about a quarter of
    an hour for each.

    Args:
        labels: folder of labelled images to learn from, with a sub-folder per view.
        out: folder for the results.
        init: SPEAR-VLM after stage 0.
        moge: the depth encoder after stage 0.
        steps: of stage 2 (stage 1 has the recipe's).
        images: held-out scenes to ask about.
    """
    for name, spacing, bins in _arms():
        one, two = out / f"{name}-1", out / f"{name}-2"
        smooth = f"coordinate_smoothing={bins * SMOOTHING:g}"
        if not (one / "final").is_dir():
            print(
                f"spear train nano-vlm-1 --labels {labels} --out {one} --init {init} --moge {moge} "
                f"--set bins={bins} spacing={spacing} {smooth}"
            )
        if not (two / "final").is_dir():
            print(
                f"spear train nano-vlm-2 --labels {labels} --out {two} --init {one} --steps {steps} "
                f"--set {smooth}"
            )
        if not (out / name / "scores.json").is_file():
            print(f"spear evaluate vqa {two} sim --images {images} --out {out / name}")


@app.command
def table(out: Path = Path("runs/tokenizer")) -> None:
    """Print what `spear evaluate vqa` found for every tokenizer that is done.

    Args:
        out: folder of `commands`.
    """
    rows = []
    for name, spacing, bins in _arms():
        path = out / name / "scores.json"
        if path.is_file():
            rows.append((spacing, bins, json.loads(path.read_text())["families"]))
    if not rows:
        raise SpearError(f"{out}: no scores: run the commands that `commands` prints")
    print(
        f"| bins | 3D tokens | {' | '.join(f.replace('_', ' ') for f in FAMILIES)} | IoU of boxes |"
    )
    print(f"|---|---|{'---|' * (len(FAMILIES) + 1)}")
    for spacing, bins, families in rows:
        errors = [families[f]["measures"]["error"] for f in FAMILIES]
        cells = [f"{e['value']:.1f} mm [{e['low']:.1f}, {e['high']:.1f}]" for e in errors]
        overlap = families["box_vertices"]["measures"]["iou"]["value"]
        print(f"| {spacing} | {bins:,} | {' | '.join(cells)} | {overlap:.2f} |")


def _arms() -> Iterator[tuple[str, BinSpacing, int]]:
    for spacing, bins in ARMS:
        yield f"{spacing}-{bins}", spacing, bins


if __name__ == "__main__":
    sys.exit(run_reporting_errors(app.cli))
