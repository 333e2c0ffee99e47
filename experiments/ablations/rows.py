"""The ablations as data: what each row trains, and its counterpart among the published numbers.

The rows are in `rows.toml`; this file only reads them.
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

    recipe         of `spear.train.recipes`.
    changes        of the recipe, as in `Recipe.with_changes`.
    length         factor on the recipe's steps; 0 only puts the network together.
    moge           whether the pretrained depth encoder joins.
    another_order  whether it continues the stage before it on the same data, in another order.
    """

    recipe: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    length: float = 1.0
    moge: bool = False
    another_order: bool = False


@dataclass(frozen=True)
class Row:
    """One line of a table.

    title       what is different in it; where the paper has the row, its name in the published
                numbers.
    stages      what is trained, in order; the last one is the policy.
    images      fraction of the 3D-labeled images that questions are asked about.
    pretrained  whether it begins with the pretrained VLM; otherwise with random weights.
    """

    name: str
    title: str
    stages: Sequence[Stage]
    images: float = 1.0
    pretrained: bool = True


@dataclass(frozen=True)
class Table:
    """Rows that are compared with each other.

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


def _load_content() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def _load_tables(content: Mapping[str, Any]) -> tuple[Table, ...]:
    stages = {name: Stage(**fields) for name, fields in content["stages"].items()}
    tables = []
    for table_fields in content["tables"]:
        rows = []
        for row_fields in table_fields["rows"]:
            row_stages = [stages[name] for name in row_fields["stages"]]
            rows.append(Row(**{**row_fields, "stages": row_stages}))
        tables.append(Table(**{**table_fields, "rows": rows}))
    return tuple(tables)


_CONTENT = _load_content()
RECIPE_SETTINGS: Mapping[str, Mapping[str, Any]] = _CONTENT["settings"]
"""Recipe → how it is trained in all rows alike."""
STEP_FACTORS: Mapping[str, float] = _CONTENT["lengths"]
"""Recipe → factor on its steps in all rows alike."""
TABLES = _load_tables(_CONTENT)


class AblationOptions(Options):
    rows: tuple[str, ...] = ()
    """Rows, or whole tables: 3d, rotation, normalization, siglip, converged, images. Default:
    all.
    """
    seeds: Annotated[int, Range(1)] = 3
    """Number of trainings of each row."""
    num_scenes: Annotated[int, Range(1)] = 200
    """Held-out scenes of each task family that every trained policy is scored on."""
    out: Path = Path("runs/ablations")
    """Folder for trainings, scores and tables."""
    labels: OptionalFolder = None
    """Folder of labeled scenes, from spear label. Without it, 13,056 scenes are labeled into
    OUT/labels.
    """
    episodes: OptionalFolder = None
    """Folder of demonstrations, from spear record. Without it, 2,000 per family are made in
    OUT/episodes.
    """
    init: str = "nano-vlm-0"
    """What stands for PaliGemma's weights in all rows: a trained folder of nano-vlm-0, or that name
    for the one that comes with this package."""
    init_depth_encoder: str = "nano-depth"
    """What stands for MoGe's: the same of nano-depth."""
    budget: Annotated[int | None, Range(1)] = None
    """Steps of the full row's policy, to which all are in proportion. Without it the recipes' own
    12,000.
    """
    pretraining: Annotated[float, Range(1e-9, 1e9)] = 1.0
    """Factor on the steps of SPEAR-VLM's stages; 1: 200 and 2,600."""
    tasks: tuple[str, ...] = ()
    """Task families that policies learn (where demonstrations are made) and are scored on; none:
    all.
    """
    set: RecipeChanges = ()
    workers: Annotated[int, Range(0, 1024)] = 1
    """Processes that prepare batches, for each training."""
    dry_run: bool = False
    """Only print what would be done."""


def select_tables(names: Sequence[str]) -> list[tuple[Table, list[Row]]]:
    """The tables with the chosen rows, by names of rows or of whole tables; all if there are none.

    The row that a table compares with is always included. Raises `SpearError` for an unknown name.
    """
    known_names = {table.name for table in TABLES}
    for table in TABLES:
        known_names |= {row.name for row in table.rows}
    check_known("ablation", known_names, *names)

    selected = []
    for table in TABLES:
        is_whole_table = not names or table.name in names
        row_names = {row.name for row in table.rows if is_whole_table or row.name in names}
        if row_names:
            row_names.add(table.against)
            selected.append((table, [row for row in table.rows if row.name in row_names]))
    return selected
