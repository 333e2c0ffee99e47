"""Questions about a folder of labels, in a file beside them: `LABELS/questions.parquet`.

The questions about an image depend on the seed and the image's source alone, so they stay the same when
images are added or the labels are made again.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spear.errors import check_known
from spear.labels.questions.generate import format_answer, generate_questions
from spear.labels.questions.statistics import write_dataset_card
from spear.labels.store import (
    QUESTIONS_FILE,
    ParquetWriter,
    count_labels,
    explain_read_errors,
    read_labels,
)
from spear.question_types import QUESTION_TYPES, QUESTION_TYPES_2D
from spear.types import LabeledImage, Pixel, Question
from spear.util.progress import ProgressBar

_TEXTS = dict.fromkeys(("source", "family", "prompt", "answer", "segments"), pa.string())
_SCHEMA = pa.schema({**_TEXTS, "objects": pa.list_(pa.string()), "unit": pa.string()})
"""answer: for people to read; segments: exact, as JSON (texts, numbers, {"pixel": [x, y]})."""


def generate_label_questions(
    label: LabeledImage,
    seed: int,
    pairs: tuple[int, int] = (1, 4),
    families: Sequence[str] = QUESTION_TYPES,
) -> list[Question]:
    """The questions about one image; `pairs` and `families` as for `generate`."""
    digest = hashlib.sha256(label.source.encode()).digest()
    rng = np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])
    return generate_questions(label, rng, pairs, families)


def write_questions(
    folder: Path,
    seed: int = 0,
    pairs: tuple[int, int] = (1, 4),
    families: Sequence[str] = QUESTION_TYPES,
) -> tuple[int, Counter[str]]:
    """Ask about every image of a folder of labels; returns the number of images and the questions per family.

    The file is replaced as a whole; the dataset card names it from then on. `SpearError`: no labels there, an
    unknown family or one that needs depth, bad pairs, or the disk is full.
    """
    check_known("question family about labels", (*QUESTION_TYPES, *QUESTION_TYPES_2D), *families)
    counts: Counter[str] = Counter()
    bar = ProgressBar("asking", count_labels(folder), "images")
    with ParquetWriter(folder / QUESTIONS_FILE, _SCHEMA, rows_per_group=4096) as writer, bar:
        labels = read_labels(folder, pixels="what_at" in families)  # it is about what a mask covers
        while some := list(islice(labels, 256)):
            asked = [
                (label.source, q)
                for label in some
                for q in generate_label_questions(label, seed, pairs, families)
            ]
            counts.update(question.family for _, question in asked)
            writer.write(pa.Table.from_pylist([_to_row(source, q) for source, q in asked], _SCHEMA))
            bar.update(bar.done + len(some))
        writer.commit()
    write_dataset_card(folder)
    return bar.done, counts


def read_questions(folder: Path) -> Iterator[tuple[str, Question]]:
    """(source of the image, question) in the order of the labels; nothing when none were written.
    `SpearError` when the file is broken."""
    if not (path := folder / QUESTIONS_FILE).is_file():
        return
    with explain_read_errors(path, "Write it again with `spear questions`."):
        for batch in pq.ParquetFile(path).iter_batches(1024, use_threads=False):
            for row in batch.to_pylist():
                said = json.loads(row["segments"])
                segments = [Pixel(*s["pixel"]) if isinstance(s, dict) else s for s in said]
                objects = tuple(row["objects"])
                yield (
                    row["source"],
                    Question(row["family"], row["prompt"], segments, objects, row["unit"]),
                )


def _to_row(source: str, question: Question) -> dict[str, Any]:
    segments = [{"pixel": [s.x, s.y]} if isinstance(s, Pixel) else s for s in question.segments]
    words = {"source": source, "answer": format_answer(question.segments, question.unit)}
    return (
        vars(question)
        | words
        | {"segments": json.dumps(segments), "objects": list(question.objects)}
    )
