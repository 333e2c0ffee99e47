"""What a check found."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["agrees", "wrong", "cannot tell", "not said"]
"""Whether data agree with their layout: they do, they contradict it, they say too little, or it
does."""


@dataclass(frozen=True)
class Check:
    """What was found about one thing.

    name     what was checked: a key of the layout, or a camera.
    verdict  the result.
    words    why, and what to change where it is wrong.
    """

    name: str
    verdict: Verdict
    words: str
