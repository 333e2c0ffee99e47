"""The instruction is unlike all instructions of training."""

import re
from collections.abc import Collection
from typing import ClassVar

from spear.checks.rollout.case import Case, Figure, Finding, Material, Result, RolloutCheck

# Share of the words of an instruction that its nearest instruction of training has, too.
MIN_WORDS_SHARE = 0.5  # a lower share is unlike training whatever the words are


class UnseenInstructionCheck(RolloutCheck):
    """Finds instructions with words, or a combination of words, that training never had."""

    fault = "unseen-instruction"
    title = "the instruction is unlike those of training"
    needs: ClassVar[frozenset[Material]] = frozenset({"rollout", "demonstrations"})

    def examine(self, case: Case) -> Result:
        trained = {episode.instruction for episode in case.demonstrations}
        trained_words = [split_words(text) for text in trained]
        vocabulary = set().union(*trained_words)
        for text in dict.fromkeys(episode.instruction for episode in case.rollout):
            words = split_words(text)
            if not words or words in trained_words:
                continue
            unknown = sorted(words - vocabulary)
            shares = {t: _similarity(words, split_words(t)) for t in trained}
            nearest = max(shares, key=lambda t: shares[t])
            if not unknown and shares[nearest] >= MIN_WORDS_SHARE:
                continue
            reason = f"training never had the words {', '.join(unknown)}"
            if not unknown:
                reason = f"it has {shares[nearest]:.0%} of its words in common with the nearest one"
            bars = sorted(shares.items(), key=lambda item: -item[1])[:5]
            return Finding(
                confidence=0.9 if unknown else 0.7,
                evidence=f"“{text}”: {reason}; the nearest of {len(trained)} is “{nearest}”",
                cure="use the words of training, or add demonstrations with this instruction",
                file="the prompt that your robot sends",
                figure=Figure(
                    "words in common with the nearest instructions of training",
                    bars=[(t, share, f"{share:.0%}") for t, share in bars],
                ),
            )
        return None


def split_words(text: str) -> frozenset[str]:
    """Return the words of a text, in lower case.

    >>> sorted(split_words("Put the Red mug on it."))
    ['it', 'mug', 'on', 'put', 'red', 'the']
    """
    return frozenset(re.findall(r"[\w']+", text.lower()))


def _similarity(first: Collection[str], second: Collection[str]) -> float:
    """Return which share of the words of both are words of each."""
    union = set(first) | set(second)
    return len(set(first) & set(second)) / max(len(union), 1)
