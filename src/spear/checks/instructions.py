"""Are the instructions of a dataset sentences, or only the name of an environment or a task?"""

import re
from collections.abc import Collection, Sequence

_IDENTIFIER = re.compile(
    r"[A-Za-z0-9]+([_-][A-Za-z0-9]+)+"  # words joined by _ or -: lift_cube, pick-place-v2
    r"|[A-Za-z0-9]*[a-z0-9][A-Z][A-Za-z0-9_-]*"  # capitals inside: PickCube, StackCube-v1
)


def looks_like_identifier(text: str) -> bool:
    """Return whether a text looks like the name of a task rather than a sentence.

    Example:
        >>> [looks_like_identifier(text) for text in ("PnPCupToPlate", "lift_cube", "stop")]
        [True, True, False]
    """
    return _IDENTIFIER.fullmatch(text.strip()) is not None


def explain_identifier_as_instruction(instructions: Sequence[str]) -> str | None:
    """Return an error text if all instructions are the same identifier, and None otherwise."""
    distinct_texts: Collection[str] = set(instructions)
    if len(distinct_texts) != 1:
        return None
    text = next(iter(distinct_texts))
    if not looks_like_identifier(text):
        return None
    return (
        f"the instruction of all episodes is {text!r}, a name instead of a sentence. "
        "Name the column that contains the sentences as instruction in spear.json; "
        "`spear data inspect` lists the columns."
    )
