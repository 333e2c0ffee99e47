r"""Compares two versions of the code: labels, episodes, shards, weights and actions, bit for bit.

    python scripts/same_results.py run before.json --source OTHER_CHECKOUT/src --data RLDS_FOLDER \
        [--old-options]
    python scripts/same_results.py run after.json --data RLDS_FOLDER
    python scripts/same_results.py compare before.json after.json

Runs the commands with fixed seeds on one thread: labels of 32 scenes, labels and questions through
the whole pipeline, 8 demonstrations of each family, an RLDS dataset prepared in two ways, 20 steps
of every recipe at nano size, 800 evaluation scenes of nano (--only leaves parts out). It keeps a
SHA-256 of each file that they write, without times, logs and pages; of recorded and prepared data
one of each episode, as the version itself reads it. Both runs must be on one machine: other
processors round differently. The scenes of a family are evaluated in one batch: a policy's actions
depend, by rounding, on the other scenes of their batch, and older versions split scenes otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TIME_KEYS = ("seconds", "wall", "version")
NOT_RESULTS = re.compile(
    r"\.(lock|mp4|html|md|txt)$|events\.out|log\.jsonl|(run|recipe|settings)\.json$|/step-"
)
TRAIN_OPTIONS = "--steps 20 --seed 3 --preset nano --set batch_size=8"
LABELS = "--labels labels"
ROBOT = "--episodes episodes"
DATA = "--episodes prepared"
TRUE_LABELS = "--detector ground-truth --segmenter ground-truth --pointmap ground-truth"
COMMANDS = {
    "labels": "label --num-scenes 32 --workers 1",
    "pipeline": f"label sim:20-27 {TRUE_LABELS} --questions --workers 1",
    "episodes": "record --num-episodes 8 --workers 1",
    "prepared": "data prepare {data} --image-size 168x126 --workers 1",
    "prepared_as_is": "data prepare {data} --workers 2",
}
TRAININGS = {
    "nano-depth": LABELS,
    "nano-siglip": LABELS,
    "nano-vlm-0": f"{LABELS} --init nano-siglip/final",
    "nano-vlm-1": f"{LABELS} --init nano-vlm-0 --init-depth-encoder nano-depth",
    "nano-vlm-2": f"{LABELS} --init nano-vlm-1/final",
    "nano-vla": f"{LABELS} {ROBOT} --init nano-vlm-2/final",
    "nano-vla-no-3d": f"{ROBOT} --init nano-vlm-0",
    "nano-post": f"{ROBOT} --init nano",
    "vlm-stage1": f"{LABELS} --init nano-vlm-0 --init-depth-encoder nano-depth",
    "vlm-stage2": f"{LABELS} --init vlm-stage1/final",
    "vla-pretrain": f"{ROBOT} prepared --init vlm-stage2/final",
    "post-train-bridge": f"{DATA} --init vla-pretrain/final",
    "post-train-droid": f"{DATA} --init vla-pretrain/final",
    "finetune-lora": f"{ROBOT} --init nano",
    "finetune-expert": f"{ROBOT} --init nano",
}
EVALUATION = {"evaluation": "evaluate --policy nano --num-scenes 200 --batch-size 200 --videos 0"}

READ_EPISODES = """
import hashlib, json, sys
from spear.data.store.episode_store import EpisodeStore
digests = {}
for episode in EpisodeStore(sys.argv[1]):
    facts = [episode.instruction, episode.rate_hz, episode.success]
    digest = hashlib.sha256(repr(facts).encode())
    for array in (episode.position, episode.rotation, episode.gripper):
        digest.update(array.tobytes())
    for array in (episode.action, episode.action_mask):
        digest.update(array.tobytes())
    for camera in sorted(episode.images):
        digest.update(camera.encode() + b"".join(episode.images[camera]))
    digests[episode.source] = digest.hexdigest()
print(json.dumps(digests))
"""

# Options by their names in versions before the command line's present ones.
OLD_OPTIONS = {
    "--num-scenes": "--scenes",
    "--num-episodes": "--episodes",
    "--batch-size": "--batch",
    "--image-size": "--size",
    "--init-depth-encoder": "--moge",
    "--videos": "--films",
}


# --- Digests ---


def digest_files(folder: Path) -> dict[str, str]:
    """Return file -> SHA-256 of its content; of JSON by its values, without times."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and not NOT_RESULTS.search(f"/{name}"):
            digests[name] = hashlib.sha256(read_content(path)).hexdigest()
    return digests


