"""`spear evaluate simpler`: SIMPLER's WidowX tasks on ManiSkill 3."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from spear.cli.arguments import Folder, Name, at_least
from spear.cli.results import films_wanted, report
from spear.errors import SpearError


def evaluate_simpler(
    checkpoint: str = "nano",
    tasks: tuple[str, ...] = (),
    scenes: int = 384,
    first_seed: int = 0,
    replan: int = 1,
    batch: Annotated[int | None, arg(metavar="N")] = None,
    films: str = "1",
    out: Path = Path("runs/simpler"),
    compare: Folder = None,
    shard: str = "1/1",
    assets: Folder = None,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16"] = "float32",
    dataset: Name = None,
) -> None:
    """Let a policy act in SIMPLER's four WidowX tasks (ManiSkill 3), and count its successes.

    Needs pip install 'spear-vla[simpler]', ManiSkill's assets and a Vulkan driver: see docs/simpler.md. Prints
    success per task with 95 % intervals beside the paper's numbers; writes OUT/results.json and films. The
    same command continues an evaluation that was stopped.

    Examples:
        spear evaluate simpler --checkpoint runs/my_policy
        spear evaluate simpler --checkpoint oracle --tasks PutCarrotOnPlateInScene-v1 --out runs/oracle

    Args:
        checkpoint: nano (comes with this package), a folder with a trained policy, the ws:// address of a
            policy server, or a reference: oracle (a script that knows the true state) or nothing.
        tasks: ManiSkill's names; all four when none is given.
        scenes: Episodes per task. 384 are enough to know each task's success rate to ±5 points. A task has 24
            or 64 different starts: each comes up 16 or 6 times, with other noise for the policy; references,
            which have no noise, see each once.
        first_seed: Episodes first-seed, first-seed + 1, …
        replan: How many of the predicted actions are executed before the policy looks again.
        batch: Scenes that run at once, each in a process of its own; without it, as many as there are cores.
        films: Films of so many successes and failures per task; failures, for a film of every failure; or
            all.
        out: Folder for the results.
        compare: An earlier folder or results.json: also print the difference on the scenes that both have
            seen.
        shard: Run only a part of the scenes, 2/5 for the second of five (see `spear evaluate`).
        assets: ManiSkill's asset folder, where it is neither ~/.maniskill nor named by MS_ASSET_DIR.
        device: cpu, cuda, cuda:1 …; auto takes a GPU when there is one.
        dtype: Precision of the weights: bfloat16 takes half the memory of float32.
        dataset: Of a policy whose training datasets were normalised each by itself: the one whose units to
            use.
    """
    import torch

    from spear.evaluate.journal import Shard, load
    from spear.evaluate.load import load_agent
    from spear.evaluate.simpler.run import OracleActor, evaluate
    from spear.evaluate.simpler.tasks import TASKS
    from spear.train.devices import choose_device

    filmed = films_wanted(films)
    if batch is not None:
        at_least(1, batch=batch)
    if checkpoint == "expert":
        raise SpearError("--checkpoint expert: knows the embedded simulator only: give oracle")
    part = Shard.parse(shard)
    earlier = load(compare) if compare else None
    place, precision = choose_device(device), getattr(torch, dtype)
    oracle = checkpoint == "oracle" and dataset is None
    agent = OracleActor() if oracle else load_agent(checkpoint, place, precision, dataset)[0]
    evaluate(
        agent,
        tasks or tuple(TASKS),
        scenes,
        first_seed,
        replan,
        batch,
        films=filmed,
        out=out,
        shard=part,
        assets=assets,
    )
    report(checkpoint, out, earlier)
