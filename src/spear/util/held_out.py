"""Which simulated scenes are held out: their seeds are never used for training, only for
evaluation."""

import re

FIRST_TRAIN_SEED = 10_000  # scenes of smaller seeds are held out

_SCENE_SOURCE = re.compile(r"sim(?:pler)?[:/](?:[^/]+/)?(\d+)")


def is_held_out(source: str) -> bool:
    """Whether a labeled image shows a held-out scene of one of the two simulators.

    Args:
        source: The label's source.

    Example:
        >>> is_held_out("sim:42"), is_held_out("sim:10042"), is_held_out("photos/cup.jpg")
        (True, False, False)
    """
    match = _SCENE_SOURCE.match(source)
    return match is not None and int(match[1]) < FIRST_TRAIN_SEED
