"""Where each weight of a converted model comes from: loaded, new, left out, or refused by name."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from spear.errors import SpearError

Status = Literal["loaded", "new", "left out", "missing", "refused"]
PROBLEMS = ("missing", "refused")


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
    """Every weight of a conversion, those of the new model and those of the checkpoints. Prints as a
    table."""

    keys: Sequence[Key]

    def of(self, *status: Status) -> list[Key]:
        """The keys of these statuses."""
        return [key for key in self.keys if key.status in status]

    def check(self, where: str) -> None:
        """Raise `SpearError`, naming the first key, when a weight is missing or refused."""
        for status, verb in (("missing", "missing"), ("refused", "refused")):
            keys = [key for key in self.keys if key.status == status]
            if keys:
                first = keys[0]
                raise SpearError(
                    f"checkpoint does not fit: {where}: {len(keys)} weights {verb}, first {first.name} ({first.note})"
                )

    def folded(self) -> list[Key]:
        """The keys with the numbered layers of a stack as one line, unless something is wrong with them."""
        groups: dict[tuple[str, ...], list[Key]] = {}
        for key in self.keys:
            shape = str(key.shape)
            place = key.name if key.status in PROBLEMS else _without_numbers(key.name)
            groups.setdefault((place, shape, key.status, _without_numbers(key.note)), []).append(key)
        return [_fold(keys) for keys in groups.values()]

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
        rows = [("module", "parameters", "loaded", "new")]
        modules = self.modules()
        for name, loaded, new in modules:
            rows.append((name, f"{loaded + new:,}", f"{loaded:,}", f"{new:,}"))
        vlm = [m for m in modules if not m[0].startswith(_EXPERT)]
        expert = [m for m in modules if m[0].startswith(_EXPERT)]
        for name, part in (("SPEAR-VLM", vlm), ("action expert", expert), ("all", modules)):
            loaded, new = sum(m[1] for m in part), sum(m[2] for m in part)
            if part and (expert or name != "all"):
                rows.append((name, f"{loaded + new:,}", f"{loaded:,}", f"{new:,}"))
        return _columns(rows, right=(1, 2, 3))

    def __str__(self) -> str:
        rows = [("status", "weight", "shape", "number", "from")]
        for key in self.folded():
            shape = " × ".join(map(str, key.shape)) or "1"
            rows.append((key.status, key.name, shape, str(key.count), key.note))
        total = ", ".join(
            f"{len(keys)} {status}"
            for status in _ORDER
            if (keys := self.of(status)) or status in ("loaded", "new")
        )
        return f"{_columns(rows, right=(3,))}\n\n{self.module_table()}\n\n{total}"


_ORDER: tuple[Status, ...] = ("loaded", "new", "left out", "missing", "refused")
_EXPERT = ("expert", "state_proj", "action_")


def _module(name: str) -> str:
    """The part of the model that a weight belongs to: its first name, of the two Gemmas the first two."""
    inside = name.removeprefix("vlm.")
    parts = inside.split("[")[0].split(".")
    depth = 2 if parts[0] in ("language_model", "expert") else 1
    return name[: len(name) - len(inside)] + ".".join(parts[:depth])


def _without_numbers(name: str) -> str:
    return re.sub(r"\b\d+\b", "*", name)


def _fold(keys: Sequence[Key]) -> Key:
    first, last = keys[0], keys[-1]
    if len(keys) == 1:
        return first
    return Key(
        _span(first.name, last.name), first.shape, first.status, _span(first.note, last.note), len(keys)
    )


def _span(first: str, last: str) -> str:
    """ "layers.0.x" and "layers.17.x" -> "layers.0…17.x"."""
    ends = iter(re.findall(r"\b\d+\b", last))

    def both(match: re.Match[str]) -> str:
        end = next(ends)
        return match[0] if match[0] == end else f"{match[0]}…{end}"

    return re.sub(r"\b\d+\b", both, first)


def _columns(rows: Sequence[tuple[str, ...]], right: tuple[int, ...] = ()) -> str:
    """Rows as lines with aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
