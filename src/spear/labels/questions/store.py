"""Writing and reading the questions about a folder of labels: `LABELS/questions.parquet`.

The random choices of the questions about an image depend only on the seed and the image's source.
So the questions stay the same when images are added or the same labels are made again.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spear.errors import check_known
from spear.labels.questions.generate import format_answer, generate_questions
from spear.labels.questions.statistics import write_dataset_card
from spear.labels.questions.types import QUESTION_TYPE_BY_NAME
from spear.labels.store import (
    QUESTIONS_FILE,
    ParquetWriter,
    count_labeled_images,
    read_labels,
    translate_read_errors,
)
from spear.question_types import QUESTION_TYPES, QUESTION_TYPES_2D
from spear.types import LabeledImage, Pixel, Question
from spear.util.json_text import parse_json
from spear.util.progress import ProgressBar

BATCH_SIZE = 256  # number of images whose questions are written together
ROWS_PER_GROUP = 4096  # a row is a question
READ_BATCH_SIZE = 1024  # number of questions that are read at a time

_TEXT_COLUMNS = ("source", "family", "prompt", "answer", "segments")
_SCHEMA = pa.schema(
    {
        **dict.fromkeys(_TEXT_COLUMNS, pa.string()),
        "objects": pa.list_(pa.string()),
        "unit": pa.string(),
    }
)
"""The columns of the file. `source` is the image's; `family` is the question type; `answer` is for
people to read; `segments` is the exact answer as a JSON list of texts, numbers and {"pixel": [x,
y]}."""


def generate_questions_from_seed(
    label: LabeledImage,
    seed: int,
    questions_per_image: tuple[int, int] = (1, 4),
    question_types: Sequence[str] = QUESTION_TYPES,
) -> list[Question]:
    """Generate the questions about one image.

    Args:
        label: The image's label.
        seed: Seeds the random numbers, together with the label's source.
        questions_per_image: (fewest, most) questions about the image.
        question_types: The types from which each question's type is drawn.
    """
    digest = hashlib.sha256(label.source.encode()).digest()
    rng = np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])
    return generate_questions(label, rng, questions_per_image, question_types)


class NumWrittenQuestions(NamedTuple):
    """How many questions `write_questions` wrote, and about how many images.

    Attributes:
        num_images: The number of images of the folder.
        num_by_type: Question type → number of questions.
    """

    num_images: int
    num_by_type: Counter[str]


def write_questions(
    folder: Path,
    seed: int = 0,
    questions_per_image: tuple[int, int] = (1, 4),
    question_types: Sequence[str] = QUESTION_TYPES,
) -> NumWrittenQuestions:
    """Write questions about every image of a folder of labels.

    Existing questions are replaced, and the dataset card is written again.

    Args:
        folder: The folder.
        seed: Seeds the random numbers, together with each label's source.
        questions_per_image: (fewest, most) questions about each image.
        question_types: The types from which each question's type is drawn.

    Raises:
        SpearError: The folder contains no labels, a question type is unknown or needs depth,
            `questions_per_image` is no range, or the disk is full.
    """
    check_known(
        "question type about labels", (*QUESTION_TYPES, *QUESTION_TYPES_2D), *question_types
    )
    num_by_type: Counter[str] = Counter()
    bar = ProgressBar("asking", count_labeled_images(folder), "images")
    path = folder / QUESTIONS_FILE
    with ParquetWriter(path, _SCHEMA, rows_per_group=ROWS_PER_GROUP) as writer, bar:
        # Reading a label's pixels, its image and masks, is slow, and only masks may be needed here.
        needs_masks = any(QUESTION_TYPE_BY_NAME[name].needs_masks for name in question_types)
        labels = read_labels(folder, pixels=needs_masks)
        while batch := list(islice(labels, BATCH_SIZE)):
            rows = []
            for label in batch:
                questions = generate_questions_from_seed(
                    label, seed, questions_per_image, question_types
                )
                for question in questions:
                    num_by_type[question.question_type] += 1
                    rows.append(_question_to_row(label.source, question))
            writer.write(pa.Table.from_pylist(rows, _SCHEMA))
            bar.set_num_done(bar.num_done + len(batch))
        writer.commit()
    write_dataset_card(folder)
    return NumWrittenQuestions(bar.num_done, num_by_type)


def read_questions(folder: Path) -> Iterator[tuple[str, Question]]:
    """Read the questions about a folder of labels.

    Yields:
        The source of the image and the question, in the order of the labels. Nothing, if no
        questions were written.

    Raises:
        SpearError: The file is broken.
    """
    path = folder / QUESTIONS_FILE
    if not path.is_file():
        return
    with translate_read_errors(path, "Write it again with `spear questions`."):
        for batch in pq.ParquetFile(path).iter_batches(READ_BATCH_SIZE, use_threads=False):
            for row in batch.to_pylist():
                yield row["source"], _question_from_row(row)


def _question_to_row(image_source: str, question: Question) -> dict[str, Any]:
    segments: list[Any] = []
    for segment in question.segments:
        if isinstance(segment, Pixel):
            segments.append({"pixel": [segment.x, segment.y]})
        else:
            segments.append(segment)
    return {
        "source": image_source,
        "family": question.question_type,
        "prompt": question.prompt,
        "answer": format_answer(question.segments, question.unit),
        "segments": json.dumps(segments),
        "objects": list(question.objects),
        "unit": question.unit,
    }


def _question_from_row(row: dict[str, Any]) -> Question:
    segments = []
    for value in parse_json(row["segments"]):
        segments.append(Pixel(*value["pixel"]) if isinstance(value, dict) else value)
    return Question(row["family"], row["prompt"], segments, tuple(row["objects"]), row["unit"])
