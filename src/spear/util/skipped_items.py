"""Items that cannot be read are skipped, as long as they are few."""

import re
from collections import Counter
from dataclasses import dataclass, field

from spear.errors import SpearError

MAX_SHOWN_REASONS = 3


@dataclass
class SkippedItems:
    """Collects the reasons for which items were skipped, and stops the work when there are too
    many.

    Attributes:
        limit: the largest fraction of items that may be skipped.
        unit: what is counted, as a plural.
        patience: number of items to see before `check` judges the fraction of an unfinished work.
        reasons: one message per skipped item.
    """

    limit: float
    unit: str = "episodes"
    patience: int = 20
    reasons: list[str] = field(default_factory=list)

    def __call__(self, reason: SpearError | str) -> None:
        """Record that one item is skipped."""
        self.reasons.append(str(reason))

    def check(self, good: int, finished: bool = False) -> None:
        """Raise `SpearError` if too many items were skipped, compared with this number of good
        ones.

        Finished work is always judged, unfinished work once `patience` items have been seen.
        """
        num_bad = len(self.reasons)
        num_seen = good + num_bad
        if num_bad <= self.limit * num_seen:
            return
        if finished or num_seen >= self.patience:
            raise SpearError(
                f"too many bad {self.unit}: {num_bad} of {num_seen} (more than {self.limit:.0%}); "
                f"{self.summarize()}. Mend the input, or leave them out."
            )

    def summarize(self) -> str:
        """The most frequent reasons in one line, each with its count and its first message.

        Messages are of the same reason if they differ only in numbers, such as those of items.
        """
        counts: Counter[str] = Counter()
        first_messages: dict[str, str] = {}
        for message in self.reasons:
            kind = re.sub(r"\d+(\.\d+)?", "0", message)
            counts[kind] += 1
            first_messages.setdefault(kind, message)
        most_frequent = counts.most_common(MAX_SHOWN_REASONS)
        texts = [f"{number} × {first_messages[kind].rstrip('.')}" for kind, number in most_frequent]
        num_others = len(counts) - len(most_frequent)
        if num_others:
            texts.append(f"and {num_others} rarer reasons")
        return "; ".join(texts)
