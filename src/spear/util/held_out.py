"""Which scenes of the simulators are held out: their seeds are used for evaluation only, never for
training."""

import re

FIRST_TRAIN_SEED = 10_000  # scenes of smaller seeds are held out

_SCENE_SOURCE = re.compile(r"(?:sim|simpler|libero)[:/](?:[^/]+/)?(\d+)")
"""Matches the sources of simulated scenes: "sim:SEED", "simpler/TASK/SEED" and the like."""


def is_held_out_scene(source: str) -> bool:
    """Return whether a labeled image shows a held-out scene of one of the simulators.

    Args:
        source: The source of the labeled image.

    Example:
        >>> [is_held_out_scene(source) for source in ("sim:42", "sim:10042", "photos/cup.jpg")]
        [True, False, False]
    """
    match = _SCENE_SOURCE.match(source)
    return match is not None and int(match[1]) < FIRST_TRAIN_SEED
