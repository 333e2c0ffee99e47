"""How many 3D tokens should there be, and which intervals should they stand for?

    python -m experiments.tokenizer quantise --labels runs/labels/external   # rounding alone
    python -m experiments.tokenizer commands --labels runs/labels            # what to train
    python -m experiments.tokenizer table --out runs/tokenizer               # the results

Compared are bins at quantiles (the paper) and of equal width, 256, 1,024 and 4,096 of them. All
trainings start from the same stage 0 (which has not used its 3D tokens), with the same seed, data
and steps. `coordinate_smoothing` is 2 bins at 1,024 and the same fraction of the bins at other
counts. A command that is run again resumes as far as `spear train` does; commands whose result is
there are not printed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import tyro
from tyro.extras import SubcommandApp

from spear.cli import run_reporting_errors
from spear.errors import SpearError
from spear.evaluate.vqa.measures import compute_error_scales
from spear.labels.fit.box3d import compute_iou_3d, fit_nearest_box
from spear.labels.questions.statistics import compute_token_usage
from spear.labels.questions.store import generate_questions_from_seed
from spear.labels.store import read_labels
from spear.tokens import BinSpacing, CoordinateTokenizer
from spear.types import Array, LabeledImage, Question, Unit


@dataclass(frozen=True)
class Variant:
    """One way to choose the 3D tokens."""

    spacing: BinSpacing
    num_bins: int

    @property
    def name(self) -> str:
        return f"{self.spacing}-{self.num_bins}"


SPACINGS: tuple[BinSpacing, ...] = get_args(BinSpacing)
NUM_BINS = (256, 1024, 4096)
VARIANTS = [Variant(spacing, bins) for spacing, bins in product(SPACINGS, NUM_BINS)]
FAMILIES = ("box_vertices", "keypoint", "offset", "distance")
"""Their numbers are points or distances, so that one number tells what rounding does."""
SMOOTHED_FRACTION = 2.0 / 1024  # of the bins
MAX_OVERLAPS = 200  # boxes of which the overlap is computed

app = SubcommandApp()
Labels = Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
LabeledQuestion = tuple[LabeledImage, Question]


@app.command
def quantise(
    labels: Labels = Path("runs/labels/external"), images: int = 1000, per_image: int = 8
) -> None:
    """Fit bins to the answers about every other image, round those about the others, and print what
    is lost.

    Args:
        labels: folder of label shards.
        images: maximum number of images, the first ones.
        per_image: questions about each.
    """
    loaded_labels = list(islice(read_labels(labels, pixels=False), images))
    fitted_values: list[float] = []
    tested: list[LabeledQuestion] = []
    for index, label in enumerate(loaded_labels):
        questions = generate_questions_from_seed(label, 0, (per_image, per_image), FAMILIES)
        for question in questions:
            if index % 2 == 0:
                fitted_values += question.values
            else:
                tested.append((label, question))

    num_tested = sum(len(question.values) for _, question in tested)
    print(
        f"{len(fitted_values):,} numbers fitted, {num_tested:,} tested, "
        f"{len(loaded_labels):,} images\n"
    )
    print(
        "| bins | 3D tokens | number, median | mean | 99 % below | point, median "
        "| of the distance | IoU of boxes | evenness of use | outside |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    unit = loaded_labels[0].unit
    for variant in VARIANTS:
        tokenizer = CoordinateTokenizer.fit(
            np.array(fitted_values), variant.num_bins, unit, variant.spacing
        )
        print(describe_rounding(tokenizer, variant, tested, unit))


def describe_rounding(
    tokenizer: CoordinateTokenizer,
    variant: Variant,
    tested: Sequence[LabeledQuestion],
    unit: Unit,
) -> str:
    """What a tokenizer loses by rounding, as a line of the table."""
    factor = 1000 if unit == "metre" else 1
    unit_name = "mm" if unit == "metre" else "units"
    values = np.concatenate([question.values for _, question in tested])
    usage = compute_token_usage(values.tolist(), tokenizer)
    errors = factor * np.abs(tokenizer.decode(tokenizer.encode(values)) - values)

    point_errors = []
    relative_errors = []
    overlaps: list[float] = []
    for label, question in tested:
        truth = np.array(question.values)
        rounded = np.asarray(tokenizer.decode(tokenizer.encode(truth)))
        true_points = to_points(truth)
        rounded_points = to_points(rounded)
        distance = np.linalg.norm(rounded_points - true_points, axis=1).mean()
        point_errors.append(factor * distance)
        relative_errors.append(100 * distance / compute_error_scales(question, label)[0])
        if question.question_type == "box_vertices" and len(overlaps) < MAX_OVERLAPS:
            rounded_box = fit_nearest_box(rounded_points)
            overlaps.append(compute_iou_3d(rounded_box, fit_nearest_box(true_points)))
    cells = [
        variant.spacing,
        f"{tokenizer.num_bins:,}",
        f"{np.median(errors):.2f} {unit_name}",
        f"{errors.mean():.2f}",
        f"{np.quantile(errors, 0.99):.1f}",
        f"{np.median(point_errors):.1f} {unit_name}",
        f"{np.median(relative_errors):.2f} %",
        f"{np.mean(overlaps):.2f}",
        f"{usage.evenness:.2f}",
        f"{usage.num_outside}",
    ]
    return f"| {' | '.join(cells)} |"


def to_points(values: Array) -> Array:
    """Points [n, 3]; a distance is a point of one number."""
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
    """Print what to run, one line per stage and tokenizer. Each takes about a quarter of an hour.

    Args:
        labels: folder of labeled images to learn from, with a sub-folder per view.
        out: folder for the results.
        init: SPEAR-VLM after stage 0.
        moge: the depth encoder after stage 0.
        steps: of stage 2 (stage 1 has the recipe's).
        images: held-out scenes to ask about.
    """
    for variant in VARIANTS:
        stage_1 = out / f"{variant.name}-1"
        stage_2 = out / f"{variant.name}-2"
        smoothing = f"coordinate_smoothing={variant.num_bins * SMOOTHED_FRACTION:g}"
        if not (stage_1 / "final").is_dir():
            print(
                f"spear train nano-vlm-1 --labels {labels} --out {stage_1} --init {init} "
                f"--init-depth-encoder {moge} "
                f"--set bins={variant.num_bins} spacing={variant.spacing} {smoothing}"
            )
        if not (stage_2 / "final").is_dir():
            print(
                f"spear train nano-vlm-2 --labels {labels} --out {stage_2} --init {stage_1} "
                f"--steps {steps} --set {smoothing}"
            )
        scores = out / variant.name
        if not (scores / "scores.json").is_file():
            print(
                f"spear evaluate vqa --model {stage_2} --labels sim --num-images {images} "
                f"--out {scores}"
            )


@app.command
def table(out: Path = Path("runs/tokenizer")) -> None:
    """Print what `spear evaluate vqa` found for every tokenizer that is done.

    Args:
        out: folder of `commands`.
    """
    scores: dict[Variant, Any] = {}
    for variant in VARIANTS:
        path = out / variant.name / "scores.json"
        if path.is_file():
            scores[variant] = json.loads(path.read_text())["families"]
    if not scores:
        raise SpearError(f"{out}: no scores: run the commands that `commands` prints")

    headers = " | ".join(family.replace("_", " ") for family in FAMILIES)
    print(f"| bins | 3D tokens | {headers} | IoU of boxes |")
    print(f"|---|---|{'---|' * (len(FAMILIES) + 1)}")
    for variant, families in scores.items():
        cells = []
        for family in FAMILIES:
            error = families[family]["measures"]["error"]
            cells.append(f"{error['value']:.1f} mm [{error['low']:.1f}, {error['high']:.1f}]")
        iou = families["box_vertices"]["measures"]["iou"]["value"]
        print(f"| {variant.spacing} | {variant.num_bins:,} | {' | '.join(cells)} | {iou:.2f} |")


if __name__ == "__main__":
    sys.exit(run_reporting_errors(app.cli))
