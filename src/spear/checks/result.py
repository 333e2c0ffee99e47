"""`Check`: the result of comparing one part of the data with the layout."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["agrees", "wrong", "cannot tell", "not said"]
"""Whether data agree with their layout.

"agrees" and "wrong" mean that the data confirm or contradict the layout. "cannot tell" means that
the data are not enough for a verdict, "not said" that the layout leaves the question open.
"""


@dataclass(frozen=True)
class Check:
    """The result of one check.

    name     what was checked: a key of the layout, or a camera.
    verdict  whether the data agree with the layout.
    words    the reasons for the verdict, and what to change if it is "wrong".
    """

    name: str
    verdict: Verdict
    words: str
