"""Collects items that cannot be read, so that work goes on as long as they are few."""

import re
from collections import Counter
from dataclasses import dataclass, field

from spear.errors import SpearError

MAX_SHOWN_REASONS = 3  # in one message


@dataclass
class SkippedItems:
    """Collects why items were skipped, and stops the work when too many of them were.

    Attributes:
        limit: the largest fraction of items that may be skipped.
        unit: the word for the items, in the plural.
        patience: number of items after which `check_limit` judges work that is not finished.
        reasons: one message per skipped item.
    """

    limit: float
    unit: str = "episodes"
    patience: int = 20
    reasons: list[str] = field(default_factory=list)

    def __call__(self, reason: SpearError | str) -> None:
        """Record that one item is skipped."""
        self.reasons.append(str(reason))

    def check_limit(self, num_good: int, is_finished: bool = False) -> None:
        """Raise `SpearError` if the skipped items are a larger fraction of all than `limit`.

        Args:
            num_good: number of items that were not skipped.
            is_finished: whether the work is done. Unfinished work is judged only after `patience`
                items.
        """
        num_bad = len(self.reasons)
        num_seen = num_good + num_bad
        if num_bad <= self.limit * num_seen:
            return
        if is_finished or num_seen >= self.patience:
            raise SpearError(
                f"too many bad {self.unit}, {num_bad} of {num_seen} (more than "
                f"{self.limit:.0%}). {self.summarize()}. Correct the input, or leave them out."
            )

    def summarize(self) -> str:
        """Return the most frequent reasons in one line, each with its count and its first message.

        Two messages have the same reason if they differ only in numbers, such as the number of the
        item.
        """
        counts: Counter[str] = Counter()
        first_messages: dict[str, str] = {}
        for message in self.reasons:
            reason = re.sub(r"\d+(\.\d+)?", "0", message)
            counts[reason] += 1
            first_messages.setdefault(reason, message)
        most_frequent = counts.most_common(MAX_SHOWN_REASONS)
        texts = []
        for reason, count in most_frequent:
            message = first_messages[reason].rstrip(".")
            texts.append(f"{count} × {message}")
        num_others = len(counts) - len(most_frequent)
        if num_others:
            texts.append(f"and {num_others} rarer reasons")
        return "; ".join(texts)
