"""Where each weight of a converted model comes from: loaded, new, left out, or refused by name."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from spear.errors import SpearError

Status = Literal["loaded", "new", "left out", "missing", "refused"]
PROBLEMS = ("missing", "refused")
_EXPERT = ("expert", "state_proj", "action_")
"""Beginnings of the names of weights that are the action expert's."""
_NUMBER = re.compile(r"\b\d+\b")


@dataclass(frozen=True)
class Key:
    """One weight.

    name    ours; for what is left out or refused, the checkpoint's.
    note    loaded: where from; new: its initialisation; else why.
    count   how many weights this line stands for (see `KeyReport.folded`).
    """

    name: str
    shape: tuple[int, ...]
    status: Status
    note: str
    count: int = 1

    @property
    def parameters(self) -> int:
        """Numbers in all the weights of this line."""
        return self.count * math.prod(self.shape)


@dataclass(frozen=True)
class KeyReport:
    """Every weight of a conversion: the new model's and the checkpoints'. Prints as a table."""

    keys: Sequence[Key]

    def of(self, *status: Status) -> list[Key]:
        """The keys of these statuses."""
        return [key for key in self.keys if key.status in status]

    def check(self, where: str) -> None:
        """Raise `SpearError`, naming the first key, when a weight is missing or refused."""
        for status in PROBLEMS:
            keys = [key for key in self.keys if key.status == status]
            if keys:
                first = f"{keys[0].name} ({keys[0].note})"
                raise SpearError(
                    f"checkpoint does not fit: {where}: {len(keys)} weights {status}, first {first}"
                )

    def folded(self) -> list[Key]:
        """The keys with the numbered layers of a stack as one line, unless something is wrong with them."""
        groups: dict[tuple[str, ...], list[Key]] = {}
        for key in self.keys:
            place = key.name if key.status in PROBLEMS else _NUMBER.sub("*", key.name)
            like = (place, str(key.shape), key.status, _NUMBER.sub("*", key.note))
            groups.setdefault(like, []).append(key)
        folded = []
        for keys in groups.values():
            first, last = keys[0], keys[-1]
            names = _span(first.name, last.name), _span(first.note, last.note)
            folded.append(Key(names[0], first.shape, first.status, names[1], len(keys)))
        return folded

    def modules(self) -> list[tuple[str, int, int]]:
        """Module -> parameters loaded and new, in the model's order."""
        totals: dict[str, list[int]] = {}
        for key in self.of("loaded", "new"):
            total = totals.setdefault(_module(key.name), [0, 0])
            total[key.status == "new"] += key.parameters
        return [(name, loaded, new) for name, (loaded, new) in totals.items()]

    def parameters(self) -> int:
        """Parameters of the new model."""
        return sum(loaded + new for _, loaded, new in self.modules())

    def module_table(self) -> str:
        """Parameters per module, and of each model as a whole."""
        modules = self.modules()
        vlm = [m for m in modules if not m[0].startswith(_EXPERT)]
        expert = [m for m in modules if m[0].startswith(_EXPERT)]
        lines = list(modules)
        for name, part in (("SPEAR-VLM", vlm), ("action expert", expert), ("all", modules)):
            if part and (expert or name != "all"):
                lines.append((name, sum(m[1] for m in part), sum(m[2] for m in part)))
        numbers = [(name, f"{loaded + new:,}", f"{loaded:,}", f"{new:,}") for name, loaded, new in lines]
        return _columns([("module", "parameters", "loaded", "new"), *numbers], right=(1, 2, 3))

    def __str__(self) -> str:
        rows = [("status", "weight", "shape", "number", "from")]
        for key in self.folded():
            shape = " × ".join(map(str, key.shape)) or "1"
            rows.append((key.status, key.name, shape, str(key.count), key.note))
        counts = {status: len(self.of(status)) for status in get_args(Status)}
        total = ", ".join(f"{n} {s}" for s, n in counts.items() if n or s in ("loaded", "new"))
        return f"{_columns(rows, right=(3,))}\n\n{self.module_table()}\n\n{total}"


def _module(name: str) -> str:
    """The part of the model that a weight belongs to: its first name, of the two Gemmas the first two."""
    inside = name.removeprefix("vlm.")
    parts = inside.split("[")[0].split(".")
    depth = 2 if parts[0] in ("language_model", "expert") else 1
    return name[: len(name) - len(inside)] + ".".join(parts[:depth])


def _span(first: str, last: str) -> str:
    """ "layers.0.x" and "layers.17.x" -> "layers.0…17.x"."""
    ends = iter(_NUMBER.findall(last))

    def both(match: re.Match[str]) -> str:
        end = next(ends)
        return match[0] if match[0] == end else f"{match[0]}…{end}"

    return _NUMBER.sub(both, first)


def _columns(rows: Sequence[tuple[str, ...]], right: tuple[int, ...]) -> str:
    """Rows as lines with aligned columns; those of `right` are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
