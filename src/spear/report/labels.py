"""Shows labels: as a page with a contact sheet and statistics, and as a file for the Rerun viewer.

The contact sheet has a *card* for each shown image: the image with its labels, and its questions.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

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
from spear.labels.questions.store import generate_questions_from_seed, read_questions
from spear.labels.store import read_labels
from spear.report.draw import draw_label, make_palette
from spear.report.page import render, replace_underscores
from spear.report.plot import draw_histogram
from spear.tokens import CoordinateTokenizer
from spear.types import LabeledImage, Question, Segments
from spear.util.files import write_bytes, write_text
from spear.util.images import decode_image, to_jpeg_data_uri

QuestionsBySource = Mapping[str, Sequence[Question]]

MIN_IMAGE_WIDTH_PX = 640  # about; images on the contact sheet are enlarged by whole numbers
NUM_TOKEN_BARS = 64  # in the chart of token use; each bar stands for several neighboring tokens
NUM_HISTOGRAM_BARS = 40
MAX_LISTED_NAMES = 20  # of objects, the most frequent first
MAX_ANSWER_CHARS = 150  # longer answers are cut off
MAX_CLOUD_POINTS = 60_000  # about; a larger point cloud is thinned out in the Rerun file
KEYPOINT_RADIUS = 4  # pixels on the screen


def write_label_page(folder: Path, shown_labels: Sequence[LabeledImage], out: Path) -> None:
    """Write one self-contained page about a folder of labels; the file is complete or not there.

    Args:
        folder: the folder of the labels' shards. If it has no questions, the page shows the
            questions that seed 0 generates.
        shown_labels: the labels on the contact sheet.
        out: the HTML file.

    Raises:
        SpearError: the folder has no labels, or labels of several units.
    """
    statistics = compute_statistics(read_labels(folder, pixels=False))
    questions_by_source, are_written = _load_or_generate_questions(folder)
    num_by_type: Counter[str] = Counter()
    for questions in questions_by_source.values():
        num_by_type.update(question.question_type for question in questions)
    num_by_name = _count_asked_names(questions_by_source).most_common()
    num_by_skip_reason = count_skip_reasons(folder)

    questions_note = "" if are_written else ", none of them written yet"
    facts = [
        (f"{statistics.num_images:,}", "labeled images"),
        (
            f"{statistics.num_objects:,}",
            f"objects, {statistics.num_boxes:,} with a 3D box, "
            f"{statistics.num_askable:,} to ask about",
        ),
        (f"{num_by_type.total():,}", f"questions{questions_note}"),
        (f"{num_by_skip_reason.total():,}", "images skipped"),
    ]
    question_type_rows = [
        (replace_underscores(question_type), count)
        for question_type, count in _format_counts(num_by_type)
    ]
    html = render(
        "labels.html",
        title=f"3D labels: {folder.resolve().name}",
        facts=facts,
        statistics=statistics,
        cards=[_make_card(label, questions_by_source[label.source]) for label in shown_labels],
        histograms=_draw_histograms(statistics),
        names=_format_counts(statistics.names)[:MAX_LISTED_NAMES],
        reasons=_format_counts(statistics.reasons),
        question_types=question_type_rows,
        # One pair of name and count each, or none if there are no questions.
        most=num_by_name[:1],
        least=num_by_name[-1:],
        tokens=_summarize_token_use(questions_by_source),
        skipped=_format_counts(num_by_skip_reason),
    )
    write_text(out, html)


def format_answer_briefly(answer: Segments, label: LabeledImage, max_chars: int) -> str:
    """Format an answer about a labeled image, in at most `max_chars` characters.

    Lengths are in the unit of the label.
    """
    text = format_answer(answer, label.unit, (label.width, label.height))
    return shorten(text, max_chars, placeholder=" …")


class _LoadedQuestions(NamedTuple):
    """Questions about the images in a folder.

    by_source    source of an image → the questions about it.
    are_written  whether the folder had them; otherwise they were generated.
    """

    by_source: QuestionsBySource
    are_written: bool


def _load_or_generate_questions(folder: Path) -> _LoadedQuestions:
    """Load the questions in a folder of labels, or generate them if there are none."""
    questions: dict[str, list[Question]] = defaultdict(list)
    for source, question in read_questions(folder):
        questions[source].append(question)
    if questions:
        return _LoadedQuestions(questions, are_written=True)
    for label in read_labels(folder, pixels=False):
        questions[label.source] = generate_questions_from_seed(label, seed=0)
    return _LoadedQuestions(questions, are_written=False)


def _count_asked_names(questions_by_source: QuestionsBySource) -> Counter[str]:
    """Count how often each object's name is asked about."""
    counts: Counter[str] = Counter()
    for questions in questions_by_source.values():
        for question in questions:
            counts.update(question.objects)
    return counts


