"""Labels to look at: a contact sheet of images with masks, boxes, questions and answers, and statistics."""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from spear.evaluate.page import Section, data_uri, page, paragraph, table
from spear.labels.card import Summary, summarize
from spear.labels.draw import draw_label
from spear.labels.parquet import write_text
from spear.labels.question_store import ask, read_questions, words
from spear.labels.questions import askable
from spear.labels.store import LabelStore, read
from spear.tokens import CoordinateTokenizer
from spear.types import Array, LabeledImage, Question

WIDTH = 640
"""Pixels across of a picture on the sheet, at least."""
SHOWN_BINS = 64
"""Bars of the chart of token use; each stands for as many neighbouring tokens."""
Asked = dict[str, list[Question]]
"""Source of an image → the questions about it."""


def choose(store: LabelStore, images: int) -> list[LabeledImage]:
    """So many labels, spread evenly over a store."""
    shown = min(images, len(store))
    return [store[i * len(store) // shown] for i in range(shown)]


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
    """
    found = summarize(folder)
    questions = _questions(folder)
    families = Counter(q.family for asked in questions.values() for q in asked)
    cards = [_card(label, questions[label.source]) for label in shown]
    sections = [
        Section("Contact sheet", f'<div class="grid wide">{"".join(cards)}</div>'),
        Section("Objects", _objects(found)),
        Section("Questions", _asked(questions, families, tokenizer)),
    ]
    if found.rejected:
        rows = [[reason, f"{count:,}"] for reason, count in found.rejected.most_common()]
        sections.append(Section("Set aside", table(["because", "images"], rows)))
    aside = sum(found.rejected.values())
    facts = [
        (f"{found.images:,}", "labelled images"),
        (f"{found.objects:,}", f"objects, {found.boxed:,} with a 3D box"),
        (f"{sum(families.values()):,}", "questions"),
        (f"{aside:,}", "images set aside"),
    ]
    models = ", ".join(sorted(found.models))
    write_text(out, page(f"3D labels: {folder.resolve().name}", paragraph(models), facts, sections))


def _questions(folder: Path) -> Asked:
    questions: Asked = defaultdict(list)
    for source, question in read_questions(folder):
        questions[source].append(question)
    if not questions:
        for label in read(folder, images=False):
            questions[label.source] = ask(label, seed=0)
    return questions


def _card(label: LabeledImage, questions: Sequence[Question]) -> str:
    """A figure: the image with all that is known of it, what is asked about it, and the answers."""
    scale = max(1, round(WIDTH / label.width))
    buffer = io.BytesIO()
    Image.fromarray(draw_label(label, scale, masks=True)).save(buffer, "JPEG", quality=85)
    source = data_uri(buffer.getvalue(), "image/jpeg")
    fit = {o.name for o in askable(label)}
    left_out = sorted({o.name for o in label.objects} - fit)
    asked = "".join(f"<dt>{escape(q.prompt)}</dt><dd>{escape(_short(words(q)))}</dd>" for q in questions)
    aside = f"<p>not asked about: {escape(', '.join(left_out))}</p>" if left_out else ""
    name = escape(label.source)
    return (
        f'<figure><img loading="lazy" src="{source}" alt="{name}"><figcaption><b>{name}</b>'
        f"<dl>{asked}</dl>{aside}</figcaption></figure>"
    )


def _short(answer: str, most: int = 150) -> str:
    return answer if len(answer) <= most else f"{answer[:most].rsplit(' ', 1)[0]} …"


def _objects(found: Summary) -> str:
    unit = "m" if set(found.units) == {"metre"} else "the label's unit"
    names = [[name, f"{count:,}"] for name, count in found.names.most_common(20)]
    distances = np.array(found.distances)
    chart = ""
    if len(distances):
        counts, edges = np.histogram(distances, bins=40, range=(0.0, float(np.quantile(distances, 0.99))))
        chart = f"<h3>Distance from the camera to the box's centre, {unit} (99 % of all)</h3>" + bars(
            counts, f"{edges[0]:.2g}", f"{edges[-1]:.2g}"
        )
    return f"{chart}<h3>Names</h3>{table(['object', 'count'], names)}"


def _asked(questions: Asked, families: Counter[str], tokenizer: CoordinateTokenizer | None) -> str:
    names = Counter(name for asked in questions.values() for q in asked for name in q.objects)
    body = table(
        ["family", "questions"], [[f.replace("_", " "), f"{n:,}"] for f, n in families.most_common()]
    )
    if names:
        most, least = names.most_common(1)[0], names.most_common()[-1]
        body += paragraph(
            f"{len(names)} names are asked about, most often {most[0]} ({most[1]:,} times), least often "
            f"{least[0]} ({least[1]:,}).",
            soft=True,
        )
    values = [[v for q in asked for v in q.values] for asked in questions.values()]
    counted, how = _token_counts(values, tokenizer)
    if counted is None:
        return body
    use = counted.reshape(SHOWN_BINS, -1).sum(axis=1)
    unused = int((counted == 0).sum())
    return (
        f"{body}<h3>Use of the {len(counted)} 3D tokens</h3>"
        + bars(use, "lowest", "highest")
        + paragraph(f"{counted.sum():,} numbers; {unused} tokens are never used. {how}", soft=True)
    )


def _token_counts(
    values: Sequence[Sequence[float]], tokenizer: CoordinateTokenizer | None
) -> tuple[Array | None, str]:
    """How often each 3D token is used, and whose tokens they are; None when there are too few numbers."""
    if tokenizer is not None:
        numbers = [v for image in values for v in image]
        how = "The tokens are those of the given model."
    else:
        fitted = [v for image in values[::2] for v in image]
        numbers = [v for image in values[1::2] for v in image]
        how = "The tokens are fitted to every other image, and counted in the rest."
        if len(set(fitted)) < 2:
            return None, how
        tokenizer = CoordinateTokenizer.fit(fitted)
    if not numbers:
        return None, how
    return np.bincount(tokenizer.encode(np.array(numbers)), minlength=tokenizer.bins), how


def bars(counts: Array, low: str, high: str) -> str:
    """A histogram as an SVG that grows with the page, its ends named."""
    most = max(int(counts.max()), 1)
    width = 640 / len(counts)
    shapes = "".join(
        f'<rect x="{i * width:.1f}" y="{100 - 100 * n / most:.1f}" width="{0.85 * width:.1f}" '
        f'height="{100 * n / most:.1f}"><title>{n:,}</title></rect>'
        for i, n in enumerate(counts.tolist())
    )
    return (
        '<svg viewBox="0 0 640 120" style="width:100%;max-width:760px;display:block" fill="var(--accent)">'
        f'{shapes}<g fill="var(--soft)" font-size="13"><text x="0" y="116">{escape(low)}</text>'
        f'<text x="640" y="116" text-anchor="end">{escape(high)}</text></g></svg>'
    )