def read_content(path: Path) -> bytes:
    """Return what of a file counts."""
    content = path.read_bytes()
    if path.suffix == ".jsonl":
        values = [json.loads(line) for line in content.splitlines()]
    elif path.suffix == ".json":
        values = [json.loads(content)]
    else:
        return content
    lines = [json.dumps(drop_times(value), sort_keys=True) for value in values]
    return "\n".join(sorted(lines)).encode()


def drop_times(value: Any) -> Any:
    """Return a JSON value without the keys that tell times."""
    if isinstance(value, dict):
        return {key: drop_times(inner) for key, inner in value.items() if key not in TIME_KEYS}
    if isinstance(value, list):
        return [drop_times(inner) for inner in value]
    return value


def digest_episodes(folder: str, work: Path, environment: dict[str, str]) -> dict[str, str]:
    """Return the digest of each episode in a folder, as the version itself reads it."""
    command = [sys.executable, "-c", READ_EPISODES, folder]
    result = subprocess.run(command, cwd=work, env=environment, check=True, stdout=subprocess.PIPE)
    return json.loads(result.stdout)


# --- Commands ---


def run(args: argparse.Namespace) -> int:
    """Run the commands and write their digests; return 1 when one failed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if args.source:
        environment["PYTHONPATH"] = str(args.source.resolve())
    commands = dict(COMMANDS)
    for name, words in TRAININGS.items():
        commands[name] = f"train {name} {words} {TRAIN_OPTIONS}"
    commands |= EVALUATION

    digests: dict[str, dict[str, str]] = {}
    status = 0
    with tempfile.TemporaryDirectory() as work_name:
        work = Path(work_name)
        for name, command in commands.items():
            if args.only and name not in args.only:
                continue
            start = time.monotonic()
            if args.old_options:
                command = use_old_options(command)
            result = run_spear(command, name, args.data, work, environment)
            has_episodes = name.startswith(("episodes", "prepared"))
            if has_episodes and result.returncode == 0:
                digests[name] = digest_episodes(name, work, environment)
            else:
                digests[name] = digest_files(work / name)
            elapsed_s = time.monotonic() - start
            print(f"{name}: {len(digests[name])} results, {elapsed_s:.0f} s", flush=True)
            if result.returncode != 0:
                status = 1
                print(result.stderr, file=sys.stderr)
            args.file.write_text(json.dumps(digests, indent=1))
    return status


def use_old_options(command: str) -> str:
    """Return a command with the option names of older versions."""
    return " ".join(OLD_OPTIONS.get(word, word) for word in command.split())


def run_spear(
    command: str, out: str, data: Path, work: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run one command in the folder `work`, which writes to `out` there."""
    spear = [sys.executable, "-c", "import sys; from spear.cli import main; sys.exit(main())"]
    words = [str(data.resolve()) if word == "{data}" else word for word in command.split()]
    return subprocess.run(
        [*spear, *words, "--out", out], cwd=work, env=environment, capture_output=True, text=True
    )


def compare(args: argparse.Namespace) -> int:
    """Print which files differ; return 1 when some do."""
    first = json.loads(args.first.read_text())
    second = json.loads(args.second.read_text())
    status = 0
    for name in sorted({*first, *second}):
        first_files = first.get(name, {})
        second_files = second.get(name, {})
        different_files = []
        for file in sorted({*first_files, *second_files}):
            if first_files.get(file) != second_files.get(file):
                different_files.append(file)

        has_failed = not first_files  # what failed twice is not the same
        if different_files or has_failed:
            status = 1
        if different_files:
            print(f"{name}: different: {', '.join(different_files)}")
        else:
            print(f"{name}: same, {len(first_files)} results")
    return status


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    run_parser = commands.add_parser("run")
    run_parser.add_argument("file", type=Path)
    run_parser.add_argument(
        "--data", type=Path, required=True, help="an RLDS dataset, such as a piece of BridgeData V2"
    )
    run_parser.add_argument("--source", type=Path, help="src of another checkout")
    run_parser.add_argument(
        "--old-options", action="store_true", help="the checkout has the old names of options"
    )
    run_parser.add_argument("--only", nargs="*", default=(), help="names of some of the results")
    run_parser.set_defaults(function=run)
    compare_parser = commands.add_parser("compare")
    compare_parser.add_argument("first", type=Path)
    compare_parser.add_argument("second", type=Path)
    compare_parser.set_defaults(function=compare)
    args = parser.parse_args()
    status: int = args.function(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
