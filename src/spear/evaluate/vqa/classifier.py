"""Classify questions by their skeletons: which type of question is it, if any that models learn?

A linear classifier gives each type a score. It is fitted to the questions of example_questions.toml
and to the prompt templates by ridge regression. This takes two or three seconds, so no weights are
stored. To teach it another wording, add the question to example_questions.toml.
"""

import itertools
import math
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import lsqr

from spear.evaluate.vqa.skeleton import (
    ACTION,
    CUES,
    PIXEL,
    UNEXPLAINED,
    WORDS,
    Skeleton,
    read_question,
)
from spear.labels.questions.types import QUESTION_TYPE_BY_NAME
from spear.types import Array

EXAMPLES_FILE = Path(__file__).with_name("example_questions.toml")
NO_TYPE = "untaught"
"""The class of the questions that no model is taught to answer."""
RIDGE_PENALTY = 0.1  # chosen by cross-validation among 0.1, 0.5 and 2
SOLVER_TOLERANCE = 1e-5  # of the least-squares solver; scores are wrong by less than 0.001
_UNTAUGHT_WORDS = WORDS["untaught"] | WORDS["adjectives"]
"""Words of skeletons which show that no model is taught to answer the question.

An adjective before a noun is part of an object's name, and is not in the skeleton. Any other
adjective asks for a property, as in "is the mug fragile".
"""

_UNIT = "(?:meters|centimeters|millimeters|feet|inches|yards)"
CUE_PATTERNS = {
    "closer to an object": r"\b(?:closer|nearer|closest|nearest|further|farther) (?:to|from) NAME",
    "how many objects": rf"\b(?:how many|count|number of) (?!{_UNIT})",
    "how many meters": rf"\b(?:how many|number of) {_UNIT}",
    "an object moves": r"NAME .*\b(?:move|moved|moving|reach|reaching|travel|walk)\b",
    "one object and another": r"NAME (?:and|or)(?: \w+)* NAME",
    "room between": r"\b(?:room|space) .*between",
    "an object is the origin": r"NAME (?:be|is|was|were|as)(?: at)? (?:origin|zero)",
    "the origin is at an object": r"\borigin \w+(?: \w+)? NAME",
    "from one object to another": r"\b(?:how|what|which)\b.* from NAME .*\bto\b.* NAME",
}
"""Name of a cue → pattern of the skeletons that have the cue. These cues are no single words."""


@dataclass(frozen=True)
class Example:
    """A question whose type is known.

    Attributes:
        question: the question.
        question_type: its type; `NO_TYPE` if no model is taught to answer it.
        names: the names of its objects, if it is of a taught type.
    """

    question: str
    question_type: str
    names: tuple[str, ...] = ()

    def list_training_readings(self) -> list[Skeleton]:
        """List the skeletons from which a classifier learns.

        From a taught question it learns one skeleton: the first with the right objects, or the
        first of all if none has them. From an untaught question it learns all skeletons, because
        such a question should be refused in any reading.
        """
        readings = read_question(self.question).list_readings()
        if self.question_type == NO_TYPE:
            return readings
        names = {name.casefold() for name in self.names}
        for reading in readings:
            if set(reading.names) == names:
                return [reading]
        return [readings[0]]


def load_examples() -> list[Example]:
    """Load the questions to which the classifier is fitted.

    They are those of example_questions.toml and all prompt templates.
    """
    tables: Mapping[str, Any] = tomllib.loads(EXAMPLES_FILE.read_text(encoding="utf-8"))
    examples = [Example(question, NO_TYPE) for question in tables["untaught"]]
    # "absent" has questions about objects that no scene of the simulator has.
    for row in (*tables["paraphrases"], *tables["absent"]):
        examples.append(Example(row["ask"], row["type"], tuple(row["objects"])))
    for name, question_type in QUESTION_TYPE_BY_NAME.items():
        # In a template, {p} is a pixel or a keypoint, whichever the question type is about.
        point = "(80, 40)" if question_type.is_about_pixel else "closest"
        object_names = ("mug", "bowl")[: question_type.num_objects]
        for template in question_type.prompts:
            question = template.format(x="the mug", y="the bowl", p=point)
            examples.append(Example(question, name, object_names))
    return examples


