"""The instruction is unlike all instructions of training."""

import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from spear.checks.rollout.case import Case, Figure, Finding, Material, Result, RolloutCheck

MAX_COMPARED_TEXTS = 300  # different instructions of training
MIN_TEXTS = 5  # with fewer, they do not say how much instructions of training differ
# An instruction is unlike training beyond these limits, and beyond what the instructions of
# training differ from each other. Chosen on the four task families of the simulator, each of which
# was compared with the other three, and on unseen objects of the same families.
MIN_UNKNOWN_SHARE = 0.3  # share of the words that training never had
MAX_SHOWN_TEXTS = 5  # the nearest instructions of training, in the figure
MAX_SIMILARITY = 0.5  # words that both have, as a share of the words that either has


class Novelty(NamedTuple):
    """How new an instruction is.

    unknown_share  share of its words that no instruction of training has.
    similarity     words that it shares with the nearest instruction of training, as a share of the
                   words that either has.
    nearest        the nearest instruction of training.
    """

    unknown_share: float
    similarity: float
    nearest: str


class UnseenInstructionCheck(RolloutCheck):
    """Finds instructions with words, or a combination of words, that training never had."""

    fault = "unseen-instruction"
    title = "the instruction is unlike those of training"
    needs: ClassVar[frozenset[Material]] = frozenset({"rollout", "demonstrations"})

    def examine(self, case: Case) -> Result:
        vocabulary = Vocabulary.of_texts(case.training_instructions)
        unknown_limit = MIN_UNKNOWN_SHARE
        similarity_limit = MAX_SIMILARITY
        if len(case.training_instructions) >= MIN_TEXTS:
            # How new is each instruction of training, compared with all others?
            for text in case.training_instructions[:MAX_COMPARED_TEXTS]:
                novelty = vocabulary.without(text).measure_novelty(text)
                unknown_limit = max(unknown_limit, novelty.unknown_share)
                similarity_limit = min(similarity_limit, novelty.similarity)
        for text in dict.fromkeys(episode.instruction for episode in case.rollout):
            words = split_words(text)
            if not words or words in vocabulary.words_of_texts.values():
                continue
            novelty = vocabulary.measure_novelty(text)
            has_new_words = novelty.unknown_share > unknown_limit
            if not has_new_words and novelty.similarity >= similarity_limit:
                continue
            return _make_finding(text, novelty, vocabulary)
        return None


@dataclass(frozen=True)
class Vocabulary:
    """The words of some instructions.

    words_of_texts  instruction → its words.
    counts          word → how many of the instructions have it.
    """

    words_of_texts: Mapping[str, frozenset[str]]
    counts: Mapping[str, int]

    @staticmethod
    def of_texts(texts: Sequence[str]) -> "Vocabulary":
        """Collect the words of instructions."""
        words_of_texts = {text: split_words(text) for text in texts}
        counts: Counter[str] = Counter()
        for words in words_of_texts.values():
            counts.update(words)
        return Vocabulary(words_of_texts, counts)

    def without(self, text: str) -> "Vocabulary":
        """Return the words of all other instructions."""
        other_texts = {
            other: words for other, words in self.words_of_texts.items() if other != text
        }
        counts = Counter(self.counts)
        counts.subtract(self.words_of_texts[text])
        return Vocabulary(other_texts, +counts)  # "+" drops the words whose count is now 0

    def find_unknown(self, text: str) -> list[str]:
        """Return the words of a text that no instruction has."""
        return sorted(word for word in split_words(text) if word not in self.counts)

    def measure_novelty(self, text: str) -> Novelty:
        """Compare a text with the instructions."""
        words = split_words(text)
        nearest = ""
        similarity = -1.0
        for other_text, other_words in self.words_of_texts.items():
            other_similarity = _measure_similarity(words, other_words)
            if other_similarity > similarity:
                nearest = other_text
                similarity = other_similarity
        unknown_share = len(self.find_unknown(text)) / max(len(words), 1)
        return Novelty(unknown_share, similarity, nearest)


def _make_finding(text: str, novelty: Novelty, vocabulary: Vocabulary) -> Finding:
    """Make the finding about an instruction."""
    unknown = vocabulary.find_unknown(text)
    reason = f"it has {novelty.similarity:.0%} of its words in common with the nearest one"
    if unknown:
        reason = f"training never had the words {', '.join(unknown)}"
    words = split_words(text)
    similarities = []
    for other_text, other_words in vocabulary.words_of_texts.items():
        similarities.append((other_text, _measure_similarity(words, other_words)))
    bars = sorted(similarities, key=lambda item: -item[1])[:MAX_SHOWN_TEXTS]
    return Finding(
        confidence=0.9 if novelty.unknown_share > MIN_UNKNOWN_SHARE else 0.7,
        evidence=(
            f"“{text}”: {reason}; the nearest of {len(vocabulary.words_of_texts)} is "
            f"“{novelty.nearest}”"
        ),
        cure="use the words of training, or add demonstrations with this instruction",
        file="the prompt that your robot sends",
        figure=Figure(
            "words in common with the nearest instructions of training",
            bars=[(trained_text, share, f"{share:.0%}") for trained_text, share in bars],
        ),
    )


@functools.lru_cache(maxsize=4096)
def split_words(text: str) -> frozenset[str]:
    """Return the words of a text, in lower case.

    >>> sorted(split_words("Put the Red mug on it."))
    ['it', 'mug', 'on', 'put', 'red', 'the']
    """
    return frozenset(re.findall(r"[\w']+", text.lower()))


def _measure_similarity(first: frozenset[str], second: frozenset[str]) -> float:
    """Return which share of the words of either set both have."""
    return len(first & second) / max(len(first | second), 1)
