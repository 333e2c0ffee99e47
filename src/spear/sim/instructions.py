"""What people say when they want a task done: several wordings per task family."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_INTO = (
    "put the {source} in the {target}",
    "place the {source} into the {target}",
    "pick up the {source} and put it in the {target}",
    "drop the {source} in the {target}",
    "move the {source} into the {target}",
    "take the {source} and place it in the {target}",
)
TEMPLATES: dict[str, Sequence[str]] = {
    "put_on": (
        "put the {source} on the {target}",
        "place the {source} on the {target}",
        "pick up the {source} and put it on the {target}",
        "move the {source} onto the {target}",
        "set the {source} down on the {target}",
        "take the {source} and place it on the {target}",
        "the {source} goes on the {target}",
    ),
    "put_in_bowl": _INTO,
    "put_in_basket": (*_INTO, "the {source} belongs in the {target}"),
    "spoon_on_towel": (
        "put the {source} on the {target}",
        "place the {source} on the {target}",
        "lay the {source} down on the {target}",
        "pick up the {source} and put it on the {target}",
        "move the {source} onto the {target}",
        "take the {source} and lay it on the {target}",
    ),
    "stack_cube": (
        "stack the {source} on the {target}",
        "put the {source} on top of the {target}",
        "place the {source} on the {target}",
        "pick up the {source} and stack it on the {target}",
        "set the {source} on top of the {target}",
        "move the {source} onto the {target}",
    ),
}
SYNONYMS: dict[str, Sequence[str]] = {
    "red cube": ("red cube", "red block"),
    "green cube": ("green cube", "green block"),
    "blue cube": ("blue cube", "blue block"),
    "yellow cube": ("yellow cube", "yellow block"),
    "can": ("can", "soda can"),
    "eggplant": ("eggplant", "aubergine"),
    "towel": ("towel", "cloth"),
    "plate": ("plate", "dish"),
}


def instruct(family: str, source: str, target: str, rng: np.random.Generator) -> str:
    """One wording at random of "`source` to `target`"."""
    key = "put_in_bowl" if family == "put_on" and target == "bowl" else family
    templates = TEMPLATES[key]
    return templates[int(rng.integers(len(templates)))].format(
        source=_call(source, rng), target=_call(target, rng)
    )


def _call(name: str, rng: np.random.Generator) -> str:
    names = SYNONYMS.get(name, (name,))
    return names[int(rng.integers(len(names)))]
