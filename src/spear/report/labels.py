"""Labels to look at: a contact sheet of images with masks, boxes, questions and answers, and statistics."""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from spear.errors import SpearError
from spear.labels.questions.generate import spoken, why_not_asked
from spear.labels.questions.statistics import Histogram, Statistics, skip_reasons, statistics, token_use
from spear.labels.questions.store import ask, read_questions
from spear.labels.store import read
from spear.report.draw import draw_label
from spear.report.page import Section, data_uri, page, paragraph, table
from spear.tokens import CoordinateTokenizer
from spear.types import LabeledImage, Question
from spear.util.files import write_text

WIDTH = 640
"""Pixels across of a picture on the sheet, at least."""
SHOWN_BINS = 64
"""Bars of the chart of token use; each stands for as many neighbouring tokens."""
Asked = dict[str, list[Question]]
"""Source of an image → the questions about it."""


def label_page(
    folder: Path, shown: Sequence[LabeledImage], out: Path, tokenizer: CoordinateTokenizer | None = None
) -> None:
    """Write one self-contained page about a folder of labels.

    Args:
        folder: shards, and questions beside them if they were written; else those of seed 0 are made up.
        shown: the labels on the contact sheet.
        out: HTML file, written whole or not at all.
        tokenizer: 3D tokens whose use is counted; None fits them to the answers about every other image and
            counts in those about the rest.

    Raises:
        SpearError: no labels there, labels of several units, or 3D tokens of another unit.
    """
    found = statistics(read(folder, pixels=False))
    if tokenizer is not None and tokenizer.unit != found.unit:
        raise SpearError(
            f"{folder}: labels in unit {found.unit!r}, 3D tokens in {tokenizer.unit!r}: give another model, or none"
        )
    questions = _questions(folder)
    asked = Counter(q.family for some in questions.values() for q in some)
    rejected = skip_reasons(folder)
    cards = [_card(label, questions[label.source]) for label in shown]
    sections = [
        Section("Contact sheet", f'<div class="grid wide">{"".join(cards)}</div>'),
        Section("Objects", _objects(found)),
        Section("Questions", _asked(questions, asked, tokenizer)),
    ]
    if rejected:
        sections.append(Section("Set aside", _counts("because", "images", rejected.most_common())))
    facts = [
        (f"{found.images:,}", "labelled images"),
        (f"{found.objects:,}", f"objects, {found.boxed:,} with a 3D box, {found.asked:,} to ask about"),
        (f"{asked.total():,}", "questions"),
        (f"{rejected.total():,}", "images set aside"),
    ]
    lead = paragraph(", ".join(found.provenance))
    write_text(out, page(f"3D labels: {folder.resolve().name}", lead, facts, sections))


def _questions(folder: Path) -> Asked:
    questions: Asked = defaultdict(list)
    for source, question in read_questions(folder):
        questions[source].append(question)
    if not questions:
        for label in read(folder, pixels=False):
            questions[label.source] = ask(label, seed=0)
    return questions


def _card(label: LabeledImage, questions: Sequence[Question]) -> str:
    """A figure: the image with all that is known of it, what is asked about it, and the answers."""
    scale = max(1, round(WIDTH / label.width))
    buffer = io.BytesIO()
    Image.fromarray(draw_label(label, scale, masks=True)).save(buffer, "JPEG", quality=85)
    source = data_uri(buffer.getvalue(), "image/jpeg")
    why = zip(label.objects, why_not_asked(label), strict=True)
    left_out = [f"{o.name} ({', '.join(reasons)})" for o, reasons in why if reasons]
    asked = "".join(f"<dt>{escape(q.prompt)}</dt><dd>{escape(_short(spoken(q)))}</dd>" for q in questions)
    aside = f"<p>not asked about: {escape(', '.join(left_out))}</p>" if left_out else ""
    name = escape(label.source)
    return (
        f'<figure><img loading="lazy" src="{source}" alt="{name}"><figcaption><b>{name}</b>'
        f"<dl>{asked}</dl>{aside}</figcaption></figure>"
    )


def _short(answer: str, most: int = 150) -> str:
    return answer if len(answer) <= most else f"{answer[:most].rsplit(' ', 1)[0]} …"


def _objects(found: Statistics) -> str:
    unit = "m" if found.unit == "metre" else "the image's own unit"
    charts = [
        (f"Distance from the camera ({unit})", found.distance),
        (f"Longest side of the box ({unit})", found.size),
        *((f"Score: {name}", spread) for name, spread in found.scores.items()),
    ]
    figures = [_chart(title, spread) for title, spread in charts if spread is not None]
    return (
        f'<div class="grid">{"".join(figures)}</div>'
        f"<h3>Names</h3>{_counts('object', 'count', list(found.names.items())[:20])}"
        f"<h3>Not asked about</h3>{_counts('because', 'objects', found.reasons.items())}"
    )


def _chart(title: str, spread: Histogram) -> str:
    low, high = (f"{edge:.3g}" for edge in (spread.edges[0], spread.edges[-1]))
    return f"<div><h3>{escape(title)}</h3>{bars(spread.counts, low, high)}</div>"


def _counts(what: str, count: str, rows: Iterable[tuple[str, int]]) -> str:
    return table([what, count], [[name, f"{number:,}"] for name, number in rows])


def _asked(questions: Asked, families: Counter[str], tokenizer: CoordinateTokenizer | None) -> str:
    names = Counter(name for asked in questions.values() for q in asked for name in q.objects)
    body = _counts("family", "questions", ((f.replace("_", " "), n) for f, n in families.most_common()))
    if names:
        most, least = names.most_common(1)[0], names.most_common()[-1]
        body += paragraph(
            f"{len(names)} names are asked about, most often {most[0]} ({most[1]:,} times), least often "
            f"{least[0]} ({least[1]:,}).",
            soft=True,
        )
    values = [[v for q in asked for v in q.values] for asked in questions.values()]
    how = "The tokens are those of the given model."
    if tokenizer is None:
        how = "The tokens are fitted to every other image, and counted in the rest."
        fitted = [v for image in values[::2] for v in image]
        if len(set(fitted)) < 2:
            return body
        tokenizer = CoordinateTokenizer.fit(fitted)
        values = values[1::2]
    use = token_use([v for image in values for v in image], tokenizer)
    grouped = [int(part.sum()) for part in np.array_split(np.array(use.counts), SHOWN_BINS)]
    return (
        f"{body}<h3>Use of the {tokenizer.bins:,} 3D tokens</h3>"
        + bars(grouped, "lowest", "highest")
        + paragraph(
            f"{sum(use.counts):,} numbers; {use.unused:,} tokens are never used, {use.outside:,} numbers lie "
            f"outside; evenness {use.evenness:.2f} (1: all are used alike). {how}",
            soft=True,
        )
    )


def bars(counts: Sequence[int], low: str, high: str) -> str:
    """A histogram that grows with the page, its ends named in letters that do not."""
    most = max(*counts, 1)
    width = 640 / len(counts)
    shapes = "".join(
        f'<rect x="{i * width:.1f}" y="{100 - 100 * n / most:.1f}" width="{0.85 * width:.1f}" '
        f'height="{100 * n / most:.1f}"><title>{n:,}</title></rect>'
        for i, n in enumerate(counts)
    )
    return (
        '<svg class="chart" viewBox="0 0 640 100" preserveAspectRatio="none" fill="var(--accent)">'
        f'{shapes}</svg><div class="ends"><span>{escape(low)}</span><span>{escape(high)}</span></div>'
    )