def _make_card(label: LabeledImage, questions: Sequence[Question]) -> dict[str, Any]:
    """Return the values of a card: the image with its labels, the questions, and the answers.

    The card also lists the objects about which no questions are asked, with the reasons.
    """
    scale = max(1, round(MIN_IMAGE_WIDTH_PX / label.width))
    questions_and_answers = []
    for question in questions:
        answer = format_answer_briefly(question.segments, label, MAX_ANSWER_CHARS)
        questions_and_answers.append((question.prompt, answer))
    excluded_objects = []
    for labeled_object, reasons in zip(label.objects, find_exclusion_reasons(label), strict=True):
        if reasons:
            excluded_objects.append(f"{labeled_object.name} ({', '.join(reasons)})")
    return {
        "source": label.source,
        "image": to_jpeg_data_uri(draw_label(label, scale, masks=True)),
        "questions": questions_and_answers,
        "excluded": excluded_objects,
    }


def _draw_histograms(statistics: LabelStatistics) -> list[tuple[str, str]]:
    """Draw histograms of the objects' distances, sizes and scores, with their titles."""
    unit = "m" if statistics.unit == "metre" else "the image's own unit"
    values_by_title = {
        f"Distance from the camera ({unit})": statistics.distances,
        f"Longest side of the box ({unit})": statistics.sizes,
    }
    for name, scores in statistics.scores.items():
        values_by_title[f"Score: {name}"] = scores

    histograms = []
    for title, values in values_by_title.items():
        if values:
            counts, edges = np.histogram(values, bins=NUM_HISTOGRAM_BARS)
            chart = draw_histogram(counts.tolist(), f"{edges[0]:.3g}", f"{edges[-1]:.3g}")
            histograms.append((title, chart))
    return histograms


def _format_counts(counts: Counter[str]) -> list[tuple[str, str]]:
    """Return names with their counts as texts, the most frequent first."""
    return [(name, f"{count:,}") for name, count in counts.most_common()]


def _summarize_token_use(questions_by_source: QuestionsBySource) -> dict[str, Any] | None:
    """Count how often each 3D token occurs in the answers.

    The tokens are fitted to the answers about every second image, and counted in the answers about
    the other images, as in an evaluation.

    Returns:
        The values that the template shows; None if there are too few numbers to fit tokens.
    """
    fitted_numbers: list[float] = []
    counted_numbers: list[float] = []
    for index, questions in enumerate(questions_by_source.values()):
        numbers_of_image_group = fitted_numbers if index % 2 == 0 else counted_numbers
        for question in questions:
            numbers_of_image_group += question.values
    if len(set(fitted_numbers)) < 2:
        return None

    tokenizer = CoordinateTokenizer.fit(fitted_numbers)
    usage = compute_token_usage(counted_numbers, tokenizer)
    groups = np.array_split(np.array(usage.counts), NUM_TOKEN_BARS)  # of neighboring tokens
    group_counts = [int(group.sum()) for group in groups]
    chart = draw_histogram(group_counts, "lowest", "highest")
    return {
        "bins": tokenizer.num_bins,
        "use": usage,
        "chart": chart,
        "numbers": sum(usage.counts),
    }


