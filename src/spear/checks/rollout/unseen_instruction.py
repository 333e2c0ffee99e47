"""The instruction is unlike all instructions of training."""

import re
from collections.abc import Collection, Sequence
from typing import ClassVar, NamedTuple

from spear.checks.rollout.case import Case, Figure, Finding, Material, Result, RolloutCheck

MAX_COMPARED_TEXTS = 300  # different instructions of training
MIN_TEXTS = 5  # with fewer, they do not say how much instructions of training differ
# An instruction is unlike training beyond these limits, and beyond what the instructions of
# training differ from each other. Chosen on the four task families of the simulator, each of which
# was compared with the other three, and on unseen objects of the same families.
MIN_UNKNOWN_SHARE = 0.3  # share of the words that training never had
MAX_SIMILARITY = 0.5  # words that both have, as a share of the words that either has


class Novelty(NamedTuple):
    """How new an instruction is.

    unknown_share  share of its words that no instruction of training has.
    similarity     that of the nearest instruction of training.
    nearest        this instruction.
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
        trained = case.training_instructions[:MAX_COMPARED_TEXTS]
        trained_words = {split_words(text) for text in case.training_instructions}
        unknown_limit = MIN_UNKNOWN_SHARE
        similarity_limit = MAX_SIMILARITY
        if len(trained) >= MIN_TEXTS:
            usual = []
            for index, text in enumerate(trained):
                usual.append(measure_novelty(text, [*trained[:index], *trained[index + 1 :]]))
            unknown_limit = max([unknown_limit] + [novelty.unknown_share for novelty in usual])
            similarity_limit = min([similarity_limit] + [novelty.similarity for novelty in usual])
        for text in dict.fromkeys(episode.instruction for episode in case.rollout):
            words = split_words(text)
            if not words or words in trained_words:
                continue
            novelty = measure_novelty(text, case.training_instructions)
            has_new_words = novelty.unknown_share > unknown_limit
            if not has_new_words and novelty.similarity >= similarity_limit:
                continue
            return _make_finding(text, novelty, case.training_instructions)
        return None


def _make_finding(text: str, novelty: Novelty, trained: Sequence[str]) -> Finding:
    """Make the finding about an instruction."""
    vocabulary = set().union(*(split_words(other_text) for other_text in trained))
    unknown = sorted(split_words(text) - vocabulary)
    reason = f"it has {novelty.similarity:.0%} of its words in common with the nearest one"
    if unknown:
        reason = f"training never had the words {', '.join(unknown)}"
    similarities = [(other_text, _similarity(text, other_text)) for other_text in trained]
    bars = sorted(similarities, key=lambda item: -item[1])[:5]
    return Finding(
        confidence=0.9 if novelty.unknown_share > MIN_UNKNOWN_SHARE else 0.7,
        evidence=f"“{text}”: {reason}; the nearest of {len(trained)} is “{novelty.nearest}”",
        cure="use the words of training, or add demonstrations with this instruction",
        file="the prompt that your robot sends",
        figure=Figure(
            "words in common with the nearest instructions of training",
            bars=[(trained_text, share, f"{share:.0%}") for trained_text, share in bars],
        ),
    )


def measure_novelty(text: str, trained: Sequence[str]) -> Novelty:
    """Compare an instruction with those of training."""
    words = split_words(text)
    vocabulary = set().union(*(split_words(other_text) for other_text in trained))
    nearest = max(trained, key=lambda other_text: _similarity(text, other_text))
    unknown_share = len(words - vocabulary) / max(len(words), 1)
    return Novelty(unknown_share, _similarity(text, nearest), nearest)


def split_words(text: str) -> frozenset[str]:
    """Return the words of a text, in lower case.

    >>> sorted(split_words("Put the Red mug on it."))
    ['it', 'mug', 'on', 'put', 'red', 'the']
    """
    return frozenset(re.findall(r"[\w']+", text.lower()))


def _similarity(first: str, second: str) -> float:
    """Return which share of the words of both texts are words of each."""
    first_words: Collection[str] = split_words(first)
    second_words: Collection[str] = split_words(second)
    union = set(first_words) | set(second_words)
    return len(set(first_words) & set(second_words)) / max(len(union), 1)
