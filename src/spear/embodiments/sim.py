"""The embedded simulator (`spear/Tabletop-v0`), which speaks SPEAR-1's own language."""

import dataclasses
from typing import Any

from spear.embodiments import generic


def example() -> dict[str, Any]:
    """What the first held-out scene shows at its start."""
    from spear.sim.env import TabletopEnv

    observation, _ = TabletopEnv("put_on").reset(seed=0)
    return observation


EMBODIMENT = dataclasses.replace(generic.EMBODIMENT, example=example)
