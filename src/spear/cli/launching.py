"""What `spear train` does besides training: names and shares of datasets, and scripts that train on a
cluster."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spear.cli.arguments import key_values
from spear.errors import SpearError

if TYPE_CHECKING:
    from spear.data.store.episode_store import EpisodeStore
    from spear.train.launch import Cluster
    from spear.train.recipes import Recipe

LAUNCHING = ("launch", "nodes", "gpus", "job", "dry_run")
"""Arguments of `spear train` that the command on the cluster has not."""


def dataset_name(path: Path) -> str:
    """What a dataset's folder is called; where that is a version (bridge_dataset/1.0.0), what the one above
    is."""
    whole = path.resolve()
    return whole.parent.name if re.fullmatch(r"\d+\.\d+\.\d+", whole.name) else whole.name


def shares(stores: Sequence[EpisodeStore], weights: Sequence[float]) -> list[float]:
    """The weight of each dataset: as given, or as in the list of known datasets when all are there, or equal.

    Says on stderr what it chose where there are several. Raises SpearError for another number of weights than
    datasets.
    """
    from spear.data.readers.spec import REGISTRY

    if weights and len(weights) != len(stores):
        raise SpearError(
            f"--weights: {len(weights)} for {len(stores)} folders of --episodes: give one for each"
        )
    for weight in weights:
        if not 0 < weight < float("inf"):
            raise SpearError(f"--weights {weight:g}: give positive numbers")
    names = [store.source(0).partition("/")[0] for store in stores]
    known = [REGISTRY[name].weight if name in REGISTRY else None for name in names]
    chosen = list(weights) or [w for w in known if w is not None]
    if len(chosen) != len(stores):
        chosen = [1.0] * len(stores)
    if len(stores) > 1 and os.environ.get("RANK", "0") == "0":
        total = sum(chosen)
        parts = ", ".join(f"{name} {w / total:.1%}" for name, w in zip(names, chosen, strict=True))
        print(f"mixture: {parts}", file=sys.stderr)
    return chosen


def command(name: str, function: Callable[..., None], given: Mapping[str, Any]) -> list[str]:
    """The words of a command that has these arguments; those that are as they are without a word are left
    out."""
    words = ["spear", *name.split()]
    for key, parameter in inspect.signature(function).parameters.items():
        value = given[key]
        if key in LAUNCHING or value == parameter.default:
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY:
            words.append(str(value))
        else:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{key.replace('_', '-')}", *map(str, values)]
    return words


def write(
    cluster: Cluster,
    stage: Recipe,
    target: Path,
    words: Sequence[str],
    nodes: int,
    gpus: int,
    job: Sequence[str],
    dry_run: bool,
) -> None:
    """Write the script of a cluster into a run's folder, or print it. Raises SpearError for what cannot be
    run."""
    from spear.train import launch

    launch.check(stage, nodes, gpus)
    wanted = launch.Job(f"spear-{stage.name}", words, nodes, gpus, key_values(job, "--job"))
    text = launch.script(cluster, wanted)
    if dry_run:
        print(text, end="")
        return
    file = target / launch.FILES[cluster]
    try:
        target.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    except OSError as error:
        raise SpearError(f"cannot write: {file}: {error.strerror}; choose another --out") from error
    print(f"wrote {file}: submit it with {launch.SUBMIT[cluster]} {file}")
