"""Outcomes of made episodes, where only the success matters."""

from spear.evaluate.results import Outcome


def make_outcome(family: str, seed: int, success: bool) -> Outcome:
    """Make the outcome of an episode of 9 steps, which reaches and grasps only if it succeeds."""
    return Outcome(
        family=family,
        seed=seed,
        instruction="go",
        success=success,
        reached=success,
        grasped=success,
        wrong_object_moved=False,
        unreachable=0,
        steps=9,
    )