def write_rerun_file(
    labels: Sequence[LabeledImage], clouds: Sequence[PointMapResult | None], out: Path
) -> None:
    """Write a file for the Rerun viewer (.rrd); it is complete or not there.

    The file contains images, boxes, keypoints and point clouds. Its timeline "image" has one step
    per label.

    Args:
        labels: the labels.
        clouds: the point map of each label; None for a label whose point map is not available.
        out: the file.

    Raises:
        SpearError: rerun-sdk is not installed, or the file cannot be written.
    """
    rr = import_optional("rerun", extra="view", feature="the Rerun viewer")
    stream = rr.RecordingStream("spear labels")
    memory = stream.memory_recording()
    stream.log("camera", rr.ViewCoordinates.RDF, static=True)  # x right, y down, z forward
    for number, (label, cloud) in enumerate(zip(labels, clouds, strict=True)):
        stream.set_time("image", sequence=number)
        _log_image(rr, stream, label)
        _log_boxes(rr, stream, label)
        _log_keypoints(rr, stream, label)
        _log_cloud(rr, stream, label, cloud)
    write_bytes(out, memory.drain_as_bytes())


def _log_image(rr: Any, stream: Any, label: LabeledImage) -> None:
    """Log the image, its camera and its source. rr: the module `rerun`."""
    camera = rr.Pinhole(image_from_camera=label.intrinsics, resolution=[label.width, label.height])
    stream.log("camera/image", camera)
    stream.log("camera/image", rr.EncodedImage(contents=label.image, media_type="image/jpeg"))
    stream.log("source", rr.TextDocument(label.source))


def _log_boxes(rr: Any, stream: Any, label: LabeledImage) -> None:
    """Log the edges of the objects' boxes, each with the object's name and color."""
    edges = []
    names = []
    colors = []
    palette = make_palette(len(label.objects))
    for labeled_object, color in zip(label.objects, palette, strict=True):
        if labeled_object.box3d is not None:
            for edge in BOX_EDGES:
                edges.append(labeled_object.box3d.vertices[list(edge)])
                names.append(labeled_object.name)
                colors.append(color)
    strips = rr.LineStrips3D(edges, labels=names, colors=colors, show_labels=False)
    stream.log("camera/boxes", strips)


def _log_keypoints(rr: Any, stream: Any, label: LabeledImage) -> None:
    """Log the keypoints of objects with a box, in the colors of the boxes."""
    positions = []
    names = []
    colors = []
    palette = make_palette(len(label.objects))
    for labeled_object, color in zip(label.objects, palette, strict=True):
        if labeled_object.box3d is not None:
            for kind, position in labeled_object.keypoints.items():
                positions.append(position)
                names.append(f"{labeled_object.name}: {kind}")
                colors.append(color)
    points = rr.Points3D(
        positions,
        labels=names,
        colors=colors,
        show_labels=False,
        radii=rr.Radius.ui_points(KEYPOINT_RADIUS),
    )
    stream.log("camera/keypoints", points)


def _log_cloud(rr: Any, stream: Any, label: LabeledImage, cloud: PointMapResult | None) -> None:
    """Log the points of the point map in the colors of the image.

    Without a point map the cloud is cleared, because Rerun would go on to show that of the image
    before.
    """
    if cloud is None:
        stream.log("camera/points", rr.Clear(recursive=False))
        return
    num_valid = np.count_nonzero(cloud.mask)  # cloud.mask is [h, w] bool
    stride = max(1, num_valid // MAX_CLOUD_POINTS)
    positions = cloud.points[cloud.mask][::stride]  # [n, 3]
    colors = decode_image(label.image)[cloud.mask][::stride]  # [n, 3]
    points = rr.Points3D(positions, colors=colors)
    stream.log("camera/points", points)
