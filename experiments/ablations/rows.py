"""The ablations as data: what each row trains, and which published number it is the counterpart of.

The rows are in `rows.toml`; nothing here runs anything.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from spear.errors import check_known
from spear.util.options import OptionalFolder, Options, Range, RecipeChanges


@dataclass(frozen=True)
class Stage:
    """One training of a row.

    recipe   of `spear.train.recipes`; changes: as in `Recipe.with_changes`.
    length   factor on the recipe's steps; 0 only puts the network together.
    moge     the pretrained depth encoder joins.
    again    continues the stage before it on the same data: in another order.
    """

    recipe: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    length: float = 1.0
    moge: bool = False
    again: bool = False


@dataclass(frozen=True)
class Row:
    """One line of a table.

    title       for people: what is different in it; where the paper has the row, its name in the published
                numbers.
    stages      what is trained, in order; the last one is the policy.
    images      share of the 3D-labelled images that questions are asked about.
    pretrained  begins with the pretrained VLM; False: with random weights.
    """

    name: str
    title: str
    stages: Sequence[Stage]
    images: float = 1.0
    pretrained: bool = True


@dataclass(frozen=True)
class Table:
    """Rows that belong together.

    against    name of the row that the others are compared with.
    reference  name of the published table (`evaluate.compare`); "" where there is none.
    note       what to know when reading it.
    """

    name: str
    title: str
    against: str
    rows: Sequence[Row]
    reference: str = ""
    note: str = ""


def _load() -> tuple[Mapping[str, Mapping[str, Any]], Mapping[str, float], tuple[Table, ...]]:
    data = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    stages = {name: Stage(**fields) for name, fields in data["stages"].items()}
    tables = []
    for table in data["tables"]:
        rows = [
            Row(**{**row, "stages": [stages[name] for name in row["stages"]]})
            for row in table["rows"]
        ]
        tables.append(Table(**{**table, "rows": rows}))
    return data["settings"], data["lengths"], tuple(tables)


SETTINGS, LENGTHS, TABLES = _load()
"""Recipe -> how it is trained, and a factor on its steps, in all rows alike; and the tables."""


class AblationOptions(Options):
    rows: tuple[str, ...] = ()
    """Rows, or whole tables (3d, rotation, normalisation, siglip, converged, images); all without it."""
    seeds: Annotated[int, Range(1)] = 3
    """Trainings of each row."""
    scenes: Annotated[int, Range(1)] = 200
    """Held-out scenes of each task family, for every training."""
    out: Path = Path("runs/ablations")
    """Folder for everything."""
    labels: OptionalFolder = None
    """Folder of labelled scenes, from spear label. Without it, 13,056 scenes are labelled into OUT/labels."""
    episodes: OptionalFolder = None
    """Folder of demonstrations, from spear record. Without it, 2,000 per family are made in OUT/episodes."""
    init: str = "nano-vlm-0"
    """What stands for PaliGemma's weights in all rows: a trained folder of nano-vlm-0, or that name for the
    one that comes with this package."""
    moge: str = "nano-depth"
    """What stands for MoGe's: the same of nano-depth."""
    budget: Annotated[int | None, Range(1)] = None
    """Steps of the full row's policy, to which all are in proportion. Without it the recipes' own 12,000."""
    pretraining: Annotated[float, Range(1e-9, 1e9)] = 1.0
    """Factor on the steps of SPEAR-VLM's stages; 1: 200 and 2,600."""
    families: tuple[str, ...] = ()
    """Task families that policies learn (where demonstrations are made) and are scored on; none: all."""
    set: RecipeChanges = ()
    workers: Annotated[int, Range(0, 1024)] = 1
    """Processes that prepare batches, for each training."""
    plan: bool = False
    """Only print what would be done."""


def choose(names: Sequence[str]) -> list[tuple[Table, list[Row]]]:
    """The tables with the chosen rows, by names of rows or of whole tables (none: everything).

    The row that a table compares with always comes along. Raises `SpearError` for a name that there is not.
    """
    known = {row.name for table in TABLES for row in table.rows} | {table.name for table in TABLES}
    check_known("ablation", known, *names)
    chosen = []
    for table in TABLES:
        if wanted := [r for r in table.rows if not names or table.name in names or r.name in names]:
            chosen.append(
                (table, [r for r in table.rows if r in wanted or r.name == table.against])
            )
    return chosen
