"""The finished scores of the ablations, kept in one Parquet file.

    python -m experiments.ablations.scores runs/ablations    # adds the finished scores of a run

While a policy is being scored, its episodes are JSON lines in OUT/scores/KEY. This command copies
those whose scenes have all ended into `results/scores.parquet`. A key may contain slashes: it is
the path of the folder below OUT/scores. A row is one episode. Its columns are the key of the scored
training, the policy's name, the settings of the evaluation (JSON), the fields of `Outcome`, and two
times: `seconds` is how long the episode ran, `wall` the time since the one before it ended. Older
journals have no `wall`.
"""

import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tyro
from tyro.conf import Positional

from spear.cli import run_reporting_errors
from spear.errors import SpearError
from spear.evaluate.results import Outcome, Results, find_journals, merge_results, read_journal

SCORES = Path(__file__).with_name("results") / "scores.parquet"
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("policy", pa.string()),
        ("settings", pa.string()),
        ("family", pa.string()),
        ("seed", pa.int32()),
        ("instruction", pa.string()),
        ("success", pa.bool_()),
        ("reached", pa.bool_()),
        ("grasped", pa.bool_()),
        ("wrong_object_moved", pa.bool_()),
        ("unreachable", pa.int32()),
        ("steps", pa.int32()),
        ("seconds", pa.float64()),
        ("wall", pa.float64()),
    ]
)
OUTCOME_FIELDS = SCHEMA.names[3:12]


@cache
def load_scores(path: Path = SCORES) -> dict[str, Results]:
    """The results behind every key of a file of scores."""
    rows_by_key: dict[str, list[dict[str, Any]]] = {}
    for row in pq.read_table(path).to_pylist():
        rows_by_key.setdefault(row["key"], []).append(row)

    scores = {}
    for key, rows in rows_by_key.items():
        outcomes = [Outcome(**{field: row[field] for field in OUTCOME_FIELDS}) for row in rows]
        seconds = sum(row["seconds"] if row["wall"] is None else row["wall"] for row in rows)
        settings = json.loads(rows[0]["settings"])
        scores[key] = Results(rows[0]["policy"], settings, outcomes, seconds)
    return scores


def find_key(prefix: str, path: Path = SCORES) -> str:
    """The only key that begins with these digits. Raises `SpearError` unless there is just one."""
    keys = [key for key in load_scores(path) if key.startswith(prefix)]
    if len(keys) != 1:
        raise SpearError(f"{path}: {len(keys)} keys begin with {prefix}: give more digits")
    return keys[0]


def read_rows(folder: Path, key: str) -> Iterator[dict[str, Any]]:
    """The rows of a finished scoring in the folder OUT/scores/KEY, in the order of its journals."""
    for journal in find_journals(folder):
        lines = [json.loads(line) for line in journal.read_text("utf-8").splitlines()]
        header = lines[0]
        settings = json.dumps(header["settings"])
        for line in lines[1:]:
            if "scenes" in line:  # which scenes were to be run: here all of them
                continue
            yield {"key": key, "policy": header["policy"], "settings": settings, **line}


def is_finished(folder: Path) -> bool:
    """Whether all scenes that a folder's journals name have ended."""
    shards = [read_journal(journal) for journal in find_journals(folder)]
    return bool(shards) and not merge_results(shards).describe_unfinished()


def add_scores(out: Positional[Path], scores: Path = SCORES) -> None:
    """Add the finished scores of a run to a Parquet file.

    Args:
        out: folder of `python -m experiments.ablations`.
        scores: the file; scores of the same keys in it are replaced.
    """
    rows: list[dict[str, Any]] = []
    added_keys = []
    for folder in sorted((out / "scores").rglob("*")):
        if folder.is_dir() and is_finished(folder):
            key = folder.relative_to(out / "scores").as_posix()
            rows += read_rows(folder, key)
            added_keys.append(key)
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    if scores.is_file():
        earlier = pq.read_table(scores)
        is_replaced = pc.is_in(earlier["key"], value_set=pa.array(added_keys, pa.string()))
        table = pa.concat_tables([earlier.filter(pc.invert(is_replaced)), table])

    scores.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.sort_by("key"), scores, compression="zstd", compression_level=19)
    print(f"{scores}: {len(added_keys)} scores added, {table.num_rows} episodes in all")


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(add_scores)))
