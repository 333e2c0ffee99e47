"""Labels to look at: a page with a contact sheet and statistics, and a file for the Rerun viewer."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np

from spear.errors import import_optional
from spear.labels.fit.box3d import BOX_EDGES
from spear.labels.models.protocols import PointMapResult
from spear.labels.questions.generate import find_exclusion_reasons, format_answer
from spear.labels.questions.statistics import (
    LabelStatistics,
    compute_statistics,
    compute_token_usage,
    count_skip_reasons,
)
from spear.labels.questions.store import generate_label_questions, read_questions
from spear.labels.store import read_labels
from spear.report.draw import colors, draw_label
from spear.report.page import render, spaced
from spear.report.plot import histogram
from spear.tokens import CoordinateTokenizer
from spear.types import LabeledImage, Question, Segments
from spear.util.files import write_bytes, write_text
from spear.util.images import decode_image, to_jpeg_data_uri

WIDTH = 640
"""Pixels across of a picture on the sheet, at least."""
SHOWN_BINS = 64
"""Bars of the chart of token use; each stands for as many neighbouring tokens."""
MOST_POINTS = 60_000
"""Points of a cloud that the Rerun file keeps."""


def label_page(folder: Path, shown: Sequence[LabeledImage], out: Path) -> None:
    """Write one self-contained page about a folder of labels to the file `out`, whole or not at all.

    folder  shards, and questions beside them if they were written; else those of seed 0 are made up.
    shown   the labels on the contact sheet.

    Raises SpearError for no labels, or labels of several units.
    """
    found = compute_statistics(read_labels(folder, pixels=False))
    questions, written = _questions(folder)
    families = Counter(q.family for some in questions.values() for q in some)
    skipped = count_skip_reasons(folder)
    names = Counter(
        name for some in questions.values() for q in some for name in q.objects
    ).most_common()
    html = render(
        "labels.html",
        title=f"3D labels: {folder.resolve().name}",
        facts=[
            (f"{found.num_images:,}", "labelled images"),
            (
                f"{found.num_objects:,}",
                f"objects, {found.num_boxes:,} with a 3D box, {found.num_askable:,} to ask about",
            ),
            (
                f"{families.total():,}",
                f"questions{'' if written else ', none of them written yet'}",
            ),
            (f"{skipped.total():,}", "images skipped"),
        ],
        found=found,
        cards=[_card(label, questions[label.source]) for label in shown],
        histograms=_histograms(found),
        names=_rows(found.names)[:20],
        reasons=_rows(found.reasons),
        families=[(spaced(name), count) for name, count in _rows(families)],
        most=names[:1],
        least=names[-1:],
        tokens=_tokens(questions),
        skipped=_rows(skipped),
    )
    write_text(out, html)


def say(answer: Segments, label: LabeledImage, width: int) -> str:
    """An answer about `label`, in its unit, as a person reads it, in at most so many letters."""
    return shorten(
        format_answer(answer, label.unit, (label.width, label.height)), width, placeholder=" …"
    )


def _questions(folder: Path) -> tuple[Mapping[str, list[Question]], bool]:
    """Source of an image -> the questions about it; and whether they were written, not made up."""
    questions: dict[str, list[Question]] = defaultdict(list)
    for source, question in read_questions(folder):
        questions[source].append(question)
    written = bool(questions)
    if not written:
        for label in read_labels(folder, pixels=False):
            questions[label.source] = generate_label_questions(label, seed=0)
    return questions, written


def _card(label: LabeledImage, questions: Sequence[Question]) -> dict[str, Any]:
    """An image with all that is known of it, what is asked about it, and the answers."""
    why = zip(label.objects, find_exclusion_reasons(label), strict=True)
    return {
        "source": label.source,
        "image": to_jpeg_data_uri(
            draw_label(label, max(1, round(WIDTH / label.width)), masks=True)
        ),
        "questions": [(q.prompt, say(q.segments, label, 150)) for q in questions],
        "left_out": [f"{o.name} ({', '.join(reasons)})" for o, reasons in why if reasons],
    }


def _histograms(found: LabelStatistics) -> list[tuple[str, str]]:
    unit = "m" if found.unit == "metre" else "the image's own unit"
    spreads = {f"Distance from the camera ({unit})": found.distances}
    spreads |= {f"Longest side of the box ({unit})": found.sizes}
    spreads |= {f"Score: {name}": values for name, values in found.scores.items()}
    counted = [
        (title, *np.histogram(values, bins=40)) for title, values in spreads.items() if values
    ]
    return [(t, histogram(n.tolist(), f"{at[0]:.3g}", f"{at[-1]:.3g}")) for t, n, at in counted]


def _rows(counts: Counter[str]) -> list[tuple[str, str]]:
    return [(name, f"{n:,}") for name, n in counts.most_common()]


def _tokens(questions: Mapping[str, Sequence[Question]]) -> dict[str, Any] | None:
    """How often each 3D token, fitted to the answers about every other image, occurs in those about the rest;
    None where these hold too few numbers to fit any."""
    numbers = [[v for q in asked for v in q.values] for asked in questions.values()]
    fitted = [v for image in numbers[::2] for v in image]
    if len(set(fitted)) < 2:
        return None
    tokenizer = CoordinateTokenizer.fit(fitted)
    use = compute_token_usage([v for image in numbers[1::2] for v in image], tokenizer)
    grouped = [int(some.sum()) for some in np.array_split(np.array(use.counts), SHOWN_BINS)]
    chart = histogram(grouped, "lowest", "highest")
    return {"bins": tokenizer.num_bins, "use": use, "chart": chart, "numbers": sum(use.counts)}


def write_rerun(
    labels: Sequence[LabeledImage], clouds: Sequence[PointMapResult | None], out: Path
) -> None:
    """Write `out` (.rrd), whole or not at all: pictures, boxes, key points and clouds, one step of the
    timeline "image" per label.

    clouds  the point map of each label, or None where it is not at hand.

    Raises SpearError where rerun-sdk is not installed, and for a file that cannot be written.
    """
    rr = import_optional("rerun", "view", "the Rerun viewer")
    stream = rr.RecordingStream("spear labels")
    held = stream.memory_recording()
    stream.log("camera", rr.ViewCoordinates.RDF, static=True)
    for number, (label, cloud) in enumerate(zip(labels, clouds, strict=True)):
        stream.set_time("image", sequence=number)
        size = [label.width, label.height]
        stream.log("camera/image", rr.Pinhole(image_from_camera=label.intrinsics, resolution=size))
        stream.log("camera/image", rr.EncodedImage(contents=label.image, media_type="image/jpeg"))
        stream.log("source", rr.TextDocument(label.source))
        tinted = zip(label.objects, colors(len(label.objects)), strict=True)
        boxed = [(o, o.box3d, c) for o, c in tinted if o.box3d is not None]
        edges = [(box.vertices[list(pair)], o.name, c) for o, box, c in boxed for pair in BOX_EDGES]
        points = [
            (p, f"{o.name}: {kind}", c) for o, _, c in boxed for kind, p in o.keypoints.items()
        ]
        radii: Any = {"radii": rr.Radius.ui_points(4)}
        drawn: Any = (
            ("boxes", edges, rr.LineStrips3D, {}),
            ("keypoints", points, rr.Points3D, radii),
        )
        for what, some, shape, look in drawn:
            at, names, tints = zip(*some, strict=True) if some else ((), (), ())
            stream.log(
                f"camera/{what}", shape(at, labels=names, colors=tints, show_labels=False, **look)
            )
        if cloud is None:
            stream.log("camera/points", rr.Clear(recursive=False))
        else:
            every = max(1, np.count_nonzero(cloud.mask) // MOST_POINTS)
            colours = decode_image(label.image)[cloud.mask][::every]
            stream.log(
                "camera/points", rr.Points3D(cloud.points[cloud.mask][::every], colors=colours)
            )
    write_bytes(out, held.drain_as_bytes())