@dataclass(frozen=True)
class QuestionTypeClassifier:
    """A linear classifier that finds the question type of a skeleton.

    Attributes:
        feature_indices: feature → its row in `weights`.
        classes: the question types, and `NO_TYPE`.
        weights: [number of features, number of classes].
    """

    feature_indices: Mapping[str, int]
    classes: Sequence[str]
    weights: Array

    @classmethod
    def fit(cls, examples: Iterable[Example]) -> "QuestionTypeClassifier":
        """Fit a classifier to examples by ridge regression."""
        feature_sets: list[frozenset[str]] = []
        types: list[str] = []
        for example in examples:
            for features_of_reading in _list_features_of_training_readings(example):
                feature_sets.append(features_of_reading)
                types.append(example.question_type)
        features = sorted(frozenset[str]().union(*feature_sets))
        feature_indices = {feature: index for index, feature in enumerate(features)}
        classes = sorted(set(types))

        # The matrix of examples and features is sparse: an example has some 40 of 6,000 features.
        lengths = np.array([len(names) for names in feature_sets])
        values = np.repeat(1 / np.sqrt(lengths), lengths)  # so that vectors have length 1
        columns = [feature_indices[name] for names in feature_sets for name in sorted(names)]
        row_ends = np.concatenate([[0], np.cumsum(lengths)])
        inputs = csr_matrix((values, columns, row_ends), (len(types), len(features)))
        damping = math.sqrt(RIDGE_PENALTY)
        weights = np.zeros((len(features), len(classes)))
        for index, class_name in enumerate(classes):
            targets = np.array([float(name == class_name) for name in types])
            solution = lsqr(inputs, targets, damp=damping, atol=SOLVER_TOLERANCE, btol=0.0)
            weights[:, index] = solution[0]
        return cls(feature_indices, classes, weights)

    def classify(self, readings: Iterable[Skeleton]) -> tuple[Skeleton, str] | None:
        """Find the likeliest reading of a question, and its type.

        Returns:
            The reading and the type; None if no model is taught to answer the question.
        """
        best_margin = 0.0
        best: tuple[Skeleton, str] | None = None
        for skeleton in readings:
            question_type, margin = self.find_likeliest_type_and_margin(skeleton)
            if margin > best_margin:
                best = skeleton, question_type
                best_margin = margin
        return best

    def find_likeliest_type_and_margin(self, skeleton: Skeleton) -> tuple[str, float]:
        """Return the likeliest type of a skeleton, and by how much it is likelier than `NO_TYPE`.

        A type is possible only if the skeleton names as many objects and pixels as its questions.
        """
        if any(word in _UNTAUGHT_WORDS for word in skeleton.words):
            return NO_TYPE, 0.0
        vector = _to_vector(list_features(skeleton), self.feature_indices)
        scores = dict(zip(self.classes, (vector @ self.weights).tolist(), strict=True))
        possible_types = [
            name for name in self.classes if _has_objects_and_pixel_for_type(name, skeleton)
        ]
        if not possible_types:
            return NO_TYPE, 0.0
        likeliest_type = max(possible_types, key=lambda name: scores[name])
        return likeliest_type, scores[likeliest_type] - scores.get(NO_TYPE, 0.0)


def _has_objects_and_pixel_for_type(type_name: str, skeleton: Skeleton) -> bool:
    """Return whether a question with this skeleton may be of a type, by what it names."""
    if type_name == NO_TYPE:
        return False
    question_type = QUESTION_TYPE_BY_NAME[type_name]
    if question_type.num_objects != skeleton.num_objects:
        return False
    if question_type.is_about_pixel != (PIXEL in skeleton.words):
        return False
    # With an action, only a displacement can be asked for: "how far must I push the mug to reach
    # the bowl", but not "push the mug away from you", which names one object.
    return question_type.is_displacement or ACTION not in skeleton.words


@lru_cache(1)
def fit_classifier() -> QuestionTypeClassifier:
    """Fit the classifier to all examples, once per process."""
    return QuestionTypeClassifier.fit(load_examples())


@lru_cache(None)
def _list_features_of_training_readings(example: Example) -> list[frozenset[str]]:
    """Read the features of an example. They are kept for the next fit of a cross-validation."""
    features = [frozenset(list_features(reading)) for reading in example.list_training_readings()]
    return list(dict.fromkeys(features))


def list_features(skeleton: Skeleton) -> set[str]:
    """List the features of a skeleton: its words, its cues, and pairs of each."""
    words = ["<begin>", *skeleton.words, "<end>"]
    cues = _list_cues(skeleton)
    num_objects = f"{skeleton.num_objects} objects"
    num_unexplained = min(2, words.count(UNEXPLAINED))
    features = {*words, num_objects, f"{num_unexplained} unexplained"}
    features.update(f"{word} {next_word}" for word, next_word in itertools.pairwise(words))
    for cue in cues:
        features.add(f"[{cue}]")
        features.add(f"[{cue}] {num_objects}")
    features.update(
        f"[{cue}] [{second_cue}]" for cue, second_cue in itertools.combinations(cues, 2)
    )
    return features


def _list_cues(skeleton: Skeleton) -> list[str]:
    """Find the cues of a skeleton: groups of words that it uses, and patterns; sorted."""
    cues = [group for group, words in CUES.items() if words.intersection(skeleton.words)]
    text = " ".join(skeleton.words)
    cues += [cue for cue, pattern in CUE_PATTERNS.items() if re.search(pattern, text)]
    return sorted(cues)


def _to_vector(features: Collection[str], feature_indices: Mapping[str, int]) -> Array:
    """Return the unit vector of a question's features. Unknown features are ignored."""
    vector = np.zeros(len(feature_indices))
    for feature in features:
        if feature in feature_indices:
            vector[feature_indices[feature]] = 1.0
    return vector / max(1.0, float(np.linalg.norm(vector)))
