"""How published files name their weights, as data.

Each source has a file `names_SOURCE.toml`, with rules that turn its names into ours.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class NameRules:
    """The rules for one source.

    renamed  Rules (old prefix, new prefix) that turn the source's names into ours. They are applied
             in this order, by `spear.models.weights.load.rename_prefixes`.
    unused   Patterns that match beginnings of our names -> why the new model needs no such weights.
             The reasons are part of the report that the user sees.
    """

    renamed: Sequence[tuple[str, str]]
    unused: Mapping[str, str]


def read_name_rules(source: str) -> NameRules:
    """Read the rules for a source: "paligemma", "pi0", "pi05" or "spear1_franka"."""
    file = Path(__file__).with_name(f"names_{source}.toml")
    content = tomllib.loads(file.read_text(encoding="utf-8"))
    renamed = [(old_prefix, new_prefix) for old_prefix, new_prefix in content["renamed"]]
    return NameRules(renamed, content["unused"])
