"""Does another version of the code give the same labels, episodes, shards, weights and actions, bit for bit?

    python scripts/same_results.py run before.json --source OTHER_CHECKOUT/src --data RLDS_FOLDER
    python scripts/same_results.py run after.json --data RLDS_FOLDER
    python scripts/same_results.py compare before.json after.json

Runs the commands with fixed seeds on one thread: labels of 32 scenes, labels and questions through the whole
pipeline, 8 demonstrations of each family, an RLDS dataset prepared in two ways, 20 steps of every recipe at
nano size, 800 evaluation scenes of nano (--only leaves parts out). Kept is a SHA-256 of each file that they
write, without times, logs and pages; of recorded and prepared data one of each episode, as the version itself
reads it. Both runs must be on one machine: other processors round otherwise.
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

TIMES = ("seconds", "version")
NOT_RESULTS = re.compile(
    r"\.(lock|mp4|html|md|txt)$|events\.out|log\.jsonl|(run|recipe|settings)\.json$|/step-"
)
SHORT = "--steps 20 --seed 3 --preset nano --set batch_size=8"
LABELS, ROBOT, DATA = "--labels labels", "--episodes episodes", "--episodes prepared"
COMMANDS = {
    "labels": "label --scenes 32 --workers 1",
    "pipeline": "label sim:20-27 --detector ground-truth --segmenter ground-truth --pointmap ground-truth "
    "--questions --workers 1",
    "episodes": "record --episodes 8 --workers 1",
    "prepared": "data prepare {data} --size 168x126 --workers 1",
    "prepared_as_is": "data prepare {data} --workers 2",
}
TRAININGS = {
    "nano-depth": LABELS,
    "nano-siglip": LABELS,
    "nano-vlm-0": f"{LABELS} --init nano-siglip/final",
    "nano-vlm-1": f"{LABELS} --init nano-vlm-0 --moge nano-depth",
    "nano-vlm-2": f"{LABELS} --init nano-vlm-1/final",
    "nano-vla": f"{LABELS} {ROBOT} --init nano-vlm-2/final",
    "nano-vla-no-3d": f"{ROBOT} --init nano-vlm-0",
    "nano-post": f"{ROBOT} --init nano",
    "vlm-stage1": f"{LABELS} --init nano-vlm-0 --moge nano-depth",
    "vlm-stage2": f"{LABELS} --init vlm-stage1/final",
    "vla-pretrain": f"{ROBOT} prepared --init vlm-stage2/final",
    "post-train-bridge": f"{DATA} --init vla-pretrain/final",
    "post-train-droid": f"{DATA} --init vla-pretrain/final",
    "finetune-lora": f"{ROBOT} --init nano",
    "finetune-expert": f"{ROBOT} --init nano",
}
EVALUATION = {"evaluation": "evaluate --policy nano --scenes 200 --films 0"}

READ_EPISODES = """
import hashlib, json, sys
from spear.data.store.episode_store import EpisodeStore
found = {}
for episode in EpisodeStore(sys.argv[1]):
    numbers = episode.position, episode.rotation, episode.gripper, episode.action, episode.action_mask
    digest = hashlib.sha256(repr([episode.instruction, episode.rate_hz, episode.success]).encode())
    for array in numbers:
        digest.update(array.tobytes())
    for camera in sorted(episode.images):
        digest.update(camera.encode() + b"".join(episode.images[camera]))
    found[episode.source] = digest.hexdigest()
print(json.dumps(found))
"""


def digests(folder: Path) -> dict[str, str]:
    """File -> SHA-256 of what it holds; of JSON by its values, without times."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if NOT_RESULTS.search(f"/{name}"):
            continue
        data = path.read_bytes()
        if path.suffix in (".json", ".jsonl"):
            values = (
                [json.loads(line) for line in data.splitlines()]
                if path.suffix == ".jsonl"
                else [json.loads(data)]
            )
            data = "\n".join(
                sorted(json.dumps(without_times(v), sort_keys=True) for v in values)
            ).encode()
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def without_times(value: Any) -> Any:
    """A JSON value without the keys that tell times."""
    if isinstance(value, dict):
        return {key: without_times(inner) for key, inner in value.items() if key not in TIMES}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


def run(args: argparse.Namespace) -> int:
    """Runs the commands and writes their digests; 1 when one failed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if args.source:
        env["PYTHONPATH"] = str(args.source.resolve())
    spear = [sys.executable, "-c", "import sys; from spear.cli import main; sys.exit(main())"]
    trainings = {name: f"train {name} {words} {SHORT}" for name, words in TRAININGS.items()}
    found: dict[str, dict[str, str]] = {}
    failed = 0
    with tempfile.TemporaryDirectory() as work:
        for name, command in {**COMMANDS, **trainings, **EVALUATION}.items():
            if args.only and name not in args.only:
                continue
            begun = time.monotonic()
            words = [
                str(args.data.resolve()) if word == "{data}" else word for word in command.split()
            ]
            done = subprocess.run(
                [*spear, *words, "--out", name], cwd=work, env=env, capture_output=True, text=True
            )
            if name.startswith(("episodes", "prepared")) and not done.returncode:
                reader = [sys.executable, "-c", READ_EPISODES, name]
                read = subprocess.run(reader, cwd=work, env=env, check=True, stdout=subprocess.PIPE)
                found[name] = json.loads(read.stdout)
            else:
                found[name] = digests(Path(work) / name)
            print(
                f"{name}: {len(found[name])} results, {time.monotonic() - begun:.0f} s", flush=True
            )
            if done.returncode:
                failed = 1
                print(done.stderr, file=sys.stderr)
            args.file.write_text(json.dumps(found, indent=1))
    return failed


def compare(args: argparse.Namespace) -> int:
    """Says which files differ; 1 when some do."""
    first, second = json.loads(args.first.read_text()), json.loads(args.second.read_text())
    different = 0
    for name in sorted({*first, *second}):
        ours, theirs = first.get(name, {}), second.get(name, {})
        files = sorted(file for file in {*ours, *theirs} if ours.get(file) != theirs.get(file))
        different += len(files) or not ours  # what failed is not the same
        print(
            f"{name}: "
            + (f"different: {', '.join(files)}" if files else f"same, {len(ours)} results")
        )
    return int(different > 0)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run")
    one.add_argument("file", type=Path)
    one.add_argument(
        "--data", type=Path, required=True, help="an RLDS dataset, such as a piece of BridgeData V2"
    )
    one.add_argument("--source", type=Path, help="src of another checkout")
    one.add_argument("--only", nargs="*", default=(), help="names of some of the results")
    one.set_defaults(do=run)
    two = commands.add_parser("compare")
    two.add_argument("first", type=Path)
    two.add_argument("second", type=Path)
    two.set_defaults(do=compare)
    args = parser.parse_args()
    status: int = args.do(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
