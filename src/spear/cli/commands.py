"""The commands. Each is a function whose docstring is its help; what is heavy is imported inside it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from spear.cli import data_commands, label_commands, launching, serve_commands
from spear.errors import SpearError, unknown_name

if TYPE_CHECKING:
    from spear.data.episode import EpisodeStore

Folder = Annotated[Path | None, arg(metavar="FOLDER")]
File = Annotated[Path | None, arg(metavar="FILE")]
Name = Annotated[str | None, arg(metavar="NAME")]
Number = Annotated[int | None, arg(metavar="INT")]


def ask(
    image: Annotated[Positional[str], arg(metavar="IMAGE")],
    question: Annotated[Positional[str], arg(metavar="QUESTION")],
    /,
    model: str = "nano",
    family: Name = None,
    decode: Literal["mode", "mean", "median"] = "mode",
    draw: File = None,
) -> None:
    """Ask SPEAR-VLM a 3D question about an image.

    Numbers in the answer are metres from the camera: x to the right, y down, z forward.

    Examples:
        spear ask photo.jpg "How far away is the mug?"
        spear ask sim:7 "Provide the 3D bounding box coordinates of the carrot" --draw box.png

    Args:
        image: A JPEG or PNG file, or sim:SEED for a scene of the built-in simulator.
        question: What to ask, in words.
        model: The model that comes with this package (nano), or a folder with a trained one.
        family: Kind of question, which fixes the form of the answer: box_vertices, keypoint, offset,
            distance, back_projection or chain_of_thought. Without it the model answers freely.
        decode: Which number is said of those that the model holds possible: the likeliest (mode), the expected
            value (mean), or the one in the middle (median). `spear evaluate vqa` measures which is best.
        draw: Save the image with the answer's box drawn on it (for sim: images, whose camera is known).
    """
    from PIL import Image

    from spear.evaluate import ask as asking
    from spear.policy import load_vlm

    bundle = load_vlm(model)
    picture = asking.read_picture(image, bundle.processor.image_sizes["external"])
    answer = asking.ask(bundle, picture, question, family, decode)
    print(asking.words(answer, picture))
    if draw:
        Image.fromarray(asking.draw(answer, picture)).save(draw)


def record(
    out: Path = Path("runs/episodes"),
    episodes: int = 200,
    families: tuple[str, ...] = (),
    first_seed: int = 10_000,
    preset: str = "nano",
    workers: int = 2,
) -> None:
    """Record demonstrations of the scripted expert in the simulator, to train a policy on.

    Now and then the arm is pushed off course; the expert recovers, and the push itself is never a training
    target. Demonstrations that fail are left out.

    Example:
        spear record --episodes 3000 --out runs/episodes

    Args:
        out: Folder to write to.
        episodes: How many demonstrations per task family.
        families: Task families; all of them when none is given.
        first_seed: Scenes first-seed, first-seed + 1, … Those below 10000 are kept for testing.
        preset: Model size whose cameras are used.
        workers: Processes.
    """
    from rich.progress import track

    from spear.data.episode import write_episodes
    from spear.models.presets import preset as find_preset
    from spear.sim.record import record as demonstrate
    from spear.sim.scene import FAMILIES, TRAIN_SEED

    if first_seed < TRAIN_SEED:
        raise SpearError(
            f"--first-seed {first_seed}: scenes below {TRAIN_SEED} are kept for testing: raise it"
        )
    for family in families:
        if family not in FAMILIES:
            raise unknown_name("task family", family, FAMILIES)
    sizes = find_preset(preset).image_sizes
    tasks = [(f, first_seed + i) for i in range(episodes) for f in families or FAMILIES]
    made = demonstrate(tasks, sizes["external"], sizes["wrist"], workers=workers)
    shown = track(made, "recording", total=len(tasks), console=_stderr())
    written = write_episodes((e for e in shown if e.success), out)
    print(f"{written} of {len(tasks)} demonstrations succeeded and are in {out}")


def train(
    recipe: Annotated[Positional[str], arg(metavar="RECIPE")],
    /,
    out: Folder = None,
    labels: Folder = None,
    episodes: tuple[Path, ...] = (),
    split: str = "train",
    weights: tuple[float, ...] = (),
    init: Name = None,
    moge: Folder = None,
    preset: Name = None,
    steps: Number = None,
    seed: int = 0,
    device: str = "auto",
    parallel: Literal["ddp", "fsdp"] = "ddp",
    set: tuple[str, ...] = (),
    launch: Annotated[Literal["slurm", "ray", "kubernetes"] | None, arg(metavar="CLUSTER")] = None,
    nodes: int = 1,
    gpus: int = 1,
    job: tuple[str, ...] = (),
    dry_run: bool = False,
) -> None:
    """Train one stage. Stopped at any moment, the same command continues where it was.

    `spear train list` shows the recipes. With --launch it does not train, but writes the script (OUT/slurm.sh, ray.sh
    or kubernetes.yaml) by which a cluster runs this command on many GPUs, again after each preemption.

    Examples:
        spear train nano-vlm-2 --labels runs/labels --init runs/nano-vlm-1/final
        spear train nano-post --episodes my_rlds_folder --init nano --out runs/my_robot
        spear train post-train-droid --episodes droid/1.0.1 --init runs/vla --launch slurm --nodes 2 --gpus 8 --dry-run
        torchrun --nproc-per-node 8 --no-python spear train post-train-bridge … --parallel fsdp

    Args:
        recipe: Name of the recipe, or list.
        out: Folder for checkpoints, logs and the result (OUT/final); default: runs/RECIPE.
        labels: Folder of labelled images, from spear label.
        episodes: Folders of robot demonstrations: from spear record, or RLDS or LeRobot datasets.
        split: Which episodes of each folder: train, train[:90%], train+val …
        weights: Shares of the folders in each batch, one for each. Without them: those in the list of known datasets
            (spear data datasets) where all are in it, otherwise equal ones.
        init: Where to start from: a trained folder, or nano for the weights that come with this package.
            Without it, training starts from random weights.
        moge: Trained folder of a depth recipe, whose encoder SPEAR-VLM begins with.
        preset: Model size, when it shall not be the recipe's: nano, small or spear1.
        steps: Number of steps, when it shall not be the recipe's.
        seed: Two runs with the same seed give the same weights.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N. Of several processes each takes a GPU of its own.
        parallel: What several processes (torchrun) hold: ddp, each the whole model; fsdp, each its share of it.
        set: Changes to the recipe as KEY=VALUE, for example batch_size=16 lr=1e-4.
        launch: Write a script for this cluster instead: slurm, ray or kubernetes.
        nodes: Machines that it runs on.
        gpus: GPUs of each, one process per GPU; 0 for machines without.
        job: What the cluster must know, as KEY=VALUE: time, partition, account, cpus, setup (slurm); address (ray);
            image, volume, mount, cpus (kubernetes).
        dry_run: Only print the script.
    """
    given = dict(locals())
    from transformers.utils.logging import disable_progress_bar

    from spear.models.presets import preset as find_preset
    from spear.policy import locate
    from spear.train.recipes import RECIPES
    from spear.train.recipes import recipe as find

    if recipe == "list":
        for known in RECIPES.values():
            print(f"{known.name:<17} {known.description}")
        return
    named = {"preset": preset, "steps": steps}
    changes = recipe_changes(set) | {key: value for key, value in named.items() if value is not None}
    stage = find(recipe).changed(**changes)
    find_preset(stage.preset)
    target = out or Path("runs") / recipe
    if launch:
        launching.write(
            launch, stage, target, launching.command("train", train, given), nodes, gpus, job, dry_run
        )
        return
    if dry_run or job:
        raise SpearError(
            "--dry-run and --job are for scripts: say for what with --launch slurm, ray or kubernetes"
        )
    start = locate(init) if init else None
    encoder = locate(moge) if moge else None
    from spear.train.run import train as run

    disable_progress_bar()
    stores = [_episodes(path, target / "data", split) for path in episodes]
    mixed = zip(episodes, stores, launching.shares(stores, weights), strict=True)
    robots = [(launching.dataset_name(path), store, share) for path, store, share in mixed]
    final = run(
        recipe,
        target,
        labels,
        robots,
        start,
        encoder,
        seed,
        device=device,
        sharded=parallel == "fsdp",
        **changes,
    )
    print(f"trained: {final}")


def evaluate(
    policy: str = "nano",
    families: tuple[str, ...] = (),
    scenes: int = 381,
    first_seed: int = 0,
    replan: int = 2,
    batch: int = 32,
    films: str = "1",
    out: Path = Path("runs/evaluate"),
    compare: File = None,
    execution: Literal["sync", "async", "ensemble"] = "sync",
    latency_ms: float = 0.0,
    shard: str = "1/1",
) -> None:
    """Let a policy act in simulated scenes it has never seen, and count its successes.

    Prints success per task family with 95 % intervals; writes OUT/results.json and films of successes and
    failures. Outcomes are written as they come: the same command continues an evaluation that was stopped, and one
    with more --scenes adds to it.

    Examples:
        spear evaluate --policy nano --scenes 200
        spear evaluate --policy runs/my_policy --families stack_cube --compare runs/evaluate --out runs/mine
        spear evaluate --policy nano --shard 2/5 --films failures

    Args:
        policy: nano (comes with this package), a folder with a trained policy, the ws:// address of a policy
            server, or a reference: expert or nothing.
        families: Task families; all of them when none is given.
        scenes: Scenes per family. 381 are enough to know each family's success rate to ±5 points.
        first_seed: Scenes first-seed, first-seed + 1, … below 10000.
        replan: How many of the predicted actions are executed before the policy looks again.
        batch: Scenes that run at once.
        films: Films of so many successes and failures per family; or failures, for a film of every failure.
        out: Folder for the results.
        compare: An earlier folder or results.json: also print the difference on the scenes that both have seen.
        execution: sync waits for each chunk of actions; async moves on while the next one is computed;
            ensemble looks at every step and averages what all chunks say about it.
        latency_ms: Simulated time that the policy takes to answer, in milliseconds.
        shard: Run only a part of the scenes, 2/5 for the second of five. Parts with the same --out come together
            there; parts from other machines with `spear evaluate merge`.
    """
    from rich import print as show

    from spear.evaluate.closed_loop import evaluate as run
    from spear.evaluate.compare import compare as difference
    from spear.evaluate.journal import Shard, load
    from spear.evaluate.load import load_actor
    from spear.evaluate.reference import beside
    from spear.sim.scene import FAMILIES

    if films != "failures" and not films.isdecimal():
        raise SpearError(f"--films {films}: give a number, or failures for a film of every failure")
    part = Shard.parse(shard)
    earlier = load(compare) if compare else None
    actor, sizes = load_actor(policy)
    run(
        actor,
        families or FAMILIES,
        scenes,
        first_seed,
        replan,
        batch,
        films="failures" if films == "failures" else int(films),
        execution=execution,
        latency_ms=latency_ms,
        out=out,
        shard=part,
        **sizes,
    )
    results = load(out)
    results.save(out / "results.json")
    show(results.table())
    for published in beside(results):
        show(published.table([(policy, results)]))
    if earlier:
        show(difference(results, earlier).table())
    print(f"results in {out}")


def evaluate_data(
    policy: Annotated[Positional[str], arg(metavar="POLICY")],
    data: Annotated[Positional[Path], arg(metavar="FOLDER")],
    /,
    split: str = "train",
    train: Folder = None,
    train_split: Name = None,
    plot: File = None,
) -> None:
    """Compare a policy's actions with a demonstrator's, on recorded episodes (no robot needed).

    Prints the errors, with 95 % intervals over episodes, beside those of two policies that see nothing: always the mean
    action, and always the last action again.

    Examples:
        spear evaluate data runs/my_robot runs/held_out --train runs/train --plot errors.png
        spear evaluate data runs/my_robot my_dataset --split "train[90%:]" --train-split "train[:90%]"

    Args:
        policy: nano (comes with this package) or a folder with a trained policy.
        data: Folder of held-out episodes, in any format (see `spear data inspect`).
        split: Which of its episodes are held out: train, val, train[90%:] …
        train: Folder of the training episodes, whose mean action is a reference (default: the same folder
            with --train-split, or else the held-out episodes).
        train_split: Which of the training folder's episodes were trained on.
        plot: Save a plot of predictions and truth as PNG.
    """
    from tempfile import TemporaryDirectory

    from spear.evaluate import open_loop
    from spear.policy import Spear1Policy

    with TemporaryDirectory() as scratch:
        held_out = _episodes(data, Path(scratch) / "held-out", split)
        ours = open_loop.score(policy, Spear1Policy.load(policy), held_out)
        learned = held_out
        if train or train_split:
            learned = _episodes(train or data, Path(scratch) / "train", train_split or "train")
        reference = open_loop.score_mean_action(learned, held_out)
        scores = (ours, reference, open_loop.score_last_action(held_out))
    print(
        f"{len(held_out)} held-out episodes".ljust(24)
        + "".join(f"{s.name[-26:]:<28}" for s in scores).rstrip()
    )
    summaries = [score.summary() for score in scores]
    for name in summaries[0]:
        cells = (f"{s[name].value:.3f} [{s[name].low:.3f}, {s[name].high:.3f}]" for s in summaries)
        print(f"{name.replace('_', ' '):<24}" + "".join(f"{cell:<28}" for cell in cells).rstrip())
    if plot:
        plot.write_bytes(open_loop.plot(ours, reference))


def demo(out: Path = Path("runs/demo"), data: Folder = None) -> None:
    """Walk the whole way and make one HTML page of it; takes a few minutes on a laptop.

    Images labelled in 3D; answers to 3D questions; the robot at work in the simulator, with films; and a
    fine-tuning on real robot episodes.

    Example:
        spear demo --out runs/demo --data bridge_dataset/1.0.0

    Args:
        out: Folder for the page and its intermediate results.
        data: A folder with real robot episodes (RLDS, LeRobot).
    """
    from spear.demo import make

    print(f"open {make(out, data).resolve()}")


def _episodes(path: Path, out: Path, split: str = "train") -> EpisodeStore:
    """The episodes of a folder; what is not our own store is prepared first, into OUT, by the first process."""
    from spear.data.prepare import open_store

    store, reasons = open_store(path, out, split, wait=int(os.environ.get("RANK", "0")) > 0)
    for reason in reasons[:5]:
        print(f"set aside: {reason}", file=sys.stderr)
    if reasons:
        print(f"{path}: {len(store)} episodes, {len(reasons)} set aside", file=sys.stderr)
    return store


def recipe_changes(items: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE words as changes to a recipe. Raises `SpearError` for a word without =."""
    changes = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals:
            raise SpearError(f"--set {item}: write it as KEY=VALUE")
        changes[key] = _value(value)
    return changes


def _value(text: str) -> Any:
    """A number, true/false/null or list as JSON has them; anything else is a string."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _stderr() -> Any:
    from rich.console import Console

    return Console(file=sys.stderr)


COMMANDS: dict[str, Callable[..., None]] = {
    "label": label_commands.label,
    "label show": label_commands.show,
    "questions": label_commands.ask_about,
    "ask": ask,
    "record": record,
    "train": train,
    "evaluate": evaluate,
    "evaluate data": evaluate_data,
    "serve": serve_commands.serve,
    **data_commands.COMMANDS,
    "demo": demo,
}
